"""AutoAugment: the policies of published searches, or one from a file, drawn per row.

A policy file is YAML, and so are the shipped policies (``methods/policies``)::

    ranges: fast_autoaugment        # what magnitudes mean; or standard, wide, autodo
    sub_policies:                   # one of them is drawn for each image
    - [[rotate, 0.7, 0.9], [invert, 0.2]]    # operation, probability and, if it has one, magnitude
    - [[contrast, 0.5, 0.1]]
    weights: [2, 1]                 # optional: how often each is drawn, in proportion
    draws: 2                        # optional: how many are drawn, one after the other
    bins: 10                        # standard and wide: magnitudes are 0 to bins - 1 (31 if absent)

or, in the place of ``sub_policies`` and ``weights``, ``classes``: a list with a mapping of these
two for each class. ``RANGES`` says what each kind of range is.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
import yaml
from torch import Tensor

from methods import autodo, own
from methods.base import ANYTHING, IMAGES, Batch, Context, Method, Spec, Task
from methods.functional import sent
from methods.naming import nearest
from methods.randaugment import (
    BRIGHTNESS,
    CUTOUT,
    IDENTITY,
    NAMES,
    OPERATIONS,
    POSTERIZE,
    ROTATE,
    SHARPNESS,
    SHEAR_X,
    SHEAR_Y,
    SOLARIZE,
    STANDARD,
    TRANSLATE_X,
    TRANSLATE_Y,
    UNSIZED,
    WIDE,
    Drawn,
    Interpolation,
    PerRow,
    Tables,
    geometry,
)

FOLDER = Path(__file__).parent / "policies"
SHIPPED = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
"""Names of the published policies."""
RANGES = {
    "standard": OPERATIONS,
    "wide": OPERATIONS,
    "fast_autoaugment": NAMES,
    "autodo": autodo.OPERATIONS,
}
"""The operations of a policy by its ranges.

