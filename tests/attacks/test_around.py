"""Attacks made of attacks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts import NUM_CLASSES, NUM_WORDS, SHAPE, BagOfWords, rand, seeded, sentences, stream, words
from sparring.attacks.around import EachTarget, Restarts, SmoothBackward, part_of, seeking
from sparring.attacks.auto_pgd import ShrinkingRadius, apgd_t
from sparring.attacks.catalogue import pgd
from sparring.attacks.square import square
from sparring.core.noise import Noise
from sparring.core.objectives import TargetedDLR, cross_entropy, margin, targeted
from sparring.core.types import AttackResult, Cost, take
from sparring.threats import L1, L2, Linf

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


# Each target --------------------------------------------------------------------------------------------------------


BALL = Linf(0.1, low=None, high=None)


@dataclass(frozen=True)
class Script:
    """An attack that notes what it is asked for: example (x[:, 0] holds its number), wanted class, noise. It reaches
    its goal for the pairs (example, class) it is told; the loss is the class."""

    objective: Any = None
    threat: Any = BALL
    falls: frozenset[tuple[int, int]] = frozenset()
    asked: list[list[tuple[int, int]]] = field(default_factory=list)
    noises: list[Any] = field(default_factory=list)

    def __call__(self, model: Any, x: Tensor, target: Tensor, *, noise: Any = None) -> AttackResult:
        numbers, wanted = x[:, 0].long().tolist(), self.objective.wanted.tolist()
        pairs = list(zip(numbers, wanted, strict=True))
        self.asked.append(pairs)
        self.noises.append(noise)
        mark = x + 100.0 * torch.tensor(wanted)[:, None]
        return AttackResult(
            mark, mark, mark[:, 0], torch.tensor([float(k) for k in wanted]),
            torch.tensor([pair in self.falls for pair in pairs], dtype=torch.bool), Cost(len(x), 2 * len(x)),
        )  # fmt: skip


# x (B, 1 + K): the example's number, and its logits
LOGIT_ROWS = torch.tensor([[5.0, 9.0, 7.0, 1.0, 3.0], [1.0, 2.0, 3.0, 4.0, 9.0], [5.0, 1.0, 2.0, 8.0, 3.0]])
NUMBERED = torch.cat([torch.arange(3.0)[:, None], LOGIT_ROWS], 1)
OWN = torch.tensor([1, 4, 0])  # the third is not the prediction
ORDER = [[2, 0, 4, 3], [3, 2, 1, 0], [3, 4, 2, 1]]  # the wrong classes by falling logit


def logits_in_x(x: Tensor) -> Tensor:
    return x[:, 1:]


def told(script: Script) -> Script:
    """As it is before `seeking` gives it an objective; both note in the same lists."""
    return replace(script, objective="to be replaced")


@pytest.mark.parametrize("num", [1, 2, 4, 9])
def test_targets_come_in_the_order_of_their_logits(num: int) -> None:
    script = told(Script())
    result = EachTarget(script, num)(logits_in_x, NUMBERED, OWN, noise=stream(3))
    want = [[(i, ORDER[i][place]) for i in range(3)] for place in range(min(num, 4))]
    assert script.asked == want
    assert result.cost == Cost(3 + 3 * len(want), 6 * len(want)), "and one look at the clean inputs"
    best = [max(ORDER[i][: len(want)]) for i in range(3)]
    assert result.loss.tolist() == best  # type: ignore[union-attr]
    assert result.size.tolist() == [100 * k + i for i, k in enumerate(best)]
    keys = [noise.keys for noise in script.noises]
    assert all(torch.equal(k, stream(3).restart(n).keys) for n, k in enumerate(keys)), "a stream for each target"


@pytest.mark.parametrize(("kind", "dual"), [(Linf, 1), (L2, 2), (L1, math.inf)])
def test_nearest_targets_come_by_their_linearised_distance(kind: Any, dual: float) -> None:
    """On a linear model with 12 classes that is the exact distance; only the nine likeliest are looked at."""
    weight, bias = rand(12, 6, seed=1) * torch.linspace(0.2, 5, 12)[:, None], rand(12, seed=2)
    x = rand(4, 6, seed=3)
    logits = x @ weight.T + bias
    y = logits.argmax(1)
    asked: list[list[int]] = []

    def goal(wanted: Tensor) -> Any:
        asked.append(wanted.tolist())
        return TargetedDLR(wanted)

    attack = EachTarget(pgd(kind(1e-9), num_steps=1), 3, goal, nearest=True)
    result, moved = attack(lambda v: v @ weight.T + bias, x, y), 0
    for row, own in enumerate(y.tolist()):
        others = sorted((k for k in range(12) if k != own), key=lambda k: -float(logits[row, k]))[:9]
        slopes = torch.linalg.vector_norm(weight[own] - weight, ord=dual, dim=1)
        distance = (logits[row, own] - logits[row]) / slopes
        want = sorted(others, key=lambda k: float(distance[k]))
        assert [classes[row] for classes in asked] == want[:3]
        moved += want[:3] != others[:3]
    assert moved, "or the test says nothing"
    assert result.cost == Cost(4 + 3 * 8, 9 * 4 + 3 * 4)


def test_nearest_targets_need_a_gradient() -> None:
    with pytest.raises(ValueError, match="no gradient reaches the input"):
        EachTarget(pgd(Linf(0.1)), nearest=True)(lambda v: v.detach()[:, :4, 0, 0], rand(5, 4, 2, 2), LABELS)


def test_only_what_stands_is_attacked_again() -> None:
    script = told(Script(falls=frozenset({(0, 2), (1, 2), (2, 1)})))
    result = EachTarget(script)(logits_in_x, NUMBERED, OWN)
    assert script.asked == [[(0, 2), (1, 3), (2, 3)], [(1, 2), (2, 4)], [(2, 2)], [(2, 1)]]
    assert result.cost == Cost(3 + 7, 14)
    assert result.reached.tolist() == [True, True, True]  # type: ignore[union-attr]
    assert result.loss.tolist() == [2.0, 2.0, 1.0], "what fell stays, whatever its loss"  # type: ignore[union-attr]
    fast = told(Script(falls=frozenset({(i, ORDER[i][0]) for i in range(3)})))
    assert EachTarget(fast)(logits_in_x, NUMBERED, OWN).cost == Cost(6, 6)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_few_classes_have_few_targets(num_classes: int) -> None:
    script = told(Script())
    x = NUMBERED[:, : 1 + num_classes]
    EachTarget(script, 9)(logits_in_x, x, torch.zeros(3).long())
    assert [sorted(k for _, k in asked) for asked in script.asked] == {2: [[1] * 3], 3: [[1, 2, 2], [1, 1, 2]]}[
        num_classes
    ]


def test_ties_go_to_the_class_that_comes_first() -> None:
    script = told(Script())
    EachTarget(script, 2)(logits_in_x, torch.cat([NUMBERED[:, :1], torch.ones(3, 40)], 1), torch.tensor([0, 1, 39]))
    assert script.asked == [[(0, 1), (1, 0), (2, 0)], [(0, 2), (1, 2), (2, 1)]]


def test_other_goals() -> None:
    """The goal is made from the wanted classes; here: be taken for that class and no other."""
    script = told(Script())

    def goal(wanted: Tensor) -> Any:
        return targeted(margin, wanted)

    EachTarget(script, 2, goal)(logits_in_x, NUMBERED, OWN)
    assert [[k for _, k in asked] for asked in script.asked] == [[ORDER[i][n] for i in range(3)] for n in range(2)]


@pytest.mark.parametrize("threat", [Linf(0.03), L2(torch.tensor([0.05, 0.3, 0.1, 0.2, 0.4], dtype=torch.float64))])
def test_each_target_equals_runs_merged_by_hand(network: nn.Module, threat: Any) -> None:
    noise, single = stream(5), pgd(threat, num_steps=4)
    y = network(X).argmax(1)
    result = EachTarget(single)(network, X, y, noise=noise)
    order = network(X).argsort(1, descending=True)[:, 1:]
    runs = [
        replace(single, objective=TargetedDLR(order[:, n]))(network, X, y, noise=noise.restart(n))  # type: ignore[type-var]
        for n in range(NUM_CLASSES - 1)
    ]
    cost = 5
    for i in range(5):
        fell = next((n for n, run in enumerate(runs) if run.reached[i]), None)
        cost += 5 * (len(runs) if fell is None else fell + 1)
        best = fell if fell is not None else max(range(len(runs)), key=lambda n: runs[n].loss[i])
        for name in FIELDS:
            torch.testing.assert_close(getattr(result, name)[i], getattr(runs[best], name)[i], rtol=1e-9, atol=1e-12)
    assert result.cost.forwards == cost
    assert bool(result.reached.any()) and not bool(result.reached.all())  # type: ignore[union-attr]


def test_targets_alone_and_together_in_any_mode_of_autograd(network: nn.Module) -> None:
    radii = torch.tensor([0.02, 0.1, 0.03, 0.04, 0.05], dtype=torch.float64)
    attack = EachTarget(Restarts(pgd(Linf(radii), num_steps=3), 2), 2)
    whole = attack(network, X, LABELS, noise=stream(5))
    for rows in (torch.tensor([4, 1]), torch.arange(0), *torch.arange(5).split(1)):
        part = take(attack, rows)(network, X[rows], LABELS[rows], noise=stream(5).take(rows))
        for name in FIELDS:
            torch.testing.assert_close(getattr(part, name), getattr(whole, name)[rows], rtol=1e-9, atol=1e-12)
    soft = nn.functional.one_hot(LABELS, NUM_CLASSES).double()
    torch.testing.assert_close(attack(network, X, soft, noise=stream(5)).z, whole.z)
    for context in (torch.no_grad, torch.inference_mode):
        with context():  # fixed: the order was an inference tensor there, which autograd cannot save
            inside = attack(network, X.clone(), LABELS.clone(), noise=Noise.make(0, "test", torch.arange(5)))
        torch.testing.assert_close(inside.z, whole.z)


@pytest.mark.parametrize("nearest", [False, True])
def test_targets_of_words(nearest: bool) -> None:
    model, x, y = seeded(lambda: BagOfWords(NUM_WORDS, NUM_CLASSES)), sentences(), torch.tensor([2, 0, 3])
    result = EachTarget(pgd(words(), num_steps=3), nearest=nearest)(model, x, y, noise=stream(3))
    assert result.x_adv["ids"].dtype == torch.int64  # type: ignore[call-overload]
    torch.testing.assert_close(model(result.x_adv).argmax(1) != y, result.reached)


def test_targets_leave_the_model_as_found(stateful: nn.Module, snapshot: Any) -> None:
    before = snapshot(stateful)
    EachTarget(pgd(Linf(0.1), num_steps=2))(stateful, X, LABELS)
    assert snapshot(stateful) == before
    with pytest.raises(ValueError, match="labels go from"):
        EachTarget(pgd(Linf(0.1), num_steps=2))(stateful, X, LABELS + 90)
    assert snapshot(stateful) == before


def test_errors_of_targets(network: nn.Module) -> None:
    with pytest.raises(ValueError, match="targets must be at least 1; got 0"):
        EachTarget(pgd(Linf(0.1)), 0)
    with pytest.raises(TypeError, match="targets are sought through the objective, and a Square has none"):
        EachTarget(square(Linf(0.1)))
    with pytest.raises(ValueError, match=r"targets keep the worst result and so need its loss.*keep=.last"):
        EachTarget(pgd(Linf(0.1), num_steps=1, keep="last"))(network, X, LABELS)
    with pytest.raises(ValueError, match=r"returned shape \(5, 4, 1\) for 5 examples; an attack needs logits \(B, K\)"):
        EachTarget(pgd(Linf(0.1)))(lambda v: network(v)[..., None], X, LABELS)


# Parts of attacks made of attacks ------------------------------------------------------------------------------------


def test_parts_are_found_and_exchanged_however_deep() -> None:
    deep = Restarts(SmoothBackward(ShrinkingRadius(pgd(L1(2.0), num_steps=3))), 2)  # type: ignore[arg-type]
    assert part_of(deep, "objective") is cross_entropy
    assert part_of(deep, "threat") == L1(2.0)
    assert part_of(deep, "slope") == 10.0 and part_of(deep, "num") == 2
    assert part_of(deep, "nothing") is None and part_of(lambda: 0, "threat") is None
    other = seeking(deep, margin)
    assert part_of(other, "objective") is margin and part_of(deep, "objective") is cross_entropy
    assert seeking(other, cross_entropy) == deep


# Some of the examples, errors ----------------------------------------------------------------------------------------


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


def test_three_classes_of_a_linear_network_fall_wherever_they_can() -> None:
    """Exact: towards each class every coordinate goes to its worse end of ball and box."""
    layer, x, radius = seeded(lambda: nn.Linear(8, 3)).double(), rand(200, 8, seed=5), 0.15
    with torch.no_grad():
        layer.weight.mul_(4)
        layer.bias.copy_(-layer.weight.sum(1) / 2)  # so that every class is somebody's
    weight, low, high = layer.weight.detach(), (x - radius).clamp(0, 1), (x + radius).clamp(0, 1)
    y, rows = layer(x).argmax(1), torch.arange(200)
    worst = [layer(torch.where(weight[k] > weight[y], high, low)).detach() for k in range(3)]
    gaps = torch.stack([out[:, k] - out[rows, y] for k, out in enumerate(worst)], 1)
    breakable = gaps.masked_fill(torch.nn.functional.one_hot(y, 3).bool(), -1).amax(1) > 1e-4
    reached = apgd_t(Linf(radius), num_steps=20)(layer, x, y).reached
    assert bool(breakable.any()) and not bool((breakable & ~reached).any())  # type: ignore[operator]
