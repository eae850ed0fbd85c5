"""Data sets and batches."""

from sparring.data.batches import Batches as Batches
from sparring.data.batches import hold_out as hold_out
from sparring.data.images import Dataset as Dataset
from sparring.data.images import load as load
from sparring.data.images import scale as scale
