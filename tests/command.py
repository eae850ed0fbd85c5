"""The command line, run in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any, NamedTuple

from sparring.app import cli


class Outcome(NamedTuple):
    """How a command ended."""

    code: Any
    out: str
    err: str


def call(*arguments: str) -> Outcome:
    """Runs the command line in this process."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["sparring", *arguments]
    code: Any = None
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
    except SystemExit as end:
        code = end.code
    finally:
        sys.argv = before
    return Outcome(code, out.getvalue(), err.getvalue())
