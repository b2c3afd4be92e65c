"""Any function of images as an upstream: torchvision, albumentations, PIL, numpy or torch."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from methods import own
from methods.base import IMAGES, Batch, Context, Method
from methods.naming import NamingError

FORMS = {
    "image": "a PIL image",
    "array": "a numpy array (H, W, C) of uint8",
    "named": "a numpy array (H, W, C) of uint8 by the keyword image",
    "tensor": "a tensor (C, H, W) in [0, 1]",
    "batch": "a batch of tensors (B, C, H, W) in [0, 1]",
}
"""The forms of input to try, in this order."""
RANGE_APART = 0.1
"""By how much the mean change per pixel on uint8 may exceed that on floats."""
MOST = 0.9
TRIED_ROWS, TRIED_SEEDS = 8, 2
"""Training rows and seeds per trial of a callable."""
IDLE_SEEDS = 16
"""Seeds per trial while a callable has not changed any row."""
SLACK = 1e-3
"""How far floats may lie outside [0, 1], because interpolation overshoots; they are clipped."""


class _Fault(Exception):
    """A callable did what no augmentation may do; the text continues after its name."""


class _Raised(_Fault):
    """It raised an exception."""


class _Misshapen(_Fault):
    """It returned something other than an image of the same size."""


class _Resized(_Fault):
    """Given a PIL image, it returned one of another size or mode: it does take PIL images."""


class _Trial(NamedTuple):
    """Whether a callable changes its input in place, and whether its result ever differs."""

    in_place: bool
    effect: bool


class Wrap(Method):
    """Any function of images in your own file: ``wrap(call=py:mine:pipeline)``.

    It takes one image, or a batch, and returns the same: a torchvision (v1 or v2) or albumentations
    transform, or a function of PIL images, numpy arrays or tensors. ``takes`` sets the form of its
    input: a PIL ``image``, an ``array`` (H, W, C) of uint8 (by position, or by the keyword
    ``image`` if it returns a mapping), a ``tensor`` (C, H, W) or a ``batch`` (B, C, H, W) in
    [0, 1]; ``auto`` tries these in this order on training images. It returns uint8, or floats in
    [0, 1], of the same size and channels.

    Before each call the generators of random, numpy, torch and an albumentations transform are
    seeded from the run's seed, the step and the row; afterwards the global ones are restored. So
    the result for a row does not depend on the rest of the batch. A batch is seeded once.

    **Deviations**: a PIL image or an array has 8 bits, so its input is rounded to 8 bits.
    """

    kinds = IMAGES
    waits = "the function works on the CPU, or its result is checked"

    def __init__(
        self,
        *,
        call: str,
        takes: Literal["auto", "image", "array", "tensor", "batch"] = "auto",
    ) -> None:
        super().__init__()
        function = own.load(call, "wrap: call")
        hint = ""
        if isinstance(function, Method) or (
            isinstance(function, type) and issubclass(function, Method)
        ):
            hint = f"a method: name it without wrap, {call}"
        elif isinstance(function, type):
            hint = f"a class: create an instance, such as pipeline = {function.__name__}()"
        elif not callable(function):
            hint = f"{function!r}"
        if hint:
            raise ValueError(f"call: expected a function of images, {call} is {hint}")
        self.call, self.takes = call, takes
        self._function: tuple[Callable[..., Any]] = (
            function,
        )  # a tuple hides an nn.Module from ours
        self._form = ""
        self.remarks: tuple[str, ...] = ()
        """Findings of the trial, for the user."""

    def setup(self, ctx: Context) -> None:
        """Try the callable on training rows.

        Raises:
            NamingError: it does something that no augmentation may do; the message says what.
        """
        with _generators_kept(ctx.train.targets.device), torch.no_grad():
            self._try_out(ctx.train.rows(ctx.train.index[:TRIED_ROWS]))

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Apply the callable to each row, or to the batch; targets stay."""
        base = int(
            torch.randint(2**62, (), device="cpu")
        )  # a function of seed and step, as the trainer seeds it
        try:
            with _generators_kept(batch.x.device), torch.no_grad():
                return replace(batch, x=self._applied(self._form, batch, base))
        except _Fault as fault:
            raise ValueError(f"{self.call} {fault}") from fault

    def _try_out(self, batch: Batch) -> None:
        """Find the form of input that it takes."""
        wanted = {"auto": tuple(FORMS), "array": ("array", "named")}
        faults: dict[str, _Fault] = {}
        idle: dict[str, _Trial] = {}
        for form in wanted.get(self.takes, (self.takes,)):
            try:
                trial = self._trial(form, batch)
            except _Resized as fault:
                raise NamingError(f"{self.call}, given {FORMS[form]}, {fault}") from fault
            except _Fault as fault:
                faults[form] = fault
            else:
                if trial.effect:
                    return self._take(form, trial, batch)
                idle[form] = trial
        # torchvision's transforms return what they do not know, such as an array, unchanged.
        if idle:
            form = next((each for each in idle if each != "array"), "array")
            return self._take(form, idle[form], batch)
        # The form that came closest to working explains best what went wrong.
        for distant in ((_Raised, _Misshapen), _Raised):
            for form, fault in faults.items():
                if not isinstance(fault, distant):
                    raise NamingError(f"{self.call}, given {FORMS[form]}, {fault}") from fault
        alike: dict[str, list[str]] = {}
        for form, fault in faults.items():
            if form != "named" or not isinstance(fault.__cause__, TypeError):
                alike.setdefault(str(fault).rstrip("."), []).append(FORMS[form])
        told = [f"given {' or '.join(forms)}, it {text}" for text, forms in alike.items()]
        raise NamingError(f"{self.call} cannot be used: {'; '.join(told)}")

    def _take(self, form: str, trial: _Trial, batch: Batch) -> None:
        self._form = form
        self.remarks = (f"takes {FORMS[form]}",)
        if trial.in_place:
            self.remarks += ("changes its input in place, which is a copy",)
        if not trial.effect:
            self.remarks += (f"changed none of {len(batch)} images in {IDLE_SEEDS} draws of each",)
        if form in {"image", "array", "named"}:
            self._check_range(form, batch)

    def _check_range(self, form: str, batch: Batch) -> None:
        """Refuse a function of floats in [0, 1] that clips, and so also runs on uint8.

        Nearly every pixel is then 1. Such a function preserves more of the image when given floats;
        one that expects uint8 preserves less.
        """
        seeds = _seeds_of_rows(0, batch.index)
        of_floats = []
        for image, seed in zip(_given("array", batch.x), seeds, strict=True):
            self._seed_all(seed, batch.x.device)
            try:
                returned = self._called(
                    "named" if form == "named" else "array", image / np.float32(255)
                )
                of_floats.append(_checked(returned, tuple(batch.x.shape[1:])))
            except _Fault:
                return
        x, of_pixels = batch.x.cpu(), self._applied(form, batch, 0).cpu()
        lost, kept = (
            float((made - x).abs().mean()) for made in (of_pixels, torch.stack(of_floats).cpu())
        )
        grey = (x > 0) & (x < 1)
        if lost > kept + RANGE_APART and float((of_pixels[grey] == 1).float().mean()) > MOST:
            raise NamingError(
                f"{self.call}, given {FORMS[form]}, seems to expect floats in [0, 1]: write "
                "takes=tensor or takes=batch, or divide by 255 in it"
            )

    def _trial(self, form: str, batch: Batch) -> _Trial:
        """What it does to its input; a form without effect is tried with more seeds."""
        in_place = effect = False
        unchanged = self._unchanged(form, batch.x)
        for base in range(IDLE_SEEDS):
            given = _given(form, batch.x)
            first = self._applied(form, batch, base, given)
            same = zip(given, _given(form, batch.x), strict=True)
            in_place |= not all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in same)
            effect |= not torch.equal(first, unchanged)
            if not torch.equal(first, self._applied(form, batch, base)):
                raise NamingError(
                    f"{self.call}, given {FORMS[form]}, returned two results for the same image "
                    "and seed: draw from random, numpy.random or torch, not from your own "
                    "generator; with albumentations, name the transform itself, not a function "
                    "that calls it"
                )
            if effect and base + 1 >= TRIED_SEEDS:
                break
        return _Trial(in_place, effect)

    @staticmethod
    def _unchanged(form: str, x: Tensor) -> Tensor:
        """What a callable that returns its input makes of images (B, C, H, W) in this form."""
        shape = tuple(x.shape if form == "batch" else x.shape[1:])
        made = [_checked(each, shape) for each in _given(form, x)]
        return (made[0] if form == "batch" else torch.stack(made)).to(x.device)

    def _applied(
        self, form: str, batch: Batch, base: int, given: list[Any] | None = None
    ) -> Tensor:
        """(B, C, H, W) float32; the generators are seeded for each row."""
        x = batch.x
        seeds = [_seed(base)] if form == "batch" else _seeds_of_rows(base, batch.index)
        shape = tuple(x.shape if form == "batch" else x.shape[1:])
        made = []
        for image, seed in zip(_given(form, x) if given is None else given, seeds, strict=True):
            self._seed_all(seed, x.device)
            returned = self._called(form, image)
            try:
                made.append(_checked(returned, shape))
            except _Misshapen as fault:
                if form == "image" and isinstance(returned, Image.Image):
                    raise _Resized(str(fault)) from fault
                raise
        return (made[0] if form == "batch" else torch.stack(made)).to(x.device)

    def _called(self, form: str, image: Any) -> Any:
        (function,) = self._function
        try:
            returned = function(image=image) if form == "named" else function(image)
        except (Exception, SystemExit) as error:  # a user's code may fail in any way
            raise _Raised(f"raised {own.said(error)}") from error
        if form != "named":
            return returned
        if not isinstance(returned, Mapping) or "image" not in returned:
            raise _Misshapen(f"returned {_kind(returned)}, expected a mapping with an image")
        return returned["image"]

    def _seed_all(self, seed: int, device: torch.device) -> None:
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002 - the generator that transforms draw from
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        # One state for all albumentations transforms: set_random_seed would give each of them a
        # generator with the same seed, and two flips would always coincide.
        share = getattr(self._function[0], "set_random_state", None)
        if share is not None:
            share(np.random.default_rng(seed), random.Random(seed))


