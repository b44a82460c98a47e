"""Runs every method on the same splits of VKITTI to KITTI and GTA5 to Cityscapes; prints the table.

    python benchmark.py --jobs 2                         (30 to 80 minutes on two CPU cores)

    python benchmark.py --data /datasets --seeds 0 1 2   (real data, see the README; three seeds)

Every row is a command of its own (--print-jobs lists them). If one fails, the others still run. A
finished row is not run again unless its arguments or its data change, or --force is given.
"""

import contextlib
import importlib
import itertools
import json
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import baseline
import common
import datasets
from common import Result
from datasets import BENCHMARKS, UserError

BASELINES = get_args(baseline.Row)
METHODS = ("datarater", "metasim", "reward_opt", "adversarial_da", "diffusion_bridge")
SET_METHODS = ("datarater", "metasim", "diffusion_bridge")  # these write a training set
LABELLED = ("few_label", "oracle", "datarater", "reward_opt")  # these need labelled target photos
# Time of a row over that of source_only, on the miniature; about 1 for the others.
COSTS = {"datarater": 4, "metasim": 3, "adversarial_da": 1.6, "diffusion_bridge": 9}
Key = tuple[str, str, int]  # benchmark, method or methods joined by +, seed


# ---- Rows ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Args(common.SharedArgs):
    benchmarks: tuple[Literal["vkitti2kitti", "gta52cityscapes", "own"], ...] = tuple(BENCHMARKS)
    """Benchmarks to run. own: your own data, see baseline.py --help."""
    methods: tuple[str, ...] = (*BASELINES, *METHODS)
    """Rows of the table. reward_opt@600 is reward_opt with 600 updates."""
    combine: tuple[str, ...] = ()
    """More rows: metasim+reward_opt, say. Each method starts from the training set (datarater,
    metasim, diffusion_bridge) or the network (all others) of the one before it."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of every row. With more than one the table has mean and standard deviation (n - 1)."""
    out: Path = Path("runs")
    """Folder of the run folders, of logs/, results.json, results.md and figures/."""
    devices: tuple[str, ...] = ("auto",)
    """Devices that run rows at the same time: cuda:0 cuda:1."""
    jobs: int = 1
    """Rows at the same time on each device; they share the cores of the CPU."""
    timeout: float | None = None
    """Seconds after which a row is stopped. Default: never."""
    force: bool = False
    """Run finished rows again."""
    print_jobs: bool = False
    """Print the command of every row and stop: for SLURM arrays, GNU parallel."""
    collect: tuple[Path, ...] = ()
    """Run nothing, and add the finished run folders below these folders to the table."""
    curves: tuple[Path, ...] = ()
    """Draw the curves of these run folders, or of MMSegmentation's scalars.json, and stop."""
    networks: bool = False
    """Measure size and speed of every network at the benchmarks' sizes, and stop."""


class Row(NamedTuple):
    """One run of the table."""

    key: Key
    parent: Key | None  # the row that a combination starts from
    method: str  # its last method
    args: common.Args


def key_of(result: Result) -> Key:
    return result.benchmark, result.method, result.seed


def needs_labels(method: str) -> bool:
    """Whether a method, or a part of a combination, needs labelled target photos."""
    return any(part in LABELLED for part in re.split(r"[+@]", method))


def shared_args(args: Args, **own: Any) -> common.Args:
    """A row's arguments: the flags that the whole benchmark shares, and its own."""
    return common.Args(**{f.name: getattr(args, f.name) for f in fields(common.SharedArgs)} | own)


