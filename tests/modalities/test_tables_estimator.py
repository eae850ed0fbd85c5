"""The estimator. Oracles: scikit-learn's own checks, the trainer it stands for, closed forms of what is moved."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import make_blobs
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

import sparring
from sparring import Linf, RobustClassifier, pgd_at
from sparring.modalities import find
from sparring.modalities.tables import Columns, Schema

FLOWS = """
label = "kind"
attacked = "bad"
ignore = ["id"]
[columns]
packets = {type = "integer", low = 0, high = 100, unit = 5}
rate = {type = "real", low = 0, high = 1, unit = 0.2}
proto = {type = "category", values = ["tcp", "udp"], change = "none"}
"""


@pytest.mark.filterwarnings("ignore")  # of the checks themselves, which warn of what they skip
@pytest.mark.parametrize(
    "made",
    [RobustClassifier(epochs=8, hidden=32, random_state=0),
     pytest.param(RobustClassifier(random_state=0), marks=pytest.mark.slow),
     pytest.param(RobustClassifier("l2:0.2", recipe="pgd-at", class_weight="balanced", random_state=0),
                  marks=pytest.mark.slow)],
)  # fmt: skip
def test_all_that_scikit_learn_checks(made: RobustClassifier) -> None:
    found = check_estimator(made, on_fail=None)
    assert [(c["check_name"], str(c["exception"])) for c in found if c["status"] == "failed"] == []
    assert len(found) > 50 and sum(c["status"] == "passed" for c in found) >= len(found) - 5


def flows(num: int = 300, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as the model gets them: packets tells the classes apart but for a few."""
    draw = np.random.default_rng(seed)
    bad = draw.integers(0, 2, num)
    packets = np.clip(np.rint(20 + 40 * bad + 8 * draw.normal(size=num)), 0, 100)
    rate = np.clip(0.3 + 0.3 * bad + 0.1 * draw.normal(size=num), 0, 1)
    return np.concatenate([packets[:, None], rate[:, None], np.eye(2)[draw.integers(0, 2, num)]], 1), bad


def test_with_a_schema_the_opponent_owns_the_class_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(FLOWS)
    x, bad = flows()
    for y, owned in ((np.array(["good", "bad"])[bad], "bad"), (bad, 1), (bad.astype(bool), True)):
        for schema in (str(tmp_path / "s.toml"), Schema.of(FLOWS)):
            made = RobustClassifier("columns:1,norm=l1", schema, epochs=3, random_state=0).fit(x, y)
            assert made.classes_[made.order_[1]] == owned and isinstance(made.threat_, Columns)
            seen, target = made.inputs(x, y)
            assert seen["may_change"].numpy().tolist() == (y == owned).tolist()
            assert (made.classes_[made.order_][target.numpy()] == y).all() and np.array_equal(seen["rows"].numpy(), x)
            own = [*made.classes_].index(owned)
            assert (made.predict(x) == made.classes_[made.predict_proba(x).argmax(1)]).all() and made.score(x, y) > 0.8
            assert made.predict_proba(x)[bad == 1, own].mean() > 0.7
    found = sparring.evaluate(made.model_, [(seen, target)], made.threat_, "greedy", modality=find("table"), curve=())
    recall = found.metrics["recall"].value
    assert found.clean.value == made.score(x, y) and recall == made.score(x[bad == 1], y[bad == 1])
    assert found.metrics["recall_attacked"].value < recall
    assert found.attacks[0].rejected["outside_domain"] == 0
    with pytest.raises(ValueError, match=r"the classes \['a', 'b'\], of which the schema's attacked = \['bad'\]"):
        RobustClassifier(schema=Schema.of(FLOWS)).fit(x, np.array(["a", "b"])[bad])
    with pytest.raises(ValueError, match="X has 3 columns, the schema 4"):
        RobustClassifier(schema=Schema.of(FLOWS)).fit(x[:, :3], bad)


