"""A made-up corpus of short reviews with a list of substitutes, as files and as a data set."""

from __future__ import annotations

import csv
import random
from pathlib import Path

import torch
from torch import nn

from sparring.modalities.text.data import Texts, read_text

GOOD, BAD = ["lovely", "great", "superb", "charming", "witty"], ["awful", "dull", "boring", "weak", "stale"]
LISTED = {
    "lovely": "nice sweet", "great": "big nice", "superb": "fine nice", "charming": "cute sweet",
    "witty": "smart clever",
    "awful": "terrible grim", "dull": "dim grey", "boring": "slow grey", "weak": "soft feeble", "stale": "old dim",
}  # fmt: skip


def write(folder: Path, count: int = 160) -> str:
    """A CSV file and a list of substitutes; returns what --data takes."""
    draw = random.Random(0)
    with (folder / "reviews.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["review", "stars"])
        for i in range(count):
            first, second = draw.sample((BAD, GOOD)[i % 2], 2)
            thing = draw.choice(["film", "plot", "cast"])
            writer.writerow(
                [f"The {thing} was {first}, <b>{second}</b> & {draw.randrange(count)}!", ("neg", "pos")[i % 2]]
            )
    (folder / "list.tsv").write_text(
        "".join(f"{word}\t{others}\n" for word, others in LISTED.items()), encoding="utf-8"
    )
    return f"text:{folder / 'reviews.csv'},text=review,label=stars,list={folder / 'list.tsv'},least=3"


def tiny(folder: Path) -> Texts:
    """The data set of these files."""
    write(folder)
    return read_text(str(folder / "reviews.csv"), text="review", label="stars", list=str(folder / "list.tsv"), least=3)


def learned(network: nn.Module, data: Texts, steps: int = 60) -> nn.Module:
    """The network after a few steps on the training texts, in eval mode."""
    optimizer = torch.optim.Adam(network.parameters(), 0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(data.x_train), data.y_train).backward()
        optimizer.step()
    return network.eval()
