"""The bridge against closed forms, tiles against the whole, and the folder contract."""

import copy
import hashlib
import json
import math
import os
import signal
import sys
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import like
from PIL import Image
from torch import Tensor

import common
import diffusion_bridge as db
from common import IGNORE, UserError

CPU = torch.device("cpu")
SIZE = (32, 64)


def quarter(steps: int, strength: float = 1.0) -> list[float]:
    """Angles from the image towards noise."""
    return np.linspace(0, strength * math.pi / 2, steps + 1).tolist()


# ---- A bridge that has been trained a little ----------------------------------------------------
@pytest.fixture(scope="module")
def trained(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[db.Bridge, common.Part]:
    """Fitted on the small miniature within seconds, and the source; read only."""
    here = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("bridge"))
    args = db.Args(
        data=str(mini), steps=2, batch_size=8, size=SIZE, labelled=2, device="cpu", width=16,
        unet_steps=120, reader_steps=10, out=Path("run"),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Run, "evaluate", lambda *_: None)
        run = common.Run(args, "diffusion_bridge")
        source = common.load(run.args, "source")
        bridge = db.fit(run, source, common.load(run.args, "target_unlabelled"))
    os.chdir(here)
    return bridge, source


@pytest.fixture
def checkpoint(trained: tuple, tmp_path: Path) -> Path:
    db.save(trained[0], tmp_path / "bridge.pt")
    return tmp_path / "bridge.pt"


# ---- Sampler ------------------------------------------------------------------------------------
def gaussian(mean: Tensor, std: Tensor, x: Tensor, angle: float) -> Tensor:
    """E[cos(a) e - sin(a) x0 | x_a] for x0 ~ N(mean, std^2), by the normal's conditional mean."""
    cos, sin = math.cos(angle), math.sin(angle)
    variance = cos**2 * std**2 + sin**2
    off = (x - cos * mean) / variance
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
        angles = quarter(steps, 0.97)[:: -1 if back else 1]
        result = db.flow(partial(gaussian, MEAN, STD), x, angles)
        errors.append(float((result - exact(MEAN, STD, x, angles[0], angles[-1])).abs().max()))
    assert errors[-1] < 5e-4
    assert errors[0] / errors[1] > 3.2 and errors[1] / errors[2] > 3.2  # 4 in the limit, DDIM has 2


def test_bridge_between_gaussians_is_the_map_of_least_transport():
    """DDIB: encoded to pure noise and decoded, x goes to m' + s' (x - m) / s."""
    x = MEAN + STD * torch.randn(SHAPE, generator=common.generator(1)).double()
    mean, std = MEAN.flip(1) + 0.3, 0.5 * STD
    angles = quarter(400)
    noise = db.flow(partial(gaussian, MEAN, STD), x, angles)
    torch.testing.assert_close(noise, (x - MEAN) / STD, atol=1e-4, rtol=0)
    result = db.flow(partial(gaussian, mean, std), noise, angles[::-1])
    torch.testing.assert_close(result, mean + std * (x - MEAN) / STD, atol=1e-4, rtol=0)


def test_one_step_reaches_a_single_image():
    """Where there is but one image, v is exact in any step: DDIM needs one."""
    x = torch.randn(SHAPE).double()
    result = db.flow(partial(gaussian, MEAN, 0 * STD), x, [1.5, 0.0])
    torch.testing.assert_close(result, MEAN + 0 * x)


def test_keep_replaces_the_foreseen_image():
    """Whatever the flow foresees, it ends at the image that `keep` puts in its place."""
    x = torch.randn(SHAPE, generator=common.generator(2)).double()
    angles = quarter(128)[::-1]
    result = db.flow(
        partial(gaussian, MEAN, STD), x, angles, keep=lambda image: torch.full_like(image, 0.25)
    )
    torch.testing.assert_close(result, torch.full_like(result, 0.25), atol=0.03, rtol=0)
    assert (db.flow(partial(gaussian, MEAN, STD), x, angles) - 0.25).abs().max() > 0.5


def test_encode_and_decode_in_one_domain_return_the_image(trained: tuple):
    bridge, source = trained
    x = bridge.space.encode(common.to_tensor(source.images[:6], CPU))
    maps = bridge.maps(torch.from_numpy(np.array(source.labels[:6])).long())
    raw = db.looks(common.to_tensor(source.images[:6], CPU))
    step = partial(
        bridge.velocity, domain=db.SOURCE, maps=maps, look=bridge.look(raw, torch.ones_like(raw)),
        guidance=1.0, tile=SIZE, overlap=0,
    )  # fmt: skip
    psnr = []
    for steps in (10, 25, 50):
        angles = quarter(steps, 0.97)
        with torch.inference_mode():
            back = db.flow(step, db.flow(step, x, angles), angles[::-1])
        error = bridge.space.decode(back) - bridge.space.decode(x)
        psnr.append(-10 * math.log10(float(error.square().mean())))
    assert psnr == sorted(psnr) and psnr[-1] >= 35, psnr


