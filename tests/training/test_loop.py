"""The training loop: resumed to the same bits, stopped when it breaks, best chosen, averaged as by hand."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from contracts import rand, seeded
from sparring.attacks.catalogue import pgd
from sparring.core.batches import Batches
from sparring.core.machine import Machine
from sparring.modalities.images import crop_and_flip
from sparring.threats import Linf
from sparring.training.guard import NonFinite, Rollback, Stop, first_trouble
from sparring.training.loop import TrainingResult, train
from sparring.training.recipes import Standard, pgd_at
from sparring.training.schedules import Constant, Cosine, OneCycle, Piecewise, Ramp, Ramped
from sparring.training.state import Average, TrainingState

X, Y = rand(10, 2, 3, 3, seed=4).float(), torch.arange(10) % 3
PLAIN = [(X[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
EPOCHS, STEPS = 3, 9


def network() -> nn.Module:
    return seeded(
        lambda: nn.Sequential(
            nn.Flatten(), nn.Linear(18, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 3)
        )
    )


def linear() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(18, 3)))


def sgd(model: nn.Module, rate: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate)


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Examples with noise from the global generator, as most augmentations draw it."""

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (X[index] + 0.1 * torch.rand(X.shape[1:])).clamp(0, 1), Y[index]


SOURCES: dict[str, Callable[[], Any]] = {
    "list": lambda: PLAIN,
    "batches": lambda: Batches(X, Y, 4, seed=3, shuffle=True, augment=crop_and_flip(crop=1, flip=True)),
    "loader": lambda: DataLoader(Augmented(), batch_size=4, shuffle=True),
}


def bits(value: Any) -> Any:
    """State dicts and histories as something that compares exactly; seconds differ from run to run."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: bits(v) for name, v in value.items() if name != "seconds"}
    return [bits(v) for v in value] if isinstance(value, list) else value


def outcome(result: TrainingResult) -> dict[str, Any]:
    names = ("best", "last", "averaged", "best_epoch", "history", "stopped", "rollbacks")
    return {name: bits(getattr(result, name)) for name in names}


def run(source: str, seed: int, **options: Any) -> TrainingResult:
    """The small run with everything that has a memory; `seed` is the global generator's at its start."""
    model = network()

    @torch.no_grad()
    def validate(candidate: Any) -> dict[str, float]:
        assert not candidate.training
        torch.rand(3)  # a validation that draws random numbers
        return {"robust_accuracy": -F.cross_entropy(candidate(X), Y).item(), "other": 1.0}

    def start() -> TrainingResult:
        return train(
            model, SOURCES[source](), Ramped(pgd_at(Linf(0.1), num_steps=2), Ramp(0.6)),
            torch.optim.AdamW(model.parameters(), 0.05), num_epochs=EPOCHS, validate=validate, schedule=OneCycle(0.3),
            averaging=0.9, seed=11, **options,
        )  # fmt: skip

    return seeded(start, seed)


@pytest.mark.parametrize("source", SOURCES)
def test_stopped_after_any_step_and_resumed_ends_in_the_same_bits(source: str) -> None:
    whole = outcome(run(source, seed=5))
    assert whole["stopped"] is None and len(whole["history"]) == EPOCHS
    assert outcome(run(source, seed=5)) == whole
    for step in range(1, STEPS + 1):
        kept = io.BytesIO()

        def stop(state: TrainingState, step: int = step, kept: io.BytesIO = kept) -> bool:
            if state.step == step:
                torch.save(state.to_dict(), kept)
            return state.step == step

        assert run(source, seed=5, observe=stop).stopped == "Training was interrupted."
        kept.seek(0)
        state = torch.load(kept, weights_only=True)
        assert set(state) == TrainingState.KEYS
        before = bits(state)
        assert outcome(run(source, seed=99, resume=state)) == whole, f"stopped after step {step}"
        assert bits(state) == before, "resuming changed the checkpoint it was given"


@pytest.mark.parametrize("source", SOURCES)
def test_stopped_after_every_step_in_turn(source: str) -> None:
    whole, state, steps = outcome(run(source, seed=5)), None, []

    def stop(now: TrainingState) -> bool:
        nonlocal state
        state = now.to_dict()
        steps.append(now.step)
        return True

    result = run(source, seed=5, observe=stop)
    while result.stopped:
        result = run(source, seed=77, observe=stop, resume=state)
    assert steps == list(range(1, STEPS + 1)) and outcome(result) == whole


