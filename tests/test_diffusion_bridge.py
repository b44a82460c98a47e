"""The bridge against closed forms, its checks, and the contract of the folder."""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import begun, interrupted, like, read_scalars
from PIL import Image
from torch import Tensor

import common
import datasets
import diffusion_bridge as db
from datasets import IGNORE, UserError

CPU = torch.device("cpu")
SIZE = (32, 64)


def rising(steps: int, strength: float = 1.0) -> list[float]:
    """Angles from the image towards noise."""
    return np.linspace(0, strength * math.pi / 2, steps + 1).tolist()


def row(args: common.Args, out: str, **changes) -> db.Args:
    short = {"unet_steps": 4, "reader_steps": 4, "width": 8, "levels": 3, "sample_steps": 2}
    return like(args, db.Args, **{"out": Path(out), **short, **changes})


@pytest.fixture(scope="module")
def trained(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Trained on the small miniature within seconds; the source; bridge.pt. Read only."""
    here, folder = Path.cwd(), tmp_path_factory.mktemp("bridge")
    os.chdir(folder)
    options = {"steps": 2, "batch_size": 8, "size": SIZE, "labelled": 2, "device": "cpu"}
    options |= {"width": 16, "unet_steps": 120, "reader_steps": 10, "out": folder / "run"}
    args = db.Args(data=str(mini), **options)
    run = begun(args, "diffusion_bridge_train", stages=2)
    source = datasets.load(run.args, "source")
    photos = datasets.load(run.args, "target_unlabelled")
    bridge = db.train_bridge(run, db.fill_in(run.args), source, photos)
    os.chdir(here)
    return bridge, source, folder / "run/bridge.pt"


def batch(trained: tuple, count: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images, uint8 [B,H,W,3], labels [B,H,W] and names of the source."""
    source = trained[1]
    images, labels = (np.array(x[:count]) for x in (source.images, source.labels))
    return images, labels, list(source.names[:count])


# ---- Sampler ------------------------------------------------------------------------------------
def gaussian(mean: Tensor, std: Tensor, x: Tensor, angle: float) -> Tensor:
    """E[cos(a) e - sin(a) x0 | x_a] for x0 ~ N(mean, std^2), by the normal's conditional mean."""
    cos, sin = math.cos(angle), math.sin(angle)
    off = (x - cos * mean) / (cos**2 * std**2 + sin**2)
    return cos * (sin * off) - sin * (mean + cos * std**2 * off)


SHAPE = (2, 3, 2, 2)
MEAN, STD = torch.linspace(-1, 1, 24).view(SHAPE).double(), torch.full(SHAPE, 0.6).double()


@pytest.mark.parametrize("back", [False, True])
def test_flow_of_a_gaussian_is_exact_in_the_limit_and_of_second_order(back: bool):
    noise = torch.randn(SHAPE, generator=common.generator(0)).double()
    image, errors = MEAN + STD * noise, []  # the flow keeps the number of deviations from the mean
    for steps in (32, 64, 128):
        angles = rising(steps)[:: -1 if back else 1]
        result = db.flow(partial(gaussian, MEAN, STD), noise if back else image, angles)
        errors.append(float((result - (image if back else noise)).abs().max()))
    assert errors[-1] < 1e-3
    assert errors[0] / errors[1] > 3.2 and errors[1] / errors[2] > 3.2  # 4 in the limit, DDIM has 2
    angles, velocity = (0.0301, 0.03, 0.0), partial(gaussian, MEAN, STD)
    result = db.flow(lambda x, a: velocity(x, a) + (a == 0.03) / 100, MEAN, angles)  # v's error
    assert (result - MEAN).abs().max() < 0.01  # a far step after a near one does not multiply it


def test_bridge_between_gaussians_is_the_map_of_least_transport():
    """DDIB: encoded to pure noise and decoded, x goes to m' + s' (x - m) / s."""
    x = MEAN + STD * torch.randn(SHAPE, generator=common.generator(1)).double()
    mean, std = MEAN.flip(1) + 0.3, 0.5 * STD
    angles = rising(400)
    noise = db.flow(partial(gaussian, MEAN, STD), x, angles)
    torch.testing.assert_close(noise, (x - MEAN) / STD, atol=1e-4, rtol=0)
    result = db.flow(partial(gaussian, mean, std), noise, angles[::-1])
    torch.testing.assert_close(result, mean + std * (x - MEAN) / STD, atol=1e-4, rtol=0)


@pytest.mark.parametrize("std", [1.0, 0.3, 0.1, 0.03, 0.01, 0.0])
def test_noise_has_deviation_one_however_flat_the_data_are(std: float):
    """Equal steps from zero noise gave 0.3 at a deviation of 0.03, as in a sky."""
    rng = common.generator(2)
    x, noise = (torch.randn(20_000, generator=rng).double() for _ in range(2))
    angles = db.noise_levels(db.TranslateArgs(strength=1.0))
    assert (angles[0], angles[-1], len(angles)) == pytest.approx((0.01 * math.pi, math.pi / 2, 13))
    x = math.cos(angles[0]) * std * x + math.sin(angles[0]) * noise
    velocity = partial(gaussian, torch.tensor(0.0), torch.tensor(std))
    assert 0.95 < db.flow(velocity, x, angles).std() < 1.1
    plain = db.flow(velocity, 0.03 * noise, rising(12)).std() if std == 0.03 else 0
    assert plain < 0.4


def test_sdedit_adds_noise_once_and_follows_the_flow_of_the_target(trained: tuple, monkeypatch):
    """With a U-Net that knows a single image it ends there, whatever the noise."""
    bridge, goal = copy.deepcopy(trained[0]), torch.full((1, 12, 1, 1), 0.2)
    domains = []

    def velocity(x: Tensor, maps: Tensor, angle: Tensor, domain: Tensor, _) -> Tensor:
        domains.append(int(domain[0]))
        cos, sin = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        return cos * (x - cos * goal) / sin.clamp(min=1e-9) - sin * goal

    monkeypatch.setattr(bridge.unet, "forward", velocity)
    images, labels, names = batch(trained, 2)
    expected = common.to_uint8(bridge.from_cells(goal.expand(2, -1, 16, 32)).clamp(0, 1))
    args = db.TranslateArgs(bridge="sdedit", sample_steps=5)
    result, deviation = bridge.translate(images, labels, names, args)
    np.testing.assert_allclose(result, expected, atol=1)
    assert domains == [db.TARGET] * 6  # the last one from the lowest noise level to the image
    assert (abs(deviation - 1) < 0.1).all()
    bridge.translate(images, labels, names, db.TranslateArgs(sample_steps=5))
    assert domains[6:] == [db.SOURCE] * 5 + [db.TARGET] * 6


# ---- What is diffused, network and conditions ---------------------------------------------------
def new_bridge(patch: int) -> db.Bridge:
    config = {"patch": patch, "width": 8, "levels": 3, "classes": ["a", "b"]}
    return db.Bridge(config, photos=2)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_haar_is_orthonormal_and_inverted(patch: int):
    images, bridge = torch.rand(2, 3, 8, 16), new_bridge(patch)
    x = bridge.to_cells(images)
    assert x.shape == (2, 3 * patch**2, 8 // patch, 16 // patch)
    torch.testing.assert_close(x.square().sum(), (2 * images - 1).square().sum())
    torch.testing.assert_close(bridge.from_cells(x), images)
    bands = db.hadamard(torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1))
    assert bands.flatten().tolist() == [7.5, -2.5, -4.5, 1.5]  # mean and differences, times two


def test_appearance_by_hand():
    grey = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(db.appearance(grey)[0], torch.tensor([0.5, 0, 0, 0, 0.5]))
    red = torch.zeros(1, 3, 16, 16)
    red[:, 0] = 1
    torch.testing.assert_close(db.appearance(red)[0], torch.tensor([0.299, 0, 1, 1, 0]))
    scene = torch.rand(4, 3, 32, 64)
    hazy = 0.5 * scene + 0.4  # light of the air: brighter, flatter, paler, no darkness left
    signs = (db.appearance(hazy) - db.appearance(scene)).sign()
    assert (signs[:, [0, 1, 2, 4]] == torch.tensor([1.0, -1, -1, 1])).all()


def test_maps_are_shares_of_classes():
    labels = torch.full((1, 4, 8), IGNORE)
    labels[0, :2, :2] = torch.tensor([[0, 3], [3, IGNORE]])
    maps = db.class_shares(labels, 10, (2, 4))
    expected = torch.zeros(10)
    expected[0], expected[3] = 0.25, 0.5
    torch.testing.assert_close(maps[0, :, 0, 0], expected)
    assert maps.shape == (1, 10, 2, 4) and maps[0, :, 1].sum() == 0


# ---- Translation --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ddib", "sdedit"])
def test_an_image_is_translated_alike_in_any_company(trained: tuple, kind: str):
    args = db.TranslateArgs(bridge=kind, sample_steps=3)
    images, labels, names = batch(trained, 5)
    together, _ = trained[0].translate(images, labels, names, args)
    translate = partial(trained[0].translate, images[3:4], labels[3:4])
    alone, _ = translate(names[3:4], args)
    np.testing.assert_allclose(alone.astype(int), together[3:4], atol=1)
    # With another name it gets another photo's statistics and other noise.
    others = [translate([name], args)[0] for name in "abcd"]
    assert not all(np.array_equal(other, alone) for other in others)


def test_own_statistics_use_none_of_a_photo(trained: tuple):
    bridge, args = copy.deepcopy(trained[0]), db.TranslateArgs(statistics="own", sample_steps=3)
    images, labels, names = batch(trained, 3)
    before, _ = bridge.translate(images, labels, names, args)
    photo, _ = bridge.translate(images, labels, names, db.TranslateArgs(sample_steps=3))
    bridge.photo_statistics += 1
    after, _ = bridge.translate(images, labels, names, args)
    assert np.array_equal(before, after) and not np.array_equal(before, photo)


def test_a_figure_of_fewer_images_than_it_has_rows():
    images, masks = np.zeros((7, 8, 16, 3), np.uint8), np.zeros((7, 8, 16), np.uint8)
    columns = {"source": images, "translated": images, "photo": images[:2]}
    db.draw_translations(Path("figure.png"), columns, masks)
    assert Path("figure.png").exists()


@pytest.mark.parametrize("colour", [0.0, 0.5, 1.0])
def test_any_size_and_flat_images(trained: tuple, colour: float):
    images, labels, names = batch(trained, 2)
    images, labels = images[:, :25, :51], labels[:, :25, :51]
    images[1] = 255 * colour
    result, deviation = trained[0].translate(images, labels, names, db.TranslateArgs())
    assert result.shape == images.shape and np.isfinite(deviation).all()
    classes, features = db.read(trained[0].reader, result)
    assert classes.shape == (2, 25, 51) and features.shape == (2, 10, 48)


# ---- Checks -------------------------------------------------------------------------------------
def test_kernel_distance_by_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 3)), rng.normal(size=(8, 3))
    a, b = ((z - y.mean(axis=0)) / np.sqrt(y.var(axis=0).mean()) for z in (x, y))

    def mean(p: np.ndarray, q: np.ndarray, same: bool) -> float:
        pairs = [(i, j) for i in range(len(p)) for j in range(len(q)) if not (same and i == j)]
        return float(np.mean([(p[i] @ q[j] / 3 + 1) ** 3 for i, j in pairs]))

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert db.kernel_distance(x, y) == pytest.approx(expected)
    missing = np.full((2, 3), math.nan)  # images that lack the class
    assert db.kernel_distance(np.concatenate([missing, x]), y) == pytest.approx(expected)
    many = rng.normal(size=(3, 400, 3))
    assert abs(db.kernel_distance(many[0], many[1])) < 0.3
    assert db.kernel_distance(many[2] + 1, many[1]) > 1
    assert math.isnan(db.kernel_distance(x[:7], y)) and math.isnan(db.kernel_distance(x, y[:7]))


