"""Checks that refuse or end a run: an unsuitable method, an invalid batch, a loss that is nan."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.data.carving import NotApplicable
from benchmarks.data.splits import Splits
from benchmarks.training.errors import TrainingFailed
from benchmarks.training.hooked import NO_HEAD, embedding_alone
from benchmarks.training.tasks import task_of
from methods.base import Batch, Model, Part, Spec
from methods.branches import has_branches
from methods.functional import each_input


def check_fits(
    name: str, method: Part, splits: Splits, network: nn.Module, model_name: str
) -> None:
    """Refuse a method that does not work on this task, data or network.

    Raises:
        NotApplicable: the message is the reason.
    """
    needs, spec = method.requires(), splits.spec
    if "features" in needs and not isinstance(network, Model):
        raise NotApplicable(
            f"{name} needs the stages and the linear head of the network, and none were found in "
            f"{model_name}: {NO_HEAD}"
        )
    if "stages" in needs and embedding_alone(network):
        raise NotApplicable(
            f"{name} compares the outputs of several stages of the network, and only that of the "
            f"last one was found in {model_name}: use another network, such as resnet18"
        )
    if "auxiliary_norm" in needs and not has_branches(network):
        raise NotApplicable(
            f"{name} needs a second set of batch normalisation layers, {model_name} has none: use "
            "a network with batch normalisation, such as resnet18"
        )
    if "unlabelled" in needs and splits.unlabelled is None:
        raise NotApplicable(
            f"{name} needs unlabelled rows, and these data have none: write labelled=N behind the "
            "benchmark's name, such as digits(labelled=4), or unlabelled='folder:DIR' for "
            "images of your own"
        )
    if "generated" in needs and splits.generated is None:
        raise NotApplicable(
            f"{name} needs rows from elsewhere: write generated(data='npz:FILE') or "
            "generated(data='folder:DIR'); augbench generate makes such rows"
        )
    reason = method.supports(task_of(splits.kind), spec)
    if reason:
        raise NotApplicable(reason)
    reason = method.fits(network)
    if reason:
        raise NotApplicable(f"{model_name}: {reason}")
    if len(splits.train) < 2:
        raise NotApplicable(f"{len(splits.train)} training rows; at least 2 are needed")


def check_batch(batch: Batch, spec: Spec, name: str) -> None:
    """Refuse a batch whose parts do not fit together.

    Raises:
        TrainingFailed: names the method, the part, its shape and the shape that was expected.
    """
    if not isinstance(batch, Batch):
        raise TrainingFailed(f"{name}: augment returned {type(batch).__name__}, expected a Batch")
    inputs, known = each_input(batch.x), spec.inputs
    if len(inputs) != len(known):
        raise TrainingFailed(
            f"{name}: augment returned {len(inputs)} inputs per row, expected {len(known)}"
        )
    rows = len(inputs[0])
    columns = (rows, spec.classes or rows)
    for part, tensor, shape in (
        *(("x", x, (rows, *of.shape)) for x, of in zip(inputs, known, strict=True)),
        ("y", batch.y, columns),
        ("w", batch.w, (rows,)),
        ("index", batch.index, (rows,)),
        ("logits", batch.logits, columns),
    ):
        if tensor is not None and tensor.shape != shape:
            raise TrainingFailed(
                f"{name}: augment returned {part} of shape {tuple(tensor.shape)}, expected {shape}"
            )


def check_finite(losses: list[Tensor], epoch: int, since: int, rate: float) -> float:
    """The last of these losses.

    Raises:
        TrainingFailed: one of them is nan or infinite.
    """
    values = torch.stack(losses)
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        first = int((~finite).nonzero()[0])
        raise TrainingFailed(
            f"loss is {float(values[first])} at epoch {epoch + 1}, step {since + first + 1}, "
            f"learning rate {rate:g}"
        )
    return float(values[-1])
