"""Reading tables as people have them, and the way from a file to the gate on the command line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from command import call
from sparring.app.evaluate import evaluate
from sparring.modalities import find, load_data
from sparring.modalities.tables.read import load_table, read_csv
from sparring.modalities.tables.schema import Schema
from sparring.modalities.tables.show import show_rows
from sparring.results.read import read_evaluation

TEXT = """
label = "kind"
attacked = ["bad", "worse"]
ignore = ["id"]
[columns]
n = {type = "integer", low = 0, high = 50, unit = 5}
r = {type = "real", missing = -1}
"Flow Bytes/s" = {type = "real", scale = "log", low = 0}
p = {type = "category", values = ["tcp", "NA", "a, b"], change = "none"}
f = {type = "boolean"}
"""
COUNTS = """
label = "y"
attacked = "bad"
[columns]
a = {type = "integer", low = 0, high = 9}
"b c" = {type = "real", low = 0, high = 9, step = 0.1}
p = {type = "category", values = ["x", "y, z"]}
"""
TREE = """
import numpy as np
from sklearn.tree import DecisionTreeClassifier

def grown():
    draw = np.random.default_rng(0)
    x = np.concatenate([draw.integers(0, 10, (300, 2)), np.eye(2)[draw.integers(0, 2, 300)]], 1)
    return DecisionTreeClassifier(random_state=0).fit(x, x[:, 0] + x[:, 1] > 9)
"""


def test_what_is_read_again_is_what_is_there_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read last is kept, but not where the schema or the folder of known tables is another one."""
    schema = tmp_path / "t.toml"
    schema.write_text(COUNTS)
    text = f"table:known,schema={schema}"
    monkeypatch.setattr("sparring.modalities.tables.read.KNOWN_TABLES", {"known": ("t.csv", "")})
    for name, lines in (("one", "1,2.0,x,bad\n3,4.0,x,good\n"), ("other", "1,2.0,x,bad\n3,4.0,x,good\n9,9.0,x,good\n")):
        (tmp_path / name / "known").mkdir(parents=True)
        (tmp_path / name / "known" / "t.csv").write_text("a,b c,p,y\n" + lines * 10)
    monkeypatch.setenv("SPARRING_DATA", str(tmp_path / "one"))
    first = load_data(text)
    assert load_data(text) is first
    monkeypatch.setenv("SPARRING_DATA", str(tmp_path / "other"))
    assert [len(data.y_train) + len(data.y_test) for data in (first, load_data(text))] == [20, 30]
    schema.write_text(COUNTS.replace('"bad"', '"good"'))
    again = load_data(text)
    assert int(again.y_train.sum() + again.y_test.sum()) == 20


