"""Reference networks, and the user's own."""

from sparring.models.files import from_file as from_file
from sparring.models.files import load_weights as load_weights
from sparring.models.images import MODELS as MODELS
from sparring.models.images import Normalize as Normalize
from sparring.models.images import build as build
from sparring.models.images import cnn_mnist as cnn_mnist
from sparring.models.images import cnn_mnist_wide as cnn_mnist_wide
from sparring.models.images import cnn_small as cnn_small
from sparring.models.images import default_for as default_for
from sparring.models.images import mlp as mlp
from sparring.models.images import resnet_small as resnet_small
