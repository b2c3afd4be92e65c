"""What ``medmnistc`` 0.1.0 makes of a few images, for tests/test_corruptions.py.

``python -m tests.record_medmnistc`` writes tests/medmnistc.npz anew. It needs the package and what
it imports (wand with ImageMagick, opencv-python-headless, scikit-image, torchvision) and the
MedMNIST files in AUGBENCH_DATA. Images: the first test images of BreastMNIST and PneumoniaMNIST
(MedMNIST, CC BY 4.0), and a part of "flower.jpg" of scikit-learn (Lieven Smits, CC BY).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

from benchmarks.data.sources import default_root
from methods.medmnistc import REGISTRY
from methods.own import import_torchvision

FILE = Path(__file__).parent / "medmnistc.npz"
SHOWN = {"breastmnist": 2, "pneumoniamnist": 1, "dermamnist": 1, "pathmnist": 1, "octmnist": 1}
"""How many images of each set."""
PLACES = (0, 2, 4)
"""Severities that are recorded."""
SEED = 7


def images(dataset: str) -> np.ndarray:
    """(N, 28, 28[, 3]) uint8 images to corrupt."""
    if dataset in ("dermamnist", "pathmnist"):
        photo = Image.fromarray(load_sample_image("flower.jpg")).crop((180, 60, 460, 340))
        return np.asarray(photo.resize((28, 28), Image.Resampling.BOX))[None]
    of = "breastmnist" if dataset == "octmnist" else dataset
    with np.load(default_root() / "medmnist" / f"{of}.npz") as stored:
        return stored["test_images"][: SHOWN[dataset]]


def medmnistc() -> Any:
    """The package's registry; every import of it needs torchvision."""
    import_torchvision()
    from medmnistc.corruptions import registry  # type: ignore[import-not-found]

    return registry


def package(dataset: str, name: str, image: np.ndarray, place: int) -> np.ndarray:
    """The package's image, made as its DatasetManager makes it; random draws are from SEED."""
    operation = medmnistc().CORRUPTIONS_DS[dataset][name]
    np.random.seed(SEED)  # noqa: NPY002 - the package draws from it
    operation.rng = np.random.default_rng(SEED)  # what impulse_noise lacks otherwise
    given = Image.fromarray(image).convert("RGB")
    if name == "motion_blur":
        made = _motion(given, operation.severity_params[place])
    else:
        made = operation.apply(given, place)
    return made if image.ndim == 3 else np.array(Image.fromarray(made).convert("L"))


def _motion(image: Image.Image, settings: tuple[float, float]) -> np.ndarray:
    """Its motion_blur but for ``np.fromstring``, which NumPy 2.3 has no more."""
    import cv2  # type: ignore[import-not-found]
    from medmnistc.corruptions.filter import (  # type: ignore[import-not-found]
        MotionImage,
    )

    file = io.BytesIO()
    image.save(file, format="PNG")
    moved = MotionImage(blob=file.getvalue())
    angle = np.random.uniform(-45, 45)  # noqa: NPY002
    moved.motion_blur(radius=settings[0], sigma=settings[1], angle=angle)
    made = cv2.imdecode(np.frombuffer(moved.make_blob(), np.uint8), cv2.IMREAD_UNCHANGED)
    return made[..., ::-1] if made.ndim == 3 else np.stack([made] * 3, axis=-1)


def recorded() -> dict[str, np.ndarray]:
    """The images of each set, and by "set.corruption" (places, N, 28, 28[, 3]) what they become."""
    found: dict[str, np.ndarray] = {}
    for dataset in SHOWN:
        found[dataset] = images(dataset)
        for name in REGISTRY[dataset]:
            if dataset == "pathmnist" and name != "saturate":
                continue
            if dataset == "octmnist" and name != "defocus_blur":
                continue
            found[f"{dataset}.{name}"] = np.stack(
                [[package(dataset, name, each, p) for each in found[dataset]] for p in PLACES]
            )
    return found


if __name__ == "__main__":
    save: Callable[..., None] = np.savez_compressed
    save(FILE, **recorded())
