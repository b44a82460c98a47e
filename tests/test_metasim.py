"""Scene grammar, renderer, MMD, REINFORCE: against finite differences, plain loops, exact cases."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, like, whole_and_cut
from PIL import Image

import common
import metasim
from common import IGNORE, Split, UserError

CPU = torch.device("cpu")
SMALL = {"scenes": 12, "objects": 2, "cut_outs": 40, "width": 16, "match_batch": 4}
SMALL |= {"match_photos": 4, "reconstruct_steps": 4, "match_steps": 4, "feature_steps": 3}
REWARD = {"task_reward": True, "reward_rounds": 3, "reward_samples": 2, "reward_steps": 2}


def made(args: common.Args, out: str, **changes) -> metasim.Args:
    return like(args, metasim.Args, **{**SMALL, "out": Path(out), **changes})


@pytest.fixture
def roads(args: common.Args) -> metasim.RoadScenes:
    args = common.resolve(made(args, "run"), "metasim")
    return metasim.RoadScenes(common.load(args, "source"), args, CPU)


def neutral(roads: metasim.RoadScenes, graphs: metasim.Graphs) -> torch.Tensor:
    """The attributes with which scene and camera leave an image as it is. -> [B,V,M]."""
    grammar, values = roads.grammar, graphs.values.clone()
    for v, kind in enumerate([{**metasim.TONE, **metasim.WEATHER}, metasim.CAMERA]):
        for m, name in enumerate(kind):
            physical = -60 if name == "noise" else 0
            values[:, v, m] = (physical - grammar.mean[v, m]) / grammar.scale[v, m]
    values[:, 0, : len(metasim.TONE)] = roads.tones[graphs.picture[:, 0]]
    return values


def weights(folder: str) -> dict[str, torch.Tensor]:
    return common.read_checkpoint(Path(folder) / "checkpoint.pt")["net"]


# ---- Material -----------------------------------------------------------------------------------
def test_cut_outs_are_whole_objects_of_the_source(roads: metasim.RoadScenes):
    """Each one is in a source image, pixel by pixel, with its class and at its place; the pixels
    around it have other classes, and the frame does not cut it off."""
    (height, width), names, split = roads.size, roads.split.dataset.classes, roads.split
    for rgba, c, box in zip(roads.rgba, roads.kinds, roads.box, strict=True):
        assert names[c] in metasim.OBJECTS
        mask = rgba[3].numpy() > 0
        assert not rgba[:3, ~mask].any()  # premultiplied
        w, h = round(float(box[2] * width)), round(float(box[3] * height))
        left = round(float((box[0] + 1) * width - w) / 2)
        assert mask[:h, :w].any(axis=0).all() and mask[:h, :w].any(axis=1).all()
        assert not mask[h:].any() and not mask[:, w:].any()
        assert mask.sum() >= metasim.MIN_AREA * height * width
        matches = 0
        for n, horizon in enumerate(roads.horizon):
            top = round(float((box[1] + horizon + 1) * height - h) / 2)
            if not 0 <= top < height - h:
                continue
            inside = np.s_[top : top + h, left : left + w]
            colours, labels = split.images[n][inside], split.labels[n] == int(c)
            same = (colours == rgba[:3, :h, :w].permute(1, 2, 0).numpy()).all(axis=2)
            region = np.zeros((height, width), bool)
            region[inside] = mask[:h, :w]
            around = np.zeros_like(region)
            for axis, shift in ((0, 1), (0, -1), (1, 1), (1, -1)):
                around |= np.roll(region, shift, axis) & ~region
            around[0] &= top > 0
            matches += (
                same[mask[:h, :w]].all() and labels[region].all() and not labels[around].any()
            )
        assert matches


class Reads(np.ndarray):
    """An array that records how many of its rows are read at once."""

    most = 0

    def __getitem__(self, index):
        result = np.asarray(self)[index]
        rows = len(result) if result.ndim == self.ndim else 1
        Reads.most = max(Reads.most, rows)
        return result


def test_the_source_is_never_read_as_a_whole(args: common.Args):
    settings = common.resolve(made(args, "run"), "metasim")
    split = common.load(settings, "source")
    images, labels = (np.concatenate([x] * 3).view(Reads) for x in (split.images, split.labels))
    split = replace(split, names=split.names * 3, images=images, labels=labels)
    roads = metasim.RoadScenes(split, settings, CPU)
    graphs = roads.sample(8, common.generator(0))
    roads.render(graphs, graphs.values)
    assert len(split) > 16 >= Reads.most > 1


# ---- Renderer -----------------------------------------------------------------------------------
def test_a_neutral_scene_is_the_source_image(roads: metasim.RoadScenes):
    graphs = roads.sample(6, common.generator(0))
    graphs.picture[:, 2:], graphs.classes[:, 2:] = -1, 0
    images, labels = roads.render(graphs, neutral(roads, graphs))
    index = graphs.picture[:, 0].numpy()
    np.testing.assert_array_equal(common.to_uint8(images), roads.split.images[index])
    np.testing.assert_array_equal(labels, roads.split.labels[index])


def test_gradients_equal_central_differences_for_every_attribute(roads: metasim.RoadScenes):
    graphs = roads.sample(2, common.generator(4))
    graphs.picture[:, 2:] = torch.tensor([[0, 5], [9, 2]])
    graphs.classes[:, 2:] = 3 + roads.kinds[graphs.picture[:, 2:]]
    weight = torch.randn(2, 3, *roads.size, generator=common.generator(1), dtype=torch.float64)
    values = graphs.values.double().requires_grad_()

    def total(values: torch.Tensor) -> torch.Tensor:
        return (roads.render(graphs, values)[0] * weight).sum(dim=(1, 2, 3))  # [B]

    (gradient,) = torch.autograd.grad(total(values).sum(), values)
    assert (gradient[:, ~roads.grammar.mutable] == 0).all()
    eps = 1e-7
    for v, m in roads.grammar.mutable.nonzero():
        step = torch.zeros_like(values)
        step[:, v, m] = eps
        with torch.no_grad():
            difference = (total(values + step) - total(values - step)) / (2 * eps)
        assert (gradient[:, v, m].abs() > 1e-6).all(), (v, m)
        torch.testing.assert_close(gradient[:, v, m], difference, rtol=1e-4, atol=1e-5)


def bilinear(picture: np.ndarray, x: np.ndarray, y: np.ndarray, edge: str) -> np.ndarray:
    """[h,w,C] at places in pixels, whose centres are at halves; beyond it `edge` or zeros."""
    padded = np.pad(picture, ((1, 1), (1, 1), (0, 0)), mode=edge)
    (h, w, _), last = picture.shape, 1 - 1e-9
    x, y = np.clip(x + 0.5, 0, w + last), np.clip(y + 0.5, 0, h + last)
    left, top = x.astype(int), y.astype(int)
    u, t = (x - left)[..., None], (y - top)[..., None]
    upper = (1 - u) * padded[top, left] + u * padded[top, left + 1]
    return (1 - t) * upper + t * ((1 - u) * padded[top + 1, left] + u * padded[top + 1, left + 1])


def test_a_scene_equals_plain_compositing(
    roads: metasim.RoadScenes, monkeypatch: pytest.MonkeyPatch
):
    """Each object by itself, in pixels, the farthest first; cameras that see beyond the image."""
    monkeypatch.setattr(metasim, "photometry", lambda image, *_: image)
    graphs = roads.sample(12, common.generator(3))
    assets = torch.randint(len(roads.rgba), (12, 2), generator=common.generator(5))
    assets[9, 1], assets[10:] = -1, -1
    graphs.picture[:, 2:] = assets
    graphs.classes[:, 2:] = (3 + roads.kinds[assets]) * (assets >= 0)
    values = 2 * graphs.values.double()  # far from the prior's mean
    values[:, 2:, 1] = torch.linspace(-1, 1, 24).view(12, 2)  # distance, so that both orders occur
    values[::2, 2:, 1] *= -1
    images, labels = roads.render(graphs, values)
    v = {name: value.numpy() for name, value in roads.grammar.read(values).items()}
    (h, w), seen = roads.size, []
    y, x = (np.mgrid[:h, :w] + 0.5) - np.array([h, w])[:, None, None] / 2  # px from the middle
    for n in range(12):
        p = {name: value[n] for name, value in v.items()}
        angle, zoom, source = math.radians(p["roll"][0]), 2 ** -p["zoom"][0], graphs.picture[n, 0]
        sx = zoom * (math.cos(angle) * x - math.sin(angle) * y) + (1 + p["shift_x"][0]) * w / 2
        sy = zoom * (math.sin(angle) * x + math.cos(angle) * y) + (1 + p["shift_y"][0]) * h / 2
        picture = bilinear(roads.split.images[source] / 255, sx, sy, "edge")
        inside = (sx > 0) & (sx < w) & (sy > 0) & (sy < h)
        at = np.clip(sy.astype(int), 0, h - 1), np.clip(sx.astype(int), 0, w - 1)
        layers = [(np.where(inside, roads.split.labels[source][at], IGNORE), np.ones((h, w)))]
        objects, horizon = [], (1 + float(roads.horizon[source])) * h / 2
        for k, asset in enumerate(assets[n].tolist()):
            if asset < 0:
                continue
            rgba, c, box = (t[asset].double().numpy() for t in (roads.rgba, roads.kinds, roads.box))
            middle, below, width, height = box[0] * w / 2, box[1] * h / 2, box[2] * w, box[3] * h
            near = 2 ** -p["distance"][k]
            scale, foot = near * 2 ** p["size"][k], horizon + near * (below + height / 2)
            middle = w / 2 + middle * near + p["lateral"][k] * w / 2
            column, row = (sx - middle) / scale + width / 2, (sy - foot) / scale + height
            cut = bilinear(rgba.transpose(1, 2, 0) / 255, column, row, "constant")
            objects.append((foot, cut[..., :3] * 2 ** p["brightness"][k], cut[..., 3], c))
        for _, colour, alpha, c in sorted(objects, key=lambda item: item[0]):
            picture = colour + (1 - alpha[..., None]) * picture
            layers = [(label, share * (1 - alpha)) for label, share in layers]
            layers.append((np.full((h, w), c), alpha))
        np.testing.assert_allclose(images[n].permute(1, 2, 0), picture, atol=1e-6)
        kinds, shares = map(np.stack, zip(*layers, strict=True))
        clear = np.sort(shares, axis=0)[-1] > 0.5 + 1e-6
        expected = np.take_along_axis(kinds, shares.argmax(axis=0)[None], axis=0)[0]
        np.testing.assert_array_equal(labels[n].numpy()[clear], expected[clear])
        seen.append((len(objects), (expected == IGNORE).any()))
    assert {count for count, _ in seen} == {0, 1, 2} and any(beyond for _, beyond in seen)


def test_a_scene_does_not_depend_on_its_batch(roads: metasim.RoadScenes):
    graphs = roads.sample(5, common.generator(1))
    images, labels = roads.render(graphs, graphs.values)
    for n in range(5):
        single = metasim.Graphs(*(tensor[n : n + 1] for tensor in graphs))
        image, label = roads.render(single, single.values)
        torch.testing.assert_close(image[0], images[n], atol=1e-5, rtol=0)
        assert torch.equal(label[0], labels[n])


@pytest.mark.parametrize("grain", [-0.5, 0.0, 0.3, 1.0])
def test_noise_of_any_grain_has_its_deviation(grain: float):
    """The same image with it and without: apart by 2^-5; with grain neighbours are more alike."""
    image = torch.full((32, 3, 32, 64), 0.5)
    image[..., ::2] = 0.4
    v = dict.fromkeys(("haze", "airlight", "blur"), torch.zeros(32, 1))
    v |= dict(zip(metasim.TONE, metasim.tone(image).split(1, dim=1), strict=True))
    v["grain"] = torch.full((32, 1), grain)
    white = torch.randn(image.shape, generator=common.generator(0))
    rendered = []
    for deviation in (-5.0, -60.0):
        v["noise"] = torch.full((32, 1), deviation)
        rendered.append(metasim.photometry(image, torch.ones(32, 1, 32, 64), white, v))
    noise = ((rendered[0] - rendered[1]) * 2**5)[..., 2:-2, 2:-2]  # edges are replicated
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    alike = (noise[..., 1:] * noise[..., :-1]).mean().item()
    assert alike / grain > 0.05 if grain else abs(alike) < 0.02


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_retone_gives_a_nearly_grey_image_its_tone(layout: torch.memory_format):
    image = torch.rand(2, 3, 32, 64, generator=common.generator(0))
    image = common.upsample(0.95 * image.mean(dim=1, keepdim=True) + 0.05 * image, (256, 512))
    image = image.contiguous(memory_format=layout)
    exact = metasim.tone(image.double()).float()
    torch.testing.assert_close(metasim.tone(image), exact, atol=1e-5, rtol=0)
    target = torch.randn(2, 5, generator=common.generator(1)) / 4 - 2
    toned = metasim.retone(image, target)  # not clamped, so that means may be small
    torch.testing.assert_close(metasim.tone(toned), target, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("level", [0.0, 0.3, 1.0])
def test_images_of_a_single_colour_have_finite_features_and_gradients(level: float):
    image = torch.full((2, 3, 32, 64), level, requires_grad=True)
    net = common.Network("tiny", 10).eval()
    toned = metasim.retone(image, torch.tensor([[-1.5, 0, 0, -2.5, -4.5]]).expand(2, 5))
    for images in (image, toned):
        features = torch.cat(metasim.scene_features(net, images), dim=1)
        assert features.isfinite().all()
        (gradient,) = torch.autograd.grad(features.sum(), image, retain_graph=True)
        assert gradient.isfinite().all()


def test_haze_follows_koschmieder(roads: metasim.RoadScenes, monkeypatch: pytest.MonkeyPatch):
    """What is at the depth d keeps exp(-haze d) of its light and gets the rest from the air; at the
    horizon d is 1, at the lower edge of an image seen as it is nearly 1/7."""
    monkeypatch.setattr(metasim, "retone", lambda image, _: image)
    image, depth = torch.rand(1, 3, 4, 6), torch.rand(1, 1, 4, 6)
    v = dict.fromkeys((*metasim.TONE, "blur", "grain"), torch.zeros(1, 1))
    v |= {"haze": torch.tensor([[0.7]]), "airlight": torch.tensor([[-0.5]])}
    v["noise"] = torch.tensor([[-60.0]])
    hazy = metasim.photometry(image, depth, torch.zeros(1, 3, 4, 6), v)
    clear, scene = np.exp(-0.7 * depth.numpy()), image.numpy()
    np.testing.assert_allclose(hazy, scene * clear + (1 - clear) * 2**-0.5, atol=1e-6)
    seen = []
    monkeypatch.setattr(metasim, "photometry", lambda image, d, *_: seen.append(d) or image)
    graphs = roads.sample(4, common.generator(0))
    roads.render(graphs, neutral(roads, graphs))
    assert (seen[0][:, 0, 0] == 1).all()
    assert (seen[0][:, 0, -1] > 1 / 7).all() and (seen[0][:, 0, -1] < 1 / 6).all()


# ---- Distribution transformer -------------------------------------------------------------------
def test_empty_nodes_send_nothing_and_edges_carry_both_ways(roads: metasim.RoadScenes):
    torch.manual_seed(0)
    net = metasim.Transformer(roads.grammar, roads.num_classes, roads.num_fixed, 16)
    graphs = roads.sample(1, common.generator(0))
    graphs.classes[:] = torch.tensor([[1, 2, 3, 0]])
    values = graphs.values.clone().requires_grad_()
    out = net(graphs._replace(values=values))
    reach = []
    for v in range(4):
        (gradient,) = torch.autograd.grad(out[:, v].sum(), values, retain_graph=True)
        reach.append(gradient[0].abs().sum(dim=1) > 0)
    reach = torch.stack(reach)  # [to, from]
    assert reach[:3, :3].all()  # scene, camera and object hear of each other, through the scene
    assert not reach[:3, 3].any() and reach[3, :3].all()
    assert (out[:, ~roads.grammar.mutable] == 0).all()


# ---- Maximum mean discrepancy -------------------------------------------------------------------
def test_mmd_equals_a_double_loop():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64) + 0.5
    bandwidths = (0.5, 2.0)

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        d2 = sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True))
        return sum(math.exp(-d2 / (2 * s * s)) for s in bandwidths) / 2

    within = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within += sum(kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    between = sum(kernel(a, b) for a in x for b in y) / 35
    assert metasim.mmd2(x, y, bandwidths).item() == pytest.approx(within - 2 * between, abs=1e-12)


def test_mmd_is_zero_in_the_mean_for_equal_distributions():
    rng, draws = common.generator(0), []
    for _ in range(2000):
        x, y = torch.randn(6, 2, generator=rng), torch.randn(9, 2, generator=rng)
        draws.append(metasim.mmd2(x, y, (1.0,)))
    draws = torch.stack(draws)
    error = draws.std() / 2000**0.5
    assert draws.mean().abs() < 4 * error
    assert error < 0.005 < 0.05 < (2 / 3) / 6  # the diagonal alone would add more than that


# ---- REINFORCE ----------------------------------------------------------------------------------
def test_reinforce_is_unbiased_where_the_answer_is_known():
    """Reward -|a - 3|^2 of a ~ N(m, s^2 I): the gradient of its mean is -2 (m - 3)."""
    mean = torch.tensor([1.0, 4.0, 3.0], dtype=torch.float64, requires_grad=True)
    rng, sigma, gradients = common.generator(0), 0.3, []
    for _ in range(4000):
        samples = mean + sigma * torch.randn(4, 3, generator=rng, dtype=torch.float64)
        rewards = -(samples.detach() - 3).square().sum(dim=1) + 100  # far from zero
        loss = metasim.reinforce_loss(samples, mean, sigma, rewards)
        gradients.append(torch.autograd.grad(-loss, mean)[0])
    gradients = torch.stack(gradients)
    error = gradients.std(dim=0) / len(gradients) ** 0.5
    exact = -2 * (mean.detach() - 3)
    assert ((gradients.mean(dim=0) - exact).abs() < 4 * error).all()
    assert (error < 0.15).all()  # a baseline of 0 would leave it at 100 / sigma / 126


# ---- Digits -------------------------------------------------------------------------------------
def test_digits_turn_counter_clockwise_and_go_where_they_are_told(monkeypatch: pytest.MonkeyPatch):
    pictures, digits = metasim.typeset_digits(20, common.generator(0))
    assert pictures.shape == (20, 1, 28, 28) and set(digits.tolist()) <= set(range(10))
    images = []
    for target in ({"yaw": 0, "x": 32, "y": 32}, {"yaw": 90, "x": 16, "y": 48}):
        monkeypatch.setitem(metasim.TARGETS, "bigmnist", target)
        world = metasim.DigitScenes("bigmnist", pictures, digits, CPU)
        graphs = world.sample(20, common.generator(6), at_target=True)
        image, truth = world.render(graphs, graphs.values)
        assert (digits[graphs.picture[:, 1]] == truth).all()
        images.append(image)
    expected = images[0][:, :, 18:46, 18:46].rot90(1, dims=(2, 3))
    torch.testing.assert_close(images[1][:, :, 34:62, 2:30], expected, atol=1e-4, rtol=0)


def write_mnist(folder: Path) -> None:
    """Its four files, of 60 and 30 random pictures."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for part, count in (("train", 60), ("t10k", 30)):
        header = np.array([0x803, count, 28, 28], ">i4").tobytes()
        pictures = rng.integers(256, size=(count, 28, 28), dtype=np.uint8).tobytes()
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + pictures)
        header = np.array([0x801, count], ">i4").tobytes()
        labels = bytes(n % 10 for n in range(count))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + labels)


