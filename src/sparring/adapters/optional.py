"""Libraries that are asked for where they are needed, and data sets that one of them fetches."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def need(module: str, purpose: str, extra: str = "data") -> Any:
    """An optional dependency, or ImportError with the way to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{purpose} needs {module.partition('.')[0]}: pip install 'sparring[{extra}]'") from error


def download(name: str, suffixes: Sequence[str]) -> Path:
    """The folder of a data set of the Hugging Face hub, OWNER/NAME or OWNER/NAME/FOLDER, with the files of those
    suffixes and no others: scripts are not fetched. What was fetched before is not fetched again.

    Raises ImportError, ValueError for what can be no name, and FileNotFoundError where it cannot be fetched.
    """
    owner, _, rest = name.partition("/")
    repository, _, inner = rest.partition("/")
    if not owner or not repository or ".." in name:
        raise ValueError(f"{name!r} names no data set of the hub; expected OWNER/NAME, or OWNER/NAME/FOLDER of it")
    hub = need("huggingface_hub", f"downloading {name}")
    wanted = [f"{inner + '/' if inner else ''}*{suffix}" for suffix in suffixes]
    try:
        place = Path(hub.snapshot_download(f"{owner}/{repository}", repo_type="dataset", allow_patterns=wanted)) / inner
    except Exception as error:  # the client's own errors, and those of the network library below it
        why = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:300]}"
        raise FileNotFoundError(f"the download of {name} from the hub failed ({why})") from error
    if not any(file.suffix in suffixes for file in place.rglob("*")):
        raise FileNotFoundError(f"{name} on the hub holds no {', '.join(suffixes)} files; nothing else is read")
    return place
