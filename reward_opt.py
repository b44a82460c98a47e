"""Fine-tunes a segmentation network on the metric itself: the mIoU of sampled label maps.

"Tuning computer vision models with task rewards" (arXiv:2302.08242v1), for semantic segmentation.
The network is trained on the source for half of the updates. Then the expected reward of label
maps drawn from it is maximised, together with cross-entropy (the anchor) on the same labels:

    python reward_opt.py                                      (16 labelled photos)

    python reward_opt.py --reward-on source                (no label of a photo)

    python reward_opt.py --estimator leave_one_out    (REINFORCE, as in the paper)

    python reward_opt.py --objective soft_jaccard      (a control without samples)

Each takes half a minute on one CPU core. The first reaches 65 mIoU on the miniature.

REINFORCE gives the same reward to all pixels of an image, so a pixel does not know whether it
helped, and the gradient is very noisy. The default estimator, `counterfactual`, asks for each pixel
what the reward would be if this pixel alone had another label, and takes the exact expectation over
the label of this pixel. A reward that is computed from the counts of each class changes by an
amount that depends only on the old label, the true class and the new label of the pixel. So a table
of C x C x C numbers holds the answer for all pixels of an image.

For the IoU of single images this gradient is nearly that of a soft-Jaccard loss (their cosine was
1.0000), because the counts of thousands of pixels hardly differ from their expectations. So
`--objective soft_jaccard` gains as much, and it draws no sample.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import IGNORE, Loader, Network, Result, Run, Split, UserError

METHOD = "reward_opt"


@dataclass(frozen=True)
class Args(common.Args):
    reward_on: Literal["few", "source"] = "few"
    """Images of the stage with the reward: the labelled target photos (few), or the source."""
    objective: Literal["reward", "soft_jaccard", "class_weighted_ce", "reweighted_ce"] = "reward"
    """What is minimised: minus the expected reward, or a control without samples. soft_jaccard: 1
    minus the reward of the expected counts. class_weighted_ce: cross-entropy with a weight for each
    class. reweighted_ce: cross-entropy of each image times 1 - the reward of its likeliest map."""
    reward: Literal["miou", "weighted_iou", "accuracy"] = "miou"
    """What is maximised, by its name in REWARDS."""
    estimator: Literal["counterfactual", "leave_one_out"] = "counterfactual"
    """Of the gradient: exact over the label of one pixel, with the others as drawn
    (counterfactual), or REINFORCE with
    the mean reward of the other samples as its baseline (leave_one_out)."""
    over: Literal["image", "batch"] = "image"
    """Whether the reward is computed for each image, or for a batch as one large image (under
    torchrun for the batch of one process)."""
    samples: int | None = None
    """K, label maps drawn of each image. Default: 1 for counterfactual, 4 for leave_one_out."""
    weight: float = 5.0
    """Weight of the objective. With 5 the gradient of the reward, a number in [0, 1], is about as
    large as that of the cross-entropy."""
    anchor: float = 1.0
    """Weight of the plain cross-entropy. The paper: 0, the reward alone."""
    reward_share: float = 0.5
    """Share of --steps with the objective, at the end."""
    reward_lr: float = 0.5
    """Initial learning rate of that stage, as a multiple of --lr."""
    smooth: float = 0.01
    """Of the class weights, for weighted_iou and class_weighted_ce. The authors: 0.05, for COCO."""


# ---- Rewards ------------------------------------------------------------------------------------
# A reward is a function of counts (right, predicted, true [...,C]) and class weights [C] -> [...].
def counts(labels: Tensor, truth: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each class that are right, predicted, true; ignored ones count in none of them.

    labels, truth [B,H,W] -> float64 [B,C] each.
    """
    confusion = common.confusion_matrices(labels, truth, num_classes).double()  # [B,C,C]
    right = confusion.diagonal(dim1=1, dim2=2)
    return right, confusion.sum(dim=1), confusion.sum(dim=2)