def test_features_are_means_over_the_region(trained: tuple):
    """A class that is everywhere has the mean of all cells, two halves average to it."""
    reader, images = trained[0].reader, trained[1].images[:3]
    everywhere, halves = np.zeros((2, 3, *SIZE), np.uint8)
    halves[:, :, 32:] = 4
    _, whole = db.read(reader, images, labels=everywhere)
    _, parts = db.read(reader, images, labels=halves)
    assert np.isnan(whole[:, 1:]).all()
    np.testing.assert_allclose(parts[:, [0, 4]].mean(axis=1), whole[:, 0], rtol=1e-4)


def test_affine_share_is_exact():
    """1 for any affine map of an image's colours, the constructed share where noise is added."""
    rng = np.random.default_rng(0)
    old = rng.integers(60, 180, (3, 32, 32, 3))
    matrices = np.array([np.eye(3) + k * rng.uniform(-0.1, 0.1, (3, 3)) for k in range(3)])
    new = np.einsum("nhwc,ncd->nhwd", old, matrices) + 5
    assert db.affine_share(old, new) == pytest.approx(1)
    noise = rng.normal(size=new.shape)  # what least squares cannot explain, and orthogonal to it
    for k in range(3):
        x = np.column_stack([old[k].reshape(-1, 3), np.ones(32 * 32)])
        flat = noise[k].reshape(-1, 3)
        noise[k] = (flat - x @ np.linalg.lstsq(x, flat, rcond=None)[0]).reshape(noise[k].shape)
    noise *= np.sqrt(3 * np.square(new - old).sum() / np.square(noise).sum())  # three times as much
    assert db.affine_share(old, new + noise) == pytest.approx(0.25)
    assert math.isnan(db.affine_share(old, old))


