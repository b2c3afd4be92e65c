"""A second set of batch normalisation layers in a network, with its own statistics and scales."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

Norm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class BranchedNorm(nn.Module):
    """Two normalisation layers in one place, of which one is active.

    Source: Xie et al., Adversarial Examples Improve Image Recognition, CVPR 2020, arXiv:1911.09665
    """

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.main, self.auxiliary = norm, copy.deepcopy(norm)
        self.branch = 0

    def forward(self, x: Tensor) -> Tensor:
        """Normalise (B, C, *positions); the shape stays the same."""
        return self.auxiliary(x) if self.branch else self.main(x)


def add_branch(model: nn.Module) -> None:
    """Add a second layer, a copy of the first, to every batch normalisation of ``model``."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Norm) and not isinstance(module, BranchedNorm):
                setattr(module, name, BranchedNorm(child))


def has_branches(model: nn.Module) -> bool:
    """Whether ``model`` has a second set of normalisation layers."""
    return any(isinstance(module, BranchedNorm) for module in model.modules())


@contextmanager
def on_branch(model: nn.Module, branch: int) -> Iterator[None]:
    """Use this branch of every normalisation layer of ``model``, and restore it afterwards.

    Raises:
        ValueError: ``branch`` is not 0 or 1, or the model has only one branch.
    """
    if branch not in (0, 1):
        raise ValueError(f"branch: expected 0 or 1, got {branch}")
    norms = [module for module in model.modules() if isinstance(module, BranchedNorm)]
    if branch and not norms:
        raise ValueError(
            "branch: expected 0, as the model has only one set of normalisation layers"
        )
    before = [norm.branch for norm in norms]
    for norm in norms:
        norm.branch = branch
    try:
        yield
    finally:
        for norm, chosen in zip(norms, before, strict=True):
            norm.branch = chosen
