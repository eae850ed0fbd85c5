"""A user's own data sets, loaders and arrays by FILE.py:FUNCTION, against the same examples read by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

import sparring
from command import call
from sparring import modalities
from sparring.adapters.own_data import parts_of
from sparring.modalities import find_data, load_data

FILE = """
import random
import numpy, torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from PIL import Image

draw = torch.Generator().manual_seed(0)
X, Y = torch.rand(60, 1, 8, 8, generator=draw), torch.arange(60) % 3
X[:, 0, 0, 0] = Y / 2  # learnable
PIXELS = (X * 255).round().to(torch.uint8)

class Own(Dataset):
    classes = ["cat", "dog", "eel"]
    def __init__(self, first=0, count=40, parts="pair"):
        self.first, self.count, self.parts = int(first), int(count), parts
    def __len__(self):
        return self.count
    def __getitem__(self, i):
        if i >= self.count:
            raise IndexError(i)
        x, y = X[self.first + i], int(Y[self.first + i])
        forms = {"pair": (x, y), "three": (x, y, i), "dict": {"pixel_values": x, "labels": y, "path": "a.png"},
                 "two inputs": {"a": x, "b": x, "labels": y}, "named": ({"a": x}, y),
                 "picture": (Image.fromarray(PIXELS[self.first + i, 0].numpy()), Own.classes[y]),
                 "random": (x * random.random(), y)}
        if self.parts == "fails" and i == 7:
            raise KeyError("seven")
        return forms.get(self.parts, (x, y))

class Stream(IterableDataset):
    def __iter__(self):
        return ((x, y) for x, y in zip(X[:40], Y[:40]))

def sets(parts="pair"): return Own(0, 40, parts), Own(40, 20, parts)
def loaders(): return DataLoader(Own(0, 40), 7, shuffle=True), DataLoader(Own(40, 20), 16)
def loader_of_dicts(): return tuple(DataLoader(part, 8, collate_fn=lambda items: {
    "image": torch.stack([x for x, _ in items]), "label": torch.tensor([y for _, y in items])}) for part in sets())
def named(): return {"train": Own(0, 40), "validation": Own(40, 20)}
def streams(): return Stream(), Own(40, 20)
def arrays(): return (X[:40].numpy(), Y[:40].numpy()), (X[40:], Y[40:])
def test_alone(): return DataLoader(Own(40, 20), 8)
def drops(): return Own(0, 40), DataLoader(Own(40, 20), 8, drop_last=True)
def from_one(): return (X[:40], Y[:40] + 1), (X[40:], Y[40:] - 1)
def nothing(): return None
def ends(): raise SystemExit(0)
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    (tmp_path / "own.py").write_text(FILE, encoding="utf-8")
    return f"{tmp_path}/own.py:"


def by_hand() -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.rand(60, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 3
    x[:, 0, 0, 0] = y / 2
    return x, y


FUNCTIONS = [
    "sets",
    "loaders",
    "loader_of_dicts",
    "named",
    "streams",
    "arrays",
    "sets,parts=dict",
    "sets,parts=picture",
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_form_gives_the_examples(file: str, function: str) -> None:
    data, (x, y) = load_data(file + function), by_hand()
    prepared = data.prepare(data.x_test)
    assert torch.allclose(prepared, x[40:], atol=0.5 / 255 if "picture" in function else 0)
    assert torch.equal(data.y_test, y[40:])
    # shuffled loaders give another order of the same examples, the same in each call
    mine, theirs = (at[:, 0, 3, 3].argsort() if function == "loaders" else range(40) for at in (data.x_train, x[:40]))
    assert torch.allclose(data.prepare(data.x_train)[mine], x[theirs], atol=0.5 / 255)
    assert torch.equal(data.y_train[mine], y[theirs]) and data.num_classes == 3
    assert (data.class_names == ("cat", "dog", "eel")) == (function not in ("streams", "arrays"))


def test_a_shuffled_loader_is_read_alike_twice_and_leaves_the_generator(file: str) -> None:
    before, found = torch.get_rng_state(), []
    for _ in range(2):
        torch.rand(3) if found else None  # another state of the caller's generator
        modalities._read.cache_clear()
        found.append(load_data(file + "loaders").x_train)
        torch.set_rng_state(before)
    assert torch.equal(*found) and torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(found[0], by_hand()[0][:40])  # it was shuffled


def test_training_and_evaluation_on_the_command_line(file: str, tmp_path: Path) -> None:
    data = file + "loaders"
    asked = ["--epochs", "2", "--batch-size", "8", "--model", "mlp", "--threat", "linf:0.05", "--out"]
    code, _, err = call("train", "--data", data, *asked, f"{tmp_path}/run")
    assert code == 0, err
    code, _, err = call("evaluate", f"{tmp_path}/run", "--data", data, "--attacks", "fgsm", "--no-checks")
    assert code == 0, err
    results = json.loads((tmp_path / "run" / "evaluation" / "results.json").read_text())
    model, (x, y) = sparring.load(tmp_path / "run"), by_hand()
    clean = int((model(x[40:]).argmax(1) == y[40:]).sum())
    assert results["metrics"]["clean_accuracy"]["count"] == clean and results["data"]["name"] == "own.py:loaders"


def test_a_test_set_alone_is_evaluated_and_not_trained_on(file: str, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))"
    )
    asked = ["--data", file + "test_alone", "--threat", "linf:0.05"]
    code, out, err = call(
        "evaluate", "--model", f"{tmp_path}/nets.py:make", *asked, "--attacks", "fgsm", "--out", f"{tmp_path}/e"
    )
    assert code == 0 and "n = 20" in out, err
    code, _, err = call("train", *asked, "--out", f"{tmp_path}/run")
    assert code == 2 and "has no train examples" in err and "(train, test)" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("sets,parts=three", ("example 0 is 3 parts", "(x, y)", "collate_fn")),
        ('sets,parts="two inputs"', ("a, b, labels", "one input")),
        ("sets,parts=named", ("sparring.Dataset", "several inputs".capitalize())),
        ("sets,parts=fails", ("example 7 fails with KeyError",)),
        ("from_one", ("-1 to 1", "y - 1")),
        ("nothing", ("NoneType", "(train, test)")),
        ("ends", ("failed with SystemExit",)),
    ],
)  # fmt: skip
def test_what_will_not_do_is_refused_with_the_fix(file: str, function: str, words: tuple[str, ...]) -> None:
    code, _, err = call("train", "--data", file + function, "--threat", "linf:0.1", "--out", "run")
    assert code == 2 and all(word in err for word in words), err


