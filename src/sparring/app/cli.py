"""The command line: typed functions, one line per error, exit code 2 for errors and 130 when interrupted."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparring.app.attack import attack_
from sparring.app.chosen import Checkpoint, ModelText, RunFolder, WeightsFile, chosen, say
from sparring.app.export import export_
from sparring.app.schema import schema
from sparring.app.settings import EvaluationSettings, GateSettings, TrainingSettings, read_settings, with_options

app = typer.Typer(
    name="sparring", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Adversarial training: make a network robust, measure it so that the number holds, show it.",
    epilog="Add --debug to any command to see the traceback of an error.",
)  # fmt: skip


def main() -> None:
    """The entry point: runs a command and turns what goes wrong into one line and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    sys.argv += ["--help"] if len(sys.argv) == 1 else []
    try:
        code = app(standalone_mode=False)
    except SystemExit as ended:  # ours come below: a model's or an attack's own code must not say how this ended
        say(f"error: code that was run ended the process by sys.exit({ended.code!r}); nothing it measured counts")
        raise SystemExit(2) from None
    except (KeyboardInterrupt, typer.Abort):
        say("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        text = getattr(error, "format_message", error.__str__)() or type(error).__name__
        if isinstance(error, OSError) and error.strerror and error.filename:
            text = f"{str(error.filename)[:80]}: the file system refuses it ({error.strerror}); name another path"
        say(f"error: {' '.join(text.split())}")
        raise SystemExit(2) from None
    raise SystemExit(code or 0)


@app.callback(invoke_without_command=True)
def face(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Adversarial training: make a network robust, measure it so that the number holds, show it."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("sparring"))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder to write to")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="of every random choice")] = 0,
) -> None:
    """Break a network, harden another, and write a page that shows both (about a minute; no downloads)."""
    from sparring.app.evaluate_folder import from_run
    from sparring.report import write_report

    folders = []
    for name, recipe in (("standard", "standard"), ("robust", "pgd-at")):
        run = out / name
        asked = {"data": "digits", "threat": "linf:0.2", "recipe": recipe, "seed": seed}
        _train(run, asked, resume=(run / "config.json").exists(), hint="run the demo again")
        folders.append(run / "evaluation")
        _evaluate(from_run(run), folders[-1], EvaluationSettings(data="digits", threat="linf:0.2", seed=seed))
    page = write_report(folders, out / "report.html", title="Sparring demo: handwritten digits")
    say(f"\nOne seed on one small data set, as a taste. Open {page}")


@app.command(name="train")
@with_options(
    TrainingSettings, "data", "extra", "extra_share", "threat", "model", "weights", "recipe", "guard", "epochs",
    "minutes", "batch_size", "device", "speed", "seed",
)  # fmt: skip
def train_(
    out: Annotated[Path, typer.Option(help="run folder")],
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    config: Annotated[Path | None, typer.Option(help="settings from a TOML or JSON file")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, see 'sparring list settings'; repeatable")
    ] = None,
    **given: Any,
) -> None:
    """Train a robust model into a run folder. Under torchrun the processes share every batch."""
    from sparring.adapters.files import runs_a_file
    from sparring.app.tasks import next_step, task_of
    from sparring.app.train_run import read_config
    from sparring.core.machine import joined

    asked = read_settings(config, set_ or [], given)
    named = {key: asked[key] for key in ("data", "recipe") if asked.get(key)}
    if not resume and not (asked.get("data") and (asked.get("threat") or task_of(TrainingSettings(**named)))):
        raise ValueError("--data and --threat are needed, for example --data digits --threat linf:0.2")
    named = {key: asked[key] for key in ("data", "model", "threat", "recipe") if asked.get(key)}
    files = {key: text for key, text in named.items() if runs_a_file(str(text))}
    again = "".join(f" --{key} {shlex.quote(value)}" for key, value in files.items())
    model = f" --model {shlex.quote(files['model'])}" if "model" in files else ""
    go_on = f"saved; go on with: sparring train --resume --out {shlex.quote(str(out))}{again}"
    with joined() as here:
        _train(out, asked, resume=resume, hint=go_on, speak=here.rank == 0)
    if here.rank == 0:
        say(f"next: {next_step(read_config(out)).format(run=shlex.quote(str(out)), model=model)}")


@app.command(name="evaluate")
@with_options(GateSettings)
@with_options(EvaluationSettings)
def evaluate_(
    run: RunFolder = None,
    out: Annotated[Path | None, typer.Option(help="folder to write to (default: RUN/evaluation)")] = None,
    model: ModelText = None,
    weights: WeightsFile = None,
    checkpoint: Checkpoint = None,
    **given: Any,
) -> None:
    """Measure a model: clean and robust accuracy, security curve, report.

    Killed at any moment, the same command goes on. Under torchrun the processes share the work.
    """
    from sparring.core.machine import joined

    demanded = {key: given.pop(key) for key in GateSettings.model_fields if key in given}
    if not run and not out:
        raise ValueError("give a run folder, or --out with --model, --data and --threat")
    subject, given = chosen(run, model, weights, checkpoint, given, " and --out")
    out = out or (run or Path()) / "evaluation"
    settings, demands = EvaluationSettings(**given), _demands(out / "results.json", GateSettings(**demanded))
    with joined() as here:
        _evaluate(subject, out, settings, speak=here.rank == 0)
    if here.rank:
        return
    say(f"report: {out / 'report.html'}{f', examples: {out}/adversarial.npz' if settings.keep_examples else ''}")
    if demanded:
        _gate(out / "results.json", demands)


