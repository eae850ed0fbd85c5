"""Keyed noise: the streams belong to the examples, and their bits to the file."""

from __future__ import annotations

import hashlib
import struct
from functools import partial

import pytest
import torch
from scipy import stats

from sparring.core.noise import Noise

MASK = (1 << 64) - 1

GOLDEN_BITS = [[15447894, 9614709, 1304360], [284399, 7986491, 4891749]]
GOLDEN_NORMAL = torch.tensor([[0.34574455, -1.693788886], [1.03262794, -0.869656682]], dtype=torch.float64)
GOLDEN_SEED = 658772656
GOLDEN_RESTART = [4826658, 14537717]


def make(num: int, seed: int = 0, purpose: str = "test") -> Noise:
    return Noise.make(seed, purpose, torch.arange(num))


def splitmix64(state: int) -> int:
    """The published finaliser on Python's unbounded integers."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def reference_bits(seed: int, purpose: str, index: int, count: int, draw: int) -> list[int]:
    """What the file's header promises, written without torch."""
    base = struct.unpack("<Q", hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8])[0]
    golden = 0x9E3779B97F4A7C15
    key = splitmix64(splitmix64(index * golden + base) ^ base)
    stream = splitmix64(key + (draw + 1) * 0xBF58476D1CE4E5B9)
    return [splitmix64(stream + i * golden) >> 40 for i in range(1, count + 1)]


@pytest.mark.parametrize(("seed", "purpose", "draw"), [(0, "attack", 0), (3, "evaluate", 2), (-5, "x", 1)])
def test_equals_the_published_generator(seed: int, purpose: str, draw: int) -> None:
    index = torch.tensor([0, 7, 2**40 + 1])
    got = Noise.make(seed, purpose, index).uniform((2, 3), draw)
    want = [reference_bits(seed, purpose, int(i), 6, draw) for i in index]
    assert torch.equal(got.double(), torch.tensor(want).view(3, 2, 3).double() / 2**24)


def test_golden_values() -> None:
    """Results files name a seed: a refactor that moves these numbers makes every one of them irreproducible."""
    bits = make(2).uniform((3,)).mul(2**24).long().tolist()
    assert bits == GOLDEN_BITS
    torch.testing.assert_close(make(2).normal((2,), draw=1).double(), GOLDEN_NORMAL, rtol=1e-6, atol=0)
    assert make(2).seed == GOLDEN_SEED
    assert make(2).restart(2).uniform((2,))[0].mul(2**24).long().tolist() == GOLDEN_RESTART


@pytest.mark.parametrize("method", ["uniform", "normal"])
def test_draws_belong_to_the_example(method: str) -> None:
    whole = getattr(make(6), method)((2, 5), 3)
    order = torch.tensor([4, 0, 5])
    rounding = 0 if method == "uniform" else 1e-6  # `erfinv` of a vector may round by where in it a number stands
    same = partial(torch.testing.assert_close, rtol=rounding, atol=0)
    same(getattr(make(6).take(order), method)((2, 5), 3), whole[order])
    same(getattr(Noise.make(0, "test", order), method)((2, 5), 3), whole[order])
    same(getattr(make(3), method)((2, 5), 3), whole[:3])
    same(getattr(make(6).restart(2).take(order), method)((4,)), getattr(make(6).restart(2), method)((4,))[order])


def test_a_longer_draw_begins_with_the_shorter() -> None:
    assert torch.equal(make(3).uniform((10,))[:, :4], make(3).uniform((4,)))
    assert make(3).uniform(()).shape == (3,)
    assert make(0).uniform((4,)).shape == (0, 4)


def test_uniform() -> None:
    numbers = make(300).uniform((100,))
    assert numbers.dtype == torch.float32
    assert float(numbers.min()) >= 0
    assert float(numbers.max()) < 1
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 0.01
    # per place over the examples: keys that follow one another must not show
    assert stats.kstest([stats.kstest(c.numpy(), "uniform").pvalue for c in numbers.T], "uniform").pvalue > 0.001
    assert stats.kstest([stats.kstest(r.numpy(), "uniform").pvalue for r in numbers], "uniform").pvalue > 0.001


def test_normal() -> None:
    numbers = make(300).normal((100,))
    assert stats.kstest(numbers.flatten().numpy(), "norm").pvalue > 0.01
    assert float(numbers.abs().max()) < 5.5
    assert bool(numbers.isfinite().all())
    assert not bool((numbers == 0).any()), "the centred grid has no zero, so a direction is never null"


def test_streams_are_independent() -> None:
    first = make(200).uniform((50,))
    others = {
        "draw": make(200).uniform((50,), draw=1),
        "restart": make(200).restart(1).uniform((50,)),
        "restart 2 against 1": make(200).restart(2).uniform((50,)),
        "seed": make(200, seed=1).uniform((50,)),
        "purpose": make(200, purpose="other").uniform((50,)),
        "example": first.roll(1, 0),
        "place": first.roll(1, 1),
    }
    for name, other in others.items():
        assert not bool((first == other).all()), name
        pair = torch.stack([first.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(pair)[0, 1])) < 0.04, name  # four standard deviations of 10,000 pairs
        assert int((first == other).sum()) <= 2, name
    equal_seeds = {make(1).seed, make(1, seed=1).seed, make(1).restart(1).seed, make(1, purpose="other").seed}
    assert len(equal_seeds) == 4, "stochastic models are seeded from it, so it must differ too"


def test_no_two_keys_alike() -> None:
    assert len(make(100_000).keys.unique()) == 100_000


def test_multiples_of_two_to_the_minus_24_in_every_type() -> None:
    numbers = make(20).uniform((50,))
    scaled = numbers.double() * 2**24
    assert torch.equal(scaled, scaled.round())
    assert torch.equal(numbers.double().float(), numbers)
    cube = numbers.clone().mul_(2).sub_(1)
    assert torch.equal(cube.double(), numbers.double() * 2 - 1), "the cube [-1, 1] is exact as well"


def test_from_torch_follows_the_global_generator() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        first, second = Noise.from_torch(3).uniform((4,)), Noise.from_torch(3).uniform((4,))
        torch.manual_seed(5)
        again = Noise.from_torch(3).uniform((4,))
    assert torch.equal(first, again)
    assert not bool((first == second).any())


def test_keyed_noise_leaves_the_global_generator() -> None:
    before = torch.get_rng_state()
    make(3).restart(1).normal((4,))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_device_draws_the_same_bits() -> None:
    there = make(5).to(torch.device("cuda"))
    assert torch.equal(there.uniform((4, 3), 2).cpu(), make(5).uniform((4, 3), 2))
    torch.testing.assert_close(there.normal((4, 3)).cpu(), make(5).normal((4, 3)))
