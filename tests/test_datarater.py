"""Meta-gradients against autograd and finite differences; scores, choices and runs by hand."""

import copy
import shutil
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import begun, like, same_weights, whole_and_cut
from PIL import Image
from torch import Tensor, nn

import baseline
import common
import datarater as dr
import datasets
from datasets import IGNORE, UserError

SHORT = {"meta_steps": 4, "inner_batch": 1, "warm_up": 2}


def make(args: common.Args, out: str = "run", **changes) -> dr.Args:
    return like(args, dr.Args, **{**SHORT, "out": Path(out), **changes})


def settings(args: common.Args, **changes) -> dr.Args:
    return dr.fill_in(common.resolve(make(args, **changes), "datarater"))


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
    """Arguments of `weight_gradient`: an inner network in the middle of its training."""
    torch.manual_seed(0)
    inner = dr.InnerNetwork(net).to(dtype)
    inner.momentum = torch.rand_like(inner.momentum) * 0.01
    inner.scale = 0.5 + torch.rand_like(inner.scale)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(3, (count, *size))
        labels[0, :2] = IGNORE
        return torch.rand(count, 3, *size, dtype=dtype), labels

    batches = [batch(4) for _ in range(updates)]
    weights = torch.rand(updates, 4, dtype=dtype).softmax(dim=1)
    return inner, batches, weights, batch(3), 0.5


def unroll(inner: dr.InnerNetwork, batches, weights, photos, lr) -> tuple[Tensor, ...]:
    """The same as `weight_gradient` by reverse mode alone, which keeps the graph of all updates."""
    weights = weights.clone().requires_grad_()
    theta, momentum, losses = inner.theta().requires_grad_(), inner.momentum, []
    for batch, w in zip(batches, weights, strict=True):
        losses.append(inner.losses(theta, *batch))
        (gradient,) = torch.autograd.grad(w @ losses[-1], theta, create_graph=True)
        theta, momentum = dr.adam(theta, momentum, gradient, inner.scale, lr)
    inner.set_state(theta, momentum)
    inner.eval()
    outer_loss = inner.losses(theta, *photos).mean()
    inner.train()
    (d_weights,) = torch.autograd.grad(outer_loss, weights)
    return d_weights, outer_loss.detach(), torch.stack(losses).detach()


@pytest.mark.parametrize("updates", [1, 2, 4])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float64, 1e-8)])
def test_weight_gradient_equals_the_unrolled_derivative(updates, dtype, tolerance):
    inner, *given = problem(Body(3), updates, dtype, (32, 32))
    other = copy.deepcopy(inner)
    a, b = dr.weight_gradient(inner, *given), unroll(other, *given)
    assert (a[0] - b[0]).norm() <= tolerance * b[0].norm() != 0
    torch.testing.assert_close(a[1:], b[1:])
    # The network is trained, and its running statistics are updated once an update.
    torch.testing.assert_close(inner.state_dict(), other.state_dict())
    assert inner.state_dict()["net.stem.1.num_batches_tracked"] == updates


@pytest.mark.parametrize("updates", [1, 2, 4])
def test_weight_gradient_equals_finite_differences(updates: int):
    net = Smooth()
    net.norm.momentum = 0.0  # running statistics are constants to the meta-gradient
    inner, batches, weights, *given = problem(net, updates, torch.float64, (6, 8))
    expected, step = torch.zeros_like(weights), 1e-5
    for t, i in product(range(updates), range(4)):
        losses = []
        for sign in (1, -1):
            moved = weights.clone()
            moved[t, i] += sign * step
            losses.append(dr.weight_gradient(copy.deepcopy(inner), batches, moved, *given)[1])
        expected[t, i] = (losses[0] - losses[1]) / (2 * step)
    result = dr.weight_gradient(inner, batches, weights, *given)[0]
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-8)


def test_an_update_is_that_of_adam():
    """Where all gradients have the same size, its second moments are constant."""
    parameter, size = nn.Parameter(torch.randn(5)), torch.rand(5)
    reference = torch.optim.Adam([parameter], lr=0.1)
    theta, momentum = parameter.detach().clone(), torch.zeros(5)
    for step in range(1, 6):
        parameter.grad = size * torch.randn(5).sign()
        reference.step()
        lr = 0.1 / (1 - dr.BETA1**step)  # Adam corrects its first moments' start at zero
        theta, momentum = dr.adam(theta, momentum, parameter.grad, 1 / size, lr)
    torch.testing.assert_close(theta, parameter.detach())


