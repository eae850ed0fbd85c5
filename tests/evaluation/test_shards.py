"""Two real processes give what one gives, and neither waits for ever for the other."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shard_worker
from alike import check_same
from shard_worker import counting, judged
from sparring.core.machine import Machine

pytestmark = pytest.mark.skipif(not dist.is_available() or sys.platform == "win32", reason="no gloo, no SIGKILL")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, tuple[str, float]]]]:
    """The folder, and by process what each case gave and how long it took."""
    folder = tmp_path_factory.mktemp("shards")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, shard_worker.__file__, str(folder)]
    workers = [
        subprocess.Popen(command, env={**os.environ, **shared, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert workers[0].returncode == 0 and workers[1].returncode == -9, errors
    lines = [(folder / f"{rank}.jsonl").read_text().splitlines() for rank in range(2)]
    return folder, [{name: (text, seconds) for name, text, seconds in map(json.loads, own)} for own in lines]


ALIKE = ("same_as_alone", "stream_as_alone", "without_a_folder", "folders_of_their_own", "alone_in_a_group")


@pytest.mark.parametrize("case", ALIKE)
def test_two_processes_give_what_one_gives(outcomes: tuple[Path, list], case: str) -> None:
    assert [told[case][0] for told in outcomes[1]] == ["same", "same"]


def test_processes_with_other_settings_do_not_mix(outcomes: tuple[Path, list]) -> None:
    folder, told = outcomes
    for rank in range(2):
        text = told[rank]["other_seed"][0]
        assert text.startswith(f"ValueError: process {1 - rank} evaluates something else than process {rank}"), text
        assert told[rank]["old_parts"][0].startswith("OtherSettings: "), told[rank]["old_parts"]
        assert "seed (9 there, 3 here)" in told[rank]["old_parts"][0]
        assert told[rank]["other_order"][0].startswith(f"RuntimeError: process {1 - rank} saw other batches"), told[
            rank
        ]["other_order"]
        assert "unshuffled" in told[rank]["other_order"][0]
    assert not (folder / "other_seed").exists()


def test_a_process_that_dies_is_noticed(outcomes: tuple[Path, list]) -> None:
    folder, (told, of_the_dead) = outcomes
    text, seconds = told["one_dies"]
    assert "one_dies" not in of_the_dead
    assert text.startswith("RuntimeError: process 0 of 2 waited for the others, but one of them ended") and seconds < 30
    assert "start all processes again and they go on" in text
    assert sorted(p.name for p in (folder / "one_dies").iterdir()) == [
        *(f"{n:06d}.npz" for n in (0, 1, 2, 4)),
        "settings.json",
    ]
    calls: list[int] = []
    resumed = judged(folder / "one_dies", attacks=[counting(calls)], curve=())
    check_same(resumed, judged(attacks=[counting([])], curve=()))
    assert len(calls) == 1, "one process goes on where two were, with the one batch that is missing"


def test_a_process_of_several_needs_the_others(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"process 0 of 2 with torch\.distributed joining 1: .*--nproc-per-node 2"):
        judged(tmp_path / "parts", machine=Machine(torch.device("cpu"), 0, 2))
    assert not (tmp_path / "parts").exists()
