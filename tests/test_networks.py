"""Networks, metrics and the evaluator."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import IGNORE, UserError


# ---- Networks -----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "auxiliary", "millions"),
    [("tiny", 0, 0.47), ("bisenet", 2, 13.5), ("lraspp", 0, 3.2), ("deeplab", 1, 61.0)],
)
def test_networks(name: str, auxiliary: int, millions: float):
    net, images = common.Network(name, 7), torch.rand(2, 3, 64, 96)
    outputs = net(images, aux=True)
    assert [tuple(o.shape) for o in outputs] == [(2, 7, 64, 96)] * (1 + auxiliary)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.1)
    labels = torch.randint(0, 7, (2, 64, 96))
    common.segmentation_loss(outputs, labels).backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None]
    assert not idle  # what gets no gradient would stay random
    net.eval()
    with torch.no_grad():
        together, alone = net(images), net(images[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-3)


def test_pretrained_weights_are_never_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"--pretrained: no .*resnet18.*pth; download it from http"):
        common.Network("bisenet", 5, pretrained=True)


def test_loss_is_cross_entropy_over_valid_pixels():
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = IGNORE
    p = logits.softmax(dim=1)
    values = [
        -math.log(p[b, labels[b, y, x], y, x])
        for b in range(2) for y in range(4) for x in range(5) if labels[b, y, x] != IGNORE
    ]  # fmt: skip
    assert common.segmentation_loss([logits], labels).item() == pytest.approx(np.mean(values), 1e-5)
    both = common.segmentation_loss([logits, logits], labels).item()
    assert both == pytest.approx((1 + common.AUX_WEIGHT) * np.mean(values), 1e-5)


def test_loss_of_a_batch_without_labels_is_zero_not_nan():
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    loss = common.segmentation_loss([logits], torch.full((1, 4, 4), IGNORE))
    loss.backward()
    assert loss.item() == 0 and (logits.grad == 0).all()


# ---- Metrics ------------------------------------------------------------------------------------
@pytest.mark.parametrize("classes", [3, 10, 19])
def test_confusion_equals_counting_one_by_one(classes: int):
    rng = np.random.default_rng(0)
    truth = rng.integers(0, classes, (3, 9, 11)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = IGNORE
    guess = rng.integers(0, classes, truth.shape)
    expected = np.zeros((3, classes, classes), int)
    for (image, y, x), t in np.ndenumerate(truth):
        if t != IGNORE:
            expected[image, t, guess[image, y, x]] += 1
    result = common.confusion_matrices(torch.from_numpy(guess), torch.from_numpy(truth), classes)
    np.testing.assert_array_equal(result, expected)


def test_confusion_of_a_batch_too_large_for_16_bits():
    truth = torch.full((200, 2, 2), 18, dtype=torch.uint8)
    result = common.confusion_matrices(truth.long(), truth, 19)
    assert result[:, 18, 18].tolist() == [4] * 200 and result.sum() == 800


def test_scores_by_hand():
    """Class 0: 3 of 4 hit, one false alarm, 3/5. Class 1: 1 of 3 hit, one false alarm, 1/4. Class 2
    never occurs, though one pixel is taken for it: no part of the mean."""
    confusion = np.array([[3, 1, 0], [1, 1, 1], [0, 0, 0]])
    values = common.iou(confusion)
    np.testing.assert_allclose(values, [100 * 3 / 5, 100 * 1 / 4, np.nan])
    result = common.scores(confusion)
    assert result["mIoU"] == pytest.approx((60 + 25) / 2)
    assert result["aAcc"] == pytest.approx(100 * 4 / 7)
    assert result["mAcc"] == pytest.approx((75 + 100 / 3) / 2)


def test_class_weights_by_hand():
    """1/(6+4), 1/(4+4), 1/(30+4) over their mean."""
    raw = np.array([1 / 10, 1 / 8, 1 / 34])
    weights = common.class_weights(np.array([6, 4, 30]), smooth=0.1, classes="abc")
    np.testing.assert_allclose(weights, 3 * raw / raw.sum())
    with pytest.raises(UserError, match=r"class b has no pixel.*--smooth"):
        common.class_weights(np.array([5, 0]), smooth=0.0, classes="ab")
    assert common.class_weights(np.array([5, 0]), 0.1, "ab").sum() == pytest.approx(2)


# ---- Evaluator ----------------------------------------------------------------------------------
class Painter(torch.nn.Module):
    """A network that reads the class off the picture: grey 10 k means class k."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        classes = torch.arange(10).view(1, 10, 1, 1)
        return -((images[:, :1] * 25.5 - classes) ** 2)


