"""A spam filter, evaded by misspelt and replaced words, and the same filter hardened.

python examples/spam.py sms_spam,length=60                    the UCI messages below $SPARRING_DATA, a few minutes
python examples/spam.py text:mine.csv,text=message,label=kind with your own, the class to be found called spam
python examples/spam.py                                       messages made up here, seconds

The spammer may change every word of a message that has a substitute, and knows the filter. Words of four letters or
more can be misspelt in six ways (a letter swapped, dropped, doubled, a neighbouring key, a lookalike, an invisible
one); words of a list may become one of eight neighbours. The filter learns on messages of the training part alone.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparring import load_data, measure, train
from sparring.core.batches import Batches
from sparring.modalities import find
from sparring.training.supervised import read_class_weights

KIND = find("text")
Numbers = dict[str, float]


def make_up(folder: Path, count: int = 240) -> str:
    """Messages that nobody wrote, with a list of substitutes; returns what names them as data."""
    draw = random.Random(0)
    spam = ["claim your prize now", "free cash for the winner now", "urgent offer: act now", "credit for you, call now"]
    ham = ["got a lovely gift from mum", "spare money at home", "quick lunch with the team", "a deal, see you at home"]
    lines = ["text\tlabel"]
    for i in range(count):
        phrases = draw.sample(ham if i % 4 else spam, 2)
        lines.append(f"{phrases[0]} {draw.randrange(1000)} {phrases[1]}\t{'ham' if i % 4 else 'spam'}")
    (folder / "messages.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    listed = {"prize": ["gift"], "free": ["spare"], "cash": ["money"], "urgent": ["quick"], "offer": ["deal"],
              "claim": ["got"], "credit": ["money"], "winner": ["team"], "call": ["see"]}  # fmt: skip
    (folder / "list.json").write_text(json.dumps(listed), encoding="utf-8")
    return f'text:{folder / "messages.tsv"},list="{folder / "list.json"}"'


def threats(data: Any, folder: Path) -> dict[str, Any]:
    """What the spammer may do: misspell, replace by the data's list, or either with every word."""
    alone = {"misspelt": KIND.make_threat("characters:1.0,k=6", data)}
    if not data.substitutes:
        return alone
    alone["replaced"] = KIND.make_threat("words:1.0,k=8", data)
    either: dict[str, list[str]] = {}
    for threat in alone.values():
        words = threat.lexicon.words
        for number in threat.allowed.any(1).nonzero()[:, 0].tolist():
            others = threat.table[number][threat.allowed[number]].tolist()
            either.setdefault(words[number], []).extend(words[other] for other in others)
    (folder / "either.json").write_text(json.dumps(either), encoding="utf-8")
    return {**alone, "both": KIND.make_threat(f'words:1.0,k=14,list="{folder / "either.json"}"', data)}


def learned(data: Any, recipe: Any, seed: int = 0) -> torch.nn.Module:
    """A bag of words, trained so that the rare class counts as much as the other: 8 epochs, more of few messages."""
    model = KIND.make_model("bag", seed, data.given)
    recipe = replace(recipe, class_weights=read_class_weights("balanced", data.y_train, data.class_names))
    batches = Batches(data.x_train, data.y_train, 64, seed=seed, shuffle=True)
    epochs, optimizer = max(8, 10_000 // len(data.y_train)), torch.optim.Adam(model.parameters(), 2e-3)
    train(model, batches, recipe, optimizer, num_epochs=epochs, seed=seed)
    return model.eval()


def judged(model: torch.nn.Module, data: Any, against: dict[str, Any]) -> Numbers:
    """Recall of spam, clean and under each threat (gradients and searches), and the share of ham taken for it."""
    spam = data.class_names.index("spam")
    rows = {name: (data.y_test == spam) == found for name, found in (("spam", True), ("ham", False))}
    batches = {name: data.batches("test", rows=row.nonzero()[:, 0]) for name, row in rows.items()}
    with torch.no_grad():
        alarms = sum(int((model(x).argmax(1) == spam).sum()) for x, _ in batches["ham"])
    numbers = {"false alarms": alarms / int(rows["ham"].sum())}  # on messages as they came: nobody attacks for ham
    for name, threat in against.items():
        found = measure(model, batches["spam"], threat, KIND.make_plan("full", threat), curve=())
        numbers |= {"recall": found.clean.value, name: found.robust.value}
    return numbers


def main(source: str | None = None) -> dict[str, Numbers]:
    """Prints what each filter finds; returns the same."""
    with tempfile.TemporaryDirectory() as folder:
        data: Any = load_data(source or make_up(Path(folder)))
        if "spam" not in data.class_names:
            raise SystemExit(f"the classes are {', '.join(data.class_names)}; expected one that is called spam")
        against = threats(data, Path(folder))
        worst = list(against.values())[-1]
        print(f"{len(data.y_train)} messages to learn from, {len(data.y_test)} to judge on.\n{worst.describe()}")
        found = {}
        for name, recipe in (("plain", "standard"), ("hardened", "hull")):
            model = learned(data, KIND.named_recipe(recipe)(worst))
            found[name] = judged(model, data, against)
            print(f"{name:>8}: " + ", ".join(f"{what} {100 * value:.1f} %" for what, value in found[name].items()))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:2])
