"""Face verification: splits by person, error rates by brute force, a closed form, bad input, and the command line."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.metrics import roc_curve
from torch import nn

import sparring
from command import call
from sparring.app import train_run
from sparring.evaluation.measure import measure
from sparring.modalities import find, load_data
from sparring.modalities.faces import Verifier, shift_and_mirror
from sparring.modalities.faces.data import read_faces
from sparring.modalities.faces.metrics import (
    RESAMPLES,
    equal_error,
    error_rates,
    resampled,
    similarities,
    true_accept,
    verification_metrics,
)
from sparring.modalities.faces.models import SHARPNESS, as_verifier, set_threshold
from sparring.threats import Lens, Linf, check_threat

FACES = find("faces")


def some_faces(persons: int = 12, each: int = 4, side: int = 16, noise: float = 0.12) -> tuple[np.ndarray, np.ndarray]:
    """A random prototype for each person, and noise."""
    draw = np.random.default_rng(0)
    coarse = draw.uniform(0.1, 0.9, (persons, 4, 4))
    x = np.repeat(np.kron(coarse, np.ones((side // 4, side // 4))), each, 0)
    x = (x + noise * draw.standard_normal(x.shape)).clip(0, 1)
    return (255 * x).astype(np.uint8), np.repeat(np.arange(persons), each)


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("faces") / "toy.npz"
    x, y = some_faces()
    np.savez(path, x=x, y=y)
    return path


def flat(num_subjects: int = 3, side: int = 16, threshold: float = 0.5) -> Verifier:
    model = Verifier(nn.Flatten(), side * side, num_subjects)
    model.threshold.fill_(threshold)
    return model.eval()


# Data


def test_every_person_is_tested_once_and_never_trained_or_held_out_in_that_fold(npz: Path) -> None:
    pictures, person = some_faces()
    whose = {picture.tobytes(): int(p) for picture, p in zip(pictures, person, strict=True)}
    tested = []
    for fold in range(4):
        data = read_faces(str(npz), fold=fold)
        trained = {whose[x.numpy().tobytes()] for x in data.x_train["probe"]}
        parts = [trained]
        for x, y in ((data.x_test, data.y_test), data.validation or ({}, torch.empty(0))):
            persons = [[whose[row.numpy().tobytes()] for row in x[side]] for side in ("reference", "probe")]
            assert [[*x[f"{side}_subject"]] for side in ("reference", "probe")] == persons
            same = np.array(persons[0]) == np.array(persons[1])
            assert (same == (y.numpy() == 1)).all() and same.mean() == 0.5 and y[:4].tolist() == [1, 0, 1, 0]
            pairs = {
                frozenset((a.tobytes(), b.tobytes()))
                for a, b in zip(*(x[s].numpy() for s in x if "_" not in s), strict=True)
            }
            assert len(pairs) == len(y) and all(len(pair) == 2 for pair in pairs)
            assert same.sum() == 6 * len({*persons[0]})  # all of 4 pictures
            parts.append({*persons[0], *persons[1]})
        assert len(set.union(*parts)) == sum(map(len, parts)) == 12
        assert data.given["num_subjects"] == len(trained) == int(data.y_train.max()) + 1
        tested += sorted(parts[1])
    assert sorted(tested) == list(range(12))


def test_the_seed_decides_and_pairs_limits(npz: Path) -> None:
    first, again, other = (read_faces(str(npz), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.x_test["probe"], again.x_test["probe"])
    assert set(first.x_test["probe_subject"].tolist()) != set(other.x_test["probe_subject"].tolist())
    few = read_faces(str(npz), pairs=5)
    assert len(few.y_test) == 10 and int(few.y_test.sum()) == 5


def folder_of(path: Path, x: np.ndarray, y: np.ndarray) -> Path:
    image = pytest.importorskip("PIL.Image")
    for i, (picture, person) in enumerate(zip(x, y, strict=True)):
        (path / f"p{person:02d}").mkdir(parents=True, exist_ok=True)
        image.fromarray(picture).save(path / f"p{person:02d}" / f"{i:03d}.png")
    return path


def test_a_folder_of_persons_is_the_same_data(npz: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "people", *some_faces())
    from_folder, from_npz = load_data(f"faces:{folder}"), load_data(f"faces:{npz}")
    assert from_folder.kind == "faces" and torch.equal(from_folder.x_test["probe"], from_npz.x_test["probe"])
    assert load_data(f"faces:{folder},size=8x12").given["shape"] == (1, 12, 8)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda x, y: (x, 0 * y), r"1 person\(s\) in 4 folds make 1 to test.*expected 2 each"),
        (lambda x, y: (x[::4], y[::4]), "3 unseen persons have one picture each; expected two or more"),
        (lambda x, y: (x, y[:-1]), r"expected pictures x \(N, H, W\)"),
        (lambda x, y: (x.reshape(len(x), -1), y), r"expected pictures x \(N, H, W\)"),
        (lambda x, y: (x[:, None, None], y), r"expected pictures x \(N, H, W\)"),
        (lambda x, y: (x, np.where(y == 3, np.nan, y)), r"y \(N,\), not NaN"),
    ],
)
def test_arrays_that_will_not_do(change: object, sentence: str, tmp_path: Path) -> None:
    x, y = change(*some_faces())  # type: ignore[operator]
    np.savez(tmp_path / "bad.npz", x=x, y=y)
    with pytest.raises(ValueError, match=sentence):
        read_faces(str(tmp_path / "bad.npz"))


def test_pictures_and_options_that_will_not_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = some_faces()
    folder = folder_of(tmp_path / "people", x, y)
    folder_of(folder, x[:1, :8], y[:1])
    with pytest.raises(ValueError, match=r"image 1 has shape .*\(image 1 is .*p00/001.png; size=46x56 resizes all\)"):
        read_faces(str(folder))
    for options, sentence in (
        ({"fold": 4}, "fold=4, folds=4"),
        ({"seed": -1}, "seed=-1; expected"),
        ({"size": "8"}, "size=8; expected WIDTHxHEIGHT"),
    ):
        with pytest.raises(ValueError, match=sentence):
            read_faces(str(folder), **options)  # type: ignore[arg-type]
    monkeypatch.delenv("SPARRING_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="not downloaded: set SPARRING_DATA"):
        load_data("orl_faces")
    with pytest.raises(FileNotFoundError, match="found no pictures"):
        read_faces(str(tmp_path / "nowhere"))


# Error rates


def drawn(num: int = 60, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(3)
    same = draw.random(num) < 0.4
    s = draw.standard_normal(num) + same
    return (s.round(1) if ties else s), same


@pytest.mark.parametrize("ties", [False, True])
def test_error_rates_are_those_of_counting_and_of_sklearn(ties: bool) -> None:
    s, same = drawn(ties=ties)
    thresholds, rejected, accepted = error_rates(s, same)
    for t, reject, accept in zip(thresholds, rejected, accepted, strict=True):
        assert reject == pytest.approx((s[same] <= t).mean()) and accept == pytest.approx((s[~same] > t).mean())
    false, true, _ = roc_curve(same, s, drop_intermediate=False)
    assert sorted(zip(accepted.round(9), (1 - rejected).round(9), strict=True)) == sorted(
        zip(false.round(9), true.round(9), strict=True)
    )
    rate, threshold = equal_error(s, same)
    brute = min(abs((s[same] <= t).mean() - (s[~same] > t).mean()) for t in thresholds)
    assert abs((s[same] <= threshold).mean() - (s[~same] > threshold).mean()) == pytest.approx(brute)
    assert rate == pytest.approx(brentq(lambda at: 1 - at - np.interp(at, false, true), 0, 1))
    assert true_accept(s, same) == pytest.approx(true[false <= 0.01].max())


def test_weights_are_repetitions() -> None:
    s, same = drawn(ties=True)
    weight = np.random.default_rng(0).integers(0, 4, (5, len(s))).astype(float)
    for figure in (lambda *a: equal_error(*a)[0], true_accept):
        found = figure(s, same, weight)
        for row, value in zip(weight.astype(int), found, strict=True):
            assert value == pytest.approx(figure(np.repeat(s, row), np.repeat(same, row)))
    hundred = np.arange(103.0)
    assert true_accept(hundred, (hundred > 98) & (hundred != 100)) == 1  # one of 100 is exactly one percent
    assert np.isnan(true_accept(s, same, same[None] * 1.0)) and np.isnan(equal_error(s, same, same[None] * 1.0)[0])


def test_resamples_draw_persons() -> None:
    subjects = np.array([*itertools.combinations(range(6), 2), *[(i, i) for i in range(6)]])
    weight = resampled(subjects)
    persons = weight[:, -6:]
    assert weight.shape == (RESAMPLES, len(subjects)) and (persons.sum(1) == 6).all()
    for column, (a, b) in zip(weight.T[:-6], subjects, strict=False):
        assert (column == persons[:, a] * persons[:, b]).all()
    assert abs(persons.mean() - 1) < 1e-9 and 0.6 < persons.var(0).mean() < 1.1  # multinomial: 5/6
    assert (resampled(subjects, seed=1) != weight).any() and (resampled(subjects) == weight).all()


def test_an_interval_over_persons_is_wider_than_one_over_pairs_where_persons_decide() -> None:
    """Half of the persons are always turned: their number, not that of the pairs, says how sure the share is."""
    person = np.repeat(np.arange(10), 20)
    same = np.tile([True, False], 100)
    turned = same & (person < 5)
    table = {
        "correct": np.ones(200, bool), "robust": ~turned, "label": same * 1, "clean_prediction": same * 1,
        "clean_confidence": np.full(200, 0.9), "adversarial_prediction": np.where(turned, 0, same),
        "adversarial_confidence": np.full(200, 0.8), "margin_left": np.where(turned, 0, 0.5),
        "x/probe_subject": person, "x/reference_subject": np.where(same, person, (person + 1) % 10),
    }  # fmt: skip
    metrics = verification_metrics({name: torch.from_numpy(value) for name, value in table.items()})
    dodging = metrics["dodging_success"]
    assert dodging.value == 0.5 and dodging.n == 100 and dodging.count is None and not dodging.higher_is_better
    assert 0.5 < dodging.high - dodging.low < 0.75  # 2 * 1.96 * sqrt(.25 / 10) = .62; over pairs it would be .2
    assert metrics["impersonation_success"].value == 0 == metrics["equal_error_rate"].value
    none_of_ten = metrics["impersonation_success"]  # persons: Wilson's z^2 / (n + z^2), for the resamples all agree
    assert none_of_ten.low == 0 and none_of_ten.high == pytest.approx(1.96**2 / (10 + 1.96**2), abs=1e-4)
    assert metrics["equal_error_rate_attacked"].value == 0.5  # half of one side is rejected wherever others are not
    clean, worst = similarities(table)
    assert clean[0] == pytest.approx(np.log(9)) and worst[0] == pytest.approx(-np.log(4))
    assert worst[1] == pytest.approx(-np.log(9) / 2)
    with pytest.raises(ValueError, match="all 100 pairs show the same person; expected pairs of different persons"):
        verification_metrics({name: value[same] for name, value in table.items()})


# The verifier


def test_the_threshold_is_that_of_the_validation_pairs_and_of_no_others(npz: Path) -> None:
    data = read_faces(str(npz))
    model = flat()
    set_threshold(model, data)
    (x, y), cosines = data.validation, nn.CosineSimilarity()  # type: ignore[misc]
    s = cosines(*((x[side].float() / 255).flatten(1) for side in ("reference", "probe"))).numpy()
    rejected, accepted = (s[y == 1] <= model.threshold.item()).mean(), (s[y == 0] > model.threshold.item()).mean()
    brute = min(abs((s[y == 1] <= t).mean() - (s[y == 0] > t).mean()) for t in np.linspace(s.min(), s.max(), 5000))
    assert abs(rejected - accepted) <= brute + 1e-9
    other = replace(data, x_test={name: 0 * value for name, value in data.x_test.items()}, y_test=1 - data.y_test)
    again = flat(threshold=0.1)
    set_threshold(again, other)
    assert again.threshold == model.threshold


def test_what_no_threshold_can_tell(npz: Path) -> None:
    data = read_faces(str(npz))
    for value, sentence in ((1.0, "the similarity 1 to all of"), (torch.nan, "NaN as a similarity of")):
        embed = nn.Sequential(nn.Flatten(), nn.Linear(256, 2))
        nn.init.zeros_(embed[1].weight)
        nn.init.constant_(embed[1].bias, value)
        with pytest.raises(ValueError, match=f"the embedder gives {sentence}.*expected numbers that differ"):
            set_threshold(as_verifier(embed, data.given), data)
    with pytest.raises(ValueError, match="got a Flatten"):
        set_threshold(nn.Flatten(), data)
    with pytest.raises(ValueError, match="no threshold"):
        Verifier(nn.Flatten(), 256, 3)({name: value.float() for name, value in data.x_test.items()})


def test_any_module_with_embeddings_is_completed_and_others_are_refused() -> None:
    given = {"shape": (1, 4, 4), "num_subjects": 5}
    built = as_verifier(nn.Flatten().train(), given)
    assert isinstance(built, Verifier) and built.persons.shape == (5, 16) and as_verifier(built, given) is built
    assert built.embedder.training
    for module, got in ((nn.Identity(), r"returned \(2, 1, 4, 4\)"), (nn.Linear(3, 3), "fails on two pictures")):
        with pytest.raises(ValueError, match=f"{got}.*expected embeddings"):
            as_verifier(module, given)


class Plane(nn.Module):
    """The first two pixels, as a point of the plane."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :2]


