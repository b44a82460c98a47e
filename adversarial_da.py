"""Adapts a segmentation network to unlabelled photos: alignment, image translation, self-training.

AdaptSegNet (arXiv:1802.10349v3), ADVENT (arXiv:1811.12833v2), FDA (arXiv:2004.05498v1), AdaBN
(arXiv:1603.04779v4) and DACS (arXiv:2007.08702v2), each a switch, alone and together. The source
are labelled synthetic images, the target are photos; their labels are never used:

    python adversarial_da.py                                                  (colour transfer)

    python adversarial_da.py --self-train                          (colour transfer, then DACS)

    python adversarial_da.py --translate none --statistics target                       (AdaBN)

    python adversarial_da.py --translate none --statistics target --align output  (AdaptSegNet)

The first takes half a minute on one CPU core and reaches 65 mIoU on the miniature; training on
the source alone reaches 44. The others take up to a minute and a half. `--translate fda` is FDA,
`--align entropy` is ADVENT. What the discriminator adds is the gain of the last command over AdaBN.

The --steps updates of the segmentation network are divided among up to three stages: training on
the translated source images, then alignment, then self-training. In the last two stages each
update sees a batch of source images and a batch of photos. With --init CHECKPOINT the first stage
and its steps are left out.

scalars.json has the discriminator's accuracy: near 1 it knows the domains, near 0.5 it guesses.
"""

import copy
import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import common
from common import Loader, Network, Result, Run, Split, UserError


@dataclass(frozen=True)
class Args(common.Args):
    align: Literal["output", "entropy", "none"] = "none"
    """What the discriminator compares: softmax maps (output, AdaptSegNet), weighted
    self-information maps (entropy, ADVENT), or nothing."""
    translate: Literal["fda", "color", "none"] = "color"
    """What source images get from a random photo: mean and covariance of RGB (color), the
    amplitude of low frequencies (fda), or nothing."""
    self_train: bool = False
    """Add a last stage, in which a student learns the pseudo-labels of its teacher (DACS)."""
    statistics: Literal["joint", "separate", "target"] = "separate"
    """Batch normalisation in the last two stages. joint: one forward pass for both domains.
    separate: one for each, with the statistics of its own batch; both update the same running
    statistics, so the tested network has a mixture. target: like separate, but at the end the
    running statistics are measured again on the photos (AdaBN)."""
    align_share: float = 0.75
    """Share of the steps before self-training that are aligned; those before are source-only."""
    self_train_share: float = 0.75
    """Share of --steps that is self-training, at the end."""
    lambda_adv: float = 0.01
    """Weight of the adversarial loss. AdaptSegNet and ADVENT: 0.001, with SGD."""
    lambda_adv_aux: float = 0.002
    """The same at the first auxiliary head, if the network has one. AdaptSegNet: 0.0002."""
    lambda_ent: float = 0.0
    """Weight of the photos' entropy while aligning. ADVENT's MinEnt: 0.001, with --lambda-adv 0
    and --lambda-adv-aux 0."""
    discriminator_lr: float = 1e-3
    """Initial learning rate of the discriminator's Adam. The papers: 1e-4, for 250,000 steps."""
    discriminator_width: int = 16
    """Channels of its first convolution. The papers: 64, too slow beside the tiny network."""
    beta: float = 0.03
    """FDA: frequencies below beta are exchanged, in cycles/px. The paper: 0.01, 0.05, 0.09."""
    confidence_threshold: float = 0.8
    """Least probability of a pseudo-label. FDA: 0.9; DACS: 0.968."""
    ema: float = 0.99
    """Decay of the teacher's weights at each step. DACS: 0.99; DAFormer: 0.999."""
    augment: bool = False
    """Self-training: blur, colour-jitter or RGB-shift the mixed images. DACS: yes."""


