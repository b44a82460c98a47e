"""The four datasets and own data: files, labels, and who may use which of them.

Letters in shape comments: N images of a split, H x W height and width in pixels, C classes. Images
are RGB, labels are train ids 0..C-1 or 255 for "ignored".
"""

import colorsys
import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import re
import sys
import time
import unicodedata
import uuid
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch.distributed as dist
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

import miniature

IGNORE = 255  # the train id of pixels that count nowhere
UNKNOWN = 254  # in a lookup table: stands for values that are not in the label map
COLOUR_WEIGHTS = np.array([1 << 16, 1 << 8, 1])  # of a colour as one number


class UserError(Exception):
    """What a user can mend, in one line: the file, what was found, what was expected."""


def rank() -> int:
    """The number of this process under torchrun; rank 0 alone writes files."""
    return dist.get_rank() if dist.is_initialized() else 0


# ---- Label spaces -------------------------------------------------------------------------------
# Name, label id and colour, of Cityscapes' 19 classes in the order of their train ids.
CITYSCAPES_TABLE = """
road 7 128 64 128, sidewalk 8 244 35 232, building 11 70 70 70, wall 12 102 102 156,
fence 13 190 153 153, pole 17 153 153 153, traffic light 19 250 170 30, traffic sign 20 220 220 0,
vegetation 21 107 142 35, terrain 22 152 251 152, sky 23 70 130 180, person 24 220 20 60,
rider 25 255 0 0, car 26 0 0 142, truck 27 0 0 70, bus 28 0 60 100, train 31 0 80 100,
motorcycle 32 0 0 230, bicycle 33 119 11 32"""
# Colour and class of VKITTI2's kinds: Vegetation and Tree, Car and Van, then GuardRail, Misc and
# Undefined, which are ignored.
VKITTI2_TABLE = """
100 60 100 road, 140 140 140 building, 255 130 0 pole, 200 200 0 traffic light,
255 255 0 traffic sign, 90 240 0 vegetation, 0 199 0 vegetation, 210 0 200 terrain, 90 200 255 sky,
255 127 80 car, 0 139 139 car, 160 60 60 truck, 250 100 255 ignored, 80 80 80 ignored,
0 0 0 ignored"""
CITYSCAPES_IDS, PALETTE, VKITTI2_COLOURS = {}, {}, {}
for entry in CITYSCAPES_TABLE.split(","):
    *words, label_id, r, g, b = entry.split()
    name = " ".join(words)
    CITYSCAPES_IDS[name], PALETTE[name] = int(label_id), (int(r), int(g), int(b))
for entry in VKITTI2_TABLE.split(","):
    r, g, b, *words = entry.split()
    VKITTI2_COLOURS[int(r), int(g), int(b)] = None if words == ["ignored"] else " ".join(words)
CITYSCAPES_CLASSES = tuple(CITYSCAPES_IDS)
KITTI_CLASSES = tuple(dict.fromkeys(filter(None, VKITTI2_COLOURS.values())))


class Dataset(NamedTuple):
    """Where the files of a dataset lie, and the train id of each value in its label files."""

    name: str  # also its folder below --data
    images: str  # glob below that folder; {split} is train or val
    renames: tuple[tuple[str, str], ...]  # turn an image's path into its label's
    classes: tuple[str, ...]
    values: tuple[tuple[Any, str | None], ...]  # (id or colour (R, G, B), class or None: ignored)
    halves: bool = False  # whether the labelled photos are halved into training and test photos

    def label_of(self, image: str) -> str:
        """The path of an image's label, both relative to the dataset's folder."""
        for old, new in self.renames:
            image = image.replace(old, new, 1)
        return str(Path(image).with_suffix(".png"))


class Benchmark(NamedTuple):
    """A source and a target, whose classes are the same."""

    source: Dataset
    target: Dataset


