"""DataRater learns which altered copies of source images help on real photos, by meta-gradients.

The copies of an image, blurred, jittered, in the colours of a photo, and so on, are its candidates.
DataRater (arXiv:2505.17895v1) is used here to choose among them. Its meta-gradients are computed by
mixed-mode differentiation (MixFlow-MG, arXiv:2505.00793v2).

    python datarater.py

    python datarater.py --choose random    # a control, like worst and original

    python datarater.py --corrupt 0.1 --inner-updates 16    # do damaged images get lower scores?

The first command takes 5 to 14 minutes on one CPU core and reaches 53 mIoU on the miniature (the
default data); training on the images as they are (--choose original) reaches 45.

A run has four parts. Part 1, the warm-up: a segmentation network is trained on random candidates.

Part 2, meta-training: a rater learns to score candidates. The inner network, a copy of the warm-up
network, trains on batches of a few images with all their candidates. Each candidate has a weight:
the softmax over the scores of its image's candidates, divided by the number of images, so that the
weights of a batch sum to 1. ("Weights" are always these, never those of a network.) With --corrupt
an image has one candidate, and the softmax is over the images of a batch. After T updates
(--inner-updates) the outer loss is measured: the loss on labelled target photos. Its gradient with
respect to the weights (d_weights in the code) says which candidates should have counted more.
From this the chain rule, through softmax and rater, gives the meta-gradient, the gradient of the
outer loss with respect to the rater's parameters, which trains the rater. The inner network then
goes on from where it is.

Part 3, the choice: the rater scores all candidates, and the best of each image make a training set.
Part 4: a new segmentation network is trained on this set. --steps is the number of its updates.
With --corrupt the damaged images stay in the set, since each image has only one candidate.

The run folder gets set/, the training set. For best and worst it also gets the scores of each image
and the kinds that were chosen, best_augmentations_step_X.pt, where X is --meta-steps. Without --out
the controls and --corrupt have run folders of their own: datarater_random, datarater_corrupt and so
on. With --init RUN/set any method trains on such a set instead of the source images. With
--init CHECKPOINT the networks of parts 1 and 4 start from that network.

Deviations: the paper takes the softmax over the examples of a batch and leaves out those of low
scores; here it is over an image's candidates, of which the best stays. The paper has a population
of inner networks, which start untrained and are reset from time to time. Here one inner network
starts trained and is never reset; under torchrun each process has its own (after a resume, that of
rank 0), the rater learns from the mean of their meta-gradients, and rank 0 chooses. The inner
optimizer is Adam with fixed second moments: momentum SGD with fixed diagonal scaling. MixFlow-MG
differentiates a gradient by forward mode; here reverse mode differentiates a forward-mode
derivative, which gives the same product.
"""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import common
import datasets
from common import AUGMENTATIONS, Augmentation, Loader, Result, Run
from datasets import IGNORE, Split, UserError

KINDS = (*AUGMENTATIONS, "color_transfer", "fourier")  # all kinds of candidates
Augmentations = dict[str, Augmentation]  # by kind
Batch = tuple[Tensor, Tensor]  # images [B,3,H,W] and labels [B,H,W]


@dataclass(frozen=True)
class Args(common.Args):
    choose: Literal["best", "random", "worst", "original"] = "best"
    """Which candidates of an image to train on: those of the highest scores, random ones, those of
    the lowest scores, or the image as it is. random and original train no rater."""
    augmentations: tuple[str, ...] = KINDS
    """Kinds of candidates. color_transfer gives an image the mean and covariance of RGB of a random
    target photo, fourier the amplitudes of the photo's low frequencies. With --corrupt or --choose
    original the only kind is original."""
    beta: float = 0.03
    """fourier takes the photo's amplitudes below this frequency, in cycles/px. The paper of FDA
    (arXiv:2004.05498): 0.01 to 0.09."""
    k: int = 1
    """How many candidates of each image are chosen."""
    corrupt: float = 0.0
    """Share of the source images that are damaged, to see whether the rater detects them: 10-90% of
    their pixels get random colours. The softmax is then over the images of a batch."""
    warm_up: int | None = None
    """Updates of the warm-up, by the recipe of all methods. An untrained network gains from any
    image, so its meta-gradient says little about a trained one. Default: --steps. The paper: 0."""
    meta_steps: int | None = None
    """Updates of the rater. Default: an eighth of --steps, rounded down, but at least 1."""
    meta_lr: float = 1e-3
    """Learning rate of the rater's Adam."""
    clip: float = 0.01
    """The meta-gradient is clipped to this norm. The paper: 0.01."""
    inner_updates: int = 2
    """T: inner updates per rater update; the outer loss is differentiated through them."""
    inner_batch: int | None = None
    """Source images in an inner batch, each with all its candidates. Default: 4; 16 with --corrupt.
    Under torchrun each process has inner batches of this size."""
    inner_lr: float = 3e-4
    """Constant learning rate of the inner network. A low one keeps it near the warm-up network: the
    noise of large updates would hide the differences between candidates."""


