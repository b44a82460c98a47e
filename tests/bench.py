"""Where the time goes: each figure beside its yardstick, timed side by side in one process.

    python tests/bench.py                                    (some ten minutes on one busy CPU core)

    python tests/bench.py --only training evaluation --out bench.json

    python tests/bench.py --growth                           (writes docs/cost_growth.png)

    python tests/bench.py --memory                  (peak memory of every row, at the full presets)

Not a test: run it by hand, on a machine that does nothing else. A figure and its yardstick take
turns, and the ratio is the median over the rounds, so that a slow minute slows both. Peak memory is
that of tensors, from torch's profiler on the CPU and from its allocator on CUDA. torchmetrics and
higher are yardsticks of two lines, which say so where they are not installed.
"""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image, ImageFilter
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import common
import datarater
import diffusion_bridge
import metasim
import reward_opt

ROOT = Path(common.__file__).parent
SCRIPTS = ("datarater", "metasim", "reward_opt", "adversarial_da", "diffusion_bridge", "benchmark")


@dataclass(frozen=True)
class Args:
    only: tuple[str, ...] = ()
    """Lines to measure: training, training_on_gpu, input_pipeline, caching, confusion, evaluation,
    image_operations, datarater_meta_step, reward_gradient, scenes, diffusion, start_up. Default:
    all."""
    growth: bool = False
    """Instead of the table, how cost grows with the work, as docs/cost_growth.png."""
    memory: bool = False
    """Instead of the table, peak memory of every row at the full presets: on a CPU minutes a row,
    hours in all where it has no instructions for bfloat16. Of the other flags only --device
    counts."""
    out: Path | None = None
    """Write the table as JSON too."""
    data: str = "mini"
    """Folder of the datasets, or 'mini'."""
    benchmark: Literal["vkitti2kitti", "gta52cityscapes"] = "gta52cityscapes"
    """Which pair of them."""
    repeat: int = 7
    """Rounds of every measurement."""
    device: str = "auto"
    """auto, cpu, cuda."""
    net: str | None = None
    """Network. Default: by the data."""
    size: tuple[int, int] | None = None
    """Height and width of the images. Default: by the data."""
    batch_size: int | None = None
    """Images an update. Default: by the data."""
    compile: bool = False
    """torch.compile of the network."""


# ---- Measuring ----------------------------------------------------------------------------------
class Row(NamedTuple):
    """A line of the table: `what` has `ratio` times the rate of `against`, or its cost."""

    what: str
    against: str
    ratio: float | None  # None where there is nothing to compare with: `remark` says why
    asked: str = ""
    met: bool | None = None
    remark: str = ""


def judged(what: str, against: str, ratio: float, *, least: float = 0, most: float = 0) -> Row:
    """A row that is held against a mark: at least this rate, or at most this cost."""
    met, asked = (ratio >= least, f">= {least:g}") if least else (ratio <= most, f"<= {most:g}")
    return Row(what, against, float(ratio), asked, bool(met))


def measure(bench: "Bench", *functions: Callable[[], Any]) -> np.ndarray:
    """Seconds of each function in each round; they take turns. -> [rounds, functions]."""
    times = np.zeros((bench.repeat + 1, len(functions)))
    for row in times:  # the first round warms up
        for k, function in enumerate(functions):
            begin = time.perf_counter()
            function()
            if bench.device.type == "cuda":
                torch.cuda.synchronize(bench.device)
            row[k] = time.perf_counter() - begin
    return times[1:]


def cost(bench: "Bench", figure: Callable[[], Any], yardstick: Callable[[], Any]) -> float:
    """How many times as long as its yardstick the figure takes."""
    mine, other = measure(bench, figure, yardstick).T
    return median(mine / other)


