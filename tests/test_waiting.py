"""No training step makes the host wait for the device: checked without one.

Tensors on `meta` stand for those on a GPU. They have no values, and what would have to wait for one
(`.item()`, indices from a mask, a copy that blocks) can be told from what is merely enqueued.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import pytest
import torch
from bench import Loop
from conftest import like
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adversarial_da
import common
import datarater
import diffusion_bridge
import metasim
import reward_opt

META = torch.device("meta")
# Of tensors on a GPU: their sizes or answers depend on values, or they look for errors.
ANSWERS = {
    "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "_unique2", "equal",
    "_linalg_eigh", "linalg_inv_ex", "_linalg_svd",
}  # fmt: skip


class WaitError(Exception): ...


class Copies(TorchDispatchMode):
    """Raises `WaitError` where an operation on `meta` would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        # A single number on the CPU is handed over by value, unless it is copied.
        copied = name in ("_to_copy", "copy_")
        on = {t.device.type for t in tensors if t.dim() or copied}
        if name == "_to_copy" and kwargs.get("device"):
            on.add(torch.device(kwargs["device"]).type)
        at_once = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:] == (True,))
        masked = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        if any(t.is_meta for t in tensors) and (name in ANSWERS or masked):
            raise WaitError(name)
        if len(on) > 1 and not (copied and at_once and tensors[-1].device.type == "cpu"):
            raise WaitError(f"{name} of tensors on {on}")
        return func(*args, **kwargs)


