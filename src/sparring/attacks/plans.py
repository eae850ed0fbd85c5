"""Plans: the attacks that make up a verdict, in order; each runs on what the ones before it left standing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from sparring.attacks.auto_pgd import apgd, apgd_t, smooth
from sparring.attacks.catalogue import CATALOGUE
from sparring.attacks.fab import fab, fab_t
from sparring.attacks.square import square
from sparring.core.registry import Builder, name_of, named, parse_list, read_number, text_of
from sparring.core.types import Attacker
from sparring.threats.balls import Ball
from sparring.threats.base import ThreatModel
from sparring.threats.lens import Lens

ATTACKS: dict[str, Builder] = CATALOGUE | {
    "apgd": apgd, "apgd-t": apgd_t, "fab": fab, "fab-t": fab_t, "square": square, "smooth": smooth,
}  # fmt: skip


@dataclass(frozen=True)
class Stage:
    """`attack`, a function from a threat model to an attack, and for which examples it is worth its cost.

    margin_at_most: it runs only on examples that have at most this share of their clean margin left, at the worst
    permitted point that any attack before it has shown; None: on all that stand. `str` is its text.

    >>> from sparring import Linf, pgd
    >>> Stage(pgd, 0.5)(Linf(0.1)).num_steps
    40
    """

    attack: Callable[[ThreatModel], Attacker]
    margin_at_most: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.attack):
            raise TypeError(f"a stage runs a function from a threat model to an attack; got {self.attack!r}")
        if self.margin_at_most is not None and not 0 < self.margin_at_most <= 1:
            raise ValueError(
                f"margin_at_most={self.margin_at_most:g}; expected a share of the clean margin, above 0, at most 1"
            )

    def __call__(self, threat: ThreatModel) -> Attacker:
        """The attack for a threat."""
        return self.attack(threat)

    def __str__(self) -> str:
        text = name_of(self.attack)
        if self.margin_at_most is None:
            return text
        return f"{text}{',' if ':' in text else ':'}margin_at_most={text_of(self.margin_at_most)}"


def autoattack(threat: ThreatModel) -> str:
    """AutoAttack `standard`, the published protocol.

    Source: Croce and Hein 2020 and, for L1, 2021; budgets of the authors' `autoattack.py`. With K < 10 classes there
    are K - 1 targets instead of nine; `DLR` and `TargetedDLR` say what stands for logits that do not exist.
    """
    return "apgd:restarts=5,apgd-t:targets=5,fab-t,square" if threat.norm == "l1" else "apgd,apgd-t,fab-t,square"


def autoattack_plus(threat: ThreatModel) -> str:
    """AutoAttack `plus`: more restarts, and the untargeted DLR and FAB. On L1 balls not as published (decision 006)."""
    return "apgd:restarts=5,apgd:restarts=5,objective=dlr,fab:restarts=5,square,apgd-t,fab-t"


def autoattack_rand(threat: ThreatModel) -> str:
    """AutoAttack `rand`, for stochastic models: gradients averaged over 20 looks."""
    return "apgd:eot=20,apgd:eot=20,objective=dlr"


def fast(threat: ThreatModel) -> str:
    """The verdict of AutoAttack at a few percent of its passes (measured in docs/results.md); what is used by default.

    Ordered by what an attack breaks per pass. `margin_at_most` keeps the costly ones for examples that have lost most
    of their clean margin. Where gradients are masked none seems to, and the number is too high: only the battery tells.
    What it takes from others: the margin objective (Carlini and Wagner 2017), few targets (Gao 2022, "MM attack"), here
    the nearest by linearised distance, spending by difficulty (Liu 2022, "A3"); the smoothed backward pass is ours. L1
    balls get sparse steps, smoothed early. A ball seen by a lens: no Square. Other threats: PGD on two losses.
    """
    if not bool(torch.as_tensor(threat.radius).isfinite().all()):
        raise ValueError(
            "the radius is infinite, so every input may become any other and robust accuracy says nothing; the default "
            "attacks need a finite radius. Name others to see how far an attack has to go: --attacks fab-t"
        )
    if isinstance(threat, Lens):
        return fast(threat.threat).partition(",square")[0]
    if threat.norm == "l1":  # after the smoothed starts nothing fell that had kept more than 0.15 of its margin
        return (
            "apgd:num_steps=10,apgd:num_steps=30,objective=margin,"
            "smooth:slope=5,num_steps=30,restarts=3,margin_at_most=0.7,"
            "apgd-t:num_steps=30,targets=3,nearest=true,margin_at_most=0.3,"
            "smooth:num_steps=50,restarts=6,margin_at_most=0.2,square:num_queries=500,margin_at_most=0.15"
        )
    if isinstance(threat, Ball):
        return (
            "apgd:num_steps=5,apgd:num_steps=20,objective=margin,"
            "apgd-t:num_steps=20,targets=3,nearest=true,margin_at_most=0.7,"
            "smooth:margin_at_most=0.5,apgd:num_steps=20,margin_at_most=0.5,smooth:restarts=10,margin_at_most=0.2,"
            "apgd-t:num_steps=50,targets=4,nearest=true,margin_at_most=0.15,"
            "apgd:num_steps=30,objective=margin,restarts=10,margin_at_most=0.1,"
            "square:num_queries=500,margin_at_most=0.15,square:num_queries=2500,margin_at_most=0.04"
        )
    return "pgd:restarts=5,pgd:restarts=5,objective=margin"


def fast_plus(threat: ThreatModel) -> str:
    """The fast verdict, and then more of what breaks examples that attacks leave standing although they can be broken.

    Many starts through the smoothed backward pass, each polished with small steps of the true gradient, do that on some
    networks (measured in docs/results.md, with the cost); as smoothing changes nothing without ReLU, targets and Square
    get more steps, too. On L1 balls more starts instead of polish. Sources: those of `fast` and AutoAttack;
    the smoothed backward pass is ours.
    """
    seen = isinstance(threat, Lens)
    ball = threat.threat if isinstance(threat, Lens) else threat
    if not isinstance(ball, Ball):
        raise ValueError(f"fast-plus is a plan for balls; for the threat {type(ball).__name__} name a longer list")
    starts = "restarts=60" if ball.norm == "l1" else "polish=50,restarts=30"  # the same passes
    return (
        f"{fast(threat)},smooth:slope=5,num_steps=50,{starts},margin_at_most=0.3,"
        "apgd-t:num_steps=100,targets=9,nearest=true,margin_at_most=0.3"
        f"{'' if seen else ',square:num_queries=5000,margin_at_most=0.1'}"
    )


def queries(threat: ThreatModel) -> str:
    """What `fast` becomes for models without a gradient: Square, 2,000 queries of each example that stands.

    Source: Andriushchenko 2020 (Square), with fewer queries than AutoAttack's 5,000.
    """
    if isinstance(threat, Ball):
        return "square:num_queries=2000"
    raise ValueError(
        f"there is no plan without gradients for the threat {type(threat).__name__}; name searches that need none"
    )


Plan = Callable[[ThreatModel], str | tuple[Stage, ...]]

PLANS: dict[str, Plan] = {
    "fast": fast,
    "fast-plus": fast_plus,
    "queries": queries,
    "autoattack": autoattack,
    "autoattack-plus": autoattack_plus,
    "autoattack-rand": autoattack_rand,
}


def make_plan(
    text: str, threat: ThreatModel, attacks: Mapping[str, Builder] = ATTACKS, plans: Mapping[str, Plan] = PLANS
) -> tuple[Stage, ...]:
    """The stages that a comma-separated text names; published plans are spelled out for `threat`.

    Each attack is built once, so that wrong combinations fail now and not after an hour. Raises ValueError in words,
    TypeError for attacks that do not know the threat, FileNotFoundError.

    >>> from sparring import Linf
    >>> [str(stage) for stage in make_plan("fgsm,pgd:num_steps=20,margin_at_most=0.5", Linf(0.1))]
    ['fgsm', 'pgd:num_steps=20,margin_at_most=0.5']
    >>> [str(stage) for stage in make_plan("autoattack", Linf(0.1))]
    ['apgd', 'apgd-t', 'fab-t', 'square']
    """
    stages: list[Stage] = []
    for spec in parse_list(text):
        if plan := plans.get(spec.name):
            if spec.value is not None or spec.options:
                raise ValueError(f"{spec.name!r} is a plan and takes no options (in {spec.text!r}); name its attacks")
            found = plan(threat)
            stages += make_plan(found, threat, attacks, plans) if isinstance(found, str) else found
            continue
        options = dict(spec.options)
        margin = options.pop("margin_at_most", None)
        attack = named(spec._replace(options=tuple(options.items())), {**plans, **attacks}, "attack")
        if idle := [key for key in ("num_steps", "num_queries") if attack.options.get(key) == 0]:
            raise ValueError(f"attack {spec.text!r}: with {idle[0]}=0 it tries nothing and breaks nothing; at least 1")
        stages.append(Stage(attack, None if margin is None else _share(margin, spec.text)))
    for stage in stages:
        stage(threat)
    return tuple(stages)


def _share(text: str, whole: str) -> float:
    try:
        return read_number(text)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"attack {whole!r}: margin_at_most={text!r} is not a number such as 0.5") from None


DEFAULT_PLAN = "fast"
"""What `evaluate` runs unless told otherwise."""
