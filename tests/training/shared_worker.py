"""One of two processes that train together: `python shared_worker.py FOLDER`, with the environment of torchrun.

tests/training/test_several_processes.py starts both, and trains the same alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from contracts import rand, seeded
from sparring.core.batches import Batches
from sparring.core.machine import Machine, find_machine
from sparring.threats import Linf
from sparring.training.guard import Rollback
from sparring.training.loop import train
from sparring.training.recipes import Crafting, pgd_at
from sparring.training.state import TrainingState

NUM, DIM, BATCH = 40, 6, 9
X, Y = rand(NUM, DIM, seed=5), torch.arange(NUM) % 3
NUM_EPOCHS = 2


def trained(machine: Machine, *, norm: bool = False, steps: int | None = None) -> dict[str, Any]:
    """What a run leaves: weights, attacked inputs by step, history and rollbacks.

    The guard, which thinks of its own rank, goes back once: were it asked everywhere, the processes would part.
    """
    middle = [nn.BatchNorm1d(8)] if norm else []
    model = seeded(lambda: nn.Sequential(nn.Linear(DIM, 8), *middle, nn.Tanh(), nn.Linear(8, 3)).double())
    if machine.rank:  # the first one's weights count
        with torch.no_grad():
            model[0].weight.add_(1.0)
    crafted: list[Tensor] = []
    recipe: Any = pgd_at(Linf(0.1), num_steps=3)

    def noted(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
        assert isinstance(recipe, Crafting)
        x_adv = recipe.craft(model, x, y, noise=noise)
        crafted.append(x_adv)
        return recipe.loss_on(model, x, x_adv, y)

    def guard(state: TrainingState) -> Rollback | None:
        state.notes["looks"] = state.notes.get("looks", 0) + 1
        return Rollback(rate_factor=0.5, reason="tried") if state.step == 4 and machine.rank == 0 else None

    guard.every = 2  # type: ignore[attr-defined]

    def validate(model: Any) -> dict[str, float]:
        assert machine.rank == 0, "only the first validates"
        return {"robust_accuracy": float((model(X).argmax(1) == Y).double().mean())}

    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    result = train(
        model, Batches(X, Y, BATCH, seed=1, shuffle=True), noted, optimizer,
        num_epochs=NUM_EPOCHS, validate=validate, guard=guard, machine=machine, averaging=0.9, seed=3,
        observe=lambda state: state.step == steps,
    )  # fmt: skip
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in result.history]
    return {
        "last": result.last, "averaged": result.averaged, "crafted": crafted, "history": history,
        "rollbacks": result.rollbacks, "stopped": result.stopped,
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    machine, folder = find_machine("cpu"), Path(sys.argv[1])
    asked = 3 if machine.rank == 1 else None  # only the second is asked to end
    found = {"plain": trained(machine), "norm": trained(machine, norm=True), "ended": trained(machine, steps=asked)}
    torch.save(found, folder / f"{machine.rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
