"""Networks of the package timm, ``timm:NAME``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.training import weights as files
from benchmarks.training.hooked import Prepared, staged
from benchmarks.training.networks import Normalize, half
from methods.base import Spec
from methods.branches import add_branch
from methods.naming import nearest
from methods.own import import_torchvision

REFUSED = frozenset(
    ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict",
     "cache_dir", "num_classes", "in_chans", "features_only")
)  # fmt: skip
"""Arguments of timm that a run's id would not know, or that augbench sets."""
OUTSIDE = ("trunk.", "")
"""Where a HookedModel and a Prepared have the network and what prepares its inputs."""


class Prepare(nn.Module):
    """Images as a network expects them: three channels for grey ones, enlarged, normalised."""

    def __init__(self, repeated: bool, enlarge: int, normalize: Normalize) -> None:
        super().__init__()
        self.repeated, self.enlarge = repeated, enlarge
        self.normalize = normalize

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] to (B, 3, H, W) or (B, 3, enlarge, enlarge)."""
        if self.repeated:
            x = x.expand(-1, 3, -1, -1)
        if self.enlarge:
            x = F.interpolate(x, size=(self.enlarge,) * 2, mode="bilinear")
        return self.normalize(x)


def timm_network(
    name: str,
    spec: Spec,
    needs: Set[str] = frozenset(),
    *,
    weights: str = "none",
    pretrained: bool = False,
    enlarge: int = 0,
    others: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A network of timm, as a Model if its output is that of a linear layer.

    Grey images are repeated to three channels. The normalisation is timm's for this name, or
    MedMNIST's own where it has none or the images have other channels. ``weights`` is a file in
    timm's layout, or one that ``--save-model`` wrote, whose normalisation it then has;
    ``pretrained`` takes timm's from its cache.
    A new head on given weights starts as any ``nn.Linear`` does: timm's own start depends on the
    number of classes in some networks, and makes logits of 20 for two. ``enlarge``: images are
    enlarged to so many pixels inside the network (bilinear). ``others`` are arguments of
    ``timm.create_model``.

    Source: Wightman, PyTorch Image Models, doi:10.5281/zenodo.4414861.

    Raises:
        ValueError: timm is not installed, does not know the name or an argument, or weights that
            are not there or do not fit.
    """
    timm = _timm()
    others = dict(others or {})
    if refused := sorted(others.keys() & REFUSED):
        raise ValueError(
            f"{refused[0]}: expected an argument of the network; weights=FILE and pretrained=true "
            "say which weights it starts from"
        )
    channels, size = spec.shape[0], min(spec.shape[1:])
    if enlarge and enlarge < max(spec.shape[1:]):
        raise ValueError(f"enlarge: expected {max(spec.shape[1:])} pixels or more, got {enlarge}")
    base = name.partition(".")[0]
    if not timm.is_model(base):
        raise ValueError(f"timm has no network {base!r}{nearest(base, timm.list_models())}")
    try:
        config: dict[str, Any] = timm.get_pretrained_cfg(name).to_dict()
    except (RuntimeError, ValueError, AttributeError):  # a network without any, or an unknown tag
        config = {}
    if config.get("fixed_input_size") and "img_size" not in others:
        others["img_size"] = enlarge or spec.shape[1:]
    takes = 3 if channels == 1 else channels
    if pretrained and weights != "none":
        raise ValueError("weights: expected none with pretrained=true")
    if pretrained and not _on_meta():
        others["pretrained_cfg_overlay"] = {"state_dict": files.read(str(cached(name)))}
    try:
        network = timm.create_model(
            name,
            pretrained=pretrained and not _on_meta(),
            num_classes=spec.classes,
            in_chans=takes,
            **others,
        )
    except (TypeError, AssertionError) as error:
        raise ValueError(f"timm: {error}") from error
    except RuntimeError as error:
        raise ValueError(f"timm: {str(error).partition(chr(10))[0]}") from error
    head = _name_of(network, network.get_classifier())
    whole = not pretrained or config.get("num_classes") == spec.classes
    saved: dict[str, Tensor] = {}
    if weights != "none":
        given, saved = _unwrapped(files.plain(files.read(weights)), head)
        whole = files.copy_into(network, given, head, weights)
    if not whole:
        last = network.get_submodule(head)
        if isinstance(last, nn.Linear):
            last.reset_parameters()
    if "auxiliary_norm" in needs:
        add_branch(network)
    mean, std = (tuple(config.get(name) or ()) for name in ("mean", "std"))
    normalize = Normalize(mean, std) if len(mean) == len(std) == takes else half(takes)
    normalize.load_state_dict(saved)
    prepare = Prepare(channels == 1, enlarge if enlarge != size else 0, normalize)
    try:
        made = staged(prepare, network, spec.shape, spec.classes, _stages(network))
    except (AssertionError, RuntimeError, ValueError) as error:
        shape = " x ".join(map(str, spec.shape))
        raise ValueError(
            f"it does not run on {shape} images ({str(error).partition(chr(10))[0]}); "
            "enlarge=PIXELS enlarges them inside the network"
        ) from error
    return Prepared(prepare, network) if made is None else made


