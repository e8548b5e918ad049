"""How good a model's proposals and samples are, always judged in the same way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from coopflow_ext.coop.config import START_NAMES, TrainConfig
from coopflow_ext.coop.model import CoopFlow
from coopflow_ext.coop.pictures import save_panels
from coopflow_ext.data import Dataset
from coopflow_ext.metrics import bits_per_dim, feature_space, frechet_distance
from coopflow_ext.rng import USE_EVALUATION, Key

_SHOWN = 64


class Judge:
    """Draws pairs (proposal, Langevin result) with one key and measures them.

    Every Fréchet distance is to the whole training split, from the same number of events: a
    small number biases the distance upwards, so only then are they comparable.
    """

    def __init__(self, data: Dataset, config: TrainConfig) -> None:
        self.data = data
        self.space = feature_space(data)
        self.n = min(config.n_samples, len(data.held_out))
        if self.n < 2:
            raise ValueError(f"{data.name} must hold out at least 2 events, got {self.n}")
        self.has_flow = config.start == "flow"
        # What the chains start from, as pictures call it.
        self.start_name = START_NAMES[config.start]
        self.key = Key(config.seed).fold_in(USE_EVALUATION)
        self.training = self.space.statistics(data.decode(data.train))
        self.held_out = data.decode(data.held_out)

    def distance(self, x: Tensor) -> float:
        """Fréchet distance of the events x (n, *event_shape) to the training split."""
        return frechet_distance(self.training, self.space.statistics(x.cpu()))

    def pairs(self, model: CoopFlow) -> tuple[Tensor, Tensor]:
        """n proposals and what the chain makes of them, the same noise at every call."""
        return model.sample_pairs(self.n, self.key)

    def observe(self, model: CoopFlow, picture: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
        """Write a picture, proposals beside results.

        Returns:
            the distances of both and, where there is a flow that learns, its bits/dim of the first
            n held-out events; and the events themselves by their captions.
        """
        proposals, results = self.pairs(model)
        kinds = {self.start_name: proposals, "after Langevin": results}
        save_panels(picture, {caption: x[:_SHOWN] for caption, x in kinds.items()})
        values = {"fd_flow": self.distance(proposals), "fd_langevin": self.distance(results)}
        if self.has_flow:
            values["bits_per_dim"] = self.bits_per_dim(model, self.n)
        return values, kinds

    def bits_per_dim(self, model: CoopFlow, n: int | None = None) -> float:
        """Of the held-out events, or the first n of them, under the flow."""
        device = next(model.parameters()).device
        return bits_per_dim(model.flow, self.held_out[:n].to(device), self.key)

    def facts(self, model: CoopFlow) -> dict[str, Any]:
        """What does not change during training, and the likelihood of the held-out split.

        ``bits_per_dim`` is None where no flow learns.
        """
        facts: dict[str, Any] = {
            "feature_space": self.space.name,
            "n": self.n,
            "held_out": self.distance(self.held_out[: self.n]),
        }
        if self.space.accuracy is not None:
            facts["classifier_accuracy"] = self.space.accuracy
        bits = self.bits_per_dim(model) if self.has_flow else None
        return {"fd": facts, "start_of_chains": self.start_name, "bits_per_dim": bits}


def fd_table(fd: dict[str, Any], start: str) -> str:
    """The Fréchet distances of a summary, and where its chains start, as lines for a terminal."""
    rows = [
        ("held-out data", fd["held_out"]),
        ("after Langevin", fd["langevin"]),
        (start, fd["flow"]),
        (f"{start} at step 0", fd["flow_start"]),
    ]
    head = (
        f"Fréchet distance to the training data ({fd['feature_space']} features, "
        f"{fd['n']} samples each; less is better)"
    )
    known = [(name, value) for name, value in rows if value is not None]
    return "\n".join([head, *(f"  {name:<28}{value:10.2f}" for name, value in known)])
