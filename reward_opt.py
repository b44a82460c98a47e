"""Fine-tunes a segmentation network on the metric itself: the reward of sampled label maps.

Tuning computer vision models with task rewards (arXiv:2302.08242v1), for semantic segmentation,
with a gradient of less variance. The network is trained on the source, then the expected reward of
label maps drawn from it is maximised, beside cross-entropy on the same labels:

    python reward_opt.py                                    (16 labelled photos)

    python reward_opt.py --reward-on source                 (no label of a photo)

    python reward_opt.py --reward-on teacher                (nor here; so far below source-only)

    python reward_opt.py --estimator leave_one_out          (REINFORCE, as in the paper)

    python reward_opt.py --estimator reweighted_ce          (the control: nothing is sampled)

Pixels are independent given the logits, so REINFORCE, which has one number an image, drowns in the
noise of all the other pixels. `counterfactual` asks instead what the reward of the drawn map would
be with this one pixel's label exchanged for each class, which for rewards made of intersections and
unions is a table of C x C x C numbers, and takes the exact expectation over the pixel's own label.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
from common import IGNORE, Batches, Network, Part, Result, Run, UserError


@dataclass(frozen=True)
class Args(common.Args):
    reward_on: Literal["few", "source", "teacher"] = "few"
    """Whose labels the reward compares with: the labelled target photos (few), the source, or the
    confident labels that an averaged network gives the unlabelled photos (teacher)."""
    reward: Literal["miou", "weighted_iou", "accuracy"] = "miou"
    """What is maximised, by its name in REWARDS."""
    estimator: Literal["counterfactual", "leave_one_out", "reweighted_ce"] = "counterfactual"
    """Of the gradient: exact for each pixel given the others (counterfactual), REINFORCE with the
    other samples' mean as its baseline (leave_one_out); or no reward gradient at all but the
    cross-entropy of each image times 1 - reward of its likeliest map (reweighted_ce)."""
    over: Literal["image", "batch"] = "image"
    """What a reward is taken over: each label map, or all maps of a batch as one large map."""
    samples: int | None = None
    """Label maps drawn of each image, K. Default: 1 for counterfactual, 4 for leave_one_out."""
    weight: float = 5.0
    """Of the reward, a number in [0, 1] with a gradient of about the size of the cross-entropy's;
    of the scaled cross-entropy for reweighted_ce."""
    anchor: float = 1.0
    """Weight of the cross-entropy beside it; 0: the reward alone, as the paper's REINFORCE."""
    reward_share: float = 0.5
    """Share of --steps with the reward, at the end."""
    reward_lr: float = 0.5
    """Initial learning rate of that stage, as a multiple of --lr."""
    smooth: float = 0.01
    """CLS_SMOOTH of the class weights 1 / (count + smooth * total), for weighted_iou. The authors'
    code, for COCO's detection: 0.05."""
    confidence: float = 0.8
    """teacher: least probability of a label."""
    ema: float = 0.99
    """teacher: decay of its weights at each step."""
    look_every: int = 10
    """Steps from one look at the costly scalars (reward of the likeliest map, signal-to-noise,
    divergence from the starting network) to the next."""


