"""Stacked MNIST: three digits as the channels of one picture, a thousand kinds. How many does a generator make?

A kind counts when at least one picture shows it with a confidence above 0.8 in all three channels: by the largest logit
alone noise has hundreds of kinds. Beside it stand the share of pictures that are so sure, and the divergence
KL(kinds made | kinds of real pictures) of all pictures, sure or not (Metz 2017; Srivastava 2017). One run, read every
few CPU minutes of one thread; a run that was killed goes on from its last reading:
python benchmarks/stacked_mnist.py --minutes 60 --out stacked.jsonl
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import Lines, provenance, table
from sparring.core.files import write_atomically
from sparring.core.noise import Noise
from sparring.modalities import load_data
from sparring.modalities.images.files import picture_grid
from sparring.modalities.images.generate import prepared
from sparring.quality.features import FeatureNet, kept_features
from sparring.training.gan import GAMES, Gan, build_pair, sample_images
from sparring.training.loop import train
from sparring.training.state import TrainingState

SURE = 0.8
FIGURES = {"kinds": ".0f", "kinds_by_argmax": ".0f", "sure": ".3f", "kl": ".2f"}
NUMS = (10_000, 26_000)
"""Pictures that are counted: a trial's number, and that of Srivastava 2017."""


class Stacks:
    """Batches of three digits on top of each other, drawn anew in each epoch by (seed, epoch)."""

    def __init__(self, x: Tensor, batch_size: int, seed: int) -> None:
        self.x, self.batch_size, self.seed, self.epoch = x, batch_size, seed, 0

    def __len__(self) -> int:
        return len(self.x) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.epoch_from(0)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def epoch_from(self, start_batch: int) -> Iterator[tuple[Tensor, Tensor]]:
        noise = Noise.make(self.seed, f"stacks of epoch {self.epoch}", torch.arange(3 * len(self.x)))
        channels = noise.uniform((1,)).view(3, -1).argsort(1)
        for rows in channels.split(self.batch_size, 1)[start_batch : len(self)]:
            yield self.x[rows.T, 0], torch.zeros(self.batch_size, dtype=torch.int64)


def counted(images: Tensor, net: FeatureNet, real: Tensor) -> dict[str, float]:
    """Kinds, KL and share of sure pictures of images (N, 3, H, W); real: the shares of the 1,000 kinds."""
    with torch.no_grad():
        parts = [net(part[:, None]).softmax(1).max(1) for part in images.flatten(0, 1).split(500)]
    sure, digit = (torch.cat([p[i] for p in parts]).view(-1, 3) for i in range(2))
    kind, seen = digit @ torch.tensor([100, 10, 1]), (sure > SURE).all(1)
    shares = kind.bincount(minlength=1000).double() / len(kind)
    return {
        "kinds": len(kind[seen].unique()), "kinds_by_argmax": len(kind.unique()), "sure": float(seen.double().mean()),
        "kl": float((torch.xlogy(shares, shares) - torch.xlogy(shares, real)).sum()),
    }  # fmt: skip


def run(asked: argparse.Namespace, lines: Lines, key: dict[str, Any], x: Tensor, judge: Any) -> None:
    """Trains for the minutes asked for, with a line for every reading."""
    pair = build_pair((3, 28, 28), 0, seed=asked.seed, net=asked.net, spectral=asked.loss == "hinge")
    optimizer = torch.optim.Adam(pair.parameters(), lr=asked.rate, betas=(0.0, 0.99), fused=True)
    recipe = Gan(loss=asked.loss, gamma=0.0 if asked.loss == "hinge" else asked.gamma)
    checkpoint = asked.out.with_name("-".join(str(part) for part in ("stacked", *key.values())) + ".pt")
    kept = torch.load(checkpoint, weights_only=True) if checkpoint.exists() else {"used": 0.0, "state": None}
    used, since = kept["used"], time.process_time()

    def observe(state: TrainingState) -> bool:
        nonlocal used, since
        now = used + time.process_time() - since
        due = min(asked.minutes, asked.every * (1 + used // (60 * asked.every)))
        if now < 60 * due:
            return False
        used = now
        assert state.averaged
        made = sample_images(state.averaged.module.eval(), torch.zeros(NUMS[-1], dtype=torch.int64), streams())
        lines.add({**key, "minutes": used / 60, "steps": state.step, "by_n": judge(made)})
        picture_grid(checkpoint.with_suffix(".png"), made[:100], 10)
        write_atomically(checkpoint, lambda f: torch.save({"used": used, "state": state.to_dict()}, f))
        since = time.process_time()
        return used >= 60 * asked.minutes

    if used < 60 * asked.minutes:
        train(
            pair, Stacks(x, asked.batch_size, asked.seed), recipe, optimizer, num_epochs=10**5, averaging=0.999,
            seed=asked.seed, observe=observe, resume=kept["state"],
        )  # fmt: skip


def streams() -> Noise:
    """The same noise for every reading."""
    return Noise.make(0, "stacked benchmark", torch.arange(NUMS[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="CPU minutes of training")
    parser.add_argument("--every", type=float, default=10, help="minutes between readings")
    parser.add_argument("--loss", choices=list(GAMES), default="ns-r1")
    parser.add_argument("--net", choices=["mlp", "conv"], default="mlp")
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--rate", type=float, default=4e-4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("stacked.jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    data, lines = load_data("mnist"), Lines(asked.out)
    x, x_test = prepared(data, data.x_train), prepared(data, data.x_test)
    net = kept_features(asked.out.with_name("mnist.safetensors"), x, data.y_train, 10, seed=0)
    digits = data.y_train.bincount().double() / len(x)
    real = (digits[:, None, None] * digits[:, None] * digits).flatten()

    def judge(images: Tensor) -> dict[str, Any]:
        return {str(num): counted(images[:num], net, real) for num in NUMS}

    key = {name: getattr(asked, name) for name in ("net", "loss", "gamma", "rate", "batch_size", "seed")}
    run(asked, lines, key, x, judge)
    readings = [r for r in lines.records if all(r[name] == value for name, value in key.items())]
    chance = torch.Generator().manual_seed(1)
    rows_of = [torch.randperm(len(x_test), generator=chance) for _ in range(9)]
    stacks = torch.cat([x_test[torch.stack(rows_of[i : i + 3], 1), 0] for i in (0, 3, 6)])
    readings.append({"name": "test images (floor)", "by_n": judge(stacks[: NUMS[-1]])})
    rows = [
        [r.get("name") or f"{r['minutes']:.2g} min, {r['steps']} steps", num]
        + [f"{r['by_n'][num][figure]:{form}}" for figure, form in FIGURES.items()]
        for r in readings
        for num in map(str, NUMS)
    ]
    print(f"\n{key}\n\n" + table(["", "n", *FIGURES], rows) + "\n")
    print(provenance(seed=asked.seed, n="in the table"))


if __name__ == "__main__":
    main()
