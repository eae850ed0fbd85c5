"""The report page: what it says, what it refuses, and that it stays one harmless file."""

from __future__ import annotations

import json
import math
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import N, changed, metrics, right, sha_of, share, text_of, write_run

from sparring.modalities.images.show import most_changed, pictures
from sparring.report import write_report
from sparring.report.words import duration, points
from sparring.results.compare import compare
from sparring.results.read import read_evaluation
from sparring.results.schema import Metric
from sparring.results.statistics import paired_change, unpaired_change


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Standard: 390 clean, 12 robust. Hardened: 380 clean (15 lost, 5 gained), 240 robust."""
    hardened = right(380, shift=15)
    return [write_run(tmp_path / "standard", "Standard", right(390), right(12)),
            write_run(tmp_path / "hardened", "Hardened", hardened, hardened & right(240, shift=15))]  # fmt: skip


class Links(HTMLParser):
    """Collects every address, the tags, and the headings' levels."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]


def parsed(page: Path) -> Links:
    links = Links()
    links.feed(page.read_text(encoding="utf-8"))
    return links


def test_page_is_one_file_that_loads_nothing(pair: list[Path], tmp_path: Path) -> None:
    out = write_report(pair, tmp_path / "new" / "report.html")
    text, links = out.read_text(encoding="utf-8"), parsed(out)
    assert [p.name for p in out.parent.iterdir()] == ["report.html"]
    assert "http://" not in text and "https://" not in text and "@import" not in text
    assert len([a for a in links.addresses if a.startswith("data:image/png;base64,")]) == (2 * (6 + 1) + 8) * 3
    assert all(a.startswith(("data:image/png;base64,", "#")) for a in links.addresses)
    assert not {"script", "link", "iframe", "object", "embed"} & set(links.tags)
    assert all(a.startswith("#p") or a.startswith("#m") or a.startswith("data:") for a in links.addresses)


def test_page_is_accessible(pair: list[Path], tmp_path: Path) -> None:
    out = write_report(pair, tmp_path / "r.html")
    text, tags = out.read_text(encoding="utf-8"), parsed(out).tags
    levels = [int(t[1]) for t in tags if re.fullmatch("h[1-6]", t)]
    assert '<html lang="en">' in text and "<title>How robust are Standard and Hardened?</title>" in text
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))
    assert len(re.findall(r'<svg role="img" aria-label="[^"]{20,}"', text)) == 9
    assert all("alt=" in image for image in re.findall("<img[^>]*>", text))
    assert text.count("<figure") == text.count("<figcaption")


def test_the_contents_name_every_part_and_lead_there(pair: list[Path], tmp_path: Path) -> None:
    text = write_report(pair, tmp_path / "r.html").read_text(encoding="utf-8")
    parts = dict(re.findall(r'<h2 id="([^"]+)">(.*?)</h2>', text))
    contents = text[text.index("<nav") : text.index("</nav>")]
    assert len(parts) == len(re.findall("<h2", text)) >= 9
    assert re.findall(r'<a href="#([^"]+)">(.*?)</a>', contents) == list(parts.items())
    assert set(re.findall(r'<a href="#([^"]+)"', text)) <= parts.keys()


def test_a_picture_of_an_attack_stands_near_the_top(pair: list[Path], tmp_path: Path) -> None:
    text = write_report(pair, tmp_path / "r.html").read_text(encoding="utf-8")
    head, rest = text.split("<main>")
    cards = re.findall(r"<figure class=\"card.*?</figure>", head, flags=re.S)
    assert len(cards) == 2 and all(card.count("<img") == 3 and card in rest for card in cards)  # one for each model
    (pair[0] / "gallery.npz").unlink()
    head = write_report(pair[:1], tmp_path / "r.html").read_text(encoding="utf-8").split("<main>")[0]
    assert "<figure" not in head and "further down" not in head


def test_nothing_certified_by_interval_bounds_says_that_they_are_loose(tmp_path: Path) -> None:
    none, some = np.zeros(N, dtype=bool), right(3)
    said = "interval bounds are loose for networks that were not trained for them"
    cases = ((none, "interval_margin", True), (some, "interval_margin", False), (none, "own", False))
    for certified, name, loose in cases:
        run = write_run(tmp_path / "a", "A", right(390), right(12), certified=certified,
                        certification={"name": name, "settings": None})  # fmt: skip
        assert (said in text_of(write_report([run], tmp_path / "r.html"))) == loose


