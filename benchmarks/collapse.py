"""Does the guard see a collapse, and leave healthy training alone? Runs on digits, each with a sentence of the guard.

    python benchmarks/collapse.py healthy --out FOLDER     ten healthy runs: an alarm here is a false one
    python benchmarks/collapse.py provoked --out FOLDER    settings that ruin a run, without the guard and with it

Each line: name, rollbacks and why, how it ended, held-out robust accuracy of the best and of the last epoch.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sparring.app.settings import TrainingSettings
from sparring.app.train_run import start_run

RECIPES = ("pgd-at:num_steps=5", "trades:num_steps=5", "mart:num_steps=5", "n-fgsm", "fgsm-rs")
HEALTHY: dict[str, dict[str, Any]] = {
    f"{recipe}, seed {seed}": {"threat": "linf:0.2", "recipe": recipe, "epochs": 10, "seed": seed}
    for recipe in RECIPES
    for seed in (0, 1)
}
PROVOKED: dict[str, dict[str, Any]] = {
    "rate 100 times too large": {
        "threat": "linf:0.2", "recipe": "fgsm-rs", "epochs": 15, "learning_rate": 0.5, "schedule": "constant"
    },
    "radius 0.4 at once": {"threat": "linf:0.4", "recipe": "pgd-at:num_steps=5", "epochs": 20, "radius_ramp": 0.0},
}  # fmt: skip


def main() -> None:
    """Trains, and prints a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["healthy", "provoked"])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    guards = {"healthy": ("watch:every=20",), "provoked": ("none", "watch:every=10")}[args.what]
    for name, settings in {"healthy": HEALTHY, "provoked": PROVOKED}[args.what].items():
        for guard in guards:
            folder = args.out / f"{name} {guard}".replace(" ", "-").replace(":", "_").replace("=", "")
            result = start_run(TrainingSettings(data="digits", guard=guard, **settings), folder)
            scores = [line["robust_accuracy"] for line in result.history] or [0.0]
            why = "; ".join(f"step {line['step']}: {line['reason']}" for line in result.rollbacks) or "no alarm"
            print(f"{name} | {guard} | {why} | {result.stopped or 'to its end'} | {max(scores):.3f} | {scores[-1]:.3f}")


if __name__ == "__main__":
    main()
