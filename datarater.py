"""Learns which augmentation of each source image helps on real photos, by meta-gradients.

DataRater (arXiv:2505.17895v1), here for choosing augmentations, with exact meta-gradients from
mixed-mode differentiation (MixFlow-MG, arXiv:2505.00793v2):

    python datarater.py

    python datarater.py --benchmark gta52cityscapes --no-compare              (without the controls)

    python datarater.py --meta-gradient unroll                   (the same gradient by create_graph)

    python datarater.py --corrupt 0.1 --no-compare         (are damaged images given lower scores?)

The first takes two minutes on two CPU cores, with four controls that are trained for as many
updates: the images as they are, all augmentations alike, a random one and the worst one for each
image. On the miniature's VKITTI the choice is above all of them (mIoU 59.3 over three seeds, the
random one 56.8). On its GTA5 every augmentation harms, and the choice, no better than chance, stays
below the images as they are.

A rater scores images. Inner networks train on batches of augmented source images, weighted by the
softmax of their scores. The loss of labelled target photos after a few such updates, differentiated
through the updates, says which weights should have been higher, and trains the rater. Then it
scores all candidates of all images, and the segmentation network is trained from scratch on the
best ones; --steps counts these updates.
"""

import contextlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import common
from common import AUGMENTATIONS, Batch, Batches, Network, Part, Result, Run, UserError


@dataclass(frozen=True)
class Args(common.Args):
    meta_steps: int | None = None
    """Updates of the rater. Default: 200; 100 with --corrupt."""
    meta_lr: float = 1e-3
    """Learning rate of the rater's Adam."""
    meta_gradient: Literal["mixed", "unroll"] = "mixed"
    """How the outer loss is differentiated through the inner updates: undoing one after the other,
    with forward-mode derivatives of the losses (mixed), or by autograd (unroll)."""
    inner_updates: int | None = None
    """T, inner updates that are differentiated. Default: 2, as in the paper; 16 with --corrupt."""
    population: int = 2
    """Inner networks. The paper: 8."""
    lifetime: int = 100
    """Meta-steps after which an inner network starts anew; those of a population take turns."""
    warm_up: int | None = None
    """Updates of an inner network, on candidates of equal weights, before its first meta-step. At
    random weights any image helps, so what it says there is not what helps a network that has
    learnt something. Default: 300; 1000 with --corrupt. The paper: 0."""
    inner_optimizer: Literal["sgd", "adam"] | None = None
    """Optimizer of the inner networks: SGD with momentum 0.9, or Adam. Default: adam; sgd with
    --corrupt."""
    inner_lr: float | None = None
    """Learning rate of the inner networks, constant. Default: 0.002 of adam, 0.05 of sgd."""
    inner_decay: float = 0.01
    """Decoupled weight decay of the inner networks. The paper: 0.1."""
    inner_batch: int | None = None
    """Source images in an inner batch, each there with every augmentation. Default: 4; 16 with
    --corrupt."""
    shrink: int = 2
    """Sides of the images in meta-training and for the rater, as a fraction 1/shrink of --size."""
    outer_statistics: Literal["running", "batch"] = "running"
    """Batch normalisation of the target photos in the outer loss: what the source has left, as at
    test, or their own."""
    temperature: float = 1.0
    """Of the softmax over a batch's scores."""
    clip: float = 0.01
    """Largest norm of a member's meta-gradient. The paper: 0.01."""
    augmentations: tuple[str, ...] | None = None
    """What the candidates of an image are made by. Default: all there are; original with --corrupt,
    where images are told apart."""
    draws: int = 1
    """Candidates of each image from each augmentation, with parameters drawn anew. With more the
    best is more extreme; 4 and 8 were worse than 1."""
    k: int = 1
    """Candidates of each image to train on, the best by score."""
    compare: bool = True
    """Train the controls too: original, all augmentations alike, random and worst candidates; not
    where an image has one candidate."""
    corrupt: float = 0.0
    """Share of source images with 10-90% of their pixels at random, to see whether the rater finds
    them."""


def settled(args: Args) -> Args:
    """The arguments with the defaults that depend on --corrupt."""
    usual = {"meta_steps": 200, "inner_updates": 2, "inner_batch": 4, "warm_up": 300}
    usual |= {"augmentations": tuple(AUGMENTATIONS), "inner_optimizer": "adam"}
    if args.corrupt:
        usual = {"meta_steps": 100, "inner_updates": 16, "inner_batch": 16, "warm_up": 1000}
        usual |= {"augmentations": ("original",), "inner_optimizer": "sgd"}
    optimizer = args.inner_optimizer or usual["inner_optimizer"]
    usual["inner_lr"] = {"adam": 2e-3, "sgd": 0.05}[optimizer]
    return replace(args, **{k: v for k, v in usual.items() if getattr(args, k) is None})


