"""MNIST under attack: the worst case, image by image, over long PGD runs with three step sizes and many restarts.

For each run folder, in this order, each attack on the images that still stand:
1. cross-entropy, PGD-100 with steps of radius / 40, / 10 and / 3, 10 restarts each: "robust at 10";
2. the same with 10 further restarts, from random starts that are not those of the first: "robust at 20". When it lies
   well below the first, neither number has settled;
3. the margin as objective, the same steps and restarts: the stricter worst case, reported apart;
4. with --square N: Square with N queries (torchattacks), which needs no gradient. What it still breaks, gradients
   have left on the table.

Robust accuracy is the share of all images, the wrongly classified ones included. Every finished attack is stored in
--out and not run again.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import Lines, provenance, share_text, table
from sparring.app import train_run as runs
from sparring.attacks.plans import ATTACKS
from sparring.core.batches import Batches
from sparring.core.model_state import attack_mode, private_rng
from sparring.core.registry import named
from sparring.core.types import AttackResult, Cost
from sparring.evaluation.measure import MakeAttack, measure
from sparring.modalities import load_data
from sparring.modalities.images import scale
from sparring.results.statistics import wilson
from sparring.threats import make_threat
from sparring.threats.base import ThreatModel

STEPS = {"radius/40": 1 / 40, "radius/10": 1 / 10, "radius/3": 1 / 3}
FRESH = 1_000_003
"""Added to the seed for the further restarts: evaluate's streams hang on the seed, so all of these are new."""


class Counting(nn.Module):
    """Counts the examples that pass through a model."""

    def __init__(self, model: Callable[[Any], Tensor]) -> None:
        super().__init__()
        self.model, self.count = model, 0
        self.anchor = nn.Parameter(torch.zeros(0), requires_grad=False)  # where torchattacks looks for the device

    def forward(self, x: Tensor) -> Tensor:
        self.count += len(x)
        return self.model(x)


def square(queries: int, seed: int) -> MakeAttack:
    """Square (Andriushchenko 2020) as torchattacks has it, for evaluate, which checks what comes back."""

    def make(threat: ThreatModel) -> Any:
        def attack(model: Any, x: Tensor, target: Tensor, *, noise: Any = None) -> AttackResult:
            import torchattacks

            with attack_mode(model) as frozen, private_rng(seed, x.device):
                counting = Counting(frozen).eval()
                search = torchattacks.Square(
                    counting, norm="Linf", eps=float(threat.radius), n_queries=queries, seed=seed, loss="margin"
                )
                search.set_device(x.device)
                x_adv = search(x, target).detach()
            z = threat.project(x, x_adv - x)
            return AttackResult(threat.realize(x, z), z, threat.size(x, z), None, None, Cost(counting.count, 0))

        return attack

    make.__name__ = f"square:queries={queries}"
    return make


def stages(args: argparse.Namespace) -> list[tuple[str, str, MakeAttack, int]]:
    """(stage, name, attack, seed), in order."""
    found: list[tuple[str, str, MakeAttack, int]] = []

    def add(stage: str, objective: str, seed: int) -> None:
        for name, step in STEPS.items():
            options = {"num_steps": args.num_steps, "step": step, "restarts": args.restarts, "objective": objective}
            found.append((stage, f"{objective}, step {name}", named("pgd", ATTACKS, "attack").but(**options), seed))

    add(f"robust at {args.restarts}", "ce", args.seed)
    add(f"robust at {2 * args.restarts}", "ce", args.seed + FRESH)
    add("margin too", "margin", args.seed)
    if args.square:
        found.append(("Square too", "square", square(args.square, args.seed), args.seed))
    return found


