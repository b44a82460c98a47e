"""Adapts a segmentation network to unlabelled photos: alignment, image translation, self-training.

AdaptSegNet (arXiv:1802.10349v3), ADVENT (arXiv:1811.12833v2), FDA (arXiv:2004.05498v1), ClassMix
(arXiv:2007.07936v2) and DACS (arXiv:2007.08702v2), each a switch, alone and together:

    python adversarial_da.py                                                    (colour transfer)

    python adversarial_da.py --self-train                      (colour transfer, then self-training)

    python adversarial_da.py --align output --translate none --statistics target      (AdaptSegNet)

    python adversarial_da.py --align entropy --translate none --statistics target          (ADVENT)

    python adversarial_da.py --translate fda                                        (FDA, one band)

    python adversarial_da.py --translate fda --bands 0.01 0.05 0.09 --self-train  (FDA, three bands)

    python adversarial_da.py --translate none --statistics target                           (AdaBN)

The first takes half a minute on one CPU core and ends at 65 mIoU on the miniature, source-only at
44; the others take up to a minute and a half. AdaptSegNet and ADVENT run with batch statistics of
its own for either domain, so the last one, AdaBN, tells what of their gain is the discriminator's.
On real photos (CamVid, the source the miniature's GTA5) the first reaches 27.6, source-only 22.0.

All stages together take --steps updates of the segmentation network: training on the
(translated) source, then alignment, then self-training; in the last two each update sees a batch
of photos beside the one of the source. No label of a photo is used.

A discriminator that wins or loses outright shows in scalars.json: critic_source and critic_target
are the shares of its right verdicts, both near 1 where it wins, near 0.5 where it cannot tell.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import common
from common import Batches, Network, Part, Result, Run, UserError


@dataclass(frozen=True)
class Args(common.Args):
    align: Literal["output", "entropy", "none"] = "none"
    """What a discriminator compares between source and target: softmax maps (output, AdaptSegNet),
    weighted self-information maps (entropy, ADVENT), nothing."""
    translate: Literal["fda", "color", "none"] = "color"
    """How source images get the look of a random photo: mean and covariance of RGB (color), the
    amplitude of low frequencies (fda), not at all."""
    self_train: bool = False
    """A last stage on the confident labels that an averaged network gives the photos."""
    statistics: Literal["joint", "separate", "target"] = "separate"
    """Batch normalisation of the two domains: over the union of their batches (joint), of each by
    its own (separate), and that with the photos' in the final network (target, AdaBN)."""
    align_share: float = 0.75
    """Share of the steps before self-training that are aligned; the first ones never are."""
    self_train_share: float = 0.75
    """Share of --steps with self-training, at the end."""
    gan: Literal["vanilla", "least_squares"] = "vanilla"
    """Loss of the discriminator and of those who fool it."""
    adv_weight: float = 0.01
    """lambda_adv of the logits. AdaptSegNet and ADVENT: 0.001 at SGD, 0.01 for least_squares."""
    adv_weight_aux: float = 0.002
    """lambda_adv of the first auxiliary head, where the network has one. AdaptSegNet: 0.0002."""
    entropy_weight: float = 0.0
    """lambda_ent, direct minimisation of the photos' entropy in the alignment stage, with any
    --align but none. ADVENT's MinEnt: 0.001, and alone with --adv-weight 0."""
    critic_lr: float = 1e-3
    """Learning rate of the discriminator's Adam. The papers: 1e-4, for 250,000 steps."""
    critic_width: int = 16
    """Channels of the discriminator's first convolution. The papers: 64, which takes half of a step
    of the tiny network."""
    bands: tuple[float, ...] = (0.03,)
    """FDA's beta: half a side of the exchanged band, in cycles/px. The paper: 0.01, 0.05, 0.09.
    Several: a network each in the first stage, of equal shares of its steps, whose predictions are
    averaged into labels for self-training."""
    confidence: float = 0.8
    """Least probability of a label for self-training. FDA: 0.9; DACS: 0.968."""
    ema: float = 0.99
    """Decay of the teacher's weights at each step. DACS: 0.99; DAFormer: 0.999."""
    augment: bool = False
    """Self-training: mixed images blurred, colour-jittered or RGB-shifted at random. DACS: yes."""


# ---- Image translation --------------------------------------------------------------------------
def translator(args: Args, part: Part, beta: float) -> Callable[[Tensor, torch.Generator], Tensor]:
    """An augmentation that gives each source image the look of a random photo of `part`."""
    if args.translate == "none":
        return common.original

    def translate(images: Tensor, rng: torch.Generator) -> Tensor:
        index = torch.randint(len(part), (len(images),), generator=rng).numpy()
        style = common.to_tensor(part.images[index], images.device)
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 has no eigenvectors
            if args.translate == "color":
                return common.color_transfer(images, style).clamp(0, 1)
            return common.fourier_transfer(images, style, beta).clamp(0, 1)

    return translate


