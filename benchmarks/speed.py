"""How fast: a verdict by PGD-40 beside other libraries', a step of PGD-10 beside the papers' loop, and `--speed auto`.

    python benchmarks/speed.py verdict|step|auto [--rounds 15] [--minutes 20] [--num 256] [--out FILE]

Everything runs in one process on one thread, in turns within each round; ratios are of this process' CPU seconds within
a round, since other work may share the machine. MNIST; networks are trained here, radii are chosen on training images
that they did not see.

verdict: robust accuracy of one network by PGD-40 with the same radius, step and images: at radii where hardly any
image of a standard network stands, where half stand and where most stand on a hardened one. step: one step of PGD-AT of
10 steps. auto: what `find_speed` takes for a run that is long enough to try everything.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Lines, provenance, table
from sparring import Linf, pgd, pgd_at, standard, train
from sparring.core.batches import Batches
from sparring.core.machine import Machine
from sparring.evaluation.measure import measure
from sparring.modalities import load_data
from sparring.modalities.images import build, scale
from sparring.training.speed import find_speed

NUM_STEPS, STEP, CPU = 40, 0.125, Machine(torch.device("cpu"))
Verdict = Callable[[nn.Module, Tensor, Tensor, float], Tensor]


def ours(keep: str) -> Verdict:
    """`measure` with its checks: preflight, and every result shown to the model again."""

    def stands(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
        attack: Any = partial(pgd, num_steps=NUM_STEPS, step=STEP, keep=keep)
        return measure(model, [(x, y)], Linf(radius), [attack], curve=()).table["robust"]

    return stands


def by_torchattacks(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    import torchattacks

    attack = torchattacks.PGD(model, eps=radius, alpha=STEP * radius, steps=NUM_STEPS, random_start=True)
    x_adv = attack(x, y)
    with torch.no_grad():
        return model(x_adv).argmax(1) == y


def by_foolbox(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    import foolbox

    attack = foolbox.attacks.LinfPGD(rel_stepsize=STEP, steps=NUM_STEPS, random_start=True)
    fooled = attack(
        foolbox.PyTorchModel(model, bounds=(0, 1)), x, foolbox.criteria.Misclassification(y), epsilons=radius
    )
    return ~fooled[2]


def by_art(model: nn.Module, x: Tensor, y: Tensor, radius: float) -> Tensor:
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, eps=radius, eps_step=STEP * radius, max_iter=NUM_STEPS, num_random_init=1, batch_size=len(x),
        verbose=False,
    )  # fmt: skip
    x_adv = attack.generate(x.numpy(), y.numpy())
    return torch.from_numpy(classifier.predict(x_adv, batch_size=len(x))).argmax(1) == y


VERDICTS: dict[str, Verdict] = {
    "sparring, keep=drop_fooled": ours("drop_fooled"), "sparring, keep=fooled_first": ours("fooled_first"),
    "torchattacks": by_torchattacks, "foolbox": by_foolbox, "adversarial-robustness-toolbox": by_art,
}  # fmt: skip


def trained(recipe: Any, x: Tensor, y: Tensor, num_epochs: int, seed: int) -> nn.Module:
    model = build("cnn-mnist", (1, 28, 28), 10, seed)
    batches = Batches(x, y, 128, seed=seed, shuffle=True)
    train(model, batches, recipe, torch.optim.AdamW(model.parameters(), 2e-3), num_epochs=num_epochs, seed=seed)
    return model.eval()


def radius_for(model: nn.Module, x: Tensor, y: Tensor, share: float) -> float:
    """The radius at which that share stands, by bisection on training images."""
    low, high = 0.0, 0.5
    for _ in range(6):
        middle = (low + high) / 2
        stands = ours("drop_fooled")(model, x, y, middle).float().mean().item()
        low, high = (middle, high) if stands > share else (low, middle)
    return round((low + high) / 2, 3)


def in_turns(runs: dict[str, Callable[[], Any]], rounds: int, minutes: float, seed: int) -> dict[str, list[float]]:
    """CPU seconds of each, over as many rounds as fit; the order is rotated at random."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, chance, ends = list(runs), random.Random(seed), time.monotonic() + 60 * minutes
    for number in range(rounds):
        if number > 2 and time.monotonic() > ends:
            break
        turn = chance.randrange(len(order))
        for name in order[turn:] + order[:turn]:
            started = time.process_time()
            runs[name]()
            seconds[name].append(time.process_time() - started)
    return seconds


