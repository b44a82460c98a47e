"""Translates synthetic images into the style of photos by diffusion; masks stay as they are.

One denoising U-Net learns both domains, conditioned on the domain, the share of each class in each
cell, and five statistics of appearance. The probability flow of the source (an ODE) turns an image
almost into noise (encoding), that of the photos turns the noise into an image (decoding): DDIB
(arXiv:2203.08382v4), with the v-prediction and cosine schedule of arXiv:2202.00512v2. The commands,
each with its own --help:

    python diffusion_bridge.py       (all of it: bridge, translation, training on the translations)

    python diffusion_bridge.py train --out runs/bridge               (writes runs/bridge/bridge.pt)

    python diffusion_bridge.py translate --input-dir A --output-dir B --checkpoint RUN/bridge.pt

`translate` translates a folder of images; their masks are in A/masks (or --mask-dir). The first
command takes 11 to 33 minutes on one CPU core and reaches 57 mIoU on the miniature (the default
data), where training on the source alone reaches 45. No label of a photo is used in training. A
translated set is checked: kernel distance to the photos by class, edges along the masks' borders,
the classes that a small segmentation network (the reader) predicts, the share of the change that
an affine map of colours explains, and the size of the encoded noise.

Letters: B batch, C classes, H x W pixels, N images (M of a second set). A cell is a patch of
pixels; an image has h x w cells of K channels. S statistics of appearance, D features of the reader
at P positions, E values of an embedding. Noise levels are angles a from 0 (the image x, as cells)
to pi/2 (the noise e): x_a = cos(a) x + sin(a) e.
"""

import copy
import json
import math
import os
import shutil
import sys
import tomllib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unicodedata import normalize

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d

import common
import datasets
from common import Network, Result, Run
from datasets import Split, UserError

STATISTICS = ("brightness", "contrast", "saturation", "warmth", "haze")
SOURCE, TARGET = 0, 1  # numbers of the domains, a condition of the U-Net


@dataclass(frozen=True)
class Args(common.Args):
    bridge: Literal["ddib", "sdedit"] = "ddib"
    """ddib: encode along the flow of the source, decode along that of the target. sdedit, a
    baseline for comparison: add noise once, decode as ddib does. The original SDEdit
    (arXiv:2108.01073) follows the reverse SDE, with new noise in every step."""
    strength: float = 0.97
    """Highest noise level: its angle as a share of pi/2. 1: pure noise; near 0: the image."""
    noise_floor: float = 0.02
    """Lowest noise level, on the same scale. ddib adds noise of this level before encoding, because
    a perfectly flat area has nothing that could be turned into noise. Decoding removes it."""
    statistics: Literal["photo", "own"] = "photo"
    """Statistics of appearance for decoding: those of a random photo, or, for comparison, the
    image's own. With own, materials and textures change, and the overall colour stays."""
    sample_steps: int | None = None
    """Evaluations of the U-Net to encode, and again to decode. Decoding takes one more if
    --noise-floor is above 0. Default: a tenth of --steps, at least 2 and at most 12."""
    unet_steps: int | None = None
    """Updates of the U-Net. Default: twice --steps, or 1.5 times for large images, which have at
    least 256 x 256 = 65,536 pixels."""
    reader_steps: int | None = None
    """Updates of the reader. This small segmentation network is trained on the source, labels the
    photos for the U-Net, and checks results. Default: half of --steps."""
    reader_color: float = 0.5
    """Share of the reader's training images that get the colours of a random photo."""
    width: int | None = None
    """Channels of the U-Net at its finest level. The second level has twice as many, all coarser
    ones have four times as many. Default: 32, for large images 128."""
    levels: int | None = None
    """Resolutions of the U-Net, each half of the one before. Default: 3, for large images 4."""
    patch: Literal[2, 4, 8] | None = None
    """Side of a cell in pixels. Noise is added to the Hadamard coefficients of the cells (Haar's
    if it is 2), which are the U-Net's channels. Default: 2, for large images 4."""
    whiten: float = 0.5
    """Each channel is divided by its standard deviation to this power: 1 makes all variances 1."""
    unet_lr: float | None = None
    """Initial learning rate of the U-Net's AdamW. Default: 0.002, for large images 0.0005."""
    ema: float = 0.05
    """Averaging window of the U-Net's weights, as a share of its updates. In update t the decay of
    their EMA is 1 - 1 / (ema * unet_steps), but at most t / (t + 9). Translation uses the EMA."""
    label_confidence: float = 0.5
    """Confidence threshold of the reader's pseudo-labels of photos: pixels below are ignored."""


SMALL = {"width": 32, "levels": 3, "patch": 2, "unet_lr": 2e-3}
LARGE = {"width": 128, "levels": 4, "patch": 4, "unet_lr": 5e-4}
LARGE_PIXELS = 256 * 256  # images with at least so many are large, as those of the real datasets
MAX_PIXELS = 1 << 22  # of a batch in `translate`, if it has more than one image


