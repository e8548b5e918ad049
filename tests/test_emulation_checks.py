"""What the emulation catches: known mistakes, put into copies of our own kernels."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_emulation import explain_missing, harness

pytestmark = pytest.mark.timeout(1200)  # most tests compile

TESTS = Path(__file__).parent
MUTATIONS = TESTS / "cuda_emulation" / "mutations"
# Patch: the build that runs it, the file and case that show it, what the report must say.
CAUGHT = {
    "write_past_the_end": (
        "sanitized", "random_cuda.cu", "random_numbers",
        ("AddressSanitizer: heap-buffer-overflow", "WRITE of size", "store_item", "items.cuh"),
    ),
    "misaligned_access": (
        "sanitized", "random_cuda.cu", "random_numbers",
        ("store to misaligned address", "intrinsics.h"),
    ),
    "pointer_not_checked": (
        "sanitized", "affine_coupling_cuda.cu", "affine_coupling",
        ("misaligned address", "affine_coupling_kernel", "affine_coupling_cuda.cu"),
    ),
    "no_device_guard": (
        "checked", "random_cuda.cu", "random_numbers",
        ("CUDA error in a kernel launch: invalid argument",),
    ),
    "not_the_current_stream": (
        "checked", "random_cuda.cu", "random_numbers",
        ("CUDA error in a kernel launch: invalid argument",),
    ),
    "dropped_barrier": (
        "checked", "affine_coupling_cuda.cu", "affine_coupling",
        ("writes shared memory at", "read at", "reduce.cuh", "no barrier", "block (", "thread ("),
    ),
    "read_before_the_barrier": (
        "checked", "affine_coupling_cuda.cu", "affine_coupling",
        ("reads shared memory that no thread", "reduce.cuh", "block (", "thread ("),
    ),
    "unwritten_tail": ("checked", "random_cuda.cu", "random_numbers", ("(3, 5)", "normal", "nan")),
    "index_of_32_bits": (
        "checked", "random_cuda.cu", "indices", ("ItemCursor::offset is -", "chains of"),
    ),
    "barrier_not_reached": (
        "checked", "affine_coupling_cuda.cu", "affine_coupling",
        ("__syncthreads at reduce.cuh", "is not reached by thread (37, 0, 0)", "block ("),
    ),
    "shuffle_outside_its_mask": (
        "checked", "affine_coupling_cuda.cu", "affine_coupling",
        ("leaves its own lane out of its mask 0x7fffffff", "reduce.cuh", "thread (31, 0, 0)"),
    ),
    "vote_of_one_thread": (
        "checked", "langevin_*.cu", "langevin_frozen",
        ("langevin_frozen, (2, 16)", "tensor(", "is not"),
    ),
    "barrier_after_the_move": (
        "checked", "mlp_cuda.cu", "mlp_chain",
        ("shared memory", "mlp_cuda.cu", "no barrier between them", "block ("),
    ),
    "noise_before_the_acceptance": (
        "checked", "mlp_cuda.cu", "mlp_mala_chain",
        ("shared memory", "mlp_cuda.cu", "no barrier between them", "block ("),
    ),
    "quarters_in_another_order": (
        "checked", "mlp_cuda.cu", "mlp_chain_bfloat16", ("(3, 5)", "(bfloat16): tensor(", "is not"),
    ),
    "table_without_a_barrier": (
        "checked", "analytic_langevin_chain_cuda.cu", "analytic_chains",
        ("reads shared memory that no thread", "analytic_energies.h", "block (", "thread ("),
    ),
    "infinity_hidden": (
        "checked", "mixture_logistic_*.cu", "mixture_logistic_not_finite",
        ("mixture_logistic_coupling_inverse, 3 x torch.float32", ": out: tensor(", "is not"),
    ),
    "search_left_alone": (
        "checked", "mixture_logistic_*.cu", "mixture_logistic_coupling",
        ("__shfl_xor_sync at parts.cuh", "is not reached by thread", "block ("),
    ),
    "mask_of_the_first_channel": (
        "checked", "concat_elu_cuda.cu", "concat_elu",
        ("concat_elu, (3, 5)", "channels_last=False, dropout=True: y: tensor(", "is not"),
    ),
    "parts_without_a_barrier": (
        "checked", "gate_add_norm_cuda.cu", "gate_add_norm_parts",
        ("shared memory", "gate_add_norm_cuda.cu", "no barrier between them", "block ("),
    ),
    "tile_without_a_barrier": (
        "checked", "attention_cuda.cu", "attention_bfloat16",
        ("shared memory", "attention_bfloat16.cuh", "no barrier between them", "block ("),
    ),
    "votes_of_the_wrong_keys": (
        "checked", "attention_cuda.cu", "attention_bfloat16",
        ("attention_bfloat16, ", "k.grad (bfloat16): tensor(", "is not"),
    ),
    "sums_of_one_part": (
        "checked", "mixture_logistic_*.cu", "mixture_logistic_coupling",
        ("32 x torch.float32", "(sum): tensor(", "is not"),
    ),
}  # fmt: skip


def _environment(build: str) -> dict[str, str]:
    paths = os.pathsep.join([str(harness.ROOT), str(TESTS)])
    sanitizer = harness.sanitizer_environment() if build == "sanitized" else {}
    return os.environ | sanitizer | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _mutant(name: str, build: str, kernels: str) -> Path:
    """The library with one patch applied; one build folder serves all, as little recompiles."""
    folder = harness.build_folder().with_name(f"{harness.build_folder().name}-mutants")
    csrc = folder / "csrc"
    patched = folder / "patched" / "csrc"
    shutil.rmtree(patched, ignore_errors=True)
    shutil.copytree(harness.CSRC, patched)
    if name:
        patch = MUTATIONS / f"{name}.patch"
        subprocess.run(
            ["patch", "--quiet", "--strip=1", f"--input={patch}"], cwd=patched.parent, check=True
        )
    for source in patched.rglob("*.*"):  # only what differs, since ninja looks at the dates
        target = csrc / source.relative_to(patched)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.is_file() or target.read_bytes() != source.read_bytes():
            shutil.copy(source, target)
    return harness.build(
        f"coopflow_{build}", csrc=csrc, folder=folder / kernels.replace("*", ""), kernels=kernels
    )


@pytest.mark.parametrize("patch", sorted(MUTATIONS.glob("*.patch")), ids=lambda patch: patch.stem)
def test_mutations_fit_the_sources(patch: Path) -> None:
    """Which run in the long tier alone, and would rot unseen."""
    assert patch.stem in {*CAUGHT, "missing_intrinsic"}
    subprocess.run(
        ["patch", "--dry-run", "--fuzz=0", "--quiet", "--strip=1", f"--input={patch}"],
        cwd=harness.CSRC.parent, check=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CAUGHT)
def test_emulation_catches(name: str) -> None:
    build, kernels, case, signs = CAUGHT[name]
    library = _mutant(name, build, kernels)
    done = subprocess.run(
        [sys.executable, "-m", "cuda_emulation.run_case", str(library), case],
        env=_environment(build), capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = done.stdout + done.stderr
    assert done.returncode != 0, report
    assert not [sign for sign in signs if sign not in report], report


@pytest.mark.slow
def test_emulation_names_what_it_lacks() -> None:
    with pytest.raises(harness.BuildFailedError) as caught:
        _mutant("missing_intrinsic", "checked", "affine_coupling_cuda.cu")
    assert "cuda_emulation: " in str(caught.value)
    assert "__reduce_add_sync is not emulated; declare it in" in str(caught.value)
    assert explain_missing.HEADER in str(caught.value)


def test_every_emulation_mutation_is_tried() -> None:
    patches = {patch.stem for patch in MUTATIONS.glob("*.patch")}
    assert patches == {*CAUGHT, "missing_intrinsic"}


CUDA = sorted((harness.CSRC / "cuda").iterdir())


@pytest.mark.parametrize("file", CUDA, ids=lambda file: file.name)
def test_emulation_knows_each_kernel_by_its_name(file: Path) -> None:
    """What is not named so would be missing among the kernels that the cases must reach."""
    text = re.sub(r"__launch_bounds__\([^()]*\)", "", file.read_text())
    names = re.findall(r"__global__\s+void\s+(\w+)\(", text)
    assert len(names) == text.count("__global__")
    assert not [name for name in names if not name.endswith("_kernel")]


@pytest.mark.parametrize("file", CUDA, ids=lambda file: file.name)
def test_emulation_and_nvcc_compile_the_same_lines(file: Path) -> None:
    """No #if and no assembly in the kernels' files: those belong into coopflow/intrinsics.h. Of two
    headers one hands out dynamic shared memory, which C++ has no words for, and one has what the
    lanes of a warp compute together, which a host can only do where it is an emulated device."""
    text = file.read_text()
    conditions = re.findall(r"^\s*#\s*(?:if|el|endif).*", text, re.MULTILINE)
    apart = ("dynamic_shared.cuh", "warp_matrix.cuh")
    assert len(conditions) == (3 if file.name in apart else 0)
    assert file.name == "warp_matrix.cuh" or not re.findall(r"\basm\b.*", text)


@pytest.mark.parametrize(
    ("source", "missing"),
    [
        ("int f(int* x) { return atomicAdd(x, 1); }", "atomicAdd"),
        ("template <typename T> void f(T*) { __threadfence(); }", "__threadfence"),
        ("void f() { cudaLaunchConfig_t c; c.numAttrs = 1; }", "numAttrs"),
        ("__global__ void f() { extern __shared__ float x[]; }", "extern __shared__ x"),
        ("__constant__ int x;", "__constant__"),
        ("void f() { auto g = cooperative_groups::this_grid(); }", "cooperative_groups"),
        ("#include <cuda_pipeline.h>", "cuda_pipeline.h"),
    ],
)
def test_emulation_explains_a_failed_compile(tmp_path: Path, source: str, missing: str) -> None:
    file = tmp_path / "kernel.cu"
    file.write_text(f"{source}\n")
    include = TESTS / "cuda_emulation" / "include"
    launcher = [sys.executable, explain_missing.__file__, harness.compiler()]
    flags = ["-xc++", "-std=c++17", "-fsyntax-only", f"-I{include}", "-include", "cuda_runtime.h"]
    done = subprocess.run(
        [*launcher, *flags, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert f"cuda_emulation: {file}:1: {missing} is not emulated" in done.stderr
    assert "tests/cuda_emulation/include" in done.stderr


def test_emulation_explains_inline_assembly_and_what_it_does_not_understand() -> None:
    outputs = {
        "k.cu:7:3: error: impossible constraint in ‘asm’": explain_missing.INTRINSICS,
        "k.cu:7: Error: no such instruction: `membar.gl'": explain_missing.INTRINSICS,
        "k.cu:7:3: error: expected primary-expression before ‘<’ token": explain_missing.HEADER,
    }
    for output, file in outputs.items():
        (line,) = explain_missing.explanations(output)
        assert line.startswith("cuda_emulation: ")
        assert file in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sign"),
    [
        ("static_memory_past_the_end", "out of bounds"),  # UndefinedBehaviorSanitizer comes first
        ("dynamic_memory_past_the_end", "heap-buffer-overflow"),
    ],
)
def test_emulation_guards_shared_memory(name: str, sign: str) -> None:
    library = harness.build("coopflow_sanitized")
    program = (
        "import sys; from pathlib import Path; from cuda_emulation.harness import Emulation; "
        "print(Emulation(Path(sys.argv[1])).primitive(sys.argv[2]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(library), name],
        env=_environment("sanitized"), capture_output=True, text=True, check=False,
    )  # fmt: skip
    report = done.stdout + done.stderr
    assert done.returncode != 0, report
    assert sign in report
    assert f"in {name}" in report
    assert "primitives.cpp" in report


def _run_sanitized(library: Path, *selection: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--timeout=1200", *selection],
        cwd=harness.ROOT, capture_output=True, text=True, check=False,
        env=_environment("sanitized") | {"COOPFLOW_EMULATION_LIBRARY": str(library)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-10000:] + done.stderr[-10000:]
    assert "passed" in done.stdout


def test_emulation_under_sanitizers_one_kernel() -> None:
    """Its build is the short one."""
    library = _mutant("", "sanitized", "random_cuda.cu")
    _run_sanitized(library, "tests/test_emulation_primitives.py")
    _run_sanitized(library, "tests/test_emulation_ops.py", "-k", "random_numbers or indices")


@pytest.mark.slow
def test_emulation_under_sanitizers_every_kernel() -> None:
    files = ("tests/test_emulation_ops.py", "tests/test_emulation_primitives.py")
    kernels = "agrees or variant or indices or misaligned or primitive"
    _run_sanitized(harness.build("coopflow_sanitized"), *files, "-k", kernels)
