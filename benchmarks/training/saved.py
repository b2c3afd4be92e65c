"""The network that a run saved, as it was at the end of training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from analysis.runs import MODEL, Run
from benchmarks.training import models
from methods.base import Spec


def network_of(
    folder: Path, run: Run, result: Mapping[str, Any], spec: Spec, device: torch.device
) -> nn.Module:
    """The network of a finished run, built as its method needed it, with its weights.

    The weights that it started from are read only where an older run did not save how it normalises
    images, as that may depend on them.

    Raises:
        RuntimeError: the weights do not fit, because the network's code has changed.
        OSError: they cannot be read.
        NamingError: those that it started from are needed, and are not there.
    """
    saved = torch.load(folder / MODEL, map_location=device, weights_only=True)
    whole = any(name.endswith("normalize.mean") for name in saved)
    model = models.bare(run.model) if whole else run.model
    aside = {"auxiliary_norm"} if result.get("auxiliary_norm") else set()  # of an older run
    network = models.build(model, spec, set(result.get("network_needs", aside))).to(device)
    if run.training.channels_last:  # another memory format rounds differently
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.load_state_dict(saved)
    return network