def test_meta_gradients_in_bfloat16_point_the_same_way():
    inner, *given = problem(common.Network("tiny", 3), 2, torch.float32, (32, 32))
    expected = dr.weight_gradient(copy.deepcopy(inner), *given)[0]
    inner.autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    result = dr.weight_gradient(inner, *given)[0]
    assert torch.cosine_similarity(result.flatten(), expected.flatten(), dim=0) > 0.95


def test_image_losses_are_cross_entropies_of_each_image():
    outputs, labels = [100 * torch.randn(3, 4, 5, 6) for _ in range(2)], torch.randint(4, (3, 5, 6))
    labels[0, 0], labels[2] = IGNORE, IGNORE
    losses = dr.image_losses(outputs, labels)
    cross_entropy = nn.CrossEntropyLoss(ignore_index=IGNORE)
    for i in range(2):
        first, aux = (cross_entropy(z[i][None], labels[i][None]) for z in outputs)
        torch.testing.assert_close(losses[i], first + common.AUX_WEIGHT * aux)
    assert losses[2] == 0  # and not NaN, where nothing is labelled


# ---- Meta-training ------------------------------------------------------------------------------
def test_the_rater_learns_which_augmentation_harms(args: common.Args):
    """Of an image as it is and one of noise, the first. A new rater gives both the score 0."""
    assert (dr.Rater()(torch.rand(3, 3, 32, 64)) == 0).all()

    def noise(images: Tensor, rng: torch.Generator) -> Tensor:
        return torch.rand(images.shape, generator=rng)

    args = settings(args, inner_batch=2, meta_lr=3e-3, meta_steps=30, warm_up=30)
    augmentations = {"original": common.identity, "noise": noise}
    run, source = begun(args, "datarater", stages=3), datasets.load(args, "source")
    rater = dr.meta_train(run, source, augmentations)
    scores = dr.choose_candidates(run, rater, source, augmentations)
    assert (scores[:, 0] > scores[:, 1]).mean() > 0.9


@pytest.mark.parametrize("kinds", [("original", "rgbshift"), ("original",)])
def test_weights_are_the_softmax_within_an_image(args: common.Args, monkeypatch, kinds: tuple):
    """Where an image has one candidate, within the batch. The weights of a batch sum to 1."""
    monkeypatch.setattr(dr.Rater, "forward", lambda self, x: 5 * self[0](x).mean(dim=(1, 2, 3)))
    seen, original = [], dr.weight_gradient
    monkeypatch.setattr(
        dr, "weight_gradient", lambda *given: seen.append(given[2]) or original(*given)
    )
    corrupt = 0.1 * (len(kinds) == 1)  # a choice needs two candidates
    given = settings(args, inner_batch=3, meta_steps=1, augmentations=kinds, corrupt=corrupt)
    run, augmentations = begun(given, "datarater", stages=3), dr.load_augmentations(given)
    dr.meta_train(run, datasets.load(given, "source"), augmentations)
    weights = seen[0].view(2, len(kinds), 3)  # [T,A,N]
    sums = weights.sum(dim=1 if len(kinds) > 1 else 2)
    torch.testing.assert_close(sums, torch.ones_like(sums) / sums.shape[1])
    assert weights.std() > 0.001


