"""Word and character search beside TextAttack 0.3.11: sentences per CPU second, and how many fall.

One process, the same network, sentences, substitutes and stop words, the same greedy search (words ranked by what is
lost when one is unknown, each to its best substitute). Units are joined by blanks, so that both see the same words;
sentences that TextAttack cuts otherwise are left out. The two take turns, `--rounds` times.

It needs an environment of its own, with PYTHONPATH=src and
    pip install uv; uv pip install torch pydantic typer rich filelock
    uv pip install textattack==0.3.11 'flair>=0.14' 'pyarrow<21' 'transformers<4.58' 'setuptools<81'
and before the start NLTK_DATA with an (own) list corpora/stopwords/english, TA_CACHE_DIR with an empty file
post_install_check_3, HF_HUB_OFFLINE=1. The network is a run folder (SST-2, words), or with --bert one of BERT's size
with random weights, judged against its own answers.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import textattack
import torch
from textattack.attack_results import SuccessfulAttackResult
from textattack.constraints.pre_transformation import RepeatModification, StopwordModification
from textattack.goal_functions import UntargetedClassification
from textattack.models.wrappers import ModelWrapper
from textattack.search_methods import GreedySearch, GreedyWordSwapWIR
from textattack.shared import AttackedText
from textattack.shared.utils import words_from_text
from textattack.transformations import WordSwap
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from common import percent, provenance, table
from sparring.app.train_run import load
from sparring.modalities import find, load_data
from sparring.modalities.text.misspellings import misspellings
from sparring.modalities.text.models import TextNet
from sparring.modalities.text.search import full_search, greedy
from sparring.modalities.text.threats import Substitutions, substitution_table

SST2 = "sst2,vectors=glove"


class Bert(TextNet):
    """110 million weights as they began; words are its tokens."""

    def __init__(self, vocabulary: int) -> None:
        from transformers import BertConfig, BertForSequenceClassification

        super().__init__(2, 768)
        self.inner = BertForSequenceClassification(BertConfig(vocab_size=vocabulary, num_labels=2))
        self.words = self.inner.get_input_embeddings()

    def judge(self, vectors: Tensor, mask: Tensor) -> Tensor:
        return self.inner(inputs_embeds=vectors, attention_mask=mask.long()).logits


class Wrapped(ModelWrapper):
    """The network as TextAttack asks it: strings -> logits."""

    def __init__(self, model: nn.Module, lexicon: Any) -> None:
        self.model, self.lexicon = model, lexicon

    def __call__(self, texts: list[str]) -> Tensor:
        with torch.no_grad():
            return self.model(as_inputs([text.split(" ") for text in texts], self.lexicon))


class Listed(WordSwap):
    """The substitutes of a threat."""

    def __init__(self, threat: Substitutions) -> None:
        super().__init__()
        words, number_of = threat.lexicon.words, threat.lexicon.number_of
        self.of = {
            word: [words[int(o)] for o in threat.table[n][threat.allowed[n]]] for word, n in number_of.items()
            if threat.allowed[n].any()
        }  # fmt: skip

    def _get_replacement_words(self, word: str) -> list[str]:
        return self.of.get(word, [])


def as_inputs(units: list[list[str]], lexicon: Any) -> dict[str, Tensor]:
    """`ids` and `mask`, padded to the longest."""
    ids = torch.zeros(len(units), max(map(len, units)), dtype=torch.int64)
    for row, text in zip(ids, units, strict=True):
        row[: len(text)] = torch.tensor(lexicon.numbers(text))
    return {"ids": ids, "mask": ids > 0}


def misspelt(data: Any, threat: Any) -> Substitutions:
    """Six misspellings of each word of four letters or more, such as TextAttack takes for one word."""
    words = threat.lexicon.words
    forms = {word: [f for f in misspellings(word, 12) if words_from_text(f) == [f]][:6] for word in words}
    lexicon = threat.lexicon.plus(form for several in forms.values() for form in several)
    table_of, allowed = substitution_table(lexicon, {word: tuple(several) for word, several in forms.items()}, 6)
    return Substitutions(1.0, table_of, allowed, lexicon, "k=6", "characters")


def theirs(model: Any, threat: Substitutions, units: list[list[str]], y: list[int], search: Any) -> dict[str, Any]:
    """TextAttack's figures. Words without a substitute are stop words to it, so that both rank the same."""
    wrapper, swap = Wrapped(model, threat.lexicon), Listed(threat)
    still = {word for text in units for word in text if word not in swap.of}
    goal = UntargetedClassification(wrapper, use_cache=True)
    attack = textattack.Attack(goal, [RepeatModification(), StopwordModification(stopwords=still)], swap, search)
    started, broken, queries = time.process_time(), [], 0
    for text, label in zip(units, y, strict=True):
        result = attack.attack(" ".join(text), label)
        broken.append(isinstance(result, SuccessfulAttackResult))
        queries += result.num_queries
    return {"seconds": time.process_time() - started, "broken": broken, "queries": queries}


