"""The build: what it makes, what it ships, and what it says when something is missing."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import coopflow_ext
from coopflow_ext import _extension
from coopflow_ext._version import __version__
from coopflow_ext.errors import BuildError

ROOT = Path(__file__).parents[1]
Configure = Callable[..., "subprocess.CompletedProcess[str]"]
in_source_tree = pytest.mark.skipif(
    not (ROOT / "CMakeLists.txt").is_file(), reason="needs the source tree"
)


def _run(*command: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False
    )


def _find_cmake() -> str:
    beside_python = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake", path=os.pathsep.join([beside_python, os.environ["PATH"]]))
    if cmake is None:
        pytest.skip("cmake is not installed")
    return cmake


def test_library_registers_the_ops() -> None:
    path = _extension.load_library()
    assert path.is_file()
    info = json.loads(torch.ops.coopflow.build_info())
    assert info["version"] == __version__ == coopflow_ext.__version__
    assert info["compiler"]


def test_loading_twice_is_harmless() -> None:
    assert _extension.load_library() == _extension.load_library()


def test_missing_library_says_how_to_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "libcoopflow_ext.so"
    monkeypatch.setenv("COOPFLOW_LIBRARY", str(missing))
    with pytest.raises(BuildError) as caught:
        _extension.load_library()
    assert str(missing) in str(caught.value)
    assert "pip install --no-build-isolation -e ." in str(caught.value)
    assert "C++17" in str(caught.value)


def test_unloadable_library_names_torch_and_the_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "libcoopflow_ext.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setenv("COOPFLOW_LIBRARY", str(broken))
    with pytest.raises(BuildError, match="does not load beside torch") as caught:
        _extension.load_library()
    assert torch.__version__ in str(caught.value)
    assert isinstance(caught.value.__cause__, OSError)


USES = (
    "cf.ops.normal((2, 3), torch.zeros(2, dtype=torch.int64))",
    "cf.Key(0).fold_in(1)",
    "cf.LangevinSampler(cf.energies.MLPEnergy(2), n_steps=1, step_size=0.1)(torch.zeros(1, 2))",
)


def test_using_without_library_is_a_build_error(tmp_path: Path) -> None:
    """Importing works (documentation tools and --help need no kernels); using says what to do."""
    code = "import torch, coopflow_ext as cf\n"
    for use in USES:
        code += f"try: {use}\nexcept cf.BuildError as error: print(error)\n"
    done = _run(sys.executable, "-c", code, COOPFLOW_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("pip install") == len(USES)


@in_source_tree
def test_library_needs_no_other_torch_library_than_the_hollow_one() -> None:
    """One file serves CPU and CUDA builds of torch: it must not name libtorch_cpu, libc10, …"""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    dynamic = _run(readelf, "-d", str(_extension.library_path())).stdout
    needed = {line.split("[")[1].rstrip("]") for line in dynamic.splitlines() if "NEEDED" in line}
    assert "libtorch.so" in needed
    assert not {n for n in needed if n.startswith(("libtorch_", "libc10", "libcud", "libgomp"))}
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    symbols = _run(readelf, "--dyn-syms", "--wide", str(_extension.library_path())).stdout
    stream = [s for s in symbols.splitlines() if "aoti_torch_get_current_cuda_stream" in s]
    assert all("WEAK" in line for line in stream)


# The newest of each that manylinux_2_28 has, and what it calls them.
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


@in_source_tree
@pytest.mark.skipif(platform.machine() != "x86_64", reason="wheels are made for x86-64 alone")
def test_library_needs_no_newer_system_than_manylinux_2_28() -> None:
    """Whatever this machine has: a library that was built here loads wherever torch does."""
    readelf = shutil.which("readelf")
    if readelf is None:
        pytest.skip("readelf is not installed")
    needed = _run(readelf, "--version-info", "--wide", str(_extension.library_path())).stdout
    versions = set(re.findall(r"Name: ([A-Z]+)_([0-9.]+) ", needed))
    assert {name for name, _ in versions} >= {"GLIBC", "GLIBCXX"}
    assert not {
        (name, version)
        for name, version in versions
        if tuple(map(int, version.split("."))) > MANYLINUX_2_28[name]
    }


@in_source_tree
@pytest.mark.skipif(platform.machine() != "x86_64", reason="wheels are made for x86-64 alone")
def test_old_symbol_versions_exist_here() -> None:
    """csrc/manylinux.cmake promises them to the linker; one that is none fails at loading."""
    words = re.sub("#.*", "", (ROOT / "csrc" / "manylinux.cmake").read_text())
    calls = re.findall(r"^coopflow_old_glibc\((.*?)\)", words, re.M | re.S)
    assert [call.split()[0] for call in calls] == [
        "libdl.so.2", "libpthread.so.0", "librt.so.1", "libm.so.6",
    ]  # fmt: skip
    find = ctypes.CDLL(None).dlvsym
    find.restype, find.argtypes = (
        ctypes.c_void_p,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p],
    )
    for library, *names in map(str.split, calls):
        handle = ctypes.CDLL(library)._handle
        version = ""
        for name in names:
            if name.startswith("GLIBC_"):
                version = name
            else:
                assert find(handle, name.encode(), version.encode()), (library, name, version)


def _path_without_nvcc(folder: Path) -> None:
    """A folder of links to every program on PATH but nvcc."""
    for directory in reversed(os.environ["PATH"].split(os.pathsep)):
        for program in Path(directory).glob("*") if directory else ():
            link = folder / program.name
            if program.name != "nvcc" and program.is_file():
                link.unlink(missing_ok=True)
                link.symlink_to(program)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """What is on PATH for `configure`: no nvcc."""
    folder = tmp_path / "bin"
    folder.mkdir()
    _path_without_nvcc(folder)
    return folder


@pytest.fixture
def configure(tmp_path: Path, programs: Path) -> Configure:
    """Configures the native build with no nvcc in sight."""
    cmake = _find_cmake()

    def run(*options: str, **env: str) -> subprocess.CompletedProcess[str]:
        return _run(
            cmake, "-S", str(ROOT), "-B", str(tmp_path / "build"),
            f"-DPython_EXECUTABLE={sys.executable}", *options,
            PATH=str(programs), CUDACXX="", CUDA_PATH="", CUDAToolkit_ROOT="", **env,
        )  # fmt: skip

    return run


def _program(folder: Path, name: str, script: str) -> Path:
    path = folder / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@in_source_tree
def test_required_cuda_fails_loudly_without_nvcc(configure: Configure) -> None:
    done = configure("-DCOOPFLOW_CUDA=1")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "COOPFLOW_CUDA=1, but no working CUDA compiler was found" in message
    assert "COOPFLOW_CUDA=0" in message


@in_source_tree
def test_optional_cuda_is_left_out_without_nvcc(configure: Configure) -> None:
    done = configure("-DCOOPFLOW_CUDA=auto")
    assert done.returncode == 0, done.stderr
    assert "no CUDA code" in done.stdout
    assert "compiling takes about 3 minutes of one core; all cores share it" in done.stderr


@in_source_tree
def test_unknown_option_value_is_refused(configure: Configure) -> None:
    done = configure("-DCOOPFLOW_CUDA=maybe")
    assert done.returncode != 0
    assert "COOPFLOW_CUDA must be auto, 0 or 1; got 'maybe'" in " ".join(done.stderr.split())


@in_source_tree
def test_unknown_choice_of_instruction_sets_is_refused(configure: Configure) -> None:
    done = configure("-DCOOPFLOW_CPU_ISAS=avx2")
    assert done.returncode != 0
    assert "COOPFLOW_CPU_ISAS must be all or native; got 'avx2'" in " ".join(done.stderr.split())


ISA_PROGRAM = """
#include <cstdio>
#include <exception>
#include "cpu/isa.h"
namespace coopflow {
COOPFLOW_DECLARE_PER_ISA(const char* loop())
namespace baseline { const char* loop() { return "baseline"; } }
#if defined(COOPFLOW_HAS_AVX2)
namespace avx2 { const char* loop() { return "avx2"; } }
#endif
#if defined(COOPFLOW_HAS_AVX512)
namespace avx512 { const char* loop() { return "avx512"; } }
#endif
}  // namespace coopflow
int main() {
  using namespace coopflow;
  try {
    std::printf("%s\\n", COOPFLOW_SELECT_ISA(loop()));
  } catch (const std::exception& error) {
    std::printf("%s\\n", error.what());
  }
}
"""


@in_source_tree
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86 alone has several")
@pytest.mark.parametrize(("built", "missing"), [("AVX2", "avx512"), ("AVX512", "avx2")])
def test_a_library_runs_only_loops_that_it_has(tmp_path: Path, built: str, missing: str) -> None:
    """COOPFLOW_CPU_ISAS=native builds one set beside the baseline: it links without the others, and
    an asked one that is missing is refused, not replaced."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler is installed")
    source, program = tmp_path / "main.cpp", str(tmp_path / "main")
    source.write_text(ISA_PROGRAM)
    isa, include = ROOT / "csrc" / "cpu" / "isa.cpp", ROOT / "csrc"
    define = f"-DCOOPFLOW_HAS_{built}=1"
    done = _run(
        compiler, "-std=c++17", f"-I{include}", define, str(source), str(isa), "-o", program
    )
    assert done.returncode == 0, done.stderr
    assert _run(program, COOPFLOW_CPU_ISA="baseline").stdout == "baseline\n"
    refused = _run(program, COOPFLOW_CPU_ISA=missing).stdout
    usable = "baseline" if built.lower() not in refused else f"{built.lower()} or baseline"
    assert refused == (
        f"COOPFLOW_CPU_ISA must be {usable} with this library on this machine, got '{missing}'\n"
    )


