"""Attacks as text, which is what the command line and the results files speak: "fgsm,pgd:num_steps=100,restarts=10"."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from sparring.attacks.catalogue import CATALOGUE
from sparring.objectives import Objective, cross_entropy, kl, margin
from sparring.threats.balls import Linf
from sparring.threats.base import ThreatModel
from sparring.types import Attacker

OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin, "kl": kl}


@dataclass(frozen=True)
class NamedAttack:
    """A catalogue entry with its options, waiting for a threat model; `str` gives the text that made it.

    >>> NamedAttack("pgd", (("num_steps", 20),))(Linf(0.1)).num_steps
    20
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, threat: ThreatModel) -> Attacker:
        options = dict(self.options)
        if "objective" in options:
            options["objective"] = OBJECTIVES[options["objective"]]
        return CATALOGUE[self.name](threat, **options)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name

    def but(self, **changes: Any) -> NamedAttack:
        """The same attack with other options."""
        return NamedAttack(self.name, tuple({**dict(self.options), **changes}.items()))


def options_of(name: str) -> dict[str, type]:
    """The options that a catalogue entry takes as text, with their types."""
    parameters = inspect.signature(CATALOGUE[name]).parameters.values()
    own = {p.name: int if p.name == "num_steps" else float for p in parameters if p.kind is p.KEYWORD_ONLY}
    return {**own, "restarts": int, "objective": str, "wanted": int}


def parse_attacks(text: str) -> tuple[NamedAttack, ...]:
    """The attacks of a comma-separated list; raises ValueError that shows what would be right.

    >>> [str(a) for a in parse_attacks("fgsm,pgd:num_steps=20,objective=margin")]
    ['fgsm', 'pgd:num_steps=20,objective=margin']
    """
    attacks: list[NamedAttack] = []
    for part in text.split(","):
        name, colon, option = part.strip().partition(":")
        if "=" not in name:
            if name not in CATALOGUE:
                raise ValueError(f"attack {name!r} is unknown; there are {', '.join(CATALOGUE)}")
            attacks.append(NamedAttack(name))
        if colon or "=" in name:
            if not attacks:
                raise ValueError(
                    f"attacks {text!r} begin with an option; write NAME:KEY=VALUE, for example pgd:num_steps=20"
                )
            key, value = _option(attacks[-1].name, option if colon else name, text)
            attacks[-1] = attacks[-1].but(**{key: value})
    for attack in attacks:
        attack(Linf(1.0))  # wrong combinations say so now, not after an hour
    return tuple(attacks)


def _option(name: str, text: str, whole: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    types = options_of(name)
    if key not in types:
        raise ValueError(f"attack {name!r} has no option {key!r} (in {whole!r}); it takes {', '.join(types)}")
    if key == "objective" and value not in OBJECTIVES:
        raise ValueError(f"objective {value!r} is unknown (in {whole!r}); there are {', '.join(OBJECTIVES)}")
    try:
        return key, types[key](value)
    except ValueError:
        raise ValueError(f"attack option {key}={value!r} (in {whole!r}) is not of type {types[key].__name__}") from None


STANDARD_ATTACKS = parse_attacks(
    "pgd:num_steps=40,restarts=5,objective=ce,pgd:num_steps=40,restarts=5,objective=margin"
)
"""What `evaluate` runs unless told otherwise: PGD-40 with 5 restarts and steps of radius / 8, on two losses."""
