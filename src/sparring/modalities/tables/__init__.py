"""Rows of a table, such as connections or addresses, under an opponent who obeys the rules of the domain."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sparring.modalities.base import Modality
from sparring.modalities.tables.audit import check_table
from sparring.modalities.tables.draft import draft_schema
from sparring.modalities.tables.models import TABLE_MODELS, certify_untouched
from sparring.modalities.tables.read import TABLE_DATA, load_table
from sparring.modalities.tables.read import TableData as TableData
from sparring.modalities.tables.schema import Schema as Schema
from sparring.modalities.tables.search import TABLE_ATTACKS, TABLE_PLANS
from sparring.modalities.tables.show import as_csv, costs, show_rows, table_metrics
from sparring.modalities.tables.threats import Columns as Columns
from sparring.modalities.tables.threats import climbed_relaxed, columns
from sparring.threats import ThreatModel
from sparring.training.named import RECIPES


def is_table(path: Path) -> bool:
    """Whether a file is a CSV file by its name."""
    return path.name.lower().endswith((".csv", ".csv.gz"))


def climbing_relaxed(builder: Callable[..., Any]) -> Callable[..., Any]:
    """The same recipe, whose inner attack climbs before the rows snap: several times cheaper."""

    @functools.wraps(builder)
    def made(threat: ThreatModel, **options: Any) -> Any:
        return builder(climbed_relaxed(threat), **options)

    return made


MODALITY = Modality(
    name="table", load=load_table, known=TABLE_DATA, reads=is_table, models=TABLE_MODELS, threats={"columns": columns},
    attacks=TABLE_ATTACKS, plans=TABLE_PLANS, recipes={name: climbing_relaxed(made) for name, made in RECIPES.items()},
    presets=lambda data: {"model": "mlp", "epochs": 20, "batch_size": 256}, metrics=table_metrics, show=show_rows,
    caption=costs, certify=certify_untouched, tools={"draft": draft_schema, "check": check_table},
    formats={".csv": as_csv},
)  # fmt: skip
