"""Many evaluations as one table: runs that differ only in their seed are one row, each row is held against the first.

Evaluations that answer different questions (another threat, other data) stand in tables of their own. No torch.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, get_args

from sparring.results.compare import attacks_of, shared_examples
from sparring.results.findings import Verdict
from sparring.results.read import StoredEvaluation
from sparring.results.schema import Results
from sparring.results.statistics import Change, paired_change

_SEEDS = ("seed", "device")  # of a run's settings: what may differ between the runs of one row


class Spread(NamedTuple):
    """The mean over runs, and their sample standard deviation: None for one run."""

    mean: float
    deviation: float | None


class Against(NamedTuple):
    """The change of the robust accuracy from the first row, paired by example.

    p_value: the largest of McNemar's over the pairs of runs, and 1 where these disagree in direction: small only where
    every run differs from its partner. num_pairs: of runs; n: examples of the smallest. sure: with Bonferroni's
    correction for the rows of the table.
    """

    difference: float
    p_value: float
    num_pairs: int
    n: int
    sure: bool


class TableRow(NamedTuple):
    """One row: runs that differ only in their seed. low, high: the outermost ends of their 95 % intervals.

    seeds: () where the files do not tell them. verdict: the worst; None where one was not checked. passes: forwards and
    2 x backwards of the attacks for each example. against: None for the first row and where nothing could be paired,
    and then `why_not` says why.
    """

    label: str
    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    n: int
    clean: Spread
    robust: Spread
    low: float
    high: float
    certified: Spread | None
    verdict: str | None
    passes: float
    training_seconds: float | None
    attacks: tuple[str, ...]
    against: Against | None
    why_not: str


class Table(NamedTuple):
    """The answers to one question: threat, data and split are the same in all rows."""

    threat: str
    words: str
    data: str
    split: str
    rows: tuple[TableRow, ...]


def tables_of(evaluations: Sequence[StoredEvaluation]) -> tuple[Table, ...]:
    """A table for each question that the evaluations answer, in the order in which these come; ValueError for none.

    `tables_of([read_evaluation("a"), read_evaluation("b")])[0].rows[1].against.p_value` is McNemar's.
    """
    if not evaluations:
        raise ValueError("a table needs at least one evaluation, got none")
    return tuple(_table(asked) for asked in _grouped(evaluations, lambda e: _question(e.results)))


def _table(evaluations: list[StoredEvaluation]) -> Table:
    groups = [part for group in _grouped(evaluations, _but_seed) for part in _without_repeats(group)]
    labels, looks = _labels([group[0].results for group in groups]), len(groups) - 1
    rows = []
    for group, label in zip(groups, labels, strict=True):
        against, why_not = (None, "") if group is groups[0] else _against(groups[0], group, looks)
        rows.append(_row(group, label, against, why_not))
    first = evaluations[0].results
    return Table(first.threat.text, first.threat.words, first.data.name, first.data.split, tuple(rows))


def _row(group: list[StoredEvaluation], label: str, against: Against | None, why_not: str) -> TableRow:
    all_results = [run.results for run in group]
    metrics = [results.metrics for results in all_results]
    robust = [found["robust_accuracy"] for found in metrics]
    certified = [found["certified_accuracy"].value for found in metrics if "certified_accuracy" in found]
    verdicts = [results.verdict for results in all_results]
    checked = [verdict for verdict in verdicts if verdict is not None]
    worst = max(checked, key=get_args(Verdict).index) if len(checked) == len(verdicts) else None
    seconds = [(results.training or {}).get("seconds") for results in all_results]
    known = [float(value) for value in seconds if isinstance(value, int | float)]
    passes = [sum(a.cost.passes(share.n) for a in r.attacks) for r, share in zip(all_results, robust, strict=True)]
    return TableRow(
        label, tuple(run.name for run in group), tuple(seed for r in all_results if (seed := _seed(r)) is not None),
        min(share.n for share in robust), _spread([found["clean_accuracy"].value for found in metrics]),
        _spread([share.value for share in robust]), min(share.low for share in robust),
        max(share.high for share in robust), _spread(certified) if len(certified) == len(group) else None, worst,
        statistics.fmean(passes), statistics.fmean(known) if len(known) == len(group) else None,
        tuple(name for name, _ in attacks_of(all_results[0])), against, why_not,
    )  # fmt: skip


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _against(
    first: list[StoredEvaluation], group: list[StoredEvaluation], num_looks: int
) -> tuple[Against | None, str]:
    """Every run against that of the first row with its seed, or else against its first; or why there is no pair."""
    partners = {_seed(run.results): run for run in reversed(first)}
    changes: list[Change] = []
    for run in group:
        pairs, why_not = shared_examples(partners.get(_seed(run.results), first[0]), run)
        if not pairs:
            return None, why_not
        changes.append(paired_change([one.robust for one, _ in pairs], [two.robust for _, two in pairs]))
    signs = {(change.difference > 0) - (change.difference < 0) for change in changes}
    p_value = max(change.test.p_value for change in changes if change.test) if len(signs) == 1 else 1.0
    mean = statistics.fmean(change.difference for change in changes)
    return Against(mean, p_value, len(changes), min(c.n for c in changes), p_value * num_looks < 0.05), ""


def _question(results: Results) -> str:
    """What was asked, as text that can be compared: not of how many examples."""
    threat, data = results.threat, results.data
    return _plain([threat.text, threat.settings, data.kind, data.name, data.split, data.settings])


def _config(results: Results) -> dict[str, Any]:
    """The settings of the run that trained the model; {} where the file does not tell."""
    found = (results.training or {}).get("config")
    return dict(found) if isinstance(found, dict) else {}


def _seed(results: Results) -> int | None:
    seed = _config(results).get("seed")
    return seed if isinstance(seed, int) else None


def _but_seed(run: StoredEvaluation) -> str:
    """Everything that two runs of one row share. A model of which no training is told stands for itself."""
    results, config = run.results, _config(run.results)
    settings = {key: value for key, value in config.items() if key not in _SEEDS}
    model = results.model and [results.model.name, results.model.parameters, results.model.smooth]
    checkpoint, certificate = (results.training or {}).get("checkpoint"), dict(results.certification)
    told = [settings, checkpoint, model, attacks_of(results), certificate]
    return _plain(told if _seed(results) is not None else [id(run)])


def _without_repeats(group: list[StoredEvaluation]) -> list[list[StoredEvaluation]]:
    """The group itself; or each run alone where a seed comes twice, for then they differ in something else."""
    seeds = [_seed(run.results) for run in group]
    return [group] if len({*seeds}) == len(group) else [[run] for run in group]


def _labels(models: Sequence[Results]) -> list[str]:
    """The recipe, and the settings in which the rows differ; where no training is told, the name."""
    configs = [_config(results) for results in models]
    keys = dict.fromkeys(key for config in configs for key in config if key not in (*_SEEDS, "recipe"))
    trained = [config for config in configs if config]
    vary = [key for key in keys if len({_plain(config.get(key)) for config in trained}) > 1]
    found = []
    for results, config in zip(models, configs, strict=True):
        told = [f"{key}={config[key]}" for key in vary if key in config]
        found.append(" ".join([str(config.get("recipe", "?")), *told]) if config else results.name)
    twice = {label for label in found if found.count(label) > 1}
    return [f"{label} ({r.name})" if label in twice else label for label, r in zip(found, models, strict=True)]


def _plain(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _grouped(runs: Iterable[StoredEvaluation], key: Callable[[StoredEvaluation], str]) -> list[list[StoredEvaluation]]:
    """Runs of one key together, in the order in which the keys come."""
    found: dict[str, list[StoredEvaluation]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return list(found.values())
