"""Is a training step still sound?"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def trouble(model: nn.Module, loss: Tensor, epoch: int, step: int) -> str | None:
    """None after a sound backward pass, else a sentence that says what broke and what to try."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads).item() if grads else 0.0
    if math.isfinite(loss.item()) and math.isfinite(norm):
        return None
    what = f"the loss is {loss.item()}" if not math.isfinite(loss.item()) else f"the gradient's norm is {norm}"
    return (
        f"Training stopped in epoch {epoch + 1}, step {step + 1}: {what}. The last good weights are kept. "
        "Try a smaller learning rate, a radius schedule that starts smaller, or float32 instead of less."
    )
