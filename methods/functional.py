"""Mathematical and tensor helpers that several methods share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from methods.base import Batch, Context, Spec


def beta(alpha: float, rows: int, like: Tensor) -> Tensor:
    """One draw of Beta(alpha, alpha) per row, (rows,), on the device of ``like``."""
    concentration = torch.full((rows,), alpha, dtype=torch.float32, device=like.device)
    # Validation would read a value, which waits for the device.
    law = torch.distributions.Beta(concentration, concentration, validate_args=False)
    return law.sample().to(like.dtype)


def widened(logits: Tensor) -> Tensor:
    """float16 and bfloat16 as float32; float32 and float64 as they are."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """Reshape ``values`` (B,) to (B, 1, ..., 1) to broadcast over the rows of ``like`` (B, *S)."""
    return values.view(-1, *([1] * (like.dim() - 1)))


def reweighted(w: Tensor, factor: Tensor) -> Tensor:
    """Multiply weights (B,) by a factor >= 0 per row and keep their total.

    w' = w r (sum w / sum w r), or w if sum w r is 0.
    """
    factor = factor / factor.max().clamp_min(
        torch.finfo(w.dtype).tiny
    )  # tiny factors would sum to 0
    total = (w * factor).sum()
    kept = w * factor * (w.sum() / torch.where(total > 0, total, torch.ones_like(total)))
    return torch.where(total > 0, kept, w)


def numbers(spec: Spec, like: Tensor) -> Tensor:
    """(D,) 1 for each column of a vector that holds numbers, 0 for one of categories."""
    coded = torch.tensor([count > 0 for count in spec.categories], device="cpu")
    return sent((~coded).to(like.dtype), like.device)


def rows_of(batch: Batch, part: slice) -> Batch:
    """These rows of a batch, without logits."""
    return Batch(inputs_at(batch.x, part), batch.y[part], batch.w[part], batch.index[part])


def each_input(x: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The inputs of a batch, one or several."""
    return x if isinstance(x, tuple) else (x,)


def inputs_at(x: Tensor, part: slice | Tensor) -> Tensor:
    """These rows of the inputs of a batch, which may be a tuple."""
    if isinstance(x, tuple):
        return cast("Tensor", tuple(each[part] for each in x))
    return x[part]


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The inputs of several batches, one after the other; each may be a tuple."""
    if isinstance(parts[0], tuple):
        return cast("Tensor", tuple(map(torch.cat, zip(*parts, strict=True))))
    return torch.cat(list(parts))


def clean_share(fraction: float) -> float:
    """Check the share of a batch that is left unchanged.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"clean_fraction: expected a number in [0, 1), got {fraction}")
    return fraction


def unclean(rows: int, clean_fraction: float) -> int:
    """How many of ``rows`` rows are augmented if a share is left unchanged; at least one."""
    return max(1, rows - round(clean_fraction * rows))


def parted(batch: Batch, count: int) -> tuple[Batch, Batch]:
    """The first ``count`` rows and the others."""
    return rows_of(batch, slice(count)), rows_of(batch, slice(count, None))


def joined(part: Batch, clean: Batch) -> Batch:
    """The rows of both batches, without logits."""
    pairs = zip((part.y, part.w, part.index), (clean.y, clean.w, clean.index), strict=True)
    return Batch(stacked([part.x, clean.x]), *(torch.cat(pair) for pair in pairs))


def check_meta_batch(meta_batch: float | Literal["full"]) -> float | Literal["full"]:
    """Check the number of meta rows in a step, in training batches.

    Raises:
        ValueError: it is neither ``full`` nor in (0, 16].
    """
    if not isinstance(meta_batch, str) and not 0 < meta_batch <= 16:
        raise ValueError(
            "meta_batch: expected full or a multiple of the training batch above 0 and up to 16, "
            f"such as 2, got {meta_batch}"
        )
    return meta_batch


def meta_rows(
    name: str, ctx: Context, meta_batch: float | str, rows: int, stratified: bool
) -> Batch:
    """A batch of meta rows for the method ``name``, in training batches of ``rows`` rows.

    Raises:
        ValueError: the context has no meta rows.
    """
    if ctx.meta is None:
        raise ValueError(f"{name} learns from meta rows, but the context has none")
    if isinstance(meta_batch, str):
        return ctx.meta.draw(len(ctx.meta))
    # A single row has no batch statistics.
    return ctx.meta.draw(max(2, round(meta_batch * rows)), stratified=stratified)


