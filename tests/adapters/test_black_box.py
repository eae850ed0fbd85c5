"""Models known by their answers alone. Oracles: scikit-learn's own probabilities, closed forms, a server over HTTP."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor

import sparring
from command import call
from sparring import BlackBox, Linf
from sparring.adapters.black_box import as_module
from sparring.modalities import find


def points(num: int = 200, width: int = 6, num_classes: int = 2) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    x = draw.random((num, width))
    return x, (x[:, :num_classes].argmax(1)).astype(np.int64)


def tensors(x: np.ndarray, y: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(x), torch.from_numpy(y)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_the_logits_are_the_logarithms_of_what_the_estimator_says(num_classes: int) -> None:
    x, y = points(num_classes=num_classes)
    made = LogisticRegression().fit(x, y)
    expected = made.predict_proba(x)
    for subject in (made, made.predict_proba, lambda x: made.predict_proba(x.reshape(len(x), -1))):
        for shown in (torch.from_numpy(x), {"rows": torch.from_numpy(x), "may_change": torch.ones(200)}):
            assert BlackBox(subject)(shown).softmax(1).numpy() == pytest.approx(expected, abs=1e-6)
    picture = torch.from_numpy(x).reshape(-1, 1, 2, 3)
    assert torch.equal(BlackBox(made)(picture), BlackBox(made)(torch.from_numpy(x)))
    seen: list[Any] = []
    BlackBox(lambda x: (seen.append(x), expected)[1])(picture)
    assert seen[0].shape == (200, 1, 2, 3)


def test_all_forms_of_an_answer_are_told_apart() -> None:
    x = torch.rand(3, 2)
    p = np.array([0.25, 0.75, 0.5])
    for answer in (p, p[:, None], np.stack([1 - p, p], 1).tolist()):
        assert BlackBox(lambda x, a=answer: a)(x).softmax(1)[:, 1].numpy() == pytest.approx(p)
    logits = np.array([[1.0, -2.0], [0.0, 3.0], [5.0, 5.0]])
    assert BlackBox(lambda x: logits, logits=True)(x).numpy() == pytest.approx(logits)
    for labels in (np.array([0, 2, 1]), np.array([0.0, 2.0, 1.0]), ["a", "c", "b"]):
        found = BlackBox(lambda x, a=labels: a, class_names=("a", "b", "c"))(x)
        assert found.argmax(1).tolist() == [0, 2, 1] and found.unique().tolist() == [-1, 1]
    assert BlackBox(lambda x: np.array([1.0, 0.0, 0.5]))(x).isfinite().all()


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (np.zeros((2, 2)), r"answers \(2, 2\) to 3 examples; expected probabilities \(3, K\)"),
        (np.zeros((3, 2, 2)), r"answers \(3, 2, 2\)"), (np.array(0.5), r"answers \(\) to 3"),
        (np.array([[0.5, 0.5], [2.0, -3.0], [0.5, 0.5]]), r"\[2.0, -3.0\] to example 1.*logits=True"),
        (np.full((3, 2), np.nan), "nan, nan.* to example 0"), (np.array([0, 1, 2]), "num_classes=K"),
        (np.array(["a", "b", "c"]), "the label 'a'; the classes are not named"), (np.array([0.1, np.nan, 3]), "num_cl"),
    ],
)  # fmt: skip
def test_answers_that_are_none_are_told(answer: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        BlackBox(lambda x: answer)(torch.rand(3, 2))
    with pytest.raises(ValueError, match="whole numbers from 0 to 1"):
        BlackBox(lambda x: np.array([0, 1, 2]), num_classes=2)(torch.rand(3, 2))


def test_columns_stand_in_the_order_of_the_classes_of_the_data() -> None:
    x, y = points()
    texts = np.array(["bad", "good"])[1 - y]  # sorted, as scikit-learn does, bad comes first; here it is class 1
    made = LogisticRegression().fit(x, texts)
    box = BlackBox(made, class_names=("good", "bad"))
    assert box(torch.from_numpy(x)).softmax(1)[:, 1].numpy() == pytest.approx(made.predict_proba(x)[:, 0], abs=1e-6)
    for names in ((), ("malign", "benign")):
        with pytest.raises(ValueError, match="knows the classes 'bad', 'good'; expected the numbers 0 to K - 1"):
            BlackBox(made, class_names=names)
    with pytest.raises(ValueError, match="knows the classes 1, 2"):
        BlackBox(LogisticRegression().fit(x, y + 1))


def test_what_is_a_black_box_and_what_goes_as_it_is() -> None:
    made = LogisticRegression()
    network = torch.nn.Linear(2, 2)
    assert isinstance(as_module(made), BlackBox) and isinstance(as_module(made.predict_proba), BlackBox)
    assert as_module(network) is network and as_module(LogisticRegression) is LogisticRegression
    with pytest.raises(TypeError, match="a dict has neither predict_proba nor predict"):
        BlackBox({})


def test_square_alone_finds_nearly_what_the_closed_form_says_and_the_verdict_is_suspect() -> None:
    x, y = points(120)
    made = LogisticRegression(C=100).fit(x, y)
    radius, reach = 0.1, np.abs(made.coef_).sum() * 0.1  # far from the box's border no move is cut off
    inner = ((x > radius) & (x < 1 - radius)).all(1)
    x, y = x[inner], y[inner]
    margin = made.decision_function(x) * (2 * y - 1)
    exact = (margin > reach).sum()
    for subject in (made, made.predict_proba):
        found = sparring.evaluate(subject, [tensors(x, y)], Linf(radius), curve=())
        assert [attack.name for attack in found.attacks] == ["square:num_queries=2000"]
        assert exact <= found.robust.count <= exact + 0.1 * len(y) < (margin > 0).sum()
        assert found.verdict == "SUSPECT" and "no_gradient" in {f.name for f in found.findings}
    with pytest.raises(ValueError, match=r"no gradient with respect to the input.*searches without"):
        sparring.evaluate(made, [tensors(x, y)], Linf(radius), "pgd")


def test_a_model_of_labels_alone_is_told() -> None:
    x, y = points(80)
    made = DecisionTreeClassifier(random_state=0).fit(x, y)
    found = sparring.evaluate(made.predict, [tensors(x, y)], Linf(0.1), "square:num_queries=50", curve=(), checks=False)
    assert {"no_gradient", "labels_only"} <= {f.name for f in found.findings} and found.clean.value == 1


MODELS = """
import json, urllib.request
import numpy as np
from sklearn.tree import DecisionTreeClassifier