# ---- Space, network and conditions --------------------------------------------------------------
@pytest.mark.parametrize("levels", [0, 1, 2])
def test_haar_is_orthonormal_and_inverted(levels: int):
    x = torch.randn(2, 3, 8, 16)
    y = db.haar(x, levels)
    assert y.shape == (2, 3 * 4**levels, 8 >> levels, 16 >> levels)
    torch.testing.assert_close(y.square().sum(), x.square().sum())
    torch.testing.assert_close(db.unhaar(y, levels), x)


def test_haar_by_hand():
    x = torch.tensor([[1.0, 2.0], [4.0, 8.0]]).view(1, 1, 2, 2)
    bands = db.haar(x, 1).flatten().tolist()
    assert bands == [7.5, -2.5, -4.5, 1.5]  # mean, horizontal, vertical, diagonal, times two


@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_space_scales_by_the_power_of_the_deviation(whiten: float):
    images, space = torch.rand(4, 3, 16, 16) ** 2, db.Space(2, 0)
    plain = space.encode(images).std(dim=(0, 2, 3))
    space.fit(images, whiten)
    x = space.encode(images)
    torch.testing.assert_close(x.mean(dim=(0, 2, 3)), torch.zeros(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(dim=(0, 2, 3)), plain ** (1 - whiten))
    torch.testing.assert_close(space.decode(x), images, atol=1e-5, rtol=0)


def test_a_cell_sees_its_surroundings_alone(trained: tuple):
    """No statistic of the whole picture: what is far away changes nothing, what is near does."""
    unet = db.UNet(12, 2, 8)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, maps = torch.randn(1, 12, 4, 256), torch.zeros(1, 2, 4, 256)
    look = torch.zeros(1, 10)

    def out(x: Tensor) -> Tensor:
        return unet(x, torch.tensor([0.7]), torch.tensor([1]), maps, look)

    changed = x.clone()
    changed[..., 128] += 5
    with torch.no_grad():
        difference = (out(changed) - out(x)).abs().sum(dim=(0, 1, 2))
    assert (difference[:32] == 0).all() and (difference[-32:] == 0).all()
    assert (difference[124:132] > 0).all()


def test_looks_by_hand():
    grey = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(db.looks(grey)[0], torch.tensor([0.5, 0, 0, 0, 0.5]))
    red = torch.zeros(1, 3, 16, 16)
    red[:, 0] = 1
    torch.testing.assert_close(db.looks(red)[0], torch.tensor([0.299, 0, 1, 1, 0]))
    scene = torch.rand(4, 3, 32, 64)
    hazy = 0.5 * scene + 0.4  # light of the air: brighter, flatter, paler, no darkness left
    signs = (db.looks(hazy) - db.looks(scene)).sign()
    assert (signs[:, [0, 1, 2, 4]] == torch.tensor([1.0, -1, -1, 1])).all()


def test_maps_are_shares_of_classes(trained: tuple):
    bridge = trained[0]
    labels = torch.full((1, 4, 8), IGNORE)
    labels[0, :2, :2] = torch.tensor([[0, 3], [3, IGNORE]])
    maps = bridge.maps(labels)
    assert maps.shape == (1, 10, 2, 4)
    expected = torch.zeros(10)
    expected[0], expected[3] = 0.25, 0.5
    torch.testing.assert_close(maps[0, :, 0, 0], expected)
    assert maps[0, :, 1].sum() == 0


def test_guidance_extrapolates_from_no_domain(trained: tuple):
    bridge, _ = trained
    x, maps, look = torch.randn(1, 12, 16, 32), torch.zeros(1, 10, 16, 32), torch.zeros(1, 10)
    call = partial(bridge.velocity, x, 1.0, maps=maps, look=look, tile=SIZE, overlap=0)
    with torch.no_grad():
        plain, none = call(domain=db.TARGET, guidance=1.0), call(domain=db.NEITHER, guidance=1.0)
        torch.testing.assert_close(
            call(domain=db.TARGET, guidance=2.5), none + 2.5 * (plain - none), atol=1e-4, rtol=1e-4
        )
    assert (plain - none).abs().max() > 1e-3


# ---- Translation --------------------------------------------------------------------------------
def batch(trained: tuple, count: int, size: tuple[int, int] = SIZE) -> tuple[Tensor, Tensor, list]:
    source = trained[1]
    images = common.to_tensor(source.images[:count], CPU)
    repeat = [math.ceil(s / t) for s, t in zip(size, SIZE, strict=True)]
    images = torch.cat([torch.cat([images, images.flip(3)], dim=3)] * repeat[1], dim=3)
    labels = torch.from_numpy(np.array(source.labels[:count])).long()
    labels = torch.cat([torch.cat([labels, labels.flip(2)], dim=2)] * repeat[1], dim=2)
    names = list(source.names[:count])
    return images[:, :, : size[0], : size[1]], labels[:, : size[0], : size[1]], names


@pytest.mark.parametrize("bridge_kind", ["ddib", "sdedit"])
def test_an_image_is_translated_alike_in_any_company(trained: tuple, bridge_kind: str):
    args = db.Sampling(bridge=bridge_kind, sample_steps=3)
    images, labels, names = batch(trained, 5)
    together = trained[0].translate(images, labels, names, args, 0)
    alone = trained[0].translate(images[3:4], labels[3:4], names[3:4], args, 0)
    torch.testing.assert_close(alone, together[3:4], atol=1e-4, rtol=0)
    others = [
        trained[0].translate(images[3:4], labels[3:4], [name], args, 0) for name in "abcd"
    ]  # of another name it gets another photo to match, or other noise
    assert max((other - alone).abs().max() for other in others) > 1e-3


@pytest.mark.parametrize("size", [(31, 63), (25, 50)])
def test_any_size(trained: tuple, size: tuple[int, int]):
    images, labels, names = batch(trained, 2, size)
    result = trained[0].translate(images, labels, names, db.Sampling(sample_steps=2), 0)
    assert result.shape == images.shape and result.isfinite().all()


def test_tiles_change_less_than_a_percent_and_show_no_seam(trained: tuple):
    args = db.Sampling(sample_steps=8)
    images, labels, names = batch(trained, 4, (32, 160))
    run = partial(trained[0].translate, images, labels, names, args, 0)
    whole, tiled = run(tile=(32, 160)), run(tile=(32, 96), overlap=32)
    difference = (tiled - whole).abs()
    assert 0 < difference.mean() < 0.01
    # At a seam neighbouring columns would differ more than they do in the whole image.
    step = (tiled.diff(dim=3) - whole.diff(dim=3)).abs().mean(dim=(0, 1, 2))  # [159]
    usual = whole.diff(dim=3).abs().mean()
    assert step.max() < 0.1 * usual


def test_tiles_cover_and_blend_to_one():
    for size, tile, overlap in product((8, 20, 36, 100), (8, 16), (0, 4)):
        begins = db.starts(size, tile, overlap)
        ends = [b + min(tile, size) for b in begins]
        assert begins[0] == 0 and ends[-1] == size and all(b % 4 == 0 for b in begins)
        assert all(b <= e - overlap for b, e in zip(begins[1:], ends[:-1], strict=True))
    x = torch.randn(2, 3, 20, 36)
    seen = []

    def predict(part: Tensor, maps: Tensor) -> Tensor:
        seen.append(part.shape[2:])
        return part + maps

    result = db.tiled(predict, x, 2 * x, (8, 16), 4)
    torch.testing.assert_close(result, 3 * x)
    assert set(seen) == {(8, 16)} and len(seen) == 4 * 3


def test_keep_low_keeps_the_sources_luminance(trained: tuple):
    images, labels, names = batch(trained, 2)
    kept, free = (
        trained[0].translate(images, labels, names, db.Sampling(sample_steps=4, keep_low=k), 0)
        for k in (1.0, 0.0)
    )

    def off(result: Tensor) -> float:
        low = partial(torch.nn.functional.avg_pool2d, kernel_size=9, stride=1)
        return float((low(db.luminance(result)) - low(db.luminance(images))).abs().mean())

    assert off(kept) < 0.3 * off(free)


def test_reference_and_match_steer(trained: tuple, tmp_path: Path):
    bridge = trained[0]
    Image.new("RGB", SIZE[::-1], (200, 100, 50)).save(tmp_path / "photo.png")
    rngs = [common.generator(k) for k in range(40)]
    some = bridge.wanted(rngs, db.Sampling())
    rows = {tuple(row) for row in bridge.looks.tolist()}
    assert {tuple(row) for row in some.tolist()} <= rows and len(some.unique(dim=0)) > 2
    photo = bridge.wanted(rngs[:2], db.Sampling(reference=tmp_path / "photo.png"))
    torch.testing.assert_close(photo[:, 3], torch.full((2,), 150 / 255))
    images, labels, names = batch(trained, 2)
    steer = partial(bridge.translate, images, labels, seed=0)
    ways = [
        steer(names, args=db.Sampling(sample_steps=2, match=()), seed=s) for s in (0, 1)
    ]  # with nothing to match, the photo that is drawn has no part in it
    torch.testing.assert_close(*ways)


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


def test_edge_agreement_is_one_at_the_borders_and_half_by_chance():
    labels = np.zeros((1, 32, 32), np.uint8)
    labels[0, 8:20, 10:25] = 7
    drawn = np.repeat((labels * 30)[..., None], 3, axis=3)
    assert db.edge_agreement(drawn, labels)[0] == 1
    moved = np.roll(drawn, 5, axis=2)
    assert db.edge_agreement(moved, labels)[0] < 0.9
    noise = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)
    assert abs(db.edge_agreement(noise, labels)[0] - 0.5) < 0.15
    assert np.isnan(db.edge_agreement(drawn, 0 * labels)[0])


