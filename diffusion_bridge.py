"""Translates synthetic images into the style of photos by diffusion; masks stay as they are.

One denoising U-Net learns both domains. An image is encoded into noise along the probability flow
of the source and decoded along that of the photos: DDIB (arXiv:2203.08382v4), with v-prediction and
the cosine schedule (arXiv:2202.00512v2). The commands, each with its own --help:

    python diffusion_bridge.py                      (the benchmark's row: fit, translate, train)

    python diffusion_bridge.py train --out runs/bridge               (writes runs/bridge/bridge.pt)

    python diffusion_bridge.py translate --input-dir A --mask-dir A/masks --output-dir B
    --checkpoint runs/bridge/bridge.pt                               (translates a folder)

The first takes about six minutes on one CPU core and reaches 65 mIoU on the miniature, where
training on the source alone reaches 44. No label of a photo is used. Every translated set is
checked: kernel distance to the photos, edges along the masks' borders, what a reader network sees.

Letters besides those of common.py: a cell is a patch of pixels, K its channels, h x w the cells of
an image, S the statistics of appearance. Noise levels are angles a from 0 (the image x) to pi/2
(the noise e): x_a = cos(a) x + sin(a) e.
"""

import copy
import hashlib
import json
import math
import shutil
import sys
import tomllib
import typing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common
from common import Network, Result, Run, Split, UserError

STATISTICS = ("brightness", "contrast", "saturation", "warmth", "haze")
SOURCE, TARGET = 0, 1  # the domain condition


@dataclass(frozen=True)
class Args(common.Args):
    bridge: Literal["ddib", "sdedit"] = "ddib"
    """ddib: encode along the flow of the source, decode along that of the target. sdedit, the
    control (arXiv:2108.01073): add noise once, then decode along the flow of the target."""
    strength: float = 0.97
    """Highest noise level, as a share of the way from the image to pure noise."""
    sample_steps: int | None = None
    """Evaluations of the U-Net to encode, and again to decode. Default: a tenth of --steps, at
    least 2 and at most 16."""
    min_agreement: float = 0.0
    """If the reader agrees with the labels on a smaller share of an image's pixels than this,
    training ignores the whole image."""
    unet_steps: int | None = None
    """Updates of the U-Net. Default: one and a half times --steps."""
    reader_steps: int | None = None
    """Updates of the reader, a small segmentation network that is trained on the source in the
    colours of photos. It labels the photos for the U-Net and checks results. Default: --steps."""
    reader_color: float = 0.5
    """Share of the reader's images that get the colours of a random photo."""
    width: int = 32
    """Channels of the U-Net at its finest level; twice and four times as many at the next two."""
    patch: Literal[2, 4, 8] = 2
    """Side in pixels of a cell, whose Haar coefficients are the channels that are diffused."""
    whiten: float = 0.5
    """Each channel is divided by its standard deviation to this power."""
    unet_lr: float = 2e-3
    """Initial learning rate of the U-Net's AdamW."""
    ema: float = 0.995
    """Decay of the averaged weights of the U-Net, which are the ones that translate."""
    label_confidence: float = 0.5
    """Least probability of the labels that the reader gives to photos."""

    def __post_init__(self) -> None:
        if not 0 < self.strength <= 1 or self.sample_steps == 0:
            raise UserError("--strength or --sample-steps: expected above 0, a strength up to 1")


@dataclass(frozen=True)
class TranslateArgs:
    input_dir: Path | None = None
    """Folder of images, with any folders in it."""
    mask_dir: Path | None = None
    """Folder of masks, of the same paths but for the suffix. Default: INPUT_DIR/masks."""
    output_dir: Path | None = None
    """Folder to write, with the same paths. The same command continues where it was cut off."""
    checkpoint: Path | None = None
    """bridge.pt of a training run."""
    config: Path | None = None
    """TOML or JSON file of these options; flags override it."""
    mask_labels: Literal["none", "vkitti2", "kitti", "gta5", "cityscapes"] = "none"
    """Whose ids or colours the masks have. none: the reader labels the images instead."""
    bridge: Literal["ddib", "sdedit"] = "ddib"
    """ddib encodes and decodes; sdedit adds noise once and decodes."""
    strength: float = 0.97
    """Highest noise level, as a share of the way from the image to pure noise."""
    sample_steps: int = 16
    """Evaluations of the U-Net to encode, and again to decode."""
    min_agreement: float = 0.0
    """Share of an image's pixels on which the reader's result for the translation must equal the
    mask, or, with --mask-labels none, its result before. Images below it are not written."""
    batch_size: int = 16
    """Images of equal size that are translated together."""
    seed: int = 0
    """Decides, with an image's path, which photo's statistics it gets, and the noise of sdedit."""


# ---- What is diffused, and its conditions -------------------------------------------------------
def hadamard(x: Tensor) -> Tensor:
    """For each group of four channels: twice their mean, and twice three signed means.

    Orthonormal and its own inverse. [B,4K,h,w] -> [B,4K,h,w].
    """
    a, b, c, d = x.unflatten(1, (-1, 4)).unbind(dim=2)  # [B,K,h,w] each
    bands = (a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d)
    return torch.stack(bands, dim=2).flatten(1, 2) / 2


def luminance(images: Tensor) -> Tensor:
    """[B,3,H,W] -> [B,H,W], Rec. 601."""
    return 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]


