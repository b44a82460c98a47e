"""The bridge against closed forms, tiles against the whole, and the contract of the folder."""

import copy
import hashlib
import json
import math
import os
import sys
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import interrupted, like
from PIL import Image
from torch import Tensor

import common
import diffusion_bridge as db
from common import IGNORE, UserError

CPU = torch.device("cpu")
SIZE = (32, 64)


def rising(steps: int, strength: float = 1.0) -> list[float]:
    """Angles from the image towards noise."""
    return np.linspace(0, strength * math.pi / 2, steps + 1).tolist()


def row(args: common.Args, out: str, **changes) -> db.Args:
    short = {"unet_steps": 4, "reader_steps": 4, "width": 8, "sample_steps": 2}
    return like(args, db.Args, **{"out": Path(out), **short, **changes})


@pytest.fixture(scope="module")
def trained(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Trained on the small miniature within seconds; the source; bridge.pt. Read only."""
    here, folder = Path.cwd(), tmp_path_factory.mktemp("bridge")
    os.chdir(folder)
    options = {"steps": 2, "batch_size": 8, "size": SIZE, "labelled": 2, "device": "cpu"}
    options |= {"width": 16, "unet_steps": 120, "reader_steps": 10, "out": folder / "run"}
    args = db.Args(data=str(mini), **options)
    run = common.Run(args, "diffusion_bridge_train", stages=2)
    source = common.load(run.args, "source")
    bridge = db.train_bridge(run, source, common.load(run.args, "target_unlabelled"))
    os.chdir(here)
    return bridge, source, folder / "run/bridge.pt"


def batch(trained: tuple, count: int, columns: int = 1) -> tuple[Tensor, Tensor, list[str]]:
    """Images, labels and names of the source; each next column of a wider picture is mirrored."""
    source = trained[1]
    images = common.to_tensor(source.images[:count], CPU)
    labels = torch.from_numpy(np.array(source.labels[:count])).long()
    images = torch.cat([images.flip(3) if k % 2 else images for k in range(columns)], dim=3)
    labels = torch.cat([labels.flip(2) if k % 2 else labels for k in range(columns)], dim=2)
    return images, labels, list(source.names[:count])


# ---- Sampler ------------------------------------------------------------------------------------
def gaussian(mean: Tensor, std: Tensor, x: Tensor, angle: float) -> Tensor:
    """E[cos(a) e - sin(a) x0 | x_a] for x0 ~ N(mean, std^2), by the normal's conditional mean."""
    cos, sin = math.cos(angle), math.sin(angle)
    off = (x - cos * mean) / (cos**2 * std**2 + sin**2)
    return cos * (sin * off) - sin * (mean + cos * std**2 * off)


def exact(mean: Tensor, std: Tensor, x: Tensor, a: float, b: float) -> Tensor:
    """The flow of a Gaussian keeps the number of deviations from the mean."""

    def moments(angle: float) -> tuple[Tensor, Tensor]:
        return math.cos(angle) * mean, (math.cos(angle) ** 2 * std**2 + math.sin(angle) ** 2).sqrt()

    (m1, s1), (m2, s2) = moments(a), moments(b)
    return m2 + s2 * (x - m1) / s1


SHAPE = (2, 3, 2, 2)
MEAN, STD = torch.linspace(-1, 1, 24).view(SHAPE).double(), torch.full(SHAPE, 0.6).double()


@pytest.mark.parametrize("back", [False, True])
def test_flow_of_a_gaussian_is_exact_in_the_limit_and_of_second_order(back: bool):
    x = torch.randn(SHAPE, generator=common.generator(0)).double()
    errors = []
    for steps in (32, 64, 128):
        angles = rising(steps, 0.97)[:: -1 if back else 1]
        result = db.flow(partial(gaussian, MEAN, STD), x, angles)
        errors.append(float((result - exact(MEAN, STD, x, angles[0], angles[-1])).abs().max()))
    assert errors[-1] < 1e-3
    assert errors[0] / errors[1] > 3.2 and errors[1] / errors[2] > 3.2  # 4 in the limit, DDIM has 2


def test_bridge_between_gaussians_is_the_map_of_least_transport():
    """DDIB: encoded to pure noise and decoded, x goes to m' + s' (x - m) / s."""
    x = MEAN + STD * torch.randn(SHAPE, generator=common.generator(1)).double()
    mean, std = MEAN.flip(1) + 0.3, 0.5 * STD
    angles = rising(400)
    noise = db.flow(partial(gaussian, MEAN, STD), x, angles)
    torch.testing.assert_close(noise, (x - MEAN) / STD, atol=1e-4, rtol=0)
    result = db.flow(partial(gaussian, mean, std), noise, angles[::-1])
    torch.testing.assert_close(result, mean + std * (x - MEAN) / STD, atol=1e-4, rtol=0)


def test_encode_and_decode_in_one_domain_return_the_image(trained: tuple):
    bridge = trained[0]
    images, labels, _ = batch(trained, 6)
    x, maps, statistics = bridge.encode(images), bridge.class_maps(labels), db.appearance(images)
    domain = torch.full((6,), db.SOURCE)

    def velocity(x: Tensor, angle: float) -> Tensor:
        return bridge.unet(x, maps, torch.full((6,), angle), domain, statistics)

    psnr = []
    for steps in (10, 25, 50):
        angles = rising(steps, 0.97)
        with torch.inference_mode():
            back = db.flow(velocity, db.flow(velocity, x, angles), angles[::-1])
        error = bridge.decode(back) - images
        psnr.append(-10 * math.log10(float(error.square().mean())))
    assert psnr == sorted(psnr) and psnr[-1] >= 35, psnr


def test_sdedit_adds_noise_once_and_follows_the_flow_of_the_target(trained: tuple, monkeypatch):
    """With a U-Net that knows a single image it ends there, whatever the noise."""
    bridge, goal = copy.deepcopy(trained[0]), torch.full((1, 12, 1, 1), 0.2)
    domains = []

    def velocity(x: Tensor, maps: Tensor, angle: Tensor, domain: Tensor, **_) -> Tensor:
        domains.append(int(domain[0]))
        cos, sin = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        return cos * (x - cos * goal) / sin.clamp(min=1e-9) - sin * goal

    monkeypatch.setattr(bridge.unet, "forward", velocity)
    images, labels, names = batch(trained, 2)
    expected = bridge.decode(goal.expand(2, -1, 16, 32)).clamp(0, 1)
    args = db.TranslateArgs(bridge="sdedit", sample_steps=5)
    result = bridge.translate(images, labels, names, args)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)
    assert domains == [db.TARGET] * 5
    bridge.translate(images, labels, names, db.TranslateArgs(sample_steps=5))
    assert domains[5:] == [db.SOURCE] * 5 + [db.TARGET] * 5


