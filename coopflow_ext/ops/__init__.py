"""The operators, with checked arguments, fake kernels (torch.compile) and derivatives.

Each says what it equals in plain PyTorch; :mod:`coopflow_ext.reference` holds that in full.
The kernels check their arguments and the functions here raise what they find as ValueError, or as
TypeError when it is a dtype or a type; nothing is changed when an op refuses.
"""

from coopflow_ext.ops._langevin_chain import ChainResult, MALAResult
from coopflow_ext.ops.affine_coupling import affine_coupling, affine_coupling_inverse
from coopflow_ext.ops.analytic_langevin_chain import (
    MOST_ELEMENTS_ON_CUDA,
    analytic_langevin_chain,
    analytic_mala_chain,
)
from coopflow_ext.ops.attention import ATTENTION_MAX_DIM, attention
from coopflow_ext.ops.concat_elu import concat_elu
from coopflow_ext.ops.gate_add_norm import gate_add_norm
from coopflow_ext.ops.langevin import BoundStep, langevin_noise_, langevin_step, langevin_step_
from coopflow_ext.ops.mixture_logistic import (
    mixture_logistic_coupling,
    mixture_logistic_coupling_inverse,
)
from coopflow_ext.ops.mlp import mlp_langevin_chain, mlp_mala_chain, mlp_shared_bytes
from coopflow_ext.ops.random import normal, uniform
from coopflow_ext.ops.weight_norm import weight_norm

__all__ = [
    "ATTENTION_MAX_DIM",
    "MOST_ELEMENTS_ON_CUDA",
    "BoundStep",
    "ChainResult",
    "MALAResult",
    "affine_coupling",
    "affine_coupling_inverse",
    "analytic_langevin_chain",
    "analytic_mala_chain",
    "attention",
    "concat_elu",
    "gate_add_norm",
    "langevin_noise_",
    "langevin_step",
    "langevin_step_",
    "mixture_logistic_coupling",
    "mixture_logistic_coupling_inverse",
    "mlp_langevin_chain",
    "mlp_mala_chain",
    "mlp_shared_bytes",
    "normal",
    "uniform",
    "weight_norm",
]