# ---- Image translation --------------------------------------------------------------------------
def fourier_transfer(source: Tensor, target: Tensor, beta: float) -> Tensor:
    """Source images with the target's amplitude at low frequencies (FDA, eq. 3).

    [B,3,H,W] twice -> [B,3,H,W], not clamped. beta: in cycles/px, for both axes.
    """
    h, w = source.shape[2:]
    spectrum, style = torch.fft.rfft2(source), torch.fft.rfft2(target)  # [B,3,H,W//2+1]
    # The band is symmetric about frequency 0 at even sizes too, so the image stays real.
    rows = torch.fft.fftfreq(h, device=source.device).abs() < beta
    columns = torch.fft.rfftfreq(w, device=source.device).abs() < beta
    band = rows[:, None] & columns  # M_beta, [H,W//2+1]
    amplitude = torch.where(band, style.abs(), spectrum.abs())
    return torch.fft.irfft2(torch.polar(amplitude, spectrum.angle()), s=(h, w))


def translate(images: Tensor, rng: torch.Generator, photos: Split, args: Args) -> Tensor:
    """Source images in the style of random photos. [B,3,H,W] -> [B,3,H,W] in [0,1]."""
    if args.translate == "none":
        return images
    style = common.random_images(photos, len(images), rng, images.device)  # [B,3,H,W]
    if args.translate == "color":
        return common.color_transfer(images, style).clamp(0, 1)
    return fourier_transfer(images, style, args.beta).clamp(0, 1)


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


def adversarial_loss(discriminators: nn.ModuleList, target: list[Tensor], args: Args) -> Tensor:
    """Small where the discriminators take photos for source images (AdaptSegNet, eq. 4 and 5).

    target: logits [B,C,H,W] of every head -> scalar.
    """
    weights, loss = (args.lambda_adv, args.lambda_adv_aux), 0.0
    for weight, discriminator, logits in zip(weights, discriminators, target, strict=False):
        scores = discriminator(compared(logits, args.align))
        loss = loss + weight * bce_loss(scores, is_source=True)
    return loss


def discriminator_loss(
    discriminators: list[nn.Module], source: list[Tensor], target: list[Tensor], align: str
) -> tuple[Tensor, Tensor]:
    """AdaptSegNet, eq. 2, and the accuracy of the first discriminator.

    source, target: logits [B,C,H,W] of every head -> two scalars.
    """
    loss, accuracies = 0.0, []
    for discriminator, *logits in zip(discriminators, source, target, strict=False):
        # Detached: this loss trains the discriminator alone.
        maps = compared(torch.cat(logits).detach(), align)  # [2B,C,H,W]
        on_source, on_target = discriminator(maps).chunk(2)  # [B,1,h,w] each
        loss_source = bce_loss(on_source, is_source=True)
        loss_target = bce_loss(on_target, is_source=False)
        loss = loss + (loss_source + loss_target) / 2
        accuracies.append(torch.cat([on_source > 0, on_target <= 0]).float().mean())
    return loss, accuracies[0]


def forward_both(
    model: nn.Module, source: Tensor, target: Tensor, statistics: str
) -> tuple[list[Tensor], list[Tensor]]:
    """One forward pass for both domains, or two, see --statistics.

    images [B,3,H,W] of each domain -> logits [B,C,H,W] of every head, for each domain.
    """
    if statistics != "joint":
        return model(source, aux=True), model(target, aux=True)
    outputs = model(torch.cat([source, target]), aux=True)  # [2B,C,H,W] each
    return [o[: len(source)] for o in outputs], [o[len(source) :] for o in outputs]


