"""Images and plain feature vectors: reading them, reference networks, augmentation, training settings."""

from sparring.certify.interval import find_interval_bound
from sparring.core.layers import Normalize as Normalize
from sparring.modalities.base import Modality
from sparring.modalities.images.augment import crop_and_flip as crop_and_flip
from sparring.modalities.images.data import KNOWN, collect_images, read_images, reads
from sparring.modalities.images.data import scale as scale
from sparring.modalities.images.files import picture_grid, write_pngs
from sparring.modalities.images.generate import gan, prepared
from sparring.modalities.images.models import MODELS as MODELS
from sparring.modalities.images.models import build as build
from sparring.modalities.images.models import cnn_mnist as cnn_mnist
from sparring.modalities.images.models import cnn_mnist_wide as cnn_mnist_wide
from sparring.modalities.images.models import cnn_small as cnn_small
from sparring.modalities.images.models import default_for as default_for
from sparring.modalities.images.models import mlp as mlp
from sparring.modalities.images.models import resnet_small as resnet_small
from sparring.modalities.images.presets import presets
from sparring.modalities.images.show import show

MODALITY = Modality(
    name="images", load=read_images, known=KNOWN, reads=reads, presets=presets, models=MODELS, recipes={"gan": gan},
    augment=crop_and_flip, certify=find_interval_bound, show=show, write=write_pngs, collect=collect_images,
    tools={"prepared": prepared, "picture_grid": picture_grid},
)  # fmt: skip
