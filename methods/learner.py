"""What is done at a training step: a learner owns the networks beside the one being trained."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from methods.base import Batch, Context, Method, Part


class Learner(Part, ABC):
    """Takes the steps of a run, and makes its predictions.

    The trainer draws the batches, sets the learning rate of every optimiser, counts the passes of
    every network, evaluates the ``predictor`` after each epoch and writes checkpoints. State is
    kept as by a method: in buffers, modules and ``get_extra_state``. The network being trained and
    its optimiser are those of the context; others are made in ``setup``.
    """

    trains_network: ClassVar[bool] = True
    """Whether its predictions are those of a network, which can be saved."""

    def networks(self) -> Iterator[nn.Module]:
        """The networks beside ``ctx.model``; their passes are counted."""
        yield from ()

    def optimizers(self) -> Iterator[Optimizer]:
        """The optimisers beside ``ctx.optimizer``; the trainer sets their learning rates."""
        yield from ()

    @abstractmethod
    def step(self, batch: Batch, ctx: Context) -> tuple[Tensor, Batch]:
        """One step from the drawn batch: its loss (), detached, and the batch trained on."""

    def predictor(self, ctx: Context) -> nn.Module:
        """The network whose outputs (B, K) in eval mode are the predictions."""
        return ctx.model


class Supervised(Learner):
    """Every learner's default: train on the batch that a method makes of the drawn one.

    With ``ema`` above 0 the predictions are those of a network whose parameters are running means
    of the trained ones: each step keeps the share ``ema`` of them. Its buffers are copies.
    """

    def __init__(self, method: Method, ema: float = 0.0) -> None:
        super().__init__(method)
        self.ema, self.called = ema, method.called
        self.mean: nn.Module | None = None

    @property
    def method(self) -> Method:
        """What makes the batches."""
        return cast("Method", self.upstream)

    def setup(self, ctx: Context) -> None:
        """Set up the method, and the network of means."""
        super().setup(ctx)
        if self.ema:
            self.mean = copy.deepcopy(ctx.model).requires_grad_(False)

    def networks(self) -> Iterator[nn.Module]:
        """The network of means, if there is one."""
        if self.mean is not None:
            yield self.mean

    def step(self, batch: Batch, ctx: Context) -> tuple[Tensor, Batch]:
        """The method's batch, its loss and a step down it."""
        out = ctx.applied(self.method, batch)
        logits = ctx.forward(out.x) if out.logits is None else out.logits
        loss = ctx.update(self.method.losses(logits, out, ctx), out.w)
        if self.mean is not None:
            follow(self.mean, ctx.model, self.ema)
        return loss, out

    def finish(self, ctx: Context) -> None:
        """The trained network becomes that of the means, then the method may change it."""
        if self.mean is not None:
            ctx.model.load_state_dict(self.mean.state_dict())
        super().finish(ctx)
        if self.mean is not None:
            self.mean.load_state_dict(ctx.model.state_dict())

    def predictor(self, ctx: Context) -> nn.Module:
        """The network of means, if there is one."""
        return ctx.model if self.mean is None else self.mean


def learner_of(part: Method | Learner, ema: float = 0.0) -> Learner:
    """A learner itself, or supervised learning with a method."""
    return part if isinstance(part, Learner) else Supervised(part, ema)


@torch.no_grad()
def follow(mean: nn.Module, model: nn.Module, keep: float) -> None:
    """Move the parameters of ``mean`` towards those of ``model``: keep times theirs, and the rest
    of the model's; buffers become the model's."""
    for old, new in zip(mean.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - keep)
    for old, new in zip(mean.buffers(), model.buffers(), strict=True):
        old.copy_(new)
