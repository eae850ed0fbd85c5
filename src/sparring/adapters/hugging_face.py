"""Hugging Face's Trainer with a recipe as its loss, for images and for texts; classifiers of texts from disk.

Transformers is imported where a classifier is read, and nowhere else.
Shapes: B examples, L tokens or words, K forms of a word, S pieces in all, D numbers of a word vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparring.adapters.optional import need
from sparring.core.batches import pair_in
from sparring.core.types import logits_of

SHIFT = "shift"
"""The named input (B, L, D) that is added to the word vectors."""


class ShiftedVectors(nn.Module):
    """A model of texts whose word vectors can be moved: tokenised texts with a `shift` (B, L, D) -> logits (B, K).

    `batch` makes its inputs. The threat is `Lens(L2(0.5, low=None, high=None), "shift")`: a ball around no shift at
    all. Gradients reach the word vectors' weights as in ordinary training.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.training = model, model.training

    @property
    def vectors(self) -> nn.Module:
        """What makes vectors of tokens."""
        found: nn.Module = getattr(self.model, "module", self.model).get_input_embeddings()  # behind DataParallel
        return found

    def batch(self, texts: Mapping[str, Any]) -> dict[str, Tensor]:
        """The named inputs of tokenised texts, without labels, and with a shift of zero."""
        ids, weight = texts["input_ids"], next(self.vectors.parameters())
        named = {name: value for name, value in texts.items() if name != "labels" and isinstance(value, Tensor)}
        return {**named, SHIFT: torch.zeros(*ids.shape, weight.shape[1], dtype=weight.dtype, device=ids.device)}

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        others = {name: value for name, value in x.items() if name not in ("input_ids", SHIFT)}
        return logits_of(self.model(inputs_embeds=self.vectors(x["input_ids"]) + x[SHIFT], **others))


class ReplacedWords(ShiftedVectors):
    """A model of texts whose words can be replaced: `ids` (B, L) and `mask` (B, L), as the threats of texts have them.

    With `weights` (B, L, K), `ids` are (B, L, K) and a word is the weighted mean of their vectors; `offset` (B, L, D)
    is added. `unknown` is the number by which those at or above the model's vocabulary are read. Other tensors of a
    batch (such as token types) reach the model as they are.
    """

    def __init__(self, model: Any, unknown: int = 1) -> None:
        super().__init__(model)
        self.unknown = unknown

    def batch(self, texts: Mapping[str, Any]) -> dict[str, Tensor]:
        """The named inputs of tokenised texts, without labels."""
        named = {name: value for name, value in texts.items() if name != "labels" and isinstance(value, Tensor)}
        ids = named.pop("input_ids")
        mask = named.pop("attention_mask", torch.ones_like(ids))
        return {**named, "ids": ids, "mask": mask.bool()}

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        others = {name: value for name, value in x.items() if name not in ("ids", "mask", "weights", "offset")}
        size = next(self.vectors.parameters()).shape[0]
        vectors = self.vectors(torch.where(x["ids"] < size, x["ids"], self.unknown))
        if "weights" in x:
            vectors = (vectors * x["weights"][..., None]).sum(2)
        vectors = vectors + x["offset"] if "offset" in x else vectors
        return logits_of(self.model(inputs_embeds=vectors, attention_mask=x["mask"].long(), **others))


