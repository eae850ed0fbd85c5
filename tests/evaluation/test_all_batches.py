"""What was computed before is not computed again, gives the same, and never counts where it does not belong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alike import check_same
from contracts import rand, seeded
from sparring.attacks.catalogue import fgsm, pgd
from sparring.core.types import AttackResult, Cost
from sparring.evaluation.all_batches import Progress
from sparring.evaluation.kept import OtherSettings
from sparring.evaluation.measure import measure
from sparring.evaluation.preflight import PreflightError
from sparring.threats import Linf

NUM, DIM = 33, 5
X = rand(NUM, DIM, seed=3)
NAMES = [f"{i:06d}.npz" for i in range(5)]


class Noisy(nn.Module):
    """Random in evaluation mode, too."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(DIM, 9), nn.Tanh(), nn.Linear(9, 3))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        out = 4 * self.body(x)
        return out + self.scale * torch.randn_like(out) if self.scale else out


def network(scale: float = 0.0) -> nn.Module:
    model = seeded(lambda: Noisy(0.0)).double().eval()
    with torch.no_grad():
        model.body[2].bias -= model(X).median(0).values / 4
    model.scale = scale
    return model


MODEL = network()
Y = MODEL(X).argmax(1)
Y[::7] = (Y[::7] + 1) % 3


def cut(size: int = 7, x: Tensor = X, y: Tensor = Y) -> list[tuple[Tensor, Tensor]]:
    return list(zip(x.split(size), y.split(size), strict=True))


class Dying:
    """PGD that fails from its `last`-th call on; `calls` counts them."""

    def __init__(self, last: float = float("inf")) -> None:
        self.last, self.calls = last, 0
        self.__name__ = "dying"

    def __call__(self, threat: Any) -> Any:
        inner = pgd(threat, num_steps=3)

        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> AttackResult:
            self.calls += 1
            if self.calls > self.last:
                raise RuntimeError("the power is out")
            return inner(model, x, y, noise=noise)

        attack.__name__ = "dying"
        return attack


def run(parts: Path | None = None, attack: Any = None, model: Any = MODEL, batches: Any = None, **options: Any) -> Any:
    options = {"threat": Linf(0.05), "curve": (0.5, 2.0), "curve_stages": [fgsm], "seed": 3, **options}
    attacks = options.pop("attacks", [attack or Dying()])
    return measure(model, cut() if batches is None else batches, stages=attacks, keep=parts, **options)


WHOLE = run()


def test_the_case_is_no_easy_one() -> None:
    assert 0 < WHOLE.robust.count < WHOLE.clean.count < NUM and len(WHOLE.gallery["index"]) > 2
    assert len({share.count for _, share in WHOLE.curve}) == 4


@pytest.mark.parametrize("scale", [0.0, 0.3])
@pytest.mark.parametrize("last", [0, 1, 3, 4])
def test_an_evaluation_that_dies_goes_on(tmp_path: Path, scale: float, last: int) -> None:
    model = network(scale)
    whole = run(model=model)
    with pytest.raises(RuntimeError, match="the power is out"):
        run(tmp_path / "parts", Dying(last), model)
    kept = sorted(p.name for p in (tmp_path / "parts").glob("*.npz")) if last else []
    assert kept == NAMES[:last] and (tmp_path / "parts").exists() == bool(last)
    again = Dying()
    check_same(run(tmp_path / "parts", again, model), whole)
    assert again.calls == 5 - last, "what was done was done again"
    idle = Dying()
    check_same(run(tmp_path / "parts", idle, model), whole)
    assert idle.calls == 0 and sorted(p.name for p in (tmp_path / "parts").iterdir()) == [*NAMES, "settings.json"]


