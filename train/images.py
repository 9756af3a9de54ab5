"""Where labelled images come from, and how they become pixels for an encoder."""

import base64
import io
import json
import random
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxpeft.files import whole
from train import builtin, labelled, rows
from train.config import Config, Data
from train.rows import DataError

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")

CIFAR_PACKAGE = "bigbench==1.0.0"
CIFAR_ARCHIVE = "bigbench-1.0.0.tar.gz"
CIFAR_SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
CIFAR_MEMBER = "bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json"
CIFAR_FILE = "cifar10-test.npz"
CIFAR_HELD_OUT = 2000


@dataclass(frozen=True, eq=False)
class Row:
    """An image, (height, width, 3) uint8 or the path of a file that holds one, and the name of its class."""

    image: np.ndarray | Path
    target: str


@dataclass(frozen=True, eq=False)
class Example:
    """An image and the number of its class.

    Attributes:
      image: (size, size, 3) uint8, resized: all of them are kept in memory.
      target: the class's number.
      positions: tokens that the model makes of it.
    """

    image: np.ndarray
    target: float
    positions: int

    @property
    def content(self) -> bytes:
        """What tells it from other examples."""
        shape = np.asarray(self.image.shape, np.int64)
        return shape.tobytes() + np.float64(self.target).tobytes() + self.image.tobytes()


@dataclass(frozen=True)
class Reader:
    """How images become pixels.

    Attributes:
      size: pixels a side.
      mean, std: of the channels in [0, 1]; pixels are normalised by them.
      positions: tokens that the model makes of an image.
    """

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    positions: int

    @property
    def fingerprint(self) -> str:
        """What tells it from others."""
        return f"images of {self.size} pixels, mean {self.mean}, deviation {self.std}"

    def resized(self, image: np.ndarray) -> np.ndarray:
        """(size, size, 3) uint8 of (height, width, 3) uint8, bicubic; its sides' ratio is not kept."""
        if image.shape[:2] == (self.size, self.size):
            return image
        pillow = _pillow()
        return np.asarray(pillow.fromarray(image).resize((self.size, self.size), pillow.Resampling.BICUBIC))

    def normalised(self, image: np.ndarray) -> np.ndarray:
        """(size, size, 3) float32 of that uint8."""
        scaled = image.astype(np.float32) / 255
        return (scaled - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)


def load(config: Config) -> tuple[list[Row], list[Row]]:
    """The training images and the held-out images, always the same and in the same order.

    Raises:
      DataError, DownloadError: the source does not exist, is damaged or holds no labelled images.
    """
    data = config.data
    if data.source not in SOURCES:
        return rows.split(data, lambda source, split: read(source))
    found, held_out = SOURCES[data.source](data)
    return found[held_out:][: data.train_rows], found[:held_out][: data.held_out_rows]