def of_peak(bench: "Bench", what: str, function: Callable[[], Any]) -> Row:
    """Floating-point operations a second of a function, beside those of a large matrix product in
    the precision that it computes in: about what the machine can do."""
    cuda = bench.device.type == "cuda"
    n, dtype = (8192, torch.bfloat16) if cuda and bench.args.amp else (2048, torch.float32)
    factor = torch.randn(n, n, dtype=dtype, device=bench.device)
    with FlopCounterMode(display=False) as counter:
        function()
    operations = counter.get_total_flops()
    mine, product = measure(bench, function, lambda: factor @ factor).T
    share = median(operations / mine / (2 * n**3 / product))
    rate = operations / median(mine) / 1e9
    return Row(f"{what}, {rate:,.0f} GFLOP/s", "matrix product", share)


def peak_memory(bench: "Bench", function: Callable[[], Any]) -> float:
    """Most bytes of tensors that a function has at one time, beyond those that were there before.

    On the CPU the sum of all allocations less the freed ones, as the profiler records them.
    """
    function()  # so that nothing is allocated for the first time
    return allocated(bench.device, function)


def allocated(device: torch.device, function: Callable[[], Any]) -> float:
    """As `peak_memory`, of a function's first call."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(np.cumsum([event.nbytes() for event in events]))


class Loop(common.Run):
    """A run whose files matter to nobody: it writes nothing and evaluates nothing."""

    def __init__(self, args: common.Args) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.classes = common.BENCHMARKS[args.benchmark].classes
        self._pending, self._before, self._stages, self._found = [], 0, {}, {}
        self._inside = False

    @property
    def entered(self) -> list[str]:
        return []  # the same stage may be repeated

    def _write(self, line: dict) -> None: ...

    def _save(self, *_: object) -> None: ...

    def evaluate(self, *_: object) -> None: ...


class Bench:
    """What the lines share: data, a network, a resident batch."""

    def __init__(self, args: common.Args, repeat: int) -> None:
        self.args, self.repeat, self.run = args, repeat, Loop(args)
        self.device, self.classes = self.run.device, len(self.run.classes)

    def of(self, method: Any, **changes: Any) -> Any:
        """A method's Args, with the shared fields as they are here."""
        shared = {f.name: getattr(self.args, f.name) for f in fields(common.Args)}
        return method.Args(**{**shared, **changes})

    @cached_property
    def source(self) -> common.Part:
        return common.load(self.args, "source")

    @cached_property
    def few(self) -> common.Part:
        return common.load(self.args, "target_few")

    @cached_property
    def test(self) -> common.Part:
        return common.load(self.args, "target_test")

    @cached_property
    def net(self) -> common.Network:
        """Trained for a moment, so that its maps have the borders that maps have."""
        net = self.run.network()
        with contextlib.redirect_stdout(None):
            common.train(self.run, net, self.source, 60)
        return net

    @cached_property
    def batch(self) -> common.Batch:
        batch = common.Batches(self.source, self.args.batch_size, 0, self.device)(0)
        return batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))

    def forward_backward(self) -> Tensor:
        with self.run.autocast():
            loss = common.segmentation_loss(
                self.net.train()(self.batch.images, aux=True), self.batch.labels
            )
        self.net.zero_grad()
        loss.backward()
        return loss


# ---- The lines of the table ---------------------------------------------------------------------
def training(b: Bench, steps: int = 30, least: float = 0.92, what: str = "") -> Iterator[Row]:
    """The recipe, with cache, augmentation, schedule and log, against one resident batch."""
    optimizer = torch.optim.AdamW(b.net.parameters(), lr=b.args.lr, fused=True)

    def bare() -> None:
        for _ in range(steps):
            b.forward_backward()
            optimizer.step()

    def supervised() -> None:
        with contextlib.redirect_stdout(None):
            common.train(b.run, b.net, b.source, steps)

    mine, other = measure(b, supervised, bare).T
    rate = steps * b.args.batch_size / median(mine)
    what = what or f"supervised training, {rate:.0f} images/s"
    yield judged(what.format(rate), "bare step", median(other / mine), least=least)
    yield of_peak(b, "its forward-backward", b.forward_backward)


