"""Rewards by hand, estimators against enumeration and brute force, and what a run promises."""

import itertools
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import like, whole_and_cut

import common
import reward_opt as ro
from common import IGNORE, UserError

WEIGHTS = torch.tensor([0.2, 0.5, 2.3], dtype=torch.float64)
# Of 2x3 pixels with 3 classes: all classes, one without class 1, one with two ignored pixels.
TRUTHS = torch.tensor(
    [[[0, 1, 2], [2, 2, 1]], [[0, 0, 2], [2, 0, 0]], [[IGNORE, 1, 1], [1, 0, IGNORE]]]
)
ALL_MAPS = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, 2, 3)  # [729,2,3]


def make(args: common.Args, out: str, **changes) -> ro.Args:
    return like(args, ro.Args, **{"out": Path(out), **changes})


def weights(folder: str) -> dict[str, torch.Tensor]:
    return common.read_checkpoint(Path(folder) / "checkpoint.pt")["net"]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def reward_of(name: str, labels: torch.Tensor, truth: torch.Tensor, w=WEIGHTS) -> torch.Tensor:
    return ro.REWARDS[name](*ro.counts(labels, truth, len(w)), w)


# ---- Rewards ------------------------------------------------------------------------------------
def test_rewards_by_hand():
    """Truth 0 0 1 1, drawn 0 1 1 1: IoU 1/2 and 2/3. Then class 2 drawn that the truth has not."""
    truth = torch.tensor([[[0, 0, 1, 1, IGNORE]], [[0, 0, 1, 1, IGNORE]]])
    drawn = torch.tensor([[[0, 1, 1, 1, 0]], [[0, 2, 1, 1, 2]]])
    w = WEIGHTS.tolist()
    expected = {
        "miou": [(1 / 2 + 2 / 3) / 2, (1 / 2 + 1) / 2],
        "weighted_iou": [(w[0] / 2 + w[1] * 2 / 3) / (w[0] + w[1]), (w[0] / 2 + w[1]) / 0.7],
        "accuracy": [3 / 4, 3 / 4],
    }
    for name, values in expected.items():
        result = reward_of(name, drawn, truth)
        torch.testing.assert_close(result, torch.tensor(values, dtype=torch.float64))
        assert (reward_of(name, drawn, torch.full_like(truth, IGNORE)) == 0).all()


def test_class_weights_by_hand():
    """1 / (6 + 4), 1 / (4 + 4), 1 / (30 + 4) for counts 6, 4, 30, scaled to mean 1."""
    result = ro.class_weights(np.array([6, 4, 30]), smooth=0.1, classes=("a", "b", "c"))
    np.testing.assert_allclose(result, 3 * np.array([34, 42.5, 10]) / 86.5)
    with pytest.raises(UserError, match="class b has no pixel"):
        ro.class_weights(np.array([5, 0]), 0.0, ("a", "b"))


# ---- Estimators ---------------------------------------------------------------------------------
@pytest.fixture
def logits() -> torch.Tensor:
    """[1,2,3,3], a leaf."""
    torch.manual_seed(0)
    return torch.randn(1, 2, 3, 3, dtype=torch.float64).mul(1.5).requires_grad_()


