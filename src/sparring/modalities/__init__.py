"""The kinds of input. A new one is a folder beside `images` whose module holds MODALITY, and one line here."""

from __future__ import annotations

import functools
import importlib
import os
from contextlib import chdir, suppress
from pathlib import Path
from typing import NamedTuple

from sparring.adapters.own_data import parts_of
from sparring.core.registry import Spec, named, parse
from sparring.modalities.base import Dataset, Modality

MODALITIES: dict[str, str] = {
    "images": "sparring.modalities.images",
    "faces": "sparring.modalities.faces",
    "text": "sparring.modalities.text",
    "table": "sparring.modalities.tables",
}
PLAIN = "images"
"""What a user's own arrays are, where no kind is named."""


class Loaded(NamedTuple):
    """A data set, its kind of input, and a sentence on how the text was taken where it did not say so."""

    data: Dataset
    modality: Modality
    taken: str


def find(kind: str) -> Modality:
    """The record of a kind of input, such as "images"; raises ValueError for one that is not known."""
    if kind not in MODALITIES:
        raise ValueError(f"kind of input {kind!r} is unknown; there are {', '.join(MODALITIES)}")
    modality: Modality = importlib.import_module(MODALITIES[kind]).MODALITY
    return modality


def load_data(text: str) -> Dataset:
    """The data set that `[KIND:]PATH,KEY=VALUE...` names, or the one that FILE.py:FUNCTION returns, which may be torch
    data sets, loaders or arrays, too (`adapters.own_data`).

    Without KIND, known names and what lies at the path decide. Raises ValueError where two kinds would take it or none
    can, FileNotFoundError where nothing is there.

    >>> load_data("digits").shape
    (1, 8, 8)
    """
    return find_data(text).data


def find_data(text: str) -> Loaded:
    """`load_data`, with the kind of input, and how it was found; what was read last is kept while it is the same."""
    spec = parse(text)
    name = spec.value if spec.value and spec.name in MODALITIES else spec.name
    place = Path(name.rpartition(":")[0] if ".py:" in name else name).expanduser()
    stamps: list[object] = [os.environ.get("SPARRING_DATA"), _stamp(place)]
    for _, value in spec.options:  # a schema, a file of test examples
        with suppress(ValueError):
            stamps.append(_stamp(Path(value)))
    return _read(spec, tuple(stamps))


def _stamp(place: Path) -> tuple[int, int] | None:
    """When a file was changed, and its size; None where there is none. ValueError for what can be no path."""
    try:
        there = place.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ValueError(f"data {str(place)[:60]!r}: no file or folder can be called so ({error.strerror})") from None
    return there.st_mtime_ns, there.st_size


@functools.lru_cache(maxsize=1)
def _read(spec: Spec, stamps: tuple[object, ...]) -> Loaded:
    text, taken = spec.text, ""
    if ".py:" in spec.name:
        return _of_function(spec)
    if spec.name not in MODALITIES:
        path = spec.name if spec.value is None else f"{spec.name}:{spec.value}"
        spec = spec._replace(name=kind_of(text), value=path)
        taken = f"data {text} is taken as {spec.name}; {spec.name}:{text} would say so"
    modality = find(spec.name)
    return Loaded(named(spec, {spec.name: modality.load}, "data", given=())(), modality, taken)


def _of_function(spec: Spec) -> Loaded:
    """The data that a user's function returns: a Dataset, or data sets, loaders and arrays, read as a whole."""
    make = named(spec, {}, "data", given=())
    try:
        with chdir(Path.cwd()):
            found = make()
    except (Exception, SystemExit) as error:
        raise ValueError(f"data {spec.text!r} failed with {type(error).__name__}: {error}") from error
    if isinstance(found, Dataset):
        return Loaded(found, find(found.kind), "")
    modality, (train, test) = find(PLAIN), parts_of(found, f"data {spec.text!r}")
    assert modality.collect is not None
    path, _, function = spec.name.rpartition(":")
    told = " ".join(part.told for part in (train, test) if part and part.told)
    return Loaded(modality.collect(f"{Path(path).name}:{function}", train, test), modality, told)


def kind_of(text: str) -> str:
    """The kind of input of the data that a text names, without reading them; "" for FILE.py:FUNCTION. Raises as
    `load_data`."""
    spec = parse(text)
    if ".py:" in spec.name or spec.name in MODALITIES:
        return "" if ".py:" in spec.name else spec.name
    return _kind_of(spec.name if spec.value is None else f"{spec.name}:{spec.value}", text)


def known_data() -> dict[str, str]:
    """The data sets and forms of all kinds, with a line on each."""
    return {name: line for kind in MODALITIES for name, line in find(kind).known.items()}


def _kind_of(path: str, text: str) -> str:
    kinds = [kind for kind in MODALITIES if path in find(kind).known]
    place = Path(path).expanduser()
    there = _stamp(place) is not None
    if not kinds and there:
        kinds = [kind for kind in MODALITIES if find(kind).reads(place)]
    if len(kinds) == 1:
        return kinds[0]
    if kinds:
        forms = " or ".join(f"{kind}:{text}" for kind in kinds)
        raise ValueError(f"data {text!r} fits several kinds of input, which have other attacks; say {forms}")
    expected = f"expected {', '.join(known_data())}, or FILE.py:FUNCTION"
    if not there:
        raise FileNotFoundError(f"data {text!r}: there is no such name, folder or file; {expected}")
    forms = "; ".join(f"{name}: {line}" for name, line in known_data().items() if name.isupper() or "." in name)
    what = "folder" if place.is_dir() else f"{place.suffix or 'plain'} file"
    raise ValueError(f"data {text!r}: cannot read a {what} like this; {expected}. {forms}")
