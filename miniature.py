"""Writes small procedural stand-ins of the four datasets in their official layouts.

    python miniature.py --out data/mini --seed 0            (a minute on two cores, 65 MB)

Every image is a pinhole view of a street: ground, rows of facades, hedges and fences that recede
to the vanishing point, and things that are painted from back to front, lit in linear light. Image
and label come from the same geometry. The datasets differ in PROPERTIES and SURROUNDINGS below.
"""

import ast
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

VERSION = 2  # to be raised when the images change: older miniatures are then written anew
SIDES = LEFT, RIGHT = -1, 1  # of the street: the sign of x


def read_table(text: str) -> list[list[str]]:
    """The cells of a table, row by row. Two spaces or more separate them."""
    return [re.split("  +", line.strip()) for line in text.strip().splitlines()]


def read_records(text: str) -> dict[str, SimpleNamespace]:
    """A table whose first row names the fields and whose first column names the records."""
    (_, *fields), *rows = read_table(text)
    return {
        name: SimpleNamespace(**dict(zip(fields, map(ast.literal_eval, cells), strict=True)))
        for name, *cells in rows
    }


# ---- Labels -------------------------------------------------------------------------------------
# Twice in a row: name, Cityscapes id, colour in GTA5's palette, colour in VKITTI2's label images.
# Only VKITTI2 has "tree" and "van": the other datasets call them vegetation and car.
LABELS = """
    ego         1   -            -            terrain     22  152 251 152  210 0 200
    static      4   -            80 80 80     sky         23  70 130 180   90 200 255
    road        7   128 64 128   100 60 100   person      24  220 20 60    -
    pavement    8   244 35 232   -            rider       25  255 0 0      -
    building    11  70 70 70     140 140 140  car         26  0 0 142      255 127 80
    wall        12  102 102 156  -            truck       27  0 0 70       160 60 60
    fence       13  190 153 153  -            bus         28  0 60 100     -
    rail        14  180 165 180  250 100 255  train       31  0 80 100     -
    pole        17  153 153 153  255 130 0    motorcycle  32  0 0 230      -
    light       19  250 170 30   200 200 0    bicycle     33  119 11 32    -
    sign        20  220 220 0    255 255 0    tree        40  -            0 199 0
    vegetation  21  107 142 35   90 240 0     van         41  -            0 139 139
"""
IDS = {}
GTA5_COLOURS, VKITTI2_COLOURS = np.zeros((2, 256, 3), np.uint8)  # by id, black where there is none
for row in read_table(LABELS):
    for name, number, *colours in (row[:4], row[4:]):
        IDS[name] = int(number)
        for table, colour in zip((GTA5_COLOURS, VKITTI2_COLOURS), colours, strict=True):
            table[IDS[name]] = [int(value) for value in colour.replace("-", "0 0 0").split()]


# ---- Domains ------------------------------------------------------------------------------------
# The weather: colours of the sky (sRGB 0..1), strengths of the sun and of the sky (ambient), metres
# of shadow per metre of height, contrast of the clouds, how much redder than white the sun is.
LIGHTS = read_records("""
    name       zenith            horizon           sun   ambient  shadow  cloud  warmth
    noon       0.22, 0.42, 0.80  0.70, 0.80, 0.90  1.1   0.45     0.5     0.1    0.0
    afternoon  0.40, 0.58, 0.85  0.90, 0.92, 0.92  1.0   0.40     1.3     0.2    0.1
    overcast   0.74, 0.77, 0.80  0.88, 0.89, 0.90  0.1   0.85     0.3     0.12   0.0
    gloom      0.45, 0.48, 0.50  0.70, 0.72, 0.70  0.05  0.40     0.3     0.25   0.0
    dusk       0.42, 0.45, 0.58  0.95, 0.72, 0.52  0.35  0.30     2.5     0.2    0.4
    glare      0.93, 0.95, 0.97  1.0, 1.0, 1.0     1.3   0.28     1.1     0.03   0.05
    hazy       0.80, 0.84, 0.80  0.92, 0.94, 0.89  0.15  0.75     0.6     0.08   0.0
    game       0.15, 0.42, 0.95  0.60, 0.80, 1.0   0.7   0.65     0.7     0.05   0.0
""")
# Two numbers in a cell are the limits of a value that is drawn for every image.
PROPERTIES = read_table("""
    name        vkitti2        kitti          gta5        cityscapes    unit: meaning
    size        96, 256        96, 256        112, 208    128, 256      px: height, width
    focal       0.58           0.55           0.7         0.62          image widths: focal length
    eye         1.6, 1.8       1.6, 1.7       1.3, 2.2    1.2, 1.4      m: height of the camera
    horizon     0.42, 0.50     0.38, 0.52     0.36, 0.56  0.38, 0.47    image heights, from the top
    yaw         0.08           0.1            0.3         0.1           image widths: largest shift
    bend        0.002          0.004          0.004       0.002         1/m: the road's curvature
    left        5.0, 8.5       3.0, 5.0       3.0, 8.0    3.5, 6.0      m: camera to road's edge
    right       3.0, 4.5       2.0, 4.2       2.0, 5.5    2.5, 5.5      m: the same on the right
    pavement    0, 0           0, 2.2         1.5, 6.0    3.0, 5.5      m: width
    verge       2, 7           0.3, 2.5       0, 1.0      0, 1.5        m: grass behind it
    plot        10, 24         7, 20          8, 22       12, 28        m: length along the street
    built       0.45           0.7            0.75        0.7           share: plots with a building
    storeys     1, 3           1, 4           2, 7        3, 6          number in a building
    end         60, 140        40, 120        25, 120     40, 120       m: distance of the far end
    parked      2              6              3           4             mean number at each kerb
    traffic     3              3              2           2             mean number of moving cars
    car         4.7, 1.32      3.8, 1.65      4.5, 1.45   3.9, 1.6      m: its length and height
    figure      1.0, 1.25      0.8, 1.05      1.0, 1.25   0.8, 1.05     size of people, signs, ...
    steel       0.2, 0.3       0.06, 0.2      0.1, 0.3    0.05, 0.15    brightness of poles
    housing     0.01           0.2            0.01        0.2           brightness: traffic lights
    european    0              1              0           1             1: paints, fences of rails
    rails       1              0              0           0             1: they line the road
    urban       0              0              1           1             1: URBAN, 0: RURAL (below)
    people      0              0.5            4           5             mean number
    trees       9              14             4           5             mean number
    bare        0              0.4            0.4         0.1           share: trees without leaves
    poles       4              6              4           4             mean number, lights, signs
    texture     0.06           0.5            0.3         0.45          contrast of surfaces
    masonry     0.0            0.35           0.15        0.4           contrast of bricks and slabs
    repairs     0.0            0.5            0.2         0.5           contrast of patches on roads
    dapple      0.0            0.85           0.2         0.5           darkness of leaves' shadows
    gloss       0.0            0.9            0.15        0.6           share of sky in glass
    ragged      0.1            1.0            0.3         0.8           unevenness of greenery
    gables      0.0            0.7            0.1         0.6           share: gabled buildings
    haze        0.0005, 0.002  0.0, 0.002     0.0, 0.006  0.001, 0.005  1/m: extinction
    exposure    -0.2, 0.2      -0.6, 0.7      -0.9, 0.6   -0.3, 0.2     stops
    tint        1, 1, 1        1, 1, 1        1, 1, 1     0.9, 1, 0.92  gain of red, green, blue
    balance     0.015          0.03           0.05        0.01          deviation of log(gain)
    saturation  1.05           0.9            1.0         0.7           gain, 1: unchanged
    contrast    1.0            1.0            1.0         0.78          gain, 1: unchanged
    black       0.0            0.0            0.0         0.04          0..1: level of black
    blur        0.0            0.5            0.3         0.5           px: standard deviation
    noise       0.0            4.0            1.5         2.0           grey levels: the same
    vignette    0.0            0.15           0.1         0.15          share: darker corners
    jpeg        0              45             0           0             quality, 0: uncompressed
    bonnet      0              0              0           1             1: that of our car is seen
""")
BRICKS = [(0.48, 0.30, 0.24), (0.62, 0.52, 0.40), (0.72, 0.68, 0.60), (0.55, 0.55, 0.54)]
PLASTER = [(0.80, 0.76, 0.66), (0.66, 0.60, 0.50), (0.86, 0.84, 0.80), (0.44, 0.42, 0.40)]
# Image n shows the labels 5 n to 5 n + 4 of such a list near the camera; "-" shows nothing.
RURAL = "truck sign rail - - light pole van sign -"
URBAN = """fence bus rider light person wall truck bicycle sign terrain train motorcycle pole person
    fence bicycle"""
