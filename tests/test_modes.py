"""torch's modes as the package sets them for a while: what they are inside, and that they are the
caller's again afterwards, also after an error."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
from torch.nn import functional

from coopflow_ext._modes import seeded, training_modes, usual_modes, usual_tensors
from coopflow_ext.autocast import (
    as_it_is,
    autocast_dtype,
    autocast_is_on,
    float32_precision,
    full_precision,
    in_precision,
    tensor_float32,
    uncached_casts,
)

Context = Callable[[], AbstractContextManager[Any]]


@pytest.fixture
def doubles() -> Iterator[None]:
    """The caller's default."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("context", [usual_tensors, training_modes, usual_modes])
@pytest.mark.parametrize("caller", [torch.inference_mode, torch.no_grad])
def test_modes_are_the_caller_s_again_after_an_error(context: Context, caller: Context) -> None:
    with caller(), torch.autocast("cpu", torch.bfloat16):
        before = torch.is_inference_mode_enabled()
        with suppress(OSError), context():
            assert torch.get_default_dtype() == torch.float32
            assert not torch.zeros(1).is_inference()
            if context is not usual_tensors:
                assert torch.is_grad_enabled()
                assert not torch.is_autocast_enabled("cpu")
            raise OSError("boom")
        assert torch.get_default_dtype() == torch.float64
        assert torch.is_inference_mode_enabled() == before
        assert not torch.is_grad_enabled()
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
def test_training_is_in_full_precision_on_either_device() -> None:
    torch.set_autocast_enabled("cuda", True)  # torch.autocast would not, without a GPU
    try:
        with training_modes():
            assert not torch.is_autocast_enabled("cuda")
        assert torch.is_autocast_enabled("cuda")
    finally:
        torch.set_autocast_enabled("cuda", False)


def test_another_default_device_is_named() -> None:
    entered = usual_modes()(lambda: None)
    with torch.device("meta"), pytest.raises(ValueError, match="to be the CPU, got meta"):
        entered()


def test_draws_begin_at_the_seed_and_the_caller_s_go_on() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(7)
    after = torch.rand(4)
    torch.manual_seed(7)
    with suppress(OSError), seeded(3):
        assert torch.equal(torch.rand(4), expected)
        raise OSError("boom")
    assert torch.equal(torch.rand(4), after)


def test_threads_wait_for_one_another_where_the_seed_is_set() -> None:
    entered = threading.Event()

    def other() -> None:
        with seeded(1):
            entered.set()

    thread = threading.Thread(target=other)
    with seeded(0):
        thread.start()
        assert not entered.wait(0.1)
    thread.join(60)
    assert entered.is_set()


@pytest.mark.parametrize("breaks", [False, True])
def test_casts_of_weights_do_not_outlive_a_pass(breaks: bool) -> None:
    """The caller's autocast goes on; the weights may change meanwhile."""
    x, weight = torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        with suppress(OSError), in_precision("bfloat16", "cpu"):
            assert functional.linear(x, weight).dtype == torch.bfloat16
            if breaks:
                raise OSError("boom")
        with torch.no_grad():
            weight.mul_(3)
        assert functional.linear(x, weight).item() == 6
        with in_precision("float32", "cpu"):
            assert functional.linear(x, weight).dtype == torch.float32


def test_uncached_casts_follow_the_weights() -> None:
    """Also in further autocasts inside."""
    x, weight = torch.ones(1, 2), torch.ones(1, 2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), uncached_casts("cpu"):
        inner = torch.autocast("cpu", torch.bfloat16)  # it takes the setting from here
        with inner:
            functional.linear(x, weight)
            with torch.no_grad():
                weight.mul_(3)
            assert functional.linear(x, weight).item() == 6
    with uncached_casts("cpu"):
        assert not torch.is_autocast_enabled("cpu")


def test_the_dtype_of_products() -> None:
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert autocast_is_on("cpu") == enabled
            assert not autocast_is_on("meta")
            low = torch.bfloat16 if enabled else torch.float32
            assert autocast_dtype(torch.zeros(1)) == low
            for dtype in (torch.float64, torch.float16):
                assert autocast_dtype(torch.zeros(1, dtype=dtype)) == dtype
            with full_precision("cpu"):
                assert autocast_dtype(torch.zeros(1)) == torch.float32


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("cached", [False, True])
def test_an_autocast_entered_again_is_the_one_it_was(enabled: bool, cached: bool) -> None:
    with torch.autocast("cpu", torch.float16, enabled=enabled, cache_enabled=cached):
        again, without = as_it_is("cpu"), as_it_is("cpu", keeps_casts=False)
    for other in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=other):
            with again():
                assert torch.is_autocast_enabled("cpu") == enabled
                assert torch.get_autocast_dtype("cpu") == torch.float16
                assert torch.is_autocast_cache_enabled() == cached
            with without():
                assert not torch.is_autocast_cache_enabled()
    with as_it_is("meta")():
        pass


@pytest.fixture
def tf32_flags() -> Iterator[tuple[Any, ...]]:
    """What has the flag, which is as it was afterwards."""
    backends = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [backend.allow_tf32 for backend in backends]
    yield backends
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


@pytest.mark.parametrize("mine", [False, True])
@pytest.mark.parametrize("allowed", [False, True, None])
def test_tensor_float32_is_the_caller_s_again_after_an_error(
    tf32_flags: tuple[Any, ...], mine: bool, allowed: bool | None
) -> None:
    for backend in tf32_flags:
        backend.allow_tf32 = mine
    before = float32_precision()
    with suppress(OSError), tensor_float32(allowed):
        inside = mine if allowed is None else allowed
        assert [backend.allow_tf32 for backend in tf32_flags] == [inside] * 2
        raise OSError("boom")
    assert [backend.allow_tf32 for backend in tf32_flags] == [mine] * 2
    assert float32_precision() == before


def test_a_setting_that_follows_the_one_for_all_still_does_so(tf32_flags: tuple[Any, ...]) -> None:
    matmul, before = torch.backends.cuda.matmul, torch.backends.fp32_precision
    matmul.fp32_precision = "none"
    with tensor_float32(True):
        assert matmul.fp32_precision == "tf32"
    assert matmul.fp32_precision == "none"
    try:
        torch.backends.fp32_precision = "tf32"
        assert matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = before
