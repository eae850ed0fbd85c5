"""Generators of images: what the recipe `gan` brings to a run.

Shapes: N examples, C H W one image with values in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparring.core.batches import draw, hold_out
from sparring.core.noise import Noise
from sparring.modalities.base import Dataset, Task
from sparring.modalities.images.files import picture_grid
from sparring.quality.features import extractor_of, kept_features
from sparring.quality.judge import Reference
from sparring.training.collapse import CollapseGuard
from sparring.training.gan import Gan, GanLoss, Nets, Pair, build_pair, sample_images

NUM_JUDGED = 1000
"""Images that a validation makes, at most; a thousand tell an epoch from the next."""
SURE_ENOUGH = 0.95
"""Accuracy on held-out training images from which on the guard counts classes. A classifier that is right on 65 %
(CIFAR-10) gave poor images to a few classes, and a healthy generator was taken back three times within 900 steps; its
spread was that of real images."""
GRID = 10
"""Rows and columns of the grid of samples after each epoch."""


def gan(
    *, loss: GanLoss = "ns-r1", conditional: bool = True, gamma: float | None = None, net: Nets = "mlp",
    num_noise: int = 0, betas: tuple[float, float] = (0.0, 0.99),
) -> Task:  # fmt: skip
    """A generator of images against a discriminator; no threat.

    gamma: weight of the gradient penalty, none: 1, for hinge (which has spectral norm) 0. conditional: one generator
    for all classes that is told which. num_noise 0: 64, for small images 32. betas: of Adam. Sources: see `Gan`; rates
    and betas as measured best of a few, the same for all losses.
    """
    gamma = (0.0 if loss == "hinge" else 1.0) if gamma is None else gamma
    recipe = Gan(loss=loss, gamma=gamma)

    def model(given: Mapping[str, Any], seed: int) -> Pair:
        num_classes = given["num_classes"] if conditional else 0
        shape = tuple(given["shape"])
        return build_pair(shape, num_classes, seed=seed, net=net, spectral=loss == "hinge", num_noise=num_noise)

    def optimizer(module: nn.Module, rate: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(module.parameters(), lr=rate, betas=betas, fused=True)

    def judge(data: Dataset, used: tuple[Any, Tensor], folder: Path, seed: int) -> tuple[Any, CollapseGuard]:
        x, y = prepared(data, used[0]), used[1]
        net = kept_features(folder / "features.safetensors", x, y, data.num_classes, seed=seed)
        extractor = extractor_of(net, prepared(data, data.x_test), data.y_test)
        rows = draw(y, 2 * NUM_JUDGED, seed)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
        real, other = rows.chunk(2)
        reference = Reference.of(x[real], extractor, data.num_classes)
        floor, noise = reference.judge(x[other]), Noise.make(seed, "validation", torch.arange(len(real)))

        def validate(pair: Any) -> dict[str, float]:
            found = reference.judge(sample_images(pair, y[real], noise))
            return {**found.figures(), "floor_fid": floor.fid, "floor_coverage": floor.coverage}

        keep, held = hold_out(y, 0.1, seed)  # a classifier of the guard's own: test images must not steer training
        net = kept_features(folder / "guard.safetensors", x[keep], y[keep], data.num_classes, seed=seed)
        seen = extractor_of(net, x[held], y[held])
        sees = seen.classify if (seen.accuracy or 0.0) >= SURE_ENOUGH else None
        guard = CollapseGuard.against(x, y, sees, num_classes=data.num_classes, gamma=gamma, seed=seed)
        return validate, guard

    return Task(
        recipe=recipe, settings=suited, model=model, optimizer=optimizer, judge=judge, score="coverage",
        after_epoch=keep_grid, advice="sparring quality DATA {run}, sparring sample {run} --out extra.npz",
    )  # fmt: skip


def suited(data: Dataset) -> dict[str, Any]:
    """Training settings: an epoch is about 20,000 examples, so that small data is not mostly validated."""
    passes = max(1, round(20_000 / len(data.y_train)))
    return {
        "epochs": 10 if passes > 1 else 30, "passes": passes, "batch_size": 64,
        "learning_rate": 4e-4, "schedule": "constant", "averaging": 0.999, "weight_decay": 0.0, "radius_ramp": 0.0,
    }  # fmt: skip


def prepared(data: Dataset, x: Any) -> Tensor:
    """Stored images as (N, C, H, W) in [0, 1]; ValueError for what is no image or lies outside."""
    x = data.prepare(x) if data.prepare else x
    if not isinstance(x, Tensor) or x.ndim != 4 or float(x.min()) < 0 or float(x.max()) > 1:
        what = "several"
        if isinstance(x, Tensor):
            what = f"{tuple(x.shape[1:])} from {float(x.min()):.3g} to {float(x.max()):.3g}"
        raise ValueError(f"a generator makes images (C, H, W) in [0, 1]; these inputs are {what}")
    return x


def keep_grid(folder: Path, pair: nn.Module, num_epochs: int) -> None:
    """samples/epoch-NNNN.png: the same noise after every epoch, a column for each of up to ten classes."""
    assert isinstance(pair, Pair)
    num_classes = pair.d.by_class.num_embeddings if pair.d.by_class is not None else GRID
    y = torch.arange(GRID).repeat(GRID) % num_classes
    images = sample_images(pair, y, Noise.make(0, "grid of samples", torch.arange(len(y))))
    picture_grid(folder / "samples" / f"epoch-{num_epochs:04d}.png", images, GRID)
