"""The laws of the house, read from the syntax trees: who imports whom, how long, and what is never called."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sparring

SOURCE = Path(sparring.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
NAMES = {
    path: ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix("__init__").rstrip(".")
    for path in FILES
}

LOWER = {"core", "threats", "attacks"}
MAY_IMPORT: dict[str, set[str]] = {
    "core": {"core"},
    "threats": {"core", "threats"},
    "attacks": LOWER,
    "certify": {"core", "threats", "certify"},
    "training": LOWER | {"certify", "training"},
    "results": {"core", "results"},
    "evaluation": LOWER | {"certify", "evaluation", "results"},
    "checks": LOWER | {"checks", "evaluation", "results"},
    "report": {"core", "modalities", "report", "results"},
    "modalities": LOWER | {"certify", "training", "evaluation", "results", "quality", "modalities", "adapters"},
    "quality": {"core", "training", "quality"},
    "adapters": {"core", "adapters"},
}
"""A room that may import itself is named too. Nothing below the command knows the command."""
BELOW_APP = set(MAY_IMPORT)
MAY_IMPORT["app"] = BELOW_APP | {"app"}
MAY_IMPORT["__main__"] = {"app"}
SPEAKS = {"app", "__main__"}  # the command; everything else is a library


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> set[str]:
    """Dotted names of all modules that a file imports, wherever in the file."""
    found: set[str] = set()
    package = ["sparring", *path.relative_to(SOURCE).parent.parts]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            # `from sparring.core import noise` names a file too
            found |= {f"{whole}.{alias.name}" for alias in node.names} if whole.count(".") < 2 else {whole}
    return found


def rooms(names: set[str]) -> set[str]:
    return {name.split(".")[1] if "." in name else "" for name in names if name.split(".")[0] == "sparring"}


def complaints(path: Path) -> list[str]:
    room = NAMES[path].split(".")[0]
    if room == "":  # the package's own face
        return []
    if room not in MAY_IMPORT:
        return [f"{room} is a new room: say in MAY_IMPORT what it may import"]
    return [
        f"{NAMES[path]} imports {other or 'the package face'}"
        for other in sorted(rooms(imported(path)) - MAY_IMPORT[room])
    ]


@pytest.mark.parametrize("path", FILES, ids=[NAMES[p] or "sparring" for p in FILES])
def test_imports_go_one_way(path: Path) -> None:
    assert complaints(path) == []


def test_the_face_is_lazy_and_complete() -> None:
    assert rooms(imported(SOURCE / "__init__.py")) == set()
    assert sorted(set(dir(sparring)) & set(sparring.__all__)) == sparring.__all__
    assert all(getattr(sparring, name) is not None for name in sparring.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sparring.nothing


@pytest.mark.parametrize("arguments", ["--help", "gate --help", "gate nowhere", "report --help", "compare nowhere"])
def test_what_needs_no_torch_does_not_import_it(arguments: str) -> None:
    code = (
        f"import sys; sys.argv = ['sparring', *{arguments!r}.split()]\n"
        "from sparring.app.cli import main\n"
        "try: main()\nexcept SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("path", FILES, ids=[NAMES[p] or "sparring" for p in FILES])
def test_no_shared_room_knows_a_kind_of_input(path: Path) -> None:
    """A new kind of input touches its own folder and a line of text in `modalities`."""
    if not NAMES[path].startswith("modalities."):
        kinds = {folder.name for folder in (SOURCE / "modalities").iterdir() if folder.is_dir()}
        assert not [
            name for name in imported(path) if name.startswith("sparring.modalities.") and name.split(".")[2] in kinds
        ]


def test_the_reader_of_imports_sees_what_is_there() -> None:
    assert {"sparring.core.geometry", "sparring.core.noise", "torch"} <= imported(SOURCE / "threats" / "balls.py")
    assert rooms({"sparring.attacks.loop", "torch", "sparring"}) == {"attacks", ""}
    assert "training" not in MAY_IMPORT["evaluation"]
    assert "evaluation" not in MAY_IMPORT["training"]
    assert all("app" not in others for room, others in MAY_IMPORT.items() if room not in ("app", "__main__"))


BANNED_MODULES = {"torchvision", "pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", FILES, ids=[NAMES[p] or "sparring" for p in FILES])
def test_nothing_unsafe(path: Path) -> None:
    """Files that come from elsewhere must not be able to run code."""
    assert {name.split(".")[0] for name in imported(path)} & BANNED_MODULES == set()
    assert unsafe_calls(tree(path)) == []


@pytest.mark.parametrize("path", FILES, ids=[NAMES[p] or "sparring" for p in FILES])
def test_the_library_neither_prints_nor_seeds_globally(path: Path) -> None:
    if NAMES[path].split(".")[0] not in SPEAKS:
        assert meddling_calls(tree(path)) == []


def unsafe_calls(module: ast.Module) -> list[str]:
    found = []
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        options = {k.arg: k.value.value for k in node.keywords if k.arg and isinstance(k.value, ast.Constant)}
        if name in ("eval", "exec", "__import__", "os.system"):
            found.append(name)
        if name == "torch.load" and options.get("weights_only") is not True:
            found.append("torch.load without weights_only=True")
        if options.get("weights_only") is False or options.get("allow_pickle") is True or options.get("shell") is True:
            found.append(ast.unparse(node))
    return found


def meddling_calls(module: ast.Module) -> list[str]:
    names = [ast.unparse(node.func) for node in ast.walk(module) if isinstance(node, ast.Call)]
    banned = {"print", "torch.manual_seed", "np.random.seed", "numpy.random.seed", "random.seed", "logging.basicConfig"}
    return [name for name in names if name in banned]


@pytest.mark.parametrize(
    "code",
    ["eval('1')", "exec('1')", "torch.load(p)", "torch.load(p, weights_only=False)", "np.load(p, allow_pickle=True)"],
)
def test_the_reader_of_calls_sees_what_is_there(code: str) -> None:
    assert unsafe_calls(ast.parse(code))
    assert not unsafe_calls(ast.parse("model.eval(); torch.load(p, weights_only=True)"))


def test_the_reader_of_meddling_sees_what_is_there() -> None:
    assert meddling_calls(ast.parse("torch.manual_seed(0)\nif x:\n    print(x)")) == ["torch.manual_seed", "print"]
    assert not meddling_calls(ast.parse("generator.manual_seed(0); report.print(1)"))


@pytest.mark.parametrize("path", FILES, ids=[NAMES[p] or "sparring" for p in FILES])
def test_no_file_and_no_function_is_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 400
    assert [name for name, lines in functions(tree(path)) if lines > 60] == []


def functions(module: ast.Module) -> list[tuple[str, int]]:
    """Every function with its number of lines, decorators left out."""
    found = [node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node.name, (node.end_lineno or node.lineno) - node.lineno + 1) for node in found]


def public_names(module: ast.Module) -> set[str]:
    """What a file defines at its top level for others."""
    found: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_no_two_public_things_share_a_name() -> None:
    where: dict[str, list[str]] = {}
    for path in FILES:
        for name in public_names(tree(path)) - {"MODALITY"}:  # each kind of input has its own
            where.setdefault(name, []).append(NAMES[path])
    assert {name: files for name, files in where.items() if len(files) > 1} == {}


def test_the_reader_of_definitions_sees_what_is_there() -> None:
    module = ast.parse("A, (b, _c) = 1, (2, 3)\nd: int = 4\nclass E:\n    f = 5\ndef g():\n    h = 6\n\n")
    assert public_names(module) == {"A", "b", "d", "E", "g"}
    assert functions(module) == [("g", 2)]


def test_the_core_can_be_read_in_one_sitting() -> None:
    core = ["core/types.py", "threats/balls.py", "attacks/loop.py", "attacks/catalogue.py", "training/recipes.py"]
    lengths = {name: len((SOURCE / name).read_text(encoding="utf-8").splitlines()) for name in core}
    assert sum(lengths.values()) < 850, lengths
