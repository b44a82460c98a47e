"""Runs every method on the same splits of VKITTI to KITTI and GTA5 to Cityscapes; prints the table.

    python benchmark.py                                  (about 5 minutes on two CPU cores)

    python benchmark.py --seeds 0 1 2                    (mean and standard deviation over seeds)

    python benchmark.py --data /datasets                 (real data; see the README for its layout)

Every row is a run of its own, in a fresh process: what one row does, or how it fails, never touches
another. A finished row is not run again unless its arguments change or --force is given.
"""

import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass, fields, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

import common
from common import BENCHMARKS, Result, UserError

# ---- Baselines ----------------------------------------------------------------------------------
Baseline = Literal["source_only", "random_aug", "few_label", "oracle"]


@dataclass(frozen=True)
class BaselineArgs(common.Args):
    row: Baseline = "source_only"
    """source_only: trained on the source as it is. random_aug: each source image as it is, blurred,
    colour-jittered or RGB-shifted at random. few_label: source_only, then fine-tuned on the
    labelled target photos. oracle: trained on the target's training part with all its labels."""
    finetune: float = 0.5
    """few_label: the share of --steps that is spent on the labelled photos."""
    finetune_lr: float = 0.5
    """few_label: initial learning rate of the fine-tuning, as a multiple of --lr."""


def run_baseline(args: BaselineArgs) -> Result:
    if not 0 < args.finetune <= 1 or not args.finetune_lr > 0:
        raise UserError("--finetune must lie in 0 to 1, --finetune-lr above 0")
    run = common.Run(args, args.row)
    if run.result:
        return run.result
    args, net = run.args, run.network()
    if args.row == "oracle":
        photos = common.load(args, "target_train")
        common.train(run, net, photos, args.steps)
        return run.finish(net, target_labels=len(photos))
    tuning = max(1, round(args.steps * args.finetune)) if args.row == "few_label" else 0
    done = 0
    if not args.checkpoint:
        augment = common.random_augmentation if args.row == "random_aug" else common.original
        done = args.steps - tuning
        source, more = common.load(args, "source"), tuning > 0
        common.train(run, net, source, done, "source", augment, more=more)
    if tuning:
        few = common.load(args, "target_few")
        common.train(run, net, few, tuning, "few", lr=args.lr * args.finetune_lr)
    return run.finish(net, target_labels=args.labelled if tuning else 0, steps=done + tuning)


# ---- Rows ---------------------------------------------------------------------------------------
BASELINES = ("source_only", "random_aug", "few_label", "oracle")
METHODS = ()  # modules with Args and run, one name each


@dataclass(frozen=True)
class Args:
    data: str = "mini"
    """Folder that holds vkitti2/, kitti/, gta5/, cityscapes/ (those of the benchmarks that are
    run); 'mini' is the procedural miniature, written under data/mini where it is not there yet."""
    benchmarks: tuple[Literal["vkitti2kitti", "gta52cityscapes"], ...] = tuple(BENCHMARKS)
    """Benchmarks to run."""
    methods: tuple[str, ...] = (*BASELINES, *METHODS)
    """Rows of the table."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every row. With more than one the table says mean and standard deviation (n - 1)."""
    out: Path = Path("runs")
    """Folder of the run folders, of results.json, results.md and figures/."""
    devices: tuple[str, ...] = ("auto",)
    """Devices that rows run on side by side, one row each: cuda:0 cuda:1."""
    force: bool = False
    """Run finished rows again."""
    steps: int | None = None
    """Updates of every row's segmentation network. Default: by the data, 400 for the miniature."""
    batch_size: int | None = None
    """Images an update. Default: by the data, 16 for the miniature."""
    size: tuple[int, int] | None = None
    """Height and width of the training images in pixels, multiples of 32. Default: by the data,
    64 128 for the miniature."""
    net: Literal["tiny", "bisenet", "lraspp", "deeplab"] | None = None
    """Segmentation network. Default: tiny for the miniature, else bisenet."""
    lr: float | None = None
    """Initial learning rate of AdamW. Default: 0.005 for the miniature, else 0.001."""
    pretrained: bool = False
    """Start every network's backbone from torchvision's ImageNet weights; nothing is downloaded,
    the error says where to put the file."""
    variants: tuple[str, ...] = ("clone",)
    """VKITTI2's weather and camera variants to train on."""
    amp: bool = True
    """bfloat16 autocast, on CUDA only."""
    compile: bool = False
    """torch.compile of the segmentation networks."""
    labelled: int = 16
    """Labelled target photos that a row may use."""


