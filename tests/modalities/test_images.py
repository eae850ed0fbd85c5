"""Data sets and batches. Oracles: a naive loop per example, arithmetic by hand, files written here and read back."""

from __future__ import annotations

import importlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from sparring import modalities
from sparring.core.batches import Batches, draw, hold_out
from sparring.core.noise import Noise
from sparring.modalities import load_data
from sparring.modalities.images import crop_and_flip, scale
from sparring.modalities.images.data import read_images


def _npz(path: Path, **changes: object) -> str:
    rng = np.random.default_rng(0)
    arrays: dict[str, object] = {
        "x_train": rng.integers(0, 256, (6, 8, 9, 3), dtype=np.uint8), "y_train": np.array([0, 1, 2, 0, 1, 2]),
        "x_test": rng.integers(0, 256, (3, 8, 9, 3), dtype=np.uint8), "y_test": np.array([0, 1, 2]),
    }  # fmt: skip
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})  # type: ignore[arg-type]
    return str(path)


def _png(pixels: np.ndarray) -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def _write_parquet(path: Path, images: list[bytes], labels: list[int], names: list[str] | None, column: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({column: [{"bytes": b, "path": None} for b in images], "label": labels})
    if names:
        about = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(about)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def test_digits_are_scaled_and_split_evenly() -> None:
    data = load_data("digits")
    assert data.shape == (1, 8, 8) and data.num_classes == 10 and data.x_train.dtype == torch.float32
    assert (len(data.y_train), len(data.y_test)) == (1437, 360)
    assert data.x_train.min() == 0 and data.x_train.max() == 1
    assert bool((torch.bincount(data.y_test) - 36).abs().max() <= 1)
    assert torch.equal(data.x_test, load_data("digits").x_test)


def test_scale() -> None:
    assert scale(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert scale(torch.tensor([3.5], dtype=torch.float64)).dtype == torch.float32
    with pytest.raises(TypeError, match="int64"):
        scale(torch.tensor([1]))


def test_npz_layouts(tmp_path: Path) -> None:
    spec = _npz(tmp_path / "a.npz")
    data, stored = load_data(spec), np.load(spec)
    assert data.name == "a" and data.shape == (3, 8, 9) and data.x_train.dtype == torch.uint8
    assert data.x_train[4, 2, 7, 5] == stored["x_train"][4, 7, 5, 2]

    gray = np.zeros((6, 8, 9), np.uint8)
    assert load_data(_npz(tmp_path / "b.npz", x_train=gray, x_test=gray[:3])).shape == (1, 8, 9)

    floats = np.random.default_rng(1).random((6, 3, 8, 9))
    data = load_data(_npz(tmp_path / "c.npz", x_train=floats, x_test=floats[:3]))
    assert data.shape == (3, 8, 9) and data.x_train.dtype == torch.float32
    assert np.array_equal(data.x_train.numpy(), floats.astype(np.float32))

    last = floats.transpose(0, 2, 3, 1)
    assert torch.equal(load_data(_npz(tmp_path / "d.npz", x_train=last, x_test=last[:3])).x_train, data.x_train)

    narrow = floats[:, :, :, :4]  # floats are read as (N, C, H, W) where both readings make sense
    assert load_data(_npz(tmp_path / "f.npz", x_train=narrow, x_test=narrow[:3])).shape == (3, 8, 4)

    features = 100 * np.random.default_rng(2).normal(size=(6, 5))
    labels = np.array([[0.0], [1.0], [2.0], [0.0], [1.0], [3.0]])
    data = load_data(_npz(tmp_path / "e.npz", x_train=features, x_test=features[:3], y_train=labels))
    assert data.shape == (5,) and data.y_train.tolist() == [0, 1, 2, 0, 1, 3] and data.num_classes == 4


BAD_NPZ = {
    "missing key": ({"y_test": None}, r"\['y_test'\] are missing"),
    "lengths": ({"y_train": np.array([0, 1])}, "x_train has 6 examples and y_train 2"),
    "fractions as labels": ({"y_train": np.array([0, 1, 2, 0, 1, 1.5])}, "y_train is float64.*whole numbers"),
    "two-hot labels": ({"y_train": np.eye(6) + np.eye(6)[::-1]}, "y_train is float64.*whole numbers"),
    "infinite label": ({"y_test": np.array([0, 1, np.inf])}, "y_test holds labels 0.0 to inf"),
    "huge label": ({"y_test": np.array([0, 1, 2**62])}, "y_test holds labels 0 to 4611686018427387904"),
    "labels as text": ({"y_test": np.array(["a", "b", "c"])}, "y_test is <U1"),
    "NaN label": ({"y_train": np.array([0, 1, 2, 0, 1, np.nan])}, "y_train is float64.*whole numbers"),
    "negative label": ({"y_test": np.array([0, -1, 2])}, r"y_test holds labels -1 to 2; .*first_label=1"),
    "NaN": ({"x_train": np.full((6, 4), np.nan), "x_test": np.zeros((3, 4))}, "x_train holds NaN"),
    "empty": ({"x_test": np.zeros((0, 8, 9, 3), np.uint8), "y_test": np.zeros(0, int)}, "x_test has shape"),
    "integers": ({"x_train": np.zeros((6, 4), int)}, "x_train is int64"),
    "zeros and ones": ({"x_train": np.ones((6, 8, 9), int)}, "x_train is int64.*astype"),
    "other shape": ({"x_test": np.zeros((3, 8, 8, 3), np.uint8)}, "one model must take both"),
    "pickled objects": ({"y_train": np.array([{}] * 6, dtype=object)}, "plain arrays"),
}


@pytest.mark.parametrize("shape", [(5,), (2, 128), (1, 2, 128), (4, 5, 6, 7), (1, 5, 6, 7)])
def test_floats_of_any_shape_are_taken_as_they_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).uniform(-1, 1, (6, *shape)).astype(np.float32)
    data = load_data(_npz(tmp_path / "a.npz", x_train=x, x_test=x[:3]))
    assert data.shape == shape and np.array_equal(data.x_train.numpy(), x)


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint16])
def test_pixels_are_pixels_whatever_whole_type_holds_them(tmp_path: Path, kind: type) -> None:
    x = np.random.default_rng(0).integers(0, 256, (6, 8, 9))
    data = load_data(_npz(tmp_path / "a.npz", x_train=x.astype(kind), x_test=x[:3].astype(np.uint8)))
    assert data.x_train.dtype == torch.uint8 and np.array_equal(data.x_train[:, 0].numpy(), x)


