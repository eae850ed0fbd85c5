"""Models of other libraries against the same numbers computed otherwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, StandardScaler
from torch import nn

from sparring import L2, Linf, fgsm, pgd, pgd_at
from sparring.adapters.hugging_face import ReplacedWords, RobustLoss, ShiftedVectors
from sparring.adapters.keras_models import KerasClassifier
from sparring.adapters.scikit_learn import network_from
from sparring.core.model_state import attack_mode
from sparring.modalities.text.models import TextNet
from sparring.modalities.text.recipes import TEXT_RECIPES
from sparring.modalities.text.search import full_search
from sparring.modalities.text.threats import Substitutions, substitution_table
from sparring.modalities.text.tokens import Lexicon
from sparring.threats import Lens

# scikit-learn


PIPELINES = {
    "two classes": (load_breast_cancer, [StandardScaler(), LogisticRegression()]),
    "three classes": (load_iris, [MinMaxScaler((-1, 2)), LogisticRegression()]),
    "no mean": (load_iris, [StandardScaler(with_mean=False), "passthrough", LogisticRegression()]),
    "no scale": (load_iris, [StandardScaler(with_std=False), LogisticRegression()]),
    **{
        name: (load_iris, [StandardScaler(), MLPClassifier((7, 5), activation=name, max_iter=5, random_state=0)])
        for name in ("identity", "logistic", "tanh", "relu")
    },
    "binary network": (load_breast_cancer, [StandardScaler(), MLPClassifier((4,), max_iter=5, random_state=0)]),
}


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", PIPELINES)
def test_the_network_computes_what_the_pipeline_computes(name: str) -> None:
    load, steps = PIPELINES[name]
    rows, labels = load(return_X_y=True)
    names = np.array(["a", "b", "c"])[labels]
    pipeline = make_pipeline(*steps).fit(rows, names)
    logits = network_from(pipeline)(torch.from_numpy(rows)).detach()
    np.testing.assert_allclose(logits.softmax(1).numpy(), pipeline.predict_proba(rows), atol=1e-10)
    assert (pipeline.classes_[logits.argmax(1).numpy()] == pipeline.predict(rows)).all()


def test_other_estimators_are_refused_with_what_takes_them() -> None:
    rows, labels = load_iris(return_X_y=True)
    with pytest.raises(TypeError, match=r"RandomForestClassifier has no network.*BlackBox\(model.predict_proba\)"):
        network_from(RandomForestClassifier(2).fit(rows, labels))
    with pytest.raises(ValueError, match="LogisticRegression is not fitted yet"):
        network_from(LogisticRegression())
    with pytest.raises(TypeError, match=r"clip=False"):
        network_from(make_pipeline(MinMaxScaler(clip=True), LogisticRegression()).fit(rows, labels))
    with pytest.raises(TypeError, match="expected a classifier"):
        network_from(StandardScaler().fit(rows))


# Keras


@pytest.fixture
def keras() -> Any:
    return pytest.importorskip("keras")


def twins(keras: Any, last: str) -> tuple[Any, nn.Module]:
    """A dense network of Keras, and PyTorch's with the same weights, which returns logits."""
    num = 1 if last == "sigmoid" else 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, num))
    layers = [keras.layers.Dense(10, activation="relu"), keras.layers.Dense(num, activation=last)]
    model = keras.Sequential([keras.Input((5,)), *layers])
    for ours, theirs in zip(layers, (net[0], net[2]), strict=True):
        ours.set_weights([theirs.weight.detach().numpy().T, theirs.bias.detach().numpy()])
    return model, net


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("last", ["softmax", "linear", "sigmoid"])
def test_a_keras_model_is_attacked_and_trained_as_the_same_network_of_pytorch(
    keras: Any, last: str, wrapped: bool
) -> None:
    model, net = twins(keras, last)
    model = KerasClassifier(model) if wrapped else model
    x, y = torch.rand(30, 5), torch.arange(30) % (2 if last == "sigmoid" else 10)
    for attack in (fgsm(Linf(0.05)), pgd(L2(0.2), num_steps=5)):
        ours, theirs = (attack(subject, x, y) for subject in (model, net))
        torch.testing.assert_close(ours.x_adv, theirs.x_adv, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)  # of logits, not of a softmax twice
    losses = []
    for subject in (model, net):
        seeded()
        losses.append(pgd_at(Linf(0.05), num_steps=3)(subject, x, y))
    torch.testing.assert_close(*losses)
    losses[0].backward()
    losses[1].backward()
    kernel = next(p for name, p in model.named_parameters() if name.endswith("dense/kernel") or p.shape == (5, 10))
    torch.testing.assert_close(kernel.grad.T, net[0].weight.grad, rtol=1e-3, atol=1e-5)


def seeded() -> None:
    torch.manual_seed(1)


