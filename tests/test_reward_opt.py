"""Rewards by hand, estimators against enumeration and brute force, and what a run promises."""

import itertools
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from conftest import like, read_scalars, same_weights, weights, whole_and_cut

import baseline
import common
import datasets
import reward_opt as ro
from datasets import IGNORE, UserError

# Of 2x3 pixels with 3 classes: all classes, one without class 1, one with two ignored pixels.
TRUTHS = torch.tensor([[[0, 1, 2], [2, 2, 1]], [[0, 0, 2], [2, 0, 0]], [[255, 1, 1], [1, 0, 255]]])
ALL_MAPS = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, 2, 3)  # [729,2,3]


def make(args: common.Args, out: str, **changes) -> ro.Args:
    return like(args, ro.Args, **{"out": Path(out), **changes})


def iou_of(labels: torch.Tensor, truth: torch.Tensor, num_classes: int = 3) -> torch.Tensor:
    return ro.mean_iou(*ro.counts(labels, truth, num_classes))


def recall_of(labels: torch.Tensor, truth: torch.Tensor, smallest: float) -> torch.Tensor:
    return ro.object_recall(labels[None], ro.find_objects(truth, 1, smallest))[1][0]


@pytest.fixture
def logits() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=rng).requires_grad_()


def likelihood(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.log_softmax(dim=3).expand(len(ALL_MAPS), -1, -1, -1)
    return log_p.gather(3, ALL_MAPS[..., None]).sum(dim=(1, 2, 3)).exp()


def example(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth logits [2,4,H,W] and labels [2,H,W] with three of the four classes."""
    torch.manual_seed(0)
    coarse, noise = 2 * torch.randn(2, 4, 4, 8), torch.randn(2, 4, 4, 8)
    truth = common.upsample(coarse + noise, (height, width))[:, :3].argmax(dim=1)
    truth[:, :2] = IGNORE
    return common.upsample(coarse, (height, width)).double(), truth


# ---- The IoU ------------------------------------------------------------------------------------
def test_iou_by_hand():
    """Truth 0 0 1 1, drawn 0 1 1 1: IoU 1/2 and 2/3. Then class 2 drawn that the truth has not."""
    truth = torch.tensor([[[0, 0, 1, 1, IGNORE]], [[0, 0, 1, 1, IGNORE]]])
    drawn = torch.tensor([[[0, 1, 1, 1, 0]], [[0, 2, 1, 1, 2]]])
    assert iou_of(drawn, truth).tolist() == pytest.approx([(1 / 2 + 2 / 3) / 2, (1 / 2 + 1) / 2])
    assert (iou_of(drawn, torch.full_like(truth, IGNORE)) == 0).all()


@pytest.mark.parametrize("truth", TRUTHS)
def test_counterfactual_is_unbiased(truth: torch.Tensor, logits: torch.Tensor):
    """Each map's estimate, weighted by its likelihood, sums to the gradient of sum P(y) R(y)."""
    truths = truth.expand_as(ALL_MAPS)
    expected = torch.autograd.grad(likelihood(logits) @ iou_of(ALL_MAPS, truths), logits)[0]
    p = logits.softmax(dim=3).expand(len(ALL_MAPS), -1, -1, -1)
    estimates = ro.counterfactual(p, ALL_MAPS, truths)  # [729]
    mean = torch.autograd.grad(likelihood(logits).detach() @ estimates, logits)[0]
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)


def test_the_table_of_gains_equals_brute_force():
    """Each pixel's label exchanged for each class and the IoU computed anew, to the last bit."""
    c, rng = 5, torch.Generator().manual_seed(0)
    truth = torch.tensor([0, 1, 3, IGNORE])[torch.randint(4, (4, 3, 4), generator=rng)]
    labels = torch.randint(3, (4, 3, 4), generator=rng)
    truth[1], truth[2], labels[2] = IGNORE, 3, 3  # nothing valid; all right, all unions but one 0
    truth[3, 0, 0], labels[3] = 1, 2  # the union of a class may vanish and appear
    p = torch.full((4, 3, 4, c), 1 / c, dtype=torch.float64, requires_grad=True)
    ro.counterfactual(p, labels, truth).sum().backward()
    before = iou_of(labels, truth, c)
    for y, x, k in itertools.product(range(3), range(4), range(c)):
        other = labels.clone()
        other[:, y, x] = k
        assert torch.equal(p.grad[:, y, x, k], iou_of(other, truth, c) - before)


def test_the_gradient_of_the_iou_is_that_of_the_soft_jaccard_loss():
    """Cosine of the mean of 16 estimates and the soft-Jaccard gradient, on 32x64 pixels."""
    logits, truth = example(32, 64)
    leaf, rng = logits.clone().requires_grad_(), common.generator("test")
    losses = (ro.iou_objective(leaf, truth, rng)[0] for _ in range(16))
    mean = torch.stack([torch.autograd.grad(loss, leaf)[0] for loss in losses]).mean(dim=0)
    soft = torch.autograd.grad(ro.soft_jaccard(leaf, truth), leaf)[0]
    assert torch.cosine_similarity(mean.flatten(), soft.flatten(), dim=0) > 0.9995
    torch.testing.assert_close(mean.norm(), soft.norm(), rtol=0.01, atol=0)


def test_samples_follow_the_probabilities():
    p = torch.tensor([0.0, 0.7, 0.0, 0.3], dtype=torch.float64).expand(1, 200, 300, 4)
    shares = ro.sample(p, common.generator("test")).flatten().bincount(minlength=4) / 60_000
    torch.testing.assert_close(shares, p[0, 0, 0].float(), atol=0.01, rtol=0)
    assert shares[0] == shares[2] == 0


# ---- The object recall --------------------------------------------------------------------------
def flood(truth: torch.Tensor) -> list[list[tuple[int, int]]]:
    """Regions of one class of a label map [H,W], each filled from one of its pixels."""
    rest, regions = {(y, x) for y, x in (truth != IGNORE).nonzero().tolist()}, []
    while rest:
        region = [rest.pop()]
        for y, x in region:  # it grows meanwhile
            near = {(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)} & rest
            near = {q for q in near if truth[q] == truth[y, x]}
            rest -= near
            region += near
        regions.append(region)
    return regions


@pytest.mark.parametrize("seed", range(3))
def test_object_recall_equals_flood_filling(seed: int):
    rng = torch.Generator().manual_seed(seed)
    truth = torch.tensor([0, 0, 1, 1, 2, IGNORE])[torch.randint(6, (4, 9, 9), generator=rng)]
    truth[0] = 1  # a region of one pixel's width that winds through the whole image:
    truth[0, 1::4, :-1], truth[0, 3::4, 1:] = 2, 0
    truth[1] = IGNORE  # no object: 0
    labels = torch.randint(3, (4, 9, 9), generator=rng).where(
        torch.rand(4, 9, 9, generator=rng) < 0.5, truth
    )
    labels = labels.where(labels != IGNORE, 0)
    recall = recall_of(labels, truth, smallest=3 / 81)
    assert recall[1] == 0
    for i in (0, 2, 3):
        regions = [region for region in flood(truth[i]) if len(region) >= 3]
        right = labels[i] == truth[i]
        whole = [2 * sum(right[q].item() for q in region) >= len(region) for region in regions]
        assert recall[i].item() == pytest.approx(sum(whole) / len(whole))


@pytest.mark.parametrize("credit", ["object", "image"])
def test_reinforce_is_unbiased(credit: str, logits: torch.Tensor):
    """Over all 729 x 729 pairs of maps of 2x3 cells, in which objects of 4x6 pixels share cells."""
    rows = ["000111", "022211", "022200", "00x200"]
    truth = torch.tensor([[int(i) if i != "x" else IGNORE for i in row] for row in rows])
    n = len(ALL_MAPS)
    objects = ro.find_objects(truth.expand(n, -1, -1), cell=2, smallest=0)
    pixels = ALL_MAPS.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    rewards = recall_of(pixels, truth.expand(n, -1, -1), smallest=0)
    expected = torch.autograd.grad(likelihood(logits) @ rewards, logits)[0]
    assert len(rewards.unique()) > 3 and expected.abs().max() > 0.01
    p, mean = likelihood(logits).detach(), torch.zeros_like(logits)
    log_p = logits.log_softmax(dim=3).expand(n, -1, -1, -1)
    for shift in range(n):  # the second map of each pair, for every first one at once
        pair = torch.stack([ALL_MAPS, ALL_MAPS.roll(shift, dims=0)])
        estimates, both = ro.reinforce(log_p, pair, objects, credit)  # [729], [2,729]
        assert torch.equal(both[0], rewards)  # rewards of cells are those of their pixels
        mean += torch.autograd.grad((p * p.roll(shift)) @ estimates, logits, retain_graph=True)[0]
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)