def training_on_gpu(b: Bench) -> Iterator[Row]:
    """The same with BiSeNet at both presets, bfloat16 and channels last on either side."""
    for benchmark in ("vkitti2kitti", "gta52cityscapes"):
        (h, w), batch, _, net, lr = common.PRESETS[benchmark]
        what = f"bisenet {w}x{h} bf16, batch {batch}"
        if b.device.type != "cuda":
            yield Row(what, "bare step", None, ">= 0.95", remark="no GPU")
            continue
        args = replace(b.args, benchmark=benchmark, size=(h, w), batch_size=batch, net=net, lr=lr)
        big, rng = Bench(args, b.repeat), np.random.default_rng(0)
        images = rng.integers(0, 256, (64, h, w, 3), np.uint8)
        labels = rng.integers(0, big.classes, (64, h, w), np.uint8)
        big.source = common.Part(b.source.dataset, tuple(map(str, range(64))), images, labels)
        yield from training(big, 50, 0.95, what + ", {:.0f} images/s")


class Files(torch.utils.data.Dataset):
    """The yardstick of the input pipeline: files opened and resized anew in every epoch."""

    def __init__(self, pairs: list, dataset: str, size: tuple[int, int]) -> None:
        self.pairs, self.dataset, self.size = pairs, dataset, size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        image, label = self.pairs[n]
        pixels = torch.from_numpy(np.array(common.read_image(image, self.size)))
        ids = common.resize_label(common.read_label(label, self.dataset), self.size)
        return pixels.permute(2, 0, 1) / 255, torch.from_numpy(np.array(ids)).long()


def source_pairs(b: Bench) -> list:
    dataset = b.source.dataset
    root = common.dataset_root(b.args.data, dataset)
    return common.list_files(dataset, root, "train", b.args.variants).pairs


def input_pipeline(b: Bench) -> Iterator[Row]:
    files, size = Files(source_pairs(b), b.source.dataset, b.args.size), b.args.batch_size
    loader = torch.utils.data.DataLoader(
        files, size, shuffle=True, num_workers=os.cpu_count(), persistent_workers=True
    )
    batches, epoch = common.Batches(b.source, size, 0, b.device), len(files) // size

    def ours() -> None:
        for step in range(10 * epoch):  # ten epochs, or it is over before it can be timed
            batches(step)

    ratio = 10 / cost(b, ours, lambda: [0 for _ in loader])
    yield judged("input pipeline after an epoch", "DataLoader, Pillow", ratio, least=20)


def caching(b: Bench) -> Iterator[Row]:
    files, shape = [image for image, _ in source_pairs(b)], (*b.args.size, 3)
    read, path = partial(common.read_image, size=b.args.size), common.CACHE / "bench.npy"

    def build() -> None:
        path.unlink(missing_ok=True)  # of the round before: putting a file in another's place waits
        common.build_cache(path, "bench", files, shape, read)

    ratio = 1 / cost(b, build, lambda: [read(file) for file in files])
    path.unlink()
    what = f"first-time caching, {os.cpu_count()} cores"
    yield judged(what, "one decode loop", ratio, least=1.8)


def confusion(b: Bench) -> Iterator[Row]:
    what, size = "confusion matrix, 8 x 1024x512", (512, 1024)
    try:
        from torchmetrics.functional.classification import multiclass_confusion_matrix
    except ImportError:
        yield Row(what, "torchmetrics", None, ">= 2", remark="not installed")
        return
    labels = b.source.labels[np.arange(9) % len(b.source)]
    maps = np.stack([common.resize_label(label, size) for label in labels])
    truth = torch.from_numpy(maps).to(b.device)[:8]
    guess = truth.roll(9, dims=2).where(truth.roll(9, dims=2) < b.classes, 0).short()
    as_it_likes = guess.long(), truth.long()

    def theirs() -> Tensor:
        return multiclass_confusion_matrix(
            *as_it_likes, b.classes, ignore_index=common.IGNORE, validate_args=False
        )

    def ours() -> Tensor:
        return common.confusion_matrices(guess, truth, b.classes).sum(dim=0)

    equal = torch.equal(ours(), theirs())
    row = judged(what, "torchmetrics", 1 / cost(b, ours, theirs), least=2)
    yield row if equal else row._replace(met=False, remark="results differ")