def test_attacked_rows_go_to_csv_that_the_schema_reads_and_training_takes(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    a, b, p = draw.integers(0, 10, 200), draw.integers(0, 90, 200) / 10, draw.integers(0, 2, 200)
    kinds = np.array(["x", '"y, z"'])[p]
    lines = [f"{i},{j},{k},{'bad' if i + j > 9 else 'good'}" for i, j, k in zip(a, b, kinds, strict=True)]
    (tmp_path / "t.csv").write_text("a,b c,p,y\n" + "\n".join(lines) + "\n")
    (tmp_path / "t.toml").write_text(COUNTS)
    (tmp_path / "m.py").write_text(TREE)
    text = f"table:{tmp_path}/t.csv,schema={tmp_path}/t.toml"
    for name in ("adv.csv", "adv.npz"):
        code, out, err = call(
            "attack", "--model", f"{tmp_path}/m.py:grown", "--data", text, "--threat", "columns:1.5,norm=l1", "--split",
            "train", "--out", f"{tmp_path}/{name}",
        )  # fmt: skip
        assert code == 0 and "adversarial examples" in out, err
    known = Schema.read(tmp_path / "t.toml")
    rows, labels = read_csv(str(tmp_path / "adv.csv"), known)
    arrays = np.load(tmp_path / "adv.npz", allow_pickle=False)
    assert np.array_equal(rows, arrays["x_adv/rows"]) and len(rows) > 3 and {*labels} == {"bad"}
    plain, more = load_data(text), load_data(f"{text},found={tmp_path}/adv.csv")
    num = len(plain.y_train)
    assert len(more.y_train) == num + len(rows) and torch.equal(more.x_train["rows"][:num], plain.x_train["rows"])
    assert np.array_equal(more.x_train["rows"][num:].numpy(), rows) and bool((more.y_train[num:] == 1).all())
    assert bool(more.x_train["may_change"][num:].all()) and torch.equal(more.x_test["rows"], plain.x_test["rows"])
    assert more.facts == plain.facts  # a network is told of the data, not of the opponent
    code, _, err = call(
        "attack", "--model", f"{tmp_path}/m.py:grown", "--data", text, "--threat", "columns:1,norm=l1", "--out",
        f"{tmp_path}/adv.txt",
    )  # fmt: skip
    assert code == 2 and "ends in .npz" in err


HEADER = "id,n,r,Flow Bytes/s,p,f,kind\n"
ROW = "7,3,0.5,1e3,tcp,True,good\n"


def read(content: str | bytes, tmp_path: Path, **options: str) -> tuple[np.ndarray, list[str]]:
    (tmp_path / "t.csv").write_bytes(content.encode() if isinstance(content, str) else content)
    return read_csv(str(tmp_path / "t.csv"), Schema.of(TEXT), **options)


PLAIN = [3, 0.5, 1000, 1, 0, 0, 1]


@pytest.mark.parametrize(
    "content",
    [
        HEADER + ROW, "\ufeff" + HEADER + ROW, HEADER.replace(",", " , ") + ROW.replace(",", ", "),
        HEADER + ",,,,,,\n" + ROW, HEADER + ROW + HEADER, HEADER + ROW.strip() + ",\n",
        HEADER.strip() + ",\n" + ROW.strip() + ",\n", HEADER + ROW + "\n\n",
        HEADER.replace("\n", "\r\n") + ROW.replace("\n", "\r\n"), HEADER + ROW.replace("True", "YES"),
        "n,r,kind,p,f,Flow Bytes/s\n3,.5,good,tcp,1,1000.0\n",
    ],
    ids=["plain", "byte-order mark", "blanks", "empty row", "header again", "comma too many", "comma in the header too",
         "empty lines", "windows", "yes", "other order, nothing to ignore"],
)  # fmt: skip
def test_what_is_handled_reads_as_the_plain_file(content: str, tmp_path: Path) -> None:
    x, labels = read(content, tmp_path)
    assert x.tolist() == [PLAIN] and labels == ["good"] and x.dtype == np.float64


def test_values_that_look_missing_or_quoted_are_what_they_are(tmp_path: Path) -> None:
    rows = '1,0,,0,NA,0,good\n2,1,nan,5,"a, b",no,NA\n3,9007199254740992,Infinity,0,tcp,1,worse\n'
    x, labels = read(HEADER + rows, tmp_path)
    assert labels == ["good", "NA", "worse"] and x[:, 1].tolist() == [-1, -1, -1]  # missing = -1
    assert x[:, 3:6].tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0]] and int(x[2, 0]) == 2**53
    with gzip.open(tmp_path / "t.csv.gz", "wt") as stream:
        stream.write(HEADER + rows)
    assert np.array_equal(read_csv(str(tmp_path / "t.csv.gz"), Schema.of(TEXT))[0], x)
    assert np.array_equal(read((HEADER + rows).encode("utf-16"), tmp_path, encoding="utf-16")[0], x)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (HEADER + ROW + ROW.replace(",3,", ',"1,234",'), r"column 'n', row 3: got '1,234'; expected a finite number"),
        (HEADER + ROW.replace(",3,", ",0x0b,"), "'n', row 2: got '0x0b'"),
        (HEADER + ROW.replace(",3,", ",,"), "got ''"),
        (HEADER + ROW.replace(",3,", ",1_0,"), "got '1_0'"), (HEADER + ROW.replace(",3,", ",-,"), "got '-'"),
        (HEADER + ROW.replace(",3,", ",3.5,"), "'n', row 2: got '3.5'; expected a whole number"),
        (HEADER + ROW.replace(",3,", ",9007199254740994,"), "below 2.53.*an id belongs into ignore"),
        (HEADER + ROW.replace("1e3", "Infinity"), "column 'Flow Bytes/s', row 2: got 'Infinity'.*missing = NUMBER"),
        (HEADER + ROW.replace("1e3", "NaN"), "got 'NaN'"), (HEADER + ROW.replace("1e3", "-1"), "no negative number"),
        (HEADER + ROW.replace("tcp", "TCP"), "column 'p', row 2: got 'TCP'; expected one of tcp, NA"),
        (HEADER + ROW.replace("True", "2"), "column 'f', row 2: got '2'; expected 0 or 1"),
        (HEADER + ROW + "1,2,3\n", "row 3 has 3 cells, the header has 7"),
        (HEADER + ROW.strip() + ",\n" + ROW, "row 2 has 8 cells"),
        (HEADER + "7,3,0,5,1,tcp,1,good\n", "columns would be shifted"),
        (HEADER.replace("r,", " n ,") + ROW, "'n' names the columns 2 and 3"),
        (HEADER.replace("kind", "Kind") + ROW, r"lacks the column\(s\) 'kind' of the schema; there is 'Kind'"),
        (HEADER.replace("id", "key") + ROW, r"has the column\(s\) 'key' that the schema does not know"),
        (HEADER.replace("id", "") + ROW, "the row number that pandas saves"), (HEADER, "no row of data"),
        ("", "no row of data"),
        ((HEADER + ROW).encode("utf-16"), "name it: encoding=cp1252"),
        ((HEADER + ROW.replace("good", "Web \u2013 XSS")).encode("cp1252"), "is not utf-8-sig.*encoding=cp1252"),
        (HEADER + '"7', "row 2 has 1 cell"),
        ((HEADER + ROW).replace(",", ";"), "one name holds several, parted by something else than the commas"),
    ],
)  # fmt: skip
def test_what_will_not_do_is_told_with_row_and_value(content: str | bytes, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"t\.csv.*{sentence}"):
        read(content, tmp_path)


