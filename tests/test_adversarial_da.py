"""Alignment, translation and self-training: each against a reference that is written otherwise."""

import math
import shutil
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import begun, like, read_scalars, same_weights, whole_and_cut
from PIL import Image

import adversarial_da as da
import common
import datasets
from datasets import IGNORE, UserError

ALL_STAGES = {"align": "entropy", "translate": "fda"}


def make(args: common.Args, out: str, **changes) -> da.Args:
    return like(args, da.Args, **{"out": Path(out), **changes})


# ---- Image translation --------------------------------------------------------------------------
def exchanged(source: np.ndarray, target: np.ndarray, beta: float) -> np.ndarray:
    """FDA with NumPy's full spectrum, one frequency at a time. [H,W] each."""
    h, w = source.shape
    spectrum, style = np.fft.fft2(source), np.fft.fft2(target)
    for y, x in product(range(h), range(w)):
        if max(min(y, h - y) / h, min(x, w - x) / w) < beta:
            spectrum[y, x] = abs(style[y, x]) * np.exp(1j * np.angle(spectrum[y, x]))
    image = np.fft.ifft2(spectrum)
    assert abs(image.imag).max() < 1e-12  # a band that is not symmetric would fail here
    return image.real


@pytest.mark.parametrize("size", [(8, 16), (7, 15), (9, 16)])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.13, 0.5, 1.0])
def test_fourier_transfer_equals_numpy(size: tuple[int, int], beta: float):
    source, target = torch.rand(2, 2, 3, *size, dtype=torch.float64)
    result = common.fourier_transfer(source, target, beta)
    for b, c in product(range(2), range(3)):
        expected = exchanged(source[b, c].numpy(), target[b, c].numpy(), beta)
        np.testing.assert_allclose(result[b, c], expected, atol=1e-6)


