"""Generators measured: digits, MNIST, three losses at equal time, and collapses that the guard takes back.

CPU seconds of one thread, so that a busy machine changes nothing but the wait: python benchmarks/gan.py digits mnist
losses collapse features --out gan.jsonl. A part that is in the file is not computed again. features: digits and MNIST
after --seconds, in the features that are built in and in the last hidden layer of the same classifier alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import torch

from common import Lines, provenance, table
from sparring.core.batches import Batches, draw
from sparring.core.noise import Noise
from sparring.modalities import load_data
from sparring.modalities.base import Dataset
from sparring.modalities.images.files import picture_grid
from sparring.modalities.images.generate import prepared
from sparring.quality.features import Extractor, FeatureNet, extractor_of, kept_features
from sparring.quality.judge import Reference, judge_with_controls
from sparring.training.collapse import CollapseGuard
from sparring.training.gan import GAMES, Gan, GanLoss, Pair, build_pair, sample_images
from sparring.training.loop import TrainingResult, train
from sparring.training.state import TrainingState

BASE: dict[str, Any] = {"loss": "ns-r1", "gamma": None, "rate": 4e-4, "betas": (0.0, 0.99), "conditional": True}
FAULTS: dict[str, dict[str, Any]] = {
    "too high a rate from the start": {"rate": 3e-3, "betas": (0.9, 0.999)},
    "rate x 10 and momentum from step 200 on": {"at_200": (10.0, (0.9, 0.999))},
}


class Jump:
    """A schedule that multiplies the rate from a step on, with the optimizer's betas changed there too."""

    def __init__(self, factor: float) -> None:
        self.factor, self.now = factor, 1.0

    def __call__(self, progress: float) -> float:
        return self.now


def learn(
    data: Dataset, seconds: float, seed: int, *, loss: GanLoss, gamma: float | None, rate: float,
    betas: tuple[float, float], conditional: bool, guard: CollapseGuard | None = None,
    at_200: tuple[float, tuple[float, float]] | None = None,
) -> tuple[Pair, TrainingResult, int]:  # fmt: skip
    """A pair with the averaged weights after so many CPU seconds, and the number of steps."""
    x, y = prepared(data, data.x_train), data.y_train
    classes, hinge = data.num_classes if conditional else 0, loss == "hinge"
    pair = build_pair(tuple(x.shape[1:]), classes, seed=seed, spectral=hinge)
    optimizer = torch.optim.Adam(pair.parameters(), lr=rate, betas=betas, fused=True)
    recipe = Gan(loss=loss, gamma=(0.0 if hinge else 1.0) if gamma is None else gamma)
    jump, started, steps = Jump(at_200[0] if at_200 else 1.0), time.process_time(), 0

    def observe(state: TrainingState) -> bool:
        nonlocal steps
        steps = state.step
        if at_200 and state.step >= 200:
            jump.now = jump.factor
            optimizer.param_groups[0]["betas"] = at_200[1]
        return time.process_time() - started > seconds

    batches = Batches(x, y, 64, seed=seed, shuffle=True, drop_last=True)
    result = train(
        pair, batches, recipe, optimizer, num_epochs=10**5, averaging=0.999, seed=seed, guard=guard, schedule=jump,
        observe=observe,
    )  # fmt: skip
    assert result.averaged
    pair.load_state_dict(result.averaged)
    return pair.eval(), result, steps


def judged(pair: Pair, data: Dataset, extractor: Extractor, num: int, seed: int, picture: Path) -> dict[str, Any]:
    """Quality with controls of `num` images, of the classes in turn."""
    y = torch.arange(num) % data.num_classes
    images = sample_images(pair, y, Noise.make(seed, "benchmark", torch.arange(num)))
    picture_grid(picture, images[:100], 10)
    found = judge_with_controls(
        images, prepared(data, data.x_train), prepared(data, data.x_test), extractor, data.num_classes, seed=seed
    )
    return {key: value for key, value in found.items() if key != "closest"}


