"""Adapts a segmentation network to unlabelled photos: translation, alignment, self-training.

Parts of DACS (arXiv:2007.08702v2), AdaptSegNet (arXiv:1802.10349v3), ADVENT (arXiv:1811.12833v2),
FDA (arXiv:2004.05498v1) and AdaBN (arXiv:1603.04779v4). Flags choose and combine them. The source
is labelled synthetic images, the target is photos. No label of a photo is used in training.

    python adversarial_da.py                          (colour transfer + DACS)

    python adversarial_da.py --no-self-train --align output
                                                      (colour transfer + AdaptSegNet)

    python adversarial_da.py --no-self-train --translate none --statistics target      (AdaBN)

The first takes 2 to 5 minutes on one CPU core and reaches 56 mIoU on the miniature (the default
data); colour transfer alone reaches 53. There is no discriminator by default. `--align entropy`
aligns as ADVENT does, `--translate fda` translates as FDA does. To measure the effect of a
discriminator, compare with the same command and `--lambda-adv 0`.

The network is trained for --steps updates, with one learning-rate schedule. The first updates (the
share --source-share) use translated source images alone. Then adaptation starts: each update uses a
batch of source images and a batch of photos. With --align, an update of the discriminator follows,
by its own optimizer. A network that is given with --init CHECKPOINT has been trained on the source
already: if there is any adaptation (--self-train, --align or --lambda-ent), the first updates are
left out, and the schedule is that of the rest.

With --align, scalars.json has the accuracy of the discriminator. Near 1, it tells source from
target; near 0.5, it cannot.
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
    """How source images are translated. color: each gets the mean and covariance of RGB of a
    random photo. fda: it gets the photo's amplitudes of low frequencies. none: unchanged."""
    align: Literal["output", "entropy", "none"] = "none"
    """Input of the discriminator. output: softmax maps p (AdaptSegNet). entropy: self-information
    maps -p log p (ADVENT). none: there is no discriminator."""
    self_train: bool = True
    """DACS: a teacher predicts the pseudo-labels of photos, half of the classes of source images
    are pasted into the photos, and the network learns from these mixed images."""
    statistics: Literal["mixture", "target"] = "mixture"
    """Statistics of batch normalisation that are used in tests. mixture: running averages over the
    batches of training: source images, mixed images with --self-train, and photos with
    --align or --lambda-ent. target: computed again at the end, from the photos alone (AdaBN)."""
    source_share: float = 0.5
    """Share of --steps on source images alone, at the start."""
    lambda_adv: float = 0.01
    """Weight of the adversarial loss. In the papers' code, which trains with SGD: 0.001."""
    lambda_ent: float = 0.0
    """Weight of the entropy of predictions on photos. To get MinEnt (ADVENT): 0.001, with
    --no-self-train and --translate none."""
    discriminator_lr: float = 1e-3
    """Initial learning rate of the discriminator's Adam. It follows the schedule of --lr, so by
    default it has already decayed when the discriminator starts. The papers: 1e-4."""
    discriminator_width: int = 16
    """Channels after the discriminator's first convolution. The papers: 64, which is too slow for
    the tiny network."""
    beta: float = 0.03
    """FDA: the amplitudes of frequencies below beta, in cycles/px, are replaced by the photo's. The
    paper: 0.01, 0.05, 0.09."""
    confidence_threshold: float = 0.9
    """A pixel is confident if its largest probability is above this. Photo pixels are weighted by
    the share of confident pixels in their image. DACS: 0.968."""
    ema: float = 0.99
    """EMA decay of the teacher, the average of past weights. DACS: 0.99; DAFormer: 0.999."""


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
    """-p log p of each class and pixel (ADVENT, sec. 3.2). Logits [B,C,H,W] -> [B,C,H,W].

    Divided by log C, so that the sum over classes, the entropy (eq. 2), is in [0, 1].
    """
    log_p = logits.log_softmax(dim=1)
    return -log_p.exp() * log_p / math.log(logits.shape[1])


def discriminator_input(logits: Tensor, align: str) -> Tensor:
    """Softmax maps, or with --align entropy self-information maps. [B,C,H,W] -> [B,C,H,W]."""
    return self_information(logits) if align == "entropy" else logits.softmax(dim=1)


