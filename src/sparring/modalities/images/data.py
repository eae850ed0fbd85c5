"""Images and feature vectors as tensors: digits, MNIST, CIFAR-10, a folder of parquet, an .npz file.

Shapes: N examples, B batch, C H W one image, D features, *X one input.
"""

from __future__ import annotations

import importlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparring.modalities.base import Dataset

HUB = {"mnist": "ylecun/mnist", "cifar10": "uoft-cs/cifar10"}
_KEYS = ("x_train", "y_train", "x_test", "y_test")
KNOWN = {
    "digits": "scikit-learn's 8x8 digits; needs nothing.",
    "mnist": "From $SPARRING_DATA/mnist when that is there, else from the Hugging Face hub.",
    "cifar10": "From $SPARRING_DATA/cifar10 when that is there, else from the Hugging Face hub.",
    "FOLDER": "train-*.parquet and test-*.parquet (or validation-*), as the hub has them: image (or img) and label.",
    "FILE.npz": "x_train, y_train, x_test, y_test: uint8 images NHW or NHWC, float NCHW, or vectors (N, D).",
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
    return path.suffix == ".npz" or (path.is_dir() and any(path.rglob("*.parquet")))


def read_images(path: str) -> Dataset:
    """The data set of a name in `KNOWN`, of a folder of parquet or of an .npz file, whose float images lie in [0, 1].

    FileNotFoundError where nothing is found, ValueError where the content will not do.

    >>> read_images("digits").shape
    (1, 8, 8)
    """
    if path == "digits":
        return _digits()
    if path in HUB:
        home = os.environ.get("SPARRING_DATA")
        return _parquet(Path(home, path) if home and Path(home, path).is_dir() else _download(path), path)
    place = Path(path).expanduser()
    if place.is_dir():
        return _parquet(place, place.resolve().name)
    if not place.exists():
        raise FileNotFoundError(f"data {path!r}: there is no such name, folder or file; expected {', '.join(KNOWN)}")
    if place.suffix != ".npz":
        raise ValueError(f"data {path!r}: cannot read a {place.suffix or 'plain'} file; expected {', '.join(KNOWN)}")
    return _npz(place)


def _digits() -> Dataset:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    images = (pixels / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, labels, test_size=0.2, stratify=labels, random_state=0)
    return _dataset("digits", parts[0], parts[2], parts[1], parts[3], None)


def _download(name: str) -> Path:
    hub = _need("huggingface_hub", f"downloading {name}")
    try:
        return Path(hub.snapshot_download(HUB[name], repo_type="dataset", allow_patterns="*.parquet"))
    except Exception as error:  # the client's own errors, and those of the network library below it
        raise FileNotFoundError(
            f"data {name!r}: the download of {HUB[name]} failed ({type(error).__name__}: {str(error).strip()[:300]}), "
            f"and SPARRING_DATA={os.environ.get('SPARRING_DATA', '')!r} holds no folder {name}. Offline, set it to a "
            f"folder with {name}/train-*.parquet and {name}/test-*.parquet"
        ) from error


def _parquet(folder: Path, name: str) -> Dataset:
    found = sorted(folder.rglob("*.parquet"))

    def files_of(split: str) -> list[Path]:
        return [p for p in found if p.stem == split or p.stem.startswith(f"{split}-")]

    train, test = files_of("train"), files_of("test") or files_of("validation")
    if not train or not test:
        lacks = "test split: expected test-*.parquet or validation" if train else "train split: expected train"
        raise ValueError(
            f"data folder {folder} has no {lacks}-*.parquet, found {[p.name for p in found[:5]]}. Robustness is "
            "measured on examples not seen in training: split the data into two files"
        )
    if len({p.parent for p in train + test}) > 1:
        raise ValueError(f"data folder {folder} holds several data sets in subfolders; name one of the subfolders")
    x_train, y_train, names = read_table(train)
    x_test, y_test, _ = read_table(test)
    return _dataset(name, x_train, y_train, x_test, y_test, names)


def read_table(
    files: list[Path], size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
    """Images, labels and class names of parquet files in the hub's layout."""
    table = _need("pyarrow.parquet", "reading parquet").read_table(files)
    image = next((c for c in ("image", "img") if c in table.column_names), None)
    if image is None or "label" not in table.column_names:
        raise ValueError(f"{files[0]}: columns {table.column_names}; expected `image` or `img`, and `label`")
    kind = table[image].type
    if "bytes" not in [field.name for field in getattr(kind, "fields", [])]:
        raise ValueError(f"{files[0]}: column {image!r} is {kind}; expected a struct with the file's `bytes`")
    raw = [b for chunk in table[image].chunks for b in chunk.field("bytes").to_pylist()]
    about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get("label", {}).get("names")
    return decode_images(raw, files[0], size), table["label"].to_numpy(), names


def decode_images(raw: list[Any], file: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """uint8 (N, H, W) or (N, H, W, 3) of compressed images that share one shape, or are brought to `size` (W, H)."""
    pillow = _need("PIL.Image", "decoding images")
    images: list[np.ndarray] = []
    for i, content in enumerate(raw):
        try:
            with pillow.open(io.BytesIO(content)) as image:
                if image.mode not in ("L", "RGB", "1", "P", "RGBA", "CMYK"):
                    raise ValueError(f"mode {image.mode} is not 8-bit gray or colour")
                mode = "L" if image.mode in ("L", "1") else "RGB"
                image = image if image.mode == mode else image.convert(mode)
                pixels = np.asarray(image if size in (None, image.size) else image.resize(size, pillow.Resampling.BOX))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: image {i} cannot be read ({error})") from error
        images.append(pixels)
        if pixels.shape != images[0].shape:
            raise ValueError(
                f"{file}: image {i} has shape {pixels.shape}, image 0 has {images[0].shape}; a batch needs one shape: "
                "resize the images, and use gray or colour throughout"
            )
    return np.stack(images) if images else np.empty(0, np.uint8)


def _npz(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [key for key in _KEYS if key not in file]
            arrays = {key: file[key] for key in _KEYS if not missing}
            found = list(file)
    except Exception as error:  # numpy and zipfile raise several kinds for a broken file
        raise ValueError(f"{path}: cannot be read as .npz of plain arrays ({error})") from error
    if missing:
        raise ValueError(f"{path}: keys {missing} are missing; expected {', '.join(_KEYS)}, found {found}")
    return _dataset(path.stem, **arrays, class_names=None)


def _dataset(name: str, x_train: Any, y_train: Any, x_test: Any, y_test: Any, class_names: list[str] | None) -> Dataset:
    x_train, y_train = as_pixels(x_train, "x_train", name), _labels(y_train, "y_train", name)
    x_test, y_test = as_pixels(x_test, "x_test", name), _labels(y_test, "y_test", name)
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
    names = tuple(class_names or map(str, range(num)))
    return Dataset(name, "images", x_train, y_train, x_test, y_test, names, prepare=scale)


def as_pixels(x: np.ndarray, key: str, name: str) -> Tensor:
    """uint8 or float32, features (N, D) or images (N, C, H, W)."""
    if x.ndim not in (2, 3, 4) or x.size == 0:
        raise ValueError(f"{name}: {key} has shape {x.shape}; expected examples (N, D), (N, H, W) or with channels")
    is_bytes = x.dtype == np.uint8
    if not is_bytes and x.dtype.kind != "f":
        raise ValueError(f"{name}: {key} is {x.dtype}; expected uint8 (0 to 255) or floats: use .astype(numpy.float32)")
    if not is_bytes and not np.isfinite(x).all():
        raise ValueError(f"{name}: {key} holds NaN or infinity; no attack can work with it: fill or drop those rows")
    if not is_bytes and x.ndim > 2 and (x.min() < 0 or x.max() > 1):
        raise ValueError(
            f"{name}: {key} holds float images from {x.min():.4g} to {x.max():.4g}; expected [0, 1], the "
            "unit of every radius: store uint8, or undo the normalisation, which belongs inside the model"
        )
    tensor = torch.from_numpy(np.ascontiguousarray(x if is_bytes else x.astype(np.float32)))
    if x.ndim == 3:
        return tensor[:, None]
    channels_last = x.ndim == 4 and x.shape[3] in (1, 3, 4) and (is_bytes or x.shape[1] not in (1, 3, 4))
    return tensor.permute(0, 3, 1, 2).contiguous() if channels_last else tensor


def _labels(y: np.ndarray, key: str, name: str) -> Tensor:
    """int64 (N,) >= 0."""
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim != 1 or y.dtype.kind not in "biuf" or (y.dtype.kind == "f" and not (y == np.floor(y)).all()):
        raise ValueError(f"{name}: {key} is {y.dtype} {y.shape}; expected whole numbers (N,), one class per example")
    if y.size == 0 or y.min() < 0:
        raise ValueError(f"{name}: {key} holds {'nothing' if y.size == 0 else y.min()}; classes count from 0")
    return torch.from_numpy(y.astype(np.int64))


def _need(module: str, purpose: str) -> Any:
    """An optional dependency, or ImportError with the way to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module.partition('.')[0]}: pip install 'sparring[data]'") from error
