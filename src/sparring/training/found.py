"""Training on what a search found: rounds of fitting any model, attacking it, and adding what fooled it to the data.

Shapes: N examples, B batch, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparring.core.model_state import attack_mode
from sparring.core.noise import Noise
from sparring.core.types import Attacker, Inputs, Model, map_inputs, size, take
from sparring.threats import inside
from sparring.threats.base import ThreatModel


@dataclass(frozen=True)
class FoundExamples:
    """The last model; the data it was fitted on, where what was found follows the N examples given; and of each round
    how many examples were attacked (`tried`, right before) and how many were turned (`found`)."""

    model: Any
    x: Inputs
    y: Tensor
    tried: tuple[int, ...]
    found: tuple[int, ...]


def train_on_found(
    fit: Callable[[Inputs, Tensor], Model], x: Inputs, y: Tensor, threat: ThreatModel,
    attack: Callable[[ThreatModel], Attacker], *, num_rounds: int = 3, num_tried: int = 1000,
    among: Tensor | None = None, seed: int = 0, batch_size: int = 250,
) -> FoundExamples:  # fmt: skip
    """Fits, attacks `num_tried` of the examples, adds those that were turned with their labels, and fits again.

    fit: (x, y) -> model; it may begin anew or go on with a network of its own, so that this serves networks, trees
    (`BlackBox`) and whatever else learns. attack: of a threat; searches go where gradients do not. among (N,) bool:
    which examples may be drawn, such as those of the class that an opponent owns. Each found example is realized,
    permitted, and shown to the model again. What is drawn depends on the seed alone. Ends early where nothing falls.

    Source: adversarial retraining (Szegedy 2014, section 4.3; Kantchelian 2016, "Evasion and hardening of tree
    ensemble classifiers", section 5.3 adds found examples to boosted trees in rounds). Raises ValueError.

    >>> from sparring import Linf, fgsm
    >>> x = torch.rand(60, 2, generator=torch.Generator().manual_seed(0))
    >>> def fit(x, y):  # a threshold in the middle between the classes
    ...     middle = (x[y == 0, 0].max() + x[y == 1, 0].min()) / 2
    ...     return lambda x: torch.stack([middle - x[:, 0], x[:, 0] - middle], 1)
    >>> found = train_on_found(fit, x, (x[:, 0] > 0.5).long(), Linf(0.1), fgsm, num_rounds=1)
    >>> len(found.y) - 60 == found.found[0]
    True
    """
    if num_rounds < 1 or num_tried < 1 or size(x) != len(y):
        raise ValueError(
            f"{num_rounds} rounds of {num_tried} of {size(x)} examples with {len(y)} labels; expected at least one of "
            "each, and a label for each example"
        )
    own = torch.arange(len(y)) if among is None else among.cpu().nonzero()[:, 0]
    all_x, all_y, tried, found = x, y, [], []
    for number in range(num_rounds):
        model = fit(all_x, all_y)
        order = Noise.make(seed, f"found/{number}", own).uniform((1,))[:, 0].argsort(stable=True)
        parts = [
            turned(model, x, y, rows, threat, attack, seed=seed, purpose=f"found/attack/{number}")
            for rows in own[order[:num_tried]].sort().values.split(batch_size)
        ]
        tried.append(sum(part[2] for part in parts))
        found.append(sum(len(part[1]) for part in parts))
        if not found[-1]:
            return FoundExamples(model, all_x, all_y, tuple(tried), tuple(found))
        all_x = map_inputs(lambda *rows: torch.cat(rows), all_x, *(part[0] for part in parts))
        all_y = torch.cat([all_y, *(part[1] for part in parts)])
    return FoundExamples(fit(all_x, all_y), all_x, all_y, tuple(tried), tuple(found))


@torch.no_grad()
def _predicted(model: Model, x: Inputs) -> Tensor:
    with attack_mode(model) as frozen:
        return frozen(x).argmax(1)


def turned(
    model: Model, x: Inputs, y: Tensor, rows: Tensor, threat: ThreatModel, attack: Callable[[ThreatModel], Attacker], *,
    seed: int, purpose: str,
) -> tuple[Inputs, Tensor, int]:  # fmt: skip
    """What of the examples `rows` an attack turns: inputs, their labels, and how many were right before."""
    part, labels = take(x, rows), take(y, rows)
    right = _predicted(model, part) == labels
    part, labels, rows = take(part, right.nonzero()[:, 0]), labels[right], rows[right.cpu()]
    if not len(labels):
        return part, labels, 0
    here = take(threat, rows)
    result = attack(here)(model, part, labels, noise=Noise.make(seed, purpose, rows))
    z = result.z.detach()
    real = here.realize(part, z)
    fell = (_predicted(model, real) != labels) & inside(here, part, z) & here.valid(part, real)
    return take(real, fell.nonzero()[:, 0]), labels[fell], len(labels)
