"""Every example runs, and every claim in its comments is measured here."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


def load(path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module that is forgotten after the test."""
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def own_loop(found: dict[str, Any], out: str) -> None:
    assert "They look normalised" in out
    assert found["hardened"].robust.count > found["plain"].robust.count
    assert "examples.csv, gallery.npz, report.html, results.json" in out


def two_recipes(table: str, out: str) -> None:
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith(("| pgd-at", "| trades"))]
    assert [row[1] for row in rows] == ["3", "3"]
    assert all("±" in row[3] for row in rows)


def black_box_over_http(found: tuple[Any, Any], out: str) -> None:
    evaluation, remote = found
    assert evaluation.robust.count < evaluation.clean.count
    assert str(remote.rows) in out
    assert [finding.name for finding in evaluation.findings] == ["no_gradient"]


CLAIMS: dict[str, Callable[[Any, str], None]] = {f.__name__: f for f in (own_loop, two_recipes, black_box_over_http)}
"""What is asked of an example beside that it runs, by its name: of what its main returned and printed."""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_prints_and_leaves_the_generator_alone(
    path: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    before = torch.get_rng_state()
    result = load(path, monkeypatch).main()
    assert torch.equal(torch.get_rng_state(), before)
    out = capsys.readouterr().out
    assert out
    widest = 400 if path.stem == "two_recipes" else 120  # a Markdown table
    assert max(map(len, out.splitlines())) <= widest
    CLAIMS.get(path.stem, lambda *_: None)(result, out)


@pytest.fixture
def textbook(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(Path(__file__).parents[1] / "examples" / "textbook.py", monkeypatch)


@pytest.fixture
def tables(textbook: ModuleType) -> dict[str, dict[str, float]]:
    return textbook.main()


def test_textbook_without_a_loss(tables: dict[str, dict[str, float]]) -> None:
    found = tables["(a) no loss"]
    assert found["gradient of the sum of the outputs, length"] < 1e-12
    assert found["gradient of the loss, length"] > 0.1
    at_x = found["probability of the class at x"]
    assert found["... after ascending the sum of the outputs"] == pytest.approx(at_x, abs=1e-12)
    assert found["... after ascending the largest output"] > at_x + 1e-4
    assert found["... after ascending the loss"] < at_x - 1e-4


def test_textbook_softmax_twice(tables: dict[str, dict[str, float]]) -> None:
    found = tables["(b) softmax twice"]
    assert found["gradient length, softmax twice / once"] < 0.2
    assert found["... towards another class, logits times 100"] < 1e-15
    assert found["... after Sparring's preflight"] == pytest.approx(1)
    at_x = found["loss at x"]
    twice = found["... after 10 raw gradient steps, softmax twice"] - at_x
    once = found["... after 10 raw gradient steps, softmax once"] - at_x
    assert 0 < twice < 0.2 * once
    assert found["... after them through the preflight"] - at_x == pytest.approx(once)
    assert found["FGSM, largest difference between the two"] == 0  # "the sign hides that"


def test_textbook_steps_of_epsilon(tables: dict[str, dict[str, float]]) -> None:
    found = tables["(c) steps as long as epsilon"]
    assert found["x: PGD with steps of epsilon, distance from FGSM"] < 1e-12
    assert found["x: steps of epsilon / 8, random start, distance"] < 1e-12
    assert 0.05 < found["500: share where steps of the radius equal FGSM"] < 0.5
    assert found["500: farthest entry from -radius, 0 or +radius"] < 1e-9
    order = ["FGSM", "PGD, steps of the radius", "PGD, steps of radius / 8", "PGD, radius / 8, 5 random starts"]
    for what in ("mean loss", "share fooled"):
        values = [found[f"500: {what}, {name}"] for name in order]
        assert values == sorted(set(values)), values  # each strictly better than the one before


def test_textbook_pgd_knows_three_places_only(textbook: ModuleType) -> None:
    net = textbook.make_net()
    x = torch.rand(50, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = (textbook.textbook_pgd(net, x, net(x).argmax(1), 0.3) - x) / 0.3
    assert torch.allclose(moved, moved.round(), rtol=0, atol=1e-9)
    assert set(moved.round().flatten().tolist()) == {-1.0, 0.0, 1.0}


def test_textbook_without_a_valid_range(tables: dict[str, dict[str, float]]) -> None:
    found = tables["(d) no valid range"]
    assert found["textbook FGSM, lowest entry"] == pytest.approx(-0.01)
    assert found["textbook FGSM, highest entry"] == pytest.approx(1.01)
    assert not found["textbook's is a valid input (1 = yes)"]
    assert found["Sparring's FGSM, lowest entry"] == 0
    assert found["Sparring's FGSM, highest entry"] == 1
    assert found["Sparring's is a valid input (1 = yes)"]


def test_textbook_wrong_way(tables: dict[str, dict[str, float]]) -> None:
    found = tables["(e) a targeted loss ascended"]
    at_x = found["probability of the wanted class at x"]
    assert found["... after ascending its loss (textbook)"] < at_x - 1e-4
    assert found["... after descending it (Sparring, wanted=...)"] > at_x + 1e-4
    assert found["... and after the attack"] > found["what Sparring climbs: minus the loss, at x"]


def test_textbook_done_right(tables: dict[str, dict[str, float]]) -> None:
    at_x, ascent, one_step, many_steps = tables["done right"].values()
    assert at_x < ascent <= one_step <= many_steps + 1e-12


def test_textbook_is_the_network_of_the_textbook(textbook: ModuleType) -> None:
    net = textbook.make_net()
    assert [tuple(p.shape) for p in net.parameters()] == [(10, 5), (10,), (10, 10), (10,)]
    x = torch.rand(4, 5, dtype=torch.float64)
    assert torch.allclose(net(x).sum(1), torch.ones(4, dtype=torch.float64))
    source = Path(textbook.__file__).read_text(encoding="utf-8")
    assert [source.count(f"MISTAKE ({letter})") for letter in "abcde"] == [1] * 5


def test_collapse_is_rescued(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load(Path(__file__).parents[1] / "examples" / "collapse.py", monkeypatch).main()
    (real, _), (alone, none), (guarded, ways) = found.values()
    assert none == 0 and alone.spread < 0.5 * real.spread and alone.entropy < 0.85 and min(alone.shares) == 0
    assert ways == 1 and guarded.spread > 0.5 * real.spread and guarded.entropy > 0.9


def test_spam_is_evaded_and_the_hardened_filter_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    example = load(Path(__file__).parents[1] / "examples" / "spam.py", monkeypatch)
    found = example.main()
    for name in ("plain", "hardened"):
        assert found[name]["recall"] > 0.9 and found[name]["false alarms"] < 0.1
        assert found[name]["both"] <= min(found[name]["misspelt"], found[name]["replaced"])
    assert found["plain"]["both"] < 0.7 < 0.9 < found["hardened"]["both"]
    with pytest.raises(SystemExit, match="expected one that is called spam"):
        rows = [f"message {i}\t{'xy'[i % 2]}\n" for i in range(40)]
        (tmp_path / "other.tsv").write_text("text\tlabel\n" + "".join(rows), encoding="utf-8")
        example.main(f"text:{tmp_path / 'other.tsv'}")