@contextmanager
def _generators_kept(device: torch.device) -> Iterator[None]:
    """Restore all global generators afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - kept, not drawn from
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda, device)


def _seed(*place: int) -> int:
    text = "/".join(map(str, place)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _seeds_of_rows(base: int, index: Tensor) -> list[int]:
    """A seed per row; a row that appears again in the batch gets another seed."""
    seen: Counter[int] = Counter()
    seeds = []
    for row in index.tolist():
        seeds.append(_seed(base, row, seen[row]))
        seen[row] += 1
    return seeds


def _given(form: str, x: Tensor) -> list[Any]:
    """Copies of images (B, C, H, W) in the form that the callable takes."""
    if form == "batch":
        return [x.detach().clone(memory_format=torch.contiguous_format)]
    rows = x.detach().cpu()
    if form == "tensor":
        return list(rows.clone(memory_format=torch.contiguous_format))
    pixels = (255 * rows.clamp(0, 1)).round().to(torch.uint8)
    arrays = pixels.permute(0, 2, 3, 1).contiguous().numpy()
    if form != "image":
        return list(arrays)
    if x.shape[1] not in (1, 3):
        raise _Raised(f"cannot be given one, as the images have {x.shape[1]} channels")
    return [Image.fromarray(each[..., 0] if x.shape[1] == 1 else each) for each in arrays]


def _checked(returned: Any, shape: tuple[int, ...]) -> Tensor:
    """Convert what a callable returned to a tensor of this shape, float32 in [0, 1].

    Raises:
        _Fault: it is not such an image.
    """
    if isinstance(returned, Tensor):
        x = returned.detach().as_subclass(Tensor)
    elif isinstance(returned, np.ndarray) or (
        isinstance(returned, Image.Image) and returned.mode != "P"  # palette indices, not colours
    ):
        array = np.array(returned)
        try:
            x = torch.from_numpy(array)
        except TypeError:
            raise _Misshapen(f"returned {_kind(returned)}, expected uint8 or floats") from None
        x = x.permute(2, 0, 1) if x.dim() == 3 else x
    else:
        raise _Misshapen(f"returned {_kind(returned)}, expected an image")
    x = x[None] if x.dim() == 2 else x
    if tuple(x.shape) != shape:
        raise _Misshapen(
            f"returned {_kind(returned)} of shape {_shape(tuple(x.shape))}, expected "
            f"{_shape(shape)}, the shape of its input"
        )
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise _Fault(f"returned {_kind(returned)}, expected uint8, or floats in [0, 1]")
    if x.dtype == torch.uint8:
        return x.float() / 255
    x = x.float()
    low, high = (float(each) for each in torch.aminmax(x))
    if not (np.isfinite(low) and np.isfinite(high)):
        raise _Fault("returned values that are not finite")
    if low < -SLACK or high > 1 + SLACK:
        raise _Fault(
            f"returned floats from {low:.3g} to {high:.3g}, expected [0, 1]: clip them, or return "
            "uint8; leave out normalisation, which the networks do themselves"
        )
    return x.clamp(0, 1)


def _kind(returned: Any) -> str:
    if isinstance(returned, Image.Image):
        return f"a PIL image of mode {returned.mode}"
    if isinstance(returned, np.ndarray | Tensor):
        what = "a tensor" if isinstance(returned, Tensor) else "an array"
        return f"{what} of {str(returned.dtype).removeprefix('torch.')}"
    return "None" if returned is None else f"a {type(returned).__name__}"


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
