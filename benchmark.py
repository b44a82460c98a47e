"""Runs every method on the same splits of VKITTI to KITTI and GTA5 to Cityscapes; prints the table.

    python benchmark.py                                  (18 minutes on two CPU cores)

    python benchmark.py --seeds 0 1 2                    (mean and standard deviation over seeds)

    python benchmark.py --data /datasets                 (real data; see the README for its layout)

Every row is a run of its own, in a fresh process: what one row does, or how it fails, never touches
another. A finished row is not run again unless its arguments change or --force is given.
"""

import importlib
import json
import multiprocessing
import os
import shlex
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

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

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
# Modules with Args and run, and what each hands to the next method of a combination: the training
# set that it has made, or the checkpoint of its network. A new method is one more line.
METHODS: dict[str, Literal["set", "checkpoint"]] = {
    "datarater": "set",
    "metasim": "set",
    "reward_opt": "checkpoint",
    "adversarial_da": "checkpoint",
    "diffusion_bridge": "set",
}  # fmt: skip


@dataclass(frozen=True)
class Args:
    data: str = "mini"
    """Folder that holds vkitti2/, kitti/, gta5/, cityscapes/ (those of the benchmarks that are
    run); 'mini' is the procedural miniature, written under data/mini where it is not there yet."""
    benchmarks: tuple[Literal["vkitti2kitti", "gta52cityscapes"], ...] = tuple(BENCHMARKS)
    """Benchmarks to run."""
    methods: tuple[str, ...] = (*BASELINES, *METHODS)
    """Rows of the table."""
    combine: tuple[str, ...] = ()
    """More rows: methods joined by +, each of which starts from what the one before it hands on,
    a training set (datarater, metasim, diffusion_bridge) or a network (the others):
    diffusion_bridge+adversarial_da."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every row. With more than one the table says mean and standard deviation (n - 1)."""
    out: Path = Path("runs")
    """Folder of the run folders, of results.json, results.md and figures/."""
    devices: tuple[str, ...] = ("auto",)
    """Devices that rows run on side by side, one row each: cuda:0 cuda:1."""
    jobs: int = 1
    """Rows side by side on each device; on a CPU they share its cores."""
    timeout: float | None = None
    """Seconds after which a row is given up. Default: never."""
    force: bool = False
    """Run finished rows again."""
    rows_only: bool = False
    """Run the rows and write no table: for jobs side by side, before --collect."""
    print_jobs: bool = False
    """Print a shell command for every row and stop: for SLURM arrays, GNU parallel."""
    collect: tuple[Path, ...] = ()
    """Make the table of the finished run folders below these folders, and run nothing."""
    curves: tuple[Path, ...] = ()
    """Draw the curves of these run folders, or of MMSegmentation's scalars.json, and stop."""
    networks: bool = False
    """Measure size and speed of every network at the benchmarks' sizes, and stop."""
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
    """One run: a method, or methods joined by +, on a benchmark with a seed."""

    name: str
    args: Any  # of its last method, resolved; its --init is filled in when its turn comes

    @property
    def module(self) -> str:
        return self.name.rpartition("+")[2]

    @property
    def before(self) -> str:
        """Name of the row that this one starts from; empty where it starts anew."""
        return self.name.rpartition("+")[0]

    @property
    def key(self) -> tuple[str, int, str]:
        return self.args.benchmark, self.args.seed, self.name


SHARED = [f.name for f in fields(Args) if f.name in common.Args.__dataclass_fields__]


def names_of(args: Args) -> list[str]:
    """The table's rows in order: a combination follows on all that it starts from."""
    names = list(args.methods)
    for chain in args.combine:
        parts = chain.split("+")
        names += ["+".join(parts[: k + 1]) for k in range(len(parts))]
    return list(dict.fromkeys(names))


def check(args: Args) -> None:
    """UserError where the arguments cannot run."""
    known = (*BASELINES, *METHODS)
    for flag in ("benchmarks", "methods", "seeds", "devices"):
        values = getattr(args, flag)
        if not values or len(set(values)) < len(values):
            raise UserError(
                f"--{flag} {' '.join(map(str, values))}: expected one or more, each once"
            )
    for flag in ("methods", "combine"):
        for name in getattr(args, flag):
            parts = name.split("+")
            if (len(parts) > 1) != (flag == "combine") or not set(parts) <= set(known):
                joined = ", joined by +" if flag == "combine" else ""
                raise UserError(f"--{flag} {name}: expected some of {' '.join(known)}{joined}")
            if len(parts) > 1 and "oracle" in parts:
                raise UserError(f"--combine {name}: the oracle's labels are no method's")
    if args.jobs < 1 or (args.timeout is not None and args.timeout <= 0):
        raise UserError("--jobs and --timeout: expected numbers above 0")
    for device in args.devices:
        common.check_device(device)