def evaluation(b: Bench) -> Iterator[Row]:
    def against_forward(what: str, net: common.Network, part: common.Part) -> Row:
        net.eval()

        def forward() -> None:
            for start in range(0, len(part), 16):
                common.predict(net, part.images[start : start + 16], b.device, b.args.amp)

        ratio = 1 / cost(b, lambda: common.evaluate(net, part, b.device, b.args.amp), forward)
        return judged(what, "forward passes", ratio, least=0.9)

    yield against_forward("evaluation pass", b.net, b.test)
    # At the full presets, with photos and labels of the official sizes.
    for benchmark, official in (("vkitti2kitti", (375, 1242)), ("gta52cityscapes", (1024, 2048))):
        (h, w), _, _, name, _ = common.PRESETS[benchmark]
        photos = [Image.fromarray(photo).resize((w, h)) for photo in b.test.images[:4]]
        images = np.stack([np.asarray(photo) for photo in photos])
        labels = np.stack([common.resize_label(y, official) for y in b.test.truth.labels[:4]])
        net = common.Network(name, b.classes).to(b.device, memory_format=torch.channels_last)
        with torch.no_grad():  # batch normalisation's statistics, for maps that vary
            net.train()(common.to_tensor(images, b.device))
        part = common.Part(b.test.dataset, b.test.names[:4], images, None)
        vars(part)["truth"] = common.Truth(labels, [official] * 4)
        yield against_forward(f"{name} {w}x{h} to {official[1]}x{official[0]}", net, part)


def image_operations(b: Bench) -> Iterator[Row]:
    """What is done to a batch of images before the network sees it."""
    images, labels = b.batch.images, b.batch.labels
    style = images.flip(0)
    operations = {
        "FDA": lambda rng: common.fourier_transfer(images, style, 0.05),
        "colour transfer": lambda rng: common.color_transfer(images, style),
        "crop and flip": partial(common.crop_flip, images, labels),
        "random augmentation": partial(common.random_augmentation, images),
        **{name: partial(common.AUGMENTATIONS[name], images) for name in common.AUGMENTATIONS},
    }
    del operations["original"]
    for name, operation in operations.items():
        ratio = cost(b, lambda f=operation: f(common.generator(0)), b.forward_backward)
        yield judged(name, "forward-backward", ratio, most=0.15)


def meta_problem(b: Bench, updates: int, **changes: Any) -> tuple:
    """Arguments of `datarater.mixed` and `unroll`: an inner network before its first update."""
    args = datarater.settled(b.of(datarater, inner_updates=updates, **changes))
    net = common.Network(args.net, b.classes).to(b.device).train()
    inner = datarater.newborn(net, args.inner_optimizer)
    batches, rng = common.Batches(b.source, args.inner_batch, 0, b.device), common.generator(0)
    few = common.Batches(b.few, args.batch_size, 0, b.device)(0)

    def batch(t: int) -> tuple[Tensor, Tensor]:
        x = datarater.with_all(args.augmentations, batches(t).images, rng)
        y = batches(t).labels.repeat(len(args.augmentations), 1, 1)
        return datarater.shrunk(x, y, args.shrink)

    inner_batches = [batch(t) for t in range(updates)]
    count = len(inner_batches[0][0])
    weights = torch.full((updates, count), 1 / count, device=b.device)
    photos = datarater.shrunk(few.images, few.labels, args.shrink)
    return datarater.Functional(net), inner, inner_batches, weights, photos, args


