"""Rows under attack: the contract, lawful rows whatever is tried, searches beside brute force, and what is counted."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparring import fgsm
from sparring.app.evaluate import evaluate
from sparring.core.noise import Noise
from sparring.core.types import take
from sparring.evaluation.measure import measure
from sparring.modalities import find
from sparring.modalities.tables import Columns, Schema
from sparring.modalities.tables.check import unlawful
from sparring.modalities.tables.models import Untouched, table_mlp
from sparring.modalities.tables.search import evolve
from sparring.modalities.tables.search import greedy_columns as greedy
from sparring.modalities.tables.show import table_metrics
from sparring.modalities.tables.threats import climbed_relaxed
from sparring.threats import Linf, check_threat

TABLE = find("table")
MIXED = Schema.of("""
label = "y"
attacked = "bad"
[columns]
length = {type = "integer", low = 0, high = 60, unit = 4}
digits = {type = "integer", low = 0, high = 30, unit = 2}
ratio = {type = "real", low = 0, high = 1, unit = 0.2}
total = {type = "real", low = -100, high = 100}
bytes = {type = "integer", low = 0, high = 2000000000, scale = "log", change = "up"}
errors = {type = "real", low = 0, high = 1, step = 0.01, unit = 0.1, change = "down"}
port = {type = "boolean", unit = 0.5}
flag = {type = "category", values = ["SF", "S0", "REJ"], unit = 0.5}
owner = {type = "real", low = 0, high = 9, change = "none"}
[[relations]]
rule = "digits <= length"
[[relations]]
rule = "ratio = whole(ratio * length) / max(length, 1)"
[[relations]]
rule = "total = length + digits - owner"
[[relations]]
rule = "if port > 0 then digits >= 2"
[[relations]]
rule = 'if is(flag, "REJ") > 0 then bytes <= 100'
""")


def mixed_rows(num: int = 40, seed: int = 0) -> dict[str, Tensor]:
    """Rows that keep all rules but for a few that break one from the start; every fifth is not the opponent's."""
    draw = np.random.default_rng(seed)
    length, port, flag = draw.integers(4, 60, num), draw.integers(0, 2, num), draw.integers(0, 3, num)
    digits = np.minimum(draw.integers(2, 30, num), length)
    digits[::7] = length[::7] + 1
    ratio = draw.integers(0, length) / length
    bytes_ = np.where(flag == 2, draw.integers(0, 100, num), draw.integers(0, 1_400_000_000, num))
    owner = draw.uniform(0, 9, num).round(2)
    columns = [length, digits, ratio, length + digits - owner, bytes_, draw.integers(0, 101, num) / 100, port]
    x = np.stack([*columns, *np.eye(3)[flag].T, owner], 1).astype(np.float64)
    return {"rows": torch.from_numpy(x), "may_change": torch.arange(num) % 5 > 0}


def threat(norm: Any = "l2", radius: Any = 2.0, units: Any = "schema") -> Columns:
    return Columns(radius, MIXED, norm, units)


@pytest.mark.parametrize("units", ["schema", "range"])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_the_contract_of_threats_is_kept(norm: str, units: str) -> None:
    x = mixed_rows(12)
    mine = take(x, x["may_change"].nonzero()[:, 0])
    made = threat(norm, 1.5, units)
    check_threat(made, mine, num_directions=25)
    check_threat(replace(made, radius=torch.linspace(0.3, 3, len(mine["rows"]))), mine, num_directions=8)
    assert torch.equal(made.realize(x, made.null(x))["rows"], x["rows"])