def test_mnist_is_used_where_it_lies_under_data(monkeypatch: pytest.MonkeyPatch):
    """Without repetition; a damaged copy is never quietly replaced by typeset digits."""
    monkeypatch.setattr(metasim, "DIGITS", 40)
    assert metasim.load_digits("mini", 0)[2] == "typeset"
    write_mnist(Path("data/MNIST/raw"))
    pictures, digits, kind = metasim.load_digits("data", 0)
    assert (pictures.shape, kind) == ((40, 1, 28, 28), "MNIST")
    assert 0 <= pictures.min() < 0.1 and 0.9 < pictures.max() <= 1
    assert len(pictures.unique(dim=0)) == 40 == len(digits)
    images = Path("data/MNIST/raw/train-images-idx3-ubyte")
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data/MNIST: expected"):
        metasim.load_digits("data", 0)
    with pytest.raises(UserError, match="nowhere"):
        metasim.load_digits("nowhere", 0)


def test_mmd_turns_the_digits_to_the_target(monkeypatch: pytest.MonkeyPatch):
    """A short run of the paper's experiment, at a target of 40 degrees."""
    monkeypatch.setitem(metasim.TARGETS, "rotation", {"yaw": 40.0})
    monkeypatch.setattr(metasim, "DIGITS", 600)
    args = metasim.DigitsArgs(device="cpu", steps=80, lr=3e-3, starts=2)
    metasim.run_digits(args)
    folder = Path("runs/digits/rotation-seed0")
    result = json.loads((folder / "result.json").read_text())
    assert result["learned_mean"]["yaw"] == pytest.approx(40, abs=10)
    assert result["pictures"] == "typeset"
    with Image.open(folder / "figures/digits.png") as picture:
        assert picture.size == (16 * 32, 3 * 32)
    (folder / "config.json").write_text("{}")  # of a method's run
    with pytest.raises(UserError, match="give another --out"):
        metasim.run_digits(args)


