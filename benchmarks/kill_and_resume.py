"""Does a killed run end with the same bits? Runs are killed, gone on with, and compared byte by byte.

The reference runs once without a disturbance. Then the same run starts anew for each trial, is killed by SIGKILL (no
handler runs), gone on with (`sparring train --resume`; `sparring evaluate` by the same command again), killed again,
and so on until its plan is through; the last process finishes. Compared of a training: best, last and averaged weights
(the files' bytes), and metrics.jsonl and training.json but for the seconds in them; of an evaluation: examples.csv,
the arrays of gallery.npz, and results.json but for seconds, date and command. Three kinds of trials:
- writes: the process kills itself inside the write of a checkpoint (or of another file): before the first byte, in
  the middle of the bytes, before the file is put in place, right after;
- batches (of a training): the same with a checkpoint after every batch, so that it dies in the middle of an epoch;
- moments: killed from outside at random moments between the first file and the end, up to three times.

    python benchmarks/kill_and_resume.py [--what guarded | evaluate] [--trials 20] [--seed 0] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

DYING = Path(__file__).with_name("train_and_die.py")
EXPECTED = (0, 1, 137) if sys.platform == "win32" else (0, -signal.SIGKILL)
WEIGHTS = ("best.safetensors", "last.safetensors", "averaged.safetensors")
RUN = (
    "--data", "digits", "--threat", "linf:0.1", "--epochs", "4", "--model", "cnn-small", "--set", "averaging=0.99",
    "--set", "num_steps=2", "--set", "held_out=100",
)  # fmt: skip
"""The training that is killed: averaged weights and a best checkpoint are active."""
GUARDED = (
    "--data", "digits", "--threat", "linf:0.1", "--epochs", "3", "--model", "mlp", "--set", "averaging=0.99",
    "--set", "num_steps=2", "--set", "held_out=100", "--set", "learning_rate=0.5", "--set", "schedule=constant",
    "--guard", "watch:every=5",
)  # fmt: skip
"""A training under a guard that goes back, since its rate is a hundred times too large."""
EVALUATION = (
    "evaluate", "--num-examples", "200", "--batch-size", "20",
    "--attacks", "pgd:num_steps=20,restarts=2,square:num_queries=100",
)  # fmt: skip
"""The evaluation that is killed, of the reference training: ten batches, the curve, all checks."""


@dataclass(frozen=True)
class Kill:
    """How one process ends: at the `number`-th write of `file` at `place`, or after `seconds` of training."""

    file: str = ""
    number: int = 0
    place: str = "renamed"
    every_batch: bool = False
    seconds: float | None = None

    def __str__(self) -> str:
        if self.seconds is not None:
            return f"after {self.seconds:.2f} s"
        return f"{self.file} write {self.number}, {self.place}{', every batch saved' if self.every_batch else ''}"


@dataclass
class Trial:
    """What came out of one plan. `kills` really happened; `same` are the files like those of the reference."""

    plan: tuple[str, ...]
    kills: list[str]
    same: bool
    different: list[str]


def command(out: Path, arguments: Sequence[str], kill: Kill) -> list[str]:
    """Starts the run in `out`, or goes on with it when it has begun."""
    if arguments[0] == "evaluate":
        how = [*arguments, "--out", str(out)]
    elif (out / "config.json").exists():
        how = ["train", "--resume", "--out", str(out)]
    else:
        how = ["train", "--out", str(out), *arguments]
    marks = [kill.file or "none", str(kill.number), kill.place, str(int(kill.every_batch))]
    return [sys.executable, str(DYING), *marks, *how]


def process(out: Path, arguments: Sequence[str], kill: Kill, limit: float = 600.0) -> int:
    """One process of the run; its exit code, not 0 when it was killed. Raises RuntimeError when it failed itself."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command(out, arguments, kill), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as child:
        if kill.seconds is not None:
            deadline = time.monotonic() + limit
            begun = _stamp(out)
            while _stamp(out) == begun and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            end = time.monotonic() + kill.seconds
            while child.poll() is None and time.monotonic() < end:
                time.sleep(0.002)
            child.kill()
        try:
            err = child.communicate(timeout=limit)[1]
        except subprocess.TimeoutExpired:
            child.kill()
            raise
    if child.returncode not in EXPECTED:
        raise RuntimeError(f"{out}: exit code {child.returncode} after {kill}: {err.strip()[-2000:]}")
    return child.returncode


def _stamp(out: Path) -> tuple[Any, ...]:
    """Changes as soon as a process writes into the folder."""
    found = []
    for path in (out / "config.json", out / "checkpoint.pt", *out.glob(".checkpoint.pt.*part"), out / "parts"):
        try:
            found.append(path.stat().st_mtime_ns)
        except OSError:
            found.append(0)
    return tuple(found)


