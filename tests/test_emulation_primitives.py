"""The emulation itself: its primitives do what the CUDA manual says, as elementary functions do for
special values, and errors are named."""

from __future__ import annotations

import re

import pytest
from cuda_emulation import harness

pytestmark = pytest.mark.timeout(1200)  # the first test compiles


@pytest.fixture(scope="module")
def emulation() -> harness.Emulation:
    return harness.load()


@pytest.mark.parametrize(
    "name",
    [
        "shuffles",
        "votes",
        "exchange_in_the_warp",
        "exchange_in_the_block",
        "exchange_in_dynamic_memory",
        "elementary_functions",
        "matrix_products",
    ],
)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_primitive(emulation: harness.Emulation, name: str, order: int) -> None:
    with emulation.settings(order=order):
        assert emulation.primitive(name) == ""


def test_primitive_indices_visit_each_thread_once(emulation: harness.Emulation) -> None:
    for order in (0, 1):
        with emulation.settings(order=order):
            assert emulation.wrong_visits() == 0


@pytest.mark.parametrize(
    ("name", "signs"),
    [
        (
            "two_barriers",
            ("__syncthreads at primitives.cpp", "not reached by thread (32, 0, 0)"),
        ),
        ("shuffle_from_outside", ("reads from a lane outside its mask at primitives.cpp",)),
        ("shuffle_of_three", ("width is not a power of two", "primitives.cpp")),
        (
            "matrix_not_on_16_bytes",
            ("ldmatrix reads a row that does not begin on 16 bytes at primitives.cpp",),
        ),
        ("product_of_half_a_warp", ("mma at primitives.cpp", "thread (16, 0, 0), which has")),
        ("warp_not_complete", ("__syncwarp at", "thread (40, 0, 0), which has finished")),
    ],
)
def test_primitive_error(emulation: harness.Emulation, name: str, signs: tuple[str, ...]) -> None:
    report = emulation.primitive(name)
    assert report.startswith("cuda_emulation: block (0, 0, 0), thread (")
    assert not [sign for sign in signs if sign not in report], report
    assert emulation.primitive("exchange_in_the_block") == ""  # the next launch starts anew


@pytest.mark.parametrize("name", ["race_in_the_block", "race_in_dynamic_memory"])
def test_primitive_race_is_reported_with_both_places(
    emulation: harness.Emulation, name: str
) -> None:
    if "checked" not in str(emulation.library):
        pytest.skip("this build has no race check")
    report = emulation.primitive(name)
    assert "with no barrier between them" in report
    places = re.findall(rf"{name}\(\) at \S*primitives.cpp:(\d+)", report)
    assert len(places) == 2, report


def test_primitive_unwritten_memory_is_reported(emulation: harness.Emulation) -> None:
    if "checked" not in str(emulation.library):
        pytest.skip("this build has no race check")
    report = emulation.primitive("dynamic_memory_unwritten")
    assert "reads shared memory that no thread of its block has written" in report
    assert "dynamic_memory_unwritten() at " in report