def appearance(images: Tensor) -> Tensor:
    """Statistics of appearance, in the order of STATISTICS. [B,3,H,W] in [0,1] -> [B,S].

    Haze is the mean of the dark channel: the least of the colours in a neighbourhood, which is
    near 0 in clear air (He et al., CVPR 2009), here over an eighth of the height.
    """
    luma, side = luminance(images), max(1, images.shape[2] // 8)
    darkest, brightest = images.amin(dim=1), images.amax(dim=1)  # [B,H,W]
    dark_channel = -F.max_pool2d(-darkest, side)
    values = (
        luma.mean(dim=(1, 2)),
        luma.std(dim=(1, 2)),
        (brightest - darkest).mean(dim=(1, 2)),
        (images[:, 0] - images[:, 2]).mean(dim=(1, 2)),
        dark_channel.mean(dim=(1, 2)),
    )
    return torch.stack(values, dim=1)


# ---- The U-Net ----------------------------------------------------------------------------------
def channel_norm(x: Tensor) -> Tensor:
    """Layer normalisation over the channels of each cell. A norm over the whole image would give
    other results in a tile than in the whole image."""
    return F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2]).permute(0, 3, 1, 2)


class ResidualBlock(nn.Module):
    """Two convolutions; the second normalisation is scaled and shifted by the embedding."""

    def __init__(self, i: int, o: int, embedding: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * o)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(F.silu(channel_norm(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv2(F.silu(channel_norm(y) * (1 + scale) + shift))
        return self.skip(x) + y


class UNet(nn.Module):
    """v = cos(a) e - sin(a) x from x_a, its angle, and conditions.

    x [B,K,h,w], maps [B,C,h,w] shares of the classes in a cell (all 0: not known), angle [B],
    domain [B] int64, statistics [B,S] -> [B,K,h,w]. h and w are multiples of 4.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        w1, w2, w3, e = width, 2 * width, 4 * width, 4 * width
        self.time = nn.Sequential(nn.Linear(16, e), nn.SiLU(), nn.Linear(e, e))
        self.domain, self.statistics = nn.Embedding(2, e), nn.Linear(len(STATISTICS), e)
        self.register_buffer("mean", torch.zeros(len(STATISTICS)))  # of the statistics
        self.register_buffer("std", torch.ones(len(STATISTICS)))
        self.enter = nn.Conv2d(channels + classes, w1, 3, padding=1)
        self.down1, self.to2 = ResidualBlock(w1, w1, e), nn.Conv2d(w1, w2, 3, 2, padding=1)
        self.down2, self.to3 = ResidualBlock(w2, w2, e), nn.Conv2d(w2, w3, 3, 2, padding=1)
        self.down3, self.middle = ResidualBlock(w3, w3, e), ResidualBlock(w3, w3, e)
        self.up2, self.up1 = ResidualBlock(w3 + w2, w2, e), ResidualBlock(w2 + w1, w1, e)
        self.leave = nn.Conv2d(w1, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(
        self, x: Tensor, maps: Tensor, angle: Tensor, domain: Tensor, statistics: Tensor
    ) -> Tensor:
        waves = angle[:, None] * 2.0 ** torch.arange(8, device=angle.device)  # [B,8]
        e = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        normalised = (statistics - self.mean) / self.std
        e = F.silu(e + self.domain(domain) + self.statistics(normalised))
        x1 = self.down1(self.enter(torch.cat([x, maps], dim=1)), e)  # [B,w1,h,w]
        x2 = self.down2(self.to2(x1), e)  # [B,w2,h/2,w/2]
        y = self.down3(self.to3(x2), e)  # [B,w3,h/4,w/4]
        y = self.middle(y, e)
        y = self.up2(torch.cat([F.interpolate(y, scale_factor=2.0), x2], dim=1), e)
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2.0), x1], dim=1), e)
        return self.leave(F.silu(channel_norm(y))).float()


# ---- Sampling -----------------------------------------------------------------------------------
def flow(velocity: Callable[[Tensor, float], Tensor], x: Tensor, angles: Sequence[float]) -> Tensor:
    """The probability flow dx/da = v(x, a) along `angles`, rising to encode, falling to decode.

    x [B,K,h,w] at the first angle -> at the last. The first step is that of DDIM
    (arXiv:2202.00512v2, app. D). From the second step on, we extrapolate image and noise linearly
    to the angle in the middle of the step, so that the solver is of second order.
    """
    previous, last = None, 0.0
    for a, b in pairwise(angles):
        v = velocity(x, a)
        image, noise = math.cos(a) * x - math.sin(a) * v, math.sin(a) * x + math.cos(a) * v
        present = middle = torch.stack([image, noise])
        if previous is not None:
            middle = present + (b - a) / (a - last) / 2 * (present - previous)
        x = x + (math.cos(b) - math.cos(a)) * middle[0] + (math.sin(b) - math.sin(a)) * middle[1]
        previous, last = present, a
    return x


def tile_starts(size: int, tile: int) -> list[int]:
    """Where tiles begin that cover `size` cells and overlap by about a quarter.

    All are multiples of 4, the stride of the U-Net, so that coarse cells are those of the image.
    """
    count = 1 + math.ceil((size - tile) / max(4, tile * 3 // 4))
    return [(size - tile) * i // max(1, count - 1) // 4 * 4 for i in range(count)]


def tiled(
    predict: Callable[[Tensor, Tensor], Tensor], x: Tensor, maps: Tensor, tile: Sequence[int]
) -> Tensor:
    """predict(x [B,K,h,w], maps [B,C,h,w]) -> [B,K,h,w], in tiles of at most `tile` cells whose
    predictions are blended in every step (MultiDiffusion, arXiv:2302.08113)."""
    h, w = x.shape[2:]
    sides = min(tile[0], h), min(tile[1], w)
    if sides == (h, w):
        return predict(x, maps)
    ramps = []  # 1 at a tile's border, rising over a quarter of its side
    for side in sides:
        to_border = torch.minimum(torch.arange(side), torch.arange(side).flip(0)) + 1
        ramps.append(to_border.clamp(max=side // 4 + 1) ** 2)
    weight = common.to_device(ramps[0][:, None] * ramps[1], x.device)  # [tile_h,tile_w]
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    for top in tile_starts(h, sides[0]):
        for left in tile_starts(w, sides[1]):
            box = (..., slice(top, top + sides[0]), slice(left, left + sides[1]))
            total[box] += weight * predict(x[box], maps[box])
            weights[box] += weight
    return total / weights


# ---- The bridge ---------------------------------------------------------------------------------
class Bridge(nn.Module):
    """All that a translation needs: U-Net, reader, and statistics of the data.

    config: patch, width, classes (names), size, unet_steps. `photo_statistics` [N,S] and
    `photo_features` [N,2D] are those of the training photos.
    """

    def __init__(self, config: dict[str, Any], photos: int) -> None:
        super().__init__()
        self.config, classes = config, len(config["classes"])
        channels, statistics = 3 * config["patch"] ** 2, len(STATISTICS)
        self.levels = int(math.log2(config["patch"]))
        self.unet = UNet(channels, classes, config["width"])
        self.reader = Network("tiny", classes)
        features = 2 * self.reader.body.head.in_channels
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.register_buffer("photo_statistics", torch.zeros(photos, statistics))
        self.register_buffer("photo_features", torch.zeros(photos, features))
        self.to(memory_format=torch.channels_last)

    def encode(self, images: Tensor) -> Tensor:
        """Haar coefficients of patches, normalised; for a side of 4 or 8 repeated on all bands.

        images [B,3,H,W] in [0,1] -> [B,K,h,w] with K = 3 patch^2, h = H / patch, w = W / patch.
        """
        x = 2 * images - 1
        for _ in range(self.levels):
            x = hadamard(F.pixel_unshuffle(x, 2))
        return (x - self.mean) / self.scale

    def decode(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.mean
        for _ in range(self.levels):
            x = F.pixel_shuffle(hadamard(x), 2)
        return (x + 1) / 2

    def class_maps(self, labels: Tensor) -> Tensor:
        """Share of each class in each cell. labels [B,H,W] train ids or IGNORE -> [B,C,h,w]."""
        classes = torch.arange(len(self.config["classes"]), device=labels.device).view(-1, 1, 1)
        one_hot = (labels[:, None] == classes).float()  # [B,C,H,W], all 0 where ignored
        return F.avg_pool2d(one_hot, self.config["patch"])

    @torch.inference_mode()
    def translate(
        self, images: Tensor, labels: Tensor, names: Sequence[str], args: Args | TranslateArgs
    ) -> Tensor:
        """images [B,3,H,W] in [0,1] of the source, labels [B,H,W] -> [B,3,H,W] in [0,1].

        What is random depends on --seed and the image's name alone. Large images are tiled.
        """
        (h, w), patch = images.shape[2:], self.config["patch"]
        padding = (0, -w % (4 * patch), 0, -h % (4 * patch))
        x = self.encode(F.pad(images, padding, mode="replicate"))  # [B,K,h,w]
        maps = self.class_maps(F.pad(labels, padding, value=common.IGNORE))  # [B,C,h,w]
        tile = [max(4, side // patch // 4 * 4) for side in self.config["size"]]
        # Each image gets the statistics of a random photo.
        rngs = [common.generator(args.seed, name) for name in names]
        photos = [int(torch.randint(len(self.photo_statistics), (), generator=g)) for g in rngs]
        source, target = appearance(images), self.photo_statistics[photos]  # [B,S]

        def velocity(x: Tensor, angle: float, domain: int, statistics: Tensor) -> Tensor:
            angles = x.new_full((len(x),), angle)
            domains = torch.full((len(x),), domain, device=x.device)
            predict = partial(self.unet, angle=angles, domain=domains, statistics=statistics)
            return tiled(predict, x, maps, tile)

        angles = np.linspace(0, args.strength * math.pi / 2, args.sample_steps + 1).tolist()
        if args.bridge == "ddib":  # arXiv:2203.08382v4, algorithm 1
            x = flow(partial(velocity, domain=SOURCE, statistics=source), x, angles)
        else:
            noise = torch.stack([torch.randn(x.shape[1:], generator=rng) for rng in rngs])
            x = math.cos(angles[-1]) * x + math.sin(angles[-1]) * noise.to(x)
        x = flow(partial(velocity, domain=TARGET, statistics=target), x, angles[::-1])
        return self.decode(x)[:, :, :h, :w].clamp(0, 1)


def digest(config: dict[str, Any], state: dict[str, Tensor]) -> str:
    """SHA-256 of configuration and weights."""
    result = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(state.items()):
        result.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return result.hexdigest()


def load_bridge(path: Path, device: str | torch.device) -> Bridge:
    """A bridge.pt; UserError for any other file, or if it has been changed."""
    checkpoint = common.read_checkpoint(path)
    if "bridge" not in checkpoint:
        raise UserError(f"{path}: a checkpoint without a bridge, expected bridge.pt of a training")
    config, state = checkpoint["config"], checkpoint["bridge"]
    if digest(config, state) != checkpoint["sha256"]:
        raise UserError(f"{path}: weights or configuration were changed after they were written")
    bridge = Bridge(config, len(state["photo_statistics"]))
    bridge.load_state_dict(state)
    return bridge.to(device).eval().requires_grad_(False)


# ---- Training -----------------------------------------------------------------------------------
def train_bridge(run: Run, source: Split, photos: Split) -> Bridge:
    """Trains the reader, then the U-Net, in two stages of the run. Writes OUT/bridge.pt."""
    args, device = run.args, run.device
    reader_steps = args.steps if args.reader_steps is None else args.reader_steps
    unet_steps = args.steps * 3 // 2 if args.unet_steps is None else args.unet_steps
    config = {"patch": args.patch, "width": args.width, "unet_steps": unet_steps}
    config |= {"classes": list(run.classes), "size": list(args.size)}
    bridge = Bridge(config, len(photos)).to(device)

    # Step 1: the reader is trained on the source in the colours of photos, and labels the photos.
    def recolor(images: Tensor, rng: torch.Generator) -> Tensor:
        style = common.random_images(photos, len(images), rng, device)  # [B,3,H,W]
        chosen = common.draw(rng, len(images), 1, 1, 1) < args.reader_color
        recolored = common.color_transfer(images, style).clamp(0, 1)
        images = torch.where(common.to_device(chosen, device), recolored, images)
        return common.random_augmentation(images, rng)

    common.train(run, bridge.reader, source, reader_steps, "reader", recolor, evaluated=False)
    bridge.reader.eval()
    if common.world_size() > 1:  # each process has measured its own batch statistics
        for buffer in bridge.reader.buffers():
            torch.distributed.broadcast(buffer, 0)
    classes, features = read(bridge.reader, photos.images, device, args.label_confidence)
    photos = replace(photos, labels=classes)

    # Step 2: statistics of the photos, and of both domains together.
    bridge.photo_features.copy_(torch.from_numpy(features))
    values = [appearance(common.to_tensor(image[None], device)) for image in photos.images]
    bridge.photo_statistics.copy_(torch.cat(values))
    sample = [split.images[:: max(1, len(split) // 100)] for split in (source, photos)]
    sample = common.to_tensor(np.concatenate(sample), device)  # about 200 images
    x, values = bridge.encode(sample), appearance(sample)
    bridge.unet.mean.copy_(values.mean(dim=0))
    bridge.unet.std.copy_(values.std(dim=0))
    bridge.mean.copy_(x.mean(dim=(0, 2, 3))[:, None, None])
    bridge.scale.copy_(x.std(dim=(0, 2, 3))[:, None, None] ** args.whiten)

    # Step 3: the U-Net.
    train_unet(run, bridge, source, photos, unet_steps)
    if common.rank() == 0:
        state = bridge.state_dict()
        content = {"config": config, "bridge": state, "sha256": digest(config, state)}
        common.save_checkpoint(run.out / "bridge.pt", **content)
    return bridge.eval().requires_grad_(False)


def train_unet(run: Run, bridge: Bridge, source: Split, photos: Split, steps: int) -> None:
    """Squared error of v at random angles. It ends with the averaged weights in the bridge."""
    args, device, unet = run.args, run.device, bridge.unet
    half = args.batch_size // 2
    source_loader = common.Loader(source, half, device, args.seed, "unet source")
    photo_loader = common.Loader(photos, args.batch_size - half, device, args.seed, "unet photos")
    average = copy.deepcopy(unet).requires_grad_(False)
    model = common.parallel(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.unet_lr, fused=True)
    for step in run.steps("unet", steps, unet=unet, average=average, optimizer=optimizer):
        lr = common.learning_rate(args.unet_lr, step, steps)
        common.set_lr(optimizer, lr)
        rng = common.generator(args.seed, "unet", step)

        # Step 1: a batch, half source and half photos; each image is flipped or not at random
        (images, labels), (photo_images, photo_labels) = source_loader(step), photo_loader(step)
        domain = torch.tensor([SOURCE] * len(images) + [TARGET] * len(photo_images))  # [B]
        images = torch.cat([images, photo_images])  # [B,3,H,W]
        labels = torch.cat([labels, photo_labels])  # [B,H,W]
        images, labels = common.crop_flip(images, labels, rng, zoom=1.0)

        # Step 2: the conditions
        domain = common.to_device(domain, device)
        maps = bridge.class_maps(labels)  # [B,C,h,w]
        statistics = appearance(images)  # [B,S]

        # Step 3: noise. Each of B equal parts of the range has one angle: the loss varies less.
        order = torch.randperm(len(images), generator=rng)
        angle = (order + common.draw(rng, len(images))) / len(images) * math.pi / 2
        angle = common.to_device(angle, device)  # [B]
        cos, sin = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        x = bridge.encode(images)  # [B,K,h,w]
        noise_rng = torch.Generator(device)  # drawn on the device, which is faster
        noise_rng.manual_seed(common.seed_of(args.seed, "unet noise", step, common.rank()))
        noise = torch.randn(x.shape, generator=noise_rng, device=device)

        # Step 4: the U-Net and its average. v = cos(a) e - sin(a) x (arXiv:2202.00512v2)
        with run.autocast():
            v = model(cos * x + sin * noise, maps, angle, domain, statistics)
            loss = F.mse_loss(v, cos * noise - sin * x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        common.update_ema(average, unet, min(args.ema, step / (step + 9)))
        run.log(step, unet_loss=loss, unet_lr=lr)
    unet.load_state_dict(average.state_dict())


# ---- Checks -------------------------------------------------------------------------------------
@torch.no_grad()
def read(
    net: Network, images: np.ndarray, device: torch.device, threshold: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """What the reader sees in images, uint8 [N,H,W,3] -> the likeliest classes, uint8 [N,H,W],
    IGNORE where their probability is below the threshold; and features, float32 [N,2D]: mean and
    deviation of the input of its last layer."""
    inputs, classes, features = [], [], []
    hook = net.body.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for i in range(0, len(images), 16):
        logits = common.predict(net, images[i : i + 16], device)
        confidence, best = logits.softmax(dim=1).max(dim=1)  # [B,H,W] each
        best = torch.where(confidence >= threshold, best, common.IGNORE)
        classes.append(best.byte().cpu().numpy())
        x = inputs.pop().flatten(2).float()  # [B,D,hw]
        features.append(torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1).cpu().numpy())
    hook.remove()
    return np.concatenate(classes), np.concatenate(features)


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """KID: the unbiased squared MMD of two sets of features, [N,D] and [M,D], with the kernel
    (x.y / D + 1)^3 (arXiv:1801.01401). NaN where a set has fewer than two images.

    The features of the reader have no natural scale: those of `y` get mean 0 and deviation 1.
    """
    mean, std = y.mean(axis=0, dtype=np.float64), y.std(axis=0, dtype=np.float64)
    x, y = ((z - mean) / np.sqrt((std**2).mean()) for z in (x, y))
    n, m = len(x), len(y)
    if min(n, m) < 2:
        return math.nan
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within_x = (xx.sum() - xx.trace()) / (n * (n - 1))
    within_y = (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())


def borders(labels: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour has another label. [H,W] -> bool [H,W]."""
    result = np.zeros(labels.shape, bool)
    result[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    result[:-1] |= labels[1:] != labels[:-1]
    return result


def edge_agreement(image: np.ndarray, labels: np.ndarray) -> float:
    """The probability that the gradient of the luminance is greater at a pixel of a border than at
    another one (area under the ROC curve; 0.5 is chance). NaN where there is no border.

    image uint8 [H,W,3], labels [H,W] of any ids.
    """
    luma = luminance(common.to_tensor(image[None], torch.device("cpu")))[0].numpy()  # [H,W]
    gradient = np.zeros(luma.shape)  # squared
    gradient[:, :-1] += np.diff(luma, axis=1) ** 2
    gradient[:-1] += np.diff(luma, axis=0) ** 2
    edge, rank = borders(labels).ravel(), gradient.ravel().argsort().argsort()
    n, m = edge.sum(), (~edge).sum()
    wins = rank[edge].sum() - n * (n - 1) / 2  # Mann-Whitney U
    return float(wins / (n * m)) if n and m else math.nan


def agreement(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of valid pixels that are read as labelled, 1 where there is none. [N,H,W] -> [N]."""
    valid = labels != common.IGNORE
    right = ((classes == labels) & valid).sum(axis=(1, 2))
    return np.where(valid.any(axis=(1, 2)), right / np.maximum(valid.sum(axis=(1, 2)), 1), 1.0)


CHECKS = {  # what each of them measures, and whether more of it is better
    "kid": ("kernel distance to the photos", False),
    "edges": ("image edges along the borders of the masks", True),
    "agreement": ("pixels that the reader reads as labelled", True),
}
FEW_UPDATES = 300  # of the U-Net; a bridge of fewer adds noise and little else


def check(
    bridge: Bridge, before: np.ndarray, after: np.ndarray, masks: np.ndarray, labelled: bool
) -> dict[str, float | None]:
    """CHECKS of a translated set; None where one cannot be measured. before, after: uint8
    [N,H,W,3]; masks [N,H,W]: train ids if `labelled`, else any ids."""
    table, photos = {}, bridge.photo_features.cpu().numpy()
    for when, images in (("before", before), ("after", after)):
        classes, features = read(bridge.reader, images, bridge.mean.device)
        table[f"kid_{when}"] = kernel_distance(features, photos)
        edges = np.array([edge_agreement(i, m) for i, m in zip(images, masks, strict=True)])
        table[f"edges_{when}"] = math.nan if np.isnan(edges).all() else float(np.nanmean(edges))
        if labelled:
            table[f"agreement_{when}"] = float(agreement(classes, masks).mean())
    return {key: None if math.isnan(value) else value for key, value in table.items()}


def verdict(table: dict[str, Any], unet_steps: int) -> list[str]:
    """What the checks say, in lines of words."""
    lines, improved, measured = [], 0, 0
    for key, (meaning, more_is_better) in CHECKS.items():
        before, after = table.get(f"{key}_before"), table.get(f"{key}_after")
        if before is None or after is None:
            continue
        better = (after > before) == more_is_better
        improved, measured = improved + better, measured + 1
        lines.append(f"{meaning}: {before:.3f} -> {after:.3f}, {'better' if better else 'worse'}")
    lines.append(f"verdict: {improved} of {measured} checks improved, {table['left_out']} left out")
    if unet_steps < FEW_UPDATES:
        lines.append(f"{unet_steps} updates of the U-Net are too few: this is not a bridge yet")
    return lines


def draw_translations(path: Path, columns: dict[str, np.ndarray], masks: np.ndarray) -> None:
    """Five images of each column, uint8 [N,H,W,3]; then the borders of the masks, [N,H,W] of any
    ids, over those of "source" and "translated"."""
    shown = {}
    for title, images in columns.items():
        shown[title] = list(images[common.spaced(len(images), 5)])
    edges = [borders(mask)[..., None] for mask in masks[common.spaced(len(masks), 5)]]
    yellow = np.array([255, 230, 0], np.uint8)
    for title in ("source", "translated"):
        pairs = zip(edges, shown[title], strict=True)
        shown[f"mask on {title}"] = [np.where(edge, yellow, image) for edge, image in pairs]
    common.draw_sheet(path, shown, ())


# ---- The benchmark's row ------------------------------------------------------------------------
def translate_set(run: Run, args: Args, bridge: Bridge, source: Split) -> None:
    """The source translated into OUT/set. Each process translates its share of every batch."""
    folder, device = run.out / "set", run.device
    if common.rank() == 0:
        images = common.create_array(folder / "images.npy", source.images.shape)
        labels = common.create_array(folder / "labels.npy", source.labels.shape)
    n = args.batch_size
    for step in run.steps("translate", math.ceil(len(source) / n)):
        batch = np.arange((step - 1) * n, min(step * n, len(source)))
        result = torch.zeros(len(batch), *args.size, 3, dtype=torch.uint8, device=device)
        own = np.array_split(np.arange(len(batch)), common.world_size())[common.rank()]
        if len(own):
            old = common.to_tensor(source.images[batch[own]], device)  # [B,3,H,W]
            old_labels = torch.from_numpy(source.labels[batch[own]]).to(device).long()  # [B,H,W]
            names = [source.names[i] for i in batch[own]]
            with run.autocast():
                new = bridge.translate(old, old_labels, names, args)
            result[own] = torch.from_numpy(common.to_uint8(new)).to(device)
        if common.world_size() > 1:
            torch.distributed.all_reduce(result)  # a sum: each image is 0 in all processes but one
        if common.rank() == 0:
            images[batch] = result.cpu().numpy()
            classes, _ = read(bridge.reader, images[batch], device)
            agrees = agreement(classes, source.labels[batch]) >= args.min_agreement
            labels[batch] = np.where(agrees[:, None, None], source.labels[batch], common.IGNORE)
    if common.rank() == 0:
        images.flush()
        common.save_set(folder, source, labels, source.names)


def run(args: Args) -> Result:
    run = Run(args, "diffusion_bridge", stages=4)
    if run.result:
        return run.result
    args, net = run.args, run.network()
    if args.sample_steps is None:
        args = replace(args, sample_steps=max(2, min(16, args.steps // 10)))
    source, photos = common.load(args, "source"), common.load(args, "target_unlabelled")
    bridge = train_bridge(run, source, photos)
    translate_set(run, args, bridge, source)
    common.barrier()  # until rank 0 has written the set
    translated = common.load_set(run.out / "set", source.dataset, args.size)
    left_out = int((translated.labels == common.IGNORE).all(axis=(1, 2)).sum())
    if left_out == len(translated):
        raise UserError(f"--min-agreement {args.min_agreement}: no image agrees so well")
    if common.rank() == 0:
        part = slice(None, None, math.ceil(len(source) / 1000))
        before, after, labels = source.images[part], translated.images[part], source.labels[part]
        table = check(bridge, before, after, labels, True) | {"left_out": left_out}
        run.say("\n".join(verdict(table, bridge.config["unet_steps"])))
        common.write_json(run.out / "checks.json", table)
        columns = {"source": before, "translated": after, "photo": photos.images}
        draw_translations(run.out / "figures/translation.png", columns, labels)
    common.train(run, net, translated, args.steps, "segmenter")
    return run.finish(net, 0, other_updates=f"{bridge.config['unet_steps']} U-Net updates")


def train(args: Args) -> None:
    """The command `train`: reader and U-Net, into OUT/bridge.pt."""
    run = Run(args, "diffusion_bridge_train", stages=2)
    train_bridge(run, common.load(run.args, "source"), common.load(run.args, "target_unlabelled"))
    run.say(f"written: {run.out / 'bridge.pt'}")


# ---- A folder -----------------------------------------------------------------------------------
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


class Pair(NamedTuple):
    image: Path
    mask: Path
    name: str  # path of the image below INPUT_DIR, and of its translation below OUTPUT_DIR
    mask_name: str  # path of the mask's copy below OUTPUT_DIR
    size: tuple[int, int]  # width, height


def find_pairs(inputs: Path, mask_dir: Path) -> tuple[list[Pair], int]:
    """Images with their masks, sorted by size and path, and the number of other files.

    UserError where the two do not match, or where masks would overwrite images.
    """
    both, ignored = [], 0
    for folder, other in ((inputs, mask_dir), (mask_dir, inputs)):
        by_stem: dict[str, Path] = {}  # the stem with its folders
        for path in sorted(folder.rglob("*")):
            relative = path.relative_to(folder)
            if path.is_dir() or (other.is_relative_to(folder) and path.is_relative_to(other)):
                continue
            stem = relative.with_suffix("").as_posix()
            foreign = any(part[0] in ".@" for part in relative.parts)  # of other programs
            if foreign or path.suffix.lower() not in SUFFIXES:
                ignored += 1
            elif stem in by_stem:
                raise UserError(f"{path}: differs from {by_stem[stem].name} by its suffix alone")
            else:
                by_stem[stem] = path
        both.append(by_stem)
    images, masks = both
    if not images:
        raise UserError(f"{inputs}: no image, expected files with {' '.join(SUFFIXES)}")
    for these, those, folder in ((images, masks, mask_dir), (masks, images, inputs)):
        for stem in sorted(these.keys() - those.keys()):
            raise UserError(f"{these[stem]}: has no partner, expected {folder / stem}.*")
    mask_below = mask_dir.relative_to(inputs) if mask_dir.is_relative_to(inputs) else Path("masks")
    pairs = []
    for stem in sorted(images):
        image, mask = images[stem], masks[stem]
        with common.open_image(image, False) as picture, common.open_image(mask, False) as other:
            size, mask_size = picture.size, other.size
        if size != mask_size:
            raise UserError(f"{mask}: width and height are {mask_size}, of its image {size}")
        mask_name = (mask_below / mask.relative_to(mask_dir)).as_posix()
        pairs.append(Pair(image, mask, image.relative_to(inputs).as_posix(), mask_name, size))
    same = {pair.name for pair in pairs} & {pair.mask_name for pair in pairs}
    if same:
        raise UserError(f"{mask_dir}: masks would overwrite images, such as {min(same)}")
    return sorted(pairs, key=lambda pair: pair.size), ignored


def read_mask(pair: Pair, mask_labels: str) -> np.ndarray:
    """Train ids where `mask_labels` says how to read them, else a number for each id or colour.

    -> uint8 or int32 [H,W].
    """
    if mask_labels != "none":
        return common.read_label(pair.mask, common.DATASETS[mask_labels], pair.image)
    values = np.atleast_3d(common.open_image(pair.mask)).astype(np.int32)  # [H,W,channels]
    return values @ 256 ** np.arange(values.shape[2], dtype=np.int32)


def write_image(pixels: np.ndarray, original: Path, path: Path) -> None:
    """uint8 [H,W,3] in the format of the original; grey, 16 bits and alpha stay."""
    with common.open_image(original) as old:
        new, mode = Image.fromarray(pixels), old.mode
        if mode in ("1", "L", "LA") or mode.startswith("I"):
            new = new.convert("L")
        if mode.startswith("I"):
            new = Image.fromarray(np.asarray(new).astype(np.uint16) * 257)
        elif old.has_transparency_data:
            new.putalpha(old.convert("RGBA").getchannel("A"))
        with common.replacing(path) as temporary:
            new.save(temporary, format=old.format, quality=95)


def translate_batch(
    bridge: Bridge, batch: Sequence[Pair], args: TranslateArgs
) -> tuple[np.ndarray, np.ndarray]:
    """Images of one size in one forward pass -> uint8 [B,H,W,3], and their agreement [B]."""
    device = bridge.mean.device
    old = [np.asarray(common.to_rgb(common.open_image(pair.image))) for pair in batch]
    old = np.stack(old)  # [B,H,W,3]
    if args.mask_labels == "none":
        labels, _ = read(bridge.reader, old, device)
    else:
        labels = np.stack([read_mask(pair, args.mask_labels) for pair in batch])
    names = [pair.name for pair in batch]
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        train_ids = torch.from_numpy(labels).to(device).long()
        new = bridge.translate(common.to_tensor(old, device), train_ids, names, args)
    new = common.to_uint8(new)
    classes, _ = read(bridge.reader, new, device)
    return new, agreement(classes, labels)


def translate_folder(args: TranslateArgs) -> None:
    """The command `translate`. The batches depend on the input alone, so an interrupted run, or
    several processes, give the same bytes. When all files of a batch are there, each of them whole,
    a record is written to OUTPUT_DIR/.records, and the batch is not translated again.
    """
    if args.config:  # the command line is read once more, with other defaults
        import tyro

        args = tyro.cli(TranslateArgs, default=replace(args, **read_options(args.config)))
    for name in ("input_dir", "output_dir", "checkpoint"):
        if getattr(args, name) is None:
            raise UserError(f"--{name.replace('_', '-')}: not given")
    if not 0 < args.strength <= 1 or args.sample_steps < 1 or args.batch_size < 1:
        raise UserError("--strength, --sample-steps or --batch-size is out of range")
    inputs, out = args.input_dir.resolve(), args.output_dir.resolve()
    mask_dir = (args.mask_dir or args.input_dir / "masks").resolve()
    for flag, folder in (("--input-dir", inputs), ("--mask-dir", mask_dir)):
        if not folder.is_dir():
            raise UserError(f"{flag} {folder}: no such folder")
        if out.is_relative_to(folder) or folder.is_relative_to(out):
            raise UserError(f"--output-dir {out}: inside, around or equal to {flag} {folder}")
    device = common.join_processes("auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    bridge = load_bridge(args.checkpoint, device)
    classes = bridge.config["classes"]
    if args.mask_labels != "none" and classes != [*common.DATASETS[args.mask_labels].classes]:
        raise UserError(f"--mask-labels {args.mask_labels}: the checkpoint has other classes")
    pairs, ignored = find_pairs(inputs, mask_dir)
    batches = []
    for _, group in groupby(pairs, key=lambda pair: pair.size):
        group = list(group)
        batches += [group[i : i + args.batch_size] for i in range(0, len(group), args.batch_size)]

    # Step 1: a new output folder, or one of the same settings
    settings = {**asdict(args), "checkpoint": common.sha256(args.checkpoint)}
    for name in ("input_dir", "mask_dir", "output_dir", "config"):
        del settings[name]  # which change no byte of an image
    metadata = out / "metadata.json"
    if metadata.exists():
        before = json.loads(metadata.read_text())["settings"]
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(f"{out}: begun with another {name}; give another --output-dir")
    elif out.exists() and any(path.name[0] != "." for path in out.iterdir()):
        raise UserError(f"{out}: not empty, and no translation; give another --output-dir")
    common.barrier()  # until all have seen what was there
    if common.rank() == 0 and not metadata.exists():
        common.write_json(metadata, {"complete": False, "settings": settings})

    # Step 2: translate what is missing, each process its share of the batches
    records = []  # a file for each batch, whose name changes with the files of the batch
    for batch in batches:
        files = [path.stat() for pair in batch for path in (pair.image, pair.mask)]
        stamp = [(pair.name, pair.mask_name) for pair in batch], [f.st_mtime_ns for f in files]
        records.append(out / f".records/{common.seed_of(repr(stamp)):014x}.json")
    own = range(common.rank(), len(batches), common.world_size())
    for number in common.show_progress(own, "translating"):
        batch, record = batches[number], []
        if records[number].exists():
            images = json.loads(records[number].read_text())
            if all(image["left_out"] or (out / image["image"]).exists() for image in images):
                continue
        for pair, new, share in zip(batch, *translate_batch(bridge, batch, args), strict=True):
            left_out = bool(share < args.min_agreement)
            if not left_out:
                write_image(new, pair.image, out / pair.name)
                with common.replacing(out / pair.mask_name) as temporary:
                    shutil.copyfile(pair.mask, temporary)
            line = {"image": pair.name, "mask": pair.mask_name, "left_out": left_out}
            line |= {"seed": common.seed_of(args.seed, pair.name), "agreement": float(share)}
            line |= {"source_sha256": common.sha256(pair.image)}
            line |= {"mask_sha256": common.sha256(pair.mask)}
            line["output_sha256"] = None if left_out else common.sha256(out / pair.name)
            record.append(line)
        common.write_json(records[number], record)

    # Step 3: the process that is last checks all of it
    if not all(record.exists() for record in records):
        return
    images = [image for record in records for image in json.loads(record.read_text())]
    kept = [p for p, i in zip(pairs, images, strict=True) if not i["left_out"]]
    table = {"left_out": len(pairs) - len(kept)}
    if kept:
        table |= check_folder(bridge, kept, args, out)
    content = {"settings": settings, "checks": table, "ignored": ignored, "images": images}
    content |= {"complete": True, "commit": common.commit(), "torch": torch.__version__}
    common.write_json(metadata, content)
    print(f"{len(kept)} images in {out}; {ignored} files ignored, which are no images")
    print(*verdict(table, bridge.config["unet_steps"]), sep="\n", flush=True)


def check_folder(
    bridge: Bridge, pairs: Sequence[Pair], args: TranslateArgs, out: Path
) -> dict[str, float | None]:
    """CHECKS of up to 1000 images at the size of training. The figure OUTPUT_DIR-sheet.png is not
    in the folder, so that no loader takes it for an image of the set."""
    pairs, (h, w) = pairs[:: math.ceil(len(pairs) / 1000)], bridge.config["size"]
    before = np.stack([common.read_image(pair.image, (h, w)) for pair in pairs])
    after = np.stack([common.read_image(out / pair.name, (h, w)) for pair in pairs])
    masks = [Image.fromarray(read_mask(pair, args.mask_labels)) for pair in pairs]
    masks = np.stack([np.asarray(m.resize((w, h), Image.Resampling.NEAREST)) for m in masks])
    columns = {"source": before, "translated": after}
    sheet = out.with_name(f"{out.name}-sheet.png")
    draw_translations(sheet, columns, masks)
    return check(bridge, before, after, masks, args.mask_labels != "none")


# ---- Command line -------------------------------------------------------------------------------
def read_options(path: Path) -> dict[str, Any]:
    """The options of a TOML or JSON file; UserError for an unknown key or a wrong value."""
    try:
        text = path.read_text()
        options = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
        entries = options.items()
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: neither TOML nor a JSON object ({error})") from error
    hints, result = typing.get_type_hints(TranslateArgs), {}
    for key, value in entries:
        name = key.replace("-", "_")
        if name not in hints:
            raise UserError(f"{path}: unknown key {key!r}, expected one of {', '.join(hints)}")
        default, choices = getattr(TranslateArgs, name), typing.get_args(hints[name])
        kind = str if default is None else type(default)  # None: a path
        value = float(value) if kind is float and type(value) is int else value
        if type(value) is not kind or (default and choices and value not in choices):
            raise UserError(f"{path}: {key} is {value!r}, expected {choices or kind.__name__}")
        result[name] = Path(value) if default is None else value
    return result


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("train", "translate"):
        sys.argv[:2] = [f"{sys.argv[0]} {command}"]  # as --help calls it
    if command == "translate":
        common.main(TranslateArgs, translate_folder, __doc__)
    else:
        common.main(Args, train if command == "train" else run, __doc__)


if __name__ == "__main__":
    main()