def rows_of(args: Args) -> list[Row]:
    """Every run of the table, in the table's order; UserError where the arguments cannot run."""
    check(args)
    flags = {name: getattr(args, name) for name in SHARED if name != "out"}
    flags |= {"resume": not args.force, "device": args.devices[0]}
    rows = []
    for benchmark in args.benchmarks:
        for seed in args.seeds:
            for name in names_of(args):
                out = args.out / benchmark / name / f"seed{seed}"
                own = {**flags, "benchmark": benchmark, "seed": seed, "out": out}
                module = name.rpartition("+")[2]
                if module in BASELINES:
                    one = BaselineArgs(**own, row=module)
                else:
                    one = importlib.import_module(module).Args(**own)
                rows.append(Row(name, common.resolve(one, name)))
    return rows


def following(row: Row, before: Row) -> Row:
    """`row`, which starts from what `before` has written."""
    made = "set" if METHODS.get(before.module) == "set" else "checkpoint.pt"
    return replace(row, args=replace(row.args, init=before.args.out / made))


def joined(row: Row, result: Result, before: Result | None) -> Result:
    """The result as the table has it: a combination costs what its parts cost together."""
    result = replace(result, method=row.name)
    if before is None or "failed" in (result.status, before.status):
        return result
    if METHODS.get(row.before.rpartition("+")[2]) != "set":  # the same network was trained on
        result = replace(result, steps=before.steps + result.steps)
    return replace(
        result,
        target_labels=max(before.target_labels, result.target_labels),
        seconds=before.seconds + result.seconds,
        peak_memory_mb=max(before.peak_memory_mb, result.peak_memory_mb),
        beside=", ".join(filter(None, [before.beside, result.beside])),
    )


# ---- Running ------------------------------------------------------------------------------------
def run_row(row: Row, log: Path, pipe: Connection, threads: int | None) -> None:
    """Runs in a process of its own. What it prints goes to the log, its outcome to the pipe."""
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=end_with_parent, daemon=True).start()
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        if threads:
            torch.set_num_threads(threads)
        run = run_baseline if row.module in BASELINES else importlib.import_module(row.module).run
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

    def __init__(self, row: Row, device: str, root: Path, threads: int | None) -> None:
        self.row, self.device, self.outcome = row, device, None
        self.began = time.monotonic()
        args = replace(row.args, device=device) if device != "auto" else row.args
        self.log = root / "logs" / f"{args.benchmark}-{row.name}-seed{args.seed}.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("spawn")  # no memory, RNG or CUDA state is shared
        self.pipe, end = context.Pipe(duplex=False)
        task = replace(row, args=args), self.log, end, threads
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

    def overdue(self, timeout: float | None) -> bool:
        """Whether it has run for longer than `timeout` seconds; it is then ended."""
        if timeout is None or time.monotonic() - self.began < timeout:
            return False
        self.process.terminate()  # it saves its step and ends, unless it hangs
        self.process.join(10)
        self.process.kill()
        self.process.join()
        self.outcome = f"given up after --timeout {timeout:g} s"
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

    def result(self) -> Result:
        return self.outcome if isinstance(self.outcome, Result) else failure(self.row, self.outcome)


def failure(row: Row, why: str) -> Result:
    return Result(row.args.benchmark, row.name, row.args.seed, status="failed", error=why)


