"""The command line: what goes wrong ends in one clear line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from command import Outcome
from command import call as sparring
from sparring.app import cli

COMMAND = [sys.executable, "-m", "sparring.app.cli"]


# What the commands are run on ------------------------------------------------------------------------------------

NETS = """
import torch
from torch import nn

class Odd(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear, self.function = nn.Linear(5, 3), function
    def forward(self, x):
        return self.function(self.linear(x))

def good(): return Odd(lambda s: s)
def probabilities(): return Odd(lambda s: s.softmax(1))
def one_logit(): return Odd(lambda s: s[:, :1])
def as_two(): return Odd(lambda s: torch.stack([0 * s[:, 0], s[:, 0] ], 1))
def four_axes(): return Odd(lambda s: s[:, :, None, None])
def a_tuple(): return Odd(lambda s: (s, s))
def nan(): return Odd(lambda s: s * float("nan"))
def two_classes(): return Odd(lambda s: s[:, :2])
def cut(): return Odd(lambda s: s.detach())
def images_only(): return nn.Conv2d(1, 2, 3)
def number(): return 7
def fails(): raise RuntimeError("the licence server is away")
def needs(width): return nn.Linear(width, 3)
instance = nn.Linear(5, 3)
"""


class Bomb:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    """Three easy classes of five features in [0, 1]: 60 examples to train on, 30 to test on."""
    rng = np.random.default_rng(seed)
    y_train, y_test = np.arange(60) % 3, np.arange(30) % 3
    centres = np.eye(3, 5) * 0.6 + 0.2
    x_train, x_test = ((centres[y] + rng.uniform(-0.1, 0.1, (len(y), 5))).astype(np.float32) for y in (y_train, y_test))
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, a finished run, an evaluation, and every kind of broken thing. Read only."""
    w = tmp_path_factory.mktemp("shop")
    _broken_data(w)
    (w / "nets.py").write_text(NETS)
    (w / "syntax.py").write_text("def good(:\n")
    (w / "broken.toml").write_text("epochs = = 3\n")
    (w / "unknown.toml").write_text("epocs = 3\n")
    (w / "broken.json").write_text('{"epochs": 3')
    (w / "list.json").write_text("[1, 2]")
    (w / "plain.txt").write_text("hello")
    (w / "empty").mkdir()

    done = sparring(
        "train", "--data", str(w / "good.npz"), "--threat", "linf:0.1", "--epochs", "2", "--model", "mlp",
        "--out", str(w / "run"),
    )  # fmt: skip
    assert done.code == 0, done.err
    done = sparring("evaluate", str(w / "run"), "--out", str(w / "evaluation"), "--attacks", "fgsm")
    assert done.code == 0, done.err

    torch.save(Bomb(w / "EXPLODED"), w / "bomb.pt")
    (w / "bomb.pkl").write_bytes(pickle.dumps(Bomb(w / "EXPLODED")))
    torch.save({"weight": torch.zeros(2, 2)}, w / "other.pt")
    (w / "garbage.safetensors").write_bytes(b"\x00not a header" * 10)
    (w / "nothing.safetensors").write_bytes(b"")

    for name, file, content in (
        ("config_broken", "config.json", b"{"),
        ("config_empty", "config.json", b"{}"),
        ("config_list", "config.json", b"[]"),
        ("config_shape", "config.json", None),
        ("config_key", "config.json", None),
        ("weights_broken", "best.safetensors", b"\xff" * 50),
        ("training_broken", "training.json", b"{"),
        ("metrics_broken", "metrics.jsonl", b"{\n"),
        ("checkpoint_broken", "checkpoint.pt", b"PK\x03\x04 half of it"),
        ("checkpoint_list", "checkpoint.pt", None),
        ("checkpoint_bomb", "checkpoint.pt", (w / "bomb.pt").read_bytes()),
    ):
        shutil.copytree(w / "run", w / name)
        if content is not None:
            (w / name / file).write_bytes(content)
    torch.save([1, 2], w / "checkpoint_list" / "checkpoint.pt")
    config = json.loads((w / "run" / "config.json").read_text())
    (w / "config_shape" / "config.json").write_text(json.dumps({**config, "given": {"shape": [7], "num_classes": 3}}))
    config["settings"]["speed"] = 3
    (w / "config_key" / "config.json").write_text(json.dumps(config))
    shutil.copytree(w / "run", w / "unfinished")
    for path in (w / "unfinished").glob("*.safetensors"):
        path.unlink()
    for name, text in (("results_broken", "{"), ("results_old", '{"schema": "sparring.results/0"}')):
        (w / name).mkdir()
        (w / name / "results.json").write_text(text)
    return w


def _broken_data(w: Path) -> None:
    good = arrays()
    half = good["y_train"].astype(float)
    half[3] = 0.5
    holes = good["x_train"].copy()
    holes[3, 1] = np.nan
    rare = np.where(np.arange(60) == 5, 3, good["y_train"])
    variants: dict[str, dict[str, Any]] = {
        "good": {},
        "negative_labels": {"y_train": good["y_train"] - 1},
        "half_labels": {"y_train": half},
        "text_labels": {"y_train": good["y_train"].astype(str)},
        "two_column_labels": {"y_train": np.eye(3)[good["y_train"]] + 1},
        "fewer_labels": {"y_train": good["y_train"][:-1]},
        "rare_class": {"y_train": rare},
        "holes": {"x_train": holes},
        "out_of_box": {"x_train": good["x_train"] * 7, "x_test": good["x_test"] * 7},
        "float_images": {"x_train": np.full((60, 1, 8, 8), 200.0), "x_test": np.full((30, 1, 8, 8), 200.0)},
        "integers": {"x_train": np.ones((60, 5), np.int64)},
        "one_axis": {"x_train": np.ones(60, np.float32)},
        "other_width": {"x_test": np.zeros((30, 4), np.float32)},
        "empty": {"x_test": np.zeros((0, 5), np.float32), "y_test": np.zeros(0, np.int64)},
        "one_class": {"y_train": np.zeros(60, np.int64), "y_test": np.zeros(30, np.int64)},
        "two_examples": {"x_train": good["x_train"][:2], "y_train": good["y_train"][:2]},
        "pickled": {"x_train": np.array([Bomb(w / "EXPLODED")] * 60, dtype=object)},
    }
    for name, changes in variants.items():
        np.savez(w / f"{name}.npz", **{**good, **changes})
    np.savez(w / "no_test.npz", x_train=good["x_train"], y_train=good["y_train"])
    (w / "garbage.npz").write_bytes(b"this is no zip file")
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for folder in ("no_split", "no_column", "no_image"):
        (w / folder).mkdir()
    labels = pa.array([0, 1])
    pictures = pa.array([{"bytes": b"no png", "path": "a"}] * 2)
    pq.write_table(pa.table({"image": pictures, "label": labels}), w / "no_split" / "train-0.parquet")
    for split in ("train", "test"):
        pq.write_table(pa.table({"photo": pictures, "label": labels}), w / "no_column" / f"{split}-0.parquet")
        pq.write_table(pa.table({"image": pictures, "label": labels}), w / "no_image" / f"{split}-0.parquet")


# The table -------------------------------------------------------------------------------------------------------

TRAIN = "train --out {out} --data {w}/good.npz --threat linf:0.1 --epochs 1 --model mlp"
OWN = "evaluate --out {out} --data {w}/good.npz --threat linf:0.1 --attacks fgsm --model {w}/nets.py:"
RUN = "evaluate {w}/run --out {out} --attacks fgsm"

BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    # threats
    "threat without a radius": (f"{TRAIN} --threat linf", ("lacks its radius", "linf:RADIUS")),
    "unknown threat": (f"{TRAIN} --threat l7:0.1", ("'l7'", "linf, l2, l1", "linf, l2")),
    "radius no number": (f"{TRAIN} --threat linf:much", ("radius='much'", "such as 0.3 or 8/255")),
    "radius over zero": (f"{TRAIN} --threat linf:8/0", ("'8/0' is not a number",)),
    "radius negative": (f"{TRAIN} --threat linf:-0.1", ("must be above 0",)),
    "radius nan": (f"{TRAIN} --threat linf:nan", ("must be above 0",)),
    "radius infinite": (f"{TRAIN} --threat linf:inf", ("infinite",)),
    "threat option": (f"{TRAIN} --threat linf:0.1,speed=3", ("no option 'speed'", "radius, box")),
    "box empty": (f"{TRAIN} --threat linf:0.1,box=1..0", ("the box is empty",)),
    "box unclear": (f"{TRAIN} --threat linf:0.1,box=1", ("LOW..HIGH or none",)),
    # names
    "unknown command": ("trian --out {out}", ("trian", "train")),
    "unknown recipe": (f"{TRAIN} --recipe magic", ("'magic'", "pgd-at")),
    "unknown model": (f"{TRAIN} --model vgg", ("'vgg'", "mlp", "FILE.py:FUNCTION")),
    "unknown data": (f"{TRAIN} --data imagenette", ("'imagenette'", "digits", ".npz")),
    "unknown attack": (f"{RUN} --attacks pdg", ("'pdg'", "pgd")),
    "unknown attack option": (f"{RUN} --attacks pgd:steps=3", ("'steps'", "num_steps")),
    "attack option of wrong type": (f"{RUN} --attacks pgd:num_steps=many", ("num_steps='many'", "a whole number")),
    "attack option without attack": (f"{RUN} --attacks num_steps=3", ("begins with an option", "pgd:num_steps=20")),
    "unknown objective": (f"{RUN} --attacks pgd:objective=hinge", ("'hinge'", "margin")),
    "restarts without randomness": (f"{RUN} --attacks fgsm:restarts=3", ("restarts=3", "has no option 'restarts'")),
    "no restarts": (f"{RUN} --attacks pgd:restarts=0", ("restarts",)),
    "negative steps": (f"{RUN} --attacks pgd:num_steps=-1", ("num_steps",)),
    "class that is not there": (f"{RUN} --attacks pgd:num_steps=2,wanted=9", ("wanted", "9")),
    "no attack": (f"{RUN} --attacks ,", ("attack",)),
    "unknown list": ("list weapons", ("'weapons'", "attacks, recipes, models")),
    "unknown option": (f"{TRAIN} --epoch 3", ("--epoch", "--epochs")),
    "missing --out": ("train --data digits --threat linf:0.1", ("--out",)),
    "missing --threat": ("train --out {out} --data digits", ("--threat linf:0.2",)),
    "unknown device": (f"{TRAIN} --device gpu7", ("'gpu7' is not available here", "cpu")),
    "absent device": (f"{TRAIN} --device mps", ("'mps' is not available", "cpu")),
    "absent device, evaluate": (f"{RUN} --device mps", ("'mps' is not available", "cpu")),
    # settings
    "unknown setting": (f"{TRAIN} --set velocity=3", ("'velocity' is unknown", "learning_rate")),
    "setting of wrong type": (f"{TRAIN} --set learning_rate=fast", ("learning_rate", "float", "'fast'")),
    "setting of wrong type, int": (f"{TRAIN} --set batch_size=1.5", ("batch_size", "int", "1.5")),
    "setting without =": (f"{TRAIN} --set crop", ("KEY=VALUE", "'crop'")),
    "setting given twice": (f"{TRAIN} --epochs 1 --set epochs=x", ("epochs is given twice", "--set epochs=x")),
    "recipe option of another": (f"{TRAIN} --recipe pgd-at --set beta=6", ("'beta' is unknown", "num_steps")),
    "recipe option of wrong type": (f"{TRAIN} --set num_steps=many", ("num_steps", "many")),
    "recipe option out of range": (f"{TRAIN} --recipe mixed --set share=3", ("share", "(0, 1]")),
    "craft mode": (f"{TRAIN} --set craft_mode=wild", ("'wild'", "eval, train, keep")),
    "averaging of one": (f"{TRAIN} --set averaging=1", ("averaging", "0.999999")),
    "averaging of zero": (f"{TRAIN} --set averaging=0 --epochs 0", ("epochs",)),
    "epochs zero": (f"{TRAIN} --epochs 0", ("epochs must be between 1",)),
    "epochs negative": (f"{TRAIN} --epochs -3", ("epochs must be between 1",)),
    "epochs no number": (f"{TRAIN} --epochs few", ("--epochs", "valid integer")),
    "batch size zero": (f"{TRAIN} --batch-size 0", ("batch_size must be between 1",)),
    "learning rate nan": (f"{TRAIN} --set learning_rate=NaN", ("learning_rate", "nan")),
    "crop of feature vectors": (f"{TRAIN} --set crop=2", ("crop=2", "images")),
    "missing settings file": (f"{TRAIN} --config {{w}}/none.toml", ("none.toml", "not there")),
    "broken TOML": (f"{TRAIN} --config {{w}}/broken.toml", ("broken.toml", "not valid TOML")),
    "broken JSON": (f"{TRAIN} --config {{w}}/broken.json", ("broken.json", "not valid JSON")),
    "JSON list": (f"{TRAIN} --config {{w}}/list.json", ("settings by name", "list")),
    "unknown key in TOML": (f"{TRAIN} --config {{w}}/unknown.toml", ("'epocs' is unknown", "epochs")),
    "settings in a folder": (f"{TRAIN} --config {{w}}/empty", ("empty",)),
    # data
    "missing npz": (f"{TRAIN} --data {{w}}/none.npz", ("none.npz", "no such name, folder or file")),
    "other kind of file": (f"{TRAIN} --data {{w}}/plain.txt", (".txt", ".npz")),
    "broken npz": (f"{TRAIN} --data {{w}}/garbage.npz", ("garbage.npz", "cannot be read")),
    "npz without test": (f"{TRAIN} --data {{w}}/no_test.npz", ("'x_test', 'y_test'", "missing")),
    "npz with pickles": (f"{TRAIN} --data {{w}}/pickled.npz", ("pickled.npz", "plain arrays")),
    "empty folder": (f"{TRAIN} --data {{w}}/empty", ("cannot read a folder", "train-*.parquet")),
    "folder without test split": (f"{TRAIN} --data {{w}}/no_split", ("no test split", "split the data")),
    "parquet without column": (f"{TRAIN} --data {{w}}/no_column", ("'photo'", "`image` or `img`")),
    "images that are none": (f"{TRAIN} --data {{w}}/no_image", ("image 0 cannot be read",)),
    "labels negative": (f"{TRAIN} --data {{w}}/negative_labels.npz", ("y_train", "-1", "class numbers from 0")),
    "labels halves": (f"{TRAIN} --data {{w}}/half_labels.npz", ("y_train", "whole numbers")),
    "labels text": (f"{TRAIN} --data {{w}}/text_labels.npz", ("y_train", "whole numbers")),
    "labels one-hot": (f"{TRAIN} --data {{w}}/two_column_labels.npz", ("y_train", "(60, 3)", "whole numbers")),
    "labels too few": (f"{TRAIN} --data {{w}}/fewer_labels.npz", ("60", "59")),
    "known model without weights": (f"{OWN}".replace("{w}/nets.py:", "mlp"), ("learned nothing",)),
    "threat as wide as the box": (f"{TRAIN} --threat linf:8", ("did you mean linf:8/255",)),
    "negative seed": (f"{TRAIN} --seed -1", ("seed must be between",)),
    "NaN data": (f"{TRAIN} --data {{w}}/holes.npz", ("x_train holds NaN", "fill or drop")),
    "data outside the box": (f"{TRAIN} --data {{w}}/out_of_box.npz", ("7", "box")),
    "images outside [0, 1]": (f"{TRAIN} --data {{w}}/float_images.npz", ("200", "[0.0, 1.0]", "255")),
    "integer data": (f"{TRAIN} --data {{w}}/integers.npz", ("int64", "uint8")),
    "data of one axis": (f"{TRAIN} --data {{w}}/one_axis.npz", ("(60,)", "(N, D)")),
    "other width in the test": (f"{TRAIN} --data {{w}}/other_width.npz", ("(4,)", "(5,)")),
    "empty test": (f"{TRAIN} --data {{w}}/empty.npz", ("x_test", "(0, 5)")),
    "one class": (f"{TRAIN} --data {{w}}/one_class.npz", ("2 classes",)),
    "too few examples": (f"{TRAIN} --data {{w}}/two_examples.npz", ("hold out",)),
    "network for images": (f"{TRAIN} --model cnn-mnist", ("cnn-mnist", "28x28", "mlp")),
    # run folders
    "a run already there": ("train --out {w}/run --data digits --threat linf:0.1", ("already holds a run", "--resume")),
    "out is a file": (TRAIN.replace("{out}", "{w}/plain.txt"), ("plain.txt",)),
    "evaluation into a file": (RUN.replace("{out}", "{w}/plain.txt"), ("plain.txt",)),
    "--resume without a run": ("train --resume --out {out}", ("no run folder", "config.json")),
    "--resume with other settings": ("train --resume --out {w}/run --epochs 7", ("epochs differ", "Leave them out")),
    "--resume with other options": ("train --resume --out {w}/run --set num_steps=3", ("num_steps", "differ")),
    "checkpoint broken": ("train --resume --out {w}/checkpoint_broken", ("checkpoint.pt",)),
    "checkpoint of another kind": ("train --resume --out {w}/checkpoint_list", ("checkpoint.pt",)),
    "checkpoint a bomb": ("train --resume --out {w}/checkpoint_bomb", ("checkpoint.pt",)),
    "no run folder": ("evaluate {w}/empty --out {out}", ("no run folder", "config.json")),
    "run without weights": ("evaluate {w}/unfinished --out {out}", ("best.safetensors", "train")),
    "weights of another kind": (f"{RUN} --checkpoint worst", ("worst.safetensors", "best, last")),
    "run without averages": (f"{RUN} --checkpoint averaged", ("averaged.safetensors", "best, last")),
    "config broken": ("evaluate {w}/config_broken --out {out}", ("config.json", "not valid JSON")),
    "config empty": ("evaluate {w}/config_empty --out {out}", ("config.json", "schema")),
    "config a list": ("evaluate {w}/config_list --out {out}", ("config.json",)),
    "config of other shape": ("evaluate {w}/config_shape --out {out}", ("best.safetensors", "do not fit")),
    "config with another key": ("evaluate {w}/config_key --out {out}", ("config.json", "speed")),
    "weights broken": ("evaluate {w}/weights_broken --out {out}", ("best.safetensors", "cannot be read")),
    "training.json broken": ("evaluate {w}/training_broken --out {out}", ("training.json", "not valid JSON")),
    "metrics.jsonl broken": ("evaluate {w}/metrics_broken --out {out}", ("metrics.jsonl", "not valid JSON")),
    # weights
    "weights missing": (f"{OWN}good --weights {{w}}/none.pt", ("no file", "none.pt")),
    "weights mismatch": (f"{OWN}good --weights {{w}}/other.pt", ("do not fit", "linear.weight")),
    "weights garbage": (f"{OWN}good --weights {{w}}/garbage.safetensors", ("garbage.safetensors", "cannot be read")),
    "weights empty": (f"{OWN}good --weights {{w}}/nothing.safetensors", ("nothing.safetensors", "cannot be read")),
    "weights a bomb": (f"{OWN}good --weights {{w}}/bomb.pt", ("bomb.pt", "may run code", "state_dict")),
    "weights an old bomb": (f"{OWN}good --weights {{w}}/bomb.pkl", ("bomb.pkl", "may run code", "state_dict")),
    "weights mismatch, training": (f"{TRAIN} --weights {{w}}/other.pt", ("do not fit", "weight")),
    # models of one's own
    "model file missing": (f"{OWN}good".replace("nets", "none"), ("no file", "none.py")),
    "model function missing": (f"{OWN}best", ("no function 'best'", "good")),
    "model without function": (f"{OWN}"[:-1], ("FILE.py:FUNCTION",)),
    "model file broken": (f"{OWN}good".replace("nets", "syntax"), ("syntax.py", "SyntaxError")),
    "model raises": (f"{OWN}fails", ("fails' failed", "the licence server is away")),
    "model wants arguments": (f"{OWN}needs", ("lacks its width", "shape, num_classes")),
    "model of wrong type": (f"{OWN}number", ("returned a int", "torch.nn.Module")),
    "model an instance": (f"{OWN}instance", ("instance is a Linear", "a function that returns the network")),
    "model with one logit": (f"{OWN}one_logit", ("one number for each input", "0 to 2", "expected 0 and 1")),
    "model with maps": (f"{OWN}four_axes", ("(30, 3, 1, 1)", "Segmentation")),
    "model with a tuple": (f"{OWN}a_tuple", ("returns a tuple", "lambda x: model(x)[0]")),
    "model with NaN": (f"{OWN}nan", ("NaN or infinite logits",)),
    "model with too few classes": (f"{OWN}two_classes", ("labels go from 0 to 2", "2 classes")),
    "model without gradient": (f"{OWN}cut", ("no gradient", "detach")),
    "model for other inputs": (f"{OWN}images_only", ("the model fails on inputs (30, 5)",)),
    "training, model with one logit": (f"{TRAIN} --model {{w}}/nets.py:one_logit", ("one number for each input",)),
    "training, model with NaN": (f"{TRAIN} --model {{w}}/nets.py:nan", ("NaN or infinite logits",)),
    "training, too few classes": (f"{TRAIN} --model {{w}}/nets.py:two_classes", ("2 classes",)),
    "training, model for other inputs": (f"{TRAIN} --model {{w}}/nets.py:images_only", ("fails on inputs",)),
    "training, model without gradient": (f"{TRAIN} --model {{w}}/nets.py:cut", ("no gradient",)),
    # evaluations and reports
    "evaluate without model": ("evaluate --out {out}", ("run folder", "--model")),
    "evaluate with two models": (f"{RUN} --model mlp", ("its own model and weights",)),
    "evaluate without data": ("evaluate --out {out} --model {w}/nets.py:good", ("--data", "--threat")),
    "num-examples zero": (f"{RUN} --num-examples 0", ("at least 1", "0")),
    "batch size zero, evaluate": (f"{RUN} --batch-size 0", ("batch_size", "at least 1", "0")),
    "unknown certificate": (f"{RUN} --certify magic", ("'magic'", "auto, interval, none")),
    "no rule for a certificate": (f"{OWN}good --certify interval", ("no rule for", "Odd", "leave out")),
    "unknown split": (f"{RUN} --split validation", ("'validation'", "test, train")),
    "data of another shape": (f"{RUN} --data digits", ("the model fails on inputs", "1, 8, 8)")),
    "evaluate outside the box": (f"{RUN} --data {{w}}/out_of_box.npz", ("outside", "box")),
    "report without results": ("report {w}/empty --out {out}/report.html", ("results.json", "not there")),
    "report without folder": ("report {w}/none --out {out}/report.html", ("results.json", "not there")),
    "report of nothing": ("report --out {out}/report.html", ("folders",)),
    "results broken": ("report {w}/results_broken --out {out}/report.html", ("results.json", "not valid JSON")),
    "results of another schema": ("report {w}/results_old --out {out}/report.html", ("sparring.results/2", "/0")),
}  # fmt: skip


