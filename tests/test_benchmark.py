"""The table: rows, statistics, reuse, interruption; and the contract of every script."""

import ast
import dataclasses
import importlib
import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import bench
import numpy as np
import pytest
import torch
from conftest import ROOT, environment, like

import baseline
import benchmark
import common
import datasets
from common import Result
from datasets import UserError

SHORT = {"steps": 2, "batch_size": 2, "size": (32, 64), "labelled": 1}
VKITTI = "vkitti2kitti"


def confusion_of(accuracy: np.ndarray | float, images: int = 20, classes: int = 10) -> np.ndarray:
    """[N,C,C]: of 100 pixels of each class so many are right, the others fall to the next class."""
    right = np.round(100 * np.broadcast_to(accuracy, images)).astype(int)[:, None, None]
    eye = np.eye(classes, dtype=int)
    return right * eye + (100 - right) * np.roll(eye, 1, axis=1)


def write_run(folder: Path, method: str, accuracy: Any, seed: int = 0, **changes: Any) -> Path:
    """A finished run folder FOLDER/vkitti2kitti/METHOD/seedSEED as a method writes it."""
    out = folder / VKITTI / method / f"seed{seed}"
    confusion = confusion_of(accuracy)
    classes = datasets.BENCHMARKS[VKITTI].source.classes
    values = dict(zip(classes, common.iou(confusion.sum(axis=0)).tolist(), strict=True))
    numbers = {"target_labels": 0, "steps": 5, "seconds": 1.0, "peak_memory_mb": 1.0}
    numbers |= {"commit": "c", "device": "cpu", "versions": {"torch": "2"}, "iou": values}
    numbers["miou"] = common.scores(confusion.sum(axis=0))["mIoU"]
    module = method.rpartition("+")[2]
    result = Result(VKITTI, module, seed, **numbers | changes)
    datasets.write_json(out / "result.json", dataclasses.asdict(result))
    datasets.write_json(out / "config.json", {"method": module, "steps": result.steps})
    np.save(out / "confusion.npy", confusion)
    return out


def rows_in(folder: str) -> dict[tuple[str, int], dict[str, Any]]:
    rows = json.loads(Path(folder, "results.json").read_text())
    return {(row["method"], row["seed"]): row for row in rows}


