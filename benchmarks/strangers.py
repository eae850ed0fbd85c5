"""The fast verdict on networks that others trained, beside AutoAttack and beside published bounds.

The networks, their fixed sets of 200 images and the lists of hard instances come from the verifier alpha-beta-CROWN
(https://github.com/Verified-Intelligence/alpha-beta-CROWN, commit 8250d5f, BSD 3-Clause); those named wong- from
https://github.com/locuslab/convex_adversarial (commit 2cd8149, MIT), judged on the same images. Nothing of them is kept
here. Bring them with `git clone`, then: python benchmarks/strangers.py OUT.jsonl CLONE [CLONE] [--methods ...]
[--networks ...]; the first has the images.
A finished part is kept in a file of JSON lines and never computed again, so the script may be killed at any time.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import Lines, provenance, table
from reference import authors, reference
from sparring import Normalize, measure
from sparring.attacks.plans import make_plan
from sparring.modalities import load_data
from sparring.modalities.images import scale
from sparring.threats import make_threat

NUM = 200
OTHER = {("l2", "mnist"): 1.5, ("l2", "cifar"): 0.25, ("l1", "mnist"): 10, ("l1", "cifar"): 6}


class Network(NamedTuple):
    """Where a network lies, how it is built, what it was trained against, and whether settings were chosen on it."""

    weights: str
    build: Callable[[], nn.Module]
    data: str
    threat: float
    chosen_on: bool
    bound: int | None = None  # how many of the 200 stand by published attacks (Clip-and-Verify, 2025, its table)


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, stride, 1)
        self.conv2 = nn.Conv2d(num_out, num_out, 3, 1, 1)
        same = stride == 1 and num_in == num_out
        self.shortcut = nn.Sequential() if same else nn.Sequential(nn.Conv2d(num_in, num_out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class ResNet(nn.Module):
    """One convolution, `stages` of two blocks that halve the side, two dense layers."""

    def __init__(self, width: int, stages: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1)
        self.stages = stages
        for number in range(stages):
            inside = width if number == 0 else 2 * width
            block = nn.Sequential(Residual(inside, 2 * width, 2), Residual(2 * width, 2 * width, 1))
            setattr(self, f"layer{number + 1}", block)
        self.linear1 = nn.Linear(2 * width * (8 >> (stages - 1)) ** 2, 100)
        self.linear2 = nn.Linear(100, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv1(x))
        for number in range(self.stages):
            x = getattr(self, f"layer{number + 1}")(x)
        return self.linear2(torch.relu(self.linear1(x.flatten(1))))


def convs(channels: int, kernels: tuple[tuple[int, int, int], ...], dense: int, hidden: int = 100) -> nn.Sequential:
    """Convolutions of (width, side, padding) and stride 2, then two dense layers."""
    layers: list[nn.Module] = []
    for width, side, padding in kernels:
        layers += [nn.Conv2d(channels, width, side, 2, padding), nn.ReLU()]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(dense, hidden), nn.ReLU(), nn.Linear(hidden, 10))


def cifar(stats: tuple[tuple[float, ...], tuple[float, ...]], net: nn.Module) -> nn.Module:
    return nn.Sequential(Normalize(*stats), net)


SDP = tuple(v / 255 for v in (125.3, 123.0, 113.9)), tuple(v / 255 for v in (63.0, 62.1, 66.7))
CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616)
WONG = (0.485, 0.456, 0.406), (0.225, 0.225, 0.225)
ERAN = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.201)


def cnn_a() -> nn.Module:
    return cifar(SDP, convs(3, ((16, 4, 1), (32, 4, 1)), 2048))


def cnn_wong() -> nn.Module:
    return cifar(WONG, convs(3, ((16, 4, 1), (32, 4, 1)), 2048))


NETWORKS = {
    "mnist-cnn-a-adv": Network(
        "sdp/mnist_cnn_a_adv.model", lambda: convs(1, ((16, 4, 1), (32, 4, 1)), 1568), "mnist", 0.3, True, 153),
    "cifar-cnn-a-adv": Network("sdp/cifar_cnn_a_adv.model", cnn_a, "cifar", 2 / 255, True, 100),
    "cifar-cnn-a-mix": Network("sdp/cifar_cnn_a_mix.model", cnn_a, "cifar", 2 / 255, True, 106),
    "cifar-cnn-a-adv4": Network("sdp/cifar_cnn_a_adv4.model", cnn_a, "cifar", 2 / 255, True, 99),
    "cifar-cnn-a-mix4": Network("sdp/cifar_cnn_a_mix4.model", cnn_a, "cifar", 2 / 255, True, 115),
    "mnist-madry-tiny": Network(
        "bab_attack/MadryCNN_no_maxpool_tiny.pt", lambda: convs(1, ((4, 5, 2), (8, 5, 2)), 392, 128), "mnist", 0.3,
        True),
    "cifar-cnn-a-adv-alt": Network(
        "sdp/cifar_cnn_a_adv_alt.model", lambda: cifar(CIFAR10, convs(3, ((16, 4, 1), (32, 4, 1)), 2048)), "cifar",
        2 / 255, False),
    "cifar-conv-small-pgd": Network(
        "eran/cifar_conv_small_pgd.pth", lambda: cifar(ERAN, convs(3, ((16, 4, 0), (32, 4, 0)), 1152)), "cifar",
        2 / 255, False),
    "cifar-resnet-2b": Network(
        "cifar10_resnet/resnet2b.pth", lambda: cifar(CIFAR10, ResNet(8, 1)), "cifar", 2 / 255, False),
    "cifar-resnet-4b": Network(
        "cifar10_resnet/resnet4b.pth", lambda: cifar(CIFAR10, ResNet(16, 2)), "cifar", 2 / 255, False),
    "wong-mnist": Network(
        "models/mnist.pth", lambda: convs(1, ((16, 4, 1), (32, 4, 1)), 1568), "mnist", 0.1, False),
    "wong-mnist-scaled": Network(
        "models_scaled/mnist_small_0_3.pth", lambda: convs(1, ((16, 4, 1), (32, 4, 1)), 1568), "mnist", 0.3, False),
    "wong-cifar": Network("models_scaled/cifar_small_8px.pth", cnn_wong, "cifar", 8 / 255, False),
    "wong-cifar-l2": Network("models_scaled_l2/cifar_small_36px.pth", cnn_wong, "cifar", 36 / 255, False),
}  # fmt: skip


def load(clones: Sequence[Path], network: Network) -> nn.Module:
    """The network with its weights, which are read as data, from the first clone that has them."""
    places = [clone / inside / network.weights for clone in clones for inside in ("complete_verifier/models", "")]
    path = next((place for place in places if place.exists()), places[0])
    found = torch.load(path, map_location="cpu", weights_only=True)
    model = network.build().eval()
    bare = model[1] if isinstance(model[0], Normalize) else model
    found = found.get("state_dict", found)
    bare.load_state_dict(found[0] if isinstance(found, list) else found)
    return model


def images(clone: Path, name: str) -> tuple[Tensor, Tensor]:
    """The 200 images and labels of one set, scaled to [0, 1]."""
    folder = clone / "complete_verifier/datasets/sdp" / name
    x = torch.from_numpy(np.load(folder / "X_sdp.npy", allow_pickle=False)).movedim(3, 1).contiguous()
    return x[:NUM], torch.from_numpy(np.load(folder / "y_sdp.npy", allow_pickle=False))[:NUM]


def hard_images(clone: Path, network: Network) -> tuple[Tensor, Tensor]:
    """The MNIST test images that the verifier's attacks left standing and a solver proved breakable (BaB-Attack)."""
    name = Path(network.weights).stem
    lists = clone / "complete_verifier/exp_configs/bab_attack/attack_idx"
    rows = next(path for path in lists.iterdir() if path.name.endswith(name))
    chosen = [int(line) for line in (rows / "mip_unsafe_idx.txt").read_text(encoding="ascii").split()]
    data = load_data("mnist")
    return scale(data.x_test[chosen]), data.y_test[chosen]


