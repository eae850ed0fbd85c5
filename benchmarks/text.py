"""Words of film reviews replaced: plain, hardened and certified training on SST-2, all 872 validation sentences.

Every word that is no stop word may become one of its 8 nearest counter-fitted neighbours, all of them at once. Robust
means: right under a gradient attack on two losses, greedy search by two rankings and full search (the plan `full`).
--task ag_news and thucnews do so with 1,000 test texts, drawn evenly over the classes; the headlines of thucnews with
--list FILE, a list of one's own (benchmarks/homophones.py makes one). --task sms_spam misspells the words of messages.
Certified: by interval bounds; attacks are run on certified sentences all the same, and none may fall.

--choose trains with other settings and judges on the held-out training sentences instead: that is where the settings in
RUNS come from. The 872 have chosen nothing, and the 1,821 test sentences are not touched.

Needs $SPARRING_DATA with sst2/ and words/ (counter-fitted neighbours, GloVe). CPU seconds are the process's own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from common import Lines, percent, provenance, table
from sparring.app.settings import TrainingSettings
from sparring.app.train_run import load, settings_for, start_run
from sparring.core.batches import Batches, draw, hold_out
from sparring.core.types import take
from sparring.evaluation.measure import measure
from sparring.modalities import find, load_data
from sparring.modalities.text.certify import words_margin

TASKS = {
    "sst2": ("sst2,vectors=glove", "words:1.0,k=8,list=counterfitted"),
    "ag_news": ("ag_news,vectors=glove,length=48", "words:1.0,k=8,list=counterfitted"),
    "sms_spam": ("sms_spam,length=60", "characters:1.0,k=8"),
    "thucnews": ("thucnews,length=32,list={list}", "words:1.0,k=8"),
}
RUNS = {
    "plain": {"recipe": "standard", "epochs": 8},
    "hull": {"recipe": "hull", "epochs": 6},
    "ibp": {"recipe": "ibp:weight=0.3", "epochs": 8, "averaging": 0.995},
    "ibp 12": {"recipe": "ibp:weight=0.3,ramp=0.1..0.5", "epochs": 12},
}
CHOICES: dict[str, dict[str, Any]] = {
    **RUNS,
    "plain 5": {"recipe": "standard", "epochs": 5},
    "hull beta 0.5": {"recipe": "hull:beta=0.5", "epochs": 6},
    "hull beta 2": {"recipe": "hull:beta=2", "epochs": 6},
    "ibp 0.15": {"recipe": "ibp:weight=0.15", "epochs": 8},
    "ibp 0.5": {"recipe": "ibp:weight=0.5", "epochs": 8},
    "ibp 0.35": {"recipe": "ibp:weight=0.35", "epochs": 8},
    "plain averaged": {"recipe": "standard", "epochs": 8, "averaging": 0.995},
    "ibp 0.25": {"recipe": "ibp:weight=0.25", "epochs": 8},
}


def settings(task: str, model: str, options: dict[str, Any], seed: int) -> TrainingSettings:
    """The settings of one run."""
    data, threat = TASKS[task]
    return settings_for({"data": data, "threat": threat, "model": model, "seed": seed, "device": "cpu", **options})


def judge(task: str, model: Any, batches: Batches, plan: str) -> dict[str, Any]:
    """Counts and CPU seconds of a model on some sentences."""
    kind, data = find("text"), load_data(TASKS[task][0])
    threat = kind.make_threat(TASKS[task][1], data)
    started = time.process_time()
    found = measure(model, batches, threat, kind.make_plan(plan, threat), curve=())
    seconds = time.process_time() - started
    x, y, robust = batches.x, batches.y, found.table["robust"]
    certified = words_margin(model, x, y, threat) > 0
    return {
        "n": len(y), "clean": found.clean.count, "robust": found.robust.count, "certified": int(certified.sum()),
        "contradicted": int((certified & ~robust).sum()), "attack_seconds": seconds,
        "broke": {attack.name: attack.broke for attack in found.attacks}, "per_class": found.per_class,
    }  # fmt: skip


def run(task: str, name: str, model: str, options: dict[str, Any], seed: int, choose: bool) -> dict[str, Any]:
    """Trains into a folder that is thrown away, and judges the best epoch."""
    data = load_data(TASKS[task][0])
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        start_run(settings(task, model, options, seed), Path(folder) / "run")
        seconds = time.process_time() - started
        network = load(Path(folder) / "run")
    rows = draw(data.y_test, 1000, 0, balanced=True) if task in ("ag_news", "thucnews") else None
    batches = data.batches("test", 250, rows=rows)
    if choose:
        _, held = hold_out(data.y_train, (len(data.y_train) // 10) / len(data.y_train), seed=seed)
        batches = Batches(take(data.x_train, held), data.y_train[held], 250)
    found = judge(task, network, batches, "fast" if choose else "full")
    about = {"task": task, "name": name, "model": model, "seed": seed, "choose": choose}
    return {**about, "train_seconds": seconds, **options, **found}


def main() -> None:
    """Runs what is not in the file yet, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--task", choices=tuple(TASKS), default="sst2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--models", default="bag,cnn-text")
    parser.add_argument("--runs", default="", help="names, with commas; all unless given")
    parser.add_argument("--choose", action="store_true", help="on held-out training sentences")
    parser.add_argument("--list", type=Path, help="of substitutes, for thucnews")
    parser.add_argument("--out", type=Path, default=Path("text.jsonl"))
    asked = parser.parse_args()
    TASKS["thucnews"] = (TASKS["thucnews"][0].format(list=asked.list), TASKS["thucnews"][1])
    torch.set_num_threads(1)
    lines, offered = Lines(asked.out), CHOICES if asked.choose else RUNS
    names = [name for name in asked.runs.split(",") if name] or list(offered)
    for seed in range(asked.seeds):
        for model in asked.models.split(","):
            for name in names:
                key = {"task": asked.task, "name": name, "model": model, "seed": seed, "choose": asked.choose}
                if not lines.find(**key):
                    lines.add(run(asked.task, name, model, offered[name], seed, asked.choose))
                    print(lines.records[-1], flush=True)
    print(report([r for r in lines.records if r["choose"] == asked.choose and r["task"] == asked.task]))