def test_color_transfer_gives_the_moments_of_the_target():
    mix = torch.tensor([[1.0, 0.5, 0.2], [0.0, 0.7, 0.3], [0.1, 0.0, 0.4]])
    source = torch.rand(2, 3, 9, 11)
    target = (mix @ torch.rand(2, 3, 9 * 11)).view(2, 3, 9, 11) * 0.3 + 0.1
    result = common.color_transfer(source, target).flatten(2)
    for image, style in zip(result, target.flatten(2), strict=True):
        torch.testing.assert_close(image.mean(dim=1), style.mean(dim=1), atol=1e-4, rtol=0)
        torch.testing.assert_close(image.cov(), style.cov(), atol=3e-4, rtol=0.01)
    torch.testing.assert_close(common.color_transfer(source, source), source, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dark", [1.0, 1e-3])
def test_color_transfer_is_the_map_that_moves_colours_least(dark: float):
    """Against eigenvectors in float64, also for channels that are nearly flat."""
    scale = torch.tensor([1.0, dark, 0.3])[:, None, None]
    source, target = torch.rand(3, 16, 20) * scale, torch.rand(3, 16, 20) * scale.flip(0) ** 2
    x, y = (z.flatten(1).double().numpy() for z in (source, target))

    def power(matrix: np.ndarray, exponent: float) -> np.ndarray:
        values, vectors = np.linalg.eigh(matrix)
        return vectors * values**exponent @ vectors.T

    s, t = (np.cov(z, bias=True) + 1e-5 * np.eye(3) for z in (x, y))
    root, inverse = power(s, 0.5), power(s, -0.5)
    matrix = inverse @ power(root @ t @ root, 0.5) @ inverse
    expected = matrix @ (x - x.mean(axis=1, keepdims=True)) + y.mean(axis=1, keepdims=True)
    result = common.color_transfer(source[None], target[None])[0].flatten(1)
    np.testing.assert_allclose(result, expected, atol=1e-5)


# ---- Alignment ----------------------------------------------------------------------------------
def test_self_information_by_hand():
    """p = (1/2, 1/4, 1/4): -p log p is (1/2, 1/2, 1/2) bit, 1.5 bit in all, of log2 3 at most."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().view(1, 3, 1, 1) + 7
    maps = da.self_information(logits).flatten() * math.log2(3)
    torch.testing.assert_close(maps, torch.tensor([0.5, 0.5, 0.5]))
    uniform, certain = torch.zeros(1, 5, 1, 1), torch.tensor([200.0, 0, 0]).view(1, 3, 1, 1)
    assert da.self_information(uniform).sum().item() == pytest.approx(1)
    assert (da.self_information(certain) == 0).all()  # and not NaN


@pytest.mark.parametrize("align", ["output", "entropy"])
def test_losses_are_those_of_the_paper_and_reach_only_their_network(align: str):
    """-log D(target) and -(log D(source) + log(1 - D(target))) / 2, D the sigmoid of a score."""
    discriminator = da.Discriminator(4, 4).requires_grad_(False)
    source, target = torch.randn(2, 2, 4, 32, 64, requires_grad=True)
    d_source, d_target = (
        discriminator(da.discriminator_input(x, align)).sigmoid() for x in (source, target)
    )

    loss = da.adversarial_loss(discriminator, target, align)
    torch.testing.assert_close(loss, -d_target.log().mean())
    assert torch.autograd.grad(loss, target)[0].abs().sum() > 0

    discriminator.requires_grad_(True)
    loss, _ = da.discriminator_loss(discriminator, source, target, align)
    expected = -(d_source.log().mean() + (1 - d_target).log().mean()) / 2
    torch.testing.assert_close(loss, expected)
    gradients = torch.autograd.grad(loss, [source, target], retain_graph=True, allow_unused=True)
    assert gradients == (None, None)
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in discriminator.parameters())


def test_accuracy_of_the_discriminator():
    """1 where it wins, 0 where it takes each domain for the other, 1/2 if all is source to it."""
    source, target = torch.zeros(2, 2, 32, 32), torch.zeros(2, 2, 32, 32)
    source[:, 0], target[:, 1] = 50, 50
    for first, second, expected in ((9, -9, 1.0), (-9, 9, 0.0), (9, 9, 0.5)):
        discriminator = torch.nn.Conv2d(2, 1, 1, bias=False)
        discriminator.weight.data = torch.tensor([first, second]).float().view(1, 2, 1, 1)
        _, accuracy = da.discriminator_loss(discriminator, source, target, "output")
        assert accuracy == expected


def test_adapted_statistics_are_those_of_the_photos(args: common.Args):
    args = common.resolve(make(args, "run"), "x")
    net, photos = common.Network("tiny", 10), datasets.load(args, "target_unlabelled")
    da.adapt_statistics(net, photos, len(photos), torch.device("cpu"))
    x = common.to_tensor(photos.images, torch.device("cpu"))
    convolution, norm = net.body.stem[0], net.body.stem[1]
    expected = convolution((x - net.mean) / net.std).mean(dim=(0, 2, 3))
    torch.testing.assert_close(norm.running_mean, expected)
    assert norm.momentum == 0.1


# ---- Self-training ------------------------------------------------------------------------------
def test_class_mix_pastes_whole_classes_and_half_of_them():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.choice([0, 2, 3, 6, 8, IGNORE], (6, 12, 14)))
    labels[1], labels[2] = 4, IGNORE
    mask = da.class_mix_mask(labels, 9, common.generator("test"))
    draws = set()
    for label_map, pixels in zip(labels, mask, strict=True):
        classes = [c for c in label_map.unique().tolist() if c != IGNORE]
        pasted = [c for c in classes if pixels[label_map == c].any()]
        assert all(pixels[label_map == c].all() for c in pasted)
        assert IGNORE not in label_map[pixels] and len(pasted) == (len(classes) + 1) // 2
        draws |= {tuple(pasted)}
    assert len(draws) > 3


def test_pseudo_labels_and_the_share_of_confident_pixels():
    """All pseudo-labels are kept; an image's share is that of its pixels above the threshold."""
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.45, 0.55]]).T.view(1, 2, 1, 3)
    labels, shares = da.pseudo_labels(lambda images: p.log(), torch.zeros(1, 3, 1, 3), 0.6)
    assert labels.tolist() == [[[0, 1, 1]]] and shares.tolist() == pytest.approx([2 / 3])


def test_loss_of_mixed_images_pixel_by_pixel():
    logits = torch.randn(2, 3, 2, 2)
    labels = torch.tensor([[[0, 1], [2, IGNORE]], [[1, 1], [0, 2]]])
    pasted = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    shares, expected = torch.tensor([0.25, 0.5]), 0.0
    for b, y, x in product(range(2), range(2), range(2)):
        label = int(labels[b, y, x])
        if label != IGNORE:
            weight = 1.0 if pasted[b, y, x] else float(shares[b])
            expected -= weight * float(logits[b, :, y, x].log_softmax(dim=0)[label]) / 8
    assert da.mixed_loss(logits, labels, pasted, shares).item() == pytest.approx(expected)