def test_agreement_counts_valid_pixels():
    labels = np.array([[[0, 1], [IGNORE, 2]], [[IGNORE] * 2] * 2], np.uint8)
    assert db.agreement(np.ones_like(labels), labels).tolist() == [pytest.approx(1 / 3), 1.0]


# ---- The row ------------------------------------------------------------------------------------
def row(args: common.Args, out: str, **changes) -> db.Args:
    small = {"unet_steps": 4, "reader_steps": 4, "width": 8, "sample_steps": 2}
    return like(args, db.Args, **{"out": Path(out), **small, **changes})


def test_row_goes_on_where_it_was_cut_off(args: common.Args, no_figures, monkeypatch):
    """Stopped in the translation: what is there is kept, and the end is the same."""
    whole = db.run(row(args, "whole"))
    translate, calls = db.Bridge.translate, []

    def stop(self, *rest, **more):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return translate(self, *rest, **more)

    monkeypatch.setattr(db.Bridge, "translate", stop)
    with pytest.raises(KeyboardInterrupt):
        db.run(row(args, "cut"))
    cut = db.run(row(args, "cut"))
    batches = len(list(Path("whole/translated").iterdir()))
    assert len(calls) == 3 + batches - 2
    assert cut.miou == whole.miou and cut.target_labels == 0 and "4 U-Net" in cut.beside
    sets = [np.load(f"{name}/set/images.npy") for name in ("whole", "cut")]
    np.testing.assert_array_equal(*sets)
    table = json.loads(Path("whole/checks.json").read_text())
    assert {"kid_before", "kid_after", "edges_after", "reader_miou_after"} <= set(table)