# ---- Rewards ------------------------------------------------------------------------------------
def counts(labels: Tensor, truth: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each class that are right, predicted, true. [B,H,W] twice -> float64 [B,C] each.

    Ignored pixels of the truth count in none of them.
    """
    confusion = common.confusion_matrices(labels, truth, num_classes).double()  # [B,C,C]
    return confusion.diagonal(dim1=1, dim2=2), confusion.sum(dim=1), confusion.sum(dim=2)


class OfCounts(NamedTuple):
    """A reward that is a function of `counts` alone, which is what `counterfactual` needs.

    formula: (right, predicted, true [...,C], class weights [C]) -> [...].
    """

    formula: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

    def __call__(self, labels: Tensor, truth: Tensor, weights: Tensor) -> Tensor:
        """labels, truth [B,H,W], class weights [C] -> reward [B]."""
        return self.formula(*counts(labels, truth, len(weights)), weights)


def weighted_iou(right: Tensor, predicted: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    """Mean IoU of the classes that the truth has, by the class weights; 0 where it has none."""
    weights = weights * (true > 0)
    union = (predicted + true - right).clamp(min=1)
    return (weights * right / union).sum(dim=-1) / weights.sum(dim=-1).clamp(min=1e-9)


def miou(right: Tensor, predicted: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    return weighted_iou(right, predicted, true, torch.ones_like(weights))


def accuracy(right: Tensor, predicted: Tensor, true: Tensor, weights: Tensor) -> Tensor:
    return right.sum(dim=-1) / true.sum(dim=-1).clamp(min=1)


# By name, (labels [B,H,W], truth [B,H,W], class weights [C]) -> [B]. One that is not OfCounts can
# be maximised by leave_one_out.
Reward = Callable[[Tensor, Tensor, Tensor], Tensor]
REWARDS: dict[str, Reward] = {
    "miou": OfCounts(miou),
    "weighted_iou": OfCounts(weighted_iou),
    "accuracy": OfCounts(accuracy),
}


# ---- Estimators ---------------------------------------------------------------------------------
def sample(p: Tensor, rng: torch.Generator) -> Tensor:
    """A label of each pixel, independently, from its probabilities. p [B,H,W,C] -> [B,H,W]."""
    u = torch.rand(*p.shape[:3], 1, generator=rng)  # the same draws on every device
    u = common.send(u, p.device)
    labels = (p.detach().cumsum(dim=3) < u).sum(dim=3)
    return labels.clamp(max=p.shape[3] - 1)  # where rounding lets the sum end below 1


def exchanged(
    formula: Callable, right: Tensor, predicted: Tensor, true: Tensor, weights: Tensor
) -> Tensor:
    """What the reward gains where one pixel of truth t exchanges its label a for k. -> [B,a,t,k].

    right, predicted, true [B,C]: the counts with a. An entry that no pixel has means nothing. In
    float64, since one pixel changes a reward by about 1 / pixels.
    """
    eye = torch.eye(len(weights), dtype=right.dtype, device=right.device)
    a, k = eye[:, None], eye[None]  # one-hot over the last of [a,k,C]
    right, predicted, true = (count[:, None, None] for count in (right, predicted, true))
    now, moved = formula(right, predicted, true, weights), predicted - a + k  # [B,1,1], [B,a,k,C]
    # Of the truth it matters whether it is a (a hit is lost), k (one is won) or another class.
    lost, won, neither = (formula(r, moved, true, weights) for r in (right - a, right + k, right))
    same = eye.bool()  # over two of [a,t,k]
    gains = torch.where(same, won[:, :, None], neither[:, :, None])  # [B,a,t,k], by t = k
    gains = torch.where(same[:, :, None], lost[:, :, None], gains) - now[..., None]  # by a = t
    return gains.masked_fill(same[:, None], 0.0)  # by a = k: nothing is exchanged


def counterfactual(
    p: Tensor, labels: Tensor, truth: Tensor, reward: OfCounts, weights: Tensor
) -> Tensor:
    """For every pixel the expectation over its own label, the other pixels as drawn; summed.

    p [B,H,W,C], labels drawn from it [B,H,W] -> [B], of which the gradient is the estimate: that of
    E[R] is the mean over the other pixels' labels of sum_k grad p(k) R(labels with k here), summed
    over pixels. What stands here for R is its gain over R(labels), the same since sum_k grad p(k)
    is 0.
    """
    b, c = len(p), p.shape[3]
    gains = exchanged(reward.formula, *counts(labels, truth, c), weights)  # [B,a,t,k]
    valid = truth != IGNORE
    image = torch.arange(b, device=p.device).view(b, 1, 1)
    row = (image * c + labels) * c + torch.where(valid, truth, 0)  # of the table [B*a*t,k]
    gain = gains.to(p.dtype).view(-1, c)[row] * valid[..., None]  # [B,H,W,k]
    return (p * gain).sum(dim=(1, 2, 3))


def leave_one_out(log_p: Tensor, labels: Tensor, truth: Tensor, rewards: Tensor) -> Tensor:
    """REINFORCE, its baseline the mean reward of the other samples, as in the authors' code. There
    one sample is learnt from and the others are its baseline; here each takes its turn.

    log_p [B,H,W,C], labels drawn from it [K,B,H,W], rewards [K,B] -> [B], of which the gradient is
    the estimate.
    """
    others = (rewards.sum(dim=0) - rewards) / (len(rewards) - 1)
    likelihood = torch.stack([log_p.gather(3, y[..., None])[..., 0] for y in labels])  # [K,B,H,W]
    # An ignored pixel changes no reward: its term has mean 0 and would be noise alone.
    likelihood = (likelihood * (truth != IGNORE)).sum(dim=(2, 3))  # [K,B]
    return ((rewards - others).to(log_p.dtype) * likelihood).mean(dim=0)


def reweighted_ce(
    logits: Tensor, truth: Tensor, reward: Reward, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The control: images whose likeliest map has little reward count more. [B,H,W,C], [B,H,W] ->
    scalar in nats, mean reward."""
    rewards = reward(logits.argmax(dim=3), truth, weights)  # [B]
    scale = (1 - rewards).to(logits.dtype)[:, None, None]
    losses = F.cross_entropy(
        logits.permute(0, 3, 1, 2), truth, ignore_index=IGNORE, reduction="none"
    )  # [B,H,W]
    valid = (truth != IGNORE).sum().clamp(min=1)
    return (scale * losses).sum() / valid, rewards.mean()


def reward_loss(
    logits: Tensor, truth: Tensor, weights: Tensor, args: Args, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Minus the expected reward, as far as its gradient goes; and the drawn maps' mean reward.

    logits [B,C,H,W], truth [B,H,W] -> scalar in reward, its value without meaning; scalar.
    """
    reward, logits = REWARDS[args.reward], logits.permute(0, 2, 3, 1)  # [B,H,W,C]
    if args.estimator == "reweighted_ce":
        return reweighted_ce(logits, truth, reward, weights)
    if args.over == "batch":  # as one tall map
        logits, truth = logits.flatten(0, 1)[None], truth.flatten(0, 1)[None]
    log_p = logits.log_softmax(dim=3)
    p = log_p.exp()
    count = args.samples or (4 if args.estimator == "leave_one_out" else 1)
    labels = torch.stack([sample(p, rng) for _ in range(count)])  # [K,B,H,W]
    rewards = torch.stack([reward(y, truth, weights) for y in labels])  # [K,B]
    if args.estimator == "leave_one_out":
        return -leave_one_out(log_p, labels, truth, rewards).mean(), rewards.mean()
    found = torch.stack([counterfactual(p, y, truth, reward, weights) for y in labels])  # [K,B]
    return -found.mean(), rewards.mean()


# ---- Looking on ---------------------------------------------------------------------------------
def estimates(
    logits: Tensor, truth: Tensor, weights: Tensor, args: Args, rng: torch.Generator, n: int
) -> Tensor:
    """n independent estimates of the expected reward's gradient by the logits. -> [n,B,C,H,W]."""
    logits = logits.detach().requires_grad_()
    losses = (reward_loss(logits, truth, weights, args, rng)[0] for _ in range(n))
    return -torch.stack([torch.autograd.grad(loss, logits)[0] for loss in losses])


def signal_and_noise(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Squared length of a gradient and the variance of one estimate of it, both without bias, from
    `estimates`: so the first may come out negative where the second is large."""
    variance = gradients.var(dim=0).sum()
    return gradients.mean(dim=0).square().sum() - variance / len(gradients), variance


@torch.no_grad()
def divergence(logits: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of a network and its KL divergence from another. [B,C,H,W] twice -> nats a pixel."""
    log_p, log_q = logits.log_softmax(dim=1), start.log_softmax(dim=1)
    p = log_p.exp()
    return -(p * log_p).sum(dim=1).mean(), (p * (log_p - log_q)).sum(dim=1).mean()


def look(
    logits: Tensor, start: Tensor, truth: Tensor, weights: Tensor, args: Args, rng: torch.Generator
) -> dict[str, Tensor]:
    """The costly scalars: [B,C,H,W] of the network and of the one it started from, [B,H,W]."""
    likeliest, whole = logits.argmax(dim=1), truth
    if args.over == "batch":
        likeliest, whole = likeliest.flatten(0, 1)[None], truth.flatten(0, 1)[None]
    reward = REWARDS[args.reward](likeliest, whole, weights).mean()
    entropy, kl = divergence(logits, start)
    scalars = {"argmax_reward": reward, "entropy": entropy, "kl": kl}
    if args.estimator != "reweighted_ce":
        signal, noise = signal_and_noise(estimates(logits, truth, weights, args, rng, n=2))
        least = 1e-6 * signal.abs() + 1e-30  # below it there is but rounding
        scalars["signal_to_noise"] = signal / noise.clamp(min=least)
    return scalars


# ---- The teacher --------------------------------------------------------------------------------
@torch.no_grad()
def confident_labels(teacher: Network, images: Tensor, confidence: float) -> Tensor:
    """The likeliest class, IGNORE where it is not likely enough. [B,3,H,W] -> [B,H,W]."""
    p, labels = teacher(images).softmax(dim=1).max(dim=1)
    return torch.where(p >= confidence, labels, IGNORE)


# ---- The method ---------------------------------------------------------------------------------
def tune(run: Run, net: Network, part: Part, photos: Part | None, steps: int) -> None:
    """The stage with the reward, on the labels of `part`, or on a teacher's of `photos` if given;
    the cross-entropy is always on `part`."""
    args, device, nth = run.args, run.device, len(run.entered)
    batches = Batches(part, args.batch_size, (args.seed, nth), device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    weights = weights_of_classes(part, args.smooth, run.classes).to(device)  # [C]
    start, state = copy.deepcopy(net).requires_grad_(False), {"net": net, "optimizer": optimizer}
    if photos:
        targets = Batches(photos, args.batch_size, (args.seed, nth, 1), device)
        state["teacher"] = teacher = copy.deepcopy(net).requires_grad_(False).eval()
    net.train()
    start.train()  # compared by the statistics of the same batch
    for step in run.steps("reward", steps, **state):
        rng = common.generator(args.seed, step, nth)
        lr = common.set_rate(optimizer, args.lr * args.reward_lr, step, steps)
        batch = batches(step)
        images, labels = common.crop_flip(batch.images, batch.labels, rng)
        x, truth, seen = images, labels, images
        with run.autocast():
            if photos:
                x, _ = common.crop_flip(targets(step).images, None, rng)
                truth, seen = confident_labels(teacher, x, args.confidence), torch.cat([images, x])
            outputs = net(seen, aux=True)
        logits = outputs[0][-len(x) :]  # what the reward is taken of
        ce = common.segmentation_loss([output[: len(images)] for output in outputs], labels)
        minus_reward, reward = reward_loss(logits, truth, weights, args, rng)
        loss = args.anchor * ce + args.weight * minus_reward
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if photos:
            common.follow(teacher, net, args.ema)
        scalars = {"ce_loss": ce, "reward": reward}
        if (step - 1) % args.look_every == 0 or step == steps:
            rng = common.generator(args.seed, step, nth, 1)  # so that looking changes nothing,
            cards = [device] if device.type == "cuda" else []  # nor does dropout
            with torch.no_grad(), run.autocast(), torch.random.fork_rng(cards):
                before = start(seen)[-len(x) :]
            scalars |= look(logits.detach(), before, truth, weights, args, rng)
        run.log(step, loss=loss, lr=lr, **scalars)
        if step % max(1, steps // 4) == 0 and step < steps:
            run.evaluate(net, step)


def weights_of_classes(part: Part, smooth: float, classes: tuple[str, ...]) -> Tensor:
    """Greater for rarer classes, mean 1, from a thousand label maps at most. -> float64 [C]."""
    some = part.labels[:: -(-len(part) // 1000)]
    pixels = sum(np.bincount(one.ravel(), minlength=256)[: len(classes)] for one in some)
    return torch.from_numpy(common.class_weights(pixels, smooth, classes))


def check_rewards(args: Args) -> None:
    """UserError for what the flags of this method cannot mean."""
    if not 0 < args.reward_share <= 1:
        raise UserError("--reward-share: expected a share above 0, to 1")
    if not args.reward_lr > 0:
        raise UserError("--reward-lr: expected a number above 0")
    if min(args.weight, args.anchor, args.smooth) < 0:
        raise UserError("--weight, --anchor, --smooth: expected at least 0")
    if not (0 <= args.confidence <= 1 and 0 <= args.ema <= 1):
        raise UserError("--confidence, --ema: expected 0 to 1")
    if args.estimator == "reweighted_ce" and (args.samples or args.over == "batch"):
        raise UserError("--samples, --over: reweighted_ce draws nothing and takes single images")
    for flag in ("samples", "look_every"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: expected at least 1")
    if args.estimator == "leave_one_out" and args.samples == 1:
        raise UserError("--samples: leave_one_out needs at least 2")
    if args.estimator == "counterfactual" and not isinstance(REWARDS[args.reward], OfCounts):
        raise UserError(f"--estimator counterfactual: needs a reward of counts, not {args.reward}")


def run(args: Args) -> Result:
    check_rewards(args)
    run = Run(args, "reward_opt")
    if run.result:
        return run.result
    args, net = run.args, run.network()
    few = common.load(args, "target_few") if args.reward_on == "few" else None
    photos = common.load(args, "target_unlabelled") if args.reward_on == "teacher" else None
    source = None if args.checkpoint and few else common.load(args, "source")
    tuned = max(1, round(args.steps * args.reward_share))
    first = 0 if args.checkpoint else args.steps - tuned
    if first:
        common.train(run, net, source, first, "source", more=True)
    start = copy.deepcopy(net)
    tune(run, net, few or source, photos, tuned)
    result = run.finish(net, target_labels=len(few) if few else 0, steps=first + tuned)
    draw_rewards(run, start, few or source)
    return result


# ---- Figures ------------------------------------------------------------------------------------
def draw_rewards(run: Run, start: Network, part: Part) -> None:
    """figures/reward.png: reward and target mIoU over the steps, IoU of each class before and after
    the reward. figures/gradient.png: see `draw_gradients`. `start`: the network before."""
    from matplotlib.figure import Figure

    lines, figure = common.read_scalars(run.out), Figure(figsize=(11, 4), layout="constrained")
    curves, classes = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for key, name, unit, style in (
        ("reward", "reward, drawn maps", 100, "C0"),
        ("argmax_reward", "reward, likeliest maps", 100, "C1"),
        ("mIoU", "mIoU, test photos", 1, "ko-"),
    ):
        rows = [line for line in lines if key in line]
        curves.plot([r["step"] for r in rows], [unit * r[key] for r in rows], style, label=name)
    curves.set(xlabel="step", ylabel="%", ylim=(0, 100), title=f"reward: {run.args.reward}")
    curves.legend(fontsize=8)

    confusion = common.evaluate(start, run.test, run.device, run.args.amp).sum(axis=0)
    after = np.array([run.result.iou[name] for name in run.classes], float)  # None is NaN
    places = np.arange(len(run.classes))
    pairs = ((-0.2, common.iou(confusion), "at its start"), (0.2, after, "at the end"))
    for shift, iou, name in pairs:
        classes.bar(places + shift, iou, 0.4, label=f"{name}, mean {np.nanmean(iou):.1f}")
    classes.set_xticks(places, run.classes, rotation=90)
    classes.set(ylabel="IoU (%)", title="test photos, stage with the reward")
    classes.legend(fontsize=8)
    common.save_figure(figure, run.out / "figures/reward.png")
    rewards = [100 * line["argmax_reward"] for line in lines if "argmax_reward" in line]
    was = common.scores(confusion)["mIoU"]
    if rewards:
        print(f"reward of likeliest maps, on its own data: {rewards[0]:.1f} to {rewards[-1]:.1f} %")
    print(f"mIoU on the test photos: {was:.1f} to {run.result.miou:.1f} %", flush=True)
    draw_gradients(run, start.eval(), part)


def draw_gradients(run: Run, start: Network, part: Part) -> None:
    """figures/gradient.png: one estimate of the gradient of a labelled image's mIoU by the logit of
    each pixel's true class, by counterfactual with one sample and leave_one_out with four, each on
    a scale of its own. Titles: the variance of an estimate over the squared gradient."""
    from matplotlib.figure import Figure

    weights = weights_of_classes(part, run.args.smooth, run.classes).to(run.device)
    batch = Batches(part, 1, run.args.seed, run.device)(0)
    with torch.no_grad():
        logits = start(batch.images)
    figure, ratios = Figure(figsize=(11, 1.8), layout="constrained"), {}
    axes, valid = figure.subplots(1, 4), batch.labels != IGNORE
    axes[0].imshow(part.images[batch.index[0]])
    colours = common.palette(run.classes)
    axes[1].imshow(colours[batch.labels[0].cpu().numpy()])
    for axis, (estimator, k) in zip(
        axes[2:], (("counterfactual", 1), ("leave_one_out", 4)), strict=True
    ):
        args = replace(run.args, reward="miou", estimator=estimator, samples=k, over="image")
        found = estimates(logits, batch.labels, weights, args, common.generator(0), n=16)
        if not ratios:  # both estimates expect the same, of which these are the surer ones
            signal, _ = signal_and_noise(found)
        ratios[estimator] = (signal_and_noise(found)[1] / signal).item()
        true = found[0].gather(1, torch.where(valid, batch.labels, 0)[:, None])[0, 0] * valid[0]
        scale = true.abs().quantile(0.99).item()
        axis.imshow(true.cpu().numpy(), cmap="RdBu", vmin=-scale, vmax=scale)
    for axis, title in zip(axes, ("photo", "truth", *ratios), strict=True):
        axis.set_title(f"{title}: {ratios[title]:.2g}" if title in ratios else title, fontsize=9)
        axis.axis("off")
    common.save_figure(figure, run.out / "figures/gradient.png")


if __name__ == "__main__":
    common.main(Args, run, __doc__)