NAMES = {value: name for name, value in CITYSCAPES_IDS.items()}
LABEL_IDS = tuple((value, NAMES.get(value)) for value in range(34))
VKITTI2 = Dataset(
    "vkitti2",
    images="Scene*/clone/frames/rgb/Camera_0/*rgb_*.jpg",
    renames=(("/rgb/", "/classSegmentation/"), ("rgb_", "classgt_")),
    classes=KITTI_CLASSES,
    values=tuple(VKITTI2_COLOURS.items()),
)
CITYSCAPES = Dataset(
    "cityscapes",
    images="leftImg8bit/{split}/*/*_leftImg8bit.png",
    renames=(("leftImg8bit/", "gtFine/"), ("_leftImg8bit.png", "_gtFine_labelIds.png")),
    classes=CITYSCAPES_CLASSES,
    values=LABEL_IDS,
)
KITTI_RENAMES, GTA5_RENAMES = (("image_2/", "semantic/"),), (("images/", "labels/"),)
GTA5_IDS = (*LABEL_IDS, (34, None))  # number plates
KITTI = Dataset(
    "kitti", "training/image_2/*_10.png", KITTI_RENAMES, KITTI_CLASSES, LABEL_IDS, halves=True
)
GTA5 = Dataset("gta5", "images/*", GTA5_RENAMES, CITYSCAPES_CLASSES, GTA5_IDS)
DATASETS = {dataset.name: dataset for dataset in (VKITTI2, KITTI, GTA5, CITYSCAPES)}
BENCHMARKS = {
    "vkitti2kitti": Benchmark(VKITTI2, KITTI),
    "gta52cityscapes": Benchmark(GTA5, CITYSCAPES),
}


