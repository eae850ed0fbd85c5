"""The guard against collapse: what it sees by networks made for it, what it does, and that a run resumes through it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts import seeded
from sparring.app.settings import TrainingSettings
from sparring.app.train_run import start_run
from sparring.attacks.around import seeking
from sparring.core.batches import Batches
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.threats import Linf
from sparring.training.guard import Rollback, Stop, Wait
from sparring.training.loop import train
from sparring.training.one_step import fgsm_rs
from sparring.training.recipes import pgd_at
from sparring.training.schedules import Ramp, Ramped
from sparring.training.state import TrainingState
from sparring.training.watch import Reaction, Switched, Watch, look

DRAW = torch.Generator().manual_seed(0)
X, Y = torch.rand(60, 6, generator=DRAW), torch.arange(60) % 3
X[torch.arange(60), Y] += 1.0
X /= 2


def linear() -> nn.Module:
    return seeded(lambda: nn.Linear(6, 3))


class Saturated(nn.Module):
    """Always right on X, with logits so far apart that the loss has no gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return 1e6 * x[:, :3]


class Always(nn.Module):
    """Answers with class 1, whatever comes."""

    def forward(self, x: Tensor) -> Tensor:
        return F.one_hot(torch.ones(len(x), dtype=torch.long), 3) + 0.01 * x[:, :3]


def test_a_look_is_what_it_says() -> None:
    found = look(Always(), X, Y, Linf(0.05))
    assert found["clean"] == found["multi_step"] == found["noise"] == pytest.approx(1 / 3)
    assert found["largest"] == pytest.approx(2 / 3) and found["flat"] == 0.0
    found = look(Saturated(), X, Y, Linf(0.05))
    assert found["clean"] > 0.9 and found["flat"] > 0.9
    model = nn.Linear(6, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3, 6))
        model.bias.zero_()
    found = look(model, X, Y, Linf(0.1))
    own, others = X.gather(1, Y[:, None])[:, 0], X[:, :3].scatter(1, Y[:, None], -1).amax(1)
    stands = ((own - 0.1).clamp_min(0) > (others + 0.1).clamp_max(1)).double().mean()
    assert found["multi_step"] == pytest.approx(float(stands)) == found["unmasked"]
    assert found["loss"] == pytest.approx(float(F.cross_entropy(model(X), Y).detach()))


SOUND = {
    "clean": 0.9, "one_step": 0.7, "multi_step": 0.6, "noise": 0.85, "unmasked": 0.58, "loss": 0.3, "classes": 10.0,
    "largest": 0.02, "flat": 0.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "change", "looks", "words"),
    [
        ("divergence", {"loss": 5.0, "clean": 0.3}, 1, "the clean loss is 5.00"),
        ("constant", {"largest": 0.8}, 5, "one answer is given 80.0%"),
        ("constant", {"largest": 0.8, "flat": 0.6}, 2, "one answer is given 80.0%"),
        ("masking", {"unmasked": 0.85}, 1, "60.0% stand the gradient, and 85.0% what does not trust it"),
        ("dying", {"flat": 0.6}, 1, "60.0% of the held-out examples have no gradient"),
        ("catastrophic", {"one_step": 0.9, "multi_step": 0.1, "unmasked": 0.1}, 1, "90.0% stand one step"),
        ("masking", {"unmasked": 0.2}, 1, "60.0% stand the gradient, and 20.0% what does not trust it"),
        ("overfitting", {"multi_step": 0.5, "unmasked": 0.5, "one_step": 0.6}, 3, "at best 58.0% did"),
    ],
)
def test_each_kind_is_seen_when_it_is_due(
    monkeypatch: pytest.MonkeyPatch, kind: str, change: dict[str, float], looks: int, words: str
) -> None:
    figures: list[dict[str, float]] = [SOUND]
    monkeypatch.setattr("sparring.training.watch.look", lambda *given: figures[0])
    for reaction in ("slower", "anneal", "multi-step", "ramp", "stop", "off"):
        guard = Watch(Linf(0.1), X, Y, **{kind: reaction})  # type: ignore[arg-type]
        state = TrainingState(linear(), torch.optim.SGD(linear().parameters(), 0.1), None, step=30, total=100)
        figures[0] = SOUND
        assert [guard(state) for _ in range(6)] == [None] * 6
        figures[0] = {**SOUND, **change}
        early = [guard(state) for _ in range(looks - 1)]
        assert all(verdict is None or isinstance(verdict, Wait) for verdict in early)
        verdict: Any = guard(state)
        if reaction == "off":
            assert verdict is None or isinstance(verdict, Wait)
            continue
        said = verdict.sentence if isinstance(verdict, Stop) else verdict.reason
        assert words in said and "at step 30" in said
        want: dict[str, Any] = {"multi-step": {"use_other": True}, "ramp": {"anew": (0.3, 0.5)}}
        assert isinstance(verdict, Stop) == (reaction == "stop")
        if isinstance(verdict, Rollback):
            assert verdict.options == want.get(reaction, {})
            factor = {"slower": 0.25, "anneal": 0.05}.get(reaction, 1.0)
            assert verdict.rate_factor == factor
            assert (f"{factor:g} of the learning rate" in said) == (factor < 1)


