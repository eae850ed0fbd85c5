"""The grammar: every form, every error in words, and texts that come back as they were."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparring.core.objectives import Objective, dlr, margin
from sparring.core.registry import Named, function_from_file, named, options_of, parse, parse_list, read_number, text_of


def ball(radius: float, *, box: tuple[float, float] | None = (0.0, 1.0)) -> tuple[Any, ...]:
    return ("ball", radius, box)


def climb(
    threat: object, *, num_steps: int = 10, step: float | None = None, rescale: bool = False,
    objective: Objective = margin, norm: Literal["l2", "linf"] = "l2", where: str = "",
    hidden: Callable[..., Any] = ball,
) -> tuple[Any, ...]:  # fmt: skip
    return (threat, num_steps, step, rescale, objective, norm, where, hidden)


TABLE: dict[str, Callable[..., Any]] = {"ball": ball, "climb": climb}


def threat_of(text: str) -> Named:
    return named(text, TABLE, "threat", given=())


# Taking apart ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "name", "value", "options"),
    [
        ("fgsm", "fgsm", None, {}),
        ("linf:8/255", "linf", "8/255", {}),
        (" linf : 8/255 , box = -3..3 ", "linf", "8/255", {"box": "-3..3"}),
        ("pgd:num_steps=20,step=0.1", "pgd", None, {"num_steps": "20", "step": "0.1"}),
        ("nets.py:make", "nets.py:make", None, {}),
        ("nets.py:make,width=3", "nets.py:make", None, {"width": "3"}),
        ("nets.py:make:width=3", "nets.py:make", None, {"width": "3"}),
        ("nets.py:threat:0.5,k=2", "nets.py:threat", "0.5", {"k": "2"}),
        (r"C:\nets\my.py:make,k=1", r"C:\nets\my.py:make", None, {"k": "1"}),
        ('"a, b/my nets.py":make,k=1', "a, b/my nets.py:make", None, {"k": "1"}),
        ('"a, b/my nets.py:make",k=1', "a, b/my nets.py:make", None, {"k": "1"}),
        ('text:"a b/x,y:z.csv",label="a ""quoted"" name"', "text", "a b/x,y:z.csv", {"label": 'a "quoted" name'}),
        ('"a:b":c', "a:b", "c", {}),
        ('text:"label=3"', "text", "label=3", {}),
        ("a:b:c", "a", "b:c", {}),
        ("a:", "a", "", {}),
        ("k:x=a=b", "k", None, {"x": "a=b"}),
        ("", "", None, {}),
    ],
)  # fmt: skip
def test_parse(text: str, name: str, value: str | None, options: dict[str, str]) -> None:
    spec = parse(text)
    assert (spec.name, spec.value, dict(spec.options)) == (name, value, options)


def test_parse_list() -> None:
    found = parse_list('fgsm, pgd:num_steps=20,step=0.1 ,my.py:attack,k=3,"a,b":1,linf:0.3,')
    assert [(s.name, s.value, len(s.options)) for s in found] == [
        ("fgsm", None, 0), ("pgd", None, 2), ("my.py:attack", None, 1),
        ("a,b", "1", 0), ("linf", "0.3", 0), ("", None, 0),
    ]  # fmt: skip
    assert found[1].text == "pgd:num_steps=20,step=0.1"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("num_steps=3", "'num_steps=3' begins with an option; write NAME:KEY=VALUE"),
        ('linf:"0.3', "double quote that nothing closes"),
        ("fgsm,pgd", "names several things, 'fgsm' and 'pgd', where one is expected; write NAME:VALUE,KEY=VALUE"),
        ("linf:0.3,box", "names several things, 'linf:0.3' and 'box'"),
    ],
)
def test_parse_errors(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        parse(text)


# Looking up --------------------------------------------------------------------------------------------------------


def test_values_become_what_the_signature_says() -> None:
    assert threat_of("ball:8/255")() == ("ball", 8 / 255, (0.0, 1.0))
    assert threat_of(" BALL:inf,box=none")() == ("ball", float("inf"), None)
    assert threat_of("ball:radius=2,box=-1/2..0.5")() == ("ball", 2.0, (-0.5, 0.5))
    text = "climb:num_steps=3,step=1/4,rescale=True,objective=dlr,norm=linf,where=here"
    assert named(text, TABLE, "attack")("T") == ("T", 3, 0.25, True, dlr, "linf", "here", ball)
    assert str(threat_of("ball:box=none,radius=2")) == "ball:2,box=none"
    assert named("climb:step=none,rescale=false", TABLE, "attack")("T")[1:4] == (10, None, False)


def test_none_is_none_also_where_a_text_may_stand() -> None:
    def read(list: str | None = "auto") -> str | None:
        return list

    given = [named(f"read{text}", {"read": read}, "data")() for text in ("", ":list=none", ":list=a")]
    assert given == ["auto", None, "a"]


def test_what_is_given_goes_by_name_to_who_asks_for_it() -> None:
    def asks(radius: float, *, data: Any = None, k: int = 1) -> tuple[Any, ...]:
        return (radius, data, k)

    table: dict[str, Callable[..., Any]] = {"asks": asks, "ball": ball}
    assert named("asks:2,k=3", table, "threat", given=("data", "model"))("D", "M") == (2.0, "D", 3)
    assert named("ball:2", table, "threat", given=("data", "model"))("D", "M") == ball(2.0)
    assert "data" not in options_of(asks, ("data", "model"))


def test_options_of_says_kinds_defaults_and_choices() -> None:
    found = options_of(climb)
    assert list(found) == ["num_steps", "step", "rescale", "objective", "norm", "where"]  # no text says `hidden`
    assert found["num_steps"].kind == "a whole number" and found["num_steps"].default == 10
    assert found["step"].kind == "a number such as 0.3 or 8/255 or none"
    assert list(found["objective"].choices) == ["ce", "margin", "dlr", "kl"]
    assert list(found["norm"].choices) == ["l2", "linf"]
    assert [key for key, option in options_of(ball, ()).items() if option.positional] == ["radius"]


def test_but_changes_options_and_text() -> None:
    pgd = named("climb:num_steps=3,objective=dlr", TABLE, "attack")
    other = pgd.but(num_steps=5, step=0.5)
    assert str(other) == "climb:num_steps=5,objective=dlr,step=0.5" and other.options["num_steps"] == 5
    assert str(pgd) == "climb:num_steps=3,objective=dlr" and other("T")[1:3] == (5, 0.5)
    assert pgd == named(str(pgd), TABLE, "attack") != other
    with pytest.raises(ValueError, match="climb has no option 'steps'; it takes num_steps, step"):
        pgd.but(steps=3)


values = {
    "num_steps": st.integers(), "step": st.none() | st.floats(allow_nan=False), "rescale": st.booleans(),
    "objective": st.sampled_from(["ce", "margin", "dlr", "kl"]), "norm": st.sampled_from(["l2", "linf"]),
    "where": st.text(),
}  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(options=st.fixed_dictionaries({}, optional=values))
def test_text_round_trip(options: dict[str, Any]) -> None:
    if "where" in options:
        options["where"] = options["where"].strip()
    made = Named("climb", options, climb, ("threat",))
    assert named(str(made), TABLE, "attack") == made
    assert named(parse_list(f"fgsm,{made},pgd")[1], TABLE, "attack") == made


@settings(max_examples=200, deadline=None)
@given(value=st.floats(allow_nan=False) | st.fractions(0, 1, max_denominator=255).map(float))
def test_numbers_come_back_to_the_bit(value: float) -> None:
    assert read_number(text_of(value)) == value


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bal:1", "threat 'bal' is unknown; there are ball, climb, or FILE.py:FUNCTION; did you mean ball?"),
        ("zzz", "threat 'zzz' is unknown; there are ball, climb, or FILE.py:FUNCTION$"),
        ("", "threat '' is unknown"),
        ("ball", "threat 'ball' lacks its radius, a number such as 0.3 or 8/255; write ball:RADIUS"),
        ("ball:", "radius='' is not a number such as 0.3 or 8/255"),
        ("ball:eight", "threat 'ball:eight': radius='eight' is not a number such as 0.3 or 8/255"),
        ("ball:8/0", "radius='8/0' is not a number"),
        ("ball:1,box=3", "box='3' is not LOW..HIGH or none"),
        ("ball:1,box=..1", "box='..1' is not LOW..HIGH or none"),
        ("ball:1,low=0", "threat 'ball:1,low=0' has no option 'low'; it takes radius, box"),
        ("ball:1,radius=2", "gives an option twice"),
        ("ball:1,box=none,box=0..1", "gives an option twice"),
        ("climb:20", "climb takes options KEY=VALUE alone: num_steps, step"),
        ("climb:num_steps=2.5", "num_steps='2.5' is not a whole number"),
        ("climb:rescale=none", "rescale='none' is not true or false"),
        ("climb:rescale=yes", "rescale='yes' is not true or false"),
        ("climb:objective=dlrr", "objective='dlrr' is not one of ce, margin, dlr, kl"),
        ("climb:norm=l7", "norm='l7' is not one of l2, linf"),
        ("climb:hidden=3", "has no option 'hidden'; it takes num_steps"),
    ],
)
def test_errors(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        named(text, TABLE, "threat")


# A user's file -----------------------------------------------------------------------------------------------------

USER_FILE = """
from dataclasses import dataclass

