"""The contract check passes on sound threats and names the fault of broken ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from contracts import SHAPE, BagOfWords, rand, seeded, sentences, stream, words
from sparring.core.noise import Noise
from sparring.threats import L2, Linf, ThreatModel, check_threat, inside


@dataclass(frozen=True)
class NotIdempotent(Linf):
    def project(self, x: Tensor, z: Tensor) -> Tensor:
        return 0.9 * super().project(x, z)


@dataclass(frozen=True)
class ProjectsTooFar(Linf):
    def project(self, x: Tensor, z: Tensor) -> Tensor:
        return z.clamp(-2 * self.radius, 2 * self.radius)


@dataclass(frozen=True)
class SampleOutside(Linf):
    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        return 1.5 * self.radius * (2 * noise.uniform(x.shape[1:]).to(x) - 1)


@dataclass(frozen=True)
class BatchGlobalMaximum(Linf):
    """Each gradient over the largest entry of the whole batch, instead of its own."""

    def steepest(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad / grad.abs().max().clamp_min(1e-30)


@dataclass(frozen=True)
class SignOfTheBatch(Linf):
    """Of size one, and best for one example alone: the direction of the first for everybody."""

    def steepest(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad[:1].sign().expand_as(grad).clone()


@dataclass(frozen=True)
class NotSteepest(L2):
    """The sign scaled to length one: a direction of L2, but not the steepest."""

    def steepest(self, x: Tensor, grad: Tensor) -> Tensor:
        one = torch.zeros_like(grad)
        one[..., 0] = grad[..., 0].sign()
        return super().steepest(x, one)


@dataclass(frozen=True)
class OneStartForAll(Linf):
    """The start of the first example, broadcast."""

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        return super().sample(x, noise)[:1].expand_as(x).clone()


@dataclass(frozen=True)
class LengthsOnTheWrongAxis(L2):
    """Lengths (B,) that multiply the last axis, which has B entries too."""

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        direction = super()._steepest(noise.normal(x.shape[1:]).to(x))
        return self.project(x, direction * noise.uniform((1,), 1)[:, 0].to(x) * self.radius)


@dataclass(frozen=True)
class ProjectsByTheWorst(L2):
    """Shrinks everybody by the factor that the longest needs."""

    def _shrink(self, z: Tensor) -> Tensor:
        return z * (self.radius / self._norm(z).max()).clamp_max(1)


@dataclass(frozen=True)
class LeavesTheBox(Linf):
    def project(self, x: Tensor, z: Tensor) -> Tensor:
        return self._shrink(z)


@dataclass(frozen=True)
class NullNotZero(Linf):
    def null(self, x: Tensor) -> Tensor:
        return torch.full_like(x, 1e-3)


@dataclass(frozen=True)
class NullChangesSomething(Linf):
    """Of size zero, yet the model sees another input."""

    def apply(self, x: Tensor, z: Tensor) -> Tensor:
        return x + 0.1 + z

    def realize(self, x: Tensor, z: Tensor) -> Tensor:
        return self._clip(x + 0.1 + z)


@dataclass(frozen=True)
class ZeroGradientMoves(Linf):
    def steepest(self, x: Tensor, grad: Tensor) -> Tensor:
        return grad.sign() + (grad == 0).to(grad)


@dataclass(frozen=True)
class SingleStart(Linf):
    """A dtype named in maths code."""

    def sample(self, x: Tensor, noise: Noise) -> Tensor:
        return super().sample(x, noise).float()


X = 0.8 * rand(5, 2, 5) + 0.1


@pytest.mark.parametrize(
    ("threat", "sentence"),
    [
        (NotIdempotent(0.3), "project moves a point of the set"),
        (ProjectsTooFar(0.3, low=None, high=None), "project leaves the set: size"),
        (SampleOutside(0.3, low=None, high=None), "sample leaves the set: size"),
        (BatchGlobalMaximum(0.3), "steepest does not have size 1"),
        (SignOfTheBatch(0.3), "climbs faster than steepest|steepest of an example depends on the rest of the batch"),
        (NotSteepest(0.3), "another direction of size 1 climbs faster"),
        (OneStartForAll(0.3, low=None, high=None), "sample of an example depends on the rest of the batch"),
        (ProjectsByTheWorst(0.3, low=None, high=None), "project of an example depends on the rest of the batch"),
        (LeavesTheBox(0.9), "valid domain|realize"),
        (NullNotZero(0.3), r"size\(null\) is not 0"),
        (NullChangesSomething(0.3, low=None, high=None), "null changes"),
        (ZeroGradientMoves(0.3), "steepest of a zero gradient is not zero"),
        (SingleStart(0.3), "sample has another shape or dtype"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Linf | L2) else "",
)
def test_broken_threats_are_named(threat: Any, sentence: str) -> None:
    with pytest.raises(AssertionError, match=f"threat model breaks its contract: .*({sentence})"):
        check_threat(threat, X, num_directions=50)


def test_a_wrong_broadcast_does_not_pass() -> None:
    """It raises in the batch of two that stand alone, in the words of PyTorch."""
    with pytest.raises((AssertionError, RuntimeError)):
        check_threat(LengthsOnTheWrongAxis(0.3), X, num_directions=5)


def test_fewer_than_three_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 examples; it needs at least 3"):
        check_threat(Linf(0.1), rand(2, 4))


def test_inside_allows_rounding_only() -> None:
    x = torch.zeros(3, 4)
    z = torch.full((3, 4), 0.1) * torch.tensor([1.0, 1 + 1e-6, 1.001])[:, None]
    assert inside(Linf(0.1), x, z).tolist() == [True, True, False]
    each = Linf(torch.tensor([0.1, 0.05, 0.2]))
    assert inside(each, x, z).tolist() == [True, False, True]


def test_words_keep_the_contract_with_a_budget_per_sentence() -> None:
    threat = words(torch.tensor([3.0, 1.0, 2.0]))
    assert isinstance(threat, ThreatModel)
    check_threat(threat, sentences(), num_directions=100)


def test_words_show_the_model_what_they_realize() -> None:
    """Straight through: the value of the mixture is that of the real sentence, and its gradient flows to z."""
    model, x = seeded(lambda: BagOfWords(23, 2)), sentences()
    threat = words()
    corner = threat.steepest(x, stream(3).uniform((6, 3)).double())
    z = threat.project(x, 1.6 * corner + 0.01).requires_grad_()
    shown, real = model(threat.apply(x, z)), model(threat.realize(x, z))
    torch.testing.assert_close(shown, real)
    (grad,) = torch.autograd.grad(shown[:, 0].sum(), z)
    assert bool((grad[x["mask"]] != 0).any(1).all())
    assert bool((grad[~x["mask"]] == 0).all())
    changed = (threat.realize(x, z)["ids"] != x["ids"]).sum(1)
    assert bool((changed > 0).all())
    assert bool((changed <= 2).all())


def test_image_shape_is_awkward() -> None:
    assert len(set(SHAPE)) == len(SHAPE)
