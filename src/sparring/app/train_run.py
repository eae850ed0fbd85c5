"""Run folders: training into one, resuming it to the same bits, and loading what it made.

A folder holds config.json (the settings and what the data told the network), checkpoint.pt (everything needed to go
on), metrics.jsonl (a line per epoch), training.json (how it ended), and best / last / averaged.safetensors: plain state
dicts, usable without Sparring.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.torch import save as to_safetensors
from torch import nn

from sparring.adapters.files import load_weights, runs_a_file
from sparring.app.settings import GENERAL, TrainingSettings
from sparring.app.tasks import LoopParts, kept_task, task_of
from sparring.app.train_parts import Job, make_batches, make_parts, prepare
from sparring.core.files import read_json, sole_writer, write_atomically, write_json, write_text
from sparring.core.machine import Machine, find_machine
from sparring.core.registry import options_of, parse, text_of
from sparring.core.types import take
from sparring.core.unpacking import check_archive
from sparring.modalities import find, find_data, kind_of
from sparring.training.loop import TrainingResult, train
from sparring.training.schedules import SCHEDULES
from sparring.training.speed import find_speed
from sparring.training.state import TrainingState, Weights

SECONDS_BETWEEN_CHECKPOINTS = 30.0

Observe = Callable[[TrainingState], bool | None]
_Tell = Callable[[str], object]


class Speed(BaseModel):
    """What `speed: auto` chose for a run, by the names of a Machine's fields, and what it said."""

    model_config = ConfigDict(extra="forbid", strict=True)

    channels_last: bool
    bf16: bool
    folded: bool
    compiled: bool
    threads: int | None = Field(ge=1)
    sentence: str


class RunConfig(BaseModel):
    """The content of config.json."""

    format: Literal["sparring.run/2"] = Field(alias="schema")
    settings: TrainingSettings
    kind: str
    given: dict[str, Any]
    class_names: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    speed: Speed | None = None


def settings_for(found: Mapping[str, Any]) -> TrainingSettings:
    """The settings of a run from values by name. Options of its recipe and of the data's augmentation may stand beside
    them, such as num_steps=3 or crop=4. Raises ValueError for what nobody knows or takes."""
    own = {key: value for key, value in found.items() if key in TrainingSettings.model_fields}
    settings = TrainingSettings(**own)
    modality = find_data(settings.data).modality
    if task_of(settings):
        if found.get("threat") not in (None, "none"):
            raise ValueError(f"recipe {settings.recipe} asks for no threat; leave out --threat {found['threat']}")
        settings = settings.but(threat="none")
    recipe, augment = modality.named_recipe(settings.recipe), dict(settings.augment or {})
    of_recipe, of_augment = options_of(recipe.builder, recipe.given), modality.augment_options
    for key, value in found.items():
        if key in own:
            continue
        if key in of_augment:
            augment[key] = value
        elif key in of_recipe:
            recipe = recipe.but(**modality.named_recipe(f"{recipe.name},{key}={text_of(value)}").options)
        else:
            known = sorted({*TrainingSettings.model_fields, *of_augment, *of_recipe})
            raise ValueError(f"setting {key!r} is unknown; with the recipe {recipe.name} there are {', '.join(known)}")
    return settings.but(recipe=str(recipe), augment=augment or None)


def start_run(
    settings: TrainingSettings, out: Path, *, observe: Observe | None = None, tell: _Tell | None = None
) -> TrainingResult:
    """Trains into the folder `out`, which must not hold a run yet. Raises ValueError, OSError.

    tell: hears what `speed: auto` chose. Where torch.distributed is initialised the processes share every batch, and
    the first one writes.
    """
    if find_machine(settings.device).rank:
        return _run(prepare(_completed(settings)), out, None, observe, tell)
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run; go on with it by --resume, or choose another folder")
    job = prepare(_completed(settings))
    with sole_writer(out):
        return _start(job, out, observe, tell)


def _start(job: Job, out: Path, observe: Observe | None, tell: _Tell | None) -> TrainingResult:
    """The run from its beginning; a folder where nothing was learned is left as it was found."""
    if (out / "config.json").exists():
        raise ValueError(f"{out} already holds a run, which another process has just begun; choose another folder")
    config = RunConfig(
        schema="sparring.run/2", settings=job.settings, kind=job.data.kind, given=job.data.given,
        class_names=job.data.class_names, kept=tuple(job.data.kept),
    )  # fmt: skip
    write_json(out / "config.json", config.model_dump(by_alias=True))
    for option, text in job.data.kept.items():
        write_text(out / f"{option}.txt", text)
    try:
        return _run(job, out, None, observe, tell)
    except Exception:
        if not (out / "checkpoint.pt").exists():
            for name in ("config.json", *(f"{option}.txt" for option in job.data.kept)):
                (out / name).unlink()
        raise