def rows_of(args: Args) -> list[Row]:
    """Every run of the table; a combination comes after all that it starts from."""
    names = []
    for name in (*args.methods, *args.combine):  # "a+b+c" needs "a" and "a+b"
        names += itertools.accumulate(name.split("+"), "{}+{}".format)
    methods = {re.sub(r"@[1-9]\d*$", "", last) for name in names for last in name.split("+")}
    if not methods <= {*BASELINES, *METHODS}:
        known = " ".join([*BASELINES, *METHODS])
        raise UserError(f"--methods, --combine: {' '.join(names)}: expected {known}, or NAME@STEPS")
    rows = {}
    names = sorted(dict.fromkeys(names), key=lambda name: name.count("+"))
    for name, benchmark, seed in itertools.product(names, args.benchmarks, args.seeds):
        before, _, last = name.rpartition("+")
        method, _, steps = last.partition("@")
        out, parent = args.out / benchmark / name / f"seed{seed}", None
        own = {"benchmark": benchmark, "seed": seed, "out": out, "resume": not args.force}
        own |= {"steps": int(steps)} if steps else {}
        if before:
            parent = benchmark, before, seed
            made = "set" if rows[parent].method in SET_METHODS else "checkpoint.pt"
            own["init"] = rows[parent].args.out / made
        key = benchmark, name, seed
        rows[key] = Row(key, parent, method, shared_args(args, **own))
    return list(rows.values())


def command_of(row: Row) -> list[str]:
    """The command that runs a row; flags at their default value are left out."""
    script = "baseline" if row.method in BASELINES else row.method
    command = [sys.executable, str(Path(__file__).with_name(f"{script}.py"))]
    command += ["--row", row.method] if script == "baseline" else []
    for field in fields(row.args):
        flag, value = field.name.replace("_", "-"), getattr(row.args, field.name)
        if value == field.default:
            continue
        if isinstance(field.default, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{flag}", *map(str, values)]
    return command


def finished(row: Row) -> Result | None:
    """The result of a row that has been run with these arguments and this data."""
    flags = vars(row.args) | {"device": "cpu", "resume": True}  # they decide nothing here
    try:
        own = {"row": row.method} if row.method in BASELINES else {}
        module = baseline if own else importlib.import_module(row.method)
        args = module.Args(**flags, **own)
        return common.finished(common.resolve(args, row.method), row.method)
    except Exception:  # the row's own process will report it
        return None


# ---- Running ------------------------------------------------------------------------------------
def run_row(row: Row, args: Args, running: list[subprocess.Popen]) -> Result:
    """Runs the row's command. Its output goes to OUT/logs/."""
    log = args.out / "logs" / f"{'-'.join(map(str, row.key))}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    environment, at_once = dict(os.environ), len(args.devices) * args.jobs
    if at_once > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // at_once))
    with log.open("wb") as file:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command_of(row), **pipes, env=environment)
    running.append(process)
    try:
        status = process.wait(args.timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return Result(*row.key, "failed", f"stopped after --timeout {args.timeout:g} s")
    if status == 0 and (result := finished(row)):
        return result
    if status < 0:
        return Result(*row.key, "failed", f"killed by {signal.Signals(-status).name}")
    # The line of an error that the user can mend, or the last line of a traceback.
    pattern = r"^(?:error: |(?=[\w.]*(?:Error|Exception)\b))(.+)"
    errors = re.findall(pattern, log.read_text(errors="replace"), re.MULTILINE)
    return Result(*row.key, "failed", errors[-1] if errors else f"exit status {status}, see {log}")


def run_rows(rows: list[Row], args: Args, results: dict[Key, Result]) -> None:
    """Runs what is not finished, --jobs rows at a time on each device; `results` gets each row."""
    slots, devices = args.devices * args.jobs, queue.SimpleQueue()
    for device in slots:
        devices.put(device)
    futures, seconds, running = {}, [], []

    def task(row: Row) -> Result:
        # The row that it starts from was submitted before it, so this cannot wait for ever.
        parent = futures[row.parent].result() if row.parent else None
        if parent and parent.error:
            return Result(*row.key, "failed", f"{parent.method} failed")
        if parent and row.key in results and not row.args.init.exists():
            return results[row.key]  # what it started from was deleted after an earlier run
        result = None if args.force else finished(row)
        if result is None:
            device, start = devices.get(), time.monotonic()
            result = run_row(row._replace(args=replace(row.args, device=device)), args, running)
            devices.put(device)
            seconds.append((time.monotonic() - start) / COSTS.get(row.method, 1))
        result = replace(result, method=row.key[1])
        return combined(result, parent) if parent and not result.error else result

    with ThreadPoolExecutor(len(slots)) as pool:
        try:
            for row in rows:
                futures[row.key] = pool.submit(task, row)
            for count, future in enumerate(as_completed(futures.values()), start=1):
                result = future.result()
                results[key_of(result)] = result
                write_results(results, args.out)
                name = f"{result.benchmark} {result.method} seed {result.seed}"
                score = "no score" if result.miou is None else f"{result.miou:.1f}"
                outcome = result.error or f"{score}, {result.seconds:.0f} s"
                left = sum(COSTS.get(r.method, 1) for r in rows if not futures[r.key].done())
                if seconds:  # else no row was run yet
                    outcome += f"; {left * mean(seconds) / len(slots) / 60:.0f} min left"
                print(f"{count} of {len(rows)}: {name}: {outcome}", flush=True)
        except BaseException:  # Ctrl-C above all: no row goes on without its benchmark
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in futures.values()):
                for process in running:
                    process.terminate()
                time.sleep(0.1)
            raise