def ours(model: Any, threat: Substitutions, units: list[list[str]], y: list[int], attack: Any) -> dict[str, Any]:
    """Our figures, on all sentences at once."""
    started = time.process_time()
    x, label = as_inputs(units, threat.lexicon), torch.tensor(y)
    with torch.no_grad():
        right = model(x).argmax(1) == label
    found = attack(threat)(model, x, label)
    seconds = time.process_time() - started
    return {"seconds": seconds, "broken": (found.reached & right).tolist(), "queries": len(y) + found.cost.forwards}


def sentences(data: Any, count: int) -> tuple[list[list[str]], list[int], int]:
    """Units of the first validation sentences that both cut alike, their labels, and how many were left out."""
    units, labels, left_out = [], [], 0
    for row in range(len(data.y_test)):
        text = [token.key for token in data.tokens("test", row)]
        words = [unit for unit in text if words_from_text(unit)]
        if AttackedText(" ".join(text)).words != words or len(text) > 60:
            left_out += 1
            continue
        units.append(text)
        labels.append(int(data.y_test[row]))
        if len(units) == count:
            break
    return units, labels, left_out


def main() -> None:
    """Prints a row for each search."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--run", type=Path, help="a run folder of SST-2")
    parser.add_argument("--bert", action="store_true")
    parser.add_argument("--num-sentences", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data: Any = load_data(SST2)
    words: Any = find("text").make_threat("words:1.0,k=8", data)
    model = (Bert(len(words.lexicon)) if asked.bert else load(asked.run)).eval()
    units, y, left_out = sentences(data, asked.num_sentences)
    if asked.bert:
        y = Wrapped(model, words.lexicon)([" ".join(text) for text in units]).argmax(1).tolist()
    letters = misspelt(data, words)
    unknown: Callable[[], Any] = lambda: GreedyWordSwapWIR(wir_method="unk")  # noqa: E731
    tasks: dict[str, tuple[Substitutions, Any, dict[str, Any]]] = {
        "words, greedy": (words, unknown, {"ours": greedy, "ours, ranked by one gradient": by_gradient}),
        "characters, greedy": (letters, unknown, {"ours": greedy}),
    }
    if not asked.bert:
        tasks["words, all single changes"] = (words, GreedySearch, {"ours": full_search})
    rows = []
    for task, (threat, search, attacks) in tasks.items():
        found: dict[str, list[dict[str, Any]]] = {}
        for _ in range(asked.rounds):
            found.setdefault("TextAttack", []).append(theirs(model, threat, units, y, search()))
            for name, attack in attacks.items():
                found.setdefault(name, []).append(ours(model, threat, units, y, attack))
        base = median(found["TextAttack"])
        for name, runs in found.items():
            same = sum(a == b for a, b in zip(runs[0]["broken"], found["TextAttack"][0]["broken"], strict=True))
            queries, speed = runs[0]["queries"] / len(units), len(units) / median(runs)
            rows.append((
                task, name, sum(runs[0]["broken"]), percent(same / len(units)), f"{queries:.1f}", f"{speed:,.4g}",
                f"{base / median(runs):.1f}",
            ))  # fmt: skip
            print(rows[-1], flush=True)
    head = ("search", "of", "broken", "alike", "queries a sentence", "sentences per CPU s", "times")
    print(table(head, rows))
    note = f"{len(units)} ({left_out} left out)"
    print("\n" + provenance(seed=0, n=note, packages=("textattack", "transformers")))


def by_gradient(threat: Substitutions) -> Any:
    """The greedy search, ranked by one gradient."""
    return greedy(threat, rank="gradient")


def median(runs: list[dict[str, Any]]) -> float:
    """CPU seconds of the middle run."""
    return sorted(run["seconds"] for run in runs)[len(runs) // 2]


if __name__ == "__main__":
    main()