def bce_loss(scores: Tensor, is_source: bool) -> Tensor:
    """Binary cross-entropy of scores that should all say source, or all say target.

    [B,1,h,w] -> scalar in nats: the mean over scores, as in the papers' code, where the equations
    have the sum.
    """
    return F.binary_cross_entropy_with_logits(scores, torch.full_like(scores, float(is_source)))


def adversarial_loss(discriminator: nn.Module, target_logits: Tensor, align: str) -> Tensor:
    """Low if the discriminator mistakes predictions on photos for predictions on source images.

    This loss trains the segmentation network. Logits [B,C,H,W] -> scalar in nats.
    """
    scores = discriminator(discriminator_input(target_logits, align))  # [B,1,h,w]
    return bce_loss(scores, is_source=True)  # AdaptSegNet, eq. 4, but a mean in place of the sum


def discriminator_loss(
    discriminator: nn.Module, source_logits: Tensor, target_logits: Tensor, align: str
) -> tuple[Tensor, Tensor]:
    """Low if the discriminator tells source from target. This loss trains the discriminator.

    Logits [B,C,H,W] twice -> the loss, scalar in nats; the accuracy, scalar in [0, 1].
    """
    # Detached: this loss must not train the segmentation network.
    logits = torch.cat([source_logits, target_logits]).detach()  # [2B,C,H,W]
    scores = discriminator(discriminator_input(logits, align))  # [2B,1,h,w]
    source_scores, target_scores = scores.chunk(2)  # [B,1,h,w] each
    # AdaptSegNet, eq. 2, but a mean in place of the sum.
    loss = (bce_loss(source_scores, is_source=True) + bce_loss(target_scores, is_source=False)) / 2
    return loss, torch.cat([source_scores > 0, target_scores <= 0]).float().mean()


