"""Learns which augmentation of each source image helps on real photos, by meta-gradients.

DataRater (arXiv:2505.17895v1), here for choosing augmentations, with exact meta-gradients from
mixed-mode differentiation (MixFlow-MG, arXiv:2505.00793v2):

    python datarater.py

    python datarater.py --choose random         (a control; the others are worst and original)

    python datarater.py --corrupt 0.1                 (do damaged images get lower scores?)

The first takes two minutes on one CPU core and reaches 59 mIoU on the miniature; a random choice
reaches 56, training on the images as they are 44.

A run has three parts. 1. Meta-training: a rater scores images. Inner networks train on batches of
augmented source images, each weighted by the softmax of the batch's scores. After a few of these
updates the loss on labelled target photos is measured, the outer loss. Its derivative with respect
to the weights of the images says which images should have counted more, and trains the rater.
2. The choice: the rater scores all candidates (each image with each augmentation); the best ones
make a training set. 3. The segmentation network is trained from scratch on this set; --steps counts
these updates.

The run folder gets best_augmentations_step_X.pt (scores and choice of each image) and set/, the
training set, which other methods take as --init RUN/set. Without --out the controls and --corrupt
have run folders of their own: datarater_random, datarater_corrupt and so on.

Under torchrun each process has inner networks of its own, the rater learns from the mean of their
meta-gradients, and rank 0 chooses. With --init CHECKPOINT all networks start from that checkpoint.
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import common
from common import AUGMENTATIONS, IGNORE, Augmentation, Loader, Result, Run, Split, UserError

Augmentations = dict[str, Augmentation]  # by name
Batch = tuple[Tensor, Tensor]  # images [B,3,H,W] and labels [B,H,W]


@dataclass(frozen=True)
class Args(common.Args):
    choose: Literal["best", "random", "worst", "original"] = "best"
    """Which candidates of an image to train on: those of the highest scores, random ones, those of
    the lowest scores, or the image as it is. random and original need no rater and train none."""
    augmentations: tuple[str, ...] = tuple(AUGMENTATIONS)
    """What the candidates of an image are made by. With --corrupt: original alone."""
    k: int = 1
    """Candidates of each image to train on."""
    corrupt: float = 0.0
    """Share of source images in which 10-90% of the pixels are replaced by random colours, to see
    whether the rater detects them."""
    meta_steps: int | None = None
    """Updates of the rater. Default: half of --steps; a quarter with --corrupt."""
    meta_lr: float = 1e-3
    """Learning rate of the rater's Adam."""
    clip: float = 0.01
    """Largest norm of a meta-gradient. The paper: 0.01."""
    population: int = 2
    """Inner networks. The paper: 8."""
    lifetime: int | None = None
    """Meta-steps after which an inner network starts anew. The restarts of a population are spread
    evenly over this time. Default: a quarter of --steps."""
    warm_up: int | None = None
    """Updates of a new inner network, on candidates of equal weights, before its first meta-step.
    An untrained network gains from any image, so its meta-gradient tells little about a trained
    one. Default: 0.75 times --steps; 2.5 times with --corrupt. The paper: 0."""
    inner_updates: int | None = None
    """T, inner updates that are differentiated. Default: 2, as in the paper; 16 with --corrupt."""
    inner_batch: int | None = None
    """Source images in an inner batch, each there with every augmentation. Default: 4; 16 with
    --corrupt. Under torchrun: of each process."""
    inner_lr: float = 0.05
    """Learning rate of the inner networks, constant."""
    inner_decay: float = 0.01
    """Decoupled weight decay of the inner networks. The paper: 0.1."""
    shrink: int = 2
    """Sides of the images in meta-training and for the rater, as a fraction 1/shrink of --size."""