@pytest.mark.parametrize(("function", "word"), [("drops", "16 of the 20"), ("sets,parts=random", "two looks")])
def test_what_reading_leaves_out_or_freezes_is_told(file: str, function: str, word: str) -> None:
    assert word in find_data(file + function).taken


def test_subsets_and_samplers_are_honoured() -> None:
    x, y = by_hand()
    whole = TensorDataset(x, y)
    loader = DataLoader(whole, 7, sampler=torch.utils.data.SubsetRandomSampler(range(10)))
    train, test = parts_of((Subset(whole, range(5, 25)), loader), "data")
    assert train is not None and np.array_equal(train.x, x[5:25]) and train.told == ""
    assert sorted(test.x[:, 0, 3, 3].tolist()) == sorted(x[:10, 0, 3, 3].tolist()) and "10 of the 60" in test.told


def test_a_stream_without_end_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(IterableDataset):
        def __iter__(self) -> Any:
            while True:
                yield torch.zeros(1000), 0

    monkeypatch.setattr("sparring.core.unpacking.SHARE_OF_MEMORY", 1e-6)
    with pytest.raises(ValueError, match=r"more than half of this machine's memory.*Subset"):
        parts_of((Endless(), Endless()), "data")


# In one's own loop


def batches(form: str) -> list[Any]:
    x, y = torch.rand(12, 6), torch.arange(12) % 3
    forms = {
        "pair": (x, y), "list": [x, y], "named": {"pixel_values": x, "labels": y},
        "named with more": {"image": x, "label": y, "path": ["a"] * 12}, "one input": {"features": x, "target": y},
        "three": (x, y, torch.arange(12)), "two inputs": {"a": x, "b": x, "labels": y}, "no label": {"x": x, "z": y},
    }  # fmt: skip
    return [forms[form]]


@pytest.mark.parametrize("form", ["pair", "list", "named", "named with more", "one input"])
def test_named_batches_mean_what_pairs_mean(form: str) -> None:
    threat, found = sparring.Linf(0.1), []
    for now in ("pair", form):
        torch.manual_seed(1)
        net, data = torch.nn.Linear(6, 3), batches(now)
        sparring.train(net, data, sparring.pgd_at(threat), torch.optim.SGD(net.parameters(), 0.1), num_epochs=2)
        judged = sparring.evaluate(net.eval(), data, threat, "fgsm", checks=False)
        found.append((net.weight.detach(), judged.table["size"]))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("three", r"3 parts.*\(b\[0\], b\[1\]\)"), ("no label", "LABEL"),
        ("two inputs", r"'a': b\['a'\], 'b': b\['b'\]\}, b\['labels'\]"),
    ],
)  # fmt: skip
def test_other_batches_are_refused_with_the_fix(form: str, words: str) -> None:
    net, threat, data = torch.nn.Linear(6, 3), sparring.Linf(0.1), batches(form)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for run in (
        lambda: sparring.evaluate(net, data, threat, "fgsm"),
        lambda: sparring.train(net, data, sparring.pgd_at(threat), optimizer, num_epochs=1),
    ):
        with pytest.raises(ValueError, match=words):
            run()
