"""What a user can get wrong: one line that names the file, and nothing lost or half written."""

import io
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, begun, environment, interrupted, like, read_scalars
from PIL import Image

import baseline
import common
import datasets
from datasets import UserError

pytestmark = pytest.mark.usefixtures("no_figures")


@pytest.fixture
def bad(args: common.Args, mini: Path) -> common.Args:
    """Arguments whose data is a copy of the small miniature, in copy/, to be damaged."""
    shutil.copytree(mini, "copy")
    return replace(args, data="copy")


def run(args: common.Args, row: str = "source_only") -> common.Result:
    return baseline.run(like(args, baseline.Args, out=Path("run"), row=row))


def expect(args: common.Args, message: str, row: str = "source_only") -> None:
    """The run ends with one line that matches, and leaves no result and nothing half written."""
    with pytest.raises(UserError, match=message) as caught:
        run(args, row)
    assert "\n" not in str(caught.value)
    assert not Path("run/result.json").exists() and not Path("run/checkpoint.pt").exists()
    assert not list(Path().rglob("*.tmp"))


def first(pattern: str) -> Path:
    return sorted(Path("copy").glob(pattern))[0]


RGB = "vkitti2/Scene*/clone/frames/rgb/Camera_0/*.jpg"
LABEL = "vkitti2/Scene*/clone/frames/classSegmentation/Camera_0/*.png"
GREY = "kitti/training/semantic/*.png"


# ---- Folders and files --------------------------------------------------------------------------
def test_folders_that_are_missing_or_empty(bad: common.Args):
    message = r"nowhere/vkitti2: no such folder; --data must hold vkitti2/ with Scene\*/clone"
    expect(replace(bad, data="nowhere"), message)
    Path("empty/vkitti2").mkdir(parents=True)
    message = r"empty/vkitti2: no image of vkitti2, expected Scene\*/clone/frames"
    expect(replace(bad, data="empty"), message)
    shutil.rmtree("copy/kitti")
    expect(bad, "copy/kitti: no such folder")


def test_image_without_a_label(bad: common.Args):
    first(LABEL).unlink()
    message = "image without a label, expected .*classgt_00000.png; such images: 1"
    expect(bad, f"rgb_00000.jpg: {message}")


@pytest.mark.parametrize("pattern", [RGB, LABEL])
def test_truncated_file(bad: common.Args, pattern: str):
    path = sorted(Path("copy").glob(pattern))[1]
    path.write_bytes(path.read_bytes()[:300])
    expect(bad, f"{path.name}: cannot be read as an image")


def test_image_and_label_of_different_size(bad: common.Args):
    path = first(LABEL)
    Image.open(path).resize((100, 50), Image.Resampling.NEAREST).save(path)
    expect(bad, r"classgt_00000.png: is 100x50, its image \d+x\d+")


def test_colour_outside_the_map(bad: common.Args):
    path = first(LABEL)
    label = Image.open(path).convert("RGB")
    label.putpixel((3, 4), (1, 2, 3))
    label.save(path)
    message = r"classgt_00000.png: colour \(1, 2, 3\) is not in the label map of vkitti2 \(1 such"
    expect(bad, message)


@pytest.mark.parametrize("value", [34, 200, 254, 255])
def test_id_outside_the_map(bad: common.Args, value: int):
    path = first(GREY)
    ids = np.array(Image.open(path))
    ids[0, 0] = value
    Image.fromarray(ids).save(path)
    expect(bad, f"{path.name}: id {value} is not in the label map of kitti", row="oracle")


def test_jpeg_compressed_label(bad: common.Args):
    """Whether it is still called .png, or was converted back to a real PNG."""
    path = first(LABEL)
    blurred = io.BytesIO()
    Image.open(path).convert("RGB").save(blurred, "JPEG", quality=80)
    path.write_bytes(blurred.getvalue())
    expect(bad, "found JPEG of mode RGB, expected a PNG")
    Image.open(blurred).save(path)
    expect(bad, "colour .* is not in the label map .* compressed")


def test_palette_label_that_was_converted_to_colours(bad: common.Args):
    path = first("gta5/labels/*.png")
    Image.open(path).convert("RGB").save(path)
    message = "found PNG of mode RGB, expected a PNG of mode L or P"
    expect(replace(bad, benchmark="gta52cityscapes"), message)


def test_a_bad_test_label_costs_no_training(bad: common.Args, monkeypatch: pytest.MonkeyPatch):
    """All are read before training. When one that was damaged later is mended, the run goes on."""
    path = sorted(Path("copy").glob(GREY))[-2]
    good, bad = path.read_bytes(), replace(bad, steps=40)
    path.write_bytes(good[:100])
    expect(bad, path.name)
    assert not Path("run/stage_source.pt").exists()
    path.write_bytes(good)
    with interrupted(monkeypatch, "source", 9):
        run(bad)
    path.write_bytes(good[:100])
    expect(bad, path.name)
    assert common.read_checkpoint(Path("run/stage_source.pt"))["step"] == 8
    path.write_bytes(good)
    run(bad)
    assert Path("run/result.json").exists() and not Path("run.old1").exists()


