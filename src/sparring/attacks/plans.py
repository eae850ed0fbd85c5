"""Lists of attacks that make up a verdict, as text; each attack runs on what the ones before it left standing."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparring.threats.balls import Ball
from sparring.threats.base import ThreatModel


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

    Ordered by what an attack breaks per pass. `near` keeps the costly ones for examples that have lost most of their
    clean margin. Where gradients are masked, no example seems near and the number is too high: only the battery tells.
    What it takes from others: the margin objective (Carlini and Wagner 2017), few targets with the largest logits
    (Gao 2022, "MM attack"), spending by difficulty (Liu 2022, "A3"); the smoothed backward pass is ours. L1 balls get
    sparse steps, and more of Square. Threats that are no ball: PGD on two losses.
    """
    if not bool(torch.as_tensor(threat.radius).isfinite().all()):
        raise ValueError(
            "the radius is infinite, so every input may become any other and robust accuracy says nothing; the default "
            "attacks need a finite radius. Name others to see how far an attack has to go: --attacks fab-t"
        )
    if threat.norm == "l1":
        return (
            "apgd:num_steps=10,apgd:num_steps=30,objective=margin,apgd-t:num_steps=30,targets=3,near=0.7,"
            "apgd:num_steps=50,objective=margin,restarts=2,near=0.4,square:num_queries=500,near=0.4"
        )
    if isinstance(threat, Ball):
        return (
            "apgd:num_steps=5,apgd:num_steps=20,objective=margin,apgd-t:num_steps=20,targets=3,near=0.7,"
            "smooth:near=0.5,apgd:num_steps=20,near=0.5,smooth:restarts=10,near=0.2,"
            "apgd-t:num_steps=50,targets=4,near=0.15,square:num_queries=500,near=0.15"
        )
    return "pgd:restarts=5,pgd:restarts=5,objective=margin"


PROTOCOLS: dict[str, Callable[[ThreatModel], str]] = {
    "fast": fast,
    "autoattack": autoattack,
    "autoattack-plus": autoattack_plus,
    "autoattack-rand": autoattack_rand,
}
