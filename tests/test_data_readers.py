"""Readers of published formats, on small files in exactly these formats made here."""

from __future__ import annotations

import hashlib
import io
import math
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coopflow_ext import Key
from coopflow_ext.data import folder as folder_module
from coopflow_ext.data import load, published
from coopflow_ext.data.folder import BadImageError, read_image
from coopflow_ext.data.toy import DENSITIES

image_module = pytest.importorskip("PIL.Image")
scipy_io = pytest.importorskip("scipy.io")

# --- CIFAR-10 -----------------------------------------------------------------------------------


@pytest.fixture
def records(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The six files of the binary version, with 4 records each instead of 10,000."""
    monkeypatch.setattr(published, "_CIFAR_RECORDS", 4)
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    files = {}
    for name in names:
        rows = generator.integers(0, 256, (4, 3073), dtype=np.uint8)
        rows[:, 0] %= 10
        files[name] = rows.tobytes()
    return files


def write_archive(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def set_checksum(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    checksum = hashlib.md5(path.read_bytes()).hexdigest()
    monkeypatch.setitem(published.CHECKSUMS, path.name, checksum)


def test_cifar10_unpacked(tmp_path: Path, records: dict[str, bytes]) -> None:
    unpacked = tmp_path / "cifar-10-batches-bin"
    unpacked.mkdir()
    for name, content in records.items():
        (unpacked / name).write_bytes(content)
    data = load("cifar10", tmp_path)
    assert data.train.shape == (20, 3, 32, 32)
    assert data.held_out.shape == (4, 3, 32, 32)
    assert data.flip
    # Record 1 of file 2: a label, then red, green and blue planes row by row.
    raw = records["data_batch_2.bin"][3073 : 2 * 3073]
    assert data.train_labels is not None
    assert data.train_labels[5] == raw[0]
    assert data.train[5, 0, 0, :3].tolist() == list(raw[1:4])
    assert data.train[5, 1, 2, 3] == raw[1 + 1024 + 2 * 32 + 3]
    assert data.train[5, 2, 31, 31] == raw[-1]


def test_cifar10_packed_is_the_same(
    tmp_path: Path, records: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_archive(archive, records)
    with pytest.raises(ValueError, match=r"has MD5 .*, but the published file has c32a1d4ab5d0"):
        load("cifar10", tmp_path)
    set_checksum(monkeypatch, archive)
    packed = load("cifar10", tmp_path)
    for name, content in records.items():
        (tmp_path / name).write_bytes(content)
    unpacked = load("cifar10", tmp_path)
    assert torch.equal(packed.train, unpacked.train)
    assert torch.equal(packed.held_out, unpacked.held_out)


def test_cifar10_missing_truncated_or_another_file(
    tmp_path: Path, records: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"cifar10 needs the folder .* --data-dir DIR"):
        load("cifar10")
    with pytest.raises(FileNotFoundError, match=r"no CIFAR-10 in .*https://www.cs.toronto.edu"):
        load("cifar10", tmp_path)
    archive = tmp_path / "cifar-10-binary.tar.gz"
    write_archive(archive, records)
    archive.write_bytes(archive.read_bytes()[:-2000])
    set_checksum(monkeypatch, archive)
    with pytest.raises(ValueError, match="cannot be read, it is damaged"):
        load("cifar10", tmp_path)
    for name, content in records.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "data_batch_3.bin").write_bytes(records["data_batch_3.bin"][:-1])
    with pytest.raises(ValueError, match=r"data_batch_3.bin must hold 4 records .* got 12291 byte"):
        load("cifar10", tmp_path)
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_3.bin does not exist"):
        load("cifar10", tmp_path)
    (tmp_path / "data_batch_3.bin").write_bytes(b"\x0b" + records["data_batch_3.bin"][1:])
    with pytest.raises(ValueError, match="has a label 11, but CIFAR-10 has 0…9"):
        load("cifar10", tmp_path)


# --- SVHN ---------------------------------------------------------------------------------------


def write_svhn(root: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    generator = np.random.default_rng(1)
    x = generator.integers(0, 256, (32, 32, 3, 12), dtype=np.uint8)
    y = np.array([[10], [1], [2], [3], [4], [5], [6], [7], [8], [9], [10], [1]], dtype=np.uint8)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        scipy_io.savemat(root / name, {"X": x, "y": y}, do_compression=True)
        set_checksum(monkeypatch, root / name)
    return x


def test_svhn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = write_svhn(tmp_path, monkeypatch)
    data = load("svhn", tmp_path)
    assert data.train.shape == (12, 3, 32, 32)
    assert not data.flip  # a mirrored house number is not one
    assert data.train[4, 2, 7, 9] == x[7, 9, 2, 4]
    assert data.train_labels is not None
    assert data.train_labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_svhn_missing_wrong_or_truncated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"train_32x32.mat does not exist: get train_32x32"):
        load("svhn", tmp_path)
    write_svhn(tmp_path, monkeypatch)
    path = tmp_path / "train_32x32.mat"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"train_32x32.mat has MD5"):
        load("svhn", tmp_path)
    set_checksum(monkeypatch, path)
    with pytest.raises(ValueError, match="cannot be read as a MATLAB file"):
        load("svhn", tmp_path)
    scipy_io.savemat(path, {"X": np.zeros((5, 32, 32, 3), np.uint8), "y": np.zeros((5, 1))})
    set_checksum(monkeypatch, path)
    with pytest.raises(ValueError, match=r"must hold X \(32, 32, 3, N\) uint8"):
        load("svhn", tmp_path)


# --- folders ------------------------------------------------------------------------------------


def write_images(root: Path, n: int, size: tuple[int, int] = (16, 16), mode: str = "RGB") -> None:
    generator = np.random.default_rng(2)
    root.mkdir(parents=True, exist_ok=True)
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], 3)
    for i in range(n):
        pixels = generator.integers(0, 256, shape, dtype=np.uint8)
        image_module.fromarray(pixels).save(root / f"{i:03d}.png")


def test_folder(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 12)
    write_images(tmp_path / "b", 8)
    (tmp_path / "notes.txt").write_text("not an image")
    data = load(f"folder:{tmp_path}")
    assert data.train.shape == (18, 3, 16, 16)
    assert data.held_out.shape == (2, 3, 16, 16)
    again = load(f"folder:{tmp_path}")
    assert torch.equal(data.train, again.train)
    stored = {bytes(x.numpy()) for x in torch.cat((data.train, data.held_out)).flatten(1)}
    pixels = np.array(image_module.open(tmp_path / "a" / "003.png"))
    assert bytes(np.ascontiguousarray(pixels.transpose(2, 0, 1))) in stored


def test_folder_of_grey_images_has_one_channel(tmp_path: Path) -> None:
    write_images(tmp_path, 4, mode="L")
    assert load(f"folder:{tmp_path}").event_shape == (1, 16, 16)
    image_module.new("RGB", (16, 16)).save(tmp_path / "colour.png")
    assert load(f"folder:{tmp_path}").event_shape == (3, 16, 16)


@pytest.mark.parametrize("label", [9, 10])
def test_cifar10_has_ten_labels(tmp_path: Path, records: dict[str, bytes], label: int) -> None:
    for name, content in records.items():
        (tmp_path / name).write_bytes(bytes([label]) + content[1:])
    if label == 9:
        assert int(load("cifar10", tmp_path).held_out_labels[0]) == 9
        return
    with pytest.raises(ValueError, match=r"data_batch_1.bin has a label 10, but CIFAR-10 has 0…9"):
        load("cifar10", tmp_path)


def test_modes_of_images_become_grey_or_colour(tmp_path: Path) -> None:
    for mode, channels in {"1": 1, "L": 1, "LA": 1, "P": 3, "RGB": 3, "RGBA": 3, "CMYK": 3}.items():
        path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
        image_module.new(mode, (5, 4)).save(path)
        assert read_image(path).shape == (channels, 4, 5)


def test_a_crop_must_fit_the_shorter_side(tmp_path: Path) -> None:
    write_images(tmp_path, 1, size=(24, 16))
    path = tmp_path / "000.png"
    with pytest.raises(BadImageError, match=r"is \(24, 16\), too small for a crop of 17"):
        read_image(path, size=8, crop=17)
    whole = read_image(path)
    assert torch.equal(read_image(path, size=16, crop=16), whole[:, :, 4:20])
    assert torch.equal(read_image(path, size=4, crop=4), whole[:, 6:10, 10:14])


def test_a_folder_may_be_below_ones_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "images", 4)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load("folder:~/images").event_shape == (3, 16, 16)


def test_folder_of_mixed_sizes(tmp_path: Path) -> None:
    write_images(tmp_path, 3)
    write_images(tmp_path / "other", 1, size=(24, 20))
    with pytest.raises(ValueError, match=r"one size: .*000.png is \(16, 16\).*--image-size N"):
        load(f"folder:{tmp_path}")
    assert load(f"folder:{tmp_path}", image_size=8).event_shape == (3, 8, 8)


def test_folder_with_a_corrupt_image(tmp_path: Path) -> None:
    write_images(tmp_path, 5)
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BadImageError, match=r"002.png cannot be read .*--skip-bad leaves such"):
        load(f"folder:{tmp_path}")
    with pytest.warns(UserWarning, match=r"left out: .*002.png"):
        data = load(f"folder:{tmp_path}", skip_bad=True)
    assert len(data.train) + len(data.held_out) == 4


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"image_size": 0}, ValueError, "image_size must be ≥ 1, got 0"),
        ({"image_size": 2.5}, TypeError, "image_size must be an int"),
        ({"image_size": True}, TypeError, "image_size must be an int"),
        ({"image_size": 8, "max_pixels": "8", "skip_bad": True}, TypeError, "max_pixels must be"),
    ],
)
def test_sizes_of_images_are_checked(
    tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    write_images(tmp_path, 4)
    with pytest.raises(error, match=message):
        load(f"folder:{tmp_path}", **options)


def test_a_folder_with_an_images_name_is_none(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    write_images(tmp_path / "album.png", 2)
    data = load(f"folder:{tmp_path}")
    assert len(data.train) + len(data.held_out) == 6


def test_folder_missing_or_empty(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder"):
        load(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(ValueError, match=r"holds no images \(.png"):
        load(f"folder:{tmp_path}")
    write_images(tmp_path, 3)
    with pytest.raises(ValueError, match="at least 4 images, 2 of them to hold out; got 3"):
        load(f"folder:{tmp_path}")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "1.png").write_text("no image")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(ValueError, match="there is no image that can be read"),
    ):
        load(f"folder:{tmp_path / 'bad'}", skip_bad=True)


def test_photographs_are_turned_upright(tmp_path: Path) -> None:
    write_images(tmp_path, 4, size=(16, 16))
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255
    exif = image_module.Exif()
    exif[0x0112] = 6  # to be shown turned by 90° clockwise: the left half is then above
    image_module.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    shown = read_image(tmp_path / "turned.png")
    assert shown[:, :8].min() == 255
    assert shown[:, 8:].max() == 0


def test_more_than_eight_bits_are_not_cut_off(tmp_path: Path) -> None:
    write_images(tmp_path, 4)
    deep = np.full((16, 16), 40_000, np.uint16)
    image_module.fromarray(deep).save(tmp_path / "deep.png")
    with pytest.raises(BadImageError, match=r"deep.png cannot be read as an image of 8 bits"):
        load(f"folder:{tmp_path}")


def test_more_than_eight_bits_of_a_colour_are_not_cut_off(tmp_path: Path) -> None:
    """Of which Pillow says that they are 8."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    for channels, colours in ((2, 4), (3, 2), (4, 6)):
        header = struct.pack(">IIBBBBB", 4, 4, 16, colours, 0, 0, 0)
        rows = zlib.compress((b"\0" + bytes([0x12, 0x34]) * 4 * channels) * 4)
        chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
        (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
        with pytest.raises(BadImageError, match=r"deep\.png cannot be read as an image of 8 bits"):
            read_image(tmp_path / "deep.png")
    (tmp_path / "deep.ppm").write_bytes(b"P6 4 4 65535\n" + bytes([0x12, 0x34]) * 48)
    with pytest.raises(BadImageError, match=r"deep\.ppm cannot be read as an image of 8 bits"):
        read_image(tmp_path / "deep.ppm")
    (tmp_path / "usual.ppm").write_bytes(b"P6 4 4 255\n" + bytes([18]) * 48)
    assert bool((read_image(tmp_path / "usual.ppm") == 18).all())


def test_an_image_of_more_pixels_than_allowed_is_not_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, 5)
    image_module.new("1", (9000, 9000)).save(tmp_path / "bomb.png")
    message = r"bomb.png has more pixels than max_pixels=67108864 allows: 9000×9000 .*--max-pixels"
    with pytest.raises(BadImageError, match=message):
        load(f"folder:{tmp_path}", image_size=8)
    with pytest.warns(UserWarning, match=message):
        data = load(f"folder:{tmp_path}", image_size=8, skip_bad=True)
    assert len(data.train) + len(data.held_out) == 5
    with monkeypatch.context() as patch:
        patch.setattr(image_module.Image, "load", None)  # calling it would be another error
        with pytest.raises(BadImageError, match=message):
            read_image(tmp_path / "bomb.png")
    assert read_image(tmp_path / "bomb.png", size=8, max_pixels=9000**2).shape == (1, 8, 8)
    with pytest.raises(BadImageError, match=r"more pixels than max_pixels=200 allows: 16×16"):
        load(f"folder:{tmp_path}", max_pixels=200)


def test_an_image_beyond_pillows_own_limit_is_named_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, 1)
    monkeypatch.setattr(image_module, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImageError, match=r"more pixels than max_pixels=67108864 allows: Image"):
        read_image(tmp_path / "000.png")


