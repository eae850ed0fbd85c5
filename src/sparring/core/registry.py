"""The one grammar by which a text names a thing: NAME[:VALUE][,KEY=VALUE...], looked up in a table of builders.

FILE.py:FUNCTION stands wherever a name does. What holds commas, colons or blanks goes into double quotes ("" is a quote
there). In a list a part without `=` begins the next item. The builder's signature says what options there are.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import importlib.util
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from contextlib import chdir, suppress
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

Builder = Callable[..., Any]

_FILE = re.compile(r"(.*\.py):([^:]*)", re.DOTALL)
_HEAD = re.compile(r'([^"]*\.py:[^:]*|"[^"]*\.py":[^:]*|"(?:[^"]|"")*"|[^:]*)(?::(.*))?', re.DOTALL)
_OPTION = re.compile(r"\s*([A-Za-z_]\w*)\s*=(.*)", re.DOTALL)
_COMMA = re.compile(r',(?=(?:[^"]*"[^"]*")*[^"]*$)')  # one that an even number of quotes follows


class Spec(NamedTuple):
    """A text taken apart; nothing has been looked up yet."""

    name: str
    value: str | None
    options: tuple[tuple[str, str], ...]
    text: str


@dataclass(frozen=True)
class Option:
    """What a builder takes under one key: `kind` in words, the default (`inspect.Parameter.empty`: none), named choices
    and the objects they stand for, and whether it is the VALUE of NAME:VALUE."""

    kind: str
    default: Any
    choices: Mapping[str, Any]
    read: Callable[[str], Any]
    positional: bool


@dataclass(frozen=True)
class Named:
    """A builder with its options, waiting for what it is given; `str` is the text that makes it again.

    `options` are plain values (numbers, texts, pairs, None), whatever object the builder gets for them.
    """

    name: str
    options: Mapping[str, Any]
    builder: Builder
    given: tuple[str, ...] = ()

    def __call__(self, *given: Any) -> Any:
        """What the builder makes of the options and of what it is given, which it gets by name where it asks for it."""
        known, asked = options_of(self.builder, self.given), inspect.signature(self.builder).parameters
        handed = {name: value for name, value in zip(self.given, given, strict=False) if name in asked}
        chosen = {key: known[key].choices.get(v, v) if isinstance(v, str) else v for key, v in self.options.items()}
        return self.builder(**handed, **chosen)

    def __str__(self) -> str:
        known, file = options_of(self.builder, self.given), _FILE.fullmatch(self.name)
        ordered = sorted(self.options.items(), key=lambda pair: not known[pair[0]].positional)
        parts = [("" if known[key].positional else f"{key}=") + text_of(value) for key, value in ordered]
        name = self.name if file and not re.search(r'[,"\s]', self.name) else text_of(self.name)
        return name + ("," if file else ":") * bool(parts) + ",".join(parts)

    def but(self, **changes: Any) -> Named:
        """The same with other options, as plain values; raises ValueError for what the builder does not take."""
        _only(changes, options_of(self.builder, self.given), self.name)
        return replace(self, options={**self.options, **changes})


def parse(text: str) -> Spec:
    """The one thing that the text names, taken apart. Raises ValueError with the right form.

    >>> parse("linf:8/255,box=none")
    Spec(name='linf', value='8/255', options=(('box', 'none'),), text='linf:8/255,box=none')
    """
    first, *others = parse_list(text)
    if others:
        raise ValueError(
            f"{text!r} names several things, {first.text!r} and {others[0].text!r}, where one is expected; write "
            "NAME:VALUE,KEY=VALUE, with double quotes around what holds commas, colons or blanks"
        )
    return first


def parse_list(text: str) -> tuple[Spec, ...]:
    """The things that a comma-separated text names, taken apart, at least one. Raises ValueError with the right form.

    >>> [spec.name for spec in parse_list("fgsm,pgd:num_steps=20,step=0.1,nets.py:attack,k=3")]
    ['fgsm', 'pgd', 'nets.py:attack']
    """
    if not isinstance(text, str):
        raise TypeError(f"got a {type(text).__name__}; expected a text such as linf:8/255 or pgd:num_steps=20")
    if text.count('"') % 2:
        raise ValueError(f'{text!r} has a double quote that nothing closes; within quotes write "" for "')
    found: list[Spec] = []
    for part in map(str.strip, _COMMA.split(text)):
        if option := _OPTION.fullmatch(part):
            if not found:
                raise ValueError(f"{text!r} begins with an option; write NAME:KEY=VALUE, for example pgd:num_steps=20")
            pair, last = (option[1], _unquoted(option[2])), found[-1]
            found[-1] = last._replace(options=(*last.options, pair), text=f"{last.text},{part}")
            continue
        head = _HEAD.fullmatch(part)
        assert head is not None  # its last form holds everything
        name, rest = head.groups()
        option = _OPTION.fullmatch(rest or "")
        value = None if rest is None or option else _unquoted(rest)
        found.append(Spec(_unquoted(name), value, ((option[1], _unquoted(option[2])),) if option else (), part))
    return tuple(found)


def named(spec: Spec | str, table: Mapping[str, Builder], kind: str, given: tuple[str, ...] = ("threat",)) -> Named:
    """The builder that the text names, its options checked and read by its signature.

    kind: what errors call it, such as "attack". given: the names of parameters that the caller hands over, and no text
    may say. FILE.py:FUNCTION runs the user's file. Raises ValueError, TypeError and FileNotFoundError.

    >>> def ball(radius: float, *, box: tuple[float, float] | None = (0, 1)) -> str:
    ...     return f"{radius:g} in {box}"
    >>> made = named("ball:1/4,box=-3..3", {"ball": ball}, "threat", given=())
    >>> made(), str(made.but(box=None))
    ('0.25 in (-3.0, 3.0)', 'ball:0.25,box=none')
    """
    spec = spec if isinstance(spec, Spec) else parse(spec)
    builder, about = _find(spec.name, table, kind), f"{kind} {spec.text!r}"
    known = options_of(builder, given)
    first = next((key for key, option in known.items() if option.positional), None)
    pairs = list(spec.options)
    if spec.value is not None:
        if first is None:
            raise ValueError(f"{about}: {spec.name} takes options KEY=VALUE alone: {', '.join(known) or 'none'}")
        pairs.insert(0, (first, spec.value))
    texts = dict(pairs)
    if len(texts) < len(pairs):
        raise ValueError(f"{about} gives an option twice")
    _only(texts, known, about)
    options = {}
    for key, text in texts.items():
        try:
            options[key] = known[key].read(text)
        except (ValueError, KeyError, ZeroDivisionError):
            raise ValueError(f"{about}: {key}={text!r} is not {known[key].kind}") from None
    for key, option in known.items():
        if option.default is inspect.Parameter.empty and key not in options:
            form = f"{spec.name}:{key.upper()}" if option.positional else f"{key}=..."
            own = given and spec.name not in table  # a user's function may have another name for what it is handed
            handed = f" (what the caller hands over is called {', '.join(given)})" if own else ""
            raise ValueError(f"{about} lacks its {key}, {option.kind}; write {form}{handed}")
    return Named(spec.name if spec.name in table or ":" in spec.name else spec.name.lower(), options, builder, given)


def options_of(builder: Builder, given: tuple[str, ...] = ("threat",)) -> dict[str, Option]:
    """What a builder takes as text, by key; what no text can say is left out.

    >>> def attack(threat: object, *, num_steps: int = 10, keep: Literal["last", "best"] = "best") -> None: ...
    >>> {key: (option.kind, option.default) for key, option in options_of(attack).items()}
    {'num_steps': ('a whole number', 10), 'keep': ('one of last, best', 'best')}
    """
    found: dict[str, Option] = {}
    for p in inspect.signature(builder, eval_str=True).parameters.values():
        union = get_origin(p.annotation) in (Union, types.UnionType)
        kinds = [kind for hint in (get_args(p.annotation) if union else (p.annotation,)) if (kind := _kind(hint))]
        words = " or ".join(word for word, _, _ in kinds)
        if words not in ("", "none") and p.name not in given and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY):
            choices = {name: value for _, several, _ in kinds for name, value in several.items()}
            first = p.kind is p.POSITIONAL_OR_KEYWORD and not any(option.positional for option in found.values())
            readers = sorted((read for _, _, read in kinds), key=lambda read: read is str)  # which reads "none", too
            found[p.name] = Option(words, p.default, choices, _either(readers), first)
    return found


def name_of(make: Any) -> str:
    """What reports call an attack: its text form, the function's name, a partial with its options."""
    if isinstance(make, functools.partial):
        options = ",".join(f"{key}={text_of(value)}" for key, value in make.keywords.items())
        return f"{name_of(make.func)}:{options}" if options else name_of(make.func)
    if is_dataclass(make):
        return str(make)
    return getattr(make, "__name__", type(make).__name__)


