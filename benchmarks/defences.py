"""Broken defences and honest models: does the battery of checks tell them apart?

Every model is evaluated as an author in good faith might (PGD-40, from one random start); that is the claim. What an
attack made for this very model leaves standing is the best that is known: PGD on a stand-in without the odd layer, with
the gradient averaged where the model is random, PGD on the model itself, and Square. A claim is broken when it is at
least BROKEN above that, honest when it is less. Then `examine` sees model and claim, and gives its verdict.

The thresholds in sparring/checks/limits.py were set with the half SETTING in view. The half UNSEEN has other
kinds of defence, other networks, radii and seeds; the battery saw it after that, and nothing was changed since. Before,
with claims and best known numbers in view but no verdict, two of its defences were made harder and one was exchanged,
for their claims had been right. The split is by name, in `ENTRIES`.

Each finished model is one line of the file --out, keyed by the code of the battery, and not computed again. Trained
weights lie beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
import sparring.checks
from common import Lines, percent, provenance, table
from sparring import Linf, pgd, pgd_at, standard, trades
from sparring.attacks.around import Averaged
from sparring.attacks.auto_pgd import apgd
from sparring.attacks.catalogue import slide
from sparring.attacks.square import square
from sparring.checks.battery import examine, sample
from sparring.core.batches import Batches
from sparring.core.objectives import cross_entropy, margin
from sparring.evaluation.measure import measure
from sparring.modalities import load_data
from sparring.modalities.images import build, mlp, scale
from sparring.results.findings import verdict
from sparring.threats import L1, L2
from sparring.threats.base import ThreatModel
from sparring.training.loop import train

BROKEN = 0.05
SHAPE = (1, 8, 8)


# Odd layers ------------------------------------------------------------------------------------------------------


class Then(nn.Module):
    """A function before a network, and one after."""

    def __init__(
        self, network: nn.Module, before: Callable[[Tensor], Tensor] | None = None,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.network, self.before, self.after = network, before, after

    def forward(self, x: Tensor) -> Tensor:
        out = self.network(self.before(x) if self.before else x)
        return self.after(out) if self.after else out


def rounded(x: Tensor, levels: int = 4) -> Tensor:
    """Bit depth reduction (Xu 2018): no gradient anywhere."""
    return (x * (levels - 1)).round() / (levels - 1)


class WinnersTakeAll(nn.Module):
    """Keeps the largest `share` of the activations (Xiao 2020): jumps wherever the winners change."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, h: Tensor) -> Tensor:
        flat = h.flatten(1)
        least = flat.topk(max(1, int(self.share * flat.shape[1])), dim=1).values[:, -1:]
        return (flat * (flat >= least)).view_as(h)


def resized_and_padded(x: Tensor) -> Tensor:
    """Random size from 7 to 12, at a random place in 12 x 12 (Xie 2018)."""
    size = int(torch.randint(7, 13, ()))
    top, left = (int(torch.randint(0, 13 - size, ())) for _ in range(2))
    other = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    return F.pad(other, (left, 12 - size - left, top, 12 - size - top))


class Confident(nn.Module):
    """Walks the input towards more confidence before it classifies (after Alfarra 2022): optimisation at inference."""

    def __init__(self, network: nn.Module, steps: int = 4, length: float = 0.1) -> None:
        super().__init__()
        self.network, self.steps, self.length = network, steps, length

    def forward(self, x: Tensor) -> Tensor:
        moved = x.detach()
        with torch.enable_grad():
            label = self.network(moved).argmax(1)
            for _ in range(self.steps):
                moved = moved.detach().requires_grad_()
                loss = F.cross_entropy(self.network(moved), label, reduction="sum")
                moved = moved - self.length * torch.autograd.grad(loss, moved)[0].sign()
        return self.network(x + (moved - x).detach())


def shattered(x: Tensor) -> Tensor:
    """A ripple too small to see whose slope drowns the true one."""
    return x + 0.002 * torch.sin(1000 * x)


def _dct() -> Tensor:
    n = torch.arange(8.0)
    basis = torch.cos(torch.pi / 8 * (n[None, :] + 0.5) * n[:, None]) * (2 / 8) ** 0.5
    basis[0] /= 2**0.5
    return basis


