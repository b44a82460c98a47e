"""Meta-gradients against autograd and finite differences; scores, choices and runs by hand."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import like, whole_and_cut
from PIL import Image
from test_run import same, weights
from torch import Tensor, nn

import common
import datarater as dr
from common import IGNORE, UserError

SMALL = {
    "meta_steps": 4, "population": 1, "shrink": 1, "inner_batch": 1, "warm_up": 2, "k": 2,
    "compare": False,
}  # fmt: skip


def made(args: common.Args, out: str, **changes) -> dr.Args:
    return dr.settled(like(args, dr.Args, **{**SMALL, "out": Path(out), **changes}))


# ---- Meta-gradients -----------------------------------------------------------------------------
class Smooth(nn.Module):
    """A network with batch normalisation and an auxiliary head, without kinks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head, self.aux = nn.Conv2d(4, 3, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor, aux: bool) -> list[Tensor]:
        x = F.softplus(self.norm(self.conv(x)))
        return [self.head(x), self.aux(x)]


class Body(common.Tiny):
    """Without the cast of its logits to float32."""

    def forward(self, x: Tensor, aux: bool) -> list[Tensor]:
        return [common.upsample(logits, x.shape[2:]) for logits in super().forward(x, aux)]


def problem(
    net: nn.Module, optimizer: str, updates: int, dtype: torch.dtype, size: tuple[int, int]
) -> tuple:
    """Arguments of `mixed` and `unroll`: an inner network in the middle of its training."""
    torch.manual_seed(0)
    f = dr.Functional(net.to(dtype).train())
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()
    vectors = dr.OPTIMIZERS[optimizer].vectors
    state = tuple(torch.rand(vectors, len(theta), dtype=dtype) * 0.01)
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    inner = dr.Inner(theta, state, buffers, 7)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(3, (count, *size))
        labels[0, :2] = IGNORE
        return torch.rand(count, 3, *size, dtype=dtype), labels

    batches = [batch(4) for _ in range(updates)]
    weights = torch.rand(updates, 4, dtype=dtype).softmax(dim=1)
    args = dr.Args(inner_optimizer=optimizer, inner_lr=0.05, inner_decay=0.1)
    return f, inner, batches, weights, batch(3), args


@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_mixed_equals_unroll(updates: int, optimizer: str, dtype: torch.dtype, tolerance: float):
    given = problem(Body(3, False), optimizer, updates, dtype, (32, 32))
    one, other = dr.mixed(*given), dr.unroll(*given)
    assert (one[0] - other[0]).norm() <= tolerance * other[0].norm() and other[0].norm() > 0
    assert one[1].step == other[1].step == 7 + updates
    torch.testing.assert_close(one[1].theta, other[1].theta)
    torch.testing.assert_close(one[1].state, other[1].state)
    torch.testing.assert_close(one[2:], other[2:])
    for name, buffer in one[1].buffers.items():  # as after the updates, and no more often
        torch.testing.assert_close(buffer, other[1].buffers[name])