# ---- Kinds of candidates ------------------------------------------------------------------------
def load_augmentations(args: Args) -> Augmentations:
    """The functions of --augmentations. color_transfer and fourier use random photos."""
    kinds = dict(AUGMENTATIONS)
    if set(args.augmentations) - set(kinds):
        photos = datasets.load(args, "target_unlabelled")
        fourier = partial(common.fourier_transfer, beta=args.beta)
        kinds["color_transfer"] = common.photo_style(photos)
        kinds["fourier"] = common.photo_style(photos, fourier)
    return {kind: kinds[kind] for kind in args.augmentations}


# ---- The rater ----------------------------------------------------------------------------------
class Rater(nn.Sequential):
    """images [B,3,H,W] -> scores [B]. They are 0 at first, since the last layer starts at zero."""

    def __init__(self) -> None:
        head = nn.Linear(256, 1)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
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
    """Batch normalisation whose forward-mode derivative can be differentiated by reverse mode.
    Reverse mode of torch 2.14 takes the mean and variance in this derivative as constants, which
    is wrong. For training mode only: forward mode always uses the statistics of the batch."""

    def forward(self, x: Tensor) -> Tensor:  # [B,C,H,W]
        if forward_ad.unpack_dual(x).tangent is None:
            return super().forward(x)
        # Plain operations, whose derivatives are right. The running statistics stay as they are.
        y = x if x.dtype == torch.float64 else x.float()
        y = y - y.mean(dim=(0, 2, 3), keepdim=True)
        variance = y.square().mean(dim=(0, 2, 3), keepdim=True)  # [1,C,1,1]
        y = y * (variance + self.eps).rsqrt()
        return (y * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)


