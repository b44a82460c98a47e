"""GTA5's size: the start of every row on 24,966 frames of 1914x1052, which are links to four files.

Left out: decoding (half an hour of one core, once, and 52 GB), and the space of a set (39 GB).
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import METHODS, environment
from PIL import Image

import datasets

FRAMES = datasets.GTA5_FRAMES
ROWS = ["source_only", *sorted(METHODS)]
STARTS = """
import glob, importlib, json, os, resource, signal, sys, time
from pathlib import Path
import numpy as np
resource.setrlimit(resource.RLIMIT_DATA, (8 << 30,) * 2)  # no more memory than that
import baseline, common, datasets

class Started(Exception): pass

def steps(*_, **__):  # the first stage begins
    raise Started

def cached(cache, name, files, shape, read):  # the first file stands for all of them
    datasets.digest(files)
    return np.broadcast_to(read(0), (len(files), *shape))

def count(*arguments, **options):
    listed.append(str(options["root_dir"]))
    return listing(*arguments, **options)

datasets.cached, common.Run.steps = cached, steps
os.posix_fallocate = lambda file, start, size: os.truncate(file, start + size)  # no disk space
listing, listed, glob.glob = glob.glob, [], count
for row in sys.argv[1:]:
    kind, run, own = baseline.Args, baseline.run, {"row": row}
    if row != "source_only":
        module = importlib.import_module(row)
        kind, run, own = module.Args, module.run, {}
    args = kind(data="data", benchmark="gta52cityscapes", net="tiny", device="cpu", labelled=4,
                out=Path("runs", row), **own)
    listed.clear()
    start = time.perf_counter()
    signal.alarm(60)
    try:
        run(args)
    except Started:
        signal.alarm(0)
    figures = {"row": row, "seconds": time.perf_counter() - start}
    figures["memory_mb"] = common.peak_memory_mb(common.torch.device("cpu"))
    figures["listed"] = sum("gta5" in root for root in listed)
    figures["opened"] = datasets.fingerprint.cache_info().misses
    print(json.dumps(figures), flush=True)
"""


def write_scene(image: Path, label: Path, height: int, width: int, grey: int) -> None:
    """A flat image, and a label map of sky, trees, houses and road with a car on it."""
    bands = np.array([23, 21, 11, 7, 7], np.uint8).repeat(height // 5 + 1)[:height]
    ids = np.repeat(bands[:, None], width, axis=1)
    ids[height * 3 // 5 : height * 4 // 5, width // 2 : width * 2 // 3] = 26
    for path, pixels in ((image, np.full((height, width, 3), grey, np.uint8)), (label, ids)):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, compress_level=1)


@pytest.fixture
def full_size() -> None:
    """data/gta5 at its full size, and data/cityscapes with a few photos."""
    for i in range(4):
        write_scene(Path(f"{i}-images.png"), Path(f"{i}-labels.png"), 1052, 1914, 60 * i)
    for kind in ("images", "labels"):
        Path("data/gta5", kind).mkdir(parents=True)
        for i in range(1, FRAMES + 1):
            Path(f"data/gta5/{kind}/{i:05d}.png").symlink_to(f"../../../{i % 4}-{kind}.png")
    for split in ("train", "val"):
        for i in range(8):
            image = Path(f"data/cityscapes/leftImg8bit/{split}/a/a_{i}_leftImg8bit.png")
            label = Path(f"data/cityscapes/gtFine/{split}/a/a_{i}_gtFine_labelIds.png")
            write_scene(image, label, 1024, 2048, 20 * i)


def test_a_row_starts_in_seconds_at_the_size_of_gta5(full_size: None):
    command = [sys.executable, "-c", STARTS, *ROWS]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    print(ended.stdout)
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    figures = {line["row"]: line for line in map(json.loads, lines)}
    assert ended.returncode == 0 and list(figures) == ROWS, ended.stderr
    assert f"{len(datasets.GTA5_MISMATCHED)} frames are left out" in ended.stderr
    assert "24904 images -> cityscapes" in ended.stdout and "512x1024" in ended.stdout
    for line in figures.values():
        assert line["seconds"] < 60 and line["memory_mb"] < 2048
        assert line["listed"] == 2  # images and labels, each once
        assert line["opened"] <= 2 * FRAMES + 32  # each file once
