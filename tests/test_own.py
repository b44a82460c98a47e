"""--benchmark own: a user's renders, photos and classes; and the network on a user's photos."""

import json
import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import like
from PIL import Image

import baseline
import benchmark
import common
import datasets
import diffusion_bridge
import inspect_dataset
import predict
from datasets import IGNORE

CPU = torch.device("cpu")
CLASSES = {"road": 1, "tree": [2, 3], "sky": [[70, 130, 180]], "$h^$": [4, [9, 9, 9]], "ignore": 0}


@pytest.fixture
def own(args: common.Args) -> common.Args:
    """Four nested JPG renders with masks in ids, palette indices and colours; six PNG photos."""
    rng, colours = np.random.default_rng(0), {1: None, 2: (70, 130, 180), 4: (9, 9, 9)}
    for i in range(10):
        root, suffix = ("own/target", "png") if i < 6 else ("own/source", "JPG")
        for folder in ("images", "labels"):
            Path(root, folder, "a b.png").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(rng.integers(0, 256, (48, 80, 3), dtype=np.uint8))
        image.save(Path(root, f"images/a b.png/{i}.{suffix}"))
        label = rng.integers(0, 5, (48, 80), dtype=np.uint8)
        if i == 8:
            label = np.array([colours[2], colours[4]], np.uint8)[label % 2]
        picture = Image.fromarray(label)
        if i == 7:
            picture.putpalette([255, 0, 0] * 256)
        picture.save(Path(root, f"labels/a b.png/{i}.{'PNG' if i == 3 else 'png'}"))
    Path("own/classes.json").write_text(json.dumps(CLASSES))
    return replace(args, data="own", benchmark="own")


def test_own_data_is_read_by_its_classes(own: common.Args):
    a = common.resolve(own, "x")
    roles = ("source", "target_train", "target_test")
    source, train, test = (datasets.load(a, role) for role in roles)
    assert source.dataset.classes == ("road", "tree", "sky", "$h^$") and a.size == (32, 64)
    assert [len(split) for split in (source, train, test)] == [4, 3, 3]
    assert train.names[0] == "images/a b.png/0.png" and test.names[0] == "images/a b.png/3.png"
    assert test.test_files[0][1] == Path("own/target/labels/a b.png/3.PNG")
    grey, rgb = (Path(f"own/source/labels/a b.png/{i}.png") for i in (6, 8))
    train_ids = np.array([IGNORE, 0, 1, 1, 3], np.uint8)[np.asarray(Image.open(grey))]
    np.testing.assert_array_equal(datasets.read_label(grey, source.dataset), train_ids)
    assert set(np.unique(datasets.read_label(rgb, source.dataset))) == {2, 3}
    table = datasets.palette(source.dataset.classes)
    assert table[2].tolist() == [70, 130, 180] and len(np.unique(table[:5], axis=0)) == 5
    before = common.configuration(a, "x")
    Path("own/classes.json").write_text(json.dumps({**CLASSES, "$h^$": [3], "tree": [2, 4]}))
    assert common.configuration(a, "x") != before