def by_higher(problem: tuple) -> Callable[[], Tensor]:
    """The same meta-gradient by the library `higher`, which unrolls a torch optimizer."""
    import higher

    f, _, batches, weights, photos, args = problem
    optimizer = torch.optim.Adam(f.net.parameters(), lr=args.inner_lr)

    def loss(net: nn.Module, batch: tuple) -> Tensor:
        outputs = net(batch[0], aux=True)
        losses = [datarater.image_losses(output, batch[1]) for output in outputs]
        return losses[0] + common.AUX_WEIGHT * sum(losses[1:])

    def step() -> Tensor:
        w = weights.detach().requires_grad_()
        with higher.innerloop_ctx(f.net, optimizer) as (net, inner_optimizer):
            for t, batch in enumerate(batches):
                inner_optimizer.step((w[t] * loss(net, batch)).sum())
            return torch.autograd.grad(loss(net.eval(), photos).mean(), w)[0]

    return step


def datarater_meta_step(b: Bench) -> Iterator[Row]:
    memory = {}
    for updates in (2, 4, 8, 16):
        problem, what = meta_problem(b, updates), f"DataRater meta-step, T={updates}"
        mixed, unroll = (partial(f, *problem) for f in (datarater.mixed, datarater.unroll))
        yield judged(what, "unroll", cost(b, mixed, unroll), most=1.1)
        try:
            theirs = by_higher(problem)
            theirs()
            yield judged(what, "higher", cost(b, mixed, theirs), most=1.1)
        except ImportError:
            yield Row(what, "higher", None, "<= 1.1", remark="not installed")
        memory[updates] = [peak_memory(b, function) for function in (mixed, unroll)]
        what, mb = f"its peak memory, T={updates}", memory[updates][0] / 2**20
        yield Row(f"{what}, {mb:.0f} MB", "unroll", memory[updates][0] / memory[updates][1])
    ratio = memory[16][0] / memory[2][0]
    yield judged("its peak memory, T=16", "T=2", ratio, most=1.25)
    # What grows is a gradient an update, beside maps that grow with the images.
    few, many = (partial(datarater.mixed, *meta_problem(b, t, shrink=1)) for t in (2, 16))
    ratio = peak_memory(b, many) / peak_memory(b, few)
    yield judged("the same, --shrink 1", "T=2", ratio, most=1.25)


def reward_gradient(b: Bench) -> Iterator[Row]:
    args, batch = b.of(reward_opt), b.batch
    weights = torch.ones(b.classes, dtype=torch.float64, device=b.device)
    rng = common.generator(0)

    def step() -> None:
        with b.run.autocast():
            outputs = b.net.train()(batch.images, aux=True)
        loss = args.anchor * common.segmentation_loss(outputs, batch.labels)
        gained, _ = reward_opt.reward_loss(outputs[0], batch.labels, weights, args, rng)
        b.net.zero_grad()
        (loss + args.weight * gained).backward()

    ratio = cost(b, step, b.forward_backward)
    yield judged("counterfactual reward step", "cross-entropy step", ratio, most=2.5)


