"""Square: the published schedule and shapes, the strength of the reference, and every promise an attack makes."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from contracts import NUM_CLASSES, SHAPE, rand, seeded, sentences, stream, words
from sparring.attacks.around import Restarts
from sparring.attacks.square import (
    HALVINGS,
    Square,
    cells,
    chessboard,
    grid,
    humps,
    moved,
    proposal,
    square,
    start,
    window,
)
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import AttackResult, Cost, take
from sparring.evaluation.measure import measure
from sparring.threats import L2, Ball, Linf, inside
from sparring.threats.l1 import L1

LABELS = torch.tensor([2, 0, 3])
KINDS: dict[str, tuple[type[Ball], float]] = {"Linf": (Linf, 0.1), "L2": (L2, 0.5), "L1": (L1, 2.0)}
SHAPES = {"image": SHAPE, "flat": (3, 11), "rows": (3, 2, 9), "film": (3, 2, 4, 5, 7), "number": (3, 1)}


def mlp(shape: tuple[int, ...], seed: int = 0) -> nn.Module:
    """A curved network in float64."""
    width = math.prod(shape[1:])
    return seeded(
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(width, 9), nn.Tanh(), nn.Linear(9, NUM_CLASSES)).double(), seed
    )


def ball(kind: str, **options: Any) -> Ball:
    make, radius = KINDS[kind]
    return make(options.pop("radius", radius), **options)


# The published numbers -------------------------------------------------------------------------------------------


def test_share_follows_the_published_table() -> None:
    """AutoAttack's table for 10,000 queries: p / 2^k from query HALVINGS[k - 1] + 1 on."""
    published = [
        (0, 10, 1), (11, 50, 2), (51, 200, 4), (201, 500, 8), (501, 1000, 16), (1001, 2000, 32), (2001, 4000, 64),
        (4001, 6000, 128), (6001, 8000, 256), (8001, 9999, 512),
    ]  # fmt: skip
    attack = Square(threat=Linf(0.1))
    half = Square(threat=Linf(0.1), num_queries=5000, rescale=True)
    for first, last, part in published:
        for t in (first, (first + last) // 2, last):
            assert attack.share(t) == 0.8 / part
            assert half.share(t // 2) == attack.share(2 * (t // 2))
    assert len(HALVINGS) == 9
    assert Square(threat=Linf(0.1), p=0.3, num_queries=7).share(11) == 0.15


@pytest.mark.parametrize("size", [4, 8, 28, 32, 224])
def test_windows_of_square_images_are_the_published_ones(size: int) -> None:
    for k in range(10):
        share = 0.8 / 2**k
        side = round(math.sqrt(share * size * size))
        assert window(share, size, size, 1) == (min(max(side, 1), size),) * 2
        odd = max(side, 3)
        odd += 1 - odd % 2
        assert window(share, size, size, 3) == (min(odd, size),) * 2


def test_windows_of_other_shapes_keep_their_share() -> None:
    for height, width in ((1, 50), (2, 50), (50, 2), (5, 7), (1, 1), (1, 2), (3, 300)):
        for least in (1, 3):
            for k in range(10):
                share = 0.8 / 2**k
                h, w = window(share, height, width, least)
                assert 1 <= h <= height
                assert 1 <= w <= width
                if h * w > least**2 and least == 1:  # as near as whole lines allow
                    assert abs(h * w - share * height * width) <= max(h, w)
    assert window(0.8, 1, 50, 1) == (1, 40)
    assert window(0.8, 50, 2, 1) == (40, 2)
    assert window(0.1, 1, 50, 3) == (1, 5)


def test_windows_lie_everywhere_and_never_beyond() -> None:
    height, width, h, w = 4, 6, 2, 3
    u = stream(2000).uniform((2,))
    places = cells(u, height, width, h, w)[:, 0]
    corners = places[:, 0]
    assert sorted(set(corners.tolist())) == [r * width + c for r in range(3) for c in range(4)]
    counts = torch.bincount(corners)[torch.tensor(sorted(set(corners.tolist())))]
    assert counts.min() > 100, f"each of 12 positions is as likely (167 of 2,000); got {counts.tolist()}"
    rows = [[(r * width + c) for r in range(a, a + h) for c in range(b, b + w)] for a in range(3) for b in range(4)]
    assert set(map(tuple, places.tolist())) == set(map(tuple, rows))
    largest = torch.full((1, 2), 1 - 2.0**-24)
    for n in (1, 2, 3, 5, 28, 32, 33, 224, 1023, 1025, 99_999):
        assert int(cells(largest, n, 1, 1, 1).max()) == n - 1


@pytest.mark.parametrize("shape", [(12, 12), (9, 9), (7, 7), (3, 3), (1, 1)])
@pytest.mark.parametrize("q", [2, 1])
def test_humps_equal_a_sum_over_rings(shape: tuple[int, int], q: int) -> None:
    """The published code adds 1 / k^2 (L1: 1 / k^4) on growing rectangles around the middle; so does this loop."""

    def hump(h: int, w: int) -> Tensor:
        v = torch.zeros(h, w).double()
        for i in range(h):
            for j in range(w):
                ring = max(abs(i - h // 2), abs(j - w // 2))
                v[i, j] = sum(1 / k ** (4 // q) for k in range(ring + 1, max(h // 2, w // 2) + 2))
        return v / v.norm(q)

    size = shape[0]
    pair = torch.cat([hump(size // 2, size), -hump(size - size // 2, size)]) if size > 1 else -hump(1, 1)
    rows, columns = humps(*shape, q).view(2, *shape)
    torch.testing.assert_close(rows, pair / pair.norm(q))
    torch.testing.assert_close(columns, rows.T)


@pytest.mark.parametrize("size", [1, 3, 5, 9, 28])
def test_humps_equal_those_of_an_independent_implementation(size: int) -> None:
    torchattacks = reference()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = torchattacks(nn.Identity(), norm="L2")
        theirs.device = torch.device("cpu")
        drawn = {tuple(theirs.eta(size).flatten().tolist()) for _ in range(20)}
    ours = {tuple(v.tolist()) for v in humps(size, size, 2)}
    assert len(drawn) == len(ours) == (1 if size == 1 else 2)
    for mine, their in zip(sorted(ours), sorted(drawn), strict=True):
        torch.testing.assert_close(torch.tensor(mine), torch.tensor(their))


def test_chessboard_has_the_published_layout() -> None:
    """28 x 28: 25 tiles of 5 x 5 from place (1, 1) on; 32 x 32: 25 of 6 x 6 from (1, 1) on."""
    for size, side in ((28, 5), (32, 6)):
        like = torch.zeros(2, 3, size, size).double()
        board = chessboard(stream(2).uniform((25, 4)), like, 2)
        assert board.shape == like.shape
        inner = board[:, :, 1 : 1 + 5 * side, 1 : 1 + 5 * side]
        assert torch.equal(inner.abs().sum(), board.abs().sum()), "nothing outside the tiles"
        pair = humps(side, side, 2).view(2, side, side)
        tiles = inner.reshape(2, 3, 5, side, 5, side).transpose(3, 4).reshape(-1, side, side)
        options = torch.cat([pair, -pair])
        which = torch.stack([(tiles == option).all((1, 2)) for option in options], 1)
        assert torch.equal(which.sum(1), torch.ones(150, dtype=torch.int64))
        assert bool((which.sum(0) > 15).all()), f"all four are drawn: {which.sum(0).tolist()}"
        halves = which.view(2, 3, 25, 2, 2).any(3)  # split by rows or by columns, up or down taken together
        assert torch.equal(halves[:, :1].expand_as(halves), halves), "the channels of a tile are split alike"


@pytest.mark.parametrize("kind", ["L2", "L1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_moved_length_fills_the_ball_and_stays_out_of_other_places(kind: str, channels: int) -> None:
    """||moved||_q^q = ||z||_q^q + what was left up to the radius^q; for L1 with channels more, as published."""
    q = 2 if kind == "L2" else 1
    z = 0.02 * (rand(5, channels, 6 * 7, seed=1) - 0.5)  # inside the ball
    u = stream(5).uniform((4,))
    into, out_of = (cells(v, 6, 7, 3, 3).expand(-1, channels, -1) for v in (u[:, :2], u[:, 2:]))
    pattern = humps(3, 3, q)[0].expand(5, channels, -1)
    radius = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double().view(5, 1, 1)
    new = moved(z, radius, q, into, out_of, pattern)
    touched = torch.zeros_like(z, dtype=torch.bool).scatter(2, into, True)
    emptied = torch.zeros_like(touched).scatter(2, out_of, True) & ~touched
    assert torch.equal(new[~touched & ~emptied], z[~touched & ~emptied])
    assert bool((new[emptied] == 0).all())
    length = (new * touched if q == 1 else new).abs().pow(q).sum((1, 2))
    kept = (z * ~touched * ~emptied).abs().pow(q).sum((1, 2))
    want = radius.flatten() ** q
    torch.testing.assert_close(length, want if q == 2 else channels * (want - kept))


# Strength --------------------------------------------------------------------------------------------------------


def reference() -> Any:
    """torchattacks' Square."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchattacks.attacks.square").Square


class Digits:
    """60 digits that a small network gets right; trained once in about a second."""

    def __init__(self) -> None:
        images, labels = load_digits(return_X_y=True)
        x = torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8)
        y = torch.tensor(labels)
        self.net = seeded(lambda: self._trained(x[:1200], y[:1200]))
        right = (self.net(x[1200:]).argmax(1) == y[1200:]).nonzero()[:60, 0] + 1200
        self.x, self.y = x[right], y[right]

    def _trained(self, x: Tensor, y: Tensor) -> nn.Module:
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for _ in range(8):
            for rows in torch.randperm(len(x)).split(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
                optimizer.step()
        return net.eval()


@pytest.fixture(scope="module")
def digits() -> Digits:
    return Digits()


def broken(digits: Digits, attack: Any, seeds: tuple[int, ...] = (0, 1)) -> float:
    """How many of the 60 fall, mean over the seeds."""
    results = [attack(digits.net, digits.x, digits.y, noise=Noise.make(s, "test", torch.arange(60))) for s in seeds]
    return sum(int(r.reached.sum()) for r in results) / len(seeds)


@pytest.mark.parametrize(("kind", "radius"), [("Linf", 0.12), ("L2", 0.6)])
def test_as_strong_as_an_independent_implementation(digits: Digits, kind: str, radius: float) -> None:
    """The reference never lets a window reach the last row and column (the paper does); told to, it breaks as many."""
    theirs = reference()

    class Everywhere(theirs):  # type: ignore[misc,valid-type]
        def random_int(self, low: int = 0, high: int = 1, shape: Any = (1,)) -> Tensor:
            return super().random_int(low, high + 1, list(shape))

    def count(make: Any, seed: int) -> int:
        with torch.random.fork_rng(devices=[]):
            attack = make(digits.net, norm=kind, eps=radius, n_queries=300, resc_schedule=False, seed=seed)
            return int((digits.net(attack(digits.x, digits.y)).argmax(1) != digits.y).sum())

    ours = broken(digits, square(KINDS[kind][0](radius), num_queries=300))
    assert 10 <= ours <= 50, "a network where nothing or all falls shows nothing"
    assert abs(ours - sum(count(Everywhere, seed) for seed in (0, 1)) / 2) <= 3
    assert ours >= count(theirs, 0) - 3, "as published, the reference is no stronger"


@pytest.mark.parametrize("kind", KINDS)
def test_a_search_beats_its_start_and_many_random_starts(digits: Digits, kind: str) -> None:
    threat = KINDS[kind][0]({"Linf": 0.15, "L2": 0.6, "L1": 2.0}[kind])
    found = broken(digits, square(threat, num_queries=100), (0,))
    assert found >= broken(digits, square(threat, num_queries=0, restarts=101), (0,)) + 5


def climbed(threat: Ball, shape: tuple[int, ...], **options: Any) -> Tensor:
    """(B,) which part of the way to the maximum of a linear margin over the ball, without box, is reached."""
    x, y = rand(*shape, seed=8), torch.arange(shape[0]) % 2
    w = 2 * rand(math.prod(shape[1:]), seed=9) - 1

    def model(v: Tensor) -> Tensor:  # the margin of the wrong class is w . v - 1e3, so that nothing ever falls
        lead = v.flatten(1) @ w
        return torch.stack([torch.zeros_like(lead), lead], 1) * (1 - 2.0 * y[:, None]) + 1e3 * nn.functional.one_hot(y)

    result = square(threat, **options)(model, x, y)
    dual = {Linf: w.abs().sum(), L2: w.norm(), L1: w.abs().max()}[type(threat)]  # type: ignore[index]
    assert result.reached is not None
    assert not bool(result.reached.any())
    return (result.x_adv - x).flatten(1) @ w / (dual * torch.as_tensor(threat.radius))  # type: ignore[operator]


STRONG = {
    "Linf-flat": (Linf(0.1, low=None, high=None), (3, 20), {"num_queries": 600}, 0.9),
    "Linf-flat-rescaled": (Linf(0.1, low=None, high=None), (3, 20), {"num_queries": 300, "rescale": True}, 0.99),
    "Linf-image": (Linf(0.1, low=None, high=None), SHAPE, {"num_queries": 400, "rescale": True}, 0.9),
    "L2-flat": (L2(0.7, low=None, high=None), (3, 12), {"num_queries": 300}, 0.75),
    "L1-flat": (L1(2.0, low=None, high=None), (3, 12), {"num_queries": 300}, 0.85),
}


@pytest.mark.parametrize("name", STRONG)
def test_comes_near_the_maximum_of_a_linear_model(name: str) -> None:
    threat, shape, options, share = STRONG[name]
    found = climbed(threat, shape, **options)
    assert bool((found <= 1 + 1e-6).all()), "more than the maximum: the search left the set"
    assert bool((found >= share).all()), f"got {found.tolist()}"


@pytest.mark.parametrize("name", STRONG)
def test_without_queries_it_fails_the_strength_test(name: str) -> None:
    threat, shape, _, share = STRONG[name]
    assert bool((climbed(threat, shape, num_queries=0) < share - 0.2).all())


# Relations and counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_more_queries_and_restarts_never_lower_the_kept_loss(kind: str) -> None:
    model, x, threat = mlp(SHAPE), rand(*SHAPE), ball(kind, radius=torch.tensor([0.05, 0.1, 0.4]).double())
    y = model(x).argmax(1)
    before, fallen = torch.full((3,), -torch.inf).double(), torch.zeros(3, dtype=torch.bool)
    runs = [{"num_queries": n} for n in (0, 1, 5, 31, 33, 70)] + [{"num_queries": 70, "restarts": r} for r in (2, 3)]
    gained = 0
    for options in runs:
        result = square(threat, **options)(model, x, y, noise=stream(3))
        assert result.loss is not None
        assert result.reached is not None
        assert bool((result.reached >= fallen).all())
        assert bool(((result.loss >= before) | (result.reached & ~fallen)).all())
        gained += bool((result.loss > before).any())
        before, fallen = result.loss, result.reached
    assert gained >= 3, "the rows are not all the same"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("restarts", [1, 2])
def test_cost_counts_every_pass_and_what_fell_is_not_asked_again(digits: Digits, kind: str, restarts: int) -> None:
    asked: list[int] = []

    def model(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        asked.append(len(x))
        return digits.net(x)

    radius = {"Linf": 0.15, "L2": 0.8, "L1": 2.0}[kind]
    attack = square(KINDS[kind][0](radius), num_queries=40, restarts=restarts)
    result = attack(model, digits.x, digits.y)
    assert result.cost == Cost(sum(asked), 0)
    assert asked[0] == 60
    assert result.reached is not None
    assert len(asked) == 41 * restarts, "the start and 40 queries"
    assert all(later <= sooner for sooner, later in itertools.pairwise(asked))
    left = 60 - int(result.reached.sum())
    assert left <= asked[-1] < 60
    nothing = square(KINDS[kind][0](radius), num_queries=0)(model, digits.x, digits.y)
    assert nothing.cost == Cost(60, 0)


def test_stops_when_all_have_fallen() -> None:
    result = square(Linf(0.1), num_queries=50)(
        lambda v: v.flatten(1)[:, :4] * 0 + torch.arange(4.0), rand(3, 5), LABELS
    )
    assert result.reached is not None
    assert result.reached.tolist() == [True, True, False]  # the label 3 has the largest logit
    assert result.cost == Cost(53, 0)


# The set ---------------------------------------------------------------------------------------------------------


def boxes(x: Tensor) -> dict[str, dict[str, Any]]:
    """Options of a ball around x in [0, 1]."""
    return {
        "unit": {},
        "none": {"low": None, "high": None},
        "low": {"high": None},
        "tensors": {"low": torch.zeros_like(x[:1]) - 0.05, "high": torch.full_like(x[0], 1.02)},
        "mask": {"mask": rand(1, *x.shape[1:], seed=5) < 0.6},
        "masks-radii": {"mask": rand(*x.shape, seed=6) < 0.6, "radius": torch.tensor([0.05, 0.4, 0.0])},
    }


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_result_lies_in_set_box_and_mask_and_its_loss_is_true(name: str, kind: str, dtype: torch.dtype) -> None:
    x, model = rand(*SHAPES[name], seed=2).to(dtype), mlp(SHAPES[name]).to(dtype)
    x[0] = x[0].round()  # on the edge of the box
    for options in boxes(x).values():
        threat = ball(kind, **options)
        for num_queries in (0, 25):
            result = square(threat, num_queries=num_queries)(model, x, LABELS)
            x_adv = result.x_adv
            assert isinstance(x_adv, Tensor)
            assert x_adv.dtype == result.z.dtype == dtype
            assert x_adv.shape == result.z.shape == x.shape
            assert bool(inside(threat, x, result.z).all())
            assert bool(threat.valid(x, x_adv).all())
            if threat.mask is not None:
                assert torch.equal(x_adv[~threat.mask.expand_as(x)], x[~threat.mask.expand_as(x)])
            torch.testing.assert_close(result.loss, margin.score(model(x_adv), LABELS).detach())
            assert torch.equal(result.reached, model(x_adv).argmax(1) != LABELS)  # type: ignore[arg-type]
            torch.testing.assert_close(result.size, threat.size(x, result.z))
        assert threat.mask is not None or bool((result.z[1] != 0).any())


def test_linf_starts_with_stripes_of_the_radius_and_windows_keep_to_its_corners() -> None:
    x, radii = rand(*SHAPE), torch.tensor([0.1, 0.2, 0.3]).double()
    threat = Linf(radii, low=None, high=None)
    z = start(threat, x, stream(3))
    assert torch.equal(z.abs(), radii.view(3, 1, 1, 1).expand_as(x))
    assert torch.equal(z, z[:, :, :1].expand_as(z)), "one sign from top to bottom"
    assert len({tuple(v) for v in z[:, :, 0].sign().flatten(0, 1).tolist()}) == 6, "signs of every example and channel"
    new = proposal(threat, x, z, stream(3).uniform((7,), draw=1), 0.2)
    changed = (new != z).flatten(2).sum(2)
    assert torch.equal(new.abs(), z.abs())
    assert int(changed.max()) <= 9, "a fifth of 5 x 7 places is a window of 3 x 3"
    flat = start(Linf(0.1), rand(3, 11), stream(3))
    assert len(set(flat.sign().flatten().tolist())) == 2


def test_l2_starts_and_stays_on_the_sphere_whatever_the_mask_takes_away() -> None:
    x, radii = rand(*SHAPE), torch.tensor([0.1, 2.0, 100.0]).double()
    for mask in (None, rand(*SHAPE, seed=6) < 0.4):
        threat = L2(radii, low=None, high=None, mask=mask)
        z = start(threat, x, stream(3))
        for draw in range(1, 4):
            torch.testing.assert_close(threat.size(x, z), radii)
            z = proposal(threat, x, z, stream(3).uniform((7,), draw=draw), 0.2)


def test_inputs_are_seen_as_channels_of_rows_and_columns() -> None:
    shapes = {(3,): (1, 1, 1), (3, 11): (1, 1, 11), (3, 2, 9): (2, 1, 9), SHAPE: (2, 5, 7), (3, 2, 4, 5, 7): (8, 5, 7)}
    assert {shape: grid(torch.zeros(shape)) for shape in shapes} == shapes


# Per example -----------------------------------------------------------------------------------------------------


def assert_same(part: AttackResult, whole: AttackResult, rows: Tensor) -> None:
    assert torch.equal(part.reached, whole.reached[rows])  # type: ignore[index,arg-type]
    for name in ("x_adv", "z", "size", "loss"):  # in another batch the last bits may differ
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[rows], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("restarts", [1, 2])
def test_a_batch_gives_what_its_examples_give(kind: str, restarts: int) -> None:
    """Exactly, also where an example falls on the way and the others go on without it, over two blocks of draws."""
    model, x, noise = mlp(SHAPE), rand(*SHAPE), stream(3)
    y = model(x).argmax(1)
    radii = KINDS[kind][1] * torch.tensor([0.05, 12.0, 0.2]).double()
    threat = ball(kind, radius=radii, mask=rand(*SHAPE, seed=4) < 0.9)
    attack = square(threat, num_queries=40, restarts=restarts)
    whole = attack(model, x, y, noise=noise)
    assert whole.reached is not None
    assert whole.reached.any()
    assert not whole.reached.all()
    for rows in (torch.tensor([2, 0, 1]), torch.tensor([0]), torch.tensor([1]), torch.tensor([0, 2])):
        assert_same(take(attack, rows)(model, x[rows], y[rows], noise=noise.take(rows)), whole, rows)


def test_examples_have_windows_of_their_own_and_draws_of_every_query_differ() -> None:
    x = rand(1, *SHAPE[1:]).expand(4, -1, -1, -1)
    y = torch.zeros(4, dtype=torch.int64)
    result = square(Linf(0.1), num_queries=5)(mlp(SHAPE), x, y, noise=stream(4))
    assert len({tuple(z.flatten().tolist()) for z in result.z}) == 4
    asked: list[int] = []

    class Recording(Noise):
        def uniform(self, shape: Any, draw: int = 0) -> Tensor:
            asked.append(draw)
            return super().uniform(shape, draw)

    square(Linf(1e-9), num_queries=70)(mlp(SHAPE), x, mlp(SHAPE)(x).argmax(1), noise=Recording(stream(4).keys))
    assert asked == [0, 1, 2, 3], "the start and three blocks of queries"


def test_same_noise_same_bits_other_noise_other_result() -> None:
    model, x = mlp(SHAPE), rand(*SHAPE)
    attack = square(L2(0.5), num_queries=20)
    first, again, other = (attack(model, x, LABELS, noise=stream(3, seed)) for seed in (0, 0, 1))
    assert_same(again, first, torch.arange(3))
    assert not torch.equal(first.z, other.z)
    assert torch.equal(attack(model, x, LABELS).z, attack(model, x, LABELS).z), "without noise: seed 0"


# Models and callers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_models_without_gradients(digits: Digits, kind: str) -> None:
    """numpy inside, and rounding to ten levels: there is nothing to differentiate, and the search finds its way."""
    weights = [p.detach().numpy() for p in digits.net.parameters()]

    def model(x: Tensor) -> Tensor:
        v = (x * 9).round().div(9).flatten(1).numpy()
        return torch.from_numpy((v @ weights[0].T + weights[1]).clip(0) @ weights[2].T + weights[3])

    threat = KINDS[kind][0]({"Linf": 0.15, "L2": 0.8, "L1": 2.0}[kind])
    few, many = (square(threat, num_queries=n)(model, digits.x, digits.y) for n in (0, 60))
    assert int(many.reached.sum()) >= int(few.reached.sum()) + 5  # type: ignore[union-attr]
    assert torch.equal(many.reached, model(many.x_adv).argmax(1) != digits.y)  # type: ignore[arg-type]


def test_two_classes_and_probabilities_as_target() -> None:
    x, hard = rand(3, 6), torch.tensor([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]]).double()
    model = seeded(lambda: nn.Linear(6, 2).double())
    attack = square(Linf(0.6), num_queries=80)
    by_label, by_probability = attack(model, x, hard.argmax(1)), attack(model, x, hard)
    assert_same(by_probability, by_label, torch.arange(3))
    w, b = model.weight.detach(), model.bias.detach()
    sign = 1 - 2 * hard.argmax(1).double()
    slope = (w[1] - w[0]) * sign[:, None]
    best = (x + torch.where(slope > 0, (1 - x).clamp_max(0.6), -x.clamp_max(0.6))) @ (w[1] - w[0]) + b[1] - b[0]
    assert torch.equal(by_label.reached, best * sign > 0), "exactly those fall that can"  # type: ignore[arg-type]


def test_the_callers_objects_stay_as_they_were(
    stateful: nn.Module, images: Tensor, snapshot: Callable[[nn.Module], Any]
) -> None:
    x, y, before = images.clone(), LABELS.clone(), snapshot(stateful)
    for kind in KINDS:
        result = square(ball(kind), num_queries=5, restarts=2)(stateful, x, y)
        assert snapshot(stateful) == before
        assert torch.equal(x, images)
        assert torch.equal(y, LABELS)
        assert not result.z.requires_grad

    def raises(v: Tensor) -> Tensor:
        raise RuntimeError("no")

    stateful.register_forward_hook(lambda *_: raises(images))
    with pytest.raises(RuntimeError, match="no"):
        square(Linf(0.1))(stateful, x, y)
    assert snapshot(stateful) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_modes_of_autograd_do_not_matter(context: Any) -> None:
    model, attack = mlp(SHAPE), square(Linf(torch.tensor([0.1, 0.2, 0.3]).double()), num_queries=35)
    want = attack(model, rand(*SHAPE), LABELS)
    with context():
        x, y = rand(*SHAPE), LABELS.clone()
        assert_same(attack(model, x, y), want, torch.arange(3))
    assert_same(attack(model, x, y), want, torch.arange(3))
    assert_same(attack(model, rand(*SHAPE).requires_grad_(), LABELS), want, torch.arange(3))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_and_channels_last(kind: str) -> None:
    model, x = mlp(SHAPE), rand(*SHAPE)
    result = square(ball(kind), num_queries=5)(model.bfloat16(), x.bfloat16(), LABELS)
    assert result.x_adv.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert bool(result.z.isfinite().all())
    model, attack = mlp(SHAPE), square(ball(kind), num_queries=9)
    strided = attack(model, x.contiguous(memory_format=torch.channels_last), LABELS)
    assert_same(strided, attack(model, x, LABELS), torch.arange(3))


def test_logits_that_are_not_finite_never_count() -> None:
    x = rand(*SHAPE)
    for value in (math.nan, math.inf, -math.inf):
        result = square(Linf(0.1), num_queries=3)(lambda v, bad=value: v.flatten(1)[:, :4] * 0 + bad, x, LABELS)
        assert result.reached is not None
        assert result.loss is not None
        assert not bool(result.reached.any())
        assert bool(result.loss.isnan().all())


def test_one_broken_look_does_not_hide_the_others() -> None:
    model, x, looks = mlp(SHAPE), rand(*SHAPE), [0]

    def stumbles(v: Tensor) -> Tensor:
        looks[0] += 1
        return model(v) * (math.nan if looks[0] in (1, 3) else 1.0)

    result = square(Linf(0.1), num_queries=6)(stumbles, x, LABELS)
    assert result.loss is not None
    torch.testing.assert_close(result.loss, margin.score(model(result.x_adv), LABELS).detach())


def test_evaluate_takes_it_and_verifies_it(digits: Digits) -> None:
    radii = torch.full((60,), 0.15)
    found = []
    for size in (60, 25):
        batches = list(zip(digits.x.split(size), digits.y.split(size), strict=True))
        attacks = [partial(square, num_queries=30, restarts=2)]
        found.append(measure(digits.net, batches, Linf(radii), attacks, curve=()))
    assert found[0].attacks[0].broke > 5
    assert not any(found[0].attacks[0].rejected.values())
    assert torch.equal(found[0].table["robust"], found[1].table["robust"])
    assert found[0].attacks[0].settings["attack"]["type"] == "Square"


# Errors ----------------------------------------------------------------------------------------------------------


def test_errors_say_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"Linf, L2 and L1 balls.*got a Words.*such as pgd"):
        square(words())
    with pytest.raises(ValueError, match="changes one tensor"):
        square(Linf(0.1))(lambda v: v, sentences(), LABELS)
    for radius in (math.inf, torch.tensor([0.1, math.inf])):
        with pytest.raises(ValueError, match="finite radius"):
            square(L2(radius))
    for options in ({"num_queries": -1}, {"p": 0.0}, {"p": 1.1}):
        with pytest.raises(ValueError, match="expected num_queries >= 0 and 0 < p <= 1"):
            square(Linf(0.1), **options)
    with pytest.raises(ValueError, match="restarts must be at least 1"):
        square(Linf(0.1), restarts=0)
    model, x = mlp(SHAPE), rand(*SHAPE)
    for target in (LABELS[:2], LABELS.double(), LABELS[:, None, None]):
        with pytest.raises(
            ValueError, match=r"expected (integer labels|class numbers) \(B,\)"
        ):
            square(Linf(0.1))(model, x, target)
    with pytest.raises(ValueError, match="logits"):
        square(Linf(0.1))(lambda v: v, x, LABELS)
    with pytest.raises(ValueError, match=r"mask .* must be"):
        square(Linf(0.1, mask=torch.ones(5, 7, dtype=torch.bool)))(model, x, LABELS)


def test_restarts_wrap_the_search() -> None:
    attack = square(Linf(0.1), num_queries=7, p=0.5, restarts=3, rescale=True)
    assert attack == Restarts(Square(threat=Linf(0.1), num_queries=7, p=0.5, rescale=True), 3)
    assert square(Linf(0.1)) == Square(threat=Linf(0.1), num_queries=5000, p=0.8, rescale=False)
