"""Measures speed and memory, each figure beside a yardstick that is timed in turns with it.

    python tests/bench.py                               (ten minutes on one CPU core)

    python tests/bench.py --only training evaluation --out bench.json

    python tests/bench.py --growth                      (draws docs/cost_growth.png)

    python tests/bench.py --memory                      (peak memory of a short run of each row)

It is no test: run it by hand, on a machine that does nothing else. The ratio is the speed of the
figure over that of its yardstick: the median over the rounds, of which each times both once.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import benchmark
import common
import datarater
import datasets
import diffusion_bridge
import reward_opt
from common import Run
from datasets import UserError

ROOT = Path(common.__file__).parent


@dataclass(frozen=True)
class Args:
    only: tuple[str, ...] = ()
    """Lines to measure: training input_pipeline evaluation meta_gradient reward diffusion start_up.
    Default: all."""
    growth: bool = False
    """Instead of the table: how cost grows with batch size, image size and number of images."""
    memory: bool = False
    """Instead of the table: peak memory of a run of 20 steps of each row."""
    out: Path | None = None
    """Write the table as JSON too."""
    data: str = "mini"
    """Folder of the datasets, or 'mini'."""
    benchmark: Literal["vkitti2kitti", "gta52cityscapes"] = "gta52cityscapes"
    """Which pair of them."""
    device: str = "auto"
    """auto, cpu, cuda."""
    rounds: int = 5
    """Rounds of every measurement."""


# ---- Measuring ----------------------------------------------------------------------------------
class Row(NamedTuple):
    """A line of the table: `figure` has `ratio` times the speed of `yardstick`, or its memory."""

    figure: str
    yardstick: str
    ratio: float
    least: float | None = None  # what the ratio should be


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


def compare(args: Args, function: Callable, yardstick: Callable) -> tuple[float, float]:
    """-> seconds of a function; its speed over that of the yardstick. Medians."""
    seconds = measure(args, function, yardstick)
    return median(seconds[:, 0]), median(seconds[:, 1] / seconds[:, 0])


def tensor_memory(device: torch.device, function: Callable[[], Any]) -> float:
    """Most MB of tensors that a function holds at a time, beyond those that were there before; on
    the CPU the allocations less the freed ones, as torch's profiler records them."""
    function()  # so that nothing is allocated for the first time
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events])) / 2**20


def start_run(args: Args, folder: Path, module: Any = common) -> Run:
    """A run folder of a method below a temporary folder, with the preset of the data."""
    shared = {"data": args.data, "benchmark": args.benchmark, "device": args.device}
    method_args = module.Args(**shared, out=folder / module.__name__, resume=False)
    with contextlib.redirect_stdout(None):
        return Run(method_args, module.__name__, stages=1)


def forget(run: Run) -> None:
    """Deletes the checkpoints, so that a stage is trained again."""
    for path in run.out.glob("stage_*.pt"):
        path.unlink()


def training_step(run: Run, net: common.Network, images: Tensor, labels: Tensor) -> None:
    """Forward and backward pass on a batch that is on the device already."""
    net.train()
    with run.autocast():
        loss = common.segmentation_loss(net(images, aux=True), labels)
    net.zero_grad()
    loss.backward()


# ---- The lines of the table ---------------------------------------------------------------------
def training(args: Args, folder: Path, steps: int = 200) -> Iterator[Row]:
    """The recipe with loader, zoom and flip, schedule, log and checkpoints against a bare loop."""
    run = start_run(args, folder)
    source, net = datasets.load(run.args, "source"), run.network()
    images, labels = common.Loader(source, run.args.batch_size, run.device, "bench")(0)
    optimizer = common.make_optimizer(net, run.args.lr)

    def recipe() -> None:
        forget(run)
        common.train(run, net, source, steps, "train", evaluated=False)

    def bare_loop() -> None:
        for _ in range(steps):
            training_step(run, net, images, labels)
            optimizer.step()

    seconds, ratio = compare(args, recipe, bare_loop)
    rate = steps * run.args.batch_size / seconds
    yield Row(f"training, {rate:.0f} images/s", "bare loop", ratio, least=0.92)