def text_of(value: Any) -> str:
    """A plain value as the grammar writes it.

    >>> [text_of(value) for value in (8 / 255, 0.5, None, (-3.0, 3.0), "a, b")]
    ['8/255', '0.5', 'none', '-3..3', '"a, b"']
    """
    if value is None or isinstance(value, tuple):
        return "none" if value is None else "..".join(map(text_of, value))
    if isinstance(value, float):
        over_255 = round(value * 255) if abs(value) < 1e6 else 0
        exact = f"{over_255}/255" if over_255 / 255 == value else repr(value)
        return f"{value:g}" if float(f"{value:g}") == value else exact
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if text and not re.search(r'[,:="\s]', text) else '"' + text.replace('"', '""') + '"'


def function_from_file(spec: str, kind: str = "function") -> Builder:
    """The function of a user's file: "path/to/file.py:function". The file's code is run: only name files you trust.

    A file that has not changed is run once, so that its classes stay the same. Raises FileNotFoundError for a missing
    file, ValueError where it fails or has no such name, TypeError where the name is no function.
    """
    match, about = _FILE.fullmatch(spec), f"{kind} {spec!r}"
    if not match or not match[2].isidentifier():
        raise ValueError(f"{about}: expected FILE.py:FUNCTION, such as nets.py:make")
    path, name = Path(match[1]).expanduser(), match[2]
    if not path.is_file():
        raise FileNotFoundError(f"{about}: there is no file {path.resolve()}")
    module = _run(path, about)
    function: Any = getattr(module, name, None)
    if not hasattr(module, name):
        public = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ValueError(f"{about}: {path} has no function {name!r}; it has {', '.join(public) or 'none'}")
    if not callable(function):
        raise TypeError(f"{about}: {name} is a {type(function).__name__}; expected a function")
    return function