def run_rows(rows: list[Row], args: Args, console: Console) -> list[Result]:
    """Runs what is not finished yet, --jobs rows on each device at a time. results.json is always
    true to what has ended so far."""
    place = {row.key: i for i, row in enumerate(rows)}
    before = [place[(*row.key[:2], row.before)] if row.before else None for row in rows]
    results: dict[int, Result] = {}

    def settle(i: int, result: Result) -> None:
        results[i] = joined(rows[i], result, results.get(before[i]))

    for i, row in enumerate(rows):  # a row stands behind the one that it starts from
        if before[i] is not None and before[i] not in results:
            continue
        row = row if before[i] is None else following(row, rows[before[i]])
        if result := common.finished(row.args, row.module):
            settle(i, result)
    waiting = [i for i in range(len(rows)) if i not in results]
    if results:
        console.print(f"{len(results)} of {len(rows)} rows are finished already")
    free, jobs, interrupted = list(args.devices) * args.jobs, {}, False
    threads = max(1, os.cpu_count() // len(free)) if len(free) > 1 else None
    with Live(console=console, auto_refresh=False, transient=True) as live:
        try:
            while waiting or jobs:
                for i in list(waiting):
                    row, first = rows[i], results.get(before[i])
                    if first and first.status == "failed":
                        waiting.remove(i)
                        why = f"{row.before} failed"
                        settle(i, failure(row, why))
                        report(results[i], "", console)
                    elif free and (first or before[i] is None):
                        waiting.remove(i)
                        row = row if before[i] is None else following(row, rows[before[i]])
                        jobs[i] = Job(row, free.pop(0), args.out, threads)
                for i, job in list(jobs.items()):
                    if job.ended() or job.overdue(args.timeout):
                        del jobs[i]
                        free.append(job.device)
                        settle(i, job.result())
                        report(results[i], f" (see {job.log})", console)
                        write_results(args, results)
                live.update(live_table(rows, results, jobs), refresh=True)
                time.sleep(0.2)
        except KeyboardInterrupt:
            interrupted = True
            for job in jobs.values():  # each saves its step and ends
                job.process.terminate()
            for job in jobs.values():
                job.process.join(60)
    write_results(args, results)
    if interrupted:
        raise KeyboardInterrupt(f"after {len(results)} of {len(rows)} rows")
    return [results[i] for i in range(len(rows))]


def report(result: Result, where: str, console: Console) -> None:
    """A line for a row that has ended."""
    name = f"{result.benchmark} {result.method} seed {result.seed}"
    if result.status == "finished":
        line = f"{name}: {result.miou:.1f} mIoU in {result.seconds:.0f} s"
        console.print(line, highlight=False, soft_wrap=True)
    else:
        console.print(f"[red]{name}: {escape(result.error)}[/red]{where}", soft_wrap=True)


def write_results(args: Args, results: dict[int, Result]) -> None:
    if not args.rows_only:
        rows = [asdict(results[i]) for i in sorted(results)]
        common.write_json(args.out / "results.json", rows)


def live_table(rows: list[Row], results: dict[int, Result], jobs: dict[int, Job]) -> Table:
    """Methods by benchmarks while they run."""
    benchmarks = list(dict.fromkeys(row.args.benchmark for row in rows))
    view = Table("method", *benchmarks)
    for name in dict.fromkeys(row.name for row in rows):
        cells = []
        for benchmark in benchmarks:
            mine = [
                i for i, r in enumerate(rows) if (r.name, r.args.benchmark) == (name, benchmark)
            ]
            done = [results[i] for i in mine if i in results]
            running = [f"[yellow]{jobs[i].progress()}[/yellow]" for i in mine if i in jobs]
            cells.append(
                " ".join(([escape(cell(done))] if done else []) + running) or "[dim]waits[/dim]"
            )
        view.add_row(folded(name), *cells)
    return view


def shell_commands(args: Args) -> list[str]:
    """A command for every row that runs it alone. A comment stands before the rows that start from
    those above it: jobs between two comments may run side by side."""
    keep = ["out", *SHARED, "timeout"]
    flags: list[str] = []
    for name in dict.fromkeys(keep):
        value = getattr(args, name)
        if value != Args.__dataclass_fields__[name].default:
            flag = name.replace("_", "-")
            if isinstance(value, bool):
                flags.append(f"--{'' if value else 'no-'}{flag}")
            else:
                flags += [f"--{flag}", *map(str, value if isinstance(value, tuple) else [value])]
    lines = []
    names = sorted(names_of(args), key=lambda name: name.count("+"))
    for depth in range(max(name.count("+") for name in names) + 1):
        lines += ["# when all of these have ended:"] if depth else []
        for benchmark in args.benchmarks:
            for seed in args.seeds:
                for name in (n for n in names if n.count("+") == depth):
                    row = ["--methods", name.split("+")[0]]
                    row += ["--combine", name] if depth else []
                    device = args.devices[len(lines) % len(args.devices)]
                    row += ["--devices", device] if device != "auto" else []
                    row += ["--benchmarks", benchmark, "--seeds", str(seed), *flags]
                    lines.append(shlex.join([sys.executable, __file__, "--rows-only", *row]))
    return lines


def collected(args: Args) -> tuple[list[Row], list[Result]]:
    """The finished run folders below --collect, in the table's order.

    UserError where there are none, one is there twice, or two of a benchmark do not compare.
    """
    found: dict[tuple[str, int, str], tuple[Row, Result, dict[str, Any]]] = {}
    for folder in args.collect:
        for path in sorted(folder.resolve().glob("**/seed*/result.json")):
            if path.parent.name.endswith(".old"):
                continue
            try:
                result = Result(**json.loads(path.read_text()))
            except (ValueError, TypeError) as error:
                raise UserError(f"{path}: damaged, or of another version ({error})") from error
            config = common.read_config(path.parent)
            if config is None or path.parts[-4] != result.benchmark:
                raise UserError(f"{path.parent}: not a run folder of {result.benchmark}/METHOD/")
            own = {k: config[k] for k in ("benchmark", "seed", "net", "steps")}
            own["data"] = config["data"] if args.data == "mini" else args.data
            one = common.Args(**own, size=tuple(config["size"]), out=path.parent)
            row = Row(path.parts[-3], one)
            if row.key in found:
                raise UserError(f"{path.parent}: the same row as {found[row.key][0].args.out}")
            found[row.key] = row, result, config
    same = ("steps", "batch_size", "size", "net", "lr", "pretrained", "files", "test_files")
    for row, _, config in found.values():
        first, _, wanted = next(f for f in found.values() if f[0].key[0] == row.key[0])
        for name in same:
            if config.get(name) != wanted.get(name):
                what = f"{name} {config.get(name)}, and {first.args.out} {wanted.get(name)}"
                raise UserError(f"{row.args.out}: has {what}; these do not compare")
    if not found:
        raise UserError(f"--collect {' '.join(map(str, args.collect))}: no finished run folder")
    known = [*BASELINES, *METHODS]
    order = sorted(
        {key[2] for key in found},
        key=lambda n: (n.count("+"), known.index(n) if n in known else 99, n),
    )
    rows, results, done = [], [], {}
    for benchmark in BENCHMARKS:
        for seed in sorted({key[1] for key in found}):
            for name in order:
                if (key := (benchmark, seed, name)) in found:
                    row, result, _ = found[key]
                    before = benchmark, seed, row.before
                    if row.before and before not in found:
                        raise UserError(f"{row.args.out}: {row.before} is not below --collect")
                    done[key] = joined(row, result, done.get(before))  # parents are sorted first
                    rows.append(row)
                    results.append(done[key])
    return rows, results


# ---- Statistics ---------------------------------------------------------------------------------
def mious(confusion: np.ndarray) -> np.ndarray:
    """mIoU in percent over the classes that the truth has. [...,C,C] -> [...]."""
    hit = np.diagonal(confusion, axis1=-2, axis2=-1)
    truth = confusion.sum(axis=-1)
    union = truth + confusion.sum(axis=-2) - hit
    present = truth > 0
    ratio = np.where(present, hit / np.maximum(union, 1), 0.0)
    return 100 * ratio.sum(axis=-1) / present.sum(axis=-1)


def interval(
    method: np.ndarray, baseline: np.ndarray | None = None, draws: int = 2000
) -> tuple[float, float, float]:
    """Difference of mIoU from the baseline's, and its 95% interval over test images and seeds.

    method, baseline: confusion matrices [S,N,C,C] of the same S seeds and N images, which keeps
    the comparison paired; without a baseline, of the mIoU itself. -> mean, low, high in percent.

    The images are bootstrapped. Three seeds are too few to be: resampled, they would claim far too
    narrow an interval, so Student's t with S - 1 degrees of freedom is added to the draws of the
    images, at what the seeds' spread has beyond that of finitely many images, which these draws
    hold already. One seed says nothing about others: images alone.
    """
    seeds, images, classes = method.shape[:3]
    rng = np.random.default_rng(0)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=draws)  # [D,N]
    weights = np.vstack([np.ones(images), weights])  # the first is the estimate itself

    def resampled(confusion: np.ndarray) -> np.ndarray:
        flat = np.moveaxis(confusion, 1, 0).reshape(images, -1).astype(np.float64)  # [N,SCC]
        return mious((weights @ flat).reshape(draws + 1, seeds, classes, classes))  # [D+1,S]

    values = resampled(method) - (0 if baseline is None else resampled(baseline))
    estimate, deviations = values[0].mean(), values[1:] - values[1:].mean(axis=0)  # [D,S]
    drawn = deviations.mean(axis=1)
    if seeds > 1:
        variance = values[0].var(ddof=1) - deviations.var(axis=1, ddof=1).mean()
        drawn = drawn + (max(0, variance) / seeds) ** 0.5 * rng.standard_t(seeds - 1, size=draws)
    low, high = estimate + np.quantile(drawn, [0.025, 0.975])
    return float(estimate), float(low), float(high)


