"""Learns what synthetic scenes should look like: attributes whose renderings match target photos.

Meta-Sim (arXiv:1904.11621v1). A probabilistic grammar gives scene graphs; a graph network, the
distribution transformer, rewrites their attributes; a differentiable renderer turns them into
images; the maximum mean discrepancy between features of these and of unlabelled photos is minimised
through it. Scenes are recomposed from the labelled source images themselves: a source image with a
new camera, light and weather, and objects cut out of others.

    python metasim.py                                            (attributes by MMD, no label used)

    python metasim.py --attributes prior                         (control: the grammar's own scenes)

    python metasim.py --task-reward                              (REINFORCE on 16 labelled photos)

    python metasim.py --experiment mnist_rotation                (the paper's experiments on digits)

    python metasim.py --experiment bigmnist

The first takes two minutes on one CPU core and ends at 62 mIoU on the miniature, the second at 47,
source-only at 44. The digits take half a minute and a minute and a half.
"""

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import common
from common import Network, Part, Result, Run, UserError


@dataclass(frozen=True)
class Args(common.Args):
    experiment: Literal["segmentation", "mnist_rotation", "bigmnist"] = "segmentation"
    """Road scenes for segmentation, or the paper's digits: MNIST's where torchvision's files lie
    under --data, else drawn in the typefaces that come with matplotlib."""
    attributes: Literal["learned", "prior", "source"] = "learned"
    """Of the scenes that the network trains on: rewritten by the transformer, as the grammar draws
    them (control), or the source images as they are (control, equal to source_only)."""
    task_reward: bool = False
    """A third stage: REINFORCE on the mIoU on the labelled photos."""
    scenes: int = 2000
    """Scenes rendered for training, each seen as often as --steps ask for."""
    objects: int = 1
    """At most so many objects are added to a source image; the number is uniform from 0."""
    assets: int = 600
    """Objects to cut out of the source images, in equal parts of all classes."""
    width: int = 64
    """Features of a node in the distribution transformer."""
    layers: int = 2
    """Graph layers of its encoder, and as many of its decoder."""
    reconstruct_steps: int = 300
    """Updates of stage 1, reconstruction of the prior. The paper: 7 epochs."""
    reconstruct_lr: float = 3e-3
    """Learning rate of stage 1."""
    match_steps: int = 200
    """Updates of stage 2, MMD."""
    match_lr: float = 2e-3
    """Learning rate of stage 2. The paper's code: 1e-3."""
    prior_weight: float = 0.01
    """Weight of the mean squared change of the attributes, in the grammar's scales, beside the MMD:
    what the photos say nothing about stays as it was. The paper, and our digits: 0."""
    match_batch: int = 32
    """Scenes an update of stage 2. The paper's code: 50."""
    match_photos: int = 128
    """Photos an update of stage 2. The paper's code: 200."""
    bandwidths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Standard deviations of the Gaussian kernels, as multiples of the median distance."""
    feature_steps: int = 100
    """Updates of the network whose features are compared, on the prior's scenes."""
    reward_rounds: int = 4
    """Updates of stage 3."""
    reward_samples: int = 4
    """Rewards an update of stage 3, each on a data set of its own."""
    reward_start: int = 150
    """Updates on matched scenes of the network that the task network is reset to."""
    reward_steps: int = 25
    """Updates of the task network for one reward."""
    reward_sigma: float = 0.2
    """Standard deviation of the attributes that stage 3 tries out, in the grammar's scales. The
    paper's code: 0.02."""
    reward_lr: float = 1e-3
    """Learning rate of stage 3."""
    digits: int = 6000
    """Pictures of digits: a third each for the scenes, the target and the test."""
    digit_match_steps: int = 1000
    """--match-steps of the digits."""
    digit_match_lr: float = 2e-4
    """--match-lr of the digits."""
    digit_starts: int = 3
    """Trainings of the digits' transformer from different weights; the one with the lowest MMD is
    kept, since a digit that turns the wrong way round stops at a local minimum. The paper: 1."""
    digit_steps: int = 400
    """Updates of the digits' task network, of 16 scenes each. The paper's code: 2 epochs."""


LEAST = {  # of the flags that count something
    "seed": 0, "scenes": 1, "objects": 0, "assets": 1, "width": 1, "layers": 1,
    "reconstruct_steps": 0, "match_steps": 0, "match_batch": 2, "match_photos": 2,
    "feature_steps": 0, "reward_rounds": 0, "reward_samples": 2, "reward_start": 0,
    "reward_steps": 1, "digits": 30, "digit_match_steps": 0, "digit_starts": 1, "digit_steps": 1,
}  # fmt: skip
RATES = ("reconstruct_lr", "match_lr", "reward_lr", "reward_sigma", "digit_match_lr")
# Of the flags, what the digits heed beside those that are named after them.
DIGITS_HEED = (
    "experiment", "data", "out", "seed", "device", "resume", "width", "layers",
    "reconstruct_steps", "reconstruct_lr", "match_batch", "match_photos", "bandwidths",
)  # fmt: skip


def check_scenes(args: Args) -> None:
    """UserError for what the flags of this method cannot mean."""
    roads = args.experiment == "segmentation"
    for field in fields(args):
        name, value, flag = field.name, getattr(args, field.name), field.name.replace("_", "-")
        of_digits = name.startswith("digit")
        heeded = not of_digits if roads else of_digits or name in DIGITS_HEED
        if not heeded and value != field.default:
            raise UserError(f"--{flag}: means nothing to --experiment {args.experiment}")
        if name in LEAST and value < LEAST[name]:
            raise UserError(f"--{flag} {value}: expected at least {LEAST[name]}")
        if name in RATES and not 0 < value < math.inf:
            raise UserError(f"--{flag} {value}: expected a number above 0")
    if not (args.bandwidths and all(0 < b < math.inf for b in args.bandwidths)):
        raise UserError("--bandwidths: expected numbers above 0")
    if not 0 <= args.prior_weight < math.inf:
        raise UserError(f"--prior-weight {args.prior_weight}: expected at least 0")
    if args.task_reward and args.attributes != "learned":
        raise UserError(f"--task-reward: --attributes {args.attributes} learns nothing from it")


# ---- Probabilistic scene grammar ----------------------------------------------------------------
class Attribute(NamedTuple):
    """A mutable attribute: its prior N(mean, std), the scale that the transformer counts in."""

    mean: float
    std: float
    scale: float
    meaning: str  # with its unit


class Kind(NamedTuple):
    """A kind of node: whose child it is, its mutable attributes, how many there are at most."""

    parent: str | None
    attributes: dict[str, Attribute]
    at_most: int = 1


# The first five attributes of the scene are those of `tone`, which every source image has: the
# prior adds its noise to them.
ROADS = {
    "scene": Kind(None, {
        "illumination": Attribute(-1.5, 0.2, 0.5, "log2 of the mean luma"),
        "temperature": Attribute(0, 0.1, 0.3, "log2 of red / blue"),
        "tint": Attribute(0, 0.1, 0.3, "log2 of green / sqrt(red blue)"),
        "contrast": Attribute(-2.5, 0.2, 0.5, "log2 of luma's standard deviation"),
        "saturation": Attribute(-4.5, 0.2, 0.5, "log2 of chroma's standard deviation"),
        "haze": Attribute(0, 0.05, 0.5, "optical depth at the horizon"),  # below 0 it clears
        "airlight": Attribute(-0.5, 0.2, 0.5, "log2 of the haze's brightness"),
        "blur": Attribute(0, 0.1, 0.5, "share of a blur of 1 px; below 0 sharper"),
        "noise": Attribute(-7.5, 0.5, 1, "log2 of the standard deviation"),
        "grain": Attribute(0, 0.1, 0.5, "share of such a blur in the noise"),
    }),
    "camera": Kind("scene", {
        "shift_x": Attribute(0, 0.05, 0.1, "half widths"),
        "shift_y": Attribute(0, 0.03, 0.1, "half heights"),
        "zoom": Attribute(0.1, 0.05, 0.2, "log2 of the magnification"),
        "roll": Attribute(0, 1, 2, "degrees"),
    }),
    "object": Kind("scene", {
        "lateral": Attribute(0, 0.3, 0.3, "half widths right of its own place"),
        "distance": Attribute(0, 0.4, 0.5, "log2 of how much farther than there"),
        "size": Attribute(0, 0.1, 0.2, "log2 of the gain"),
        "brightness": Attribute(0, 0.2, 0.3, "log2 of the gain"),
    }),  # as many as --objects
}  # fmt: skip
TONE = ("illumination", "temperature", "tint", "contrast", "saturation")


