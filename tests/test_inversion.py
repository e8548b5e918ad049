"""Reconstruction, inpainting and interpolation through the differentiable chain."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from coopflow_ext import Key
from coopflow_ext.coop import CoopFlow, TrainConfig, Trainer, inversion
from coopflow_ext.coop.inversion import (
    centre_hole,
    decode,
    encode,
    inpaint,
    interpolate,
    pixel_error,
    reconstruct,
)
from coopflow_ext.coop.model import EventSpec
from coopflow_ext.data import load

SETTINGS = {
    "preset": "digits-small",
    "flow_options": {"net": "mlp", "couplings": 4, "widths": [32]},
    "energy_options": {"widths": [32, 32]},
    "batch_size": 64,
    "langevin_steps": 5,
    "pretrain_steps": 150,
    "flow_frozen_steps": 30,
    "steps": 60,
    "warmup_steps": 0,
}


@pytest.fixture(scope="module")
def models() -> tuple[CoopFlow, CoopFlow]:
    """A trained model and the same before training."""
    data, config = load("digits"), TrainConfig.from_dict(SETTINGS)
    trainer = Trainer(config, data)
    for _ in range(config.total_steps):
        trainer.train_step()
    return trainer.model, Trainer(config, data).model


@pytest.fixture(scope="module")
def held_out() -> torch.Tensor:
    data = load("digits")
    return data.decode(data.held_out[:6])


def test_one_descent_step_is_the_recipe(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    model, _ = models
    x0 = model.propose(6, Key(1))
    leaf = x0.clone().requires_grad_()
    x = leaf
    for _ in range(5):
        (grad,) = torch.autograd.grad(model.energy(x).sum(), x, create_graph=True)
        x = x - 0.125 * grad
    (grad,) = torch.autograd.grad((held_out - x).square().sum(), leaf)
    expected = (x0 - 0.05 * grad).clamp(-1, 1)
    got = reconstruct(model, held_out, Key(1), steps=1)
    torch.testing.assert_close(got.start, expected, rtol=1e-4, atol=1e-5)


def test_the_chain_has_the_trainings_step_size_whatever_that_of_sampling(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    """The paper trains, reconstructs, inpaints, interpolates with δ = 0.03, samples with 0.04."""
    for name in ("cifar10", "svhn-pre", "celeba-long"):
        paper = TrainConfig.from_dict({"preset": name})
        assert paper.sample_step_size != paper.step_size == 0.03
    model = models[0]
    assert model.config is not None
    other = CoopFlow(model.flow, model.energy, model.sampler)
    other.config = dataclasses.replace(model.config, sample_step_size=0.7)
    other.event = model.event
    known = centre_hole(8, 8)
    for call in (
        lambda m, **k: reconstruct(m, held_out, Key(1), steps=2, **k).result,
        lambda m, **k: inpaint(m, held_out, known, Key(1), chains=1, steps=2, **k),
        lambda m, **k: interpolate(m, held_out[:2], held_out[2:4], points=3, **k)[1],
    ):
        assert torch.equal(call(other), call(model))
        assert torch.equal(call(other, step_size=0.5), call(model))  # the preset's own
        assert not torch.equal(call(other, step_size=0.4), call(model))
        with pytest.raises(ValueError, match="step_size must be finite and > 0, got 0"):
            call(model, step_size=0)


def test_the_chains_start_where_they_are_told(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    model, known = models[0], centre_hole(8, 8)
    start = model.propose(6, Key(1))
    proposed, told = (
        reconstruct(model, held_out, Key(1), steps=2),
        reconstruct(model, held_out, start=start, steps=2),
    )
    assert all(torch.equal(a, b) for a, b in zip(proposed, told, strict=True))
    starts = model.propose(12, Key(1)).view(6, 2, 1, 8, 8)
    assert torch.equal(
        inpaint(model, held_out, known, Key(1), chains=2, steps=2),
        inpaint(model, held_out, known, start=starts, chains=2, steps=2),
    )
    with pytest.raises(ValueError, match=r"shape \(6, 1, 8, 8\), got \(5, 1, 8, 8\)"):
        reconstruct(model, held_out, start=start[:5])
    with pytest.raises(ValueError, match=r"start must have shape \(6, 4, 1, 8, 8\), got \(6, 2, "):
        inpaint(model, held_out, known, start=starts)


def test_the_papers_numbers() -> None:
    assert (inversion.RECONSTRUCTION_STEPS, inversion.RECONSTRUCTION_RATE) == (200, 0.05)
    numbers = (inversion.INPAINTING_STEPS, inversion.INPAINTING_RATE, inversion.INPAINTING_DECAY)
    assert numbers == (201, 0.03, 0.99)


def test_three_inpainting_steps_are_the_recipe(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    model, _ = models
    known = centre_hole(8, 8)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(5):
            (grad,) = torch.autograd.grad(model.energy(x).sum(), x, create_graph=True)
            x = x - 0.125 * grad
        return x

    x0 = model.propose(6, Key(1))
    for j in range(3):
        leaf = x0.detach().requires_grad_()
        loss = ((held_out - chain(leaf)) * known).square().sum()
        (grad,) = torch.autograd.grad(loss, leaf)
        x0 = (leaf.detach() - 0.03 * 0.99**j * grad).clamp(-1, 1)
    end = chain(x0.requires_grad_()).detach().clamp(-1, 1)
    got = inpaint(model, held_out, known, Key(1), chains=1, steps=3)
    expected = torch.where(known, held_out, end)
    torch.testing.assert_close(got[:, 0], expected, rtol=1e-4, atol=1e-5)


def test_reconstruction_lowers_the_error_and_sooner_with_a_trained_model(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    trained, untrained = (reconstruct(m, held_out, Key(1), steps=30) for m in models)
    assert trained.start.abs().max() <= 1
    torch.testing.assert_close(trained.error, pixel_error(held_out, trained.result))
    assert bool((trained.error < trained.untouched_error).all())
    assert float(trained.untouched_error.mean()) < float(untrained.untouched_error.mean())
    for found in (trained, untrained):
        assert found.error_by_step.shape == (31,)
        torch.testing.assert_close(found.error_by_step[0], found.untouched_error.mean())
        torch.testing.assert_close(found.error_by_step[-1], found.error.mean())
    assert float(trained.error_by_step[7]) == pytest.approx(
        float(reconstruct(models[0], held_out, Key(1), steps=7).error.mean()), rel=1e-4
    )
    # What the models add shows before the descent is over. At its end an untrained energy, whose
    # chain moves nothing, lets every pixel be set at will: docs/experiments.md has the numbers.
    assert bool((trained.error_by_step[:6] < untrained.error_by_step[:6]).all())


def test_memory_bounded_reconstruction_is_the_same(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    whole = reconstruct(models[0], held_out, Key(1), steps=3)
    bounded = reconstruct(models[0], held_out, Key(1), steps=3, checkpoint_every=2)
    torch.testing.assert_close(whole.start, bounded.start)


def test_every_filling_is_that_of_its_own_start_image_and_mask(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    model, _ = models
    starts = model.propose(6, Key(3)).view(3, 2, 1, 8, 8)
    known = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0)) < 0.6
    filled = inpaint(model, held_out[:3], known, start=starts, chains=2, steps=2)
    for i in range(3):
        for chain in range(2):
            image, start = held_out[i : i + 1], starts[i : i + 1, chain : chain + 1]
            alone = inpaint(model, image, known[i : i + 1], start=start, chains=1, steps=2)
            # Networks round otherwise in other batches.
            torch.testing.assert_close(filled[i, chain], alone[0, 0], rtol=0, atol=1e-4)


def test_inpainting_leaves_known_pixels_untouched(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    known = centre_hole(8, 8)
    filled = inpaint(models[0], held_out, known, Key(2), chains=3, steps=10)
    assert filled.shape == (6, 3, 1, 8, 8)
    assert torch.equal(filled[..., known], held_out[:, None].expand(-1, 3, -1, -1, -1)[..., known])
    holes = filled[..., ~known]
    assert holes.abs().max() <= 1
    assert not torch.equal(holes[:, 0], holes[:, 1])


def test_inpainting_does_not_look_at_unknown_pixels(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    known = centre_hole(8, 8)
    other = torch.where(known, held_out, 0.5)
    a = inpaint(models[0], held_out, known, Key(2), chains=1, steps=5)
    b = inpaint(models[0], other, known, Key(2), chains=1, steps=5)
    assert torch.equal(a, b)


def test_the_papers_hole() -> None:
    rows, columns = (~centre_hole(32, 32)).nonzero(as_tuple=True)
    assert (int(rows.min()), int(rows.max())) == (7, 22)
    assert (int(columns.min()), int(columns.max())) == (7, 22)


def test_interpolation_ends_are_the_two_reconstructions(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    model, _ = models
    found = reconstruct(model, held_out, Key(1), steps=10)
    a, b = slice(0, 3), slice(3, 6)
    proposals, results = interpolate(model, found.start[a], found.start[b], points=5)
    assert results.shape == (3, 5, 1, 8, 8)
    ends = ((0, a), (-1, b))
    for end, rows in ends:
        torch.testing.assert_close(proposals[:, end], found.start[rows], rtol=0, atol=2e-3)
        torch.testing.assert_close(results[:, end], found.result[rows], rtol=0, atol=5e-3)
    assert not torch.allclose(results[:, 2], results[:, 0], atol=1e-2)


def test_encode_is_undone_by_the_flow(models: tuple[CoopFlow, CoopFlow]) -> None:
    flow = models[0].flow
    x = 1.8 * torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.9
    torch.testing.assert_close(decode(flow, encode(flow, x)), x, rtol=0, atol=1e-4)


def test_bad_input(models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor) -> None:
    model, _ = models
    with pytest.raises(ValueError, match=r"shape \(B ≥ 1, 1, 8, 8\), got \(6, 64\)"):
        reconstruct(model, held_out.flatten(1), Key(0))
    with pytest.raises(ValueError, match=r"shape \(B ≥ 1, 1, 8, 8\), got \(0, 1, 8, 8\)"):
        reconstruct(model, held_out[:0], Key(0))
    with pytest.raises(ValueError, match=r"mask must have shape \(8, 8\) or .* got \(4, 4\)"):
        inpaint(model, held_out, torch.ones(4, 4, dtype=torch.bool), Key(0))
    with pytest.raises(TypeError, match=r"mask must be bool, got torch.float32"):
        inpaint(model, held_out, torch.ones(8, 8), Key(0))
    with pytest.raises(ValueError, match="chains must be ≥ 1, got 0"):
        inpaint(model, held_out, centre_hole(8, 8), Key(0), chains=0)
    with pytest.raises(ValueError, match="points must be ≥ 2, got 1"):
        interpolate(model, held_out, held_out, points=1)
    own = CoopFlow(model.flow, model.energy, model.sampler)
    with pytest.raises(ValueError, match="made from settings"):
        reconstruct(own, held_out, Key(0))


def test_pixels_of_colour_images_and_vectors() -> None:
    """An error is the sum over the channels of a pixel."""
    colour = torch.ones(2, 3, 4, 5)
    torch.testing.assert_close(pixel_error(colour, 0 * colour), torch.full((2,), 3.0))
    torch.testing.assert_close(
        pixel_error(torch.ones(2, 3), torch.zeros(2, 3)), torch.full((2,), 3.0)
    )


def test_errors_by_step_are_means_over_pixels(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    found = reconstruct(models[0], held_out, Key(1), steps=2, rate=0.0)
    expected = pixel_error(held_out, found.result).mean()
    torch.testing.assert_close(found.error_by_step[0], expected, rtol=1e-4, atol=1e-6)


def test_decoded_codes_are_images(models: tuple[CoopFlow, CoopFlow]) -> None:
    """Far out, too, where the logit's bound lets them leave [−1, 1]."""
    flow = models[0].flow
    y = decode(flow, 100 * torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert (y.min(), y.max()) == (-1, 1)


def test_the_error_of_colour_images_is_per_pixel_at_every_step() -> None:
    config = TrainConfig.from_dict(SETTINGS)
    model = CoopFlow.from_config(config, EventSpec((3, 4, 4), 256))
    x = 1.8 * torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 0.9
    found = reconstruct(model, x, Key(1), steps=2)
    torch.testing.assert_close(found.error_by_step[0], found.untouched_error.mean())
    torch.testing.assert_close(found.error_by_step[-1], found.error.mean())


def test_the_search_leaves_the_models_as_they_were(
    models: tuple[CoopFlow, CoopFlow], held_out: torch.Tensor
) -> None:
    """Dropout is off inside, gradients are on, and the mode of every module is back."""
    model, _ = models
    modes = [module.training for module in model.modules()]
    assert any(modes)
    seen = []
    hook = model.energy.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    with torch.no_grad():
        result = reconstruct(model, held_out, Key(1), steps=2)
        interpolate(model, held_out[:2], held_out[2:4], points=2)
    hook.remove()
    assert len(seen) > 1
    assert not any(seen)
    assert not result.start.requires_grad
    assert [module.training for module in model.modules()] == modes