def test_latent_space_returns_the_image(args: common.Args, no_figures, monkeypatch):
    """The autoencoder learns: what it returns is nearer than the mean colour."""
    monkeypatch.setattr(common.Run, "evaluate", lambda *_: None)
    latent = row(args, "latent", latent=6, patch=4, latent_steps=160, batch_size=8)
    run = common.Run(latent, "diffusion_bridge")
    source = common.load(run.args, "source")
    bridge = db.fit(run, source, common.load(run.args, "target_unlabelled"))
    images = common.to_tensor(source.images[:8], CPU)
    x = bridge.space.encode(images)
    assert x.shape == (8, 6, 8, 16)
    assert 0.5 < x.std() < 1.5
    error = (bridge.space.decode(x) - images).square().mean()
    assert error < 0.25 * images.var(dim=(2, 3)).mean()
    labels = torch.from_numpy(np.array(source.labels[:8])).long()
    sampling = db.Sampling(sample_steps=2)
    assert bridge.translate(images, labels, source.names[:8], sampling, 0).shape == images.shape


def test_controls_and_filter(args: common.Args, no_figures):
    source = None
    for control in ("identity", "color", "fourier"):
        db.run(row(args, control, control=control, unet_steps=0, steps=1))
        images = np.load(f"{control}/set/images.npy").astype(int)
        source = images if control == "identity" else source
        assert (abs(images - source).mean() > 1) == (control != "identity")
    with pytest.raises(UserError, match="min-agreement 1"):
        db.run(row(args, "none", control="identity", unet_steps=0, min_agreement=1.0))


