"""Keys for work that is recorded once and replayed with the numbers of other keys."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from coopflow_ext.rng import Key

Derivation = tuple[tuple[str, tuple[int, ...]], ...]
"""Methods of a key with their arguments, one called on the result of the other."""


class Streams:
    """The rng tensors of everything that is drawn from one key, in memory that stays.

    Recorded work takes its key from :meth:`record`. Before it is replayed, :meth:`fill` gives the
    tensors the values that another key would have given them.

    Attributes:
        closed: whether a stream that was not drawn before is an error. One that a capture makes
            would be made again, with its old numbers, by every replay.
    """

    def __init__(self) -> None:
        self._tensors: dict[tuple[Derivation, torch.device], Tensor] = {}
        self.closed = False

    def record(self, key: Key) -> RecordedKey:
        """``key``, whose streams are this object's tensors."""
        self.fill(key)
        return RecordedKey(key.seed, key.time, key.chain, streams=self)

    def fill(self, key: Key) -> None:
        """The streams of ``key`` in all tensors that there are; nothing waits for the device."""
        for device in {device for _, device in self._tensors}:
            mine = {how: t for (how, where), t in self._tensors.items() if where == device}
            plain = Key(key.seed, key.time, key.chain)
            rows = torch.stack([derived(plain, how).tensor("cpu") for how in mine])
            new = rows.to(device, non_blocking=True).unbind(0)
            torch._foreach_copy_(list(mine.values()), list(new))

    def tensor_of(self, key: RecordedKey, device: torch.device) -> Tensor:
        """The one tensor of a stream."""
        name = key.derivation, device
        if name not in self._tensors:
            if self.closed:
                raise RuntimeError(f"the stream {key.derivation} was not drawn before the capture")
            plain = Key(key.seed, key.time, key.chain)
            self._tensors[name] = plain.tensor(device)
        return self._tensors[name]


@dataclass(frozen=True, slots=True)
class RecordedKey(Key):
    """A key that knows how it was derived from the one that the work was recorded with.

    Its numbers are those of the recording: only what is drawn from its tensors follows other keys.
    """

    streams: Streams = field(kw_only=True, compare=False, repr=False)
    derivation: Derivation = field(kw_only=True, default=())

    def at_chain(self, chain: int) -> RecordedKey:
        """See :meth:`Key.at_chain`."""
        return self._derive("at_chain", chain)

    def fold_in(self, data: int) -> RecordedKey:
        """See :meth:`Key.fold_in`."""
        return self._derive("fold_in", data)

    def fold_time(self) -> RecordedKey:
        """See :meth:`Key.fold_time`."""
        return self._derive("fold_time")

    def advance(self, n: int) -> RecordedKey:
        """See :meth:`Key.advance`."""
        return self._derive("advance", n)

    def tensor(self, device: torch.device | str | None = None) -> Tensor:
        """See :meth:`Key.tensor`; always the same memory for the same stream."""
        where = torch.get_default_device() if device is None else torch.device(device)
        return self.streams.tensor_of(self, where)

    def _derive(self, method: str, *arguments: int) -> RecordedKey:
        key = derived(Key(self.seed, self.time, self.chain), ((method, arguments),))
        derivation = (*self.derivation, (method, arguments))
        return RecordedKey(
            key.seed, key.time, key.chain, streams=self.streams, derivation=derivation
        )


def derived(key: Key, derivation: Derivation) -> Key:
    """What the derivation makes of ``key``."""
    for method, arguments in derivation:
        key = cast(Key, getattr(key, method)(*arguments))
    return key
