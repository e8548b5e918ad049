"""The benchmark suite: its method, its files, and what it says to bad input."""

from __future__ import annotations

import copy
import gc
import importlib
import inspect
import json
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

harness = pytest.importorskip("harness", reason="needs the source tree's benchmarks/")
import compare  # noqa: E402
import merge  # noqa: E402
import report  # noqa: E402
import suite  # noqa: E402

from conftest import pytest_generate_tests  # noqa: E402
from coopflow_ext import Key, cli, data, flows, ops  # noqa: E402
from coopflow_ext.coop import Trainer  # noqa: E402

CPU = torch.device("cpu")
LIMITS = {
    "copy_bytes_per_second": 1e10,
    "float32_flops_per_second": 1e11,
    "bfloat16_flops_per_second": 2e11,
}


def work(a: torch.Tensor) -> None:
    a.sin()


def make_case(name: str = "toy/fp32/64x64", check: Any = lambda: None) -> Any:
    def build(device: torch.device, with_compile: bool) -> Any:
        a = torch.rand(64, 64, device=device)
        runs = {"ours": lambda: work(a), "twin": lambda: work(a)}
        gaps = {"absent": "not installed"}
        return harness.Contest(runs, check, {"ours": 8 * a.numel()}, missing=gaps)

    return harness.Case(name, build, 64 * 64, quick=True)