def test_labels_as_people_have_them(tmp_path: Path) -> None:
    y = np.array([0, 1, 2, 0, 1, 2])
    for train, test in ((np.eye(3)[y], y[:3]), (np.eye(3, dtype=bool)[y], np.eye(3, dtype=np.int8)[:3])):
        data = load_data(_npz(tmp_path / "a.npz", y_train=train, y_test=test))
        assert data.y_train.tolist() == y.tolist() and data.y_test.tolist() == [0, 1, 2]
    names = np.array(["owl", "cat", "dog"])
    data = load_data(_npz(tmp_path / "b.npz", y_train=names[y], y_test=names))
    assert data.class_names == ("cat", "dog", "owl") and data.y_test.tolist() == [2, 0, 1]
    data = load_data(_npz(tmp_path / "c.npz", y_train=y + 1, y_test=y[:3] + 1) + ",first_label=1")
    assert data.y_train.tolist() == y.tolist() and data.class_names == ("1", "2", "3")


def _pictures(folder: Path, count: int, side: int = 6) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i}.png").write_bytes(_png(np.full((side, side, 3), i, np.uint8)))


def test_class_folders(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2)):
        for label in ("dog", "cat"):
            _pictures(tmp_path / "both" / split / label, count)
    data = load_data(str(tmp_path / "both"))
    assert data.class_names == ("cat", "dog") and data.shape == (3, 6, 6)
    assert data.y_train.tolist() == [0] * 4 + [1] * 4 and data.x_train[:, 0, 0, 0].tolist() == [0, 1, 2, 3] * 2
    assert load_data(f"{tmp_path / 'both'},size=4").shape == (3, 4, 4)
    for label in ("dog", "cat"):
        _pictures(tmp_path / "alone" / label, 10)
    with pytest.raises(ValueError, match=r"say images:.* or faces:"):
        load_data(str(tmp_path / "alone"))
    data = load_data(f"images:{tmp_path / 'alone'}")
    assert (len(data.y_train), len(data.y_test)) == (16, 4) and data.y_test.tolist() == [0, 0, 1, 1]