def in_both_features(data: Dataset, net: FeatureNet, pair: Pair, num: int, seed: int) -> dict[str, Any]:
    """What `judge_with_controls` says in either features, and of real images of half of the classes."""

    def last_layer(x: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = net.last(functools.reduce(lambda seen, stage: stage(seen).relu(), net.stages, 2 * x - 1))
        return hidden

    x_train, x_test = prepared(data, data.x_train), prepared(data, data.x_test)
    built_in = extractor_of(net, x_test, data.y_test)
    made = sample_images(pair, torch.arange(num) % 10, Noise.make(seed, "benchmark", torch.arange(num)))
    half, real = x_train[data.y_train < 5][:num], x_test[draw(data.y_test, num, seed)]
    found = {}
    for name, extractor in (
        ("all layers", built_in), ("last layer", dataclasses.replace(built_in, embed=last_layer))
    ):  # fmt: skip
        own = judge_with_controls(made, x_train, x_test, extractor, 10, seed=seed)
        found[name] = {"verdict": own["verdict"], "findings": own["findings"]}
        halved = Reference.of(real, extractor, 10).judge(half)
        found[name]["rows"] = {**own["rows"], "five classes": dataclasses.asdict(halved)}
    return found


def features(lines: Lines, folder: Path, seconds: float) -> str:
    """One generator of each data set in both features."""
    rows = []
    for name, num in (("digits", 360), ("mnist", 3000)):
        data = load_data(name)
        net = kept_features(folder / f"{name}.safetensors", prepared(data, data.x_train), data.y_train, 10, seed=0)
        key = {"part": "features", "data": name, "seconds": seconds if name == "mnist" else 20.0}
        found = lines.find(**key)
        if found is None:
            pair, _, steps = learn(data, key["seconds"], 0, **BASE)
            found = lines.add({**key, "steps": steps, "found": in_both_features(data, net, pair, num, 0)})
        for which, judged_in in found["found"].items():
            title = f"{name}, {which}, {found['steps']} steps, {judged_in['verdict']}"
            rows += [row(f"{title}: {of}", judged_in, of) for of in judged_in["rows"]]
    return table(HEAD, rows)


def row(name: str, found: dict[str, Any], of: str = "generated") -> list[str]:
    q = found["rows"][of]
    shares = [f"{q[key]:.3f}" for key in ("precision", "recall", "density", "coverage", "entropy")]
    ratio = "" if q["nearest_ratio"] is None else f"{q['nearest_ratio']:.2f}"
    return [name, f"{q['fid']:.1f}", f"{q['kid']:.2f}", *shares, f"{min(q['class_shares']):.3f}", ratio]


HEAD = [
    "",
    "FID x 1000",
    "KID x 1000",
    "precision",
    "recall",
    "density",
    "coverage",
    "entropy",
    "least class",
    "nearest",
]


def measured(part: str, lines: Lines, folder: Path) -> str:
    """Trains what is missing of a part and returns its table."""
    runs: list[tuple[str, str, float, int, int, dict[str, Any]]] = {
        "digits": [("digits", f"digits, seed {s}", 20.0, s, 360, {}) for s in range(3)],
        "mnist": [("mnist", "MNIST, seed 0", 600.0, 0, 3000, {})],
        "losses": [("mnist", f"{loss}, seed {s}", 60.0, s, 3000, {"loss": loss}) for loss in GAMES for s in (0, 1)],
    }[part]
    rows: list[list[str]] = []
    for name, title, seconds, seed, num, options in runs:
        data = load_data(name)
        net = kept_features(folder / f"{name}.safetensors", prepared(data, data.x_train), data.y_train, 10, seed=0)
        extractor = extractor_of(net, prepared(data, data.x_test), data.y_test)
        found = lines.find(part=part, title=title)
        if found is None:
            pair, _, steps = learn(data, seconds, seed, **{**BASE, **options})
            picture = folder / f"{part}-{title.replace(', ', '-').replace(' ', '')}.png"
            about = {"part": part, "title": title, "seconds": seconds, "steps": steps}
            found = lines.add({**about, **judged(pair, data, extractor, num, seed, picture)})
        rows.append(row(f"{title}: {found['steps']} steps, {found['verdict']}", found))
        if found is not None and title == runs[-1][1]:
            rows += [row(of, found, of) for of in ("floor", "noise", "blurred", "repeated")]
    return table(HEAD, rows)


def collapses(lines: Lines, folder: Path) -> str:
    """Each fault with and without the guard, and healthy runs under it; digits, 10 CPU seconds each."""
    data = load_data("digits")
    x = prepared(data, data.x_train)
    net = kept_features(folder / "digits.safetensors", x, data.y_train, 10, seed=0)
    extractor = extractor_of(net, prepared(data, data.x_test), data.y_test)
    runs = [(f, g, s, {"gamma": 0.0, **FAULTS[f]}) for f in FAULTS for g in (False, True) for s in range(3)]
    runs += [(f"healthy, {loss}", True, s, {"loss": loss}) for loss in ("ns-r1", "hinge", "r3") for s in range(2)]
    rows = []
    for title, guarded, seed, options in runs:
        options = {**BASE, "conditional": False, **options}
        key = {"part": "collapse", "title": title, "guarded": guarded, "seed": seed}
        found = lines.find(**key)
        if found is None:
            gamma = options["gamma"] or 0.0
            guard = CollapseGuard.against(x, data.y_train, extractor.classify, num_classes=10, gamma=gamma, seed=seed)
            pair, result, steps = learn(data, 10.0, seed, **options, guard=guard if guarded else None)
            picture = folder / f"collapse-{len(lines.records)}.png"
            found = lines.add(
                {**key, "steps": steps, "rollbacks": result.rollbacks, "stopped": result.stopped}
                | judged(pair, data, extractor, 360, seed, picture)
            )
        q = found["rows"]["generated"]
        cells = [f"{q['entropy']:.3f}", f"{q['coverage']:.3f}", f"{q['fid']:.0f}", str(len(found["rollbacks"]))]
        rows.append([title, "yes" if guarded else "no", str(seed), str(found["steps"]), *cells])
    return table(["", "guard", "seed", "steps", "entropy", "coverage", "FID x 1000", "rollbacks"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="+", choices=["digits", "mnist", "losses", "collapse", "features"])
    parser.add_argument("--seconds", type=float, default=60, help="CPU seconds on MNIST of the part features")
    parser.add_argument("--out", type=Path, default=Path("gan.jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(asked.out)
    for part in asked.parts:
        if part == "features":
            text = features(lines, asked.out.parent, asked.seconds)
        else:
            text = collapses(lines, asked.out.parent) if part == "collapse" else measured(part, lines, asked.out.parent)
        print(f"\n{part}\n\n{text}\n")
    print(provenance(seed="in the table", n="360 (digits), 3000 (MNIST)"))


if __name__ == "__main__":
    main()
