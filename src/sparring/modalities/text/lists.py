"""Which words may stand for which: lists of substitutes, and the stop words that have none; word vectors by name."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import NoReturn

import numpy as np

from sparring.core.unpacking import gunzipped, read_npz
from sparring.modalities.text.tokens import key_of

COUNTERFITTED, GLOVE = "counterfitted_neighbors.json.gz", "glove_50d.npz"

_CARRIERS = """
'd 'll 'm 're 's 've a about above after again against all am an and any are aren't as at be because been before being
below between both but by can can't cannot could couldn't did didn't do does doesn't doing don't down during each few
for from further had hadn't has hasn't have haven't having he her here hers herself him himself his how i if in into
is isn't it its itself just me more most must mustn't my myself n't no nor not now of off on once only or other our
ours ourselves out over own same she should shouldn't so some such than that the their theirs them themselves then
there these they this those through to too under until up very was wasn't we were weren't what when where which while
who whom why will with won't would wouldn't you your yours yourself yourselves
"""
STOP_WORDS = frozenset(_CARRIERS.split())
"""English words that carry grammar, not meaning: no list changes them."""

Substitutes = Mapping[str, tuple[str, ...]]


def find_list(name: str) -> Path:
    """The file of a list of substitutes: "counterfitted" under $SPARRING_DATA/words, or a path. FileNotFoundError.

    The lists come from others and are not part of this package.
    """
    place = _in_words(COUNTERFITTED) if name == "counterfitted" else Path(name).expanduser()
    if place and place.is_file():
        return place
    raise FileNotFoundError(
        f"list {name!r}: there is no such file of substitutes{'' if place is None else f' at {place}'}. Either put the "
        "neighbours of Jia and Liang 2019 (github.com/robinjia/certified-word-sub, counterfitted_neighbors.json) at "
        f'$SPARRING_DATA/words/{COUNTERFITTED}, or give a list of your own by path: JSON {{"word": ["other", ...]}} '
        "(also .gz), or lines WORD, TAB, OTHER OTHER ..."
    )


def counterfitted_there() -> bool:
    """Whether the list of that name is there."""
    return _in_words(COUNTERFITTED) is not None


@lru_cache(maxsize=4)
def read_list(path: Path) -> Substitutes:
    """Word -> its substitutes in their order, keys as `key_of` has them; left out are stop words, words for themselves,
    and what is more than one word.

    Raises ValueError for a file that is neither JSON {"word": ["other", ...]} nor lines WORD, TAB, OTHER OTHER ...
    """
    raw = path.read_bytes()
    try:
        text = (gunzipped(raw, str(path)) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        _refuse(path, f"cannot be read as UTF-8 text ({error})")
    found: dict[str, tuple[str, ...]] = {}
    for word, others in (_json_pairs if text.lstrip().startswith("{") else _line_pairs)(text, path):
        key = key_of(word)
        if key not in STOP_WORDS:
            single = (key_of(other) for other in others if len(other.split()) == 1)
            several = dict.fromkeys(other for other in single if other != key and other not in STOP_WORDS)
            if several:
                found[key] = tuple(several)
    if not found:
        _refuse(path, "offers no substitute for any word")
    return found


def _json_pairs(text: str, path: Path) -> list[tuple[str, list[str]]]:
    try:
        table = json.loads(text)
    except json.JSONDecodeError as error:
        _refuse(path, f"is not valid JSON ({error})")
    for word, others in table.items():
        if not isinstance(others, list) or not all(isinstance(other, str) and other for other in others):
            _refuse(path, f"has {str(others)[:40]!r} for {word!r}, where a list of words is expected")
    return list(table.items())


def _line_pairs(text: str, path: Path) -> list[tuple[str, list[str]]]:
    pairs = []
    for number, line in enumerate(text.splitlines(), 1):
        word, tab, others = line.partition("\t")
        if line.strip() and (not tab or not word.strip() or not others.split()):
            _refuse(path, f"line {number} is {line[:40]!r}")
        if line.strip():
            pairs.append((word.strip(), others.split()))
    return pairs


def _refuse(path: Path, why: str) -> NoReturn:
    raise ValueError(
        f'{path} {why}; expected a list of substitutes: JSON {{"word": ["other", ...]}}, or lines WORD, TAB, OTHER ...'
    )


def read_vectors(name: str) -> tuple[dict[str, int], np.ndarray]:
    """Word -> row, and float32 vectors (V, D), of "glove" under $SPARRING_DATA/words or an .npz file of `words` (V,)
    and `vectors` (V, D). Raises FileNotFoundError and ValueError."""
    place = _in_words(GLOVE) if name == "glove" else Path(name).expanduser()
    if place is None or not place.is_file():
        raise FileNotFoundError(
            f"vectors {name!r}: there are none{'' if place is None else f' at {place}'}. Give an .npz file that holds "
            f"`words` (V,) and `vectors` (V, D), or put GloVe there as $SPARRING_DATA/words/{GLOVE}"
        )
    try:
        found = read_npz(place)
        words, vectors = found["words"].tolist(), found["vectors"].astype(np.float32)
    except (KeyError, OSError, ValueError) as error:
        raise ValueError(f"vectors {place}: expected an .npz of `words` (V,) and `vectors` (V, D); {error}") from error
    if vectors.ndim != 2 or len(words) != len(vectors) or not np.isfinite(vectors).all():
        raise ValueError(
            f"vectors {place}: {len(words)} words, vectors {vectors.shape}; expected one finite row a word"
        )
    return {str(word): row for row, word in enumerate(words)}, vectors


def _in_words(file: str) -> Path | None:
    home = os.environ.get("SPARRING_DATA")
    place = Path(home, "words", file) if home else None
    return place if place and place.is_file() else None
