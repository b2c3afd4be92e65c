"""A linear probe: the network stays as it began, and only its head is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from methods.base import ANYTHING, Batch, Context, Method, Model


class Probe(Method):
    """Train the head alone, on the upstream's rows; the rest of the network stays as it began.

    Of a pretrained network these are the rows that medical tables call a linear probe, or linear
    evaluation. The trunk (B, *S) to (B, D) is in eval mode, with its running statistics, and its
    parameters have no gradient; augmentation still goes through it at every step. A pass through it
    costs no backward pass.

    It is a method, not a network of its own, because a table holds one network: so it stands beside
    the rows that train all of the same network from the same start, on the same batches, and is
    compared with its upstream. The network ``probe(backbone=...)`` does the same to every row of a
    table.

    **Deviations.** Linear evaluation often fits the head once, by logistic regression on the
    features of images without augmentation; here it is trained by the study's optimiser, for as
    many steps as the other rows.
    """

    kinds = ANYTHING
    source = (
        "Kornblith et al., Do Better ImageNet Models Transfer Better?, CVPR 2019, arXiv:1805.08974"
    )
    needs = frozenset({"features", "frozen_trunk"})
    costs: Mapping[str, float] = {"published": 0.3}

    def __init__(self, *, upstream: Method | None = None) -> None:
        super().__init__(upstream)

    def setup(self, ctx: Context) -> None:
        """Check that the network is frozen.

        Raises:
            TypeError: it is not; in a loop of your own ``frozen_trunk`` makes it so.
        """
        if not isinstance(ctx.model, FrozenModel):
            raise TypeError(
                "probe: expected a network with a frozen trunk, got "
                f"{type(ctx.model).__name__}; make one with methods.probe.frozen_trunk(model)"
            )
        super().setup(ctx)

    def augment(self, batch: Batch, ctx: Context) -> Batch:
        """The upstream's batch."""
        return self.upstream.augment(batch, ctx) if self.upstream is not None else batch


class FrozenTrunk(nn.Module):
    """All of a network but its head: always in eval mode, its parameters without gradient."""

    def __init__(self, backbone: Model) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.train(False)

    def train(self, mode: bool = True) -> FrozenTrunk:
        """Stay in eval mode."""
        return super().train(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Stage outputs for inputs (B, *S); gradients reach the inputs."""
        return self.backbone.features(x)


class FrozenModel(Model):
    """A network of which only the head is trained."""

    def __init__(self, backbone: Model) -> None:
        super().__init__()
        head, backbone.head = backbone.head, cast("nn.Linear", nn.Identity())
        self.trunk, self.head = FrozenTrunk(backbone), head

    def embed(self, features: list[Tensor]) -> Tensor:
        """(B, D), as in the network itself."""
        return cast("FrozenTrunk", self.trunk).backbone.embed(features)

    def pieces(self) -> list[nn.Module]:
        """Those of the network itself."""
        return cast("FrozenTrunk", self.trunk).backbone.pieces()


def frozen_trunk(model: Model) -> FrozenModel:
    """The network with a frozen trunk; the head is the same object, and ``model`` is used up."""
    return model if isinstance(model, FrozenModel) else FrozenModel(model)