# The rest of each domain, all choices equally likely: its weather, and
# the colours of its surfaces in sRGB 0..1.
SURROUNDINGS = {
    "vkitti2": {
        "lights": ("game", "noon", "glare"),
        "asphalt": [(0.42, 0.42, 0.45), (0.48, 0.47, 0.46)],
        "paving": [(0.6, 0.6, 0.6)],
        "grass": [(0.38, 0.50, 0.22), (0.46, 0.52, 0.28)],
        "leaves": [(0.22, 0.40, 0.14), (0.30, 0.44, 0.18)],
        "facades": [(0.82, 0.72, 0.55), (0.75, 0.45, 0.35), (0.88, 0.86, 0.8)],
    },
    "kitti": {
        "lights": ("glare", "noon", "afternoon", "gloom", "overcast"),
        "asphalt": [(0.58, 0.57, 0.55), (0.48, 0.48, 0.48), (0.36, 0.36, 0.37)],
        "paving": [(0.62, 0.60, 0.56), (0.40, 0.39, 0.38)],
        "grass": [(0.52, 0.48, 0.32), (0.42, 0.42, 0.25), (0.36, 0.33, 0.25)],
        "leaves": [(0.38, 0.34, 0.16), (0.20, 0.24, 0.12), (0.12, 0.16, 0.10), (0.34, 0.22, 0.12)],
        "facades": BRICKS + PLASTER + [(0.36, 0.25, 0.21), (0.30, 0.30, 0.30), (0.27, 0.32, 0.27)],
    },
    "gta5": {
        "lights": ("noon", "afternoon", "overcast", "gloom", "dusk", "glare"),
        "asphalt": [(0.42, 0.42, 0.42), (0.36, 0.37, 0.39), (0.46, 0.44, 0.42), (0.30, 0.30, 0.31)],
        "paving": [(0.58, 0.56, 0.52), (0.50, 0.48, 0.46), (0.62, 0.61, 0.60)],
        "grass": [(0.38, 0.42, 0.22), (0.50, 0.45, 0.28)],
        "leaves": [(0.25, 0.30, 0.14), (0.20, 0.26, 0.15), (0.34, 0.36, 0.18)],
        "facades": BRICKS + PLASTER,
    },
    "cityscapes": {
        "lights": ("hazy", "hazy", "overcast", "gloom"),
        "asphalt": [(0.52, 0.52, 0.51), (0.44, 0.44, 0.44), (0.35, 0.35, 0.36)],
        "paving": [(0.42, 0.40, 0.39), (0.50, 0.44, 0.40), (0.36, 0.36, 0.37)],
        "grass": [(0.42, 0.38, 0.26), (0.34, 0.36, 0.22)],
        "leaves": [(0.16, 0.22, 0.12), (0.30, 0.26, 0.14), (0.26, 0.20, 0.12)],
        "facades": [*PLASTER, (0.34, 0.30, 0.28), (0.30, 0.32, 0.34), (0.62, 0.48, 0.30)],
    },
}

Domain = SimpleNamespace  # name, number, a column of PROPERTIES, an entry of SURROUNDINGS
DOMAINS = {}
for number, name in enumerate(SURROUNDINGS, start=1):
    column = {field: ast.literal_eval(cells[number - 1]) for field, *cells in PROPERTIES[1:]}
    DOMAINS[name] = Domain(name=name, number=number, **column, **SURROUNDINGS[name])


# ---- Texture ------------------------------------------------------------------------------------
@cache
def noise_tile() -> np.ndarray:
    """1/f noise that repeats without a seam. -> [256,256], mean 0, standard deviation 1"""
    rng, total = np.random.default_rng(0), np.zeros((128, 128), np.float32)
    for octave in range(2, 8):
        cells = Image.fromarray(rng.normal(size=(2**octave, 2**octave)).astype(np.float32))
        total += np.asarray(cells.resize((128, 128), Image.Resampling.BICUBIC))
    total = np.block([[total, total[:, ::-1]], [total[::-1], total[::-1, ::-1]]])
    return ((total - total.mean()) / total.std()).clip(-2.5, 2.5)


