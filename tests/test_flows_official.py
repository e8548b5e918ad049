"""The authors' published networks under our names: parity, strictness, the way back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from coopflow_ext import Key, cli, coop, energies, flows, ops, reference
from coopflow_ext.flows.official import export_official, load_official

DATA = Path(__file__).parent / "data"
DOUBLE = torch.float64


def _state(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("state."): v for k, v in golden.items() if k.startswith("state.")}


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(DATA / "flowpp_small.safetensors")


@pytest.fixture(scope="module")
def golden_energy() -> dict[str, Tensor]:
    return load_file(DATA / "ebm_small.safetensors")


def _golden_flow(golden: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> flows.Flow:
    flow, energy = load_official({"flow_net": _state(golden)}, (3, 16, 16))
    assert energy is None
    return flow.to(dtype).eval()


def test_sizes_are_inferred(golden, golden_energy):
    checkpoint = {"flow_net": _state(golden), "ebm_net": _state(golden_energy), "epoch": 7}
    with pytest.raises(ValueError, match="ebm_net is for"):
        load_official(checkpoint, (3, 16, 16))
    flow = _golden_flow(golden)
    coupling = flow.transform.transforms[1].transforms[2]
    assert coupling.components == 8
    assert len(coupling.net.blocks) == 1
    assert flow.dequantize.transform.transforms[2].components == 32
    assert flow.legacy_contrast
    assert coupling.legacy_cdf_clamp
    none, energy = load_official({"ebm_net": _state(golden_energy)})
    assert none is None
    assert energy.width == 8


# float32: the networks are about 60 layers deep and their values reach 7 (z), 26 (y) and 900
# (log-det). Data → latent is well conditioned: 12 ulp of 7 in z, and 4e-7 of the log-det. In the
# other direction flat regions of the CDF stretch rounding by up to 1/F' ~ 100; the authors' own
# float32 is 0.02 off there.
# float64: data → latent to the accumulated rounding. In the other direction their bisection stops
# at steps of 1e-10, which 7 layers stretch to some 1e-8; the next test uses the same bisection.
@pytest.mark.parametrize(
    ("dtype", "z_tolerance", "y_tolerance", "ladj_tolerances"),
    [(torch.float32, 3e-5, 1e-3, (5e-4, 5e-4)), (DOUBLE, 1e-12, 1e-7, (1e-11, 1e-7))],
)
def test_both_directions_equal_the_authors_network(
    golden, dtype, z_tolerance, y_tolerance, ladj_tolerances
):
    flow = _golden_flow(golden, dtype)
    with torch.no_grad():
        z, ladj = flow.call_and_ladj(golden["in.x"].to(dtype), eps=golden["in.dequant_u"].to(dtype))
        y, ladj_back = flow.inverse_and_ladj(golden["in.z"].to(dtype))
    for ours, name, tolerance in (
        (z, "out.z_float64", z_tolerance),
        (ladj, "out.sldj_float64", ladj_tolerances[0]),
        (y, "out.y_logit_float64", y_tolerance),
        (ladj_back, "out.reverse_sldj_float64", ladj_tolerances[1]),
    ):
        error = (ours.double() - golden[name]).abs().max().item()
        assert error <= tolerance, name


def test_sampling_with_the_authors_bisection_equals_theirs_to_rounding(golden, monkeypatch):
    """With the published bisection in the place of our root finder nothing but rounding is left,
    1e-11, except in the few elements where rounding turns one of its last comparisons: they end
    another step of up to 1e-10 away (which elements depends on the CPU's convolutions)."""
    name = "mixture_logistic_coupling_inverse"
    monkeypatch.setattr(ops, name, getattr(reference, name))
    with torch.no_grad():
        y, ladj = _golden_flow(golden, DOUBLE).inverse_and_ladj(golden["in.z"].double())
    error = (y - golden["out.y_logit_float64"]).abs()
    assert (error <= 1e-11).double().mean() > 0.99
    assert error.max() <= 1e-9
    assert (ladj - golden["out.reverse_sldj_float64"]).abs().max() <= 1e-9


def test_nll_and_samples_equal_the_published_float32(golden):
    """These are stored in float32 only: 1e-6 of an NLL of 5,423; 2·sigmoid(y) − 1 of an y that
    their bisection has to 4e-4."""
    flow = _golden_flow(golden)
    with torch.no_grad():
        nll = -flow.log_prob(golden["in.x"], eps=golden["in.dequant_u"]).mean()
        x = flow.to_data(flow.inverse_and_ladj(golden["in.z"])[0])
    torch.testing.assert_close(nll, golden["out.nll"][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(x, golden["out.x"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
def test_round_trip_of_the_authors_network(golden, dtype):
    flow = _golden_flow(golden, dtype)
    x, eps = golden["in.x"].to(dtype), golden["in.dequant_u"].to(dtype)
    with torch.no_grad():
        z, _ = flow.call_and_ladj(x, eps=eps)
        y, _ = flow.inverse_and_ladj(z)
        v, _ = flow.dequantize.call_and_ladj((x + 1) / 2, eps)
        logits, _ = flow.logit.call_and_ladj(v)
    torch.testing.assert_close(y, logits, rtol=0, atol=1e-8 if dtype == DOUBLE else 1e-3)
    torch.testing.assert_close(y.float(), golden["out.roundtrip_logit"], rtol=0, atol=1e-3)


def test_energy_equals_the_authors_network(golden_energy):
    _, energy = load_official({"ebm_net": _state(golden_energy)})
    f = -energy(golden_energy["in.x"])
    torch.testing.assert_close(f, golden_energy["out.f"], rtol=1e-5, atol=1e-5)


def test_names_and_shapes_of_the_full_models():
    """Every name and shape of the authors' CIFAR-10 checkpoint, there and back."""
    shapes = json.loads((DATA / "official_state_dict_shapes.json").read_text())
    checkpoint = {
        net: {"module." + name: torch.zeros(shape) for name, shape in names.items()}
        for net, names in shapes.items()
    }
    checkpoint["flow_net"]["module.bounds"].fill_(0.9)
    flow, energy = load_official(checkpoint)
    assert sum(p.numel() for p in flow.parameters()) == 28_784_792
    assert sum(p.numel() for p in energy.parameters()) == 17_129_444
    back = export_official(flow, energy)
    for net, names in shapes.items():
        assert {name: list(t.shape) for name, t in back[net].items()} == names


def test_export_gives_back_the_same_tensors(golden, golden_energy, tmp_path):
    flow = _golden_flow(golden)
    _, energy = load_official({"ebm_net": _state(golden_energy)})
    exported = export_official(flow, energy)
    for net, source in (("flow_net", golden), ("ebm_net", golden_energy)):
        expected = _state(source)
        assert set(exported[net]) == set(expected)
        assert all(torch.equal(exported[net][name], value) for name, value in expected.items())
    torch.save({"flow_net": exported["flow_net"], "epoch": 3}, tmp_path / "ckpt.pth")
    again, none = load_official(tmp_path / "ckpt.pth", (3, 16, 16), legacy_contrast=False)
    assert none is None
    assert not again.legacy_contrast
    assert all(
        torch.equal(a, b)
        for a, b in zip(again.state_dict().values(), flow.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": 0},
        {"attention": False, "channels": 6},
        {"scales": ((1, 1),)},
        {"scales": ((0, 1), (0, 1), (2, 0))},
        {"recompute": True},
    ],
)
def test_any_flowpp_goes_there_and_back(options):
    small = {"channels": 4, "blocks": 1, "components": 3, "dequant_components": 2}
    flow = flows.flowpp((2, 8, 8), **(small | {"scales": ((0, 1),)} | options)).eval()
    x, eps = torch.rand(2, 2, 8, 8) * 2 - 1, torch.randn(2, 2, 8, 8)
    back, _ = load_official(export_official(flow, None), (2, 8, 8))
    assert torch.equal(back.eval().log_prob(x, eps=eps), flow.log_prob(x, eps=eps))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, golden) -> Path:
    """A checkpoint of both models for 16×16 images, with the authors' names."""
    torch.manual_seed(0)
    energy = energies.ResEnergy(3, width=4, image_size=16)
    nets = {"flow_net": _state(golden)} | export_official(None, energy)
    path = tmp_path_factory.mktemp("official") / "checkpoint.pth"
    torch.save(
        {name: {f"module.{k}": v for k, v in net.items()} for name, net in nets.items()}, path
    )
    return path


def test_a_coopflow_from_the_authors_checkpoint_survives_our_format(checkpoint, tmp_path):
    model = coop.CoopFlow.from_official(checkpoint, (3, 16, 16))
    model.save(tmp_path / "ours.safetensors")
    again = coop.CoopFlow.load(tmp_path / "ours.safetensors")
    assert again.flow.legacy_contrast
    for ours, theirs in zip(
        model.sample_pairs(2, Key(1)), again.sample_pairs(2, Key(1)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)
    with pytest.raises(ValueError, match=r"needs both .* only flow_net; load_official"):
        coop.CoopFlow.from_official({"flow_net": torch.load(checkpoint)["flow_net"]}, (3, 16, 16))


def test_import_official_leaves_a_run_to_sample_from(checkpoint, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["import-official", str(checkpoint), "--out", str(run), "--image-shape", "3,16,16"]
    assert cli.main(arguments) == 0
    assert coop.RunFolder.open(run).config.flow == "flowpp"
    picture = tmp_path / "samples.png"
    assert cli.main(["sample", str(run), "--n", "2", "--out", str(picture)]) == 0
    assert picture.exists()
    assert cli.main(arguments) == 1
    assert "exists" in capsys.readouterr().err


def test_loaded_flows_do_not_initialise_again(golden):
    flow = _golden_flow(golden).train()
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    with torch.no_grad():
        flow.log_prob(golden["in.x"])
    assert all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


def _without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != name}


def test_checkpoints_that_do_not_fit_are_refused(golden, golden_energy, tmp_path):
    state, ebm = _state(golden), _state(golden_energy)
    norm = "flows.checkers.0.mean"
    cases = [
        ({}, "must hold flow_net or ebm_net"),
        ({"flow_net": _without(state, norm)}, r"1 missing \['flows.checkers.0.mean'\]"),
        ({"flow_net": state | {"extra": torch.zeros(1)}}, r"1 unknown \['extra'\]"),
        ({"flow_net": state | {norm: torch.zeros(1, 5, 1, 1)}}, "flows.checkers.0.mean must have"),
        ({"flow_net": _without(state, "bounds")}, "bounds is missing"),
        ({"flow_net": {"bounds": torch.ones(1)}}, "no layer of a Flow"),
        ({"flow_net": state | {"note": "hello"}}, "must hold tensors only, got str for 'note'"),
        ({"flow_net": [1, 2]}, "must be a state dict"),
        ({"ebm_net": _without(ebm, "f.5.bias")}, "missing"),
        ({"ebm_net": {"f.1.weight": torch.zeros(1)}}, "f.0.weight is missing"),
    ]
    for checkpoint, message in cases:
        shape = (3, 16, 16) if "flow_net" in checkpoint else (3, 32, 32)
        with pytest.raises(ValueError, match=message):
            load_official(checkpoint, shape)
    with pytest.raises(ValueError, match=r"image_shape \(1, 16, 16\) does not fit"):
        load_official({"flow_net": state}, (1, 16, 16))
    with pytest.raises(ValueError, match="only a flow made by flowpp"):
        export_official(flows.realnvp(2), None)
    with pytest.raises(ValueError, match=r"256 grey levels .* got levels=17"):
        export_official(flows.flowpp((1, 4, 4), channels=4, blocks=0, levels=17), None)
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "missing.pth")


class _Payload:
    """Something that a checkpoint must not be able to smuggle in."""


def test_files_with_more_than_tensors_are_refused(tmp_path):
    torch.save({"flow_net": {"bounds": _Payload()}}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_official(tmp_path / "evil.pth")
    torch.save(torch.zeros(1), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="must hold a dict"):
        load_official(tmp_path / "tensor.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "tensor.pth").read_bytes()[:100])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("cut", "text", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.pth holds more than tensors, or is dama"):
            load_official(tmp_path / f"{name}.pth")
