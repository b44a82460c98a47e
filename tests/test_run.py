"""Run folder: checkpoints, resuming, scalars, results; and what training may depend on."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import environment, like

import benchmark
import common
from common import UserError


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return common.read_checkpoint(folder / "checkpoint.pt")["net"]


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def baseline(args: common.Args, row: str, out: str, **changes) -> benchmark.BaselineArgs:
    return like(args, benchmark.BaselineArgs, **{"out": Path(out), **changes}, row=row)


# ---- The folder ---------------------------------------------------------------------------------
def test_a_run_writes_what_the_contract_says(args: common.Args):
    result = benchmark.run_baseline(baseline(args, "few_label", "run", steps=25))
    names = {p.relative_to("run").as_posix() for p in Path("run").rglob("*") if p.is_file()}
    assert names == {
        "config.json", "result.json", "scalars.json", "loss.csv", "metrics.csv", "checkpoint.pt",
        "confusion.npy", "figures/curves.png", "figures/predictions.png",
    }  # fmt: skip
    row = json.loads(Path("run/result.json").read_text())
    assert list(row) == [
        "benchmark", "method", "seed", "status", "error", "miou", "iou", "target_labels", "steps",
        "seconds", "peak_memory_mb", "device", "commit", "versions", "beside",
    ]  # fmt: skip
    assert (row["method"], row["target_labels"], row["steps"]) == ("few_label", 2, 25)
    assert row["miou"] == result.miou and row["peak_memory_mb"] > 0
    confusion = np.load("run/confusion.npy")
    assert common.scores(confusion.sum(axis=0))["mIoU"] == result.miou

    lines = common.read_scalars(Path("run"))
    training = [line for line in lines if "mIoU" not in line]
    evaluation = [line for line in lines if "mIoU" in line]
    assert all({"loss", "lr", "iter", "step"} <= set(line) for line in training)
    assert all({"mIoU", "aAcc", "mAcc", "step"} == set(line) for line in evaluation)
    steps = [line["step"] for line in lines]
    assert steps == sorted(steps) and steps[-1] == 25 and evaluation[-1]["mIoU"] == result.miou
    with open("run/metrics.csv") as file:
        assert [float(r["mIoU"]) for r in csv.DictReader(file)] == [e["mIoU"] for e in evaluation]


def test_the_learning_rate_that_is_logged_is_the_schedule(args: common.Args):
    """40 steps: two of warm-up, then polynomial decay; the log says the mean over ten steps."""
    benchmark.run_baseline(baseline(args, "source_only", "run", steps=40, lr=0.1))
    logged = {line["step"]: line["lr"] for line in common.read_scalars(Path("run")) if "lr" in line}
    exact = [0.1 * min(1, t / 2) * (1 - (t - 1) / 40) ** 0.9 for t in range(1, 41)]
    assert list(logged) == [10, 20, 30, 40]
    for end, value in logged.items():
        assert value == pytest.approx(np.mean(exact[end - 10 : end]))


def test_a_finished_run_is_not_repeated_and_another_moves_it_aside(args: common.Args):
    first = benchmark.run_baseline(baseline(args, "source_only", "run"))
    stamp = Path("run/checkpoint.pt").stat().st_mtime_ns
    assert benchmark.run_baseline(baseline(args, "source_only", "run")) == first
    assert Path("run/checkpoint.pt").stat().st_mtime_ns == stamp
    old = Path("run/checkpoint.pt").read_bytes()
    benchmark.run_baseline(baseline(args, "source_only", "run", seed=1))
    assert Path("run.old/checkpoint.pt").read_bytes() == old
    again = benchmark.run_baseline(baseline(args, "source_only", "run", seed=1, resume=False))
    assert again.miou == json.loads(Path("run.old/result.json").read_text())["miou"]


def test_a_checkpoint_starts_another_run(args: common.Args):
    benchmark.run_baseline(baseline(args, "source_only", "one"))
    init = Path("one/checkpoint.pt")
    result = benchmark.run_baseline(baseline(args, "source_only", "two", init=init))
    assert same(weights(Path("one")), weights(Path("two"))) and result.steps == 0
    tuned = benchmark.run_baseline(baseline(args, "few_label", "three", init=init))
    assert tuned.steps == 3 and not same(weights(Path("one")), weights(Path("three")))


# ---- Resuming -----------------------------------------------------------------------------------
SCRIPT = """
import sys, time, common, benchmark
from pathlib import Path
data, out, slow = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
del sys.argv[1:]
log = common.Run.log
def slowly(self, step, **values):
    log(self, step, **values)
    print(step, flush=True)
    time.sleep(slow)