def likelihood(logits: torch.Tensor) -> torch.Tensor:
    """Of each of ALL_MAPS. -> [729]."""
    log_p = logits.log_softmax(dim=3).expand(len(ALL_MAPS), -1, -1, -1)
    return log_p.gather(3, ALL_MAPS[..., None]).sum(dim=(1, 2, 3)).exp()


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("name", ro.REWARDS)
def test_counterfactual_is_unbiased(name: str, truth: torch.Tensor, logits: torch.Tensor):
    """Each map's estimate, weighted by its likelihood, sums to the gradient of sum P(y) R(y)."""
    truths = truth.expand_as(ALL_MAPS)
    expectation = likelihood(logits) @ reward_of(name, ALL_MAPS, truths)
    expected = torch.autograd.grad(expectation, logits)[0]
    p = logits.softmax(dim=3).expand(len(ALL_MAPS), -1, -1, -1)
    estimates = ro.counterfactual(p, ALL_MAPS, truths, ro.REWARDS[name], WEIGHTS)  # [729]
    mean = torch.autograd.grad(likelihood(logits).detach() @ estimates, logits)[0]
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ro.REWARDS)
def test_leave_one_out_is_unbiased(name: str, logits: torch.Tensor):
    """Over all 729 x 729 pairs of maps."""
    truths = TRUTHS[2].expand_as(ALL_MAPS)
    rewards = reward_of(name, ALL_MAPS, truths)
    expected = torch.autograd.grad(likelihood(logits) @ rewards, logits)[0]
    p = likelihood(logits).detach()
    log_p = logits.log_softmax(dim=3).expand(len(ALL_MAPS), -1, -1, -1)
    mean = torch.zeros_like(logits)
    for shift in range(len(ALL_MAPS)):  # the second map of each pair, for every first one at once
        pair = torch.stack([ALL_MAPS, ALL_MAPS.roll(shift, dims=0)])
        both = torch.stack([rewards, rewards.roll(shift)])
        estimates = ro.leave_one_out(log_p, pair, truths, both)  # [729]
        mean += torch.autograd.grad((p * p.roll(shift)) @ estimates, logits, retain_graph=True)[0]
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ro.REWARDS)
def test_the_table_of_gains_equals_brute_force(name: str):
    """Each pixel's label exchanged for each class and the reward computed anew, to the last bit."""
    c, rng = 5, np.random.default_rng(0)
    truth = torch.from_numpy(rng.choice([0, 1, 3, IGNORE], (4, 3, 4)))
    labels = torch.from_numpy(rng.choice([0, 1, 2], (4, 3, 4)))
    truth[1], truth[2], labels[2] = IGNORE, 3, 3  # nothing valid; all right, all unions but one 0
    truth[3, 0, 0], labels[3] = 1, 2  # the union of a class may vanish and appear
    w = torch.from_numpy(rng.random(c))
    p = torch.full((4, 3, 4, c), 1 / c, dtype=torch.float64, requires_grad=True)
    ro.counterfactual(p, labels, truth, ro.REWARDS[name], w).sum().backward()
    before = reward_of(name, labels, truth, w)
    for y, x, k in itertools.product(range(3), range(4), range(c)):
        other = labels.clone()
        other[:, y, x] = k
        gain = reward_of(name, other, truth, w) - before
        assert torch.equal(p.grad[:, y, x, k], gain)  # p's gradient: the gains


