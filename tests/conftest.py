"""Fixtures: a small miniature, real data where it lies beside the project, short runs."""

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import common  # noqa: E402
import miniature  # noqa: E402

torch.set_num_threads(1)  # on pictures this small a second thread costs more than it gives

METHODS = ("datarater", "metasim", "reward_opt", "adversarial_da", "diffusion_bridge")
REAL = ROOT.parent / "shared/data"


@pytest.fixture(scope="session")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature of a few images a dataset; read only."""
    folder = tmp_path_factory.mktemp("data") / "mini"
    miniature.write(folder, seed=0, scale=0.05)
    return folder


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in an empty folder, so that caches and run folders are its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def real() -> Path:
    """Real photos and genuine label files, laid beside the project."""
    if not REAL.is_dir():
        pytest.skip("the real samples are not beside this checkout (../shared/data)")
    return REAL


@pytest.fixture
def args(mini: Path) -> common.Args:
    """A short run on the small miniature."""
    return common.Args(
        data=str(mini), steps=6, batch_size=4, size=(32, 64), labelled=2, device="cpu"
    )


def environment() -> dict[str, str]:
    """Of a script in a process of its own: it finds the project from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "OMP_NUM_THREADS": "1"}


def like(args: common.Args, kind: type, **changes: Any) -> Any:
    """A method's Args with the shared fields of `args`."""
    shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(common.Args)}
    return kind(**{**shared, **changes})


def begun(args: common.Args, method: str, stages: int) -> common.Run:
    """A run of a method that does nothing yet."""
    run = common.Run(args, method, stages)
    run.begin()
    return run


def read_scalars(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's scalars.json."""
    return [json.loads(line) for line in (folder / "scalars.json").read_text().splitlines()]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The weights of the network in a run folder's checkpoint.pt."""
    return common.read_checkpoint(Path(folder) / "checkpoint.pt")["net"]


def same_weights(first: str, second: str) -> bool:
    """Whether the networks of two run folders are equal, bit for bit."""
    a, b = weights(first), weights(second)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take longer than so short a run."""
    for module in (common, *(sys.modules[name] for name in METHODS if name in sys.modules)):
        for name in vars(module):
            if name.startswith("draw_"):
                monkeypatch.setattr(module, name, lambda *_, **__: None)


@contextlib.contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, stage: str, at: int) -> Iterator[None]:
    """What runs inside is interrupted in step `at` of a stage, before that is saved."""
    steps = common.Run.steps

    def cut(self: common.Run, name: str, total: int, **state: Any) -> Iterator[int]:
        for step in steps(self, name, total, **state):
            yield step
            if name == stage and step == at:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(common.Run, "steps", cut)
        yield


def whole_and_cut(
    monkeypatch: pytest.MonkeyPatch, run: Callable, args: Any, stages: Sequence[str], at: int
) -> None:
    """Runs into whole/, and into cut/ with an interruption in step `at` of each of the stages."""
    run(dataclasses.replace(args, out=Path("whole")))
    args = dataclasses.replace(args, out=Path("cut"))
    for stage in stages:
        with interrupted(monkeypatch, stage, at):
            run(args)
    run(args)
