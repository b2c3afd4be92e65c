"""Generators of images: they learn from the training rows of a data set and make more like them.

They are small, so that every machine has one. The images of a better generator are used alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.nn import functional as F

COMPONENTS, SHARES = 32, (1, 2, 4, 8)
"""Most principal components of a class; numbers of Gaussians, of which the BIC chooses one."""
ROWS_PER_GAUSSIAN = 10
LATENT, HIDDEN, BATCH, RATE = 16, 256, 64, 1e-3
"""Of the variational autoencoder: its layers, and its training with Adam."""
MOST_VALUES = 64 * 64 * 3
"""of an image, for the variational autoencoder"""


@dataclass(frozen=True, eq=False)
class Made:
    """Generated images."""

    x: np.ndarray
    """(N, C, H, W) in [0, 1]"""
    y: np.ndarray
    """(N,) int64 labels"""
    truth: np.ndarray
    """(N,) int64, the classes that they were generated for"""


def mixtures(x: np.ndarray, y: np.ndarray, classes: np.ndarray, seed: int) -> np.ndarray:
    """Images of ``classes`` (N,), from a mixture of Gaussians over a class's principal components.

    ``x`` (M, C, H, W) in [0, 1], ``y`` (M,). A class has as many components as a quarter of its
    rows, 32 at most, and 1, 2, 4 or 8 Gaussians with diagonal covariances, at least ten rows for
    each, chosen by the Bayesian information criterion. Values are clipped to [0, 1].

    Raises:
        ValueError: a class has fewer than 4 rows.
    """
    flat = x.reshape(len(x), -1).astype(np.float64)
    made = np.empty((len(classes), flat.shape[1]))
    for name in np.unique(classes):
        own = flat[y == name]
        if len(own) < 4:
            raise ValueError(f"class {name} has {len(own)} rows: expected 4 or more to learn from")
        # A seed for each class: with the same one, classes would share their random numbers.
        number = int(np.random.SeedSequence([seed, int(name)]).generate_state(1)[0])
        analysis = PCA(min(COMPONENTS, len(own) // 4, flat.shape[1]), random_state=number)
        places = analysis.fit_transform(own)
        fitted = [
            GaussianMixture(count, covariance_type="diag", random_state=number, reg_covar=1e-6).fit(
                places
            )
            for count in SHARES
            if count == 1 or len(own) >= count * ROWS_PER_GAUSSIAN
        ]
        best = min(fitted, key=lambda mixture: mixture.bic(places))
        wanted = classes == name
        drawn, _ = best.sample(int(wanted.sum()))
        order = np.random.default_rng([seed, int(name)]).permutation(len(drawn))
        made[wanted] = analysis.inverse_transform(drawn[order])  # they come Gaussian by Gaussian
    return made.clip(0, 1).reshape(len(classes), *x.shape[1:])


class Autoencoder(nn.Module):
    """A conditional variational autoencoder for flat images (B, D) and one-hot classes (B, K)."""

    def __init__(self, values: int, classes: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(values + classes, HIDDEN), nn.ReLU())
        self.mean, self.log_variance = nn.Linear(HIDDEN, LATENT), nn.Linear(HIDDEN, LATENT)
        self.decoder = nn.Sequential(
            nn.Linear(LATENT + classes, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, values)
        )

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Logits (B, D) of the values, from codes (B, 16)."""
        return self.decoder(torch.cat([z, y], dim=1))

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The negative evidence lower bound, its mean over rows, in nats.

        Source: Kingma and Welling, ICLR 2014, arXiv:1312.6114, Eq. 10; Sohn et al., NeurIPS 2015.
        """
        hidden = self.encoder(torch.cat([x, y], dim=1))
        mean, log_variance = self.mean(hidden), self.log_variance(hidden)
        z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        wrong = F.binary_cross_entropy_with_logits(self.decode(z, y), x, reduction="sum")
        apart = (mean.square() + log_variance.exp() - 1 - log_variance).sum() / 2
        return (wrong + apart) / len(x)


def autoencoded(
    x: np.ndarray,
    y: np.ndarray,
    classes: np.ndarray,
    seed: int,
    epochs: int,
    told: Callable[[int, float], None],
) -> np.ndarray:
    """Images of ``classes`` (N,), the means of what a conditional variational autoencoder decodes.

    ``x`` (M, C, H, W) in [0, 1], ``y`` (M,). ``told`` is given each epoch and its loss in nats.

    Raises:
        ValueError: the images are too large.
    """
    flat = torch.from_numpy(x.reshape(len(x), -1)).float()
    if flat.shape[1] > MOST_VALUES:
        raise ValueError(
            f"vae: expected at most {MOST_VALUES:,} values per image (64 x 64 in colour), got "
            f"{flat.shape[1]:,}: use kind pca, or a generator of your own"
        )
    count = int(max(y.max(), classes.max())) + 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Autoencoder(flat.shape[1], count)
        optimizer = torch.optim.Adam(network.parameters(), RATE)
        given = F.one_hot(torch.from_numpy(y), count).float()
        for epoch in range(epochs):
            losses = []
            for rows in torch.randperm(len(flat)).split(BATCH):
                loss = network.loss(flat[rows], given[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            told(epoch + 1, float(np.mean(losses)))
        asked = F.one_hot(torch.from_numpy(classes), count).float()
        with torch.no_grad():
            made = network.decode(torch.randn(len(asked), LATENT), asked).sigmoid()
    return made.numpy().reshape(len(classes), *x.shape[1:])


def classes_like(y: np.ndarray, count: int, seed: int) -> np.ndarray:
    """(count,) classes with the shares that they have in ``y``."""
    order = np.random.default_rng([seed, count]).permutation(len(y))
    return np.sort(np.resize(y[order], count))


def drawn_like(classes: np.ndarray, labels: np.ndarray, seed: int) -> np.ndarray:
    """(N,) positions in ``labels`` (M,) of rows of ``classes`` (N,), without repetition.

    Raises:
        ValueError: a class has too few rows.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    found = np.empty(len(classes), dtype=np.int64)
    for name in np.unique(classes):
        wanted, own = np.flatnonzero(classes == name), order[labels[order] == name]
        if len(own) < len(wanted):
            raise ValueError(
                f"real: expected {len(wanted):,} training images of class {name} that it leaves "
                f"out, there are {len(own):,}: set rows_per_class behind its name, or --rows"
            )
        found[wanted] = own[: len(wanted)]
    return found


def mislabelled(truth: np.ndarray, classes: int, share: float, seed: int) -> np.ndarray:
    """Labels of which round(share * N), drawn at random, are another class, each equally likely."""
    rng = np.random.default_rng([seed, len(truth)])
    rows = rng.permutation(len(truth))[: round(share * len(truth))]
    labels = truth.copy()
    labels[rows] = (labels[rows] + rng.integers(1, classes, len(rows))) % classes
    return labels