# ---- Whole runs ---------------------------------------------------------------------------------
def test_the_table_end_to_end(mini: Path):
    """Two rows at the same time from the command line, then a third row."""
    flags = "--steps 2 --batch-size 2 --size 32 64 --labelled 1 --jobs 2 --methods source_only"
    flags += f" few_label --benchmarks {VKITTI} --data"
    command = [sys.executable, str(ROOT / "benchmark.py"), *flags.split(), str(mini)]
    notebook = environment() | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    ended = subprocess.run(command, env=notebook, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("2 rows;") and lines[2].startswith("2 of 2: vkitti2kitti")
    assert max(map(len, lines)) <= 80 and "*: 1 seed" in ended.stdout and "left" in lines[2]
    first = rows_in("runs")
    labels = {key[0]: row["target_labels"] for key, row in first.items()}
    assert labels == {"source_only": 0, "few_label": 1}
    assert [path.name for path in Path("runs/figures").iterdir()] == [f"{VKITTI}.png"]

    # Another command with one more row keeps the others in the table.
    names = ("source_only", "few_label", "color_transfer")
    args = benchmark.Args(data=str(mini), benchmarks=(VKITTI,), methods=names[2:], **SHORT)
    benchmark.main(args)
    rows = rows_in("runs")
    assert len(rows) == 3 and rows[("few_label", 0)] == first[("few_label", 0)]
    table = Path("runs/results.md").read_text()
    assert "| few_label | " in table and "]* |" in table  # the interval of one seed
    # All are finished now, but not with another argument.
    rows_of = benchmark.rows_of(dataclasses.replace(args, methods=names))
    assert [benchmark.finished(row).method for row in rows_of] == list(names)
    changed = benchmark.rows_of(dataclasses.replace(args, methods=names, lr=0.1))
    assert [benchmark.finished(row) for row in changed] == [None] * 3


def test_color_transfer_gives_images_the_colours_of_a_training_photo(args, monkeypatch):
    seen = {}

    def train(run: common.Run, net: Any, split: Any, steps: int, stage: str, *maps: Any) -> None:
        seen["translate"], seen["augment"] = maps

    monkeypatch.setattr(common, "train", train)
    flags = like(args, baseline.Args, row="color_transfer")
    baseline.run(flags)
    images = torch.rand(4, 3, 32, 64, generator=torch.Generator().manual_seed(0)) * 0.2 + 0.4
    translated = seen["translate"](images, common.generator(0, "test"))
    photos = datasets.load(common.resolve(flags, "color_transfer"), "target_unlabelled")
    means = torch.from_numpy(np.array(photos.images)).float().div(255).mean(dim=(1, 2))  # [N,3]
    distance = torch.cdist(translated.mean(dim=(2, 3)), means).min(dim=1).values
    assert distance.max() < 0.03  # clamping moves the mean a little
    assert translated.min() >= 0 and translated.max() <= 1 and seen["augment"] is common.identity


# ---- Rows as commands ---------------------------------------------------------------------------
def test_the_command_of_a_row_gives_its_arguments(monkeypatch: pytest.MonkeyPatch, capsys):
    shared = {"size": (32, 64), "amp": False, "pretrained": True, "lr": 0.25, "compile": True}
    args = benchmark.Args(
        methods=("few_label", "metasim"), combine=("metasim+few_label",), force=True, **shared
    )
    rows = benchmark.rows_of(args)
    # A combination comes last, and starts from what its first method hands on.
    for last in ("nonsense", "reward_opt@many"):
        with pytest.raises(UserError, match=last):
            benchmark.rows_of(benchmark.Args(combine=(f"metasim+{last}",)))
    assert [row.key[1] for row in rows[::2]] == ["few_label", "metasim", "metasim+few_label"]
    assert rows[-2].args.init == Path("runs/vkitti2kitti/metasim/seed0/set")
    few_label = benchmark.command_of(rows[-1])
    monkeypatch.setattr(sys, "argv", few_label[1:])
    parsed = common.parse(baseline.Args, None)
    assert parsed == baseline.Args(**vars(rows[-1].args), row="few_label")
    assert benchmark.command_of(rows[2])[1].endswith("metasim.py")
    args = benchmark.Args(methods=("oracle",), seeds=(0, 1), print_jobs=True, devices=("a", "b"))
    benchmark.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert all("baseline.py --row oracle" in line for line in lines)
    assert ["--device a" in line for line in lines] == [True, False, True, False]


def stub(
    monkeypatch: pytest.MonkeyPatch, code: dict[str, str], **changes: Any
) -> tuple[list[benchmark.Row], benchmark.Args]:
    """Rows whose commands are these lines of Python, by method, and the benchmark's arguments."""

    def finished(row: benchmark.Row) -> Result | None:
        record = common.read_json(row.args.out / "result.json")
        return Result(**record) if record else None

    def command_of(row: benchmark.Row) -> list[str]:
        return [sys.executable, "-c", code[row.method], str(row.args.out)]

    monkeypatch.setattr(benchmark, "finished", finished)
    monkeypatch.setattr(benchmark, "command_of", command_of)
    monkeypatch.setattr(benchmark, "METHODS", tuple(code))
    args = benchmark.Args(benchmarks=(VKITTI,), methods=tuple(code), **changes)
    return benchmark.rows_of(args), args


def test_a_row_that_fails_costs_no_other_row(monkeypatch, capsys):
    record = json.dumps(dataclasses.asdict(Result(VKITTI, "works", 0, miou=50.0, seconds=1.0)))
    write = "import pathlib, sys; out = pathlib.Path(sys.argv[1]); out.mkdir(parents=True); "
    write += f"(out / 'result.json').write_text({record!r})"
    code = {
        "mends": "import sys; print('step 1'); sys.exit('error: no such file: x.png')",
        "raises": "raise RuntimeError('boiled\\nover')",
        "hangs": "import time; time.sleep(60)",
        "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "silent": "import sys; sys.exit(3)",
        "lies": "pass",
        "works": write,
    }
    combine = ("raises+works", "works+silent")
    rows, args = stub(monkeypatch, code, timeout=4.0, jobs=2, combine=combine)
    old = Result(VKITTI, "works+silent", 0, miou=40.0, seconds=1.0)  # its start was deleted
    results = {benchmark.key_of(old): old}
    benchmark.run_rows(rows, args, results)
    failed = {key[1]: result.error for key, result in results.items() if result.error}
    assert {name: error.split(",")[0] for name, error in failed.items()} == {
        "silent": "exit status 3",
        "lies": "exit status 0",
        "mends": "no such file: x.png",
        "raises": "RuntimeError: boiled",
        "hangs": "stopped after --timeout 4 s",
        "killed": "killed by SIGKILL",
        "raises+works": "raises failed",
    }
    assert "works seed 0: 50.0" in capsys.readouterr().out
    assert rows_in("runs")[("hangs", 0)]["status"] == "failed"
    assert rows_in("runs")[("works+silent", 0)]["miou"] == 40


def test_ctrl_c_ends_the_rows(monkeypatch: pytest.MonkeyPatch):
    """No row goes on without its benchmark, and what waits does not begin."""
    code = {name: "import time; time.sleep(60)" for name in ("first", "second", "third")}
    rows, args = stub(monkeypatch, code, jobs=2)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(2)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        benchmark.run_rows(rows, args, {})
    assert time.monotonic() - start < 20  # the pool has waited for its processes
    assert len(list(Path("runs/logs").iterdir())) == 2


# ---- Tables of run folders ----------------------------------------------------------------------
def test_collected_runs_make_a_table_on_any_terminal(monkeypatch, tmp_path):
    """From two folders, in two seeds, printed to a terminal of Latin-1."""
    for seed in (0, 1):
        write_run(tmp_path / "a", "source_only", 0.5, seed)
        write_run(tmp_path / "b", "metasim+few_label", 0.8 + 0.01 * seed, seed, target_labels=16)
        write_run(tmp_path / "b", "metasim", 0.6, seed, other_updates="7 of the scenes")
        write_run(tmp_path / "a", "oracle", 0.9, seed, target_labels=100)
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", terminal)
    a, b, table = (str(tmp_path / name) for name in ("a", "b", "table"))
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--collect", a, b, "--out", table])
    common.main(benchmark.Args, benchmark.main, None)
    terminal.flush()
    text = terminal.buffer.getvalue().decode("latin-1")
    assert "Student's t" in text and "]*" not in text
    assert max(map(len, text.splitlines()[:-1])) <= 80
    rows = rows_in("table")
    both = rows[("metasim+few_label", 0)]  # costs what its parts cost together
    assert (both["seconds"], both["steps"], both["other_updates"]) == (2.0, 5, "7 of the scenes")
    table = (tmp_path / "table/results.md").read_text()
    line = next(line for line in table.splitlines() if line.startswith("| metasim+few_label"))
    assert " ± " in line and "| 16 |" in line
    # IoU is a / (2 - a) at accuracy a; the gap goes from 0.5 to 0.9.
    low, high, value = (100 * a / (2 - a) for a in (0.5, 0.9, 0.6))
    metasim = next(line for line in table.splitlines() if line.startswith("| metasim |"))
    assert f"| {100 * (value - low) / (high - low):.0f}% |" in metasim
    assert f"| {value - low:+.1f} [" in metasim
    # A later command keeps these rows, though their folders are elsewhere.
    benchmark.main(benchmark.Args(collect=(tmp_path / "a",), out=tmp_path / "table"))
    assert rows_in("table") == rows


def test_rows_that_do_not_compare(tmp_path: Path):
    write_run(tmp_path, "source_only", 0.5)
    write_run(tmp_path, "oracle", 0.9, steps=50, commit="d")
    write_run(tmp_path, "reward_opt@100", 0.9, steps=100, commit="e")  # its steps on purpose
    results, folders = benchmark.collected_results((tmp_path,))
    pair = [results[VKITTI, "oracle", 0]], [results[VKITTI, "source_only", 0]]
    difference, _, _, seeds = benchmark.interval_of(folders, *pair)
    assert difference > 0 and seeds == 1
    np.save(folders[VKITTI, "oracle", 0] / "confusion.npy", confusion_of(0.9, images=19))
    assert benchmark.interval_of(folders, *pair) is None  # not of the same test photos
    notes = benchmark.notes(list(results.values()), folders)
    assert [line for line in notes if line.startswith("warning")] == [
        f"warning: {VKITTI}: commit differs: c, d, e",
        f"warning: {VKITTI}: steps differs: 5, 50",
    ]
    Path(tmp_path, "results.json").write_text('[{"method":')
    with pytest.raises(UserError, match=r"results\.json: damaged"):
        benchmark.earlier_results(tmp_path)


def test_gap_closed_compares_the_same_seeds():
    costs, methods = {"steps": 1, "seconds": 1.0, "peak_memory_mb": 1.0}, {}
    for name, scores in {"source_only": (10, 20), "metasim": (40,), "oracle": (50, 60)}.items():
        methods[name] = [Result(VKITTI, name, i, miou=x, **costs) for i, x in enumerate(scores)]
    assert benchmark.method_table(methods, {}, labelled=False)[1]["gap closed"] == "75%"


def test_two_run_folders_of_the_same_row(tmp_path: Path):
    write_run(tmp_path, "source_only", 0.5)
    folder = write_run(tmp_path / "quick", "source_only", 0.6)
    with pytest.raises(UserError, match="the same row as"):
        benchmark.collected_results((tmp_path,))
    folder.rename(folder.with_name("seed0.old1"))  # an old run is no row
    assert len(benchmark.collected_results((tmp_path,))[0]) == 1
    with pytest.raises(UserError, match="no finished run folder"):
        benchmark.collected_results((tmp_path / "quick",))
    (tmp_path / VKITTI / "source_only/seed0/result.json").write_text('{"benchmark":')
    with pytest.raises(UserError, match=r"seed0/result.json: damaged"):
        benchmark.collected_results((tmp_path,))


def test_a_combination_needs_its_parent_and_a_control_at_matched_updates(tmp_path: Path):
    write_run(tmp_path, "adversarial_da", 0.5)
    write_run(tmp_path, "adversarial_da+few_label", 0.6, steps=3)
    write_run(tmp_path, "metasim+few_label", 0.6)
    results, folders = benchmark.collected_results((tmp_path,))
    reason = "its first part, the run of metasim, is missing"
    assert results[VKITTI, "metasim+few_label", 0].error == reason
    assert results[VKITTI, "adversarial_da+few_label", 0].steps == 8  # of one network
    control = f"{VKITTI}: adversarial_da+few_label: --methods few_label@8 has as many updates"
    assert control in benchmark.notes(list(results.values()), folders)
    matched = dataclasses.replace(results[VKITTI, "adversarial_da", 0], method="few_label@8")
    assert control not in benchmark.notes([*results.values(), matched], folders)
    row = benchmark.rows_of(benchmark.Args(methods=("few_label@8",), benchmarks=(VKITTI,)))[0]
    assert (row.method, row.args.steps, row.args.out.parts[-2]) == ("few_label", 8, "few_label@8")


@pytest.mark.parametrize("method", benchmark.METHODS)
def test_the_benchmark_knows_a_finished_run(method: str, args: common.Args, monkeypatch):
    """The method and the benchmark compute the same configuration of a run."""
    module, configs = importlib.import_module(method), []
    own = module.Args(**vars(dataclasses.replace(args, size=(64, 128))))

    def stop(run: common.Run, args: common.Args, name: str, stages: int) -> None:
        configs.append(common.configuration(common.resolve(args, name), name))
        raise KeyboardInterrupt

    monkeypatch.setattr(common.Run, "__init__", stop)
    with pytest.raises(KeyboardInterrupt):
        module.run(own)
    assert configs == [common.configuration(common.resolve(own, method), method)]


def test_a_failed_row_and_an_absent_class_are_named():
    iou = dict.fromkeys(datasets.BENCHMARKS[VKITTI].source.classes, 50.0) | {"pole": None}
    numbers = {"target_labels": 0, "steps": 5, "seconds": 1.0, "peak_memory_mb": 1.0, "miou": 50.0}
    good = Result(VKITTI, "metasim", 0, iou=iou, **numbers)
    bad = Result(VKITTI, "metasim", 1, status="failed", error="no such file")
    table = benchmark.method_table({"metasim": [good, bad]}, {}, labelled=False)
    assert table[0]["mIoU"] == "50.0; seed 1 failed: no such file"
    assert any("without pole, which no test" in line for line in benchmark.notes([good, bad], {}))
    assert {"class": "pole", "metasim": "-"} in benchmark.class_table({"metasim": [good, bad]})
    renamed = dataclasses.replace(good, iou={"road": 1.0, "lamp": 2.0})  # of another classes.json
    table = benchmark.class_table({"metasim": [good, renamed]})
    assert {"class": "lamp", "metasim": "-"} in table and table[0]["metasim"] == "25.5"
    rows = [dataclasses.replace(good, miou=value) for value in (1.0, 2.0, 4.5)]
    table = benchmark.method_table({"metasim": rows}, {}, labelled=False)
    assert table[0]["mIoU"] == "2.5 ± 1.8"  # n - 1: sqrt((2.25 + 0.25 + 4) / 2) = 1.80


# ---- Statistics and curves ----------------------------------------------------------------------
@pytest.mark.parametrize(("seeds", "of_seed"), [(1, 0.0), (3, 0.0), (3, 0.03), (5, 0.01)])
def test_the_interval_covers_the_truth(seeds: int, of_seed: float):
    """Simulated rows of two classes whose accuracies on an infinite test set are known: an image is
    easy or hard for both rows or for one, a seed good or bad for a row."""
    rng = np.random.default_rng(1)
    pixels, images, covered = 50, 60, []

    def confusion(accuracy: np.ndarray) -> np.ndarray:  # [S,N] -> [S,N,2,2]
        right = rng.binomial(pixels, accuracy[..., None].repeat(2, -1))  # of each class
        wrong = pixels - right
        cells = [right[..., 0], wrong[..., 0], wrong[..., 1], right[..., 1]]
        return np.stack(cells, -1).reshape(*accuracy.shape, 2, 2)

    for _ in range(600):
        hard = rng.uniform(-0.15, 0.15, images)
        own, seed = rng.normal(0, 0.05, (2, 1, images)), rng.normal(0, of_seed, (2, seeds, 1))
        parts = zip((0.7, 0.6), own, seed, strict=True)
        rows = [confusion(np.clip(base + hard + o + s, 0, 1)) for base, o, s in parts]
        _, low, high = benchmark.interval(*rows, draws=300)
        # An accuracy a of both classes is an IoU of a / (2 - a).
        truth = 100 * (0.7 / 1.3 - 0.6 / 1.4)
        covered.append(low <= truth <= high)
    assert 0.925 <= np.mean(covered) <= 0.975


def test_the_interval_is_paired():
    """Images that are hard for both rows cancel: the difference is known far better than either."""
    rng = np.random.default_rng(0)
    right = rng.integers(10, 90, (1, 80))
    worse = np.stack([right, 100 - right, 0 * right, 100 + 0 * right], -1).reshape(1, 80, 2, 2)
    better = worse + np.array([[2, -2], [0, 0]])
    mean, low, high = benchmark.interval(better, worse)
    wrong = np.broadcast_to(np.array([[0, 1], [1, 0]]), worse.shape)  # an mIoU of 0
    _, least, most = benchmark.interval(worse, wrong)
    mious = [common.scores(confusion[0].sum(axis=0))["mIoU"] for confusion in (better, worse)]
    assert mean == pytest.approx(mious[0] - mious[1])
    assert high - low < 0.05 * (most - least) and low < mean < high
    with_void = (np.concatenate([0 * c[:, :3], c], axis=1) for c in (better, worse))
    assert benchmark.interval(*with_void) == (mean, low, high)


def test_curves_of_our_runs_and_of_mmsegmentation(tmp_path: Path, capsys: pytest.CaptureFixture):
    ours, mmseg = tmp_path / "a/run/seed0", tmp_path / "work/2026/vis_data"
    lines = [{"loss": 2.0 / s, "lr": 0.1, "iter": s, "step": s} for s in range(1, 6)]
    lines += [{"aAcc": 50.0, "mIoU": 3.0 * s + 1, "step": s} for s in (2, 4, 6)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    damaged = '\ufeff{"loss": 1.0, "step": 1}\n{"mIoU": NaN, "step": 7}\n{"loss": 0.\n'
    for folder, start in ((ours, damaged), (mmseg, "")):
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text(start + text, encoding="utf-8")
    benchmark.main(benchmark.Args(curves=(ours, tmp_path / "work"), out=tmp_path / "out"))
    output = capsys.readouterr().out
    assert "2 lines left out" in output and output.count("mIoU 19 at step 6") == 2
    assert (tmp_path / "out/curves.png").exists() and len(benchmark.read_curve(ours)) == 9
    with pytest.raises(UserError, match="2 files"):
        benchmark.read_curve(tmp_path)


# ---- The contract of every script ---------------------------------------------------------------
SCRIPTS = sorted({path.name for path in ROOT.glob("*.py")} - {"common.py", "datasets.py"})


def test_help_fits_a_terminal_and_writes_nothing(tmp_path: Path):
    options = {"env": environment(), "stdout": subprocess.PIPE, "text": True}
    processes = {}
    for name in SCRIPTS:
        line = [sys.executable, str(ROOT / name), "--help"]
        processes[name] = subprocess.Popen(line, **options)
    for name, process in processes.items():
        output, _ = process.communicate()
        assert process.returncode == 0 and "usage:" in output, name
        assert max(len(line) for line in output.splitlines() if line[:1] in "│╭") <= 80, name
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a single core
def test_every_measurement_of_bench_runs(mini: Path, capsys):
    """bench.py is run by hand, so nothing else would notice that it calls what is gone."""
    bench.main(bench.Args(data=str(mini), device="cpu", rounds=1, steps=1))
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["training", "cached batches"]


@pytest.mark.parametrize("name", [*SCRIPTS, "common.py"])
def test_every_flag_is_explained(name: str):
    """Each field of an Args class has a docstring under it, which --help shows."""
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Args"):
            for field, below in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
                    assert text, f"{name}: {node.name}.{field.target.id} has no docstring"


def test_the_readme_shows_the_results_of_its_run():
    results = json.loads((ROOT / "docs/results.json").read_text())
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    mious = {}
    for row in results:
        mious.setdefault((row["benchmark"], row["method"]), []).append(row["miou"])
    for method in dict.fromkeys(row["method"] for row in results):
        cells, gaps = [], []
        for name in datasets.BENCHMARKS:
            values, rows = mious[name, method], (method, "source_only", "oracle")
            cells.append(f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}")
            row, low, high = (np.mean(mious[name, other]) for other in rows)
            gaps.append((row - low) / (high - low))
        lines = [line for line in readme if line.startswith(f"| `{method}` |")]
        end = f" | {' | '.join(cells)} | {np.mean(gaps):.0%} |"
        assert lines and all(line.endswith(end) for line in lines), method
