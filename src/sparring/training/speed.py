"""What makes a training step faster on this machine, measured and not assumed."""

from __future__ import annotations

import copy
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparring.core.machine import Machine
from sparring.core.noise import Noise
from sparring.core.speed import AtSpeed, channels_last_crashes, foldable
from sparring.core.types import Inputs, device_of, map_inputs, size
from sparring.threats.inputs import pair_of

CHOICES = ("channels_last", "bf16", "folded", "compiled", "threads")
"""The fields of a Machine that are chosen."""
AT_LEAST, LOSSES_WITHIN = 1.05, 0.01
"""Taken is what is 1.05 times as fast while the mean loss of its first steps is within 1 % (of 0.1, if it is less)."""
SHARE, SECONDS, SECONDS_TO_COMPILE = 0.03, 10.0, 180.0
"""What measuring may cost: 3 % of the run or 10 s, whichever is more; `torch.compile` may need 180 s of that."""
FEW, TOO_SLOW = 8, 4.0
"""The first look at what is tried takes 8 examples, and is the last where it is 4 times slower."""


class SpeedFound(NamedTuple):
    """The machine with what pays, what was chosen by name (for `dataclasses.replace`), and all that in a sentence."""

    machine: Machine
    choice: dict[str, Any]
    sentence: str


def find_speed(
    model: nn.Module, batches: Iterable[tuple[Inputs, Tensor]], recipe: Any, optimizer: Optimizer, machine: Machine, *,
    num_steps: int, seconds: float = math.inf, seed: int = 0,
) -> SpeedFound:  # fmt: skip
    """Tries on the first batch what may make the steps of a run faster, and takes what does.

    In this order, each on top of what was taken before it: bfloat16, channels-last, folded BatchNorm, another number
    of threads (unless OMP_NUM_THREADS is set), and where the run is long enough to pay for it `torch.compile`. Taken is
    what makes a step 1.05 times as fast at equal losses (within 1 %), timed in turns with what it would replace. All
    steps are taken by copies; nothing of the run changes, the global generators neither. The run has `num_steps` steps,
    or ends after `seconds`: measuring may take 3 % of that, or 10 s.

    >>> from sparring import Linf, pgd_at
    >>> model, data = nn.Linear(4, 3), [(torch.rand(8, 4), torch.randint(3, (8,)))]
    >>> optimizer, here = torch.optim.SGD(model.parameters(), 0.1), Machine(torch.device("cpu"))
    >>> sorted(find_speed(model, data, pgd_at(Linf(0.1)), optimizer, here, num_steps=100).choice)
    ['bf16', 'channels_last', 'compiled', 'folded', 'threads']
    """
    started, alone = time.monotonic(), replace(machine, rank=0, world=1)
    with torch.random.fork_rng(devices=[machine.device] if machine.device.type == "cuda" else []):
        x, y = pair_of(next(iter(batches)))
        run = _Run(model, recipe.at(1.0) if hasattr(recipe, "at") else recipe, optimizer, x, y, seed)  # its full radius
        probe, plain = _Trial(run, alone), _Trial(run, alone)
        guess = probe.fastest(FEW) * max(1.0, size(x) / FEW)
        limit = max(SECONDS, SHARE * min(num_steps * guess, seconds))
        num = min(size(x), max(FEW, int(size(x) * limit / 60 / guess)))
        plain.step(num)
        best, (there, notes) = plain, _candidates(machine, run, probe.calls_whole(), limit)
        for name, value in there:
            if time.monotonic() - started > limit:
                notes.append(f"{_word(name, value)} not tried: measuring may take {limit:.0f} s")
                continue
            trial, note = _tried(run, (probe, plain, best), replace(best.machine, **{name: value}), num)
            notes.append(f"{_word(name, value)} {note}")
            best = trial or best
        gain = plain.race(best, num) if best is not plain else 1.0
    choice = {name: getattr(best.machine, name) for name in CHOICES}
    taken = [_word(name, value) for name, value in choice.items() if value != getattr(machine, name)]
    what = f"{' and '.join(taken)}, {gain:.2f} times as fast as plain" if taken else "plain is fastest here"
    spent = f"measured in {time.monotonic() - started:.0f} s"
    return SpeedFound(replace(machine, **choice), choice, f"speed: {what} ({'; '.join([*notes, spent])})")


class _Run(NamedTuple):
    """What a step needs; trials copy what it changes."""

    model: nn.Module
    recipe: Any
    optimizer: Optimizer
    x: Inputs
    y: Tensor
    seed: int