def jpeg(x: Tensor, step: float = 0.5) -> Tensor:
    """The quantised cosines of 8 x 8 blocks, as JPEG has them (Guo 2018)."""
    basis = _dct().to(x)
    cosines = (basis @ x @ basis.T / step).round()
    return (basis.T @ (cosines * step) @ basis).clamp(0, 1)


def noisy(x: Tensor, scale: float = 0.25) -> Tensor:
    """Normal noise on the input."""
    return x + scale * torch.randn_like(x)


class Wavering(nn.Module):
    """ReLU with a small ripple of random phase on top, anew at each look: stochastic activation."""

    def forward(self, h: Tensor) -> Tensor:
        return torch.relu(h) + 0.01 * torch.sin(1000 * h + 2 * torch.pi * torch.rand_like(h))


def thermometer(x: Tensor, levels: int = 8) -> Tensor:
    """Each pixel as the levels it exceeds (Buckman 2018), by a sigmoid so steep that it has lost its slope."""
    heights = (torch.arange(levels).to(x) + 0.5) / levels
    return torch.sigmoid(2000 * (x[:, 0, :, :, None] - heights)).flatten(1)


def median_stairs(x: Tensor) -> Tensor:
    """A median of 3 x 3, then stairs of sigmoids so steep that they are flat."""
    windows = F.unfold(F.pad(x, (1, 1, 1, 1), mode="reflect"), 3).view(len(x), 9, 8, 8)
    heights = torch.tensor([0.2, 0.4, 0.6, 0.8]).to(x)
    return torch.sigmoid(2000 * (windows.median(1, keepdim=True).values[..., None] - heights)).mean(-1)


class Purified(nn.Module):
    """An autoencoder cleans the input without a gradient; a faint linear side path gives a gradient of its own."""

    def __init__(self, network: nn.Module, cleaner: nn.Module) -> None:
        super().__init__()
        self.network, self.cleaner = network, cleaner
        self.side = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            clean = self.cleaner(x).view_as(x)
        return self.network(clean) + 0.01 * self.side(x)


class WrongWay(torch.autograd.Function):
    """Rounds; its own backward pass turns every other pixel's gradient round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return rounded(x, 16)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        signs = 1 - 2 * (torch.arange(grad[0].numel()) % 2).to(grad)
        return grad * signs.view_as(grad[0])


# Networks --------------------------------------------------------------------------------------------------------


@dataclass
class Bench:
    """The digits, and a folder for trained weights."""

    folder: Path

    def __post_init__(self) -> None:
        data = load_data("digits")
        self.x_train, self.y_train = scale(data.x_train), data.y_train
        self.x, self.y = scale(data.x_test), data.y_test

    def trained(self, name: str, network: nn.Module, recipe: Any, epochs: int = 12, targets: Any = None) -> nn.Module:
        """The network with the weights of that name, trained now if they are not there."""
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            network.load_state_dict(load_file(path))
            return network.eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            batches = Batches(self.x_train, self.y_train, 64, seed=0, shuffle=True, drop_last=True)
            train(network, batches, recipe, torch.optim.AdamW(network.parameters(), 3e-3), num_epochs=epochs)
        self.folder.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, path)
        return network.eval()

    def plain(self, model: str = "cnn-small", seed: int = 0) -> nn.Module:
        """Trained on clean digits alone."""
        return self.trained(f"plain-{model}-{seed}", build(model, SHAPE, 10, seed), standard())


def seeded(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def winners(bench: Bench) -> nn.Module:
    def make() -> nn.Module:
        layers = [nn.Flatten(), nn.Linear(64, 512), WinnersTakeAll(0.1), nn.Linear(512, 512), WinnersTakeAll(0.1)]
        return nn.Sequential(*layers, nn.Linear(512, 10))

    return bench.trained("winners", seeded(make), pgd_at(Linf(0.1), num_steps=5))


def resized(bench: Bench) -> nn.Module:
    network = build("cnn-small", (1, 12, 12), 10, 2)
    return bench.trained("resized", Then(network, resized_and_padded), standard(), epochs=25)


def wavering(bench: Bench) -> nn.Module:
    """The weights of a plain network, with other activations."""
    return nn.Sequential(*(Wavering() if isinstance(layer, nn.ReLU) else layer for layer in bench.plain("mlp", 2)))


def tempered(bench: Bench) -> nn.Module:
    network = seeded(lambda: nn.Sequential(nn.Linear(512, 128), nn.ReLU(), nn.Linear(128, 10)))
    return bench.trained("thermometer", Then(network, before=thermometer), standard())


def stairs(bench: Bench) -> nn.Module:
    return bench.trained("stairs", Then(build("mlp", SHAPE, 10, 4), before=median_stairs), standard())


class CleanUp:
    """Mean squared error of an autoencoder on noisy digits, as a recipe."""

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor, *, noise: Any = None) -> Tensor:
        return (model((x + 0.2 * torch.randn_like(x)).clamp(0, 1)) - x.flatten(1)).square().mean()


def purified(bench: Bench) -> nn.Module:
    cleaner = bench.trained("cleaner", seeded(lambda: mlp(SHAPE, 64, (64, 16, 64))), CleanUp(), epochs=30)
    return seeded(lambda: Purified(bench.plain("mlp", 2), cleaner), 5).eval()


# Entries ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A model of the bench. `stand_in` turns the model into the one that the informed attacker climbs."""

    name: str
    half: str
    kind: str
    make: Callable[[Bench], nn.Module]
    threat: ThreatModel
    only_ce: bool = False
    stand_in: Callable[[Any], Any] | None = None
    random: bool = False