def _run(path: Path, about: str) -> types.ModuleType:
    """The file as a module under a private name, which stays registered: classes look it up."""
    key = str(path.resolve()).encode() + b"\0" + path.read_bytes()
    private = "_sparring_file_" + hashlib.sha256(key).hexdigest()[:16]
    if private in sys.modules:
        return sys.modules[private]
    found = importlib.util.spec_from_file_location(private, path)
    assert found is not None and found.loader is not None  # a .py file always has a loader
    module = sys.modules[private] = importlib.util.module_from_spec(found)
    try:
        with chdir(Path.cwd()):  # wherever the file goes, the command's own paths stay where they were
            found.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[private]
        hint = f"; files beside it are found with PYTHONPATH={path.parent}" if isinstance(error, ImportError) else ""
        raise ValueError(f"{about}: {path} does not run: {type(error).__name__}: {error}{hint}") from error
    return module


def _find(name: str, table: Mapping[str, Builder], kind: str) -> Builder:
    if _FILE.fullmatch(name):
        return function_from_file(name, kind)
    builder = table.get(name, table.get(name.lower()))
    if builder is None:
        close = difflib.get_close_matches(name.lower(), table, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{kind} {name!r} is unknown; there are {', '.join(table)}, or FILE.py:FUNCTION{hint}")
    return builder


def _only(keys: Mapping[str, Any], known: Mapping[str, Option], about: str) -> None:
    for key in keys:
        if key not in known:
            raise ValueError(f"{about} has no option {key!r}; it takes {', '.join(known) or 'none'}")


def read_number(text: str) -> float:
    """A number or a fraction: 0.3, 8/255, inf. Raises ValueError and ZeroDivisionError."""
    over, slash, under = text.partition("/")
    return float(over) / float(under) if slash else float(over)


def _range(text: str) -> tuple[float, float]:
    low, _, high = text.partition("..")
    return read_number(low), read_number(high)


def _either(readers: list[Callable[[str], Any]]) -> Callable[[str], Any]:
    """The first reader that can read the text."""

    def read(text: str) -> Any:
        for reader in readers[:-1]:
            with suppress(ValueError, KeyError, ZeroDivisionError):
                return reader(text)
        return readers[-1](text)

    return read


_boolean = {"true": True, "True": True, "false": False, "False": False}.__getitem__
_none = {"none": None, "None": None}.__getitem__
_KINDS: dict[Any, tuple[str, Callable[[str], Any]]] = {
    bool: ("true or false", _boolean),
    int: ("a whole number", int),
    float: ("a number such as 0.3 or 8/255", read_number),
    tuple[float, float]: ("LOW..HIGH", _range),
    str: ("a text", str),
    types.NoneType: ("none", _none),
    inspect.Parameter.empty: ("a value", _either([int, read_number, _boolean, _none, str])),  # where no type says so
}


def _kind(hint: Any) -> tuple[str, Mapping[str, Any], Callable[[str], Any]] | None:
    """What errors call values of a type, its named choices, and how it is read; None for types that have no text."""
    choices = {str(value): value for value in get_args(hint)} if get_origin(hint) is Literal else {}
    if hasattr(hint, "by_name"):  # a class whose values have names says which
        choices = hint.by_name()
    if choices:
        return f"one of {', '.join(choices)}", choices, {name: name for name in choices}.__getitem__
    word, read = _KINDS.get(hint, ("", str))
    return (word, {}, read) if word else None


def _unquoted(text: str) -> str:
    return re.sub(r'"((?:[^"]|"")*)"', lambda match: match[1].replace('""', '"'), text.strip())