class Scores:
    """What the tables ask of the rows that have finished."""

    def __init__(self, rows: list[Row], results: list[Result]) -> None:
        self.rows, self.results = rows, results
        self.names = list(dict.fromkeys(row.name for row in rows))
        self.benchmarks = list(dict.fromkeys(row.args.benchmark for row in rows))
        self._kept: dict[tuple[str, ...], tuple[float, float, float] | None] = {}

    def of(self, name: str, benchmark: str | None = None) -> list[Result]:
        """The results of a method."""
        wanted = (benchmark,) if benchmark else self.benchmarks
        return [r for r in self.results if r.method == name and r.benchmark in wanted]

    def ok(self, name: str, benchmark: str | None = None) -> list[Result]:
        """Those that finished."""
        return [r for r in self.of(name, benchmark) if r.status == "finished"]

    def miou(self, name: str, benchmark: str) -> float | None:
        ok = self.ok(name, benchmark)
        return mean(r.miou for r in ok) if ok else None

    def difference(
        self, benchmark: str, name: str, baseline: str | None
    ) -> tuple[float, float, float] | None:
        """`interval` of the seeds that both have; None where there is none."""
        key = (benchmark, name, baseline or "")
        if key not in self._kept:
            mine, theirs = (self._confusions(benchmark, n) for n in (name, baseline or name))
            seeds = sorted(set(mine) & set(theirs))
            pair = [np.stack([c[s] for s in seeds]) for c in (mine, theirs)] if seeds else []
            self._kept[key] = interval(pair[0], pair[1] if baseline else None) if pair else None
        return self._kept[key]

    def _confusions(self, benchmark: str, name: str) -> dict[int, np.ndarray]:
        """[N,C,C] of each seed."""
        folders = {row.key: row.args.out for row in self.rows}
        seeds = [r.seed for r in self.ok(name, benchmark)]
        paths = {s: folders[(benchmark, s, name)] / "confusion.npy" for s in seeds}
        return {s: np.load(path) for s, path in paths.items() if path.exists()}

    def gap(self, name: str, benchmark: str) -> float | None:
        """Share of the way from source_only to the oracle, in percent."""
        low, high, mine = (self.miou(n, benchmark) for n in ("source_only", "oracle", name))
        if None in (low, high, mine) or high <= low:
            return None
        return 100 * (mine - low) / (high - low)

    def labels(self, name: str) -> str:
        return "/".join(dict.fromkeys(str(r.target_labels) for r in self.ok(name)))


