"""Scene grammar, renderer, MMD, REINFORCE: against finite differences, plain loops, exact cases."""

import json
import math
from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import like, whole_and_cut
from PIL import Image
from test_run import same, weights

import common
import metasim
from common import IGNORE, Part, UserError

CPU = torch.device("cpu")
SMALL = {
    "scenes": 12, "objects": 2, "assets": 40, "width": 16, "reconstruct_steps": 4,
    "match_steps": 4, "match_batch": 4, "match_photos": 4, "feature_steps": 3, "reward_start": 2,
    "reward_rounds": 3, "reward_samples": 2, "reward_steps": 2,
}  # fmt: skip


def made(args: common.Args, out: str, **changes) -> metasim.Args:
    return like(args, metasim.Args, **{**SMALL, "out": Path(out), **changes})


@pytest.fixture
def roads(args: common.Args) -> metasim.Roads:
    args = common.resolve(made(args, "run"), "metasim")
    return metasim.Roads(common.load(args, "source"), args, CPU)


def plain(roads: metasim.Roads, graphs: metasim.Graphs) -> torch.Tensor:
    """The attributes with which scene and camera leave an image as it is. -> [B,V,M]."""
    neutral = {"noise": -60}
    grammar, values = roads.grammar, graphs.values.clone()
    for v, node in enumerate(grammar.nodes[:2]):
        for m, name in enumerate(grammar.kinds[node].attributes):
            values[:, v, m] = (neutral.get(name, 0) - grammar.mean[v, m]) / grammar.scale[v, m]
    values[:, 0, : len(metasim.TONE)] = roads.tones[graphs.picture[:, 0]]
    return values


# ---- Material -----------------------------------------------------------------------------------
def flood(labels: np.ndarray) -> np.ndarray:
    """Connected regions, one pixel after the other, each numbered by its greatest place."""
    h, w = labels.shape
    ids = np.full((h, w), -1)
    for start in range(h * w - 1, -1, -1):
        if ids.flat[start] >= 0:
            continue
        ids.flat[start], queue = start, deque([divmod(start, w)])
        while queue:
            y, x = queue.popleft()
            for a, b in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                if 0 <= a < h and 0 <= b < w and ids[a, b] < 0 and labels[a, b] == labels[y, x]:
                    ids[a, b] = start
                    queue.append((a, b))
    return ids


@pytest.mark.parametrize("classes", [1, 2, 4])
def test_components_equal_a_flood_fill(classes: int):
    rng = np.random.default_rng(classes)
    labels = rng.integers(classes, size=(17, 23))
    np.testing.assert_array_equal(metasim.components(labels), flood(labels))
    snake = np.zeros((15, 16), int)  # one path through the whole picture
    snake[1::4, :-1] = snake[3::4, 1:] = 1
    np.testing.assert_array_equal(metasim.components(snake), flood(snake))


def test_cut_outs_are_whole_objects_of_the_source(roads: metasim.Roads):
    """Each is found again, pixel by pixel, in some source image, with its class and its place."""
    height, width = roads.size
    names = common.classes_of("vkitti2")
    for rgba, c, box in zip(*roads.cut_outs, strict=True):
        assert names[c] in metasim.OBJECTS
        mask = rgba[3].numpy() > 0
        assert not rgba[:3, ~mask].any()  # premultiplied
        w, h = round(float(box[2] * width)), round(float(box[3] * height))
        left = round(float((box[0] + 1) * width - w) / 2)
        assert mask[:h, :w].any(axis=0).all() and mask[:h, :w].any(axis=1).all()
        assert not mask[h:].any() and not mask[:, w:].any()
        found = False
        for n, horizon in enumerate(roads.horizon):
            top = round(float((box[1] + horizon + 1) * height - h) / 2)
            inside = np.s_[top : top + h, left : left + w]
            if 0 <= top <= height - h:
                images, masks = roads.part.images[n], roads.part.labels[n]
                colours, labels = np.array(images[inside]), np.array(masks[inside])
                same_colours = (colours == rgba[:3, :h, :w].permute(1, 2, 0).numpy()).all(axis=2)
                found |= ((labels == int(c)) & same_colours)[mask[:h, :w]].all()
        assert found