def test_edge_agreement_is_one_at_the_borders_and_half_by_chance():
    labels = np.zeros((32, 32), np.uint8)
    labels[8:20, 10:25] = 7
    drawn = np.repeat((labels * 30)[..., None], 3, axis=2)
    assert db.edge_agreement(drawn, labels) == 1
    assert db.edge_agreement(drawn * 0, labels) == 0.5  # equal gradients share a rank
    row = np.repeat(np.array([[[9], [0], [9], [9]]], np.uint8), 3, axis=2)  # gradients g, g, 0, 0
    assert db.edge_agreement(row, np.array([[0, 0, 1, 1]])) == pytest.approx(2.5 / 3)
    assert db.edge_agreement(np.roll(drawn, 5, axis=1), labels) < 0.9
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert abs(db.edge_agreement(noise, labels) - 0.5) < 0.15
    assert math.isnan(db.edge_agreement(drawn, 0 * labels))


def test_agreement_counts_valid_pixels():
    labels = np.array([[[0, 1], [IGNORE, 2]], [[IGNORE] * 2] * 2], np.uint8)
    assert db.agreement(np.ones_like(labels), labels).tolist() == [pytest.approx(1 / 3), 1.0]


def test_verdict_says_what_is_better_and_that_few_updates_are_no_bridge():
    table = {"kid_before": 2.0, "kid_after": 1.0, "edges_before": 0.8, "edges_after": 0.7}
    table |= {"kid_of_classes": {"road": [2.0, 1.0]}, "affine_share": 0.7, "noise_deviation": 0.9}
    lines = db.verdict(table, unet_steps=10)
    assert "not Inception" in lines[0]
    assert lines[2] == "agreement: not computed, since it needs --mask-labels"
    assert lines[3] == "kid by class: road 2.0 -> 1.0"
    assert lines[4].endswith("explains 0.70 of the change")
    assert lines[5] == "encoded noise: 0.90 (1 is right near --strength 1)"
    assert lines[6].startswith("10 updates of the U-Net are too few")
    assert lines[7:] == ["verdict: kid better, edges worse"]
    assert db.verdict(table, unet_steps=1000) == lines[:6] + lines[7:]
    assert db.verdict({**table, "edges_after": 0.8}, 1000)[-1] == "verdict: kid better, edges equal"