@dataclass
class Made:
    threat: object
    k: int

def attack(threat, *, k=1, scale: float = 1.0, note=None):
    return Made(threat, k), scale, note

def other(t):
    return t

number = 3
"""


def test_a_users_function_stands_wherever_a_name_does(tmp_path: Path) -> None:
    folder = tmp_path / "my, files"
    folder.mkdir()
    path = folder / "own.py"
    path.write_text(USER_FILE)
    first, second = parse_list(f'fgsm,"{path}":attack,k=3,scale=1/2,note=none')
    assert first.name == "fgsm"
    made = named(second, TABLE, "attack")
    built, scale, note = made("T")
    assert (built.threat, built.k, scale, note) == ("T", 3, 0.5, None)
    assert str(made) == f'"{path}:attack",k=3,scale=0.5,note=none'
    again = named(str(made), TABLE, "attack")
    assert again == made  # the same function: a file that has not changed is run once
    path.write_text(USER_FILE + "\nchanged = True\n")
    assert named(str(made), TABLE, "attack").builder is not made.builder
    guessed = named(f'"{path}":attack,k=ten', TABLE, "attack")
    assert guessed.options == {"k": "ten"}
    with pytest.raises(ValueError, match=r"lacks its t, a value; .*what the caller hands over is called threat"):
        named(f'"{path}":other', TABLE, "attack")
    with pytest.raises(ValueError, match="has no option 'j'; it takes k, scale, note"):
        named(f'"{path}":attack,j=3', TABLE, "attack")


def test_what_a_users_file_may_lack(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(USER_FILE)
    for name, kind, sentence in (
        ("absent", ValueError, "has no function 'absent'; it has dataclass, Made, attack, other"),
        ("number", TypeError, "number is a int; expected a function"),
    ):
        with pytest.raises(kind, match=sentence):
            function_from_file(f"{path}:{name}", "attack")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        named(f"{tmp_path / 'other.py'}:make", {}, "attack")
    for text in (str(path), f"{path}:", "nets:make", f"{path}:a-b"):
        with pytest.raises(ValueError, match=r"expected FILE\.py:FUNCTION"):
            function_from_file(text, "attack")
    path.write_text("1 / 0\n")
    with pytest.raises(ValueError, match="does not run: ZeroDivisionError: division by zero"):
        function_from_file(f"{path}:attack", "attack")


def test_the_grammar_needs_no_torch() -> None:
    code = "import sys, sparring.core.registry as r; r.parse('a:1'); print('torch' in sys.modules)"
    source = Path(function_from_file.__code__.co_filename)
    code = code.replace("import sys, sparring.core.registry as r", (
        "import sys, importlib.util as u; s = u.spec_from_file_location('registry', sys.argv[1]); "
        "r = u.module_from_spec(s); sys.modules['registry'] = r; s.loader.exec_module(r)"
    ))  # fmt: skip
    out = subprocess.run([sys.executable, "-c", code, str(source)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