def cached(name: str) -> Path:
    """The file of timm's own weights in its cache.

    Raises:
        ValueError: it is not there, or timm has no weights for the name.
    """
    timm = _timm()
    try:
        config = timm.get_pretrained_cfg(name).to_dict()
    except (RuntimeError, ValueError, AttributeError) as error:
        raise ValueError(f"timm has no weights for {name!r}") from error
    url, hub = config.get("url") or "", config.get("hf_hub_id") or ""
    found = [Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]] if url else []
    if hub:
        look = importlib.import_module("huggingface_hub").try_to_load_from_cache
        repository, _, revision = hub.partition("@")
        given = config.get("hf_hub_filename")
        for file in (given,) if given else ("model.safetensors", "pytorch_model.bin"):
            place = look(repository, file, revision=revision or None)
            found += [Path(place)] if isinstance(place, str) else []
    there = [path for path in found if path.is_file()]
    if not there:
        raise ValueError(
            f"pretrained=true: timm's weights of {name} are not in its cache on this machine: run "
            f"python -c \"import timm; timm.create_model('{name}', pretrained=True)\" where there "
            "is a network, or give weights=FILE"
        )
    return there[0]


def _timm() -> Any:
    import_torchvision()  # timm imports it
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        raise ValueError(
            "timm is not installed: pip install timm, or augbench with the extra timm"
        ) from error


def _on_meta() -> bool:
    return torch.empty(0).is_meta


def _name_of(network: nn.Module, module: object) -> str:
    """The name of a module; empty if it is none of the network's."""
    return next((name for name, each in network.named_modules() if each is module), "")


def _unwrapped(
    state: Mapping[str, Tensor], head: str
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights by timm's own names and the normalisation, from a file of --save-model too."""
    for outer in OUTSIDE:
        inside, before = f"{outer}network.", f"{outer}prepare.normalize."
        known = (inside, before, "head.") if outer else (inside, before)
        if not all(name.startswith(known) for name in state):
            continue
        own, found = (
            {n.removeprefix(start): tensor for n, tensor in state.items() if n.startswith(start)}
            for start in (inside, before)
        )
        last = {f"{head}.{n.removeprefix('head.')}": t for n, t in state.items() if n[0] == "h"}
        return own | last, found
    return dict(state), {}


def _stages(network: nn.Module) -> list[tuple[str, int]] | None:
    """Names and channels of the stages that timm lists, if it lists any."""
    listed = getattr(network, "feature_info", None)
    if listed is None:
        return None
    told = listed if isinstance(listed, list) else listed.info
    return [(each["module"], each["num_chs"]) for each in told] or None
