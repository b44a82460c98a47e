"""Checks the files of a dataset, which is the first thing to do with a fresh download.

    python inspect_dataset.py --dataset gta5 --data /datasets

It reads every label, compares its size with its image, prints the share of each class, and draws
six pairs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

import common
import datasets
from datasets import (
    DATASETS,
    IGNORE,
    UserError,
    dataset_root,
    palette,
    read_image,
    read_label,
    resize_label,
    show_progress,
    spaced,
)


@dataclass(frozen=True)
class Args:
    dataset: Literal["vkitti2", "kitti", "gta5", "cityscapes", "source", "target"]
    """Which of the four layouts the folder has; source and target are those of own data."""
    data: str = "mini"
    """Folder that holds the dataset's folder, or 'mini'."""
    split: Literal["train", "test"] = "train"
    """Training or test photos of a target dataset; a source is all 'train'."""
    out: Path = Path("runs/inspect")
    """Folder for DATASET-SPLIT.png, images with their labels laid over them."""


def run(args: Args) -> None:
    """Reads all files of a dataset, prints the share of every class, and draws six pairs."""
    own = args.dataset in ("source", "target")
    kinds = datasets.get_benchmark("own", args.data)._asdict() if own else DATASETS
    dataset = kinds[args.dataset]
    if args.split == "test" and args.dataset in ("vkitti2", "gta5", "source"):
        raise UserError(f"--split test: {args.dataset} is a source, all of it is train")
    pairs, unlabelled = datasets.list_files(dataset, dataset_root(args.data, dataset), args.split)
    print(f"images with a label: {len(pairs):,}, without: {len(unlabelled):,}")
    if unlabelled and dataset.name in ("vkitti2", "gta5", "source"):
        raise UserError(f"{unlabelled[0]}: has no label, which every image of a source needs")
    if not pairs:
        print(f"{dataset.name}: no label in the {args.split} part, so there is nothing to check")
        return
    pixels, images = np.zeros(256, np.int64), np.zeros(256, np.int64)
    for image, label in show_progress(pairs, "reading"):
        counts = np.bincount(read_label(label, dataset, image).ravel(), minlength=256)
        pixels, images = pixels + counts, images + (counts > 0)
    for train_id, name in [*enumerate(dataset.classes), (IGNORE, "ignored")]:
        share = pixels[train_id] / pixels.sum()
        print(f"{name:14}{share:9.3%} of the pixels, in {images[train_id]:,} images")
    chosen, size = [pairs[i] for i in spaced(len(pairs), 6)], (256, 512)
    pictures = [read_image(image, size) for image, _ in chosen]
    labels = [resize_label(read_label(label, dataset), size) for _, label in chosen]
    colours, both = palette(dataset.classes), zip(pictures, labels, strict=True)
    overlays = [picture // 2 + colours[label] // 2 for picture, label in both]
    columns = {"image": pictures, "with its label": overlays}
    datasets.check_labels(dataset, pairs)
    sheet = args.out / f"{dataset.name}-{args.split}.png"
    common.draw_sheet(sheet, columns, dataset.classes)
    print(f"written: {sheet}")


if __name__ == "__main__":
    common.main(Args, run, __doc__)