def grown():
    draw = np.random.default_rng(0)
    x = draw.integers(0, 10, (300, 2)).astype(float)
    return DecisionTreeClassifier(random_state=0).fit(x, np.where(x[:, 0] + x[:, 1] > 9, "bad", "good"))

def remote(port: int):
    def ask(rows):
        body = json.dumps(rows.tolist()).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", body, timeout=10) as answer:
            return np.array(json.load(answer))
    return ask

def wrong(): return 3
def unknown():
    tree = grown()
    tree.classes_ = np.array(["x", "y"])
    return tree
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    draw = np.random.default_rng(1)
    rows = draw.integers(0, 10, (200, 2))
    lines = [f"{a},{b},{'bad' if a + b > 9 else 'good'}" for a, b in rows]
    (folder / "t.csv").write_text("a,b,y\n" + "\n".join(lines))
    whole = '{type = "integer", low = 0, high = 9}'
    (folder / "t.toml").write_text(f'label = "y"\nattacked = "bad"\n[columns]\na = {whole}\nb = {whole}\n')
    (folder / "models.py").write_text(MODELS)
    return folder


@pytest.fixture
def server(table: Path) -> Iterator[int]:
    names: dict[str, Any] = {}
    exec(MODELS, names)
    tree = names["grown"]()

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(tree.predict_proba(rows)[:, [1, 0]].tolist()).encode())  # good, bad

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running.server_port
        running.shutdown()


def test_the_command_line_judges_estimators_and_services_by_searches(table: Path, server: int, tmp_path: Path) -> None:
    told = []
    for model in ("grown", f"remote,port={server}"):
        out = tmp_path / model.partition(",")[0]
        code, _, err = call(
            "evaluate", "--model", f"{table}/models.py:{model}", "--data", f"table:{table}/t.csv,schema={table}/t.toml",
            "--threat", "columns:1,norm=l1", "--out", str(out), "--no-checks",
        )  # fmt: skip
        assert code == 0, err
        results = json.loads((out / "results.json").read_text())
        assert [attack["name"] for attack in results["attacks"]] == ["greedy", "evolve"] and "no gradient" in err
        told.append({name: metric["value"] for name, metric in results["metrics"].items()})
    assert told[0] == told[1] and told[0]["recall"] > 0.9
    # one step in one column turns the rows on the border, a + b = 10, of all that are detected
    assert 0 < told[0]["evasion_rate"] < 0.5


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("wrong", "returned a int; expected a torch.nn.Module, an estimator"), ("unknown", "the classes 'x', 'y'")],
)
def test_what_is_no_model_is_told(table: Path, tmp_path: Path, name: str, sentence: str) -> None:
    code, _, err = call(
        "evaluate", "--model", f"{table}/models.py:{name}", "--data", f"table:{table}/t.csv,schema={table}/t.toml",
        "--threat", "columns:1,norm=l1", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 2 and sentence in err


def test_an_estimator_cannot_be_trained_here(table: Path, tmp_path: Path) -> None:
    code, _, err = call(
        "train", "--model", f"{table}/models.py:grown", "--data", f"table:{table}/t.csv,schema={table}/t.toml",
        "--threat", "columns:1,norm=l1", "--out", str(tmp_path / "run"),
    )  # fmt: skip
    assert code == 2 and "no weights to learn" in err


def test_a_threat_without_such_a_plan_says_so() -> None:
    x, y = points(10)
    with pytest.raises(ValueError, match="no plan without gradients"):
        find("images").make_plan("fast", Odd(), BlackBox(LogisticRegression().fit(x, y)))


class Odd:
    """A threat that is no norm ball."""