@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_whatever_is_tried_comes_out_lawful_within_the_radius_and_only_where_it_may(norm: str) -> None:
    x, moved = mixed_rows(300), 0
    for radius, wild in itertools.product((0.5, 2.0, 8.0), (1.0, 100.0)):
        made = threat(norm, radius)
        z = wild * Noise.make(0, f"{norm}{radius}", torch.arange(300)).normal((11,)).double()
        for tried in (made.project(x, z), z, z.sign() * 1e6):  # also what never was inside
            real = made.realize(x, tried)
            rows = real["rows"].numpy()
            broken = unlawful(MIXED, x["rows"].numpy(), rows, x["may_change"].numpy())
            assert {name: int(bad.sum()) for name, bad in broken.items() if bad.any()} == {}
            assert bool(made.valid(x, real).all())
            change = by_hand(x["rows"].numpy(), rows)
            length = {"l1": np.abs(change).sum(1), "l2": (change**2).sum(1) ** 0.5, "linf": np.abs(change).max(1)}[norm]
            assert (length <= radius * (1 + 1e-6)).all()
            assert (rows[~x["may_change"].numpy()] == x["rows"].numpy()[~x["may_change"].numpy()]).all()
            moved += int((rows != x["rows"].numpy()).any(1).sum())
    assert moved > 18 * 100  # and it is not the clean row most of the time