def composed(roads: metasim.Roads, graphs: Any, v: dict[str, Tensor], n: int) -> tuple:
    """Scene n of `Roads.render` as one would write it with Pillow: image and label map."""
    h, w = roads.size
    p = {name: value[n].tolist() for name, value in v.items()}
    base, horizon = int(graphs.picture[n, 0]), float(roads.horizon[graphs.picture[n, 0]])
    zoom, angle = 2 ** -p["zoom"][0], np.deg2rad(p["roll"][0])
    c, s = zoom * np.cos(angle), zoom * np.sin(angle)
    map_ = (c, -s, w / 2 * (1 + p["shift_x"][0] - c) + s * h / 2,
            s, c, h / 2 * (1 + p["shift_y"][0] - c) - s * w / 2)  # fmt: skip
    affine = partial(Image.Image.transform, size=(w, h), method=Image.Transform.AFFINE, data=map_)
    image = affine(Image.fromarray(roads.part.images[base]), resample=Image.Resampling.BILINEAR)
    label = affine(Image.fromarray(roads.part.labels[base]), fillcolor=common.IGNORE)
    objects = []
    for k, asset in enumerate(graphs.picture[n, 2:].tolist()):
        if asset >= 0:
            x, y, half_w, half_h = roads.cut_outs.box[asset].tolist()
            near = 2 ** -p["distance"][k]
            scale, foot = near * 2 ** p["size"][k], horizon + (y + half_h) * near
            objects.append((foot, k, asset, x, half_w * scale, half_h * scale, near))
    for foot, k, asset, x, half_w, half_h, near in sorted(objects):  # the nearest last
        bw, bh = (roads.cut_outs.box[asset, 2:] * torch.tensor([w, h])).round().int().tolist()
        rgba = roads.cut_outs.rgba[asset, :, :bh, :bw].permute(1, 2, 0).numpy()
        size = (max(1, round(half_w * w)), max(1, round(half_h * h)))
        cut = Image.fromarray(np.ascontiguousarray(rgba)).resize(size, Image.Resampling.BILINEAR)
        flip = float(graphs.flip[n, 2 + k])
        cut = cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip < 0 else cut
        light, mask = 2 ** p["brightness"][k], cut.getchannel("A")
        place = (round((flip * x * near + p["lateral"][k] + 1 - half_w) * w / 2),
                 round((foot + 1) * h / 2 - size[1]))  # fmt: skip
        image.paste(cut.convert("RGB").point(lambda u, light=light: u * light), place, mask)
        solid = mask.point(lambda u: 255 * (u > 127))
        label.paste(int(roads.cut_outs.classes[asset]), place, solid)
    # Haze, tone, blur and noise, on this one image.
    below = (np.linspace(-1, 1, h) - horizon).clip(0) / (1 - horizon)
    clear = np.exp(-p["haze"][0] / (1 + 6 * below))[:, None, None]
    x = np.asarray(image, np.float32) / 255 * clear + (1 - clear) * 2 ** p["airlight"][0]
    x = torch.from_numpy(x).float().permute(2, 0, 1)[None]
    x = metasim.retone(x, torch.cat([v[name][n : n + 1] for name in metasim.TONE], dim=1))
    image = Image.fromarray(metasim.to_bytes(x.clamp(0, 1))[0])
    image = Image.blend(image, image.filter(ImageFilter.GaussianBlur(1)), p["blur"][0])
    noise = np.random.default_rng(n).standard_normal((h, w, 3), np.float32) * 2 ** p["noise"][0]
    return (np.asarray(image, np.float32) / 255 + noise).clip(0, 1), np.asarray(label)


def scenes(b: Bench) -> Iterator[Row]:
    args, count = b.of(metasim), 32  # as many as it renders at a time
    roads = metasim.Roads(b.source, args, b.device)
    graphs = roads.sample(count, common.generator(0))
    values = graphs.values.to(b.device)
    v = {name: value.cpu() for name, value in roads.grammar.read(values).items()}
    with torch.no_grad():
        one_by_one = partial(lambda: [composed(roads, graphs, v, n) for n in range(count)])
        ratio = 1 / cost(b, lambda: roads.render(graphs, values), one_by_one)
    yield judged("Meta-Sim scenes", "Pillow, one by one", ratio, least=10)


