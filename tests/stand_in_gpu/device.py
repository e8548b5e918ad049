"""What the stand-in GPU computes: torch's CUDA operators, and this project's, by those of the CPU
on the same bytes; in a capture they are noted too, and a replay does them again.

The memory of a graph is that of its capture, by address: a replay reads and writes what lies there
then, whatever tensors have been freed or have taken the place of others since. What a capture wrote
to memory that was there before is undone at its end, as a GPU would not have written it.
"""

from __future__ import annotations

import ctypes
import itertools
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

CUDA = torch.device("cuda", 0)
_Work = Callable[[], None]

# They only look at memory, or allocate it: theirs for CUDA are right.
METADATA = {
    f"aten::{name}"
    for name in (
        "alias", "as_strided", "detach", "empty.memory_format", "empty_strided", "is_pinned",
        "is_set_to", "record_stream", "_reshape_alias", "resize_", "set_",
        "set_.source_Storage", "set_.source_Storage_storage_offset", "set_.source_Tensor",
        "set_.source_Tensor_storage_offset", "t", "unfold", "view", "view_as_complex",
        "view_as_real", "_pin_memory", "_fused_sdp_choice",
    )
}  # fmt: skip
# They wait for the device, because a shape or an answer depends on what lies in memory.
WAITING = {
    f"aten::{name}"
    for name in (
        "_unique2", "bincount", "equal", "histc", "masked_select", "nonzero",
        "repeat_interleave.Tensor", "unique_consecutive", "unique_dim",
    )
}  # fmt: skip
# Composites of torch that would choose among libraries by the device.
CHOOSING = {"aten::convolution", "aten::convolution_backward"}
# They take tensors of the host beside those of the device.
OF_BOTH_PLACES = ("copy", "index", "_foreach", "_fused_adam", "coopflow::")


