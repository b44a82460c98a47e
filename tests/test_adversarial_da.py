"""Alignment, translation and self-training: each against a reference that is written otherwise."""

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import like, whole_and_cut
from test_methods import scramble
from test_run import same, weights

import adversarial_da as da
import common
from common import IGNORE, UserError


def made(args: common.Args, out: str, **changes) -> da.Args:
    return like(args, da.Args, **{"out": Path(out), **changes})


BANDS = {"translate": "fda", "bands": (0.01, 0.05), "self_train": True}


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


@pytest.mark.parametrize("size", [(8, 16), (7, 15), (9, 16), (8, 13), (33, 21)])
@pytest.mark.parametrize("beta", [0.0, 0.01, 0.13, 0.3, 0.5, 1.0])
def test_fourier_transfer_equals_numpy(size: tuple[int, int], beta: float):
    source, target = torch.rand(2, 2, 3, *size, dtype=torch.float64)
    result = common.fourier_transfer(source, target, beta)
    assert result.shape == source.shape
    for b, c in product(range(2), range(3)):
        expected = exchanged(source[b, c].numpy(), target[b, c].numpy(), beta)
        np.testing.assert_allclose(result[b, c], expected, atol=1e-12)


@pytest.mark.parametrize("size", [(32, 64), (31, 65)])
def test_no_band_is_the_image_and_the_full_band_the_other_amplitude(size: tuple[int, int]):
    source, target = torch.rand(2, 2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(common.fourier_transfer(source, target, 0.0), source)
    spectrum = torch.fft.fft2(common.fourier_transfer(source, target, 1.0))
    torch.testing.assert_close(spectrum.abs(), torch.fft.fft2(target).abs())
    turned = spectrum * torch.fft.fft2(source).conj()  # of phase 0 where the phase is the source's
    torch.testing.assert_close(turned, turned.abs().to(turned.dtype))
    mean = common.fourier_transfer(source, target, 1e-6).mean(dim=(2, 3))  # the band of frequency 0
    torch.testing.assert_close(mean, target.mean(dim=(2, 3)))


def test_color_transfer_gives_the_moments_of_the_target():
    mix = torch.tensor([[1.0, 0.5, 0.2], [0.0, 0.7, 0.3], [0.1, 0.0, 0.4]])
    source = torch.rand(2, 3, 9, 11)
    target = (mix @ torch.rand(2, 3, 9 * 11)).view(2, 3, 9, 11) * 0.3 + 0.1
    result = common.color_transfer(source, target).flatten(2)
    for one, other in zip(result, target.flatten(2), strict=True):
        torch.testing.assert_close(one.mean(dim=1), other.mean(dim=1), atol=1e-4, rtol=0)
        torch.testing.assert_close(one.cov(), other.cov(), atol=3e-4, rtol=0.01)
    torch.testing.assert_close(common.color_transfer(source, source), source, atol=1e-4, rtol=0)
    flat = torch.full((1, 3, 4, 4), 0.5)
    assert common.color_transfer(flat, flat).isfinite().all()


# ---- Alignment ----------------------------------------------------------------------------------
def test_self_information_by_hand():
    """p = (1/2, 1/4, 1/4): -p log p is (1/2, 1/2, 1/2) bit, 1.5 bit in all, of log2 3 at most."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().view(1, 3, 1, 1) + 7
    maps = da.self_information(logits).flatten() * math.log2(3)
    torch.testing.assert_close(maps, torch.tensor([0.5, 0.5, 0.5]))
    even, sure = torch.zeros(1, 5, 2, 2), torch.tensor([200.0, 0, 0]).view(1, 3, 1, 1)
    torch.testing.assert_close(da.self_information(even).sum(dim=1), torch.ones(1, 2, 2))
    assert (da.self_information(sure) == 0).all()  # and not NaN


@pytest.mark.parametrize("align", ["output", "entropy"])
@pytest.mark.parametrize("gan", ["vanilla", "least_squares"])
def test_gradients_go_where_they_should(args: common.Args, align: str, gan: str):
    args = made(args, "run", align=align, gan=gan)
    head, critics = torch.nn.Conv2d(3, 4, 1), torch.nn.ModuleList([da.Critic(4, 4)])
    outputs = [head(torch.rand(2, 3, 32, 64))]
    da.fooling_loss(critics, outputs, args).backward()
    assert head.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in critics.parameters())
    head.zero_grad()
    outputs = [head(torch.rand(2, 3, 32, 64))]
    da.critic_losses(critics, outputs, outputs, args)[0].backward()
    assert head.weight.grad is None
    assert all(p.grad.abs().sum() > 0 for p in critics.parameters())


@pytest.mark.parametrize("gan", ["vanilla", "least_squares"])
def test_fooling_moves_the_verdict_towards_source(args: common.Args, gan: str):
    """A step along its gradient makes the photos look more like source to the same critic."""
    args = made(args, "run", align="output", gan=gan, adv_weight=1.0)
    critics = torch.nn.ModuleList([da.Critic(4, 4)])
    logits = torch.randn(2, 4, 32, 64, requires_grad=True)
    da.fooling_loss(critics, [logits], args).backward()
    with torch.no_grad():
        moved = logits - 100 * logits.grad
        before, after = (critics[0](x.softmax(dim=1)).mean() for x in (logits, moved))
    assert after > before


@pytest.mark.parametrize(("gan", "middle"), [("vanilla", 0.0), ("least_squares", 0.5)])
def test_a_critic_that_wins_or_loses_is_seen(args: common.Args, gan: str, middle: float):
    """Accuracies of 1 and 1, of 0 and 0, and of 1 and 0 where it calls everything source."""
    args = made(args, "run", align="output", gan=gan)
    source, target = torch.zeros(2, 2, 32, 32), torch.zeros(2, 2, 32, 32)
    source[:, 0], target[:, 1] = 50, 50
    for first, second, right in ((9, -9, (1, 1)), (-9, 9, (0, 0)), (9, 9, (1, 0))):
        critic = torch.nn.Conv2d(2, 1, 1)
        critic.weight.data = torch.tensor([first, second], dtype=torch.float).view(1, 2, 1, 1)
        critic.bias.data.fill_(middle)
        _, scalars = da.critic_losses(torch.nn.ModuleList([critic]), [source], [target], args)
        assert (scalars["critic_source"], scalars["critic_target"]) == right


def test_both_levels_are_aligned_where_the_network_has_two(args: common.Args):
    args = made(args, "run", align="output", adv_weight=0.0, adv_weight_aux=1.0)
    critics = torch.nn.ModuleList(da.Critic(4, 4) for _ in range(2))
    outputs = [torch.randn(2, 4, 32, 32, requires_grad=True) for _ in range(3)]
    da.fooling_loss(critics, outputs, args).backward()
    assert outputs[1].grad.abs().sum() > 0 and outputs[2].grad is None
    _, scalars = da.critic_losses(critics, outputs, outputs, args)
    assert len(scalars) == 4


def test_statistics_of_two_domains():
    """joint: as of one batch. Else each domain as if the other were not there."""
    net = common.Network("tiny", 3)
    x, y = torch.rand(2, 2, 3, 32, 32)
    y = y / 4
    with torch.no_grad():
        both, one, other = net(torch.cat([x, y])), net(x), net(y)
        for statistics in ("separate", "target"):
            (on_x,), (on_y,) = da.two_domains(net, x, y, statistics)
            assert torch.equal(on_x, one) and torch.equal(on_y, other)
        (on_x,), (on_y,) = da.two_domains(net, x, y, "joint")
    assert torch.equal(torch.cat([on_x, on_y]), both) and not torch.equal(on_x, one)


# ---- Self-training ------------------------------------------------------------------------------
def test_class_mask_pastes_whole_classes_and_half_of_them():
    rng = np.random.default_rng(0)
    labels = torch.from_numpy(rng.choice([0, 2, 3, 6, 8, IGNORE], (6, 12, 14)))
    labels[1], labels[2, :, :] = 4, IGNORE
    mask = da.class_mask(labels, 9, common.generator(0))
    drawn = set()
    for one, chosen in zip(labels, mask, strict=True):
        classes = [c for c in one.unique().tolist() if c != IGNORE]
        pasted = [c for c in classes if chosen[one == c].any()]
        assert all(chosen[one == c].all() for c in pasted) and not chosen[one == IGNORE].any()
        assert len(pasted) == (len(classes) + 1) // 2
        drawn |= {tuple(pasted)}
    assert len(drawn) > 3  # another half for each image


def test_pseudo_labels_are_of_the_mean_of_the_teachers():
    def teacher(*p: float):
        return lambda images: torch.tensor(p).log().view(1, 2, 1, 1).expand(1, 2, 1, 1)

    x, one, other = torch.zeros(1, 3, 1, 1), teacher(0.9, 0.1), teacher(0.2, 0.8)
    assert da.pseudo_labels([one], x, 0.54).item() == 0
    assert da.pseudo_labels([one, other], x, 0.54).item() == 0  # 0.55 against 0.45
    assert da.pseudo_labels([one, other, other], x, 0.54).item() == 1  # 0.57
    assert da.pseudo_labels([one], x, 0.95).item() == IGNORE


def test_the_teacher_follows():
    teacher, student = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.9 * teacher.weight + 0.1 * student.weight
    common.follow(teacher, student, 0.9)
    torch.testing.assert_close(teacher.weight, expected)


def test_statistics_are_those_of_the_photos(args: common.Args):
    args = common.resolve(made(args, "run"), "x")
    net, photos = common.Network("tiny", 10), common.load(args, "target_unlabelled")
    kept = [p.clone() for p in net.parameters()]
    da.adapt_statistics(net, photos, torch.device("cpu"), len(photos))
    x = torch.from_numpy(np.array(photos.images)).permute(0, 3, 1, 2) / 255
    first = net.body.stem[0]((x - net.mean) / net.std)
    torch.testing.assert_close(net.body.stem[1].running_mean, first.mean(dim=(0, 2, 3)))
    assert net.body.stem[1].momentum == 0.1
    assert all(torch.equal(a, b) for a, b in zip(kept, net.parameters(), strict=True))


# ---- Runs ---------------------------------------------------------------------------------------
def test_figures_are_written(args: common.Args):
    da.run(made(args, "run", align="output"))
    for name in ("adaptation", "translation", "predictions", "curves"):
        assert Path(f"run/figures/{name}.png").stat().st_size > 10_000


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    "switches",
    [
        {"align": "output", "translate": "none", "entropy_weight": 0.1},
        {"align": "entropy", "gan": "least_squares", "statistics": "joint", "self_train": True},
        {"align": "none", **BANDS, "statistics": "target"},
    ],
)
def test_switches_alone_and_together(args: common.Args, switches: dict):
    """As many updates as were given, and scalars that say how the discriminator does."""
    result = da.run(made(args, "run", steps=12, **switches))
    assert (result.steps, result.target_labels) == (12, 0)
    assert ("discriminator updates" in result.beside) == (switches["align"] != "none")
    lines = [line for line in common.read_scalars(Path("run")) if "mIoU" not in line]
    stages = common.read_scalars(Path("run"))[-1]["step"]
    assert stages == 12 and lines
    if switches["align"] != "none":
        aligning = [line for line in lines if "critic_source" in line]
        assert aligning and all(0 <= line["critic_target"] <= 1 for line in aligning)


@pytest.mark.usefixtures("no_figures")
def test_every_switch_off_is_the_source_only_baseline(args: common.Args):
    import benchmark

    da.run(made(args, "one", translate="none"))
    benchmark.run_baseline(like(args, benchmark.BaselineArgs, out=Path("two")))
    assert same(weights(Path("one")), weights(Path("two")))


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_cut_off_in_every_stage_ends_with_the_same_weights(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    """Cut in the third step of each stage, of which the checkpoint knows two."""
    shares = {"align_share": 0.33, "self_train_share": 0.25}  # 4 of 16, 4 of 12, two times 4
    settings = {"steps": 16, "align": "entropy", **shares, **BANDS}
    stages = ("source", "source1", "align", "self_train")
    whole_and_cut(monkeypatch, da.run, made(args, "whole", **settings), stages, at=3)
    assert same(weights(Path("whole")), weights(Path("cut")))


@pytest.mark.usefixtures("no_figures")
def test_no_label_of_a_photo_is_used(args: common.Args, mini: Path):
    import shutil

    shutil.copytree(mini, "data2")
    scramble(Path("data2"))
    da.run(made(args, "one", align="output", self_train=True))
    da.run(made(args, "two", align="output", self_train=True, data="data2"))
    assert same(weights(Path("one")), weights(Path("two")))


@pytest.mark.usefixtures("no_figures")
def test_init_replaces_the_first_stage(args: common.Args):
    da.run(made(args, "one"))
    init = Path("one/checkpoint.pt")
    assert da.run(made(args, "on", init=init)).steps == 6  # nothing comes after: it trains on
    result = da.run(made(args, "two", init=init, self_train=True))
    assert result.steps == json.loads(Path("two/result.json").read_text())["steps"] == 4
    with pytest.raises(UserError, match="--bands: several need"):
        da.run(made(args, "three", init=init, **BANDS))
    with pytest.raises(UserError, match="--align-share: expected a share from 0 to 1"):
        da.run(made(args, "four", align="output", align_share=1.6))
    assert not Path("three").exists() and not Path("four").exists()


@pytest.mark.usefixtures("no_figures")
def test_init_with_a_training_set_is_trained_on(args: common.Args):
    """All steps, and on a copy of the source to the same weights as on the source."""
    args = common.resolve(made(args, "one"), "x")
    source = common.load(args, "source")
    da.run(made(args, "one"))
    common.save_set(Path("set"), source.dataset, source.images, source.labels, source.names)
    result = da.run(made(args, "two", init=Path("set")))
    assert result.steps == 6 and same(weights(Path("one")), weights(Path("two")))