def align(run: Run, net: Network, source: Split, photos: Split, steps: int) -> None:
    """The alignment stage: supervised on source images, adversarial on photos."""
    args, seed = run.args, run.args.seed
    source_loader = Loader(source, args.batch_size, run.device, seed, "align", "source")
    target_loader = Loader(photos, args.batch_size, run.device, seed, "align", "target")
    torch.manual_seed(common.seed_of(seed, "discriminators"))
    # The second one is for the first auxiliary head, in networks that have one.
    channels, width = len(run.classes), args.discriminator_width
    discriminators = nn.ModuleList(Discriminator(channels, width) for _ in range(2))
    discriminators.to(run.device, memory_format=torch.channels_last)
    model, models_d = common.parallel(net), [common.parallel(d) for d in discriminators]
    optimizer = common.make_optimizer(net, args.lr)
    optimizer_d = torch.optim.Adam(discriminators.parameters(), betas=(0.9, 0.99), fused=True)
    state = {"discriminators": discriminators, "optimizer_d": optimizer_d}
    net.train()
    for step in run.steps("align", steps, net=net, optimizer=optimizer, **state):
        rng = common.generator(seed, "align", step)
        lr = common.learning_rate(args.lr, step, steps)
        common.set_lr(optimizer, lr)
        common.set_lr(optimizer_d, common.learning_rate(args.discriminator_lr, step, steps))
        x, y = source_loader(step)  # [B,3,H,W], [B,H,W]
        x = translate(x, rng, photos, args)
        x, y = common.crop_flip(x, y, rng)
        x_target, _ = target_loader(step)  # [B,3,H,W]
        x_target, _ = common.crop_flip(x_target, None, rng)

        # Step 1: the segmentation network
        discriminators.requires_grad_(False)  # this loss trains the network alone
        with run.autocast():
            on_source, on_target = forward_both(model, x, x_target, args.statistics)
            loss = common.segmentation_loss(on_source, y)
            loss_adv = adversarial_loss(discriminators, on_target, args)
            entropy = self_information(on_target[0]).sum(dim=1).mean()  # ADVENT, eq. 3
        optimizer.zero_grad()
        (loss + loss_adv + args.lambda_ent * entropy).backward()
        optimizer.step()

        # Step 2: the discriminators
        discriminators.requires_grad_(True)
        with run.autocast():
            loss_d, accuracy = discriminator_loss(models_d, on_source, on_target, args.align)
        optimizer_d.zero_grad()
        loss_d.backward()
        optimizer_d.step()

        scalars = {"adversarial_loss": loss_adv, "discriminator_loss": loss_d}
        scalars |= {"discriminator_accuracy": accuracy, "entropy": entropy}
        run.log(step, loss=loss, lr=lr, **scalars)
        if common.is_quarter(step, steps):
            run.evaluate(net, step)


# ---- Self-training ------------------------------------------------------------------------------
@torch.no_grad()
def pseudo_labels(teacher: nn.Module, images: Tensor, threshold: float) -> Tensor:
    """The likeliest class, IGNORE below the confidence threshold. [B,3,H,W] -> [B,H,W]."""
    confidence, labels = teacher(images).softmax(dim=1).max(dim=1)  # [B,H,W] each
    return torch.where(confidence >= threshold, labels, common.IGNORE)


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


def self_train(run: Run, net: Network, source: Split, photos: Split, steps: int) -> None:
    """The self-training stage (DACS, algorithm 1). At its end `net` gets the teacher's weights."""
    args, seed = run.args, run.args.seed
    source_loader = Loader(source, args.batch_size, run.device, seed, "self_train", "source")
    target_loader = Loader(photos, args.batch_size, run.device, seed, "self_train", "target")
    teacher = copy.deepcopy(net).requires_grad_(False)
    # It sees photos alone. With AdaBN it normalises them by the statistics of their batch.
    teacher.train(args.statistics == "target")
    model, optimizer = common.parallel(net), common.make_optimizer(net, args.lr)
    net.train()
    for step in run.steps("self_train", steps, net=net, teacher=teacher, optimizer=optimizer):
        rng = common.generator(seed, "self_train", step)
        lr = common.learning_rate(args.lr, step, steps)
        common.set_lr(optimizer, lr)
        x, y = source_loader(step)  # [B,3,H,W], [B,H,W]
        x = translate(x, rng, photos, args)
        x, y = common.crop_flip(x, y, rng)
        x_target, _ = target_loader(step)  # [B,3,H,W]
        x_target, _ = common.crop_flip(x_target, None, rng)

        # Step 1: pseudo-labels, and half of the source's classes pasted into the photos
        with run.autocast():
            y_target = pseudo_labels(teacher, x_target, args.confidence_threshold)
        mask = class_mix_mask(y, len(run.classes), rng)  # [B,H,W]
        x_mixed = torch.where(mask[:, None], x, x_target)
        y_mixed = torch.where(mask, y, y_target)
        if args.augment:
            x_mixed = common.random_augmentation(x_mixed, rng)

        # Step 2: the student. Unlike DACS, pseudo-labels that are not confident are left out.
        confident = common.mean_over_processes((y_target != common.IGNORE).float().mean())
        with run.autocast():
            on_source, on_mixed = forward_both(model, x, x_mixed, args.statistics)
            source_loss = common.segmentation_loss(on_source, y)
            mixed_loss = common.segmentation_loss(on_mixed, y_mixed)
            loss = source_loss + confident * mixed_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

        # Step 3: the teacher, in the first steps the plain mean of all students
        common.update_ema(teacher, net, min(args.ema, 1 - 1 / (step + 1)))

        run.log(step, loss=loss, lr=lr, mixed_loss=mixed_loss, confident=confident)
        if common.is_quarter(step, steps):
            run.evaluate(teacher, step)
    net.load_state_dict(teacher.state_dict())