class WordsInPieces(ReplacedWords):
    """A classifier of texts behind its own tokenizer: the `ids` (B, L) are whole words, which become its pieces here.

    `read_words` says which word each number is; the threats of texts say so where they are made for a model. A word may
    become one of more or fewer pieces. A mixture (`weights`) has as many as the heaviest of its words, and each piece
    is the mean of those at its place, a shorter word repeating its last: at a corner of the threat that is the real
    text, piece by piece. What is longer than the model reads is cut at the end. `offset` moves all pieces of a word.
    """

    token_norm: Tensor
    pieces: Tensor
    count: Tensor
    first: Tensor
    last: Tensor

    def __init__(self, model: Any, tokenizer: Any, weights_file: Path | None = None, unlike: float = 0.0) -> None:
        super().__init__(model)
        self.tokenizer, self.weights_file, self.unlike = tokenizer, weights_file, unlike
        self._read: Sequence[str] = ()
        alone, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
        at = next((i for i in range(len(framed)) if framed[i : i + len(alone)] == alone), 0)
        self.register_buffer("token_norm", next(self.vectors.parameters()).detach().norm(dim=1).mean())
        for name in ("pieces", "count"):
            self.register_buffer(name, torch.zeros(0, dtype=torch.int64), persistent=False)
        for name, part in (("first", framed[:at]), ("last", framed[at + len(alone) :])):
            self.register_buffer(name, torch.tensor(part, dtype=torch.int64), persistent=False)

    @property
    def words(self) -> nn.Module:
        """What makes vectors, as threats on vectors ask for it."""
        return self.vectors

    def read_words(self, words: Sequence[str]) -> None:
        """From now on number n is the n-th of these words; the first two stand for padding and for an unknown word."""
        if words == self._read:
            return
        rows = self.tokenizer(list(words), add_special_tokens=False)["input_ids"]
        rows[: self.unknown + 1] = [[self.tokenizer.unk_token_id]] * (self.unknown + 1)
        longest = max(map(len, rows))
        filled = [row + (row[-1:] or [0]) * (longest - len(row)) for row in rows]
        self.pieces = torch.tensor(filled, device=self.first.device)
        self.count = torch.tensor([len(row) for row in rows], device=self.first.device)
        self._read = words

    def expect_alike(self, texts: Sequence[str], ids: Tensor) -> None:
        """Raises ValueError where more than the share `unlike` of these texts is read otherwise than as its words
        `ids` (N, L): a sign such as that of pounds is a word of its own there, and here one with what it touches."""
        strings, pieces = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"], self.pieces.tolist()
        count, odd = self.count.tolist(), []
        for text, row, whole in zip(texts, ids.tolist(), strings, strict=True):
            own = [piece for n in row if n for piece in pieces[n][: count[n]]]
            odd += [text] if own != whole[: len(own)] else []
        if len(odd) > self.unlike * len(texts):
            raise ValueError(
                f"{len(odd)} of {len(texts)} texts are not read as they are written, such as {odd[0][:60]!r}: the "
                "model's tokenizer joins signs to words that here are words of their own. Put blanks around such signs "
                f"in the file, or allow it: transformers:FOLDER,unlike={len(odd) / len(texts) + 0.005:.2f}"
            )

    def forward(self, x: Mapping[str, Tensor]) -> Tensor:
        if not len(self.count):
            raise ValueError(
                "this model reads words by their letters, and has not been told which words the numbers are: make the "
                "threat with the model, make_threat(text, data, model), or call model.read_words(data.lexicon.words)"
            )
        ids = x["ids"].where(x["ids"] < len(self.count), self.unknown)
        forms = ids if "weights" in x else ids[..., None]  # (B, L, K)
        own = forms.gather(2, x["weights"].argmax(2, keepdim=True))[..., 0] if "weights" in x else ids
        count = self.count[own] * x["mask"]
        ends = count.cumsum(1)
        room = min(self.model.config.max_position_embeddings, self.tokenizer.model_max_length)
        room -= len(self.first) + len(self.last)
        total = ends[:, -1:].clamp_max(room)  # (B, 1)
        # the length hangs on the words, so the device is waited for here
        place = torch.arange(int(total.max()) + len(self.last), device=ids.device).expand(len(ids), -1)  # (B, S)
        word = torch.searchsorted(ends, place.contiguous(), right=True).clamp_max(ids.shape[1] - 1)
        slot = (place - (ends - count).gather(1, word)).clamp(0, self.pieces.shape[1] - 1)
        pieces = self.pieces[_at(forms, word), slot[..., None]]  # (B, S, K)
        vectors = self.vectors(pieces)
        vectors = (vectors * _at(x["weights"], word)[..., None]).sum(2) if "weights" in x else vectors[:, :, 0]
        vectors = vectors + _at(x["offset"], word) if "offset" in x else vectors
        behind = self.vectors(self.last[(place - total).clamp(0, len(self.last) - 1)])
        vectors = vectors.where((place < total)[..., None], behind)
        before = self.vectors(self.first).expand(len(ids), -1, -1)
        there = torch.cat([torch.ones_like(before[..., 0], dtype=torch.bool), place < total + len(self.last)], 1)
        return logits_of(self.model(inputs_embeds=torch.cat([before, vectors], 1), attention_mask=there.long()))


