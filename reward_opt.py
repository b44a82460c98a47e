"""Fine-tunes a segmentation network on a reward: the IoU or the object recall of its label maps.

After "Tuning computer vision models with task rewards" (arXiv:2302.08242v1). The network is trained
on the source, then fine-tuned on the labelled target photos with a reward and with cross-entropy
(the anchor). If the reward is the IoU of single images (its mean over classes), the exact gradient
of the expected reward has, but for its sign, almost the direction of that of a soft-Jaccard loss
(1 - IoU of expected counts): the cosine is 0.9999, measured, not proven. Training with either ends
at the same mIoU. So rewards, which need random label maps, are meant for aims without such a loss.

Object recall is such a reward. An object is a connected region of one class. It is found if at
least half of its pixels are right. Recall is the share of objects that are found. On the miniature
(the default data) a network that is trained on it finds more objects than one that is trained on
the controls below. On real photos soft_jaccard finds as many (docs/ablations.md).

Controls replace the reward by a loss of the same --weight (soft_jaccard, class_weighted_ce) or
leave it out (cross_entropy, which is few_label of baseline.py). All else stays the same.

    python reward_opt.py                                 (16 labelled photos; the reward is the IoU)

    python reward_opt.py --objective object_recall       (REINFORCE: more objects, less mIoU)

    python reward_opt.py --objective class_weighted_ce   (a control)

Each command takes 1 to 4 minutes on one CPU core; the first reaches 58 mIoU on the miniature. Each
measures both rewards on the test photos: their means are in scalars.json (test_iou,
test_object_recall), the values of each photo in rewards/.

IoU: the label of each pixel is drawn independently. The gradient is estimated from one drawn map:
for each pixel, what would the reward be if this pixel alone had another label? The expectation over
this label is exact. The IoU changes by an amount that depends only on the old label, the true class
and the new label. So a table of C x C x C numbers is enough for all pixels of an image.

Object recall: one label is drawn for each cell, a small square of pixels. If pixels were drawn
independently, all maps would find nearly the same objects; with cells, maps differ in them.
REINFORCE with a baseline from other samples (algorithm 2 of the paper) gives the same reward to all
cells of an image, which makes a very noisy estimate. But whether an object is found depends only on
the cells that it touches. So each cell is rewarded only for the objects that it touches: the
estimate has the same mean and a far smaller variance. The estimator of the IoU, cells, and credit
by object are not from the paper.
"""

import copy
import math
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
    """What is optimised together with the anchor. Rewards: iou, object_recall. Controls:
    soft_jaccard (1 - IoU of expected counts), class_weighted_ce, cross_entropy (anchor alone)."""
    weight: float = 5.0
    """Weight of the objective. With 5 the gradient of the IoU is about as large as the gradient of
    the cross-entropy."""
    anchor: float = 1.0
    """Weight of the anchor, the cross-entropy. The paper: 0, the reward alone."""
    reward_share: float = 0.5
    """Share of --steps for fine-tuning with the objective, after training on the source."""
    epochs: int = 400
    """Maximum number of passes over the labelled photos. Steps of --reward-share beyond this go to
    training on the source; with --init CHECKPOINT they are left out."""
    reward_lr: float = 0.5
    """Initial learning rate of fine-tuning, as a multiple of --lr."""
    smooth: float = 0.01
    """For class_weighted_ce: larger values make the weights of the classes more equal."""
    samples: int = 8
    """For object_recall: number of label maps drawn for each image (K). The paper: 2."""
    cell: int | None = None
    """For object_recall: side of a cell in pixels. Default: the largest power of 2 that is at most
    a sixteenth of the height and divides height and width."""
    smallest: float = 0.0005
    """Size of the smallest object, as a share of the image, or of the crop in training."""
    credit: Literal["object", "image"] = "object"
    """What a cell is rewarded for: the objects that it touches, or, as in the paper, the image."""


