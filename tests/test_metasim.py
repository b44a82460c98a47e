"""Scene grammar, renderer, MMD, REINFORCE: against finite differences, plain loops, exact cases."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, like, read_scalars, same_weights, weights, whole_and_cut

import common
import datasets
import metasim
from datasets import IGNORE, Split, UserError

CPU = torch.device("cpu")
FIRST = metasim.FIRST
SMALL = {"scenes": 12, "objects": 2, "cut_outs": 40, "match_batch": 4, "match_photos": 4}
SMALL |= {"match_steps": 4, "feature_steps": 3}
REWARD = {"task_reward": True, "reward_rounds": 3, "reward_samples": 2, "reward_steps": 2}


def made(args: common.Args, out: str, **changes) -> metasim.Args:
    return like(args, metasim.Args, **{**SMALL, "out": Path(out), **changes})


@pytest.fixture
def roads(args: common.Args) -> metasim.RoadScenes:
    args = common.resolve(made(args, "run"), "metasim")
    return metasim.RoadScenes(datasets.load(args, "source"), args, CPU)


def neutral(roads: metasim.RoadScenes, graphs: metasim.Graphs) -> torch.Tensor:
    """The attributes with which scene, camera and surfaces leave an image as it is. -> [B,V,M]."""
    grammar, values = roads.grammar, graphs.values.clone()
    kinds = [{**metasim.TONE, **metasim.WEATHER}, metasim.CAMERA]
    for v, kind in enumerate([*kinds, *[metasim.SURFACE] * len(metasim.SURFACES)]):
        for m, name in enumerate(kind):
            physical = -60 if name == "noise" else 0
            values[:, v, m] = (physical - grammar.mean[v, m]) / grammar.scale[v, m]
    tones = metasim.tone(common.to_tensor(roads.split.images[graphs.picture[:, 0].numpy()], CPU))
    values[:, 0, :6] = (tones - grammar.mean[0, :6]) / grammar.scale[0, :6]
    return values


def place(roads: metasim.RoadScenes, graphs: metasim.Graphs, assets: torch.Tensor) -> None:
    """These cut-outs [B,K] in the graphs, -1 for none."""
    graphs.picture[:, FIRST:] = assets
    graphs.classes[:, FIRST:] = (1 + FIRST + roads.kinds[assets]) * (assets >= 0)


# ---- Material -----------------------------------------------------------------------------------
def test_cut_outs_are_whole_objects_of_the_source(roads: metasim.RoadScenes):
    """Each one is in a source image, pixel by pixel, with its class and at its place, and no pixel
    that touches it has this class."""
    (height, width), split = roads.size, roads.split
    for rgba, c, box in zip(roads.rgba, roads.kinds, roads.box, strict=True):
        assert roads.names[c] in metasim.OBJECTS
        mask = rgba[3].numpy() > 0
        assert not rgba[:3, ~mask].any()  # premultiplied
        w, h = round(float(box[2] * width)), round(float(box[3] * height))
        left, matches = round(float((box[0] + 1) * width - w) / 2), 0
        assert mask.sum() == mask[:h, :w].sum() >= metasim.MIN_AREA * height * width
        for n, horizon in enumerate(metasim.horizons(split.labels, roads.names)):
            top = round(float((box[1] + horizon + 1) * height - h) / 2)
            if not 0 <= top < height - h:
                continue
            region = np.zeros((height, width), bool)
            region[top : top + h, left : left + w] = mask[:h, :w]
            same = (split.images[n][region] == rgba[:3, mask].T.numpy()).all()
            labels = split.labels[n] == int(c)
            steps = ((0, 1), (0, -1), (1, 1), (1, -1))
            around = np.any([np.roll(region, shift, axis) for axis, shift in steps], axis=0)
            around[0] &= top > 0  # rolled from the lower edge
            matches += same and labels[region].all() and not labels[around & ~region].any()
        assert matches


def test_the_horizon_is_where_a_quarter_of_the_columns_have_ground():
    labels = np.ones((2, 20, 8), np.uint8)
    labels[0, 8:, :2], labels[0, 12:], labels[1, 19] = 0, 0, 0
    horizon = metasim.horizons(labels, ("road", "sky"))
    torch.testing.assert_close(horizon, torch.tensor([2 * 8 / 20 - 1, 0.5]))  # 0.5: the limit


GTA5_SIZE = """
import resource, sys, time
import numpy as np
import common, datasets, metasim
metasim.MAX_READ = 100
shape = (24_966, 512, 1024)  # of sparse files
images = np.memmap("images", np.uint8, "w+", shape=(*shape, 3))
labels = np.memmap("labels", np.uint8, "w+", shape=shape)
order = np.random.default_rng(common.seed_of(0, "cut_out")).permutation(shape[0])
for n in order[:10]:
    labels[n, 300:360, 400:500], images[n, 300:360, 400:500] = 13, 200
