"""AutoAttack by an independent implementation, by ours, and the fast verdict, on models trained here.

Each part is one run, one method and one chunk of images; a finished part is kept in a file of JSON lines and never
computed again, so the script may be killed at any time. Run: python benchmarks/evaluation.py OUT.jsonl RUN[:N]...
A RUN is a run folder of `sparring train`; N limits the number of test images (default 1,000).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import Lines
from reference import reference

from sparring import runs
from sparring.data import load as load_data
from sparring.data.images import scale
from sparring.threats import L2, parse_threat

CHUNK = 250
METHODS = ("reference-0", "reference-1")


def part(run: Path, method: str, first: int, last: int) -> dict[str, Any]:
    """One method on the test images [first, last) of a run's data."""
    config = runs.read_config(run)
    spec = str(config.model)
    model, _ = runs.load(run, "best", model=spec if ":" in spec else None), None
    dataset, threat = load_data(config.data), parse_threat(config.threat)
    x, y = scale(dataset.x_test[first:last]), dataset.y_test[first:last]
    norm = "L2" if isinstance(threat, L2) else "Linf"
    return reference(model, x, y, norm, float(threat.radius), dataset.num_classes, int(method[-1]))


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


if __name__ == "__main__":
    main()