def expected_counts(p: Tensor, truth: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Expectation of `counts` over labels drawn from p. [B,H,W,C], [B,H,W] -> [B,C] each."""
    valid = (truth != IGNORE)[..., None]  # [B,H,W,1]
    one_hot = F.one_hot(truth.where(truth != IGNORE, 0), p.shape[3]) * valid  # [B,H,W,C]
    right = (p * one_hot).sum(dim=(1, 2))
    predicted = (p * valid).sum(dim=(1, 2))
    return right, predicted, one_hot.sum(dim=(1, 2)).to(p.dtype)


def weighted_iou(right: Tensor, predicted: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    """Weighted mean of the IoU over the classes that the truth has; 0 where it has none."""
    weights = weights * (true > 0)
    union = (predicted + true - right).clamp(min=1)
    return (weights * right / union).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1e-9)


def miou(right: Tensor, predicted: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    return weighted_iou(right, predicted, true, torch.ones_like(weights))


def accuracy(right: Tensor, predicted: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    return right.sum(dim=-1) / true.sum(dim=-1).clamp(min=1)


Reward = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
REWARDS: dict[str, Reward] = {"miou": miou, "weighted_iou": weighted_iou, "accuracy": accuracy}


def class_weights(pixels: np.ndarray, smooth: float, classes: tuple[str, ...]) -> np.ndarray:
    """Weights of mean 1, greater for rarer classes. Pixels of each class [C] -> [C].

    w_c = 1 / (n_c + smooth * sum n), then scaled. UserError where that divides by zero.
    """
    smoothed = pixels + smooth * pixels.sum()
    if (smoothed <= 0).any():
        name = classes[int(smoothed.argmin())]
        raise UserError(f"class {name} has no pixel, so its weight needs --smooth above 0")
    return len(pixels) / smoothed / (1 / smoothed).sum()


# ---- Estimators of the reward's gradient --------------------------------------------------------
def sample(p: Tensor, rng: torch.Generator) -> Tensor:
    """A label of each pixel, independently, from its probabilities. [B,H,W,C] -> [B,H,W]."""
    u = common.to_device(common.draw(rng, *p.shape[:3], 1), p.device)
    labels = (p.detach().cumsum(dim=3) < u).sum(dim=3)  # inverse of the distribution function
    return labels.clamp(max=p.shape[3] - 1)  # where rounding lets the sum end below 1


def gain_table(
    reward: Reward, right: Tensor, predicted: Tensor, true: Tensor, weights: Tensor
) -> Tensor:
    """What the reward gains if one pixel of true class t gets the label k instead of a.

    right, predicted, true: counts [B,C] of the present map -> [B,a,t,k], in float64, since one
    pixel changes a reward by about 1 / pixels. Entries of pairs (a, t) that no pixel has are never
    used.
    """
    eye = torch.eye(len(weights), dtype=right.dtype, device=right.device)
    same = eye.bool()
    a, k = eye[:, None], eye[None]  # one-hot in the last dimension of [a,k,C]
    right, predicted, true = (n[:, None, None] for n in (right, predicted, true))
    before = reward(right, predicted, true, weights)  # [B,1,1]
    # If t is a, a correct pixel is lost; if t is k, one is won. [B,a,k] each:
    predicted = predicted - a + k  # [B,a,k,C]
    lost = reward(right - a, predicted, true, weights)
    won = reward(right + k, predicted, true, weights)
    neither = reward(right, predicted, true, weights)
    after = torch.where(same, won[:, :, None], neither[:, :, None])  # [B,a,t,k], where t = k
    after = torch.where(same[:, :, None], lost[:, :, None], after)  # where t = a
    gain = after - before[..., None]
    return gain.masked_fill(same[:, None], 0.0)  # where k = a nothing changes


def counterfactual(
    p: Tensor, labels: Tensor, truth: Tensor, reward: Reward, weights: Tensor
) -> Tensor:
    """Sum over pixels of the expected gain of the reward if only this pixel were drawn again.

    p [B,H,W,C], labels drawn from it [B,H,W] -> [B], whose gradient is the estimate. It is
    unbiased: grad E[R] = E[sum over pixels and k of grad p(k) R(labels, with k at this pixel)].
    R(labels) is subtracted from each R, which changes nothing since sum_k grad p(k) = 0.
    """
    gains = gain_table(reward, *counts(labels, truth, len(weights)), weights)  # [B,a,t,k]
    valid = truth != IGNORE
    image = torch.arange(len(p), device=p.device).view(-1, 1, 1)
    # The row (a, t) of the table for each pixel. Labels are drawn, so it has no gradient.
    gain = gains.to(p.dtype)[image, labels, truth.where(valid, 0)]  # [B,H,W,k]
    gain = gain * valid[..., None]
    return (p * gain).sum(dim=(1, 2, 3))


def leave_one_out(log_p: Tensor, labels: Tensor, truth: Tensor, rewards: Tensor) -> Tensor:
    """REINFORCE, with the mean reward of the other samples as its baseline (algorithm 2).

    The paper learns from one of the K samples. Here each is used, with the others as its baseline.
    log_p [B,H,W,C], labels drawn from it [K,B,H,W], rewards [K,B] -> [B], whose gradient is the
    estimate.
    """
    baseline = (rewards.sum(dim=0) - rewards) / (len(rewards) - 1)  # [K,B]
    log_p = torch.stack([log_p.gather(3, y[..., None])[..., 0] for y in labels])  # [K,B,H,W]
    # An ignored pixel changes no reward: its term has mean 0 and would only be noise.
    log_p = (log_p * (truth != IGNORE)).sum(dim=(2, 3))  # [K,B]
    return ((rewards - baseline).to(log_p.dtype) * log_p).mean(dim=0)


# ---- Objectives ---------------------------------------------------------------------------------
# Each takes logits [B,C,H,W], truth [B,H,W] and class weights [C].
def reward_loss(
    logits: Tensor, truth: Tensor, weights: Tensor, args: Args, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """-> scalar whose gradient is that of minus the expected reward (its value means nothing);
    mean reward of the drawn maps."""
    reward = REWARDS[args.reward]
    log_p = logits.permute(0, 2, 3, 1).log_softmax(dim=3)  # [B,H,W,C]
    p, c = log_p.exp(), logits.shape[1]
    k = args.samples or (4 if args.estimator == "leave_one_out" else 1)
    labels = torch.stack([sample(p, rng) for _ in range(k)])  # [K,B,H,W]
    rewards = torch.stack([reward(*counts(y, truth, c), weights) for y in labels])  # [K,B]
    if args.estimator == "leave_one_out":
        estimate = leave_one_out(log_p, labels, truth, rewards)  # [B]
    else:
        estimate = torch.stack([counterfactual(p, y, truth, reward, weights) for y in labels])
    return -estimate.mean(), rewards.mean()


def soft_jaccard(logits: Tensor, truth: Tensor, weights: Tensor, reward: Reward) -> Tensor:
    """1 - the reward of the expected counts, mean over the images. -> scalar."""
    p = logits.permute(0, 2, 3, 1).softmax(dim=3)  # [B,H,W,C]
    return 1 - reward(*expected_counts(p, truth), weights).mean()


def class_weighted_ce(logits: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy, the mean over pixels weighted by their true class. -> scalar in nats."""
    w = weights.to(logits.dtype)
    total = common.mean_over_processes(w[truth[truth != IGNORE]].sum())
    loss = F.cross_entropy(logits, truth, w, ignore_index=IGNORE, reduction="sum")
    return loss / total.clamp(min=1e-9)


def reweighted_ce(logits: Tensor, truth: Tensor, rewards: Tensor) -> Tensor:
    """Cross-entropy, each image times 1 - its reward [B]. -> scalar in nats."""
    losses = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="none")
    losses = losses.sum(dim=(1, 2)) * (1 - rewards).to(logits.dtype)  # [B]
    total = common.mean_over_processes((truth != IGNORE).sum().float())
    return losses.sum() / total.clamp(min=1)