def example(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth logits [2,4,H,W] and labels [2,H,W] with three of the four classes."""
    torch.manual_seed(0)
    coarse = 2 * torch.randn(2, 4, 4, 8)
    noisy = common.upsample(coarse + torch.randn(2, 4, 4, 8), (height, width))
    truth = noisy[:, :3].argmax(dim=1)
    truth[:, :2] = IGNORE
    return common.upsample(coarse, (height, width)).double(), truth


@pytest.mark.parametrize("name", ["miou", "weighted_iou"])
def test_the_reward_gradient_is_that_of_the_soft_jaccard_loss(args: common.Args, name: str):
    """Cosine of the mean of 16 counterfactual estimates and the soft-Jaccard gradient: nearly 1 on
    images of 32x64 pixels; accuracy is linear, so there the two are equal."""
    logits, truth = example(32, 64)
    w = torch.tensor([0.2, 0.5, 2.3, 1.0], dtype=torch.float64)
    leaf = logits.clone().requires_grad_()
    settings, rng = make(args, "run", reward=name), common.generator("test")
    mean = ro.estimates(logits, truth, w, settings, rng, n=16).mean(dim=0)
    loss = ro.soft_jaccard(leaf, truth, w, ro.REWARDS[name])
    soft = -torch.autograd.grad(loss, leaf)[0]
    assert torch.cosine_similarity(mean.flatten(), soft.flatten(), dim=0) > 0.9995
    settings = make(args, "run", reward="accuracy")
    exact = ro.estimates(logits, truth, w, settings, rng, n=1)[0]
    soft = torch.autograd.grad(ro.soft_jaccard(leaf, truth, w, ro.accuracy), leaf)[0]
    torch.testing.assert_close(exact, -soft)


def test_samples_follow_the_probabilities():
    p = torch.tensor([0.0, 0.7, 0.0, 0.3], dtype=torch.float64).expand(1, 200, 300, 4)
    shares = ro.sample(p, common.generator("test")).flatten().bincount(minlength=4) / 60_000
    torch.testing.assert_close(shares, p[0, 0, 0].float(), atol=0.01, rtol=0)
    assert shares[0] == shares[2] == 0


def test_a_batch_as_one_map_has_the_counts_of_all_its_images():
    logits, truth = example(6, 9)
    as_one, truth_as_one = ro.as_one_map(logits, truth)
    separate = ro.counts(logits.argmax(dim=1), truth, 4)
    together = ro.counts(as_one.argmax(dim=1), truth_as_one, 4)
    for a, b in zip(separate, together, strict=True):
        assert torch.equal(a.sum(dim=0, keepdim=True), b)


# ---- Objectives ---------------------------------------------------------------------------------
def test_the_two_weighted_cross_entropies_by_hand():
    logits, truth = example(6, 9)
    w = torch.tensor([0.2, 0.5, 2.3, 1.0], dtype=torch.float64)
    log_p, valid = logits.log_softmax(dim=1), truth != IGNORE
    ce = -log_p.gather(1, truth.where(valid, 0)[:, None])[:, 0]  # [B,H,W]
    expected = (w[truth[valid]] * ce[valid]).sum() / w[truth[valid]].sum()
    torch.testing.assert_close(ro.class_weighted_ce(logits, truth, w), expected)
    result = ro.reweighted_ce(logits, truth, torch.tensor([0.25, 1.0]))
    torch.testing.assert_close(result, 0.75 * ce[0][valid[0]].sum() / valid.sum())


# ---- Runs ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("objective", get_args(get_type_hints(ro.Args)["objective"]))
def test_without_its_weight_every_objective_is_cross_entropy_on_the_labels(
    args: common.Args, objective: str
):
    """The same batches, augmentation and schedule, so the difference is the objective alone."""
    ro.run(make(args, "zero", weight=0.0, objective=objective, over="batch"))
    run = common.Run(make(args, "plain"), "plain", stages=2)
    net = run.network()
    common.train(run, net, common.load(run.args, "source"), 3, "source")
    common.train(run, net, common.load(run.args, "target_few"), 3, "few", lr=run.args.lr / 2)
    run.finish(net, target_labels=2)
    assert equal(weights("zero"), weights("plain"))
    ro.run(make(args, "one", objective=objective))
    assert not equal(weights("zero"), weights("one"))


@pytest.mark.parametrize("reward_on", ["few", "source"])
def test_the_row_says_what_it_used(args: common.Args, reward_on: str):
    result = ro.run(make(args, "one", reward_on=reward_on, estimator="leave_one_out"))
    assert (result.steps, result.target_labels) == (6, 2 if reward_on == "few" else 0)
    assert Path("one/figures/reward.png").exists() and Path("one/figures/gradient.png").exists()
    assert any("argmax_reward" in line for line in common.read_scalars(Path("one")))


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_cut_off_ends_with_the_same_weights(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    whole_and_cut(monkeypatch, ro.run, make(args, "whole", steps=8), ("source", "few"), at=3)
    assert equal(weights("whole"), weights("cut"))
    assert ro.run(make(args, "on", init=Path("cut/checkpoint.pt"))).steps == 3  # one stage


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_share": 1.5}, "--reward-share 1.5: expected"),
        ({"estimator": "leave_one_out", "samples": 1}, "--samples 1: leave_one_out needs at least"),
        ({"objective": "soft_jaccard", "samples": 2}, "--samples: has no effect"),
    ],
)
def test_flags_that_cannot_be_meant(args: common.Args, changes: dict, message: str):
    with pytest.raises(UserError, match=message):
        ro.run(make(args, "run", **changes))
    assert not Path("run").exists()