@app.command()
@with_options(GateSettings)
def gate(
    results: Annotated[Path, typer.Argument(help="results.json, an evaluation folder or a run folder")], **given: Any
) -> None:
    """Check a result against thresholds and a baseline: exit 0 if it passes, 1 if not, 2 if it cannot be judged."""
    _gate(results, _demands(results, GateSettings(**given)))


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="evaluation folders; the first is the baseline of the others")],
    out: Annotated[Path | None, typer.Option(help="the page to write")] = None,
) -> None:
    """Write the page again from results on disk; several folders make a comparison."""
    from sparring.report import quality_folder, write_report
    from sparring.results.read import locate

    if len(folders) == 1 and (found := quality_folder(folders[0])):
        from sparring.report.generated import write_quality_page

        say(f"report: {write_quality_page(*found, out)}")
        return
    folder = locate(folders[0]).parent if len(folders) == 1 else Path()
    say(f"report: {write_report(folders, out or folder / 'report.html')}")


app.command(name="attack")(attack_)
app.command(name="export")(export_)
app.add_typer(schema)


@app.command(name="compare")
def compare_(
    folders: Annotated[
        list[Path], typer.Argument(help="run or evaluation folders, or folders of them; the first is compared with")
    ],
    format: Annotated[Literal["text", "csv", "markdown"], typer.Option(help="how the table is written")] = "text",
) -> None:
    """Compare many runs: one table with a row for each recipe, mean and spread over its seeds.

    Models that were measured on the same examples are paired by McNemar's test.
    """
    from sparring.app.compare import comparison

    typer.echo(comparison(folders, format, say), nl=False)


@app.command(name="sample")
def sample_(
    run: Annotated[Path, typer.Argument(help="a run folder whose recipe was gan")],
    out: Annotated[Path, typer.Option(help="the .npz to write, for --extra of sparring train")],
    num: Annotated[int, typer.Option("--num", "-n", min=1, help="how many images, of all classes in turn")] = 5000,
    per_class: Annotated[int | None, typer.Option(min=1, help="instead: so many of each class")] = None,
    labels: Annotated[Path | None, typer.Option(help="run folder of a classifier, for soft labels")] = None,
    checkpoint: Annotated[str, typer.Option(help="best, last or averaged")] = "best",
    seed: Annotated[int, typer.Option(help="of the noise")] = 0,
) -> None:
    """Write images of a trained generator, with labels and where they come from."""
    if out.suffix != ".npz":
        raise ValueError(f"--out {out}: expected a file that ends in .npz")
    from sparring.app.generate import draw_images, write_sample

    drawn = draw_images(run, per_class or num, per_class=per_class is not None, which=checkpoint, seed=seed)
    typer.echo(write_sample(drawn, out, labels))


@app.command()
def quality(
    real: Annotated[str, typer.Argument(help="data set of real images, see 'sparring list data'")],
    fake: Annotated[Path, typer.Argument(help="a run folder whose recipe was gan, or an .npz of anybody's images, x")],
    out: Annotated[Path | None, typer.Option(help="folder to write to (default: RUN/quality, or quality)")] = None,
    num: Annotated[int, typer.Option("--num", "-n", min=50, help="images of each side, at most")] = 3000,
    features: Annotated[str | None, typer.Option(help="FILE.py:FUNCTION, images -> features (N, F)")] = None,
    seed: Annotated[int, typer.Option(help="of every random choice")] = 0,
) -> None:
    """Measure generated images beside real ones: FID, KID, precision, recall, coverage, copies, with controls."""
    from sparring.app.generate import judge_quality

    out = out or (fake / "quality" if fake.is_dir() else Path("quality"))
    found = judge_quality(real, fake, out, num=num, features=features, seed=seed)
    for sentence in found["findings"]:
        say(f"suspect: {sentence}")
    made, floor = found["rows"]["generated"], found["rows"]["floor"]
    typer.echo(
        f"{found['fake']}: FID x 1000 {made['fid']:.1f} (real images {floor['fid']:.1f}), "
        f"coverage {made['coverage']:.2f} ({floor['coverage']:.2f}), "
        f"precision {made['precision']:.2f} ({floor['precision']:.2f}), n = {found['n']}, "
        f"features of a {found['extractor']['name']}, not Inception's: {found['verdict']}"
    )
    say(f"report: {out / 'report.html'}")


@app.command(name="list")
def list_(
    what: Annotated[
        str | None, typer.Argument(help="attacks, recipes, models, threats, data, modalities or settings")
    ] = None,
) -> None:
    """List what there is."""
    from sparring.app.listing import tables

    there = tables()
    if what not in (None, *there):
        raise ValueError(f"there is no list of {what!r}; there are {', '.join(there)}")
    for title in [what] if what else there:
        typer.echo(f"{title}:")
        for name, text in there[title].items():
            typer.echo(f"  {name}\n      {text}")


