"""Averaging of weights over the run."""

from __future__ import annotations

from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


def averaged_copy(model: nn.Module, decay: float) -> AveragedModel:
    """An exponential moving average of the model; call `.update_parameters(model)` after each step.

    decay_n = min(decay, (1 + n) / (10 + n)) after n updates, so that the start is soon forgotten. BatchNorm's running
    statistics are averaged like the weights: the average has statistics of its own. Source: Gowal 2020, section 4.3
    (0.995 with a ramp); their code copies BatchNorm's statistics from the live weights, which we do not follow.
    """
    if not 0 < decay < 1:
        raise ValueError(f"averaging decay must be in (0, 1), usually 0.99 to 0.9999; got {decay}")

    def average(old: Tensor, new: Tensor, num: Tensor | int) -> Tensor:
        if not old.is_floating_point():  # BatchNorm's count of batches
            return new
        return old.lerp(new, 1 - min(decay, (1 + int(num)) / (10 + int(num))))

    return AveragedModel(model, avg_fn=average, use_buffers=True)
