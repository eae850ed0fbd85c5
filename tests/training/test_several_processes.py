"""Two processes that share every batch train what one trains: the same examples, noise and starts, the same steps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))

import shared_worker
from shared_worker import BATCH, NUM_EPOCHS, trained

from command import call
from sparring.core.machine import ONE_PROCESS, Machine

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="no gloo, no SIGKILL")


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes has after the same runs."""
    folder = tmp_path_factory.mktemp("shared")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    workers = [
        subprocess.Popen(
            [sys.executable, shared_worker.__file__, str(folder)], stderr=subprocess.PIPE, text=True,
            env=environment(**shared, RANK=str(rank), PYTHONPATH=path),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_same_examples_noise_and_starts_and_the_same_steps(both: list[dict[str, Any]]) -> None:
    alone, shared = trained(ONE_PROCESS), [found["plain"] for found in both]
    assert len(alone["crafted"]) == NUM_EPOCHS * 5
    for step, whole in enumerate(alone["crafted"]):
        parts = [found["crafted"][step] for found in shared]
        assert [len(part) for part in parts] == [len(whole) // 2, len(whole) - len(whole) // 2]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)
    for kind in ("last", "averaged"):
        for name, weights in alone[kind].items():
            torch.testing.assert_close(shared[0][kind][name], weights, rtol=0, atol=1e-9)
    for ours, theirs in zip(shared[0]["history"], alone["history"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)
    assert shared[0]["rollbacks"] == alone["rollbacks"]
    assert len(alone["rollbacks"]) == 1


@pytest.mark.parametrize("case", ["plain", "norm"])
def test_all_processes_have_the_same_bits(both: list[dict[str, Any]], case: str) -> None:
    first, second = (found[case] for found in both)
    for kind in ("last", "averaged"):
        assert all(torch.equal(first[kind][name], weights) for name, weights in second[kind].items())
    assert first["history"] == second["history"]
    assert first["rollbacks"] == second["rollbacks"]


def test_one_is_asked_to_end_and_all_do(both: list[dict[str, Any]]) -> None:
    stopped = [found["ended"] for found in both]
    assert [found["stopped"] for found in stopped] == ["Training was interrupted."] * 2
    assert [len(found["crafted"]) for found in stopped] == [4, 4], "the next look of the guard comes after step 4"


def test_every_process_has_a_part() -> None:
    cpu = torch.device("cpu")
    assert [Machine(cpu, rank, 3).rows(8) for rank in range(3)] == [slice(0, 2), slice(2, 5), slice(5, 8)]
    with pytest.raises(ValueError, match="a batch of 2 cannot be shared by 3 processes"):
        Machine(cpu, 0, 3).rows(2)
    assert BATCH % 2, "the parts are of different sizes, so that their shares count"


def started(out: Path, *more: str) -> subprocess.Popen[str]:
    """`sparring train` of digits in two processes."""
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d"]
    command = [*run, "--rdzv-endpoint", "localhost:0", "-m", "sparring", "train", "--out", str(out), *more]
    return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


RUN = (
    "--data", "digits", "--threat", "linf:0.1", "--epochs", "2", "--model", "mlp", "--set", "num_steps=2",
    "--set", "held_out=100",
)  # fmt: skip


def test_a_run_by_two_processes(tmp_path: Path) -> None:
    process = started(tmp_path / "run", *RUN)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert err.count("best epoch") == 1, "not one process alone spoke"
    history = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(history) == 2
    code, _, said = call("train", "--data", "digits", *RUN[2:], "--out", str(tmp_path / "alone"))
    assert code == 0, said
    alone = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert history[-1]["train_loss"] == pytest.approx(alone[-1]["train_loss"], rel=1e-3)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted(
        p.name for p in (tmp_path / "alone").iterdir()
    )


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="no pgrep, which finds the processes of torchrun")
def test_one_process_dies_and_one_alone_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    long = [part if part != "2" or RUN[i - 1] != "--epochs" else "400" for i, part in enumerate(RUN)]
    process = started(folder, *long)
    try:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoint.pt").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        workers = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode != 0
    assert "exitcode:-9" in err.replace(" ", ""), err
    before = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["epoch"]
    epochs: list[int] = []

    def stops(state: Any) -> bool:
        epochs.append(state.epoch)
        return len(epochs) > 2

    from sparring.app.train_run import resume_run

    resume_run(folder, observe=stops)
    assert epochs[0] >= before + 1