def test_the_evaluator_scores_at_the_resolution_of_each_label(tmp_path: Path):
    """Photos of several sizes, halves of two classes: upsampled logits are right to the pixel."""
    files, images = [], np.zeros((5, 16, 32, 3), np.uint8)
    for i, (h, w) in enumerate([(32, 64), (48, 96), (32, 64), (16, 32), (48, 96)]):
        label = np.full((h, w), 7, np.uint8)  # road, train id 0
        label[:, w // 2 :] = 26  # car, train id 8
        label[0] = 4  # ignored
        files.append((tmp_path / f"{i}.png", tmp_path / f"{i}_label.png"))
        Image.fromarray(label).save(files[-1][1])
        Image.fromarray(np.zeros((h, w, 3), np.uint8)).save(files[-1][0])
        images[i, :, 16:] = 80
    part = common.Part("kitti", tuple("abcde"), images, None, tuple(files))
    confusion = common.evaluate(Painter(), part, torch.device("cpu"), batch_size=3)
    for matrix, (h, w) in zip(
        confusion, [(32, 64), (48, 96), (32, 64), (16, 32), (48, 96)], strict=True
    ):
        assert matrix.sum() == (h - 1) * w and matrix[0, 0] + matrix[8, 8] >= (h - 1) * (w - 2)


def test_the_evaluator_equals_the_plain_way_to_the_pixel(tmp_path: Path):
    """One image at a time, its logits upsampled to the label and argmaxed, counted by numpy."""
    rng, files = np.random.default_rng(0), []
    ids, sizes = [7, 8, 21, 26, 4], [(33, 65), (20, 31), (64, 128), (16, 32), (50, 100)]
    for i, size in enumerate(sizes):  # odd ones, smaller and larger than the network's
        files.append((tmp_path / f"{i}.png", tmp_path / f"{i}_label.png"))
        Image.fromarray(rng.choice(ids, size).astype(np.uint8)).save(files[-1][1])
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(files[-1][0])
    images = rng.integers(0, 256, (5, 32, 64, 3), np.uint8)
    part = common.Part("cityscapes", tuple("abcde"), images, None, tuple(files))
    net, cpu = common.Network("tiny", 19).eval(), torch.device("cpu")
    for batch_size in (1, 3, 16):
        found = common.evaluate(net, part, cpu, batch_size=batch_size)
        for i, size in enumerate(sizes):
            guess = common.upsample(common.predict(net, images[i : i + 1], cpu), size).argmax(dim=1)
            truth = common.read_label(files[i][1], "cityscapes").astype(int)
            expected = np.zeros((256, 19), int)
            np.add.at(expected, (truth, guess[0].numpy()), 1)
            np.testing.assert_array_equal(found[i], expected[:19])


@pytest.mark.parametrize("size", [(8, 12), (16, 24), (31, 50), (24, 12), (5, 7), (8, 100)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_label_maps_are_those_of_upsampled_logits(size: tuple[int, int], channels_last: bool):
    """Of noise, whose neighbours all differ, of smooth maps, whose hardly do, and of one class."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 5, 8, 12, generator=rng)
    smooth = common.upsample(torch.randn(2, 5, 2, 3, generator=rng), (8, 12))
    for logits in (noise, smooth, torch.ones(2, 5, 8, 12), noise.half()):
        if channels_last:
            logits = logits.contiguous(memory_format=torch.channels_last)
        large = common.upsample(logits.float(), size)
        maps = common.label_maps(logits, size)
        assert maps.shape == (2, *size) and maps.dtype == torch.uint8
        chosen = large.gather(1, maps.long()[:, None])[:, 0]
        assert (chosen > large.amax(dim=1) - 1e-5).all()  # rounding may decide between equals


def test_a_label_of_the_test_set_is_decoded_once(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    a, calls = common.resolve(args, "x"), []
    read, net, cpu = common.read_label, common.Network("tiny", 10), torch.device("cpu")
    monkeypatch.setattr(
        common, "read_label", lambda *p, **image: calls.append(p) or read(*p, **image)
    )
    part = common.load(a, "target_test")
    first = common.evaluate(net, part, cpu)
    assert len(calls) == len(part)
    again = common.evaluate(net, common.load(a, "target_test"), cpu)
    assert len(calls) == len(part) and np.array_equal(first, again)


def test_the_evaluator_agrees_with_the_official_script(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """On the genuine samples, with predictions that hold every class: to the last digit."""
    official = pytest.importorskip(
        "cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling",
        reason="cityscapesscripts is not installed",
    )
    monkeypatch.setattr(official.args, "evalInstLevelScore", False)
    rng = np.random.default_rng(0)
    ids = np.array(list(common.CITYSCAPES_IDS.values()), np.uint8)
    pairs = common.list_files("cityscapes", real / "cityscapes_sample", "train", ()).pairs
    matrix, blocks = official.generateMatrix(official.args), []
    for image, label in pairs:  # blocks of 8 px, three quarters of them what their corner is
        corner = np.minimum(common.read_label(label, "cityscapes", image)[::8, ::8], 18)
        wild = rng.integers(0, 19, corner.shape)
        blocks.append(np.where(rng.random(corner.shape) < 0.75, corner, wild))
        guess = np.kron(blocks[-1], np.ones((8, 8), np.uint8))
        Image.fromarray(ids[guess]).save(tmp_path / "guess.png")
        official.evaluatePair(
            str(tmp_path / "guess.png"), str(label), matrix, {}, {}, official.args
        )

    class Oracle(torch.nn.Module):
        """Gives the blocks' one-hot maps, at the labels' resolution, as logits."""

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            maps = torch.from_numpy(np.stack(blocks)).long()
            maps = maps.repeat_interleave(8, 1).repeat_interleave(8, 2)
            return torch.nn.functional.one_hot(maps, 19).permute(0, 3, 1, 2).half()

    monkeypatch.setattr(common, "upsample", lambda x, size: x if x.shape[2:] == size else 1 / 0)
    images = np.zeros((3, 4, 8, 3), np.uint8)
    part = common.Part("cityscapes", tuple("abc"), images, None, tuple(pairs))
    total = common.evaluate(Oracle(), part, torch.device("cpu")).sum(axis=0)
    np.testing.assert_array_equal(total, matrix[np.ix_(ids, ids)])
    ious = common.iou(total)
    for c, name in enumerate(common.CITYSCAPES_IDS):
        if total[
            c
        ].sum():  # the script counts a class that was only predicted as 0, we leave it out
            theirs = official.getIouScoreForLabel(int(ids[c]), matrix, official.args)
            assert ious[c] == 100 * theirs, name


def test_evaluation_leaves_the_network_as_it_was(args: common.Args):
    a = common.resolve(replace(args, benchmark="gta52cityscapes"), "x")
    net = common.Network("tiny", 19).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    part = common.load(a, "target_test")
    confusion = common.evaluate(net, part, torch.device("cpu"))
    assert net.training and confusion.shape == (len(part), 19, 19)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
