"""Keys: where every random number of this package comes from.

A :class:`Key` is a 64-bit seed, a time and the number of the first chain. Normals are a pure
function of (seed, chain, time, element), see ``csrc/include/coopflow/philox.h``, whatever the
batch, the number of threads or of devices; on CUDA they differ by rounding from those of a CPU.
Separate uses of one key fold in separate constants (the ``USE_*`` below).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypedDict

import numpy as np
import torch

from coopflow_ext import _extension
from coopflow_ext._export import is_exporting

_SEED_LIMIT: Final = 2**64
TIME_LIMIT: Final = 2**32
_SPLIT_BASE: Final = 2**63
_CHAIN_LIMIT: Final = 2**63

# What is folded in for each separate use of a key. Below 2**32: tensor index of a state of several
# tensors, and users; from 2**63: Key.split.
_USE_BASE: Final = 2**32
USE_PRIOR: Final = _USE_BASE + 1
USE_DEQUANTIZE: Final = _USE_BASE + 2
USE_DROPOUT: Final = _USE_BASE + 3
USE_DATA_ORDER: Final = _USE_BASE + 4
USE_AUGMENT: Final = _USE_BASE + 5
USE_INIT: Final = _USE_BASE + 6
USE_BUFFER: Final = _USE_BASE + 7
USE_CHAIN: Final = _USE_BASE + 8
USE_EVALUATION: Final = _USE_BASE + 9
USE_ACCEPT: Final = _USE_BASE + 10
USE_MOMENTUM: Final = _USE_BASE + 11


class _SeedAndTime(TypedDict):
    seed: int
    time: int


class KeyState(_SeedAndTime, total=False):
    """What :meth:`Key.state_dict` returns: three Python integers; two in states of old versions."""

    chain: int


def _to_signed(word: int) -> int:
    """Reinterpret an unsigned 64-bit integer as int64, which is what tensors hold."""
    return word - _SEED_LIMIT if word >= _SPLIT_BASE else word


def _refuse_export() -> None:
    """ValueError while torch.export traces: the program would draw the same numbers at each run."""
    if is_exporting():
        raise ValueError(
            "a key would become a constant of the exported program, which would draw the same "
            "numbers at each run; let the program take what is drawn (eps, z, xi) or the tensor "
            "rng, which key.tensor() gives outside of it"
        )


def _check_int(name: str, value: object, limit: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not 0 <= value < limit:
        raise ValueError(f"{name} must be in [0, {limit}), got {value}")


@dataclass(frozen=True, slots=True)
class Key:
    """An immutable random key.

    Args:
        seed: 64 bits, 0 ≤ seed < 2⁶⁴.
        time: number of steps already drawn, 0 ≤ time < 2³².
        chain: number of the first chain, 0 ≤ chain < 2⁶³: row i of a batch is chain ``chain + i``.

    Raises:
        TypeError, ValueError: for anything else.
    """

    seed: int
    time: int = 0
    chain: int = 0

    def __post_init__(self) -> None:
        _check_int("seed", self.seed, _SEED_LIMIT)
        _check_int("time", self.time, TIME_LIMIT)
        _check_int("chain", self.chain, _CHAIN_LIMIT)

    def at_chain(self, chain: int) -> Key:
        """The same key for a batch whose first row is this chain: a shard of a larger batch that
        starts at its row i takes ``key.at_chain(key.chain + i)``."""
        return Key(self.seed, self.time, chain)

    def check_batch(self, batch: int) -> None:
        """ValueError unless every chain of a batch has a number."""
        if self.chain > _CHAIN_LIMIT - batch:
            raise ValueError(
                f"key.chain must be at most 2**63 - {batch} for {batch} chains, got {self.chain}"
            )

    def fold_in(self, data: int) -> Key:
        """A key with an independent seed, determined by this seed and ``data``; time and
        chain are kept. Tensor j > 0 of a state of several tensors has the noise of
        ``key.fold_in(j)``: for a use of your own beside such a state take a number beyond its
        tensors.

        ``data`` is in [0, 2⁶⁴). The new seed is words 0, 1 of Philox4x32-10 with this seed as the
        key and counter (data low, data high, 0, 2³¹), which no noise counter can equal.
        """
        _check_int("data", data, _SEED_LIMIT)
        _refuse_export()
        fold_in = _extension.native().fold_in
        seed = int(fold_in(_to_signed(self.seed), _to_signed(data))) % _SEED_LIMIT
        return Key(seed, self.time, self.chain)

    def fold_time(self) -> Key:
        """A key at time 0 whose seed is determined by this seed and time; the chain is kept. For
        uses that count something else than steps."""
        return Key(self.fold_in(self.time).seed, chain=self.chain)

    def split(self, n: int) -> tuple[Key, ...]:
        """``n`` independent keys: ``fold_in(2**63 + k)`` for k < n."""
        _check_int("n", n, _SPLIT_BASE)
        return tuple(self.fold_in(_SPLIT_BASE + k) for k in range(n))

    def advance(self, n: int) -> Key:
        """The key ``n`` steps later.

        Raises:
            OverflowError: when the time would reach 2³²; fold in a number to go on.
        """
        _check_int("n", n, _SEED_LIMIT)
        time = self.time + n
        if time >= TIME_LIMIT:
            raise OverflowError(
                f"a key counts at most 2**32 - 1 steps: time {self.time} + {n} does not fit; "
                "use key.fold_in(i) for a fresh stream"
            )
        return Key(self.seed, time, self.chain)

    def state_dict(self) -> KeyState:
        """Three Python integers, ready for JSON."""
        return {"seed": self.seed, "time": self.time, "chain": self.chain}

    @classmethod
    def from_state_dict(cls, state: KeyState) -> Key:
        """The inverse of :meth:`state_dict`; states of two integers have chain 0."""
        return cls(state["seed"], state["time"], state.get("chain", 0))

    def tensor(self, device: torch.device | str | None = None) -> torch.Tensor:
        """int64[3] = (seed's 64 bits reinterpreted, time, chain), what the ops take as ``rng``."""
        _refuse_export()
        if torch.compiler.is_compiling():
            return _traced_stream(self, (), device, fold_time=False)
        if device is not None and torch.device(device).type == "cpu":
            # A third of what torch.tensor takes, which is 5 us.
            numbers = np.array((_to_signed(self.seed), self.time, self.chain), np.int64)
            return torch.from_numpy(numbers)
        # Written on the device: copying a host tensor would wait for the device's stream.
        rng = torch.full((3,), self.chain, dtype=torch.int64, device=device)
        rng[0].fill_(_to_signed(self.seed))
        rng[1].fill_(self.time)
        return rng

    @classmethod
    def or_default(cls, key: object) -> Key:
        """``key`` itself; for None one :meth:`from_default_generator`; else a TypeError."""
        return cls.from_default_generator() if key is None else cls.check(key, ", or None")

    @classmethod
    def check(cls, key: object, or_else: str = "") -> Key:
        """``key`` itself; a TypeError where it is none, which says what is allowed ``or_else``."""
        if not isinstance(key, Key):
            kind = type(key).__name__
            raise TypeError(f"key must be a Key, such as cf.Key(0){or_else}, got {kind}")
        return key

    @classmethod
    def from_default_generator(cls) -> Key:
        """A key drawn from torch's default CPU generator, so torch.manual_seed reproduces it."""
        _refuse_export()
        low, high = torch.randint(0, 2**32, (2,), dtype=torch.int64, device="cpu").tolist()
        return cls(low | (high << 32))


def stream(
    key: Key | None,
    *uses: int,
    device: torch.device | str | None = None,
    fold_time: bool = False,
    batch: int = 0,
) -> torch.Tensor:
    """The rng tensor of ``key`` with ``uses`` folded in, for a batch whose chains all must have
    numbers; None draws from torch's generator.

    ``fold_time`` folds the key's time in as well and starts at time 0, for uses that count
    something else than steps.

    While torch.compile traces, the key's numbers are inputs of the graph, not constants in it, so
    that the next key needs no other graph.
    """
    if torch.compiler.is_compiling():
        return _traced_stream(key, uses, device, fold_time=fold_time)
    key = Key.or_default(key)
    key.check_batch(batch)
    for use in uses:
        key = key.fold_in(use)
    if fold_time:
        key = key.fold_time()
    return key.tensor(device)


def _traced_stream(
    key: Key | None, uses: tuple[int, ...], device: torch.device | str | None, *, fold_time: bool
) -> torch.Tensor:
    # The default device, for which tracing in one graph finds no other way.
    device = torch.empty(0).device if device is None else torch.device(device)
    if key is None:  # a fresh seed at each call needs no uses to tell it from others
        low, high = torch.randint(0, 2**32, (2,), dtype=torch.int64, device=device).unbind()
        zero = torch.zeros_like(low)
        return torch.stack((low | high << 32, zero, zero))
    _refuse_export()
    # Halves, because a seed can be more than the int64 that a graph's integers are.
    low_word, high_word = key.seed % 2**32, key.seed // 2**32
    rng: torch.Tensor = _stream_op(
        low_word, high_word, key.time, key.chain, list(uses), fold_time, device
    )
    return rng


@torch.library.custom_op(
    "coopflow_ext::stream",
    mutates_args=(),
    schema="(SymInt seed_low, SymInt seed_high, SymInt time, SymInt chain, int[] uses, "
    "bool fold_time, Device device) -> Tensor",
)
def _stream_op(
    seed_low: int,
    seed_high: int,
    time: int,
    chain: int,
    uses: list[int],
    fold_time: bool,
    device: torch.device,
) -> torch.Tensor:
    key = Key(seed_low | seed_high << 32, time, chain)
    return stream(key, *uses, device=device, fold_time=fold_time)


@_stream_op.register_fake
def _(
    seed_low: int,
    seed_high: int,
    time: int,
    chain: int,
    uses: list[int],
    fold_time: bool,
    device: torch.device,
) -> torch.Tensor:
    return torch.empty((3,), dtype=torch.int64, device=device)