def verdict(args: argparse.Namespace) -> None:
    data = load_data("mnist")
    x, y = scale(data.x_train[:5_000]), data.y_train[:5_000]
    held, (x, y) = (x[4_000:], y[4_000:]), (x[:4_000], y[:4_000])
    plain, hard = (
        trained(standard(), x, y, 2, args.seed),
        trained(pgd_at(Linf(0.15), num_steps=3, step=0.5), x, y, 20, args.seed),
    )
    cases = {"standard": (plain, 0.2)}
    for name, share in (("half-robust", 0.5), ("robust", 0.9)):
        cases[name] = (hard, radius_for(hard, *held, share))
    x, y = scale(data.x_test[: args.num]).contiguous(), data.y_test[: args.num]
    runs: dict[str, Callable[[], Any]] = {}
    stands: dict[str, Tensor] = {}
    for case, (model, radius) in cases.items():
        for name, judge in VERDICTS.items():
            run = partial(judge, copy.deepcopy(model), x, y, radius)
            try:
                stands[f"{case}/{name}"] = run().cpu()  # not timed: the first may make ready
            except ImportError as error:
                print(f"{name} is left out: {error}")
                continue
            runs[f"{case}/{name}"] = run
    seconds = in_turns(runs, args.rounds, args.minutes, args.seed)
    rows = []
    for key in runs:
        case, _, name = key.partition("/")
        first = np.array(seconds[f"{case}/{next(iter(VERDICTS))}"])
        ratio, model_stands = np.median(np.array(seconds[key]) / first), stands[key]
        differ = int((model_stands != stands[f"{case}/{next(iter(VERDICTS))}"]).sum())
        share = f"{100 * model_stands.float().mean():.1f} %"
        rows.append(
            (
                f"{case}, radius {cases[case][1]}: {name}",
                share,
                differ,
                f"{np.median(seconds[key]):.2f}",
                f"{ratio:.2f}",
            )
        )
    head = (
        "network: verdict by",
        "stand",
        "of them otherwise than ours",
        "CPU s, median",
        "times ours, median of rounds",
    )
    finish(args, head, rows, seconds)


def papers_step(model: nn.Module, x: Tensor, y: Tensor, optimizer: Any, radius: float) -> None:
    """The loop of most papers' code (Rice 2020, `train_cifar.py`, without its helpers), in eval mode while crafting."""
    model.eval()
    delta = torch.empty_like(x).uniform_(-radius, radius)
    delta = (x + delta).clamp(0, 1) - x
    for _ in range(10):
        delta.requires_grad_()
        F.cross_entropy(model(x + delta), y).backward()
        grad = delta.grad
        assert grad is not None
        delta = (delta.detach() + radius / 4 * grad.sign()).clamp(-radius, radius)
        delta = ((x + delta).clamp(0, 1) - x).detach()
    model.train()
    loss = F.cross_entropy(model(x + delta), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def nets() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Networks with a batch each: MNIST, and MNIST as colour images of 32 x 32 pixels."""
    data = load_data("mnist")
    x, y = scale(data.x_train[:128]).contiguous(), data.y_train[:128]
    wide = F.pad(x, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()
    names = ("cnn-mnist", "cnn-mnist-wide")
    found = {name: (build(name, (1, 28, 28), 10, 0), x, y) for name in names}
    return {**found, "resnet-small": (build("resnet-small", (3, 32, 32), 10, 0), wide[:16].clone(), y[:16])}


def step(args: argparse.Namespace) -> None:
    runs: dict[str, Callable[[], Any]] = {}
    recipe = pgd_at(Linf(0.1))
    machines = {"sparring, plain": CPU, "sparring, bf16": Machine(CPU.device, bf16=True)}
    machines["sparring, bf16, channels-last, folded"] = Machine(CPU.device, bf16=True, channels_last=True, folded=True)
    for net, (model, x, y) in nets().items():
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), 0.01)
        runs[f"{net}/the papers' loop"] = partial(papers_step, own, x, y, optimizer, 0.1)
        for name, machine in machines.items():
            own = copy.deepcopy(model)
            optimizer = torch.optim.SGD(own.parameters(), 0.01)
            runs[f"{net}/{name}"] = partial(
                train, own, [(x, y)], recipe, optimizer, num_epochs=1, machine=machine, seed=args.seed
            )
    for run in runs.values():
        run()
    seconds = in_turns(runs, args.rounds, args.minutes, args.seed)
    rows = []
    for key in runs:
        first = np.array(seconds[f"{key.partition('/')[0]}/the papers' loop"])
        ratios = first / np.array(seconds[key])
        rows.append((key.replace("/", ": "), f"{1000 * np.median(seconds[key]):.0f}", f"{np.median(ratios):.2f}"))
    finish(args, ("step of PGD-10", "CPU ms, median", "times as fast as the papers' loop"), rows, seconds)


def auto(args: argparse.Namespace) -> None:
    for name, (model, x, y) in nets().items():
        optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
        found = find_speed(model, [(x, y)], pgd_at(Linf(0.1)), optimizer, CPU, num_steps=10**6, seed=args.seed)
        print(f"{name}: {found.sentence}", flush=True)
    print(provenance(seed=args.seed, n=128))


def finish(args: argparse.Namespace, head: Any, rows: list[Any], seconds: dict[str, list[float]]) -> None:
    if args.out:
        Lines(args.out).add({"part": args.part, "num": args.num, "seconds": seconds})
    print(f"{len(next(iter(seconds.values())))} rounds\n\n{table(head, rows)}\n")
    print(provenance(seed=args.seed, n=args.num, packages=("torchattacks", "foolbox")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("verdict", "step", "auto"))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--minutes", type=float, default=20.0, help="no round begins after that, but for three")
    parser.add_argument("--num", type=int, default=256, help="test images of a verdict")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the seconds of every round, as JSON lines (appended)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    {"verdict": verdict, "step": step, "auto": auto}[args.part](args)


if __name__ == "__main__":
    main()
