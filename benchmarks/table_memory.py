"""Peak memory of `sparring schema check` on generated files of several sizes, each in a process of its own.

Six columns that are checked, and an address of 150 characters that the schema ignores.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

from common import provenance, table

SCHEMA = """
label = "label"
attacked = "bad"
ignore = ["url"]
[columns]
packets = {type = "integer", low = 1, high = 100}
bytes = {type = "integer", low = 0, high = 10000, scale = "log", change = "up"}
mean = {type = "real", low = 0, high = 1500, unit = 10}
rate = {type = "real", low = 0, high = 1, step = 0.01, unit = 0.1}
protocol = {type = "category", values = ["tcp", "udp"], change = "none"}
[[relations]]
rule = "bytes >= 40 * packets"
[[relations]]
rule = "mean = bytes / packets"
[[relations]]
rule = 'if is(protocol, "udp") > 0 then packets <= 50'
"""
PEAK = """
import resource, sys
from sparring.app.cli import app
try: app(["schema", "check", *sys.argv[1:]])
except SystemExit: pass
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, resource.getrusage(resource.RUSAGE_SELF).ru_utime)
"""


def write(path: Path, num_bytes: int) -> int:
    """A file of about that size: 100,000 rows drawn once, again and again. Returns the number of rows."""
    draw = np.random.default_rng(0)
    packets, udp = draw.integers(1, 50, 100_000), draw.integers(0, 2, 100_000)
    sizes = packets * draw.integers(40, 60, 100_000)
    block = "".join(
        f"{p},{s},{s / p:.6f},{r / 100:.2f},{('tcp', 'udp')[u]},{('good', 'bad')[u]},http://{s:0143d}\n"
        for p, s, r, u in zip(packets, sizes, draw.integers(0, 101, 100_000), udp, strict=True)
    )
    times = -(-num_bytes // len(block))
    with path.open("w") as file:
        file.write("packets,bytes,mean,rate,protocol,label,url\n")
        for _ in range(times):
            file.write(block)
    return times * 100_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", help="for the files, which are removed again")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[100, 1000])
    args = parser.parse_args()
    folder, rows = Path(args.folder), []
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "flows.toml").write_text(SCHEMA)
    for size in args.megabytes:
        file = folder / "flows.csv"
        try:
            num = write(file, size * 10**6)
            command = [sys.executable, "-c", PEAK, str(folder / "flows.toml"), str(file)]
            done = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        finally:
            file.unlink(missing_ok=True)
        peak, seconds = map(float, done[-1].split())
        rows.append([f"{size} MB", f"{num:,}", f"{peak:.0f} MiB", f"{seconds:.0f}", done[-2]])
        print(rows[-1], flush=True)
    print("\n" + table(["file", "rows", "peak memory", "CPU s", "what it says"], rows), "\n")
    print(provenance(seed=0, n="the rows above"))


if __name__ == "__main__":
    main()