# ---- Alignment ----------------------------------------------------------------------------------
def self_information(logits: Tensor) -> Tensor:
    """-p log p of each class and pixel (ADVENT, sec. 3.2). [B,C,H,W] -> [B,C,H,W].

    In units of log C, so that the sum over classes, the pixel's entropy, is in [0, 1].
    """
    log_p = logits.log_softmax(dim=1)
    return -log_p.exp() * log_p / math.log(logits.shape[1])


def view(logits: Tensor, align: str) -> Tensor:
    """What the discriminator sees of logits. [B,C,H,W] -> [B,C,H,W]."""
    return self_information(logits) if align == "entropy" else logits.softmax(dim=1)


class Critic(nn.Sequential):
    """Fully convolutional discriminator (AdaptSegNet): positive where it sees source.

    [B,C,H,W] -> [B,1,H/32,W/32]. It has no batch normalisation, so it may see the two domains in
    turn without one leaking into the other.
    """

    def __init__(self, channels: int, width: int) -> None:
        layers, i = [], channels
        for o in (width, 2 * width, 4 * width, 8 * width):
            layers += [nn.Conv2d(i, o, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
            i = o
        super().__init__(*layers, nn.Conv2d(i, 1, 4, 2, 1))


def verdict_loss(verdict: Tensor, source: bool, gan: str) -> Tensor:
    """Loss of a verdict that should say source, or target. [B,1,h,w] -> scalar.

    vanilla: cross-entropy in nats (AdaptSegNet). least_squares: squared distance to 1 or 0
    (arXiv:1611.04076v3).
    """
    wanted = torch.full_like(verdict, float(source))
    if gan == "vanilla":
        return F.binary_cross_entropy_with_logits(verdict, wanted)
    return F.mse_loss(verdict, wanted)


def fooling_loss(critics: nn.ModuleList, outputs: list[Tensor], args: Args) -> Tensor:
    """The target's maps should pass for source (AdaptSegNet), at every level.

    outputs: logits [B,C,H,W] of each level. Its gradient reaches no weight of a discriminator.
    """
    critics.requires_grad_(False)
    weights = (args.adv_weight, args.adv_weight_aux)
    losses = [
        weight * verdict_loss(critic(view(output, args.align)), True, args.gan)
        for weight, critic, output in zip(weights, critics, outputs, strict=False)
    ]
    critics.requires_grad_(True)
    return sum(losses)


def critic_losses(
    critics: nn.ModuleList, source: list[Tensor], target: list[Tensor], args: Args
) -> tuple[Tensor, dict[str, Tensor]]:
    """The discriminators' loss (AdaptSegNet), and their shares of right verdicts on both domains.

    source, target: logits [B,C,H,W] of each level, detached here. -> scalar, scalars by name.
    """
    loss, right = 0.0, {}
    middle = 0.0 if args.gan == "vanilla" else 0.5
    for k, critic in enumerate(critics):
        for domain, outputs in (("source", source), ("target", target)):
            is_source = domain == "source"
            verdict = critic(view(outputs[k].detach(), args.align))
            loss = loss + verdict_loss(verdict, is_source, args.gan) / 2
            name = f"critic_{domain}" if k == 0 else f"critic_{domain}_aux"
            right[name] = ((verdict.detach() > middle) == is_source).float().mean()
    return loss, right


def two_domains(
    net: Network, source: Tensor, target: Tensor, statistics: str
) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of both domains, in one pass or in two, for --statistics.

    [B,3,H,W] twice -> [B,C,H,W] of every head, twice.
    """
    if statistics != "joint":
        return net(source, aux=True), net(target, aux=True)
    outputs = net(torch.cat([source, target]), aux=True)
    halves = [output.split([len(source), len(target)]) for output in outputs]
    return [half[0] for half in halves], [half[1] for half in halves]


def align(run: Run, net: Network, source: Part, photos: Part, steps: int) -> None:
    """The alignment stage: supervised on the source, adversarial on the photos."""
    args, device = run.args, run.device
    batches = Batches(source, args.batch_size, args.seed, device)
    targets = Batches(photos, args.batch_size, args.seed + 1, device)
    translate = translator(args, photos, args.bands[0])
    net.eval()  # so that looking changes no running statistics
    with torch.no_grad():
        levels = len(net(torch.zeros(2, 3, *args.size, device=device), aux=True)[:2])
    critics = nn.ModuleList(Critic(len(run.classes), args.critic_width) for _ in range(levels))
    critics.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    critic_optimizer = torch.optim.Adam(
        critics.parameters(), lr=args.critic_lr, betas=(0.9, 0.99), fused=True
    )
    state = {"critics": critics, "optimizer": optimizer, "critic_optimizer": critic_optimizer}
    net.train()
    for step in run.steps("align", steps, net=net, **state):
        rng = common.generator(args.seed, step, 1)
        lr = common.set_rate(optimizer, args.lr, step, steps)
        common.set_rate(critic_optimizer, args.critic_lr, step, steps)
        batch = batches(step)
        images, labels = common.crop_flip(translate(batch.images, rng), batch.labels, rng)
        x, _ = common.crop_flip(targets(step).images, None, rng)  # [B,3,H,W]
        # The segmentation network.
        with run.autocast():
            on_source, on_target = two_domains(net, images, x, args.statistics)
            loss = common.segmentation_loss(on_source, labels)
            fool = fooling_loss(critics, on_target, args)
            entropy = self_information(on_target[0]).sum(dim=1).mean()  # ADVENT's MinEnt
        optimizer.zero_grad()
        (loss + fool + args.entropy_weight * entropy).backward()
        optimizer.step()
        # The discriminators.
        with run.autocast():
            critic_loss, right = critic_losses(critics, on_source, on_target, args)
        critic_optimizer.zero_grad()
        critic_loss.backward()
        critic_optimizer.step()
        scalars = {"fooling_loss": fool, "entropy": entropy, "critic_loss": critic_loss, **right}
        run.log(step, loss=loss, lr=lr, **scalars)
        if step % max(1, steps // 4) == 0 and step < steps:
            run.evaluate(net, step)


# ---- Self-training ------------------------------------------------------------------------------
def class_mask(labels: Tensor, num_classes: int, rng: torch.Generator) -> Tensor:
    """Where a random half of the classes of each label map lies (ClassMix).

    labels [B,H,W] -> bool [B,H,W]; of n classes (n + 1) // 2 are drawn; ignored pixels never are.
    """
    batch, c = len(labels), num_classes
    places = labels.clamp(max=c).flatten(1)  # [B,HW], c where ignored
    present = torch.zeros(batch, c + 1, device=labels.device).scatter(1, places, 1.0)[:, :c] > 0
    draw = common.send(torch.rand(batch, c, generator=rng), labels.device)
    rank = torch.where(present, draw, -1.0).argsort(dim=1, descending=True).argsort(dim=1)
    chosen = present & (rank < (present.sum(dim=1, keepdim=True) + 1) // 2)  # [B,C]
    return F.pad(chosen, (0, 1)).gather(1, places).view_as(labels)  # and no ignored pixel


@torch.no_grad()
def pseudo_labels(teachers: list[Network], images: Tensor, confidence: float) -> Tensor:
    """The likeliest class by the teachers' mean probability (FDA), IGNORE below `confidence`.

    images [B,3,H,W] -> labels [B,H,W].
    """
    p = torch.stack([teacher(images).softmax(dim=1) for teacher in teachers]).mean(dim=0)
    best, labels = p.max(dim=1)
    return torch.where(best >= confidence, labels, common.IGNORE)


def self_train(
    run: Run, net: Network, others: list[Network], source: Part, photos: Part, steps: int
) -> None:
    """The last stage (DACS): photos with labels of the teacher and source classes pasted.

    `others`: further teachers, of other bands, which stay as they are. Ends with the teacher's
    weights in `net`.
    """
    args, device = run.args, run.device
    batches = Batches(source, args.batch_size, args.seed + 2, device)
    targets = Batches(photos, args.batch_size, args.seed + 3, device)
    translate = translator(args, photos, args.bands[0])
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, weight_decay=0.01, fused=True)
    teacher = copy.deepcopy(net).requires_grad_(False)
    # It sees photos alone: by its batches' statistics, or by those that it has kept.
    teacher.train(args.statistics == "target")
    net.train()
    for step in run.steps("self_train", steps, net=net, teacher=teacher, optimizer=optimizer):
        rng = common.generator(args.seed, step, 2)
        lr = common.set_rate(optimizer, args.lr, step, steps)
        batch = batches(step)
        images, labels = common.crop_flip(translate(batch.images, rng), batch.labels, rng)
        x, _ = common.crop_flip(targets(step).images, None, rng)  # [B,3,H,W]
        with run.autocast():
            guess = pseudo_labels([teacher, *others], x, args.confidence)
        mask = class_mask(labels, len(run.classes), rng)
        mixed = torch.where(mask[:, None], images, x)
        mixed_labels = torch.where(mask, labels, guess)
        if args.augment:
            mixed = common.random_augmentation(mixed, rng)
        with run.autocast():
            on_source, on_mixed = two_domains(net, images, mixed, args.statistics)
            source_loss = common.segmentation_loss(on_source, labels)
            mixed_loss = common.segmentation_loss(on_mixed, mixed_labels)
        # DACS: the mixed images count by their share of confident labels.
        share = (guess != common.IGNORE).float().mean()
        loss = source_loss + share * mixed_loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        common.follow(teacher, net, min(args.ema, 1 - 1 / (step + 1)))
        run.log(step, loss=loss, lr=lr, mixed_loss=mixed_loss, confident=share)
        if step % max(1, steps // 4) == 0 and step < steps:
            run.evaluate(teacher, step)
    net.load_state_dict(teacher.state_dict())


# ---- The method ---------------------------------------------------------------------------------
@torch.no_grad()
def adapt_statistics(net: Network, photos: Part, device: torch.device, batch_size: int) -> None:
    """Batch normalisation's mean and variance, measured anew on photos (AdaBN, arXiv:1603.04779v4):
    the mean over batches of about `batch_size`, in the order of the files."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean
    training = net.training
    net.train()
    for index in np.array_split(np.arange(len(photos)), max(1, len(photos) // batch_size)):
        net(common.to_tensor(photos.images[index], device))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.train(training)


def run(args: Args) -> Result:
    bands = args.bands if args.translate == "fda" else args.bands[:1]
    for flag in ("align_share", "self_train_share"):
        if not 0 <= getattr(args, flag) <= 1:
            raise UserError(f"--{flag.replace('_', '-')}: expected a share from 0 to 1")
    if len(bands) > 1 and (args.checkpoint or not args.self_train):
        raise UserError("--bands: several need --self-train and no checkpoint in --init")
    run = Run(args, "adversarial_da")
    if run.result:
        return run.result
    args = run.args
    source, photos = common.load(args, "source"), common.load(args, "target_unlabelled")
    tuned = round(args.steps * args.self_train_share) if args.self_train else 0
    aligned = round((args.steps - tuned) * args.align_share) if args.align != "none" else 0
    first = args.steps - tuned - aligned
    if args.checkpoint and aligned + tuned:
        first = 0  # it has been trained

    net, *others = [run.network() for _ in bands]  # the first one is adapted, the others teach it
    for k, (one, beta) in enumerate(zip([net, *others], bands, strict=True)):
        steps = first * (k + 1) // len(bands) - first * k // len(bands)
        if steps:
            stage, translate = f"source{k or ''}", translator(args, photos, beta)
            common.train(run, one, source, steps, stage, translate=translate)
            if args.statistics == "target":
                adapt_statistics(one, photos, run.device, args.batch_size)
        one.eval()
    stages = {"before": copy.deepcopy(net), "after": net} if aligned + tuned else {"": net}
    if aligned:
        align(run, net, source, photos, aligned)
    if tuned:
        self_train(run, net, others, source, photos, tuned)
    if args.statistics == "target":
        adapt_statistics(net, photos, run.device, args.batch_size)
    draw_adaptation(run, stages, source, photos)
    beside = f"{aligned} discriminator updates" if aligned else ""
    return run.finish(net, target_labels=0, steps=first + aligned + tuned, beside=beside)


# ---- Figures ------------------------------------------------------------------------------------
def draw_adaptation(run: Run, stages: dict[str, Network], source: Part, photos: Part) -> None:
    """Two figures of unlabelled photos: figures/adaptation.png, with prediction and entropy (black
    0, white log C) after the first stage and, if others follow, at the end;
    figures/translation.png, source images, and their translations to the look of those photos."""
    device = run.device
    chosen = np.linspace(0, len(photos) - 1, min(4, len(photos))).round().astype(int)
    columns = {"photo": list(photos.images[chosen])}
    for name, net in stages.items():
        logits = common.predict(net.eval(), photos.images[chosen], device)
        entropy = (255 * self_information(logits).sum(dim=1)).byte().cpu().numpy()  # [B,H,W]
        columns[name or "prediction"] = list(logits.argmax(dim=1).byte().cpu().numpy())
        columns[f"entropy {name}".strip()] = [np.repeat(e[..., None], 3, axis=2) for e in entropy]
    common.draw_sheet(run.out / "figures/adaptation.png", columns, run.classes)

    places = np.linspace(0, len(source) - 1, len(chosen)).round().astype(int)
    pictures = source.images[places], photos.images[chosen]  # uint8 [4,H,W,3] each
    x, y = (common.to_tensor(p, device) for p in pictures)
    columns = {"source": list(pictures[0]), "photo": list(pictures[1])}
    translations = {"color": common.color_transfer(x, y)}
    for beta in sorted({0.01, 0.05, 0.09, *run.args.bands}):
        translations[f"fda {beta:g}"] = common.fourier_transfer(x, y, beta)
    for name, images in translations.items():
        columns[name] = list((255 * images.clamp(0, 1)).byte().permute(0, 2, 3, 1).cpu().numpy())
    common.draw_sheet(run.out / "figures/translation.png", columns, run.classes)


if __name__ == "__main__":
    common.main(Args, run, __doc__)
