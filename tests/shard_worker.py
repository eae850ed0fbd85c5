"""One of two processes that share evaluations: `python shard_worker.py FOLDER`, with the environment of torchrun.

tests/evaluation/test_shards.py starts both. Writes what happened, case by case.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from alike import check_same
from contracts import rand, seeded
from sparring.attacks.catalogue import fgsm, pgd
from sparring.core.machine import find_machine
from sparring.evaluation.measure import ONE_PROCESS, Evaluation, measure
from sparring.threats import Linf

NUM, DIM = 33, 5
X = rand(NUM, DIM, seed=3)
MODEL = seeded(lambda: nn.Sequential(nn.Linear(DIM, 9), nn.Tanh(), nn.Linear(9, 3)).double().eval())
with torch.no_grad():
    MODEL[2].bias -= MODEL(X).median(0).values
    Y = MODEL(X).argmax(1)
Y[::7] = (Y[::7] + 1) % 3


def batches(start: int = 0) -> list[tuple[Tensor, Tensor]]:
    order = torch.arange(NUM).roll(start)
    return list(zip(X[order].split(7), Y[order].split(7), strict=True))


def stream() -> Iterator[tuple[Tensor, Tensor]]:
    yield from batches()


def judged(parts: Path | None = None, **options: Any) -> Evaluation:
    """The evaluation that all cases share."""
    given = {"batches": batches(), "attacks": [fgsm, lambda t: pgd(t, num_steps=3, restarts=2)], "seed": 3, **options}
    return measure(
        MODEL,
        given.pop("batches"),
        Linf(0.05),
        given.pop("attacks"),
        keep=parts,
        machine=given.pop("machine", find_machine("cpu") if parts else ONE_PROCESS),
        **given,
    )


def counting(calls: list[int], kill_at: Sequence[int] = ()) -> Callable[[Any], Any]:
    """FGSM that notes its calls, and kills its process at those."""

    def make(threat: Any) -> Any:
        inner = fgsm(threat)

        def attack(model: Any, x: Tensor, y: Tensor, *, noise: Any = None) -> Any:
            calls.append(len(y))
            if len(calls) in kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return inner(model, x, y, noise=noise)

        return attack

    return make


def same_as_alone(folder: Path, rank: int) -> str:
    check_same(judged(folder), judged(machine=ONE_PROCESS))
    return "same"


def stream_as_alone(folder: Path, rank: int) -> str:
    calls: list[int] = []
    shared = judged(folder, batches=stream(), attacks=[counting(calls)], curve=())
    assert len(calls) == (3 if rank == 0 else 2), f"process {rank} computed {len(calls)} of 5 batches"
    check_same(shared, judged(attacks=[counting([])], curve=(), machine=ONE_PROCESS))
    return "same"


def without_a_folder(folder: Path, rank: int) -> str:
    calls: list[int] = []
    shared = judged(attacks=[counting(calls)], curve=(), machine=find_machine("cpu"))
    assert len(calls) == (3 if rank == 0 else 2), f"process {rank} computed {len(calls)} of 5 batches"
    check_same(shared, judged(attacks=[counting([])], curve=()))
    return "same"


def folders_of_their_own(folder: Path, rank: int) -> str:
    """As on two machines that share no file system; each goes on with what it had."""
    judged(folder / str(rank), batches=batches()[:3])
    check_same(judged(folder / str(rank)), judged(machine=ONE_PROCESS))
    assert sorted(int(p.stem) % 2 for p in (folder / str(rank)).glob("*.npz")) == [rank] * (3 - rank)
    return "same"


def alone_in_a_group(folder: Path, rank: int) -> str:
    """No machine was named: every process evaluates what it is given, and waits for nobody."""
    if rank == 0:
        check_same(judged(), judged(machine=ONE_PROCESS))
    return "same"


def other_seed(folder: Path, rank: int) -> str:
    judged(folder, seed=rank)
    return "no error"


def old_parts(folder: Path, rank: int) -> str:
    if rank == 0:
        judged(folder, seed=9, machine=ONE_PROCESS)
    dist.barrier()
    judged(folder, seed=3)
    return "no error"


def other_order(folder: Path, rank: int) -> str:
    judged(folder, batches=batches(rank))
    return "no error"


def one_dies(folder: Path, rank: int) -> str:
    judged(folder, attacks=[counting([], kill_at=[2] if rank else [])], curve=())
    return "no error"


CASES = (
    same_as_alone, stream_as_alone, without_a_folder, folders_of_their_own, alone_in_a_group, other_seed, old_parts,
    other_order, one_dies,
)  # fmt: skip


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for case in CASES:
        started = time.monotonic()
        try:
            outcome = case(folder / case.__name__, rank)
        except (ValueError, RuntimeError) as error:
            outcome = f"{type(error).__name__}: {error}"
        with (folder / f"{rank}.jsonl").open("a") as lines:
            lines.write(json.dumps([case.__name__, outcome, time.monotonic() - started]) + "\n")
        if case is not one_dies:
            dist.barrier()


if __name__ == "__main__":
    main()
