"""Writes small procedural stand-ins of the four datasets in their official layout.

python miniature.py --out data/mini --seed 0    (a minute on two cores, 65 MB)

Every image is a pinhole view of a street: ground, rows of facades, hedges and fences that recede
to the vanishing point, and things that are painted back to front, lit in linear light. Image and
label come from the same geometry. DOMAINS holds all that tells the four datasets apart.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 1
RGB = tuple[float, float, float]
Range = tuple[float, float]

# ---- Labels -------------------------------------------------------------------------------------
# Cityscapes ids throughout; TREE and VAN are told apart from VEGETATION and CAR by VKITTI2 alone.
EGO, STATIC, ROAD, PAVEMENT, BUILDING, WALL, FENCE, RAIL, POLE = 1, 4, 7, 8, 11, 12, 13, 14, 17
LIGHT, SIGN, VEGETATION, TERRAIN, SKY, PERSON, RIDER, CAR = 19, 20, 21, 22, 23, 24, 25, 26
TRUCK, BUS, TRAIN, MOTORCYCLE, BICYCLE, TREE, VAN = 27, 28, 31, 32, 33, 40, 41
VKITTI_COLOURS = {
    TERRAIN: (210, 0, 200), SKY: (90, 200, 255), TREE: (0, 199, 0), VEGETATION: (90, 240, 0),
    BUILDING: (140, 140, 140), ROAD: (100, 60, 100), RAIL: (250, 100, 255), SIGN: (255, 255, 0),
    LIGHT: (200, 200, 0), POLE: (255, 130, 0), STATIC: (80, 80, 80), TRUCK: (160, 60, 60),
    CAR: (255, 127, 80), VAN: (0, 139, 139),
}  # fmt: skip
CITYSCAPES_COLOURS = {
    ROAD: (128, 64, 128), PAVEMENT: (244, 35, 232), BUILDING: (70, 70, 70), WALL: (102, 102, 156),
    FENCE: (190, 153, 153), RAIL: (180, 165, 180), POLE: (153, 153, 153), LIGHT: (250, 170, 30),
    SIGN: (220, 220, 0), VEGETATION: (107, 142, 35), TERRAIN: (152, 251, 152), BUS: (0, 60, 100),
    SKY: (70, 130, 180), PERSON: (220, 20, 60), RIDER: (255, 0, 0), CAR: (0, 0, 142),
    TRUCK: (0, 0, 70), TRAIN: (0, 80, 100), MOTORCYCLE: (0, 0, 230), BICYCLE: (119, 11, 32),
}  # fmt: skip


# ---- Domains ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Light:
    """The weather of an image. Sky colours in sRGB, strengths in linear light."""

    zenith: RGB
    horizon: RGB
    sun: float
    ambient: float
    reach: float  # metres of shadow per metre of height
    cloud: float = 0.1  # contrast of the clouds
    warmth: float = 0.0  # > 0 reddens the sun


NOON = Light((0.22, 0.42, 0.80), (0.70, 0.80, 0.90), 1.1, 0.45, 0.5)
AFTERNOON = Light((0.40, 0.58, 0.85), (0.90, 0.92, 0.92), 1.0, 0.40, 1.3, 0.2, 0.1)
OVERCAST = Light((0.74, 0.77, 0.80), (0.88, 0.89, 0.90), 0.1, 0.85, 0.3, 0.12)
GLOOM = Light((0.45, 0.48, 0.50), (0.70, 0.72, 0.70), 0.05, 0.40, 0.3, 0.25)
DUSK = Light((0.42, 0.45, 0.58), (0.95, 0.72, 0.52), 0.35, 0.30, 2.5, 0.2, 0.4)
GLARE = Light((0.93, 0.95, 0.97), (1.0, 1.0, 1.0), 1.3, 0.28, 1.1, 0.03, 0.05)
HAZY = Light((0.80, 0.84, 0.80), (0.92, 0.94, 0.89), 0.15, 0.75, 0.6, 0.08)
GAME = Light((0.15, 0.42, 0.95), (0.60, 0.80, 1.0), 0.7, 0.65, 0.7, 0.05)


@dataclass(frozen=True)
class Domain:
    """What tells one dataset from another. Lengths in metres, colours in sRGB 0..1."""

    number: int  # enters the seed of every image
    size: tuple[int, int]  # H, W in px
    lights: tuple[Light, ...]
    focal: float  # focal length in image widths
    eye: Range  # height of the camera
    horizon: Range  # in image heights from the top
    yaw: float  # largest shift of the vanishing point, in image widths
    bend: float  # largest curvature of the road, 1/m
    left: Range  # from the camera to the road's left edge
    right: Range
    pavement: Range
    verge: Range  # grass between pavement and plots
    plot: Range  # length of a plot along the street
    built: float  # share of the plots that carry a building
    storeys: Range
    end: Range  # distance of the street's far end
    parked: float  # mean number at each kerb
    traffic: float  # mean number on the lanes
    people: float
    trees: float
    bare: float  # share of leafless trees
    poles: float
    asphalt: tuple[RGB, ...]
    paving: tuple[RGB, ...]
    grass: tuple[RGB, ...]
    leaves: tuple[RGB, ...]
    facades: tuple[RGB, ...]
    rare: tuple[int, ...]  # every image shows the next five of these
    barriers: tuple[int, ...]  # what may stand between street and plots
    texture: float  # contrast of surfaces
    haze: Range  # extinction, 1/m
    exposure: Range  # stops
    tint: RGB  # gain of each channel
    balance: float  # its deviation from image to image, as a logarithm
    saturation: float
    contrast: float
    black: float  # lifted black level, 0..1
    blur: float  # px
    noise: float  # grey levels
    vignette: float
    jpeg: int  # quality of the camera's own compression, 0: none
    bonnet: bool = False


BRICKS = ((0.48, 0.30, 0.24), (0.62, 0.52, 0.40), (0.72, 0.68, 0.60), (0.55, 0.55, 0.54))
PLASTER = ((0.80, 0.76, 0.66), (0.66, 0.60, 0.50), (0.86, 0.84, 0.80), (0.44, 0.42, 0.40))
STREET = (FENCE, BUS, RIDER, LIGHT, PERSON, WALL, TRUCK, BICYCLE, SIGN, TERRAIN, TRAIN, MOTORCYCLE,
          POLE, PERSON, FENCE, BICYCLE)  # fmt: skip
ROADSIDE = (TRUCK, SIGN, RAIL, 0, 0, LIGHT, POLE, VAN, SIGN, 0)  # 0: nothing

DOMAINS = {
    "vkitti2": Domain(
        1, (96, 256), (GAME, GAME, NOON), 0.58, (1.6, 1.8), (0.42, 0.50), 0.08, 0.002,
        (5.0, 8.5), (3.0, 4.5), (0, 0), (2, 7), (10, 24), 0.45, (1, 3), (60, 140),
        parked=2.0, traffic=3.0, people=0, trees=9, bare=0, poles=4,
        asphalt=((0.42, 0.42, 0.45), (0.48, 0.47, 0.46)), paving=((0.6, 0.6, 0.6),),
        grass=((0.36, 0.55, 0.20), (0.45, 0.58, 0.25)),
        leaves=((0.22, 0.45, 0.12), (0.32, 0.52, 0.16)),
        facades=((0.82, 0.72, 0.55), (0.75, 0.45, 0.35), (0.88, 0.86, 0.8)),
        rare=ROADSIDE, barriers=(RAIL, STATIC), texture=0.12, haze=(0.0005, 0.002),
        exposure=(-0.2, 0.2), tint=(1, 1, 1), balance=0.015, saturation=1.25, contrast=1.0,
        black=0.0, blur=0.0, noise=0.0, vignette=0.0, jpeg=0,
    ),
    "kitti": Domain(
        2, (96, 256), (GLARE, NOON, AFTERNOON, AFTERNOON), 0.55, (1.6, 1.7), (0.38, 0.52), 0.1,
        0.004, (3.0, 6.0), (2.2, 5.0), (0, 2.2), (0.5, 4), (7, 20), 0.5, (1, 3), (40, 120),
        parked=4.0, traffic=1.5, people=0.5, trees=10, bare=0.15, poles=4,
        asphalt=((0.40, 0.41, 0.43), (0.33, 0.33, 0.35)), paving=((0.62, 0.60, 0.56),),
        grass=((0.33, 0.40, 0.18), (0.40, 0.40, 0.24)),
        leaves=((0.20, 0.28, 0.10), (0.28, 0.34, 0.14), (0.18, 0.25, 0.12)),
        facades=BRICKS + PLASTER,
        rare=ROADSIDE, barriers=(FENCE, WALL, VEGETATION), texture=0.3, haze=(0.0, 0.002),
        exposure=(-0.1, 0.6), tint=(0.97, 1.0, 1.04), balance=0.0, saturation=0.9, contrast=1.1,
        black=0.0, blur=0.4, noise=4.0, vignette=0.15, jpeg=70,
    ),
    "gta5": Domain(
        3, (112, 208), (NOON, AFTERNOON, OVERCAST, GLOOM, DUSK, GLARE), 0.7, (1.3, 2.2),
        (0.36, 0.56), 0.3, 0.004, (3.0, 8.0), (2.0, 5.5), (1.5, 6.0), (0, 1.0), (8, 22), 0.75,
        (2, 7), (25, 120),
        parked=3.0, traffic=2.0, people=4.0, trees=4, bare=0.4, poles=4,
        asphalt=((0.42, 0.42, 0.42), (0.36, 0.37, 0.39), (0.46, 0.44, 0.42), (0.30, 0.30, 0.31)),
        paving=((0.58, 0.56, 0.52), (0.50, 0.48, 0.46), (0.62, 0.61, 0.60)),
        grass=((0.38, 0.42, 0.22), (0.50, 0.45, 0.28)),
        leaves=((0.25, 0.30, 0.14), (0.20, 0.26, 0.15), (0.34, 0.36, 0.18)),
        facades=BRICKS + PLASTER,
        rare=STREET, barriers=(FENCE, WALL, VEGETATION), texture=0.35, haze=(0.0, 0.006),
        exposure=(-0.9, 0.6), tint=(1, 1, 1), balance=0.05, saturation=1.0, contrast=1.0,
        black=0.0, blur=0.3, noise=1.5, vignette=0.1, jpeg=0,
    ),
    "cityscapes": Domain(
        4, (128, 256), (HAZY, HAZY, OVERCAST, GLOOM), 0.62, (1.2, 1.4), (0.38, 0.47), 0.1, 0.002,
        (3.5, 6.0), (2.5, 5.5), (3.0, 5.5), (0, 1.5), (12, 28), 0.7, (3, 6), (40, 120),
        parked=4.0, traffic=2.0, people=5.0, trees=5, bare=0.1, poles=4,
        asphalt=((0.40, 0.41, 0.40), (0.35, 0.36, 0.36)),
        paving=((0.52, 0.51, 0.50), (0.50, 0.46, 0.44)),
        grass=((0.28, 0.40, 0.18),), leaves=((0.18, 0.28, 0.12), (0.22, 0.30, 0.14)),
        facades=PLASTER,
        rare=STREET, barriers=(FENCE, WALL, VEGETATION), texture=0.3, haze=(0.001, 0.005),
        exposure=(-0.3, 0.2), tint=(0.90, 1.0, 0.92), balance=0.01, saturation=0.85, contrast=0.88,
        black=0.025, blur=0.5, noise=2.0, vignette=0.15, jpeg=0, bonnet=True,
    ),
}  # fmt: skip


# ---- Texture ------------------------------------------------------------------------------------
@cache
def tile() -> np.ndarray:
    """1/f noise that repeats without a seam. -> [256, 256], mean 0, standard deviation 1"""
    rng, total = np.random.default_rng(0), np.zeros((128, 128), np.float32)
    for octave in range(2, 8):
        cells = Image.fromarray(rng.normal(size=(2**octave, 2**octave)).astype(np.float32))
        total += np.asarray(cells.resize((128, 128), Image.Resampling.BICUBIC))
    total = np.block([[total, total[:, ::-1]], [total[::-1], total[::-1, ::-1]]])
    return ((total - total.mean()) / total.std()).clip(-2.5, 2.5)


def grain(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The noise at the positions u, v (in texels, broadcast together)."""
    return tile()[u.astype(np.int32) & 255, v.astype(np.int32) & 255]