split = datasets.Split(datasets.GTA5, tuple(map(str, range(shape[0]))), images, labels)
args = metasim.Args(size=shape[1:])
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
roads = metasim.RoadScenes(split, args, metasim.torch.device("cpu"))
graphs = roads.sample(4, common.generator(0))
roads.render(graphs, graphs.values)
assert len(roads.kinds) == 10 and (roads.kinds == 13).all()
mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
print(mib, time.process_time() - start)
"""


def test_the_start_at_the_size_of_gta5_reads_a_sample():
    """Sparse arrays of 24,966 images of 512x1024, 52 GB, of which it may see 100 label maps."""
    command = [sys.executable, "-c", GTA5_SIZE]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    mib, seconds = map(float, result.stdout.split())
    assert mib < 700 and seconds < 15  # of one core


# ---- Renderer -----------------------------------------------------------------------------------
def test_a_neutral_scene_is_the_source_image(roads: metasim.RoadScenes):
    graphs = roads.sample(6, common.generator(0))
    place(roads, graphs, torch.full((6, 2), -1))
    images, labels = roads.render(graphs, neutral(roads, graphs))
    index = graphs.picture[:, 0].numpy()
    np.testing.assert_array_equal(common.to_uint8(images), roads.split.images[index])
    np.testing.assert_array_equal(labels, roads.split.labels[index])


def test_gradients_equal_central_differences_for_every_attribute(roads: metasim.RoadScenes):
    graphs = roads.sample(2, common.generator(4))
    place(roads, graphs, torch.tensor([[0, 5], [9, 2]]))
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


def test_a_scene_equals_plain_compositing(roads, monkeypatch):
    """Each object by itself, in pixels, the farthest first; cameras that see beyond the image."""
    monkeypatch.setattr(metasim, "retone", lambda image, _: image)
    graphs = roads.sample(12, common.generator(3))
    assets = torch.randint(len(roads.rgba), (12, 2), generator=common.generator(5))
    assets[9, 1], assets[10:] = -1, -1
    place(roads, graphs, assets)
    values = 2 * graphs.values.double()  # far from the prior's mean
    values[:, 0] = neutral(roads, graphs)[:, 0]
    values[:, 2:FIRST] = 0  # surfaces as they are
    values[:, FIRST:, 1] = torch.linspace(-1, 1, 24).view(12, 2)  # distance: both orders occur
    values[::2, FIRST:, 1] *= -1
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
        objects, horizon = [], (1 + float(graphs.fixed[n, 0, 0])) * h / 2
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
        np.testing.assert_allclose(images[n].permute(1, 2, 0), picture.clip(0, 1), atol=1e-6)
        kinds, shares = map(np.stack, zip(*layers, strict=True))
        clear = np.sort(shares, axis=0)[-1] > 0.5 + 1e-6
        expected = np.take_along_axis(kinds, shares.argmax(axis=0)[None], axis=0)[0]
        np.testing.assert_array_equal(labels[n].numpy()[clear], expected[clear])
        seen.append((len(objects), (expected == IGNORE).any()))
    assert {count for count, _ in seen} == {0, 1, 2} and any(beyond for _, beyond in seen)


def test_a_surface_changes_its_own_pixels_and_no_label(roads, monkeypatch):
    """Brighter, warmer, greener by exact gains, and twice what the blur removes."""
    monkeypatch.setattr(metasim, "retone", lambda image, _: image)
    graphs = roads.sample(6, common.generator(7))
    place(roads, graphs, torch.full((6, 2), -1))
    values = neutral(roads, graphs)
    before, labels = roads.render(graphs, values)
    gains = 2 ** torch.tensor([0.2 + 0.4 / 2, 0.2 + 0.1, 0.2 - 0.4 / 2]).view(3, 1, 1)
    for s, surface in enumerate(metasim.SURFACES):
        ids = [c for c, name in enumerate(roads.names) if name in surface]
        own = torch.isin(labels, torch.tensor(ids))[:, None].expand_as(before)
        assert own.any() and not own.all()
        changed = values.clone()
        change = torch.tensor([0.2, 0.4, 0.1, 1.0])
        changed[:, 2 + s, :4] += change / roads.grammar.scale[2 + s, :4]
        after, same = roads.render(graphs, changed)
        expected = (gains * (2 * before - metasim.blur(before))).clamp(0, 1)
        torch.testing.assert_close(after, torch.where(own, expected, before))
        assert torch.equal(labels, same)


def test_retone_gives_a_nearly_grey_image_its_tone():
    image = torch.rand(2, 3, 64, 128, generator=common.generator(0))
    image = 0.95 * image.mean(dim=1, keepdim=True) + 0.05 * image
    target = torch.randn(2, 6, generator=common.generator(1)) / 4 - 2
    toned = metasim.retone(image, target)  # not clamped, so that means may be small
    torch.testing.assert_close(metasim.tone(toned), target, atol=1e-4, rtol=1e-4)


def test_haze_follows_koschmieder(roads: metasim.RoadScenes, monkeypatch: pytest.MonkeyPatch):
    """What is at the depth d keeps exp(-haze d) of its light and gets the rest from the air."""
    monkeypatch.setattr(metasim, "retone", lambda image, _: image)
    graphs = roads.sample(3, common.generator(2))
    place(roads, graphs, torch.full((3, 2), -1))
    values = neutral(roads, graphs)
    image, _ = roads.render(graphs, values)
    physical = torch.tensor([0.7, -0.5, 0.0, -5.0])  # haze, airlight, blur, noise
    values[:, 0, 6:10] = (physical - roads.grammar.mean[0, 6:10]) / roads.grammar.scale[0, 6:10]
    hazy, _ = roads.render(graphs, values)
    height, width = roads.size
    row = (torch.arange(height) + 0.5).view(1, 1, height, 1) / height * 2 - 1
    horizon = graphs.fixed[:, 0, 0].view(3, 1, 1, 1)
    depth = 1 / (1 + 6 * ((row - horizon) / (1 - horizon)).clamp(min=0))
    rngs = [torch.Generator().manual_seed(seed) for seed in graphs.seed.tolist()]
    white = torch.stack([torch.randn(1, height, width, generator=rng) for rng in rngs])
    clear = torch.exp(-0.7 * depth)
    expected = image * clear + (1 - clear) * 2**-0.5 + white / 32
    torch.testing.assert_close(hazy, expected.clamp(0, 1))


# ---- Distribution transformer -------------------------------------------------------------------
def test_empty_nodes_take_no_part_and_edges_carry_both_ways(roads: metasim.RoadScenes):
    torch.manual_seed(0)
    net, graphs = metasim.Transformer(roads, 16), roads.sample(1, common.generator(0))
    graphs.classes[:, FIRST:] = torch.tensor([[1 + FIRST, 0]])
    assert torch.equal(net(graphs), graphs.values)  # before training
    for weight in net.layers[-1].parameters():
        torch.nn.init.normal_(weight)
    values = graphs.values.clone().requires_grad_()
    out = net(graphs._replace(values=values))
    reach = []
    for v in range(FIRST + 2):
        (gradient,) = torch.autograd.grad((out - values)[:, v].sum(), values, retain_graph=True)
        reach.append(gradient[0].abs().sum(dim=1) > 0)
    reach = torch.stack(reach)  # [to, from]
    assert reach[:-1, :-1].all()  # all nodes hear of each other, through the scene
    assert not reach[-1].any() and not reach[:, -1].any()
    assert (out[:, ~roads.grammar.mutable] == 0).all()


def test_content_features_see_where_classes_are(monkeypatch: pytest.MonkeyPatch):
    """With a network whose classes are red, green and blue: exact shares and colours."""
    net, images = common.Network("tiny", 3).eval(), torch.zeros(1, 3, 64, 128)
    images[:, 0], images[:, 0, 32:, 64:], images[:, 1, 32:, 64:] = 0.5, 0, 0.25  # red, green
    logits = 1000 * torch.nn.functional.avg_pool2d(images, 4)
    monkeypatch.setattr(net.body.head, "forward", lambda _: logits)
    *_, layout, colours = metasim.scene_features(net, images)
    green = torch.zeros(8, 4)
    green[4:, 2:] = 1
    expected = torch.stack([1 - green, green, torch.zeros(8, 4)])
    torch.testing.assert_close(layout.view(3, 8, 4), expected)
    expected = torch.tensor([[0.5, 0, 0], [0, 0.25, 0], [0.375, 0.0625, 0]])  # blue: the mean
    torch.testing.assert_close(colours.view(3, 3), expected, atol=0.02, rtol=0)


# ---- Maximum mean discrepancy -------------------------------------------------------------------
def test_mmd_equals_a_double_loop():
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64) + 0.5

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        d2 = sum((float(p) - float(q)) ** 2 for p, q in zip(a, b, strict=True))
        return sum(math.exp(-d2 / (2 * s * s)) for s in metasim.BANDWIDTHS) / 4

    within = sum(kernel(x[i], x[j]) for i in range(5) for j in range(5) if i != j) / 20
    within += sum(kernel(y[i], y[j]) for i in range(7) for j in range(7) if i != j) / 42
    between = sum(kernel(a, b) for a in x for b in y) / 35
    assert metasim.mmd2(x, y).item() == pytest.approx(within - 2 * between, abs=1e-12)


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
    monkeypatch.setattr(metasim, "DIGITS", 20)
    pictures, digits, _ = metasim.load_digits("mini", 0)
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
    assert len(pictures.unique(dim=0)) == 40 == len(digits) and 0.9 < pictures.max() <= 1
    images = Path("data/MNIST/raw/train-images-idx3-ubyte")
    images.write_bytes(images.read_bytes()[:-1])
    for folder in ("data", "nowhere"):
        with pytest.raises(UserError, match=rf"{folder}/MNIST/raw: expected"):
            metasim.load_digits(folder, 0)


def test_mmd_turns_the_digits_to_the_target(monkeypatch: pytest.MonkeyPatch):
    """A short run of the paper's experiment, at a target of 40 degrees."""
    monkeypatch.setitem(metasim.TARGETS, "rotation", {"yaw": 40.0})
    monkeypatch.setattr(metasim, "DIGITS", 600)
    args = metasim.DigitsArgs(device="cpu", steps=80, lr=3e-3, starts=2)
    metasim.run_digits(args)
    folder = Path("runs/digits/rotation-seed0")
    result = json.loads((folder / "result.json").read_text())
    assert result["learned_mean"]["yaw"] == pytest.approx(40, abs=10)
    assert result["pictures"] == "typeset" and (folder / "figures/digits.png").stat().st_size > 1000