def words(text: str, w: Path, out: Path) -> list[str]:
    return [part.format(w=w, out=out) for part in text.split()]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def check_error(outcome: Outcome, fragments: tuple[str, ...]) -> None:
    lines = outcome.err.splitlines()
    assert outcome.code == 2, outcome
    assert len(lines) == 1 and lines[0].startswith("error: "), outcome.err
    assert "Traceback" not in outcome.err
    missing = [f for f in fragments if f not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"


def test_there_are_forty_kinds_of_bad_input() -> None:
    assert len(BAD) >= 40 and len({arguments for arguments, _ in BAD.values()}) == len(BAD)


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str, shop: Path, tmp_path: Path) -> None:
    arguments, fragments = BAD[name]
    if " mps" in arguments and torch.backends.mps.is_available():
        pytest.skip("the device is there")
    out, before = tmp_path / "out", content(shop)
    outcome = sparring(*words(arguments, shop, out))
    check_error(outcome, fragments)
    assert not out.exists() or not list(out.rglob("*")), f"left behind: {content(out).keys()}"
    assert content(shop) == before


@pytest.mark.parametrize("name", ["unknown threat", "weights a bomb", "missing --out"])
def test_bad_input_through_a_process(name: str, shop: Path, tmp_path: Path) -> None:
    arguments, fragments = BAD[name]
    command = [*COMMAND, *words(arguments, shop, tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    check_error(Outcome(done.returncode, done.stdout, done.stderr), fragments)
    assert not (shop / "EXPLODED").exists()


def test_debug_shows_the_traceback(shop: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="radius must be above 0"):
        sparring(*words(f"{TRAIN} --threat linf:-1", shop, tmp_path / "out"), "--debug")


# What is handled -------------------------------------------------------------------------------------------------


def test_probabilities_are_handled_and_told(shop: Path, tmp_path: Path) -> None:
    outcome = sparring(*words(f"{OWN}probabilities", shop, tmp_path / "out"))
    assert outcome.code == 0, outcome.err
    assert "note: The model returns probabilities" in outcome.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [f["name"] for f in results["findings"]].count("probabilities") == 1


def test_probabilities_give_the_verdict_of_their_logits(shop: Path, tmp_path: Path) -> None:
    verdicts = []
    for name in ("good", "probabilities"):
        torch.manual_seed(3)  # the same weights twice
        assert sparring(*words(f"{OWN}{name}", shop, tmp_path / name)).code == 0
        results = json.loads((tmp_path / name / "results.json").read_text())
        verdicts.append([results["metrics"][f"{kind}_accuracy"]["count"] for kind in ("clean", "robust")])
    assert verdicts[0] == verdicts[1]


def test_a_binary_model_with_one_logit_is_handled_and_told(shop: Path, tmp_path: Path) -> None:
    data = arrays()
    binary = {name: values % 2 if name.startswith("y") else values for name, values in data.items()}
    np.savez(tmp_path / "binary.npz", **binary)
    verdicts = []
    for name in ("one_logit", "as_two"):
        torch.manual_seed(3)  # the same weights twice
        arguments = words(f"{OWN}{name} --data {tmp_path}/binary.npz --no-checks", shop, tmp_path / name)
        outcome = sparring(*arguments)
        assert outcome.code == 0, outcome.err
        assert ("note: The model returns one number for each input" in outcome.err) == (name == "one_logit")
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["verdict"] is results["sanity"] is None and outcome.out.endswith(": not checked\n")
        verdicts.append([results["metrics"][f"{kind}_accuracy"]["count"] for kind in ("clean", "robust")])
        reason = results["certification"]["reason"]
        assert "certified_accuracy" not in results["metrics"] and "interval bounds have no rule for" in reason
    assert verdicts[0] == verdicts[1] and verdicts[0][0] > 0


def test_the_verdict_stands_beside_the_number(shop: Path) -> None:
    results = json.loads((shop / "evaluation" / "results.json").read_text())
    assert results["verdict"] in ("TRUSTED", "SUSPECT", "INVALID") and results["sanity"]["seconds"] > 0
    levels = {finding["level"] for finding in results["findings"]}
    assert (results["verdict"] == "TRUSTED") == (levels <= {"note"})
    assert results["certification"]["name"] == "interval_margin"
    counts = [results["metrics"][f"{kind}_accuracy"]["count"] for kind in ("certified", "robust")]
    assert counts == sorted(counts)


# Help and lists --------------------------------------------------------------------------------------------------

GROUP: Any = typer.main.get_command(cli.app)


def plain(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize("command", GROUP.commands)
def test_help_explains_every_option(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    outcome = sparring(command, "--help")
    assert outcome.code == 0 and not outcome.err
    shown = plain(outcome.out)
    for parameter in GROUP.commands[command].params:
        if parameter.name != "help":
            assert parameter.help, f"{command}: {parameter.name} has no help"
            assert plain(parameter.help) in shown
            assert max(parameter.opts, key=len).lower() in shown.lower()


def test_help_names_every_command() -> None:
    outcome = sparring("--help")
    assert outcome.code == 0 and all(name in outcome.out for name in GROUP.commands)


def test_without_arguments_the_help_is_shown() -> None:
    outcome = sparring()
    shown = outcome.out + outcome.err
    assert all(f"\n  {name}" in shown for name in GROUP.commands), shown


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("attacks", ("pgd\n", "num_steps")),
        ("recipes", ("trades\n", "beta")),
        ("models", ("cnn-small\n",)),
        ("threats", ("linf:RADIUS\n",)),
        ("data", ("digits\n", ".npz")),
    ],
)
def test_list(what: str, expected: tuple[str, ...]) -> None:
    outcome = sparring("list", what)
    assert outcome.code == 0 and not outcome.err
    assert all(text in outcome.out for text in expected)


# Ctrl-C ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def training(shop: Path, tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A run of many short epochs in a process of its own, after its first epoch."""
    out = tmp_path / "run"
    arguments = words(TRAIN.replace("--epochs 1 ", "--epochs 120 ") + " --set num_steps=1", shop, out)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True, env=environment) as process:
        deadline = time.monotonic() + 60
        while not (out / "metrics.jsonl").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield process, out
        process.kill()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to a single process")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "polite kill"])
def test_interrupted_training_is_saved_and_goes_on(
    training: tuple[subprocess.Popen[str], Path], number: signal.Signals
) -> None:
    process, out = training
    assert process.poll() is None, "the run ended before it could be interrupted"
    process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130, err
    assert f"sparring train --resume --out {out}" in err and "Traceback" not in err
    assert (out / "checkpoint.pt").exists() and not list(out.glob(".*.part"))
    done = len((out / "metrics.jsonl").read_text().splitlines())
    assert 1 <= done < 120
    outcome = sparring("train", "--resume", "--out", str(out))
    assert outcome.code == 0, outcome.err
    history = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in history] == list(range(120))
