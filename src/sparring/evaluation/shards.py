"""Several processes that share one evaluation, batch by batch; each writes its parts, and all of them read them all.

Only a few bytes go between the processes (torch.distributed with gloo, also where the model is on a GPU); the parts go
through a folder on a file system that all of them share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sparring.evaluation.shelf import OtherSettings, Shelf

PATIENCE = 1800.0
"""Seconds that a process waits for the others at least; it waits as long as its own work took when that is longer."""


@dataclass(frozen=True)
class Crew:
    """The processes of one evaluation, seen from the one with number `rank` of `world`; `group` is None when alone."""

    rank: int = 0
    world: int = 1
    group: Any = None

    def mine(self, number: int) -> bool:
        """Whether this process computes that batch."""
        return number % self.world == self.rank

    def agree(self, shelf: Shelf) -> None:
        """Raises OtherSettings where parts of other settings are in the way, ValueError where the processes differ."""
        other: OtherSettings | None = None
        try:
            if self.rank == 0:
                shelf.check()
        except OtherSettings as error:
            other = error
        if self.group is not None:
            text = json.dumps(shelf.settings, sort_keys=True)
            own = torch.tensor([*hashlib.sha256(text.encode()).digest(), int(other is not None)], dtype=torch.uint8)
            told = [torch.empty_like(own) for _ in range(self.world)]
            self._together(lambda: dist.all_gather(told, own, group=self.group), "at the start")
            differ = [rank for rank in range(self.world) if not torch.equal(told[rank][:-1], own[:-1])]
            if differ:
                raise ValueError(
                    f"process {differ[0]} evaluates something else than process {self.rank}; all of them need the same "
                    "model and weights, threat, attacks, seed and options, or the parts would not fit together"
                )
            if bool(told[0][-1]) and other is None:
                raise OtherSettings(f"{shelf.folder} holds parts of an evaluation with other settings")
        if other is not None:
            raise other

    def wait(self, seconds: float) -> None:
        """Returns when every process is here; RuntimeError when one of them does not come. seconds: own work so far."""
        if self.group is not None:
            limit = timedelta(seconds=max(PATIENCE, seconds))
            self._together(lambda: dist.monitored_barrier(self.group, timeout=limit), "for the others")

    def _together(self, action: Any, when: str) -> None:
        try:
            action()
        except RuntimeError as error:
            first_line = str(error).strip().partition("\n")[0]
            raise RuntimeError(
                f"process {self.rank} of {self.world} waited {when}, but one of them ended or did not answer "
                f"({first_line}). The finished batches are kept: start all processes again and they go on"
            ) from error


@contextmanager
def joined(shard: tuple[int, int], shelf: Shelf | None) -> Iterator[Crew]:
    """The processes of an evaluation, agreed about what they do. Raises ValueError for a shard that cannot be."""
    running = dist.is_available() and dist.is_initialized()
    rank, world = shard
    if world > 1 and shelf is None:
        raise ValueError("a shared evaluation needs `keep`, a folder that all processes see: its parts meet there")
    if world > 1 and not (running and dist.get_world_size() == world):
        there = f"a group of {dist.get_world_size()}" if running else "no process group"
        raise ValueError(
            f"process {rank} of {world} with {there}: the processes wait for one another, so torch.distributed "
            f"must be initialised with all {world}, such as by torchrun --nproc-per-node {world}"
        )
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=PATIENCE)) if world > 1 else None
    crew = Crew(rank, world, group)
    try:
        if shelf:
            crew.agree(shelf)
        yield crew
    finally:
        if group is not None:  # closed on errors too, so that the others hear of it at once
            dist.destroy_process_group(group)