# ---- Self-training ------------------------------------------------------------------------------
@torch.no_grad()
def pseudo_labels(teacher: nn.Module, images: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The most probable class of each pixel, and the share of confident pixels in each image.

    images [B,3,H,W] -> labels [B,H,W], shares [B]. Confident: the probability is above threshold.
    """
    confidence, labels = teacher(images).softmax(dim=1).max(dim=1)  # [B,H,W] each
    return labels, (confidence > threshold).float().mean(dim=(1, 2))


def class_mix_mask(labels: Tensor, num_classes: int, rng: torch.Generator) -> Tensor:
    """Draws half of the classes of each image at random and marks their pixels.

    ClassMix, arXiv:2007.07936v2: of the n classes in an image, (n + 1) // 2 are drawn. Ignored
    pixels are never marked. labels [B,H,W] -> bool [B,H,W].
    """
    present = [(labels == c).flatten(1).any(dim=1) for c in range(num_classes)]
    present = torch.stack(present, dim=1)  # [B,C] whether the image has the class
    numbers = common.to_device(common.draw(rng, len(labels), num_classes), labels.device)
    # Classes in random order. Those that the image lacks have the number -1, so they come last.
    order = torch.where(present, numbers, -1.0).argsort(dim=1, descending=True)
    rank = order.argsort(dim=1)  # [B,C] place of each class in this order
    drawn = present & (rank < (present.sum(dim=1, keepdim=True) + 1) // 2)  # [B,C]
    drawn = F.pad(drawn, (0, 1))  # [B,C+1]: ignored pixels are one more class, never drawn
    return drawn.gather(1, labels.clamp(max=num_classes).flatten(1)).view_as(labels)


def mixed_loss(logits: Tensor, labels: Tensor, pasted: Tensor, shares: Tensor) -> Tensor:
    """Cross-entropy of mixed images, the mean over all pixels, in nats.

    Pasted source pixels have weight 1, photo pixels the share of confident pixels in their own
    image (in the code of DACS: in the batch).
    logits [B,C,H,W], labels [B,H,W], pasted: bool [B,H,W], shares [B] -> scalar.
    """
    losses = F.cross_entropy(logits, labels, ignore_index=datasets.IGNORE, reduction="none")
    return (torch.where(pasted, 1.0, shares[:, None, None]) * losses).mean()


# ---- The method ---------------------------------------------------------------------------------
def adapt_statistics(net: Network, photos: Split, batch_size: int, device: torch.device) -> None:
    """AdaBN: resets the running statistics, then averages them over batches of all photos."""
    batches = np.array_split(np.arange(len(photos)), max(1, len(photos) // batch_size))
    update_bn((common.to_tensor(photos.images[batch], device) for batch in batches), net)


def check(args: Args) -> None:
    """Raises UserError if a flag has no effect or is out of range."""
    adaptation = "--align, --self-train or --lambda-ent"
    enabled = {"--align": args.align != "none", "--self-train": args.self_train}
    enabled[adaptation] = any(enabled.values()) or args.lambda_ent != 0
    enabled["--translate fda"] = args.translate == "fda"
    needs = dict.fromkeys(("lambda_adv", "discriminator_lr", "discriminator_width"), "--align")
    needs |= {"confidence_threshold": "--self-train", "ema": "--self-train"}
    needs |= {"beta": "--translate fda", "source_share": adaptation}
    for name, flag in needs.items():
        if not enabled[flag] and getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name.replace('_', '-')}: has no effect without {flag}")
    for name in ("source_share", "confidence_threshold", "ema"):
        if not 0 <= getattr(args, name) <= 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a number from 0 to 1")
    for name in ("lambda_adv", "lambda_ent", "beta"):
        if not getattr(args, name) >= 0:  # NaN is refused, too
            raise UserError(f"--{name.replace('_', '-')}: expected a number from 0")
    if args.discriminator_width < 1:
        raise UserError(f"--discriminator-width {args.discriminator_width}: expected 1 or more")
    if enabled[adaptation] and round(args.steps * args.source_share) >= args.steps:
        raise UserError(f"--source-share {args.source_share:g}: leaves no step for adaptation")


def run(args: Args) -> Result:
    """Trains the network on the source, then adapts it to the photos."""
    run = Run(args, "adversarial_da", stages=1)
    if run.result:
        return run.result
    args = run.args
    check(args)
    run.begin()
    net = run.network()
    source, photos = datasets.load(args, "source"), datasets.load(args, "target_unlabelled")
    adapts = args.align != "none" or args.self_train or args.lambda_ent > 0
    source_steps = round(args.steps * args.source_share) if adapts else args.steps
    # The network of a checkpoint has been trained on the source already.
    skipped_steps = source_steps if args.checkpoint and adapts else 0
    steps, source_steps = args.steps - skipped_steps, source_steps - skipped_steps
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
    """Trains `net` in place for `steps` updates. Adaptation starts after `source_steps` of them."""
    args, seed = run.args, run.args.seed
    translate = common.identity
    if args.translate == "color":
        translate = common.photo_style(photos, common.color_transfer)
    elif args.translate == "fda":
        transfer = partial(common.fourier_transfer, beta=args.beta)
        translate = common.photo_style(photos, transfer)
    source_loader = Loader(source, args.batch_size, run.device, seed, "source")
    target_loader = Loader(photos, args.batch_size, run.device, seed, "target")
    torch.manual_seed(common.seed_of(seed, "discriminator"))
    discriminator = Discriminator(len(run.classes), args.discriminator_width)
    discriminator.to(run.device, memory_format=torch.channels_last)
    # The teacher is in training mode, as in DACS: it normalises photos by their batch's statistics.
    teacher = copy.deepcopy(net).requires_grad_(False).train()
    for layer in teacher.modules():
        if isinstance(layer, nn.Dropout):  # DeepLabV3 has it; labels would be random
            layer.eval()
    model, model_d = common.parallel(net), common.parallel(discriminator)
    optimizer = common.make_optimizer(net, args.lr)
    optimizer_d = torch.optim.Adam(discriminator.parameters(), betas=(0.9, 0.99), fused=True)
    state = {"net": net, "optimizer": optimizer, "teacher": teacher}
    state |= {"discriminator": discriminator, "optimizer_d": optimizer_d}
    net.train()
    # "source" names the stage and seeds the batches, as in the baselines, so that all methods see
    # the same source images in the same order.
    for step in run.steps("source", steps, **state):
        rng = common.generator(seed, "source", step)
        lr = common.learning_rate(args.lr, step, steps)
        common.set_lr(optimizer, lr)
        common.set_lr(optimizer_d, common.learning_rate(args.discriminator_lr, step, steps))
        x, y = source_loader(step)  # [B,3,H,W], [B,H,W]
        x, y = common.crop_flip(translate(x, rng), y, rng)
        with run.autocast():
            source_outputs = model(x, aux=True)  # [B,C,H,W] of each head, the main head first
            source_loss = common.segmentation_loss(source_outputs, y)
        total, scalars, adapts = source_loss, {}, step > source_steps
        if adapts:
            x_target, _ = target_loader(step)  # [B,3,H,W]
            x_target, _ = common.crop_flip(x_target, None, rng)

        # Step 1: entropy and alignment. They train the network; the discriminator is frozen.
        if adapts and (args.align != "none" or args.lambda_ent > 0):
            with run.autocast():
                target_logits = model(x_target)  # [B,C,H,W]
                # ADVENT, eq. 3, but a mean over pixels in place of the sum.
                entropy = self_information(target_logits).sum(dim=1).mean()
                total = total + args.lambda_ent * entropy
            scalars["entropy"] = entropy
        if adapts and args.align != "none":
            discriminator.requires_grad_(False)
            with run.autocast():
                loss_adv = adversarial_loss(discriminator, target_logits, args.align)
                total = total + args.lambda_adv * loss_adv
            scalars["adversarial_loss"] = loss_adv

        # Step 2: self-training. Half of the classes of each source image are pasted into a photo.
        if adapts and args.self_train:
            with run.autocast():
                y_target, shares = pseudo_labels(teacher, x_target, args.confidence_threshold)
            pasted = class_mix_mask(y, len(run.classes), rng)  # [B,H,W]
            x_mixed = torch.where(pasted[:, None], x, x_target)  # [B,3,H,W]
            y_mixed = torch.where(pasted, y, y_target)  # [B,H,W]
            # The augmentation changes colour and sharpness alone, so the labels still fit.
            x_mixed = common.random_augmentation(x_mixed, rng)
            with run.autocast():
                loss_mixed = mixed_loss(model(x_mixed), y_mixed, pasted, shares)
                total = total + loss_mixed
            scalars |= {"mixed_loss": loss_mixed, "confident": shares.mean()}

        # Step 3: the segmentation network, then its teacher
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if args.self_train:
            # In the first steps the teacher is the plain mean of all weights so far.
            common.update_ema(teacher, net, min(args.ema, 1 - 1 / (step + 1)))

        # Step 4: the discriminator
        if adapts and args.align != "none":
            discriminator.requires_grad_(True)
            with run.autocast():
                loss_d, accuracy = discriminator_loss(
                    model_d, source_outputs[0], target_logits, args.align
                )
            optimizer_d.zero_grad()
            loss_d.backward()
            optimizer_d.step()
            scalars |= {"discriminator_loss": loss_d, "discriminator_accuracy": accuracy}

        run.log(step, loss=source_loss, lr=lr, **scalars)
        if common.is_quarter(step, steps):
            run.evaluate(net, step)


def draw_adaptation(run: Run, net: Network, photos: Split) -> None:
    """figures/adaptation.png: predictions on photos, and their entropy (black 0, white log C)."""
    images = photos.images[datasets.spaced(len(photos), 4)]  # uint8 [4,H,W,3]
    logits = common.predict(net.eval(), images, run.device)  # [4,C,H,W]
    entropy = (255 * self_information(logits).sum(dim=1)).byte()  # [4,H,W]
    columns = {"photo": list(images)}
    columns["prediction"] = list(logits.argmax(dim=1).byte().cpu().numpy())
    columns["entropy"] = list(entropy[..., None].expand(-1, -1, -1, 3).cpu().numpy())
    common.draw_sheet(run.out / "figures/adaptation.png", columns, run.classes)


if __name__ == "__main__":
    common.main(Args, run, __doc__)
