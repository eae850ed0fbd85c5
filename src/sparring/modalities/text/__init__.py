"""Texts: words or characters, replaced by others; reading them, networks, attacks, training that stands them."""

from typing import Any

from sparring.modalities.base import Dataset, Modality
from sparring.modalities.text.certify import find_words_bound
from sparring.modalities.text.data import TEXT_DATA, caption, read_text, reads_text
from sparring.modalities.text.models import TEXT_MODELS
from sparring.modalities.text.plans import TEXT_ATTACKS, TEXT_PLANS
from sparring.modalities.text.recipes import TEXT_RECIPES
from sparring.modalities.text.show import as_jsonl, show_texts
from sparring.modalities.text.threats import TEXT_THREATS


def suited_settings(data: Dataset) -> dict[str, Any]:
    """How texts are trained on unless the user says otherwise."""
    return {"model": "bag", "epochs": 8, "batch_size": 64, "radius_ramp": 0.0}


MODALITY = Modality(
    name="text", load=read_text, known=TEXT_DATA, reads=reads_text, presets=suited_settings, models=TEXT_MODELS,
    threats=TEXT_THREATS, attacks=TEXT_ATTACKS, plans=TEXT_PLANS, validation="light",
    recipes=TEXT_RECIPES, certify=find_words_bound, show=show_texts, caption=caption, formats={".jsonl": as_jsonl},
)  # fmt: skip
