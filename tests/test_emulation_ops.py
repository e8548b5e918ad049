"""Every CUDA kernel, run on the CPU by the emulation, against the CPU ops."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cuda_emulation import harness
from cuda_emulation.cases import (
    BFLOAT16_TOLERANCE,
    CASES,
    COVERING_SHAPES,
    DTYPES,
    SHAPES,
    Inputs,
    Results,
)

import coopflow_ext as cf

pytestmark = pytest.mark.timeout(1200)  # the first test compiles

# Those that fast tests leave to the covering one.
SLOW_DTYPES = (torch.float16, torch.float64)
FAST_DTYPES = pytest.mark.parametrize(
    "dtype",
    [pytest.param(d, marks=[pytest.mark.slow] * (d in SLOW_DTYPES)) for d in DTYPES],
    ids=str,
)


@pytest.fixture(scope="module")
def emulation() -> harness.Emulation:
    return harness.load()


def _run(
    emulation: harness.Emulation,
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    aligned: bool,
    *,
    order: int = 0,
    device: int = harness.FEW_BLOCKS,
) -> Results:
    with emulation.settings(order=order, device=device), emulation.ops():
        return CASES[name](Inputs(dtype, shape, aligned))


def _assert_equal(results: Results, expected: Results, what: object) -> None:
    assert results.keys() == expected.keys()
    for key, value in results.items():
        assert torch.equal(value, expected[key]), f"{what}: {key}"


def _assert_agrees(results: Results, expected: Results, what: object) -> None:
    """Equal, but for what a result's name says of it: see cases.py."""
    assert results.keys() == expected.keys()
    for key, value in results.items():
        exact = expected[key]
        ulps = 64.0 if "(sum)" in key else 2.0 if "(after a sum)" in key else 0.0
        tolerance = ulps * torch.finfo(value.dtype).eps if ulps else 0.0
        if "(bfloat16)" in key:
            tolerance = BFLOAT16_TOLERANCE
        if "(small terms)" in key:
            # 2^-110 over a sum of 2^-55, times factors of at most 2^10 that the element's other
            # gradients have as well: where these are larger, that is nothing.
            largest = exact.abs().amax(1, keepdim=True)
            value = torch.where((value - exact).abs() <= 2.0**-45 * largest, exact, value)
        torch.testing.assert_close(
            value, exact, rtol=tolerance, atol=tolerance, equal_nan=True,
            msg=lambda m, k=key: f"{what}: {k}: {m}",
        )  # fmt: skip


@FAST_DTYPES
@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_cpu_op(
    emulation: harness.Emulation, name: str, dtype: torch.dtype
) -> None:
    for shape in SHAPES:
        for aligned in (True, False):
            expected = CASES[name](Inputs(dtype, shape, aligned))
            _assert_agrees(_run(emulation, name, dtype, shape, aligned), expected, (shape, aligned))


@FAST_DTYPES
@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_order_or_grid(
    emulation: harness.Emulation, name: str, dtype: torch.dtype
) -> None:
    """Bitwise, sums included: any order of blocks, warps and lanes, any number of blocks."""
    for shape in ((7, 36), (2, 16391)):
        expected = _run(emulation, name, dtype, shape, True)
        for order in (1, 2):
            _assert_equal(
                _run(emulation, name, dtype, shape, True, order=order), expected, (shape, order)
            )
        for device in (harness.ONE_BLOCK, harness.ALL_BLOCKS):
            _assert_equal(
                _run(emulation, name, dtype, shape, True, device=device), expected, (shape, device)
            )


@FAST_DTYPES
@pytest.mark.parametrize("name", [name for name in CASES if not name.startswith("mlp")])
def test_every_kernel_fits_the_gpu_with_the_least_shared_memory(
    emulation: harness.Emulation, name: str, dtype: torch.dtype
) -> None:
    """sm_86, sm_89 and sm_120. Networks that do not fit are refused by what they need."""
    shape = (2, 7)
    expected = CASES[name](Inputs(dtype, shape, True))
    found = _run(emulation, name, dtype, shape, True, device=harness.LITTLE_MEMORY)
    _assert_agrees(found, expected, shape)


