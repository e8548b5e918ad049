"""CoopFlow: a normalizing flow and an energy-based model that train each other."""

from coopflow_ext.coop.config import PRESETS, TrainConfig
from coopflow_ext.coop.model import CoopFlow
from coopflow_ext.coop.run import RunFolder
from coopflow_ext.coop.train import TrainingInterrupted, train
from coopflow_ext.coop.trainer import Trainer
from coopflow_ext.errors import RunError
from coopflow_ext.flows.official import export_official, load_official

__all__ = [
    "PRESETS",
    "CoopFlow",
    "RunError",
    "RunFolder",
    "TrainConfig",
    "Trainer",
    "TrainingInterrupted",
    "export_official",
    "load_official",
    "train",
]