def surely_known(index: Tensor, drawn: Tensor | None) -> bool:
    """Whether ``index`` is all of ``drawn``, or a slice of it, as told without reading a value.

    Then none of its rows is from elsewhere.
    """
    return drawn is not None and (index is drawn or index._base is drawn)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """Copy ``values`` to ``device`` without making the host wait for it."""
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()  # a copy from pageable memory may block
    return values.to(device, non_blocking=True)


def affine_warp(
    x: Tensor, matrix: Tensor, interpolation: Literal["nearest", "bilinear"] = "nearest"
) -> Tensor:
    """Warp images (B, C, H, W), float32 or float64, by one affine map per row; outside is 0.

    ``matrix`` (B, 2, 3), on any device, maps an output position (column, row, 1) to its input
    position, in pixels, as in Pillow's ``Image.transform``: the centre of the first pixel is
    (0.5, 0.5). ``nearest`` reads the pixel that contains the position and computes positions in
    Pillow's 16.16 fixed point: with float64 matrices the result equals Pillow's, and it is the same
    on every device; positions are below 32,768 pixels. ``bilinear`` weights the four nearest pixel
    centres, as ``grid_sample`` with zero padding does, and is differentiable in ``x`` and
    ``matrix``.
    """
    grid = _nearest_grid(x, matrix) if interpolation == "nearest" else _bilinear_grid(x, matrix)
    return torch.nn.functional.grid_sample(
        x, grid.permute(0, 2, 3, 1), interpolation, "zeros", align_corners=False
    )


