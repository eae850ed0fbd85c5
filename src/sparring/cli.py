"""The command line: typed functions, one line per error, exit code 2 for errors and 130 when interrupted."""

from __future__ import annotations

import inspect
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="sparring", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Adversarial training: make a network robust, measure it so that the number holds, show it.",
    epilog="Add --debug to any command to see the traceback of an error.",
)  # fmt: skip

DATA = "digits, mnist, cifar10, a folder of parquet in the hub's layout, or an .npz file"
THREAT = "what may be changed: linf:8/255, l2:0.5, linf:0.1,box=none, l2:1,box=-3..3"
Out = Annotated[Path, typer.Option(help="folder to write to")]
Seed = Annotated[int, typer.Option(help="of every random choice")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps")]


def main() -> None:
    """The entry point: runs a command and turns what goes wrong into one line and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    sys.argv += ["--help"] if len(sys.argv) == 1 else []
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted; nothing was written by this step")
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        _say(f"error: {_one_line(error)}")
        raise SystemExit(2) from None
    raise SystemExit(code or 0)


@app.command()
def demo(out: Out = Path("demo"), seed: Seed = 0) -> None:
    """Break a network, harden another, and write a page that shows both (about a minute; no downloads)."""
    from sparring.assess import assess, from_run
    from sparring.experiment import Experiment
    from sparring.report import write_report

    folders = []
    for name, recipe in (("standard", "standard"), ("robust", "pgd-at")):
        run = out / name
        _train(
            run,
            Experiment(data="digits", threat="linf:0.2", recipe=recipe, seed=seed),
            resume=(run / "config.json").exists(),
        )
        folders.append(run / "evaluation")
        with _evaluating(name) as observe:
            record = assess(
                from_run(run),
                folders[-1],
                data="digits",
                threat="linf:0.2",
                seed=seed,
                observe=observe,
                command=_command(),
            )
        _say_result(record)
    page = write_report(folders, out / "report.html", title="Sparring demo: handwritten digits")
    _say(f"\nOne seed on one small data set, as a taste. Open {page}")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="run folder")],
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    threat: Annotated[str | None, typer.Option(help=THREAT)] = None,
    model: Annotated[str | None, typer.Option(help="a name from 'sparring list models', or FILE.py:FUNCTION")] = None,
    weights: Annotated[
        str | None, typer.Option(help="start from these weights (.safetensors, or a state dict)")
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="standard, mixed, pgd-at or trades")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the data")] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples per step")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps")] = None,
    seed: Annotated[int | None, typer.Option(help="of every random choice")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    config: Annotated[Path | None, typer.Option(help="settings from a TOML or JSON file")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE, any other setting; repeatable")] = None,
) -> None:
    """Train a robust model into a run folder."""
    from sparring.experiment import Experiment, read_settings

    names = ("data", "threat", "model", "weights", "recipe", "epochs", "batch_size", "device", "seed")
    here = locals()
    settings = read_settings(config, tuple(set_ or ()), {name: here[name] for name in names})
    if not resume and not (settings.get("data") and settings.get("threat")):
        raise ValueError("--data and --threat are needed, for example --data digits --threat linf:0.2")
    _train(out, None if resume else Experiment(**settings), resume=resume, flags=settings)
    _say(f"next: sparring evaluate {shlex.quote(str(out))} --out {shlex.quote(str(out / 'evaluation'))}")


@app.command()
def evaluate(
    out: Out,
    run: Annotated[
        Path | None, typer.Argument(help="a run folder; its data, threat and model are the defaults")
    ] = None,
    model: Annotated[str | None, typer.Option(help="FILE.py:FUNCTION, or a name from 'sparring list models'")] = None,
    weights: Annotated[Path | None, typer.Option(help=".safetensors, or a state dict")] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    split: Annotated[str, typer.Option(help="test or train")] = "test",
    threat: Annotated[str | None, typer.Option(help=THREAT)] = None,
    attacks: Annotated[
        str | None, typer.Option(help="such as fgsm,pgd:num_steps=100,restarts=10,objective=margin")
    ] = None,
    checkpoint: Annotated[str, typer.Option(help="of a run: best, last or averaged")] = "best",
    num_examples: Annotated[int, typer.Option(help="how many, from the start of the split")] = 1000,
    device: Device = "auto",
    seed: Seed = 0,
    name: Annotated[str | None, typer.Option(help="what the report calls this model")] = None,
) -> None:
    """Measure a model: clean and robust accuracy, security curve, report."""
    from sparring.assess import assess, from_run, from_weights
    from sparring.attacks.text import STANDARD_ATTACKS, parse_attacks
    from sparring.runs import read_config

    if (run is None) == (model is None):
        raise ValueError("give either a run folder, or --model FILE.py:FUNCTION with --weights, --data and --threat")
    chosen = parse_attacks(attacks) if attacks else STANDARD_ATTACKS
    if run:
        config = read_config(run)
        data, threat, subject = data or config.data, threat or config.threat, from_run(run, checkpoint)
    else:
        if not data or not threat:
            raise ValueError(
                "a model of your own needs --data and --threat, for example --data mnist --threat linf:0.3"
            )
        subject = from_weights(str(model), weights, data)
    with _evaluating(name or subject.name) as observe:
        record = assess(
            subject, out, data=data, threat=threat, split=split, attacks=chosen, num_examples=num_examples, seed=seed,
            device=device, command=_command(), name=name, observe=observe,
        )  # fmt: skip
    _say_result(record)
    _say(f"report: {out / 'report.html'}")


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="evaluation folders; the first is the baseline of the others")],
    out: Annotated[Path | None, typer.Option(help="the page to write")] = None,
) -> None:
    """Write the page again from results on disk; several folders make a comparison."""
    from sparring.report import write_report

    _say(f"report: {write_report(folders, out or (folders[0] if len(folders) == 1 else Path()) / 'report.html')}")


@app.command(name="list")
def list_(what: Annotated[str, typer.Argument(help="attacks, recipes, models, data or threats")]) -> None:
    """List what there is."""
    from sparring.attacks.catalogue import CATALOGUE
    from sparring.attacks.text import options_of
    from sparring.experiment import recipe_options
    from sparring.models import MODELS
    from sparring.threats import THREATS
    from sparring.training.recipes import RECIPES

    tables: dict[str, dict[str, str]] = {
        "attacks": {n: f"{_summary(f)} Options: {', '.join(options_of(n))}." for n, f in CATALOGUE.items()},
        "recipes": {n: f"{_summary(f)} Options: {', '.join(recipe_options(n))}." for n, f in RECIPES.items()},
        "models": {n: _summary(f) for n, f in MODELS.items()},
        "threats": {f"{n}:RADIUS": _summary(f) for n, f in THREATS.items()},
        "data": {
            "digits": "scikit-learn's 8x8 digits; needs nothing.",
            "mnist, cifar10": "From $SPARRING_DATA/<name> when that is there, else from the Hugging Face hub.",
            "FOLDER": "Parquet in the hub's layout: columns image (or img) and label.",
            "FILE.npz": "x_train, y_train, x_test, y_test: uint8 images NHW or NHWC, float NCHW, or vectors (N, D).",
        },
    }
    if what not in tables:
        raise ValueError(f"there is no list of {what!r}; there are {', '.join(tables)}")
    for name, text in tables[what].items():
        typer.echo(f"{name}\n    {text}")


def _train(out: Path, experiment: Any, *, resume: bool, flags: dict[str, Any] | None = None) -> None:
    """Trains or resumes with a progress line; Ctrl-C ends it at the next batch, saved."""
    from sparring import runs

    if resume:
        experiment = runs.read_config(out)
        now, asked = {**vars(experiment), **experiment.recipe_options}, dict(flags or {})
        asked |= asked.pop("recipe_options", {})
        other = [k for k, v in asked.items() if v != now.get(k)]
        if other:
            raise ValueError(
                f"--resume goes on with the settings in {out}, but {', '.join(other)} differ; leave them out"
            )
    with _interrupts() as interrupted, _training(out.name) as show:
        observe = lambda state: show(state) or interrupted()  # noqa: E731
        result = runs.resume_run(out, observe=observe) if resume else runs.start_run(experiment, out, observe=observe)
    if result.stopped:
        _say(result.stopped)
        if interrupted():
            _say(f"saved; go on with: sparring train --resume --out {shlex.quote(str(out))}")
            raise SystemExit(130)
        raise SystemExit(1)
    best = result.history[result.best_epoch]
    _say(
        f"{out.name}: {len(result.history)} epochs in {result.seconds:.0f} s; best epoch {result.best_epoch + 1}: "
        f"{best['clean_accuracy']:.1%} clean, {best['robust_accuracy']:.1%} under a light attack (held-out data)"
    )


@contextmanager
def _training(title: str) -> Iterator[Callable[[Any], None]]:
    """Yields a function that shows a TrainingState."""
    from sparring.progress import ProgressLine

    with ProgressLine(title) as line:

        def show(state: Any) -> None:
            last = state.history[-1] if state.history else {}
            robust = f", robust {last['robust_accuracy']:.1%}" if "robust_accuracy" in last else ""
            note = f"epoch {state.epoch + 1}, loss {state.loss_sum / max(1, state.seen):.3f}{robust}"
            line.show(state.step, note, total=state.total)

        yield show


@contextmanager
def _evaluating(title: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that shows (done, total)."""
    from sparring.progress import ProgressLine

    with ProgressLine(f"{title}: evaluating") as line:
        yield lambda done, total: line.show(done, total=total)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C (or a polite kill) has come; the second one is not caught."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _say_result(record: dict[str, Any]) -> None:
    clean, robust = record["clean_accuracy"], record["robust_accuracy"]
    for finding in record["findings"]:
        _say(f"note: {finding['sentence']}")
    typer.echo(
        f"{record['name']}: {clean['value']:.1%} clean, {robust['value']:.1%} robust at {record['threat']} "
        f"(95 % interval {robust['low']:.1%} to {robust['high']:.1%}, n = {robust['n']}, seed {record['seed']})"
    )


def _command() -> str:
    return shlex.join(["sparring", *sys.argv[1:]])


def _summary(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").splitlines()[0]


def _one_line(error: BaseException) -> str:
    text = getattr(error, "format_message", lambda: str(error))() or type(error).__name__
    return " ".join(str(text).split())


if __name__ == "__main__":
    main()
