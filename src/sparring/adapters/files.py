"""Networks from a user's own file, and weights from disk."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparring.adapters.black_box import BlackBox
from sparring.adapters.keras_models import KerasClassifier, is_keras
from sparring.core.registry import Builder, Named, named, parse
from sparring.core.unpacking import check_archive


def runs_a_file(text: str) -> bool:
    """Whether a text names FILE.py:FUNCTION, in quotes or not, so that building what it names runs that file.

    >>> [runs_a_file(text) for text in ("nets.py:make", '"my nets.py":make', "mlp", "linf:8/255")]
    [True, True, False, False]
    """
    return ".py:" in parse(text).name


def build_model(text: str | Named, models: Mapping[str, Builder], seed: int, given: Mapping[str, Any]) -> nn.Module:
    """The model that `NAME,KEY=VALUE...` or `FILE.py:FUNCTION,KEY=VALUE...` names, or its `Named` makes, with weights
    of that seed.

    A builder gets those of the values in `given` that it asks for by name (such as shape, num_classes). An estimator or
    a function that it returns becomes a `BlackBox`. A file's code is run: only name files you trust. The global
    generator stays as it was. Raises FileNotFoundError for a missing file, ValueError for an unknown name or a builder
    that fails, TypeError when neither comes back.
    """
    make = named(text, models, "model", given=tuple(given)) if isinstance(text, str) else text
    text = str(text)
    if isinstance(make.builder, nn.Module):
        kind = type(make.builder).__name__
        raise TypeError(f"model {text!r}: the instance is a {kind}; expected a function that returns the network")
    if given.get("num_classes", 2) < 2:
        raise ValueError(f"a classifier needs at least 2 classes, got {given['num_classes']}")
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        try:
            with chdir(Path.cwd()):
                model = make(*given.values())
        except (Exception, SystemExit) as error:
            if ".py:" not in make.name:
                raise
            raise ValueError(f"model {text!r} failed with {type(error).__name__}: {error}") from error
    if isinstance(model, nn.Module):
        return KerasClassifier(model) if is_keras(model) else model
    if isinstance(model, type) or not (callable(model) or hasattr(model, "predict")):
        raise TypeError(
            f"model {text!r} returned a {type(model).__name__}; expected a torch.nn.Module, an estimator with "
            "predict_proba, or a function from arrays to probabilities"
        )
    about = {name: given[name] for name in ("num_classes", "class_names") if name in given}
    try:
        return BlackBox(model, **about)
    except ValueError as error:
        raise ValueError(f"model {text!r}: {error}") from error


PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.")
"""What DataParallel, torch.compile and people's own wrappers put before every name."""
COUNTER = "num_batches_tracked"
"""BatchNorm's count of batches, which older files lack; it plays no part in evaluation."""


def load_weights(model: nn.Module, path: str | Path) -> nn.Module:
    """The same model, with the weights of a .safetensors file, or of a state dict that torch.save wrote.

    A state dict may lie under any key, beside other things (an optimizer, an accuracy, a second state dict of another
    shape), and all its names may begin with what wrappers put there (`module.`, `_orig_mod.`, `model.`). Where several
    fit, FILE:KEY says which. What torch loads strictly is taken. Nothing but tensors is ever unpickled. Raises
    FileNotFoundError, and ValueError where the file or its names do not fit; the model is then as it was.

    >>> import tempfile
    >>> net = nn.Linear(2, 3)
    >>> with tempfile.NamedTemporaryFile(suffix=".pt") as file:
    ...     torch.save({"net": {f"module.{k}": v for k, v in net.state_dict().items()}, "epoch": 3}, file.name)
    ...     _ = load_weights(nn.Linear(2, 3), file.name)
    """
    path, key = file_and_key(path)
    if not path.is_file():
        raise FileNotFoundError(f"weights: there is no file {path}")
    own, content = model.state_dict(), _read(path)
    found = {name: _unprefixed(weights, own) for name, weights in _state_dicts(content).items()}
    if key and key not in found:
        raise ValueError(f"weights {path} have no state dict under {key!r}; there are {', '.join(found) or 'none'}")
    found = {key: found[key]} if key else found
    if not found:
        held = list(content)[:5] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(f"weights {path} hold {held}; expected a state dict, alone or under a key of any name")
    told = {name: _differences(weights, own) for name, weights in found.items()}
    fitting = [name for name, differences in told.items() if not differences]
    if len(fitting) > 1:
        raise ValueError(
            f"weights {path} hold several state dicts that fit: {', '.join(fitting)}. Which one decides about the "
            f"result, so say it: {path}:{fitting[0]}"
        )
    if not fitting:
        nearest = min(told, key=lambda name: len(told[name]))
        where = f" (under {nearest!r})" if nearest else ""
        raise ValueError(
            f"weights {path}{where} do not fit the model: {told[nearest]}. Build the model that the file was saved from"
        )
    _load(model, found[fitting[0]], path)
    return model


def file_and_key(text: str | Path) -> tuple[Path, str]:
    """FILE and KEY of `FILE:KEY`, or the file and no key."""
    path, _, key = str(text).rpartition(":")
    return (Path(path), key) if Path(path).is_file() and not Path(text).exists() else (Path(text), "")


def _load(model: nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """torch's strict load, after which a model that refused is as it was."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:
        model.load_state_dict(before)
        raise ValueError(f"weights {path} do not fit the model: {error}") from None


def _read(path: Path) -> Any:
    """What a file holds, on the CPU: plain values and tensors."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        check_archive(path, str(path))
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # several libraries, several kinds
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"weights {path} cannot be read as plain tensors ({type(error).__name__}: {first_line}). Whole "
            "pickled models may run code when opened and are refused: save model.state_dict() instead"
        ) from error


def _state_dicts(content: Any, key: str = "") -> dict[str, Mapping[str, Tensor]]:
    """The mappings of names to tensors in what a file holds, by the keys that lead there."""
    if not isinstance(content, Mapping) or not content:
        return {}
    if all(isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()):
        return {key: content}
    found: dict[str, Mapping[str, Tensor]] = {}
    for name, value in content.items():
        found |= _state_dicts(value, f"{key}.{name}" if key else str(name))
    return found


def _unprefixed(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The weights without what stands before all their names and before no name of the model's."""
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights) and not all(name.startswith(prefix) for name in own):
            return _unprefixed({name.removeprefix(prefix): value for name, value in weights.items()}, own)
    return weights


def _differences(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """In what the weights and the model's differ, in words; "" where torch can load them."""
    both = [name for name in own if name in weights]
    differences = {
        "missing in the file": [n for n in own if n not in weights and n.rpartition(".")[2] != COUNTER],
        "unknown to the model": [n for n in weights if n not in own],
        "of another shape": [
            f"{n} {tuple(weights[n].shape)} in the file, {tuple(own[n].shape)} in the model"
            for n in both
            if weights[n].shape != own[n].shape and {weights[n].shape, own[n].shape} != {(), (1,)}  # which torch takes
        ],
        "of a type that is not floating point, as the model's is": [
            f"{n} {weights[n].dtype}"
            for n in both if own[n].is_floating_point() and not weights[n].is_floating_point()
        ],
    }  # fmt: skip
    return "; ".join(f"{len(found)} {what}: {_first(found)}" for what, found in differences.items() if found)


def _first(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
