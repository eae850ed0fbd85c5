"""Two processes and one folder: is anything lost? Twenty trials of two `train`s or two `evaluate`s with the same --out.

The second starts a random moment after the first, or both at once. Right is: each ends with exit code 0, or with 2 and
a sentence that says that the folder is in use or holds a run already; at least one ends with 0; what lies in the
folder then is what one process alone writes (see kill_and_resume.py for what is compared), with nothing beside it.

    python benchmarks/two_processes.py [--trials 20] [--seed 0] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from common import Lines, provenance, table
from kill_and_resume import EVALUATION, RUN, differences, reference

SENTENCES = ("is in use: another process writes there", "already holds a run")


def start(arguments: Sequence[str], out: Path) -> subprocess.Popen[str]:
    """One process of `sparring`."""
    command = [sys.executable, "-m", "sparring", *arguments, "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)


def trial(arguments: Sequence[str], out: Path, wanted: Path, delay: float) -> list[str]:
    """What went wrong when the second process started `delay` seconds after the first; empty when nothing did."""
    first = start(arguments, out)
    time.sleep(delay)
    second = start(arguments, out)
    wrong, codes = [], []
    for process in (first, second):
        said = process.communicate(timeout=900)[1]
        codes.append(process.returncode)
        if process.returncode != 0 and (process.returncode != 2 or not any(text in said for text in SENTENCES)):
            wrong.append(f"exit code {process.returncode}: {said.strip()[-300:]}")
    if 0 not in codes:
        wrong.append(f"nobody finished: exit codes {codes}")
    left = [f"left: {path.name}" for path in out.rglob(".*") if path.is_file()]
    return wrong + left + [f"differs: {name}" for name in differences(out, wanted)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/two-processes"), help="folder for runs and results")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    chance, lines = random.Random(args.seed), Lines(args.out / f"trials-{args.seed}.jsonl")
    trained, evaluated = args.out / "reference", args.out / "reference-evaluation"
    shutil.rmtree(trained, ignore_errors=True)
    shutil.rmtree(evaluated, ignore_errors=True)
    work = {"train": (("train", *RUN), trained), "evaluate": ((*EVALUATION, str(trained)), evaluated)}
    seconds = {"train": reference(trained), "evaluate": reference(evaluated, work["evaluate"][0])}
    for number in range(args.trials):
        what = "evaluate" if number % 2 else "train"
        delay = 0.0 if number % 4 < 2 else chance.uniform(0, seconds[what])
        folder = args.out / f"trial-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        arguments, wanted = work[what]
        wrong = trial(arguments, folder, wanted, delay)
        lines.add({"what": what, "number": number, "delay": round(delay, 2), "wrong": wrong})
        print(f"trial {number}: {what}, second after {delay:.1f} s: {wrong or 'nothing lost'}", flush=True)
        if not wrong:
            shutil.rmtree(folder)
    rows = [(r["what"], f"{r['delay']:.1f}", "; ".join(r["wrong"]) or "nothing lost") for r in lines.records]
    print("\n" + table(("both", "seconds between", "outcome"), rows))
    print("\n" + provenance(seed=args.seed, n=f"{len(rows)} pairs of processes"))
    sys.exit(1 if any(r["wrong"] for r in lines.records) else 0)


if __name__ == "__main__":
    main()
