"""AutoAttack by others, which ours is held against: the authors' own code, and one composed from torchattacks.

The authors' code is not on the package index: `git clone https://github.com/fra31/auto-attack` (MIT; commit a392200).

torchattacks' own class `AutoAttack` is not the standard (ten steps for APGD and FAB), so its four attacks are put
together here with the published budgets: APGD-CE 100 steps, targeted APGD-DLR 100 steps x 9 classes, FAB-T 100 steps x
9 classes, Square 5,000 queries with p 0.8 and the schedule as published; each sees only what still stands.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparring.core.types import Cost


class Counting(nn.Module):
    """A model that counts its sample-passes: forwards, and backwards that reach its input."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.forwards, self.backwards = model, 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        if x.requires_grad:
            x = x.view_as(x)
            x.register_hook(self._count)
        return self.model(x)

    def _count(self, grad: Tensor) -> None:
        self.backwards += len(grad)

    def cost(self) -> Cost:
        return Cost(self.forwards, self.backwards)


def members(model: nn.Module, norm: str, radius: float, num_classes: int, seed: int) -> Iterator[tuple[str, Any]]:
    """(name, attack) of the protocol, in its order. norm "Linf" or "L2"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchattacks.attacks.apgd import APGD
        from torchattacks.attacks.apgdt import APGDT
        from torchattacks.attacks.fab import FAB
        from torchattacks.attacks.square import Square
    shared = {"norm": norm, "eps": radius, "seed": seed}
    yield "apgd-ce", APGD(model, steps=100, n_restarts=1, loss="ce", eot_iter=1, rho=0.75, **shared)
    if num_classes >= 4:  # the targeted form divides by the third and fourth largest logit
        targets = min(num_classes, 10)
        yield "apgd-t", APGDT(model, steps=100, n_restarts=1, eot_iter=1, rho=0.75, n_classes=targets, **shared)
    elif num_classes == 3:
        yield "apgd-dlr", APGD(model, steps=100, n_restarts=1, loss="dlr", eot_iter=1, rho=0.75, **shared)
    fab = FAB(model, steps=100, n_restarts=1, multi_targeted=True, n_classes=min(num_classes, 10), **shared)
    yield "fab-t", fab
    yield "square", Square(model, n_queries=5000, n_restarts=1, p_init=0.8, resc_schedule=False, **shared)


def broken(model: nn.Module, x: Tensor, adversarial: Tensor, y: Tensor, norm: str, radius: float) -> Tensor:
    """Which of them are in the set, up to rounding, and of another class."""
    moved = (adversarial - x).flatten(1)
    size = moved.norm(p={"Linf": float("inf"), "L2": 2, "L1": 1}[norm], dim=1)
    inside = (size <= radius * (1 + 1e-5) + 1e-6) & (adversarial.flatten(1).amin(1) >= 0)
    with torch.no_grad():
        return inside & (adversarial.flatten(1).amax(1) <= 1) & (model(adversarial).argmax(1) != y)


def authors(clone: Path, model: nn.Module, x: Tensor, y: Tensor, norm: str, radius: float, seed: int) -> dict[str, Any]:
    """What stands under `AutoAttack(version="standard")` of a clone of fra31/auto-attack, the passes, the seconds."""
    sys.path.insert(0, str(clone))
    from autoattack import AutoAttack

    counting, started = Counting(model).eval(), time.process_time()
    with torch.no_grad():
        clean = counting(x).argmax(1) == y
    attack = AutoAttack(counting, norm=norm, eps=radius, seed=seed, version="standard", device="cpu", verbose=False)
    adversarial = attack.run_standard_evaluation(x, y, bs=len(x))
    robust = clean & ~broken(counting, x, adversarial, y, norm, radius)
    return {"clean": clean.tolist(), "robust": robust.tolist(), "cost": counting.cost(),
            "cpu_seconds": time.process_time() - started}  # fmt: skip


def reference(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    norm: str,
    radius: float,
    num_classes: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Which examples stand after each member, the passes, and the seconds."""
    counting = Counting(model).eval()
    started, cpu_started = time.perf_counter(), time.process_time()
    with torch.no_grad():
        standing = counting(x).argmax(1) == y
    record: dict[str, Any] = {"clean": standing.tolist(), "members": []}
    for name, attack in members(counting, norm, radius, num_classes, seed):
        index = standing.nonzero()[:, 0]
        if len(index):
            standing[index[broken(counting, x[index], attack(x[index], y[index]), y[index], norm, radius)]] = False
        record["members"].append({"name": name, "standing": int(standing.sum()), "cost": counting.cost()})
        say(f"  {name}: {int(standing.sum())} stand, {time.perf_counter() - started:.0f} s")
    cpu = time.process_time() - cpu_started  # of this process alone: other work on the machine does not count
    record |= {"robust": standing.tolist(), "cost": counting.cost(), "cpu_seconds": cpu}
    record["seconds"] = time.perf_counter() - started
    return record
