"""The command line, run in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import Any

from sparring.app import cli


def call(*arguments: str) -> tuple[Any, str, str]:
    """Exit code, output, errors."""
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
    return code, out.getvalue(), err.getvalue()