@pytest.fixture
def toy_suite(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    cases = [make_case("toy/fp32/64x64"), make_case("toy/fp32/other")]
    monkeypatch.setattr(suite, "all_cases", lambda: cases)
    monkeypatch.setattr(suite, "measured_limits", lambda *_: LIMITS)
    tiny = harness.Effort(rounds=3, sample_seconds=1e-4, with_compile=False)
    monkeypatch.setattr(suite, "QUICK", tiny)
    return cases


def test_equal_functions_have_ratio_one() -> None:
    # P(20th percentile of 41 fair pairs is above 1) = P(Binomial(41, ½) ≤ 8) < 1e-4, and as much
    # on the other side: only a bias beyond the resolution fails this, however noisy the machine.
    effort = harness.Effort(rounds=41, sample_seconds=2e-4)
    records, _ = harness.measure(make_case(), CPU, effort, LIMITS)
    (twin,) = (r for r in records if r["name"] == "twin")
    ratio = twin["extra_info"]["ratio_to_ours"]
    assert ratio["p20"] <= 1 + harness.RESOLUTION
    assert ratio["p80"] >= 1 - harness.RESOLUTION


def test_no_sample_pays_for_the_cycles_of_another() -> None:
    calls, sampling = 0, False
    collections: list[int] = []  # the calls during which Python collected

    def note(phase: str, info: dict[str, int]) -> None:
        if sampling and phase == "start":
            collections.append(calls)

    def run() -> dict[str, float]:
        nonlocal calls, sampling
        calls, sampling = calls + 1, True
        for _ in range(2000):
            cycle: list[Any] = []
            cycle.append(cycle)
        sampling = False
        return {"whole": 1.0}

    gc.callbacks.append(note)
    try:
        for measure, warm_up in (
            (lambda: harness.samples_by_part({"ours": run}, harness.QUICK), 1),
            (lambda: harness.paired_samples({"ours": run}, torch.device("cpu"), harness.QUICK), 4),
        ):
            calls = 0
            collections.clear()
            measure()
            assert calls >= 7
            assert collections  # as ever, before anything is timed
            assert max(collections) <= warm_up
            assert gc.isenabled()
            assert gc.get_freeze_count() == 0
    finally:
        gc.callbacks.remove(note)


def test_a_slower_function_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the processor's time of this thread, which other processes do not lengthen.
    monkeypatch.setattr(time, "perf_counter", time.thread_time)

    def build(device: torch.device, with_compile: bool) -> Any:
        a = torch.rand(64, 64)
        runs = {"ours": lambda: work(a), "slow": lambda: [work(a) for _ in range(10)]}
        return harness.Contest(runs, lambda: None)

    effort = harness.Effort(rounds=21, sample_seconds=5e-4)
    records, _ = harness.measure(harness.Case("toy", build, 64 * 64), CPU, effort, LIMITS)
    assert records[1]["extra_info"]["ratio_to_ours"]["p20"] > 2


def test_a_wrong_result_is_a_failure() -> None:
    def wrong() -> None:
        raise AssertionError("twin: off by one")

    with pytest.raises(harness.WrongResultError, match="off by one"):
        harness.measure(make_case(check=wrong), CPU, harness.QUICK, LIMITS)


def test_a_contestant_that_goes_on_without_its_option_is_a_failure() -> None:
    def falls_back() -> None:
        warnings.warn("compile=True: torch.compile could not compile the gradient", stacklevel=2)

    with pytest.raises(harness.WrongResultError, match="could not compile"):
        harness.measure(make_case(check=falls_back), CPU, harness.QUICK, LIMITS)


def test_cold_cases_work_beyond_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "cache_bytes", lambda _: 64 * 64 * 8)
    case = make_case()
    contest = case.build(CPU, False)
    assert harness.copies_beyond_cache(case, contest, CPU) == 1
    cold = harness.Case("toy", case.build, 64 * 64, cold=True)
    assert harness.copies_beyond_cache(cold, contest, CPU) == 5
    seen: list[int] = []
    run = harness.in_rotation([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(4):
        run()
    assert seen == [0, 1, 2, 0]


def test_a_contestant_that_replaces_memory_is_a_failure() -> None:
    """On CUDA a graph captured before it would go on with memory that nobody reads."""

    def build(name: str) -> Any:
        x = torch.zeros(8)
        runs = {"ours": lambda: x.add_(1), "rebinds": lambda: setattr(x, "data", x + 1)}
        return lambda *_: harness.Contest({name: runs[name]}, lambda: None, in_place=(x,))

    harness.checked(harness.Case("toy", build("ours"), 8), CPU, False)
    with pytest.raises(harness.WrongResultError, match="rebinds: replaces the memory"):
        harness.checked(harness.Case("toy", build("rebinds"), 8), CPU, False)


@pytest.mark.gpu
def test_a_refused_capture_leaves_torchs_generator_whole() -> None:
    runs: dict[str, Any] = {}
    missing: dict[str, str] = {}
    harness.add_graph("graph", lambda: torch.rand(2, device="cuda").sum().item(), runs, missing)
    assert not runs
    assert missing["graph"].startswith("cannot be captured")
    assert torch.rand(2, device="cuda").isfinite().all()


def test_the_checks_find_wrong_updates() -> None:
    import bench_langevin

    x, grad = torch.rand(64, 256), torch.randn(64, 256)

    def step(drift: float, noise: float, limit: float) -> Any:
        def run() -> None:
            x.sub_(drift * grad).add_(noise * torch.randn_like(x)).clamp_(-limit, limit)

        return run

    bench_langevin.check({"right": step(0.1, 0.1, 1)}, x, grad)
    for wrong in ((-0.1, 0.1, 1), (0.1, 0.12, 1), (0.1, 0.1, 2)):
        with pytest.raises(AssertionError, match="wrong"):
            bench_langevin.check({"wrong": step(*wrong)}, x, grad)


def test_the_checks_find_wrong_couplings() -> None:
    import bench_affine_coupling as affine
    import bench_mixture_logistic as mixture

    x, params = torch.randn(4, 64), torch.randn(4, 2, 64).tanh()
    right = ops.affine_coupling
    affine.check("affine_coupling", {"right": right}, x, params, True)

    def bad_gradient(x: torch.Tensor, params: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, ladj = right(x, params)
        return y, ladj + 1e-2 * (x - x.detach()).sum(1)

    with pytest.raises(AssertionError, match="wrong, result 2"):
        affine.check("affine_coupling", {"wrong": bad_gradient}, x, params, True)

    x, params = mixture.inputs(256, 32, CPU)
    forward, inverse = ops.mixture_logistic_coupling, ops.mixture_logistic_coupling_inverse
    mixture.check_forward({"right": forward}, x, params, True)
    y, _ = forward(x, params)
    mixture.check_inverse({"ours": inverse}, y, params)
    right = forward
    with pytest.raises(AssertionError, match="wrong, result 2"):
        mixture.check_forward({"wrong": bad_gradient}, x, params, True)
    with pytest.raises(AssertionError, match="wrong: maps back"):
        mixture.check_inverse({"wrong": lambda y, p: (inverse(y, p)[0] + 0.1, y)}, y, params)
    with pytest.raises(AssertionError, match="wrong: log-determinant"):
        mixture.check_inverse({"wrong": lambda y, p: (inverse(y, p)[0], y.sum(1))}, y, params)


def test_the_checks_find_wrong_attention() -> None:
    import bench_attention as bench

    given, rng = bench.inputs(2, 2, 9, 8, CPU, torch.float32), Key(0).tensor()

    def right(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.attention(q, k, v, rng, bench.P)

    def other_mask(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return ops.attention(q, k, v, rng, bench.P, step=1)

    def bad_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return right(q, k, v) + 1e-3 * (k - k.detach())

    bench.check({"right": right}, given, rng, True)
    with pytest.raises(AssertionError, match="wrong, result 0"):
        bench.check({"wrong": other_mask}, given, rng, False)
    with pytest.raises(AssertionError, match="wrong, result 2"):
        bench.check({"wrong": bad_gradient}, given, rng, True)


def test_the_checks_find_a_wrong_concat_elu() -> None:
    import bench_concat_elu as bench

    x, rng = torch.randn(2, 3, 4, 4), Key(0).tensor()

    def right(x: torch.Tensor) -> torch.Tensor:
        return ops.concat_elu(x, rng, bench.P)

    def other_mask(x: torch.Tensor) -> torch.Tensor:
        return ops.concat_elu(x, rng, bench.P, step=1)

    def bad_gradient(x: torch.Tensor) -> torch.Tensor:
        return right(x) + 1e-3 * (x - x.detach()).repeat(1, 2, 1, 1)

    bench.check({"right": right}, x, rng, True)
    with pytest.raises(AssertionError, match="wrong, result 0"):
        bench.check({"wrong": other_mask}, x, rng, False)
    with pytest.raises(AssertionError, match="wrong, result 1"):
        bench.check({"wrong": bad_gradient}, x, rng, True)


def test_the_checks_find_a_wrong_gate_add_norm() -> None:
    import bench_gate_add_norm as bench

    given = bench.inputs((3, 5, 8), CPU, torch.float32)

    def not_normed(x: torch.Tensor, gates: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return x + torch.nn.functional.glu(gates, -1)

    def bad_gradient(x: torch.Tensor, gates: torch.Tensor, *of: torch.Tensor) -> torch.Tensor:
        return ops.gate_add_norm(x, gates, *of) + 1e-3 * (x - x.detach())

    bench.check({"right": ops.gate_add_norm}, given, True)
    with pytest.raises(AssertionError, match="wrong, result 0"):
        bench.check({"wrong": not_normed}, given, False)
    with pytest.raises(AssertionError, match="wrong, result 1"):
        bench.check({"wrong": bad_gradient}, given, True)


class _OurOperators(TorchDispatchMode):
    """Their names, as they are called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "coopflow":
            self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_reference_runs_none_of_our_operators() -> None:
    """But for the derivation of keys, and in a flow's cases the draws, the same for all."""
    import bench_coop
    import bench_flowpp

    small = {"channels": 8, "components": 2, "dequant_components": 2, "legacy_cdf_clamp": True}
    options = {**bench_coop.config_of("digits-flowpp").flow_options, **small}
    config = bench_coop.config_of(
        "digits-flowpp", batch_size=2, langevin_steps=1, init_batches=1, flow_options=options
    )
    dataset = data.load(config.data)
    flow = flows.flowpp(**{**bench_flowpp.SIZES["digits"], **small})
    x = torch.rand(2, 1, 8, 8) * 2 - 1
    flow.initialize(x, key=Key(0))
    found = {}
    for name in bench_coop.VARIANTS:
        if name != "reference":  # whose networks are those of the other
            trainer = Trainer(config, dataset, CPU)
            with _OurOperators() as ours:
                bench_coop.time_iteration(trainer, name)
            found[f"coop, {name}"] = ours.names
    for name, variant in bench_flowpp.variants(False).items():
        with _OurOperators() as ours:
            for task in bench_flowpp.TASKS:
                bench_flowpp.measure(task, variant, flow, x)
        found[f"flowpp, {name}"] = ours.names
    assert found["coop, reference, randn"] == {"fold_in"}
    assert found["flowpp, reference"] == {"fold_in", "normal_", "uniform_"}
    networks = {*bench_flowpp.NETWORKS, "mixture_logistic_coupling"}
    assert networks < found["coop, ours"]
    assert networks < found["flowpp, ours"]


def test_the_checks_find_wrong_chains() -> None:
    import bench_sampler

    problem = bench_sampler.mlp(16)(CPU)
    score = problem.score()

    def loop(score: Any) -> Any:
        return {"loop": lambda xi: bench_sampler.plain_loop(problem, score, xi)}

    bench_sampler.check(problem, loop(score), {}, {})
    # Too little for the states to show it beside the noise.
    with pytest.raises(AssertionError, match="loop: its drift is off"):
        bench_sampler.check(problem, loop(lambda x: 1.003 * score(x)), {}, {})
    with pytest.raises(AssertionError, match="loop"):
        bench_sampler.check(problem, loop(torch.zeros_like), {}, {})
    with pytest.raises(AssertionError, match="loop"):
        bench_sampler.check(
            problem, {"loop": lambda xi: bench_sampler.plain_loop(problem, score, 1.1 * xi)}, {}, {}
        )

    def plain() -> torch.Tensor:
        return bench_sampler.plain_loop(problem, score)

    # A graph that works elsewhere leaves what it returned at its capture as it was.
    bench_sampler.check(problem, {}, {}, {"graph": (plain, plain)})
    stale = plain()
    with pytest.raises(AssertionError, match="graph"):
        bench_sampler.check(problem, {}, {}, {"graph": (lambda: stale, plain)})


FAST = [
    "langevin/fp32/1024x2",
    "langevin/bf16/256x3072",
    "langevin/fp16/256x3072",
    "affine_coupling/forward+backward/fp32/256x1536",
    "affine_coupling/inverse/fp32/256x1536",
    "affine_coupling/forward/bf16/256x1536",
    "mixture_logistic/inverse/fp32/K32/512",
    "mixture_logistic/forward+backward/fp32/K32/16384",
    "mixture_logistic/forward/bf16/K32/16384",
    "attention/forward+backward/fp32/64x4x32x8",
    "concat_elu/forward+backward/fp32/64x32x8x4",
    "gate_add_norm/forward+backward/fp32/64x32x32",
    "chain/mixture, closed form",
    "chain/cheap score, one chain",
    "chain/ResEnergy",
    "flowpp/sampling/digits/64",
    "coop/digits-small",
]
COMPILED = [
    "langevin/fp32/256x3072",
    "affine_coupling/forward+backward/fp32/256x1536",
    "mixture_logistic/inverse/fp32/K32/512",
    "chain/MLP, compiled",
    "flowpp/sampling/digits/64",
]


@pytest.mark.parametrize(
    ("name", "with_compile"),
    [
        *((name, False) for name in FAST),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in COMPILED),
    ],
)
def test_cases_give_right_results(name: str, with_compile: bool, device: torch.device) -> None:
    (case,) = (c for c in suite.all_cases() if c.name == name)
    if device.type not in case.devices:
        pytest.skip(f"measured on {', '.join(case.devices)} only")
    contest = harness.checked(case, device, with_compile)
    assert next(iter(contest.runs)) == "ours"
    assert contest.expected_bytes.keys() <= contest.runs.keys()
    # All contestants ran, or the reason is told; no memory-bound one lacks its explanation.
    if device.type == "cpu":
        assert contest.expected_bytes.keys() <= contest.limited_by.keys()
    for run in contest.runs.values():
        run()


def test_an_iteration_in_half_precision_is_a_contestant() -> None:
    """The case of the paper's networks on a GPU, here without graphs and with small networks."""
    import bench_coop

    case = bench_coop.graph_case(
        "digits-small", (1, 8, 8), device="cpu", cuda_graph=False, batch_size=4
    )
    contest = harness.checked(case, CPU, False)
    assert list(contest.runs) == [
        "ours", "ours, operator by operator", "ours, bfloat16", "reference, randn"
    ]  # fmt: skip
    assert list(contest.missing) == ["ours, bfloat16, compiled"]
    for run in contest.runs.values():
        run()


def test_names_are_unique_and_cover_every_family() -> None:
    names = [c.name for c in suite.all_cases()]
    assert len(set(names)) == len(names)
    assert {n.partition("/")[0] for n in names} >= {
        "langevin", "affine_coupling", "mixture_logistic", "attention", "concat_elu",
        "gate_add_norm", "weight_norm", "chain", "flowpp", "coop",
    }  # fmt: skip


def test_pytest_runs_the_cases_of_the_suite() -> None:
    """`pytest benchmarks/ --benchmark-only` and `coopflow bench`: one list of cases."""
    files = {path.stem for path in Path(harness.__file__).parent.glob("bench_*.py")}
    assert files == set(suite.MODULES)
    for name in suite.MODULES:
        module = importlib.import_module(name)
        tests = [f for n, f in inspect.getmembers(module) if n.startswith("test_")]
        assert ["case" in inspect.signature(test).parameters for test in tests] == [True], name
        function = mock.Mock(module=module, fixturenames=["benchmark", "case", "device"])
        pytest_generate_tests(function)
        assert function.parametrize.call_args.args == ("case", module.SUITE_CASES), name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_gpu_check_measures_every_case(device: str) -> None:
    script = Path(harness.__file__).with_name("gpu_check.sh").read_text()
    stages = script[script.index("stage_bench()") : script.index("stage_profile()")]
    says = f'PYTHON=true; suite() {{ echo "$@"; }}\n{stages}\nstage_bench; stage_models'
    root = Path(harness.__file__).parents[1]
    done = subprocess.run(
        ["bash", "-c", says], cwd=root, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) == 2
    found = [
        case.name
        for patterns in done.stdout.splitlines()
        for case in suite.select(patterns.split(), device, False)
    ]
    assert sorted(found) == sorted(c.name for c in suite.all_cases() if device in c.devices)


def test_bytes_are_counted_operator_by_operator() -> None:
    import bench_affine_coupling as affine
    import bench_langevin as langevin

    x, grad = torch.rand(8, 1024), torch.rand(8, 1024)
    runs, _ = langevin.contestants(x, grad, False)
    for name in ("in-place eager", "naive eager"):
        assert harness.counted_bytes(runs[name]) == langevin.BYTES[name] * x.nbytes
    for what, factor in (("forward", 9), ("inverse", 11)):
        expected = affine.case(what, 8, 1024).build(CPU, False).expected_bytes
        assert expected["eager"] == pytest.approx(factor * x.nbytes, rel=0.01)  # and the sums


def test_flops_are_those_of_products_and_convolutions() -> None:
    a, b = torch.rand(3, 5), torch.rand(5, 7)
    x, weight = torch.rand(2, 3, 8, 8), torch.rand(4, 3, 3, 3)
    assert harness.counted_flops(lambda: (a @ b).sin()) == 2 * 3 * 5 * 7
    convolution = 2 * 2 * 4 * 64 * 3 * 9
    assert harness.counted_flops(lambda: torch.conv2d(x, weight, padding=1)) == convolution


def test_a_share_below_60_percent_says_why() -> None:
    case = make_case()
    contest = harness.Contest({}, lambda: None, {"a": 10**9}, {"a": "arithmetic"}, flops=10**9)

    def facts(seconds: float, expected: int = 10**9, **replaced: Any) -> Any:
        contest.expected_bytes = {"a": expected}
        return harness.facts(case, contest, "a", seconds, LIMITS)

    assert facts(0.2)["share_of_copy"] == pytest.approx(0.5)
    assert facts(0.2)["limited_by"] == "arithmetic"
    assert "limited_by" not in facts(0.15)
    assert facts(1e-3, 10**4)["limited_by"].startswith("calls and launches: its bytes take 1 µs")
    contest.limited_by = {}
    assert facts(0.2)["limited_by"] == "not explained"
    assert facts(0.2)["share_of_matmul"] == pytest.approx(0.05)
    contest.low_precision = True
    assert facts(0.2)["share_of_matmul"] == pytest.approx(0.025)


def test_nothing_computes_in_tf32() -> None:
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    with harness.full_float32():
        assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "highest"
    assert (torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()) == before


@pytest.mark.usefixtures("toy_suite")
def test_results_are_in_pytest_benchmarks_format(tmp_path: Path) -> None:
    suite.run(quick=True, out=tmp_path / "new", cases=["toy/fp32/64x64"])
    written = report.load(tmp_path / "new" / "results.json")
    for field in ("machine_info", "commit_info", "benchmarks", "datetime", "version"):
        assert field in written
    ours, twin = written["benchmarks"]
    fields = {"min", "max", "mean", "stddev", "median", "iqr", "q1", "q3", "ops", "rounds"}
    assert fields | {"p20", "p80", "iterations"} <= ours["stats"].keys()
    assert ours["group"] == twin["group"] == "toy/fp32/64x64"
    bandwidth = 8 * 4096 / ours["stats"]["median"]
    assert ours["extra_info"]["share_of_copy"] == pytest.approx(bandwidth / 1e10)
    assert written["not_measured"][0]["reason"] == "not installed"
    assert "not measured: not installed" in report.table(written)
    assert "| toy/fp32/64x64 | ours | 0.0328 |" in report.details(written)
    # And that package reads it.
    path = tmp_path / "new" / "results.json"
    command = [sys.executable, "-m", "pytest_benchmark", "compare", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "toy/fp32/64x64" in done.stdout
    assert re.search(r"^twin ", done.stdout, re.M)


def test_a_failed_case_does_not_stop_the_others(
    toy_suite: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> None:
        raise AssertionError("twin: off by one")

    right = toy_suite[0]
    toy_suite[0] = make_case(right.name, wrong)
    assert suite.main(["--quick", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert f"{right.name}\n  FAILED: WrongResultError" in printed.out
    assert "1 cases failed" in printed.err
    first = report.load(tmp_path / "results.json")
    assert {r["group"] for r in first["benchmarks"]} == {toy_suite[1].name}
    assert "off by one" in report.table(first)
    toy_suite[0] = right
    assert suite.main(["--quick", "--out", str(tmp_path), "--resume"]) == 0
    second = report.load(tmp_path / "results.json")
    assert second["failed"] == []
    assert len(second["finished"]) == 2
    toy_suite[1] = make_case(toy_suite[1].name, wrong)
    assert cli.main(["bench", "--quick", "--device", "cpu", "--out", str(tmp_path / "b")]) == 1
    assert "1 cases failed" in capsys.readouterr().err
    assert "off by one" in (tmp_path / "b" / "table.md").read_text()


@pytest.mark.usefixtures("toy_suite")
def test_results_of_two_setups_are_not_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suite.run(quick=True, out=tmp_path)
    with pytest.raises(ValueError, match="--quick was True and is False: these results need two"):
        suite.run(out=tmp_path, resume=True)
    monkeypatch.setattr(harness, "commit", lambda: {"id": "another", "dirty": False})
    with pytest.raises(ValueError, match=r"the commit was .* and is another"):
        suite.run(quick=True, out=tmp_path, resume=True)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as results"):
        suite.run(quick=True, out=tmp_path, resume=True)


@pytest.mark.usefixtures("toy_suite")
def test_a_resumed_run_says_which_case_is_from_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command of one run and what failed in it are not those of the next."""
    names = ["toy/fp32/64x64", "toy/fp32/other"]
    for i, name in enumerate(names):
        monkeypatch.setattr(suite, "command_line", lambda i=i: f"command {i}")
        monkeypatch.setattr(suite, "measured_limits", lambda *_, i=i: LIMITS | {"number": i})
        suite.run(quick=True, out=tmp_path, cases=[name], resume=True)
    found = report.load(tmp_path / "results.json")
    assert [(r["command"], r["cases"], r["limits"]["number"]) for r in found["runs"]] == [
        ("command 0", names[:1], 0), ("command 1", names[1:], 1),
    ]  # fmt: skip
    text = report.provenance(found)
    for i, name in enumerate(names):
        assert f"`command {i}`." in text.partition(f"`{name}`")[0].split("\n\n")[-2]
    assert suite.run(quick=True, out=tmp_path, resume=True) == found


def test_runs_of_one_machine_are_merged(
    toy_suite: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    right, names = toy_suite[0], [case.name for case in toy_suite]

    def wrong() -> None:
        raise AssertionError("off by one")

    toy_suite[0] = make_case(right.name, wrong)
    first = suite.run(quick=True) | {"note": "One line was mended."}
    toy_suite[0] = right
    second = suite.run(quick=True, cases=[right.name])
    assert [f["case"] for f in first["failed"]] == [right.name]
    paths = [tmp_path / f"{name}.json" for name in ("out", "first", "second")]
    for path, content in zip(paths[1:], (first, second), strict=True):
        path.write_text(json.dumps(content))
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, paths)])
    assert merge.main() == 0
    both = report.load(paths[0])
    assert both["failed"] == []
    assert sorted(both["finished"]) == sorted(names)
    assert both["benchmarks"] == json.loads(json.dumps(first["benchmarks"] + second["benchmarks"]))
    assert report.provenance(both).count("One line was mended.") == 1
    report.write(both, tmp_path)
    with pytest.raises(ValueError, match=f"measured in both runs: {right.name}"):
        merge.merged(both, second)
    paths[2].write_text(json.dumps(second | {"commit_info": {"id": "another", "dirty": False}}))
    assert merge.main() == 1
    assert "the commit was" in capsys.readouterr().err


def test_a_copy_without_history_names_its_own_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not that of a repository which it lies in."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.setattr(harness, "ROOT", tmp_path / "copy")
    monkeypatch.setenv("COOPFLOW_COMMIT", "abc")
    assert harness.commit() == {"id": "abc", "dirty": None}


def test_an_interrupted_run_keeps_what_it_finished(
    toy_suite: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(device: torch.device, with_compile: bool) -> Any:
        raise KeyboardInterrupt

    whole = toy_suite[1]
    toy_suite[1] = harness.Case(whole.name, interrupt, 1, quick=True)
    assert suite.main(["--quick", "--out", str(tmp_path)]) == 130
    assert "1 finished cases are in" in capsys.readouterr().err
    path = tmp_path / "results.json"
    first = report.load(path)
    assert first["finished"] == [toy_suite[0].name]
    toy_suite[1] = whole
    assert suite.main(["--quick", "--out", str(tmp_path)]) == 1
    assert "--resume" in capsys.readouterr().err
    assert suite.main(["--quick", "--out", str(tmp_path), "--resume"]) == 0
    second = report.load(path)
    assert second["finished"] == [c.name for c in toy_suite]
    assert second["benchmarks"][:2] == first["benchmarks"]


@pytest.mark.usefixtures("toy_suite")
def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="case must match one of toy"):
        suite.run(quick=True, cases=["nothing/*"])
    with pytest.raises(ValueError, match="device must be cpu or cuda"):
        suite.run("meta")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="out cannot be written"):
        suite.run(quick=True, out=tmp_path / "file")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no CUDA here"):
            suite.run("cuda")
        assert cli.main(["bench", "--device", "cuda"]) == 1
        assert "no CUDA" in capsys.readouterr().err


@pytest.mark.usefixtures("toy_suite")
def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--quick", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    assert "toy/fp32/other" in capsys.readouterr().out
    assert (tmp_path / "results.json").is_file()
    assert "| toy/fp32/64x64 | twin |" in (tmp_path / "table.md").read_text()


@pytest.fixture
def measured(toy_suite: list[Any]) -> Any:
    return suite.run(quick=True)


def set_ratio(result: Any, low: float, middle: float, high: float) -> None:
    for record in result["benchmarks"]:
        if record["name"] == "twin":
            record["extra_info"]["ratio_to_ours"] = {"p20": low, "median": middle, "p80": high}


def test_compare_tells_regressions_from_noise(
    measured: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    set_ratio(measured, 4.5, 5.0, 5.5)
    noisy, slower = copy.deepcopy(measured), copy.deepcopy(measured)
    set_ratio(noisy, 4.2, 4.4, 4.6)
    set_ratio(slower, 3.0, 3.2, 4.4)
    assert compare.regressions(measured, noisy) == []
    assert compare.regressions(measured, slower) == [
        "toy/fp32/64x64: twin / ours went from 5.00 to 3.20",
        "toy/fp32/other: twin / ours went from 5.00 to 3.20",
    ]
    paths = [tmp_path / "base.json", tmp_path / "new.json"]
    for path, result in zip(paths, (measured, slower), strict=True):
        path.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, paths)])
    assert compare.main() == 1
    slower["benchmarks"] = [r for r in slower["benchmarks"] if r["group"] == "toy/fp32/64x64"]
    paths[1].write_text(json.dumps(slower))
    assert compare.main() == 1
    assert f"only in {paths[0]}: toy/fp32/other" in capsys.readouterr().out
    paths[1].write_text("{")
    assert compare.main() == 2
    assert "cannot be read as results" in capsys.readouterr().err


def test_plots(measured: Any, tmp_path: Path) -> None:
    report.write(measured, tmp_path)
    for name in ("ratios.png", "sizes.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_device_profile(device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import device_profile

    problems = {"free score": device_profile.PROBLEMS["free score"]}
    monkeypatch.setattr(device_profile, "PROBLEMS", problems)
    if device.type == "cpu":  # two kernels a step, each of 3 µs
        events = [SimpleNamespace(count=800, device_time_total=2400.0)]
        monkeypatch.setattr(device_profile, "kernels", lambda *_: events)
    device_profile.steps(device)
    lines = capsys.readouterr().out.splitlines()
    labels = ["{}", "{'on_nonfinite': 'ignore'}", "plain loop"]
    assert [line[22:].split("  ")[0] for line in lines] == labels
    for line in lines[:2]:
        (counted,) = re.findall(r"([\d.]+) kernels", line)
        assert float(counted) > 1
        assert device.type == "cuda" or line.endswith("2.0 kernels, busy 6.00 µs")


def test_device_profile_of_iterations_and_of_every_kernel(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import device_profile

    free_score = device_profile.PROBLEMS["free score"]
    monkeypatch.setattr(device_profile, "PROBLEMS", {})
    monkeypatch.setattr(device_profile, "PAPERS_ENERGY", free_score)
    monkeypatch.setattr(device_profile, "ITERATIONS", device_profile.ITERATIONS[:2])
    if device.type == "cpu":
        event = SimpleNamespace(count=800, device_time_total=2400.0, key="update")
        monkeypatch.setattr(device_profile, "kernels", lambda *_: [event])
        monkeypatch.setattr(
            device_profile, "add_graph", lambda name, run, runs, missing: runs.update({name: run})
        )
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 2**30)
    device_profile.account(device)
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert [line.split(", ")[2].split()[0] for line in heads] == ["ours", "graph"]
    if device.type == "cpu":
        assert all(line.endswith("2.0 kernels, busy 6.00 µs") for line in heads)
        assert lines.count("        2.00 ×     3.00 µs  update") == 2
    device_profile.iterations(device, "digits-small", {"data": "digits"})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", {}")[0] for line in lines[::2]] == ["reference, randn", "ours"]
    assert all("flow step" in line for line in lines[1::2])


def test_device_profile_goes_on_after_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    import device_profile

    monkeypatch.setattr(device_profile, "ITERATIONS", (("one", {}), ("other", {})))
    monkeypatch.setattr(device_profile, "_failed", [])
    settings = {"data": "digits"}
    device_profile.iterations(torch.device("cpu"), "digits-small", settings)  # without statistics
    assert device_profile._failed == ["one", "other"]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["one, {}", "other, {}"]


def test_readme_agrees_with_the_committed_results() -> None:
    text = report.README.read_text()
    assert report.with_block(text, report.readme_block(report.committed())) == text


def test_readmes_rows_are_cases_of_the_suite() -> None:
    names = {
        device: {c.name for c in suite.all_cases() if device in c.devices}
        for device in ("cpu", "cuda")
    }
    assert len(report.README_ROWS) == 12
    for row in report.README_ROWS:
        assert {d for d, (case, _) in row.cells.items() if case in names[d]} == {"cpu", "cuda"}
    # No contestant's name went stale: all that a case has stand in the committed results, but for
    # one that the first run on a GPU had not.
    for found in report.committed().values():
        cases, device = report.by_case(found), found["machine_info"]["device"]
        for row in report.README_ROWS:
            case, contestants = row.cells[device]
            newer = {"published bisection"} if found["datetime"] < "2026-11-29" else set()
            assert case not in cases or set(contestants) - newer <= cases[case].keys()


def test_readmes_cells(measured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs first; of several contestants the fastest; what has no figure says so."""
    cell, none = ("toy/fp32/64x64", ("twin", "third")), ("toy/fp32/none", ("twin",))
    row = report.Row("what", "others", {"cpu": cell, "cuda": none})
    monkeypatch.setattr(report, "README_ROWS", (row,))
    set_ratio(measured, 1.5, 2.0, 2.5)
    measured["machine_info"]["load_average"] = 0.0
    third = copy.deepcopy(measured["benchmarks"][1]) | {"name": "third"}
    third["extra_info"]["ratio_to_ours"] = {"p20": 1.0, "median": 1.5, "p80": 3.0}
    measured["benchmarks"].append(third)
    gpu = copy.deepcopy(measured)
    gpu["machine_info"]["device"] = "cuda"
    text = report.readme_block({"a-cpu": measured, "b-gpu": gpu})
    assert "[b-gpu](benchmarks/results/b-gpu/table.md) | [a-cpu]" in text
    assert "| what | others | not measured | 1.50 (1.00 to 3.00) |" in text
    assert "provisional" not in text
    assert "GPU: not measured." not in text
    measured["machine_info"]["load_average"] = 1e3
    text = report.readme_block({"a-cpu": measured, "b-gpu": gpu})
    assert "| what | others | not measured | 1.50 (1.00 to 3.00) * |" in text
    assert "*: provisional" in text


def test_readme_needs_its_markers(measured: Any) -> None:
    with pytest.raises(ValueError, match="must hold"):
        report.with_block("no markers", "block")
    block = report.readme_block({"toy": measured})
    text = report.with_block(f"a\n{report.BEGIN}\nold\n{report.END}\nb", block)
    assert "old" not in text
    assert text.endswith(f"GPU: not measured.\n{report.END}\nb")