def test_class_folders_that_will_not_do(tmp_path: Path) -> None:
    _pictures(tmp_path / "a" / "train" / "cat", 2)
    with pytest.raises(ValueError, match="train but no test folder"):
        load_data(str(tmp_path / "a"))
    _pictures(tmp_path / "a" / "test" / "cow", 2)
    with pytest.raises(ValueError, match="'cow', of which the train folder has no example"):
        load_data(str(tmp_path / "a"))
    (tmp_path / "a" / "test" / "cow").rename(tmp_path / "a" / "test" / "cat")
    (tmp_path / "a" / "test" / "cat" / "wide.png").write_bytes(_png(np.zeros((6, 9, 3), np.uint8)))
    with pytest.raises(ValueError, match=r"wide\.png has shape \(6, 9, 3\).*size=32"):
        load_data(str(tmp_path / "a"))
    (tmp_path / "a" / "test" / "cat" / "wide.png").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"wide\.png cannot be read"):
        load_data(str(tmp_path / "a"))


@pytest.mark.parametrize("case", BAD_NPZ)
def test_npz_that_will_not_do(case: str, tmp_path: Path) -> None:
    changes, message = BAD_NPZ[case]
    with pytest.raises(ValueError, match=message):
        load_data(_npz(tmp_path / "bad.npz", **changes))


def test_a_file_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    for count in (1, 2):
        y = np.array([0, 1, count])
        assert load_data(_npz(tmp_path / "a.npz", y_test=y)).y_test.tolist() == y.tolist()


def test_what_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match="expected digits, mnist"):
        load_data(str(tmp_path / "nothing.npz"))
    (tmp_path / "a.xyz").touch()
    with pytest.raises(ValueError, match=r"cannot read a \.xyz"):
        load_data(str(tmp_path / "a.xyz"))
    (tmp_path / "broken.npz").write_text("no zip")
    with pytest.raises(ValueError, match="cannot be read"):
        load_data(str(tmp_path / "broken.npz"))


