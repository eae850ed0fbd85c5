"""Gradient ascent, FGSM and PGD as introductions print them, what is wrong with them, and what the mistakes cost.

A dense network 5-10-10 with softmax output, the input x = (0.1, 0.2, 0.3, 0.4, 0.5) and epsilon = 0.01. The first half
is the textbook in plain PyTorch; a comment marks each of five mistakes at its line. The second half measures each
mistake by itself and does it right with Sparring. Run it: python examples/textbook.py
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparring import L2, Linf, bim, cross_entropy, fgsm, gradient_ascent, pgd, targeted
from sparring.evaluation.preflight import preflight

EPSILON = 0.01
Numbers = dict[str, float]

# The textbook --------------------------------------------------------------------------------------------------------


class TextbookNet(nn.Module):
    """5-10-10; returns probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).softmax(dim=1)


def textbook_gradient_ascent(
    model: nn.Module, x: Tensor, epsilon: float, output: Callable[[Tensor], Tensor] = torch.sum, num_steps: int = 10
) -> Tensor:
    for _ in range(num_steps):
        x = x.detach().requires_grad_()
        # MISTAKE (a): this is no loss. The outputs sum to 1 whatever x is, so their sum has the gradient zero and x
        # stays where it is. With output=torch.max x moves, but the wrong way: the network becomes surer of its class.
        output(model(x)).backward()
        x = x + epsilon * x.grad
    return x.detach()


def textbook_fgsm(model: nn.Module, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    x = x.detach().requires_grad_()
    # MISTAKE (b): cross_entropy expects logits and takes a softmax itself. The model returns probabilities, so there
    # are two. The gradient is squashed; the sign hides that, everything that uses its length suffers.
    F.cross_entropy(model(x), y).backward()
    # MISTAKE (d): nothing keeps the result in the valid range. From 0.0 or 1.0 it leaves [0, 1] by epsilon.
    return (x + epsilon * x.grad.sign()).detach()


def textbook_pgd(model: nn.Module, x: Tensor, y: Tensor, epsilon: float, num_steps: int = 40) -> Tensor:
    x_adv = x
    for _ in range(num_steps):
        # MISTAKE (c): the step is as long as epsilon. The first one ends in a corner of the box, where FGSM ends; as
        # long as the signs stay, so does x_adv. If they change, each entry can only be at -epsilon, 0 or +epsilon.
        x_adv = textbook_fgsm(model, x_adv, y, epsilon)
        x_adv = torch.clamp(x_adv, x - epsilon, x + epsilon)
    return x_adv


def textbook_targeted_fgsm(model: nn.Module, x: Tensor, wanted: Tensor, epsilon: float) -> Tensor:
    # MISTAKE (e): FGSM adds the step, and so climbs the loss of the wanted class: it moves away from that class.
    return textbook_fgsm(model, x, wanted, epsilon)


# What each mistake costs ---------------------------------------------------------------------------------------------


def make_net() -> TextbookNet:
    """The same untrained network every time, in float64; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return TextbookNet().double().requires_grad_(False).eval()


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The gradient of a number that is computed from x."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x), x)[0]


def no_loss(net: TextbookNet, x: Tensor, y: Tensor) -> Numbers:
    """(a) Ascending the sum or the largest of the outputs, against ascending the cross-entropy of the logits."""
    attack = gradient_ascent(Linf(EPSILON), num_steps=10, absolute_step=EPSILON)
    ascended = {
        "ascending the sum of the outputs": textbook_gradient_ascent(net, x, EPSILON),
        "ascending the largest output": textbook_gradient_ascent(net, x, EPSILON, output=torch.max),
        "ascending the loss": attack(net.layers, x, y).x_adv,
    }
    numbers = {
        "gradient of the sum of the outputs, length": gradient(lambda v: net(v).sum(), x).norm().item(),
        "gradient of the loss, length": gradient(lambda v: F.cross_entropy(net.layers(v), y), x).norm().item(),
        "probability of the class at x": net(x)[0, y].item(),
    }
    return numbers | {f"... after {name}": net(moved)[0, y].item() for name, moved in ascended.items()}


def softmax_twice(net: TextbookNet, x: Tensor, y: Tensor) -> Numbers:
    """(b) The same raw gradient ascent on cross-entropy of probabilities and of logits; and what preflight does."""
    free = L2(math.inf, low=None, high=None)
    attack = gradient_ascent(free, num_steps=10, absolute_step=EPSILON, keep="last")
    wanted = net(x).argmin(1)
    mended = preflight(net, x, y, free).model  # sees probabilities, puts a logarithm behind them

    def ratio(model: Callable[[Tensor], Tensor], label: Tensor, gain: float = 1.0) -> float:
        """How long the gradient is, as a share of that through the logits."""
        sure = nn.Sequential(*net.layers, Gain(gain))
        through = [gradient(lambda v, m=m: F.cross_entropy(m(v), label), x).norm().item() for m in (model, sure)]
        return through[0] / through[1]

    def loss(model: Callable[[Tensor], Tensor]) -> float:
        return F.cross_entropy(net.layers(attack(model, x, y).x_adv), y).item()

    surer = nn.Sequential(*net.layers, Gain(100.0), nn.Softmax(dim=1))
    corners = [fgsm(Linf(EPSILON), keep="last")(model, x, y).x_adv for model in (net, net.layers)]
    return {
        "gradient length, softmax twice / once": ratio(net, y),
        "... towards another class, logits times 100": ratio(surer, wanted, 100.0),
        "... after Sparring's preflight": ratio(mended, y),
        "loss at x": F.cross_entropy(net.layers(x), y).item(),
        "... after 10 raw gradient steps, softmax twice": loss(net),
        "... after 10 raw gradient steps, softmax once": loss(net.layers),
        "... after them through the preflight": loss(mended),
        "FGSM, largest difference between the two": (corners[0] - corners[1]).abs().max().item(),
    }


class Gain(nn.Module):
    """Multiplies logits: a network that is that much surer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, logits: Tensor) -> Tensor:
        return self.factor * logits