def part(
    clones: Sequence[Path], network: Network, kind: str, method: str, seed: int, authors_code: Path | None = None
) -> dict[str, Any]:
    """One method with one seed on a network's images.

    kind: "linf", what the network was trained against; "hard", those instances alone; "l2" or "l1". method: a plan;
    "authors", the AutoAttack of its authors; "reference", AutoAttack put together from torchattacks.
    """
    model, started = load(clones, network), time.process_time()
    x, y = hard_images(clones[0], network) if kind == "hard" else images(clones[0], network.data)
    l2 = network.weights.startswith("models_scaled_l2")  # the one network that was trained against it
    radius = float(network.threat if l2 else OTHER.get((kind, network.data), network.threat))
    norm = {"l2": "L2", "l1": "L1"}.get(kind, "Linf")
    if method == "reference":
        return reference(model, x, y, norm, radius, 10, seed)
    if method == "authors":
        if authors_code is None:
            raise ValueError("the method authors needs their code: --authors CLONE, a clone of fra31/auto-attack")
        return authors(authors_code, model, x, y, norm, radius, seed)
    threat = make_threat(f"{norm.lower()}:{radius}")
    found = measure(model, [(x, y)], threat, make_plan(method, threat), curve=(), seed=seed)
    return {"clean": found.table["correct"].tolist(), "robust": found.table["robust"].tolist(), "cost": found.cost,
            "members": [(a.name, a.standing_after) for a in found.attacks],
            "cpu_seconds": time.process_time() - started}  # fmt: skip


