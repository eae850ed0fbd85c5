"""Misspellings that a reader forgives: swapped, dropped, doubled, neighbouring, lookalike and invisible letters."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

from sparring.modalities.text.tokens import key_of

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_NEIGHBOURS = {letter: row[i - 1] if i else row[1] for row in _ROWS for i, letter in enumerate(row)}
_LOOKALIKES = dict(zip("aceiopxyshjk", "асеіорхуѕһјк", strict=True))
_ZERO_WIDTH = "\u200b"


def _swapped(word: str, i: int) -> str:
    return word[:i] + word[i + 1] + word[i] + word[i + 2 :]


def _dropped(word: str, i: int) -> str:
    return word[:i] + word[i + 1 :]


def _doubled(word: str, i: int) -> str:
    return word[: i + 1] + word[i:]


def _neighbouring(word: str, i: int) -> str:
    return word[:i] + _NEIGHBOURS.get(word[i], word[i]) + word[i + 1 :]


def _lookalike(word: str, i: int) -> str:
    return word[:i] + _LOOKALIKES.get(word[i], word[i]) + word[i + 1 :]


def _invisible(word: str, i: int) -> str:
    return word[:i] + _ZERO_WIDTH + word[i:]


KINDS: tuple[Callable[[str, int], str], ...] = (_swapped, _dropped, _neighbouring, _lookalike, _doubled, _invisible)


def misspellings(word: str, count: int = 8, known: Iterable[str] = ()) -> tuple[str, ...]:
    """Up to `count` forms of a word of four letters or more with one inner place changed, the first letter kept.

    Forms that are `known` words come first (a model reads them as those), then one of each kind, then others; which
    places are changed hangs on the word alone. Nothing for shorter words, or such as are not of letters.

    Source: the edits of Gao 2018 (DeepWordBug) and Li 2019 (TextBugger); the choice of places is ours.

    >>> forms = misspellings("film", known={"flim", "fim"})
    >>> forms[:2], len(forms), all(form[0] == "f" for form in forms)
    (('flim', 'fim'), 8, True)
    """
    if len(word) < 4 or not word.isalpha():
        return ()
    places = list(range(1, len(word) - 1))
    turn = hashlib.sha256(word.encode()).digest()[0] % len(places)
    places = places[turn:] + places[:turn]
    forms = [form for i in places for kind in KINDS if (form := kind(word, i)) != word and key_of(form) == form]
    several, read = dict.fromkeys(forms), set(known)
    return tuple(sorted(several, key=lambda form: form not in read))[:count]
