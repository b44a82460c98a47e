"""No training step makes the host wait for the device: checked with one, and without.

Without one, tensors on `meta` stand for those on a GPU. They have no values, and what would have to
wait for one (`.item()`, indices from a mask, a copy that blocks) can be told from what is merely
enqueued. What this cannot see: waits inside of CUDA's kernels, of fused optimizers and of autocast,
and whether memory is pinned.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

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
    "bincount", "histc", "repeat_interleave", "multinomial", "_linalg_eigh", "_linalg_svd",
    "linalg_inv_ex", "linalg_cholesky_ex", "_linalg_solve_ex", "_linalg_det", "_linalg_slogdet",
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
        masked = name.strip("_").startswith("index") and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
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
            if any(isinstance(i, list | tuple | range | np.ndarray) for i in index):
                raise WaitError("an index of Python's numbers")
        if func in (Tensor.new_tensor, Tensor.new) and args[0].is_meta:
            raise WaitError("new_tensor")
        makes = (torch.tensor, torch.as_tensor, torch.asarray)
        if func in makes and str(kwargs.get("device")) == "meta":
            raise WaitError("a tensor of numbers")
        return func(*args, **kwargs)


@contextlib.contextmanager
def watched(device: torch.device) -> Iterator[None]:
    if device == META:
        with Lists(), Copies():
            yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Watched(Loop):
    """A run that is watched from its second step on: the first one makes what stays."""

    def steps(self, stage: str, total: int, **state: Any) -> Iterator[int]:
        yield 1
        for step in range(2, total + 1):
            with watched(self.device):
                yield step

    @cached_property
    def blank(self) -> common.Network:
        return common.Network(self.args.net, len(self.classes)).to(self.device)

    def network(self) -> common.Network:
        return copy.deepcopy(self.blank)

    def flush(self) -> None: ...

    def log(self, *_: Any, **__: Any) -> None: ...


@pytest.fixture(params=["meta", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    if request.param == "meta":  # which autocast and the fused optimizers do not know
        monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
        for name in ("AdamW", "Adam"):
            monkeypatch.setattr(torch.optim, name, unfused(getattr(torch.optim, name)))
    return torch.device(request.param)


def unfused(kind: type) -> Callable[..., Any]:
    return lambda *args, **own: kind(*args, **{**own, "fused": None})


class Given(NamedTuple):
    run: Watched
    source: common.Part
    few: common.Part
    photos: common.Part


def given(args: common.Args, device: torch.device, method: Any, **own: Any) -> Given:
    """A watched run of four images a batch on the device, and its data."""
    args = common.resolve(like(args, method.Args if method else common.Args, **own), "test")
    roles = ("source", "target_few", "target_unlabelled")
    parts = [common.load(args, role) for role in roles]
    return Given(Watched(dataclasses.replace(args, device=str(device))), *parts)


# ---- The stages ---------------------------------------------------------------------------------
def supervised(*where: Any) -> None:
    g = given(*where, None)
    common.train(g.run, g.run.network(), g.source, 3, augment=common.random_augmentation)


def align(*where: Any, **own: Any) -> None:
    g = given(*where, adversarial_da, **{"translate": "none", **own})
    adversarial_da.align(g.run, g.run.network(), g.source, g.photos, 3)


def self_train(*where: Any) -> None:
    g = given(*where, adversarial_da, self_train=True, translate="fda", augment=True)
    net, other = g.run.network(), g.run.network()
    adversarial_da.self_train(g.run, net, [other], g.source, g.photos, 3)


def reward(*where: Any, teacher: bool = False, **own: Any) -> None:
    g = given(*where, reward_opt, look_every=1, **own)
    photos = g.photos if teacher else None
    reward_opt.tune(g.run, g.run.network(), g.few, photos, 3)


def rater(*where: Any, damaged: bool = False, **own: Any) -> None:
    short = {"meta_steps": 3, "population": 2, "lifetime": 2, "warm_up": 3, "inner_batch": 2}
    g = given(*where, datarater, **short, **own)
    g.run.args = datarater.settled(g.run.args)
    source, amount = datarater.corrupted(g.source, 0.5, 0) if damaged else (g.source, None)
    datarater.meta_train(g.run, datarater.Rater().to(g.run.device), source, g.few, amount)


def bridge(*where: Any, latent: int) -> None:
    g = given(*where, diffusion_bridge, unet_steps=3, latent_steps=3, width=8)
    config = {"patch": 2, "latent": latent, "width": 8, "size": [32, 64], "classes": g.run.classes}
    model = diffusion_bridge.Bridge(config, len(g.few)).to(g.run.device)
    if latent:
        diffusion_bridge.train_autoencoder(g.run, model.space, g.source, g.few)
    diffusion_bridge.train_unet(g.run, model, g.source, g.few)


def scenes(*where: Any) -> None:
    own = {"match_batch": 4, "match_photos": 2, "reconstruct_steps": 3, "match_steps": 3}
    g = given(*where, metasim, objects=2, assets=40, **own)
    run, args, device, cpu = g.run, g.run.args, g.run.device, torch.device("cpu")
    net = common.Network("tiny", len(run.classes)).eval()

    def groups(images: Tensor) -> list[Tensor]:
        seen = torch.stack([*metasim.measure(images).values()], dim=1)
        colours = metasim.colour_statistics(images)
        return [seen, colours, metasim.network_statistics(net, images)]

    # What needs values is made on the CPU.
    images = [common.to_tensor(part.images, cpu) for part in (g.source, g.few)]
    features = metasim.Features(groups, *(iter([some]) for some in images))
    net.to(device)
    features.photos = [photos.to(device) for photos in features.photos]
    features.scaling = [(mean.to(device), std.to(device)) for mean, std in features.scaling]
    roads = metasim.Roads(g.source, args, cpu)
    roads.device, roads.grammar = device, metasim.Grammar(roads.grammar.kinds, device)
    roads.store = roads.store.to(device)
    transformer = metasim.Transformer(roads.grammar, roads.classes, roads.fixed, args).to(device)
    optimizer = torch.optim.Adam(transformer.parameters())
    world = (roads, transformer, optimizer)
    metasim.reconstruct(run.steps("reconstruct", 3), *world, args, run.log)
    metasim.match(run.steps("match", 3), *world, features, args, run.log, run.log)
    metasim.train_on_scenes(run, "features", run.network(), roads, transformer, 3, 1e-3)


STEPS: dict[str, Callable[..., None]] = {
    "supervised": supervised,
    "align output": partial(align, align="output", statistics="both"),
    "align entropy": partial(align, align="entropy", statistics="target"),
    "self-training": self_train,
    "counterfactual": reward,
    "leave one out": partial(reward, estimator="leave_one_out"),
    "reweighted": partial(reward, estimator="reweighted_ce"),
    "teacher": partial(reward, teacher=True, over="batch"),
    "rater, adam": rater,
    "rater, sgd": partial(rater, inner_optimizer="sgd", damaged=True),
    "bridge": partial(bridge, latent=0),
    "bridge, latent": partial(bridge, latent=4),
    "scenes": scenes,
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_never_waits_for_the_device(args: common.Args, device: torch.device, name: str):
    STEPS[name](args, device)


def test_colour_transfer_waits_for_its_eigenvectors(args: common.Args, device: torch.device):
    """The one known exception: torch looks whether they converged."""
    with pytest.raises((WaitError, RuntimeError), match=r"_linalg_eigh|synchronizing"):
        align(args, device, translate="color")


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x[x > 0],
        lambda x: x.index_put_((x > 0,), x[0]),
        lambda x: x[[0, 1]],
        lambda x: x[:, range(2)],
        lambda x: x[torch.tensor([0, 1])],
        lambda x: x.new_tensor([1.0, 2.0]),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: torch.zeros(2).to(x.device),
        lambda x: x.cpu(),
        lambda x: torch.bincount(x[0].long()),
        lambda x: torch.linalg.eigh(x[:4]),
    ],
)
def test_waiting_is_noticed(wait: Callable[[Tensor], Any]):
    x = torch.zeros(5, 4, device=META)
    with watched(META):
        x[:2] = 2.0 * x[torch.zeros(2, dtype=torch.long, device=META)]
        common.send(torch.zeros(3), META)
        with pytest.raises(WaitError):
            wait(x)
