"""Does the guard see a collapse, take it back, and leave healthy training alone?

    python benchmarks/collapse.py healthy --out FOLDER     ten healthy runs on digits: an alarm here is a false one
    python benchmarks/collapse.py provoked --out FOLDER    eight ruined runs, each healthy, left alone and guarded
    python benchmarks/collapse.py plots --out FOLDER       draws what `provoked` wrote, as docs/pictures/collapse-*.svg

healthy prints a line for each run: name, rollbacks and why, how it ended, held-out robust accuracy of the best and of
the last epoch. provoked trains each kind three times for each seed: without the fault (under the guard), with it and
nobody who reacts, with it and the guard with its default reactions. Every look, and how the run ended, goes into
FOLDER/KIND-MODE-SEED/training.json; what is there is not computed again. Robust means: stands PGD with ten steps, a
random corner, and PGD on the margin with a smoothed backward pass; looks are at 256 held-out training images (128
where the network is convolutional).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from common import percent, provenance, table
from sparring.app.settings import TrainingSettings
from sparring.app.train_run import start_run
from sparring.attacks.around import seeking
from sparring.attacks.loop import Attack
from sparring.attacks.starts import null
from sparring.attacks.steps import Ascent
from sparring.core.batches import Batches, draw
from sparring.core.files import write_json
from sparring.core.objectives import margin
from sparring.modalities import load_data
from sparring.modalities.images.generate import prepared
from sparring.modalities.images.models import build
from sparring.threats import Linf
from sparring.training import watch as watching
from sparring.training.loop import train
from sparring.training.named import RECIPES as BUILDERS
from sparring.training.recipes import Mixed, pgd_at
from sparring.training.schedules import SCHEDULES, Ramp, Ramped
from sparring.training.state import TrainingState

RECIPES = ("pgd-at:num_steps=5", "trades:num_steps=5", "mart:num_steps=5", "n-fgsm", "fgsm-rs")
HEALTHY: dict[str, dict[str, Any]] = {
    f"{recipe}, seed {seed}": {"threat": "linf:0.2", "recipe": recipe, "epochs": 10, "seed": seed}
    for recipe in RECIPES
    for seed in (0, 1)
}


class Fault(NamedTuple):
    """A run, and what is changed of it so that it collapses. Values are fields of `Run`."""

    words: str
    run: dict[str, Any]
    change: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """What decides a run. jump: the learning rate is times this after two fifths of the steps. noise: share of
    wrong labels. scale: of the logits."""

    data: str = "mnist"
    num: int = 4000
    model: str = "mlp"
    radius: float = 0.1
    scale: float = 1.0
    noise: float = 0.0
    num_held: int = 256
    recipe: str = "pgd-at"
    options: dict[str, Any] = dataclasses.field(default_factory=lambda: {"num_steps": 5})
    optimizer: str = "adamw"
    rate: float = 2e-3
    schedule: str = "one-cycle"
    jump: float = 1.0
    ramp: float = 0.3
    steps: int = 250
    batch_size: int = 64
    every: int = 10


DEEP = {"model": "cnn-mnist", "radius": 0.3, "rate": 5e-3, "ramp": 0.5, "steps": 600, "every": 20, "num_held": 128}
FAULTS: dict[str, Fault] = {
    "catastrophic": Fault("one step (FGSM) instead of five", DEEP, {"recipe": "fgsm", "options": {}}),
    "masking": Fault("attacked through a soft backward pass (slope 10)", DEEP,
                     {"options": {"num_steps": 5, "slope": 10.0}}),
    "masking-by-scale": Fault("logits times 10,000", {}, {"scale": 1e4}),
    "overfitting": Fault(
        "a constant rate, more than three times as long", {"num": 400, "num_held": 512, "noise": 0.4, "steps": 150},
        {"schedule": "constant", "steps": 500},
    ),
    "constant": Fault("the whole radius at once", {"radius": 0.2}, {"ramp": 0.0}),
    "divergence": Fault("SGD; the rate 20 times as large after two fifths of the steps",
                        {"optimizer": "sgd", "rate": 0.02, "every": 5}, {"jump": 20.0}),
    "constant-by-the-rate": Fault("a rate 250 times too large", {}, {"rate": 0.5}),
    "dying": Fault("digits; a rate 100 times too large", {"data": "digits", "num": 1100, "rate": 5e-3,
                   "schedule": "constant", "steps": 200, "every": 5}, {"rate": 0.5}),
}  # fmt: skip


def one_step(threat: Any) -> Mixed:
    """Training on FGSM from the clean input."""
    return Mixed(attack=Attack(threat=threat, rule=Ascent(1.0), num_steps=1, start=null, keep="last"))


class Scaled(nn.Module):
    """A network whose logits are multiplied."""

    def __init__(self, network: nn.Module, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network, scale

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(x) * self.scale
        return logits


class Recorded:
    """A guard that writes down what another one sees, or would see at the whole radius."""

    def __init__(self, guard: watching.Watch) -> None:
        self.guard, self.every, self.seen = guard, guard.every, list[dict[str, float]]()

    def __call__(self, state: TrainingState) -> Any:
        before = watching.look
        try:
            watching.look = self.looked  # type: ignore[assignment]
            verdict, num = self.guard(state), len(self.seen)
        finally:
            watching.look = before
        if num and "step" not in self.seen[-1]:
            self.seen[-1]["step"] = state.step
        return verdict

    def looked(self, model: nn.Module, x: Tensor, y: Tensor, threat: Any) -> dict[str, float]:
        found, whole = look(model, x, y, threat), self.guard.threat
        self.seen.append(dict(found) if threat is whole else look(model, x, y, whole))
        return found


look = watching.look


def robust(found: dict[str, float]) -> float:
    """The share that stands all that was tried."""
    return min(found["multi_step"], found["unmasked"])


def examples(run: Run, seed: int) -> tuple[tuple[Tensor, Tensor], ...]:
    """Training images, 256 held-out training images, the first 1,000 test images; with labels."""
    data = load_data(run.data)
    rows = draw(data.y_train, run.num_held + run.num, seed)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    held, own = rows[: run.num_held], rows[run.num_held :]
    x, x_test = prepared(data, data.x_train), prepared(data, data.x_test)
    y = data.y_train
    chance = torch.Generator().manual_seed(seed + 1)
    wrong = torch.rand(len(own), generator=chance) < run.noise
    told = torch.where(wrong, (y[own] + torch.randint(1, 10, (len(own),), generator=chance)) % 10, y[own])
    return (x[own], told), (x[held], y[held]), (x_test[:1000], data.y_test[:1000])


def trained(run: Run, seed: int, reacts: bool) -> dict[str, Any]:
    """One run: its looks, what was taken back, and what its weights are worth on held-out and on test images."""
    own, held, test = examples(run, seed)
    threat, started = Linf(run.radius), time.process_time()
    model = Scaled(build(run.model, tuple(own[0].shape[1:]), 10, seed), run.scale)
    kinds = {} if reacts else dict.fromkeys(watching.COLLAPSES, "off")
    guard = Recorded(watching.Watch(threat, *held, every=run.every, **kinds))
    used, many = (BUILDERS | {"fgsm": one_step})[run.recipe](threat, **run.options), pgd_at(threat)
    many = dataclasses.replace(many, attack=seeking(many.attack, margin))  # as `sparring train --guard watch` has it
    one, other = (Ramped(recipe, Ramp(run.ramp)) for recipe in (used, many))
    learning: dict[str, Any] = {"params": model.parameters(), "lr": run.rate}
    adam = run.optimizer == "adamw"
    optimizer = torch.optim.AdamW(**learning, weight_decay=1e-4) if adam else torch.optim.SGD(**learning, momentum=0.9)
    passes = max(1, round(100 * run.batch_size / len(own[1])))  # an epoch is some 100 steps
    rows = torch.arange(len(own[1])).repeat(passes)
    batches = Batches(own[0][rows], own[1][rows], run.batch_size, seed=seed, shuffle=True, drop_last=True)

    def validate(candidate: Any) -> dict[str, float]:
        found = look(candidate, *held, threat)
        return {"clean_accuracy": found["clean"], "robust_accuracy": robust(found)}

    def schedule(progress: float) -> float:
        return SCHEDULES[run.schedule](progress) * (run.jump if progress >= 0.4 else 1.0)

    result = train(
        model, batches, watching.Switched(recipe=one, other=other), optimizer, seed=seed, validate=validate,
        num_epochs=max(1, round(run.steps / len(batches))), schedule=schedule, guard=guard,
    )  # fmt: skip
    judged = {}
    for name in ("best", "last"):
        model.load_state_dict(getattr(result, name))
        sound = all(p.isfinite().all() for p in model.parameters())
        judged[name] = look(model, *test, threat) if sound else None
    return {
        "run": dataclasses.asdict(run), "seed": seed, "looks": guard.seen, "history": result.history, "test": judged,
        "rollbacks": result.rollbacks, "stopped": result.stopped, "cpu_seconds": time.process_time() - started,
    }  # fmt: skip


def fallen(record: dict[str, Any]) -> list[float]:
    """By how much held-out robust accuracy had fallen below its best so far at each look that was answered."""
    found, alarms, best = [], [line["step"] for line in record["rollbacks"]], 0.0
    for seen in record["looks"]:
        best = max(best, robust(seen))
        if seen.get("step") in alarms or (record["stopped"] and seen is record["looks"][-1]):
            found.append(best - robust(seen))
    return found


def provoked(out: Path, kinds: list[str], seeds: int) -> None:
    """Trains what is missing, prints a table."""
    rows = []
    for kind in kinds:
        fault = FAULTS[kind]
        for seed in range(seeds):
            found = {}
            for mode in ("healthy", "alone", "guarded"):
                path = out / f"{kind}-{mode}-{seed}" / "training.json"
                if not path.exists():
                    change = {} if mode == "healthy" else fault.change
                    write_json(path, trained(Run(**{**fault.run, **change}), seed, mode != "alone"))
                found[mode] = json.loads(path.read_text(encoding="utf-8"))
            cells = []
            for record in found.values():
                both = [
                    percent(robust(record["test"][name] or {"multi_step": 0, "unmasked": 0}), 1)
                    for name in ("best", "last")
                ]
                cells.append(" / ".join(both))
            guarded = found["guarded"]
            told = [f"{line['step']} ({line['reason'].partition(' at step')[0]})" for line in guarded["rollbacks"]]
            told += ["stopped"] if guarded["stopped"] else []
            falls = ", ".join(f"{100 * fall:.1f}" for fall in fallen(guarded))
            rows.append([kind, str(seed), *cells, "; ".join(told) or "nothing", falls,
                         str(len(found["healthy"]["rollbacks"]) + bool(found["healthy"]["stopped"]))])  # fmt: skip
            print(" | ".join(rows[-1]), f"| {sum(r['cpu_seconds'] for r in found.values()):.0f} s", flush=True)
    head = ["", "seed", "healthy, best / last epoch", "left alone", "guarded", "seen at", "fallen by", "false alarms"]
    print("\n" + table(head, rows) + "\n\n" + provenance(seed=f"0 to {seeds - 1}", n="1,000 test images"))


def plots(out: Path, pictures: Path) -> None:
    """A picture for each kind: held-out robust accuracy of the three runs of seed 0, and the ways back as lines."""
    style = {"svg.fonttype": "none", "svg.hashsalt": "collapse", "font.size": 9, "axes.spines.top": False,
             "axes.spines.right": False, "legend.frameon": False}  # fmt: skip
    lines = {"healthy": ("#777777", (0, (1, 1.5)), "healthy"), "alone": ("#d1495b", (0, (5, 2)), "left alone"),
             "guarded": ("#00798c", "-", "guarded")}  # fmt: skip
    for kind, fault in FAULTS.items():
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(6, 2.1), layout="constrained")
            axes = figure.subplots()
            for mode, (colour, dashes, name) in lines.items():
                path = out / f"{kind}-{mode}-0" / "training.json"
                record = json.loads(path.read_text(encoding="utf-8"))
                looks = [seen for seen in record["looks"] if "step" in seen]
                steps, values = [seen["step"] for seen in looks], [100 * robust(seen) for seen in looks]
                axes.plot(steps, values, color=colour, linestyle=dashes, label=name, linewidth=1.4)
                for back in record["rollbacks"]:
                    axes.axvline(back["step"], color=colour, linewidth=0.7)
            axes.set(xlabel="step", ylabel="robust, %", ylim=(0, None))
            axes.set_title(f"{kind}: {fault.words}", loc="left", fontsize=9)
            axes.legend(ncols=3, fontsize=8)
            pictures.mkdir(parents=True, exist_ok=True)
            figure.savefig(pictures / f"collapse-{kind}.svg", metadata={"Date": None, "Creator": None})


def healthy(out: Path) -> None:
    """Ten runs, a line for each."""
    for name, settings in HEALTHY.items():
        folder = out / name.replace(" ", "-").replace(":", "_").replace("=", "")
        result = start_run(TrainingSettings(data="digits", guard="watch:every=20", **settings), folder)
        scores = [line["robust_accuracy"] for line in result.history] or [0.0]
        why = "; ".join(f"step {line['step']}: {line['reason']}" for line in result.rollbacks) or "no alarm"
        print(f"{name} | {why} | {result.stopped or 'to its end'} | {max(scores):.3f} | {scores[-1]:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["healthy", "provoked", "plots"])
    parser.add_argument("--kinds", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.what == "healthy":
        healthy(asked.out)
    elif asked.what == "provoked":
        provoked(asked.out, asked.kinds, asked.seeds)
    else:
        plots(asked.out, Path(__file__).parents[1] / "docs" / "pictures")


if __name__ == "__main__":
    main()
