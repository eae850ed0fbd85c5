"""Keyed noise: every example has its own stream, so its draws do not depend on the batch it came in.

Counter-based: element i of draw d of an example is splitmix64 of (key of the example, d, i), integer arithmetic
that every device does alike. Uniform numbers are multiples of 2^-24, hence the same bits everywhere and in every
float type of 24 bits or more; normal numbers go through `erfinv` and agree to the last rounding.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


def _int64(value: int) -> int:
    """The number modulo 2^64, as torch's signed integers hold it."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN = _int64(0x9E3779B97F4A7C15)
_MIX_A = _int64(0xBF58476D1CE4E5B9)
_MIX_B = _int64(0x94D049BB133111EB)


def _shift(v: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch's `>>` on int64 drags the sign along."""
    return (v >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(v: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014), in wrapping int64."""
    v = (v ^ _shift(v, 30)).mul_(_MIX_A)
    v = v.bitwise_xor_(_shift(v, 27)).mul_(_MIX_B)
    return v.bitwise_xor_(_shift(v, 31))


def check_seed(seed: Any) -> None:
    """Raises ValueError for what is no seed."""
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ValueError(f"a seed is a whole number of at most 63 bits, such as 0; got {seed!r}")


@dataclass(frozen=True, eq=False)
class Noise:
    """One random stream per example; `keys` (B,) int64.

    >>> noise = Noise.make(seed=0, purpose="evaluate", index=torch.arange(4))
    >>> noise.uniform((3,)).shape
    torch.Size([4, 3])
    >>> bool((noise.uniform((3,))[2:] == noise.take(torch.tensor([2, 3])).uniform((3,))).all())
    True
    """

    keys: Tensor
    seed: int = 0

    @staticmethod
    def make(seed: int, purpose: str, index: Tensor) -> Noise:
        """Streams for the examples with these running numbers (B,). Another seed or purpose, other streams."""
        check_seed(seed)
        digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
        base = int.from_bytes(digest[:8], "little", signed=True)
        first = int(index[0]) if len(index) else 0  # so that stochastic models do not repeat themselves batch by batch
        return Noise(_mix(_mix(index.to(torch.int64) * _GOLDEN + base) ^ base), (base + first) & 0x7FFFFFFF)

    @staticmethod
    def from_torch(num: int) -> Noise:
        """Streams seeded by PyTorch's global generator, as dropout is: what a recipe takes when given none."""
        return Noise.make(int(torch.randint(2**62, ()).item()), "torch", torch.arange(num))

    def uniform(self, shape: tuple[int, ...] | torch.Size, draw: int = 0) -> Tensor:
        """Independent numbers in [0, 1), float32 (B, *shape). Another `draw`, other numbers."""
        return self._bits(shape, draw).to(torch.float32).mul_(2.0**-24)

    def normal(self, shape: tuple[int, ...] | torch.Size, draw: int = 0) -> Tensor:
        """Independent standard normal numbers, float32 (B, *shape), all within 5.5."""
        centred = (2 * self._bits(shape, draw) + (1 - (1 << 24))).to(torch.float32).mul_(2.0**-24)
        return torch.erfinv(centred).mul_(math.sqrt(2))

    def restart(self, number: int) -> Noise:
        """The streams of another restart; restart 0 is this one."""
        if number == 0:
            return self
        return Noise(_mix(self.keys + _int64(number * _MIX_B)), (self.seed + number) & 0x7FFFFFFF)

    def take(self, index: Tensor) -> Noise:
        """The streams of some of the examples."""
        return replace(self, keys=self.keys[index.to(self.keys.device)])

    def to(self, device: torch.device) -> Noise:
        """The same streams, drawn on another device."""
        waits = device.type != "cuda"  # a copy to CUDA is staged, so nobody needs to wait for it
        return self if self.keys.device == device else replace(self, keys=self.keys.to(device, non_blocking=not waits))

    def _bits(self, shape: tuple[int, ...] | torch.Size, draw: int) -> Tensor:
        """24 random bits each, int64 (B, *shape)."""
        count = torch.arange(1, math.prod(shape) + 1, device=self.keys.device) * _GOLDEN
        stream = _mix(self.keys + _int64((draw + 1) * _MIX_A))
        return _shift(_mix(stream[:, None] + count), 40).view(-1, *shape)
