"""Run folder: checkpoints, resuming, scalars, results; and what training may depend on."""

import csv
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import begun, environment, interrupted, like, read_scalars, same_weights, weights
from PIL import Image

import baseline
import common
import datasets


def run(args: common.Args, row: str, out: str, **changes) -> common.Result:
    changes = {"out": Path(out), **changes, "row": row}
    return baseline.run(like(args, baseline.Args, **changes))


# ---- The folder ---------------------------------------------------------------------------------
def test_a_run_writes_what_the_contract_says(args: common.Args):
    result = run(args, "few_label", "run", steps=50)  # 25 on the source, 25 on the photos
    names = {p.relative_to("run").as_posix() for p in Path("run").rglob("*") if p.is_file()}
    expected = "config.json result.json scalars.json loss.csv metrics.csv checkpoint.pt"
    assert names == {*expected.split(), "confusion.npy", "figures/predictions.png"}
    row = json.loads(Path("run/result.json").read_text())
    assert (row["method"], row["target_labels"], row["steps"]) == ("few_label", 2, 50)
    assert (row["status"], row["error"], row["seed"]) == ("finished", None, 0)
    assert asdict(result) == row and row["peak_memory_mb"] > 0 and row["seconds"] > 0
    confusion = np.load("run/confusion.npy")  # [images, classes, classes]
    assert confusion.shape == (6, 10, 10)
    assert common.scores(confusion.sum(axis=0))["mIoU"] == result.miou
    ious = dict(zip(datasets.KITTI_CLASSES, common.iou(confusion.sum(axis=0)), strict=True))
    assert row["iou"] == ious

    # JSON lines as MMSegmentation writes them, and the same as tables.
    lines = read_scalars(Path("run"))
    training, metrics = ([x for x in lines if ("mIoU" in x) == kind] for kind in (False, True))
    assert [line["step"] for line in training] == [10, 20, 25, 35, 45, 50]
    assert all(set(line) == {"loss", "lr", "memory", "iter", "step"} for line in training)
    assert [line["step"] for line in metrics] == [6, 12, 18, 24, 31, 37, 43, 49, 50]
    assert all(set(line) == {"mIoU", "aAcc", "mAcc", "iter", "step"} for line in metrics)
    assert all(line["iter"] == line["step"] for line in lines)
    assert metrics[-1]["mIoU"] == result.miou
    exact = [0.01 * (1 - (step - 1) / 25) ** 0.9 for step in (10, 20, 25)]  # polynomial decay
    assert [line["lr"] for line in training[:3]] == pytest.approx(exact)
    assert common.learning_rate(0.1, 1, 40) == pytest.approx(0.05)  # the first of two of warm-up
    for table, expected in (("loss", training), ("metrics", metrics)):
        rows = csv.DictReader(Path(f"run/{table}.csv").read_text().splitlines())
        assert [{k: float(v) for k, v in row.items()} for row in rows] == expected


def test_every_tenth_step_is_logged_with_the_keys_that_it_has(args: common.Args):
    run = begun(replace(args, out=Path("run")), "x", stages=2)
    for step in run.steps("first", 25):
        extra = {"images": 3} if step == 20 else {}
        run.log(step, loss=torch.tensor(float(step)), **extra)
    for step in run.steps("second", 2):
        run.log(step, gap_loss=step)
    lines = read_scalars(Path("run"))
    assert [line.get("loss") for line in lines] == [10, 20, 25, None]
    assert [line["step"] for line in lines] == [10, 20, 25, 27]
    assert lines[1]["images"] == 3 and lines[3]["gap_loss"] == 2
    common.write_csv(Path("run/loss.csv"), lines)
    rows = csv.DictReader(Path("run/loss.csv").read_text().splitlines())
    assert [row["images"] for row in rows] == ["", "3.0", "", ""]


def test_a_run_says_what_it_does(args: common.Args, capfd: pytest.CaptureFixture, no_figures: None):
    run(args, "few_label", "run")
    assert capfd.readouterr().out.splitlines() == [
        "few_label: vkitti2, 20 images -> kitti (miniature), 6 photos and 6 for test; "
        "tiny, 32x64, 6 steps, cpu; run",
        "stage 1 of 2, source: 3 steps",
        "stage 2 of 2, few: 3 steps",
    ]
    run(args, "few_label", "run")
    assert capfd.readouterr().out == "run: finished earlier, with these arguments\n"