@dataclass(frozen=True)
class Row:
    """One run to do: a method on a benchmark with a seed. `args` are resolved."""

    method: str
    args: Any


SHARED = [f.name for f in fields(Args) if f.name in common.Args.__dataclass_fields__]


def rows_of(args: Args) -> list[Row]:
    """Every run of the table, in the table's order; UserError where the arguments cannot run."""
    known = (*BASELINES, *METHODS)
    for flag in ("benchmarks", "methods", "seeds", "devices"):
        values = getattr(args, flag)
        if not values or len(set(values)) < len(values):
            raise UserError(
                f"--{flag} {' '.join(map(str, values))}: expected one or more, each once"
            )
    for name in args.methods:
        if name not in known:
            raise UserError(f"--methods {name}: expected some of {' '.join(known)}")
    for device in args.devices:
        common.check_device(device)
    flags = {name: getattr(args, name) for name in SHARED if name != "out"}
    flags |= {"resume": not args.force, "device": args.devices[0]}
    rows = []
    for benchmark in args.benchmarks:
        for seed in args.seeds:
            for method in args.methods:
                out = args.out / benchmark / method / f"seed{seed}"
                own = {**flags, "benchmark": benchmark, "seed": seed, "out": out}
                if method in BASELINES:
                    one = BaselineArgs(**own, row=method)
                else:
                    one = importlib.import_module(method).Args(**own)
                rows.append(Row(method, common.resolve(one, method)))
    return rows


def run_row(row: Row, log: Path, pipe: Connection) -> None:
    """Runs in a process of its own. What it prints goes to the log, its outcome to the pipe."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=end_with_parent, daemon=True).start()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        run = run_baseline if row.method in BASELINES else importlib.import_module(row.method).run
        pipe.send(run(row.args))
    except KeyboardInterrupt:
        pipe.send("interrupted")
    except Exception as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        pipe.send(first if isinstance(error, UserError) else f"{type(error).__name__}: {first}")


def end_with_parent() -> None:
    """A row whose benchmark was killed ends as on Ctrl-C, lest a second one joins it."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)


class Job:
    """A row in its process. `outcome` is a Result, or a line that says why there is none."""

    def __init__(self, row: Row, device: str, root: Path) -> None:
        self.row, self.device, self.outcome = row, device, None
        args = replace(row.args, device=device) if device != "auto" else row.args
        name = f"{args.benchmark}-{row.method}-seed{args.seed}.log"
        self.log = root / "logs" / name
        self.log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")  # no memory, RNG or CUDA state is shared
        self.pipe, end = context.Pipe(duplex=False)
        task = replace(row, args=args), self.log, end
        self.process = context.Process(target=run_row, args=task)
        # While it imports torch it ignores Ctrl-C, which would print a traceback.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process.start()
        signal.signal(signal.SIGINT, handler)
        end.close()

    def ended(self) -> bool:
        if not self.pipe.poll() and self.process.is_alive():
            return False
        try:
            self.outcome = self.pipe.recv()
        except EOFError:
            self.process.join()
            code = self.process.exitcode
            self.outcome = f"killed by signal {-code}" if code < 0 else f"exit status {code}"
            self.outcome += " (out of memory?)" * (code == -signal.SIGKILL)
        self.process.join()
        return True

    def progress(self) -> str:
        """The last step in the run's scalars, of how many."""
        try:
            with (self.row.args.out / "scalars.json").open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
                last = file.read().splitlines()[-1]
            return f"{json.loads(last)['step']}/{self.row.args.steps}"
        except (FileNotFoundError, IndexError, json.JSONDecodeError):
            return "starts"


