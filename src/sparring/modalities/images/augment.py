"""Random crops and mirror images. Shapes: B batch, C H W one image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sparring.core.batches import Augment
from sparring.core.noise import Noise


def crop_and_flip(*, crop: int = 0, flip: bool = False) -> Augment | None:
    """Pads by `crop` black pixels and cuts at random, mirrors half of the images; None where neither is asked for."""
    if crop < 0:
        raise ValueError(f"crop must be at least 0 pixels; got {crop}")
    if not crop and not flip:
        return None

    def augment(x: Tensor, index: Tensor, epoch: int, seed: int) -> Tensor:
        """One gather: rows (B, H) and columns (B, W) of the padded image."""
        if x.ndim != 4:
            raise ValueError(f"crop={crop}, flip={flip} with inputs {tuple(x.shape[1:])}; they need images (C, H, W)")
        (num, _, height, width), device = x.shape, x.device
        noise = Noise.make(seed, f"crop and flip, epoch {epoch}", index)
        corner = (noise.uniform((2,)) * (2 * crop + 1)).long()
        rows = corner[:, :1] + torch.arange(height, device=device)
        columns = corner[:, 1:] + torch.arange(width, device=device)
        if flip:
            columns = torch.where(noise.uniform((1,), draw=1) < 0.5, columns.flip(1), columns)
        padded = F.pad(x, (crop,) * 4).movedim(1, 3)
        example = torch.arange(num, device=device)[:, None, None]
        cut = padded[example, rows[:, :, None], columns[:, None, :]].movedim(3, 1)
        return cut.contiguous(memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last)

    return augment
