"""Parts add up as the whole does, and a file that is not whole is no part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from contracts import rand
from sparring.core.types import Cost
from sparring.evaluation.parts import Part, merge, read_part, write_part
from sparring.evaluation.shelf import Key, OtherSettings, Shelf
from sparring.results.findings import Finding

KEY = {"settings": {"seed": 0}, "number": 1}


def some_part(first: int, num: int, pictures: int) -> Part:
    """A part of `num` examples with numbers that tell where they come from."""
    index = torch.arange(first, first + num)
    counts = {"ran_on": num, "seconds": 0.25, "rejected": {"a": first, "b": 1}, "cost": [num, 2 * num]}
    return Part(
        columns={"index": index, "robust": index % 2 == 0, "size": rand(num, seed=first)},
        stands_at={0.5: index % 3 > 0, 1.0: index % 2 == 0}, attacks=[counts, {**counts, "ran_on": 1}],
        curve_attacks=[], gallery={"index": index[:pictures], "x": rand(pictures, 2, 3)} if pictures else {},
        findings=[Finding(f"part {first}", "Seen.", {"share": float("inf")}, "suspect", "Look.")],
        cost=Cost(first, num), seconds=1.5,
    )  # fmt: skip


def same(a: Part, b: Part | None) -> bool:
    if b is None:
        return False
    plain = all(getattr(a, n) == getattr(b, n) for n in ("attacks", "curve_attacks", "findings", "cost", "seconds"))
    tensors = [(getattr(a, n), getattr(b, n)) for n in ("columns", "stands_at", "gallery")]
    return plain and all(
        list(x) == list(y) and all(v.dtype == y[k].dtype and torch.equal(v, y[k]) for k, v in x.items())
        for x, y in tensors
    )


def test_parts_add_up() -> None:
    parts = [some_part(0, 4, 2), some_part(4, 1, 0), some_part(5, 3, 3)]
    whole = merge(parts, gallery_size=4)
    assert whole.columns["index"].tolist() == list(range(8)) == sorted(whole.columns["index"].tolist())
    assert whole.stands_at[0.5].tolist() == [i % 3 > 0 for i in range(8)]
    assert whole.attacks[0] == {"ran_on": 8, "seconds": 0.75, "rejected": {"a": 9, "b": 3}, "cost": [8, 16]}
    assert whole.attacks[1]["ran_on"] == 3 and whole.curve_attacks == []
    assert whole.gallery["index"].tolist() == [0, 1, 5, 6] and whole.gallery["x"].shape == (4, 2, 3)
    assert [f.name for f in whole.findings] == ["part 0", "part 4", "part 5"]
    assert whole.cost == Cost(9, 8) and whole.seconds == 4.5
    assert merge([some_part(0, 4, 2)], gallery_size=0).gallery == {}
    with pytest.raises(ValueError, match="not one batch"):
        merge([], gallery_size=4)


def test_merging_is_associative_and_leaves_its_parts() -> None:
    parts = [some_part(0, 4, 2), some_part(4, 1, 1), some_part(5, 3, 3)]
    steps = merge([merge(parts[:2], 4), parts[2]], 4)
    assert same(steps, merge([some_part(0, 4, 2), some_part(4, 1, 1), some_part(5, 3, 3)], 4))
    merge(parts, 1)
    assert same(parts[0], some_part(0, 4, 2)) and same(parts[2], some_part(5, 3, 3)), "merging wrote into a part"


@pytest.mark.parametrize("pictures", [0, 2])
def test_a_part_survives_its_file(tmp_path: Path, pictures: int) -> None:
    part, path = some_part(3, 4, pictures), tmp_path / "folder" / "1.npz"
    write_part(path, part, KEY)
    assert same(part, read_part(path, KEY))
    assert read_part(path, {**KEY, "number": 2}) is None and read_part(tmp_path / "none.npz", KEY) is None
    assert [p.name for p in path.parent.iterdir()] == ["1.npz"]


def test_a_damaged_file_is_no_part(tmp_path: Path) -> None:
    part, path = some_part(3, 4, 2), tmp_path / "1.npz"
    write_part(path, part, KEY)
    data = path.read_bytes()
    for length in range(0, len(data), 211):
        path.write_bytes(data[:length])
        assert read_part(path, KEY) is None, f"{length} of {len(data)} bytes"
    refused = 0
    for i in range(0, len(data), 13):  # what is not refused must be unharmed, as after a change in a time stamp
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x21]) + data[i + 1 :])
        found = read_part(path, KEY)
        refused += found is None
        assert found is None or same(part, found), f"byte {i}"
    assert refused > len(data) / 13 / 2


def shelf(folder: Path, **settings: Any) -> Shelf:
    return Shelf(folder, {"seed": 0, "attacks": [["pgd", None]], **settings})


def test_a_shelf_gives_back_what_was_made_from_the_same(tmp_path: Path) -> None:
    mine, part = shelf(tmp_path), some_part(0, 4, 2)
    mine.write(Key(3, 0, "abc"), part)
    mine.write(Key(10, 4, "abd"), part)
    again = shelf(tmp_path)
    again.check()
    assert again.numbers() == [3, 10] and same(part, again.read(Key(3, 0, "abc")))
    for other in (Key(3, 0, "abd"), Key(3, 1, "abc"), Key(4, 0, "abc")):
        assert again.read(other) is None
    assert shelf(tmp_path, seed=1).read(Key(3, 0, "abc")) is None
    with pytest.raises(RuntimeError, match=r"part of batch 4 is not in .*the same folder.*unshuffled"):
        again.require(Key(4, 0, "abc"))


def test_a_shelf_says_what_differs(tmp_path: Path) -> None:
    shelf(tmp_path, about="a", threat=1.0).check()
    shelf(tmp_path, about="a").write(Key(0, 0, ""), some_part(0, 4, 2))
    with pytest.raises(OtherSettings, match=r"settings: about \('a' there, 'b' here\), attacks\. .*another folder"):
        shelf(tmp_path, about="b", attacks=[["pgd", 0.5]]).check()
    with pytest.raises(OtherSettings, match=r"settings: threat\."):
        shelf(tmp_path, about="a", threat=1.0).check()
    (tmp_path / "000000.npz").write_bytes(b"half of it")
    shelf(tmp_path, about="b").check()


def test_a_shelf_deletes_nothing_but_parts(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    shelf(folder).write(Key(0, 0, ""), some_part(0, 4, 2))
    (folder / ".000001.npz.part").write_bytes(b"half")
    shelf(folder).clear()
    assert not folder.exists()
    shelf(folder).clear()
    shelf(folder).write(Key(0, 0, ""), some_part(0, 4, 2))
    (folder / "notes.txt").write_text("mine")
    shelf(folder).clear()
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]