class Graphs(NamedTuple):
    """A batch of scene graphs, one tree for all: nodes are the kinds' slots, some of them empty."""

    values: Tensor  # [B,V,M] mutable attributes, (value - mean) / scale, 0 where a kind has fewer
    classes: Tensor  # [B,V] int64, the grammar's classes of nodes; 0 for an empty slot
    fixed: Tensor  # [B,V,F] immutable attributes that the transformer sees
    picture: Tensor  # [B,V] int64, which source image, cut-out or digit; -1 for none
    flip: Tensor  # [B,V] 1 or -1, of objects
    seed: Tensor  # [B] int64, of the sensor noise

    def to(self, device: torch.device) -> "Graphs":
        """From the CPU, on which graphs are drawn."""
        return Graphs(*(common.send(tensor, device) for tensor in self))


class Grammar:
    """The slots of a grammar's kinds in order, V nodes of M attributes at most."""

    def __init__(self, kinds: dict[str, Kind], device: torch.device) -> None:
        self.kinds = kinds
        self.nodes = [name for name, kind in kinds.items() for _ in range(kind.at_most)]
        first = {name: self.nodes.index(name) for name in self.nodes}
        parents = [kinds[name].parent for name in self.nodes]
        edges = [(v, first[parent]) for v, parent in enumerate(parents) if parent]
        self.child, self.parent = torch.tensor(edges, device=device).unbind(dim=1)  # [E] each
        most = max(len(kind.attributes) for kind in kinds.values())
        rows = [[a[:3] for a in kinds[name].attributes.values()] for name in self.nodes]
        rows = [row + [(0, 0, 0)] * (most - len(row)) for row in rows]
        # Each [V,M]: the prior's mean and standard deviation, and the scale, 0 where there is none.
        mean, std, scale = torch.tensor(rows).unbind(dim=2)
        self.spread = std / scale.where(scale > 0, 1)  # of the prior in scales, on the CPU
        self.mean, self.scale = mean.to(device), scale.to(device)
        self.mutable = self.scale > 0

    def sample(self, count: int, rng: torch.Generator) -> Tensor:
        """Mutable attributes from the prior. -> [count,V,M] in scales from the mean, on the CPU."""
        return torch.randn(count, *self.spread.shape, generator=rng) * self.spread

    def read(self, values: Tensor) -> dict[str, Tensor]:
        """Attributes by name, in their units. [B,V,M] -> [B,1] each, [B,at_most] if repeated."""
        physical, found, first = self.mean + self.scale * values, {}, 0
        for kind in self.kinds.values():
            for m, name in enumerate(kind.attributes):
                # In one piece: functions of scattered values are slower, and round differently.
                found[name] = physical[:, first : first + kind.at_most, m].contiguous()
            first += kind.at_most
        return found


# ---- Material: source images, and objects cut out of them ---------------------------------------
OBJECTS = (
    "pole", "traffic light", "traffic sign", "person", "rider", "car", "truck", "bus", "train",
    "motorcycle", "bicycle",
)  # fmt: skip
GROUND = ("road", "sidewalk", "terrain")


def components(labels: np.ndarray) -> np.ndarray:
    """Connected regions of equal labels, 4-neighbourhood. [H,W] -> int [H,W], one number a region.

    Every run of equal labels in a row takes the greatest number above and below it, then that run's
    own number: about as many rounds as the logarithm of the longest path. The number of a region is
    its last place in the flat map.
    """
    begins = np.ones(labels.shape, bool)
    begins[:, 1:] = labels[:, 1:] != labels[:, :-1]
    run = begins.ravel().cumsum().reshape(labels.shape) - 1  # [H,W], R runs
    last = np.append(np.flatnonzero(begins)[1:], labels.size) - 1  # [R]
    # Where two rows touch in equal labels; of two such columns side by side the first will do.
    touch = (labels[1:] == labels[:-1]) & (begins[1:] | begins[:-1])
    above, below, ids = run[:-1][touch], run[1:][touch], np.arange(len(last))
    while True:
        new = ids.copy()
        np.maximum.at(new, above, ids[below])
        np.maximum.at(new, below, ids[above])
        new = new[new]
        if (new == ids).all():
            return last[ids][run]
        ids = new


def horizons(labels: np.ndarray, ground: Sequence[int]) -> np.ndarray:
    """Where the ground begins: the row below which half of the width is ground once.

    uint8 [N,H,W] -> [N] in half heights, -1 at the top.
    """
    seen = np.stack([np.isin(one, ground).cumsum(axis=0).clip(max=1) for one in labels])
    row = (seen.mean(axis=2) < 0.25).sum(axis=1)  # [N]
    return (2 * row / labels.shape[1] - 1).clip(-0.5, 0.5).astype(np.float32)


class CutOuts(NamedTuple):
    """Objects of the source images at their own resolution, in a corner of a common canvas."""

    rgba: Tensor  # uint8 [A,4,h,w], premultiplied: black where the object is not
    classes: Tensor  # int64 [A]
    box: Tensor  # [A,4] centre x, centre y below the horizon, half width, half height


def cut_out(part: Part, horizon: np.ndarray, count: int, seed: int) -> CutOuts:
    """About `count` whole regions of the object classes, in equal parts of every class."""
    height, width = part.images.shape[1:3]
    canvas, least = (height, width // 2), 0.0015 * height * width
    names = common.classes_of(part.dataset)
    wanted = {c: math.ceil(count / len(OBJECTS)) for c, n in enumerate(names) if n in OBJECTS}
    found: list[tuple[np.ndarray, int, list[float]]] = []
    for n in np.random.default_rng(seed).permutation(len(part)):
        if not any(wanted.values()):
            break
        label = np.array(part.labels[n])
        pixels = np.bincount(label.ravel(), minlength=256)
        candidates = [c for c, left in wanted.items() if left and pixels[c] >= least]
        if not candidates:  # rare classes are looked for in every image
            continue
        regions = components(label)
        objects = regions[np.isin(label, candidates)]
        for number, area in zip(*np.unique(objects, return_counts=True), strict=True):
            if area < least:
                continue
            c = int(label.flat[number])
            y, x = np.nonzero(regions == number)
            top, bottom, left, right = y.min(), y.max() + 1, x.min(), x.max() + 1
            whole = left > 0 and right < width and bottom < height  # of what the frame shows
            fits = bottom - top <= canvas[0] and right - left <= canvas[1]
            if not (whole and fits and wanted[c]):
                continue
            wanted[c] -= 1
            rgba = np.zeros((*canvas, 4), np.uint8)
            inside = np.s_[top:bottom, left:right]
            rgba[: bottom - top, : right - left, :3] = part.images[n][inside]
            rgba[: bottom - top, : right - left, 3] = 255
            rgba[: bottom - top, : right - left][regions[inside] != number] = 0
            middle = (top + bottom) / height - 1 - horizon[n]
            box = [(left + right) / width - 1, middle]
            found.append((rgba, c, [*box, (right - left) / width, (bottom - top) / height]))
    if not found:
        raise UserError(f"{part.dataset}: no object could be cut out of its {len(part)} images")
    rgba, classes, boxes = zip(*found, strict=True)
    rgba = torch.from_numpy(np.stack(rgba)).permute(0, 3, 1, 2).contiguous()
    return CutOuts(rgba, torch.tensor(classes), torch.tensor(boxes))


# ---- Differentiable renderer --------------------------------------------------------------------
# A scene costs some fifty passes over its image, so every further operation shows.
def blend(layers: Sequence[Tensor], base: Tensor) -> tuple[Tensor, Tensor]:
    """Soft compositing of layers, the nearest first, over the base.

    layers: premultiplied RGBA, [B,4,H,W] each; base [B,3,H,W] -> image [B,3,H,W], and every layer's
    share of a pixel's colour, the base's last, [B,K+1,H,W], which sums to 1.
    """
    image, clear, shares = base, torch.ones_like(base[:, :1]), []
    for layer in reversed(layers):
        image = torch.addcmul(layer[:, :3], 1 - layer[:, 3:], image)
    for layer in layers:
        shares.append(clear * layer[:, 3:])
        clear = clear - shares[-1]
    return image, torch.cat([*shares, clear], dim=1)


BLUR = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)  # binomial, of a standard deviation of 1 px


