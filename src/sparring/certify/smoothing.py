"""Randomised smoothing: a certified L2 radius for any classifier, from votes on noisy copies of the input.

The smoothed classifier gives the class that the base model gives most often to x + sigma * N(0, I). If that class has
probability p > 1/2, it stays within the L2 radius sigma * Phi^-1(p) of x. The noisy copies leave the box of valid
inputs, as in the paper; the certificate is for the smoothed classifier, not for the base model.

Source: Cohen, Rosenfeld and Kolter 2019, "Certified adversarial robustness via randomized smoothing".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sparring.core.model_state import attack_mode, private_rng
from sparring.core.noise import Noise
from sparring.core.types import Cost, Model, take
from sparring.threats.balls import L2

COPIES_AT_ONCE = 100
"""Copies per draw of the noise: fixed, so that the votes do not depend on the batch size."""


class Certificate(NamedTuple):
    """One row per example, on the CPU. prediction: the class of the smoothed classifier, -1 where it abstains."""

    prediction: Tensor  # (B,) int64
    radius: Tensor  # (B,) float64, L2 in input units; 0 where it abstains
    p_lower: Tensor  # (B,) float64: the class has at least this probability, with confidence 1 - alpha
    cost: Cost

    def covers(self, y: Tensor, radius: float | Tensor) -> Tensor:
        """(B,) bool: the smoothed classifier is right and stays so within `radius` (a number or (B,)), L2, input units.

        Abstaining counts as not certified. The mean is the certified accuracy; give the sum to `wilson` for its
        interval.

        >>> found = Certificate(torch.tensor([1, -1]), torch.tensor([0.5, 0.0]), torch.tensor([0.9, 0.4]), Cost())
        >>> found.covers(torch.tensor([1, 1]), 0.25)
        tensor([ True, False])
        """
        return (self.prediction == y.cpu()) & (self.radius >= torch.as_tensor(radius).cpu())


def smoothed_votes(
    model: Model, x: Tensor, num: int, *, sigma: float, noise: Noise | None = None, batch_size: int = 1000
) -> Tensor:
    """(B, K + 1) int64: how many of `num` copies of each example with noise N(0, sigma^2 I) go to each class.

    The last column counts copies whose logits are not finite: they vote for no class. x (B, *X), sigma in its units;
    `batch_size` copies go through the model at once. `noise` defaults to seed 0 and the position in the batch.
    Raises ValueError for sigma or counts out of range, inputs that are no floats, outputs that are no logits (B, K).

    >>> votes = smoothed_votes(nn.Linear(4, 3), torch.rand(2, 4), 50, sigma=0.5)
    >>> votes.shape, votes.sum(1)
    (torch.Size([2, 4]), tensor([50, 50]))
    """
    _check_sigma(sigma)
    if num < 1 or batch_size < 1:
        raise ValueError(f"votes need at least one copy and one at a time; got num {num}, batch_size {batch_size}")
    if not x.is_floating_point():
        raise ValueError(f"noise is added to the input, which must be of a float type; got {x.dtype}")
    noise = (noise or Noise.make(0, "smoothing", torch.arange(len(x)))).to(x.device)
    full = torch.autocast(x.device.type, enabled=False)
    with attack_mode(model) as frozen, private_rng(noise.seed, x.device), torch.no_grad(), full:
        rows = torch.arange(len(x), device=x.device).split(max(1, batch_size // COPIES_AT_ONCE))
        return torch.cat([_votes(frozen, x[some], num, sigma, noise.take(some), batch_size) for some in rows])


def _votes(model: Model, x: Tensor, num: int, sigma: float, noise: Noise, batch_size: int) -> Tensor:
    """The votes of a few examples, block of copies by block."""
    blocks = []
    for draw, first in enumerate(range(0, num, COPIES_AT_ONCE)):
        count = min(COPIES_AT_ONCE, num - first)
        copies = x[:, None] + sigma * noise.normal((count, *x.shape[1:]), draw).to(x)
        logits = torch.cat([model(part) for part in copies.flatten(0, 1).split(batch_size)])
        if logits.ndim != 2 or len(logits) != len(x) * count:
            shape = f"shape {tuple(logits.shape)} for {len(x) * count} inputs"
            raise ValueError(f"the model returned {shape}; smoothing needs logits (B, K)")
        num_classes = logits.shape[1]
        choice = torch.where(logits.isfinite().all(1), logits.argmax(1), num_classes).view(len(x), count)
        blocks.append(nn.functional.one_hot(choice, num_classes + 1).sum(1))
    return torch.stack(blocks).sum(0)


def smoothed_certificate(
    model: Model, x: Tensor, y: Tensor | None = None, *, sigma: float, num_select: int = 100,
    num_estimate: int = 10_000, alpha: float = 0.001, batch_size: int = 1000, noise: Noise | None = None,
) -> Certificate:  # fmt: skip
    """The class of the smoothed classifier and an L2 radius within which it stays, each true with 1 - alpha.

    `num_select` copies choose the class, `num_estimate` others bound its probability from below (Clopper and Pearson
    1934): radius = sigma * Phi^-1(p_lower), abstaining (-1) unless p_lower > 1/2. Where labels y (B,) are given, an
    example whose chosen class is wrong is not estimated: it has radius 0 and p_lower 0, and saves its copies. Radii end
    at sigma * Phi^-1(alpha^(1/num_estimate)). The same seeds and examples give the same certificates, whatever the
    batches. Raises ValueError for sigma, alpha or counts out of range.

    Source: Cohen 2019, algorithm CERTIFY. Deviations: the labels; copies without finite logits vote for no class.

    >>> certificate = smoothed_certificate(nn.Linear(4, 2), torch.rand(3, 4), sigma=0.5, num_estimate=1000)
    >>> certificate.prediction.shape, certificate.radius.dtype, certificate.cost.forwards
    (torch.Size([3]), torch.float64, 3300)
    """
    _check_alpha(alpha)
    noise = noise or Noise.make(0, "smoothing", torch.arange(len(x)))
    options: dict[str, Any] = {"sigma": sigma, "batch_size": batch_size}
    prediction = smoothed_votes(model, x, num_select, noise=noise, **options)[:, :-1].argmax(1).cpu()
    p_lower = torch.zeros(len(x), dtype=torch.float64)
    rows = (torch.ones_like(prediction) if y is None else prediction == y.cpu()).nonzero()[:, 0]
    if len(rows):
        fresh = noise.take(rows).restart(1)  # the copies that chose the class must not also vouch for it
        votes = smoothed_votes(model, take(x, rows), num_estimate, noise=fresh, **options).cpu()
        p_lower[rows] = clopper_pearson_lower(votes.gather(1, prediction[rows][:, None])[:, 0], num_estimate, alpha)
        prediction[rows[p_lower[rows] <= 0.5]] = -1
    radius = sigma * torch.special.ndtri(p_lower).clamp_min(0)
    return Certificate(prediction, radius, p_lower, Cost(len(x) * num_select + len(rows) * num_estimate))


def smoothed_predict(
    model: Model, x: Tensor, *, sigma: float, num: int = 1000, alpha: float = 0.001, batch_size: int = 1000,
    noise: Noise | None = None,
) -> Tensor:  # fmt: skip
    """(B,) the class of the smoothed classifier, wrong with probability alpha at most; -1 where it abstains.

    It abstains unless a fair coin would split the two largest votes so unevenly, in either direction, with a
    probability of alpha at most. Source: Cohen 2019, algorithm PREDICT (Hung and Fithian 2019 prove the test).

    >>> smoothed_predict(nn.Linear(4, 2), torch.rand(3, 4), sigma=0.5, num=100).shape
    torch.Size([3])
    """
    from scipy.stats import binom

    _check_alpha(alpha)
    votes = smoothed_votes(model, x, num, sigma=sigma, noise=noise, batch_size=batch_size)
    top = votes.topk(2, dim=1)
    first, second = top.values.cpu().numpy().T
    unsure = torch.from_numpy(2 * binom.cdf(second, first + second, 0.5) > alpha).to(x.device)
    return top.indices[:, 0].masked_fill(unsure | (top.indices[:, 0] == votes.shape[1] - 1), -1)


def clopper_pearson_lower(count: Tensor, num: int, alpha: float) -> Tensor:
    """(B,) float64 the probability that lies below the true one with confidence 1 - alpha, given count of num votes.

    Source: Clopper and Pearson 1934, one-sided: the alpha quantile of Beta(count, num - count + 1), 0 for no votes.

    >>> clopper_pearson_lower(torch.tensor([0, 99, 100]), 100, 0.05)
    tensor([0.0000, 0.9534, 0.9705], dtype=torch.float64)
    """
    from scipy.stats import beta

    votes = count.cpu().numpy()
    bound = beta.ppf(alpha, votes.clip(1), num - votes.clip(1) + 1)
    return torch.from_numpy(bound * (votes > 0))


class SmoothedNet(nn.Module):
    """log mean_i softmax(model(x + sigma * n_i)) over `num` noises n_i ~ N(0, I) that are always the same.

    A stand-in for the classifier that the certificate is about (the vote over endless noise): the mean probability has
    gradients, and the same few noises for all inputs keep it a plain function of each example.
    x (B, *X) -> log-probabilities (B, K).
    Source: Salman 2019, "Provably robust deep learning via adversarially trained smoothed classifiers", eq. 6.

    >>> bool(torch.allclose(SmoothedNet(nn.Linear(4, 3), 0.5)(torch.rand(2, 4)).exp().sum(1), torch.ones(2)))
    True
    """

    def __init__(self, model: Any, sigma: float, num: int = 16) -> None:
        super().__init__()
        _check_sigma(sigma)
        if num < 1:
            raise ValueError(f"a mean over noisy copies needs at least one; got num {num}")
        self.model, self.sigma, self.num = model, sigma, num
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        stream = Noise.make(0, "smoothed net", torch.arange(self.num, device=x.device))
        noises = self.sigma * stream.normal(x.shape[1:]).to(x)
        mean = torch.stack([self.model(x + noise).softmax(1) for noise in noises]).mean(0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()


@dataclass(frozen=True)
class SmoothingBound:
    """`smoothed_certificate` in the form that `measure` takes: (model, x, y, threat, noise=) -> (B,), > 0 certified.

    The value is 1 or -1: the certificate speaks about a radius, not about a margin. `base` is the network under
    the noise; the model that is given is left aside. The certificate is about the vote over endless noise, true with
    probability 1 - alpha for each example; a network that stands in for it is another one, so what is certified is
    attacked all the same. Each example has its own noise (default: seed 0 and its position).
    Raises ValueError for a threat that is not L2.
    """

    base: Any = field(repr=False)
    sigma: float
    num_select: int = 100
    num_estimate: int = 1000
    alpha: float = 0.001
    attack_certified: ClassVar[bool] = True

    def __call__(self, model: Any, x: Tensor, y: Tensor, threat: Any, *, noise: Noise | None = None) -> Tensor:
        if not isinstance(threat, L2):
            raise ValueError(f"randomised smoothing certifies L2 balls; the threat is a {type(threat).__name__}")
        certificate = smoothed_certificate(
            self.base, x, y, sigma=self.sigma, num_select=self.num_select, num_estimate=self.num_estimate,
            alpha=self.alpha, noise=noise,
        )  # fmt: skip
        return certificate.covers(y, threat.radius).to(x) * 2 - 1


def _check_sigma(sigma: float) -> None:
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma is the noise in input units, a number sigma > 0 such as 0.25; got {sigma}")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is the probability of a wrong certificate, between 0 and 1 such as 0.001; got {alpha}")