def test_a_network_that_only_ever_stood_one_step_is_seen_at_the_third_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has nothing to fall from; while the radius grows the two lie apart for a look or two."""
    found = {**SOUND, "one_step": 0.4, "multi_step": 0.1, "unmasked": 0.1}
    guard, verdicts = Watch(Linf(0.1), X, Y), list[Any]()
    state = TrainingState(linear(), torch.optim.SGD(linear().parameters(), 0.1), None, step=30, total=100)
    for now in (found, found, SOUND | {"one_step": 0.2, "multi_step": 0.1, "unmasked": 0.1}, found, found, found):
        monkeypatch.setattr("sparring.training.watch.look", lambda *given, now=now: now)
        verdicts.append(guard(state))
    assert [type(verdict) for verdict in verdicts] == [Wait, Wait, type(None), Wait, Wait, Rollback]
    assert "40.0% stand one step of attack and 10.0% ten" in verdicts[-1].reason


@pytest.mark.parametrize("change", [{"largest": 0.4}, {"flat": 0.3}])
def test_half_as_bad_is_no_place_to_go_back_to(monkeypatch: pytest.MonkeyPatch, change: dict[str, float]) -> None:
    monkeypatch.setattr("sparring.training.watch.look", lambda *given: SOUND | change)
    state = TrainingState(linear(), torch.optim.SGD(linear().parameters(), 0.1), None, step=30, total=100)
    assert isinstance(Watch(Linf(0.1), X, Y)(state), Wait)


def test_a_fall_that_noise_may_explain_is_told_when_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 128 examples 41 % and 48 % differ by little more than chance, and one step leaves 62 %: nothing is lost."""
    guard, verdicts = Watch(Linf(0.1), X, Y), list[Any]()
    state = TrainingState(linear(), torch.optim.SGD(linear().parameters(), 0.1), None, step=30, total=100)
    for many in (0.48, 0.41, 0.48, 0.41, 0.41, 0.41):
        now = SOUND | {"one_step": 0.62, "multi_step": many, "unmasked": many}
        monkeypatch.setattr("sparring.training.watch.look", lambda *given, now=now: now)
        verdicts.append(guard(state))
    assert [type(verdict) for verdict in verdicts] == [type(None), Wait, type(None), Wait, Wait, Rollback]


def test_overfitting_goes_back_to_where_it_was_best(monkeypatch: pytest.MonkeyPatch) -> None:
    state = TrainingState(linear(), torch.optim.SGD(linear().parameters(), 0.1), None, step=30, total=100)
    guard, verdicts = Watch(Linf(0.1), X, Y), list[Any]()
    for value in (0.58,) * 5 + (0.5, 0.5, 0.5):
        now = SOUND | {"one_step": 0.6, "multi_step": value, "unmasked": value}
        monkeypatch.setattr("sparring.training.watch.look", lambda *given, now=now: now)
        verdicts.append(guard(state))
    assert [type(verdict) for verdict in verdicts[5:]] == [Wait, Wait, Rollback]
    assert verdicts[-1].rate_factor == 0.05 and "53.2% stand over the last five looks" in verdicts[-1].reason


