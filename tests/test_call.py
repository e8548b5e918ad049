"""Which exception a failed check of an op's arguments becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from coopflow_ext import ops, reference
from coopflow_ext.errors import BuildError
from coopflow_ext.ops._call import argument_error, coopflow

RNG = torch.zeros(3, dtype=torch.int64)


def raised(*args: Any, **kwargs: Any) -> RuntimeError:
    """The error of the raw op ``normal_``."""
    with pytest.raises(RuntimeError) as caught:
        coopflow.normal_(*args, **kwargs)
    return caught.value


@pytest.mark.parametrize(
    ("args", "kwargs", "kind", "text"),
    [
        # our checks
        ((torch.ones(3).int(), RNG), {}, TypeError, "coopflow::normal_: out: must have dtype "),
        ((None, RNG), {}, TypeError, "coopflow::normal_: out: must be a tensor, got None"),
        ((torch.ones(()), RNG), {}, ValueError, "coopflow::normal_: out: must have a batch "),
        ((torch.ones(3), RNG), {"step": -1}, ValueError, "coopflow::normal_: step: must be in "),
        # torch's, of the schema
        ((3, RNG), {}, TypeError, "coopflow::normal_() Expected a value of type 'Tensor'"),
        ((torch.ones(3), RNG), {"step": 0.5}, TypeError, "coopflow::normal_() Expected a value"),
        ((torch.ones(3),), {}, TypeError, "coopflow::normal_() is missing value for argument"),
        ((torch.ones(3), RNG), {"step": 2**70}, ValueError, "coopflow::normal_() Expected a value"),
        # torch's, of the back end
        ((torch.ones(3).to_sparse(), RNG), {}, ValueError, "tensors must be dense and on a device"),
    ],
)
def test_the_kind_of_an_argument_error(
    args: tuple[Any, ...], kwargs: dict[str, Any], kind: type[Exception], text: str
) -> None:
    error = argument_error(raised(*args, **kwargs))
    assert type(error) is kind
    assert str(error).startswith(text)
    assert "\n" not in str(error)


@pytest.mark.parametrize("text", ["must have dtype x", "must be a tensor", "Expected a value"])
def test_the_words_of_a_message_do_not_tell_its_kind(text: str) -> None:
    error = argument_error(RuntimeError(f"coopflow::normal_: out: {text}"))
    assert type(error) is ValueError


def test_a_library_that_cannot_compute_here_is_a_build_error() -> None:
    error = argument_error(RuntimeError("BuildError: coopflow: the driver\nwhere it was thrown"))
    assert type(error) is BuildError
    assert str(error) == "coopflow: the driver"


@pytest.mark.parametrize(
    "text", ["", "coopflow: CUDA error in a kernel launch: out of memory", "TypeError: of another"]
)
def test_other_errors_stay_as_they_are(text: str) -> None:
    error = RuntimeError(text)
    assert argument_error(error) is error


def test_without_gradients_inside_of_a_transform() -> None:
    """Where an op skips torch's autograd, the transforms of torch.func still find it."""
    x = torch.linspace(-2, 2, 24).view(2, 3, 4)

    def gradients(op: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        def loss(x: Tensor) -> Tensor:
            with torch.no_grad():
                factors = op(x)
            return (factors * op(x)).sum()

        once = torch.func.grad(loss)
        return once(x), torch.func.grad(lambda x: once(x).square().sum())(x)

    torch.testing.assert_close(gradients(ops.concat_elu), gradients(reference.concat_elu))
    with torch.autograd.forward_ad.dual_level(), torch.no_grad():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(RuntimeError, match="jvp"):
            ops.concat_elu(dual)


def test_without_gradients_inside_of_two_transforms() -> None:
    """The outer one is found behind the inner one."""

    def loss(x: Tensor) -> Tensor:
        with torch.no_grad():
            factors = ops.concat_elu(x)
        return (factors[:, : x.shape[1]] * x).sum()

    x = torch.linspace(-2, 2, 24).view(2, 3, 4)
    torch.func.grad(loss)(x)
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(torch.func.grad(loss))(torch.stack((x, x)))
