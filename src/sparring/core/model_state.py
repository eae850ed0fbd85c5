"""Borrow a model for crafting and give it back untouched; and where in memory it is computed on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparring.core.noise import check_seed
from sparring.core.types import Model, logits_of, map_inputs

CraftMode = Literal["eval", "train", "keep"]
"""What BatchNorm and dropout do while crafting. "eval": running statistics, no dropout (Pang 2021: at least as good
as "train", and the examples stay independent). "train": batch statistics and dropout; the running statistics are put
back afterwards. "keep": whatever mode each submodule is in."""


def class_logits(out: Any) -> Tensor:
    """`logits_of`, with one number s for each input, (B,) or (B, 1), as the logit of class 1 of two: [0, s].

    >>> class_logits(torch.tensor([[2.0], [-1.0]]))
    tensor([[ 0.,  2.],
            [ 0., -1.]])
    """
    logits = logits_of(out)
    one = logits.ndim == 1 or (logits.ndim == 2 and logits.shape[1] == 1)
    return torch.stack([torch.zeros_like(logits.flatten()), logits.flatten()], 1) if one else logits


class ModelFailure(ValueError, RuntimeError):
    """The model itself raised an error, which is the cause of this one."""


class Frozen:
    """A model as a plain function: it is shown copies, so that it cannot write into what it is given.

    Returns the logits of whatever it returns (see `class_logits`); `first_look`, if there is one, sees the first of
    them as they came. `raw`: one logit stays one.
    """

    def __init__(self, model: Model, first_look: Callable[[Tensor], None] | None = None) -> None:
        self.model, self.first_look = model, first_look

    def __call__(self, x: Any) -> Tensor:
        logits = self.raw(x)
        if self.first_look:
            self.first_look(logits)
            self.first_look = None
        return class_logits(logits)

    def raw(self, x: Any) -> Tensor:
        """The logits as they came. Raises ModelFailure where the model raises what is no ValueError or TypeError."""
        try:
            return logits_of(self.model(map_inputs(torch.clone, x) if isinstance(x, Tensor | Mapping) else x))
        except (ValueError, TypeError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            given = f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
            raise ModelFailure(f"the model fails on inputs {given}: {type(error).__name__}: {error}") from error


@contextmanager
def attack_mode(model: Model, mode: CraftMode = "eval") -> Iterator[Frozen]:
    """Yields the model as a plain function with the mode set and no weight gradients; all is restored at the end.

    Restored, also when the body raises: every submodule's training flag, every parameter's `requires_grad`, and
    (in the modes that may change them) the buffers; of what is no `nn.Module` nothing is touched. The yielded function
    is no Module, so an attack called inside keeps this mode instead of setting its own. See `Frozen`.

    >>> with attack_mode(nn.Dropout(0.9), "train") as frozen:
    ...     _ = frozen(torch.ones(2, 3))
    """
    if mode not in ("eval", "train", "keep"):
        raise ValueError(f"mode while crafting: got {mode!r}, expected 'eval', 'train' or 'keep'")
    if not isinstance(model, nn.Module):
        yield model if isinstance(model, Frozen) else Frozen(model)
        return
    flags = [(module, module.training) for module in model.modules()]
    learning = [p for p in model.parameters() if p.requires_grad]
    kept = [*model.buffers(), *(p for p in model.parameters() if not p.requires_grad)]  # Keras' statistics are these
    buffers = [] if mode == "eval" else [(b, b.detach().clone()) for b in kept]
    try:
        if mode != "keep":
            model.train(mode == "train")
        for p in learning:
            p.requires_grad_(False)
        with aligned_weights(model):
            yield Frozen(model)
    finally:
        for module, flag in flags:
            module.training = flag
        for p in learning:
            p.requires_grad_(True)
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor where its memory begins at a multiple of 64 bytes and has no gaps, as torch allocates it; else a copy.

    Matrix products on a CPU may sum in another order at another address, so a view of a batch, or numpy's memory,
    would give other last bits than the same numbers elsewhere.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return tensor
    dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    return tensor if dense and tensor.data_ptr() % 64 == 0 else tensor.clone()


@contextmanager
def aligned_weights(model: nn.Module) -> Iterator[None]:
    """For the body, weights and buffers in foreign memory (numpy's, a mapped file's) lie `aligned` in torch's own.

    Afterwards they lie where they did, with the values they have then. Those that share memory stay: they are tied.
    """
    with torch.inference_mode(False):  # what is made in inference mode cannot be attacked
        moved = _misplaced(model)
        for tensor, _, new in moved:
            tensor.data = new
    try:
        yield
    finally:
        with torch.inference_mode(False):
            for tensor, old, new in moved:
                if not torch.equal(old, new):  # the file behind the old memory may not be writable
                    old.copy_(new)
                tensor.data = old


def _misplaced(model: nn.Module) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Weights and buffers that are not aligned and share no memory, their memory, and an aligned copy."""
    found = (t for t in (*model.parameters(), *model.buffers()) if not is_lazy(t) and not t.is_inference())
    tensors = [t for t in found if type(t.data) is Tensor and t.device.type == "cpu" and t.layout == torch.strided]
    owners = Counter(t.untyped_storage().data_ptr() for t in tensors)
    alone = [(t, t.data) for t in tensors if owners[t.untyped_storage().data_ptr()] == 1]
    return [(t, old, new) for t, old in alone if (new := aligned(old)) is not old]


@contextmanager
def private_rng(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds the global generators for the body (stochastic models draw from them) and puts them back at the end."""
    check_seed(seed)
    saved = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        elif saved is not None:
            torch.mps.manual_seed(seed)
        try:
            yield
        finally:
            if saved is not None:
                torch.mps.set_rng_state(saved)
