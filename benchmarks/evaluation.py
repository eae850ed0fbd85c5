"""AutoAttack by an independent implementation, by ours, and the fast verdict, on models trained here.

Each part is one run, one method and one chunk of images; a finished part is kept in a file of JSON lines and never
computed again, so the script may be killed at any time. Run: python benchmarks/evaluation.py OUT.jsonl RUN[:N]...
A RUN is a run folder of `sparring train`; N limits the number of test images (default 1,000).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import Lines, provenance, table
from reference import reference
from sparring import Ball, measure
from sparring.app import train_run as runs
from sparring.attacks.plans import PLANS, make_plan
from sparring.modalities import load_data
from sparring.modalities.images import scale
from sparring.threats import L2, make_threat

CHUNK = 250
METHODS = ("reference-0", "reference-1", "autoattack", "fast")


def part(run: Path, method: str, first: int, last: int) -> dict[str, Any]:
    """One method on the test images [first, last) of a run's data."""
    config = runs.read_config(run)
    spec = str(config.model)
    model = runs.load(run, "best", model=spec if ":" in spec else None).eval()
    dataset, threat = load_data(config.data), make_threat(config.threat)
    x, y = scale(dataset.x_test[first:last]), dataset.y_test[first:last]
    if method in PLANS:
        return ours(model, x, y, threat, method)
    norm = "L2" if isinstance(threat, L2) else "Linf"
    return reference(model, x, y, norm, float(threat.radius), dataset.num_classes, int(method[-1]))


def ours(model: nn.Module, x: Tensor, y: Tensor, threat: Ball, protocol: str) -> dict[str, Any]:
    """The same record as the reference's, from `evaluate` without its curve."""
    started, cpu_started = time.perf_counter(), time.process_time()
    found = measure(model, [(x, y)], threat, make_plan(protocol, threat), curve=())
    return {
        "clean": found.table["correct"].tolist(),
        "members": [{"name": a.name, "standing": a.standing_after, "cost": a.cost} for a in found.attacks],
        "robust": found.table["robust"].tolist(),
        "cost": found.cost,
        "cpu_seconds": time.process_time() - cpu_started,
        "seconds": time.perf_counter() - started,
    }


def summary(records: list[dict[str, Any]]) -> str:
    """A Markdown table: per run and method what stands, passes per image, and seconds of this process."""
    rows: list[list[str]] = []
    for name in dict.fromkeys(record["run"] for record in records):
        for method in METHODS:
            chunks = [r for r in records if r["run"] == name and r["method"] == method]
            if not chunks:
                continue
            n = sum(len(r["robust"]) for r in chunks)
            clean, robust = (sum(sum(r[key]) for r in chunks) for key in ("clean", "robust"))
            forwards, backwards = (sum(r["cost"][k] for r in chunks) / n for k in (0, 1))
            rows.append([
                f"{name}, {method}", str(n), f"{clean / n:.1%}", f"{robust / n:.2%}", str(robust),
                f"{forwards:,.0f}", f"{backwards:,.0f}", f"{forwards + 2 * backwards:,.0f}",
                f"{sum(r['cpu_seconds'] for r in chunks):,.0f}",
            ])  # fmt: skip
    head = ["model, method", "n", "clean", "robust", "stand", "forwards", "backwards", "passes", "CPU s"]
    return table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("runs", nargs="+", help="RUN or RUN:N")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    options = parser.parse_args()
    lines = Lines(options.out)
    for text in options.runs:
        folder, _, limit = text.partition(":")
        for method in options.methods:
            for first in range(0, int(limit or 1000), CHUNK):
                last = min(first + CHUNK, int(limit or 1000))
                key = {"run": Path(folder).name, "method": method, "first": first, "last": last}
                if lines.find(**key) is None:
                    print(key, flush=True)
                    torch.manual_seed(0)
                    lines.add({**key, **part(Path(folder), method, first, last)})
    print(f"\n{provenance(seed='0; reference 0 and 1', n='in the table', packages=['torchattacks'])}\n")
    print(summary(lines.records))


if __name__ == "__main__":
    main()