# ---- The rater ----------------------------------------------------------------------------------
class Rater(nn.Sequential):
    """images [B,3,H,W] -> scores [B]. All equal at first, since the last layer starts at zero."""

    def __init__(self) -> None:
        head = nn.Linear(256, 1)
        nn.init.zeros_(head.weight)
        super().__init__(
            common.conv(3, 32, stride=2),
            common.conv(32, 64, stride=2),
            common.conv(64, 128, stride=2),
            common.conv(128, 256, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(1),
            head,
            nn.Flatten(0),
        )


# ---- Inner networks -----------------------------------------------------------------------------
class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation whose forward-mode derivative can be differentiated again. The derivative
    of torch 2.14 takes the mean and the variance of the batch as constants, which is wrong."""

    def forward(self, x: Tensor) -> Tensor:  # [B,C,H,W]
        if forward_ad.unpack_dual(x).tangent is None:
            return super().forward(x)
        # Plain operations, whose derivatives are right. The running statistics stay as they are.
        x = x - x.mean(dim=(0, 2, 3), keepdim=True)
        variance = x.square().mean(dim=(0, 2, 3), keepdim=True)  # [1,C,1,1]
        x = x * (variance + self.eps).rsqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


def replace_layers(module: nn.Module) -> None:
    """In place: our BatchNorm, and no dropout, since each loss is computed twice, by `losses` and
    by `slopes`, and both must agree."""
    for name, layer in module.named_children():
        if isinstance(layer, nn.BatchNorm2d):
            norm = BatchNorm(layer.num_features, layer.eps, layer.momentum)
            norm.load_state_dict(layer.state_dict())
            setattr(module, name, norm)
        elif isinstance(layer, nn.Dropout):
            setattr(module, name, nn.Identity())
        else:
            replace_layers(layer)


def image_losses(outputs: list[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of each image, in nats: the mean over its valid pixels, 0 where there is none.

    outputs: logits of each head, [B,C,H,W]; labels [B,H,W] -> [B]. In plain operations, since
    torch 2.14 cannot differentiate the forward-mode derivative of log_softmax.
    """
    valid = labels != IGNORE
    classes = torch.where(valid, labels, 0)[:, None]  # [B,1,H,W]
    losses = []
    for logits in outputs:
        logits = logits - logits.amax(dim=1, keepdim=True)  # so that exp does not overflow
        log_sum = logits.exp().sum(dim=1).log()  # [B,H,W]
        loss = (log_sum - logits.gather(1, classes)[:, 0]) * valid
        losses.append(loss.sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1))
    return losses[0] + common.AUX_WEIGHT * sum(losses[1:])