def test_a_run_on_own_data_and_its_network_on_own_photos(own: common.Args, capsys):
    """Photos of any mode, at their own resolution, into the same tree."""
    result = baseline.run(like(own, baseline.Args, row="few_label"))
    assert result.benchmark == "own" and result.iou.keys() == {"road", "tree", "sky", "$h^$"}
    grey = (np.arange(50 * 70).reshape(50, 70) % 251).astype(np.uint8)
    for i, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16")):
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        image = image if mode == "I;16" else Image.fromarray(grey).convert(mode)
        path = Path("photos", f"day {i % 2}", f"{i}.{'jpg' if mode == 'CMYK' else 'png'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    Path("photos/._0.png").touch()
    checkpoint = Path("runs/own/few_label/seed0/checkpoint.pt")
    predict.run(predict.Args(checkpoint, Path("photos"), Path("out"), "cpu"))
    assert "8 photos labelled, 1 other files ignored, such as ._0.png" in capsys.readouterr().out
    ids, names = json.loads(Path("out/classes.json").read_text()), result.iou.keys()
    assert ids == {name: i for i, name in enumerate(names)}
    net, _ = common.read_network(checkpoint)
    for path in sorted(Path("photos").rglob("[0-9].*")):
        name = path.relative_to("photos").with_suffix(".png")
        outputs = [Path("out", folder, name) for folder in ("ids", "colours", "overlays")]
        labels, colours, overlay = (np.asarray(Image.open(output)) for output in outputs)
        logits = common.predict(net.eval(), datasets.read_image(path, (32, 64))[None], CPU)
        expected = common.upsample(logits, (50, 70)).argmax(dim=1)[0].numpy()
        np.testing.assert_array_equal(labels, expected)
        np.testing.assert_array_equal(colours, datasets.palette([*names])[labels])
        np.testing.assert_array_equal(overlay, datasets.read_image(path) // 2 + colours // 2)
    args = predict.Args(checkpoint, Path("photos"), Path("again"), "cpu")
    Path("photos/cut.jpg").write_bytes(b"cut")
    Image.new("RGB", (8, 8)).save("photos/exif.png", exif=b"II*not EXIF data")
    with pytest.raises(datasets.UserError, match="photos that cannot be read: 2"):
        predict.run(args)
    said = capsys.readouterr().out
    assert "photos/cut.jpg: cannot be read" in said and "exif.png: its EXIF data cannot" in said
    assert len([*Path("again/ids").rglob("*.png")]) == 8  # the others are labelled
    with pytest.raises(datasets.UserError, match="--device cuda:63: not available"):
        predict.run(replace(args, device="cuda:63"))
    Path("photos/day 0/0.jpg").touch()
    with pytest.raises(datasets.UserError, match=r"day 0/0.*: another photo differs by its suffix"):
        predict.run(args)


def test_cityscapes_label_ids_come_out_where_its_classes_went_in(args: common.Args, mini: Path):
    baseline.run(like(args, baseline.Args, row="source_only", out=Path("run")))
    photos = mini / "kitti/training/image_2"
    predict.run(predict.Args(Path("run/checkpoint.pt"), photos, Path("out")))
    ids = json.loads(Path("out/classes.json").read_text())
    assert ids == {name: datasets.CITYSCAPES_IDS[name] for name in datasets.KITTI_CLASSES}
    for path in sorted(Path("out/ids").iterdir()):
        assert set(np.unique(np.asarray(Image.open(path)))) <= set(ids.values())


def refused(args: common.Args, message: str) -> None:
    """A run ends with one line that matches."""
    with pytest.raises(datasets.UserError, match=message) as caught:
        baseline.run(like(args, baseline.Args, row="source_only"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("{", "Expecting"),
        ("[7]", "no JSON object"),
        ("{}", "names 0 classes, expected 2 to 254"),
        ('{"Ignore": 0}', "names 0 classes, expected 2 to 254"),
        (json.dumps({f"c{i}": [[i, 0, 0]] for i in range(255)}), "names 255 classes"),
        ('{"road": 256}', "256 of road is no id or colour"),
        ('{"road": "7"}', "'7' of road is no id or colour"),
        ('{"road": 1.0}', "1.0 of road is no id or colour"),
        ('{"road": 7.5}', "7.5 of road is no id or colour"),
        ('{"road": true}', "True of road is no id or colour"),
        ('{"road": [[1]]}', r"\[1\] of road is no id or colour"),
        ('{"road": [[1, 2]]}', r"\[1, 2\] of road is no id or colour"),
        ('{"road": 7, "car": [7]}', "7 of car is no id or colour, or is given twice"),
        ('{"road": 7, "ignore": 0}', "names 1 classes, expected 2 to 254"),
    ],
)
def test_own_classes_that_cannot_be(args: common.Args, content: str | None, message: str):
    Path("own").mkdir()
    if content is not None:
        Path("own/classes.json").write_text(content)
    message = rf"^own/classes.json: .*{message}.*; expected for example \{{\"road\": 7"
    refused(replace(args, data="own", benchmark="own"), message)


def test_own_labels_are_strict(args: common.Args):
    for folder in ("source/images", "source/labels", "target/images"):
        Path("own", folder).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 5, np.uint8)).save(Path("own", folder, "a.png"))
    own = replace(args, data="own", benchmark="own")
    colours = '{"road": [[5, 5, 5]], "sky": [[6, 6, 6]]}'
    for classes, message in (
        ('{"road": 4, "sky": 6}', "labels/a.png: id 5 is not in the label map of source"),
        (colours, "found PNG of mode L, expected a PNG of mode RGB or RGBA"),
    ):
        Path("own/classes.json").write_text(classes)
        refused(own, message)
    Path("own/source/images/a.jpg").touch()
    refused(own, r"images/a\.(png|jpg) and images/a\.(png|jpg) have one label")
    Path("own/source/images/a.jpg").unlink()
    Path("own/source/labels/a.png").unlink()
    refused(own, "images/a.png: image without a label, expected labels/a.png; such images: 1")
    with pytest.raises(datasets.UserError, match=r"images/a.png: has no label, which every image"):
        inspect_dataset.run(inspect_dataset.Args("source", data="own"))
    inspect_dataset.run(inspect_dataset.Args("target", data="own"))  # a target needs none


