"""A borrowed model comes back as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from contracts import SHAPE, rand
from sparring.core.model_state import attack_mode, private_rng

Snapshot = Callable[[nn.Module], dict[str, Any]]


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_all_is_restored(stateful: nn.Module, snapshot: Snapshot, mode: Any) -> None:
    before = snapshot(stateful)
    with private_rng(3, torch.device("cpu")), attack_mode(stateful, mode) as frozen:
        inside = [module.training for module in stateful.modules()]
        assert not any(p.requires_grad for p in stateful.parameters())
        for _ in range(2):
            frozen(rand(*SHAPE))
        assert (snapshot(stateful)["buffers"] == before["buffers"]) == (mode == "eval"), (
            "the test must see statistics move"
        )
    assert inside == {"eval": [False] * 8, "train": [True] * 8, "keep": before["modes"]}[mode]
    assert snapshot(stateful) == before


@pytest.mark.parametrize("mode", ["eval", "train", "keep"])
def test_all_is_restored_when_the_body_raises(stateful: nn.Module, snapshot: Snapshot, mode: Any) -> None:
    before = snapshot(stateful)
    with pytest.raises(KeyboardInterrupt), private_rng(3, torch.device("cpu")), attack_mode(stateful, mode) as frozen:
        frozen(rand(*SHAPE))
        raise KeyboardInterrupt
    assert snapshot(stateful) == before


def test_all_is_restored_in_inference_mode(stateful: nn.Module, snapshot: Snapshot) -> None:
    before = snapshot(stateful)
    with torch.inference_mode(), private_rng(3, torch.device("cpu")), attack_mode(stateful, "train") as frozen:
        frozen(rand(*SHAPE))
    assert snapshot(stateful) == before


def test_a_part_that_two_parents_share_keeps_its_own_mode() -> None:
    """Putting modes back through `train()` would let the second parent overrule the part."""
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), shared), nn.Sequential(shared, nn.ReLU())])
    model.train()
    shared.eval()
    with attack_mode(model):
        pass
    assert not shared.training
    assert model[1].training


def test_what_is_yielded_is_no_module(stateful: nn.Module) -> None:
    """So an attack inside keeps the mode chosen outside."""
    with private_rng(0, torch.device("cpu")), attack_mode(stateful, "train") as frozen:
        assert not isinstance(frozen, nn.Module)
        with attack_mode(frozen, "eval") as again:
            assert again is frozen
            assert stateful.training


def test_a_plain_function_is_shown_copies() -> None:
    x = torch.ones(2, 3)
    with attack_mode(lambda v: v.add_(1)) as frozen:
        assert torch.equal(frozen(x), x + 1) and torch.equal(x, torch.ones(2, 3))


def test_an_unknown_mode_says_what_there_is(stateful: nn.Module) -> None:
    with (
        pytest.raises(ValueError, match=r"got 'evaluate', expected 'eval', 'train' or 'keep'"),
        attack_mode(stateful, "evaluate"),
    ):  # type: ignore[arg-type]
        pass


def test_private_rng() -> None:
    before = torch.get_rng_state()
    with private_rng(3, torch.device("cpu")):
        first = torch.rand(4)
    with pytest.raises(KeyboardInterrupt), private_rng(3, torch.device("cpu")):
        assert torch.equal(torch.rand(4), first)
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), before)