# ---- The row ------------------------------------------------------------------------------------
def test_row_continues_where_it_was_cut_off(args: common.Args, no_figures, monkeypatch, capsys):
    whole = db.run(row(args, "whole"))
    for stage in ("unet", "translate"):
        with interrupted(monkeypatch, stage, 3):
            db.run(row(args, "cut"))
    cut = db.run(row(args, "cut"))
    with interrupted(monkeypatch, "translate", 3):
        db.run(row(args, "lost"))
    Path("lost/set/images.npy").unlink()  # then all images are translated again
    db.run(row(args, "lost"))
    assert cut.miou == whole.miou and cut.target_labels == 0
    assert cut.other_updates == "4 U-Net updates, 4 of the reader"
    for name in ("set/images.npy", "set/labels.npy"):
        np.testing.assert_array_equal(*(np.load(f"{run}/{name}") for run in ("whole", "cut")))
        np.testing.assert_array_equal(*(np.load(f"{run}/{name}") for run in ("whole", "lost")))
    steps = [[line["step"] for line in read_scalars(Path(o))] for o in ("whole", "cut")]
    old, new = (common.read_checkpoint(Path(o, "bridge.pt"))["bridge"] for o in ("whole", "cut"))
    assert steps[0] == steps[1]
    torch.testing.assert_close(new, old, rtol=0, atol=0, equal_nan=True)
    # The set is stored once, and has been checked.
    least = Path("whole/set/images.npy").stat().st_size
    large = [p.name for p in Path("whole").rglob("*.npy") if p.stat().st_size >= least]
    assert large == ["images.npy"] and not list(Path("whole").glob("stage_*.pt"))
    table = json.loads(Path("whole/checks.json").read_text())
    assert {"affine_share", "noise_deviation", "kid_of_classes", "edges_after"} <= set(table)
    assert "4 updates of the U-Net are too few" in capsys.readouterr().out


