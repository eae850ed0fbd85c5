"""Single examples and the table on the page, against what the files were made of."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from markupsafe import Markup
from pages import CLASSES, right, text_of, write_run

from sparring.app.compare import comparison
from sparring.modalities.base import Shown
from sparring.report import write_report
from sparring.report.examples import fate, nearest_to_falling, side_by_side
from sparring.results.read import read_evaluation

N = 40


def part(page: Path, heading: str) -> str:
    """The page from a heading to the next."""
    text = page.read_text(encoding="utf-8")
    return re.split(r"<h2[ >]", text.split(f">{heading}</h2>")[1])[0]


def test_the_same_example_stands_beside_itself(tmp_path: Path) -> None:
    """Turned: rows 5 to 29 of one model, 8 to 29 of the other, whose galleries are the first six of these."""
    one = write_run(tmp_path / "one", "One", right(30, N), right(5, N))
    two = write_run(tmp_path / "two", "Two", right(30, N), right(8, N))
    section = part(write_report([one, two], tmp_path / "page.html"), "The same examples, model by model")
    rows = re.findall(r'<tr><th scope="row">(\d+)<br><small>in truth (\w+)</small></th>(.*?)</tr>', section, re.DOTALL)
    assert [int(index) for index, _, _ in rows] == [8, 9, 10, 5, 6, 7, 11, 12]  # both have a picture of 8 to 10
    assert [label for _, label, _ in rows] == [CLASSES[int(index) % 4] for index, _, _ in rows]
    assert [cells.count('<figure class="card"') for _, _, cells in rows] == [2, 2, 2, 1, 1, 1, 1, 1]
    assert all(f"example {index}," in cells for index, _, cells in rows)
    by_index = {int(index): cells for index, _, cells in rows}
    assert "stands, with 100\N{NO-BREAK SPACE}% of its margin left" in by_index[5] and "broken by" in by_index[11]


def test_there_is_nothing_to_set_side_by_side_for_one_model_or_other_data(tmp_path: Path) -> None:
    one = read_evaluation(write_run(tmp_path / "one", "One", right(30, N), right(5, N)))
    data = {**one.results.data.model_dump(), "name": "others"}
    two = read_evaluation(write_run(tmp_path / "two", "Two", right(30, N), right(8, N), data=data))
    galleries = [Shown([Markup('<figure class="card">a</figure>')] * 6)] * 2
    assert side_by_side([one], galleries[:1]) == side_by_side([one, two], galleries) == []
    assert len(side_by_side([one, one], galleries)) == 6
    no_cards = Shown(before=Markup("something else"))  # of a kind of input that shows none
    assert side_by_side([one, one], [no_cards] * 2) == []


def test_every_fate_has_its_words(tmp_path: Path) -> None:
    proven = right(2, N)
    run = read_evaluation(write_run(tmp_path / "one", "One", right(30, N), right(5, N), certified=proven))
    told = [fate(run, row) for row in run.rows.values()]
    counts = [sum(text.startswith(word) for text in told) for word in ("certified", "stands", "broken", "wrong")]
    assert counts == [2, 3, 25, 10]
    assert told[-1] == f"wrong without any attack: taken for {CLASSES[N % 4]}"


def test_nearest_to_falling_are_the_smallest_margins_that_stand(tmp_path: Path) -> None:
    left = np.random.default_rng(0).random(N).round(3)
    clean, robust, proven = right(30, N), right(20, N), right(3, N)
    folder = write_run(tmp_path / "one", "One", clean, robust, left=np.where(robust, left, 0), certified=proven)
    want = sorted((left[i], i) for i in range(3, 20))[:8]
    assert [(row.margin_left, row.index) for row in nearest_to_falling(read_evaluation(folder))] == want
    page = write_report([folder], tmp_path / "page.html")
    shown = re.findall(r'<tr><th scope="row">(\d+)</th><td>(\w+)</td>', part(page, "Nearest to falling"))
    assert shown == [(str(i), CLASSES[i % 4]) for _, i in want]
    assert "All in one table" not in text_of(page)


def test_the_table_on_the_page_is_that_of_compare(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, name, right(30, N), right(count, N)) for name, count in (("a", 5), ("b", 20))]
    shown = part(write_report(folders, tmp_path / "page.html"), "All in one table")
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", shown)]
    lines = comparison(folders, "markdown", print).splitlines()
    want = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [[cell.replace("\N{EN DASH}", "") for cell in row] for row in cells] == want and len(want) == 3
