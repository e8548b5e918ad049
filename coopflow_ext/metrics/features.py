"""Feature spaces for Fréchet distances: small, our own, and the same in every run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext._modes import seeded, training_modes
from coopflow_ext.data.batches import Batches
from coopflow_ext.data.bundled import digits
from coopflow_ext.data.dataset import Dataset
from coopflow_ext.metrics.frechet import FeatureStatistics
from coopflow_ext.rng import Key

# Fixed, so that distances of all runs are measured in one space.
_CLASSIFIER_KEY = Key(64)
_RANDOM_CONV_KEY = Key(65)


@dataclass(frozen=True)
class FeatureSpace:
    """A named map from events (B, *event_shape) to features (B, d).

    Attributes:
        name: says what the features are; goes into ``summary.json``.
        features: the map.
        accuracy: held-out accuracy of the classifier the features come from, if they do.
    """

    name: str
    features: Callable[[Tensor], Tensor]
    accuracy: float | None = None

    @torch.no_grad()
    def statistics(self, x: Tensor, *, batch_size: int = 500) -> FeatureStatistics:
        """Mean and covariance of the features of x (n, *event_shape), n ≥ 2."""
        rows = [self.features(part).double() for part in x.split(batch_size)]
        return FeatureStatistics.of(torch.cat(rows))


class DigitClassifier(nn.Module):
    """64 pixels → 128 → 64 → 10 classes; the 64 are the features of :meth:`features`."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(64, 128)
        self.penultimate = nn.Linear(128, 64)
        self.last = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """(B, 1, 8, 8) in [−1, 1] → (B, 64), not negative."""
        h = F.relu(self.hidden(x.flatten(1).to(self.hidden.weight.device)))
        return F.relu(self.penultimate(h))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.features(x))
        return logits


def _train_classifier(data: Dataset, steps: int = 800, batch_size: int = 128) -> DigitClassifier:
    """Fit the classifier to the training split, from a fixed start, in a fixed order."""
    assert data.train_labels is not None
    with seeded(_CLASSIFIER_KEY.seed):
        model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = Batches(data, batch_size, _CLASSIFIER_KEY)
    for step in range(steps):
        index = batches.indices(step)
        logits = model(data.decode(data.train[index]))
        loss = F.cross_entropy(logits, data.train_labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@functools.cache
def _digits_space() -> FeatureSpace:
    with torch.device("cpu"), training_modes():  # whatever the caller's are: the result is kept
        data = digits()
        assert data.held_out_labels is not None
        model = _train_classifier(data)
        hits = model(data.decode(data.held_out)).argmax(1) == data.held_out_labels
        return FeatureSpace("digit-classifier-64", model.features, float(hits.double().mean()))


class RandomConvFeatures(nn.Module):
    """(B, C, H, W) → (B, 64): two strided 3×3 convolutions with fixed random weights and ReLU,
    then the mean over all positions. A poor man's Inception: it sees local colour and edges."""

    w1: Tensor
    w2: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        first, second = (key.tensor() for key in _RANDOM_CONV_KEY.split(2))
        self.register_buffer("w1", _he_normal((32, channels, 3, 3), first))
        self.register_buffer("w2", _he_normal((64, 32, 3, 3), second))

    def forward(self, x: Tensor) -> Tensor:
        """float32 features on x's device."""
        h = F.relu(F.conv2d(x, self.w1.to(x.device), stride=2, padding=1))
        h = F.relu(F.conv2d(h, self.w2.to(x.device), stride=2, padding=1))
        features: Tensor = h.mean((2, 3))
        return features


def _he_normal(shape: tuple[int, ...], rng: Tensor) -> Tensor:
    fan_in = shape[1] * shape[2] * shape[3]
    weights: Tensor = ops.normal(shape, rng) * (2 / fan_in) ** 0.5
    return weights


def feature_space(data: Dataset) -> FeatureSpace:
    """The feature space in which a run on ``data`` is judged.

    - ``digit-classifier-64``, for digits: the penultimate layer of a small classifier that was
      trained on the training split, about 98% right on the held-out split. Made once per process.
    - ``random-conv-64``, for other images: :class:`RandomConvFeatures`.
    - ``identity``, for vectors.
    """
    if data.name == "digits":
        return _digits_space()
    if data.is_image:
        return FeatureSpace("random-conv-64", RandomConvFeatures(data.event_shape[0]))
    return FeatureSpace("identity", lambda x: x.flatten(1))
