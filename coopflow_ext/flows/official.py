"""Checkpoints of the authors' published code: their names and shapes ↔ ours."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from coopflow_ext.energies import ResEnergy
from coopflow_ext.flows.base import Compose
from coopflow_ext.flows.builders import flowpp
from coopflow_ext.flows.flow import Flow
from coopflow_ext.flows.layers import ActNorm, SplitPrior
from coopflow_ext.flows.official_file import check_claim, read_file
from coopflow_ext.flows.preprocessing import VariationalDequantize

Net = TypeVar("Net", bound=nn.Module)
Checkpoint = Mapping[str, Any]
StateDict = dict[str, Tensor]

_MODULE_PREFIX = "module."
# Their keys → ours. A flow that was trained alone is under "net".
_NETS = {"flow_net": "flow_net", "net": "flow_net", "ebm_net": "ebm_net"}
_ONLY_FLOWPP = "only a flow made by flowpp has an official counterpart"

# Starts of names, ours → theirs, tried in order.
_CONDITIONER_NAMES = (
    (r"net\.first\.", "nn.in_conv.conv."),
    (r"net\.last\.", "nn.out_conv.conv."),
    (r"rescale\.", "nn.rescale."),
    (r"net\.blocks\.(\d+)\.conv\.conv\.", r"nn.mid_convs.\1.conv.conv.conv."),
    (r"net\.blocks\.(\d+)\.conv\.gate\.", r"nn.mid_convs.\1.conv.gate.conv."),
    (r"net\.blocks\.(\d+)\.conv\.aux\.", r"nn.mid_convs.\1.conv.aux_conv.conv."),
    (r"net\.blocks\.(\d+)\.norm([12])\.", r"nn.mid_convs.\1.norm_\2."),
    (r"net\.blocks\.(\d+)\.attention\.project\.", r"nn.mid_convs.\1.attn.in_proj."),
    (r"net\.blocks\.(\d+)\.attention\.gate\.", r"nn.mid_convs.\1.attn.gate."),
)
_AUX_NET_NAMES = (
    (r"layers\.(\d+)\.conv\.", r"\1.conv.conv."),
    (r"layers\.(\d+)\.gate\.", r"\1.gate.conv."),
    (r"layers\.0\.", "0."),
)
_WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}
_ACTNORM_NAMES = {"mean": "mean", "inv_std": "inv_std", "initialized": "is_initialized"}


def _translate(name: str, table: Sequence[tuple[str, str]]) -> str:
    for ours, theirs in table:
        match = re.match(ours, name)
        if match:
            rest = name[match.end() :]
            return match.expand(theirs) + _WEIGHT_NORM.get(rest, rest)
    raise ValueError(f"no counterpart in the authors' code for {name!r}")


def _step_names(steps: Compose, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    """Names of a chain of {ActNorm, 1×1 convolution, coupling, Flip}."""
    for index, layer in enumerate(steps.transforms):
        for name in layer.state_dict():
            if isinstance(layer, ActNorm):
                there = _ACTNORM_NAMES[name]
            elif index % 4 == 1:
                there = name
            else:
                there = _translate(name, _CONDITIONER_NAMES)
            yield f"{ours}transforms.{index}.{name}", f"{theirs}.{index}.{there}"


def _scale_names(scale: Compose, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for index, layer in enumerate(scale.transforms):
        here = f"{ours}transforms.{index}."
        if isinstance(layer, Compose):
            # Channel steps come first; checkerboard steps follow the rearrangement of the board.
            stage = "channels" if index == 0 else "checkers"
            yield from _step_names(layer, here, f"{theirs}.{stage}")
        elif isinstance(layer, SplitPrior):
            inner = layer.inner
            assert isinstance(inner, Compose)
            yield from _scale_names(inner, here + "inner.", f"{theirs}.next")


def _flow_names(flow: Flow) -> dict[str, str]:
    """Our names → theirs, for a flow made by :func:`flowpp`."""
    dequantize, transform = flow.dequantize, flow.transform
    if dequantize is None or not isinstance(transform, Compose):
        raise ValueError(_ONLY_FLOWPP)
    if dequantize.levels != 256:
        raise ValueError(
            "only a flow of images with 256 grey levels has an official counterpart, "
            f"got levels={dequantize.levels}"
        )
    names = dict(_scale_names(transform, "transform.", "flows"))
    if isinstance(dequantize, VariationalDequantize):
        noise_flow = dequantize.transform
        assert isinstance(noise_flow, Compose)
        names |= _step_names(noise_flow, "dequantize.transform.", "dequant_flows.flows")
        for name in dequantize.aux_net.state_dict():
            there = _translate(name, _AUX_NET_NAMES)
            names[f"dequantize.aux_net.{name}"] = f"dequant_flows.aux_conv.{there}"
    if names.keys() != flow.state_dict().keys():
        raise ValueError(_ONLY_FLOWPP)
    return names


def _energy_names(energy: ResEnergy) -> dict[str, str]:
    parts = {"stem": "f.0", "head": f"f.{2 + len(energy.blocks)}"}
    for index in range(len(energy.blocks)):
        for ours, theirs in (("conv1", "conv1"), ("conv2", "conv2"), ("skip", "res")):
            parts[f"blocks.{index}.{ours}"] = f"f.{2 + index}.{theirs}"
    return {
        f"{ours}.{kind}": f"{theirs}.{kind}"
        for (ours, theirs), kind in itertools.product(parts.items(), ("weight", "bias"))
    }


def _check_tensors(name: str, net: object) -> StateDict:
    """A net's state dict with the prefix ``module.`` taken off."""
    if not isinstance(net, Mapping):
        raise ValueError(f"{name} must be a state dict, got {type(net).__name__}")
    state: StateDict = {}
    for key, value in net.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(
                f"{name} must hold tensors only, got {type(value).__name__} for {key!r}"
            )
        if value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name} must hold dense tensors with values, got none for {key!r}")
        state[key.removeprefix(_MODULE_PREFIX)] = value
    return state


