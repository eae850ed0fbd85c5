"""A researcher's question: which of two recipes is more robust, over three seeds, by how much more than chance?

Everything is trained and judged alike but for the recipe. The evaluations tell their recipe and seed, so that `sparring
compare` makes one table of them: means and spreads over the seeds, and a paired test on the same examples. (`sparring
train` and `sparring evaluate` tell all of that by themselves; this is for one's own loop.) Nine hundred pictures, five
epochs and a hundred test pictures are for a taste. Run it: python examples/two_recipes.py (a few seconds)
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import nn

import sparring
from sparring.app.compare import comparison

THREAT = sparring.Linf(0.1)
RECIPES = {"pgd-at": sparring.pgd_at(THREAT, num_steps=5), "trades": sparring.trades(THREAT, num_steps=5)}
SEEDS = (0, 1, 2)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def main() -> str:
    """The table, as `sparring compare FOLDER --format markdown` prints it."""
    data = sparring.load_data("digits")
    train = [(data.x_train[i : i + 50], data.y_train[i : i + 50]) for i in range(0, 900, 50)]
    test = [(data.x_test[:100], data.y_test[:100])]
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            for seed in SEEDS:
                with torch.random.fork_rng():
                    torch.manual_seed(seed)
                    model = network()
                optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
                result = sparring.train(model, train, recipe, optimizer, num_epochs=5, seed=seed)
                found = sparring.evaluate(model.eval(), test, THREAT, "apgd:num_steps=20", seed=seed, checks=False)
                found.save(
                    Path(folder) / f"{name}-{seed}", name=f"{name}-{seed}",
                    training={"config": {"recipe": name, "seed": seed}, "seconds": result.seconds},
                )  # fmt: skip
        told: list[str] = []
        table = comparison([Path(folder)], "markdown", told.append)
    print(table)
    return table


if __name__ == "__main__":
    main()