# ---- The rater ----------------------------------------------------------------------------------
class Rater(nn.Sequential):
    """images [B,3,H,W] -> scores [B]. All alike at first, since the last layer starts at zero."""

    def __init__(self) -> None:
        blocks, i = [], 3
        for o in (32, 64, 128, 256):
            blocks, i = [*blocks, common.conv(i, o, stride=2)], o
        head = nn.Linear(i, 1)
        nn.init.zeros_(head.weight)
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), head, nn.Flatten(0))


# ---- Candidates ---------------------------------------------------------------------------------
def variants(args: Args) -> list[str]:
    """Names of an image's candidates: 'original', 'blur 0', 'blur 1' and so on."""
    return [
        name if name == "original" else f"{name} {draw}"
        for name in args.augmentations
        for draw in range(1 if name == "original" else args.draws)
    ]


def candidate(image: np.ndarray, name: str, variant: str, seed: int) -> np.ndarray:
    """One candidate of an image, the same at every call: its parameters depend on the seed and the
    names alone. uint8 [H,W,3] -> uint8 [H,W,3]."""
    rng = common.generator(seed, zlib.crc32(f"{name} {variant}".encode()))
    x = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255
    x = AUGMENTATIONS[variant.split()[0]](x, rng)[0]
    return (255 * x).round().byte().permute(1, 2, 0).numpy()