def test_while_the_radius_grows_it_looks_at_what_is_reached_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that never met the whole radius stands one step of it far better than ten, and is sound."""
    seen: list[float] = []

    def looked(*given: Any) -> dict[str, float]:
        seen.append(given[-1].radius)
        return SOUND | ({"one_step": 0.2, "multi_step": 0.1, "unmasked": 0.1} if seen[-1] == 0.1 else {})

    monkeypatch.setattr("sparring.training.watch.look", looked)
    guard, recipe = Watch(Linf(0.1), X, Y), Ramped(pgd_at(Linf(0.1)), Ramp(0.5))
    state = TrainingState(linear(), torch.optim.SGD(linear().parameters(), 0.1), None, total=100, recipe=recipe)
    verdicts = []
    for step in (*range(0, 50, 5), *range(50, 100, 10)):
        state.step = step
        verdicts.append(guard(state))
    assert verdicts == [None] * 15, "robust accuracy that falls because the radius grew is no overfitting"
    assert seen == pytest.approx([0.01 * number for number in range(10)] + [0.1] * 5)


def test_each_further_way_back_slows_the_run_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparring.training.watch.look", lambda *given: SOUND | {"flat": 0.9})
    found: dict[str, list[float]] = {"slower": [], "ramp": []}
    for reaction, factors in found.items():
        state = TrainingState(linear(), torch.optim.SGD(linear().parameters(), 0.1), None, step=30, total=100)
        verdict: Any = None
        while not isinstance(verdict, Stop):
            verdict = Watch(Linf(0.1), X, Y, dying=reaction)(state)  # type: ignore[arg-type]
            if isinstance(verdict, Rollback):
                factors.append(verdict.rate_factor)
                state.rollbacks.append({})
    assert found == {"slower": [1 / 4, 1 / 16, 1 / 64, 1 / 256], "ramp": [1, 1 / 4, 1 / 16, 1 / 64]}


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("dying", {"flat": 0.9, "unmasked": 0.3}),
        ("catastrophic", {"one_step": 0.9, "multi_step": 0.4, "unmasked": 0.4}),
    ],
)
def test_what_many_steps_answer_is_not_answered_again(
    monkeypatch: pytest.MonkeyPatch, kind: str, change: dict[str, float]
) -> None:
    """The loss of a network with large logits stays flat when the attack on it climbs the margin; and one step is no
    longer what is trained on."""
    monkeypatch.setattr("sparring.training.watch.look", lambda *given: SOUND | change)
    state = TrainingState(linear(), torch.optim.SGD(linear().parameters(), 0.1), None, step=30, total=100)
    state.recipe, guard = Switched(recipe=pgd_at(Linf(0.1)), other=pgd_at(Linf(0.1))), Watch(Linf(0.1), X, Y)
    assert isinstance([guard(state) for _ in range(3)][-1], Rollback)
    state.options = {"use_other": True}
    assert [guard(state) for _ in range(4)] == [None] * 4
    slower = Watch(Linf(0.1), X, Y, **{kind: "slower"})  # type: ignore[arg-type]
    assert isinstance([slower(state) for _ in range(3)][-1], Rollback)


def test_many_steps_climb_the_margin_of_a_network_whose_loss_is_flat() -> None:
    by_loss = pgd_at(Linf(0.3))
    by_margin = replace(by_loss, attack=seeking(by_loss.attack, margin))
    noise = Noise.make(0, "test", torch.arange(len(X)))
    right = Saturated()(X).argmax(1) == Y
    stands = [
        (Saturated()(r.craft(Saturated(), X, Y, noise=noise)).argmax(1) == Y)[right] for r in (by_loss, by_margin)
    ]
    assert stands[0].double().mean() > 0.9 and stands[1].double().mean() < 0.5


def test_after_the_last_way_back_it_stops() -> None:
    guard = Watch(Linf(0.05), X, Y, num_rollbacks=1)
    state = TrainingState(Saturated(), torch.optim.SGD(linear().parameters(), 0.1), None, step=7, total=10)
    assert isinstance(guard(state), Rollback)
    state.rollbacks = [{"step": 7}]
    verdict = guard(state)
    assert isinstance(verdict, Stop) and "It came after 1 ways back" in verdict.sentence


@pytest.mark.parametrize("reaction", ["slower", "multi-step", "ramp"])
def test_killed_before_and_after_the_way_back_it_ends_in_the_same_bits(reaction: Reaction) -> None:
    """A rate that is far too large makes the guard go back for real."""

    def run(**options: Any) -> Any:
        model = seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3)))
        one, many = (Ramped(builder(Linf(0.05)), Ramp(0.3)) for builder in (fgsm_rs, pgd_at))
        guard = Watch(
            Linf(0.05), X, Y, every=3, num_rollbacks=50, dying=reaction, divergence=reaction, constant=reaction,
            masking="off", overfitting="off", catastrophic="off",
        )  # fmt: skip
        optimizer = torch.optim.SGD(model.parameters(), 1e5, momentum=0.9)
        batches = Batches(X, Y, 20, seed=1, shuffle=True)
        recipe = Switched(recipe=one, other=many)
        return train(model, batches, recipe, optimizer, num_epochs=3, averaging=0.9, guard=guard, **options)

    whole, states = seeded(run, 1), []
    assert whole.rollbacks, "there was something to go back from"
    seeded(lambda: run(observe=lambda state: states.append(state.to_dict())), 1)
    assert len(states) == 9
    for state in states[:-1]:
        kept = io.BytesIO()
        torch.save(state, kept)
        kept.seek(0)
        loaded = torch.load(kept, weights_only=True)
        again = seeded(lambda loaded=loaded: run(resume=loaded), 2)
        assert again.rollbacks == whole.rollbacks
        for one, two in ((again.last, whole.last), (again.averaged, whole.averaged)):
            assert all(torch.equal(one[name].nan_to_num(7), value.nan_to_num(7)) for name, value in two.items())


def test_a_switch_and_a_second_growth_do_what_they_say() -> None:
    one, many = (Ramped(builder(Linf(0.2)), Ramp(0.0)) for builder in (fgsm_rs, pgd_at))
    assert Switched(recipe=one, other=many).at(0.5).attack.num_steps == 1
    assert Switched(recipe=one, other=many, use_other=True).at(0.5).attack.num_steps == 10
    again = Ramped(fgsm_rs(Linf(0.2)), Ramp(0.0), anew=(0.4, 0.6))
    radii = [again.at(progress).attack.threat.radius for progress in (0.4, 0.5, 0.6, 0.9)]
    assert radii == pytest.approx([0.0, 0.1, 0.2, 0.2])


def test_the_setting_is_checked_and_used(tmp_path: Path) -> None:
    own: dict[str, Any] = {"data": "digits", "threat": "linf:0.1", "model": "mlp", "epochs": 1}
    for text, words in (
        ("watch:gap=2", "shares between 0 and 1"),
        ("watch:constant=sleep", "is not one of slower, anneal, multi-step, ramp, stop, off"),
        ("sleep", "guard 'sleep' is unknown; there are watch"),
    ):
        with pytest.raises(ValueError, match=words):
            start_run(TrainingSettings(**own, guard=text), tmp_path / "run")
    with pytest.raises(ValueError, match="watch: dying='sleep' is not one of slower, anneal, "):
        Watch(Linf(0.1), X, Y, dying="sleep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the recipe standard attacks nothing"):
        start_run(TrainingSettings(**own, recipe="standard", guard="watch"), tmp_path / "run")
    found = start_run(TrainingSettings(**own, recipe="fgsm-rs", guard="watch:every=10"), tmp_path / "run")
    assert found.rollbacks == [] and found.stopped is None