def run_rows(rows: list[Row], args: Args, console: Console) -> list[Result]:
    """Runs what is not finished yet, a row on each device at a time. results.json is always true to
    what has ended so far."""
    results: dict[int, Result] = {}
    for i, row in enumerate(rows):
        if result := common.finished(row.args, row.method):
            results[i] = result
    waiting, jobs = [i for i in range(len(rows)) if i not in results], {}
    if results:
        console.print(f"{len(results)} of {len(rows)} rows are finished already")
    free, interrupted = list(args.devices), False
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while waiting or jobs:
                while waiting and free:
                    i = waiting.pop(0)
                    jobs[i] = Job(rows[i], free.pop(), args.out)
                for i, job in [(i, job) for i, job in jobs.items() if job.ended()]:
                    del jobs[i]
                    free.append(job.device)
                    results[i] = as_result(job)
                    report(results[i], job, console)
                    write_results(args.out, results)
                live.update(live_table(rows, results, jobs), refresh=True)
                time.sleep(0.2)
        except KeyboardInterrupt:
            interrupted = True
            for job in jobs.values():  # each saves its step and ends
                job.process.terminate()
                job.process.join(60)
    write_results(args.out, results)
    if interrupted:
        raise KeyboardInterrupt(f"after {len(results)} of {len(rows)} rows")
    return [results[i] for i in range(len(rows))]


def as_result(job: Job) -> Result:
    if isinstance(job.outcome, Result):
        return job.outcome
    args = job.row.args
    return Result(args.benchmark, job.row.method, args.seed, status="failed", error=job.outcome)


def report(result: Result, job: Job, console: Console) -> None:
    """A line for a row that has ended."""
    name = f"{result.benchmark} {result.method} seed {result.seed}"
    if result.status == "finished":
        console.print(f"{name}: {result.miou:.1f} mIoU in {result.seconds:.0f} s", highlight=False)
    else:
        console.print(f"[red]{name}: {escape(result.error)}[/red] (see {job.log})", soft_wrap=True)


def write_results(out: Path, results: dict[int, Result]) -> None:
    common.write_json(out / "results.json", [asdict(results[i]) for i in sorted(results)])