def test_frames_are_read_by_the_names_of_their_columns(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    x, bad = flows(120)
    frame = pandas.DataFrame({
        "proto": np.array(["tcp", "udp"])[x[:, 3].astype(int)], "id": [f"u{i}" for i in range(120)],
        "rate": x[:, 1], "packets": x[:, 0].astype(int),
    })  # fmt: skip
    made = RobustClassifier(schema=Schema.of(FLOWS), epochs=4, random_state=0).fit(frame, bad)
    plain = RobustClassifier(schema=Schema.of(FLOWS), epochs=4, random_state=0).fit(x, bad)
    assert np.array_equal(made.predict_proba(frame), plain.predict_proba(x))
    assert np.array_equal(made.predict_proba(frame[["packets", "proto", "rate"]]), plain.predict_proba(x))
    with pytest.raises(ValueError, match=r"X lacks the column.* 'rate' of the schema"):
        made.predict(frame.drop(columns="rate"))
    with pytest.raises(ValueError, match="column 'proto', row 3: got 'icmp'"):
        made.predict(frame.assign(proto=["tcp"] * 3 + ["icmp"] * 117))


def test_it_works_in_pipelines_and_grids_and_survives_a_pickle() -> None:
    x, y = make_blobs(120, centers=3, random_state=1)
    names = np.array(["red", "green", "blue"])[y]
    search = GridSearchCV(
        make_pipeline(StandardScaler(), RobustClassifier(epochs=6, random_state=0)),
        {"robustclassifier__threat": ["linf:0.05", Linf(0.3)]}, cv=2, error_score="raise",
    ).fit(x, names)  # fmt: skip
    assert search.best_score_ > 0.9 and {*search.predict(x)} <= {*names}
    best = search.best_estimator_[-1]
    again = pickle.loads(pickle.dumps(best))
    scaled = search.best_estimator_[0].transform(x)
    assert np.array_equal(again.predict_proba(scaled), best.predict_proba(scaled))


def test_the_default_is_robust_in_standard_deviations_and_the_seed_decides() -> None:
    x, y = make_blobs(200, centers=2, cluster_std=2.0, random_state=2)
    x = x * [1.0, 1000.0]  # the unit of a column is no matter
    made, again = (RobustClassifier("linf:0.3", epochs=15, random_state=3).fit(x, y) for _ in range(2))
    assert np.array_equal(made.predict_proba(x), again.predict_proba(x))
    seen, target = made.inputs(x, y)
    assert torch.allclose(seen.mean(0), torch.zeros(2).double(), atol=1e-9)
    assert torch.allclose(seen.std(0, correction=0), torch.ones(2).double())
    batch = [(seen, target)]
    plain = RobustClassifier("linf:0.3", recipe="standard", epochs=60, hidden=128, random_state=3).fit(x, y)
    left = [sparring.evaluate(m.model_, batch, m.threat_, "pgd", checks=False, curve=()).robust for m in (made, plain)]
    assert left[0].value > 0.5 and left[0].value >= left[1].value - 0.02


def test_a_recipe_may_be_a_function_and_what_does_not_fit_is_told() -> None:
    x, y = make_blobs(40, centers=2, random_state=0)
    made = RobustClassifier(recipe=lambda threat: pgd_at(threat, num_steps=2), epochs=2, random_state=0).fit(x, y)
    assert made.n_iter_ == 2

    def plain(threat: Any) -> Any:
        return lambda model, x, y, noise=None: torch.nn.functional.cross_entropy(model(x), y)

    cases: list[tuple[dict[str, Any], str]] = [
        ({"recipe": plain, "class_weight": "balanced"}, "takes no class_weight"),
        ({"threat": "columns:1"}, "threat"), ({"learning_rate": 1e200}, "smaller learning_rate"),
    ]  # fmt: skip
    for options, sentence in cases:
        with pytest.raises(ValueError, match=sentence):
            RobustClassifier(epochs=3, random_state=0, **options).fit(x, y)
    with pytest.raises(ValueError, match="labels that were not there in fit"):
        made.inputs(x, y + 1)
