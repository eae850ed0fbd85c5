"""The battery of checks on MNIST and CIFAR-10: ten networks that others trained, and ten defences built around them.

defences.py has digits, where the thresholds were set. Here nothing is set: the networks are those of strangers.py (see
there for source, commit and licence, and how to bring them), each with the threat it was trained for and the verifier's
200 images; a claim is PGD-40 from one start, and what an informed attacker leaves says whether it is right. Run it:
python benchmarks/defences_elsewhere.py OUT.jsonl CLONE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import Lines, provenance, table
from defences import Entry, Then, WrongWay, bare, code, judge, rounded, shattered, shown, summary
from sparring import Linf
from strangers import NETWORKS, images, load


def times(factor: float) -> Callable[[Tensor], Tensor]:
    return lambda z: factor * z


def soft(z: Tensor) -> Tensor:
    return (50 * z).softmax(1)


BROKEN: dict[str, tuple[str, dict[str, Callable[[Tensor], Tensor]], bool]] = {
    "logits x 10,000": ("mnist-cnn-a-adv", {"after": times(1e4)}, True),
    "ripple on the input": ("mnist-madry-tiny", {"before": shattered}, False),
    "backward pass of its own": ("mnist-cnn-a-adv", {"before": WrongWay.apply}, False),
    "rounding to 16 levels": ("mnist-madry-tiny", {"before": lambda x: rounded(x, 16)}, False),
    "logits x 10,000, colour": ("cifar-cnn-a-adv", {"after": times(1e4)}, True),
    "rounding to 64 levels": ("cifar-cnn-a-mix", {"before": lambda x: rounded(x, 64)}, False),
    "softmax at temperature 1/50": ("cifar-conv-small-pgd", {"after": soft}, True),
    "ripple on the input, colour": ("cifar-resnet-2b", {"before": shattered}, False),
    "backward pass of its own, colour": ("cifar-cnn-a-mix4", {"before": WrongWay.apply}, False),
    "rounding to 32 levels": ("cifar-resnet-4b", {"before": lambda x: rounded(x, 32)}, False),
}
"""What stands before or after which network, and whether the author climbs the cross-entropy alone."""


def entries(clone: Path) -> list[tuple[str, Entry]]:
    """The network's name, and the model made of it."""

    def wrapped(name: str, parts: dict[str, Any]) -> nn.Module:
        return Then(load([clone], NETWORKS[name]), **parts)

    honest = [
        (name, Entry(name, "elsewhere", "honest", lambda _, n=network: load([clone], n), Linf(network.threat)))
        for name, network in NETWORKS.items()
        if not name.startswith("wong")
    ]
    broken = [
        (name, Entry(f"{defence}: {name}", "elsewhere", "broken", lambda _, n=name, p=parts: wrapped(n, p),
                     Linf(NETWORKS[name].threat), only_ce, bare))
        for defence, (name, parts, only_ce) in BROKEN.items()
    ]  # fmt: skip
    return honest + broken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("clone", type=Path)
    parser.add_argument("--num", type=int, default=200, help="images of each network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, digest, records = Lines(options.out), code(), []
    for name, entry in entries(options.clone):
        record = lines.find(name=entry.name, code=digest, num=options.num)
        if record is None:
            x, y = (part[: options.num] for part in images(options.clone, NETWORKS[name].data))
            key = {"name": entry.name, "kind": entry.kind, "code": digest, "num": options.num}
            record = lines.add({**key, **judge(entry, SimpleNamespace(x=x, y=y))})  # type: ignore[arg-type]
            print(entry.name, record["verdict"], file=sys.stderr, flush=True)
        records.append(record)
    print(table(("model", "clean", "claimed", "best known", "above", "verdict", "fired"), [shown(r) for r in records]))
    summary(records)
    print("\n" + provenance(seed=0, n=f"{options.num} images of each network, 128 checked"))


if __name__ == "__main__":
    main()
