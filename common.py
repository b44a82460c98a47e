"""What every method shares so that their comparison is fair: data, networks, evaluator, training.

Run as a script it looks over a dataset, which is the first thing to do with a fresh download:

    python common.py --dataset gta5 --data /datasets/gta5

It counts the pairs, the missing ones, the sizes and the pixels of every class, and writes a CSV and
a figure of images with their labels laid over them.

Letters in shape comments: B batch, C classes, H x W height and width in pixels, N images of a set.
Images are float RGB in [0, 1] (the networks normalise), labels are train ids 0..C-1 or 255.
"""

import atexit
import contextlib
import csv
import errno
import fcntl
import hashlib
import io
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

IGNORE = 255  # the train id of pixels that count nowhere
UNKNOWN = 254  # in a lookup table: a value that no valid label file holds


class UserError(Exception):
    """Something the user can mend, said in one line: file, what was found, what was expected."""


# ---- Label spaces -------------------------------------------------------------------------------
CITYSCAPES_IDS = {
    "road": 7, "sidewalk": 8, "building": 11, "wall": 12, "fence": 13, "pole": 17,
    "traffic light": 19, "traffic sign": 20, "vegetation": 21, "terrain": 22, "sky": 23,
    "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31,
    "motorcycle": 32, "bicycle": 33,
}  # fmt: skip
MAX_ID = {"kitti": 33, "cityscapes": 33, "gta5": 34}  # GTA5 also labels number plates, as 34
VKITTI2_COLOURS = {
    (210, 0, 200): "terrain", (90, 200, 255): "sky", (0, 199, 0): "vegetation",
    (90, 240, 0): "vegetation", (140, 140, 140): "building", (100, 60, 100): "road",
    (255, 255, 0): "traffic sign", (200, 200, 0): "traffic light", (255, 130, 0): "pole",
    (160, 60, 60): "truck", (255, 127, 80): "car", (0, 139, 139): "car",  # the second is Van
    (250, 100, 255): None, (80, 80, 80): None, (0, 0, 0): None,  # GuardRail, Misc, Undefined
}  # fmt: skip
PALETTE = {
    "road": (128, 64, 128), "sidewalk": (244, 35, 232), "building": (70, 70, 70),
    "wall": (102, 102, 156), "fence": (190, 153, 153), "pole": (153, 153, 153),
    "traffic light": (250, 170, 30), "traffic sign": (220, 220, 0), "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152), "sky": (70, 130, 180), "person": (220, 20, 60),
    "rider": (255, 0, 0), "car": (0, 0, 142), "truck": (0, 0, 70), "bus": (0, 60, 100),
    "train": (0, 80, 100), "motorcycle": (0, 0, 230), "bicycle": (119, 11, 32),
}  # fmt: skip


class Benchmark(NamedTuple):
    """A source, a target, and the classes that both label, in the order of their train ids."""

    source: str
    target: str
    classes: tuple[str, ...]


BENCHMARKS = {
    "vkitti2kitti": Benchmark("vkitti2", "kitti", (
        "road", "building", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
        "sky", "car", "truck",
    )),
    "gta52cityscapes": Benchmark("gta5", "cityscapes", tuple(CITYSCAPES_IDS)),
}  # fmt: skip


def classes_of(dataset: str) -> tuple[str, ...]:
    """The classes of the benchmark that a dataset belongs to."""
    return next(b.classes for b in BENCHMARKS.values() if dataset in (b.source, b.target))


@cache
def label_table(dataset: str) -> np.ndarray:
    """Lookup table from a label file's value to its train id, IGNORE or UNKNOWN. uint8 [values].

    The value is the Cityscapes id, or for VKITTI2 the colour as one number, R*65536 + G*256 + B.
    """
    classes = classes_of(dataset)
    if dataset == "vkitti2":
        table = np.full(1 << 24, UNKNOWN, np.uint8)
        for (r, g, b), name in VKITTI2_COLOURS.items():
            table[r << 16 | g << 8 | b] = classes.index(name) if name else IGNORE
        return table
    table = np.full(256, UNKNOWN, np.uint8)
    table[: MAX_ID[dataset] + 1] = IGNORE
    for train_id, name in enumerate(classes):
        table[CITYSCAPES_IDS[name]] = train_id
    return table


def palette(classes: Sequence[str]) -> np.ndarray:
    """Colours of the train ids; black for all others. uint8 [256,3]."""
    colours = np.zeros((256, 3), np.uint8)
    colours[: len(classes)] = [PALETTE[name] for name in classes]
    return colours


# ---- Files of the four datasets -----------------------------------------------------------------
class Layout(NamedTuple):
    """Where a dataset keeps its images, and how an image's path turns into its label's."""

    images: str  # glob; {part} is train or val, {variant} a weather or camera variant of VKITTI2
    renames: tuple[tuple[str, str], ...]

    def label_of(self, image: str) -> str:
        for old, new in self.renames:
            image = image.replace(old, new)
        return image


LAYOUTS = {
    "vkitti2": Layout(
        "Scene*/{variant}/frames/rgb/Camera_0/rgb_*.jpg",
        (("/rgb/", "/classSegmentation/"), ("rgb_", "classgt_"), (".jpg", ".png")),
    ),
    "kitti": Layout("training/image_2/*_10.png", (("image_2/", "semantic/"),)),
    "gta5": Layout("images/*.png", (("images/", "labels/"),)),
    "cityscapes": Layout(
        "leftImg8bit/{part}/*/*_leftImg8bit.png",
        (("leftImg8bit/", "gtFine/"), ("_leftImg8bit.png", "_gtFine_labelIds.png")),
    ),
}
# Frames of the official GTA5 archives that are unusable: image and label differ.
GTA5_MISMATCHED = {f"images/{i:05d}.png" for i in (15188, 17705, *range(20801, 20861))}


class Listing(NamedTuple):
    """The files of one part of a dataset, sorted by path."""

    pairs: list[tuple[Path, Path]]  # image, label
    unlabelled: list[Path]  # images whose label is missing
    orphans: list[Path]  # labels whose image is missing


def list_files(dataset: str, root: Path, part: str, variants: Sequence[str]) -> Listing:
    """Images and labels of `part`, 'train' or 'test'; a source is all 'train'.

    `variants` matter for VKITTI2 alone. UserError where there is not one image.
    """
    layout = LAYOUTS[dataset]
    # The labels of Cityscapes' test are withheld: its val serves.
    fill = partial(layout.images.format, part={"train": "train", "test": "val"}[part])
    patterns = [fill(variant=variant) for variant in (variants if "{v" in layout.images else [""])]
    images = sorted(p.relative_to(root).as_posix() for g in patterns for p in root.glob(g))
    if not images:
        raise UserError(f"{root}: no image of {dataset} found, expected {' or '.join(patterns)}")
    labels = {layout.label_of(image): image for image in images}
    found = {
        p.relative_to(root).as_posix() for g in patterns for p in root.glob(layout.label_of(g))
    }
    orphans = sorted(root / label for label in found - set(labels))
    if dataset == "kitti":  # contiguous halves, so that neighbouring frames do not straddle them
        half = len(images) // 2
        images = images[:half] if part == "train" else images[half:]
    if dataset == "gta5":
        images = [image for image in images if image not in GTA5_MISMATCHED]
    pairs = [(root / image, root / layout.label_of(image)) for image in images]
    unlabelled = [i for i, label in pairs if label.relative_to(root).as_posix() not in found]
    missing = set(unlabelled)
    return Listing([pair for pair in pairs if pair[0] not in missing], unlabelled, orphans)


def opened(path: Path, decode: bool = True) -> Image.Image:
    """An image file, or its header alone; UserError that names the file where that fails."""
    try:
        image = Image.open(path)
        if decode:
            image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(f" {str(path)!r}", "")
        raise UserError(f"{path}: cannot be read as an image ({reason})") from error


def read_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """An image resized to `size` (height, width), bilinear with antialiasing. uint8 [H,W,3]."""
    with opened(path) as image:
        resized = image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)
        return np.asarray(resized)


def read_label(path: Path, dataset: str, image: Path | None = None) -> np.ndarray:
    """A label file as train ids at its own resolution. uint8 [H,W], values 0..C-1 or IGNORE.

    UserError where the file is lossy, of another kind than the dataset's labels, holds a value
    that is outside the label map, or differs in size from `image`.
    """
    modes = ("RGB", "RGBA") if dataset == "vkitti2" else ("L", "P")
    with opened(path) as label:
        if label.format != "PNG" or label.mode not in modes:
            found = f"{label.format} of mode {label.mode}"
            raise UserError(f"{path}: found {found}, expected a PNG of mode {' or '.join(modes)}")
        values = np.asarray(label)  # of a palette PNG these are the indices
    if dataset == "vkitti2":
        r, g, b = np.moveaxis(values[..., :3].astype(np.int32), -1, 0)
        values = r << 16 | g << 8 | b
    ids = label_table(dataset)[values]
    if (unknown := ids == UNKNOWN).any():
        value = int(values[unknown][0])
        colour = f"colour ({value >> 16}, {value >> 8 & 255}, {value & 255})"
        raise UserError(
            f"{path}: {colour if dataset == 'vkitti2' else f'id {value}'} is not in the label map "
            f"of {dataset} ({unknown.sum()} such pixels); was the file compressed or recoloured?"
        )
    if image is not None:
        with opened(image, decode=False) as photo:
            if photo.size != ids.shape[::-1]:
                w, h = photo.size
                raise UserError(f"{path}: is {ids.shape[1]}x{ids.shape[0]}, its image {w}x{h}")
    return ids