def test_plots_take_the_colours_of_the_page(pair: list[Path], tmp_path: Path) -> None:
    text = write_report(pair, tmp_path / "r.html").read_text(encoding="utf-8")
    plots = "".join(re.findall(r'<svg role="img".*?</svg>', text, flags=re.S))
    assert "currentColor" in plots and "var(--s0)" in plots and "var(--s1)" in plots
    assert not re.findall(r"#[0-9a-f]{6}\b(?!\w)", re.sub(r'#[pm][0-9a-f]+|id="[^"]*"', "", plots))


def test_same_input_same_bytes(pair: list[Path], tmp_path: Path) -> None:
    first, second = (write_report(pair, tmp_path / f"{i}.html") for i in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_the_numbers_on_the_page(pair: list[Path], tmp_path: Path) -> None:
    text = text_of(write_report(pair, tmp_path / "r.html"))
    assert "Standard: 97.5 % right on clean inputs, 3.0 % under attack." in text
    assert "Hardened: 95.0 % right on clean inputs, 60.0 % under attack." in text
    assert "Hardening gained 57.0 points under attack, at the price of 2.5 points on clean inputs" in text
    assert "with 7.5 times the training time" in text
    assert "95.5 to 98.6 %" in text and "55.1 to 64.7 %" in text  # Wilson, n = 400, counts 390 and 240
    assert "Of the same 400 examples, 5 are right only in Hardened and 15 only in Standard" in text
    assert "(McNemar's exact test, p = 0.041)" in text and "would come up in 41 of 1 000 such comparisons" in text
    assert "Every value of the input may change by at most 8/255. An opponent with this freedom" in text
    assert "aeroplane (98.0 %) → car (87.0 %) example 12, in truth aeroplane" in text
    assert "This is robust overfitting" in text and "epoch 12" in text


def test_difference_within_chance_is_called_so(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a", "A", right(300), right(100, shift=5)),
            write_run(tmp_path / "b", "B", right(300, shift=3), right(100, shift=5))]  # fmt: skip
    text = text_of(write_report(runs, tmp_path / "r.html"))
    assert "Hardening made no difference under attack beyond chance, with no clear change on clean inputs" in text
    assert "3 are right only in B and 3 only in A (McNemar's exact test, p = 1.00): if both models were" in text
    assert "would come up in 100 of 100 such comparisons. Within chance:" in text
    assert "Chance alone hardly" not in text


def test_paired_change_against_hand_computation() -> None:
    # 10 examples: 1 lost, 7 gained. Exact test: 2 * (1 + 8) / 2**8.
    change = paired_change([True, True] + [False] * 8, [True, False] + [True] * 7 + [False])
    assert change.test and (change.test.only_a, change.test.only_b, change.n) == (1, 7, 10)
    assert change.test.p_value == pytest.approx(18 / 256)
    assert change.difference == pytest.approx(0.6) and change.within_chance
    spread = 1.959963984540054 * math.sqrt((9 - 36 / 12) / 12**2)  # Agresti-Min with n + 2 = 12
    assert (change.low, change.high) == pytest.approx((0.5 - spread, 0.5 + spread))


def test_unpaired_interval_against_published_value() -> None:
    # Newcombe (1998), example (a): 56/70 against 48/80, method 10 gives 0.0524 to 0.3339.
    change = unpaired_change(Metric(**share(right(48, 80))), Metric(**share(right(56, 70))))
    assert (change.low, change.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    assert change.test is None and not change.within_chance


def test_one_model_is_known_by_its_weights_or_else_by_its_answers(pair: list[Path]) -> None:
    def same(**model: Any) -> bool:
        return compare(read_evaluation(pair[0]), read_evaluation(changed(pair[1], model=model))).same_model

    changed(pair[0], model={"name": "cnn", "sha256": sha_of("w")})
    assert same(name="cnn", sha256=sha_of("w")) and not same(name="cnn", sha256=sha_of("v"))
    assert not same(name="other.py:defended", sha256=sha_of("w"))  # the same weights, in another network
    changed(pair[0], model={"name": "my.py:net", "sha256": None})
    assert not same(name="my.py:net", sha256=None)  # the clean answers differ
    write_run(pair[1], "Hardened", right(390), right(5))
    assert same(name="my.py:net", sha256=None)
    assert not compare(read_evaluation(pair[0]), read_evaluation(changed(pair[1], model=None))).same_model


def test_pairing_uses_the_shared_examples_only(pair: list[Path]) -> None:
    hardened = right(380, shift=15)[100:]
    write_run(pair[1], "Hardened", hardened, hardened & right(240, shift=15)[100:], index=np.arange(100, N))
    effect = compare(read_evaluation(pair[0]), read_evaluation(pair[1]))
    assert effect.clean.n == 300 and effect.clean.test and effect.clean.test[:2] == (0, 5)
    assert "300 examples" in effect.cautions[0]


@pytest.mark.parametrize("what", ["no csv", "other labels", "other data"])
def test_what_cannot_be_paired_is_said(pair: list[Path], what: str, tmp_path: Path) -> None:
    if what == "no csv":
        (pair[0] / "examples.csv").unlink()
    elif what == "other labels":
        write_run(pair[0], "Standard", right(390), right(12), labels=np.full(N, 3))
    else:
        changed(pair[1], data={"kind": "images", "name": "other", "split": "test", "shape": [3, 16, 16]})
    effect = compare(read_evaluation(pair[0]), read_evaluation(pair[1]))
    assert effect.robust.test is None and effect.robust.difference == pytest.approx(0.57)
    text = text_of(write_report(pair, tmp_path / "r.html"))
    assert "could not be paired" in text and "McNemar's exact test, p " in text and "are right only" not in text


UNLIKE = [
    ("threat", {"text": "linf:1/255", "words": "Little."}, "threat models"),
    ("threat", {"text": "linf:8/255", "words": "The same?", "settings": {"norm_of_tokens": 2.0}}, "threat models"),
    ("attacks", "other settings", "attacks"),
]


@pytest.mark.parametrize(("key", "value", "says"), UNLIKE)
def test_unlike_measurements_are_not_compared_in_silence(
    pair: list[Path], tmp_path: Path, key: str, value: Any, says: str
) -> None:
    plain = text_of(write_report(pair, tmp_path / "r.html"))
    attacks = json.loads((pair[1] / "results.json").read_text())["attacks"]
    changed(pair[1], **{key: [entry | {"settings": {}} for entry in attacks] if key == "attacks" else value})
    text = text_of(write_report(pair, tmp_path / "r.html"))
    assert f"Measured with different {says}" in text and "Read with the reservation below." in text
    assert "Measured with different" not in plain and "reservation" not in plain


def test_classes_that_lost_most(pair: list[Path], tmp_path: Path) -> None:
    labels = np.arange(N) % 4
    clean = (labels != 2) | (np.arange(N) > 200)
    write_run(pair[0], "Standard", right(N), right(0))
    write_run(pair[1], "Hardened", clean, clean & (labels != 1))
    text = text_of(write_report(pair, tmp_path / "r.html"))
    assert re.search(r"Lost most on clean inputs: bird \(-5[01]\.0 points\)\. Gained least", text)
    assert "Gained least under attack: car (0.0 points, within chance); " in text


def test_text_from_files_is_escaped(pair: list[Path], tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>$x_{$"
    for folder in pair:
        results = json.loads((folder / "results.json").read_text())
        results["data"]["class_names"] = [evil] * 4
        for entry in results["per_class"]:
            entry["name"] = evil
        for entry in results["attacks"]:
            entry["name"] = evil
        results["threat"] |= {"text": evil, "words": evil}
        table = (folder / "examples.csv").read_text()
        quoted = '"' + evil.replace('"', '""') + '"'
        for known in ("fgsm", "pgd"):
            table = table.replace(f",{known},", f",{quoted},")
        (folder / "examples.csv").write_text(table)
        finding = {"name": evil, "sentence": evil, "numbers": {evil: evil}}
        results |= {"name": evil, "command": evil, "findings": [finding]}
        results["training"] |= {"recipe": evil, "stopped": evil, "config": {evil: evil}}
        results["metrics"][evil] = share(right(3))
        (folder / "results.json").write_text(json.dumps(results))
    out = write_report(pair, tmp_path / "r.html", title=evil)
    text, links = out.read_text(encoding="utf-8"), parsed(out)
    assert "<script" not in text and "<img src=x" not in text and "&lt;script&gt;" in text
    assert "script" not in links.tags and "x" not in links.addresses
    assert f"{'&lt;script&gt;alert(1)&lt;/script&gt;'}" in text and " (2)" in text


def test_findings_and_rejected_results_are_visible(tmp_path: Path) -> None:
    finding = {"name": "weak_gradient", "sentence": "The gradient vanishes.", "numbers": {"share": 0.25}}
    run = write_run(tmp_path / "a", "A", right(390), right(12), findings=[finding])
    results = json.loads((run / "results.json").read_text())
    results["attacks"][1]["rejected"]["outside_set"] = 7
    (run / "results.json").write_text(json.dumps(results))
    text = text_of(write_report([run], tmp_path / "r.html"))
    before_details = text[: text.rindex("What was tried")]
    assert "weak gradient. The gradient vanishes. share 0.25" in before_details
    assert "7 results of pgd were rejected." in before_details and "outside set: 7" in before_details


def test_settings_to_repeat_it_are_there(pair: list[Path], tmp_path: Path) -> None:
    text = text_of(write_report(pair, tmp_path / "r.html"))
    for needle in (
        "sparring evaluate runs/Hardened",
        "batch_size",
        "num_steps",
        "linf:8/255",
        "threads",
        sha_of("Hardened"),
    ):
        assert needle in text


def test_missing_parts_are_left_out_with_a_sentence(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "A", right(390), right(12), training=None, command=None)
    (run / "gallery.npz").unlink()
    (run / "examples.csv").unlink()
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "gallery.npz is missing" in text and "without a record of the training" in text
    assert "started from Python" in text and "What hardening changed" not in text


def test_sparse_but_valid_results(tmp_path: Path) -> None:
    """Only what a page needs: nothing was attacked, nothing right, a threat of its own, an empty history."""
    bare = {"attacks": [], "curve": [], "per_class": [], "threat": {"text": "words:2", "words": "Two of five."},
            "model": None, "cost": None, "environment": {}}  # fmt: skip
    run = write_run(tmp_path / "a", "A", right(0, 9), right(0, 9), **bare)
    results = json.loads((run / "results.json").read_text())
    results["training"] |= {"history": [], "best": {}, "last": {}, "best_epoch": -1, "stopped": "It was interrupted."}
    (run / "results.json").write_text(json.dumps(results))
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "Two of five. An opponent" in text and "No attack was run." in text
    assert "No example was turned" in text and "No record of the single epochs" in text
    assert "It was interrupted." in text and "Security curve" not in text


def test_other_metrics_get_a_table(tmp_path: Path) -> None:
    own = {
        "mean_words_changed": {"value": 1.5, "low": 1.25, "high": 1.75, "n": N, "count": None},
        "recall": share(right(30)),
    }
    clean, robust = right(390), right(12)
    runs = [write_run(tmp_path / "a", "A", clean, robust, metrics=metrics(clean, robust, **own)),
            write_run(tmp_path / "b", "B", clean, robust)]  # fmt: skip
    text = text_of(write_report(runs, tmp_path / "r.html"))
    assert "also measured A 95 % interval B 95 % interval" in text
    assert "mean words changed 1.5 1.25 to 1.75 \N{EN DASH} \N{EN DASH}" in text
    assert "recall 7.5 % 5.3 to 10.5 %" in text and "attack success" not in text
    assert "also measured" not in text_of(write_report(runs[1:], tmp_path / "r.html"))


def test_a_kind_of_input_that_is_not_known_has_no_pictures(tmp_path: Path) -> None:
    other = {"kind": "smells", "name": "toy", "split": "test"}
    run = write_run(tmp_path / "a", "A", right(390), right(12), data=other)
    text = text_of(write_report([run], tmp_path / "r.html"))
    assert "This kind of input has nothing to show." in text


def test_history_without_validation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "A", right(390), right(12))
    results = json.loads((run / "results.json").read_text())
    lines = [{"epoch": line["epoch"], "train_loss": line["train_loss"]} for line in results["training"]["history"]]
    results["training"] |= {"history": lines, "best": {}, "last": lines[-1], "best_epoch": -1}
    (run / "results.json").write_text(json.dumps(results))
    text = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert ">training loss<" in text and ">under attack</text>" not in text and ">best epoch<" not in text


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("results.json", None, "is not there"),
        ("results.json", '{"schema": "spar', "not valid JSON"),
        ("results.json", "[]", "got list"),
        ("results.json", '{"schema": "sparring.results/9"}', "sparring.results/9"),
        ("results.json", '{"schema": "sparring.results/2"}', "name: Field required"),
        ("examples.csv", "index,label\n0,1\n", "clean_prediction"),
        ("gallery.npz", "no archive", "npz without pickle"),
    ],
)
def test_broken_files_are_refused(pair: list[Path], tmp_path: Path, file: str, content: str | None, says: str) -> None:
    broken, out = pair[1] / file, tmp_path / "out" / "r.html"
    broken.unlink()
    if content is not None:
        broken.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        write_report(pair, out)
    assert str(broken) in str(caught.value) and "sparring evaluate" in str(caught.value)
    assert not out.exists()


def test_numbers_that_are_none_are_refused(pair: list[Path], tmp_path: Path) -> None:
    results = json.loads((pair[0] / "results.json").read_text())
    results["metrics"]["robust_accuracy"]["low"] = "<b>"
    (pair[0] / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=r"metrics\.robust_accuracy\.low"):
        write_report(pair, tmp_path / "r.html")
    with pytest.raises(ValueError, match="at least one folder"):
        write_report([], tmp_path / "r.html")


def test_pickle_in_the_gallery_is_not_opened(pair: list[Path], tmp_path: Path) -> None:
    np.savez(pair[0] / "gallery.npz", index=np.array([{"a": 1}], dtype=object), x=np.zeros(1))
    with pytest.raises(ValueError, match="without pickle"):
        write_report(pair, tmp_path / "r.html")


def test_flat_features_become_a_table(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "A", right(390), right(12), shape=(20,))
    out = write_report([run], tmp_path / "r.html")
    assert "img" not in parsed(out).tags and '<th scope="row">0</th>' in out.read_text()
    assert "The features that changed most" in text_of(out)
    changed = most_changed(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.5, 1.0, -1.0, 3.1]))
    assert [(c["feature"], c["after"]) for c in changed] == [(0 + 2, -1.0), (0, 0.5), (3, 3.1)]


