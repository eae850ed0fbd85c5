"""The command line: typed functions, one line per error, exit code 2 for errors and 130 when interrupted."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="sparring", no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
    help="Adversarial training: make a network robust, measure it so that the number holds, show it.",
    epilog="Add --debug to any command to see the traceback of an error.",
)  # fmt: skip

DATA = "digits, mnist, cifar10, a folder of parquet in the hub's layout, or an .npz file"
THREAT = "what may be changed: linf:8/255, l2:0.5, l1:12, linf:0.1,box=none, l2:1,box=-3..3"
ATTACKS = "fast (the default), autoattack, autoattack-plus, autoattack-rand, or a list: fgsm,pgd:num_steps=100"
Seed = Annotated[int, typer.Option(help="of every random choice")]
MinRobust = Annotated[float | None, typer.Option(help="exit 1 below this robust accuracy, such as 0.45")]
MinClean = Annotated[float | None, typer.Option(help="exit 1 below this clean accuracy, such as 0.8")]
MaxDrop = Annotated[float | None, typer.Option(help="exit 1 if either falls further below --baseline, such as 0.01")]
Baseline = Annotated[Path | None, typer.Option(help="results to compare with: file, evaluation folder or run folder")]


def main() -> None:
    """The entry point: runs a command and turns what goes wrong into one line and an exit code."""
    debug = "--debug" in sys.argv
    sys.argv = [a for a in sys.argv if a != "--debug"]
    sys.argv += ["--help"] if len(sys.argv) == 1 else []
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted")
        raise SystemExit(130) from None
    except Exception as error:
        if debug:
            raise
        _say(f"error: {_one_line(error)}")
        raise SystemExit(2) from None
    raise SystemExit(code or 0)


@app.callback(invoke_without_command=True)
def about(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    """Adversarial training: make a network robust, measure it so that the number holds, show it."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("sparring"))


@app.command()
def demo(out: Annotated[Path, typer.Option(help="folder to write to")] = Path("demo"), seed: Seed = 0) -> None:
    """Break a network, harden another, and write a page that shows both (about a minute; no downloads)."""
    from sparring.app.evaluate_folder import from_run
    from sparring.report import write_report

    folders = []
    for name, recipe in (("standard", "standard"), ("robust", "pgd-at")):
        run = out / name
        settings = {"data": "digits", "threat": "linf:0.2", "recipe": recipe, "seed": seed}
        _train(run, settings, resume=(run / "config.json").exists(), hint="run the demo again")
        folders.append(run / "evaluation")
        _assess(from_run(run), folders[-1], data="digits", threat="linf:0.2", seed=seed)
    page = write_report(folders, out / "report.html", title="Sparring demo: handwritten digits")
    _say(f"\nOne seed on one small data set, as a taste. Open {page}")


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="run folder")],
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    threat: Annotated[str | None, typer.Option(help=THREAT)] = None,
    model: Annotated[str | None, typer.Option(help="a name from 'sparring list models', or FILE.py:FUNCTION")] = None,
    weights: Annotated[str | None, typer.Option(help="weights to start from (.safetensors, or a state dict)")] = None,
    recipe: Annotated[str | None, typer.Option(help="standard, mixed, pgd-at (the default) or trades")] = None,
    epochs: Annotated[int | None, typer.Option(help="passes over the data (default: by the data)")] = None,
    batch_size: Annotated[int | None, typer.Option(help="examples per step (default: by the data)")] = None,
    device: Annotated[str | None, typer.Option(help="auto (the default), cpu, cuda or mps")] = None,
    seed: Annotated[int | None, typer.Option(help="of every random choice (default 0)")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    config: Annotated[Path | None, typer.Option(help="settings from a TOML or JSON file")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE, see 'sparring list settings'; repeatable")
    ] = None,
) -> None:
    """Train a robust model into a run folder."""
    from sparring.app.settings import read_settings
    from sparring.app.train_run import read_config

    names = ("data", "threat", "model", "weights", "recipe", "epochs", "batch_size", "device", "seed")
    here = locals()
    default_recipe = read_config(out).recipe if resume else "pgd-at"
    settings = read_settings(config, tuple(set_ or ()), {name: here[name] for name in names}, default_recipe)
    if not resume and not (settings.get("data") and settings.get("threat")):
        raise ValueError("--data and --threat are needed, for example --data digits --threat linf:0.2")
    extra = f" --model {shlex.quote(model)}" if model and ":" in model else ""
    go_on = f"saved; go on with: sparring train --resume --out {shlex.quote(str(out))}{extra}"
    _train(out, settings, resume=resume, hint=go_on)
    _say(f"next: sparring evaluate {shlex.quote(str(out))}{extra}")


