"""Face verification: do two pictures show the same person? The opponent changes one of them."""

from __future__ import annotations

import torch.nn.functional as F

from sparring.core.batches import Augment
from sparring.modalities.base import Modality
from sparring.modalities.faces.data import FACE_DATA, has_persons, read_faces
from sparring.modalities.faces.metrics import verification_metrics
from sparring.modalities.faces.models import FACE_MODELS, as_verifier, set_threshold
from sparring.modalities.faces.models import Verifier as Verifier
from sparring.modalities.faces.show import show_pairs
from sparring.modalities.faces.threats import PROBE_THREATS
from sparring.modalities.images.augment import crop_and_flip


def shift_and_mirror(*, crop: int = 0, flip: bool = False) -> Augment | None:
    """Shifts by up to `crop` pixels, edges repeated, and mirrors half of the pictures; None where neither is asked."""
    inner, wider = crop_and_flip(crop=crop, flip=flip), lambda t: F.pad(t, (crop,) * 4, "replicate")
    return inner and (lambda x, *of: {**x, "probe": F.pad(inner(wider(x["probe"]), *of), (-crop,) * 4)})


MODALITY = Modality(
    name="faces", load=read_faces, known=FACE_DATA, reads=has_persons, models=FACE_MODELS, threats=PROBE_THREATS,
    presets=lambda data: {"model": "face-net", "epochs": 50, "batch_size": 30, "radius_ramp": 0.4, "flip": True,
                          "crop": min(data.given["shape"][1:]) // 15}, augment=shift_and_mirror, complete=as_verifier,
    calibrate=set_threshold, metrics=verification_metrics, show=show_pairs, validation="fgsm",
)  # fmt: skip
