"""Makes synthetic scenes look like photos by a dual diffusion bridge; their masks stay as they are.

One denoising U-Net learns both domains. An image is encoded into noise along the probability flow
of the source and decoded along that of the photos: DDIB (arXiv:2203.08382v4), with v-prediction and
cosine schedule (arXiv:2202.00512v2) and classifier-free guidance (arXiv:2207.12598). Three uses:

    python diffusion_bridge.py                     (the benchmark's row: fit, translate, train)

    python diffusion_bridge.py train --out runs/bridge              (writes runs/bridge/bridge.pt)

    python diffusion_bridge.py translate --input-dir A --mask-dir A/masks --output-dir B
    --checkpoint runs/bridge/bridge.pt                              (a folder to a folder)

The first takes about six minutes on one CPU core and ends at 65 mIoU on the miniature, source-only
at 44. No label of a photo is used. Every translated set is checked, before and after: kernel
distance of features to the photos, edges along the mask's borders, and what a frozen network reads.

Letters beside those of common.py: K channels and h x w cells of the space that is diffused. Noise
levels are angles a from 0, the image x, to pi/2, noise e: x_a = cos(a) x + sin(a) e.
"""

import contextlib
import copy
import fcntl
import hashlib
import io
import json
import math
import os
import shutil
import sys
import tempfile
import time
import tomllib
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common
from common import Batches, Network, Part, Result, Run, UserError

LOOKS = ("brightness", "contrast", "saturation", "warmth", "haze")
Look = Literal["brightness", "contrast", "saturation", "warmth", "haze"]
SOURCE, TARGET, NEITHER = 0, 1, 2  # the domain condition


@dataclass(frozen=True, kw_only=True)
class Sampling:
    bridge: Literal["ddib", "sdedit"] = "ddib"
    """ddib: encode along the source's flow, decode along the target's. sdedit: add noise, denoise
    along the target's (arXiv:2108.01073)."""
    strength: float = 0.97
    """How far towards noise, as a share of the way."""
    sample_steps: int = 16
    """Evaluations of the U-Net each way."""
    guidance: float = 1.0
    """Classifier-free guidance towards the photos; 1 for none, else every step costs twice."""
    keep_low: float = 0.0
    """Share of the source's low frequencies of luminance that every decoding step keeps (ILVR,
    arXiv:2108.02938, there 1, of all colours)."""
    keep_edges: float = 0.0
    """Likewise its high frequencies along the label map's borders."""
    match: tuple[Look, ...] = LOOKS
    """Which statistics of a photo steer the translation."""
    reference: Path | None = None
    """The photo to match. Default: another one of the training photos for each image."""
    min_agreement: float = 0.0
    """Least share of an image's pixels that a frozen network must read as the labels say; images
    below are left out."""
    judge: Path | None = None
    """A segmentation checkpoint whose mIoU against the masks is also told, before and after. One
    trained on photos uses their labels; nothing but the report sees it."""


@dataclass(frozen=True, kw_only=True)
class Args(common.Args, Sampling):
    unet_steps: int | None = None
    """Updates of the U-Net. Default: one and a half times --steps."""
    reader_steps: int | None = None
    """Updates of the reader, a small segmentation network that is trained on the source in the
    photos' colours: it labels the photos for the U-Net and checks the result. Default: --steps."""
    reader_color: float = 0.5
    """Share of the reader's images that get the colours of a random photo."""
    width: int = 32
    """Channels of the U-Net's finest level; twice and four times as many at the next two."""
    patch: Literal[2, 4, 8] = 2
    """Side in pixels of the patches whose Haar coefficients are the channels of a cell."""
    latent: int = 0
    """Channels of the latent space of a small autoencoder on top of the patches; 0 for none."""
    latent_steps: int | None = None
    """Updates of the autoencoder. Default: --steps."""
    whiten: float = 0.5
    """Power of its standard deviation that each channel is divided by."""
    unet_lr: float = 2e-3
    """Initial learning rate of the U-Net and of the autoencoder."""
    ema: float = 0.995
    """Decay of the averaged weights, which are the ones that sample."""
    drop_domain: float = 0.1
    """Share of images that the U-Net sees without domain, for guidance."""
    drop_labels: float = 0.15
    """Share of images that it sees without label map."""
    drop_looks: float = 0.15
    """Share of each statistic of appearance that it does not see."""
    label_confidence: float = 0.5
    """Least probability of the reader's labels of photos."""
    control: Literal["none", "identity", "color", "fourier"] = "none"
    """Instead of the bridge: nothing, colour transfer or FDA from a random photo."""
    control_band: float = 0.03
    """FDA's beta of the control."""
    augment: bool = False
    """Blur, colour jitter or RGB shift at random while the segmentation network is trained."""


@dataclass(frozen=True, kw_only=True)
class TranslateArgs(Sampling):
    input_dir: Path
    """Folder of images, with any folders in it."""
    output_dir: Path
    """Folder to write; the same command goes on where it was cut off."""
    checkpoint: Path
    """bridge.pt of a training run."""
    mask_dir: Path | None = None
    """Folder of masks, one for each image, of the same path but for the suffix. Default:
    INPUT_DIR/masks."""
    mask_labels: Literal["none", "vkitti2", "kitti", "gta5", "cityscapes"] = "none"
    """How masks are read as labels; none: they are any ids or colours, only their borders count,
    and the reader labels the images."""
    config: Path | None = None
    """TOML or JSON file of these options; flags override it."""
    tile: tuple[int, int] | None = None
    """Height and width of the tiles of large images. Default: the size of training."""
    overlap: int = 32
    """Pixels that neighbouring tiles share."""
    scale: float = 1.0
    """Translate at this scale; what the image has beyond its resolution is added back."""
    batch_size: int = 16
    """Images of equal size that are translated together."""
    seed: int = 0
    """With an image's name it decides the photo to match, and SDEdit's noise."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1."""
    amp: bool = True
    """bfloat16 autocast, on CUDA only."""


# ---- The space that is diffused -----------------------------------------------------------------
def haar(x: Tensor, levels: int) -> Tensor:
    """Orthonormal Haar coefficients of 2^levels x 2^levels patches, its own inverse up to `unhaar`.

    [B,K,H,W] -> [B,K*4^levels,H/2^levels,W/2^levels].
    """
    for _ in range(levels):
        x = hadamard(F.pixel_unshuffle(x, 2))
    return x


def unhaar(x: Tensor, levels: int) -> Tensor:
    for _ in range(levels):
        x = F.pixel_shuffle(hadamard(x), 2)
    return x


def hadamard(x: Tensor) -> Tensor:
    """Mean and differences (times 2) of each four channels; orthonormal and its own inverse."""
    a, b, c, d = x.unflatten(1, (-1, 4)).unbind(2)  # [B,K,h,w] each
    bands = (a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d)
    return torch.stack(bands, dim=2).flatten(1, 2) / 2


class Space(nn.Module):
    """images [B,3,H,W] in [0,1] <-> x [B,K,h,w]: Haar coefficients of patches, or with `latent` the
    channels of an autoencoder on them; shifted and scaled by what `fit` has measured."""

    def __init__(self, patch: int, latent: int, width: int = 64) -> None:
        super().__init__()
        self.levels, self.latent, k = int(math.log2(patch)), latent, 3 * patch**2
        self.channels = latent or k
        if latent:
            conv = partial(nn.Conv2d, kernel_size=3, padding=1)
            self.down = nn.Sequential(conv(k, width), nn.SiLU(), conv(width, latent))
            self.up = nn.Sequential(conv(latent, width), nn.SiLU(), conv(width, k))
        self.register_buffer("mean", torch.zeros(self.channels, 1, 1))
        self.register_buffer("scale", torch.ones(self.channels, 1, 1))

    def encode(self, images: Tensor) -> Tensor:
        x = haar(2 * images - 1, self.levels)
        x = self.down(x) if self.latent else x
        return (x - self.mean) / self.scale

    def decode(self, x: Tensor) -> Tensor:
        x = x * self.scale + self.mean
        x = self.up(x) if self.latent else x
        return (unhaar(x, self.levels) + 1) / 2

    @torch.no_grad()
    def fit(self, images: Tensor, whiten: float) -> None:
        """Mean, and standard deviation to the power `whiten`, of each channel of these images."""
        self.mean.zero_()
        self.scale.fill_(1)
        x = self.encode(images)
        self.mean.copy_(x.mean(dim=(0, 2, 3)).view(-1, 1, 1))
        self.scale.copy_(x.std(dim=(0, 2, 3)).view(-1, 1, 1) ** (1.0 if self.latent else whiten))