def _at(rows: Tensor, word: Tensor) -> Tensor:
    """(B, S, *) of (B, L, *): what belongs to the word of each piece."""
    return rows.gather(1, word[..., None].expand(-1, -1, rows.shape[2]))


def load_classifier(folder: str | Path, unlike: float = 0.01) -> WordsInPieces:
    """The sequence classifier that `save_pretrained` wrote with its tokenizer into a folder, in eval mode.

    From this disk alone, from safetensors alone; no code of the folder is run. The tokenizer has to read a word alike
    wherever it stands and however it is written (WordPiece in lower case, as of bert-base-uncased): a threat knows
    words, not the blanks and capitals around them. unlike: see `expect_alike`. Raises ImportError, FileNotFoundError
    and ValueError in a sentence.
    """
    place = Path(folder).expanduser()
    weights = place / "model.safetensors"
    for file in (place / "config.json", weights):
        if not file.is_file():
            raise FileNotFoundError(
                f"transformers:{folder}: there is no file {file}; expected a folder that model.save_pretrained and "
                "tokenizer.save_pretrained wrote, with the weights in one .safetensors file (pickled ones may run code)"
            )
    transformers = need("transformers", f"transformers:{folder}", "huggingface")
    here: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **here)
        model, told = transformers.AutoModelForSequenceClassification.from_pretrained(
            place, use_safetensors=True, output_loading_info=True, **here
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ValueError(f"transformers:{folder} cannot be read ({type(error).__name__}: {first_line})") from error
    if missing := sorted(told["missing_keys"]):
        raise ValueError(
            f"transformers:{folder} lacks weights ({', '.join(missing[:3])}): it is no trained sequence classifier"
        )
    _expect_words(tokenizer, f"transformers:{folder}")
    return WordsInPieces(model.eval(), tokenizer, weights, unlike)


def _expect_words(tokenizer: Any, about: str) -> None:
    """Raises ValueError for a tokenizer that reads a word otherwise after a blank, after a mark, or in capitals."""

    def pieces(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    word = min((w for w in tokenizer.get_vocab() if w.isascii() and w.isalpha() and w.islower()), default="a")
    if pieces(f"{word.capitalize()}, {word}") != [*pieces(word), *pieces(","), *pieces(word)]:
        raise ValueError(
            f"{about}: its {type(tokenizer).__name__} reads a word otherwise after a blank or in capitals (byte-level "
            "BPE, SentencePiece, cased); a threat on words cannot write that. Served are uncased WordPiece tokenizers"
        )


class RobustLoss:
    """A mixin for `transformers.Trainer`: its loss in training is that of `recipe`; evaluation stays as it is.

    `class Robust(RobustLoss, Trainer): recipe = pgd_at(Linf(8 / 255))`. Of texts the word vectors move, and the
    recipe's threat is a lens on "shift" (`ShiftedVectors`); with `texts = ReplacedWords` its threat is one of texts.
    """

    recipe: ClassVar[Any] = None
    texts: ClassVar[type[ShiftedVectors]] = ShiftedVectors

    def compute_loss(self, model: Any, inputs: Mapping[str, Any], return_outputs: bool = False, **more: Any) -> Any:
        """The recipe's loss. ValueError where there is no recipe, or the batch is neither of images nor of texts."""
        if not model.training or return_outputs:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **more)  # type: ignore[misc]
        recipe = type(self).recipe
        if recipe is None:
            raise ValueError(f"{type(self).__name__} has no recipe; set one, such as recipe = pgd_at(Linf(8 / 255))")
        if "input_ids" in inputs and "labels" in inputs:
            model = type(self).texts(model)
            pair: Any = model.batch(inputs), inputs["labels"]
        else:
            pair = pair_in(inputs)
        if pair is None:
            raise ValueError(f"a batch of {', '.join(inputs)}; expected input_ids or one input, and labels")
        found = recipe(model, *pair)
        return found[0] if isinstance(found, tuple) else found
