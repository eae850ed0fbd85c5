"""Phishing addresses under an opponent who obeys the rules: MLP before and after hardening, gradients and searches.

Standard training, and half of each batch attacked (relaxed PGD at 1.6 times the radius that is judged), into folders
beside OUT.jsonl; then the attacks one after the other on the phishing rows of the test part that come first, each on
what still stands. Every row that counts is lawful by the checker; rejected rows are counted and printed. Every finished
part is stored and not computed again. Needs $SPARRING_DATA/phishing_urls.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from common import Lines, provenance, share_text, table
from sparring.app import train_run as runs
from sparring.app.settings import TrainingSettings
from sparring.core.batches import Batches
from sparring.core.types import take
from sparring.evaluation.measure import measure
from sparring.modalities import find, load_data
from sparring.results.statistics import wilson

THREATS = ("columns:0.5,norm=l2,units=range", "columns:3,norm=l1")
RECIPES = {"standard": "standard", "hardened": "mixed:num_steps=5,step=0.4"}
STAGES = "pgd:num_steps=40,restarts=2,apgd:num_steps=50,objective=margin,greedy:rounds=4,evolve:generations=60"


def trained(name: str, args: argparse.Namespace, lines: Lines) -> Any:
    """The model of a recipe; its accuracy on the whole test part and the CPU seconds go into the lines."""
    run = Path(args.out).with_suffix("") / f"{name}-{args.seed}"
    started = time.process_time()
    if not (run / "training.json").exists():
        asked = {"data": data_of(args), "threat": "columns:0.8,norm=l2,units=range", "recipe": RECIPES[name]}
        runs.start_run(TrainingSettings(**asked, epochs=args.epochs, held_out=300, seed=args.seed), run)
    model = runs.load(run)
    if not lines.find(name=name, seed=args.seed, part="clean"):
        data = load_data(data_of(args))
        with torch.no_grad():
            right = model(data.x_test).argmax(1) == data.y_test
        counts = [int(right[data.y_test == k].sum()) for k in (0, 1)]
        sizes = [int((data.y_test == k).sum()) for k in (0, 1)]
        key = {"name": name, "seed": args.seed, "part": "clean"}
        lines.add({**key, "right": counts, "of": sizes, "cpu": time.process_time() - started})
    return model


def data_of(args: argparse.Namespace) -> str:
    return f"table:phishing_urls,seed={args.seed}"


def part(lines: Lines, name: str, text: str, args: argparse.Namespace) -> dict[str, Any]:
    """One model under one threat, from the file or computed: what stands after each stage."""
    model = trained(name, args, lines)
    key = {"name": name, "seed": args.seed, "part": text, "n": args.num_examples}
    if found := lines.find(**key):
        return found
    started = time.process_time()
    data, tables = load_data(data_of(args)), find("table")
    threat = tables.make_threat(text, data)
    rows = (data.y_test == 1).nonzero()[: args.num_examples, 0]
    batches = Batches(take(data.x_test, rows), data.y_test[rows], 100)
    stages = tables.make_plan(STAGES, threat)
    found = measure(model, batches, threat, stages, seed=args.seed + 1000, curve=(), gallery_size=0)
    records = [[a.name, a.standing_after, a.cost.forwards, sum(a.rejected.values())] for a in found.attacks]
    return lines.add(
        {**key, "clean": found.clean.count, "after": records, "cpu": time.process_time() - started}
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", help="JSON lines to keep results in")
    parser.add_argument("--num-examples", type=int, default=150, help="phishing rows that are attacked")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(Path(args.out))
    for text in THREATS:  # what matters most first
        for name in RECIPES:
            print(name, text, f"{part(lines, name, text, args)['cpu']:.0f} s", flush=True)
    report(lines, args)


def report(lines: Lines, args: argparse.Namespace) -> None:
    """Clean figures of the whole test part, and what each attack leaves of the rows that were attacked."""
    clean = {name: lines.find(name=name, seed=args.seed, part="clean") for name in RECIPES}
    rows = [
        [name, share_text(wilson(sum(r["right"]), sum(r["of"]))), share_text(wilson(r["right"][1], r["of"][1])),
         share_text(wilson(r["of"][0] - r["right"][0], r["of"][0])), f"{r['cpu']:.0f}"]
        for name, r in clean.items() if r
    ]  # fmt: skip
    print(table(["model", "clean accuracy", "recall of phishing", "false alarms", "training, CPU s"], rows), "\n")
    kept = [lines.find(name=name, seed=args.seed, part=t, n=args.num_examples) for t in THREATS for name in RECIPES]
    found = [r for r in kept if r]
    head = ["threat, model", "clean", *(a[0] for a in found[0]["after"]), "queries a row", "rejected", "CPU s"]
    body = [
        [f"`{r['part']}`, {r['name']}", share_text(wilson(r["clean"], r["n"])),
         *(share_text(wilson(a[1], r["n"])) for a in r["after"]), f"{sum(a[2] for a in r['after']) / r['n']:.0f}",
         sum(a[3] for a in r["after"]), f"{r['cpu']:.0f}"]
        for r in found
    ]  # fmt: skip
    print(table(head, body), "\n")
    print(provenance(seed=args.seed, n=args.num_examples))


if __name__ == "__main__":
    main()
