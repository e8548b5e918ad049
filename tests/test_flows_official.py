"""The authors' published networks under our names: parity, strictness, the way back."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from coopflow_ext import Key, cli, coop, energies, flows, ops, reference
from coopflow_ext.flows.nets import Dropout
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
        {"dequant_blocks": 0},
        {"dequant_blocks": 0, "attention": False, "scales": ((0, 1), (1, 1))},
    ],
)
def test_any_flowpp_goes_there_and_back(options):
    small = {"channels": 4, "blocks": 1, "components": 3, "dequant_components": 2}
    flow = flows.flowpp((2, 8, 8), **(small | {"scales": ((0, 1),)} | options)).eval()
    x, eps = torch.rand(2, 2, 8, 8) * 2 - 1, torch.randn(2, 2, 8, 8)
    back, _ = load_official(export_official(flow, None), (2, 8, 8))
    assert torch.equal(back.eval().log_prob(x, eps=eps), flow.log_prob(x, eps=eps))


# --- their other files ----------------------------------------------------------------------------


def test_a_network_without_attention_has_one_layer_norm_a_block():
    """Theirs has ``norm_2`` only behind attention: names, and the formula."""
    torch.manual_seed(0)
    small = {"channels": 4, "blocks": 1, "components": 3, "dequant_blocks": 0}
    flow = flows.flowpp((2, 8, 8), **small, scales=((0, 1),), attention=False)
    names = export_official(flow, None)["flow_net"]
    assert any(".norm_1." in name for name in names)
    assert not any("norm_2" in name or "attn" in name for name in names)
    block = flow.transform.transforms[1].transforms[2].net.blocks[0].eval()
    x = torch.randn(2, 4, 8, 4)
    gated = torch.nn.functional.glu(block.conv(x), 1)
    normed = block.norm1((x + gated).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(block(x, torch.zeros(32, 4)), normed)


def test_a_flow_without_dequantiser_is_dequantised_uniformly(golden):
    state = {k: v for k, v in _state(golden).items() if not k.startswith("dequant_flows.")}
    flow, _ = load_official({"flow_net": state}, (3, 16, 16))
    assert type(flow.dequantize) is flows.Dequantize
    assert export_official(flow, None)["flow_net"].keys() == state.keys()
    u = torch.rand(golden["in.x"].shape)
    v, _ = flow.dequantize.call_and_ladj((golden["in.x"] + 1) / 2, u)
    torch.testing.assert_close(v, ((golden["in.x"] + 1) / 2 * 255 + u) / 256)


def test_the_flow_that_was_trained_alone_and_what_stands_beside_the_networks(golden, tmp_path):
    """The files of the pre-trained flow: under ``net``, beside a loss; and those of (Pre), with
    the optimizers and an FID that numpy computed."""
    alone = tmp_path / "best.pth.tar"
    torch.save({"net": _module(_state(golden)), "test_loss": 3.1, "epoch": 9}, alone)
    flow, none = load_official(alone, (3, 16, 16), dropout=0.05)
    assert none is None
    assert {m.p for m in flow.transform.modules() if isinstance(m, Dropout)} == {0.05}
    expected = _golden_flow(golden).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in flow.state_dict().items())

    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([weight], betas=[0.5, 0.5])
    weight.grad = torch.ones(2)
    optimizer.step()
    numbers = {"fid": np.float64(21.16), "f": np.float32(1), "i": np.int64(3), "b": np.bool_(True)}
    rest = {"flow_net": _state(golden), "ebm_optimizer": optimizer.state_dict(), **numbers}
    safe = set(map(str, torch.serialization.get_safe_globals()))
    for zipped in (True, False):  # since torch 1.6, and before
        pre = tmp_path / f"pre-{zipped}.pth.tar"
        torch.save(rest, pre, _use_new_zipfile_serialization=zipped)
        assert load_official(pre, (3, 16, 16))[0] is not None
    assert set(map(str, torch.serialization.get_safe_globals())) == safe
    # numpy 1 and 2 write the same number under two names.
    text = pre.read_bytes()
    names = (b"cnumpy._core.multiarray\nscalar", b"cnumpy.core.multiarray\nscalar")
    assert names[0] in text or names[1] in text
    for name in names:
        other = text.replace(names[0], name).replace(names[1], name)
        pre.write_bytes(other)
        assert load_official(pre, (3, 16, 16))[0] is not None


def test_the_energy_for_64_pixels(tmp_path):
    """Their fourth block keeps 8·n channels; ours in the same way, there and back."""
    n = 4
    shapes = {"f.0": (n, 3, 3, 3), "f.6": (100, 8 * n, 4, 4)}
    for i, (n_in, n_out) in enumerate([(n, 2 * n), (2 * n, 4 * n), (4 * n, 8 * n), (8 * n, 8 * n)]):
        shapes[f"f.{2 + i}.conv1"] = (n_in, n_in, 3, 3)
        shapes[f"f.{2 + i}.conv2"] = shapes[f"f.{2 + i}.res"] = (n_out, n_in, 3, 3)
    torch.manual_seed(0)
    net = {f"module.{k}.weight": torch.randn(shape) / 20 for k, shape in shapes.items()}
    net |= {f"module.{k}.bias": torch.randn(shape[0]) / 20 for k, shape in shapes.items()}
    torch.save({"ebm_net": net}, tmp_path / "64.pth")
    _, energy = load_official(tmp_path / "64.pth", (3, 64, 64))
    x = torch.rand(2, 3, 64, 64) * 2 - 1

    def conv(h: Tensor, name: str, padding: int = 1) -> Tensor:
        weights = (net[f"module.{name}.{part}"] for part in ("weight", "bias"))
        return F.conv2d(h, *weights, padding=padding)

    h = F.silu(conv(x, "f.0"))
    for i in range(2, 6):
        deep = F.silu(conv(F.silu(conv(h, f"f.{i}.conv1")), f"f.{i}.conv2"))
        h = F.avg_pool2d(deep + F.silu(conv(h, f"f.{i}.res")), 2)
    torch.testing.assert_close(-energy(x), conv(h, "f.6", 0).flatten(1).sum(1))
    back = export_official(None, energy)["ebm_net"]
    assert all(torch.equal(v, net["module." + k]) for k, v in back.items())
    with pytest.raises(ValueError, match=r"image_shape \(3, 32, 32\) does not fit: .*, 64, 64\)"):
        load_official(tmp_path / "64.pth")


def _module(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as DataParallel has them."""
    return {f"module.{k}": v for k, v in state.items()}


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
        ({}, "must hold flow_net or ebm_net, or a flow alone under net, got nothing"),
        ({"model": {}, "epoch": 3}, r"under net, got model \(dict\), epoch \(int\)"),
        ({"flow_net": state, "net": state}, "got both flow_net and net"),
        ({"net": state | {"lr": 0.1}}, "net must hold tensors only, got float for 'lr'"),
        ({"flow_net": {"flows.next.checkers.1.nn.x": torch.ones(1)}}, "no 1×1 convolution"),
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
        shape = (3, 32, 32) if "ebm_net" in checkpoint else (3, 16, 16)
        with pytest.raises(ValueError, match=message):
            load_official(checkpoint, shape)
    with pytest.raises(ValueError, match=r"image_shape \(1, 16, 16\) does not fit"):
        load_official({"flow_net": state}, (1, 16, 16))
    with pytest.raises(ValueError, match="only a flow made by flowpp"):
        export_official(flows.realnvp(2), None)
    with pytest.raises(ValueError, match="only a flow made by flowpp"):
        export_official(flows.glow((1, 4, 4), scales=1, steps=1, channels=4), None)
    with pytest.raises(ValueError, match=r"256 grey levels .* got levels=17"):
        export_official(flows.flowpp((1, 4, 4), channels=4, blocks=0, levels=17), None)
    with pytest.raises(FileNotFoundError):
        load_official(tmp_path / "missing.pth")


