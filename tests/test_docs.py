"""The documents' code runs, block by block; their commands parse; the proof of the core keeps to its lines."""

from __future__ import annotations

import ast
import re
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

from sparring import Linf
from sparring.app.cli import app
from sparring.attacks.plans import make_plan
from sparring.results.statistics import wilson
from sparring.training.named import RECIPES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXTRAS = ("keras", "transformers", "lightning")
CORE = ("core/types.py", "threats/balls.py", "attacks/loop.py", "attacks/catalogue.py", "training/recipes.py")


class Block(NamedTuple):
    """A fenced block: its language, the words after it, the line of its first line of code, and the code."""

    language: str
    words: list[str]
    line: int
    code: str


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        line = text[: match.start(3)].count("\n") + 1
        found.append(Block(match[1], match[2].split(), line, match[3]))
    return found


def commands(block: Block) -> list[list[str]]:
    """The arguments of each `sparring ...` line of a shell block."""
    lines = block.code.replace("\\\n", " ").splitlines()
    words = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == ["sparring"]]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """```python blocks share a namespace; a file name after the language saves the block too; ```sh run is run."""
    for extra in EXTRAS:
        if re.search(rf"^(?:import|from) {extra}\b", page.read_text(encoding="utf-8"), re.MULTILINE):
            pytest.importorskip(extra, reason=f"{extra} is not installed")
            warnings.simplefilter("ignore")  # pytest puts the filters back; what these libraries warn of is theirs
    monkeypatch.chdir(tmp_path)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up
    with torch.random.fork_rng(devices=[]):
        for block in blocks(page):
            if block.language == "python" and block.words != ["no-run"]:
                for name in block.words:
                    Path(name).write_text(block.code, encoding="utf-8")
                # blank lines in front, so that a traceback names the line of the page
                code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
                exec(code, vars(module))
            if block.language == "sh" and block.words == ["run"]:
                for arguments in commands(block):
                    result = CliRunner().invoke(app, arguments)
                    assert result.exit_code == 0, (arguments, result.output, result.exception)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_parse(page: Path) -> None:
    """Every command and option that a page names exists."""
    group = typer.main.get_command(app)
    for block in blocks(page):
        for arguments in commands(block) if block.language in ("sh", "bash", "console") else []:
            name, command, rest = group.resolve_command(group.make_context("sparring", arguments), arguments)
            assert command.make_context(name, rest).info_name == name


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{name_of(page)} links to {target}"


def proof() -> ast.Module:
    """The Python of adding-your-own.md as one module."""
    page = ROOT / "docs" / "adding-your-own.md"
    return ast.parse("".join(block.code for block in blocks(page) if block.language == "python"))


@pytest.mark.parametrize("piece", ["my_fgsm", "WholeStep", "random_corners", "Scaled", "LogitPairing", "logit_pairing"])
def test_a_piece_of_your_own_takes_five_to_fifteen_lines(piece: str) -> None:
    """Decorators, signature, body and docstring count, blank lines do not."""
    page = ROOT / "docs" / "adding-your-own.md"
    source = "".join(block.code for block in blocks(page) if block.language == "python")
    node = next(n for n in proof().body if getattr(n, "name", None) == piece)
    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
    lines = [line for line in source.splitlines()[first - 1 : node.end_lineno] if line.strip()]
    assert 5 <= len(lines) <= 15, len(lines)


def test_what_the_pieces_import_is_seen_in_the_five_files() -> None:
    """No name that the reader of the core has not met, but for the tools that the page introduces itself."""
    core = "\n".join((ROOT / "src" / "sparring" / name).read_text(encoding="utf-8") for name in CORE)
    seen = set(re.findall(r"\w+", core)) | {"evaluate", "check_threat", "train", "Ramp", "Ramped"}
    imports = [node for node in ast.walk(proof()) if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imports if node.module.startswith("sparring") for alias in node.names}
    assert {"Attack", "Ball", "Attacker", "Ascent", "Noise"} <= names  # the search finds them
    of_a_modality = {"MODALITIES", "Dataset", "Modality", "find", "load_data"}  # the page's last section is about them
    assert names <= seen | of_a_modality, names - seen


# The numbers in how-to-choose.md


CHOICES = (ROOT / "docs" / "how-to-choose.md").read_text(encoding="utf-8")


class Count(torch.autograd.Function):
    """The identity, which counts the examples that pass in either direction."""

    passed: ClassVar[list[int]] = [0, 0]

    @staticmethod
    def forward(context: Any, x: torch.Tensor) -> torch.Tensor:
        Count.passed[0] += len(x)
        return x.clone()

    @staticmethod
    def backward(context: Any, grad: torch.Tensor) -> torch.Tensor:
        Count.passed[1] += len(grad)
        return grad


class Counted(nn.Module):
    """A network so sure of class 0 that every example stands."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)
        with torch.no_grad():
            self.layer.bias.copy_(torch.tensor([9.0, 0.0, 0.0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return Count.apply(self.layer(x))


def passes(run: Callable[[nn.Module, torch.Tensor, torch.Tensor], Any]) -> str:
    """Forwards and backwards per example, as the tables write them."""
    Count.passed[:] = [0, 0]
    run(Counted(), torch.rand(8, 4), torch.zeros(8, dtype=torch.int64))
    forwards, backwards = (count // 8 for count in Count.passed)
    return f"{forwards} forward{'s' * (forwards > 1)}, {backwards} backward{'s' * (backwards > 1)}"


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "ibp"])  # whose bounds are no calls of the model
def test_how_to_choose_counts_the_passes_of_recipes(name: str) -> None:
    recipe = RECIPES[name](Linf(0.1), **({"others": "l2:0.5"} if name == "multi-norm" else {}))
    found = passes(lambda model, x, y: recipe(model, x, y).backward())
    assert re.search(rf"^\| `{name}` \|.*\| {found} \|$", CHOICES, re.MULTILINE), found


@pytest.mark.parametrize("text", ["`fgsm`", "`pgd:num_steps=20`", "`autoattack-rand`"])
def test_how_to_choose_counts_the_passes_of_attacks(text: str) -> None:
    named = make_plan(text.strip("`"), Linf(0.1))
    found = passes(lambda model, x, y: [attack(Linf(0.01))(model, x, y) for attack in named])
    assert re.search(rf"^\| {re.escape(text)} \|.*\| {found} \|$", CHOICES, re.MULTILINE), found


def test_how_to_choose_knows_the_intervals() -> None:
    widths = [f"{100 * (wilson(n // 2, n).high - 0.5):.1f}" for n in (100, 1000, 10000)]
    first, second, third = widths
    text = " ".join(CHOICES.split())
    assert f"100 examples leave {first} points either way, 1,000 leave {second}, 10,000 leave {third}." in text


def test_every_recipe_and_threat_that_how_to_choose_names_exists() -> None:
    from sparring import make_threat
    from sparring.training.named import RECIPES

    threats = re.findall(r"`((?:linf|l2):[^`]+)`", CHOICES)
    assert threats and all(make_threat(text.replace("R", "1")).radius > 0 for text in threats)
    recipes = set(re.findall(r"--recipe (\S+)", CHOICES))
    assert recipes and recipes <= set(RECIPES)