def test_images_without_enough_of_a_wanted_class_are_passed_over(
    roads: metasim.Roads, monkeypatch: pytest.MonkeyPatch
):
    """Of classes that hardly occur every image is looked at: it must cost next to nothing."""
    labels = np.array(roads.part.labels)
    cars = common.classes_of("vkitti2").index("car")
    labels[labels != cars] = IGNORE
    labels[::2, 2:] = IGNORE  # leaves at most a few pixels
    enough = (labels == cars).sum(axis=(1, 2)) >= 0.0015 * labels[0].size
    looked, components = [], metasim.components
    monkeypatch.setattr(metasim, "components", lambda m: looked.append(m) or components(m))
    part = Part("vkitti2", roads.part.names, roads.part.images, labels)
    metasim.cut_out(part, roads.horizon.numpy(), 10_000, seed=0)
    assert 0 < len(looked) == enough.sum() < len(labels)


# ---- Renderer -----------------------------------------------------------------------------------
def test_a_neutral_scene_is_the_source_image(roads: metasim.Roads):
    graphs = roads.sample(6, common.generator(0))
    graphs.picture[:, 2:] = -1
    images, labels = roads.render(graphs, plain(roads, graphs))
    index = graphs.picture[:, 0].numpy()
    np.testing.assert_allclose(metasim.to_bytes(images), roads.part.images[index], atol=0)
    np.testing.assert_array_equal(labels, roads.part.labels[index])


def test_gradients_equal_central_differences_for_every_attribute(roads: metasim.Roads):
    graphs = roads.sample(2, common.generator(4))
    graphs.picture[:, 2:] = torch.tensor([[0, 5], [9, 2]])
    graphs.classes[:, 2:] = 3 + roads.cut_outs.classes[graphs.picture[:, 2:]]
    weights = torch.randn(2, 3, *roads.size, generator=common.generator(1), dtype=torch.float64)
    values = graphs.values.double().requires_grad_()

    def total(values: torch.Tensor) -> torch.Tensor:
        return (roads.render(graphs, values)[0] * weights).sum(dim=(1, 2, 3))  # [B]

    (gradient,) = torch.autograd.grad(total(values).sum(), values)
    assert (gradient[:, ~roads.grammar.mutable] == 0).all()
    eps = 1e-7
    for v, m in roads.grammar.mutable.nonzero():
        step = torch.zeros_like(values)
        step[:, v, m] = eps
        with torch.no_grad():
            difference = (total(values + step) - total(values - step)) / (2 * eps)
        assert (gradient[:, v, m].abs() > 1e-6).all(), roads.grammar.nodes[v]
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