``standard`` and ``wide`` are torchvision's, as in ``randaugment`` and ``trivialaugment``: a
magnitude is a step, the sign is random. ``fast_autoaugment``: a magnitude from 0 to 1 lies between
the ends of ``tables_of``; only geometric operations have a random sign. ``autodo``: all operations
of a sub-policy are one warp, whose amounts are normally distributed; a magnitude from 0 to 1 is the
standard deviation, as a share of the range.
"""
SPACES = {"standard": STANDARD, "wide": WIDE}
KEYS = ("ranges", "bins", "draws", "sub_policies", "weights", "classes")
OF_CLASS = ("sub_policies", "weights")
MOST = 1000
"""More bins or draws are surely a mistake."""
LARGEST = sys.float_info.max
"""A larger whole number is no float."""
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True, eq=False)
class Policy:
    """Sub-policies as tensors on the CPU, (slots, N); shorter ones are padded with the identity.

    With C classes the sub-policies of a class are neighbours: N is C times S, else S.
    """

    ranges: str
    bins: int
    """Number of magnitudes of ``standard`` and ``wide``; else 0."""
    draws: int
    codes: Tensor
    """Index into the operations of its ranges."""
    probability: Tensor
    """float32; 0 for padding."""
    magnitude: Tensor
    """A step, or an index into ``values``; 0 if the operation has no magnitude."""
    values: tuple[float, ...]
    """The magnitudes; empty if they are steps."""
    sized: Tensor
    """Whether it is an operation with a magnitude."""
    given: Tensor
    """Whether it is an operation and no padding."""
    classes: int
    """0 if the policy is that of all classes."""
    shares: Tensor | None
    """(classes or 1, S) float64: cumulative shares of the sub-policies; None if all are equal."""

    @property
    def each(self) -> int:
        """S, the number of sub-policies of a class."""
        return self.codes.shape[1] // max(1, self.classes)

    @property
    def drawn(self) -> Tensor:
        """(N,) bool: whether a sub-policy has a weight above 0."""
        if self.shares is None:
            return torch.ones(self.codes.shape[1], dtype=torch.bool, device="cpu")
        return (self.shares.diff(dim=1, prepend=torch.zeros_like(self.shares[:, :1])) > 0).flatten()

    @cached_property
    def certain(self) -> bool:
        """Whether all operations are always applied."""
        return bool((self.probability[self.given] == 1).all())

    @cached_property
    def cuts(self) -> bool:
        """Whether it has a cutout."""
        return bool((self.codes == CUTOUT).any())

    def draw(self, rows: int, labels: Tensor | None, device: torch.device) -> Tensor:
        """(draws, rows) sub-policies; ``labels`` (rows,) are those of a policy by class."""
        if self.each == 1:
            found = torch.zeros(self.draws, rows, dtype=torch.int64, device=device)
        elif self.shares is None:
            found = torch.randint(self.each, (self.draws, rows), device=device)
        else:
            exact = torch.float32 if device.type == "mps" else torch.float64
            place = torch.rand(self.draws, rows, 1, dtype=exact, device=device)
            shares = sent(self.shares.to(exact), device)
            found = (place >= (shares if labels is None else shares[labels])).sum(dim=2)
        return found if labels is None else found + labels * self.each


def content_of(policy: str) -> bytes:
    """The file of a shipped policy, or the user's own.

    Raises:
        ValueError: there is none of this name.
    """
    if policy in SHIPPED:
        return (FOLDER / f"{policy}.yaml").read_bytes()
    content = own.file(policy)
    if content is not None:
        return content
    if policy.endswith(own.YAML):
        raise ValueError(
            f"policy: expected a file, found no {policy!r} in {Path.cwd()}; augbench policy writes "
            "what a run learned"
        )
    raise ValueError(
        f"policy: unknown policy {policy!r}{nearest(policy, SHIPPED)} (known: "
        f"{', '.join(SHIPPED)}; a file of your own is named with its suffix, policy='mine.yaml')"
    )


@cache
def read_policy(content: bytes, name: str) -> Policy:
    """Read a policy file; errors call it ``name``.

    Raises:
        ValueError: it is not of the form that the module describes; the message says where.
    """
    return policy_in(_loaded(content, f"policy {name!r}"), f"policy {name!r}")


def policy_in(told: Any, file: str) -> Policy:
    """The policy that the content of a file, called ``file`` in errors, describes.

    Raises:
        ValueError: it is not of the form that the module describes; the message says where.
    """
    told = _mapping(told, file, KEYS)
    ranges = told.get("ranges")
    if not isinstance(ranges, str) or ranges not in RANGES:
        _refuse(f"{file}, ranges", " or ".join(RANGES), ranges)
    bins = _whole(told.get("bins", 31), f"{file}, bins", 2, MOST) if ranges in SPACES else 0
    if "bins" in told and not bins:
        text = f"none with ranges: {ranges}, whose magnitudes are from 0 to 1"
        _refuse(f"{file}, bins", text, told["bins"])
    draws = _whole(told.get("draws", 1), f"{file}, draws", 1, MOST)
    if draws > 1 and ranges == "autodo":
        _refuse(f"{file}, draws", "1 with ranges: autodo, whose operations are one warp", draws)
    if ("classes" in told) == ("sub_policies" in told):
        _refuse(file, "either sub_policies or classes", list(told))
    groups = [(file, {key: told[key] for key in OF_CLASS if key in told})]
    if "classes" in told:
        if "weights" in told:
            _refuse(f"{file}, weights", "them within each class", told["weights"])
        if not isinstance(told["classes"], list) or len(told["classes"]) < 2:
            _refuse(f"{file}, classes", "a list with a policy for each class", told["classes"])
        places = [f"{file}, class {number} (from 0)" for number in range(len(told["classes"]))]
        groups = [
            (place, _mapping(each, place, OF_CLASS))
            for place, each in zip(places, told["classes"], strict=True)
        ]
    parts = [_sub_policies(part, where, ranges, bins) for where, part in groups]
    weights = [_weights(part, where) for where, part in groups]
    return _policy(ranges, bins, draws, parts, weights)


class _One(NamedTuple):
    """An operation of a sub-policy, or padding."""

    code: int = IDENTITY
    probability: float = 0.0
    magnitude: float = 0.0
    sized: bool = False
    given: bool = False


def _policy(
    ranges: str,
    bins: int,
    draws: int,
    parts: Sequence[list[list[_One]]],
    weights: Sequence[list[float] | None],
) -> Policy:
    """The policy from the sub-policies of each class, or of all together."""
    most = max(len(part) for part in parts)
    slots = max(len(each) for part in parts for each in part)
    flat = [each for part in parts for each in [*part, *[[]] * (most - len(part))]]
    rows = [[*each, *[_One()] * (slots - len(each))] for each in flat]
    values: tuple[float, ...] = (
        () if bins else tuple(sorted({one.magnitude for row in rows for one in row}))
    )
    index = {value: place for place, value in enumerate(values)}

    def field(get: Callable[[_One], Any], dtype: torch.dtype = torch.int64) -> Tensor:
        table = [[get(one) for one in row] for row in rows]
        return torch.tensor(table, dtype=dtype, device="cpu").T

    shares = None
    if any(weights) or any(len(part) < most for part in parts):
        filled = [
            [*(own or [1.0] * len(part)), *[0.0] * (most - len(part))]
            for own, part in zip(weights, parts, strict=True)
        ]
        total = torch.tensor(filled, dtype=torch.float64, device="cpu").cumsum(dim=1)
        shares = total / total[:, -1:]
    return Policy(
        ranges=ranges,
        bins=bins,
        draws=draws,
        codes=field(lambda one: one.code),
        probability=field(lambda one: one.probability, torch.float32),
        magnitude=field(lambda one: index.get(one.magnitude, int(one.magnitude))),
        values=values,
        sized=field(lambda one: one.sized, torch.bool),
        given=field(lambda one: one.given, torch.bool),
        classes=len(parts) if len(parts) > 1 else 0,
        shares=shares,
    )


def _sub_policies(part: Mapping[str, Any], where: str, ranges: str, bins: int) -> list[list[_One]]:
    told = part.get("sub_policies")
    if not isinstance(told, list) or not told:
        _refuse(f"{where}, sub_policies", "a list of at least one sub-policy", told)
    found = []
    for number, each in enumerate(told, 1):
        place = f"{where}, sub-policy {number}"
        if not isinstance(each, list) or not each or not isinstance(each[0], list):
            _refuse(place, "a list of operations such as [[rotate, 0.7, 0.9], [invert, 0.2]]", each)
        read = [_operation(one, place, ranges, bins) for one in each]
        if ranges == "autodo" and len({one.code for one in read}) < len(read):
            _refuse(place, "each operation once, as all are one warp", each)
        found.append(read)
    return found


def _operation(told: Any, where: str, ranges: str, bins: int) -> _One:
    known = RANGES[ranges]
    if not isinstance(told, list) or not 2 <= len(told) <= 3:
        _refuse(where, "[operation, probability] or [operation, probability, magnitude]", told)
    name, chance, *size = told
    if name not in known:
        hint = nearest(str(name), known)
        _refuse(where, f"an operation of {', '.join(known)}{hint}", name)
    code, place = known.index(name), f"{where}, {name}"
    probability = _number(chance, f"{place}, probability", 1)
    if ranges != "autodo" and code in UNSIZED:
        return _One(code, probability, 0.0, sized=False, given=True)
    if not size:
        _refuse(place, "a magnitude after the probability", told)
    if not bins:
        magnitude = _number(size[0], f"{place}, magnitude", 1)
    else:
        magnitude = _whole(size[0], f"{place}, magnitude", 0)
        if magnitude >= bins:
            text = f"a step from 0 to {bins - 1}, as there are {bins} bins"
            _refuse(f"{place}, magnitude", text, magnitude)
    return _One(code, probability, float(magnitude), sized=True, given=True)


def _weights(part: Mapping[str, Any], where: str) -> list[float] | None:
    told, place = part.get("weights"), f"{where}, weights"
    if told is None:
        return None
    count = len(part["sub_policies"])
    if not isinstance(told, list) or len(told) != count:
        _refuse(place, f"a list of {count}, one for each sub-policy", told)
    found = [_number(each, place, None) for each in told]
    if not any(found):
        _refuse(place, "at least one above 0", told)
    if not math.isfinite(sum(found)):
        _refuse(place, "numbers whose sum is finite", told)
    return found


def _loaded(content: bytes, where: str) -> Any:
    try:
        return yaml.load(content, Loader=LOADER)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{where}: cannot be read as YAML: {error}") from error


def _mapping(told: Any, where: str, keys: Sequence[str]) -> Mapping[str, Any]:
    if not isinstance(told, dict):
        _refuse(where, f"a mapping with {', '.join(keys)}", told)
    for key in told:
        if key not in keys:
            _refuse(where, f"the keys {', '.join(keys)}{nearest(str(key), keys)}", key)
    return told


def _whole(told: Any, where: str, least: int, most: int | None = None) -> int:
    whole = isinstance(told, int) and not isinstance(told, bool)
    if not whole or told < least or (most is not None and told > most):
        limits = f"of {least} or more" if most is None else f"from {least} to {most}"
        _refuse(where, f"a whole number {limits}", told)
    return told


def _number(told: Any, where: str, most: float | None) -> float:
    number = isinstance(told, int | float) and not isinstance(told, bool)
    if not number or not 0 <= told <= (LARGEST if most is None else most):
        limits = "a finite number of 0 or more" if most is None else f"a number from 0 to {most}"
        _refuse(where, limits, told)
    return float(told)


def _refuse(where: str, expected: str, got: Any) -> NoReturn:
    shown = repr(got)
    shown = shown if len(shown) < 80 else f"{shown[:76]} ..."
    raise ValueError(f"{where}: expected {expected}, got {shown}")


def written(content: Mapping[str, Any], head: Sequence[str] = ()) -> str:
    """The text of a policy file, with a sub-policy in each line, after lines of comment."""
    lines = [f"# {line}" for line in head]
    for key, value in content.items():
        if key == "classes":
            lines.append("classes:")
            for each in value:
                inner = written(each).splitlines()
                lines += [f"- {inner[0]}", *(f"  {line}" for line in inner[1:])]
        elif key == "sub_policies":
            lines.append(f"{key}:")
            lines += [f"- {_flow(each)}" for each in value]
        else:
            lines.append(f"{key}: {_flow(value)}")
    return "\n".join(lines) + "\n"


def _flow(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_flow, value))}]"
    if isinstance(value, float) and "e" in repr(value) and "." not in repr(value):
        return repr(value).replace("e", ".0e")  # YAML 1.1 reads 1e-05 as a string
    return str(value) if isinstance(value, str) else repr(value)


@cache
def tables_of(values: tuple[float, ...], height: int, width: int) -> Tables:
    """Settings and matrices for magnitudes from 0 to 1, as the code of Fast AutoAugment has them.

    A geometric operation goes from minus to plus its range before the sign is drawn: 0.5 is the
    identity. Posterize keeps 4 to 8 bits, rounded down; cutout has a side of up to a fifth of the
    width.
    """
    magnitude = torch.tensor(values, dtype=torch.float64, device="cpu")

    def between(low: float, high: float) -> Tensor:
        return magnitude * (high - low) + low

    one = torch.zeros(len(NAMES), len(values), dtype=torch.float64, device="cpu")
    one[[SHEAR_X, SHEAR_Y]] = between(-0.3, 0.3)
    one[TRANSLATE_X] = between(-0.45, 0.45) * width
    one[TRANSLATE_Y] = between(-0.45, 0.45) * height
    one[ROTATE] = between(-30, 30)
    one[POSTERIZE] = between(4, 8).trunc()
    one[SOLARIZE] = between(0, 256)
    one[BRIGHTNESS : SHARPNESS + 1] = between(0.1, 1.9)
    one[CUTOUT] = between(0, 0.2) * width
    settings = torch.stack([one, one])
    settings[1, SHEAR_X : ROTATE + 1] *= -1
    codes = torch.arange(len(NAMES), device="cpu")[:, None].expand_as(settings)
    return Tables(settings, geometry(codes, settings, height, width))


class Warps(NamedTuple):
    """A policy of AutoDO's warps, (N, 7) float32 on the CPU."""

    probability: Tensor
    magnitude: Tensor


