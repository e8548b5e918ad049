"""Settings of a training run, checked as soon as they are made, and the presets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from coopflow_ext import data
from coopflow_ext.coop.files import parse_json
from coopflow_ext.data import Dataset
from coopflow_ext.errors import RunError

FORMAT_VERSION = 1
_CHECKSUM = "coopflow_sha256"
# What else stands beside the settings in config.json.
_BESIDE = ("format", "history", _CHECKSUM)
# Adam's rates.
RATES = ("pretrain_lr", "flow_lr", "energy_lr")
# The settings that a resumed run may change.
ADJUSTABLE = ("steps", *RATES)
PRECISIONS = ("float32", "bfloat16")
WARMUPS = ("updates", "batches")
# What chains may start from, and how pictures call it.
START_NAMES = {"flow": "flow proposal", "uniform": "noise", "buffer": "persistent chains"}


def _setting(default: Any, description: str) -> Any:
    """A field of :class:`TrainConfig`; the description is also the command line's help."""
    return field(default=default, metadata={"help": description})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that determines a run. Chain, energy and Adam default to the authors' settings at
    T = 30; the flow, the data and the number of steps do not, nor what differs by data set and
    variant: the presets have theirs.

    CoopFlow(T): ``langevin_steps`` = T. CoopFlow(Long): T = 200. CoopFlow(Pre):
    ``pretrain_steps`` > 0 and ``flow_frozen_steps`` > 0. The flow alone, by maximum likelihood:
    ``steps`` = 0 and ``langevin_steps`` = 0. The energy alone: ``start`` =
    "uniform" for short runs from noise, "buffer" for persistent chains.

    Raises:
        ValueError: for a value that makes no sense; the message names the field.
        TypeError: for a value of another type than the field's.
    """

    data: str = _setting("digits", "data set: " + ", ".join(data.NAMES))
    data_dir: str | None = _setting(None, "folder with the archive of cifar10, svhn or celeba")
    image_size: int | None = _setting(None, "crop and scale images of celeba and folder:DIR to it")
    skip_bad: bool = _setting(False, "leave out images of a folder that cannot be read")
    max_pixels: int | None = _setting(
        None, "most pixels of an image of celeba and folder:DIR that is read; none: 2**26"
    )
    seed: int = _setting(0, "seed of everything random")
    steps: int = _setting(1000, "cooperative iterations")
    batch_size: int = _setting(28, "images of a batch, and chains of an iteration")
    flow: str = _setting("glow", "builder of the flow: realnvp, glow or flowpp")
    flow_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "its options, as JSON"}
    )
    energy: str = _setting("res", "energy network: res or mlp")
    energy_options: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "its options, as JSON"}
    )

    start: str = _setting(
        "flow", "start of the chains: flow; uniform (noise) or buffer (persistent) train no flow"
    )
    buffer_size: int = _setting(10_000, "persistent chains")
    buffer_reinit: float = _setting(0.05, "probability that a persistent chain starts anew")
    langevin_steps: int = _setting(30, "T, Langevin steps of an iteration")
    step_size: float = _setting(0.03, "δ: the drift is δ²/2")
    sample_step_size: float | None = _setting(None, "δ when sampling after training; default δ")
    noise: float = _setting(0.0, "standard deviation of the noise of a step")
    step_clip: float | None = _setting(0.1, "bound of a step's drift, elementwise")

    pretrain_steps: int = _setting(0, "maximum-likelihood updates of the flow before it all")
    flow_frozen_steps: int = _setting(0, "iterations at the beginning that train the energy only")
    flow_every: int = _setting(1, "after those, update the flow in every so many iterations")
    flip: bool = _setting(True, "mirror images at random where the data set allows it")

    init_batches: int = _setting(8, "batches behind the flow's data-dependent initialisation")
    pretrain_lr: float = _setting(1e-4, "Adam's rate of the pre-training, falls linearly to 0")
    flow_lr: float = _setting(1e-4, "Adam's rate of the flow")
    flow_betas: tuple[float, float] = _setting((0.9, 0.999), "Adam's betas of the flow")
    flow_weight_decay: float = _setting(5e-5, "weight decay of weight-norm's g")
    flow_grad_norm: float = _setting(1.0, "the flow's gradient is scaled to at most this norm")
    flow_clip_groups: bool = _setting(
        False, "scale weight-norm's g and all else each to flow_grad_norm, not the whole gradient"
    )
    flow_skip_norm: float | None = _setting(
        None,
        "leave out an update of the flow whose gradient, before the clip, has this norm or more",
    )
    flow_restart: bool = _setting(
        False, "the flow's Adam and warm-up begin anew after the pre-training"
    )
    energy_lr: float = _setting(1e-4, "Adam's rate of the energy")
    energy_betas: tuple[float, float] = _setting((0.5, 0.5), "Adam's betas of the energy")
    energy_grad_norm: float | None = _setting(
        None, "the energy's gradient is scaled to at most this norm"
    )
    energy_skip_norm: float | None = _setting(
        None,
        "leave out an update of the energy, and with it the flow's of this iteration, whose "
        "gradient, before the clip, has this norm or more",
    )
    energy_skip_from: int = _setting(0, "the first iteration that energy_skip_norm holds for")
    warmup_steps: int = _setting(200, "steps of linear warm-up, the first at rate 0")
    warmup_by: str = _setting(
        "updates",
        "what the warm-up counts: a network's updates, or batches, those before the one of its "
        "last update (the authors': the first two at rate 0)",
    )
    flow_ema: float = _setting(0.0, "decay of the average of the flow's weights; 0: none")
    energy_ema: float = _setting(0.0, "decay of the average of the energy's weights; 0: none")

    accumulate: int = _setting(1, "parts of a batch that are handled one after the other")
    precision: str = _setting("float32", "of the energy: float32 or bfloat16 (autocast)")
    flow_precision: str = _setting("float32", "of the flow's networks: float32 or bfloat16")
    tf32: bool | None = _setting(
        None, "on a GPU round the factors of float32 products to TF32; none: as torch's flags say"
    )
    compile: bool = _setting(
        False, "compile the gradient of the energy and the blocks of a Flow++ with torch.compile"
    )
    cuda_graph: bool | Literal["auto"] = _setting(
        "auto",
        "on a GPU a step as CUDA graphs: auto, true (an error where it cannot be), or false",
    )

    n_samples: int = _setting(450, "samples of each kind behind a Fréchet distance")
    log_every: int = _setting(20, "steps between lines of metrics.jsonl")
    sample_every: int = _setting(500, "steps between pictures")
    checkpoint_every: int = _setting(500, "steps between checkpoints")
    keep_checkpoints: int = _setting(2, "how many checkpoints to keep")

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            _check_type(setting.name, getattr(self, setting.name), str(setting.type))
        for name, minimum in _MINIMA.items():
            value = getattr(self, name)
            if value is not None and not minimum <= value < math.inf:
                raise ValueError(f"{name} must be finite and ≥ {minimum}, got {value}")
        if not 0 <= self.buffer_reinit <= 1:
            raise ValueError(f"buffer_reinit must be in [0, 1], got {self.buffer_reinit}")
        if self.start == "buffer" and self.buffer_size < self.batch_size:
            raise ValueError(
                f"buffer_size must be ≥ batch_size {self.batch_size}, got {self.buffer_size}"
            )
        for name in ("flow_betas", "energy_betas"):
            if not all(0 <= beta < 1 for beta in getattr(self, name)):
                raise ValueError(f"{name} must be two numbers in [0, 1), got {getattr(self, name)}")
        for name in ("flow_ema", "energy_ema"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.start not in START_NAMES:
            raise ValueError(f"start must be one of {', '.join(START_NAMES)}, got {self.start!r}")
        for name in ("precision", "flow_precision"):
            if getattr(self, name) not in PRECISIONS:
                raise ValueError(
                    f"{name} must be one of {', '.join(PRECISIONS)}, got {getattr(self, name)!r}"
                )
        if self.warmup_by not in WARMUPS:
            raise ValueError(
                f"warmup_by must be one of {', '.join(WARMUPS)}, got {self.warmup_by!r}"
            )
        for name in ("step_clip", "flow_skip_norm", "energy_grad_norm", "energy_skip_norm"):
            if getattr(self, name) == 0:
                raise ValueError(f"{name} must be > 0, or none for no bound, got 0")
        if self.flow_grad_norm == 0:
            raise ValueError("flow_grad_norm must be > 0, got 0: the flow would not learn")
        if self.total_steps < 1:
            raise ValueError("pretrain_steps + steps must be ≥ 1, got 0")

    def load_data(self) -> Dataset:
        """The data set that the settings name."""
        return data.load(
            self.data,
            self.data_dir,
            image_size=self.image_size,
            skip_bad=self.skip_bad,
            max_pixels=self.max_pixels,
        )

    @property
    def total_steps(self) -> int:
        """Pre-training and cooperative iterations together."""
        return self.pretrain_steps + self.steps

    def to_dict(self) -> dict[str, Any]:
        """The settings by name, as JSON has them: with lists where there are tuples."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    def to_json(self, history: Sequence[Change] = ()) -> str:
        """What ``config.json`` holds: the settings, what a resumed run changed of them, and a
        checksum over both."""
        values = {"format": FORMAT_VERSION, **self.to_dict()}
        if history:
            values["history"] = list(history)
        return json.dumps({**values, _CHECKSUM: _checksum(values)}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> TrainConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            ValueError: not JSON, another version of the format, an unknown setting, or something
                else than was written.
            TypeError: a setting of another type than its field.
        """
        values = _checked(parse_json(text))
        return cls.from_dict({k: v for k, v in values.items() if k not in _BESIDE})

    @classmethod
    def of_run(cls, path: Path) -> TrainConfig:
        """The settings of the run in the folder ``path``; a warning where an older version, which
        made no checksum, wrote them.

        Raises:
            RunError: it is not a run, damaged, or of another version of the format.
        """
        return ConfigFile.read(path).config

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Settings by name; ``preset`` may name one to start from, other names are a ValueError.
        Without it the defaults, whatever ``data`` is; the command line takes the data's preset."""
        values = dict(values)
        settings = {**preset(values.pop("preset", "default"))}
        fields = {f.name: f for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - fields.keys())
        if unknown:
            raise ValueError(f"unknown setting {unknown[0]!r}; known are {', '.join(fields)}")
        settings.update(values)
        for name in ("flow_betas", "energy_betas"):
            if isinstance(settings.get(name), list):
                settings[name] = tuple(settings[name])
        return cls(**settings)


class Change(TypedDict):
    """A setting that was changed when a run was resumed, from ``step`` on."""

    step: int
    setting: str
    before: Any
    after: Any


@dataclass(frozen=True)
class ConfigFile:
    """``config.json`` of a run."""

    config: TrainConfig
    history: tuple[Change, ...] = ()

    @classmethod
    def read(cls, run: Path) -> ConfigFile:
        """See :meth:`TrainConfig.of_run`."""
        file = run / "config.json"
        try:
            content = file.read_bytes()
        except OSError as error:
            raise RunError(f"{run} is not a run: it has no readable config.json") from error
        try:
            config = TrainConfig.from_json(content)
        except (ValueError, TypeError) as error:
            raise RunError(f"{file} cannot be used: {error}") from error
        values = parse_json(content)
        if _CHECKSUM not in values:
            warnings.warn(
                f"{file} has no {_CHECKSUM}, as files of older versions: damage to its numbers "
                "would not be seen",
                stacklevel=1,  # one place, so that a command that reads it twice says it once
            )
        return cls(config, tuple(values.get("history", ())))


def _checksum(values: dict[str, Any]) -> str:
    """SHA-256 of an object as canonical JSON: keys in order, no blanks, ASCII."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _checked(values: Any) -> dict[str, Any]:
    """What stands in a config.json, without its checksum; ValueError unless that fits it."""
    version = values.get("format") if isinstance(values, dict) else None
    if version != FORMAT_VERSION:
        raise ValueError(
            f"the configuration is not of format {FORMAT_VERSION}, which this version reads, "
            f"but of {version!r}"
        )
    content = {k: v for k, v in values.items() if k != _CHECKSUM}
    if values.get(_CHECKSUM) not in (None, _checksum(content)):
        raise ValueError(
            f"its content does not have its {_CHECKSUM}: it is damaged, or was edited "
            "(then take that line out, and what it says is used as it is)"
        )
    history = content.get("history", [])
    if not isinstance(history, list) or not all(map(_is_change, history)):
        raise ValueError(f"history must be a list of changes, got {history!r:.80}")
    return content


def _is_change(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == Change.__required_keys__


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _switch(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _json_object(text: str) -> dict[str, Any]:
    value = parse_json(text)
    if not isinstance(value, dict):
        raise ValueError(text)
    return value


@dataclass(frozen=True)
class SettingType:
    """What a setting of one type may be, and how the command line reads it.

    Attributes:
        accepts: whether a value is of the type.
        parse: a word of the command line → a value; ValueError or KeyError where it is none.
        metavar: what the command line's help calls such a word.
        words: how many of them make a value; None for one that stands by itself.
    """

    accepts: Callable[[Any], bool]
    parse: Callable[[str], Any]
    metavar: str
    words: int | None = None

    @classmethod
    def of(cls, annotation: str) -> SettingType:
        """By the annotation of a field; with ``| None`` it may be None, "none" as a word."""
        if annotation in _SETTING_TYPES:
            return _SETTING_TYPES[annotation]
        name, _, optional = annotation.partition(" | ")
        required = _SETTING_TYPES[name]
        if not optional:
            return required
        return dataclasses.replace(
            required,
            accepts=lambda value: value is None or required.accepts(value),
            parse=lambda text: None if text.lower() == "none" else required.parse(text),
            metavar=f"{required.metavar}|none",
        )


_SETTING_TYPES = {
    "str": SettingType(lambda v: isinstance(v, str), str, "TEXT"),
    "int": SettingType(lambda v: isinstance(v, int) and not isinstance(v, bool), int, "INT"),
    "float": SettingType(_is_number, float, "FLOAT"),
    "bool": SettingType(lambda v: isinstance(v, bool), _switch, "true|false"),
    "bool | Literal['auto']": SettingType(
        lambda v: isinstance(v, bool) or v == "auto",
        lambda text: text if text == "auto" else _switch(text),
        "auto|true|false",
    ),
    "dict[str, Any]": SettingType(lambda v: isinstance(v, dict), _json_object, "JSON-OBJECT"),
    "tuple[float, float]": SettingType(
        lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_number, v)),
        float,
        "FLOAT",
        words=2,
    ),
}


def _check_type(name: str, value: Any, annotation: str) -> None:
    """TypeError unless the value is of the annotated type."""
    if not SettingType.of(annotation).accepts(value):
        raise TypeError(f"{name} must be {annotation}, got {value!r}")


_MINIMA = {
    "seed": 0,
    "steps": 0,
    "batch_size": 1,
    "buffer_size": 1,
    "langevin_steps": 0,
    "step_size": 0,
    "sample_step_size": 0,
    "noise": 0,
    "step_clip": 0,
    "image_size": 4,
    "max_pixels": 1,
    "pretrain_steps": 0,
    "flow_frozen_steps": 0,
    "flow_every": 1,
    "pretrain_lr": 0,
    "flow_lr": 0,
    "flow_weight_decay": 0,
    "flow_grad_norm": 0,
    "flow_skip_norm": 0,
    "energy_lr": 0,
    "energy_grad_norm": 0,
    "energy_skip_norm": 0,
    "energy_skip_from": 0,
    "init_batches": 1,
    "warmup_steps": 0,
    "accumulate": 1,
    "n_samples": 2,
    "log_every": 1,
    "sample_every": 1,
    "checkpoint_every": 1,
    "keep_checkpoints": 1,
}

_DIGITS_SMALL: dict[str, Any] = {
    "data": "digits",
    "steps": 1100,
    "batch_size": 128,
    "flow": "realnvp",
    "flow_options": {"net": "mlp", "couplings": 8, "widths": [256, 256], "dropout": 0.1},
    "energy": "mlp",
    "energy_options": {"widths": [128, 128, 128]},
    "langevin_steps": 20,
    "step_size": 0.5,
    "noise": 0.02,
    "pretrain_steps": 1500,
    "flow_frozen_steps": 300,
    "flow_every": 3,
    "pretrain_lr": 2e-3,
    "flow_lr": 1e-4,
    "energy_lr": 2e-3,
    "energy_betas": (0.9, 0.99),
    "flow_ema": 0.995,
    "energy_ema": 0.995,
}
_PATCHES_SMALL: dict[str, Any] = {
    "data": "patches",
    "steps": 250,
    "batch_size": 16,
    "flow_options": {"scales": 4, "steps": 4, "channels": 32, "blocks": 1},
    "energy_options": {"width": 16},
    "langevin_steps": 15,
    "step_size": 0.5,
    "noise": 0.005,
    "pretrain_steps": 200,
    "flow_frozen_steps": 80,
    "flow_every": 2,
    "pretrain_lr": 2e-3,
    "flow_lr": 2e-5,
    "energy_lr": 1e-5,
    "energy_betas": (0.5, 0.9),
    "flow_ema": 0.98,
    "energy_ema": 0.98,
    "warmup_steps": 50,
    "n_samples": 200,
    "sample_every": 250,
    "checkpoint_every": 100,
}
# CoopFlow(Pre) with a small Flow++, for a CPU: the settings around the flow are those above.
_FLOWPP_SMALL: dict[str, Any] = {
    "flow": "flowpp",
    "warmup_steps": 50,
    "sample_every": 100,
    "checkpoint_every": 100,
}
_FLOWPP_NETS = {"blocks": 1, "components": 8, "dequant_blocks": 1, "dequant_components": 4}
_DIGITS_FLOWPP: dict[str, Any] = {
    **_DIGITS_SMALL,
    **_FLOWPP_SMALL,
    "batch_size": 64,
    "flow_options": {**_FLOWPP_NETS, "channels": 32, "dropout": 0.1},
    "pretrain_steps": 400,
    "steps": 300,
    "flow_frozen_steps": 150,
    "flow_lr": 2e-4,
}
_PATCHES_FLOWPP: dict[str, Any] = {
    **_PATCHES_SMALL,
    **_FLOWPP_SMALL,
    "flow_options": {
        **_FLOWPP_NETS,
        "scales": [[0, 2], [2, 2]],
        "channels": 24,
        "dropout": 0.1,
    },
    "pretrain_steps": 150,
    "steps": 120,
    "flow_frozen_steps": 50,
}
_TOY: dict[str, Any] = {
    "data": "toy:8gaussians",
    "steps": 1500,
    "batch_size": 256,
    "flow": "realnvp",
    "flow_options": {"couplings": 8, "widths": [64, 64]},
    "energy": "mlp",
    "energy_options": {"widths": [128, 128, 128]},
    "langevin_steps": 30,
    "step_size": 0.15,
    "noise": 0.15,
    "step_clip": None,
    "pretrain_steps": 500,
    "flow_frozen_steps": 300,
    "pretrain_lr": 1e-3,
    "flow_lr": 2e-4,
    "energy_lr": 1e-3,
    "energy_betas": (0.5, 0.9),
    "flow_ema": 0.99,
    "energy_ema": 0.99,
    "n_samples": 2000,
}
# The paper's experiments: 200 epochs of batches of 28. How long the flow of CoopFlow(Pre) was
# pre-trained is not published; 100 epochs are this project's choice.
_BATCHES_PER_EPOCH = {"cifar10": 50_000 // 28, "svhn": 73_257 // 28, "celeba": 182_637 // 28}
_FROZEN_EPOCHS = {"cifar10": 26, "svhn": 11, "celeba": 10}
_SAMPLE_STEP_SIZE = {"cifar10": 0.04, "svhn": 0.035, "celeba": 0.035}
# Their scripts differ in which gradients are clipped, and which updates left out, by these norms.
_CIFAR10_CLIPS: dict[str, Any] = {"flow_clip_groups": True}
_CIFAR10_PRE_CLIPS = {"flow_skip_norm": 5e5, "energy_grad_norm": 5e5, "energy_skip_norm": 5e5}
_OTHER_CLIPS = {"flow_skip_norm": 1e6, "energy_grad_norm": 1.0, "energy_skip_norm": 5e6}


def _paper_presets(data: str) -> dict[str, dict[str, Any]]:
    """CoopFlow(T=30), (Pre) and (Long) on one of the paper's data sets."""
    epoch = _BATCHES_PER_EPOCH[data]
    cifar10 = data == "cifar10"
    shared: dict[str, Any] = {
        "data": data,
        "flow": "flowpp",
        "steps": 200 * epoch,
        "sample_step_size": _SAMPLE_STEP_SIZE[data],
        "flip": cifar10,
        "init_batches": 20,
        "warmup_by": "batches",
        "n_samples": 5000,
        "log_every": 100,
        "sample_every": epoch,
        "checkpoint_every": epoch,
    }
    plain = {**shared, **(_CIFAR10_CLIPS if cifar10 else _OTHER_CLIPS)}
    pre = {
        **shared,
        **(_CIFAR10_PRE_CLIPS if cifar10 else _OTHER_CLIPS),
        "energy_skip_from": epoch,
        "flow_restart": True,
        "pretrain_steps": 100 * epoch,
        "flow_frozen_steps": _FROZEN_EPOCHS[data] * epoch,
        "flow_every": 5 if data == "celeba" else 1,
    }
    return {data: plain, f"{data}-pre": pre, f"{data}-long": {**plain, "langevin_steps": 200}}


_PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "digits-small": _DIGITS_SMALL,
    "patches-small": _PATCHES_SMALL,
    "digits-flowpp": _DIGITS_FLOWPP,
    "patches-flowpp": _PATCHES_FLOWPP,
    "toy": _TOY,
    **{
        name: settings
        for data in _BATCHES_PER_EPOCH
        for name, settings in _paper_presets(data).items()
    },
}
PRESETS = tuple(_PRESETS)
"""The settings that ``preset`` may name, see :meth:`TrainConfig.from_dict`."""

_PRESET_OF_DATA = {"digits": "digits-small", "patches": "patches-small", "toy": "toy"}
DEFAULT_PRESETS = (
    f"those of the data ({', '.join(_PRESET_OF_DATA.values())}, cifar10, svhn, celeba), "
    "or else default"
)
"""What :func:`default_preset` takes, in words."""


def preset(name: str) -> dict[str, Any]:
    """The settings of a preset that differ from the defaults; ValueError for an unknown name."""
    if not isinstance(name, str) or name not in _PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return dict(_PRESETS[name])


def default_preset(data: str) -> str:
    """The preset that is taken for a data set when none is named."""
    name = _PRESET_OF_DATA.get(data.partition(":")[0], data)
    return name if name in _PRESETS else "default"