def resize_label(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour, so that no id is invented. uint8 [h,w] -> [H,W]."""
    return np.asarray(Image.fromarray(ids).resize(size[::-1], Image.Resampling.NEAREST))


# ---- Cache: every file is decoded and resized once ----------------------------------------------
CACHE = Path("data/cache")  # safe to delete at any time


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary neighbour to write to, renamed over `path` at the end: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def cached(
    name: str, files: Sequence[Any], shape: tuple[int, ...], read: Callable[[Any], np.ndarray]
) -> np.ndarray:
    """`read(file)` of every file, as one memory-mapped array. uint8 [N,*shape].

    The cache file's name is a hash of what its content depends on: `name` (which says how the files
    are read), shape, and each file's path, size and time of change. `files` holds paths, or tuples
    of paths. Files are read in parallel threads (Pillow decodes outside Python's global lock).
    """
    stamps = []
    for file in files:
        for path in file if isinstance(file, tuple) else (file,):
            stat = path.stat()
            stamps.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns))
    key = hashlib.sha256(json.dumps([1, name, shape, stamps]).encode()).hexdigest()[:16]
    path = CACHE / f"{name}-{'x'.join(map(str, shape))}-{key}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of processes side by side one builds, the others wait
        with contextlib.suppress(FileNotFoundError, ValueError, EOFError):  # else absent or damaged
            return np.load(path, mmap_mode="r")
        build_cache(path, name, files, shape, read)
    return np.load(path, mmap_mode="r")


def build_cache(
    path: Path, name: str, files: Sequence[Any], shape: tuple[int, ...], read: Callable
) -> None:
    """Writes `cached`'s file; the temporary of a builder that was killed goes first."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        left.unlink()
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), *shape)}
    blocks = [files[start : start + 8] for start in range(0, len(files), 8)]

    def read_block(block: Sequence[Any]) -> np.ndarray:
        return np.ascontiguousarray(np.stack([read(file) for file in block]))

    # Written in order through a file, not a writable map: on a full disk a map dies of SIGBUS.
    with (
        replacing(path) as temporary,
        temporary.open("wb") as out,
        progress(f"caching {name}", len(files)) as advance,
    ):
        np.lib.format.write_array_header_1_0(out, header)
        for block in in_threads(read_block, blocks):  # eight at a time: handing over takes time too
            out.write(block.data)
            advance(len(block))