def test_pictures_magnify_the_change_to_the_full_range() -> None:
    x = np.full((3, 4, 4), 0.5)
    shown = pictures(x, x + 0.05, 0.0, 1.0)
    assert shown is not None and shown["factor"] == pytest.approx(10.0)
    assert pictures(x[:2], x[:2], 0.0, 1.0) is None and pictures(x[0], x[0], 0.0, 1.0) is None
    assert pictures(x, x, 0.0, 1.0) is not None  # no change at all: no division by zero


def test_words() -> None:
    assert points(-0.0001) == "0.0" and points(-0.041) == "\N{MINUS SIGN}4.1" and points(0.5) == "+50.0"
    times = [duration(s).replace("\u00a0", " ") for s in (0.42, 99, 600, 7200, None)]
    assert times == ["0.4 s", "99 s", "10 min", "2.0 h", "\N{EN DASH}"]


def browser(folder: Path, *options: str) -> str:
    """What Chromium writes to stdout."""
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    done = subprocess.run([*command, f"--user-data-dir={folder / 'profile'}", *options], check=True,
                          capture_output=True, timeout=120)  # fmt: skip
    return done.stdout.decode()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium on PATH")
@pytest.mark.parametrize("width", [360, 1200])
def test_browser_draws_it_without_sideways_scrolling(pair: list[Path], tmp_path: Path, width: int) -> None:
    page, shot = write_report(pair, tmp_path / "r.html", title="A" * 200), tmp_path / "r.png"
    browser(tmp_path, f"--screenshot={shot}", f"--window-size={width},900", page.as_uri())
    head = shot.read_bytes()
    assert head[:8] == b"\x89PNG\r\n\x1a\n" and struct.unpack(">II", head[16:24]) == (width, 900)
    assert len(head) > 15_000  # a page of one colour has less than 5 kB
    open_page = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))
    open_page = open_page.replace("<details>", "<details open>")
    measure = "<script>parent.postMessage(innerWidth + ' ' + document.documentElement.scrollWidth, '*')</script></body>"
    (tmp_path / "inner.html").write_text(open_page.replace("</body>", measure), encoding="utf-8")
    frame = f"<iframe src=inner.html style='border:0;width:{width}px;height:900px'></iframe>"
    (tmp_path / "outer.html").write_text(f"<script>onmessage = m => document.title = m.data</script>{frame}")
    dom = browser(tmp_path, "--dump-dom", "--virtual-time-budget=5000", (tmp_path / "outer.html").as_uri())
    assert f"<title>{width} {width}</title>" in dom
