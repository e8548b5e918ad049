"""Numbers that say how good samples are."""

from coopflow_ext.metrics.features import FeatureSpace, feature_space
from coopflow_ext.metrics.frechet import FeatureStatistics, frechet_distance
from coopflow_ext.metrics.likelihood import bits_per_dim
from coopflow_ext.metrics.moments import RunningMoments, moment_gap

__all__ = [
    "FeatureSpace",
    "FeatureStatistics",
    "RunningMoments",
    "bits_per_dim",
    "feature_space",
    "frechet_distance",
    "moment_gap",
]
