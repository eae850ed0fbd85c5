"""`sparring attack`: the adversarial examples of a data set as files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparring.app.chosen import Checkpoint, ModelText, RunFolder, WeightsFile, chosen, say
from sparring.app.settings import EvaluationSettings, with_options

OPTIONS = ("data", "threat", "split", "attacks", "num_examples", "balanced", "batch_size", "seed", "device")


@with_options(EvaluationSettings, *OPTIONS)
def attack_(
    out: Annotated[Path, typer.Option(help="the .npz to write; of a table also .csv, of texts .jsonl")],
    run: RunFolder = None,
    png: Annotated[Path | None, typer.Option(help="folder for them as PNG in 8 bits, for images")] = None,
    model: ModelText = None,
    weights: WeightsFile = None,
    checkpoint: Checkpoint = None,
    **given: Any,
) -> None:
    """Write the adversarial examples of a data set: those that attacks turned, each verified.

    An .npz with x, x_adv, y, index, prediction_before, prediction_after, confidence_before, confidence_after, size.
    """
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; expected a file to write, such as {out / 'adversarial.npz'}")
    if png and png.is_dir() and any(png.iterdir()):
        raise ValueError(f"--png {png} is not empty; its pictures could be mixed with others: choose another folder")
    subject, given = chosen(run, model, weights, checkpoint, given, "")
    settings = EvaluationSettings(**given)
    from sparring.app.adversarial import craft
    from sparring.app.progress import ProgressLine, evaluation_note

    with ProgressLine(f"{subject.name}: attacking") as line:
        found = craft(
            subject, settings,
            lambda now: line.show(now.fraction or 0.0, lambda: evaluation_note(now), total=1.0),
            pictures=png is not None, suffix=out.suffix,
        )  # fmt: skip
    for finding in sorted(found.evaluation.findings, key=lambda finding: -finding.severity):
        say(f"{finding.level}: {finding.sentence} {finding.next_step}".rstrip())
    found.save(out)
    clean = found.evaluation.clean
    typer.echo(f"{out}: {found.num} adversarial examples at {settings.threat}, each verified; of {clean.n} examples "
               f"{clean.count} were right, and {found.evaluation.robust.count} stand")  # fmt: skip
    if png:
        again = found.write_pictures(png)
        share = f" ({again.fools / again.num:.1%})" if again.num else ""
        permitted = "" if again.permitted is None else f", {again.permitted} of them within {settings.threat}"
        typer.echo(f"{png}: {again.num} pictures; read from the files again {again.fools}{share} still fool{permitted}")
