"""What the look before the attack refuses, handles and tells; and that a sound model passes in silence."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from sparring.attacks.catalogue import pgd
from sparring.core.objectives import margin
from sparring.evaluation.preflight import PreflightError, preflight
from sparring.modalities.images import MODELS, build
from sparring.threats import L2, Linf

X = torch.rand(12, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(12) % 3
THREAT = Linf(0.1)
SOUND = build("mlp", (4,), 3, seed=0).eval()


class Output(NamedTuple):
    logits: Tensor


def _then(function: Callable[[Tensor], Any], model: nn.Module = SOUND) -> nn.Module:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            return function(self.inner(x))

    return Wrapped().eval()


def _names(*arguments: Any) -> list[str]:
    return [finding.name for finding in preflight(*arguments).findings]


SHAPES = {
    "mlp": (4,), "cnn-small": (1, 8, 8), "cnn-mnist": (1, 28, 28), "cnn-mnist-wide": (1, 28, 28),
    "resnet-small": (3, 32, 32), "cnn-patches": (3, 8, 8), "cnn-ibp": (1, 28, 28),
    "preact-resnet18": (3, 8, 8), "wide-resnet": (3, 8, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_sound_models_pass_in_silence(name: str) -> None:
    model = build(name, SHAPES[name], 3, seed=0).eval()
    found = preflight(model, torch.rand(6, *SHAPES[name]), Y[:6], THREAT)
    assert found.model is model and found.findings == ()


def test_other_sound_cases() -> None:
    assert not _names(lambda x: SOUND(x), X, Y, THREAT)  # a plain function
    assert not _names(_then(lambda z: z.log_softmax(1)), X, Y, THREAT)
    assert not _names(_then(lambda z: z.double()), X, Y, L2(0.5))
    assert not _names(SOUND, 10 * X - 5, Y, Linf(0.1, low=None, high=None))
    assert not _names(SOUND, X, Y, Linf(torch.full((100,), 0.1)))  # a radius for each example of a larger set
    constant = torch.full((12, 4), 0.25)
    assert _names(_then(lambda z: 0 * z[:, :1] + constant), X, Y, THREAT) == ["zero_gradient"]  # no probabilities
    with torch.no_grad():
        assert not _names(SOUND, X, Y, THREAT)
    with torch.inference_mode():
        assert not _names(SOUND, X.clone(), Y, THREAT)


def _raises(_: Tensor) -> Tensor:
    raise RuntimeError("mat1 and mat2 cannot be multiplied")


REFUSED: dict[str, tuple[Any, Any, Any, str]] = {
    "bytes": (SOUND, X * 255, Y, r"from .* to .*expected the box \[0\.0, 1\.0\].*divide by 255"),
    "normalised": (SOUND, (X - 0.5) / 0.25, Y, "look normalised.*into the model"),
    "slightly outside": (SOUND, X + 0.5, Y, r"inputs lie outside.*Scale the data"),
    "NaN": (SOUND, torch.where(X > 0.9, torch.nan, X), Y, "inputs hold NaN"),
    "uint8": (SOUND, (X * 255).to(torch.uint8), Y, r"torch\.uint8; expected floats"),
    "numpy": (SOUND, X.numpy(), Y, "inputs are a ndarray"),
    "one input": (SOUND, X[0], Y[:1], r"x\[None\]"),
    "empty": (SOUND, X[:0], Y[:0], "empty"),
    "model fails": (_then(_raises), X, Y, r"\(12, 4\) torch\.float32: RuntimeError: mat1"),
    "tuple": (_then(lambda z: (z, z)), X, Y, r"returns a tuple.*lambda x: model\(x\)\[0\]"),
    "dict": (_then(lambda z: {"scores": z}), X, Y, r"returns a dict of scores.*model\(x\)\['scores'\]"),
    "one logit, three classes": (_then(lambda z: z[:, :1]), X, Y, "one number.*labels go from 0 to 2; expected 0"),
    "one logit, labels of -1": (_then(lambda z: z[:, 0]), X, 2 * (Y % 2) - 1, "labels go from -1 to 1; expected 0 and"),
    "one output, regression": (_then(lambda z: z[:, 0]), X, X[:, 0], "Regression targets"),
    "one logit, NaN": (_then(lambda z: z[:, 0] / 0), X, Y % 2, "NaN or infinite logits for 12 of 12"),
    "segmentation": (_then(lambda z: z[:, :, None, None].expand(-1, -1, 5, 5)), X, Y, "Segmentation"),
    "predictions": (_then(lambda z: z.argmax(1)), X, Y, "torch.int64.*before any argmax"),
    "mean over the batch": (_then(lambda z: z.mean(0, keepdim=True)), X, Y, "one row for each input"),
    "infinite logits": (_then(lambda z: z / 0), X, Y, "NaN or infinite logits for 12 of 12"),
    "no labels": (SOUND, X, None, "labels are a NoneType"),
    "list of labels": (SOUND, X, Y.tolist(), "labels are a list.*as_tensor"),
    "int32 labels": (SOUND, X, Y.int(), r"torch\.int32 .*y\.long\(\)"),
    "whole floats": (SOUND, X, Y.float(), r"torch\.float32 .*y\.long\(\)"),
    "regression": (SOUND, X, X[:, 0], "Regression targets"),
    "multi-label": (SOUND, X, torch.tensor([[1, 1, 0]] * 12), "Multi-label"),
    "one-hot": (SOUND, X, torch.eye(3)[Y], r"y\.argmax\(1\)"),
    "column": (SOUND, X, Y[:, None], r"y\.squeeze\(1\)"),
    "too few labels": (SOUND, X, Y[:5], r"int64 \(5,\); expected .*\(12,\)"),
    "from one": (SOUND, X, Y + 1, "count from 1: give y - 1"),
    "out of range": (SOUND, X, Y + 2, "labels go from 2 to 4, but the model has 3"),
    "negative": (SOUND, X, Y - 1, "labels go from -1"),
    "detached": (_then(lambda z: z.detach()), X, Y, "no gradient.*graph is cut"),
    "numpy inside": (_then(lambda z: torch.from_numpy(z.detach().numpy())), X, Y, "no gradient"),
    "input unused": (_then(lambda z: torch.ones(12, 3, requires_grad=True) * 1), X, Y, "no gradient"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_plain_sentence(case: str) -> None:
    model, x, y, message = REFUSED[case]
    with pytest.raises(PreflightError, match=f"(?s){message}"):
        preflight(model, x, y, THREAT)


def test_an_output_with_logits_is_taken_for_them() -> None:
    for model in (_then(Output), _then(lambda z: {"loss": None, "logits": z})):
        assert not _names(model, X, Y, THREAT)


def test_probabilities_become_logits_of_the_same_model() -> None:
    model = _then(lambda z: z.softmax(1))
    found = preflight(model, X, Y, THREAT)
    assert [f.name for f in found.findings] == ["probabilities"] and found.findings[0].numbers == {"saturated": 0.0}
    assert torch.allclose(found.model(X).softmax(1), model(X))
    assert torch.allclose(found.model(X), SOUND(X).log_softmax(1), atol=1e-6)
    assert not found.model.training
    found.model.train()  # an attack sets evaluation mode through the wrapper
    with torch.no_grad():
        assert _names(found.model, X, Y, THREAT) == ["train_mode"]
    model.eval()
    # the attack on the wrapper is the attack on the logits: softmax does not change cross-entropy of log p
    a, b = (pgd(THREAT, num_steps=5)(m, X, Y).x_adv for m in (found.model, SOUND))
    assert torch.allclose(a, b, atol=1e-5)


def test_rounded_probabilities_are_counted_and_stay_finite() -> None:
    found = preflight(_then(lambda z: (1e4 * z).softmax(1)), X, Y, THREAT)
    assert found.findings[0].name == "probabilities" and found.findings[0].numbers["saturated"] > 0.5
    assert bool(found.model(X).isfinite().all())


with torch.no_grad():
    MIDDLE = (SOUND(X)[:, 1] - SOUND(X)[:, 0]).median()


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
def test_one_logit_becomes_two(shape: tuple[int, ...]) -> None:
    model = _then(lambda z: 5 * (z[:, 1] - z[:, 0] - MIDDLE).reshape(shape))
    two = _then(lambda z: 5 * torch.stack([z[:, 0] + MIDDLE, z[:, 1]], 1))
    found = preflight(model, X, Y % 2, THREAT)
    assert [(f.name, f.level) for f in found.findings] == [("one_logit", "note")]
    logits = found.model(X)
    assert torch.equal(logits, torch.stack([torch.zeros(12), model(X).flatten()], 1))
    assert torch.allclose(logits.softmax(1), two(X).softmax(1), atol=1e-6) and 0 < int(logits.argmax(1).sum()) < 12
    a, b = (pgd(THREAT, num_steps=5)(m, X, Y % 2).x_adv for m in (found.model, two))
    assert torch.allclose(a, b, atol=1e-5), "the attack on one logit is not that on two with the same difference"
    assert preflight(lambda x: model(x), X[:1], Y[:1], THREAT).model(X[:1]).shape == (1, 2)
    with torch.no_grad():
        assert _names(found.model.train(), X, Y % 2, THREAT) == ["train_mode"]


def test_one_probability_becomes_two_logits() -> None:
    spread = _then(lambda z: 5 * (z[:, 1] - z[:, 0] - MIDDLE))
    found = preflight(_then(lambda s: s.sigmoid(), spread), X, Y % 2, THREAT)
    assert [f.name for f in found.findings] == ["one_logit", "probabilities"]
    assert "probability of class 1" in found.findings[0].sentence
    logits = found.model(X)
    assert torch.allclose(logits[:, 1] - logits[:, 0], spread(X), atol=1e-4)
    unsure = preflight(_then(lambda s: 0.5 + s.abs().sigmoid() / 2, spread), X, Y % 2, THREAT)
    assert [(f.name, f.level) for f in unsure.findings] == [("one_logit", "suspect")]


def test_train_mode_is_told_and_left() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 3))
    model[0].eval()
    model[3].weight.requires_grad_(False)
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    flags = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    (finding,) = preflight(model, X, Y, THREAT).findings
    assert finding.name == "train_mode" and finding.numbers == {"modules": 4}
    assert flags == [m.training for m in model.modules()] == [True, False, True, True, True]
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [True] * 4 + [False, True]
    assert all(p.grad is None for p in model.parameters()) and torch.equal(state, torch.get_rng_state())


def test_the_model_is_left_as_it_was_when_refused() -> None:
    model = _then(lambda z: z.detach(), nn.Linear(4, 3)).train()
    with pytest.raises(PreflightError):
        preflight(model, X, Y, THREAT)
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())


def test_random_models_are_told_with_their_size() -> None:
    noisy = _then(lambda z: z + 0.5 * torch.randn_like(z))
    state = torch.get_rng_state()
    (finding,) = preflight(noisy, X, Y, THREAT).findings
    assert torch.equal(state, torch.get_rng_state())
    assert finding.name == "random_output" and "seed" in finding.sentence
    assert 0.5 < finding.numbers["difference"] < 5 and finding.numbers["seeded"] == 1.0
    calls = iter(range(1000))
    drifting = _then(lambda z: z + 0.01 * next(calls))
    (finding,) = preflight(drifting, X, Y, THREAT).findings
    assert finding.numbers["seeded"] == 0.0 and finding.numbers["difference"] == pytest.approx(0.01, rel=1e-3)
    assert "Not even a fixed seed" in finding.sentence


def test_gradients_that_lead_nowhere_are_told() -> None:
    class Steps(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return SOUND((x * 4).round() / 4)  # the derivative of rounding is zero

    assert _names(Steps().eval(), X, Y, THREAT) == ["zero_gradient"]

    sure = _then(lambda z: 1e5 * z)
    found = preflight(sure, X, Y, THREAT)
    right = (margin.score(sure(X), Y) < -200).sum().item()  # exp(-200) is zero in float32
    assert right > 0
    assert [(f.name, f.numbers) for f in found.findings] == [("saturated_loss", {"examples": right})]

    def root(x: Tensor) -> Tensor:
        return SOUND(x) + (x - X).abs().sum(1, keepdim=True).sqrt()  # 0 at the clean input, its slope infinite

    assert _names(root, X, Y, THREAT) == ["broken_gradient"]


def test_named_inputs_are_looked_at_too() -> None:
    class Offset(Linf):
        """The offset is added to one of two named tensors."""

        def null(self, x: Any) -> Tensor:
            return torch.zeros_like(x["values"])

        def apply(self, x: Any, z: Tensor) -> Any:
            return {**x, "values": x["values"] + z}

        def realize(self, x: Any, z: Tensor) -> Any:
            return self.apply(x, z)

        def valid(self, x: Any, adversarial: Any) -> Tensor:
            return super().valid(x["values"], adversarial["values"])

    def model(x: Any) -> Tensor:
        return SOUND(x["values"]) + x["ids"][:, None]

    good = {"values": X, "ids": Y}
    assert not _names(model, good, Y, Offset(0.1))
    with pytest.raises(PreflightError, match="outside the valid domain"):
        preflight(model, {**good, "values": X + 1}, Y, Offset(0.1))
    with pytest.raises(PreflightError, match="hold NaN"):
        preflight(model, {**good, "values": X / 0}, Y, Offset(0.1))
