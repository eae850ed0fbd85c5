"""Recipes and their parts at equal sample passes: what does each buy on MNIST (Linf 0.3) or CIFAR-10 (Linf 8/255)?

A pass is one forward or one backward of one example; what costs more a step gets fewer epochs. The best epoch is
chosen by the run's own validation. Judged by the plan `--plan` on `--num` test images, or with `--choose` on so many of
the held-out training images (which chose the epoch, too, alike for all): settings are to be chosen there.
python benchmarks/equal_passes.py mnist --passes 4e6 --choose --out FOLDER
A finished run is kept as a line of FOLDER/found.jsonl and not trained again; one that was killed goes on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from common import Lines, percent, provenance, table
from sparring import measure
from sparring.app.settings import TrainingSettings
from sparring.app.train_parts import split_data
from sparring.app.train_run import resume_run, start_run
from sparring.attacks.plans import make_plan
from sparring.core.batches import Batches
from sparring.modalities import find_data, load_data
from sparring.modalities.images import build, scale
from sparring.results.statistics import mcnemar, wilson
from sparring.threats import make_threat

THREATS = {"mnist": "linf:0.3", "cifar10": "linf:8/255"}
FIVE = "pgd-at:num_steps=5,step=0.4"
ARMS: dict[str, tuple[dict[str, Any], int]] = {
    "pgd-at": ({"recipe": "pgd-at"}, 22),
    "5 steps": ({"recipe": FIVE}, 12),
    "3 steps": ({"recipe": "pgd-at:num_steps=3,step=0.5"}, 8),
    "5 steps, slope 100": ({"recipe": f"{FIVE},slope=100"}, 12),
    "5 steps, slope 30": ({"recipe": f"{FIVE},slope=30"}, 12),
    "5 steps, averaged": ({"recipe": FIVE, "averaging": 0.999}, 12),
    "5 steps, awp": ({"recipe": FIVE, "awp": 0.005}, 14),
    "5 steps, slower ramp": ({"recipe": FIVE, "radius_ramp": 0.5}, 12),
    "5 steps, silu": ({"recipe": FIVE, "model": f"{__file__}:with_silu"}, 12),
    "5 steps, rate 0.005": ({"recipe": FIVE, "learning_rate": 5e-3}, 12),
    "5 steps, rate 0.01": ({"recipe": FIVE, "learning_rate": 1e-2}, 12),
    "3 steps, rate 0.005": ({"recipe": "pgd-at:num_steps=3,step=0.5", "learning_rate": 5e-3}, 8),
    "trades, beta 1, 5 steps": ({"recipe": "trades:beta=1,num_steps=5,step=0.4"}, 15),
    "fgsm-rs": ({"recipe": "fgsm-rs"}, 4),
    "n-fgsm": ({"recipe": "n-fgsm"}, 4),
    "n-fgsm, guarded": ({"recipe": "n-fgsm", "guard": "watch:every=200"}, 4),
    "free": ({"recipe": "free"}, 16),
}
"""Settings, and passes of an example in an epoch. A guard's looks, 48 passes of 256 examples each, are not counted."""


def with_silu(shape: Any, num_classes: int) -> nn.Module:
    """`cnn-mnist` with SiLU for ReLU."""
    layers = build("cnn-mnist", shape, num_classes, 0)
    return nn.Sequential(*(nn.SiLU() if isinstance(layer, nn.ReLU) else layer for layer in layers.children()))


def trained(arm: str, passes: float, seed: int, args: argparse.Namespace) -> tuple[TrainingSettings, Any]:
    """The settings and the result of a run; one that was killed goes on from where it was."""
    given, of_an_example = ARMS[arm]
    num = len(load_data(args.data).y_train) - 1000
    epochs = max(1, round(passes / (num * of_an_example)))
    shared = {"data": args.data, "threat": THREATS[args.data], "model": args.model, "seed": seed, "speed": args.speed}
    folder = args.out / f"{arm}-{passes:g}-{seed}".replace(" ", "-").replace(",", "")
    settings = TrainingSettings(**{**shared, **given}, epochs=epochs)
    return settings, resume_run(folder) if (folder / "config.json").exists() else start_run(settings, folder)


def judged(arm: str, passes: float, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """What stands of the run's best epoch."""
    settings, result = trained(arm, passes, seed, args)
    (data, modality, _), threat = find_data(args.data), make_threat(THREATS[args.data])
    x, y = split_data(settings, data)[1] if args.choose else (data.x_test, data.y_test)
    model = modality.make_model(str(settings.model), seed, {**data.given, "class_names": data.class_names})
    model.load_state_dict(result.best)
    started = time.process_time()
    found = measure(
        model, Batches(x[: args.num], y[: args.num], 250, prepare=scale), threat, make_plan(args.plan, threat),
        seed=seed, curve=(),
    )  # fmt: skip
    return {
        "epochs": settings.epochs, "seconds": result.seconds, "judging": time.process_time() - started,
        "clean": found.table["correct"].int().tolist(), "robust": found.table["robust"].int().tolist(),
        "scores": [line["robust_accuracy"] for line in result.history], "rollbacks": result.rollbacks,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=list(THREATS))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="cnn-mnist")
    parser.add_argument("--passes", type=float, nargs="+", default=[4e6], help="several: a curve")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--num", type=int, default=500)
    parser.add_argument("--plan", default="fast")
    parser.add_argument("--speed", default="plain")
    parser.add_argument("--choose", action="store_true")
    args = parser.parse_args()
    lines, rows, base = Lines(args.out / "found.jsonl"), [], torch.zeros(0)
    names = ("data", "model", "num", "plan", "speed", "choose")
    for arm, passes in itertools.product(args.arms, args.passes):
        found = []
        for seed in range(args.seeds):
            key = {**{name: getattr(args, name) for name in names}, "arm": arm, "passes": passes, "seed": seed}
            record = lines.find(**key) or lines.add({**key, **judged(arm, passes, seed, args)})
            print(arm, f"{passes:g}", seed, record["epochs"], sum(record["clean"]), sum(record["robust"]), flush=True)
            found.append(record)
        robust = torch.tensor([r["robust"] for r in found])
        base = base if len(base) else robust
        test = mcnemar(base.flatten() > 0, robust.flatten() > 0)
        around = wilson(int(robust.sum()), robust.numel())
        rows.append([
            arm, f"{passes / 1e6:g} M", found[0]["epochs"],
            " ".join(percent(sum(r["clean"]) / args.num) for r in found),
            " ".join(percent(sum(r["robust"]) / args.num) for r in found),
            f"{percent(around.low)} to {percent(around.high)}", f"{test.only_b}, {test.only_a}, {test.p_value:.2g}",
        ])  # fmt: skip
    head = ["recipe", "passes", "epochs", "clean, by seed", "robust, by seed", "95 %", "only it, only the first, p"]
    print("\n" + table(head, rows) + "\n\n" + provenance(seed=f"0 to {args.seeds - 1}", n=args.num))


if __name__ == "__main__":
    main()