def read(source: str) -> list[Row]:
    """All images of a folder `class/name.png`, or of a .npz file.

    Args:
      source: a folder with one folder of images for each class, named by it; or an .npz file with `images`
        (n, height, width[, 3]) uint8, `labels` (n,) and, optionally, `classes`, the names of integer labels.

    Raises:
      DataError: naming the file.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.suffix.lower() != ".npz":
        known = ", ".join(SOURCES)
        raise DataError(
            f"{path}: expected one of {known}, a folder with a folder of images for each class, or a .npz file"
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as .npz: {error}") from None
    if missing := [name for name in ("images", "labels") if name not in arrays]:
        raise DataError(f"{path}: no array {missing[0]!r}; found {', '.join(arrays)}")
    images, found = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or len(images) != len(found):
        raise DataError(
            f"{path}: expected images (n, height, width) or (n, height, width, 3) uint8 and n labels, found "
            f"{images.shape} {images.dtype} and {len(found)} labels"
        )
    names = arrays.get("classes")
    return [
        Row(_coloured(image), str(label if names is None else names[label]))
        for image, label in zip(images, found, strict=True)
    ]


def encode(
    found: Sequence[Row], reader: Reader, config: Config, names: Sequence[str]
) -> tuple[list[Row], list[Example], str]:
    """Opens and resizes images and numbers their classes; returns the rows, their examples, and how many there are."""
    del config
    examples = [
        Example(reader.resized(_open(row.image)), float(labelled.number(row.target, names)), reader.positions)
        for row in found
    ]
    return list(found), examples, f"{len(examples)} images"


def _cifar10(data: Data) -> tuple[list[Row], int]:
    """The 10,000 images of CIFAR-10's test set, 32 x 32 (Krizhevsky 2009): 8,000 to train on, 2,000 held out.

    They come out of the source archive of `bigbench` (358 MB, Apache-2.0), which pip fetches once; only the images are
    kept (28 MB). The split is this package's own, so scores are not those of CIFAR-10's training and test sets.
    """
    del data
    path = builtin.cache_folder() / CIFAR_FILE
    if not path.exists():
        archive = builtin.archive("cifar10", CIFAR_PACKAGE, CIFAR_ARCHIVE, CIFAR_SHA256)
        with tarfile.open(archive, "r|gz") as packed:
            member = next(member for member in packed if member.name == CIFAR_MEMBER)
            task = json.load(packed.extractfile(member))
        decoded = [np.asarray(_pillow().open(io.BytesIO(base64.b64decode(e["input"])))) for e in task["examples"]]
        classes = sorted(task["examples"][0]["target_scores"])
        chosen = [max(e["target_scores"], key=e["target_scores"].get) for e in task["examples"]]
        with whole(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file,
                images=np.stack(decoded),
                labels=np.array([classes.index(name) for name in chosen], np.int8),
                classes=np.array(classes),
            )
        archive.unlink()
    found = read(str(path))
    random.Random(0).shuffle(found)
    return found, CIFAR_HELD_OUT


def _digits(data: Data) -> tuple[list[Row], int]:
    """1,797 handwritten digits, 8 x 8, out of scikit-learn: 1,497 to train on, 300 held out."""
    del data
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise builtin.DownloadError("digits needs the extra `vision`: pip install 'jaxpeft[vision]'") from None
    images, targets = load_digits(return_X_y=True)
    pixels = np.round(images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    found = [Row(_coloured(image), str(target)) for image, target in zip(pixels, targets, strict=True)]
    random.Random(0).shuffle(found)
    return found, 300


def _synthetic(data: Data) -> tuple[list[Row], int]:
    """A generated stand-in for tests: is the bright half above or below? Needs no download."""
    generator, made = np.random.default_rng(data.seed), []
    for _ in range((data.train_rows or 512) + data.held_out_rows):
        image = generator.integers(0, 100, (8, 8, 3), dtype=np.uint8)
        above = bool(generator.random() < 0.5)
        image[slice(None, 4) if above else slice(4, None)] += 120
        made.append(Row(image, "above" if above else "below"))
    return made, data.held_out_rows


SOURCES = {"cifar10": _cifar10, "digits": _digits, "synthetic": _synthetic}


def _folder(path: Path) -> list[Row]:
    found = [
        Row(file, folder.name)
        for folder in sorted(path.iterdir())
        if folder.is_dir()
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in ENDINGS
    ]
    if not found:
        raise DataError(f"{path}: no images; expected a folder for each class with {', '.join(ENDINGS)} files in it")
    return found


def _open(image: np.ndarray | Path) -> np.ndarray:
    if isinstance(image, np.ndarray):
        return image
    try:
        with _pillow().open(image) as opened:
            return np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise DataError(f"{image}: cannot be read as an image: {error}") from None


def _coloured(image: np.ndarray) -> np.ndarray:
    """(height, width, 3) of that or of (height, width)."""
    if image.ndim == 2:
        return np.repeat(image[:, :, None], 3, axis=2)
    if image.shape[-1] != 3:
        raise DataError(f"an image is {image.shape}; expected (height, width) or (height, width, 3)")
    return image


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise builtin.DownloadError("images need the extra `vision`: pip install 'jaxpeft[vision]'") from None
    return Image