@pytest.mark.parametrize("updates", [2, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_network_without_any_update(updates: int, optimizer: str):
    """Adam's state is 0 there and the gradients may grow a thousandfold from update to update, so
    that what is undone is lost to rounding."""
    f, inner, batches, weights, photos, args = problem(
        Body(3, False), optimizer, updates, torch.float32, (32, 32)
    )
    state = tuple(torch.zeros_like(vector) for vector in inner.state)
    inner = dr.Inner(inner.theta, state, inner.buffers, 0)
    given = (f, inner, batches, weights, photos, replace(args, inner_lr=2e-3))
    one, other = dr.mixed(*given)[0], dr.unroll(*given)[0]
    assert (one - other).norm() <= 5e-2 * other.norm()


@pytest.mark.parametrize("statistics", ["batch", "running"])
@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_both_equal_finite_differences(statistics: str, updates: int, optimizer: str):
    net = Smooth()
    if statistics == "running":  # constants to the meta-gradient, and so in the differences
        net.norm.momentum = 0.0
    *given, args = problem(net, optimizer, updates, torch.float64, (6, 8))
    args = replace(args, outer_statistics=statistics)
    f, inner, batches, weights, photos = given
    expected, step = torch.zeros_like(weights), 1e-5
    for t, i in product(range(updates), range(4)):
        ends = []
        for sign in (1, -1):
            moved = weights.clone()
            moved[t, i] += sign * step
            ends.append(dr.mixed(f, inner, batches, moved, photos, args)[2])
        expected[t, i] = (ends[0] - ends[1]) / (2 * step)
    for function in (dr.mixed, dr.unroll):
        result = function(*given, args)[0]
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_inner_optimizers_equal_those_of_torch(name: str):
    start, lr = torch.randn(5, dtype=torch.float64), 0.1
    parameter = nn.Parameter(start.clone())
    reference = {
        "sgd": torch.optim.SGD([parameter], lr, momentum=0.9),
        "adam": torch.optim.AdamW([parameter], lr, weight_decay=0.01),
    }[name]
    update, undo, vectors = dr.OPTIMIZERS[name]
    theta, state = start, tuple(torch.zeros(vectors, 5, dtype=torch.float64))
    trace = []
    for step in range(1, 6):
        gradient = torch.randn(5, dtype=torch.float64)
        parameter.grad = gradient
        reference.step()
        trace.append((theta, state, gradient, step))
        theta, state = update(theta, state, gradient, step, lr, 0.01 * (name == "adam"))
    torch.testing.assert_close(theta, parameter.detach(), rtol=1e-6, atol=1e-8)
    for *before, gradient, step in reversed(trace):
        theta, state = undo(theta, state, gradient, step, lr, 0.01 * (name == "adam"))
        torch.testing.assert_close([theta, state], before, rtol=1e-9, atol=1e-12)


def test_image_losses_are_cross_entropies_of_each_image():
    logits, labels = torch.randn(3, 4, 5, 6), torch.randint(4, (3, 5, 6))
    labels[0, 0], labels[2] = IGNORE, IGNORE
    losses = dr.image_losses(logits, labels)
    for i in range(2):
        torch.testing.assert_close(
            losses[i], F.cross_entropy(logits[i : i + 1], labels[i : i + 1], ignore_index=IGNORE)
        )
    assert losses[2] == 0  # and not NaN, where nothing is labelled


# ---- Meta-learning ------------------------------------------------------------------------------
def test_members_start_anew_in_turns(args: common.Args, monkeypatch: pytest.MonkeyPatch):
    args = made(args, "run", population=3, lifetime=6)
    population = dr.Population(common.Run(args, "datarater"), dr.Rater())
    born = {p: [] for p in range(3)}
    monkeypatch.setattr(population, "born", lambda: "new")
    for step in range(1, 15):
        population.members = ["old"] * 3
        population.renew(step)
        for p in range(3):
            born[p] += [step] * (population.members[p] == "new")
    assert born == {0: [7, 13], 1: [5, 11], 2: [3, 9]}


def test_the_rater_learns_which_augmentation_harms(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    """Of an image as it is and one of noise, the first; the inner networks learn meanwhile."""

    def noise(images: Tensor, rng: torch.Generator) -> Tensor:
        return torch.rand(images.shape, generator=rng)

    monkeypatch.setattr(dr, "AUGMENTATIONS", {"original": common.original, "noise": noise})
    args = made(args, "run", augmentations=("original", "noise"), inner_batch=2, meta_lr=3e-3)
    args = replace(args, meta_steps=25, warm_up=0)
    run, rater = common.Run(args, "datarater"), dr.Rater()
    source, few = common.load(run.args, "source"), common.load(run.args, "target_few")
    dr.meta_train(run, rater, source, few)
    scores = dr.analyze_with_individual_augmentations(rater, source, run.args, run.device)
    assert (scores[:, 0] > scores[:, 1]).mean() > 0.9
    lines = common.read_scalars(Path("run"))
    assert lines[-1]["inner_loss"] < 0.9 * lines[0]["inner_loss"]


def test_inner_networks_are_trained_before_they_judge(args: common.Args):
    """Each on batches of its own, and from the seed alone; losses are logged from age 0 on."""
    run = common.Run(made(args, "run", warm_up=21), "datarater")
    args, rater = run.args, dr.Rater()
    dr.meta_train(run, rater, common.load(args, "source"), common.load(args, "target_few"))
    lines = common.read_scalars(Path("run"))
    assert [line["age"] for line in lines] == [0, 10, 20, (21 + 23 + 25 + 27) / 4]
    assert lines[2]["inner_loss"] < lines[0]["inner_loss"]

    f = dr.Functional(common.Network("tiny", len(run.classes)).train())
    population = dr.Population(run, rater)
    parts = [common.load(args, role) for role in ("source", "target_few")]
    batches, photos = (dr.Batches(part, 1, 0, run.device) for part in parts)
    seeds = ((1, 0), (1, 0), (1, 1))
    one, again, other = (
        dr.warmed_up(run, f, population.members[0], batches, photos, seed).theta for seed in seeds
    )
    assert torch.equal(one, again) and not torch.equal(one, other)


# ---- Candidates and choice ----------------------------------------------------------------------
def test_candidates_depend_on_names_and_not_on_order(args: common.Args):
    args = common.resolve(made(args, "run"), "x")
    part, rater = common.load(args, "source"), dr.Rater()
    nn.init.normal_(rater[-2].weight)
    order = np.random.default_rng(0).permutation(len(part))
    names = tuple(part.names[n] for n in order)
    shuffled = common.Part(part.dataset, names, part.images[order], part.labels[order])
    one, other = (
        dr.analyze_with_individual_augmentations(rater, p, args, torch.device("cpu"))
        for p in (part, shuffled)
    )
    assert (one[order] == other).all() and len(np.unique(one)) == one.size


def test_the_file_says_what_was_trained_on(args: common.Args):
    args = common.resolve(made(args, "run", draws=2), "x")
    part, names = common.load(args, "source"), dr.variants(args)
    assert names[:3] == ["original", "blur 0", "blur 1"] and len(names) == 7
    scores = np.random.default_rng(0).random((len(part), 7), np.float32)
    best = dr.chosen(scores, 2, "best", 0)
    dr.write_choice(Path("best.pt"), part, scores, best, args)
    made_of = dr.chosen_set(Path("set.npy"), part, best, args)
    table = torch.load("best.pt", weights_only=True)
    assert list(table) == list(part.names) and len(made_of) == 2 * len(part)
    for n, (name, entry) in enumerate(table.items()):
        ranked = sorted(entry["scores"], key=entry["scores"].get, reverse=True)
        assert entry["index"] == n and entry["choice"] == ranked[:2]
        for j, variant in enumerate(entry["choice"]):
            expected = dr.candidate(part.images[n], name, variant, args.seed)
            assert (made_of.images[2 * n + j] == expected).all()
            assert (made_of.labels[2 * n + j] == part.labels[n]).all()


def test_rules_of_choice():
    scores = np.array([[0.3, 0.1, 0.9, 0.5], [4, 3, 2, 1]])
    assert dr.chosen(scores, 2, "best", 0).tolist() == [[2, 3], [0, 1]]
    assert dr.chosen(scores, 2, "worst", 0).tolist() == [[1, 0], [3, 2]]
    many = dr.chosen(np.tile(scores, (3000, 1)), 2, "random", 0)
    assert all(len(set(row)) == 2 for row in many.tolist())
    assert np.bincount(many.ravel()) == pytest.approx([3000] * 4, rel=0.1)


def test_defaults_for_images_that_are_damaged():
    settled = dr.settled(dr.Args(meta_steps=7))
    assert (settled.meta_steps, settled.inner_updates, settled.inner_batch) == (7, 2, 4)
    assert settled.augmentations == ("original", "blur", "colorjitter", "rgbshift")
    assert (settled.inner_optimizer, settled.inner_lr) == ("adam", 2e-3)
    settled = dr.settled(dr.Args(corrupt=0.1, inner_batch=2))
    assert (settled.meta_steps, settled.inner_updates, settled.inner_batch) == (100, 16, 2)
    assert (settled.warm_up, settled.inner_optimizer, settled.inner_lr) == (1000, "sgd", 0.05)
    assert dr.settled(dr.Args(inner_optimizer="sgd")).inner_lr == 0.05
    assert settled.augmentations == ("original",)


def test_corruption_and_auroc(args: common.Args):
    args = common.resolve(made(args, "run"), "x")
    part = common.load(args, "source")
    damaged, amount = dr.corrupted(part, 0.25, 0)
    changed = (damaged.images != part.images).any(axis=3).mean(axis=(1, 2))
    assert (amount > 0).sum() == round(0.25 * len(part)) and damaged.labels is part.labels
    np.testing.assert_allclose(changed, amount, atol=0.05)
    assert amount[amount > 0].min() >= 0.1 and amount.max() <= 0.9
    scores, bad = np.array([1.0, 2, 2, 3, 5]), np.array([True, False, True, False, False])
    pairs = [(b, g) for b in scores[bad] for g in scores[~bad]]
    expected = sum((b < g) + 0.5 * (b == g) for b, g in pairs) / len(pairs)
    assert dr.auroc(scores, bad) == pytest.approx(expected)


def test_an_image_is_worth_what_the_outer_loss_falls_with_its_weight():
    to_weights = torch.tensor([[1.0, -3, 2, 0], [4, 0, 0, 0]])
    amount = np.array([[0, 0.2, 0.5, 0], [0, 0, 0.25, 0]])
    worth = dr.worth_by_damage(to_weights, amount)
    # Less the means, 0 and 1: [-1 3 -2 0] and [-3 1 1 1].
    means = {"worth_none": (-1 + 0 - 3 + 1 + 1) / 5, "worth_10-30": (3 + 1) / 2, "worth_30-60": -2}
    assert {name: value.item() for name, value in worth.items()} == pytest.approx(means)


# ---- Runs ---------------------------------------------------------------------------------------
def test_a_run_writes_its_figures_and_a_training_set(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    for name in ("draw_curves", "draw_predictions"):
        monkeypatch.setattr(common, name, lambda *_: None)
    result = dr.run(made(args, "run", corrupt=0.2, augmentations=tuple(dr.AUGMENTATIONS)))
    assert (result.steps, result.target_labels) == (6, 2) and "4 meta-gradients" in result.beside
    for name in ("scores", "augmentation_scores", "meta_losses", "corruption"):
        assert Path(f"run/figures/{name}.png").stat().st_size > 5000
    assert any("worth_none" in line for line in common.read_scalars(Path("run")))
    table = torch.load("run/best_augmentations_step_4.pt", weights_only=True)
    assert len(common.load_set(Path("run/set"), "vkitti2", (32, 64))) == 2 * len(table)


def test_two_of_the_controls_are_the_baselines(args: common.Args):
    import benchmark

    args = replace(args, steps=2)
    dr.run(made(args, "run", meta_steps=1, compare=True))
    assert Path("run/figures/mean_iou.png").stat().st_size > 5000
    for row, control in (("source_only", "original"), ("random_aug", "equal")):
        benchmark.run_baseline(like(args, benchmark.BaselineArgs, out=Path(row), row=row))
        assert same(weights(Path(row)), weights(Path("run/controls") / control))


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_cut_off_ends_with_the_same_weights(
    args: common.Args, monkeypatch: pytest.MonkeyPatch
):
    """In meta-training, after one member has started anew, and in the last stage."""
    settings = {"lifetime": 2, "population": 2, "inner_optimizer": "sgd"}
    whole_and_cut(monkeypatch, dr.run, made(args, "whole", **settings), ("meta", "k_top"), at=3)
    assert same(weights(Path("whole")), weights(Path("cut")))


@pytest.mark.usefixtures("no_figures")
def test_the_few_labels_reach_the_scores_and_no_others_do(args: common.Args, mini: Path):
    import shutil

    shutil.copytree(mini, "data2")
    few = common.load(common.resolve(made(args, "x"), "x"), "target_few").names
    files = sorted(Path("data2/kitti/training/semantic").iterdir())

    def scores_of(out: str, data: Path) -> dict:
        dr.run(made(replace(args, steps=1), out, meta_steps=2, data=str(data)))
        return torch.load(f"{out}/best_augmentations_step_2.pt", weights_only=True)

    def other_labels(paths: list[Path]) -> None:
        for path in paths:
            shape = np.asarray(Image.open(path)).shape
            Image.fromarray(np.full(shape, 7, np.uint8)).save(path)

    before = scores_of("one", mini)
    other_labels([f for f in files if not any(f.name in photo for photo in few)])
    assert scores_of("two", Path("data2")) == before
    assert same(weights(Path("one")), weights(Path("two")))
    other_labels(files)
    assert scores_of("three", Path("data2")) != before


def test_what_cannot_run(args: common.Args):
    for changes, message in (
        ({"k": 9}, "--k 9: expected 1 to 4"),
        ({"population": 0}, "--population 0: at least 1"),
        ({"shrink": 2}, "--shrink 2: expected sides"),
        ({"augmentations": ("blur", "sharpen")}, "--augmentations sharpen: expected some of"),
        ({"inner_batch": 1, "augmentations": ("blur",), "k": 1}, "--inner-batch 1: one candidate"),
        ({"draws": 0}, "--draws 0: at least 1"),
        (
            {"augmentations": ("blur", "blur")},
            "--augmentations: expected at least one, and none twice",
        ),
        ({"augmentations": ()}, "--augmentations: expected at least one"),
        ({"corrupt": 0.001, "k": 1, "inner_batch": 2}, "--corrupt 0.001: 0 of "),
        ({"corrupt": 1.0, "k": 1, "inner_batch": 2}, "--corrupt 1.0: expected a share"),
    ):
        with pytest.raises(UserError, match=message):
            dr.run(made(args, "run", **changes))