# What `make demo` leaves out where it is the first thing that is built and there is no GPU.
LEAN = "CUDA=0 ARCHITECTURES= HOST=0 ISAS=native"
FULL = "CUDA= ARCHITECTURES= HOST= ISAS="


@in_source_tree
@pytest.mark.parametrize(
    ("goal", "arguments", "built", "expected"),
    [
        ("demo", (), None, LEAN),
        ("demo", (), LEAN, LEAN),
        ("demo", (), FULL, FULL),  # what was built for the tests stays
        ("test", (), LEAN, FULL),
        ("demo", ("GPU=/dev/nvidiactl",), None, FULL),
        ("demo", ("COOPFLOW_CUDA=1",), None, FULL.replace("CUDA=", "CUDA=1")),
    ],
)
def test_the_demo_builds_what_it_runs(
    tmp_path: Path, goal: str, arguments: tuple[str, ...], built: str | None, expected: str
) -> None:
    make = shutil.which("make")
    if make is None:
        pytest.skip("make is not installed")
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("csrc", "tests", "coopflow_ext", "build"):
        (tmp_path / name).mkdir()
    for name in (
        "CMakeLists.txt",
        "pyproject.toml",
        "coopflow_ext/_version.py",
        "csrc/manylinux.cmake",
    ):
        (tmp_path / name).touch()
    if built is not None:
        (tmp_path / "build" / ".options").write_text(f"{built}\n")
    given = ("MAKE", "MFLAGS", "COOPFLOW_", "GPU")
    env = {name: value for name, value in os.environ.items() if not name.startswith(given)}
    command = [make, "-n", goal, "GPU=", *arguments]  # the last of two definitions counts
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    assert f"echo '{expected}' | cmp -s - build/.options" in done.stdout


