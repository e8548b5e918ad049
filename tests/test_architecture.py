"""The rules of docs/architecture.md, read off the sources."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import coopflow_ext as cf
from coopflow_ext._extension import native

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "coopflow_ext"
MODULES = sorted(PACKAGE.rglob("*.py"))
STEMS = (
    "affine_coupling", "analytic_langevin_chain", "attention", "concat_elu", "gate_add_norm",
    "langevin", "mixture_logistic", "mlp", "random", "weight_norm",
)  # fmt: skip
# Where the file of a stem bears another name.
HEADERS = {"analytic_langevin_chain": "analytic_energies"}
BENCHMARKS = {"analytic_langevin_chain": "sampler"}

# A module imports from its own layer or from one further up in this list.
LAYERS = [
    ("errors", "_version", "_optional", "_export", "autocast", "_modes"),
    ("_checks", "_tensors", "_model_state", "_recording"),
    ("_extension", "_info"),
    ("reference",),
    ("ops",),
    ("rng", "recorded_key", "graphed_calls"),
    ("samplers", "energies", "flows", "data", "diagnostics"),
    ("presets", "metrics"),
    ("integrations",),
    ("coop",),
    ("cli", "__main__"),
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}

# Names of torch that it marks as its own and that have no public equal.
PRIVATE_NAMES_OF_TORCH = {
    "_functorch",
    "_is_exporting_flag",
    "_has_any_global_hook",
    "_len_torch_dispatch_stack",
    "_assert_async",
    "_autograd",
    "_call_impl",
    "_cdata",
    "_cuda_endAllocateToPool",
    "_cuda_releasePool",
    "_current_level",
    "_foreach_add_",
    "_foreach_copy_",
    "_foreach_lerp_",
    "_op",
    "_pop_saved_tensors_default_hooks",
    "_push_saved_tensors_default_hooks",
    "_schema",
    "_top_saved_tensors_default_hooks",
    "_version",
    "_weight_norm",
}


def layer_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Full names of the modules that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def names(path: Path) -> set[str]:
    """Every name and attribute that a file uses."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Name):
            found.add(node.id)
        elif isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, (ast.arg, ast.keyword)) and node.arg:
            found.add(node.arg)
    return found


def test_layers_import_only_what_is_below_them() -> None:
    for path in MODULES:
        layer = layer_of(path)
        if layer == "__init__":
            continue
        assert layer in LEVEL, f"{path.name}: give the layer {layer} a place in LAYERS"
        for module in imports(path):
            package, _, rest = module.partition(".")
            other = rest.partition(".")[0]
            if package == "coopflow_ext" and other in LEVEL:
                assert LEVEL[other] <= LEVEL[layer], f"{path.relative_to(ROOT)} imports {module}"


@pytest.mark.parametrize(
    ("layer", "module"), [("ops", "rng"), ("samplers", "reference"), ("samplers", "_extension")]
)
def test_layers_that_do_not_know_each_other(layer: str, module: str) -> None:
    for path in MODULES:
        if layer_of(path) == layer:
            assert f"coopflow_ext.{module}" not in set(imports(path)), path


def test_only_a_few_files_speak_to_the_native_library() -> None:
    for path in MODULES:
        if layer_of(path) not in ("_extension", "ops", "rng", "_info"):
            assert not names(path) & {"native", "load_library"}, path


def test_the_import_loads_neither_the_compiler_nor_an_extra() -> None:
    """torch._dynamo takes three times as long as everything else."""
    heavy = ["torch._dynamo", "matplotlib", "sklearn", "scipy", "torchmetrics", "arviz", "pytest"]
    code = f"import sys, coopflow_ext; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout


def test_raw_arguments_of_the_step_stay_in_ops() -> None:
    raw = {"clamp_low", "clamp_high", "drift_t", "noise_t", "decay_t", "pull_t"}
    for path in MODULES:
        if layer_of(path) != "ops":
            assert not names(path) & raw, path