def blurred(images: Tensor, share: Tensor | float) -> Tensor:
    """images [B,3,H,W], mixed with their blur of 1 px by `share`, a number or [B,1,1,1]."""
    smooth = F.pad(images, (2,) * 4, mode="replicate")
    for axis in (2, 3):  # sums of shifted images: much faster on CPUs than grouped convolutions
        first, *others = (smooth.narrow(axis, k, images.shape[axis]) for k in range(len(BLUR)))
        smooth = first * BLUR[0]
        for weight, tap in zip(BLUR[1:], others, strict=True):
            smooth = smooth.add(tap, alpha=weight)
    return torch.lerp(images, smooth, share)


# Of a colour: luma, times the root of 3, and two of chroma. Orthonormal, so that no variance is a
# small difference of large ones, which float32 would not bear.
AXES = F.normalize(torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64))


def moments(images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B,3,H,W] -> AXES like the images, [3,3]; mean colour [B,3,1]; differences from it along the
    axes [B,3,HW]; their variances [B,3]."""
    axes, flat = common.send(AXES, images.device).to(images.dtype), images.flatten(2)
    mean = flat.mean(dim=2, keepdim=True)
    turned = torch.baddbmm(-(axes @ mean), axes.expand(len(flat), 3, 3), flat)
    return axes, mean, turned, turned.square().sum(dim=2) / (flat.shape[2] - 1)


def tone(images: Tensor) -> Tensor:
    """Illumination, temperature, tint, contrast and saturation of images: see ROADS.

    [B,3,H,W] -> [B,5]. With chroma the difference from luma, and luma the mean of the channels.
    """
    _, mean, _, variance = moments(images)
    return tone_of(mean, variance)


def tone_of(mean: Tensor, variance: Tensor) -> Tensor:
    """`tone` from an image's `moments`. [B,3,1], [B,3] -> [B,5]."""
    red, green, blue = mean[..., 0].clamp(min=1e-3).unbind(dim=1)
    illumination = mean.mean(dim=(1, 2)).clamp(min=1e-3)
    luma, chroma = variance[:, 0] / 3, variance[:, 1:].sum(dim=1) / 3  # means over the channels
    warm, tint = red / blue, green / (red * blue).sqrt()
    contrast, saturation = (v.clamp(min=1e-6).sqrt() for v in (luma, chroma))
    return torch.stack([illumination, warm, tint, contrast, saturation], dim=1).log2()


def retone(images: Tensor, wanted: Tensor) -> Tensor:
    """Images of that tone, by the affine map of luma and chroma. [B,3,H,W], [B,5] -> [B,3,H,W]."""
    axes, mean, turned, variance = moments(images)
    contrast, saturation = (2 ** (wanted - tone_of(mean, variance)))[:, 3:].unbind(dim=1)
    scale = torch.stack([contrast, saturation, saturation], dim=1)[:, None]  # [B,1,3] by axis
    illumination, warm, tint = (2 ** wanted[:, :3]).unbind(dim=1)
    shares = torch.stack([warm.sqrt(), tint, 1 / warm.sqrt()], dim=1)  # red, green, blue
    new_mean = illumination[:, None] * shares / shares.mean(dim=1, keepdim=True)  # [B,3]
    return torch.baddbmm(new_mean[..., None], axes.T * scale, turned).view_as(images)


def photometry(image: Tensor, depth: Tensor, noise: Tensor, v: dict[str, Tensor]) -> Tensor:
    """Haze, tone, blur and sensor noise, in this order.

    image [B,3,H,W]; depth [B,1,H,W] relative to the horizon's; noise [2,B,3,H,W], white and the
    same blurred; v: the scene's attributes, [B,1] each -> [B,3,H,W] in [0,1].
    """
    p = {name: value[..., None, None] for name, value in v.items()}  # [B,1,1,1]
    clear = torch.exp(-p["haze"] * depth)  # Koschmieder's law
    image = torch.lerp(2 ** p["airlight"], image, clear)
    image = retone(image, torch.cat([v[name] for name in TONE], dim=1))
    image = blurred(image, p["blur"])
    # A mixture of delta and blur kernel, whose sum of squares is the variance of the mixed noise.
    middle, squares, grain = BLUR[2] ** 2, sum(k * k for k in BLUR) ** 2, p["grain"]
    variance = (1 - grain) ** 2 + 2 * middle * grain * (1 - grain) + squares * grain**2
    amount = 2 ** p["noise"] / variance.sqrt()
    image = torch.addcmul(image, amount * (1 - grain), noise[0])
    return torch.addcmul(image, amount * grain, noise[1]).clamp(0, 1)


def sampling_grid(theta: Tensor, size: Sequence[int]) -> Tensor:
    """F.affine_grid, as a sum of rows and columns. [B,2,3] -> [B,H,W,2]."""
    y, x = (((torch.arange(n, device=theta.device) + 0.5) * 2 / n - 1).to(theta) for n in size)
    ours = theta[:, None, None]  # [B,1,1,2,3]
    across = ours[..., 0] * x[:, None]  # [B,1,W,2]
    return across + (ours[..., 1] * y[:, None, None] + ours[..., 2])


def images_of(part: Part, device: torch.device) -> Iterator[Tensor]:
    """All images of a part, 64 at most at a time. -> [B,3,H,W] each."""
    for some in np.array_split(part.images, math.ceil(len(part) / 64)):
        yield common.to_tensor(some, device)