def linear(colour: RGB) -> np.ndarray:
    """sRGB 0..1 -> linear 0..1, [3]"""
    return np.array(colour, np.float32) ** 2.2


# ---- Camera and light ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Plot:
    """Something upright along the street: a building, hedge, wall, fence or rail."""

    label: int
    start: float
    stop: float
    height: float
    colour: np.ndarray  # linear
    bay: float  # width of a window's bay, or of a fence's spacing
    glass: float  # share of the bay
    storey: float
    phase: float  # of textures; also tells shops from houses


class Scene:
    """One street, its camera and its canvas, at twice the image's resolution."""

    def __init__(self, domain: Domain, rng: np.random.Generator, size: tuple[int, int]):
        def each(bounds: Range) -> dict[int, float]:
            return {side: rng.uniform(*bounds) for side in (-1, 1)}

        self.domain, self.rng = domain, rng
        self.light = domain.lights[rng.integers(len(domain.lights))]
        self.height, self.width = 2 * size[0], 2 * size[1]
        self.f = domain.focal * self.width * rng.uniform(0.9, 1.1)
        self.eye = rng.uniform(*domain.eye)
        self.y0 = rng.uniform(*domain.horizon) * self.height
        self.x0 = (0.5 + domain.yaw * rng.uniform(-1, 1)) * self.width
        self.bend = domain.bend * rng.uniform(-1, 1)
        self.dx = (np.arange(self.width, dtype=np.float32) + 0.5 - self.x0) / self.f  # [W]
        self.dy = (np.arange(self.height, dtype=np.float32) + 0.5 - self.y0) / self.f  # [H]
        self.edge = {-1: rng.uniform(*domain.left), 1: rng.uniform(*domain.right)}
        self.pavement, self.verge = each(domain.pavement), each(domain.verge)
        self.end = rng.uniform(*domain.end)
        self.sun_side = rng.choice((-1, 1))
        self.haze = rng.uniform(*domain.haze)
        self.gain = 2.0 ** rng.uniform(*domain.exposure)
        warm = np.array([1, 1 - 0.4 * self.light.warmth, 1 - 0.9 * self.light.warmth], np.float32)
        self.sun, self.air = self.light.sun * warm, linear(self.light.horizon)
        self.shade = Image.new("L", (self.width, self.height))  # shadows on the ground, 255 full

    def front(self, side: int) -> float:
        """Distance of the plots from the road's axis."""
        return self.edge[side] + self.pavement[side] + self.verge[side] + 0.3

    def colour(self, name: str) -> np.ndarray:
        """One of the domain's colours of that name, a little varied. -> linear [3]"""
        choices = getattr(self.domain, name)
        return linear(choices[self.rng.integers(len(choices))]) * self.rng.uniform(0.8, 1.2)

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Metres right of the road's axis, above ground, ahead -> px."""
        z = max(z, 0.7)
        return self.x0 + self.f * (x / z + self.bend * z), self.y0 + self.f * (self.eye - y) / z

    def expose(self, radiance: np.ndarray, z: np.ndarray | float) -> np.ndarray:
        """Linear radiance seen through z metres of air -> display values 0..255."""
        clear = np.exp(-self.haze * np.asarray(z, np.float32))
        return 255 * np.clip((radiance * clear + self.air * (1 - clear)) * self.gain, 0, 1) ** 0.455

    def tone(self, colour, z: float, facing: float = 0.5) -> tuple[int, ...]:
        """A linear albedo that faces the sun by that cosine -> display colour for drawing."""
        light = self.light.ambient + self.sun * max(facing, 0) * self.sunlit
        return tuple(self.expose(np.asarray(colour, np.float32) * light, z).astype(int).tolist())

    def fill(self, points: list, colour: tuple[int, ...], label: int = 0) -> None:
        """A polygon of px; label 0 keeps the label below (details)."""
        self.pen.polygon(points, fill=colour)
        if label:
            self.label_pen.polygon(points, fill=label)

    def rod(self, a: tuple, b: tuple, z: float, thick: float, colour, label: int = 0) -> None:
        """A rod with round ends between two points x, y (m); a disc where they are the same."""
        (ax, ay), (bx, by), wide = self.project(*a, z), self.project(*b, z), self.f * thick / z
        r = max(wide / 2, 0.8)
        for pen, value in ((self.pen, colour), (self.label_pen, label)):
            if value:
                pen.line((ax, ay, bx, by), fill=value, width=max(2, round(wide)))
                if wide > 3:
                    for x, y in ((ax, ay), (bx, by)):
                        pen.ellipse((x - r, y - r, x + r, y + r), fill=value)

    # ---- Background: sky, ground, plots ---------------------------------------------------------
    def paint_background(self, rows: list[tuple[float, int, list[Plot]]]) -> None:
        """Sky, ground and the rows of plots, far to near, into a fresh canvas."""
        self.pixels = np.empty((self.height, self.width, 3), np.float32)
        self.labels = np.full((self.height, self.width), SKY, np.uint8)
        up = np.clip(-self.dy / 0.5, 0, 1)[:, None, None] ** 0.7  # [H,1,1]
        far = 1 / (np.abs(self.dy)[:, None] + 0.12)  # the clouds lie on a plane overhead
        cloud = grain(40 * far + self.rng.uniform(0, 256), 30 * self.dx * far) * up[..., 0]  # [H,W]
        sky = (linear(self.light.zenith) * up + self.air * (1 - up)) * 1.1
        self.pixels[:] = self.expose(sky * np.exp(self.light.cloud * cloud)[..., None], 0)
        self.paint_ground()
        for offset, side, plots in rows:
            self.paint_row(offset, side, plots)
        self.image = Image.fromarray(self.pixels.clip(0, 255).astype(np.uint8))
        self.ids = Image.fromarray(self.labels)
        self.pen, self.label_pen = ImageDraw.Draw(self.image), ImageDraw.Draw(self.ids)

    def paint_ground(self) -> None:
        """Grass, then pavements, then the road, below the cast shadows."""
        rows = slice(int(np.searchsorted(self.dy, self.eye / 300)), self.height)
        z = (self.eye / self.dy[rows])[:, None]  # [h,1]
        x = self.dx * z - self.bend * z * z  # [h,W] metres right of the road's axis
        labels = np.full(x.shape, TERRAIN, np.uint8)
        fade = self.domain.texture / (1 + z / 30)
        fine, coarse = grain(18 * x, 12 * z), grain(1.3 * x + 99, 0.9 * z)
        albedo = self.colour("grass") * np.exp(fade * (0.9 * fine + 0.8 * coarse))[..., None]
        for side in (-1, 1):
            out = side * x - self.edge[side]
            paved = (out > 0) & (out < self.pavement[side])
            joints = ((out % 0.9 < 0.06) | (z % 0.9 < 0.06)) & (z < 15)
            light = np.exp(fade * 0.4 * (fine + coarse)) * (1 - self.domain.texture * joints)
            light[out < 0.18] *= 1.25  # the kerb
            albedo[paved] = (self.colour("paving") * light[..., None])[paved]
            labels[paved] = PAVEMENT
        road = (x > -self.edge[-1]) & (x < self.edge[1])
        track = np.cos((x - self.edge[1]) * 2 * math.pi / 1.75)  # worn by wheels
        light = np.exp(fade * (0.5 * fine + 0.45 * coarse + 0.2 * track))
        for side in (-1, 1):
            light[np.abs(side * x - self.edge[side] + 0.15) < 0.12] *= 0.6  # the gutter
        asphalt = self.colour("asphalt") * light[..., None]
        worn = coarse < self.rng.uniform(-2.2, -0.8)
        asphalt[self.markings(x, z) & ~worn] = self.rng.uniform(0.45, 0.75)
        albedo[road], labels[road] = asphalt[road], ROAD
        soft = self.shade.filter(ImageFilter.GaussianBlur(0.006 * self.width))
        dark = np.asarray(soft, np.float32)[rows, :, None] / 255  # [h,W,1]
        light = (self.light.ambient + 0.8 * self.sun * (1 - dark)) * (1 - 0.35 * dark)
        self.pixels[rows], self.labels[rows] = self.expose(albedo * light, z[..., None]), labels

    def markings(self, x: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Lane lines, edge lines, now and then a zebra crossing. -> bool [h,W]"""
        rng, total = self.rng, self.edge[-1] + self.edge[1]
        lanes = max(2, round(total / 3.4))
        painted = np.zeros(x.shape, bool)
        for lane in range(1, lanes):
            dash = (z + 9) % 6 < 2.5 if rng.random() < 0.8 else z > 0
            painted |= (np.abs(x + self.edge[-1] - lane * total / lanes) < 0.07) & dash
        for side in (-1, 1):
            if rng.random() < 0.5:
                painted |= np.abs(side * x - self.edge[side] + 0.4) < 0.06
        near = rng.uniform(6, 80)
        return painted | ((z > near) & (z < near + 3) & (near < 20) & (x % 1.0 < 0.5))

    def paint_row(self, offset: float, side: int, plots: list[Plot]) -> None:
        """Plots along the street at a lateral offset, or (side 0) across it at a distance."""
        if side == 0:
            z, facing = np.full(self.width, offset, np.float32), 0.5
            along = self.dx * z + 80
        else:  # the ray x = dx z meets the curve x = side offset + bend z^2
            a, facing = side * offset, -1.0 if side == self.sun_side else 0.9
            root = self.dx + side * np.sqrt(np.maximum(self.dx**2 - 4 * self.bend * a, 0))
            z = 2 * a / np.where(np.abs(root) > 1e-4, root, 1e-4)
            hit = (self.dx**2 >= 4 * self.bend * a) & (z > 0.5) & (z < self.end + 3)
            z = along = np.where(hit, z, np.inf)
        for plot in plots:
            columns = np.flatnonzero((along >= plot.start) & (along < plot.stop))
            if not len(columns):
                continue
            near = self.f / z[columns].min()
            top = max(0, int(self.y0 + near * (self.eye - 1.3 * plot.height)))
            bottom = min(self.height, int(self.y0 + near * self.eye) + 2)
            y = self.eye - self.dy[top:bottom, None] * z[columns]  # [h,C] metres above ground
            colour, solid, opaque = self.surface(plot, along[columns], y)
            light = self.light.ambient + self.sun * max(facing, 0)
            light = light * (0.75 + 0.25 * np.clip(y / 3, 0, 1))[..., None]
            block = np.ix_(range(top, bottom), columns)
            radiance = self.expose(colour * light, z[columns, None])
            self.pixels[block] = np.where(opaque[..., None], radiance, self.pixels[block])
            self.labels[block] = np.where(solid, plot.label, self.labels[block])

    def surface(self, plot: Plot, u: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
        """Albedo of a plot at u [C] along and y [h,C] up; where it is labelled; where opaque."""
        amount = self.domain.texture
        fine, coarse = grain(14 * u + plot.phase, 14 * y), grain(1.5 * u + plot.phase, 1.2 * y)
        light = np.exp(amount * 0.5 * (fine + coarse))
        solid = opaque = (y > -0.05) & (y < plot.height)
        if plot.label == VEGETATION:
            ragged = 1 + 0.1 * grain(6 * u + plot.phase, 0 * u)
            solid = opaque = (y > -0.05) & (y < plot.height * ragged)
            light *= np.exp((0.3 + amount) * fine - 0.3 * (1 - y / plot.height))
        elif plot.label == WALL:
            light *= 1 - amount * ((y % 0.35 < 0.05) | (u % 0.8 < 0.05))
            light[y > plot.height - 0.15] *= 1.3
        elif plot.label == FENCE:
            pickets = 0.1 * plot.bay  # their spacing
            opaque = solid & ((y > plot.height - 0.12) | (u % pickets < 0.55 * pickets))
        elif plot.label == RAIL:
            opaque = solid & ((y > 0.35) | (u % 2.0 < 0.12))
        colour = plot.colour * light[..., None]
        if plot.label == BUILDING:
            self.facade(plot, colour, u, y)
        return colour, solid, opaque

    def facade(self, plot: Plot, colour: np.ndarray, u: np.ndarray, y: np.ndarray) -> None:
        """Windows, shop front, cornice and roof, painted into colour [h,C,3]."""
        shop = plot.phase % 1 < 0.4
        base = 3.4 if shop else 0.0
        eave = plot.height - (1.8 if plot.phase > 120 else 0.0)
        bay, floor = (u + plot.phase) / plot.bay, (y - base) / plot.storey
        across, up = np.abs(bay % 1 - 0.5), floor % 1
        upper = (y > base) & (y < eave - 0.4)
        frame = upper & (across < plot.glass / 2 + 0.06) & (up > 0.22) & (up < 0.88)
        pane = upper & (across < plot.glass / 2) & (up > 0.28) & (up < 0.82)
        mirrored = grain(37 * np.floor(bay) + plot.phase, 53 * np.floor(floor))  # one per window
        glass = 0.05 * np.exp(0.7 * mirrored)[..., None] * np.array([0.85, 0.95, 1.1], np.float32)
        colour[frame] = 0.4 * colour[frame] + 0.28
        colour[pane] = glass[pane]
        colour[(y > eave - 0.4) & (y < eave)] *= 1.3
        colour[y > eave] = np.array([0.10, 0.075, 0.065], np.float32) * plot.bay / 2.5
        if shop:
            display = (y > 0.5) & (y < 2.5) & (u % 4 > 0.4)
            colour[display] = 0.7 * glass[display]
            colour[(y > 2.6) & (y < 3.3)] = plot.colour[::-1] * (2 * plot.glass) ** 3


# ---- Vehicles -----------------------------------------------------------------------------------
VEHICLES = {  # length, width, height, belt line; cabin from, to (shares of length), its slant
    CAR: (4.3, 1.78, 1.48, 0.90, 0.02, 0.68, 0.45), VAN: (4.9, 1.9, 2.1, 1.15, 0.02, 0.85, 0.3),
    TRUCK: (7.5, 2.4, 2.8, 1.3, 0.72, 1.0, 0.1), BUS: (11, 2.55, 3.1, 1.4, 0.0, 1.0, 0.05),
    TRAIN: (24, 2.65, 3.6, 1.6, 0.0, 1.0, 0.2),
}  # fmt: skip
PAINTS = {
    CAR: ((0.75, 0.75, 0.76), (0.10, 0.10, 0.11), (0.35, 0.36, 0.38), (0.55, 0.56, 0.58),
          (0.45, 0.08, 0.08), (0.10, 0.16, 0.35), (0.85, 0.85, 0.83), (0.14, 0.22, 0.18)),
    TRUCK: ((0.85, 0.85, 0.83), (0.25, 0.35, 0.55), (0.60, 0.45, 0.25)),
    BUS: ((0.75, 0.15, 0.12), (0.80, 0.75, 0.65), (0.15, 0.30, 0.60)),
    TRAIN: ((0.85, 0.65, 0.15), (0.80, 0.80, 0.78), (0.20, 0.45, 0.35)),
}  # fmt: skip


def sides(
    scene: Scene, x: float, z: float, yaw: float, span: Range, width: float, y: Range, slant: float
) -> Iterator[tuple[int, Callable, float]]:
    """The visible sides of an upright box that narrows by slant towards its top: which one (0 rear,
    1 right, 2 front, 3 left, 4 top), a map from s, t in 0..1 on it to px, cosine to the sun."""
    c, s = math.cos(yaw), math.sin(yaw)

    def corner(k: int, t: float) -> tuple[float, float]:
        u = span[k in (2, 3)] + slant * t * (1 if k in (0, 1) else -1)
        v = (0.5 if k in (1, 2) else -0.5) * (width - 0.7 * slant * t)
        return x + c * v + s * u, z - s * v + c * u

    if y[1] < scene.eye and z > 1 - span[0]:
        top = [scene.project(px, y[1], pz) for px, pz in (corner(k, 1) for k in range(4))]
        yield 4, lambda s, t: top[round(s) ^ (3 * round(t))], 0.9
    for k in range(4):
        (ax, az), (bx, bz) = corner(k, 0), corner((k + 1) % 4, 0)
        nx, nz = bz - az, ax - bx  # outward
        if min(az, bz) < 0.8 or (ax + scene.bend * az * az) * nx + az * nz >= 0:
            continue

        def at(s: float, t: float, k: int = k) -> tuple[float, float]:
            (px, pz), (qx, qz) = corner(k, t), corner((k + 1) % 4, t)
            return scene.project(px + s * (qx - px), y[0] + t * (y[1] - y[0]), pz + s * (qz - pz))

        yield k, at, (0.8 * scene.sun_side * nx - 0.4 * nz) / math.hypot(nx, nz)


def quad(at: Callable, s0: float, s1: float, t0: float, t1: float) -> list:
    """A rectangle on a side of a box, in px."""
    return [at(s0, t0), at(s1, t0), at(s1, t1), at(s0, t1)]


def vehicle(scene: Scene, x: float, z: float, yaw: float, label: int) -> None:
    """A body on wheels, a glazed cabin and (trucks) a cargo box, the farthest first."""
    rng = scene.rng
    long, wide, tall, belt, start, stop, slant = VEHICLES[label]
    tall *= rng.uniform(0.95, 1.1)
    hues = PAINTS.get(label, PAINTS[CAR])
    paint = linear(hues[rng.integers(len(hues))]) * rng.uniform(0.7, 1.2)
    load = scene.colour("facades") * 0.5 + 0.5 * paint
    rear, black, glass = -long / 2, (0.012, 0.012, 0.014), (0.045, 0.055, 0.065)
    glazed = rear + start * long, rear + stop * long
    lamps = {0: (0.5, 0.02, 0.02), 2: (0.8, 0.8, 0.75)}  # at the rear, at the front
    boxes = {  # along, width, up, slant, colour
        "axles": ((rear, -rear), 0.94 * wide, (0.1, 0.5), 0, black),
        "body": ((rear, -rear), wide, (0.25, belt), 0, paint),
        "cabin": (glazed, 0.97 * wide, (belt, tall), slant, paint),
        "cargo": ((rear, rear + 0.68 * long), wide, (0.9, tall + 0.5), 0, load),
    }
    order = ["axles", "cabin", "body"]
    if label == TRUCK:
        order = ["axles", "body", *["cabin", "cargo"][:: 1 if math.cos(yaw) > 0 else -1]]
    for name in order:
        span, width, up, lean, colour = boxes[name]
        for k, at, sun in sides(scene, x, z, yaw, span, width, up, lean):
            scene.fill(quad(at, 0, 1, 0, 1), scene.tone(colour, z, sun), label)
            if name == "cabin" and k < 4 and not (label == TRUCK and k == 0):
                panes = max(2, round((stop - start) * long / 1.7)) if k % 2 else 1
                for n in range(panes):
                    pane = quad(at, (n + 0.07) / panes, (n + 0.93) / panes, 0.06, 0.82)
                    scene.fill(pane, scene.tone(glass, z, sun))
            elif name == "cargo" and k < 4:
                scene.fill(quad(at, 0.48, 0.5, 0, 1), scene.tone(0.4 * load, z, sun))
            elif name == "body" and k < 4:
                scene.fill(quad(at, 0, 1, 0, 0.25), scene.tone(0.4 * paint, z, sun))
                if k in lamps:
                    for s in (0.02, 0.82):
                        scene.fill(quad(at, s, s + 0.16, 0.55, 0.85), scene.tone(lamps[k], z, 0.8))
                    scene.fill(quad(at, 0.36, 0.64, 0.3, 0.5), scene.tone((0.6, 0.58, 0.4), z))
                else:
                    wheels(scene, at, z, long, belt, label)


def wheels(scene: Scene, at: Callable, z: float, long: float, belt: float, label: int) -> None:
    """Two tyres with rims on the side of a body that reaches from 0.25 m up to its belt."""
    turns, radius = np.arange(12) * math.pi / 6, 0.32 if long < 6 else 0.45
    for s in (0.18, 0.82):
        for r, grey in ((radius, 0.01), (0.55 * radius, 0.15)):
            ring = [(r * math.cos(a) / long, radius + r * math.sin(a)) for a in turns]
            ring = [at(s + u, (y - 0.25) / (belt - 0.25)) for u, y in ring]
            scene.fill(ring, scene.tone((grey,) * 3, z), label)


# ---- Other things -------------------------------------------------------------------------------
# Strokes: colour (steel is labelled POLE), thickness, from x, y to x, y in metres.
STROKES = {
    PERSON: (("legs", 0.22, -0.08, 0.85, -0.17, 0.1), ("legs", 0.22, 0.08, 0.85, 0.17, 0.1),
             ("coat", 0.16, -0.24, 1.4, -0.33, 0.85), ("coat", 0.16, 0.24, 1.4, 0.33, 0.85),
             ("coat", 0.46, 0, 1.0, 0, 1.3), ("skin", 0.26, 0, 1.62, 0, 1.66),
             ("hair", 0.25, 0, 1.72, 0, 1.72)),
    RIDER: (("legs", 0.24, -0.05, 0.95, 0.15, 0.30), ("coat", 0.50, 0, 1.1, 0.05, 1.4),
            ("coat", 0.14, 0.1, 1.4, 0.42, 1.05), ("skin", 0.26, 0.08, 1.7, 0.08, 1.75),
            ("hair", 0.28, 0.08, 1.8, 0.08, 1.82)),
    BICYCLE: (("tyre", 0.70, -0.52, 0.35, -0.52, 0.35), ("tyre", 0.70, 0.52, 0.35, 0.52, 0.35),
              ("rim", 0.56, -0.52, 0.35, -0.52, 0.35), ("rim", 0.56, 0.52, 0.35, 0.52, 0.35),
              ("paint", 0.10, -0.52, 0.35, -0.1, 0.9), ("paint", 0.10, -0.15, 0.8, 0.45, 0.85),
              ("paint", 0.10, 0.0, 0.35, 0.42, 0.8), ("tyre", 0.10, 0.52, 0.35, 0.4, 1.0)),
    MOTORCYCLE: (("tyre", 0.66, -0.62, 0.33, -0.62, 0.33),
                 ("tyre", 0.66, 0.62, 0.33, 0.62, 0.33), ("rim", 0.3, -0.62, 0.33, -0.62, 0.33),
                 ("rim", 0.3, 0.62, 0.33, 0.62, 0.33), ("paint", 0.50, -0.45, 0.65, 0.3, 0.7),
                 ("tyre", 0.2, -0.7, 0.85, 0.0, 0.85), ("paint", 0.2, 0.62, 0.4, 0.45, 1.1)),
    LIGHT: (("steel", 0.24, 0, 0, 0, 2.4), ("tyre", 0.60, 0, 2.4, 0, 3.3),
            ("green", 0.36, 0, 2.42, 0, 2.42), ("amber", 0.36, 0, 2.85, 0, 2.85),
            ("red", 0.36, 0, 3.28, 0, 3.28)),
    POLE: (("steel", 0.36, 0, 0, 0, 7.5), ("steel", 0.12, 0, 7.5, 1.8, 7.8),
           ("steel", 0.2, 1.4, 7.7, 2.1, 7.8)),
    SIGN: (("steel", 0.24, 0, 0, 0, 2.3),),
}  # fmt: skip
CLOTHES = ((0.08, 0.08, 0.10), (0.15, 0.18, 0.30), (0.40, 0.40, 0.40), (0.50, 0.12, 0.10),
           (0.75, 0.74, 0.70), (0.20, 0.25, 0.18), (0.35, 0.25, 0.18))  # fmt: skip
ENAMEL = (((0.70, 0.05, 0.05), (0.9, 0.9, 0.9)), ((0.05, 0.2, 0.6), (0.9, 0.9, 0.9)),
          ((0.9, 0.9, 0.9), (0.05, 0.2, 0.6)), ((0.85, 0.7, 0.1), (0.9, 0.9, 0.9)))  # fmt: skip


def upright(scene: Scene, x: float, z: float, yaw: float, label: int) -> None:
    """People, cycles, lights, lamps and signs: flat figures made of strokes."""
    rng = scene.rng
    size, turn = rng.uniform(1.0, 1.25), math.cos(yaw)
    coat, legs = (linear(CLOTHES[rng.integers(len(CLOTHES))]) for _ in range(2))
    steel = rng.uniform(0.03, 0.3)
    inks = {"coat": coat, "legs": legs, "skin": (0.42, 0.26, 0.19), "hair": rng.uniform(0, 0.1, 3),
            "tyre": (0.01,) * 3, "rim": (0.12,) * 3, "paint": rng.uniform(0.02, 0.4, 3),
            "steel": (steel,) * 3}  # fmt: skip
    inks = {name: scene.tone(colour, z) for name, colour in inks.items()}
    lamps = {"red": (255, 50, 40), "amber": (255, 190, 50), "green": (40, 255, 150)}
    glowing = rng.choice(list(lamps))
    inks |= {name: glow if name == glowing else inks["rim"] for name, glow in lamps.items()}
    for ink, *metres in STROKES[label]:
        thick, ax, ay, bx, by = (size * value for value in metres)
        mark = POLE if ink == "steel" else label
        scene.rod((x + turn * ax, ay), (x + turn * bx, by), z, thick, inks[ink], mark)
    if label == SIGN:
        colours, corners = ENAMEL[rng.integers(len(ENAMEL))], (3, 4, 12)[rng.integers(3)]
        for share, colour, mark in ((1, colours[0], SIGN), (0.65, colours[1], 0)):
            turns = 2 * math.pi * (np.arange(corners) + 0.5 * (corners == 4)) / corners
            r = 0.62 * size * share
            plate = [(x + r * math.sin(a), 2.5 + r * math.cos(a), z) for a in turns]
            points = [scene.project(*corner) for corner in plate]
            scene.fill(points, scene.tone(linear(colour), z, 0.6), mark)


def ridden(scene: Scene, x: float, z: float, yaw: float, label: int) -> None:
    """Someone on a cycle; label is the cycle's."""
    upright(scene, x, z, yaw, label)
    upright(scene, x, z, yaw, RIDER)


def tree(scene: Scene, x: float, z: float, yaw: float, label: int) -> None:
    """A trunk under a clumpy crown, or branches with the background between them."""
    rng, scale = scene.rng, scene.f / z
    bark = scene.tone((0.07, 0.055, 0.045), z, 0.2)
    radius, trunk = rng.uniform(1.6, 3.5), rng.uniform(3.5, 7)
    scene.rod((x, 0), (x, trunk), z, 0.35, bark, label)
    px, py, r = *scene.project(x, trunk + 0.3 * radius, z), int(scale * radius)
    if r < 2:
        return
    step = np.arange(-r, r + 1, dtype=np.float32) / r
    v, u, (a, b) = step[:, None], step[None], rng.uniform(0, 256, 2)
    coarse, fine = grain(40 * u + a, 40 * v + b), grain(110 * u + b, 110 * v + a)  # [2r+1,2r+1]
    shape = 1 - u * u - v * v + 0.25 * coarse
    corner = int(px) - r, int(py) - r
    box = (*corner, corner[0] + 2 * r + 1, corner[1] + 2 * r + 1)
    scene.ids.paste(label, box, Image.fromarray(shape > 0.15))
    if rng.random() < scene.domain.bare:
        branch(scene, (x, 0.6 * trunk), math.pi / 2, 0.5 * radius + 0.3 * trunk, 0.3, z, bark, 5)
        return
    glow = np.exp((0.25 + scene.domain.texture) * 0.5 * (fine + coarse) - 0.5 * v)
    glow *= 1 + 0.4 * scene.sun_side * u * min(1.0, scene.light.sun)
    light = (scene.light.ambient + 0.4 * scene.sun) * scene.colour("leaves")
    patch = scene.expose(light * 0.8 * glow[..., None], z).astype(np.uint8)
    leafy = (shape > 0.15) & ((fine > -1.2) | (shape > 0.6))
    scene.image.paste(Image.fromarray(patch), corner, Image.fromarray(leafy))


def branch(scene: Scene, root: tuple, angle: float, length: float, thick: float, z: float,
           bark: tuple, depth: int) -> None:  # fmt: skip
    """A leafless tree, by recursion; angle in radians from the horizontal."""
    tip = (root[0] + length * math.cos(angle), root[1] + length * math.sin(angle))
    line = [scene.project(*root, z), scene.project(*tip, z)]
    scene.pen.line(line, fill=bark, width=max(1, round(scene.f * thick / z)))
    for turn in scene.rng.normal(0, 0.55, 3 if depth else 0):
        size = length * scene.rng.uniform(0.5, 0.8)
        branch(scene, tip, angle + turn, size, 0.6 * thick, z, bark, depth - 1)


# ---- Composition --------------------------------------------------------------------------------
def row(scene: Scene, built: float, green: float, tall: float = 1.0) -> list[Plot]:
    """A row of buildings with that share, and greenery or gaps between them."""
    d, rng, plots, start = scene.domain, scene.rng, [], 0.0
    while start < 160:
        stop, storey = start + rng.uniform(*d.plot), rng.uniform(2.8, 3.8)
        house, phase = rng.random() < built, rng.uniform(0, 256)
        bay, glass = rng.uniform(1.8, 3.5), rng.uniform(0.35, 0.65)
        if house:
            high = storey * round(rng.uniform(*d.storeys) * tall) + rng.uniform(0.5, 2.5)
            paint = scene.colour("facades")
        else:
            high, paint = rng.uniform(1.5, 7) * tall, 0.8 * scene.colour("leaves")
        if house or rng.random() < green:
            label = BUILDING if house else VEGETATION
            plots.append(Plot(label, start, stop, high, paint, bay, glass, storey, phase))
        start = stop
    return plots


def barrier(scene: Scene, label: int, side: int, start: float) -> tuple[float, int, list[Plot]]:
    """A row of one: hedge, wall, fence or guard rail in front of the plots."""
    rng = scene.rng
    high = {FENCE: 1.5, WALL: 1.9, VEGETATION: 1.4}.get(label, 0.8) * rng.uniform(0.75, 1.3)
    paint = {FENCE: linear((0.4,) * 3) * rng.uniform(0.2, 2), WALL: 0.8 * scene.colour("facades"),
             VEGETATION: scene.colour("leaves")}.get(label, linear((0.7,) * 3))  # fmt: skip
    stop, bay = start + rng.uniform(12, 40), rng.uniform(1.5, 4)
    plot = Plot(label, start, stop, high, paint, bay, 0.5, 3, rng.uniform(0, 256))
    return scene.front(side) - 0.2, side, [plot]


def street(scene: Scene, rare: list[int]) -> list[tuple[float, int, list[Plot]]]:
    """The rows of plots at the far end and on both sides, far to near: offset, side, plots."""
    built, rng = scene.domain.built, scene.rng
    rows, odd = [(scene.end, 0, row(scene, built, 1.0, 1.3))], rng.choice((-1, 1))
    if TERRAIN in rare:
        scene.pavement[odd] *= 0.3
        scene.verge[odd] += 4
    for side in (-1, 1):
        rows.append((scene.front(side) + 9, side, row(scene, 0.5 * built, 1.0)))
        rows.append((scene.front(side) + 2, side, row(scene, built, 0.5)))
        wanted = [label for label in rare if label in (FENCE, WALL, RAIL)]
        if wanted and side == odd:
            rows.append(barrier(scene, wanted[0], side, rng.uniform(2, 5)))
        elif rng.random() < 0.3:
            rows.append(barrier(scene, rng.choice(scene.domain.barriers), side, rng.uniform(0, 20)))
    return rows


Thing = tuple[float, float, float, int, Callable]  # x, z, yaw, label, painter


def furnish(scene: Scene, rare: list[int]) -> Iterator[Thing]:
    """What stands and drives in the street, in no order."""
    d, rng = scene.domain, scene.rng

    def depth(near: float, far: float) -> float:
        return max(near, min(near * (far / near) ** rng.random(), scene.end - 3))

    def beside(side: int, share: float) -> float:  # 0: the kerb, 1: the plots
        kerb, plots = scene.edge[side] + 0.3, scene.front(side) - 0.3
        return side * (kerb + share * (plots - kerb))

    for side in (-1, 1):
        ahead = math.pi * (side < 0)
        for k in range(rng.poisson(d.parked)):
            z = 5 + 5.6 * k + rng.uniform(0, 2) + 20 * rng.random() ** 2
            yield side * (scene.edge[side] - 1.1), z, ahead + rng.normal(0, 0.05), CAR, vehicle
        for _ in range(rng.poisson(d.traffic / 2)):
            x = side * rng.uniform(0.2, 0.6) * scene.edge[side]
            yield x, depth(8, 70), ahead + rng.normal(0, 0.05), CAR, vehicle
        for _ in range(rng.poisson(d.people / 2)):
            yield beside(side, rng.random()), depth(5, 22), rng.uniform(0, 1), PERSON, upright
        for _ in range(rng.poisson(d.trees / 2)):
            yield beside(side, rng.uniform(0.4, 1.8)), depth(8, 80), 0, TREE, tree
        for _ in range(rng.poisson(d.poles / 2)):
            label = (POLE, POLE, SIGN, LIGHT)[rng.integers(4)]
            yield beside(side, 0.1), depth(5, 25), ahead + math.pi, label, upright
    for label in rare:
        side = rng.choice((-1, 1))
        ahead, across = math.pi * (side < 0), rng.random() < 0.15
        if label in (TRUCK, BUS, TRAIN, VAN):
            z = rng.uniform(5, 12) + (2 if across else VEHICLES[label][0] / 2)
            yaw = math.pi / 2 * side if across else ahead + rng.normal(0, 0.1)
            yield side * 0.5 * scene.edge[side], z, yaw, label, vehicle
        elif label in (RIDER, MOTORCYCLE):
            kind = MOTORCYCLE if label == MOTORCYCLE or rng.random() < 0.3 else BICYCLE
            yaw = rng.choice((0, math.pi)) + rng.uniform(-1.2, 1.2)
            x = side * rng.uniform(0.2, 0.9) * scene.edge[side]
            yield x, rng.uniform(4.5, 8), yaw, kind, ridden
        elif label in (PERSON, BICYCLE, LIGHT, SIGN, POLE):
            for _ in range(rng.integers(2, 5)):
                yaw = rng.uniform(-0.8, 0.8)
                yield beside(side, 0.5 * rng.random()), rng.uniform(4.5, 9), yaw, label, upright


def cast_shadows(scene: Scene, rows: list, things: list[Thing]) -> list[float]:
    """Shadows of plots and things on the ground. -> how much of the sun reaches each thing"""
    pen, side, reach = ImageDraw.Draw(scene.shade), scene.sun_side, scene.light.reach
    strength = int(255 * min(1.0, 2 * scene.light.sun))
    for offset, where, plots in rows:
        for plot in plots if where == side else ():
            tip, (z0, z1) = offset - plot.height * reach, (max(plot.start, 1), plot.stop)
            corners = ((offset, z0), (tip, z0 + 1), (tip, z1 + 1), (offset, z1))
            pen.polygon([scene.project(side * x, 0, z) for x, z in corners], strength)
    sunlit = []
    for x, z, *_ in things:
        px, py = scene.project(x, 0, z)
        inside = 0 <= px < scene.width and 0 <= py < scene.height
        sunlit.append(1 - scene.shade.getpixel((int(px), int(py))) / 255 if inside else 1.0)
    for x, z, yaw, label, paint in things:
        long, wide, high = 0.3, 0.35, 1.5
        if paint is vehicle:
            long, wide = VEHICLES[label][0] / 2, VEHICLES[label][1] / 2 + 0.1
            long, wide = (wide, long) if abs(math.sin(yaw)) > 0.7 else (long, wide)
        elif paint is tree:
            long, wide, high = 2.5, 2.0, 6.0
        shift = high * reach / 2
        for dx, grey in ((shift, int(0.8 * strength)), (0, 0 if paint is tree else 235)):
            turns = np.arange(16) * math.pi / 8
            u, v = x - side * dx + (wide + dx) * np.cos(turns), z + long * np.sin(turns)
            if grey:
                pen.polygon([scene.project(*at) for at in zip(u, 0 * u, v, strict=True)], grey)
    return sunlit


def render(domain: Domain, seed: int, index: int, size: tuple[int, int]) -> tuple[Image.Image, ...]:
    """One scene -> image (RGB) and labels (L, our ids), both of the size H, W."""
    rng = np.random.default_rng([seed, domain.number, index])
    scene = Scene(domain, rng, size)
    rare = [domain.rare[(5 * index + k) % len(domain.rare)] for k in range(5)]
    rows = street(scene, rare)
    things = sorted(furnish(scene, rare), key=lambda thing: -thing[1])
    sunlit = cast_shadows(scene, rows, things)
    scene.paint_background(rows)
    for (x, z, yaw, label, paint), scene.sunlit in zip(things, sunlit, strict=True):
        paint(scene, x, z, yaw, label)
    if domain.bonnet:
        arc = [(0, 1), (0, 0.97), (0.25, 0.93), (0.5, 0.915), (0.75, 0.93), (1, 0.97), (1, 1)]
        scene.fill([(scene.width * x, scene.height * y) for x, y in arc], (28, 30, 31), EGO)
    labels = np.ascontiguousarray(np.asarray(scene.ids)[1::2, 1::2])
    return develop(scene), Image.fromarray(labels)


def develop(scene: Scene) -> Image.Image:
    """The camera: resampling, blur, colour, vignette, noise, compression."""
    d, rng = scene.domain, scene.rng
    image = scene.image.reduce(2).filter(ImageFilter.GaussianBlur(d.blur))
    x = np.asarray(image, np.float32) / 255  # [H,W,3]
    h, w = x.shape[:2]
    grey = x.mean(axis=2, keepdims=True)
    gain = np.array(d.tint) * np.exp(rng.normal(0, d.balance, 3))
    x = (grey + d.saturation * (x - grey)) * gain.astype(np.float32)
    x = d.black + (1 - d.black) * (0.5 + d.contrast * (x - 0.5))
    radius = np.hypot(np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)[None])
    x *= (1 - d.vignette * 0.5 * radius**2)[..., None]
    x = 255 * x + d.noise * rng.standard_normal((h, w, 1), np.float32)
    image = Image.fromarray(x.clip(0, 255).astype(np.uint8))
    if d.jpeg:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=d.jpeg)
        image = Image.open(buffer).convert("RGB")
    return image