def damage(how: str, folder: Path) -> None:
    path = folder / NAMES[1]
    data = path.read_bytes()
    if how == "half a file":
        path.write_bytes(data[: len(data) // 2])
    elif how == "not in place yet":
        path.rename(folder / f".{NAMES[1]}.other-1.part")
    elif how == "a changed bit":
        middle = data.index(b"table/size")  # inside the numbers of a column
        path.write_bytes(data[: middle + 300] + bytes([data[middle + 300] ^ 1]) + data[middle + 301 :])
    elif how == "of another batch":
        path.write_bytes((folder / NAMES[2]).read_bytes())
    elif how == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize("how", ["half a file", "not in place yet", "a changed bit", "of another batch", "empty"])
def test_a_damaged_part_is_computed_again(tmp_path: Path, how: str) -> None:
    run(tmp_path)
    damage(how, tmp_path)
    again = Dying()
    check_same(run(tmp_path, again), WHOLE)
    assert again.calls == 1
    check_same(run(tmp_path, Dying(0)), WHOLE)


def test_other_examples_are_computed_again(tmp_path: Path) -> None:
    run(tmp_path)
    x, y = X.clone(), Y.clone()
    x[9, 2] += 1e-9
    y[20] = (y[20] + 1) % 3
    for batches, num in ((cut(x=x), 1), (cut(y=y), 1), (cut(x=x.flip(0), y=y.flip(0)), 5), (cut(8), 5)):
        run(tmp_path)
        again = Dying()
        check_same(run(tmp_path, again, batches=batches), run(batches=batches))
        assert again.calls == num


def test_parts_of_more_batches_do_not_count(tmp_path: Path) -> None:
    run(tmp_path)
    fewer = Dying()
    check_same(run(tmp_path, fewer, batches=cut()[:3]), run(batches=cut()[:3]))
    assert fewer.calls == 0


other = network()
with torch.no_grad():
    other.body[0].weight[0, 0] += 1e-9

SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "seed": ({"seed": 4}, r"seed \(3 there, 4 here\)"),
    "threat": ({"threat": Linf(0.06)}, "attacks, curve_attacks, threat"),
    "radii": ({"threat": Linf(torch.full((NUM,), 0.05))}, "attacks, curve_attacks, threat"),
    "attacks": ({"attacks": [fgsm]}, "attacks"),
    "curve": ({"curve": (0.5,)}, "curve"),
    "attacks of the curve": ({"curve_stages": [pgd]}, "curve_attacks"),
    "weights": ({"model": other}, "model"),
    "certificate": ({"certify": lambda m, x, y, t, noise: -torch.ones(len(y))}, "certify"),
    "about": ({"about": "other data"}, r"about \('' there, 'other data' here\)"),
    "gallery": ({"gallery_size": 3}, r"gallery_size \(12 there, 3 here\)"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_other_settings_are_refused(tmp_path: Path, name: str) -> None:
    options, sentence = SETTINGS[name]
    run(tmp_path, batches=cut()[:1])
    before = (tmp_path / NAMES[0]).read_bytes()
    with pytest.raises(OtherSettings, match=rf"batches of an evaluation with other settings: {sentence}\."):
        run(tmp_path, batches=cut()[:1], **options)
    assert (tmp_path / NAMES[0]).read_bytes() == before and len(list(tmp_path.iterdir())) == 2


def test_attacks_that_differ_in_an_option_differ(tmp_path: Path) -> None:
    one, two = partial(pgd, num_steps=3), partial(pgd, num_steps=4)
    run(tmp_path, one)
    run(tmp_path, partial(pgd, num_steps=3))
    with pytest.raises(OtherSettings, match="attacks"):
        run(tmp_path, two)
    with pytest.raises(OtherSettings, match="attacks"):
        run(tmp_path, lambda threat: pgd(threat, num_steps=3))
    starts = [torch.rand(NUM, DIM, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in (0, 1)]
    wanted = [lambda threat, s=s: pgd(threat, num_steps=1, wanted=(3 * s[:, 0]).long()) for s in starts]
    run(tmp_path / "a", wanted[0])
    with pytest.raises(OtherSettings, match="attacks"):  # the same shape, lowest and highest class
        run(tmp_path / "a", wanted[1])


def by_hand(length: float) -> Any:
    """A hand-written attack: one step of that share of the radius."""

    def make(threat: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> AttackResult:
            z = threat.project(x, length * threat.radius * torch.ones_like(x))
            return AttackResult(threat.realize(x, z), z, threat.size(x, z), None, None, Cost())

        return attack

    return make


def test_hand_written_attacks_differ_by_their_code(tmp_path: Path) -> None:
    def other(threat: Any) -> Any:
        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> AttackResult:
            z = threat.project(x, -1.0 * threat.radius * torch.ones_like(x))
            return AttackResult(threat.realize(x, z), z, threat.size(x, z), None, None, Cost())

        return attack

    other.__name__ = "make"
    run(tmp_path, by_hand(0.5))
    run(tmp_path, by_hand(0.5))
    for changed in (by_hand(0.6), other):
        with pytest.raises(OtherSettings, match=r"settings: attacks\."):
            run(tmp_path, changed)


def test_a_stream_that_is_read_once_goes_on(tmp_path: Path) -> None:
    alive: list[int] = []

    def stream() -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in cut():
            yield x.clone(), y
            alive.append(1)

    with pytest.raises(RuntimeError, match="power"):
        run(tmp_path, Dying(3), batches=stream())
    assert len(alive) == 3, "the stream was read ahead"
    check_same(run(tmp_path, batches=stream()), WHOLE)


def test_nothing_is_left_where_nothing_was_done(tmp_path: Path) -> None:
    with pytest.raises(PreflightError):
        run(tmp_path / "parts", batches=cut(y=Y + 5))
    assert not (tmp_path / "parts").exists()


def progress(make: Callable[[], Any]) -> list[Progress]:
    told: list[Progress] = []
    make_now: Any = make
    make_now(told.append)
    return told


def test_what_was_done_before_does_not_count_as_work(tmp_path: Path) -> None:
    run(tmp_path)
    for name in (NAMES[1], NAMES[4]):
        (tmp_path / name).unlink()
    told = progress(lambda observe: run(tmp_path, observe=observe))
    assert {(now.batches, now.kept) for now in told} == {(5, 3)}
    assert [now.done for now in told] == [7, 7, 7, 7, 7, 14, 21, 28, 28, 28, 28, 28, 33][: len(told)]
    stages = 4  # clean, the attack, and one attack at two radii
    wanted = [0.0, *(i / 8 for i in range(stages)), 0.5, 0.5, 0.5, *(0.5 + i / 8 for i in range(stages)), 1.0]
    assert [now.fraction for now in told] == pytest.approx(wanted)
    assert told[0].cost.forwards > 0 and told[-1].cost == WHOLE.cost


def test_the_length_of_a_stream_is_unknown() -> None:
    told = progress(lambda observe: run(batches=iter(cut()), observe=observe))
    assert {(now.batches, now.fraction, now.kept) for now in told} == {(None, None, 0)} and told[-1].done == NUM