@in_source_tree
def test_architecture_without_bfloat16_is_refused(configure: Configure) -> None:
    done = configure("-DCOOPFLOW_CUDA_ARCHITECTURES=80-real;75")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "COOPFLOW_CUDA_ARCHITECTURES must be 80 or later" in message
    assert "got '80-real;75'" in message


@in_source_tree
def test_native_architectures_are_those_of_the_gpus(configure: Configure, programs: Path) -> None:
    _program(programs, "nvidia-smi", "echo No devices were found; exit 6")
    done = configure("-DCOOPFLOW_CUDA_ARCHITECTURES=native")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "=native, but nvidia-smi finds no GPU here. Name architectures instead" in message
    _program(programs, "nvidia-smi", "echo 9.0; echo 7.5; echo 9.0")
    done = configure("-DCOOPFLOW_CUDA_ARCHITECTURES=native")
    assert "must be 80 or later" in " ".join(done.stderr.split())
    assert "got '90-real;75-real'" in " ".join(done.stderr.split())


@in_source_tree
def test_an_old_compiler_is_named(configure: Configure, programs: Path) -> None:
    real = shutil.which(os.environ.get("CXX", "c++"))
    assert real is not None
    if "Free Software" not in _run(real, "--version").stdout:
        pytest.skip("needs GCC")
    old = _program(programs, "old-c++", f'exec {real} -U__GNUC__ -D__GNUC__=8 "$@"')
    done = configure(f"-DCMAKE_CXX_COMPILER={old}")
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "coopflow_ext and torch's headers need GCC or Clang >= 9; found 8." in message
    assert "set CXX to it" in message


