"""Attacks as text, which is what the command line and the results files speak: "fgsm,pgd:num_steps=100,restarts=10"."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparring.attacks.autoattack import apgd, apgd_t
from sparring.attacks.catalogue import CATALOGUE
from sparring.attacks.fab import fab, fab_t
from sparring.attacks.plans import PROTOCOLS
from sparring.attacks.smooth import smooth
from sparring.attacks.sparse import slide
from sparring.attacks.square import square
from sparring.core.objectives import Objective, cross_entropy, dlr, kl, margin
from sparring.core.types import Attacker
from sparring.threats.balls import Linf
from sparring.threats.base import ThreatModel

OBJECTIVES: dict[str, Objective] = {"ce": cross_entropy, "margin": margin, "dlr": dlr, "kl": kl}

ATTACKS: dict[str, Callable[..., Attacker]] = CATALOGUE | {
    "slide": slide, "apgd": apgd, "apgd-t": apgd_t, "fab": fab, "fab-t": fab_t, "square": square,
    "smooth": smooth,
}  # fmt: skip

_ANY = Linf(1.0)
_TYPES = {"int": int, "float": float, "float | None": float, "bool": bool}
_READ: dict[type, Callable[[str], Any]] = {bool: {"True": True, "False": False}.__getitem__}


@dataclass(frozen=True)
class NamedAttack:
    """A catalogue entry with its options, waiting for a threat model; `str` gives the text that made it.

    >>> NamedAttack("pgd", (("num_steps", 20),))(Linf(0.1)).num_steps
    20
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __call__(self, threat: ThreatModel) -> Attacker:
        options = {key: value for key, value in self.options if key != "near"}
        if "objective" in options:
            options["objective"] = OBJECTIVES[options["objective"]]
        return ATTACKS[self.name](threat, **options)

    def __str__(self) -> str:
        options = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.name}:{options}" if options else self.name

    @property
    def near(self) -> float | None:
        """`evaluate` runs it only where at most this share of the clean margin is left; None for everywhere."""
        return dict(self.options).get("near")

    def but(self, **changes: Any) -> NamedAttack:
        """The same attack with other options."""
        return NamedAttack(self.name, tuple({**dict(self.options), **changes}.items()))


def options_of(name: str) -> dict[str, type]:
    """The options that an attack takes as text, with their types."""
    parameters = inspect.signature(ATTACKS[name]).parameters.values()
    own = {p.name: _TYPES[p.annotation] for p in parameters if p.kind is p.KEYWORD_ONLY and p.annotation in _TYPES}
    names = {p.name for p in parameters}
    shared: dict[str, type] = {"restarts": int, "objective": str, "wanted": int}
    return own | {key: kind for key, kind in shared.items() if key in names or "options" in names} | {"near": float}


def parse_attacks(text: str, threat: ThreatModel = _ANY) -> tuple[NamedAttack, ...]:
    """The attacks of a comma-separated list; raises ValueError that shows what would be right.

    Protocols are spelled out for `threat`, on which their members depend.

    >>> from sparring import Linf
    >>> [str(a) for a in parse_attacks("fgsm,pgd:num_steps=20,objective=margin", Linf(0.1))]
    ['fgsm', 'pgd:num_steps=20,objective=margin']
    >>> [str(a) for a in parse_attacks("autoattack", Linf(0.1))]
    ['apgd', 'apgd-t', 'fab-t', 'square']
    """
    attacks: list[NamedAttack] = []
    protocol = ""
    for part in text.split(","):
        name, colon, option = part.strip().partition(":")
        protocol = name if name in PROTOCOLS else protocol if "=" in name else ""
        if protocol:
            if colon or name != protocol:
                raise ValueError(
                    f"{protocol!r} is a protocol and takes no options (in {text!r}); name its attacks one by one"
                )
            attacks += parse_attacks(PROTOCOLS[name](threat), threat)
            continue
        if "=" not in name:
            if name not in ATTACKS:
                raise ValueError(f"attack {name!r} is unknown; there are {', '.join((*PROTOCOLS, *ATTACKS))}")
            attacks.append(NamedAttack(name))
        if colon or "=" in name:
            if not attacks:
                raise ValueError(
                    f"attacks {text!r} begin with an option; write NAME:KEY=VALUE, for example pgd:num_steps=20"
                )
            key, value = _option(attacks[-1].name, option if colon else name, text)
            attacks[-1] = attacks[-1].but(**{key: value})
    for attack in attacks:
        attack(threat)  # wrong combinations say so now, not after an hour
    return tuple(attacks)


def _option(name: str, text: str, whole: str) -> tuple[str, Any]:
    key, _, value = text.partition("=")
    types = options_of(name)
    if key not in types:
        raise ValueError(f"attack {name!r} has no option {key!r} (in {whole!r}); it takes {', '.join(types)}")
    if key == "objective" and value not in OBJECTIVES:
        raise ValueError(f"objective {value!r} is unknown (in {whole!r}); there are {', '.join(OBJECTIVES)}")
    try:
        read = _READ.get(types[key], types[key])(value)
    except (ValueError, KeyError):
        raise ValueError(f"attack option {key}={value!r} (in {whole!r}) is not of type {types[key].__name__}") from None
    if key == "near" and not 0 < read <= 1:
        raise ValueError(f"near={value} (in {whole!r}); expected a share of the clean margin, above 0, at most 1")
    return key, read


DEFAULT_ATTACKS = "fast"
"""What `evaluate` runs unless told otherwise."""
