"""Tests of the tests: what a measure of images must say of noise, blur, half of the classes, copies, and real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparring.modalities import load_data
from sparring.modalities.images.generate import prepared
from sparring.quality.features import Extractor, extractor_of, learn_features
from sparring.quality.judge import judge_with_controls


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor, Tensor, Extractor]:
    """Training images with labels, test images, and the features that a run brings."""
    data = load_data("digits")
    x, x_test = prepared(data, data.x_train), prepared(data, data.x_test)
    return x, data.y_train, x_test, extractor_of(learn_features(x, data.y_train, 10), x_test, data.y_test)


def judged(fake: Tensor, digits: tuple[Tensor, Tensor, Tensor, Extractor]) -> dict[str, Any]:
    x, _, x_test, extractor = digits
    return judge_with_controls(fake, x, x_test, extractor, 10)


def test_each_control_is_told_from_real_images(digits: tuple[Tensor, Tensor, Tensor, Extractor]) -> None:
    x, y, _, extractor = digits
    found = judged(x[y < 5], digits)
    rows = found["rows"]
    assert extractor.accuracy is not None and extractor.accuracy > 0.95
    assert rows["floor"]["coverage"] > 0.93 and rows["floor"]["entropy"] > 0.95
    assert rows["noise"]["precision"] < 0.05 and rows["blurred"]["precision"] < 0.8
    assert rows["repeated"]["coverage"] < 0.4 and rows["repeated"]["nearest_ratio"] < 0.05
    assert rows["repeated"]["precision"] > 0.8  # which precision alone would let pass
    halved = rows["generated"]  # five of ten classes: real images, so precise, and half of it is missing
    assert halved["coverage"] < 0.6 and halved["precision"] > 0.8 and min(halved["class_shares"]) < 0.01
    assert halved["entropy"] < 0.8 and halved["fid"] > 5 * rows["floor"]["fid"]


def test_features_that_see_nothing_are_suspect_by_every_control(
    digits: tuple[Tensor, Tensor, Tensor, Extractor],
) -> None:
    x, _, x_test, _ = digits
    draw = torch.Generator().manual_seed(0)
    blind = Extractor("chance", lambda x: torch.randn(len(x), 3, generator=draw), None, "", None)
    found = judge_with_controls(x_test[:300], x, x_test, blind, 10)
    assert found["verdict"] == "SUSPECT" and [" ".join(s.split()[:2]) for s in found["findings"]] == [
        "uniform noise", "blurred images", "a few",
    ]  # fmt: skip