# --- files that ask for more than they hold -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("flows.checkers.999999998.nn.x", (1,), r"layers .*checkers.* must be numbered 2, 6, …"),
        (f"flows.checkers.{'9' * 5000}.nn.x", (1,), "4300 digits"),
        ("flows.checkers.2.nn.mid_convs.10000000.x", (1,), r"numbered 0, 1, …, got 0, 10000000"),
        ("flows.channels.2.nn.x", (1,), "channel steps in the first scale need even channels"),
        ("flows.checkers.2.nn.in_conv.conv.weight_v", (3,), "is no matrix or kernel"),
        ("flows.checkers.2.nn.in_conv.conv.weight_v", (9, 0, 3, 3), "is no matrix or kernel"),
        ("flows.checkers.2.nn.in_conv.conv.weight_v", (90_000, 3, 1, 1), "of 90000 channels are"),
        ("dequant_flows.flows.2.nn.mid_convs.99.x", (1,), "must be numbered 0, 1"),
    ],
)
def test_layers_that_a_flow_names_must_be_there(golden, name, shape, message):
    state = _state(golden) | {name: torch.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        load_official({"flow_net": state}, (3, 16, 16))


def test_blocks_must_have_their_tensors(golden):
    state = _state(golden)
    more = {f"flows.checkers.2.nn.mid_convs.{i}.x": torch.zeros(1) for i in range(1, 400)}
    more |= {f"flows.checkers.{i}.nn.x": torch.zeros(1) for i in range(6, 1200, 4)}
    with pytest.raises(ValueError, match=r"\d+ blocks of \d+ channels are more than the"):
        load_official({"flow_net": state | more}, (3, 16, 16))


def test_an_energy_is_built_when_its_tensors_are_known_to_fit(golden_energy):
    """A wide first layer would ask for terabytes behind it."""
    wide = _state(golden_energy) | {"f.0.weight": torch.zeros(200_000, 3, 1, 1)}
    with pytest.raises(ValueError, match=r"ebm_net: f.\d.\w+.* must have the shape \(\d*00000,"):
        load_official({"ebm_net": wide})


def test_files_that_claim_more_than_their_bytes_are_refused(golden, tmp_path):
    state = _state(golden)
    name = "flows.checkers.2.nn.in_conv.conv.weight_v"
    torch.save({"flow_net": state | {name: torch.zeros(1).expand(10**9, 3, 3, 3)}}, tmp_path / "e")
    with pytest.raises(ValueError, match=r"asks for 108,0.* bytes of memory, and has only"):
        load_official(tmp_path / "e", (3, 16, 16))
    torch.save({"flow_net": {"x": torch.zeros(10**6)}}, tmp_path / "whole")
    with (
        zipfile.ZipFile(tmp_path / "whole") as whole,
        zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for record in whole.infolist():
            packed.writestr(record.filename, whole.read(record))
    assert (tmp_path / "packed").stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"packed asks for 4,000,.* bytes of memory, and has only"):
        load_official(tmp_path / "packed")


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_without_values_are_refused(golden, kind):
    name = "flows.checkers.0.mean"
    value = torch.eye(6).to_sparse() if kind == "sparse" else torch.ones(6, device="meta")
    with pytest.raises(ValueError, match=rf"must hold dense tensors .*'{name}'"):
        load_official({"flow_net": _state(golden) | {name: value}}, (3, 16, 16))


def test_what_is_loaded_does_not_share_memory_with_what_it_came_from(golden):
    state = {name: value.clone() for name, value in _state(golden).items()}
    flow, _ = load_official({"flow_net": state}, (3, 16, 16))
    before = {name: value.clone() for name, value in flow.state_dict().items()}
    for value in state.values():
        value.zero_()
    assert all(torch.equal(value, before[name]) for name, value in flow.state_dict().items())
    assert all(p.requires_grad for p in flow.parameters())


def test_import_official_of_weights_that_are_not_finite_leaves_nothing(
    checkpoint, tmp_path, capsys
):
    nets = torch.load(checkpoint)
    nets["ebm_net"]["module.f.0.bias"][0] = torch.inf
    torch.save(nets, tmp_path / "bad.pth")
    run = tmp_path / "run"
    arguments = ["import-official", str(tmp_path / "bad.pth"), "--out", str(run)]
    assert cli.main([*arguments, "--image-shape", "3,16,16"]) == 1
    assert "energy.stem.bias is not finite" in capsys.readouterr().err
    assert not run.exists()


class _Payload:
    """Something that a checkpoint must not be able to smuggle in."""

    def __setstate__(self, state: object) -> None:
        raise AssertionError("a checkpoint's code was executed")

    def __getstate__(self) -> dict[str, int]:
        return {"x": 1}


def test_files_with_more_than_tensors_are_refused(tmp_path):
    arguments = argparse.Namespace(lr=1e-4, net=_Payload())
    evil = {"flow_net": {"bounds": _Payload()}, "args": arguments, "fid": np.zeros(2)}
    evil |= {"epoch": 3, "act": torch.nn.ReLU, "list": [1.0, Path("x")]}
    for zipped in (True, False):
        torch.save(evil, tmp_path / "evil.pth", _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError, match="more than tensors and numbers") as refused:
            load_official(tmp_path / "evil.pth")
        here = f"{__name__}._Payload"
        for what in (
            f"flow_net.bounds ({here})",
            "args (argparse.Namespace)",
            "act (torch.nn.modules.activation.ReLU)",
            "list.1 (pathlib",
        ):
            assert what in str(refused.value)
        assert re.search(r"fid \(numpy\.\w+\.multiarray\._reconstruct\)", str(refused.value))
        assert "epoch" not in str(refused.value)
    torch.save(torch.nn.Linear(1, 1), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"the file itself \(torch\.nn\.modules\.linear\.Linear\)"):
        load_official(tmp_path / "module.pth")
    torch.save(torch.zeros(1), tmp_path / "tensor.pth")
    with pytest.raises(ValueError, match="must hold a dict"):
        load_official(tmp_path / "tensor.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "tensor.pth").read_bytes()[:100])
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "empty.pth").write_bytes(b"")
    for name in ("cut", "text", "empty"):
        with pytest.raises(ValueError, match=rf"{name}\.pth holds more than tensors, or is dama"):
            load_official(tmp_path / f"{name}.pth")