def grain(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The noise at the positions u, v (in texels, broadcast together)."""
    return noise_tile()[u.astype(np.int32) & 255, v.astype(np.int32) & 255]


def tiles(u: np.ndarray, v: np.ndarray, long: float, high: float) -> np.ndarray:
    """One random number for each tile of so many m, every other row shifted by half a tile."""
    row = np.floor(v / high)
    return grain(37 * np.floor(u / long + 0.5 * (row % 2)), 53 * row)


def linear(colour: tuple) -> np.ndarray:
    """sRGB 0..1 -> linear 0..1, [3]"""
    return np.array(colour, np.float32) ** 2.2


# ---- Camera and light ---------------------------------------------------------------------------
class Plot(NamedTuple):
    """Something upright along the street: a building, hedge, wall, fence or rail. Lengths in m."""

    label: str
    side: int  # LEFT or RIGHT; 0: it stands across the street, at its far end
    offset: float  # from the road's axis; on side 0: ahead of the camera
    start: float  # along its front
    stop: float
    height: float
    colour: np.ndarray  # linear
    bay: float  # width of a window with its wall; ten times the spacing of a fence's pickets
    glass: float  # the window's share of the bay
    storey: float  # height of a storey
    phase: float  # offset of the textures; also decides which buildings are shops


class Thing(NamedTuple):
    """Something that stands or drives in the street."""

    x: float  # m to the right of the road's axis
    z: float  # m ahead of the camera
    yaw: float  # heading in radians, 0: away from the camera
    label: str
    sunlit: float = 1.0  # share of the sun's light that reaches it


class Scene:
    """One street, its camera and its canvas, at twice the image's resolution."""

    def __init__(self, domain: Domain, rng: np.random.Generator):
        self.domain, self.rng = domain, rng
        self.light = LIGHTS[rng.choice(domain.lights)]
        self.height, self.width = 2 * domain.size[0], 2 * domain.size[1]
        self.f = domain.focal * self.width * rng.uniform(0.9, 1.1)  # focal length in px
        self.eye = rng.uniform(*domain.eye)
        self.y0 = rng.uniform(*domain.horizon) * self.height  # the vanishing point, px
        self.x0 = (0.5 + domain.yaw * rng.uniform(-1, 1)) * self.width
        self.bend = domain.bend * rng.uniform(-1, 1)
        # Slope of each column's and row's line of sight: m to the right or down per m ahead.
        self.dx = (np.arange(self.width, dtype=np.float32) + 0.5 - self.x0) / self.f  # [W]
        self.dy = (np.arange(self.height, dtype=np.float32) + 0.5 - self.y0) / self.f  # [H]
        self.edge = {LEFT: rng.uniform(*domain.left), RIGHT: rng.uniform(*domain.right)}
        self.pavement = {side: rng.uniform(*domain.pavement) for side in SIDES}
        verge = {side: rng.uniform(*domain.verge) for side in SIDES}
        # Distance of the plots from the road's axis, m.
        self.front = {k: self.edge[k] + self.pavement[k] + verge[k] + 0.3 for k in SIDES}
        self.end = rng.uniform(*domain.end)
        self.sun_side = rng.choice(SIDES)
        self.haze = rng.uniform(*domain.haze)
        self.gain = 2.0 ** rng.uniform(*domain.exposure)
        warm = np.array([1, 1 - 0.4 * self.light.warmth, 1 - 0.9 * self.light.warmth], np.float32)
        self.sun, self.air = self.light.sun * warm, linear(self.light.horizon)
        self.shade = Image.new("L", (self.width, self.height))  # shadows on the ground, 255 full

    def colour(self, surface: str) -> np.ndarray:
        """A colour that the domain gives to a surface, a little varied. -> linear [3]"""
        colour = self.rng.choice(getattr(self.domain, surface))
        return linear(colour) * self.rng.uniform(0.8, 1.2)

    def project(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Metres right of the road's axis, above ground, ahead -> px."""
        z = max(z, 0.7)
        return self.x0 + self.f * (x / z + self.bend * z), self.y0 + self.f * (self.eye - y) / z

    def expose(self, radiance: np.ndarray, z: np.ndarray | float) -> np.ndarray:
        """Linear radiance seen through z metres of air -> display values 0..255."""
        clear = np.exp(-self.haze * np.asarray(z, np.float32))
        return 255 * np.clip((radiance * clear + self.air * (1 - clear)) * self.gain, 0, 1) ** 0.455

    def shaded(self, colour: tuple, thing: Thing, facing: float = 0.5) -> tuple[int, ...]:
        """Display colour of a part of a thing. colour: linear; facing: cosine to the sun."""
        light = self.light.ambient + self.sun * max(facing, 0) * thing.sunlit
        values = self.expose(np.asarray(colour, np.float32) * light, thing.z)
        return tuple(values.astype(int).tolist())

    def fill(self, points: list, colour: tuple[int, ...], label: str | None = None) -> None:
        """A polygon of px. Without a label it is a detail, which keeps the label below."""
        self.pen.polygon(points, fill=colour)
        if label:
            self.label_pen.polygon(points, fill=IDS[label])

    def rod(self, start: tuple, end: tuple, z: float, thick: float, colour: tuple, label: str):
        """A rod with round ends between two points x, y (m); a disc where they are the same."""
        (ax, ay), (bx, by) = self.project(*start, z), self.project(*end, z)
        wide = self.f * thick / z  # px
        r = wide / 2  # px
        for pen, value in ((self.pen, colour), (self.label_pen, IDS[label])):
            pen.line((ax, ay, bx, by), fill=value, width=max(2, round(wide)))
            if wide > 3:
                for x, y in ((ax, ay), (bx, by)):
                    pen.ellipse((x - r, y - r, x + r, y + r), fill=value)

    def paint_background(self, plots: list[Plot]) -> None:
        """Sky, ground and the plots, far to near, into a fresh canvas."""
        domain, rng = self.domain, self.rng
        # Step 1: the sky with clouds, which lie on a plane overhead
        up = np.clip(-self.dy / 0.5, 0, 1)[:, None, None] ** 0.7  # [H,1,1]
        far = 1 / (np.abs(self.dy)[:, None] + 0.12)
        cloud = grain(40 * far + rng.uniform(0, 256), 30 * self.dx * far) * up[..., 0]  # [H,W]
        sky = (linear(self.light.zenith) * up + self.air * (1 - up)) * 1.1
        sky = sky * np.exp(self.light.cloud * cloud)[..., None]  # [H,W,3]
        self.pixels = self.expose(sky, 0).astype(np.float32)
        self.labels = np.full((self.height, self.width), IDS["sky"], np.uint8)

        # Step 2: the ground: grass
        rows = slice(int(np.searchsorted(self.dy, self.eye / 300)), self.height)
        z = (self.eye / self.dy[rows])[:, None]  # [h,1] metres ahead
        x = self.dx * z - self.bend * z * z  # [h,W] metres right of the road's axis
        fade = domain.texture / (1 + z / 30)
        fine, coarse = grain(18 * x, 12 * z), grain(1.3 * x + 99, 0.9 * z)
        labels = np.full(x.shape, IDS["terrain"], np.uint8)
        albedo = self.colour("grass") * np.exp(fade * (0.9 * fine + 0.8 * coarse))[..., None]

        # Step 3: pavements of slabs, each with a kerb
        outside = {side: side * x - self.edge[side] for side in SIDES}  # [h,W] m beyond the kerb
        border = np.maximum(outside[LEFT], outside[RIGHT])  # the same of both; below 0 on the road
        slabs = tiles(x, z, 0.9, 0.9) * np.exp(-z / 25)
        for side in SIDES:
            paved = (outside[side] > 0) & (outside[side] < self.pavement[side])
            light = np.exp(fade * 0.4 * (fine + coarse) + domain.masonry * slabs)
            light[outside[side] < 0.18] *= 1.25
            albedo[paved] = (self.colour("paving") * light[..., None])[paved]
            labels[paved] = IDS["pavement"]

        # Step 4: the asphalt: worn by wheels, with repairs, cracks and gutters
        track = np.cos((x - self.edge[RIGHT]) * 2 * math.pi / 1.75)
        light = np.exp(fade * (0.5 * fine + 0.45 * coarse + 0.2 * track))
        patches = tiles(x + 0.4 * coarse, z, 2.3, 9.0)
        light *= np.exp(domain.repairs * np.where(patches > 0.6, 0.8, -0.3 * (patches < -0.8)))
        light[np.abs(grain(5 * x, 3 * z) + 0.3 * fine) < 0.1 * domain.repairs] *= 0.6
        light[np.abs(border + 0.15) < 0.12] *= 0.6
        asphalt = self.colour("asphalt") * light[..., None]

        # Step 5: lane lines, edge lines and sometimes a zebra crossing, worn away in places
        worn, white = coarse < rng.uniform(-2.2, -0.8), rng.uniform(0.45, 0.75)
        painted = np.zeros(x.shape, bool)
        total = self.edge[LEFT] + self.edge[RIGHT]
        lanes = max(2, round(total / 3.4))
        for lane in range(1, lanes):
            dash = (z + 9) % 6 < 2.5 if rng.random() < 0.8 else z > 0
            painted |= (np.abs(x + self.edge[LEFT] - lane * total / lanes) < 0.07) & dash
        for side in SIDES:
            if rng.random() < 0.5:
                painted |= np.abs(outside[side] + 0.4) < 0.06
        near = rng.uniform(6, 80)
        painted |= (z > near) & (z < near + 3) & (near < 20) & (x % 1.0 < 0.5)
        asphalt[painted & ~worn] = white
        albedo[border < 0], labels[border < 0] = asphalt[border < 0], IDS["road"]

        # Step 6: sun, cast shadows and the shadows of leaves
        soft = self.shade.filter(ImageFilter.GaussianBlur(0.006 * self.width))
        leaves = domain.dapple * min(1.0, 2 * self.light.sun) * self.speckle(x, z)
        dark = np.maximum(np.asarray(soft, np.float32)[rows] / 255, leaves)[..., None]  # [h,W,1]
        light = (self.light.ambient + 0.8 * self.sun * (1 - dark)) * (1 - 0.35 * dark)
        self.pixels[rows], self.labels[rows] = self.expose(albedo * light, z[..., None]), labels

        # Step 7: the plots; then everything else is drawn into images
        for plot in plots:
            self.paint_plot(plot)
        self.image = Image.fromarray(self.pixels.clip(0, 255).astype(np.uint8))
        self.label_image = Image.fromarray(self.labels)
        self.pen, self.label_pen = ImageDraw.Draw(self.image), ImageDraw.Draw(self.label_image)

    def speckle(self, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Where leaves shade a surface, at positions in m. -> bool, of the shape of u and v"""
        return grain(1.1 * u + self.end, 1.1 * v) + 0.8 * grain(7 * u, 7 * v + self.end) > 0.5

    def paint_plot(self, plot: Plot) -> None:
        """A building, hedge, wall, fence or rail."""
        # Step 1: the columns of the image in which it is seen, and how far away it is in each
        side, label, phase, domain = plot.side, plot.label, plot.phase, self.domain
        if side == 0:
            z, facing = np.full(self.width, plot.offset, np.float32), 0.5
            along = self.dx * z + 80
        else:  # the ray x = dx z meets the curve x = side offset + bend z^2
            a, facing = side * plot.offset, -1.0 if side == self.sun_side else 0.9
            root = self.dx + side * np.sqrt(np.maximum(self.dx**2 - 4 * self.bend * a, 0))
            z = 2 * a / np.where(np.abs(root) > 1e-4, root, 1e-4)
            meets = (self.dx**2 >= 4 * self.bend * a) & (z > 0.5) & (z < self.end + 3)
            z = along = np.where(meets, z, np.inf)
        columns = np.flatnonzero((along >= plot.start) & (along < plot.stop))
        if not len(columns):
            return
        z, u = z[columns], along[columns]  # [C] m ahead of the camera, m along the front
        near = self.f / z.min()  # px per metre
        top = max(0, int(self.y0 + near * (self.eye - 1.3 * plot.height)))
        bottom = min(self.height, int(self.y0 + near * self.eye) + 2)
        y = self.eye - self.dy[top:bottom, None] * z  # [h,C] metres above ground

        # Step 2: outline and texture. Where it is solid it is labelled, where opaque also painted
        fine, coarse = grain(14 * u + phase, 14 * y), grain(1.5 * u + phase, 1.2 * y)
        light = np.exp(domain.texture * 0.5 * (fine + coarse))
        slope = np.abs(2 * (u - plot.start) / (plot.stop - plot.start) - 1)  # 0 in the middle
        gable = label == "building" and phase % 7 < 7 * domain.gables
        solid = opaque = (y > -0.05) & (y < plot.height * (1.1 - 0.35 * slope * gable))
        if label == "vegetation":
            bumps = grain(6 * u + phase, 0 * u) + grain(25 * u + phase, 0 * u)
            ragged = 1 + (0.05 + 0.25 * domain.ragged) * bumps
            solid = opaque = (y > -0.05) & (y < plot.height * ragged)
            light *= np.exp((0.3 + domain.texture) * fine - 0.3 * (1 - y / plot.height))
        elif label in ("wall", "building"):
            light *= np.exp(domain.masonry * tiles(u + phase, y, 1.1, 0.5))
        if label == "wall":
            light[y > plot.height - 0.15] *= 1.3
        elif label == "fence" and domain.european:
            opaque = solid & ((y % 0.4 > 0.12) | (u % 2.5 < 0.15))
        elif label == "fence":
            spacing = 0.1 * plot.bay  # of the pickets
            opaque = solid & ((y > plot.height - 0.12) | (u % spacing < 0.55 * spacing))
        elif label == "rail":
            opaque = solid & ((y > 0.35) | (u % 2.0 < 0.12))
        albedo = plot.colour * light[..., None]  # [h,C,3]

        # Step 3: the facade of a building: windows, cornice, roof and shop front
        if label == "building":
            shop = phase % 1 < 0.4
            base = 3.4 if shop else 0.0
            eave = plot.height - (1.8 if phase > 120 else 0.0)
            bay, floor = (u + phase) / plot.bay, (y - base) / plot.storey
            across, up = np.abs(bay % 1 - 0.5), floor % 1
            upper = (y > base) & (y < eave - 0.4)
            frame = upper & (across < plot.glass / 2 + 0.06) & (up > 0.22) & (up < 0.88)
            pane = upper & (across < plot.glass / 2) & (up > 0.28) & (up < 0.82)
            mirrored = grain(37 * np.floor(bay) + phase, 53 * np.floor(floor))  # one per window
            glass = 0.05 * np.exp(0.7 * mirrored)[..., None] * np.float32([0.85, 0.95, 1.1])
            glass += domain.gloss * (mirrored > -0.2)[..., None] * self.air
            albedo[frame] = 0.4 * albedo[frame] + 0.28
            albedo[pane] = glass[pane]
            albedo[(y > eave - 0.4) & (y < eave)] *= 1.3
            albedo[y > eave] = np.float32([0.10, 0.075, 0.065]) * plot.bay / 2.5
            if shop:
                display = (y > 0.5) & (y < 2.5) & (u % 4 > 0.4)
                albedo[display] = 0.7 * glass[display]
                albedo[(y > 2.6) & (y < 3.3)] = plot.colour[::-1] * (2 * plot.glass) ** 3

        # Step 4: sun and the shadows of leaves
        leaves = 1 - domain.dapple * (self.speckle(u, y) & (y < 6))[..., None]
        light = self.light.ambient + self.sun * max(facing, 0) * leaves
        light = light * (0.75 + 0.25 * np.clip(y / 3, 0, 1))[..., None]
        block = np.ix_(range(top, bottom), columns)
        radiance = self.expose(albedo * light, z[:, None])
        self.pixels[block] = np.where(opaque[..., None], radiance, self.pixels[block])
        self.labels[block] = np.where(solid, IDS[label], self.labels[block])


# ---- Vehicles -----------------------------------------------------------------------------------
# Lengths in m. The windows begin at the belt. The cabin starts and stops at shares of the length
# from the rear, and each of its ends recedes by the taper towards the roof.
VEHICLES = read_records("""
    name   length  width  height  belt  cabin       taper
    car    4.3     1.78   1.48    0.90  0.02, 0.68  0.45
    van    4.9     1.9    2.1     1.15  0.02, 0.85  0.3
    truck  7.5     2.4    2.8     1.3   0.72, 1.0   0.1
    bus    11      2.55   3.1     1.4   0.0, 1.0    0.05
    train  24      2.65   3.6     1.6   0.0, 1.0    0.2
""")
GREYS = [(0.75, 0.75, 0.76), (0.10, 0.10, 0.11), (0.35, 0.36, 0.38), (0.55, 0.56, 0.58)]
PAINTS = {
    "car": [*GREYS, (0.45, 0.08, 0.08), (0.10, 0.16, 0.35), (0.85, 0.85, 0.83), (0.14, 0.22, 0.18)],
    "truck": [(0.85, 0.85, 0.83), (0.25, 0.35, 0.55), (0.60, 0.45, 0.25)],
    "bus": [(0.75, 0.15, 0.12), (0.80, 0.75, 0.65), (0.15, 0.30, 0.60)],
    "train": [(0.85, 0.65, 0.15), (0.80, 0.80, 0.78), (0.20, 0.45, 0.35)],
}
EUROPEAN_PAINTS = {
    "car": [(0.62, 0.63, 0.65), (0.06, 0.06, 0.07), (0.22, 0.23, 0.25), (0.30, 0.34, 0.42)],
    "truck": [(0.30, 0.42, 0.35), (0.62, 0.60, 0.56), (0.70, 0.30, 0.15)],
    "bus": [(0.78, 0.74, 0.66), (0.36, 0.46, 0.40), (0.60, 0.20, 0.16)],
    "train": [(0.80, 0.68, 0.30), (0.40, 0.44, 0.52), (0.30, 0.30, 0.32)],
}


def visible_faces(scene: Scene, thing: Thing, box: tuple) -> Iterator[tuple]:
    """The faces of an upright box that the camera sees -> name, corners, cosine to the sun.
    box: its rear and front, from the middle of the vehicle; width; bottom and top; by how much rear
    and front recede towards the top. corners [2,2,3]: the lower and the upper edge, the two ends of
    each, x y z. All in m."""
    rear, front, width, bottom, top, taper = box
    cosine, sine = math.cos(thing.yaw), math.sin(thing.yaw)
    # Below and above, each: rear left, rear right, front right, front left.
    along = np.array([rear, rear, front, front]) + [[0], [taper]] * np.array([1, 1, -1, -1])
    across = np.outer([width, width - 0.7 * taper], [-0.5, 0.5, 0.5, -0.5])  # [2,4]
    x, z = thing.x + cosine * across + sine * along, thing.z - sine * across + cosine * along
    corners = np.stack((x, np.full((4, 2), (bottom, top)).T, z), axis=-1)
    if top < scene.eye and thing.z > 1 - rear:
        yield "top", corners[1, [[0, 1], [3, 2]]], 0.9
    for k, name in enumerate(("rear", "right", "front", "left")):
        face = corners[:, [k, (k + 1) % 4]]
        (ax, _, az), (bx, _, bz) = face[0]
        nx, nz = bz - az, ax - bx  # outward normal
        if min(az, bz) >= 0.8 and (ax + scene.bend * az * az) * nx + az * nz < 0:
            yield name, face, (0.8 * scene.sun_side * nx - 0.4 * nz) / math.hypot(nx, nz)


def paint_vehicle(scene: Scene, thing: Thing) -> None:
    """A body on wheels, a glazed cabin and (trucks) a cargo box, the farthest first."""

    def panel(corners, s, t, colour, facing=0.5, label=None) -> None:
        """A polygon on a face: s runs along it, t up, both 0..1. Two of each: a rectangle."""
        if len(s) == 2:
            s, t = (s[0], s[1], s[1], s[0]), (t[0], t[0], t[1], t[1])
        s, t = np.array(s)[:, None], np.array(t)[:, None]  # [n,1]
        start, stop = (corners[0, k] + t * (corners[1, k] - corners[0, k]) for k in (0, 1))  # [n,3]
        points = [scene.project(*point) for point in (start + s * (stop - start)).tolist()]
        scene.fill(points, scene.shaded(colour, thing, facing), label)

    rng, label, body = scene.rng, thing.label, VEHICLES[thing.label]
    length, width, height, belt = body.length, body.width, body.height, body.belt
    if label == "car":
        length, height = scene.domain.car
        belt = 0.6 * height
    height *= rng.uniform(0.95, 1.1)
    paints = EUROPEAN_PAINTS if scene.domain.european else PAINTS
    paint = linear(rng.choice(paints.get(label, paints["car"]))) * rng.uniform(0.7, 1.2)
    load = scene.colour("facades") * 0.5 + 0.5 * paint
    glass = np.array([0.045, 0.055, 0.065]) + scene.domain.gloss * rng.uniform(0, 1.3) * scene.air
    lamps = {"rear": (0.5, 0.02, 0.02), "front": (0.8, 0.8, 0.75)}
    rear, front = -length / 2, length / 2
    cabin_rear, cabin_front = (rear + share * length for share in body.cabin)
    parts = {  # the box and its colour
        "axles": ((rear, front, 0.94 * width, 0.1, 0.5, 0), (0.012, 0.012, 0.014)),
        "body": ((rear, front, width, 0.25, belt, 0), paint),
        "cabin": ((cabin_rear, cabin_front, 0.97 * width, belt, height, body.taper), paint),
        "cargo": ((rear, rear + 0.68 * length, width, 0.9, height + 0.5, 0), load),
    }
    radius, angles = 0.32 if body.length < 6 else 0.45, np.arange(12) * math.pi / 6
    wheel = (radius, 0.01), (0.55 * radius, 0.15)  # tyre and rim: radius in m, brightness
    discs = [(middle, *disc) for middle in (0.18, 0.82) for disc in wheel]
    panes = max(2, round((body.cabin[1] - body.cabin[0]) * length / 1.7))  # on a long side
    order = ["axles", "cabin", "body"]
    if label == "truck":  # the cabin is at its front
        drives_away = math.cos(thing.yaw) > 0
        order = ["axles", "body", *(("cabin", "cargo") if drives_away else ("cargo", "cabin"))]
    for part in order:
        box, colour = parts[part]
        for face, corners, facing in visible_faces(scene, thing, box):
            panel(corners, s=(0, 1), t=(0, 1), colour=colour, facing=facing, label=label)
            if face == "top":
                continue
            if part == "cabin" and not (label == "truck" and face == "rear"):
                count = panes if face in ("left", "right") else 1
                for n in range(count):
                    s = (n + 0.07) / count, (n + 0.93) / count
                    panel(corners, s, t=(0.06, 0.82), colour=glass, facing=facing)
            elif part == "cargo":
                panel(corners, s=(0.48, 0.5), t=(0, 1), colour=0.4 * load, facing=facing)
            elif part == "body":
                panel(corners, s=(0, 1), t=(0, 0.25), colour=0.4 * paint, facing=facing)
                if face in lamps:
                    panel(corners, s=(0.02, 0.18), t=(0.55, 0.85), colour=lamps[face], facing=0.8)
                    panel(corners, s=(0.82, 0.98), t=(0.55, 0.85), colour=lamps[face], facing=0.8)
                    panel(corners, s=(0.36, 0.64), t=(0.3, 0.5), colour=(0.6, 0.58, 0.4))  # plate
                else:
                    for middle, r, grey in discs:
                        s = middle + r * np.cos(angles) / body.length
                        t = (radius + r * np.sin(angles) - 0.25) / (body.belt - 0.25)
                        panel(corners, s, t, colour=(grey,) * 3, label=label)


# ---- Other things -------------------------------------------------------------------------------
# Flat figures made of strokes: ink, thickness, from x, y, to x, y, all in m. A disc has one x, y.
FIGURES = """
    person      legs 0.22 -0.08 0.85 -0.17 0.1  legs 0.22 0.08 0.85 0.17 0.1
    person      coat 0.16 -0.24 1.4 -0.33 0.85  coat 0.16 0.24 1.4 0.33 0.85
    person      coat 0.46 0 1 0 1.3             skin 0.26 0 1.62 0 1.66   hair 0.25 0 1.72
    rider       legs 0.24 -0.05 0.95 0.15 0.3   coat 0.5 0 1.1 0.05 1.4
    rider       coat 0.14 0.1 1.4 0.42 1.05     skin 0.26 0.08 1.7 0.08 1.75
    rider       hair 0.28 0.08 1.8 0.08 1.82
    bicycle     tyre 0.7 -0.52 0.35             tyre 0.7 0.52 0.35        rim 0.56 -0.52 0.35
    bicycle     rim 0.56 0.52 0.35              paint 0.1 -0.52 0.35 -0.1 0.9
    bicycle     paint 0.1 -0.15 0.8 0.45 0.85   paint 0.1 0 0.35 0.42 0.8  tyre 0.1 0.52 0.35 0.4 1
    motorcycle  tyre 0.66 -0.62 0.33            tyre 0.66 0.62 0.33       rim 0.3 -0.62 0.33
    motorcycle  rim 0.3 0.62 0.33               paint 0.5 -0.45 0.65 0.3 0.7
    motorcycle  tyre 0.2 -0.7 0.85 0 0.85       paint 0.2 0.62 0.4 0.45 1.1
    light       steel 0.24 0 0 0 2.4            housing 0.6 0 2.4 0 3.3   green 0.36 0 2.42
    light       amber 0.36 0 2.85               red 0.36 0 3.28
    pole        steel 0.36 0 0 0 7.5            steel 0.12 0 7.5 1.8 7.8  steel 0.2 1.4 7.7 2.1 7.8
    sign        steel 0.24 0 0 0 2.3
"""
STROKES: dict[str, list[list[str]]] = {}
for figure, *cells in read_table(FIGURES):
    STROKES.setdefault(figure, []).extend(cell.split() for cell in cells)
CLOTHES = [(0.08, 0.08, 0.10), (0.15, 0.18, 0.30), (0.40, 0.40, 0.40), (0.50, 0.12, 0.10)]
CLOTHES += [(0.75, 0.74, 0.70), (0.20, 0.25, 0.18), (0.35, 0.25, 0.18)]
SIGN_BORDERS = [(0.70, 0.05, 0.05), (0.05, 0.2, 0.6), (0.9, 0.9, 0.9), (0.85, 0.7, 0.1)]
SIGN_INSIDES = [(0.9, 0.9, 0.9), (0.9, 0.9, 0.9), (0.05, 0.2, 0.6), (0.9, 0.9, 0.9)]


def paint_figure(scene: Scene, thing: Thing) -> None:
    """People, cycles, lights, poles and signs: flat figures made of strokes."""
    rng, x, z = scene.rng, thing.x, thing.z
    size, turn = rng.uniform(*scene.domain.figure), math.cos(thing.yaw)
    inks = {
        "coat": linear(rng.choice(CLOTHES)),
        "legs": linear(rng.choice(CLOTHES)),
        "steel": (rng.uniform(*scene.domain.steel),) * 3,
        "housing": (scene.domain.housing, 0.8 * scene.domain.housing, 0.01),
        "skin": (0.42, 0.26, 0.19),
        "hair": rng.uniform(0, 0.1, 3),
        "tyre": (0.01,) * 3,
        "rim": (0.12,) * 3,
        "paint": rng.uniform(0.02, 0.4, 3),
    }
    lamps = {"red": (255, 50, 40), "amber": (255, 190, 50), "green": (40, 255, 150)}
    lit = rng.choice(list(lamps))
    for ink, *numbers in STROKES[thing.label]:
        thick, ax, ay, *end = (size * float(number) for number in numbers)
        bx, by = end or (ax, ay)
        label = "pole" if ink == "steel" else thing.label
        colour = lamps[lit] if ink == lit else scene.shaded(inks.get(ink, inks["rim"]), thing)
        scene.rod((x + turn * ax, ay), (x + turn * bx, by), z, thick, colour, label)
    if thing.label == "sign":
        kind, corners = rng.integers(len(SIGN_BORDERS)), rng.choice((3, 4, 12))
        angles = 2 * math.pi * (np.arange(corners) + 0.5 * (corners == 4)) / corners
        plates = (1, SIGN_BORDERS[kind], "sign"), (0.65, SIGN_INSIDES[kind], None)
        for share, colour, label in plates:
            r = 0.62 * size * share
            points = [scene.project(x + r * math.sin(a), 2.5 + r * math.cos(a), z) for a in angles]
            scene.fill(points, scene.shaded(linear(colour), thing, 0.6), label)


def paint_tree(scene: Scene, thing: Thing) -> None:
    """A trunk under a clumpy crown, or branches with the background between them."""
    rng, x, z, ragged = scene.rng, thing.x, thing.z, scene.domain.ragged
    bark = scene.shaded((0.07, 0.055, 0.045), thing, 0.2)

    def paint_branch(start: tuple, angle: float, length: float, thick: float, forks: int) -> None:
        """From x, y in m at an angle to the horizontal; three more begin at its tip."""
        tip = (start[0] + length * math.cos(angle), start[1] + length * math.sin(angle))
        line = [scene.project(*start, z), scene.project(*tip, z)]
        scene.pen.line(line, fill=bark, width=max(1, round(scene.f * thick / z)))
        for turn in rng.normal(0, 0.55, 3 if forks else 0):
            shorter = length * rng.uniform(0.5, 0.8)
            paint_branch(tip, angle + turn, shorter, 0.6 * thick, forks - 1)

    radius, trunk = rng.uniform(1.6, 3.5), rng.uniform(3.5, 7)
    scene.rod((x, 0), (x, trunk), z, 0.35, bark, thing.label)
    px, py = scene.project(x, trunk + 0.3 * radius, z)
    r = int(scene.f / z * radius)  # px
    if r < 2:
        return
    step = np.arange(-r, r + 1, dtype=np.float32) / r
    v, u = step[:, None], step[None]  # the crown is where u^2 + v^2 < 1
    a, b = rng.uniform(0, 256, 2)
    coarse, fine = grain(40 * u + a, 40 * v + b), grain(110 * u + b, 110 * v + a)  # [2r+1,2r+1]
    shape = 1 - u * u - v * v + (0.15 + 0.5 * ragged) * coarse - 0.5 * ragged
    left, top = int(px) - r, int(py) - r
    scene.label_image.paste(IDS[thing.label], (left, top), Image.fromarray(shape > 0.15))
    if rng.random() < scene.domain.bare:
        paint_branch((x, 0.6 * trunk), math.pi / 2, 0.5 * radius + 0.3 * trunk, 0.3, 5)
        return
    light = np.exp((0.25 + scene.domain.texture) * 0.5 * (fine + coarse) - 0.5 * v)
    light *= 1 + 0.4 * scene.sun_side * u * min(1.0, scene.light.sun)
    colour = (scene.light.ambient + 0.4 * scene.sun) * scene.colour("leaves")
    crown = scene.expose(colour * 0.8 * light[..., None], z).astype(np.uint8)
    leafy = (shape > 0.15) & ((fine > 1.5 * ragged - 1.4) | (shape > 0.6 + ragged))
    scene.image.paste(Image.fromarray(crown), (left, top), Image.fromarray(leafy))


# ---- Composition --------------------------------------------------------------------------------
def make_plots(scene: Scene, side: int, offset: float, built: float, green: float, tall=1) -> list:
    """Plots in a row of 160 m: a share `built` of them are buildings, a share `green` of the others
    are greenery, the rest are gaps. tall: a factor for all heights."""
    domain, rng = scene.domain, scene.rng
    plots, start = [], 0.0
    while start < 160:
        stop, storey = start + rng.uniform(*domain.plot), rng.uniform(2.8, 3.8)
        house, phase = rng.random() < built, rng.uniform(0, 256)
        bay, glass = rng.uniform(1.8, 3.5), rng.uniform(0.35, 0.65)
        if house:
            height = storey * round(rng.uniform(*domain.storeys) * tall) + rng.uniform(0.5, 2.5)
            colour = scene.colour("facades")
        else:
            height, colour = rng.uniform(1.5, 7) * tall, 0.8 * scene.colour("leaves")
        if house or rng.random() < green:
            label = "building" if house else "vegetation"
            place = side, offset, start, stop
            plots.append(Plot(label, *place, height, colour, bay, glass, storey, phase))
        start = stop
    return plots


def make_street(scene: Scene, near: list[str]) -> list[Plot]:
    """The plots at the far end and on both sides, far to near. Barriers (hedge, wall, fence or
    guard rail) and grass that are among the labels `near` come on one side."""
    domain, rng = scene.domain, scene.rng
    plots = make_plots(scene, 0, scene.end, domain.built, green=1.0, tall=1.3)
    chosen_side = rng.choice(SIDES)
    if "terrain" in near:
        scene.front[chosen_side] += 4 - 0.7 * scene.pavement[chosen_side]
        scene.pavement[chosen_side] *= 0.3
    barriers = ("rail", "static") if domain.rails else ("fence", "wall", "vegetation")
    near_barriers = [label for label in near if label in ("fence", "wall", "rail")]
    heights = {"fence": 1.5, "wall": 1.9, "vegetation": 1.4, "rail": 0.8, "static": 0.8}  # m
    for side in SIDES:
        front = scene.front[side]
        plots += make_plots(scene, side, front + 9, 0.5 * domain.built, green=1.0)
        plots += make_plots(scene, side, front + 2, domain.built, green=0.5)
        if near_barriers and side == chosen_side:
            label, start = near_barriers[0], rng.uniform(2, 5)
        elif rng.random() < 0.3:
            label, start = rng.choice(barriers), rng.uniform(0, 20)
        else:
            continue
        height = heights[label] * rng.uniform(0.75, 1.3)
        colours = {
            "fence": linear((0.4,) * 3) * rng.uniform(0.2, 2),
            "wall": 0.8 * scene.colour("facades"),
            "vegetation": scene.colour("leaves"),
        }
        colour = colours.get(label, linear((0.7,) * 3))
        place = side, front - 0.2, start, start + rng.uniform(12, 40)
        bay, phase = rng.uniform(1.5, 4), rng.uniform(0, 256)
        plots.append(Plot(label, *place, height, colour, bay, glass=0.5, storey=3, phase=phase))
    return plots


def make_things(scene: Scene, near: list[str]) -> Iterator[Thing]:
    """What stands and drives in the street, in no order; `near`: labels to put near the camera."""
    domain, rng = scene.domain, scene.rng

    def depth(nearest: float, farthest: float) -> float:
        """A random z; its logarithm is uniform."""
        z = nearest * (farthest / nearest) ** rng.random()
        return max(nearest, min(z, scene.end - 3))

    def off_road(side: int, share: float) -> float:
        """x between the kerb (share 0) and the plots (share 1)."""
        kerb, plots = scene.edge[side] + 0.3, scene.front[side] - 0.3
        return side * (kerb + share * (plots - kerb))

    for side in SIDES:
        ahead = math.pi * (side == LEFT)  # those on the left come towards the camera
        for k in range(rng.poisson(domain.parked)):
            z = 5 + 5.6 * k + rng.uniform(0, 2) + 20 * rng.random() ** 2
            yield Thing(side * (scene.edge[side] - 1.1), z, ahead + rng.normal(0, 0.05), "car")
        for _ in range(rng.poisson(domain.traffic / 2)):
            x, z = side * rng.uniform(0.2, 0.6) * scene.edge[side], depth(8, 70)
            yield Thing(x, z, ahead + rng.normal(0, 0.05), "car")
        for _ in range(rng.poisson(domain.people / 2)):
            yield Thing(off_road(side, rng.random()), depth(5, 22), rng.uniform(0, 1), "person")
        for _ in range(rng.poisson(domain.trees / 2)):
            yield Thing(off_road(side, rng.uniform(0.4, 1.8)), depth(8, 80), 0, "tree")
        for _ in range(rng.poisson(domain.poles / 2)):
            label = rng.choice(("pole", "pole", "sign", "light"))
            yield Thing(off_road(side, 0.1), depth(5, 25), ahead + math.pi, label)
    for label in near:
        side = rng.choice(SIDES)
        ahead, across = math.pi * (side == LEFT), rng.random() < 0.15
        if label in ("truck", "bus", "train", "van"):
            z = rng.uniform(5, 12) + (2 if across else VEHICLES[label].length / 2)
            yaw = math.pi / 2 * side if across else ahead + rng.normal(0, 0.1)
            yield Thing(side * 0.5 * scene.edge[side], z, yaw, label)
        elif label in ("rider", "motorcycle"):
            motorcycle = label == "motorcycle" or rng.random() < 0.3
            yaw = rng.choice((0, math.pi)) + rng.uniform(-1.2, 1.2)
            x, z = side * rng.uniform(0.2, 0.9) * scene.edge[side], rng.uniform(4.5, 8)
            for part in ("motorcycle" if motorcycle else "bicycle", "rider"):
                yield Thing(x, z, yaw, part)
        elif label in ("person", "bicycle", "light", "sign", "pole"):
            for _ in range(rng.integers(2, 5)):
                yaw = rng.uniform(-0.8, 0.8)
                x, z = off_road(side, 0.5 * rng.random()), rng.uniform(4.5, 9)
                yield Thing(x, z, yaw, label)


def cast_shadows(scene: Scene, plots: list[Plot], things: list[Thing]) -> list[Thing]:
    """Shadows of plots and things on the ground. -> the things with `sunlit` filled in"""
    pen, side, reach = ImageDraw.Draw(scene.shade), scene.sun_side, scene.light.shadow
    strength = int(255 * min(1.0, 2 * scene.light.sun))
    for plot in plots:
        if plot.side == side:
            tip = plot.offset - plot.height * reach
            z0, z1 = max(plot.start, 1), plot.stop
            corners = ((plot.offset, z0), (tip, z0 + 1), (tip, z1 + 1), (plot.offset, z1))
            pen.polygon([scene.project(side * x, 0, z) for x, z in corners], strength)
    shade_of_plots, lit_things = scene.shade.copy(), []
    for thing in things:
        x, z, yaw, label, _ = thing
        px, py = scene.project(x, 0, z)
        if 0 <= px < scene.width and 0 <= py < scene.height:
            thing = thing._replace(sunlit=1 - shade_of_plots.getpixel((int(px), int(py))) / 255)
        lit_things.append(thing)
        long, wide, high = 0.3, 0.35, 1.5  # half its length and width, its height, m
        if label in VEHICLES:
            long, wide = VEHICLES[label].length / 2, VEHICLES[label].width / 2 + 0.1
            long, wide = (wide, long) if abs(math.sin(yaw)) > 0.7 else (long, wide)
        elif label == "tree":
            long, wide, high = 2.5, 2.0, 6.0
        # A long shadow away from the sun, then a dark spot below all but trees.
        shift, angles = high * reach / 2, np.arange(16) * math.pi / 8
        for dx, grey in ((shift, int(0.8 * strength)), (0, 0 if label == "tree" else 235)):
            u, v = x - side * dx + (wide + dx) * np.cos(angles), z + long * np.sin(angles)
            if grey:
                pen.polygon([scene.project(*p) for p in zip(u, 0 * u, v, strict=True)], grey)
    return lit_things


def render(domain: Domain, seed: int, index: int) -> tuple[Image.Image, Image.Image]:
    """One scene -> image (RGB) and labels (L, the ids of LABELS)."""
    # Step 1: what is in the street
    scene = Scene(domain, np.random.default_rng([seed, domain.number, index]))
    labels = (URBAN if domain.urban else RURAL).split()
    near = [labels[(5 * index + k) % len(labels)] for k in range(5)]
    plots = make_street(scene, near)
    things = sorted(make_things(scene, near), key=lambda thing: -thing.z)  # far to near
    things = cast_shadows(scene, plots, things)

    # Step 2: it is painted from back to front
    scene.paint_background(plots)
    for thing in things:
        if thing.label in VEHICLES:
            paint_vehicle(scene, thing)
        elif thing.label == "tree":
            paint_tree(scene, thing)
        else:
            paint_figure(scene, thing)
    if domain.bonnet:
        arc = ((0, 1), (0, 0.97), (0.25, 0.93), (0.5, 0.915), (0.75, 0.93), (1, 0.97), (1, 1))
        scene.fill([(scene.width * x, scene.height * y) for x, y in arc], (28, 30, 31), "ego")
    labels = Image.fromarray(np.asarray(scene.label_image)[1::2, 1::2])

    # Step 3: the camera: resampling, blur, colour, vignette, noise, compression
    image = scene.image.reduce(2).filter(ImageFilter.GaussianBlur(domain.blur))
    x = np.asarray(image, np.float32) / 255  # [H,W,3]
    h, w = domain.size
    grey = x.mean(axis=2, keepdims=True)
    gain = np.array(domain.tint) * np.exp(scene.rng.normal(0, domain.balance, 3))
    x = (grey + domain.saturation * (x - grey)) * gain.astype(np.float32)
    x = domain.black + (1 - domain.black) * (0.5 + domain.contrast * (x - 0.5))
    radius = np.hypot(np.linspace(-1, 1, h)[:, None], np.linspace(-1, 1, w)[None])
    x *= (1 - domain.vignette * 0.5 * radius**2)[..., None]
    x = 255 * x + domain.noise * scene.rng.standard_normal((h, w, 1), np.float32)
    image = Image.fromarray(x.clip(0, 255).astype(np.uint8))
    if domain.jpeg:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=domain.jpeg)
        image = Image.open(buffer).convert("RGB")
    return image, labels


# ---- Files --------------------------------------------------------------------------------------
def list_pairs(root: Path, seed: int, scale: float) -> Iterator[tuple]:
    """Every pair to write: domain, seed, index of the scene, image file, label file."""
    domain, frames = DOMAINS["vkitti2"], max(2, round(80 * scale))
    foggy = Domain(**vars(domain) | {"haze": (0.02, 0.03)})
    for k, name in enumerate(("01", "02", "06", "18", "20")):
        for variant, weather, count in (("clone", domain, frames), ("fog", foggy, min(8, frames))):
            folder = root / f"vkitti2/Scene{name}/{variant}/frames"
            for n in range(count):
                image = folder / f"rgb/Camera_0/rgb_{n:05}.jpg"
                label = folder / f"classSegmentation/Camera_0/classgt_{n:05}.png"
                yield weather, seed, k * frames + n, image, label

    for k in range(2 * max(6, round(100 * scale))):
        h, w = DOMAINS["kitti"].size
        if k % 10 >= 7:  # KITTI's images are not all of one size
            h, w = h - k % 10 + 6, w - k % 10 + 5
        kitti, folder = Domain(**vars(DOMAINS["kitti"]) | {"size": (h, w)}), root / "kitti/training"
        yield kitti, seed, k, folder / f"image_2/{k:06}_10.png", folder / f"semantic/{k:06}_10.png"

    for k in range(max(6, round(400 * scale))):
        image, label = root / f"gta5/images/{k + 1:05}.png", root / f"gta5/labels/{k + 1:05}.png"
        yield DOMAINS["gta5"], seed, k, image, label

    index = 0
    for city in ("train/adorf", "train/beheim", "train/cestadt", "val/dehain", "val/efurt"):
        count = 100 if city.startswith("train") else 50
        for k in range(max(3, round(count * scale))):
            stem = f"{city}/{Path(city).name}_{k:06}_000019"
            image = root / f"cityscapes/leftImg8bit/{stem}_leftImg8bit.png"
            label = root / f"cityscapes/gtFine/{stem}_gtFine_labelIds.png"
            yield DOMAINS["cityscapes"], seed, index, image, label
            index += 1


def write_pair(pair: tuple) -> None:
    """Renders one pair and writes it in its dataset's format."""
    domain, seed, index, image_path, label_path = pair
    image, labels = render(domain, seed, index)
    image_path.parent.mkdir(parents=True, exist_ok=True)
    label_path.parent.mkdir(parents=True, exist_ok=True)
    if domain.name == "vkitti2":
        image.save(image_path, quality=95)
        labels = Image.fromarray(VKITTI2_COLOURS[np.asarray(labels)])
    else:
        image.save(image_path, compress_level=1)
        merged = {IDS["tree"]: IDS["vegetation"], IDS["van"]: IDS["car"]}
        labels = labels.point([merged.get(k, k) for k in range(256)])
    if domain.name == "gta5":
        labels.putpalette(GTA5_COLOURS.flatten().tolist())  # the indices stay the ids
    labels.save(label_path)


def marker(name: str, seed: int, scale: float) -> str:
    """The text of a dataset's miniature.json."""
    facts = {"miniature": True, "version": VERSION, "seed": seed, "dataset": name, "scale": scale}
    return json.dumps(facts) + "\n"


def is_current(out: Path, seed: int = 0, scale: float = 1.0) -> bool:
    """Whether `out` holds the miniature of this version, seed and scale."""
    files = {name: Path(out) / name / "miniature.json" for name in DOMAINS}
    return all(f.is_file() and f.read_text() == marker(n, seed, scale) for n, f in files.items())


def write(out: Path, seed: int = 0, scale: float = 1.0, workers: int | None = None) -> None:
    """Writes the four datasets into a folder. An older miniature there is replaced.

    All is written beside it and then renamed, so no dataset is ever incomplete. FileExistsError
    where the folder holds anything else, ValueError for a bad seed or scale.

    Args:
        out: Folder that will hold vkitti2/ kitti/ gta5/ cityscapes/.
        seed: Every image follows from it.
        scale: Share of the images to write; 0.05 is enough for a test.
        workers: Processes. Default: one for each core.
    """
    if seed < 0 or not 0 < scale <= 1:
        raise ValueError(f"seed {seed}, scale {scale}: expected 0 or more, and above 0 up to 1")
    out = Path(out).resolve()
    if is_current(out, seed, scale):
        print(f"{out}: the miniature is there already")
        return
    for path in out.iterdir() if out.exists() else ():
        if path.name not in DOMAINS or not (path / "miniature.json").is_file():
            raise FileExistsError(f"{out}: found {path.name}, expected an empty folder")
    part = out.with_name(f"{out.name}.{os.getpid()}.part")
    try:
        with ProcessPoolExecutor(workers or os.cpu_count(), get_context("spawn")) as pool:
            # The workers inherit that Ctrl-C is ignored; this process ends them.
            main_thread = threading.current_thread() is threading.main_thread()
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN) if main_thread else None
            try:
                written = pool.map(write_pair, list_pairs(part, seed, scale), chunksize=8)
            finally:
                if main_thread:
                    signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
            list(written)  # raises errors
        if is_current(out, seed, scale):
            return  # another process was quicker
        out.mkdir(parents=True, exist_ok=True)
        for name in DOMAINS:
            (part / name / "miniature.json").write_text(marker(name, seed, scale))
            shutil.rmtree(out / name, ignore_errors=True)
            (part / name).rename(out / name)
    finally:
        shutil.rmtree(part, ignore_errors=True)


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(write, description=__doc__)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
