"""The game of generator and discriminator: gradients as by hand, noise by key, networks of any size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from sparring.core.noise import Noise
from sparring.training.gan import Gan, Pair, build_pair, sample_images

X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
Y = torch.arange(6) % 3
NOISE = Noise.make(0, "test", torch.arange(6))


def pair(**options: object) -> Pair:
    return build_pair((1, 8, 8), 3, seed=0, **options).double()  # type: ignore[arg-type]


def by_hand(game: Pair, loss: str, gamma: float) -> tuple[dict[str, Tensor], float]:
    """Each player's gradients in a pass of its own, by the papers' formulas, and the sum of what they want."""
    fake = game(NOISE.normal((32,)).double(), Y)
    slopes: Tensor | float = 0.0
    for images in [X, fake.detach()] if loss == "r3" else [X]:
        images = images.clone().requires_grad_()
        gradient = torch.autograd.grad(game.d(images, Y).sum(), images, create_graph=True)[0]
        slopes = slopes + sum((g**2).sum() for g in gradient) / len(gradient)
    real, made, hoped = game.d(X, Y), game.d(fake.detach(), Y), game.d(fake, Y)
    if loss == "ns-r1":
        loss_d = -(real.sigmoid().log() + (1 - made.sigmoid()).log()).mean()
        loss_g = -hoped.sigmoid().log().mean()
    elif loss == "hinge":
        loss_d = (1 - real).clamp(min=0).mean() + (1 + made).clamp(min=0).mean()
        loss_g = -hoped.mean()
    else:
        loss_d, loss_g = -(real - made).sigmoid().log().mean(), -(hoped - real.detach()).sigmoid().log().mean()
    loss_d = loss_d + gamma / 2 * slopes
    found = {}
    for prefix, player, value in (("d.", game.d, loss_d), ("g.", game.g, loss_g)):
        names, weights = zip(*player.named_parameters(), strict=True)
        gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        found |= {prefix + name: g for name, g in zip(names, gradients, strict=True) if g is not None}
    return found, (loss_d + loss_g).item()


@pytest.mark.parametrize("loss", ["ns-r1", "hinge", "r3"])
@pytest.mark.parametrize("gamma", [0.0, 0.7])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_one_scalar_gives_each_player_the_gradient_of_its_own_loss(loss: str, gamma: float, net: str) -> None:
    game = pair(net=net)
    wanted, value = by_hand(copy.deepcopy(game), loss, gamma)
    scalar, figures = Gan(loss=loss, gamma=gamma)(game, X, Y, noise=NOISE)  # type: ignore[arg-type]
    scalar.backward()
    assert scalar.item() == pytest.approx(value, rel=1e-9)
    assert scalar.item() == pytest.approx(float(figures["loss_d"] + figures["loss_g"] + gamma / 2 * figures["penalty"]))
    found = {name: p.grad for name, p in game.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted) and len(found) > 10
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-7, atol=1e-12, msg=name)


def test_spectral_norm_holds_every_layer_of_the_discriminator_at_one() -> None:
    game = pair(spectral=True)
    for _ in range(60):  # power iteration, a step for each pass
        game.d(X, Y)
    game.eval()
    layers = [m for m in game.d.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    assert len(layers) == 4
    for layer in layers:
        assert torch.linalg.svdvals(layer.weight)[0].item() == pytest.approx(1, abs=0.02)


def test_labels_decide_only_where_the_pair_has_classes() -> None:
    z, other = NOISE.normal((32,)).double(), (Y + 1) % 3
    told, untold = pair().eval(), build_pair((1, 8, 8), 0, seed=0).double().eval()
    assert not torch.equal(told(z, Y), told(z, other)) and not torch.equal(told.d(X, Y), told.d(X, other))
    assert torch.equal(untold(z, Y), untold(z, other)) and torch.equal(untold.d(X, Y), untold.d(X, other))
    # the projection: d(x, y) - d(x, y') is linear in the features
    with torch.no_grad():
        features = told.d.body(2 * X - 1)
        apart = (told.d.by_class.weight[Y] - told.d.by_class.weight[other]) * features  # type: ignore[union-attr]
        torch.testing.assert_close(told.d(X, Y) - told.d(X, other), apart.sum(1))


def test_noise_is_drawn_by_key_and_images_do_not_depend_on_the_batch() -> None:
    game = pair().float().eval()
    one, two = (Gan()(game, X.float(), Y, noise=NOISE)[0] for _ in range(2))
    assert one.item() == two.item()
    whole = sample_images(game, Y, NOISE)
    parts = torch.cat([sample_images(game, Y[i : i + 1], NOISE.take(torch.tensor([i]))) for i in range(6)])
    torch.testing.assert_close(whole, parts)
    assert whole.min() >= 0 and whole.max() <= 1 and len(whole.unique()) > 100


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32), (3, 12, 20)])
@pytest.mark.parametrize("net", ["mlp", "conv"])
def test_pairs_for_images_of_any_size(shape: tuple[int, int, int], net: str) -> None:
    game = build_pair(shape, 4, seed=1, net=net)  # type: ignore[arg-type]
    images = game(torch.randn(3, game.g.num_noise), torch.tensor([0, 3, 1]))
    assert images.shape == (3, *shape) and game.d(images, torch.tensor([0, 3, 1])).shape == (3,)


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ValueError, match="sides 4 divides, not 9x9"):
        build_pair((1, 9, 9), 2, seed=0, net="conv")
    with pytest.raises(ValueError, match=r"makes images \(C, H, W\)"):
        build_pair((20,), 2, seed=0)
    with pytest.raises(ValueError, match="expected one of ns-r1, hinge, r3"):
        Gan(loss="wgan")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least 0; got -1"):
        Gan(gamma=-1)
