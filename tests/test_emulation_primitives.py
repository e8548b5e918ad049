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


def _skip_without_the_race_check(emulation: harness.Emulation) -> None:
    if "checked" not in str(emulation.library):
        pytest.skip("this build has no race check")


@pytest.mark.parametrize("name", ["race_in_the_block", "race_in_dynamic_memory"])
def test_primitive_race_is_reported_with_both_places(
    emulation: harness.Emulation, name: str
) -> None:
    _skip_without_the_race_check(emulation)
    report = emulation.primitive(name)
    assert "with no barrier between them" in report
    places = re.findall(rf"{name}\(\) at \S*primitives.cpp:(\d+)", report)
    assert len(places) == 2, report


def test_primitive_unwritten_memory_is_reported(emulation: harness.Emulation) -> None:
    _skip_without_the_race_check(emulation)
    report = emulation.primitive("dynamic_memory_unwritten")
    assert "reads shared memory that no thread of its block has written" in report
    assert "dynamic_memory_unwritten() at " in report


@pytest.mark.parametrize(
    ("name", "requests", "passes", "floor"),
    [  # of each of the four warps
        ("neighbouring_words", 1, 1, 1),
        ("every_second_word", 1, 2, 1),
        ("words_of_one_bank", 1, 32, 1),
        ("neighbouring_bytes", 1, 1, 1),
        ("neighbours_of_16_bytes", 1, 4, 4),
        ("every_second_of_16_bytes", 1, 8, 4),
    ],
)
@pytest.mark.parametrize("order", [0, 1])
def test_primitive_bank_conflicts(
    emulation: harness.Emulation, name: str, requests: int, passes: int, floor: int, order: int
) -> None:
    _skip_without_the_race_check(emulation)
    with emulation.settings(order=order), emulation.counted_banks() as counts:
        assert emulation.primitive(name) == ""
    (count,) = counts
    assert count[1:] == (4 * requests, 4 * passes, 4 * floor)
    assert f"{name}() at " in emulation.place(count.instruction)


def test_primitive_bank_conflicts_of_lanes_that_share_a_word(
    emulation: harness.Emulation,
) -> None:
    _skip_without_the_race_check(emulation)
    with emulation.counted_banks() as counts:
        assert emulation.primitive("one_word_for_all") == ""
    assert sorted(count[1:] for count in counts) == [(2, 2, 2), (4, 4, 4)]
    with emulation.counted_banks() as counts:
        pass
    assert counts == []