# ---- The IoU and its gradient -------------------------------------------------------------------
def counts(labels: Tensor, truth: Tensor, num_classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """The number of pixels of each class: predicted and true, predicted, true.

    Ignored pixels are not counted. labels, truth [B,H,W] -> [B,C] each, float64 since one pixel
    changes a reward by only about 1 / HW.
    """
    confusion = common.confusion_matrices(labels, truth, num_classes).double()  # [B,C,C]
    right = confusion.diagonal(dim1=1, dim2=2)
    return right, confusion.sum(dim=1), confusion.sum(dim=2)


def mean_iou(right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """Mean IoU over the classes in the truth; 0 if there is none. Counts [...,C] -> [...]."""
    present = true > 0
    union = (predicted + true - right).clamp(min=1)  # no 0 / 0 for a class that is not present
    return (present * right / union).sum(dim=-1) / present.sum(dim=-1).clamp(min=1)


def sample(p: Tensor, rng: torch.Generator) -> Tensor:
    """Draws the label of each pixel independently. Probabilities [B,H,W,C] -> [B,H,W]."""
    u = common.to_device(common.draw(rng, *p.shape[:3], 1), p.device)
    labels = (p.detach().cumsum(dim=3) < u).sum(dim=3)  # inverse CDF sampling
    return labels.clamp(max=p.shape[3] - 1)  # rounding can make the last sum less than u


def gain_table(right: Tensor, predicted: Tensor, true: Tensor) -> Tensor:
    """The gain of the mean IoU if one pixel of true class t changes its label from a to k.

    right, predicted, true: counts [B,C] of a drawn map -> gains [B,a,t,k]. If the map has no pixel
    with label a and true class t, the entry is meaningless; no pixel looks it up.
    """
    one_hot = torch.eye(right.shape[1], dtype=right.dtype, device=right.device)  # [C,C]
    a, k, same = one_hot[:, None], one_hot[None], one_hot.bool()  # [a,1,C], [1,k,C], [C,C]
    before = mean_iou(right, predicted, true)  # [B]
    right, predicted, true = (n[:, None, None] for n in (right, predicted, true))  # [B,1,1,C]
    predicted = predicted - a + k  # [B,a,k,C]
    # a * k is one pixel if a = k, where the label does not change, else 0.
    if_a = mean_iou(right - a + a * k, predicted, true)  # [B,a,k] for t = a: was right before
    if_k = mean_iou(right + k - a * k, predicted, true)  # [B,a,k] for t = k: is right afterwards
    neither = mean_iou(right, predicted, true)  # [B,a,k] for all other t
    after = torch.where(same, if_k[:, :, None], neither[:, :, None])  # [B,a,t,k]
    after = torch.where(same[:, :, None], if_a[:, :, None], after)
    return after - before[:, None, None, None]


def counterfactual(p: Tensor, labels: Tensor, truth: Tensor) -> Tensor:
    """The sum over pixels of the expected gain of the mean IoU if that pixel alone is drawn again.

    p [B,H,W,C], labels drawn from it [B,H,W] -> [B]. Its gradient is an unbiased estimate: grad
    E[R] = E[sum over pixels and k of (grad p(k)) * R(labels, with k at this pixel)]. The gain is
    this R less R(labels). The latter has no effect on the gradient, since sum_k grad p(k) = 0.
    """
    gains = gain_table(*counts(labels, truth, p.shape[3]))  # [B,a,t,k]
    valid = truth != IGNORE
    image = torch.arange(len(p), device=p.device).view(-1, 1, 1)
    # Each pixel looks up the gains of its label a and true class t. They have no gradient.
    gain = gains.to(p.dtype)[image, labels, truth.where(valid, 0)]  # [B,H,W,k]
    gain = gain * valid[..., None]
    return (p * gain).sum(dim=(1, 2, 3))


def iou_objective(logits: Tensor, truth: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """-> surrogate loss, whose gradient estimates that of -E[mean IoU]; mean IoU of drawn maps."""
    p = logits.permute(0, 2, 3, 1).softmax(dim=3)  # [B,H,W,C]
    labels = sample(p, rng)  # [B,H,W]
    rewards = mean_iou(*counts(labels, truth, p.shape[3]))
    return -counterfactual(p, labels, truth).mean(), rewards.mean()


# ---- The object recall and its gradient ---------------------------------------------------------
class Objects(NamedTuple):
    """The M objects of a batch of label maps, and their P pieces: an object's part in one cell. An
    image has h x w cells."""

    image: Tensor  # [M] index of the image that has the object
    label: Tensor  # [M] class of the object
    size: Tensor  # [M] number of pixels of the object
    owner: Tensor  # [P] index of the object that has the piece
    cell: Tensor  # [P] index of the piece's cell among the B*h*w cells of the batch
    pixels: Tensor  # [P] number of pixels of the piece


def regions(labels: Tensor) -> Tensor:
    """4-connected regions of one label: each pixel gets its region's id, the largest pixel index
    in the region. [B,H,W] -> [B,H,W]."""
    index, before = torch.arange(labels.numel(), device=labels.device).view_as(labels), None
    while before is None or not torch.equal(index, before):
        before = index.clone()
        for dim, side in ((1, 0), (1, 1), (2, 0), (2, 1)):  # from below, above, right, left
            n = labels.shape[dim] - 1
            here, there = index.narrow(dim, side, n), index.narrow(dim, 1 - side, n)
            same = labels.narrow(dim, 0, n) == labels.narrow(dim, 1, n)
            here.copy_(torch.maximum(here, there).where(same, here))
        index = index.flatten()[index]  # each id is replaced by the id at the pixel it points to
    return index


def find_objects(truth: Tensor, cell: int, smallest: float) -> Objects:
    """Regions of at least the share `smallest` of an image. truth [B,H,W]; cell divides H and W."""
    n, (height, width) = truth.numel(), truth.shape[1:]
    root = regions(truth)  # [B,H,W]
    size = torch.bincount(root.flatten(), minlength=n)
    valid = (truth != IGNORE) & (size[root] >= smallest * height * width)
    roots, owner = torch.unique(root[valid], return_inverse=True)  # [M], [valid pixels]
    batch, row, column = valid.nonzero(as_tuple=True)  # [valid pixels] each
    cells = (batch * (height // cell) + row // cell) * (width // cell) + column // cell
    # A piece is a pair (object, cell), written as one number. Every cell index is below n.
    pieces, pixels = torch.unique(owner * n + cells, return_counts=True)  # [P] each
    image, label = roots // (height * width), truth.flatten()[roots]
    return Objects(image, label, size[roots], pieces // n, pieces % n, pixels)


def object_recall(labels: Tensor, objects: Objects) -> tuple[Tensor, Tensor]:
    """The share of each image's objects that are found; 0 for an image without objects.

    labels [K,B,h,w] of cells -> what each object adds to the recall, float64 [K,M]; recall [K,B].
    """
    right = labels.flatten(1)[:, objects.cell] == objects.label[objects.owner]  # [K,P]
    pixels = labels.new_zeros(len(labels), len(objects.size))  # [K,M] right pixels of each object
    pixels.index_add_(1, objects.owner, right * objects.pixels)
    number = torch.bincount(objects.image)[objects.image]  # [M] objects in the same image
    shares = (2 * pixels >= objects.size).double() / number  # [K,M]
    recall = shares.new_zeros(labels.shape[:2]).index_add_(1, objects.image, shares)
    return shares, recall


def reinforce(log_p: Tensor, maps: Tensor, objects: Objects, credit: str) -> tuple[Tensor, Tensor]:
    """-> [B], whose gradient estimates that of E[object recall]; the recall of each sample [K,B].

    log_p [B,h,w,C], maps drawn from it [K,B,h,w]. In algorithm 2 of the paper one sample gives the
    gradient, and others are its baseline. Here each of the K samples gives one, and the mean of the
    others is its baseline.
    """
    shares, rewards = object_recall(maps, objects)  # [K,M], [K,B]
    credited = rewards if credit == "image" else shares
    advantage = credited - (credited.sum(dim=0) - credited) / (len(maps) - 1)
    if credit == "image":
        advantage = advantage[:, :, None, None]  # [K,B,1,1]
    else:  # a cell gets the sum over the objects that it touches
        cells = shares.new_zeros(maps.flatten(1).shape)  # [K,B*h*w]
        advantage = cells.index_add_(1, objects.cell, advantage[:, objects.owner]).view_as(maps)
    log_p = torch.stack([log_p.gather(3, drawn[..., None])[..., 0] for drawn in maps])  # [K,B,h,w]
    return (advantage.to(log_p.dtype) * log_p).sum(dim=(2, 3)).mean(dim=0), rewards


def object_objective(
    logits: Tensor, truth: Tensor, args: Args, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """-> surrogate loss, whose gradient estimates that of -E[object recall]; the maps' recall."""
    height, width = logits.shape[2:]
    largest = 2 ** int(math.log2(max(1, height // 16)))
    cell = args.cell or math.gcd(largest, height, width)
    log_p = F.avg_pool2d(logits, cell).permute(0, 2, 3, 1).log_softmax(dim=3)  # [B,h,w,C]
    labels = torch.stack([sample(log_p.exp(), rng) for _ in range(args.samples)])  # [K,B,h,w]
    objects = find_objects(truth, cell, args.smallest)
    estimate, rewards = reinforce(log_p, labels, objects, args.credit)
    return -estimate.mean(), rewards.mean()


# ---- Losses, the controls -----------------------------------------------------------------------
def soft_jaccard(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - IoU of expected counts, the mean over images. [B,C,H,W], [B,H,W] -> scalar."""
    p, valid = logits.permute(0, 2, 3, 1).softmax(dim=3), (truth != IGNORE)[..., None]
    one_hot = F.one_hot(truth.where(truth != IGNORE, 0), p.shape[3]) * valid  # [B,H,W,C]
    right, predicted = (p * one_hot).sum(dim=(1, 2)), (p * valid).sum(dim=(1, 2))  # [B,C]
    return 1 - mean_iou(right, predicted, one_hot.sum(dim=(1, 2)).to(p.dtype)).mean()


def class_weighted_ce(logits: Tensor, truth: Tensor, pixels: Tensor, smooth: float) -> Tensor:
    """Cross-entropy in nats, a weighted mean over pixels. A pixel of true class c has the weight
    1 / (n_c + smooth * sum n). pixels: n, the pixels of each class in the labelled photos, [C]."""
    weights = 1 / (pixels + smooth * pixels.sum())
    # Dividing by the mean changes no result. It only keeps `total` far above the clamp.
    weights = (weights / weights.mean()).to(logits.dtype)
    total = common.mean_over_processes(weights[truth[truth != IGNORE]].sum())
    loss = F.cross_entropy(logits, truth, weights, ignore_index=IGNORE, reduction="sum")
    return loss / total.clamp(min=1e-9)


# ---- The method ---------------------------------------------------------------------------------
@torch.no_grad()
def report_rewards(run: Run, net: Network, step: int) -> None:
    """Both rewards of each test photo's argmax map; for the report, not for training."""
    training, size, rewards = net.training, run.args.size, {"iou": [], "object_recall": []}
    net.eval()
    for i, (image, label) in enumerate(run.test.test_files):
        truth = datasets.resize_label(datasets.read_label(label, run.test.dataset, image), size)
        truth = torch.from_numpy(truth.astype(np.int64))[None].to(run.device)  # [1,H,W]
        labels = common.predict(net, run.test.images[i : i + 1], run.device).argmax(dim=1)
        rewards["iou"].append(mean_iou(*counts(labels, truth, len(run.classes))).item())
        objects = find_objects(truth, 1, run.args.smallest)
        recall = object_recall(labels[None], objects)[1].item()
        # A photo without objects: null in the file, left out of the mean
        rewards["object_recall"].append(recall if len(objects.size) else None)
    net.train(training)
    values = {name: [v for v in values if v is not None] for name, values in rewards.items()}
    run.write({f"test_{name}": float(np.mean(v)) for name, v in values.items() if v}, step)
    if common.rank() == 0:
        datasets.write_json(run.out / f"rewards/{step}.json", rewards)


def run(args: Args) -> Result:
    """Trains the network on the source, then with the objective on the labelled photos."""
    # Part 1: checks of the flags, and the data
    needs = dict.fromkeys(("samples", "cell", "credit"), "object_recall")
    for name, objective in {**needs, "smooth": "class_weighted_ce"}.items():
        if getattr(args, name) != getattr(Args, name) and args.objective != objective:
            raise UserError(f"--{name}: has no effect without --objective {objective}")
    if args.objective == "cross_entropy" and args.weight != Args.weight:
        raise UserError("--weight: has no effect with --objective cross_entropy")
    if args.anchor == 0 and (args.weight == 0 or args.objective == "cross_entropy"):
        raise UserError("--anchor 0: nothing is left to train with")
    if args.samples < 2:
        raise UserError(f"--samples {args.samples}: expected at least 2")
    if not args.smooth > 0:
        raise UserError(f"--smooth {args.smooth}: expected a number above 0")
    if not 0 < args.reward_share <= 1:
        raise UserError(f"--reward-share {args.reward_share}: expected above 0 and at most 1")
    if args.cell is not None and (args.cell < 1 or common.STRIDE % args.cell):
        raise UserError(f"--cell {args.cell}: expected a divisor of {common.STRIDE}")
    run = Run(args, "reward_opt", stages=1 if args.checkpoint else 2)
    if run.result:
        return run.result
    args, photos = run.args, datasets.load(run.args, "target_few")
    run.begin()
    net = run.network()

    # Part 2: training on the source
    few_steps = common.finetune_steps(args, args.reward_share, args.epochs)
    source_steps = 0 if args.checkpoint else args.steps - few_steps
    if not args.checkpoint:
        common.train(run, net, datasets.load(args, "source"), source_steps, "source")

    # Part 3: fine-tuning with the objective; all else is as in the row few_label
    start = copy.deepcopy(net)  # the network before fine-tuning, for the figure
    loader = Loader(photos, args.batch_size, run.device, args.seed, "few")
    model, optimizer = common.parallel(net), common.make_optimizer(net, args.lr)
    pixels = torch.tensor(photos.labels.ravel(), device=run.device)
    pixels = pixels.bincount(minlength=256)[: len(run.classes)]  # [C], for class_weighted_ce
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
        # The loss of a reward is a surrogate: only its gradient has a meaning, not its value.
        run.log(step, loss=loss, lr=lr, **scalars)
        if common.is_quarter(step, few_steps):
            run.evaluate(net, step)
        if step == few_steps or common.is_quarter(step, few_steps):
            report_rewards(run, net, step)
    result = run.finish(net, target_labels=len(photos), steps=source_steps + few_steps)
    if common.rank() == 0:  # after the result, which names time and memory
        draw_gradient(run, start.eval(), photos)
    return result


# ---- Figure -------------------------------------------------------------------------------------
def draw_gradient(run: Run, start: Network, split: Split) -> None:
    """figures/gradient.png: one estimate of each reward's gradient with respect to the logit of the
    true class: blue where a higher logit raises the reward, red where it lowers it. noise: the
    summed variance of 64 estimates, divided by the squared length of the true gradient. For credit
    by image, the mean of the estimates by object is taken: it has the same expectation and is more
    exact."""
    truth = torch.from_numpy(split.labels[:1].astype(np.int64)).to(run.device)  # [1,H,W]
    logits = common.predict(start, split.images[:1], run.device).clone().requires_grad_()
    recall = partial(object_objective, logits, truth)
    objectives = {
        "object recall, credit by object": partial(recall, replace(run.args, credit="object")),
        "object recall, credit by image": partial(recall, replace(run.args, credit="image")),
        "IoU": partial(iou_objective, logits, truth),
    }
    figure = common.new_figure(12, 2.1)
    axes = figure.subplots(1, 4, subplot_kw={"xticks": [], "yticks": []})
    axes[0].imshow(split.images[0])
    axes[0].set_title("labelled photo", fontsize=9)
    for axis, (title, objective) in zip(axes[1:], objectives.items(), strict=True):
        rng = common.generator("gradient.png", title)
        losses = (objective(rng=rng)[0] for _ in range(64))
        gradients = -torch.cat([torch.autograd.grad(loss, logits)[0] for loss in losses])
        if title != "object recall, credit by image":
            # The squared length of the mean, less its noise. If 0 is left, the noise is infinite.
            square = gradients.mean(dim=0).square().sum() - gradients.var(dim=0).sum() / 64
            square = square.clamp(min=0)
        valid = truth != IGNORE  # [1,H,W]; ignored pixels are shown as 0
        gradient = (gradients[0].gather(0, truth.where(valid, 0)) * valid)[0].cpu()  # [H,W]
        limit = 3 * gradient.std().item()
        axis.imshow(gradient.numpy(), cmap="RdBu", vmin=-limit, vmax=limit)
        axis.set_title(f"{title}\nnoise {gradients.var(dim=0).sum() / square:.3g}", fontsize=9)
    common.save_figure(figure, run.out / "figures/gradient.png")


if __name__ == "__main__":
    common.main(Args, run, __doc__)
