"""Run folders: what they hold, what loads from them, what they refuse, and that no write leaves half a file."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import sparring
from sparring.app import train_run as runs
from sparring.app.adversarial import craft
from sparring.app.evaluate_folder import evaluate_folder, from_run, from_weights
from sparring.app.settings import EvaluationSettings, TrainingSettings, read_settings
from sparring.app.train_run import read_config, resume_run, settings_for, start_run, training_record
from sparring.core.batches import draw
from sparring.core.files import read_json, sole_writer, write_atomically, write_json, write_text
from sparring.modalities import base, load_data
from sparring.modalities.images import build
from sparring.threats import make_threat

FILES = [
    "averaged.safetensors", "best.safetensors", "checkpoint.pt", "config.json", "last.safetensors", "metrics.jsonl",
    "training.json",
]  # fmt: skip
NETS = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3))

def sure():
    return nn.Sequential(nn.Linear(5, 3), nn.Softmax(dim=1))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """60 training and 30 test vectors of 5 features, 3 classes."""
    path, rng = tmp_path_factory.mktemp("data") / "tiny.npz", np.random.default_rng(0)
    y = {"y_train": np.arange(60) % 3, "y_test": np.arange(30) % 3}
    x = {f"x_{part}": rng.uniform(0, 1, (num, 5)).astype(np.float32) for part, num in (("train", 60), ("test", 30))}
    np.savez(path, **x, **y)
    return str(path)


def tiny(data: str, **options: Any) -> TrainingSettings:
    settings = {
        "threat": "linf:0.1", "model": "mlp", "epochs": 2, "batch_size": 9, "averaging": 0.9, "device": "cpu",
        "recipe": "pgd-at:num_steps=2",
    }  # fmt: skip
    return TrainingSettings(data=data, **{**settings, **options})


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is over; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    start_run(tiny(data), out)
    return out


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_leaves_these_files(finished: Path) -> None:
    assert sorted(content(finished)) == FILES
    ended = json.loads((finished / "training.json").read_text(encoding="utf-8"))
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1] and [line["step"] for line in lines] == [6, 12]
    assert ended["stopped"] is None and ended["last"] == lines[-1] and ended["best"] == lines[ended["best_epoch"]]
    assert ended["epochs"] == 2 and ended["recipe"] == "pgd-at" and ended["recipe_settings"] == {"num_steps": 2}
    assert {line["examples"] for line in lines} == {6.0}
    record = training_record(finished, "best")
    assert record["history"] == lines and record["checkpoint"] == "best"
    assert set(record) == {
        "recipe", "recipe_settings", "epochs", "seconds", "best_epoch", "best", "last", "checkpoint", "stopped",
        "config", "history", "rollbacks",
    }  # fmt: skip


def test_the_config_is_complete(data: str, finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert set(config) == {"schema", "settings", "kind", "given", "class_names", "kept", "speed"}
    assert config["given"] == {"shape": [5], "num_classes": 3} and len(config["class_names"]) == 3
    assert config["schema"] == "sparring.run/2" and config["kind"] == "images"
    unset = [name for name, value in config["settings"].items() if value is None]
    assert unset == ["weights", "extra", "class_weights", "minutes"]
    assert set(config["settings"]) == set(TrainingSettings.model_fields)
    read = read_config(finished)
    asked = tiny(data).model_dump(exclude_none=True)
    assert {name: getattr(read, name) for name in asked} == asked
    assert (read.learning_rate, read.schedule, read.augment) == (2e-3, "one-cycle", {"crop": 0, "flip": False})


def test_a_threat_is_read_once(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def count(text: str, *rest: Any) -> Any:
        read.append(text)
        return make_threat(text, *rest)

    monkeypatch.setattr(base, "make_threat", count)
    start_run(tiny(data), tmp_path / "run")
    assert read == ["linf:0.1"]
    settings = EvaluationSettings(data=data, threat="linf:0.05", attacks="fgsm", num_examples=20)
    evaluate_folder(from_run(tmp_path / "run"), tmp_path / "evaluation", settings)
    assert read == ["linf:0.1", "linf:0.05"]


def test_evaluating_in_memory_is_what_the_command_does(data: str, finished: Path, tmp_path: Path) -> None:
    settings = EvaluationSettings(data=data, threat="linf:0.05", attacks="fgsm,pgd:num_steps=3", batch_size=8)
    evaluate_folder(from_run(finished), tmp_path / "a", settings)
    dataset = load_data(data)
    found = sparring.evaluate(
        sparring.load(finished), dataset.batches("test", 8), make_threat("linf:0.05"), "fgsm,pgd:num_steps=3",
        class_names=dataset.class_names,
    )  # fmt: skip
    found.save(tmp_path / "b", training={"config": {"recipe": "mine", "seed": 3}})  # what one's own loop can tell
    assert (tmp_path / "a" / "examples.csv").read_bytes() == (tmp_path / "b" / "examples.csv").read_bytes()
    a, b = (json.loads((tmp_path / name / "results.json").read_text()) for name in "ab")
    same = [
        key for key in a if key not in ("name", "created", "command", "model", "data", "training", "cost", "attacks")
    ]
    assert {key: a[key] for key in same if key not in ("sanity", "checks")} == {
        key: b[key] for key in same if key not in ("sanity", "checks")
    }
    assert found.report(tmp_path / "page.html").read_text().startswith("<!")


def test_all_turned_examples_are_kept_where_asked(data: str, finished: Path, tmp_path: Path) -> None:
    settings = EvaluationSettings(
        data=data, threat="linf:0.3", attacks="fgsm,pgd:num_steps=3", batch_size=8, checks=False
    )
    evaluate_folder(from_run(finished), tmp_path / "few", settings)
    evaluate_folder(from_run(finished), tmp_path / "all", settings.model_copy(update={"keep_examples": True}))
    found = craft(from_run(finished), settings)
    with np.load(tmp_path / "all" / "adversarial.npz", allow_pickle=False) as kept:
        assert set(kept.files) == set(found.arrays)
        assert len(kept["index"]) == found.num > 0
        assert all(np.array_equal(kept[name], found.arrays[name]) for name in kept.files)
    galleries = [np.load(tmp_path / name / "gallery.npz") for name in ("few", "all")]
    assert all(np.array_equal(galleries[0][name], galleries[1][name]) for name in galleries[0].files)
    assert not (tmp_path / "few" / "adversarial.npz").exists()
    evaluate_folder(from_run(finished), tmp_path / "all", settings)
    assert sorted(path.name for path in (tmp_path / "all").glob("adv*")) == ["adversarial.before.npz"]


@pytest.mark.parametrize("which", ["best", "last", "averaged"])
def test_weights_load_without_the_package_and_with_it(finished: Path, which: str) -> None:
    plain = build("mlp", (5,), 3, seed=77)
    plain.load_state_dict(load_file(finished / f"{which}.safetensors"))
    loaded = sparring.load(finished, which)
    x = torch.rand(4, 5, generator=torch.Generator().manual_seed(1))
    assert not loaded.training and torch.equal(loaded(x), plain.eval()(x))
    assert all(p.requires_grad for p in loaded.parameters())
    assert torch.equal(sparring.load(str(finished), which)(x), loaded(x))


def test_best_of_a_run_without_averaging_is_one_of_its_epochs(data: str, tmp_path: Path) -> None:
    out, seen = tmp_path / "run", []

    def observe(state: Any) -> None:
        if state.batch == 6:
            seen.append({name: value.clone() for name, value in state.model.state_dict().items()})

    result = start_run(tiny(data, averaging=0, epochs=3), out, observe=observe)
    assert result.averaged is None and sorted(content(out)) == FILES[1:]
    best, last = load_file(out / "best.safetensors"), load_file(out / "last.safetensors")
    assert all(torch.equal(best[name], value) for name, value in seen[result.best_epoch].items())
    assert all(torch.equal(last[name], value) for name, value in seen[2].items())
    with pytest.raises(ValueError, match=r"has no averaged\.safetensors; it has best, last"):
        sparring.load(out, "averaged")


def test_loading_what_is_not_there(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no worst\.safetensors; it has averaged, best, last"):
        sparring.load(finished, "worst")
    with pytest.raises(ValueError, match="no run folder"):
        sparring.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no run folder"):
        resume_run(tmp_path)
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    with pytest.raises(ValueError, match="no weights yet: train first"):
        sparring.load(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_network_from_a_file_is_built_only_when_named(data: str, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS, encoding="utf-8")
    spec, out = f"{tmp_path / 'nets.py'}:make", tmp_path / "run"
    start_run(tiny(data, model=spec), out)
    before = content(out)
    ran = tmp_path / "ran"
    evil = f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
    (tmp_path / "nets.py").write_text(NETS + evil, encoding="utf-8")
    for refused in (lambda: sparring.load(out), lambda: resume_run(out)):
        with pytest.raises(ValueError, match="loading it runs that file"):
            refused()
    assert not ran.exists(), "the file was run although nobody named it"
    loaded = sparring.load(out, model=spec)
    assert ran.exists() and not loaded.training
    weights = load_file(out / "best.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    moved = tmp_path / "moved.py"
    moved.write_text(NETS, encoding="utf-8")
    assert isinstance(sparring.load(out, "last", model=f"{moved}:make"), nn.Sequential)
    with pytest.raises(ValueError, match="do not fit the model"):
        sparring.load(out, model=f"{moved}:sure")
    resume_run(out, model=spec)
    assert content(out) == before


def test_quotes_around_a_file_do_not_make_it_trusted(data: str, tmp_path: Path) -> None:
    nets, out, ran = tmp_path / "my nets.py", tmp_path / "run", tmp_path / "ran"
    nets.write_text(NETS, encoding="utf-8")
    spec = f'"{nets}":make'
    start_run(tiny(data, model=spec), out)
    nets.write_text(f"from pathlib import Path\nPath({str(ran)!r}).touch()\n{NETS}", encoding="utf-8")
    for refused in (lambda: sparring.load(out), lambda: resume_run(out), lambda: from_run(out)):
        with pytest.raises(ValueError, match="loading it runs that file"):
            refused()
    assert not ran.exists(), "the file was run although nobody named it"
    assert isinstance(sparring.load(out, model=spec), nn.Sequential) and ran.exists()


@pytest.mark.parametrize("name", ["nets.py", "my nets.py"])
def test_another_network_in_the_same_file_is_another_evaluation(
    data: str, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []

    def stop(*_: Any, about: str, **__: Any) -> None:
        told.append(about)
        raise RuntimeError("far enough")

    monkeypatch.setattr("sparring.app.evaluate_folder.evaluate", stop)
    settings = EvaluationSettings(data=data, threat="linf:0.05", attacks="fgsm")
    for text in (NETS, NETS, NETS + "# other\n"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        subject = from_weights(f'"{tmp_path / name}":make', None, data)
        with pytest.raises(RuntimeError, match="far enough"):
            evaluate_folder(subject, tmp_path / "evaluation", settings)
    assert told[0] == told[1] != told[2]


def test_resuming_a_finished_run_changes_nothing(data: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = start_run(tiny(data), out)
    before = content(out)
    again = resume_run(out)
    assert content(out) == before
    assert again.history == first.history and again.stopped is None and again.best_epoch == first.best_epoch


def test_resuming_a_run_that_has_no_checkpoint_begins_anew(data: str, finished: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    resume_run(tmp_path)
    for name in FILES:
        if name.endswith(".safetensors"):
            assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_stopped_run_says_so_and_goes_on(data: str, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    result = start_run(tiny(data), out, observe=lambda state: state.step == 8)
    assert result.stopped == "Training was interrupted."
    assert json.loads((out / "training.json").read_text(encoding="utf-8"))["stopped"] == result.stopped
    assert sparring.load(out, "last") is not None
    resume_run(out)
    assert json.loads((out / "training.json").read_text(encoding="utf-8"))["stopped"] is None
    for name in FILES:
        if name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_training_leaves_the_global_generator_alone(data: str, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    start_run(tiny(data, epochs=1), tmp_path / "run")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_folder_with_a_run_is_refused(data: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="already holds a run"):
        start_run(tiny(data), tmp_path)
    assert content(tmp_path) == {"config.json": b"{}"}


def fails_at_once(state: Any) -> bool:
    raise RuntimeError("broke")


FAILURES: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no such data": ({"data": "nowhere.npz"}, None, "nowhere"),
    "no such device": ({"device": "mps"}, None, "not available"),
    "weights that do not fit": ({"weights": "WEIGHTS"}, None, "do not fit"),
    "probabilities": ({"model": "NETS:sure"}, None, "returns probabilities"),
    "while training": ({}, fails_at_once, "broke"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("there", [False, True])
def test_a_failing_start_leaves_no_folder(data: str, tmp_path: Path, failure: str, there: bool) -> None:
    options, observe, sentence = FAILURES[failure]
    if failure == "no such device" and torch.backends.mps.is_available():
        pytest.skip("this machine has that device")
    nets, weights = tmp_path / "nets.py", tmp_path / "other.safetensors"
    nets.write_text(NETS, encoding="utf-8")
    save_file({"a": torch.zeros(2)}, weights)
    out = tmp_path / "run"
    if there:
        out.mkdir()
        (out / "notes.txt").write_text("mine", encoding="utf-8")
    places = {"WEIGHTS": str(weights), "NETS:sure": f"{nets}:sure"}
    settings = {name: places.get(value, value) for name, value in options.items()}
    with pytest.raises((ValueError, OSError, RuntimeError), match=sentence):
        start_run(tiny(**{"data": data, **settings}), out, observe=observe)
    assert out.exists() == there
    if there:
        assert content(out) == {"notes.txt": b"mine"}


def test_a_run_that_fails_after_an_epoch_is_kept(data: str, finished: Path, tmp_path: Path) -> None:
    def late(state: Any) -> None:
        if state.step == 9:
            raise RuntimeError("broke")

    out = tmp_path / "run"
    with pytest.raises(RuntimeError, match="broke"):
        start_run(tiny(data), out, observe=late)
    assert {"config.json", "checkpoint.pt", "metrics.jsonl", "last.safetensors"} <= set(content(out))
    resume_run(out)
    assert (out / "last.safetensors").read_bytes() == (finished / "last.safetensors").read_bytes()


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_starting_weights_are_used(data: str, tmp_path: Path, suffix: str) -> None:
    given = build("mlp", (5,), 3, seed=1234)
    path = tmp_path / f"given{suffix}"
    if suffix == ".pt":
        torch.save(given.state_dict(), path)
    else:
        save_file(given.state_dict(), path)
    options = {"epochs": 1, "learning_rate": 1e-8, "weight_decay": 0.0, "averaging": 0, "weights": str(path)}
    start_run(tiny(data, **options), tmp_path / "run")
    last = load_file(tmp_path / "run" / "last.safetensors")
    for name, value in given.state_dict().items():
        torch.testing.assert_close(last[name], value, rtol=0, atol=1e-6)
    other = build("mlp", (5,), 3, seed=0).state_dict()
    assert not all(torch.allclose(last[name], value, atol=1e-3) for name, value in other.items())
    path.unlink()  # loading a run needs no more than its folder
    assert torch.equal(sparring.load(tmp_path / "run", "last").state_dict()[name], last[name])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("{", "not valid JSON"), ("[]", "should hold schema"), ('{"schema": "sparring.run/2"}', "should hold schema")],
)
def test_a_config_that_is_none(tmp_path: Path, text: str, sentence: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        read_config(tmp_path)


def test_settings_of_another_version(finished: Path, tmp_path: Path) -> None:
    config = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    config["settings"]["colour"] = "red"
    write_json(tmp_path / "config.json", config)
    with pytest.raises(ValueError, match="cannot use: setting 'colour' is unknown"):
        read_config(tmp_path)
    old = {"data": "digits", "threat": "linf:0.2", "recipe": "trades", "model": "mlp", "seed": 3, "epochs": 5}
    write_json(tmp_path / "config.json", {"experiment": old, "shape": [1, 8, 8], "num_classes": 10})
    remake = "sparring train --out NEW --data digits --threat linf:0.2 --recipe trades --model mlp --seed 3"
    for refused in (read_config, sparring.load, resume_run):
        with pytest.raises(ValueError, match=rf"of Sparring 0\.1.*{remake}"):
            refused(tmp_path)


@pytest.mark.parametrize("what", ["bytes", "half", "list", "keys"])
def test_a_checkpoint_that_is_none(finished: Path, tmp_path: Path, what: str) -> None:
    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    path = tmp_path / "checkpoint.pt"
    whole = (finished / "checkpoint.pt").read_bytes()
    if what == "bytes":
        path.write_bytes(b"no checkpoint")
    elif what == "half":
        path.write_bytes(whole[: len(whole) // 2])
    else:
        torch.save([1, 2] if what == "list" else {"model": {}}, path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match="is no checkpoint of a run"):
        resume_run(tmp_path)
    assert content(tmp_path) == before


def test_a_checkpoint_runs_no_code(finished: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    (tmp_path / "config.json").write_bytes((finished / "config.json").read_bytes())
    torch.save({name: Evil() for name in runs.TrainingState.KEYS}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="is no checkpoint of a run"):
        resume_run(tmp_path)
    assert not ran.exists()


# Writing ---------------------------------------------------------------------------------------------------------


def half(stream: BinaryIO) -> None:
    stream.write(b"half of it")
    raise OSError(28, "No space left on device")


def interrupted(stream: BinaryIO) -> None:
    stream.write(b"half of it")
    raise KeyboardInterrupt


@pytest.mark.parametrize(("write", "error"), [(half, OSError), (interrupted, KeyboardInterrupt)])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, write: Callable[[BinaryIO], None], error: type[BaseException], old: bytes | None
) -> None:
    path = tmp_path / "file.bin"
    if old:
        path.write_bytes(old)
    with pytest.raises(error):
        write_atomically(path, write)
    assert content(tmp_path) == ({"file.bin": old} if old else {})


def test_a_full_disk_at_the_last_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file.txt"
    write_text(path, "old")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert content(tmp_path) == {"file.txt": b"old"}


def test_a_write_that_works(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    write_json(path, {"a": [1.5, "ä"]})
    assert read_json(path, "numbers") == {"a": [1.5, "ä"]}
    write_json(path, {})
    assert content(tmp_path) == {"new/folder/file.json": b"{}\n"}
    with pytest.raises(ValueError):
        write_json(path, {"a": float("nan")})
    assert content(tmp_path) == {"new/folder/file.json": b"{}\n"}


def test_a_disk_that_fills_while_a_run_is_saved(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves, real = [0], torch.save

    def save(value: Any, stream: BinaryIO) -> None:
        saves[0] += 1
        if saves[0] == 2:
            half(stream)
        real(value, stream)

    out = tmp_path / "run"
    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="No space left"):
        start_run(tiny(data), out)
    assert not list(out.glob(".*"))
    assert torch.load(out / "checkpoint.pt", weights_only=True)["epoch"] == 1
    resume_run(out)
    assert sorted(content(out)) == FILES


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    with sole_writer(tmp_path / "a"), pytest.raises(ValueError, match="in use: another process writes there"):
        start_run(settings_for({"data": "digits", "threat": "linf:0.1", "epochs": 1}), tmp_path / "a")
    assert not (tmp_path / "a").exists(), "nothing was written, and nothing is left"


def test_resuming_runs_no_file_that_its_caller_did_not_name(tmp_path: Path) -> None:
    build = "from torch import nn\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
    (tmp_path / "mine.py").write_text(build)
    (tmp_path / "theirs.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n{build}")
    own: dict[str, Any] = {"data": "digits", "threat": "linf:0.1", "recipe": "standard", "epochs": 1}
    own["model"] = f"{tmp_path}/mine.py:make"
    start_run(settings_for(own), tmp_path / "run")
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace("mine.py", "theirs.py"))
    for asked in ({}, {"model": own["model"]}):
        with pytest.raises(ValueError, match=r"theirs\.py:make"):
            resume_run(tmp_path / "run", **asked)
    assert not (tmp_path / "ran").exists()


def test_a_file_that_exits_does_not_say_how_a_command_ends(tmp_path: Path) -> None:
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(0)\n")
    (tmp_path / "later.py").write_text(
        "import sys\nfrom torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n        sys.exit(0)\n"
        "def make():\n    return Net(64, 10)\n"
    )
    for name in ("quits", "later"):
        done = subprocess.run(
            [sys.executable, "-m", "sparring", "evaluate", "--model", f"{tmp_path / name}.py:make", "--data", "digits",
             "--threat", "linf:0.1", "--out", str(tmp_path / "out"), "--min-robust", "0.9"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2 and "exit" in done.stderr.lower() and not (tmp_path / "out").exists()


def test_old_results_are_not_taken_for_new_ones(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\ndef good():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\ndef bad():\n    return nn.Linear(3, 2)\n"
    )
    out = tmp_path / "out"
    asked = EvaluationSettings(data="digits", threat="linf:0.1", attacks="fgsm", num_examples=20, checks=False)
    evaluate_folder(from_weights(f"{tmp_path}/nets.py:good", None, "digits"), out, asked)
    with pytest.raises(ValueError, match="the model fails"):
        evaluate_folder(from_weights(f"{tmp_path}/nets.py:bad", None, "digits"), out, asked)
    assert not (out / "results.json").exists() and (out / "results.before.json").exists()
    index = [int(line.split(",")[0]) for line in (out / "examples.csv").read_text().splitlines()[1:]]
    assert index == draw(load_data("digits").y_test, 20, seed=0).tolist(), "drawn, under their own numbers"


def test_the_config_of_a_run_is_a_file_of_settings(tmp_path: Path) -> None:
    own = {"data": "digits", "threat": "linf:0.1", "recipe": "trades:beta=3,num_steps=1", "epochs": 1}
    start_run(settings_for(own), tmp_path / "a")
    again = read_settings(tmp_path / "a" / "config.json", [], {})
    assert settings_for(again) == read_config(tmp_path / "a")


# Weights of classes, and models of one logit


def rare(folder: Path) -> str:
    """Nine of ten examples are of class 0; whatever a network learns of the two, classes overlap."""
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(400, 4, generator=draw)
    y = (torch.rand(400, generator=draw) < 0.1).long()
    x[:, 0] = (x[:, 0] + 0.3 * y).clamp(0, 1)
    np.savez(folder / "rare.npz", x_train=x[:300], y_train=y[:300], x_test=x[300:], y_test=y[300:])
    return f"{folder}/rare.npz"


def test_balanced_weights_reach_the_loss_and_the_choice(tmp_path: Path) -> None:
    asked = {"data": rare(tmp_path), "threat": "linf:0.01", "model": "mlp", "epochs": 20, "recipe": "standard"}
    recalls = []
    for name, more in (("plain", {}), ("weighted", {"class_weights": "balanced"}), ("same", {"class_weights": "1..1"})):
        result = start_run(settings_for({**asked, **more}), tmp_path / name)
        data = np.load(asked["data"])
        right = sparring.load(tmp_path / name, "last")(torch.from_numpy(data["x_test"])).argmax(1).numpy()
        recalls.append((right[data["y_test"] == 1] == 1).mean())
        assert ("weighted_robust_accuracy" in result.history[0]) == bool(more)
    assert recalls[1] > recalls[0] + 0.3
    plain, same = (load_file(tmp_path / name / "last.safetensors") for name in ("plain", "same"))
    assert all(torch.allclose(plain[key], same[key], atol=1e-4) for key in plain)


def test_weights_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    data = rare(tmp_path)
    for text in ("1..2..3", "1..x", "1", "even"):
        with pytest.raises(ValueError, match="expected balanced, or 2 numbers with two dots"):
            start_run(settings_for({"data": data, "threat": "linf:0.1", "class_weights": text}), tmp_path / "run")
    (tmp_path / "own.py").write_text("def mine(threat): return lambda model, x, y, noise=None: 0")
    with pytest.raises(ValueError, match=r"own.py:mine takes no class_weights; pgd-at, trades"):
        asked = {"data": data, "recipe": f"{tmp_path}/own.py:mine", "class_weights": "balanced"}
        start_run(settings_for(asked), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_of_one_logit_is_trained_as_one_of_two(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, two):\n"
        "        super().__init__()\n"
        "        self.layer, self.two = nn.Linear(4, 1), two\n"
        "    def forward(self, x):\n"
        "        s = self.layer(x)\n"
        "        return torch.cat([0 * s, s], 1) if self.two else s\n"
        "def one(): return Net(False)\ndef two(): return Net(True)\n"
        "def sure(): return nn.Sequential(nn.BatchNorm1d(4), Net(False), nn.BatchNorm1d(1), nn.Sigmoid())\n"
    )
    asked = {"data": rare(tmp_path), "threat": "linf:0.05", "epochs": 2, "batch_size": 50, "class_weights": "balanced"}
    for name in ("one", "two"):
        start_run(settings_for({**asked, "model": f"{tmp_path}/nets.py:{name}"}), tmp_path / name)
    one, two = (load_file(tmp_path / name / "best.safetensors") for name in ("one", "two"))
    assert set(one) == set(two) and all(torch.equal(one[key], two[key]) for key in one)
    with pytest.raises(ValueError, match=r"leave out its .*sigmoid"):
        start_run(settings_for({**asked, "model": f"{tmp_path}/nets.py:sure"}), tmp_path / "sure")


def test_perturbed_weights_go_around_any_recipe_that_crafts(tmp_path: Path) -> None:
    own: dict[str, Any] = {"data": "digits", "threat": "linf:0.1", "model": "mlp", "epochs": 1, "held_out": 50}
    found = {}
    for gamma in (0.0, 1e-7, 0.02):
        settings = TrainingSettings(**own, recipe="fgsm-rs", awp=gamma)
        found[gamma] = start_run(settings, tmp_path / str(gamma)).history[0]["train_loss"]
    assert found[1e-7] == pytest.approx(found[0.0], rel=1e-5) and abs(found[0.02] - found[0.0]) > 1e-4
    with pytest.raises(ValueError, match="Standard has no such two parts: take pgd-at"):
        start_run(TrainingSettings(**own, recipe="standard", awp=0.01), tmp_path / "standard")
