"""What every method shares, so that their comparison is fair: training, evaluation, run folder.

The data come from datasets.py. Letters in shape comments: B batch, C classes, H x W height and
width in pixels, N images of a split. Images are float RGB in [0, 1] (the networks normalise them),
labels are train ids 0..C-1 or 255 for "ignored".
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, make_dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, resnet18
from torchvision.models.segmentation import deeplabv3_resnet101, lraspp_mobilenet_v3_large
from torchvision.ops import Conv2dNormActivation

import datasets
from datasets import IGNORE, Split, UserError, rank, replacing, spaced, write_json

try:
    import resource
except ImportError:
    sys.exit("error: this needs Linux or macOS; on Windows, use its Subsystem for Linux (WSL)")


# ---- Loader and augmentation --------------------------------------------------------------------
def seed_of(*names: int | str) -> int:
    """A seed for a stream of random numbers, from what names it: (seed, "align", step), say."""
    return int.from_bytes(hashlib.sha256(repr(names).encode()).digest()[:7], "big")


def generator(*names: int | str) -> torch.Generator:
    """A CPU generator for a named stream: the same draws on every device."""
    return torch.Generator().manual_seed(seed_of(*names))


def draw(rng: torch.Generator, batch: int, *shape: int) -> Tensor:
    """Uniform numbers in [0, 1) on the CPU: this process's part of a global draw. [batch,*shape]"""
    numbers = torch.rand(batch * world_size(), *shape, generator=rng)
    return numbers[rank() * batch : (rank() + 1) * batch]


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """From the CPU to the device, without waiting for it."""
    x = x.pin_memory() if device.type == "cuda" else x
    return x.to(device, non_blocking=True)


def to_tensor(images: np.ndarray, device: torch.device) -> Tensor:
    """Cached images, uint8 [B,H,W,3] -> float [B,3,H,W] in [0,1], channels last in memory."""
    return to_device(torch.from_numpy(np.array(images)), device).permute(0, 3, 1, 2) / 255


def to_uint8(images: Tensor) -> np.ndarray:
    """The inverse of `to_tensor`. [B,C,H,W] in [0,1] -> uint8 [B,H,W,C]."""
    return (255 * images.float()).round().byte().permute(0, 2, 3, 1).cpu().numpy()


