"""Pictures in folders: class folders of image files, and parquet as the Hugging Face hub has it."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sparring.adapters.optional import need
from sparring.core.unpacking import check_parquet, most_bytes, too_large

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".pgm", ".tif", ".tiff", ".webp")
MODES = ("L", "RGB", "1", "P", "RGBA", "CMYK")
MOST_PIXELS = 10**8
"""Of one picture: more is a mistake, or meant to fill the memory."""


class Pictures(NamedTuple):
    """uint8 (N, H, W) or (N, H, W, 3), and labels, of both splits."""

    x_train: np.ndarray
    y_train: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray
    class_names: list[str] | None


def class_folders(folder: Path) -> bool:
    """Whether a folder holds folders of pictures, by class or by split and class."""
    return any(path.suffix.lower() in SUFFIXES for depth in ("*/*", "*/*/*") for path in folder.glob(depth))


def read_class_folders(folder: Path, size: int | None) -> Pictures:
    """The pictures of train/CLASS/* and test/CLASS/* (or val, validation); of CLASS/* alone every fifth is for testing.

    size: what all are resized to, (size, size). Raises ValueError where there is no such layout or no one shape.
    """
    below = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    test = next((below[name] for name in ("test", "val", "validation", "valid") if name in below), None)
    if "train" in below:
        if test is None:
            raise ValueError(
                f"data folder {folder} has train but no test folder beside it; robustness is measured on examples not "
                "seen in training: move some of each class to test"
            )
        names = sorted(path.name for path in below["train"].iterdir() if path.is_dir())
        parts = [_listed(part, names) for part in (below["train"], test)]
    else:
        names = sorted(path.name for path in folder.iterdir() if path.is_dir())
        every = _listed(folder, names)
        parts = [[pair for i, pair in enumerate(every) if (i % 5 == 4) == held] for held in (False, True)]
    for part, pairs in zip(("train", "test"), parts, strict=True):
        if not pairs:
            raise ValueError(f"data folder {folder}: there is no picture for the {part} split, of {names[:5]}")
    files = [file for pairs in parts for file, _ in pairs]
    shape, names_of = None if size is None else (size, size), [str(file) for file in files]
    pixels = decode_images([file.read_bytes() for file in files], folder, shape, names_of)
    num = len(parts[0])
    y_train, y_test = (np.array([label for _, label in pairs]) for pairs in parts)
    return Pictures(pixels[:num], y_train, pixels[num:], y_test, names)


def _listed(folder: Path, names: Sequence[str]) -> list[tuple[Path, int]]:
    """The pictures of a split with their labels; ValueError for a class that training does not know."""
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if unknown := [name for name in there if name not in names]:
        raise ValueError(f"{folder} has the class {unknown[0]!r}, of which the train folder has no example")
    return [
        (file, label)
        for label, name in enumerate(names)
        if name in there
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in SUFFIXES
    ]


def parquet_files(folder: Path) -> Iterator[Path]:
    """Those in a folder and two levels below it, as the hub lays them out; a whole disk is not searched."""
    for depth in ("", "*/", "*/*/"):
        yield from folder.glob(f"{depth}*.parquet")


def read_parquet(folder: Path) -> Pictures:
    """The pictures of train-*.parquet and test-*.parquet (or validation-*). Raises ValueError for another layout."""
    found = sorted(parquet_files(folder))

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
    return Pictures(x_train, y_train, x_test, y_test, names)


def read_table(
    files: list[Path], size: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray, list[str] | None]:
    """Images, labels and class names of parquet files in the hub's layout."""
    parquet = need("pyarrow.parquet", "reading parquet")
    check_parquet(files)
    table = parquet.read_table(files)
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


def decode_images(
    raw: list[Any], file: Path, size: tuple[int, int] | None = None, names: Sequence[str] = ()
) -> np.ndarray:
    """uint8 (N, H, W) or (N, H, W, 3) of compressed images that share one shape, or are brought to `size` (W, H)."""
    pillow = need("PIL.Image", "decoding images")
    images: list[np.ndarray] = []
    room = most_bytes()
    for i, content in enumerate(raw):
        name = names[i] if names else f"{file}: image {i}"
        try:
            with pillow.open(io.BytesIO(content)) as image:
                if image.mode not in MODES:
                    raise ValueError(f"mode {image.mode} is not 8-bit gray or colour")
                if image.width * image.height > MOST_PIXELS:
                    raise ValueError(f"it has {image.width} x {image.height} pixels, more than {MOST_PIXELS:g}")
                mode = "L" if image.mode in ("L", "1") else "RGB"
                image = image if image.mode == mode else image.convert(mode)
                pixels = np.asarray(image if size in (None, image.size) else image.resize(size, pillow.Resampling.BOX))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot be read ({error})") from error
        images.append(pixels)
        room -= pixels.nbytes
        if room < 0:
            raise too_large(f"{file}: {i + 1} of {len(raw)} pictures", most_bytes())
        if pixels.shape != images[0].shape:
            raise ValueError(
                f"{name} has shape {pixels.shape}, image 0 has {images[0].shape}; a batch needs one shape: "
                "resize the images (size=32 does), and use gray or colour throughout"
            )
    return np.stack(images) if images else np.empty(0, np.uint8)
