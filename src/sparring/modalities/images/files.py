"""Adversarial images as PNG in exact 8 bits, read again from the files.

Shapes: N examples, C H W one image.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparring.core.files import write_atomically
from sparring.modalities.images.data import as_pixels, scale
from sparring.modalities.images.folders import decode_images
from sparring.threats import Ball, inside


def in_8_bits(x: Tensor, x_adv: Tensor, threat: Any) -> Tensor:
    """uint8 (N, C, H, W): the nearest picture; of a ball, where that leaves it, every value rounded towards x.

    >>> from sparring.threats import Linf
    >>> x = torch.tensor([[[[0.0, 1.0]]]])
    >>> in_8_bits(x, x + torch.tensor([0.0098, -0.0098]), Linf(0.0098)).tolist()  # 2.499 of 255
    [[[[2, 253]]]]
    """
    exact = 255 * x_adv.double()
    near = exact.round()
    if isinstance(threat, Ball):
        towards = torch.where(x_adv > x, (exact + 1e-3).floor(), (exact - 1e-3).ceil())
        leaves = ~inside(threat, x, (near / 255).to(x) - x)
        near[leaves] = towards[leaves]
    return near.to(torch.uint8)


def picture_grid(path: Path, x: Tensor, columns: int, gap: int = 1) -> None:
    """Writes images (N, C, H, W) in [0, 1], C 1 or 3, row by row as one PNG with mid-gray lines between them."""
    from matplotlib.image import imsave

    num, channels, height, width = x.shape
    rows = -(-num // columns)
    sheet = torch.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 0.5)
    for i, picture in enumerate(x):
        top, left = gap + i // columns * (height + gap), gap + i % columns * (width + gap)
        sheet[top : top + height, left : left + width] = picture.permute(1, 2, 0)
    pixels = (sheet.expand(-1, -1, 3) * 255).round().to(torch.uint8).numpy()
    meta = {"Software": ""}  # the default names the version of matplotlib
    write_atomically(path, functools.partial(imsave, arr=pixels, format="png", metadata=meta))


def write_pngs(folder: Path, x: Tensor, x_adv: Tensor, names: Sequence[str], threat: Any) -> Tensor:
    """x_adv (N, C, H, W) in [0, 1] as folder/NAME.png; returns what these files hold, read again, float32 in [0, 1].

    ValueError for inputs that are no gray or colour images in [0, 1].
    """
    if x_adv.ndim != 4 or x_adv.shape[1] not in (1, 3):
        raise ValueError(f"inputs {tuple(x_adv.shape[1:])} are no images with 1 or 3 channels; the .npz holds them")
    if len(x_adv) and not 0 <= float(x_adv.min()) <= float(x_adv.max()) <= 1:
        got = f"values from {float(x_adv.min()):.4g} to {float(x_adv.max()):.4g}"
        raise ValueError(f"{got} have no 8 bits; expected [0, 1], 1 being the brightest. The .npz holds them exactly")
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in names]
    for path, pixels in zip(paths, in_8_bits(x, x_adv, threat).permute(0, 2, 3, 1).numpy(), strict=True):
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        write_atomically(path, functools.partial(picture.save, format="PNG"))
    if not paths:
        return torch.empty_like(x_adv, dtype=torch.float32)
    raw = [path.read_bytes() for path in paths]
    return scale(as_pixels(decode_images(raw, folder), "pictures", str(folder)))
