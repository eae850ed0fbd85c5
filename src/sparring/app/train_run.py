"""Run folders: training into one, resuming it to the same bits, and loading what it made.

A folder holds config.json (the settings and the data's shape), checkpoint.pt (everything needed to go on),
metrics.jsonl (a line per epoch), training.json (how it ended), and best / last / averaged.safetensors: plain state
dicts, usable without Sparring.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

from sparring.adapters.files import build_model, load_weights
from sparring.app.settings import Experiment
from sparring.attacks.catalogue import pgd
from sparring.core.batches import Batches, hold_out
from sparring.core.files import read_json, write_atomically, write_json, write_text
from sparring.core.machine import find_machine
from sparring.core.types import take
from sparring.evaluation.measure import measure
from sparring.evaluation.preflight import preflight
from sparring.modalities import find
from sparring.modalities import load as load_data
from sparring.modalities.base import Dataset
from sparring.threats import make_threat
from sparring.training.loop import TrainingResult, TrainingState, Weights, train
from sparring.training.schedules import SCHEDULES, Ramp, Ramped

VALIDATION_ATTACK = (partial(pgd, num_steps=10, step=0.25),)
SECONDS_BETWEEN_CHECKPOINTS = 30.0

Observe = Callable[[TrainingState], bool | None]


def start_run(experiment: Experiment, out: Path, *, observe: Observe | None = None) -> TrainingResult:
    """Trains into the folder `out`, which must not hold a run yet. Raises ValueError, OSError."""
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run; go on with it by --resume, or choose another folder")
    data = load_data(experiment.data)
    experiment = experiment.completed(find(data.kind).presets(data))
    model = _model(experiment, data.shape, data.num_classes)
    config = {
        "experiment": dataclasses.asdict(experiment),
        "shape": list(data.shape),
        "num_classes": data.num_classes,
        "class_names": list(data.class_names),
    }
    existed = out.exists()
    write_json(out / "config.json", config)
    try:
        return _run(experiment, data, model, out, None, observe)
    except Exception:
        if not (out / "checkpoint.pt").exists():  # nothing was learned: the folder is left as it was found
            (out / "config.json").unlink()
            if not existed:
                with suppress(OSError):
                    out.rmdir()
        raise


def resume_run(out: Path, *, model: str | None = None, observe: Observe | None = None) -> TrainingResult:
    """Goes on with the run in `out` where its last checkpoint is; from the start when it has none.

    A run of a network from a file needs `model` once more, see `load`.
    """
    experiment = read_config(out)
    _trusted(experiment, model, out)
    data = load_data(experiment.data)
    state = _read_state(out / "checkpoint.pt")
    start = dataclasses.replace(experiment, weights=None) if state else experiment  # the checkpoint has newer ones
    network = _model(start, data.shape, data.num_classes)
    return _run(experiment, data, network, out, state, observe)


def read_config(run: Path) -> Experiment:
    """The settings of a run folder."""
    try:
        return Experiment(**_config(run)["experiment"])
    except TypeError as error:
        raise ValueError(
            f"{run / 'config.json'} holds settings of another version of Sparring ({error}); train again"
        ) from None


def load(run: str | Path, which: str = "best", *, model: str | None = None) -> nn.Module:
    """The trained model of a run folder, in eval mode on the CPU; `which` is best, last or averaged.

    A network of the user's own comes from a Python file, and building it runs that file. A folder from somebody else
    must not decide that, so `model="file.py:function"` has to be given for it. Raises ValueError without it, and
    when the folder holds no such weights.
    """
    run = Path(run)
    config, weights = _config(run), run / f"{which}.safetensors"
    if not weights.exists():
        there = sorted(p.stem for p in run.glob("*.safetensors"))
        raise ValueError(
            f"{run} has no {which}.safetensors; it has {', '.join(there) or 'no weights yet: train first'}"
        )
    experiment = read_config(run)
    _trusted(experiment, model, run)
    experiment = dataclasses.replace(experiment, weights=None, model=model or experiment.model)
    network = _model(experiment, tuple(config["shape"]), config["num_classes"])
    load_weights(network, weights)
    return network.eval()


def training_record(run: Path, which: str) -> dict[str, Any]:
    """What results.json tells about the training of a run."""
    record = read_json(run / "training.json", "how the training ended")
    lines = run / "metrics.jsonl"
    try:
        history = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{lines} should hold a line for each epoch, but one is not valid JSON ({error})") from None
    return {**record, "checkpoint": which, "config": _config(run)["experiment"], "history": history}


def _config(run: Path) -> dict[str, Any]:
    if not (run / "config.json").exists():
        raise ValueError(f"{run} is no run folder: it has no config.json; make one with sparring train --out {run}")
    config = read_json(run / "config.json", "the settings of a run")
    if not isinstance(config, dict) or not {"experiment", "shape", "num_classes"} <= set(config):
        raise ValueError(f"{run / 'config.json'} should hold experiment, shape and num_classes of a run; train again")
    return config


def _read_state(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint; None when there is none yet. Runs no code from it."""
    if not path.exists():
        return None
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # several libraries, several kinds
        state = type(error).__name__
    if not isinstance(state, dict) or not set(state) >= TrainingState.KEYS:
        held = state if isinstance(state, str) else type(state).__name__
        raise ValueError(f"{path} is no checkpoint of a run ({held}); delete it, and --resume begins anew")
    return state