class Lists(TorchFunctionMode):
    """As `Copies`, of Python's numbers that become a tensor on the device, which it cannot see."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.__getitem__, Tensor.__setitem__) and args[0].is_meta:
            index = args[1] if isinstance(args[1], tuple) else args[1:2]
            if any(isinstance(i, list | np.ndarray) for i in index):
                raise WaitError("an index of Python's numbers")
        if func is Tensor.new_tensor and args[0].is_meta:
            raise WaitError("new_tensor")
        if func in (torch.tensor, torch.as_tensor) and str(kwargs.get("device")) == "meta":
            raise WaitError("a tensor of numbers")
        return func(*args, **kwargs)


@contextlib.contextmanager
def watched() -> Iterator[None]:
    with Lists(), Copies():
        yield


class Watched(Loop):
    """A run on `meta`, watched from its second step on: the first one makes what stays."""

    def steps(self, stage: str, total: int, **state: Any) -> Iterator[int]:
        yield 1
        for step in range(2, total + 1):
            with watched():
                yield step

    @cached_property
    def blank(self) -> common.Network:
        return common.Network(self.args.net, len(self.classes)).to(META)

    def network(self) -> common.Network:
        return copy.deepcopy(self.blank)

    def flush(self) -> None: ...

    def log(self, *_: Any, **__: Any) -> None: ...


@pytest.fixture(autouse=True)
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast and the fused optimizers do not know `meta`."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for name in ("AdamW", "Adam"):
        monkeypatch.setattr(torch.optim, name, unfused(getattr(torch.optim, name)))


def unfused(kind: type) -> Callable[..., Any]:
    return lambda *args, **own: kind(*args, **{**own, "fused": None})


def made(args: common.Args, method: Any, **own: Any) -> tuple[Watched, common.Part, common.Part]:
    """A run of four images a batch, the source and the labelled photos."""
    args = common.resolve(like(args, method.Args if method else common.Args, **own), "test")
    parts = common.load(args, "source"), common.load(args, "target_few")
    return Watched(dataclasses.replace(args, device="meta")), *parts


def supervised(args: common.Args) -> None:
    run, source, _ = made(args, None)
    common.train(run, run.network(), source, 3, augment=common.random_augmentation)


def align(args: common.Args, kind: str, statistics: str, translate: str = "none") -> None:
    run, source, _ = made(
        args, adversarial_da, align=kind, statistics=statistics, translate=translate
    )
    photos = common.load(dataclasses.replace(run.args, device="cpu"), "target_unlabelled")
    adversarial_da.align(run, run.network(), source, photos, 3)


def self_train(args: common.Args) -> None:
    run, source, _ = made(args, adversarial_da, self_train=True, translate="fda")
    photos = common.load(dataclasses.replace(run.args, device="cpu"), "target_unlabelled")
    adversarial_da.self_train(run, run.network(), [run.network()], source, photos, 3)


def reward(args: common.Args, estimator: str) -> None:
    run, _, few = made(args, reward_opt, estimator=estimator, look_every=1)
    reward_opt.tune(run, run.network(), few, None, 3)


def rater(args: common.Args, optimizer: str) -> None:
    own = {"meta_steps": 3, "population": 2, "lifetime": 2, "warm_up": 3, "inner_batch": 2}
    run, source, few = made(args, datarater, inner_optimizer=optimizer, **own)
    run.args = datarater.settled(run.args)
    datarater.meta_train(run, datarater.Rater().to(META), source, few)


def bridge(args: common.Args, latent: int) -> None:
    run, source, few = made(args, diffusion_bridge, unet_steps=3, latent_steps=3, width=8)
    config = {"patch": 2, "latent": latent, "width": 8, "size": [32, 64], "classes": run.classes}
    model = diffusion_bridge.Bridge(config, len(few)).to(META)
    if latent:
        diffusion_bridge.train_autoencoder(run, model.space, source, few)
    diffusion_bridge.train_unet(run, model, source, few)


def scenes(args: common.Args) -> None:
    run, source, few = made(args, metasim, objects=2, assets=40, match_batch=4, match_photos=2)
    args = dataclasses.replace(run.args, reconstruct_steps=3, match_steps=3)
    net = common.Network("tiny", len(run.classes)).eval()

    def groups(images: Tensor) -> list[Tensor]:
        seen = torch.stack([*metasim.measure(images).values()], dim=1)
        colours = metasim.colour_statistics(images)
        return [seen, colours, metasim.network_statistics(net, images)]

    images = [common.to_tensor(part.images, torch.device("cpu")) for part in (source, few)]
    features = metasim.Features(groups, *(iter([some]) for some in images))
    net.to(META)
    features.photos = [photos.to(META) for photos in features.photos]
    features.scaling = [(mean.to(META), std.to(META)) for mean, std in features.scaling]
    roads = metasim.Roads(source, args, torch.device("cpu"))
    roads.device, roads.grammar = META, metasim.Grammar(roads.grammar.kinds, META)
    transformer = metasim.Transformer(roads.grammar, roads.classes, roads.fixed, args).to(META)
    optimizer = torch.optim.Adam(transformer.parameters())
    given = (roads, transformer, optimizer)
    metasim.reconstruct(run.steps("reconstruct", 3), *given, args, run.log)
    metasim.match(run.steps("match", 3), *given, features, args, run.log, run.log)
    metasim.train_on_scenes(run, "features", run.network(), roads, transformer, 3, 1e-3)


STEPS: dict[str, Callable[[common.Args], None]] = {
    "supervised": supervised,
    "align output": partial(align, kind="output", statistics="both"),
    "align entropy": partial(align, kind="entropy", statistics="target"),
    "self-training": self_train,
    "counterfactual": partial(reward, estimator="counterfactual"),
    "leave one out": partial(reward, estimator="leave_one_out"),
    "rater, adam": partial(rater, optimizer="adam"),
    "rater, sgd": partial(rater, optimizer="sgd"),
    "bridge": partial(bridge, latent=0),
    "bridge, latent": partial(bridge, latent=4),
    "scenes": scenes,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits_for_the_device(args: common.Args, name: str):
    STEPS[name](args)


def test_colour_transfer_waits_for_its_eigenvectors(args: common.Args):
    """The one known exception: torch looks whether they converged."""
    with pytest.raises(WaitError, match="_linalg_eigh"):
        align(args, kind="output", statistics="both", translate="color")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x[[0, 1]],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.zeros(2).to(x.device),
        lambda x: x.cpu(),
        lambda x: torch.linalg.eigh(x[:4]),
    ],
)
def test_waiting_is_noticed(wait: Callable[[Tensor], Any]):
    x = torch.zeros(5, 4, device=META)
    with watched():
        x[:2] = 2.0 * x[torch.zeros(2, dtype=torch.long, device=META)]
        torch.zeros(3).to(META, non_blocking=True)
        with pytest.raises(WaitError):
            wait(x)
