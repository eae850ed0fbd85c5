"""AdvProp, virtual adversarial training and plain noise against the papers' formulas, written by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts import rand, seeded, stream
from sparring.app.settings import TrainingSettings
from sparring.app.train_run import start_run
from sparring.threats import L2, Linf
from sparring.training.regularising import advprop, gaussian, vat

X, Y = rand(6, 5, seed=1), torch.tensor([0, 1, 2, 0, 1, 2])
NOISE = stream(6)


def normed() -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double())


def test_advprop_trains_on_both_and_remembers_statistics_of_clean_inputs_alone() -> None:
    model, twin = normed().train(), normed().train()
    recipe = advprop(Linf(0.1))
    x_adv = recipe.craft(model, X, Y, noise=NOISE)
    assert isinstance(x_adv, Tensor) and 0.05 < float((x_adv - X).abs().max()) <= 0.1 + 1e-12
    recipe(model, X, Y, noise=NOISE).backward()
    clean = F.cross_entropy(twin(X), Y)
    kept = [buffer.clone() for buffer in twin.buffers()]
    ((clean + F.cross_entropy(twin(x_adv), Y)) / 2).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    for ours_now, theirs_then in zip(model.buffers(), kept, strict=True):
        torch.testing.assert_close(ours_now, theirs_then)


def by_hand(model: nn.Module, radius: float) -> Tensor:
    """The virtual adversarial inputs of Miyato 2018, one power iteration from the small vector that ours starts at."""
    p = model(X).softmax(1).detach()
    d = (0.001 * NOISE.normal(X.shape[1:]).double()).requires_grad_()
    divergence = (p * (p.log() - model(X + d).log_softmax(1))).sum()
    (grad,) = torch.autograd.grad(divergence, d)
    moved = d.detach() + radius * grad / grad.norm(dim=1, keepdim=True)  # there from x itself: a thousandth apart
    return X + moved * (radius / moved.norm(dim=1, keepdim=True)).clamp_max(1)


def test_vat_is_one_power_iteration_and_its_gradient_goes_through_the_attacked_side_alone() -> None:
    model, radius = normed().eval(), 0.2
    unboxed = L2(radius, low=None, high=None)
    recipe = vat(unboxed, beta=2.0)
    crafted = recipe.craft(model, X, Y, noise=NOISE)
    torch.testing.assert_close(crafted, by_hand(model, radius), rtol=0, atol=1e-9)
    logits, attacked = model(X), model(crafted)
    p = logits.softmax(1).detach()
    theirs = F.cross_entropy(logits, Y) + 2 * (p * (p.log() - attacked.log_softmax(1))).sum(1).mean()
    ours = recipe(model, X, Y, noise=NOISE)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(v, list(model.parameters())) for v in (ours, theirs)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_vat_learns_from_rows_without_a_label_by_their_disagreement_alone() -> None:
    model, y = normed().eval(), torch.tensor([0, -1, 2, -1, -1, 2])
    recipe = vat(L2(0.2, low=None, high=None))
    loss, known = recipe(model, X, y, noise=NOISE), y >= 0
    # labels play no part in the disagreement
    whole = recipe(model, X, Y, noise=NOISE) - F.cross_entropy(model(X), Y)
    torch.testing.assert_close(loss, F.cross_entropy(model(X[known]), y[known]) + whole, rtol=1e-9, atol=1e-12)
    assert recipe(model, X, torch.full_like(y, -1), noise=NOISE).isfinite()


def test_vat_weights_classes_among_known_rows_and_takes_probabilities() -> None:
    model, y, weights = normed().eval(), torch.tensor([0, -1, 2, -1, 1, 2]), [1.0, 2.0, 5.0]
    recipe, known = vat(L2(0.2, low=None, high=None)), torch.tensor([0, 2, 4, 5])
    disagreement = recipe(model, X, torch.full_like(y, -1), noise=NOISE)
    theirs = F.cross_entropy(model(X[known]), y[known], torch.tensor(weights).double())
    ours = replace(recipe, class_weights=weights)(model, X, y, noise=NOISE) - disagreement
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    soft = torch.full((6, 3), 0.1).double()
    soft[:, 0] = 0.8
    ours = recipe(model, X, soft, noise=NOISE) - disagreement
    torch.testing.assert_close(ours, F.cross_entropy(model(X), soft), rtol=1e-9, atol=1e-12)


def test_noise_has_the_size_asked_for_and_is_drawn_by_example() -> None:
    x, seen = torch.full((400, 5), 0.5).double(), []
    model = normed().eval()

    def spied(v: Any) -> Tensor:
        seen.append(v)
        return model(v)

    recipe, noise = gaussian(sigma=0.3), stream(400)
    loss = recipe(spied, x, Y.repeat(67)[:400], noise=noise)
    assert abs(float((seen[0] - x).std()) - 0.3) < 0.02
    torch.testing.assert_close(loss, F.cross_entropy(model(seen[0]), Y.repeat(67)[:400]))
    recipe(spied, x[100:], Y.repeat(67)[100:400], noise=noise.take(torch.arange(100, 400)))
    assert torch.equal(seen[1], seen[0][100:])


@pytest.mark.parametrize("wrong", [{"sigma": 0.0}, {"sigma": float("inf")}])
def test_noise_refuses_what_is_no_size(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="sigma"):
        gaussian(**wrong)


def test_extra_images_without_labels_go_to_vat_and_to_no_other(tmp_path: Path) -> None:
    file = tmp_path / "more.npz"
    np.savez(file, x=np.random.default_rng(0).random((50, 1, 8, 8), dtype=np.float32))
    given: dict[str, Any] = {"data": "digits", "threat": "l2:0.5", "epochs": 1, "extra": str(file)}
    result = start_run(TrainingSettings(recipe="vat", **given), tmp_path / "run")
    assert result.history[0]["train_loss"] > 0
    with pytest.raises(ValueError, match=r"no labels.*vat"):
        start_run(TrainingSettings(recipe="pgd-at", **given), tmp_path / "other")
