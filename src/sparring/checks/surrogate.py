"""A small network that learns a model's answers around a sample, for attacks by transfer.

Letters: B examples, N questions each, K classes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparring.attacks.auto_pgd import apgd
from sparring.attacks.catalogue import mi_fgsm
from sparring.attacks.starts import Corner
from sparring.checks.case import Case
from sparring.core.model_state import private_rng
from sparring.core.noise import Noise
from sparring.core.objectives import margin
from sparring.core.types import Attacker, Model, device_of, take
from sparring.threats.base import ThreatModel

QUESTIONS = 16
"""Points around each example at which the model is asked."""
LEARNING_STEPS, BATCH = 300, 256
LARGEST = 20_000
"""Numbers in one input from which a plain network would learn nothing of use in so few steps."""


def learn(case: Case, rows: Tensor) -> Model:
    """A network of one smooth hidden layer, fitted to the model's logits at QUESTIONS points around each example.

    Half of the points are random corners of the set, half lie anywhere in it. The logits are centred and scaled, so
    that a model which multiplies them by a thousand looks like any other. The draws are keyed; so are the weights.

    Source: Papernot 2017, "Practical black-box attacks", section 4, there with Jacobian augmentation over many rounds.
    """
    x, threat, number = take(case.x, rows), take(case.threat, rows), case.number[rows]
    points, answers = [], []
    for question in range(QUESTIONS):
        noise = Noise.make(case.seed, f"sanity/surrogate/{question}", number).to(device_of(x))
        z = Corner()(threat, x, noise) if question % 2 else threat.sample(x, noise)
        shown = threat.realize(x, z)
        points.append(shown)
        answers.append(case.logits(shown))
    inputs, targets = torch.cat(points), torch.cat(answers)
    targets = targets - targets.mean(1, keepdim=True)
    targets = targets / targets.std().clamp_min(1e-12)
    mean, std = inputs.mean(0), inputs.std()
    with private_rng(case.seed, inputs.device), torch.enable_grad():
        first, last = nn.Linear(math.prod(inputs.shape[1:]), 128), nn.Linear(128, targets.shape[1])
        network = nn.Sequential(nn.Flatten(), first, nn.Softplus(2.0), last).to(inputs)
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(LEARNING_STEPS):
            pick = torch.randint(len(inputs), (BATCH,), device=inputs.device)
            loss = (network((inputs[pick] - mean) / std) - targets[pick]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.requires_grad_(False)
    return lambda x: network((x - mean) / std)


def across(threat: ThreatModel) -> Attacker:
    """The attack that is made on the surrogate: momentum carries over (Dong 2018); on L1 balls APGD."""
    if threat.norm == "l1":
        return apgd(threat, num_steps=20, objective=margin)
    return mi_fgsm(threat, num_steps=20, step=0.1, objective=margin, keep="highest_loss")
