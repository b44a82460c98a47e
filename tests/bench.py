"""Measures speed, each figure beside a yardstick that is timed in turns with it.

    python tests/bench.py                               (five minutes on one CPU core)

    python tests/bench.py --only training evaluation --out bench.json

It is no test: run it by hand, on a machine that does nothing else. A line has the seconds of the
figure, and its speed over that of its yardstick: medians over the rounds, each of which times both.
"""

import contextlib
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import common
import datasets
import diffusion_bridge
from common import Run
from datasets import UserError


@dataclass(frozen=True)
class Args:
    only: tuple[str, ...] = ()
    """Lines to measure: training input_pipeline evaluation diffusion. Default: all."""
    out: Path | None = None
    """Write the lines as JSON too."""
    data: str = "mini"
    """Folder of the datasets, or 'mini'."""
    benchmark: Literal["vkitti2kitti", "gta52cityscapes"] = "gta52cityscapes"
    """Which pair of them."""
    device: str = "auto"
    """auto, cpu, cuda."""
    rounds: int = 5
    """Rounds of every measurement."""
    steps: int = 200
    """Updates of the training that is timed; of that of the U-Net, a fifth of them."""


# ---- Measuring ----------------------------------------------------------------------------------
def measure(args: Args, *functions: Callable[[], Any]) -> np.ndarray:
    """Seconds of each function in each round; they take turns. -> [rounds,functions]."""
    seconds = np.zeros((args.rounds + 1, len(functions)))
    for round_seconds in seconds:  # the first round warms up
        for k, function in enumerate(functions):
            start = time.perf_counter()
            with contextlib.redirect_stdout(None):
                function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            round_seconds[k] = time.perf_counter() - start
    return seconds[1:]


def compare(
    args: Args, figure: str, function: Callable, yardstick: str, other: Callable, least: float
) -> dict[str, Any]:
    """A line of the output. other: the yardstick's function; least: what the ratio should be."""
    seconds = measure(args, function, other)
    speed = {"seconds": median(seconds[:, 0]), "ratio": median(seconds[:, 1] / seconds[:, 0])}
    return {"figure": figure, **speed, "yardstick": yardstick, "least": least}


def start_run(args: Args, folder: Path, module: Any = common) -> Run:
    """A run folder of a method below a temporary folder, with the preset of the data."""
    shared = {"data": args.data, "benchmark": args.benchmark, "device": args.device}
    method_args = module.Args(**shared, out=folder / module.__name__, resume=False)
    with contextlib.redirect_stdout(None):
        return Run(method_args, module.__name__, stages=1)


def first_batch(run: Run, role: datasets.Role) -> tuple[Tensor, Tensor]:
    """Images [B,3,H,W] and labels [B,H,W] on the device."""
    return common.Loader(datasets.load(run.args, role), run.args.batch_size, run.device, "bench")(0)


def forget(run: Run) -> None:
    """Deletes the checkpoints, so that a stage is trained again."""
    for path in run.out.glob("stage_*.pt"):
        path.unlink()


# ---- The lines ----------------------------------------------------------------------------------
def training(args: Args, folder: Path) -> Iterator[dict]:
    """The recipe with loader, zoom and flip, schedule, log and checkpoints against a bare loop."""
    run = start_run(args, folder)
    source, net = datasets.load(run.args, "source"), run.network()
    images, labels = first_batch(run, "source")
    optimizer = common.make_optimizer(net, run.args.lr)

    def recipe() -> None:
        forget(run)
        common.train(run, net, source, args.steps, "train", evaluated=False)

    def bare_loop() -> None:
        for _ in range(args.steps):
            with run.autocast():
                loss = common.segmentation_loss(net(images, aux=True), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    yield compare(args, "training", recipe, "bare loop", bare_loop, least=0.92)


def read_pairs(pairs: Sequence, dataset: datasets.Dataset, size: tuple) -> tuple[Tensor, Tensor]:
    """A batch of image and label files, opened and resized. -> [B,3,H,W], [B,H,W]."""
    images = np.stack([datasets.read_image(image, size) for image, _ in pairs])
    labels = [datasets.resize_label(datasets.read_label(y, dataset), size) for _, y in pairs]
    return common.to_tensor(images, torch.device("cpu")), torch.tensor(np.stack(labels)).long()


def input_pipeline(args: Args, folder: Path) -> Iterator[dict]:
    """The loader over the cache against torch's DataLoader over the files."""
    run = start_run(args, folder)
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

    yield compare(args, "cached batches", epoch, "DataLoader", lambda: [*data_loader], least=20)


def evaluation(args: Args, folder: Path) -> Iterator[dict]:
    """With reading and comparing labels, against forward passes, F.interpolate and argmax alone."""
    run = start_run(args, folder)
    net, test = run.network().eval(), run.test
    sizes = [datasets.open_image(label).size[::-1] for _, label in test.test_files]

    @torch.inference_mode()
    def plain() -> None:
        for start in range(0, len(test), 16):
            logits = common.predict(net, test.images[start : start + 16], run.device)
            for image_logits, size in zip(logits, sizes[start:], strict=False):
                F.interpolate(image_logits[None], size=size, mode="bilinear").argmax(dim=1)

    function = partial(common.evaluate, net, test, run.device)
    yield compare(args, "evaluation", function, "interpolate, argmax", plain, least=0.8)


def diffusion(args: Args, folder: Path) -> Iterator[dict]:
    """Training of the U-Net, with loaders, noise and average, against the bare U-Net."""
    run, steps = start_run(args, folder, diffusion_bridge), math.ceil(args.steps / 5)
    settings = diffusion_bridge.fill_in(replace(run.args, unet_steps=steps))
    source, photos = (datasets.load(settings, role) for role in ("source", "target_train"))
    config = {**vars(settings), "classes": run.classes}
    bridge = diffusion_bridge.Bridge(config, len(photos)).to(run.device)
    optimizer = torch.optim.AdamW(bridge.unet.parameters(), lr=settings.unet_lr, fused=True)
    images, labels = first_batch(run, "source")
    x, statistics = bridge.to_cells(images), diffusion_bridge.appearance(images)
    maps = diffusion_bridge.class_shares(labels, len(run.classes), x.shape[2:])
    angle, domain = x.new_ones(len(x)), labels.new_zeros(len(x))

    def method() -> None:
        forget(run)
        diffusion_bridge.train_unet(run, settings, bridge, source, photos)

    def bare_loop() -> None:
        for _ in range(steps):
            with run.autocast():
                loss = F.mse_loss(bridge.unet(x, maps, angle, domain, statistics), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    yield compare(args, "training of the U-Net", method, "bare loop", bare_loop, least=0.9)


LINES = (training, input_pipeline, evaluation, diffusion)


# ---- Command line -------------------------------------------------------------------------------
def main(args: Args) -> None:
    lines, rows = {line.__name__: line for line in LINES}, []
    if not lines.keys() >= {*args.only}:
        raise UserError(f"--only {' '.join(args.only)}: expected names of {' '.join(lines)}")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only or lines:
            for row in lines[name](args, Path(folder)):
                speed = "{figure}: {seconds:.3g} s, {ratio:.2f} x {yardstick}".format(**row)
                print(f"{speed}, expected {row['least']:g} or more", flush=True)
                rows.append(row)
    if args.out:
        datasets.write_json(args.out, {"threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    common.main(Args, main, __doc__)
