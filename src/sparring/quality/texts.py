"""How varied generated texts are, and how many are copies; texts are sequences of units, such as words.

None of these says whether a text is good: babble is diverse and new. Show a measure of quality beside them, over the
temperature of the model, since each of the two can be bought with the other (Caccia 2020).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def self_bleu(texts: Sequence[Sequence[str]], order: int = 3) -> float:
    """The mean BLEU of each text with all others as references: 1 where all are alike, near 0 where none share words.

    BLEU = brevity * exp(mean of log p_n, n = 1..order), p_n the share of n-grams that a reference has too, each as
    often as it comes in one reference; not smoothed, so 0 where a p_n is 0 or the text is shorter than `order`. Depends
    on the number and the length of the texts: compare only equal numbers. ValueError for fewer than two.

    Source: Zhu 2018 (Texygen, section 3.1), Papineni 2002; Texygen smooths and takes a part of the references.

    >>> round(self_bleu([["a", "good", "film"], ["a", "good", "film"], ["bad", "in", "it"]]), 2)
    0.67
    """
    if len(texts) < 2:
        raise ValueError(f"{len(texts)} texts; expected two and more, since each is held against the others")
    precisions = [_precisions(texts, n) for n in range(1, order + 1)]
    lengths = Counter(map(len, texts))
    scores = []
    for text, *shares in zip(texts, *precisions, strict=True):
        scores.append(0.0)
        if min(shares) > 0:
            others = lengths - Counter([len(text)])
            near = min(others, key=lambda other: (abs(other - len(text)), other))
            scores[-1] = math.exp(min(0.0, 1 - near / len(text)) + sum(map(math.log, shares)) / order)
    return sum(scores) / len(scores)


def _precisions(texts: Sequence[Sequence[str]], n: int) -> list[float]:
    """p_n of each text against the others."""
    counts = [Counter(_ngrams(text, n)) for text in texts]
    most: dict[tuple[str, ...], list[int]] = {}  # of each n-gram: its two largest counts in one text
    for count in counts:
        for gram, number in count.items():
            most[gram] = sorted([*most.get(gram, [0, 0]), number])[-2:]
    found = []
    for count in counts:
        # where a text itself holds the largest count, the largest of the others is the second
        held = sum(min(c, most[g][0] if c == most[g][1] else most[g][1]) for g, c in count.items())
        found.append(held / max(1, count.total()))
    return found


def _ngrams(text: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def distinct_ngrams(texts: Sequence[Sequence[str]], n: int) -> float:
    """Different n-grams over all n-grams of the texts: 1 where nothing repeats. ValueError where there is none.

    Source: Li 2016 (distinct-1 and distinct-2). Falls with the number of texts: compare only equal numbers.

    >>> distinct_ngrams([["a", "film"], ["a", "play"]], 1)
    0.75
    """
    grams = [gram for text in texts for gram in _ngrams(text, n)]
    if not grams:
        raise ValueError(f"no text has {n} units, so there is no {n}-gram to count")
    return len(set(grams)) / len(grams)


def share_of_copies(texts: Sequence[Sequence[str]], known: Sequence[Sequence[str]]) -> float:
    """The share of texts that stand word for word among the known ones, such as training texts; ValueError for none.

    >>> share_of_copies([["a", "film"], ["a", "play"]], [["a", "play"]])
    0.5
    """
    if not texts:
        raise ValueError("there is not one text to look for")
    pool = set(map(tuple, known))
    return sum(tuple(text) in pool for text in texts) / len(texts)
