"""Does adversarial training at a small radius raise the CLEAN accuracy on the handwritten digits?

Stratified cross-validation over all 1,797 digits, repeated for several seeds (folds, initial weights, order of the
batches). Network, epochs, optimizer and schedule are the same for every recipe, and the last weights are judged, so
that nothing is chosen on the test fold. Each example is judged once per seed, by a network that has not seen it.

Pooled over the seeds every example occurs once per seed, so the pooled p-value is too sure of itself; the p-value of
each seed, and that of the majority vote of the seeds for each example, count every example once. The interval of the
relative change is a bootstrap over examples (an example brings its verdicts of all seeds). It covers the choice of
examples, not the randomness of training beyond these seeds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common import Lines, percent, provenance, table
from sparring import Linf
from sparring.core.batches import Batches
from sparring.modalities import load_data
from sparring.modalities.images import build, scale
from sparring.results.statistics import mcnemar
from sparring.training.loop import train
from sparring.training.recipes import pgd_at, standard
from sparring.training.schedules import SCHEDULES, Ramp, Ramped


def digits() -> tuple[Tensor, Tensor]:
    """All of them: x float32 (1797, 1, 8, 8), y (1797,), the data set's own train and test part joined."""
    data = load_data("digits")
    return scale(torch.cat([data.x_train, data.x_test])), torch.cat([data.y_train, data.y_test])


def folds(y: Tensor, num: int, seed: int) -> list[Tensor]:
    """The held-out examples of each fold."""
    from sklearn.model_selection import StratifiedKFold

    splitter = StratifiedKFold(num, shuffle=True, random_state=seed)
    return [torch.from_numpy(held) for _, held in splitter.split(np.zeros(len(y)), y.numpy())]


def train_and_judge(x: Tensor, y: Tensor, held: Tensor, radius: float, settings: dict[str, Any], seed: int) -> Tensor:
    """Which of the held-out examples the trained network gets right, bool (len(held),)."""
    keep = torch.ones(len(y), dtype=torch.bool)
    keep[held] = False
    model = build(settings["model"], tuple(x.shape[1:]), int(y.max()) + 1, seed)
    attacked = pgd_at(Linf(radius), num_steps=settings["num_steps"])
    recipe: Any = Ramped(attacked, Ramp(settings["radius_ramp"])) if radius else standard()
    result = train(
        model, Batches(x[keep], y[keep], settings["batch_size"], seed=seed, shuffle=True, drop_last=True), recipe,
        torch.optim.AdamW(model.parameters(), settings["learning_rate"], weight_decay=settings["weight_decay"]),
        num_epochs=settings["epochs"], schedule=SCHEDULES[settings["schedule"]], seed=seed,
    )  # fmt: skip
    if result.stopped:
        raise SystemExit(result.stopped)
    model.load_state_dict(result.last)
    with torch.no_grad():
        return model.eval()(x[held]).argmax(1) == y[held]


def relative_change(base: np.ndarray, other: np.ndarray, seed: int, rounds: int = 10_000) -> tuple[float, float, float]:
    """(change, low, high) of the clean error relative to `base`; wrong verdicts (seeds, N), resampled by example."""
    chance, base_of, other_of = np.random.default_rng(seed), base.sum(0), other.sum(0)
    drawn = chance.integers(len(base_of), size=(rounds, len(base_of)))
    errors = base_of[drawn].sum(1)
    changes = (other_of[drawn].sum(1) - errors) / np.maximum(errors, 1)
    low, high = np.quantile(changes, (0.025, 0.975))
    return float((other_of.sum() - base_of.sum()) / max(base_of.sum(), 1)), float(low), float(high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/generalisation.jsonl"), help="finished trainings")
    parser.add_argument("--model", default="cnn-small")
    parser.add_argument("--radius", type=float, action="append", help="of Linf, in [0, 1]; repeatable (0.05 and 0.1)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--schedule", choices=list(SCHEDULES), default="one-cycle")
    parser.add_argument("--radius-ramp", type=float, default=0.0, help="share of the run in which the radius grows")
    parser.add_argument("--num-steps", type=int, default=10, help="of the inner attack, each radius / 4 long")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    radii = sorted({0.0, *(args.radius or (0.05, 0.1))})
    names = ("model", "epochs", "batch_size", "learning_rate", "weight_decay", "schedule", "radius_ramp", "num_steps")
    settings = {name: getattr(args, name) for name in names}
    x, y = digits()
    lines = Lines(args.out)
    right = {radius: np.zeros((args.seeds, len(y)), bool) for radius in radii}
    for seed in range(args.seeds):
        for fold, held in enumerate(folds(y, args.folds, seed)):
            for radius in radii:
                key = {"seed": seed, "fold": fold, "folds": args.folds, "radius": radius, **settings}
                record = lines.find(**key)
                if record is None:
                    verdicts = train_and_judge(x, y, held, radius, settings, seed=1000 * seed + fold)
                    record = lines.add({**key, "held": held.tolist(), "right": verdicts.int().tolist()})
                    wrong = len(held) - int(verdicts.sum())
                    print(f"seed {seed}, fold {fold}, radius {radius:g}: {wrong} of {len(held)} wrong", flush=True)
                assert record["held"] == held.tolist(), "the folds are not those of the stored trainings"
                right[radius][seed, record["held"]] = np.array(record["right"], bool)
    report(right, args)


def report(right: dict[float, np.ndarray], args: argparse.Namespace) -> None:
    base, num = right[0.0], right[0.0].shape[1]
    votes = {radius: verdicts.mean(0) > 0.5 for radius, verdicts in right.items()}
    rows, tests = [], []
    for radius, verdicts in right.items():
        name, wrong = f"PGD-AT, Linf {radius:g}" if radius else "standard", (~verdicts).sum(1)
        per_seed = ", ".join(str(count) for count in wrong)
        cells = [name, f"{wrong.sum()} of {verdicts.size}", percent(1 - verdicts.mean(), 2), per_seed]
        cells.append(f"{(~votes[radius]).sum()} of {num}")
        if radius:
            change, low, high = relative_change(~base, ~verdicts, seed=0)
            cells.append(f"{100 * change:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f})")
            pairs = {"all seeds pooled (examples repeat)": (base.ravel(), verdicts.ravel())}
            pairs |= {f"seed {s}": (base[s], verdicts[s]) for s in range(len(base))}
            pairs["majority of the seeds"] = (votes[0.0], votes[radius])
            for which, (a, b) in pairs.items():
                test = mcnemar(torch.from_numpy(a), torch.from_numpy(b))
                tests.append((f"{name}: {which}", len(a), test.only_b, test.only_a, f"{test.p_value:.2g}"))
        else:
            cells.append("")
        rows.append(cells)
    head = ("recipe", "clean errors", "error rate", "errors per seed", "of the majority", "relative change (95 %)")
    print(f"\nClean errors on held-out digits, {args.folds} folds x {args.seeds} seeds, {args.epochs} epochs\n")
    print(table(head, rows) + "\n\nMcNemar's exact test against standard training\n")
    print(table(("comparison", "pairs", "only PGD-AT right", "only standard right", "p"), tests) + "\n")
    note = f"{num} digits, each held out once per seed"
    print(provenance(seed=f"0 to {args.seeds - 1}", n=note, packages=("scikit-learn",)))


if __name__ == "__main__":
    main()
