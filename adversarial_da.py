"""Adapts a segmentation network to unlabelled photos: translation, alignment, self-training.

DACS (arXiv:2007.08702v2), AdaptSegNet (arXiv:1802.10349v3), ADVENT (arXiv:1811.12833v2), FDA
(arXiv:2004.05498v1) and AdaBN (arXiv:1603.04779v4), each a switch, alone and together. The source
are labelled synthetic images, the target are photos; their labels are never used:

    python adversarial_da.py                          (colour transfer, then DACS)

    python adversarial_da.py --no-self-train --align output
                                                      (colour transfer, then AdaptSegNet)

    python adversarial_da.py --no-self-train --translate none --statistics target      (AdaBN)

The first takes three minutes on one CPU core and reaches 56 mIoU on the miniature; colour transfer
alone reaches 54. `--translate fda` is FDA, `--align entropy` is ADVENT. What the discriminator adds
is the gain over the same command with `--lambda-adv 0`.

All --steps updates are one training with one optimizer. The first ones (--source-share) see
translated source images alone. Each later update sees a batch of source images and one of photos.
With --init CHECKPOINT the first ones are left out.

scalars.json has the discriminator's accuracy: near 1 it knows the domains, near 0.5 it guesses.
"""

import copy
import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import common
import datasets
from common import Loader, Network, Result, Run
from datasets import Split, UserError


@dataclass(frozen=True)
class Args(common.Args):
    translate: Literal["fda", "color", "none"] = "color"
    """What source images get from a random photo: mean and covariance of RGB (color), the
    amplitude of low frequencies (fda), or nothing."""
    align: Literal["output", "entropy", "none"] = "none"
    """What the discriminator compares: softmax maps (output, AdaptSegNet), weighted
    self-information maps (entropy, ADVENT), or nothing."""
    self_train: bool = True
    """Learn the pseudo-labels of a teacher on photos with pasted source classes (DACS)."""
    statistics: Literal["mixture", "target"] = "mixture"
    """Batch normalisation. Each domain is normalised by its own batch; the running statistics,
    which the tested network uses, see both in turn (mixture). target: at the end they are measured
    again on the photos (AdaBN)."""
    source_share: float = 0.5
    """Share of --steps on source images alone, at the start."""
    lambda_adv: float = 0.01
    """Weight of the adversarial loss. AdaptSegNet and ADVENT: 0.001, with SGD."""
    lambda_ent: float = 0.0
    """Weight of the photos' entropy. ADVENT's MinEnt: 0.001, with --align none."""
    discriminator_lr: float = 1e-3
    """Initial learning rate of the discriminator's Adam. The papers: 1e-4, for 250,000 steps."""
    discriminator_width: int = 16
    """Channels of its first convolution. The papers: 64, too slow beside the tiny network."""
    beta: float = 0.03
    """FDA: frequencies below beta are exchanged, in cycles/px. The paper: 0.01, 0.05, 0.09."""
    confidence_threshold: float = 0.9
    """Pseudo-labels count by the share of pixels whose probability is above it. DACS: 0.968."""
    ema: float = 0.99
    """Decay of the teacher's weights at each step. DACS: 0.99; DAFormer: 0.999."""


