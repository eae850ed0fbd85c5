"""`normalize=` as a key of any model: the normalisation that a bare network was trained with, put inside the model."""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparring.adapters.files import build_model, load_weights
from sparring.core.layers import Normalize
from sparring.core.registry import Builder, named, options_of, parse

NORMALISATIONS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "mnist": ((0.1307,), (0.3081,)),
}
"""Mean and standard deviation of each channel of images in [0, 1]. cifar10, mnist: over all pixels of the training
images (counted again on them, to these digits). imagenet: as torchvision's reference training has it. Some code for
CIFAR-10 has the deviation (0.2023, 0.1994, 0.2010), the mean over images of each one's own: write it as MEAN/STD."""


class Normalized(nn.Sequential):
    """A network behind a normalisation: inputs in [0, 1] go in, as radii need it. Both travel with the weights.

    >>> Normalized(Normalize(0.5, 0.25), nn.Identity())(torch.tensor([[1.0]]))
    tensor([[2.]])
    """

    def __init__(self, normalize: Normalize, network: nn.Module) -> None:
        super().__init__(OrderedDict(normalize=normalize, network=network))


def read_normalisation(text: str) -> Normalize:
    """The layer that `cifar10`, `imagenet`, `mnist` or MEAN/STD names; two dots stand between the numbers of channels.

    ValueError for anything else.

    >>> read_normalisation("0.5/0.25").std, read_normalisation("0.4..0.5..0.6/0.2").mean
    (tensor([0.2500]), tensor([0.4000, 0.5000, 0.6000]))
    """
    if text in NORMALISATIONS:
        return Normalize(*NORMALISATIONS[text])
    mean, _, std = text.partition("/")
    try:
        means, stds = (tuple(float(number) for number in side.split("..")) for side in (mean, std))
    except ValueError:
        means = stds = ()
    fits = means and all(map(math.isfinite, (*means, *stds))) and min(stds) > 0
    if not fits or (len(stds) not in (1, len(means)) and len(means) > 1):
        raise ValueError(
            f"normalize={text!r}: expected {', '.join(NORMALISATIONS)}, or MEAN/STD with a deviation above 0, such as "
            "0.5/0.25 or, for three channels, 0.49..0.48..0.45/0.25..0.24..0.26"
        )
    return Normalize(means, stds)


def build_normalized(text: str, models: Mapping[str, Builder], seed: int, given: Mapping[str, Any]) -> nn.Module:
    """`build_model`, with `normalize=` as a key of every model: `nets.py:make,normalize=cifar10`.

    A builder that takes a `normalize` itself gets the layer (or the text, where it takes a text); before the network of
    any other stands the layer, as `Normalized`. Raises what `build_model` does, and ValueError for numbers that do not
    fit the inputs.
    """
    spec = parse(text)
    asked = [value for key, value in spec.options if key == "normalize"]
    rest = spec._replace(options=tuple(pair for pair in spec.options if pair[0] != "normalize"))
    if not asked:
        return build_model(text, models, seed, given)
    if len(asked) > 1:
        raise ValueError(f"model {text!r} gives normalize twice")
    make = named(rest, models, "model", given=tuple(given))
    if "normalize" in options_of(make.builder, tuple(given)):
        return build_model(text, models, seed, given)
    layer = read_normalisation(asked[0])
    _fits(layer, given.get("shape"), f"model {text!r}")
    if not isinstance(make.builder, nn.Module) and "normalize" in inspect.signature(make.builder).parameters:
        make = replace(make, builder=partial(make.builder, normalize=layer))
        return build_model(make, models, seed, given)
    return Normalized(layer, build_model(make, models, seed, given))


def load_into(model: nn.Module, path: str | Path) -> nn.Module:
    """`load_weights`; behind `normalize=` the file may be of the bare network, or of a run that had the key, too.

    Raises what `load_weights` does, and ValueError where the file has another normalisation than was asked for.
    """
    if not isinstance(model, Normalized):
        return load_weights(model, path)
    layer, network = model
    try:
        load_weights(network, path)
    except ValueError as bare:
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        try:
            load_weights(model, path)
        except ValueError:
            raise bare from None
        for name, value in before.items():
            if not torch.equal(value, layer.state_dict()[name]):
                found = layer.state_dict()[name].tolist()
                raise ValueError(
                    f"weights {path} were trained with {name} {found} before the network, normalize= says "
                    f"{value.tolist()}: what they learned is true with theirs alone; name that"
                ) from None
    return model


def _fits(layer: Normalize, shape: Any, about: str) -> None:
    """Raises ValueError where the layer has numbers for other channels than the inputs have."""
    if isinstance(shape, Mapping):
        raise ValueError(f"{about}: normalize= is for inputs of one tensor; these are {', '.join(shape)}")
    num = max(len(value) for value in layer.state_dict().values())
    if shape and num not in (1, shape[0]):
        raise ValueError(f"{about}: normalize= has numbers for {num} channels, one input is {tuple(shape)}; one each")
