"""Attacks made of attacks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts import NUM_CLASSES, NUM_WORDS, SHAPE, BagOfWords, rand, seeded, sentences, stream, words
from sparring.attacks.catalogue import pgd
from sparring.attacks.combine import Restarts
from sparring.objectives import margin
from sparring.threats import L2, Linf
from sparring.types import AttackResult, Cost, take

X, LABELS = rand(5, *SHAPE[1:], seed=2), torch.tensor([2, 0, 3, 1, 1])
FIELDS = ("x_adv", "z", "size", "loss", "reached")


def scripted(losses: list[list[float]], reached: list[list[bool]]) -> Any:
    """An attack that finds what it is told: row r of the tables is run r; x_adv tells run and example."""

    class Script:
        def __init__(self) -> None:
            self.asked: list[list[int]] = []

        def __call__(self, model: Any, x: Tensor, target: Tensor, *, noise: Any = None) -> AttackResult:
            run, rows = len(self.asked), x[:, 0].long().tolist()
            self.asked.append(rows)
            mark = 100.0 * run + x
            return AttackResult(
                mark, mark, mark[:, 0], torch.tensor([losses[run][i] for i in rows]),
                torch.tensor([reached[run][i] for i in rows]), Cost(len(rows), 2 * len(rows)),
            )  # fmt: skip

    return Script()


def test_the_worst_is_kept_and_not_the_last() -> None:
    script = scripted(
        [[5.0, 1.0, 1.0, 9.0], [1.0, 7.0, 2.0, 0.0], [2.0, 3.0, 1.5, 0.0]],
        [[False, False, False, True], [False, False, True, False], [False, False, False, False]],
    )
    x = torch.arange(4.0)[:, None]
    result = Restarts(script, 3)(lambda v: v, x, torch.zeros(4, dtype=torch.int64))
    assert script.asked == [[0, 1, 2, 3], [0, 1, 2], [0, 1]], "what has fallen is not attacked again"
    assert result.loss.tolist() == [5.0, 7.0, 2.0, 9.0]  # type: ignore[union-attr]
    assert result.reached.tolist() == [False, False, True, True]  # type: ignore[union-attr]
    assert result.x_adv[:, 0].tolist() == [0.0, 101.0, 102.0, 3.0]  # type: ignore[index,call-overload]
    assert result.size.tolist() == [0.0, 101.0, 102.0, 3.0]
    assert result.cost == Cost(9, 18)


def test_a_success_with_a_lower_loss_beats_a_failure() -> None:
    script = scripted([[5.0], [1.0]], [[False], [True]])
    result = Restarts(script, 2)(lambda v: v, torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))
    assert result.reached.tolist() == [True]  # type: ignore[union-attr]
    assert result.loss.tolist() == [1.0]  # type: ignore[union-attr]


def test_not_a_number_is_never_the_worst() -> None:
    nan = float("nan")
    script = scripted([[nan, 1.0], [2.0, nan]], [[False, False], [False, False]])
    result = Restarts(script, 2)(lambda v: v, torch.arange(2.0)[:, None], torch.zeros(2, dtype=torch.int64))
    assert result.loss.tolist() == [2.0, 1.0]  # type: ignore[union-attr]


@pytest.mark.parametrize("threat", [Linf(0.03), L2(torch.tensor([0.05, 0.3, 0.1, 0.2, 0.4], dtype=torch.float64))])
def test_restarts_equal_runs_merged_by_hand(network: nn.Module, threat: Any) -> None:
    noise, single = stream(5), pgd(threat, num_steps=2)
    result = pgd(threat, num_steps=2, restarts=4)(network, X, LABELS, noise=noise)
    runs = [single(network, X, LABELS, noise=noise.restart(r)) for r in range(4)]
    cost = 0
    for i in range(5):
        fell = next((r for r, run in enumerate(runs) if run.reached[i]), None)  # type: ignore[index]
        cost += 3 * (4 if fell is None else fell + 1)
        best = fell if fell is not None else max(range(4), key=lambda r: runs[r].loss[i])  # type: ignore[index,return-value]
        for name in FIELDS:
            torch.testing.assert_close(getattr(result, name)[i], getattr(runs[best], name)[i], rtol=1e-9, atol=1e-12)
    assert result.cost.forwards == cost
    assert bool(result.reached.any())  # type: ignore[union-attr]
    assert not bool(result.reached.all()), "both ways of keeping must be seen here"  # type: ignore[union-attr]


def test_restarts_of_restarts_and_of_plain_functions(network: nn.Module) -> None:
    once = pgd(Linf(0.02), num_steps=1)
    nested = Restarts(Restarts(once, 2), 2)(network, X, LABELS, noise=stream(5))
    assert bool((nested.loss >= Restarts(once, 2)(network, X, LABELS, noise=stream(5)).loss).all())  # type: ignore[operator]

    def plain(model: Any, x: Any, target: Tensor, *, noise: Any = None) -> AttackResult:
        return once(model, x, target, noise=noise)

    want = Restarts(once, 3)(network, X, LABELS, noise=stream(5))
    torch.testing.assert_close(Restarts(plain, 3)(network, X, LABELS, noise=stream(5)).x_adv, want.x_adv)


def test_restarts_of_words() -> None:
    model, x, y = seeded(lambda: BagOfWords(NUM_WORDS, NUM_CLASSES)), sentences(), torch.tensor([2, 0, 3])
    noise, threat = stream(3), words(torch.tensor([1.0, 2.0, 1.0]))
    result = pgd(threat, num_steps=1, restarts=4, objective=margin)(model, x, y, noise=noise)
    runs = [pgd(threat, num_steps=1, objective=margin)(model, x, y, noise=noise.restart(r)) for r in range(4)]
    for i in range(3):
        fell = [r for r, run in enumerate(runs) if run.reached[i]]  # type: ignore[index]
        best = fell[0] if fell else max(range(4), key=lambda r: runs[r].loss[i])  # type: ignore[index,return-value]
        assert torch.equal(result.x_adv["ids"][i], runs[best].x_adv["ids"][i])  # type: ignore[call-overload]
    assert result.x_adv["ids"].dtype == torch.int64  # type: ignore[call-overload]
    assert result.x_adv["mask"].dtype == torch.bool  # type: ignore[call-overload]


def test_take(network: nn.Module) -> None:
    rows = torch.tensor([4, 1])
    threat = Linf(torch.tensor([0.05, 0.3, 0.1, 0.2, 0.4], dtype=torch.float64))
    attack = pgd(threat, num_steps=2, restarts=2, wanted=torch.tensor([0, 1, 2, 3, 0]))
    whole = attack(network, X, LABELS, noise=stream(5))
    part = take(attack, rows)(network, X[rows], LABELS[rows], noise=stream(5).take(rows))
    torch.testing.assert_close(part.x_adv, whole.x_adv[rows])  # type: ignore[index,call-overload]


def test_errors(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="restarts must be at least 1; got 0"):
        Restarts(pgd(Linf(0.1)), 0)
    with pytest.raises(ValueError, match=r"restarts keep the worst result and so need its loss.*keep=.last"):
        pgd(Linf(0.1), num_steps=1, restarts=2, keep="last")(network, X, LABELS)
