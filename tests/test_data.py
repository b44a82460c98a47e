"""Label maps, readers, roles, cache and loader."""

import importlib
import itertools
import multiprocessing
import shutil
import subprocess
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import like
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import baseline
import benchmark
import common
import datasets
from datasets import CITYSCAPES, GTA5, IGNORE, KITTI, VKITTI2

CPU = torch.device("cpu")


# ---- Label maps ---------------------------------------------------------------------------------
def test_the_label_map_of_cityscapes_is_the_official_one():
    """The 19 train ids as cityscapesscripts' labels.py has them, retyped from there."""
    official = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11}
    official |= {25: 12, 26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    table = datasets.label_table(CITYSCAPES)
    assert {i: int(t) for i, t in enumerate(table) if t < 19} == official
    assert [i for i, t in enumerate(table) if t == IGNORE] == sorted(set(range(34)) - set(official))
    assert (table[34:] == datasets.UNKNOWN).all()
    assert datasets.label_table(GTA5)[34] == IGNORE  # number plates


def test_both_sides_of_vkitti2kitti_give_a_class_the_same_train_id():
    colour, grey = datasets.label_table(VKITTI2, colours=True), datasets.label_table(KITTI)
    pairs = """100 60 100 7, 140 140 140 11, 255 130 0 17, 200 200 0 19, 255 255 0 20, 0 199 0 21,
    90 240 0 21, 210 0 200 22, 90 200 255 23, 255 127 80 26, 0 139 139 26, 160 60 60 27,
    250 100 255 0, 80 80 80 4, 0 0 0 0"""
    for r, g, b, grey_id in (map(int, pair.split()) for pair in pairs.split(",")):
        assert colour[r << 16 | g << 8 | b] == grey[grey_id]
    assert (colour != datasets.UNKNOWN).sum() == 15
    assert sorted(set(grey[grey < 254])) == list(range(10))


def test_the_palette_of_a_gta5_label_is_never_read():
    """Indices are the ids, whatever colours the palette gives them."""
    ids = np.arange(35, dtype=np.uint8).reshape(5, 7)
    label = Image.fromarray(ids, mode="P")
    label.putpalette([255, 0, 0] * 256)
    label.save("label.png")
    train_ids = datasets.read_label(Path("label.png"), GTA5)
    np.testing.assert_array_equal(train_ids, datasets.label_table(GTA5)[ids])


@pytest.mark.parametrize("dataset", datasets.DATASETS.values(), ids=lambda dataset: dataset.name)
def test_every_class_occurs_in_the_miniature_and_every_label_is_strict(mini, dataset):
    seen = set()
    for split in ("train",) if dataset in (VKITTI2, GTA5) else ("train", "test"):
        pairs, unlabelled = datasets.list_files(dataset, mini / dataset.name, split)
        assert not unlabelled
        for image, label in pairs:
            seen |= set(np.unique(datasets.read_label(label, dataset, image)))
    assert seen - {IGNORE} == set(range(len(dataset.classes)))


def test_a_16_bit_image_is_read_by_its_upper_8_bits():
    """Pillow alone would clip all values above 255 to white."""
    grey = np.arange(0, 1 << 16, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey).save("grey.png")
    image = datasets.read_image(Path("grey.png"), (16, 16))
    np.testing.assert_array_equal(image, np.stack([grey >> 8] * 3, axis=2))


def test_a_photo_is_read_upright_as_a_camera_held_it():
    """Orientation 3 of EXIF turns by 180 degrees, 6 by 90 degrees clockwise."""
    pixels = np.arange(64 * 32 * 3, dtype=np.uint8).reshape(32, 64, 3)
    for orientation, turns in ((1, 0), (3, 2), (6, -1)):
        exif = Image.Exif()
        exif[274] = orientation
        Image.fromarray(pixels).save("photo.png", exif=exif)
        upright = np.rot90(pixels, turns)
        np.testing.assert_array_equal(datasets.read_image(Path("photo.png")), upright)


def test_every_kind_of_orientation_counts_for_images_as_for_their_labels():
    """Cameras write EXIF data, ImageMagick and photo programs also other kinds of it."""
    exif, scene = Image.Exif(), Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
    exif[274], exif[271] = 3, "x"  # turned by 180 degrees
    # A resolution of type text, which Pillow reads, but cannot write again.
    odd = exif.tobytes().replace(b"\x01\x0f\x00\x02", b"\x01\x1a\x00\x02")
    xmp, text, late = '<rdf tiff:Orientation="3">', PngInfo(), PngInfo()
    text.add_itxt("XML:com.adobe.xmp", xmp)
    late.add(b"eXIf", exif.tobytes()[6:], after_idat=True)
    scene.save("exif.png", exif=odd)
    scene.save("xmp.png", pnginfo=text)
    scene.save("late.png", pnginfo=late)
    scene.save("xmp.jpg", xmp=xmp.encode(), quality=100)
    for name, turned in (("exif.png", 3), ("xmp.png", 3), ("xmp.jpg", 3), ("late.png", 0)):
        assert datasets.read_header(Path(name)) == (4, 4, turned > 0)
        stored = np.asarray(Image.open(name).convert("RGB"))
        expected = stored[::-1, ::-1] if turned else stored
        np.testing.assert_array_equal(datasets.read_image(Path(name)), expected)


def test_flat_images_have_a_colour_transfer():
    """One white source image, one photo of a single colour: the colour is transferred."""
    images = {"white": torch.ones(1, 3, 8, 8), "grey": torch.full((1, 3, 8, 8), 0.3)}
    images["noise"] = torch.rand(1, 3, 8, 8)
    for source, target in itertools.product(images.values(), repeat=2):
        new = common.color_transfer(source, target)
        assert new.isfinite().all()
        torch.testing.assert_close(new.mean(dim=(2, 3)), target.mean(dim=(2, 3)))


def test_genuine_label_files_are_no_train_ids(real: Path):
    for name in ("camvid_as_cityscapes", "cityscapes_sample"):
        for split in ("train", "test"):
            pairs, _ = datasets.list_files(CITYSCAPES, real / name, split)
            for chosen in (pairs, *([pair] for pair in pairs[::10])):
                if chosen:
                    datasets.check_labels(CITYSCAPES, chosen)


# ---- Files and roles ----------------------------------------------------------------------------
@pytest.fixture
def copy(mini: Path) -> Path:
    """A copy of the small miniature, to be changed."""
    return Path(shutil.copytree(mini, "copy"))


FOREIGN = {
    "cityscapes": """leftImg8bit/train/adorf/._adorf_1_leftImg8bit.png
        leftImg8bit/train/@eaDir/adorf_1_leftImg8bit.png gtFine/train/adorf/._a_gtFine_labelIds.png
        gtFine/train/adorf/adorf_9_gtFine_labelIds.png""",
    "kitti": "training/image_2/._0_10.png training/image_2/0_thumb_10.png",
    "gta5": """images/Thumbs.db images/.DS_Store images/._00001.png images/00001_thumb.jpg
        labels/00001_labelTrainIds.png labels/00002_labelTrainIds.png labels/._00001.png""",
    "vkitti2": "Scene01/clone/frames/rgb/Camera_0/._rgb_00000.jpg",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_other_programs_are_ignored_and_counted(copy: Path, name: str, capsys):
    dataset, root, paths = datasets.DATASETS[name], copy / name, FOREIGN[name].split()
    before = datasets.list_files(dataset, root, "train")
    assert capsys.readouterr().err == ""
    for path in paths:
        (root / path).parent.mkdir(exist_ok=True)
        shutil.copy(before[0][0][0], root / path)
    (root / "images/.ipynb_checkpoints").mkdir(parents=True, exist_ok=True)
    datasets.note.cache_clear()
    assert datasets.list_files(dataset, root, "train") == before
    assert f"{name}: {len(paths)} other files are ignored, such as" in capsys.readouterr().err


DEEPER = {  # as the archives are called
    "vkitti2": {"vkitti_2.0.3_rgb": "Scene*/*/*/rgb", "vkitti_2.0.3_classSegmentation": "Scene*"},
    "gta5": {"images": "images", "labels": "labels"},
    "kitti": {"data_semantics": "training"},
    "cityscapes": {"leftImg8bit_trainvaltest": "leftImg8bit", "gtFine_trainvaltest": "gtFine"},
}


@pytest.mark.parametrize("name", DEEPER)
def test_archives_unpacked_into_folders_of_their_own(copy: Path, name: str):
    dataset, root = datasets.DATASETS[name], copy / name
    before, _ = datasets.list_files(dataset, root, "train")
    root.rename("flat")
    for folder, pattern in DEEPER[name].items():
        for path in list(Path("flat").glob(pattern)):
            target = root / folder / path.relative_to("flat")
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    after, unlabelled = datasets.list_files(dataset, root, "train")
    assert not unlabelled and len(after) == len(before)
    for old, new in zip(before, after, strict=True):
        assert [path.name for path in old] == [path.name for path in new]


def test_images_at_two_depths_are_not_mixed_and_that_is_said(copy: Path, capsys):
    root = copy / "vkitti2"
    before = datasets.list_files(datasets.VKITTI2, root, "train")[0]
    (root / "vkitti_2.0.3_rgb").mkdir()
    (root / "Scene20").rename(root / "vkitti_2.0.3_rgb/Scene20")
    datasets.note.cache_clear()
    after = datasets.list_files(datasets.VKITTI2, root, "train")[0]
    assert 0 < len(after) < len(before)
    assert "files one folder deeper are not used, such as vkitti_2.0.3" in capsys.readouterr().err


def test_the_same_name_twice_one_folder_deeper_is_refused():
    for part in ("a", "b"):
        Path(part, "images").mkdir(parents=True)
        Path(part, "images/1.png").touch()
    with pytest.raises(
        datasets.UserError, match=r"a/images/1.png and b/images/1.png have the same"
    ):
        datasets.list_files(GTA5, Path(), "train")


def test_names_with_accents_match_however_they_are_written():
    """A Mac writes an accent as a character of its own (NFD), Linux mostly does not (NFC)."""
    names = [unicodedata.normalize(form, "Z\u00fcrich.png") for form in ("NFD", "NFC")]
    for folder, name in zip(("images", "labels"), names, strict=True):
        Path(folder).mkdir()
        Path(folder, name).touch()
    pairs, unlabelled = datasets.list_files(GTA5, Path(), "train")
    assert [path.name for path in pairs[0]] == names and not unlabelled


def test_only_the_whole_gta5_leaves_out_the_frames_that_mismatch(monkeypatch, capsys):
    monkeypatch.setattr(datasets, "GTA5_FRAMES", 64)  # so that two files are the full set
    for number, expected in ((15188, ["15188"]), (15187, ["15187"]), (20861, ["15187", "20861"])):
        for folder in (Path("images"), Path("labels")):
            folder.mkdir(exist_ok=True)
            (folder / f"{number}.png").touch()
        pairs, _ = datasets.list_files(GTA5, Path(), "train")
        assert [image.stem for image, _ in pairs] == expected
    assert "1 frames are left out" in capsys.readouterr().err


def test_roles_share_no_photo_and_few_is_evenly_spaced(args: common.Args):
    for name in datasets.BENCHMARKS:
        a = common.resolve(replace(args, benchmark=name, labelled=3), "x")
        train, few = datasets.load(a, "target_train"), datasets.load(a, "target_few")
        test, bare = datasets.load(a, "target_test"), datasets.load(a, "target_unlabelled")
        assert bare.labels is None and test.labels is None and bare.names == train.names
        assert set(few.names) < set(train.names) and not set(train.names) & set(test.names)
        places = np.array([train.names.index(name) for name in few.names])
        assert np.ptp(np.diff(places)) <= 1 and abs(places.mean() - (len(train) - 1) / 2) <= 1
        np.testing.assert_array_equal(few.images, train.images[places])
        np.testing.assert_array_equal(few.labels, train.labels[places])
        assert max(train.names) < min(test.names)  # KITTI's are contiguous halves of the drive


def test_a_photo_without_a_label_serves_where_no_label_is_needed(args: common.Args, copy: Path):
    a = common.resolve(replace(args, data="copy"), "x")
    photos, labels = copy / "kitti/training/image_2", copy / "kitti/training/semantic"
    before, names = datasets.load(a, "target_train"), sorted(path.name for path in photos.iterdir())
    for name in names[::2]:
        (labels / name).unlink()
    a = common.resolve(a, "x")
    bare, train = datasets.load(a, "target_unlabelled"), datasets.load(a, "target_train")
    few, test = datasets.load(a, "target_few"), datasets.load(a, "target_test")
    assert [Path(name).name for name in train.names] == names[1:6:2]  # half of those with a label
    assert [Path(name).name for name in test.names] == names[7::2] and len(test.test_files) == 3
    assert set(few.names) < set(train.names) and len(bare) == 9 and len(before) == 6
    assert set(bare.names) == {f"training/image_2/{name}" for name in names} - set(test.names)


ROWS = ["color_transfer", "adversarial_da", "metasim", "diffusion_bridge", "bridge_train"]


@pytest.mark.parametrize("row", ROWS)
def test_photos_without_any_label_are_enough(args: common.Args, copy: Path, row: str):
    """For every row that uses no target label; it ends with pictures instead of a score."""
    if row in ("adversarial_da", "bridge_train"):  # only a folder of photos: no val either
        args = replace(args, benchmark="gta52cityscapes")
        shutil.rmtree(copy / "cityscapes/gtFine")
        shutil.rmtree(copy / "cityscapes/leftImg8bit/val")
    shutil.rmtree(copy / "kitti/training/semantic")
    kind, run, own = baseline.Args, baseline.run, {"row": row}
    if row not in benchmark.BASELINES:
        module = importlib.import_module(row.replace("bridge_train", "diffusion_bridge"))
        run = module.train if row == "bridge_train" else module.run
        kind, own = module.Args, {}
    result = run(like(args, kind, steps=4, data="copy", out=Path("run"), **own))
    if row != "bridge_train":
        assert result.miou is None and set(result.iou.values()) == {None}
        assert Path("run/figures/predictions.png").stat().st_size > 10_000


# ---- Cache --------------------------------------------------------------------------------------
def pictures(count: int) -> list[Path]:
    """Files whose picture i is all i."""
    files = [Path(f"pictures/{i}.png") for i in range(count)]
    files[0].parent.mkdir(exist_ok=True)
    for i, file in enumerate(files):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(file)
    return files


def test_the_cache_follows_the_content_of_its_files():
    files, calls = pictures(5), []

    def read(i: int) -> np.ndarray:
        calls.append(i)
        return datasets.read_image(files[i], (4, 4))

    first = datasets.cached(Path("cache"), "x", files, (4, 4, 3), read)
    assert isinstance(first, np.memmap) and first[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    shutil.copytree("pictures", "copy")
    copies = [Path("copy", file.name) for file in files]
    datasets.cached(Path("cache"), "x", copies, (4, 4, 3), read)
    assert len(calls) == 5  # nothing was decoded again, also not for a copy of the files
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(files[2])
    assert datasets.cached(Path("cache"), "x", files, (4, 4, 3), read)[2, 0, 0, 0] == 9
    assert datasets.cached(Path("cache"), "x", files[:2], (4, 4, 3), read).shape == (2, 4, 4, 3)


def test_two_first_runs_at_once_both_get_a_whole_cache():
    """Two processes, each of which waits until the other builds the same file."""
    fork = multiprocessing.get_context("fork")
    files, both = pictures(70), fork.Barrier(2)  # 70: more than are read at a time

    def first_run() -> None:
        def read(i: int) -> np.ndarray:
            if i == 69:
                both.wait(timeout=20)
            return datasets.read_image(files[i], (4, 4))

        array = datasets.cached(Path("cache"), "x", files, (4, 4, 3), read)
        assert array[:, 0, 0, 0].tolist() == list(range(70))

    processes = [fork.Process(target=first_run) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert len(list(Path("cache").iterdir())) == 1


def test_a_full_disk_is_an_error_before_the_first_write_to_memory():
    """Else the process would die of SIGBUS. The blocks of the file are there beforehand."""
    path = Path("disk/array.npy")
    array = datasets.create_array(path, (64, 100, 100))
    assert path.stat().st_blocks * 512 >= array.nbytes and not array.any()
    array[3] = 7
    assert (datasets.create_array(path, (64, 100, 100))[3] == 7).all()  # one of this shape is kept
    path.unlink()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", "disk"]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk can only be mounted by root")
    try:
        with pytest.raises(OSError):
            datasets.create_array(path, (64, 100, 100))
        assert not list(path.parent.iterdir())
    finally:
        subprocess.run(["umount", "disk"], check=True)


def test_a_set_made_by_one_method_is_the_source_of_another(args: common.Args):
    source, folder = datasets.load(args, "source"), Path("set")
    made = replace(args, init=folder)

    def make(images: np.ndarray) -> dict:
        datasets.create_array(folder / "images.npy", images.shape)[:] = images
        datasets.save_set(folder, source, source.labels[::2], source.names[::2])
        return common.configuration(common.resolve(made, "x"), "x")

    before, after = make(source.images[::2]), make(255 - source.images[::2])
    assert before != after  # its content decides
    split = datasets.load(made, "source")
    assert made.checkpoint is None and split.names == source.names[::2]
    assert (split.images == 255 - source.images[::2]).all()
    assert (split.labels == source.labels[::2]).all()


# ---- Loader and random streams ------------------------------------------------------------------
def split_of(count: int) -> datasets.Split:
    """Image i is all i; so is its label."""
    images = np.arange(count, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    return datasets.Split(KITTI, tuple(map(str, range(count))), images, images[..., 0])


def test_an_epoch_holds_every_image_once_and_labels_follow_their_images():
    loader, seen = common.Loader(split_of(10), 4, CPU, 3, "train"), []
    for step in range(5):  # two epochs; the third batch straddles them
        images, labels = loader(step)
        indices = loader.indices(step).tolist()
        assert (images[:, 0, 0, 0] * 255).round().tolist() == labels[:, 0, 0].tolist() == indices
        seen += indices
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10)) and seen[:10] != seen[10:]
    few = common.Loader(split_of(2), 5, CPU, "x").indices(0)  # less images than a batch needs
    assert sorted(np.bincount(few)) == [2, 3]


def test_streams_are_named_and_a_batch_depends_on_stream_and_step_alone():
    def batches(*stream: int | str, steps: range = range(6)) -> list[list[int]]:
        loader = common.Loader(split_of(7), 3, CPU, *stream)
        return [loader.indices(step).tolist() for step in steps]

    assert batches(1, "align") == batches(1, "align", steps=range(5, -1, -1))[::-1]
    names = [(0, "align"), (1, "align"), (0, "self_train"), (0, "align", 1), (0, "align1"), (12, 3)]
    names += [(1, 23), ("0", "align")]
    assert len({str(batches(*stream)) for stream in names}) == len(names)
    draws = {common.draw(common.generator(*stream), 1).item() for stream in names}
    assert len(draws) == len(names)
    assert common.draw(common.generator(0, "align"), 1).item() in draws


def test_processes_share_a_global_batch(monkeypatch: pytest.MonkeyPatch):
    """What three processes get is in this order what one would get: images and draws."""
    loader = common.Loader(split_of(11), 6, CPU, "train")
    whole, numbers = loader.indices(4), common.draw(common.generator("x"), 6, 2)
    monkeypatch.setattr(common, "world_size", lambda: 3)
    shares, draws = [], []
    for rank in range(3):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        shares.append(loader.indices(4))
        draws.append(common.draw(common.generator("x"), 2, 2))
    np.testing.assert_array_equal(np.concatenate(shares), whole)
    assert torch.equal(torch.cat(draws), numbers)