def test_a_scene_equals_plain_compositing(roads: metasim.Roads, monkeypatch: pytest.MonkeyPatch):
    """Each object by itself, in pixels, the farthest first; cameras that see beyond the image."""
    monkeypatch.setattr(metasim, "photometry", lambda image, *_: image)
    graphs = roads.sample(12, common.generator(3))
    assets = torch.randint(len(roads.cut_outs.rgba), (12, 2), generator=common.generator(5))
    graphs.picture[:10, 2:], graphs.picture[9, 3] = assets[:10], -1
    values = 2 * graphs.values.double()  # far from the prior's mean
    values[:, 2:, 1] = torch.linspace(-1, 1, 24).view(12, 2)  # distance, so that both orders occur
    values[::2, 2:, 1] *= -1
    images, labels = roads.render(graphs, values)
    v = {name: value.numpy() for name, value in roads.grammar.read(values).items()}
    (h, w), seen = roads.size, []
    y, x = (np.mgrid[:h, :w] + 0.5) - np.array([h, w])[:, None, None] / 2  # px from the middle
    for n in range(12):
        p = {name: value[n] for name, value in v.items()}
        angle, zoom, base = math.radians(p["roll"][0]), 2 ** -p["zoom"][0], graphs.picture[n, 0]
        sx = zoom * (math.cos(angle) * x - math.sin(angle) * y) + (1 + p["shift_x"][0]) * w / 2
        sy = zoom * (math.sin(angle) * x + math.cos(angle) * y) + (1 + p["shift_y"][0]) * h / 2
        picture = bilinear(roads.part.images[base] / 255, sx, sy, "edge")
        inside = (sx > 0) & (sx < w) & (sy > 0) & (sy < h)
        at = np.clip(sy.astype(int), 0, h - 1), np.clip(sx.astype(int), 0, w - 1)
        layers = [(np.where(inside, roads.part.labels[base][at], IGNORE), np.ones((h, w)))]
        objects, horizon = [], (1 + float(roads.horizon[base])) * h / 2
        for k in range(2):
            if (asset := graphs.picture[n, 2 + k]) < 0:
                continue
            rgba, c, box = (t[asset].double().numpy() for t in roads.cut_outs)
            middle, below, width, height = box[0] * w / 2, box[1] * h / 2, box[2] * w, box[3] * h
            near, flip = 2 ** -p["distance"][k], float(graphs.flip[n, 2 + k])
            scale, foot = near * 2 ** p["size"][k], horizon + near * (below + height / 2)
            middle = w / 2 + flip * middle * near + p["lateral"][k] * w / 2
            column, row = flip * (sx - middle) / scale + width / 2, (sy - foot) / scale + height
            cut = bilinear(rgba.transpose(1, 2, 0) / 255, column, row, "constant")
            objects.append((foot, cut[..., :3] * 2 ** p["brightness"][k], cut[..., 3], c))
        for _, colour, alpha, c in sorted(objects, key=lambda one: one[0]):
            picture = colour + (1 - alpha[..., None]) * picture
            layers = [(label, share * (1 - alpha)) for label, share in layers]
            layers.append((np.full((h, w), c), alpha))
        np.testing.assert_allclose(images[n].permute(1, 2, 0), picture, atol=1e-9)
        kinds, shares = map(np.stack, zip(*layers, strict=True))
        clear = np.sort(shares, axis=0)[-1] > 0.5 + 1e-9
        expected = np.take_along_axis(kinds, shares.argmax(axis=0)[None], axis=0)[0]
        np.testing.assert_array_equal(labels[n].numpy()[clear], expected[clear])
        seen.append((len(objects), (expected == IGNORE).any()))
    assert {2, 1} <= {count for count, _ in seen} and any(beyond for _, beyond in seen)


def test_labels_are_exactly_where_an_object_shows(
    roads: metasim.Roads, monkeypatch: pytest.MonkeyPatch
):
    """A red base, a green and a blue object: the label is that of the strongest channel."""
    images = np.zeros_like(roads.part.images)
    images[..., 0] = 255
    labels = np.zeros_like(roads.part.labels)
    roads.part = Part("vkitti2", roads.part.names, images, labels)
    objects = roads.cut_outs.classes.unique()
    graphs = roads.sample(40, common.generator(3))
    values = plain(roads, graphs)
    for v, node in enumerate(roads.grammar.nodes):
        if node in ("camera", "object"):
            values[:, v] = graphs.values[:, v]
    values[:, 2:, 3] = 0  # brightness
    one, two = ((roads.cut_outs.classes == c).nonzero()[:, 0] for c in objects[:2])
    graphs.picture[:, 2] = one[torch.arange(40) % len(one)]
    graphs.picture[:, 3] = two[torch.arange(40) % len(two)]
    roads.cut_outs.rgba[:, :3] = 0
    for some, channel in ((one, 1), (two, 2)):
        roads.cut_outs.rgba[some, channel] = roads.cut_outs.rgba[some, 3]
    monkeypatch.setattr(metasim, "photometry", lambda image, *_: image)
    images, labels = roads.render(graphs, values)
    torch.testing.assert_close(images.sum(dim=1), torch.ones_like(images[:, 0]))
    shown = images.argmax(dim=1)
    for channel, c in ((1, objects[0]), (2, objects[1])):
        assert (shown == channel).sum() > 100
        assert ((shown == channel) == (labels == c)).all()
    assert set(labels.unique().tolist()) <= {0, *objects[:2].tolist(), IGNORE}
    assert (labels == IGNORE).float().mean() < 0.1  # what the camera sees beyond the image's edge


def test_blend_is_the_painters_algorithm():
    layers, base = torch.rand(3, 2, 4, 5, 6), torch.rand(2, 3, 5, 6)
    expected = base
    for layer in reversed(layers):  # the farthest first
        expected = layer[:, :3] + (1 - layer[:, 3:]) * expected
    image, shares = metasim.blend(list(layers), base)
    torch.testing.assert_close(image, expected)
    torch.testing.assert_close(shares.sum(dim=1), torch.ones(2, 5, 6))


