"""Robust training on few labels: do images of a generator help, and more than what is simpler?

A few examples of a data set keep their labels, more keep only their inputs. Five ways to train, each for the same
number of steps with batches of the same size, so for the same passes: with the labels alone; with random shifts; with
images of a generator that was trained on the labelled ones (`--extra`, half of each batch), labelled by the class that
it was told to make, or by the probabilities of a classifier that was trained on the labelled ones, too (`sparring
sample --labels`); with the unlabelled ones as that classifier labels them.

Each seed draws other labels and is judged on the same test images. What is finished is not done again:
python benchmarks/gan_extra.py digits mnist --out gan_extra
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common import percent, provenance, table
from sparring.app.compare import written
from sparring.app.evaluate_folder import evaluate_folder, from_run
from sparring.app.generate import Drawn, draw_images, soft_labels, write_sample
from sparring.app.settings import EvaluationSettings
from sparring.app.train_run import resume_run, settings_for, start_run
from sparring.core.batches import draw
from sparring.modalities import load_data
from sparring.modalities.images.generate import prepared
from sparring.results.read import read_evaluation
from sparring.results.table import tables_of


class Part(NamedTuple):
    """One data set: how many labels, images without, test images; the threat and how long everything is trained."""

    data: str
    num_labels: int
    num_others: int
    num_test: int
    threat: str
    settings: dict[str, Any]
    crop: int


PARTS = {
    "digits": Part("digits", 300, 1137, 360, "linf:0.2", {"epochs": 25, "passes": 5}, 1),
    "mnist": Part(
        "mnist", 1000, 10_000, 1000, "linf:0.2",
        {"model": "cnn-mnist", "batch_size": 64, "epochs": 10, "passes": 3, "radius_ramp": 0.5, "num_steps": 5}, 2,
    ),
}  # fmt: skip
NUM_MADE = 5000
ARMS: dict[str, dict[str, Any]] = {
    "labels only": {},
    "shifts": {"crop": True},
    "generated": {"extra": "generated.npz"},
    "generated, soft labels": {"extra": "soft.npz"},
    "pseudo-labelled": {"extra": "pseudo.npz"},
}


def few(part: Part, seed: int) -> None:
    """few.npz, whose training part is the labelled examples, and others.npz: what has lost its labels."""
    data = load_data(part.data)
    labelled = draw(data.y_train, part.num_labels, seed, balanced=True)
    rest = torch.ones(len(data.y_train), dtype=torch.bool)
    rest[labelled] = False
    others = rest.nonzero()[:, 0][draw(data.y_train[rest], part.num_others, seed)]
    x, x_test = prepared(data, data.x_train), prepared(data, data.x_test)
    arrays = {"x_train": x[labelled], "y_train": data.y_train[labelled], "x_test": x_test, "y_test": data.y_test}
    np.savez("few.npz", **{name: array.numpy() for name, array in arrays.items()})
    np.savez("others.npz", x=x[others].numpy(), y=data.y_train[others].numpy())


def trained(out: str, part: Part, seed: int, **options: Any) -> Path:
    """A run of that name in this folder."""
    folder, asked = Path(out), {"data": "few.npz", "seed": seed, "device": "cpu", **options}
    if not (folder / "training.json").exists():
        resume_run(folder) if (folder / "config.json").exists() else start_run(settings_for(asked), folder)
        print(f"{Path.cwd().name}: {out}", flush=True)
    return folder


def extras(part: Part, seed: int) -> None:
    """The files of extra examples, and how often their labels are right where that is known."""
    options = {key: value for key, value in part.settings.items() if key != "num_steps"}
    classifier = trained("classifier", part, seed, threat=part.threat, recipe="standard", **options)
    generator = trained("generator", part, seed, recipe="gan")
    if Path("pseudo.npz").exists():
        return
    drawn = draw_images(generator, NUM_MADE, seed=seed)
    write_sample(drawn, Path("generated.npz"), None)
    write_sample(drawn, Path("soft.npz"), classifier)
    with np.load("others.npz") as file:
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    soft, _ = soft_labels(Drawn(x, None, {}), classifier)
    assert drawn.y is not None
    told_by = soft_labels(drawn, classifier)[0]
    agree = (told_by.argmax(1) == drawn.y).double().mean()
    told = f"pseudo-labels right: {percent((soft.argmax(1) == y).double().mean())}; "
    told += f"generated images that the classifier takes for their condition: {percent(agree)}, "
    told += f"with a probability of {percent(told_by.amax(1).double().mean())} on average for its answer"
    Path("labels.txt").write_text(told)
    np.savez("pseudo.npz", x=x.numpy(), y=soft.argmax(1).numpy())


def arm(name: str, part: Part, seed: int, checks: bool) -> Path:
    """The folder of an arm's evaluation."""
    options = dict(ARMS[name])
    if options.pop("crop", False):
        options["crop"] = part.crop
    run = trained(name.replace(", ", "-").replace(" ", "-"), part, seed, threat=part.threat, **part.settings, **options)
    asked = EvaluationSettings(data="few.npz", threat=part.threat, num_examples=part.num_test, checks=checks)
    if not (run / "evaluation" / "results.json").exists():
        evaluate_folder(from_run(run), run / "evaluation", asked)
    return (run / "evaluation").resolve()


def compared(found: dict[str, list[Path]], first: str) -> str:
    """What `sparring compare` prints, with that arm in the first row."""
    names = [first, *(name for name in found if name != first)]
    tables = tables_of([read_evaluation(folder) for name in names for folder in found[name]])
    return written(tables, "markdown")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--checks", action="store_true", help="with the battery, which takes as long as the attacks")
    parser.add_argument("--out", type=Path, default=Path("gan_extra"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    for part in (PARTS[name] for name in asked.parts):
        found: dict[str, list[Path]] = {name: [] for name in asked.arms}
        for seed in range(asked.seeds):
            folder = asked.out / f"{part.data}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            with contextlib.chdir(folder):
                if not Path("few.npz").exists():
                    few(part, seed)
                extras(part, seed)
                for name in asked.arms:
                    found[name].append(arm(name, part, seed, asked.checks))
                print(f"seed {seed}: {Path('labels.txt').read_text()}")
        rows = []
        for name, folders in found.items():
            metrics = [read_evaluation(folder).results.metrics for folder in folders]
            shares = [[m[key].value for m in metrics] for key in ("clean_accuracy", "robust_accuracy")]
            rows.append([name, *(cell for each in shares for cell in (
                percent(sum(each) / len(each)), ", ".join(f"{100 * share:.1f}" for share in each)))])  # fmt: skip
        print(f"\n{part.data}\n\n" + table(["", "clean", "by seed", "robust", "by seed"], rows))
        for first in {"labels only", "generated"} & found.keys():
            print(f"\nagainst {first}\n\n{compared(found, first)}")
    print(provenance(seed=f"0 to {asked.seeds - 1}", n=[PARTS[name].num_test for name in asked.parts]))


if __name__ == "__main__":
    main()
