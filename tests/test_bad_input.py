"""What a user can get wrong: one line that names the file, and nothing lost or half written."""

import io
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, environment, like
from PIL import Image

import benchmark
import common
from common import UserError


@pytest.fixture
def data(mini: Path) -> Path:
    """A copy of the small miniature, to spoil."""
    return Path(shutil.copytree(mini, "copy"))


def run(args: common.Args, row: str = "source_only") -> None:
    benchmark.run_baseline(like(args, benchmark.BaselineArgs, out=Path("run"), row=row))


def expect(args: common.Args, message: str, row: str = "source_only") -> None:
    """The run ends with one line that matches, and leaves no result."""
    with pytest.raises(UserError, match=message) as caught:
        run(args, row)
    assert "\n" not in str(caught.value)
    assert not Path("run/result.json").exists() and not Path("run/checkpoint.pt").exists()


# ---- Folders ------------------------------------------------------------------------------------
def test_missing_folder(args: common.Args):
    expect(
        replace(args, data="nowhere"), r"nowhere/vkitti2: no such folder; --data must hold vkitti2/"
    )


def test_empty_folder(args: common.Args):
    for dataset in ("vkitti2", "kitti"):
        Path("empty", dataset).mkdir(parents=True)
    expect(replace(args, data="empty"), r"no image of vkitti2 found, expected Scene\*/clone/frames")


def test_only_one_side_of_the_benchmark_is_there(args: common.Args, data: Path):
    shutil.rmtree(data / "kitti")
    expect(replace(args, data=str(data)), "copy/kitti: no such folder")


def test_unknown_variant(args: common.Args):
    expect(replace(args, variants=("snow",)), "expected Scene.*/snow/")


# ---- Files --------------------------------------------------------------------------------------
def first(data: Path, pattern: str) -> Path:
    return sorted(data.glob(pattern))[0]


RGB = "vkitti2/Scene*/clone/frames/rgb/Camera_0/*.jpg"
LABEL = "vkitti2/Scene*/clone/frames/classSegmentation/Camera_0/*.png"


def test_image_without_a_label(args: common.Args, data: Path):
    first(data, LABEL).unlink()
    expect(replace(args, data=str(data)), r"rgb_00000.jpg: image without a label \(1 such")


def test_label_without_an_image(args: common.Args, data: Path):
    first(data, RGB).unlink()
    expect(replace(args, data=str(data)), r"classgt_00000.png: label without an image \(1 such")


@pytest.mark.parametrize("pattern", [RGB, LABEL])
def test_truncated_file(args: common.Args, data: Path, pattern: str):
    path = sorted(data.glob(pattern))[1]
    path.write_bytes(path.read_bytes()[:300])
    expect(replace(args, data=str(data)), f"{path.name}: cannot be read as an image")
    assert not [p for p in Path("data/cache").iterdir() if p.name.endswith(".tmp")]


def test_image_and_label_of_different_size(args: common.Args, data: Path):
    path = first(data, LABEL)
    Image.open(path).crop((0, 0, 100, 50)).save(path)
    expect(replace(args, data=str(data)), r"classgt_00000.png: is 100x50, its image \d+x\d+")


def test_colour_outside_the_map(args: common.Args, data: Path):
    path = first(data, LABEL)
    label = Image.open(path).convert("RGB")
    label.putpixel((3, 4), (1, 2, 3))
    label.save(path)
    message = r"classgt_00000.png: colour \(1, 2, 3\) is not in the label map of vkitti2 \(1 such"
    expect(replace(args, data=str(data)), message)


@pytest.mark.parametrize("value", [34, 200, 255])
def test_id_outside_the_map(args: common.Args, data: Path, value: int):
    path = first(data, "kitti/training/semantic/*.png")
    ids = np.array(Image.open(path))
    ids[0, 0] = value
    Image.fromarray(ids).save(path)
    message = f"{path.name}: id {value} is not in the label map of kitti"
    expect(replace(args, data=str(data)), message, row="oracle")


def test_jpeg_compressed_label(args: common.Args, data: Path):
    """Whether it is still called .png, or was converted back to a real PNG."""
    path = first(data, LABEL)
    blurred = io.BytesIO()
    Image.open(path).convert("RGB").save(blurred, "JPEG", quality=80)
    path.write_bytes(blurred.getvalue())
    expect(replace(args, data=str(data)), "found JPEG of mode RGB, expected a PNG")
    Image.open(blurred).save(path)
    expect(replace(args, data=str(data)), "colour .* is not in the label map .* compressed")


def test_palette_label_that_was_converted_to_colours(args: common.Args, data: Path):
    path = first(data, "gta5/labels/*.png")
    Image.open(path).convert("RGB").save(path)
    bad = replace(args, data=str(data), benchmark="gta52cityscapes")
    expect(bad, "found PNG of mode RGB, expected a PNG of mode L or P")


def test_a_bad_test_label_costs_no_training(args: common.Args, data: Path):
    """Once it is mended the run goes on, though the test set is another one now."""
    path = sorted(data.glob("kitti/training/semantic/*.png"))[-1]
    good = path.read_bytes()
    path.write_bytes(good[:100])
    bad = replace(args, data=str(data), steps=8)
    with pytest.raises(UserError, match=path.name):
        run(bad)
    trained = common.read_checkpoint(Path("run/checkpoint.pt"))["stages"]["source"]
    assert trained["step"] == 1 and not Path("run/result.json").exists()
    path.write_bytes(good)
    run(bad)
    assert Path("run/result.json").exists() and not Path("run.old").exists()


