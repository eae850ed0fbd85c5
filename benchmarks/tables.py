"""Phishing addresses and connections under an opponent who obeys the rules: before and after hardening.

standard, resnet: ordinary training. hardened: half of each batch attacked by relaxed PGD-5 at a multiple of the radius
that is judged, on NSL-KDD with a weight on the attacked class; weighted: standard with that weight. found: hardened
after rounds in which rows that a search found are added. trees, trees-found: LightGBM (package `lightgbm`) without and
with such rounds. Each is attacked on rows of the test part, by one attack after the other, each on what still stands.
Every row that counts is lawful by the checker; rejected rows are counted and printed.

--split row, host: phishing, by address or the addresses of one host together; kddtest: NSL-KDD, trained on 25,000 rows
and judged on KDDTest+; kinds: on its training rows alone, attacked with kinds that were not trained on: there settings
were chosen. --threats free: the same radius without laws. Every finished part is stored and not computed again. Needs
$SPARRING_DATA/phishing_urls, nsl_kdd.
"""

from __future__ import annotations

import argparse
import csv
import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from torch import Tensor

from common import Lines, provenance, share_text, table
from sparring import BlackBox
from sparring.core.batches import Batches
from sparring.core.types import map_inputs, take
from sparring.evaluation.measure import measure
from sparring.modalities import find, load_data
from sparring.modalities.tables.cells import read_chunks
from sparring.modalities.tables.read import facts_of
from sparring.modalities.tables.search import evolve, greedy_columns
from sparring.results.statistics import wilson
from sparring.training.found import train_on_found
from sparring.training.loop import train
from sparring.training.schedules import SCHEDULES

TABLE = find("table")
THREATS = {
    "l2": "columns:0.5,norm=l2,units=range", "l1": "columns:3,norm=l1",
    "free": "columns:0.5,norm=l2,units=range,laws=ignored",
}  # fmt: skip
SEARCHES = "greedy:rounds=4,evolve:generations=60,evolve:generations=60"  # 5 values a column, 1,920 + 1,920
GRADIENTS = "pgd:num_steps=40,restarts=2,"
TRIED = 1200
PHISHING, NSL_KDD = "phishing_urls/urls.csv.gz", "nsl_kdd/train.csv.gz"
SPLITS = {"row": PHISHING, "host": PHISHING, "kddtest": NSL_KDD, "kinds": NSL_KDD}

UNSEEN = (
    ("satan", "smurf", "portsweep", "warezclient"), ("ipsweep", "nmap", "back", "teardrop", "pod", "guess_passwd")
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """Of training on one table: the radius as a multiple of the judged one, epochs, the weight of the attacked class
    (not of `standard`), rounds of found rows."""

    factor: float
    epochs: int
    weight: float
    rounds: int


SETTINGS = {PHISHING: Settings(1.6, 10, 1.0, 2), NSL_KDD: Settings(4.0, 4, 8.0, 2)}


read_once = functools.cache(load_data)


@functools.cache
def data_of(split: str, seed: int) -> tuple[Any, np.ndarray]:
    """The table, and of each test row what group it is of: its label, or the category of the attack."""
    path = Path(os.environ["SPARRING_DATA"], SPLITS[split])
    if split == "kddtest":
        whole = read_once("table:nsl_kdd")
        rows = torch.randperm(len(whole.y_train), generator=torch.Generator().manual_seed(seed))[:25000]
        x, y = take(whole.x_train, rows), whole.y_train[rows]
        facts = facts_of(x["rows"].numpy(), whole.schema)
        return replace(whole, x_train=x, y_train=y, facts=facts), categories(path.with_name("test.csv.gz"))
    if split == "row":
        data = load_data(f"table:phishing_urls,seed={seed}")
        return data, np.array(data.class_names)[data.y_test]
    whole = read_once(f"table:{path.parent.name},test={path}")  # of phishing all rows, in the order of the file
    x, y = (whole.x_test, whole.y_test) if split == "host" else (whole.x_train, whole.y_train)
    draw = np.random.default_rng(seed)
    if split == "host":
        urls = column(path, "url")
        hosts = np.unique([urlsplit(url).hostname or url for url in urls], return_inverse=True)[1]
        test = (draw.random(hosts.max() + 1) < 0.2)[hosts]
        train, groups = ~test, np.array(whole.class_names)[y]
    else:  # the test holds the kinds that training did not see, as KDDTest+ does in part
        kinds, number = np.unique(column(path, "label"), return_inverse=True)
        new, normal = np.isin(kinds, UNSEEN[seed % 2])[number], (kinds == "normal")[number]
        test = new | (normal & (draw.random(len(number)) < 0.1))
        train, groups = ~test & (draw.random(len(number)) < 0.22), categories(path)
    parts = [torch.from_numpy(rows).nonzero()[:, 0] for rows in (train, test)]
    (x_train, y_train), (x_test, y_test) = [(take(x, rows), y[rows]) for rows in parts]
    return replace(whole, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test), groups[test]


def column(path: Path, name: str) -> list[str]:
    """The cells of one column of a file."""
    return [row[chunk.header.index(name)] for chunk in read_chunks(str(path)) for row in chunk.cells]


def categories(path: Path) -> np.ndarray:
    """dos, probe, r2l, u2r or normal, of each connection of NSL-KDD."""
    with path.with_name("attack_types.csv").open() as file:
        known = {line["attack"]: line["category"] for line in csv.DictReader(file)}
    return np.array([known[label] for label in column(path, "label")])


def fitter(name: str, data: Any, threat: Any, own: Settings, seed: int) -> Callable[[Any, Tensor], Any]:
    """What learns from rows and labels: each call goes on with the same network; trees are grown anew."""
    if name.startswith("trees"):
        from lightgbm import LGBMClassifier

        def grow(x: Any, y: Tensor) -> Any:
            made = LGBMClassifier(n_estimators=200, n_jobs=1, random_state=seed, verbose=-1)
            return BlackBox(made.fit(x["rows"].numpy(), y.numpy()))

        return grow
    model = TABLE.make_model("resnet" if name.startswith("resnet") else "mlp", seed, data.given)
    plain = name in ("standard", "weighted", "resnet")
    recipe = TABLE.named_recipe("standard" if plain else "mixed:num_steps=5,step=0.4")(threat)
    if own.weight != 1 and name not in ("standard", "resnet"):
        recipe = replace(recipe, class_weights=(1.0, own.weight))
    calls = iter(range(100))

    def learn(x: Any, y: Tensor) -> Any:
        number = next(calls)
        epochs = own.epochs if number == (own.rounds if name == "found" else 0) else 3
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=5e-4)
        batches = Batches(x, y, 256, seed=100 * seed + number, shuffle=True, drop_last=True)
        train(model, batches, recipe, optimizer, num_epochs=epochs, schedule=SCHEDULES["cosine"], seed=seed)
        return model.eval()

    return learn


