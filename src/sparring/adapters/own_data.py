"""Examples of other people's data sets and loaders as arrays: torch's, Hugging Face's, or what is read like them.

Shapes: N examples, B batch, *X one input.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sparring.core.batches import Batches, pair_in
from sparring.core.unpacking import most_bytes

TRAIN, TEST = ("train", "training"), ("test", "validation", "val", "valid")
FORMS = (
    "(train, test), or {'train': ..., 'test': ...}, each a torch Dataset, a DataLoader or a pair (x, y) of arrays; or "
    "one of them, for evaluation alone; or a sparring.Dataset"
)


class Part(NamedTuple):
    """The examples of one split: x (N, *X), y of N labels, the classes' names where the source tells them, and a
    sentence on what reading them left out or froze ("" mostly)."""

    x: np.ndarray
    y: np.ndarray
    class_names: tuple[str, ...] | None = None
    told: str = ""


def parts_of(found: Any, about: str) -> tuple[Part | None, Part]:
    """(train, test) of what a user's function returned; train is None where it gave one part alone.

    found: see `FORMS`. about: what errors begin with. Data sets and loaders are read once, as a whole, in their own
    order and with torch's global generator at seed 0, so that each call gets the same examples. Raises TypeError for
    anything else, ValueError for examples that will not do or fail.
    """
    if isinstance(found, Mapping):
        lower = {str(key).lower(): value for key, value in found.items()}
        train, test = (next((lower[key] for key in keys if key in lower), None) for keys in (TRAIN, TEST))
        if test is None:
            raise TypeError(
                f"{about} returned a dictionary of {', '.join(map(str, found)) or 'nothing'}; expected {FORMS}"
            )
        parts = [train, test]
    elif isinstance(found, tuple | list) and len(found) == 2 and not _is_array(found[0]):
        parts = list(found)
    else:
        parts = [None, found]
    if parts[1] is None:
        raise TypeError(f"{about} returned {type(found).__name__} for examples; expected {FORMS}")
    with torch.random.fork_rng(devices=[]), chdir(Path.cwd()):
        torch.random.default_generator.manual_seed(0)
        train_part, test_part = (
            None if part is None else _part(part, f"{about}, {name} part")
            for name, part in zip(("train", "test"), parts, strict=True)
        )
    assert test_part is not None
    return train_part, test_part


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | Tensor)


def _part(source: Any, about: str) -> Part:
    if isinstance(source, tuple | list) and len(source) == 2 and all(map(_is_array, source)):
        return Part(_array(source[0]), _array(source[1]))
    batched = isinstance(source, Batches) or (isinstance(source, DataLoader) and source.batch_sampler is not None)
    readable = batched or hasattr(source, "__getitem__") or hasattr(source, "__iter__")
    if not readable or isinstance(source, str):
        raise TypeError(f"{about} is a {type(source).__name__}; expected {FORMS}")
    xs, ys, room = [], [], most_bytes()
    for number, (x, y) in enumerate(_pairs(source, about, "batch" if batched else "example")):
        xs.append(_pixels(x))
        ys.append(_array(y))
        room -= xs[-1].nbytes
        if room < 0:  # which ends a stream that has no end, too
            raise ValueError(
                f"{about} holds more than half of this machine's memory after {number + 1} reads: data are kept in "
                "memory as a whole. Return a part of them, such as torch.utils.data.Subset"
            )
        if xs[-1].shape[batched:] != xs[0].shape[batched:]:
            raise ValueError(
                f"{about}: input {number} has shape {xs[-1].shape[batched:]}, input 0 has {xs[0].shape[batched:]}; a "
                "batch needs one shape: resize or crop them where they are read"
            )
    if not xs:
        raise ValueError(f"{about} holds no examples")
    join = np.concatenate if batched else np.stack
    x, y = join(xs), join(ys)
    if len(x) != len(y):
        raise ValueError(f"{about} holds {len(x)} inputs and {len(y)} labels; one label each")
    return Part(x, y, _classes(source), _told(source, len(x), about))


def _pairs(source: Any, about: str, what: str) -> Iterator[tuple[Any, Any]]:
    """The (x, y) of a source; ValueError, with its number, for one that is no pair or fails."""
    number = 0
    rest = iter(source) if hasattr(source, "__iter__") else (source[i] for i in range(len(source)))
    while True:
        try:
            item = next(rest)
        except (StopIteration, IndexError):  # torch's own data sets end by IndexError where they have no __iter__
            return
        except (Exception, SystemExit) as error:
            raise ValueError(f"{about}: {what} {number} fails with {type(error).__name__}: {error}") from error
        pair = pair_in(item)
        if pair is None:
            names = ", ".join(map(str, item)) if isinstance(item, Mapping) else ""
            held = f"{len(item)} parts" if isinstance(item, tuple | list) else f"{type(item).__name__} {names}".strip()
            raise ValueError(
                f"{about}: {what} {number} is {held}; expected (x, y), an input and its label, or a dictionary with "
                "one label and one input. Give these two where they are read, or by collate_fn of the DataLoader"
            )
        if isinstance(pair[0], Mapping | tuple | list):
            raise ValueError(
                f"{about}: the input of {what} {number} is a {type(pair[0]).__name__}; expected one tensor, array or "
                "picture. Several inputs go into a sparring.Dataset as named tensors"
            )
        yield pair
        number += 1


def _pixels(x: Any) -> np.ndarray:
    """An array of one input or a batch; a picture of PIL in gray or colour."""
    if hasattr(x, "convert") and hasattr(x, "mode"):
        return np.asarray(x if x.mode in ("L", "RGB") else x.convert("L" if x.mode == "1" else "RGB"))
    return _array(x)


def _array(value: Any) -> np.ndarray:
    value = value.detach().cpu() if isinstance(value, Tensor) else value
    return value.to(torch.float32).numpy() if getattr(value, "dtype", None) == torch.bfloat16 else np.asarray(value)


def _classes(source: Any) -> tuple[str, ...] | None:
    """The names of the classes, as torchvision's data sets tell them."""
    names = getattr(source, "classes", None) or getattr(getattr(source, "dataset", None), "classes", None)
    fits = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    return tuple(names) if fits and names else None


def _told(source: Any, num: int, about: str) -> str:
    """What of a source is not in what was read of it, and what was frozen."""
    sentences, behind = [], getattr(source, "dataset", source)
    total = len(behind) if isinstance(source, DataLoader) and hasattr(behind, "__len__") else num
    if total != num:
        sentences.append(
            f"{about}: the loader gave {num} of the {total} examples of its data set (sampler, drop_last)."
        )
    if hasattr(behind, "__getitem__") and not isinstance(behind, IterableDataset | Batches):
        first, second = (pair_in(behind[0]) for _ in range(2))
        if first and second and not np.array_equal(_pixels(first[0]), _pixels(second[0])):
            sentences.append(
                f"{about}: two looks at one example differ, so it is changed at random where it is read. Each was read "
                "once and stays like that; random changes in training are the settings' (such as crop, flip)."
            )
    return " ".join(sentences)
