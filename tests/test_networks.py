"""Augmentation, networks, metrics and the evaluator."""

import math
from pathlib import Path
from unittest.mock import Mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import _api, mobilenet_v3_large

import common
import datasets
from datasets import CITYSCAPES, IGNORE, UserError

CPU = torch.device("cpu")


# ---- Augmentation -------------------------------------------------------------------------------
def test_labels_move_with_their_images():
    """Label k is painted as grey k/10; where no border is near, the two still agree afterwards."""
    labels = torch.randint(0, 10, (8, 4, 8)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    images = (labels[:, None] / 10).expand(-1, 3, -1, -1)
    images, moved = common.crop_flip(images, labels, common.generator("x"))
    assert ((images[:, 0] * 10 - moved).abs() < 0.01).float().mean() > 0.8
    assert set(moved.unique().tolist()) <= set(range(10))  # no label is interpolated
    assert moved.shape == labels.shape and not torch.equal(moved, labels)


def test_crop_flip_without_zoom_is_identity_or_mirror():
    images, labels, flipped = torch.rand(16, 3, 8, 8), torch.randint(0, 5, (16, 8, 8)), 0
    pairs = zip(*common.crop_flip(images, labels, common.generator("x"), zoom=1.0), strict=True)
    for i, (after, label) in enumerate(pairs):
        mirror = torch.allclose(after, images[i].flip(-1), atol=1e-5)
        assert mirror or torch.allclose(after, images[i], atol=1e-5)
        assert torch.equal(label, labels[i].flip(-1) if mirror else labels[i])
        flipped += mirror
    assert 2 <= flipped <= 14


@pytest.mark.parametrize("name", common.AUGMENTATIONS)
def test_augmentations_keep_range_and_shape_and_follow_their_generator(name: str):
    augment, images = common.AUGMENTATIONS[name], torch.rand(6, 3, 32, 64)
    once, again = augment(images, common.generator("x")), augment(images, common.generator("x"))
    assert once.shape == images.shape and once.min() >= 0 and once.max() <= 1
    assert torch.equal(once, again) and torch.equal(once, images) == (name == "original")
    same = augment(images[:1].expand(6, -1, -1, -1), common.generator("x"))
    assert name == "original" or not torch.equal(same[0], same[1])  # drawn for each image


def test_augmentations_do_what_their_names_say(monkeypatch: pytest.MonkeyPatch):
    rng, flat = common.generator("x"), torch.full((4, 3, 32, 32), 0.5)
    torch.testing.assert_close(common.blur(flat, rng), flat)  # weights sum to 1
    noise = torch.rand(4, 3, 32, 32)
    assert (common.blur(noise, rng).var(dim=(2, 3)) <= noise.var(dim=(2, 3))).all()
    line = torch.zeros(16, 3, 512, 32).index_fill(2, torch.tensor(256), 1)
    rows = common.blur(line, common.generator("x"))[:, 0, :, 16]  # [16,512]; sigma is up to 4 px
    assert 3.2 < (rows @ torch.arange(-256.0, 256).square()).sqrt().max() < 4
    grey = torch.rand(4, 1, 16, 16).expand(-1, 3, -1, -1) * 0.5 + 0.25
    jittered = common.colorjitter(grey, rng)  # neither hue nor saturation changes a grey
    torch.testing.assert_close(jittered, jittered[:, :1].expand_as(jittered), atol=1e-5, rtol=0)
    shift = common.rgbshift(flat, rng) - flat
    torch.testing.assert_close(shift, shift[..., :1, :1].expand_as(shift))
    assert shift[:, :, 0, 0].unique().numel() == 12 and 0.04 < shift.abs().max() < 0.079
    # With all factors at 1 the hue alone moves, here by a 20th of a turn.
    numbers = torch.tensor([0.5, 0.5, 0.5, 1.0]).view(1, 4, 1, 1, 1)
    monkeypatch.setattr(common, "draw", lambda *_: numbers)
    color = torch.tensor([0.5, 0.4, 0.4]).view(1, 3, 1, 1)
    r, g, b = common.colorjitter(color, rng).flatten().tolist()
    angle = math.atan2(3**0.5 * (g - b), 2 * r - g - b)  # of the hue, in the plane of equal grey
    assert angle == pytest.approx(0.1 * math.pi) and r + g + b == pytest.approx(1.3)


def test_random_augmentation_picks_each_equally_often():
    images = torch.rand(400, 3, 128, 8) * 0.4 + 0.3
    mixed = common.random_augmentation(images, common.generator("x"))
    untouched = (mixed == images).all(dim=3).all(dim=2).all(dim=1).float().mean()
    assert 0.18 < untouched < 0.32


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
    common.segmentation_loss(outputs, torch.randint(0, 7, (2, 64, 96))).backward()
    assert all(p.grad is not None for p in net.parameters())  # else it would stay random
    net.eval()
    with torch.no_grad():
        together, alone = net(images), net(images[:1])
        [only] = net(images, aux=True)
        with torch.autocast("cpu", torch.bfloat16):  # logits are upsampled in float32
            logits = net.body((images - net.mean) / net.std)["out"]
            torch.testing.assert_close(net(images), common.upsample(logits.float(), (64, 96)))
    assert torch.equal(only, together)
    torch.testing.assert_close(together[:1], alone, rtol=1e-3, atol=1e-3)


def test_pretrained_weights_come_from_torchvision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Here from its cache; without a connection there is one line."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    weights = mobilenet_v3_large().state_dict()
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    torch.save(weights, tmp_path / "hub/checkpoints/mobilenet_v3_large-8738ca79.pth")
    state = common.Network("lraspp", 5, pretrained=True).state_dict()
    assert torch.equal(state["body.backbone.0.0.weight"], weights["features.0.0.weight"])

    # Its backbone learns at a tenth of the rate of the head.
    net = common.Network("lraspp", 5, pretrained=True)
    optimizer = common.make_optimizer(net, 1.0)
    common.set_lr(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in net.body.backbone.parameters()} == {0.05}
    assert {rates[id(p)] for p in net.body.classifier.parameters()} == {0.5}
    assert len(rates) == len(list(net.parameters()))

    offline = Mock(side_effect=URLError("no route to host"))
    monkeypatch.setattr(_api, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"of bisenet cannot be downloaded .*--pretrained False"):
        common.Network("bisenet", 5, pretrained=True)


def test_loss_is_cross_entropy_over_valid_pixels():
    logits, labels = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    labels[0, :2] = IGNORE
    p, valid = logits.softmax(dim=1), (labels != IGNORE).nonzero().tolist()
    mean = np.mean([-math.log(p[b, labels[b, y, x], y, x]) for b, y, x in valid])
    assert common.segmentation_loss([logits], labels).item() == pytest.approx(mean, 1e-5)
    both = common.segmentation_loss([logits, logits], labels).item()
    assert both == pytest.approx((1 + common.AUX_WEIGHT) * mean, 1e-5)
    nothing = common.segmentation_loss([logits], torch.full_like(labels, IGNORE))
    assert nothing.item() == 0  # and not NaN


def test_ema_averages_weights_and_statistics_and_copies_nothing_else():
    teacher, student = torch.nn.BatchNorm2d(1), torch.nn.BatchNorm2d(1)
    student.weight.data.fill_(3.0)
    student(torch.full((2, 1, 2, 2), 10.0))  # running mean: 0.1 * 10
    common.update_ema(teacher, student, decay=0.75)
    assert teacher.weight.item() == 0.75 * 1 + 0.25 * 3
    assert teacher.running_mean.item() == pytest.approx(0.25 * 1)


# ---- Metrics ------------------------------------------------------------------------------------
def test_confusion_equals_counting_one_by_one():
    rng, classes = np.random.default_rng(0), 19
    truth = rng.integers(0, classes, (3, 9, 11)).astype(np.uint8)
    truth[rng.random(truth.shape) < 0.2] = IGNORE
    guess = rng.integers(0, classes, truth.shape)
    expected = np.zeros((3, classes, classes), int)
    for (image, y, x), t in np.ndenumerate(truth):
        if t != IGNORE:
            expected[image, t, guess[image, y, x]] += 1
    result = common.confusion_matrices(torch.from_numpy(guess), torch.from_numpy(truth), classes)
    np.testing.assert_array_equal(result, expected)


def test_scores_by_hand():
    """Class 0: 3 of 4 hit, one false alarm, 3/5. Class 1: 1 of 3 hit, one false alarm, 1/4. Class 2
    never occurs, though one pixel is taken for it: no part of the mean."""
    confusion = np.array([[3, 1, 0], [1, 1, 1], [0, 0, 0]])
    np.testing.assert_allclose(common.iou(confusion), [100 * 3 / 5, 100 * 1 / 4, np.nan])
    result = common.scores(confusion)
    assert result["mIoU"] == pytest.approx((60 + 25) / 2)
    assert result["aAcc"] == pytest.approx(100 * 4 / 7)
    assert result["mAcc"] == pytest.approx((75 + 100 / 3) / 2)
    with pytest.raises(UserError, match="no pixel of any class"):
        common.scores(0 * confusion)


# ---- Evaluator ----------------------------------------------------------------------------------
def photos(labels: list[np.ndarray], images: np.ndarray) -> datasets.Split:
    """Test photos of Cityscapes with these label ids, each of a size of its own."""
    files = [(Path(f"{i}.png"), Path(f"{i}_label.png")) for i in range(len(labels))]
    for (image, label), ids in zip(files, labels, strict=True):
        Image.fromarray(ids.astype(np.uint8)).save(label)
        Image.fromarray(np.zeros((*ids.shape, 3), np.uint8)).save(image)
    return datasets.Split(CITYSCAPES, tuple("abcdefg"[: len(labels)]), images, None, tuple(files))


class Painter(torch.nn.Module):
    """A network that reads the class off the picture: grey 10 k means class k."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return -((images[:, :1] * 25.5 - torch.arange(19).view(1, 19, 1, 1)) ** 2)


def test_the_evaluator_scores_at_the_resolution_of_each_label():
    """Photos of several sizes, halves of two classes: upsampled logits are right to the pixel."""
    images, labels = np.zeros((5, 16, 32, 3), np.uint8), []
    for h, w in [(32, 64), (48, 96), (32, 64), (16, 32), (48, 96)]:
        labels.append(np.full((h, w), 7))  # road, train id 0
        labels[-1][:, w // 2 :] = 21  # vegetation, train id 8
        labels[-1][0] = 4  # ignored
    images[:, :, 16:] = 80
    confusion = common.evaluate(Painter(), photos(labels, images), CPU)
    for matrix, ids in zip(confusion, labels, strict=True):
        h, w = ids.shape
        assert matrix.sum() == (h - 1) * w and matrix[0, 0] + matrix[8, 8] >= (h - 1) * (w - 2)


def test_the_evaluator_equals_the_plain_way_to_the_pixel_and_leaves_the_network_as_it_was():
    """One image at a time, its logits upsampled to the label and argmaxed, counted by numpy."""
    rng, sizes = np.random.default_rng(0), [(33, 65), (20, 31), (64, 128), (16, 32), (50, 100)]
    labels = [rng.choice([7, 8, 21, 26, 4], size) for size in sizes]
    images = rng.integers(0, 256, (5, 32, 64, 3), np.uint8)
    net = common.Network("tiny", 19)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    confusion = common.evaluate(net, photos(labels, images), CPU)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    net.eval()
    for image, ids, matrix in zip(images, labels, confusion, strict=True):
        logits = common.predict(net, image[None], CPU)
        guess = common.upsample(logits, ids.shape).argmax(dim=1)[0]
        expected = np.zeros((256, 19), int)
        np.add.at(expected, (datasets.label_table(CITYSCAPES)[ids], guess.numpy()), 1)
        np.testing.assert_array_equal(matrix, expected[:19])


def test_the_evaluator_agrees_with_the_official_script(monkeypatch: pytest.MonkeyPatch):
    """With labels and predictions that hold every id and class: to the last digit."""
    official = pytest.importorskip("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")
    monkeypatch.setattr(official.args, "evalInstLevelScore", False)
    rng = np.random.default_rng(0)
    ids = np.array(list(datasets.CITYSCAPES_IDS.values()), np.uint8)
    labels = [rng.integers(0, 34, (32, 64)) for _ in range(3)]
    truth = [np.minimum(datasets.label_table(CITYSCAPES)[label], 18) for label in labels]
    guesses = [np.where(rng.random(t.shape) < 0.7, t, rng.integers(0, 19, t.shape)) for t in truth]
    images = np.repeat(np.stack(guesses)[..., None], 3, axis=3).astype(np.uint8) * 10
    split = photos(labels, images)
    matrix = official.generateMatrix(official.args)
    for guess, (_, label) in zip(guesses, split.test_files, strict=True):
        Image.fromarray(ids[guess]).save("guess.png")
        official.evaluatePair("guess.png", str(label), matrix, {}, {}, official.args)
    total = common.evaluate(Painter(), split, CPU).sum(axis=0)
    np.testing.assert_array_equal(total, matrix[np.ix_(ids, ids)])
    scores = [official.getIouScoreForLabel(int(i), matrix, official.args) for i in ids]
    assert common.iou(total).tolist() == [100 * score for score in scores]