def test_a_linear_embedder_falls_exactly_where_geometry_says() -> None:
    """Angles in the plane: an L2 change of length r turns a point of length 1 by arcsin r, and by no more."""
    angles = torch.linspace(0.02, 1.5, 80)
    point = torch.stack([angles.cos(), angles.sin(), 0 * angles, 0 * angles], 1).view(-1, 1, 2, 2)
    pairs = {"reference": torch.tensor([1.0, 0, 0, 0]).expand(80, 4).reshape(-1, 1, 2, 2), "probe": point}
    threshold, radius = 0.6, 0.3
    model = Verifier(Plane(), 2, 3).eval()
    model.threshold.fill_(threshold)
    limit, turn = np.arccos(threshold), np.arcsin(radius)
    label = (angles < limit).long()
    threat = FACES.make_threat(f"l2:{radius},box=none")
    found = measure(
        model, [(pairs, label)], threat, FACES.make_plan("pgd:restarts=2,objective=margin", threat), curve=()
    )
    clear = ((angles - limit).abs() - turn).abs() > 0.02
    assert found.clean.value == 1
    stands = (angles - limit).abs() > turn
    assert torch.equal(found.table["robust"][clear], stands[clear]) and 0.2 < stands.float().mean() < 0.8
    clean, _ = similarities(found.table)
    assert np.allclose(clean / SHARPNESS, np.cos(angles.numpy()) - threshold, atol=1e-5)


