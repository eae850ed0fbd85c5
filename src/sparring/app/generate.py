"""Images of a trained generator as a file, and the quality of anybody's images beside real ones."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparring.app import train_run as runs
from sparring.app.extra import channels_first, read_examples
from sparring.core.files import write_atomically, write_json
from sparring.core.noise import Noise
from sparring.core.registry import function_from_file
from sparring.core.types import logits_of
from sparring.modalities import find_data
from sparring.modalities.base import Dataset
from sparring.quality.features import Extractor, extractor_of, kept_features
from sparring.quality.judge import judge_with_controls
from sparring.report.generated import write_quality_page
from sparring.training.gan import Pair, sample_images


class Drawn(NamedTuple):
    """Images (N, C, H, W) in [0, 1], the labels that they were made for (N,) or None, and where they come from."""

    x: Tensor
    y: Tensor | None
    origin: dict[str, Any]


def draw_images(run: Path, num: int, *, per_class: bool = False, which: str = "best", seed: int = 0) -> Drawn:
    """`num` images of the generator of a run, of its classes in turn; per_class: so many of each. ValueError where
    the run has no generator."""
    settings = runs.read_config(run)
    pair = runs.load(run, which) if settings.threat == "none" else None
    if not isinstance(pair, Pair):
        raise ValueError(f"{run} holds no generator: it was trained by {settings.recipe}; one comes from --recipe gan")
    classes = pair.g.num_classes
    if per_class and not classes:
        raise ValueError(f"{run} knows no classes (conditional=false), so there is no --per-class; take -n")
    count = num * classes if per_class else num
    y = torch.arange(count) % max(1, classes)
    x = sample_images(pair, y, Noise.make(seed, "sample", torch.arange(count)))
    digest = hashlib.sha256((run / f"{which}.safetensors").read_bytes()).hexdigest()
    origin = {"run": run.resolve().name, "recipe": settings.recipe, "data": settings.data, "checkpoint": which}
    return Drawn(x, y if classes else None, {**origin, "weights_sha256": digest, "seed": seed, "labels": "condition"})


def soft_labels(drawn: Drawn, classifier: Path) -> tuple[Tensor, str]:
    """Probabilities (N, K) of the classifier of a run folder, and the hash of its weights."""
    model = runs.load(classifier)
    if isinstance(model, Pair):
        raise ValueError(f"--labels {classifier} holds a generator; expected the run folder of a classifier")
    with torch.no_grad():
        rows = [logits_of(model(part)).softmax(1) for part in drawn.x.split(500)]
    return torch.cat(rows), hashlib.sha256((classifier / "best.safetensors").read_bytes()).hexdigest()


def write_sample(drawn: Drawn, out: Path, labels: Path | None) -> str:
    """Writes x uint8 (N, C, H, W), y (int64 (N,), or probabilities) where there are labels, and `provenance`, a string
    of JSON. Returns a line on it."""
    arrays: dict[str, np.ndarray] = {"x": (drawn.x * 255).round().to(torch.uint8).numpy()}
    origin, told = drawn.origin, "labels are the condition that each was made for"
    if labels:
        soft, digest = soft_labels(drawn, labels)
        arrays["y"] = soft.numpy()
        origin = {**origin, "labels": labels.resolve().name, "labels_sha256": digest}
        told = f"labels are the probabilities of {labels}"
    elif drawn.y is not None:
        arrays["y"] = drawn.y.numpy()
    else:
        origin, told = {**origin, "labels": None}, "without labels: training refuses them; --labels RUN gives some"
    arrays["provenance"] = np.array(json.dumps(origin))
    write_atomically(out, functools.partial(np.savez_compressed, **arrays))  # type: ignore[arg-type]
    return f"{out}: {len(drawn.x)} images; {told}"


def judge_quality(
    real: str, fake: Path, out: Path, *, num: int = 3000, features: str | None = None, seed: int = 0
) -> dict[str, Any]:
    """The quality of images (a run's generator, or an .npz with x) beside the test images of a data set, with controls.

    Writes quality.json, closest.png and report.html to `out`, and returns the content of the first. features:
    FILE.py:FUNCTION, images (B, C, H, W) -> (B, F), in place of a classifier that is trained on the training images;
    a run brings its own. ValueError, FileNotFoundError for what cannot be judged.
    """
    data, modality, _ = find_data(real)
    if "prepared" not in modality.tools:
        raise ValueError(f"{real}: quality is measured of images, and this kind of input is {modality.name}")
    prepared, picture_grid = modality.tools["prepared"], modality.tools["picture_grid"]
    x_train, x_test = prepared(data, data.x_train), prepared(data, data.x_test)
    is_run = fake.is_dir()
    images, origin = _fakes(fake, data, min(num, len(x_test)), seed)
    if features:
        extractor = _own_extractor(features)
    else:
        same = is_run and runs.read_config(fake).data == real and (fake / "features.safetensors").exists()
        path = (fake if same else out) / "features.safetensors"
        net = kept_features(path, x_train, data.y_train, data.num_classes, seed=seed)
        extractor = extractor_of(net, x_test, data.y_test)
    found = judge_with_controls(images, x_train, x_test, extractor, data.num_classes, seed=seed)
    closest = found.pop("closest")
    picture_grid(out / "closest.png", torch.cat([closest["generated"], closest["training"]]), len(closest["training"]))
    picture_grid(out / "samples.png", images[:100], 10)
    named = {"schema": "sparring.quality/1", "real": data.name, "fake": fake.name, "origin": origin}
    found = {**named, "class_names": list(data.class_names), **found}
    write_json(out / "quality.json", found)
    write_quality_page(out, fake if is_run else None)
    return found


def _fakes(fake: Path, data: Dataset, num: int, seed: int) -> tuple[Tensor, Any]:
    """Images in [0, 1] of the shape of the real ones, and where they come from as far as it is told."""
    shape = tuple(data.shape)
    if fake.is_dir():
        drawn = draw_images(fake, num, seed=seed)
        if drawn.x.shape[1:] != shape:
            raise ValueError(f"{fake} makes images {tuple(drawn.x.shape[1:])}; those of {data.name} are {shape}")
        return drawn.x, drawn.origin
    if not fake.is_file():
        raise FileNotFoundError(f"{fake} is neither a run folder nor an .npz file with an array x")
    arrays, told = read_examples(fake)
    x = channels_first(arrays["x"], shape)
    if x.shape[1:] != shape or not (x.dtype == np.uint8 or x.dtype.kind == "f") or not len(x):
        raise ValueError(
            f"{fake}: x is {x.dtype} {x.shape}; expected images, uint8 or floats in [0, 1]; those of {data.name} are "
            f"{shape}"
        )
    images = torch.from_numpy(np.ascontiguousarray(x)).float() / (255 if x.dtype == np.uint8 else 1)
    if not (images.isfinite().all() and 0 <= float(images.min()) <= float(images.max()) <= 1):
        raise ValueError(f"{fake}: x holds values outside [0, 1]; FID would measure the scale. Bring them to [0, 1]")
    return images, told


def _own_extractor(text: str) -> Extractor:
    """The user's function, on whose quality nothing is known here."""
    embed = function_from_file(text, "features")
    digest = hashlib.sha256(Path(text.rpartition(":")[0]).expanduser().read_bytes()).hexdigest()
    return Extractor(text, embed, None, digest, None)