# ---- Files --------------------------------------------------------------------------------------
Job = tuple[Domain, int, int, tuple[int, int], Path, Path]  # seed, index, size, image, label


def jobs(root: Path, seed: int, scale: float) -> Iterator[Job]:
    """Every pair of files of the four datasets; scale shrinks the counts."""

    def count(full: int, least: int = 6) -> int:
        return max(least, round(full * scale))

    d = DOMAINS["vkitti2"]
    variants = (("clone", d), ("fog", replace(d, haze=(0.02, 0.03))))
    frames = count(80, 2)
    for k, name in enumerate(("01", "02", "06", "18", "20")):
        for frame in range(frames):
            for variant, domain in variants[: 2 if frame < 8 else 1]:
                at = root / f"vkitti2/Scene{name}/{variant}/frames"
                image = at / f"rgb/Camera_0/rgb_{frame:05}.jpg"
                label = at / f"classSegmentation/Camera_0/classgt_{frame:05}.png"
                yield domain, seed, k * frames + frame, d.size, image, label
    d, at = DOMAINS["kitti"], root / "kitti/training"
    for k in range(2 * count(100)):
        h, w = d.size if k % 10 < 7 else (d.size[0] - k % 10 + 6, d.size[1] - k % 10 + 5)
        yield d, seed, k, (h, w), at / f"image_2/{k:06}_10.png", at / f"semantic/{k:06}_10.png"
    d, at = DOMAINS["gta5"], root / "gta5"
    for k in range(count(400)):
        yield d, seed, k, d.size, at / f"images/{k + 1:05}.png", at / f"labels/{k + 1:05}.png"
    d, at, index = DOMAINS["cityscapes"], root / "cityscapes", 0
    for city in ("train/adorf", "train/beheim", "train/cestadt", "val/dehain", "val/efurt"):
        for k in range(count(100 if city.startswith("train") else 50, 3)):
            stem = f"{city}/{city.split('/')[1]}_{k:06}_000019"
            image = at / f"leftImg8bit/{stem}_leftImg8bit.png"
            label = at / f"gtFine/{stem}_gtFine_labelIds.png"
            yield d, seed, index, d.size, image, label
            index += 1


