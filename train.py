"""Train the custom DawnBench ResNet on CIFAR-10 under the one-cycle policy, at learning rates it finds itself.

    python train.py --epochs 24 --batch-size 512

One file on PyTorch, torchvision and NumPy, for a CUDA GPU, an Apple GPU or a CPU, in two halves:

- The method, in the order in which it runs: recipe, data, augmentation, model, optimizer and step, one-cycle, sweep,
  evaluation, training. It prints nothing and writes no file but the data set. After `import train` all of it can be
  called: `start` a run, `find_rates` for it, loop over its `epochs`.
- The program around it: command line, files, screen, figures, and `main`, which puts them together.
"""

import argparse
import builtins
import contextlib
import copy
import ctypes
import dataclasses
import io
import itertools
import json
import math
import os
import platform
import shutil
import signal
import statistics
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

# ==== THE METHOD ======================================================================================================

# ---- The recipe: every constant of it, once --------------------------------------------------------------------------

def constant(default, allowed):
    """Return a field of Recipe that may have the values `allowed`: an interval like "[0, 1)", or a tuple of names."""
    return dataclasses.field(default=default, metadata={"allowed": allowed})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The constants of a run: `Recipe()` is the tuned recipe, `RECIPES["plain"]` the one that was handed out.

    `Recipe(label_smoothing=0.1)` changes a constant; a value without sense raises ValueError.
    """

    epochs: int = constant(24, "[0, 100000]")
    batch_size: int = constant(512, "[2, 50000]")
    # One-cycle: the rate rises linearly from LRMIN to LRMAX over this fraction of the run, then falls back to LRMIN.
    peak_fraction: float = constant(5 / 24, "(0, 1)")
    # The rate ends at LRMIN over this: 1 is no annihilation.
    annihilation: float = constant(1.0, "[1, inf)")
    # Adam's first beta moves against the rate: outer value at LRMIN, inner value at LRMAX.
    beta1: tuple = constant((0.95, 0.85), "[0, 1)")
    beta2: float = constant(0.999, "[0, 1)")
    # Adam divides by the root of the squared gradient's average plus epsilon. This one outweighs most of those roots,
    # so that weights move nearly as under SGD with momentum, the original's optimizer.
    epsilon: float = constant(0.01, "(0, inf)")
    # Weight decay, decoupled (as in AdamW), on the weights of the convolutions and the linear layer alone. What is set
    # is how long they remember: at LRMAX, decay by itself shrinks a weight to 1/e in this many epochs; inf is no decay.
    # The original's SGD comes to 5.
    memory_epochs: float = constant(5.0, "(0, inf]")
    # The L2 term of Adam in place of that decay: this times each parameter is added to its gradient, in the sweep too.
    l2: float = constant(0.0, "[0, inf)")
    label_smoothing: float = constant(0.2, "[0, 1)")
    # What is evaluated, and saved in the end, is an exponential average of the weights and BatchNorm's statistics that
    # remembers so many epochs; 0 is these themselves. At high rates they jump about, and their average does not.
    average_epochs: float = constant(0.5, "[0, 100000]")
    # The logits are scaled down, as in the original: a rate that suits the convolutions is large for the last layer.
    logit_scale: float = constant(0.125, "(0, inf)")
    # The first convolution begins by whitening the 3x3 patches of so many images; 0 leaves it as PyTorch makes it. The
    # floor is added to the variance of each of their directions, so that those that hardly vary, which are noise, are
    # not blown up. The other convolutions begin as the identity, or as PyTorch makes them.
    whitening_images: int = constant(1000, "[0, 50000]")
    whitening_floor: float = constant(0.01, "(0, inf)")
    initialisation: str = constant("identity", ("identity", "default"))
    # Augmentation, in pixels of images of 32 x 32. Flips alternate from epoch to epoch, or a coin is tossed each time.
    padding: int = constant(4, "[0, 31]")
    padding_mode: str = constant("reflect", ("reflect", "constant", "replicate", "circular"))
    flips: str = constant("alternating", ("alternating", "random"))
    cutout: int = constant(8, "[0, 31]")
    # The sweep raises the rate exponentially from the first value to the second in one epoch; in up to two where one
    # has fewer steps than this.
    sweep_range: tuple = constant((1e-6, 1.0), "(0, inf)")
    sweep_steps: int = constant(200, "[2, 100000]")
    # Once at its lowest, the smoothed loss of the sweep stays within this fraction of it up to some rate. That rate
    # times the factor is LRMAX: smoothing mixes in the losses of higher rates, so that the smoothed loss climbs earlier
    # than the loss itself, and the factor makes up for that. LRMIN is LRMAX over the ratio.
    sweep_margin: float = constant(0.03, "[0, inf)")
    sweep_factor: float = constant(2.0, "(0, inf)")
    lr_ratio: float = constant(300.0, "[1, inf)")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, kind, allowed = getattr(self, field.name), type(field.default), ALLOWED[field.name]
            if kind is str:
                fits, needed = value in allowed, f"one of {', '.join(allowed)}"
            elif kind is tuple:
                fits = isinstance(value, tuple) and len(value) == 2 and all(lies_in(part, allowed) for part in value)
                needed = f"a pair of numbers in {allowed}"
            else:
                fits = lies_in(value, allowed) and isinstance(value, (int, kind))
                needed = f"a {'whole ' * (kind is int)}number in {allowed}"
            if not fits:
                raise ValueError(f"{field.name} is {value!r}: {needed} is needed")
        if self.l2 and self.memory_epochs < math.inf:
            raise ValueError(f"l2 is {self.l2!r}: memory_epochs has to be inf beside it")
        if self.sweep_range[0] >= self.sweep_range[1]:
            raise ValueError(f"sweep_range is {self.sweep_range}: it has to go up")


def lies_in(value, interval):
    """Tell whether `value` is a number in an interval like "[0, 1)", which holds its end at the square bracket."""
    if not isinstance(value, (int, float)):
        return False
    low, high = map(float, interval[1:-1].split(","))
    return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")


ALLOWED = {field.name: field.metadata["allowed"] for field in dataclasses.fields(Recipe)}

# The recipe of this file, and the one that its followers were given, with what it leaves open as PyTorch has it.
RECIPES = {"tuned": Recipe(),
           "plain": Recipe(epsilon=1e-8, memory_epochs=math.inf, label_smoothing=0.0, average_epochs=0.0,
                           logit_scale=1.0, whitening_images=0, initialisation="default", padding_mode="constant",
                           flips="random")}

MEMORY_FEWEST_STEPS = 100  # or BatchNorm's running statistics would lag behind weights that decay
SWEEP_FEWEST_STEPS = 8  # a sweep of a handful of batches repeats them rather than leap over the rates that matter
SWEEP_CLIMB = 1.5  # a sweep ends where the loss, smoothed, is above its lowest times this
SWEEP_EPOCH = 900_000  # numbers the sweep's epochs, so that its random draws are none of training's
EVAL_BATCH_SIZE = 2000


class UserError(Exception):
    """A failure whose message says what happened and what to do."""


class Diverged(UserError):
    """The loss became NaN or infinite."""

    def __init__(self, epoch, step, lr):
        super().__init__(f"the loss became NaN or infinite at epoch {epoch}, step {step}, learning rate {lr:.3g}.\n"
                         f"Try a lower LRMAX (--lr-max), or fp32 (--precision fp32).")
        self.where = {"epoch": epoch, "step": step, "lr": lr}


# ---- Data: the whole data set on the device --------------------------------------------------------------------------

class Split(NamedTuple):
    """Images (N, 3, H, W) and their labels (N,), both tensors on one device."""
    images: torch.Tensor
    labels: torch.Tensor


def load_cifar10(data_dir):
    """Read CIFAR-10, downloading it where it is missing (A. Krizhevsky, Learning Multiple Layers of Features, 2009).

    Returns the training split, the test split (both uint8, (N, 3, 32, 32), on the CPU) and the ten class names.
    Raises UserError where a file cannot be had or its checksum is wrong.
    """
    data_dir = Path(data_dir)
    archive = data_dir / CIFAR10.filename
    checksums = {data_dir / CIFAR10.base_folder / name: md5 for name, md5 in
                 [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]}
    missing = [path for path in checksums if not path.exists()]
    if missing:
        checksums[archive] = CIFAR10.tgz_md5
    for path, md5 in checksums.items():
        if path.exists() and not check_integrity(str(path), md5):
            raise UserError(f"{path} is truncated or altered: its MD5 checksum is wrong.\n"
                            f"Delete it and run again to download CIFAR-10 afresh.")
    if missing:
        fetch_cifar10(data_dir, archive)

    datasets = CIFAR10(data_dir, train=True), CIFAR10(data_dir, train=False)
    training, test = (Split(torch.from_numpy(dataset.data).permute(0, 3, 1, 2), torch.tensor(dataset.targets))
                      for dataset in datasets)
    return training, test, datasets[0].classes


def fetch_cifar10(data_dir, archive):
    """Unpack the archive, downloaded if need be, into `data_dir`. Whatever goes wrong leaves no half file there."""
    folder = data_dir / CIFAR10.base_folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix="download-") as scratch:
            if archive.exists():
                extract_archive(archive, scratch)
            else:
                CIFAR10(scratch, download=True)
            for path in (Path(scratch) / CIFAR10.base_folder).iterdir():
                path.replace(folder / path.name)
    except Exception as error:  # of the network, the archive or the disk: they are of many kinds
        raise UserError(f"could not fetch CIFAR-10 from {CIFAR10.url} ({error}).\n"
                        f"Get that file by hand and put it at {archive}, or its files into {folder}{os.sep}.") from None


def channel_statistics(images):
    """Return the mean and the standard deviation of each channel of uint8 (N, C, H, W) images, on the scale 0 to 1."""
    std, mean = torch.std_mean(images.float() / 255, dim=(0, 2, 3), correction=0)
    return mean, std


def normalise(images, mean, std):
    """Turn uint8 images (N, C, H, W) into floats, less `mean` (C,) and over `std` (C,), on the scale 0 to 1."""
    mean, std = (values.to(images.device).view(1, -1, 1, 1) for values in (mean, std))
    return (images.float() / 255 - mean) / std


def memory_format(device):
    """Return the layout of images and weights that is fastest on `device` and right."""
    # On Apple GPUs, many versions of PyTorch get the gradients of channels-last images wrong (pytorch issue 175189).
    return torch.contiguous_format if device == "mps" else torch.channels_last


def prepare(split, mean, std, device, dtype, padding=0, padding_mode="constant"):
    """Normalise uint8 images, pad them and lay them out on `device`.

    Returns a Split of images (N, 3, H + 2 padding, W + 2 padding) of type `dtype`.
    """
    images = normalise(split.images.to(device), mean, std).to(dtype)
    if padding:
        images = F.pad(images, (padding,) * 4, mode=padding_mode)
    return Split(images.contiguous(memory_format=memory_format(device)), split.labels.to(device))


# ---- Augmentation: batched tensor operations, drawn for each image by itself -----------------------------------------

def epoch_generator(seed, epoch, device):
    """Return the random generator of one epoch. It depends on nothing else, so that a resumed run draws the same."""
    return torch.Generator(device).manual_seed(1_000_003 * seed + epoch)


def draw_flips(recipe, count, seed, epoch, device, generator):
    """Return which of all `count` training images (count,) are mirrored in `epoch`.

    Alternating, the next epoch mirrors the others: one coin for each image decides which half it is in. Random, a coin
    is tossed anew in every epoch, which shows some images mirrored five times in a row (K. Jordan, arXiv:2404.00498,
    section 3.6).
    """
    if recipe.flips == "alternating":
        coins = torch.randint(2, (count,), generator=epoch_generator(seed, 0, device), device=device)
        return (coins + epoch) % 2 == 1
    return torch.randint(2, (count,), generator=generator, device=device) == 1


def crop(images, top, left, size):
    """Cut (B, C, size, size) out of (B, C, H, W), each image at its own corner; the result is channels-last."""
    span = torch.arange(size, device=images.device)
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    row = (top.view(-1, 1) + span).view(-1, size, 1)
    column = (left.view(-1, 1) + span).view(-1, 1, size)
    return images.permute(0, 2, 3, 1)[image, row, column].permute(0, 3, 1, 2)


def flip(images, chosen):
    """Mirror the chosen (B,) of (B, C, H, W) images left to right."""
    return torch.where(chosen.view(-1, 1, 1, 1), images.flip(-1), images)


def cutout(images, top, left, size):
    """Blank one square in each of (B, C, H, W) with zero, the mean colour (DeVries and Taylor, arXiv:1708.04552)."""
    rows, columns = (torch.arange(length, device=images.device) for length in images.shape[-2:])
    in_rows = (rows >= top.view(-1, 1)) & (rows < top.view(-1, 1) + size)
    in_columns = (columns >= left.view(-1, 1)) & (columns < left.view(-1, 1) + size)
    hidden = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(hidden, 0, images)  # masked_fill would lose channels-last


def augment(recipe, padded, mirrored, generator):
    """Crop, flip and cut out: padded (B, 3, H + 2 padding, W + 2 padding) to (B, 3, H, W).

    Crops and cutouts, which lie wholly inside the crop, are drawn for each image; `mirrored` (B,) says which to flip.
    """
    def draw(choices):
        return torch.randint(choices, (len(padded),), generator=generator, device=padded.device)
    size = padded.shape[-1] - 2 * recipe.padding
    corners, holes = 2 * recipe.padding + 1, size - recipe.cutout + 1
    images = crop(padded, draw(corners), draw(corners), size)
    images = flip(images, mirrored)
    return cutout(images, draw(holes), draw(holes), recipe.cutout)


def augmented_batches(recipe, training, seed, epoch):
    """Shuffle a padded Split and yield its images, augmented, and labels; the last batch has what is left over."""
    device = training.images.device
    generator = epoch_generator(seed, epoch, device)
    mirrored = draw_flips(recipe, len(training.labels), seed, epoch, device, generator)
    order = torch.randperm(len(training.labels), generator=generator, device=device)
    for chosen in order.split(recipe.batch_size):
        images = augment(recipe, training.images[chosen], mirrored[chosen], generator)
        yield images.contiguous(memory_format=memory_format(device.type)), training.labels[chosen]


# ---- Model -----------------------------------------------------------------------------------------------------------

class ConvBlock(nn.Sequential):
    """Conv 3x3, MaxPool 2 if `pool`, BatchNorm, ReLU: (B, c_in, H, W) to (B, c_out, H, W), or half of H and W."""

    def __init__(self, c_in, c_out, pool=False):
        super().__init__(nn.Conv2d(c_in, c_out, kernel_size=3, stride=1, padding=1, bias=False),
                         *([nn.MaxPool2d(2)] if pool else []),
                         nn.BatchNorm2d(c_out),
                         nn.ReLU(inplace=True))


class ResBlock(nn.Module):
    """x + ConvBlock(ConvBlock(x)), shape unchanged."""

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Sequential(ConvBlock(channels, channels), ConvBlock(channels, channels))

    def forward(self, x):
        return x + self.residual(x)


class ResNet(nn.Module):
    """The custom ResNet of D. Page, How to Train Your ResNet (Myrtle.ai, 2018): (B, 3, 32, 32) to logits (B, 10).

    It has 6,573,130 parameters. The softmax is left to the cross-entropy.
    Initialised as the identity, the first filters of every convolution but the first pass their input on, so that the
    untrained network already carries the image through to its head (K. Jordan, arXiv:2404.00498, section 3.3).
    """

    def __init__(self, recipe=Recipe()):
        super().__init__()
        self.prep = ConvBlock(3, 64)                                                   # (B, 64, 32, 32)
        self.layer1 = nn.Sequential(ConvBlock(64, 128, pool=True), ResBlock(128))      # (B, 128, 16, 16)
        self.layer2 = ConvBlock(128, 256, pool=True)                                   # (B, 256, 8, 8)
        self.layer3 = nn.Sequential(ConvBlock(256, 512, pool=True), ResBlock(512))     # (B, 512, 4, 4)
        self.pool = nn.Sequential(nn.MaxPool2d(4), nn.Flatten())                       # (B, 512)
        self.head = nn.Linear(512, 10)                                                 # (B, 10)
        self.logit_scale = recipe.logit_scale
        if recipe.initialisation == "identity":
            for module in self.modules():
                if isinstance(module, nn.Conv2d) and module is not self.prep[0]:
                    nn.init.dirac_(module.weight[:module.in_channels])

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        return self.head(self.pool(x)) * self.logit_scale


@torch.no_grad()
def whiten_first_layer(model, images, floor):
    """Set the first convolution so that it whitens the 3x3 patches of prepared images (N, 3, H, W).

    Its filters become the 27 eigenvectors of the patches' covariance, each over the root of its eigenvalue plus
    `floor`, and their negatives, since ReLU keeps one side of each; the other 10 stay random. All of them are trained
    as ever. (D. Page, How to Train Your ResNet 8, Bag of Tricks, 2019; with negatives: tysam-code, hlb-CIFAR10, 2023.)
    """
    patches = F.unfold(images.float().cpu(), 3)                                        # (N, 27, positions)
    variances, directions = torch.linalg.eigh(torch.cov(patches.transpose(0, 1).flatten(1)))
    filters = (directions / (variances + floor).sqrt()).T.reshape(27, 3, 3, 3)
    model.prep[0].weight[:54].copy_(torch.cat([filters, -filters]))


# ---- A run: a model on a device with what trains it, and its steps ---------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Run:
    """A model, what trains it, and how far it has come; made by `start`. Weights are fp32."""
    recipe: Recipe
    seed: int
    device: str
    dtype: torch.dtype  # what convolutions and products compute in
    mean: torch.Tensor  # (3,), of the training images, which are normalised with it
    std: torch.Tensor  # (3,)
    training: Split  # padded
    test: Split
    model: nn.Module
    averaged: nn.Module  # the same network with an average of the model's weights: it is what is evaluated
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales the loss in fp16, whose smallest gradients would vanish; else does nothing
    epoch: int = 0  # epochs trained
    seconds: float = 0.0  # spent on preparing the data and on those epochs, without evaluation, as DawnBench counts

    @property
    def steps_per_epoch(self):
        return math.ceil(len(self.training.labels) / self.recipe.batch_size)

    def autocast(self):
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)

    def state(self):
        """Return all that changes in a run, as a dictionary of the tensors themselves: they go on changing."""
        return {"model": self.model.state_dict(), "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "epoch": self.epoch, "seconds": self.seconds}

    def load_state(self, state):
        for part in ("model", "averaged", "optimizer", "scaler"):
            getattr(self, part).load_state_dict(state[part])
        self.epoch, self.seconds = state["epoch"], state["seconds"]
        self.optimizer.zero_grad(set_to_none=True)  # the gradients are those of the weights before


def start(recipe, training, test, seed=0, device="auto", precision="auto"):
    """Return a Run that has not trained yet. For one seed its random weights are the same on every device.

    `training` and `test` are Splits of uint8 images (N, 3, 32, 32). `device` is cuda, mps or cpu, `precision` fp32,
    bf16 or fp16; auto is what `choose_device` and `choose_precision` return. Where there are fewer images than a batch
    has, all are one batch. Raises ValueError where device or precision cannot be had.
    """
    device = choose_device() if device == "auto" else device
    precision = choose_precision(device) if precision == "auto" else precision
    check_device(device, precision)
    dtype = DTYPES[precision]
    make_fast(device)

    torch.manual_seed(seed)
    model = ResNet(recipe).to(device, memory_format=memory_format(device))
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]  # to decay, once LRMAX is known
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]  # biases and BatchNorms
    optimizer = torch.optim.Adam([{"params": weights}, {"params": others}], betas=(recipe.beta1[1], recipe.beta2),
                                 eps=recipe.epsilon, weight_decay=recipe.l2, decoupled_weight_decay=not recipe.l2,
                                 fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    started = time.perf_counter()
    mean, std = channel_statistics(training.images)
    training = prepare(training, mean, std, device, dtype, recipe.padding, recipe.padding_mode)
    test = prepare(test, mean, std, device, dtype)
    if recipe.whitening_images:
        whiten_first_layer(model, training.images[:recipe.whitening_images], recipe.whitening_floor)
    test.images[-1].sum().item()  # waits for a GPU, so that the seconds are those of all this
    return Run(recipe, seed, device, dtype, mean, std, training, test, model, copy.deepcopy(model), optimizer, scaler,
               seconds=time.perf_counter() - started)


def choose_device():
    """Return the fastest device there is."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def choose_precision(device):
    """Return bf16 where `device` is known to be fast at it, else fp16 on CUDA GPUs and fp32 on all else.

    Many devices emulate a precision that they have no instructions for, which is far slower than fp32.
    """
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}  # older PyTorch has none
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def check_device(device, precision):
    """Raise ValueError, with a sentence that says why, where a run cannot have this device or this precision."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    for name, value, allowed in (("device", device, found), ("precision", precision, DTYPES)):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}: one of auto, {', '.join(allowed)} is needed")
    if not found[device]:
        raise ValueError(f"device {device}: PyTorch finds no such device here; try cpu")
    if device == "mps" and precision == "fp16":
        raise ValueError("precision fp16 needs gradient scaling, which fails on some Apple GPUs; try fp32")


def make_fast(device):
    """Set up this process for training on `device`."""
    torch.backends.cudnn.benchmark = True  # shapes repeat: let cuDNN look for its fastest kernels
    # Left to itself, glibc hands a step's activations back to Linux and gets them anew, page by page and zeroed, in the
    # next step: a fifth of the time of a step on a CPU. The price is that the process stays at its largest size.
    if device == "cpu" and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, -1)  # never give the end of the heap back
        ctypes.CDLL(None).mallopt(mmap_max, 0)  # take large blocks from the heap too


def take_steps(run, batches, schedule):
    """Take one step on each of `batches`, (images, labels), at its (learning rate, first beta) in `schedule`.

    Yields after each step the loss before it and the count of correct answers, as tensors, because reading them would
    stall a GPU.
    """
    run.model.train()
    for (lr, beta1), (images, labels) in zip(schedule, batches):
        for group in run.optimizer.param_groups:
            group.update(lr=lr, betas=(beta1, run.recipe.beta2))
        with run.autocast():
            logits = run.model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=run.recipe.label_smoothing)
        run.optimizer.zero_grad(set_to_none=True)
        run.scaler.scale(loss).backward()
        run.scaler.step(run.optimizer)
        run.scaler.update()
        yield loss.detach(), (logits.detach().argmax(1) == labels).sum()


def average_weights(run, step):
    """Bring `run.averaged` up to date with the weights and BatchNorm statistics after a `step` of the run, from 1.

    Each counts for less by a constant factor from step to step, so that the average remembers
    `recipe.average_epochs`; in the first ones it is the plain mean of all since the run began (B. Polyak and
    A. Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992).
    """
    memory = min(step, max(1, run.recipe.average_epochs * run.steps_per_epoch))
    averages, latest = ([values for values in module.state_dict().values() if values.is_floating_point()]
                        for module in (run.averaged, run.model))
    get_ema_multi_avg_fn(1 - 1 / memory)(averages, latest, None)


# ---- One-cycle -------------------------------------------------------------------------------------------------------

class Rates(NamedTuple):
    """The learning rates of a run: where its cycle begins and ends, and its peak."""
    lr_min: float
    lr_max: float
    sweep: Optional[dict] = None  # that found them, see `find_rates`


def one_cycle(step, total_steps, begin, top, end, peak_fraction):
    """Return the value at `step` (from 0) of a cycle: linear from `begin` to `top`, then linear to `end`.

    Steps are counted as in `torch.optim.lr_scheduler.OneCycleLR`: the last step of the rise has `top`, the last step of
    the run has `end` (L. Smith, arXiv:1803.09820, section 4).
    """
    last = total_steps - 1
    peak = peak_fraction * total_steps - 1
    if step < peak:
        return begin + (top - begin) * (step / peak)
    return end + (top - end) * ((last - step) / (last - peak))


def plan_epoch(recipe, rates, epoch, steps_per_epoch):
    """Return the (learning rate, first beta) of every step of an epoch, counted from 1."""
    total_steps, (outer, inner) = recipe.epochs * steps_per_epoch, recipe.beta1
    lr_end = rates.lr_min / recipe.annihilation
    return [(one_cycle(step, total_steps, rates.lr_min, rates.lr_max, lr_end, recipe.peak_fraction),
             one_cycle(step, total_steps, outer, inner, outer, recipe.peak_fraction))
            for step in range((epoch - 1) * steps_per_epoch, epoch * steps_per_epoch)]


def weight_decay(recipe, lr_max, steps_per_epoch):
    """Return Adam's weight decay: `recipe.l2`, or decoupled for a memory of `recipe.memory_epochs` at rate `lr_max`.

    A decoupled step multiplies a weight by 1 - learning rate x decay. Weights are a moving average of their updates;
    its length in epochs, here 100 steps at least, is what suits a data set, whatever rate and batch size (X. Wang and
    L. Aitchison, arXiv:2405.13698).
    """
    return recipe.l2 or 1 / (max(recipe.memory_epochs * steps_per_epoch, MEMORY_FEWEST_STEPS) * lr_max)


# ---- Learning-rate range sweep ---------------------------------------------------------------------------------------

def find_rates(run, on_step=None):
    """Train while the rate rises exponentially, and read LRMAX off the loss (L. Smith, arXiv:1506.01186).

    Stops where the loss is NaN or has climbed to 1.5 times its lowest. The run is afterwards what it was.
    `on_step(step, steps, learning rate, loss)` is called after each step.
    Returns Rates, whose `sweep` has the lists `lr`, `loss` (of each batch before its step) and `smoothed_loss`, both
    rates again, and the `rule`. Raises UserError where the loss never falls.
    """
    recipe, (first, last) = run.recipe, run.recipe.sweep_range
    steps = sweep_length(recipe, run.steps_per_epoch)
    lrs = [first * (last / first) ** (step / (steps - 1)) for step in range(steps)]
    steps_per_decade = (steps - 1) / math.log10(last / first)
    batches = (batch for epoch in itertools.count(SWEEP_EPOCH)
               for batch in augmented_batches(recipe, run.training, run.seed, epoch))
    before = copy.deepcopy(run.state())
    window = max(1, round(steps_per_decade / 2))  # the loss is watched as its mean over so many steps
    losses, lowest = [], math.inf
    try:
        for loss, _ in take_steps(run, batches, ((lr, recipe.beta1[1]) for lr in lrs)):
            if not math.isfinite(loss.item()):
                break
            losses.append(loss.item())
            if on_step:
                on_step(len(losses), steps, lrs[len(losses) - 1], loss)
            if len(losses) >= window:
                level = statistics.fmean(losses[-window:])
                lowest = min(lowest, level)
                if level > SWEEP_CLIMB * lowest:
                    break
    finally:
        run.load_state(before)
    if not losses:
        raise UserError("the loss of the untrained model is NaN or infinite: the sweep cannot start.")
    lrs, smoothed = lrs[:len(losses)], smooth(losses, steps_per_decade)
    lr_min, lr_max = read_sweep(recipe, lrs, smoothed)
    return Rates(lr_min, lr_max, {"lr": lrs, "loss": losses, "smoothed_loss": smoothed, "lr_max": lr_max,
                                  "lr_min": lr_min, "rule": sweep_rule(recipe)})


def sweep_length(recipe, steps_per_epoch):
    """Return how many steps a sweep has: those of the recipe, but in one to two epochs, and never under 8."""
    return max(steps_per_epoch, min(recipe.sweep_steps, 2 * steps_per_epoch), SWEEP_FEWEST_STEPS)


def smooth(losses, steps_per_decade):
    """Return the centred moving average of a list from half to twice the learning rate, taken twice.

    It has no lag. Towards either end of the list it averages over what there is.
    """
    half = round(steps_per_decade * math.log10(2))
    for _ in range(2):
        losses = [statistics.fmean(losses[max(0, i - half):i + half + 1]) for i in range(len(losses))]
    return losses


def read_sweep(recipe, lrs, smoothed):
    """Return (lr_min, lr_max) by `sweep_rule`. Raises UserError where the loss never falls."""
    lowest = smoothed.index(min(smoothed))
    if lowest == 0:
        raise UserError("the sweep found no learning rate at which the loss falls.\n"
                        "Choose LRMAX yourself (--lr-max, or `Rates`) to train without it.")
    # What lies past the climb is of no account: at batch 128 the loss comes down again towards the end of the sweep.
    ceiling = (1 + recipe.sweep_margin) * smoothed[lowest]
    climbed = next((i for i, loss in enumerate(smoothed) if i > lowest and loss > ceiling), len(smoothed))
    lr_max = min(recipe.sweep_factor * lrs[climbed - 1], lrs[-1])
    return lr_max / recipe.lr_ratio, lr_max


def sweep_rule(recipe):
    """Return in words how `read_sweep` finds both rates."""
    return (f"LRMAX is {recipe.sweep_factor:g} times the rate up to which the loss, smoothed from half to twice the "
            f"rate, stays within {100 * recipe.sweep_margin:g}% of its lowest once it is there, but no rate that the "
            f"sweep did not reach; LRMIN is LRMAX / {recipe.lr_ratio:g}.")


# ---- Evaluation and training -----------------------------------------------------------------------------------------

@torch.inference_mode()
def predict(run, images, mirror=False):
    """Return the logits (N, 10), fp32, of prepared images (N, 3, 32, 32), or of their mirror images."""
    run.averaged.eval()
    logits = []
    for batch in images.split(EVAL_BATCH_SIZE):
        with run.autocast():
            logits.append(run.averaged(batch.flip(-1) if mirror else batch).float())
    return torch.cat(logits)


def accuracy(logits, labels):
    """Return the fraction of the rows of logits (N, 10) whose largest is that of the label (N,)."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def evaluate(run):
    """Return `test_loss` (the cross-entropy trained on, smoothing included), `test_accuracy` and `test_seconds`."""
    started = time.perf_counter()
    logits = predict(run, run.test.images)
    loss = F.cross_entropy(logits, run.test.labels, label_smoothing=run.recipe.label_smoothing).item()
    return {"test_loss": loss, "test_accuracy": accuracy(logits, run.test.labels),
            "test_seconds": time.perf_counter() - started}