# ---- Candidates and choice ----------------------------------------------------------------------
def test_the_files_say_what_was_scored_and_trained_on(args: common.Args):
    given, rater = settings(args, k=2), dr.Rater().eval()
    nn.init.normal_(rater[-2].weight)
    run, split = begun(given, "datarater", stages=3), datasets.load(given, "source")
    augmentations, kinds, firsts = dr.load_augmentations(given), dr.KINDS, range(0, len(split), 16)
    scores = dr.choose_candidates(run, rater, split, augmentations)
    candidates = [dr.candidates_of(run, split, augmentations, first) for first in firsts]
    candidates = np.concatenate(candidates)  # [N,A,H,W,3], the same at every call
    assert tuple(augmentations) == kinds and (candidates[:, 0] == split.images).all()
    written = datasets.load_set(Path("run/set"), split.dataset, (32, 64))
    table = torch.load("run/best_augmentations_step_4.pt", weights_only=True)
    assert list(table) == list(split.names) and len(written) == 2 * len(split)
    for n, entry in enumerate(table.values()):
        alone = rater(common.to_tensor(candidates[n], run.device)).tolist()
        assert list(entry["scores"].values()) == scores[n].tolist()
        assert scores[n].tolist() == pytest.approx(alone, rel=1e-3, abs=1e-5)
        ranked = sorted(entry["scores"], key=entry["scores"].get, reverse=True)
        assert entry["index"] == n and entry["choice"] == ranked[:2]
        for j, kind in enumerate(entry["choice"]):
            assert written.names[2 * n + j] == f"{split.names[n]} {kind}"
            assert (written.images[2 * n + j] == candidates[n, kinds.index(kind)]).all()
            assert (written.labels[2 * n + j] == split.labels[n]).all()


def test_rules_of_choice():
    scores, rng = np.array([[0.3, 0.1, 0.9, 0.5], [4, 3, 2, 1]]), np.random.default_rng(0)
    assert dr.chosen(scores, 2, "best", rng).tolist() == [[2, 3], [0, 1]]
    assert dr.chosen(scores, 2, "worst", rng).tolist() == [[1, 0], [3, 2]]
    many = dr.chosen(np.tile(scores, (3000, 1)), 2, "random", rng)
    assert (many[:, 0] != many[:, 1]).all()
    assert np.bincount(many.ravel()) == pytest.approx([3000] * 4, rel=0.1)


def test_corruption_and_auroc(args: common.Args, capsys: pytest.CaptureFixture):
    split = datasets.load(settings(args), "source")
    damaged, amount = dr.corrupted(split, 0.25, 0)
    changed = (damaged.images != split.images).any(axis=3).mean(axis=(1, 2))
    assert (amount > 0).sum() == round(0.25 * len(split)) and damaged.labels is split.labels
    np.testing.assert_allclose(changed, amount, atol=0.05)
    assert amount[amount > 0].min() >= 0.1 and amount.max() <= 0.9
    run, amount = begun(settings(args), "datarater", stages=3), np.array([0.2, 0, 0.8, 0, 0])
    dr.draw_corruption(run, np.array([1.0, 2, 2, 3, 5]), amount)
    assert f"{5.5 / 6:.3f} (AUROC)" in capsys.readouterr().out  # 1 < 2 3 5, 2 = 2, 2 < 3 5


@pytest.mark.parametrize("kinds", [("original", "blur", "rgbshift"), ("original",)])
def test_the_figure_shows_differences_of_scores(args: common.Args, monkeypatch, kinds: tuple):
    """Those between an image's candidates; those between images where each has one candidate."""
    given = settings(args, augmentations=kinds, corrupt=0.1 * (len(kinds) == 1), inner_batch=2)
    run, split = begun(given, "datarater", stages=3), datasets.load(given, "source")
    scores, figures = np.random.default_rng(0).normal(size=(len(split), len(kinds))), []
    monkeypatch.setattr(common, "save_figure", lambda figure, path: figures.append(figure))
    dr.draw_scores(run, split, dr.load_augmentations(given), 100 + scores)
    shown = [float(axis.get_title().split()[1]) for axis in figures[0].axes]
    if len(kinds) == 1:
        rows = np.sort(scores[:, 0])[::-1][datasets.spaced(len(split), 5)] - scores.mean()
    else:
        rows = (scores - scores.mean(axis=1, keepdims=True))[datasets.spaced(len(split), 5)]
    assert shown == pytest.approx(rows.ravel().tolist(), rel=0.1, abs=0.01)