def _load(
    make: Callable[[], Net], names_of: Callable[[Net], dict[str, str]], state: StateDict, title: str
) -> Net:
    """The network that ``make`` makes, with ``state`` under our names, strict about names and
    shapes. It is made without memory, and has that of its tensors only when these fit."""
    with torch.device("meta"):
        module = make()
    names = names_of(module)
    missing = sorted(set(names.values()) - set(state))
    unknown = sorted(set(state) - set(names.values()))
    if missing or unknown:
        raise ValueError(
            f"{title} does not fit: {len(missing)} missing {missing[:5]}, "
            f"{len(unknown)} unknown {unknown[:5]}"
        )
    ours: StateDict = {}
    for name, target in module.state_dict().items():
        value = state[names[name]]
        if value.numel() != target.numel() or _squeezed(value) != _squeezed(target):
            raise ValueError(
                f"{title}: {names[name]} must have the shape {tuple(target.shape)}, "
                f"got {tuple(value.shape)}"
            )
        copied = value.detach().to("cpu", target.dtype, copy=True)
        ours[name] = copied.reshape(target.shape).contiguous()
    module.load_state_dict(ours, assign=True)
    return module


def _squeezed(x: Tensor) -> list[int]:
    return [n for n in x.shape if n != 1]


def _count(state: StateDict, pattern: str, title: str, *, first: int = 0, every: int = 1) -> int:
    """How many layers ``pattern`` finds at the start of names. Its group is their number: first,
    first + every, and so on without a gap, so there is a tensor for each."""
    matches = (re.match(pattern, name) for name in state)
    found = sorted({int(match.group(1)) for match in matches if match})
    if found != list(range(first, first + every * len(found), every)):
        raise ValueError(
            f"{title} does not fit: layers {pattern} must be numbered {first}, {first + every}, …, "
            f"got {', '.join(map(str, found[:3]))} … {found[-1]}"
        )
    return len(found)


def _shape(state: StateDict, name: str, title: str) -> torch.Size:
    if name not in state:
        raise ValueError(f"{title} does not fit: {name} is missing")
    shape = state[name].shape
    if len(shape) < 2 or 0 in shape:
        raise ValueError(f"{title} does not fit: {name} is no matrix or kernel: {tuple(shape)}")
    return shape


def _components(state: StateDict, net: str, title: str) -> int:
    """K, from a conditioner's (2 + 3K)·features outputs."""
    features = _shape(state, f"{net}.in_conv.conv.weight_v", title)[1]
    outputs = _shape(state, f"{net}.out_conv.conv.weight_v", title)[0]
    components, rest = divmod(outputs - 2 * features, 3 * features)
    if rest or components < 1:
        raise ValueError(
            f"{title} does not fit: {net} has {outputs} outputs, which is not (2 + 3K)·{features}"
        )
    return components


