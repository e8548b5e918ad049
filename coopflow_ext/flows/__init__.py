"""Normalizing flows: layers, couplings, the :class:`Flow` around them, and builders.

Data → latent is "forward". Layers map (B, …) tensors and return log|det J| of the map just run.
"""

from coopflow_ext.flows.base import Compose, Context, Inverse, Transform
from coopflow_ext.flows.builders import flowpp, glow, realnvp
from coopflow_ext.flows.couplings import (
    AffineCoupling,
    ChannelSplit,
    CheckerboardSplit,
    MixtureLogisticCoupling,
    Split,
    VectorSplit,
    check_finite,
)
from coopflow_ext.flows.flow import Flow
from coopflow_ext.flows.gated import FlowPPConditioner
from coopflow_ext.flows.layers import (
    ActNorm,
    Checkerboard,
    Flatten,
    Flip,
    InvertibleConv1x1,
    SplitPrior,
    Squeeze,
)
from coopflow_ext.flows.nets import Conditioner, ConvConditioner, Dropout, MLPConditioner
from coopflow_ext.flows.preprocessing import Dequantize, Logit, VariationalDequantize

__all__ = [
    "ActNorm",
    "AffineCoupling",
    "ChannelSplit",
    "Checkerboard",
    "CheckerboardSplit",
    "Compose",
    "Conditioner",
    "Context",
    "ConvConditioner",
    "Dequantize",
    "Dropout",
    "Flatten",
    "Flip",
    "Flow",
    "FlowPPConditioner",
    "Inverse",
    "InvertibleConv1x1",
    "Logit",
    "MLPConditioner",
    "MixtureLogisticCoupling",
    "Split",
    "SplitPrior",
    "Squeeze",
    "Transform",
    "VariationalDequantize",
    "VectorSplit",
    "check_finite",
    "flowpp",
    "glow",
    "realnvp",
]