@app.command()
def evaluate(
    run: Annotated[Path | None, typer.Argument(help="a run folder; its data, threat, model are the defaults")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write to (default: RUN/evaluation)")] = None,
    model: Annotated[str | None, typer.Option(help="FILE.py:FUNCTION, or a name from 'sparring list models'")] = None,
    weights: Annotated[Path | None, typer.Option(help=".safetensors, or a state dict")] = None,
    data: Annotated[str | None, typer.Option(help=DATA)] = None,
    split: Annotated[str, typer.Option(help="test or train")] = "test",
    threat: Annotated[str | None, typer.Option(help=THREAT)] = None,
    attacks: Annotated[str | None, typer.Option(help=ATTACKS)] = None,
    checkpoint: Annotated[str | None, typer.Option(help="of a run: best (the default), last or averaged")] = None,
    num_examples: Annotated[int, typer.Option(help="how many, from the start of the split")] = 1000,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps")] = "auto",
    seed: Seed = 0,
    name: Annotated[str | None, typer.Option(help="what the report calls this model")] = None,
    batch_size: Annotated[int, typer.Option(help="examples at once; what is done is kept after each batch")] = 250,
    certify: Annotated[str, typer.Option(help="auto, interval or none: the certified lower bound")] = "auto",
    smooth: Annotated[
        float | None, typer.Option(help="judge the model under Gaussian noise of this size, certified in L2")
    ] = None,
    sanity: Annotated[bool, typer.Option(help="look for signs that the number is too high")] = True,
    min_robust: MinRobust = None,
    min_clean: MinClean = None,
    max_drop: MaxDrop = None,
    baseline: Baseline = None,
) -> None:
    """Measure a model: clean and robust accuracy, security curve, report.

    Killed at any moment, the same command goes on. Under torchrun the processes share the work.
    """
    from sparring.app.evaluate_folder import from_run, from_weights
    from sparring.app.train_run import read_config
    from sparring.attacks.plans import DEFAULT_PLAN, make_plan
    from sparring.core.machine import joined
    from sparring.threats import make_threat

    if run:
        if weights or (model and ":" not in model):
            raise ValueError("a run folder has its own model and weights; to measure others leave the folder out")
        config = read_config(run)
        data, threat, out = data or config.data, threat or config.threat, out or run / "evaluation"
        subject = from_run(run, checkpoint or "best", model)
    else:
        if not (model and data and threat and out) or checkpoint:
            raise ValueError(
                "give a run folder, or --model FILE.py:FUNCTION (with --weights), --data, --threat and --out; "
                "--checkpoint is for run folders"
            )
        subject = from_weights(model, weights, data)
    chosen = make_plan(attacks or DEFAULT_PLAN, make_threat(threat))
    demands = _demands(out / "results.json", baseline, min_robust=min_robust, min_clean=min_clean, max_drop=max_drop)
    with joined() as here:
        _assess(
            subject, out, data=data, threat=threat, split=split, attacks=chosen, num_examples=num_examples, seed=seed,
            device=device, name=name, batch_size=batch_size, certify=certify, smooth=smooth, sanity=sanity,
            speak=here.rank == 0,
        )  # fmt: skip
    if here.rank:
        return
    _say(f"report: {out / 'report.html'}")
    if baseline or min_robust is not None or min_clean is not None:
        _gate(out / "results.json", demands, baseline)


@app.command()
def gate(
    results: Annotated[Path, typer.Argument(help="results.json, an evaluation folder or a run folder")],
    min_robust: MinRobust = None,
    min_clean: MinClean = None,
    max_drop: MaxDrop = None,
    baseline: Baseline = None,
    require_verdict: Annotated[
        str | None, typer.Option(help="TRUSTED, or SUSPECT for at least that; a file without a verdict fails")
    ] = None,
    allow_suspect: Annotated[bool, typer.Option("--allow-suspect", help="let the verdict SUSPECT pass")] = False,
    confident: Annotated[
        bool, typer.Option("--confident", help="hold the lower end of the 95 % interval against the two minima")
    ] = False,
) -> None:
    """Check a result against thresholds and a baseline: exit 0 if it passes, 1 if not, 2 if it cannot be judged."""
    demands = _demands(
        results, baseline, min_robust=min_robust, min_clean=min_clean, max_drop=max_drop,
        require_verdict=require_verdict, allow_suspect=allow_suspect, confident=confident,
    )  # fmt: skip
    _gate(results, demands, baseline)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="evaluation folders; the first is the baseline of the others")],
    out: Annotated[Path | None, typer.Option(help="the page to write")] = None,
) -> None:
    """Write the page again from results on disk; several folders make a comparison."""
    from sparring.report import write_report

    found = [f / "evaluation" if (f / "evaluation" / "results.json").exists() else f for f in folders]
    page = write_report(found, out or (found[0] if len(found) == 1 else Path()) / "report.html")
    _say(f"report: {page}")