class Roads:
    """Road scenes: the grammar's graphs over the source images, and their renderer."""

    def __init__(self, part: Part, args: Args, device: torch.device) -> None:
        self.part, self.device, self.size = part, device, args.size
        names = common.classes_of(part.dataset)
        self.horizon = torch.from_numpy(
            horizons(part.labels, [c for c, name in enumerate(names) if name in GROUND])
        )
        self.cut_outs = cut_out(part, self.horizon.numpy(), args.assets, args.seed)
        kinds = {**ROADS, "object": ROADS["object"]._replace(at_most=args.objects)}
        self.grammar = Grammar(kinds, device)
        self.classes = 3 + len(names)  # empty, scene, camera, one of each object
        tones = torch.cat([tone(x) for x in images_of(part, torch.device("cpu"))])  # [N,5]
        mean, scale = (t[0, : len(TONE)].cpu() for t in (self.grammar.mean, self.grammar.scale))
        self.tones = (tones - mean) / scale
        self.fixed = 4  # immutable numbers: an object's place in its image, a scene's horizon
        # A store of noise, four times a scene's: to draw numbers for every scene would be a quarter
        # of its time.
        white = torch.randn(1, 3, 2 * args.size[0], 2 * args.size[1],
                            generator=common.generator(args.seed, 13))  # fmt: skip
        self.store = torch.cat([white, blurred(white, 1.0)]).to(device)  # [2,3,2H,2W]

    def sample(self, count: int, rng: torch.Generator) -> Graphs:
        """Scene graphs from the prior, on the CPU."""
        nodes, objects = len(self.grammar.nodes), len(self.grammar.nodes) - 2
        draw = partial(torch.randint, generator=rng)
        base = draw(len(self.part), (count,))
        present = torch.arange(objects) < draw(objects + 1, (count, 1))  # [B,K]
        # A class first, then one of its objects: rare classes come as often as cars.
        kinds = self.cut_outs.classes.unique()
        kind = kinds[draw(len(kinds), (count, objects))]
        weights = (self.cut_outs.classes == kind[..., None]).float()  # [B,K,A]
        asset = weights.flatten(0, 1).multinomial(1, generator=rng).view(count, objects)
        classes = torch.cat([torch.tensor([[1, 2]]).expand(count, 2), 3 + kind], dim=1)
        classes[:, 2:] *= present
        fixed = torch.zeros(count, nodes, self.fixed)
        fixed[:, 0, 0] = self.horizon[base]
        fixed[:, 2:, :4] = self.cut_outs.box[asset] * present[..., None]
        picture = torch.full((count, nodes), -1)
        picture[:, 0], picture[:, 2:] = base, torch.where(present, asset, -1)
        flip = torch.where(torch.rand(count, nodes, generator=rng) < 0.5, -1.0, 1.0)
        seed = draw(2**31, (count,))
        values = self.grammar.sample(count, rng)
        values[:, 0, : len(TONE)] += self.tones[base]
        return Graphs(values, classes, fixed, picture, flip, seed)

    def noise(self, graphs: Graphs) -> Tensor:
        """Sensor noise of each scene, white and blurred: a window of the store. -> [2,B,3,H,W]."""
        h, w = self.size
        corners = [divmod(seed % (h * w), w) for seed in graphs.seed.tolist()]
        return torch.stack([self.store[..., y : y + h, x : x + w] for y, x in corners], dim=1)

    def render(self, graphs: Graphs, values: Tensor) -> tuple[Tensor, Tensor]:
        """Images and label maps of scene graphs with these mutable attributes.

        graphs on the CPU, values [B,V,M] -> [B,3,H,W] in [0,1], int64 [B,H,W]. The label is that of
        the layer with the greatest share of the pixel's colour.
        """
        index, sample = graphs.picture[:, 0].numpy(), partial(F.grid_sample, align_corners=False)
        base = common.to_tensor(self.part.images[index], self.device).to(values)  # [B,3,H,W]
        under = common.send(torch.from_numpy(np.array(self.part.labels[index])), self.device)
        horizon = common.send(self.horizon[index, None], self.device).to(values)  # [B,1]
        v = self.grammar.read(values)
        theta = camera(v, self.size)  # from the frame into the source image
        grid = sampling_grid(theta, self.size)  # [B,H,W,2]
        base = sample(base, grid, padding_mode="border")
        # Bytes turn over: IGNORE + 1 is 0, as is what lies beyond the edge, and 0 - 1 is IGNORE.
        under = sample((under + 1)[:, None].to(values), grid, mode="nearest")
        labels = under[:, 0].byte() - 1  # [B,H,W]
        layers, classes = self.objects(graphs, v, horizon, theta, self.size)
        image, shares = blend(layers, base)
        *shares, most = shares.detach().unbind(dim=1)  # [B,H,W] each
        for share, kind in zip(shares, classes.unbind(dim=1), strict=True):
            labels = torch.where(share > most, kind[:, None, None], labels)
            most = torch.maximum(share, most)
        # Distance over that of the horizon, here 7 times as far as the image's lower edge.
        below = (grid[..., 1] - horizon[..., None]) * (6 / (1 - horizon[..., None]))
        depth = 1 / (1 + below.clamp(min=0))[:, None]
        return photometry(image, depth, self.noise(graphs).to(values), v), labels.long()

    def objects(
        self, graphs: Graphs, v: dict[str, Tensor], horizon: Tensor, theta: Tensor,
        size: Sequence[int],
    ) -> tuple[Sequence[Tensor], Tensor]:  # fmt: skip
        """The objects as layers, the nearest first, and their classes, seen by the camera `theta`.

        -> premultiplied RGBA [B,4,H,W] of `size` each, uint8 [B,K]. An object that comes nearer
        grows about the vanishing point, the middle of the horizon, so that it stays on the ground.
        """
        # All is looked up on the CPU and sent at once, so that the device is never waited for.
        send, asset = partial(common.send, device=theta.device), graphs.picture[:, 2:]
        flip, present = send(graphs.flip[:, 2:]).to(theta), send(asset >= 0).to(theta)
        asset = asset.clamp(min=0)
        box = send(self.cut_outs.box[asset]).to(theta)  # [B,K,4]
        pictures = send(self.cut_outs.rgba[asset])  # uint8 [B,K,4,h,w]
        near = 2 ** -v["distance"]  # [B,K]
        scale = near * 2 ** v["size"]
        x = flip * box[..., 0] * near + v["lateral"]
        foot = horizon + (box[..., 1] + box[..., 3]) * near  # below the object
        y = foot - box[..., 3] * scale
        half = box[..., 2:] * scale[..., None]  # [B,K,2] half sides
        # From the source image into the object, -1 to 1 across its box, mirrored or not; then onto
        # the canvas, whose corner the box fills: own = stretch * place + shift.
        (h, w), (height, width) = self.cut_outs.rgba.shape[2:], self.size
        filled = box[..., 2:] * send(torch.tensor([width / w, height / h], dtype=box.dtype))
        stretch = torch.stack([flip, torch.ones_like(flip)], dim=2) * filled / half
        shift = filled - 1 - stretch * torch.stack([x, y], dim=2)
        own = stretch[..., None] * theta[:, None] + F.pad(shift[..., None], (2, 0))  # [B,K,2,3]
        light = torch.stack([2 ** v["brightness"]] * 3 + [torch.ones_like(near)], dim=2)
        gain = light * present[..., None] / 255  # [B,K,4]
        order = foot.detach().argsort(dim=1, descending=True)  # [B,K]
        rows = torch.arange(len(order), device=theta.device)
        layers = []
        for k in order.unbind(dim=1):
            rgba = pictures[rows, k] * gain[rows, k][..., None, None]  # [B,4,h,w]
            grid = sampling_grid(own[rows, k], size)
            layers.append(F.grid_sample(rgba, grid, align_corners=False))
        return layers, send(self.cut_outs.classes[asset].byte()).gather(1, order)


def camera(v: dict[str, Tensor], size: Sequence[int]) -> Tensor:
    """Where in the source image a place in the rendered one lies: an affine map. -> [B,2,3]."""
    angle, zoom = torch.deg2rad(v["roll"]), 2 ** -v["zoom"]
    aspect = size[1] / size[0]
    rows = [
        torch.cat([zoom * angle.cos(), -zoom * angle.sin() / aspect, v["shift_x"]], dim=1),
        torch.cat([zoom * angle.sin() * aspect, zoom * angle.cos(), v["shift_y"]], dim=1),
    ]
    return torch.stack(rows, dim=1)


# ---- Distribution transformer -------------------------------------------------------------------
class GraphLayer(nn.Module):
    """A graph convolution whose own, forward (from the parent) and backward (from the children)
    messages each have weights and a gate of their own. [B,V,D] -> [B,V,O]."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.own, self.forth, self.back = (nn.Linear(i, o) for _ in range(3))
        self.gates = nn.Linear(i, 3)

    def forward(self, h: Tensor, child: Tensor, parent: Tensor, present: Tensor) -> Tensor:
        """child, parent [E] of the edges; present [B,V,1] 1 or 0: empty slots send nothing."""
        own, forth, back = self.own(h), self.forth(h) * present, self.back(h) * present
        down = torch.zeros_like(own).index_add(1, child, forth[:, parent])
        up = torch.zeros_like(own).index_add(1, parent, back[:, child])
        number = torch.zeros_like(present).index_add(1, parent, present[:, child])
        gate = self.gates(h).sigmoid()  # [B,V,3]
        up = up / number.clamp(min=1)
        return gate[..., :1] * own + gate[..., 1:2] * down + gate[..., 2:] * up


class Transformer(nn.Module):
    """The distribution transformer: an encoder and a decoder of graph layers."""

    def __init__(self, grammar: Grammar, classes: int, fixed: int, args: Args) -> None:
        super().__init__()
        self.classes, self.outputs = classes, grammar.scale.shape[1]
        self.register_buffer("child", grammar.child, persistent=False)
        self.register_buffer("parent", grammar.parent, persistent=False)
        self.register_buffer("mutable", grammar.mutable.float(), persistent=False)
        widths = [len(grammar.nodes) + classes + fixed + self.outputs] + [args.width] * args.layers
        self.encoder = nn.ModuleList(map(GraphLayer, widths[:-1], widths[1:]))
        widths = [args.width] * args.layers + [classes + self.outputs]
        self.decoder = nn.ModuleList(map(GraphLayer, widths[:-1], widths[1:]))

    def forward(self, graphs: Graphs) -> tuple[Tensor, Tensor]:
        """-> new mutable attributes [B,V,M], logits of the nodes' classes [B,V,classes]."""
        classes = F.one_hot(graphs.classes, self.classes).to(graphs.values)
        slots = torch.eye(len(self.mutable), device=graphs.values.device)
        slots = slots.expand(len(classes), -1, -1)
        h = torch.cat([slots, classes, graphs.fixed, graphs.values], dim=2)
        present = (graphs.classes > 0).to(h)[..., None]
        *first, last = [*self.encoder, *self.decoder]
        for layer in first:
            h = F.silu(layer(h, self.child, self.parent, present))
        h = last(h, self.child, self.parent, present)
        logits, values = h.split([self.classes, self.outputs], dim=2)
        return values * self.mutable, logits


# ---- Maximum mean discrepancy -------------------------------------------------------------------
def mmd2(x: Tensor, y: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Unbiased estimate of the squared MMD (Gretton et al., JMLR 2012), mean over the kernels
    exp(-d^2 / (2 b^2)). [n,D], [m,D] -> scalar, below 0 at times."""

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T  # [n,m]
        return sum(torch.exp(-squared / (2 * s**2)) for s in bandwidths) / len(bandwidths)

    def within(a: Tensor) -> Tensor:
        matrix = kernel(a, a)
        return (matrix.sum() - matrix.trace()) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * kernel(x, y).mean()


def colour_statistics(images: Tensor) -> Tensor:
    """Mean and log of the standard deviation of each channel in four bands. [B,3,H,W] -> [B,24]."""
    bands = images.unflatten(2, (4, -1)).flatten(3)  # [B,3,4,HW/4]
    spread = (bands.var(dim=3) + 1e-4).log() / 2
    return torch.cat([bands.mean(dim=3), spread], dim=1).flatten(1)


def measure(images: Tensor) -> dict[str, Tensor]:
    """What of a scene's attributes can be seen in an image itself. [B,3,H,W] -> [B] each."""
    luma = images.mean(dim=1, keepdim=True)  # [B,1,H,W]
    # The darkest value of a patch: near 0 in clear air (He et al., CVPR 2009).
    dark = -F.max_pool2d(-images.amin(dim=1, keepdim=True), 5, stride=1, padding=2)
    horizon = slice(images.shape[2] // 3, images.shape[2] * 6 // 10)  # about there
    # A mask that no plane and no straight edge excites (Immerkaer, CVIU 1996).
    mask = torch.tensor([[[[1, -2, 1], [-2, 4, -2], [1, -2, 1]]]], dtype=luma.dtype)
    mask = common.send(mask, luma.device)
    noise = F.conv2d(luma, mask).abs().mean(dim=(1, 2, 3)) * math.sqrt(math.pi / 2) / 6
    one, two = luma.diff(dim=3).square(), (luma[..., 2:] - luma[..., :-2]).square()
    return {
        **dict(zip(TONE, tone(images).unbind(dim=1), strict=True)),
        "haze (dark channel)": dark[:, :, horizon].mean(dim=(1, 2, 3)),
        "blur (steps of 2 px over 1 px)": two.mean(dim=(1, 2, 3)) / one.mean(dim=(1, 2, 3)),
        "noise (log2)": noise.log2(),
    }


def network_statistics(net: Network, images: Tensor) -> Tensor:
    """Mean and log of the standard deviation, in two bands, of the first features of a tiny
    segmentation network. [B,3,H,W] -> [B,384]."""
    x4 = net.body.down4(net.body.stem((images - net.mean) / net.std))  # [B,32,H/4,W/4]
    statistics = []
    for x in (x4, net.body.down8(x4)):
        bands = x.unflatten(2, (2, -1)).flatten(3)  # [B,C,2,HW/2]
        statistics += [bands.mean(dim=3), (bands.var(dim=3) + 1e-4).log() / 2]
    return torch.cat(statistics, dim=1).flatten(1)


class Features:
    """Groups of features in units of their spread over the prior's scenes and the photos, so that
    the median distance between two images is 1 in every group."""

    @torch.no_grad()
    def __init__(
        self,
        groups: Callable[[Tensor], list[Tensor]],
        prior: Iterator[Tensor],
        photos: Iterator[Tensor],
        least: float = 0.0,
    ) -> None:
        """least: of a feature's deviation, in root mean squares of its group's: pixels of a digit's
        empty surroundings have next to none, and would count above all else once it moves."""
        self.groups, self.scaling, self.photos = groups, [], []
        scenes, real = (map(torch.cat, zip(*map(groups, x), strict=True)) for x in (prior, photos))
        for one, other in zip(scenes, real, strict=True):
            both = torch.cat([one, other])
            mean, std = both.mean(dim=0), both.std(dim=0) + 1e-6
            std = torch.maximum(std, least * std.square().mean().sqrt())
            # Of a scene and a photo, since what counts is how far they are from each other.
            std = std * torch.cdist((one[:256] - mean) / std, (other[:256] - mean) / std).median()
            self.scaling.append((mean, std))
            self.photos.append((other - mean) / std)

    def __call__(self, images: Tensor) -> list[Tensor]:
        groups = zip(self.groups(images), self.scaling, strict=True)
        return [(x - mean) / std for x, (mean, std) in groups]


# ---- Stages 1 and 2 -----------------------------------------------------------------------------
def descend(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """One update at the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def reconstruct(
    steps: Iterator[int],
    world: Any,
    transformer: Transformer,
    optimizer: torch.optim.Optimizer,
    args: Args,
    log: Callable[..., None],
) -> None:
    """Stage 1: the transformer learns to give back the prior's graphs, classes and attributes."""
    for step in steps:
        rng = common.generator(args.seed, step, 1)
        lr = common.learning_rate(args.reconstruct_lr, step, args.reconstruct_steps)
        graphs = world.sample(args.match_batch, rng).to(world.device)
        values, logits = transformer(graphs)
        mutable = transformer.mutable * (graphs.classes > 0)[..., None]
        squared = ((values - graphs.values) * mutable).square().sum() / mutable.sum()
        classes = F.cross_entropy(logits.flatten(0, 1), graphs.classes.flatten())
        loss = squared + 0.1 * classes  # weights of the paper's code
        descend(optimizer, loss, lr)
        log(step, reconstruction_loss=loss, squared_error=squared, lr=lr)


def match(
    steps: Iterator[int],
    world: Any,
    transformer: Transformer,
    optimizer: torch.optim.Optimizer,
    features: Features,
    args: Args,
    log: Callable[..., None],
    show: Callable[[int], None],
) -> None:
    """Stage 2: the MMD between rendered scenes and photos falls, its gradient through the renderer.

    show(step) is called before every eighth of the stage and after its end.
    """
    for step in steps:
        if (step - 1) % max(1, args.match_steps // 8) == 0:
            show(step - 1)
        rng = common.generator(args.seed, step, 2)
        lr = common.learning_rate(args.match_lr, step, args.match_steps)
        graphs = world.sample(args.match_batch, rng)
        there = graphs.to(world.device)
        values, _ = transformer(there)
        images, _ = world.render(graphs, values)
        chosen = torch.randperm(len(features.photos[0]), generator=rng)[: args.match_photos]
        chosen = common.send(chosen, world.device)
        pairs = zip(features(images), features.photos, strict=True)
        losses = [mmd2(x, y[chosen], args.bandwidths) for x, y in pairs]
        mmd = sum(losses)
        mutable = transformer.mutable * (there.classes > 0)[..., None]
        change = ((values - there.values) * mutable).square().sum() / mutable.sum()
        descend(optimizer, mmd + args.prior_weight * change, lr)
        log(step, mmd_loss=mmd, change=change, lr=lr)
    show(args.match_steps)


# ---- Stage 3: task reward -----------------------------------------------------------------------
def reinforce_loss(samples: Tensor, mean: Tensor, sigma: float, rewards: Tensor) -> Tensor:
    """Its gradient estimates minus that of the expected reward of samples from N(mean, sigma^2).

    samples [S,...] are detached here, mean [...], rewards [S] -> scalar. The baseline of a reward
    is the mean of the others, so that it does not depend on the sample: no bias, less variance.
    """
    baseline = (rewards.sum() - rewards) / (len(rewards) - 1)
    squared = (samples.detach() - mean).square().flatten(1).sum(dim=1)  # [S]
    log_probability = -squared / (2 * sigma**2)  # but for a constant
    return -((rewards - baseline).detach() * log_probability).mean()


def task_reward(
    run: Run, start: Network, scenes: Iterator[tuple[Tensor, Tensor, Graphs]], few: Part
) -> float:
    """mIoU / 100 on the labelled photos of `start`, reset and trained on these scenes."""
    net = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.01)
    for images, labels, _ in scenes:
        loss = common.segmentation_loss(net(images, aux=True), labels)
        descend(optimizer, loss, run.args.lr / 4)
    guess = common.predict(net.eval(), few.images, run.device).argmax(dim=1)
    truth = torch.from_numpy(np.array(few.labels)).long().to(run.device)
    confusion = common.confusion_matrices(guess, truth, len(run.classes)).sum(dim=0)
    return common.scores(confusion.cpu().numpy())["mIoU"] / 100


def reward(run: Run, roads: Roads, transformer: Transformer, few: Part) -> None:
    """Stage 3: REINFORCE on the task network's score on the few labelled photos.

    The paper adds noise to every attribute of every scene, which leaves little of it in the mean of
    a data set, and a reward judges a data set. Here all scenes of one share the noise.
    """
    args, start = run.args, run.network()
    train_on_scenes(run, "reward_start", start, roads, transformer, args.reward_start, args.lr)
    optimizer = torch.optim.Adam(transformer.parameters())
    state = {"transformer": transformer, "optimizer": optimizer}
    for step in run.steps("reward", args.reward_rounds, **state):
        rng = common.generator(args.seed, step, 7)
        graphs = roads.sample(256, rng).to(roads.device)
        mean = transformer(graphs)[0].mean(dim=0)  # [V,M]
        noise = args.reward_sigma * torch.randn(args.reward_samples, *mean.shape, generator=rng)
        noise = noise.to(mean) * transformer.mutable  # [S,V,M]
        # The same graphs for every sample, so that only the attributes tell them apart.
        scenes = partial(rendered, roads, transformer, args.reward_steps * args.batch_size,
                         args.seed, step, batch=args.batch_size)  # fmt: skip
        scores = [task_reward(run, start, scenes(shift=shift), few) for shift in noise]
        rewards = torch.tensor(scores, device=roads.device)
        loss = reinforce_loss(mean + noise, mean, args.reward_sigma, rewards)
        descend(optimizer, loss, args.reward_lr)
        run.log(step, reward=rewards.mean(), reward_spread=rewards.std())


# ---- Road scenes --------------------------------------------------------------------------------
def train_on_scenes(
    run: Run, stage: str, net: Network, roads: Roads, transformer: Any, steps: int, lr: float
) -> None:
    """Supervised training beside the row's own, on new scenes at each of `steps` updates."""
    optimizer = torch.optim.AdamW(net.train().parameters(), weight_decay=0.01)
    for step in run.steps(stage, steps, **{stage: net}, optimizer=optimizer):
        batch = run.args.batch_size
        images, labels, _ = next(
            rendered(roads, transformer, batch, run.args.seed, step, batch=batch)
        )
        loss = common.segmentation_loss(net(images, aux=True), labels)
        descend(optimizer, loss, common.learning_rate(lr, step, steps))
        run.log(step, beside_loss=loss)


@torch.no_grad()
def rendered(
    world: Any, transformer: Any, count: int, *seeds: int, batch: int = 16, shift: Any = 0
) -> Iterator[tuple[Tensor, Tensor, Graphs]]:
    """`count` scenes in batches, of the prior where the transformer is None.

    shift: added to all mutable attributes, [V,M]. -> images [B,3,H,W], labels [B,H,W], graphs.
    """
    for k in range(math.ceil(count / batch)):
        graphs = world.sample(min(batch, count - batch * k), common.generator(*seeds, k, 4))
        there = graphs.to(world.device)
        values = there.values if transformer is None else transformer(there)[0]
        yield *world.render(graphs, values + shift), graphs


def training_set(run: Run, roads: Roads, transformer: Transformer | None) -> Part:
    """The scenes that the segmentation network trains on, also written to the run folder."""
    args, part = run.args, roads.part
    images = np.empty((args.scenes, *args.size, 3), np.uint8)
    labels, names = np.empty((args.scenes, *args.size), np.uint8), []
    for x, y, graphs in rendered(roads, transformer, args.scenes, args.seed, 1, batch=32):
        place = slice(len(names), len(names) + len(x))
        images[place], labels[place] = to_bytes(x), y.byte().cpu().numpy()
        names += [part.names[n] for n in graphs.picture[:, 0]]
    common.save_set(run.out / "set", part.dataset, images, labels, names)
    return common.load_set(run.out / "set", part.dataset, args.size)


def learn(run: Run, roads: Roads, photos: Part) -> Transformer:
    """The three stages."""
    args, device = run.args, run.device
    net = Network("tiny", len(run.classes)).to(device, memory_format=torch.channels_last)
    train_on_scenes(run, "features", net, roads, None, args.feature_steps, 5e-3)
    net.eval().requires_grad_(False)

    def groups(images: Tensor) -> list[Tensor]:
        seen = torch.stack([*measure(images).values()], dim=1)  # [B,8]
        return [seen, colour_statistics(images), network_statistics(net, images)]

    prior = (images for images, *_ in rendered(roads, None, 256, args.seed))
    features = Features(groups, prior, images_of(photos, device))
    transformer = Transformer(roads.grammar, roads.classes, roads.fixed, args).to(device)
    for stage, steps in (("reconstruct", args.reconstruct_steps), ("match", args.match_steps)):
        optimizer = torch.optim.Adam(transformer.parameters())
        iterator = run.steps(stage, steps, transformer=transformer, optimizer=optimizer)
        if stage == "reconstruct":
            reconstruct(iterator, roads, transformer, optimizer, args, run.log)
        else:
            show = partial(sheet, run.out / "datagen", roads, transformer)
            match(iterator, roads, transformer, optimizer, features, args, run.log, show)
    if args.task_reward:
        reward(run, roads, transformer, common.load(args, "target_few"))
    return transformer


def run(args: Args) -> Result | None:
    check_scenes(args)
    if args.experiment != "segmentation":
        return digits_experiment(args)
    run = Run(args, "metasim")
    if run.result:
        return run.result
    args, net = run.args, run.network()
    part, photos = common.load(args, "source"), common.load(args, "target_unlabelled")
    if args.attributes != "source":
        roads = Roads(part, args, run.device)
        transformer = learn(run, roads, photos) if args.attributes == "learned" else None
        part = training_set(run, roads, transformer)
        if transformer is not None:
            draw_scenes(run, roads, transformer, photos)
    common.train(run, net, part, args.steps)
    beside = f"{args.feature_steps} feature network, {args.match_steps} MMD updates"
    if args.task_reward:  # each reward is a training of the task network
        rewards = args.reward_rounds * args.reward_samples * args.reward_steps
        beside += f", {args.reward_start + rewards} of the task network"
    return run.finish(net, target_labels=args.labelled if args.task_reward else 0,
                      beside=beside if args.attributes == "learned" else "")  # fmt: skip


# ---- The paper's experiments on digits ----------------------------------------------------------
YAW = Attribute(0, 10, 90, "degrees, counter-clockwise")
DIGITS = {
    "mnist_rotation": {"yaw": YAW},
    "bigmnist": {"yaw": YAW, "x": Attribute(32, 1, 16, "px from the left"),
                 "y": Attribute(32, 1, 16, "px from the top")},
}  # fmt: skip
TARGETS = {"mnist_rotation": {"yaw": 90.0}, "bigmnist": {"yaw": 270.0, "x": 16.0, "y": 48.0}}
FACES = ("DejaVuSans", "DejaVuSerif", "STIXGeneral", "cmr10", "cmb10", "cmss10", "cmtt10")


def typeset_digits(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits in matplotlib's typefaces, sheared, stretched and slanted at random.

    -> float [count,1,28,28] in [0,1], int64 [count]
    """
    import matplotlib
    from PIL import ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    files = sorted(f for f in folder.glob("*.ttf")
                   if f.stem.startswith(FACES) and "Display" not in f.stem)  # fmt: skip
    rng, size = np.random.default_rng(seed), 28
    fonts = [ImageFont.truetype(str(f), 22) for f in files]
    pictures = np.empty((count, 1, size, size), np.uint8)
    digits = rng.integers(10, size=count)
    for n, digit in enumerate(digits):
        picture = Image.new("L", (size, size))
        draw = ImageDraw.Draw(picture)
        draw.text((14, 14), str(digit), 255, fonts[rng.integers(len(fonts))], anchor="mm")
        a, b, d, e = np.eye(2).ravel() + rng.normal(0, 0.12, 4)
        c, f = 14 - a * 14 - b * 14, 14 - d * 14 - e * 14  # the centre stays
        pictures[n, 0] = picture.transform(
            (size, size), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR
        )
    return torch.from_numpy(pictures) / 255, torch.from_numpy(digits)


def load_digits(data: str, count: int, seed: int) -> tuple[Tensor, Tensor, str]:
    """MNIST's training digits in a random order where its files are below `data`, else typeset.

    -> float [count,1,28,28] in [0,1], int64 [count], where they are from.
    """
    from torchvision.datasets import MNIST

    folder = Path(data) / "MNIST"
    if data != "mini" and not Path(data).is_dir():
        raise UserError(f"{data}: no such folder; --data may hold MNIST/raw/")
    if not folder.is_dir():
        return *typeset_digits(count, seed), "typeset"
    try:
        digits = MNIST(data, train=True)
    except (RuntimeError, ValueError, AssertionError, EOFError) as error:
        raise UserError(f"{folder}: expected torchvision's four files in raw/ ({error})") from error
    order = torch.randperm(len(digits), generator=common.generator(seed))[:count]
    return digits.data[order, None] / 255, digits.targets[order], "MNIST"


class Digits:
    """One digit on a black canvas, 32 px or 64 px wide: the paper's MNIST and BigMNIST."""

    def __init__(self, experiment: str, pictures: Tensor, digits: Tensor, device: Any) -> None:
        self.attributes, self.device = DIGITS[experiment], device
        self.size = 32 if experiment == "mnist_rotation" else 64
        self.pictures, self.digits = pictures.to(device), digits
        kinds = {"scene": Kind(None, {}), "digit": Kind("scene", self.attributes)}
        self.grammar = Grammar(kinds, device)
        self.classes, self.fixed = 12, 0  # empty, scene, ten digits

    def sample(self, count: int, rng: torch.Generator) -> Graphs:
        picture = torch.randint(len(self.digits), (count, 2), generator=rng)
        classes = torch.stack([torch.ones(count).long(), 2 + self.digits[picture[:, 1]]], dim=1)
        fixed, flip = torch.zeros(count, 2, 0), torch.ones(count, 2)
        values = self.grammar.sample(count, rng)
        return Graphs(values, classes, fixed, picture, flip, torch.zeros(count).long())

    def render(self, graphs: Graphs, values: Tensor) -> tuple[Tensor, Tensor]:
        """-> images [B,1,S,S] in [0,1], the digits [B]."""
        middle = values.new_full((1, 1), self.size / 2)
        v = {"x": middle, "y": middle}
        v = {name: value[:, 0] for name, value in {**v, **self.grammar.read(values)}.items()}
        pictures = self.pictures[common.send(graphs.picture[:, 1], self.device)].to(values)
        angle, ratio = torch.deg2rad(v["yaw"]), self.size / pictures.shape[3]
        x, y = (2 * v[name].expand_as(angle) / self.size - 1 for name in "xy")
        cos, sin = ratio * angle.cos(), ratio * angle.sin()
        # From the canvas into the picture: rotation by -yaw about the centre, y pointing down.
        rows = [[cos, -sin, -cos * x + sin * y], [sin, cos, -sin * x - cos * y]]
        theta = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
        grid = F.affine_grid(theta, [len(x), 1, self.size, self.size], align_corners=False)
        images = F.grid_sample(pictures, grid, align_corners=False)
        return images, graphs.classes[:, 1] - 2


class DigitNet(nn.Sequential):
    """The task network of the digits. [B,1,S,S] -> logits [B,10]."""

    def __init__(self, size: int) -> None:
        layers = [common.conv(1, 16, stride=2), common.conv(16, 32, stride=2), common.conv(32, 32)]
        super().__init__(*layers, nn.Flatten(), nn.Linear(2 * size**2, 10))


def digit_accuracy(world: Digits, transformer: Any, images: Tensor, truth: Tensor, args: Args):
    """Test accuracy, in %, of a network trained on the world's scenes."""
    torch.manual_seed(args.seed)
    net = DigitNet(world.size).to(world.device)
    optimizer = torch.optim.AdamW(net.parameters())
    scenes = rendered(world, transformer, 16 * args.digit_steps, args.seed)
    for step, (x, y, _) in enumerate(scenes, start=1):
        loss = F.cross_entropy(net(x), common.send(y, world.device))
        descend(optimizer, loss, common.learning_rate(2e-3, step, args.digit_steps))
    with torch.no_grad():
        guess = net.eval()(images).argmax(dim=1).cpu()
    return 100 * (guess == truth).float().mean().item()


def at_target(world: Digits, target: dict[str, float], count: int, seed: int) -> Any:
    """`count` images of the world with exactly these attributes, and their digits."""
    graphs = world.sample(count, common.generator(seed, 6))
    values = [(target[n] - a.mean) / a.scale for n, a in world.attributes.items()]
    graphs.values[:, 1] = torch.tensor(values)
    with torch.no_grad():
        return world.render(graphs, graphs.values.to(world.device))


def blurred_pixels(images: Tensor) -> list[Tensor]:
    """The picture under Gaussian blurs of 2, 4, 8 and 16 px, at as many pixels as each can hold.

    [B,1,S,S] -> [B,(S/sigma)^2] of each sigma. Wide blurs tell a digit which way to go from afar,
    narrow ones how to turn; with the features of a random convolutional network, that see no
    further than their kernels, thin digits left the canvas.
    """
    size, groups = images.shape[3], []
    for sigma in (2, 4, 8, 16):
        centres = torch.arange(sigma / 2, size, sigma, device=images.device)
        pixels = torch.arange(size, device=images.device) + 0.5
        weights = (-((centres[:, None] - pixels) ** 2) / (2 * sigma**2)).softmax(dim=1)
        groups.append((weights @ images[:, 0] @ weights.T).flatten(1))
    return groups


def learn_digits(world: Digits, features: Features, args: Args, out: Path) -> Transformer:
    """Stages 1 and 2 from `digit_starts` initial weights. -> the transformer of the lowest MMD.

    Each start is kept in a folder below out/starts, so that an interrupted experiment goes on with
    the next; sheets and weights of the best are copied to out/datagen.
    """
    found: list[tuple[float, Path, Transformer]] = []
    for start in range(args.digit_starts):
        torch.manual_seed(args.seed + 1000 * start)
        transformer = Transformer(world.grammar, world.classes, world.fixed, args).to(world.device)
        folder = out / f"starts/{start}"
        weights = folder / "transformer.pt"
        if weights.exists():
            transformer.load_state_dict(torch.load(weights, world.device, weights_only=True))
        else:
            optimizer = torch.optim.Adam(transformer.parameters(), weight_decay=1e-5)
            steps = iter(range(1, args.reconstruct_steps + 1))
            reconstruct(steps, world, transformer, optimizer, args, lambda *_, **__: None)
            optimizer = torch.optim.Adam(transformer.parameters(), weight_decay=1e-5)
            show = partial(sheet, folder, world, transformer)
            steps = iter(range(1, args.match_steps + 1))
            match(steps, world, transformer, optimizer, features, args, lambda *_, **__: None, show)
            with common.replacing(weights) as temporary:
                torch.save(transformer.state_dict(), temporary)
        scenes = torch.cat([x for x, *_ in rendered(world, transformer, 1000, args.seed)])
        pairs = zip(features(scenes), features.photos, strict=True)
        mmd = sum(mmd2(x, y, args.bandwidths).item() for x, y in pairs)
        print(f"start {start}: MMD^2 {mmd:.5f}", flush=True)
        found.append((mmd, folder, transformer))
    _, folder, best = min(found, key=lambda one: one[0])
    shutil.copytree(folder, out / "datagen", dirs_exist_ok=True)
    animate(out / "datagen")
    return best


def spread(values: Tensor, circular: bool) -> tuple[float, float]:
    """Mean and standard deviation; of angles in degrees the circular ones, the mean in [0, 360)."""
    if not circular:
        return values.mean().item(), values.std().item()
    resultant = torch.polar(torch.ones_like(values), torch.deg2rad(values)).mean()
    mean, std = resultant.angle(), (-2 * resultant.abs().clamp(max=1).log()).sqrt()
    return torch.rad2deg(mean).item() % 360, torch.rad2deg(std).item()


def digits_folder(out: Path, config: dict[str, Any], resume: bool) -> dict[str, Any] | None:
    """The result of a finished experiment with this configuration, else its folder is prepared: one
    that was cut off is gone on with, one of other arguments is moved aside."""
    old, result = common.read_config(out), out / "result.json"
    if old is None and out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: not empty and not a run folder; give another --out")
    if resume and old == config and result.exists():
        return json.loads(result.read_text())
    if old and (old != config or not resume):
        common.move_aside(out)
    common.write_json(out / "config.json", config)
    return None


def digits_experiment(args: Args) -> None:
    """`--experiment mnist_rotation` or `bigmnist`; writes result.json, datagen/ and figures/."""
    started, target = time.perf_counter(), TARGETS[args.experiment]
    common.check_device(args.device)
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    # No folder that --collect would take for a row of the table.
    out = args.out or Path("runs/digits") / f"{args.experiment}-seed{args.seed}"
    pictures, digits, kind = load_digits(args.data, args.digits, args.seed)
    config = asdict(replace(args, out=None, resume=True, device=device.type))
    config = json.loads(json.dumps({"method": "metasim", "pictures": kind, **config}))
    result = digits_folder(out, config, args.resume)
    if result is None:
        args = replace(args, prior_weight=0.0, match_lr=args.digit_match_lr,
                       match_steps=args.digit_match_steps)  # fmt: skip
        # Three disjoint sets of pictures: the simulator's, the unlabelled target's, the test's.
        parts = zip(pictures.chunk(3), digits.chunk(3), strict=True)
        world, other, test = (Digits(args.experiment, *part, device) for part in parts)
        images, truth = at_target(test, target, 1000, args.seed)
        photos = at_target(other, target, 1000, args.seed)[0]
        prior = (images for images, *_ in rendered(world, None, 256, args.seed))
        features = Features(blurred_pixels, prior, iter(photos.split(256)), least=1.0)
        before = digit_accuracy(world, None, images, truth, args)
        transformer = learn_digits(world, features, args, out)
        after = digit_accuracy(world, transformer, images, truth, args)
        with torch.no_grad():
            graphs = world.sample(1000, common.generator(args.seed, 9)).to(device)
            drawn, learned = map(world.grammar.read, (graphs.values, transformer(graphs)[0]))
        turns = round((learned["yaw"].mean().item() - target["yaw"]) / 360)
        histograms(out / "figures/attributes.png", {"prior": drawn, "learned": learned},
                   {name: a.meaning for name, a in world.attributes.items()},
                   {**target, "yaw": target["yaw"] + 360 * turns})  # fmt: skip
        moments = {k: spread(v, circular=k == "yaw") for k, v in learned.items()}
        result = {"experiment": args.experiment, "seed": args.seed, "pictures": kind,
                  "accuracy_before": before, "accuracy_after": after, "target": target,
                  "learned_mean": {k: v[0] for k, v in moments.items()},
                  "learned_std": {k: v[1] for k, v in moments.items()},
                  "seconds": time.perf_counter() - started, "device": device.type,
                  "commit": common.commit()}  # fmt: skip
        common.write_json(out / "result.json", result)
        shutil.rmtree(out / "starts")
    print("task accuracy {accuracy_before:.1f}% before, {accuracy_after:.1f}% after, in "
          "{seconds:.0f} s, {pictures} digits".format(**result))  # fmt: skip
    for name, wanted in target.items():
        mean, std = result["learned_mean"][name], result["learned_std"][name]
        print(f"{name}: learned {mean:.1f} +- {std:.1f}, target {wanted:.1f}")


# ---- Figures ------------------------------------------------------------------------------------
def to_bytes(images: Tensor) -> np.ndarray:
    """[B,C,H,W] in [0,1] -> uint8 [B,H,W,C]."""
    return (255 * images).round().byte().permute(0, 2, 3, 1).cpu().numpy()


@torch.no_grad()
def sheet(folder: Path, world: Any, transformer: Transformer, step: int) -> None:
    """Sixteen scenes of the same graphs, as datagen/scenes_STEP.png, at least 512 px wide."""
    graphs = world.sample(16, common.generator(0, 5))
    images, _ = world.render(graphs, transformer(graphs.to(world.device))[0])
    picture = np.concatenate(np.split(np.concatenate(to_bytes(images), axis=1), 4, axis=1))
    times = max(1, 512 // picture.shape[1])
    picture = picture.repeat(times, axis=0).repeat(times, axis=1)
    with common.replacing(folder / f"scenes_{step:06d}.png") as temporary:
        Image.fromarray(picture.squeeze()).save(temporary, format="png")


def animate(folder: Path) -> None:
    """The sheets of a training as an animation, datagen/training.gif."""
    frames = [Image.open(path).convert("RGB") for path in sorted(folder.glob("scenes_*.png"))]
    with common.replacing(folder / "training.gif") as temporary:
        frames[0].save(temporary, format="gif", save_all=True, append_images=frames[1:],
                       duration=[500] * (len(frames) - 1) + [2000], loop=0)  # fmt: skip


def histograms(
    path: Path,
    sets: dict[str, dict[str, Tensor]],
    units: dict[str, str],
    marks: dict[str, float] | None = None,
) -> None:
    """One panel a quantity, one outline a set; NaNs are left out. marks: the target's values."""
    from matplotlib.figure import Figure

    first, marks = next(iter(sets.values())), marks or {}
    names = [name for name, values in first.items() if values.isfinite().any()]
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    size = (3.2 * max(2, columns), 2.1 * rows + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        values = {title: some[name][some[name].isfinite()] for title, some in sets.items()}
        values = {title: some.flatten().cpu().numpy() for title, some in values.items()}
        bins = np.linspace(*np.quantile(np.concatenate([*values.values()]), [0.003, 0.997]), 31)
        for (title, x), colour in zip(values.items(), ("C7", "C0", "C3"), strict=False):
            axis.hist(x, bins, density=True, histtype="step", color=colour, label=title, lw=1.5)
        if name in marks:
            axis.axvline(marks[name], color="C3", label="target")
        axis.set_title(name, fontsize=9)
        axis.set_xlabel(units.get(name, ""), fontsize=7)
        axis.tick_params(labelsize=7)
        axis.set_yticks([])
    for axis in axes[len(names) :]:
        axis.axis("off")
    axes[0].set_ylabel("density", fontsize=7)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False)
    common.save_figure(figure, path)


def measured(batches: Iterator[Tensor]) -> dict[str, Tensor]:
    """`measure` of batches of images, batch by batch, since photos may be large."""
    rows = [measure(images) for images in batches]
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def draw_scenes(run: Run, roads: Roads, transformer: Transformer, photos: Part) -> None:
    """figures/attributes.png: every attribute of the graphs; figures/measured.png: what is measured
    in scenes and photos; figures/scenes.png: the same graphs before and after; the animation."""
    attributes, seen, columns = {}, {}, {}
    for title, by in (("prior", None), ("learned", transformer)):
        graphs = roads.sample(512, common.generator(run.args.seed, 10)).to(run.device)
        values, there = by(graphs)[0] if by else graphs.values, (graphs.classes > 0)[..., None]
        attributes[title] = roads.grammar.read(values.where(there, math.nan))
        seen[title] = measured(x for x, *_ in rendered(roads, by, 512, run.args.seed))
        images, labels, _ = next(rendered(roads, by, 512, run.args.seed))
        columns[title] = list(to_bytes(images[:6]))
    columns["label of the learned (black: ignored)"] = list(labels[:6].byte().cpu().numpy())
    places = np.linspace(0, len(photos) - 1, 6).round().astype(int)
    columns["photo"] = list(photos.images[places])
    common.draw_sheet(run.out / "figures/scenes.png", columns, run.classes)

    some = (photos.images[k : min(k + 64, 1000)] for k in range(0, min(1000, len(photos)), 64))
    seen["photos"] = measured(common.to_tensor(images, run.device) for images in some)
    units = {n: a.meaning for kind in ROADS.values() for n, a in kind.attributes.items()}
    histograms(run.out / "figures/attributes.png", attributes, units)
    histograms(run.out / "figures/measured.png", seen, units)
    animate(run.out / "datagen")


if __name__ == "__main__":
    common.main(Args, run, __doc__)