@functools.cache
def trained(name: str, split: str, trained_on: str, seed: int) -> tuple[Any, tuple[int, ...], float]:
    """A model, how many rows were found in each round, CPU seconds."""
    data, own = data_of(split, seed)[0], SETTINGS[SPLITS[split]]
    threat = TABLE.make_threat(THREATS[trained_on], data).at(own.factor)
    fit = fitter(name, data, threat, own, seed)
    torch.manual_seed(seed)
    started = time.process_time()
    if not name.endswith("found"):
        return fit(data.x_train, data.y_train), (), time.process_time() - started
    trees = name.startswith("trees")
    search = greedy_then_evolve if trees else functools.partial(evolve, generations=20, population=16)
    done = train_on_found(
        fit, data.x_train, data.y_train, threat, search, num_rounds=4 if trees else own.rounds, num_tried=TRIED,
        among=data.y_train == 1, seed=seed,
    )  # fmt: skip
    return done.model, done.found, time.process_time() - started


def greedy_then_evolve(threat: Any) -> Any:
    """Both searches on each row: the better result."""
    parts = greedy_columns(threat, rounds=2), evolve(threat, generations=30, population=16)

    def attack(model: Any, x: Any, y: Tensor, *, noise: Any = None) -> Any:
        one, other = (part(model, x, y, noise=noise) for part in parts)
        better = other.loss > one.loss
        mixed = map_inputs(lambda a, b: b.where(better.view(-1, *[1] * (b.ndim - 1)), a), one.x_adv, other.x_adv)
        return other._replace(x_adv=mixed, z=other.z.where(better[:, None], one.z), cost=one.cost.plus(other.cost))

    return attack