def step_of_epsilon(net: TextbookNet, x: Tensor, y: Tensor) -> Numbers:
    """(c) At x with epsilon, then where it matters: 500 random inputs, a radius of 0.3. No box, to change one thing."""
    small, large = (Linf(radius, low=None, high=None) for radius in (EPSILON, 0.3))
    at_fgsm = textbook_fgsm(net, x, y, EPSILON)
    numbers = {
        "x: PGD with steps of epsilon, distance from FGSM": (textbook_pgd(net, x, y, EPSILON) - at_fgsm).abs().max(),
        "x: steps of epsilon / 8, random start, distance": (pgd(small)(net.layers, x, y).x_adv - at_fgsm).abs().max(),
    }
    many = torch.rand(500, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = net(many).argmax(1)
    runs = {
        "FGSM": fgsm(large, keep="last"),
        "PGD, steps of the radius": bim(large, num_steps=40, step=1.0, keep="last"),
        "PGD, steps of radius / 8": bim(large, num_steps=40, step=0.125, keep="last"),
        "PGD, radius / 8, 5 random starts": pgd(large, num_steps=40, step=0.125, restarts=5),
    }
    z = {name: attack(net.layers, many, labels).z for name, attack in runs.items()}
    places = z["PGD, steps of the radius"] / large.radius
    same = (places - z["FGSM"] / large.radius).abs().amax(1) < 1e-9
    numbers["500: share where steps of the radius equal FGSM"] = same.double().mean()
    numbers["500: farthest entry from -radius, 0 or +radius"] = (places - places.round()).abs().max()
    for name, found in z.items():
        logits = net.layers(many + found)
        numbers[f"500: mean loss, {name}"] = F.cross_entropy(logits, labels)
        numbers[f"500: share fooled, {name}"] = (logits.argmax(1) != labels).double().mean()
    return {name: float(value) for name, value in numbers.items()}


def no_valid_range(net: TextbookNet) -> Numbers:
    """(d) An input at the border of [0, 1]."""
    x = torch.tensor([[0.0, 1.0, 0.0, 1.0, 0.5]], dtype=torch.float64)
    y, threat = net(x).argmax(1), Linf(EPSILON)
    outside, inside = textbook_fgsm(net, x, y, EPSILON), fgsm(threat)(net.layers, x, y).x_adv
    return {
        "textbook FGSM, lowest entry": outside.min().item(),
        "textbook FGSM, highest entry": outside.max().item(),
        "textbook's is a valid input (1 = yes)": float(threat.valid(x, outside)),
        "Sparring's FGSM, lowest entry": inside.min().item(),
        "Sparring's FGSM, highest entry": inside.max().item(),
        "Sparring's is a valid input (1 = yes)": float(threat.valid(x, inside)),
    }


def wrong_way(net: TextbookNet, x: Tensor) -> Numbers:
    """(e) Towards the least likely class, up and down its loss."""
    wanted = net(x).argmin(1)
    ascended = textbook_targeted_fgsm(net, x, wanted, EPSILON)
    descended = fgsm(Linf(EPSILON), wanted=wanted)(net.layers, x, net(x).argmax(1)).x_adv
    goal = targeted(cross_entropy, wanted)
    return {
        "probability of the wanted class at x": net(x)[0, wanted].item(),
        "... after ascending its loss (textbook)": net(ascended)[0, wanted].item(),
        "... after descending it (Sparring, wanted=...)": net(descended)[0, wanted].item(),
        "what Sparring climbs: minus the loss, at x": goal.score(net.layers(x), wanted).item(),
        "... and after the attack": goal.score(net.layers(descended), wanted).item(),
    }


def done_right(net: TextbookNet, x: Tensor, y: Tensor) -> Numbers:
    """The three attacks with a loss, on logits, in [0, 1], with small steps: the loss that each one reaches."""
    threat = Linf(EPSILON)
    attacks = {
        "gradient ascent": gradient_ascent(threat, num_steps=10, absolute_step=EPSILON),
        "FGSM": fgsm(threat),
        "PGD": pgd(threat, num_steps=40, step=0.125, restarts=5),
    }
    numbers = {"loss at x": F.cross_entropy(net.layers(x), y).item()}
    return numbers | {f"... after {name}": attack(net.layers, x, y).loss.item() for name, attack in attacks.items()}


def main() -> dict[str, Numbers]:
    """Prints a table for each mistake and returns the numbers in it."""
    net = make_net()
    x = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.5]], dtype=torch.float64)
    y = net(x).argmax(1)
    tables = {
        "(a) no loss": no_loss(net, x, y),
        "(b) softmax twice": softmax_twice(net, x, y),
        "(c) steps as long as epsilon": step_of_epsilon(net, x, y),
        "(d) no valid range": no_valid_range(net),
        "(e) a targeted loss ascended": wrong_way(net, x),
        "done right": done_right(net, x, y),
    }
    for title, numbers in tables.items():
        print(title)
        for name, value in numbers.items():
            print(f"    {name:<60} {value:>12.6g}")
    return tables


if __name__ == "__main__":
    main()
