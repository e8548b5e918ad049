"""The resource report's reading of a disassembly, and what it must say of our kernels."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import coopflow_ext as cf
from coopflow_ext import _extension

sass_report = pytest.importorskip("sass_report", reason="needs the source tree's benchmarks/")

RESOURCES = """
Fatbin elf code:
arch = sm_90
 Function _Z5scaleIfLi4EEvPfl:
  REG:32 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:552 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
# Two nested loops, 0x20-0x80 and 0x30-0x60; the inner one stores 16 bytes in 4 instructions.
SASS = """
	code for sm_90
		Function : _Z5scaleIfLi4EEvPfl
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/              @!P0 STL.64 [R1], R2 ;           /* 0x0 */
        /*0020*/                   LDG.E R4, [R2.64] ;         /* 0x0 */
        /*0030*/                   LDG.E.128 R4, [R2.64] ;     /* 0x0 */
        /*0040*/                   FMUL R4, R4, 2 ;            /* 0x0 */
        /*0050*/              @P1  STG.E.128 [R2.64], R4 ;     /* 0x0 */
        /*0060*/             @!P2  BRA 0x30 ;                  /* 0x0 */
        /*0070*/                   STG.E.U16 [R2.64], R4 ;     /* 0x0 */
        /*0080*/              @P3  BRA 0x20 ;                  /* 0x0 */
        /*0090*/                   EXIT ;                      /* 0x0 */
        /*00a0*/                   BRA 0xa0;                   /* 0x0 */
"""


def test_reads_a_disassembly(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"-res-usage": RESOURCES, "-sass": SASS}
    monkeypatch.setattr(
        sass_report, "disassemble", lambda _library, option: iter(texts[option].splitlines())
    )
    (kernel,) = sass_report.read_kernels(Path("any.so"))
    assert kernel.facts() == {
        "kernel": "scale<float, 4>",
        "arch": "sm_90",
        "registers": 32,
        "stack_bytes": 16,
        "spill_instructions": 1,
        "loads": 2,
        "loads_16_bytes": 1,
        "stores": 2,
        "stores_16_bytes": 1,
        "instructions": 11,
        "loop_instructions": 4,
        "instructions_per_element": 1.0,
        "instructions_per_evaluation": None,
    }
    assert "scale<float, 4>" in sass_report.table([kernel])


@pytest.mark.parametrize(
    ("symbol", "size"),
    [
        ("_Z5scaleIfLi4EEvPfl", 4),
        ("_Z5scaleIdLi2EEvPdl", 8),
        ("_Z5scaleIN8coopflow8bfloat16ELi8EEvPT_l", 2),
        ("_Z5scaleIN8coopflow7float16ELi8EEvPT_l", 2),
        ("not_mangled", None),
    ],
)
def test_element_size_is_the_first_template_argument(symbol: str, size: int | None) -> None:
    assert sass_report.Kernel(symbol, "sm_90").item_bytes == size


@pytest.fixture(params=["sm_90", pytest.param("sm_80", marks=pytest.mark.slow)])
def arch(request: pytest.FixtureRequest) -> str:
    """Half a minute each to disassemble."""
    return str(request.param)


@pytest.fixture
def kernels(arch: str) -> list[Any]:
    """The kernels of the library under test; skips where there is nothing to read."""
    try:
        found = sass_report.read_kernels(_extension.library_path(), arch)
    except sass_report.ToolMissingError as error:
        pytest.skip(str(error))
    if not found:
        pytest.skip(f"the native library was built without machine code for {arch}")
    return list(found)


def _named(kernels: list[Any], pattern: str) -> list[Any]:
    found = [kernel for kernel in kernels if kernel.name.startswith(pattern)]
    assert found, f"no kernel {pattern}"
    return found


LIMITS = Path(__file__).parent / "data" / "sass_limits.json"


def _kernel(**facts: int) -> Any:
    """A kernel whose facts are these."""

    class Fake(sass_report.Kernel):  # type: ignore[misc, name-defined]
        def facts(self) -> dict[str, object]:
            return {"registers": 32, "stores_16_bytes": 1} | facts

    return Fake(symbol="_Z5scaleIfLi4EEvPfl", arch="sm_90")


def test_worse_names_what_grew_what_shrank_and_what_is_new() -> None:
    committed = sass_report.limits([_kernel()])
    assert sass_report.worse([_kernel()], committed) == []
    assert sass_report.worse([_kernel(registers=31, stores_16_bytes=2)], committed) == []
    assert sass_report.worse([_kernel(registers=33, stores_16_bytes=0)], committed) == [
        "sm_90 scale<float, 4>: registers is 33, was 32",
        "sm_90 scale<float, 4>: stores_16_bytes is 0, was 1",
    ]
    other = {"sm_90 other<float>": {"registers": 32}}
    assert sass_report.worse([_kernel()], other) == ["sm_90 scale<float, 4>: has no limits yet"]


def test_worse_leaves_out_architectures_without_limits() -> None:
    assert sass_report.worse([_kernel()], {"sm_80 scale<float, 4>": {"registers": 1}}) == []