# ---- The folder ---------------------------------------------------------------------------------
def write(folder: Path) -> tuple[Path, Path]:
    """Images of several modes and sizes in nested folders, with masks of several kinds."""
    rng = np.random.default_rng(0)
    kinds = {
        "a/rgb.png": "RGB", "a/again.png": "RGB", "b/grey.png": "L", "b/c/alpha.png": "RGBA",
        "palette.png": "P", "photo.jpg": "RGB", "wide.png": "RGB", "deep.png": "I;16",
        "d/clear.PNG": "P", "turned.jpg": "RGB",
    }  # fmt: skip
    for k, (name, mode) in enumerate(kinds.items()):
        h, w = (36, 100) if name == "wide.png" else SIZE
        image = Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256)
        image = image.convert(mode)
        if mode == "RGBA":
            image.putalpha(Image.fromarray(rng.integers(0, 256, (h, w), dtype=np.uint8)))
        ids = np.zeros((h, w), np.uint16 if k % 2 else np.uint8)
        ids[h // 3 :, w // 2 :] = 26000 + k if k % 2 else 7
        path, mask = folder / "in" / name, (folder / "masks" / name).with_suffix(".png")
        for p in (path, mask):
            p.parent.mkdir(parents=True, exist_ok=True)
        exif = Image.Exif()
        exif[db.EXIF_TURN] = 6
        clear = {"transparency": image.getpixel((0, 0))}
        options = {"d/clear.PNG": clear, "turned.jpg": {"exif": exif}}
        image.save(path, **options.get(name, {}))
        Image.fromarray(ids).save(mask)
    return folder / "in", folder / "masks"


def made(tmp_path: Path, checkpoint: Path, **changes) -> db.TranslateArgs:
    fields = {
        "input_dir": tmp_path / "in", "mask_dir": tmp_path / "masks", "sample_steps": 2,
        "output_dir": tmp_path / "out", "checkpoint": checkpoint, "batch_size": 2, "device": "cpu",
    }  # fmt: skip
    return db.TranslateArgs(**{**fields, **changes})


def content(folder: Path) -> dict[str, str]:
    """Hashes of all files but the log, and the metadata less times."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "metadata.json"]
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    del found["log.jsonl"]
    metadata = json.loads((folder / "metadata.json").read_text())
    for record in metadata["images"]:
        del record["seconds"]
    del metadata["seconds"]
    return found | {"metadata": json.dumps(metadata, sort_keys=True)}


def test_folder_contract(checkpoint: Path, tmp_path: Path, no_figures, monkeypatch, capsys):
    images, masks = write(tmp_path)
    (images / "notes.txt").write_text("no image")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    args = made(tmp_path, checkpoint)
    db.translate_folder(args)
    assert all(p.read_bytes() == data for p, data in before.items())  # inputs are never written to
    out = tmp_path / "out"
    for mask in masks.rglob("*.png"):
        assert (out / "masks" / mask.relative_to(masks)).read_bytes() == mask.read_bytes()
    modes = {
        "b/grey.png": "L", "b/c/alpha.png": "RGBA", "d/clear.PNG": "RGBA", "deep.png": "I;16",
    }  # fmt: skip
    metadata = json.loads((out / "metadata.json").read_text())
    assert metadata["complete"] and metadata["skipped"] == [str(images / "notes.txt")]
    assert "notes.txt" in (out / "log.jsonl").read_text()
    assert len(metadata["images"]) == 10 and metadata["settings"]["checkpoint"]
    for record in metadata["images"]:
        with Image.open(images / record["image"]) as old, Image.open(out / record["image"]) as new:
            assert new.size == old.size and new.format == old.format
            assert new.mode == modes.get(record["image"], "RGB")
            pixels = [np.asarray(i if "16" in i.mode else i.convert("RGB")) for i in (new, old)]
            assert pixels[0].tolist() != pixels[1].tolist()
            if new.mode == "RGBA":
                clear = [i.convert("RGBA").getchannel("A").tobytes() for i in (new, old)]
                assert clear[0] == clear[1] and len(set(clear[0])) > 1
            if new.mode == "I;16":
                assert pixels[0].max() > 4 * 256  # its range, not that of 8 bits
            assert new.getexif().get(db.EXIF_TURN) == old.getexif().get(db.EXIF_TURN)
        digest = hashlib.sha256((out / record["image"]).read_bytes()).hexdigest()
        assert record["output_sha256"] == digest
    whole = content(out)
    # A finished image is not done twice; one that was lost or spoilt is.
    calls, translate = [], db.translate_group
    monkeypatch.setattr(db, "translate_group", lambda *a: calls.append(1) or translate(*a))
    db.translate_folder(args)
    assert not calls
    (out / "wide.png").write_bytes(b"spoilt")
    db.translate_folder(args)
    assert len(calls) == 1 and content(out) == whole
    with pytest.raises(UserError, match="another sample_steps"):
        db.translate_folder(made(tmp_path, checkpoint, sample_steps=3))
    assert " stay whose" not in capsys.readouterr().out
    (images / "turned.jpg").rename(tmp_path / "turned.jpg")
    (masks / "turned.png").rename(tmp_path / "turned.png")
    db.translate_folder(args)
    assert "1 images stay whose originals are gone, the first turned.jpg" in capsys.readouterr().out
    (tmp_path / "turned.jpg").rename(images / "turned.jpg")
    (tmp_path / "turned.png").rename(masks / "turned.png")
    # Two ranks write what one does.
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        db.translate_folder(made(tmp_path, checkpoint, output_dir=tmp_path / "ranks"))
    assert content(tmp_path / "ranks") == whole
    # What a rank that was killed has left is gone at the end, even where fewer go on.
    (tmp_path / "ranks/.rank7.lock").touch()
    db.translate_folder(made(tmp_path, checkpoint, output_dir=tmp_path / "ranks"))
    assert content(tmp_path / "ranks") == whole


def test_killed_at_any_moment_it_ends_the_same(checkpoint: Path, tmp_path: Path, no_figures):
    write(tmp_path)
    whole = made(tmp_path, checkpoint)
    db.translate_folder(whole)
    moment, died = 0, True
    while died:  # in turn before and after a call that writes
        cut = made(tmp_path, checkpoint, output_dir=tmp_path / f"cut{moment}")
        child = os.fork()
        if child == 0:
            killed_at(moment)
            try:
                db.translate_folder(cut)
            finally:
                os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        db.translate_folder(cut)
        assert content(cut.output_dir) == content(whole.output_dir)
        moment += 7
    assert moment > 20


def killed_at(moment: int) -> None:
    """This process kills itself at the n-th rename, copy or line of the log, before or after it."""
    count = [0]

    def deadly(function):
        def call(*args, **more):
            for late in (False, True):
                if late:
                    result = function(*args, **more)
                if count[0] == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                count[0] += 1
            return result

        return call

    Path.replace = deadly(Path.replace)
    db.shutil.copyfile = deadly(db.shutil.copyfile)
    db.write_line = deadly(db.write_line)


def test_labels_of_the_masks_and_a_judge(checkpoint: Path, trained, tmp_path: Path, no_figures):
    bridge, source = trained
    for k in range(3):
        for folder, array in (("in", source.images[k]), ("masks", source.labels[k])):
            (tmp_path / folder).mkdir(exist_ok=True)
            if folder == "masks":
                colours = {v: c for c, v in db.common.VKITTI2_COLOURS.items() if v}
                names = [*bridge.config["classes"], *[None] * 246]
                array = np.array([colours.get(n, (0, 0, 0)) for n in names], np.uint8)[array]
            Image.fromarray(array).save(tmp_path / folder / f"{k}.png")
    net = common.Network("tiny", 10)
    judge = {"format": "sim2real-1", "network": ["tiny", 10], "net": net.state_dict()}
    torch.save(judge, tmp_path / "judge.pt")
    args = made(
        tmp_path, checkpoint, mask_labels="vkitti2", judge=tmp_path / "judge.pt", sample_steps=3
    )
    db.translate_folder(args)
    table = json.loads((tmp_path / "out/metadata.json").read_text())["checks"]
    assert table["left_out"] == 0 and 0 <= table["judge_miou_after"] <= 100
    # The folder's result is the row's, but for the seed's names.
    names = [f"{k}.png" for k in range(3)]
    labels = torch.from_numpy(np.array(source.labels[:3])).long()
    images = bridge.translate(common.to_tensor(source.images[:3], CPU), labels, names, args, 0)
    found = np.stack([np.asarray(Image.open(tmp_path / "out" / n)) for n in names]).astype(int)
    assert abs(found - db.to_uint8(images)).max() <= 1
    least = made(tmp_path, checkpoint, min_agreement=1.0, output_dir=tmp_path / "none")
    db.translate_folder(least)
    metadata = json.loads((tmp_path / "none/metadata.json").read_text())
    assert metadata["checks"]["left_out"] == 3 and not list((tmp_path / "none").rglob("*.png"))


def test_what_was_translated_is_a_folder_of_pairs(checkpoint: Path, tmp_path: Path):
    """The figure lies among the images, and no loader takes it for one: not even this one."""
    images, masks = write(tmp_path)
    db.translate_folder(made(tmp_path, checkpoint))
    out = tmp_path / "out"
    assert (out / "translation.pdf").read_bytes().startswith(b"%PDF")
    first = (out / "translation.pdf").read_bytes()
    db.translate_folder(made(tmp_path, checkpoint))
    assert (out / "translation.pdf").read_bytes() == first
    again = made(tmp_path, checkpoint, input_dir=out, mask_dir=None, output_dir=tmp_path / "again")
    db.translate_folder(again)
    found = {p.name for p in (tmp_path / "again").rglob("*") if p.suffix.lower() in db.SUFFIXES}
    assert found == {p.name for f in (images, masks) for p in f.rglob("*") if p.is_file()}


def test_two_ranks_begin_together(tmp_path: Path, monkeypatch):
    """Another rank may write the metadata while this one looks whether the folder is new."""
    out, settings = tmp_path / "out", {"seed": 0}
    iterdir = Path.iterdir
    out.mkdir()

    def late(self: Path):
        common.write_json(out / "metadata.json", {"complete": False, "settings": settings})
        return iterdir(self)

    monkeypatch.setattr(Path, "iterdir", late)
    db.prepare(out, settings)


def test_folders_without_much_to_check(checkpoint: Path, tmp_path: Path, no_figures):
    """One image has no kernel distance, one label no borders: null in strict JSON, no warning."""
    for folder in ("in", "masks"):
        (tmp_path / folder).mkdir()
        Image.new("L", SIZE[::-1], 3).save(tmp_path / folder / "only.png")
    db.translate_folder(made(tmp_path, checkpoint))

    def strict(constant: str) -> None:
        raise AssertionError(constant)

    text = (tmp_path / "out/metadata.json").read_text()
    table = json.loads(text, parse_constant=strict)["checks"]
    assert {k: table[k] for k in ("kid_after", "edges_after")} == {
        "kid_after": None, "edges_after": None
    }  # fmt: skip


def test_names_of_any_bytes_and_files_that_only_look_like_partners(
    checkpoint: Path, tmp_path: Path, no_figures
):
    images, masks = write(tmp_path)
    odd = os.fsdecode(b"\xff\xfe.png")
    for folder in (images, masks):
        (folder / odd).write_bytes((folder / "wide.png").read_bytes())
    (images / "wide.h5").write_bytes(b"\x89HDF\r\n\x1a\n")  # the depth, say
    (images / "junk.png").write_bytes(b"junk")
    os.rename(masks, tmp_path / "elsewhere")
    (images / "masks").symlink_to(tmp_path / "elsewhere")  # a link to the masks is not an image's
    db.translate_folder(made(tmp_path, checkpoint, mask_dir=None))
    metadata = json.loads((tmp_path / "out/metadata.json").read_text())
    assert metadata["skipped"] == [str(images / name) for name in ("junk.png", "wide.h5")]
    assert odd in [record["image"] for record in metadata["images"]]
    assert (tmp_path / "out/masks" / odd).exists()


def test_scale_keeps_the_details_of_the_original(checkpoint: Path, tmp_path: Path, no_figures):
    write(tmp_path)
    db.translate_folder(made(tmp_path, checkpoint, scale=0.5))
    old, new = (np.asarray(Image.open(tmp_path / f / "wide.png")) for f in ("in", "out"))
    fine = [np.diff(a.astype(float), axis=1).ravel() for a in (old, new)]
    assert old.shape == new.shape and np.corrcoef(*fine)[0, 1] > 0.5


# ---- Bad input ----------------------------------------------------------------------------------
def fails(match: str, args: db.TranslateArgs) -> None:
    with pytest.raises(UserError, match=match) as error:
        db.translate_folder(args)
    assert "\n" not in str(error.value)
    assert not args.output_dir.exists() or args.output_dir == args.input_dir


def test_bad_folders(checkpoint: Path, tmp_path: Path):
    images, masks = write(tmp_path)
    args = made(tmp_path, checkpoint)
    mask = masks / "wide.png"
    kept = mask.read_bytes()
    mask.unlink()
    fails("wide.png: image without a mask", args)
    Image.new("L", (99, 36)).save(mask)
    fails("wide.png: is 99x36, its image 100x36", args)
    mask.write_bytes(kept)
    (masks / "more.png").write_bytes(kept)
    fails("more.png: mask without an image", args)
    (masks / "more.png").unlink()
    (images / "wide.jpg").write_bytes((images / "photo.jpg").read_bytes())
    fails("wide.png: wide.jpg has the same stem", args)
    (images / "wide.jpg").unlink()
    whole = (images / "wide.png").read_bytes()
    for damaged in (whole[: len(whole) // 2], b""):
        (images / "wide.png").write_bytes(damaged)
        fails("wide.png: cannot be read as an image", args)
    (images / "wide.png").write_bytes(whole)
    mask.write_bytes(b"junk")
    fails("masks/wide.png: cannot be read as an image", args)
    mask.write_bytes(kept)
    Image.new("F", (64, 32)).save(images / "float.tif")
    Image.new("L", (64, 32)).save(masks / "float.png")
    fails("float.tif: found TIFF of mode F", args)
    (images / "float.tif").unlink()
    (masks / "float.png").unlink()
    (tmp_path / "more").mkdir()
    (images / "link").symlink_to(tmp_path / "more")
    fails("link: a link to a folder", args)
    (images / "link").unlink()
    fails("the input itself", made(tmp_path, checkpoint, mask_dir=images))
    fails("no such folder", made(tmp_path, checkpoint, input_dir=tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    fails("no image", made(tmp_path, checkpoint, mask_dir=images, input_dir=tmp_path / "empty"))
    for output in (images, images / "below", masks / "below"):
        with pytest.raises(UserError, match="inside, around or equal"):
            db.translate_folder(made(tmp_path, checkpoint, output_dir=output))
    with pytest.raises(UserError, match="inside, around or equal"):
        db.translate_folder(made(tmp_path, checkpoint, output_dir=tmp_path))
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("")
    with pytest.raises(UserError, match="not empty and not a translation"):
        db.translate_folder(made(tmp_path, checkpoint, output_dir=tmp_path / "full"))
    assert list((tmp_path / "full").iterdir()) == [tmp_path / "full/thesis.tex"]


def test_bad_checkpoints(checkpoint: Path, tmp_path: Path):
    write(tmp_path)
    found = torch.load(checkpoint, weights_only=True)
    for name, change in {
        "weights": lambda c: c["bridge"]["space.mean"].add_(1e-3),
        "configuration": lambda c: c["config"].update(size=[64, 64]),
        "were changed": lambda c: c["config"].update(width=10**7),  # which no memory could hold
        "weights or": lambda c: c["bridge"].pop("looks"),
        "damaged": lambda c: c.pop("config"),
        "without a bridge": lambda c: c.pop("bridge"),
        "not a checkpoint of this": lambda c: c.update(format="other"),
    }.items():
        changed = copy.deepcopy(found)
        change(changed)
        torch.save(changed, tmp_path / "changed.pt")
        fails(f"changed.pt: .*{name}", made(tmp_path, tmp_path / "changed.pt"))
    (tmp_path / "changed.pt").write_bytes(b"nonsense")
    fails("not a checkpoint, or a damaged", made(tmp_path, tmp_path / "changed.pt"))
    fails("no such checkpoint", made(tmp_path, tmp_path / "nowhere.pt"))
    fails("other classes", made(tmp_path, checkpoint, mask_labels="gta5"))


def test_bad_options_leave_no_folder(checkpoint: Path, tmp_path: Path, trained: tuple):
    """Else the right ones would find it begun with the wrong ones."""
    write(tmp_path)
    (tmp_path / "junk.png").write_bytes(b"junk")
    for match, changes in {
        "--scale 0: expected 0.01 to 100": {"scale": 0},
        "--batch-size 0: expected at least 1": {"batch_size": 0},
        "--seed -1: expected at least 0": {"seed": -1},
        "--overlap -5: expected at least 0": {"overlap": -5},
        "--tile 0 0: expected at least 1": {"tile": (0, 0)},
        "--guidance nan: expected 0 to 100": {"guidance": math.nan},
        "--strength 2: expected 0.01 to 1": {"strength": 2},
        "--keep-edges 7: expected 0 to 1": {"keep_edges": 7},
        "junk.png: cannot be read as an image": {"reference": tmp_path / "junk.png"},
        "--judge: needs --mask-labels": {"judge": checkpoint},
        "bridge.pt: holds no segmentation network": {"judge": checkpoint, "mask_labels": "kitti"},
        "masks/.*: found PNG of mode .*, expected": {"mask_labels": "vkitti2"},
    }.items():
        fails(match, made(tmp_path, checkpoint, **changes))
    latent = db.Bridge({**trained[0].config, "latent": 4}, 2)
    db.save(latent, tmp_path / "latent.pt")
    fails("not in a latent space", made(tmp_path, tmp_path / "latent.pt", keep_low=1.0))
    with torch.no_grad():
        latent.unet.leave.bias.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        latent.translate(*batch((None, trained[1]), 2), db.Sampling(sample_steps=2), 0)


def test_bad_flags_of_a_row_cost_no_folder(args: common.Args):
    for match, changes in {
        "--strength 2: expected": {"strength": 2},
        "--ema 2: expected": {"ema": 2},
        "--unet-steps -1: expected": {"unet_steps": -1},
        "--width 20: expected a multiple of 8": {"width": 20},
        "nowhere.pt: no such checkpoint": {"judge": Path("nowhere.pt")},
        "nowhere.png: cannot be read": {"reference": Path("nowhere.png")},
        "not in a latent space": {"latent": 4, "keep_low": 1.0},
    }.items():
        for use in (db.run, db.train):
            with pytest.raises(UserError, match=match):
                use(row(args, "new", **changes))
    with pytest.raises(UserError, match="--control color: there is nothing to train"):
        db.train(row(args, "new", control="color"))
    assert not Path("new").exists()


def test_a_judge_changes_nothing_but_the_report(args: common.Args, no_figures):
    net = common.Network("tiny", 10)
    torch.save(
        {"format": "sim2real-1", "network": ["tiny", 10], "net": net.state_dict()}, "judge.pt"
    )
    db.run(row(args, "plain", steps=1))
    db.run(row(args, "judged", steps=1, judge=Path("judge.pt")))
    tables = [json.loads(Path(f"{out}/checks.json").read_text()) for out in ("plain", "judged")]
    assert set(tables[1]) - set(tables[0]) == {"judge_miou_before", "judge_miou_after"}
    bridges = [torch.load(f"{out}/bridge.pt", weights_only=True) for out in ("plain", "judged")]
    assert bridges[0]["sha256"] == bridges[1]["sha256"]


def test_config_and_flags(tmp_path: Path):
    import tyro

    config = tmp_path / "c.toml"
    config.write_text('input_dir = "A"\nguidance = 2.5\nmatch = ["haze", "warmth"]\namp = false\n')
    line = ["--output-dir", "B", "--checkpoint", "C", "--config", str(config)]
    args = tyro.cli(db.TranslateArgs, args=db.with_config([*line, "--guidance", "3"]))
    assert (args.input_dir, args.guidance, args.amp) == (Path("A"), 3.0, False)
    assert args.match == ("haze", "warmth")
    config = tmp_path / "c.json"
    config.write_text('{"sample-steps": 7, "tile": [32, 64]}')
    argv = db.with_config([*line[:4], "--input-dir", "A", f"--config={config}"])
    args = tyro.cli(db.TranslateArgs, args=argv)
    assert (args.sample_steps, args.tile) == (7, (32, 64))
    config = config.rename(tmp_path / "c.JSON")
    for text, match in (
        ('{"guidence": 2}', "unknown key 'guidence'"), ("{", "neither TOML nor JSON"),
        ("[1]", "found a list, expected a table"), ('{"seed": "ten"}', "seed is 'ten', exp.* int"),
        ('{"amp": 1}', "amp is 1, expected bool"), ('{"seed": true}', "seed is True, exp.* int"),
        ('{"tile": [32]}', "tile is .32., expected tuple.int, int. | None"),
        ('{"input_dir": {"a": 1}}', "input_dir is .'a': 1., expected Path"),
        ('{"match": ["fog"]}', "match is .'fog'., expected .*haze"),
    ):  # fmt: skip
        config.write_text(text)
        with pytest.raises(UserError, match=match):
            db.with_config(["--config", str(config)])
    with pytest.raises(UserError, match="No such file"):
        db.with_config(["--config", "nowhere.toml"])


def test_command_line_says_one_line(tmp_path: Path, monkeypatch, capsys):
    (tmp_path / "c.toml").write_text("no_such = 1\n")
    line = ["translate", "--config", str(tmp_path / "c.toml"), "--input-dir", "A"]
    monkeypatch.setattr(sys, "argv", ["diffusion_bridge.py", *line])
    with pytest.raises(SystemExit, match=r"error: .*unknown key 'no_such'"):
        db.main()
    line = ["translate", "--input-dir", "A", "--output-dir", "B", "--checkpoint", "C"]
    monkeypatch.setattr(sys, "argv", ["diffusion_bridge.py", *line])
    with pytest.raises(SystemExit, match=r"error: .*no such folder"):
        db.main()
