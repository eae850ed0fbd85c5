"""Cat, deer and dog of CIFAR-10 as an .npz file: python benchmarks/three_classes.py FILE"""

from __future__ import annotations

import sys

import numpy as np
import torch

from sparring.modalities import load_data

CLASSES = (3, 4, 5)


def main(path: str) -> None:
    data, arrays = load_data("cifar10"), {}
    for split in ("train", "test"):
        x, y = getattr(data, f"x_{split}"), getattr(data, f"y_{split}")
        wanted = torch.isin(y, torch.tensor(CLASSES))
        arrays[f"x_{split}"] = x[wanted].permute(0, 2, 3, 1).numpy()
        arrays[f"y_{split}"] = np.searchsorted(CLASSES, y[wanted].numpy())
    np.savez(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1])
