"""Faster steps: what is tried changes nothing of the run, what is taken is faster, what is judged is float32."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts import rand, seeded
from sparring.app import train_run
from sparring.app.settings import TrainingSettings
from sparring.app.train_run import resume_run, start_run
from sparring.core.machine import Machine
from sparring.core.model_state import attack_mode
from sparring.core.speed import AtSpeed, foldable
from sparring.modalities.images import build
from sparring.threats import Linf
from sparring.training.certified import ibp
from sparring.training.loop import train
from sparring.training.recipes import Mixed, pgd_at
from sparring.training.schedules import Ramp, Ramped
from sparring.training.speed import SpeedFound, find_speed

CPU = Machine(torch.device("cpu"))
X, Y = rand(16, 3, 8, 8, seed=1).float(), torch.arange(16) % 3
FAST = replace(CPU, bf16=True, folded=True, channels_last=True)


def network() -> nn.Module:
    return build("resnet-small", (3, 8, 8), 3, seed=0)


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), 1e-3)


class Told(nn.Module):
    """A model that takes longer, or answers otherwise, in one of two precisions."""

    def __init__(self, *, slow: bool | None = None, wrong: bool = False) -> None:
        super().__init__()
        self.slow, self.wrong, self.calls = slow, wrong, 0
        self.inner = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 3)))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        cast = torch.is_autocast_enabled("cpu")
        if self.slow is cast:
            time.sleep(0.004)
        logits: Tensor = self.inner(x)
        return logits * 3 if cast and self.wrong else logits


def test_in_bfloat16_attack_and_losses_stay_in_float32() -> None:
    model, dtypes = network(), set()
    recipe = pgd_at(Linf(0.05), num_steps=3)
    plain = recipe(model, X, Y, noise=None)
    inside = model[1].register_forward_hook(lambda _m, _i, out: dtypes.add(out.dtype))
    with AtSpeed(model, FAST):
        x_adv = recipe.craft(model, X, Y)
        loss = recipe.loss_on(model, X, x_adv, Y)
        loss.backward()
    inside.remove()
    assert dtypes == {torch.bfloat16}, "nothing was computed in bfloat16"
    assert x_adv.dtype == loss.dtype == torch.float32
    assert (x_adv - X).abs().max() <= 0.05 + 1e-7 and (x_adv - X).abs().max() > 0.049
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert loss.item() == pytest.approx(plain.item(), rel=0.03)
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_the_model_had_of_its_own_comes_back_also_after_an_error() -> None:
    model = nn.Linear(4, 3)
    model.forward = own = lambda x: x.new_zeros(len(x), 3)  # type: ignore[method-assign]
    threads = torch.get_num_threads()
    with pytest.raises(KeyError), AtSpeed(model, replace(FAST, threads=threads + 1)):
        assert torch.get_num_threads() == threads + 1
        raise KeyError
    assert model.forward is own and torch.get_num_threads() == threads


@pytest.mark.parametrize(("name", "pairs"), [("resnet-small", 9), ("preact-resnet18", 8), ("cnn-small", 0)])
def test_folded_batchnorm_says_the_same(name: str, pairs: int) -> None:
    model = build(name, (3, 8, 8), 3, seed=0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5)
    assert len(foldable(model)) == pairs
    seen: list[Tensor] = []
    for machine in (CPU, replace(CPU, folded=True)):
        x = X.clone().requires_grad_()
        with AtSpeed(model, machine), attack_mode(model) as frozen:
            logits = frozen(x)
            seen += [logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), x)[0]]
    torch.testing.assert_close(seen[2:], seen[:2], rtol=1e-4, atol=1e-5)
    assert pairs == 0 or not torch.equal(seen[0], seen[2]), "nothing was folded"


def test_what_learns_or_keeps_statistics_is_not_folded() -> None:
    found = []
    for machine in (CPU, replace(CPU, folded=True)):
        model = network().train()
        with AtSpeed(model, machine):
            model(X).logsumexp(1).sum().backward()
            model.eval()(X).logsumexp(1).sum().backward()
        found.append([*(p.grad for p in model.parameters()), *model.buffers()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_convolution_read_twice_or_out_of_sight_is_not_folded() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return (self.norm(y) + y).flatten(1)

    class Hidden(Twice):
        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x)).flatten(1) if x.sum() > 0 else x.flatten(1)

    assert foldable(Twice()) == foldable(Hidden()) == []
    assert len(foldable(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))) == 1


def test_measuring_changes_nothing_of_the_run() -> None:
    model, recipe = network(), Ramped(pgd_at(Linf(0.05), num_steps=2), Ramp(0.3))
    optimizer, batches = adam(model), [(X, Y)]
    train(model, batches, recipe, optimizer, num_epochs=1)  # moments, statistics
    everything = (model.state_dict(), optimizer.state_dict(), torch.get_rng_state(), model.training)
    before = copy.deepcopy(everything)
    pointers = [p.data_ptr() for p in model.parameters()]
    found = find_speed(model, batches, recipe, optimizer, CPU, num_steps=10)
    after = (model.state_dict(), optimizer.state_dict(), torch.get_rng_state(), model.training)
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())
    assert found.machine == replace(CPU, **found.choice)
    assert found.sentence.startswith("speed: ") and "folded BatchNorm" in found.sentence


def sought(model: nn.Module, **options: Any) -> SpeedFound:
    return find_speed(model, [(X, Y)], pgd_at(Linf(0.05), num_steps=4), adam(model), CPU, num_steps=50, **options)


def test_what_is_faster_at_equal_losses_is_taken() -> None:
    found = sought(Told(slow=False))
    assert found.choice["bf16"] and found.machine.bf16
    assert "speed: bf16" in found.sentence or "and bf16" in found.sentence
    assert not sought(Told()).choice["compiled"], "a short run paid for compiling"


def test_other_losses_are_not_taken_however_fast() -> None:
    found = sought(Told(slow=False, wrong=True))
    assert not found.choice["bf16"] and "losses differ by" in found.sentence


def test_what_is_plainly_slower_is_looked_at_once() -> None:
    model = Told(slow=True)
    started = time.monotonic()
    found = sought(model)
    assert not found.choice["bf16"] and "times slower" in found.sentence.partition("bf16")[2]
    assert time.monotonic() - started < 5
    assert model.calls == 0, "the model itself was called, and not a copy"


def test_it_says_what_does_not_apply() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x: dict[str, Tensor]) -> Tensor:
            return self.inner(x["a"])

    def recipe(model: Any, x: dict[str, Tensor], y: Tensor, *, noise: Any) -> Tensor:
        return nn.functional.cross_entropy(model.inner(x["a"]), y)

    model = Words()
    found = find_speed(model, [({"a": torch.rand(16, 5)}, Y)], recipe, adam(model), CPU, num_steps=5)  # type: ignore[list-item]
    for sentence in (
        "no bf16: the recipe does not call the model",
        "no channels-last: no images",
        "no folded",
        "no torch.compile",
    ):
        assert sentence in found.sentence
    assert found.machine == CPU and "plain is fastest" in found.sentence


def test_another_number_of_threads_is_tried_unless_the_environment_says_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert "threads" not in sought(Told()).sentence
        monkeypatch.delenv("OMP_NUM_THREADS")
        assert "; 1 threads " in sought(Told()).sentence
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.fixture
def settings() -> TrainingSettings:
    return TrainingSettings(
        data="digits", threat="linf:0.1", model="resnet-small:width=4", recipe="pgd-at:num_steps=2", epochs=2,
        batch_size=256, held_out=100, speed="auto",
    )  # fmt: skip


def chosen(*_: Any, **__: Any) -> SpeedFound:
    return SpeedFound(
        FAST, {"channels_last": True, "bf16": True, "folded": True, "compiled": False, "threads": None}, "!"
    )


def never(*_: Any, **__: Any) -> SpeedFound:
    raise AssertionError("measured a second time")


def test_a_run_keeps_its_choice_and_resumes_to_the_same_bits(
    settings: TrainingSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_run, "find_speed", chosen)
    told: list[str] = []
    start_run(settings, tmp_path / "whole", tell=told.append)
    assert told == ["!"]
    steps: list[int] = []

    def stop(state: Any) -> bool:
        steps.append(state.step)
        return bool(state.step % 4 == 3)

    result = start_run(settings, tmp_path / "parts", observe=stop)
    monkeypatch.setattr(train_run, "find_speed", never)
    while result.stopped:
        result = resume_run(tmp_path / "parts", observe=stop)
    assert len(steps) > 4
    for name in ("best", "last"):
        whole, parts = ((tmp_path / run / f"{name}.safetensors").read_bytes() for run in ("whole", "parts"))
        assert whole == parts
    for name in ("config.json", "training.json"):
        kept = json.loads((tmp_path / "parts" / name).read_text(encoding="utf-8"))["speed"]
        assert kept["bf16"] and kept["sentence"] == "!"
    start_run(settings.but(speed="plain"), tmp_path / "plain")
    assert (tmp_path / "plain" / "last.safetensors").read_bytes() != whole, "bfloat16 made no difference"


@pytest.mark.parametrize(("width", "tried"), [(4, False), (8, True)])
def test_a_layout_that_may_crash_is_not_tried(width: int, tried: bool) -> None:
    """A step of it would end the process, with no error to catch."""
    model = build(f"resnet-small:width={width}", (3, 8, 8), 3, 0)
    found = find_speed(model, [(X, Y)], pgd_at(Linf(0.05), num_steps=1), adam(model), CPU, num_steps=10)
    assert ("no channels-last: PyTorch may crash" not in found.sentence) == tried
    assert ("channels-last" in found.sentence.replace("no channels-last", "")) == tried


def test_measured_in_a_run_and_validated_as_built(settings: TrainingSettings, tmp_path: Path) -> None:
    told: list[str] = []
    start_run(settings.but(epochs=1), tmp_path / "run", tell=told.append)
    kept = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["speed"]
    assert [kept["sentence"]] == told and told[0].startswith("speed: ")
    model, seen = network(), []

    def validate(candidate: Any) -> dict[str, float]:
        seen.append((torch.is_autocast_enabled("cpu"), "forward" in vars(candidate)))
        return {"robust_accuracy": 0.0}

    recipe = pgd_at(Linf(0.05), num_steps=1)
    assert isinstance(recipe, Mixed)
    train(model, [(X, Y)], recipe, adam(model), num_epochs=1, validate=validate, machine=FAST)
    assert seen == [(False, False)]


def test_bounds_which_look_at_the_layers_themselves_are_left_as_they_are() -> None:
    x, y, model = rand(16, 1, 8, 8, seed=1).float(), Y, build("cnn-small", (1, 8, 8), 3, seed=0)
    found = find_speed(model, [(x, y)], ibp(Linf(0.1)), adam(model), CPU, num_steps=100)
    assert not found.machine.bf16 and not found.machine.compiled
    assert "no bf16: the recipe does not call the model as a whole" in found.sentence