def test_few_images_are_decoded_ahead() -> None:
    begun = []

    def read(path: Path) -> torch.Tensor:
        begun.append(path)
        return torch.tensor(int(path.name))

    paths = [Path(str(i)) for i in range(1000)]
    most = 2 * folder_module._DECODERS + 1
    images = []
    for image in folder_module._in_order(read, paths):
        images.append(int(image))
        assert len(begun) <= len(images) + most
    assert images == list(range(1000))
    # Each once; of two threads either may come first.
    assert sorted(begun, key=lambda path: int(path.name)) == paths


def test_a_data_set_that_does_not_fit_says_how_many_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path, 4)
    real = folder_module._room_for_images
    monkeypatch.setattr(folder_module, "_room_for_images", lambda n, shape: real(2**50, shape))
    expected = rf"data set of shape \({2**50}, 3, 16, 16\) in .* would take {2**50 * 768:,} bytes"
    with pytest.raises(RuntimeError, match=expected):
        load(f"folder:{tmp_path}")


def write_celeba(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = root / "img_align_celeba"
    folder.mkdir()
    lines = []
    for i in range(1, 7):
        # A disc in the middle of the 178×218 image: the crop keeps it in the middle.
        pixels = np.zeros((218, 178, 3), np.uint8)
        pixels[109 - 35 : 109 + 35, 89 - 35 : 89 + 35] = (200, 10 * i, 30)
        image_module.fromarray(pixels).save(folder / f"{i:06d}.jpg", quality=95)
        lines.append(f"{i:06d}.jpg {(0, 0, 0, 1, 2, 2)[i - 1]}")
    (root / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    set_checksum(monkeypatch, root / "list_eval_partition.txt")


def test_celeba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_celeba(tmp_path, monkeypatch)
    data = load("celeba", tmp_path)
    assert data.train.shape == (4, 3, 32, 32)
    assert data.held_out.shape == (2, 3, 32, 32)
    # The square of half the crop's side fills rows and columns 8…23.
    inside, outside = data.train[0, 0, 10:22, 10:22], data.train[0, 0, :6]
    assert inside.float().mean() > 190
    assert outside.float().mean() < 10
    assert load("celeba", tmp_path, image_size=64).event_shape == (3, 64, 64)


def test_celeba_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"img_align_celeba does not exist: get img_align"):
        load("celeba", tmp_path)
    write_celeba(tmp_path, monkeypatch)
    (tmp_path / "img_align_celeba" / "000002.jpg").unlink()
    with pytest.raises(BadImageError, match=r"000002.jpg cannot be read"):
        load("celeba", tmp_path)
    with pytest.warns(UserWarning, match=r"left out: .*000002.jpg"):
        assert len(load("celeba", tmp_path, skip_bad=True).train) == 3
    partition = tmp_path / "list_eval_partition.txt"
    partition.write_text("000001.jpg 0\n000003.jpg\n")
    with pytest.raises(ValueError, match=r"list_eval_partition.txt has MD5 .* the published file"):
        load("celeba", tmp_path)
    set_checksum(monkeypatch, partition)
    with pytest.raises(ValueError, match=r"list_eval_partition.txt:2 must be 'NAME 0\|1\|2'"):
        load("celeba", tmp_path)


# --- toy densities ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSITIES)
def test_toy_density_is_that_of_the_samples(name: str) -> None:
    """It integrates to one, and the share of samples in each of 8×8 cells is its integral there."""
    density = DENSITIES[name]
    cells, fine = 8, 20
    n = cells * fine
    centre = (torch.arange(n, dtype=torch.float64) + 0.5) * (8 / n) - 4
    points = torch.cartesian_prod(centre, centre)
    p = density.log_density(points).exp().view(n, n) * (8 / n) ** 2
    assert float(p.sum()) == pytest.approx(1, abs=5e-3)
    expected = p.view(cells, fine, cells, fine).sum((1, 3))
    count = 40_000
    x = density.sample(count, Key(3))
    index = ((x + 4) / 8 * cells).floor().long().clamp(0, cells - 1)
    observed = (index[:, 0] * cells + index[:, 1]).bincount(minlength=cells**2).double() / count
    sigma = (expected.flatten() * (1 - expected.flatten()) / count).sqrt()
    assert bool(((observed - expected.flatten()).abs() < 5 * sigma + 1e-3).all())


def test_toy_data() -> None:
    data = load("toy:moons")
    assert data.event_shape == (2,)
    assert not data.is_image
    assert data.decode(data.train[:3]).equal(data.train[:3])
    assert math.isclose(float(data.train.abs().max()), 4, rel_tol=0.5)
    with pytest.raises(ValueError, match="toy must be one of 8gaussians"):
        load("toy:stars")


def test_toy_points_are_split_once_and_lie_within_the_pictures_range() -> None:
    data = load("toy:8gaussians")
    assert (len(data.train), len(data.held_out)) == (20_000, 4_000)
    points = DENSITIES["8gaussians"].sample(24_000, Key(2))
    assert torch.equal(torch.cat((data.train, data.held_out)), points)
    assert points.abs().max() == 4  # some lay outside


def test_folders_below_may_be_links_and_what_is_hidden_is_left_out(tmp_path: Path) -> None:
    root = tmp_path / "root"
    write_images(root / "a", 4)
    write_images(tmp_path / "elsewhere", 3)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    write_images(root / ".thumbnails", 2)
    (root / "a" / "._000.png").write_bytes(b"of another system")
    data = load(f"folder:{root}")
    assert len(data.train) + len(data.held_out) == 7
    (root / "a" / "up").symlink_to(root)
    with pytest.raises(OSError, match=r"Too many levels of symbolic links: '.*up'"):
        load(f"folder:{root}")


def test_a_folder_below_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_images(tmp_path / "a", 4)
    closed, original = tmp_path / "b", Path.iterdir
    closed.mkdir()

    def iterdir(path: Path) -> Iterator[Path]:
        if path == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(PermissionError, match="b'"):
        load(f"folder:{tmp_path}")
