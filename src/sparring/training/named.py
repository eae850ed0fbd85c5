"""Recipes by name: pgd-at, trades:beta=3, multi-norm:"l2:1.5,l1:12", FILE.py:FUNCTION."""

from __future__ import annotations

from sparring.core.registry import Builder
from sparring.training.certified import ibp
from sparring.training.mart import mart
from sparring.training.one_step import fgsm_rs, free, n_fgsm
from sparring.training.recipes import mixed, pgd_at, standard, trades
from sparring.training.regularising import advprop, gaussian, vat
from sparring.training.several import multi_norm

RECIPES: dict[str, Builder] = {
    "standard": standard, "mixed": mixed, "pgd-at": pgd_at, "trades": trades, "mart": mart,
    "fgsm-rs": fgsm_rs, "n-fgsm": n_fgsm, "free": free, "multi-norm": multi_norm, "ibp": ibp,
    "advprop": advprop, "vat": vat, "gaussian": gaussian,
}  # fmt: skip