def test_no_kernel_is_worse_than_its_limits(kernels: list[Any]) -> None:
    """`sass_report.py --write-limits` renews them; say in the commit why a kernel got worse."""
    committed = json.loads(LIMITS.read_text())
    compiler = sass_report.cuda_version(_extension.library_path())
    if compiler != committed["cuda_version"]:
        pytest.skip(
            f"the limits are those of nvcc {committed['cuda_version']}; this library was built "
            f"with {compiler}"
        )
    assert sass_report.worse(kernels, committed["limits"]) == []


def test_no_count_of_a_kernel_grew(arch: str) -> None:
    counts = pytest.importorskip("instruction_counts")
    try:
        assert counts.compare("cuda", lambda: counts.count_cuda(arch)) == []
    except counts.CannotCountError as error:
        pytest.skip(str(error))


def _arrays_of_a_chain(name: str) -> int:
    """Bytes of local memory that a kernel is meant to have: a thread's chain, whose length the
    compiler does not know, as state, gradient and noise, and a reference beside them; or as state
    and proposal with their gradients."""
    match = re.match(
        r"analytic_(?:chain_kernel<.*, (true|false), 0l?|mala_kernel<.*), (float|double)>", name
    )
    if match is None:
        return 0
    arrays = 3 if match[1] == "true" else 4
    return arrays * cf.ops.MOST_ELEMENTS_ON_CUDA * (4 if match[2] == "float" else 8)


def test_no_kernel_spills_or_has_a_stack_frame(kernels: list[Any]) -> None:
    wasteful = [
        (kernel.arch, kernel.name, kernel.stack_bytes)
        for kernel in kernels
        if (kernel.stack_bytes or kernel.count("LDL", "STL"))
        and kernel.stack_bytes != _arrays_of_a_chain(kernel.name)
    ]
    assert not wasteful


@pytest.mark.parametrize("dtype_and_width", ["float, 4", "bfloat16, 8", "float16, 8", "double, 4"])
def test_aligned_langevin_update_moves_16_bytes_at_a_time(
    kernels: list[Any], dtype_and_width: str
) -> None:
    for kernel in _named(kernels, f"langevin_step_kernel<{dtype_and_width}, false"):
        facts = kernel.facts()
        assert facts["loads_16_bytes"] >= 2  # x and grad
        assert facts["stores_16_bytes"] == facts["stores"]


@pytest.mark.parametrize("dtype_and_width", ["float, 4", "bfloat16, 8"])
def test_plain_langevin_update_stays_memory_bound(kernels: list[Any], dtype_and_width: str) -> None:
    """On an H200 fewer than 47 instructions per bfloat16 element hide behind its memory traffic."""
    for kernel in _named(kernels, f"langevin_step_kernel<{dtype_and_width}, false"):
        assert kernel.instructions_per_element <= 40, (kernel.arch, kernel.name)


def _mixtures(kernels: list[Any], dtype: str) -> list[Any]:
    """Forward, inverse and backward with 32 components."""
    return _named(kernels, f"mixture_coupling_kernel<{dtype}, 32,") + _named(
        kernels, f"mixture_coupling_backward_kernel<{dtype}, 32,"
    )


@pytest.mark.parametrize("dtype", ["float", "bfloat16", "float16"])
def test_mixture_kernels_with_32_components_leave_room_for_16_warps(
    kernels: list[Any], dtype: str
) -> None:
    """A quarter of those that fit on sm_90; 222 registers had let in an eighth."""
    for kernel in _mixtures(kernels, dtype):
        assert kernel.registers <= 128, (kernel.arch, kernel.name)
        assert not kernel.stack_bytes, (kernel.arch, kernel.name)


@pytest.mark.parametrize("dtype", ["float", "bfloat16", "float16"])
def test_mixture_backward_reads_nothing_between_its_writes(kernels: list[Any], dtype: str) -> None:
    """The gradients of 16 components in registers, three writes each, wait for no read."""
    for kernel in _named(kernels, f"mixture_coupling_backward_kernel<{dtype}, 32,"):
        memory = "".join(
            "r" if i.is_a("LDG", "LD") else "w"
            for i in kernel.instructions
            if i.is_a("LDG", "LD", "STG", "ST")
        )
        assert "w" * 48 in memory, (kernel.arch, kernel.name)


@pytest.mark.parametrize("dtype", ["float", "bfloat16", "float16"])
def test_mixture_inverse_with_32_components_is_arithmetic_alone(
    kernels: list[Any], dtype: str
) -> None:
    """One thread took 499 instructions; two share the components, not the search."""
    for kernel in _named(kernels, f"mixture_coupling_kernel<{dtype}, 32, 2, true>"):
        assert 32 * 10 < kernel.instructions_per_evaluation <= 1.12 * 499, (
            kernel.arch, kernel.name,
        )  # fmt: skip


def test_the_shortest_way_skips_what_a_branch_jumps_over() -> None:
    block = [
        sass_report.Instruction(0x10, "FADD", "R0, R1"),
        sass_report.Instruction(0x20, "BRA", " 0x50", guarded=True),
        sass_report.Instruction(0x30, "FMUL", "R0, R1"),
        sass_report.Instruction(0x40, "BRA", " 0x60"),
        sass_report.Instruction(0x50, "FADD", "R0, R1"),
        sass_report.Instruction(0x60, "FADD", "R0, R1"),
        sass_report.Instruction(0x70, "BRA", " P3, 0x10"),
    ]
    assert sass_report.shortest_way(block) == 5