def _nearest_grid(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, 2, H, W) centres of the pixels to read; the image spans -1 to 1."""
    height, width = x.shape[-2:]
    turn, start = matrix.detach()[..., :2], matrix.detach()[..., 2]
    start = start + turn[..., 0] * 0.5 + turn[..., 1] * 0.5  # the order in which Pillow rounds
    fixed = torch.cat([turn, start[..., None]], dim=-1).mul_(65536).add_(0.5).floor_()
    fixed = sent(fixed.to(torch.int32), x.device)
    column = torch.arange(width, dtype=torch.int32, device=x.device)
    row = torch.arange(height, dtype=torch.int32, device=x.device)
    across = fixed[..., 0, None] * column
    down = fixed[..., 1, None] * row + fixed[..., 2, None]
    pixel = (across[:, :, None, :] + down[:, :, :, None]).bitwise_right_shift_(16)
    grid = pixel.to(x.dtype)
    for axis, size in enumerate((width, height)):
        grid[:, axis].mul_(2 / size).add_(1 / size - 1)
    return grid


def _bilinear_grid(x: Tensor, matrix: Tensor) -> Tensor:
    """(B, 2, H, W) positions to read; the image spans -1 to 1."""
    height, width = x.shape[-2:]
    matrix = sent(matrix.to(x.dtype), x.device)  # not every device has float64
    column = torch.arange(width, dtype=x.dtype, device=x.device) + 0.5
    row = torch.arange(height, dtype=x.dtype, device=x.device) + 0.5
    matrix = torch.stack([matrix[:, 0] * (2 / width), matrix[:, 1] * (2 / height)], dim=1)
    across = matrix[..., 0, None] * column
    down = matrix[..., 1, None] * row + (matrix[..., 2, None] - 1)
    return across[:, :, None, :] + down[:, :, :, None]


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Set ``requires_grad`` to False for all parameters of ``model``; restored even on error."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for parameter, _ in flags:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Set every module to train or eval mode; restore each module's mode afterwards."""
    before = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in before:
            module.training = flag


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors: on a GPU one launch for all of a dtype, instead of one for each."""
    made = list(tensors)
    places: dict[torch.dtype, list[int]] = {}
    for place, each in enumerate(tensors):
        places.setdefault(each.dtype, []).append(place)
    for dtype, same in places.items():
        parts = [tensors[place] for place in same]
        # Times 1 is exact; views of one copy would share a version, which autograd checks.
        multiply = cast("Any", torch)._foreach_mul
        copied = [each.clone() for each in parts] if dtype == torch.bool else multiply(parts, 1)
        for place, copy in zip(same, copied, strict=True):
            made[place] = copy
    return made


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers of ``model``, by name."""
    own = dict(model.named_buffers())
    return dict(zip(own, copies(list(own.values())), strict=True))


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Work on copies of the buffers of ``model``, so that its own stay unchanged, even on error."""
    own = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module.named_buffers(recurse=False)
    ]
    # Autograd rejects buffers modified after the forward.
    for (module, name, _), copy in zip(own, copies([each for *_, each in own]), strict=True):
        setattr(module, name, copy)
    try:
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)


def perceptual(features: list[Tensor]) -> Tensor:
    """(B, D) embedding of stage outputs whose Euclidean distance is the perceptual distance.

    At each position of each stage (B, C, *positions) the channel vector is normalised to length
    one, and the positions of a stage share its weight, so the distance lies in [0, 2 sqrt(stages)]
    (Yang et al. 2022, Eq. 3; Laidlaw et al. 2021). Where all channels are 0, so is the embedding.
    """
    parts = []
    for feature in features:
        places = feature[0, 0].numel()
        unit = torch.nn.functional.normalize(feature, dim=1, eps=1e-10)
        parts.append(unit.flatten(1) / places**0.5)
    return torch.cat(parts, dim=1)


def row_norms(x: Tensor) -> Tensor:
    """Euclidean norm per row (B,); its gradient at 0 is 0."""
    return torch.linalg.vector_norm(x.flatten(1), dim=1)


def noised(x: Tensor, norms: Tensor, low: float, high: float) -> Tensor:
    """``x`` (B, *S) plus uniform noise, clipped to [low, high], with these norms (B,).

    If the noise cannot reach a norm within the range, it is scaled as far as the range allows.
    """
    noise = 2 * torch.rand_like(x) - 1
    reach = (high - low) / noise.abs().clamp_min(torch.finfo(x.dtype).tiny)
    below, above = torch.zeros_like(norms), reach.flatten(1).amax(dim=1).clamp_max(1e6)
    for _ in range(50):  # bisection: the clipped norm grows with the scale
        middle = (below + above) / 2
        clipped = (x + noise * per_row(middle, x)).clamp(low, high)
        short = row_norms(clipped - x) < norms
        below, above = torch.where(short, middle, below), torch.where(short, above, middle)
    return (x + noise * per_row(below, x)).clamp(low, high)


def evaluate(
    model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor | list[Tensor]
) -> Tensor:
    """Logits (B, K) of ``model`` with these parameters, by name; missing ones are its own.

    Normalisation layers follow the model's mode; running statistics are never updated.
    """
    return functional_call(model, {**buffers_of(model), **parameters}, (x,))


def directional(
    model: nn.Module,
    x: Tensor | list[Tensor],
    tangent: Mapping[str, Tensor],
    *,
    how: Literal["dual", "difference"] = "dual",
    primal: Tensor | None = None,
    buffers: Mapping[str, Tensor] | None = None,
    step: float = 1e-3,
) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and their derivative (B, K) along a direction of the parameters; no graph.

    ``tangent`` holds the direction by parameter name; other parameters are constant. ``dual`` is
    exact (forward-mode differentiation, the cost of three forward passes). ``difference`` is
    one-sided, with a shift of norm ``step``: one forward pass if ``primal``, the logits at the
    parameters themselves with the same dropout masks, is given, else two. The model's mode and
    buffers do not change. The generators must be in the same state as for ``primal``; if buffers
    have changed since then, ``buffers`` holds copies of the earlier ones.

    Raises:
        NotImplementedError: ``dual`` meets an operator without forward-mode differentiation.
    """
    if how == "dual":
        return _dual(model, x, tangent)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    parameters.update(buffers or {})
    with torch.no_grad():
        if primal is None:
            device = next(iter(tangent.values())).device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                primal = evaluate(model, parameters, x)
        norm = torch.stack([part.square().sum() for part in tangent.values()]).sum().sqrt()
        scale = step / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        shifted = {name: parameters[name] + scale * part for name, part in tangent.items()}
        return primal, (evaluate(model, {**parameters, **shifted}, x) - primal) / scale


def _dual(
    model: nn.Module, x: Tensor | list[Tensor], tangent: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), forward_ad.dual_level():
        held = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for name, part in tangent.items():
            held[name] = forward_ad.make_dual(held[name], part)
        primal, slope = forward_ad.unpack_dual(evaluate(model, held, x))
        return primal, torch.zeros_like(primal) if slope is None else slope