def judge(model: nn.Module, x: Tensor, y: Tensor, args: argparse.Namespace, lines: Lines, key: dict[str, Any]) -> list:
    """The record of each attack in order; the first holds the clean predictions too."""
    records: list[dict[str, Any]] = []
    standing = torch.arange(len(y))
    for number, (stage, name, attack, seed) in enumerate(stages(args)):
        own = {**key, "number": number, "attack": str(getattr(attack, "__name__", attack)), "seed": seed}
        record = lines.find(**own)
        if record is None and not len(standing):
            record = {**own, "right": 0, "ran_on": 0, "broke": 0, "standing": [], "seconds": 0.0}
            record |= {"forwards": 0, "backwards": 0, "rejected": {}}
        if record is None:
            batches = Batches(x[standing], y[standing], args.batch_size)
            found = measure(model, batches, make_threat(args.threat), [attack], seed=seed, curve=(), gallery_size=0)
            record = lines.add(
                {
                    **own,
                    "right": found.clean.count,
                    "ran_on": found.attacks[0].ran_on,
                    "broke": found.attacks[0].broke,
                    "standing": standing[found.table["robust"]].tolist(),
                    "forwards": found.attacks[0].cost.forwards,
                    "backwards": found.attacks[0].cost.backwards,
                    "rejected": {k: v for k, v in found.attacks[0].rejected.items() if v},
                    "seconds": round(found.seconds, 1),
                }
            )
            print(f"{key['run']}: {stage}, {name}: {record['broke']} of {record['ran_on']} broken", flush=True)
        records.append({**record, "stage": stage, "name": name})
        standing = torch.tensor(record["standing"], dtype=torch.int64)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders of `sparring train`")
    parser.add_argument("--out", type=Path, default=Path("runs/mnist.jsonl"), help="finished attacks, as JSON lines")
    parser.add_argument("--data", default="mnist")
    parser.add_argument("--threat", default="linf:0.3")
    parser.add_argument("--checkpoint", choices=("best", "last", "averaged"), default="best")
    parser.add_argument("--num-examples", type=int, default=1000, help="the first of the test images")
    parser.add_argument("--restarts", type=int, default=10, help="first this many, then as many again")
    parser.add_argument("--num-steps", type=int, default=100)
    parser.add_argument("--square", type=int, default=0, metavar="N", help="queries of Square at the end")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.square:
        try:
            import torchattacks  # noqa: F401
        except ImportError:
            print("Square is left out: torchattacks is not installed")
            args.square = 0
    data, lines = load_data(args.data), Lines(args.out)
    x, y = scale(data.x_test[: args.num_examples]), data.y_test[: args.num_examples]
    summary, details = [], []
    for run in args.runs:
        weights = (run / f"{args.checkpoint}.safetensors").read_bytes() if run.is_dir() else b""
        model = runs.load(run, args.checkpoint)
        key = {
            "run": run.resolve().name,
            "sha256": hashlib.sha256(weights).hexdigest(),
            "data": args.data,
            "threat": args.threat,
            "num_examples": len(y),
            "batch_size": args.batch_size,
        }
        records = judge(model, x, y, args, lines, key)
        summary.append(_row(key["run"], records, len(y)))
        details += [_detail(key["run"], record, len(y)) for record in records]
    names = list(dict.fromkeys(stage for stage, *_ in stages(args)))
    head = ("run", "clean", *names, "forwards", "backwards", "seconds")
    print(
        f"\nThe first {len(y)} test images of {args.data} at {args.threat}, {args.checkpoint} weights, 95 % intervals\n"
    )
    print(table(head, summary) + "\n\nEach attack, on what stood before it\n")
    print(table(("attack", "ran on", "broke", "standing after", "rejected", "seconds"), details) + "\n")
    print(provenance(seed=args.seed, n=len(y), packages=("torchattacks",) if args.square else ()))


def _row(run: str, records: list[dict[str, Any]], num: int) -> list[str]:
    last = {record["stage"]: record for record in records}
    cells = [run, share_text(wilson(records[0]["right"], num))]
    cells += [share_text(wilson(len(record["standing"]), num)) for record in last.values()]
    return cells + [f"{sum(r[name] for r in records):,.0f}" for name in ("forwards", "backwards", "seconds")]


def _detail(run: str, record: dict[str, Any], num: int) -> list[Any]:
    after = f"{len(record['standing'])} of {num}"
    name = f"{run}: {record['stage']}: {record['name']}"
    return [name, record["ran_on"], record["broke"], after, record["rejected"] or 0, record["seconds"]]


if __name__ == "__main__":
    main()