def test_only_the_probe_changes_and_glasses_only_where_they_sit(npz: Path) -> None:
    data = read_faces(str(npz))
    x, y = next(iter(data.batches("test", 12)))
    model = flat(data.given["num_subjects"], threshold=0.9)
    for text in ("linf:8/255", "l2:0.5", "glasses:1.0"):
        threat = FACES.make_threat(text, data)
        assert threat.text() == f"{text.replace('1.0', '1')} on probe" and "probe" in threat.describe()
        check_threat(threat, x, num_directions=5)
        x_adv = sparring.pgd(threat, num_steps=3)(model, x, y).x_adv
        assert all(torch.equal(x[name], x_adv[name]) for name in x if name != "probe")
        moved = (x["probe"] != x_adv["probe"]).any(0)[0]
        assert bool(moved.any())
        single = {"probe": x["probe"]}
        assert sparring.pgd(threat, num_steps=1)(model, single, y).x_adv.keys() == {"probe"}  # training, too
    rows, columns = moved.nonzero().T
    assert rows.min() >= 5 and rows.max() <= 8 and columns.min() > 1
    assert moved[6, 4] and not moved[8, 8] and moved.sum() < 60
    with pytest.raises(ValueError, match=r"glasses:2.*expected a radius above 0, at most 1"):
        FACES.make_threat("glasses:2", data)


