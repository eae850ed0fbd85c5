"""What the attack loop costs beside the passes through the network: PGD-40 against a bare loop, and other libraries.

All run in one process, on the same network, images, float32 and contiguous memory, in rounds; each round times every
implementation once, in an order that is rotated at random, and the ratios are taken within a round. The bare loop is
40 times forward and gradient of the cross-entropy in the input, with the weights frozen, and nothing else: no step,
no projection, no start. The other libraries get the network as a user has it. Passes are counted, not assumed.

With `--training`: what the training loop (average, looks of the guard and what it keeps included) costs beside a loop
of five lines with the same recipe, optimizer and batches, in seconds of this process, so that others matter less.
"""

from __future__ import annotations

import argparse
import copy
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Lines, provenance, table
from sparring import Linf, pgd, pgd_at, standard, train
from sparring.core.noise import Noise
from sparring.modalities import load_data
from sparring.modalities.images import build, scale

RADIUS, STEP, NUM_STEPS = 0.3, 0.0375, 40
Attack = Callable[[], Any]


def bare_loop(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    frozen = copy.deepcopy(model).requires_grad_(False)

    def run() -> Tensor:
        for _ in range(NUM_STEPS):
            inputs = x.detach().requires_grad_()
            torch.autograd.grad(F.cross_entropy(frozen(inputs), y), inputs)
        return x

    return counted(run, frozen)


def ours(keep: str) -> Callable[[nn.Module, Tensor, Tensor], Attack]:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
        own = copy.deepcopy(model)
        attack = replace(pgd(Linf(RADIUS), num_steps=NUM_STEPS, step=STEP / RADIUS), keep=keep)
        return counted(lambda: attack(own, x, y).x_adv, own)

    return make


def by_torchattacks(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    import torchattacks

    own = copy.deepcopy(model)
    attack = torchattacks.PGD(own, eps=RADIUS, alpha=STEP, steps=NUM_STEPS, random_start=True)
    return counted(lambda: attack(x, y), own)


def by_foolbox(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    """By `run`, which searches and leaves the last look at the result to the caller."""
    import foolbox

    own = copy.deepcopy(model)
    wrapped = foolbox.PyTorchModel(own, bounds=(0, 1))
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=NUM_STEPS, random_start=True)
    criterion = foolbox.criteria.Misclassification(y)
    return counted(lambda: attack.run(wrapped, x, criterion, epsilon=RADIUS), own)


def by_art(model: nn.Module, x: Tensor, y: Tensor) -> Attack:
    """From and to NumPy, as that library works; it looks at the clean and at the final images once more each."""
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    own = copy.deepcopy(model)
    classifier = PyTorchClassifier(
        own, nn.CrossEntropyLoss(), tuple(x.shape[1:]), 10, clip_values=(0.0, 1.0), device_type="cpu"
    )
    attack = ProjectedGradientDescentPyTorch(
        classifier, norm=np.inf, eps=RADIUS, eps_step=STEP, max_iter=NUM_STEPS, num_random_init=1,
        batch_size=len(x), verbose=False,
    )  # fmt: skip
    images, labels = x.numpy(), y.numpy()
    return counted(lambda: torch.from_numpy(attack.generate(images, labels)), own)


IMPLEMENTATIONS: dict[str, Callable[[nn.Module, Tensor, Tensor], Attack]] = {
    "bare loop": bare_loop,
    'sparring, keep="last"': ours("last"),
    'sparring, keep="fooled_first"': ours("fooled_first"),
    "torchattacks": by_torchattacks,
    "foolbox": by_foolbox,
    "adversarial-robustness-toolbox": by_art,
}


def counted(run: Attack, model: nn.Module) -> Attack:
    """`run`, with the network it calls at hand."""
    run.model = model  # type: ignore[attr-defined]
    return run


def check(name: str, run: Attack, x: Tensor, y: Tensor) -> dict[str, Any]:
    """One call that is not timed: batches forward, whether the result keeps to the rules, and how far the loss rose."""
    forwards = 0

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1

    model = run.model  # type: ignore[attr-defined]
    model.eval()
    with model[-1].register_forward_hook(count):  # some libraries call the layers one by one
        x_adv = run().detach()
    gap = (x_adv - x).abs().max().item()
    if gap > RADIUS + 1e-6 or x_adv.min() < 0 or x_adv.max() > 1:
        raise SystemExit(f"{name} left the set: {gap} from the images, {x_adv.min()} to {x_adv.max()}")
    with torch.no_grad():
        loss = F.cross_entropy(model(x_adv), y).item()
    return {"forwards": forwards, "loss": loss}


def images(num: int, seed: int) -> tuple[Tensor, Tensor, str]:
    """MNIST where it is at hand, else noise: the passes cost the same."""
    try:
        data = load_data("mnist")
        return scale(data.x_test[:num]).contiguous(), data.y_test[:num], "MNIST test images"
    except (OSError, ImportError):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.rand(num, 1, 28, 28, generator=generator), torch.randint(10, (num,), generator=generator)
        return x, y, "random images (no MNIST at hand)"


def training(rounds: int, seed: int) -> None:
    """The ratio of `train` to the loop written by hand, for a usual step and for the cheapest one."""
    rows = []
    cases = (("cnn-mnist-wide", (1, 28, 28), 32, pgd_at(Linf(RADIUS), num_steps=5), "PGD-AT of 5 steps", 50, rounds),
             ("cnn-small", (1, 8, 8), 64, standard(), "standard", 50, rounds))  # fmt: skip
    for name, shape, num, recipe, title, steps, times in cases:
        x, y = torch.rand(num, *shape), torch.arange(num) % 10
        models = [build(name, shape, 10, seed).train() for _ in range(2)]
        bare, looped = (torch.optim.AdamW(model.parameters(), 1e-3) for model in models)

        def by_hand(model: nn.Module = models[0], optimizer: Any = bare, recipe: Any = recipe, num: int = num) -> None:
            for step in range(steps):  # noqa: B023
                noise = Noise.make(seed, "train", torch.arange(step * num, step * num + num))
                loss = recipe(model, x, y, noise=noise)  # noqa: B023
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()

        def by_train(averaging: float | None, model: nn.Module = models[1], optimizer: Any = looped) -> None:
            train(model, [(x, y)] * steps, recipe, optimizer, num_epochs=1, averaging=averaging)  # noqa: B023

        found: list[list[float]] = []
        for _ in range(times):
            seconds = []
            for run in (by_hand, lambda: by_train(None), lambda: by_train(0.99)):
                started = time.process_time()
                run()
                seconds.append(time.process_time() - started)
            found.append([seconds[0] / steps, seconds[1] / seconds[0], seconds[2] / seconds[0]])
        low, middle, high = np.quantile(np.array(found), (0.1, 0.5, 0.9), axis=0)
        ratios = [f"{middle[i]:.3f} ({low[i]:.3f} to {high[i]:.3f})" for i in (1, 2)]
        rows.append((f"{name}, batch {num}, {title}", f"{1000 * middle[0]:.1f}", steps, *ratios))
    head = ("step", "ms by hand", "steps per run", "train / by hand (10-90 %)", "the same with averaging")
    print(table(head, rows) + "\n")
    print(provenance(seed=seed, n=rounds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds, after one that is not (default 20)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="a file for the seconds of every round, as JSON lines (appended)")
    parser.add_argument("--training", action="store_true", help="the training loop instead of the attack loop")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    if args.training:
        return training(args.rounds, args.seed)
    x, y, source = images(args.batch_size, args.seed)
    model = build("cnn-mnist-wide", (1, 28, 28), 10, args.seed).eval()

    runs: dict[str, Attack] = {}
    facts: dict[str, dict[str, Any]] = {}
    for name, make in IMPLEMENTATIONS.items():
        try:
            runs[name] = make(model, x, y)
        except ImportError as error:
            print(f"{name} is left out: {error}")
            continue
        facts[name] = check(name, runs[name], x, y)
    order, chance, seconds = list(runs), random.Random(args.seed), {name: [] for name in runs}
    for _ in range(args.rounds):
        turn = chance.randrange(len(order))
        for name in order[turn:] + order[:turn]:
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    if args.out:
        about = {"threads": args.threads, "batch_size": args.batch_size, "facts": facts}
        Lines(args.out).add({**about, "seconds": seconds})

    rows = []
    for name in runs:
        ratios = np.array(seconds[name]) / np.array(seconds["bare loop"])
        low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
        loss = "" if name == "bare loop" else f"{facts[name]['loss']:.3f}"
        milliseconds = f"{1000 * np.median(seconds[name]):.0f}"
        rows.append((name, facts[name]["forwards"], milliseconds, f"{middle:.3f}", f"{low:.3f} to {high:.3f}", loss))
    head = ("implementation", "forwards", "median ms", "ratio to the bare loop", "10-90 % of rounds", "final loss")
    print(f"\nPGD-40, cnn-mnist-wide (initial weights), {source}, radius {RADIUS}, step {STEP}, {args.rounds} rounds\n")
    print(table(head, rows) + "\n")
    packages = ("torchattacks", "foolbox", "adversarial-robustness-toolbox")
    print(provenance(seed=args.seed, n=args.batch_size, packages=packages))


if __name__ == "__main__":
    main()
