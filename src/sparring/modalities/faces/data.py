"""Faces of persons: single pictures to train on, pairs of pictures of unseen persons to be judged on.

Shapes: N pictures, P pairs, C H W one picture.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparring.core.unpacking import read_npz
from sparring.modalities.base import Dataset
from sparring.modalities.images.data import as_pixels, scale
from sparring.modalities.images.folders import SUFFIXES, decode_images, read_table

HELD_PAIRS = 100  # of one kind, of the persons held out: they are attacked after every epoch
FACE_DATA = {
    "orl_faces": "40 persons, 10 pictures each, as 46x56 unless size= says otherwise; from $SPARRING_DATA/orl_faces.",
    "FOLDER/PERSON/PICTURE": "a folder for each person; pictures of one size, or of any with size=WIDTHxHEIGHT.",
    "faces:FILE.npz": "x: pictures as for images; y (N,): whose they are.",
}


def has_persons(path: Path) -> bool:
    """Whether a folder holds folders with pictures."""
    return path.is_dir() and any(file.suffix.lower() in SUFFIXES for file in path.glob("*/*"))


def read_faces(
    path: str, *, size: str = "", fold: int = 0, folds: int = 4, held_out: float = 0.2, pairs: int = 5000, seed: int = 0
) -> Dataset:
    """Pictures of most persons to train on, and pairs of pictures of the others for the test.

    Persons are dealt to the folds by the seed; those of one fold are the test. Of the others the share `held_out` (at
    least 2) is not trained on: pairs of them set the threshold and choose the best epoch. Pairs: all of the same person
    (class 1; at most `pairs`, drawn by the seed), in turns with as many of different persons (class 0). Inputs are
    named: `probe`, in pairs `reference`, too, and whose they are (`probe_subject`, `reference_subject`).
    Raises ValueError, FileNotFoundError and ImportError (pillow, pyarrow), in one sentence.
    """
    if not 0 <= fold < folds or folds < 2 or not 0 < held_out < 1 or pairs < 1 or seed < 0:
        got = f"{fold=}, {folds=}, held_out={held_out:g}, {pairs=}, {seed=}; expected 0 <= fold < folds, folds >= 2"
        raise ValueError(f"faces {path!r}: {got}, a share, some pairs, and a seed of at least 0")
    x, whose = _pictures(path, size or ("46x56" if path == "orl_faces" else ""))
    names, person = np.unique(whose, return_inverse=True)
    draw = np.random.default_rng(seed)
    order = draw.permutation(len(names))
    test, rest = order[fold::folds], order[np.arange(len(order)) % folds != fold]
    held, trained = np.split(rest, [max(2, round(held_out * len(rest)))])
    if min(map(len, (test, held, trained))) < 2:
        raise ValueError(
            f"faces {path!r}: {len(names)} person(s) in {folds} folds make {len(test)} to test, {len(held)} to set the "
            f"threshold, {len(trained)} to train; expected 2 each, for it takes two to be told apart: bring more"
        )
    mine = np.isin(person, trained)
    label = torch.from_numpy(np.searchsorted(np.sort(trained), person[mine]))
    (x_test, y_test), validation = (
        _pairs(x, person, np.flatnonzero(np.isin(person, some)), most, draw, path)
        for some, most in ((test, pairs), (held, min(pairs, HELD_PAIRS)))
    )
    return Dataset(
        f"{Path(path).stem}, fold {fold} of {folds}, seed {seed}", "faces", {"probe": x[torch.from_numpy(mine)]}, label,
        x_test, y_test, ("different persons", "the same person"),
        {"shape": tuple(x.shape[1:]), "num_subjects": len(trained)},
        lambda rows: {name: scale(t) if t.ndim == 4 else t for name, t in rows.items()}, validation,
    )  # fmt: skip


def _pictures(path: str, size_text: str) -> tuple[Tensor, np.ndarray]:
    """Pictures (N, C, H, W) as stored, and whose they are (N,)."""
    home, place = os.environ.get("SPARRING_DATA"), Path(path).expanduser()
    wanted = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", size_text)
    size = (int(wanted[1]), int(wanted[2])) if wanted else None
    if size_text and (not size or place.suffix == ".npz"):
        raise ValueError(f"faces {path!r}: size={size_text}; expected WIDTHxHEIGHT, as size=46x56, and picture files")
    if path == "orl_faces" and not place.exists():
        place = Path(home or "", path)
        if not home or not place.is_dir():
            raise FileNotFoundError(
                f"faces {path!r}: SPARRING_DATA={home!r} holds no folder orl_faces; expected the 400 pictures there as "
                "parquet (image, label), for they are not downloaded: set SPARRING_DATA, or name a folder of persons"
            )
    if place.suffix == ".npz" and place.exists():
        return _from_npz(place)
    if tables := sorted(place.glob("*.parquet")):
        images, whose, _ = read_table(tables, size)
        return as_pixels(images, "image", path), whose
    files = sorted(file for file in place.glob("*/*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise FileNotFoundError(f"faces {path!r}: found no pictures there; expected {', '.join(FACE_DATA)}")
    try:
        images = decode_images([file.read_bytes() for file in files], place, size)
    except ValueError as error:
        counted = re.search(r"image (\d+)", str(error))
        named = f" (image {counted[1]} is {files[int(counted[1])]}; size=46x56 resizes all)" if counted else ""
        raise ValueError(f"{error}{named}") from error
    return as_pixels(images, "picture", path), np.array([file.parent.name for file in files])


def _from_npz(path: Path) -> tuple[Tensor, np.ndarray]:
    try:
        arrays = read_npz(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as .npz of plain arrays ({error})") from error
    x, y = (arrays.get(key, np.empty(0)) for key in "xy")
    if y.ndim != 1 or len(x) != len(y) or x.ndim not in (3, 4) or (y != y).any():  # NaN
        got = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"{path}: got {got}; expected pictures x (N, H, W) or (N, C, H, W), and y (N,), not NaN")
    return as_pixels(x[:, None] if x.ndim == 3 else x, "x", path.name), y


def _pairs(
    x: Tensor, person: np.ndarray, rows: np.ndarray, most: int, draw: np.random.Generator, path: str
) -> tuple[dict[str, Tensor], Tensor]:
    """Pairs of those rows, the same person and different ones in turns. ValueError where no person has two pictures."""
    own = [rows[person[rows] == subject] for subject in np.unique(person[rows])]
    same = np.concatenate([np.stack([some[side] for side in np.triu_indices(len(some), 1)], 1) for some in own])
    if not len(same):
        told = f"faces {path!r}: {len(own)} unseen persons have one picture each; expected two or more"
        raise ValueError(f"{told}, for it is asked whether two pictures show the same person: bring more pictures")
    same = draw.permutation(same)[:most]
    other = np.sort(draw.choice(rows, size=(20 * len(same) + 200, 2)), 1)
    other = draw.permutation(np.unique(other[person[other[:, 0]] != person[other[:, 1]]], axis=0))[: len(same)]
    both = np.stack([same[: len(other)], other], 1).reshape(-1, 2)  # in tiny data there may be few others
    found: dict[str, Tensor] = {}
    for name, index in zip(("reference", "probe"), both.T, strict=True):
        found |= {name: x[torch.from_numpy(index)], f"{name}_subject": torch.from_numpy(person[index])}
    return found, torch.tensor([1, 0]).repeat(len(other))