def reference(out: Path, arguments: Sequence[str] = RUN) -> float:
    """Runs without a disturbance; the seconds from the first file (of an evaluation: the start) on."""
    begun = time.time()
    if process(out, arguments, Kill()):
        raise RuntimeError(f"the reference run in {out} was killed")
    if arguments[0] == "evaluate":
        return time.time() - begun
    return (out / "training.json").stat().st_mtime - (out / "config.json").stat().st_mtime


def killed_run(
    out: Path, arguments: Sequence[str], plan: Sequence[Kill], finish: Callable[[Path], Any] | None = None
) -> list[str]:
    """Starts the run, kills it by the plan, and lets it finish (in one more process, or by `finish`).

    Returns the kills that came before the end.
    """
    happened = []
    for kill in plan:
        if process(out, arguments, kill):
            happened.append(f"{kill} ({_position(out)})")
    if happened and finish:
        finish(out)
    elif happened:
        process(out, arguments, Kill())
    return happened


def _position(out: Path) -> str:
    """Where the last whole checkpoint is, and whether half a file lies about."""
    import torch

    halves = sum(1 for _ in out.glob("**/.*.part"))
    half = ", with half a file beside it" if halves else ""
    if (out / "parts").exists() or (out / "results.json").exists():
        return f"{sum(1 for _ in out.glob('parts/0*.npz'))} batches kept{half}"
    if not (out / "checkpoint.pt").exists():
        return f"no checkpoint yet{half}"
    state = torch.load(out / "checkpoint.pt", weights_only=True, map_location="cpu")
    return f"checkpoint at epoch {state['epoch'] + 1}, batch {state['batch']}{half}"


def differences(run: Path, wanted: Path) -> list[str]:
    """The files of a finished run that differ from those of the reference."""
    if (wanted / "results.json").exists():
        ours, theirs = _evaluated(run), _evaluated(wanted)
        return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    found = []
    for name in WEIGHTS:
        theirs, ours = ((folder / name).read_bytes() if (folder / name).exists() else None for folder in (wanted, run))
        if theirs != ours:
            found.append(name)
    for name in ("metrics.jsonl", "training.json"):
        if _without_seconds(run / name) != _without_seconds(wanted / name):
            found.append(name)
    return found + sorted(path.name for path in run.glob(".*.part"))


def _evaluated(folder: Path) -> dict[str, Any]:
    """What is in each file of an evaluation, but for seconds, date and command; of others only that they are there."""
    import numpy as np

    found: dict[str, Any] = {str(path.relative_to(folder)): None for path in folder.rglob("*") if path.is_file()}
    found.pop("results.before.json", None)  # killed after the results were written, and measured anew
    if "results.json" in found:
        record = json.loads((folder / "results.json").read_text())
        found["results.json"] = {k: _strip(v) for k, v in record.items() if k not in ("created", "command")}
    if "examples.csv" in found:
        found["examples.csv"] = (folder / "examples.csv").read_bytes()
    if "gallery.npz" in found:
        with np.load(folder / "gallery.npz", allow_pickle=False) as arrays:
            found["gallery.npz"] = {name: arrays[name].tobytes() for name in arrays.files}
    return found


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _strip(v) for k, v in value.items() if k != "seconds"}
    return [_strip(v) for v in value] if isinstance(value, list) else value


def _without_seconds(path: Path) -> Any:
    text = path.read_text(encoding="utf-8") if path.exists() else "null"
    parts = text.splitlines() if path.suffix == ".jsonl" else [text]
    return [_strip(json.loads(part)) for part in parts]


def plans(num: int, duration: float, seed: int) -> list[tuple[Kill, ...]]:
    """`num` plans: seven in twenty die inside writes, seven with every batch saved, the rest at random moments."""
    chance = random.Random(seed)
    writes: list[tuple[Kill, ...]] = [
        (Kill("checkpoint.pt", 1, "before"),),
        (Kill("checkpoint.pt", 2, "middle"),),
        (Kill("checkpoint.pt", 3, "written"), Kill("checkpoint.pt", 1, "middle")),
        (Kill("checkpoint.pt", 2, "renamed"),),
        (Kill("best.safetensors", 1, "middle"), Kill("checkpoint.pt", 1, "renamed")),
        (Kill("last.safetensors", 2, "written"), Kill("metrics.jsonl", 1, "middle")),
        (Kill("averaged.safetensors", 1, "middle"), Kill("training.json", 1, "written")),
    ]
    batches: list[tuple[Kill, ...]] = [
        tuple(
            Kill("checkpoint.pt", chance.randint(2, 40), place, every_batch=True)
            for place in (first, chance.choice(("before", "middle", "written", "renamed")))
        )
        for first in ("before", "middle", "written", "renamed", "middle", "renamed", "written")
    ]
    return _in_turn(num, writes, batches, chance, duration)


