"""Networks from a user's own file, and weights from disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparring.core.registry import Builder, named, parse


def runs_a_file(text: str) -> bool:
    """Whether a text names FILE.py:FUNCTION, in quotes or not, so that building what it names runs that file.

    >>> [runs_a_file(text) for text in ("nets.py:make", '"my nets.py":make', "mlp", "linf:8/255")]
    [True, True, False, False]
    """
    return ".py:" in parse(text).name


def build_model(text: str, models: Mapping[str, Builder], seed: int, given: Mapping[str, Any]) -> nn.Module:
    """The network that `NAME,KEY=VALUE...` or `FILE.py:FUNCTION,KEY=VALUE...` names, with weights of that seed.

    A builder gets those of the values in `given` that it asks for by name (such as shape, num_classes). A file's code
    is run: only name files you trust. The global generator stays as it was. Raises FileNotFoundError for a missing
    file, ValueError for an unknown name or a builder that fails, TypeError when no nn.Module comes back.
    """
    make = named(text, models, "model", given=tuple(given))
    if isinstance(make.builder, nn.Module):
        kind = type(make.builder).__name__
        raise TypeError(f"model {text!r}: the instance is a {kind}; expected a function that returns the network")
    if given.get("num_classes", 2) < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {given['num_classes']}")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        try:
            model = make(*given.values())
        except Exception as error:
            if ".py:" not in make.name:
                raise
            raise ValueError(f"model {text!r} failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"model {text!r} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """The same model, with the weights of a .safetensors file, or of a state dict that torch.save wrote.

    A state dict may lie under the key "state_dict" or "model", and all its names may begin with "module.".
    Nothing but tensors is ever unpickled. Raises FileNotFoundError, and ValueError where the file or its
    names do not fit; the model is then as it was.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}")
    weights = _read(path)
    own = model.state_dict()
    if all(name.startswith("module.") for name in weights) and not all(n.startswith("module.") for n in own):
        weights = {name.removeprefix("module."): value for name, value in weights.items()}
    differences = {
        "missing in the file": [name for name in own if name not in weights],
        "unknown to the model": [name for name in weights if name not in own],
        "of another shape": [
            f"{name} {tuple(weights[name].shape)} in the file, {tuple(own[name].shape)} in the model"
            for name in own if name in weights and weights[name].shape != own[name].shape
        ],
    }  # fmt: skip
    found = [
        f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in differences.items() if names
    ]  # fmt: skip
    if found:
        raise ValueError(f"weights {path} do not fit the model: {'; '.join(found)}. "
                         "Build the model that the file was saved from")  # fmt: skip
    model.load_state_dict(weights)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, on the CPU."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # several libraries, several kinds
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"weights {path} cannot be read as plain tensors ({type(error).__name__}: {first_line}). Whole "
            "pickled models may run code when opened and are refused: save model.state_dict() instead"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        held = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"weights {path} hold {held}; expected a state dict, or one under 'state_dict' or 'model'")
    return dict(content)