# ---- Runs ---------------------------------------------------------------------------------------
def test_a_run_writes_its_scenes_and_pictures(args: common.Args):
    result = metasim.run(made(args, "run", **REWARD))
    assert (result.steps, result.target_labels) == (6, 2)
    assert result.other_updates.endswith(", 12 of the task network")  # rounds x samples x steps
    for name in ("content", "scenes"):
        assert Path(f"run/figures/{name}.png").stat().st_size > 10_000
    scenes = datasets.load_set(Path("run/set"), datasets.VKITTI2, (32, 64))
    assert len(scenes) == len({*scenes.names}) == 12
    assert set(np.unique(scenes.labels)) <= {*range(10), IGNORE}
    names = set().union(*read_scalars(Path("run")))
    assert {"features_loss", "mmd_loss", "mmd_content", "change", "reward", "loss"} <= names


def test_what_cannot_run_costs_one_line_and_no_training(args: common.Args, monkeypatch):
    bad = {"match_batch": 1}, {"reward_samples": 1}, {"task_reward": True, "attributes": "prior"}
    for changes in (*bad, {"feature_steps": 3, "attributes": "prior"}):
        flag = "--" + next(iter(changes)).replace("_", "-")
        with pytest.raises(UserError, match=rf"^{flag}.*$"):
            metasim.run(made(args, "run", **changes))
    assert not Path("run").exists()
    changed_data(monkeypatch, "target_unlabelled", lambda images: images[:1])
    with pytest.raises(UserError, match="kitti: metasim needs two photos, found 1"):
        metasim.run(made(args, "run"))
    assert not list(Path("run").glob("stage_*"))


