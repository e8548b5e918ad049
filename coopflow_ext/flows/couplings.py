"""Coupling layers: one half of x is changed by a map whose parameters depend on the other half."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext._checks import check_count, check_flag
from coopflow_ext._tensors import as_tensor, check_tensor
from coopflow_ext.flows.base import NO_CONTEXT, Context, Transform
from coopflow_ext.flows.kept import Kept
from coopflow_ext.flows.layers import Checkerboard, halves
from coopflow_ext.flows.nets import Conditioner
from coopflow_ext.flows.weight_norm import Rescale


class Split(nn.Module):
    """Which part of x a coupling changes: ``split`` gives (changed, kept), ``merge`` undoes it."""

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def merge(self, changed: Tensor, kept: Tensor) -> Tensor:
        raise NotImplementedError


class ChannelSplit(Split):
    """Halves of dimension 1; the first is changed, or the second with ``flip``."""

    def __init__(self, flip: bool = False) -> None:
        super().__init__()
        self.flip = check_flag("flip", flip)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = halves(x)
        return (second, first) if self.flip else (first, second)

    def merge(self, changed: Tensor, kept: Tensor) -> Tensor:
        return torch.cat((kept, changed) if self.flip else (changed, kept), dim=1)


class CheckerboardSplit(ChannelSplit):
    """The two colours of a checkerboard, each (B, C, H, W/2); see :class:`Checkerboard`.

    The pixels whose row parity equals their column parity are changed, or the others with
    ``flip``.
    """

    def __init__(self, flip: bool = False) -> None:
        super().__init__(flip)
        self.board = Checkerboard()

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().split(self.board.rearrange(x))

    def merge(self, changed: Tensor, kept: Tensor) -> Tensor:
        return self.board.restore(super().merge(changed, kept))


class VectorSplit(Split):
    """Coordinates of a vector (B, D).

    Args:
        mask: (D,) bool; True marks the coordinates that are changed. At least one of each kind.

    The mask is a floating-point buffer of 0 and 1, above ½ meaning True, so that it stands being
    cast or averaged; the indices are made from it on x's device.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        mask = mask if isinstance(mask, Tensor) else as_tensor("mask", mask, device="cpu")
        if mask.ndim != 1 or mask.dtype != torch.bool or bool(mask.all()) or not bool(mask.any()):
            raise ValueError(
                "mask must be a bool tensor (D,) with both values, "
                f"got {mask.dtype} of shape {tuple(mask.shape)}"
            )
        self.n_changed = int(mask.sum())
        self.n_kept = mask.numel() - self.n_changed
        # Where the parameters are made: on the meta device too, for its values are loaded later.
        self.register_buffer("mask", torch.empty(mask.shape).copy_(mask))
        self._indices: Kept[tuple[Tensor, Tensor, Tensor]] = Kept()

    def capture_kind(self) -> Hashable:
        """Where the indices are that a replay would read."""
        if self.mask.is_inference():  # they are worked out in each pass, a captured one too
            return None
        return tuple(indices.data_ptr() for indices in self._indices_on(self.mask.device))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        key = prefix + "mask"
        if prefix + "order" in state_dict and key not in state_dict:  # from before the mask
            order = state_dict.pop(prefix + "order")
            changed = state_dict.pop(prefix + "changed")
            state_dict.pop(prefix + "kept", None)
            mask = torch.zeros(order.shape, dtype=self.mask.dtype, device=order.device)
            state_dict[key] = mask.index_fill_(0, changed, 1)
        mask = state_dict.get(key, self.mask)
        if not mask.is_meta and int((mask > 0.5).sum()) != self.n_changed:
            errors.append(f"{key} must be above 0.5 for exactly {self.n_changed} coordinates")
            return
        super()._load_from_state_dict(
            state_dict, prefix, metadata, strict, missing, unexpected, errors
        )

    def _indices_on(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the changed and of the kept coordinates, and of both put back in order."""

        def work_out() -> tuple[Tensor, Tensor, Tensor]:
            # By sorting, so that nothing is read from the device.
            both = (self.mask.to(device) <= 0.5).to(torch.uint8).argsort(stable=True)
            return both[: self.n_changed], both[self.n_changed :], both.argsort()

        indices = self._indices.get(work_out, self.mask, device)
        assert indices is not None
        return indices

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.ndim != 2 or x.shape[1] != self.mask.numel():
            raise ValueError(f"x must be (B, {self.mask.numel()}), got {tuple(x.shape)}")
        changed, kept, _ = self._indices_on(x.device)
        return x.index_select(1, changed), x.index_select(1, kept)

    def merge(self, changed: Tensor, kept: Tensor) -> Tensor:
        _, _, order = self._indices_on(changed.device)
        return torch.cat((changed, kept), dim=1).index_select(1, order)


def _as_split(split: Split | str, flip: bool) -> Split:
    check_flag("flip", flip)
    if isinstance(split, Split):
        if flip:
            raise ValueError("flip goes with a split given by name")
        return split
    if split == "channel":
        return ChannelSplit(flip)
    if split == "checkerboard":
        return CheckerboardSplit(flip)
    raise ValueError(f"split must be 'channel', 'checkerboard' or a Split, got {split!r}")


def _net_output(
    net: nn.Module, kept: Tensor, context: Context, features: int, per_feature: int
) -> Tensor:
    """The conditioner's output as (B, per_feature, features, …)."""
    raw: Tensor = net(kept, context)
    if raw.shape[1] != per_feature * features:
        raise ValueError(
            f"net must return {per_feature}·{features} channels, got shape {tuple(raw.shape)}"
        )
    return raw.reshape(raw.shape[0], per_feature, features, *raw.shape[2:])


def _bound_a(raw: Tensor, rescale: Tensor) -> Tensor:
    """raw (B, n, features, …) with its first entry replaced by a = rescale·tanh(·)."""
    raw_a, others = raw.split([1, raw.shape[1] - 1], dim=1)
    a = rescale * torch.tanh(raw_a)
    return torch.cat((a.to(raw.dtype), others), dim=1)  # raw is half precision in autocast


def check_finite(params: Tensor) -> None:
    """Explicit check of a coupling's parameters (B, …); it waits for the device.

    The couplings themselves never look: a NaN or infinite parameter gives NaN in its element and
    in its row's ladj.

    Raises:
        ValueError: naming the rows that hold a value which is not finite.
    """
    check_tensor("params", params)
    bad = ~params.flatten(1).isfinite().all(1)
    if bool(bad.any()):
        rows = bad.nonzero()[:, 0].tolist()
        raise ValueError(f"params must be finite; rows with NaN or infinite values: {rows}")


class AffineCoupling(Transform):
    """Changed half: y = x·e^a + b, with (a, b) a function of the kept half.

    a = rescale·tanh(·), rescale a learned vector with one number per channel (dimension 1), so
    that a stays bounded (Dinh et al. 2017, section 4.1).

    Args:
        net: conditioner from the kept half (B, n_kept, …) to (B, 2·features, …): first a, then b.
        features: channels (or coordinates) of the changed half.
        split: "channel", "checkerboard", or a :class:`Split` such as ``VectorSplit(mask)``.
        flip: change the other half.

    Raises:
        ValueError: when the net's output does not fit x.
    """

    def __init__(
        self, net: Conditioner, features: int, split: Split | str = "channel", flip: bool = False
    ) -> None:
        super().__init__()
        self.net = net
        self.features = check_count("features", features, 1)
        self.split = _as_split(split, flip)
        self.rescale = nn.Parameter(torch.ones(features))

    def _params(self, kept: Tensor, context: Context) -> Tensor:
        raw = _net_output(self.net, kept, context, self.features, 2)
        rescale = self.rescale.view((-1,) + (1,) * (kept.ndim - 2))
        return _bound_a(raw, rescale)

    def call_and_ladj(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        changed, kept = self.split.split(x)
        y, ladj = ops.affine_coupling(changed, self._params(kept, context))
        return self.split.merge(y, kept), ladj

    def inverse_and_ladj(self, z: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        changed, kept = self.split.split(z)
        x, ladj = ops.affine_coupling_inverse(changed, self._params(kept, context))
        return self.split.merge(x, kept), ladj


class MixtureLogisticCoupling(Transform):
    """Changed half: y = (logit F(x) + b)·e^a, F the CDF of a mixture of logistics.

    a, b, and the mixture's K weight logits, means and log-scales are a function of the kept half;
    a = rescale·tanh(·) with a weight-normed rescale per channel (Ho et al. 2019, section 3.2).

    Args:
        net: conditioner from the kept half to (B, (2 + 3K)·features, H, W), in the order a, b, K
            logits, K means, K log-scales, each of ``features`` channels.
        features: channels of the changed half.
        components: K.
        split: "channel", "checkerboard", or a :class:`Split` of images.
        flip: change the other half.
        legacy_cdf_clamp: the inverse clamps the CDF's value to [1e-5, 1 − 1e-5] before root
            finding, as the published code does.

    Raises:
        ValueError: for K < 1, or when the net's output does not fit x.
    """

    def __init__(
        self,
        net: Conditioner,
        features: int,
        components: int = 32,
        split: Split | str = "channel",
        flip: bool = False,
        *,
        legacy_cdf_clamp: bool = False,
    ) -> None:
        super().__init__()
        self.net = net
        self.features = check_count("features", features, 1)
        self.components = check_count("components", components, 1)
        self.split = _as_split(split, flip)
        self.legacy_cdf_clamp = check_flag("legacy_cdf_clamp", legacy_cdf_clamp)
        self.rescale = Rescale(features)

    def _params(self, kept: Tensor, context: Context) -> Tensor:
        per_feature = 2 + 3 * self.components
        raw = _net_output(self.net, kept, context, self.features, per_feature)
        shape = (-1,) + (1,) * (kept.ndim - 2)
        return _bound_a(raw, self.rescale.weight.view(shape))

    def call_and_ladj(self, x: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        changed, kept = self.split.split(x)
        y, ladj = ops.mixture_logistic_coupling(changed.contiguous(), self._params(kept, context))
        return self.split.merge(y, kept), ladj

    def inverse_and_ladj(self, z: Tensor, context: Context = NO_CONTEXT) -> tuple[Tensor, Tensor]:
        changed, kept = self.split.split(z)
        x, ladj = ops.mixture_logistic_coupling_inverse(
            changed.contiguous(),
            self._params(kept, context),
            legacy_cdf_clamp=self.legacy_cdf_clamp,
        )
        return self.split.merge(x, kept), ladj
