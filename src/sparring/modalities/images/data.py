"""Images and feature vectors as tensors: digits, MNIST, CIFAR-10, a folder of parquet, an .npz file.

Shapes: N examples, B batch, C H W one image, D features, *X one input.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparring.adapters.optional import download
from sparring.adapters.own_data import Part
from sparring.core.types import take
from sparring.core.unpacking import read_npz
from sparring.modalities.base import Dataset
from sparring.modalities.images.folders import Pictures, class_folders, parquet_files, read_class_folders, read_parquet

HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
_KEYS = ("x_train", "y_train", "x_test", "y_test")
KNOWN = {
    "digits": "scikit-learn's 8x8 digits; needs nothing.",
    "mnist": "From $SPARRING_DATA/mnist when that is there, else from the Hugging Face hub.",
    "cifar10": "From $SPARRING_DATA/cifar10 when that is there, else from the Hugging Face hub.",
    "FOLDER": "train/CLASS/*.png and test/CLASS/*.png (or CLASS/*.png alone; size=32 resizes), or parquet as the hub "
    "has it: train-*.parquet and test-*.parquet (or validation-*) with image (or img) and label.",
    "FILE.npz": "x_train, y_train, x_test, y_test: uint8 images NHW or NHWC, floats of any shape in the threat's box.",
}


def scale(x: Tensor) -> Tensor:
    """What models take, float32: uint8 divided by 255, floats as they are. TypeError for any other type.

    >>> scale(torch.tensor([0, 255], dtype=torch.uint8))
    tensor([0., 1.])
    """
    if x.dtype == torch.uint8:
        return x.to(torch.float32).div_(255)
    if not x.is_floating_point():
        raise TypeError(f"inputs are {x.dtype}; expected uint8 (0 to 255) or floats, for only those have a known scale")
    return x.to(torch.float32)


def reads(path: Path) -> bool:
    """Whether a file or folder looks like images."""
    return path.suffix == ".npz" or (path.is_dir() and (any(parquet_files(path)) or class_folders(path)))


def read_images(path: str, *, size: int | None = None, first_label: int = 0) -> Dataset:
    """The data set "digits", "mnist" or "cifar10", or that of a folder of pictures or parquet, or an .npz file.

    "mnist" and "cifar10" come from the folder $SPARRING_DATA/<name> if it exists, else from the Hugging Face hub.
    Folders: see `KNOWN`; size resizes the pictures of class folders. Npz: x_train, y_train, x_test, y_test; x uint8
    (N, H, W) or (N, H, W, C), or floats of any shape (N, ...) in the box of the threat, of which (N, H, W, C) with one,
    three or four channels become (N, C, H, W); y class numbers from `first_label` on, names, or one-hot. Raises
    FileNotFoundError where nothing is found, ValueError where the content will not do.

    >>> read_images("digits").shape
    (1, 8, 8)
    """
    if path == "digits":
        return _digits()
    if path in HUB:
        home = os.environ.get("SPARRING_DATA")
        folder = Path(home, path) if home and Path(home, path).is_dir() else _download(path)
        return _pictures(read_parquet(folder), path)
    place = Path(path).expanduser()
    if place.is_dir():
        named = any(parquet_files(place))
        return _pictures(read_parquet(place) if named else read_class_folders(place, size), place.resolve().name)
    if not place.exists():
        raise FileNotFoundError(f"data {path!r}: there is no such name, folder or file; expected {', '.join(KNOWN)}")
    if place.suffix != ".npz":
        raise ValueError(f"data {path!r}: cannot read a {place.suffix or 'plain'} file; expected {', '.join(KNOWN)}")
    return _npz(place, first_label)


def collect_images(name: str, train: Part | None, test: Part) -> Dataset:
    """The data set of examples that somebody has as arrays, read as those of an .npz file are; without `train` its
    training part is empty. ValueError for arrays that will not do."""
    first = test if train is None else train
    names = list(first.class_names) if first.class_names else None
    data = _pictures(Pictures(first.x, first.y, test.x, test.y, names), name)
    if train:
        return data
    none = torch.arange(0)
    return replace(data, x_train=take(data.x_train, none), y_train=data.y_train[none])


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return _pictures(Pictures(parts[0], parts[2], parts[1], parts[3], None), "digits")


def _download(name: str) -> Path:
    try:
        return download(HUB[name], (".parquet",))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"data {name!r}: {error}, and SPARRING_DATA={os.environ.get('SPARRING_DATA', '')!r} holds no folder {name}."
            f" Offline, set it to a folder with {name}/train-*.parquet and {name}/test-*.parquet"
        ) from error


def _npz(path: Path, first_label: int) -> Dataset:
    try:
        found = read_npz(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as .npz of plain arrays ({error})") from error
    if missing := [key for key in _KEYS if key not in found]:
        raise ValueError(f"{path}: keys {missing} are missing; expected {', '.join(_KEYS)}, found {list(found)}")
    return _pictures(Pictures(**{key: found[key] for key in _KEYS}, class_names=None), path.stem, first_label)


def _pictures(found: Pictures, name: str, first_label: int = 0) -> Dataset:
    """The arrays as a Dataset. ValueError, naming the split, where inputs or labels will not do."""
    x_train, x_test = as_pixels(found.x_train, "x_train", name), as_pixels(found.x_test, "x_test", name)
    y_train, y_test, class_names = _labels(found, name, first_label)
    for split, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        if len(x) != len(y):
            raise ValueError(f"{name}: x_{split} has {len(x)} examples and y_{split} {len(y)} labels; one label each")
    if x_train.shape[1:] != x_test.shape[1:] or x_train.dtype != x_test.dtype:
        raise ValueError(
            f"{name}: one input of x_train is {x_train.dtype} {tuple(x_train.shape[1:])}, one of x_test is "
            f"{x_test.dtype} {tuple(x_test.shape[1:])}; one model must take both"
        )
    num = int(max(y_train.max(), y_test.max())) + 1
    if num > len(y_train) + len(y_test):
        raise ValueError(f"{name}: labels go up to {num - 1}, with fewer examples than that: are they class numbers?")
    if class_names is not None and len(class_names) < num:
        raise ValueError(f"{name}: labels go up to {num - 1}, but there are {len(class_names)} class names")
    names = tuple(class_names or map(str, range(first_label, num + first_label)))
    return Dataset(name, "images", x_train, y_train, x_test, y_test, names, prepare=scale)


def as_pixels(x: np.ndarray, key: str, name: str) -> Tensor:
    """uint8 or float32 (N, ...); images as (N, C, H, W). Whether the values lie in the box is the threat's business."""
    if x.ndim < 2 or x.size == 0:
        raise ValueError(f"{name}: {key} has shape {x.shape}; expected examples (N, D), (N, H, W), or of more axes")
    if x.dtype.kind in "iu" and x.ndim > 2 and x.min() >= 0 and 1 < x.max() <= 255:
        x = x.astype(np.uint8)  # pixels, whatever type of whole number they come in
    is_bytes = x.dtype == np.uint8
    if not is_bytes and x.dtype.kind != "f":
        raise ValueError(f"{name}: {key} is {x.dtype}; expected uint8 (0 to 255) or floats: use .astype(numpy.float32)")
    if not is_bytes and not np.isfinite(x).all():
        raise ValueError(f"{name}: {key} holds NaN or infinity; no attack can work with it: fill or drop those rows")
    tensor = torch.from_numpy(np.ascontiguousarray(x if x.dtype == np.uint8 else x.astype(np.float32)))
    if x.ndim == 3 and is_bytes:
        return tensor[:, None]
    channels_last = x.ndim == 4 and x.shape[3] in (1, 3, 4) and (is_bytes or x.shape[1] not in (1, 3, 4))
    return tensor.permute(0, 3, 1, 2).contiguous() if channels_last else tensor