@pytest.mark.usefixtures("no_figures")
def test_every_update_trains_on_new_scenes(args: common.Args, monkeypatch: pytest.MonkeyPatch):
    """Of which none is in set/. Lengths follow --steps; there need not be any object or set."""
    render, seeds = metasim.render_graphs, []

    def recorded(roads, transformer, graphs, *shift):
        seeds.extend(graphs.seed.tolist())
        return render(roads, transformer, graphs, *shift)

    monkeypatch.setattr(metasim, "render_graphs", recorded)
    metasim.run(like(args, metasim.Args, attributes="prior", objects=0, out=Path("run")))
    assert len(datasets.load_set(Path("run/set"), datasets.VKITTI2, (32, 64))) == 5 * args.steps
    assert len(set(seeds)) == len(seeds) == args.steps * (args.batch_size + 5)


def changed_data(monkeypatch: pytest.MonkeyPatch, role: str, images: Callable) -> None:
    """`images` maps the images of a role [N,H,W,3] to other ones."""
    load = datasets.load

    def changed(args: common.Args, name: str) -> Split:
        split = load(args, name)
        pixels = images(np.array(split.images)) if name == role else split.images
        return replace(split, images=pixels, names=split.names[: len(pixels)])

    monkeypatch.setattr(datasets, "load", changed)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("role", ["source", "target_unlabelled"])
