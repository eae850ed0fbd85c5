"""A small BERT trained here by the Hugging Face `Trainer`, attacked, and hardened through the mixin `RobustLoss`.

SST-2, words as tokens, GloVe 50 as the first word vectors; 2 layers of width 50, 5 heads. Judged as in text.py: all 872
validation sentences, every word that is no stop word into one of its 8 counter-fitted neighbours, the plan `full`.
--choose judges on the tenth of the training sentences that is held out, by the plan `fast`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parent))
from common import Lines, percent, provenance, table
from sparring.adapters.hugging_face import ReplacedWords, RobustLoss
from sparring.core.batches import Batches, hold_out
from sparring.core.types import take
from sparring.evaluation.measure import measure
from sparring.modalities import find, load_data

KIND = find("text")


def make_bert(data: Any) -> Any:
    """The network, its word vectors those of GloVe where there are such."""
    model: Any = BertForSequenceClassification(BertConfig(
        vocab_size=data.facts["vocabulary"], hidden_size=50, num_hidden_layers=2, num_attention_heads=5,
        intermediate_size=100, max_position_embeddings=64, num_labels=2,
    ))  # fmt: skip
    pooled = KIND.make_model("bag", 0, data.given)
    data.start(pooled)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(pooled.words.weight)
    return model


def collated(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A batch without the columns that are padding in all rows."""
    longest = max(int(row["attention_mask"].sum()) for row in rows)
    batch = {name: torch.stack([row[name] for row in rows])[:, :longest] for name in ("input_ids", "attention_mask")}
    return {**batch, "labels": torch.tensor([int(row["labels"]) for row in rows])}


def trained(data: Any, rows: Tensor, recipe: Any, epochs: int, seed: int) -> tuple[Any, float]:
    """The network after training, and CPU seconds."""

    class Hardening(RobustLoss, Trainer):
        texts = ReplacedWords

    Hardening.recipe = recipe
    set_seed(seed)
    model, x, y = make_bert(data), take(data.x_train, rows), data.y_train[rows]
    examples = [
        {"input_ids": ids, "attention_mask": mask.long(), "labels": label}
        for ids, mask, label in zip(x["ids"], x["mask"], y, strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=epochs, per_device_train_batch_size=64, learning_rate=1e-3, seed=seed,
            warmup_steps=100, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_strategy="no",
        )  # fmt: skip
        started = time.process_time()
        Hardening(model=model, args=arguments, train_dataset=examples, data_collator=collated).train()
    return model.eval(), time.process_time() - started


def main() -> None:
    """Trains and judges what is not in the file yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--runs", default="standard,8;hull,8", help="recipe,epochs with semicolons")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--num-examples", type=int, help="of the validation sentences, the first; all unless given")
    parser.add_argument("--choose", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("hugging_face.jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lines, data = Lines(asked.out), load_data("sst2,vectors=glove,length=60")
    threat = KIND.make_threat("words:1.0,k=8,list=counterfitted", data)
    for seed in range(asked.seeds):
        kept, held = hold_out(data.y_train, 0.1, seed)
        judged = data.batches("test", count=asked.num_examples)
        if asked.choose:
            judged = Batches(take(data.x_train, held), data.y_train[held], 250)
        for run in asked.runs.split(";"):
            name, epochs = run.rsplit(",", 1)
            key = {"recipe": name, "epochs": int(epochs), "seed": seed, "choose": asked.choose}
            if lines.find(**key):
                continue
            model, seconds = trained(data, kept, KIND.named_recipe(name)(threat), int(epochs), seed)
            started, plan = time.process_time(), KIND.make_plan("fast" if asked.choose else "full", threat)
            found = measure(ReplacedWords(model).eval(), judged, threat, plan, curve=())
            print(lines.add({
                **key, "n": found.clean.n, "clean": found.clean.value, "robust": found.robust.value,
                "train_seconds": seconds, "attack_seconds": time.process_time() - started,
                "broke": {attack.name: attack.broke for attack in found.attacks},
            }), flush=True)  # fmt: skip
    own = [r for r in lines.records if r["choose"] == asked.choose]
    rows = [(
        f"{r['recipe']}, {r['epochs']} epochs, seed {r['seed']}", percent(r["clean"]), percent(r["robust"]),
        f"{r['train_seconds']:.0f}", f"{r['attack_seconds']:.0f}",
    ) for r in own]  # fmt: skip
    print(table(("training", "clean", "robust", "training, CPU s", "attack, CPU s"), rows) + "\n")
    print(provenance(seed=f"0 to {asked.seeds - 1}", n=sorted({r["n"] for r in own}), packages=("transformers",)))


if __name__ == "__main__":
    main()
