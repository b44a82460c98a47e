"""Rewards by hand, estimators against enumeration and brute force, and what a run promises."""

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import like, whole_and_cut
from test_methods import scramble
from test_run import same, weights

import benchmark
import common
import reward_opt as ro
from common import IGNORE, UserError

WEIGHTS = torch.tensor([0.2, 0.5, 2.3], dtype=torch.float64)
# Of 2x3 pixels with 3 classes: all classes, one without class 1, one with two ignored pixels.
TRUTHS = torch.tensor(
    [[[0, 1, 2], [2, 2, 1]], [[0, 0, 2], [2, 0, 0]], [[IGNORE, 1, 1], [1, 0, IGNORE]]]
)
ALL_MAPS = torch.tensor(list(itertools.product(range(3), repeat=6))).view(-1, 2, 3)  # [729,2,3]


def made(args: common.Args, out: str, **changes) -> ro.Args:
    return like(args, ro.Args, **{"out": Path(out), **changes})


# ---- Rewards ------------------------------------------------------------------------------------
def test_rewards_by_hand():
    """Truth 0 0 1 1, drawn 0 1 1 1: IoU 1/2 and 2/3. Then class 2 drawn that the truth has not."""
    truth = torch.tensor([[[0, 0, 1, 1, IGNORE]], [[0, 0, 1, 1, IGNORE]]])
    drawn = torch.tensor([[[0, 1, 1, 1, 0]], [[0, 2, 1, 1, 2]]])
    rewards = {name: reward(drawn, truth, WEIGHTS) for name, reward in ro.REWARDS.items()}
    w = WEIGHTS.tolist()
    expected = {
        "miou": [(1 / 2 + 2 / 3) / 2, (1 / 2 + 1) / 2],
        "weighted_iou": [(w[0] / 2 + w[1] * 2 / 3) / (w[0] + w[1]), (w[0] / 2 + w[1]) / 0.7],
        "accuracy": [3 / 4, 3 / 4],
    }
    for name, values in expected.items():
        torch.testing.assert_close(rewards[name], torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("name", ro.REWARDS)
def test_an_image_without_a_valid_pixel_counts_nothing(name: str):
    labels = torch.zeros(1, 2, 3, dtype=torch.int64)
    assert ro.REWARDS[name](labels, torch.full_like(labels, IGNORE), WEIGHTS).item() == 0


# ---- Estimators ---------------------------------------------------------------------------------
@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [1,2,3,3], as a leaf, and their likelihood of each of ALL_MAPS [729]."""
    logits = 1.5 * torch.randn(1, 2, 3, 3, generator=common.generator(5), dtype=torch.float64)
    logits.requires_grad_()
    return logits, likelihood(logits)


def likelihood(logits: torch.Tensor) -> torch.Tensor:
    log_p = logits.log_softmax(dim=3).expand(len(ALL_MAPS), -1, -1, -1)
    return log_p.gather(3, ALL_MAPS[..., None]).sum(dim=(1, 2, 3)).exp()


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("name", ro.REWARDS)
def test_counterfactual_is_unbiased(name: str, truth: torch.Tensor, problem):
    """Each map's estimate, weighed by its likelihood, sums to the gradient of sum P(y) R(y)."""
    logits, chance = problem
    reward, truths = ro.REWARDS[name], truth.expand_as(ALL_MAPS)
    expected = torch.autograd.grad(chance @ reward(ALL_MAPS, truths, WEIGHTS), logits)[0]
    p = likelihood(logits).detach()
    softmax = logits.softmax(dim=3).expand(len(ALL_MAPS), -1, -1, -1)
    estimates = ro.counterfactual(softmax, ALL_MAPS, truths, reward, WEIGHTS)  # [729]
    mean = torch.autograd.grad(p @ estimates, logits)[0]
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)
    assert expected.abs().max() > 1e-3


@pytest.mark.parametrize("name", ro.REWARDS)
def test_leave_one_out_is_unbiased(name: str, problem):
    """Over all 729 x 729 pairs of maps."""
    logits, chance = problem
    reward, truths = ro.REWARDS[name], TRUTHS[2].expand_as(ALL_MAPS)
    rewards = reward(ALL_MAPS, truths, WEIGHTS)
    expected = torch.autograd.grad(chance @ rewards, logits)[0]
    p = likelihood(logits).detach()
    log_p = logits.log_softmax(dim=3).expand(len(ALL_MAPS), -1, -1, -1)
    mean = torch.zeros_like(logits)
    for shift in range(len(ALL_MAPS)):  # the second of each pair, for every first at once
        pair = torch.stack([ALL_MAPS, ALL_MAPS.roll(shift, dims=0)])
        both = torch.stack([rewards, rewards.roll(shift)])
        estimates = ro.leave_one_out(log_p, pair, truths, both)  # [729]
        mean += torch.autograd.grad((p * p.roll(shift)) @ estimates, logits, retain_graph=True)[0]
    torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ro.REWARDS)
