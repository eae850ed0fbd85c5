"""Sentences of film reviews written by a small language model, and by the same after adversarial fine-tuning.

Quality and diversity are bought with each other by the temperature, so a model is a curve: how likely a trigram model
of held-out sentences finds what is written, against self-BLEU; with distinct-n, verbatim copies, and how likely
held-out sentences are to the writer. Fine-tuning is the game of `Gan` on one-hot words, whose gradient goes straight
through the choice of a word (Jang 2017; Nie 2019). It is worth something where its point lies below the curve of
maximum likelihood. Settings: those of an earlier trial; nothing was searched.

Needs $SPARRING_DATA with sst2/: python benchmarks/language.py --out language.jsonl
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import Lines, provenance, table
from sparring.core.batches import Batches
from sparring.core.model_state import private_rng
from sparring.core.noise import Noise
from sparring.modalities import load_data
from sparring.modalities.text.tokens import tokens_of
from sparring.quality.texts import distinct_ngrams, self_bleu, share_of_copies
from sparring.training.gan import Gan, Pair
from sparring.training.loop import train

SHORTEST, LONGEST, NUM_WRITTEN = 3, 16, 1000
END, UNKNOWN = 0, 1
TEMPERATURES = (0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
NUM_STEPS = (50, 200)
"""Of fine-tuning; each is judged."""
FIGURES = {"judge": ".2f", "self_bleu": ".3f", "distinct_1": ".3f", "distinct_2": ".3f", "copies": ".3f"}
Words = list[str]


class Writer(nn.Module):
    """An LSTM that gives the next word; as a generator: normal noise (B, L * V) -> one-hot words (B, L, V).

    Words are the largest of logits / temperature + Gumbel noise, so samples of the softmax; their gradient is that of
    the softmax of it with the temperature `soft`. After the end there are only ends.
    """

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(num_words, 64), nn.Linear(128, num_words)
        self.lstm, self.drop = nn.LSTM(64, 128, batch_first=True), nn.Dropout(0.3)
        self.num_words, self.num_noise, self.num_classes = num_words, (LONGEST + 1) * num_words, 0
        self.temperature, self.soft = 1.0, 0.5

    def next_words(self, ids: Tensor) -> Tensor:
        """Logits (B, L, V) of each word of texts (B, L) after those before it."""
        before = F.pad(ids[:, :-1], (1, 0), value=END)
        logits: Tensor = self.head(self.drop(self.lstm(self.drop(self.embed(before)))[0]))
        return logits

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        uniform = torch.special.ndtr(z).clamp(1e-6, 1 - 1e-6)
        gumbel = -(-uniform.log()).log().view(len(z), LONGEST + 1, -1)
        end = F.one_hot(torch.full((len(z),), END), self.num_words).to(z.dtype)
        word, state, ended, words = end, None, torch.zeros(len(z), 1, dtype=torch.bool), []
        for noise in gumbel.unbind(1):
            seen, state = self.lstm((word @ self.embed.weight)[:, None], state)
            scores = self.head(seen[:, 0]) / self.temperature + noise
            soft, hard = (scores / self.soft).softmax(1), F.one_hot(scores.argmax(1), self.num_words).to(z.dtype)
            word = torch.where(ended, end, hard + soft - soft.detach())
            ended = ended | (hard[:, END : END + 1] > 0)
            words.append(word)
        return torch.stack(words, 1)


class Critic(nn.Module):
    """One-hot words (B, L, V) -> how real they look (B,): the largest answers of filters over 2, 3 and 4 words."""

    def __init__(self, num_words: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(num_words, 64, bias=False), nn.Linear(192, 1)
        self.filters = nn.ModuleList(nn.Conv1d(64, 64, width) for width in (2, 3, 4))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        seen = self.embed(x).movedim(1, 2)
        found = [F.leaky_relu(one(seen), 0.2).amax(2) for one in self.filters]
        answer: Tensor = self.head(torch.cat(found, 1))[:, 0]
        return answer


def next_word_loss(model: Pair, x: Tensor, y: Tensor, *, noise: Noise | None = None) -> Tensor:
    """The recipe of maximum likelihood: mean -log p of each word and of the end. x: texts (B, L)."""
    logits = model.g.next_words(x)
    counts = F.pad(x[:, :-1] != END, (1, 0), value=True)
    return F.cross_entropy(logits[counts], x[counts])


def held_out_loss(pair: Pair, x: Tensor, temperature: float = 1.0) -> float:
    """The same of a model at a temperature, over words that it knows and the unknown one alike."""
    with torch.no_grad():
        logits = pair.g.next_words(x) / temperature
    counts = F.pad(x[:, :-1] != END, (1, 0), value=True)
    return float(F.cross_entropy(logits[counts], x[counts]))


class Trigrams:
    """The judge: 0.6 trigram + 0.25 bigram + 0.1 unigram + 0.05 uniform shares, fitted on held-out texts."""

    def __init__(self, texts: Sequence[Words], num_words: int) -> None:
        self.num_words, padded = num_words, [["", "", *text, ""] for text in texts]
        self.counts = [Counter(tuple(t[i - n : i + 1]) for t in padded for i in range(2, len(t))) for n in range(3)]
        self.before = [Counter(tuple(t[i - n : i]) for t in padded for i in range(2, len(t))) for n in range(3)]

    def loss(self, texts: Sequence[Words]) -> float:
        """Mean -log p of each word and of the end."""
        found = []
        for text in texts:
            padded = ["", "", *text, ""]
            for i in range(2, len(padded)):
                p = 0.05 / self.num_words
                for n, weight in enumerate((0.1, 0.25, 0.6)):
                    before = self.before[n][tuple(padded[i - n : i])]
                    p += weight * self.counts[n][tuple(padded[i - n : i + 1])] / before if before else 0.0
                found.append(-math.log(p))
        return sum(found) / len(found)


class Reviews:
    """Sentences of SST-2: to train on, to choose the epoch, for the judge; its validation sentences are held out."""

    def __init__(self) -> None:
        data, draw = load_data("sst2"), np.random.default_rng(0)
        texts, self.held = (
            [t for s in data.strings[part] if SHORTEST <= len(t := [k.key for k in tokens_of(s)]) <= LONGEST]  # type: ignore[attr-defined]
            for part in ("train", "test")
        )
        order = [texts[i] for i in draw.permutation(len(texts))]
        parts = order[:1500], order[1500:1700], order[1700:]
        counts = Counter(word for text in parts[0] for word in text)
        self.words = ["", "<unknown>", *sorted(word for word, count in counts.items() if count > 1)]
        self.number = {word: i for i, word in enumerate(self.words)}
        self.train, self.choose, judge, self.held = (self.known(part) for part in (*parts, self.held))
        self.judge = Trigrams(judge, len(self.words))

    def known(self, texts: Sequence[Words]) -> list[Words]:
        return [[word if word in self.number else self.words[UNKNOWN] for word in text] for text in texts]

    def ids(self, texts: Sequence[Words]) -> Tensor:
        rows = [[self.number[word] for word in text] for text in texts]
        return torch.tensor([row + [END] * (LONGEST + 1 - len(row)) for row in rows])

    def one_hot(self, ids: Tensor) -> Tensor:
        return F.one_hot(ids, len(self.words)).float()


def likeliest(reviews: Reviews, seed: int) -> Pair:
    """A pair whose writer is trained by maximum likelihood; the epoch is chosen by its loss on other sentences."""
    with private_rng(seed, torch.device("cpu")):
        pair = Pair(Writer(len(reviews.words)), Critic(len(reviews.words)))  # type: ignore[arg-type]
        optimizer, choose = torch.optim.Adam(pair.g.parameters(), 3e-3), reviews.ids(reviews.choose)
        batches = Batches(reviews.ids(reviews.train), torch.zeros(1500, dtype=torch.int64), 64, seed=seed, shuffle=True)
        result = train(
            pair, batches, next_word_loss, optimizer, num_epochs=25, seed=seed, score="likelihood",
            validate=lambda model: {"likelihood": -held_out_loss(model, choose)},
        )  # fmt: skip
    pair.load_state_dict(result.best)
    return pair.eval()


def tuned(pair: Pair, reviews: Reviews, seed: int, judge: Any) -> None:
    """Plays the game from there on, and hands the pair to `judge` on the way."""
    groups = [{"params": pair.g.parameters(), "lr": 1e-4}, {"params": pair.d.parameters(), "lr": 1e-3}]
    batches = Batches(
        reviews.ids(reviews.train), torch.zeros(1500, dtype=torch.int64), 64, seed=seed, shuffle=True, drop_last=True,
        prepare=reviews.one_hot,
    )  # fmt: skip

    def observe(state: Any) -> bool:
        if state.step in NUM_STEPS:
            pair.eval()
            judge(state.step)
            pair.train()
        return state.step >= NUM_STEPS[-1]

    optimizer = torch.optim.Adam(groups, betas=(0.0, 0.99))
    train(pair, batches, Gan(loss="r3", gamma=0.1), optimizer, num_epochs=10**4, seed=seed, observe=observe)  # type: ignore[arg-type]


def written(pair: Pair, reviews: Reviews, temperature: float, seed: int) -> list[Words]:
    """Texts of the writer at that temperature; empty ones are left out."""
    pair.g.temperature, texts = temperature, list[Words]()
    noise = Noise.make(seed, "sentences", torch.arange(NUM_WRITTEN))
    with torch.no_grad():
        for rows in torch.arange(NUM_WRITTEN).split(100):
            z = noise.take(rows).normal((pair.g.num_noise,))
            texts += [[reviews.words[i] for i in row if i != END] for row in pair.g(z, rows).argmax(2).tolist()]
    pair.g.temperature = 1.0
    return [text for text in texts if text]


def figures(texts: list[Words], reviews: Reviews) -> dict[str, float]:
    return {
        "judge": reviews.judge.loss(texts), "self_bleu": self_bleu(texts), "distinct_1": distinct_ngrams(texts, 1),
        "distinct_2": distinct_ngrams(texts, 2), "copies": share_of_copies(texts, reviews.train), "n": len(texts),
    }  # fmt: skip


def measured(reviews: Reviews, seed: int) -> list[dict[str, Any]]:
    """Both models of a seed: a record for each temperature and moment."""
    held, started, records = reviews.ids(reviews.held), time.process_time(), list[dict[str, Any]]()
    pair = likeliest(reviews, seed)

    def judge(name: str, temperatures: Sequence[float], draw: int = 0) -> None:
        seconds = time.process_time() - started
        for temperature in temperatures:
            texts = written(pair, reviews, temperature, seed + 1000 * draw)
            about = {"seed": seed, "model": name, "temperature": temperature, "seconds": seconds}
            found = {**figures(texts, reviews), "held_out": held_out_loss(pair, held, temperature)}
            records.append({**about, **found, "examples": [" ".join(text) for text in texts[:8]]})

    judge("likelihood", TEMPERATURES)
    judge("likelihood, drawn again", (0.8, 1.0), draw=1)  # how far chance alone goes from the curve
    started = time.process_time()
    tuned(pair, reviews, seed, lambda step: judge(f"tuned {step}", (0.8, 1.0)))
    return records


def beside_the_curve(records: Sequence[dict[str, Any]], record: dict[str, Any]) -> float:
    """How much likelier (below 0) the judge finds it than maximum likelihood at a temperature of that self-BLEU."""
    own = [r for r in records if (r["seed"], r["model"]) == (record["seed"], "likelihood")]
    curve = sorted((r["self_bleu"], r["judge"]) for r in own)
    return float(record["judge"] - np.interp(record["self_bleu"], *zip(*curve, strict=True)))


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """The curve of each seed, with the points of fine-tuning."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 4))).add_subplot()
    for model, line in {r["model"]: "-" if r["model"] == "likelihood" else "" for r in records}.items():
        for seed in sorted({r["seed"] for r in records}):
            own = [r for r in records if (r["seed"], r["model"]) == (seed, model)]
            places = [[r[key] for r in own] for key in ("self_bleu", "judge")]
            axes.plot(*places, "." + line, label=f"{model}, seed {seed}")
    axes.set(xlabel="self-BLEU-3 (less: more diverse)", ylabel="judge: -log p a word (less: likelier)")
    axes.legend(fontsize=6)
    figure.savefig(path, dpi=120)