# ---- Runs ---------------------------------------------------------------------------------------
def test_all_stages_together(args: common.Args):
    """As many updates as were given, scalars of the discriminator, and the figures."""
    result = da.run(make(args, "run", steps=12, statistics="target", **ALL_STAGES))
    assert (result.steps, result.target_labels) == (12, 0)
    assert result.other_updates == "6 discriminator updates"
    assert any("discriminator_accuracy" in line for line in read_scalars(Path("run")))
    assert Path("run/figures/adaptation.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_figures")
def test_with_every_switch_off_it_trains_on_the_source_alone(args: common.Args):
    da.run(make(args, "off", translate="none", self_train=False))
    run = begun(make(args, "plain"), "plain", stages=1)
    net = run.network()
    common.train(run, net, datasets.load(run.args, "source"), 6, "source")
    run.finish(net, target_labels=0)
    assert same_weights("off", "plain")


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("at", [3, 9])
def test_a_run_that_is_cut_off_ends_with_the_same_weights(args, monkeypatch, at):
    settings = make(args, "whole", steps=12, **ALL_STAGES)
    whole_and_cut(monkeypatch, da.run, settings, ("source",), at=at)
    assert same_weights("whole", "cut")


@pytest.mark.usefixtures("no_figures")
def test_the_weight_of_the_discriminator_reaches_the_network(args: common.Args):
    """Its control, --lambda-adv 0, differs by the statistics of the photos alone."""
    control = make(args, "control", align="output", lambda_adv=0.0, self_train=False)
    da.run(control)
    da.run(make(args, "on", align="output", lambda_adv=1.0, self_train=False))
    assert not same_weights("control", "on")


@pytest.mark.usefixtures("no_figures")
def test_minimal_entropy_needs_no_discriminator(args: common.Args, monkeypatch: pytest.MonkeyPatch):
    """MinEnt trains the network, logs the entropy, and never runs the discriminator."""
    monkeypatch.setattr(da.Discriminator, "forward", lambda *_: pytest.fail("it ran"))
    da.run(make(args, "off", self_train=False))
    da.run(make(args, "on", self_train=False, lambda_ent=1.0))
    assert not same_weights("off", "on")
    lines = read_scalars(Path("on"))
    assert any("entropy" in line for line in lines)
    assert not any("adversarial_loss" in line for line in lines)


@pytest.mark.usefixtures("no_figures")
def test_no_label_of_a_photo_is_used(args: common.Args, mini: Path):
    shutil.copytree(mini, "data2")
    for path in Path("data2").glob("kitti/training/semantic/*"):
        labels = np.asarray(Image.open(path))
        Image.fromarray(np.where(labels == 7, 23, 7).astype(np.uint8)).save(path)
    da.run(make(args, "one", **ALL_STAGES))
    da.run(make(args, "two", data="data2", **ALL_STAGES))
    assert same_weights("one", "two")


@pytest.mark.usefixtures("no_figures")
def test_init_replaces_the_first_updates(args: common.Args):
    da.run(make(args, "one"))
    assert da.run(make(args, "two", init=Path("one/checkpoint.pt"))).steps == 3
    assert da.run(make(args, "on", init=Path("one/checkpoint.pt"), self_train=False)).steps == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lambda_adv": 0.1}, "--lambda-adv: has no effect without --align"),
        ({"beta": 0.1}, "--beta: has no effect without --translate fda"),
        (
            {"self_train": False, "source_share": 0.2},
            "--source-share: has no effect without --align, --self-train or --lambda-ent",
        ),
        ({"confidence_threshold": 1.1}, "--confidence-threshold: expected"),
        ({"align": "output", "lambda_adv": -0.1}, "--lambda-adv: expected a number from 0"),
        ({"lambda_ent": -0.1, "self_train": False}, "--lambda-ent: expected a number from 0"),
        ({"translate": "fda", "beta": -0.1}, "--beta: expected a number from 0"),
        ({"align": "output", "discriminator_width": 0}, "--discriminator-width 0: expected 1"),
        ({"source_share": 1.0}, "--source-share 1: leaves no step for adaptation"),
        ({"source_share": 0.95}, "--source-share 0.95: leaves no step for adaptation"),  # of 6
    ],
)
def test_flags_that_cannot_be_meant(args: common.Args, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        da.run(make(args, "run", **changes))
    assert not Path("run").exists()