def image_losses(outputs: list[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of each image, in nats: the mean over its valid pixels, 0 where there is none,
    plus AUX_WEIGHT times that of each auxiliary head.

    outputs: logits of each head, [B,C,H,W]; labels [B,H,W] -> [B]. It is computed by plain
    operations, since torch 2.14 cannot differentiate the forward-mode derivative of log_softmax.
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
    """A segmentation network as a function of its parameters in one vector, theta [P].

    net is changed in place: batch normalisation is replaced, dropout removed. autocast() gives
    the context of the forward passes. The buffers momentum and scale, [P], are those of `adam`.
    """

    def __init__(self, net: nn.Module, autocast: Callable = contextlib.nullcontext) -> None:
        super().__init__()
        for name, layer in list(net.named_modules()):
            if isinstance(layer, nn.BatchNorm2d):
                norm = BatchNorm(layer.num_features, layer.eps, layer.momentum)
                norm.load_state_dict(layer.state_dict())
                net.set_submodule(name, norm)
            elif isinstance(layer, nn.Dropout):
                # Each call would draw another mask, and the derivative would be of another loss.
                net.set_submodule(name, nn.Identity())
        self.net, self.autocast = net.train(), autocast
        self.register_buffer("momentum", torch.zeros_like(self.theta()))
        self.register_buffer("scale", torch.ones_like(self.theta()))

    def theta(self) -> Tensor:
        return parameters_to_vector(self.net.parameters()).detach()

    def set_state(self, theta: Tensor, momentum: Tensor) -> None:
        """Sets the parameters and the momentum of the optimizer, both [P]."""
        vector_to_parameters(theta.detach(), self.net.parameters())
        self.momentum = momentum.detach()

    def losses(self, theta: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """The loss of each image, [B]. In training mode it also updates the running statistics of
        batch normalisation, except where theta has a forward-mode direction."""
        pieces = theta.split([p.numel() for p in self.net.parameters()])
        named = zip(self.net.named_parameters(), pieces, strict=True)
        parameters = {name: piece.view_as(p) for (name, p), piece in named}
        with self.autocast():
            outputs = torch.func.functional_call(self.net, parameters, (images,), {"aux": True})
        return image_losses(outputs, labels)

    def directional_derivatives(
        self, theta: Tensor, direction: Tensor, images: Tensor, labels: Tensor
    ) -> Tensor:
        """The derivative of each image's loss along a direction of theta, [B]. It is computed by
        forward mode, and reverse mode can differentiate it with respect to theta."""
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch warns about its own functions
            losses = self.losses(forward_ad.make_dual(theta, direction), images, labels)
            return forward_ad.unpack_dual(losses).tangent


# ---- Meta-gradients -----------------------------------------------------------------------------
BETA1 = 0.9  # share of the old momentum that an update keeps, as in Adam


def adam(
    theta: Tensor, momentum: Tensor, gradient: Tensor, scale: Tensor, lr: float
) -> tuple[Tensor, Tensor]:
    """An update of Adam without bias correction and with fixed second moments. scale: 1 / (their
    roots + a constant). So this is momentum SGD with a fixed rate for each parameter. All [P]."""
    momentum = BETA1 * momentum + (1 - BETA1) * gradient
    return theta - lr * scale * momentum, momentum


def weight_gradient(
    inner: InnerNetwork, batches: list[Batch], weights: Tensor, photos: Batch, lr: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Trains an inner network for T updates, and differentiates the outer loss through them.

    batches: T batches of B candidates; weights [T,B]; photos: a batch of labelled target photos.
    -> gradient of the weights [T,B], outer loss, losses of the candidates [T,B].

    Let l_i be the loss of candidate i, w_i its weight, and `outer` the outer loss. An update uses
    the gradient g = sum_i w_i grad l_i with respect to theta. So d outer / d w_i is the dot product
    of grad l_i and d outer / dg: the derivative of l_i along the direction d outer / dg.

    Mixed-mode differentiation (MixFlow-MG) keeps only the parameters before each update, and goes
    through the updates in reverse order. Forward mode gives the derivatives of all l_i along
    d outer / dg. Since g depends on theta, d outer / d theta gains a term: the Hessian of
    sum_i w_i l_i times d outer / dg, by reverse mode of the weighted sum of the derivatives.

    An approximation: in the outer loss batch normalisation uses running statistics, as in testing.
    They depend on the weights of all updates but the last; the derivative takes them as constants.
    So the gradient is exact for the last update's weights and approximate for those before.
    """
    theta, momentum = inner.theta(), inner.momentum
    thetas, inner_losses = [], []
    for batch, w in zip(batches, weights, strict=True):
        thetas.append(theta.detach().requires_grad_())
        losses = inner.losses(thetas[-1], *batch)  # [B]
        # DataRater: each candidate contributes to the gradient by its weight.
        (gradient,) = torch.autograd.grad(w @ losses, thetas[-1])
        theta, momentum = adam(theta, momentum, gradient, inner.scale, lr)
        inner_losses.append(losses.detach())
    inner.set_state(theta, momentum)

    theta = theta.requires_grad_()
    inner.eval()  # batch normalisation uses running statistics
    outer_loss = inner.losses(theta, *photos).mean()
    inner.train()

    # d_x: the derivative of the outer loss with respect to x. At first, d_theta and d_momentum are
    # for the state after the last update; pass t turns them into those for the state before update
    # t. At t = 0 d_theta is not needed any more.
    (d_theta,) = torch.autograd.grad(outer_loss, theta)
    d_momentum = torch.zeros_like(d_theta)
    d_weights = torch.empty_like(weights)
    for t in reversed(range(len(batches))):
        d_momentum = d_momentum - lr * inner.scale * d_theta
        d_gradient = (1 - BETA1) * d_momentum
        d_momentum = BETA1 * d_momentum
        derivatives = inner.directional_derivatives(thetas[t], d_gradient, *batches[t])  # [B]
        d_weights[t] = derivatives.detach()
        if t > 0:  # the Hessian of the weighted loss, times d_gradient
            (product,) = torch.autograd.grad(weights[t] @ derivatives, thetas[t])
            d_theta = d_theta + product
    return d_weights, outer_loss.detach(), torch.stack(inner_losses)


# ---- Meta-training ------------------------------------------------------------------------------
def meta_train(run: Run, source: Split, augmentations: Augmentations) -> Rater:
    """Parts 1 and 2: the warm-up and meta-training. Returns the trained rater."""
    args, seed, rater = fill_in(run.args), run.args.seed, Rater().to(run.device)
    num_kinds = len(augmentations)  # A
    labelled_photos = datasets.load(args, "target_few")

    # Part 1: the warm-up
    def random_candidates(images: Tensor, rng: torch.Generator) -> Tensor:  # [B,3,H,W]
        kinds, images = list(augmentations.values()), images.clone()
        choice = (common.draw(rng, len(images)) * len(kinds)).long()  # [B]
        for a in choice.unique().tolist():
            images[choice == a] = kinds[a](images[choice == a], rng)
        return images

    net = run.network()
    common.train(run, net, source, args.warm_up, "warm_up", random_candidates, evaluated=False)

    # Part 2: meta-training. The inner network starts as a copy of the warm-up network.
    inner = InnerNetwork(common.Network(args.net, len(run.classes)), run.autocast).to(run.device)
    inner.net.load_state_dict(net.state_dict())
    batch_size = args.inner_batch * common.world_size()
    source_loader = Loader(source, batch_size, run.device, seed, "rater", "source")
    photo_loader = Loader(labelled_photos, args.batch_size, run.device, seed, "rater", "photos")

    def draw_batch(index: int, rng: torch.Generator) -> Batch:
        """N images with all A candidates. -> [A*N,3,H,W], [A*N,H,W]"""
        images, labels = source_loader(index)  # [N,3,H,W], [N,H,W]
        candidates = torch.cat([augment(images, rng) for augment in augmentations.values()])
        candidates = candidates.contiguous(memory_format=torch.channels_last)
        return candidates, labels.repeat(num_kinds, 1, 1)

    # The fixed scale of inner updates, from second moments at equal weights. One batch would be too
    # noisy, so 16 are averaged. Adding 0.01 of the mean of the roots limits the updates of
    # parameters whose gradients are tiny, like the epsilon of Adam.
    theta, squares = inner.theta().requires_grad_(), torch.zeros_like(inner.scale)
    for index in range(16):
        losses = inner.losses(theta, *draw_batch(index, common.generator(seed, "scale", index)))
        (gradient,) = torch.autograd.grad(losses.mean(), theta)
        squares += gradient.square() / 16
    inner.scale = 1 / (squares.sqrt() + 0.01 * squares.sqrt().mean())

    optimizer, model = torch.optim.Adam(rater.parameters(), args.meta_lr), common.parallel(rater)
    rater.train()
    state = {"rater": rater, "inner": inner, "optimizer": optimizer}
    for step in run.steps("rater", args.meta_steps, **state):
        rng, first = common.generator(seed, "rater", step), step * args.inner_updates
        batches = [draw_batch(first + t, rng) for t in range(args.inner_updates)]

        # The weights: softmax over the candidates of an image, or over images that have only one
        with run.autocast():
            scores = model(torch.cat([images for images, _ in batches]))  # [T*A*N]
        scores = scores.float().view(args.inner_updates, num_kinds, -1)  # [T,A,N]
        weights = scores.softmax(dim=1 if num_kinds > 1 else 2)
        weights = weights / weights.sum(dim=(1, 2), keepdim=True)

        # T updates of the inner network, and the gradient of the weights
        fixed_weights, photos = weights.detach().flatten(1), photo_loader(step)  # [T,A*N]
        d_weights, outer_loss, inner_losses = weight_gradient(
            inner, batches, fixed_weights, photos, args.inner_lr
        )

        # The meta-gradient, by the chain rule, and the update of the rater
        optimizer.zero_grad()
        weights.backward(d_weights.view_as(weights))
        norm = nn.utils.clip_grad_norm_(rater.parameters(), args.clip)
        optimizer.step()
        means = (scores - scores.mean()).detach().mean(dim=(0, 2))  # [A]
        means = {f"score_{kind}": mean for kind, mean in zip(augmentations, means, strict=True)}
        run.log(step, outer_loss=outer_loss, inner_loss=inner_losses.mean(), norm=norm, **means)
    return rater.eval()


# ---- Candidates and choice ----------------------------------------------------------------------
BLOCK = 16  # number of images whose candidates are made at once


def candidates_of(run: Run, split: Split, augmentations: Augmentations, first: int) -> np.ndarray:
    """Makes all candidates of a block of images. They are the same at every call.

    first: index of the block's first image, a multiple of BLOCK. -> uint8 [B,A,H,W,3].
    """
    rng = common.generator(run.args.seed, "candidates", first)
    images = common.to_tensor(split.images[first : first + BLOCK], run.device)  # [B,3,H,W]
    candidates = torch.cat([augment(images, rng) for augment in augmentations.values()])
    candidates = common.to_uint8(candidates)  # [A*B,H,W,3]
    return candidates.reshape(-1, len(images), *candidates.shape[1:]).swapaxes(0, 1)


def chosen(scores: np.ndarray, k: int, rule: str, rng: np.random.Generator) -> np.ndarray:
    """Indices of k candidates of each image: those of the highest scores where the rule is best, of
    the lowest where it is worst, random ones where it is anything else. [B,A] -> [B,k]."""
    keys = {"best": -scores, "worst": scores}.get(rule, rng.random(scores.shape))
    return keys.argsort(axis=1, kind="stable")[:, :k]


@torch.no_grad()
def choose_candidates(
    run: Run, rater: Rater | None, split: Split, augmentations: Augmentations
) -> np.ndarray:
    """Part 3: scores all candidates, and writes the chosen ones of each image as a training set.

    rater: None where --choose needs no scores; all scores are 0 then. -> scores, float32 [N,A].
    """
    args, n, kinds = fill_in(run.args), len(split), list(augmentations)
    scores, choice = np.zeros((n, len(kinds)), np.float32), np.zeros((n, args.k), np.int64)
    images = datasets.create_array(
        run.out / "set/images.npy", (n * args.k, *split.images.shape[1:])
    )
    rng = np.random.default_rng(common.seed_of(args.seed, "choose"))
    for first in datasets.show_progress(range(0, n, BLOCK), "choosing candidates"):
        block = slice(first, first + BLOCK)
        candidates = candidates_of(run, split, augmentations, first)  # [B,A,H,W,3]
        if rater is not None:
            flat = common.to_tensor(np.concatenate(candidates), run.device)  # [B*A,3,H,W]
            scores[block] = rater(flat).view(len(candidates), -1).cpu()
        choice[block] = chosen(scores[block], args.k, args.choose, rng)
        picked = np.take_along_axis(candidates, choice[block, :, None, None, None], axis=1)
        images[first * args.k : (first + BLOCK) * args.k] = np.concatenate(picked)  # [B*k,H,W,3]
    images.flush()

    # The labels and names of the training set, and the table of all scores
    labels = split.labels if args.k == 1 else np.repeat(split.labels, args.k, axis=0)
    names = [f"{split.names[i]} {kinds[a]}" for i in range(n) for a in choice[i]]
    datasets.save_set(run.out / "set", split, labels, names)
    if rater is not None:  # {image: {index, scores: {kind: score}, choice: [kind, ...]}}
        table = {}
        for i, name in enumerate(split.names):
            by_kind = dict(zip(kinds, scores[i].tolist(), strict=True))
            table[name] = {"index": i, "scores": by_kind, "choice": [kinds[a] for a in choice[i]]}
        file = run.out / f"best_augmentations_step_{args.meta_steps}.pt"
        with datasets.replacing(file) as temporary:
            torch.save(table, temporary)
    return scores


# ---- The corruption check -----------------------------------------------------------------------
def corrupted(split: Split, share: float, seed: int) -> tuple[Split, np.ndarray]:
    """Damages a share of the images: 10-90% of their pixels get random colours. -> the split with
    these images, and for each image the probability that a pixel is random [N]."""
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


# ---- The method ---------------------------------------------------------------------------------
def fill_in(args: Args) -> Args:
    """Fills in the defaults that depend on other arguments. UserError for arguments that cannot
    work or make no sense together. args: as common.resolve returns them."""
    given, values = args, {"warm_up": args.steps, "meta_steps": max(1, args.steps // 8)}
    values["inner_batch"] = 16 if args.corrupt else 4
    args = replace(args, **{k: v for k, v in values.items() if getattr(args, k) is None})
    original = args.corrupt or args.choose == "original"  # the only kind then
    if args.beta != Args.beta and (original or "fourier" not in args.augmentations):
        raise UserError("--beta: has no effect without --augmentations fourier")
    if original and args.augmentations not in (KINDS, ("original",)):
        raise UserError("--augmentations: has no effect with --corrupt or --choose original")
    args = replace(args, augmentations=("original",)) if original else args
    if not args.augmentations or not set(args.augmentations) <= set(KINDS):
        names = " ".join(args.augmentations)
        raise UserError(f"--augmentations {names}: expected names out of {' '.join(KINDS)}")
    count = len(set(args.augmentations))
    if not 1 <= args.k <= count:
        raise UserError(f"--k {args.k}: expected 1 to {count}, the candidates of an image")
    if not 0 <= args.corrupt < 1:
        raise UserError(f"--corrupt {args.corrupt}: expected a share from 0 to below 1")
    rater = ("warm_up", "meta_steps", "meta_lr", "clip", "inner_updates", "inner_batch", "inner_lr")
    if args.choose in ("random", "original"):
        for name in rater:
            if getattr(given, name) != getattr(Args, name):
                flag = name.replace("_", "-")
                raise UserError(f"--{flag}: has no effect with --choose {args.choose}")
        return args
    for name in ("meta_lr", "clip", "inner_lr"):
        if not getattr(args, name) > 0:
            raise UserError(f"--{name.replace('_', '-')}: expected above 0, or no rater is trained")
    if args.choose == "worst" and args.corrupt:
        raise UserError("--choose worst --corrupt: each image has only one candidate to choose")
    minimum = {"inner_updates": 1, "inner_batch": 1, "meta_steps": 1, "warm_up": 0}
    for name, least in minimum.items():
        if getattr(args, name) < least:
            flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
            raise UserError(f"{flag}: expected {least} or more")
    if count == 1 and not args.corrupt:
        raise UserError("--augmentations: expected two or more, for the rater to choose from")
    if args.corrupt and args.inner_batch < 2:
        raise UserError(f"--inner-batch {args.inner_batch}: a single image always has the weight 1")
    if args.net == "lraspp":
        raise UserError("--net lraspp: torch has no second derivative of its hard sigmoid")
    return args


def run(args: Args) -> Result:
    """Trains the rater, chooses candidates, and trains the network on those."""
    method = "datarater" if args.choose == "best" else f"datarater_{args.choose}"
    method = f"{method}_corrupt" if args.corrupt else method
    rated = args.choose in ("best", "worst")
    run = Run(args, method, stages=3 if rated else 1)  # stages with updates: warm-up, rater, final
    if run.result:
        return run.result
    args = fill_in(run.args)
    if rated:
        datasets.load(args, "target_few")  # fails early if there are too few labelled photos
    run.begin()
    net, source = run.network(), datasets.load(args, "source")
    augmentations = load_augmentations(args)
    if args.corrupt:
        source, amount = corrupted(source, args.corrupt, args.seed)

    # Parts 1 and 2: the warm-up and meta-training
    rater, other_updates = None, ""
    if rated:
        rater = meta_train(run, source, augmentations)
        inner_updates = args.meta_steps * args.inner_updates
        scored = len(source) * len(augmentations)
        other_updates = f"{args.warm_up} of the warm-up, {inner_updates} of the inner network, "
        other_updates += f"{args.meta_steps} meta-gradients, {scored} candidates scored"

    # Part 3: the choice. Rank 0 writes the training set, all processes read it.
    if common.rank() == 0:
        scores = choose_candidates(run, rater, source, augmentations)
        if rated:
            draw_scores(run, source, augmentations, scores)
        if rated and args.corrupt:
            draw_corruption(run, scores[:, 0], amount)
        elif rated:
            draw_kinds(run, list(augmentations))
    common.barrier()

    # Part 4: the segmentation network
    training_set = datasets.load_set(run.out / "set", source.dataset, args.size)
    common.train(run, net, training_set, args.steps, "source")
    labels = args.labelled if rated else 0
    return run.finish(net, target_labels=labels, other_updates=other_updates)


# ---- Figures ------------------------------------------------------------------------------------
def draw_kinds(run: Run, kinds: list[str]) -> None:
    """figures/augmentation_scores.png: the mean score of each kind of candidate."""
    lines = [line for line in run.lines if "outer_loss" in line]
    figure = common.new_figure(6, 3.5)
    axis, steps = figure.subplots(), [line["step"] for line in lines]
    for kind in kinds:
        axis.plot(steps, [line[f"score_{kind}"] for line in lines], label=kind)
    axis.set(xlabel="step", ylabel="mean score - mean of all kinds")
    axis.legend(frameon=False)
    common.save_figure(figure, run.out / "figures/augmentation_scores.png")


def draw_scores(run: Run, split: Split, augmentations: Augmentations, scores: np.ndarray) -> None:
    """figures/scores.png: five images with all their candidates and scores. The best is framed
    green, the worst red. Where images have one candidate: from the highest score to the lowest."""
    kinds, rows = list(augmentations), datasets.spaced(len(scores), 5)
    # A softmax ignores what is added to all of its scores, so only their differences are trained.
    scores = scores - scores.mean(axis=1 if len(kinds) > 1 else 0, keepdims=True)
    if len(kinds) == 1:
        rows = (-scores[:, 0]).argsort(kind="stable")[rows]
    figure = common.new_figure(2.4 * len(kinds), 7.5)
    axes = figure.subplots(len(rows), len(kinds), squeeze=False)
    for i, n in enumerate(rows.tolist()):  # an int of NumPy would name another stream
        candidates = candidates_of(run, split, augmentations, n - n % BLOCK)[n % BLOCK]
        frames = {scores[n].argmin(): "tab:red", scores[n].argmax(): "tab:green"}
        for a, kind in enumerate(kinds):
            axis = axes[i, a]
            axis.imshow(candidates[a])  # [H,W,3]
            axis.set_title(f"{kind} {scores[n, a]:+.2g}", fontsize=9)
            axis.set(xticks=[], yticks=[])
            for side in axis.spines.values():
                side.set(color=frames.get(a), linewidth=4, visible=a in frames and len(kinds) > 1)
    common.save_figure(figure, run.out / "figures/scores.png")


def draw_corruption(run: Run, scores: np.ndarray, amount: np.ndarray) -> None:
    """figures/corruption.png: the scores of all images over their shares of random pixels."""
    damaged, intact = scores[amount > 0][:, None], scores[amount == 0]
    # AUROC: the probability that a damaged image has a lower score than an intact one.
    auroc = ((damaged < intact) + (damaged == intact) / 2).mean()
    run.say(f"damaged images have lower scores with a probability of {auroc:.3f} (AUROC)")
    figure = common.new_figure(5, 3.5)
    axis = figure.subplots()
    axis.scatter(100 * amount, scores, s=8, alpha=0.5)
    axis.set(xlabel="random pixels (%)", ylabel="score", title=f"AUROC {auroc:.3f}")
    common.save_figure(figure, run.out / "figures/corruption.png")


if __name__ == "__main__":
    common.main(Args, run, __doc__)
