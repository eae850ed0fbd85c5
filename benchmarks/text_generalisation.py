"""Does training on moved or replaced words raise the CLEAN accuracy on texts, against plain training at equal passes?

A bag of words on GloVe 50, SST-2 (judged on the 872 validation and 1,821 test sentences together) and AG News (7,600
test texts). A tenth of the training texts chooses the epoch, for every run alike; rate, batches and the order of texts
are the same within a seed. A pass is a forward and a backward pass over all training texts. Each way to train is
compared with plain training of at least as many passes, example by example (McNemar, all seeds pooled: too sure of
itself, since examples recur) and seed by seed (paired t-test, 4 degrees of freedom at 5 seeds).

`few` keeps a tenth of the labels: virtual adversarial training then reads the other texts without them.
--choose judges on the held-out training texts instead, at several radii.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from common import Lines, percent, provenance, table
from sparring.attacks.loop import Attack
from sparring.attacks.starts import uniform
from sparring.attacks.steps import Ascent
from sparring.core.batches import Batches, hold_out
from sparring.core.noise import Noise
from sparring.core.types import size, take
from sparring.modalities import find, load_data
from sparring.modalities.text.recipes import Beside
from sparring.results.statistics import mcnemar
from sparring.training.recipes import standard, trades

KIND = find("text")
DATA = {"sst2": "sst2,vectors=glove,length=50,list=counterfitted", "ag_news": "ag_news,vectors=glove,length=48"}
EPOCHS = {"sst2": 6, "ag_news": 4, "sst2 few": 25, "ag_news few": 20}
RADIUS = {"fgm": 0.06, "random": 0.06, "freelb": 0.06, "vat": 0.06}
FEW_RADIUS = 0.2
PASSES = {"plain": 1, "plain x2": 2, "plain x4": 4, "fgm": 3, "random": 2, "freelb": 3, "vat": 4, "substituted": 4}
AGAINST = {"fgm": "plain x4", "random": "plain x2", "freelb": "plain x4", "vat": "plain x4", "substituted": "plain x4"}
FEW = {"plain": 1, "plain x10": 10, "vat": 10, "random": 10}
FEW_AGAINST = {"vat": "plain x10", "random": "plain x10"}


class Parts(NamedTuple):
    """Training texts with labels, without, held out, and what is judged."""

    labelled: tuple[Any, Tensor]
    others: Any
    held: tuple[Any, Tensor]
    judged: tuple[Any, Tensor]


def parts_of(task: str, data: Any, seed: int, choose: bool) -> Parts:
    """The split of a seed. On SST-2 the test sentences are judged beside the validation sentences."""
    kept, held = hold_out(data.y_train, 0.1, seed)
    few = hold_out(data.y_train[kept], 0.1, seed)[1] if "few" in task else torch.arange(len(kept))
    labelled = kept[few]
    judged = [(data.x_test, data.y_test)]
    if task.startswith("sst2") and not choose:
        other = load_data(DATA["sst2"] + ",test=test")
        known = data.facts["vocabulary"]  # the numbers of words that a network knows are the same in both
        assert known == other.facts["vocabulary"] and data.lexicon.words[:known] == other.lexicon.words[:known]
        judged.append((other.x_test, other.y_test))
    if choose:
        judged = [(take(data.x_train, held), data.y_train[held])]
    x = {name: torch.cat([part[0][name] for part in judged]) for name in ("ids", "mask")}
    y = torch.cat([part[1] for part in judged])
    return Parts(
        (take(data.x_train, labelled), data.y_train[labelled]), take(data.x_train, kept),
        (take(data.x_train, held), data.y_train[held]), (x, y),
    )  # fmt: skip


def short(x: Any) -> Any:
    """Without the columns that are padding in all rows."""
    longest = int(x["mask"].sum(1).max())
    return {name: tensor[:, :longest] for name, tensor in x.items()}


def right(model: Any, part: tuple[Any, Tensor]) -> Tensor:
    """(N,) bool."""
    model.eval()
    with torch.no_grad():
        return torch.cat([model(short(x)).argmax(1) == y for x, y in Batches(*part, 500)])


def recipe_of(task: str, name: str, data: Any, model: Any, radius: float | None) -> Any:
    """The loss of a way to train."""
    if name.startswith("plain"):
        return standard()
    if name == "substituted":
        return KIND.named_recipe("substituted")(KIND.make_threat("words:1.0,k=8,list=counterfitted", data))
    radius = radius or (FEW_RADIUS if "few" in task else RADIUS[name])
    ball = KIND.make_threat(f"embedding:{radius:g}", data, model)
    if name == "random":
        return Beside(attack=Attack(threat=ball, rule=Ascent(1.0), num_steps=0, start=uniform, keep="last"))
    if name == "vat":
        return trades(ball, beta=1.0, num_steps=1, step=1.0, start_scale=0.01)
    return KIND.named_recipe(name)(ball)


def smoothed(recipe: Any, others: Any, seed: int, noises: Callable[[int], Noise]) -> Any:
    """Cross-entropy on labelled texts, and the KL between 128 other texts and what the recipe's attack makes of them.

    The attack of `Beside` moves at random and that of `Trades` along the KL: in both the label plays no part.
    """
    draw = torch.Generator().manual_seed(seed)

    def loss(model: Any, x: Any, y: Tensor, *, noise: Noise) -> Tensor:
        some = short(take(others, torch.randint(size(others), (128,), generator=draw)))
        moved = recipe.craft(model, some, torch.zeros(128, dtype=torch.int64), noise=noises(128))
        log_p, log_q = model(some).log_softmax(1), model(moved).log_softmax(1)
        return F.cross_entropy(model(x), y) + (log_p.exp() * (log_p - log_q)).sum(1).mean()

    return loss


def trained(task: str, name: str, data: Any, parts: Parts, seed: int, radius: float | None) -> tuple[Any, float]:
    """The weights of the epoch that is best on the held-out texts, and CPU seconds."""
    model: Any = KIND.make_model("bag", seed, data.given)
    data.start(model)
    recipe = recipe_of(task, name, data, model, radius)
    counts = iter(range(10**9))
    noises = lambda num: Noise.make(seed, f"generalisation/{next(counts)}", torch.arange(num))  # noqa: E731
    if "few" in task and not name.startswith("plain"):
        recipe = smoothed(recipe, parts.others, seed, noises)
    model.words.sparse = True
    rest = [weight for label, weight in model.named_parameters() if label != "words.weight"]
    optimizers = torch.optim.SparseAdam([model.words.weight], 2e-3), torch.optim.Adam(rest, 2e-3)
    epochs = EPOCHS[task] * (int(name.split("x")[1]) if name.startswith("plain x") else 1)
    batches = Batches(*parts.labelled, 64, seed=seed, shuffle=True)
    fall = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, epochs * len(batches)) for o in optimizers]
    best, kept, started = -1, None, time.process_time()
    for epoch in range(epochs):
        batches.set_epoch(epoch)
        model.train()
        for x, y in batches:
            loss = recipe(model, short(x), y, noise=noises(len(y)))
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for part in (*optimizers, *fall):
                part.step()
        if (found := int(right(model, parts.held).sum())) >= best:
            best, kept = found, copy.deepcopy(model.state_dict())
    model.load_state_dict(kept)
    return model, time.process_time() - started


def report(task: str, records: list[dict[str, Any]]) -> str:
    """A row for each way to train, and the paired tests."""
    passes, against = (FEW, FEW_AGAINST) if "few" in task else (PASSES, AGAINST)
    rows = []
    for name in [name for name in passes if any(r["name"] == name for r in records)]:
        own = {r["seed"]: np.array(r["right"], bool) for r in records if r["name"] == name}
        cells = [name, passes[name], percent(float(np.mean([v.mean() for v in own.values()])), 2)]
        for base_name in dict.fromkeys(("plain", against.get(name, "plain"))):
            base = {r["seed"]: np.array(r["right"], bool) for r in records if r["name"] == base_name}
            seeds = sorted(own.keys() & base.keys())
            if name == base_name or name not in against or not seeds:
                continue
            gains = [100 * float(own[s].mean() - base[s].mean()) for s in seeds]
            pooled = mcnemar(*(torch.from_numpy(np.concatenate([v[s] for s in seeds])) for v in (base, own)))
            t = stats.ttest_1samp(gains, 0).pvalue if len(gains) > 1 else float("nan")
            cells.append(
                f"{np.mean(gains):+.2f} ({' '.join(f'{g:+.2f}' for g in gains)}), p {pooled.p_value:.2g}, t {t:.2g}"
            )
        rows.append([*cells, *[""] * (5 - len(cells))])
    return table(("training", "passes", "clean", "against plain", "against equal passes"), rows)


def main() -> None:
    """Runs what is not in the file yet, and prints a table for each task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--tasks", default="sst2,ag_news,ag_news few,sst2 few")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("text_generalisation.jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines = Lines(asked.out)
    for task in asked.tasks.split(","):
        data: Any = load_data(DATA[task.split()[0]])
        names = list(FEW if "few" in task else PASSES)
        radii: list[float | None] = [0.06, 0.2] if asked.choose else [None]
        for seed in range(asked.seeds):
            parts = parts_of(task, data, seed, asked.choose)
            for name in names:
                for radius in radii if name in AGAINST and name in RADIUS else [None]:
                    key = {"task": task, "name": name, "seed": seed, "radius": radius, "choose": asked.choose}
                    if lines.find(**key):
                        continue
                    model, seconds = trained(task, name, data, parts, seed, radius)
                    found = right(model, parts.judged)
                    lines.add({**key, "n": len(found), "seconds": seconds, "right": found.int().tolist()})
                    print(key, percent(float(found.float().mean()), 2), f"{seconds:.0f} s", flush=True)
        if not asked.choose:
            own = [r for r in lines.records if r["task"] == task and not r["choose"]]
            print(f"\n{task}\n\n{report(task, own)}\n")
    print(provenance(seed=f"0 to {asked.seeds - 1}", n=sorted({r["n"] for r in lines.records}), packages=("scipy",)))


if __name__ == "__main__":
    main()