def test_credit_by_object_is_less_noisy(args: common.Args):
    logits, truth = example(32, 64)
    leaf, noise, rng = logits.clone().requires_grad_(), {}, common.generator("test")
    for credit in ("object", "image"):
        settings = make(args, "run", credit=credit, cell=4)
        losses = (ro.object_objective(leaf, truth, settings, rng)[0] for _ in range(30))
        noise[credit] = torch.stack([torch.autograd.grad(x, leaf)[0] for x in losses]).var(dim=0)
    assert noise["object"].sum() < noise["image"].sum() / 3


@pytest.mark.parametrize(
    ("size", "cell"),
    [
        ((32, 64), 2),
        ((64, 128), 4),
        ((96, 32), 4),
        ((8, 16), 1),
        ((1056, 32), 32),
        ((1024, 64), 64),
    ],
)
def test_the_default_cell_divides_the_size(args: common.Args, monkeypatch, size, cell: int):
    """The largest power of 2 up to a sixteenth of the height, smaller where it does not divide."""
    find, cells = ro.find_objects, []
    monkeypatch.setattr(ro, "find_objects", lambda *a: (cells.append(a[1]), find(*a))[1])
    logits, truth = torch.zeros(1, 3, *size), torch.zeros(1, *size, dtype=torch.int64)
    ro.object_objective(logits, truth, make(args, "run", samples=2), common.generator("test"))
    assert cells == [cell]