def draw(job: Job) -> None:
    """Renders one pair and writes it in its dataset's format."""
    domain, seed, index, size, image_path, label_path = job
    image, labels = render(domain, seed, index, size)
    for path in (image_path, label_path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if domain.number == DOMAINS["vkitti2"].number:
        image.save(image_path, quality=95)
        table = np.zeros((256, 3), np.uint8)
        table[list(VKITTI_COLOURS)] = list(VKITTI_COLOURS.values())
        labels = Image.fromarray(table[np.asarray(labels)])
    else:
        image.save(image_path, compress_level=1)
        labels = labels.point([{TREE: VEGETATION, VAN: CAR}.get(k, k) for k in range(256)])
    if domain.number == DOMAINS["gta5"].number:
        colours = [CITYSCAPES_COLOURS.get(k, (0, 0, 0)) for k in range(256)]
        labels.putpalette([value for colour in colours for value in colour])  # L becomes P
    labels.save(label_path)


def marker(name: str, seed: int, scale: float) -> str:
    """The text of a dataset's miniature.json."""
    facts = {"miniature": True, "version": VERSION, "seed": seed, "dataset": name, "scale": scale}
    return json.dumps(facts) + "\n"


def is_current(out: Path, seed: int = 0, scale: float = 1.0) -> bool:
    """Whether out holds the miniature of this version, seed and scale."""
    files = {name: Path(out) / name / "miniature.json" for name in DOMAINS}
    return all(f.is_file() and f.read_text() == marker(n, seed, scale) for n, f in files.items())


def write(out: Path, seed: int = 0, scale: float = 1.0, workers: int | None = None) -> None:
    """Writes the four datasets below out; none of them is ever there by half.

    An older miniature is replaced. FileExistsError where out holds anything else.
    """
    out = Path(out).resolve()
    if is_current(out, seed, scale):
        print(f"{out}: the miniature is there already")
        return
    for found in out.iterdir() if out.exists() else ():
        if found.name not in DOMAINS or not (found / "miniature.json").is_file():
            raise FileExistsError(f"{out}: found {found.name}, expected an empty folder")
    if out.exists() and any(out.iterdir()):
        print(f"{out}: replacing a miniature of another seed, scale or version")
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn")) as pool:
            for _ in pool.map(draw, jobs(part, seed, scale), chunksize=8):
                pass
        if is_current(out, seed, scale):
            return  # another process was quicker
        out.mkdir(parents=True, exist_ok=True)
        for name in DOMAINS:
            (part / name / "miniature.json").write_text(marker(name, seed, scale))
            shutil.rmtree(out / name, ignore_errors=True)
            (part / name).rename(out / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


@dataclass(frozen=True)
class Args:
    """What to write, and where."""

    out: Path
    """Folder that will hold vkitti2/ kitti/ gta5/ cityscapes/."""
    seed: int = 0
    """Every image follows from it."""
    scale: float = 1.0
    """Share of the images to write; 0.05 is enough for a test."""


def main() -> None:
    import tyro

    try:
        first_two = "\n\n".join(__doc__.split("\n\n")[:2])
        args = tyro.cli(Args, prog=Path(sys.argv[0]).name, description=first_two)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    if args.seed < 0 or not 0 < args.scale <= 1:
        print("error: --seed must be at least 0, --scale in 0 to 1", file=sys.stderr)
        sys.exit(2)
    try:
        write(args.out, args.seed, args.scale)
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