@pytest.mark.slow
def test_every_kernel_and_template_variant_runs(emulation: harness.Emulation) -> None:
    """A new kernel needs a case in cuda_emulation/cases.py that reaches all its variants."""
    emulation.take_launches()
    for name in CASES:
        for dtype in DTYPES:
            for shape in COVERING_SHAPES:
                for aligned in (True, False):
                    results = _run(emulation, name, dtype, shape, aligned)
                    expected = CASES[name](Inputs(dtype, shape, aligned))
                    _assert_agrees(results, expected, (name, dtype, shape, aligned))
    launched = {launch.kernel for launch in emulation.take_launches()}
    missed = set(emulation.kernels.values()) - launched
    assert emulation.kernels
    assert not missed


@FAST_DTYPES
@pytest.mark.parametrize("name", CASES)
def test_one_misaligned_tensor(emulation: harness.Emulation, name: str, dtype: torch.dtype) -> None:
    """Each in turn, as a wide access needs all of them aligned. A CPU takes it all the same: what
    sees it is the sanitized build, with which test_emulation_checks.py runs this test."""
    everything = Inputs(dtype, (2, 8))
    CASES[name](everything)
    for alone in range(everything.placed):
        expected = CASES[name](Inputs(dtype, (2, 8), alone=alone))
        with emulation.ops():
            results = CASES[name](Inputs(dtype, (2, 8), alone=alone))
        _assert_agrees(results, expected, alone)


def test_what_no_thread_writes_is_nan(emulation: harness.Emulation) -> None:
    """No block runs, so each output is as it was allocated, by Python or by the library."""
    x, params = torch.zeros(3, 5), torch.zeros(3, 14, 5)
    rng = Inputs(torch.float32, (3, 5)).rng
    with emulation.settings(blocks=(1 << 40,)), emulation.ops():
        outputs = (
            cf.ops.normal(x.shape, rng),
            cf.ops.langevin_step(x, x, rng, drift=0.1),
            *cf.ops.affine_coupling(x, params[:, :2].contiguous()),
            *cf.ops.mixture_logistic_coupling(x, params),
            *emulation.raw.affine_coupling_backward(
                x, x[:, 0].contiguous(), x, params[:, :2].contiguous()
            ),
        )
    assert all(output.isnan().all() for output in outputs)


def test_grid_depends_on_the_threads_of_a_block(emulation: harness.Emulation) -> None:
    """Chains of 8 take blocks of 32 threads, of which the device holds 8, chains of 600 take 256,
    of which it holds 4; the first launch of a kernel must not decide for the others."""
    blocks = []
    for length in (8, 600, 8):
        x = torch.zeros(40, length)
        params = torch.zeros(40, 2, length)
        emulation.take_launches()
        with emulation.settings(), emulation.ops():
            cf.ops.affine_coupling(x, params)
        blocks += [launch.blocks for launch in emulation.take_launches()]
    assert blocks == [8, 4, 8]


@pytest.mark.parametrize("components", [4, 32, 33])
def test_an_element_of_a_mixture_does_not_depend_on_its_place(
    emulation: harness.Emulation, components: int
) -> None:
    """Bit by bit, whichever elements share its warp: alone, in the last and not full warp of a
    chain, and beside others whose searches take longer or whose inputs are not finite."""
    inputs = Inputs(torch.float32, (3, 37))
    x, params = 3 * inputs.normal(), inputs.normal(3, 2 + 3 * components, 37)
    params[:, 2 + components : 2 + 2 * components] *= 2
    params[:, 2 + 2 * components :] -= 1
    x[1, 5], params[1, 7, 9] = torch.nan, torch.inf

    def run(x: torch.Tensor, params: torch.Tensor) -> list[torch.Tensor]:
        results = []
        for op in (cf.ops.mixture_logistic_coupling, cf.ops.mixture_logistic_coupling_inverse):
            leaves = (x.clone().requires_grad_(), params.clone().requires_grad_())
            out, ladj = op(*leaves)
            results += [out.detach(), *torch.autograd.grad(out.sum() + ladj.sum(), leaves)]
        return results

    with emulation.settings(), emulation.ops():
        together = run(x, params)
        alone = run(x.reshape(-1, 1), params.movedim(1, 2).reshape(-1, params.shape[1], 1))
    for one, other in zip(alone, together, strict=True):
        expected = other if other.ndim == 2 else other.movedim(1, 2)
        torch.testing.assert_close(
            one.view(expected.shape), expected, rtol=0, atol=0, equal_nan=True
        )


