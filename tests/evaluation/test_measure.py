"""The verdict: exact where it is known, the same in any batching, and nothing counts that does not hold."""

from __future__ import annotations

import csv
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from alike import check_same
from contracts import BALLS, NUM_CLASSES, NUM_WORDS, SHAPE, BagOfWords, rand, seeded, words
from sparring.attacks.around import Restarts
from sparring.attacks.catalogue import bim, fgsm, gradient_ascent, pgd
from sparring.attacks.loop import Attack
from sparring.attacks.plans import make_plan
from sparring.attacks.starts import null
from sparring.attacks.steps import Ascent
from sparring.core.model_state import attack_mode
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import AttackResult, Cost
from sparring.evaluation.all_batches import Progress
from sparring.evaluation.as_results import as_results
from sparring.evaluation.measure import CURVE, Evaluation, measure
from sparring.evaluation.one_batch import REJECTIONS
from sparring.evaluation.preflight import PreflightError, preflight
from sparring.results.read import read_evaluation
from sparring.results.schema import Results, Row
from sparring.results.statistics import wilson
from sparring.results.write import write_evaluation
from sparring.threats import L2, Linf

NUM, DIM = 40, 11
DUAL = {"Linf": 1, "L2": 2}


class Lines(nn.Module):
    """Two classes, logits (0, w x + b): how far an example is from the line is known."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(2 * rand(DIM, seed=21) - 1)
        self.b = nn.Parameter(torch.tensor(0.1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        score = x @ self.w + self.b
        return torch.stack([0 * score, score], 1)


MODEL = Lines().eval()
X = 2 * rand(NUM, DIM, seed=22) - 1
with torch.no_grad():
    SCORE = MODEL(X)[:, 1]
Y = (SCORE > 0).long()
Y[::9] = 1 - Y[::9]  # some are wrong from the start
CORRECT = (SCORE > 0).long() == Y


def distance(kind: str) -> Tensor:
    """(N,) how far each example is from the line."""
    return SCORE.abs() / MODEL.w.detach().norm(p=DUAL[kind])


def cut(x: Any, y: Tensor, size: int) -> list[tuple[Any, Tensor]]:
    """Batches of that size."""
    parts = [slice(i, i + size) for i in range(0, len(y), size)]
    return [({k: v[part] for k, v in x.items()} if isinstance(x, Mapping) else x[part], y[part]) for part in parts]


def free(kind: str, radius: Any, **options: Any) -> Any:
    return BALLS[kind](radius, **{"low": None, "high": None, **options})


def between(kind: str, rank: int) -> float:
    """A radius half way between two distances, so that no example lies on the edge."""
    sorted_distances = distance(kind).sort().values
    return float(sorted_distances[rank - 1 : rank + 1].mean())


def same(a: Evaluation, b: Evaluation) -> None:
    """The same verdicts, example by example."""
    assert set(a.table) == set(b.table)
    for name, column in a.table.items():
        torch.testing.assert_close(column, b.table[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert (a.clean, a.robust, a.curve) == (b.clean, b.robust, b.curve)


CURVED_X = rand(NUM, DIM, seed=3)


def curved(num_classes: int = 3) -> nn.Module:
    layers = nn.Linear(DIM, 9), nn.Tanh(), nn.Linear(9, num_classes)
    model = nn.Sequential(*layers).double().eval()
    with torch.no_grad():  # so that its classes share the examples
        layers[2].bias -= model(CURVED_X).median(0).values
    return model


# Closed forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 12, 25, 39])
@pytest.mark.parametrize("kind", DUAL)
@pytest.mark.parametrize("make", [pgd, fgsm, bim])
def test_robust_accuracy_of_a_line(make: Any, kind: str, rank: int) -> None:
    radius = between(kind, rank)
    found = measure(MODEL, cut(X, Y, 7), free(kind, radius), [make], curve=())
    robust = CORRECT & (distance(kind) > radius)
    assert torch.equal(found.table["correct"], CORRECT) and torch.equal(found.table["robust"], robust)
    assert found.clean == wilson(int(CORRECT.sum()), NUM) and found.robust == wilson(int(robust.sum()), NUM)
    assert found.attack_success == wilson(int((CORRECT & ~robust).sum()), int(CORRECT.sum()), higher_is_better=False)
    fell = CORRECT & ~robust
    assert torch.equal(found.table["broken_by"], torch.where(fell, 0, -1))
    assert torch.equal(found.table["adversarial_prediction"][fell], 1 - Y[fell])
    size = found.table["size"]
    assert bool((size[fell] >= distance(kind)[fell] - 1e-9).all() and (size <= radius + 1e-6).all())
    assert bool((size[~fell] == 0).all())
    assert found.curve == [] and found.findings == []
    for row in found.per_class:
        own = row["label"] == Y
        assert row["n"] == int(own.sum()) and row["robust"] == pytest.approx(robust[own].float().mean().item())


@pytest.mark.parametrize("kind", DUAL)
@pytest.mark.parametrize("size", [7, NUM])
def test_the_curve_equals_each_radius_by_itself(kind: str, size: int) -> None:
    radius = between(kind, 18)
    found = measure(MODEL, cut(X, Y, size), free(kind, radius), [fgsm, pgd])
    assert [r for r, _ in found.curve] == pytest.approx([0.0, *(f * radius for f in CURVE)])
    counts = [share.count for _, share in found.curve]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) > 4
    assert counts[0] == found.clean.count and counts[CURVE.index(1.0) + 1] == found.robust.count
    for factor, count in zip(CURVE, counts[1:], strict=True):
        alone = measure(MODEL, cut(X, Y, size), free(kind, factor * radius), [fgsm, pgd], curve=())
        exact = int((CORRECT & (distance(kind) > factor * radius)).sum())
        assert alone.robust.count == exact == count, f"at {factor} times the radius"
    assert found.curve_attacks == ["fgsm", "pgd"]


def test_the_curve_has_its_own_attacks() -> None:
    found = measure(MODEL, [(X, Y)], free("Linf", between("Linf", 18)), [fgsm], curve=(2.0, 0.5), curve_stages=[pgd])
    assert found.curve_attacks == ["pgd"] and [a.name for a in found.attacks] == ["fgsm"]
    assert [round(r / found.threat.radius, 9) for r, _ in found.curve] == [0, 0.5, 1, 2]


def test_radii_of_their_own_over_several_batches() -> None:
    radius = torch.linspace(0.02, 0.4, NUM, dtype=torch.float64).flip(0)
    for size in (1, 7, NUM):
        found = measure(MODEL, cut(X, Y, size), free("Linf", radius), [pgd], curve=(0.5, 1.5))
        assert torch.equal(found.table["robust"], CORRECT & (distance("Linf") > radius))
        exact = [int((CORRECT & (distance("Linf") > f * radius)).sum()) for f in (0.5, 1, 1.5)]
        assert [share.count for _, share in found.curve[1:]] == exact
        assert [r for r, _ in found.curve] == pytest.approx([f * float(radius.mean()) for f in (0, 0.5, 1, 1.5)])


@pytest.mark.parametrize("restarts", [1, 3])
def test_wanted_classes_of_their_own_over_several_batches(restarts: int) -> None:
    wanted = torch.where(torch.arange(NUM) % 2 == 0, 1 - Y, Y)  # every second one is to stay what it is
    radius = between("Linf", 25)

    def make(threat: Any) -> Any:
        return pgd(threat, wanted=wanted, restarts=restarts)

    for size in (1, 7, NUM):
        found = measure(MODEL, cut(X, Y, size), free("Linf", radius), [make], curve=())
        assert torch.equal(found.table["robust"], CORRECT & ((wanted == Y) | (distance("Linf") > radius)))
        assert found.findings == [], "what was already of the wanted class is no success that did not hold"


def test_no_steps_break_nothing_more() -> None:
    found = measure(MODEL, cut(X, Y, 7), free("Linf", 10.0), [lambda threat: bim(threat, num_steps=0)])
    assert torch.equal(found.table["robust"], CORRECT) and found.attacks[0].broke == 0
    assert [share.count for _, share in found.curve] == [int(CORRECT.sum())] * 7
    assert found.findings == [] and bool((found.table["size"] == 0).all())


def test_nothing_right_at_the_start() -> None:
    wrong = (SCORE <= 0).long()
    found = measure(MODEL, [(X, wrong)], free("Linf", 0.1), [pgd])
    assert found.attack_success is None and found.clean.count == found.robust.count == 0
    assert found.attacks[0].ran_on == 0 and found.attacks[0].cost == Cost()


# Any batching ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DUAL)
def test_the_batch_size_changes_nothing(kind: str) -> None:
    model = seeded(curved)
    x = CURVED_X
    y = model(x).argmax(1)
    y[::7] = (y[::7] + 1) % 3
    attacks = make_plan("fgsm,pgd:num_steps=3,restarts=2,objective=margin", Linf(0.1))
    radius = {"Linf": 0.05, "L2": 0.15}[kind]
    runs = [measure(model, cut(x, y, size), BALLS[kind](radius), attacks, seed=5) for size in (1, 7, NUM)]
    assert 0 < runs[0].robust.count < runs[0].clean.count
    for other in runs[1:]:
        same(runs[0], other)
        for a, b in zip(runs[0].attacks, other.attacks, strict=True):
            assert (a.ran_on, a.broke, a.standing_after) == (b.ran_on, b.broke, b.standing_after)
        assert runs[0].cost.backwards == other.cost.backwards and runs[0].cost.forwards == other.cost.forwards


def test_batches_may_be_empty_and_progress_is_told() -> None:
    told: list[Progress] = []
    batches = [cut(X, Y, 16)[0], (X[:0], Y[:0]), *cut(X, Y, 16)[1:]]
    found = measure(MODEL, batches, free("Linf", 0.1), [fgsm], curve=(2.0,), observe=told.append)
    assert found.table["index"].tolist() == list(range(NUM))
    assert [now.done for now in told] == [0, 0, 0, 16, 16, 16, 16, 32, 32, 32, 32, 40]
    assert [now.running for now in told] == ["clean inputs", "fgsm", "fgsm at 2 times the radius", ""] * 3
    passes = [now.cost.forwards for now in told]
    assert passes == sorted(passes) and passes[:2] == [0, 16] and told[-1].cost == found.cost
    assert {(now.batches, now.kept) for now in told} == {(4, 0)}
    assert [now.fraction for now in told] == pytest.approx([n / 12 for n in (0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9)])
    with pytest.raises(ValueError, match="nothing to evaluate"):
        measure(MODEL, [], free("Linf", 0.1), [fgsm])


# What does not hold ----------------------------------------------------------------------------------------------


def result(threat: Any, x: Tensor, z: Tensor, reached: bool | None = True, size: float = 0.0) -> AttackResult:
    """What a hand-written attack may claim."""
    num = len(x)
    claim = None if reached is None else torch.full((num,), reached)
    return AttackResult(threat.realize(x, z), z, torch.full((num,), size), None, claim, Cost(num))


def away(x: Tensor, y: Tensor, length: float) -> Tensor:
    """The way over the line, with that largest entry."""
    return -length * MODEL.w.detach().sign() * (2 * y[:, None] - 1).to(x)


CHEATS: dict[str, tuple[str, Callable[[Any, Tensor, Tensor], Tensor], dict[str, Any]]] = {
    "too far": ("outside_set", lambda x, y, r: away(x, y, 50 * r), {}),
    "a little too far": ("outside_set", lambda x, y, r: away(x, y, 1.001 * r), {}),
    "where the mask forbids it": (
        "outside_domain", lambda x, y, r: away(x, y, r), {"mask": (torch.arange(DIM) == 2)[None]},
    ),
    "not a number": ("not_finite", lambda x, y, r: torch.full_like(x, math.nan), {}),
    "infinite": ("not_finite", lambda x, y, r: torch.full_like(x, math.inf), {}),
    "nothing": ("not_reproduced", lambda x, y, r: torch.zeros_like(x), {}),
}  # fmt: skip


@pytest.mark.parametrize("size", [7, NUM])
@pytest.mark.parametrize("cheat", CHEATS)
def test_cheating_attacks_are_not_counted(cheat: str, size: int) -> None:
    counter, way, options = CHEATS[cheat]

    def make(threat: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> AttackResult:
            return result(threat, x, way(x, y, threat.radius))

        return attack

    threat = free("Linf", 1.5 * float(distance("Linf").max()), **options)
    found = measure(MODEL, cut(X, Y, size), threat, [make], curve=())
    (record,) = found.attacks
    assert torch.equal(found.table["robust"], CORRECT) and record.broke == 0
    expected = int(CORRECT.sum())
    assert record.rejected == {**dict.fromkeys(REJECTIONS, 0), counter: expected}
    (finding,) = found.findings
    assert finding.name == "rejected results" and finding.numbers == {counter: expected}
    assert finding.sentence.startswith(f"make: {expected} results did not hold when checked and were not counted.")
    assert finding.level == ("suspect" if counter == "not_finite" else "note")


def test_an_honest_hand_written_attack_counts_with_its_true_size() -> None:
    radius = between("Linf", 18)

    def make(threat: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> AttackResult:
            return result(threat, x, away(x, y, radius), reached=None, size=1e-9)

        return attack

    found = measure(MODEL, cut(X, Y, 7), free("Linf", radius), [make], curve=())
    fell = CORRECT & (distance("Linf") < radius)
    assert torch.equal(found.table["robust"], CORRECT & ~fell) and found.findings == []
    torch.testing.assert_close(found.table["size"][fell], torch.full_like(found.table["size"][fell], radius))


def test_what_leaves_the_box_is_judged_inside_it() -> None:
    x = rand(NUM, DIM, seed=8)

    class Sees(nn.Module):
        def forward(self, v: Tensor) -> Tensor:  # only outside the box would anything change
            over = (v - 1).clamp_min(0).sum(1)
            return torch.stack([0.01 + 0 * v.sum(1) + 1e-9 * v[:, 0], over], 1)

    def make(threat: Any) -> Any:
        return lambda model, x, y, *, noise=None: result(threat, x, torch.full_like(x, 0.5))

    found = measure(Sees(), [(x, torch.zeros(NUM, dtype=torch.int64))], Linf(0.5), [make], curve=())
    assert found.robust.count == NUM and found.attacks[0].rejected["not_reproduced"] == NUM


def test_the_first_attack_that_breaks_is_named_and_later_ones_see_what_stands() -> None:
    attacks = make_plan("bim:num_steps=1,step=0.3,pgd", Linf(0.1))
    radius = between("Linf", 25)
    found = measure(MODEL, cut(X, Y, 7), free("Linf", radius), attacks, curve=())
    first = CORRECT & (distance("Linf") < 0.3 * radius)
    both = CORRECT & (distance("Linf") < radius)
    assert torch.equal(found.table["broken_by"] == 0, first)
    assert torch.equal(found.table["broken_by"] == 1, both & ~first)
    a, b = found.attacks
    assert (a.ran_on, a.broke) == (int(CORRECT.sum()), int(first.sum()))
    assert (b.ran_on, b.broke) == (a.ran_on - a.broke, int((both & ~first).sum()))
    assert a.standing_after == b.ran_on and b.standing_after == found.robust.count


# What is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarts", [1, 2])
def test_the_last_iterate_is_refused(restarts: int) -> None:
    with pytest.raises(ValueError, match='keep="last"'):
        measure(MODEL, [(X, Y)], free("Linf", 0.1), [lambda t: pgd(t, keep="last", restarts=restarts)])


def test_a_finished_attack_is_refused() -> None:
    threat = free("Linf", 0.1)
    with pytest.raises(TypeError, match=r"functions from a threat model to an attack.*got a Attack"):
        measure(MODEL, [(X, Y)], threat, [pgd(threat)])
    with pytest.raises(TypeError, match="got a str"):
        measure(MODEL, [(X, Y)], threat, ["pgd"])
    with pytest.raises(ValueError, match="no attack was given"):
        measure(MODEL, [(X, Y)], threat, [])
    with pytest.raises(TypeError, match="an attack returns an AttackResult"):
        measure(MODEL, [(X, Y)], threat, [lambda t: lambda model, x, y, *, noise=None: x])


@pytest.mark.parametrize("label", [2, -1])
def test_wrong_labels_in_a_later_batch(label: int) -> None:
    y = Y.clone()
    y[30] = label
    with pytest.raises(PreflightError, match="labels go from"):
        measure(MODEL, cut(X, y, 16), free("Linf", 0.1), [fgsm])


@pytest.mark.parametrize("value", [1.5, -0.2, math.nan, math.inf])
def test_wrong_data_in_a_later_batch(value: float) -> None:
    x = rand(NUM, DIM, seed=8)
    x[30, 4] = value
    with pytest.raises(PreflightError, match=r"1 of 16 inputs (lie outside|hold NaN)"):
        measure(MODEL, cut(x, Y, 16), Linf(0.1), [fgsm])


def test_logits_that_are_not_finite_are_not_right() -> None:
    x = X.clone()
    x[20, 0], x[33, 0] = 7.0, 8.0

    class Broken(Lines):
        def forward(self, v: Tensor) -> Tensor:
            logits = super().forward(v)
            logits = torch.where((v[:, :1] > 6.5) & (v[:, :1] < 7.5), torch.tensor(math.nan), logits)
            return torch.where(v[:, :1] > 7.5, logits + math.inf, logits)

    y = Y.clone()
    with torch.no_grad():
        clean = Broken()(x)
    y[[20, 33]] = clean[[20, 33]].argmax(1)  # the label that an argmax would call right
    found = measure(Broken().eval(), cut(x, y, 16), free("Linf", 1e-6), [fgsm], curve=())
    assert not found.table["correct"][[20, 33]].any() and found.attacks[0].ran_on == found.clean.count


# Units and outputs -----------------------------------------------------------------------------------------------


def test_large_units_lose_no_success() -> None:
    centre = torch.arange(1, 6)[:, None] * torch.tensor([1e1, 1e3, 1.9e4, 1.99e4])
    assert centre.max() < 1e5

    class Centred(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            row = (x[:, None] - centre).abs().sum(2).argmin(1)
            score = (x - centre[row]).sum(1)
            return torch.stack([0 * score, score], 1)

    x = centre + 0.03125  # in steps of float32 at this size
    x[4, 3] = 1e5 - 0.0078125
    centre[4, 3] = 1e5 - 0.0390625
    for make in (fgsm, pgd):
        y = torch.ones(5, dtype=torch.int64)
        found = measure(Centred().eval(), [(x, y)], Linf(0.1, low=0.0, high=1e5), [make], curve=())
        assert found.clean.count == 5 and found.robust.count == 0, f"{found.attacks[0].rejected}"
        assert found.findings == []


def test_an_infinite_radius_has_no_curve_but_results(tmp_path: Path) -> None:
    attacks = make_plan("gradient-ascent:num_steps=200,absolute_step=0.5", Linf(0.1))
    found = measure(MODEL, cut(X, Y, 7), free("L2", math.inf), attacks)
    assert found.robust.count == 0 and found.curve == [] and found.curve_attacks == []
    record = write(tmp_path, found).plain()
    assert record["threat"]["settings"]["radius"] == "inf" and record["threat"]["radius"] is None
    assert json.loads((tmp_path / "results.json").read_text()) == record
    bounded = measure(MODEL, [(X, Y)], free("L2", torch.full((NUM,), math.inf)), [lambda t: gradient_ascent(t)])
    assert bounded.curve == []


def test_probabilities_get_the_verdict_of_their_logits() -> None:
    model = seeded(curved)
    x = CURVED_X
    y = model(x).argmax(1)
    attacks = make_plan("fgsm,pgd:num_steps=5,pgd:num_steps=5,objective=margin", Linf(0.1))
    logits = measure(model, cut(x, y, 7), Linf(0.05), attacks)
    probabilities = measure(nn.Sequential(model, nn.Softmax(1)).eval(), cut(x, y, 7), Linf(0.05), attacks)
    for name in ("correct", "robust", "clean_prediction", "clean_confidence"):
        torch.testing.assert_close(probabilities.table[name], logits.table[name])
    assert probabilities.robust == logits.robust and 0 < logits.robust.count < NUM
    assert [share.count for _, share in probabilities.curve] == [share.count for _, share in logits.curve]
    assert [f.name for f in probabilities.findings] == ["probabilities"]


def spell(model: Any, ids: Tensor, mask: Tensor, threat: Any, label: int) -> bool:
    """Whether any permitted sentence is taken for another class, by trying all."""
    length = int(mask.sum())
    choices = [[int(i), *threat.substitutes[i].tolist()] for i in ids[:length]]
    for sentence in itertools.product(*choices):
        changed = torch.tensor(sentence + tuple(ids[length:].tolist()))
        if int((changed != ids).sum()) <= threat.radius:
            logits = model({"ids": changed[None], "mask": mask[None]})
            if int(logits.argmax()) != label:
                return True
    return False


def test_named_inputs_with_a_threat_of_their_own(tmp_path: Path) -> None:
    model = seeded(lambda: BagOfWords(NUM_WORDS, NUM_CLASSES).eval())
    ids = torch.randint(NUM_WORDS, (14, 5), generator=torch.Generator().manual_seed(5))
    x = {"ids": ids, "mask": torch.arange(5) < torch.tensor([[5, 4] * 7]).T}
    threat = words(radius=1.0, num_choices=2)
    with torch.no_grad():
        y = model(x).argmax(1)
        y[3] = (y[3] + 1) % NUM_CLASSES
        breakable = torch.tensor([spell(model, ids[i], x["mask"][i], threat, int(y[i])) for i in range(14)])
    runs = [
        measure(model, cut(x, y, size), threat, [fgsm, lambda t: pgd(t, objective=margin)], curve=(2.0,))
        for size in (1, 4, 14)
    ]
    for other in runs[1:]:
        same(runs[0], other)
    found = runs[1]
    fell = found.table["correct"] & ~found.table["robust"]
    assert found.clean.count == 13 and int(fell.sum()) > 0 and not bool((fell & ~breakable).any())
    assert found.findings == []
    pictures, index = found.gallery, found.gallery["index"]
    assert set(pictures) >= {"x/ids", "x/mask", "x_adv/ids", "x_adv/mask"} and len(index) == min(12, int(fell.sum()))
    assert torch.equal(pictures["x/ids"], ids[index]) and torch.equal(pictures["x_adv/mask"], x["mask"][index])
    changed = (pictures["x_adv/ids"] != pictures["x/ids"]).sum(1)
    assert torch.equal(changed.to(found.table["size"]), found.table["size"][index])
    assert found.curve[2][1].count <= found.curve[1][1].count
    assert write(tmp_path, found).metrics["robust_accuracy"].count == found.robust.count
    with np.load(tmp_path / "gallery.npz", allow_pickle=False) as stored:
        assert set(stored.files) == set(pictures)


# The model, and what it cost -------------------------------------------------------------------------------------


def test_the_model_is_left_as_found(
    stateful: nn.Module, images: Tensor, labels: Tensor, snapshot: Callable[[nn.Module], Any]
) -> None:
    def make(threat: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Noise) -> AttackResult:
            z = threat.sample(x, noise).requires_grad_()
            F.cross_entropy(model(threat.apply(x, z)), y).backward()
            z = threat.project(x, z.detach() + threat.steepest(x, z.grad))
            return result(threat, x, z, reached=None)

        return attack

    before = snapshot(stateful)
    found = measure(stateful, [(images, labels), (images, labels)], Linf(0.1), [make, pgd])
    assert snapshot(stateful) == before
    assert found.table["clean_prediction"][:3].tolist() == found.table["clean_prediction"][3:].tolist()
    with attack_mode(stateful) as frozen:
        assert torch.equal(frozen(images).argmax(1), found.table["clean_prediction"][:3])


def test_the_model_is_left_as_found_when_an_attack_fails(
    stateful: nn.Module, images: Tensor, labels: Tensor, snapshot: Callable[[nn.Module], Any]
) -> None:
    def make(threat: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> AttackResult:
            raise RuntimeError("broke")

        return attack

    with attack_mode(stateful) as frozen:
        labels = frozen(images).argmax(1)
    before = snapshot(stateful)
    with pytest.raises(RuntimeError, match="broke"):
        measure(stateful, [(images, labels)], Linf(0.1), [make])
    assert snapshot(stateful) == before


def test_the_cost_adds_up() -> None:
    looks = [0]

    class Counting(Lines):
        def forward(self, x: Tensor) -> Tensor:
            looks[0] += len(x)
            return super().forward(x)

    model, threat = Counting().eval(), free("Linf", between("Linf", 18))
    attacks = make_plan("fgsm,pgd:num_steps=3,restarts=2", Linf(0.1))
    batches = cut(X, Y, 16)
    preflight(model, *batches[0], threat)
    before, looks[0] = looks[0], 0
    plain = measure(model, batches, threat, attacks, curve=())
    assert looks[0] - before == plain.cost.forwards
    one, two = plain.attacks
    assert one.cost == Cost(2 * one.ran_on, one.ran_on)
    tried = two.cost.backwards // 3  # the second restart looks only at what the first one left
    assert two.cost == Cost(4 * tried, 3 * tried) and two.ran_on <= 2 * two.ran_on - two.broke <= tried
    assert plain.cost.forwards == NUM + one.cost.forwards + one.ran_on + two.cost.forwards + two.ran_on
    assert plain.cost.backwards == one.cost.backwards + two.cost.backwards
    looks[0] = 0
    whole = measure(model, batches, threat, attacks)
    assert looks[0] - before == whole.cost.forwards > plain.cost.forwards
    assert [a.cost for a in whole.attacks] == [a.cost for a in plain.attacks]


# Files -----------------------------------------------------------------------------------------------------------

KEYS = {
    "schema", "name", "version", "created", "command", "model", "data", "threat", "seed", "metrics", "attacks", "curve",
    "curve_attacks", "per_class", "findings", "cost", "training", "environment", "certification", "verdict", "sanity",
}  # fmt: skip
ABOUT = {"name": "me", "created": "now", "command": None, "model": {"name": "cnn"}, "training": None}


def write(folder: Path, found: Evaluation, **about: Any) -> Results:
    """The files of an evaluation; read back, they hold the same."""
    stored = as_results(found, **about)
    write_evaluation(folder, *stored)
    assert read_evaluation(folder).results == stored.results
    return stored.results


def documented() -> Iterator[str]:
    """The first column of the table of results.json."""
    text = (Path(__file__).parents[2] / "docs" / "results-schema.md").read_text(encoding="utf-8")
    for line in text.partition("## results.json")[2].partition("## ")[0].splitlines():
        if line.startswith("| `"):
            yield from (part.strip(" `") for part in line.split("|")[1].split(","))


def test_results_hold_what_the_documentation_says(tmp_path: Path) -> None:
    assert set(documented()) == KEYS
    found = measure(MODEL, cut(X, Y, 7), free("Linf", between("Linf", 18)), make_plan("fgsm,pgd", Linf(0.1)), seed=4)
    record = write(tmp_path, found, class_names=["zero", "one"], **ABOUT).plain()
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == record
    assert set(record) == KEYS and record["schema"] == "sparring.results/2" and record["seed"] == 4
    share = {"value", "low", "high", "n", "count", "higher_is_better"}
    assert set(record["metrics"]) == {"clean_accuracy", "robust_accuracy", "attack_success"}
    assert {frozenset(metric) for metric in record["metrics"].values()} == {frozenset(share)}
    assert [m["higher_is_better"] for m in record["metrics"].values()] == [True, True, False]
    assert record["threat"]["words"] == found.threat.describe() and record["threat"]["radius"] == found.threat.radius
    assert {frozenset(point) for point in record["curve"]} == {frozenset({"radius", "robust_accuracy"})}
    for attack in record["attacks"]:
        keys = {"name", "settings", "margin_at_most", "ran_on", "skipped", "broke", "robust_after", "rejected", "cost"}
        assert set(attack) == keys
        assert set(attack["rejected"]) == set(REJECTIONS)
    assert record["attacks"][-1]["robust_after"] == record["metrics"]["robust_accuracy"]["value"]
    assert [set(row) for row in record["per_class"]] == [{"label", "name", "n", "clean", "robust"}] * 2
    assert [row["name"] for row in record["per_class"]] == ["zero", "one"]
    assert set(record["cost"]) == {"forwards", "backwards", "seconds"}
    assert set(record["environment"]) == {"python", "torch", "platform", "device", "threads"}


def test_a_row_per_example(tmp_path: Path) -> None:
    radius = between("Linf", 18)
    found = measure(MODEL, cut(X, Y, 7), free("Linf", radius), make_plan("fgsm", Linf(0.1)))
    write(tmp_path, found)
    with (tmp_path / "examples.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == NUM and tuple(rows[0]) == Row._fields
    for i, row in enumerate(rows):
        fell = bool(CORRECT[i]) and float(distance("Linf")[i]) < radius
        assert (int(row["index"]), int(row["label"])) == (i, int(Y[i]))
        assert int(row["clean_prediction"]) == int(SCORE[i] > 0)
        assert row["correct"] == str(int(CORRECT[i]))
        assert row["robust"] == str(int(bool(CORRECT[i]) and not fell))
        assert row["broken_by"] == ("fgsm" if fell else "")
        assert bool(row["adversarial_prediction"]) == bool(row["adversarial_confidence"]) == bool(row["size"]) == fell
        assert 0.5 <= float(row["clean_confidence"]) <= 1
        if fell:
            assert float(row["size"]) == pytest.approx(radius, rel=1e-5)


def test_the_gallery_and_what_remains_of_an_old_one(tmp_path: Path) -> None:
    threat = free("Linf", between("Linf", 25))
    found = measure(MODEL, cut(X, Y, 7), threat, [fgsm], curve=(), gallery_size=5)
    write(tmp_path, found)
    with np.load(tmp_path / "gallery.npz", allow_pickle=False) as gallery:
        assert set(gallery) == {
            "index", "x", "x_adv", "label", "clean_prediction", "clean_confidence", "adversarial_prediction",
            "adversarial_confidence",
        }  # fmt: skip
        assert {len(gallery[name]) for name in gallery} == {5}
        index = torch.from_numpy(gallery["index"])
        assert torch.equal(torch.from_numpy(gallery["x"]), X[index])
        assert torch.equal(torch.from_numpy(gallery["label"]), Y[index])
        with torch.no_grad():
            prediction = MODEL(torch.from_numpy(gallery["x_adv"])).argmax(1)
        assert torch.equal(prediction, torch.from_numpy(gallery["adversarial_prediction"]))
        assert bool((prediction != Y[index]).all())


def test_no_gallery_when_nothing_was_attacked_and_no_old_one_remains(tmp_path: Path) -> None:
    (tmp_path / "gallery.npz").write_bytes(b"old")
    nothing = measure(MODEL, [(X, (SCORE <= 0).long())], free("Linf", 0.1), [fgsm], curve=())
    write(tmp_path, nothing)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["examples.csv", "results.json"]


def test_no_gallery_when_nothing_fell_and_no_old_one_remains(tmp_path: Path) -> None:
    (tmp_path / "gallery.npz").write_bytes(b"old")
    nothing = measure(MODEL, cut(X, Y, 7), free("Linf", 1e-9), [fgsm], curve=())
    write(tmp_path, nothing)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["examples.csv", "results.json"]


def test_a_failing_write_leaves_no_complete_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(MODEL, [(X, Y)], free("Linf", between("Linf", 18)), [fgsm], curve=())
    write(tmp_path, found)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, found)
    assert [p.name for p in tmp_path.iterdir()] == ["examples.csv"]


def test_attacks_built_by_hand_are_described() -> None:
    def mine(threat: Any) -> Attack:
        return Attack(threat=threat, rule=Ascent(0.5), num_steps=4, start=null)

    found = measure(MODEL, [(X, Y)], free("Linf", 0.1), [mine, lambda t: Restarts(pgd(t), 2)], curve=())
    assert [a.name for a in found.attacks] == ["mine", "<lambda>"]
    assert found.attacks[0].settings["num_steps"] == 4 and found.attacks[0].settings["rule"]["step_size"] == 0.5
    assert found.attacks[1].settings["type"] == "Restarts" and found.attacks[1].settings["num"] == 2
    json.dumps([a.settings for a in found.attacks], allow_nan=False)


def test_images_of_any_shape(network: nn.Module) -> None:
    x = rand(6, *SHAPE[1:], seed=9)
    y = network(x).argmax(1)
    for kind, mask in itertools.product((Linf, L2), (None, rand(1, *SHAPE[1:], seed=5) < 0.6)):
        found = measure(network, cut(x, y, 4), kind(2.9, low=-1.0, high=2.0, mask=mask), [pgd], curve=())
        assert found.robust.count < 6 and found.findings == [] and found.gallery["x_adv"].shape[1:] == SHAPE[1:]


def test_a_preflight_in_place_of_the_model_is_taken_at_its_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def probabilities(x: Tensor) -> Tensor:
        return MODEL(x).softmax(1)

    threat = free("Linf", between("Linf", 18))
    whole = measure(probabilities, cut(X, Y, 7), threat, [fgsm])
    checked = preflight(probabilities, X[:7], Y[:7], threat)
    monkeypatch.setattr(sys.modules["sparring.evaluation.measure"], "preflight", None)
    found = measure(checked, cut(X, Y, 7), threat, [fgsm])
    check_same(found, whole)
    assert found.model is checked.model and [f.name for f in found.findings] == ["probabilities"]
    with torch.no_grad():
        torch.testing.assert_close(whole.model(X).exp(), probabilities(X))


def test_examples_keep_their_own_numbers_and_noise() -> None:
    """Some examples under their numbers get what they get among all."""
    threat, stages = free("Linf", 0.3), [lambda t: pgd(t, num_steps=2)]
    rows = torch.tensor([1, 4, 5, 9, 11])
    whole = measure(MODEL, cut(X, Y, 7), threat, stages, curve=())
    part = measure(MODEL, cut(X[rows], Y[rows], 3), threat, stages, curve=(), numbers=rows)
    assert part.table["index"].tolist() == rows.tolist()
    for name in ("robust", "broken_by", "clean_prediction"):
        assert torch.equal(part.table[name], whole.table[name][rows]), name
    torch.testing.assert_close(part.table["margin_left"], whole.table["margin_left"][rows])
