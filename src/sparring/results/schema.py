"""What a results file holds, `sparring.results/2`, as records that check themselves; and a row of the table beside it.

`json_schema` gives the same for other languages: docs/results-schema.json. What the keys mean: docs/results-schema.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, model_validator
from pydantic.dataclasses import dataclass

from sparring.results.findings import Finding, Verdict, verdict

FORMAT: Literal["sparring.results/2"] = "sparring.results/2"


@dataclass(frozen=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class Metric:
    """A measured number with its interval [low, high], from n examples.

    count: for a share of examples, how many of the n (then value = count / n); None for any other number.
    """

    value: float
    low: float
    high: float
    n: int
    count: int | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if self.n < 1 or self.low > self.high:
            raise ValueError(f"expected n >= 1 and low <= high, got n {self.n}, low {self.low}, high {self.high}")
        count = self.count
        if count is not None and not (0 <= count <= self.n and abs(self.value - count / self.n) <= 1e-9):
            raise ValueError(f"expected value = count / n in [0, 1], got {self.value}, {count} of {self.n}")


class Row(NamedTuple):
    """One example: a row of examples.csv. `correct`: right before any attack; `robust`: and after all of them.

    broken_by: name of the attack that turned it, "" for none; then what came of it is None. margin_left: share of the
    clean margin that is left, in [0, 1]. certified: None when no certificate was tried.
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody wants here
    label: int
    clean_prediction: int
    clean_confidence: float
    correct: bool
    robust: bool
    broken_by: str
    adversarial_prediction: int | None
    adversarial_confidence: float | None
    size: float | None
    margin_left: float
    certified: bool | None


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True)


class CostEntry(_Entry):
    """Sample-passes, and seconds of work."""

    forwards: NonNegativeInt
    backwards: NonNegativeInt
    seconds: NonNegativeFloat

    def passes(self, n: int) -> float:
        """Forwards + 2 x backwards for each of n examples."""
        return (self.forwards + 2 * self.backwards) / n


class ModelEntry(_Entry):
    """What was measured: architecture, number of weights, weights file and its SHA-256, noise of a smoothed model."""

    name: str
    parameters: int | None = None
    weights: str | None = None
    sha256: str | None = None
    smooth: float | None = None


class DataEntry(_Entry):
    """The examples: kind of input, name, split, shape of one input (by name where it has several), how it was read."""

    kind: str
    name: str
    split: str
    shape: tuple[int, ...] | dict[str, tuple[int, ...]] = ()
    class_names: tuple[str, ...] = ()
    settings: Mapping[str, Any] = {}

    def class_name(self, label: int) -> str:
        """What a label means."""
        return self.class_names[label] if 0 <= label < len(self.class_names) else f"class {label}"


class ThreatEntry(_Entry):
    """What may be changed: text form, a sentence in words, radius (None: per example, or without a bound), record."""

    text: str
    words: str
    radius: float | None = None
    settings: Any = None


class AttackEntry(_Entry):
    """What one attack of the plan did."""

    name: str
    settings: Any = None
    margin_at_most: float | None = None
    ran_on: NonNegativeInt
    skipped: NonNegativeInt
    broke: NonNegativeInt
    robust_after: NonNegativeFloat
    rejected: Mapping[str, NonNegativeInt]
    cost: CostEntry


class CurvePoint(_Entry):
    """Robust accuracy at one radius."""

    radius: NonNegativeFloat
    robust_accuracy: Metric


class ClassEntry(_Entry):
    """Shares of the n examples of one class."""

    label: int
    name: str
    n: int
    clean: float
    robust: float


class Results(_Entry):
    """The content of results.json. Metrics go by name; `clean_accuracy` and `robust_accuracy` are always there.

    Raises ValidationError (a ValueError) where parts contradict one another: see `_agrees`.
    """

    format: Literal["sparring.results/2"] = Field(FORMAT, alias="schema")
    name: str
    version: str = ""
    created: str | None = None
    command: str | None = None
    model: ModelEntry | None = None
    data: DataEntry
    threat: ThreatEntry
    seed: int = 0
    verdict: Verdict | None = None
    sanity: Mapping[str, float] | None = None
    metrics: Mapping[str, Metric]
    certification: Mapping[str, Any] = {}
    attacks: tuple[AttackEntry, ...] = ()
    curve: tuple[CurvePoint, ...] = ()
    curve_attacks: tuple[str, ...] = ()
    per_class: tuple[ClassEntry, ...] = ()
    findings: tuple[Finding, ...] = ()
    cost: CostEntry | None = None
    training: Mapping[str, Any] | None = None
    environment: Mapping[str, Any] = {}

    @model_validator(mode="after")
    def _agrees(self) -> Results:
        """Shares nest and are of the same examples, attacks account for what fell, the verdict fits the findings."""
        names = ("clean_accuracy", "robust_accuracy", "certified_accuracy")
        shares = {name: self.metrics[name] for name in names if name in self.metrics}
        counts = [share.count for share in shares.values() if share.count is not None]
        if not {*names[:2]} <= shares.keys() or len(counts) < len(shares):
            raise ValueError(f"metrics need clean_accuracy and robust_accuracy with a count, got {', '.join(shares)}")
        if len({share.n for share in shares.values()}) > 1:
            all_n = " and ".join(str(share.n) for share in shares.values())
            raise ValueError(f"expected {', '.join(shares)} of the same examples, got n {all_n}")
        if counts != sorted(counts, reverse=True):
            raise ValueError(f"expected clean >= robust >= certified accuracy, got counts {counts}")
        broke = sum(attack.broke for attack in self.attacks)
        if self.attacks and counts[0] - broke != counts[1]:
            raise ValueError(f"{counts[0]} were right and the attacks broke {broke}, but {counts[1]} are robust")
        words, worst = get_args(Verdict), verdict(self.findings)
        if self.verdict is not None and words.index(self.verdict) < words.index(worst):
            raise ValueError(f"expected a verdict no milder than its findings, got {self.verdict}; they say {worst}")
        return self

    def plain(self) -> dict[str, Any]:
        """What goes into the file, as JSON knows it."""
        return self.model_dump(mode="json", by_alias=True)


def json_schema() -> dict[str, Any]:
    """The JSON schema of results.json; docs/results-schema.json is this."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Results.model_json_schema(by_alias=True)}