# ---- Tables -------------------------------------------------------------------------------------
def spread(values: list[float]) -> str:
    """Mean, and the standard deviation (n - 1) where there is more than one value."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def cell(results: list[Result]) -> str:
    """mIoU over seeds, or the reason why a seed failed."""
    failed = [r for r in results if r.status != "finished"]
    return f"failed: {failed[0].error}" if failed else spread([r.miou for r in results])


def main_table(results: list[Result], args: Args) -> list[list[str]]:
    """Header and rows: methods by benchmarks."""
    headers = [f"{BENCHMARKS[b].source} → {BENCHMARKS[b].target}" for b in args.benchmarks]
    table = [["method", "target labels", *headers, "updates", "seconds", "MB"]]
    for method in args.methods:
        mine = [r for r in results if r.method == method]
        ok = [r for r in mine if r.status == "finished"]
        cells = [cell([r for r in mine if r.benchmark == b]) for b in args.benchmarks]
        labels = "/".join(dict.fromkeys(str(r.target_labels) for r in ok))
        updates = "/".join(dict.fromkeys(f"{r.steps:,}" for r in ok))
        seconds = f"{mean(r.seconds for r in ok):,.0f}" if ok else ""
        memory = f"{max(r.peak_memory_mb for r in ok):,.0f}" if ok else ""
        table.append([method, labels, *cells, updates, seconds, memory])
    return table


def class_table(results: list[Result], args: Args, benchmark: str) -> list[list[str]]:
    """Header and rows: classes by methods, IoU in percent, mean over seeds."""
    ok = [r for r in results if r.benchmark == benchmark and r.status == "finished"]
    methods = [m for m in args.methods if any(r.method == m for r in ok)]
    table = [["class", *methods]]
    for name in BENCHMARKS[benchmark].classes:
        ious = [[r.iou[name] for r in ok if r.method == m] for m in methods]
        table.append([name, *("-" if i[0] is None else f"{mean(i):.1f}" for i in ious)])
    table.append(["mIoU", *(f"{mean(r.miou for r in ok if r.method == m):.1f}" for m in methods)])
    return table


def notes(results: list[Result], args: Args) -> list[str]:
    """What has to be said below the table."""
    failed = [r for r in results if r.status != "finished"]
    lines = [f"failed: {r.benchmark} {r.method} seed {r.seed}: {r.error}" for r in failed]
    for benchmark in args.benchmarks:
        ok = [r for r in results if r.benchmark == benchmark and r.status == "finished"]
        absent = [name for name, value in ok[0].iou.items() if value is None] if ok else []
        if absent:
            named = ", ".join(absent)
            lines.append(f"{benchmark}: no test photo contains {named}; left out of the mean.")
        sides = BENCHMARKS[benchmark][:2]
        if small := [side for side in sides if common.is_miniature(args.data, side)]:
            named = " and ".join(small)
            lines.append(f"{named}: the miniature; not to be read beside published numbers.")
    lines.append("updates: of the segmentation network. seconds: mean. MB: peak memory.")
    return lines


def show(table: list[list[str]], title: str, console: Console) -> None:
    view = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    view.add_column(table[0][0], no_wrap=True)
    for header in table[0][1:]:
        view.add_column(header, justify="right", overflow="fold")
    for row in table[1:]:  # the reason of a failure needs a line of its own: see `notes`
        view.add_row(*(escape(cell.split(": ")[0]) for cell in row))
    console.print(view)


def markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    return "\n".join(lines)


def live_table(rows: list[Row], results: dict[int, Result], jobs: dict[int, Job]) -> Table:
    """Methods by benchmarks while they run."""
    benchmarks = list(dict.fromkeys(row.args.benchmark for row in rows))
    view = Table("method", *benchmarks)
    for method in dict.fromkeys(row.method for row in rows):
        cells = []
        for benchmark in benchmarks:
            mine = [
                i for i, r in enumerate(rows) if (r.method, r.args.benchmark) == (method, benchmark)
            ]
            done = [results[i] for i in mine if i in results]
            running = [f"[yellow]{jobs[i].progress()}[/yellow]" for i in mine if i in jobs]
            cells.append(" ".join(([cell(done)] if done else []) + running) or "[dim]waits[/dim]")
        view.add_row(method, *cells)
    return view


def draw(results: list[Result], rows: list[Row], args: Args, console: Console) -> None:
    """figures/BENCHMARK.png: test photos, ground truth, and the first seed's predictions."""
    for benchmark in args.benchmarks:
        networks = {}
        for row, result in zip(rows, results, strict=True):
            first = (benchmark, args.seeds[0])
            if result.status == "finished" and (row.args.benchmark, row.args.seed) == first:
                net = common.Network(row.args.net, len(BENCHMARKS[benchmark].classes))
                try:
                    common.load_weights(net, row.args.out / "checkpoint.pt")
                except UserError as error:  # its number stands; the figure does without it
                    console.print(f"not drawn: {error}", markup=False, soft_wrap=True)
                    continue
                networks[row.method] = net
                test = common.load(row.args, "target_test")
        if networks:
            common.draw_predictions(args.out / f"figures/{benchmark}.png", test, networks)


def main(args: Args) -> None:
    console = Console()
    rows = rows_of(args)
    results = run_rows(rows, args, console)
    titled = [("mIoU in percent", main_table(results, args))]
    titled += [(f"{b}, IoU in percent", class_table(results, args, b)) for b in args.benchmarks]
    for title, table in titled[1:] + titled[:1]:  # the one that matters stands last
        show(table, title, console)
    for line in notes(results, args):
        console.print(line, highlight=False, markup=False, soft_wrap=line.startswith("failed"))
    text = "\n\n".join(f"## {title}\n\n{markdown(table)}" for title, table in titled)
    with common.replacing(args.out / "results.md") as temporary:
        temporary.write_text("\n\n".join([text, *notes(results, args)]) + "\n")
    draw(results, rows, args, console)
    console.print(f"written: {args.out}/results.json, results.md, figures/", highlight=False)
    if any(result.status != "finished" for result in results):
        sys.exit(1)


if __name__ == "__main__":
    common.main(Args, main, __doc__)