@pytest.mark.parametrize(
    ("column", "shape", "sub", "test"), [("image", (5, 4), "", "test"), ("img", (5, 4, 3), "plain", "validation")]
)
def test_parquet_folder(column: str, shape: tuple[int, ...], sub: str, test: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(3).integers(0, 256, (5, *shape), dtype=np.uint8)
    files = [_png(image) for image in pixels]
    names = ["cat", "dog", "owl"] if sub else None
    _write_parquet(tmp_path / sub / "train-00000-of-00002.parquet", files[:2], [0, 1], names, column)
    _write_parquet(tmp_path / sub / "train-00001-of-00002.parquet", files[2:4], [2, 0], names, column)
    _write_parquet(tmp_path / sub / f"{test}-00000-of-00001.parquet", files[4:], [1], names, column)
    data = load_data(str(tmp_path))
    expected = torch.from_numpy(pixels)
    expected = expected.permute(0, 3, 1, 2) if len(shape) == 3 else expected[:, None]
    assert torch.equal(torch.cat([data.x_train, data.x_test]), expected)
    assert data.y_train.tolist() == [0, 1, 2, 0] and data.y_test.tolist() == [1]
    assert data.class_names == (("cat", "dog", "owl") if names else ("0", "1", "2"))


def test_parquet_that_will_not_do(tmp_path: Path) -> None:
    gray = [_png(np.zeros((4, 4), np.uint8))] * 2
    _write_parquet(tmp_path / "train-0.parquet", gray, [0, 1], None, "image")
    with pytest.raises(ValueError, match="no test split"):
        load_data(str(tmp_path))
    _write_parquet(tmp_path / "test-0.parquet", [gray[0], _png(np.zeros((5, 4), np.uint8))], [0, 1], None, "image")
    with pytest.raises(ValueError, match=r"image 1 has shape \(5, 4\)"):
        load_data(str(tmp_path))
    _write_parquet(tmp_path / "test-0.parquet", [gray[0], b"no image"], [0, 1], None, "image")
    with pytest.raises(ValueError, match="image 1 cannot be read"):
        load_data(str(tmp_path))
    _write_parquet(tmp_path / "test-0.parquet", gray, [0, 1], None, "picture")
    with pytest.raises(ValueError, match="picture"):
        load_data(str(tmp_path))
    _write_parquet(tmp_path / "other" / "test-0.parquet", gray, [0, 1], None, "image")
    with pytest.raises(ValueError, match="several data sets"):
        load_data(str(tmp_path))


def test_named_sets_come_from_the_folder_else_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked: list[str] = []

    def fail(name: str, **_: object) -> str:
        asked.append(name)
        raise RuntimeError("no network")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    monkeypatch.setenv("SPARRING_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no network.*SPARRING_DATA"):
        load_data("cifar10")
    assert asked == ["uoft-cs/cifar10"]
    gray = [_png(np.zeros((28, 28), np.uint8))] * 2
    for split in ("train", "test"):
        _write_parquet(tmp_path / "mnist" / f"{split}-0.parquet", gray, [0, 1], None, "image")
    assert load_data("mnist").shape == (1, 28, 28) and len(asked) == 1
    modalities._read.cache_clear()  # the same name means another folder to the tests after this one


def test_missing_extra_names_the_way_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train-0.parquet").touch()
    (tmp_path / "test-0.parquet").touch()

    def refuse(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", refuse)
    with pytest.raises(ImportError, match=r"pip install 'sparring\[data\]'"):
        read_images(str(tmp_path))


@pytest.mark.skipif(
    not (Path(os.environ.get("SPARRING_DATA") or "/nowhere") / "mnist").is_dir(), reason="SPARRING_DATA has no mnist"
)
def test_mnist_itself() -> None:
    data = load_data("mnist")
    assert data.x_train.shape == (60000, 1, 28, 28) and data.x_test.shape == (10000, 1, 28, 28)
    assert data.y_train[:5].tolist() == [5, 0, 4, 1, 9] and data.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.x_train.float().mean().item() / 255 == pytest.approx(0.1307, abs=1e-4)


def test_hold_out_keeps_shares_and_loses_nobody() -> None:
    y = torch.tensor([0] * 80 + [1] * 20)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]
    keep, held = hold_out(y, 0.1, seed=3)
    assert sorted(torch.cat([keep, held]).tolist()) == list(range(100))
    assert torch.bincount(y[held]).tolist() == [8, 2]
    assert torch.equal(held, hold_out(y, 0.1, seed=3)[1]) and not torch.equal(held, hold_out(y, 0.1, seed=4)[1])
    for fraction in (0.0, 1.0):
        with pytest.raises(ValueError, match="hold out"):
            hold_out(y, fraction, seed=0)


def test_hold_out_of_few_examples_gives_up_shares_not_the_run() -> None:
    for y in (torch.arange(10), torch.tensor([0] * 20 + [1])):
        keep, held = hold_out(y, 0.1, seed=0)
        assert sorted(torch.cat([keep, held]).tolist()) == list(range(len(y))) and len(held) >= 1


IMAGES = torch.rand(11, 3, 6, 5, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(11)


def _naive(index: int, seed: int, epoch: int, crop: int, flip: bool) -> torch.Tensor:
    """One image, cropped and mirrored with Python's own loops."""
    noise = Noise.make(seed, f"crop and flip, epoch {epoch}", torch.tensor([index]))
    top, left = (int(u * (2 * crop + 1)) for u in noise.uniform((2,))[0].tolist())
    mirror = flip and noise.uniform((1,), draw=1).item() < 0.5
    channels, height, width = IMAGES.shape[1:]
    out = torch.zeros(channels, height, width)
    for r in range(height):
        for c in range(width):
            row, column = r + top - crop, (width - 1 - c if mirror else c) + left - crop
            if 0 <= row < height and 0 <= column < width:
                out[:, r, c] = IMAGES[index, :, row, column]
    return out


@pytest.mark.parametrize(("crop", "flip"), [(0, True), (2, False), (2, True), (0, False)])
def test_crop_and_flip_are_those_of_a_naive_loop(crop: int, flip: bool) -> None:
    batches = Batches(IMAGES, LABELS, 4, seed=5, shuffle=True, augment=crop_and_flip(crop=crop, flip=flip))
    batches.set_epoch(3)
    for x, y in batches:
        assert torch.equal(x, torch.stack([_naive(int(i), 5, 3, crop, flip) for i in y]))


def test_draws_cover_every_offset_and_both_sides() -> None:
    ramp = torch.arange(1.0, 26).view(1, 1, 5, 5).expand(2000, 1, 5, 5)
    ((x, _),) = Batches(ramp, torch.zeros(2000, dtype=torch.long), 2000, augment=crop_and_flip(crop=1, flip=True))
    counts = torch.unique(x[:, 0, 2, 2], return_counts=True)[1]
    assert len(counts) == 9 and counts.min() > 2000 / 9 * 0.75  # the centre sees nine pixels alike
    mirrored = (x[:, 0, 2, 1] > x[:, 0, 2, 2]).float().mean().item()
    assert abs(mirrored - 0.5) < 0.05  # 4.5 standard deviations


def test_resuming_gives_the_same_bits_without_the_earlier_batches() -> None:
    scaled: list[int] = []
    batches = Batches(
        IMAGES, LABELS, 3, seed=1, shuffle=True, prepare=lambda x: scaled.append(len(x)) or x,
        augment=crop_and_flip(crop=1, flip=True),
    )  # fmt: skip
    batches.set_epoch(2)
    whole = list(batches)
    for start in range(5):
        scaled.clear()
        rest = list(batches.epoch_from(start))
        assert len(rest) == len(scaled) == 4 - start
        for (x, y), (x_rest, y_rest) in zip(whole[start:], rest, strict=True):
            assert torch.equal(x, x_rest) and torch.equal(y, y_rest)
    with pytest.raises(ValueError, match="4 batches"):
        batches.epoch_from(5)


def test_the_order_is_that_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int, **options: bool) -> list[int]:
        batches = Batches(IMAGES, LABELS, 2, seed=seed, **{"shuffle": True, **options})
        batches.set_epoch(epoch)
        return torch.cat([y for _, y in batches]).tolist()

    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = order(0, 0)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert first == order(0, 0) and sorted(first) == list(range(11))
    assert first != order(1, 0) and first != order(0, 1)
    assert order(0, 4, shuffle=False) == list(range(11))
    assert order(0, 0, drop_last=True) == first[:10]


def test_batches_scale_and_count() -> None:
    pixels = torch.tensor([[[[255]]], [[[51]]], [[[0]]]], dtype=torch.uint8)
    batches = Batches(pixels, torch.tensor([0, 1, 2], dtype=torch.uint8), 2, prepare=scale)
    assert [x.flatten().tolist() for x, _ in batches] == [[1.0, pytest.approx(0.2)], [0.0]]
    assert {(x.dtype, y.dtype) for x, y in batches} == {(torch.float32, torch.int64)}
    assert len(batches) == 2 and len(Batches(pixels, LABELS[:3], 2, drop_last=True)) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Batches(IMAGES, LABELS[:3], 2),
        lambda: Batches(IMAGES, LABELS.float(), 2),
        lambda: Batches(IMAGES[:0], LABELS[:0], 2),
        lambda: Batches(IMAGES, LABELS, 0),
        lambda: Batches(IMAGES, LABELS, 12, drop_last=True),
        lambda: list(Batches(IMAGES.flatten(1), LABELS, 2, augment=crop_and_flip(flip=True))),
        lambda: crop_and_flip(crop=-1),
    ],
)
def test_batches_refuse(make: object) -> None:
    with pytest.raises(ValueError, match=r"x of|batch_size|crop"):
        make()  # type: ignore[operator]


def test_draws_are_of_seed_and_row_alone_and_nest() -> None:
    y = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)  # sorted by class, as many files are
    few, many = draw(y, 12, seed=3), draw(y, 40, seed=3)
    assert set(few.tolist()) <= set(many.tolist()) and few.tolist() == sorted(set(few.tolist()))
    assert len(y[many].unique()) == 3 and not torch.equal(few, draw(y, 12, seed=4))
    assert draw(y, 1000, seed=3).tolist() == list(range(100))
    assert y[draw(y, 12, seed=3, balanced=True)].bincount().tolist() == [4, 4, 4]
    assert y[draw(y, 50, seed=3, balanced=True)].bincount().tolist() == [20, 20, 10]