def summary(records: list[dict[str, Any]]) -> str:
    """A Markdown table: per network and method what stands for each seed, and passes per image."""
    rows, kind = [], records[0]["kind"] if records else ""
    for name, network in NETWORKS.items():
        for method in dict.fromkeys(r["method"] for r in records):
            found = sorted((r for r in records if r["network"] == name and r["method"] == method),
                           key=lambda r: r["seed"])  # fmt: skip
            if not found:
                continue
            passes = [(r["cost"][0] + 2 * r["cost"][1]) / len(r["robust"]) for r in found]
            chosen, bound = "yes" if network.chosen_on else "no", network.bound if kind == "linf" else None
            rows.append([
                f"{name}, {method}", chosen, sum(found[0]["clean"]), " ".join(str(sum(r["robust"])) for r in found),
                bound or "", f"{sum(passes) / len(passes):,.0f}",
                f"{sum(r['cpu_seconds'] for r in found) / len(found):,.0f}",
            ])  # fmt: skip
    head = ["network, method", "chosen on", "right", "stand, by seed", "published", "passes an image", "CPU s"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("clones", type=Path, nargs="+")
    parser.add_argument("--kind", default="linf", choices=["linf", "hard", "l2", "l1"])
    parser.add_argument("--methods", nargs="+", default=["fast", "autoattack", "reference"])
    parser.add_argument("--authors", type=Path, help="a clone of fra31/auto-attack, for the method authors")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    lines = Lines(options.out)
    for method in options.methods:
        for name in options.networks:
            for seed in range({"autoattack": 2, "authors": 1, "reference": 1}.get(method, 3)):
                key = {"network": name, "kind": options.kind, "method": method, "seed": seed}
                if lines.find(**key) is None:
                    made = part(options.clones, NETWORKS[name], options.kind, method, seed, options.authors)
                    found = lines.add({**key, **made})
                    print(key, sum(found["robust"]), found["cost"], f"{found['cpu_seconds']:.0f} s", flush=True)
    print(f"\n{provenance(seed='0, 1, 2', n=NUM, packages=['torchattacks'])}\n")
    print(summary([r for r in lines.records if r["kind"] == options.kind]))


if __name__ == "__main__":
    main()
