"""Data sets and the order of their batches."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from coopflow_ext import Key
from coopflow_ext.data import Batches, Dataset, Prefetch, load, permutation


def counting_data(n: int = 10) -> Dataset:
    """Images (1, 2, 2) whose grey level is their index."""
    levels = torch.arange(n, dtype=torch.uint8)
    images = levels.view(-1, 1, 1, 1).expand(-1, 1, 2, 2).contiguous()
    return Dataset("counting", images, images[:1].clone(), n)


def test_digits_are_the_published_ones() -> None:
    data = load("digits")
    assert data.event_shape == (1, 8, 8)
    assert data.dim == 64
    assert len(data.train) + len(data.held_out) == 1797
    both = torch.cat((data.train, data.held_out))
    # Pixel sum of the published table: a changed or re-scaled file would give another.
    sklearn_datasets = pytest.importorskip("sklearn.datasets")
    assert int(both.long().sum()) == int(sklearn_datasets.load_digits().images.sum())
    assert data.train_labels is not None
    assert data.held_out_labels is not None
    labels = torch.cat((data.train_labels, data.held_out_labels))
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    x = data.decode(both)
    assert x.dtype == torch.float32
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)


def test_digits_split_is_the_same_every_time() -> None:
    assert torch.equal(load("digits").held_out, load("digits").held_out)


def test_patches_are_colour_crops_and_the_splits_share_no_pixel() -> None:
    data = load("patches")
    assert data.event_shape == (3, 32, 32)
    assert data.flip
    train = {bytes(row) for row in data.train.flatten(1).numpy()}
    held_out = {bytes(row) for row in data.held_out.flatten(1).numpy()}
    assert not train & held_out
    # Crops overlap, so neighbours agree where they do: 8 columns further is the same photograph.
    assert torch.equal(data.train[0, :, :, 8:], data.train[1, :, :, :-8])
    assert torch.equal(load("patches").held_out, data.held_out)


def test_the_first_held_out_patches_stand_for_all() -> None:
    """In reading order the first 200 were all sky."""
    brightness = load("patches").held_out.float().mean((1, 2, 3))
    error = brightness.std() / 200**0.5
    assert abs(brightness[:200].mean() - brightness.mean()) < 4 * error


def test_unknown_data_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"data must be one of .*digits.*, got 'mnist'"):
        load("mnist")


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        ("digits", {"root": "here"}, "data_dir is for cifar10, svhn, celeba; digits takes none"),
        ("toy:moons", {"image_size": 32}, "image_size is for celeba, folder; toy takes none"),
        ("cifar10", {"image_size": 64, "root": "here"}, "image_size is .* cifar10 takes none"),
        ("svhn", {"skip_bad": True, "root": "here"}, "skip_bad is for .*; svhn takes none"),
        ("folder:here", {"root": "there"}, "data_dir is for .*; folder takes none, got there"),
        ("patches", {"max_pixels": 9}, "max_pixels is for celeba, folder; patches takes none"),
    ],
)
def test_no_argument_is_ignored(name: str, argument: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(name, **argument)


@pytest.mark.parametrize("n", [1, 2, 97])
def test_permutation(n: int) -> None:
    order = permutation(n, Key(5))
    assert order.sort().values.tolist() == list(range(n))
    assert torch.equal(order, permutation(n, Key(5)))


def test_permutation_depends_on_the_key() -> None:
    assert not torch.equal(permutation(97, Key(5)), permutation(97, Key(6)))


def test_every_epoch_shows_every_image_once_in_another_order() -> None:
    batches = Batches(counting_data(10), 4, Key(0))
    stream = torch.cat([batches.indices(step) for step in range(10)])
    epochs = stream.view(4, 10)
    assert (epochs.sort(1).values == torch.arange(10)).all()
    assert len({tuple(e.tolist()) for e in epochs}) == 4
    with pytest.raises(IndexError, match="step must be ≥ 0, got -1"):
        batches[-1]


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    data = counting_data(10)
    in_order = [Batches(data, 4, Key(0))[step] for step in range(8)]
    backwards = Batches(data, 4, Key(0))
    for step in reversed(range(8)):
        assert torch.equal(backwards[step], in_order[step])


def test_batch_larger_than_the_data() -> None:
    indices = Batches(counting_data(3), 10, Key(0)).indices(0)
    assert indices.bincount().tolist() in ([4, 3, 3], [3, 4, 3], [3, 3, 4])


def test_parts_of_all_processes_are_the_whole_batch() -> None:
    data = load("patches")
    whole = Batches(data, 6, Key(3), flip=True)[7]
    parts = [
        Batches(data, 6, Key(3), flip=True, rows=slice(start, start + 2))[7] for start in (0, 2, 4)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_prefetched_batches_are_the_same_in_any_order() -> None:
    plain = Batches(counting_data(10), 4, Key(0))
    prefetched = Prefetch(Batches(counting_data(10), 4, Key(0)))
    for step in (0, 1, 2, 3, 7, 8, 2, 30):
        assert torch.equal(prefetched[step], plain[step])


def test_the_next_batches_are_made_before_they_are_asked_for() -> None:
    made = threading.Event()

    class Watched(Batches):
        def __getitem__(self, step: int) -> torch.Tensor:
            if step == 2:
                made.set()
            return super().__getitem__(step)

    prefetched = Prefetch(Watched(counting_data(10), 4, Key(0)), ahead=2)
    prefetched[0]
    assert made.wait(timeout=30)  # batch 2, though only batch 0 was asked for


def test_an_error_in_the_thread_is_raised_where_the_batch_is_asked_for() -> None:
    class Broken(Batches):
        def __getitem__(self, step: int) -> torch.Tensor:
            if step == 2:
                raise OSError("the disk is gone")
            return super().__getitem__(step)

    batches = Broken(counting_data(10), 4, Key(0))
    prefetched = Prefetch(batches)
    assert prefetched[0].shape == (4, 1, 2, 2)
    with pytest.raises(OSError, match="the disk is gone"):
        prefetched[2]
    assert prefetched[3].shape == (4, 1, 2, 2)
    assert prefetched[1].shape == (4, 1, 2, 2)  # 2 and 3 are made after it
    Broken.__getitem__ = Batches.__getitem__  # type: ignore[method-assign]
    with pytest.raises(OSError, match="the disk is gone"):
        prefetched[2]
    assert torch.equal(prefetched[2], batches[2])  # it is made again where it is asked for again


@pytest.mark.gpu
def test_gpu_batches_are_copied_on_the_stream_that_asks() -> None:
    """On another they could be used while they are being copied."""
    used = set()

    class Watched(Batches):
        def __getitem__(self, step: int) -> torch.Tensor:
            used.add(torch.cuda.current_stream())
            return super().__getitem__(step)

    prefetched = Prefetch(Watched(counting_data(10), 4, Key(0), device="cuda"))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert torch.equal(prefetched[0].cpu(), Batches(counting_data(10), 4, Key(0))[0])
        prefetched[2]
    assert used == {stream}


def test_flip_mirrors_about_half_of_the_images_and_nothing_else() -> None:
    data = load("patches")
    plain, flipped = Batches(data, 400, Key(1)), Batches(data, 400, Key(1), flip=True)
    mirrored = 0
    for x, y in zip(plain[0], flipped[0], strict=True):
        assert torch.equal(x, y) or torch.equal(x.flip(-1), y)
        mirrored += not torch.equal(x, y)
    assert 150 < mirrored < 250  # 200 ± 5 standard deviations of 10


def test_order_and_mirrors_are_those_of_the_keys_seed_and_of_each_batch() -> None:
    """So a resumed training, whose key has another time, goes on with them."""
    data = load("patches")
    batches = Batches(data, 40, Key(1), flip=True)
    later = Batches(data, 40, Key(1, time=7).at_chain(3), flip=True)
    for step in (0, 5):
        assert torch.equal(batches[step], later[step])
    same_image = Dataset(
        "one", data.train[:1].expand(40, -1, -1, -1), data.held_out, 256, flip=True
    )
    repeated = Batches(same_image, 40, Key(1), flip=True)
    assert not torch.equal(repeated[0], repeated[1])


def test_few_epochs_are_kept_and_few_batches_wait() -> None:
    batches = Batches(counting_data(10), 4, Key(0))
    prefetched = Prefetch(batches, ahead=2)
    for step in range(60):
        prefetched[step]
    assert len(prefetched._pending) == 3
    assert [future.result() for future in prefetched._pending.values()]
    assert len(batches._epochs) <= 3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="batch_size must be ≥ 1, got 0"):
        Batches(counting_data(), 0, Key(0))
    vectors = Dataset("v", torch.zeros(3, 2), torch.zeros(1, 2), None)
    with pytest.raises(ValueError, match="flip is for images"):
        Batches(vectors, 2, Key(0), flip=True)
    with pytest.raises(ValueError, match=r"one shape, got \(2,\) and \(3,\)"):
        Dataset("v", torch.zeros(3, 2), torch.zeros(1, 3), None)
    with pytest.raises(ValueError, match="at least one event, got 3 for training and 0"):
        Dataset("v", torch.zeros(3, 2), torch.zeros(0, 2), None)
