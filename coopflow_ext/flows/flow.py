"""A normalizing flow: layers, a standard normal prior, and the pre-processing of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch import Tensor, nn

from coopflow_ext import ops
from coopflow_ext._checks import check_count, check_flags, check_sizes
from coopflow_ext._model_state import in_mode
from coopflow_ext._recording import is_capturing, is_watched
from coopflow_ext._tensors import check_tensor, parameter_dtype
from coopflow_ext.flows.base import Context, Transform
from coopflow_ext.flows.folding import folding, is_folded
from coopflow_ext.flows.nets import Dropout
from coopflow_ext.flows.preprocessing import Dequantize, Logit, VariationalDequantize
from coopflow_ext.flows.recompute import call_and_ladj, check_invertible
from coopflow_ext.graphed_calls import GraphedCalls
from coopflow_ext.recorded_key import RecordedKey
from coopflow_ext.rng import USE_DEQUANTIZE, USE_DROPOUT, USE_PRIOR, Key, stream

_LOG_2PI = math.log(2 * math.pi)


class Flow(nn.Module):
    """z = f(x) with z ~ N(0, I); data → latent is "forward".

    With ``dequantize`` and ``logit`` it is a flow of images x in [−1, 1]: x → (x + 1)/2 →
    dequantise → logit → ``transform``. Without them it is a flow of tensors of any range.

    Args:
        transform: the map between (B, *event_shape) tensors.
        event_shape: shape of one x, and of one z.
        dequantize: the dequantiser of an image flow.
        logit: the logit map of an image flow; goes with ``dequantize``.
        legacy_contrast: ``sample`` returns 2·sigmoid(y) − 1 without dividing by the logit's bound,
            as the published code does: every sample then has 10% less contrast.
        round_samples: ``sample`` returns grey levels of the data, the exact inverse of
            dequantisation, not values between them. By default when there are fewer than 256
            levels, where the noise of dequantisation would show.
        context_dim: size of the context that the networks of ``transform`` are conditioned on, 0
            for a flow without one.
        recompute: in training, keep the output alone and rebuild the inputs of the layers by their
            inverses: memory does not grow with depth; of the paper's flow a step has 1.64 times as
            much arithmetic. A backward pass compares some of them with what they were; RuntimeError
            where they differ.
            Where torch.utils.checkpoint is put around a part of the flow instead, it needs
            ``use_reentrant=True``: a pass norms the weights of all layers before it begins, and
            the other kind counts what a part saves.
        sampling_dropout: in training mode, dropout stays on in ``sample`` too, as in the published
            code.

    Random draws come from ``key``; ``key=None`` draws a seed from torch's default generator.
    Row i of a batch draws as chain ``key.chain + i``, so that a batch split over several processes,
    each with its ``key.at_chain``, draws what the whole batch draws.

    ``context`` (B, context_dim) is what a flow with ``context_dim`` is conditioned on; the
    variational dequantiser does without it.

    x, z, eps and context have the parameters' dtype, or under autocast float32 or autocast's;
    TypeError for another, and for what is no tensor.

    On CUDA ``sample``, and ``log_prob`` under no_grad, are captured as a CUDA graph at the second
    call of a kind (batch size, dtypes, modes, layers, memory of the weights, hooks and what
    else a capture depends on) and replayed with other keys and values; the four kinds used last
    are kept, with the memory of the largest. Changes of the weights in place are seen. A replay
    runs no Python: hooks of networks inside do not run with it, what they kept is overwritten,
    and what a network of yours reads from an attribute is as it was in the capture.
    ``flow.cuda_graph = False`` turns it off, as do, where they are on, a dispatch mode such as
    a counter of operations and a transform of torch.func.

    Layers are not called as modules, so forward hooks on them do not run. A layer that norms its
    weight takes no parametrization of torch's.

    With ``flow.compile_blocks = True`` the blocks of a Flow++, which are most of it, run compiled:
    one code of torch.compile for all blocks of a kind (sizes, dropout, with or without gradients),
    whatever the depth, at the first call of the kind, and one more for other batch sizes. Other
    networks run as they are, and hooks of the layers inside of a block do not run. Where a block
    cannot be compiled, one warning says so. It is differentiable once.

    ``torch.compile(flow.sample, fullgraph=True)``, and the same of ``log_prob``, is one graph that
    takes the key as an input: another key needs no other graph.
    """

    def __init__(
        self,
        transform: Transform,
        event_shape: Sequence[int],
        *,
        dequantize: Dequantize | None = None,
        logit: Logit | None = None,
        legacy_contrast: bool = False,
        round_samples: bool | None = None,
        sampling_dropout: bool = False,
        context_dim: int = 0,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        if (dequantize is None) != (logit is None):
            raise ValueError("dequantize and logit go together: give both or neither")
        check_flags(
            legacy_contrast=legacy_contrast,
            sampling_dropout=sampling_dropout,
            recompute=recompute,
        )
        if round_samples is not None:
            check_flags(round_samples=round_samples)
        if (legacy_contrast or round_samples) and logit is None:
            raise ValueError("legacy_contrast and round_samples are for image flows only")
        if legacy_contrast and round_samples:
            raise ValueError("legacy_contrast and round_samples exclude each other")
        self.transform = transform
        self.event_shape = check_sizes("event_shape", event_shape)
        self.dim = math.prod(self.event_shape)
        self.dequantize = dequantize
        self.logit = logit
        self.legacy_contrast = legacy_contrast
        if round_samples is None:
            round_samples = dequantize is not None and dequantize.levels < 256
        self.round_samples = round_samples and not legacy_contrast
        self.sampling_dropout = sampling_dropout
        self.context_dim = check_count("context_dim", context_dim, 0)
        self.recompute = recompute
        if recompute:
            check_invertible(self)
        if isinstance(dequantize, VariationalDequantize):
            dequantize.recompute = recompute
        dropouts = [m for m in self.modules() if isinstance(m, Dropout) and m.p > 0]
        for index, dropout in enumerate(dropouts):
            dropout.index = index
        self._n_dropouts = len(dropouts)
        self.compile_blocks = False
        self.cuda_graph = True
        self._graphs = GraphedCalls("a pass of the flow", required=False)

    @property
    def is_image_flow(self) -> bool:
        """Whether x are images in [−1, 1] that are dequantised."""
        return self.dequantize is not None

    def _check_tensor(self, name: str, value: object) -> None:
        check_tensor(name, value, parameter_dtype(self))

    def _like(self) -> Tensor:
        """What has the dtype and the device of samples: a parameter, else a buffer, else torch's
        defaults."""
        for tensor in chain(self.parameters(), self.buffers()):  # mostly the first of thousands
            if tensor.is_floating_point():
                return tensor
        return torch.empty(0)

    def _check_events(self, name: str, x: Tensor) -> None:
        self._check_tensor(name, x)
        if x.shape[1:] != self.event_shape or x.ndim != len(self.event_shape) + 1:
            raise ValueError(
                f"{name} must have shape (B, {', '.join(map(str, self.event_shape))}), "
                f"got {tuple(x.shape)}"
            )

    def _aux(self, context: Tensor | None, batch: int) -> Tensor | None:
        """The context, checked."""
        if context is None:
            if self.context_dim:
                raise ValueError(f"context must be a tensor (B, {self.context_dim}), got None")
            return None
        if not self.context_dim:
            raise ValueError("context is given to a flow that takes none; make it with context_dim")
        self._check_tensor("context", context)
        if context.shape != (batch, self.context_dim):
            raise ValueError(
                f"context must have shape ({batch}, {self.context_dim}), got {tuple(context.shape)}"
            )
        return context

    def _context(self, aux: Tensor | None) -> Context:
        """Without dropout."""
        # What compiles the whole pass compiles the blocks in it.
        return Context(aux, compiled=self.compile_blocks and not torch.compiler.is_compiling())

    def _dropout_context(
        self, aux: Tensor | None, key: Key | None, x: Tensor, *uses: int
    ) -> Context:
        context = self._context(aux)
        if not (self._n_dropouts and self.training):
            return context
        # Layers count by time steps, so the key's own time is folded into the seed.
        rng = stream(key, *uses, USE_DROPOUT, device=x.device, fold_time=True, batch=x.shape[0])
        if context.compiled:
            rng = _rng_by_layer(rng, self._n_dropouts)
        return replace(context, dropout_rng=rng)

    def call_and_ladj(
        self,
        x: Tensor,
        *,
        key: Key | None = None,
        eps: Tensor | None = None,
        context: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Data → latent.

        Args:
            x: (B, *event_shape); for an image flow in [−1, 1], else ValueError on the CPU and a
                row of NaN elsewhere (looking would wait for the device).
            key: draws the dequantisation noise and dropout.
            eps: the dequantisation noise itself, shape of x.
            context: (B, context_dim), for a flow with ``context_dim``.

        Returns:
            z, shape of x, and ladj (B,), which includes dequantiser and logit map.
        """
        self._check_events("x", x)
        key = self._key_for(key, eps)
        inner = self._dropout_context(self._aux(context, x.shape[0]), key, x)
        if self.dequantize is None or self.logit is None:
            if eps is not None:
                raise ValueError("eps is the noise of a dequantiser, and this flow has none")
            with self._forward_pass():
                return call_and_ladj(self.transform, x, inner, recompute=self.recompute)
        if eps is None:
            rng = stream(key, USE_DEQUANTIZE, device=x.device, batch=x.shape[0])
            eps = self.dequantize.draw(x, rng)
        else:
            self._check_tensor("eps", eps)
            if eps.shape != x.shape:
                raise ValueError(
                    f"eps must have the shape of x, {tuple(x.shape)}, got {tuple(eps.shape)}"
                )
        x = _in_range(x)
        with self._forward_pass():
            v, ladj_dequantize = self.dequantize.call_and_ladj((x + 1) / 2, eps, inner)
            y, ladj_logit = self.logit.call_and_ladj(v)
            z, ladj = call_and_ladj(self.transform, y, inner, recompute=self.recompute)
        return z, ladj + ladj_logit + ladj_dequantize

    def _key_for(self, key: Key | None, eps: Tensor | None, samples: bool = False) -> Key | None:
        """``key``; for None one from torch's generator, drawn once a call, where the call draws
        from it at all."""
        if key is not None:
            return Key.or_default(key)
        dequantizes = self.dequantize is not None and eps is None
        drops = self.training and self._n_dropouts > 0
        if torch.compiler.is_compiling() or not (samples or dequantizes or drops):
            return None
        return Key.from_default_generator()

    def _forward_pass(self) -> AbstractContextManager[None]:
        """For which all layers are folded together, before it begins; not where ``recompute``
        keeps no more than a layer's at a time."""
        by_layer = self.recompute and torch.is_grad_enabled()
        return nullcontext() if by_layer else folding(self, inverse=False)

    def _inverse_pass(self) -> AbstractContextManager[None]:
        return folding(self.transform)

    def inverse_and_ladj(
        self, z: Tensor, *, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Latent → data; for an image flow y **before** the final sigmoid, see :meth:`to_data`."""
        self._check_events("z", z)
        inner = self._context(self._aux(context, z.shape[0]))
        with self._inverse_pass():
            return self.transform.inverse_and_ladj(z, inner)

    def to_data(self, y: Tensor) -> Tensor:
        """What ``inverse_and_ladj`` returned → x, as in ``sample``; images lie in [−1, 1]."""
        if self.logit is None or self.dequantize is None:
            return y
        if self.legacy_contrast:
            return torch.tanh(y / 2)
        v = self.logit.inverse(y)
        if self.round_samples:
            v = self.dequantize.round(v)
        return (2 * v - 1).clamp(-1, 1)

    def log_prob(
        self,
        x: Tensor,
        *,
        key: Key | None = None,
        eps: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """log p(x) in nats, (B,); of an image flow the lower bound for the discrete image."""
        self._check_events("x", x)
        key = self._key_for(key, eps)
        given = {"eps": eps, "context": context}
        beside = {name: t for name, t in given.items() if t is not None}
        names = tuple(beside)
        return self._run(
            ("log_prob", names),
            partial(self._log_prob, names),
            x.shape[0],
            key,
            x,
            *beside.values(),
        )

    def _log_prob(
        self, names: Sequence[str], key: Key | None, x: Tensor, *beside: Tensor
    ) -> Tensor:
        z, ladj = self.call_and_ladj(x, key=key, **dict(zip(names, beside, strict=True)))
        wide = z if z.dtype == torch.float64 else z.float()
        log_prior = -0.5 * (wide.flatten(1).square().sum(1) + self.dim * _LOG_2PI)
        log_cells = 0.0 if self.dequantize is None else self.dim * math.log(self.dequantize.levels)
        return log_prior + ladj - log_cells

    def forward(
        self,
        x: Tensor,
        *,
        key: Key | None = None,
        eps: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """The same as :meth:`log_prob`, so that a wrapper such as DDP can call it."""
        return self.log_prob(x, key=key, eps=eps, context=context)

    def bits_per_dim(
        self,
        x: Tensor,
        *,
        key: Key | None = None,
        eps: Tensor | None = None,
        context: Tensor | None = None,
    ) -> Tensor:
        """−log₂ p(x) / D, averaged over the batch; a scalar tensor."""
        log_prob = self.log_prob(x, key=key, eps=eps, context=context)
        return -log_prob.mean() / (self.dim * math.log(2))

    @torch.no_grad()
    def sample(
        self,
        n: int,
        key: Key | None = None,
        *,
        context: Tensor | None = None,
    ) -> Tensor:
        """n samples, (n, *event_shape), on the parameters' device and in their dtype; ``context``
        has a row for each."""
        n = check_count("n", n, 0)
        key = self._key_for(key, None, samples=True)
        aux = self._aux(context, n)
        given = () if aux is None else (aux,)
        return self._run(("sample", n), partial(self._sample, n), n, key, *given)

    def _sample(self, n: int, key: Key | None, aux: Tensor | None = None) -> Tensor:
        like = self._like()
        rng = stream(key, USE_PRIOR, device=like.device, batch=n)
        z = ops.normal((n, *self.event_shape), rng, dtype=like.dtype)
        inner = self._context(aux)
        if self.sampling_dropout:
            inner = self._dropout_context(aux, key, z, USE_PRIOR)
        with self._inverse_pass():
            y, _ = self.transform.inverse_and_ladj(z, inner)
        return self.to_data(y)

    def _run(
        self,
        name: Hashable,
        function: Callable[..., Tensor],
        batch: int,
        key: Key | None,
        *tensors: Tensor,
    ) -> Tensor:
        """``function(key, *tensors)``, by a CUDA graph where that is possible and wanted."""
        if torch.compiler.is_compiling() or not self._can_capture(batch):
            return function(key, *tensors)
        # With such a key the pass is part of what somebody else records; what was folded outside
        # of a graph would not be there any more when it is replayed.
        elsewhere = isinstance(key, RecordedKey) or is_folded(self)
        if elsewhere or not all(isinstance(t, Tensor) for t in tensors):
            return function(key, *tensors)
        key = Key(0) if key is None else key  # nothing is drawn
        key.check_batch(batch)
        return self._graphs.call((name, self.compile_blocks), function, self, key, *tensors)

    def _can_capture(self, batch: int) -> bool:
        if not self.cuda_graph or batch == 0 or torch.is_grad_enabled() or is_watched():
            return False
        if parameter_dtype(self) is None:  # a replica, whose weights are no parameters
            return False
        like = self._like()
        return like.is_cuda and not is_capturing(like)

    def folded(self) -> AbstractContextManager[None]:
        """Passes of a frozen flow: what depends on parameters alone is computed once, on entry.

        That is the weights of weight-normed layers, 1×1 convolutions with their inverses, and the
        scales of ActNorms, these two with their log-determinants. Inside, they get no gradients,
        and a change of them is not seen, but for an ActNorm that starts there.

        The flow itself is not changed: what was computed is used by this flow's layers in this
        thread (or asyncio task) alone. Another thread may train the same flow meanwhile; this one
        then sees its new biases and other parameters, but the folded ones of the moment of entry.
        A compiled graph does without. Inside, no CUDA graph is captured or replayed.

        Outside, each pass computes them for itself, all together before it begins.
        """
        return folding(self, frozen=True)

    @torch.no_grad()
    def initialize(
        self,
        x: Tensor,
        *,
        key: Key | None = None,
        eps: Tensor | None = None,
        context: Tensor | None = None,
    ) -> None:
        """Data-dependent initialisation of every ActNorm that has not seen data, from batch x.

        Raises:
            ValueError: for a batch that is not finite, or with fewer than two values per channel.
        """
        with in_mode(self, training=True):
            self.call_and_ladj(x, key=key, eps=eps, context=context)


def _rng_by_layer(rng: Tensor, layers: int) -> Tensor:
    """(layers, 3): rng at the time of each layer. A row begins at a multiple of 16 bytes, as
    compiled code has it."""
    rows = rng.new_zeros(layers, 4)
    rows[:, :3] = rng
    rows[:, 1] += torch.arange(layers, device=rng.device)
    return rows[:, :3]


def _in_range(x: Tensor) -> Tensor:
    """x where it lies in [−1, 1], NaN elsewhere; on the CPU a ValueError instead."""
    inside = x.abs() <= 1
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        try:
            torch._assert_async(inside.all())
        except RuntimeError:
            low, high = x.min().item(), x.max().item()
            raise ValueError(
                f"images must lie in [-1, 1], got values from {low:g} to {high:g}"
            ) from None
    return torch.where(inside, x, torch.nan)
