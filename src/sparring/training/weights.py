"""Averaging of weights over the run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged_copy(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the model; call `.update_parameters(model)` after each step.

    decay_n = min(decay, (1 + n) / (10 + n)) after n updates (the first update copies), so that the start is soon
    forgotten. BatchNorm's running statistics are averaged like the weights: they are the average's own. Source: Gowal
    2020 (model weight averaging); the code of Wang 2023 (0.995 with a ramp) copies the live statistics instead.
    """
    if not 0 < decay < 1:
        raise ValueError(f"averaging decay must be in (0, 1), usually 0.99 to 0.9999; got {decay}")

    @torch.no_grad()
    def average(old: Any, new: Any, num: Tensor | int) -> None:
        if old[0].is_floating_point():
            torch._foreach_lerp_(old, new, 1 - min(decay, (1 + int(num)) / (10 + int(num))))
        else:  # BatchNorm's count of batches
            torch._foreach_copy_(old, new)

    return AveragedModel(model, multi_avg_fn=average, use_buffers=True)
