"""The model that a command is about: the options that say which, and what they come to. PyTorch comes when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

RunFolder = Annotated[Path | None, typer.Argument(help="a run folder; its data, threat, model are the defaults")]
ModelText = Annotated[str | None, typer.Option(help="FILE.py:FUNCTION, or a name from 'sparring list models'")]
WeightsFile = Annotated[Path | None, typer.Option(help=".safetensors, or a state dict")]
Checkpoint = Annotated[str | None, typer.Option(help="of a run: best (the default), last or averaged")]


def chosen(
    run: Path | None, model: str | None, weights: Path | None, checkpoint: str | None, given: dict[str, Any], needs: str
) -> tuple[Any, dict[str, Any]]:
    """The model that a command names, and its settings, those of a run folder where they are not given.

    needs: what else has to be given without a run folder, for the error. Raises ValueError.
    """
    from sparring.adapters.files import runs_a_file
    from sparring.app.evaluate_folder import from_run, from_weights
    from sparring.app.train_run import read_config, trusted

    if run:
        if weights or (model and not runs_a_file(model)):
            raise ValueError("a run folder has its own model and weights; to measure others leave the folder out")
        config = read_config(run)
        trusted(config, run, given, "data", "threat")
        which = "best" if checkpoint is None else checkpoint
        return from_run(run, which, model), {"data": config.data, "threat": config.threat, **given}
    if not (model and given.get("data") and given.get("threat")) or checkpoint is not None:
        raise ValueError(
            f"give a run folder, or --model FILE.py:FUNCTION (with --weights), --data, --threat{needs}; "
            "--checkpoint is for run folders"
        )
    return from_weights(model, weights, given["data"]), given


def say(text: str) -> None:
    """To standard error, where what is said goes; results go to standard output."""
    typer.echo(text, err=True)