def in_threads(function: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[Any]:
    """`function` of every item, in order, on all cores, with a few results at most in memory."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque[Future] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > max(8, os.cpu_count() or 1):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, nothing elsewhere. Yields the function that advances it."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    if not console.is_terminal or world()[0] > 0:
        yield lambda steps=1: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(label, total=total)
        yield partial(bar.advance, task)


# ---- The four roles -----------------------------------------------------------------------------
class Truth(NamedTuple):
    """Label maps of the test photos at their own resolution."""

    labels: np.ndarray  # uint8 [N,H,W] train ids, memory-mapped; IGNORE below and right of a map
    shapes: list[tuple[int, int]]  # height and width of each


Role = Literal["source", "target_unlabelled", "target_few", "target_test", "target_train"]


@dataclass(frozen=True)
class Part:
    """The images of one role at the training size, with their labels where the role has them."""

    dataset: str
    names: tuple[str, ...]  # paths below the dataset's folder
    images: np.ndarray  # uint8 [N,H,W,3], memory-mapped
    labels: np.ndarray | None  # uint8 [N,H,W] train ids, memory-mapped
    test_files: tuple[tuple[Path, Path], ...] = ()  # image and label, for the evaluator alone

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def truth(self) -> Truth:
        """Of `test_files`, for the evaluator alone. UserError for a label that cannot be read."""
        shapes = [opened(label, decode=False).size[::-1] for _, label in self.test_files]
        largest = tuple(map(max, zip(*shapes, strict=True)))  # the photos of KITTI differ in size

        def read(pair: tuple[Path, Path]) -> np.ndarray:
            ids = read_label(pair[1], self.dataset, image=pair[0])
            beyond = [(0, most - side) for most, side in zip(largest, ids.shape, strict=True)]
            return np.pad(ids, beyond, constant_values=IGNORE)

        name = f"{self.dataset}-truth-{zlib.crc32(label_table(self.dataset)):08x}"
        return Truth(cached(name, self.test_files, largest, read), shapes)


def dataset_root(data: str | Path, dataset: str) -> Path:
    """The folder of a dataset below `data`; writes the miniature first where `data` is 'mini'."""
    if str(data) == "mini":
        import miniature

        data = Path("data/mini")
        if not miniature.is_current(data):  # in a process of its own: its workers need no torch
            script = [sys.executable, miniature.__file__, "--out", str(data)]
            if subprocess.run(script).returncode:
                raise UserError(f"{data}: the miniature could not be written, see above")
    root = Path(data) / dataset
    if not root.is_dir():
        layout = LAYOUTS[dataset].images.format(part="train", variant="clone")
        raise UserError(f"{root}: no such folder; --data must hold {dataset}/ with {layout}")
    return root


def is_miniature(data: str | Path, dataset: str) -> bool:
    """Whether a dataset is a procedural stand-in, whose numbers are not to be read as real ones."""
    return (dataset_root(data, dataset) / "miniature.json").exists()


def load(args: "Args", role: Role) -> Part:
    """The images of a role, through the cache. `args` are resolved.

    Labels are opened for 'source', 'target_few' and 'target_train' (which is the oracle's alone);
    those of 'target_test' are left to `evaluate`, those of 'target_unlabelled' to nobody.
    """
    benchmark = BENCHMARKS[args.benchmark]
    dataset = benchmark.source if role == "source" else benchmark.target
    if role == "source" and args.init and args.init.is_dir():
        return load_set(args.init, dataset, args.size)
    root = dataset_root(args.data, dataset)
    listing = list_files(dataset, root, "test" if role == "target_test" else "train", args.variants)
    pairs = listing.pairs
    images = [image for image, _ in pairs]
    if role == "target_unlabelled":
        images = sorted(images + listing.unlabelled)
    elif listing.unlabelled or listing.orphans:
        alone, what = listing.unlabelled + listing.orphans, "image without a label"
        what = what if listing.unlabelled else "label without an image"
        raise UserError(f"{alone[0]}: {what} ({len(alone)} such files in {dataset})")
    if role == "target_few":  # evenly spaced, each in the middle of its stretch of the drive
        n, k = len(pairs), args.labelled
        pairs = [pairs[(2 * i + 1) * n // (2 * k)] for i in range(k)]
        images = [image for image, _ in pairs]
    pictures = cached(
        f"{dataset}-image", images, (*args.size, 3), partial(read_image, size=args.size)
    )
    labels = None
    if role in ("source", "target_few", "target_train"):

        def read(pair: tuple[Path, Path]) -> np.ndarray:
            return resize_label(read_label(pair[1], dataset, image=pair[0]), args.size)

        label_map = zlib.crc32(label_table(dataset))
        labels = cached(f"{dataset}-label-{label_map:08x}", pairs, args.size, read)
    names = tuple(image.relative_to(root).as_posix() for image in images)
    tests = tuple(pairs) if role == "target_test" else ()
    return Part(dataset, names, pictures, labels, tests)


def save_set(
    folder: Path, dataset: str, images: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> None:
    """A training set that a method has made of `dataset`, for --init of another method.

    images uint8 [N,H,W,3], labels uint8 [N,H,W] train ids, names: N, of the source images.
    """
    if not len(images) == len(labels) == len(names):
        raise ValueError(f"{len(images)} images, {len(labels)} labels, {len(names)} names")
    digests = {}
    (folder / "set.json").unlink(missing_ok=True)  # until the new one is whole
    for name, array in (("images", images), ("labels", labels)):
        array = np.ascontiguousarray(array, np.uint8)
        digests[name] = hashlib.sha256(array.data).hexdigest()
        with replacing(folder / f"{name}.npy") as temporary, temporary.open("wb") as file:
            np.save(file, array)
    write_json(folder / "set.json", {"dataset": dataset, **digests, "names": list(names)})


def load_set(folder: Path, dataset: str, size: Sequence[int]) -> Part:
    """What `save_set` wrote; UserError where it is of another dataset or size, or is none."""
    try:
        record = json.loads((folder / "set.json").read_text())
        images, labels = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("images", "labels"))
        found = record["dataset"], images.shape, labels.shape, len(record["names"])
    except (OSError, ValueError, KeyError, EOFError, TypeError) as error:
        raise UserError(f"{folder}: not a training set that a method wrote ({error})") from error
    shape = (len(images), *size)
    if found != (dataset, (*shape, 3), shape, len(images)):
        what = f"{found[0]} at {'x'.join(map(str, images.shape[1:3]))}"
        raise UserError(f"{folder}: holds {what}, expected {dataset} at {size[0]}x{size[1]}")
    return Part(dataset, tuple(record["names"]), images, labels)


# ---- Batches and augmentation -------------------------------------------------------------------
class Batch(NamedTuple):
    """Images with their labels (None where the role has none) and their places in the part."""

    images: Tensor  # [B,3,H,W] float in [0,1]
    labels: Tensor | None  # [B,H,W] int64
    index: np.ndarray  # [B]


class Batches:
    """Endless shuffled batches of a part. `batches(step)` depends on (seed, step) and nothing else,
    so a resumed run sees what an uninterrupted one would. For a GPU the next step's batch is read
    meanwhile.

    wait: seconds that the last call waited for its data.
    """

    def __init__(
        self, part: Part, batch_size: int, seed: int | tuple[int, ...], device: torch.device
    ) -> None:
        self.part, self.batch_size, self.device = part, batch_size, device
        self.seed = seed if isinstance(seed, tuple) else (seed,)
        self.wait = 0.0
        self._reader = ThreadPoolExecutor(1)
        self._ahead: dict[int, Future] = {}
        self._order = lru_cache(maxsize=2)(self._shuffled)

    def _shuffled(self, epoch: int) -> np.ndarray:
        first, *rest = self.seed
        return np.random.default_rng([first, epoch, *rest]).permutation(len(self.part))

    def _read(self, step: int) -> tuple[Tensor, Tensor | None, np.ndarray]:
        places = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, offsets = np.divmod(places, len(self.part))
        index = np.array([self._order(int(e))[o] for e, o in zip(epochs, offsets, strict=True)])
        # Here and not in `send`, so that the reading thread does it.
        pin = torch.Tensor.pin_memory if self.device.type == "cuda" else torch.Tensor.contiguous
        images = pin(torch.from_numpy(self.part.images[index]))
        labels = None if self.part.labels is None else torch.from_numpy(self.part.labels[index])
        return images, None if labels is None else pin(labels), index

    def __call__(self, step: int) -> Batch:
        start = time.perf_counter()
        if self.device.type == "cpu":  # which has no time to spare for a thread: it reads at once
            images, labels, index = self._read(step)
        else:
            future = self._ahead.pop(step, None) or self._reader.submit(self._read, step)
            self._ahead = {step + 1: self._reader.submit(self._read, step + 1)}
            images, labels, index = future.result()
        self.wait = time.perf_counter() - start
        images = send(images, self.device).permute(0, 3, 1, 2) / 255
        if labels is not None:
            labels = send(labels, self.device).long()
        return Batch(images, labels, index)


def send(x: Tensor, device: torch.device) -> Tensor:
    """From the CPU to the device, behind what it still has to do: nobody waits, since the memory is
    pinned. Not for the way back, where the host would read what has not arrived."""
    x = x.pin_memory() if device.type == "cuda" else x
    return x.to(device, non_blocking=True)


def generator(*seeds: int) -> torch.Generator:
    """A CPU generator for these numbers, (seed, step) say: the same draws on every device."""
    state = np.random.SeedSequence(seeds).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state))


def uniform(batch: int, low: float, high: float, rng: torch.Generator) -> Tensor:
    """One draw an image, shaped to broadcast over it. [B,1,1,1], on the CPU."""
    return torch.rand(batch, 1, 1, 1, generator=rng) * (high - low) + low


def crop_flip(
    images: Tensor, labels: Tensor | None, rng: torch.Generator, zoom: float = 1.5
) -> tuple[Tensor, Tensor | None]:
    """A random part of each image, 1/zoom to 1 of its sides, at the full size again; half flipped.

    images [B,3,H,W] are resampled bilinearly, labels [B,H,W] by nearest neighbour, by the same map.
    """
    batch = len(images)
    scale = 1 / (1 + torch.rand(batch, generator=rng) * (zoom - 1))  # [B] share of the sides kept
    shift = (torch.rand(batch, 2, generator=rng) * 2 - 1) * (1 - scale)[:, None]  # in half sides
    flip = torch.where(torch.rand(batch, generator=rng) < 0.5, -1.0, 1.0)
    theta = torch.zeros(batch, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = flip * scale, scale, shift
    grid = F.affine_grid(send(theta, images.device), images.shape, align_corners=False)  # [B,H,W,2]
    sample = partial(F.grid_sample, grid=grid, padding_mode="border", align_corners=False)
    images = sample(images).contiguous(memory_format=torch.channels_last)
    if labels is not None:
        labels = sample(labels[:, None].float(), mode="nearest")[:, 0].long()
    return images, labels


def original(images: Tensor, rng: torch.Generator) -> Tensor:
    return images


def blur(images: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian, sigma 0.2 to 2 px. images [B,3,H,W]."""
    sigma = uniform(len(images), 0.2, 2.0, rng)  # [B,1,1,1]
    kernel = (-(torch.arange(-4, 5) ** 2) / (2 * sigma**2)).softmax(dim=-1)  # [B,1,1,9], sums to 1
    kernel = send(kernel.repeat_interleave(3, dim=0), images.device)  # [B*3,1,1,9]
    planes = F.pad(images, (4, 4, 4, 4), mode="reflect").flatten(0, 1)[None]  # [1,B*3,H+8,W+8]
    planes = F.conv2d(planes, kernel, groups=len(kernel))
    return F.conv2d(planes, kernel.mT, groups=len(kernel)).view_as(images)


def colorjitter(images: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness, contrast, saturation by a factor of 0.5 to 1.5, hue by up to a tenth of a turn.

    All four are affine in RGB, so each image gets one 3x3 matrix and one offset. images [B,3,H,W].
    """
    draw = partial(uniform, len(images), rng=rng)
    brightness, contrast, saturation = draw(0.5, 1.5), draw(0.5, 1.5), draw(0.5, 1.5)
    angle = draw(-0.2 * torch.pi, 0.2 * torch.pi)[:, 0]  # [B,1,1]
    # Hue: rotation about the grey axis (Rodrigues), cos I + (1 - cos) 1/3 + sin [axis]_x.
    eye, third = torch.eye(3), torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    hue = angle.cos() * eye + (1 - angle.cos()) * third + angle.sin() * cross  # [B,3,3]
    grey = torch.tensor([0.299, 0.587, 0.114]).expand(3, 3)  # luma of Rec. 601, in every row
    matrix = brightness[:, 0] * hue @ torch.lerp(grey, eye, saturation[:, 0])
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    parts = (matrix * contrast[:, 0], brightness)
    matrix, brightness = (send(part, images.device) for part in parts)
    flat = matrix @ (images - mean).flatten(2)  # [B,3,HW]
    return (flat.view_as(images) + brightness * mean).clamp(0, 1)


def rgbshift(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each channel moved by up to 0.2 of the full range. images [B,3,H,W]."""
    shift = torch.cat([uniform(len(images), -0.2, 0.2, rng) for _ in range(3)], dim=1)
    return (images + send(shift, images.device)).clamp(0, 1)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "original": original,
    "blur": blur,
    "colorjitter": colorjitter,
    "rgbshift": rgbshift,
}


def random_augmentation(images: Tensor, rng: torch.Generator) -> Tensor:
    """One of AUGMENTATIONS for each image, all equally likely. images [B,3,H,W]."""
    choice = torch.randint(len(AUGMENTATIONS), (len(images),), generator=rng)  # on the CPU: no sync
    images = images.clone()
    for k, augment in enumerate(AUGMENTATIONS.values()):
        if (chosen := (choice == k).nonzero()[:, 0]).numel():
            chosen = send(chosen, images.device)
            images[chosen] = augment(images[chosen], rng)
    return images


# ---- Image translation ---------------------------------------------------------------------------
def fourier_transfer(source: Tensor, target: Tensor, beta: float) -> Tensor:
    """Source images with the target's amplitude at low frequencies (FDA).

    source, target [B,3,H,W] -> [B,3,H,W], not clamped. beta: frequencies below it on both axes are
    exchanged, in cycles/px; 0 for none, and above 1/2, the highest that there is, for all.
    """
    h, w = source.shape[2:]
    spectrum, style = torch.fft.rfft2(source), torch.fft.rfft2(target)  # [B,3,H,W//2+1] complex
    # Through |f| the band is symmetric about frequency 0 at even and odd sizes alike, so that the
    # image stays real; a square cut from a shifted spectrum is off by one at even sizes.
    rows = torch.fft.fftfreq(h, device=source.device).abs() < beta
    columns = torch.fft.rfftfreq(w, device=source.device).abs() < beta
    band = rows[:, None] & columns  # FDA's M_beta, [H,W//2+1]
    amplitude = torch.where(band, style.abs(), spectrum.abs())
    mixed = torch.polar(amplitude, spectrum.angle())
    return torch.fft.irfft2(mixed, s=(h, w))


def color_transfer(source: Tensor, target: Tensor) -> Tensor:
    """Source images with the target's mean and covariance of RGB. [B,3,H,W] twice -> [B,3,H,W].

    The linear map is the one that moves colours least (Monge-Kantorovich; Pitie and Kokaram, CVMP
    2007): A = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2 for covariances S and T.
    """

    def moments(images: Tensor) -> tuple[Tensor, Tensor]:
        flat = images.flatten(2)  # [B,3,HW]
        mean = flat.mean(dim=2, keepdim=True)
        covariance = (flat - mean) @ (flat - mean).mT / flat.shape[2]
        return mean, covariance + 1e-5 * torch.eye(3, device=images.device)

    def power(matrix: Tensor, exponent: float) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.clamp(min=1e-8)[:, None] ** exponent @ vectors.mT

    (mean, s), (new_mean, t) = moments(source), moments(target)
    root, inverse = power(s, 0.5), power(s, -0.5)
    matrix = inverse @ power(root @ t @ root, 0.5) @ inverse  # [B,3,3]
    return (matrix @ (source.flatten(2) - mean) + new_mean).view_as(source)


# ---- Networks -----------------------------------------------------------------------------------
def conv(i: int, o: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU; 'same' padding."""
    return nn.Sequential(
        nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(o),
        nn.ReLU(inplace=True),
    )


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Residual(nn.Module):
    """A basic residual block (arXiv:1512.03385v1, fig. 2) of constant width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = conv(width, width)
        self.second = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class Tiny(nn.Module):
    """A U-Net of 0.47 M parameters for two CPU cores: features to stride 16, logits at 4."""

    def __init__(self, num_classes: int, pretrained: bool) -> None:
        super().__init__()
        self.stem = conv(3, 16, stride=2)
        self.down4 = nn.Sequential(conv(16, 32, stride=2), conv(32, 32))
        self.down8 = nn.Sequential(conv(32, 64, stride=2), Residual(64))
        self.down16 = nn.Sequential(conv(64, 96, stride=2), Residual(96))
        self.up8 = conv(96 + 64, 64)
        self.up4 = conv(64 + 32, 48)
        self.head = nn.Conv2d(48, num_classes, 1)

    def forward(self, x: Tensor, aux: bool) -> list[Tensor]:
        x4 = self.down4(self.stem(x))  # [B,32,H/4,W/4]
        x8 = self.down8(x4)  # [B,64,H/8,W/8]
        y = self.down16(x8)  # [B,96,H/16,W/16]
        y = self.up8(torch.cat([upsample(y, x8.shape[2:]), x8], dim=1))
        y = self.up4(torch.cat([upsample(y, x4.shape[2:]), x4], dim=1))
        return [self.head(y)]


class Attention(nn.Module):
    """Weights channels by their global mean: BiSeNet's attention refinement module."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = conv(i, o)
        self.gate = nn.Sequential(nn.Conv2d(o, o, 1, bias=False), nn.BatchNorm2d(o), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.gate(x.mean(dim=(2, 3), keepdim=True))


class BiSeNet(nn.Module):
    """BiSeNet with ResNet-18 (arXiv:1808.00897v1, fig. 2), logits at stride 8."""

    def __init__(self, num_classes: int, pretrained: bool) -> None:
        from torchvision.models import ResNet18_Weights, resnet18

        super().__init__()
        weights = ResNet18_Weights.IMAGENET1K_V1 if pretrained else None
        self.spatial = nn.Sequential(
            conv(3, 64, 7, stride=2),
            conv(64, 64, stride=2),
            conv(64, 64, stride=2),
            conv(64, 128, 1),
        )
        self.context = resnet18(weights=on_disk(weights))
        del self.context.fc
        self.refine16, self.refine32 = Attention(256, 128), Attention(512, 128)
        self.tail = conv(512, 128, 1)  # of the globally pooled features
        self.merge16, self.merge32 = conv(128, 128), conv(128, 128)
        self.fuse = conv(256, 256, 1)
        self.fuse_gate = nn.Sequential(
            nn.Conv2d(256, 64, 1), nn.ReLU(inplace=True), nn.Conv2d(64, 256, 1), nn.Sigmoid()
        )
        self.head = nn.Sequential(conv(256, 256), nn.Conv2d(256, num_classes, 1))
        self.aux16 = nn.Sequential(conv(128, 64), nn.Conv2d(64, num_classes, 1))
        self.aux8 = nn.Sequential(conv(128, 64), nn.Conv2d(64, num_classes, 1))

    def forward(self, x: Tensor, aux: bool) -> list[Tensor]:
        net = self.context
        y = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        x16 = net.layer3(net.layer2(net.layer1(y)))  # [B,256,H/16,W/16]
        x32 = net.layer4(x16)  # [B,512,H/32,W/32]
        tail = self.tail(x32.mean(dim=(2, 3), keepdim=True))  # [B,128,1,1]
        y16 = self.merge32(upsample(self.refine32(x32) + tail, x16.shape[2:]))
        spatial = self.spatial(x)  # [B,128,H/8,W/8]
        y8 = self.merge16(upsample(self.refine16(x16) + y16, spatial.shape[2:]))
        fused = self.fuse(torch.cat([spatial, y8], dim=1))
        fused = fused + fused * self.fuse_gate(fused.mean(dim=(2, 3), keepdim=True))
        return [self.head(fused), *([self.aux8(y8), self.aux16(y16)] if aux else [])]


class Torchvision(nn.Module):
    """torchvision's LR-ASPP with MobileNetV3-Large (arXiv:1905.02244v5, sec. 6.4), or its DeepLabV3
    with ResNet-101 (arXiv:1706.05587v3), which has an auxiliary head."""

    def __init__(self, name: str, num_classes: int, pretrained: bool) -> None:
        from torchvision import models
        from torchvision.models.segmentation import deeplabv3_resnet101, lraspp_mobilenet_v3_large

        super().__init__()
        if name == "lraspp":
            weights = models.MobileNet_V3_Large_Weights.IMAGENET1K_V1 if pretrained else None
            make, extra = lraspp_mobilenet_v3_large, {}
        else:
            weights = models.ResNet101_Weights.IMAGENET1K_V1 if pretrained else None
            make, extra = deeplabv3_resnet101, {"aux_loss": True}
        backbone = on_disk(weights)
        self.net = make(weights=None, weights_backbone=backbone, num_classes=num_classes, **extra)

    def forward(self, x: Tensor, aux: bool) -> list[Tensor]:
        features = self.net.backbone(x)
        if not hasattr(self.net, "aux_classifier"):
            return [self.net.classifier(features)]
        logits = [self.net.classifier(features["out"])]
        return logits + ([self.net.aux_classifier(features["aux"])] if aux else [])


NETWORKS = {
    "tiny": Tiny,
    "bisenet": BiSeNet,
    "lraspp": partial(Torchvision, "lraspp"),
    "deeplab": partial(Torchvision, "deeplab"),
}
STRIDE = 32  # of the deepest features: sides of the training size are multiples of it


def on_disk(weights: Any) -> Any:
    """torchvision weights whose file is in place already; UserError that says where to put it."""
    if weights is not None:
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
        if not file.exists():
            raise UserError(f"--pretrained: no {file}; download it from {weights.url}")
    return weights


class Network(nn.Module):
    """A segmentation network. images [B,3,H,W] in [0,1] -> logits [B,C,H,W].

    With `aux=True` a list: the logits, then those of the auxiliary heads, if it has any.
    """

    def __init__(self, name: str, num_classes: int, pretrained: bool = False) -> None:
        super().__init__()
        self.name, self.num_classes = name, num_classes
        self.body = NETWORKS[name](num_classes, pretrained)
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, aux: bool = False) -> Any:
        outputs = self.body((images - self.mean) / self.std, aux)
        outputs = [upsample(output, images.shape[2:]).float() for output in outputs]
        return outputs if aux else outputs[0]


# ---- Several processes (torchrun) ---------------------------------------------------------------
# Every process runs the same program on the same global batches with the same random numbers. Only
# a spread network shares the work: each process computes its part of the batch, the outputs are
# gathered, and the gradients of the weights are summed. So a method's loop and losses are written
# once, and what is not spread (a teacher, say) is merely computed everywhere.
def world() -> tuple[int, int]:
    """Rank of this process and how many there are: 0, 1 outside torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_world(device: str) -> str:
    """Joins the other processes of torchrun, if any. -> this process's device."""
    many = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "LOCAL_RANK" in os.environ
    if many and not dist.is_initialized():
        cuda = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
        if cuda and (":" in device or int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count()):
            cards = f"{torch.cuda.device_count()} cards here"
            raise UserError(f"--device {device}: under torchrun, a card for each process; {cards}")
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
        atexit.register(dist.destroy_process_group)
    if world()[1] > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """What rank 0 does inside is done before the others begin with it."""
    rank, size = world()
    if size > 1 and rank > 0:
        dist.barrier()
    yield
    if size > 1 and rank == 0:
        dist.barrier()


def anywhere(flag: bool) -> bool:
    """Whether it is so in any of the processes."""
    if world()[1] == 1:
        return flag
    total = torch.tensor(float(flag))
    dist.all_reduce(total)
    return bool(total > 0)


class Gathered(torch.autograd.Function):
    """[b,...] of every process -> [B,...] in the order of the ranks. As every process goes on with
    the same computation on the whole, its gradient here is the whole one: it keeps its part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor) -> Tensor:
        parts = [torch.empty_like(part) for _ in range(world()[1])]
        dist.all_gather(parts, part.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        rank, size = world()
        return gradient.chunk(size)[rank]


class Summed(torch.autograd.Function):
    """The sum over processes, and the sum of the gradients on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Summed.apply(gradient)


class SyncedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation by the mean and variance of the whole batch, on CPUs too."""

    sliced = False  # whether this forward pass sees a part of the batch alone

    def forward(self, x: Tensor) -> Tensor:
        if not (self.sliced and self.training):
            return super().forward(x)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        count = x.numel() / x.shape[1] * world()[1]
        mean = Summed.apply(wide.sum(dim=(0, 2, 3))) / count  # [C]
        centred = wide - mean[:, None, None]
        variance = Summed.apply(centred.square().sum(dim=(0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked
            self.running_mean.lerp_(mean, rate)
            self.running_var.lerp_(variance * count / max(1, count - 1), rate)
        scale = (self.weight * (variance + self.eps).rsqrt())[:, None, None]
        return (centred * scale + self.bias[:, None, None]).to(x.dtype)


def take_part(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Before a spread module's forward pass: its share of every tensor's first dimension."""
    rank, size = world()
    tensors = [a for a in args if isinstance(a, Tensor)]
    module.sliced = module.training and torch.is_grad_enabled() and len(tensors[0]) % size == 0
    for norm in module.modules():
        if isinstance(norm, SyncedBatchNorm):
            norm.sliced = module.sliced
    if not module.sliced:
        return None
    for weight in module.parameters():
        if weight.requires_grad and not getattr(weight, "is_summed", False):
            weight.is_summed = True
            weight.register_hook(lambda gradient: Summed.apply(gradient))
    return tuple(a.chunk(size)[rank] if isinstance(a, Tensor) else a for a in args)


def give_whole(module: nn.Module, args: tuple[Any, ...], outputs: Any) -> Any:
    """After it: the outputs of all processes."""
    if not module.sliced:
        return None
    if isinstance(outputs, Tensor):
        return Gathered.apply(outputs)
    return [Gathered.apply(output) for output in outputs]


def spread(module: nn.Module) -> nn.Module:
    """Shares `module`'s training between the processes of torchrun; alone it stays as it is. Its
    inputs and outputs (one, or a list) are tensors whose first dimension is the batch's."""
    if world()[1] > 1:
        for norm in module.modules():
            if type(norm) is nn.BatchNorm2d:
                norm.__class__ = SyncedBatchNorm
        module.register_forward_pre_hook(take_part)
        module.register_forward_hook(give_whole)
    return module


# ---- Metrics ------------------------------------------------------------------------------------
def confusion_matrices(prediction: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Rows truth, columns prediction, ignored pixels left out. [B,H,W] twice -> int64 [B,C,C]."""
    batch, c, lanes = len(labels), num_classes, 4
    # Every (image, truth, prediction) has a cell; one more row of truth takes the ignored pixels.
    # Neighbours count in lanes of their own: adding to one cell again and again waits for itself.
    lane = np.add.outer(lanes * np.arange(batch), np.arange(labels.shape[2]) % lanes)  # [B,W]
    offset = torch.from_numpy((lane * (c + 1)).astype(np.int32))[:, None]  # [B,1,W]
    offset = send(offset, labels.device)
    cells = labels.to(torch.int32, copy=True).clamp_(max=c).add_(offset).mul_(c)
    cells = cells.add_(prediction.to(torch.int32)).view(-1)
    # Not bincount, which on CUDA waits for the largest of the cells.
    counts = torch.zeros(batch * lanes * (c + 1) * c, dtype=torch.int64, device=labels.device)
    counts.index_add_(0, cells, counts.new_ones(()).expand(len(cells)))
    return counts.view(batch, lanes, c + 1, c).sum(dim=1)[:, :c]


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union of each class in %, NaN where the truth has none. [C,C] -> [C]."""
    hit, truth = confusion.diagonal(), confusion.sum(axis=1)
    union = truth + confusion.sum(axis=0) - hit
    return np.where(truth > 0, 100 * (hit / np.maximum(union, 1)), np.nan)


def scores(confusion: np.ndarray) -> dict[str, float]:
    """mIoU, aAcc and mAcc in percent, means over the classes that the truth has. [C,C] -> dict."""
    hit, truth = confusion.diagonal(), confusion.sum(axis=1)
    present = truth > 0
    return {
        "mIoU": float(iou(confusion)[present].mean()),
        "aAcc": float(100 * hit.sum() / truth.sum()),
        "mAcc": float(100 * (hit[present] / truth[present]).mean()),
    }


def class_weights(counts: np.ndarray, smooth: float, classes: Sequence[str]) -> np.ndarray:
    """Weights of mean 1, greater for rarer classes. counts of pixels [C] -> [C].

    w_c = 1 / (n_c + smooth * sum n), then scaled. UserError where that divides by zero.
    """
    smoothed = counts + smooth * counts.sum()
    if (smoothed <= 0).any():
        name = classes[int(smoothed.argmin())]
        raise UserError(f"class {name} has no pixel, so its weight needs --smooth above 0")
    return len(counts) / smoothed / (1 / smoothed).sum()


def to_tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """Cached images, uint8 [B,H,W,3] -> float [B,3,H,W] in [0,1], channels last in memory."""
    images = images if images.flags.writeable else images.copy()  # torch shares no read-only memory
    return send(torch.from_numpy(images), device).permute(0, 3, 1, 2) / 255


@torch.inference_mode()
def predict(net: nn.Module, images: np.ndarray, device: torch.device, amp: bool = False) -> Tensor:
    """Logits of cached images, uint8 [B,H,W,3] -> float [B,C,H,W] on the device."""
    x = to_tensor(images, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp and device.type == "cuda"):
        return net(x)


def between(count: int, n: int) -> tuple[Tensor, Tensor]:
    """For each of `count` pixels in a row the two of n that bilinear interpolation mixes, and their
    weights (pixel centres at halves, as `upsample` has them). [2,count] each."""
    place = ((torch.arange(count) + 0.5) * (n / count) - 0.5).clamp(min=0)
    first = place.long()
    second = (first + 1).clamp(max=n - 1)
    return torch.stack([first, second]), torch.stack([1 - (place - first), place - first])


def label_maps(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """The class of the largest logit after upsampling. [B,C,h,w] -> uint8 [B,H,W] of `size`.

    Equal to `upsample(logits, size).argmax(dim=1)` but for rounding, without the large logits:
    where four neighbours agree about the class, so does every mean of them, and only the pixels
    between others, a few in a hundred of a trained network's, are interpolated.
    """
    (h, w), mixed = logits.shape[2:], 255
    # max is far faster than argmax on the CPU. Of four neighbours the first is at the same place.
    own = F.pad(logits.max(dim=1).indices.float(), (0, 1, 0, 1), mode="replicate").byte()
    first, right, below, last = own[:, :-1, :-1], own[:, :-1, 1:], own[:, 1:, :-1], own[:, 1:, 1:]
    known = torch.where((first == right) & (first == below) & (first == last), first, mixed)
    axes = [between(*sides) for sides in zip(size, (h, w), strict=True)]
    (rows, down), (columns, across) = ([send(t, logits.device) for t in axis] for axis in axes)
    maps = known.index_select(1, rows[0]).index_select(2, columns[0])  # [B,H,W]
    pixels = logits.permute(0, 2, 3, 1).flatten(1, 2).float()  # [B,h*w,C]
    for found, own in zip(maps, pixels, strict=True):  # one at a time: a bad network's are many
        i, j = (found == mixed).nonzero().T.contiguous()  # [P] each
        corners = rows[:, None, i] * w + columns[:, j]  # [2,2,P]
        weights = down[:, None, i] * across[:, j]
        corners, weights = (t.flatten(0, 1).T for t in (corners, weights))  # [P,4]
        means = F.embedding_bag(corners, own, per_sample_weights=weights, mode="sum")  # [P,C]
        found[i, j] = means.max(dim=1).indices.byte()
    return maps


@torch.inference_mode()
def evaluate(
    net: nn.Module, part: Part, device: torch.device, amp: bool = False, batch_size: int = 16
) -> np.ndarray:
    """Confusion matrix of every test image, at the resolution of its label. int64 [N,C,C].

    This alone opens the labels of the test set. The network is left in the mode it came in.
    """
    classes, training, (rank, size) = len(classes_of(part.dataset)), net.training, world()
    matrices = torch.zeros(len(part), classes, classes, dtype=torch.int64, device=device)
    net.eval()
    for start in range(rank, len(part), size * batch_size):
        places = slice(start, start + size * batch_size, size)
        logits = predict(net, part.images[places], device, amp)
        truth = send(torch.from_numpy(np.array(part.truth.labels[places])), device)
        guess, shapes = torch.zeros_like(truth), part.truth.shapes[places]
        first = 0
        for (h, w), alike in itertools.groupby(shapes):  # neighbours of one size together
            some = slice(first, first := first + len(list(alike)))
            guess[some, :h, :w] = label_maps(logits[some], (h, w))
        matrices[places] = confusion_matrices(guess, truth, classes)
    net.train(training)
    if size > 1:
        dist.all_reduce(matrices)
    return matrices.cpu().numpy()


# ---- The flags that every method shares ---------------------------------------------------------
class Preset(NamedTuple):
    """Defaults that go with the data at hand."""

    size: tuple[int, int]
    batch_size: int
    steps: int
    net: str
    lr: float


PRESETS = {
    "miniature": Preset((64, 128), 16, 400, "tiny", 5e-3),  # for sources less than 512 px wide
    "vkitti2kitti": Preset((256, 512), 16, 20_000, "bisenet", 1e-3),
    "gta52cityscapes": Preset((512, 1024), 8, 40_000, "bisenet", 1e-3),
}


@dataclass(frozen=True)
class Args:
    benchmark: Literal["vkitti2kitti", "gta52cityscapes"] = "vkitti2kitti"
    """Source and target: Virtual KITTI 2 to KITTI (10 classes), GTA5 to Cityscapes (19 classes)."""
    data: str = "mini"
    """Folder that holds vkitti2/, kitti/, gta5/, cityscapes/ (those of the benchmark); 'mini' is
    the procedural miniature, written under data/mini where it is not there yet."""
    out: Path | None = None
    """Run folder. Default: runs/BENCHMARK/METHOD/seedSEED."""
    seed: int = 0
    """Of weights, batch order and augmentation. The data splits never depend on it."""
    steps: int | None = None
    """Updates of the segmentation network. Default: 400 for the miniature, 20,000 for vkitti2kitti,
    40,000 for gta52cityscapes."""
    batch_size: int | None = None
    """Images an update. Default: 16; 8 for gta52cityscapes."""
    size: tuple[int, int] | None = None
    """Height and width of the training images in pixels, multiples of 32. Default: 64 128 for the
    miniature, 256 512 for vkitti2kitti, 512 1024 for gta52cityscapes."""
    net: Literal["tiny", "bisenet", "lraspp", "deeplab"] | None = None
    """Segmentation network. Default: tiny for the miniature, else bisenet."""
    lr: float | None = None
    """Initial learning rate of AdamW. Default: 0.005 for the miniature, else 0.001."""
    pretrained: bool = False
    """Start the network's backbone from torchvision's ImageNet weights; nothing is downloaded, the
    error says where to put the file."""
    labelled: int = 16
    """Labelled target photos that a method may use, evenly spaced in the target's training part."""
    variants: tuple[str, ...] = ("clone",)
    """VKITTI2's weather and camera variants to train on: clone fog morning overcast rain sunset
    15-deg-left ..."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1."""
    amp: bool = True
    """bfloat16 autocast, on CUDA only."""
    compile: bool = False
    """torch.compile of the segmentation network."""
    init: Path | None = None
    """A checkpoint: start from its network instead of training one on the source. Or the folder
    set/ that datarater, metasim or diffusion_bridge wrote: train on it in the source's place."""
    resume: bool = True
    """Go on with the run folder where it was cut off; a finished run is not repeated. With
    --no-resume, or with other arguments, the old folder is moved aside to OUT.old."""

    @property
    def checkpoint(self) -> Path | None:
        """--init, where it is not a folder with a training set."""
        return None if self.init is None or self.init.is_dir() else self.init


def resolve(args: Any, method: str) -> Any:
    """The arguments with every default filled in and checked; UserError for what cannot run."""
    benchmark = BENCHMARKS[args.benchmark]
    source, target = (dataset_root(args.data, d) for d in (benchmark.source, benchmark.target))
    files = list_files(benchmark.source, source, "train", args.variants)
    photos = list_files(benchmark.target, target, "train", ())
    available = len(photos.pairs)
    if not 1 <= args.labelled <= available:
        has = f"the target has {available} training photos"
        raise UserError(f"--labelled {args.labelled}: {has}, expected 1 to {available}")
    with opened((files.pairs[:1] or [files.unlabelled])[0][0], decode=False) as image:
        preset = PRESETS["miniature" if image.width < 512 else args.benchmark]
    missing = {k: v for k, v in preset._asdict().items() if getattr(args, k) is None}
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    out = args.out or Path("runs") / args.benchmark / method / f"seed{args.seed}"
    args = replace(args, **missing, device=device, out=out)
    if any(side < STRIDE or side % STRIDE for side in args.size):
        raise UserError(f"--size {args.size[0]} {args.size[1]}: expected multiples of {STRIDE}")
    if not 0 < args.lr < math.inf:
        raise UserError(f"--lr {args.lr}: expected a number above 0")
    if args.pretrained and args.net == "tiny":
        raise UserError("--pretrained: there are no ImageNet weights of tiny")
    for flag, least in (("steps", 1), ("batch_size", 2), ("seed", 0)):
        if getattr(args, flag) < least:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: at least {least}")
    if args.init and args.init.is_dir():
        load_set(args.init, benchmark.source, args.size)
    if args.batch_size % world()[1]:
        raise UserError(f"--batch-size {args.batch_size}: not a multiple of {world()[1]} processes")
    check_device(args.device)
    return args


def check_device(device: str) -> None:
    try:
        if device != "auto":
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).splitlines()[0]
        raise UserError(f"--device {device}: not available here ({first[:60]})") from error


# ---- Run folder ---------------------------------------------------------------------------------
@dataclass
class Result:
    """A row of the table, as result.json and results.json hold it. IoUs in percent."""

    benchmark: str
    method: str
    seed: int
    status: str = "finished"  # or 'failed'
    error: str | None = None
    miou: float | None = None
    iou: dict[str, float | None] | None = None  # None: no test photo contains the class
    target_labels: int | None = None
    steps: int | None = None  # updates of the segmentation network
    seconds: float | None = None
    peak_memory_mb: float | None = None
    device: str | None = None
    commit: str | None = None
    versions: dict[str, str] | None = None
    beside: str = ""  # what the method spent besides the updates of the network


def write_json(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n")


def locked(path: Path) -> Any:
    """An open file that this process alone holds until it is closed; UserError where it is held."""
    file = path.open("w")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system frees it if the process dies
    except OSError:
        raise UserError(f"{path.parent}: another process is at work in this folder") from None
    return file


def commit() -> str:
    """The commit of this code, '-dirty' where files differ from it; 'unknown' outside git."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: of the card on CUDA, else resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, loaded without running code of the file; UserError for others."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such checkpoint") from None
    except Exception as error:  # a damaged file makes torch raise whatever it stumbles over
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: not a checkpoint, or a damaged one ({first[:80]})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != "sim2real-1":
        raise UserError(f"{path}: not a checkpoint of this project")
    return checkpoint


def load_weights(net: Network, path: Path) -> None:
    """The segmentation network of a checkpoint into `net`; UserError where it is another."""
    checkpoint = read_checkpoint(path)
    found, expected = tuple(checkpoint["network"]), (net.name, net.num_classes)
    if found != expected:
        raise UserError(
            "{}: holds {} of {} classes, expected {} of {}".format(path, *found, *expected)
        )
    if checkpoint["net"] is None:
        raise UserError(f"{path}: holds no segmentation network yet")
    net.load_state_dict(checkpoint["net"])


class Run:
    """One run folder: arguments, scalars, checkpoint, result. A method's skeleton is

        run = common.Run(args, "my_method")
        if run.result:  # finished earlier, with the same arguments
            return run.result
        net = run.network()
        for step in run.steps("train", 400, net=net, optimizer=optimizer):
            ...
            run.log(step, loss=loss, lr=lr)
        return run.finish(net, target_labels=0)

    args: the resolved arguments; device: where to compute; classes: names by train id.
    """

    def __init__(self, args: Any, method: str) -> None:
        args = replace(args, device=join_world(args.device))
        with first_rank_first():  # it writes the miniature
            self.args = args = resolve(args, method)
        self.method, self.device, self.out = method, torch.device(args.device), args.out
        self.classes = BENCHMARKS[args.benchmark].classes
        self.result = finished(args, method)
        if self.result:
            if world()[0] == 0:
                print(f"{self.out}: finished earlier, with these arguments", flush=True)
            return
        if args.checkpoint:  # one that will not do must cost no old run its folder
            load_weights(Network(args.net, len(self.classes)), args.checkpoint)
        with first_rank_first():
            if world()[0] == 0:
                self._prepare_folder()
        self._started, self._commit = time.perf_counter(), commit()
        self._stages: dict[str, dict[str, Any]] = {}  # of finished stages, to restore
        self.entered: list[str] = []  # names of the stages so far
        self._inside = False  # a stage
        self._before = 0  # steps of the stages before this one
        path, scalars = self.out / "checkpoint.pt", self.out / "scalars.json"
        try:
            self._found = read_checkpoint(path) if path.exists() else {}  # of an earlier process
        except UserError as error:
            raise UserError(f"{error}; delete {self.out} to start anew") from error
        if world()[0] > 0:  # what this process writes is nobody's: rank 0 writes the same
            self.out = Path(tempfile.mkdtemp(prefix="rank"))
            atexit.register(shutil.rmtree, self.out, ignore_errors=True)
            scalars, self._lock = self.out / "scalars.json", locked(self.out / ".lock")
        self._seconds_before = self._found.get("seconds", 0.0)
        self._pending: list[tuple[int, dict[str, Any]]] = self._found.get("pending", [])
        scalars.touch()  # what came after the checkpoint recurs
        os.truncate(scalars, min(scalars.stat().st_size, self._found.get("scalars_bytes", 0)))
        anywhere(False)  # all have read what rank 0 is about to replace
        torch.manual_seed(args.seed)  # initial weights, dropout
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def _prepare_folder(self) -> None:
        """A folder of this configuration, old or new; one with another is moved aside."""
        config, old = configuration(self.args, self.method), read_config(self.out)
        entries = self.out.iterdir() if self.out.exists() else ()
        if old is None and any(p.suffix not in (".tmp", ".lock") for p in entries):
            raise UserError(f"{self.out}: not empty and not a run folder; give another --out")
        self.out.mkdir(parents=True, exist_ok=True)
        self._lock = locked(self.out / ".lock")
        over = (self.out / "result.json").exists()  # and not to be reused: see `finished`
        if old and (over or not self.args.resume or not trains_alike(old, config)):
            move_aside(self.out)
            self.out.mkdir()
            self._lock = locked(self.out / ".lock")
        write_json(self.out / "config.json", config)

    # Training ................................................................................
    def network(self) -> Network:
        """A new segmentation network on the device, with the weights of --init where given."""
        net = Network(self.args.net, len(self.classes), self.args.pretrained)
        if self.args.checkpoint:
            load_weights(net, self.args.checkpoint)
        net.to(self.device, memory_format=torch.channels_last, non_blocking=True)
        if self.args.compile:
            net.compile()
        spread(net.body)
        return net

    def autocast(self) -> torch.autocast:
        on = self.args.amp and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=on)

    def steps(self, stage: str, total: int, **state: Any) -> Iterator[int]:
        """Yields 1..total, less what an earlier process did: `state` is then restored first.

        `state` names everything that the stage changes (anything with a state_dict); the network
        under the key 'net' is what --init reads. It is saved ten times a stage, every two minutes
        and on Ctrl-C or SIGTERM, which let the step end and then raise KeyboardInterrupt.
        """
        if stage in self.entered or self._inside:
            raise ValueError(f"stage {stage!r} begins a second time, or inside another stage")
        self.entered.append(stage)
        self._inside = True
        done, saved, stop = self._restore(stage, state), time.monotonic(), []
        if 0 < done < total and world()[0] == 0:
            print(f"{stage}: goes on after step {done} of {total}", file=sys.stderr)

        def on_signal(number: int, frame: Any) -> None:
            stop.append(number)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a second one is at once

        old = {}
        if threading.current_thread() is threading.main_thread():
            old = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            with progress(stage, total) as advance:
                advance(done)
                for step in range(done + 1, total + 1):
                    yield step
                    advance()
                    if step == total:
                        self.flush()  # no line mixes two stages
                    due = step % max(1, total // 10) == 0 or time.monotonic() - saved > 120
                    stopping = anywhere(bool(stop))
                    if due or step == total or stopping:
                        self._save(stage, step, total, state)
                        saved = time.monotonic()
                    if stopping:
                        raise KeyboardInterrupt(f"stopped after step {step} of {total} of {stage}")
        finally:
            self._inside = False
            for number, handler in old.items():
                signal.signal(number, handler)
        self._before += total

    def _save(self, stage: str, step: int, total: int, state: dict[str, Any]) -> None:
        self._settle()
        for name, thing in state.items():
            tensors = thing.state_dict().values() if isinstance(thing, nn.Module) else ()
            finite = [t.isfinite().all() for t in tensors if t.is_floating_point()]
            if finite and not torch.stack(finite).all():
                where = f"at step {self._before + step} (stage {stage})"
                raise UserError(f"weights of {name} are not finite {where}; {self._kept()}")
        cuda = self.device.type == "cuda"
        record = {
            "step": step,
            "state": {name: thing.state_dict() for name, thing in state.items()},
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None,
        }
        buffer = self._write_checkpoint({**self._stages, stage: record}, state.get("net"))
        if step == total:  # a copy, since the live tensors go on changing
            saved = torch.load(buffer, map_location="cpu", weights_only=True)
            self._stages[stage] = saved["stages"][stage]

    def _write_checkpoint(self, stages: dict[str, Any], net: nn.Module | None) -> io.BytesIO:
        checkpoint = {
            "format": "sim2real-1",
            "network": [self.args.net, len(self.classes)],
            "net": net.state_dict() if net is not None else None,  # what --init reads
            "stages": stages,
            "seconds": self.seconds(),
            "pending": self._pending,
            "scalars_bytes": (self.out / "scalars.json").stat().st_size,
        }
        buffer = io.BytesIO()  # torch reports a full disk as an internal error, a file as one
        torch.save(checkpoint, buffer)
        with replacing(self.out / "checkpoint.pt") as temporary:
            temporary.write_bytes(buffer.getbuffer())
        buffer.seek(0)
        return buffer

    def _restore(self, stage: str, state: dict[str, Any]) -> int:
        """Puts the saved state of a stage back. -> the step that it was saved after, 0 for none."""
        record = self._found.get("stages", {}).get(stage)
        if record is None:
            return 0
        for name, thing in state.items():
            thing.load_state_dict(record["state"][name])
        torch.set_rng_state(record["rng"])
        if record["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(record["cuda_rng"], self.device)
        self._stages[stage] = record
        return record["step"]

    # Scalars .................................................................................
    def log(self, step: int, **values: Any) -> None:
        """Training scalars of a step: numbers or 0-d tensors, written as means over ten steps.

        A value named *loss* that is not finite ends the run; so that a GPU is not made to wait,
        it is noticed up to ten steps later, and the step that is named is the right one.
        """
        detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in values.items()}
        self._pending.append((self._before + step, detached))
        if len(self._pending) == 10:
            self.flush()

    def flush(self) -> None:
        """Writes the means of what was logged and not written yet."""
        if self._pending:
            self._settle()
            steps, rows = zip(*self._pending, strict=True)
            keys = dict.fromkeys(key for row in rows for key in row)
            columns = {key: [row[key] for row in rows if key in row] for key in keys}
            means = {key: sum(column) / len(column) for key, column in columns.items()}
            memory = peak_memory_mb(self.device)
            self._write({**means, "memory": memory, "iter": steps[-1], "step": steps[-1]})
            self._pending = []

    def _settle(self) -> None:
        """Fetches the logged tensors from the device; UserError at a loss that is not finite."""
        self._pending = [(s, {k: float(v) for k, v in row.items()}) for s, row in self._pending]
        for step, row in self._pending:
            for key, value in row.items():
                if "loss" in key and not math.isfinite(value):
                    raise UserError(f"{key} is {value} at step {step}; {self._kept()}")

    def _write(self, line: dict[str, Any]) -> None:
        with (self.out / "scalars.json").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _kept(self) -> str:
        path = self.out / "checkpoint.pt"
        return f"last good checkpoint: {path if path.exists() else 'none was due yet'}"

    def seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    # Evaluation ..............................................................................
    @cached_property
    def test(self) -> Part:
        return load(self.args, "target_test")

    def evaluate(self, net: nn.Module, step: int) -> np.ndarray:
        """Scores on the test photos into scalars.json: for the curve, no weight ever sees them."""
        self.flush()
        confusion = evaluate(net, self.test, self.device, self.args.amp)
        self._write({**scores(confusion.sum(axis=0)), "step": self._before + step})
        return confusion

    def finish(
        self, net: Network, target_labels: int, steps: int | None = None, beside: str = ""
    ) -> Result:
        """Evaluates the final weights and writes everything.

        steps: updates of `net`, if not --steps; beside: what else was spent ("800 U-Net updates").
        """
        confusion = self.evaluate(net, 0)  # [N,C,C]
        self._write_checkpoint(self._stages, net)
        with replacing(self.out / "confusion.npy") as temporary, temporary.open("wb") as file:
            np.save(file, confusion)
        per_class = iou(confusion.sum(axis=0))
        self.result = Result(
            self.args.benchmark,
            self.method,
            self.args.seed,
            miou=scores(confusion.sum(axis=0))["mIoU"],
            iou={
                c: None if v != v else float(v)
                for c, v in zip(self.classes, per_class, strict=True)
            },
            target_labels=target_labels,
            steps=self.args.steps if steps is None else steps,
            beside=beside,
            seconds=self.seconds(),
            peak_memory_mb=peak_memory_mb(self.device),
            device=torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu",
            commit=self._commit,
            versions={m.__name__: m.__version__ for m in (torch, np)},
        )
        write_csvs(self.out, read_scalars(self.out))
        draw_curves(self.out)
        draw_predictions(self.out / "figures/predictions.png", self.test, {"prediction": net})
        write_json(self.out / "result.json", asdict(self.result))  # from here on it is finished
        self._write_checkpoint({}, net)  # nothing is left to resume
        (self.out / ".lock").unlink()
        self._lock.close()
        if world()[0] == 0:
            print(f"written: {self.out}", flush=True)
        return self.result


def configuration(args: Any, method: str) -> dict[str, Any]:
    """What decides a run's result: its arguments (resolved) and the files that it reads."""
    benchmark, digests = BENCHMARKS[args.benchmark], []
    parts = ((benchmark.source, "train"), (benchmark.target, "train"), (benchmark.target, "test"))
    for dataset, part in parts:
        root = dataset_root(args.data, dataset)
        listing = list_files(dataset, root, part, args.variants)
        files = [*itertools.chain(*listing.pairs), *listing.unlabelled]
        sizes = [(path.relative_to(root).as_posix(), path.stat().st_size) for path in files]
        digests.append(hashlib.sha256(json.dumps(sizes).encode()).hexdigest()[:16])
    config = {"method": method, **asdict(args), "files": digests[:2], "test_files": digests[2]}
    config["device"] = torch.device(args.device).type  # any card of a kind will do
    if args.init and args.init.exists():
        content = args.init / "set.json" if args.init.is_dir() else args.init
        config["init"] = hashlib.sha256(content.read_bytes()).hexdigest()[:16]
    del config["out"], config["resume"]
    return json.loads(json.dumps(config, default=str))


def trains_alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configurations end with the same weights: the test set has no part in them."""
    return {**one, "test_files": ""} == {**other, "test_files": ""}


def read_config(folder: Path) -> dict[str, Any] | None:
    """The configuration of a run folder, None for any other folder."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        config = json.loads((folder / "config.json").read_text())
        return config if isinstance(config, dict) and "method" in config else None
    return None


def move_aside(folder: Path) -> None:
    """Renames a run folder to FOLDER.old, in place of an earlier one of that name."""
    aside = folder.with_name(folder.name + ".old")
    if aside.exists() and read_config(aside) is None:
        raise UserError(f"{aside}: in the way, and not a run folder; give another --out")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    print(f"{folder}: moved to {aside}", flush=True)


def finished(args: Any, method: str) -> Result | None:
    """The result of an earlier run with the same configuration. `args` are resolved."""
    config, path = read_config(args.out), args.out / "result.json"
    if not (args.resume and config and path.exists() and config == configuration(args, method)):
        return None
    with contextlib.suppress(json.JSONDecodeError, TypeError):  # damaged: it is run again
        return Result(**json.loads(path.read_text()))
    return None


def read_scalars(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "scalars.json").read_text().splitlines()
    return [json.loads(line) for line in lines if line]


def write_csvs(folder: Path, lines: list[dict[str, Any]]) -> None:
    """Lines of scalars.json as loss.csv (training lines) and metrics.csv (evaluation lines)."""
    for name, rows in (
        ("loss.csv", [line for line in lines if "mIoU" not in line]),
        ("metrics.csv", [line for line in lines if "mIoU" in line]),
    ):
        columns = list(dict.fromkeys(["step", *(key for row in rows for key in row)]))
        with replacing(folder / name) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


# ---- Figures ------------------------------------------------------------------------------------
def save_figure(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def draw_curves(folder: Path) -> None:
    """Loss and mIoU over steps, figures/curves.png."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    lines, figure = read_scalars(folder), Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, key, unit in ((axes[0], "loss", "nats"), (axes[1], "mIoU", "%")):
        rows = [line for line in lines if key in line]
        axis.plot(
            [row["step"] for row in rows], [row[key] for row in rows], marker="." * (key != "loss")
        )
        axis.set(xlabel="step, all stages together", ylabel=f"{key} ({unit})", ylim=(0, None))
        axis.grid(alpha=0.3)
    save_figure(figure, folder / "figures/curves.png")


def draw_sheet(path: Path, columns: dict[str, list[np.ndarray]], classes: Sequence[str]) -> None:
    """Pictures, uint8 [h,w,3], or label maps [h,w], in titled columns over a legend of classes."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    count = len(next(iter(columns.values())))
    height, width = next(iter(columns.values()))[0].shape[:2]
    inches = max(2.2, 10 / len(columns))
    size = (inches * len(columns), inches * height / width * count * 1.04 + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(count, len(columns), squeeze=False)
    colours = palette(classes)
    for j, (title, pictures) in enumerate(columns.items()):
        axes[0, j].set_title(title, fontsize=9)
        for axis, picture in zip(axes[:, j], pictures, strict=True):
            axis.imshow(colours[picture] if picture.ndim == 2 else picture)
            axis.axis("off")
    handles = [Patch(color=np.array(PALETTE[name]) / 255, label=name) for name in classes]
    maps = [p for pictures in columns.values() for p in pictures if p.ndim == 2]
    if any((p == IGNORE).any() for p in maps):
        handles.append(Patch(color="black", label="ignored"))
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=7, frameon=False)
    save_figure(figure, path)


def draw_predictions(path: Path, part: Part, networks: dict[str, Network], count: int = 4) -> None:
    """Test photos, their ground truth and each network's prediction, in columns."""
    classes = classes_of(part.dataset)
    chosen = np.linspace(0, len(part) - 1, min(count, len(part))).round().astype(int)
    truth = [
        resize_label(read_label(part.test_files[i][1], part.dataset), part.images.shape[1:3])
        for i in chosen
    ]
    columns = {"photo": list(part.images[chosen]), "ground truth": truth}
    for name, net in networks.items():
        training = net.training
        logits = predict(net.eval(), part.images[chosen], next(net.parameters()).device)
        # Where the truth is ignored the prediction does not count either: black in both.
        maps = logits.argmax(dim=1).cpu().numpy().astype(np.uint8)
        columns[name] = [np.where(t == IGNORE, IGNORE, m) for t, m in zip(truth, maps, strict=True)]
        net.train(training)
    draw_sheet(path, columns, classes)


# ---- The supervised recipe ----------------------------------------------------------------------
AUX_WEIGHT = 0.4  # of each auxiliary head's loss


def segmentation_loss(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of the logits plus AUX_WEIGHT times that of each auxiliary head, in nats.

    outputs: [B,C,H,W] each; labels [B,H,W]. The mean is over valid pixels, 0 where there is none.
    """
    valid = (labels != IGNORE).sum().clamp(min=1)
    losses = [
        F.cross_entropy(o, labels, ignore_index=IGNORE, reduction="sum") / valid for o in outputs
    ]
    return losses[0] + AUX_WEIGHT * sum(losses[1:])


def learning_rate(initial: float, step: int, total: int) -> float:
    """Linear warm-up over a twentieth of the steps under polynomial decay of power 0.9."""
    return initial * min(1, step / max(1, total // 20)) * (1 - (step - 1) / total) ** 0.9


def set_rate(optimizer: torch.optim.Optimizer, initial: float, step: int, total: int) -> float:
    """The learning rate of a step, into the optimizer."""
    lr = learning_rate(initial, step, total)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def train(
    run: Run,
    net: Network,
    part: Part,
    steps: int,
    stage: str = "train",
    augment: Callable[[Tensor, torch.Generator], Tensor] = original,
    lr: float | None = None,
    more: bool = False,
    reported: bool = True,
    translate: Callable[[Tensor, torch.Generator], Tensor] = original,
) -> None:
    """The supervised training that all rows share: AdamW, warm-up and decay, zoom and flip.

    `net` is trained in place for `steps` updates on `part`, with its images put through `translate`
    before they are zoomed and flipped, when statistics of whole images mean something, and through
    `augment` after it, from the initial learning rate `lr` (--lr where None). `more`: another stage
    follows, so the curve wants a point at the end of this one, which `Run.finish` adds otherwise.
    A network that is not the one `reported` is not evaluated, and its loss is <stage>_loss.
    """
    args, initial = run.args, lr or run.args.lr
    optimizer = torch.optim.AdamW(net.parameters(), lr=initial, weight_decay=0.01, fused=True)
    nth = len(run.entered)  # each stage draws numbers of its own
    batches = Batches(part, args.batch_size, (args.seed, nth), run.device)
    seconds, waits = [], []  # of each step after the first epoch
    quarter = max(1, steps // 4)
    net.train()
    start = time.perf_counter()
    for step in run.steps(stage, steps, net=net, optimizer=optimizer):
        lr = set_rate(optimizer, initial, step, steps)
        rng = generator(args.seed, step, nth)
        batch = batches(step)
        images, labels = crop_flip(translate(batch.images, rng), batch.labels, rng)
        images = augment(images, rng)
        with run.autocast():
            loss = segmentation_loss(net(images, aux=True), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        # From end to end, since `log` is where the device is waited for.
        took, start = time.perf_counter() - start, time.perf_counter()
        name = "loss" if reported else f"{stage}_loss"
        run.log(step, **{name: loss}, lr=lr, time=took, data_time=batches.wait)
        if step * args.batch_size > len(part):
            seconds.append(took)
            waits.append(batches.wait)
        if reported and ((step % quarter == 0 and step < steps) or (more and step == steps)):
            run.evaluate(net, step)
            start = time.perf_counter()
    if seconds:
        step_ms, wait_ms = 1000 * np.mean(seconds), 1000 * np.mean(waits)
        print(
            f"{stage}: {step_ms:.1f} ms a step, {wait_ms:.2f} ms of it waiting for data", flush=True
        )


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """Teacher = decay * teacher + (1 - decay) * student (arXiv:1703.01780v6), in place, its
    batch normalisation's statistics like its weights."""
    old, new = teacher.state_dict().values(), student.state_dict().values()
    for mine, other in zip(old, new, strict=True):
        if mine.is_floating_point():
            mine.lerp_(other, 1 - decay)


# ---- Command line -------------------------------------------------------------------------------
OUTSIDE = {  # what the file system may say, which is no fault of the code
    errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EPERM, errno.EDQUOT, errno.EFBIG,
    errno.ENOTDIR, errno.EISDIR, errno.ENOENT, errno.EEXIST,
}  # fmt: skip


def main(args_class: type, run: Callable[[Any], Any], doc: str | None) -> None:
    """The command line of a script: one line and exit status 1 for what the user can mend."""
    import tyro

    args = None
    try:
        # By its name alone: a long path before it would make the usage too wide for a terminal.
        script = Path(sys.argv[0]).name
        args = tyro.cli(args_class, prog=script, description=wrapped(doc or ""))
        result = run(args)
        if isinstance(result, Result) and world()[0] == 0:
            found = f"{result.benchmark} {result.method} seed {result.seed}"
            print(f"{found}: mIoU {result.miou:.1f}", flush=True)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as error:
        reason = ": ".join(filter(None, ["interrupted", str(error)]))
        print(f"{reason}; the same command goes on from there", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # `| head` has seen enough; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit("nobody reads the output; the same command goes on from there" if args else 1)
    except OSError as error:
        if error.errno not in OUTSIDE:
            raise
        sys.exit(f"error: {error.filename or 'output'}: {error.strerror}")


def wrapped(doc: str) -> str:
    """A docstring in lines of the terminal's width. tyro joins a line that begins with a letter to
    the one before it, so those that go on begin with a space; commands, indented, it sets apart."""
    width, lines = min(80, shutil.get_terminal_size().columns), []
    for paragraph in doc.strip("\n").split("\n\n"):
        first, more = ("    ", " " * 8) if paragraph.startswith(" ") else ("", " ")
        text = re.sub(r"\s{2,}", "  ", paragraph.strip())
        lines.append(textwrap.fill(text, width, initial_indent=first, subsequent_indent=more,
                                   break_on_hyphens=False))  # fmt: skip
    # tyro itself puts an empty line between two paragraphs of which the second begins with a space.
    return "\n\n".join(lines).replace("\n\n ", "\n ")


@dataclass(frozen=True)
class LookArgs:
    dataset: Literal["vkitti2", "kitti", "gta5", "cityscapes"]
    """Which of the four layouts the folder has."""
    data: str = "mini"
    """The dataset's folder, or one that holds it under the dataset's name, or 'mini'."""
    part: Literal["train", "test"] = "train"
    """Training or test part of a target dataset; a source is all 'train'."""
    variants: tuple[str, ...] = ("clone",)
    """Variants of VKITTI2 to look at."""
    smooth: float = 0.01
    """CLS_SMOOTH of the class weights 1 / (count + smooth * total), scaled to a mean of 1."""
    out: Path = Path("runs/look")
    """Folder for DATASET-PART.csv and DATASET-PART.png."""


def look(args: LookArgs) -> None:
    """Counts pairs, sizes and classes of a dataset; prints a table, writes a CSV and a figure."""
    from rich.console import Console
    from rich.table import Table

    inside = Path(args.data) / args.dataset
    outside = args.data != "mini" and not inside.is_dir()
    root = Path(args.data) if outside else dataset_root(args.data, args.dataset)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    if args.part == "test" and args.dataset in ("vkitti2", "gta5"):
        raise UserError(f"--part test: {args.dataset} is a source, all of it is 'train'")
    listing = list_files(args.dataset, root, args.part, args.variants)
    classes = classes_of(args.dataset)
    if not listing.pairs:
        raise UserError(
            f"{listing.unlabelled[0]}: image without a label, and so are all the others"
        )

    def count(pair: tuple[Path, Path]) -> Any:
        try:
            ids = read_label(pair[1], args.dataset, image=pair[0])
            return ids.shape, np.bincount(ids.ravel(), minlength=256)
        except UserError as error:
            return error

    sizes, pixels, images, bad = Counter(), np.zeros(256, np.int64), np.zeros(256, np.int64), []
    with progress("reading", len(listing.pairs)) as advance:
        for found in in_threads(count, listing.pairs):
            advance()
            if isinstance(found, UserError):
                bad.append(found)
                continue
            sizes[found[0]] += 1
            pixels += found[1]
            images += found[1] > 0
    if len(bad) == len(listing.pairs):
        raise bad[0]
    valid = pixels[: len(classes)]
    weights = class_weights(valid, args.smooth, classes)
    rows = [
        (name, int(valid[c]), valid[c] / max(1, valid.sum()), int(images[c]), weights[c])
        for c, name in enumerate(classes)
    ]
    stem = args.out / f"{args.dataset}-{args.part}"
    with replacing(stem.with_suffix(".csv")) as temporary, temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("class", "pixels", "frequency", "images", "weight"))
        writer.writerows(rows)
    table = Table("class", title=f"{args.dataset} {args.part}")
    for column in ("pixels", "frequency", "images", "weight"):
        table.add_column(column, justify="right")
    for name, number, share, seen, weight in rows:
        table.add_row(name, f"{number:,}", f"{share:.3%}", f"{seen:,}", f"{weight:.3f}")
    console = Console()
    console.print(table)
    console.print(f"pairs: {len(listing.pairs):,}")
    for files, what in (
        (listing.unlabelled, "images without a label"),
        (listing.orphans, "labels without an image"),
    ):
        console.print(f"{what}: {len(files):,}" + (f", first {files[0]}" if files else ""))
    common = ", ".join(f"{w}x{h} ({n:,})" for (h, w), n in sizes.most_common(5))
    console.print(f"sizes: {common}" + (f" and {len(sizes) - 5} others" if len(sizes) > 5 else ""))
    console.print(f"ignored pixels: {pixels[IGNORE] / pixels.sum():.1%}")
    for error in bad[:5]:
        console.print(f"bad: {error}", soft_wrap=True, markup=False)
    if bad:
        raise UserError(f"{root}: {len(bad)} of {len(listing.pairs)} pairs cannot be used")
    draw_look(stem.with_suffix(".png"), listing, args.dataset)
    console.print(f"written: {stem}.csv, {stem}.png")


def draw_look(path: Path, listing: Listing, dataset: str) -> None:
    """Six images, and the same with their labels laid over them."""
    chosen = np.linspace(0, len(listing.pairs) - 1, min(6, len(listing.pairs))).round().astype(int)
    columns: dict[str, list[np.ndarray]] = {"image": [], "with its label": []}
    for i in chosen:
        image, label = listing.pairs[i]
        ids = read_label(label, dataset)
        size = (round(640 * ids.shape[0] / ids.shape[1]), 640)
        picture, ids = read_image(image, size), resize_label(ids, size)
        colours = palette(classes_of(dataset))[ids]
        mixed = np.where((ids == IGNORE)[..., None], picture // 2, picture // 2 + colours // 2)
        columns["image"].append(picture)
        columns["with its label"].append(mixed)
    draw_sheet(path, columns, classes_of(dataset))


if __name__ == "__main__":
    main(LookArgs, look, __doc__)
