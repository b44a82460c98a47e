"""Label maps, readers, roles, cache, batches and augmentation."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import IGNORE, UserError


# ---- Label maps ---------------------------------------------------------------------------------
def test_the_label_map_of_cityscapes_is_the_official_one():
    """The 19 train ids as cityscapesscripts' labels.py has them, retyped from there."""
    official = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11}
    official |= {25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    table = common.label_table("cityscapes")
    assert {i: int(t) for i, t in enumerate(table) if t < 19} == official
    assert [i for i, t in enumerate(table) if t == IGNORE] == sorted(set(range(34)) - set(official))
    assert (table[34:] == common.UNKNOWN).all()
    assert common.label_table("gta5")[34] == IGNORE  # number plates


def test_both_sides_of_vkitti2kitti_give_a_class_the_same_train_id():
    colour, grey = common.label_table("vkitti2"), common.label_table("kitti")
    pairs = {
        (100, 60, 100): 7, (140, 140, 140): 11, (255, 130, 0): 17, (200, 200, 0): 19,
        (255, 255, 0): 20, (0, 199, 0): 21, (90, 240, 0): 21, (210, 0, 200): 22,
        (90, 200, 255): 23, (255, 127, 80): 26, (0, 139, 139): 26, (160, 60, 60): 27,
        (250, 100, 255): 0, (80, 80, 80): 4, (0, 0, 0): 0,
    }  # fmt: skip
    for (r, g, b), grey_id in pairs.items():
        assert colour[r << 16 | g << 8 | b] == grey[grey_id]
    assert (colour != common.UNKNOWN).sum() == 15
    assert sorted(set(grey[grey < 254])) == list(range(10))


def test_the_palette_of_a_gta5_label_is_never_read(tmp_path: Path):
    """Indices are the ids, whatever colours the palette gives them."""
    ids = np.arange(35, dtype=np.uint8).reshape(5, 7)
    label = Image.fromarray(ids, mode="P")
    label.putpalette([255, 0, 0] * 256)
    label.save(tmp_path / "label.png")
    expected = common.label_table("gta5")[ids]
    np.testing.assert_array_equal(common.read_label(tmp_path / "label.png", "gta5"), expected)


@pytest.mark.parametrize("dataset", ["vkitti2", "kitti", "gta5", "cityscapes"])
def test_every_class_occurs_in_the_miniature_and_every_label_is_strict(mini: Path, dataset: str):
    seen = set()
    source = dataset in ("vkitti2", "gta5")
    for part in ("train",) if source else ("train", "test"):
        listing = common.list_files(dataset, mini / dataset, part, ("clone", "fog"))
        assert not listing.unlabelled and not listing.orphans
        for image, label in listing.pairs:
            seen |= set(np.unique(common.read_label(label, dataset, image)))
    assert seen - {IGNORE} == set(range(len(common.classes_of(dataset))))


def test_genuine_cityscapes_pairs_are_read(real: Path):
    listing = common.list_files("cityscapes", real / "cityscapes_sample", "train", ())
    assert len(listing.pairs) == 3
    for image, label in listing.pairs:
        ids = common.read_label(label, "cityscapes", image)
        raw = np.asarray(Image.open(label))
        assert ids.shape == (1024, 2048)
        np.testing.assert_array_equal(ids == 0, raw == 7)
        np.testing.assert_array_equal(ids == 18, raw == 33)
        np.testing.assert_array_equal(ids == IGNORE, np.isin(raw, [0, 1, 3, 4, 5, 6]))


# ---- Roles --------------------------------------------------------------------------------------
def test_roles_share_no_photo_and_few_is_evenly_spaced(args: common.Args):
    for benchmark in common.BENCHMARKS:
        a = common.resolve(replace(args, benchmark=benchmark, labelled=3), "x")
        train, few = common.load(a, "target_train"), common.load(a, "target_few")
        test, bare = common.load(a, "target_test"), common.load(a, "target_unlabelled")
        assert bare.labels is None and test.labels is None
        assert bare.names == train.names
        assert set(few.names) < set(train.names) and not set(train.names) & set(test.names)
        places = np.array([train.names.index(name) for name in few.names])
        assert np.ptp(np.diff(places)) <= 1 and abs(places.mean() - (len(train) - 1) / 2) <= 1
        np.testing.assert_array_equal(few.images, train.images[places])
        np.testing.assert_array_equal(few.labels, train.labels[places])


def test_kitti_is_split_into_contiguous_halves(mini: Path):
    train = common.list_files("kitti", mini / "kitti", "train", ()).pairs
    test = common.list_files("kitti", mini / "kitti", "test", ()).pairs
    assert max(train)[0].name < min(test)[0].name and abs(len(train) - len(test)) <= 1


def test_gta5_leaves_out_the_frames_that_are_known_to_mismatch(tmp_path: Path):
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        for number in (15187, 15188, 20801, 20861):
            (tmp_path / folder / f"{number}.png").touch()
    names = [image.stem for image, _ in common.list_files("gta5", tmp_path, "train", ()).pairs]
    assert names == ["15187", "20861"]


def test_variants_of_vkitti2_add_frames_with_the_same_labels(mini: Path):
    clone = common.list_files("vkitti2", mini / "vkitti2", "train", ("clone",)).pairs
    both = common.list_files("vkitti2", mini / "vkitti2", "train", ("clone", "fog")).pairs
    assert len(both) > len(clone) and set(clone) < set(both)


def test_unlabelled_photos_need_no_label_file(args: common.Args, mini: Path, tmp_path: Path):
    shutil.copytree(mini, tmp_path / "copy")
    labels = sorted((tmp_path / "copy/kitti/training/semantic").iterdir())
    a = common.resolve(replace(args, data=str(tmp_path / "copy")), "x")
    labels[0].unlink()
    assert len(common.load(a, "target_unlabelled")) == len(labels) // 2
    with pytest.raises(UserError, match="image without a label"):
        common.load(a, "target_train")


# ---- Cache --------------------------------------------------------------------------------------
def test_the_cache_follows_its_files(tmp_path: Path):
    files = [tmp_path / f"{i}.png" for i in range(5)]
    for i, file in enumerate(files):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(file)
    calls = []

    def read(path: Path) -> np.ndarray:
        calls.append(path)
        return common.read_image(path, (4, 4))

    first = common.cached("x", files, (4, 4, 3), read)
    assert isinstance(first, np.memmap) and first[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    common.cached("x", files, (4, 4, 3), read)
    assert len(calls) == 5  # the second time nothing is decoded
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(files[2])
    assert common.cached("x", files, (4, 4, 3), read)[2, 0, 0, 0] == 9
    for file in common.CACHE.iterdir():  # damaged, as by a full disk
        file.write_bytes(file.read_bytes()[:100])
    assert common.cached("x", files, (4, 4, 3), read)[:, 0, 0, 0].tolist() == [0, 1, 9, 3, 4]
    shutil.rmtree(common.CACHE)
    assert common.cached("x", files[:2], (4, 4, 3), read).shape == (2, 4, 4, 3)


def test_the_cache_takes_arrays_of_any_order(tmp_path: Path):
    """Such as a permuted tensor is; ten of them, more than are handed over at a time."""
    files, rng = [tmp_path / str(i) for i in range(10)], np.random.default_rng(0)
    arrays = {file: rng.integers(256, size=(3, 4, 5), dtype=np.uint8) for file in files}
    for file in files:
        file.touch()
    found = common.cached("x", files, (4, 5, 3), lambda file: arrays[file].transpose(1, 2, 0))
    for file, array in zip(files, found, strict=True):
        np.testing.assert_array_equal(array, arrays[file].transpose(1, 2, 0))


def test_a_failed_read_leaves_no_cache_behind(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match=r"a\.png"):
        common.cached("x", [tmp_path / "a.png"], (4, 4, 3), lambda p: common.read_image(p, (4, 4)))
    assert all(path.suffix == ".lock" for path in common.CACHE.iterdir())


# ---- Batches ------------------------------------------------------------------------------------
def part_of(images: int) -> common.Part:
    """Image i is all i; so is its label."""
    pictures = np.broadcast_to(
        np.arange(images, dtype=np.uint8)[:, None, None, None], (images, 4, 6, 3)
    )
    names = tuple(map(str, range(images)))
    return common.Part("kitti", names, pictures, pictures[..., 0])


def test_an_epoch_holds_every_image_once_and_labels_follow_their_images():
    batches = common.Batches(part_of(10), 4, seed=3, device=torch.device("cpu"))
    seen = []
    for step in range(5):  # two epochs; the third batch straddles them
        batch = batches(step)
        values = (batch.images[:, 0, 0, 0] * 255).round().long()
        assert values.tolist() == batch.index.tolist() == batch.labels[:, 0, 0].tolist()
        seen += batch.index.tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]


def test_a_batch_depends_on_seed_and_step_alone():
    device = torch.device("cpu")
    forward = common.Batches(part_of(7), 3, seed=1, device=device)
    jumping = common.Batches(part_of(7), 3, seed=1, device=device)
    other = common.Batches(part_of(7), 3, seed=2, device=device)
    expected = [forward(step).index.tolist() for step in range(6)]
    assert [jumping(step).index.tolist() for step in (5, 2)] == [expected[5], expected[2]]
    assert [other(step).index.tolist() for step in range(6)] != expected


def test_a_part_smaller_than_a_batch_is_repeated():
    batch = common.Batches(part_of(2), 5, 0, torch.device("cpu"))(0)
    assert sorted(np.bincount(batch.index).tolist()) == [2, 3]


# ---- Augmentation -------------------------------------------------------------------------------
def test_labels_move_with_their_images():
    """Label k is painted as grey k/10; where no border is near, the two still agree afterwards."""
    labels = torch.randint(0, 10, (8, 4, 8)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = (labels[:, None] / 10).expand(-1, 3, -1, -1)
    moved, marks = common.crop_flip(images, labels, common.generator(0))
    assert moved.shape == images.shape and marks.shape == labels.shape
    assert ((moved[:, 0] * 10 - marks).abs() < 0.01).float().mean() > 0.8
    assert set(marks.unique().tolist()) <= set(range(10))  # no label is interpolated
    assert not torch.equal(marks, labels)


def test_crop_flip_without_zoom_is_identity_or_mirror():
    images, labels = torch.rand(16, 3, 8, 8), torch.randint(0, 5, (16, 8, 8))
    moved, marks = common.crop_flip(images, labels, common.generator(1), zoom=1.0)
    flipped = 0
    for before, after, label, mark in zip(images, moved, labels, marks, strict=True):
        mirror = torch.allclose(after, before.flip(-1), atol=1e-5)
        assert mirror or torch.allclose(after, before, atol=1e-5)
        assert torch.equal(mark, label.flip(-1) if mirror else label)
        flipped += mirror
    assert 2 <= flipped <= 14


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_augmentations_keep_range_and_shape_and_follow_their_generator(name: str):
    augment, images = common.AUGMENTATIONS[name], torch.rand(6, 3, 32, 64)
    once, again = augment(images, common.generator(5)), augment(images, common.generator(5))
    assert once.shape == images.shape and once.min() >= 0 and once.max() <= 1
    assert torch.equal(once, again)
    assert torch.equal(once, images) == (name == "original")
    same = augment(images[:1].expand(6, -1, -1, -1), common.generator(5))
    assert name == "original" or not torch.equal(same[0], same[1])  # drawn for each image


def test_augmentations_do_what_their_names_say():
    rng, flat = common.generator(0), torch.full((4, 3, 32, 32), 0.5)
    torch.testing.assert_close(common.blur(flat, rng), flat)  # weights sum to 1
    noise = torch.rand(4, 3, 32, 32)
    assert (common.blur(noise, rng).var(dim=(2, 3)) <= noise.var(dim=(2, 3))).all()
    grey = torch.rand(4, 1, 16, 16).expand(-1, 3, -1, -1) * 0.5 + 0.25
    jittered = common.colorjitter(grey, rng)  # neither hue nor saturation changes a grey
    torch.testing.assert_close(jittered, jittered[:, :1].expand_as(jittered), atol=1e-5, rtol=0)
    shift = common.rgbshift(flat, rng) - flat
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift))
    assert shift[:, :, 0, 0].unique().numel() == 12 and shift.abs().max() <= 0.2


def test_random_augmentation_picks_each_equally_often():
    images = torch.rand(400, 3, 16, 16) * 0.4 + 0.3
    mixed = common.random_augmentation(images, common.generator(0))
    untouched = (mixed == images).all(dim=3).all(dim=2).all(dim=1).float().mean()
    assert 0.18 < untouched < 0.32
