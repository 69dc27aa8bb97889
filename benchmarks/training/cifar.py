"""CIFAR-10 from a folder of JPEGs or from the published files, cached as one uint8 array."""

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
CACHE = "cifar10-uint8.npy"


class Cifar10(NamedTuple):
    """Images are uint8 ``[n, 3, 32, 32]``, labels int64 ``[n]``."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def load_cifar10(root: str | Path, cache: str | Path | None = None) -> Cifar10:
    """Read CIFAR-10; the first time it is decoded, then read from the cache.

    ``root`` holds ``train/CLASS/*.jpg`` and ``test/CLASS/*.jpg`` (the classes in alphabetical
    order are 0 to 9), or the published files, either as pickles (``data_batch_1`` ...) or binary
    (``data_batch_1.bin`` ...), directly or in their usual folder. Pickles are read without running
    code from them.

    Args:
        root: folder of the data.
        cache: file of the decoded array, uint8 ``[n, 3074]``; next to the data unless given. It is
            trusted as it is: delete it when the data changes.

    Raises:
        FileNotFoundError: none of the three forms is there.
        ValueError: a file is not what it should be; the message names it.
    """
    root = Path(root)
    path = root / CACHE if cache is None else Path(cache)
    if path.exists():
        records = np.load(path)
        if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != _RECORD:
            raise ValueError(
                f"{path}: expected uint8 [n, {_RECORD}], got {records.dtype} {records.shape}; "
                "delete it to decode the data again"
            )
    else:
        records = _decode(root)
        _write(path, records)
    parts = []
    for split in (0, 1):
        chosen = records[records[:, 0] == split]
        if not len(chosen):
            raise ValueError(f"{path}: expected train and test images, got none of one kind")
        parts.append(torch.from_numpy(chosen[:, 2:].reshape(-1, 3, SIDE, SIDE)))
        parts.append(torch.from_numpy(chosen[:, 1].astype(np.int64)))
    return Cifar10(*parts)


def _decode(root: Path) -> np.ndarray:
    if (root / "train").is_dir() and (root / "test").is_dir():
        return np.concatenate([_jpegs(root / "train", 0), _jpegs(root / "test", 1)])
    for folder in (root, root / "cifar-10-batches-py", root / "cifar-10-batches-bin"):
        for ending, read in (("", _pickled), (".bin", _binary)):
            train = sorted(folder.glob(f"data_batch_[1-5]{ending}"))
            test = folder / f"test_batch{ending}"
            if train and test.is_file():
                return np.concatenate([*(read(p, 0) for p in train), read(test, 1)])
    raise FileNotFoundError(
        f"{root}: expected train/CLASS/*.jpg and test/CLASS/*.jpg, or data_batch_1 ... and "
        "test_batch of CIFAR-10 (pickles or .bin), found none of them"
    )


def _jpegs(folder: Path, split: int) -> np.ndarray:
    from PIL import Image

    classes = sorted(p for p in folder.iterdir() if p.is_dir())
    files = [
        (label, path) for label, place in enumerate(classes) for path in sorted(place.glob("*.jpg"))
    ]
    if not files:
        raise FileNotFoundError(f"{folder}: expected CLASS/*.jpg, found no image")
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


def _binary(path: Path, split: int) -> np.ndarray:
    content = np.fromfile(path, np.uint8)
    if not content.size or content.size % (1 + _PIXELS):
        raise ValueError(
            f"{path}: expected records of {1 + _PIXELS} bytes, got {content.size} bytes in all"
        )
    content = content.reshape(-1, 1 + _PIXELS)
    return np.concatenate([np.full((len(content), 1), split, np.uint8), content], axis=1)


def _pickled(path: Path, split: int) -> np.ndarray:
    with path.open("rb") as file:
        batch = _ArraysOnly(file, encoding="bytes").load()
    try:
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], np.uint8)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: expected a dict with b'data' and b'labels'") from error
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
        raise ValueError(f"a CIFAR-10 pickle holds no {module}.{name}")


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
