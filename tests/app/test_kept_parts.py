"""`sparring evaluate`, killed for real and run again, or shared by two processes, gives the same files."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import train_and_die
from command import call
from sparring.evaluation.all_batches import AllBatches

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")

NETS = """
import torch
from torch import nn

def make():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
"""


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set, and a network that has learned it a little."""
    folder = tmp_path_factory.mktemp("shop")
    rng = np.random.default_rng(0)
    x, y = rng.uniform(0, 1, (40, 5)).astype(np.float32), np.arange(40) % 3
    x[np.arange(40), y] = 0.4 + 0.6 * x[np.arange(40), y]
    np.savez(folder / "tiny.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    (folder / "nets.py").write_text(NETS)
    scope: dict[str, Any] = {}
    exec(NETS, scope)
    net, data, labels = scope["make"](), torch.from_numpy(x), torch.from_numpy(y)
    optimizer = torch.optim.Adam(net.parameters(), 0.05)
    for _ in range(60):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(data), labels).backward()
        optimizer.step()
    torch.save(net.state_dict(), folder / "weights.pt")
    return folder


def evaluation(shop: Path, out: Path, *more: str) -> list[str]:
    return [
        "evaluate", "--model", f"{shop}/nets.py:make", "--weights", f"{shop}/weights.pt", "--data", f"{shop}/tiny.npz",
        "--threat", "linf:0.1", "--attacks", "fgsm,pgd:num_steps=3,restarts=2", "--batch-size", "10", "--no-checks",
        "--out", str(out), *more,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def killed(arguments: list[str], file: str, place: str) -> str:
    """Runs them in a process that kills itself where it writes that file; what it said."""
    command = [sys.executable, train_and_die.__file__, file, "1", place, "0", *arguments]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    return done.stderr


def content(folder: Path) -> dict[str, Any]:
    """What the files of an evaluation hold, but for times and the command line."""
    record = json.loads((folder / "results.json").read_text())
    kept = {k: v for k, v in record.items() if k not in ("created", "command")}
    with np.load(folder / "gallery.npz", allow_pickle=False) as gallery:
        pictures = {name: gallery[name].tobytes() for name in gallery.files}
    names = sorted(path.name for path in folder.iterdir())
    examples = (folder / "examples.csv").read_text()
    return {"results": _untimed(kept), "examples": examples, "gallery": pictures, "names": names}


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(inner) for key, inner in value.items() if key != "seconds"}
    return [_untimed(inner) for inner in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def undisturbed(shop: Path) -> dict[str, Any]:
    code, out, err = call(*evaluation(shop, shop / "undisturbed"))
    assert code == 0 and "going on" not in err, err
    assert ": not checked\n" in out and ", certified at least " in out
    found = content(shop / "undisturbed")
    certified, robust, clean = (
        found["results"]["metrics"][f"{kind}_accuracy"]["count"] for kind in ("certified", "robust", "clean")
    )
    assert certified < robust < clean
    assert found["names"] == ["examples.csv", "gallery.npz", "report.html", "results.json"], "the parts are still there"
    return found


def test_killed_three_times_and_still_the_same(shop: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    arguments, parts = evaluation(shop, tmp_path), tmp_path / "parts"
    killed(arguments, "000001.npz", "middle")
    assert sorted(p.name[:11] for p in parts.iterdir()) == [".000001.npz", "000000.npz", "settings.js"]
    said = killed(arguments, "000002.npz", "renamed")
    assert "going on with 1 of 4 batches done\n" in said
    said = killed(arguments, "results.json", "written")
    assert "going on with 3 of 4 batches done\n" in said
    assert len(list(parts.glob("*.npz"))) == 4 and not (tmp_path / "results.json").exists()
    code, _, err = call(*arguments)
    assert code == 0 and "going on with 4 of 4 batches done\n" in err
    assert content(tmp_path) == undisturbed


def test_other_settings_start_anew(shop: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    def stops(self: Any, key: Any, *rest: Any) -> Any:
        if key.number == 2:
            raise KeyboardInterrupt
        return real(self, key, *rest)

    real = AllBatches._compute
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AllBatches, "_compute", stops)
        code, _, err = call(*evaluation(shop, tmp_path, "--seed", "1"))
    assert code == 130 and "the finished batches are kept; the same command goes on with them" in err
    assert len(list((tmp_path / "parts").glob("*.npz"))) == 2
    code, _, err = call(*evaluation(shop, tmp_path))
    assert code == 0 and "going on" not in err
    assert content(tmp_path) == undisturbed


def test_the_batch_size_changes_no_verdict(shop: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    code, _, err = call(*evaluation(shop, tmp_path, "--batch-size", "7"))
    assert code == 0, err
    rows = [line.split(",")[:6] for line in content(tmp_path)["examples"].splitlines()]
    wanted = [line.split(",")[:6] for line in undisturbed["examples"].splitlines()]
    assert [row[:3] + row[4:] for row in rows] == [row[:3] + row[4:] for row in wanted]


def test_two_processes_write_what_one_writes(shop: Path, undisturbed: dict[str, Any], tmp_path: Path) -> None:
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command = [*run, "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "sparring"]
    command += evaluation(shop, tmp_path)
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("% robust at") == 1 and done.stderr.count("report: ") == 1, "not one process alone spoke"
    assert content(tmp_path) == undisturbed


@pytest.mark.slow
def test_killed_at_random_moments(shop: Path, tmp_path: Path) -> None:
    attacks = ["--attacks", "pgd:num_steps=400,restarts=5", "--batch-size", "2"]
    reference, out = evaluation(shop, tmp_path / "reference", *attacks), tmp_path / "killed"
    started = time.monotonic()
    assert call(*reference)[0] == 0
    of_a_batch, chance, kills = (time.monotonic() - started) / 20, random.Random(0), 0
    arguments = evaluation(shop, out, *attacks)
    for _ in range(6):
        before = set(out.glob("parts/*"))
        command = [sys.executable, "-m", "sparring", *arguments]
        with subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL) as one:
            deadline = time.monotonic() + 60
            while set(out.glob("parts/*")) == before and one.poll() is None and time.monotonic() < deadline:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 3 * of_a_batch))
            kills += one.poll() is None
            one.kill()
        if (out / "results.json").exists():
            break
    assert kills >= 3
    assert call(*arguments)[0] == 0
    assert content(out) == content(tmp_path / "reference")
