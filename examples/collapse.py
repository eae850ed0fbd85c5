"""A generator that collapses, and one that is rescued: the same fault twice, on the handwritten digits.

The fault is too high a rate, with the momentum that a classifier would get and without R1. Alone, the generator ends
with few images; under `CollapseGuard` it goes back to where it was sound, and goes on with R1 and half the rate. Run
it: python examples/collapse.py
"""

from __future__ import annotations

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from sparring.core.batches import Batches
from sparring.core.noise import Noise
from sparring.modalities import load_data
from sparring.training.collapse import CollapseGuard, Variety
from sparring.training.gan import Gan, build_pair, sample_images
from sparring.training.loop import TrainingResult, train
from sparring.training.state import TrainingState

FAULT = {"lr": 3e-3, "betas": (0.9, 0.999)}


def digits() -> tuple[Tensor, Tensor]:
    """Training images in [0, 1], and their labels."""
    data = load_data("digits")
    assert isinstance(data.x_train, Tensor)
    return data.x_train, data.y_train


def trained(x: Tensor, y: Tensor, guard: CollapseGuard | None, num_steps: int) -> tuple[TrainingResult, Tensor]:
    """What training left, and 256 images of the generator's weights, averaged; the seed is always 0."""
    pair = build_pair((1, 8, 8), 0, seed=0)
    batches = Batches(x, y, 64, seed=0, shuffle=True, drop_last=True)

    def observe(state: TrainingState) -> bool:
        return state.step >= num_steps

    result = train(
        pair, batches, Gan(gamma=0.0), torch.optim.Adam(pair.parameters(), **FAULT), num_epochs=10_000,
        averaging=0.99, guard=guard, observe=observe,
    )  # fmt: skip
    assert result.averaged
    pair.load_state_dict(result.averaged)
    noise = Noise.make(0, "example", torch.arange(256))
    return result, sample_images(pair.eval(), torch.zeros(256, dtype=torch.int64), noise)


def main(num_steps: int = 600) -> dict[str, tuple[Variety, int]]:
    """Prints and returns how varied the images are, and the number of ways back."""
    x, y = digits()
    known = LogisticRegression(max_iter=2000).fit(x.flatten(1).numpy(), y.numpy())

    def classify(images: Tensor) -> Tensor:
        return torch.from_numpy(known.predict(images.flatten(1).numpy()))

    guard = CollapseGuard.against(x, y, classify, num_classes=10)
    found = {"real digits": (guard.real, 0)}
    for name, watching in (("left alone", None), ("guarded", guard)):
        result, images = trained(x, y, watching, num_steps)
        found[name] = Variety.of(images, classify, 10), len(result.rollbacks)
        for line in result.rollbacks:
            print(f"{name}: at step {line['step']} back to {line['back_to']}\n    {line['reason']}")
    print(f"{'':<12} {'spread':>7} {'entropy':>8} {'least class':>12} {'ways back':>10}")
    for name, (variety, ways) in found.items():
        cells = f"{variety.spread:>7.2f} {variety.entropy:>8.3f} {min(variety.shares):>12.3f} {ways:>10}"
        print(f"{name:<12} {cells}")
    return found


if __name__ == "__main__":
    main()
