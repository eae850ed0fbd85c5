"""Where work is done: devices and layouts as asked, and processes that neither mix up nor wait for the dead."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sparring.core import machine as module
from sparring.core.machine import Machine, find_machine, joined

CPU = torch.device("cpu")
WORKER = """
import json, os, signal, sys, time
import torch
from sparring.core.machine import Machine, find_machine, joined

told = []
with joined() as here:
    told.append([here.rank, here.world, str(here.device), [n for n in range(5) if here.mine(n)]])
    told.append(here.gather({"rank": here.rank, "table": torch.full((2,), float(here.rank))})[1]["table"].tolist())
    time.sleep(here.rank)  # one works longer
    told.append(here.gather(here.rank))
    found = find_machine("cpu")
    told.append([found.rank, found.world])
    told.append(Machine(found.device).gather("alone"))
    try:
        Machine(found.device, 0, 3).gather(0)
    except ValueError as error:
        told.append(str(error))
    if here.rank:
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.monotonic()
    try:
        here.gather(here.rank)
    except RuntimeError as error:
        told.append([str(error), time.monotonic() - started])
    print(json.dumps(told))
"""


def two_processes(program: str) -> list[subprocess.CompletedProcess[str]]:
    """The program, run by two processes as torchrun would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", program], env={**shared, "RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        spoken = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    return [subprocess.CompletedProcess(w.args, w.returncode, *said) for w, said in zip(workers, spoken, strict=True)]


@pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="no gloo, no SIGKILL")
def test_two_processes() -> None:
    first, second = two_processes(WORKER)
    assert first.returncode == 0 and second.returncode == -9, (first.stderr, second.stderr)
    of_rank, tables, ranks, found, alone, refused, (sentence, seconds) = json.loads(first.stdout)
    assert of_rank == [0, 2, "cpu", [0, 2, 4]] and found == [0, 2]
    assert (tables, ranks, alone) == ([1.0, 1.0], [0, 1], ["alone"])
    assert refused.startswith("process 0 of 3 with torch.distributed joining 2: ")
    assert refused.endswith("torchrun --nproc-per-node 3")
    assert sentence.startswith("process 0 of 2 waited for the others, but one of them ended") and seconds < 30
    assert sentence.endswith("start all processes again and they go on")


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, world in (("0", "1"), (None, "4")):  # some schedulers set the size alone
        monkeypatch.setenv("WORLD_SIZE", world)
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK")
        with joined() as here:
            assert here == Machine(CPU) and not dist.is_initialized()
            value = object()
            assert here.gather(value)[0] is value and all(map(here.mine, range(5)))


@pytest.mark.parametrize(("rank", "world"), [(2, 2), (-1, 2), (0, 0)])
def test_ranks_that_cannot_be(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match=r"process .* of .*expected a rank from 0 to world - 1"):
        Machine(CPU, rank, world)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_every_piece_has_one_owner(world: int) -> None:
    machines = [Machine(CPU, rank, world) for rank in range(world)]
    assert all(sum(m.mine(number) for m in machines) == 1 for number in range(20))


def test_waiting_together_needs_a_group() -> None:
    with pytest.raises(ValueError, match=r"torch.distributed joining 1: .*torchrun --nproc-per-node 2"):
        Machine(CPU, 0, 2).gather(0)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_machine("cpu") == Machine(CPU)
    assert find_machine().device.type in ("cpu", "cuda", "mps")
    for name in ("tpu", "cuda:99", "cuda:x", "cpu:5"):
        with pytest.raises(ValueError, match=rf"device '{name}' is not available here; there is .*cpu"):
            find_machine(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    assert find_machine().device == torch.device("cuda")
    assert find_machine("cuda:1").device == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert find_machine("cuda").device == find_machine().device == torch.device("cuda", 1)
    assert find_machine("cuda:0").device == torch.device("cuda", 0), "who names a device gets that one"
    assert find_machine("cpu").device == CPU
    assert [find_machine("cuda", channels_last=c).channels_last for c in (None, True, False)] == [True, True, False]
    assert not find_machine("cpu").channels_last


def test_what_is_placed_keeps_its_values() -> None:
    images, rows = torch.rand(2, 3, 5, 7), torch.rand(2, 3)
    plain, last = Machine(CPU), Machine(CPU, channels_last=True)
    assert plain.place(images) is images and last.place(rows) is rows
    placed: Any = last.place({"image": images, "row": rows})
    assert placed["image"].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(placed["image"], images) and placed["row"] is rows and images.is_contiguous()
    net = nn.Conv2d(3, 4, 3)
    assert last.place(net) is net and net.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.place(len) is len and plain.place(None) is None
    moved = Machine(torch.device("meta")).place({"a": rows})
    assert moved["a"].device.type == "meta"


def test_processes_of_a_scheduler_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(module.dist, "is_available", lambda: False)
    with pytest.raises(ValueError, match="unset WORLD_SIZE"), joined():
        pass