@app.command(name="list")
def list_(
    what: Annotated[str | None, typer.Argument(help="attacks, recipes, models, data, threats or settings")] = None,
) -> None:
    """List what there is."""
    from sparring.app.settings import Experiment, recipe_options
    from sparring.attacks.plans import ATTACKS, PLANS
    from sparring.core.registry import options_of
    from sparring.modalities import find, known_data
    from sparring.threats import THREATS
    from sparring.training.recipes import RECIPES

    tables: dict[str, dict[str, str]] = {
        "attacks": {n: f"{_summary(f)} Options: {', '.join(options_of(f))}." for n, f in ATTACKS.items()}
        | {n: _summary(f) for n, f in PLANS.items()},
        "recipes": {n: f"{_summary(f)} Options: {', '.join(recipe_options(n))}." for n, f in RECIPES.items()},
        "models": {n: _summary(f) for n, f in find("images").models.items()},
        "threats": {f"{n}:RADIUS": _summary(f) for n, f in THREATS.items()},
        "data": known_data(),
        "settings": {f.name: f"{f.type}" for f in dataclasses.fields(Experiment) if f.name != "recipe_options"},
    }
    if what not in (None, *tables):
        raise ValueError(f"there is no list of {what!r}; there are {', '.join(tables)}")
    for title in [what] if what else tables:
        typer.echo(f"{title}:")
        for name, text in tables[title].items():
            typer.echo(f"  {name}\n      {text}")


def _train(out: Path, settings: dict[str, Any], *, resume: bool, hint: str) -> None:
    """Trains or resumes with a progress line; Ctrl-C ends it at the next batch, saved."""
    from sparring.app import train_run as runs
    from sparring.app.progress import ProgressLine
    from sparring.app.settings import Experiment

    if resume:
        experiment, asked = runs.read_config(out), dict(settings)
        now = {**vars(experiment), **experiment.recipe_options}
        asked |= asked.pop("recipe_options", {})
        other = [key for key, value in asked.items() if value != now.get(key)]
        if other:
            raise ValueError(
                f"{out} holds a run with other settings: {', '.join(other)} differ. Leave them out to go on with it, "
                "or choose another folder"
            )
    with _interrupts() as interrupted, ProgressLine(out.name) as line:

        def observe(state: Any) -> bool:
            last = state.history[-1] if state.history else {}
            robust = f", robust {last['robust_accuracy']:.1%}" if "robust_accuracy" in last else ""

            def note() -> str:
                return f"epoch {state.epoch + 1}, loss {state.figures.get('loss', 0.0):.3f}{robust}"

            line.show(state.step, note, total=state.total)
            return interrupted()

        if resume:
            result = runs.resume_run(out, model=settings.get("model"), observe=observe)
        else:
            result = runs.start_run(Experiment(**settings), out, observe=observe)
    if result.stopped:
        _say(result.stopped)
        _say(hint if interrupted() else f"what was learned before is in {out}")
        raise SystemExit(130 if interrupted() else 1)
    best = result.history[result.best_epoch]
    _say(
        f"{out.name}: {len(result.history)} epochs in {result.seconds:.0f} s; best epoch {result.best_epoch + 1}: "
        f"{best['clean_accuracy']:.1%} clean, {best['robust_accuracy']:.1%} under a light attack (held-out data)"
    )