def test_private_parts_of_torch_are_few_and_listed() -> None:
    trees = {path: ast.parse(path.read_text()) for path in MODULES}
    own = {
        name
        for tree in trees.values()
        for node in ast.walk(tree)
        for name in (getattr(node, "name", None), getattr(node, "id", None))
        if name
    } | {
        node.attr
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    documented = {"_asdict", "_buffers", "_fields", "_modules", "_parameters"}
    used = set()
    for path, tree in trees.items():
        private = [m for m in imports(path) if re.match(r"torch\.(\w+\.)*_", m)]
        assert not private, f"{path.relative_to(ROOT)} imports {private}"
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                used.add(node.attr)
    foreign = used - own - documented
    assert foreign <= PRIVATE_NAMES_OF_TORCH, foreign - PRIVATE_NAMES_OF_TORCH


def test_headers_of_mathematics_include_no_torch() -> None:
    for header in (ROOT / "csrc" / "include" / "coopflow").glob("*.h"):
        assert "torch/" not in header.read_text(), header.name


@pytest.mark.parametrize("stem", STEMS)
def test_a_stem_stands_in_every_layer(stem: str) -> None:
    test = "rng" if stem == "random" else stem  # of random numbers, keys included
    files = [
        f"csrc/include/coopflow/{HEADERS.get(stem, stem)}.h",
        f"csrc/ops/{stem}_op.h",
        f"csrc/cpu/{stem}_cpu.cpp",
        f"csrc/cpu/{stem}_loops.cpp",
        f"csrc/cuda/{stem}_cuda.cu",
        f"coopflow_ext/ops/{stem}.py",
        f"tests/test_{test}.py",
    ]
    if stem != "random":  # measured as a part of the others
        files.append(f"benchmarks/bench_{BENCHMARKS.get(stem, stem)}.py")
    assert [name for name in files if not (ROOT / name).is_file()] == []


def test_the_recipe_names_every_file_of_an_op() -> None:
    """And scripts name no op."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    recipe = text.partition("## Adding an op")[2].partition("\nA new option")[0]
    rows = [line.split("|")[1] for line in recipe.splitlines() if line.startswith("| `")]
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    assert len(listed) == 16  # the number that the text gives in words
    sources = [*(ROOT / "csrc").rglob("*.*"), *(PACKAGE / "ops").glob("*.py")]
    by_name = [*(ROOT / "tests").glob("test_*.py"), *(ROOT / "benchmarks").glob("*.py")]
    touched = [p for p in sources if "affine_coupling" in p.name + p.read_text()]
    touched += [p for p in by_name if "affine_coupling" in p.name]
    paths = {str(path.relative_to(ROOT)) for path in touched}
    assert paths - listed == {"csrc/host_module.cpp"}
    scripts = [*ROOT.glob("Makefile"), *ROOT.glob("CMakeLists.txt"), *ROOT.glob("*/*.sh")]
    scripts += [ROOT / "benchmarks" / name for name in ("suite.py", "exercise_ops.py")]
    assert [p.name for p in scripts if "affine_coupling" in p.read_text()] == []


def schemas() -> list[str]:
    text = (ROOT / "csrc" / "library.cpp").read_text()
    return re.findall(r'm\.def\(\s*"(\w+)\(', text)


def test_every_op_on_tensors_has_a_fake_kernel() -> None:
    found = schemas()
    assert len(found) > 10
    for name in found:
        schema = getattr(native(), name).default._schema
        if any("Tensor" in str(argument.type) for argument in schema.arguments):
            op = f"coopflow::{name}"
            assert torch._C._dispatch_has_kernel_for_dispatch_key(op, "Meta"), op


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/architecture.md"])
def test_paths_named_in_the_papers_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`([\w./*-]+/[\w.*-]*)`", text) + re.findall(
        r"`(\w+\.(?:md|toml|py))`", text
    )
    made = ("build/", "dist/", ".venv", "docs/check-")
    folders = (ROOT, PACKAGE, ROOT / "csrc" / "include", ROOT / "tests" / "cuda_emulation")
    missing = [
        name
        for name in named
        if not name.startswith(("/", *made)) and "NAME" not in name
        if not any(any(folder.glob(name.rstrip("/"))) for folder in folders)
    ]
    assert len(named) > 10
    assert missing == []


def test_public_names_are_those_of_the_package() -> None:
    for name in cf.__all__:
        assert hasattr(cf, name), name
