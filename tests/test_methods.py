"""The contract that every method keeps, over all of them."""

import ast
import dataclasses
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, like
from PIL import Image

import benchmark
import common

# What makes a method's own stages as short as the two updates of its network.
SHORT: dict[str, dict[str, Any]] = {
    "datarater": {
        "meta_steps": 2, "population": 1, "shrink": 1, "inner_batch": 1, "warm_up": 2,
        "compare": False,
    },
    "metasim": {
        "scenes": 12, "objects": 2, "assets": 40, "width": 16, "reconstruct_steps": 4,
        "match_steps": 4, "match_batch": 4, "match_photos": 4, "feature_steps": 3,
    },
    "reward_opt": {"look_every": 2},
    "diffusion_bridge": {"unet_steps": 4, "reader_steps": 2, "sample_steps": 2, "width": 8},
}  # fmt: skip
ROWS = (*benchmark.BASELINES, *benchmark.METHODS)


def runner(row: str) -> tuple[Callable[[Any], common.Result], type, dict[str, Any]]:
    """A row's run, its Args and what they need to be short."""
    if row in benchmark.BASELINES:
        return benchmark.run_baseline, benchmark.BaselineArgs, {"row": row}
    module = importlib.import_module(row)
    return module.run, module.Args, SHORT.get(row, {})


def weights_of(args: common.Args, row: str, data: Path, out: str) -> tuple[dict, common.Result]:
    run, kind, own = runner(row)
    one = like(args, kind, steps=4, data=str(data), out=Path(out), **own)
    result = run(one)
    return common.read_checkpoint(Path(out) / "checkpoint.pt")["net"], result


def scramble(folder: Path, keep: int = 0) -> None:
    """Other labels, of the same size and of valid ids, into the files from the `keep`-th on."""
    rng = np.random.default_rng(0)
    for path in sorted(folder.glob("kitti/training/semantic/*"))[keep:]:
        shape = np.asarray(Image.open(path)).shape
        Image.fromarray(rng.choice(np.array([7, 11, 23], np.uint8), shape)).save(path)


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize("row", ROWS)
def test_labels_that_a_row_may_not_use_change_no_weight(args: common.Args, mini: Path, row: str):
    """Bit for bit: the test photos' in any row; all of the target's in one that says it uses none,
    and of a row that does say so they matter."""
    plain, result = weights_of(args, row, mini, "plain")
    shutil.copytree(mini, "other")
    training = len(list(Path("other/kitti/training/semantic").iterdir())) // 2
    scramble(Path("other"), keep=training if result.target_labels else 0)
    other, changed = weights_of(args, row, Path("other"), "scrambled")
    assert plain.keys() == other.keys() and all(torch.equal(plain[k], other[k]) for k in plain)
    assert result.miou != changed.miou  # the evaluator did see other labels
    if result.target_labels and row in benchmark.BASELINES:
        scramble(Path("other"))
        used, _ = weights_of(args, row, Path("other"), "used")
        assert not all(torch.equal(plain[k], used[k]) for k in plain)


@pytest.mark.parametrize("method", benchmark.METHODS)
def test_shared_flags_are_the_same_everywhere(method: str):
    kind = importlib.import_module(method).Args
    assert kind.__dataclass_params__.frozen
    own = {f.name: (f.type, f.default) for f in dataclasses.fields(kind)}
    for field in dataclasses.fields(common.Args):
        assert own[field.name] == (field.type, field.default)


def test_functions_of_one_name_are_one_function():
    """A helper that two methods share is the same to the letter, or better in common.py."""
    seen: dict[str, tuple[str, str]] = {}
    for method in benchmark.METHODS:
        for node in ast.parse((ROOT / f"{method}.py").read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name != "run":
                where, code = seen.setdefault(node.name, (method, ast.dump(node)))
                assert code == ast.dump(node), f"{node.name} differs in {where} and {method}"


def test_no_method_imports_another_or_the_miniature():
    methods = set(benchmark.METHODS)
    for method in methods:
        for node in ast.walk(ast.parse((ROOT / f"{method}.py").read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert not {"miniature", "benchmark", *methods} & set(names), method