def looks(images: Tensor) -> Tensor:
    """Statistics of appearance, in the order of LOOKS. [B,3,H,W] in [0,1] -> [B,5].

    Haze is the mean of the dark channel: the least of the colours in a neighbourhood, which is
    near 0 in clear air (He et al., CVPR 2009), here over an eighth of the height.
    """
    luma, side = luminance(images), max(1, images.shape[2] // 8)
    dark = -F.max_pool2d(-images.amin(dim=1, keepdim=True), side)
    return torch.stack([
        luma.mean(dim=(1, 2, 3)),
        luma.std(dim=(1, 2, 3)),
        (images.amax(dim=1) - images.amin(dim=1)).mean(dim=(1, 2)),
        (images[:, 0] - images[:, 2]).mean(dim=(1, 2)),
        dark.mean(dim=(1, 2, 3)),
    ], dim=1)  # fmt: skip


def luminance(images: Tensor) -> Tensor:
    """[B,3,H,W] -> [B,1,H,W], Rec. 601."""
    weights = torch.tensor([0.299, 0.587, 0.114], dtype=images.dtype).view(3, 1, 1)
    return (images * common.send(weights, images.device)).sum(dim=1, keepdim=True)


# ---- The U-Net ----------------------------------------------------------------------------------
class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of each cell: a group norm's statistics are those of
    the whole picture, so that a tile would be normalised unlike the image that it is cut from."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Block(nn.Module):
    """A residual block whose second normalisation is scaled and shifted by the embedding."""

    def __init__(self, i: int, o: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ChannelNorm(i), ChannelNorm(o, elementwise_affine=False)
        self.conv1, self.conv2 = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(o, o, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * o)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        y = self.conv2(F.silu(self.norm2(y) * (1 + scale) + shift))
        return self.skip(x) + y


@lru_cache(maxsize=8)
def neighbours(h: int, w: int, radius: int, device: torch.device) -> Tensor:
    """Which cells of an h x w grid are at most `radius` rows and columns apart. bool [hw,hw]."""
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    near = [(c.flatten()[:, None] - c.flatten()).abs() <= radius for c in (y, x)]
    return (near[0] & near[1]).to(device)


class LocalAttention(nn.Module):
    """Self-attention of each cell to its neighbourhood. [B,K,h,w] -> [B,K,h,w]."""

    def __init__(self, width: int, radius: int = 4, head: int = 32) -> None:
        super().__init__()
        self.norm, self.radius, self.heads = ChannelNorm(width), radius, width // head or 1
        self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        b, k, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.heads, k // self.heads, h * w)
        q, key, value = qkv.mT.unbind(dim=1)  # [B,heads,hw,K/heads]
        near = neighbours(h, w, self.radius, x.device)
        y = F.scaled_dot_product_attention(q, key, value, attn_mask=near)
        return x + self.out(y.mT.reshape(b, k, h, w))


class UNet(nn.Module):
    """v = cos(a) e - sin(a) x from x_a, its angle, and conditions that may each be missing.

    x [B,K,h,w], angle [B], domain [B] int64, maps [B,C,h,w] shares of the classes in a cell (all 0:
    not known), look [B,2L] statistics and whether each is given -> [B,K,h,w]. h, w multiples of 4.
    """

    def __init__(self, channels: int, classes: int, width: int) -> None:
        super().__init__()
        w1, w2, w3, e = width, 2 * width, 4 * width, 4 * width
        self.time = nn.Sequential(nn.Linear(16, e), nn.SiLU(), nn.Linear(e, e))
        self.domain, self.look = nn.Embedding(3, e), nn.Linear(2 * len(LOOKS), e)
        self.enter = nn.Conv2d(channels + classes, w1, 3, padding=1)
        self.down1, self.down2, self.down3 = Block(w1, w1, e), Block(w2, w2, e), Block(w3, w3, e)
        self.to2 = nn.Conv2d(w1, w2, 3, stride=2, padding=1)
        self.to3 = nn.Conv2d(w2, w3, 3, stride=2, padding=1)
        self.attend, self.middle = LocalAttention(w3), Block(w3, w3, e)
        self.up2, self.up1 = Block(w3 + w2, w2, e), Block(w2 + w1, w1, e)
        self.norm, self.leave = ChannelNorm(w1), nn.Conv2d(w1, channels, 3, padding=1)
        nn.init.zeros_(self.leave.weight)

    def forward(
        self, x: Tensor, angle: Tensor, domain: Tensor, maps: Tensor, look: Tensor
    ) -> Tensor:
        waves = angle[:, None] * 2.0 ** torch.arange(8, device=angle.device)  # [B,8]
        e = self.time(torch.cat([waves.sin(), waves.cos()], dim=1))
        e = F.silu(e + self.domain(domain) + self.look(look))
        x1 = self.down1(self.enter(torch.cat([x, maps], dim=1)), e)
        x2 = self.down2(self.to2(x1), e)
        y = self.down3(self.to3(x2), e)
        y = self.middle(self.attend(y), e)
        y = self.up2(torch.cat([F.interpolate(y, scale_factor=2.0), x2], dim=1), e)
        y = self.up1(torch.cat([F.interpolate(y, scale_factor=2.0), x1], dim=1), e)
        return self.leave(F.silu(self.norm(y)))


# ---- Sampling -----------------------------------------------------------------------------------
def flow(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    angles: Sequence[float],
    keep: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The probability flow dx/da = v(x, a) along `angles`, rising to encode, falling to decode.

    x [B,K,h,w] at the first angle -> at the last. The first step is DDIM's, a rotation by b - a
    (arXiv:2202.00512v2); from the second on, image and noise are extrapolated to the middle of the
    step: second order at one evaluation a step. `keep` corrects the image that is foreseen.
    """
    before, last = None, 0.0
    for a, b in pairwise(angles):
        v = velocity(x, a)
        image, noise = math.cos(a) * x - math.sin(a) * v, math.sin(a) * x + math.cos(a) * v
        if keep:
            image = keep(image)
            x = math.cos(a) * image + math.sin(a) * noise
        middle = image, noise
        if before:
            ahead = (b - a) / (a - last) / 2
            middle = tuple(n + ahead * (n - o) for n, o in zip(middle, before, strict=True))
        x = x + (math.cos(b) - math.cos(a)) * middle[0] + (math.sin(b) - math.sin(a)) * middle[1]
        before, last = (image, noise), a
    return x


def starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover `size` cells: evenly spread, at multiples of 4, the U-Net's
    stride, so that a tile's coarse cells are the image's."""
    if size <= tile:
        return [0]
    count = 1 + math.ceil((size - tile) / max(4, tile - overlap))
    return [(size - tile) * i // (count - 1) // 4 * 4 for i in range(count)]


def tiled(
    predict: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    maps: Tensor,
    tile: tuple[int, int],
    overlap: int,
) -> Tensor:
    """predict(x, maps) [B,K,h,w], in tiles of at most `tile` cells whose predictions are blended in
    every step (MultiDiffusion, arXiv:2302.08113), with weights that fall towards their borders.
    """
    (h, w), (th, tw) = x.shape[2:], (min(t, s) for t, s in zip(tile, x.shape[2:], strict=True))
    if (th, tw) == (h, w):
        return predict(x, maps)
    ramps = []
    for side in (th, tw):
        edge = torch.minimum(torch.arange(side), torch.arange(side).flip(0)) + 1.0
        ramps.append((edge / (overlap + 1)).clamp(max=1) ** 2)
    weight = common.send(ramps[0][:, None] * ramps[1], x.device)  # [th,tw]
    total, weights = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    for top in starts(h, th, overlap):
        for left in starts(w, tw, overlap):
            box = (..., slice(top, top + th), slice(left, left + tw))
            total[box] += weight * predict(x[box], maps[box])
            weights[box] += weight
    return total / weights


def number(name: str) -> int:
    """Of an image's name, whatever its bytes: what is random about the image begins with it."""
    return zlib.crc32(name.encode(errors="surrogateescape"))


class Bridge(nn.Module):
    """All that a translation needs: U-Net, space, the reader, and the photos' statistics.

    config: patch, latent, width, classes (names), size; `looks` [N,5] and `features` [N,D] are
    those of the training photos.
    """

    def __init__(self, config: dict[str, Any], photos: int) -> None:
        super().__init__()
        self.config = config
        self.space = Space(config["patch"], config["latent"])
        self.unet = UNet(self.space.channels, len(config["classes"]), config["width"])
        self.reader = Network("tiny", len(config["classes"]))
        self.register_buffer("looks", torch.zeros(photos, len(LOOKS)))
        self.register_buffer("features", torch.zeros(photos, 2 * self.reader.body.head.in_channels))
        self.register_buffer("look_moments", torch.ones(2, len(LOOKS)))
        self.to(memory_format=torch.channels_last)

    def look(self, raw: Tensor, given: Tensor) -> Tensor:
        """The U-Net's condition. raw [B,5] statistics, given [B,5] 0 or 1 -> [B,10]."""
        mean, std = self.look_moments
        return torch.cat([(raw - mean) / std * given, given], dim=1)

    def maps(self, labels: Tensor) -> Tensor:
        """Share of each class in each cell. labels [B,H,W] train ids or IGNORE -> [B,C,h,w]."""
        classes = torch.arange(len(self.config["classes"]), device=labels.device).view(-1, 1, 1)
        one_hot = (labels[:, None] == classes).float()  # [B,C,H,W], all 0 where ignored
        return F.avg_pool2d(one_hot, 2**self.space.levels)

    def velocity(
        self,
        x: Tensor,
        angle: float,
        domain: int,
        maps: Tensor,
        look: Tensor,
        guidance: float,
        tile: tuple[int, int],
        overlap: int,
    ) -> Tensor:
        angles = x.new_full((len(x),), angle)
        domains = torch.full((len(x),), domain, device=x.device)

        def predict(x: Tensor, maps: Tensor) -> Tensor:
            v = self.unet(x, angles, domains, maps, look).float()
            if guidance == 1:
                return v
            neither = torch.full_like(domains, NEITHER)
            return torch.lerp(self.unet(x, angles, neither, maps, look).float(), v, guidance)

        return tiled(predict, x, maps, tile, overlap)

    @torch.inference_mode()
    def translate(
        self,
        images: Tensor,
        labels: Tensor,
        names: Sequence[str],
        args: Sampling,
        seed: int,
        tile: tuple[int, int] | None = None,
        overlap: int = 32,
    ) -> Tensor:
        """images [B,3,H,W] in [0,1] of the source, labels [B,H,W] -> [B,3,H,W] in [0,1].

        What is random depends on `seed` and the image's name alone. tile, overlap: in pixels.
        """
        (h, w), unit = images.shape[2:], 4 * 2**self.space.levels
        bottom, right = -h % unit, -w % unit
        padded = F.pad(images, (0, right, 0, bottom), mode="replicate")
        around = F.pad(labels, (0, right, 0, bottom), value=common.IGNORE)
        x, maps = self.space.encode(padded), self.maps(around)
        cell = 2**self.space.levels
        size = tuple(max(4, side // cell // 4 * 4) for side in tile or self.config["size"])
        step = partial(self.velocity, maps=maps, tile=size, overlap=overlap // cell // 4 * 4)
        own, rngs = looks(images), [common.generator(seed, number(name)) for name in names]
        wanted = self.wanted(rngs, args).to(x)
        given = x.new_tensor([name in args.match for name in LOOKS]).expand(len(x), -1)
        angles = np.linspace(0, args.strength * math.pi / 2, args.sample_steps + 1).tolist()
        if args.bridge == "ddib":
            look = self.look(own, torch.ones_like(own))
            x = flow(partial(step, domain=SOURCE, look=look, guidance=1.0), x, angles)
        else:
            noise = torch.stack([torch.randn(x.shape[1:], generator=rng) for rng in rngs])
            x = math.cos(angles[-1]) * x + math.sin(angles[-1]) * noise.to(x)
        step = partial(step, domain=TARGET, look=self.look(wanted, given), guidance=args.guidance)
        keep = self.keeping(padded, around, args) if args.keep_low or args.keep_edges else None
        x = flow(step, x, angles[::-1], keep)
        if not x.isfinite().all():
            raise UserError(f"{names[0]}: its translation is not finite; is --guidance too large?")
        return self.space.decode(x)[:, :, :h, :w].clamp(0, 1)

    def wanted(self, rngs: list[torch.Generator], args: Sampling) -> Tensor:
        """The statistics to match: the reference's, or those of a random photo each. -> [B,5]."""
        index = [int(torch.randint(len(self.looks), (), generator=rng)) for rng in rngs]
        if args.reference is None:
            return self.looks[index]
        photo = common.read_image(args.reference, tuple(self.config["size"]))
        return looks(common.to_tensor(photo[None], self.looks.device)).expand(len(rngs), -1)

    def keeping(self, source: Tensor, labels: Tensor, args: Sampling) -> Callable[[Tensor], Tensor]:
        """The correction of `flow` that keeps the source's luminance, at low frequencies anywhere
        and at high ones along borders of the labels. source [B,3,H,W], labels [B,H,W]."""
        side = max(3, source.shape[2] // 8 * 2 + 1)

        def low(luma: Tensor) -> Tensor:
            return F.avg_pool2d(luma, side, 1, side // 2, count_include_pad=False)

        near = F.max_pool2d(borders(labels)[:, None].float(), 3, 1, 1)  # [B,1,H,W]
        luma = luminance(source)
        smooth = low(luma)

        def keep(x: Tensor) -> Tensor:
            image = self.space.decode(x)
            now = luminance(image)
            blurred = low(now)
            change = args.keep_low * (smooth - blurred)
            change = change + args.keep_edges * near * ((luma - smooth) - (now - blurred))
            return self.space.encode(image + change)

        return keep


# ---- Training -----------------------------------------------------------------------------------
def fit(run: Run, source: Part, photos: Part) -> Bridge:
    """The bridge, trained: first the reader, then the space, then the U-Net."""
    args, device = run.args, run.device
    config = {
        "patch": args.patch, "latent": args.latent, "width": args.width,
        "classes": list(run.classes), "size": list(args.size),
    }  # fmt: skip
    bridge = Bridge(config, len(photos)).to(device)
    steps = args.steps if args.reader_steps is None else args.reader_steps

    def colours(images: Tensor, rng: torch.Generator) -> Tensor:
        """Half of the images in the colours of a random photo, then any augmentation."""
        index = torch.randint(len(photos), (len(images),), generator=rng).numpy()
        half = torch.rand(len(images), 1, 1, 1, generator=rng) < args.reader_color
        half = common.send(half, device)
        with torch.autocast(device.type, enabled=False):  # bfloat16 has no eigenvectors
            moved = common.color_transfer(
                images, common.to_tensor(photos.images[index], device)
            ).clamp(0, 1)
        return common.random_augmentation(torch.where(half, moved, images), rng)

    common.train(run, bridge.reader, source, steps, "reader", colours, reported=False)
    bridge.reader.eval()
    reading = read(bridge.reader, photos.images, device, args.label_confidence)
    photos = replace(photos, labels=reading.classes)
    bridge.features.copy_(torch.from_numpy(reading.features))
    bridge.looks.copy_(torch.cat([looks(common.to_tensor(i[None], device)) for i in photos.images]))
    some = [part.images[:: max(1, len(part) // 100)] for part in (source, photos)]
    some = common.to_tensor(np.concatenate(some), device)
    raw = looks(some)
    bridge.look_moments.copy_(torch.stack([raw.mean(dim=0), raw.std(dim=0)]))
    if args.latent:
        train_autoencoder(run, bridge.space, source, photos)
    bridge.space.fit(some, args.whiten)
    train_unet(run, bridge, source, photos)
    return bridge.eval().requires_grad_(False)


def both(run: Run, source: Part, photos: Part, salt: int) -> Callable[[int], tuple[Tensor, ...]]:
    """Batches, half source and half photos, flipped at random: step -> images [B,3,H,W],
    labels [B,H,W] (None without), domain [B]."""
    args = run.args
    half = args.batch_size // 2
    one = Batches(source, half, (args.seed, salt), run.device)
    other = Batches(photos, args.batch_size - half, (args.seed, salt + 1), run.device)
    domain = torch.tensor([SOURCE] * half + [TARGET] * (args.batch_size - half))

    def batches(step: int) -> tuple[Tensor, ...]:
        a, b = one(step), other(step)
        images, labels = torch.cat([a.images, b.images]), torch.cat([a.labels, b.labels])
        rng = common.generator(args.seed, step, salt)
        flip = common.send(torch.rand(len(images), generator=rng) < 0.5, images.device)
        images = torch.where(flip[:, None, None, None], images.flip(3), images)
        return images, torch.where(flip[:, None, None], labels.flip(2), labels), domain

    return batches


def train_autoencoder(run: Run, space: Space, source: Part, photos: Part) -> None:
    """L1 of the image from latents that are kept small and blurred by noise, so that a sampler's
    small errors stay small."""
    args = run.args
    steps = args.steps if args.latent_steps is None else args.latent_steps
    optimizer = torch.optim.AdamW(space.parameters(), lr=args.unet_lr, fused=True)
    batches = both(run, source, photos, 40)
    for step in run.steps("autoencoder", steps, space=space, optimizer=optimizer):
        rng = common.generator(args.seed, step, 42)
        common.set_rate(optimizer, args.unet_lr, step, steps)
        images, _, _ = batches(step)
        with run.autocast():
            z = space.encode(images)
            noise = 0.05 * common.send(torch.randn(z.shape, generator=rng), z.device).to(z.dtype)
            loss = F.l1_loss(space.decode(z + noise), images) + 1e-3 * z.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(step, latent_loss=loss)


def train_unet(run: Run, bridge: Bridge, source: Part, photos: Part) -> None:
    """Squared error of v at random angles; ends with the averaged weights in the bridge."""
    args, device = run.args, run.device
    steps = unet_steps(args)
    unet, average = bridge.unet, copy.deepcopy(bridge.unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.unet_lr, fused=True)
    batches = both(run, source, photos, 50)
    for step in run.steps("unet", steps, unet=unet, average=average, optimizer=optimizer):
        rng = common.generator(args.seed, step, 52)
        lr = common.set_rate(optimizer, args.unet_lr, step, steps)
        images, labels, domain = batches(step)
        b = len(images)
        domain = torch.where(torch.rand(b, generator=rng) < args.drop_domain, NEITHER, domain)
        blind = torch.rand(b, 1, 1, generator=rng) < args.drop_labels
        given = (torch.rand(b, len(LOOKS), generator=rng) >= args.drop_looks).float()
        # One draw in each b-th of the range: the loss varies less than with independent draws.
        angle = ((torch.arange(b) + torch.rand(b, generator=rng)) / b)[
            torch.randperm(b, generator=rng)
        ]
        drawn = (domain, blind, given, angle * math.pi / 2)
        domain, blind, given, angle = (common.send(x, device) for x in drawn)
        with torch.no_grad():
            x = bridge.space.encode(images)
            maps = bridge.maps(torch.where(blind, common.IGNORE, labels))
            look = bridge.look(looks(images), given)
        noise = common.send(torch.randn(x.shape, generator=rng), device)
        cos, sin = angle.cos()[:, None, None, None], angle.sin()[:, None, None, None]
        with run.autocast():
            v = unet(cos * x + sin * noise, angle, domain, maps, look)
            loss = F.mse_loss(v.float(), cos * noise - sin * x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        common.follow(average, unet, min(args.ema, step / (step + 9)))
        run.log(step, unet_loss=loss, unet_lr=lr)
    unet.load_state_dict(average.state_dict())


# ---- Checks -------------------------------------------------------------------------------------
class Reading(NamedTuple):
    """What a segmentation network sees in images."""

    classes: np.ndarray  # uint8 [N,H,W], the likeliest, or IGNORE where it is not sure
    features: np.ndarray  # float32 [N,2D], mean and deviation of the last layer's input


@torch.no_grad()
def read(
    net: Network, images: np.ndarray, device: torch.device, least: float = 0.0, batch: int = 16
) -> Reading:
    """Reads images, uint8 [N,H,W,3], with the tiny network; sure is a probability of `least`."""
    seen, parts = [], []
    hook = net.body.head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    for i in range(0, len(images), batch):
        best, classes = common.predict(net, images[i : i + batch], device).softmax(1).max(dim=1)
        classes = torch.where(best >= least, classes, common.IGNORE).byte()
        x = seen.pop().flatten(2).float()  # [B,D,hw]
        features = torch.cat([x.mean(dim=2), x.std(dim=2)], dim=1)
        parts.append((classes.cpu().numpy(), features.cpu().numpy()))
    hook.remove()
    return Reading(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def kernel_distance(x: np.ndarray, y: np.ndarray) -> float:
    """KID: the unbiased squared MMD of two sets of features, [N,D] and [M,D], with the kernel
    (x.y / D + 1)^3 (arXiv:1801.01401). Both are shifted and scaled so that the features of `y`
    have mean 0 and, all together, deviation 1: the reader's have no natural scale."""
    mean, spread = y.mean(axis=0, dtype=np.float64), y.std(axis=0, dtype=np.float64)
    x, y = ((z - mean) / np.sqrt((spread**2).mean()) for z in (x, y))

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    xx, yy, n, m = kernel(x, x), kernel(y, y), len(x), len(y)
    if min(n, m) < 2:
        return math.nan
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within - 2 * kernel(x, y).mean())


def borders(labels: Tensor) -> Tensor:
    """Pixels whose right or lower neighbour has another label. [B,H,W] -> bool [B,H,W]."""
    found = torch.zeros_like(labels, dtype=torch.bool)
    found[:, :, :-1] |= labels[:, :, 1:] != labels[:, :, :-1]
    found[:, :-1] |= labels[:, 1:] != labels[:, :-1]
    return found


def edge_agreement(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How well the luminance's gradient finds the labels' borders: the probability that it is
    greater at a border's pixel than at another (area under the ROC curve; 0.5 is chance).

    images uint8 [N,H,W,3], labels [N,H,W] of any ids -> [N], NaN where there is no border.
    """
    result = []
    for image, label in zip(images, labels, strict=True):
        luma = luminance(common.to_tensor(image[None], torch.device("cpu")))[0, 0]
        right, down = torch.zeros_like(luma), torch.zeros_like(luma)
        right[:, :-1], down[:-1] = luma.diff(dim=1), luma.diff(dim=0)
        edge = borders(torch.from_numpy(label.astype(np.int64))[None]).flatten()
        rank = right.square().add(down.square()).flatten().argsort().argsort().double()
        n, m = int(edge.sum()), int((~edge).sum())
        wins = rank[edge].sum() - n * (n - 1) / 2  # Mann-Whitney
        result.append(float(wins / (n * m)) if n and m else math.nan)
    return np.array(result)


def agreement(classes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Share of valid pixels that are read as labelled, 1 where there is none. [N,H,W] -> [N]."""
    valid = (labels != common.IGNORE).sum(axis=(1, 2))
    right = ((classes == labels) & (labels != common.IGNORE)).sum(axis=(1, 2))
    return np.where(valid > 0, right / np.maximum(valid, 1), 1.0)


def reading_miou(classes: np.ndarray, labels: np.ndarray, count: int) -> float:
    """mIoU in % of what was read, [N,H,W], against labels [N,H,W]."""
    maps = (torch.from_numpy(np.array(m)) for m in (classes, labels))
    return common.scores(common.confusion_matrices(*maps, count).sum(dim=0).numpy())["mIoU"]


def checks(
    bridge: Bridge,
    before: np.ndarray,
    after: np.ndarray,
    masks: np.ndarray,
    labels: np.ndarray | None,
    judge: Network | None,
) -> dict[str, float | None]:
    """The table of a translated set. before, after: uint8 [N,H,W,3]; masks [N,H,W], of any ids;
    labels [N,H,W] train ids where they are known. None: a kernel distance of less than two images,
    edges where no mask has a border."""
    device, table, count = bridge.looks.device, {}, len(bridge.config["classes"])
    photos = bridge.features.cpu().numpy()
    for when, images in (("before", before), ("after", after)):
        reading = read(bridge.reader, images, device)
        table[f"kid_{when}"] = kernel_distance(reading.features, photos)
        edges = edge_agreement(images, masks)
        any_border = not np.isnan(edges).all()
        table[f"edges_{when}"] = float(np.nanmean(edges)) if any_border else math.nan
        if labels is not None:
            table[f"reader_miou_{when}"] = reading_miou(reading.classes, labels, count)
            if judge is not None:
                theirs = np.concatenate([
                    common.predict(judge, images[i : i + 16], device).argmax(dim=1).byte().cpu()
                    for i in range(0, len(images), 16)
                ])  # fmt: skip
                table[f"judge_miou_{when}"] = reading_miou(theirs, labels, count)
    for key in [key.removesuffix("_before") for key in table if key.endswith("_before")]:
        print(f"{key}: {table[f'{key}_before']:.3f} -> {table[f'{key}_after']:.3f}", flush=True)
    return {key: None if math.isnan(value) else value for key, value in table.items()}


def load_judge(path: Path | None, classes: int) -> Network | None:
    """The network of a checkpoint of any run, frozen."""
    if path is None:
        return None
    net = Network(common.read_checkpoint(path)["network"][0], classes)
    common.load_weights(net, path)
    return net.eval().requires_grad_(False)


# ---- The benchmark's row ------------------------------------------------------------------------
def translate_part(run: Run, bridge: Bridge, source: Part, photos: Part) -> np.ndarray:
    """The source set, translated by the bridge or by the control. -> uint8 [N,H,W,3], on disk.

    Every batch becomes a file of the run folder first, so that a run that was cut off goes on.
    """
    args, device, folder = run.args, run.device, run.out / "translated"
    images = np.lib.format.open_memmap(
        run.out / "translated.npy", "w+", np.uint8, (len(source), *args.size, 3)
    )
    with common.progress("translating", len(source)) as advance:
        for start in range(0, len(source), args.batch_size):
            path, index = folder / f"{start:06d}.npy", slice(start, start + args.batch_size)
            if not path.exists():
                x, names = common.to_tensor(source.images[index], device), source.names[index]
                if args.control == "none":
                    labels = torch.from_numpy(np.array(source.labels[index])).to(device).long()
                    with run.autocast():
                        x = bridge.translate(x, labels, names, args, args.seed)
                else:
                    x = controlled(args, x, names, photos)
                with common.replacing(path) as temporary, temporary.open("wb") as file:
                    np.save(file, to_uint8(x))
            images[index] = np.load(path)
            for _ in images[index]:
                advance()
    return images


def controlled(args: Args, images: Tensor, names: Sequence[str], photos: Part) -> Tensor:
    """The control of these images, each with a random photo. [B,3,H,W] -> [B,3,H,W]."""
    rngs = [common.generator(args.seed, number(name)) for name in names]
    chosen = [int(torch.randint(len(photos), (), generator=rng)) for rng in rngs]
    style = common.to_tensor(photos.images[chosen], images.device)
    if args.control == "color":
        return common.color_transfer(images, style).clamp(0, 1)
    if args.control == "fourier":
        return common.fourier_transfer(images, style, args.control_band).clamp(0, 1)
    return images


def to_uint8(images: Tensor) -> np.ndarray:
    """[B,3,H,W] in [0,1] -> uint8 [B,H,W,3]."""
    return (255 * images.float()).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def run(args: Args) -> Result:
    judge = check_training(args)
    run = Run(args, "diffusion_bridge")
    if run.result:
        return run.result
    args, net = run.args, run.network()
    source, photos = common.load(args, "source"), common.load(args, "target_unlabelled")
    judge = judge and judge.to(run.device)
    bridge = fit(run, source, photos)
    save(bridge, run.out / "bridge.pt")
    images, labels = translate_part(run, bridge, source, photos), source.labels
    some = slice(None, None, math.ceil(len(source) / 1000))
    table = checks(bridge, source.images[some], images[some], labels[some], labels[some], judge)
    agreed = np.concatenate([
        agreement(read(bridge.reader, images[i : i + 16], run.device).classes, labels[i : i + 16])
        for i in range(0, len(images), 16)
    ])  # fmt: skip
    kept = np.flatnonzero(agreed >= args.min_agreement)
    if not len(kept):
        raise UserError(f"--min-agreement {args.min_agreement}: no image agrees so well")
    table |= {"agreement": float(agreed.mean()), "left_out": len(source) - len(kept)}
    print(f"agreement: {table['agreement']:.3f}, left out: {table['left_out']}", flush=True)
    common.write_json(run.out / "checks.json", table)
    path = run.out / "figures/translation.png"
    draw_translations(path, bridge, source.images, images, labels, photos)
    every = slice(None) if len(kept) == len(source) else kept  # a copy only where there is need
    names = [source.names[i] for i in kept]
    common.save_set(run.out / "set", source.dataset, images[every], labels[every], names)
    translated = common.load_set(run.out / "set", source.dataset, args.size)
    augment = common.random_augmentation if args.augment else common.original
    common.train(run, net, translated, args.steps, "segmenter", augment)
    spent = f"{unet_steps(args)} U-Net updates" if args.control == "none" else ""
    return run.finish(net, target_labels=0, beside=spent)


def unet_steps(args: Args) -> int:
    """None for a control, which does without."""
    if args.control != "none":
        return 0
    return args.steps * 3 // 2 if args.unet_steps is None else args.unet_steps


def train(args: Args) -> None:
    """The command `train`: the reader and the bridge, into OUT/bridge.pt."""
    if args.control != "none":
        raise UserError(f"--control {args.control}: there is nothing to train")
    check_training(args)
    run = Run(args, "diffusion_bridge_train")
    source, photos = common.load(run.args, "source"), common.load(run.args, "target_unlabelled")
    save(fit(run, source, photos), run.out / "bridge.pt")
    print(f"written: {run.out / 'bridge.pt'}")


RANGES = {  # of options: least and most
    "strength": (0.01, 1), "sample_steps": (1, math.inf), "guidance": (0, 100),
    "keep_low": (0, 1), "keep_edges": (0, 1), "min_agreement": (0, 1),
    "unet_steps": (0, math.inf), "reader_steps": (0, math.inf), "latent_steps": (0, math.inf),
    "reader_color": (0, 1), "latent": (0, math.inf), "whiten": (0, 1), "unet_lr": (1e-9, 1),
    "ema": (0, 1), "drop_domain": (0, 1), "drop_labels": (0, 1), "drop_looks": (0, 1),
    "label_confidence": (0, 1), "control_band": (0, 1),
    "overlap": (0, math.inf), "scale": (0.01, 100), "batch_size": (1, math.inf),
    "seed": (0, math.inf),
}  # fmt: skip


def check_options(args: Sampling, latent: int) -> None:
    """UserError for options that cannot run, with a bridge of so many latent channels."""
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:
            expected = f"at least {least}" if most == math.inf else f"{least} to {most}"
            raise UserError(f"--{name.replace('_', '-')} {value}: expected {expected}")
    if latent and (args.keep_low or args.keep_edges):
        raise UserError("--keep-low, --keep-edges: not in a latent space")
    if args.reference:
        common.opened(args.reference).close()


def check_training(args: Args) -> Network | None:
    """UserError for what the flags of this method cannot mean. -> the judge, where there is one."""
    check_options(args, args.latent)
    if args.width < 8 or args.width % 8:
        raise UserError(f"--width {args.width}: expected a multiple of 8")
    return load_judge(args.judge, len(common.BENCHMARKS[args.benchmark].classes))


# ---- Checkpoint ---------------------------------------------------------------------------------
def digest(config: dict[str, Any], state: dict[str, Tensor]) -> str:
    """SHA-256 of configuration and weights."""
    found = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, value in sorted(state.items()):
        found.update(name.encode() + value.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def save(bridge: Bridge, path: Path) -> None:
    buffer = io.BytesIO()
    checkpoint = {
        "format": "sim2real-1", "network": ["tiny", len(bridge.config["classes"])], "net": None,
        "bridge": bridge.state_dict(), "config": bridge.config,
        "sha256": digest(bridge.config, bridge.state_dict()),
    }  # fmt: skip
    torch.save(checkpoint, buffer)
    with common.replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def load(path: Path, device: str | torch.device) -> Bridge:
    """A bridge that `save` wrote; UserError for anything else, or if it has been changed."""
    checkpoint = common.read_checkpoint(path)
    if "bridge" not in checkpoint:
        raise UserError(f"{path}: a checkpoint without a bridge, expected bridge.pt of a training")
    changed = UserError(f"{path}: weights or configuration were changed after they were written")
    try:
        config, state = checkpoint["config"], checkpoint["bridge"]
        if digest(config, state) != checkpoint["sha256"]:  # before anything of its size is built
            raise changed
        bridge = Bridge(config, len(state["looks"]))
        bridge.load_state_dict(state)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        first = (str(error).splitlines() or [""])[0][:80]
        raise UserError(
            f"{path}: the bridge is damaged ({type(error).__name__} {first})"
        ) from error
    return bridge.to(device).eval().requires_grad_(False)


# ---- A folder -----------------------------------------------------------------------------------
class Pair(NamedTuple):
    """An image with its mask: files, where they go below the output, and what they hold."""

    image: Path
    mask: Path
    to: str
    mask_to: str
    size: tuple[int, int]  # width, height
    hashes: tuple[str, str]  # SHA-256 of both files


SUFFIXES = (
    ".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".tga", ".gif",
    ".jp2",
)  # fmt: skip
EXIF_TURN = 0x112  # the tag that says how a viewer turns the picture


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files_in(folder: Path, other: Path) -> tuple[dict[str, Path], list[Path]]:
    """Files that should be images, by their path less the suffix, and all the rest. What is below
    `other`, the masks' folder in that of the images say, is left out."""
    found, rest = {}, []
    for path in sorted(folder.rglob("*")):
        if other.is_relative_to(folder) and path.is_relative_to(other):
            continue
        if path.is_dir():  # to which `rglob` follows no link
            if path.is_symlink() and path.resolve() != other:
                raise UserError(f"{path}: a link to a folder, expected the folder itself")
            continue
        stem = path.relative_to(folder).with_suffix("").as_posix()
        if path.suffix.lower() not in SUFFIXES:
            rest.append(path)
        elif stem in found:
            raise UserError(f"{path}: {found[stem].name} has the same stem")
        else:
            found[stem] = path
    return found, rest


def is_image(path: Path) -> bool:
    try:
        common.opened(path, decode=False).close()
    except UserError:
        return False
    return True


def scan(args: TranslateArgs, mask_dir: Path) -> tuple[list[Pair], list[str]]:
    """All pairs, sorted by path, and files that are no image. Every image is decoded once, so that
    whatever is wrong with the input is said before anything is written."""
    inputs = args.input_dir.resolve()
    (images, others), (masks, rest) = files_in(inputs, mask_dir), files_in(mask_dir, inputs)
    skipped = others + rest
    for mine, theirs in ((images, masks), (masks, images)):
        for stem in set(mine) - set(theirs):  # one with a partner is an image, if a damaged one
            if not is_image(mine[stem]):
                skipped.append(mine.pop(stem))
    if not images:
        raise UserError(f"{inputs}: no image in it")
    for stem, path in images.items():
        if stem not in masks:
            raise UserError(f"{path}: image without a mask, expected {mask_dir / stem}.*")
    for stem, path in masks.items():
        if stem not in images:
            raise UserError(f"{path}: mask without an image, expected {inputs / stem}.*")
    below = mask_dir.relative_to(inputs) if mask_dir.is_relative_to(inputs) else Path("masks")

    def pair(stem: str) -> Pair | UserError:
        image, mask = images[stem], masks[stem]
        try:
            with common.opened(image) as picture, common.opened(mask) as other:
                size, theirs = picture.size, other.size
                kind = f"{picture.format} of mode {picture.mode}"
                fits = picture.format in Image.SAVE and picture.mode != "F"
            if size != theirs:
                return UserError("{}: is {}x{}, its image {}x{}".format(mask, *theirs, *size))
            if not fits:
                return UserError(f"{image}: found {kind}, expected integers in a usual format")
            if args.mask_labels != "none":
                common.read_label(mask, args.mask_labels)
        except UserError as error:
            return error
        to = image.relative_to(inputs).as_posix()
        mask_to = (below / mask.relative_to(mask_dir)).as_posix()
        return Pair(image, mask, to, mask_to, size, (sha256(image), sha256(mask)))

    pairs = list(common.in_threads(pair, sorted(images)))
    for found in pairs:
        if isinstance(found, UserError):
            raise found
    targets = [p.to for p in pairs] + [p.mask_to for p in pairs]
    if len(set(targets)) < len(targets):
        raise UserError(f"{mask_dir}: masks would overwrite images, since their paths are the same")
    return pairs, sorted(path.as_posix() for path in skipped)


def read_mask(pair: Pair, labels: str) -> np.ndarray:
    """Train ids where `labels` says how to read them, else one number for each id or colour."""
    if labels != "none":
        return common.read_label(pair.mask, labels, pair.image)
    with common.opened(pair.mask) as mask:
        values = np.asarray(mask).astype(np.int64)
    return values if values.ndim == 2 else (values * 256 ** np.arange(values.shape[2])).sum(axis=2)


def write_image(image: np.ndarray, pair: Pair, path: Path) -> None:
    """In the format of the original; grey stays grey, 16 bits 16, and transparency and the turn
    that a viewer gives it as they were. uint8 [H,W,3]."""
    with common.opened(pair.image) as original:
        result, mode, options = Image.fromarray(image), original.mode, {}
        if mode in ("1", "L", "LA") or mode.startswith("I"):
            result = result.convert("L")
        if mode.startswith("I"):
            result = Image.fromarray(np.asarray(result).astype(np.uint16) * 257)
        elif original.has_transparency_data:
            result.putalpha(original.convert("RGBA").getchannel("A"))
        if original.format == "JPEG":
            options["quality"] = 95
        if (turn := original.getexif().get(EXIF_TURN, 1)) != 1:
            options["exif"] = Image.Exif()
            options["exif"][EXIF_TURN] = turn
        buffer = io.BytesIO()
        result.save(buffer, format=original.format, **options)
    with common.replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def read_rgb(path: Path) -> np.ndarray:
    """An image of any mode as uint8 [H,W,3]; 16-bit ones by their upper eight bits."""
    with common.opened(path) as image:
        if image.mode.startswith("I"):
            grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
            return np.repeat(grey[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB"))


def translate_group(bridge: Bridge, group: Sequence[Pair], args: TranslateArgs) -> Iterator[tuple]:
    """Images of one size, translated together -> of each: uint8 [H,W,3] and its agreement."""
    device = bridge.looks.device
    full = common.to_tensor(np.stack([read_rgb(pair.image) for pair in group]), device)
    size = [max(1, round(side * args.scale)) for side in full.shape[2:]]
    resize = partial(F.interpolate, mode="bilinear", align_corners=False)
    images = full if args.scale == 1 else resize(full, size=size, antialias=True)
    if args.mask_labels == "none":
        maps = read(bridge.reader, to_uint8(images), device).classes
    else:
        maps = [common.resize_label(read_mask(pair, args.mask_labels), size) for pair in group]
        maps = np.stack(maps)
    labels, names = torch.from_numpy(maps).to(device).long(), [pair.to for pair in group]
    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp and device.type == "cuda"):
        result = bridge.translate(
            images, labels, names, args, args.seed, args.tile, args.overlap
        ).float()
    agreed = agreement(read(bridge.reader, to_uint8(result), device).classes, maps)
    if args.scale != 1:
        result = (full + resize(result - images, size=full.shape[2:])).clamp(0, 1)
    yield from zip(to_uint8(result), agreed.tolist(), strict=True)


def translate_folder(args: TranslateArgs) -> None:
    """The command `translate`. Images of equal size are translated in groups that depend on the
    input alone: an interrupted run or one on several ranks gives the same bytes as any other."""
    rank, world = (int(os.environ.get(name, n)) for name, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    mask_dir = (args.mask_dir or args.input_dir / "masks").resolve()
    out = args.output_dir.resolve()
    for folder in (args.input_dir.resolve(), mask_dir):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        if out == folder or out.is_relative_to(folder) or folder.is_relative_to(out):
            raise UserError(f"--output-dir {out}: inside, around or equal to the input {folder}")
    if mask_dir == args.input_dir.resolve():
        raise UserError(f"--mask-dir {mask_dir}: the input itself, expected a folder of masks")
    device = args.device
    if device == "auto":
        cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        device = cuda if torch.cuda.is_available() else "cpu"
    common.check_device(device)
    bridge = load(args.checkpoint, device)
    if args.mask_labels != "none" and (
        list(common.classes_of(args.mask_labels)) != bridge.config["classes"]
    ):
        raise UserError(f"--mask-labels {args.mask_labels}: the checkpoint has other classes")
    check_options(args, bridge.config["latent"])
    if args.tile and min(args.tile) < 1:
        raise UserError("--tile {} {}: expected at least 1".format(*args.tile))
    if args.judge and args.mask_labels == "none":
        raise UserError("--judge: needs --mask-labels, the classes of the masks")
    judge = load_judge(args.judge, len(bridge.config["classes"]))
    pairs, skipped = scan(args, mask_dir)
    settings = settings_of(args, bridge)
    prepare(out, settings)
    lock = common.locked(out / f".rank{rank}.lock")
    log, by_size = out / "log.jsonl", {}
    for path in skipped if rank == 0 else ():
        write_line(log, {"skipped": path, "why": "no image"})
    for pair in pairs:
        by_size.setdefault(pair.size, []).append(pair)
    groups = [
        found[i : i + args.batch_size]
        for found in by_size.values()
        for i in range(0, len(found), args.batch_size)
    ]
    records = read_log(log)
    with common.progress("translating", len(groups[rank::world])) as advance:
        for group in groups[rank::world]:
            missing = {p.to for p in group if not done(out, p, records.get(p.to))}
            if missing:
                finish_group(bridge, group, missing, args, out, log)
            advance()
    records = read_log(log)
    if all(done(out, pair, records.get(pair.to)) for pair in pairs):
        with log.open("rb") as last:
            fcntl.flock(last, fcntl.LOCK_EX)  # ranks that are last together finish in turn
            finish_folder(bridge, pairs, records, skipped, args, judge, out, settings)
    lock.close()
    (out / f".rank{rank}.lock").unlink(missing_ok=True)


def settings_of(args: TranslateArgs, bridge: Bridge) -> dict[str, Any]:
    """What decides the bytes of the output, the input apart."""
    settings = json.loads(json.dumps(asdict(args), default=str))
    for name in ("input_dir", "output_dir", "mask_dir", "config", "device", "judge"):
        del settings[name]
    settings["checkpoint"] = digest(bridge.config, bridge.state_dict())
    if args.reference:
        settings["reference"] = sha256(args.reference)
    return settings


def prepare(out: Path, settings: dict[str, Any]) -> None:
    """A new output folder, or one of the same settings; UserError for any other."""
    path = out / "metadata.json"
    full = out.exists() and any(not p.name.startswith(".") for p in out.iterdir())
    if path.exists():  # maybe only since the line before, written by another rank
        try:
            old = json.loads(path.read_text())["settings"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: not the metadata of a translation") from None
        for name in settings:
            if old.get(name) != settings[name]:
                was = f"{old.get(name)!s:.60}, now {settings[name]!s:.60}"
                raise UserError(
                    f"{out}: was begun with another {name} ({was}); give another --output-dir"
                )
        return
    if full:
        raise UserError(f"{out}: not empty and not a translation; give another --output-dir")
    out.mkdir(parents=True, exist_ok=True)
    common.write_json(path, {"complete": False, "settings": settings})


def write_line(log: Path, line: dict[str, Any]) -> None:
    """One line at the log's end, in one write, so that ranks may share the file; a line that was
    cut off before it stays alone."""
    with log.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        torn = file.read(1) not in (b"", b"\n")
        file.write(("\n" * torn + json.dumps(line) + "\n").encode())


def read_log(log: Path) -> dict[str, dict[str, Any]]:
    """The last record of each image."""
    records = {}
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        try:
            record = json.loads(line)
            records[record["image"]] = record
        except (ValueError, KeyError, TypeError):  # cut off, or no record of an image
            continue
    return records


def done(out: Path, pair: Pair, record: dict[str, Any] | None) -> bool:
    """Whether a pair was translated before and its files are still what was written."""
    if not record or (record["source_sha256"], record["mask_sha256"]) != pair.hashes:
        return False
    if record["left_out"]:
        return True
    files = ((out / pair.to, record["output_sha256"]), (out / pair.mask_to, pair.hashes[1]))
    return all(path.exists() and sha256(path) == expected for path, expected in files)


def finish_group(
    bridge: Bridge, group: Sequence[Pair], missing: set[str], args: TranslateArgs, out: Path,
    log: Path,
) -> None:  # fmt: skip
    """Translates a group, all of it so that the bytes are the same, and writes what is missing."""
    start = time.perf_counter()
    for pair, (image, agreed) in zip(group, translate_group(bridge, group, args), strict=True):
        if pair.to not in missing:
            continue
        left_out = agreed < args.min_agreement
        if not left_out:
            write_image(image, pair, out / pair.to)
            with common.replacing(out / pair.mask_to) as temporary:
                shutil.copyfile(pair.mask, temporary)
        write_line(log, {
            "image": pair.to, "mask": pair.mask_to, "size": pair.size,
            "seed": [args.seed, number(pair.to)], "agreement": round(agreed, 4),
            "left_out": left_out, "source_sha256": pair.hashes[0],
            "mask_sha256": pair.hashes[1],
            "output_sha256": None if left_out else sha256(out / pair.to),
            "seconds": round((time.perf_counter() - start) / len(group), 3),
        })  # fmt: skip


def finish_folder(
    bridge: Bridge, pairs: list[Pair], records: dict[str, Any], skipped: list[str],
    args: TranslateArgs, judge: Network | None, out: Path, settings: dict[str, Any],
) -> None:  # fmt: skip
    """Checks over up to 1000 images at the training size, metadata.json, and a figure."""
    for left in (*out.rglob(".*.????????.tmp"), *out.glob(".rank*.lock")):  # of one that was killed
        left.unlink(missing_ok=True)
    size, kept = bridge.config["size"], [p for p in pairs if not records[p.to]["left_out"]]
    table = {"left_out": len(pairs) - len(kept)}
    kept = kept[:: math.ceil(len(kept) / 1000)] if kept else kept
    if kept:

        def small(path: Path) -> np.ndarray:
            image = Image.fromarray(read_rgb(path))
            return np.asarray(image.resize(tuple(size[::-1]), Image.Resampling.BILINEAR))

        before = np.stack([small(p.image) for p in kept])
        after = np.stack([small(out / p.to) for p in kept])
        rows, columns = (np.arange(s) for s in size)
        masks = []
        for p in kept:
            mask = read_mask(p, args.mask_labels)
            h, w = mask.shape
            masks.append(mask[rows[:, None] * h // size[0], columns * w // size[1]])
        masks = np.stack(masks)
        labels = None if args.mask_labels == "none" else masks.astype(np.uint8)
        judge = judge and judge.to(bridge.looks.device)
        table |= checks(bridge, before, after, masks, labels, judge)
        known = masks if labels is not None else masks + 256  # no train ids: outlines in yellow
        draw_document(out / "translation.pdf", bridge, before, after, known, None)
    common.write_json(out / "metadata.json", {
        "complete": True, "settings": settings, "checkpoint": str(args.checkpoint),
        "checks": table, "seconds": sum(r["seconds"] for r in records.values()),
        "versions": {"python": sys.version.split()[0], "commit": common.commit(),
                     **{m.__name__: m.__version__ for m in (torch, np, PIL)}},
        "skipped": skipped, "images": [records[p.to] for p in pairs],
    })  # fmt: skip
    count = len(pairs) - table["left_out"]
    print(f"{count} images in {out}, {table['left_out']} left out", flush=True)
    if gone := sorted(set(records) - {p.to for p in pairs}):
        print(f"{len(gone)} images stay whose originals are gone, the first {gone[0]}", flush=True)
    if skipped:
        print(f"{len(skipped)} files skipped as no images, the first {skipped[0]}", flush=True)


def with_config(argv: list[str]) -> list[str]:
    """The command line of `translate` with the entries of --config in front, so that flags override
    them. UserError for a key that is no option."""
    files = [v for f, v in pairwise(argv) if f == "--config"]
    files += [word.split("=", 1)[1] for word in argv if word.startswith("--config=")]
    if not files:
        return argv
    path, known = Path(files[-1]), {f.name: f.type for f in fields(TranslateArgs)}
    del known["config"]
    try:
        text = path.read_text()
        entries = json.loads(text) if path.suffix.lower() == ".json" else tomllib.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: neither TOML nor JSON ({error})") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: found a {type(entries).__name__}, expected a table of options")
    words = []
    for key, value in entries.items():
        name = key.replace("-", "_")
        if name not in known:
            raise UserError(f"{path}: unknown key {key!r}, expected one of {sorted(known)}")
        kind, flag = known[name], name.replace("_", "-")
        values = [str(v) for v in (value if isinstance(value, list) else [value])]
        if (
            isinstance(value, dict)
            or isinstance(value, bool) != (kind is bool)
            or (not reads_as(kind, values))
        ):
            expected = kind.__name__ if isinstance(kind, type) else kind
            raise UserError(f"{path}: {key} is {value!r}, expected {expected}")
        if kind is bool:
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", *values]
    return [*words, *argv]


def reads_as(kind: Any, words: list[str]) -> bool:
    """Whether the command line would take these words for an option of this type."""
    import tyro

    nowhere = io.StringIO()  # what tyro has to say names no file
    try:
        with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            tyro.cli(kind, args=words)
    except SystemExit:
        return False
    return True


# ---- Figures ------------------------------------------------------------------------------------
def outlined(image: np.ndarray, mask: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """The mask's borders over the image, in the classes' colours. uint8 [H,W,3], [H,W] ids; yellow
    where an id is no train id."""
    edge = borders(torch.from_numpy(mask.astype(np.int64))[None])[0].numpy()
    known = (mask >= 0) & (mask < len(classes))
    colours = common.palette(classes)[np.where(known, mask, 0).astype(np.uint8)]
    colours = np.where(known[..., None], colours, np.array([255, 230, 0], np.uint8))
    return np.where(edge[..., None], colours, image)


def draw_translations(
    path: Path, bridge: Bridge, before: np.ndarray, after: np.ndarray, masks: np.ndarray,
    photos: Part | None,
) -> None:  # fmt: skip
    """Source, translation, the photo of the nearest features, and the mask's outlines over both.

    before, after: uint8 [N,H,W,3]; masks [N,H,W] ids.
    """
    some = np.linspace(0, len(before) - 1, min(5, len(before))).round().astype(int)
    columns = {"source": list(before[some]), "translated": list(after[some])}
    if photos:
        theirs = bridge.features.cpu().numpy()  # [M,D]
        features = read(bridge.reader, after[some], bridge.looks.device).features
        distance = ((features[:, None] - theirs) / (theirs.std(axis=0) + 1e-6)) ** 2
        columns["nearest photo"] = list(photos.images[distance.sum(axis=2).argmin(axis=1)])
    classes = bridge.config["classes"]
    for name, images in (("mask on source", before), ("mask on translated", after)):
        columns[name] = [outlined(images[i], masks[i], classes) for i in some]
    common.draw_sheet(path, columns, classes)


def draw_document(path: Path, *sheet: Any) -> None:
    """The same as a PDF: among the images of a folder, no glob of a loader should find it."""
    with tempfile.TemporaryDirectory() as folder:
        draw_translations(Path(folder) / "sheet.png", *sheet)
        with Image.open(Path(folder) / "sheet.png") as drawn, common.replacing(path) as temporary:
            dates = dict.fromkeys(("creationDate", "modDate"), time.gmtime(0))  # the same bytes
            drawn.convert("RGB").save(temporary, "PDF", resolution=150, title=path.stem, **dates)


def main() -> None:
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in ("train", "translate"):
        return common.main(Args, run, __doc__)
    sys.argv[:2] = [" ".join(sys.argv[:2])]  # as --help calls it
    if command == "train":
        return common.main(Args, train, __doc__)
    try:
        sys.argv[1:] = with_config(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
    return common.main(TranslateArgs, translate_folder, __doc__)


if __name__ == "__main__":
    main()
