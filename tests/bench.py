"""Where the time goes: each figure beside its yardstick, timed side by side in one process.

    python tests/bench.py [--data DIR] [--benchmark gta52cityscapes]

Not a test: run it by hand, on a machine that does nothing else. Medians of alternating repetitions.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import tyro
from rich import box
from rich.console import Console
from rich.table import Table

import common


@dataclass(frozen=True)
class Args:
    data: str = "mini"
    """Folder of the datasets, or 'mini'."""
    benchmark: Literal["vkitti2kitti", "gta52cityscapes"] = "gta52cityscapes"
    """Which pair of them."""
    repeat: int = 7
    """Repetitions of every measurement."""
    steps: int = 30
    """Updates in one repetition."""
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


def seconds(device: torch.device, *functions: Callable[[], None], repeat: int) -> list[float]:
    """Median time of each function; they take turns, so that a slow minute slows all of them."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repeat + 1):  # the first round warms up
        for function, mine in zip(functions, times, strict=True):
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            mine.append(time.perf_counter() - begin)
    return [median(mine[1:]) for mine in times]


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


def main(bench: Args) -> None:
    shared = {k: getattr(bench, k) for k in ("data", "benchmark", "device", "net", "size")}
    shared |= {"batch_size": bench.batch_size, "compile": bench.compile}
    args = common.resolve(common.Args(**shared), "bench")
    args = replace(args, steps=bench.steps)
    run, source = Loop(args), common.load(args, "source")
    device, net = run.device, run.network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr, fused=True)
    batch = common.Batches(source, args.batch_size, 0, device)(0)
    images = batch.images.contiguous(memory_format=torch.channels_last)

    def bare() -> None:
        """Forward, backward, step on one resident batch."""
        net.train()
        for _ in range(args.steps):
            with run.autocast():
                loss = common.segmentation_loss(net(images, aux=True), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    def supervised() -> None:
        """The recipe: batches from the cache, augmentation, schedule, log."""
        common.train(run, net, source, args.steps)

    def forward() -> None:
        net.eval()
        for start in range(0, len(test), 16):
            common.predict(net, test.images[start : start + 16], device, args.amp)

    test = common.load(args, "target_test")
    labels = [common.read_label(label, test.dataset) for _, label in test.test_files]
    shape = min((label.shape for label in labels), key=lambda s: s[0] * s[1])
    truth = torch.stack([torch.from_numpy(x[: shape[0], : shape[1]]) for x in labels[:16]])
    truth = truth.to(device)
    net.eval()
    logits = common.predict(net, test.images[: len(truth)], device)
    guess = common.upsample(logits, shape).max(dim=1).indices.short()  # as `evaluate` does

    def metric() -> None:
        """The confusion matrices of the whole test set, and the IoUs."""
        for _ in range(0, len(test), 16):
            counts = common.confusion_matrices(guess, truth, len(run.classes))
        common.scores(counts.sum(dim=0).cpu().numpy())

    t_bare, t_train = seconds(device, bare, supervised, repeat=bench.repeat)
    t_pass, t_forward, t_metric = seconds(
        device,
        lambda: common.evaluate(net, test, device, args.amp),
        forward,
        metric,
        repeat=bench.repeat,
    )
    pixels = args.steps * args.batch_size
    table = Table("what", "figure", "yardstick", "ratio", box=box.SIMPLE_HEAD)
    table.add_row(
        "supervised training, against bare forward-backward-step",
        f"{pixels / t_train:.0f} images/s",
        f"{pixels / t_bare:.0f} images/s",
        f"{t_bare / t_train:.3f}",
    )
    table.add_row(
        "metric, against the evaluation pass",
        f"{1000 * t_metric:.1f} ms",
        f"{1000 * t_pass:.1f} ms",
        f"{t_metric / t_pass:.3f}",
    )
    table.add_row(
        "evaluation pass, against forward passes alone",
        f"{len(test) / t_pass:.0f} images/s",
        f"{len(test) / t_forward:.0f} images/s",
        f"{t_forward / t_pass:.3f}",
    )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device}"
    Console().print(f"{args.net} {args.size} batch {args.batch_size} on {name}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