ONE_LAUNCH: dict[str, dict[str, Any]] = {
    "mask": {},
    "limits": {"grad_clip": 0.5, "step_clip": 0.1, "clamp": (-1.0, 1.0), "is_score": True},
    "norm": {"grad_norm": 1.0},
    "statistics": {"stats": True},
    "centre": {"decay": 0.1, "pull": 0.1, "x_ref": True},
    "copy": {"x_low": True},
    "given noise": {"xi": True},
    "noise after": {"noise_when": 1, "clamp": (-1.0, 1.0)},
    "table": {"drift": True},
    "spread gradient": {"grad": True},
    "everything": {
        "grad_norm": 1.0, "stats": True, "decay": 0.1, "pull": 0.1, "x_ref": True, "x_low": True,
        "xi": True, "noise_when": 1, "clamp": (-1.0, 1.0), "drift": True, "grad": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ONE_LAUNCH)
@pytest.mark.parametrize("per_chain", [1, 2, 3, 784, 3072, 12_288, 16_384])
def test_a_step_is_one_launch(emulation: harness.Emulation, per_chain: int, name: str) -> None:
    """Whatever its options: chains that are not finite stop, as they do by default."""
    inputs = Inputs(torch.float32, (2, per_chain))
    x, batch = inputs.normal(), 2
    tensors = {
        "x_ref": inputs.normal(),
        "xi": inputs.normal(),
        "x_low": torch.empty(2, per_chain, dtype=torch.bfloat16),
        "stats": torch.empty(batch, 5),
        "drift": torch.rand(1, batch),
        "grad": inputs.normal().t().contiguous().t(),
    }
    options = {"drift": 0.1, "noise": 0.1, **ONE_LAUNCH[name]}
    options |= {
        key: tensors[key] for key, value in options.items() if value is True and key in tensors
    }
    grad = options.pop("grad", inputs.normal())
    active, frozen_at = torch.ones(batch, dtype=torch.bool), torch.zeros(batch).long()
    emulation.take_launches()
    with emulation.settings(), emulation.ops():
        cf.ops.langevin_step_(
            x, grad, inputs.rng, **options, active=active, freeze_nonfinite=True,
            frozen_at=frozen_at,
        )  # fmt: skip
    assert len(emulation.take_launches()) == 1


def test_a_whole_chain_is_one_launch(emulation: harness.Emulation) -> None:
    """And a second one where a mixture's table does not fit into a block's own memory."""
    inputs = Inputs(torch.float32, (3, 2))
    for components, launches in ((8, 1), (204, 1), (205, 2)):
        ones = torch.ones(components, 2)
        emulation.take_launches()
        with emulation.settings(), emulation.ops():
            cf.ops.analytic_langevin_chain(
                torch.zeros(3, 2), inputs.rng, energy="gaussian_mixture",
                tensors=[ones, ones, ones[:, 0].contiguous()], n_steps=7, drift=0.1, noise=0.1,
                thin=2, stats=True, freeze_nonfinite=True,
            )  # fmt: skip
        assert len(emulation.take_launches()) == launches


def test_a_driver_that_is_too_old_is_a_build_error(emulation: harness.Emulation) -> None:
    rng = Inputs(torch.float32, (3, 2)).rng
    with (
        emulation.ops(),
        emulation.settings(driver=12040),
        pytest.raises(cf.BuildError, match=r"^coopflow: .*CUDA 13 \(580 or newer\).*CUDA 12\.4"),
    ):
        cf.ops.normal((3, 2), rng)
    with emulation.ops(), emulation.settings(driver=13020):  # every driver of that CUDA will do
        assert cf.ops.normal((3, 2), rng).isfinite().all()


def test_a_chain_that_a_thread_cannot_hold_is_refused(emulation: harness.Emulation) -> None:
    inputs = Inputs(torch.float32, (3, 2))
    most = cf.ops.MOST_ELEMENTS_ON_CUDA
    for dim in (most, most + 1):
        options = {"energy": "double_well", "numbers": [1.0], "n_steps": 1, "drift": 0.1}
        with emulation.settings(), emulation.ops():
            if dim == most:
                cf.ops.analytic_langevin_chain(torch.zeros(3, dim), inputs.rng, **options)
                continue
            with pytest.raises(ValueError, match=f"x0: must have D <= {most} on CUDA, got {dim}"):
                cf.ops.analytic_langevin_chain(torch.zeros(3, dim), inputs.rng, **options)


@pytest.mark.parametrize(("layers", "launches"), [(1, 1), (60, 1), (61, 2), (121, 3)])
def test_layers_are_normed_by_few_launches(
    emulation: harness.Emulation, layers: int, launches: int
) -> None:
    """One for 60 layers, and one for those whose rows do not fill wide accesses. The layers in a
    launch are told apart."""
    torch.manual_seed(0)
    leaf = {"dtype": torch.float64, "requires_grad": True}
    shapes = [*((1 + i % 3, 8) for i in range(layers)), (2, 3)]
    directions = [torch.randn(shape, **leaf) for shape in shapes]
    gains = [torch.rand(shape[0], 1, **leaf) for shape in shapes]

    def normed() -> tuple[tuple[torch.Tensor, ...], list[int]]:
        emulation.take_launches()
        weights = cf.ops.weight_norm(directions, gains)
        launched = [len(emulation.take_launches())]
        loss = sum(w.sin().sum() * i for i, w in enumerate(weights))
        grads = torch.autograd.grad(loss, (*directions, *gains))
        return (*weights, *grads), [*launched, len(emulation.take_launches())]

    expected, _ = normed()
    with emulation.settings(), emulation.ops():
        results, launched = normed()
    assert launched == [launches + 1] * 2
    torch.testing.assert_close(results, expected)


def _network(*sizes: int) -> dict[str, list[torch.Tensor]]:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(n, m) for n, m in itertools.pairwise((*sizes, 1))]
    return {
        "weights": [layer.weight.detach() for layer in layers],
        "biases": [layer.bias.detach() for layer in layers],
    }


