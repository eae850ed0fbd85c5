"""Do attacks in training raise the CLEAN accuracy where labels are few? MNIST with 1,000 labels, at equal passes.

Every arm has the same network, optimizer, schedule and number of passes (one forward or backward of one example): what
costs more a step takes fewer steps. The 59,000 other training images have no label; only `vat`, and noise in its
place, see some of them. Radii are chosen by `--choose` on 10,000 of those, whose labels are used for that alone; then
the 10,000 test images are judged once: python benchmarks/clean_gain.py --out FILE [--choose]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import Lines, percent, provenance, table
from sparring import L2, Linf
from sparring.core.batches import Batches
from sparring.core.blend import Blended
from sparring.modalities import load_data
from sparring.modalities.images import build, scale
from sparring.results.statistics import mcnemar
from sparring.training.loop import train
from sparring.training.recipes import pgd_at, standard
from sparring.training.regularising import advprop, gaussian, vat
from sparring.training.schedules import SCHEDULES

NUM_LABELLED, NUM_CHOOSING, BATCH_SIZE = 1000, 10_000, 64


class Arm(NamedTuple):
    """A recipe at a size, the passes of a labelled example in a step, and whether as many unlabelled ones go along."""

    recipe: Any
    passes: int
    unlabelled: bool = False


def arms(sizes: dict[str, float]) -> dict[str, Arm]:
    """By name, with the radius or noise of each."""
    return {
        "standard": Arm(standard(), 2),
        "gaussian": Arm(gaussian(sigma=sizes["gaussian"]), 2),
        "pgd-at": Arm(pgd_at(Linf(sizes["pgd-at"]), num_steps=2, step=0.75), 6),
        "advprop": Arm(advprop(Linf(sizes["advprop"]), num_steps=1), 6),
        "vat": Arm(vat(L2(sizes["vat"])), 14, unlabelled=True),
    }


SIZES = {"gaussian": (0.1, 0.2, 0.3), "pgd-at": (0.03, 0.06, 0.1), "advprop": (0.03, 0.06, 0.1), "vat": (0.1, 0.3, 1.0)}


def split(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training rows: with a label (as many of each class), without, and those that choose radii."""
    y = load_data("mnist").y_train
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(y)))
    few = torch.cat([order[y[order] == k][: NUM_LABELLED // 10] for k in range(10)])
    rest = order[~torch.isin(order, few)]
    return few, rest[NUM_CHOOSING:], rest[:NUM_CHOOSING]


def right(arm: Arm, budget: float, seed: int, model: str, choosing: bool) -> Tensor:
    """Which of the judged images the trained network gets right."""
    data = load_data("mnist")
    few, others, chosen_by = split(seed)
    network = build(model, (1, 28, 28), 10, seed)
    options: dict[str, Any] = {"prepare": scale}
    size = BATCH_SIZE * (2 if arm.unlabelled else 1)
    own = Batches(data.x_train[few], data.y_train[few], size, seed=seed, shuffle=True, drop_last=True, **options)
    batches: Any = own
    if arm.unlabelled:
        none = torch.full((len(others),), -1)
        batches = Blended(own, Batches(data.x_train[others], none, size, seed=seed + 1, **options), 0.5)
    steps = budget / (arm.passes * BATCH_SIZE)
    result = train(
        network, batches, arm.recipe, torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=1e-3),
        num_epochs=max(1, round(steps / len(batches))), schedule=SCHEDULES["one-cycle"], seed=seed,
    )  # fmt: skip
    network.load_state_dict(result.last)
    x, y = (data.x_train[chosen_by], data.y_train[chosen_by]) if choosing else (data.x_test, data.y_test)
    with torch.no_grad():
        network.eval()
        return torch.cat([network(scale(part)).argmax(1) for part in x.split(1000)]) == y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--choose", action="store_true", help="radii, on training images, seed 0 only")
    parser.add_argument("--budget", type=float, default=3e5, help="sample passes of a run")
    parser.add_argument("--model", default="cnn-patches:patch=4,width=32,num_blocks=1")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sizes", type=float, nargs=4, default=(0.1, 0.06, 0.06, 0.1), metavar=tuple(SIZES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines, key = Lines(args.out), {"budget": args.budget, "model": args.model, "choosing": args.choose}

    def found(name: str, arm: Arm, size: float, seed: int) -> Tensor:
        here = {**key, "arm": name, "size": size, "seed": seed}
        if (record := lines.find(**here)) is None:
            verdicts = right(arm, args.budget, seed, args.model, args.choose)
            record = lines.add({**here, "right": verdicts.int().tolist()})
            print(name, size, seed, percent(verdicts.float().mean().item(), 2), flush=True)
        return torch.tensor(record["right"], dtype=torch.bool)

    if args.choose:
        for name, sizes in SIZES.items():
            for size in sizes:
                found(name, arms({**dict.fromkeys(SIZES, 0.1), name: size})[name], size, 0)
        return
    sizes = dict(zip(SIZES, args.sizes, strict=True))
    verdicts = {
        name: torch.stack([found(name, arm, sizes.get(name, 0.0), seed) for seed in range(args.seeds)])
        for name, arm in arms(sizes).items()
    }
    rows = []
    for name, each in verdicts.items():
        test = mcnemar(verdicts["standard"].flatten(), each.flatten())
        by_seed = ", ".join(percent(v.float().mean().item(), 2) for v in each)
        rows.append([name, sizes.get(name, ""), percent(each.float().mean().item(), 2), by_seed,
                     test.only_b, test.only_a, f"{test.p_value:.2g}"])  # fmt: skip
    print(table(["training", "size", "clean", "by seed", "only it right", "only standard right", "p"], rows))
    print("\n" + provenance(seed=f"0 to {args.seeds - 1}", n=verdicts["standard"].shape[1]))


if __name__ == "__main__":
    main()