# ---- Runs ---------------------------------------------------------------------------------------
def test_a_run_writes_its_scenes_and_pictures(args: common.Args):
    result = metasim.run(made(args, "run", **REWARD))
    assert (result.steps, result.target_labels) == (6, 2)
    assert result.other_updates.endswith(", 12 of the task network")  # rounds x samples x steps
    for name in ("measured", "scenes"):
        assert Path(f"run/figures/{name}.png").stat().st_size > 10_000
    with Image.open("run/figures/training.gif") as animation:
        assert animation.n_frames == 5
    scenes = common.load_set(Path("run/set"), common.VKITTI2, (32, 64))
    assert len(scenes) == 12 and set(np.unique(scenes.labels)) <= {*range(10), IGNORE}
    lines = common.read_scalars(Path("run"))
    assert {"mmd_loss", "reconstruction_loss", "reward"} <= {key for line in lines for key in line}


@pytest.mark.parametrize(
    ("flag", "changes"),
    [
        ("--match-batch 1", {"match_batch": 1}),
        ("--reward-samples 1", {"reward_samples": 1}),
        ("--task-reward", {"task_reward": True, "attributes": "prior"}),
    ],
)
def test_bad_flags_cost_one_line_and_no_folder(args: common.Args, flag: str, changes: dict):
    with pytest.raises(UserError, match=rf"^{flag}.*$"):
        metasim.run(made(args, "run", **changes))
    assert not Path("run").exists()


