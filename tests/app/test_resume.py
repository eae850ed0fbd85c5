"""A killed run resumes to the same bits: real processes, real SIGKILL, also inside the write of a checkpoint."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from kill_and_resume import RUN, Kill, differences, killed_run, plans, reference, run_trial
from sparring.app.settings import TrainingSettings
from sparring.app.train_run import resume_run, start_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A run of four epochs of six batches, with averaged weights and a best checkpoint."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    rng = np.random.default_rng(0)
    y_train, y_test = np.arange(60) % 3, np.arange(30) % 3
    x_train, x_test = (rng.uniform(0, 1, (len(y), 5)).astype(np.float32) for y in (y_train, y_test))
    np.savez(path, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)
    return ("--data", str(path), "--threat", "linf:0.1", "--epochs", "4", "--batch-size", "9", "--model", "mlp",
            "--set", "averaging=0.9", "--set", "num_steps=2")  # fmt: skip


def undisturbed(arguments: tuple[str, ...], out: Path) -> None:
    """The reference, in this process."""
    options = {"data": arguments[1], "threat": "linf:0.1", "epochs": 4, "batch_size": 9, "model": "mlp"}
    start_run(TrainingSettings(**options, averaging=0.9, recipe="pgd-at:num_steps=2"), out)


def test_three_kills_inside_writes_and_epochs(tiny: tuple[str, ...], tmp_path: Path) -> None:
    undisturbed(tiny, tmp_path / "reference")
    plan = (
        Kill("checkpoint.pt", 3, "middle", every_batch=True),
        Kill("checkpoint.pt", 9, "renamed", every_batch=True),
        Kill("best.safetensors", 1, "written"),
    )
    out = tmp_path / "killed"
    kills = killed_run(out, tiny, plan, finish=resume_run)
    assert len(kills) == 3, kills
    assert "epoch 1, batch 2, with half a file beside it" in kills[0]
    assert "epoch 2, batch" in kills[1] and "batch 0" not in kills[1], "the second kill was not inside an epoch"
    assert differences(out, tmp_path / "reference") == []


def test_interrupted_at_every_batch(tiny: tuple[str, ...], tmp_path: Path) -> None:
    undisturbed(tiny, tmp_path / "reference")
    out, steps = tmp_path / "interrupted", []

    def stop(state: object) -> bool:
        steps.append(state.step)  # type: ignore[attr-defined]
        return True

    options = {"data": tiny[1], "threat": "linf:0.1", "epochs": 4, "batch_size": 9, "model": "mlp"}
    result = start_run(TrainingSettings(**options, averaging=0.9, recipe="pgd-at:num_steps=2"), out, observe=stop)
    while result.stopped:
        result = resume_run(out, observe=stop)
    assert steps == list(range(1, 25))
    assert differences(out, tmp_path / "reference") == []


def test_differences_sees_a_changed_bit(tiny: tuple[str, ...], tmp_path: Path) -> None:
    for name in ("a", "b"):
        undisturbed(tiny, tmp_path / name)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    path = tmp_path / "b" / "averaged.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    (tmp_path / "b" / "best.safetensors").unlink()
    assert differences(tmp_path / "a", tmp_path / "b") == ["best.safetensors", "averaged.safetensors"]


@pytest.mark.slow
def test_twenty_killed_runs(tmp_path: Path) -> None:
    seconds = reference(tmp_path / "reference", RUN)
    trials = [
        run_trial(tmp_path / str(number), tmp_path / "reference", RUN, plan)
        for number, plan in enumerate(plans(20, seconds, seed=0))
    ]
    assert [t for t in trials if not t.same] == []
    assert sum(bool(t.kills) for t in trials) == 20
    assert sum("checkpoint.pt write" in " ".join(t.kills) for t in trials) >= 5