# ---- Tables -------------------------------------------------------------------------------------
def spread(values: list[float]) -> str:
    """Mean, and the standard deviation (n - 1) where there is more than one value."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def cell(results: list[Result]) -> str:
    """mIoU over seeds, or the reason why a seed failed."""
    failed = [r for r in results if r.status != "finished"]
    if failed:
        return f"failed: {failed[0].error}"
    return spread([r.miou for r in results]) if results else ""


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}%"


def signed(difference: tuple[float, float, float] | None) -> str:
    return "" if difference is None else "{:+.1f} [{:.1f}, {:.1f}]".format(*difference)


def main_table(scores: Scores) -> list[list[str]]:
    """Header and rows: methods by benchmarks."""
    sides = [BENCHMARKS[b] for b in scores.benchmarks]
    table = [
        ["method", "target labels", *(f"{s.source} → {s.target}" for s in sides), "gap closed"]
    ]
    for name in scores.names:
        gaps = [scores.gap(name, b) for b in scores.benchmarks]
        closed = percent(mean(gaps) if gaps and None not in gaps else None)
        cells = [cell(scores.of(name, b)) for b in scores.benchmarks]
        table.append([name, scores.labels(name), *cells, closed])
    return table


def blocks(scores: Scores, benchmark: str) -> dict[str, list[list[str]]]:
    """Tables by title: the rows without target labels, read against source_only, and those with,
    read against few_label too."""
    tables = {}
    for title, baselines, wanted in (
        ("no target labels", ("source_only",), lambda labels: labels == 0),
        ("with target labels", ("few_label", "source_only"), lambda labels: labels > 0),
    ):
        table = [["method", "mIoU", *(f"over {b}" for b in baselines), "gap"]]
        for name in scores.names:
            ok = scores.ok(name, benchmark)
            if ok and wanted(ok[0].target_labels):
                against = [
                    "" if b == name else signed(scores.difference(benchmark, name, b))
                    for b in baselines
                ]
                many = f" ({ok[0].target_labels})" if ok[0].target_labels else ""
                closed = percent(scores.gap(name, benchmark))
                table.append([name + many, spread([r.miou for r in ok]), *against, closed])
        if len(table) > 1:
            tables[f"{benchmark}, {title}"] = table
    return tables


def cost_table(scores: Scores) -> list[list[str]]:
    """Header and rows: what each method spends, over benchmarks and seeds."""
    table = [["method", "updates", "besides", "seconds", "MB"]]
    for name in scores.names:
        if ok := scores.ok(name):
            updates = "/".join(dict.fromkeys(f"{r.steps:,}" for r in ok))
            beside = "; ".join(dict.fromkeys(filter(None, (r.beside for r in ok))))
            seconds, memory = mean(r.seconds for r in ok), max(r.peak_memory_mb for r in ok)
            table.append([name, updates, beside, f"{seconds:,.0f}", f"{memory:,.0f}"])
    return table


def class_table(scores: Scores, benchmark: str) -> list[list[str]]:
    """Header and rows: classes by methods, IoU in percent, mean over seeds."""
    names = [n for n in scores.names if scores.ok(n, benchmark)]
    table = [["class", *names]]
    for label in BENCHMARKS[benchmark].classes:
        ious = [[r.iou[label] for r in scores.ok(n, benchmark)] for n in names]
        table.append([label, *("-" if i[0] is None else f"{mean(i):.1f}" for i in ious)])
    table.append(["mIoU", *(f"{scores.miou(n, benchmark):.1f}" for n in names)])
    return table


def notes(scores: Scores, args: Args) -> list[str]:
    """What has to be said below the table."""
    failed = [r for r in scores.results if r.status != "finished"]
    lines = [f"failed: {r.benchmark} {r.method} seed {r.seed}: {r.error}" for r in failed]
    for benchmark in scores.benchmarks:
        ok = [r for r in scores.results if r.benchmark == benchmark and r.status == "finished"]
        absent = [name for name, value in ok[0].iou.items() if value is None] if ok else []
        if absent:
            named = ", ".join(absent)
            lines.append(f"{benchmark}: no test photo contains {named}; left out of the mean.")
        sides = BENCHMARKS[benchmark][:2]
        data = next(row.args.data for row in scores.rows if row.args.benchmark == benchmark)
        if small := [side for side in sides if common.is_miniature(data, side)]:
            named = " and ".join(small)
            lines.append(f"{named}: the miniature; not to be read beside published numbers.")
    over = "test images and seeds" if len({r.seed for r in scores.results}) > 1 else "test images"
    lines.append(
        f"over: difference [95% interval, paired bootstrap over {over}]. gap: share of the way "
        "from source_only to the oracle. updates: of the segmentation network."
    )
    return lines


def folded(name: str) -> str:
    """A combination on a line for each of its methods."""
    return name.replace("+", "+\n")


def show(table: list[list[str]], title: str, console: Console) -> None:
    """Prints a table, in parts where it is too wide for the console. Where a row failed stands
    just that: the reason needs a line of its own, see `notes`."""
    header, *rows = table
    cells = [[folded(name) for name in header]]
    cells += [[folded(first), *(c.split(": ")[0] for c in rest)] for first, *rest in rows]
    widths = [
        max(len(line) for c in column for line in c.split("\n"))
        for column in zip(*cells, strict=True)
    ]
    parts, width = [[0]], widths[0]
    for j, own in enumerate(widths[1:], start=1):
        if len(parts[-1]) > 1 and width + own + 2 > console.width:
            parts.append([0])
            width = widths[0]
        parts[-1].append(j)
        width += own + 2  # two blanks between columns, none at the edges
    for k, columns in enumerate(parts):
        tight = {"show_edge": False, "pad_edge": False, "collapse_padding": True}
        view = Table(box=box.SIMPLE_HEAD, **tight)
        if k == 0:
            console.print(f"\n[italic]{escape(title)}[/]")
        else:
            console.print()
        for j in columns:
            justify = "right" if j else "left"
            view.add_column(escape(cells[0][j]), justify=justify, overflow="fold")
        for row in cells[1:]:
            view.add_row(*(escape(row[j]) for j in columns))
        console.print(view)


def markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in table]
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    return "\n".join(lines)


# ---- Figures ------------------------------------------------------------------------------------
def draw_bars(scores: Scores, path: Path) -> None:
    """mIoU of every row with its 95% interval; rows with target labels are hatched."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    from matplotlib.patches import Patch

    lines = max(2, 1 + max(name.count("+") for name in scores.names))
    figure = Figure(figsize=(9, 1.2 + 0.15 * lines * len(scores.names)), layout="constrained")
    axes = figure.subplots(1, len(scores.benchmarks), squeeze=False)[0]
    for axis, benchmark in zip(axes, scores.benchmarks, strict=True):
        names = [n for n in scores.names if scores.ok(n, benchmark)]
        for k, name in enumerate(names):
            labels = scores.ok(name, benchmark)[0].target_labels
            value, low, high = scores.difference(benchmark, name, None) or (
                (scores.miou(name, benchmark),) * 3
            )
            axis.barh(k, value, color="C0" if labels == 0 else "C1", alpha=0.75)
            axis.plot([low, high], [k, k], color="black", linewidth=1.5)
            axis.text(high + 0.8, k, f"{value:.1f}", va="center", fontsize=8)
        axis.set_yticks(range(len(names)), [folded(n) for n in names], fontsize=8)
        axis.invert_yaxis()
        axis.set(xlabel="mIoU (%)", xlim=(0, None), title=benchmark)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    handles = [Patch(color=c, alpha=0.75, label=t) for c, t in LABEL_COLOURS]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    common.save_figure(figure, path)