class InnerNetwork(nn.Module):
    """A segmentation network as a function of its parameters in one vector, theta [P]."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        replace_layers(net)
        self.net = net.train()
        self.register_buffer("momentum", torch.zeros_like(self.theta()))  # of its optimizer, [P]

    def theta(self) -> Tensor:
        return parameters_to_vector(self.net.parameters()).detach()

    def update(self, theta: Tensor, momentum: Tensor) -> None:
        """Takes these parameters and this state of the optimizer, both [P]."""
        vector_to_parameters(theta.detach(), self.net.parameters())
        self.momentum = momentum.detach()

    def losses(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image, [B]; running statistics are updated as in any training step."""
        pieces = theta.split([p.numel() for p in self.net.parameters()])
        named = zip(self.net.named_parameters(), pieces, strict=True)
        parameters = {name: piece.view_as(p) for (name, p), piece in named}
        outputs = torch.func.functional_call(self.net, parameters, (images,), {"aux": True})
        return image_losses(outputs, labels)

    def slopes(self, theta: Tensor, direction: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The derivative of each image's loss along a direction of theta, [B].

        It comes from forward mode, and can be differentiated with respect to theta.
        """
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch's, about its own code
            losses = self.losses(forward_ad.make_dual(theta, direction), images, labels)
            return forward_ad.unpack_dual(losses).tangent


# ---- Meta-gradients -----------------------------------------------------------------------------
MOMENTUM = 0.9


def sgd(theta: Tensor, momentum: Tensor, gradient: Tensor, args: Args) -> tuple[Tensor, Tensor]:
    """An update of SGD with momentum and decoupled weight decay. All vectors [P]."""
    momentum = MOMENTUM * momentum + gradient
    theta = (1 - args.inner_lr * args.inner_decay) * theta - args.inner_lr * momentum
    return theta, momentum


def mixed(
    member: InnerNetwork, batches: list[Batch], weights: Tensor, photos: Batch, args: Args
) -> tuple[Tensor, Tensor, Tensor]:
    """Trains an inner network for T updates, and differentiates the outer loss through them.

    batches: T batches of B candidates; weights [T,B]; photos: a batch of target photos -> gradient
    of the outer loss with respect to the weights [T,B], outer loss, losses of the images [T,B].

    Update t uses the gradient g = sum_i w_i grad l_i. So d outer / d w_i = grad l_i . d outer / dg.
    Mixed-mode differentiation (MixFlow-MG): only the parameters of each update are kept. Backwards
    through time, forward mode gives the derivatives of all l_i along the direction d outer / dg.
    Reverse mode, applied to their weighted sum, gives the Hessian of the loss times this direction.
    """
    theta, momentum = member.theta(), member.momentum
    thetas, losses = [], []
    for batch, w in zip(batches, weights, strict=True):
        thetas.append(theta.detach().requires_grad_())
        losses.append(member.losses(thetas[-1], *batch))  # [B]
        # DataRater: each image contributes to the gradient by its weight.
        (gradient,) = torch.autograd.grad(w @ losses[-1], thetas[-1])
        theta, momentum = sgd(theta, momentum, gradient, args)
    member.update(theta, momentum)

    # The outer loss, with running statistics as at test. Its derivative ignores that they depend on
    # the parameters, too.
    theta = theta.requires_grad_()
    member.eval()
    outer_loss = member.losses(theta, *photos).mean()
    member.train()

    # Derivatives of the outer loss with respect to theta and momentum after update t = T to 1.
    (to_theta,) = torch.autograd.grad(outer_loss, theta)
    to_momentum = torch.zeros_like(to_theta)
    to_weights = torch.empty_like(weights)
    for t in reversed(range(len(batches))):
        # sgd adds the gradient to the momentum, and subtracts lr times the momentum from theta.
        to_gradient = to_momentum - args.inner_lr * to_theta
        to_momentum = MOMENTUM * to_gradient
        to_theta = (1 - args.inner_lr * args.inner_decay) * to_theta
        slopes = member.slopes(thetas[t], to_gradient, *batches[t])  # [B]
        to_weights[t] = slopes.detach()
        if t > 0:  # g depends on theta: the Hessian of the weighted loss, times to_gradient
            (product,) = torch.autograd.grad(weights[t] @ slopes, thetas[t])
            to_theta = to_theta + product
    return to_weights, outer_loss.detach(), torch.stack(losses).detach()


# ---- Meta-training ------------------------------------------------------------------------------
def shrunk(images: Tensor, labels: Tensor, by: int) -> Batch:
    """Both at 1/by of their sides: means of images, single values of labels."""
    return F.avg_pool2d(images, by), labels[:, by // 2 :: by, by // 2 :: by]


def augmented(
    batch: Batch, augmentations: Augmentations, shrink: int, rng: torch.Generator
) -> Batch:
    """A batch with each of the A augmentations, small. -> [A*B,3,h,w], [A*B,h,w]."""
    images, labels = common.crop_flip(*batch, rng)
    images = torch.cat([augment(images, rng) for augment in augmentations.values()])
    return shrunk(images, labels.repeat(len(augmentations), 1, 1), shrink)


def starts_anew(step: int, p: int, args: Args) -> bool:
    """Whether inner network p is a new one at this meta-step; they take turns."""
    return step == 1 or (step - 1 + p * args.lifetime // args.population) % args.lifetime == 0


def new_inner_network(run: Run) -> InnerNetwork:
    net = common.Network(run.args.net, len(run.classes), run.args.pretrained)
    if run.args.checkpoint:
        common.load_weights(net, run.args.checkpoint)
    return InnerNetwork(net).to(run.device)


def meta_train(
    run: Run, rater: Rater, source: Split, few: Split, augmentations: Augmentations
) -> None:
    """Trains the rater, in place."""
    args, seed = with_lengths(run.args), run.args.seed
    updates = args.inner_updates
    batch_size = args.inner_batch * common.world_size()
    source_loader = Loader(source, batch_size, run.device, seed, "rater", "source")
    photo_loader = Loader(few, args.batch_size, run.device, seed, "rater", "photos")
    members = nn.ModuleList(new_inner_network(run) for _ in range(args.population))
    # As in DataRater, each inner network has an Adam of its own, and the rater moves by the mean of
    # their updates. An update of Adam depends on the gradient alone, so all of them, one after the
    # other at a share of the learning rate, add up to the mean.
    lr = args.meta_lr / args.population
    adams = [torch.optim.Adam(rater.parameters(), lr) for _ in members]
    state = {f"adam_{p}": adam for p, adam in enumerate(adams)}
    model = common.parallel(rater.train())
    for step in run.steps("rater", args.meta_steps, rater=rater, members=members, **state):
        rng = common.generator(seed, "rater", step)
        gradients, scalars = [], []
        for p in range(args.population):
            # Step 1: in turns the inner networks start anew, with a warm-up at equal weights
            if starts_anew(step, p, args):
                members[p] = new_inner_network(run)
                loader = Loader(source, batch_size, run.device, seed, "warm_up", step, p)
                for n in range(args.warm_up):
                    theta = members[p].theta().requires_grad_()
                    batch = augmented(loader(n), augmentations, args.shrink, rng)
                    loss = members[p].losses(theta, *batch).mean()
                    (gradient,) = torch.autograd.grad(loss, theta)
                    members[p].update(*sgd(theta, members[p].momentum, gradient, args))

            # Step 2: the weights of T batches, each the softmax of the batch's scores
            nth = step * args.population + p
            batches = [source_loader(nth * updates + t) for t in range(updates)]
            batches = [augmented(batch, augmentations, args.shrink, rng) for batch in batches]
            scores = model(torch.cat([images for images, _ in batches])).view(updates, -1)
            weights = scores.softmax(dim=1)  # [T,A*B]

            # Step 3: T updates of the inner network, and the meta-gradient
            photos = shrunk(*common.crop_flip(*photo_loader(nth), rng), args.shrink)
            to_weights, outer, inner = mixed(members[p], batches, weights.detach(), photos, args)
            rater.zero_grad()
            weights.backward(to_weights)
            nn.utils.clip_grad_norm_(rater.parameters(), args.clip)
            gradients.append([parameter.grad for parameter in rater.parameters()])
            means = scores.detach().view(updates, len(augmentations), -1).mean(dim=(0, 2))  # [A]
            scalars.append(torch.stack([outer, inner.mean(), *(means - means.mean())]))

        # Step 4: the rater
        for adam, gradient in zip(adams, gradients, strict=True):
            for parameter, value in zip(rater.parameters(), gradient, strict=True):
                parameter.grad = value
            adam.step()
        names = ("outer_loss", "inner_loss", *(f"score_{name}" for name in augmentations))
        run.log(step, **dict(zip(names, torch.stack(scalars).mean(dim=0), strict=True)))


# ---- Candidates and choice ----------------------------------------------------------------------
@dataclass(frozen=True)
class Candidates:
    """Each of the N images of a split with each of the A augmentations."""

    split: Split
    augmentations: Augmentations
    seed: int

    def image(self, n: int, a: int) -> np.ndarray:
        """Candidate a of image n, the same at every call. -> uint8 [H,W,3].

        Its random numbers depend on the seed and the names alone, not on the order of the images.
        """
        name = list(self.augmentations)[a]
        rng = common.generator(self.seed, "candidate", self.split.names[n], name)
        image = common.to_tensor(self.split.images[n : n + 1], torch.device("cpu"))  # [1,3,H,W]
        return common.to_uint8(self.augmentations[name](image, rng))[0]


@torch.no_grad()
def analyze_with_individual_augmentations(
    rater: Rater, candidates: Candidates, shrink: int, device: torch.device
) -> np.ndarray:
    """Scores of all candidates of all images. -> float32 [N,A]."""
    rater.eval()
    count, columns = len(candidates.split), range(len(candidates.augmentations))
    scores = []
    for start in common.show_progress(range(0, count, 16), "scoring candidates"):
        rows = range(start, min(start + 16, count))
        images = np.stack([candidates.image(n, a) for n in rows for a in columns])
        images = F.avg_pool2d(common.to_tensor(images, device), shrink)  # [16*A,3,h,w]
        scores.append(rater(images).view(len(rows), -1))
    return torch.cat(scores).cpu().numpy()


def chosen(scores: np.ndarray, k: int, rule: str, seed: int) -> np.ndarray:
    """k candidates of each image by the rule best, worst or random (any other). [N,A] -> [N,k]."""
    rng = np.random.default_rng(common.seed_of(seed, "choose"))
    keys = {"best": -scores, "worst": scores}.get(rule, rng.random(scores.shape))
    return keys.argsort(axis=1, kind="stable")[:, :k]


def write_set(folder: Path, candidates: Candidates, choice: np.ndarray) -> None:
    """The chosen candidates as a training set of N*k images. choice [N,k]."""
    split, kinds, k = candidates.split, list(candidates.augmentations), choice.shape[1]
    images = common.create_array(folder / "images.npy", (choice.size, *split.images.shape[1:]))
    for i in common.show_progress(range(choice.size), "writing the training set"):
        images[i] = candidates.image(i // k, choice.flat[i])
    images.flush()
    labels = split.labels if k == 1 else np.repeat(split.labels, k, axis=0)
    names = [f"{split.names[n]} {kinds[a]}" for n in range(len(split)) for a in choice[n]]
    common.save_set(folder, split, labels, names)


def write_choice(
    path: Path, candidates: Candidates, scores: np.ndarray, choice: np.ndarray
) -> None:
    """{image: {index, scores: {augmentation: score}, choice: [augmentation, ...]}}."""
    table, kinds = {}, list(candidates.augmentations)
    for n, name in enumerate(candidates.split.names):
        by_kind = dict(zip(kinds, scores[n].tolist(), strict=True))
        table[name] = {"index": n, "scores": by_kind, "choice": [kinds[a] for a in choice[n]]}
    with common.replacing(path) as temporary:
        torch.save(table, temporary)


# ---- The corruption check -----------------------------------------------------------------------
def corrupted(split: Split, share: float, seed: int) -> tuple[Split, np.ndarray]:
    """A share of the images with 10-90% of their pixels at random, and that amount of each [N]."""
    rng = np.random.default_rng(common.seed_of(seed, "corrupt"))
    count = round(share * len(split))
    if not 0 < count < len(split):
        raise UserError(
            f"--corrupt {share}: {count} of {len(split)} images, expected 1 to {len(split) - 1}"
        )
    images, amount = np.array(split.images), np.zeros(len(split))
    for n in rng.choice(len(split), count, replace=False):
        amount[n] = rng.uniform(0.1, 0.9)
        hit = rng.random(images.shape[1:3]) < amount[n]
        images[n][hit] = rng.integers(0, 256, (hit.sum(), 3))
    return replace(split, images=images), amount


def auroc(scores: np.ndarray, damaged: np.ndarray) -> float:
    """Probability that a random damaged image has a lower score than a random other one."""
    lower = scores[damaged][:, None] < scores[~damaged]
    equal = scores[damaged][:, None] == scores[~damaged]
    return float((lower + equal / 2).mean())


# ---- The method ---------------------------------------------------------------------------------
def with_lengths(args: Args) -> Args:
    """The arguments with the defaults that depend on --steps, --choose and --corrupt."""
    steps = args.steps
    values = {"meta_steps": steps // 2, "warm_up": steps * 3 // 4, "lifetime": steps // 4}
    values |= {"inner_updates": 2, "inner_batch": 4}
    if args.corrupt:
        values |= {"meta_steps": steps // 4, "warm_up": steps * 5 // 2}
        values |= {"inner_updates": 16, "inner_batch": 16}
    values = {name: max(1, value) for name, value in values.items()}
    args = replace(args, **{k: v for k, v in values.items() if getattr(args, k) is None})
    if args.corrupt or args.choose == "original":
        args = replace(args, augmentations=("original",))
    return args


def check(args: Args) -> None:
    """UserError for what cannot run, or would run to no purpose."""
    if not args.augmentations or not set(args.augmentations) <= set(AUGMENTATIONS):
        given, names = " ".join(args.augmentations), " ".join(AUGMENTATIONS)
        raise UserError(f"--augmentations {given}: expected names out of {names}")
    count = len(set(args.augmentations))
    if not 1 <= args.k <= count:
        raise UserError(f"--k {args.k}: expected 1 to {count}, the candidates of an image")
    if args.choose in ("random", "original"):  # without a rater
        return
    if args.inner_batch * count < 2:
        raise UserError("--inner-batch 1: a single candidate always has the weight 1")
    if args.net == "lraspp":
        raise UserError("--net lraspp: torch has no second derivative of its hard sigmoid")
    if any(side // args.shrink % common.STRIDE for side in args.size):
        raise UserError(f"--shrink {args.shrink}: --size over it is no multiple of 32")


def run(args: Args) -> Result:
    method = "datarater" if args.choose == "best" else f"datarater_{args.choose}"
    method = f"{method}_corrupt" if args.corrupt else method
    check(with_lengths(common.resolve(args, method)))
    rated = args.choose in ("best", "worst")
    run = Run(args, method, stages=1 + rated)
    if run.result:
        return run.result
    args, net = with_lengths(run.args), run.network()
    source, amount = common.load(args, "source"), None
    if args.corrupt:
        source, amount = corrupted(source, args.corrupt, args.seed)
    augmentations = {name: AUGMENTATIONS[name] for name in args.augmentations}

    # Part 1: the rater
    rater, updates = Rater().to(run.device), ""
    if rated:
        meta_train(run, rater, source, common.load(args, "target_few"), augmentations)
        turns = [(s + 1, p) for s in range(args.meta_steps) for p in range(args.population)]
        warm_ups = sum(starts_anew(step, p, args) for step, p in turns)
        count = len(turns) * args.inner_updates + warm_ups * args.warm_up
        updates = f"{count} updates of inner networks, {len(turns)} meta-gradients"

    # Part 2: the choice by rank 0, written as the training set that all processes read
    if common.rank() == 0:
        candidates = Candidates(source, augmentations, args.seed)
        scores = np.zeros((len(source), len(augmentations)))  # [N,A], without a rater
        if rated:
            analyze = analyze_with_individual_augmentations
            scores = analyze(rater, candidates, args.shrink, run.device)
        choice = chosen(scores, args.k, args.choose, args.seed)
        write_set(run.out / "set", candidates, choice)
        if rated:
            file = run.out / f"best_augmentations_step_{args.meta_steps}.pt"
            write_choice(file, candidates, scores, choice)
            draw_rater(run, candidates, scores)
        if rated and args.corrupt:
            draw_corruption(run, scores[:, 0], amount)
    common.barrier()

    # Part 3: the segmentation network
    training_set = common.load_set(run.out / "set", source.dataset, args.size)
    common.train(run, net, training_set, args.steps, "source")
    labels = args.labelled if rated else 0
    return run.finish(net, target_labels=labels, other_updates=updates)


# ---- Figures ------------------------------------------------------------------------------------
def draw_curves(path: Path, lines: list[dict], titles: dict[str, str], label: str) -> None:
    """Scalars against the meta-step. titles: {name of a scalar: its title}."""
    figure = common.new_figure(6, 3.5)
    axis = figure.subplots()
    for name, title in titles.items():
        steps, values = [line["step"] for line in lines], [line[name] for line in lines]
        axis.plot(steps, values, ".-", label=title)
    axis.set(xlabel="meta-step", ylabel=label)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    common.save_figure(figure, path)


def draw_rater(run: Run, candidates: Candidates, scores: np.ndarray) -> None:
    """Into figures/: meta_losses.png, augmentation_scores.png, and scores.png, five images with all
    candidates and their scores, the best framed green and the worst red."""
    folder, kinds = run.out / "figures", list(candidates.augmentations)
    lines = [line for line in common.read_scalars(run.out) if "outer_loss" in line]
    titles = {"outer_loss": "outer: labelled photos", "inner_loss": "inner: source images"}
    draw_curves(folder / "meta_losses.png", lines, titles, "cross-entropy (nats)")
    rows = common.spaced(len(scores), 5)
    if len(kinds) > 1:
        titles = {f"score_{kind}": kind for kind in kinds}
        label = "mean score, less that of all"
        draw_curves(folder / "augmentation_scores.png", lines, titles, label)
    else:  # different images, from the highest score to the lowest
        rows = (-scores[:, 0]).argsort(kind="stable")[rows]
    figure = common.new_figure(2.4 * len(kinds), 7.5)
    axes = figure.subplots(len(rows), len(kinds), squeeze=False)
    for i, n in enumerate(rows):
        frames = {scores[n].argmin(): "tab:red", scores[n].argmax(): "tab:green"}
        for a, kind in enumerate(kinds):
            axis = axes[i, a]
            axis.imshow(candidates.image(n, a))
            axis.set_title(f"{kind} {scores[n, a]:+.2g}", fontsize=9)
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set(color=frames.get(a), linewidth=4, visible=a in frames and len(kinds) > 1)
    common.save_figure(figure, folder / "scores.png")


def draw_corruption(run: Run, scores: np.ndarray, amount: np.ndarray) -> None:
    """figures/corruption.png: the score of each image against its share of random pixels."""
    area = auroc(scores, amount > 0)
    run.say(f"damaged images have lower scores with a probability of {area:.3f} (AUROC)")
    figure = common.new_figure(5, 3.5)
    axis = figure.subplots()
    axis.scatter(100 * amount, scores, s=8, alpha=0.5)
    axis.set(xlabel="pixels at random (%)", ylabel="score", title=f"AUROC {area:.3f}")
    common.save_figure(figure, run.out / "figures/corruption.png")


if __name__ == "__main__":
    common.main(Args, run, __doc__)
