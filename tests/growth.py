"""How time and memory grow with the work: `python tests/bench.py --growth` draws it."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import Bench, measure, meta_problem, peak_memory
from rich import box
from rich.console import Console
from rich.table import Table

import common
import datarater
import reward_opt

# Amounts of work, and what makes the function that does so much of it.
Curve = tuple[Sequence[int], Callable[[int], Callable[[], Any]]]


def training_step(b: Bench, kind: str, classes: int, pixels: int) -> Callable[[], Any]:
    """On four random images twice as wide as high, by cross-entropy or by the reward."""
    rng, args, height = common.generator(0), b.of(reward_opt), round((pixels / 2) ** 0.5)
    images = torch.rand(4, 3, height, 2 * height, generator=rng).to(b.device)
    labels = torch.randint(classes, (4, height, 2 * height), generator=rng).to(b.device)
    net = common.Network("tiny", classes).to(b.device, memory_format=torch.channels_last)
    weights = torch.ones(classes, dtype=torch.float64, device=b.device)

    def step() -> None:
        logits = net(images)
        if kind == "cross-entropy step":
            loss = common.segmentation_loss([logits], labels)
        else:
            loss, _ = reward_opt.reward_loss(logits, labels, weights, args, rng)
        loss.backward()

    return step


def curves(b: Bench) -> dict[str, dict[str, Curve]]:
    """By what grows and by what is done."""
    cpu, steps = torch.device("cpu"), ("cross-entropy step", "reward step")
    b.net.eval()

    def epoch(n: int) -> Callable[[], Any]:
        part = replace(b.source, names=b.source.names[:n])
        batches = common.Batches(part, 4, 0, cpu)
        return lambda: deque(map(batches, range(n // 4)), maxlen=0)

    def evaluation(n: int) -> Callable[[], Any]:
        test = b.test
        part = replace(test, names=test.names[:n], test_files=test.test_files[:n])
        return lambda: common.evaluate(b.net, part, b.device)

    def meta_step(kind: Callable, updates: int, labelled: int = 16) -> Callable[[], Any]:
        few = Bench(replace(b.args, labelled=labelled), b.repeat)
        return partial(kind, *meta_problem(few, updates))

    amounts, heights, classes = (1, 2, 4, 8, 16), (32, 64, 128, 256), (5, 10, 20, 40, 80)
    return {
        "images": {
            "epoch of batches": ((50, 100, 200, 400), epoch),
            "evaluation pass": ((12, 25, 50, 100), evaluation),
        },
        "pixels": {
            step: ([2 * h * h for h in heights], partial(training_step, b, step, b.classes))
            for step in steps
        },
        "classes": {
            step: (classes, lambda c, s=step: training_step(b, s, c, 64 * 128)) for step in steps
        },
        "T, inner updates": {
            "mixed": (amounts, partial(meta_step, datarater.mixed)),
            "unroll": (amounts, partial(meta_step, datarater.unroll)),
        },
        "labelled photos": {
            "DataRater meta-step": ((2, 4, 8, 16, 32), partial(meta_step, datarater.mixed, 2))
        },
    }


def draw(b: Bench, path: Path) -> None:
    """Time and memory against amounts of work, with their exponents over the three greatest."""
    from matplotlib.figure import Figure

    found = curves(b)
    figure = Figure(figsize=(3 * len(found), 6), layout="constrained")
    axes = figure.subplots(2, len(found))
    table = Table("what grows", "cost of", "seconds", "memory", box=box.SIMPLE_HEAD)
    for column, (amount, lines) in enumerate(found.items()):
        for name, (x, make) in lines.items():
            functions = [make(n) for n in x]
            seconds = measure(b, *functions).min(axis=0)  # the quietest round
            memory = [peak_memory(b, function) / 2**20 for function in functions]
            exponents = []
            for axis, y in zip(axes[:, column], (seconds, memory), strict=True):
                exponents.append(np.polyfit(np.log(x[-3:]), np.log(y[-3:]), 1)[0])
                line = axis.loglog(x, y, marker="o", label=f"{name}, $n^{{{exponents[-1]:.2f}}}$")
                linear = y[-1] * np.divide(x, x[-1])  # what is proportional to the work
                axis.loglog(x, linear, ":", color=line[0].get_color())
            table.add_row(amount, name, *(f"n^{e:.2f}" for e in exponents))
        for axis, label in zip(axes[:, column], ("seconds", "MB of tensors"), strict=True):
            axis.set(xlabel=amount, ylabel=label if column == 0 else "")
            axis.set_xticks(x, [f"{n:,}" for n in x])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7, frameon=False)
    common.save_figure(figure, path)
    Console().print(table)