# ---- Alignment ----------------------------------------------------------------------------------
class Discriminator(nn.Sequential):
    """Fully convolutional, as in AdaptSegNet. A positive score means source.

    maps [B,C,H,W] -> scores [B,1,H/32,W/32].
    """

    def __init__(self, num_classes: int, width: int) -> None:
        layers, channels = [], num_classes
        for o in (width, 2 * width, 4 * width, 8 * width):
            layers += [nn.Conv2d(channels, o, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
            channels = o
        super().__init__(*layers, nn.Conv2d(channels, 1, 4, 2, 1))


def self_information(logits: Tensor) -> Tensor:
    """-p log p of each class and pixel (ADVENT, sec. 3.2). [B,C,H,W] -> [B,C,H,W].

    Divided by log C, so that the sum over classes, the entropy (eq. 2), is in [0, 1].
    """
    log_p = logits.log_softmax(dim=1)
    return -log_p.exp() * log_p / math.log(logits.shape[1])


def compared(logits: Tensor, align: str) -> Tensor:
    """What a discriminator sees of logits, see --align. [B,C,H,W] -> [B,C,H,W]."""
    return self_information(logits) if align == "entropy" else logits.softmax(dim=1)


def bce_loss(scores: Tensor, is_source: bool) -> Tensor:
    """Cross-entropy of scores with this domain as the truth. [B,1,h,w] -> scalar in nats."""
    truth = torch.full_like(scores, float(is_source))
    return F.binary_cross_entropy_with_logits(scores, truth)


def adversarial_loss(discriminator: nn.Module, target: Tensor, align: str) -> Tensor:
    """Small where the discriminator takes photos for source images (AdaptSegNet, eq. 4).

    target: logits [B,C,H,W] -> scalar in nats.
    """
    return bce_loss(discriminator(compared(target, align)), is_source=True)


def discriminator_loss(
    discriminator: nn.Module, source: Tensor, target: Tensor, align: str
) -> tuple[Tensor, Tensor]:
    """AdaptSegNet, eq. 2, and the discriminator's accuracy.

    source, target: logits [B,C,H,W] -> two scalars.
    """
    # Detached: this loss trains the discriminator alone.
    maps = compared(torch.cat([source, target]).detach(), align)  # [2B,C,H,W]
    on_source, on_target = discriminator(maps).chunk(2)  # [B,1,h,w] each
    loss = (bce_loss(on_source, is_source=True) + bce_loss(on_target, is_source=False)) / 2
    return loss, torch.cat([on_source > 0, on_target <= 0]).float().mean()


# ---- Self-training ------------------------------------------------------------------------------
@torch.no_grad()
def pseudo_labels(teacher: nn.Module, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The likeliest class of each pixel, and each image's share of pixels that are confident.

    images [B,3,H,W] -> labels [B,H,W], shares [B].
    """
    confidence, labels = teacher(images).softmax(dim=1).max(dim=1)  # [B,H,W] each
    return labels, (confidence > threshold).float().mean(dim=(1, 2))


def class_mix_mask(labels: Tensor, num_classes: int, rng: torch.Generator) -> Tensor:
    """The pixels of a random half of each image's classes (ClassMix, arXiv:2007.07936v2).

    labels [B,H,W] -> bool [B,H,W]: (n + 1) // 2 of n classes are drawn, ignored pixels never are.
    """
    present = [(labels == c).flatten(1).any(dim=1) for c in range(num_classes)]
    present = torch.stack(present, dim=1)  # [B,C]
    numbers = common.to_device(common.draw(rng, len(labels), num_classes), labels.device)
    order = torch.where(present, numbers, -1.0).argsort(dim=1, descending=True)
    rank = order.argsort(dim=1)  # random, the classes that are present first
    drawn = present & (rank < (present.sum(dim=1, keepdim=True) + 1) // 2)  # [B,C]
    drawn = F.pad(drawn, (0, 1))  # a class more, for ignored pixels
    return drawn.gather(1, labels.clamp(max=num_classes).flatten(1)).view_as(labels)


def mixed_loss(logits: Tensor, labels: Tensor, pasted: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of mixed images (DACS, eq. 3): source pixels weigh 1, photo pixels their share.

    logits [B,C,H,W]; labels [B,H,W]; pasted, bool [B,H,W], from the source; shares [B] of confident
    pixels -> scalar in nats, the mean over all pixels.
    """
    losses = F.cross_entropy(logits, labels, ignore_index=datasets.IGNORE, reduction="none")
    return (torch.where(pasted, 1.0, shares[:, None, None]) * losses).mean()


# ---- The method ---------------------------------------------------------------------------------
def adapt_statistics(net: Network, photos: Split, batch_size: int, device: torch.device) -> None:
    """AdaBN: running statistics are reset, then averaged over batches of all photos."""
    batches = np.array_split(np.arange(len(photos)), max(1, len(photos) // batch_size))
    update_bn((common.to_tensor(photos.images[batch], device) for batch in batches), net)


def check(args: Args) -> None:
    """UserError for a flag without an effect, or out of range."""
    on = {"--align": args.align != "none", "--self-train": args.self_train}
    on["adaptation"] = any(on.values()) or args.lambda_ent > 0
    on["--translate fda"] = args.translate == "fda"
    needs = dict.fromkeys(("lambda_adv", "discriminator_lr", "discriminator_width"), "--align")
    needs |= {"confidence_threshold": "--self-train", "ema": "--self-train"}
    needs |= {"beta": "--translate fda", "source_share": "adaptation"}
    for name, switch in needs.items():
        if not on[switch] and getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name.replace('_', '-')}: has no effect without {switch}")
    for name in ("source_share", "confidence_threshold", "ema"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a number from 0 to 1")


def run(args: Args) -> Result:
    check(args)
    run = Run(args, "adversarial_da", stages=1)
    if run.result:
        return run.result
    args, net = run.args, run.network()
    source, photos = datasets.load(args, "source"), datasets.load(args, "target_unlabelled")
    adapts = args.align != "none" or args.self_train or args.lambda_ent > 0
    source_steps = round(args.steps * args.source_share) if adapts else args.steps
    first = source_steps if args.checkpoint and adapts else 0  # updates that are left out
    steps, source_steps = args.steps - first, source_steps - first
    train(run, net, source, photos, steps, source_steps)
    if args.statistics == "target":
        adapt_statistics(net, photos, args.batch_size, run.device)
    if common.rank() == 0:
        draw_adaptation(run, net, photos)
    updates = f"{steps - source_steps} discriminator updates" if args.align != "none" else ""
    return run.finish(net, target_labels=0, steps=steps, other_updates=updates)


def train(
    run: Run, net: Network, source: Split, photos: Split, steps: int, source_steps: int
) -> None:
    """Supervised on source images; after `source_steps` updates photos join."""
    args, seed = run.args, run.args.seed
    transfers = {"color": common.color_transfer}
    transfers["fda"] = partial(common.fourier_transfer, beta=args.beta)
    translate = common.identity
    if args.translate != "none":
        translate = common.photo_style(photos, transfers[args.translate])
    source_loader = Loader(source, args.batch_size, run.device, seed, "source")
    target_loader = Loader(photos, args.batch_size, run.device, seed, "target")
    torch.manual_seed(common.seed_of(seed, "discriminator"))
    discriminator = Discriminator(len(run.classes), args.discriminator_width)
    discriminator.to(run.device, memory_format=torch.channels_last)
    # In training mode, as in DACS: it normalises photos by the statistics of their batch.
    teacher = copy.deepcopy(net).requires_grad_(False).train()
    model, model_d = common.parallel(net), common.parallel(discriminator)
    optimizer = common.make_optimizer(net, args.lr)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), betas=(0.9, 0.99), fused=True)
    state = {"net": net, "optimizer": optimizer, "teacher": teacher}
    state |= {"discriminator": discriminator, "optimizer_d": optimizer_d}
    net.train()
    for step in run.steps("source", steps, **state):
        rng = common.generator(seed, "source", step)
        lr = common.learning_rate(args.lr, step, steps)
        common.set_lr(optimizer, lr)
        common.set_lr(optimizer_d, common.learning_rate(args.discriminator_lr, step, steps))
        x, y = source_loader(step)  # [B,3,H,W], [B,H,W]
        x, y = common.crop_flip(translate(x, rng), y, rng)
        with run.autocast():
            on_source = model(x, aux=True)  # [B,C,H,W] of every head
            loss = total = common.segmentation_loss(on_source, y)
        scalars = {}
        if step > source_steps:
            x_target, _ = target_loader(step)  # [B,3,H,W]
            x_target, _ = common.crop_flip(x_target, None, rng)

        # Step 1: alignment. The discriminator is fixed, and trains the network.
        if step > source_steps and (args.align != "none" or args.lambda_ent > 0):
            discriminator.requires_grad_(False)
            with run.autocast():
                on_target = model(x_target)  # [B,C,H,W]
                entropy = self_information(on_target).sum(dim=1).mean()  # ADVENT, eq. 3
                loss_adv = adversarial_loss(discriminator, on_target, args.align)
                weight = args.lambda_adv if args.align != "none" else 0.0
                total = total + weight * loss_adv + args.lambda_ent * entropy
            scalars |= {"adversarial_loss": loss_adv, "entropy": entropy}

        # Step 2: self-training. Half of the source's classes are pasted into the photos.
        if step > source_steps and args.self_train:
            with run.autocast():
                y_target, shares = pseudo_labels(teacher, x_target, args.confidence_threshold)
            pasted = class_mix_mask(y, len(run.classes), rng)  # [B,H,W]
            x_mixed = torch.where(pasted[:, None], x, x_target)
            x_mixed = common.random_augmentation(x_mixed, rng)
            with run.autocast():
                on_mixed = model(x_mixed)  # [B,C,H,W]
                loss_mixed = mixed_loss(on_mixed, torch.where(pasted, y, y_target), pasted, shares)
                total = total + loss_mixed
            scalars |= {"mixed_loss": loss_mixed, "confident": shares.mean()}

        # Step 3: the segmentation network and its teacher, at first the mean of all students.
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if args.self_train:
            common.update_ema(teacher, net, min(args.ema, 1 - 1 / (step + 1)))

        # Step 4: the discriminator
        if step > source_steps and args.align != "none":
            discriminator.requires_grad_(True)
            with run.autocast():
                loss_d, accuracy = discriminator_loss(model_d, on_source[0], on_target, args.align)
            optimizer_d.zero_grad()
            loss_d.backward()
            optimizer_d.step()
            scalars |= {"discriminator_loss": loss_d, "discriminator_accuracy": accuracy}

        run.log(step, loss=loss, lr=lr, **scalars)
        if common.is_quarter(step, steps):
            run.evaluate(net, step)


def draw_adaptation(run: Run, net: Network, photos: Split) -> None:
    """figures/adaptation.png: predictions of photos and their entropy (black 0, white log C)."""
    images = photos.images[datasets.spaced(len(photos), 4)]  # uint8 [4,H,W,3]
    logits = common.predict(net.eval(), images, run.device)  # [4,C,H,W]
    entropy = (255 * self_information(logits).sum(dim=1)).byte()  # [4,H,W]
    columns = {"photo": list(images)}
    columns["prediction"] = list(logits.argmax(dim=1).byte().cpu().numpy())
    columns["entropy"] = list(entropy[..., None].expand(-1, -1, -1, 3).cpu().numpy())
    common.draw_sheet(run.out / "figures/adaptation.png", columns, run.classes)


if __name__ == "__main__":
    common.main(Args, run, __doc__)
