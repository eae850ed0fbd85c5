"""Files of a few kilobytes that unpack to more than there is room for end in a sentence, and the memory stays free."""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from command import call
from sparring.adapters.files import load_weights
from sparring.core import unpacking
from sparring.core.unpacking import gunzipped, limited_lines, most_bytes, read_npz
from sparring.modalities import find
from sparring.results.read import read_evaluation

ROOM = 200_000


@pytest.fixture
def little_room(monkeypatch: pytest.MonkeyPatch) -> None:
    share = unpacking.SHARE_OF_MEMORY * ROOM / most_bytes()
    monkeypatch.setattr(unpacking, "SHARE_OF_MEMORY", share)


def zeros(path: Path, **arrays: Any) -> Path:
    """An .npz of a few hundred bytes that unpacks to ten times the room."""
    np.savez_compressed(path, **{"x": np.zeros(10 * ROOM, np.uint8), **arrays})
    assert path.stat().st_size < ROOM / 20
    return path


def picture(folder: Path) -> Path:
    from PIL import Image

    for split in ("train", "test"):
        (folder / split / "a").mkdir(parents=True)
        Image.new("L", (2000, 2000)).save(folder / split / "a" / "0.png")
    return folder


def weights(path: Path) -> Path:
    torch.save({"weight": torch.zeros(10 * ROOM)}, path)
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(path.with_suffix(".pth"), "w", zipfile.ZIP_DEFLATED) as small:
        for name in file.namelist():
            small.writestr(name, file.read(name))
    return path.with_suffix(".pth")


def lines(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"a,label\n" + b"1,0\n" * ROOM))
    return path


READERS: dict[str, Callable[[Path], Any]] = {
    "npz": lambda p: read_npz(zeros(p / "a.npz")),
    "data": lambda p: find("images").load(str(zeros(p / "a.npz"))),
    "faces": lambda p: find("faces").load(str(zeros(p / "a.npz"))),
    "pictures": lambda p: find("images").load(str(picture(p / "folder"))),
    "weights": lambda p: load_weights(torch.nn.Linear(2, 2), weights(p / "w.pt")),
    "gzip": lambda p: gunzipped(lines(p / "a.gz").read_bytes(), "a.gz"),
    "lines": lambda p: list(limited_lines(io.StringIO("1,0\n" * ROOM), "a.csv")),
}


@pytest.mark.usefixtures("little_room")
@pytest.mark.parametrize("name", READERS)
def test_what_unpacks_to_too_much_is_not_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unpacks to .* GB or more, and this machine has room for"):
        READERS[name](tmp_path)


@pytest.mark.usefixtures("little_room")
def test_commands_say_it_in_a_sentence(tmp_path: Path) -> None:
    zeros(tmp_path / "a.npz")
    lines(tmp_path / "rows.csv.gz")
    for data in (f"{tmp_path}/a.npz", f"table:{tmp_path}/rows.csv.gz,schema={tmp_path}/none.toml"):
        code, _, err = call("train", "--data", data, "--threat", "linf:0.1", "--out", f"{tmp_path}/run")
        assert code == 2 and err.startswith("error: ") and len(err.splitlines()) == 1, err
    assert not (tmp_path / "run").exists()


def test_ordinary_files_are_read_to_the_bit(tmp_path: Path) -> None:
    arrays = {"x": np.random.default_rng(0).random((3, 4)), "y": np.array(["a", "b"]), "empty": np.empty((0, 2))}
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", **arrays)
        found = read_npz(tmp_path / "a.npz")
        assert list(found) == list(arrays) and all((found[name] == arrays[name]).all() for name in arrays)
    assert gunzipped(gzip.compress(b"text"), "a.gz") == b"text"
    assert list(limited_lines(io.StringIO("a\nb"), "a.csv")) == ["a\n", "b"]


@pytest.mark.parametrize("content", [b"", b"PK", b"no archive", b"PK\x03\x04" + bytes(40)])
def test_what_is_no_archive_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    with pytest.raises(ValueError):
        read_npz(tmp_path / "a.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(ValueError, match="one array, no archive"):
        read_npz(tmp_path / "one.npy")
    with pytest.raises(ValueError):
        read_evaluation(tmp_path / "a.npz")
