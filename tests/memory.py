"""Peak memory of every row at the full presets: `python tests/bench.py --memory` prints it.

Each row is run from beginning to end on a fifth of the miniature's images, at the full presets'
size, batch and network, a few updates of each stage. On CUDA the peak is what the allocator had. On
the CPU it is computed from the same tensors, with bfloat16 autocast in training: what a card needs
besides (its context, cuDNN's workspaces, fragments) is not in it, and what would stay in the host's
memory (cut-outs, images before they are moved, saved stages) is.
"""

import contextlib
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench import allocated
from rich import box
from rich.console import Console
from rich.table import Table

import benchmark
import common
import miniature

SHORT = {  # where a row has more stages than the network's training
    "datarater": {"meta_steps": 1, "warm_up": 2, "compare": False},
    "metasim": {"scenes": 32, "reconstruct_steps": 2, "match_steps": 2, "feature_steps": 2},
    "diffusion_bridge": {"unet_steps": 2, "reader_steps": 2, "sample_steps": 2},
}
ROWS = {row: (row, {}) for row in (*benchmark.BASELINES, *benchmark.METHODS)}
ROWS["adversarial_da --align output"] = ("adversarial_da", {"align": "output"})
ROWS["adversarial_da --self-train"] = ("adversarial_da", {"self_train": True})


def autocast(run: common.Run) -> torch.autocast:
    """As on CUDA, on any device."""
    return torch.autocast(run.device.type, torch.bfloat16, enabled=run.args.amp)


def peak(row: str, name: str, folder: Path, device: str, **flags: Any) -> float:
    """GB (10^9 bytes) of a row's tensors at the full preset of a benchmark."""
    preset = common.PRESETS[name]._asdict() | {"steps": 4}
    shared = {"benchmark": name, "data": str(folder / "mini"), "device": device, **preset}
    with tempfile.TemporaryDirectory(dir=folder) as out:
        shared["out"] = Path(out) / "run"
        if row in benchmark.BASELINES:
            function, args = benchmark.run_baseline, benchmark.BaselineArgs(row=row, **shared)
        else:
            module = importlib.import_module(row)
            function, args = module.run, module.Args(**shared, **SHORT.get(row, {}), **flags)
        with contextlib.redirect_stdout(None):
            return allocated(torch.device(device), lambda: function(args)) / 1e9


def show(device: str) -> None:
    common.Run.autocast = autocast
    table = Table("row", *(f"{b}, GB" for b in common.BENCHMARKS), box=box.SIMPLE_HEAD)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        common.CACHE = folder / "cache"
        miniature.write(folder / "mini", scale=0.2)
        args = common.Args(data=str(folder / "mini"), device=device)
        device = common.resolve(args, "memory").device
        for title, (row, flags) in ROWS.items():
            found = [peak(row, name, folder, device, **flags) for name in common.BENCHMARKS]
            table.add_row(title, *(f"{value:.1f}" for value in found))
            print(title, *(f"{value:.1f}" for value in found), file=sys.stderr)
    cuda = device.startswith("cuda")
    where = torch.cuda.get_device_name(device) if cuda else "computed on the CPU"
    Console().print(f"most memory of tensors at a time, bfloat16 autocast, {where}", table)