def relabel(pattern: str, values: Callable[[np.ndarray], np.ndarray]) -> None:
    for path in Path("copy").glob(pattern):
        Image.fromarray(values(np.asarray(Image.open(path))).astype(np.uint8)).save(path)


@pytest.mark.parametrize("row", ["source_only", "few_label", "oracle"])
def test_train_ids_under_the_names_of_label_ids(bad: common.Args, row: str):
    """They are valid label ids as well, and would give a wrong number."""
    train_ids, void = datasets.label_table(datasets.CITYSCAPES), 19
    relabel(GREY, lambda ids: np.minimum(train_ids[ids], void))
    expect(bad, r"_10.png: no id is above 20; expected label ids, not train ids", row=row)


def test_train_ids_in_a_part_of_the_files(bad: common.Args):
    train_ids = datasets.label_table(datasets.CITYSCAPES)
    relabel(GREY.replace("*.png", "*[05]_10.png"), lambda ids: np.minimum(train_ids[ids], 18))
    expect(bad, r"[05]_10.png: no id is above 20", row="oracle")
    ended = inspected("--data", "copy")
    assert ended.returncode == 1 and "no id is above 20" in ended.stderr


def test_a_cache_of_labels_is_one_of_their_images(bad: common.Args):
    """What was wrong with an image is found although its label has been cached before."""
    run(bad, "oracle")
    shutil.rmtree("run")
    for path in Path("copy/kitti/training/image_2").iterdir():
        image = Image.open(path)
        image.crop((0, 0, image.width // 2, image.height)).save(path)
    expect(bad, r"_10.png: is \d+x\d+, its image \d+x\d+", row="oracle")


def test_train_ids_with_their_255_and_test_labels_that_are_all_void(bad: common.Args):
    train_ids = datasets.label_table(datasets.CITYSCAPES)
    relabel("gta5/labels/*.png", lambda ids: train_ids[ids] | 255 * (ids == 23))
    expect(replace(bad, benchmark="gta52cityscapes"), "id 255 is not .* are these train ids?")
    relabel(GREY, lambda ids: 0 * ids)
    expect(bad, "000006_10.png: no pixel of any class, as in all 6 labels")


def test_a_labelled_photo_that_is_turned_by_its_exif_data(bad: common.Args):
    path, exif = first(RGB), Image.Exif()
    exif[274] = 3  # 180 degrees, so that the sizes agree
    Image.open(path).save(path, exif=exif)
    expect(bad, "rgb_00000.jpg: EXIF data turn it, but not its label; save it upright")
    photo = min(Path("copy/kitti/training/image_2").glob("*_10.png"))
    Image.open(photo).save(photo, exif=b"II*not EXIF data")
    expect(bad, f"{photo.name}: its EXIF data cannot be read", row="oracle")


# ---- Flags --------------------------------------------------------------------------------------
def test_flags_that_cannot_be(args: common.Args):
    for change, message in (
        ({"labelled": 0}, r"--labelled 0: .*kitti has 6 labelled training photos"),
        ({"labelled": 5000}, r"--labelled 5000: .*kitti has 6 labelled training photos"),
        ({"size": (60, 128)}, "--size 60 128: expected multiples of 32"),
        ({"size": (0, 0)}, "--size 0 0: expected multiples of 32"),
        ({"steps": 0}, "--steps, .* is out of range"),
        ({"batch_size": 1}, r"--batch-size \(at least 2\), .* is out of range"),
        ({"seed": -1}, "--seed or .* is out of range"),
        ({"lr": -1.0}, "--lr is out of range"),
        ({"pretrained": True}, "--pretrained: there are no ImageNet weights of tiny"),
    ):
        expect(replace(args, **change), message, row="few_label")


def test_a_device_that_is_not_there(args: common.Args, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expect(replace(args, device="cuda:1"), "--device cuda:1: not available")
    monkeypatch.setenv("LOCAL_RANK", "63")  # torchrun has started more processes than cards
    expect(replace(args, device="cuda"), "--device cuda:63: not available")


# ---- Checkpoints, training sets, output ---------------------------------------------------------
def test_checkpoint_of_another_network(args: common.Args):
    run(args)
    shutil.move("run/checkpoint.pt", "tiny10.pt")
    shutil.rmtree("run")
    init = replace(args, init=Path("tiny10.pt"))
    message = "tiny10.pt: holds tiny of 10 classes, expected"
    expect(replace(init, benchmark="gta52cityscapes"), f"{message} tiny of 19")
    expect(replace(init, net="bisenet"), f"{message} bisenet of 10")
    checkpoint = torch.load("tiny10.pt", weights_only=True)
    torch.save({**checkpoint, "classes": checkpoint["classes"][::-1]}, "tiny10.pt")
    expect(init, "--init tiny10.pt: has other classes")


def test_torn_and_foreign_checkpoints(args: common.Args, monkeypatch: pytest.MonkeyPatch):
    for content in (b"", b"rubbish", b"PK\x03\x04 half a zip"):
        Path("bad.pt").write_bytes(content)
        expect(replace(args, init=Path("bad.pt")), r"bad.pt: cannot be read as a checkpoint \(")
    assert not Path("run").exists()
    torch.save({"model": torch.zeros(3)}, "other.pt")
    expect(replace(args, init=Path("other.pt")), "other.pt: not a checkpoint of this project")
    torch.save(torch.nn.ReLU(), "code.pt")  # it would run code of the file
    expect(replace(args, init=Path("code.pt")), "code.pt: cannot be read as a checkpoint")
    expect(replace(args, init=Path("absent.pt")), "absent.pt: there is no such file")
    with interrupted(monkeypatch, "source", 4):
        run(args)
    stage = Path("run/stage_source.pt")
    shutil.copy(stage, "stage.pt")
    stage.write_bytes(stage.read_bytes()[:1000])
    expect(args, "run/stage_source.pt: cannot be read as a checkpoint")
    expect(replace(args, init=Path("stage.pt")), "stage.pt: holds no segmentation network")


def test_a_folder_that_holds_no_training_set_or_another(args: common.Args):
    made = Path("set")
    made.mkdir()
    for content in ("", "{", "{}"):
        (made / "set.json").write_text(content)
        expect(replace(args, init=made), "set: not a training set that a method wrote")
    source = datasets.load(args, "source")
    datasets.create_array(made / "images.npy", source.images.shape)
    datasets.save_set(made, source, source.labels, source.names)
    expect(replace(args, init=made, size=(64, 64)), r"set: holds \('vkitti2', 32, 64\), expected")
    expect(replace(args, init=made, benchmark="gta52cityscapes"), r"expected \('gta5', 32, 64\)")


def test_output_folder_that_holds_something_else(args: common.Args):
    Path("run").mkdir()
    Path("run/thesis.txt").write_text("mine")
    expect(args, "run: not empty and not a run folder")
    assert Path("run/thesis.txt").read_text() == "mine"
    Path("run/thesis.txt").rename("run/.config.json.0123abcd.tmp")  # of a run that was killed
    begun(replace(args, out=Path("run")), "x", stages=1)


def test_output_that_cannot_be_written(mini: Path, monkeypatch: pytest.MonkeyPatch):
    """A file stands where the folder should be: permissions do not stop a test run by root."""
    Path("file").write_text("")
    flags = ["--data", str(mini), "--out", "file/run", "--size", "32", "64", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    with pytest.raises(SystemExit, match=r"^error: \[Errno \d+\].*file"):
        common.main(baseline.Args, baseline.run, None)


def test_a_loss_that_is_not_finite_stops_the_run(args: common.Args):
    run = begun(replace(args, out=Path("run")), "x", stages=1)
    with pytest.raises(UserError, match="loss is nan at step 20; try a lower learning rate"):
        for step in run.steps("train", 40):
            run.log(step, loss=torch.tensor(float("nan") if step > 16 else 1.0), lr=0.1)
    assert [line["step"] for line in read_scalars(Path("run"))] == [10]


# ---- Scripts ------------------------------------------------------------------------------------
def inspected(*flags: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "inspect_dataset.py"), "--dataset", "kitti", *flags]
    return subprocess.run(command, env=environment(), capture_output=True, text=True)


def test_the_look_at_a_dataset(bad: common.Args):
    first(GREY).unlink()  # it says what is missing, and goes on
    ended = inspected("--data", "copy")
    assert ended.returncode == 0, ended.stderr
    first_line, *lines, last_line = ended.stdout.splitlines()
    assert first_line == "images with a label: 5, without: 1"
    assert last_line == "written: runs/inspect/kitti-train.png"
    assert [line[:14].strip() for line in lines] == [*datasets.KITTI_CLASSES, "ignored"]
    shares = [float(line[14:].split("%")[0]) for line in lines]
    assert sum(shares) == pytest.approx(100, abs=0.01) and max(map(len, lines)) <= 80
    assert Path("runs/inspect/kitti-train.png").stat().st_size > 10_000


def test_a_script_ends_with_one_line_and_no_traceback():
    ended = inspected("--data", "nowhere")
    assert ended.returncode == 1 and ended.stdout == ""
    assert ended.stderr.startswith("error: nowhere/kitti") and ended.stderr.count("\n") == 1
    command = [sys.executable, str(ROOT / "reward_opt.py"), "--reward-lr=-1"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.stderr == "error: --reward-lr -1.0: expected a number from 0\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_what_ends_a_session_ends_a_run_like_ctrl_c(number: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    before = signal.getsignal(number)
    with pytest.raises(SystemExit, match="130"):
        common.main(baseline.Args, lambda _: os.kill(os.getpid(), number), None)
    signal.signal(number, before)


def test_windows_gets_one_line():
    command = [sys.executable, "-c", "import sys; sys.modules['resource'] = None; import common"]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stderr.startswith("error: this needs Linux or macOS")