def infer_flow_options(state: StateDict, image_shape: Sequence[int]) -> dict[str, Any]:
    """The options of :func:`flowpp` with which a ``flow_net`` was made (dropout is not stored).

    A network without ``dequant_flows`` has ``dequant_blocks`` 0.

    Raises:
        ValueError: it is not a Flow++, or one for other images.
    """
    title = "flow_net"
    if any(re.match(r"flows\.(next\.)*(channels|checkers)\.1\.nn\.", name) for name in state):
        raise ValueError(
            f"{title} does not fit: its steps have no 1×1 convolution (FlowPlusPlus_celeba), which "
            "those of flowpp have"
        )
    scales: list[list[int]] = []
    prefix = "flows"
    while True:
        # A step is 4 layers, of which the third holds the network.
        steps = [
            _count(state, rf"{re.escape(prefix)}\.{stage}\.(\d+)\.nn\.", title, first=2, every=4)
            for stage in ("channels", "checkers")
        ]
        if not any(steps):
            break
        scales.append(steps)
        prefix += ".next"
    if not scales:
        raise ValueError(f"{title} does not fit: no layer of a Flow++ (flows.checkers.…) in it")
    stage = "checkers" if scales[0][1] else "channels"
    net, dequant_net = f"flows.{stage}.2.nn", "dequant_flows.flows.2.nn"
    hidden, n_in = _shape(state, f"{net}.in_conv.conv.weight_v", title)[:2]
    if n_in * (1 if stage == "checkers" else 2) != image_shape[0]:
        raise ValueError(f"image_shape {tuple(image_shape)} does not fit: {n_in} channels found")
    options: dict[str, Any] = {
        "scales": scales,
        "channels": hidden,
        "blocks": _count(state, rf"{re.escape(net)}\.mid_convs\.(\d+)\.", title),
        "components": _components(state, net, title),
        "dequant_blocks": 0,
        "attention": any(".attn.in_proj." in name for name in state),
    }
    if any(name.startswith("dequant_flows.") for name in state):
        pattern = rf"{re.escape(dequant_net)}\.mid_convs\.(\d+)\."
        options["dequant_blocks"] = _count(state, pattern, title)
        options["dequant_components"] = _components(state, dequant_net, title)
    _check_blocks(state, options, title)
    return options


def _check_blocks(state: StateDict, options: dict[str, Any], title: str) -> None:
    """ValueError unless there can be as many blocks of that many channels as ``options`` say."""
    n = sum(map(sum, options["scales"])) * options["blocks"] + 4 * options["dequant_blocks"]
    channels = options["channels"]
    n_elements = sum(value.numel() for value in state.values())
    # Of a block's tensors the gated convolution alone has 6, the first with 2C·C·3·3 elements.
    if 6 * n > len(state) or 18 * channels**2 * n > n_elements:
        raise ValueError(
            f"{title} does not fit: {n} blocks of {channels} channels are more than the "
            f"{len(state)} tensors with {n_elements:,} elements in it"
        )


def _load_flow(state: StateDict, image_shape: Sequence[int], options: dict[str, Any]) -> Flow:
    state, inferred = dict(state), infer_flow_options(state, image_shape)
    bound = state.pop("bounds", None)
    if bound is None or bound.numel() != 1:
        raise ValueError("flow_net does not fit: bounds is missing or not one number")
    flow = _load(lambda: flowpp(image_shape, **inferred, **options), _flow_names, state, "flow_net")
    assert flow.logit is not None
    flow.logit.bound = bound.item()
    return flow


def _load_energy(state: StateDict, image_shape: Sequence[int]) -> ResEnergy:
    width, channels = _shape(state, "f.0.weight", "ebm_net")[:2]
    size = 4 << _count(state, r"f\.(\d+)\.conv1\.", "ebm_net", first=2)
    if tuple(image_shape) != (channels, size, size):
        raise ValueError(
            f"image_shape {tuple(image_shape)} does not fit: "
            f"ebm_net is for {(channels, size, size)}"
        )
    return _load(lambda: ResEnergy(channels, width, size), _energy_names, state, "ebm_net")


