"""Where in memory a batch or the weights lie changes no bit: what goes on after a kill finds them elsewhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from alike import check_same
from contracts import rand, seeded
from sparring.attacks.catalogue import fgsm, pgd
from sparring.core.model_state import aligned, aligned_weights, attack_mode
from sparring.evaluation.measure import measure
from sparring.evaluation.preflight import preflight
from sparring.threats import L2, Linf
from sparring.training.loop import train
from sparring.training.recipes import pgd_at

NUM, DIM = 13, 17
X = rand(NUM, DIM, seed=1)
Y = torch.arange(NUM) % 3
PLACES = (8, 16, 24, 40)  # bytes past a multiple of 64; numpy hands out 16, a view of a batch any


def placed(tensor: Tensor, offset: int) -> Tensor:
    """The same numbers in the same layout, that many bytes into a larger buffer."""
    width = tensor.element_size()
    buffer = torch.empty(tensor.numel() + 64 // width, dtype=tensor.dtype)
    assert buffer.data_ptr() % 64 == 0 and offset % width == 0
    there = buffer[offset // width :][: tensor.numel()].as_strided(tensor.shape, tensor.stride(), offset // width)
    return there.copy_(tensor)


class Address(nn.Module):
    """A network whose last bits tell where its input and weights lie, as those of some matrix products do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(DIM, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3))

    def forward(self, x: Tensor) -> Tensor:
        tensors = (x, *self.parameters(), *self.buffers())
        return self.body(x) * (1 + 1e-13 * sum(t.data_ptr() % 64 for t in tensors))


def network(kind: str, offset: int = 0) -> nn.Module:
    """The same network in float64, with its weights and statistics that many bytes off."""
    model = seeded(lambda: Address() if kind == "told" else Address().body).double().eval()
    if offset:
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = placed(tensor.data, offset)
    return model


def bits(tensors: Any) -> dict[str, bytes]:
    return {name: tensor.detach().numpy().tobytes() for name, tensor in tensors.items()}


@pytest.mark.parametrize("threat", [Linf(0.05), L2(0.2)], ids=["linf", "l2"])
@pytest.mark.parametrize("kind", ["told", "real"])
def test_an_evaluation(kind: str, threat: Any) -> None:
    def judged(offset: int, of_weights: int) -> Any:
        batches = [(placed(x, offset), y) for x, y in zip(X.split(5), Y.split(5), strict=True)]
        return measure(network(kind, of_weights), batches, threat, [fgsm, pgd], curve=(0.5, 2.0))

    there = judged(0, 0)
    assert 0 < there.robust.count < there.clean.count < NUM
    for offset in PLACES:
        check_same(judged(offset, 0), there)
        check_same(judged(0, offset), there)
    views = list(zip(X.split(5), Y.split(5), strict=True))
    check_same(measure(network(kind), views, threat, [fgsm, pgd], curve=(0.5, 2.0)), there)


def test_an_evaluation_in_inference_mode() -> None:
    def judged(model: nn.Module, offset: int) -> Any:
        return measure(model, [(placed(X, offset), Y)], Linf(0.05), [fgsm], curve=())

    there, model = judged(network("told"), 0), network("told", 24)
    with torch.inference_mode():
        check_same(judged(model, 8), there)


@pytest.mark.parametrize("kind", ["told", "real"])
def test_an_attack_and_the_preflight(kind: str) -> None:
    want = pgd(Linf(0.05))(network(kind), X, Y)
    for offset in PLACES:
        found = pgd(Linf(0.05))(network(kind, offset), placed(X, offset), Y)
        assert torch.equal(found.z, want.z) and torch.equal(found.loss, want.loss)  # type: ignore[arg-type]
        seen = preflight(network(kind, offset), placed(X, offset), Y, Linf(0.05)).findings
        assert seen == preflight(network(kind), X, Y, Linf(0.05)).findings


@pytest.mark.parametrize("kind", ["told", "real"])
def test_a_training_that_goes_on(kind: str) -> None:
    def run(offset: int, **options: Any) -> Any:
        model, batches = network(kind, offset), [(placed(X[:8], offset), Y[:8]), (placed(X[8:], offset), Y[8:])]
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        result = train(
            model, batches, pgd_at(Linf(0.05), num_steps=2), optimizer, num_epochs=3, averaging=0.9, seed=1, **options
        )
        return model, result

    _, whole = run(0)
    for offset in PLACES:
        held: list[Any] = []

        def stop(state: Any, held: list[Any] = held) -> bool:
            held.append(state.to_dict())
            return len(held) == 3

        run(0, observe=stop)
        model, result = run(offset, resume=held[-1])
        assert bits(result.last) == bits(whole.last) == bits(model.state_dict())
        assert bits(result.averaged) == bits(whole.averaged)
        assert {p.data_ptr() % 64 for p in model.parameters()} == {offset}, "the weights lie where they lay"


def test_aligned_copies_only_what_it_must() -> None:
    image = rand(4, 3, 8, 8)
    for same in (X, image, image.contiguous(memory_format=torch.channels_last), X[0], torch.empty(0, 3)):
        assert aligned(same) is same
    last = placed(image.contiguous(memory_format=torch.channels_last), 24)
    for odd in (placed(X, 8), X[1:], X[:, ::2], X.t()[1:], X[:1].expand(5, DIM), last):
        there = aligned(odd)
        assert there is not odd and torch.equal(there, odd) and there.data_ptr() % 64 == 0
    assert aligned(last).is_contiguous(memory_format=torch.channels_last)


def test_weights_go_back_with_what_they_have_become() -> None:
    model = network("real", 24)
    before, weight = {name: t.data_ptr() for name, t in model.state_dict().items()}, model[0].weight
    with aligned_weights(model):
        assert weight is model[0].weight and weight.data_ptr() % 64 == 0
        weight.data += 1
        want = bits(model.state_dict())
    assert bits(model.state_dict()) == want != bits(network("real").state_dict())
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == before


def test_tied_weights_stay_tied() -> None:
    model, memory = nn.Module(), placed(rand(6), 8)
    model.whole, model.part = nn.Parameter(memory), nn.Parameter(memory[1:3])
    with aligned_weights(model), torch.no_grad():
        model.whole.zero_()
    assert bool((model.part == 0).all()) and model.part.data_ptr() == model.whole.data_ptr() + 8


def test_weights_in_a_mapped_file(tmp_path: Any) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(16) + rand(3, DIM).numpy().tobytes())
    model = nn.Linear(DIM, 3, bias=False).double()
    memory = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=path.stat().st_size)
    model.weight.data = torch.tensor([], dtype=torch.float64).set_(memory, 2, (3, DIM))
    want = X @ model.weight.detach().clone().t()
    with attack_mode(model) as frozen, torch.inference_mode():
        torch.testing.assert_close(frozen(X), want)
    assert model.weight.data_ptr() % 64 == 16
