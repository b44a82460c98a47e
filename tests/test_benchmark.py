"""The table: rows, statistics, reuse, interruption; and the contract of every script."""

import ast
import contextlib
import dataclasses
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, environment

import benchmark
import common
from common import Result

SHORT = ["--steps", "2", "--batch-size", "2", "--size", "32", "64", "--labelled", "1"]


def table(mini: Path, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmark.py"), "--data", str(mini), *SHORT, *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


# ---- Running ------------------------------------------------------------------------------------
def test_the_table_end_to_end(mini: Path):
    """Both benchmarks, then two seeds of one row, of which one has been run, then by force."""
    ended = table(mini, "--methods", "source_only", "few_label", "--jobs", "2")
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in ended.stdout
    assert "gta5 and cityscapes: the miniature; not to be read beside published" in ended.stdout
    rows = json.loads(Path("runs/results.json").read_text())
    assert [(r["benchmark"], r["method"]) for r in rows] == [
        (b, m) for b in common.BENCHMARKS for m in ("source_only", "few_label")
    ]
    assert all(r["status"] == "finished" and r["steps"] == 2 for r in rows)
    assert all(0 < r["peak_memory_mb"] < 2000 for r in rows)
    assert [r["target_labels"] for r in rows] == [0, 1] * 2
    assert "| few_label | 1 |" in Path("runs/results.md").read_text()
    pictures = {"miou.png", "cost.png", *(f"{b}.png" for b in common.BENCHMARKS)}
    assert {p.name for p in Path("runs/figures").iterdir()} == pictures

    flags = ("--methods", "source_only", "--benchmarks", "vkitti2kitti")
    seeds = table(mini, *flags, "--seeds", "0", "1")
    assert "1 of 2 rows are finished already" in seeds.stdout and "±" in seeds.stdout
    both = json.loads(Path("runs/results.json").read_text())
    assert both[0] == rows[0] and both[1]["seed"] == 1
    gathered = table(mini, "--collect", "runs", "--out", "elsewhere")
    assert gathered.returncode == 0, gathered.stderr
    rows = json.loads(Path("elsewhere/results.json").read_text())
    assert len(rows) == 5 and both[1] in rows and "few_label (1)" in gathered.stdout
    forced = table(mini, *flags, "--force")
    assert "finished already" not in forced.stdout and forced.returncode == 0
    redone = json.loads(Path("runs/results.json").read_text())
    assert redone[0]["miou"] == rows[0]["miou"] and redone[0]["seconds"] != rows[0]["seconds"]


def test_ctrl_c_loses_no_finished_row(mini: Path):
    flags = [*SHORT, "--methods", "source_only", "random_aug", "--benchmarks", "vkitti2kitti"]
    flags[1] = "40"
    command = [sys.executable, str(ROOT / "benchmark.py"), "--data", str(mini), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell's background job ignores Ctrl-C, and what it starts inherits that.
    pipes["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)
    scalars = Path("runs/vkitti2kitti/random_aug/seed0/scalars.json")
    while not (scalars.exists() and scalars.read_text()) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    output, error = process.communicate()
    assert process.returncode == 130 and "Traceback" not in error, output + error
    assert "after 1 of 2 rows" in error
    assert len(json.loads(Path("runs/results.json").read_text())) == 1
    again = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert again.returncode == 0 and "1 of 2 rows are finished already" in again.stdout


def test_rows_side_by_side_on_two_devices_are_found_again(mini: Path):
    flags = ("--devices", "cpu", "cpu:0", "--methods", "source_only", "random_aug")
    first = table(mini, *flags, "--benchmarks", "vkitti2kitti")
    again = table(mini, *flags, "--benchmarks", "vkitti2kitti")
    assert first.returncode == 0 and "2 of 2 rows are finished already" in again.stdout


def test_a_killed_benchmark_leaves_no_row_behind(mini: Path):
    flags = [*SHORT, "--methods", "source_only", "--benchmarks", "vkitti2kitti"]
    flags[1] = "2000"
    command = [sys.executable, str(ROOT / "benchmark.py"), "--data", str(mini), *flags]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    scalars = Path("runs/vkitti2kitti/source_only/seed0/scalars.json")
    while not (scalars.exists() and scalars.read_text()) and process.poll() is None:
        time.sleep(0.05)
    process.kill()
    process.wait()
    with scalars.with_name(".lock").open("r+") as lock:  # free as soon as the row has ended
        for _ in range(200):
            with contextlib.suppress(OSError):
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            pytest.fail("the row trains on without its benchmark")
    assert (
        common.read_checkpoint(scalars.with_name("checkpoint.pt"))["stages"]["source"]["step"]
        < 2000
    )


def test_a_row_that_is_killed_is_reported(mini: Path, tmp_path: Path):
    """As by the kernel when memory runs out: the process leaves no word."""
    job = object.__new__(benchmark.Job)
    context = benchmark.multiprocessing.get_context("spawn")
    job.pipe, end = context.Pipe(duplex=False)
    job.process = context.Process(target=os.kill, args=(0, 0))
    job.process.start()
    end.close()
    os.kill(job.process.pid, signal.SIGKILL)
    while not job.ended():
        time.sleep(0.01)
    assert job.outcome == "killed by signal 9 (out of memory?)"


# ---- Numbers ------------------------------------------------------------------------------------
def test_spread_divides_by_n_minus_1():
    assert benchmark.spread([1.0, 2.0, 4.5]) == "2.5 ± 1.8"  # sqrt((2.25 + 0.25 + 4) / 2) = 1.80
    assert benchmark.spread([7.25]) == "7.2"


def test_a_class_that_no_test_photo_contains_is_named(mini: Path):
    args = benchmark.Args(data=str(mini), benchmarks=("vkitti2kitti",), methods=("oracle",))
    classes = common.BENCHMARKS["vkitti2kitti"].classes
    iou = {name: None if name in ("pole", "truck") else 50.0 for name in classes}
    numbers = {"target_labels": 0, "steps": 5, "seconds": 1.0, "peak_memory_mb": 1.0}
    results = [Result("vkitti2kitti", "oracle", 0, miou=50.0, iou=iou, **numbers)]
    rows = [benchmark.Row("oracle", common.Args(benchmark="vkitti2kitti"))]
    scores = benchmark.Scores(rows, results)
    assert any("no test photo contains pole, truck" in n for n in benchmark.notes(scores, args))
    assert ["pole", "-"] in benchmark.class_table(scores, "vkitti2kitti")


@pytest.mark.parametrize(("seeds", "of_seed"), [(1, 0.0), (3, 0.0), (3, 0.03), (5, 0.01)])
def test_the_interval_covers_the_truth(seeds: int, of_seed: float):
    """Simulated rows of two classes whose accuracies on an infinite test set are known: an image is
    easy or hard for both rows or for one, a seed good or bad for a row."""
    rng = np.random.default_rng(1)
    pixels, images, covered = 50, 60, []

    def confusion(accuracy: np.ndarray) -> np.ndarray:  # [S,N] -> [S,N,2,2]
        right = rng.binomial(pixels, accuracy[..., None].repeat(2, -1))  # of each class
        wrong = pixels - right
        return np.stack([right[..., 0], wrong[..., 0], wrong[..., 1], right[..., 1]], -1).reshape(
            *accuracy.shape, 2, 2
        )

    for _ in range(800):
        hard = rng.uniform(-0.15, 0.15, images)
        own, seed = rng.normal(0, 0.05, (2, 1, images)), rng.normal(0, of_seed, (2, seeds, 1))
        parts = zip((0.7, 0.6), own, seed, strict=True)
        rows = [confusion(np.clip(base + hard + o + s, 0, 1)) for base, o, s in parts]
        _, low, high = benchmark.interval(*rows, draws=300)
        # An accuracy a of both classes is an IoU of a / (2 - a).
        truth = 100 * (0.7 / 1.3 - 0.6 / 1.4)
        covered.append(low <= truth <= high)
    assert 0.93 <= np.mean(covered) <= 0.97


def test_the_interval_is_paired():
    """Images that are hard for both rows cancel: the difference is known far better than either."""
    rng = np.random.default_rng(0)
    right = rng.integers(10, 90, (1, 80))
    one = np.stack([right, 100 - right, 0 * right, 100 + 0 * right], -1).reshape(1, 80, 2, 2)
    other = one + np.array([[2, -2], [0, 0]])
    mean, low, high = benchmark.interval(other, one)
    _, least, most = benchmark.interval(one)
    assert mean == pytest.approx(benchmark.mious(other.sum(1))[0] - benchmark.mious(one.sum(1))[0])
    assert high - low < 0.05 * (most - least) and low < mean < high
    for confusion in one[0, :3]:
        assert benchmark.mious(confusion) == pytest.approx(common.scores(confusion)["mIoU"])


def test_a_combination_costs_what_its_parts_cost(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(benchmark, "METHODS", {"maker": "set", "trainer": "checkpoint"})
    numbers = {"miou": 1.0, "steps": 10, "peak_memory_mb": 5.0, "seconds": 2.0}
    before = Result("b", "x", 0, target_labels=3, beside="7 a", **numbers)
    after = Result("b", "trainer", 0, target_labels=0, beside="8 b", **numbers)
    for name, steps in (("maker+trainer", 10), ("trainer+trainer", 20)):
        both = benchmark.joined(benchmark.Row(name, None), after, before)
        assert (both.steps, both.target_labels, both.seconds) == (steps, 3, 4.0)
        assert both.beside == "7 a, 8 b" and both.method == name
    args = benchmark.Args(methods=("maker",), combine=("maker+trainer+few_label",))
    names = ["maker", "maker+trainer", "maker+trainer+few_label"]
    assert benchmark.names_of(args) == names
    commands = benchmark.shell_commands(dataclasses.replace(args, benchmarks=("vkitti2kitti",)))
    assert [c.split("--seeds")[0].split("--benchmarks")[0].split("--methods ")[-1] for c in commands
            if c[0] != "#"] == [
        "maker ", f"maker --combine {names[1]} ", f"maker --combine {names[2]} "
    ]  # fmt: skip
    assert sum(c.startswith("#") for c in commands) == 2


SIXTH = """
import dataclasses, os, time
import numpy as np
import common

@dataclasses.dataclass(frozen=True)
class Args(common.Args):
    pass

def run(args):
    run = common.Run(args, "sixth")
    if run.result:
        return run.result
    if args.seed == 1:
        raise RuntimeError("boiled over")
    while args.seed == 2:
        time.sleep(1)
    part = common.load(run.args, "source")
    common.save_set(run.out / "set", part.dataset, part.images[:4], part.labels[:4], part.names[:4])
    return run.finish(run.network(), target_labels=0, beside="3 looks")
"""


def test_a_sixth_method_is_one_file_and_one_line(mini: Path, tmp_path: Path):
    """It works, crashes or hangs by its seed; a combination takes its training set."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / "sixth.py").write_text(SIXTH)
    script = tmp_path / "benchmark.py"
    line = 'METHODS: dict[str, Literal["set", "checkpoint"]] = {'
    text = script.read_text()
    assert line in text
    script.write_text(text.replace(line, line + '"sixth": "set", '))
    flags = ["--data", str(mini), *SHORT, "--benchmarks", "vkitti2kitti", "--jobs", "2"]
    flags += ["--methods", "sixth", "--combine", "sixth+source_only", "--timeout", "15"]
    command = [sys.executable, str(script), *flags, "--seeds", "0", "1", "2"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr + ended.stdout
    rows = json.loads(Path("runs/results.json").read_text())
    assert [(r["method"], r["seed"], r["error"]) for r in rows] == [
        ("sixth", 0, None), ("sixth+source_only", 0, None),
        ("sixth", 1, "RuntimeError: boiled over"), ("sixth+source_only", 1, "sixth failed"),
        ("sixth", 2, "given up after --timeout 15 s"), ("sixth+source_only", 2, "sixth failed"),
    ]  # fmt: skip
    assert rows[0]["beside"] == rows[1]["beside"] == "3 looks" and "3 looks" in ended.stdout
    config = common.read_config(Path("runs/vkitti2kitti/sixth+source_only/seed0"))
    assert config["init"] and "sixth: RuntimeError" not in ended.stdout


def test_curves_of_our_runs_and_of_mmsegmentation(tmp_path: Path):
    ours, theirs = tmp_path / "a/run/seed0", tmp_path / "work/2026/vis_data"
    lines = [{"loss": 2.0 / s, "lr": 0.1, "iter": s, "step": s} for s in range(1, 6)]
    scores = [{"aAcc": 50.0, "mIoU": 3.0 * s + 1, "mAcc": 20.0, "step": s} for s in (2, 4, 6)]
    for folder, rows in ((ours, lines + scores), (theirs, [*lines, *scores[:1]])):
        folder.mkdir(parents=True)
        (folder / "scalars.json").write_text("".join(json.dumps(r) + "\n" for r in rows))
    out = io.StringIO()
    args = benchmark.Args(curves=(ours, tmp_path / "work"), out=tmp_path / "out")
    benchmark.draw_curves(args, benchmark.Console(file=out, width=80))
    assert "+3000.00" in out.getvalue()  # the slope of the line, a thousand steps
    written = sorted(p.relative_to(tmp_path / "out/curves") for p in tmp_path.glob("out/**/*.*"))
    assert len(written) == 5 and (tmp_path / "out/curves/curves.png").exists()
    metrics = next(tmp_path.glob("out/curves/*run-seed0/metrics.csv")).read_text().splitlines()
    assert metrics[0].startswith("step") and len(metrics) == 4
    assert sorted(p.name for p in theirs.iterdir()) == ["scalars.json"]  # inputs stay as they are
    assert benchmark.smooth(np.array([1.0, 2, 6]), 3) == pytest.approx([1.5, 3, 4])
    (theirs / "scalars.json").write_text("{broken")
    with pytest.raises(common.UserError, match="line 1: not JSON"):
        benchmark.read_curve(tmp_path / "work")


# ---- The contract of every script ---------------------------------------------------------------
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_quick_and_importing_does_nothing(
    name: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
):
    far = tmp_path_factory.mktemp("far") / ("a_folder_of_a_long_name" * 4)
    far.symlink_to(ROOT)  # wherever the project lies, its help fits a terminal
    began = time.monotonic()
    command = [sys.executable, str(far / name), "--help"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0 and "usage:" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    assert time.monotonic() - began < 4 or os.getloadavg()[0] > 2  # a busy machine is no measure
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_explained(name: str):
    """Each field of an Args class has a docstring under it, which --help shows."""
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Args"):
            for field, below in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    explained = isinstance(below, ast.Expr) and isinstance(
                        below.value, ast.Constant
                    )
                    assert explained, f"{name}: {node.name}.{field.target.id} has no docstring"


def test_the_table_passes_on_flags_that_every_method_has():
    shared = {f.name: f.type for f in dataclasses.fields(common.Args)}
    own = {f.name: f.type for f in dataclasses.fields(benchmark.Args)}
    for name in set(own) & set(shared) - {"out"}:
        assert own[name] == shared[name]
        default = common.Args.__dataclass_fields__[name].default
        assert benchmark.Args.__dataclass_fields__[name].default == default
