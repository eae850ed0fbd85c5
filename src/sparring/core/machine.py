"""Where the work is done: the device, the memory layout, and which of several processes this one is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Machine:
    """A device, and this process among those that share the work: number `rank` of `world`.

    channels_last: images (B, C, H, W) and convolutions lie channel by channel last, which many GPUs are faster with.
    bf16, folded, compiled, threads (None: as they are): how `train` computes the model within a step, see `AtSpeed`;
    `find_speed` measures what pays. Everything else is computed as the model was built.

    >>> Machine(torch.device("cpu"), rank=1, world=3).mine(4)
    True
    """

    device: torch.device
    rank: int = 0
    world: int = 1
    channels_last: bool = False
    bf16: bool = False
    folded: bool = False
    compiled: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world:
            raise ValueError(f"process {self.rank} of {self.world}; expected a rank from 0 to world - 1")

    def place(self, value: Any) -> Any:
        """Tensors and named tensors on the device, in its layout; a module is moved itself; anything else as it is."""
        if isinstance(value, Mapping):
            return {name: self.place(inner) for name, inner in value.items()}
        layout: dict[str, Any] = {"memory_format": torch.channels_last} if self.channels_last else {}
        if isinstance(value, Tensor):
            return value.to(self.device, **(layout if value.ndim == 4 else {}))
        return value.to(self.device, **layout) if isinstance(value, nn.Module) else value

    def mine(self, number: int) -> bool:
        """Whether this process does the piece of work with that number."""
        return number % self.world == self.rank

    def rows(self, num: int) -> slice:
        """This process's part of a batch of `num` examples, in one piece; ValueError where some process would get none.

        >>> Machine(torch.device("cpu"), rank=1, world=3).rows(8)
        slice(2, 5, None)
        """
        if num < self.world:
            raise ValueError(f"a batch of {num} cannot be shared by {self.world} processes; take a larger batch size")
        return slice(num * self.rank // self.world, num * (self.rank + 1) // self.world)

    def mean(self, tensors: Sequence[Tensor], share: float) -> None:
        """Puts into each tensor, on every process, the sum over the processes of `share` times theirs; shares sum to 1.

        One exchange for each dtype and device. All processes end with the same bits.
        """
        if self.world == 1:
            return
        kinds: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for group in kinds.values():
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in group]) * share
            self._exchange(dist.all_reduce, flat)
            for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
                tensor.detach().copy_(part.view(tensor.shape))

    def from_first(self, tensors: Sequence[Tensor]) -> None:
        """Puts those of process 0 into each tensor, on every process."""
        for tensor in tensors if self.world > 1 else ():
            self._exchange(lambda t: dist.broadcast(t, 0), tensor.detach())

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank; returns when all of them have come here. [value] for one that is alone.

        Raises ValueError where torch.distributed was not initialised with `world` processes, RuntimeError when one of
        them ends before it comes.
        """
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        self._exchange(lambda given: dist.all_gather_object(found, given), value)
        return found

    def _exchange(self, how: Callable[[Any], Any], value: Any) -> None:
        if (there := _joined_now()[1]) != self.world:
            raise ValueError(
                f"process {self.rank} of {self.world} with torch.distributed joining {there}: they wait for one "
                f"another, so it must join all of them: torchrun --nproc-per-node {self.world}"
            )
        try:
            how(value)
        except RuntimeError as error:
            first_line = str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"process {self.rank} of {self.world} waited for the others, but one of them ended or did not answer "
                f"({first_line}). What is on disk stays: start all processes again and they go on"
            ) from error


ONE_PROCESS = Machine(torch.device("cpu"))
"""One process that shares its work with none."""


def find_machine(device: str = "auto", channels_last: bool | None = None) -> Machine:
    """This process on that device: `auto` (the fastest there is), `cpu`, `cuda`, `cuda:1` or `mps`.

    Under torchrun each process takes a GPU of its own (LOCAL_RANK). channels_last: by default on CUDA devices.
    Raises ValueError for a device that is not there.

    >>> find_machine("cpu").device
    device(type='cpu')
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(d for d in there if there[d]) if device == "auto" else device
    kind, _, index = name.partition(":")
    if not there.get(kind) or (index and not (index.isdigit() and int(index) < torch.accelerator.device_count())):
        known = ", ".join(d for d in there if there[d])
        raise ValueError(f"device {device!r} is not available here; there is {known}")
    local = os.environ.get("LOCAL_RANK")
    if name == "cuda" and local is not None:
        name = f"cuda:{int(local) % torch.cuda.device_count()}"
    rank, world = _joined_now()
    return Machine(torch.device(name), rank, world, kind == "cuda" if channels_last is None else channels_last)


@contextmanager
def joined() -> Iterator[Machine]:
    """Joins the processes that torchrun started (RANK, WORLD_SIZE above 1); yields this one, alone where there is none.

    A process that ends is noticed by the others at once. One that only works longer is waited for, up to a day.
    """
    cpu = torch.device("cpu")
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) < 2:  # some schedulers set the size alone
        yield Machine(cpu)
        return
    if not dist.is_available():
        raise ValueError("this PyTorch has no torch.distributed; run one process (unset WORLD_SIZE)")
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=1))
    try:
        yield Machine(cpu, *_joined_now())
    finally:
        dist.destroy_process_group()


def _joined_now() -> tuple[int, int]:
    """The number of this process and how many there are."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)