def combined(result: Result, parent: Result) -> Result:
    """The result of a combination with the costs of both of its parts."""
    made_set = parent.method.rpartition("+")[2].partition("@")[0] in SET_METHODS
    return replace(
        result,
        target_labels=max(parent.target_labels, result.target_labels),
        steps=result.steps + (0 if made_set else parent.steps),  # of the same network
        seconds=parent.seconds + result.seconds,
        peak_memory_mb=max(parent.peak_memory_mb, result.peak_memory_mb),
        other_updates=", ".join(filter(None, [parent.other_updates, result.other_updates])),
    )


# ---- Results ------------------------------------------------------------------------------------
def write_results(results: dict[Key, Result], out: Path) -> list[Result]:
    """Writes results.json. -> the rows in the table's order."""
    rank = {n: i for i, n in enumerate([*BENCHMARKS, "own", *BASELINES, *METHODS])} | {"oracle": 99}
    keys = sorted(results, key=lambda k: (rank[k[0]], rank.get(k[1], 90 + k[1].count("+")), k))
    rows = [results[key] for key in keys]
    datasets.write_json(out / "results.json", [asdict(row) for row in rows])
    return rows


def earlier_results(out: Path) -> dict[Key, Result]:
    """The rows that an earlier command wrote to results.json."""
    path = out / "results.json"
    try:
        rows = [Result(**row) for row in json.loads(path.read_text())] if path.exists() else []
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: damaged, or of another version ({error}); move it") from error
    return {key_of(row): row for row in rows}


def collected_results(roots: tuple[Path, ...]) -> tuple[dict[Key, Result], dict[Key, Path]]:
    """The finished runs below some folders. UserError where two of them are the same row."""
    results, folders = {}, {}
    paths = {path.parent.resolve() for root in roots for path in root.glob("**/seed*/result.json")}
    for folder in sorted(paths, key=lambda path: (path.parent.name.count("+"), path)):
        benchmark, name, seed = folder.parts[-3:]
        try:
            result = replace(Result(**common.read_json(folder / "result.json")), method=name)
        except TypeError as error:
            raise UserError(f"{folder}/result.json: damaged, or of another version") from error
        if (benchmark, seed) != (result.benchmark, f"seed{result.seed}") or not result.iou:
            continue  # an old run, seed0.old1, or a bridge alone
        key = key_of(result)
        if key in folders:
            raise UserError(f"{folder}: the same row as {folders[key]}")
        before = name.rpartition("+")[0]
        parent = results.get((benchmark, before, result.seed))
        if parent and not parent.error:
            result = combined(result, parent)
        elif before:
            result = Result(*key, "failed", f"its first part, the run of {before}, is missing")
        results[key], folders[key] = result, folder
    if not folders:
        raise UserError(f"--collect {' '.join(map(str, roots))}: no finished run folder")
    return results, folders