class Loader:
    """Endless shuffled batches of a split: `images, labels = loader(step)`.

    A batch depends on the stream's names and the step alone, so a resumed run sees the same ones.
    Under torchrun each process gets its share of the global batch.
    """

    def __init__(self, split: Split, batch_size: int, device: torch.device, *stream: int | str):
        self.split, self.batch_size, self.device, self.stream = split, batch_size, device, stream

    def indices(self, step: int) -> np.ndarray:
        """Places in the split of this process's share of a batch. -> int64 [B]."""
        n, first = len(self.split), step * self.batch_size
        epochs = range(first // n, (first + self.batch_size - 1) // n + 1)
        rngs = [np.random.default_rng(seed_of(*self.stream, epoch)) for epoch in epochs]
        order = np.concatenate([rng.permutation(n) for rng in rngs])
        indices = order[first % n : first % n + self.batch_size]
        return np.array_split(indices, world_size())[rank()]

    def __call__(self, step: int) -> tuple[Tensor, Tensor | None]:
        """-> images [B,3,H,W] float in [0,1], labels [B,H,W] int64 or None, on the device."""
        indices, labels = self.indices(step), self.split.labels
        if labels is not None:
            labels = to_device(torch.from_numpy(labels[indices]), self.device).long()
        return to_tensor(self.split.images[indices], self.device), labels


def crop_flip(
    images: Tensor, labels: Tensor | None, rng: torch.Generator, zoom: float = 1.25
) -> tuple[Tensor, Tensor | None]:
    """A random part of each image, 1/zoom to 1 of its sides, at the full size again; half flipped.
    images [B,3,H,W] bilinearly, labels [B,H,W] by nearest neighbour."""
    numbers = draw(rng, len(images), 4)
    scale = 1 / (1 + numbers[:, 0] * (zoom - 1))  # [B] share of the sides that is kept
    shift = (numbers[:, 1:3] * 2 - 1) * (1 - scale)[:, None]  # in half sides
    theta = torch.zeros(len(images), 2, 3)
    theta[:, 0, 0] = torch.where(numbers[:, 3] < 0.5, -scale, scale)
    theta[:, 1, 1], theta[:, :, 2] = scale, shift
    grid = F.affine_grid(to_device(theta, images.device), list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if labels is not None:
        values = labels[:, None].float()
        labels = F.grid_sample(values, grid, "nearest", "border", align_corners=False)[:, 0].long()
    return images.contiguous(memory_format=torch.channels_last), labels


def identity(images: Tensor, rng: torch.Generator) -> Tensor:
    return images


def blur(images: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian, sigma 0.2 to 2 px at a height of 256 px. images [B,3,H,W]."""
    scale, r = images.shape[2] / 256, 4 * math.ceil(images.shape[2] / 256)
    sigma = scale * (0.2 + 1.8 * draw(rng, len(images), 1, 1, 1))  # [B,1,1,1]
    kernel = (-(torch.arange(-r, r + 1) ** 2) / (2 * sigma**2)).softmax(dim=-1)  # [B,1,1,2r+1]
    kernel = to_device(kernel.repeat_interleave(3, dim=0), images.device)
    planes = F.pad(images, (r, r, r, r), mode="reflect").flatten(0, 1)[None]  # [1,B*3,H+2r,W+2r]
    planes = F.conv2d(planes, kernel, groups=len(kernel))
    return F.conv2d(planes, kernel.mT, groups=len(kernel)).view_as(images)


def colorjitter(images: Tensor, rng: torch.Generator) -> Tensor:
    """Brightness, contrast and saturation times 0.7 to 1.3, hue by up to a 20th of a turn."""
    numbers = to_device(draw(rng, len(images), 4, 1, 1, 1), images.device)
    brightness, contrast, saturation = (0.7 + 0.6 * numbers[:, :3]).unbind(dim=1)  # [B,1,1,1] each
    angle = (numbers[:, 3] - 0.5) * 0.2 * torch.pi
    grey = images.mean(dim=1, keepdim=True)
    color = images - grey
    sideways = (color.roll(1, dims=1) - color.roll(-1, dims=1)) / 3**0.5  # grey axis x color
    color = saturation * (angle.cos() * color + angle.sin() * sideways)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    return (brightness * (mean + contrast * (grey - mean + color))).clamp(0, 1)


def rgbshift(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each channel moved by up to 20 of 255 levels. images [B,3,H,W]."""
    shift = (draw(rng, len(images), 3, 1, 1) * 2 - 1) * 20 / 255
    return (images + to_device(shift, images.device)).clamp(0, 1)


Augmentation = Callable[[Tensor, torch.Generator], Tensor]  # images [B,3,H,W] -> [B,3,H,W]
AUGMENTATIONS = dict(original=identity, blur=blur, colorjitter=colorjitter, rgbshift=rgbshift)


def random_augmentation(images: Tensor, rng: torch.Generator) -> Tensor:
    """One of AUGMENTATIONS for each image, all equally likely. images [B,3,H,W]."""
    choice = (draw(rng, len(images)) * len(AUGMENTATIONS)).long()  # [B]
    versions = torch.stack([augment(images, rng) for augment in AUGMENTATIONS.values()])
    choice = to_device(choice, images.device)
    return versions[choice, torch.arange(len(images), device=images.device)]


def color_transfer(source: Tensor, target: Tensor) -> Tensor:
    """Source images with the target's mean and covariance of RGB. [B,3,H,W] twice -> [B,3,H,W].

    The linear map is the one that moves colours least (Monge-Kantorovich; Pitie and Kokaram, CVMP
    2007): A = S^-1/2 (S^1/2 T S^1/2)^1/2 S^-1/2 = S^-1 (S T)^1/2, covariances S, T. Not clamped.
    """
    with torch.autocast(source.device.type, enabled=False):  # bfloat16 has no inverse
        x, y = source.float().flatten(2), target.float().flatten(2)  # [B,3,HW]
        x_mean, y_mean = x.mean(dim=2, keepdim=True), y.mean(dim=2, keepdim=True)
        x, y, eye = x - x_mean, y - y_mean, torch.eye(3, device=x.device).double()
        s, t = (z @ z.mT / z.shape[2] + 1e-5 * eye for z in (x, y))  # [B,3,3]
        # Denman and Beavers (1976): 24 iterations to (S T)^1/2 and its inverse. They serve a
        # smallest eigenvalue of 1e-10, and unlike eigenvectors they do not make CUDA wait.
        root, inverse = s @ t, eye.expand_as(s)
        for _ in range(24):
            pair = torch.linalg.inv_ex(torch.stack([inverse, root])).inverse
            root, inverse = (torch.stack([root, inverse]) + pair) / 2
        matrix = torch.linalg.inv_ex(s).inverse @ root  # A
        return (matrix.float() @ x + y_mean).view_as(source)


def fourier_transfer(source: Tensor, target: Tensor, beta: float) -> Tensor:
    """Images with the target's low frequencies (FDA, arXiv:2004.05498v1, eq. 3).
    [B,3,H,W] twice -> [B,3,H,W], not clamped. beta: in cycles/px, for both axes."""
    h, w = source.shape[2:]
    spectrum, style = torch.fft.rfft2(source), torch.fft.rfft2(target)  # [B,3,H,W//2+1]
    # The band is symmetric about frequency 0 at even sizes too, so the image stays real.
    rows = torch.fft.fftfreq(h, device=source.device).abs() < beta
    columns = torch.fft.rfftfreq(w, device=source.device).abs() < beta
    band = rows[:, None] & columns  # M_beta, [H,W//2+1]
    amplitude = torch.where(band, style.abs(), spectrum.abs())
    return torch.fft.irfft2(torch.polar(amplitude, spectrum.angle()), s=(h, w))


def photo_style(photos: Split, transfer: Callable = color_transfer) -> Augmentation:
    """Each image takes over the style of a random photo, by `transfer(images, styles)`."""

    def translate(images: Tensor, rng: torch.Generator) -> Tensor:  # [B,3,H,W] in [0,1]
        indices = (draw(rng, len(images)) * len(photos)).long().numpy()
        styles = to_tensor(photos.images[indices], images.device)  # [B,3,H,W]
        return transfer(images, styles).clamp(0, 1)

    return translate


# ---- Networks -----------------------------------------------------------------------------------
conv = Conv2dNormActivation  # convolution, batch normalisation, ReLU; 'same' padding


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class Tiny(nn.Module):
    """A U-Net of 0.46 M parameters for two CPU cores: features to stride 16, logits at stride 4."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.stem = conv(3, 16, stride=2)
        self.down4 = nn.Sequential(conv(16, 32, stride=2), conv(32, 32))
        self.down8 = nn.Sequential(conv(32, 64, stride=2), BasicBlock(64, 64))
        self.down16 = nn.Sequential(conv(64, 96, stride=2), BasicBlock(96, 96))
        self.up8 = conv(96 + 64, 64)
        self.up4 = conv(64 + 32, 48)
        self.head = nn.Conv2d(48, num_classes, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x4 = self.down4(self.stem(x))  # [B,32,H/4,W/4]
        x8 = self.down8(x4)  # [B,64,H/8,W/8]
        y = self.down16(x8)  # [B,96,H/16,W/16]
        y = self.up8(torch.cat([upsample(y, x8.shape[2:]), x8], dim=1))
        y = self.up4(torch.cat([upsample(y, x4.shape[2:]), x4], dim=1))
        return {"out": self.head(y)}


class AttentionRefinement(nn.Module):
    """BiSeNet's attention refinement module: channels are weighted by their global mean."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.conv = conv(i, o)
        self.gate = nn.Sequential(nn.Conv2d(o, o, 1, bias=False), nn.BatchNorm2d(o), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x * self.gate(x.mean(dim=(2, 3), keepdim=True))


class BiSeNet(nn.Module):
    """BiSeNet with ResNet-18 (arXiv:1808.00897v1, fig. 2), logits at stride 8."""

    def __init__(self, num_classes: int, weights: str | None) -> None:
        super().__init__()
        self.backbone = resnet18(weights=weights)
        del self.backbone.fc
        layers = [conv(3, 64, 7, 2), conv(64, 64, 3, 2), conv(64, 64, 3, 2), conv(64, 128, 1)]
        self.spatial = nn.Sequential(*layers)
        self.refine16, self.refine32 = AttentionRefinement(256, 128), AttentionRefinement(512, 128)
        self.tail = conv(512, 128, 1)  # of the globally pooled features
        self.merge16, self.merge32 = conv(128, 128), conv(128, 128)
        self.fuse = conv(256, 256, 1)
        layers = [nn.Conv2d(256, 64, 1), nn.ReLU(inplace=True), nn.Conv2d(64, 256, 1)]
        self.fuse_gate = nn.Sequential(*layers, nn.Sigmoid())
        self.head = nn.Sequential(conv(256, 256), nn.Conv2d(256, num_classes, 1))
        self.aux16 = nn.Sequential(conv(128, 64), nn.Conv2d(64, num_classes, 1))
        self.aux8 = nn.Sequential(conv(128, 64), nn.Conv2d(64, num_classes, 1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        net = self.backbone
        y = net.maxpool(net.relu(net.bn1(net.conv1(x))))
        x16 = net.layer3(net.layer2(net.layer1(y)))  # [B,256,H/16,W/16]
        x32 = net.layer4(x16)  # [B,512,H/32,W/32]
        tail = self.tail(x32.mean(dim=(2, 3), keepdim=True))  # [B,128,1,1]
        y16 = self.merge32(upsample(self.refine32(x32) + tail, x16.shape[2:]))
        spatial = self.spatial(x)  # [B,128,H/8,W/8]
        y8 = self.merge16(upsample(self.refine16(x16) + y16, spatial.shape[2:]))
        fused = self.fuse(torch.cat([spatial, y8], dim=1))
        fused = fused + fused * self.fuse_gate(fused.mean(dim=(2, 3), keepdim=True))
        logits = {"out": self.head(fused)}
        if self.training:
            logits |= {"aux8": self.aux8(y8), "aux16": self.aux16(y16)}
        return logits


NETWORKS = ("tiny", "bisenet", "lraspp", "deeplab")
STRIDE = 32  # of the deepest features: sides of the training size are multiples of it


class Network(nn.Module):
    """A segmentation network. images [B,3,H,W] in [0,1] -> logits [B,C,H,W].

    name: one of NETWORKS; lraspp is LR-ASPP with MobileNetV3-Large (arXiv:1905.02244v5, sec. 6.4),
    deeplab DeepLabV3 with ResNet-101 (arXiv:1706.05587v3), both torchvision's. With `aux=True` a
    list: the logits, then in training those of the auxiliary heads. pretrained: ImageNet weights of
    the backbone, which torchvision downloads.
    """

    def __init__(self, name: str, num_classes: int, pretrained: bool = False) -> None:
        super().__init__()
        self.name, self.num_classes, self.pretrained = name, num_classes, pretrained
        backbone = "IMAGENET1K_V1" if pretrained else None
        options = {"weights": None, "weights_backbone": backbone, "num_classes": num_classes}
        try:
            if name == "tiny":
                self.body = Tiny(num_classes)
            elif name == "bisenet":
                self.body = BiSeNet(num_classes, backbone)
            elif name == "lraspp":
                self.body = lraspp_mobilenet_v3_large(**options)
            else:
                self.body = deeplabv3_resnet101(**options, aux_loss=True)
        except (OSError, RuntimeError) as error:  # no connection, say, or half a file
            reason = f"ImageNet weights of {name} cannot be downloaded ({error})"
            raise UserError(f"{reason}; --pretrained False trains from scratch") from error
        mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # of ImageNet
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, aux: bool = False) -> Any:
        outputs = self.body((images - self.mean) / self.std)
        names = outputs if aux and self.training else ["out"]
        # Logits are upsampled in float32, since the gradient of that is a sum over many pixels.
        outputs = [upsample(outputs[name].float(), images.shape[2:]) for name in names]
        return outputs if aux else outputs[0]


# ---- Several processes (torchrun): each trains on its share of every batch -----------------------
def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(device: str) -> str:
    """Joins the other processes of torchrun, if there are any. -> this process's device."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cuda, local_rank = device.startswith("cuda"), os.environ.get("LOCAL_RANK")
    try:
        if cuda and local_rank:
            device = f"cuda:{local_rank}"
            torch.cuda.set_device(device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device}: not available") from error
    if cuda:
        torch.set_float32_matmul_precision("high")  # TF32
    if local_rank and not dist.is_initialized():  # others wait while rank 0 writes a large set
        dist.init_process_group("nccl" if cuda else "gloo", timeout=timedelta(days=1))
    return device


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def mean_over_processes(x: Tensor) -> Tensor:
    """The mean of a tensor over all processes, without gradient."""
    if world_size() > 1:
        x = x.detach().clone()
        dist.all_reduce(x)
        x = x / world_size()
    return x


def parallel(module: nn.Module) -> nn.Module:
    """The module to call in training: under torchrun its gradients are averaged over processes."""
    if world_size() == 1:
        return module
    # Buffers are not broadcast, since that would change them between two forward passes of a step.
    # torch 2.14 has another name for this flag, which older versions do not know.
    warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
    return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False)


# ---- Evaluation ---------------------------------------------------------------------------------
def confusion_matrices(prediction: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Rows truth, columns prediction, ignored pixels left out. [B,H,W] twice -> int64 [B,C,C]."""
    batch, c = len(labels), num_classes
    image = torch.arange(batch, device=labels.device).view(-1, 1, 1)
    cells = (image * c + labels.long()) * c + prediction.long()  # [B,H,W]
    return torch.bincount(cells[labels != IGNORE], minlength=batch * c * c).view(batch, c, c)


def iou(confusion: np.ndarray) -> np.ndarray:
    """Intersection over union in %, NaN where the truth lacks the class. [...,C,C] -> [...,C]."""
    hit, truth = np.diagonal(confusion, axis1=-2, axis2=-1), confusion.sum(axis=-1)
    union = truth + confusion.sum(axis=-2) - hit
    return np.where(truth > 0, 100 * (hit / np.maximum(union, 1)), np.nan)


def scores(confusion: np.ndarray) -> dict[str, float]:
    """mIoU, aAcc and mAcc in percent, means over the classes that the truth has. [C,C] -> dict."""
    hit, truth = confusion.diagonal(), confusion.sum(axis=1)
    present = truth > 0
    if not present.any():
        raise UserError("the test labels have no pixel of any class, so there is no score")
    miou, recall = iou(confusion)[present].mean(), (hit[present] / truth[present]).mean()
    accuracy = 100 * hit.sum() / truth.sum()
    return {"mIoU": float(miou), "aAcc": float(accuracy), "mAcc": float(100 * recall)}


@torch.inference_mode()
def predict(net: nn.Module, images: np.ndarray, device: torch.device) -> Tensor:
    """Logits of cached images, uint8 [B,H,W,3] -> float [B,C,H,W] on the device."""
    return net(to_tensor(images, device))


@torch.inference_mode()
def evaluate(net: nn.Module, split: Split, device: torch.device) -> np.ndarray:
    """Confusion matrix of every test image, at the resolution of its label. int64 [N,C,C].

    No weight depends on it, nor on any test label. The network is left in the mode it came in.
    """
    c, training, batch = len(split.dataset.classes), net.training, 16
    matrices = torch.zeros(len(split), c, c, dtype=torch.int64, device=device)
    net.eval()
    for start in range(0, len(split.test_files), batch):
        logits = predict(net, split.images[start : start + batch], device)  # [B,C,H,W]
        for i, image_logits in enumerate(logits, start):
            image, label = split.test_files[i]
            truth = torch.from_numpy(datasets.read_label(label, split.dataset, image))
            truth = to_device(truth[None], device)  # [1,h,w]
            prediction = upsample(image_logits[None], truth.shape[1:]).argmax(dim=1)
            matrices[i] = confusion_matrices(prediction, truth, c)[0]
    net.train(training)
    return matrices.cpu().numpy()


# ---- The flags that methods share ---------------------------------------------------------------
PRESETS: dict[str, dict[str, Any]] = {  # defaults that go with the data at hand
    "miniature": {"size": (64, 128), "batch_size": 8, "steps": 2000, "net": "tiny", "lr": 1e-2},
    "vkitti2kitti": {"size": (192, 640), "batch_size": 16, "steps": 20_000, "lr": 1e-3},
    "own": {"size": (256, 512), "batch_size": 16, "steps": 20_000, "lr": 1e-3},
    "gta52cityscapes": {"size": (512, 1024), "batch_size": 8, "steps": 40_000, "lr": 1e-3},
}


@dataclass(frozen=True)
class SharedArgs:
    data: str = "mini"
    """Folder of vkitti2/ and kitti/, gta5/ and cityscapes/, or own data; mini: the miniature."""
    steps: int | None = None
    """Updates of the network. Default: 2,000 for the miniature (and sources less than 512 px wide,
    as in all flags below), 40,000 for real gta52cityscapes, else 20,000."""
    batch_size: int | None = None
    """Images an update, over all processes. Default: 8; 16 for real vkitti2kitti and own."""
    size: tuple[int, int] | None = None
    """Height and width in training, in pixels. Default: 64 128; else 192 640 for vkitti2kitti,
    256 512 for own, 512 1024 for gta52cityscapes."""
    net: Literal["tiny", "bisenet", "lraspp", "deeplab"] | None = None
    """Segmentation network. Default: tiny for the miniature, else bisenet."""
    lr: float | None = None
    """Initial learning rate of AdamW. Default: 0.01 for the miniature, else 0.001."""
    pretrained: bool | None = None
    """ImageNet weights of the backbone (its rate: a tenth of --lr). Default: on for real data."""
    labelled: int = 16
    """Labelled target photos that a method may use, evenly spaced in the target's training part."""
    amp: bool = True
    """bfloat16 autocast, on CUDA only."""
    compile: bool = False
    """torch.compile of the segmentation network."""
    cache: Path = Path("data/cache")
    """Folder of the decoded images; it may be deleted at any time."""


@dataclass(frozen=True)
class Args(SharedArgs):
    benchmark: Literal["vkitti2kitti", "gta52cityscapes", "own"] = "vkitti2kitti"
    """Virtual KITTI 2 to KITTI (10 classes), GTA5 to Cityscapes (19), or own: source/images/ and
    labels/, target/images/, perhaps target/labels/, and classes.json, all below --data."""
    out: Path | None = None
    """Run folder. Default: runs/BENCHMARK/METHOD/seedSEED."""
    seed: int = 0
    """Of weights, batch order and augmentation. The data splits never depend on it."""
    device: str = "auto"
    """auto (CUDA where there is one), cpu, cuda, cuda:1."""
    init: Path | None = None
    """A checkpoint to start from instead of training on the source; or the folder set/ that
    datarater, metasim or diffusion_bridge wrote, to train on instead of the source."""
    resume: bool = True
    """Continue a run that was cut off, reuse a finished one. Others are renamed to OUT.old1, ..."""

    @property
    def checkpoint(self) -> Path | None:
        """--init, where it is not a folder with a training set."""
        return None if self.init is None or self.init.is_dir() else self.init


def resolve(args: Any, method: str) -> Any:
    """The arguments with every default filled in and checked; UserError for what cannot run."""
    args = replace(args, device=join_processes(args.device))  # before rank 0 writes the miniature
    source = datasets.get_benchmark(args.benchmark, args.data).source
    datasets.files_of.cache_clear()
    pairs, unlabelled = datasets.files_of(source, datasets.dataset_root(args.data, source), "train")
    with datasets.open_image(pairs[0][0] if pairs else unlabelled[0], decode=False) as image:
        small = image.width < 512
    defaults = {"net": "bisenet", **PRESETS["miniature" if small else args.benchmark]}
    defaults["pretrained"] = not small and args.net != "tiny"
    defaults["out"] = Path("runs") / args.benchmark / method / f"seed{args.seed}"
    args = replace(args, **{k: v for k, v in defaults.items() if getattr(args, k) is None})
    if any(side < STRIDE or side % STRIDE for side in args.size):
        raise UserError(f"--size {args.size[0]} {args.size[1]}: expected multiples of {STRIDE}")
    if args.pretrained and args.net == "tiny":
        raise UserError("--pretrained: there are no ImageNet weights of tiny")
    if args.steps < 1 or args.batch_size < 2 or args.seed < 0 or not 0 < args.lr < math.inf:
        raise UserError("--steps, --batch-size (at least 2), --seed or --lr is out of range")
    if args.batch_size % world_size():
        raise UserError(f"--batch-size {args.batch_size}: no multiple of {world_size()} processes")
    if args.init and args.init.is_dir():
        datasets.load_set(args.init, source, args.size)
    return args


# ---- Checkpoints and results --------------------------------------------------------------------
FORMAT = "sim2real-2"  # of checkpoints


def save_checkpoint(path: Path, **content: Any) -> None:
    buffer = io.BytesIO()  # torch reports a full disk as an internal error, a file as what it is
    torch.save({"format": FORMAT, **content}, buffer)
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, loaded without running code of the file; UserError for others."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch raise whatever it meets first
        reason = " ".join(f"{type(error).__name__} {error}".split())[:80]
        problem = "cannot be read as a checkpoint" if path.exists() else "there is no such file"
        raise UserError(f"{path}: {problem} ({reason})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this project, or of an older version")
    return checkpoint


def read_network(path: Path, net: Network | None = None) -> tuple[Network, dict[str, Any]]:
    """The network of a run's checkpoint.pt, in `net` or in a new one on the CPU; and the content of
    the file. UserError where it holds no network, or another one than `net`."""
    checkpoint = read_checkpoint(path)
    if "net" not in checkpoint:
        raise UserError(f"{path}: holds no segmentation network")
    name, num_classes = checkpoint["network"], len(checkpoint["classes"])
    net = net or Network(name, num_classes)
    if (name, num_classes) != (net.name, net.num_classes):
        expected = f"{net.name} of {net.num_classes}"
        raise UserError(f"{path}: holds {name} of {num_classes} classes, expected {expected}")
    net.load_state_dict(checkpoint["net"])
    return net, checkpoint


@dataclass
class Result:
    """A row of the table, as result.json and results.json hold it. IoUs in percent."""

    benchmark: str
    method: str
    seed: int
    status: str = "finished"  # or 'failed'
    error: str | None = None
    miou: float | None = None  # None: no test photo has a label
    iou: dict[str, float | None] | None = None  # None: no test photo contains the class
    target_labels: int | None = None
    steps: int | None = None  # updates of the segmentation network
    seconds: float | None = None
    peak_memory_mb: float | None = None
    device: str | None = None
    commit: str | None = None
    versions: dict[str, str] | None = None
    other_updates: str = ""  # what the method spent besides: "600 U-Net updates"


def configuration(args: Any, method: str) -> dict[str, Any]:
    """What decides a run's result: its resolved arguments and the content of its data."""
    config = {"method": method, **asdict(args)}
    for name in ("data", "out", "device", "resume", "cache", "compile"):
        del config[name]
    if args.init and args.init.exists():
        file = args.init / "set.json" if args.init.is_dir() else args.init
        config["init"] = datasets.sha256(file)[:16]
    source, target = datasets.get_benchmark(args.benchmark, args.data)
    config |= {"backbone_lr": BACKBONE_LR} if args.pretrained else {}
    config["label_maps"] = zlib.crc32(repr((source, target)).encode())
    splits = {"source": (source, "train"), "target": (target, "train"), "test": (target, "test")}
    for name, (dataset, split) in splits.items():
        root = datasets.dataset_root(args.data, dataset)
        pairs, unlabelled = datasets.files_of(dataset, root, split)
        config[f"{name}_images"] = len(pairs) + len(unlabelled)
        config[f"{name}_files"] = datasets.digest([*itertools.chain(*pairs), *unlabelled])
        config["miniature"] = (root / "miniature.json").exists()
    return json.loads(json.dumps(config, default=str))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one where the file is absent or damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError):
        return dict(json.loads(path.read_text()))
    return {}


def finished(args: Any, method: str) -> Result | None:
    """The result of an earlier run with the same configuration. `args` are resolved."""
    result = read_json(args.out / "result.json")
    same = read_json(args.out / "config.json") == configuration(args, method)
    known = result.keys() <= {field.name for field in fields(Result)}  # else another program's
    return Result(**result) if result and same and known and args.resume else None


def commit() -> str:
    """The commit of this code, '-dirty' where files differ from it; 'unknown' outside git."""
    git, here = "git describe --always --dirty", Path(__file__).parent
    ended = subprocess.run(git, shell=True, capture_output=True, text=True, cwd=here)
    return ended.stdout.strip() or "unknown"


def peak_memory_mb(device: torch.device) -> float:
    """Most memory held so far: of the card on CUDA, else resident, with the cache's pages."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# ---- Run folder ---------------------------------------------------------------------------------
class Run:
    """One run folder: arguments, scalars, checkpoints, result. A method's skeleton is

        run = common.Run(args, "my_method", stages=1)
        if run.result:  # finished earlier, with the same arguments
            return run.result
        run.begin()  # once all arguments are checked: a run of others is moved aside
        net = run.network()
        for step in run.steps("train", 400, net=net, optimizer=optimizer):  # an update of net
            run.log(step, loss=loss, lr=lr)
        return run.finish(net, target_labels=0)

    stages: how many times the method calls `steps`. Under torchrun rank 0 alone writes.
    """

    def __init__(self, args: Any, method: str, stages: int) -> None:
        self.args = args = resolve(args, method)
        self.method, self.device, self.out = method, torch.device(args.device), args.out
        self.classes = datasets.get_benchmark(args.benchmark, args.data).source.classes
        self.stages, self.stage = stages, 0  # how many, and the number of the present one
        self.steps_before, self.total = 0, 0  # of the stages before, and of the present one
        self.result = finished(args, method)
        if self.result:
            self.say(f"{self.out}: finished earlier, with these arguments")
            return
        if args.checkpoint:
            _, checkpoint = read_network(args.checkpoint, Network(args.net, len(self.classes)))
            if checkpoint["classes"] != list(self.classes):
                raise UserError(f"--init {args.checkpoint}: has other classes")
        if args.init and args.init.resolve().is_relative_to(self.out.resolve()):
            raise UserError(f"--init {args.init}: lies in the run folder; give another --out")
        if not read_json(self.out / "config.json") and any(self.out.glob("[!.]*")):  # not .x.tmp
            raise UserError(f"{self.out}: not empty and not a run folder; give another --out")

    def begin(self) -> None:
        """Prepares the run folder, prints the run's first line, and seeds the initial weights."""
        args, config = self.args, configuration(self.args, self.method)
        barrier()  # no process writes before all have seen that there is no result
        if rank() == 0:
            self.prepare_folder(config)
        barrier()
        self.lines, self.start = [], time.perf_counter()  # of scalars.json; minus earlier seconds
        source, target = datasets.get_benchmark(args.benchmark, args.data)
        images, photos, test = (config[f"{n}_images"] for n in ("source", "target", "test"))
        kind = " (miniature)" if config["miniature"] else ""
        data = f"{source.name}, {images} images -> {target.name}{kind}, {photos} photos"
        settings = f"{args.net}, {args.size[0]}x{args.size[1]}, {args.steps} steps, {self.device}"
        self.say(f"{self.method}: {data} and {test} for test; {settings}; {self.out}")
        self.test = datasets.load(args, "target_test")
        self.commit = commit()  # now, since the code may be edited meanwhile
        torch.manual_seed(args.seed)  # initial weights
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # all batches of a run have one size
            torch.cuda.reset_peak_memory_stats(self.device)

    def prepare_folder(self, config: dict[str, Any]) -> None:
        """Continues a run folder of this configuration; one of another is renamed."""
        old = read_json(self.out / "config.json")
        same = {**old, "test_files": ""} == {**config, "test_files": ""}  # which change no weight
        if old and not (same and self.args.resume and not (self.out / "result.json").exists()):
            names = (Path(f"{self.out}.old{n}") for n in itertools.count(1))
            aside = self.out.rename(next(name for name in names if not name.exists()))
            self.say(f"{self.out}: the run that was there is now {aside}")
        write_json(self.out / "config.json", config)
        (self.out / "scalars.json").write_text("")  # the checkpoints have its lines, too

    def say(self, line: str) -> None:
        if rank() == 0:
            print(line, flush=True)

    def network(self) -> Network:
        """A new segmentation network on the device, with the weights of --init where given."""
        pretrained = self.args.pretrained and not self.args.checkpoint
        net = Network(self.args.net, len(self.classes), pretrained)
        net.pretrained = self.args.pretrained  # the rate of the backbone stays that of the recipe
        if self.args.checkpoint:
            read_network(self.args.checkpoint, net)
        if world_size() > 1 and self.device.type == "cuda":  # SyncBatchNorm refuses CPUs
            net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
        net.to(self.device, memory_format=torch.channels_last)
        if self.args.compile:
            net.compile()
        return net

    def autocast(self) -> torch.autocast:
        """bfloat16 on CUDA with --amp, float32 elsewhere."""
        enabled = self.args.amp and self.device.type == "cuda"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def steps(self, stage: str, total: int, **state: Any) -> Iterator[int]:
        """Yields 1..total, less what an earlier process did: `state` is then restored first. It
        names everything that the stage changes (anything with a state_dict). It is saved in
        stage_STAGE.pt ten times a stage and every two minutes."""
        path, done = self.out / f"stage_{stage}.pt", 0
        if path.exists():
            checkpoint = read_checkpoint(path)
            for name, part in state.items():
                part.load_state_dict(checkpoint["state"][name])
            done, self.lines = checkpoint["step"], checkpoint["lines"]
            self.start = time.perf_counter() - checkpoint["seconds"]
        barrier()  # until all have seen whether there is a checkpoint
        if rank() == 0:
            text = "".join(json.dumps(line) + "\n" for line in self.lines)
            (self.out / "scalars.json").write_text(text)
        self.stage, self.total = self.stage + 1, total
        title = f"stage {self.stage} of {self.stages}, {stage}"
        self.say(f"{title}: {total - done} steps")
        saved = time.monotonic()
        for step in datasets.show_progress(range(done + 1, total + 1), title):
            torch.manual_seed(seed_of(self.args.seed, stage, step, rank()))  # dropout
            yield step
            due = step % max(1, total // 10) == 0 or time.monotonic() - saved > 120
            if rank() == 0 and (due or step == total):
                states = {name: part.state_dict() for name, part in state.items()}
                seconds = time.perf_counter() - self.start
                save_checkpoint(path, step=step, lines=self.lines, seconds=seconds, state=states)
                saved = time.monotonic()
        self.steps_before += total
        # What a method makes after the stage does not depend on whether the stage was resumed.
        torch.manual_seed(seed_of(self.args.seed, stage, "end"))

    def log(self, step: int, **values: Any) -> None:
        """Writes numbers or 0-d tensors at every tenth step and at a stage's last one."""
        if step % 10 and step != self.total:
            return
        means = torch.stack([torch.as_tensor(v, device=self.device) for v in values.values()])
        means = mean_over_processes(means.detach().float()).tolist()
        line = dict(zip(values, means, strict=True))
        for name, value in line.items():
            if not math.isfinite(value):
                raise UserError(f"{name} is {value} at step {step}; try a lower learning rate")
        self.write({**line, "memory": peak_memory_mb(self.device)}, step)

    def write(self, line: dict[str, Any], step: int) -> None:
        """A line of scalars.json, in which steps count through all stages."""
        step += self.steps_before
        self.lines.append({**line, "iter": step, "step": step})
        if rank() == 0:
            with (self.out / "scalars.json").open("a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")

    def evaluate(self, net: nn.Module, step: int) -> np.ndarray:
        """Scores on the test photos into scalars.json: for the curve, no weight ever sees them."""
        with self.autocast():
            confusion = evaluate(net, self.test, self.device)
        if self.test.test_files:
            self.write(scores(confusion.sum(axis=0)), step)
        return confusion

    def finish(
        self, net: Network, target_labels: int, steps: int | None = None, other_updates: str = ""
    ) -> Result:
        """Evaluates the final weights; writes result, checkpoint and figures. See `Result`."""
        confusion, cuda = self.evaluate(net, 0), self.device.type == "cuda"  # [N,C,C]
        ious = zip(self.classes, iou(confusion.sum(axis=0)).tolist(), strict=True)
        self.result = Result(
            benchmark=self.args.benchmark,
            method=self.method,
            seed=self.args.seed,
            miou=self.lines[-1]["mIoU"] if self.test.test_files else None,
            iou={name: None if math.isnan(value) else value for name, value in ious},
            target_labels=target_labels,
            steps=self.args.steps if steps is None else steps,
            seconds=time.perf_counter() - self.start,
            peak_memory_mb=peak_memory_mb(self.device),
            device=torch.cuda.get_device_name(self.device) if cuda else "cpu",
            commit=self.commit,
            versions={"torch": torch.__version__, "numpy": np.__version__},
            other_updates=other_updates,
        )
        if rank() == 0:
            record = {"network": net.name, "classes": list(self.classes), "net": net.state_dict()}
            record |= {"benchmark": self.args.benchmark, "size": list(self.args.size)}
            save_checkpoint(self.out / "checkpoint.pt", **record)
            with replacing(self.out / "confusion.npy") as temporary, temporary.open("wb") as file:
                np.save(file, confusion)
            draw_predictions(self.out / "figures/predictions.png", self.test, {"prediction": net})
        self.complete(self.result)
        return self.result

    def complete(self, result: Result) -> None:
        """Writes the scalars as tables, and result.json: the run is finished."""
        if rank() == 0:
            write_csv(self.out / "loss.csv", [line for line in self.lines if "mIoU" not in line])
            write_csv(self.out / "metrics.csv", [line for line in self.lines if "mIoU" in line])
            write_json(self.out / "result.json", asdict(result))
            for path in self.out.glob("stage_*.pt"):  # nothing is left to resume
                path.unlink()


def write_csv(path: Path, lines: list[dict[str, Any]]) -> None:
    """Lines of scalars.json as a table; an empty cell where a line lacks a value."""
    columns = list(dict.fromkeys(["step", *itertools.chain(*lines)]))
    rows = [columns, *([str(line.get(name, "")) for name in columns] for line in lines)]
    with replacing(path) as temporary:
        temporary.write_text("".join(",".join(row) + "\n" for row in rows))


# ---- The supervised recipe ----------------------------------------------------------------------
AUX_WEIGHT = 0.4  # of each auxiliary head's loss


def segmentation_loss(outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Cross-entropy of the logits plus AUX_WEIGHT times that of each auxiliary head, in nats.

    outputs: [B,C,H,W] each; labels [B,H,W]. The mean is over the valid pixels of the global batch,
    0 where there is none.
    """
    valid = mean_over_processes((labels != IGNORE).sum().float()).clamp(min=1)
    # Pixels in rows of C logits: on a CPU the loss and its gradient take a third of the time.
    rows = [output.permute(0, 2, 3, 1).flatten(0, 2) for output in outputs]  # [BHW,C] each
    losses = [
        F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE, reduction="sum")
        for logits in rows
    ]
    return (losses[0] + AUX_WEIGHT * sum(losses[1:])) / valid


BACKBONE_LR = 0.1  # of a backbone with ImageNet weights, as a multiple of --lr


def make_optimizer(net: Network, lr: float) -> torch.optim.AdamW:
    """AdamW; a backbone with ImageNet weights learns at BACKBONE_LR times the rate of the rest."""
    backbone = list(net.body.backbone.parameters()) if net.pretrained else []
    others = set(net.parameters()) - set(backbone)
    groups = [{"params": [p for p in net.parameters() if p in others], "scale": 1.0}]
    if backbone:
        groups.append({"params": backbone, "scale": BACKBONE_LR})
    return torch.optim.AdamW(groups, lr=lr, weight_decay=0.01, fused=True)


def learning_rate(initial: float, step: int, total: int) -> float:
    """Linear warm-up over a twentieth of the steps under polynomial decay of power 0.9."""
    return initial * min(1, step / max(1, total // 20)) * (1 - (step - 1) / total) ** 0.9


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("scale", 1)  # see make_optimizer


def train(
    run: Run,
    net: Network,
    split: Split,
    steps: int,
    stage: str,
    translate: Augmentation = identity,
    augment: Augmentation = identity,
    lr: float | None = None,
    evaluated: bool = True,
) -> None:
    """The supervised training that all rows share: AdamW, warm-up and decay, zoom and flip.

    `net` is trained in place for `steps` updates. `translate` sees whole images, before zoom and
    flip, `augment` what comes after. lr: the initial learning rate, --lr where None. evaluated: a
    network that is not the method's result is not evaluated, and its loss is called STAGE_loss.
    """
    args, initial = run.args, run.args.lr if lr is None else lr
    optimizer, model = make_optimizer(net, initial), parallel(net)
    loader = Loader(split, args.batch_size, run.device, args.seed, stage)
    net.train()
    for step in run.steps(stage, steps, net=net, optimizer=optimizer):
        lr = learning_rate(initial, step, steps)
        set_lr(optimizer, lr)
        rng = generator(args.seed, stage, step)
        images, labels = loader(step)  # [B,3,H,W], [B,H,W]
        images, labels = crop_flip(translate(images, rng), labels, rng)
        images = augment(images, rng)
        with run.autocast():
            loss = segmentation_loss(model(images, aux=True), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(step, **{"loss" if evaluated else f"{stage}_loss": loss}, lr=lr)
        if evaluated and is_quarter(step, steps):
            run.evaluate(net, step)


def finetune_steps(args: Args, share: float, epochs: int) -> int:
    """Updates on the labelled photos: a share of --steps, at most so many passes over them."""
    return max(1, min(round(args.steps * share), epochs * args.labelled // args.batch_size))


def is_quarter(step: int, total: int) -> bool:
    """Whether a stage is evaluated after this step: at quarters of it, its end excepted."""
    return step < total and step % max(1, total // 4) == 0


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, decay: float) -> None:
    """teacher = decay * teacher + (1 - decay) * student (arXiv:1703.01780v6), in place, the
    statistics of batch normalisation like the weights."""
    states = teacher.state_dict().values(), student.state_dict().values()
    for average, new in zip(*states, strict=True):
        if average.is_floating_point():
            average.lerp_(new, 1 - decay)


# ---- Figures ------------------------------------------------------------------------------------
def new_figure(width: float, height: float) -> Any:
    """A figure of so many inches. Without pyplot, which would look for a screen."""
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook does not exist in a script
    from matplotlib import figure, rcParams

    rcParams["text.parse_math"] = False  # a name of a class may have dollar signs
    return figure.Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def draw_sheet(path: Path, columns: dict[str, list[np.ndarray]], classes: Sequence[str]) -> None:
    """Pictures, uint8 [h,w,3], or label maps [h,w], in titled columns; a legend of any classes."""
    rows = list(zip(*columns.values(), strict=True))
    height, width = rows[0][0].shape[:2]
    inches = max(2.2, 10 / len(columns))
    figure = new_figure(inches * len(columns), inches * height / width * len(rows) * 1.04 + 0.9)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    colours = datasets.palette(classes)
    for axis, picture in zip(axes.flat, itertools.chain(*rows), strict=True):
        axis.imshow(colours[picture] if picture.ndim == 2 else picture)
        axis.axis("off")
    for axis, title in zip(axes[0], columns, strict=True):
        axis.set_title(title, fontsize=9)
    for i, name in enumerate((*classes, "ignored") if classes else ()):
        # The space, since matplotlib leaves out names that begin with "_".
        axes[0, 0].plot([], [], "s", color=colours[i] / 255, label=f" {name}")
    if classes:
        figure.legend(loc="outside lower center", ncols=7, fontsize=7, frameon=False)
    save_figure(figure, path)


def draw_predictions(path: Path, split: Split, networks: dict[str, Network]) -> None:
    """Four test photos, their ground truth and each network's prediction, in columns."""
    chosen, size = spaced(len(split), 4), split.images.shape[1:3]
    columns, truth = {"photo": list(split.images[chosen])}, [np.zeros(size, np.uint8)] * len(chosen)
    if split.test_files:
        labels = [datasets.read_label(split.test_files[i][1], split.dataset) for i in chosen]
        truth = columns["ground truth"] = [datasets.resize_label(label, size) for label in labels]
    for name, net in networks.items():
        device = next(net.parameters()).device
        maps = predict(net.eval(), split.images[chosen], device).argmax(dim=1).cpu().numpy()
        # Where the truth is ignored the prediction does not count either: black in both.
        columns[name] = list(np.where(np.equal(truth, IGNORE), IGNORE, maps))
    draw_sheet(path, columns, split.dataset.classes)


# ---- Command line -------------------------------------------------------------------------------
def main(args_class: type, run: Callable[[Any], Any], doc: str | None) -> None:
    """The command line of a script: one line and exit status 1 for what the user can mend."""
    for number in (signal.SIGTERM, signal.SIGHUP):  # like Ctrl-C, they clean up
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, signal.default_int_handler)
    if hasattr(sys.stdout, "reconfigure"):  # that of a notebook has not
        sys.stdout.reconfigure(errors="replace")  # not every terminal has every character
    try:
        args = parse(args_class, doc)
        for name, value in vars(args).items():
            if isinstance(value, int | float) and not 0 <= value < math.inf:
                raise UserError(f"--{name.replace('_', '-')} {value}: expected a number from 0")
        result = run(args)
        if isinstance(result, Result) and rank() == 0:
            name = f"{result.benchmark} {result.method} seed {result.seed}"
            absent = ", ".join(label for label, value in result.iou.items() if value is None)
            score = "no test label, so no score; see figures/predictions.png in its run folder"
            if result.miou is not None:
                without = f", without {absent}, which no test label has" if absent else ""
                score = f"mIoU {result.miou:.1f}{without}"
            print(f"{name}: {score}", flush=True)
        if dist.is_initialized():  # not after an error: it waits for others, which wait for this
            dist.destroy_process_group()
    except (UserError, OSError) as error:  # of the latter: a full disk, no permission
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted; the same command continues (without --force)", file=sys.stderr)
        sys.exit(130)


def parse(args_class: type, doc: str | None, argv: list[str] | None = None) -> Any:
    """The command line as `args_class`; --help shows its own flags first, then the shared ones."""
    import tyro

    # tyro joins lines, except those that begin with a space.
    fill = functools.partial(textwrap.fill, width=80, initial_indent=" ", subsequent_indent=" ")
    paragraphs = (doc or "").strip("\n").split("\n\n")
    doc = "\n".join(fill(re.sub(r"(?<=\S)\s+", " ", paragraph)) for paragraph in paragraphs)
    cli = functools.partial(tyro.cli, prog=Path(sys.argv[0]).name, description=doc, args=argv)
    if not issubclass(args_class, SharedArgs):
        return cli(args_class)
    shared = Args if issubclass(args_class, Args) else SharedArgs
    hidden = [(f.name, f.type, field(default=f.default, init=False)) for f in fields(shared)]
    own = make_dataclass("Own", hidden, bases=(args_class,), frozen=True)
    groups = {"own": tyro.conf.OmitArgPrefixes[own], "shared": tyro.conf.OmitArgPrefixes[shared]}
    parsed = cli(make_dataclass("Both", groups.items()))
    return args_class(**vars(parsed.own) | vars(parsed.shared))
