"""A guard that knows when a generator collapses: its images are set against real batches of the same size.

Shapes: B batch, N examples, C H W one image, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparring.core.batches import draw
from sparring.core.noise import Noise
from sparring.training.gan import Pair, sample_images
from sparring.training.guard import Rollback, Stop, Wait

if TYPE_CHECKING:
    from sparring.training.state import TrainingState

Classify = Callable[[Tensor], Tensor]
"""Images (B, C, H, W) -> class numbers (B,)."""


@dataclass(frozen=True)
class Variety:
    """How different the images of a batch are: spread, the mean distance to the nearest other image; entropy of the
    classes over log K and the share of each class, where somebody classifies them."""

    spread: float
    entropy: float
    shares: tuple[float, ...]

    @staticmethod
    def of(x: Tensor, classify: Classify | None, num_classes: int) -> Variety:
        """Of images (B, C, H, W)."""
        flat = x.flatten(1)
        spread = float(torch.cdist(flat, flat).fill_diagonal_(torch.inf).min(1).values.mean())
        if classify is None or num_classes < 2:
            return Variety(spread, 1.0, ())
        shares = classify(x).bincount(minlength=num_classes).double() / len(x)
        entropy = -torch.xlogy(shares, shares).sum() / torch.tensor(float(num_classes)).log()
        return Variety(spread, float(entropy), tuple(shares.tolist()))


@dataclass(frozen=True, kw_only=True)
class CollapseGuard:
    """Takes a collapsed generator back to when it was sound, adds R1 and halves the rate.

    A reading is bad when the spread is under `least_spread` of the real one, or the entropy under `least_entropy` of
    it, or a class that ought to have eight images or more has had none in `patience` readings running. After `patience`
    bad readings running the run goes back, at most `num_rollbacks` times; then it ends and says what to change. Nothing
    is said before step `warm_up`, nor in as many steps after a way back to the start. To be gone back to, a
    moment must be better than not bad: spread 0.6, entropy 0.93, and the gap d(real) - d(generated) under 3, which is
    the early sign. gamma: that of the recipe; the first way back makes it at least 1, each further one doubles it.

    Distances inside a batch are compared with those of real batches of the same size, since both depend on it. The mean
    distance of all pairs does not tell collapse from health, and the gradient of d hardly does (measured).
    """

    x: Tensor
    y: Tensor
    classify: Classify | None
    num_classes: int
    real: Variety
    gamma: float = 0.0
    seed: int = 0
    every: int = 25
    warm_up: int = 250
    patience: int = 3
    num_rollbacks: int = 5
    least_spread: float = 0.5
    least_entropy: float = 0.85

    @staticmethod
    def against(
        x: Tensor, y: Tensor, classify: Classify | None = None, *, num_classes: int = 0, gamma: float = 0.0,
        seed: int = 0, count: int = 256,
    ) -> CollapseGuard:  # fmt: skip
        """A guard that knows real images x (N, C, H, W) in [0, 1] and labels y (N,); `count` of them make a batch."""
        rows = draw(y, count, seed)
        x, y = x[rows], y[rows]
        real = Variety.of(x, classify, num_classes)
        return CollapseGuard(x=x, y=y, classify=classify, num_classes=num_classes, real=real, gamma=gamma, seed=seed)

    def read(self, pair: Pair, step: int) -> tuple[Variety, float]:
        """Of as many images of the generator as it is, in eval mode: their variety, and the gap d(real) - d(them)."""
        training, device = pair.training, next(pair.parameters()).device
        pair.eval()
        try:
            noise = Noise.make(self.seed, f"collapse guard, step {step}", torch.arange(len(self.y)))
            fake, y = sample_images(pair, self.y, noise), self.y.to(device)
            with torch.no_grad():
                gap = pair.d(self.x.to(device), y).mean() - pair.d(fake.to(device), y).mean()
        finally:
            pair.train(training)
        return Variety.of(fake, self.classify, self.num_classes), float(gap)

    def __call__(self, state: TrainingState) -> Rollback | Stop | Wait | None:
        """The verdict on the generator that is learning (not on its average, which is late)."""
        notes = state.notes
        if state.step < notes.get("silent_until", self.warm_up):
            return Wait()
        now, gap = self.read(state.model, state.step)  # type: ignore[arg-type]
        missing = [
            share == 0 and due * len(self.y) >= 8 for share, due in zip(now.shares, self.real.shares, strict=True)
        ]
        notes["missing"] = notes.get("missing", 0) + 1 if any(missing) else 0
        spread, entropy = now.spread / self.real.spread, now.entropy / max(self.real.entropy, 1e-9)
        bad = spread < self.least_spread or entropy < self.least_entropy or notes["missing"] >= self.patience
        notes["bad"] = notes.get("bad", 0) + 1 if bad else 0
        if notes["bad"] < self.patience:
            sound = not bad and not any(missing) and spread >= 0.6 and entropy >= 0.93 and gap < 3
            return None if sound else Wait()
        what = f"spread {spread:.2f} and class entropy {entropy:.2f} of real batches', gap {gap:.1f}"
        if len(state.rollbacks) >= self.num_rollbacks:
            return Stop(
                f"Training stopped at step {state.step}: the generator collapsed again after {self.num_rollbacks} "
                f"rollbacks ({what}). The last sound weights are kept. Try a smaller learning rate, a larger gamma, "
                "betas=0..0.99, or another loss."
            )
        notes["bad"] = notes["missing"] = 0
        notes["silent_until"] = state.step + (self.warm_up if state.good["step"] < self.warm_up else 3 * self.every)
        gamma = max(self.gamma, 1.0) * 2.0 ** len(state.rollbacks)
        reason = f"collapse ({what}); from here on gamma {gamma:g} and half the rate"
        return Rollback(rate_factor=0.5, options={"gamma": gamma}, reason=reason)