# ---- Statistics ---------------------------------------------------------------------------------
def interval(method: np.ndarray, baseline: np.ndarray, draws: int = 2000) -> tuple[float, ...]:
    """Difference of mIoU from the baseline's, and its 95% interval. -> mean, low, high in percent.

    method, baseline: confusion matrices [S,N,C,C] of the same S seeds and N images: paired.
    The images are bootstrapped. A few seeds can't be, so a draw of Student's t is added. Its
    variance is that between seeds, without the part that the choice of images explains."""
    valid = method.any(axis=(0, 2, 3))  # a photo without labels changes no sum
    method, baseline = method[:, valid], baseline[:, valid]
    seeds, images, classes = method.shape[:3]
    rng = np.random.default_rng(0)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=draws)  # [D,N]
    weights = np.vstack([np.ones(images), weights])  # the first is the estimate itself

    def resampled(confusion: np.ndarray) -> np.ndarray:
        flat = np.moveaxis(confusion, 1, 0).reshape(images, -1).astype(np.float64)  # [N,SCC]
        sums = (weights @ flat).reshape(draws + 1, seeds, classes, classes)
        return np.nanmean(common.iou(sums), axis=-1)  # [D+1,S]

    values = resampled(method) - resampled(baseline)
    estimate, deviations = values[0].mean(), values[1:] - values[1:].mean(axis=0)  # [D,S]
    drawn = deviations.mean(axis=1)
    if seeds > 1:
        variance = values[0].var(ddof=1) - deviations.var(axis=1, ddof=1).mean()
        drawn = drawn + (max(0, variance) / seeds) ** 0.5 * rng.standard_t(seeds - 1, size=draws)
    low, high = estimate + np.quantile(drawn, [0.025, 0.975])
    return float(estimate), float(low), float(high)


def interval_of(
    folders: dict[Key, Path], method: list[Result], baseline: list[Result]
) -> tuple[float, ...] | None:
    """`interval` of a method over another, and the number of seeds that both have. None without
    such seeds or their run folders, or where these are not of the same test photos."""
    confusions = []
    for rows in (method, baseline):
        paths = {r.seed: folders[key_of(r)] / "confusion.npy" for r in rows if key_of(r) in folders}
        try:
            confusions.append({seed: np.load(p) for seed, p in paths.items() if p.exists()})
        except (ValueError, EOFError) as error:
            raise UserError(f"a confusion.npy of {rows[0].method} is damaged: {error}") from error
    seeds = sorted(set.intersection(*map(set, confusions)))
    truths = {c[seed].sum(axis=-1).tobytes() for c in confusions for seed in seeds}
    if len(truths) != 1:
        return None
    return *interval(*(np.stack([c[seed] for seed in seeds]) for c in confusions)), len(seeds)


# ---- Tables -------------------------------------------------------------------------------------
Methods = dict[str, list[Result]]  # results of a benchmark by method, one for each seed
Cells = list[dict[str, str]]  # the rows of a table: cells by column


def method_table(methods: Methods, folders: dict[Key, Path], labelled: bool) -> Cells:
    """The rows with or without target labels: mIoU, difference from their baselines, cost."""
    finished = {name: [r for r in rows if not r.error] for name, rows in methods.items()}
    scored = {name: [r for r in rows if r.miou is not None] for name, rows in finished.items()}
    by_seed = {name: {r.seed: r.miou for r in rows} for name, rows in scored.items()}
    mious = {name: mean(r.miou for r in rows) for name, rows in scored.items() if rows}
    table = []
    for method, rows in finished.items():
        if (needs_labels(method) or any(r.target_labels for r in rows)) != labelled:
            continue
        text = [f"{mious[method]:.1f}"] if method in mious else []
        if len(scored[method]) > 1:
            text[0] += f" ± {stdev(r.miou for r in scored[method]):.1f}"
        text += [f"seed {r.seed} failed: {r.error}" for r in methods[method] if r.error]
        cells = {"method": method, "mIoU": "; ".join(text)}
        if labelled:
            cells["target labels"] = "/".join(dict.fromkeys(str(r.target_labels) for r in rows))
        for name in ["few_label"] if labelled else ["source_only", "color_transfer"]:
            known = name != method and {name, method} <= mious.keys()
            difference = interval_of(folders, scored[method], scored[name]) if known else None
            text = "{:+.1f} [{:.1f}, {:.1f}]".format(*difference[:3]) if difference else ""
            cells[f"over {name}"] = text + "*" if difference and difference[3] == 1 else text
        if rows:
            runs = [by_seed.get(name, {}) for name in (method, "source_only", "oracle")]
            shared = set.intersection(*map(set, runs))  # seeds
            row, low, high = (mean([of[seed] for seed in shared] or [math.nan]) for of in runs)
            gap = f"{(row - low) / (high - low):.0%}" if high > low else ""
            cells |= {"gap closed": gap, "updates": "/".join({f"{r.steps:,}": 0 for r in rows})}
            cells["other updates"] = "; ".join(dict.fromkeys(r.other_updates for r in rows))
            cells["seconds"] = f"{mean(r.seconds for r in rows):,.0f}"
            cells["MB"] = f"{max(r.peak_memory_mb for r in rows):,.0f}"
        table.append(cells)
    return table