def read_pairs(pairs: Sequence, dataset: datasets.Dataset, size: tuple) -> tuple[Tensor, Tensor]:
    """A batch of image and label files, opened and resized. -> [B,3,H,W], [B,H,W]."""
    images = np.stack([datasets.read_image(image, size) for image, _ in pairs])
    labels = [datasets.resize_label(datasets.read_label(y, dataset), size) for _, y in pairs]
    images = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    return images, torch.from_numpy(np.stack(labels)).long()


def input_pipeline(args: Args, folder: Path) -> Iterator[Row]:
    """Caching against decoding the images one by one; then the loader against torch's DataLoader
    over the files."""
    run = start_run(args, folder)
    dataset = datasets.BENCHMARKS[args.benchmark].source
    pairs = datasets.list_files(dataset, datasets.dataset_root(args.data, dataset), "train")[0]
    size, batch_size, cores = run.args.size, run.args.batch_size, os.cpu_count()
    images = [image for image, _ in pairs]
    read = partial(datasets.read_image, size=size)

    def build_cache() -> None:
        for path in folder.glob("bench-*.npy"):
            path.unlink()
        datasets.cached(folder, "bench", images, (*size, 3), lambda i: read(images[i]))

    _, ratio = compare(args, build_cache, lambda: [read(image) for image in images])
    yield Row(f"caching, {cores} cores", "decoding one by one", ratio, least=1.8)

    loader = common.Loader(datasets.load(run.args, "source"), batch_size, run.device, "bench")
    collate = partial(read_pairs, dataset=dataset, size=size)
    options = {"num_workers": cores, "persistent_workers": True, "collate_fn": collate}
    data_loader = torch.utils.data.DataLoader(pairs, batch_size, shuffle=True, **options)

    def ten_epochs() -> None:  # one is over before it can be timed
        for step in range(10 * len(pairs) // batch_size):
            loader(step)

    _, ratio = compare(args, ten_epochs, lambda: list(data_loader))
    yield Row("input after the first epoch", "DataLoader", 10 * ratio, least=20)


def evaluation(args: Args, folder: Path) -> Iterator[Row]:
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

    _, ratio = compare(args, lambda: common.evaluate(net, test, run.device), plain)
    yield Row("evaluation", "interpolate, argmax", ratio, least=0.8)


def meta_gradient(args: Args, folder: Path) -> Iterator[Row]:
    """DataRater's mixed mode against reverse mode, which keeps the graph of all T updates."""
    run = start_run(args, folder, datarater)
    settings = datarater.with_lengths(run.args)
    source, few = (datasets.load(settings, role) for role in ("source", "target_few"))
    count = settings.inner_batch * len(settings.augmentations)  # images in an inner batch
    loader = common.Loader(source, count, run.device, "bench")
    photos = common.Loader(few, settings.batch_size, run.device, "bench")(0)
    member = datarater.new_inner_network(run)

    def unroll(batches: list, weights: Tensor) -> None:
        weights = weights.clone().requires_grad_()
        theta, momentum = member.theta().requires_grad_(), member.momentum
        for batch, w in zip(batches, weights, strict=True):
            loss = w @ member.losses(theta, *batch)
            (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
            theta, momentum = datarater.sgd(theta, momentum, gradient, settings)
        torch.autograd.grad(member.losses(theta, *photos).mean(), weights)

    for updates in (2, 16):
        batches = [loader(t) for t in range(updates)]
        weights = torch.full((updates, count), 1 / count, device=run.device)
        mixed = partial(datarater.mixed, member, batches, weights, photos, settings)
        yardstick, name = partial(unroll, batches, weights), f"meta-gradient, T={updates}"
        yield Row(name, "create_graph", compare(args, mixed, yardstick)[1], least=0.9)
        memory = [tensor_memory(run.device, function) for function in (mixed, yardstick)]
        yield Row(f"its memory, {memory[0]:.0f} MB", "create_graph", memory[0] / memory[1])


def reward(args: Args, folder: Path) -> Iterator[Row]:
    """The reward's gradient, with the cross-entropy that anchors it, against that alone."""
    run = start_run(args, folder, reward_opt)
    net, few = run.network(), datasets.load(run.args, "target_few")
    images, labels = common.Loader(few, run.args.batch_size, run.device, "bench")(0)
    rng = common.generator("bench")

    def reward_step() -> None:
        net.train()
        with run.autocast():
            outputs = net(images, aux=True)
        loss, _ = reward_opt.iou_objective(outputs[0], labels, rng)
        loss = run.args.weight * loss + common.segmentation_loss(outputs, labels)
        net.zero_grad()
        loss.backward()

    _, ratio = compare(args, reward_step, partial(training_step, run, net, images, labels))
    yield Row("step with the reward", "cross-entropy step", ratio, least=0.4)


def diffusion(args: Args, folder: Path, steps: int = 40) -> Iterator[Row]:
    """Training of the U-Net, with loaders, noise and average, against the bare U-Net."""
    run = start_run(args, folder, diffusion_bridge)
    source, photos = (datasets.load(run.args, role) for role in ("source", "target_train"))
    config = {"patch": run.args.patch, "width": run.args.width}
    config |= {"classes": list(run.classes), "size": list(run.args.size)}
    bridge = diffusion_bridge.Bridge(config, len(photos)).to(run.device)
    optimizer = torch.optim.AdamW(bridge.unet.parameters(), lr=run.args.unet_lr, fused=True)
    images, labels = common.Loader(source, run.args.batch_size, run.device, "bench")(0)
    x, maps = bridge.encode(images), bridge.class_maps(labels)
    angle, domain = x.new_ones(len(x)), torch.zeros(len(x), dtype=torch.long, device=run.device)
    statistics = diffusion_bridge.appearance(images)

    def method() -> None:
        forget(run)
        diffusion_bridge.train_unet(run, bridge, source, photos, steps)

    def bare_loop() -> None:
        for _ in range(steps):
            with run.autocast():
                loss = F.mse_loss(bridge.unet(x, maps, angle, domain, statistics), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    seconds, ratio = compare(args, method, bare_loop)
    rate = steps * len(x) / seconds
    yield Row(f"diffusion training, {rate:.0f} images/s", "bare loop", ratio, least=0.9)


def start_up(args: Args, folder: Path) -> Iterator[Row]:
    command = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    yardstick = partial(command, [sys.executable, "-c", "import torch, torchvision"])
    for method in benchmark.METHODS:
        show_help = partial(command, [sys.executable, str(ROOT / f"{method}.py"), "--help"])
        _, ratio = compare(args, show_help, yardstick)
        yield Row(f"{method}.py --help", "import torch, torchvision", ratio, least=0.67)


LINES = (training, input_pipeline, evaluation, meta_gradient, reward, diffusion, start_up)


# ---- How cost grows -----------------------------------------------------------------------------
def growth(args: Args, folder: Path) -> None:
    """docs/cost_growth.png: time and memory, with exponents over the three largest amounts."""
    run = start_run(args, folder)
    net, source, size = run.network(), datasets.load(run.args, "source"), run.args.size

    def step(batch_size: int, height: int) -> Callable[[], Any]:
        images = torch.rand(batch_size, 3, height, 2 * height, device=run.device)
        labels = torch.randint(len(run.classes), images[:, 0].shape, device=run.device)
        return partial(training_step, run, net, images, labels)

    def epoch(n: int) -> Callable[[], Any]:
        loader = common.Loader(replace(source, names=source.names[:n]), 4, run.device, "growth")
        return lambda: [loader(k)[0].shape for k in range(n // 4)]

    def evaluate(n: int) -> Callable[[], Any]:
        split = replace(run.test, names=run.test.names[:n], images=run.test.images[:n])
        return lambda: common.evaluate(net, split, run.device)

    batches, heights, counts = (2, 4, 8, 16, 32), (32, 64, 128, 256), (12, 25, 50, 100)
    curves = {  # what grows: what is done, and the function for each amount
        "batch size": ("training step", {n: step(n, size[0]) for n in batches}),
        "image size (px)": ("training step", {2 * h * h: step(4, h) for h in heights}),
        "source images": ("epoch of batches", {4 * n: epoch(4 * n) for n in counts}),
        "test photos": ("evaluation", {n: evaluate(n) for n in counts}),
    }
    figure = common.new_figure(3 * len(curves), 6)
    axes = figure.subplots(2, len(curves))
    for column, (amount, (what, functions)) in enumerate(curves.items()):
        x = list(functions)
        seconds = measure(args, *functions.values()).min(axis=0)  # the quietest round
        memory = [tensor_memory(run.device, function) for function in functions.values()]
        for axis, y, unit in zip(axes[:, column], (seconds, memory), ("s", "MB"), strict=True):
            exponent = np.polyfit(np.log(x[-3:]), np.log(y[-3:]), 1)[0]
            axis.loglog(x, y, marker="o", label=f"{what}, $n^{{{exponent:.2f}}}$")
            axis.loglog(x, y[-1] * np.divide(x, x[-1]), ":", color="grey", label="proportional")
            axis.set(xlabel=amount, ylabel=unit)
            axis.set_xticks(x, [f"{n:,}" for n in x])
            axis.minorticks_off()
            axis.legend(fontsize=7)
            print(f"{what}, {amount}, {unit}: n^{exponent:.2f}", flush=True)
    common.save_figure(figure, ROOT / "docs/cost_growth.png")


# ---- Peak memory of the rows --------------------------------------------------------------------
# Before the redesign (commit 6df5b70), measured in the same way at the default stage lengths.
OLD_MB = (892, 911, 894, 916, 885, 1051, 1070, 971, 904, 1134)


def memory(args: Args, folder: Path) -> None:
    """Most resident memory of each row's process on the CPU."""
    table = Table("row", "MB", "before, MB", "ratio")
    rows = (*benchmark.BASELINES, *benchmark.METHODS)
    for row, old_mb in zip(rows, OLD_MB, strict=True):
        own_script = ["baseline.py", "--row", row]
        script = own_script if row in benchmark.BASELINES else [f"{row}.py"]
        command = [sys.executable, str(ROOT / script[0]), *script[1:], "--steps", "20"]
        command += ["--data", args.data, "--device", "cpu", "--out", str(folder / row)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise UserError(f"{' '.join(command)}: failed")
        mb = usage.ru_maxrss / 1024  # Linux counts in KB
        table.add_row(row, f"{mb:.0f}", f"{old_mb}", f"{mb / old_mb:.2f}")
        print(f"{row}: {mb:.0f} MB, before {old_mb} MB", file=sys.stderr)
    Console().print(table)


# ---- The table ----------------------------------------------------------------------------------
def main(args: Args) -> None:
    lines = {line.__name__: line for line in LINES}
    if set(args.only) - lines.keys():
        raise UserError(f"--only {' '.join(args.only)}: expected names of {' '.join(lines)}")
    table, rows = Table("figure", "yardstick", "speed", "expected", "met"), []
    with tempfile.TemporaryDirectory() as temporary:
        if args.growth or args.memory:
            return (growth if args.growth else memory)(args, Path(temporary))
        for name in args.only or lines:
            for row in lines[name](args, Path(temporary)):
                rows.append(row._asdict())
                expected = "" if row.least is None else f">= {row.least:g}"
                met = "" if row.least is None else "yes" if row.ratio >= row.least else "no"
                cells = (row.figure, row.yardstick, f"{row.ratio:.2f}", expected, met)
                table.add_row(*cells)
                print(*cells, sep=", ", file=sys.stderr, flush=True)
    Console().print(table)
    if args.out:
        datasets.write_json(args.out, {"threads": torch.get_num_threads(), "rows": rows})


if __name__ == "__main__":
    common.main(Args, main, __doc__)