def resume_run(out: Path, *, observe: Observe | None = None, tell: _Tell | None = None, **asked: Any) -> TrainingResult:
    """Goes on with the run in `out` where its last checkpoint is; from the start when it has none.

    asked: settings by name, which must be those of the run; what comes from a Python file must be among them, see
    `load`. Raises ValueError.
    """
    settings = read_config(out)
    kinds = ("data", "model", "threat", "recipe")
    trusted(settings, out, asked, *kinds)
    for kind in kinds:  # before anything runs: the comparison below builds the recipe of the folder
        text = str(getattr(settings, kind))
        if runs_a_file(text) and asked[kind] != text:
            raise ValueError(
                f"{out} holds a run whose {kind} is {text}, and {asked[kind]} was named. Code runs only where its "
                "caller named it: resume with that file, or start a run of your own in another folder"
            )
    other = [key for key, value in asked.items() if settings_for({**settings.model_dump(), key: value}) != settings]
    if other:
        raise ValueError(
            f"{out} holds a run with other settings: {', '.join(other)} differ. Leave them out to go on with it, or "
            "choose another folder"
        )
    with sole_writer(out) if not find_machine(settings.device).rank else nullcontext():
        state = _read_state(out / "checkpoint.pt")
        start = settings.but(weights=None) if state else settings  # the checkpoint has newer ones
        job = prepare(start, data_text(out, settings.data))
        return _run(job._replace(settings=settings), out, state, observe, tell)


def read_config(run: Path) -> TrainingSettings:
    """The settings of a run folder."""
    return _config(run).settings


def data_text(run: Path, text: str) -> str:
    """The data that a text names, read with what the run has kept (a vocabulary), unless the text says otherwise."""
    config, spec = _config(run), parse(text)
    kept = [option for option in config.kept if option not in dict(spec.options)]
    if not kept or kind_of(text) != config.kind:
        return text
    paths = {option: text_of(str(run / f"{option}.txt")) for option in kept}
    return text + "".join(f",{option}={path}" for option, path in paths.items())


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
    trusted(config.settings, run, {"model": model}, "model")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in config.given.items()}
    task, seed = kept_task(config.settings, config.kind), config.settings.seed
    if task:
        network = task.model(given, seed)
    else:
        network = find(config.kind).make_model(model or str(config.settings.model), seed, given)
    return load_weights(network, weights).eval()


def training_record(run: Path, which: str) -> dict[str, Any]:
    """What results.json tells about the training of a run."""
    record = read_json(run / "training.json", "how the training ended")
    lines = run / "metrics.jsonl"
    try:
        history = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{lines} should hold a line for each epoch, but one is not valid JSON ({error})") from None
    return {**record, "checkpoint": which, "config": read_config(run).model_dump(), "history": history}


def _config(run: Path) -> RunConfig:
    path = run / "config.json"
    if not path.exists():
        raise ValueError(f"{run} is no run folder: it has no config.json; make one with sparring train --out {run}")
    config = read_json(path, "the settings of a run")
    if isinstance(config, dict) and "experiment" in config:
        old = config["experiment"] if isinstance(config["experiment"], dict) else {}
        asked = " ".join(f"--{key} {old[key]}" for key in ("data", "threat", "recipe", "model", "seed") if key in old)
        raise ValueError(
            f"{path} is of Sparring 0.1, which this version cannot read; train again: sparring train --out NEW {asked}"
        )
    try:
        return RunConfig.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        what = first["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"{path} should hold schema sparring.run/2, settings, kind and given of a run, but has what this version "
            f"cannot use: {what} ({'.'.join(map(str, first['loc'])) or 'all of it'}); train again"
        ) from None


def _read_state(path: Path) -> dict[str, Any] | None:
    """The content of a checkpoint; None when there is none yet. Runs no code from it."""
    if not path.exists():
        return None
    try:
        check_archive(path, str(path))
        state = torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:  # several libraries, several kinds
        state = type(error).__name__
    if not isinstance(state, dict) or not set(state) >= TrainingState.KEYS:
        held = state if isinstance(state, str) else type(state).__name__
        raise ValueError(f"{path} is no checkpoint of a run ({held}); delete it, and --resume begins anew")
    return state


def trusted(settings: TrainingSettings, run: Path, named_again: Mapping[str, Any], *kinds: str) -> None:
    """Raises ValueError when a run folder alone would decide which Python file is run for one of these settings."""
    for kind in kinds:
        text = str(getattr(settings, kind))
        if runs_a_file(text) and not named_again.get(kind):
            what = "network" if kind == "model" else kind
            raise ValueError(
                f"the {what} of {run} is built by {text}; loading it runs that file. If you trust it, name it: "
                f"--{kind} {text} (in Python: {kind}=...)"
            )


