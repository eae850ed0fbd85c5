"""An engineer's own training script, with a loader that normalises, made robust: what changes, and what goes wrong.

The script as it was: a small network on the digits, a loader that subtracts the mean and divides by the standard
deviation, a plain loop. In such units a radius says nothing in pixels and the box [0, 1] is gone, so the normalisation
moves into the model. Run it: python examples/own_loop.py (a few seconds)
"""

from __future__ import annotations

import tempfile
import textwrap
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import sparring

Recipe = Callable[[nn.Module, Tensor, Tensor], Tensor]
MEAN, STD = 0.305, 0.376  # of the training pixels
THREAT = sparring.Linf(0.1)
NUM_TRAIN, NUM_TEST, NUM_EPOCHS = 1000, 100, 5


class Digits(Dataset[tuple[Tensor, int]]):
    """Pictures (1, 8, 8) in [0, 1]; normalised where that is asked for."""

    def __init__(self, *, train: bool, normalise: bool) -> None:
        data = sparring.load_data("digits")
        x, self.y = (data.x_train[:NUM_TRAIN], data.y_train) if train else (data.x_test[:NUM_TEST], data.y_test)
        self.x = (x - MEAN) / STD if normalise else x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i], int(self.y[i])


def loader(*, train: bool, normalise: bool) -> DataLoader[tuple[Tensor, int]]:
    order = torch.Generator().manual_seed(0)
    return DataLoader(Digits(train=train, normalise=normalise), batch_size=50, shuffle=train, generator=order)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def fit(model: nn.Module, batches: DataLoader[tuple[Tensor, int]], loss_of: Recipe) -> None:
    """The loop as it was, but for one line."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(NUM_EPOCHS):
        for x, y in batches:
            loss = loss_of(model, x, y)  # was: nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def main() -> dict[str, sparring.Evaluation]:
    """The evaluations of both networks by their names."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        print("1. A recipe in the loop as it was, on normalised inputs, is refused:")
        try:
            fit(network(), loader(train=True, normalise=True), sparring.pgd_at(THREAT))
        except ValueError as refusal:
            print(textwrap.indent(textwrap.fill(str(refusal), 110), "   "))

        print("\n2. The loader normalises no more, the model does. One line of the loop changes:")
        test, found = loader(train=False, normalise=False), {}
        plain, hardened = (nn.Sequential(sparring.Normalize(MEAN, STD), network()) for _ in range(2))
        fit(plain, loader(train=True, normalise=False), sparring.standard())
        fit(hardened, loader(train=True, normalise=False), sparring.pgd_at(THREAT, num_steps=5))
        found["plain"] = sparring.evaluate(plain.eval(), test, THREAT, "pgd:num_steps=20", checks=False)  # a quick look
        found["hardened"] = sparring.evaluate(hardened.eval(), test, THREAT)  # the default: many attacks, all checks
        for name, evaluation in found.items():
            print(f"   {name}\n{textwrap.indent(str(evaluation), '      ')}")

        print("\n3. What colleagues, and a gate, can open:")
        with tempfile.TemporaryDirectory() as folder:
            found["hardened"].save(Path(folder) / "evaluation", name="hardened")
            print("   " + ", ".join(sorted(path.name for path in (Path(folder) / "evaluation").iterdir())))
            print("   sparring gate FOLDER --min-robust 0.6 reads it; report.html is for people")
    return found


if __name__ == "__main__":
    main()