def report(records: list[dict[str, Any]]) -> str:
    """A row for each network and way to train: the mean over seeds, and each seed's robust accuracy."""
    head = ("network, training", "clean %", "robust %", "by seed", "certified %", "training, CPU s", "attack, CPU s")
    rows, kinds = [], dict.fromkeys((r["model"], r["name"], r["recipe"], r["epochs"]) for r in records)
    for kind in kinds:
        own = [r for r in records if (r["model"], r["name"], r["recipe"], r["epochs"]) == kind]
        share = {key: [r[key] / r["n"] for r in own] for key in ("clean", "robust", "certified")}
        mean = {key: percent(sum(values) / len(own)) for key, values in share.items()}
        seconds = [sum(r[key] for r in own) / len(own) for key in ("train_seconds", "attack_seconds")]
        rows.append((
            f"{kind[0]}, {kind[2]}, {kind[3]} epochs", mean["clean"], mean["robust"],
            " ".join(percent(value) for value in share["robust"]), mean["certified"], *(f"{s:.0f}" for s in seconds),
        ))  # fmt: skip
    wrong = sum(r["contradicted"] for r in records)
    seeds, n = sorted({r["seed"] for r in records}), sorted({r["n"] for r in records})
    told = f"Certified sentences that an attack broke: {wrong}.{by_class(records)}"
    return f"{table(head, rows)}\n\n{told}\n\n{provenance(seed=seeds, n=n)}"


def by_class(records: list[dict[str, Any]]) -> str:
    """Of two classes that differ in number: what is found of the rarer one, and what of the other is taken for it."""
    if records[0]["task"] != "sms_spam":
        return ""
    lines = [""]
    for r in records:
        ham, spam = r["per_class"]
        found, alarms = (percent(v) for v in (spam["clean"], 1 - ham["clean"]))
        left, provoked = (percent(v) for v in (spam["robust"], 1 - ham["robust"]))
        lines.append(
            f"{r['recipe']}, seed {r['seed']}: of {spam['n']} spam found {found}, attacked {left}; of {ham['n']} ham "
            f"false alarms {alarms}, attacked {provoked}."
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