class _Trial:
    """Steps of a run on one batch, as a machine computes them, by copies of all that learns."""

    def __init__(self, run: _Run, machine: Machine) -> None:
        self.machine, self.seed, self.losses = machine, run.seed, list[float]()
        self.model, self.recipe, self.optimizer = copy.deepcopy((run.model, run.recipe, run.optimizer))
        machine.place(self.model.train())
        self.x, self.y = machine.place(run.x), machine.place(run.y)
        self.fast = AtSpeed(self.model, machine)

    def calls_whole(self) -> bool:
        """Whether a step calls the model itself, not its parts; not so where a hook is refused, as bounds refuse it."""
        calls: list[int] = []
        hook = self.model.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            self.step(FEW)
        except ValueError:
            return False
        finally:
            hook.remove()
        return bool(calls)

    def step(self, num: int) -> float:
        """The seconds of one step on the first `num` examples; its loss is remembered."""
        x, y = map_inputs(lambda t: t[:num], self.x), self.y[:num]
        noise = Noise.make(self.seed, "speed", torch.arange(size(x))).to(device_of(x))
        started = time.perf_counter()
        with self.fast:
            found = self.recipe(self.model, x, y, noise=noise)
            loss = found[0] if isinstance(found, tuple) else found
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
        self.optimizer.step()
        if self.machine.device.type != "cpu":
            torch.accelerator.synchronize(self.machine.device)
        seconds = time.perf_counter() - started
        self.losses.append(loss.item())
        return seconds

    def fastest(self, num: int) -> float:
        """The seconds of the fastest of 2 to 10 steps: the first may still make ready, and others use the machine."""
        found = [self.step(num), self.step(num)]
        while len(found) < 10 and sum(found) < 0.2:
            found.append(self.step(num))
        return min(found)

    def race(self, other: _Trial, num: int) -> float:
        """How many times as fast the other is: the median over rounds in which both take a step, at least 5."""
        ratios: list[float] = []
        started = time.perf_counter()
        while len(ratios) < 5 or (len(ratios) < 25 and time.perf_counter() - started < 0.3):
            ratios.append(self.step(num) / other.step(num))
        return statistics.median(ratios)


def _candidates(machine: Machine, run: _Run, whole: bool, limit: float) -> tuple[list[tuple[str, Any]], list[str]]:
    """What may pay, by name of a Machine's field, and sentences on what does not apply."""
    tensors = run.x.values() if isinstance(run.x, Mapping) else [run.x]
    apart = None if whole else "the recipe does not call the model as a whole"
    short = f"compiling may take {SECONDS_TO_COMPILE:.0f} s, too much for so short a run"
    crashes = machine.device.type == "cpu" and channels_last_crashes(run.model)
    layout = "PyTorch may crash on a narrow 1x1 convolution with a stride" if crashes else None
    why_not: dict[tuple[str, Any], str | None] = {
        ("bf16", True): apart,
        ("channels_last", True): layout if any(t.ndim == 4 for t in tensors) else "no images (B, C, H, W)",
        ("folded", True): None if foldable(run.model) else "none follows a convolution, as far as torch.fx can see",
    }
    if machine.device.type == "cpu" and machine.world == 1 and "OMP_NUM_THREADS" not in os.environ:
        now = torch.get_num_threads()
        why_not |= {("threads", n): None for n in (now // 2, now * 2) if 1 <= n <= (os.cpu_count() or 1)}
    why_not["compiled", True] = apart or (None if limit >= SECONDS_TO_COMPILE else short)
    new = {key: why for key, why in why_not.items() if getattr(machine, key[0]) != key[1]}
    return [key for key, why in new.items() if not why], [f"no {_word(*key)}: {why}" for key, why in new.items() if why]


def _tried(run: _Run, others: tuple[_Trial, _Trial, _Trial], machine: Machine, num: int) -> tuple[_Trial | None, str]:
    """A trial that beats the best so far at the losses of the plain one, or None; and what was seen."""
    probe, plain, best = others
    try:
        if not machine.compiled and (slower := _Trial(run, machine).fastest(FEW) / probe.fastest(FEW)) > TOO_SLOW:
            return None, f"{slower:.0f} times slower"
        trial = _Trial(run, machine)
        trial.step(num)
        gain = best.race(trial, num)
    except Exception as error:  # what this build of PyTorch, or this model, cannot do
        return None, f"fails ({type(error).__name__})"
    ours, theirs = (statistics.fmean(t.losses[:5]) for t in (trial, plain))
    off = abs(ours - theirs) / max(abs(theirs), 0.1)
    if not off <= LOSSES_WITHIN:
        return None, f"{gain:.2f} times as fast, but losses differ by {off:.1%}"
    return (trial, f"{gain:.2f}") if gain >= AT_LEAST else (None, f"{gain:.2f}, not taken")


def _word(name: str, value: Any) -> str:
    """What a choice is called."""
    words = {"channels_last": "channels-last", "folded": "folded BatchNorm", "compiled": "torch.compile"}
    return f"{value} threads" if name == "threads" else words.get(name, name)