def _completed(settings: TrainingSettings) -> TrainingSettings:
    """The settings with every None replaced by what suits the data, or else by the general default."""
    data, modality, _ = find_data(settings.data)
    suited = {**GENERAL, **modality.presets(data)}
    usual = {key: suited.pop(key, option.default) for key, option in modality.augment_options.items()}
    if task := modality.task(settings.recipe):  # which has no use for the network, nor for what helps to classify
        suited, usual = {**GENERAL, **task.settings(data)}, {}
    suited |= {"epochs": 10**6} if settings.minutes else {}
    augment = usual | (settings.augment or {})
    missing = {key: value for key, value in suited.items() if getattr(settings, key) is None}
    return settings.but(**missing, augment=augment)


def _run(
    job: Job, out: Path, state: dict[str, Any] | None, observe: Observe | None, tell: _Tell | None
) -> TrainingResult:
    s, machine = job.settings, find_machine(job.settings.device)
    model = machine.place(job.model)
    assert s.epochs and s.schedule  # `_completed` filled them
    (x, y), parts = make_parts(job, model, machine, out)
    rows = torch.arange(len(y)).repeat(s.passes or 1)
    x, y = take(x, rows), y[rows]
    batches = make_batches(job, x, y, machine)
    saved = time.monotonic()

    def watch(now: TrainingState) -> bool | None:
        nonlocal saved
        stop = observe(now) if observe else None
        if machine.rank:
            return stop
        if stop or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
            _save_state(out, now)
            saved = time.monotonic()
        return stop

    def keep(now: TrainingState) -> None:
        _save_epoch(out, now)
        if job.task:
            job.task.after_epoch(out, now.candidate, now.epoch)

    with torch.random.fork_rng(devices=[machine.device] if machine.device.type == "cuda" else []):
        torch.manual_seed(s.seed)
        if s.speed == "auto":
            machine = _at_speed(job, out, machine, model, batches, parts, tell)
        result = train(
            model, batches, parts.recipe, parts.optimizer, num_epochs=s.epochs, validate=parts.validate,
            score=parts.score, guard=parts.guard, schedule=SCHEDULES[s.schedule], averaging=s.averaging, seed=s.seed,
            resume=state, save=None if machine.rank else keep, observe=watch, machine=machine,
            seconds=60 * s.minutes if s.minutes else math.inf,
        )  # fmt: skip
    if machine.rank == 0:
        _finish(out, job, result)
    return result


def _at_speed(
    job: Job, out: Path, machine: Machine, model: nn.Module, batches: Any, parts: LoopParts, tell: _Tell | None
) -> Machine:
    """The machine with what the run has chosen; the first process measures where nothing is chosen yet."""
    found = None
    if machine.rank == 0:
        config = _config(out)
        if (found := config.speed) is None:
            s = job.settings
            assert s.epochs
            seconds = 60 * s.minutes if s.minutes else math.inf
            measured = find_speed(
                model, batches, parts.recipe, parts.optimizer, machine, num_steps=s.epochs * len(batches),
                seconds=seconds, seed=s.seed,
            )  # fmt: skip
            found = Speed(**measured.choice, sentence=measured.sentence)
            told = config.model_copy(update={"speed": found})
            write_json(out / "config.json", told.model_dump(by_alias=True))
            if tell:
                tell(found.sentence)
    chosen = machine.gather(found.model_dump(exclude={"sentence"}) if found else None)[0]
    return replace(machine, **chosen)


def _save_state(out: Path, state: TrainingState) -> None:
    write_atomically(out / "checkpoint.pt", lambda stream: torch.save(state.to_dict(), stream))


def _save_epoch(out: Path, state: TrainingState) -> None:
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


def _about_extra(job: Job) -> dict[str, Any]:
    """What the record tells of extra examples."""
    if job.extra is None:
        return {}
    kind = "probabilities" if job.extra.y.ndim == 2 else "class numbers" if job.extra.y.amin() >= 0 else "none"
    told = {"file": job.settings.extra, "share": job.settings.extra_share, "examples": len(job.extra.y), "labels": kind}
    return {"extra": {**told, "provenance": job.extra.provenance}}


def _finish(out: Path, job: Job, result: TrainingResult) -> None:
    _save_history(out, result.history)
    for name in ("best", "last", "averaged"):
        if (weights := getattr(result, name)) is not None:
            _save_weights(out / f"{name}.safetensors", weights)
    by_epoch = {int(line["epoch"]): line for line in result.history}
    record = {
        "recipe": job.recipe.name, "recipe_settings": dict(job.recipe.options), "epochs": job.settings.epochs,
        "seconds": round(result.seconds, 3), "best_epoch": result.best_epoch,
        "best": by_epoch.get(result.best_epoch), "last": result.history[-1] if result.history else None,
        "stopped": result.stopped, "rollbacks": result.rollbacks, **_about_extra(job),
    }  # fmt: skip
    if speed := _config(out).speed:
        record["speed"] = speed.model_dump()
    write_json(out / "training.json", record)
