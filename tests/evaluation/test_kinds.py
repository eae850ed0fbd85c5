"""Other inputs than one tensor, other models than differentiable ones, other radii than a field."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alike import check_same
from contracts import rand, seeded
from sparring.attacks.around import Restarts
from sparring.attacks.catalogue import fgsm, pgd
from sparring.attacks.square import square
from sparring.evaluation.measure import Evaluation, measure
from sparring.evaluation.preflight import PreflightError, preflight
from sparring.results.statistics import wilson
from sparring.threats import Linf
from sparring.threats.lens import Lens

NUM, DIM = 33, 6
X = rand(NUM, DIM, seed=5)
NET = seeded(lambda: nn.Sequential(nn.Linear(DIM, 9), nn.Tanh(), nn.Linear(9, 3)).double().eval())
with torch.no_grad():
    NET[2].bias -= NET(X).median(0).values
    Y = NET(X).argmax(1)
Y[::7] = (Y[::7] + 1) % 3
THREAT = Linf(0.05)


def cut(x: Any = X, size: int = 7) -> list[tuple[Any, Tensor]]:
    if isinstance(x, Tensor):
        return list(zip(x.split(size), Y.split(size), strict=True))
    parts = [dict(zip(x, piece, strict=True)) for piece in zip(*(v.split(size) for v in x.values()), strict=True)]
    return list(zip(parts, Y.split(size), strict=True))


# Models without gradients ----------------------------------------------------------------------------------------


def black_box(x: Tensor) -> Tensor:
    """The network behind numpy, as a tree or a service is."""
    with torch.no_grad():
        return torch.from_numpy(NET(torch.from_numpy(x.detach().numpy())).numpy())


def by_square(threat: Any) -> Any:
    return square(threat, num_queries=30)


def test_a_search_without_gradients_needs_none() -> None:
    open_box = measure(NET, cut(), THREAT, [by_square])
    closed = measure(black_box, cut(), THREAT, [by_square])
    assert 0 < closed.robust.count < closed.clean.count
    assert torch.equal(closed.table["robust"], open_box.table["robust"]) and closed.cost.backwards == 0
    assert [(f.name, f.level) for f in closed.findings] == [("no_gradient", "suspect")]
    assert "only searches without gradients were run" in closed.findings[0].sentence
    assert open_box.findings == []


@pytest.mark.parametrize(
    ("stages", "curve_stages", "curve"),
    [
        ([fgsm], None, ()),
        ([by_square, pgd], None, ()),
        ([by_square], [fgsm], (0.5,)),
        ([lambda t: Restarts(pgd(t), 2)], None, ()),
        ([lambda t: lambda m, x, y, *, noise: pgd(t)(m, x, y, noise=noise)], None, ()),
    ],
)
def test_one_attack_that_needs_gradients_is_enough_to_refuse(stages: Any, curve_stages: Any, curve: Any) -> None:
    with pytest.raises(PreflightError, match=r"no gradient with respect to the input.*such as square"):
        measure(black_box, cut(), THREAT, stages, curve=curve, curve_stages=curve_stages)


def test_attacks_of_a_curve_that_is_not_drawn_need_nothing() -> None:
    found = measure(black_box, cut(), THREAT, [by_square], curve=(), curve_stages=[fgsm])
    assert [f.name for f in found.findings] == ["no_gradient"]


def test_restarts_of_a_search_need_no_gradient_either() -> None:
    found = measure(black_box, cut(), THREAT, [lambda t: square(t, num_queries=10, restarts=2)], curve=())
    assert found.attacks[0].broke > 0


def test_preflight_refuses_unless_it_is_told() -> None:
    with pytest.raises(PreflightError, match="no gradient"):
        preflight(black_box, X, Y, THREAT)
    found = preflight(black_box, X, Y, THREAT, needs_grad=False)
    assert [f.name for f in found.findings] == ["no_gradient"] and found.model is black_box
    assert preflight(NET, X, Y, THREAT, needs_grad=False).findings == ()


# Named inputs ----------------------------------------------------------------------------------------------------


def named_model(x: Any) -> Tensor:
    return NET(x["values"]) + 0 * x["ids"][:, :1]


NAMED = {"values": X, "ids": torch.arange(NUM * 2).reshape(NUM, 2)}


def named(keep: Path | None = None, batches: Any = None, **options: Any) -> Evaluation:
    options = {"gallery_size": 5, "seed": 3, **options}
    return measure(named_model, batches or cut(NAMED), Lens(THREAT, "values"), [fgsm, pgd], keep=keep, **options)


def test_named_inputs_give_what_the_tensor_gives() -> None:
    one, two = measure(NET, cut(), THREAT, [fgsm, pgd], gallery_size=5, seed=3), named()
    assert 0 < two.robust.count < two.clean.count
    for name, column in one.table.items():
        assert torch.allclose(column.double(), two.table[name].double(), rtol=1e-6, atol=1e-9), name
    assert one.curve == two.curve, "the radius of a lens is no field"
    assert set(two.gallery) == {*(set(one.gallery) - {"x", "x_adv"}), "x/values", "x/ids", "x_adv/values", "x_adv/ids"}
    index = two.gallery["index"]
    assert len(index) == 5 and torch.equal(two.gallery["x/ids"], NAMED["ids"][index])
    assert torch.equal(two.gallery["x/values"], X[index]) and torch.equal(two.gallery["x_adv/ids"], NAMED["ids"][index])
    with torch.no_grad():
        wrong = NET(two.gallery["x_adv/values"]).argmax(1)
    assert torch.equal(wrong, two.gallery["adversarial_prediction"]) and bool((wrong != Y[index]).all())


def test_named_inputs_of_different_lengths_in_different_batches(tmp_path: Path) -> None:
    batches = cut(NAMED)
    batches[1][0]["ids"] = torch.cat([batches[1][0]["ids"], 1 + batches[1][0]["ids"]], 1)
    found = named(tmp_path, batches, gallery_size=30)
    index, ids = found.gallery["index"], found.gallery["x/ids"]
    longer = (index >= 7) & (index < 14)
    assert bool(longer.any()) and bool((~longer).any()) and ids.shape == (len(index), 4)
    assert torch.equal(ids[:, :2], NAMED["ids"][index])
    assert bool((ids[longer, 2:] > 0).all()) and not ids[~longer, 2:].any()
    check_same(named(tmp_path, batches, gallery_size=30), found)


def test_named_inputs_are_kept_and_told_apart(tmp_path: Path) -> None:
    whole = named()
    check_same(named(tmp_path), whole)
    stamps = [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("*.npz"))]
    check_same(named(tmp_path), whole)
    assert [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("*.npz"))] == stamps
    other = cut({**NAMED, "ids": NAMED["ids"].index_fill(0, torch.tensor([8]), 99)})
    named(tmp_path, other)
    changed = [p.stat().st_mtime_ns for p in sorted(tmp_path.glob("*.npz"))]
    assert [a != b for a, b in zip(stamps, changed, strict=True)] == [False, True, False, False, False]
    with np.load(tmp_path / "000000.npz", allow_pickle=False) as file:
        assert "gallery/x/values" in file.files


# Radii that are no field -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """A threat with a radius that is worked out: `share` of a budget."""

    inner: Any
    share: float = 1.0

    @property
    def radius(self) -> float:
        return self.share

    def at(self, factor: float) -> Any:
        return Shares(self.inner, self.share * factor)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("inner", "take", "per_example"):
            raise AttributeError(name)
        return getattr(self.inner.at(self.share), name)

    def size(self, x: Any, z: Tensor) -> Tensor:
        return self.inner.size(x, z) / self.inner.radius


def test_a_radius_that_is_no_field_has_a_curve() -> None:
    def relative(threat: Any) -> Any:
        return fgsm(threat.inner.at(threat.share))

    def absolute(threat: Any) -> Any:
        return fgsm(threat)

    plain = measure(NET, cut(), THREAT, [absolute], curve=(0.5, 2.0))
    shares: Any = Shares(THREAT)
    found = measure(NET, cut(), shares, [relative], curve=(0.5, 2.0))
    assert [radius for radius, _ in found.curve] == [0.0, 0.5, 1.0, 2.0]
    assert [share for _, share in found.curve] == [share for _, share in plain.curve]
    assert len({share.count for _, share in found.curve}) == 4
    torch.testing.assert_close(found.table["size"] * 0.05, plain.table["size"])


# Metrics of one's own --------------------------------------------------------------------------------------------


def test_metrics_of_ones_own() -> None:
    seen = []

    def mine(table: Any) -> Any:
        seen.append(sorted(table))
        return {"of_class_0": wilson(int(table["robust"][table["label"] == 0].sum()), int((table["label"] == 0).sum()))}

    found = measure(NET, cut(), THREAT, [fgsm], curve=(), metrics=mine)
    assert list(found.metrics) == ["of_class_0"] and found.certified is None and found.attack_success is None
    assert "certified" not in seen[0], "nothing was asked to certify"
    measure(NET, cut(), THREAT, [fgsm], curve=(), metrics=mine, certify=lambda m, x, y, t, noise: -torch.ones(len(y)))
    assert "certified" in seen[1]
    with pytest.raises(KeyError, match="robust_accuracy"):
        _ = found.robust
