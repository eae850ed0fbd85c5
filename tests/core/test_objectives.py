"""Objectives against loops that spell out the definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from contracts import NUM_CLASSES, OBJECTIVES, rand
from sparring.core.objectives import Objective, Targeted, TargetedDLR, cross_entropy, dlr, kl, margin, targeted
from sparring.core.types import take

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


def naive_dlr(row: list[float], p: list[float]) -> float:
    """Croce and Hein 2020, eq. 6: -(z_y - max_{i != y} z_i) / (z_pi1 - z_pi3); their code adds 1e-12 below."""
    ranked = sorted(row, reverse=True)
    return naive_margin(row, p) / (ranked[0] - ranked[2] + 1e-12)


NAIVE = {"ce": naive_cross_entropy, "margin": naive_margin, "dlr": naive_dlr, "kl": naive_kl}


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


# The difference of logits ratio ------------------------------------------------------------------------------------


def wide(num_classes: int, num: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and other classes, which are wanted; labels and wanted classes of every rank."""
    logits = 8 * rand(num, num_classes, seed=num_classes) - 4
    labels = torch.arange(num) % num_classes
    return logits, labels, (labels + 1 + torch.arange(num) % (num_classes - 1)) % num_classes


def naive_targeted_dlr(row: list[float], label: int, wanted: int) -> float:
    """Croce and Hein 2020, eq. 7: -(z_y - z_t) / (z_pi1 - (z_pi3 + z_pi4) / 2); fewer classes as the docstring says."""
    ranked = sorted(row, reverse=True)
    spread = 1 if len(row) < 4 else ranked[0] - sum(ranked[2:4]) / 2
    return (row[wanted] - row[label]) / spread


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
def test_dlr_and_targeted_dlr_by_hand(num_classes: int) -> None:
    logits, labels, wanted = wide(num_classes)
    rows = list(zip(logits.tolist(), labels.tolist(), wanted.tolist(), strict=True))
    one_hot = torch.nn.functional.one_hot(labels, num_classes).double()
    naive = naive_margin if num_classes == 2 else naive_dlr
    want = torch.tensor([naive(row, p) for (row, _, _), p in zip(rows, one_hot.tolist(), strict=True)]).double()
    torch.testing.assert_close(dlr.score(logits, labels), want, rtol=1e-6, atol=0)
    torch.testing.assert_close(dlr.score(logits, one_hot), dlr.score(logits, labels))
    goal = TargetedDLR(wanted)
    towards = torch.tensor([naive_targeted_dlr(*row) for row in rows]).double()
    torch.testing.assert_close(goal.score(logits, labels), towards, rtol=1e-6, atol=0)
    for objective in (dlr, goal):
        assert torch.equal(objective.reached(logits, labels), logits.argmax(1) != labels), "any wrong class will do"


@pytest.mark.parametrize("num_classes", [3, 4, 10])
def test_dlr_sees_neither_shift_nor_scale(num_classes: int) -> None:
    logits, labels, wanted = wide(num_classes)
    for objective in (dlr, TargetedDLR(wanted))[: 1 if num_classes < 4 else 2]:
        score = objective.score(logits, labels)
        for scale, shift in ((1e-3, 0.0), (1e4, 0.0), (1.0, 1e3), (50.0, -7.0)):
            torch.testing.assert_close(objective.score(scale * logits + shift, labels), score, rtol=1e-8, atol=1e-9)
        assert not torch.allclose(cross_entropy.score(50 * logits, labels), cross_entropy.score(logits, labels))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(margin.score(50 * logits, labels), margin.score(logits, labels))


def test_dlr_of_two_classes_is_the_margin() -> None:
    logits, labels, wanted = wide(2)
    assert torch.equal(dlr.score(logits, labels), margin.score(logits, labels))
    torch.testing.assert_close(TargetedDLR(wanted).score(logits, labels), margin.score(logits, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
def test_tied_logits_have_finite_scores_and_gradients(num_classes: int, dtype: torch.dtype) -> None:
    """All the same, the largest tied, the third tied with the first."""
    rows = torch.zeros(4, num_classes, dtype=dtype)
    rows[1, :2], rows[2, -2:], rows[3] = 3, 3, 1e3
    labels, wanted = torch.tensor([0, 1, 0, 1]), torch.tensor([1, 0, num_classes - 1, 0])
    for objective in (dlr, TargetedDLR(wanted), targeted(dlr, wanted)):
        logits = rows.clone().requires_grad_()
        score = objective.score(logits, labels)
        (grad,) = torch.autograd.grad(score.sum(), logits)
        assert bool(score.isfinite().all()) and bool(grad.isfinite().all())
        assert score.dtype == dtype
        assert float(score[0].detach()) == 0 and bool((grad[0] != 0).any())


@pytest.mark.parametrize("num_classes", [2, 3, 4, 10])
def test_gradients_of_targeted_dlr(num_classes: int) -> None:
    logits, labels, wanted = wide(num_classes)
    assert torch.autograd.gradcheck(lambda v: TargetedDLR(wanted).score(v, labels), (logits.requires_grad_(),))


def test_targeted_dlr_for_some_of_the_examples() -> None:
    logits, labels, wanted = wide(10)
    rows = torch.tensor([5, 0, 3])
    part = take(TargetedDLR(wanted), rows)
    assert torch.equal(part.wanted, wanted[rows])
    torch.testing.assert_close(part.score(logits[rows], labels[rows]), TargetedDLR(wanted).score(logits, labels)[rows])


def test_take() -> None:
    order = torch.tensor([3, 0])
    goal, one = targeted(margin, LABELS.flip(0)), targeted(margin, 1)
    torch.testing.assert_close(
        take(goal, order).score(LOGITS[order], LABELS[order]), goal.score(LOGITS, LABELS)[order], rtol=1e-6, atol=1e-6
    )
    assert take(one, order) is one
    assert take(margin, order) is margin


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_row_stands_alone(name: str) -> None:
    objective: Objective = OBJECTIVES[name]
    for i in range(5):
        alone = objective.score(LOGITS[i : i + 1], LABELS[i : i + 1])
        torch.testing.assert_close(alone[0], objective.score(LOGITS, LABELS)[i])