def evaluation_plans(num: int, duration: float, seed: int) -> list[tuple[Kill, ...]]:
    """`num` plans: half die inside writes of kept batches and of the results, the others at random moments."""
    chance, places = random.Random(seed), ("before", "middle", "written", "renamed")
    files = ("settings.json", "results.json", "examples.csv", "gallery.npz", "report.html")
    writes: list[tuple[Kill, ...]] = []
    for i in range(num):
        batch = chance.randrange(9)
        first = Kill(f"{batch:06d}.npz", 1, places[i % 4])
        then = Kill(chance.choice((f"{chance.randrange(batch + 1, 10):06d}.npz", *files[1:])), 1, chance.choice(places))
        writes.append((Kill(files[i % 5], 1, places[i % 4]),) if i % 3 == 2 else (first, then))
    moments = [
        tuple(Kill(seconds=chance.uniform(0, duration / 2)) for _ in range(chance.randint(1, 3))) for _ in writes
    ]
    return [writes[i // 2] if i % 2 else moments[i // 2] for i in range(num)]


def _in_turn(
    num: int, writes: list[tuple[Kill, ...]], batches: list[tuple[Kill, ...]], chance: random.Random, duration: float
) -> list[tuple[Kill, ...]]:
    found = []
    for i in range(num):
        if i % 3 == 0 and writes:
            found.append(writes.pop(0))
        elif i % 3 == 1 and batches:
            found.append(batches.pop(0))
        else:
            moments = [chance.uniform(0, duration / n) for n in range(1, chance.randint(1, 3) + 1)]
            found.append(tuple(Kill(seconds=s, every_batch=chance.random() < 0.5) for s in moments))
    return found


def run_trial(folder: Path, wanted: Path, arguments: Sequence[str], plan: Sequence[Kill]) -> Trial:
    """One plan in a new folder; moments that come after the end are halved until one comes before it."""
    kills = killed_run(folder, arguments, plan)
    while not kills and all(kill.seconds is not None for kill in plan):
        shutil.rmtree(folder)
        plan = [replace(kill, seconds=(kill.seconds or 0) / 2) for kill in plan]
        kills = killed_run(folder, arguments, plan)
    different = differences(folder, wanted)
    return Trial(tuple(str(kill) for kill in plan), kills, not different, different)


def main() -> None:
    import torch

    from common import Lines, provenance, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/kill-and-resume"), help="folder for runs and results")
    parser.add_argument("--what", choices=("train", "guarded", "evaluate"), default="train")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in the trials
    run, wanted, make_plans, last = RUN, args.out / "reference", plans, "training.json"
    if args.what == "guarded":
        run = GUARDED
    if args.what == "evaluate":
        if not (wanted / "training.json").exists():
            reference(wanted)
        run, wanted = (*EVALUATION, str(wanted)), args.out / "reference-evaluation"
        make_plans, last = evaluation_plans, "results.json"
    lines = Lines(args.out / f"{args.what}-{args.seed}.jsonl")
    first = lines.find(what="reference")
    if first is None or not (wanted / last).exists():
        shutil.rmtree(wanted, ignore_errors=True)
        first = lines.add({"what": "reference", "seconds": reference(wanted, run)})
    backs = json.loads((wanted / last).read_text(encoding="utf-8")).get("rollbacks", [])
    if args.what == "guarded" and not backs:
        sys.exit("the undisturbed run never went back, so nothing would be shown")
    for number, plan in enumerate(make_plans(args.trials, first["seconds"], args.seed)):
        if lines.find(what="trial", number=number):
            continue
        folder = args.out / f"{args.what}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        trial = run_trial(folder, wanted, run, plan)
        lines.add({"what": "trial", "number": number, **asdict(trial)})
        if trial.same:
            shutil.rmtree(folder)
        print(f"trial {number}: {'same' if trial.same else trial.different}, {len(trial.kills)} kills", flush=True)
    trials = [r for r in lines.records if r["what"] == "trial" and r["number"] < args.trials]
    rows = []
    for r in sorted(trials, key=lambda r: r["number"]):
        kills = "; ".join(r["kills"]) or "none came before the end"
        rows.append((kills, "same" if r["same"] else f"DIFFERENT: {', '.join(r['different'])}"))
    good, dead = sum(r["same"] for r in trials), sum(bool(r["kills"]) for r in trials)
    inside = sum(any("write" in kill for kill in r["kills"]) for r in trials)
    print("\n" + table(("killed", "what was written"), rows))
    print(f"\n{good} of {len(trials)} runs ended with the bytes of the undisturbed run; {dead} were really killed,")
    print(f"{sum(len(r['kills']) for r in trials)} times in all; {inside} of them at the write of a file.\n")
    if args.what == "guarded":
        print(f"Ways back in each: at steps {', '.join(str(line['step']) for line in backs)}.\n")
    verb = "evaluate" if args.what == "evaluate" else "train"
    print(provenance(seed=args.seed, n=f"{len(trials)} runs of: sparring {verb} {' '.join(run)}"))
    sys.exit(0 if good == dead == len(trials) else 1)


if __name__ == "__main__":
    main()
