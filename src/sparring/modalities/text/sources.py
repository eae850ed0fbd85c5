"""Labelled texts from files: CSV, TSV, JSONL and parquet, in one file, or in a folder by split."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sparring.adapters.optional import need
from sparring.core.unpacking import check_parquet

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
_SHARD = re.compile(r"-\d+-of-\d+$")


class Labelled(NamedTuple):
    """Texts and a label for each as the file has it; names of the classes 0, 1, ... where the file tells them."""

    texts: list[str]
    labels: list[Any]
    names: tuple[str, ...] | None

    def rows(self, index: Iterable[int]) -> Labelled:
        """Some of them."""
        chosen = list(index)
        return Labelled([self.texts[i] for i in chosen], [self.labels[i] for i in chosen], self.names)


def read_labelled(place: Path, test: str | None, text: str, label: str, encoding: str) -> tuple[Labelled, Labelled]:
    """What to train on and what to judge on: of a folder train.* and test.* (else validation.*), of a file all.

    test: another split of the folder, or another file. Without one, a fifth of a file's different texts is set aside,
    class by class, by a hash of the text, so that equal texts stay together. Raises ValueError and FileNotFoundError
    with the file, what was found there and what was expected.
    """
    files = _splits(place) if place.is_dir() else {"train": place}
    other = _other_file(place, files, test)
    parts = [read_rows(file, text, label, encoding) for file in (files["train"], other) if file]
    if len(parts) == 1:
        return split_by_hash(parts[0])
    return parts[0], parts[1]


def _splits(folder: Path) -> dict[str, Path]:
    """The files by split, in the folder or in its folder data; `train-00000-of-00001` is train, as the hub has it."""
    files = [file for place in ("*", "data/*") for file in sorted(folder.glob(place)) if file.suffix in TEXT_SUFFIXES]
    found = {_SHARD.sub("", file.stem): file for file in files}
    if len(found) < len(files):
        raise ValueError(f"data folder {folder} has several files of one split, {files[0].name} ...; name one by path")
    if "train" not in found and len(found) == 1:
        found = {"train": next(iter(found.values()))}
    if "train" not in found:
        raise ValueError(
            f"data folder {folder} has no train split: expected train{'|'.join(TEXT_SUFFIXES)}, found "
            f"{', '.join(file.name for file in found.values()) or 'nothing of that kind'}"
        )
    return found


def _other_file(place: Path, files: dict[str, Path], test: str | None) -> Path | None:
    if test is None:
        return files.get("test", files.get("validation"))
    found = files.get(test) or next((p for p in (Path(test).expanduser(), place.parent / test) if p.is_file()), None)
    if found is None:
        raise FileNotFoundError(f"test={test!r}: there is no such file, nor a split of {place} ({', '.join(files)})")
    return found


def split_by_hash(rows: Labelled, share: float = 0.2) -> tuple[Labelled, Labelled]:
    """The rows in two, the second with that share of each class's different texts, at least one and never all.

    Raises ValueError where that leaves nothing.

    >>> first, second = split_by_hash(Labelled(["a", "b", "c", "d", "e", "a"], [0] * 6, None))
    >>> len(second.texts), set(first.texts) & set(second.texts)
    (1, set())
    """
    by_class: dict[Any, list[str]] = {}
    for text, label in dict(zip(rows.texts, rows.labels, strict=True)).items():
        by_class.setdefault(label, []).append(text)
    aside: set[str] = set()
    for texts in by_class.values():
        texts.sort(key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
        aside |= set(texts[: min(len(texts) - 1, max(1, round(share * len(texts))))])
    if not aside:
        raise ValueError(
            "there are too few different texts of each class to set some aside; name a second file, test=FILE"
        )
    index = range(len(rows.texts))
    return rows.rows(i for i in index if rows.texts[i] not in aside), rows.rows(
        i for i in index if rows.texts[i] in aside
    )


def read_rows(file: Path, text: str, label: str, encoding: str = "utf-8") -> Labelled:
    """The rows of one file. Raises ValueError, see `read_labelled`."""
    if file.suffix == ".parquet":
        return _parquet(file, text, label)
    if file.suffix not in TEXT_SUFFIXES:
        raise ValueError(f"{file}: cannot read a {file.suffix or 'plain'} file; expected {', '.join(TEXT_SUFFIXES)}")
    try:
        content = file.read_bytes().decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except LookupError:
        raise ValueError(f"encoding={encoding!r} is unknown; expected one such as utf-8, latin-1, gb18030") from None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: byte {error.start} is no {encoding}; say which encoding it is in, for example encoding=latin-1 "
            "or encoding=gb18030"
        ) from None
    table = list(_json_lines(content, file) if file.suffix == ".jsonl" else _table(content, file))
    columns = list(table[0]) if table else []
    _expect_columns(file, columns, text, label)
    return _complete(file, [row.get(text) for row in table], [row.get(label) for row in table], None)


def _complete(file: Path, texts: list[Any], labels: list[Any], names: tuple[str, ...] | None) -> Labelled:
    for number, (text, label) in enumerate(zip(texts, labels, strict=True), 1):
        if text is None or label is None or label == "":
            raise ValueError(f"{file}: row {number} has no {'text' if text is None else 'label'}; complete or drop it")
    return Labelled([str(text) for text in texts], labels, names)


def _expect_columns(file: Path, columns: list[str], text: str, label: str) -> None:
    for option, column in (("text", text), ("label", label)):
        if column not in columns:
            raise ValueError(
                f"{file} has no column {column!r}; it has {', '.join(columns) or 'no rows'}. Name the column with "
                f"{option}=COLUMN"
            )


def _table(content: str, file: Path) -> list[dict[str, Any]]:
    """Rows by the names in the first line. Quotes mean something in CSV only."""
    tabs = file.suffix == ".tsv"
    reader = csv.DictReader(
        io.StringIO(content, newline=""), delimiter="\t" if tabs else ",",
        quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL, restkey=" ",
    )  # fmt: skip
    before, rows = csv.field_size_limit(1 << 30), []
    try:
        for row in reader:
            if " " in row:
                raise ValueError(
                    f"{file}: line {reader.line_num} has more fields than the {len(reader.fieldnames or ())} columns; "
                    f"{'texts must not hold tabs' if tabs else 'put texts with commas into double quotes'}"
                )
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"{file}: line {reader.line_num} cannot be read ({error})") from error
    finally:
        csv.field_size_limit(before)
    return rows


def _json_lines(content: str, file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}: line {number} is not valid JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f'{file}: line {number} is a {type(row).__name__}; expected {{"text": ..., "label": ...}}')
        rows.append(row)
    return rows


def _parquet(file: Path, text: str, label: str) -> Labelled:
    parquet = need("pyarrow.parquet", "reading parquet")
    try:
        check_parquet([file])
        table = parquet.read_table(file)
    except Exception as error:  # the library has kinds of its own
        raise ValueError(f"{file}: cannot be read as parquet ({error})") from error
    _expect_columns(file, table.column_names, text, label)
    about = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
    names = about.get("info", {}).get("features", {}).get(label, {}).get("names")
    return _complete(file, table[text].to_pylist(), table[label].to_pylist(), tuple(names) if names else None)