def read_official(path_or_dict: str | PathLike[str] | Checkpoint) -> dict[str, StateDict]:
    """``flow_net`` and ``ebm_net``, where the checkpoint holds them, without ``module.``.

    A flow that the checkpoint has under ``net`` is ``flow_net`` here; what else it holds is left.

    Raises:
        ValueError: for a checkpoint with neither, or that holds more than tensors and numbers; the
            message names what, and its type. Also for a file that asks for more memory than it has
            bytes.
        FileNotFoundError: when there is no such file.
    """
    if isinstance(path_or_dict, Mapping):
        checkpoint: object = path_or_dict
    else:
        checkpoint = read_file(Path(path_or_dict))
        if not isinstance(checkpoint, Mapping):
            raise ValueError(f"{path_or_dict} must hold a dict, got {type(checkpoint).__name__}")
    assert isinstance(checkpoint, Mapping)
    held = [name for name in _NETS if name in checkpoint]
    if not held:
        found = ", ".join(f"{k} ({type(v).__name__})" for k, v in [*checkpoint.items()][:5])
        raise ValueError(
            "a checkpoint must hold flow_net or ebm_net, or a flow alone under net, "
            f"got {found or 'nothing'}"
        )
    if "flow_net" in held and "net" in held:
        raise ValueError("a checkpoint must hold one flow, got both flow_net and net")
    nets = {_NETS[name]: _check_tensors(name, checkpoint[name]) for name in held}
    if not isinstance(path_or_dict, Mapping):
        tensors = [value for net in nets.values() for value in net.values()]
        check_claim(Path(path_or_dict), sum(t.numel() * t.element_size() for t in tensors))
    return nets


def load_official(
    path_or_dict: str | PathLike[str] | Checkpoint,
    image_shape: Sequence[int] = (3, 32, 32),
    *,
    legacy_contrast: bool = True,
    legacy_cdf_clamp: bool = True,
    dropout: float = 0.2,
) -> tuple[Flow | None, ResEnergy | None]:
    """The models in a checkpoint of the authors' published code.

    Sizes are inferred from the tensors: networks with or without attention, with or without a
    variational dequantiser. Names may start with ``module.``.

    Args:
        path_or_dict: a checkpoint file (read with ``weights_only=True``, so nothing in it is
            executed) or what it holds: a dict with ``flow_net``, ``ebm_net`` or both, or with a
            flow that was trained alone under ``net``. Optimizers, ``epoch`` and ``fid`` beside
            them are not read.
        image_shape: (C, H, W) of the images that the models were trained on.
        dropout: of the flow, in training mode; a checkpoint does not say.
        legacy_contrast, legacy_cdf_clamp: their models were trained with both, see :func:`flowpp`.

    Returns:
        (flow, energy); the one that the checkpoint does not hold is None.

    Raises:
        ValueError: for a file that holds more than tensors and numbers, missing or unknown names,
            or shapes that do not fit.
        FileNotFoundError: when there is no such file.
    """
    nets = read_official(path_or_dict)
    flow = energy = None
    if "flow_net" in nets:
        options = {
            "legacy_contrast": legacy_contrast,
            "legacy_cdf_clamp": legacy_cdf_clamp,
            "dropout": dropout,
        }
        flow = _load_flow(nets["flow_net"], image_shape, options)
    if "ebm_net" in nets:
        energy = _load_energy(nets["ebm_net"], image_shape)
    return flow, energy


def export_official(flow: Flow | None, energy: ResEnergy | None) -> dict[str, StateDict]:
    """The way back: a dict with ``flow_net`` and ``ebm_net`` under the authors' names and shapes.

    Raises:
        ValueError: for a flow that has no counterpart in their code.
    """
    checkpoint: dict[str, StateDict] = {}
    if flow is not None:
        names = _flow_names(flow)
        assert flow.logit is not None
        state = {"bounds": torch.tensor([flow.logit.bound])}
        for name, value in flow.state_dict().items():
            state[names[name]] = _their_shape(names[name], value.detach().clone())
        checkpoint["flow_net"] = state
    if energy is not None:
        ours = energy.state_dict()
        checkpoint["ebm_net"] = {
            theirs: ours[name].detach().clone() for name, theirs in _energy_names(energy).items()
        }
    return checkpoint


def _their_shape(name: str, value: Tensor) -> Tensor:
    if name.endswith((".mean", ".inv_std")):
        return value.view(1, -1, 1, 1)
    if name.endswith(".is_initialized"):
        return value.float().view(1)
    return value