def test_keras_layers_are_told_whether_they_train(keras: Any) -> None:
    inside = keras.Sequential([
        keras.Input((4, 3, 2)), keras.layers.Conv2D(3, 2), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5),
        keras.layers.Flatten(), keras.layers.Dense(2),
    ])  # fmt: skip
    model, x = KerasClassifier(inside, channels_first=True), torch.rand(8, 2, 4, 3)
    torch.testing.assert_close(model.eval()(x), inside(x.permute(0, 2, 3, 1), training=False))
    assert torch.equal(model(x), model(x)) and not torch.equal(model.train()(x), model(x))
    before = [p.detach().clone() for p in model.parameters()]
    with attack_mode(model, "train") as frozen:
        frozen(x)  # moves the running statistics, which Keras keeps as parameters
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_what_is_no_keras_model_is_refused(keras: Any) -> None:
    with pytest.raises(TypeError, match="KERAS_BACKEND=torch"):
        KerasClassifier(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no weights yet"):
        KerasClassifier(keras.Sequential([keras.layers.Dense(2)]))


# Hugging Face


class Plain:
    """Stands for the Trainer."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **more: Any) -> str:
        return "the Trainer's"


class Robust(RobustLoss, Plain):
    recipe = pgd_at(Linf(0.1), num_steps=2)


def test_the_recipe_is_the_loss_in_training_alone() -> None:
    net, x, y = nn.Linear(4, 3), torch.rand(6, 4), torch.arange(6) % 3
    batch = {"pixel_values": x, "labels": y}
    seeded()
    ours = Robust().compute_loss(net, batch)
    seeded()
    assert torch.equal(ours, Robust.recipe(net, x, y))
    assert Robust().compute_loss(net.eval(), batch) == "the Trainer's"
    with pytest.raises(ValueError, match="a batch of a, b; expected input_ids or one input, and labels"):
        Robust().compute_loss(net.train(), {"a": x, "b": y})


class Bag(nn.Module):
    """Means of word vectors, with the doors of a model of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors, self.last = nn.Embedding(20, 6), nn.Linear(6, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.vectors

    def forward(self, input_ids: Any = None, attention_mask: Any = None, inputs_embeds: Any = None) -> dict[str, Any]:
        seen = self.vectors(input_ids) if inputs_embeds is None else inputs_embeds
        weight = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
        return {"logits": self.last((seen * weight).sum(1))}


def test_word_vectors_move_and_learn() -> None:
    model, ids = Bag(), torch.randint(20, (5, 7))
    texts = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(5) % 3}
    shifted = ShiftedVectors(model)
    x = shifted.batch(texts)
    assert torch.equal(shifted(x), model(ids, texts["attention_mask"])["logits"])  # no shift, no change
    # one step of L2 on a linear model of mean vectors, in closed form: every vector moves along the same direction
    moved = fgsm(Lens(L2(0.5, low=None, high=None), "shift"))(shifted, x, texts["labels"]).x_adv["shift"]
    logits = model(ids, texts["attention_mask"])["logits"]
    residual = logits.softmax(1) - nn.functional.one_hot(texts["labels"], 3)
    direction = (residual @ model.last.weight)[:, None].expand_as(moved)
    want = 0.5 * direction / direction.flatten(1).norm(dim=1)[:, None, None]
    torch.testing.assert_close(moved, want.detach(), rtol=1e-4, atol=1e-6)

    class Text(RobustLoss, Plain):
        recipe = pgd_at(Lens(L2(0.5, low=None, high=None), "shift"), num_steps=2)

    Text().compute_loss(model, texts).backward()
    assert model.vectors.weight.grad.abs().sum() > 0


def test_words_are_replaced_in_a_model_of_transformers_as_in_ours() -> None:
    """The oracle is a network of the text room with the same weights."""

    class Twin(TextNet):
        def judge(self, vectors: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            weight = mask[..., None] / mask.sum(1)[:, None, None]
            return model.last((vectors * weight).sum(1))

    model = Bag()
    twin = Twin(20, 6)
    twin.words = model.vectors
    lexicon = Lexicon(["", "?", *"abcdefghijklmnopqrstuvwxyz"], known=20)
    table, allowed = substitution_table(lexicon, {"a": ("b", "z"), "c": ("d",), "e": ("f", "g", "h")}, 3)
    threat = Substitutions(1.0, table, allowed, lexicon)
    ids = torch.randint(2, 8, (5, 7))
    there = (torch.arange(7) < 5).expand(5, -1).long()
    texts = {"input_ids": ids, "attention_mask": there, "labels": torch.arange(5) % 3}
    ours, x = ReplacedWords(model), ReplacedWords(model).batch(texts)
    assert not threat.complaints(x) and "labels" not in x
    for z in (threat.null(x), threat.project(x, torch.rand_like(threat.null(x)))):
        torch.testing.assert_close(ours(threat.apply(x, z)), twin(threat.apply(x, z)))
    found = full_search(threat)(ours, x, texts["labels"])
    assert torch.equal(found.x_adv["ids"], full_search(threat)(twin, x, texts["labels"]).x_adv["ids"])

    class Text(RobustLoss, Plain):
        recipe = TEXT_RECIPES["substituted"](threat)
        texts = ReplacedWords

    seeded()
    loss = Text().compute_loss(model.train(), texts)
    seeded()
    torch.testing.assert_close(loss, Text.recipe(twin.train(), x, texts["labels"]))
    loss.backward()
    assert model.vectors.weight.grad.abs().sum() > 0
