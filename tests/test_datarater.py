"""Meta-gradients against autograd and finite differences; scores, choices and runs by hand."""

import copy
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import like, whole_and_cut
from PIL import Image
from torch import Tensor, nn

import benchmark
import common
import datarater as dr
from common import AUGMENTATIONS, IGNORE, UserError

SHORT = {"meta_steps": 4, "population": 1, "shrink": 1, "inner_batch": 1, "warm_up": 2}


def make(args: common.Args, out: str = "run", **changes) -> dr.Args:
    return like(args, dr.Args, **{**SHORT, "out": Path(out), **changes})


def settings(args: common.Args, **changes) -> dr.Args:
    return dr.with_lengths(common.resolve(make(args, **changes), "datarater"))


def same_weights(*folders: str) -> bool:
    a, b = (common.read_checkpoint(Path(f) / "checkpoint.pt")["net"] for f in folders)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- Meta-gradients -----------------------------------------------------------------------------
class Smooth(nn.Module):
    """A network with batch normalisation and an auxiliary head, without kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head, self.aux = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, aux: bool) -> list[Tensor]:
        x = self.drop(F.softplus(self.norm(self.conv(x))))
        return [self.head(x), self.aux(x)]


class Body(common.Tiny):
    """The network of the miniature, without the cast of its logits to float32."""

    def forward(self, x: Tensor, aux: bool) -> list[Tensor]:
        return [common.upsample(y, x.shape[2:]) for y in super().forward(x).values()]


def problem(net: nn.Module, updates: int, dtype: torch.dtype, size: tuple[int, int]) -> tuple:
    """Arguments of `mixed`: an inner network in the middle of its training."""
    torch.manual_seed(0)
    member = dr.InnerNetwork(net).to(dtype)
    member.momentum = torch.rand_like(member.momentum) * 0.01

    def batch(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(3, (count, *size))
        labels[0, :2] = IGNORE
        return torch.rand(count, 3, *size, dtype=dtype), labels

    batches = [batch(4) for _ in range(updates)]
    weights = torch.rand(updates, 4, dtype=dtype).softmax(dim=1)
    return member, batches, weights, batch(3), dr.Args(inner_lr=0.05, inner_decay=0.1)


def unroll(member: dr.InnerNetwork, batches, weights, photos, args) -> tuple[Tensor, ...]:
    """The same as `mixed` by reverse mode alone, which keeps the graph of all updates."""
    weights = weights.clone().requires_grad_()
    theta, momentum, losses = member.theta().requires_grad_(), member.momentum, []
    for batch, w in zip(batches, weights, strict=True):
        losses.append(member.losses(theta, *batch))
        (gradient,) = torch.autograd.grad(w @ losses[-1], theta, create_graph=True)
        theta, momentum = dr.sgd(theta, momentum, gradient, args)
    member.update(theta, momentum)
    member.eval()
    outer_loss = member.losses(theta, *photos).mean()
    member.train()
    (to_weights,) = torch.autograd.grad(outer_loss, weights)
    return to_weights, outer_loss.detach(), torch.stack(losses).detach()


@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_mixed_equals_the_unrolled_derivative(updates: int, dtype: torch.dtype, tolerance: float):
    member, *given = problem(Body(3), updates, dtype, (32, 32))
    other = copy.deepcopy(member)
    a, b = dr.mixed(member, *given), unroll(other, *given)
    assert (a[0] - b[0]).norm() <= tolerance * b[0].norm() != 0
    torch.testing.assert_close(a[1:], b[1:])
    # The network is trained, and its running statistics are updated once an update.
    torch.testing.assert_close(member.state_dict(), other.state_dict())
    assert member.state_dict()["net.stem.1.num_batches_tracked"] == updates


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_mixed_equals_finite_differences(updates: int):
    net = Smooth()
    net.norm.momentum = 0.0  # running statistics are constants to the meta-gradient
    member, batches, weights, *given = problem(net, updates, torch.float64, (6, 8))
    expected, step = torch.zeros_like(weights), 1e-5
    for t, i in product(range(updates), range(4)):
        losses = []
        for sign in (1, -1):
            moved = weights.clone()
            moved[t, i] += sign * step
            losses.append(dr.mixed(copy.deepcopy(member), batches, moved, *given)[1])
        expected[t, i] = (losses[0] - losses[1]) / (2 * step)
    result = dr.mixed(member, batches, weights, *given)[0]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-8)


def test_sgd_equals_that_of_torch():
    parameter, args = nn.Parameter(torch.randn(5)), dr.Args(inner_lr=0.1, inner_decay=0.0)
    reference = torch.optim.SGD([parameter], lr=0.1, momentum=dr.MOMENTUM)
    theta, momentum = parameter.detach().clone(), torch.zeros(5)
    for _ in range(5):
        parameter.grad = torch.randn(5)
        reference.step()
        theta, momentum = dr.sgd(theta, momentum, parameter.grad, args)
    torch.testing.assert_close(theta, parameter.detach())


def test_image_losses_are_cross_entropies_of_each_image():
    outputs, labels = [100 * torch.randn(3, 4, 5, 6) for _ in range(2)], torch.randint(4, (3, 5, 6))
    labels[0, 0], labels[2] = IGNORE, IGNORE
    losses = dr.image_losses(outputs, labels)
    for i in range(2):
        image = slice(i, i + 1)
        first, aux = (
            F.cross_entropy(z[image], labels[image], ignore_index=IGNORE) for z in outputs
        )
        torch.testing.assert_close(losses[i], first + common.AUX_WEIGHT * aux)
    assert losses[2] == 0  # and not NaN, where nothing is labelled


# ---- Meta-training ------------------------------------------------------------------------------
def test_inner_networks_start_anew_in_turns():
    args = dr.Args(population=3, lifetime=6)
    steps = {p: [s for s in range(1, 15) if dr.starts_anew(s, p, args)] for p in range(3)}
    assert steps == {0: [1, 7, 13], 1: [1, 5, 11], 2: [1, 3, 9]}


def test_the_rater_learns_which_augmentation_harms(args: common.Args):
    """Of an image as it is and one of noise, the first."""

    def noise(images: Tensor, rng: torch.Generator) -> Tensor:
        return torch.rand(images.shape, generator=rng)

    args = settings(args, inner_batch=2, meta_lr=3e-3, meta_steps=30, warm_up=30, lifetime=100)
    augmentations = {"original": common.identity, "noise": noise}
    run, rater = common.Run(args, "datarater", stages=2), dr.Rater()
    source, few = common.load(run.args, "source"), common.load(run.args, "target_few")
    dr.meta_train(run, rater, source, few, augmentations)
    candidates = dr.Candidates(source, augmentations, 0)
    scores = dr.analyze_with_individual_augmentations(rater, candidates, 1, run.device)
    assert (scores[:, 0] > scores[:, 1]).mean() > 0.9


# ---- Candidates and choice ----------------------------------------------------------------------
def test_candidates_depend_on_names_and_not_on_order(args: common.Args):
    split, rater = common.load(settings(args), "source"), dr.Rater()
    nn.init.normal_(rater[-2].weight)
    order = np.random.default_rng(0).permutation(len(split))
    names = tuple(split.names[n] for n in order)
    shuffled = common.Split(split.dataset, names, split.images[order], split.labels[order])
    both = [dr.Candidates(s, AUGMENTATIONS, 0) for s in (split, shuffled)]
    analyze, device = dr.analyze_with_individual_augmentations, torch.device("cpu")
    a, b = (analyze(rater, candidates, 1, device) for candidates in both)
    np.testing.assert_allclose(a[order], b, rtol=1e-5)
    assert len(np.unique(a)) == a.size


def test_the_file_says_what_was_trained_on(args: common.Args):
    split = common.load(settings(args), "source")
    candidates, kinds = dr.Candidates(split, AUGMENTATIONS, 0), list(AUGMENTATIONS)
    scores = np.random.default_rng(0).random((len(split), 4), np.float32)
    choice = dr.chosen(scores, 2, "best", 0)
    dr.write_choice(Path("best.pt"), candidates, scores, choice)
    dr.write_set(Path("set"), candidates, choice)
    written = common.load_set(Path("set"), split.dataset, (32, 64))
    table = torch.load("best.pt", weights_only=True)
    assert list(table) == list(split.names) and len(written) == 2 * len(split)
    for n, entry in enumerate(table.values()):
        ranked = sorted(entry["scores"], key=entry["scores"].get, reverse=True)
        assert entry["index"] == n and entry["choice"] == ranked[:2]
        for j, kind in enumerate(entry["choice"]):
            expected = candidates.image(n, kinds.index(kind))
            assert (written.images[2 * n + j] == expected).all()
            assert (written.labels[2 * n + j] == split.labels[n]).all()
            assert kind != "original" or (expected == split.images[n]).all()


def test_rules_of_choice():
    scores = np.array([[0.3, 0.1, 0.9, 0.5], [4, 3, 2, 1]])
    assert dr.chosen(scores, 2, "best", 0).tolist() == [[2, 3], [0, 1]]
    assert dr.chosen(scores, 2, "worst", 0).tolist() == [[1, 0], [3, 2]]
    many = dr.chosen(np.tile(scores, (3000, 1)), 2, "random", 0)
    assert all(len(set(row)) == 2 for row in many.tolist())
    assert np.bincount(many.ravel()) == pytest.approx([3000] * 4, rel=0.1)


def test_lengths_scale_with_the_steps(args: common.Args):
    names = ("meta_steps", "warm_up", "lifetime", "inner_updates", "inner_batch")
    given = like(replace(args, steps=400), dr.Args)
    for changes, expected in (
        ({}, (200, 300, 100, 2, 4)),
        ({"corrupt": 0.1}, (100, 1000, 100, 16, 16)),
        ({"steps": 2, "warm_up": 0}, (1, 0, 1, 2, 4)),
    ):
        result = dr.with_lengths(replace(given, **changes))
        assert tuple(getattr(result, name) for name in names) == expected


def test_corruption_and_auroc(args: common.Args):
    split = common.load(settings(args), "source")
    damaged, amount = dr.corrupted(split, 0.25, 0)
    changed = (damaged.images != split.images).any(axis=3).mean(axis=(1, 2))
    assert (amount > 0).sum() == round(0.25 * len(split)) and damaged.labels is split.labels
    np.testing.assert_allclose(changed, amount, atol=0.05)
    assert amount[amount > 0].min() >= 0.1 and amount.max() <= 0.9
    scores, bad = np.array([1.0, 2, 2, 3, 5]), np.array([True, False, True, False, False])
    assert dr.auroc(scores, bad) == pytest.approx(5.5 / 6)  # 1 < 2 3 5, 2 = 2, 2 < 3 5


# ---- Runs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("corrupt", [0.0, 0.2])
def test_a_run_writes_its_figures_and_a_training_set(args: common.Args, corrupt: float):
    result = dr.run(make(args, corrupt=corrupt, inner_batch=2, inner_updates=2, lifetime=2))
    assert (result.steps, result.target_labels) == (6, 2)
    # Four meta-steps of two updates, and two warm-ups of two.
    assert result.other_updates == "12 updates of inner networks, 4 meta-gradients"
    for name in ("scores", "meta_losses", "corruption" if corrupt else "augmentation_scores"):
        assert Path(f"run/figures/{name}.png").stat().st_size > 5000
    table = torch.load("run/best_augmentations_step_4.pt", weights_only=True)
    dataset = common.BENCHMARKS["vkitti2kitti"].source
    assert len(common.load_set(Path("run/set"), dataset, (32, 64))) == len(table)


@pytest.mark.usefixtures("no_figures")
def test_original_is_the_baseline_without_any_method(args: common.Args):
    result = dr.run(make(args, "original", choose="original"))
    assert (result.target_labels, result.other_updates) == (0, "")
    benchmark.run_baseline(like(args, benchmark.BaselineArgs, out=Path("source_only")))
    dr.run(make(args, "random", choose="random"))
    assert same_weights("source_only", "original")
    assert not same_weights("random", "original")


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_cut_off_ends_with_the_same_weights(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    """In meta-training, after one inner network has started anew, and in the last stage."""
    given = make(args, lifetime=2, population=2)
    whole_and_cut(monkeypatch, dr.run, given, ("rater", "source"), at=3)
    assert same_weights("whole", "cut")


@pytest.mark.usefixtures("no_figures")
def test_the_few_labels_reach_the_scores_and_no_others_do(args: common.Args, mini: Path):
    shutil.copytree(mini, "data2")
    few = common.load(settings(args), "target_few").names
    files = sorted(Path("data2/kitti/training/semantic").iterdir())

    def scores_of(out: str, data: Path) -> dict:
        dr.run(make(replace(args, steps=1), out, meta_steps=2, data=str(data)))
        return torch.load(f"{out}/best_augmentations_step_2.pt", weights_only=True)

    def other_labels(paths: list[Path]) -> None:
        for path in paths:
            Image.fromarray(np.full_like(np.asarray(Image.open(path)), 7)).save(path)

    before = scores_of("one", mini)
    other_labels([f for f in files if not any(f.name in photo for photo in few)])
    assert scores_of("two", Path("data2")) == before
    assert same_weights("one", "two")
    other_labels(files)
    assert scores_of("three", Path("data2")) != before


def test_what_cannot_run(args: common.Args):
    for changes, message in (
        ({"k": 9}, "--k 9: expected 1 to 4"),
        ({"k": 2, "choose": "original"}, "--k 2: expected 1 to 1"),
        ({"shrink": 2}, "--shrink 2: --size over it"),
        ({"augmentations": ("blur", "sharpen")}, "--augmentations blur sharpen: expected names"),
        ({"augmentations": ("blur",)}, "--inner-batch 1: a single candidate"),
        ({"net": "lraspp"}, "--net lraspp"),
        ({"corrupt": 0.001, "inner_batch": 2}, "--corrupt 0.001: 0 of "),
    ):
        with pytest.raises(UserError, match=message):
            dr.run(make(args, **changes))