# ---- Flags --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labelled": 0}, r"--labelled 0: the target has \d+ training photos"),
        ({"labelled": 5000}, r"--labelled 5000: the target has \d+ training photos"),
        ({"size": (60, 128)}, "--size 60 128: expected multiples of 32"),
        ({"size": (0, 0)}, "--size 0 0: expected multiples of 32"),
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"batch_size": 1}, "--batch-size 1: at least 2"),
        ({"seed": -1}, "--seed -1: at least 0"),
        ({"device": "cuda:99"}, "--device cuda:99: not available here"),
        ({"device": "toaster"}, "--device toaster: not available here"),
        ({"device": "meta"}, "--device meta: not available here"),
        ({"lr": -1.0}, "--lr -1.0: expected a number above 0"),
        ({"pretrained": True}, "--pretrained: there are no ImageNet weights of tiny"),
    ],
)
def test_flags_that_cannot_be(args: common.Args, change: dict, message: str):
    expect(replace(args, **change), message)


def test_checkpoint_of_another_network(args: common.Args):
    run(args)
    shutil.move("run/checkpoint.pt", "tiny10.pt")
    shutil.rmtree("run")
    init = replace(args, init=Path("tiny10.pt"))
    expect(
        replace(init, benchmark="gta52cityscapes"), "holds tiny of 10 classes, expected tiny of 19"
    )
    expect(
        replace(init, net="bisenet"), "tiny10.pt: holds tiny of 10 classes, expected bisenet of 10"
    )


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04 half a zip"])
def test_corrupt_checkpoint(args: common.Args, content: bytes):
    Path("bad.pt").write_bytes(content)
    expect(replace(args, init=Path("bad.pt")), "bad.pt: not a checkpoint, or a damaged one")


def test_checkpoint_that_is_none_of_ours(args: common.Args):
    torch.save({"model": torch.zeros(3)}, "other.pt")
    expect(replace(args, init=Path("other.pt")), "other.pt: not a checkpoint of this project")
    expect(replace(args, init=Path("absent.pt")), "absent.pt: no such checkpoint")


def test_output_folder_that_holds_something_else(args: common.Args):
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    expect(args, "run: not empty and not a run folder")
    assert Path("run/thesis.txt").read_text() == "mine"


def test_output_that_cannot_be_written(mini: Path):
    """A file stands where the folder should be: permissions do not stop a test run by root."""
    Path("file").write_text("")
    ended = script("benchmark.py", "--data", str(mini), "--out", "file/x", "--labelled", "1")
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "file" in ended.stderr and "Not a directory" in ended.stderr


# ---- Scripts ------------------------------------------------------------------------------------
def script(name: str, *flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / name), *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_a_script_ends_with_one_line_and_no_traceback():
    for flags in (("--data", "nowhere"), ("--methods", "magic"), ("--seeds", "1", "1")):
        ended = script("benchmark.py", *flags)
        assert ended.returncode == 1 and ended.stdout == ""
        assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["common.py", "miniature.py"])
def test_a_reader_that_stops_reading_is_no_fault(name: str):
    command = f"{sys.executable} {ROOT / name} --help | head -n 1"
    ended = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True)
    assert ended.stdout.startswith("usage:") and ended.stderr == ""


def test_the_look_at_a_dataset(mini: Path, data: Path):
    ended = script("common.py", "--dataset", "kitti", "--data", str(mini / "kitti"))
    assert ended.returncode == 0, ended.stderr
    assert "vegetation" in ended.stdout and "images without a label: 0" in ended.stdout
    assert max(map(len, ended.stdout.splitlines())) <= 80
    rows = Path("runs/look/kitti-train.csv").read_text().splitlines()
    assert rows[0] == "class,pixels,frequency,images,weight" and len(rows) == 11
    assert Path("runs/look/kitti-train.png").stat().st_size > 10_000

    first(data, "kitti/training/semantic/*.png").unlink()  # it says what is missing, and goes on
    ended = script("common.py", "--dataset", "kitti", "--data", str(data))
    assert ended.returncode == 0 and "images without a label: 1, first" in ended.stdout

    ended = script("common.py", "--dataset", "kitti", "--data", "nowhere")
    assert ended.returncode == 1 and "nowhere" in ended.stderr and ended.stderr.count("\n") == 1


def test_a_class_without_a_pixel_needs_smoothing(data: Path):
    for path in data.glob("gta5/labels/*.png"):
        ids = np.array(Image.open(path))
        Image.fromarray(np.where(ids == 31, 28, ids).astype(np.uint8)).save(path)
    flags = ("--dataset", "gta5", "--data", str(data), "--smooth")
    ended = script("common.py", *flags, "0")
    assert ended.returncode == 1 and "train" in ended.stderr and "--smooth" in ended.stderr
    assert script("common.py", *flags, "0.1").returncode == 0


def test_a_row_that_fails_costs_its_own_cell_alone(data: Path):
    """A label of the target's training part is spoilt: only the oracle reads it."""
    path = sorted(data.glob("kitti/training/semantic/*.png"))[0]
    path.write_bytes(path.read_bytes()[:100])
    flags = [
        "--data",
        str(data),
        "--benchmarks",
        "vkitti2kitti",
        "--steps",
        "2",
        "--batch-size",
        "2",
    ]
    flags += ["--size", "32", "64", "--labelled", "1", "--methods", "oracle", "source_only"]
    ended = script("benchmark.py", *flags)
    assert ended.returncode == 1
    rows = json.loads(Path("runs/results.json").read_text())
    assert [row["status"] for row in rows] == ["failed", "finished"]
    assert path.name in rows[0]["error"] and path.name in Path("runs/results.md").read_text()
    assert Path("runs/figures/vkitti2kitti.png").exists()
