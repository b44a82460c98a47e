"""The contract that every method keeps, over all of them."""

import dataclasses
import importlib
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import METHODS, ROOT, environment, like, weights
from docstring_parser import parse_from_object
from PIL import Image

import baseline
import benchmark
import common

SHARED = {field.name: field.default for field in dataclasses.fields(common.Args)}


def weights_of(args: common.Args, row: str, out: str) -> tuple[dict, common.Result]:
    """The weights and the result of a row after four steps."""
    kind, run, own = baseline.Args, baseline.run, {"row": row}
    if row in METHODS:
        module = importlib.import_module(row)
        kind, run, own = module.Args, module.run, {}
    result = run(like(args, kind, steps=4, data="data", out=Path(out), **own))
    return weights(out), result


def scramble(folder: Path, keep: int) -> None:
    """Other labels, of the same size and of valid ids, into the files from the `keep`-th on."""
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir())[keep:]:
        shape = np.asarray(Image.open(path)).shape
        Image.fromarray(rng.choice(np.array([7, 11, 23], np.uint8), shape)).save(path)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("row", (*benchmark.BASELINES, *METHODS))
def test_labels_that_a_row_may_not_use_change_no_weight(args: common.Args, mini: Path, row: str):
    """Bit for bit: the test photos' in any row, all of the target's in one that uses none."""
    shutil.copytree(mini, "data")
    plain, result = weights_of(args, row, "plain")
    scramble(Path("data/kitti/training/semantic"), keep=6 if result.target_labels else 0)
    other, changed = weights_of(args, row, "scrambled")
    assert all(torch.equal(plain[name], other[name]) for name in plain)
    assert result.miou != changed.miou  # the evaluator did see other labels


@pytest.mark.parametrize("method", METHODS)
def test_a_method_has_args_and_run(method: str):
    module = importlib.import_module(method)
    assert issubclass(module.Args, common.Args) and module.Args.__dataclass_params__.frozen
    own = {field.name for field in dataclasses.fields(module.Args)} - set(SHARED)
    assert all(getattr(module.Args, name) == default for name, default in SHARED.items())
    texts = {text.arg_name for text in parse_from_object(module.Args).params if text.description}
    assert len(own) <= 25 and own <= texts
    assert typing.get_type_hints(module.run) == {"args": module.Args, "return": common.Result}


@pytest.mark.parametrize("method", METHODS)
def test_help_shows_the_own_flags_first(method: str, monkeypatch, capsys):
    module = importlib.import_module(method)
    monkeypatch.setattr(sys, "argv", [f"/a/long/path/{method}.py", "--help"])
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        common.main(module.Args, module.run, module.__doc__)
    text = capsys.readouterr().out
    assert ended.value.code == 0 and text.startswith(f"usage: {method}.py")
    _, own, shared = re.split("own options|shared options", text)
    assert max(map(len, text.splitlines())) <= 80
    for field in dataclasses.fields(module.Args):
        flag = rf"^. --{field.name.replace('_', '-')}(?![\w-])"
        assert re.search(flag, shared if field.name in SHARED else own, re.M)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_imports_common_alone(method: str):
    modules = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / f"{method}.py").read_text(), re.M)
    assert "common" in modules and not {"miniature", "benchmark", *METHODS} & set(modules)


PAGES = (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES).replace("\\\n", " ")
COMMANDS = set(re.findall(r"(?:python|--nproc-per-node \d+) (\w+\.py)\b([^`\n#>|&]*)", TEXT))


@pytest.mark.parametrize(("script", "flags"), sorted(COMMANDS - {("METHOD.py", " --steps 20")}))
def test_commands_of_the_documentation_have_flags_that_exist(script, flags, monkeypatch):
    """They are parsed, not run. What stands for a name, such as DIR, is one."""
    monkeypatch.setattr(common, "main", lambda kind, _, doc: common.parse(kind, doc))
    monkeypatch.setattr(sys, "argv", [script, *shlex.split(flags)])
    runpy.run_path(str(ROOT / script), run_name="__main__")


IMPORT = """
import os, random, sys, numpy, torch
import rich.progress, torchvision.models.segmentation  # which do set something
def state():
    return [torch.get_rng_state().tolist(), str(numpy.random.get_state()), random.getstate(),
            torch.get_num_threads(), torch.get_float32_matmul_precision(), dict(os.environ),
            torch.backends.cudnn.benchmark, os.listdir()]
def refuse(event, arguments):
    assert event not in ("socket.connect", "subprocess.Popen"), (event, arguments)
sys.addaudithook(refuse)
before = state()
for name in sys.argv[1:]:  # which are no flags
    __import__(name)
assert state() == before
"""


def test_importing_does_nothing():
    """No file, no connection, no seed, no setting, no look at the command line."""
    command = [sys.executable, "-c", IMPORT, "common", "miniature", "benchmark", *METHODS]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert ended.returncode == 0 and ended.stdout + ended.stderr == "", ended.stderr