def _train(out: Path, asked: dict[str, Any], *, resume: bool, hint: str, speak: bool = True) -> None:
    """Trains or resumes with a progress line; Ctrl-C ends it at the next batch, saved. One of several processes says
    what there is to say.
    """
    from sparring.app import train_run as runs
    from sparring.app.progress import ProgressLine, interrupts, training_note
    from sparring.app.tasks import best_in_words

    tell = say if speak else lambda text: None
    with interrupts(tell) as interrupted, ProgressLine(out.name) if speak else nullcontext() as line:

        def observe(state: Any) -> bool:
            if line is None:
                return interrupted()
            by_steps = state.limit == float("inf")
            done, total = (state.step, state.total) if by_steps else (state.progress, 1.0)
            line.show(done, lambda: training_note(state), total=total)
            return interrupted()

        if resume:
            result = runs.resume_run(out, observe=observe, tell=tell, **asked)
        else:
            result = runs.start_run(runs.settings_for(asked), out, observe=observe, tell=tell)
    if result.stopped:
        tell(result.stopped)
        tell(hint if interrupted() else f"what was learned before is in {out}")
        raise typer.Exit(130 if interrupted() else 1)
    if not resume and speak:
        _say_taken(asked["data"])
    best = result.history[result.best_epoch]
    tell(
        f"{out.name}: {len(result.history)} epochs in {result.seconds:.0f} s; best epoch {result.best_epoch + 1}: "
        + best_in_words(best)
    )


def _evaluate(subject: Any, out: Path, settings: EvaluationSettings, *, speak: bool = True) -> None:
    """Evaluates with a progress line, and says the result; not in the silent ones of several processes."""
    from sparring.app.evaluate_folder import evaluate_folder
    from sparring.app.progress import ProgressLine, evaluation_note
    from sparring.results.read import read_evaluation

    command = shlex.join(["sparring", *sys.argv[1:]])
    if not speak:
        evaluate_folder(subject, out, settings, command=command)
        return
    with suppress(ValueError, OSError):  # none there, or one that cannot be read
        old = read_evaluation(out / "results.json").results
        say(f"replacing the results in {out}: {old.threat.text}, n = {old.metrics['robust_accuracy'].n}")
    with ProgressLine(f"{settings.name or subject.name}: evaluating") as line:
        told: list[int] = []

        def observe(now: Any) -> None:
            if now.kept and not told:
                told.append(now.kept)
                say(f"going on with {now.kept} of {now.batches} batches done")
            line.show(now.fraction or 0.0, lambda: evaluation_note(now), total=None if now.fraction is None else 1.0)

        try:
            found = evaluate_folder(subject, out, settings, command=command, observe=observe)
        except KeyboardInterrupt:
            if (out / "parts").exists():
                say("the finished batches are kept; the same command goes on with them")
            raise
    assert found is not None  # only silent processes get none
    _say_taken(settings.data)
    _say_results(found)


def _say_results(found: Any) -> None:
    for finding in sorted(found.findings, key=lambda finding: -finding.severity):
        say(f"{finding.level}: {finding.sentence} {finding.next_step}".rstrip())
    clean, robust, certified = (found.metrics.get(f"{kind}_accuracy") for kind in ("clean", "robust", "certified"))
    lower = f", certified at least {certified.value:.1%}" if certified else ""
    typer.echo(
        f"{found.name}: {clean.value:.1%} clean, {robust.value:.1%} robust at {found.threat.text} "
        f"(95 % interval {robust.low:.1%} to {robust.high:.1%}, n = {robust.n}, seed {found.seed})"
        f"{lower}: {found.verdict or 'not checked'}"
    )


def _say_taken(data: str) -> None:
    """How the data was taken, where its text does not say."""
    from sparring.modalities import find_data

    if taken := find_data(data).taken:
        say(taken)


def _demands(judged: Path, asked: GateSettings) -> Any:
    from sparring.results.gate import SHORT, Demands, read_baseline, read_bounds

    short = zip(SHORT, (asked.min_robust, asked.min_clean), strict=True)
    return Demands(
        least={name: value for name, value in short if value is not None} | read_bounds("--min", asked.min),
        most=read_bounds("--max", asked.max), max_drop=read_bounds("--max-drop", asked.max_drop, SHORT),
        baseline=read_baseline(asked.baseline, judged) if asked.baseline else None,
        require_verdict=asked.require_verdict, allow_suspect=asked.allow_suspect, confident=asked.confident,
    )  # fmt: skip


def _gate(results: Path, demands: Any) -> None:
    """Says what every check of the gate found; one that fails makes the exit code 1."""
    from sparring.results.gate import judge
    from sparring.results.read import read_evaluation

    decision = judge(read_evaluation(results), demands)
    for note in decision.notes:
        say(f"note: {note}")
    for check in decision.checks:
        typer.echo(f"{'pass' if check.passed else 'FAIL'}: {check.sentence}")
    if not decision.passed:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