# ---- What is diffused, network and conditions ---------------------------------------------------
def new_bridge(patch: int) -> db.Bridge:
    config = {"patch": patch, "width": 8, "classes": ["a", "b"], "size": [16, 16], "unet_steps": 0}
    return db.Bridge(config, photos=2)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_haar_is_orthonormal_and_inverted(patch: int):
    images, bridge = torch.rand(2, 3, 8, 16), new_bridge(patch)
    x = bridge.encode(images)
    assert x.shape == (2, 3 * patch**2, 8 // patch, 16 // patch)
    torch.testing.assert_close(x.square().sum(), (2 * images - 1).square().sum())
    torch.testing.assert_close(bridge.decode(x), images)
    bands = db.hadamard(torch.tensor([1.0, 2.0, 4.0, 8.0]).view(1, 4, 1, 1))
    assert bands.flatten().tolist() == [7.5, -2.5, -4.5, 1.5]  # mean and differences, times two


def test_a_cell_sees_its_surroundings_alone():
    """No statistic of the whole picture: what is far away changes nothing, what is near does."""
    unet = db.UNet(12, 2, 8)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, maps = torch.randn(1, 12, 4, 256), torch.zeros(1, 2, 4, 256)

    def predict(x: Tensor) -> Tensor:
        return unet(x, maps, torch.tensor([0.7]), torch.tensor([1]), torch.zeros(1, 5))

    changed = x.clone()
    changed[..., 128] += 5
    with torch.no_grad():
        difference = (predict(changed) - predict(x)).abs().sum(dim=(0, 1, 2))
    assert (difference[:32] == 0).all() and (difference[-32:] == 0).all()
    assert (difference[124:132] > 0).all()


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


def test_maps_are_shares_of_classes(trained: tuple):
    labels = torch.full((1, 4, 8), IGNORE)
    labels[0, :2, :2] = torch.tensor([[0, 3], [3, IGNORE]])
    maps = trained[0].class_maps(labels)
    expected = torch.zeros(10)
    expected[0], expected[3] = 0.25, 0.5
    torch.testing.assert_close(maps[0, :, 0, 0], expected)
    assert maps.shape == (1, 10, 2, 4) and maps[0, :, 1].sum() == 0


# ---- Translation --------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["ddib", "sdedit"])
def test_an_image_is_translated_alike_in_any_company(trained: tuple, kind: str):
    args = db.TranslateArgs(bridge=kind, sample_steps=3)
    images, labels, names = batch(trained, 5)
    together = trained[0].translate(images, labels, names, args)
    translate = partial(trained[0].translate, images[3:4], labels[3:4])
    alone = translate(names[3:4], args)
    torch.testing.assert_close(alone, together[3:4], atol=1e-4, rtol=0)
    # With another name it gets another photo's statistics, or other noise.
    others = [translate([name], args) for name in "abcd"]
    assert max((other - alone).abs().max() for other in others) > 1e-3


def test_any_size(trained: tuple):
    images, labels, names = batch(trained, 2)
    images, labels = images[..., :25, :51], labels[:, :25, :51]
    result = trained[0].translate(images, labels, names, db.TranslateArgs(sample_steps=2))
    assert result.shape == images.shape and result.isfinite().all()


def test_tiles_change_less_than_a_percent_and_show_no_seam(trained: tuple):
    images, labels, names = batch(trained, 4, columns=3)  # 32x192, in tiles of 32x128
    results = []
    for width in (192, 128):
        bridge = copy.deepcopy(trained[0])
        bridge.config = {**bridge.config, "size": [32, width]}
        results.append(bridge.translate(images, labels, names, db.TranslateArgs(sample_steps=8)))
    whole, tiled = results
    assert 0 < (tiled - whole).abs().mean() < 0.01
    # At a seam neighbouring columns would differ more than they do in the whole image.
    step = (tiled.diff(dim=3) - whole.diff(dim=3)).abs().mean(dim=(0, 1, 2))  # [191]
    assert step.max() < 0.1 * whole.diff(dim=3).abs().mean()


def test_tiles_cover_and_blend_to_one():
    for size, tile in product((16, 20, 36, 100), (8, 12, 16)):
        starts = db.tile_starts(size, tile)
        assert starts[0] == 0 and starts[-1] == size - tile and all(s % 4 == 0 for s in starts)
        assert all(b - a <= tile * 3 // 4 + 3 for a, b in pairwise(starts))
    x, shapes = torch.randn(2, 3, 20, 36), []

    def predict(part: Tensor, maps: Tensor) -> Tensor:
        shapes.append(part.shape[2:])
        return part + maps

    result = db.tiled(predict, x, 2 * x, (8, 16))
    torch.testing.assert_close(result, 3 * x)
    assert set(shapes) == {(8, 16)}


# ---- Checks -------------------------------------------------------------------------------------
def test_kernel_distance_by_its_definition():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(5, 3)), rng.normal(size=(4, 3))
    scale = np.sqrt(y.var(axis=0).mean())
    a, b = ((z - y.mean(axis=0)) / scale for z in (x, y))

    def mean(p: np.ndarray, q: np.ndarray, same: bool) -> float:
        pairs = [(i, j) for i in range(len(p)) for j in range(len(q)) if not (same and i == j)]
        return float(np.mean([(p[i] @ q[j] / 3 + 1) ** 3 for i, j in pairs]))

    expected = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    assert db.kernel_distance(x, y) == pytest.approx(expected)
    many = rng.normal(size=(3, 400, 3))
    assert abs(db.kernel_distance(many[0], many[1])) < 0.3
    assert db.kernel_distance(many[2] + 1, many[1]) > 1
    assert math.isnan(db.kernel_distance(x[:1], y))


def test_edge_agreement_is_one_at_the_borders_and_half_by_chance():
    labels = np.zeros((32, 32), np.uint8)
    labels[8:20, 10:25] = 7
    drawn = np.repeat((labels * 30)[..., None], 3, axis=2)
    assert db.edge_agreement(drawn, labels) == 1
    assert db.edge_agreement(np.roll(drawn, 5, axis=1), labels) < 0.9
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert abs(db.edge_agreement(noise, labels) - 0.5) < 0.15
    assert math.isnan(db.edge_agreement(drawn, 0 * labels))


def test_agreement_counts_valid_pixels():
    labels = np.array([[[0, 1], [IGNORE, 2]], [[IGNORE] * 2] * 2], np.uint8)
    assert db.agreement(np.ones_like(labels), labels).tolist() == [pytest.approx(1 / 3), 1.0]


def test_verdict_says_what_is_better_and_that_few_updates_are_no_bridge():
    table = {"kid_before": 2.0, "kid_after": 1.0, "edges_before": 0.8, "edges_after": 0.7}
    lines = db.verdict({**table, "left_out": 3}, unet_steps=10)
    assert [line.rsplit(" ", 1)[-1] for line in lines[:2]] == ["better", "worse"]
    assert lines[2] == "verdict: 1 of 2 checks improved, 3 left out" and "too few" in lines[3]


# ---- The row ------------------------------------------------------------------------------------
def test_row_continues_where_it_was_cut_off(args: common.Args, no_figures, monkeypatch):
    whole = db.run(row(args, "whole"))
    for stage in ("unet", "translate"):
        with interrupted(monkeypatch, stage, 3):
            db.run(row(args, "cut"))
    cut = db.run(row(args, "cut"))
    assert cut.miou == whole.miou and cut.target_labels == 0
    assert cut.other_updates == "4 U-Net updates"
    for name in ("set/images.npy", "set/labels.npy"):
        np.testing.assert_array_equal(*(np.load(f"{run}/{name}") for run in ("whole", "cut")))
    steps = [[line["step"] for line in common.read_scalars(Path(o))] for o in ("whole", "cut")]
    hashes = [common.read_checkpoint(Path(o, "bridge.pt"))["sha256"] for o in ("whole", "cut")]
    assert steps[0] == steps[1] and hashes[0] == hashes[1]


def test_images_below_the_least_agreement_are_ignored(args: common.Args, mini: Path, no_figures):
    db.run(row(args, "all", steps=1))
    images, labels = (np.load(f"all/set/{name}.npy") for name in ("images", "labels"))
    bridge = db.load_bridge(Path("all/bridge.pt"), CPU)
    shares = np.sort(db.agreement(db.read(bridge.reader, images, CPU)[0], labels))
    db.run(row(args, "half", steps=1, min_agreement=float(shares[len(shares) // 2])))
    left_out = json.loads(Path("half/checks.json").read_text())["left_out"]
    ignored = (np.load("half/set/labels.npy") == IGNORE).all(axis=(1, 2))
    assert 0 < left_out < len(images) and ignored.sum() == left_out
    with pytest.raises(UserError, match=r"min-agreement 1.1: no image"):
        db.run(row(args, "none", steps=1, min_agreement=1.1))


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


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files but records, whose names depend on the times of the input's files."""
    files = [p for p in folder.rglob("*") if p.is_file() and ".records" not in p.parts]
    hashes = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    return {str(path.relative_to(folder)): value for path, value in hashes.items()}


def test_folder_contract(trained: tuple, tmp_path: Path, no_figures, monkeypatch, capsys):
    images, masks = write(tmp_path)
    for name in ("notes.txt", ".hidden.png", "@eaDir/thumb.png", ".ipynb_checkpoints/a.png"):
        (images / name).parent.mkdir(exist_ok=True)
        (images / name).write_text("no image")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    args = made(tmp_path, trained)
    db.translate_folder(args)
    out, said = tmp_path / "out", capsys.readouterr().out
    assert "9 images in" in said and "4 files ignored" in said and "verdict: " in said
    assert "120 updates of the U-Net are too few" in said
    assert all(p.read_bytes() == data for p, data in before.items())  # inputs are never written to
    for mask in masks.rglob("*.png"):
        assert (out / "masks" / mask.relative_to(masks)).read_bytes() == mask.read_bytes()
    modes = {"grey.png": "L", "alpha.png": "RGBA", "clear.PNG": "RGBA", "deep.png": "I;16"}
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["complete"] and metadata["ignored"] == 4 and len(metadata["images"]) == 9
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
    calls, translate = [], db.translate_batch
    monkeypatch.setattr(db, "translate_batch", lambda *a: calls.append(1) or translate(*a))
    db.translate_folder(args)
    assert not calls
    (out / "wide.png").unlink()
    db.translate_folder(args)
    assert len(calls) == 1 and content(out) == whole
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
    found = {p.stem for p in out.rglob("*") if p.suffix.lower() in db.SUFFIXES}
    assert found == {p.stem for p in masks.rglob("*.png")}  # nothing else looks like an image


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

    for moment in (0, 1, 2, 6, 10, 24):  # files that are renamed before it stops: 24 of 25
        cut = made(tmp_path, trained, output_dir=tmp_path / f"cut{moment}")
        left[0] = moment
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Path, "replace", stop)
            db.translate_folder(cut)
        db.translate_folder(cut)
        assert content(cut.output_dir) == content(whole.output_dir)


def test_labels_of_the_masks_and_the_filter(trained: tuple, tmp_path: Path, no_figures):
    bridge, source = trained[:2]
    names_of = {name: colour for colour, name in common.VKITTI2_COLOURS.items() if name}
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
    expected = common.to_uint8(bridge.translate(images, labels, names, args))
    found = np.stack([np.asarray(Image.open(tmp_path / "out" / name)) for name in names])
    np.testing.assert_array_equal(found, expected)
    db.translate_folder(made(tmp_path, trained, min_agreement=1.1, output_dir=tmp_path / "none"))
    metadata = json.loads((tmp_path / "none/metadata.json").read_text())
    assert metadata["checks"] == {"left_out": 3} and not list((tmp_path / "none").rglob("*.png"))


# ---- Bad input ----------------------------------------------------------------------------------
def fails(match: str, args: db.TranslateArgs) -> None:
    existed = args.output_dir.exists()
    with pytest.raises(UserError, match=match) as error:
        db.translate_folder(args)
    assert "\n" not in str(error.value) and args.output_dir.exists() == existed


def test_bad_folders(trained: tuple, tmp_path: Path):
    images, masks = write(tmp_path)
    args, mask = made(tmp_path, trained), masks / "wide.png"
    kept = mask.read_bytes()
    mask.unlink()
    fails(r"in/wide.png: has no partner, expected .*masks/wide\.\*", args)
    Image.new("L", (99, 36)).save(mask)
    fails(r"wide.png: width and height are \(99, 36\), of its image \(100, 36\)", args)
    mask.write_bytes(b"junk")
    fails("masks/wide.png: cannot be read as an image", args)
    mask.write_bytes(kept)
    (masks / "more.png").write_bytes(kept)
    fails("masks/more.png: has no partner", args)
    (masks / "more.png").unlink()
    (images / "wide.jpg").write_bytes((images / "photo.jpg").read_bytes())
    fails("wide.png: differs from wide.jpg by its suffix", args)
    (images / "wide.jpg").unlink()
    fails(
        "--mask-dir .*nowhere: no such folder",
        made(tmp_path, trained, mask_dir=tmp_path / "nowhere"),
    )
    fails("--mask-dir .*in/masks: no such folder", made(tmp_path, trained, mask_dir=None))
    fails("--checkpoint: not given", made(tmp_path, trained, checkpoint=None))
    fails("other classes", made(tmp_path, trained, mask_labels="gta5"))
    (tmp_path / "empty").mkdir()
    fails("no image", made(tmp_path, trained, input_dir=tmp_path / "empty"))
    for output in (images, images / "below", masks / "below", tmp_path):
        fails("inside, around or equal", made(tmp_path, trained, output_dir=output))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    fails("not empty, and no translation", made(tmp_path, trained, output_dir=tmp_path / "full"))


def test_bad_checkpoints(trained: tuple, tmp_path: Path):
    checkpoint = torch.load(trained[2], weights_only=True)
    for match, change in {
        "were changed": lambda c: c["bridge"]["mean"].add_(1e-3),
        "or configuration": lambda c: c["config"].update(width=10**7),  # no memory could hold it
        "without a bridge": lambda c: c.pop("bridge"),
        "not a checkpoint of this": lambda c: c.update(format="other"),
    }.items():
        changed = copy.deepcopy(checkpoint)
        change(changed)
        torch.save(changed, tmp_path / "changed.pt")
        with pytest.raises(UserError, match=f"changed.pt: .*{match}"):
            db.load_bridge(tmp_path / "changed.pt", CPU)


def test_config_and_flags(trained: tuple, tmp_path: Path, monkeypatch, no_figures):
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
    config = tmp_path / "c.json"
    for text, match in {
        '{"guidence": 2}': "unknown key 'guidence'",
        "{": "neither TOML nor a JSON object",
        "[1]": "neither TOML nor a JSON object",
        '{"seed": "ten"}': "seed is 'ten', expected int",
        '{"seed": true}': "seed is True, expected int",
        '{"input_dir": {"a": 1}}': "input_dir is {'a': 1}",
        '{"bridge": "x"}': "bridge is 'x', expected .*ddib",
    }.items():
        config.write_text(text)
        with pytest.raises(UserError, match=match):
            db.read_options(config)


@pytest.mark.parametrize("command", [[], ["train"], ["translate"]])
def test_help_names_the_commands(command: list[str], monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusion_bridge.py", *command, "--help"])
    with pytest.raises(SystemExit):
        db.main()
    said = capsys.readouterr().out
    assert "diffusion_bridge.py train" in said and "diffusion_bridge.py translate" in said