# ---- The method ---------------------------------------------------------------------------------
def adapt_statistics(net: Network, photos: Split, batch_size: int, device: torch.device) -> None:
    """AdaBN: running statistics are reset, then averaged over batches of all photos."""
    batches = np.array_split(np.arange(len(photos)), max(1, len(photos) // batch_size))
    update_bn((common.to_tensor(photos.images[batch], device) for batch in batches), net)


def check(args: Args) -> None:
    """UserError for a flag without an effect, or out of range."""
    aligning = ("lambda_adv", "lambda_adv_aux", "lambda_ent", "discriminator_lr")
    aligning += ("discriminator_width", "align_share")
    self_training = ("self_train_share", "confidence_threshold", "ema", "augment")
    needs = dict.fromkeys(aligning, ("--align", args.align != "none"))
    needs |= dict.fromkeys(self_training, ("--self-train", args.self_train))
    needs["beta"] = ("--translate fda", args.translate == "fda")
    for name, (switch, is_on) in needs.items():
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if not is_on and value != getattr(Args, name):
            raise UserError(f"{flag}: has no effect without {switch}")
        if name in ("align_share", *self_training) and not 0 <= value <= 1:
            raise UserError(f"{flag} {value}: expected a number from 0 to 1")


def run(args: Args) -> Result:
    check(args)
    adapts = args.align != "none" or args.self_train
    trained = adapts and args.checkpoint is not None  # --init replaces the first stage
    stages = (not trained) + (args.align != "none") + args.self_train
    run = Run(args, "adversarial_da", stages)
    if run.result:
        return run.result
    args, net = run.args, run.network()
    source, photos = common.load(args, "source"), common.load(args, "target_unlabelled")
    self_train_steps = round(args.steps * args.self_train_share) if args.self_train else 0
    steps = args.steps - self_train_steps
    align_steps = round(steps * args.align_share) if args.align != "none" else 0
    source_steps = 0 if trained else steps - align_steps

    if not trained:
        style = functools.partial(translate, photos=photos, args=args)
        common.train(run, net, source, source_steps, "source", translate=style)
        if args.statistics == "target":
            adapt_statistics(net, photos, args.batch_size, run.device)
    before = copy.deepcopy(net)
    if args.align != "none":
        align(run, net, source, photos, align_steps)
    if args.self_train:
        self_train(run, net, source, photos, self_train_steps)
    if adapts and args.statistics == "target":
        adapt_statistics(net, photos, args.batch_size, run.device)
    if common.rank() == 0:
        draw_adaptation(run, {"before": before, "after": net} if adapts else {"": net}, photos)
    updates = f"{align_steps} discriminator updates" if align_steps else ""
    steps = source_steps + align_steps + self_train_steps
    return run.finish(net, target_labels=0, steps=steps, other_updates=updates)


def draw_adaptation(run: Run, networks: dict[str, Network], photos: Split) -> None:
    """figures/adaptation.png: predictions of photos and their entropy (black 0, white log C)."""
    images = photos.images[common.spaced(len(photos), 4)]  # uint8 [4,H,W,3]
    columns = {"photo": list(images)}
    for name, net in networks.items():
        logits = common.predict(net.eval(), images, run.device)  # [4,C,H,W]
        entropy = (255 * self_information(logits).sum(dim=1)).byte()  # [4,H,W]
        columns[f"prediction {name}"] = list(logits.argmax(dim=1).byte().cpu().numpy())
        columns[f"entropy {name}"] = list(entropy[..., None].expand(-1, -1, -1, 3).cpu().numpy())
    common.draw_sheet(run.out / "figures/adaptation.png", columns, run.classes)


if __name__ == "__main__":
    common.main(Args, run, __doc__)
