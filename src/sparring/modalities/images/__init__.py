"""Images and plain feature vectors: reading them, and reference networks."""

from sparring.adapters.files import from_file as from_file
from sparring.adapters.files import load_weights as load_weights
from sparring.core.batches import Batches as Batches
from sparring.core.batches import hold_out as hold_out
from sparring.modalities.images.data import Dataset as Dataset
from sparring.modalities.images.data import load as load
from sparring.modalities.images.data import scale as scale
from sparring.modalities.images.models import MODELS as MODELS
from sparring.modalities.images.models import Normalize as Normalize
from sparring.modalities.images.models import build as build
from sparring.modalities.images.models import cnn_mnist as cnn_mnist
from sparring.modalities.images.models import cnn_mnist_wide as cnn_mnist_wide
from sparring.modalities.images.models import cnn_small as cnn_small
from sparring.modalities.images.models import default_for as default_for
from sparring.modalities.images.models import mlp as mlp
from sparring.modalities.images.models import resnet_small as resnet_small