# ---- What is run again --------------------------------------------------------------------------
def test_a_finished_run_is_reused_wherever_its_data_lies(args: common.Args, no_figures: None):
    """Neither the device nor the path of the data decides: its content does."""
    first = run(args, "source_only", "run")
    stamp = Path("run/checkpoint.pt").stat().st_mtime_ns
    shutil.copytree(args.data, "copy")
    os.symlink(args.data, "link")
    for data in (os.path.relpath(args.data), f"{args.data}/../mini/", "link", "copy"):
        assert run(args, "source_only", "run", data=data, device="auto") == first
    cpu, other = (replace(common.resolve(args, "x"), device=d) for d in ("cpu", "cuda:1"))
    assert common.configuration(cpu, "x") == common.configuration(other, "x")
    assert Path("run/checkpoint.pt").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("keep_times", [False, True])
def test_ids_exchanged_in_a_file_of_equal_size_are_other_data(args, no_figures, keep_times):
    """As a labelling tool that saves uncompressed PNGs would leave it."""
    shutil.copytree(args.data, "copy")
    label = sorted(Path("copy/kitti/training/semantic").iterdir())[0]
    ids = np.asarray(Image.open(label))
    road, car = ids == 7, ids == 26
    Image.fromarray(ids).save(label, compress_level=0)
    first, before = run(args, "oracle", "run", data="copy"), label.stat()
    shutil.copytree("run", "kept")
    Image.fromarray(np.where(road, 26, np.where(car, 7, ids))).save(label, compress_level=0)
    assert label.stat().st_size == before.st_size
    if keep_times:
        os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))
        datasets.fingerprint.cache_clear()  # a new process
    second = run(args, "oracle", "run", data="copy")
    assert second.miou != first.miou and not same_weights("run", "kept")
    assert same_weights("run.old1", "kept")


def test_a_run_of_other_arguments_moves_the_old_ones_aside(args, monkeypatch, no_figures):
    """Nothing is ever lost, not even by --no-resume."""
    kept = []
    for changes in ({"seed": 0}, {"seed": 1}, {"seed": 1, "resume": False}):
        run(args, "source_only", "run", **changes)
        kept.append(Path("run/result.json").read_bytes())
    with pytest.raises(datasets.UserError, match="--labelled 99"):  # which moves nothing
        run(args, "few_label", "run", labelled=99)
    for name, content in zip(("run.old1", "run.old2", "run"), kept, strict=True):
        assert Path(name, "result.json").read_bytes() == content
    assert same_weights("run.old2", "run")  # the same seed
    with interrupted(monkeypatch, "source", 6):
        run(args, "source_only", "run", seed=2)
    run(args, "source_only", "run", seed=3)
    assert Path("run.old3/result.json").exists() and Path("run.old4/stage_source.pt").exists()


def test_a_checkpoint_starts_another_run_and_its_content_decides(args, no_figures):
    for seed in (0, 1):
        run(args, "source_only", f"seed{seed}", seed=seed)
    init = Path("init.pt")
    shutil.copy("seed0/checkpoint.pt", init)
    result = run(args, "source_only", "run", init=init)
    assert same_weights("seed0", "run") and result.steps == 0
    tuned = run(args, "few_label", "tuned", init=init)
    assert tuned.steps == 3 and not same_weights("seed0", "tuned")
    shutil.copy("seed1/checkpoint.pt", init)  # another one under the same name
    assert run(args, "source_only", "run", init=init).miou != result.miou
    assert Path("run.old1").exists()


# ---- Resuming -----------------------------------------------------------------------------------
SCRIPT = """
import sys, time, baseline, common
from pathlib import Path
data, out, wait = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
log = common.Run.log
def slow_log(self, step, **values):
    log(self, step, **values)
    print(self.stage, step, flush=True)
    time.sleep(wait)
common.Run.log = slow_log
sys.argv = ["x", "--row", "few_label", "--steps", "40", "--batch-size", "4", "--size", "32", "64",
            "--labelled", "2", "--device", "cpu", "--data", data, "--out", str(out)]
common.main(baseline.Args, baseline.run, None)
"""