def _trusted(experiment: Experiment, model: str | None, run: Path) -> None:
    """Raises ValueError when the folder alone would decide which Python file is run."""
    if model is None and ":" in str(experiment.model):
        raise ValueError(
            f"the network of {run} is built by {experiment.model}; loading it runs that file. If you trust "
            f"it, name it: --model {experiment.model} (in Python: model=...)"
        )


def _model(experiment: Experiment, shape: tuple[int, ...], num_classes: int) -> nn.Module:
    assert experiment.model is not None
    given = {"shape": shape, "num_classes": num_classes}
    model = build_model(experiment.model, find("images").models, experiment.seed, given)
    if experiment.weights:
        load_weights(model, Path(experiment.weights))
    return model


def _run(
    experiment: Experiment,
    data: Dataset,
    model: nn.Module,
    out: Path,
    state: dict[str, Any] | None,
    observe: Observe | None,
) -> TrainingResult:
    e, machine = experiment, find_machine(experiment.device)
    device = machine.device
    model.to(device)
    num_held = min(e.held_out, max(len(data.y_train) // 10, data.num_classes))
    keep, held = hold_out(data.y_train, num_held / len(data.y_train), seed=e.seed)
    x, y = machine.place(data.x_train), machine.place(data.y_train)
    augment = find(data.kind).augment
    assert e.epochs is not None and e.batch_size is not None and e.radius_ramp is not None and e.schedule is not None
    batches = Batches(
        take(x, keep), y[keep], e.batch_size, seed=e.seed, shuffle=True, drop_last=len(keep) >= e.batch_size,
        prepare=data.prepare, augment=augment(crop=e.crop or 0, flip=bool(e.flip)) if augment else None,
    )  # fmt: skip
    validation = Batches(take(x, held), y[held], 500, prepare=data.prepare)
    threat = make_threat(e.threat)
    found = {finding.name for finding in preflight(model, *next(iter(validation)), threat).findings}
    if "probabilities" in found:
        raise ValueError("the model returns probabilities; training needs logits: leave out its softmax")
    if "one_logit" in found:
        raise ValueError("the model returns one logit s for each input; training needs two: torch.stack([0 * s, s], 1)")

    def validate(candidate: Any) -> dict[str, float]:
        found = measure(candidate, validation, threat, VALIDATION_ATTACK, seed=e.seed, curve=())
        return {"clean_accuracy": found.clean.value, "robust_accuracy": found.robust.value, "examples": found.robust.n}

    saved = time.monotonic()

    def watch(now: TrainingState) -> bool | None:
        nonlocal saved
        stop = observe(now) if observe else None
        if stop or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            _save_state(out, now)
            saved = time.monotonic()
        return stop

    recipe: Any = e.build_recipe()
    if hasattr(recipe, "attack"):
        recipe = Ramped(recipe, Ramp(e.radius_ramp))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(e.seed)
        result = train(
            model, batches, recipe, _optimizer(e, model), num_epochs=e.epochs, validate=validate,
            score="clean_accuracy" if e.recipe == "standard" else "robust_accuracy", schedule=SCHEDULES[e.schedule],
            averaging=e.averaging, seed=e.seed, resume=state,
            save=lambda now: _save_epoch(out, now), observe=watch,
        )  # fmt: skip
    _finish(out, e, result)
    return result


def _optimizer(experiment: Experiment, model: nn.Module) -> torch.optim.Optimizer:
    assert experiment.learning_rate is not None and experiment.weight_decay is not None
    rate, decay = experiment.learning_rate, experiment.weight_decay
    if experiment.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=decay)
    return torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)


def _save_state(out: Path, state: TrainingState) -> None:
    write_atomically(out / "checkpoint.pt", lambda stream: torch.save(state.to_dict(), stream))


def _save_epoch(out: Path, state: TrainingState) -> None:
    """After an epoch: the checkpoint, the history, and the weights so far."""
    _save_state(out, state)
    _save_history(out, state.history)
    if state.best_epoch == state.epoch - 1:
        _save_weights(out / "best.safetensors", state.best)
    _save_weights(out / "last.safetensors", state.model.state_dict())


def _save_history(out: Path, history: list[dict[str, float]]) -> None:
    write_text(out / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def _save_weights(path: Path, weights: Weights) -> None:
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write_atomically(path, lambda stream: stream.write(to_safetensors(plain)))


def _finish(out: Path, experiment: Experiment, result: TrainingResult) -> None:
    """How the run ended, and all its weights."""
    _save_history(out, result.history)
    for name in ("best", "last", "averaged"):
        weights = getattr(result, name)
        if weights is not None:
            _save_weights(out / f"{name}.safetensors", weights)
    by_epoch = {int(line["epoch"]): line for line in result.history}
    write_json(
        out / "training.json",
        {
            "recipe": experiment.recipe,
            "recipe_settings": experiment.recipe_options,
            "epochs": experiment.epochs,
            "seconds": round(result.seconds, 3),
            "best_epoch": result.best_epoch,
            "best": by_epoch.get(result.best_epoch),
            "last": result.history[-1] if result.history else None,
            "stopped": result.stopped,
        },
    )