common.Run.log = slowly
args = benchmark.BaselineArgs(data=data, out=out, row="few_label", steps=40,
                              batch_size=4, size=(32, 64), labelled=2, device="cpu")
common.main(lambda: args, benchmark.run_baseline, None)
"""


def start(mini: Path, out: str, slow: float) -> subprocess.Popen:
    Path("script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(mini), out, str(slow)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **pipes)


@pytest.fixture(scope="module")
def whole(mini: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    with contextlib.chdir(folder):
        process = start(mini, "run", 0)
        assert process.wait() == 0, process.stderr.read()
    return folder / "run"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_was_cut_off_ends_with_the_same_weights(
    mini: Path, whole: Path, how: signal.Signals
):
    """Killed in its second stage (steps 21 to 40), after a checkpoint and some steps more."""
    cut = start(mini, "cut", 0.05)
    steps = (line for line in cut.stdout if line.strip().isdigit())
    seen = 0
    for line in steps:
        seen += int(line) == 5
        if seen == 2:  # step 5 of the second stage
            break
    cut.send_signal(how)
    _, error = cut.communicate()
    if how == signal.SIGKILL:
        assert cut.returncode == -9
    else:
        assert cut.returncode == 130 and error.count("\n") == 1
        assert "the same command goes on" in error
    assert not Path("cut/result.json").exists()
    again = start(mini, "cut", 0)
    out, error = again.communicate()
    assert again.returncode == 0, error
    assert error.count("goes on after step") == 1  # the stage that was cut off
    done = [int(line) for line in out.splitlines() if line.strip().isdigit()]
    assert done[-1] == 20 and len(done) <= 16  # the first stage and what was saved is not repeated
    assert same(weights(whole), weights(Path("cut")))
    scalars = [common.read_scalars(folder) for folder in (whole, Path("cut"))]
    for line in (line for lines in scalars for line in lines):
        for key in ("time", "data_time", "memory"):
            line.pop(key, None)
    assert scalars[0] == scalars[1]


def test_a_second_stage_starts_from_the_state_at_the_end_of_the_first(args: common.Args):
    """The record of a finished stage is a copy: later training must not leak into it."""
    run = common.Run(replace(args, out=Path("run")), "x")
    net = run.network()
    list(run.steps("one", 1, net=net))
    kept = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        for p in net.parameters():
            p.add_(1)
    list(run.steps("two", 1, net=net))
    again = common.Run(replace(args, out=Path("run")), "x")
    net = again.network()
    assert list(again.steps("one", 1, net=net)) == []
    assert same(net.state_dict(), kept)


@pytest.mark.parametrize(
    "broken", ["write_csvs", "draw_curves", "draw_predictions", "write_json", "scores"]
)
def test_what_dies_while_it_finishes_is_finished_by_the_next(
    args: common.Args, monkeypatch: pytest.MonkeyPatch, broken: str
):
    """No step is trained again, and no file is missing in the end."""
    benchmark.run_baseline(baseline(args, "source_only", "whole"))
    real, calls = getattr(common, broken), []

    def dies(*arguments, **options):
        calls.append(arguments)
        done = broken == "write_json" and "config" in str(arguments[0])
        if done or (broken == "scores" and len(calls) < 7):  # the evaluations on the way
            return real(*arguments, **options)
        raise SystemExit("killed")

    monkeypatch.setattr(common, broken, dies)
    with pytest.raises(SystemExit):
        benchmark.run_baseline(baseline(args, "source_only", "cut"))
    monkeypatch.setattr(common, broken, real)
    assert not Path("cut/result.json").exists()
    benchmark.run_baseline(baseline(args, "source_only", "cut"))
    names = [sorted(p.name for p in Path(x).rglob("*")) for x in ("whole", "cut")]
    assert names[0] == names[1] and not Path("cut.old").exists()
    assert same(weights(Path("whole")), weights(Path("cut")))


def test_two_processes_never_share_a_run_folder(args: common.Args):
    run = common.Run(replace(args, out=Path("run")), "x")
    other = "import common, pathlib; common.locked(pathlib.Path('run/.lock'))"
    command = [sys.executable, "-c", other]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert "run: another process is at work in this folder" in ended.stderr
    run.finish(run.network(), target_labels=0)
    assert subprocess.run(command, env=environment()).returncode == 0


def test_a_stage_begins_once_and_not_inside_another(args: common.Args):
    run = common.Run(replace(args, out=Path("run")), "x")
    list(run.steps("one", 2))
    with pytest.raises(ValueError, match="'one' begins a second time"):
        list(run.steps("one", 3))
    with pytest.raises(ValueError, match="inside another stage"):
        for _ in run.steps("two", 2):
            list(run.steps("three", 2))


def test_another_checkpoint_under_the_same_name_is_another_run(args: common.Args):
    for seed in (0, 1):
        benchmark.run_baseline(baseline(args, "source_only", f"seed{seed}", seed=seed))
    shutil.copy("seed0/checkpoint.pt", "init.pt")
    first = benchmark.run_baseline(baseline(args, "source_only", "run", init=Path("init.pt")))
    shutil.copy("seed1/checkpoint.pt", "init.pt")
    second = benchmark.run_baseline(baseline(args, "source_only", "run", init=Path("init.pt")))
    assert first.miou != second.miou
    Path("run.old/config.json").unlink()  # whatever this is, it is no run folder: it stays
    with pytest.raises(UserError, match=r"run\.old: in the way"):
        benchmark.run_baseline(baseline(args, "source_only", "run", seed=5))


# ---- What weights may depend on -----------------------------------------------------------------
def test_seeds_change_the_weights_and_nothing_else_does(args: common.Args):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        benchmark.run_baseline(baseline(args, "random_aug", name, seed=seed))
    assert same(weights(Path("a")), weights(Path("b")))
    assert not same(weights(Path("a")), weights(Path("c")))


def test_training_runs_under_autocast(args: common.Args, monkeypatch: pytest.MonkeyPatch):
    """As on CUDA: pictures are augmented in full precision, the network computes in bfloat16."""
    half = torch.autocast("cpu", torch.bfloat16)
    monkeypatch.setattr(common.Run, "autocast", lambda self: half)
    benchmark.run_baseline(baseline(args, "random_aug", "run", batch_size=8))
    assert all(v.dtype != torch.bfloat16 for v in weights(Path("run")).values())


def test_training_learns(args: common.Args):
    """Thirty updates on the target's own photos halve the loss and beat a constant guess."""
    result = benchmark.run_baseline(baseline(args, "oracle", "run", steps=60, batch_size=8))
    losses = [line["loss"] for line in common.read_scalars(Path("run")) if "loss" in line]
    assert losses[-1] < losses[0] / 2 and result.miou > 15


