"""Outcomes add up as the whole does, and a file that is not whole counts as not there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from contracts import rand
from sparring.core.types import Cost
from sparring.evaluation import kept as module
from sparring.evaluation.all_batches import merge
from sparring.evaluation.fingerprint import describe, digest_of_model
from sparring.evaluation.kept import BatchKey, Kept, clear
from sparring.evaluation.one_batch import REJECTIONS, AttackRecord, BatchOutcome, stacked
from sparring.evaluation.preflight import LogProbabilities

KEY = BatchKey(1, 3, "abc")


def some_outcome(first: int, num: int, pictures: int) -> BatchOutcome:
    """An outcome of `num` examples with numbers that tell where they come from."""
    index = torch.arange(first, first + num)
    rejected = {**dict.fromkeys(REJECTIONS, 1), "outside_set": first}
    record = AttackRecord("a", ran_on=num, seconds=0.25, rejected=rejected, cost=Cost(num, 2 * num))
    return BatchOutcome(
        table={"index": index, "robust": index % 2 == 0, "size": rand(num, seed=first)},
        stands_at={0.5: index % 3 > 0, 1.0: index % 2 == 0}, attacks=[record, replace(record, ran_on=1)],
        curve_attacks=[], gallery={"index": index[:pictures], "x": rand(pictures, 2, 3)} if pictures else {},
        cost=Cost(first, num), seconds=1.5,
    )  # fmt: skip


def same(a: BatchOutcome, b: BatchOutcome | None) -> bool:
    if b is None:
        return False
    plain = all(getattr(a, n) == getattr(b, n) for n in ("attacks", "curve_attacks", "cost", "seconds"))
    tensors = [(getattr(a, n), getattr(b, n)) for n in ("table", "stands_at", "gallery")]
    return plain and all(
        list(x) == list(y) and all(v.dtype == y[k].dtype and torch.equal(v, y[k]) for k, v in x.items())
        for x, y in tensors
    )


def test_outcomes_add_up() -> None:
    parts = [some_outcome(0, 4, 2), some_outcome(4, 1, 0), some_outcome(5, 3, 3)]
    whole = merge(parts, gallery_size=4)
    assert whole.table["index"].tolist() == list(range(8)) == sorted(whole.table["index"].tolist())
    assert whole.stands_at[0.5].tolist() == [i % 3 > 0 for i in range(8)]
    first, second = whole.attacks
    assert (first.ran_on, first.seconds, first.cost) == (8, 0.75, Cost(8, 16)) and second.ran_on == 3
    assert first.rejected == {**dict.fromkeys(REJECTIONS, 3), "outside_set": 9} and whole.curve_attacks == []
    assert whole.gallery["index"].tolist() == [0, 1, 5, 6] and whole.gallery["x"].shape == (4, 2, 3)
    assert whole.cost == Cost(9, 8) and whole.seconds == 4.5
    assert merge([some_outcome(0, 4, 2)], gallery_size=0).gallery == {}
    with pytest.raises(ValueError, match="not one batch"):
        merge([], gallery_size=4)


def test_merging_is_associative_and_leaves_what_it_merges() -> None:
    parts = [some_outcome(0, 4, 2), some_outcome(4, 1, 1), some_outcome(5, 3, 3)]
    steps = merge([merge(parts[:2], 4), parts[2]], 4)
    assert same(steps, merge([some_outcome(0, 4, 2), some_outcome(4, 1, 1), some_outcome(5, 3, 3)], 4))
    merge(parts, 1)
    assert same(parts[0], some_outcome(0, 4, 2)) and same(parts[2], some_outcome(5, 3, 3)), "merging wrote into a part"


def test_tensors_of_different_lengths_are_filled_with_zeros() -> None:
    a, b = rand(2, 3, 4) + 1, rand(3, 5, 2) + 1
    whole = stacked([a, b])
    assert whole.shape == (5, 5, 4) and whole.count_nonzero() == a.numel() + b.numel()
    assert torch.equal(whole[:2, :3], a) and torch.equal(whole[2:, :, :2], b)
    assert torch.equal(stacked([a, a[:1]]), torch.cat([a, a[:1]]))


def kept(folder: Path, **settings: Any) -> Kept:
    return Kept(folder, {"seed": 0, "attacks": [["a", None], ["a", None]], **settings})


@pytest.mark.parametrize("pictures", [0, 2])
def test_an_outcome_survives_its_file(tmp_path: Path, pictures: int) -> None:
    outcome, here = some_outcome(3, 4, pictures), kept(tmp_path / "folder")
    here.write(KEY, outcome)
    assert same(outcome, here.read(KEY))
    assert here.read(KEY._replace(number=2)) is None and kept(tmp_path).read(KEY) is None
    assert sorted(p.name for p in (tmp_path / "folder").iterdir()) == ["000001.npz", "settings.json"]


def test_a_damaged_file_counts_as_not_there(tmp_path: Path) -> None:
    outcome, here, path = some_outcome(3, 4, 2), kept(tmp_path), tmp_path / "000001.npz"
    here.write(KEY, outcome)
    data = path.read_bytes()
    for length in range(0, len(data), 211):
        path.write_bytes(data[:length])
        assert here.read(KEY) is None, f"{length} of {len(data)} bytes"
    refused = 0
    for i in range(0, len(data), 13):  # what is not refused must be unharmed, as after a change in a time stamp
        path.write_bytes(data[:i] + bytes([data[i] ^ 0x21]) + data[i + 1 :])
        found = here.read(KEY)
        refused += found is None
        assert found is None or same(outcome, found), f"byte {i}"
    assert refused > len(data) / 13 / 2


def test_what_was_made_from_the_same_is_given_back(tmp_path: Path) -> None:
    mine, outcome = kept(tmp_path), some_outcome(0, 4, 2)
    mine.write(BatchKey(3, 0, "abc"), outcome)
    mine.write(BatchKey(10, 4, "abd"), outcome)
    again = kept(tmp_path)
    assert again.other_settings() == "" and again.numbers() == [3, 10]
    assert same(outcome, again.read(BatchKey(3, 0, "abc")))
    for other in (BatchKey(3, 0, "abd"), BatchKey(3, 1, "abc"), BatchKey(4, 0, "abc")):
        assert again.read(other) is None
    assert kept(tmp_path, seed=1).read(BatchKey(3, 0, "abc")) is None


def test_what_differs_is_said(tmp_path: Path) -> None:
    key = BatchKey(0, 0, "")
    assert kept(tmp_path, about="a", threat=1.0).other_settings() == ""
    kept(tmp_path, about="a").write(key, some_outcome(0, 4, 2))
    told = kept(tmp_path, about="b", attacks=[["a", 0.5]]).other_settings()
    assert "settings: about ('a' there, 'b' here), attacks. " in told and "another folder" in told
    assert "settings: threat. " in kept(tmp_path, about="a", threat=1.0).other_settings()
    (tmp_path / "000000.npz").write_bytes(b"half of it")
    assert kept(tmp_path, about="b").other_settings() == "", "nothing whole is there that could be mixed"


@pytest.mark.parametrize("damage", [None, "", "[]", "{", "3", '{"seed": 7}'])
def test_without_its_settings_no_batch_of_others_counts(tmp_path: Path, damage: str | None) -> None:
    key, path = BatchKey(0, 0, ""), tmp_path / "settings.json"
    kept(tmp_path, about="a").write(key, some_outcome(0, 4, 2))
    path.unlink() if damage is None else path.write_text(damage)
    other = kept(tmp_path, about="b")
    assert other.other_settings() == "" and other.read(key) is None
    assert same(some_outcome(0, 4, 2), kept(tmp_path, about="a").read(key))
    other.write(BatchKey(1, 4, ""), some_outcome(4, 1, 0))
    assert "about ('b' there, 'a' here)" in kept(tmp_path, about="a").other_settings(), "the settings are whole again"


def test_processes_with_other_settings_do_not_mix_in_one_folder(tmp_path: Path) -> None:
    a, b = kept(tmp_path, about="a"), kept(tmp_path, about="b")
    keys = [BatchKey(n, 4 * n, str(n)) for n in range(3)]
    for key in keys:
        a.write(key, some_outcome(key.first, 4, 0))
    b.write(keys[1], some_outcome(90, 4, 0))
    clear(tmp_path)  # and whoever still runs goes on
    a.write(keys[2], some_outcome(8, 4, 0))
    b.write(keys[0], some_outcome(80, 4, 0))
    assert [kept(tmp_path, about="a").read(key) is not None for key in keys] == [False, False, True]
    assert [kept(tmp_path, about="b").read(key) is not None for key in keys] == [True, False, False]


def test_a_folder_that_is_cleared_while_a_batch_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real, times = tmp_path / "parts", module.np.savez, iter((True, False))

    def cleared_meanwhile(stream: Any, **arrays: Any) -> None:
        real(stream, **arrays)
        if next(times):
            clear(folder)

    monkeypatch.setattr(module.np, "savez", cleared_meanwhile)
    kept(folder).write(KEY, some_outcome(3, 4, 2))
    assert same(some_outcome(3, 4, 2), kept(folder).read(KEY))
    assert sorted(p.name for p in folder.iterdir()) == ["000001.npz", "settings.json"]


def test_nothing_is_deleted_but_what_was_kept(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    kept(folder).write(KEY, some_outcome(0, 4, 2))
    (folder / ".000001.npz.other-17.part").write_bytes(b"half")
    clear(folder)
    assert not folder.exists()
    clear(folder)
    kept(folder).write(KEY, some_outcome(0, 4, 2))
    (folder / "notes.txt").write_text("mine")
    clear(folder)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_what_is_wrapped_and_what_a_partial_holds_count_as_settings() -> None:
    def one(x: Any) -> Any:
        return x

    def two(x: Any) -> Any:
        return x

    assert digest_of_model(LogProbabilities(one)) != digest_of_model(LogProbabilities(two))
    assert digest_of_model(LogProbabilities(one)) == digest_of_model(LogProbabilities(one))
    assert describe(partial(one, 3), exact=True) != describe(partial(one, 4), exact=True)
    assert describe(partial(one, x=3), exact=True) != describe(partial(one, x=4), exact=True)


# What somebody wrote with a digest of his own


def whole_outcome() -> BatchOutcome:
    """Six examples as an evaluation has them: one wrong, two broken by the second attack, one certified."""
    correct = torch.tensor([True, True, True, True, True, False])
    robust = torch.tensor([True, True, False, True, False, False])
    label, half = torch.arange(6) % 3, torch.full((6,), 0.5)
    table = {
        "index": torch.arange(6), "label": label, "clean_prediction": torch.where(correct, label, (label + 1) % 3),
        "clean_confidence": half, "correct": correct, "certified": torch.arange(6) == 0, "robust": robust,
        "broken_by": torch.where(correct & ~robust, 1, -1), "adversarial_prediction": label,
        "adversarial_confidence": half, "size": half, "margin_left": robust.float(),
    }  # fmt: skip
    records = [AttackRecord("a", ran_on=5, standing_after=5), AttackRecord("a", ran_on=5, broke=2, standing_after=3)]
    return BatchOutcome(table, {1.0: robust}, records, [], {}, Cost(9, 9), 1.0)


WRONG: dict[str, Callable[[BatchOutcome], Any]] = {
    "a column too short": lambda o: o.table.update(size=o.table["size"][:5]),
    "numbers for flags": lambda o: o.table.update(robust=o.table["robust"].long()),
    "a certainty of 150 %": lambda o: o.table.update(clean_confidence=o.table["clean_confidence"] * 3),
    "no number": lambda o: o.table.update(margin_left=o.table["margin_left"] / 0),
    "all stand": lambda o: o.table.update(robust=torch.ones(6, dtype=torch.bool)),
    "another right": lambda o: o.table.update(correct=torch.ones(6, dtype=torch.bool)),
    "broken by none": lambda o: o.table.update(broken_by=torch.full((6,), -1)),
    "broken by an attack that is not": lambda o: o.table.update(broken_by=o.table["broken_by"].clamp(max=7) * 7),
    "more broken than tried": lambda o: o.attacks.__setitem__(1, replace(o.attacks[1], ran_on=1)),
    "counts below zero": lambda o: o.attacks.__setitem__(0, replace(o.attacks[0], skipped=-1)),
    "an attack left out": lambda o: o.attacks.pop(0),
    "another curve": lambda o: o.stands_at.update({1.0: torch.ones(4, dtype=torch.bool)}),
}


def test_what_contradicts_itself_counts_as_not_there(tmp_path: Path) -> None:
    here = kept(tmp_path)
    here.write(KEY, whole_outcome())
    assert same(whole_outcome(), here.read(KEY))
    for name, spoil in WRONG.items():
        outcome = whole_outcome()
        spoil(outcome)
        here.write(KEY, outcome)
        assert here.read(KEY) is None, name


def test_a_changed_number_does_not_have_the_digest(tmp_path: Path) -> None:
    kept(tmp_path).write(KEY, whole_outcome())
    path = tmp_path / "000001.npz"
    with np.load(path) as file:
        arrays = dict(file)
    arrays["table/size"] = arrays["table/size"] + 0.25  # which nothing contradicts
    np.savez(path, **arrays)
    assert kept(tmp_path).read(KEY) is None