def test_the_closed_form_equals_brute_force(name: str):
    """Each pixel's label exchanged for each class and the reward taken anew, equal to the last bit;
    with ignored pixels, with classes that only the truth, only the drawn map or neither has."""
    c, reward = 5, ro.REWARDS[name]
    rng = np.random.default_rng(0)
    truth = torch.from_numpy(rng.choice([0, 1, 3, IGNORE], (4, 3, 4)))
    labels = torch.from_numpy(rng.choice([0, 1, 2], (4, 3, 4)))
    truth[1], truth[2], labels[2] = IGNORE, 3, 3  # nothing valid; all right, all unions but one 0
    truth[3, 0, 0], labels[3] = 1, 2  # the union of a class may vanish and appear
    weights = torch.from_numpy(rng.random(c))
    p = torch.full((4, 3, 4, c), 1 / c, dtype=torch.float64, requires_grad=True)
    ro.counterfactual(p, labels, truth, reward, weights).sum().backward()  # p's gradient: the gains
    now = reward(labels, truth, weights)
    for h, w, k in itertools.product(range(3), range(4), range(c)):
        other = labels.clone()
        other[:, h, w] = k
        gain = reward(other, truth, weights) - now
        assert torch.equal(p.grad[:, h, w, k], gain * (truth[:, h, w] != IGNORE))
        assert (gain[truth[:, h, w] == IGNORE] == 0).all()


def test_a_batch_as_one_map_has_one_reward(args: common.Args):
    """--over batch: the gradient equals that of the images set side by side."""
    logits = torch.randn(2, 3, 4, 6, generator=common.generator(1), dtype=torch.float64)
    truth = torch.randint(3, (2, 4, 6), generator=common.generator(2))
    beside = torch.cat([*logits], dim=1)[None], torch.cat([*truth], dim=0)[None]
    gradients = []
    for (x, t), over in (((logits, truth), "batch"), (beside, "image")):
        x, settings = x.clone().requires_grad_(), made(args, "run", over=over)
        ro.reward_loss(x, t, WEIGHTS, settings, common.generator(3))[0].backward()
        gradients.append(torch.cat([*x.grad], dim=1))
    torch.testing.assert_close(*gradients)


def test_samples_follow_the_probabilities():
    p = torch.tensor([0.0, 0.7, 0.0, 0.3], dtype=torch.float64).expand(1, 200, 300, 4)
    shares = ro.sample(p, common.generator(0)).flatten().bincount(minlength=4) / 60_000
    torch.testing.assert_close(shares, p[0, 0, 0].float(), atol=0.01, rtol=0)
    assert shares[0] == shares[2] == 0