def test_chains_of_a_network_are_one_launch(emulation: harness.Emulation) -> None:
    """Of tiles as large as two multiprocessors need them; blocks of a warp for 16 units."""
    rng, network = Inputs(torch.float32, (3, 2)).rng, _network(2, 64, 64)
    options = {"activation": "silu", "drift": 0.1, "noise": 0.1, "stats": True, "thin": 1}
    launched = []
    for batch in (1, 16, 17, 32, 64):
        for n_steps in (0, 3):
            x0 = torch.zeros(batch, 2)
            emulation.take_launches()
            with emulation.settings(), emulation.ops():
                cf.ops.mlp_langevin_chain(x0, **network, rng=rng, n_steps=n_steps, **options)
            ((kernel, blocks),) = emulation.take_launches()
        launched.append((batch, kernel, blocks))
    assert launched == [
        (1, "mlp_chain_kernel<true, 1>", 1),
        (16, "mlp_chain_kernel<true, 1>", 2),
        (17, "mlp_chain_kernel<true, 2>", 2),
        (32, "mlp_chain_kernel<true, 2>", 2),
        (64, "mlp_chain_kernel<true, 4>", 2),
    ]


def test_chains_that_accept_their_moves_are_one_launch(emulation: harness.Emulation) -> None:
    rng, network = Inputs(torch.float32, (3, 2)).rng, _network(2, 64)
    options = {"accept_rng": rng, "n_steps": 7, "step_size": 0.5, "adapt_steps": 3, "stats": True}
    emulation.take_launches()
    with emulation.settings(), emulation.ops():
        cf.ops.analytic_mala_chain(
            torch.zeros(3, 2), rng, energy="double_well", numbers=[1.0], **options
        )
        cf.ops.mlp_mala_chain(torch.zeros(17, 2), **network, rng=rng, activation="elu", **options)
    assert emulation.take_launches() == [
        ("analytic_mala_kernel<DoubleWell<float>, float>", 1), ("mlp_mala_kernel<2>", 2),
    ]  # fmt: skip