def test_class_weighted_cross_entropy_by_hand():
    """Weights 1 / (6 + 4), 1 / (4 + 4), 1 / (30 + 4), 1 / (0 + 4) for counts 6, 4, 30, 0."""
    (logits, truth), pixels = example(6, 9), torch.tensor([6, 4, 30, 0])
    w = torch.tensor([1 / 10, 1 / 8, 1 / 34, 1 / 4], dtype=torch.float64)
    ce, valid = -logits.log_softmax(dim=1).movedim(1, 3), truth != IGNORE  # [B,H,W,C]
    loss = ce[valid].gather(1, truth[valid][:, None])[:, 0] * w[truth[valid]]
    expected = loss.sum() / w[truth[valid]].sum()
    result = ro.class_weighted_ce(logits, truth, pixels, smooth=0.1)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=0)  # weights in float32


# ---- Runs ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("objective", get_args(ro.Objective))
def test_without_its_weight_every_objective_is_few_label(args: common.Args, objective: str):
    """The same batches, augmentation and schedule, so the difference is the objective alone."""
    control = objective == "cross_entropy"  # it has no weight
    zero = {} if control else {"weight": 0.0}
    ro.run(make(args, "zero", objective=objective, **zero))
    baseline.run(like(args, baseline.Args, row="few_label", out=Path("plain")))
    torch.testing.assert_close(weights("zero"), weights("plain"), rtol=0, atol=1e-6)
    ro.run(make(args, "one", objective=objective))
    assert same_weights("zero", "one") == control


def test_the_row_says_what_it_used(args: common.Args):
    """One epoch of two photos is less than a batch of four: one update, five on the source."""
    result = ro.run(make(args, "one", objective="object_recall", epochs=1))
    assert (result.steps, result.target_labels) == (6, 2)
    assert Path("one/figures/gradient.png").exists()
    lines = [line for line in read_scalars(Path("one")) if "test_iou" in line]
    assert [line["step"] for line in lines] == [5, 6]
    values = json.loads(Path("one/rewards/1.json").read_text())["iou"]
    assert sum(values) / len(values) == pytest.approx(lines[1]["test_iou"])


@pytest.mark.usefixtures("no_figures")
def test_photos_without_objects_are_left_out_of_the_mean_recall(args: common.Args):
    """Regions count from the size of the largest one of all photos, so most photos have none."""
    test = datasets.load(common.resolve(make(args, "run"), "reward_opt"), "target_test")
    truths = [datasets.read_label(label, test.dataset) for _, label in test.test_files]
    truths = [datasets.resize_label(truth, args.size).astype(np.int64) for truth in truths]
    sizes = [ro.find_objects(torch.from_numpy(truth)[None], 1, 0).size.max() for truth in truths]
    ro.run(make(args, "run", smallest=int(max(sizes)) / (32 * 64)))
    recalls = json.loads(Path("run/rewards/3.json").read_text())["object_recall"]
    kept = [value for value in recalls if value is not None]
    assert 0 < len(kept) < len(recalls)
    lines = [line for line in read_scalars(Path("run")) if "test_object_recall" in line]
    assert lines[-1]["test_object_recall"] == pytest.approx(sum(kept) / len(kept))
    ro.run(make(args, "none", smallest=1.0))
    assert not any("test_object_recall" in line for line in read_scalars(Path("none")))


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_cut_off_ends_with_the_same_weights(args, monkeypatch):
    long = make(args, "whole", steps=8, objective="object_recall")
    whole_and_cut(monkeypatch, ro.run, long, ("source", "few"), at=3)
    assert same_weights("whole", "cut")
    assert ro.run(make(args, "on", init=Path("cut/checkpoint.pt"))).steps == 3  # one stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "object_recall", "samples": 1}, "--samples 1: expected at least 2"),
        (
            {"objective": "class_weighted_ce", "smooth": 0.0},
            "--smooth 0.0: expected a number above",
        ),
        ({"objective": "cross_entropy", "anchor": 0.0}, "--anchor 0: nothing is left to train"),
        ({"labelled": 9}, "--labelled 9: "),
        ({"reward_share": 0.0}, "--reward-share 0.0: expected above 0"),
        ({"objective": "cross_entropy", "weight": 1.0}, "--weight: has no effect with"),
        ({"objective": "object_recall", "cell": 3}, "--cell 3: expected a divisor of 32"),
        ({"objective": "soft_jaccard", "samples": 2}, "--samples: has no effect"),
    ],
)
def test_flags_that_cannot_be_meant(args: common.Args, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        ro.run(make(args, "run", **changes))
    assert not Path("run").exists()
