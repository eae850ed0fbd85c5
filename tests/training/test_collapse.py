"""The guard against collapse: what it reads, when it speaks, and that a rescued run resumes to the same bits."""

from __future__ import annotations

import io
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparring.core.batches import Batches
from sparring.training.collapse import CollapseGuard, Variety
from sparring.training.gan import Gan, build_pair
from sparring.training.guard import Rollback, Stop, Wait
from sparring.training.loop import TrainingResult, train
from sparring.training.state import TrainingState

NUM, CLASSES = 64, 4
LABELS = torch.arange(NUM) % CLASSES


def real_images(seed: int) -> Tensor:
    """Class k is bright in quarter k of 8x8 pixels, and noisy everywhere."""
    x = 0.3 * torch.rand(NUM, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    for i, k in enumerate(LABELS.tolist()):
        x[i, 0, 4 * (k // 2) : 4 * (k // 2) + 4, 4 * (k % 2) : 4 * (k % 2) + 4] += 0.6
    return x


def classify(x: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(x, 4).flatten(1).argmax(1)


class Makes(nn.Module):
    """A pair whose generator gives out these images, whatever the noise; d is a number for real and for them."""

    def __init__(self, images: Tensor, gap: float = 0.0) -> None:
        super().__init__()
        self.images, self.gap, self.weight = images, gap, nn.Parameter(torch.zeros(1))
        self.g = _Callable(self)
        self.seen = 0

    def d(self, x: Tensor, y: Tensor) -> Tensor:
        self.seen += 1
        return torch.full((len(x),), self.gap if self.seen % 2 else 0.0)


class _Callable:
    num_noise = 2

    def __init__(self, pair: Makes) -> None:
        self.pair = pair

    def parameters(self) -> Any:
        return self.pair.parameters()

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return self.pair.images


GUARD = CollapseGuard.against(real_images(0), LABELS, classify, num_classes=CLASSES, count=NUM)


def verdicts(images: Tensor, num: int, guard: CollapseGuard = GUARD, gap: float = 0.0, **state: Any) -> list[Any]:
    """What the guard says at its first looks after the warm-up."""
    now = SimpleNamespace(
        model=Makes(images, gap), step=guard.warm_up, notes={}, rollbacks=[], good={"step": 0}, **state
    )
    found = []
    for _ in range(num):
        found.append(guard(now))  # type: ignore[arg-type]
        now.step += guard.every
    return [type(verdict) for verdict in found]


def test_variety_is_that_of_a_search_through_all_pairs() -> None:
    x = real_images(1)
    apart = [min(float((u - v).norm()) for j, v in enumerate(x) if j != i) for i, u in enumerate(x)]
    found = Variety.of(x, classify, CLASSES)
    assert found.spread == pytest.approx(sum(apart) / NUM, rel=1e-4)
    assert found.entropy == pytest.approx(1) and found.shares == (0.25,) * 4
    assert Variety.of(x[LABELS == 2], classify, CLASSES).entropy == 0
    assert Variety.of(x, None, CLASSES).shares == ()


def test_other_real_images_raise_no_alarm() -> None:
    assert verdicts(real_images(5), 8) == [type(None)] * 8


@pytest.mark.parametrize("what", ["one image", "few images", "one class", "a class is missing"])
def test_each_kind_of_collapse_is_taken_back_at_the_third_look(what: str) -> None:
    real = real_images(6)
    images = {
        "one image": real[:1].repeat(NUM, 1, 1, 1),
        "few images": real[:8].repeat(NUM // 8, 1, 1, 1),  # every class is there: only the spread tells
        "one class": real[LABELS == 3].repeat(4, 1, 1, 1) + 0.02 * real,
        "a class is missing": torch.cat([real[LABELS != 0], real_images(7)[LABELS == 1]]),
    }[what]
    first = [Wait, Wait, Rollback]
    assert verdicts(images, 3) == first if what != "a class is missing" else verdicts(images, 5)[:2] == [Wait, Wait]
    assert Rollback in verdicts(images, 6)


def test_silent_in_the_warm_up_and_early_signs_are_no_place_to_go_back_to() -> None:
    now = SimpleNamespace(model=None, step=GUARD.warm_up - 1, notes={}, rollbacks=[], good={"step": 0})
    assert isinstance(GUARD(now), Wait) and now.notes == {}  # type: ignore[arg-type]
    assert verdicts(real_images(5), 6, gap=5.0) == [Wait] * 6


def test_it_adds_r1_halves_the_rate_doubles_and_in_the_end_stops() -> None:
    now = SimpleNamespace(
        model=Makes(real_images(0)[:1].repeat(NUM, 1, 1, 1)), step=250, notes={}, rollbacks=[], good={"step": 300}
    )
    gammas = []
    for _ in range(200):
        verdict = GUARD(now)  # type: ignore[arg-type]
        now.step += GUARD.every
        if isinstance(verdict, Rollback):
            assert verdict.rate_factor == 0.5
            gammas.append(verdict.options["gamma"])
            now.rollbacks.append({})
        if isinstance(verdict, Stop):
            break
    assert gammas == [1, 2, 4, 8, 16]
    assert isinstance(verdict, Stop) and "smaller learning rate" in verdict.sentence
    strong = replace(GUARD, gamma=10.0, patience=1)
    now.rollbacks, now.notes = [], {}
    assert strong(now).options == {"gamma": 10}  # type: ignore[arg-type,union-attr]


def rescued(resume: Any = None, observe: Any = None, guard: Any = None) -> TrainingResult:
    """20 steps in 2 epochs of a pair under a guard that finds everything bad from step 4 on, so it goes back."""
    pair = build_pair((1, 8, 8), CLASSES, seed=0)
    optimizer = torch.optim.Adam(pair.parameters(), lr=4e-3, betas=(0.0, 0.99), fused=True)
    batches = Batches(real_images(0), LABELS, 6, seed=1, shuffle=True, drop_last=True)
    strict = replace(GUARD, least_spread=10.0, every=2, warm_up=4, patience=2)
    return train(
        pair, batches, Gan(gamma=0.0), optimizer, num_epochs=2, guard=guard or strict, averaging=0.9, resume=resume,
        observe=observe, seed=3,
    )  # fmt: skip


def test_killed_around_a_rescue_it_ends_in_the_same_bits() -> None:
    states: list[bytes] = []

    def observe(state: TrainingState) -> None:
        kept = io.BytesIO()
        torch.save(state.to_dict(), kept)
        states.append(kept.getvalue())

    whole = rescued(observe=observe)
    assert len(whole.rollbacks) >= 2 and {line["back_to"] for line in whole.rollbacks} == {0}
    assert "gamma 1 and half the rate" in whole.rollbacks[0]["reason"]
    assert whole.history[1]["train_penalty"] > 0  # R1 is on since
    for kept in states[3::2]:
        again = rescued(resume=torch.load(io.BytesIO(kept), weights_only=True))
        for name in ("last", "averaged"):
            assert all(torch.equal(getattr(again, name)[k], v) for k, v in getattr(whole, name).items())
        assert again.rollbacks == whole.rollbacks


def test_a_moment_that_waits_is_gone_back_beyond_also_over_the_end_of_an_epoch() -> None:
    learned: dict[int, Tensor] = {}
    counts: dict[int, dict[str, int]] = {}

    class Waits:
        every = 2

        def __call__(self, state: TrainingState) -> Rollback | Wait | None:
            learned[state.step] = state.model.g.body[0].weight.detach().clone()  # type: ignore[union-attr,index]
            return {4: None, 14: Rollback()}.get(state.step, Wait())

    def observe(state: TrainingState) -> None:
        learned[100 + state.step], counts[state.step] = _weight(state), dict(state.counts)

    seen = rescued(guard=Waits(), observe=observe)
    assert [(line["step"], line["back_to"]) for line in seen.rollbacks] == [(14, 4)]
    assert torch.equal(learned[114], learned[104]) and not torch.equal(learned[114], learned[14])
    assert counts[13]["loss"] == 18 and counts[14] == {} and counts[15]["loss"] == 6  # of the epoch that goes on


def _weight(state: TrainingState) -> Tensor:
    return state.model.g.body[0].weight.detach().clone()  # type: ignore[union-attr,index]
