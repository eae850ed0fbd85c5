"""The smoothed classifier as a network that can be attacked, and its certificate in the form that `evaluate` takes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparring.certify.smoothing import certified, certify
from sparring.core.noise import Noise
from sparring.threats.balls import L2


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
        if not 0 < sigma < float("inf") or num < 1:
            raise ValueError(f"smoothing needs a noise sigma > 0 in input units and copies; got {sigma} and {num}")
        self.model, self.sigma, self.num = model, sigma, num
        self.train(model.training)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma}, num={self.num}"

    def forward(self, x: Tensor) -> Tensor:
        stream = Noise.make(0, "smoothed net", torch.arange(self.num, device=x.device))
        noises = self.sigma * stream.normal(x.shape[1:]).to(x)
        mean = torch.stack([self.model(x + noise).softmax(1) for noise in noises]).mean(0)
        return mean.clamp_min(torch.finfo(mean.dtype).tiny).log()


@dataclass(frozen=True)
class SmoothingBound:
    """`smoothing.certify` as a certificate for `evaluate`: (model, x, y, threat) -> (B,), above 0 where certified.

    The value is 1 or -1: the certificate speaks about a radius, not about a margin. `base` is the network under
    the noise; the model that is given is left aside. The certificate is about the vote over endless noise, true with
    probability 1 - alpha for each example; a network that stands in for it is another one, so nothing is spared.
    Each input keys its own noise, so no batch matters.
    Raises ValueError for a threat that is not L2.
    """

    base: Any = field(repr=False)
    sigma: float
    num_select: int = 100
    num_estimate: int = 1000
    alpha: float = 0.001
    spares: ClassVar[bool] = False

    def __call__(self, model: Any, x: Tensor, y: Tensor, threat: Any) -> Tensor:
        if not isinstance(threat, L2):
            raise ValueError(f"randomised smoothing certifies L2 balls; the threat is a {type(threat).__name__}")
        noise = Noise.make(0, "smoothing", torch.tensor([_key(row) for row in x], dtype=torch.int64))
        certificate = certify(
            self.base, x, y, sigma=self.sigma, num_select=self.num_select, num_estimate=self.num_estimate,
            alpha=self.alpha, noise=noise,
        )  # fmt: skip
        return certified(certificate, y, threat.radius).to(x) * 2 - 1


def _key(row: Tensor) -> int:
    digest = hashlib.sha256(row.detach().cpu().contiguous().numpy().tobytes()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