@pytest.mark.parametrize("sizes", [(2, 64, 64, 64), (128, 64), (64, 128, 128, 128), (7, 1, 127)])
def test_wide_networks_agree_with_the_cpu_op(
    emulation: harness.Emulation, sizes: tuple[int, ...]
) -> None:
    """Every warp of a block has rows; memory that is nearly full has a smaller tile."""
    rng, network = Inputs(torch.float32, (3, 2)).rng, _network(*sizes)
    x0 = torch.linspace(-2, 2, 35 * sizes[0]).view(35, sizes[0])
    options = {"activation": "silu", "n_steps": 2, "drift": 0.1, "noise": 0.1}
    expected = cf.ops.mlp_langevin_chain(x0, **network, rng=rng, **options)
    with emulation.settings(device=harness.ONE_BLOCK), emulation.ops():
        result = cf.ops.mlp_langevin_chain(x0, **network, rng=rng, **options)
    assert torch.equal(result.x, expected.x)


# Passes through the banks of shared memory, over the fewest that the same words could take. Those
# of attention are its tiles on their way in and its weights, both transposed.
BANKS = {
    "analytic_chains": 1.0,
    "attention": 1.19,
    "attention_bfloat16": 1.1,
    "mlp_chain": 1.02,
    "mlp_chain_bfloat16": 1.03,
    "mlp_mala_chain": 1.02,
}


@pytest.mark.parametrize(
    "name",
    [n if n == "analytic_chains" else pytest.param(n, marks=pytest.mark.slow) for n in BANKS],
)
def test_shared_memory_has_few_bank_conflicts(emulation: harness.Emulation, name: str) -> None:
    if "checked" not in str(emulation.library):
        pytest.skip("this build has no race check")
    with emulation.counted_banks() as counts, emulation.ops():
        CASES[name](Inputs(torch.float32, (3, 5)))
    passes, floor = (sum(count[i] for count in counts) for i in (2, 3))
    assert floor > 0
    worst = max(counts, key=lambda count: count.passes - count.floor)
    assert passes <= BANKS[name] * floor, (passes, floor, emulation.place(worst.instruction))


def test_a_network_that_a_block_cannot_hold_is_refused(emulation: harness.Emulation) -> None:
    rng, sizes = Inputs(torch.float32, (3, 2)).rng, (2, 128, 128, 128, 128)
    needed, there = cf.ops.mlp_shared_bytes(sizes), 227 * 1024
    options = {"activation": "silu", "n_steps": 2, "drift": 0.1}
    message = f"weights: a tile of 8 chains needs {needed} bytes of shared memory.* {there}"
    with emulation.ops():
        with pytest.raises(ValueError, match=message):
            cf.ops.mlp_langevin_chain(torch.zeros(3, 2), **_network(*sizes), rng=rng, **options)
        wide = {name: [t.double() for t in given] for name, given in _network(2, 8).items()}
        with pytest.raises(TypeError, match=r"x0: must have dtype float32 on CUDA, got .*64"):
            cf.ops.mlp_langevin_chain(torch.zeros(3, 2).double(), **wide, rng=rng, **options)


def test_indices_beyond_32_bits(emulation: harness.Emulation) -> None:
    with emulation.settings(blocks=harness.FAR_BLOCKS):
        assert emulation.wrong_index() == ""


def test_tensor_of_more_than_2_to_the_31_elements(emulation: harness.Emulation) -> None:
    """One thread per item and few of the blocks: only a few pages of the tensor are touched."""
    if "sanitized" in str(emulation.library):
        pytest.skip("AddressSanitizer would mark every page of the tensor")
    batch, per_chain = (1 << 20) + 3, 2048
    x = torch.empty(batch, per_chain, dtype=torch.bfloat16)
    rng = Inputs(torch.bfloat16, (1, 1), True).rng
    last_block = batch * per_chain // 8 // 256 - 1  # a chain's 256 items are one block
    chains = (0, 1 << 19, last_block)
    with emulation.settings(device=harness.ALL_BLOCKS, blocks=chains):
        emulation.raw.normal_(x, rng)
    for chain in chains:
        expected = torch.empty(1, per_chain, dtype=torch.bfloat16)
        own = rng + torch.tensor([0, 0, chain])
        torch.ops.coopflow.normal_(expected, own)
        assert torch.equal(x[chain], expected[0]), chain