def class_table(methods: Methods) -> Cells:
    """Classes by methods: IoU in percent, mean over the seeds."""
    table: dict[str, dict[str, str]] = {}
    for method, results in methods.items():
        ious = [r.iou for r in results if r.miou is not None]
        for name in dict.fromkeys(itertools.chain(*ious)):  # own classes may have been changed
            values = [iou.get(name) for iou in ious]
            text = "-" if None in values else f"{mean(values):.1f}"
            table.setdefault(name, {"class": name})[method] = text
    return list(table.values())


SETTINGS = ("steps", "batch_size", "size", "net", "lr", "pretrained", "miniature")
SETTINGS += ("source_files", "target_files", "test_files", "label_maps")  # hashes of their content


def notes(results: list[Result], folders: dict[Key, Path]) -> list[str]:
    """What has to be said below the tables."""
    lines = [
        "over: difference of mIoU [95% interval; bootstrap over images, Student's t over seeds].",
        "*: 1 seed: [paired bootstrap over test images]; other seeds may lie outside.",
        "gap closed: share of the way from source_only to the oracle.",
    ]
    for benchmark in dict.fromkeys(r.benchmark for r in results):
        rows = [r for r in results if r.benchmark == benchmark and not r.error]
        absent = {name for r in rows for name, value in r.iou.items() if value is None}
        if any(r.miou is None for r in rows):
            lines.append(f"{benchmark}: a row without a score was run without test labels.")
        elif absent:
            names = ", ".join(sorted(absent))
            lines.append(f"{benchmark}: mIoU without {names}, which no test photo has.")
        updates = {r.method: r.steps for r in rows}
        for method, count in updates.items():
            control = f"{method.rpartition('+')[2].partition('@')[0]}@{count}"
            matched = control in updates or count <= updates.get(control.partition("@")[0], 0)
            if "+" in method and not matched:
                lines.append(f"{benchmark}: {method}: --methods {control} has as many updates")
        records = []
        for r in rows:
            file = folders.get(key_of(r), Path(os.devnull)) / "config.json"
            steps = None if re.search(r"[+@]", r.method) else r.steps  # these may have others
            about = {"commit": r.commit, "device": r.device, "versions": r.versions, "steps": steps}
            records.append(common.read_json(file) | about)
        if any(record.get("miniature") for record in records):
            lines.append(f"{benchmark}: the miniature; do not compare with published numbers.")
        for name in ("commit", "device", "versions", *SETTINGS):
            values = sorted({str(record[name]) for record in records if name in record} - {"None"})
            if len(values) > 1:
                lines.append(f"warning: {benchmark}: {name} differs: {', '.join(values)}")
    return lines