def warps_of(policy: Policy) -> Warps:
    """Probability and magnitude of each warp; 0 for one that a sub-policy lacks."""
    found = []
    sizes = torch.tensor(policy.values, dtype=torch.float32, device="cpu")
    for field in (policy.probability, sizes[policy.magnitude]):
        table = torch.zeros(policy.codes.shape[1], len(autodo.OPERATIONS), device="cpu")
        given = policy.given.T
        row, slot = given.nonzero(as_tuple=True)
        table[row, policy.codes.T[row, slot]] = field.T[row, slot]
        found.append(table)
    return Warps(*found)


def shuffled(policy: Policy) -> Policy:
    """The same operations, with probabilities and magnitudes shuffled among them.

    Magnitudes stay with operations that have one; sub-policies with weight 0 take no part. Drawn
    from the CPU's global generator.
    """

    def among(values: Tensor, where: Tensor) -> Tensor:
        (place,) = where.flatten().nonzero(as_tuple=True)
        order = place[torch.randperm(len(place), device="cpu")]
        flat = values.flatten()
        return flat.index_copy(0, place, flat[order]).view_as(values)

    return replace(
        policy,
        probability=among(policy.probability, policy.given & policy.drawn),
        magnitude=among(policy.magnitude, policy.sized & policy.drawn),
    )


