"""Objectives against loops that spell out the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from contracts import NUM_CLASSES, OBJECTIVES, rand
from sparring.objectives import Objective, Targeted, cross_entropy, kl, margin, targeted
from sparring.types import take

LOGITS = 8 * rand(5, NUM_CLASSES, seed=1) - 4
LABELS = torch.tensor([2, 0, 3, 1, 1])
PROBABILITIES = rand(5, NUM_CLASSES, seed=2) ** 3
PROBABILITIES = PROBABILITIES / PROBABILITIES.sum(1, keepdim=True)


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = top + math.log(sum(math.exp(v - top) for v in row))
    return [v - total for v in row]


def naive_cross_entropy(row: list[float], p: list[float]) -> float:
    return -sum(a * b for a, b in zip(p, log_softmax(row), strict=True))


def naive_margin(row: list[float], p: list[float]) -> float:
    own = p.index(max(p))
    return max(v for k, v in enumerate(row) if k != own) - row[own]


def naive_kl(row: list[float], p: list[float]) -> float:
    return sum(a * (math.log(a) - b) for a, b in zip(p, log_softmax(row), strict=True) if a > 0)


NAIVE = {"ce": naive_cross_entropy, "margin": naive_margin, "kl": naive_kl}


def as_rows(target: Tensor) -> list[list[float]]:
    if target.ndim == 1:
        target = torch.nn.functional.one_hot(target, NUM_CLASSES).double()
    return target.tolist()


@pytest.mark.parametrize("target", [LABELS, PROBABILITIES], ids=["labels", "probabilities"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_score_and_reached(name: str, target: Tensor) -> None:
    rows = list(zip(LOGITS.tolist(), as_rows(target), strict=True))
    want = torch.tensor([NAIVE[name](row, p) for row, p in rows], dtype=torch.float64)
    torch.testing.assert_close(OBJECTIVES[name].score(LOGITS, target), want, rtol=1e-12, atol=1e-12)
    lost = [row.index(max(row)) != p.index(max(p)) for row, p in rows]
    assert OBJECTIVES[name].reached(LOGITS, target).tolist() == lost
    assert any(lost) and not all(lost)


def test_margin_is_positive_exactly_when_the_label_is_lost() -> None:
    assert torch.equal(margin.score(LOGITS, LABELS) > 0, margin.reached(LOGITS, LABELS))


def test_kl_equals_torch_distributions() -> None:
    p, q = (torch.distributions.Categorical(**kind) for kind in ({"probs": PROBABILITIES}, {"logits": LOGITS}))
    torch.testing.assert_close(
        kl.score(LOGITS, PROBABILITIES), torch.distributions.kl_divergence(p, q), rtol=1e-10, atol=0
    )
    assert torch.allclose(kl.score(LOGITS, LOGITS.softmax(1)), torch.zeros(5).double(), atol=1e-14)
    torch.testing.assert_close(kl.score(LOGITS, LABELS), cross_entropy.score(LOGITS, LABELS))


@pytest.mark.parametrize("name", ["ce", "kl"])
def test_certain_targets_and_extreme_logits_stay_finite(name: str) -> None:
    one_hot = torch.nn.functional.one_hot(LABELS, NUM_CLASSES).double()
    for scale in (1.0, 1e3, 1e30):
        logits = (LOGITS * scale).requires_grad_()
        score = OBJECTIVES[name].score(logits, one_hot)
        (grad,) = torch.autograd.grad(score.sum(), logits)
        assert bool(score.isfinite().all())
        assert bool(grad.isfinite().all())
        torch.testing.assert_close(score, cross_entropy.score(logits, LABELS), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("target", [LABELS, PROBABILITIES], ids=["labels", "probabilities"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients(name: str, target: Tensor) -> None:
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: OBJECTIVES[name].score(v, target), (logits,))
    goal = targeted(OBJECTIVES[name], LABELS.flip(0))
    assert torch.autograd.gradcheck(lambda v: goal.score(v, target), (logits,))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_targeted_turns_the_sign_and_forgets_the_label(name: str) -> None:
    wanted = torch.tensor([1, 1, 0, 3, 2])
    goal = targeted(OBJECTIVES[name], wanted)
    assert isinstance(goal, Targeted)
    torch.testing.assert_close(goal.score(LOGITS, LABELS), -OBJECTIVES[name].score(LOGITS, wanted))
    torch.testing.assert_close(goal.score(LOGITS, LABELS), goal.score(LOGITS, PROBABILITIES))
    closer = LOGITS + 2 * torch.nn.functional.one_hot(wanted, NUM_CLASSES)
    assert bool((goal.score(closer, LABELS) > goal.score(LOGITS, LABELS)).all()), "towards the wanted class is up"
    assert torch.equal(goal.reached(LOGITS, LABELS), LOGITS.argmax(1) == wanted)
    one = targeted(OBJECTIVES[name], 1)
    torch.testing.assert_close(one.score(LOGITS, LABELS), -OBJECTIVES[name].score(LOGITS, torch.ones(5).long()))


def test_take() -> None:
    order = torch.tensor([3, 0])
    goal, one = targeted(margin, LABELS.flip(0)), targeted(margin, 1)
    assert torch.equal(take(goal, order).score(LOGITS[order], LABELS[order]), goal.score(LOGITS, LABELS)[order])
    assert take(one, order) is one
    assert take(margin, order) is margin


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row_stands_alone(name: str) -> None:
    objective: Objective = OBJECTIVES[name]
    for i in range(5):
        alone = objective.score(LOGITS[i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close(alone[0], objective.score(LOGITS, LABELS)[i])
