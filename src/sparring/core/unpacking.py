"""Reading compressed files that may be meant to fill the memory: a few kilobytes can unpack to terabytes."""

from __future__ import annotations

import gzip
import io
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

SHARE_OF_MEMORY = 0.5
"""Of the machine's: what one file may unpack to."""
LONGEST_LINE = 10**7
"""Characters of one line of a text."""


def most_bytes() -> int:
    """The bytes that one file, or a data set, may take in memory; 8 GB where the system does not tell what it has."""
    try:
        return int(SHARE_OF_MEMORY * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 8 * 10**9


def check_archive(source: Path | IO[bytes], name: str) -> None:
    """Raises ValueError for a zip (.npz, weights) that says it unpacks to more than `most_bytes`; others pass."""
    if not zipfile.is_zipfile(source):
        return
    with zipfile.ZipFile(source) as archive:
        size = sum(member.file_size for member in archive.infolist())
    if size > most_bytes():
        raise too_large(name, size)


def too_large(name: str, size: float) -> ValueError:
    """What is said of a file that unpacks to `size` bytes, or to more."""
    return ValueError(
        f"{name} unpacks to {size / 1e9:.3g} GB or more, and this machine has room for {most_bytes() / 1e9:.3g} GB: "
        "a mistake, or meant to fill the memory. It was not read; give a part of it"
    )


def read_npz(source: Path | bytes, name: str | None = None) -> dict[str, np.ndarray]:
    """The plain arrays of an .npz by name. ValueError where it unpacks to too much, or for what numpy cannot read.

    >>> stream = io.BytesIO()
    >>> np.savez_compressed(stream, x=np.zeros(3))
    >>> read_npz(stream.getvalue())["x"].shape
    (3,)
    """
    name = name or (str(source) if isinstance(source, Path) else "the archive")
    with source.open("rb") if isinstance(source, Path) else io.BytesIO(source) as stream:
        check_archive(stream, name)
        stream.seek(0)
        try:
            file = np.load(stream, allow_pickle=False)
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("it is one array, no archive of arrays")
            return {key: file[key] for key in file.files}
        except (OSError, MemoryError, KeyError, EOFError, zipfile.BadZipFile, NotImplementedError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        except Exception as error:  # zlib and struct have kinds of their own
            raise ValueError(str(error)) from error


def gunzipped(raw: bytes, name: str) -> bytes:
    """What a gzip file holds. ValueError where that is too much; OSError and EOFError where it is broken."""
    with gzip.GzipFile(fileobj=io.BytesIO(raw)) as stream:
        content = stream.read(most_bytes() + 1)
    if len(content) > most_bytes():
        raise too_large(name, len(content))
    return content


def limited_lines(stream: Any, name: str) -> Iterator[str]:
    """The lines of a text stream; ValueError where one is longer than any table's, or all together are too much."""
    room = most_bytes()
    while line := stream.readline(LONGEST_LINE):
        room -= len(line)
        if room < 0:
            raise too_large(name, most_bytes())
        if len(line) == LONGEST_LINE:
            raise ValueError(f"{name} has a line of {LONGEST_LINE:.0e} characters or more; is it a table?")
        yield line


def check_parquet(files: Sequence[Path]) -> None:
    """Raises ValueError for parquet files that say they unpack to more than `most_bytes` together; needs pyarrow."""
    from pyarrow.parquet import ParquetFile

    size = 0
    for file in files:
        with ParquetFile(file) as opened:
            about = opened.metadata
            size += sum(about.row_group(i).total_byte_size for i in range(about.num_row_groups))
        if size > most_bytes():
            raise too_large(str(file), size)