class Runtime:
    """The preloaded runtime.cpp; raises AttributeError where it is not."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(None)
        self._library.stand_in_capture_of.restype = ctypes.c_ulonglong
        self._library.stand_in_capture_of.argtypes = [ctypes.c_void_p]
        self._library.stand_in_launches.restype = ctypes.c_long

    def capture(self) -> int:
        """The capture of the current stream; 0 where it is not captured."""
        stream = torch._C._cuda_getCurrentRawStream(0)
        return int(self._library.stand_in_capture_of(stream))

    def launches(self) -> int:
        """Of kernels that nothing stands in for."""
        return int(self._library.stand_in_launches())

    def on_replay(self, function: Callable[[int], None]) -> None:
        self._callback = ctypes.CFUNCTYPE(None, ctypes.c_ulonglong)(function)
        self._library.stand_in_on_replay(self._callback)


class StandIn:
    """The device of this process.

    Attributes:
        errors: of replays, which a driver's call cannot raise.
    """

    def __init__(self) -> None:
        self.runtime = Runtime()
        self.errors: list[BaseException] = []
        self._graphs: dict[int, list[_Work]] = defaultdict(list)
        self._before_capture: dict[int, bytes] = {}  # by address
        self._bound: dict[int, dict[str, Any]] = {}
        self._numbers = itertools.count(1 << 40)  # apart from those of the CPU
        self._libraries: list[torch.library.Library] = []
        self.runtime.on_replay(self._replay)

    def install(self) -> None:
        """Take the place of every CUDA operator that a CPU has too."""
        torch.backends.cudnn.enabled = False
        for kind in ("flash", "mem_efficient", "cudnn"):  # attention from products
            getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
        end = torch.cuda.CUDAGraph.capture_end

        def capture_end(graph: torch.cuda.CUDAGraph) -> None:
            try:
                end(graph)
            finally:
                self._undo_the_capture()

        torch.cuda.CUDAGraph.capture_end = capture_end  # type: ignore[method-assign]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*[Oo]verriding")
            own = {"copy_": self._copy, "_local_scalar_dense": self._item}
            self._redirect_all("aten", own)
            bound = {"langevin_bind": self._bind, "langevin_bound_step_": self._bound_step}
            self._redirect_all("coopflow", bound)
            self._libraries[-1].impl("langevin_unbind", self._unbind, "CompositeExplicitAutograd")

    def _redirect_all(self, namespace: str, own: dict[str, Callable[..., Any]]) -> None:
        library = torch.library.Library(namespace, "IMPL")
        self._libraries.append(library)  # which takes its kernels back when it goes
        for name, kernel in own.items():
            library.impl(name, kernel, "CUDA")
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        for full in torch._C._dispatch_get_all_op_names():
            found, _, name = full.partition("::")
            on_cuda = has_kernel(full, "CUDA")
            if found != namespace or full in METADATA or not (on_cuda or full in CHOOSING):
                continue
            if name in own or not (
                has_kernel(full, "CPU") or has_kernel(full, "CompositeExplicitAutograd")
            ):
                continue
            packet, _, overload = name.partition(".")
            op = getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")
            library.impl(name, _Redirected(self, full, op), "CUDA")

    # --- captures ---------------------------------------------------------------------------------

    def note(self, work: _Work) -> None:
        """``work`` belongs to the graph that is captured."""
        self._graphs[self.runtime.capture()].append(work)

    def will_write(self, tensors: list[Tensor]) -> None:
        """In a capture, at whose end they have to be what they are now."""
        for t in tensors:
            storage = t.untyped_storage()
            if t.is_cuda and storage.nbytes() and storage.data_ptr() not in self._before_capture:
                before = ctypes.string_at(storage.data_ptr(), storage.nbytes())
                self._before_capture[storage.data_ptr()] = before

    def _undo_the_capture(self) -> None:
        for address, before in self._before_capture.items():
            ctypes.memmove(address, before, len(before))
        self._before_capture.clear()

    def _replay(self, graph: int) -> None:
        try:
            with torch.no_grad():
                for work in self._graphs[graph]:
                    work()
        except BaseException as error:
            traceback.print_exc()
            self.errors.append(error)

    def wait(self, what: str) -> None:
        """The host waits for the device: refused in a capture, and by torch's debug mode."""
        if self.runtime.capture():
            torch.cuda.current_stream().synchronize()  # raises, and the capture is lost
        mode = torch.cuda.get_sync_debug_mode()
        if mode == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        if mode == 1:
            warnings.warn(f"called a synchronizing CUDA operation: {what}", stacklevel=2)

    # --- operators that move values between host and device ---------------------------------------

    def _copy(self, x: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if x.is_cuda != source.is_cuda:
            host = source if x.is_cuda else x
            if not non_blocking or (self.runtime.capture() and not host.is_pinned()):
                self.wait("aten::copy_")
        to, there = on_host(x), on_host(source)
        if self.runtime.capture():
            # Pinned memory is read at each replay.
            read = there if source.is_cuda or source.is_pinned() else there.clone()
            self.will_write([x])
            self.note(lambda: _ignore(to.copy_(read)))
        to.copy_(there)
        return x

    def _item(self, x: Tensor) -> Any:
        self.wait("aten::_local_scalar_dense")
        return on_host(x).item()

    # --- bound steps, of which a graph keeps the kernels' arguments alone -----------------------

    def _bind(self, x: Tensor, rng: Tensor, **options: Any) -> int:
        self._bound[number := next(self._numbers)] = {"rng": rng, **options}
        return number

    def _bound_step(self, x: Tensor, grad: Tensor, bound: int, step: int) -> None:
        options = {**self._bound[bound], "step": step}
        for name, at in (("xi", step + (options.get("noise_when") == 1)), ("stats", step)):
            if options.get(name) is not None:
                options[name] = options[name][at]
        torch.ops.coopflow.langevin_step_(x, grad, **options)

    def _unbind(self, bound: int) -> None:
        self._bound.pop(bound, None)


class _Redirected:
    """The kernel of an operator for CUDA tensors: the CPU's, on the same bytes."""

    def __init__(self, device: StandIn, name: str, op: Any) -> None:
        self._device, self._name, self._op = device, name, op
        arguments = op._schema.arguments
        self._written = [a.alias_info is not None and a.alias_info.is_write for a in arguments]
        self._places = {a.name: i for i, a in enumerate(arguments)}
        self._tensors = [i for i, a in enumerate(arguments) if str(a.type) == "Tensor"]
        self._draws = "generator" in self._places

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        capturing = bool(self._device.runtime.capture())
        self._check(args)
        given, spec = tree_flatten((args, kwargs))
        taken = [_taken(a, copy_from_host=capturing) for a in given]
        if self._draws and not capturing:
            _seed_by_the_devices_generator()
        if capturing:
            self._device.will_write(self._to_be_written(args, kwargs))
        found, found_spec = tree_flatten(self._call(taken, spec))
        results: list[Any] = []
        fresh: list[tuple[int, Tensor]] = []
        for i, result in enumerate(found):
            if not isinstance(result, Tensor):
                results.append(result)
                continue
            place = next((j for j, a in enumerate(taken) if a is result), None)
            if place is None:
                new = torch.empty_strided(
                    result.shape, result.stride(), dtype=result.dtype, device=CUDA
                )
                fresh.append((i, on_host(new)))
                fresh[-1][1].copy_(result)
                results.append(new)
                continue
            own = given[place]
            if own.shape != result.shape:  # an out= that was too small
                own.resize_(result.shape)
                taken[place] = on_host(own).copy_(result)
            results.append(own)
        if capturing:
            self._device.note(lambda: self._again(taken, spec, fresh))
        return tree_unflatten(results, found_spec)

    def _again(self, taken: list[Any], spec: Any, fresh: list[tuple[int, Tensor]]) -> None:
        if self._draws:
            _seed_by_the_devices_generator()
        found = tree_leaves(self._call(taken, spec))
        for i, target in fresh:
            target.copy_(found[i])

    def _call(self, taken: list[Any], spec: Any) -> Any:
        args, kwargs = tree_unflatten(taken, spec)
        numbers = (int, float, bool)
        if any(i < len(args) and isinstance(args[i], numbers) for i in self._tensors):
            return self._op.overloadpacket(*args, **kwargs)  # torch gives 0-d tensors as numbers
        return self._op(*args, **kwargs)

    def _check(self, args: tuple[Any, ...]) -> None:
        """What CUDA's operator would refuse."""
        masks = [
            i
            for i in tree_leaves(args[1:2])
            if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8)
        ]
        if self._name in WAITING or (self._name.startswith("aten::index") and masks):
            self._device.wait(self._name)
        devices = {t.device for t in tree_leaves(args) if isinstance(t, Tensor) and t.ndim}
        if len(devices) > 1 and not any(part in self._name for part in OF_BOTH_PLACES):
            raise RuntimeError(
                f"Expected all tensors to be on the same device: {self._name}, {devices}"
            )

    def _to_be_written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        by_place = [*enumerate(args), *((self._places[name], a) for name, a in kwargs.items())]
        return [
            t for i, a in by_place if self._written[i] for t in tree_leaves(a)
            if isinstance(t, Tensor)
        ]  # fmt: skip


def on_host(x: Tensor) -> Tensor:
    """The bytes of a tensor as one of the CPU, which keeps nothing alive."""
    if not x.is_cuda:
        return x
    storage = x.untyped_storage()
    if storage.nbytes() == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
    same = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device("cpu"), storage.nbytes()
    )
    return torch.empty(0, dtype=x.dtype).set_(same, x.storage_offset(), x.shape, x.stride())


def _taken(argument: Any, *, copy_from_host: bool) -> Any:
    """An argument as the CPU's operator takes it; values on the host are read once."""
    if isinstance(argument, Tensor):
        return argument.clone() if copy_from_host and not argument.is_cuda else on_host(argument)
    if isinstance(argument, torch.device) and argument.type == "cuda":
        return torch.device("cpu")
    if isinstance(argument, torch.Generator):
        return None
    return argument


def _seed_by_the_devices_generator() -> None:
    """What is drawn follows from the seed and the offset of the device's generator."""
    generator = torch.cuda.default_generators[0]
    offset = generator.get_offset()
    torch.default_generator.manual_seed(hash((generator.initial_seed(), offset)))
    generator.set_offset(offset + 4)


def _ignore(_: object) -> None:
    pass
