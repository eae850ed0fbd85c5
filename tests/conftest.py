"""Fixtures that every test may use: small, seeded, and in float64 where exactness is claimed."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from contracts import NUM_CLASSES, SHAPE, seeded

os.environ["KERAS_BACKEND"] = "torch"  # before anybody imports Keras
torch.set_num_threads(int(os.environ.get("SPARRING_TEST_THREADS", "1")))


# The same examples in every run, so that whoever changes a line sees what that line broke; `make test-slow` draws anew.
settings.register_profile("fixed", derandomize=True)
settings.register_profile("random", derandomize=False)
settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """What a test draws from the global generator is the same each time: torch seeds it anew in every process."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


@pytest.fixture
def images(generator: torch.Generator) -> Tensor:
    """(3, 2, 5, 7) float64 in [0, 1]: every axis has another length."""
    return torch.rand(SHAPE, generator=generator, dtype=torch.float64)


@pytest.fixture
def labels() -> Tensor:
    return torch.tensor([2, 0, 3])


@pytest.fixture
def network() -> nn.Module:
    """A curved network on `images` in float64, so that gradients differ from place to place."""
    return seeded(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(70, 9), nn.Tanh(), nn.Linear(9, NUM_CLASSES)).double().eval()
    )


@pytest.fixture
def stateful() -> nn.Module:
    """A network in train mode with BatchNorm and dropout, one BatchNorm frozen by hand, one weight not learning."""

    def make() -> nn.Module:
        net = nn.Sequential(
            nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.Dropout(0.5),
            nn.Flatten(), nn.Linear(60, NUM_CLASSES),
        ).double()  # fmt: skip
        net[3].running_mean.uniform_(-1, 1)
        net.train()
        net[3].eval()
        net[0].bias.requires_grad_(False)
        net[6].weight.grad = torch.randn_like(net[6].weight)
        return net

    return seeded(make)


@pytest.fixture
def snapshot() -> Callable[[nn.Module], dict[str, object]]:
    """Everything of a model, and of the global generators, that an attack must leave as it was."""

    def take(model: nn.Module) -> dict[str, object]:
        return {
            "modes": [module.training for module in model.modules()],
            "learning": [p.requires_grad for p in model.parameters()],
            "grads": [None if p.grad is None else p.grad.numpy().tobytes() for p in model.parameters()],
            "weights": [p.detach().numpy().tobytes() for p in model.parameters()],
            "buffers": [b.numpy().tobytes() for b in model.buffers()],
            "rng": torch.get_rng_state().numpy().tobytes(),
        }

    return take