def test_resume_from_what_save_saw() -> None:
    whole, states = outcome(run("loader", seed=5)), []
    run("loader", seed=5, save=lambda state: states.append(state.to_dict()))
    assert [state["epoch"] for state in states] == [1, 2, 3] and [state["batch"] for state in states] == [0, 0, 0]
    for state in states:
        assert outcome(run("loader", seed=98, resume=state)) == whole


def test_the_noise_of_an_epoch_does_not_depend_on_the_batch_size() -> None:
    seen: dict[int, list[Tensor]] = {}

    def recipe(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
        seen[size].append(noise.keys)
        return F.cross_entropy(model(x), y)

    for size in (1, 4, 10):
        seen[size], model = [], linear()
        train(model, Batches(X, Y, size), recipe, sgd(model), num_epochs=2, seed=6)
    assert torch.equal(torch.cat(seen[1]), torch.cat(seen[4])) and torch.equal(torch.cat(seen[4]), torch.cat(seen[10]))
    assert len(torch.cat(seen[10]).unique()) == 20


def test_a_checkpoint_with_other_averaging_is_refused() -> None:
    states: list[dict[str, Any]] = []
    model = linear()
    train(model, PLAIN, Standard(), sgd(model), num_epochs=1, save=lambda s: states.append(s.to_dict()))
    with pytest.raises(ValueError, match="disagree about weight averaging"):
        train(model, PLAIN, Standard(), sgd(model), num_epochs=2, averaging=0.9, resume=states[0])


def test_a_saved_state_is_a_copy() -> None:
    states: list[dict[str, Any]] = []
    run("list", seed=5, save=lambda s: states.append(s.to_dict()))
    assert bits(states[0]["model"]) != bits(states[2]["model"])
    assert len(states[0]["history"]) == 1 and len(states[2]["history"]) == 3


# What breaks -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Breaking:
    """Standard training whose `when`-th batch goes wrong."""

    when: int
    what: str
    calls: list[int] = field(default_factory=list)

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
        self.calls.append(len(self.calls))
        loss = F.cross_entropy(model(x), y)
        if len(self.calls) != self.when:
            return loss
        weight = next(model.parameters())
        return {
            "nan loss": loss * math.nan,
            "infinite loss": loss + math.inf,
            "nan gradient": loss + (0 * weight.sum()).sqrt(),
        }[self.what]


@pytest.mark.parametrize("averaging", [None, 0.5])
@pytest.mark.parametrize(
    ("what", "sentence"),
    [("nan loss", "the loss is nan"), ("infinite loss", "the loss is inf"), ("nan gradient", "norm is nan")],
)
def test_what_is_not_finite_stops_and_the_last_good_weights_are_back(
    what: str, sentence: str, averaging: float | None
) -> None:
    model, saved, scores = network(), [], iter([0.1, 0.2, 0.9])

    def save(state: TrainingState) -> None:
        saved.append(copy.deepcopy((state.model.state_dict(), state.candidate.state_dict())))

    result = train(
        model, PLAIN, Breaking(8, what), sgd(model), num_epochs=EPOCHS, averaging=averaging, save=save,
        validate=lambda candidate: {"robust_accuracy": next(scores)},
    )  # fmt: skip
    assert result.stopped is not None and sentence in result.stopped
    assert "epoch 3, step 8" in result.stopped and "Try a smaller learning rate" in result.stopped
    live, candidate = saved[-1]
    assert len(saved) == 2 and len(result.history) == 2 and result.best_epoch == 1
    assert bits(result.last) == bits(live) == bits(dict(model.state_dict()))
    assert bits(result.best) == bits(candidate)
    assert (result.averaged is None) == (averaging is None)
    if averaging:
        assert bits(result.averaged) == bits(candidate)


def test_broken_at_once_leaves_the_starting_weights() -> None:
    model = network()
    before = bits(dict(model.state_dict()))
    result = train(model, PLAIN, Breaking(1, "nan loss"), sgd(model), num_epochs=2, averaging=0.9)
    assert result.stopped and result.best_epoch == -1 and result.history == []
    assert bits(result.last) == bits(result.best) == bits(result.averaged) == before


def test_trouble_sees_nothing_in_a_sound_step() -> None:
    model = linear()
    loss = F.cross_entropy(model(X), Y)
    loss.backward()

    def told(found: Tensor | None) -> str | None:
        return TrainingState(model, sgd(model), None, epoch=2, first_trouble=found).trouble

    sound = first_trouble(None, model, loss, 7)
    assert told(sound) is told(None) is told(first_trouble(None, nn.Identity(), torch.tensor(1.0), 0)) is None
    model[1].bias.grad[0] = math.inf
    broken = first_trouble(sound, model, loss, 8)
    later = first_trouble(first_trouble(broken, model, loss * math.nan, 9), linear(), loss, 10)
    for found in (broken, later):
        assert "epoch 3, step 9: the gradient's norm is inf" in str(told(found))


def test_no_batch_and_no_length() -> None:
    model = linear()
    for empty in ([], DataLoader(Augmented(), batch_size=20, drop_last=True)):
        with pytest.raises(ValueError, match="not one batch"):
            train(model, empty, Standard(), sgd(model), num_epochs=1)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        yield from PLAIN

    with pytest.raises(TypeError, match=r"batches \(generator\) have no length"):
        train(model, endless(), Standard(), sgd(model), num_epochs=1)


# Guards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Once:
    """Rolls back at its look after step `when`, once; counts its looks in its notes."""

    when: int
    every: int = 2

    def __call__(self, state: TrainingState) -> Rollback | None:
        state.notes["looks"] = [*state.notes.get("looks", []), state.step]
        if state.step != self.when:
            return None
        return Rollback(rate_factor=0.25, options={"label_smoothing": 0.2}, reason="a test")


@pytest.mark.parametrize("when", [2, 3, 8, 9])
@pytest.mark.parametrize("source", ["batches", "loader"])
def test_killed_before_and_after_a_rollback_ends_in_the_same_bits(source: str, when: int) -> None:
    """Steps 3, 6 and 9 end epochs; 2 is a look in the middle of one, 9 a rollback in the last look."""
    whole = outcome(run(source, seed=5, guard=Once(when)))
    assert len(whole["rollbacks"]) == 1 and whole != outcome(run(source, seed=5))
    states: list[dict[str, Any]] = []
    run(source, seed=5, guard=Once(when), observe=lambda state: states.append(state.to_dict()))
    assert [state["step"] for state in states] == list(range(1, STEPS + 1))
    for state in states:
        kept = io.BytesIO()
        torch.save(state, kept)
        kept.seek(0)
        loaded = torch.load(kept, weights_only=True)
        assert outcome(run(source, seed=99, guard=Once(when), resume=loaded)) == whole, f"from step {state['step']}"
    assert states[-1]["notes"]["looks"] == [2, 3, 4, 6, 8]


def test_a_rollback_puts_back_what_was_learned_and_changes_rate_and_recipe() -> None:
    model, before, after = network(), {}, {}
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    smoothing: list[float] = []

    @dataclass(frozen=True)
    class Recipe:
        label_smoothing: float = 0.0

        def __call__(self, model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
            smoothing.append(self.label_smoothing)
            return F.cross_entropy(model(x), y, label_smoothing=self.label_smoothing)

    def observe(state: TrainingState) -> None:
        assert state.averaged is not None
        parts = {
            "model": model.state_dict(),
            "averaged": state.averaged.state_dict(),
            "moments": optimizer.state_dict(),
        }
        parts["moments"] = parts["moments"]["state"]
        {2: before, 4: after}.get(state.step, {}).update(bits(copy.deepcopy(parts)))
        rates.append(optimizer.param_groups[0]["lr"])

    rates: list[float] = []
    result = train(
        model, [PLAIN[0]] * 6, Recipe(), optimizer, num_epochs=1, averaging=0.5, observe=observe, guard=Once(4),
    )  # fmt: skip
    assert before and before == after
    assert rates == pytest.approx([0.1] * 4 + [0.025] * 2) and optimizer.param_groups[0]["lr"] == 0.1
    assert smoothing == [0.0] * 4 + [0.2] * 2
    assert result.rollbacks == [{"step": 4, "back_to": 2, "rate_factor": 0.25, "reason": "a test"}]
    assert result.stopped is None and result.history[0]["step"] == 6


def test_a_rollback_reaches_the_recipe_in_a_ramp_and_refuses_what_it_has_not() -> None:
    @dataclass(frozen=True)
    class Wrong(Once):
        def __call__(self, state: TrainingState) -> Rollback | None:
            return Rollback(options={"gamma": 2.0})

    recipe = Ramped(pgd_at(Linf(0.1), num_steps=1), Ramp(0.5))
    model = linear()
    assert train(model, PLAIN, recipe, sgd(model), num_epochs=1, guard=Once(2)).rollbacks
    with pytest.raises(ValueError, match=r"wants to change gamma; this recipe has label_smoothing"):
        train(linear(), PLAIN, recipe, sgd(linear()), num_epochs=1, guard=Wrong(2))


@pytest.mark.parametrize("every", [1, 2, 50])
def test_what_is_not_finite_may_be_tried_again_at_a_smaller_rate(every: int) -> None:
    model = network()
    guard = NonFinite(every=every, num_rollbacks=1, rate_factor=0.5)
    result = train(model, PLAIN, Breaking(5, "nan loss"), sgd(model), num_epochs=3, averaging=0.5, guard=guard)
    assert result.stopped is None and len(result.history) == 3
    losses = [line.get("train_loss") for line in result.history]
    assert (losses[1] is None) == (every == 50), "an epoch of which every step was taken back has no loss"
    assert all(loss is None or math.isfinite(loss) for loss in losses)
    assert all(bool(t.isfinite().all()) for t in (*result.last.values(), *(result.averaged or {}).values()))
    (line,) = result.rollbacks
    assert "epoch 2, step 5: the loss is nan" in line["reason"] and line["rate_factor"] == 0.5
    assert (line["step"], line["back_to"]) == {1: (5, 4), 2: (6, 4), 50: (6, 3)}[every]
    model = network()
    again = train(model, PLAIN, Breaking(5, "nan loss"), sgd(model), num_epochs=3, guard=NonFinite(every=every))
    assert again.stopped and not again.rollbacks


def test_a_guard_may_stop_and_a_blind_one_does_not_let_trouble_pass() -> None:
    model, saved = network(), []
    stop = lambda state: Stop("The gap is too wide.") if state.epoch == 1 else None  # noqa: E731
    result = train(
        model, PLAIN, Standard(), sgd(model), num_epochs=3, guard=stop,
        save=lambda state: saved.append(copy.deepcopy(model.state_dict())),
    )  # fmt: skip
    assert result.stopped == "The gap is too wide." and len(result.history) == 1
    assert bits(result.last) == bits(dict(saved[0]))
    model = network()
    result = train(model, PLAIN, Breaking(2, "nan loss"), sgd(model), num_epochs=3, guard=lambda state: None)
    assert result.stopped is not None and "epoch 1, step 2: the loss is nan" in result.stopped
    with pytest.raises(TypeError, match="returns Rollback, Stop, Wait or None; got bool"):
        train(model, PLAIN, Standard(), sgd(model), num_epochs=1, guard=lambda state: True)  # type: ignore[arg-type,return-value]
    for factor in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="rate_factor must be positive"):
            Rollback(rate_factor=factor)


def test_interrupted_in_trouble_leaves_the_last_good_weights() -> None:
    model = network()
    before = bits(dict(model.state_dict()))
    result = train(
        model, PLAIN, Breaking(1, "nan loss"), sgd(model), num_epochs=2, observe=lambda state: state.step == 2
    )
    assert result.stopped is not None and "step 1: the loss is nan" in result.stopped
    assert bits(result.last) == before


# Figures, waiting, machines ----------------------------------------------------------------------------------------


def test_figures_beside_the_loss_are_averaged_over_the_examples() -> None:
    given: list[tuple[float, int]] = []

    def recipe(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Any:
        loss = F.cross_entropy(model(x), y)
        given.append((len(given) ** 2, len(y)))
        return loss, {"gap": torch.tensor(float(given[-1][0])), "graph": 2 * loss}

    model, seen = linear(), []
    result = train(model, PLAIN, recipe, sgd(model), num_epochs=2, observe=lambda state: seen.append(state.figures))
    for epoch, line in enumerate(result.history):
        part = given[3 * epoch : 3 * epoch + 3]
        assert line["train_gap"] == pytest.approx(sum(v * n for v, n in part) / 10)
        assert line["train_graph"] == pytest.approx(2 * line["train_loss"])
    assert seen[0]["gap"] == 0 and seen[1]["gap"] == pytest.approx(0.5)


class Reads(TorchDispatchMode):
    """Counts where the host asks a tensor for its value; whole numbers may be the loop's own, on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype != torch.int64:
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("averaging", "fast"), [(None, False), (0.9, False), (None, True)])
def test_no_step_waits_for_the_device(averaging: float | None, fast: bool) -> None:
    machine = Machine(torch.device("cpu"), bf16=fast, folded=fast)
    model, seen, recipe = network(), [], pgd_at(Linf(0.1), num_steps=2)
    with Reads() as reads:
        train(
            model, PLAIN, recipe, sgd(model), num_epochs=2, averaging=averaging, schedule=Cosine(),
            observe=lambda state: seen.append(reads.count), machine=machine,
        )  # fmt: skip
        assert seen[0] < 10, "the first batch is looked at, and every hundredth"
        assert seen[0] == seen[1] == seen[2] and seen[3] == seen[4] == seen[5]
        before = reads.count
        torch.ones(1).item()
        assert reads.count == before + 1, "the counter counts"


def test_channels_last_stays_over_a_kill_and_a_rollback() -> None:
    def make() -> nn.Module:
        return seeded(lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Flatten(), nn.Linear(36, 3)))

    found: list[bool] = []

    def recipe(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
        found.append(x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous())
        return F.cross_entropy(model(x), y)

    def go(**options: Any) -> tuple[nn.Module, torch.optim.Optimizer, TrainingResult]:
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        machine = Machine(torch.device("cpu"), channels_last=True)
        done = train(
            model, PLAIN, recipe, optimizer, num_epochs=2, averaging=0.5, machine=machine, guard=RollsBack(4), **options
        )
        return model, optimizer, done

    class RollsBack(Once):
        def __call__(self, state: TrainingState) -> Rollback | None:
            verdict = super().__call__(state)
            return verdict and Rollback()

    states: list[dict[str, Any]] = []
    _, _, whole = go(observe=lambda state: states.append(state.to_dict()))
    for state in (states[2], states[4]):
        model, optimizer, done = go(resume=state)
        weight = model[0].weight  # type: ignore[index]
        moments = optimizer.state[weight]["exp_avg"]
        for tensor in (
            weight,
            moments,
            done.last["0.weight"],
            (done.averaged or {})["0.weight"],
            done.best["0.weight"],
        ):
            assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()
        assert bits(done.last) == bits(whole.last) and bits(done.averaged) == bits(whole.averaged)
    assert all(found)


# The best epoch and the history ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "best"), [([0.1, 0.5, 0.3], 1), ([0.5, 0.5, 0.3], 1), ([0.0, 0.0, 0.0], 2), ([0.9, 0.5, 0.8], 0)]
)
def test_the_later_of_equals_is_the_best(scores: list[float], best: int) -> None:
    model, saved, given = network(), [], iter(scores)
    result = train(
        model, PLAIN, Standard(), sgd(model), num_epochs=3, score="mine", save=lambda s: saved.append(s.to_dict()),
        validate=lambda candidate: {"mine": next(given), "robust_accuracy": -1.0},
    )  # fmt: skip
    assert result.best_epoch == best and bits(result.best) == bits(dict(saved[best]["model"]))
    assert bits(result.last) == bits(dict(saved[2]["model"]))


def test_without_validation_the_last_epoch_is_the_best() -> None:
    model = linear()
    result = train(model, PLAIN, Standard(), sgd(model), num_epochs=3)
    assert result.best_epoch == 2 and bits(result.best) == bits(result.last) and result.averaged is None


def test_a_missing_score_is_an_error() -> None:
    model = linear()
    with pytest.raises(ValueError, match=r"returned \['clean_accuracy'\]; it needs 'robust_accuracy'"):
        train(model, PLAIN, Standard(), sgd(model), num_epochs=1, validate=lambda m: {"clean_accuracy": 1.0})


def test_lines_of_history() -> None:
    model, losses = linear(), []

    def recipe(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
        loss = F.cross_entropy(model(x), y)
        losses.append(loss.item() * len(y))
        return loss

    result = train(
        model, PLAIN, recipe, sgd(model, 0.2), num_epochs=2, schedule=Cosine(),
        validate=lambda m: {"robust_accuracy": 0.5, "examples": 7},
    )  # fmt: skip
    assert [line["epoch"] for line in result.history] == [0, 1]
    assert [line["step"] for line in result.history] == [3, 6]
    assert [line["examples"] for line in result.history] == [7.0, 7.0]
    rates = [0.2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in (2, 5)]
    assert [line["learning_rate"] for line in result.history] == pytest.approx(rates)
    means = [sum(losses[:3]) / 10, sum(losses[3:]) / 10]
    assert [line["train_loss"] for line in result.history] == pytest.approx(means, rel=1e-12)
    assert result.history[0]["seconds"] <= result.history[1]["seconds"] <= round(result.seconds, 3)
    assert list(result.history[0]) == [
        "epoch", "step", "learning_rate", "train_loss", "robust_accuracy", "examples", "seconds",
    ]  # fmt: skip


def test_the_model_is_validated_in_eval_mode_and_trained_in_train_mode() -> None:
    model, modes = network().eval(), []

    def recipe(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
        modes.append(model.training)
        return F.cross_entropy(model(x), y)

    def validate(candidate: Any) -> dict[str, float]:
        assert candidate is model and not any(m.training for m in candidate.modules())
        return {"robust_accuracy": 0.0}

    train(model, PLAIN, recipe, sgd(model), num_epochs=2, validate=validate)
    assert modes == [True] * 6


# Schedules -------------------------------------------------------------------------------------------------------


def test_factors_times_each_group_s_own_rate_which_comes_back() -> None:
    model, seen = linear(), []
    groups = [{"params": [model[1].weight], "lr": 0.3}, {"params": [model[1].bias], "lr": 0.01}]
    optimizer = torch.optim.SGD(groups)

    def observe(state: TrainingState) -> None:
        assert state.total == 6
        seen.append([group["lr"] for group in state.optimizer.param_groups])

    for _ in range(2):  # the second run starts from the optimizer's own rates, not from where the first one ended
        seen.clear()
        train(model, PLAIN, Standard(), optimizer, num_epochs=2, schedule=OneCycle(0.5), observe=observe)
        factors = [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]
        for rates, factor in zip(seen, factors, strict=True):
            assert rates == pytest.approx([0.3 * factor, 0.01 * factor])
        assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.01]


@pytest.mark.parametrize("how", ["observe", "nan"])
def test_the_rate_comes_back_when_stopped(how: str) -> None:
    model = linear()
    optimizer = sgd(model, 0.3)
    recipe = Breaking(2, "nan loss") if how == "nan" else Standard()
    result = train(
        model, PLAIN, recipe, optimizer, num_epochs=2, schedule=OneCycle(0.5),
        observe=lambda state: how == "observe" and state.step == 2,
    )  # fmt: skip
    assert result.stopped and optimizer.param_groups[0]["lr"] == 0.3


@dataclass(frozen=True)
class Recording:
    """Standard training that writes down the radius of its attack."""

    attack: Any
    radii: list[float] = field(default_factory=list)

    def __call__(self, model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
        inner = getattr(self.attack, "attack", self.attack)
        self.radii.append(inner.threat.radius)
        return F.cross_entropy(model(x), y)


@pytest.mark.parametrize("restarts", [1, 3])
def test_a_ramp_scales_the_radius_of_the_attack(restarts: int) -> None:
    model, recipe = linear(), Recording(pgd(Linf(0.2), num_steps=2, restarts=restarts))
    train(model, PLAIN, Ramped(recipe, Ramp(0.5, start=0.1)), sgd(model), num_epochs=2)
    factors = [0.1, 0.4, 0.7, 1.0, 1.0, 1.0]
    assert recipe.radii == pytest.approx([0.2 * factor for factor in factors])


def test_a_crafted_step_stays_in_the_scaled_radius() -> None:
    recipe = pgd_at(Linf(0.2), num_steps=3)
    crafted = Ramped(recipe, Ramp(1.0)).at(0.25).craft(linear(), X.clamp(0.3, 0.7), Y)
    assert (crafted - X.clamp(0.3, 0.7)).abs().max().item() == pytest.approx(0.05, abs=1e-6)
    assert recipe.attack.threat.radius == 0.2


def test_recipes_that_cannot_be_scaled() -> None:
    def plain(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
        return F.cross_entropy(model(x), y)

    @dataclass(frozen=True)
    class WithFunction:
        attack: Any

    for has_none in (plain, Standard()):
        with pytest.raises(ValueError, match=r"(plain|Standard) has none"):
            Ramped(has_none, Ramp(0.5))
    with pytest.raises(ValueError, match="plain function"):
        Ramped(WithFunction(plain), Ramp(0.5))
    recipe = pgd_at(Linf(0.2))
    assert Ramped(recipe, Ramp(0.5)).at(0.5) is recipe


def test_a_recipe_changes_over_the_run_as_it_says() -> None:
    seen: list[float] = []

    @dataclass(frozen=True)
    class Weighted:
        weight: float = 0.0

        def __call__(self, model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
            seen.append(self.weight)
            return self.weight * F.cross_entropy(model(x), y)

        def at(self, progress: float) -> Weighted:
            return Weighted(2 * progress)

    model = linear()
    train(model, PLAIN, Weighted(), sgd(model), num_epochs=2)
    assert seen == pytest.approx([2 * step / 6 for step in range(6)])


def test_closed_forms() -> None:
    assert [Constant()(t) for t in (0.0, 0.5, 1.0)] == [1, 1, 1]
    assert [Cosine()(t) for t in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([1, (2 + math.sqrt(2)) / 4, 0.5, 0])
    assert [OneCycle(0.4)(t) for t in (0.0, 0.2, 0.4, 0.7, 1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert OneCycle(0.0)(0.0) == 1.0 and OneCycle(0.1)(0.1) == 1.0
    assert [Piecewise()(t) for t in (0.0, 0.49, 0.5, 0.74, 0.75, 1.0)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert [Ramp(0.5)(t) for t in (0.0, 0.25, 0.5, 1.0)] == [0, 0.5, 1, 1]
    assert [Ramp(0.5, start=0.2)(t) for t in (0.0, 0.25, 0.5)] == pytest.approx([0.2, 0.6, 1])
    assert Ramp(0.0)(0.0) == 1.0


# Averaging -------------------------------------------------------------------------------------------------------


def test_the_average_equals_a_loop_written_by_hand() -> None:
    def make() -> nn.Module:
        return seeded(
            lambda: nn.Sequential(
                nn.Flatten(), nn.Linear(18, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)
            ).double()
        )

    x, decay = X.double(), 0.35
    batches = [(x[i : i + 4], Y[i : i + 4]) for i in (0, 4, 8)]
    model = make()
    result = train(model, batches, Standard(), sgd(model), num_epochs=EPOCHS, averaging=decay)

    hand, average, num = make(), {}, 0
    hand.train()
    for _ in range(EPOCHS):
        for xb, yb in batches:
            grads = torch.autograd.grad(F.cross_entropy(hand(xb), yb), list(hand.parameters()))
            with torch.no_grad():
                for p, grad in zip(hand.parameters(), grads, strict=True):
                    p -= 0.1 * grad
            beta = min(decay, (1 + num) / (10 + num)) if num else 0.0
            for name, value in hand.state_dict().items():
                if num and value.is_floating_point():
                    average[name] = beta * average[name] + (1 - beta) * value
                else:
                    average[name] = value.clone()
            num += 1
    assert min(decay, 7 / 16) == decay > 2 / 11  # the ramp and its end are both seen
    assert result.averaged is not None and set(result.averaged) == set(average)
    for name, value in average.items():
        torch.testing.assert_close(result.averaged[name], value, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(result.last[name], hand.state_dict()[name], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(result.averaged["2.running_mean"], result.last["2.running_mean"])
    assert bits(result.best) == bits(result.averaged)


@pytest.mark.parametrize("decay", [-0.1, 1.0, 2.0])
def test_a_decay_that_is_none(decay: float) -> None:
    with pytest.raises(ValueError, match="averaging decay"):
        Average(linear(), decay)