# ---- The method ---------------------------------------------------------------------------------
def as_one_map(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """All images of a batch as one tall image. [B,C,H,W], [B,H,W] -> [1,C,B*H,W], [1,B*H,W]."""
    return logits.transpose(0, 1).flatten(1, 2)[None], truth.flatten(0, 1)[None]


def tune(run: Run, net: Network, split: Split, steps: int) -> None:
    """The stage with the reward, or with the objective that stands in for it."""
    args, reward = run.args, REWARDS[run.args.reward]
    # The stage's name is part of the seed of the batches: "few" gives those of few_label.
    stage = "few" if args.reward_on == "few" else "reward"
    loader = Loader(split, args.batch_size, run.device, args.seed, stage)
    model, optimizer = common.parallel(net), common.make_optimizer(net, args.lr)
    maps = split.labels[:: math.ceil(len(split) / 1000)]  # a thousand at most
    pixels = sum(np.bincount(labels.ravel(), minlength=256) for labels in maps)
    weights = class_weights(pixels[: len(run.classes)], args.smooth, run.classes)
    weights = torch.from_numpy(weights).to(run.device)  # [C]
    net.train()
    for step in run.steps(stage, steps, net=net, optimizer=optimizer):
        rng = common.generator(args.seed, stage, step)
        lr = common.learning_rate(args.lr * args.reward_lr, step, steps)
        common.set_lr(optimizer, lr)
        x, truth = loader(step)  # [B,3,H,W], [B,H,W]
        x, truth = common.crop_flip(x, truth, rng)

        # Step 1: logits, the anchor, and the reward of the likeliest maps
        with run.autocast():
            outputs = model(x, aux=True)
        ce = common.segmentation_loss(outputs, truth)
        logits = outputs[0]  # [B,C,H,W]
        if args.over == "batch":
            logits, truth = as_one_map(logits, truth)
        likeliest = counts(logits.argmax(dim=1), truth, len(weights))
        rewards = reward(*likeliest, weights)  # [B]
        scalars = {"ce_loss": ce, "argmax_reward": rewards.mean()}

        # Step 2: the objective
        if args.objective == "reward":
            objective, scalars["reward"] = reward_loss(logits, truth, weights, args, rng)
        elif args.objective == "soft_jaccard":
            objective = soft_jaccard(logits, truth, weights, reward)
        elif args.objective == "class_weighted_ce":
            objective = class_weighted_ce(logits, truth, weights)
        else:
            objective = reweighted_ce(logits, truth, rewards)

        # Step 3: the update
        loss = args.anchor * ce + args.weight * objective
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        run.log(step, loss=loss, lr=lr, **scalars)
        if common.is_quarter(step, steps):
            run.evaluate(net, step)


def check(args: Args) -> None:
    """UserError for a flag without an effect, or out of range."""
    weighted = args.reward == "weighted_iou" or args.objective == "class_weighted_ce"
    without_effect = {
        "--objective reward": () if args.objective == "reward" else ("estimator", "samples"),
        "--reward weighted_iou": () if weighted else ("smooth",),
    }
    for needed, names in without_effect.items():
        for name in names:
            if getattr(args, name) != getattr(Args, name):
                raise UserError(f"--{name}: has no effect without {needed}")
    least = 2 if args.estimator == "leave_one_out" else 1
    if args.samples is not None and args.samples < least:
        raise UserError(f"--samples {args.samples}: {args.estimator} needs at least {least}")
    if not 0 < args.reward_share <= 1:
        raise UserError(f"--reward-share {args.reward_share}: expected a share above 0, to 1")


def run(args: Args) -> Result:
    check(args)
    run = Run(args, METHOD, stages=1 if args.checkpoint else 2)
    if run.result:
        return run.result
    args, net = run.args, run.network()
    split = common.load(args, "target_few" if args.reward_on == "few" else "source")
    reward_steps = max(1, round(args.steps * args.reward_share))
    source_steps = 0 if args.checkpoint else args.steps - reward_steps
    if not args.checkpoint:
        common.train(run, net, common.load(args, "source"), source_steps, "source")
    start = copy.deepcopy(net)
    tune(run, net, split, reward_steps)
    labels = len(split) if args.reward_on == "few" else 0
    result = run.finish(net, target_labels=labels, steps=source_steps + reward_steps)
    if common.rank() == 0:
        draw_reward(run, start)
        draw_gradient(run, start.eval(), split)
    return result


# ---- Figures ------------------------------------------------------------------------------------
def draw_reward(run: Run, start: Network) -> None:
    """figures/reward.png: rewards and test mIoU over the steps; IoU before and after the stage."""
    with run.autocast():
        confusion = common.evaluate(start, run.test, run.device)  # [N,C,C]
    lines, figure = common.read_scalars(run.out), common.new_figure(11, 4)
    curves, bars = figure.subplots(1, 2, width_ratios=(1, 1.4))
    titles = {"reward": "reward, drawn maps", "argmax_reward": "reward, likeliest maps"}
    for key, title in {**titles, "mIoU": "mIoU, test photos"}.items():
        rows = [line for line in lines if key in line]
        values = [line[key] if key == "mIoU" else 100 * line[key] for line in rows]
        curves.plot([line["step"] for line in rows], values, label=title)
    curves.set(xlabel="step", ylabel="%", ylim=(0, 100), title=f"reward: {run.args.reward}")
    curves.legend(fontsize=8)
    places = np.arange(len(run.classes))
    after = np.array([run.result.iou[name] for name in run.classes], float)  # None is NaN
    bars.bar(places - 0.2, common.iou(confusion.sum(axis=0)), 0.4, label="before")
    bars.bar(places + 0.2, after, 0.4, label="after")
    bars.set_xticks(places, run.classes, rotation=90)
    bars.set(ylabel="IoU (%)", title="test photos, stage with the reward")
    bars.legend(fontsize=8)
    common.save_figure(figure, run.out / "figures/reward.png")


def estimates(
    logits: Tensor, truth: Tensor, weights: Tensor, args: Args, rng: torch.Generator, n: int
) -> Tensor:
    """n independent estimates of the expected reward's gradient by the logits. -> [n,B,C,H,W]."""
    logits = logits.detach().clone().requires_grad_()
    losses = (reward_loss(logits, truth, weights, args, rng)[0] for _ in range(n))
    return -torch.stack([torch.autograd.grad(loss, logits)[0] for loss in losses])


def draw_gradient(run: Run, start: Network, split: Split) -> None:
    """figures/gradient.png: an estimate of the gradient of an image's mIoU by the logit of each
    pixel's true class, with both estimators. Titles: variance over squared length."""
    images, labels = split.images[:1], split.labels[:1]
    truth = torch.from_numpy(labels.astype(np.int64)).to(run.device)  # [1,H,W]
    logits = common.predict(start, images, run.device)  # [1,C,H,W]
    weights = torch.ones(len(run.classes), dtype=torch.float64, device=run.device)
    figure = common.new_figure(11, 1.8)
    axes = figure.subplots(1, 4)
    axes[0].imshow(images[0])
    axes[1].imshow(common.palette(run.classes)[labels[0]])
    titles, squared_length = ["image", "truth"], None
    for axis, estimator in zip(axes[2:], ("counterfactual", "leave_one_out"), strict=True):
        args = replace(run.args, reward="miou", estimator=estimator, samples=None)
        rng = common.generator("gradient.png", estimator)
        gradients = estimates(logits, truth, weights, args, rng, n=16)  # [16,1,C,H,W]
        if squared_length is None:  # both have the same expectation; this one is more precise
            squared_length = gradients.mean(dim=0).square().sum()
        ratio = gradients.var(dim=0).sum() / squared_length
        titles.append(f"{estimator}: {ratio.item():.2g}")
        valid = truth != IGNORE
        gradient = gradients[0].gather(1, truth.where(valid, 0)[:, None])[0, 0] * valid[0]
        limit = gradient.abs().quantile(0.99).item()
        axis.imshow(gradient.cpu().numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    common.save_figure(figure, run.out / "figures/gradient.png")


if __name__ == "__main__":
    common.main(Args, run, __doc__)