def get_benchmark(name: str, data: str) -> Benchmark:
    """The source and the target of --benchmark. Those of 'own' are source/ and target/ in `data`.

    Their file classes.json maps a class, or "ignore", to its values in label files: an id, or ids
    and colours. UserError where the file is missing or wrong.
    """
    if name != "own":
        return BENCHMARKS[name]
    if data == "mini":
        raise UserError("own: --data must name the folder of your own data")
    path, values = Path(data) / "classes.json", {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
        for class_name, value in content.items():
            for v in value if isinstance(value, list) else [value]:
                is_colour = isinstance(v, list)
                numbers, key = (v, tuple(v)) if is_colour else ([v], v)
                valid = len(numbers) == (3 if is_colour else 1)
                valid = valid and all(type(n) is int and 0 <= n < 256 for n in numbers)
                if not valid or key in values:
                    raise ValueError(f"{v!r} of {class_name} is no id or colour, or is given twice")
                values[key] = None if class_name.lower() == "ignore" else class_name
        classes = tuple(dict.fromkeys(filter(None, values.values())))
        if not 2 <= len(classes) <= UNKNOWN:
            expected = f"expected 2 to {UNKNOWN}; all that is not of one class can be another"
            raise ValueError(f"names {len(classes)} classes, {expected}")
    except (OSError, ValueError, TypeError) as error:
        example = '{"road": 7, "car": [26, 27], "sky": [[70, 130, 180]], "ignore": 0}'
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: {reason}; expected for example {example}") from error
    source = Dataset("source", "images/**/*", GTA5_RENAMES, classes, tuple(values.items()))
    return Benchmark(source, source._replace(name="target", halves=True))


@functools.cache
def label_table(dataset: Dataset, colours: bool = False) -> np.ndarray:
    """The train id, IGNORE or UNKNOWN, of each id, or each colour as one number. uint8 [values]."""
    table = np.full(1 << 24 if colours else 256, UNKNOWN, np.uint8)
    for value, name in dataset.values:
        if isinstance(value, tuple) == colours:
            index = value @ COLOUR_WEIGHTS if colours else value
            table[index] = dataset.classes.index(name) if name in dataset.classes else IGNORE
    return table


def palette(classes: Sequence[str]) -> np.ndarray:
    """Cityscapes' colours of the classes, other hues for others; the rest black. uint8 [256,3]."""
    colours = np.zeros((256, 3), np.uint8)
    for i, name in enumerate(classes):
        other = colorsys.hsv_to_rgb(0.618 * i % 1, 0.7, 0.9)  # steps of the golden ratio
        colours[i] = PALETTE.get(name, [round(255 * channel) for channel in other])
    return colours


# ---- Files --------------------------------------------------------------------------------------
# 62 frames of the official GTA5 archives are unusable: their images and labels differ in size.
GTA5_FRAMES = 24_966
GTA5_MISMATCHED = {f"images/{i:05d}.png" for i in (15188, 17705, *range(20801, 20861))}


@functools.cache
def note(line: str) -> None:
    """Says a line to the user, once."""
    if rank() == 0:
        print(line, file=sys.stderr, flush=True)


def is_foreign(path: str) -> bool:
    """Whether a file is not part of a dataset, as ._a.png, @eaDir/a.png, thumbs/a.png and a.txt."""
    known = path.lower().endswith((".png", ".jpg", ".jpeg"))
    return not known or any(part[0] in ".@" or "thumb" in part.lower() for part in path.split("/"))


def find_images(root: Path, pattern: str) -> tuple[dict[str, str], list[str]]:
    """Images that match below `root`, or if none does one folder deeper, and other files.

    -> {path as in the pattern, in Unicode's form NFC: path below root}, and paths of the others.
    """
    options = {"root_dir": root, "recursive": True, "include_hidden": True}
    for prefix in ("", "*/"):  # archives are often unpacked into folders of their own
        images, others = {}, []
        paths = sorted(glob.glob(prefix + pattern, **options))
        folders = {path.rpartition("/")[0] for path in paths}  # their names may end with .jpg
        for path in paths:
            if path in folders:
                continue
            key = unicodedata.normalize("NFC", path.partition("/")[2] if prefix else path)
            if is_foreign(path):
                others += [path] if (root / path).is_file() else []
            elif key in images:
                raise UserError(f"{root}: {images[key]} and {path} have the same name")
            else:
                images[key] = path
        if images:
            break
    if not prefix and "**" not in pattern:
        deeper = glob.iglob(f"*/{pattern}", **options)
        unused = next((path for path in deeper if not is_foreign(path)), None)
        if unused:
            note(f"{root}: files one folder deeper are not used, such as {unused}")
    return images, others


def list_files(dataset: Dataset, root: Path, split: str) -> tuple[list, list[Path]]:
    """Pairs (image, label) and images without a label of a split, train or test, sorted by path.

    All images of a source are "train". UserError where there is no image to train on.
    """
    pattern = dataset.images.format(split="train" if split == "train" else "val")
    images, others = find_images(root, pattern)
    label_pattern = dataset.label_of(pattern)
    if "**" in pattern:  # own data: the suffix of a label may be in capitals
        label_pattern = label_pattern.removesuffix(".png") + ".[pP][nN][gG]"
    listed, other_labels = find_images(root, label_pattern)
    labels = {re.sub(r"\.png$", ".png", key, flags=re.I): path for key, path in listed.items()}
    if len(labels) < len(listed):
        raise UserError(f"{root}: two labels differ in the case of their suffix alone")
    if not images and split == "train":
        raise UserError(f"{root}: no image of {dataset.name}, expected {pattern}")
    image_of = {dataset.label_of(key): key for key in images}
    for key in sorted(images.keys() - image_of.values()):
        if dataset.label_of(key) in labels:
            raise UserError(f"{root}: {key} and {image_of[dataset.label_of(key)]} have one label")
    others += other_labels + sorted(labels.keys() - image_of.keys())
    if others:
        note(f"{root}: {len(others)} other files are ignored, such as {others[0]}")
    if dataset is GTA5 and len(images) >= GTA5_FRAMES - len(GTA5_MISMATCHED):
        left_out = GTA5_MISMATCHED & images.keys()
        note(f"{root}: {len(left_out)} frames are left out, whose labels differ from them in size")
        images = {key: path for key, path in images.items() if key not in left_out}
    files = [(root / images[key], labels.get(dataset.label_of(key))) for key in sorted(images)]
    pairs = [(image, root / label) for image, label in files if label]
    unlabelled = [image for image, label in files if not label]
    if dataset.halves:  # contiguous, so that neighbouring frames are not on both sides
        half = len(pairs) // 2
        return (pairs[:half], unlabelled) if split == "train" else (pairs[half:], [])
    return pairs, unlabelled


# A run lists its folders once. It begins with common.resolve, which clears this cache.
files_of = functools.cache(list_files)


def open_image(path: Path, decode: bool = True) -> Image.Image:
    """An image file, or its header alone; UserError that names the file where that fails."""
    try:
        image = Image.open(path)
        if decode:
            image.load()
        return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{path}: cannot be read as an image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode in RGB; of 16-bit values the upper 8 bits."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


EXIF_KEYS = {"exif", "Raw profile type exif", "xmp", "XML:com.adobe.xmp"}  # Pillow's names


def read_header(path: Path) -> tuple[int, int, bool]:
    """Width and height of an image as it is stored, and whether its EXIF data turn it.

    Data that a PNG has after its pixels do not count, since these would have to be decoded.
    """
    with open_image(path, decode=False) as image:
        try:  # damaged data make Pillow raise errors of many kinds
            turned = EXIF_KEYS & image.info.keys() and image.getexif().get(274) in range(2, 9)
        except Exception as error:
            raise UserError(f"{path}: its EXIF data cannot be read ({error})") from error
        return *image.size, bool(turned)


def read_image(path: Path, size: tuple[int, int] | None = None) -> np.ndarray:
    """An image, upright as its EXIF data say. uint8 [H,W,3], at `size` (height, width) if given."""
    _, _, turned = read_header(path)
    with open_image(path) as image:
        if turned:
            image.getexif()  # read now, and forgotten below: Pillow cannot write every tag again
            image.info = {k: v for k, v in image.info.items() if k not in EXIF_KEYS}
            image = ImageOps.exif_transpose(image)
        image = to_rgb(image)
    return np.asarray(image.resize(size[::-1], Image.Resampling.BILINEAR) if size else image)


def size_of_labelled(path: Path) -> tuple[int, int]:
    """Width and height of an image with a label; UserError where its EXIF data turn it alone."""
    width, height, turned = read_header(path)
    if turned:
        raise UserError(f"{path}: EXIF data turn it, but not its label; save it upright")
    return width, height


def read_label(path: Path, dataset: Dataset, image: Path | None = None) -> np.ndarray:
    """A label file as train ids at its own resolution. uint8 [H,W], values 0..C-1 or IGNORE.

    UserError where the file is lossy, of another kind than the dataset's labels, holds a value
    that is not in the label map, or differs from `image` in size or orientation.
    """
    kinds = {isinstance(value, tuple) for value, _ in dataset.values}
    modes = [mode for mode in ("L", "P", "RGB", "RGBA") if mode.startswith("RGB") in kinds]
    with open_image(path) as label:
        if label.format != "PNG" or label.mode not in modes:
            kind = f"{label.format} of mode {label.mode}"
            raise UserError(f"{path}: found {kind}, expected a PNG of mode {' or '.join(modes)}")
        values = np.asarray(label)  # of a palette PNG these are the indices
    colours = values.ndim == 3
    if colours:
        values = values[..., :3] @ COLOUR_WEIGHTS
    train_ids = label_table(dataset, colours)[values]
    unknown = train_ids == UNKNOWN
    if unknown.any():
        value = int(values[unknown][0])
        name = f"colour {value >> 16, value >> 8 & 255, value & 255}" if colours else f"id {value}"
        cause = "are these train ids" if value == 255 else "was the file compressed or recoloured"
        cause = "is it missing in classes.json" if dataset.name in ("source", "target") else cause
        where = f"in the label map of {dataset.name} ({unknown.sum()} such pixels)"
        raise UserError(f"{path}: {name} is not {where}; {cause}?")
    if image is not None:
        (w, h), shape = size_of_labelled(image), train_ids.shape
        if (h, w) != shape:
            raise UserError(f"{path}: is {shape[1]}x{shape[0]}, its image {w}x{h}")
    return train_ids


def check_labels(dataset: Dataset, pairs: Sequence[tuple[Path, Path]]) -> None:
    """UserError where all labels are void, or over a fifth of a sample looks like train ids."""
    if not any((read_label(label, dataset) != IGNORE).any() for _, label in pairs):
        raise UserError(f"{pairs[0][1]}: no pixel of any class, as in all {len(pairs)} labels")
    if dataset.values[:34] == LABEL_IDS:
        # Vegetation, sky, people and vehicles, of which every road scene has some. Train ids that
        # are read as label ids have none of them, and road, building and sky become ignored.
        later = [i for i, name in enumerate(dataset.classes) if CITYSCAPES_IDS[name] > 20]
        sample, wrong = [pairs[i][1] for i in spaced(len(pairs), 16)], []
        for label in sample:
            counts = np.bincount(read_label(label, dataset).ravel(), minlength=256)
            if not counts[later].any() and counts[IGNORE] > counts.sum() / 2:
                wrong.append(label)
        if len(wrong) > len(sample) / 5:  # part of the files may have been converted
            raise UserError(f"{wrong[0]}: no id is above 20; expected label ids, not train ids")


def resize_label(train_ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest neighbour, so that no id is invented. uint8 [h,w] -> [H,W]."""
    return np.asarray(Image.fromarray(train_ids).resize(size[::-1], Image.Resampling.NEAREST))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file to write to, renamed to `path` at the end: there is never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name = os.fsdecode(os.fsencode(path.name)[:200])  # file systems allow 255 bytes
    temporary = path.with_name(f".{name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:  # a full disk, which names no file
        error.filename = error.filename or str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def delete_leftovers(folder: Path, pattern: str, age: float) -> None:
    """Deletes temporary files that killed processes have left: those older than `age` seconds."""
    for path in folder.rglob(pattern):
        with contextlib.suppress(FileNotFoundError):  # another process was quicker
            if path.is_file() and time.time() - path.stat().st_mtime > age:
                path.unlink()


def spaced(count: int, most: int) -> np.ndarray:
    """At most `most` evenly spaced indices of `count` things. -> int64."""
    return np.linspace(0, count - 1, min(most, count)).round().astype(int)


def write_json(path: Path, value: Any) -> None:
    """ValueError for NaN and infinity, which JSON does not have."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str, allow_nan=False) + "\n")


def sha256(path: Path) -> str:
    """The hash of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def create_array(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A uint8 array in a .npy file, to be filled piece by piece; one of this shape is kept.

    Its disk space is reserved first: a full disk is an error here, and a crash in a memory map.
    """
    if not path.exists() or np.load(path, mmap_mode="r").shape != shape:
        with replacing(path) as temporary, temporary.open("wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), file.tell(), math.prod(shape))
            else:  # on macOS: zeros
                for _ in range(shape[0]):
                    file.write(bytes(math.prod(shape[1:])))
    return np.load(path, mmap_mode="r+")


# ---- Cache: every file is decoded and resized once ----------------------------------------------
@functools.cache
def fingerprint(path: Path, changed: int) -> tuple[str, int, int, int]:
    """Name, size, and checksums of the first and last 4 KiB, of a file changed at that time.

    A PNG ends with a checksum of all its pixels. More would take minutes for 25,000 frames.
    """
    size, block = path.stat().st_size, 1 << 12
    with path.open("rb") as file:
        first = zlib.crc32(file.read(block))
        file.seek(max(block, size - block))
        return path.name, size, first, zlib.crc32(file.read())


def digest(files: Sequence[Path]) -> str:
    """A hash of the files' names, sizes, beginnings and ends, the same wherever they lie."""

    def read(paths: Sequence[Path]) -> list:
        return [fingerprint(path, path.stat().st_ctime_ns) for path in paths]

    with ThreadPoolExecutor(16) as pool:  # a network file system answers many at a time
        prints = list(pool.map(read, [files[i::16] for i in range(16)]))
    return hashlib.sha256(repr(prints).encode()).hexdigest()[:16]


def cached(cache: Path, name: str, files: Sequence[Path], shape: tuple[int, ...], read: Callable):
    """`read(i)` for each of the files, as one memory-mapped array. uint8 [N,*shape].

    The file's name says what its content depends on: `name`, which stands for the way of reading,
    the shape, and the files' content. Two processes may build it at once: both rename whole files.
    """
    path = cache / f"{name}-{'x'.join(map(str, shape))}-{digest(files)}.npy"
    if rank() == 0:
        delete_leftovers(cache, f".*{path.name}.*.tmp", age=86_400)
    if rank() == 0 and not path.exists():
        with replacing(path) as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
            array = create_array(temporary, (len(files), *shape))
            for start in show_progress(range(0, len(files), 64), f"caching {name}"):
                # Few at a time, since they wait in memory.
                indices = range(start, min(start + 64, len(files)))
                for i, values in zip(indices, pool.map(read, indices), strict=True):
                    array[i] = values
            array.flush()
    while not path.exists():  # rank 0 is building it
        time.sleep(1)
    return np.load(path, mmap_mode="r")


def show_progress(steps: Collection[Any], title: str) -> Iterator[Any]:
    """The steps, with the time left: on a terminal as a bar, elsewhere as a line every 30 s."""
    if sys.stderr.isatty():
        hidden = rank() > 0
        yield from track(steps, title, console=Console(stderr=True), transient=True, disable=hidden)
        return
    start = shown = time.monotonic()
    for count, step in enumerate(steps, start=1):
        yield step
        now = time.monotonic()
        if now - shown > 30 and rank() == 0:
            left = (now - start) / count * (len(steps) - count)
            print(f"{title}: {count} of {len(steps)}, {left:.0f} s left", flush=True)
            shown = now


# ---- The roles of the data ----------------------------------------------------------------------
Role = Literal["source", "target_unlabelled", "target_few", "target_train", "target_test"]


@dataclass(frozen=True)
class Split:
    """The images of one role at the training size, with their labels where the role has them."""

    dataset: Dataset
    names: tuple[str, ...]  # paths below the dataset's folder
    images: np.ndarray  # uint8 [N,H,W,3], memory-mapped
    labels: np.ndarray | None  # uint8 [N,H,W] train ids, memory-mapped
    test_files: tuple[tuple[Path, Path], ...] = ()  # image and label, for scores and figures alone

    def __len__(self) -> int:
        return len(self.names)


def dataset_root(data: str, dataset: Dataset) -> Path:
    """The folder of a dataset below --data; writes the miniature first where that is 'mini'."""
    if data == "mini":
        data = "data/mini"
        if rank() == 0 and not miniature.is_current(Path(data)):
            note(f"writing the miniature to {data}, which takes about a minute")
            miniature.write(Path(data))
        while not miniature.is_current(Path(data)):  # rank 0 is writing it
            time.sleep(1)
    root = Path(data) / dataset.name
    if not root.is_dir():
        expected = f"{dataset.name}/ with {dataset.images.format(split='train')}"
        raise UserError(f"{root}: no such folder; --data must hold {expected}")
    return root


def load(args: Any, role: Role) -> Split:
    """The images of a role, through the cache. `args` are common.Args, resolved.

    Labels are read for 'source', 'target_few' and 'target_train' (which is the oracle's alone);
    those of 'target_test' are only checked. Without any test label, 'target_test' holds photos for
    the pictures. UserError where needed labels are missing.
    """
    dataset = get_benchmark(args.benchmark, args.data)[role != "source"]
    if role == "source" and args.init and args.init.is_dir():
        return load_set(args.init, dataset, args.size)
    root, size = dataset_root(args.data, dataset), args.size
    pairs, unlabelled = files_of(dataset, root, "test" if role == "target_test" else "train")
    if role == "target_test" and not pairs and not unlabelled:
        return load(args, "target_unlabelled")
    if unlabelled and (role == "source" or (role == "target_test" and pairs)):
        label = dataset.label_of(unlabelled[0].relative_to(root).as_posix())
        expected = f"expected {label}; such images: {len(unlabelled)}"
        raise UserError(f"{unlabelled[0]}: image without a label, {expected}")
    if role == "target_few":  # evenly spaced, each in the middle of its stretch of the drive
        n, k = len(pairs), args.labelled
        if not 1 <= k <= n:
            hint = f"; give --labelled 1 to {n}" if n else "; this row needs some"
            raise UserError(f"--labelled {k}: {root} has {n} labelled training photos{hint}")
        pairs = [pairs[(2 * i + 1) * n // (2 * k)] for i in range(k)]
    elif role == "target_train" and not pairs:
        raise UserError(f"{root}: no labelled training photo")
    if pairs and role != "target_unlabelled":
        check_labels(dataset, pairs)
    if role == "target_test":  # all of them now, since the first evaluation may be hours away
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda pair: read_label(pair[1], dataset, pair[0]).shape, pairs))
    images, labels = [image for image, _ in pairs], [label for _, label in pairs]
    if role == "target_unlabelled":
        images = sorted(images + unlabelled)
        if not images:
            expected = "of photos with masks the second half is for test"
            raise UserError(f"{root}: no training photo; {expected}")
    elif not pairs:  # test photos without any label, for the pictures
        images = unlabelled

    train_ids = None
    if role in ("source", "target_few", "target_train"):
        # Labels are checked against their images, so a cache of them is one of these images, too.
        name = f"{dataset.name}-labels-{zlib.crc32(repr(dataset).encode()):08x}-{digest(images)}"
        train_ids = cached(
            args.cache,
            name,
            labels,
            size,
            lambda i: resize_label(read_label(labels[i], dataset, images[i]), size),
        )
    name = f"{dataset.name}-upright"
    pixels = cached(args.cache, name, images, (*size, 3), lambda i: read_image(images[i], size))
    names = tuple(image.relative_to(root).as_posix() for image in images)
    return Split(dataset, names, pixels, train_ids, tuple(pairs if role == "target_test" else ()))


def save_set(folder: Path, split: Split, labels: np.ndarray, names: Sequence[str]) -> None:
    """Completes a training set that a method has made from `split`, for --init of another method.

    Its N images are in `folder`/images.npy already, see `create_array`. labels uint8 [N,H,W].
    """
    create_array(folder / "labels.npy", labels.shape)[:] = labels
    dataset = split.dataset
    record = {"dataset": dataset.name, "classes": dataset.classes, "names": list(names)}
    for name in ("images", "labels"):
        record[name] = sha256(folder / f"{name}.npy")
    write_json(folder / "set.json", record)


def load_set(folder: Path, dataset: Dataset, size: Sequence[int]) -> Split:
    """What `save_set` wrote; UserError for another dataset or size, or another folder."""
    try:
        record = json.loads((folder / "set.json").read_text())
        images, labels = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("images", "labels"))
        kind, classes = (record["dataset"], *images.shape[1:3]), tuple(record["classes"])
        names = tuple(record["names"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: not a training set that a method wrote ({error})") from error
    if kind[0] == dataset.name and classes != dataset.classes:
        raise UserError(f"{folder}: has other classes, {' '.join(classes)}")
    if kind != (dataset.name, *size):
        raise UserError(f"{folder}: holds {kind}, expected {(dataset.name, *size)}")
    return Split(dataset, names, images, labels)