def cells(found: dict[str, float]) -> list[str]:
    return [f"{found[key]:{form}}" for key, form in FIGURES.items()]


def unknown(texts: Sequence[Words]) -> float:
    words = [word for text in texts for word in text]
    return words.count("<unknown>") / len(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("language.jsonl"))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    reviews, lines = Reviews(), Lines(asked.out)
    for seed in range(asked.seeds):
        if not lines.find(seed=seed):
            lines.add({"seed": seed, "records": measured(reviews, seed)})
            print(f"seed {seed} is done", flush=True)
    records = [record for line in lines.records for record in line["records"]]
    real = {"training sentences": reviews.train[:NUM_WRITTEN], f"held-out sentences, {len(reviews.held)}": reviews.held}
    rows = [[name, "", *cells(figures(texts, reviews)), "", ""] for name, texts in real.items()]
    for model, temperature in dict.fromkeys((r["model"], r["temperature"]) for r in records):
        own = [r for r in records if (r["model"], r["temperature"]) == (model, temperature)]
        means = {key: sum(r[key] for r in own) / len(own) for key in (*FIGURES, "held_out")}
        beside = [] if model == "likelihood" else [f"{beside_the_curve(records, r):+.2f}" for r in own]
        rows.append([model, temperature, *cells(means), f"{means['held_out']:.3f}", " ".join(beside)])
    print(table(["", "temperature", *FIGURES, "held-out -log p", "beside the curve, by seed"], rows) + "\n")
    shares = [
        f"{unknown(texts):.1%} of {name}" for name, texts in (("training", reviews.train), ("held out", reviews.held))
    ]
    print(f"{len(reviews.words)} words; unknown: {', '.join(shares)}\n")
    draw(records, asked.out.with_suffix(".png"))
    print(provenance(seed=f"0 to {asked.seeds - 1}", n=f"{NUM_WRITTEN} written, {len(reviews.held)} held out"))


if __name__ == "__main__":
    main()
