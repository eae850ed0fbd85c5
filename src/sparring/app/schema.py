"""`sparring schema`: a first schema of a table from its data, and a look at a schema beside data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

schema = typer.Typer(
    name="schema", no_args_is_help=True, add_completion=False, rich_markup_mode=None,
    help="Draft the schema of a table from its data, or check one beside data.",
)  # fmt: skip
Data = Annotated[str, typer.Argument(help="a CSV file, also .csv.gz")]
Encoding = Annotated[str, typer.Option(help="of the file, such as cp1252")]


@schema.command()
def draft(
    data: Data,
    label: Annotated[str, typer.Option(help="the column of labels")],
    attacked: Annotated[str, typer.Option(help="the labels whose rows the opponent owns: A, or A,B")],
    out: Annotated[Path | None, typer.Option(help="the TOML file to write (default: print it)")] = None,
    encoding: Encoding = "utf-8",
) -> None:
    """Write a first schema, which a person corrects: types, ranges, steps, units; laws only as comments."""
    from sparring.modalities import find

    text = find("table").tools["draft"](data, label, attacked, out=out, encoding=encoding)
    typer.echo(f"{out}: a draft; correct it, then: sparring schema check {out} {data}" if out else text, nl=bool(out))


@schema.command()
def check(
    file: Annotated[Path, typer.Argument(help="the schema, a TOML file")], data: Data, encoding: Encoding = "utf-8"
) -> None:
    """Name rows and rules that break, rules that nothing can break, and rules that never bind."""
    from sparring.modalities import find

    for sentence in find("table").tools["check"](file, data, encoding=encoding):
        typer.echo(sentence)