def test_a_verdict_through_the_lens_is_verified(npz: Path) -> None:
    """An attack that swaps the reference, or the person it belongs to, is not counted."""
    data = read_faces(str(npz))
    x, _ = next(iter(data.batches("test", 12)))
    threat = Lens(Linf(1.0), "probe")
    assert bool(threat.valid(x, x).all())
    for name in ("reference", "reference_subject"):
        assert not bool(threat.valid(x, {**x, name: x[name] + 1}).any())


def test_augmentation_shifts_the_probe_over_repeated_edges() -> None:
    assert shift_and_mirror() is None
    x, place = torch.rand(40, 1, 9, 8), torch.arange(40)
    for crop, flip in ((0, True), (2, False), (2, True)):
        made = shift_and_mirror(crop=crop, flip=flip)
        assert made is not None
        found = made({"probe": x, "other": place}, place, 0, 0)
        assert found["other"] is place
        moves = set()
        for before, after in zip(x, found["probe"], strict=True):
            wide = np.pad(before[0].numpy(), crop, mode="edge")
            cuts = {(i, j): wide[i : i + 9, j : j + 8] for i in range(2 * crop + 1) for j in range(2 * crop + 1)}
            shown = {key: cut for key, cut in cuts.items() if (cut == after[0].numpy()).all()}
            shown |= {
                (*key, "m"): cut for key, cut in cuts.items() if flip and (cut[:, ::-1] == after[0].numpy()).all()
            }
            assert len(shown) == 1
            moves |= shown.keys()
        assert len(moves) > (2 * crop + 1) * (1 + flip) - (crop == 0)