def test_a_nearer_object_grows_about_the_vanishing_point(roads: metasim.Roads):
    """One octave nearer: its box is twice as large, and twice as far below the horizon."""
    car = common.classes_of("vkitti2").index("car")
    cars = (roads.cut_outs.classes == car).nonzero()[:, 0]
    box = roads.cut_outs.box[cars]
    inside = (2 * (box[:, 1] + box[:, 3]) < 1) & (2 * (box[:, 0].abs() + box[:, 2]) < 1)
    fitting = cars[inside][0]
    graphs = roads.sample(2, common.generator(0))
    graphs.picture[:, 2:] = torch.tensor([fitting, -1])
    values = plain(roads, graphs)
    values[:, 2] = 0
    values[1, 2, 1] = -1 / roads.grammar.scale[2, 1]
    v = roads.grammar.read(values)
    theta = metasim.camera(v, (512, 512))
    layers, _ = roads.objects(graphs, v, torch.zeros(2, 1), theta, (512, 512))
    near = sum(layer[:, 3] for layer in layers) > 0.5
    assert near.flatten(1).any(dim=1).all(), (box[0], roads.cut_outs.box[fitting], near.sum((1, 2)))
    rows = [(one.any(dim=1).nonzero().float() + 0.5) / 256 - 1 for one in near]
    torch.testing.assert_close(2 * rows[0].max(), rows[1].max(), atol=0.02, rtol=0)
    torch.testing.assert_close(2 * rows[0].min(), rows[1].min(), atol=0.02, rtol=0)


def test_a_flip_mirrors_an_object_about_the_middle(roads: metasim.Roads):
    graphs = roads.sample(2, common.generator(0))
    graphs.picture[:, 2:] = torch.tensor([3, -1])
    graphs.flip[:, 2] = torch.tensor([1.0, -1.0])
    values = plain(roads, graphs)
    values[:, 2] = 0
    v = roads.grammar.read(values)
    theta = metasim.camera(v, roads.size)
    layers, _ = roads.objects(graphs, v, torch.zeros(2, 1), theta, roads.size)
    layer = sum(layers)
    assert layer[:, 3].sum() > 5
    torch.testing.assert_close(layer[1].flip(2), layer[0], atol=1e-4, rtol=0)


def test_blur_keeps_the_mean_and_has_its_deviation():
    image = torch.zeros(1, 1, 21, 21)
    image[..., 10, 10] = 1
    blurred = metasim.blurred(image, torch.ones(1, 1, 1, 1))[0, 0]
    assert blurred.sum() == pytest.approx(1, abs=1e-5)
    x = torch.arange(21.0) - 10
    assert (blurred.sum(dim=0) * x**2).sum().sqrt() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("grain", [-0.5, 0.0, 0.3, 1.0])
def test_noise_of_any_grain_has_its_deviation(roads: metasim.Roads, grain: float):
    """The same image with it and without: apart by 2^-5; with grain neighbours are more alike."""
    graphs, image = roads.sample(32, common.generator(0)), torch.full((32, 3, *roads.size), 0.5)
    image[..., ::2] = 0.4
    attributes = dict.fromkeys(("haze", "airlight", "blur"), torch.zeros(32, 1))
    attributes |= dict(zip(metasim.TONE, metasim.tone(image).split(1, dim=1), strict=True))
    attributes["grain"] = torch.full((32, 1), grain)
    rendered = []
    for deviation in (-5.0, -60.0):
        attributes["noise"] = torch.full((32, 1), deviation)
        depth = torch.ones(32, 1, *roads.size)
        rendered.append(metasim.photometry(image, depth, roads.noise(graphs), attributes))
    noise = (rendered[0] - rendered[1]) * 2**5
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    alike = (noise[..., 1:] * noise[..., :-1]).mean().item()
    assert alike / grain > 0.05 if grain else abs(alike) < 0.02


def test_a_scene_does_not_depend_on_those_beside_it(roads: metasim.Roads):
    graphs = roads.sample(5, common.generator(1))
    images, labels = roads.render(graphs, graphs.values)
    for n in range(5):
        one = metasim.Graphs(*(tensor[n : n + 1] for tensor in graphs))
        image, label = roads.render(one, one.values)
        torch.testing.assert_close(image[0], images[n], atol=1e-5, rtol=0)
        assert torch.equal(label[0], labels[n])