def diffusion(b: Bench, steps: int = 4) -> Iterator[Row]:
    args = b.of(diffusion_bridge, unet_steps=steps, sample_steps=8)
    run, db, photos = Loop(args), diffusion_bridge, replace(b.few, labels=np.array(b.few.labels))
    config = {"patch": args.patch, "latent": 0, "width": args.width, "size": list(args.size),
              "classes": list(run.classes)}  # fmt: skip
    bridge = db.Bridge(config, len(photos)).to(b.device)
    optimizer = torch.optim.AdamW(bridge.unet.parameters(), lr=args.unet_lr, fused=True)
    images, labels = b.batch.images, b.batch.labels
    x, maps = bridge.space.encode(images), bridge.maps(labels)
    look = bridge.look(db.looks(images), torch.ones(len(x), len(db.LOOKS), device=b.device))
    domain, angle = torch.zeros(len(x), dtype=torch.long, device=b.device), x.new_ones(len(x))

    def bare_training() -> None:
        for _ in range(steps):
            with run.autocast():
                loss = F.mse_loss(bridge.unet(x, angle, domain, maps, look).float(), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.inference_mode()
    def bare_sampling() -> None:
        for _ in range(2 * args.sample_steps):  # there and back
            bridge.unet(x, angle, domain, maps, look)

    ratio = 1 / cost(b, lambda: db.train_unet(run, bridge, b.source, photos), bare_training)
    yield judged("diffusion training step", "bare U-Net step", ratio, least=0.9)
    yield of_peak(b, "bare U-Net step", bare_training)
    names = [str(n) for n in range(len(x))]
    sampling = partial(bridge.translate, images, labels, names, args, 0)
    ratio = 1 / cost(b, sampling, bare_sampling)
    yield judged("diffusion sampling", "bare U-Net passes", ratio, least=0.9)


def start_up(b: Bench) -> Iterator[Row]:
    """Another script in every round, so that the median is over all of them."""
    scripts = iter(SCRIPTS * (b.repeat + 1))
    call = partial(subprocess.run, check=True, stdout=subprocess.DEVNULL)
    ratio = cost(
        b,
        lambda: call([sys.executable, str(ROOT / f"{next(scripts)}.py"), "--help"]),
        lambda: call([sys.executable, "-c", "import torch, torchvision"]),
    )
    yield judged("start-up, --help", "import torch, torchvision", ratio, most=1.5)


LINES = (
    training, training_on_gpu, input_pipeline, caching, confusion, evaluation, image_operations,
    datarater_meta_step, reward_gradient, scenes, diffusion, start_up,
)  # fmt: skip


# ---- The table ----------------------------------------------------------------------------------
def main(args: Args) -> None:
    unknown = set(args.only) - {line.__name__ for line in LINES}
    if unknown:
        names = " ".join(line.__name__ for line in LINES)
        sys.exit(f"error: --only {' '.join(unknown)}: expected some of {names}")
    if args.repeat < 1:
        sys.exit(f"error: --repeat {args.repeat}: expected at least 1")
    if args.memory:
        import memory

        return memory.show(args.device)
    shared = ("data", "benchmark", "device", "net", "size", "batch_size", "compile")
    own = common.Args(**{key: getattr(args, key) for key in shared})
    own = common.resolve(own, "bench")
    b = Bench(own, args.repeat)
    if args.growth:
        import growth

        return growth.draw(b, ROOT / "docs/cost_growth.png")
    rows, table = [], Table(box=box.SIMPLE_HEAD, width=80)
    for column, align in (("what", "left"), ("against", "left"), ("ratio", "right"),
                          ("asked", "right"), ("met", "left")):  # fmt: skip
        table.add_column(column, justify=align)
    for line in LINES:
        if args.only and line.__name__ not in args.only:
            continue
        for row in line(b):
            rows.append(row)
            ratio = row.remark or f"{row.ratio:.2f}"
            met = {None: "", True: "yes", False: "no"}[row.met]
            table.add_row(row.what, row.against, ratio, row.asked, met)
            print(f"{row.what}, against {row.against}: {ratio} {row.asked} {met}", file=sys.stderr)
    cuda = b.device.type == "cuda"
    name = torch.cuda.get_device_name(b.device) if cuda else f"{torch.get_num_threads()} threads"
    Console().print(f"{own.net} {own.size} batch {own.batch_size} on {own.device}, {name}")
    Console().print(table)
    if args.out:
        lines = [row._asdict() for row in rows]
        settings = {**asdict(args), **asdict(own), "out": args.out}
        common.write_json(args.out, {"args": settings, "device": name, "rows": lines})


if __name__ == "__main__":
    main(tyro.cli(Args, prog=Path(__file__).name, description=common.wrapped(__doc__)))