def bare(model: Any) -> Any:
    """The network inside, without what stands before and after."""
    return model.network


def passed_through(before: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    """The network behind its odd layer, whose gradient is taken for the identity's (BPDA)."""
    return lambda model: lambda x: model.network(x + (before(x) - x).detach())


def soft_thermometer(model: Any) -> Any:
    heights = (torch.arange(8) + 0.5) / 8

    def forward(x: Tensor) -> Tensor:
        soft, hard = torch.sigmoid(20 * (x[:, 0, :, :, None] - heights)).flatten(1), thermometer(x)
        return model.network(soft + (hard - soft).detach())

    return forward


def through_the_cleaner(model: Any) -> Any:
    return lambda x: model.network(model.cleaner(x).view_as(x))


def hardened(model: str, seed: int, recipe: Any, name: str) -> Callable[[Bench], nn.Module]:
    return lambda bench: bench.trained(name, build(model, SHAPE, 10, seed), recipe)


def smooth_net(bench: Bench) -> nn.Module:
    network = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 10)), 6)
    return bench.trained("tanh", network, pgd_at(Linf(0.1), num_steps=7))


S, U, BAD, GOOD = "setting", "unseen", "broken", "honest"
R = Linf(0.2)
ENTRIES = (
    Entry("rounding to 4 levels", S, BAD, lambda b: Then(b.plain(), rounded), R, stand_in=bare),
    Entry("k-winners-take-all", S, BAD, winners, R),
    Entry("logits x 100", S, BAD, lambda b: Then(b.plain(), after=lambda z: 100 * z), R, True, bare),
    Entry("logits x 10,000", S, BAD, lambda b: Then(b.plain("mlp", 1), after=lambda z: 1e4 * z), R, True, bare),
    Entry("random resize and pad", S, BAD, resized, Linf(0.1), random=True),
    Entry("clamped logits", S, BAD, lambda b: Then(b.plain(), after=lambda z: z.clamp(-6, 6)), R, stand_in=bare),
    Entry("optimisation at inference", S, BAD, lambda b: Confident(b.plain()), R, stand_in=bare),
    Entry("ripple on the input", S, BAD, lambda b: Then(b.plain(), shattered), R, stand_in=bare),
    Entry("JPEG", U, BAD, lambda b: Then(b.plain("mlp", 2), jpeg), R, stand_in=passed_through(jpeg)),
    Entry("softmax at temperature 1/50", U, BAD,
          lambda b: Then(b.plain("mlp", 2), after=lambda z: (50 * z).softmax(1)), R, True, bare),
    Entry("noise on the input", U, BAD, lambda b: b.trained("noisy", Then(build("cnn-small", SHAPE, 10, 3), noisy),
          standard()), R, random=True),
    Entry("stochastic activation", U, BAD, wavering, R, random=True),
    Entry("thermometer code", U, BAD, tempered, R, stand_in=soft_thermometer),
    Entry("median and stairs", U, BAD, stairs, R, stand_in=bare),
    Entry("purifier, detached", U, BAD, purified, R, stand_in=through_the_cleaner),
    Entry("backward pass of its own", U, BAD, lambda b: Then(b.plain("cnn-small", 3), WrongWay.apply), R,
          stand_in=bare),
    Entry("standard training", S, GOOD, lambda b: b.plain(), Linf(0.1)),
    Entry("PGD-AT, CNN", S, GOOD, hardened("cnn-small", 0, pgd_at(Linf(0.15), num_steps=7), "at-cnn"), Linf(0.15)),
    Entry("TRADES, CNN", S, GOOD, hardened("cnn-small", 1, trades(Linf(0.1), num_steps=7), "tr-cnn"), Linf(0.1)),
    Entry("PGD-AT, MLP", S, GOOD, hardened("mlp", 2, pgd_at(Linf(0.1), num_steps=7), "at-mlp"), Linf(0.1), True),
    Entry("PGD-AT, CNN, L2", S, GOOD, hardened("cnn-small", 3, pgd_at(L2(0.8), num_steps=7), "at-l2"), L2(0.8)),
    Entry("PGD-AT, CNN, large radius", S, GOOD,
          hardened("cnn-small", 4, pgd_at(Linf(0.25), num_steps=7), "at-large"), Linf(0.25)),
    Entry("PGD-AT for L2, judged in L1", S, GOOD,
          hardened("cnn-small", 3, pgd_at(L2(0.8), num_steps=7), "at-l2"), L1(2.5)),
    Entry("standard training, MLP, L2", U, GOOD, lambda b: b.plain("mlp", 5), L2(0.5)),
    Entry("PGD-AT, CNN, seed 11", U, GOOD,
          hardened("cnn-small", 11, pgd_at(Linf(0.2), num_steps=7), "at-11"), Linf(0.2)),
    Entry("TRADES, MLP", U, GOOD, hardened("mlp", 12, trades(Linf(0.12), num_steps=7), "tr-mlp"), Linf(0.12), True),
    Entry("PGD-AT, ResNet with BatchNorm", U, GOOD,
          hardened("resnet-small", 13, pgd_at(Linf(0.1), num_steps=4), "at-res"), Linf(0.1)),
    Entry("TRADES, CNN, L2", U, GOOD, hardened("cnn-small", 14, trades(L2(1.0), num_steps=7), "tr-l2"), L2(1.0)),
    Entry("TRADES for L2, judged in L1", U, GOOD,
          hardened("cnn-small", 14, trades(L2(1.0), num_steps=7), "tr-l2"), L1(2.0)),
    Entry("PGD-AT, tanh network", U, GOOD, smooth_net, Linf(0.1)),
)  # fmt: skip


