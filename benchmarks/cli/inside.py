"""Figures of what a trained network does: heat maps of images, and its features in the plane."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from analysis.report import plots
from analysis.report.plots import Cloud
from analysis.tasks import task_named
from benchmarks.cli.arguments import UsageError
from benchmarks.data.splits import NotApplicable, Splits
from benchmarks.data.streams import Rows
from benchmarks.training.evaluation import labels_of, strata_of
from methods.base import Model

MOST_ROWS = 1000
"""Rows of a split that are drawn as points."""
WHAT = "images of the select split; below, heat maps (Score-CAM) of the predicted class"
EVIDENCE = "A heat map is no evidence that the network decides by what it shows."
BATCH = 64
"""Channels of a stage that are tried at once."""


class Tapped(nn.Module):
    """A network with a module that its last stage with an extent passes through."""

    def __init__(self, model: Model, place: int) -> None:
        super().__init__()
        self.model, self.place, self.tap = model, place, nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K)."""
        features = list(self.model.features(x))
        features[self.place] = self.tap(features[self.place])
        return self.model.head(self.model.embed(features))


def check(by: str, model: nn.Module, splits: Splits) -> None:
    """Before hours of training: whether the figure can be drawn of such a network.

    Raises:
        NotApplicable: labels are several, or the network has no stages or head that are found.
        UsageError: torchcam is not installed.
    """
    if not task_named(splits.kind).exclusive:
        raise NotApplicable(f"by {by}: images with several labels have no one class")
    if by == "cam" and splits.inputs:  # images have none
        raise NotApplicable("by cam: heat maps lie over images, and these data have none")
    if by == "embedding":
        _whole(model, by)
        return
    _torchcam()
    _last_with_places(_whole(model, by), splits.select.inputs(torch.arange(1)))


def _whole(model: nn.Module, by: str) -> Model:
    if not isinstance(model, Model):
        raise NotApplicable(f"by {by}: augbench cannot find the stages and the head of the network")
    return model


def _torchcam() -> Any:
    try:
        return importlib.import_module("torchcam.methods")
    except ModuleNotFoundError as error:
        raise UsageError(
            "by: cam needs the package torchcam: pip install torchcam, or augbench with the extra "
            "pictures"
        ) from error


def _last_with_places(model: Model, x: Tensor) -> int:
    """The number of the last stage whose output has places in the image."""
    with torch.no_grad():
        features = model.eval().features(x)
    there = [n for n, each in enumerate(features) if each.dim() == 4 and min(each.shape[2:]) > 1]
    if not there:
        raise NotApplicable("by cam: no stage of the network has places in the image")
    return there[-1]


def heat_maps(model: nn.Module, x: Tensor, classes: list[int]) -> np.ndarray:
    """(N, H, W) in [0, 1]: Score-CAM of each image (N, C, H, W) for its class, by torchcam.

    From the last stage whose output has places in the image; each map is scaled to [0, 1],
    and 0 if it is constant. torchcam scales the output of a channel to [0, 1] before it enlarges
    it to the image, not after as the paper has it.

    Source: Wang et al., CVPR Workshops 2020, arXiv:1910.01279.

    Raises:
        NotApplicable: the network has no such stage.
        UsageError: torchcam is not installed.
    """
    whole = _whole(model, "cam")
    tapped = Tapped(whole, _last_with_places(whole, x[:1])).eval()
    maps = []
    with _torchcam().ScoreCAM(tapped, tapped.tap, batch_size=BATCH) as extract, torch.no_grad():
        for image, which in zip(x, classes, strict=True):
            (found,) = extract(which, tapped(image[None]))
            large = nn.functional.interpolate(found[None], size=x.shape[2:], mode="bilinear")[0, 0]
            large = large.nan_to_num()
            maps.append((large / large.max().clamp_min(1e-12)).numpy())
    return np.stack(maps)


def draw_cam(
    model: nn.Module, splits: Splits, index: Tensor, short: list[str], title: str, path: Path
) -> None:
    """Images of the select split, each with the heat map of the class that the network predicts.

    Raises:
        NotApplicable, UsageError: as ``heat_maps``.
    """
    x = splits.select.inputs(index)
    with torch.no_grad():
        p = model.eval()(x).softmax(dim=1)
    said = p.argmax(dim=1).tolist()
    maps = heat_maps(model, x, said)
    labels = labels_of(splits.select, splits.kind)
    told = [
        f"{short[k]} {float(row[k]):.2f}\n(true: {short[labels[place]]})"
        for k, row, place in zip(said, p, index.tolist(), strict=True)
    ]
    images = x.permute(0, 2, 3, 1).numpy()
    plots.heat_grid(images, maps, told, f"{title}: {WHAT}. {EVIDENCE}", path)


def draw_embedding(
    model: nn.Module,
    splits: Splits,
    learned: dict[str, Tensor],
    short: list[str],
    seed: int,
    title: str,
    path: Path,
) -> None:
    """The features of training and select rows by t-SNE, three times: by class, by whether the
    network is right, by learned weight.

    Up to ``MOST_ROWS`` rows of each split, drawn by the seed. Rows of the other split are grey.

    Source: van der Maaten and Hinton, JMLR 2008; coloured as in AutoDO's Fig. 6.

    Raises:
        NotApplicable: there are too few rows.
    """
    from sklearn.manifold import TSNE  # noqa: PLC0415 - a second that other figures do not need

    whole = _whole(model, "embedding")
    random = np.random.default_rng(seed)
    chosen = [_some(len(rows), random) for rows in (splits.train, splits.select)]
    parts = [
        _embedded(whole, rows, index)
        for rows, index in zip((splits.train, splits.select), chosen, strict=True)
    ]
    features = np.concatenate([each for each, _ in parts])
    if len(features) < 10:
        raise NotApplicable(f"by embedding: expected 10 rows or more, got {len(features)}")
    places = TSNE(
        perplexity=min(30, (len(features) - 1) // 3), init="pca", random_state=seed
    ).fit_transform(features)
    train, select = np.split(places, [len(chosen[0])])
    of_train, of_select = (
        strata_of(rows, splits)[index]
        for rows, index in zip((splits.train, splits.select), chosen, strict=True)
    )
    right = parts[1][1] == of_select
    clouds = [
        Cloud("training and select rows, by label", None, [
            (short[k], np.concatenate([train[of_train == k], select[of_select == k]]))
            for k in range(len(splits.classes))
        ]),
        Cloud(f"select rows: {100 * right.mean():.0f} % right", train, [
            ("right", select[right]), ("wrong", select[~right])
        ]),
    ]  # fmt: skip
    weight = learned.get("weight")
    values = None
    if weight is not None and len(weight) == len(splits.train):
        values = weight.detach().cpu().numpy()[chosen[0]]
        clouds.append(Cloud("training rows: learned weight (1: unchanged)", select, [("", train)]))
    plots.clouds(clouds, values, title, path)


def _some(rows: int, random: np.random.Generator) -> np.ndarray:
    return np.sort(random.choice(rows, min(rows, MOST_ROWS), replace=False))


def _embedded(model: Model, rows: Rows, index: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, D) features before the head, and (n,) predicted classes, in eval mode."""
    model.eval()
    features, said = [], []
    with torch.no_grad():
        for part in torch.from_numpy(index).split(256):
            inside = model.embed(model.features(rows.inputs(part)))
            features.append(inside.flatten(1).float())
            said.append(model.head(inside).argmax(dim=1))
    return torch.cat(features).numpy(), torch.cat(said).numpy()
