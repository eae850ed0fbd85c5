"""Attacks on texts by name, and the plans made of them; published ones among them, each with its source."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sparring.attacks.plans import fast
from sparring.core.types import Attacker
from sparring.modalities.text.genetic import genetic
from sparring.modalities.text.search import full_search, greedy
from sparring.modalities.text.threats import Substitutions

TEXT_ATTACKS: dict[str, Callable[..., Attacker]] = {"greedy": greedy, "full-search": full_search, "genetic": genetic}


def fast_for_texts(threat: Any) -> str:
    """Words: a gradient attack, then the greedy search without gradients. Other threats: the shared plan."""
    return "frank-wolfe,greedy" if isinstance(threat, Substitutions) else fast(threat)


def full_for_texts(threat: Any) -> str:
    """Words: gradient attacks on two losses, greedy search by two rankings, full search. Else the shared plan."""
    if not isinstance(threat, Substitutions):
        return fast(threat)
    return "frank-wolfe,frank-wolfe:num_steps=20,objective=margin,restarts=3,greedy,greedy:rank=gradient,full-search"


def light_for_texts(threat: Any) -> str:
    """What chooses the best epoch. Words: the greedy search ranked by one gradient. Other threats: ten steps of PGD."""
    return "greedy:rank=gradient" if isinstance(threat, Substitutions) else "pgd:num_steps=10,step=0.25"


def queries_for_texts(threat: Any) -> str:
    """Searches alone, for models without a gradient."""
    return "greedy,full-search,genetic"


def _published(text: str, threat_name: str, source: str) -> Callable[[Any], str]:
    """A published attack as a plan: the search is in the text, what may be changed is the threat's."""

    def plan(threat: Any) -> str:
        if getattr(threat, "name", None) != threat_name:
            raise ValueError(f"this published attack changes {threat_name}; take --threat {threat_name}:SHARE")
        return text

    plan.__doc__ = source
    return plan


TEXT_PLANS: dict[str, Callable[[Any], str]] = {
    "fast": fast_for_texts,
    "full": full_for_texts,
    "light": light_for_texts,
    "queries": queries_for_texts,
    "hotflip": _published(
        "frank-wolfe:num_steps=1", "words",
        "Ebrahimi 2018: the flips that a single gradient ranks highest; here all at once, without a beam."),
    "textfooler": _published(
        "greedy", "words", "Jin 2020: words ranked by deletion, each to its best substitute; filters are the list's."),
    "a2t": _published(
        "greedy:rank=gradient", "words", "Yoo and Qi 2021: words ranked by a gradient, each to its best substitute."),
    "alzantot": _published(
        "genetic:num_generations=20,population=60", "words",
        "Alzantot 2018: a genetic search with the paper's 60 members and 20 generations, without a language model."),
    "deepwordbug": _published(
        "greedy", "characters", "Gao 2018: misspelt words, ranked by what is lost without them."),
}  # fmt: skip
