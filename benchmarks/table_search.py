"""Searches among rows of a table: rows scored per CPU second with repair, and beside pymoo's NSGA-II at equal queries.

An undefended MLP and LightGBM (package `lightgbm`) on the phishing addresses, one split. NSGA-II (package `pymoo`, for
instance `pip install pymoo lightgbm`) searches each row alone, from the clean row and mutated copies of it; objectives
are margin and distance as in MoEvA2, broken rules and the radius are its constraint, and whole numbers are rounded.
plain: no repair, as pymoo knows none. repaired: every candidate is realized as ours are. A row counts as turned where a
candidate is lawful by the checker, within the radius, and fools. Needs $SPARRING_DATA/phishing_urls.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.core.problem import Problem
from pymoo.optimize import minimize
from torch import Tensor

from common import provenance, table
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import take
from sparring.modalities.tables.rules import penalty
from sparring.modalities.tables.search import evolve, greedy_columns
from tables import TABLE, THREATS, data_of, trained

POPULATION, GENERATIONS = 32, 60


class Timed:
    """A model that counts rows and the CPU seconds it takes itself; nothing turns one that is `firm`."""

    def __init__(self, model: Any, firm: bool = False) -> None:
        self.model, self.rows, self.seconds, self.firm = model, 0, 0.0, firm

    @torch.no_grad()
    def __call__(self, x: Any) -> Tensor:
        started = time.process_time()
        out = self.model(x)
        self.seconds += time.process_time() - started
        self.rows += len(out)
        return out + torch.tensor([-1e6, 0.0]) if self.firm else out


class OneRow(Problem):  # type: ignore[misc]
    """The changes of one row in units, as pymoo asks for it: margin and distance, and by how much rules are broken."""

    def __init__(self, model: Any, threat: Any, x: Any, repaired: bool) -> None:
        low, high = (end[0].numpy() for end in threat.room(x))
        self.free = np.flatnonzero(high > low)
        radius = float(threat.radius)
        super().__init__(
            n_var=len(self.free), n_obj=2, n_ieq_constr=1,
            xl=np.maximum(low, -radius)[self.free], xu=np.minimum(high, radius)[self.free],
        )  # fmt: skip
        self.model, self.threat, self.x, self.repaired, self.turned = model, threat, x, repaired, False

    def _evaluate(self, x: np.ndarray, out: dict[str, Any], *args: Any, **options: Any) -> None:
        z = torch.zeros(len(x), len(self.x["rows"][0]), dtype=torch.float64)
        z[:, self.free] = torch.from_numpy(x)
        near = take(self.x, torch.zeros(len(x), dtype=torch.long))
        if self.repaired:
            real = self.threat.realize(near, self.threat.project(near, z))
        else:
            real = {**near, "rows": self.threat._snapped(near, z)}
        score = margin.score(self.model(real), torch.ones(len(x), dtype=torch.long))
        length = self.threat.size(near, self.threat.measured(near, real["rows"]))
        broken = sum(penalty(rule, real["rows"]).numpy() for rule in self.threat.schema.rules)
        over = (length - self.threat.radius).clamp_min(0).numpy()
        self.turned |= bool(((score > 0) & self.threat.valid(near, real)).any())
        out["F"], out["G"] = np.stack([-score.numpy(), length.numpy()], 1), (broken + over - 1e-4)[:, None]


def by_pymoo(model: Any, threat: Any, x: Any, seed: int, repaired: bool) -> int:
    """How many rows NSGA-II turns, one after the other."""
    turned = 0
    for i in range(len(x["rows"])):
        problem = OneRow(model, threat, take(x, torch.tensor([i])), repaired)
        draw = np.random.default_rng(1000 * seed + i)
        start = np.zeros((POPULATION, problem.n_var))
        for member in start[1:]:  # the clean row, and copies with one to four columns drawn anew
            some = draw.choice(problem.n_var, draw.integers(1, 5), replace=False)
            member[some] = draw.uniform(problem.xl[some], problem.xu[some])
        minimize(problem, NSGA2(pop_size=POPULATION, sampling=start), ("n_gen", GENERATIONS), seed=seed)
        turned += problem.turned
    return turned


def speeds(threat: Any, models: dict[str, Any], data: Any, seed: int) -> list[list[str]]:
    """Rows scored with repair in a CPU second, where 250 rows stand to the end."""
    rows, found = (data.y_test == 1).nonzero()[:250, 0], []
    x, y, noise = take(data.x_test, rows), data.y_test[rows], Noise.make(seed, "speed", rows)
    for name, model in models.items():
        for how, search in (("evolve", evolve(threat, generations=10)), ("greedy", greedy_columns(threat, rounds=2))):
            timed, started = Timed(model, firm=True), time.process_time()
            search(timed, x, y, noise=noise)
            seconds = time.process_time() - started
            found.append([f"{name}, {how}", f"{timed.rows / seconds:,.0f}", f"{timed.seconds / seconds:.0%}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--num-examples", type=int, default=100, help="detected rows beside pymoo")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    data, lines = data_of("row", args.seed)[0], []
    threat = TABLE.make_threat(THREATS["l2"], data)
    models = {name: trained(name, "row", "l2", args.seed)[0] for name in ("standard", "trees")}
    head = ["model, search", "rows scored a CPU second", "of it in the model"]
    print(table(head, speeds(threat, models, data, args.seed)), "\n", flush=True)
    for name, model in models.items():
        with torch.no_grad():
            seen = (model(data.x_test).argmax(1) == 1) & (data.y_test == 1)
        rows = seen.nonzero()[: args.num_examples, 0]
        x, y, noise = take(data.x_test, rows), data.y_test[rows], Noise.make(args.seed, "search", rows)
        for how in ("evolve", "greedy", "NSGA-II, plain", "NSGA-II, repaired"):
            timed, started = Timed(model), time.process_time()
            if how.startswith("NSGA"):
                turned = by_pymoo(timed, threat, x, args.seed, how.endswith("repaired"))
            else:
                search = evolve(threat) if how == "evolve" else greedy_columns(threat)
                turned = int(search(timed, x, y, noise=noise).reached.sum())
            seconds = time.process_time() - started
            lines.append([
                f"{name}, {how}", f"{turned} of {len(rows)}", f"{timed.rows / len(rows):.0f}",
                f"{timed.rows / seconds:,.0f}", f"{timed.seconds / seconds:.0%}", f"{seconds:.1f}",
            ])  # fmt: skip
            print(lines[-1], flush=True)
    head = ["model, search", "turned", "queries a row", *head[1:], "CPU s"]
    print("\n" + table(head, lines), "\n")
    print(provenance(seed=args.seed, n=args.num_examples, packages=("pymoo", "lightgbm")))


if __name__ == "__main__":
    main()