def some_table(folder: Path, num: int = 240) -> tuple[Path, Path]:
    """Rows of which the bad ones have a larger n, and a rule."""
    draw = np.random.default_rng(0)
    bad = draw.integers(0, 2, num)
    n, r = draw.integers(0, 20, num) + 25 * bad, draw.normal(size=num)
    lines = [f"{i},{n[i]},{r[i]:.6f},{10 * n[i]},tcp,0,{('good', 'bad')[bad[i]]}" for i in range(num)]
    (folder / "t.csv").write_text(HEADER + "\n".join(lines))
    (folder / "s.toml").write_text(TEXT + '[[relations]]\nname = "<b>"\nrule = "{Flow Bytes/s} <= 10 * n"\n')
    return folder / "t.csv", folder / "s.toml"


def test_a_table_is_split_by_the_seed_with_both_classes_in_proportion(tmp_path: Path) -> None:
    csv, schema = some_table(tmp_path)
    data, again, other = (load_table(str(csv), schema=str(schema), seed=seed) for seed in (0, 0, 1))
    assert (len(data.y_train), len(data.y_test)) == (192, 48) and data.class_names == ("good", "bad")
    assert torch.equal(data.x_test["rows"], again.x_test["rows"])
    assert not torch.equal(data.x_test["rows"], other.x_test["rows"])
    assert abs(float(data.y_train.float().mean()) - float(data.y_test.float().mean())) < 0.02
    assert torch.equal(data.x_train["may_change"], data.y_train == 1) and data.given["shape"] == (7,)
    seen = {tuple(row) for x in (data.x_train, data.x_test) for row in x["rows"].tolist()}
    assert len(seen) == 240
    own = load_table(str(csv), schema=str(schema), test=str(csv), rows=50)
    assert (len(own.y_train), len(own.y_test)) == (50, 240)
    json.dumps(data.facts)


