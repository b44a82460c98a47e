"""Measures speed, each figure beside a yardstick that is timed in turns with it.

    python tests/bench.py                               (three minutes on one CPU core)

    python tests/bench.py --only training --device cuda

It is no test: run it by hand, on a machine that does nothing else. A line has the seconds of the
figure, and its speed over that of its yardstick: medians over the rounds, each of which times both.
"""

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

import common
import datasets
from common import Run


@dataclass(frozen=True)
class Args:
    only: tuple[Literal["training", "input_pipeline"], ...] = ("training", "input_pipeline")
    """Lines to measure."""
    data: str = "mini"
    """Folder of the datasets, or 'mini'."""
    benchmark: Literal["vkitti2kitti", "gta52cityscapes"] = "gta52cityscapes"
    """Which pair of them."""
    device: str = "auto"
    """auto, cpu, cuda."""
    rounds: int = 3
    """Rounds of every measurement."""
    steps: int = 800
    """Updates of the training that is timed."""


def compare(
    args: Args, figure: str, function: Callable, yardstick: str, other: Callable, least: float
) -> None:
    """Prints a line. other: the yardstick's function; least: what the ratio should be."""
    seconds = np.zeros((args.rounds + 1, 2))
    for row in seconds:
        for k, timed in enumerate((function, other)):
            start = time.perf_counter()
            with contextlib.redirect_stdout(None):
                timed()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            row[k] = time.perf_counter() - start
    seconds = seconds[1:]  # the first round warms up
    median, ratio = np.median(seconds[:, 0]), np.median(seconds[:, 1] / seconds[:, 0])
    line = f"{figure}: {median:.3g} s, {ratio:.2f} x {yardstick}"
    print(f"{line}, expected {least:g} or more", flush=True)


def training(args: Args, run: Run) -> None:
    """The recipe with loader, zoom and flip, schedule, log and checkpoints against a bare loop."""
    source, net = datasets.load(run.args, "source"), run.network()
    images, labels = common.Loader(source, run.args.batch_size, run.device, "bench")(0)
    optimizer = common.make_optimizer(net, run.args.lr)

    def recipe() -> None:
        (run.out / "stage_train.pt").unlink(missing_ok=True)  # so that it is trained again
        common.train(run, net, source, args.steps, "train", evaluated=False)

    def bare_loop() -> None:
        for _ in range(args.steps):
            with run.autocast():
                loss = common.segmentation_loss(net(images, aux=True), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    compare(args, "training", recipe, "bare loop", bare_loop, least=0.92)


def read_pairs(pairs: Sequence, dataset: datasets.Dataset, size: tuple) -> tuple[Tensor, Tensor]:
    """A batch of image and label files, opened and resized. -> [B,3,H,W], [B,H,W]."""
    images = np.stack([datasets.read_image(image, size) for image, _ in pairs])
    labels = [datasets.resize_label(datasets.read_label(y, dataset), size) for _, y in pairs]
    return common.to_tensor(images, torch.device("cpu")), torch.tensor(np.stack(labels)).long()


def input_pipeline(args: Args, run: Run) -> None:
    """The loader over the cache against torch's DataLoader over the files."""
    dataset = datasets.BENCHMARKS[args.benchmark].source
    pairs, _ = datasets.list_files(dataset, datasets.dataset_root(args.data, dataset), "train")
    size, batch_size = run.args.size, run.args.batch_size
    loader = common.Loader(datasets.load(run.args, "source"), batch_size, run.device, "bench")
    collate = partial(read_pairs, dataset=dataset, size=size)
    options = {"num_workers": os.cpu_count(), "persistent_workers": True, "collate_fn": collate}
    data_loader = torch.utils.data.DataLoader(pairs, batch_size, shuffle=True, **options)

    def epoch() -> None:
        for step in range(len(pairs) // batch_size):
            loader(step)

    compare(args, "cached batches", epoch, "DataLoader", lambda: [*data_loader], least=20)


def main(args: Args) -> None:
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            shared = {"data": args.data, "benchmark": args.benchmark, "device": args.device}
            with contextlib.redirect_stdout(None):
                run = Run(common.Args(**shared, out=Path(folder) / "run"), "bench", stages=1)
                run.begin()
            {"training": training, "input_pipeline": input_pipeline}[name](args, run)


if __name__ == "__main__":
    common.main(Args, main, __doc__)