def shrunk(images: Tensor, labels: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Both at 1/by of their sides: means of images, single values of labels."""
    return F.avg_pool2d(images, by), labels[:, by // 2 :: by, by // 2 :: by]


def with_all(augmentations: Sequence[str], images: Tensor, rng: torch.Generator) -> Tensor:
    """Every augmentation of every image, with fresh parameters. [B,3,H,W] -> [A*B,3,H,W]."""
    return torch.cat([AUGMENTATIONS[name](images, rng) for name in augmentations])


# ---- Inner optimizers: pure functions, so that they can be differentiated, and their inverses ----
State = tuple[Tensor, ...]  # of an optimizer: vectors [P] each


def sgd(
    theta: Tensor, state: State, gradient: Tensor, step: int, lr: float, decay: float = 0.0
) -> tuple[Tensor, State]:
    """SGD with momentum 0.9. All vectors [P] -> theta, state after the update."""
    momentum = 0.9 * state[0] + gradient
    return theta * (1 - lr * decay) - lr * momentum, (momentum,)


def undo_sgd(
    theta: Tensor, state: State, gradient: Tensor, step: int, lr: float, decay: float = 0.0
) -> tuple[Tensor, State]:
    """theta, state after an update -> before it."""
    (momentum,) = state
    return (theta + lr * momentum) / (1 - lr * decay), ((momentum - gradient) / 0.9,)


def adam_change(m: Tensor, v: Tensor, step: int, lr: float) -> Tensor:
    """As the end of section 2 orders it, for fewer passes over the vectors; the same epsilon."""
    scale = 1 - 0.999**step
    # epsilon stands inside the root, whose derivative at a gradient of zero would be infinite.
    return lr * scale**0.5 / (1 - 0.9**step) * m * (v + 1e-16 * scale).rsqrt()


def adam(
    theta: Tensor, state: State, gradient: Tensor, step: int, lr: float, decay: float = 0.0
) -> tuple[Tensor, State]:
    """Adam (arXiv:1412.6980v9), its weight decay decoupled. All vectors [P], step from 1."""
    m, v = state
    m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient.square()
    return theta * (1 - lr * decay) - adam_change(m, v, step, lr), (m, v)


def undo_adam(
    theta: Tensor, state: State, gradient: Tensor, step: int, lr: float, decay: float = 0.0
) -> tuple[Tensor, State]:
    """theta, state after an update -> before it."""
    m, v = state
    theta = (theta + adam_change(m, v, step, lr)) / (1 - lr * decay)
    # What rounding leaves of a v of zero may be below it, which has no root.
    v = ((v - 0.001 * gradient.square()) / 0.999).clamp(min=0)
    return theta, ((m - 0.1 * gradient) / 0.9, v)


class Optimizer(NamedTuple):
    update: Callable[..., tuple[Tensor, State]]
    undo: Callable[..., tuple[Tensor, State]]
    vectors: int  # that its state has


OPTIMIZERS = {"sgd": Optimizer(sgd, undo_sgd, 1), "adam": Optimizer(adam, undo_adam, 2)}


# ---- Meta-gradients -----------------------------------------------------------------------------
class Inner(NamedTuple):
    """An inner network between two updates. All its parameters are one vector."""

    theta: Tensor  # [P]
    state: State  # of the optimizer
    buffers: dict[str, Tensor]  # of batch normalisation
    step: int  # updates so far


def newborn(net: nn.Module, optimizer: str) -> Inner:
    """A network before its first update."""
    theta = torch.cat([p.detach().flatten() for p in net.parameters()])
    state = tuple(theta.new_zeros(OPTIMIZERS[optimizer].vectors, len(theta)))
    return Inner(theta, state, {name: b.clone() for name, b in net.named_buffers()}, 0)


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation with a forward-mode derivative that can be differentiated again: torch's
    own takes the batch's mean and variance for constants there (torch 2.15)."""

    def forward(self, x: Tensor) -> Tensor:
        (x, dx), (weight, dw), (bias, db) = (
            forward_ad.unpack_dual(value) for value in (x, self.weight, self.bias)
        )
        if dx is None:
            return super().forward(x)
        # By the batch's statistics, which are not kept track of here.
        dims, (w, b, dw, db) = (0, 2, 3), (v[:, None, None] for v in (weight, bias, dw, db))
        x = x - x.mean(dims, keepdim=True)  # [B,C,H,W]
        rate = (x.square().mean(dims, keepdim=True) + self.eps).rsqrt()  # [1,C,1,1]
        x = x * rate
        within = dx - dx.mean(dims, keepdim=True) - x * (x * dx).mean(dims, keepdim=True)
        return forward_ad.make_dual(w * x + b, w * rate * within + dw * x + db)


class Functional:
    """A segmentation network as a function of a vector of parameters."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.parameters = net, dict(net.named_parameters())
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.__class__ = BatchNorm
            if isinstance(module, nn.Dropout):  # a loss is computed twice and must be the same
                module.p = 0.0

    def logits(self, theta: Tensor, buffers: dict[str, Tensor], images: Tensor) -> list[Tensor]:
        """Those of the network and of its auxiliary heads. images [B,3,H,W] -> [B,C,H,W] each.

        In training mode the buffers are updated in place.
        """
        pieces = theta.split([p.numel() for p in self.parameters.values()])
        items = zip(self.parameters.items(), pieces, strict=True)
        values = {name: piece.view_as(p) for (name, p), piece in items}
        return torch.func.functional_call(self.net, {**values, **buffers}, (images,), {"aux": True})

    def losses(
        self, theta: Tensor, buffers: dict[str, Tensor], images: Tensor, labels: Tensor
    ) -> Tensor:
        """Cross-entropy of each image, with the auxiliary heads'. images [B,3,H,W] -> [B], nats."""
        first, *rest = (image_losses(z, labels) for z in self.logits(theta, buffers, images))
        return first + common.AUX_WEIGHT * sum(rest)

    def slopes(self, theta: Tensor, direction: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        """Derivatives of `losses` along a direction of theta, [B], in training mode. They come from
        forward mode and can be differentiated by theta again."""
        with forward_ad.dual_level(), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
            dual = forward_ad.make_dual(theta, direction)
            pairs = [forward_ad.unpack_dual(z) for z in self.logits(dual, {}, images)]
        first, *rest = (image_slopes(*pair, labels) for pair in pairs)
        return first + common.AUX_WEIGHT * sum(rest)

    def outer_loss(self, inner: Inner, photos: tuple[Tensor, Tensor], statistics: str) -> Tensor:
        self.net.train(statistics == "batch")
        loss = self.losses(inner.theta, copied(inner.buffers), *photos).mean()
        self.net.train()
        return loss


def image_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, mean over its valid pixels. [B,C,H,W], [B,H,W] -> [B], nats."""
    losses = F.cross_entropy(logits, labels, ignore_index=common.IGNORE, reduction="none")
    return losses.sum(dim=(1, 2)) / (labels != common.IGNORE).sum(dim=(1, 2)).clamp(min=1)


def image_slopes(logits: Tensor, change: Tensor, labels: Tensor) -> Tensor:
    """Derivatives of `image_losses` as the logits change, both [B,C,H,W] -> [B]."""
    valid = labels != common.IGNORE
    right = change.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]  # [B,H,W]
    slopes = ((logits.softmax(dim=1) * change).sum(dim=1) - right) * valid
    return slopes.sum(dim=(1, 2)) / valid.sum(dim=(1, 2)).clamp(min=1)


def copied(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in buffers.items()}


def mixed(
    f: Functional, inner: Inner, batches: Sequence, weights: Tensor, photos: tuple, args: Args
) -> tuple[Tensor, Inner, Tensor, Tensor]:
    """Meta-gradient by mixed-mode differentiation (MixFlow-MG).

    batches: T of (images [B,3,h,w], labels [B,h,w]), weights [T,B], photos like a batch
    -> gradient of the outer loss by the weights [T,B], the network after T updates, outer loss,
    losses of the source images [T,B]. Of each update only its gradient is kept: backwards, the
    updates are undone.
    """
    update, undo, _ = OPTIMIZERS[args.inner_optimizer]
    rates = (args.inner_lr, args.inner_decay)
    gradients, all_losses = [], []
    theta, state, step, buffers = (inner.theta, inner.state, inner.step, copied(inner.buffers))
    for batch, w in zip(batches, weights, strict=True):
        theta = theta.detach().requires_grad_()
        losses = f.losses(theta, buffers, *batch)
        gradients += torch.autograd.grad((w * losses).sum(), theta)
        all_losses.append(losses.detach())
        step += 1
        theta, state = update(theta.detach(), state, gradients[-1], step, *rates)
    after = Inner(theta, state, buffers, step)

    theta = theta.clone().requires_grad_()
    outer = f.outer_loss(after._replace(theta=theta), photos, args.outer_statistics)
    # Cotangents, d outer / d theta_t and d outer / d state_t, from t = T to 0.
    (to_theta,) = torch.autograd.grad(outer, theta)
    to_state = [torch.zeros_like(vector) for vector in state]
    theta, to_weights = theta.detach(), torch.empty_like(weights)
    for t in reversed(range(len(batches))):
        gradient, nth = gradients.pop(), inner.step + t + 1
        theta, state = undo(theta, state, gradient, nth, *rates) if t > 0 else inner[:2]
        leaves = [value.detach().requires_grad_() for value in (theta, *state, gradient)]
        new_theta, new_state = update(leaves[0], leaves[1:-1], leaves[-1], nth, *rates)
        to_theta, *to_state, to_gradient = torch.autograd.grad(
            (new_theta, *new_state), leaves, (to_theta, *to_state)
        )
        # The gradient is sum_i w_i d loss_i / d theta. So along its cotangent c the derivative of
        # loss_i is d outer / d w_i, and that of sum_i w_i loss_i has the gradient Hessian c.
        leaf = theta.clone().requires_grad_(t > 0)
        slopes = f.slopes(leaf, to_gradient, *batches[t])
        to_weights[t] = slopes.detach()
        if t > 0:
            to_theta = to_theta + torch.autograd.grad((weights[t] * slopes).sum(), leaf)[0]
    return to_weights, after, outer.detach(), torch.stack(all_losses)


def unroll(
    f: Functional, inner: Inner, batches: Sequence, weights: Tensor, photos: tuple, args: Args
) -> tuple[Tensor, Inner, Tensor, Tensor]:
    """The same as `mixed` by reverse mode alone: the graph of all T updates is kept."""
    update = OPTIMIZERS[args.inner_optimizer].update
    weights = weights.detach().requires_grad_()
    theta, state, step, buffers = (inner.theta, inner.state, inner.step, copied(inner.buffers))
    theta, all_losses = theta.detach().requires_grad_(), []
    for batch, w in zip(batches, weights, strict=True):
        losses = f.losses(theta, buffers, *batch)
        (gradient,) = torch.autograd.grad((w * losses).sum(), theta, create_graph=True)
        step += 1
        theta, state = update(theta, state, gradient, step, args.inner_lr, args.inner_decay)
        all_losses.append(losses.detach())
    outer = f.outer_loss(Inner(theta, state, buffers, step), photos, args.outer_statistics)
    (to_weights,) = torch.autograd.grad(outer, weights)
    after = Inner(theta.detach(), tuple(v.detach() for v in state), buffers, step)
    return to_weights, after, outer.detach(), torch.stack(all_losses)


# ---- Meta-learning ------------------------------------------------------------------------------
class Population:
    """The inner networks, and the rater's Adam of each."""

    def __init__(self, run: Run, rater: Rater) -> None:
        self.run, self.size = run, run.args.population
        self.members = [self.born() for _ in range(self.size)]
        phi = parameters_to_vector(rater.parameters()).detach()
        self.adams = [(torch.zeros_like(phi), torch.zeros_like(phi)) for _ in self.members]

    def born(self) -> Inner:
        return newborn(self.run.network(), self.run.args.inner_optimizer)

    def renew(self, step: int) -> None:
        """The members start anew in turns, each after its lifetime."""
        lifetime = self.run.args.lifetime
        for p in range(self.size):
            if step > 1 and (step - 1 + p * lifetime // self.size) % lifetime == 0:
                self.members[p] = self.born()

    def state_dict(self) -> dict:
        return {"members": [tuple(m) for m in self.members], "adams": self.adams}

    def load_state_dict(self, state: dict) -> None:
        device = self.run.device
        for p, (theta, vectors, buffers, step) in enumerate(state["members"]):
            buffers = {name: b.to(device) for name, b in buffers.items()}
            vectors = tuple(vector.to(device) for vector in vectors)
            self.members[p] = Inner(theta.to(device), vectors, buffers, step)
        self.adams = [(m.to(device), v.to(device)) for m, v in state["adams"]]


def candidates(batch: Batch, args: Args, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Every augmentation of every image of a batch, small. -> [A*B,3,h,w], [A*B,h,w]."""
    x, y = common.crop_flip(batch.images, batch.labels, rng)
    x = with_all(args.augmentations, x, rng)
    return shrunk(x, y.repeat(len(args.augmentations), 1, 1), args.shrink)


def warmed_up(
    run: Run, f: Functional, inner: Inner, batches: Batches, photos: Batches, seed: tuple[int, int]
) -> Inner:
    """A new inner network after `warm_up` updates on candidates of equal weights."""
    args, rng = run.args, common.generator(run.args.seed, *seed, 11)
    update = OPTIMIZERS[args.inner_optimizer].update
    theta, state, buffers, step = inner.theta, inner.state, copied(inner.buffers), inner.step
    start = int(torch.randint(2**20, (), generator=rng))  # of its own batches
    for n in range(args.warm_up):
        theta = theta.requires_grad_()
        losses = f.losses(theta, buffers, *candidates(batches(start + n), args, rng))
        (gradient,) = torch.autograd.grad(losses.mean(), theta)
        theta = theta.detach()
        if n % 10 == 0:
            batch = shrunk(*common.crop_flip(*photos(start + n)[:2], rng), args.shrink)
            now = Inner(theta, state, buffers, step)
            with torch.no_grad():
                outer_loss = f.outer_loss(now, batch, args.outer_statistics)
            run.flush()  # a line of its own, no mean with other ages
            run.log(seed[0], age=step, inner_loss=losses.mean(), outer_loss=outer_loss)
            run.flush()
        step += 1
        theta, state = update(theta, state, gradient, step, args.inner_lr, args.inner_decay)
    return Inner(theta, state, buffers, step)


def meta_train(
    run: Run, rater: Rater, source: Part, few: Part, amount: np.ndarray | None = None
) -> None:
    """Trains the rater, in place. amount: the share of random pixels of each source image, [N]."""
    args, device, updates = run.args, run.device, run.args.inner_updates
    f = Functional(Network(args.net, len(run.classes)).to(device).train())
    population = Population(run, rater)
    batches = Batches(source, args.inner_batch, (args.seed, 1), device)
    photos = Batches(few, args.batch_size, (args.seed, 2), device)
    probe = probe_of(source, args, device)
    rater.train()
    for step in run.steps("meta", args.meta_steps, rater=rater, population=population):
        rng = common.generator(args.seed, step, 7)
        population.renew(step)
        phi, moved = parameters_to_vector(rater.parameters()).detach(), []
        for p, member in enumerate(population.members):
            if member.step == 0:
                member = warmed_up(run, f, member, batches, photos, (step, p))
            nth = step * population.size + p
            drawn = [batches(nth * updates + t) for t in range(updates)]
            inner = [candidates(b, args, rng) for b in drawn]  # images [A*B,3,h,w], labels
            batch = photos(nth)
            outer = shrunk(*common.crop_flip(batch.images, batch.labels, rng), args.shrink)
            scores = rater(torch.cat([x for x, _ in inner])).view(updates, -1)
            weights = (scores / args.temperature).softmax(dim=1)  # [T,A*B]
            differentiate = mixed if args.meta_gradient == "mixed" else unroll
            to_weights, population.members[p], outer_loss, losses = differentiate(
                f, member, inner, weights.detach(), outer, args
            )
            rater.zero_grad()
            weights.backward(to_weights)
            norm = nn.utils.clip_grad_norm_(rater.parameters(), args.clip)
            gradient = torch.cat([q.grad.flatten() for q in rater.parameters()])
            one, population.adams[p] = adam(phi, population.adams[p], gradient, step, args.meta_lr)
            moved.append(one)
            used = 1 / weights.detach().square().sum(dim=1).mean()
            logged = {"inner_loss": losses.mean(), "outer_loss": outer_loss, "norm": norm}
            if amount is not None:
                damage = [np.tile(amount[b.index], len(args.augmentations)) for b in drawn]
                logged |= worth_by_damage(to_weights, np.stack(damage))
            run.log(step, age=member.step, **logged, images_used=used)
        # The mean of the members' updates.
        vector_to_parameters(torch.stack(moved).mean(dim=0), rater.parameters())
        if step % max(1, args.meta_steps // 20) == 0:
            with torch.no_grad():
                means = rater.eval()(probe).view(len(args.augmentations), -1).mean(dim=1)
            means = zip(args.augmentations, means - means.mean(), strict=True)
            run.log(step, **{f"score_{name}": mean for name, mean in means})
            rater.train()


def probe_of(source: Part, args: Args, device: torch.device) -> Tensor:
    """Some images with each augmentation, to follow their scores. -> [A*n,3,h,w]."""
    places = np.linspace(0, len(source) - 1, min(64, len(source))).round().astype(int)
    images = common.to_tensor(source.images[places], device)
    return F.avg_pool2d(
        with_all(args.augmentations, images, common.generator(args.seed, 8)), args.shrink
    )


# ---- Analysis and choice ------------------------------------------------------------------------
@torch.no_grad()
def analyze_with_individual_augmentations(
    rater: Rater, part: Part, args: Args, device: torch.device
) -> np.ndarray:
    """Scores of all candidates of all images. -> float32 [N,V], columns as `variants`."""
    rater.eval()
    names = variants(args)

    def made(n: int) -> np.ndarray:
        return np.stack([candidate(part.images[n], part.names[n], v, args.seed) for v in names])

    scores = []
    for images in common.in_threads(made, range(len(part))):
        x = common.to_tensor(images, device)  # [V,3,H,W]
        scores.append(rater(F.avg_pool2d(x, args.shrink)).cpu().numpy())
    return np.stack(scores)


def chosen(scores: np.ndarray, k: int, rule: str, seed: int) -> np.ndarray:
    """k candidates of each image by the rule best, worst or random. [N,V] -> int [N,k]."""
    rng = np.random.default_rng([seed, 10])
    keys = {"best": -scores, "worst": scores, "random": rng.random(scores.shape)}[rule]
    return keys.argsort(axis=1, kind="stable")[:, :k]


def chosen_set(path: Path, part: Part, choice: np.ndarray, args: Args) -> Part:
    """N*k images, the chosen candidates, in a file that is read as needed. choice [N,k]."""
    names, k = variants(args), choice.shape[1]

    def made(place: int) -> np.ndarray:
        n = place // k
        return candidate(part.images[n], part.names[n], names[choice.flat[place]], args.seed)

    common.build_cache(path, path.stem, range(choice.size), (*args.size, 3), made)
    labels = part.labels if k == 1 else np.repeat(part.labels, k, axis=0)
    titles = tuple(f"{part.names[n]} {names[v]}" for n in range(len(part)) for v in choice[n])
    return Part(part.dataset, titles, np.load(path, mmap_mode="r"), labels)


def write_choice(
    path: Path, part: Part, scores: np.ndarray, choice: np.ndarray, args: Args
) -> None:
    """{file name: {index, scores: {candidate: score}, choice: [candidate, ...]}}, best first."""
    names = variants(args)
    table = {
        name: {
            "index": n,
            "scores": dict(zip(names, scores[n].tolist(), strict=True)),
            "choice": [names[v] for v in choice[n]],
        }
        for n, name in enumerate(part.names)
    }
    with common.replacing(path) as temporary:
        torch.save(table, temporary)


# ---- The corruption check -----------------------------------------------------------------------
def corrupted(part: Part, share: float, seed: int) -> tuple[Part, np.ndarray]:
    """A share of the images with 10-90% of their pixels at random, and that amount of each [N]."""
    rng, count = np.random.default_rng([seed, 9]), round(share * len(part))
    if not 0 < count < len(part):
        raise UserError(f"--corrupt {share}: {count} of {len(part)} images, expected some, not all")
    images, amount = np.array(part.images), np.zeros(len(part))
    for n in rng.choice(len(part), count, replace=False):
        amount[n] = rng.uniform(0.1, 0.9)
        hit = rng.random(images.shape[1:3]) < amount[n]
        images[n][hit] = rng.integers(0, 256, (hit.sum(), 3))
    return replace(part, images=images), amount


DAMAGE = {"none": (0.0, 0.0), "10-30": (0.0, 0.3), "30-60": (0.3, 0.6), "60-90": (0.6, 0.9)}


def worth_by_damage(to_weights: Tensor, amount: np.ndarray) -> dict[str, Tensor]:
    """How much the outer loss falls with the weight of an image, less the mean of its batch; means
    over the images of each amount of damage. The rater learns from these. Both [T,B]."""
    worth = to_weights.mean(dim=1, keepdim=True) - to_weights
    found = {}
    for name, (low, high) in DAMAGE.items():
        hit = (amount > low) & (amount <= high) if high else amount == 0
        if hit.any():
            places = common.send(torch.from_numpy(np.flatnonzero(hit)), worth.device)
            found[f"worth_{name}"] = worth.flatten()[places].mean()
    return found


def auroc(scores: np.ndarray, bad: np.ndarray) -> float:
    """Probability that a random bad one has a lower score than a random good one."""
    lower = scores[bad][:, None] < scores[~bad]
    equal = scores[bad][:, None] == scores[~bad]
    return float((lower + equal / 2).mean())


# ---- The method ---------------------------------------------------------------------------------
def run(args: Args) -> Result:
    name = "datarater_corrupt" if args.corrupt else "datarater"  # the former is no row of the table
    check_flags(args := common.resolve(settled(args), name))
    run = Run(args, name)
    if run.result:
        return run.result
    args, net = run.args, run.network()
    source, few = common.load(args, "source"), common.load(args, "target_few")
    amount = np.zeros(len(source))
    if args.corrupt:
        source, amount = corrupted(source, args.corrupt, args.seed)
    rater = Rater().to(run.device)
    meta_train(run, rater, source, few, amount if args.corrupt else None)

    scores = analyze_with_individual_augmentations(rater, source, args, run.device)
    best = chosen(scores, args.k, "best", args.seed)
    file = run.out / f"best_augmentations_step_{args.meta_steps}.pt"
    write_choice(file, source, scores, best, args)
    top = chosen_set(run.out / "set/images.npy", source, best, args)
    common.save_set(run.out / "set", source.dataset, top.images, top.labels, top.names)
    common.train(run, net, top, args.steps, "k_top")
    compare = args.compare and len(variants(args)) > 1
    controls = train_controls(run, source, scores) if compare else {}
    draw_rater(run, source, scores, amount)
    gradients = args.meta_steps * args.population
    beside = f"{gradients} meta-gradients of {args.inner_updates} small updates"
    result = run.finish(net, target_labels=args.labelled, beside=beside)
    if controls:
        found = {"k-top": result.miou, **controls}
        print("mIoU: " + ", ".join(f"{name} {miou:.1f}" for name, miou in found.items()))
        draw_comparison(run.out / "figures/mean_iou.png", found)
    return result


def check_flags(args: Args) -> None:
    """UserError for what cannot run."""
    counts = "meta_steps inner_updates population lifetime inner_batch shrink draws"
    for flag in counts.split():
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least 1")
    if args.warm_up < 0:
        raise UserError(f"--warm-up {args.warm_up}: expected at least 0")
    for flag in ("temperature", "clip", "inner_lr", "meta_lr"):
        if not getattr(args, flag) > 0:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: expected above 0")
    if args.net == "lraspp":
        raise UserError("--net lraspp: torch has no second derivative of its hard sigmoid")
    if len(set(args.augmentations)) < max(1, len(args.augmentations)):
        raise UserError("--augmentations: expected at least one, and none twice")
    for name in set(args.augmentations) - set(AUGMENTATIONS):
        raise UserError(f"--augmentations {name}: expected some of {' '.join(AUGMENTATIONS)}")
    if args.inner_batch * len(args.augmentations) < 2:
        raise UserError("--inner-batch 1: one candidate alone cannot be weighed")
    count = len(variants(args))
    if not 1 <= args.k <= count:
        raise UserError(f"--k {args.k}: expected 1 to {count}, the candidates of an image")
    if not 0 <= args.corrupt < 1:
        raise UserError(f"--corrupt {args.corrupt}: expected a share from 0 to below 1")
    if any(side // args.shrink % common.STRIDE for side in args.size):
        raise UserError(f"--shrink {args.shrink}: expected sides that are multiples of 32")


CONTROLS = ("original", "equal", "random", "worst")


def train_controls(run: Run, source: Part, scores: np.ndarray) -> dict[str, float]:
    """mIoU of the controls, each a run of its own below the run folder, with as many updates.

    original: the images as they are; equal: all augmentations alike, with fresh parameters at every
    step; random, worst: k candidates of each image, at random or those of the lowest scores.
    """
    args, found = run.args, {}
    for name in CONTROLS:
        own = Run(replace(args, out=run.out / "controls" / name), f"datarater_{name}")
        if not own.result:
            augment = common.random_augmentation if name == "equal" else common.original
            part, file = source, own.out / "images.npy"
            if name in ("random", "worst"):
                part = chosen_set(file, source, chosen(scores, args.k, name, args.seed), args)
            net = own.network()
            common.train(own, net, part, args.steps, name, augment)
            own.finish(net, target_labels=args.labelled if name == "worst" else 0)
            file.unlink(missing_ok=True)
        found[name] = own.result.miou
    return found


# ---- Figures ------------------------------------------------------------------------------------
def draw_rater(run: Run, source: Part, scores: np.ndarray, amount: np.ndarray) -> None:
    """Every figure but mean_iou.png, into figures/."""
    folder = run.out / "figures"
    lines = [line for line in common.read_scalars(run.out) if "outer_loss" in line]
    draw_scores(folder / "scores.png", source, scores, run.args)
    scored = [line for line in lines if f"score_{run.args.augmentations[0]}" in line]
    names = {f"score_{name}": name for name in run.args.augmentations}
    if len(names) > 1:
        label = "mean score (less the mean of all)"
        draw_lines(folder / "augmentation_scores.png", scored, names, label)
    titles = {"outer_loss": "outer: labelled target photos", "inner_loss": "inner: source images"}
    draw_losses(folder / "meta_losses.png", lines, titles, run.args.warm_up)
    if run.args.corrupt:
        draw_corruption(folder / "corruption.png", scores.mean(axis=1), amount, lines)


@contextlib.contextmanager
def plot(path: Path, rows: int = 1, columns: int = 1, size: tuple = (6, 3.5)) -> Iterator[Any]:
    """Yields the axes of a figure, [rows,columns] or one, and writes it to `path`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots(rows, columns, squeeze=rows == 1)
    common.save_figure(figure, path)


def draw_lines(path: Path, lines: list[dict], titles: dict[str, str], label: str) -> None:
    with plot(path) as axis:
        for key, title in titles.items():
            steps, values = [line["step"] for line in lines], [line[key] for line in lines]
            axis.plot(steps, values, ".-", label=title)
        axis.set(xlabel="meta-step", ylabel=label)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)


def draw_losses(path: Path, lines: list[dict], titles: dict[str, str], warm_up: int) -> None:
    """Losses of the inner networks by their age: a dot is a batch, after the warm-up the mean of
    ten; the lines are means."""
    ages = np.array([line["age"] for line in lines])
    nth = ages // max(1, ages.max() // 40)
    bins = [nth == n for n in np.unique(nth)]
    centres = [ages[b].mean() for b in bins]
    with plot(path) as axis:
        for key, title in titles.items():
            losses = np.array([line[key] for line in lines])
            (mean,) = axis.plot(centres, [losses[b].mean() for b in bins], label=title)
            axis.plot(ages, losses, ".", ms=2, alpha=0.3, color=mean.get_color())
        if warm_up:
            axis.axvline(warm_up, color="0.5", ls=":", label="end of the warm-up")
        axis.set(xlabel="updates of the inner network", ylabel="cross-entropy (nats)")
        axis.grid(alpha=0.3)
        axis.legend(framealpha=1, edgecolor="none")


def draw_scores(path: Path, source: Part, scores: np.ndarray, args: Args) -> None:
    """Images with the candidate of the highest score of each augmentation, and that score; green
    frames around the best candidates of all, red ones around the worst of those shown."""
    names, columns = variants(args), args.augmentations
    rows = np.linspace(0, len(source) - 1, 5).round().astype(int)
    best = chosen(scores, args.k, "best", args.seed)
    if len(names) == 1:  # from the highest score to the lowest
        rows = (-scores[:, 0]).argsort(kind="stable")[rows]
    with plot(path, len(rows), len(columns), (2.4 * len(columns), 7.5)) as axes:
        for i, n in enumerate(rows):
            kinds = [[v for v, name in enumerate(names) if name.split()[0] == c] for c in columns]
            shown = [max(kind, key=scores[n].__getitem__) for kind in kinds]
            worst = min(shown, key=scores[n].__getitem__)
            for axis, v, column in zip(axes[i], shown, columns, strict=True):
                axis.imshow(candidate(source.images[n], source.names[n], names[v], args.seed))
                header = f"{column}\n" if i == 0 else ""
                axis.set_title(f"{header}{scores[n, v]:+.2g}", fontsize=9)
                axis.set(xticks=[], yticks=[])
                for side in axis.spines.values():
                    colour = "tab:green" if v in best[n] else "tab:red"
                    framed = len(names) > 1 and (v in best[n] or v == worst)
                    side.set(color=colour, linewidth=4, visible=framed)


def draw_comparison(path: Path, found: dict[str, float]) -> None:
    """mIoU of k-top beside its controls."""
    with plot(path, size=(6, 3.2)) as axis:
        colours = ["tab:green"] + ["tab:gray"] * (len(found) - 1)
        axis.bar_label(axis.bar(list(found), list(found.values()), color=colours), fmt="%.1f")
        axis.set(ylabel="mIoU (%)", ylim=(0, 1.15 * max(found.values())))


def draw_corruption(path: Path, scores: np.ndarray, amount: np.ndarray, lines: list[dict]) -> None:
    """Mean score of each image's candidates against its share of random pixels, and beside it what
    the rater had to learn from: whether the photos' loss minds such images."""
    found = auroc(scores, amount > 0)
    print(f"damaged images' scores are lower with a probability of {found:.3f} (AUROC)")
    with plot(path, 1, 2, (9, 3.5)) as axes:
        left, right = axes
        left.scatter(100 * amount, scores, s=8, alpha=0.5)
        left.set(xlabel="pixels at random (%)", ylabel="score", title=f"AUROC {found:.3f}")
        for x, name in enumerate(DAMAGE):
            worth = [line[f"worth_{name}"] for line in lines if f"worth_{name}" in line]
            if len(worth) > 1:
                error = 2 * np.std(worth, ddof=1) / len(worth) ** 0.5
                right.errorbar(x, np.mean(worth), error, fmt="o", color="tab:blue", capsize=4)
        right.axhline(0, color="0.5", lw=1)
        right.set_xticks(range(len(DAMAGE)), list(DAMAGE))
        right.set(xlabel="pixels at random (%)", title="mean and two standard errors")
        right.set_ylabel("fall of the photos' loss by its weight")
        for axis in axes:
            axis.grid(alpha=0.3)


if __name__ == "__main__":
    common.main(Args, run, __doc__)
