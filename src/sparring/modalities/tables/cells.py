"""The cells of a CSV file as text, in chunks, so that memory does not grow with the file."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sparring.core.unpacking import limited_lines

ROWS_AT_ONCE = 10_000


class Chunk(NamedTuple):
    """Some rows of a file: its header, the line number of each row, the cells, without blanks around, and how often the
    header has stood again among the rows so far."""

    header: list[str]
    numbers: list[int]
    cells: list[list[str]]
    repeated: int = 0


def read_chunks(path: str, encoding: str = "utf-8") -> Iterator[Chunk]:
    """The rows of a CSV file (also .gz) in order, `ROWS_AT_ONCE` at a time. Raises ValueError, FileNotFoundError.

    Handled: a byte-order mark, blanks around names and cells, rows without content, the header again among the rows, a
    comma too many at the end of every row, or of every line.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise FileNotFoundError(f"table {path!r}: there is no such file")
    encoding = "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    try:
        with (gzip.open if place.suffix == ".gz" else open)(place, "rt", encoding=encoding, newline="") as stream:
            yield from _chunks(path, csv.reader(limited_lines(stream, path)))
    except (UnicodeError, LookupError) as error:
        raise ValueError(f"{path}: is not {encoding} ({error}); name it: encoding=cp1252, or encoding=utf-16") from None
    except (csv.Error, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as CSV ({error})") from None


def _chunks(path: str, reader: Any) -> Iterator[Chunk]:
    names = [name.strip() for name in next(reader, [])]
    again: list[int] = []
    rows, extra, header = _rows(reader, names, again), 0, names
    some = list(islice(rows, ROWS_AT_ONCE))
    if not some:
        raise ValueError(f"{path}: there is no row of data under a header")
    if all(len(cells) == len(names) + 1 and not cells[-1] for _, cells in some):
        extra = 1
    elif names and not names[-1] and all(not cells[-1] for _, cells in some if len(cells) == len(names)):
        extra, header = 1, names[:-1]
    while some:
        for number, cells in some:
            if len(cells) != len(header) + extra or (extra and cells[-1]):
                raise ValueError(
                    f"{path}: row {number} has {len(cells)} cells, the header has {len(names)}; columns would be "
                    "shifted: a comma inside a cell needs quotes around the cell"
                )
        yield Chunk(header, [number for number, _ in some], [cells[: len(header)] for _, cells in some], len(again))
        some = list(islice(rows, ROWS_AT_ONCE))


def _rows(reader: Any, header: list[str], again: list[int]) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and cells of the rows that hold data; those of the header's own copies go to `again`."""
    for row in reader:
        cells = [cell.strip() for cell in row]
        if cells == header:
            again.append(reader.line_num)
        elif any(cells):
            yield reader.line_num, cells