# ---- Failures -----------------------------------------------------------------------------------
def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(args: common.Args):
    run = common.Run(replace(args, out=Path("run")), "x")
    net = run.network()
    with pytest.raises(UserError, match=r"loss is nan at step 17; last good checkpoint: run/check"):
        for step in run.steps("train", 40, net=net):
            run.log(step, loss=torch.tensor(float("nan") if step == 17 else 1.0), lr=0.1)
    kept = common.read_checkpoint(Path("run/checkpoint.pt"))["stages"]["train"]
    assert kept["step"] == 16 and all(v.isfinite().all() for v in kept["state"]["net"].values())


def test_weights_that_are_not_finite_are_never_saved(args: common.Args):
    run = common.Run(replace(args, out=Path("run")), "x")
    net = run.network()
    with pytest.raises(UserError, match=r"weights of net are not finite at step 5 \(stage train\)"):
        for step in run.steps("train", 10, net=net):
            if step == 5:
                next(net.parameters()).data.fill_(float("inf"))
            run.log(step, loss=1.0)
    assert all(v.isfinite().all() for v in weights(Path("run")).values())


def test_a_full_disk_gets_one_line_and_leaves_the_last_checkpoint(mini: Path, whole: Path):
    """A limit on the size of files stands for the disk: the write fails in the same way."""
    shutil.copytree(whole, "run")
    shutil.copy(whole.parent / "script.py", "script.py")
    before = Path("run/checkpoint.pt").read_bytes()
    Path("run/result.json").unlink()
    full = (
        "import resource, runpy, sys\nresource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
    )
    Path("full.py").write_text(full + "sys.argv.pop(0)\nrunpy.run_path('script.py')\n")
    Path("run/config.json").write_text('{"method": "x"}')  # another configuration: it starts anew
    command = [sys.executable, "full.py", "script.py", str(mini), "run", "0"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 1, ended.stderr
    assert ended.stderr.count("\n") == 1 and "File too large" in ended.stderr
    assert Path("run.old/checkpoint.pt").read_bytes() == before
    assert not list(Path("run").glob(".*.tmp"))


def test_data_is_not_what_a_step_waits_for(args: common.Args, capfd: pytest.CaptureFixture):
    benchmark.run_baseline(baseline(args, "source_only", "run", steps=40))
    line = next(line for line in capfd.readouterr().out.splitlines() if "waiting" in line)
    words = line.split()
    assert float(words[words.index("step,") + 1]) < 0.05 * float(words[1]), line


def test_ctrl_c_twice_does_not_wait_for_the_step(mini: Path):
    cut = start(mini, "cut", 30)
    cut.stdout.readline()
    began = time.monotonic()
    os.kill(cut.pid, signal.SIGINT)
    time.sleep(0.5)
    os.kill(cut.pid, signal.SIGINT)
    _, error = cut.communicate()
    assert cut.returncode == 130 and time.monotonic() - began < 15 and "Traceback" not in error


def test_a_set_made_by_one_method_is_the_source_of_another(args, tmp_path):
    given = common.load(args, "source")
    images, labels = given.images[::2], given.labels[::2]
    folder = tmp_path / "set"
    common.save_set(folder, given.dataset, 255 - images, labels, given.names[::2])
    other = replace(args, init=folder)
    assert other.checkpoint is None
    part = common.load(other, "source")
    assert (part.images == 255 - images).all() and (part.labels == labels).all()
    assert part.names == given.names[::2]
    photos = common.load(other, "target_unlabelled")
    assert (photos.images == common.load(args, "target_unlabelled").images).all()
    one = common.configuration(other, "x")
    common.save_set(folder, given.dataset, images, labels, given.names[::2])
    assert common.configuration(other, "x") != one  # what was in it decides


def test_init_of_a_folder_that_holds_no_set_or_another(args, tmp_path):
    for make in (lambda: None, lambda: (tmp_path / "set.json").write_text("{")):
        make()
        with pytest.raises(UserError, match="not a training set"):
            common.resolve(replace(args, init=tmp_path), "x")
    part = common.load(args, "source")
    common.save_set(tmp_path, "gta5", part.images[:2], part.labels[:2], part.names[:2])
    with pytest.raises(UserError, match="holds gta5 at"):
        common.resolve(replace(args, init=tmp_path, benchmark="vkitti2kitti"), "x")


# ---- Several processes --------------------------------------------------------------------------
TWO = """
import copy, sys
from pathlib import Path
import torch
import benchmark, common

torch.set_num_threads(1)
args = benchmark.BaselineArgs(
    data=sys.argv[1], steps=6, batch_size=4, size=(32, 64), labelled=2, lr=1e-3, device="cpu",
    row="few_label", out=Path(sys.argv[2]),
)
if common.join_world("cpu") and common.world()[1] == 2:  # in float64, where rounding does not blur
    torch.manual_seed(0)
    alone = common.Network("bisenet", 5).body.double().train()
    both = common.spread(copy.deepcopy(alone))
    images = torch.rand(4, 3, 64, 64).double()
    for net in (alone, both):
        sum(output.sin().mean() for output in net(images, True)).backward()
    for one, other in zip(alone.parameters(), both.parameters()):
        assert torch.allclose(one.grad, other.grad, rtol=1e-8, atol=1e-10)
    for one, other in zip(alone.buffers(), both.buffers()):
        assert torch.allclose(one.double(), other.double(), rtol=1e-10)
    assert torch.equal(copy.deepcopy(both).eval()(images, 0)[0], both.eval()(images, 0)[0])
del sys.argv[1:]
common.main(lambda: args, benchmark.run_baseline, "")
"""


def test_two_processes_end_like_one_at_the_same_global_batch(args: common.Args, mini: Path):
    """Weights, scores and files; the metric is summed over the processes."""
    Path("two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", "two.py", str(mini), "both"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("mIoU") == 1  # rank 0 alone speaks
    benchmark.run_baseline(baseline(args, "few_label", "alone", lr=1e-3))
    # In float32 Adam turns the rounding of gradients that ought to be 0 into whole steps, also from
    # one thread to two; what is learned is the same.
    losses = [
        [line["loss"] for line in common.read_scalars(Path(f)) if "loss" in line]
        for f in ("alone", "both")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    one, two = weights(Path("alone")), weights(Path("both"))
    distance = sum((one[k].double() - two[k].double()).square().sum() for k in one).sqrt()
    assert distance < 1e-3 * sum(one[k].double().square().sum() for k in one).sqrt()
    single, double = (json.loads(Path(f, "result.json").read_text()) for f in ("alone", "both"))
    assert double["miou"] == pytest.approx(single["miou"], abs=0.1)
    counts = [np.load(Path(f, "confusion.npy")).sum(axis=(1, 2)) for f in ("alone", "both")]
    assert (counts[0] == counts[1]).all()
    assert {p.name for p in Path("alone").iterdir()} == {p.name for p in Path("both").iterdir()}
