"""Measures of generated texts, against other people's code and brute force."""

from __future__ import annotations

import itertools
import random

import pytest

from sparring.quality.texts import distinct_ngrams, self_bleu, share_of_copies

DRAW = random.Random(0)
TEXTS = [[DRAW.choice("abcde") for _ in range(DRAW.randint(4, 9))] for _ in range(25)]


@pytest.mark.parametrize("order", [1, 2, 3])
def test_self_bleu_is_torchmetrics_of_each_against_the_others(order: int) -> None:
    bleu = pytest.importorskip("torchmetrics.functional.text").bleu_score
    said = [" ".join(text) for text in TEXTS]
    each = [float(bleu([text], [said[:i] + said[i + 1 :]], n_gram=order)) for i, text in enumerate(said)]
    assert 0.2 < sum(each) / len(each) < 1 and (order < 3 or min(each) < 1)
    assert self_bleu(TEXTS, order) == pytest.approx(sum(each) / len(each), rel=1e-5)


def test_self_bleu_counts_an_ngram_as_often_as_one_other_has_it() -> None:
    assert self_bleu([["a", "a", "a", "a"], ["a", "b"], ["a", "c", "a"]], 1) == pytest.approx(
        (2 / 4 + 1 / 2 * 2.718281828459045 ** (1 - 3 / 2) + 2 / 3) / 3
    )
    assert self_bleu([["a", "b", "c"]] * 4) == pytest.approx(1)
    assert self_bleu([["a", "b", "c"], ["d", "e", "f"]]) == 0
    assert self_bleu([["a", "b"], ["a", "b"]], 3) == 0
    with pytest.raises(ValueError, match="1 texts; expected two"):
        self_bleu(TEXTS[:1])


def test_distinct_and_copies_are_those_of_a_search() -> None:
    pairs = [(u, v) for text in TEXTS for u, v in itertools.pairwise(text)]
    unlike = sum(pair not in pairs[:i] for i, pair in enumerate(pairs))
    assert distinct_ngrams(TEXTS, 2) == unlike / len(pairs)
    assert share_of_copies(TEXTS, [tuple(text) for text in TEXTS[5:15]]) == sum(t in TEXTS[5:15] for t in TEXTS) / 25
    with pytest.raises(ValueError, match="no text has 2 units"):
        distinct_ngrams([["a"]], 2)
    with pytest.raises(ValueError, match="not one text"):
        share_of_copies([], TEXTS)