def epochs(run, rates, on_step=None):
    """Train `run` to the end of its recipe. Yields a row after each epoch: a dictionary of what it learned and took.

    `train_loss` and `train_accuracy` are means over the augmented images, `lr` is the last step's, `elapsed_seconds`
    are those of `run.seconds`. A run that has trained some epochs already goes on after them.
    `on_step(step, steps, learning rate, loss)` is called after each step; reading the loss, a tensor, stalls a GPU.
    Raises Diverged where a loss is NaN or infinite: at that step on a CPU, after the epoch on a GPU.
    """
    recipe, images, steps = run.recipe, len(run.training.labels), run.steps_per_epoch
    sizes = torch.tensor([len(batch) for batch in run.training.labels.split(recipe.batch_size)], dtype=torch.double)
    run.optimizer.param_groups[0]["weight_decay"] = weight_decay(recipe, rates.lr_max, steps)
    while run.epoch < recipe.epochs:
        epoch = run.epoch + 1
        schedule = plan_epoch(recipe, rates, epoch, steps)
        losses, correct = [], 0
        started = time.perf_counter()
        for loss, right in take_steps(run, augmented_batches(recipe, run.training, run.seed, epoch), schedule):
            losses.append(loss)
            correct += right
            average_weights(run, run.epoch * steps + len(losses))
            if on_step:
                on_step(len(losses), steps, schedule[len(losses) - 1][0], loss)
            if run.device == "cpu" and not loss.isfinite():
                break
        losses = torch.stack(losses).cpu().double()
        seconds = time.perf_counter() - started  # reading the losses waited for the device
        for step, loss in enumerate(losses.tolist()):
            if not math.isfinite(loss):
                raise Diverged(epoch, step + 1, schedule[step][0])
        evaluated = evaluate(run)
        if not math.isfinite(evaluated["test_loss"]):
            raise Diverged(epoch, steps, schedule[-1][0])
        run.epoch, run.seconds = epoch, run.seconds + seconds
        yield {"epoch": epoch, "lr": schedule[-1][0],
               "train_loss": (losses @ sizes).item() / images, "train_accuracy": correct.item() / images,
               "train_seconds": seconds, "images_per_second": images / seconds,
               **evaluated, "elapsed_seconds": run.seconds}