def _labels(found: Pictures, name: str, first_label: int) -> tuple[Tensor, Tensor, Sequence[str] | None]:
    """int64 (N,) >= 0 of both splits, and the class names where there are any; names become numbers in their order."""
    if found.y_train.dtype.kind in "US" and found.y_test.dtype.kind in "US":
        names, numbers = np.unique(np.concatenate([found.y_train, found.y_test]).astype(str), return_inverse=True)
        train, test = (torch.from_numpy(part) for part in np.split(numbers, [len(found.y_train)]))
        return train, test, names.tolist()
    train = _numbers(found.y_train, "y_train", name, first_label)
    return train, _numbers(found.y_test, "y_test", name, first_label), found.class_names


def _numbers(y: np.ndarray, key: str, name: str, first_label: int) -> Tensor:
    """int64 (N,) >= 0, of numbers or one-hot rows."""
    rows = y.ndim == 2 and y.shape[1] > 1 and y.dtype.kind in "biuf"
    if rows and ((y == 0) | (y == 1)).all() and (y.sum(1) == 1).all():
        return torch.from_numpy(y.argmax(1))
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "biuf" or (y.dtype.kind == "f" and not (y == np.floor(y)).all()):
        raise ValueError(
            f"{name}: {key} is {y.dtype} {y.shape}; expected whole numbers (N,), one class for each example, names in "
            "both splits, or one-hot rows"
        )
    if y.size == 0 or y.min() < first_label or y.max() >= 2**31:
        held = "nothing" if y.size == 0 else f"{y.min()} to {y.max()}"
        raise ValueError(
            f"{name}: {key} holds labels {held}; expected class numbers from {first_label} on (first_label=1 says of a "
            "file that they count from 1; a function of your own gives y - 1)"
        )
    return torch.from_numpy(y.astype(np.int64) - first_label)
