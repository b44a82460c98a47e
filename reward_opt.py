"""Fine-tunes a segmentation network on a reward: the IoU or the object recall of its label maps.

For the IoU of single images the exact gradient of the expected reward IS the gradient of the
soft-Jaccard loss (measured cosine 1.0000), and both end at the same mIoU. Sampling is meant for
rewards that have no such exact surrogate. One is the recall of whole objects, the share of the
connected regions of one class of which at least half is right: a step function of many pixels. A
cross-entropy weighted by object reached the same recall in a first trial (docs/ablations.md).

"Tuning computer vision models with task rewards" (arXiv:2302.08242v1). The network is trained on
the source, then fine-tuned on the labelled target photos with the reward and with cross-entropy
(the anchor). Controls have a loss in place of the reward (soft_jaccard, class_weighted_ce), or
nothing (cross_entropy: this is the row few_label); everything else is the same:

    python reward_opt.py                                 (16 labelled photos; the reward is the IoU)

    python reward_opt.py --objective object_recall       (REINFORCE: more objects, less mIoU)

    python reward_opt.py --objective class_weighted_ce

Each takes two minutes on one CPU core. The first reaches 58 mIoU on the miniature. All report
test_iou and test_object_recall in scalars.json, and those of each test photo in rewards/.

IoU: label maps are drawn pixel by pixel. The estimator asks for each pixel what the reward would be
if this pixel alone had another label, and takes the exact expectation over the label of this pixel.
The IoU changes by an amount that depends only on the old label, the true class and the new label.
So a table of C x C x C numbers holds the answer for all pixels of an image.

Object recall: label maps are drawn cell by cell, and a cell of a few pixels has one class, so that
whole objects come and go. REINFORCE with a leave-one-out baseline (algorithm 2 of the paper)
gives the same reward to all cells of an image, which is very noisy. But the recall of an object
depends only on the cells that it touches. So each cell is rewarded for these objects alone: the
estimate has the same mean and a far smaller variance.
"""

import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
import datasets
from common import Loader, Network, Result, Run
from datasets import IGNORE, Split, UserError

Objective = Literal["iou", "object_recall", "soft_jaccard", "class_weighted_ce", "cross_entropy"]


@dataclass(frozen=True)
class Args(common.Args):
    objective: Objective = "iou"
    """What is optimised with the anchor. Rewards: iou, object_recall. Controls: soft_jaccard (1 -
    the IoU of the expected counts), class_weighted_ce, cross_entropy (the anchor alone)."""
    weight: float = 5.0
    """Weight of the objective. With 5 the gradient of a reward, a number in [0, 1], is about as
    large as that of the cross-entropy."""
    anchor: float = 1.0
    """Weight of the plain cross-entropy. The paper: 0, the reward alone."""
    reward_share: float = 0.5
    """Share of --steps with the objective, at the end."""
    epochs: int = 400
    """Most passes over the labelled photos in that stage; what they leave is source training."""
    reward_lr: float = 0.5
    """Initial learning rate of that stage, as a multiple of --lr."""
    smooth: float = 0.01
    """Of the weights of class_weighted_ce."""
    samples: int = 8
    """K, label maps drawn of each image for object_recall. The paper: 2."""
    cell: int | None = None
    """Side of a cell in pixels. Default: the largest power of 2 up to a sixteenth of the height."""
    smallest: float = 0.0005
    """Smaller regions are no objects. A share of the image's pixels."""
    credit: Literal["object", "image"] = "object"
    """What a cell is rewarded for: the objects that it touches, or, as in the paper, the image."""


