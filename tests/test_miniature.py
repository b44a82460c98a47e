"""The miniature: the same bytes, official layouts, domains that differ, nobody's files lost."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment
from PIL import Image

import datasets
import miniature


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def pairs_of(mini: Path, name: str, split: str = "train") -> list[tuple[Path, Path]]:
    return datasets.list_files(datasets.DATASETS[name], mini / name, split)[0]


def test_a_seed_gives_the_same_bytes_whatever_the_number_of_processes(mini: Path):
    miniature.write(Path("one"), seed=0, scale=0.01, workers=1)
    miniature.write(Path("two"), seed=0, scale=0.01, workers=2)
    miniature.write(Path("other"), seed=4, scale=0.01)
    first, second, other = (digest(Path(name)) for name in ("one", "two", "other"))
    assert first == second and first.keys() == other.keys()
    assert not set(first.values()) & set(other.values())
    larger = digest(mini)  # an image does not depend on how many are written
    images = [name for name in first.keys() & larger.keys() if name.startswith("gta5/images")]
    assert images and all(first[name] == larger[name] for name in images)


def test_labels_have_the_official_formats(mini: Path):
    modes = {
        "gta5/labels/00001.png": "P",
        "kitti/training/semantic/000000_10.png": "L",
        "vkitti2/Scene01/clone/frames/classSegmentation/Camera_0/classgt_00000.png": "RGB",
    }
    for name, mode in modes.items():
        assert Image.open(mini / name).mode == mode
    palette = np.array(Image.open(mini / "gta5/labels/00001.png").getpalette()).reshape(-1, 3)
    for name, number in datasets.CITYSCAPES_IDS.items():
        assert tuple(palette[number]) == datasets.PALETTE[name], name


def test_label_and_image_are_of_one_size_and_kitti_has_several(mini: Path):
    sizes = set()
    for split in ("train", "test"):
        for image, label in pairs_of(mini, "kitti", split):
            assert Image.open(image).size == Image.open(label).size
            sizes.add(Image.open(image).size)
    assert len(sizes) > 1


def test_the_variant_fog_has_the_labels_of_clone_and_other_pictures(mini: Path):
    clone, fog = (mini / f"vkitti2/Scene01/{variant}/frames" for variant in ("clone", "fog"))
    label, rgb = "classSegmentation/Camera_0/classgt_00000.png", "rgb/Camera_0/rgb_00000.jpg"
    assert (clone / label).read_bytes() == (fog / label).read_bytes()
    assert (clone / rgb).read_bytes() != (fog / rgb).read_bytes()


def test_domains_differ_in_colour_and_in_content(mini: Path):
    """Mean or contrast of a channel is well apart, and so are the shares of the classes."""
    colours, shares = {}, {}
    for name, dataset in datasets.DATASETS.items():
        pairs = pairs_of(mini, name)
        pictures = np.stack([datasets.read_image(image, (32, 64)) for image, _ in pairs])
        labels = np.concatenate([datasets.read_label(path, dataset).ravel() for _, path in pairs])
        shares[name] = np.bincount(labels, minlength=256) / len(labels)
        colours[name] = np.r_[pictures.mean(axis=(0, 1, 2)), pictures.std(axis=(0, 1, 2))]
    for source, target in (("vkitti2", "kitti"), ("gta5", "cityscapes")):
        assert np.abs(colours[source] - colours[target]).max() > 10  # of 255
        assert np.abs(shares[source] - shares[target]).sum() / 2 > 0.05  # total variation


@pytest.mark.parametrize("name", ["gta5", "cityscapes"])
def test_a_photo_has_the_noise_and_texture_of_no_flat_drawing(mini: Path, name: str):
    """Few pixels equal their right neighbour exactly, as they would in flat-coloured areas."""
    pairs = pairs_of(mini, name)
    pictures = [np.asarray(Image.open(image).convert("RGB")).astype(int) for image, _ in pairs]
    flat = np.mean([(np.abs(np.diff(p, axis=1)).max(axis=-1) == 0).mean() for p in pictures])
    assert flat < 0.2


def test_it_replaces_a_miniature_but_nothing_else():
    out = Path("out")
    miniature.write(out, seed=0, scale=0.01)
    assert miniature.is_current(out, seed=0, scale=0.01)
    stamp = (out / "gta5/miniature.json").stat().st_mtime_ns
    miniature.write(out, seed=0, scale=0.01)
    assert (out / "gta5/miniature.json").stat().st_mtime_ns == stamp
    miniature.write(out, seed=1, scale=0.01)
    assert json.loads((out / "gta5/miniature.json").read_text())["seed"] == 1

    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("mine")
    command = [sys.executable, str(ROOT / "miniature.py"), "--out", "mine", "--scale", "0.01"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode != 0 and ended.stderr.count("\n") == 1 and "mine" in ended.stderr
    assert digest(Path("mine")).keys() == {"thesis.txt"}