def start(mini: Path, out: str, wait: float = 0, **options) -> subprocess.Popen:
    Path("script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(mini), out, str(wait)]
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment(), **options)


def scalars(folder: str) -> list[dict]:
    """Without what differs from process to process."""
    return [{k: v for k, v in line.items() if k != "memory"} for line in read_scalars(Path(folder))]


def test_a_killed_process_ends_with_the_same_weights(args: common.Args, mini: Path, no_figures):
    """Ctrl-C in the first stage, SIGKILL in the second, each some steps after a checkpoint."""
    run(args, "few_label", "whole", steps=40)
    for stage, how, code in ((1, signal.SIGINT, 130), (2, signal.SIGKILL, -9)):
        cut = start(mini, "cut", wait=0.2)
        assert f"{stage} 5\n" in cut.stdout
        cut.send_signal(how)
        _, error = cut.communicate()
        assert cut.returncode == code and ("interrupted; the same" in error) == (stage == 1)
        assert error.count("\n") == (stage == 1)
    assert not Path("cut/result.json").exists()
    again = start(mini, "cut")
    out, error = again.communicate()
    assert again.returncode == 0, error
    steps = [line for line in out.splitlines() if line[1] == " "]
    assert steps[-1] == "2 20" and len(steps) <= 16  # what was saved is not trained again
    assert same_weights("whole", "cut") and scalars("whole") == scalars("cut")


def test_a_run_cut_off_anywhere_ends_with_the_same_weights(args, monkeypatch, no_figures):
    """Before the first checkpoint, at the very end of a stage and at the start of the next."""
    run(args, "few_label", "whole", steps=50)
    for stage, step in (("source", 1), ("source", 14), ("source", 25), ("few", 1), ("few", 19)):
        with interrupted(monkeypatch, stage, step):
            run(args, "few_label", "cut", steps=50)
    run(args, "few_label", "cut", steps=50)
    assert same_weights("whole", "cut") and scalars("whole") == scalars("cut")
    assert not list(Path().glob("cut.old*")) and not list(Path("cut").glob("stage_*"))


def test_a_module_made_between_two_stages_is_the_same_after_a_restart(args, monkeypatch):
    def method(out: str) -> torch.Tensor:
        run = begun(replace(args, out=Path(out)), "x", stages=2)
        for step in run.steps("one", 3):
            torch.rand(step)  # dropout, say
        discriminator = torch.nn.Linear(2, 1)
        for _ in run.steps("two", 2, discriminator=discriminator):
            pass
        return discriminator.weight

    with interrupted(monkeypatch, "two", 1):
        method("cut")
    assert torch.equal(method("whole"), method("cut"))


@pytest.mark.parametrize("broken", ["write_csv", "write_json", "draw_predictions"])
def test_what_dies_while_it_finishes_is_finished_by_the_next(args, monkeypatch, broken):
    """No step is trained again, and no file is missing in the end."""
    run(args, "source_only", "whole")
    real = getattr(common, broken)

    def dies(*arguments, **options):
        if "config" not in str(arguments[0]):
            raise SystemExit("killed")
        return real(*arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common, broken, dies)
        run(args, "source_only", "cut")
    with monkeypatch.context() as patch:
        patch.setattr(common, "segmentation_loss", None)  # no step is left
        run(args, "source_only", "cut")
    names = [sorted(p.name for p in Path(x).rglob("*")) for x in ("whole", "cut")]
    assert names[0] == names[1] and not Path("cut.old1").exists()
    assert same_weights("whole", "cut") and scalars("whole") == scalars("cut")


# ---- What weights may depend on -----------------------------------------------------------------
def test_seeds_change_the_weights_and_nothing_else_does(args: common.Args, no_figures: None):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(args, "random_aug", name, seed=seed)
    assert same_weights("a", "b") and not same_weights("a", "c")


