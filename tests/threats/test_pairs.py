"""Pairs of inputs, of which the opponent changes one: every room takes them through the lens, none knows of pairs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparring.attacks.plans import make_plan
from sparring.checks.battery import examine
from sparring.evaluation.measure import measure
from sparring.results.findings import verdict
from sparring.threats import L2, Lens, Linf, check_threat


class Same(nn.Module):
    """Are the two halves of a pair alike? Two logits from the distance of their embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, pair: dict[str, Tensor]) -> Tensor:
        distance = (self.embed(pair["left"]) - self.embed(pair["right"])).square().sum(1)
        return torch.stack([distance, 0.3 - distance], 1)


torch.manual_seed(0)
MODEL = Same().eval()
LEFT = torch.rand(96, 6)
PAIRS = {"left": LEFT, "right": torch.where(torch.arange(96)[:, None] < 48, LEFT.flip(0), LEFT * 0.98)}
LABEL = MODEL(PAIRS).argmax(1)
THREAT = Lens(Linf(0.15), "right")
BATCHES = [({name: half[part] for name, half in PAIRS.items()}, LABEL[part]) for part in (slice(64), slice(64, None))]


def test_a_lens_is_a_threat_model() -> None:
    for inner in (Linf(0.1), L2(0.3), Linf(torch.rand(96) + 0.1)):
        check_threat(Lens(inner, "right"), PAIRS, num_directions=50)


def test_a_plan_a_curve_and_the_checks_take_pairs() -> None:
    whole = measure(MODEL, BATCHES, THREAT, make_plan("fast", THREAT), seed=0)
    assert set(LABEL.tolist()) == {0, 1} and whole.clean.value == 1
    assert 0 < whole.robust.value < 0.9
    shares = [share.value for _, share in whole.curve]
    assert shares == sorted(shares, reverse=True) and shares[0] == 1 and shares[-1] < shares[1]
    assert verdict(examine(MODEL, PAIRS, LABEL, THREAT, whole)) == "TRUSTED"


def test_a_weak_attack_on_pairs_is_seen_by_the_checks() -> None:
    weak = measure(MODEL, BATCHES, THREAT, make_plan("bim:num_steps=1,absolute_step=0.001", THREAT), seed=0)
    assert weak.robust.value > 0.9
    assert verdict(examine(MODEL, PAIRS, LABEL, THREAT, weak)) != "TRUSTED"