@in_source_tree
def test_an_old_torch_is_named(configure: Configure, tmp_path: Path) -> None:
    package = tmp_path / "old" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "2.9.1"\n')
    done = configure(PYTHONPATH=str(package.parent))
    assert done.returncode != 0
    message = " ".join(done.stderr.split())
    assert "coopflow_ext needs torch >= 2.10 at build time; found 2.9.1" in message
    assert "pip install --upgrade torch" in message


@in_source_tree
@pytest.mark.slow
def test_make_without_a_network_says_what_to_do(tmp_path: Path) -> None:
    """And makes a virtual environment before it knows."""
    tree = _copy_tree(tmp_path / "tree")
    offline = {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    done = _run("make", "demo", f"PYTHON={sys.executable}", cwd=tree, **offline)
    assert done.returncode != 0
    assert "Without a network, give it a folder of wheels: PIP_NO_INDEX=1" in done.stderr


def _copy_tree(destination: Path) -> Path:
    """The source tree as a checkout has it, without what was built in it."""
    shutil.copytree(
        ROOT,
        destination,
        ignore=shutil.ignore_patterns(
            ".*", "build", "dist", "runs", "*.egg-info", "*.so", "__pycache__"
        ),
    )
    return destination


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = _copy_tree(tmp_path_factory.mktemp("sdist") / "tree")
    pytest.importorskip("build")
    done = _run(sys.executable, "-m", "build", "--sdist", "--no-isolation", cwd=tree)
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    return archive


@in_source_tree
def test_sdist_holds_every_source_and_no_binary(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = [
        path.relative_to(ROOT).as_posix()
        for folder in ("csrc", "coopflow_ext", "tests", "benchmarks")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in {".so", ".pyc"}
    ]
    wanted += ["CMakeLists.txt", "pyproject.toml", "setup.py", "conftest.py", "Makefile", "LICENSE"]
    assert not set(wanted) - names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@in_source_tree
def test_old_setuptools_is_named(tmp_path: Path) -> None:
    """Without build isolation nobody else looks at its version, and it fails in many ways."""
    (tmp_path / "setuptools.py").write_text('__version__ = "65.5.0"\n')
    done = _run(sys.executable, str(ROOT / "setup.py"), "--version", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0
    assert "setuptools >= 77, found 65.5.0: pip install" in done.stderr


@in_source_tree
def test_installed_package_can_bench(tmp_path: Path) -> None:
    """The Python part as a wheel has it, with nothing but its dependencies."""
    tree, staged = _copy_tree(tmp_path / "tree"), tmp_path / "staged"
    done = _run(
        sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(staged),
        cwd=tree, COOPFLOW_SKIP_NATIVE="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [path.name for path in staged.iterdir()] == ["coopflow_ext"]
    bundled = {path.name for path in (staged / "coopflow_ext" / "_benchmarks").iterdir()}
    assert bundled == {path.name for path in (ROOT / "benchmarks").glob("*.py")}
    shutil.rmtree(tree)
    code = (
        "import sys\n"
        "for name in ('pytest', 'torchebm', 'jax', 'matplotlib', 'sklearn'):\n"
        "    sys.modules[name] = None\n"
        "from coopflow_ext.cli import main\n"
        "sys.exit(main(['bench', '--quick', '--device', 'cpu', '--case', 'chain/MLP',"
        " '--out', 'out']))"
    )
    env = {"PYTHONPATH": str(staged), "COOPFLOW_LIBRARY": str(_extension.library_path())}
    done = _run(sys.executable, "-c", code, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"torchebm .*not installed", done.stdout)
    assert "no plots: matplotlib is not installed" in done.stdout
    assert (tmp_path / "out" / "table.md").is_file()


def _build_wheel(source: Path, out: Path, **env: str) -> Path:
    done = _run(
        sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation",
        "--wheel-dir", str(out), str(source), cwd=out.parent, **env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    return wheel


@in_source_tree
@pytest.mark.slow
def test_wheel_from_the_sdist_serves_every_python(sdist: Path, tmp_path: Path) -> None:
    wheel = _build_wheel(sdist, tmp_path / "wheel", COOPFLOW_BUILD_HOST="0", COOPFLOW_CUDA="0")
    assert "-py3-none-linux_" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "coopflow_ext/libcoopflow_ext.so" in names
    assert "coopflow_ext/py.typed" in names
    assert [name for name in names if name.endswith(".so")] == ["coopflow_ext/libcoopflow_ext.so"]


@in_source_tree
@pytest.mark.slow
@pytest.mark.parametrize("editable", [False, True])
def test_pip_install_without_cuda(editable: bool, tmp_path: Path) -> None:
    """`pip install --no-build-isolation [-e] .` beside this torch, in a CPU-only build."""
    tree = _copy_tree(tmp_path / "tree")
    done = _run(
        sys.executable, "-m", "venv", "--system-site-packages", str(tmp_path / "venv"), cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    python = str(tmp_path / "venv" / "bin" / "python")
    # The new environment sees the packages of the one that runs this test.
    packages = os.pathsep.join(p for p in sys.path if p.endswith("site-packages"))
    env = {"PYTHONPATH": packages, "COOPFLOW_CUDA": "0"}
    done = _run(
        python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--ignore-installed",
        *(["-e"] if editable else []), str(tree), cwd=tmp_path, **env,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    code = (
        "import json, torch, coopflow_ext as cf; print(json.dumps([cf.__file__, "
        "json.loads(torch.ops.coopflow.build_info())]))"
    )
    (prefix,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    # PYTHONPATH comes first, and may hold an editable install of this package.
    env["PYTHONPATH"] = os.pathsep.join([str(prefix), packages])
    done = _run(python, "-c", code, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    location, info = json.loads(done.stdout)
    assert Path(location).is_relative_to(tree if editable else prefix)
    assert info["cuda_version"] == ""
    # Type checkers find the package in the new environment, and run nothing there to do so.
    reveal = "import coopflow_ext as cf; reveal_type(cf.Key(0))"
    flags = ("--python-executable", python, "--ignore-missing-imports", "--cache-dir", os.devnull)
    done = _run(sys.executable, "-m", "mypy", *flags, "-c", reveal, cwd=tmp_path)
    assert '"coopflow_ext.rng.Key"' in done.stdout, done.stdout


@in_source_tree
@pytest.mark.slow
@pytest.mark.timeout(900)  # starts Python for every stage, twice
def test_gpu_check_dry_run(tmp_path: Path) -> None:
    script, out = ROOT / "benchmarks" / "gpu_check.sh", tmp_path / "out"
    command = ("bash", str(script), "--dry-run", str(out))
    done = _run(*command, PYTHON=sys.executable)
    assert done.returncode == 0, done.stdout + done.stderr
    # Results, table and three plots come to these on a GPU: 7 in all.
    assert {path.name for path in out.iterdir()} == {"summary.txt", "logs.tar.gz"}
    verdicts = [line.split()[:2] for line in (out / "summary.txt").read_text().splitlines()]
    stages = ["facts", "build", "tests", "memcheck", "racecheck", "bench", "models", "profile"]
    stages += ["report", "pack"]
    assert verdicts == [[stage, "ok"] for stage in stages]
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert set(archive.getnames()) >= {f"{stage}.log" for stage in stages[:-1]}
    again = _run(*command, PYTHON=sys.executable)
    assert again.stdout.count("done before") == len(stages) - 1


@in_source_tree
def test_gpu_check_goes_on_after_a_failure(tmp_path: Path) -> None:
    script, out = ROOT / "benchmarks" / "gpu_check.sh", tmp_path / "out"
    command = ("bash", str(script), "--dry-run", str(out), "build", "facts", "pack")
    done = _run(*command, PYTHON=sys.executable, COOPFLOW_LIBRARY=str(tmp_path / "none.so"))
    assert done.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert "build failed: exit status 1" in summary
    assert "facts ok" in summary
    assert "native library is missing" in done.stdout


@in_source_tree
def test_gpu_check_refuses_bad_input(tmp_path: Path) -> None:
    script = str(ROOT / "benchmarks" / "gpu_check.sh")
    done = _run("bash", script, "--dry-run", str(tmp_path), "nonsense")
    assert done.returncode == 2
    assert "unknown stage 'nonsense'" in done.stderr
    (tmp_path / "file").write_text("")
    done = _run("bash", script, "--dry-run", str(tmp_path / "file"), "facts")
    assert done.returncode == 1
    assert "file" in done.stderr
    done = _run("bash", script, "--dry-run")
    assert done.returncode == 2
    assert "OUTDIR" in done.stderr


@in_source_tree
def test_gpu_check_profiles_every_kernel() -> None:
    script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    (names,) = re.findall(r"^  ours=\$\((.*)\)$", script, re.M)
    ours = subprocess.run(
        ["bash", "-c", names], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    pattern = f"^({ours})"
    assert '"regex:^($ours)"' in script
    sources = [p.read_text() for p in (ROOT / "csrc" / "cuda").glob("*.cu*")]
    definition = r"\b(?!run_|launch_)(\w+_kernel)\("
    kernels = {name for text in sources for name in re.findall(definition, text)}
    assert len(kernels) >= 10
    assert [name for name in kernels if not re.search(pattern, name)] == []


@in_source_tree
def test_stopped_tests_are_resumed(tmp_path: Path) -> None:
    passed = tmp_path / "passed.txt"
    (tmp_path / "test_three.py").write_text(
        "def test_a(): pass\ndef test_b(): assert False\ndef test_c(): pass\n"
    )
    command = (sys.executable, "-m", "pytest", "-q", "-p", "resume_tests", "-c", "/dev/null")
    environment = {"PYTHONPATH": str(ROOT / "benchmarks"), "COOPFLOW_TESTS_PASSED": str(passed)}
    done = _run(*command, str(tmp_path), **environment)
    assert "1 failed, 2 passed" in done.stdout
    assert [line.rpartition("::")[2] for line in passed.read_text().split()] == ["test_a", "test_c"]
    done = _run(*command, str(tmp_path), **environment)
    assert "1 failed, 2 deselected" in done.stdout