def part(lines: Lines, name: str, which: str, args: argparse.Namespace, seed: int) -> dict[str, Any]:
    """One model under one threat, from the file or computed: what stands after each attack, and of each group."""
    about = {"name": name, "seed": seed, "split": args.split, "trained": args.trained}
    key = {**about, "part": which, "n": args.num_examples}
    if found := lines.find(**key):
        return found
    data, groups = data_of(args.split, seed)
    model, added, cpu = trained(name, args.split, args.trained, seed)
    if not lines.find(**about, part="clean"):
        with torch.no_grad():
            right = model(data.x_test).argmax(1) == data.y_test
        counts, sizes = ([int((data.y_test[of] == k).sum()) for k in (0, 1)] for of in (right, slice(None)))
        lines.add({**about, "part": "clean", "right": counts, "of": sizes, "found": list(added), "cpu": cpu})
    started = time.process_time()
    threat = TABLE.make_threat(THREATS[which], data)
    rows = (data.y_test == 1).nonzero()[:, 0]
    if SPLITS[args.split] == NSL_KDD:  # its kinds of attacks come in runs
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    rows = rows[: args.num_examples]
    batches = Batches(take(data.x_test, rows), data.y_test[rows], 250)
    stages = TABLE.make_plan(SEARCHES if name.startswith("trees") else GRADIENTS + SEARCHES, threat)
    measured = measure(model, batches, threat, stages, seed=seed + 1000, curve=(), gallery_size=0)
    records = [[a.name, a.standing_after, a.cost.forwards, sum(a.rejected.values())] for a in measured.attacks]
    mine, right, stands = groups[rows.numpy()], *(measured.table[k].numpy() for k in ("correct", "robust"))
    by = {group: [int((mine == group).sum()), *(int(of[mine == group].sum()) for of in (right, stands))]
          for group in np.unique(mine).tolist()}  # fmt: skip
    return lines.add({
        **key, "clean": measured.clean.count, "after": records, "groups": by, "cpu": time.process_time() - started,
    })  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", help="JSON lines to keep results in")
    parser.add_argument(
        "--models", default="standard,hardened,found", help="resnet, resnet-hardened, trees, trees-found"
    )
    parser.add_argument("--threats", default="l2,l1", help="that are judged")
    parser.add_argument("--trained", default="l2", choices=["l2", "l1"], help="the threat of training")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split", default="row", choices=[*SPLITS], help="of the phishing addresses, or of NSL-KDD")
    parser.add_argument("--num-examples", type=int, default=500, help="rows that are attacked")
    args = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(Path(args.out))
    for which in args.threats.split(","):  # what matters most first
        for seed in range(args.seeds):
            for name in args.models.split(","):
                found = part(lines, name, which, args, seed)
                print(name, which, seed, found["after"][-1][1], f"{found['cpu']:.0f} s", flush=True)
    report(lines, args)


def report(lines: Lines, args: argparse.Namespace) -> None:
    """Clean figures of the whole test part, and what each attack leaves of the rows that were attacked, all seeds."""
    mine = [r for r in lines.records if (r["split"], r["trained"]) == (args.split, args.trained)]
    names = args.models.split(",")
    rows = []
    for name in names:
        own = [r for r in mine if r["name"] == name and r["part"] == "clean"]
        right, of = np.array([r["right"] for r in own]), np.array([r["of"] for r in own])
        each = ", ".join(f"{100 * a.sum() / b.sum():.2f}" for a, b in zip(right, of, strict=True))
        rows.append([
            name, share_text(wilson(int(right.sum()), int(of.sum()))), each,
            share_text(wilson(int(right[:, 1].sum()), int(of[:, 1].sum()))),
            share_text(wilson(int((of - right)[:, 0].sum()), int(of[:, 0].sum()))),
            "; ".join("+".join(map(str, r["found"])) or "-" for r in own), f"{np.mean([r['cpu'] for r in own]):.0f}",
        ])  # fmt: skip
    head = ["model", "clean accuracy", "of each seed", "recall", "false alarms", "rows found", "CPU s"]
    print(table(head, rows), "\n")
    for which in args.threats.split(","):
        parts = [[r for r in mine if r["name"] == name and r["part"] == which and r["n"] == args.num_examples]
                 for name in names]  # fmt: skip
        print(f"`{THREATS[which]}`:\n")
        head = ["model", "before", "what each attack leaves (queries a row)", "after all", "of the detected turned",
                "of each seed", "rejected", "CPU s"]  # fmt: skip
        print(table(head, [_row(own) for own in parts if own]), "\n")
        groups = sorted({group for own in parts for r in own for group in r.get("groups", ())})
        print(table(["detected, then left", *groups], [_by_group(own, groups) for own in parts if own]), "\n")
    print(provenance(seed=f"0 to {args.seeds - 1}", n=f"{args.num_examples} a seed", packages=("lightgbm",)))


def _row(own: list[dict[str, Any]]) -> list[Any]:
    total = sum(r["n"] for r in own)
    stages = [*zip(*(r["after"] for r in own), strict=True)]
    spent = np.cumsum([sum(a[2] for a in stage) / total for stage in stages])
    left = [f"{stage[0][0].partition(':')[0]} {sum(a[1] for a in stage) / total:.1%} ({queries:,.0f})"
            for stage, queries in zip(stages, spent, strict=True)]  # fmt: skip
    after = [r["after"][-1][1] for r in own]
    won = [1 - a / r["clean"] for a, r in zip(after, own, strict=True)]
    return [
        own[0]["name"], f"{sum(r['clean'] for r in own) / total:.1%}", ", ".join(left),
        share_text(wilson(sum(after), total)), f"{np.mean(won):.1%}",
        ", ".join(f"{a / r['n']:.1%}" for a, r in zip(after, own, strict=True)),
        sum(a[3] for r in own for a in r["after"]),
        f"{sum(r['cpu'] for r in own):.0f}",
    ]  # fmt: skip


def _by_group(own: list[dict[str, Any]], groups: list[str]) -> list[str]:
    sums = [np.sum([r["groups"].get(group, [0, 0, 0]) for r in own if "groups" in r], axis=0) for group in groups]
    return [own[0]["name"], *(f"{right} and {left} of {num}" for num, right, left in sums)]


if __name__ == "__main__":
    main()