def test_grey_floats_are_pictures_of_one_channel(npz: Path, tmp_path: Path) -> None:
    x, y = some_faces()
    np.savez(tmp_path / "floats.npz", x=x / 255, y=y)
    found, same = read_faces(str(tmp_path / "floats.npz")), read_faces(str(npz))
    assert found.given["shape"] == same.given["shape"] == (1, 16, 16) and found.prepare and same.prepare
    pairs, others = (data.prepare(data.x_test) for data in (found, same))  # type: ignore[misc]
    assert torch.allclose(pairs["probe"], others["probe"]) and torch.equal(found.y_test, same.y_test)


# The command line, from data to gate


@pytest.fixture(scope="module")
def run(npz: Path) -> Path:
    out = npz.parent / "run"
    code, _, err = call(
        "train", "--data", f"faces:{npz}", "--threat", "linf:4/255", "--out", str(out), "--epochs", "6",
        "--batch-size", "14", "--set", "num_steps=2",
    )  # fmt: skip
    assert code == 0, err
    return out


def test_a_run_learns_resumes_and_stores_its_threshold(run: Path, npz: Path) -> None:
    weights = (run / "best.safetensors").read_bytes()
    code, _, err = call("train", "--resume", "--out", str(run))
    assert code == 0 and (run / "best.safetensors").read_bytes() == weights, err
    model, data = sparring.load(run), load_data(f"faces:{npz}")
    assert isinstance(model, Verifier) and 0 < model.threshold < 1
    stored = model.threshold.clone()
    set_threshold(model, data)
    assert torch.allclose(model.threshold, stored)
    history = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert history[-1]["examples"] == len(data.validation[1]) and history[-1]["clean_accuracy"] > 0.8


def test_a_run_that_was_stopped_ends_in_the_same_bits(run: Path, tmp_path: Path) -> None:
    config = train_run.read_config(run)
    stopped = train_run.start_run(config, tmp_path / "run", observe=lambda state: state.step >= 4)
    assert stopped.stopped
    assert train_run.resume_run(tmp_path / "run").stopped is None
    for name in ("best", "last"):
        ours, theirs = (folder / f"{name}.safetensors" for folder in (tmp_path / "run", run))
        assert ours.read_bytes() == theirs.read_bytes()


def test_the_command_evaluates_reports_and_gates(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "evaluation"
    code, _, err = call(
        "evaluate",
        str(run),
        "--out",
        str(out),
        "--attacks",
        "pgd:num_steps=5",
        "--threat",
        "linf:24/255",
        "--no-checks",
        "--num-examples",
        "32",
    )
    assert code == 0, err
    results = json.loads((out / "results.json").read_text())
    metrics = results["metrics"]
    assert results["data"]["kind"] == "faces" and results["threat"]["text"] == "linf:24/255 on probe"
    assert metrics["equal_error_rate"]["value"] < 0.2 < metrics["equal_error_rate_attacked"]["value"]
    page = (out / "report.html").read_text()
    for word in ("<polyline", "attacked of example", "dodging success", "similarity less threshold"):
        assert word in page
    code, _, err = call("report", str(out), "--out", str(tmp_path / "again.html"))
    assert code == 0 and (tmp_path / "again.html").read_text() == page, err
    value = metrics["dodging_success"]["value"]
    assert value > 0
    for limit, expected in ((value, 0), (value - 0.01, 1)):
        code, told, err = call("gate", str(out), "--max", f"dodging_success={limit}")
        assert code == expected and "dodging success" in told, err


EMBEDDER = (
    "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(256, 8, bias=False))\n"
)


def test_an_embedder_of_somebody_else_gets_a_threshold(npz: Path, tmp_path: Path) -> None:
    file = tmp_path / "theirs.py"
    file.write_text(EMBEDDER)
    options = ("--model", f"{file}:make", "--data", f"faces:{npz}", "--threat", "linf:4/255")
    code, _, err = call("evaluate", *options, "--out", str(tmp_path / "o"), "--attacks", "fgsm", "--no-checks")
    assert code == 0, err
    found = json.loads((tmp_path / "o" / "results.json").read_text())["metrics"]
    assert found["clean_accuracy"]["value"] > 0.6  # random projections keep angles about
    out = tmp_path / "run"
    code, _, err = call("train", *options, "--recipe", "standard", "--epochs", "1", "--out", str(out))
    assert code == 0, err
    assert isinstance(sparring.load(out, model=f"{file}:make"), Verifier)


def test_lists_show_it() -> None:
    for what, word in (
        ("modalities", "faces"),
        ("threats", "glasses:RADIUS"),
        ("models", "face-net\n"),
        ("models", "Options: width=64, sharpness=16."),
        ("settings", "of images and faces"),
        ("data", "orl_faces"),
    ):
        code, out, err = call("list", what)
        assert code == 0 and word in out, err