def test_tables_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv, schema = some_table(tmp_path)
    for options, sentence in (({}, "has no schema"), ({"schema": str(schema), "test_share": 1.0}, "test_share=1"),
                              ({"schema": str(schema), "rows": -1}, "rows=-1")):  # fmt: skip
        with pytest.raises(ValueError, match=sentence):
            load_table(str(csv), **options)  # type: ignore[arg-type]
    (tmp_path / "s2.toml").write_text(TEXT.replace('"bad"', '"Bad"'))
    with pytest.raises(ValueError, match=r"'bad' \(\d+\), 'good' \(\d+\) none are attacked.*mind case and blanks"):
        load_table(str(csv), schema=str(tmp_path / "s2.toml"))
    monkeypatch.delenv("SPARRING_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="set SPARRING_DATA"):
        load_data("phishing_urls")
    for path, options in (("no.csv", {"schema": str(schema)}), (str(csv), {"schema": "no.toml"})):
        with pytest.raises(FileNotFoundError, match="there is no such file"):
            load_table(path, **options)
    with pytest.raises(ValueError, match="a table with its schema"):
        find("table").make_threat("columns:0.5", load_data("digits"))


def test_from_a_file_to_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    csv, schema = some_table(tmp_path)
    monkeypatch.chdir(tmp_path)
    data = f"table:{csv},schema={schema}"
    code, _, err = call("train", "--data", data, "--threat", "columns:2", "--model", "mlp:width=16", "--recipe",
                        "mixed:num_steps=2", "--epochs", "6", "--batch-size", "32", "--set", "learning_rate=0.03",
                        "--out", "run")  # fmt: skip
    assert not code, err
    attacks = "pgd:num_steps=5,greedy:rounds=2"
    code, _, err = call("evaluate", "run", "--attacks", attacks, "--no-checks", "--out", "seen")
    assert not code, err
    stored = read_evaluation(tmp_path / "seen")
    assert stored.results.threat.text == "columns:2,norm=l2" and stored.results.data.kind == "table"
    assert "and 1 rule." in stored.results.threat.words
    assert stored.results.metrics["recall"].value > 0.8 and "schema" in str(stored.results.threat.settings)
    gates = ("--min", "recall=0.5", "--max", "false_alarm_rate=0.5", "--max", "evasion_rate=1")
    assert not call("gate", "seen", *gates)[0] and call("gate", "seen", "--min", "recall_attacked=1.01")[0]
    page = (tmp_path / "seen" / "report.html").read_text()
    gallery = stored.gallery
    assert gallery is not None and len(gallery["x/rows"])
    cards = show_rows(stored).cards
    shown = "".join(cards)
    assert shown.count("<mark>") == int((gallery["x/rows"] != gallery["x_adv/rows"]).sum())
    assert len(cards) == len(gallery["index"]) and all(card in page for card in cards)
    assert "Flow Bytes/s" in shown or "<td>n</td>" in shown
    before, after, schema = gallery["x/rows"], gallery["x_adv/rows"], Schema.read(tmp_path / "s.toml")
    change = after - before  # n in fives, the rate on a log scale, all else in ones
    change[:, 2] = np.log1p(after[:, 2]) - np.log1p(before[:, 2])
    change[:, 0] /= 5
    assert np.allclose(gallery["cost"], np.abs(change), atol=1e-9)
    costliest = schema.names[int(np.abs(change).sum(0).argmax())]
    head = str(show_rows(stored).before)
    assert head in page and f"in {len(before)} turned rows" in head
    assert head.partition("<tbody>")[2].startswith(f"<tr><td>{costliest}</td>")
    assert "evolve" in call("list", "attacks")[1] and "phishing_urls" in call("list", "data")[1]


def test_names_of_columns_are_escaped(tmp_path: Path) -> None:
    csv, schema = some_table(tmp_path)
    for file in (csv, schema):
        file.write_text(file.read_text().replace("Flow Bytes/s", "<script>"))
    data = load_table(str(csv), schema=str(schema))
    table = find("table")
    threat = table.make_threat("columns:30,norm=linf", data)
    model = table.make_model("mlp", 0, data.given)
    found = evaluate(model, data.batches(count=40), threat, "greedy:rounds=2", modality=table, checks=False, curve=())
    found.save(tmp_path / "e")
    page = (tmp_path / "e" / "report.html").read_text()
    assert "&lt;script&gt;" in page and "<td><script>" not in page