# Judging ---------------------------------------------------------------------------------------------------------


def claim(entry: Entry, model: nn.Module, bench: Bench) -> Any:
    """The evaluation that an author in good faith might run."""
    objectives = (cross_entropy,) if entry.only_ce else (cross_entropy, margin)
    climb = partial(slide, share=0.05) if isinstance(entry.threat, L1) else pgd
    attacks = [partial(climb, num_steps=40, objective=objective) for objective in objectives]
    quick = [partial(climb, num_steps=10, step=0.25, objective=objectives[-1])]
    batches = Batches(bench.x, bench.y, 180)
    return measure(model, batches, entry.threat, attacks, curve=(0.5, 1.0, 2.0), curve_stages=quick, gallery_size=0)


def best_known(entry: Entry, model: nn.Module, bench: Bench) -> float:
    """Robust accuracy under attacks made for this model; for random models the best single attack, so that no example
    falls because it was looked at often."""
    sparse = isinstance(entry.threat, L1)
    strong = partial(apgd if sparse else partial(pgd, step=0.1), num_steps=50, objective=margin, restarts=2)

    def informed(threat: ThreatModel) -> Any:
        inner = strong(threat)
        inner = Averaged(inner.attack, 10) if entry.random else inner
        return lambda m, x, y, *, noise=None: inner(entry.stand_in(model) if entry.stand_in else m, x, y, noise=noise)

    attacks: list[Any] = [informed, partial(square, num_queries=500, rescale=True)]
    attacks += [] if entry.random else [strong, apgd if sparse else partial(pgd, num_steps=50, step=0.1)]
    lists = [[attack] for attack in attacks] if entry.random else [attacks]
    found = [measure(model, Batches(bench.x, bench.y, 180), entry.threat, some, curve=()) for some in lists]
    return min(one.robust.value for one in found)