# ==== THE PROGRAM =====================================================================================================

MILESTONES = (0.90, 0.94)  # test accuracies whose time is reported; the last is the goal
TRAIN_IMAGES = 50_000  # in CIFAR-10
STATUS_SECONDS = 1.0  # how often a terminal's status line asks for the loss, for which a GPU has to wait
# The constants of the recipe that have no option of their own, with their defaults.
CONSTANTS = {name: value for name, value in vars(Recipe()).items() if name not in ("epochs", "batch_size")}

# ---- Command line ----------------------------------------------------------------------------------------------------

def number(kind, interval):
    """Return an argparse type that takes numbers, int or float, in an interval, see `lies_in`."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if lies_in(kind(text), interval):
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no {'whole ' * (kind is int)}number in {interval}")
    return parse


def recipe_constant(text):
    """Parse NAME=VALUE into the name of a constant of the recipe and a value of its type; an argparse type."""
    name, _, value = text.partition("=")
    if name not in CONSTANTS:
        raise argparse.ArgumentTypeError(f"{name!r} is no constant of the recipe; there are {', '.join(CONSTANTS)}")
    kind = type(CONSTANTS[name])
    with contextlib.suppress(ValueError):  # Recipe refuses what stays a text
        value = tuple(map(float, value.split(","))) if kind is tuple else kind(value)
    return name, value


def parse_arguments(argv=None):
    """Return the configuration of the run, a namespace; exit with usage and code 2 where arguments make no sense."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train the custom DawnBench ResNet on CIFAR-10 under the one-cycle policy.")

    def option(name, help, shown_default="%(default)s", **keywords):
        parser.add_argument(name, help=f"{help} (default: {shown_default})", **keywords)

    option("--recipe", "tuned is this file's own, plain the one that was handed out", choices=list(RECIPES),
           default="tuned", dest="recipe_name")
    option("--epochs", "passes over the training images; 0 finds the learning rates and stops",
           type=number(int, ALLOWED["epochs"]), default=Recipe.epochs, metavar="N")
    option("--batch-size", "images in a step", f"{Recipe.batch_size}, or all training images where they are fewer",
           type=number(int, ALLOWED["batch_size"]), metavar="N")
    option("--lr-max", "peak learning rate", "found by the sweep", type=number(float, "(0, inf)"), metavar="RATE")
    option("--lr-min", "first and last learning rate", "a fraction of LRMAX", type=number(float, "(0, inf)"),
           metavar="RATE")
    option("--seed", "of weights, shuffling and augmentation", type=number(int, "[0, 4294967295]"), default=0,
           metavar="N")
    option("--runs", "train N times, with seeds SEED, SEED + 1, ...", type=number(int, "[1, inf)"), default=1,
           metavar="N")
    option("--subset", "use the first N training images and N/5 test images; 2000 where N is left out", "all",
           type=number(int, f"[5, {TRAIN_IMAGES}]"), nargs="?", const=2000, metavar="N")
    option("--holdout", "train without the last N training images and evaluate on them, not on the test set",
           type=number(int, "[0, inf)"), default=0, metavar="N")
    option("--data-dir", "where CIFAR-10 is, or is downloaded to", type=Path, default=Path("data"), metavar="DIR")
    option("--device", "auto is the fastest there is", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    option("--precision", "auto is bf16 on CUDA GPUs and x86 CPUs that have it, fp16 on older CUDA GPUs, else fp32",
           choices=["auto", *DTYPES], default="auto")
    option("--set", "give a constant of the recipe another value, a pair as A,B; may be given several times",
           "the recipe as it stands", type=recipe_constant, action="append", default=[], metavar="NAME=VALUE")
    option("--checkpoint", "save the state here after every epoch, and go on from it where it exists", "off",
           type=Path, metavar="FILE")
    option("--weights", "save the trained weights here, for `load_weights`", "off", type=Path, metavar="FILE")
    option("--output", "JSON to write", "a new file in results/", type=Path, metavar="FILE")
    option("--no-figures", "write the JSON alone", "figures too, with matplotlib", action="store_false", dest="figures")
    config = parser.parse_args(argv)

    if config.lr_min and config.lr_max and config.lr_min > config.lr_max:
        parser.error(f"--lr-min {config.lr_min:g} is above --lr-max {config.lr_max:g}")
    images = (config.subset or TRAIN_IMAGES) - config.holdout
    if images < 1:
        parser.error(f"--holdout {config.holdout} leaves nothing to train on, of {images + config.holdout} images")
    config.batch_size = config.batch_size or max(2, min(Recipe.batch_size, images))
    if config.batch_size > images:
        parser.error(f"--batch-size {config.batch_size} is above the {images} training images")
    try:
        config.recipe = dataclasses.replace(RECIPES[config.recipe_name], epochs=config.epochs,
                                            batch_size=config.batch_size, **dict(config.set))
    except ValueError as error:
        parser.error(f"argument --set: {error}")
    del config.epochs, config.batch_size, config.set  # the recipe has them
    if config.device == "auto":
        config.device = choose_device()
    if config.precision == "auto":
        config.precision = choose_precision(config.device)
    try:
        check_device(config.device, config.precision)
    except ValueError as error:
        parser.error(f"--{error}")
    if config.weights and not config.recipe.epochs:
        parser.error("--weights: --epochs 0 trains none")
    files = [os.path.realpath(path) for path in (config.output, config.checkpoint, config.weights) if path]
    if len(set(files)) < len(files):
        parser.error("--output, --checkpoint and --weights name the same file twice: each needs its own")
    return config


# Of a configuration, what has no influence on a run's result.
NO_INFLUENCE = ("recipe_name", "runs", "data_dir", "output", "checkpoint", "weights", "figures")


def recipe_values(recipe):
    """Return a recipe as the report and the checkpoint have it, in values of JSON, which has no tuples or infinity."""
    return {name: list(value) if isinstance(value, tuple) else str(value) if value == math.inf else value
            for name, value in vars(recipe).items()}


def describe(config):
    """Return a configuration as the report and the checkpoint have it: a dictionary of plain values."""
    recipe = recipe_values(config.recipe)
    values = {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}
    return {"epochs": recipe.pop("epochs"), "batch_size": recipe.pop("batch_size"), **values, "recipe": recipe}


def select_images(config, training, test):
    """Apply --subset and --holdout. Returns the images to train on, those to evaluate on, and a name for the latter."""
    if config.subset:
        training = Split(*(values[:config.subset] for values in training))
        test = Split(*(values[:config.subset // 5] for values in test))
    if not config.holdout:
        return training, test, "test images"
    return (Split(*(values[:-config.holdout] for values in training)),
            Split(*(values[-config.holdout:] for values in training)), "held-out training images")


# ---- Files: the report (JSON), the checkpoint, the weights -----------------------------------------------------------

def write_file(path, fill=None):
    """Write what `fill(file)` puts into it so that the file is whole at every moment: a reader never sees half of it.

    Makes its folder; a link stays, and the file that it stands for is written. Without `fill` nothing else is done,
    which tells beforehand whether it can be. Raises UserError where it cannot; a device or a pipe is no file.
    """
    content = io.BytesIO()  # torch.save into a file would say of a full disk "unexpected pos"
    if fill:
        fill(content)
    try:
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target) and not target.is_file():  # a link to itself is there but does not exist
            raise OSError("it is there and not a file")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.name}-", suffix=".tmp") as folder:
            if fill:
                (Path(folder) / target.name).write_bytes(content.getbuffer())
                (Path(folder) / target.name).replace(target)
    except (OSError, RuntimeError) as error:  # the latter for a link to itself
        raise UserError(f"cannot write {path} ({error}).\nChoose another place for it.") from None


def write_json(path, content):
    """Write strict JSON (no NaN)."""
    write_file(path, lambda file: file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode()))


def save_weights(path, run, classes):
    """Write all that classifying images takes."""
    content = {"recipe": dataclasses.asdict(run.recipe), "weights": run.averaged.state_dict(), "mean": run.mean,
               "std": run.std, "classes": classes}
    write_file(path, lambda file: torch.save(content, file))


def load_weights(path, device="cpu"):
    """Return from a file of `--weights` the model, ready to classify images, their mean and std, and the class names.

    The model takes what `normalise(images, mean, std)` makes of uint8 images (N, 3, 32, 32).
    """
    saved = torch.load(path, map_location=device, weights_only=True)
    model = ResNet(Recipe(**saved["recipe"])).to(device, memory_format=memory_format(device))
    model.load_state_dict(saved["weights"])
    return model.eval().requires_grad_(False), saved["mean"], saved["std"], saved["classes"]


def new_report(config, run, evaluated_on):
    """Return the report of a run that has not trained."""
    cpu_name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name")
    device_name = (torch.cuda.get_device_name() if config.device == "cuda"
                   else cpu_name or platform.processor() or platform.machine())
    return {"config": {**describe(config), "peak_epoch": run.recipe.peak_fraction * run.recipe.epochs},
            "environment": {"python": platform.python_version(), "torch": str(torch.__version__),
                            "torchvision": torchvision.__version__, "numpy": np.__version__,
                            "device": config.device, "device_name": device_name, "precision": config.precision,
                            "threads": torch.get_num_threads()},
            "data": {"train_images": len(run.training.labels), "test_images": len(run.test.labels),
                     "mean": run.mean.tolist(), "std": run.std.tolist(), "evaluated_on": evaluated_on},
            "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
            "lr_sweep": None, "epochs": [],
            "summary": {"status": "running", "tta_test_accuracy": None, "preprocess_seconds": run.seconds,
                        "sweep_seconds": 0.0, "total_seconds": 0.0}}


def summarise(report, status):
    """Bring the summary of a report up to date with its epochs."""
    rows, summary = report["epochs"], report["summary"]
    best = max(rows, key=lambda row: row["test_accuracy"], default=None)
    first = {f"{goal:.2f}": next((row for row in rows if row["test_accuracy"] >= goal), None) for goal in MILESTONES}
    summary.update(
        status=status,
        final_test_accuracy=rows[-1]["test_accuracy"] if rows and status == "complete" else None,
        best_test_accuracy=best and best["test_accuracy"], best_epoch=best and best["epoch"],
        train_seconds=sum(row["train_seconds"] for row in rows),
        seconds_to={goal: row and row["elapsed_seconds"] for goal, row in first.items()},
        epochs_to={goal: row and row["epoch"] for goal, row in first.items()})


def load_checkpoint(config, run, report):
    """Bring `run` and `report` to where the checkpoint was saved. Returns where that report was written.

    Raises UserError where the file is no checkpoint, or one of a run with another configuration.
    """
    advice = "Delete it or choose another --checkpoint."
    try:
        saved = torch.load(config.checkpoint, map_location=run.device, weights_only=True)
        then, now = ({**given, **given["recipe"]} for given in (saved["config"], describe(config)))
        differences = [f"{name} {then.get(name)}, not {now.get(name)}"
                       for name in sorted((then.keys() | now.keys()) - {"recipe", *NO_INFLUENCE})
                       if then.get(name) != now.get(name)]
        if not differences:
            run.load_state(saved["run"])
            old = saved["report"]
            report.update(lr_sweep=old["lr_sweep"], epochs=old["epochs"], summary=old["summary"])
            report["config"].update({name: old["config"][name] for name in ("lr_min", "lr_max", "weight_decay")})
            return Path(old["config"]["output"])
    except Exception as error:  # what a damaged file raises is of many kinds
        raise UserError(f"{config.checkpoint} is not a checkpoint of this script ({type(error).__name__}).\n"
                        f"{advice}") from None
    raise UserError(f"{config.checkpoint} is of a run with {'; '.join(differences)}.\n{advice}")


# ---- The screen ------------------------------------------------------------------------------------------------------

def in_notebook():
    """Tell whether this code was pasted into a notebook cell: IPython is there and no file is."""
    return hasattr(builtins, "__IPYTHON__") and "__file__" not in globals()


def overwrite(text):
    """Show `text` in place of the line that a terminal shows; do nothing where output is no terminal."""
    if sys.stdout is not None and sys.stdout.isatty():
        width = shutil.get_terminal_size().columns - 1  # a longer text would go on in a line that is not overwritten
        with contextlib.suppress(OSError):  # the terminal may have been closed
            print(f"\r{text[:width]:<{width}}\r", end="", flush=True)


def status_line(run, sweeping=False):
    """Return an `on_step` for `find_rates` or `epochs` that keeps a terminal's last line up to date."""
    begun = shown = time.perf_counter()

    def on_step(step, steps, lr, loss):
        nonlocal begun, shown
        now = time.perf_counter()
        if step == 1:
            begun = now  # a new epoch; its first step is not in the speed, as it may warm up
        elif now - shown > STATUS_SECONDS:
            epochs_after = 0 if sweeping else run.recipe.epochs - run.epoch - 1
            per_second = (step - 1) / (now - begun)
            minutes, seconds = divmod(round((steps - step + steps * epochs_after) / per_second), 60)
            overwrite(f"{'sweep' if sweeping else f'epoch {run.epoch + 1}/{run.recipe.epochs}'}  step {step}/{steps}  "
                      f"learning rate {lr:.1e}  loss {loss:.3f}  {per_second * run.recipe.batch_size:,.0f} images/s  "
                      f"{minutes}:{seconds:02} left")
            shown = time.perf_counter()
    return on_step


def print_heading(report):
    """Print what is being run, and on what."""
    config, data, environment = report["config"], report["data"], report["environment"]
    usual = recipe_values(RECIPES[config["recipe_name"]])
    changed = [f", {name} {value} instead of {usual[name]}" for name, value in config["recipe"].items()
               if value != usual[name]]
    print(f"recipe     {config['recipe_name']}{''.join(changed)}\n"
          f"model      custom ResNet, {report['parameters']:,} parameters, seed {config['seed']}\n"
          f"device     {environment['device']} ({environment['device_name']}), {environment['precision']}, "
          f"{environment['threads']} CPU thread{'s' * (environment['threads'] > 1)}, PyTorch {environment['torch']}\n"
          f"data       {data['train_images']:,} training images, {data['test_images']:,} {data['evaluated_on']}\n"
          f"report     {config['output']}")
    if environment["device"] == "cpu" and environment["precision"] not in ("fp32", choose_precision("cpu")):
        print(f"slow       unless this CPU has instructions for {environment['precision']}: without them it takes many "
              f"times as long as --precision fp32")


# The columns of the table on the screen: what they show of an epoch's row, their heading and format.
COLUMNS = (("epoch", "epoch", "d"), ("lr", "lr", ".2g"), ("train_loss", "train loss", ".4f"),
           ("train_accuracy", "train acc", ".2%"), ("test_loss", "test loss", ".4f"),
           ("test_accuracy", "test acc", ".2%"), ("train_seconds", "train s", ".1f"),
           ("test_seconds", "test s", ".1f"), ("images_per_second", "images/s", ",.0f"),
           ("elapsed_seconds", "total s", ".1f"))


def format_row(row):
    """Return one epoch as a line of the table, each column as wide as its heading or 7 characters."""
    return "  ".join(format(row[name], layout).rjust(max(7, len(heading))) for name, heading, layout in COLUMNS)


def print_table_head(report):
    """Print the rates that training takes, the table's headings, and the epochs that a checkpoint brought."""
    config, sweep = report["config"], report["lr_sweep"]
    overwrite("")
    if sweep:
        print(f"sweep      {len(sweep['lr'])} steps in {report['summary']['sweep_seconds']:.1f} s: the loss fell from "
              f"{sweep['smoothed_loss'][0]:.2f} to {min(sweep['smoothed_loss']):.2f}")
    peak = f" at epoch {config['peak_epoch']:g} of {config['epochs']}" if config["epochs"] else ""
    print(f"rates      LRMIN {config['lr_min']:.3g}, LRMAX {config['lr_max']:.3g}{peak}, "
          f"weight decay {config['weight_decay']:.3g}")
    if config["epochs"]:
        print("total s    is preprocessing and training, without the sweep and the evaluations")
        print("  ".join(heading.rjust(7) for _, heading, _ in COLUMNS))
        for row in report["epochs"]:
            print(format_row(row))


def print_summary(report):
    """Print how a run that trained ended."""
    summary = report["summary"]
    if report["epochs"]:
        sweep = f"{summary['sweep_seconds']:.1f} s of sweep"
        print(f"final      {summary['final_test_accuracy']:.2%} of the {report['data']['evaluated_on']} "
              f"({summary['tta_test_accuracy']:.2%} with the mirror image averaged in)\n"
              f"time       {summary['train_seconds']:.1f} s of training, {sweep}, "
              f"{summary['total_seconds']:.1f} s in all")
        for goal, epoch in summary["epochs_to"].items():
            if epoch:
                print(f"to {float(goal):.0%}     epoch {epoch}, {summary['seconds_to'][goal]:.1f} s after {sweep}")


def complain(message):
    """Print to the standard error, where that is still open."""
    with contextlib.suppress(OSError):
        print(message, file=sys.stderr)


# ---- Figures: beside the JSON, where matplotlib can be imported ------------------------------------------------------

def to_pixels(images, mean, std):
    """Turn normalised images (N, 3, H, W) back into colours (N, H, W, 3) from 0 to 1, a NumPy array."""
    images = images.float().cpu() * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    return images.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def plot_sweep(figure, sweep, lr_min, lr_max):
    """Draw the loss over the learning rate, with both rates that training took marked."""
    axes = figure.subplots()
    axes.semilogx(sweep["lr"], sweep["loss"], color="tab:blue", alpha=0.3, label="loss of each step")
    axes.semilogx(sweep["lr"], sweep["smoothed_loss"], color="tab:blue", label="smoothed")
    axes.axvline(lr_min, color="tab:green", linestyle="--", label=f"LRMIN {lr_min:.2g}")
    axes.axvline(lr_max, color="tab:red", linestyle="--", label=f"LRMAX {lr_max:.2g}")
    axes.set_ylim(top=min(axes.get_ylim()[1], 2 * sweep["smoothed_loss"][0]))  # a diverged end would flatten the rest
    figure.legend(loc="outside lower center", ncols=4)  # inside it would hide a part of some sweep
    axes.set(title="Learning-rate range sweep", xlabel="learning rate (log scale)", ylabel="training loss")


def plot_curves(figure, rows, evaluated_on, label_smoothing):
    """Draw loss and accuracy over the epochs, for training and for evaluation."""
    epochs = [row["epoch"] for row in rows]
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for name, label in (("train", "training images, augmented"), ("test", evaluated_on)):
        loss_axes.plot(epochs, [row[f"{name}_loss"] for row in rows], marker=".", label=label)
        accuracy_axes.plot(epochs, [100 * row[f"{name}_accuracy"] for row in rows], marker=".", label=label)
    accuracy_axes.axhline(100 * MILESTONES[-1], color="grey", linestyle=":", label=f"{MILESTONES[-1]:.0%}")
    loss_axes.set(title="Loss", xlabel="epoch", ylabel=f"cross-entropy, smoothing {label_smoothing:g}")
    accuracy_axes.set(title="Accuracy", xlabel="epoch", ylabel="accuracy (%)")
    for axes in (loss_axes, accuracy_axes):
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()


def plot_schedule(figure, lrs, epochs):
    """Draw the learning rate of every step of the run."""
    axes = figure.subplots()
    axes.plot([(step + 1) * epochs / len(lrs) for step in range(len(lrs))], lrs, marker="." if len(lrs) < 10 else None)
    axes.set(title="One-cycle learning rate", xlabel="epoch", ylabel="learning rate", ylim=0)
    axes.grid(alpha=0.3)


def plot_images(figure, run, images, captions, columns, title):
    """Draw prepared images (N, 3, H, W) of a run in a grid, each under its caption."""
    figure.suptitle(title)
    grid = figure.subplots(math.ceil(len(images) / columns), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, pixels, caption in zip(grid.flat, to_pixels(images, run.mean, run.std), captions):
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(caption, fontsize=8)


def draw_figures(report, run, classes):
    """Yield the figures of a finished run: the name of each, its size in inches, what plots it, and what of."""
    config, rows, evaluated_on = report["config"], report["epochs"], report["data"]["evaluated_on"]
    if report["lr_sweep"]:
        yield "sweep", (7, 4.5), plot_sweep, report["lr_sweep"], config["lr_min"], config["lr_max"]
    if rows:
        yield "curves", (11, 4.5), plot_curves, rows, evaluated_on, run.recipe.label_smoothing
        rates = Rates(config["lr_min"], config["lr_max"])
        lrs = [lr for row in rows for lr, _ in plan_epoch(run.recipe, rates, row["epoch"], run.steps_per_epoch)]
        yield "schedule", (7, 4), plot_schedule, lrs, len(rows)
    images, labels = next(augmented_batches(dataclasses.replace(run.recipe, batch_size=32), run.training, run.seed, 1))
    yield ("augmented", (9, 5.8), plot_images, run, images, [classes[label] for label in labels.tolist()], 8,
           "Training images after crop, flip and cutout")
    if rows:
        confidence, predicted = predict(run, run.test.images).softmax(1).max(1)
        wrong = (predicted != run.test.labels).nonzero().flatten()[:10]
        captions = [f"{classes[run.test.labels[i]]}\ntaken for {classes[predicted[i]]}\n"
                    f"with probability {confidence[i]:.2f}" for i in wrong.tolist()]
        if captions:
            yield ("misclassified", (9, 5), plot_images, run, run.test.images[wrong], captions, 5,
                   f"The first misclassified {evaluated_on}: true class, predicted class")


def save_figures(output, report, run, classes):
    """Write the figures beside the report at `output` and show them in a notebook, or say in one line why not."""
    try:
        from matplotlib.figure import Figure
        for name, size, plot, *content in draw_figures(report, run, classes):
            figure, path = Figure(size, dpi=120, layout="constrained"), output.with_name(f"{output.stem}-{name}.png")
            plot(figure, *content)
            write_file(path, figure.savefig)
            print(f"figure     {path}")
            if in_notebook():
                from IPython.display import Image, display
                display(Image(filename=str(path)))
    except ImportError:
        print("figures    skipped: matplotlib is not installed (pip install matplotlib)")
    except Exception as error:  # whatever matplotlib finds wrong, the run is done and its report written
        print(f"figures    not drawn: {' '.join(str(error).split()) or type(error).__name__}")


# ---- The run ---------------------------------------------------------------------------------------------------------

def choose_rates(config, run, report):
    """Put into the report the rates that were given, what a sweep finds, and the weight decay that follows."""
    lr_max = config.lr_max
    if lr_max is None:
        started = time.perf_counter()
        found = find_rates(run, status_line(run, sweeping=True))
        report["lr_sweep"], report["summary"]["sweep_seconds"] = found.sweep, time.perf_counter() - started
        lr_max = found.lr_max
    lr_min = config.lr_min or lr_max / config.recipe.lr_ratio
    if lr_min > lr_max:
        raise UserError(f"LRMIN {lr_min:.2g} is above LRMAX {lr_max:.2g}, which the sweep found.\n"
                        f"Give --lr-max as well, or neither.")
    report["config"].update(lr_min=lr_min, lr_max=lr_max,
                            weight_decay=weight_decay(run.recipe, lr_max, run.steps_per_epoch))


def train_once(config, data, output):
    """Do one run: start or resume it, find the rates, train, and write the report. Returns that, of a diverged run too.

    Raises UserError, KeyboardInterrupt and what PyTorch raises; the report on disk then says where it stood.
    """
    begun = time.perf_counter()
    training, test, evaluated_on = select_images(config, *data[:2])
    run = start(config.recipe, training, test, config.seed, config.device, config.precision)
    report = new_report(config, run, evaluated_on)
    resumed = config.checkpoint is not None and config.checkpoint.exists()
    if resumed:
        saved_output = load_checkpoint(config, run, report)
        output = output if config.output else saved_output  # go on in the same file
    report["config"]["output"], summary = str(output), report["summary"]
    begun -= summary["total_seconds"]  # of the sittings before this one

    def save(status, checkpoint=False):
        summary["total_seconds"] = time.perf_counter() - begun
        summarise(report, status)
        write_json(output, report)
        if checkpoint and config.checkpoint:
            content = {"config": describe(config), "run": run.state(), "report": report}
            write_file(config.checkpoint, lambda file: torch.save(content, file))

    save("running")
    try:
        print_heading(report)
        if not resumed:
            choose_rates(config, run, report)
            save("running", checkpoint=True)
        print_table_head(report)
        rates = Rates(report["config"]["lr_min"], report["config"]["lr_max"])
        for row in epochs(run, rates, status_line(run)):
            report["epochs"].append(row)
            overwrite("")
            print(format_row(row))
            save("running", checkpoint=True)
        if report["epochs"]:
            both_views = predict(run, run.test.images) + predict(run, run.test.images, mirror=True)
            summary["tta_test_accuracy"] = accuracy(both_views, run.test.labels)
            if config.weights:
                save_weights(config.weights, run, data[2])
        save("complete")
    except Diverged as divergence:
        overwrite("")
        summary["diverged"] = divergence.where
        save("diverged")
        complain(f"error: {divergence}")
        return report
    except BaseException:
        save("interrupted")
        overwrite("")
        raise

    print_summary(report)
    if config.figures:
        save_figures(output, report, run, data[2])
    return report


def report_runs(reports, path):
    """Print and write to `path` the statistics of several runs, the accuracies' of those that did not diverge."""
    configs, summaries = [report["config"] for report in reports], [report["summary"] for report in reports]
    shared = {name: value for name, value in configs[0].items() if all(config[name] == value for config in configs)}
    diverged = [config["seed"] for config, summary in zip(configs, summaries) if summary["status"] == "diverged"]
    statistic = {"runs": len(reports), "diverged": diverged, "config": {**shared, "output": str(path)},
                 "environment": reports[0]["environment"]}
    for name in ("seed", "lr_max", "lr_min"):
        statistic[name] = [config[name] for config in configs]
    for name in ("final_test_accuracy", "tta_test_accuracy", "train_seconds", "epochs_to"):
        statistic[name] = [summary[name] for summary in summaries]
    print(f"{f'{len(reports)} runs':<11}LRMAX {min(statistic['lr_max']):.3g} to {max(statistic['lr_max']):.3g}, "
          f"LRMIN {min(statistic['lr_min']):.3g} to {max(statistic['lr_min']):.3g}")
    if diverged:
        print(f"{'':<11}{len(diverged)} diverged, not in the statistics: seed {', '.join(map(str, diverged))}")
    accuracies = [value for value in statistic["final_test_accuracy"] if value is not None]
    if accuracies:
        statistic.update(mean=statistics.fmean(accuracies), min=min(accuracies), max=max(accuracies),
                         std=statistics.stdev(accuracies) if len(accuracies) > 1 else None, goal=MILESTONES[-1],
                         reached_goal=sum(value >= MILESTONES[-1] for value in accuracies))
        spread = f"standard deviation {statistic['std']:.2%}, " if len(accuracies) > 1 else ""
        print(f"{'':<11}mean {statistic['mean']:.2%}, {spread}"
              f"min {statistic['min']:.2%}, max {statistic['max']:.2%}; "
              f"{statistic['reached_goal']} of {len(reports)} reached {MILESTONES[-1]:.0%}")
    write_json(path, statistic)
    print(f"report     {path}")


def run_seeds(config):
    """Do all the runs of a configuration. Returns the exit code: 1 where one of them diverged."""
    output = config.output or Path("results") / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{config.device}.json"
    for path in filter(None, [output, config.checkpoint, config.weights]):
        write_file(path)  # fails now rather than after training
    data = load_cifar10(config.data_dir)
    reports = []
    for seed in range(config.seed, config.seed + config.runs):
        def own(path):  # each of several runs has files of its own, with the seed in their names
            return path.with_name(f"{path.stem}-seed{seed}{path.suffix}") if path and config.runs > 1 else path
        files = {"checkpoint": own(config.checkpoint), "weights": own(config.weights)}
        reports.append(train_once(argparse.Namespace(**{**vars(config), **files, "seed": seed}), data, own(output)))
    if config.runs > 1:
        report_runs(reports, output)
    return int(any(report["summary"]["status"] == "diverged" for report in reports))


def main(argv=None):
    """Run the script with the given arguments (default: the command line's). Returns the exit code."""
    config = parse_arguments(argv)
    try:
        return run_seeds(config)
    except KeyboardInterrupt as interruption:
        complain("\ninterrupted")
        return 128 + (interruption.args[0] if interruption.args else signal.SIGINT)
    except BrokenPipeError:
        complain("error: nobody reads the output any more. Write it to a file (> run.log) to train without a reader.")
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would complain of it once more
    except (UserError, OSError) as error:
        complain(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        signs = ("out of memory", "can't allocate memory")  # PyTorch's, the latter on CPUs
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in signs):
            raise
        complain(f"error: out of memory on {config.device}: try a smaller --batch-size than "
                 f"{config.recipe.batch_size}.")
    return 1


def settle_in():
    """Set up a process of our own: signals that end it do so as Ctrl-C does, and output never fails over a letter."""
    def interrupt(number, frame):
        raise KeyboardInterrupt(number)
    for number in (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP")):  # Windows lacks the latter
        if number and signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(number, interrupt)
    if hasattr(sys.stdout, "reconfigure"):  # it is None where output is closed, and something else under IPython's %run
        # A path may have letters that the terminal has not; a line is to appear when it is done.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)


if __name__ == "__main__":
    if in_notebook():
        main([])  # the kernel's own sys.argv is not meant for this; for other options call main(["--epochs", "10"])
    else:
        settle_in()
        sys.exit(main())
