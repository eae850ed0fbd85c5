"""Whatever is wrong with a call or a command, one sentence of ours says so; nothing hangs, nothing is left behind."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from bad_input import BadCall, bad_calls, bad_commands, faults, in_time, run_call, shop
from command import call
from sparring.app import cli

QUIET = {"deadline": None, "suppress_health_check": list(HealthCheck)}


def check_call(bad: BadCall) -> None:
    try:
        with in_time(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numpy's and torch's, of what the next line refuses
            run_call(bad)
    except Exception as error:
        assert not faults(error), bad
    else:
        pytest.fail(f"{bad!r} was taken")


@settings(max_examples=60, **QUIET)
@given(bad=bad_calls())
def test_a_bad_call_is_refused_in_a_sentence(bad: BadCall) -> None:
    check_call(bad)


@pytest.mark.slow
@settings(max_examples=200, **QUIET)
@given(bad=bad_calls())
def test_200_bad_calls_are_refused_in_a_sentence(bad: BadCall) -> None:
    check_call(bad)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    shop(folder)
    return folder


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts)


def check_command(folder: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = files(folder)
    with in_time(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        code, out, err = call(*words)
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and out == "", (words, code, out, err)
        assert "Traceback" not in err and len(errors[0].split()) >= 4, (words, err)
        debugged = ["sparring", *words]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", debugged)
            try:
                with Path(os.devnull).open("w") as nothing:
                    patch.setattr("sys.stderr", nothing)
                    cli.app(standalone_mode=False)
            except SystemExit:
                pass
            except Exception as error:
                of_library = type(error).__module__.startswith(("click", "typer"))  # of unknown options and ranges
                of_disk = isinstance(error, OSError) and error.errno is not None  # which `main` puts into a sentence
                assert of_library or of_disk or not faults(error), words
    assert files(folder) == before, words


@settings(max_examples=20, **QUIET)
@given(words=bad_commands())
def test_a_bad_command_is_refused_in_a_sentence(
    words: tuple[str, ...], stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_command(stock, words, monkeypatch)


@pytest.mark.slow
@settings(max_examples=300, **QUIET)
@given(words=bad_commands())
def test_300_bad_commands_are_refused_in_a_sentence(
    words: tuple[str, ...], stock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_command(stock, words, monkeypatch)