def fill_in(args: Args) -> Args:
    """Fills in the defaults that depend on --size and --steps. UserError for what cannot run."""
    large = math.prod(args.size) >= LARGE_PIXELS
    defaults = {**(LARGE if large else SMALL), "reader_steps": math.ceil(args.steps / 2)}
    defaults["unet_steps"] = math.ceil(args.steps * (1.5 if large else 2))
    defaults["sample_steps"] = max(2, min(12, args.steps // 10))
    args = replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    noise_levels(args)  # an error now rather than after the training
    if min(args.width, args.levels) < 1:
        raise UserError("--width, --levels: expected 1 or more")
    multiple = args.patch * 2 ** (args.levels - 1)
    if any(side % multiple for side in args.size):
        raise UserError(f"--size {args.size}: --patch and --levels need multiples of {multiple}")
    multiple = 2 * common.world_size()  # a batch is half source, half photos
    if multiple > 2 and args.batch_size % multiple:
        raise UserError(f"--batch-size {args.batch_size}: expected a multiple of {multiple}")
    return args


@dataclass(frozen=True)
class TranslateArgs:
    input_dir: Path | None = None
    """Folder of PNG or JPG images. It may have subfolders."""
    mask_dir: Path | None = None
    """Folder of masks, each with the path of its image, but any suffix. Default: INPUT_DIR/masks"""
    output_dir: Path | None = None
    """Folder of the translations. Run an interrupted command again, and it continues."""
    checkpoint: Path | None = None
    """The file bridge.pt of the command train."""
    config: Path | None = None
    """TOML or JSON file of these options; flags override it."""
    mask_labels: Literal["none", "own", "vkitti2", "kitti", "gta5", "cityscapes"] = "none"
    """Dataset whose ids or colours the masks have. own: your data that the bridge was trained on.
    none: any other masks; the classes are then predicted from the images by the reader."""
    bridge: Literal["ddib", "sdedit"] = "ddib"
    """ddib encodes and decodes; sdedit adds noise once and decodes."""
    strength: float = 0.97
    """Highest noise level: its angle as a share of pi/2. 1: pure noise; near 0: the image."""
    noise_floor: float = 0.02
    """Lowest noise level, on the same scale. ddib adds noise of this level before encoding."""
    statistics: Literal["photo", "own"] = "photo"
    """Statistics of appearance for decoding: those of a random photo, or the image's own."""
    sample_steps: int = 12
    """Evaluations of the U-Net to encode. Decoding takes one more if --noise-floor is above 0."""
    min_agreement: float = 0.0
    """Least share of pixels on which the reader's prediction for the translation equals the mask
    (with --mask-labels none: its prediction for the original). Images below it are left out."""
    batch_size: int = 16
    """Images of equal size that are translated together, but no more than 4 megapixels."""
    seed: int = 0
    """Decides, together with an image's path, its noise and the photo whose statistics it gets."""


# ---- What is diffused, and its conditions -------------------------------------------------------
def hadamard(x: Tensor) -> Tensor:
    """The Hadamard transform of each four channels p, q, r, s: half their sum, and half of three
    sums with signs. Orthonormal, and its own inverse. [B,K,h,w] -> [B,K,h,w]."""
    p, q, r, s = x.unflatten(1, (-1, 4)).unbind(dim=2)  # [B,K/4,h,w] each
    bands = (p + q + r + s, p - q + r - s, p + q - r - s, p - q - r + s)
    return torch.stack(bands, dim=2).flatten(1, 2) / 2


def class_shares(labels: Tensor, classes: int, size: Sequence[int]) -> Tensor:
    """Share of each class in each cell; ignored pixels have no class. [B,H,W] -> [B,C,*size]."""
    train_ids = torch.arange(classes, device=labels.device).view(-1, 1, 1)
    return F.adaptive_avg_pool2d((labels[:, None] == train_ids).float(), tuple(size))


def luminance(images: Tensor) -> Tensor:
    """Luma of Rec. 601. [B,3,H,W] -> [B,H,W]."""
    return 0.299 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]


def appearance(images: Tensor) -> Tensor:
    """Statistics of appearance, in the order of STATISTICS. [B,3,H,W] in [0,1] -> [B,S].

    Saturation is the mean of the largest less the smallest of R, G, B. Warmth is the mean of R - B.
    Haze is the mean of the dark channel (He et al., CVPR 2009), the minimum of R, G, B in disjoint
    squares whose side is an eighth of the height. It is near 0 in clear air, except in the sky.
    """
    luma, side = luminance(images), max(1, min(images.shape[2] // 8, images.shape[3]))
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
class ResidualBlock(nn.Module):
    """Two convolutions. The embedding scales and shifts the output of the second normalisation."""

    def __init__(self, i: int, o: int, embedding: int) -> None:
        super().__init__()
        # These normalise over the channels at each position, so the image's size does not matter.
        self.norm1, self.norm2 = (LayerNorm2d(n, elementwise_affine=False) for n in (i, o))
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * o)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.skip(x) + y


class UNet(nn.Module):
    """Predicts the velocity v = cos(a) e - sin(a) x of a noisy image x_a = cos(a) x + sin(a) e.

    x (this is x_a) [B,K,h,w], maps [B,C,h,w] shares of the classes in each cell (all 0 where the
    classes are not known), angle (a) [B], domain [B] int64, statistics [B,S] -> v [B,K,h,w].
    h and w are multiples of `stride`.
    """

    def __init__(self, channels: int, classes: int, width: int, levels: int) -> None:
        super().__init__()
        widths, dims = [width * min(4, 2**level) for level in range(levels)], 4 * width
        self.stride = 2 ** (levels - 1)
        self.time = nn.Sequential(nn.Linear(16, dims), nn.SiLU(), nn.Linear(dims, dims))
        self.domain, self.statistics = nn.Embedding(2, dims), nn.Linear(len(STATISTICS), dims)
        self.register_buffer("mean", torch.zeros(len(STATISTICS)))  # of the statistics
        self.register_buffer("std", torch.ones(len(STATISTICS)))
        self.enter = nn.Conv2d(channels + classes, width, 3, padding=1)  # the first convolution
        self.down = nn.ModuleList(ResidualBlock(w, w, dims) for w in widths)
        self.shrink = nn.ModuleList(nn.Conv2d(i, o, 3, 2, padding=1) for i, o in pairwise(widths))
        self.middle = ResidualBlock(widths[-1], widths[-1], dims)
        self.up = nn.ModuleList(ResidualBlock(i + o, o, dims) for o, i in pairwise(widths))
        self.norm = LayerNorm2d(width, elementwise_affine=False)
        self.leave = nn.Conv2d(width, channels, 3, padding=1)  # the last convolution
        nn.init.zeros_(self.leave.weight)

    def forward(
        self, x: Tensor, maps: Tensor, angle: Tensor, domain: Tensor, statistics: Tensor
    ) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would blur the angle
            phases = angle[:, None] * 2.0 ** torch.arange(8, device=angle.device)  # [B,8]
            embedding = self.time(torch.cat([phases.sin(), phases.cos()], dim=1))  # [B,E]
            normalised = (statistics - self.mean) / self.std  # [B,S]
            embedding = F.silu(embedding + self.domain(domain) + self.statistics(normalised))
        y = self.down[0](self.enter(torch.cat([x, maps], dim=1)), embedding)  # [B,width,h,w]
        skips = []
        for downsample, down in zip(self.shrink, self.down[1:], strict=True):
            skips.append(y)
            y = down(downsample(y), embedding)  # half as high and wide
        y = self.middle(y, embedding)
        for up, skip in zip(reversed(self.up), reversed(skips), strict=True):
            y = up(torch.cat([F.interpolate(y, scale_factor=2.0), skip], dim=1), embedding)
        return self.leave(F.silu(self.norm(y))).float()


# ---- Sampling -----------------------------------------------------------------------------------
def flow(velocity: Callable[[Tensor, float], Tensor], x: Tensor, angles: Sequence[float]) -> Tensor:
    """Solves the ODE of the probability flow, dx/da = v(x, a), by one step between neighbouring
    `angles`. Angles that rise encode (image to noise), angles that fall decode.

    x [B,K,h,w] at the first angle -> x [B,K,h,w] at the last. The first step is that of DDIM
    (arXiv:2202.00512v2, app. D). The later steps extrapolate image and noise linearly to the
    midpoint of the step, for second order, by at most twice the last change, to limit errors of v.
    """
    previous, last = None, 0.0  # image and noise at the step before, and its angle
    for a, b in pairwise(angles):
        v = velocity(x, a)
        image, noise = math.cos(a) * x - math.sin(a) * v, math.sin(a) * x + math.cos(a) * v
        current = midpoint = torch.stack([image, noise])  # [2,B,K,h,w]
        if previous is not None:
            midpoint = current + min(2, (b - a) / (a - last) / 2) * (current - previous)
        image, noise = midpoint
        x = x + (math.cos(b) - math.cos(a)) * image + (math.sin(b) - math.sin(a)) * noise
        previous, last = current, a
    return x


def noise_levels(args: Args | TranslateArgs) -> list[float]:
    """Angles from --noise-floor to --strength. The steps between them grow from one to the next.

    A structure of standard deviation s is turned into noise (or back) near cos(a) s = sin(a). Flat
    areas such as sky have a small s, so the steps must be small at low angles. With equal steps,
    the noise of flat areas has a standard deviation far below 1.
    """
    if not 0 <= args.noise_floor < args.strength <= 1 or args.sample_steps < 1:
        raise UserError("expected 0 <= --noise-floor < --strength <= 1 and 1 <= --sample-steps")
    low, high = args.noise_floor * math.pi / 2, args.strength * math.pi / 2
    return (low + (high - low) * np.linspace(0, 1, args.sample_steps + 1) ** 2).tolist()


# ---- The bridge ---------------------------------------------------------------------------------
class Bridge(nn.Module):
    """All that a translation and its checks need: U-Net, reader, and statistics of the data.

    config: patch, width, levels, classes (names), size, unet_steps, and with own data own_values
    (for `translate --mask-labels own`). `photo_statistics` [M,S] and `photo_features`
    [M,C,D] are those of the training photos.
    """

    def __init__(self, config: dict[str, Any], photos: int) -> None:
        super().__init__()
        self.config, classes = config, len(config["classes"])
        channels, statistics = 3 * config["patch"] ** 2, len(STATISTICS)
        self.unet = UNet(channels, classes, config["width"], config["levels"])
        self.reader = Network("tiny", classes)
        features = self.reader.body.head.in_channels
        self.register_buffer("mean", torch.zeros(channels, 1, 1))
        self.register_buffer("scale", torch.ones(channels, 1, 1))
        self.register_buffer("photo_statistics", torch.zeros(photos, statistics))
        self.register_buffer("photo_features", torch.zeros(photos, classes, features))
        self.to(memory_format=torch.channels_last)

    def to_cells(self, images: Tensor) -> Tensor:
        """Normalised Hadamard coefficients of the cells. Patches of 4 and 8 repeat the transform.
        [B,3,H,W] in [0,1] -> [B,K,h,w] with K = 3 patch^2, h = H / patch, w = W / patch."""
        x = 2 * images - 1
        for _ in range(int(math.log2(self.config["patch"]))):
            x = hadamard(F.pixel_unshuffle(x, 2))
        return (x - self.mean) / self.scale

    def from_cells(self, x: Tensor) -> Tensor:
        """The inverse of `to_cells`, not clamped. [B,K,h,w] -> images [B,3,H,W]."""
        x = x * self.scale + self.mean
        for _ in range(int(math.log2(self.config["patch"]))):
            x = F.pixel_shuffle(hadamard(x), 2)
        return (x + 1) / 2

    @torch.inference_mode()
    def translate(
        self, images: np.ndarray, labels: np.ndarray, names: list[str], args: Args | TranslateArgs
    ) -> tuple[np.ndarray, np.ndarray]:
        """Images of the source, uint8 [B,H,W,3], with labels [B,H,W] -> uint8 [B,H,W,3], and the
        root mean square of each image's encoded noise [B]. With ddib and a strength near 1 it is
        near 1 if the U-Net makes no error. Any H and W. The photo depends only on --seed, name
        and number of photos; the noise only on --seed, name, size and kind of device."""
        device = self.mean.device
        images = common.to_tensor(images, device)  # [B,3,H,W]
        labels = torch.tensor(labels, dtype=torch.long, device=device)
        (height, width), multiple = images.shape[2:], self.unet.stride * self.config["patch"]
        padding = (0, -width % multiple, 0, -height % multiple)
        x = self.to_cells(F.pad(images, padding, mode="replicate"))  # [B,K,h,w]
        labels = F.pad(labels, padding, value=datasets.IGNORE)
        maps = class_shares(labels, len(self.config["classes"]), x.shape[2:])  # [B,C,h,w]
        # Each image has its own noise, and a random photo, whose statistics it gets by default.
        rngs = [torch.Generator(device).manual_seed(common.seed_of(args.seed, n)) for n in names]
        noise = torch.stack([torch.randn(x.shape[1:], generator=g, device=device) for g in rngs])
        n = len(self.photo_statistics)
        photos = [common.seed_of(args.seed, name, "photo") % n for name in names]
        source = appearance(images)  # [B,S]
        target = source if args.statistics == "own" else self.photo_statistics[photos]

        def velocity(x: Tensor, angle: float, domain: int, statistics: Tensor) -> Tensor:
            domains = torch.full((len(x),), domain, device=device)
            return self.unet(x, maps, x.new_full((len(x),), angle), domains, statistics)

        angles = noise_levels(args)
        start = angles[0] if args.bridge == "ddib" else angles[-1]
        x = math.cos(start) * x + math.sin(start) * noise
        if args.bridge == "ddib":  # arXiv:2203.08382v4, algorithm 1
            x = flow(partial(velocity, domain=SOURCE, statistics=source), x, angles)
        deviation = x.square().mean(dim=(1, 2, 3)).sqrt()  # [B]
        decoding_angles = angles[::-1] if angles[0] == 0 else [*angles[::-1], 0.0]
        x = flow(partial(velocity, domain=TARGET, statistics=target), x, decoding_angles)
        result = self.from_cells(x)[:, :, :height, :width].clamp(0, 1)
        return common.to_uint8(result), deviation.float().cpu().numpy()


def load_bridge(path: Path, device: torch.device) -> Bridge:
    """The bridge in a file bridge.pt, in evaluation mode. UserError for any other file."""
    checkpoint = common.read_checkpoint(path)
    if "bridge" not in checkpoint:
        raise UserError(f"{path}: a checkpoint without a bridge, expected one of the command train")
    bridge = Bridge(checkpoint["config"], len(checkpoint["bridge"]["photo_statistics"]))
    bridge.load_state_dict(checkpoint["bridge"])
    return bridge.to(device).eval().requires_grad_(False)


# ---- Training -----------------------------------------------------------------------------------
def recolor(images: Tensor, rng: torch.Generator, photos: Split, share: float) -> Tensor:
    """Gives a share of the images the colours of random photos. [B,3,H,W] -> [B,3,H,W]."""
    recolored = common.photo_style(photos)(images, rng)  # [B,3,H,W]
    chosen = common.draw(rng, len(images), 1, 1, 1) < share
    return torch.where(common.to_device(chosen, images.device), recolored, images)


def train_bridge(run: Run, args: Args, source: Split, photos: Split) -> Bridge:
    """Trains the reader, then the U-Net, in two stages of the run. Writes OUT/bridge.pt."""
    device = run.device
    config = {name: getattr(args, name) for name in ("patch", "width", "levels", "unet_steps")}
    config |= {"classes": list(run.classes), "size": list(args.size)}
    if args.benchmark == "own":
        config["own_values"] = list(source.dataset.values)
    bridge = Bridge(config, len(photos)).to(device)

    # Step 1: the reader is trained on the source, partly in photos' colours, and labels the photos.
    def restyle(images: Tensor, rng: torch.Generator) -> Tensor:
        return common.random_augmentation(recolor(images, rng, photos, args.reader_color), rng)

    common.train(run, bridge.reader, source, args.reader_steps, "reader", restyle, evaluated=False)
    bridge.reader.eval()
    if common.world_size() > 1:  # the statistics of batch normalisation differ by process
        for buffer in bridge.reader.buffers():
            torch.distributed.broadcast(buffer, 0)
    predicted, features = read(bridge.reader, photos.images, args.label_confidence)
    photos = replace(photos, labels=predicted)

    # Step 2: statistics of the photos, and of both domains together.
    bridge.photo_features.copy_(torch.from_numpy(features))
    statistics = [appearance(common.to_tensor(image[None], device)) for image in photos.images]
    bridge.photo_statistics.copy_(torch.cat(statistics))
    sample = [split.images[:: max(1, len(split) // 100)] for split in (source, photos)]
    sample = common.to_tensor(np.concatenate(sample), device)  # at most 199 of each domain
    x, statistics = bridge.to_cells(sample), appearance(sample)
    bridge.unet.mean.copy_(statistics.mean(dim=0))
    bridge.unet.std.copy_(statistics.std(dim=0).clamp(min=1e-3))  # it would be 0 for equal images
    bridge.mean.copy_(x.mean(dim=(0, 2, 3))[:, None, None])
    bridge.scale.copy_(x.std(dim=(0, 2, 3))[:, None, None].clamp(min=1e-3) ** args.whiten)

    # Step 3: the U-Net.
    train_unet(run, args, bridge, source, photos)
    if common.rank() == 0:
        common.save_checkpoint(run.out / "bridge.pt", config=config, bridge=bridge.state_dict())
    return bridge.eval().requires_grad_(False)


def train_unet(run: Run, args: Args, bridge: Bridge, source: Split, photos: Split) -> None:
    """Trains the U-Net by the squared error of v. At the end it has the averaged weights."""
    device, unet, steps = run.device, bridge.unet, args.unet_steps
    source_batch, photo_batch = args.batch_size // 2, (args.batch_size + 1) // 2
    decay = 1 - 1 / max(1, args.ema * steps)
    source_loader = common.Loader(source, source_batch, device, args.seed, "unet source")
    photo_loader = common.Loader(photos, photo_batch, device, args.seed, "unet photos")
    average, model = copy.deepcopy(unet).requires_grad_(False), common.parallel(unet)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.unet_lr, fused=True)
    for step in run.steps("unet", steps, unet=unet, average=average, optimizer=optimizer):
        lr = common.learning_rate(args.unet_lr, step, steps)
        common.set_lr(optimizer, lr)
        rng = common.generator(args.seed, "unet", step)

        # Step 1: a batch, half source and half photos; each image is flipped or not at random
        (images, labels), (photo_images, photo_labels) = source_loader(step), photo_loader(step)
        domain = torch.tensor([SOURCE] * len(images) + [TARGET] * len(photo_images))  # [B]
        images, labels = torch.cat([images, photo_images]), torch.cat([labels, photo_labels])
        images, labels = common.crop_flip(images, labels, rng, zoom=1.0)

        # Step 2: what is diffused, and the conditions
        domain = common.to_device(domain, device)
        x, statistics = bridge.to_cells(images), appearance(images)  # [B,K,h,w], [B,S]
        maps = class_shares(labels, len(run.classes), x.shape[2:])  # [B,C,h,w]

        # Step 3: noise. One angle in each of B equal intervals lowers the variance of the loss.
        order = torch.randperm(len(images), generator=rng)
        angle = (order + common.draw(rng, len(images))) / len(images) * math.pi / 2
        angle = common.to_device(angle, device)  # [B]
        cos, sin = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        seed = common.seed_of(args.seed, "unet noise", step, common.rank())
        noise_rng = torch.Generator(device).manual_seed(seed)  # on the device, which is faster
        noise = torch.randn(x.shape, generator=noise_rng, device=device)

        # Step 4: the U-Net and its average. v = cos(a) e - sin(a) x (arXiv:2202.00512v2)
        with run.autocast():
            v = model(cos * x + sin * noise, maps, angle, domain, statistics)
            loss = F.mse_loss(v, cos * noise - sin * x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), max_norm=1.0)
        optimizer.step()
        common.update_ema(average, unet, min(decay, step / (step + 9)))  # see --ema
        run.log(step, unet_loss=loss, unet_lr=lr)
    unet.load_state_dict(average.state_dict())


# ---- Checks -------------------------------------------------------------------------------------
@torch.no_grad()
def read(
    net: Network, images: np.ndarray, threshold: float = 0.0, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The reader's predictions and features of images, uint8 [N,H,W,3].

    -> the most probable classes, uint8 [N,H,W], IGNORE where their probability is below the
    threshold. Then features, float32 [N,C,D]: the input of the last layer, averaged over the region
    of each class. They are NaN where a class covers less than a hundredth of the image. The regions
    are those of `labels` [N,H,W] if given, else those of the predicted classes."""
    inputs, predicted, features, device = [], [], [], next(net.parameters()).device
    hook = net.body.head.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    for i in range(0, len(images), 16):
        logits = common.predict(net, images[i : i + 16], device)
        confidence, best = logits.softmax(dim=1).max(dim=1)  # [B,H,W] each
        best = torch.where(confidence >= threshold, best, datasets.IGNORE)
        predicted.append(best.byte().cpu().numpy())
        regions = best if labels is None else torch.from_numpy(labels[i : i + 16]).to(device)
        x = inputs.pop().float()  # [B,D,H/4,W/4]
        shares = class_shares(regions, net.num_classes, x.shape[2:]).flatten(2)  # [B,C,P]
        mean = shares @ x.flatten(2).mT / shares.sum(dim=2, keepdim=True)  # [B,C,D]
        mean[shares.mean(dim=2) < 0.01] = math.nan
        features.append(mean.cpu().numpy())
    hook.remove()
    return np.concatenate(predicted), np.concatenate(features)


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """KID: the unbiased squared MMD of two sets of features, [N,D] and [M,D], with the kernel
    (x.y / D + 1)^3 (arXiv:1801.01401). Rows of NaN, of images that lack the class, are left out;
    NaN if fewer than 8 rows remain in a set. The features of the reader have no natural scale:
    one shift and one factor for both sets give `y` mean 0 and, on average, variance 1."""
    x, y = (z[~np.isnan(z[:, 0])] for z in (x, y))
    n, m = len(x), len(y)
    if min(n, m) < 8:
        return math.nan
    mean, std = y.mean(axis=0, dtype=np.float64), y.std(axis=0, dtype=np.float64)
    x, y = ((z - mean) / np.sqrt((std**2).mean()) for z in (x, y))
    xx, yy, xy = ((a @ b.T / a.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    within_x = (xx.sum() - xx.trace()) / (n * (n - 1))
    within_y = (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())


def affine_share(before: np.ndarray, after: np.ndarray) -> float:
    """Share of the squared change that one affine map of each image's colours explains: 1 for such
    a map, NaN where nothing has changed. uint8 [N,H,W,3] twice.

    It is 1 - sum |y - A x - b|^2 / sum |y - x|^2, A and b by least squares in each image.
    """
    residual, change = 0.0, 0.0
    for old, new in zip(before, after, strict=True):
        x = old.reshape(-1, 3).astype(np.float64)
        y = new.reshape(-1, 3) - x
        x = np.column_stack([x, np.ones(len(x))])
        residual += np.square(y - x @ np.linalg.lstsq(x, y, rcond=None)[0]).sum()
        change += np.square(y).sum()
    return float(1 - residual / change) if change else math.nan


def borders(labels: np.ndarray) -> np.ndarray:
    """Pixels whose right or lower neighbour has another label. [H,W] -> bool [H,W]."""
    result = np.zeros(labels.shape, bool)
    result[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    result[:-1] |= labels[1:] != labels[:-1]
    return result


def edge_agreement(image: np.ndarray, labels: np.ndarray) -> float:
    """The probability that the gradient of the luminance is greater at a pixel of a border than at
    another one (area under the ROC curve; 0.5 is chance). Equal gradients count half. NaN where
    there is no border. image uint8 [H,W,3], labels [H,W] of any ids."""
    luma = luminance(common.to_tensor(image[None], torch.device("cpu")))[0].numpy()  # [H,W]
    gradient = np.zeros(luma.shape)  # squared
    gradient[:, :-1] += np.diff(luma, axis=1) ** 2
    gradient[:-1] += np.diff(luma, axis=0) ** 2
    _, place, counts = np.unique(gradient, return_inverse=True, return_counts=True)
    rank = (counts.cumsum() - (counts - 1) / 2)[place.ravel()]  # from 1; equal values share one
    edge = borders(labels).ravel()
    n, m = edge.sum(), (~edge).sum()
    wins = rank[edge].sum() - n * (n + 1) / 2  # Mann-Whitney U
    return float(wins / (n * m)) if n and m else math.nan


def agreement(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of valid pixels whose predicted class equals the label; 1 for an image without valid
    pixels. [N,H,W] twice -> [N]."""
    valid = labels != datasets.IGNORE
    right = ((predicted == labels) & valid).sum(axis=(1, 2))
    return np.where(valid.any(axis=(1, 2)), right / np.maximum(valid.sum(axis=(1, 2)), 1), 1.0)


CHECKS = {  # what each of them measures, whether more of it is better, and what it needs
    "kid": ("distance to photos, in a small network, not Inception", False, "8 images and photos"),
    "edges": ("image edges along the borders of the masks", True, "masks of more than one class"),
    "agreement": ("pixels in which the reader's class is that of the mask", True, "--mask-labels"),
}


def check(
    bridge: Bridge, before: np.ndarray, after: np.ndarray, masks: np.ndarray, labelled: bool
) -> dict[str, Any]:
    """CHECKS of a translated set; None where a value cannot be computed, no agreement without
    labels. before, after: uint8 [N,H,W,3]; masks [N,H,W]: train ids if `labelled`, else any ids,
    whose borders alone are used."""
    table, distances, photos = {}, [], bridge.photo_features.cpu().numpy()  # [M,C,D]
    regions = masks if labelled else read(bridge.reader, before)[0]
    for when, images in (("before", before), ("after", after)):
        predicted, features = read(bridge.reader, images, labels=regions)
        sets = zip(features.swapaxes(0, 1), photos.swapaxes(0, 1), strict=True)  # of each class
        distances.append([kernel_distance(x, y) for x, y in sets])
        edges = np.array([edge_agreement(i, m) for i, m in zip(images, masks, strict=True)])
        table[f"edges_{when}"] = math.nan if np.isnan(edges).all() else float(np.nanmean(edges))
        if labelled:
            table[f"agreement_{when}"] = float(agreement(predicted, masks).mean())
    pairs = zip(bridge.config["classes"], *distances, strict=True)
    kid = {name: [a, b] for name, a, b in pairs if not math.isnan(a + b)}
    for i, when in enumerate(("before", "after")):
        values = [pair[i] for pair in kid.values()]
        table[f"kid_{when}"] = float(np.mean(values)) if values else math.nan
    table["affine_share"] = affine_share(before, after)
    table = {key: None if math.isnan(value) else value for key, value in table.items()}
    return table | {"kid_of_classes": kid}


def verdict(table: dict[str, Any], unet_steps: int) -> list[str]:
    """What the checks say, in lines of words. The last line is the verdict."""
    lines, results = [], []
    for key, (meaning, more_is_better, needs) in CHECKS.items():
        before, after = table.get(f"{key}_before"), table.get(f"{key}_after")
        if before is None or after is None:
            lines.append(f"{key}: not computed, since it needs {needs}")
        else:
            result = "better" if (after > before) == more_is_better else "worse"
            result = "equal" if after == before else result
            results.append(f"{key} {result}")
            lines.append(f"{key}: {meaning}: {before:.3f} -> {after:.3f}, {result}")
    if kid := table["kid_of_classes"]:
        changes = [f"{name} {before:.1f} -> {after:.1f}" for name, (before, after) in kid.items()]
        lines.append(f"kid by class: {', '.join(changes)}")
    if table["affine_share"] is not None:
        lines.append(f"an affine colour map explains {table['affine_share']:.2f} of the change")
    lines.append(f"encoded noise: {table['noise_deviation']:.2f} (1 is right near --strength 1)")
    if unet_steps < 500:  # it then adds noise and does little else
        lines.append(f"{unet_steps} updates of the U-Net are too few: this is no bridge yet")
    return [*lines, f"verdict: {', '.join(results) or 'nothing to compare'}"]


def draw_translations(path: Path, columns: dict[str, np.ndarray], masks: np.ndarray) -> None:
    """Draws up to five images of each column, uint8 [N,H,W,3], and those of "source" and
    "translated" once more, with the borders of the masks, [N,H,W] of any ids, in yellow."""
    count = min(5, *map(len, columns.values()))
    shown = {title: x[datasets.spaced(len(x), count)] for title, x in columns.items()}
    masks = masks[datasets.spaced(len(masks), count)]
    edges = np.stack([borders(mask) for mask in masks])[..., None]
    yellow = np.array([255, 230, 0], np.uint8)
    for title in ("source", "translated"):
        shown[f"mask on {title}"] = np.where(edges, yellow, shown[title])
    common.draw_sheet(path, shown, ())


# ---- The benchmark's row ------------------------------------------------------------------------
def run(args: Args) -> Result:
    """Trains the bridge, translates the source, and trains the network on the translations."""
    run = Run(args, "diffusion_bridge", stages=4)
    if run.result:
        return run.result
    args = fill_in(run.args)
    run.begin()
    net, folder, n = run.network(), run.out / "set", args.batch_size
    source, photos = datasets.load(args, "source"), datasets.load(args, "target_unlabelled")

    # Step 1: the reader and the U-Net. First the file of Step 2, so that a full disk fails now.
    if common.rank() == 0:
        if not (folder / "images.npy").exists():  # deleted meanwhile: translate all images again
            (run.out / "stage_translate.pt").unlink(missing_ok=True)
        images = datasets.create_array(folder / "images.npy", source.images.shape)
    bridge = train_bridge(run, args, source, photos)

    # Step 2: the source is translated into OUT/set; each process translates a part of every batch
    for step in run.steps("translate", math.ceil(len(source) / n)):
        batch = np.arange((step - 1) * n, min(step * n, len(source)))
        result = torch.zeros(len(batch), *args.size, 3, dtype=torch.uint8, device=run.device)
        own = np.array_split(np.arange(len(batch)), common.world_size())[common.rank()]
        if len(own):
            rows = batch[own]
            names = [source.names[i] for i in rows]
            with run.autocast():
                new, _ = bridge.translate(source.images[rows], source.labels[rows], names, args)
            result[own] = torch.from_numpy(new).to(run.device)
        if common.world_size() > 1:
            torch.distributed.all_reduce(result)  # a sum: each image is 0 in all processes but one
        if common.rank() == 0:
            images[batch] = result.cpu().numpy()
    if common.rank() == 0:
        images.flush()
        datasets.save_set(folder, source, source.labels, source.names)
    common.barrier()  # until rank 0 has written the set
    translated = datasets.load_set(folder, source.dataset, args.size)

    # Step 3: checks of up to 1000 images, the noise of the first batch of them, and a figure
    if common.rank() == 0:
        part = np.arange(0, len(source), math.ceil(len(source) / 1000))
        before, after, labels = source.images[part], translated.images[part], source.labels[part]
        table = check(bridge, before, after, labels, True)
        names = [source.names[i] for i in part[:n]]
        with run.autocast():
            _, noise = bridge.translate(before[:n], labels[:n], names, args)
        table["noise_deviation"] = float(noise.mean())
        run.say("\n".join(verdict(table, args.unet_steps)))
        datasets.write_json(run.out / "checks.json", table)
        columns = {"source": before, "translated": after, "photo": photos.images}
        draw_translations(run.out / "figures/translation.png", columns, labels)

    # Step 4: the segmentation network. "source" seeds the batches, which are those of the baselines
    common.train(run, net, translated, args.steps, "source")
    updates = f"{args.unet_steps} U-Net updates, {args.reader_steps} of the reader"
    return run.finish(net, target_labels=0, other_updates=updates)


def train(args: Args) -> None:
    """The command `train`: trains reader and U-Net, and writes OUT/bridge.pt."""
    for name in ("bridge", "strength", "noise_floor", "statistics", "sample_steps"):
        if getattr(args, name) != getattr(Args, name):
            raise UserError(f"--{name.replace('_', '-')}: has no effect in the command train")
    run = Run(args, "diffusion_bridge_train", stages=2)
    if not run.result:
        args = fill_in(run.args)
        run.begin()
        source, photos = (datasets.load(args, role) for role in ("source", "target_unlabelled"))
        train_bridge(run, args, source, photos)
        run.complete(Result(args.benchmark, run.method, args.seed))
        run.say(f"written: {run.out / 'bridge.pt'}")
    elif not (run.out / "bridge.pt").exists():
        raise UserError(f"{run.out / 'bridge.pt'}: is missing; --no-resume trains it again")


# ---- A folder -----------------------------------------------------------------------------------
class Pair(NamedTuple):
    image: Path
    mask: Path
    name: str  # path of the image below INPUT_DIR, and of its translation below OUTPUT_DIR
    mask_name: str  # path of the mask's copy below OUTPUT_DIR
    size: tuple[int, int]  # width, height


def find_pairs(
    inputs: Path, mask_dir: Path, dataset: datasets.Dataset | None
) -> tuple[list[Pair], int]:
    """Images with their masks, sorted by size and path, and the number of files that are ignored:
    foreign ones (`datasets.is_foreign`), masks without an image, and GTA5's unusable frames.
    UserError for an image without a mask, or where masks would overwrite images."""
    both, ignored = [], 0
    for folder, other_folder in ((inputs, mask_dir), (mask_dir, inputs)):
        by_stem: dict[str, Path] = {}  # by the path below the folder, without its suffix
        pictures, others = datasets.find_images(folder, "**/*")
        paths = [folder / path for path in (*pictures.values(), *others)]
        # Files of the other folder are left out if that lies in this one, perhaps by a link.
        parents = set(chain(*(path.parents for path in paths))) - {*folder.parents}
        nested = {parent for parent in parents if parent.resolve() == other_folder}
        ignored += sum(nested.isdisjoint(path.parents) for path in paths[len(pictures) :])
        for name, path in pictures.items():
            if nested.isdisjoint((folder / path).parents):
                stem = str(Path(name).with_suffix(""))
                if stem in by_stem:
                    first = by_stem[stem].name
                    raise UserError(f"{folder / path}: differs from {first} by its suffix alone")
                by_stem[stem] = folder / path
        both.append(by_stem)
    images, masks = both
    if not images:
        raise UserError(f"{inputs}: no image, expected .png, .jpg or .jpeg files")
    mask_below = mask_dir.relative_to(inputs) if mask_dir.is_relative_to(inputs) else Path("masks")
    pairs = []
    for stem, image in sorted(images.items()):
        if stem not in masks:
            raise UserError(f"{image}: has no mask, --mask-dir needs {mask_dir / stem}.png")
        mask = masks[stem]
        size = datasets.size_of_labelled(image)
        with datasets.open_image(mask, decode=False) as picture:
            mask_size = picture.size
        if size != mask_size:
            if dataset is datasets.GTA5 and f"images/{image.stem}.png" in datasets.GTA5_MISMATCHED:
                ignored += 1
                continue
            raise UserError(f"{mask}: width and height are {mask_size}, but {size} in its image")
        mask_name = (mask_below / mask.relative_to(mask_dir)).as_posix()
        pairs.append(Pair(image, mask, image.relative_to(inputs).as_posix(), mask_name, size))
    same = {pair.name for pair in pairs} & {pair.mask_name for pair in pairs}
    if same:
        raise UserError(f"{mask_dir}: masks would overwrite images, such as {min(same)}")
    ignored += len(masks.keys() - images.keys())
    return sorted(pairs, key=lambda pair: pair.size), ignored


def read_mask(pair: Pair, dataset: datasets.Dataset | None) -> np.ndarray:
    """A mask's train ids, uint8 [H,W]. Without a dataset, int32: a number for each id or colour."""
    if dataset:
        return datasets.read_label(pair.mask, dataset, pair.image)
    values = np.atleast_3d(datasets.open_image(pair.mask)).astype(np.int32)  # [H,W,channels]
    return values @ 256 ** np.arange(values.shape[2], dtype=np.int32)


def write_pair(
    args: TranslateArgs, pair: Pair, new: np.ndarray, share: float, noise: float
) -> dict[str, Any]:
    """Writes a translation, uint8 [H,W,3], in its image's file format, and a copy of the mask;
    neither if `share`, its agreement, is below --min-agreement. Keeps grey (16 bits too, but 256
    levels) and alpha (8 bits); palettes become RGB. -> the image's entry in the batch's record."""
    out, left_out = args.output_dir.resolve(), bool(share < args.min_agreement)
    record = {
        "image": pair.name,
        "mask": pair.mask_name,
        "left_out": left_out,
        "seed": common.seed_of(args.seed, pair.name),
        "agreement": float(share),
        "noise_deviation": float(noise),
        "source_sha256": datasets.sha256(pair.image),
        "mask_sha256": datasets.sha256(pair.mask),
        "output_sha256": None,
    }
    if left_out:
        for name in (pair.name, pair.mask_name):  # those of an earlier version of the input
            (out / name).unlink(missing_ok=True)
        return record
    picture = Image.fromarray(new)
    with datasets.open_image(pair.image, False) as old:  # the pixels are read for their alpha alone
        if old.mode in ("1", "L", "LA") or old.mode.startswith("I"):
            picture = picture.convert("L")
        if old.mode.startswith("I"):
            picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        elif old.has_transparency_data:
            picture.putalpha(old.convert("RGBA").getchannel("A"))
        with datasets.replacing(out / pair.name) as temporary:
            picture.save(temporary, format=old.format, quality=95)
    with datasets.replacing(out / pair.mask_name) as temporary:
        shutil.copyfile(pair.mask, temporary)
    return {**record, "output_sha256": datasets.sha256(out / pair.name)}


def translate_folder(args: TranslateArgs) -> None:
    """The command `translate`. The batches depend on the input and --batch-size alone. So a run
    that is continued, or has several processes, writes the same bytes on the same machine. A batch
    is skipped if it has a record in OUTPUT_DIR/.records and all files of this record exist."""
    if args.config:  # Parse again: the file's options first, then the flags, which override them.
        try:
            text = args.config.read_text()
            options = json.loads(text) if args.config.suffix == ".json" else tomllib.loads(text)
            flags = [f"--{key}={value}" for key, value in options.items()]
        except (ValueError, AttributeError) as error:
            raise UserError(f"{args.config}: neither TOML nor a JSON object ({error})") from error
        datasets.note(f"{args.config}: {' '.join(flags)}")
        args = common.parse(TranslateArgs, __doc__, [*flags, *sys.argv[1:]])
    noise_levels(args)
    if args.batch_size < 1 or args.seed < 0 or not 0 <= args.min_agreement < math.inf:
        raise UserError("expected a --batch-size from 1, a --seed and --min-agreement from 0")
    for name in ("input_dir", "output_dir", "checkpoint"):
        if getattr(args, name) is None:
            raise UserError(f"--{name.replace('_', '-')}: not given")
    inputs, out = args.input_dir.resolve(), args.output_dir.resolve()
    mask_dir = (args.mask_dir or args.input_dir / "masks").resolve()
    for flag, folder in (("--input-dir", inputs), ("--mask-dir", mask_dir)):
        if not folder.is_dir():
            raise UserError(f"{flag} {folder}: no such folder")
        if out.is_relative_to(folder) or folder.is_relative_to(out):
            raise UserError(f"--output-dir {out}: inside, around or equal to {flag} {folder}")
    if mask_dir == inputs:
        raise UserError(f"--mask-dir {mask_dir}: the same folder as --input-dir")
    device = torch.device(common.join_processes("auto"))
    bridge = load_bridge(args.checkpoint, device)
    classes = bridge.config["classes"]
    dataset = datasets.DATASETS.get(args.mask_labels)  # None: the masks' labels are not known
    if args.mask_labels == "own":
        values = tuple(bridge.config.get("own_values", ()))
        if not values:
            raise UserError(f"--mask-labels own: {args.checkpoint} was not trained on own data")
        dataset = datasets.Dataset("source", "", (), tuple(classes), values)
    if dataset and classes != [*dataset.classes]:
        raise UserError(f"--mask-labels {args.mask_labels}: the checkpoint has other classes")

    # Step 1: batches of images of one size
    pairs, ignored = find_pairs(inputs, mask_dir, dataset)
    batches = []
    for group in [list(group) for _, group in groupby(pairs, key=lambda pair: pair.size)]:
        n = max(1, min(args.batch_size, MAX_PIXELS // math.prod(group[0].size)))
        batches += [group[i : i + n] for i in range(0, len(group), n)]
    records = []  # One file for each batch. Its name depends on the input's paths, times and sizes.
    for batch in batches:
        files = [path.stat() for pair in batch for path in (pair.image, pair.mask)]
        stamp = [(p.name, p.mask_name) for p in batch], [(f.st_mtime_ns, f.st_size) for f in files]
        records.append(out / f".records/{common.seed_of(repr(stamp)):014x}.json")

    # Step 2: a new output folder, or one begun with these settings that holds no other images
    for folder in {path.parent.resolve() for p in pairs for path in (p.image, p.mask)}:
        if out.is_relative_to(folder):
            raise UserError(f"--output-dir {out}: inside {folder}, which has images or masks")
    for folder in sorted({(out / n).parent for pair in pairs for n in (pair.name, pair.mask_name)}):
        if folder.resolve() != folder:
            raise UserError(f"{folder}: leads to {folder.resolve()}, outside of --output-dir")
    settings = {**asdict(args), "checkpoint": datasets.sha256(args.checkpoint)}
    for name in ("input_dir", "mask_dir", "output_dir", "config"):
        del settings[name]  # a folder may be moved, and continued from there
    metadata = out / "metadata.json"
    if before := common.read_json(metadata).get("settings"):
        for name, value in settings.items():
            if before.get(name) != value:
                raise UserError(f"{out}: begun with another {name}; give another --output-dir")
        names = {normalize("NFC", name) for pair in pairs for name in (pair.name, pair.mask_name)}
        for path in sorted(out.rglob("*")):
            name = normalize("NFC", path.relative_to(out).as_posix())
            if path.is_file() and not datasets.is_foreign(name) and name not in names:
                raise UserError(f"{path}: of other images or masks; give another --output-dir")
    elif out.exists() and any(path.name[0] != "." for path in out.iterdir()):
        raise UserError(f"{out}: not empty, and no translation; give another --output-dir")
    common.barrier()  # No process writes before all have looked into the folder.
    if common.rank() == 0:
        datasets.write_json(metadata, {"complete": False, "settings": settings})
        datasets.delete_leftovers(out, ".*.tmp", age=60)
        current = set(records)
        for record in out.glob(".records/*.json"):  # keep those of this input whose files exist
            images = common.read_json(record).get("images", [])  # [] where the file is damaged
            written = [out / i[k] for i in images if not i["left_out"] for k in ("image", "mask")]
            if record not in current or not images or not all(path.exists() for path in written):
                record.unlink()
    common.barrier()

    # Step 3: translate what is missing, each process its share of the batches
    datasets.note(f"{len(pairs)} images in {len(batches)} batches -> {out}; {device}")
    own = range(common.rank(), len(batches), common.world_size())
    previous: tuple[Path, Any] | None = None  # the batch that threads write: record and images

    def record_previous() -> None:
        if previous:
            datasets.write_json(previous[0], {"images": list(previous[1])})

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number in datasets.show_progress(own, "translating"):
            batch = batches[number]
            if records[number].exists():
                continue
            # Threads read and write the files, which take longer than the network on a GPU.
            old = np.stack([*pool.map(lambda pair: datasets.read_image(pair.image), batch)])
            masks = [*pool.map(partial(read_mask, dataset=dataset), batch)]
            labels = np.stack(masks) if dataset else read(bridge.reader, old)[0]  # [B,H,W]
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                new, noise = bridge.translate(old, labels, [pair.name for pair in batch], args)
            shares = agreement(read(bridge.reader, new)[0], labels)
            record_previous()
            images = pool.map(partial(write_pair, args), batch, new, shares, noise)
            previous = records[number], images
        record_previous()

    # Step 4: the process that is last checks up to 1000 images at the size of training. Several
    # that end at the same time all do so, and write the same bytes.
    if not all(record.exists() for record in records):
        return
    images = [image for record in records for image in common.read_json(record)["images"]]
    kept = [p for p, i in zip(pairs, images, strict=True) if not i["left_out"]]
    table = {"left_out": len(pairs) - len(kept)}
    if kept:
        sample, size = kept[:: math.ceil(len(kept) / 1000)], bridge.config["size"]
        before = np.stack([datasets.read_image(pair.image, size) for pair in sample])
        after = np.stack([datasets.read_image(out / pair.name, size) for pair in sample])
        masks = np.stack([datasets.resize_label(read_mask(p, dataset), size) for p in sample])
        table["noise_deviation"] = sum(i["noise_deviation"] for i in images) / len(images)
        table |= check(bridge, before, after, masks, dataset is not None)
    content = {"settings": settings, "checks": table, "ignored": ignored, "images": images}
    content |= {"complete": True, "commit": common.commit(), "torch": torch.__version__}
    datasets.write_json(metadata, content)
    print(f"{len(kept)} images in {out}, {table['left_out']} left out by --min-agreement")
    if ignored:
        print(f"{ignored} files ignored: foreign, masks without an image, GTA5's unusable frames")
    if kept:
        print(*verdict(table, bridge.config["unet_steps"]), sep="\n", flush=True)
        sheet = out.with_name(f"{out.name}-sheet.png")  # outside, since loaders may read all in it
        if os.access(out.parent, os.W_OK) and not sheet.exists():  # perhaps a file of the user's
            draw_translations(sheet, {"source": before, "translated": after}, masks)
            print(f"pictures: {sheet}", flush=True)


# ---- Command line -------------------------------------------------------------------------------
def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in ("train", "translate"):
        sys.argv[:2] = [f"{sys.argv[0]} {command}"]  # the name that --help shows
    if command == "translate":
        common.main(TranslateArgs, translate_folder, __doc__)
    else:
        common.main(Args, train if command == "train" else run, __doc__)


if __name__ == "__main__":
    main()