def by_hand(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Changes in units, from the text of the schema."""
    change = rows - x
    change[:, 4] = np.log1p(rows[:, 4]) - np.log1p(x[:, 4])
    return change / np.array([4, 2, 0.2, 1, 1, 0.1, 0.5, 0.5, 0.5, 0.5, 1])


BAD_ROWS = [
    ("step", 0, 0.5), ("range", 0, 100), ("step", 5, -0.005), ("change", 5, 0.01), ("change", 4, -1), ("change", 10, 1),
    ("category", 7, 1), ("rule digits <= length", 1, 25), ("rule total = length + digits - owner", 0, 1),
    ("rule if port > 0 then digits >= 2", 1, -9), ("finite", 2, np.nan), ("rule ratio", 2, 0.03),
]  # fmt: skip


@pytest.mark.parametrize(("law", "column", "by"), BAD_ROWS)
def test_the_checker_names_the_law_that_a_row_breaks(law: str, column: int, by: float) -> None:
    x = np.array([[20.0, 10, 0.5, 27, 50, 0.5, 1, 0, 0, 1, 3]])
    bad = x.copy()
    bad[0, column] += by
    told = [name for name, broken in unlawful(MIXED, x, bad, np.array([True])).items() if broken[0]]
    assert any(name.startswith(law) for name in told), told
    if np.isfinite(by):
        assert "not his" in [n for n, broken in unlawful(MIXED, x, bad, np.array([False])).items() if broken[0]]
    tensors = ({"rows": torch.from_numpy(v), "may_change": torch.tensor([True])} for v in (x, bad))
    assert not threat(radius=1e9).valid(*tensors).item()
    assert not any(broken[0] for broken in unlawful(MIXED, x, x, np.array([True])).values())


def test_without_laws_only_norm_range_and_owner_are_left() -> None:
    data = SimpleNamespace(schema=MIXED)
    free, bound = (TABLE.make_threat(f"columns:2,norm=l1{laws}", data) for laws in (",laws=ignored", ""))  # type: ignore[arg-type]
    assert free.text().endswith("laws=ignored") and "no other law" in free.describe() and "laws" not in bound.text()
    x = mixed_rows(60)
    z = Noise.make(0, "free", torch.arange(60)).normal((11,)).double()
    real, may = free.realize(x, free.project(x, z)), x["may_change"]
    low, high = (torch.minimum(x["rows"], torch.as_tensor(MIXED.low)), torch.as_tensor(MIXED.high))
    wanted = torch.minimum(torch.maximum(free._moved(x, free.project(x, z)), low), high.maximum(x["rows"]))
    assert torch.allclose(real["rows"][may], wanted[may]) and torch.equal(real["rows"][~may], x["rows"][~may])
    assert bool(free.valid(x, real).all()) and not bool(bound.valid(x, real)[may].any())
    assert bound.schema.rules and bound.schema.step.any()  # the schema itself stays
    for made in (free, bound):  # what the rules permit is permitted without them
        assert bool(made.valid(x, bound.realize(x, bound.project(x, z))).all())
    check_threat(free, take(x, may.nonzero()[:, 0]), num_directions=10)


def test_large_integers_keep_their_digits() -> None:
    x = mixed_rows(60)
    made = threat("l2", 3.0)
    real = made.realize(x, made.project(x, torch.full_like(x["rows"], 0.001)))["rows"]
    grown = (real - x["rows"])[:, 4]
    assert bool((grown == grown.round()).all()) and float(grown.max()) > 2**20 and float(real[:, 4].max()) > 2**30


def test_the_model_sees_the_real_row_with_the_gradient_of_the_relaxed_one() -> None:
    x, made = mixed_rows(20), threat("l2", 3.0)
    z = made.sample(x, Noise.make(0, "z", torch.arange(20))).requires_grad_()
    seen, near = made.apply(x, z)["rows"], climbed_relaxed(made).apply(x, z)["rows"]
    assert torch.equal(seen, made.realize(x, z)["rows"]) and not torch.equal(seen, near)
    weight = torch.arange(1.0, 12.0).double()
    grads = [torch.autograd.grad((rows * weight).sum(), z, retain_graph=True)[0] for rows in (seen, near)]
    assert torch.equal(*grads) and bool((grads[0] != 0).any())


# Searches beside brute force

SMALL = Schema.of("""
label = "y"
attacked = "bad"
[columns]
a = {type = "integer", low = 0, high = 6}
b = {type = "integer", low = 0, high = 6}
c = {type = "integer", low = 0, high = 6, change = "up"}
d = {type = "boolean"}
e = {type = "integer", low = 0, high = 12}
[[relations]]
rule = "a <= b + 2"
[[relations]]
rule = "if d > 0 then c >= 2"
[[relations]]
rule = "e = a + b"
""")


def small_rows(num: int = 40) -> dict[str, Tensor]:
    draw = np.random.default_rng(1)
    b, c = draw.integers(0, 7, num), draw.integers(0, 7, num)
    a, d = np.minimum(draw.integers(0, 7, num), b + 2), draw.integers(0, 2, num) * (c >= 2)
    rows = torch.from_numpy(np.stack([a, b, c, d, a + b], 1).astype(np.float64))
    return {"rows": rows, "may_change": torch.ones(num, dtype=torch.bool)}


def small_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return table_mlp([False] * 5, [3.0, 3, 3, 0.5, 6], [1.5, 1.5, 1.5, 0.5, 2], 2, width=16, depth=1).eval()


def everything(row: Tensor, radius: float, norm: str) -> Tensor:
    """All lawful rows within the radius, from the words of the schema."""
    found = []
    a0, b0, c0, d0, e0 = row.tolist()
    for a, b, c, d in itertools.product(range(7), range(7), range(int(c0), 7), (0, 1)):
        change = [a - a0, b - b0, c - c0, d - d0, a + b - e0]
        length = sum(map(abs, change)) if norm == "l1" else max(map(abs, change))
        if norm == "l2":
            length = sum(v * v for v in change) ** 0.5
        if a <= b + 2 and (not d or c >= 2) and length <= radius:
            found.append([a, b, c, d, a + b])
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize(("norm", "radius"), [("l2", 3.0), ("l1", 5.0), ("linf", 2.0)])
def test_searches_find_nearly_all_that_brute_force_finds(norm: Any, radius: float) -> None:
    made, x, share = Columns(radius, SMALL, norm), small_rows(30), []
    for seed in range(2):
        model = small_model(seed)
        y = model(x).argmax(1)
        exact = torch.stack([(model(everything(row, radius, norm)).argmax(1) != k).any() for row, k in
                             zip(x["rows"], y, strict=True)])  # fmt: skip
        both = torch.zeros_like(exact)
        for attack in (evolve(made, generations=30, population=16), greedy(made)):
            found = attack(model, x, y, noise=Noise.make(seed, "search", torch.arange(len(y))))
            again = model(made.realize(x, found.z)).argmax(1) != y
            assert torch.equal(again, found.reached) and not bool((found.reached & ~exact).any())
            assert bool(made.valid(x, found.x_adv).all())
            both |= found.reached
        share.append((int(both.sum()), int(exact.sum())))
    reached, possible = map(sum, zip(*share, strict=True))
    assert possible >= 15 and reached >= 0.95 * possible, share


def test_greedy_of_one_round_is_the_best_single_change_exactly() -> None:
    made, x, model = Columns(2.0, SMALL, "linf"), small_rows(12), small_model(0)
    y = model(x).argmax(1)
    found = greedy(made, rounds=1)(model, x, y)
    best = []
    for row, k in zip(x["rows"], y, strict=True):
        tried = [row]
        for j, by in itertools.product(range(4), (-2, -1, 1, 2)):
            z = torch.zeros(1, 5, dtype=torch.float64)
            z[0, j] = by
            one = {"rows": row[None], "may_change": torch.tensor([True])}
            tried.append(made.realize(one, made.project(one, z))["rows"][0])
        logits = model(torch.stack(tried))
        best.append((logits[:, 1 - k] - logits[:, k]).max())
    assert torch.allclose(found.loss, torch.stack(best), atol=1e-5)
    assert found.cost.forwards == len(y) + len(y) * 4 * 5 and found.cost.backwards == 0


def test_rows_are_searched_alone_and_what_is_not_the_opponents_costs_nothing() -> None:
    made, x = threat("l2", 1.0), mixed_rows(30)
    model = table_mlp([False] * 11, [0.0] * 11, [10.0] * 11, 2, width=8, depth=1).eval()
    y = model(x).argmax(1)
    for attack in (evolve(made, generations=4, population=6), greedy(made, rounds=2)):
        noise = Noise.make(0, "alone", torch.arange(30))
        whole = attack(model, x, y, noise=noise)
        rows = torch.tensor([3, 17, 8, 11])
        part = attack(model, take(x, rows), y[rows], noise=noise.take(rows))
        assert torch.allclose(part.z, whole.z[rows]) and torch.equal(part.reached, whole.reached[rows])
        nobody = attack(model, {**x, "may_change": torch.zeros(30, dtype=torch.bool)}, y)
        assert nobody.cost.forwards == 30 and not nobody.reached.any()
    with pytest.raises(TypeError, match="expected `columns`"):
        evolve(Linf(0.1))
    with pytest.raises(ValueError, match="rounds=0"):
        greedy(made, rounds=0)


@pytest.mark.parametrize("plan", ["fast", "full"])
@pytest.mark.parametrize("norm", ["l2", "l1", "linf"])
def test_plans_hold_gradients_and_searches(norm: str, plan: str) -> None:
    made = threat(norm)
    attacks = [stage(made) for stage in TABLE.make_plan(plan, made)]
    free = [getattr(a, "needs_grad", True) for a in attacks]
    assert not all(free) and any(free)


# What is counted


def test_an_evaluation_attacks_the_attacked_class_alone_and_counts_recall() -> None:
    made, x = threat("l2", 2.0), mixed_rows(60)
    y = x["may_change"].long()
    torch.manual_seed(0)
    model = table_mlp([False] * 11, x["rows"].mean(0).tolist(), x["rows"].std(0).tolist(), 2, width=8, depth=1).eval()
    bound, why = TABLE.certify(model, made)
    assert isinstance(bound, Untouched) and not why and TABLE.certify(model, Linf(0.1))[1]
    found = measure(model, [(x, y)], made, TABLE.make_plan("fgsm,greedy:rounds=1", made), certify=bound, curve=(),
                    metrics=table_metrics)  # fmt: skip
    table = {name: column.numpy() for name, column in found.table.items()}
    right, theirs = model(x).argmax(1).numpy() == y.numpy(), y.numpy() == 1
    assert (table["certified"] == (right & ~theirs)).all() and found.attacks[0].ran_on == (right & theirs).sum()
    share = {name: metric.value for name, metric in found.metrics.items()}
    assert share["recall"] == right[theirs].mean() and share["false_alarm_rate"] == 1 - right[~theirs].mean()
    assert share["recall_attacked"] == table["robust"][theirs].mean()
    assert share["evasion_rate"] == 1 - table["robust"][theirs & right].mean()
    assert share["balanced_accuracy_attacked"] == (table["robust"][theirs].mean() + right[~theirs].mean()) / 2
    assert not found.metrics["evasion_rate"].higher_is_better
    balanced = found.metrics["balanced_accuracy"]
    assert balanced.low <= balanced.value <= balanced.high


@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_networks_see_standardised_columns_one_row_at_a_time(name: str) -> None:
    x, given = (
        mixed_rows(12),
        {"log": [False] * 10 + [True], "mean": [1.0] * 11, "spread": [2.0] * 11, "num_classes": 3},
    )
    model = TABLE.make_model(f"{name}:width=8,depth=2", 0, given).eval()
    rows = x["rows"].clone().requires_grad_()
    logits = model({**x, "rows": rows})
    (grad,) = torch.autograd.grad(logits.pow(2).sum(), rows)
    assert logits.shape == (12, 3) and bool((grad != 0).any(0).all())
    scaled = ((torch.cat([x["rows"][:, :10], x["rows"][:, 10:].log1p()], 1) - 1) / 2).asinh().float()
    assert torch.allclose(model.layers(scaled), logits) and torch.allclose(
        model(take(x, torch.tensor([5]))), logits[5:6]
    )


def test_a_residual_block_with_silent_layers_changes_nothing() -> None:
    given: dict[str, Any] = {"log": [False], "mean": [0.0], "spread": [1.0], "num_classes": 2}
    model = TABLE.make_model("resnet:width=4,depth=3", 0, given).eval()
    for block in model.layers[1:4]:
        nn.init.zeros_(block[-2].weight), nn.init.zeros_(block[-2].bias)
    first, last = model.layers[0], model.layers[4:]
    rows = torch.randn(5, 1, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(model(rows), last(first(rows.asinh())))


def test_recipes_climb_relaxed_and_learn_real_rows(tmp_path: Path) -> None:
    made, x = threat("l2", 2.0), mixed_rows(20)
    recipe = TABLE.named_recipe("pgd-at:num_steps=2")(made)
    assert recipe.attack.threat.relaxed and not made.relaxed
    model = table_mlp([False] * 11, [0.0] * 11, [10.0] * 11, 2, width=8, depth=1)
    crafted = recipe.craft(model, x, x["may_change"].long())
    assert bool(made.valid(x, crafted).all()) and not torch.equal(crafted["rows"], x["rows"])
    for name in ("mixed", "trades", "standard"):
        loss = TABLE.named_recipe(name)(made)(model, x, x["may_change"].long())
        assert loss.isfinite() and loss.requires_grad


def test_inputs_of_another_kind_are_told() -> None:
    with pytest.raises(ValueError, match=r"inputs are a tensor \(2, 11\); expected rows"):
        fgsm(threat())(nn.Linear(11, 2).double(), torch.zeros(2, 11).double(), torch.tensor([0, 1]))
    for radius, norm, sentence in ((-1.0, "l2", "must not be negative"), (1.0, "l3", "there are l2, l1, linf")):
        with pytest.raises(ValueError, match=sentence):
            threat(norm, radius)
    told = threat("l1").describe()
    assert "l1 at most 2" in told and "5 rules" in told
    assert threat("l1", 2.0, "range").text() == "columns:2,norm=l1,units=range"


def test_the_battery_asks_of_jumps_no_short_steps_and_of_untouched_rows_no_fall() -> None:
    torch.manual_seed(0)
    made, x = Columns(4.0, SMALL, "linf"), small_rows(60)
    x = {**x, "may_change": torch.arange(60) % 4 == 0}
    model = small_model(0)
    y = model(x).argmax(1)
    found = evaluate(model, [(x, y)], made, "pgd:num_steps=10,greedy", modality=TABLE, curve=(0.5, 2.0))
    assert found.clean.value == 1 and found.robust.value < 0.78 and found.table["certified"].sum() >= 45
    named = {finding.name for finding in found.findings}
    assert not named & {"misleading_gradients", "curve_shape", "no_search", "rejected results"}, named
    without = evaluate(model, [(x, y)], made, "pgd:num_steps=1", modality=TABLE, curve=())
    assert "no_search" in {finding.name for finding in without.findings}
