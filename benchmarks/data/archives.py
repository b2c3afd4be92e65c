"""Data sets with their own formats: CIFAR, SVHN, and the digits of scikit-learn."""

import hashlib
import tarfile
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data.catalogue import Entry
from benchmarks.data.cutting import stratified_split
from benchmarks.data.dataset import SPLIT_SEED, SPLITS, Arrays, Raw
from benchmarks.data.download import DataError
from benchmarks.data.npz import DAMAGED

CIFAR_PIXELS = 3 * 32 * 32


def load_digits(entry: Entry) -> Arrays:
    """The digits of scikit-learn, 8x8 in 0..16, scaled once to 28x28 uint8."""
    from PIL import Image  # noqa: PLC0415

    found = find_spec("sklearn")
    if found is None or found.origin is None:
        raise DataError("digits come with scikit-learn, which is not installed.")
    # Read the file itself: importing scikit-learn takes longer than a short run.
    path = Path(found.origin).parent / "datasets" / "data" / "digits.csv.gz"
    try:
        table = np.loadtxt(path, delimiter=",")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}): reinstall scikit-learn.") from error
    small = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    edge = entry.sizes[0]
    x = np.stack(
        [
            np.asarray(Image.fromarray(image).resize((edge, edge), Image.Resampling.BILINEAR))
            for image in small
        ]
    )
    y = table[:, -1].astype(np.int64)
    parts = stratified_split(y, entry.counts, SPLIT_SEED)
    pieces: dict[str, Any] = {
        f"{split}_{letter}": array[rows]
        for split, rows in zip(SPLITS, parts, strict=True)
        for letter, array in (("x", x), ("y", y))
    }
    digest = hashlib.md5(usedforsecurity=False)
    for array in pieces.values():
        digest.update(np.ascontiguousarray(array).tobytes())
    return Arrays(
        name=entry.name,
        kind=entry.kind,
        classes=entry.classes,
        **pieces,
        checksum=digest.hexdigest(),
        verified=True,
        caveats=entry.caveats,
        source=entry.source,
        notes=(),
    )


def read_cifar(path: Path, entry: Entry) -> Raw:
    """A binary CIFAR archive: rows of one (10) or two (100: coarse, fine) labels and 3x32x32."""
    ten = entry.name == "cifar10"
    train = [f"data_batch_{i}.bin" for i in range(1, 6)] if ten else ["train.bin"]
    test = "test_batch.bin" if ten else "test.bin"
    labels = 1 if ten else 2
    blocks: dict[str, np.ndarray] = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                name = Path(member.name).name
                handle = archive.extractfile(member) if name in (*train, test) else None
                if handle is not None:
                    with handle:
                        blocks[name] = np.frombuffer(handle.read(), np.uint8)
    except (tarfile.TarError, *DAMAGED) as error:
        raise DataError(f"{path} is damaged ({error}): download it again.") from error
    for name in (*train, test):
        if name not in blocks:
            raise DataError(f"{path} lacks {name}: expected the binary version of {entry.name}.")
        if blocks[name].size % (labels + CIFAR_PIXELS):
            raise DataError(
                f"{path}: {name} has {blocks[name].size} bytes, expected a multiple of "
                f"{labels + CIFAR_PIXELS}: download it again."
            )
    arrays = {}
    for split, names in (("train", train), ("test", [test])):
        rows = np.concatenate([blocks[n].reshape(-1, labels + CIFAR_PIXELS) for n in names])
        planes = rows[:, labels:].reshape(-1, 3, 32, 32)
        arrays[f"{split}_images"] = np.ascontiguousarray(planes.transpose(0, 2, 3, 1))
        arrays[f"{split}_labels"] = rows[:, labels - 1]
    return Raw(arrays, ())


def read_svhn(train: Path, test: Path) -> Raw:
    """The cropped digits of SVHN: X (32, 32, 3, N), y (N, 1) with 10 for the digit 0."""
    from scipy.io import loadmat  # noqa: PLC0415
    from scipy.io.matlab import MatReadError  # noqa: PLC0415

    arrays = {}
    for split, path in (("train", train), ("test", test)):
        try:
            stored = loadmat(path, variable_names=["X", "y"])
            x, y = stored["X"], stored["y"]
        except (MatReadError, KeyError, TypeError, *DAMAGED) as error:
            raise DataError(f"{path} is damaged ({error}): download it again.") from error
        if x.ndim != 4:
            raise DataError(f"{path}: X has the shape {x.shape}, expected (32, 32, 3, N).")
        arrays[f"{split}_images"] = np.ascontiguousarray(x.transpose(3, 0, 1, 2))
        arrays[f"{split}_labels"] = np.where(y == 10, 0, y)
    return Raw(arrays, ())