# ---- Runs ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("corrupt", [0.0, 0.2])
def test_a_run_writes_its_figures_and_a_training_set(args: common.Args, corrupt: float):
    result = dr.run(make(args, corrupt=corrupt, inner_batch=2))
    assert (result.steps, result.target_labels) == (6, 2)
    table = torch.load("run/best_augmentations_step_4.pt", weights_only=True)
    expected = "2 of the warm-up, 8 of the inner network, 4 meta-gradients"
    scored = len(table) * (1 if corrupt else len(dr.KINDS))
    assert result.other_updates == f"{expected}, {scored} candidates scored"
    for name in ("scores", "corruption" if corrupt else "augmentation_scores"):
        assert Path(f"run/figures/{name}.png").stat().st_size > 5000
    assert len(datasets.load_set(Path("run/set"), datasets.VKITTI2, (32, 64))) == len(table)


@pytest.mark.usefixtures("no_figures")
def test_original_is_the_baseline_without_any_method(args: common.Args):
    result = dr.run(like(args, dr.Args, out=Path("original"), choose="original"))
    assert (result.target_labels, result.other_updates) == (0, "")
    baseline.run(like(args, baseline.Args, out=Path("source_only")))
    dr.run(like(args, dr.Args, out=Path("random"), choose="random"))
    assert same_weights("source_only", "original") and not same_weights("random", "original")


@pytest.mark.usefixtures("no_figures")
def test_a_run_that_is_cut_off_ends_with_the_same_weights(args: common.Args, monkeypatch):
    given, stages = make(args, warm_up=4), ("warm_up", "rater", "source")
    whole_and_cut(monkeypatch, dr.run, given, stages, at=3)
    assert same_weights("whole", "cut")


@pytest.mark.usefixtures("no_figures")
def test_the_few_labels_reach_the_scores_and_no_others_do(args: common.Args, mini: Path):
    shutil.copytree(mini, "data2")
    few = datasets.load(settings(args), "target_few").names
    files = sorted(Path("data2/kitti/training/semantic").iterdir())

    def scores_of(out: str, data: Path) -> dict:
        dr.run(make(replace(args, steps=1), out, meta_steps=2, data=str(data)))
        return torch.load(f"{out}/best_augmentations_step_2.pt", weights_only=True)

    def other_labels(paths: list[Path]) -> None:
        for path in paths:
            Image.fromarray(np.full_like(np.asarray(Image.open(path)), 7)).save(path)

    before = scores_of("one", mini)
    other_labels([f for f in files if not any(f.name in photo for photo in few)])
    assert scores_of("two", Path("data2")) == before and same_weights("one", "two")
    other_labels(files)
    assert scores_of("three", Path("data2")) != before


def test_what_cannot_run(args: common.Args):
    for changes, message in (
        ({"k": 9}, "--k 9: expected 1 to 6"),
        ({"k": 2, "choose": "original"}, "--k 2: expected 1 to 1"),
        ({"augmentations": ("blur", "sharpen")}, "--augmentations blur sharpen: expected names"),
        ({"augmentations": ("blur",)}, "--augmentations: expected two or more"),
        ({"corrupt": 0.1}, "--inner-batch 1: a single image"),
        ({"corrupt": 0.1, "choose": "worst"}, "--choose worst --corrupt: each image has only one"),
        *(({"corrupt": x}, f"--corrupt {x}: expected a share") for x in (-0.1, 1.0, 1.5)),
        ({"corrupt": 1.5, "choose": "random"}, "--corrupt 1.5: expected a share"),
        ({"warm_up": -1}, "--warm-up -1: expected 0 or more"),
        ({"inner_updates": 0}, "--inner-updates 0: expected 1 or more"),
        ({"inner_batch": 0}, "--inner-batch 0: expected 1 or more"),
        ({"meta_steps": -1}, "--meta-steps -1: expected 1 or more"),
        ({"clip": 0.0}, "--clip: expected above 0"),
        ({"choose": "random"}, "--warm-up: has no effect with --choose random"),
        ({"labelled": 9}, "--labelled 9: "),
        ({"choose": "original", "beta": 0.1}, "--beta: has no effect without"),
        ({"choose": "original", "augmentations": ("blur",)}, "--augmentations: has no effect with"),
        ({"net": "lraspp"}, "--net lraspp"),
    ):
        with pytest.raises(UserError, match=message):
            dr.run(make(args, **changes))
        assert not Path("run").exists()
    with pytest.raises(UserError, match=r"--corrupt 0.001: 0 of "):
        dr.run(make(args, corrupt=0.001, inner_batch=2))