def test_a_single_labelled_photo_leaves_none_to_train_on(own: common.Args):
    for photo in sorted(Path("own/target/images").glob("*/*"))[1:]:
        photo.unlink()
    with pytest.raises(datasets.UserError, match="own/target: no training photo; of photos with"):
        datasets.load(common.resolve(own, "own"), "target_unlabelled")


def test_predict_replaces_no_other_classes(own: common.Args, no_figures: None):
    baseline.run(like(own, baseline.Args, row="source_only", steps=1))
    before, checkpoint = Path("own/classes.json").read_bytes(), next(Path().rglob("checkpoint.pt"))
    with pytest.raises(datasets.UserError, match=r"own/classes.json: has other classes"):
        predict.run(predict.Args(checkpoint, Path("own/target/images"), Path("own"), "cpu"))
    assert Path("own/classes.json").read_bytes() == before
    Path("own/target/images").rename("own/ids")  # predict.py would write over these photos
    with pytest.raises(datasets.UserError, match="own: the photos must lie elsewhere"):
        predict.run(predict.Args(checkpoint, Path("own/ids"), Path("own"), "cpu"))


def test_a_bridge_of_own_data_reads_own_masks(own: common.Args, no_figures: None):
    fields = {"width": 8, "levels": 3, "unet_steps": 2, "reader_steps": 2, "out": Path("bridge")}
    for _ in range(2):  # the second time nothing is trained
        diffusion_bridge.train(like(own, diffusion_bridge.Args, **fields))
        assert [path.name for path in Path().glob("bridge*/*.pt")] == ["bridge.pt"]
    source = {"input_dir": Path("own/source/images"), "mask_dir": Path("own/source/labels")}
    fields = {"checkpoint": Path("bridge/bridge.pt"), "mask_labels": "own", "sample_steps": 2}
    args = diffusion_bridge.TranslateArgs(**source, output_dir=Path("out"), **fields)
    for _ in range(2):
        diffusion_bridge.translate_folder(args)
        assert not Path("out/.a.png.tmp").exists()
        Path("out/.a.png.tmp").touch()  # as a run that was killed yesterday leaves it
        os.utime("out/.a.png.tmp", (0, 0))
    assert 0 <= json.loads(Path("out/metadata.json").read_text())["checks"]["agreement_after"] <= 1


@pytest.mark.parametrize("labels", [True, False])
def test_the_benchmark_of_own_data(own: common.Args, capsys, labels: bool):
    """Without target labels the rows that need some are left out, and there is no score."""
    if not labels:
        shutil.rmtree("own/target/labels")
    shared = {f.name: getattr(own, f.name) for f in fields(common.SharedArgs)}
    methods = ("source_only", "color_transfer", "few_label")
    args = benchmark.Args(**shared, benchmarks=("own",), methods=methods, devices=("cpu",))
    datasets.note.cache_clear()
    benchmark.main(args)
    rows = json.loads(Path("runs/results.json").read_text())
    assert [row["method"] for row in rows] == list(methods if labels else methods[:2])
    assert all((row["miou"] is None) != labels and row["error"] is None for row in rows)
    output = capsys.readouterr()
    assert ("without test labels" in output.out) != labels
    assert ("so some rows are left out" in output.err) != labels
    assert Path("runs/figures/own.png").exists() and Path("runs/results.md").exists()
    if not labels:
        with pytest.raises(datasets.UserError, match="all of them need labelled training"):
            benchmark.main(replace(args, methods=("few_label",)))