LABEL_COLOURS = (("C0", "no target labels"), ("C1", "with target labels"))


def draw_costs(scores: Scores, path: Path) -> None:
    """Accuracy against cost: mIoU over the seconds of a row, points numbered as in the legend."""
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(4.8 * len(scores.benchmarks), 5), layout="constrained")
    axes = figure.subplots(1, len(scores.benchmarks), squeeze=False)[0]
    for axis, benchmark in zip(axes, scores.benchmarks, strict=True):
        for k, name in enumerate(scores.names, start=1):
            if ok := scores.ok(name, benchmark):
                x, y = mean(r.seconds for r in ok), scores.miou(name, benchmark)
                color = "C0" if ok[0].target_labels == 0 else "C1"
                axis.plot(x, y, "o", color=color, markersize=12, alpha=0.6)
                axis.text(x, y, k, fontsize=8, ha="center", va="center")
        axis.set(xscale="log", xlabel="seconds", ylabel="mIoU (%)", title=benchmark)
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.margins(x=0.1, y=0.1)
        axis.grid(alpha=0.3)
    dots = [Line2D([], [], marker="o", ls="", color=c, alpha=0.6) for c, _ in LABEL_COLOURS]
    texts = [title for _, title in LABEL_COLOURS]
    dots += [Line2D([], [], ls="")] * len(scores.names)
    texts += [f"{k}  {name}" for k, name in enumerate(scores.names, start=1)]
    figure.legend(dots, texts, loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    common.save_figure(figure, path)


def draw_sheets(scores: Scores, args: Args, console: Console) -> None:
    """figures/BENCHMARK.png: test photos, ground truth, and the first seed's predictions."""
    for benchmark in scores.benchmarks:
        networks, test, first = {}, None, None
        for row, result in zip(scores.rows, scores.results, strict=True):
            first = row.args.seed if first is None else first
            if result.status == "finished" and row.key[:2] == (benchmark, first):
                net = common.Network(row.args.net, len(BENCHMARKS[benchmark].classes))
                try:
                    common.load_weights(net, row.args.out / "checkpoint.pt")
                except UserError as error:  # its number stands; the figure does without it
                    console.print(f"not drawn: {error}", markup=False, soft_wrap=True)
                    continue
                networks[folded(row.name)] = net
                test = test or common.load(row.args, "target_test")
        if networks:
            common.draw_predictions(args.out / f"figures/{benchmark}.png", test, networks)


# ---- Curves of any run --------------------------------------------------------------------------
def read_curve(path: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's scalars.json, or of MMSegmentation's (work_dir/TIME/vis_data)."""
    own = path / "scalars.json"
    found = (
        [path] if path.is_file() else [own] if own.exists() else list(path.glob("**/scalars.json"))
    )
    if len(found) != 1:
        raise UserError(f"{path}: {len(found)} files scalars.json in it, expected one")
    lines = []
    for number, line in enumerate(found[-1].read_text().splitlines(), start=1):
        try:
            lines += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise UserError(f"{found[-1]}, line {number}: not JSON ({error.msg})") from error
    if not all(isinstance(line, dict) and "step" in line for line in lines):
        raise UserError(f"{found[-1]}: expected JSON lines with a step each")
    return lines


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over a centred window, cut at the ends. [N] -> [N]."""
    kernel = np.ones((min(window, len(values)) - 1) // 2 * 2 + 1)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def draw_curves(args: Args, console: Console) -> None:
    """curves/: loss.csv and metrics.csv of each run, and one figure of all: loss; mIoU at each
    evaluation, smoothed, with its regression line over the steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss_axis, miou_axis = figure.subplots(1, 2)
    seen: set[str] = set()
    table = [["run", "points", "last mIoU", "best", "per 1,000 steps"]]
    for k, path in enumerate(args.curves):
        lines = read_curve(path)
        whole = path.resolve().with_suffix("") if path.is_file() else path.resolve()
        name = "/".join(whole.parts[-3:])
        name = name if name not in seen else "/".join(whole.parts[1:])
        seen.add(name)
        common.write_csvs(args.out / "curves" / name.replace("/", "-"), lines)
        for axis, key in ((loss_axis, "loss"), (miou_axis, "mIoU")):
            points = np.array([[line["step"], line[key]] for line in lines if key in line])
            if len(points) == 0:
                continue
            steps, values = points.T
            window = max(3, len(values) // 10)
            axis.plot(steps, values, "." if key == "mIoU" else "-", color=f"C{k}", alpha=0.4)
            axis.plot(steps, smooth(values, window), color=f"C{k}", label=name)
            if key == "mIoU":
                slope = ""
                if len(set(steps)) > 1:
                    line = np.polynomial.Polynomial.fit(steps, values, 1)
                    axis.plot(steps, line(steps), "--", color=f"C{k}", linewidth=1)
                    slope = f"{1000 * line.convert().coef[-1]:+.2f}"
                table.append(
                    [name, str(len(values)), f"{values[-1]:.1f}", f"{values.max():.1f}", slope]
                )
    loss_axis.set(xlabel="step", ylabel="loss (nats)")
    miou_axis.set(xlabel="step", ylabel="mIoU (%): evaluations, smoothed, regression")
    for axis in (loss_axis, miou_axis):
        axis.grid(alpha=0.3)
    loss_axis.legend(fontsize=7)
    common.save_figure(figure, args.out / "curves/curves.png")
    show(table, "mIoU over training", console)
    console.print(f"written: {args.out}/curves/", highlight=False)


# ---- Size and speed of the networks -------------------------------------------------------------
def measure(args: common.Args, pipe: Connection) -> None:
    """Size and speed of a network, in a process of its own, so that its memory is its own."""
    device = torch.device(args.device)
    net = common.Network(args.net, len(BENCHMARKS[args.benchmark].classes)).eval()
    net.to(device, memory_format=torch.channels_last)
    on = args.amp and device.type == "cuda"
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=on):
        images = torch.rand(args.batch_size, 3, *args.size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        with FlopCounterMode(display=False) as counter:
            net(images[:1])

        def times(x: torch.Tensor) -> np.ndarray:
            """Seconds of at least 10 passes and 3 seconds of them, 100 at most; after warm-up."""
            taken: list[float] = []
            while len(taken) < 13 or (sum(taken) < 3 and len(taken) < 103):
                begin = time.perf_counter()
                net(x)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                taken.append(time.perf_counter() - begin)
            return np.array(taken[3:])

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        single, batch = times(images[:1]), times(images)
    pipe.send(
        {
            "parameters": sum(p.numel() for p in net.parameters()),
            "gflops": counter.get_total_flops() / 1e9,
            "median_ms": 1000 * float(np.median(single)),
            "p95_ms": 1000 * float(np.quantile(single, 0.95)),
            "images_per_second": args.batch_size / float(np.median(batch)),
            "peak_memory_mb": common.peak_memory_mb(device),
        }
    )


def study_networks(args: Args, console: Console) -> None:
    """Prints, and writes to networks.json, size and speed of every network at inference: latency of
    one image, images a second at the batch size."""
    records = []
    for benchmark in args.benchmarks:
        table = [["network", "M par.", "GFLOPs", "ms", "p95", "img/s", "MB", "source", "oracle"]]
        for name in common.NETWORKS:
            own = {"benchmark": benchmark, "data": args.data, "net": name, "amp": args.amp}
            own |= {"size": args.size, "batch_size": args.batch_size, "device": args.devices[0]}
            one = common.resolve(common.Args(**own), "networks")
            context = multiprocessing.get_context("spawn")
            pipe, end = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(one, end))
            process.start()
            end.close()
            try:
                record = pipe.recv()
            except EOFError:
                process.join()
                raise UserError(f"{name}: ended with exit status {process.exitcode}") from None
            finally:
                process.join()
            record |= {"benchmark": benchmark, "network": name, "size": one.size}
            for row in ("source_only", "oracle"):
                record[row] = found_mious(args.out, benchmark, row, one)
            records.append(record)
            shown = [f"{record['parameters'] / 1e6:.2f}", f"{record['gflops']:.2f}"]
            shown += [f"{record[k]:.1f}" for k in ("median_ms", "p95_ms", "images_per_second")]
            shown += [f"{record['peak_memory_mb']:.0f}"]
            shown += [spread(record[k]) if record[k] else "-" for k in ("source_only", "oracle")]
            table.append([name, *shown])
        h, w = records[-1]["size"]
        device = torch.device(one.device)
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        title = f"{benchmark}, {h}x{w}, one image (ms) and {one.batch_size} (img/s), {where}"
        show(table, title, console)
    common.write_json(args.out / "networks.json", records)
    said = (
        "ms: median latency; p95: its 95th percentile. MB: peak memory, on a CPU of the whole "
        f"process. source, oracle: mIoU of those rows below {args.out}, where they have been run."
    )
    console.print(said, highlight=False)


def found_mious(out: Path, benchmark: str, method: str, args: common.Args) -> list[float]:
    """mIoU of the finished runs of a row with this network and size, one a seed."""
    values = {}
    for path in sorted(out.glob(f"**/{benchmark}/{method}/seed*/result.json")):
        config = common.read_config(path.parent)
        like = config and (config["net"], tuple(config["size"])) == (args.net, args.size)
        if like and not path.parent.name.endswith(".old"):
            values[config["seed"]] = json.loads(path.read_text())["miou"]
    return list(values.values())


# ---- Command line -------------------------------------------------------------------------------
def main(args: Args) -> None:
    console = Console()
    if args.curves:
        return draw_curves(args, console)
    if args.networks:
        return study_networks(args, console)
    if args.print_jobs:
        check(args)
        if args.force:
            raise UserError("--print-jobs: a printed job never repeats a finished row; no --force")
        return print("\n".join(shell_commands(args)))
    if args.collect:
        rows, results = collected(args)
        write_results(args, dict(enumerate(results)))
    else:
        rows = rows_of(args)
        results = run_rows(rows, args, console)
    if not args.rows_only:
        write_tables(Scores(rows, results), args, console)
    if any(result.status != "finished" for result in results):
        sys.exit(1)


def write_tables(scores: Scores, args: Args, console: Console) -> None:
    """Prints the tables, and writes them and the figures."""
    titled = {"mIoU in percent": main_table(scores)}
    for benchmark in scores.benchmarks:
        titled |= blocks(scores, benchmark)
    titled["cost"] = cost_table(scores)
    for benchmark in scores.benchmarks:
        titled[f"{benchmark}, IoU in percent"] = class_table(scores, benchmark)
    for title, table in reversed(titled.items()):  # the one that matters stands last
        show(table, title, console)
    said = notes(scores, args)
    for line in said:
        console.print(line, highlight=False, markup=False, soft_wrap=line.startswith("failed"))
    text = "\n\n".join(f"## {title}\n\n{markdown(table)}" for title, table in titled.items())
    with common.replacing(args.out / "results.md") as temporary:
        temporary.write_text("\n\n".join([text, *said]) + "\n")
    if any(result.status == "finished" for result in scores.results):
        draw_bars(scores, args.out / "figures/miou.png")
        draw_costs(scores, args.out / "figures/cost.png")
        draw_sheets(scores, args, console)
    console.print(f"written: {args.out}/results.json, results.md, figures/", highlight=False)


if __name__ == "__main__":
    common.main(Args, main, __doc__)
