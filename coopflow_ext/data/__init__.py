"""Data sets as tensors in memory, and their batches in an order fixed by a key."""

from coopflow_ext.data.batches import Batches, Prefetch, permutation
from coopflow_ext.data.dataset import Dataset
from coopflow_ext.data.registry import NAMES, load

__all__ = ["NAMES", "Batches", "Dataset", "Prefetch", "load", "permutation"]