def _assess(subject: Any, out: Path, *, speak: bool = True, **options: Any) -> None:
    """Evaluates with a progress line, and says the result; not in the silent ones of several processes."""
    from sparring.app.evaluate_folder import assess
    from sparring.app.progress import ProgressLine
    from sparring.results.read import read_results

    command = shlex.join(["sparring", *sys.argv[1:]])
    if not speak:
        assess(subject, out, command=command, **options)
        return
    with suppress(ValueError, OSError):  # none there, or one that cannot be read
        old = read_results(out / "results.json")
        _say(f"replacing the results in {out}: {old['threat']}, n = {old['robust_accuracy']['n']}")
    with ProgressLine(f"{options.get('name') or subject.name}: evaluating") as line:
        told: list[int] = []

        def observe(now: Any) -> None:
            if now.kept and not told:
                told.append(now.kept)
                _say(f"going on with {now.kept} of {now.batches} batches done")
            note = f"{now.done} examples, {_count(now.cost.forwards + now.cost.backwards)} passes, {now.running}"
            line.show(now.fraction or 0.0, note.rstrip(", "), total=None if now.fraction is None else 1.0)

        try:
            record = assess(subject, out, command=command, observe=observe, **options)
        except KeyboardInterrupt:
            if (out / "parts").exists():
                _say("the finished batches are kept; the same command goes on with them")
            raise
    assert record is not None  # only silent processes get none
    worst_first = ("invalid", "suspect", "note")
    for finding in sorted(record["findings"], key=lambda finding: worst_first.index(finding["level"])):
        next_step = f" {finding['next_step']}" if finding["next_step"] else ""
        _say(f"{finding['level']}: {finding['sentence']}{next_step}")
    clean, robust, certified = (record[f"{kind}_accuracy"] for kind in ("clean", "robust", "certified"))
    lower = f", certified at least {certified['value']:.1%}" if certified else ""
    typer.echo(
        f"{record['name']}: {clean['value']:.1%} clean, {robust['value']:.1%} robust at {record['threat']} "
        f"(95 % interval {robust['low']:.1%} to {robust['high']:.1%}, n = {robust['n']}, seed {record['seed']})"
        f"{lower}: {record['verdict'] or 'not checked'}"
    )


def _count(number: int) -> str:
    """A large number in three digits or so: 830, 12.4 k, 1.2 M.

    >>> _count(1234567)
    '1.2 M'
    """
    for size, unit in ((10**9, " G"), (10**6, " M"), (10**3, " k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return str(number)


def _demands(judged: Path, baseline: Path | None, **asked: Any) -> Any:
    """What the gate is asked, checked before anything is measured."""
    from sparring.results.gate import Demands, read_baseline

    return Demands(baseline=read_baseline(baseline, judged) if baseline else None, **asked)


def _gate(results: Path, demands: Any, baseline: Path | None) -> None:
    """Says what every check of the gate found; one that fails makes the exit code 1."""
    from sparring.results.gate import judge, paired
    from sparring.results.read import read_results

    decision = judge(read_results(results), demands)
    beside = paired(results, baseline) if baseline else None
    for note in (*decision.notes, *([beside] if beside else [])):
        _say(f"note: {note}")
    for check in decision.checks:
        typer.echo(f"{'pass' if check.passed else 'FAIL'}: {check.sentence}")
    if not decision.passed:
        raise SystemExit(1)


@contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C (or a polite kill) has come; the second one is not caught."""
    came: list[int] = []

    def note(number: int, frame: Any) -> None:
        if came:
            raise KeyboardInterrupt
        came.append(number)
        _say("stopping after this step, saved; once more stops at once")

    old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _summary(thing: Any) -> str:
    return (inspect.getdoc(thing) or "").splitlines()[0]


def _one_line(error: BaseException) -> str:
    text = getattr(error, "format_message", lambda: str(error))() or type(error).__name__
    return " ".join(str(text).split())


if __name__ == "__main__":
    main()
