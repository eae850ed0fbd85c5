"""Bad input, drawn: calls of the Python API and commands with one thing wrong, and what a good refusal is."""
# ruff: noqa: E501  (tables of what is wrong, a row each)

from __future__ import annotations

import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import nn

import sparring

SECONDS = 60
"""After which a call counts as hung."""
OURS = (str(Path(sparring.__file__).parent), "/typer/", "/click/", "/pydantic/", "argparse")
K, B, D = 3, 12, 4


def faults(error: BaseException) -> list[str]:
    """In what an error falls short of one sentence of ours; [] for a good one."""
    text, last = str(error) or error.__class__.__name__, traceback.extract_tb(error.__traceback__)[-1]
    text = getattr(error, "format_message", lambda: text)()
    found = []
    if not isinstance(error, ValueError | TypeError | OSError | ImportError) and not hasattr(error, "format_message"):
        found.append(f"kind {type(error).__name__}")
    if not any(part in last.filename for part in OURS):
        found.append(f"raised in {last.filename}:{last.lineno}")
    if len(text.split()) < 5:
        found.append("fewer than five words")
    return [f"{type(error).__name__}: {text[:300]}: {', '.join(found)}"] if found else []


@contextmanager
def in_time() -> Iterator[None]:
    """Raises TimeoutError where the body takes longer than a call may."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# Python --------------------------------------------------------------------------------------------------------------


class Odd(nn.Module):
    """A classifier whose output somebody spoiled; it prints as its number alone."""

    def __init__(self, spoil: Callable[[Any], Any]) -> None:
        super().__init__()
        self.layer, self.spoil = nn.Linear(D, K), spoil

    def forward(self, x: Any) -> Any:
        return self.spoil(self.layer(x))


def fails(logits: Any) -> Any:
    raise RuntimeError("out of paper")


def good() -> dict[str, Any]:
    """What makes a good call of everything; one of them is spoiled."""
    draw = torch.Generator().manual_seed(0)
    return {
        "model": Odd(lambda s: s).eval(), "x": torch.rand(B, D, generator=draw), "y": torch.arange(B) % K,
        "threat": "linf:0.1", "attacks": "fgsm", "seed": 0, "curve": (1.0,), "num_epochs": 1, "averaging": None,
        "smooth": None, "certify": "auto", "batches": None, "class_weights": None, "label_smoothing": 0.0,
    }  # fmt: skip


X, Y = torch.rand(B, D, generator=torch.Generator().manual_seed(0)), torch.arange(B) % K
SPOILED: dict[str, list[Any]] = {
    "x": [X.numpy(), X.tolist(), None, "x", (X * 255).to(torch.uint8), X.long(), X + 5, X - 1, X / 0, X * float("nan"),
          X[0], X[:0], X.bool(), X.to(torch.complex64), X[:, :2], X[..., None], X.to_sparse(), {"a": X}, [X, X]],
    "y": [Y.numpy(), Y.tolist(), None, "y", Y + 0.5, Y - 1, Y + 1, Y[:5], Y[:, None].expand(-1, 2), X,
          Y.to(torch.complex64), Y / 0.0, Y - 100, torch.tensor(0), torch.full((B,), 2**62), Y * float("nan")],
    "model": [None, "net", nn.Linear, Odd(lambda s: {"a": s}), Odd(lambda s: (s, s)), Odd(lambda s: s[..., None, None]),
              Odd(lambda s: s[:3]), Odd(lambda s: s.argmax(1)), Odd(lambda s: None),
              Odd(fails), Odd(lambda s: s[:, :2]), Odd(lambda s: s.detach().numpy()), Odd(lambda s: s.to(torch.complex64)),
              nn.Linear(7, K), 3, Odd(lambda s: [s])],
    "threat": ["linf", "linf:", "linf:x", "linf:nan", "linf:-1", "linf:0.1,box=1..0", "linf:0.1,bx=none", "", "l3:1",
               "linf:0.1,linf:0.2", 'linf:"0.1', None, 0.1, [], "l2:1,box=a..b", "linf:0.1,box=nan..1", "words:1", "l1:-0.1",
               sparring.Linf, "nets.py:nothing", "linf:0/0"],
    "attacks": ["", "pgd:num_steps=0", "pgd:num_steps=-1", "pgd:num_steps=nan", "pgd:steps=3", "ggd", "pgd,", None, 7,
                [], [None], ["pgd"], "pgd:step=nan", "pgd:step=0", "pgd:step=-1", "fgsm:num_steps=3", "pgd:restarts=0",
                "num_steps=3", "pgd:objective=mse", "square:num_queries=0", 'pgd:"', "a.py:b", "mi-fgsm:decay=-1",
                "apgd:num_steps=0", "fab:num_steps=-1"],
    "seed": ["a", 1.5, None, 2**70, [0]],
    "curve": [(-1.0,), (float("nan"),), "x", (None,), 3, (float("inf"),)],
    "num_epochs": ["3", -1, None, 1.5, float("nan")],
    "averaging": [2.0, -1.0, "x", 1.0, float("nan")],
    "smooth": [-1.0, float("nan"), "x", float("inf")],
    "certify": ["x", 3, "", []],
    "batches": [[], None, 3, "data", [3], [(X,)], [(X, Y, Y)], [{"x": X}], (X, Y), X, [[]], [None], {},
                [(X[:0], Y[:0])]],
    "class_weights": [(1.0,), (1.0, 2.0), (0.0, 1.0, 1.0), "x", 3, (1.0, float("nan"), 1.0), (-1.0, 1.0, 1.0)],
    "label_smoothing": [-0.1, 1.5, "x", float("nan"), None],
}  # fmt: skip
USES = {
    "evaluate": ("model", "x", "y", "threat", "attacks", "seed", "curve", "smooth", "certify", "batches"),
    "attack": ("model", "x", "y", "threat", "attacks"),
    "recipe": ("model", "x", "y", "threat", "class_weights", "label_smoothing"),
    "train": ("model", "x", "y", "threat", "seed", "num_epochs", "averaging", "batches", "class_weights"),
}


class BadCall(NamedTuple):
    """A function, which argument is spoiled, and how."""

    function: str
    argument: str
    number: int

    def __repr__(self) -> str:
        return f"{self.function} with {self.argument} = {SPOILED[self.argument][self.number]!r:.120}"


@st.composite
def bad_calls(draw: Any) -> BadCall:
    function = draw(st.sampled_from(sorted(USES)))
    argument = draw(st.sampled_from(USES[function]))
    return BadCall(function, argument, draw(st.integers(0, len(SPOILED[argument]) - 1)))


def run_call(call: BadCall) -> Any:
    """Does it."""
    given = {**good(), call.argument: SPOILED[call.argument][call.number]}
    batches = given["batches"] if call.argument == "batches" else [(given["x"], given["y"])]
    if call.function == "evaluate":
        options = {name: given[name] for name in ("seed", "curve", "smooth", "certify")}
        options["smooth"] = given["smooth"]
        return sparring.evaluate(given["model"], batches, given["threat"], given["attacks"], checks=False, **options)
    threat = sparring.make_threat(given["threat"])
    if call.function == "attack":
        stages = sparring.make_plan(given["attacks"], threat)
        return [stage(threat)(given["model"], given["x"], given["y"]) for stage in stages]
    recipe = sparring.pgd_at(
        threat, num_steps=2, class_weights=given["class_weights"], label_smoothing=given["label_smoothing"]
    )
    if call.function == "recipe":
        return recipe(given["model"], given["x"], given["y"])
    model = given["model"]
    optimizer = torch.optim.SGD(model.parameters() if isinstance(model, nn.Module) else [nn.Parameter(X)], 0.1)
    options = {name: given[name] for name in ("seed", "num_epochs", "averaging")}
    return sparring.train(model, batches, recipe, optimizer, **options)


# The command line ----------------------------------------------------------------------------------------------------


def shop(folder: Path) -> None:
    """Good files, and files with something wrong."""
    np.savez(folder / "good.npz", x_train=np.tile(X, (5, 1)), y_train=np.tile(Y, 5), x_test=X, y_test=Y)
    np.savez(folder / "short.npz", x_train=X, y_train=Y[:3], x_test=X, y_test=Y)
    np.savez(folder / "other.npz", a=X)
    (folder / "nets.py").write_text(
        "from torch import nn\nimport os, sys\n"
        f"def good(): return nn.Linear({D}, {K})\n"
        "def fails(): raise RuntimeError('out of paper')\ndef leaves(): sys.exit(0)\ndef none(): pass\nnumber = 7\n"
        "def data(): return [1, 2]\ndef needs(a, b): return a\n"
    )
    (folder / "broken.py").write_text("def (:\n")
    (folder / "text.txt").write_text("no archive")
    (folder / "settings.toml").write_text("epochs = 'many'\n")
    (folder / "broken.toml").write_text("= 3\n")
    (folder / "list.json").write_text("[1, 2]")
    torch.save(nn.Linear(9, 9).state_dict(), folder / "other.pt")
    (folder / "empty").mkdir()
    (folder / "half").mkdir()
    (folder / "half" / "config.json").write_text('{"schema": "sparring.run/2"}')
    (folder / "results").mkdir()
    (folder / "results" / "results.json").write_text('{"schema": "sparring.results/2"}')


ANY = ["", " ", "\0", "-", "ä", "🙂", "a b", "../..", "/", "~", "nan", "inf", "-1", "1e400", "0x10", "%s", "{x}",
       "a" * 300, "'", '"', ",", ":", "=", ":=,", "text.txt", "empty", "half", "nowhere", "good.npz:x", "\n"]  # fmt: skip
NUMBERS = ["-1", "x", "", "1.5", "nan", "1e9", "99999999999999999999", "--", "0x1", "1,000", "½"]  # fmt: skip
BAD: dict[str, list[str]] = {
    "--data": [*ANY, "short.npz", "other.npz", "nets.py:none", "nets.py:data", "nets.py:fails", "nets.py:leaves",
               "nets.py:nothing", "broken.py:data", "digits,size=3", "images:", "images:nowhere", "mnist:x", "text:good.npz",
               "table:good.npz", "faces:empty", "good.npz,first_label=x", "good.npz,first_label=9", "good.npz,good.npz"],
    "--threat": [*ANY, *(t for t in SPOILED["threat"] if isinstance(t, str)), "linf:0.1,box=0..0.001", "nets.py:none"],
    "--model": [*ANY, "nets.py:fails", "nets.py:leaves", "nets.py:none", "nets.py:number", "nets.py:nothing", "broken.py:a",
                "mlp:3", "mlp,hidden=x", "cnn-small", "nets.py:needs", "nets.py:good,a=1", "mlp,normalize=x", "mlp,normalize=0/0"],
    "--weights": ["nowhere", "text.txt", "other.pt", "empty", "good.npz", "other.pt:x", "", "\0"],
    "--recipe": [*ANY, "pgd-at:num_steps=0", "pgd-at:num_steps=-3", "trades:beta=-1", "trades:beta=nan", "pgd", "nets.py:none",
                 "trades,steps=3", "mixed:share=0", "mixed:share=2", "pgd-at:step=nan", "pgd-at:craft_mode=x"],
    "--attacks": [*ANY, *(a for a in SPOILED["attacks"] if isinstance(a, str)), "nets.py:none"],
    "--epochs": [*NUMBERS, "0"], "--batch-size": [*NUMBERS, "0"], "--num-examples": [*NUMBERS, "0"],
    "--seed": [n for n in NUMBERS if n != "1e9"], "--smooth": ["-1", "0", "x", "nan", "inf"],
    "--device": ["gpu", "cuda:99", "x", "", "cpu:7", "mps:1"], "--split": ["x", "", "Train"],
    "--certify": ["x", "", "yes"], "--config": ["nowhere", "settings.toml", "broken.toml", "list.json", "empty", "text.txt", ""],
    "--set": ["x", "=", "=3", "epochs=x", "epochs=0", "unknown=3", "crop=x", "averaging=2", "learning_rate=-1",
              "class_weights=x", "class_weights=1..2", "schedule=x", "optimizer=x", "radius_ramp=7", "held_out=-1", "\0=1"],
    "--min-robust": ["x", ""], "--baseline": ["nowhere", "empty", "text.txt"], "--min": ["x", "a=x", "=", "a=nan"],
    "--checkpoint": ["x", "", "../best"], "--to": ["x", ""], "--format": ["x", ""], "--out": ["text.txt", "\0", "text.txt/a"],
    "--unknown": ["1"], "FOLDER": [*ANY, "results", "list.json", "good.npz"],
}  # fmt: skip
COMMANDS: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "train": (
        ["--data", "good.npz", "--threat", "linf:0.1", "--epochs", "1", "--out", "new"],
        ("--data", "--threat", "--model", "--weights", "--recipe", "--epochs", "--batch-size", "--seed", "--device",
         "--config", "--set", "--unknown", "--out"),
    ),
    "evaluate": (
        ["--data", "good.npz", "--threat", "linf:0.1", "--model", "nets.py:good", "--attacks", "fgsm", "--no-checks",
         "--out", "new"],
        ("--data", "--threat", "--model", "--weights", "--attacks", "--batch-size", "--num-examples", "--seed", "--smooth",
         "--device", "--split", "--certify", "--checkpoint", "--min-robust", "--baseline", "--min", "--unknown", "--out",
         "FOLDER"),
    ),
    "attack": (
        ["--data", "good.npz", "--threat", "linf:0.1", "--model", "nets.py:good", "--attacks", "fgsm", "--out", "new.npz"],
        ("--data", "--threat", "--model", "--weights", "--attacks", "--num-examples", "--seed", "--out"),
    ),
    "gate": (["FOLDER"], ("FOLDER", "--unknown")), "report": (["FOLDER"], ("FOLDER",)),
    "compare": (["FOLDER"], ("FOLDER", "--format")), "export": (["FOLDER"], ("FOLDER", "--to")),
    "list": (["FOLDER"], ("FOLDER",)),
}  # fmt: skip


@st.composite
def bad_commands(draw: Any) -> tuple[str, ...]:
    """The words of a command of which one value is bad: from the list, or drawn text without a meaning."""
    command = draw(st.sampled_from(sorted(COMMANDS)))
    words, spoils = COMMANDS[command]
    option = draw(st.sampled_from(spoils))
    letters = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), min_size=1, max_size=12)
    nonsense = letters.filter(lambda text: not text.startswith("-")).map(lambda text: "?" + text)
    listed = st.sampled_from(BAD[option]) if option in BAD else nonsense
    value = draw(listed if option == "--out" else listed | nonsense)  # any name will do for a folder to write
    rest = [word if word != "FOLDER" else "nowhere" for word in words]
    if option == "FOLDER":
        return (
            command,
            *(value if word == "FOLDER" else word for word in words),
            *([value] if "FOLDER" not in words else []),
        )
    if option in rest:
        rest[rest.index(option) + 1] = value
        return (command, *rest)
    return (command, *rest, option, value)