def test_noise_is_a_window_of_the_store_that_the_seed_chooses(roads: metasim.Roads):
    (h, w), graphs = roads.size, roads.sample(3, common.generator(1))
    corners = (0, 0), (5, 7), (h - 1, w - 1)
    graphs.seed[:] = torch.tensor([0, 5 * w + 7, 3 * h * w + h * w - 1])
    for noise, (y, x) in zip(roads.noise(graphs).unbind(dim=1), corners, strict=True):
        assert torch.equal(noise, roads.store[..., y : y + h, x : x + w])


def test_sampling_grid_equals_affine_grid():
    theta = torch.randn(3, 2, 3, generator=common.generator(0))
    expected = torch.nn.functional.affine_grid(theta, [3, 1, 5, 8], align_corners=False)
    torch.testing.assert_close(metasim.sampling_grid(theta, (5, 8)), expected)


def test_retone_gives_an_image_the_tone():
    images, wanted = torch.rand(4, 3, 9, 11), torch.randn(4, 5) / 4 - 2
    toned = metasim.retone(images, wanted)  # not clamped, so that means may be small
    torch.testing.assert_close(metasim.tone(toned), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_tone_is_exact_in_single_precision(layout: torch.memory_format):
    """Of a large image that is almost grey."""
    image = torch.rand(2, 3, 32, 64, generator=common.generator(0))
    image = common.upsample(0.95 * image.mean(dim=1, keepdim=True) + 0.05 * image, (256, 512))
    image = image.contiguous(memory_format=layout)
    torch.testing.assert_close(
        metasim.tone(image), metasim.tone(image.double()).float(), atol=1e-5, rtol=0
    )
    wanted = torch.tensor([[-1.5, 0, 0, -2.5, -4.5]]).expand(2, 5)
    toned = metasim.retone(image.double(), wanted.double()).float()
    torch.testing.assert_close(metasim.retone(image, wanted), toned, atol=1e-4, rtol=0)


def test_haze_follows_koschmieder(roads: metasim.Roads, monkeypatch: pytest.MonkeyPatch):
    """What is at the depth d keeps exp(-haze d) of its light and gets the rest from the air; at the
    horizon d is 1, at the lower edge of an image seen as it is nearly 1/7."""
    monkeypatch.setattr(metasim, "retone", lambda image, _: image)
    image, depth = torch.rand(1, 3, 4, 6), torch.rand(1, 1, 4, 6)
    v = dict.fromkeys((*metasim.TONE, "blur", "grain"), torch.zeros(1, 1))
    v |= {"haze": torch.tensor([[0.7]]), "airlight": torch.tensor([[-0.5]])}
    v["noise"] = torch.tensor([[-60.0]])
    hazy = metasim.photometry(image, depth, torch.zeros(2, 1, 3, 4, 6), v)
    clear, scene = np.exp(-0.7 * depth.numpy()), image.numpy()
    np.testing.assert_allclose(hazy, scene * clear + (1 - clear) * 2**-0.5, atol=1e-6)
    seen = []
    monkeypatch.setattr(metasim, "photometry", lambda image, d, *_: seen.append(d) or image)
    graphs = roads.sample(4, common.generator(0))
    roads.render(graphs, plain(roads, graphs))
    assert (seen[0][:, 0, 0] == 1).all()
    assert (seen[0][:, 0, -1] > 1 / 7).all() and (seen[0][:, 0, -1] < 1 / 6).all()


# ---- Distribution transformer -------------------------------------------------------------------
def test_empty_slots_send_nothing_and_edges_carry_both_ways(roads: metasim.Roads, args):
    torch.manual_seed(0)
    net = metasim.Transformer(roads.grammar, roads.classes, roads.fixed, made(args, "run"))
    graphs = roads.sample(1, common.generator(0))
    graphs.classes[:] = torch.tensor([[1, 2, 3, 0]])
    values = graphs.values.clone().requires_grad_()
    out, _ = net(graphs._replace(values=values))
    reach = torch.stack(
        [
            torch.autograd.grad(out[:, v].sum(), values, retain_graph=True)[0][0].abs().sum(dim=1)
            > 0
            for v in range(4)
        ]
    )  # [to, from]
    assert reach[:3, :3].all()  # scene, camera and object hear of each other, through the scene
    assert not reach[:3, 3].any() and reach[3, :3].all()
    assert (out[:, ~roads.grammar.mutable] == 0).all()


def test_stage_1_reconstructs_the_prior(roads: metasim.Roads, args: common.Args):
    longer = {"reconstruct_steps": 300, "reconstruct_lr": 1e-2, "match_batch": 16, "width": 64}
    settings = made(args, "run", **longer)
    torch.manual_seed(0)
    net = metasim.Transformer(roads.grammar, roads.classes, roads.fixed, settings)
    optimizer, errors = torch.optim.Adam(net.parameters()), []

    def log(step: int, squared_error: torch.Tensor, **_) -> None:
        errors.append(squared_error.item())

    metasim.reconstruct(iter(range(1, 301)), roads, net, optimizer, settings, log)
    assert np.mean(errors[-10:]) < 0.3 * errors[0], errors[::10]
    graphs = roads.sample(64, common.generator(1))
    assert (net(graphs)[1].argmax(dim=2) == graphs.classes).float().mean() > 0.9


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


def test_mmd_is_zero_in_the_mean_for_one_distribution():
    rng = common.generator(0)
    draws = torch.stack([
        metasim.mmd2(torch.randn(6, 2, generator=rng), torch.randn(9, 2, generator=rng), (1.0,))
        for _ in range(2000)
    ])  # fmt: skip
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
def test_digits_turn_counter_clockwise_and_go_where_they_are_told():
    pictures, digits = metasim.typeset_digits(20, seed=0)
    assert pictures.shape == (20, 1, 28, 28) and set(digits.tolist()) <= set(range(10))
    world = metasim.Digits("bigmnist", pictures, digits, CPU)
    upright, truth = metasim.at_target(world, {"yaw": 0, "x": 32, "y": 32}, 20, 0)
    turned, _ = metasim.at_target(world, {"yaw": 90, "x": 16, "y": 48}, 20, 0)
    expected = upright[:, :, 18:46, 18:46].rot90(1, dims=(2, 3))
    torch.testing.assert_close(turned[:, :, 34:62, 2:30], expected, atol=1e-4, rtol=0)
    graphs = world.sample(20, common.generator(0, 6))
    assert (digits[graphs.picture[:, 1]] == truth).all()


def test_angles_have_circular_means():
    mean, std = metasim.spread(torch.tensor([350.0, 10.0, -370.0, 370.0]), circular=True)
    assert mean % 360 == pytest.approx(0, abs=1e-3) or mean == pytest.approx(360, abs=1e-3)
    assert std == pytest.approx(10, rel=0.01)
    values = 268 + 5 * torch.randn(10_000, generator=common.generator(0))
    assert metasim.spread(values - 720, circular=True) == pytest.approx((268, 5), rel=0.02)
    for angle in range(0, 360, 7):  # rounding must not make the deviation of equal angles NaN
        _, std = metasim.spread(torch.full((1000,), float(angle)), circular=True)
        assert std < 0.1


def test_gradients_of_the_digits_equal_central_differences():
    pictures, digits = metasim.typeset_digits(6, seed=1)
    world = metasim.Digits("bigmnist", pictures.double(), digits, CPU)
    graphs = world.sample(3, common.generator(2))
    weights = torch.randn(3, 1, 64, 64, generator=common.generator(1), dtype=torch.float64)
    values = graphs.values.double().requires_grad_()

    def total(values: torch.Tensor) -> torch.Tensor:
        return (world.render(graphs, values)[0] * weights).sum(dim=(1, 2, 3))  # [B]

    (gradient,) = torch.autograd.grad(total(values).sum(), values)
    for m in range(3):
        step = torch.zeros_like(values)
        step[:, 1, m] = 1e-7
        difference = (total(values + step) - total(values - step)).detach() / 2e-7
        assert (difference.abs() > 1e-3).all()
        torch.testing.assert_close(gradient[:, 1, m], difference, rtol=1e-4, atol=1e-5)


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


def test_mnist_is_used_where_it_lies_under_data():
    """Without repetition; a damaged copy is never quietly replaced by typeset digits."""
    assert metasim.load_digits("mini", 40, 0)[2] == "typeset"
    write_mnist(Path("data/MNIST/raw"))
    pictures, digits, kind = metasim.load_digits("data", 40, 0)
    assert (pictures.shape, kind) == ((40, 1, 28, 28), "MNIST")
    assert 0 <= pictures.min() < 0.1 and 0.9 < pictures.max() <= 1
    assert len(pictures.unique(dim=0)) == 40 == len(digits)
    images = Path("data/MNIST/raw/train-images-idx3-ubyte")
    images.write_bytes(images.read_bytes()[:-1])
    for damaged in (True, False):
        with pytest.raises(UserError, match=r"data/MNIST: expected"):
            metasim.load_digits("data", 40, 0)
        if damaged:
            images.unlink()
    with pytest.raises(UserError, match="nowhere"):
        metasim.load_digits("nowhere", 40, 0)


QUICK = metasim.Args(
    experiment="mnist_rotation", out=Path("digits"), device="cpu", width=16, reconstruct_steps=4,
    match_batch=32, match_photos=64, digits=600, digit_match_steps=80, digit_match_lr=3e-3,
    digit_starts=2, digit_steps=5,
)  # fmt: skip


def test_mmd_turns_the_digits_to_the_target(monkeypatch: pytest.MonkeyPatch):
    """A short run of the paper's experiment, at a target of 40 degrees."""
    monkeypatch.setitem(metasim.TARGETS, "mnist_rotation", {"yaw": 40.0})
    metasim.run(QUICK)
    result = json.loads(Path("digits/result.json").read_text())
    assert result["learned_mean"]["yaw"] == pytest.approx(40, abs=10)
    assert result["pictures"] == "typeset" and not Path("digits/starts").exists()
    with Image.open("digits/datagen/training.gif") as animation:
        assert animation.n_frames == 9 and animation.width >= 500
    assert Path("digits/figures/attributes.png").stat().st_size > 10_000


def test_digits_keep_the_rules_of_run_folders(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """What was cut off goes on to the same result; what is finished is not repeated; another's
    folder is left alone; one of other arguments is moved aside."""
    tiny = replace(QUICK, digit_match_steps=4, digit_starts=3, digits=60)
    metasim.run(replace(tiny, out=Path("whole")))
    match, calls = metasim.match, []

    def cut(*args) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        match(*args)

    monkeypatch.setattr(metasim, "match", cut)
    with pytest.raises(KeyboardInterrupt):
        metasim.run(tiny)
    metasim.run(tiny)
    assert len(calls) == 4  # the first start was not repeated
    one, other = (json.loads(Path(f"{n}/result.json").read_text()) for n in ("whole", "digits"))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    files = [{p.relative_to(n): p.read_bytes() for p in Path(n).rglob("*.png")}
             for n in ("whole", "digits")]  # fmt: skip
    assert files[0] == files[1] and len(files[0]) == 6

    capsys.readouterr()
    metasim.run(tiny)
    assert len(calls) == 4 and "task accuracy" in capsys.readouterr().out
    metasim.run(replace(tiny, seed=1))
    assert json.loads(Path("digits/result.json").read_text())["seed"] == 1
    assert json.loads(Path("digits.old/result.json").read_text()) == other

    Path("mine").mkdir()
    Path("mine/result.json").write_text("precious")
    with pytest.raises(UserError, match="mine: not empty"):
        metasim.run(replace(tiny, out=Path("mine")))
    assert [p.name for p in Path("mine").iterdir()] == ["result.json"]


def test_digits_by_default_are_no_row_for_collect(monkeypatch: pytest.MonkeyPatch):
    folders, devices = [], []
    monkeypatch.setattr(metasim, "digits_folder", lambda out, *_: folders.append(out))
    monkeypatch.setattr(common, "check_device", lambda device: None)
    monkeypatch.setattr(metasim, "Digits", lambda *args: devices.append(args[-1]))
    with pytest.raises(AttributeError):  # of what stands for the digits
        metasim.run(replace(QUICK, out=None, device="cuda:1"))
    assert not folders[0].name.startswith("seed")
    assert devices[0] == torch.device("cuda:1")  # not the CPU


# ---- Runs ---------------------------------------------------------------------------------------
def test_a_run_writes_its_scenes_and_pictures(args: common.Args):
    result = metasim.run(made(args, "run", task_reward=True))
    assert (result.steps, result.target_labels) == (6, 2)
    used = 2 + 3 * 2 * 2  # reward_start, and rounds, samples and steps of the rewards
    assert result.beside.endswith(f", {used} of the task network")
    for name in ("attributes", "measured", "scenes"):
        assert Path(f"run/figures/{name}.png").stat().st_size > 10_000
    assert Path("run/datagen/training.gif").exists()
    scenes = common.load_set(Path("run/set"), "vkitti2", (32, 64))
    assert len(scenes) == 12 and set(np.unique(scenes.labels)) <= {*range(10), IGNORE}
    lines = common.read_scalars(Path("run"))
    assert {"mmd_loss", "reconstruction_loss", "reward"} <= {key for line in lines for key in line}


BAD = [
    ("--scenes 0", {"scenes": 0}),
    ("--objects -1", {"objects": -1}),
    ("--assets 0", {"assets": 0}),
    ("--layers 0", {"layers": 0}),
    ("--match-batch 1", {"match_batch": 1}),
    ("--match-photos 0", {"match_photos": 0}),
    ("--match-steps -1", {"match_steps": -1}),
    ("--match-lr nan", {"match_lr": math.nan}),
    ("--reward-samples 1", {"reward_samples": 1}),
    ("--reward-sigma 0", {"reward_sigma": 0.0}),
    ("--bandwidths", {"bandwidths": ()}),
    ("--bandwidths", {"bandwidths": (1.0, 0.0)}),
    ("--prior-weight -1", {"prior_weight": -1.0}),
    ("--task-reward", {"task_reward": True, "attributes": "prior"}),
    ("--digit-steps", {"digit_steps": 9}),  # without --experiment
    ("--digit-starts 0", {"experiment": "bigmnist", "digit_starts": 0}),
    ("--digits 4", {"experiment": "bigmnist", "digits": 4}),
    ("--seed -1", {"experiment": "bigmnist", "seed": -1}),
    ("--size", {"experiment": "bigmnist", "size": (32, 64)}),
    ("--steps", {"experiment": "mnist_rotation", "steps": 5}),
    ("--task-reward", {"experiment": "mnist_rotation", "task_reward": True}),
    ("--match-steps", {"experiment": "mnist_rotation", "match_steps": 5}),
]


@pytest.mark.parametrize(("flag", "changes"), BAD)
def test_flags_that_mean_nothing_cost_one_line_and_no_folder(args, flag: str, changes: dict):
    Path("run").mkdir()
    Path("run/config.json").write_text('{"method": "metasim"}')  # of an older run
    kept = {"data": args.data, "device": "cpu", "out": Path("run")}
    with pytest.raises(UserError) as error:
        metasim.run(metasim.Args(**{**kept, **changes}))
    assert str(error.value).startswith(flag) and "\n" not in str(error.value)
    assert [p.as_posix() for p in Path().rglob("*.*")] == ["run/config.json"]


def test_empty_slots_and_no_objects_at_all_in_the_figures(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    drawn, histograms = {}, metasim.histograms

    def keep(path: Path, sets: dict, *rest) -> None:
        drawn[path.stem] = sets
        histograms(path, sets, *rest)

    monkeypatch.setattr(metasim, "histograms", keep)
    metasim.run(made(args, "one", objects=1))
    values = drawn["attributes"]["learned"]["distance"]
    assert 0.3 < values.isnan().float().mean() < 0.7  # of none or one object, at random
    assert drawn["attributes"]["learned"]["haze"].isfinite().all()
    metasim.run(made(args, "none", objects=0))
    assert drawn["attributes"]["learned"]["distance"].numel() == 0


@pytest.mark.usefixtures("no_figures")
def test_the_source_as_it_is_is_the_source_only_baseline(args: common.Args):
    import benchmark

    metasim.run(made(args, "one", attributes="source"))
    benchmark.run_baseline(like(args, benchmark.BaselineArgs, out=Path("two")))
    assert same(weights(Path("one")), weights(Path("two")))


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_cut_off_in_every_stage_ends_with_the_same_weights(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    stages = ("features", "reconstruct", "match", "reward_start", "reward", "train")
    args = made(args, "whole", task_reward=True)
    whole_and_cut(monkeypatch, metasim.run, args, stages, at=2)
    assert same(weights(Path("whole")), weights(Path("cut")))
    names = ["set/set.json", *(f"datagen/scenes_{step:06d}.png" for step in range(5))]
    for name in names:
        assert Path("whole", name).read_bytes() == Path("cut", name).read_bytes()
