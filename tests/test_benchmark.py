"""The table: rows, statistics, reuse, interruption; and the contract of every script."""

import ast
import contextlib
import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

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
    ended = table(mini, "--methods", "source_only", "few_label")
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
    assert {p.name for p in Path("runs/figures").iterdir()} == {
        f"{b}.png" for b in common.BENCHMARKS
    }

    flags = ("--methods", "source_only", "--benchmarks", "vkitti2kitti")
    seeds = table(mini, *flags, "--seeds", "0", "1")
    assert "1 of 2 rows are finished already" in seeds.stdout and "±" in seeds.stdout
    both = json.loads(Path("runs/results.json").read_text())
    assert both[0] == rows[0] and both[1]["seed"] == 1
    forced = table(mini, *flags, "--force")
    assert "finished already" not in forced.stdout and forced.returncode == 0
    redone = json.loads(Path("runs/results.json").read_text())
    assert redone[0]["miou"] == rows[0]["miou"] and redone[0]["seconds"] != rows[0]["seconds"]


def test_ctrl_c_loses_no_finished_row(mini: Path):
    flags = [*SHORT, "--methods", "source_only", "random_aug", "--benchmarks", "vkitti2kitti"]
    flags[1] = "40"
    command = [sys.executable, str(ROOT / "benchmark.py"), "--data", str(mini), *flags]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment(), start_new_session=True, **pipes)
    scalars = Path("runs/vkitti2kitti/random_aug/seed0/scalars.json")
    while not (scalars.exists() and scalars.read_text()) and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, error = process.communicate()
    assert process.returncode == 130 and "Traceback" not in error, error
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
    assert any("no test photo contains pole, truck" in n for n in benchmark.notes(results, args))
    assert ["pole", "-"] in benchmark.class_table(results, args, "vkitti2kitti")


# ---- The contract of every script ---------------------------------------------------------------
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_quick_and_importing_does_nothing(name: str, tmp_path: Path):
    began = time.monotonic()
    command = [sys.executable, str(ROOT / name), "--help"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0 and "usage:" in ended.stdout
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
