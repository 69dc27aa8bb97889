"""CIFAR-10 and CIFAR-100 from folders of images or from the published files, cached as uint8."""

from __future__ import annotations

import os
import pickle
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SIDE = 32
_PIXELS = 3 * SIDE * SIDE
_RECORD = 2 + _PIXELS  # 0 train or 1 test, label, then the pixels [3, 32, 32]
CLASSES = (10, 100)
_ENDINGS = (".jpg", ".jpeg", ".png")


def cache_name(classes: int) -> str:
    """Name of the cache's file next to the data."""
    return f"cifar{classes}-uint8.npy"


class Cifar(NamedTuple):
    """Images are uint8 ``[n, 3, 32, 32]``, labels int64 ``[n]`` from 0 to below ``classes``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: int


def load_cifar(root: str | Path, classes: int, cache: str | Path | None = None) -> Cifar:
    """Read CIFAR-10 or CIFAR-100; the first time it is decoded, then read from the cache.

    ``root`` holds ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg`` (or PNGs; the classes are numbered
    in alphabetical order), or the published files, either as pickles (``data_batch_1`` ... and
    ``test_batch``; ``train`` and ``test`` of CIFAR-100) or binary (the same with ``.bin``),
    directly or in their usual folder. Of CIFAR-100's two labels the fine one is taken. Pickles are
    read without running code from them.

    Args:
        root: folder of the data.
        classes: how many there must be, 10 or 100.
        cache: file of the decoded array, uint8 ``[n, 3074]``; next to the data unless given. It is
            trusted as it is: delete it when the data changes.

    Raises:
        FileNotFoundError: none of the three forms is there, or one without some of its files.
        ValueError: a file is not what it should be, or there is another number of classes; the
            message names it.
    """
    if classes not in CLASSES:
        raise ValueError(f"classes: expected 10 or 100, got {classes!r}")
    root = Path(root)
    path = root / cache_name(classes) if cache is None else Path(cache)
    if path.exists():
        records = np.load(path)
        if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != _RECORD:
            raise ValueError(
                f"{path}: expected uint8 [n, {_RECORD}], got {records.dtype} {records.shape}; "
                "delete it to decode the data again"
            )
    else:
        records = _decode(root, classes)
        _write(path, records)
    found = int(records[:, 1].max(initial=0)) + 1
    # CIFAR-10 has no label of 10 or above, and CIFAR-100 has.
    if found > classes or (classes == 100 and found <= 10):
        raise ValueError(
            f"{path}: expected labels of {classes} classes, got labels up to {found - 1}; this is "
            f"not CIFAR-{classes}"
        )
    parts = []
    for split in (0, 1):
        chosen = records[records[:, 0] == split]
        if not len(chosen):
            raise ValueError(f"{path}: expected train and test images, got none of one kind")
        parts.append(torch.from_numpy(chosen[:, 2:].reshape(-1, 3, SIDE, SIDE)))
        parts.append(torch.from_numpy(chosen[:, 1].astype(np.int64)))
    return Cifar(*parts, classes)


def _decode(root: Path, classes: int) -> np.ndarray:
    if (root / "train").is_dir() and (root / "test").is_dir():
        names = [{p.name for p in (root / s).iterdir() if p.is_dir()} for s in ("train", "test")]
        if all(names) and names[0] != names[1]:
            raise ValueError(
                f"{root}: expected the same classes in train and test, got "
                f"{', '.join(sorted(names[0] ^ names[1]))} in one of them only"
            )
        return np.concatenate(
            [_images(root / "train", 0, classes), _images(root / "test", 1, classes)]
        )
    name = "cifar-10-batches" if classes == 10 else "cifar-100"
    binary = f"{name}-bin" if classes == 10 else f"{name}-binary"
    pickles = f"{name}-py" if classes == 10 else f"{name}-python"
    for folder in (root, root / pickles, root / binary):
        for ending, read in (("", _pickled), (".bin", _binary)):
            train, test = _published(folder, classes, ending)
            lacking = [p.name for p in (*train, test) if not p.is_file()]
            if 0 < len(lacking) < len(train) + 1:
                raise FileNotFoundError(
                    f"{folder}: expected all files of CIFAR-{classes}, found no "
                    f"{', '.join(lacking)}"
                )
            if not lacking:
                parts = [read(p, 0, classes) for p in train]
                return np.concatenate([*parts, read(test, 1, classes)])
    expected = "data_batch_1 ... and test_batch" if classes == 10 else "train and test"
    raise FileNotFoundError(
        f"{root}: expected train/CLASS/*.jpg and test/CLASS/*.jpg, or {expected} of "
        f"CIFAR-{classes} (pickles or .bin), found none of them"
    )


def _published(folder: Path, classes: int, ending: str) -> tuple[list[Path], Path]:
    """Files of the training images, and the one of the test images."""
    if classes == 10:
        train = [folder / f"data_batch_{i}{ending}" for i in range(1, 6)]
        return train, folder / f"test_batch{ending}"
    return [folder / f"train{ending}"], folder / f"test{ending}"


def _images(folder: Path, split: int, classes: int) -> np.ndarray:
    from PIL import Image

    places = sorted(p for p in folder.iterdir() if p.is_dir())
    files = [
        (label, path)
        for label, place in enumerate(places)
        for path in sorted(place.iterdir())
        if path.suffix.lower() in _ENDINGS
    ]
    if not files:
        raise FileNotFoundError(f"{folder}: expected CLASS/*.jpg, found no image")
    if len(places) != classes:
        raise ValueError(
            f"{folder}: expected {classes} folders, one for each class, got {len(places)}; this is "
            f"not CIFAR-{classes}"
        )
    records = np.empty((len(files), _RECORD), np.uint8)
    records[:, 0] = split
    for record, (label, path) in zip(records, files, strict=True):
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
        if pixels.shape != (SIDE, SIDE, 3):
            raise ValueError(f"{path}: expected {SIDE} x {SIDE} pixels, got {pixels.shape[:2]}")
        record[1] = label
        record[2:] = pixels.transpose(2, 0, 1).ravel()
    return records


def _binary(path: Path, split: int, classes: int) -> np.ndarray:
    content = np.fromfile(path, np.uint8)
    labels = 1 if classes == 10 else 2  # of CIFAR-100 a coarse one first
    if not content.size or content.size % (labels + _PIXELS):
        raise ValueError(
            f"{path}: expected records of {labels + _PIXELS} bytes, got {content.size} bytes in all"
        )
    content = content.reshape(-1, labels + _PIXELS)[:, labels - 1 :]
    return np.concatenate([np.full((len(content), 1), split, np.uint8), content], axis=1)


def _pickled(path: Path, split: int, classes: int) -> np.ndarray:
    key = b"labels" if classes == 10 else b"fine_labels"
    with path.open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
    try:
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[key], np.uint8)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a dict with b'data' and {key!r}") from error
    if pixels.dtype != np.uint8 or pixels.shape != (len(labels), _PIXELS):
        raise ValueError(
            f"{path}: expected data of uint8 [{len(labels)}, {_PIXELS}], "
            f"got {pixels.dtype} {list(pixels.shape)}"
        )
    head = np.stack([np.full(len(labels), split, np.uint8), labels], axis=1)
    return np.concatenate([head, pixels], axis=1)


class _ArraysOnly(pickle.Unpickler):
    """Loads dicts, lists and numpy arrays; anything else in a pickle could run code."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("multiarray", "_reconstruct"): np.zeros(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
        place = (module.rpartition(".")[2], name)
        # The published files name numpy.core.multiarray, newer numpy writes numpy._core.multiarray.
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if place in known:
                return known[place]
        elif (module, name) == ("_codecs", "encode"):  # bytes, in pickles by Python 3
            return lambda text, encoding: text.encode(encoding)
        raise ValueError(f"a pickle of CIFAR holds no {module}.{name}")


def _write(path: Path, records: np.ndarray) -> None:
    """Whole or not at all: another process may read at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, records)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