def test_training_learns(args: common.Args, no_figures: None):
    """Updates on the target's own photos halve the loss and beat a constant guess."""
    result = run(args, "oracle", "run", steps=60, batch_size=8)
    losses = [line["loss"] for line in scalars("run") if "loss" in line]
    assert losses[-1] < 0.6 * losses[0] and result.miou > 15


def test_a_full_disk_gets_one_line_and_no_half_file(args: common.Args, mini: Path, no_figures):
    """A limit on the size of files stands for the disk: the write fails in the same way."""
    run(args, "source_only", "run")
    before = Path("run/checkpoint.pt").read_bytes()
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (10**6, 10**6))
    process = start(mini, "run", preexec_fn=limit)
    _, error = process.communicate()
    assert process.returncode == 1 and error.count("\n") == 1
    assert re.match(r"error: \[Errno 27\] File too large: 'run/stage_\w+.pt'$", error)
    assert Path("run.old1/checkpoint.pt").read_bytes() == before
    assert not list(Path().rglob("*.tmp")) and not list(Path("run").glob("*.pt"))
    assert start(mini, "run").wait() == 0 and not Path("run.old2").exists()  # it goes on


# ---- Several processes --------------------------------------------------------------------------
TWO = """
import os, signal, sys, tempfile
from pathlib import Path
import torch
import common, datasets

folders = (os.getcwd(), tempfile.gettempdir())

def frozen(self, mode=True):  # SyncBatchNorm refuses CPUs
    for module in torch.nn.Module.train(self, mode).modules():
        module.training &= not isinstance(module, torch.nn.BatchNorm2d)
    return self

def watch(event, arguments):
    writes = event in ("os.mkdir", "os.rename", "os.truncate", "os.remove")
    writes |= event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
    if writes and os.path.abspath(os.fsdecode(arguments[0])).startswith(folders):
        print("WROTE", event, arguments, flush=True)

def log(self, step, **values):
    if step == kill_at and common.rank() == 1:
        print("KILLED", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, step, **values)

def method(args):
    run = common.Run(args, "two", stages=1)
    run.begin()
    net, source = run.network(), datasets.load(run.args, "source")
    common.train(run, net, source, 30, "source", augment=common.random_augmentation)
    return run.finish(net, 0)

if os.environ.get("RANK") == "1":
    sys.addaudithook(watch)
torch.set_num_threads(1)
write, common.Run.log, kill_at = common.Run.log, log, int(sys.argv[3])
common.Network.train = frozen
common.parse = lambda *_: common.Args(
    data=sys.argv[1], out=Path(sys.argv[2]), steps=30, batch_size=4, lr=1e-3, size=(32, 64),
    labelled=2, device="cpu",
)
common.main(common.Args, method, None)
"""


def test_two_processes_end_like_one_and_a_killed_one_ends_both(mini: Path):
    """At the same global batch, also after a restart; rank 0 alone writes, the cache too."""
    Path("two.py").write_text(TWO)
    options = {"env": {**environment(), "PYTHONDONTWRITEBYTECODE": "1"}, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    alone, both = [sys.executable, "two.py", str(mini)], [sys.executable, "-m"]
    both += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", *alone[1:]]

    cut = subprocess.Popen([*both, "both", "8"], **options)
    lines = list(itertools.takewhile(lambda line: line != "KILLED\n", cut.stdout))
    killed = time.monotonic()
    cut.communicate(timeout=60)  # which waits for all that have its pipes: for rank 0, too
    assert cut.returncode != 0 and time.monotonic() - killed < 30
    assert Path("both/stage_source.pt").exists() and not Path("both/result.json").exists()

    ended = subprocess.run([*both, "both", "0"], **options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("mIoU") == ended.stdout.count("stage 1 of 1") == 1
    assert "WROTE" not in "".join(lines) + ended.stdout
    subprocess.run([*alone, "alone", "0"], check=True, **options)
    losses = [[line["loss"] for line in scalars(x) if "loss" in line] for x in ("alone", "both")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    one, two = weights("alone"), weights("both")
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-4
    files = [sorted(path.name for path in Path(x).rglob("*")) for x in ("alone", "both")]
    assert files[0] == files[1]