# ---- The IoU and its gradient -------------------------------------------------------------------
def counts(labels: Tensor, truth: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels of each class that are right, predicted, true; ignored ones count in none of them.

    labels, truth [B,H,W] -> [B,C] each, in float64 since a pixel changes a reward by about 1 / HW.
    """
    confusion = common.confusion_matrices(labels, truth, num_classes).double()  # [B,C,C]
    right = confusion.diagonal(dim1=1, dim2=2)
    return right, confusion.sum(dim=1), confusion.sum(dim=2)


def mean_iou(right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """Mean of the IoU over the classes that the truth has; 0 where it has none."""
    present = true > 0
    union = (predicted + true - right).clamp(min=1)
    return (present * right / union).sum(dim=-1) / present.sum(dim=-1).clamp(min=1)


def sample(p: Tensor, rng: torch.Generator) -> Tensor:
    """Labels that are drawn independently from their probabilities. [B,H,W,C] -> [B,H,W]."""
    u = common.to_device(common.draw(rng, *p.shape[:3], 1), p.device)
    labels = (p.detach().cumsum(dim=3) < u).sum(dim=3)  # inverse of the distribution function
    return labels.clamp(max=p.shape[3] - 1)  # where rounding lets the sum end below 1


def gain_table(right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """What the mean IoU gains if one pixel of true class t gets the label k instead of a.

    right, predicted, true: counts [B,C] of the present map -> [B,a,t,k]. Entries of pairs (a, t)
    that no pixel has are never used.
    """
    one_hot = torch.eye(right.shape[1], dtype=right.dtype, device=right.device)
    a, k, same = one_hot[:, None], one_hot[None], one_hot.bool()  # a and k: [a,k,C]
    before = mean_iou(right, predicted, true)  # [B]
    right, predicted, true = (n[:, None, None] for n in (right, predicted, true))  # [B,1,1,C]
    predicted = predicted - a + k
    lost = mean_iou(right - a + a * k, predicted, true)  # [B,a,k] if t is a: right before
    won = mean_iou(right + k - a * k, predicted, true)  # [B,a,k] if t is k: right afterwards
    neither = mean_iou(right, predicted, true)  # [B,a,k]
    after = torch.where(same, won[:, :, None], neither[:, :, None])  # [B,a,t,k]
    after = torch.where(same[:, :, None], lost[:, :, None], after)
    return after - before[:, None, None, None]


def counterfactual(p: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """Sum over pixels of the expected gain of the mean IoU if only this pixel were drawn again.

    p [B,H,W,C], labels drawn from it [B,H,W] -> [B], whose gradient is the estimate. It is
    unbiased: grad E[R] = E[sum over pixels and k of grad p(k) R(labels, with k at this pixel)].
    R(labels) is subtracted from each R, which changes nothing since sum_k grad p(k) = 0.
    """
    gains = gain_table(*counts(labels, truth, p.shape[3]))  # [B,a,t,k]
    valid = truth != IGNORE
    image = torch.arange(len(p), device=p.device).view(-1, 1, 1)
    # The row (a, t) of the table for each pixel. Labels are drawn, so it has no gradient.
    gain = gains.to(p.dtype)[image, labels, truth.where(valid, 0)]  # [B,H,W,k]
    gain = gain * valid[..., None]
    return (p * gain).sum(dim=(1, 2, 3))


def iou_objective(logits: Tensor, truth: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> scalar with the gradient of minus the expected IoU; mean IoU of the drawn maps."""
    p = logits.permute(0, 2, 3, 1).softmax(dim=3)  # [B,H,W,C]
    labels = sample(p, rng)  # [B,H,W]
    rewards = mean_iou(*counts(labels, truth, p.shape[3]))
    return -counterfactual(p, labels, truth).mean(), rewards.mean()


# ---- The object recall and its gradient ---------------------------------------------------------
class Objects(NamedTuple):
    """The M objects of a batch of label maps, and their P pieces: an object's part in one cell."""

    image: Tensor  # [M] index of the object's image
    label: Tensor  # [M] its class
    size: Tensor  # [M] its pixels
    owner: Tensor  # [P] index of the piece's object
    cell: Tensor  # [P] index of its cell among the B*h*w cells of the batch
    pixels: Tensor  # [P] its pixels


def regions(labels: Tensor) -> Tensor:
    """Connected regions of one label: each pixel gets its region's largest index. [B,H,W]."""
    index, before = torch.arange(labels.numel(), device=labels.device).view_as(labels), None
    while before is None or not torch.equal(index, before):
        before = index.clone()
        for dim, side in ((1, 0), (1, 1), (2, 0), (2, 1)):  # from below, above, right, left
            n = labels.shape[dim] - 1
            here, there = index.narrow(dim, side, n), index.narrow(dim, 1 - side, n)
            same = labels.narrow(dim, 0, n) == labels.narrow(dim, 1, n)
            here.copy_(torch.maximum(here, there).where(same, here))
        index = index.flatten()[index]  # the index of a region's pixel leads to a larger one
    return index


def find_objects(truth: Tensor, cell: int, smallest: float) -> Objects:
    """The connected regions of one class, of at least that share of an image. truth [B,H,W]."""
    n, (height, width) = truth.numel(), truth.shape[1:]
    root = regions(truth)  # [B,H,W]
    size = torch.bincount(root.flatten(), minlength=n)
    valid = (truth != IGNORE) & (size[root] >= smallest * height * width)
    roots, owner = torch.unique(root[valid], return_inverse=True)  # [M], [valid pixels]
    batch, y, x = valid.nonzero(as_tuple=True)
    cells = (batch * (height // cell) + y // cell) * (width // cell) + x // cell
    pieces, pixels = torch.unique(owner * n + cells, return_counts=True)
    image, label = roots // (height * width), truth.flatten()[roots]
    return Objects(image, label, size[roots], pieces // n, pieces % n, pixels)


def object_recall(labels: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """The share of each image's objects of which at least half is right; 0 without any object.

    labels [K,B,h,w] -> what each object adds to it, float64 [K,M]; the object recall [K,B].
    """
    right = labels.flatten(1)[:, objects.cell] == objects.label[objects.owner]  # [K,P]
    pixels = labels.new_zeros(len(labels), len(objects.size))  # [K,M] that are right
    pixels.index_add_(1, objects.owner, right * objects.pixels)
    number = torch.bincount(objects.image)[objects.image]  # [M] objects of the same image
    shares = (2 * pixels >= objects.size).double() / number
    recall = shares.new_zeros(labels.shape[:2]).index_add_(1, objects.image, shares)
    return shares, recall


def reinforce(log_p: Tensor, y: Tensor, objects: Objects, credit: str) -> tuple[Tensor, Tensor]:
    """-> [B], whose gradient is the estimate; the object recall of each sample [K,B].

    log_p [B,h,w,C], labels y drawn from it [K,B,h,w]. The paper learns from one of the K samples.
    Here each is used, with the others as its baseline.
    """
    shares, rewards = object_recall(y, objects)  # [K,M], [K,B]
    # Algorithm 2: each sample's reward minus the mean reward of the other samples.
    reward = rewards if credit == "image" else shares
    advantage = reward - (reward.sum(dim=0) - reward) / (len(y) - 1)
    if credit == "image":
        advantage = advantage[:, :, None, None]  # [K,B,1,1]
    else:
        cells = shares.new_zeros(y.flatten(1).shape)  # [K,B*h*w]
        advantage = cells.index_add_(1, objects.cell, advantage[:, objects.owner]).view_as(y)
    log_p = torch.stack([log_p.gather(3, labels[..., None])[..., 0] for labels in y])  # [K,B,h,w]
    return (advantage.to(log_p.dtype) * log_p).sum(dim=(2, 3)).mean(dim=0), rewards


def object_objective(
    logits: Tensor, truth: Tensor, args: Args, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """-> scalar with the gradient of minus the expected object recall; that of the drawn maps."""
    cell = args.cell or 1 << (logits.shape[2] // 16).bit_length() - 1
    log_p = F.avg_pool2d(logits, cell).permute(0, 2, 3, 1).log_softmax(dim=3)  # [B,h,w,C]
    labels = torch.stack([sample(log_p.exp(), rng) for _ in range(args.samples)])  # [K,B,h,w]
    objects = find_objects(truth, cell, args.smallest)
    estimate, rewards = reinforce(log_p, labels, objects, args.credit)
    return -estimate.mean(), rewards.mean()


# ---- Losses, the controls -----------------------------------------------------------------------
def soft_jaccard(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - the IoU of the expected counts, mean over images. [B,C,H,W], [B,H,W] -> scalar."""
    p, valid = logits.permute(0, 2, 3, 1).softmax(dim=3), (truth != IGNORE)[..., None]
    one_hot = F.one_hot(truth.where(truth != IGNORE, 0), p.shape[3]) * valid  # [B,H,W,C]
    right, predicted = (p * one_hot).sum(dim=(1, 2)), (p * valid).sum(dim=(1, 2))  # [B,C]
    return 1 - mean_iou(right, predicted, one_hot.sum(dim=(1, 2)).to(p.dtype)).mean()


def class_weighted_ce(logits: Tensor, truth: Tensor, pixels: Tensor, smooth: float) -> Tensor:
    """Cross-entropy in nats, the mean over pixels with the weight of their true class:
    1 / (n_c + smooth * sum n), scaled to a mean of 1. pixels: n, of the training set, [C]."""
    weights = 1 / (pixels + smooth * pixels.sum())
    weights = (weights / weights.mean()).to(logits.dtype)
    total = common.mean_over_processes(weights[truth[truth != IGNORE]].sum())
    loss = F.cross_entropy(logits, truth, weights, ignore_index=IGNORE, reduction="sum")
    return loss / total.clamp(min=1e-9)


# ---- The method ---------------------------------------------------------------------------------
@torch.no_grad()
def report_rewards(run: Run, net: Network, step: int) -> None:
    """Both rewards of the likeliest map of every test photo; for the report, not for training."""
    training, size, rewards = net.training, run.args.size, {"iou": [], "object_recall": []}
    net.eval()
    for i, (image, label) in enumerate(run.test.test_files):
        truth = datasets.resize_label(datasets.read_label(label, run.test.dataset, image), size)
        truth = torch.from_numpy(truth.astype(np.int64))[None].to(run.device)  # [1,H,W]
        labels = common.predict(net, run.test.images[i : i + 1], run.device).argmax(dim=1)
        rewards["iou"].append(mean_iou(*counts(labels, truth, len(run.classes))).item())
        objects = find_objects(truth, 1, run.args.smallest)
        rewards["object_recall"].append(object_recall(labels[None], objects)[1].item())
    net.train(training)
    run.write({f"test_{name}": float(np.mean(value)) for name, value in rewards.items()}, step)
    if common.rank() == 0:
        datasets.write_json(run.out / f"rewards/{step}.json", rewards)


def run(args: Args) -> Result:
    # Part 1: flags without an effect or out of range, and the data
    needs = dict.fromkeys(("samples", "cell", "credit"), "object_recall")
    for name, objective in {**needs, "smooth": "class_weighted_ce"}.items():
        if getattr(args, name) != getattr(Args, name) and args.objective != objective:
            raise UserError(f"--{name}: has no effect without --objective {objective}")
    if args.samples < 2 or args.smooth <= 0 or not 0 < args.reward_share <= 1:
        raise UserError("expected --samples from 2, --smooth above 0, --reward-share in (0, 1]")
    if args.cell is not None and (args.cell < 1 or common.STRIDE % args.cell):
        raise UserError(f"--cell {args.cell}: expected a divisor of {common.STRIDE}")
    run = Run(args, "reward_opt", stages=1 if args.checkpoint else 2)
    if run.result:
        return run.result
    args, net = run.args, run.network()
    photos = datasets.load(args, "target_few")

    # Part 2: training on the source
    few_steps = common.finetune_steps(args, args.reward_share, args.epochs)
    source_steps = 0 if args.checkpoint else args.steps - few_steps
    if not args.checkpoint:
        common.train(run, net, datasets.load(args, "source"), source_steps, "source")

    # Part 3: the reward, or a loss in its place; the rest is as in the row few_label
    start = copy.deepcopy(net)
    loader = Loader(photos, args.batch_size, run.device, args.seed, "few")
    model, optimizer = common.parallel(net), common.make_optimizer(net, args.lr)
    pixels = torch.tensor(photos.labels.ravel(), device=run.device)
    pixels = pixels.bincount(minlength=256)[: len(run.classes)]  # [C]
    net.train()
    for step in run.steps("few", few_steps, net=net, optimizer=optimizer):
        if step == 1:
            report_rewards(run, net, 0)
        rng = common.generator(args.seed, "few", step)
        lr = common.learning_rate(args.lr * args.reward_lr, step, few_steps)
        common.set_lr(optimizer, lr)
        x, truth = loader(step)  # [B,3,H,W], [B,H,W]
        x, truth = common.crop_flip(x, truth, rng)

        # Step 1: logits and the anchor
        with run.autocast():
            outputs = model(x, aux=True)
        ce, logits = common.segmentation_loss(outputs, truth), outputs[0]  # [B,C,H,W]
        objective, scalars = 0.0, {"ce_loss": ce}

        # Step 2: the objective
        if args.objective == "iou":
            objective, scalars["reward"] = iou_objective(logits, truth, rng)
        elif args.objective == "object_recall":
            objective, scalars["reward"] = object_objective(logits, truth, args, rng)
        elif args.objective == "soft_jaccard":
            objective = soft_jaccard(logits, truth)
        elif args.objective == "class_weighted_ce":
            objective = class_weighted_ce(logits, truth, pixels, args.smooth)

        # Step 3: the update
        loss = args.anchor * ce + args.weight * objective
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(step, loss=loss, lr=lr, **scalars)
        if common.is_quarter(step, few_steps):
            run.evaluate(net, step)
        if step == few_steps or common.is_quarter(step, few_steps):
            report_rewards(run, net, step)
    result = run.finish(net, target_labels=len(photos), steps=source_steps + few_steps)
    if common.rank() == 0:
        draw_gradient(run, start.eval(), photos)
    return result


# ---- Figure -------------------------------------------------------------------------------------
def draw_gradient(run: Run, start: Network, split: Split) -> None:
    """figures/gradient.png: estimates of both rewards' gradients by the logit of each pixel's true
    class. In the titles: variance over the squared length of the mean of 64 estimates."""
    truth = torch.from_numpy(split.labels[:1].astype(np.int64)).to(run.device)  # [1,H,W]
    logits = common.predict(start, split.images[:1], run.device).clone().requires_grad_()
    recall = partial(object_objective, logits, truth)
    objectives = {
        "object recall": partial(recall, replace(run.args, credit="object")),
        "credit image": partial(recall, replace(run.args, credit="image")),
        "IoU": partial(iou_objective, logits, truth),
    }
    figure = common.new_figure(12, 1.6)
    axes = figure.subplots(1, 4, subplot_kw={"xticks": [], "yticks": []})
    axes[0].imshow(split.images[0])
    for axis, (title, objective) in zip(axes[1:], objectives.items(), strict=True):
        rng = common.generator("gradient.png", title)
        losses = (objective(rng=rng)[0] for _ in range(64))
        gradients = -torch.cat([torch.autograd.grad(loss, logits)[0] for loss in losses])
        if title != "credit image":  # its mean is that of the axis before, but known less exactly
            square = gradients.mean(dim=0).square().sum()
        gradient = gradients[0].gather(0, truth.where(truth != IGNORE, 0))[0].cpu()  # [H,W]
        limit = 3 * gradient.std().item()
        axis.imshow(gradient.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        axis.set_title(f"{title}: {gradients.var(dim=0).sum() / square:.2g}", fontsize=8)
    common.save_figure(figure, run.out / "figures/gradient.png")


if __name__ == "__main__":
    common.main(Args, run, __doc__)