def judge(entry: Entry, bench: Bench) -> dict[str, Any]:
    started = time.monotonic()
    model = entry.make(bench).eval()
    trained = time.monotonic()
    claimed = claim(entry, model, bench)
    best = min(best_known(entry, model, bench), claimed.robust.value)
    before = time.monotonic()
    counted = Counted(model)
    findings = examine(counted, bench.x, bench.y, entry.threat, claimed)
    return {
        "clean": claimed.clean.value, "claimed": claimed.robust.value, "best": best, "verdict": verdict(findings),
        "findings": [{"name": f.name, "level": f.level, "numbers": dict(f.numbers)} for f in findings],
        "passes": counted.passes / len(sample(claimed.table, 128, 0)), "examine_seconds": time.monotonic() - before,
        "train_seconds": trained - started, "judge_seconds": before - trained,
    }  # fmt: skip


class Counted(nn.Module):
    """Counts forwards + 2 x backwards of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.passes = model, 0
        self.training = model.training

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        self.passes += len(x)
        if out.requires_grad:
            out.register_hook(self._back)
        return out

    def _back(self, grad: Tensor) -> None:
        self.passes += 2 * len(grad)


def code() -> str:
    """A digest of the battery, its thresholds and this file: lines of another state are not taken up."""
    folder = Path(next(iter(sparring.checks.__path__)))
    paths = [*sorted(folder.glob("*.py")), Path(__file__)]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def shown(record: dict[str, Any]) -> list[Any]:
    fired = [f["name"] for f in record["findings"] if f["level"] != "note"]
    above = record["claimed"] - record["best"]
    numbers = [percent(record[name]) for name in ("clean", "claimed", "best")]
    return [record["name"], *numbers, f"{100 * above:+.1f}", record["verdict"], ", ".join(fired) or "-"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/defences.jsonl"))
    parser.add_argument("--half", choices=(S, U), action="append", help="default: both")
    parser.add_argument("--only", help="entries whose name contains this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, bench, digest = Lines(options.out), Bench(options.out.parent / "defences"), code()
    records = []
    for entry in ENTRIES:
        if entry.half not in (options.half or (S, U)) or (options.only or "") not in entry.name:
            continue
        record = lines.find(name=entry.name, code=digest)
        if record is None:
            key = {"name": entry.name, "half": entry.half, "kind": entry.kind, "code": digest}
            record = lines.add({**key, **judge(entry, bench)})
            print(entry.name, record["verdict"], file=sys.stderr, flush=True)
        records.append(record)
    head = ("model", "clean", "claimed", "best known", "above", "verdict", "fired")
    for half in options.half or (S, U):
        part = [r for r in records if r["half"] == half]
        print(f"\n{half}\n\n" + table(head, [shown(r) for r in part]))
        summary(part)
    print("\n" + provenance(seed=0, n=f"{len(bench.y)} digits, 128 checked"))


def summary(records: list[dict[str, Any]]) -> None:
    """How many claims that are too high were caught, and how many good ones cleared."""
    bad = [r for r in records if r["claimed"] - r["best"] >= BROKEN]
    good = [r for r in records if r["claimed"] - r["best"] < BROKEN]
    caught = sum(r["verdict"] != "TRUSTED" for r in bad)
    flagged = [r["name"] for r in good if r["verdict"] != "TRUSTED"]
    cleared = sum(r["verdict"] == "TRUSTED" for r in good if r["kind"] == GOOD)
    honest = sum(r["kind"] == GOOD for r in good)
    print(
        f"\ncaught {caught} of {len(bad)} claims that are at least {percent(BROKEN, 0)} too high; cleared {cleared} of "
        f"{honest} honest models; flagged although the claim was right: {', '.join(flagged) or 'none'}; passes per "
        f"sampled example: at most {max((r['passes'] for r in records), default=0):.0f}"
    )


if __name__ == "__main__":
    main()