def test_a_white_image_does_no_harm(args: common.Args, monkeypatch: pytest.MonkeyPatch, role: str):
    changed_data(monkeypatch, role, lambda images: np.concatenate([images[:1] | 255, images[1:]]))
    metasim.run(made(args, "run", match_batch=16, match_photos=16))
    losses = [line["mmd_loss"] for line in read_scalars(Path("run")) if "mmd_loss" in line]
    assert losses and np.isfinite(losses).all()
    assert all(weight.isfinite().all() for weight in weights("run").values())


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_cut_off_in_every_stage_ends_with_the_same_weights(args, monkeypatch):
    stages = ("features", "match", "reward", "train")
    args = made(args, "whole", **REWARD)
    whole_and_cut(monkeypatch, metasim.run, args, stages, at=2)
    assert same_weights("whole", "cut")
    assert Path("whole/set/set.json").read_bytes() == Path("cut/set/set.json").read_bytes()


@pytest.mark.usefixtures("no_figures")
def test_two_processes_learn_the_attributes_of_one(args: common.Args):
    """With an untrained feature network, whose batch statistics are fixed."""
    metasim.run(made(args, "one", objects=1, feature_steps=0))
    flags = f"--data {args.data} --steps 6 --batch-size 4 --size 32 64 --labelled 2 --device cpu"
    flags += " --scenes 12 --match-batch 4 --match-photos 4 --cut-outs 40 --feature-steps 0"
    flags += " --match-steps 4 --out two"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "metasim.py"), *flags.split()]
    subprocess.run(command, check=True, env=environment(), timeout=120)
    first, second = (read_scalars(Path(out)) for out in ("one", "two"))
    for name in ("mmd_loss", "mmd_content", "change"):
        values = [[row[name] for row in rows if name in row] for rows in (first, second)]
        assert values[0] and values[0] == pytest.approx(values[1], abs=1e-4)
    first, second = (np.load(f"{out}/set/images.npy").astype(int) for out in ("one", "two"))
    assert np.abs(first - second).max() <= 1
