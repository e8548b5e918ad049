"""A GPU of ordinary memory, for tests of the host's side of what runs on one; see run.sh.

As a plugin of pytest it is there for the tests, and a test fails in which a kernel was launched
that it does not know, or a replay failed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import coopflow_ext as cf
from stand_in_gpu.device import StandIn

cf.build_info()  # the operators have to be there
device = StandIn()
device.install()


@pytest.fixture(autouse=True)
def _nothing_was_left_out() -> Iterator[None]:
    launches = device.runtime.launches()
    yield
    errors, device.errors[:] = [*device.errors], []
    assert not errors, errors
    assert device.runtime.launches() == launches, "a kernel was launched that has no stand-in"
