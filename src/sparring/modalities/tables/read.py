"""Tables as people have them: CSV and a schema -> rows of numbers, with a sentence for each cell that will not do."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparring.core.batches import hold_out
from sparring.modalities.base import Dataset
from sparring.modalities.tables.cells import Chunk, read_chunks
from sparring.modalities.tables.schema import Column, Schema

HERE = Path(__file__).parent
KNOWN_TABLES = {"phishing_urls": ("urls.csv.gz", ""), "nsl_kdd": ("train.csv.gz", "test.csv.gz")}
TABLE_DATA = {
    "phishing_urls": "11,430 addresses, 87 columns (Hannousse and Yahiouche 2021); from $SPARRING_DATA/phishing_urls.",
    "nsl_kdd": "125,973 connections and KDDTest+ (Tavallaee 2009); from $SPARRING_DATA/nsl_kdd.",
    "table:FILE.csv": "with schema=FILE.toml; also .csv.gz, test=FILE.csv for a test part of its own.",
}
WORDS = {"0": 0.0, "1": 1.0, "true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0, "0.0": 0.0, "1.0": 1.0}


@dataclass(frozen=True, eq=False)
class TableData(Dataset):
    """A data set of rows with its schema. Inputs: rows (N, D) float64, and may_change (N,): the attacked class."""

    schema: Schema | None = None


def load_table(
    path: str, *, schema: str = "", test: str = "", test_share: float = 0.2, seed: int = 0, encoding: str = "utf-8",
    rows: int = 0, found: str = "",
) -> TableData:  # fmt: skip
    """The table of a CSV file: class 1 is what the schema calls attacked, class 0 all else.

    schema: its TOML file. test: a file for the test; without it the share `test_share`, drawn by the seed with both
    classes in proportion. rows: of the training file only that many, drawn by the seed (0: all). found: a file
    of attacked rows, such as `sparring attack --split train` writes, that is added to the training part. Raises
    ValueError with row, column and value, FileNotFoundError.
    """
    files = [path, test]
    if path in KNOWN_TABLES and not Path(path).exists():
        home = os.environ.get("SPARRING_DATA")
        files = [str(Path(home or "", path, name)) if name else test for name in KNOWN_TABLES[path]]
        if not home or not Path(files[0]).is_file():
            raise FileNotFoundError(
                f"table {path!r}: SPARRING_DATA={home!r} holds no {path}/{KNOWN_TABLES[path][0]}; it is not "
                "downloaded: set SPARRING_DATA, or name a file: table:FILE.csv,schema=FILE.toml"
            )
        schema = schema or str(HERE / f"{path}.toml")
    if not schema:
        raise ValueError(f"table {path!r} has no schema; say what its columns are: table:{path},schema=FILE.toml")
    if not 0 < test_share < 1 or rows < 0:
        raise ValueError(f"table {path!r}: test_share={test_share:g}, rows={rows}; expected a share, and a count")
    known = Schema.read(schema)
    x, labels = read_csv(files[0], known, encoding)
    y = _classes(known, labels, files[0])
    if rows and rows < len(y):
        some = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[:rows].sort().values
        x, y, labels = x[some.numpy()], y[some], [labels[i] for i in some.tolist()]
    parts = [(x, y), (x, y)]
    if files[1]:
        x_test, labels_test = read_csv(files[1], known, encoding)
        parts[1] = (x_test, _classes(known, labels_test, files[1]))
    else:
        indices = hold_out(y, test_share, seed)
        parts = [(x[index.numpy()], y[index]) for index in indices]
    facts = facts_of(parts[0][0], known)
    if found:
        more = read_csv(found, known, encoding)
        own = torch.tensor([known.is_attacked(label) for label in more[1]], dtype=torch.int64)
        parts[0] = (np.concatenate([parts[0][0], more[0]]), torch.cat([parts[0][1], own]))
    inputs = [({"rows": torch.from_numpy(part), "may_change": own == 1}, own) for part, own in parts]
    two = sorted({*labels}, key=known.is_attacked)
    names = (two[0], two[1]) if len(two) == 2 else ("other", "attacked")
    return TableData(Path(path).name.split(".")[0], "table", *inputs[0], *inputs[1], names, facts, schema=known)


def facts_of(x: np.ndarray, schema: Schema) -> dict[str, Any]:
    """What a network is told: number of columns, which are on a log scale, mean and spread of each in training."""
    seen = np.where(schema.log, np.log1p(np.maximum(x, 0)), x)
    spread = seen.std(0)
    return {
        "shape": (x.shape[1],), "log": schema.log.tolist(), "mean": seen.mean(0).tolist(),
        "spread": np.where(spread > 0, spread, 1.0).tolist(),
    }  # fmt: skip


def _classes(schema: Schema, labels: list[str], path: str) -> torch.Tensor:
    y = torch.tensor([schema.is_attacked(label) for label in labels], dtype=torch.int64)
    if not 0 < int(y.sum()) < len(y):
        names, counts = np.unique(labels, return_counts=True)
        told = ", ".join(f"{n!r} ({c})" for n, c in [*zip(names.tolist(), counts.tolist(), strict=True)][:10])
        raise ValueError(
            f"{path}: of the labels {told} {'all' if len(y) and y[0] else 'none'} are attacked, as the schema says of "
            f"{list(schema.attacked)}; expected both kinds in the column {schema.label!r}: mind case and blanks"
        )
    return y


def read_csv(path: str, schema: Schema, encoding: str = "utf-8") -> tuple[np.ndarray, list[str]]:
    """Rows (N, D) float64 and labels of a CSV file (also .gz). Raises ValueError with row, column and value.

    What `read_chunks` handles is handled.
    """
    blocks: list[np.ndarray] = []
    labels: list[str] = []
    for chunk in read_chunks(path, encoding):
        rows, some = numbers_of(path, chunk, schema)
        blocks.append(rows)
        labels += some
    return np.concatenate(blocks), labels


def numbers_of(path: str, chunk: Chunk, schema: Schema) -> tuple[np.ndarray, list[str]]:
    """Rows (N, D) float64 and labels of some cells. Raises ValueError with row, column and value."""
    _check_header(path, chunk.header, schema)
    place = chunk.header.index(schema.label)
    return features_of(path, chunk, schema), [row[place] for row in chunk.cells]


def features_of(path: str, chunk: Chunk, schema: Schema) -> np.ndarray:
    """Rows (N, D) float64 of cells that hold every column of the schema. Raises ValueError with row, column, value."""
    at = {name: i for i, name in enumerate(chunk.header)}
    blocks = [_numbers(path, c, [row[at[c.name]] for row in chunk.cells], chunk.numbers) for c in schema.columns]
    return np.concatenate(blocks, 1)


def _check_header(path: str, header: list[str], schema: Schema) -> None:
    for name in header:
        if header.count(name) > 1:
            where = " and ".join(str(i + 1) for i, other in enumerate(header) if other == name)
            raise ValueError(f"{path}: {name!r} names the columns {where} (blanks aside); expected one: rename one")
    wanted = [*(c.name for c in schema.columns), schema.label]
    if missing := [name for name in wanted if name not in header]:
        close = [name for name in header if name.lower() == missing[0].lower()]
        hint = f"; there is {close[0]!r}" if close else ""
        if len(header) == 1 and re.search(r"[;\t|]", header[0]):
            hint = "; its one name holds several, parted by something else than the commas that are expected"
        raise ValueError(f"{path}: lacks the column(s) {', '.join(map(repr, missing[:5]))} of the schema{hint}")
    if more := [name for name in header if name not in {*wanted, *schema.ignore}]:
        index = "; a column without a name is the row number that pandas saves" if {*more} & {"", "Unnamed: 0"} else ""
        raise ValueError(
            f"{path}: has the column(s) {', '.join(map(repr, more[:5]))} that the schema does not know; describe them "
            f"there, or put them into ignore{index}"
        )


def _numbers(path: str, column: Column, cells: list[str], numbers: list[int]) -> np.ndarray:
    """(N, 1), or (N, K) of a category."""

    def fail(i: int, expected: str) -> Any:
        raise ValueError(f"{path}: column {column.name!r}, row {numbers[i]}: got {cells[i]!r}; expected {expected}")

    if column.type == "category":
        at = {value: i for i, value in enumerate(column.values)}
        for i, cell in enumerate(cells):
            if cell not in at:
                fail(i, f"one of {', '.join(column.values[:12])}{', ...' if len(at) > 12 else ''}, as the schema says")
        return np.eye(len(at))[[at[cell] for cell in cells]]
    if column.type == "boolean":
        found = [WORDS.get(cell.lower(), np.nan) for cell in cells]
    else:
        found = [as_number(cell) for cell in cells]
    values = np.array(found, dtype=np.float64)
    broken = ~np.isfinite(values)
    if column.missing is not None:
        values[broken] = column.missing
    elif broken.any():
        kind = "0 or 1, true or false" if column.type == "boolean" else "a finite number without thousands marks"
        fail(int(broken.argmax()), f"{kind}; missing = NUMBER in the schema would stand for it")
    if column.type == "integer" and (bad := values != np.rint(values)).any():
        fail(int(bad.argmax()), "a whole number")
    if column.type == "integer" and (bad := np.abs(values) > 2**53).any():
        fail(int(bad.argmax()), "a number below 2^53, beyond which whole numbers are lost; an id belongs into ignore")
    if column.scale == "log" and (bad := values < 0).any():
        fail(int(bad.argmax()), "no negative number, for the schema counts log(1 + value)")
    return values[:, None]


def as_number(cell: str) -> float:
    """The number of a cell, NaN for none."""
    try:
        return float(cell) if "_" not in cell else np.nan
    except ValueError:
        return np.nan