def test_train_needs_no_label_of_a_photo_and_flat_photos_do(args: common.Args, mini, tmp_path):
    """All photos are of one colour, and none has a label, but for those of the test."""
    shutil.copytree(mini, "data")
    photos = sorted(Path("data/kitti/training/image_2").iterdir())
    for photo in photos[: len(photos) // 2]:
        Image.new("RGB", Image.open(photo).size, (200, 200, 200)).save(photo)
        (photo.parents[1] / "semantic" / photo.name).unlink()
    args = row(args, "run", data="data", sample_steps=None)
    db.train(args)
    for flags, match in ({"strength": 0.5}, "--strength: has no effect"), ({"levels": 9}, "--size"):
        with pytest.raises(UserError, match=match):
            db.train(replace(args, **flags))
    assert not Path("run.old1").exists()  # nothing has moved the finished run aside
    state = common.read_checkpoint(Path("run/bridge.pt"))["bridge"]
    features = state.pop("photo_features")  # NaN where a photo lacks a class
    assert all(value.isfinite().all() for value in state.values())
    assert features[:, :, 0].isfinite().any()


def test_defaults_and_bad_values(args: common.Args, monkeypatch: pytest.MonkeyPatch):
    plain = dict.fromkeys(("unet_steps", "reader_steps", "width", "levels", "sample_steps"))
    plain |= {"steps": 1200, "size": (64, 128)}
    small = db.fill_in(row(args, "run", **plain))
    large = db.fill_in(row(args, "run", **{**plain, "size": (192, 640)}))
    assert (small.unet_steps, small.reader_steps, small.sample_steps) == (2400, 600, 12)
    assert (small.width, small.patch) == (32, 2) and (large.width, large.patch) == (128, 4)
    for flags in ({"noise_floor": 0.97}, {"strength": 1.1}, {"sample_steps": 0}):
        with pytest.raises(UserError, match="0 <= --noise-floor < --strength <= 1"):
            db.fill_in(row(args, "run", **flags))
    for levels, match in {4: "--patch and --levels need multiples of 64", 0: "--width, "}.items():
        with pytest.raises(UserError, match=match):
            db.fill_in(row(args, "run", patch=8, levels=levels))
    monkeypatch.setattr(common, "world_size", lambda: 3)  # before anything is trained
    with pytest.raises(UserError, match="--batch-size 4: expected a multiple of 6"):
        db.fill_in(row(args, "run"))


# ---- The folder ---------------------------------------------------------------------------------
def write(folder: Path) -> tuple[Path, Path]:
    """Images of several modes and sizes in nested folders, with masks of several kinds."""
    rng = np.random.default_rng(0)
    kinds = "a/rgb.png RGB, a/again.png RGB, b/grey.png L, b/c/alpha.png RGBA, palette.png P, "
    kinds += "photo.jpg RGB, wide.png RGB, deep.png I;16, d/clear.PNG P"
    for k, kind in enumerate(kinds.split(", ")):
        name, mode = kind.split()
        h, w = (36, 100) if name == "wide.png" else SIZE
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)
        image = image.convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.fromarray(rng.integers(0, 256, (h, w), dtype=np.uint8)))
        ids = np.zeros((h, w), np.uint16 if k % 2 else np.uint8)
        ids[h // 3 :, w // 2 :] = 26000 + k if k % 2 else 7
        mask = Image.fromarray(ids) if k != 2 else Image.fromarray(np.dstack([ids] * 3))
        path, mask_path = folder / "in" / name, (folder / "masks" / name).with_suffix(".png")
        for parent in (path.parent, mask_path.parent):
            parent.mkdir(parents=True, exist_ok=True)
        clear = {"transparency": image.getpixel((0, 0))} if name == "d/clear.PNG" else {}
        image.save(path, **clear)
        mask.save(mask_path)
    return folder / "in", folder / "masks"


def made(tmp_path: Path, trained: tuple, **changes) -> db.TranslateArgs:
    fields = {"checkpoint": trained[2], "sample_steps": 2, "batch_size": 2}
    for flag, name in (("input_dir", "in"), ("mask_dir", "masks"), ("output_dir", "out")):
        fields[flag] = tmp_path / name
    return db.TranslateArgs(**{**fields, **changes})


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files but records, whose names depend on the times of the input's files."""
    files = [p for p in folder.rglob("*") if p.is_file() and ".records" not in p.parts]
    hashes = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return {str(path.relative_to(folder)): value for path, value in hashes.items()}


def test_folder_contract(trained: tuple, tmp_path: Path, no_figures, monkeypatch, capsys):
    images, masks = write(tmp_path)
    # What datasets.is_foreign calls foreign is ignored, as it is by every other reader.
    foreign = ("notes.txt", "._wide.png", "@eaDir/a.png", "thumbs/a.png", ".checkpoints/a.png")
    assert all(datasets.is_foreign(name) for name in foreign)
    for path in (*(images / name for name in foreign), masks / "wide_labelTrainIds.png"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("no image")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    args = made(tmp_path, trained)
    db.translate_folder(args)
    out, said = tmp_path / "out", capsys.readouterr().out
    assert "9 images in" in said and "6 files ignored" in said and "verdict: " in said
    assert "120 updates of the U-Net are too few" in said
    assert all(p.read_bytes() == data for p, data in before.items())  # inputs are never written to
    for mask in set(masks.rglob("*.png")) - {masks / "wide_labelTrainIds.png"}:
        assert (out / "masks" / mask.relative_to(masks)).read_bytes() == mask.read_bytes()
    modes = {"grey.png": "L", "alpha.png": "RGBA", "clear.PNG": "RGBA", "deep.png": "I;16"}
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["complete"] and metadata["ignored"] == 6 and len(metadata["images"]) == 9
    assert metadata["settings"]["checkpoint"] == hashlib.sha256(trained[2].read_bytes()).hexdigest()
    for record in metadata["images"]:
        name = record["image"]
        with Image.open(images / name) as old, Image.open(out / name) as new:
            assert (new.size, new.format) == (old.size, old.format)
            assert new.mode == modes.get(Path(name).name, "RGB")
            if new.mode == "I;16":
                assert np.asarray(new).max() > 4 * 256  # its range, not that of 8 bits
            else:
                assert new.convert("RGB").tobytes() != old.convert("RGB").tobytes()
            if new.mode == "RGBA":
                alpha = [i.convert("RGBA").getchannel("A").tobytes() for i in (new, old)]
                assert alpha[0] == alpha[1] and len(set(alpha[0])) > 1
        for key, path in (("source", images / name), ("output", out / name)):
            assert record[f"{key}_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert record["seed"] == common.seed_of(0, name)
    whole = content(out)
    # What is there is not translated again, what was lost is.
    calls, translate = [], db.Bridge.translate
    monkeypatch.setattr(db.Bridge, "translate", lambda *a: calls.append(1) or translate(*a))
    db.translate_folder(args)
    assert not calls
    for number, lost in enumerate(("wide.png", "masks/deep.png"), start=1):
        (out / lost).unlink()
        db.translate_folder(args)
        assert len(calls) == number and content(out) == whole
    next(out.glob(".records/*.json")).write_text("")  # as after a power failure
    db.translate_folder(args)
    assert len(calls) == 3 and content(out) == whole
    with pytest.raises(UserError, match="another sample_steps"):
        db.translate_folder(made(tmp_path, trained, sample_steps=3))
    # Two processes write what one does.
    ranks = made(tmp_path, trained, output_dir=tmp_path / "ranks")
    monkeypatch.setattr(common, "world_size", lambda: 2)
    monkeypatch.setattr(common, "barrier", lambda: None)
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        db.translate_folder(ranks)
    assert content(tmp_path / "ranks") == whole
    # A lost file of the second process: the first one does not call the folder complete.
    (tmp_path / "ranks/b/grey.png").unlink()
    complete = []
    for rank in (0, 1):
        monkeypatch.setattr(common, "rank", lambda rank=rank: rank)
        db.translate_folder(ranks)
        complete.append(json.loads((tmp_path / "ranks/metadata.json").read_text())["complete"])
    assert complete == [False, True] and content(tmp_path / "ranks") == whole
    assert len(datasets.find_images(out, "**/*")[0]) == 2 * 9  # nothing else looks like an image
    # Threads that decode and encode change nothing.
    monkeypatch.setattr(common, "world_size", lambda: 1)
    monkeypatch.setattr(common, "rank", lambda: 0)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    db.translate_folder(made(tmp_path, trained, output_dir=tmp_path / "serial"))
    assert content(tmp_path / "serial") == whole


def test_stopped_at_any_file_it_ends_the_same(trained, tmp_path: Path, no_figures, monkeypatch):
    write(tmp_path)
    whole = made(tmp_path, trained)
    db.translate_folder(whole)
    replace, left = Path.replace, [0]

    def stop(self: Path, target: Path) -> Path:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return replace(self, target)

    for moment in (0, 1, 3, 10, 24):  # files that are renamed before it stops: 24 of 25
        cut = made(tmp_path, trained, output_dir=tmp_path / f"cut{moment}")
        left[0] = moment
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", stop)
            db.translate_folder(cut)
        db.translate_folder(cut)
        assert content(cut.output_dir) == content(whole.output_dir)


def test_a_finished_folder_continues_with_more_images_but_not_with_others(
    trained: tuple, tmp_path: Path, no_figures, monkeypatch
):
    images, masks = write(tmp_path)
    args, out = made(tmp_path, trained), tmp_path / "out"
    (images / "wide.png").rename(tmp_path / "wide.png")
    db.translate_folder(args)
    (tmp_path / "wide.png").rename(images / "wide.png")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(db.Bridge, "translate", interrupt)
        db.translate_folder(args)
    assert not json.loads((out / "metadata.json").read_text())["complete"]
    db.translate_folder(args)
    assert json.loads((out / "metadata.json").read_text())["complete"]
    whole = content(out)
    # Both folders may move.
    (tmp_path / "moved").mkdir()
    for folder in (images, masks):
        folder.rename(tmp_path / "moved" / folder.name)
    moved = {"input_dir": tmp_path / "moved/in", "mask_dir": tmp_path / "moved/masks"}
    with monkeypatch.context() as patch:
        patch.setattr(db.Bridge, "translate", interrupt)
        db.translate_folder(made(tmp_path, trained, **moved))
    assert content(out) == whole
    (tmp_path / "moved/in/wide.png").rename(tmp_path / "moved/in/other.png")
    (tmp_path / "moved/masks/wide.png").rename(tmp_path / "moved/masks/other.png")
    fails("out/masks/wide.png: of other images or masks", made(tmp_path, trained, **moved))
    assert content(out) == whole
    (out / "masks").rename(tmp_path / "elsewhere")
    (out / "masks").symlink_to(tmp_path / "elsewhere")
    fails("out/masks.*: leads to", made(tmp_path, trained, **moved))


def test_labels_of_the_masks_and_the_filter(trained, tmp_path, no_figures, monkeypatch):
    bridge, source = trained[:2]
    names_of = {name: colour for colour, name in datasets.VKITTI2_COLOURS.items() if name}
    classes = [*bridge.config["classes"], *[None] * 246]
    colours = np.array([names_of.get(name, (0, 0, 0)) for name in classes], np.uint8)
    for k in range(3):
        for folder, array in (("in", source.images[k]), ("masks", colours[source.labels[k]])):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(array).save(tmp_path / folder / f"{k}.png")
    args = made(tmp_path, trained, mask_labels="vkitti2", sample_steps=3, batch_size=3)
    db.translate_folder(args)
    table = json.loads((tmp_path / "out/metadata.json").read_text())["checks"]
    assert table["left_out"] == 0 and 0 <= table["agreement_after"] <= 1
    # The folder's images are those of the row, but for what their names decide.
    images, labels, _ = batch(trained, 3)
    names = [f"{k}.png" for k in range(3)]
    expected, _ = bridge.translate(images, labels, names, args)
    written = np.stack([np.asarray(Image.open(tmp_path / "out" / name)) for name in names])
    np.testing.assert_array_equal(written, expected)
    db.translate_folder(made(tmp_path, trained, min_agreement=1.1, output_dir=tmp_path / "none"))
    metadata = json.loads((tmp_path / "none/metadata.json").read_text())
    assert metadata["checks"] == {"left_out": 3} and not list((tmp_path / "none").rglob("*.png"))
    # An image that has changed and is left out now leaves no file of before, and comes back.
    half = made(tmp_path, trained, min_agreement=0.5, batch_size=3, output_dir=tmp_path / "half")
    for share, count, seconds in ((1.0, 6, 1), (0.0, 0, 2), (1.0, 6, 1)):
        os.utime(tmp_path / "in/0.png", (seconds, seconds))
        monkeypatch.setattr(db, "agreement", lambda *_, share=share: np.full(3, share))
        db.translate_folder(half)
        assert len(list((tmp_path / "half").rglob("*.png"))) == count


# ---- Bad input ----------------------------------------------------------------------------------
def fails(match: str, args: db.TranslateArgs) -> None:
    existed = args.output_dir.exists()
    with pytest.raises(UserError, match=match) as error:
        db.translate_folder(args)
    assert "\n" not in str(error.value) and args.output_dir.exists() == existed


def test_links_are_followed_and_unusable_frames_of_gta5_left_out(tmp_path: Path):
    images, masks = write(tmp_path)
    for folder in (images, masks):  # subfolders that lie elsewhere
        (folder / "a").rename(tmp_path / f"{folder.name} elsewhere")
        (folder / "a").symlink_to(tmp_path / f"{folder.name} elsewhere")
    (images / "masks").symlink_to(masks)
    pairs, ignored = db.find_pairs(images, (images / "masks").resolve(), datasets.GTA5)
    assert len(pairs) == 9 and ignored == 0
    Image.new("RGB", (9, 9)).save(images / "a/15188.png")
    Image.new("L", (8, 9)).save(masks / "a/15188.png")
    assert db.find_pairs(images, masks, datasets.GTA5) == (pairs, 1)
    with pytest.raises(UserError, match=r"15188\.png: width and height are"):
        db.find_pairs(images, masks, None)


def test_bad_folders(trained: tuple, tmp_path: Path):
    images, masks = write(tmp_path)
    args, mask = made(tmp_path, trained), masks / "wide.png"
    kept = mask.read_bytes()
    mask.unlink()
    fails(r"in/wide.png: has no mask, --mask-dir needs .*masks/wide\.png", args)
    Image.new("L", (99, 36)).save(mask)
    fails(r"wide.png: width and height are \(99, 36\), but \(100, 36\) in its image", args)
    mask.write_bytes(b"junk")
    fails("masks/wide.png: cannot be read as an image", args)
    mask.write_bytes(kept[:-20])
    with pytest.raises(UserError, match=r"wide\.png: cannot be read"):
        db.translate_folder(made(tmp_path, trained, output_dir=tmp_path / "other"))
    assert not (tmp_path / "other/masks/wide.png").exists()
    mask.write_bytes(kept)
    (images / "wide.jpg").write_bytes((images / "photo.jpg").read_bytes())
    fails("wide.png: differs from wide.jpg by its suffix", args)
    (images / "wide.jpg").unlink()
    upright, exif = (images / "photo.jpg").read_bytes(), Image.Exif()
    exif[274] = 3  # a viewer turns the image by 180 degrees, but not its mask
    Image.open(images / "photo.jpg").save(images / "photo.jpg", exif=exif)
    fails("photo.jpg: EXIF data turn it, but not its label", args)
    (images / "photo.jpg").write_bytes(upright)
    fails("--mask-dir .*in/masks: no such folder", made(tmp_path, trained, mask_dir=None))
    fails("--checkpoint: not given", made(tmp_path, trained, checkpoint=None))
    fails("was not trained on own data", made(tmp_path, trained, mask_labels="own"))
    fails("other classes", made(tmp_path, trained, mask_labels="gta5"))
    fails("the same folder as --input-dir", made(tmp_path, trained, mask_dir=images))
    (tmp_path / "empty").mkdir()
    fails("no image", made(tmp_path, trained, input_dir=tmp_path / "empty"))
    for output in (images, images / "below", masks / "below", tmp_path):
        fails("inside, around or equal", made(tmp_path, trained, output_dir=output))
    (images / "a").rename(tmp_path / "a")
    (images / "a").symlink_to(tmp_path / "a")
    fails("/a, which has images", made(tmp_path, trained, output_dir=tmp_path / "a/out"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    for content in ("{}", "[1]", "{"):  # another program's, or half a file
        (tmp_path / "full/metadata.json").write_text(content)
        full = made(tmp_path, trained, output_dir=tmp_path / "full")
        fails("not empty, and no translation", full)


def test_bad_checkpoints(trained: tuple, tmp_path: Path):
    checkpoint, path = torch.load(trained[2], weights_only=True), tmp_path / "changed.pt"
    torch.save({**checkpoint, "format": "other"}, path)
    with pytest.raises(UserError, match=r"changed.pt: not a checkpoint of this"):
        db.load_bridge(path, CPU)
    del checkpoint["bridge"]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"changed.pt: .*without a bridge"):
        db.load_bridge(path, CPU)


def test_config_and_flags(trained: tuple, tmp_path: Path, monkeypatch, no_figures, capsys):
    write(tmp_path)
    config = tmp_path / "c.toml"
    config.write_text(
        f'input_dir = "{tmp_path / "in"}"\nmask-dir = "{tmp_path / "masks"}"\n'
        "sample-steps = 3\nstrength = 1\nseed = 5\n"
    )
    line = ["translate", "--config", str(config), "--output-dir", str(tmp_path / "out")]
    line += ["--checkpoint", str(trained[2]), "--sample-steps", "2"]
    monkeypatch.setattr(sys, "argv", ["diffusion_bridge.py", *line])
    db.main()
    settings = json.loads((tmp_path / "out/metadata.json").read_text())["settings"]
    assert (settings["sample_steps"], settings["strength"], settings["seed"]) == (2, 1.0, 5)
    assert "c.toml: --input_dir=" in capsys.readouterr().err  # which flags the file stands for
    config = tmp_path / "c.json"
    for text, match in {
        '{"guidence": 2}': "Unrecognized options: --guidence=2",
        '{"seed": true}': "Error parsing --seed: .*True",
        '{"bridge": "x"}': "invalid choice 'x' for argument '--bridge'",
    }.items():
        config.write_text(text)
        with pytest.raises(SystemExit):
            db.translate_folder(made(tmp_path, trained, config=config))
        assert re.search(match, capsys.readouterr().err)
    other = "c.json: neither TOML nor a JSON object"
    for text, match in {"{": other, "[1]": other, '{"min_agreement": NaN}': "expected"}.items():
        config.write_text(text)
        fails(match, made(tmp_path, trained, config=config))