def show(title: str, table: Cells) -> None:
    """Prints the first five columns of a table, which fit a terminal, without empty ones."""
    names = list(dict.fromkeys(itertools.chain(*table)))[:5]
    names = [name for name in names if any(row.get(name) for row in table)]
    # A long name goes on in a new line after one of its joints.
    headers = [Column(re.sub(r"([_+ ])", r"\1\n", name), justify="right") for name in names]
    view = Table(*headers, title=title, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in table:
        cells = [escape(row.get(name, "")) for name in names]
        view.add_row(cells[0].replace("+", "+\n"), *cells[1:])
    Console().print(view)


def write_tables(results: list[Result], folders: dict[Key, Path], out: Path) -> None:
    """Prints the tables, and writes them as results.md. results: in the table's order."""
    tables, text = {}, []
    for name, group in itertools.groupby(results, key=lambda result: result.benchmark):
        methods: Methods = {}
        for result in group:
            methods.setdefault(result.method, []).append(result)
        for kind, labelled in (("no target labels", False), ("with target labels", True)):
            if table := method_table(methods, folders, labelled):
                show(f"{name}, {kind}", table)
                tables[f"{name}, {kind}"] = table
        if classes := class_table(methods):
            tables[f"{name}, IoU in percent"] = classes
    below = notes(results, folders)
    Console().print("\n".join(below), highlight=False, markup=False)
    for title, table in tables.items():
        names = list(dict.fromkeys(itertools.chain(*table)))
        rows = [[row.get(name, "").replace("|", "\\|") for name in names] for row in table]
        rows = [names, ["---", *["---:"] * (len(names) - 1)], *rows]
        text += [f"## {title}\n", *(f"| {' | '.join(row)} |" for row in rows), ""]
    with datasets.replacing(out / "results.md") as temporary:
        temporary.write_text("\n".join([*text, "\n\n".join(below), ""]), encoding="utf-8")


# ---- Figures ------------------------------------------------------------------------------------
def draw_sheets(rows: list[Row], args: Args) -> None:
    """figures/BENCHMARK.png: test photos, ground truth, and the first seed's predictions."""
    for benchmark in args.benchmarks:
        networks = {}
        for row in rows:
            path, name = row.args.out / "checkpoint.pt", row.key[1].replace("+", "+\n")
            if row.key[::2] == (benchmark, args.seeds[0]) and path.exists():
                networks[name], _ = common.read_network(path)
        if networks:
            shared = common.resolve(shared_args(args, benchmark=benchmark, device="cpu"), "sheets")
            test, path = datasets.load(shared, "target_test"), args.out / f"figures/{benchmark}.png"
            common.draw_predictions(path, test, networks)


# ---- Curves of any run; size and speed of the networks ------------------------------------------
def read_curve(path: Path) -> list[dict[str, Any]]:
    """The lines of a scalars.json, ours or MMSegmentation's, without those that are damaged."""
    files = [path] if path.is_file() else list(path.glob("**/scalars.json"))
    if len(files) != 1:
        raise UserError(f"{path}: {len(files)} files scalars.json, expected 1")
    lines, texts = [], files[0].read_text("utf-8-sig", errors="replace").splitlines()
    for text in texts:
        with contextlib.suppress(ValueError, TypeError, KeyError):  # torn when a run was killed
            line = json.loads(text)
            if all(math.isfinite(line[key]) for key in {"step", *line} & {"step", "loss", "mIoU"}):
                lines.append(line)
    if not lines:
        raise UserError(f"{files[0]}: no line to draw")
    if len(lines) < len(texts):
        print(f"{files[0]}: {len(texts) - len(lines)} lines left out, torn or not finite")
    return lines


def draw_curves(args: Args) -> None:
    """curves.png: the loss, smoothed, and mIoU over the steps."""
    figure = common.new_figure(10, 4)
    axes = figure.subplots(1, 2)
    for path in args.curves:
        lines = read_curve(path)
        for axis, key in zip(axes, ("loss", "mIoU"), strict=True):
            points = np.array([(line["step"], line[key]) for line in lines if key in line])
            if len(points):
                window = np.ones(len(points) // 10 + 1 if key == "loss" else 1)
                smooth = [np.convolve(x, window / len(window), "valid") for x in points.T]
                axis.plot(*smooth, label=path)
                axis.set(xlabel="step", ylabel="loss (nats)" if key == "loss" else "mIoU (%)")
                axis.legend(fontsize=7)
                print(f"{path}: {key} {points[-1, 1]:.3g} at step {points[-1, 0]:.0f}")
    common.save_figure(figure, args.out / "curves.png")
    print(f"written: {args.out}/curves.png")


def study_networks(args: Args) -> None:
    """Prints size and speed of every network at inference, at each benchmark's training size."""
    from torch.utils.benchmark import Timer  # which looks for CUDA when it is imported

    table = []
    for pair, name in itertools.product(args.benchmarks, common.NETWORKS):
        flags = common.resolve(shared_args(args, benchmark=pair, device=args.devices[0]), "speed")
        image = torch.rand(1, 3, *flags.size, device=flags.device)  # [1,3,H,W]
        net = common.Network(name, len(datasets.get_benchmark(pair, args.data).source.classes))
        net.eval().to(flags.device, memory_format=torch.channels_last)
        amp = flags.amp and image.device.type == "cuda"
        autocast = torch.autocast(image.device.type, torch.bfloat16, enabled=amp)
        options = {"globals": {"net": net, "image": image}, "num_threads": torch.get_num_threads()}
        with torch.inference_mode(), autocast:
            seconds = Timer("net(image)", **options).blocked_autorange(min_run_time=2).median
        parameters = sum(p.numel() for p in net.parameters())
        cells = {"network": f"{name} {flags.size}", "M parameters": f"{parameters / 1e6:.2f}"}
        table.append(cells | {"ms an image": f"{1000 * seconds:.1f}"})
    show(f"networks on {flags.device}", table)


# ---- Command line -------------------------------------------------------------------------------
def main(args: Args) -> None:
    if args.jobs < 1 or not (args.devices and args.seeds and args.benchmarks):
        raise UserError("--jobs, --devices, --seeds, --benchmarks: expected at least one")
    if args.curves:
        return draw_curves(args)
    if args.networks:
        return study_networks(args)
    rows = rows_of(args)
    if args.print_jobs:
        for row, device in zip(rows, itertools.cycle(args.devices), strict=False):
            comment = f"  # after that of {row.parent[1]}" if row.parent else ""
            row = row._replace(args=replace(row.args, device=device))
            print(shlex.join(command_of(row)) + comment)
        return None
    results, folders = earlier_results(args.out), {}
    if args.collect:
        collected, folders = collected_results(args.collect)
        results |= {key: r for key, r in collected.items() if not r.error or key not in results}
        folders = {key: f for key, f in folders.items() if results[key] is collected[key]}
    else:
        for benchmark in args.benchmarks:  # a wrong flag, too; and this writes the miniature
            shared = common.resolve(shared_args(args, benchmark=benchmark, device="cpu"), "data")
            for role in ("source", "target_unlabelled", "target_test"):
                datasets.load(shared, role)  # so that no row is charged with the cache
            target = datasets.get_benchmark(benchmark, args.data).target
            root = datasets.dataset_root(args.data, target)
            needy = [r for r in rows if r.key[0] == benchmark and needs_labels(r.key[1])]
            if not datasets.files_of(target, root, "train")[0]:
                datasets.note(f"{root}: no labelled training photo, so some rows are left out")
                rows = [row for row in rows if row not in needy]
            elif {row.key[1] for row in needy} - {"oracle"}:
                datasets.load(shared, "target_few")  # a --labelled that is too large, above all
        if not rows:
            raise UserError("--methods: no row, or all of them need labelled training photos")
        print(f"{len(rows)} rows; what they print is in {args.out}/logs/", flush=True)
        run_rows(rows, args, results)
    for key in results.keys() - folders.keys():
        folder = args.out / key[0] / key[1] / f"seed{key[2]}"
        if common.read_json(folder / "result.json").get("miou", "") == results[key].miou:
            folders[key] = folder  # else another run has taken its place
    write_tables(write_results(results, args.out), folders, args.out)
    if not args.collect:
        draw_sheets(rows, args)
    print(f"written: {args.out}/results.json and results.md")
    if not args.collect and any(results[row.key].error for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    common.main(Args, main, __doc__)