class AutoAugment(PerRow):
    """Draw a sub-policy per image, and apply each of its operations with its probability.

    ``policy`` is a published one (AutoAugment's ``cifar10``, ``svhn``, ``imagenet``; Fast
    AutoAugment's ``faa_cifar10``, ``faa_svhn``, ``faa_imagenet``) or a YAML file,
    ``policy='mine.yaml'``, in the form that this module describes; ``augbench policy`` writes such
    a file from what a run learned. With a policy by class, each row is augmented by the policy of
    its label: the class with the largest target, if labels are soft or rows are mixed. A run's id
    includes what the file says, and workers get it with the run. ``interpolation`` is that of
    geometric operations; a policy with the ranges ``autodo`` is one bilinear warp, as in AutoDO.

    **Deviations.** AutoAugment's magnitudes are torchvision's ten steps: factors of color,
    contrast, brightness and sharpness are 1 plus or minus up to 0.9 with a random sign, where the
    paper's go from 0.1 at step 0 to 1.9 at the last; translations reach 150/331 of the edge. Fast
    AutoAugment's are exactly its code's, except that consecutive geometric operations are one warp,
    and that cutout fills with the luma of its colour on grey images.
    """

    source = (
        "Cubuk et al., AutoAugment, CVPR 2019, arXiv:1805.09501; Lim et al., Fast AutoAugment, "
        "NeurIPS 2019, arXiv:1905.00397"
    )
    controls = ("shuffled_policy(upstream={self})",)

    def __init__(
        self, *, policy: str = "cifar10", interpolation: Interpolation = "nearest"
    ) -> None:
        content = content_of(policy)
        read = read_policy(content, policy)
        super().__init__(SPACES.get(read.ranges, STANDARD), read.bins, interpolation)
        self.policy = self._unshuffled = read
        self.shuffle, self._content = False, content
        self._warps = warps_of(read) if read.ranges == "autodo" else None
        self._amounts: Tensor | None = None
        if read.classes:
            self.kinds = IMAGES - {"labels"}
        if read.classes and self._warps is None:
            self.waits = "each row's operations depend on its label, which is on the device"

    def supports(self, task: Task, spec: Spec) -> str:
        """Images of one or three channels; for a policy by class, as many classes, one a row."""
        classes = self.policy.classes
        if classes and classes != spec.classes:
            return (
                f"autoaugment's policy is for {classes} classes, but the data have {spec.classes}"
            )
        return super().supports(task, spec)

    def setup(self, ctx: Context) -> None:
        """Shuffle the policy, if this is the control."""
        super().setup(ctx)
        if self.shuffle:
            self.policy = shuffled(self._unshuffled)
            self._warps = warps_of(self.policy) if self._warps is not None else None

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """Augmented rows; targets stay. No gradient reaches the incoming images."""
        x = batch.x
        labels = batch.y.argmax(dim=1) if self.policy.classes else None
        if self._warps is None:
            labels = labels if labels is None else labels.cpu()
            return replace(batch, x=self.applied(x, self.draw(len(x), labels)))
        which = self.policy.draw(len(x), labels, x.device)[0]
        probability, magnitude = (sent(each, x.device).to(x.dtype)[which] for each in self._warps)
        x, self._amounts = autodo.warped(x, probability, magnitude)
        return replace(batch, x=x)

    def draw(self, rows: int, labels: Tensor | None = None) -> Drawn:
        """Sub-policies, which of their operations are applied, and signs."""
        policy = self.policy
        which = policy.draw(rows, labels, torch.device("cpu"))
        slots = len(policy.codes) * policy.draws

        def of_rows(field: Tensor) -> Tensor:  # (slots, draws, rows) in the order of execution
            return field[:, which].transpose(0, 1).reshape(slots, rows)

        codes, magnitude = of_rows(policy.codes), of_rows(policy.magnitude)
        if not policy.certain:
            idle = torch.rand(slots, rows, device="cpu") >= of_rows(policy.probability)
            codes = codes.masked_fill(idle, IDENTITY)
        return Drawn(codes, magnitude, torch.randint(2, (slots, rows), device="cpu"))

    def centres(self, drawn: Drawn) -> Tensor | None:
        """Centres of cutouts, if the policy has any."""
        if not self.policy.cuts:
            return None
        return torch.rand(2, *drawn.codes.shape, dtype=torch.float64, device="cpu")

    def tables(self, device: torch.device, height: int, width: int) -> Tables:
        """What the operations do to images of this size."""
        if self.policy.bins:
            return super().tables(device, height, width)
        return tables_of(self.policy.values, height, width)

    def as_policy(self, learned: Mapping[str, Any]) -> dict[str, Any]:
        """Its own policy, unless it is shuffled."""
        return {} if self.shuffle else dict(_loaded(self._content, "policy"))

    def captions(self) -> list[str]:
        """What was done to each row of the last batch."""
        if self._warps is None:
            return super().captions()
        return [] if self._amounts is None else autodo.captions(self._amounts)


class ShuffledPolicy(Method):
    """Shuffle probabilities and magnitudes among the operations of ``upstream``, an autoaugment.

    Drawn once per run, from its seed. Where a policy beats this row, the gain comes from which
    operation has which probability and magnitude, not from the set of operations and values.
    """

    kinds = ANYTHING
    control = True

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)
        if isinstance(upstream, AutoAugment):
            upstream.shuffle = True

    def supports(self, task: Task, spec: Spec) -> str:
        """Only autoaugment."""
        if not isinstance(self.upstream, AutoAugment):
            return (
                "shuffled_policy needs upstream=autoaugment, or autoaugment(...) with its own "
                "settings, such as shuffled_policy(upstream=autoaugment(policy=svhn))"
            )
        return super().supports(task, spec)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch
