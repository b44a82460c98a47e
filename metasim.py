"""Learns attributes of synthetic scenes so that the rendered images look like the target photos.

Meta-Sim (arXiv:1904.11621v1). A probabilistic grammar draws scene graphs. A graph network, the
distribution transformer, rewrites their attributes. A differentiable renderer turns them into
images and labels. The transformer minimises the maximum mean discrepancy (MMD) between features of
these images and of unlabelled photos. Each scene is a labelled source image with a new camera,
light, weather and surfaces, and with objects that are cut out of the source images. The
segmentation network trains on scenes that are rendered anew for every update.

    python metasim.py                                           (attributes by MMD, no target label)

    python metasim.py --task-reward                  (by MMD, then REINFORCE on 16 labelled photos)

    python metasim.py digits --experiment bigmnist               (the paper's experiment on digits)

The first takes 4 to 8 minutes on one CPU core and reaches 52 mIoU on the miniature (the default
data), where source_only reaches 45. `python metasim.py digits --help` lists the digits' flags.
"""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.distributed.nn.functional import all_gather

import common
import datasets
from common import Network, Result, Run
from datasets import IGNORE, Split, UserError


@dataclass(frozen=True)
class Args(common.Args):
    attributes: Literal["learned", "prior"] = "learned"
    """Attributes of the scenes: rewritten by the transformer, or as the grammar draws them."""
    task_reward: bool = False
    """REINFORCE after the updates by MMD. Its reward is the mIoU on the labelled photos."""
    scenes: int | None = None
    """Scenes to save in set/ after training, for --init of another method; 0: none.
    Default: 5 times --steps, at most 2,000."""
    objects: int = 1
    """Maximum number of objects to add to a source image; the number is uniform from 0 to this."""
    cut_outs: int = 600
    """Objects to cut out of the source images, as many of each of 11 classes (rounded up). They are
    fewer where the dataset lacks some of these classes."""
    feature_steps: int | None = None
    """Updates of the network whose features are compared. Default: a quarter of --steps."""
    match_steps: int | None = None
    """Updates of the transformer by MMD. Default: a quarter of --steps."""
    match_lr: float = 0.01
    """Learning rate of the updates by MMD. The paper's code: 1e-3."""
    match_batch: int | None = None
    """Scenes in an update by MMD. Default: 32, or 8 for scenes of more than 256x512 px, since
    each of 512x1024 px needs 0.5 GB. The paper's code: 50."""
    match_photos: int = 128
    """Photos in an update by MMD, drawn out of at most 256. The paper's code: 200."""
    lambda_content: float = 1.0
    """Weight of the MMD of the content: which classes the feature network sees in which part of
    the image, and their colours. 0: tone and texture alone."""
    lambda_prior: float = 0.2
    """Weight of the squared change of the attributes (mean over all nodes, empty ones included).
    Attributes about which the photos say nothing then stay at the prior. The paper: 0."""
    reward_rounds: int = 4
    """Updates of the transformer by REINFORCE."""
    reward_samples: int = 4
    """Rewards in an update by REINFORCE, at least 2."""
    reward_steps: int | None = None
    """Updates of the task network for each reward. Each time it starts as a copy of the feature
    network. Default: 1/16 of --steps."""
    reward_sigma: float = 0.2
    """Standard deviation of the noise of REINFORCE, in units of each attribute's scale. The
    paper's code: 0.02."""
    reward_lr: float = 1e-3
    """Learning rate of REINFORCE."""


# ---- Probabilistic scene grammar ----------------------------------------------------------------
class Attribute(NamedTuple):
    """A mutable attribute. Its prior is N(mean, std). The transformer works with (value - mean) /
    scale. unit: a remark that no code uses."""

    mean: float
    std: float
    scale: float
    unit: str


# For the tone, mean is only the zero point: the prior is the image's own tone plus N(0, std).
# Luma is the mean of R, G and B here. Opponent colours are R - B and G - (R + B) / 2.
TONE = {
    "illumination": Attribute(-1.5, 0.2, 0.5, "log2 of the mean luma"),
    "temperature": Attribute(0, 0.1, 0.3, "log2 of red / blue"),
    "tint": Attribute(0, 0.1, 0.3, "log2 of green / sqrt(red blue)"),
    "contrast": Attribute(-2.5, 0.2, 0.5, "log2 of luma's standard deviation"),
    "red_blue": Attribute(-4, 0.2, 0.5, "log2 of the standard deviation of R - B"),
    "green": Attribute(-5, 0.2, 0.5, "log2 of the standard deviation of G - (R + B) / 2"),
}
WEATHER = {
    "haze": Attribute(0, 0.05, 0.5, "optical depth at the horizon; below 0: clearer"),
    "airlight": Attribute(-0.5, 0.2, 0.5, "log2 of the haze's brightness, before exposure"),
    "blur": Attribute(0, 0.1, 0.5, "weight of a blur of 1 px; below 0: sharper"),
    "noise": Attribute(-7.5, 0.5, 1, "log2 of the standard deviation"),
}
CAMERA = {
    "shift_x": Attribute(0, 0.05, 0.1, "half widths"),
    "shift_y": Attribute(0, 0.03, 0.1, "half heights"),
    "zoom": Attribute(0.1, 0.05, 0.2, "log2 of the magnification"),
    "roll": Attribute(0, 1, 2, "degrees"),
}
SURFACE = {
    "albedo": Attribute(0, 0.1, 0.3, "log2 of the gain"),
    "warmth": Attribute(0, 0.05, 0.2, "log2 of red / blue"),
    "hue": Attribute(0, 0.05, 0.2, "log2 of green / sqrt(red blue)"),
    "texture": Attribute(0, 0.1, 0.3, "log2 of the gain of details, which a blur of 1 px removes"),
}
OBJECT = {
    "lateral": Attribute(0, 0.3, 0.3, "half widths right of its place in the source image"),
    "distance": Attribute(0, 0.4, 0.5, "log2 of the gain over its distance in the source image"),
    "size": Attribute(0, 0.1, 0.2, "log2 of the gain"),
    "brightness": Attribute(0, 0.2, 0.3, "log2 of the gain"),
}


class Graphs(NamedTuple):
    """A batch of scene graphs with V nodes each. Node 0 is the root, all others its children."""

    values: Tensor  # [B,V,M] mutable attributes, (value - mean) / scale, 0 where a node has fewer
    classes: Tensor  # int64 [B,V] classes of the nodes; 0 for an empty node
    fixed: Tensor  # [B,V,F] immutable attributes that the transformer sees
    picture: Tensor  # int64 [B,V] index of the source image, cut-out or digit; -1 for none
    seed: Tensor  # int64 [B] of the sensor noise

    def share(self) -> "Graphs":
        """The scenes of this process, under torchrun."""
        return Graphs(*(t.tensor_split(common.world_size())[common.rank()] for t in self))


class Grammar:
    """Prior and scale of the mutable attributes of V nodes, padded with 0 to M for each node.
    kinds: for each kind of node its attributes, and how many nodes there are."""

    def __init__(self, kinds: Sequence[tuple[dict[str, Attribute], int]]) -> None:
        self.kinds, rows = kinds, []
        most = max(len(attributes) for attributes, _ in kinds)
        for attributes, count in kinds:
            row = [attribute[:3] for attribute in attributes.values()]
            rows += [row + [(0.0, 0.0, 0.0)] * (most - len(row))] * count
        # Each [V,M]. The scale is 0 where there is no attribute.
        self.mean, std, self.scale = torch.tensor(rows).unbind(dim=2)
        self.prior_std = std / self.scale.where(self.scale > 0, 1)  # in units of scale
        self.mutable = self.scale > 0

    def read(self, values: Tensor) -> dict[str, Tensor]:
        """Attributes by name, in their units. [B,V,M] -> [B,number of such nodes] each."""
        mean, scale = self.mean.to(values.device), self.scale.to(values.device)
        physical, named, first = mean + scale * values, {}, 0
        for attributes, count in self.kinds:
            for m, name in enumerate(attributes):
                named[name] = physical[:, first : first + count, m].contiguous()
            first += count
        return named


# ---- Material: source images, and objects that are cut out of them ------------------------------
OBJECTS = ("pole", "traffic light", "traffic sign", "person", "rider", "car", "truck", "bus")
OBJECTS += ("train", "motorcycle", "bicycle")
GROUND = ("road", "sidewalk", "terrain")
# The classes of each surface
SURFACES = ("road", "sidewalk"), ("vegetation", "terrain"), ("building", "wall", "fence"), ("sky",)
FIRST = 2 + len(SURFACES)  # node of the first object; before it: scene, camera, surfaces
MIN_AREA = 0.0015  # of a cut-out, as a share of the image
MAX_READ = 2000  # source images that are searched for objects


def horizons(labels: np.ndarray, names: Sequence[str]) -> Tensor:
    """The horizon of each image: the first row at which a quarter of the columns have ground there
    or above, but never in the uppermost or lowest quarter of the image.

    [B,H,W] train ids -> [B] in half heights, -1 at the top.
    """
    ground = np.isin(labels, [c for c, name in enumerate(names) if name in GROUND])
    reached = np.logical_or.accumulate(ground, axis=1).mean(axis=2)  # [B,H]
    return 2 * torch.from_numpy(reached < 0.25).float().mean(dim=1).clamp(0.25, 0.75) - 1


def cut_out(split: Split, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Connected regions of the object classes: of each at most count / len(OBJECTS), rounded up. At
    most MAX_READ images are read. An image gives at most one object of a class, and none that is
    small, wider than half the image, or cut off at the sides or below. -> RGBA (colours times
    alpha) in the top left corner of a canvas, uint8 [A,4,h,w]; classes int64 [A]; boxes [A,4]:
    centre x, centre y minus horizon, half width, half height, where the image spans -1 to 1."""
    height, width = split.images.shape[1:3]
    names, rng = split.dataset.classes, np.random.default_rng(common.seed_of(seed, "cut_out"))
    missing = {c: math.ceil(count / len(OBJECTS)) for c, n in enumerate(names) if n in OBJECTS}
    pictures, classes, boxes = [], [], []
    order, every = rng.permutation(len(split))[:MAX_READ], max(1, width // 256)
    for n in datasets.show_progress(order, "cutting out objects"):
        labels = np.array(split.labels[n])
        pixels = np.bincount(labels[::every, ::every].ravel(), minlength=256) * every**2
        for c in [c for c, m in missing.items() if m and pixels[c] >= MIN_AREA * height * width]:
            filled = Image.fromarray(labels).copy()
            y, x = rng.choice(np.argwhere(labels == c))
            ImageDraw.floodfill(filled, (int(x), int(y)), datasets.UNKNOWN)  # 4-neighbourhood
            mask = np.asarray(filled) == datasets.UNKNOWN  # [H,W]
            left, top, right, bottom = Image.fromarray(mask).getbbox()
            whole = left > 0 and right < width and bottom < height and right - left <= width // 2
            if mask.sum() < MIN_AREA * height * width or not whole:
                continue
            rgba = np.dstack([split.images[n], np.full_like(labels, 255)]) * mask[..., None]
            pictures.append(np.roll(rgba, (-top, -left), axis=(0, 1))[:, : width // 2])
            classes.append(c)
            horizon = float(horizons(labels[None], names))
            centre = (left + right) / width - 1, (top + bottom) / height - 1 - horizon
            boxes.append([*centre, (right - left) / width, (bottom - top) / height])
            missing[c] -= 1
    rgba = np.array(pictures, np.uint8).reshape(-1, height, width // 2, 4)  # A may be 0
    rgba = torch.from_numpy(rgba).permute(0, 3, 1, 2).contiguous()
    return rgba, torch.tensor(classes).long(), torch.tensor(boxes).view(-1, 4)


# ---- Differentiable renderer --------------------------------------------------------------------
def blur(images: Tensor) -> Tensor:
    """A blur with a standard deviation of 1 px. [B,3,H,W] -> [B,3,H,W]."""
    kernel = torch.tensor([1.0, 4, 6, 4, 1]).to(images) / 16
    kernel = torch.outer(kernel, kernel).expand(3, 1, 5, 5)
    images = F.pad(images, (2, 2, 2, 2), mode="replicate")
    # On a CPU this is eight times as fast with the channels last in memory.
    return F.conv2d(images.contiguous(memory_format=torch.channels_last), kernel, groups=3)


def opponents(images: Tensor) -> Tensor:
    """Luma, R - B and G - (R + B) / 2 of each pixel. [B,3,H,W] -> [B,3,H,W]."""
    red, green, blue = images.unbind(dim=1)
    return torch.stack([images.mean(dim=1), red - blue, green - (red + blue) / 2], dim=1)


def tone(images: Tensor) -> Tensor:
    """TONE as measured in images, finite for a single colour too. [B,3,H,W] -> [B,6]."""
    mean = images.mean(dim=(2, 3), keepdim=True)
    red, green, blue = mean.flatten(1).clamp(min=1e-3).unbind(dim=1)  # [B] each
    illumination = mean.mean(dim=(1, 2, 3)).clamp(min=1e-3)
    values = torch.stack([illumination, red / blue, green / (red * blue).sqrt()], dim=1)
    spread = opponents(images - mean).square().mean(dim=(2, 3)).clamp(min=1e-6).sqrt()  # [B,3]
    return torch.cat([values, spread], dim=1).log2()


def retone(images: Tensor, target: Tensor) -> Tensor:
    """Images with the TONE `target`: another mean, other gains of luma and of the opponent colours.
    [B,3,H,W], [B,6] -> [B,3,H,W]."""
    illumination, warm, tint = (2 ** target[:, :3, None, None]).unbind(dim=1)  # [B,1,1] each
    colour = torch.stack([warm.sqrt(), tint, 1 / warm.sqrt()], dim=1)  # [B,3,1,1]
    mean = illumination[:, None] * colour / colour.mean(dim=1, keepdim=True)
    gains = (2 ** (target - tone(images)))[:, 3:, None, None]  # [B,3,1,1]
    difference = gains * opponents(images - images.mean(dim=(2, 3), keepdim=True))
    luma, red_blue, green = difference.unbind(dim=1)  # [B,H,W] each
    magenta = luma - green / 3  # the mean of red and blue; green itself is luma + green * 2 / 3
    channels = magenta + red_blue / 2, luma + green * 2 / 3, magenta - red_blue / 2
    return mean + torch.stack(channels, dim=1)


class RoadScenes:
    """Road scenes made from the source images. A batch reads only the images that it needs."""

    def __init__(self, split: Split, args: Args, device: torch.device) -> None:
        self.split, self.device, self.size = split, device, args.size
        self.names = split.dataset.classes
        self.rgba, self.kinds, self.box = cut_out(split, args.cut_outs, args.seed)
        self.objects = args.objects if len(self.kinds) else 0
        kinds = [({**TONE, **WEATHER}, 1), (CAMERA, 1), (SURFACE, len(SURFACES))]
        self.grammar = Grammar([*kinds, (OBJECT, self.objects)])
        # Classes of nodes: 0 empty, 1 scene, 2 camera, 3 to 6 surfaces, 7 + train id of an object
        self.num_classes = 1 + FIRST + len(self.names)
        self.num_fixed = 4  # immutable attributes: the box of an object, the horizon of a scene
        surfaces = [[name in surface for name in self.names] for surface in SURFACES]
        self.surfaces = torch.tensor(surfaces, device=device)  # [4,C]

    def sample(self, count: int, rng: torch.Generator) -> Graphs:
        """Scene graphs from the prior, on the CPU."""
        source = torch.randint(len(self.split), (count,), generator=rng)
        limit = torch.randint(self.objects + 1, (count, 1), generator=rng)
        present = torch.arange(self.objects) < limit  # [B,K]
        asset = torch.randint(max(1, len(self.kinds)), present.shape, generator=rng)

        # Horizon and tone of the source images; of large ones from a part of their pixels
        every, grammar, tones = max(1, self.size[1] // 256), self.grammar, len(TONE)
        pixels = np.s_[source.numpy(), ::every, ::every]
        horizon = horizons(self.split.labels[pixels], self.names)
        measured = tone(common.to_tensor(self.split.images[pixels], torch.device("cpu")))
        measured = (measured - grammar.mean[0, :tones]) / grammar.scale[0, :tones]
        values = torch.randn(count, *grammar.mean.shape, generator=rng) * grammar.prior_std
        values[:, 0, :tones] += measured.clamp(-6, 6)  # far off for images of a single colour
        classes = torch.arange(1, 1 + FIRST).expand(count, FIRST)
        classes = torch.cat([classes, (1 + FIRST + self.kinds[asset]) * present], dim=1)
        fixed = torch.zeros(*classes.shape, self.num_fixed)
        fixed[:, 0, 0], fixed[:, FIRST:] = horizon, self.box[asset] * present[..., None]
        picture = torch.full(classes.shape, -1)
        picture[:, 0], picture[:, FIRST:] = source, asset.where(present, -1)
        seed = torch.randint(2**31, (count,), generator=rng)
        return Graphs(values, classes, fixed, picture, seed)

    def render(self, graphs: Graphs, values: Tensor) -> tuple[Tensor, Tensor]:
        """Images, differentiable in the mutable attributes of their scene graphs, and label maps.

        graphs on the CPU, values [B,V,M] on the device -> images [B,3,H,W] in [0,1], labels int64
        [B,H,W]. Each pixel has the label of the layer that contributes most to its colour.
        """
        (height, width), v = self.size, self.grammar.read(values)
        source = graphs.picture[:, 0].numpy()
        image = common.to_tensor(self.split.images[source], self.device).to(values)  # [B,3,H,W]
        labels = torch.from_numpy(np.array(self.split.labels[source]))
        horizon = common.to_device(graphs.fixed[:, 0, :1], self.device).to(values)  # [B,1]

        # Step 1: the camera moves over the source image
        angle, scale = torch.deg2rad(v["roll"]), 2 ** -v["zoom"]  # [B,1]
        cos, sin = scale * angle.cos(), scale * angle.sin()
        rows = [cos, -sin * height / width, v["shift_x"]], [sin * width / height, cos, v["shift_y"]]
        theta = torch.stack([torch.cat(row, dim=1) for row in rows], dim=1)  # [B,2,3]
        grid = F.affine_grid(theta, list(image.shape), align_corners=False)  # [B,H,W,2]
        image = F.grid_sample(image, grid, padding_mode="border", align_corners=False)
        labels = (common.to_device(labels, self.device)[:, None] + 1.0).to(values)
        labels = F.grid_sample(labels, grid, mode="nearest", align_corners=False)[:, 0].long()
        labels = labels.where(labels > 0, IGNORE + 1) - 1  # 0: beyond the edge

        # Step 2: its surfaces get other colours, and more or less texture
        masks = F.pad(self.surfaces, (0, IGNORE + 1 - len(self.names)))[:, labels]  # [4,B,H,W]
        masks = masks.transpose(0, 1).flatten(2).to(values)  # [B,4,HW]
        changes = [v["albedo"] + v["warmth"] / 2, v["albedo"] + v["hue"]]
        changes += [v["albedo"] - v["warmth"] / 2, v["texture"]]
        gains = 1 + (2 ** torch.stack(changes, dim=1) - 1) @ masks
        gains = gains.unflatten(2, self.size)  # [B,4,H,W] for red, green, blue and texture
        image = gains[:, :3] * torch.lerp(blur(image), image, gains[:, 3:])

        # Step 3: objects are laid over it. One that comes nearer grows about the vanishing point,
        # which is the middle of the horizon, so that it stays on the ground. Of two objects the one
        # with the lower foot is in front.
        assets = graphs.picture[:, FIRST:].clamp(min=0)  # [B,K]
        box = common.to_device(self.box[assets], self.device).to(values)  # [B,K,4]
        rgba = common.to_device(self.rgba[assets], self.device)  # uint8 [B,K,4,h,w]
        classes = graphs.classes[:, FIRST:] - 1 - FIRST  # train ids, below 0: none
        classes = common.to_device(classes, self.device)
        near = 2 ** -v["distance"]  # [B,K]
        half = box[..., 2:] * (near * 2 ** v["size"])[..., None]  # [B,K,2] half sides
        feet = horizon + (box[..., 1] + box[..., 3]) * near  # [B,K]
        x = box[..., 0] * near + v["lateral"]
        centre = torch.stack([x, feet - half[..., 1]], dim=2)  # [B,K,2]
        # From the source image onto the canvas of a cut-out. The object fills its top left corner.
        canvas = torch.tensor([rgba.shape[4] / width, rgba.shape[3] / height]).to(values)
        filled = box[..., 2:] / canvas  # [B,K,2]
        stretch = filled / half
        shift = filled - 1 - stretch * centre
        theta = stretch[..., None] * theta[:, None] + F.pad(shift[..., None], (2, 0))  # [B,K,2,3]
        gain = (2 ** v["brightness"])[..., None, None, None]
        present = (classes >= 0)[..., None, None, None]
        share, rows = torch.ones_like(image[:, 0]), torch.arange(len(values), device=self.device)
        for k in feet.detach().argsort(dim=1).unbind(dim=1):  # [B] each, the farthest first
            place = F.affine_grid(theta[rows, k], list(image.shape), align_corners=False)
            layer = (present[rows, k] * rgba[rows, k]).to(values) / 255
            layer = F.grid_sample(layer, place, align_corners=False)
            colour, alpha = layer.split([3, 1], dim=1)  # [B,3,H,W], [B,1,H,W]
            image = gain[rows, k] * colour + (1 - alpha) * image
            alpha = alpha[:, 0].detach()
            share = (1 - alpha) * share  # [B,H,W] weight of the label's layer in the colour
            labels = torch.where(alpha > share, classes[rows, k][:, None, None], labels)
            share = torch.maximum(alpha, share)

        # Step 4: haze, by Koschmieder's law. The depth depends only on the row of the source
        # image: above the horizon it is that of the horizon, at the lower edge 1/7 of that.
        haze, airlight, blurring, noise = (v[name][..., None, None] for name in WEATHER)
        horizon = horizon[..., None]  # [B,1,1]
        below = ((grid[..., 1] - horizon) / (1 - horizon)).clamp(min=0)
        depth = 1 / (1 + 6 * below)[:, None]  # [B,1,H,W]
        image = torch.lerp(2**airlight, image, torch.exp(-haze * depth))

        # Step 5: exposure, lens and sensor
        image = retone(image, torch.cat([v[name] for name in TONE], dim=1))
        image = torch.lerp(image, blur(image), blurring)
        rngs = [torch.Generator(self.device).manual_seed(seed) for seed in graphs.seed.tolist()]
        white = [torch.randn(1, *self.size, generator=rng, device=self.device) for rng in rngs]
        image = image + 2**noise * torch.stack(white).to(values)  # grey, like most noise of photos
        return image.clamp(0, 1), labels


# ---- Distribution transformer -------------------------------------------------------------------
class GraphLayer(nn.Module):
    """A graph convolution, [B,V,D] -> [B,V,O]. Each of three kinds of messages (from a node to
    itself, from the root to its children, from the children to the root) has weights and a gate."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.own, self.down, self.up = nn.Linear(i, o), nn.Linear(i, o), nn.Linear(i, o)
        self.gates = nn.Linear(i, 3)

    def forward(self, h: Tensor, present: Tensor) -> Tensor:
        """present [B,V,1], 1 or 0: empty nodes send nothing to the root."""
        own, down, up, gate = self.own(h), self.down(h), self.up(h), self.gates(h).sigmoid()
        number = present[:, 1:].sum(dim=1, keepdim=True).clamp(min=1)
        to_root = (up * present)[:, 1:].sum(dim=1, keepdim=True) / number  # [B,1,O]
        to_children = down[:, :1].expand(-1, h.shape[1] - 1, -1)  # [B,V-1,O]
        to_root, to_children = gate[:, :1, 2:] * to_root, gate[:, 1:, 1:2] * to_children
        return gate[..., :1] * own + torch.cat([to_root, to_children], dim=1)


class Transformer(nn.Module):
    """The distribution transformer: an encoder and a decoder of two graph layers each.

    graphs -> new mutable attributes [B,V,M]. The last layer's output is added to the old attributes
    and is 0 at first. In the paper it replaces them, after a stage in which it learns to copy them.
    """

    def __init__(self, world: Any, width: int = 64) -> None:
        super().__init__()
        self.num_classes, mutable = world.num_classes, world.grammar.mutable.float()
        self.register_buffer("mutable", mutable, persistent=False)  # [V,M]
        nodes, outputs = mutable.shape
        inputs = nodes + world.num_classes + world.num_fixed + outputs
        widths = [inputs, width, width, width, outputs]
        self.layers = nn.ModuleList(map(GraphLayer, widths[:-1], widths[1:]))
        for weight in self.layers[-1].parameters():
            nn.init.zeros_(weight)

    def forward(self, graphs: Graphs) -> Tensor:
        graphs = Graphs(*(common.to_device(x, self.mutable.device) for x in graphs))
        classes = F.one_hot(graphs.classes, self.num_classes).to(graphs.values)
        nodes = torch.eye(classes.shape[1]).to(classes).expand(len(classes), -1, -1)
        h = torch.cat([nodes, classes, graphs.fixed, graphs.values], dim=2)  # [B,V,D]
        present = (graphs.classes > 0).to(h)[..., None]
        for layer in self.layers[:-1]:
            h = F.silu(layer(h, present))
        return graphs.values + self.layers[-1](h, present) * self.mutable * present


@torch.no_grad()
def render_graphs(
    world: Any, transformer: nn.Module | None, graphs: Graphs, shift: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Images and labels of graphs as the transformer rewrites them, or as they are if it is None.
    shift [V,M] is added to the attributes."""
    values = graphs.values.to(world.device) if transformer is None else transformer(graphs)
    return world.render(graphs, values + shift)


# ---- Maximum mean discrepancy -------------------------------------------------------------------
BANDWIDTHS = (0.5, 1.0, 2.0, 4.0)  # of the kernels, as multiples of the median distance


def mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased estimate of the squared MMD (Gretton et al., JMLR 2012, eq. 3). The kernel is the
    mean of exp(-d^2 / (2 s^2)) over BANDWIDTHS s. [n,D], [m,D] -> scalar, which may be below 0."""
    kernels = []
    for a, b in ((x, x), (y, y), (x, y)):
        squared = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
        kernels.append(sum(torch.exp(-squared / (2 * s**2)) for s in BANDWIDTHS) / len(BANDWIDTHS))
    (n, m), (xx, yy, xy) = (len(x), len(y)), kernels  # [n,n], [m,m], [n,m]
    within = (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1))
    return within - 2 * xy.mean()


def band_statistics(x: Tensor, bands: int) -> Tensor:
    """Mean and log standard deviation of each channel in horizontal bands. [B,C,H,W] -> [B,D]."""
    x = x.unflatten(2, (bands, -1)).flatten(3)  # [B,C,bands,HW/bands]
    return torch.cat([x.mean(dim=3), (x.var(dim=3) + 1e-4).log() / 2], dim=1).flatten(1)


def scene_features(net: Network, images: Tensor) -> list[Tensor]:
    """Five groups of features of images [B,3,H,W]. 1 to 3, tone and texture: simple measurements
    [B,9], mean and spread of the colours in four bands [B,24] and of net's first layers in two
    bands [B,384]. 4 and 5, content: where the classes are [B,32C], their colours [B,3C]."""
    # Step 1: the network's first layers, and its prediction at a quarter of the resolution
    body = net.body
    x4 = body.down4(body.stem((images - net.mean) / net.std))  # [B,32,H/4,W/4]
    x8 = body.down8(x4)
    deep = torch.cat([band_statistics(x, 2) for x in (x4, x8)], dim=1)
    y = body.up8(torch.cat([common.upsample(body.down16(x8), x8.shape[2:]), x8], dim=1))
    y = body.up4(torch.cat([common.upsample(y, x4.shape[2:]), x4], dim=1))
    share = body.head(y).softmax(dim=1)  # [B,C,H/4,W/4] of the classes

    # Step 2: content. The colour of a class with few pixels is pulled towards the image's.
    layout = F.adaptive_avg_pool2d(share, (8, 4)).flatten(1)
    colours = F.avg_pool2d(images, 4).flatten(2)  # [B,3,HW/16]
    share = share.flatten(2) + 0.01
    colours = share @ colours.mT / share.sum(dim=2, keepdim=True)  # [B,C,3]

    # Step 3: haze. In clear air a patch near the horizon has a dark pixel (He et al., CVPR 2009).
    luma = images.mean(dim=1, keepdim=True)  # [B,1,H,W]
    dark = -F.max_pool2d(-images.amin(dim=1, keepdim=True), 5, stride=1, padding=2)
    dark = dark[:, :, images.shape[2] // 3 : images.shape[2] * 6 // 10].mean(dim=(1, 2, 3))

    # Step 4: blur, by differences over one and two pixels along rows; and noise, by a mask to which
    # planes, horizontal and vertical edges give nothing (Immerkaer, CVIU 1996)
    by_1 = luma.diff(dim=3).square().mean(dim=(1, 2, 3)).clamp(min=1e-7)
    by_2 = (luma[..., 2:] - luma[..., :-2]).square().mean(dim=(1, 2, 3)).clamp(min=1e-7)
    mask = torch.tensor([[[[1.0, -2, 1], [-2, 4, -2], [1, -2, 1]]]]).to(luma)
    noise = F.conv2d(luma, mask).abs().mean(dim=(1, 2, 3)) * math.sqrt(math.pi / 2) / 6
    measured = torch.stack([dark, by_2 / by_1, noise.clamp(min=1e-4).log2()], dim=1)
    measured = torch.cat([tone(images), measured], dim=1)
    return [measured, band_statistics(images, 4), deep, layout, colours.flatten(1)]


class Features:
    """Groups of features, scaled so that the median distance of a scene and a photo is 1 in each.
    groups(images [B,C,H,W]) -> a list of [B,D], one for each group. scenes, photos: batches of
    images. min_std, one for each group: the lower limit of a feature's standard deviation, as a
    share of the root mean square of the standard deviations in its group."""

    @torch.no_grad()
    def __init__(self, groups: Callable, scenes: Any, photos: Any, min_std: Sequence) -> None:
        self.groups, self.scaling, self.photos = groups, [], []
        scene_groups, photo_groups = (zip(*map(groups, x), strict=True) for x in (scenes, photos))
        for x, y, least in zip(scene_groups, photo_groups, min_std, strict=True):
            x, y = torch.cat(x), torch.cat(y)
            both = torch.cat([x, y])
            mean, std = both.mean(dim=0), both.std(dim=0) + 1e-6
            std = torch.maximum(std, least * std.square().mean().sqrt())
            distances = torch.cdist((x[:256] - mean) / std, (y[:256] - mean) / std)
            std = std * distances.median().clamp(min=1e-6)
            self.scaling.append((mean, std))
            self.photos.append((y - mean) / std)

    def mmd(self, images: Tensor, chosen: Tensor | slice) -> Tensor:
        """Squared MMD between images and the chosen photos. -> [groups]. Under torchrun the images
        of all processes are put together."""
        groups = [(x - m) / s for x, (m, s) in zip(self.groups(images), self.scaling, strict=True)]
        if common.world_size() > 1:
            groups = [torch.cat(all_gather(x)) for x in groups]
        return torch.stack([mmd2(x, y[chosen]) for x, y in zip(groups, self.photos, strict=True)])


# ---- The stages of road scenes ------------------------------------------------------------------
def gradient_step(optimizer: torch.optim.Optimizer, loss: Tensor, lr: float) -> None:
    """An update of the optimizer's parameters at this learning rate."""
    common.set_lr(optimizer, lr)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train(run: Run, args: Args, roads: RoadScenes, transformer: Any, net: Any, stage: str) -> None:
    """Like `common.train`, with new scenes in every batch. The network of the stage "features" sees
    random augmentations, so that it is of use on photos too."""
    final = stage == "train"
    steps = args.steps if final else args.feature_steps
    optimizer, model = common.make_optimizer(net, args.lr), common.parallel(net.train())
    for step in run.steps(stage, steps, net=net, optimizer=optimizer):
        rng = common.generator(args.seed, stage, step)
        graphs = roads.sample(args.batch_size, rng).share()
        images, labels = render_graphs(roads, transformer, graphs)
        images, labels = common.crop_flip(images, labels, rng)
        if not final:
            images = common.random_augmentation(images, rng)
        with run.autocast():
            loss = common.segmentation_loss(model(images, aux=True), labels)
        lr = common.learning_rate(args.lr, step, steps)
        gradient_step(optimizer, loss, lr)
        run.log(step, **{"loss" if final else "features_loss": loss}, lr=lr)
        if final and common.is_quarter(step, steps):
            run.evaluate(net, step)


def reinforce_loss(samples: Tensor, mean: Tensor, sigma: float, rewards: Tensor) -> Tensor:
    """Its gradient with respect to `mean` is an unbiased estimate of -grad E[reward]. The baseline
    of a reward is the mean of the others, which does not depend on the sample. samples [S,...] from
    N(mean, sigma^2), mean [...], rewards [S] -> scalar."""
    baseline = (rewards.sum() - rewards) / (len(rewards) - 1)
    squared = (samples.detach() - mean).square().flatten(1).sum(dim=1)  # [S]
    log_probability = -squared / (2 * sigma**2)  # up to a constant
    return -((rewards - baseline).detach() * log_probability).mean()


TASK_LR = 0.25  # constant learning rate of the task network, as a multiple of --lr


def learn_attributes(run: Run, args: Args, roads: RoadScenes, photos: Split) -> Transformer:
    """The transformer after all stages."""
    device, seed, transformer = run.device, args.seed, Transformer(roads).to(run.device)
    net = Network("tiny", len(run.classes)).to(device, memory_format=torch.channels_last)
    # Loaded now, so that an error costs no training.
    few = datasets.load(args, "target_few") if args.task_reward else None

    # Stage 1: the network whose features are compared learns to segment the prior's scenes
    train(run, args, roads, None, net, "features")
    net.eval().requires_grad_(False)
    if common.world_size() > 1:  # each process has batch statistics of its own
        for buffer in net.buffers():
            torch.distributed.broadcast(buffer, 0)  # rank 0's, which its checkpoint has
    draws = (roads.sample(8, common.generator(seed, "prior", batch)) for batch in range(32))
    scenes = (render_graphs(roads, None, graphs)[0] for graphs in draws)
    chosen = datasets.spaced(len(photos), 256)
    chunks = np.array_split(chosen, math.ceil(len(chosen) / 8))
    real = (common.to_tensor(photos.images[chunk], device) for chunk in chunks)
    features = Features(lambda x: scene_features(net, x), scenes, real, min_std=(0, 0, 0, 1, 1))
    weights = torch.tensor([1, 1, 1, args.lambda_content, args.lambda_content], device=device)

    # Stage 2: the MMD falls; its gradient comes through the renderer
    model, steps = common.parallel(transformer), args.match_steps
    optimizer = torch.optim.Adam(transformer.parameters())
    for step in run.steps("match", steps, transformer=transformer, optimizer=optimizer):
        rng = common.generator(seed, "match", step)
        graphs = roads.sample(args.match_batch, rng).share()
        values = model(graphs)  # [B,V,M]
        images, _ = roads.render(graphs, values)
        order = torch.randperm(len(chosen), generator=rng)[: args.match_photos].to(device)
        mmd = features.mmd(images, order)  # [5]
        change = (values - graphs.values.to(device)).square().mean()
        loss = weights @ mmd + args.lambda_prior * change
        lr = common.learning_rate(args.match_lr, step, steps)
        gradient_step(optimizer, loss, lr)
        run.log(step, mmd_loss=weights @ mmd, mmd_content=mmd[3:].sum(), change=change, lr=lr)

    # Stage 3: REINFORCE. For a reward, a copy of `net` trains on a set of scenes; the reward is its
    # mIoU (0 to 1) on the labelled photos. The paper draws new noise for each scene, which
    # averages out over a set. Here all scenes of a set get the same noise, so only the mean of the
    # attributes is learned.
    if few is None:
        return transformer
    truth = torch.from_numpy(np.array(few.labels)).to(device)  # [N,H,W]
    optimizer, steps = torch.optim.Adam(transformer.parameters()), args.reward_rounds
    for step in run.steps("reward", steps, transformer=transformer, optimizer=optimizer):
        # Step 1: the noise of each set
        rng, rewards = common.generator(seed, "reward", step), []
        mean = model(roads.sample(256, rng)).mean(dim=0)  # [V,M]
        noise = torch.randn(args.reward_samples, *mean.shape, generator=rng).to(mean)
        noise = args.reward_sigma * noise * transformer.mutable  # [S,V,M]

        # Step 2: the rewards. All sets have the same graphs, only the attributes differ.
        for shift in noise:
            task_net = copy.deepcopy(net).train().requires_grad_(True)
            task_model = common.parallel(task_net)
            task_optimizer = common.make_optimizer(task_net, args.lr)
            for i in range(args.reward_steps):
                graphs = roads.sample(args.batch_size, common.generator(seed, "set", step, i))
                images, labels = render_graphs(roads, transformer, graphs.share(), shift)
                with run.autocast():
                    loss = common.segmentation_loss(task_model(images, aux=True), labels)
                gradient_step(task_optimizer, loss, TASK_LR * args.lr)
            prediction = common.predict(task_net.eval(), few.images, device).argmax(dim=1)
            confusion = common.confusion_matrices(prediction, truth, len(run.classes)).sum(dim=0)
            rewards.append(common.scores(confusion.cpu().numpy())["mIoU"] / 100)

        # Step 3: the transformer
        rewards = common.mean_over_processes(torch.tensor(rewards, device=device))  # [S]
        loss = reinforce_loss(mean + noise, mean, args.reward_sigma, rewards)
        gradient_step(optimizer, loss, args.reward_lr)
        run.log(step, reward=rewards.mean(), reward_std=rewards.std())
    return transformer


def check(args: Any, least: int, *names: str) -> None:
    """UserError where one of these arguments is given and less than `least`."""
    for name in names:
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected at least {least}")


def run(args: Args) -> Result:
    """Learns the attributes of scenes, and trains the network on scenes that are drawn anew."""
    learned = args.attributes == "learned"
    needs = {"reward_": "--task-reward"} if not args.task_reward else {}
    if not learned:
        needs |= dict.fromkeys(("feature_", "match_", "lambda_", "task_"), "--attributes learned")
    for name, value in vars(args).items():
        for prefix, flag in needs.items():
            if name.startswith(prefix) and value != getattr(Args, name):
                raise UserError(f"--{name.replace('_', '-')}: has no effect without {flag}")
    check(args, 2, "match_batch", "match_photos", "reward_samples")
    check(args, 1, "reward_rounds", "reward_steps")
    check(args, 0, "scenes", "objects", "cut_outs", "feature_steps", "match_steps")
    if not args.reward_sigma > 0:
        raise UserError(f"--reward-sigma {args.reward_sigma}: expected a number above 0")
    run = Run(args, "metasim", stages=1 + 2 * learned + args.task_reward)
    if run.result:
        return run.result
    args = run.args
    lengths = {
        "scenes": min(5 * args.steps, 2000),
        "feature_steps": args.steps // 4,
        "match_steps": args.steps // 4,
        "match_batch": 32 if math.prod(args.size) <= 256 * 512 else 8,
        "reward_steps": max(1, args.steps // 16),
    }
    args = replace(args, **{k: n for k, n in lengths.items() if getattr(args, k) is None})
    if learned and args.match_batch % common.world_size():
        raise UserError(f"--match-batch {args.match_batch}: no multiple of the processes")
    if args.task_reward:
        datasets.load(args, "target_few")  # fails early if there are too few labelled photos
    run.begin()
    net, transformer, updates = run.network(), None, ""
    photos = datasets.load(args, "target_unlabelled")
    if len(photos) < 2:
        raise UserError(f"{photos.dataset.name}: metasim needs two photos, found {len(photos)}")

    roads = RoadScenes(datasets.load(args, "source"), args, run.device)
    if learned:
        transformer = learn_attributes(run, args, roads, photos)
        updates = f"{args.feature_steps} updates of the feature network, "
        updates += f"{args.match_steps} of the transformer"
    if args.task_reward:
        rewards = args.reward_rounds * args.reward_samples
        updates += f", {rewards * args.reward_steps} of the task network"
    train(run, args, roads, transformer, net, "train")

    # The set, for --init of another method
    if args.scenes and common.rank() == 0:
        images = datasets.create_array(run.out / "set/images.npy", (args.scenes, *args.size, 3))
        labels, names = np.empty(images.shape[:3], np.uint8), []
        for start in datasets.show_progress(range(0, args.scenes, 8), "writing set/"):
            rng = common.generator(args.seed, "scenes", start)
            graphs = roads.sample(min(8, args.scenes - start), rng)
            pictures = enumerate(graphs.picture[:, 0], start)  # the number makes names unique
            names += [f"{roads.split.names[n]} {scene}" for scene, n in pictures]
            x, y = render_graphs(roads, transformer, graphs)
            images[start : start + 8] = common.to_uint8(x)
            labels[start : start + 8] = y.byte().cpu()
        images.flush()
        datasets.save_set(run.out / "set", roads.split, labels, names)
    if learned and common.rank() == 0:
        draw_scenes(run, roads, transformer, photos, net)
    return run.finish(net, args.labelled if args.task_reward else 0, other_updates=updates)


# ---- The paper's experiments on digits ----------------------------------------------------------
@dataclass(frozen=True)
class DigitsArgs:
    experiment: Literal["rotation", "bigmnist"] = "rotation"
    """rotation: digits on 32x32 px, turned by 90 degrees in the target. bigmnist: digits on 64x64
    px, turned by 270 degrees and moved from the centre to (16, 48) px in the target."""
    data: str = "mini"
    """Folder with torchvision's MNIST/raw/; 'mini' draws digits in matplotlib's typefaces."""
    out: Path | None = None
    """Folder of the results. Default: runs/digits/EXPERIMENT-seedSEED."""
    seed: int = 0
    """Of the digits, the weights and the scenes."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1."""
    starts: int = 3
    """Transformers that are trained from different weights; the one with the lowest MMD is kept,
    since a digit that turns the wrong way stops at a local minimum. The paper: 1."""
    steps: int = 1000
    """Updates by MMD. The task network takes 4/10 as many, with 16 scenes each."""
    lr: float = 2e-4
    """Learning rate of the updates by MMD. The paper's code: 1e-3."""


DIGIT = {
    "yaw": Attribute(0, 10, 90, "degrees, counter-clockwise"),
    "x": Attribute(32, 1, 16, "px from the left"),  # the centre of 64 px
    "y": Attribute(32, 1, 16, "px from the top"),
}
TARGETS = {"rotation": {"yaw": 90.0}, "bigmnist": {"yaw": 270.0, "x": 16.0, "y": 48.0}}
DIGITS = 6000  # pictures, a third each for the scenes, the target and the test
CLASSIFIER_LR = 2e-3  # initial learning rate of the classifier that measures the accuracy
TYPEFACES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "STIXGeneral", "cmr10", "cmss10")


def load_digits(data: str, seed: int) -> tuple[Tensor, Tensor, str]:
    """Random training digits of MNIST below `data`. Where that is 'mini': digits in matplotlib's
    typefaces, of several sizes.
    -> pictures [DIGITS,1,28,28] in [0,1], digits int64 [DIGITS], "MNIST" or "typeset"."""
    from matplotlib import get_data_path
    from torchvision.datasets import MNIST

    rng = common.generator(seed, "digits")
    if data != "mini":
        try:
            mnist = MNIST(data, train=True, download=False)
        except (RuntimeError, ValueError, AssertionError, EOFError) as error:
            raise UserError(f"{data}/MNIST/raw: expected torchvision's files ({error})") from error
        order = torch.randperm(len(mnist), generator=rng)[:DIGITS]
        return mnist.data[order, None] / 255, mnist.targets[order], "MNIST"

    files = [f"{get_data_path()}/fonts/ttf/{name}.ttf" for name in TYPEFACES]
    fonts = [ImageFont.truetype(file, size) for file in files for size in (18, 20, 22, 24)]
    digits = torch.randint(10, (DIGITS,), generator=rng)
    faces = torch.randint(len(fonts), (DIGITS,), generator=rng)
    pictures = torch.empty(DIGITS, 1, 28, 28)
    for n, (digit, face) in enumerate(zip(digits.tolist(), faces.tolist(), strict=True)):
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((14, 14), str(digit), 255, fonts[face], anchor="mm")
        pictures[n, 0] = torch.from_numpy(np.array(picture)) / 255
    return pictures, digits, "typeset"


class DigitScenes:
    """One digit on a black canvas. The labels are the digits."""

    def __init__(self, experiment: str, pictures: Tensor, digits: Tensor, device: Any) -> None:
        self.pictures, self.digits, self.device = pictures.to(device), digits, device
        self.size, self.target = 32 if experiment == "rotation" else 64, TARGETS[experiment]
        self.grammar = Grammar([({}, 1), ({name: DIGIT[name] for name in self.target}, 1)])
        self.num_classes, self.num_fixed = 12, 0  # empty, scene, the ten digits

    def sample(self, count: int, rng: torch.Generator, at_target: bool = False) -> Graphs:
        """Scene graphs from the prior, or with exactly the target's attributes, on the CPU."""
        values = torch.randn(count, 2, len(self.target), generator=rng) * self.grammar.prior_std
        if at_target:
            target = [(x - DIGIT[n].mean) / DIGIT[n].scale for n, x in self.target.items()]
            values[:, 1] = torch.tensor(target)
        picture = torch.randint(len(self.digits), (count, 2), generator=rng)
        classes = torch.stack([torch.ones(count).long(), 2 + self.digits[picture[:, 1]]], dim=1)
        return Graphs(values, classes, torch.zeros(count, 2, 0), picture, torch.zeros(count).long())

    def render(self, graphs: Graphs, values: Tensor) -> tuple[Tensor, Tensor]:
        """graphs on the CPU, values [B,2,M] on the device -> images [B,1,S,S], digits [B]."""
        v, size = self.grammar.read(values), self.size  # [B,1] each
        pictures = self.pictures[graphs.picture[:, 1].to(self.device)].to(values)
        angle, ratio = torch.deg2rad(v["yaw"]), size / pictures.shape[3]
        x, y = (2 * v.get(n, torch.full_like(angle, size / 2)) / size - 1 for n in ("x", "y"))
        # From the canvas into the picture: rotation by -yaw about the centre, y points down.
        cos, sin = ratio * angle.cos(), ratio * angle.sin()
        rows = [[cos, -sin, -cos * x + sin * y], [sin, cos, -sin * x - cos * y]]
        theta = torch.stack([torch.cat(row, dim=1) for row in rows], dim=1)  # [B,2,3]
        grid = F.affine_grid(theta, [len(x), 1, size, size], align_corners=False)
        images = F.grid_sample(pictures, grid, align_corners=False)
        return images, (graphs.classes[:, 1] - 2).to(self.device)


def blurred_pixels(images: Tensor) -> list[Tensor]:
    """The image under Gaussian blurs of 2, 4, 8 and 16 px, with as few pixels as each one allows:
    wide ones show which way to move. [B,1,S,S] -> [B,(S/sigma)^2] for each sigma."""
    size, groups = images.shape[3], []
    pixels = torch.arange(size, device=images.device) + 0.5
    for sigma in (2, 4, 8, 16):
        centres = torch.arange(sigma / 2, size, sigma, device=images.device)
        weights = (-((centres[:, None] - pixels) ** 2) / (2 * sigma**2)).softmax(dim=1)
        groups.append((weights @ images[:, 0] @ weights.T).flatten(1))
    return groups


def run_digits(args: DigitsArgs) -> None:
    """Meta-Sim's experiments on digits: learns how the digits of a target are turned and placed.
    Writes result.json, with the accuracy of classifiers that are trained on the prior's and on the
    learned scenes, and figures/digits.png: both kinds of scenes, and images of the target."""
    check(args, 1, "starts", "steps")
    check(args, 0, "seed")
    seed, device = args.seed, torch.device(common.join_processes(args.device))
    out = args.out or Path("runs/digits") / f"{args.experiment}-seed{seed}"
    if (out / "config.json").exists():
        raise UserError(f"{out}: a run folder of a method; give another --out")

    # Step 1: three disjoint sets of pictures: the simulator's, the unlabelled target's, the test's
    pictures, digits, kind = load_digits(args.data, seed)
    parts = zip(pictures.chunk(3), digits.chunk(3), strict=True)
    world, other, test = (DigitScenes(args.experiment, *part, device) for part in parts)
    draw = other.sample(1000, common.generator(seed, "target"), at_target=True)
    photos, _ = render_graphs(other, None, draw)
    draw = test.sample(1000, common.generator(seed, "test"), at_target=True)
    images, truth = render_graphs(test, None, draw)
    draw = world.sample(1000, common.generator(seed, "scenes"))
    prior, _ = render_graphs(world, None, draw)
    # Pixels at the edge hardly vary in the prior's scenes; min_std keeps their weights low.
    features = Features(blurred_pixels, [prior[:256]], [photos], min_std=(1, 1, 1, 1))

    # Step 2: the transformer with the lowest MMD of several
    candidates = []
    for start in range(args.starts):
        torch.manual_seed(common.seed_of(seed, "start", start))
        candidate = Transformer(world).to(device)
        optimizer = torch.optim.Adam(candidate.parameters(), weight_decay=1e-5)
        for step in datasets.show_progress(range(1, args.steps + 1), f"start {start}"):
            rng = common.generator(seed, "match", step)
            graphs = world.sample(32, rng)
            x, _ = world.render(graphs, candidate(graphs))
            chosen = torch.randperm(len(photos), generator=rng)[: Args.match_photos].to(device)
            loss = features.mmd(x, chosen).sum()
            gradient_step(optimizer, loss, common.learning_rate(args.lr, step, args.steps))
        scenes, _ = render_graphs(world, candidate, draw)
        mmd = features.mmd(scenes, slice(None)).sum().item()
        print(f"start {start}: MMD^2 {mmd:.5f}", flush=True)
        if not math.isfinite(mmd):
            raise UserError(f"--lr {args.lr}: the MMD is {mmd}; try a lower learning rate")
        candidates.append((mmd, candidate, scenes))
    _, transformer, learned = min(candidates, key=lambda item: item[0])

    # Step 3: test accuracy, in %, of classifiers trained on the prior's and the learned scenes
    accuracies, steps = [], args.steps * 4 // 10
    for rewrite in (None, transformer):
        torch.manual_seed(common.seed_of(seed, "task"))
        layers = [common.conv(1, 16, stride=2), common.conv(16, 32, stride=2), common.conv(32, 32)]
        net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(2 * world.size**2, 10)).to(device)
        optimizer = torch.optim.AdamW(net.parameters())
        for step in range(1, steps + 1):
            graphs = world.sample(16, common.generator(seed, "task", step))
            x, y = render_graphs(world, rewrite, graphs)
            loss = F.cross_entropy(net(x), y)
            gradient_step(optimizer, loss, common.learning_rate(CLASSIFIER_LR, step, steps))
        correct = net.eval()(images).argmax(dim=1) == truth
        accuracies.append(100 * correct.float().mean().item())

    # Step 4: the result; learned angles are shown within 180 degrees of the target's
    before, after = accuracies
    attributes, target = world.grammar.read(transformer(draw)), world.target
    attributes["yaw"] = (attributes["yaw"] - target["yaw"] + 180) % 360 + target["yaw"] - 180
    result = {**asdict(args), "pictures": kind, "target": target}
    result |= {"accuracy_before": before, "accuracy_after": after}
    result["learned_mean"] = {name: x.mean().item() for name, x in attributes.items()}
    result["learned_std"] = {name: x.std().item() for name, x in attributes.items()}
    datasets.write_json(out / "result.json", result)
    rows = [np.concatenate(common.to_uint8(x[:16]), axis=1) for x in (prior, learned, photos)]
    with datasets.replacing(out / "figures/digits.png") as temporary:
        Image.fromarray(np.concatenate(rows)[..., 0]).save(temporary, format="png")
    print(f"task accuracy {before:.1f}% before, {after:.1f}% after, with {kind} digits")
    for name, x in attributes.items():
        print(f"{name}: learned {x.mean():.1f} +- {x.std():.1f}, target {target[name]:.1f}")


# ---- Figures ------------------------------------------------------------------------------------
def draw_scenes(run: Run, roads: RoadScenes, transformer: Any, photos: Split, net: Any) -> None:
    """scenes.png: scenes of the prior, learned ones, and photos. content.png: where the photos' six
    commonest classes lie in both kinds of scenes, and in photos as `net` predicts. The distance
    is half the sum of the differences of the classes' shares at a pixel, averaged over pixels."""
    # Step 1: scenes.png
    folder, columns, labels = run.out / "figures", {}, {}
    count = min(6, len(photos))
    for title, rewrite in (("prior", None), ("learned", transformer)):
        maps = []
        for batch in range(32):
            graphs = roads.sample(8, common.generator(run.args.seed, "figures", batch))
            images, y = render_graphs(roads, rewrite, graphs)
            maps.append(y.byte().cpu())
        columns[title] = list(common.to_uint8(images[:count]))
        columns[f"labels, {title}"] = list(maps[-1][:count].numpy())
        labels[title] = torch.cat(maps)  # [256,H,W]
    columns["photo"] = list(photos.images[datasets.spaced(len(photos), count)])
    common.draw_sheet(folder / "scenes.png", columns, run.classes)

    # Step 2: the share of each class at each pixel
    batches = [photos.images[i : i + 1] for i in datasets.spaced(len(photos), 256)]
    maps = [common.predict(net.eval(), batch, run.device).argmax(dim=1) for batch in batches]
    labels["photos, predicted"] = torch.cat(maps).byte().cpu()
    shares, classes = {}, range(len(run.classes))
    for title, y in labels.items():
        shares[title] = torch.stack([(y == c).float().mean(dim=0) for c in classes])  # [C,H,W]

    # Step 3: content.png
    photo_share = shares["photos, predicted"]
    shown = photo_share.mean(dim=(1, 2)).argsort(descending=True)[:6].tolist()
    figure = common.new_figure(2.4 * len(shown), 1.6 * len(shares))
    axes = figure.subplots(len(shares), len(shown), squeeze=False)
    for i, (title, share) in enumerate(shares.items()):
        distance = (share - photo_share).abs().sum(dim=0).mean() / 2
        axes[i, 0].set_ylabel(f"{title}\ndistance {distance:.3f}", fontsize=8)
        for axis, c in zip(axes[i], shown, strict=True):
            axis.imshow(share[c].numpy(), vmin=0, vmax=photo_share[c].max().item(), cmap="magma")
            axis.set(xticks=[], yticks=[], title=run.classes[c] if i == 0 else "")
    common.save_figure(figure, folder / "content.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["digits"]:
        del sys.argv[1]
        common.main(DigitsArgs, run_digits, run_digits.__doc__)
    else:
        common.main(Args, run, __doc__)
