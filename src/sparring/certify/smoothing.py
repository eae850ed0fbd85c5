"""Randomised smoothing: a certified L2 radius for any classifier, from votes on noisy copies of the input.

The smoothed classifier gives the class that the base model gives most often to x + sigma * N(0, I). If that class has
probability p > 1/2, it stays within the L2 radius sigma * Phi^-1(p) of x. The noisy copies leave the box of valid
inputs, as in the paper; the certificate is for the smoothed classifier, not for the base model.

Source: Cohen, Rosenfeld and Kolter 2019, "Certified adversarial robustness via randomized smoothing".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparring.core.model_state import attack_mode, private_rng
from sparring.core.noise import Noise
from sparring.core.types import Cost, Model, take

BLOCK = 100
"""Copies per draw of the noise: fixed, so that the votes do not depend on the batch size."""


class Certificate(NamedTuple):
    """One row per example, on the CPU. prediction: the class of the smoothed classifier, -1 where it abstains."""

    prediction: Tensor  # (B,) int64
    radius: Tensor  # (B,) float64, L2 in input units; 0 where it abstains
    p_lower: Tensor  # (B,) float64: the class has at least this probability, with confidence 1 - alpha
    cost: Cost


@dataclass(frozen=True, eq=False)
class Smoothed:
    """A base model and the standard deviation of the noise that smooths it, in input units.

    >>> votes = Smoothed(nn.Linear(4, 3), 0.5).votes(torch.rand(2, 4), 50)
    >>> votes.shape, votes.sum(1)
    (torch.Size([2, 4]), tensor([50, 50]))
    """

    model: Model
    sigma: float

    def __post_init__(self) -> None:
        if not 0 < self.sigma < float("inf"):
            raise ValueError(f"sigma is the noise in input units, a number above 0 such as 0.25; got {self.sigma}")

    def votes(self, x: Tensor, num: int, *, noise: Noise | None = None, batch_size: int = 1000) -> Tensor:
        """(B, K + 1) int64: how many of `num` noisy copies of each example the model takes for each class.

        The last column counts copies whose logits are not finite: they vote for no class. x (B, *X); `batch_size`
        copies go through the model at once. `noise` defaults to seed 0 and the position in the batch.
        """
        if num < 1 or batch_size < 1:
            raise ValueError(f"votes need at least one copy and one at a time; got num {num}, batch_size {batch_size}")
        if not x.is_floating_point():
            raise ValueError(f"noise is added to the input, which must be of a float type; got {x.dtype}")
        noise = (noise or Noise.make(0, "smoothing", torch.arange(len(x)))).to(x.device)
        full = torch.autocast(x.device.type, enabled=False)
        with attack_mode(self.model) as model, private_rng(noise.seed, x.device), torch.no_grad(), full:
            rows = torch.arange(len(x), device=x.device).split(max(1, batch_size // BLOCK))
            return torch.cat([self._votes(model, x[some], num, noise.take(some), batch_size) for some in rows])

    def _votes(self, model: Model, x: Tensor, num: int, noise: Noise, batch_size: int) -> Tensor:
        """The votes of a few examples, block of copies by block."""
        total: Tensor | None = None
        for draw, first in enumerate(range(0, num, BLOCK)):
            count = min(BLOCK, num - first)
            copies = x[:, None] + self.sigma * noise.normal((count, *x.shape[1:]), draw).to(x)
            logits = torch.cat([model(part) for part in copies.flatten(0, 1).split(batch_size)])
            if logits.ndim != 2:
                raise ValueError(f"the model returned shape {tuple(logits.shape)}; smoothing needs logits (B, K)")
            num_classes = logits.shape[1]
            choice = torch.where(logits.isfinite().all(1), logits.argmax(1), num_classes).view(len(x), count)
            found = torch.zeros(len(x), num_classes + 1, dtype=torch.int64, device=x.device)
            found.scatter_add_(1, choice, torch.ones_like(choice))
            total = found if total is None else total + found
        assert total is not None
        return total


def certify(
    model: Model,
    x: Tensor,
    y: Tensor | None = None,
    *,
    sigma: float,
    num_select: int = 100,
    num_estimate: int = 10_000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    noise: Noise | None = None,
) -> Certificate:
    """The class of the smoothed classifier and an L2 radius within which it stays, each true with 1 - alpha.

    `num_select` copies choose the class, `num_estimate` others bound its probability from below (Clopper and Pearson
    1934): radius = sigma * Phi^-1(p_lower), abstaining (-1) unless p_lower > 1/2. Where labels y (B,) are given, an
    example whose chosen class is wrong is not estimated: it has radius 0 and p_lower 0, and saves its copies. Radii end
    at sigma * Phi^-1(alpha^(1/num_estimate)). The same seeds and examples give the same certificates, whatever the
    batches. Raises ValueError for sigma, alpha or counts out of range.

    Source: Cohen 2019, algorithm CERTIFY. Deviations: the labels; copies without finite logits vote for no class.

    >>> certificate = certify(nn.Linear(4, 2), torch.rand(3, 4), sigma=0.5, num_estimate=1000)
    >>> certificate.prediction.shape, certificate.radius.dtype, certificate.cost.forwards
    (torch.Size([3]), torch.float64, 3300)
    """
    _check_alpha(alpha)
    smoothed, noise = Smoothed(model, sigma), noise or Noise.make(0, "smoothing", torch.arange(len(x)))
    prediction = smoothed.votes(x, num_select, noise=noise, batch_size=batch_size)[:, :-1].argmax(1).cpu()
    p_lower = torch.zeros(len(x), dtype=torch.float64)
    rows = (torch.ones_like(prediction) if y is None else prediction == y.cpu()).nonzero()[:, 0]
    if len(rows):
        fresh = noise.take(rows).restart(1)  # the copies that chose the class must not also vouch for it
        votes = smoothed.votes(take(x, rows), num_estimate, noise=fresh, batch_size=batch_size).cpu()
        p_lower[rows] = lower_bound(votes.gather(1, prediction[rows][:, None])[:, 0], num_estimate, alpha)
        prediction[rows[p_lower[rows] <= 0.5]] = -1
    radius = sigma * torch.special.ndtri(p_lower).clamp_min(0)
    return Certificate(prediction, radius, p_lower, Cost(len(x) * num_select + len(rows) * num_estimate))


def predict(
    model: Model,
    x: Tensor,
    *,
    sigma: float,
    num: int = 1000,
    alpha: float = 0.001,
    batch_size: int = 1000,
    noise: Noise | None = None,
) -> Tensor:
    """(B,) the class of the smoothed classifier, wrong with probability alpha at most; -1 where it abstains.

    It abstains unless a fair coin would split the two largest votes so unevenly, in either direction, with a
    probability of alpha at most. Source: Cohen 2019, algorithm PREDICT (Hung and Fithian 2019 prove the test).

    >>> predict(nn.Linear(4, 2), torch.rand(3, 4), sigma=0.5, num=100).shape
    torch.Size([3])
    """
    from scipy.stats import binom

    _check_alpha(alpha)
    votes = Smoothed(model, sigma).votes(x, num, noise=noise, batch_size=batch_size)
    top = votes.topk(2, dim=1)
    first, second = top.values.cpu().numpy().T
    unsure = torch.from_numpy(2 * binom.cdf(second, first + second, 0.5) > alpha).to(x.device)
    return top.indices[:, 0].masked_fill(unsure | (top.indices[:, 0] == votes.shape[1] - 1), -1)


def certified(certificate: Certificate, y: Tensor, radius: float | Tensor) -> Tensor:
    """(B,) bool: the smoothed classifier is right and stays so within `radius` (a number or (B,)), L2, input units.

    Abstaining counts as not certified. The mean is the certified accuracy; give the sum to `wilson` for its interval.

    >>> certificate = Certificate(torch.tensor([1, -1]), torch.tensor([0.5, 0.0]), torch.tensor([0.9, 0.4]), Cost())
    >>> certified(certificate, torch.tensor([1, 1]), 0.25)
    tensor([ True, False])
    """
    return (certificate.prediction == y.cpu()) & (certificate.radius >= torch.as_tensor(radius).cpu())


def lower_bound(count: Tensor, num: int, alpha: float) -> Tensor:
    """(B,) float64 the probability that lies below the true one with confidence 1 - alpha, given count of num votes.

    Source: Clopper and Pearson 1934, one-sided: the alpha quantile of Beta(count, num - count + 1), 0 for no votes.

    >>> lower_bound(torch.tensor([0, 99, 100]), 100, 0.05)
    tensor([0.0000, 0.9534, 0.9705], dtype=torch.float64)
    """
    from scipy.stats import beta

    votes = count.cpu().numpy()
    bound = beta.ppf(alpha, votes.clip(1), num - votes.clip(1) + 1)
    return torch.from_numpy(bound * (votes > 0))


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is the probability of a wrong certificate, between 0 and 1 such as 0.001; got {alpha}")