@pytest.mark.parametrize("estimator", ["counterfactual", "leave_one_out", "reweighted_ce"])
@pytest.mark.parametrize("name", ro.REWARDS)
def test_climbing_raises_the_reward(args: common.Args, name: str, estimator: str):
    """On free logits of few pixels every estimator finds the truth (REINFORCE may settle for less),
    and leaves ignored pixels."""
    settings = made(args, "run", reward=name, estimator=estimator, over="image")
    logits = torch.zeros(3, 3, 2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for step in range(100):
        loss, _ = ro.reward_loss(logits, TRUTHS, WEIGHTS, settings, common.generator(step))
        optimizer.zero_grad()
        loss.backward()
        assert (logits.grad[2, :, 0, 0] == 0).all() and (logits.grad[2, :, 1, 2] == 0).all()
        optimizer.step()
    found = ro.REWARDS[name](logits.argmax(dim=1), TRUTHS, WEIGHTS)
    assert found.min() > (0.7 if estimator == "leave_one_out" else 0.99)


def test_a_reward_of_another_kind(args: common.Args, monkeypatch: pytest.MonkeyPatch):
    """The share of columns without a mistake: no function of counts, so leave_one_out climbs it."""

    def columns(labels, truth, weights):
        return ((labels == truth) | (truth == IGNORE)).all(dim=1).double().mean(dim=1)

    monkeypatch.setitem(ro.REWARDS, "columns", columns)
    settings = made(args, "run", reward="columns", estimator="leave_one_out", samples=16)
    logits = torch.zeros(3, 3, 2, 3, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    for step in range(150):
        optimizer.zero_grad()
        ro.reward_loss(logits, TRUTHS, WEIGHTS, settings, common.generator(step))[0].backward()
        optimizer.step()
    assert columns(logits.argmax(dim=1), TRUTHS, WEIGHTS).mean() > 0.75
    with pytest.raises(UserError, match="counterfactual: needs a reward of counts, not columns"):
        ro.run(made(args, "run", reward="columns"))


# ---- Looking on ---------------------------------------------------------------------------------
def test_counterfactual_at_one_sample_varies_a_tenth_of_leave_one_out_at_four(args: common.Args):
    """At most, on a batch of the miniature, by the gradient with respect to the logits."""
    args = common.resolve(made(args, "run", size=(64, 128), labelled=4), "x")
    few = common.load(args, "target_few")
    batch = common.Batches(few, 4, 0, torch.device("cpu"))(1)
    torch.manual_seed(0)
    logits = common.Network("tiny", 10)(batch.images)
    variances = {}
    for estimator, over in itertools.product(
        ("counterfactual", "leave_one_out"), ("image", "batch")
    ):
        one = dataclasses.replace(args, estimator=estimator, over=over)
        rng, ones = common.generator(0), torch.ones(10, dtype=torch.float64)
        found = ro.estimates(logits, batch.labels, ones, one, rng, n=4)
        variances[estimator, over] = ro.signal_and_noise(found)[1]
    for over in ("image", "batch"):
        assert variances["counterfactual", over] < variances["leave_one_out", over] / 10


def test_signal_and_noise_of_two_estimates(args: common.Args):
    """Of two: their product, and half their squared distance, both means over independent draws."""
    one, other = torch.randn(2, 1, 3, 2, 3, dtype=torch.float64, generator=common.generator(0))
    signal, noise = ro.signal_and_noise(torch.stack([one, other]))
    torch.testing.assert_close(signal, (one * other).sum())
    torch.testing.assert_close(noise, (one - other).square().sum() / 2)
    alone = one[:, :, :1, :1]  # one pixel: there is no other to draw, each estimate is exact
    settings = made(args, "run", over="image")
    truth, rng = TRUTHS[:1, :1, :1], common.generator(0)
    found = ro.estimates(alone, truth, WEIGHTS, settings, rng, n=8)
    assert ro.signal_and_noise(found)[1] < 1e-25 and found.abs().max() > 0.01


def test_divergence_by_hand():
    """p = (1/2, 1/2) and q = (1/4, 3/4): log 2, and log 2 - log(3)/2 nats."""
    p = torch.tensor([0.5, 0.5]).log().view(1, 2, 1, 1)
    q = torch.tensor([0.25, 0.75]).log().view(1, 2, 1, 1)
    entropy, kl = ro.divergence(p + 3, q - 4)
    assert entropy.item() == pytest.approx(np.log(2), rel=1e-5)
    assert kl.item() == pytest.approx(np.log(2) - np.log(3) / 2, rel=1e-5)
    assert ro.divergence(p, p)[1] == 0


# ---- Runs ---------------------------------------------------------------------------------------
@pytest.mark.usefixtures("no_figures")
def test_without_the_reward_it_is_the_few_label_baseline(args: common.Args):
    """The same labels, updates, augmentation and schedule: the difference is the reward alone."""
    ro.run(made(args, "one", weight=0.0))
    row = like(args, benchmark.BaselineArgs, out=Path("two"), row="few_label")
    benchmark.run_baseline(row)
    assert same(weights(Path("one")), weights(Path("two")))
    ro.run(made(args, "three", weight=1.0))
    assert not same(weights(Path("one")), weights(Path("three")))


@pytest.mark.parametrize("reward_on", ["few", "source", "teacher"])
def test_the_row_says_what_it_used(args: common.Args, mini: Path, reward_on: str, monkeypatch):
    """Other labels of the photos change the network where the row says so, and only there."""
    import shutil

    shutil.copytree(mini, "data2")
    scramble(Path("data2"))
    result = ro.run(made(args, "one", reward_on=reward_on, look_every=2))
    assert (result.steps, result.target_labels) == (6, 2 if reward_on == "few" else 0)
    for name in ("reward", "gradient", "curves", "predictions"):
        assert Path(f"one/figures/{name}.png").stat().st_size > 10_000
    line = [line for line in common.read_scalars(Path("one")) if "reward" in line][-1]
    for key in ("reward", "argmax_reward", "signal_to_noise", "entropy", "kl", "ce_loss"):
        assert np.isfinite(line[key])
    monkeypatch.setattr(ro, "draw_rewards", lambda *_: None)
    ro.run(made(args, "two", reward_on=reward_on, look_every=2, data="data2"))
    assert same(weights(Path("one")), weights(Path("two"))) == (reward_on != "few")


@pytest.mark.usefixtures("no_figures")
def test_looking_changes_nothing(args: common.Args):
    ro.run(made(args, "one", look_every=1))
    ro.run(made(args, "two", look_every=100))
    assert same(weights(Path("one")), weights(Path("two")))


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("stage", ["source", "reward"])
def test_a_run_that_is_cut_off_ends_with_the_same_weights(
    args: common.Args, stage: str, monkeypatch: pytest.MonkeyPatch
):
    settings = {"reward_on": "teacher", "steps": 8}
    whole_and_cut(monkeypatch, ro.run, made(args, "whole", **settings), (stage,), at=3)
    assert same(weights(Path("whole")), weights(Path("cut")))


@pytest.mark.usefixtures("no_figures")
def test_init_replaces_the_first_stage(args: common.Args):
    ro.run(made(args, "one"))
    result = ro.run(made(args, "two", init=Path("one/checkpoint.pt")))
    assert result.steps == json.loads(Path("two/result.json").read_text())["steps"] == 3
    for flag, value in (("reward_share", 1.5), ("samples", 0), ("look_every", 0)):
        with pytest.raises(UserError, match=f"--{flag.replace('_', '-')}: expected"):
            ro.run(made(args, "three", **{flag: value}))
    with pytest.raises(UserError, match="--samples: leave_one_out needs at least 2"):
        ro.run(made(args, "three", estimator="leave_one_out", samples=1))