@pytest.mark.usefixtures("no_figures")
def test_lengths_follow_steps_and_a_set_without_objects_renders(args: common.Args):
    metasim.run(made(args, "run", scenes=None, objects=0, attributes="prior"))
    assert len(common.load_set(Path("run/set"), common.VKITTI2, (32, 64))) == 5 * args.steps


@pytest.mark.usefixtures("no_figures")
def test_a_single_photo_is_refused(args: common.Args, monkeypatch: pytest.MonkeyPatch):
    load = common.load

    def single(args: common.Args, role: str) -> Split:
        split = load(args, role)
        if role != "target_unlabelled":
            return split
        return replace(split, names=split.names[:1], images=split.images[:1])

    monkeypatch.setattr(common, "load", single)
    with pytest.raises(UserError, match="found 1 photo, the MMD needs at least 2"):
        metasim.run(made(args, "run"))


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_cut_off_in_every_stage_ends_with_the_same_weights(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    stages = ("features", "reconstruct", "match", "reward", "train")
    args = made(args, "whole", **REWARD)
    whole_and_cut(monkeypatch, metasim.run, args, stages, at=2)
    whole, cut = weights("whole"), weights("cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    sheets = [f"figures/training/{step:06d}.png" for step in range(5)]
    for name in ("set/set.json", *sheets):
        assert Path("whole", name).read_bytes() == Path("cut", name).read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_two_processes_learn_the_attributes_of_one(args: common.Args):
    """With an untrained feature network, whose batch statistics are fixed."""
    metasim.run(replace(made(args, "one", objects=1, width=64), feature_steps=0))
    flags = f"--data {args.data} --steps 6 --batch-size 4 --size 32 64 --labelled 2 --device cpu"
    flags += " --scenes 12 --match-batch 4 --match-photos 4 --cut-outs 40 --feature-steps 0"
    flags += " --reconstruct-steps 4 --match-steps 4 --out two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "metasim.py"), *flags.split()]
    subprocess.run(command, check=True, env=environment(), timeout=120)
    one, two = (common.read_scalars(Path(out)) for out in ("one", "two"))
    for name in ("reconstruction_loss", "mmd_loss", "change"):
        expected, found = ([row[name] for row in rows if name in row] for rows in (one, two))
        assert expected and expected == pytest.approx(found, abs=1e-4)
    one, two = (np.load(f"{out}/set/images.npy").astype(int) for out in ("one", "two"))
    assert np.abs(one - two).max() <= 1
