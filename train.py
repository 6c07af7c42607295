"""Train the custom DawnBench ResNet on CIFAR-10 under the one-cycle policy, at learning rates it finds itself.

    python train.py --epochs 24 --batch-size 512

One file on PyTorch, torchvision and NumPy. It downloads CIFAR-10, finds LRMIN and LRMAX by a range sweep, trains,
evaluates after every epoch, and writes a JSON of metrics (and figures, where matplotlib is installed) to results/.
It runs on a CUDA GPU, on an Apple GPU or on a CPU, as a script or pasted into a notebook cell.

The file reads in the order in which it runs: recipe, command line, data, augmentation, model, optimisation, one-cycle,
sweep, training, evaluation, files, figures, and the run that puts them together.
"""

import argparse
import builtins
import copy
import ctypes
import http.client
import itertools
import json
import math
import os
import platform
import statistics
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, extract_archive

# ----------------------------------------------------------------------------------------------------------------------
# The recipe: every constant of it, once
# ----------------------------------------------------------------------------------------------------------------------

RECIPE = {
    # One-cycle: the rate rises linearly from LRMIN to LRMAX over this fraction of the run, then falls back to LRMIN.
    "peak_fraction": 5 / 24,
    # Adam's first beta moves against the rate: outer value at LRMIN, inner value at LRMAX.
    "beta1": (0.95, 0.85),
    "beta2": 0.999,
    # Adam divides by the root of the squared gradient's average plus epsilon. This one outweighs most of those roots,
    # so that weights move nearly as under SGD with momentum, the original's optimizer.
    "epsilon": 0.01,
    # Weight decay, decoupled (as in AdamW), on the weights of the convolutions and the linear layer alone. What is set
    # is how long they remember: at LRMAX, decay by itself shrinks a weight to 1/e in this many epochs. The original's
    # SGD comes to 5.
    "memory_epochs": 5.0,
    "label_smoothing": 0.2,
    # The share of each batch in BatchNorm's running statistics, which only evaluation uses. PyTorch's 0.1 remembers 10
    # steps, and weights at LRMAX have moved on by then.
    "batchnorm_momentum": 0.3,
    # The logits are scaled down, as in the original: a rate that suits the convolutions is large for the last layer.
    "logit_scale": 0.125,
    # The first convolution begins by whitening the 3x3 patches of so many images. The floor is added to the variance of
    # each of their directions, so that those that hardly vary, which are noise, are not blown up.
    "whitening_images": 1000,
    "whitening_floor": 0.01,
    # Augmentation, in pixels.
    "padding": 4,
    "padding_mode": "reflect",
    "cutout": 8,
    # The sweep raises the rate exponentially from the first value to the second in one epoch; in up to two where one
    # has fewer steps than this.
    "sweep_range": (1e-6, 1.0),
    "sweep_steps": 100,
    # What it reads off the smoothed loss, as fractions of its fall: LRMIN where the fall begins, and where it is done;
    # LRMAX lies so many times above the latter.
    "sweep_begun": 0.1,
    "sweep_done": 0.75,
    "sweep_factor": 16.0,
}

TRAIN_IMAGES = 50_000  # in CIFAR-10
MEMORY_FEWEST_STEPS = 100  # or BatchNorm's running statistics would lag behind weights that decay
SWEEP_FEWEST_STEPS = 8  # a sweep of a handful of batches repeats them rather than leap over the rates that matter
SWEEP_NOISE = 0.1  # a climb of the loss by less than this fraction of its first value does not end a sweep
SWEEP_EPOCH = 900_000  # numbers the sweep's epochs, so that its random draws are none of training's
MILESTONES = (0.90, 0.94)  # test accuracies whose time is reported; the last is the goal
EVAL_BATCH_SIZE = 2000
STATUS_SECONDS = 1.0  # how often a GPU is asked for its loss inside an epoch, which shows in the status line


class UserError(Exception):
    """A failure whose message says what happened and what to do; `main` prints it without a traceback."""


class Diverged(Exception):
    """The loss became NaN or infinite."""

    def __init__(self, epoch, step, lr):
        super().__init__(f"the loss became NaN or infinite at epoch {epoch}, step {step}, learning rate {lr:.3g}.\n"
                         f"Try a lower --lr-max, or --precision fp32.")
        self.where = {"epoch": epoch, "step": step, "lr": lr}


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

def whole_number(minimum, maximum=None):
    """Return an argparse type that takes integers from `minimum` to `maximum`."""
    def parse(text):
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value} is too small: at least {minimum} is needed")
        if maximum is not None and value > maximum:
            raise argparse.ArgumentTypeError(f"{value} is too large: at most {maximum} is possible")
        return value
    return parse


def learning_rate(text):
    """Parse a positive, finite number; an argparse type."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a learning rate: a positive number is needed")
    return value


def recipe_constant(text):
    """Parse NAME=VALUE into the name of a constant in RECIPE and a value of its type; an argparse type."""
    name, _, value = text.partition("=")
    if name not in RECIPE:
        raise argparse.ArgumentTypeError(f"{name!r} is no constant of the recipe; there are {', '.join(RECIPE)}")
    default = RECIPE[name]
    try:
        if isinstance(default, tuple):
            first, second = value.split(",")
            return name, (float(first), float(second))
        return name, type(default)(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{value!r} is no value for {name}, which is {default}") from None


def parse_arguments(argv=None):
    """Return the options as a namespace, with `device` resolved; exit with code 2 where they make no sense."""
    parser = argparse.ArgumentParser(
        prog="train.py", description="Train the custom DawnBench ResNet on CIFAR-10 under the one-cycle policy.")

    def option(name, help, shown_default="%(default)s", **keywords):
        parser.add_argument(name, help=f"{help} (default: {shown_default})", **keywords)

    option("--epochs", "passes over the training images; 0 finds the learning rates and stops",
           type=whole_number(0), default=24, metavar="N")
    option("--batch-size", "images in a step", type=whole_number(2), default=512, metavar="N")
    option("--lr-max", "peak learning rate", "found by the sweep", type=learning_rate, metavar="RATE")
    option("--lr-min", "first and last learning rate", "found by the sweep", type=learning_rate, metavar="RATE")
    option("--seed", "of weights, shuffling and augmentation", type=whole_number(0, 2**32 - 1), default=0, metavar="N")
    option("--runs", "train N times, with seeds SEED, SEED + 1, ...", type=whole_number(1), default=1, metavar="N")
    option("--subset", "use the first N training images and N/5 test images; 2000 where N is left out", "all",
           type=whole_number(5, TRAIN_IMAGES), nargs="?", const=2000, metavar="N")
    option("--holdout", "train without the last N training images and evaluate on them, not on the test set",
           type=whole_number(0, TRAIN_IMAGES), default=0, metavar="N")
    option("--data-dir", "where CIFAR-10 is, or is downloaded to", type=Path, default=Path("data"), metavar="DIR")
    option("--device", "auto is the fastest there is", choices=["auto", "cpu", "cuda", "mps"], default="auto")
    option("--precision", "auto is bf16 where the hardware has it, fp16 on older CUDA GPUs, else fp32",
           choices=["auto", "fp32", "bf16", "fp16"], default="auto")
    option("--set", "give a constant of RECIPE another value, a pair as A,B; may be given several times",
           "RECIPE as it stands", type=recipe_constant, action="append", default=[], metavar="NAME=VALUE")
    option("--checkpoint", "save the state here after every epoch, and go on from it where it exists", "off",
           type=Path, metavar="FILE")
    option("--output", "JSON to write", "a new file in results/", type=Path, metavar="FILE")
    option("--no-figures", "write the JSON alone", "figures too, with matplotlib", action="store_true")
    options = parser.parse_args(argv)

    if options.lr_min and options.lr_max and options.lr_min > options.lr_max:
        parser.error(f"--lr-min {options.lr_min:g} is above --lr-max {options.lr_max:g}")
    images = options.subset or TRAIN_IMAGES
    if options.holdout >= images:
        parser.error(f"--holdout {options.holdout} leaves nothing to train on: there are {images} training images")
    if options.batch_size > images - options.holdout:
        parser.error(f"--batch-size {options.batch_size} is above the {images - options.holdout} training images")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if options.device == "auto":
        options.device = next(device for device, there in available.items() if there)
    elif not available[options.device]:
        parser.error(f"--device {options.device}: PyTorch finds no such device here; try --device cpu")
    if options.device == "mps" and options.precision == "fp16":
        parser.error("--precision fp16 needs gradient scaling, which fails on some Apple GPUs; try --precision fp32")
    return options


# ----------------------------------------------------------------------------------------------------------------------
# Data: the whole data set on the device
# ----------------------------------------------------------------------------------------------------------------------

class Split(NamedTuple):
    """Images (N, 3, H, W) and their labels (N,), both tensors on one device."""
    images: torch.Tensor
    labels: torch.Tensor


def load_cifar10(data_dir):
    """Read CIFAR-10, downloading it where it is missing (A. Krizhevsky, Learning Multiple Layers of Features, 2009).

    Returns the training split, the test split (both uint8, (N, 3, 32, 32), on the CPU) and the ten class names.
    Raises UserError where a file cannot be had or its checksum is wrong.
    """
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

    splits = []
    for train in (True, False):
        dataset = CIFAR10(data_dir, train=train)
        images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2)
        splits.append(Split(images, torch.tensor(dataset.targets)))
    return splits[0], splits[1], dataset.classes


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
    except (OSError, RuntimeError, EOFError, tarfile.TarError, http.client.HTTPException) as error:
        raise UserError(f"could not fetch CIFAR-10 from {CIFAR10.url} ({error}).\n"
                        f"Get that file by hand and put it at {archive}, or its files into {folder}{os.sep}.") from None


def channel_statistics(images):
    """Return the mean and the standard deviation of each channel of uint8 (N, C, H, W) images, on the scale 0 to 1."""
    std, mean = torch.std_mean(images.float() / 255, dim=(0, 2, 3), correction=0)
    return mean, std


def memory_format(device):
    """Return the layout of images and weights that is fastest on `device` and right."""
    # On Apple GPUs, many versions of PyTorch get the gradients of channels-last images wrong (pytorch issue 175189).
    return torch.contiguous_format if device == "mps" else torch.channels_last


def prepare(split, mean, std, device, dtype, padding=0):
    """Normalise uint8 images, pad them and lay them out on `device`.

    Returns a Split of images (N, 3, H + 2 padding, W + 2 padding) of type `dtype`.
    """
    images = split.images.to(device).float().div_(255)
    mean, std = (values.to(device).view(1, -1, 1, 1) for values in (mean, std))
    images = images.sub_(mean).div_(std).to(dtype)
    if padding:
        images = F.pad(images, (padding,) * 4, mode=RECIPE["padding_mode"])
    return Split(images.contiguous(memory_format=memory_format(device)), split.labels.to(device))


# ----------------------------------------------------------------------------------------------------------------------
# Augmentation: batched tensor operations, drawn for each image by itself
# ----------------------------------------------------------------------------------------------------------------------

class Draws(NamedTuple):
    """What chance decided for a batch of B images: five tensors (B,). Positions are of the upper left corner."""
    crop_top: torch.Tensor
    crop_left: torch.Tensor
    flip: torch.Tensor
    cutout_top: torch.Tensor
    cutout_left: torch.Tensor


def draw_flips(count, seed, epoch, device):
    """Return which of all `count` training images (count,) are mirrored in `epoch`; the next epoch mirrors the others.

    A coin decides for each image which half it is in. Coins tossed anew in every epoch would show some images
    mirrored five times in a row (K. Jordan, arXiv:2404.00498, section 3.6).
    """
    coins = torch.randint(2, (count,), generator=epoch_generator(seed, 0, device), device=device)
    return (coins + epoch) % 2 == 1


def draw_augmentation(flips, size, generator):
    """Draw crops out of padded images, and cutouts that lie wholly inside the (size, size) crop, beside flips (B,)."""
    def position(choices):
        return torch.randint(choices, flips.shape, generator=generator, device=generator.device)
    crop_choices = 2 * RECIPE["padding"] + 1
    cutout_choices = size - RECIPE["cutout"] + 1
    return Draws(position(crop_choices), position(crop_choices), flips,
                 position(cutout_choices), position(cutout_choices))


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


def augment(padded, draws):
    """Crop, flip and cut out: padded (B, 3, H + 2 padding, W + 2 padding) to (B, 3, H, W), as drawn."""
    images = crop(padded, draws.crop_top, draws.crop_left, padded.shape[-1] - 2 * RECIPE["padding"])
    images = flip(images, draws.flip)
    return cutout(images, draws.cutout_top, draws.cutout_left, RECIPE["cutout"])


def augmented_batches(train, batch_size, seed, epoch):
    """Shuffle a padded Split and yield its images, augmented, and labels; the last batch has what is left over."""
    size, device = train.images.shape[-1] - 2 * RECIPE["padding"], train.images.device
    generator = epoch_generator(seed, epoch, device)
    flips = draw_flips(len(train.labels), seed, epoch, device)
    order = torch.randperm(len(train.labels), generator=generator, device=device)
    for chosen in order.split(batch_size):
        draws = draw_augmentation(flips[chosen], size, generator)
        images = augment(train.images[chosen], draws)
        yield images.contiguous(memory_format=memory_format(device.type)), train.labels[chosen]


def epoch_generator(seed, epoch, device):
    """Return the random generator of one epoch. It depends on nothing else, so that a resumed run draws the same."""
    return torch.Generator(device).manual_seed(1_000_003 * seed + epoch)


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------

class ConvBlock(nn.Sequential):
    """Conv 3x3, MaxPool 2 if `pool`, BatchNorm, ReLU: (B, c_in, H, W) to (B, c_out, H, W), or half of H and W."""

    def __init__(self, c_in, c_out, pool=False):
        super().__init__(nn.Conv2d(c_in, c_out, kernel_size=3, stride=1, padding=1, bias=False),
                         *([nn.MaxPool2d(2)] if pool else []),
                         nn.BatchNorm2d(c_out, momentum=RECIPE["batchnorm_momentum"]),
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

    It has 6,573,130 parameters, or 6,573,120 with `head_bias=False`. The softmax is left to the cross-entropy.
    The first filters of every convolution but the first begin as the identity, so that the untrained network already
    carries the image through to its head (as in airbench: K. Jordan, arXiv:2404.00498, section 3.3).
    """

    def __init__(self, classes=10, head_bias=True):
        super().__init__()
        self.prep = ConvBlock(3, 64)                                                   # (B, 64, 32, 32)
        self.layer1 = nn.Sequential(ConvBlock(64, 128, pool=True), ResBlock(128))      # (B, 128, 16, 16)
        self.layer2 = ConvBlock(128, 256, pool=True)                                   # (B, 256, 8, 8)
        self.layer3 = nn.Sequential(ConvBlock(256, 512, pool=True), ResBlock(512))     # (B, 512, 4, 4)
        self.pool = nn.Sequential(nn.MaxPool2d(4), nn.Flatten())                       # (B, 512)
        self.head = nn.Linear(512, classes, bias=head_bias)                            # (B, 10)
        for block in self.modules():
            if isinstance(block, ConvBlock) and block is not self.prep:
                nn.init.dirac_(block[0].weight[:block[0].in_channels])

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        return self.head(self.pool(x)) * RECIPE["logit_scale"]


@torch.no_grad()
def whiten_first_layer(model, images):
    """Set the first convolution so that it whitens the 3x3 patches of prepared images (N, 3, H, W).

    Its filters become the 27 eigenvectors of the patches' covariance, each over the root of its eigenvalue, and their
    negatives, since ReLU keeps one side of each; the other 10 stay random. All of them are trained as ever.
    (D. Page, How to Train Your ResNet 8, Bag of Tricks, 2019; with negatives: tysam-code, hlb-CIFAR10, 2023.)
    """
    patches = F.unfold(images[:RECIPE["whitening_images"]].float().cpu(), 3)           # (N, 27, positions)
    variances, directions = torch.linalg.eigh(torch.cov(patches.transpose(0, 1).flatten(1)))
    filters = (directions / (variances + RECIPE["whitening_floor"]).sqrt()).T.reshape(27, 3, 3, 3)
    model.prep[0].weight[:54].copy_(torch.cat([filters, -filters]))


# ----------------------------------------------------------------------------------------------------------------------
# Precision, optimizer, one step
# ----------------------------------------------------------------------------------------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_precision(device):
    """Return the fastest precision that `device` has instructions for; never one that it only emulates."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older PyTorch cannot tell
        capabilities = torch.cpu.get_capabilities()
        if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"):
            return "bf16"
    return "fp32"


@dataclass
class Learner:
    """A model with what trains it. Weights are fp32; `dtype` is what convolutions and products compute in."""
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # scales the loss in fp16, whose smallest gradients would vanish; else does nothing
    device: str
    dtype: torch.dtype

    def autocast(self):
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32)


def make_learner(seed, device, precision):
    """Return a Learner around a fresh ResNet: the same weights on every device for the same seed."""
    torch.manual_seed(seed)
    model = ResNet().to(device, memory_format=memory_format(device))
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    biases_and_norms = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": weights}, {"params": biases_and_norms}]  # the first is to decay, once LRMAX is known
    optimizer = torch.optim.Adam(groups, betas=(RECIPE["beta1"][1], RECIPE["beta2"]), eps=RECIPE["epsilon"],
                                 decoupled_weight_decay=True, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    return Learner(model, optimizer, scaler, device, DTYPES[precision])


def train_step(learner, images, labels):
    """Take one step. Returns the loss and the count of correct answers, as tensors: reading them would stall a GPU."""
    with learner.autocast():
        logits = learner.model(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=RECIPE["label_smoothing"])
    learner.optimizer.zero_grad(set_to_none=True)
    learner.scaler.scale(loss).backward()
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def set_rates(optimizer, lr, beta1=None):
    """Give every parameter group this learning rate and, unless None, this first beta."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        if beta1 is not None:
            group["betas"] = (beta1, group["betas"][1])


def weight_decay(lr_max, steps_per_epoch):
    """Return Adam's decoupled weight decay for a memory of RECIPE["memory_epochs"], or 100 steps, at rate `lr_max`.

    A step multiplies a weight by 1 - learning rate x decay. Weights are a moving average of their updates; its length
    in epochs is what suits a data set, whatever rate and batch size (X. Wang and L. Aitchison, arXiv:2405.13698).
    """
    return 1 / (max(RECIPE["memory_epochs"] * steps_per_epoch, MEMORY_FEWEST_STEPS) * lr_max)


class StatusLine:
    """One line on a terminal that is overwritten in place and erased in the end; nothing where output is a file."""

    def __init__(self):
        self.is_terminal = sys.stdout.isatty()
        self.width = 0
        self.shown = time.perf_counter()

    def is_due(self):
        """Tell whether the last `show`, or the making of this line, is longer ago than STATUS_SECONDS."""
        return time.perf_counter() - self.shown > STATUS_SECONDS

    def show(self, text):
        self.shown = time.perf_counter()
        if self.is_terminal:
            print(f"\r{text:<{self.width}}", end="", flush=True)
            self.width = len(text)

    def clear(self):
        if self.width:
            print(f"\r{'':<{self.width}}\r", end="", flush=True)
            self.width = 0


# ----------------------------------------------------------------------------------------------------------------------
# One-cycle
# ----------------------------------------------------------------------------------------------------------------------

def one_cycle(step, total_steps, outer, inner):
    """Return the value at `step` (from 0) of a cycle: linear from `outer` to `inner`, then linear back to `outer`.

    Steps are counted as in `torch.optim.lr_scheduler.OneCycleLR`: the last step of the rise has `inner`, the last step
    of the run has `outer`, and there is no annihilation below it (L. Smith, arXiv:1803.09820, section 4).
    """
    last = total_steps - 1
    peak = RECIPE["peak_fraction"] * total_steps - 1
    height = step / peak if step < peak else (last - step) / (last - peak)
    return outer + (inner - outer) * height


# ----------------------------------------------------------------------------------------------------------------------
# Learning-rate range sweep
# ----------------------------------------------------------------------------------------------------------------------

def sweep_rule():
    """Return in words how `read_sweep` finds both rates."""
    return (f"LRMIN is the first rate by which {RECIPE['sweep_begun']:.0%} of the smoothed loss's fall is done, LRMAX "
            f"{RECIPE['sweep_factor']:g} times the first rate by which {RECIPE['sweep_done']:.0%} of it is done, but "
            f"no rate at which {1 - RECIPE['sweep_done']:.0%} of it is lost again.")


def smooth(losses, steps_per_decade):
    """Return the centred moving average of a list over half a decade of learning rate; it has no lag."""
    half = round(steps_per_decade / 4)
    return [statistics.fmean(losses[max(0, i - half):i + half + 1]) for i in range(len(losses))]


def has_diverged(losses, window):
    """Tell whether the loss, averaged over the last `window` steps, has climbed back by all that it fell."""
    levels = [statistics.fmean(losses[end - window:end]) for end in range(window, len(losses) + 1)]
    if not levels:
        return False
    noise = SWEEP_NOISE * levels[0]  # before the loss first falls, any climb would be more than it fell
    return levels[-1] - min(levels) > max(levels[0] - min(levels), noise)


def read_sweep(lrs, smoothed):
    """Return (lr_min, lr_max) by `sweep_rule`. Raises UserError where the loss never falls."""
    lowest = min(range(len(smoothed)), key=smoothed.__getitem__)
    fall = smoothed[0] - smoothed[lowest]
    if fall <= 0:
        raise UserError("the sweep found no learning rate at which the loss falls.\n"
                        "Give --lr-max and --lr-min to train without it.")
    begun, done = (smoothed[0] - RECIPE[part] * fall for part in ("sweep_begun", "sweep_done"))
    lr_begun, lr_done = (next(lr for lr, loss in zip(lrs, smoothed) if loss <= level) for level in (begun, done))
    lost = (i for i in range(lowest, len(smoothed)) if smoothed[i] > done)
    return lr_begun, min(RECIPE["sweep_factor"] * lr_done, lrs[next(lost, len(smoothed)) - 1])


def sweep_learning_rate(learner, batches, steps):
    """Train while the rate rises exponentially, and read LRMIN and LRMAX off the loss (L. Smith, arXiv:1506.01186).

    Takes one batch of `batches` a step and stops where the loss is NaN or has diverged. Model, optimizer, gradient
    scaler and the global random state are afterwards what they were.
    Returns a dictionary: the lists `lr`, `loss` (of each batch before its step) and `smoothed_loss`, the numbers
    `lr_max` and `lr_min`, and the `rule`.
    """
    model, optimizer, scaler = learner.model, learner.optimizer, learner.scaler
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict(), scaler.state_dict()))
    training = model.training
    model.train()
    start, end = RECIPE["sweep_range"]
    steps_per_decade = (steps - 1) / math.log10(end / start)
    window = max(1, round(steps_per_decade / 2))
    lrs, losses, status = [], [], StatusLine()
    devices = [torch.cuda.current_device()] if learner.device == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            for step, (images, labels) in zip(range(steps), batches):
                lr = start * (end / start) ** (step / max(1, steps - 1))
                set_rates(optimizer, lr)
                loss = train_step(learner, images, labels)[0].item()
                if not math.isfinite(loss):
                    break
                lrs.append(lr)
                losses.append(loss)
                status.show(f"sweep      step {step + 1}/{steps}  learning rate {lr:.1e}  loss {loss:.3f}")
                if has_diverged(losses, window):
                    break
    finally:
        status.clear()
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
        scaler.load_state_dict(before[2])
        optimizer.zero_grad(set_to_none=True)
        model.train(training)
    if not losses:
        raise UserError("the loss of the untrained model is NaN or infinite: the sweep cannot start.")
    smoothed = smooth(losses, steps_per_decade)
    lr_min, lr_max = read_sweep(lrs, smoothed)
    return {"lr": lrs, "loss": losses, "smoothed_loss": smoothed, "lr_max": lr_max, "lr_min": lr_min,
            "rule": sweep_rule()}


# ----------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ----------------------------------------------------------------------------------------------------------------------

def train_epoch(learner, batches, lrs, beta1s, epoch, epochs):
    """Train on every batch, step i at learning rate lrs[i] and first beta beta1s[i].

    Returns `train_loss` and `train_accuracy`, means over the augmented images, `train_seconds` and `images_per_second`.
    Raises Diverged where the loss is not finite: at that step on a CPU, on a GPU with the next status line or after
    the epoch, because asking for a loss more often would keep it waiting.
    """
    learner.model.train()
    status = StatusLine()
    losses, sizes, correct = [], [], 0
    started = time.perf_counter()
    try:
        for lr, beta1, (images, labels) in zip(lrs, beta1s, batches):
            set_rates(learner.optimizer, lr, beta1)
            loss, right = train_step(learner, images, labels)
            losses.append(loss)
            sizes.append(len(labels))
            correct += right
            if learner.device == "cpu" or status.is_due():
                value = loss.item()
                if not math.isfinite(value):
                    break
                status.show(progress(epoch, epochs, len(losses), len(lrs), value, sum(sizes), started))
        step_losses = torch.stack(losses).cpu().double()
        train_seconds = time.perf_counter() - started  # reading the losses waited for the device
    finally:
        status.clear()
    for step, loss in enumerate(step_losses.tolist()):
        if not math.isfinite(loss):
            raise Diverged(epoch, step + 1, lrs[step])
    return {"train_loss": (step_losses @ torch.tensor(sizes, dtype=torch.double)).item() / sum(sizes),
            "train_accuracy": correct.item() / sum(sizes),
            "train_seconds": train_seconds, "images_per_second": sum(sizes) / train_seconds}


def progress(epoch, epochs, step, steps, loss, images, started):
    """Return the text of the status line after `step` of an epoch's `steps`; the time left is that of training."""
    seconds = time.perf_counter() - started
    minutes, seconds_left = divmod(round(seconds / step * (steps * (1 + epochs - epoch) - step)), 60)
    return (f"epoch {epoch}/{epochs}  batch {step}/{steps}  loss {loss:.3f}  {images / seconds:,.0f} images/s  "
            f"{minutes}:{seconds_left:02} left")


@torch.inference_mode()
def predict(learner, images, mirror=False):
    """Return the logits (N, 10), fp32, of prepared images (N, 3, 32, 32), or of their mirror images."""
    learner.model.eval()
    logits = []
    for batch in images.split(EVAL_BATCH_SIZE):
        with learner.autocast():
            logits.append(learner.model(batch.flip(-1) if mirror else batch).float())
    return torch.cat(logits)


def accuracy(logits, labels):
    """Return the fraction of the rows of logits (N, 10) whose largest is that of the label (N,)."""
    return (logits.argmax(1) == labels).sum().item() / len(labels)


def evaluate(learner, test):
    """Return `test_loss` (the cross-entropy trained on, smoothing included), `test_accuracy` and `test_seconds`."""
    started = time.perf_counter()
    logits = predict(learner, test.images)
    loss = F.cross_entropy(logits, test.labels, label_smoothing=RECIPE["label_smoothing"]).item()
    return {"test_loss": loss, "test_accuracy": accuracy(logits, test.labels),
            "test_seconds": time.perf_counter() - started}


# ----------------------------------------------------------------------------------------------------------------------
# Files: the report (JSON) and the checkpoint
# ----------------------------------------------------------------------------------------------------------------------

def replace_file(path, write):
    """Let `write(temporary path)` make a file and move it to `path` at once: a reader never sees half of it."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content):
    """Write strict JSON (no NaN) so that the file at `path` is whole at every moment."""
    replace_file(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n"))


def check_writable(path):
    """Make the folder of `path`. Raises UserError where no file can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError("it is a folder")
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}).\nChoose another place for it.") from None


def new_output(device):
    """Return the path of a new file in results/."""
    return Path("results") / f"{datetime.now():%Y%m%d-%H%M%S-%f}-{device}.json"  # microseconds: runs may start together


def for_seed(path, seed, runs):
    """Return the path of one run's file: with the seed in its name where there are several runs."""
    return path.with_name(f"{path.stem}-seed{seed}{path.suffix}") if path and runs > 1 else path


def settings_of(options, seed):
    """Return what determines the result of a run, as a dictionary: two runs may share a checkpoint if it is equal."""
    precision = choose_precision(options.device) if options.precision == "auto" else options.precision
    return {"epochs": options.epochs, "batch_size": options.batch_size, "lr_max": options.lr_max,
            "lr_min": options.lr_min, "seed": seed, "subset": options.subset, "holdout": options.holdout,
            "device": options.device, "precision": precision,
            "recipe": {name: list(value) if isinstance(value, tuple) else value for name, value in RECIPE.items()}}


def describe_environment(device, precision):
    """Return the versions and the hardware of a run, as a dictionary."""
    if device == "cuda":
        device_name = torch.cuda.get_device_name()
    else:
        capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        device_name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__,
                "torchvision": torchvision.__version__, "numpy": np.__version__}
    return {**{name: str(version) for name, version in versions.items()},  # PyTorch's is no plain string
            "device": device, "device_name": device_name, "precision": precision, "threads": torch.get_num_threads()}


def new_report(options, settings, output, checkpoint):
    """Return the report of a run that has not begun."""
    config = {**settings, "peak_epoch": RECIPE["peak_fraction"] * options.epochs, "runs": options.runs,
              "data_dir": str(options.data_dir), "output": str(output),
              "checkpoint": checkpoint and str(checkpoint), "figures": not options.no_figures}
    return {"config": config, "environment": describe_environment(options.device, settings["precision"]),
            "data": None, "parameters": None, "lr_sweep": None, "epochs": [],
            "summary": {"status": "running", "tta_test_accuracy": None, "preprocess_seconds": 0.0,
                        "sweep_seconds": 0.0, "total_seconds": 0.0}}


def summarise(report, status):
    """Bring the summary of a report up to date with its epochs."""
    epochs, summary = report["epochs"], report["summary"]
    best = max(epochs, key=lambda row: row["test_accuracy"], default=None)
    first = {f"{goal:.2f}": next((row for row in epochs if row["test_accuracy"] >= goal), None) for goal in MILESTONES}
    summary.update(
        status=status,
        final_test_accuracy=epochs[-1]["test_accuracy"] if epochs and status == "complete" else None,
        best_test_accuracy=best and best["test_accuracy"], best_epoch=best and best["epoch"],
        train_seconds=sum(row["train_seconds"] for row in epochs),
        seconds_to={goal: row and row["elapsed_seconds"] for goal, row in first.items()},
        epochs_to={goal: row and row["epoch"] for goal, row in first.items()})


def save_checkpoint(path, learner, settings, report):
    """Write all that a run needs to go on, so that the file at `path` is whole at every moment."""
    state = {"settings": settings, "report": report, "model": learner.model.state_dict(),
             "optimizer": learner.optimizer.state_dict(), "scaler": learner.scaler.state_dict()}
    try:
        replace_file(path, lambda temporary: torch.save(state, temporary))
    except RuntimeError as error:  # what PyTorch makes of a full disk
        raise UserError(f"cannot write {path} ({error}).") from None


def load_checkpoint(path, learner, settings):
    """Bring `learner` to the state saved at `path` and return the report so far.

    Raises UserError where the file is no checkpoint, or one of a run with other settings.
    """
    advice = "Delete it or choose another --checkpoint."
    try:
        state = torch.load(path, map_location=learner.device, weights_only=True)
        saved, now = ({**given, **given["recipe"], "recipe": None} for given in (state["settings"], settings))
        differences = [f"{name} {saved.get(name)}, not {now.get(name)}" for name in sorted(saved.keys() | now.keys())
                       if saved.get(name) != now.get(name)]
        if not differences:
            learner.model.load_state_dict(state["model"])
            learner.optimizer.load_state_dict(state["optimizer"])
            learner.scaler.load_state_dict(state["scaler"])
            return state["report"]
    except Exception as error:  # what a damaged file raises is of many kinds
        raise UserError(f"{path} is not a checkpoint of this script ({type(error).__name__}).\n{advice}") from None
    raise UserError(f"{path} is of a run with {'; '.join(differences)}.\n{advice}")


# ----------------------------------------------------------------------------------------------------------------------
# Figures: beside the JSON, where matplotlib can be imported
# ----------------------------------------------------------------------------------------------------------------------

def in_notebook():
    """Tell whether this code was pasted into a notebook cell: IPython is there and no file is."""
    return hasattr(builtins, "__IPYTHON__") and "__file__" not in globals()


def to_pixels(images, mean, std):
    """Turn normalised images (N, 3, H, W) back into colours (N, H, W, 3) from 0 to 1, a NumPy array."""
    images = images.float().cpu() * std.view(1, -1, 1, 1) + mean.view(1, -1, 1, 1)
    return images.clamp(0, 1).permute(0, 2, 3, 1).numpy()


def plot_sweep(figure, sweep, lr_min, lr_max):
    """Draw the loss over the learning rate, with both rates that training took marked."""
    axes = figure.subplots()
    axes.semilogx(sweep["lr"], sweep["loss"], color="tab:blue", alpha=0.3, label="loss of each step")
    axes.semilogx(sweep["lr"], sweep["smoothed_loss"], color="tab:blue", label="smoothed over half a decade")
    axes.axvline(lr_min, color="tab:green", linestyle="--", label=f"LRMIN {lr_min:.2g}")
    axes.axvline(lr_max, color="tab:red", linestyle="--", label=f"LRMAX {lr_max:.2g}")
    axes.set_ylim(top=min(axes.get_ylim()[1], 2 * sweep["smoothed_loss"][0]))  # a diverged end would flatten the rest
    axes.legend(loc="upper center")
    axes.set(title="Learning-rate range sweep", xlabel="learning rate (log scale)", ylabel="training loss")


def plot_curves(figure, rows, evaluated_on):
    """Draw loss and accuracy over the epochs, for training and for evaluation."""
    epochs = [row["epoch"] for row in rows]
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    for name, label in (("train", "training images, augmented"), ("test", evaluated_on)):
        loss_axes.plot(epochs, [row[f"{name}_loss"] for row in rows], marker=".", label=label)
        accuracy_axes.plot(epochs, [100 * row[f"{name}_accuracy"] for row in rows], marker=".", label=label)
    accuracy_axes.axhline(100 * MILESTONES[-1], color="grey", linestyle=":", label=f"{MILESTONES[-1]:.0%}")
    loss_axes.set(title="Loss", xlabel="epoch", ylabel=f"cross-entropy, smoothing {RECIPE['label_smoothing']:g}")
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


def plot_images(figure, pixels, captions, columns, title):
    """Draw images (N, H, W, 3) in a grid, each under its caption."""
    figure.suptitle(title)
    grid = figure.subplots(math.ceil(len(pixels) / columns), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, caption in zip(grid.flat, pixels, captions):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=8)


def draw_figures(path, report, lrs, learner, train, test, mean, std, classes):
    """Write the figures of a finished run beside its JSON, and show them in a notebook. Returns their paths."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("figures    skipped: matplotlib is not installed (pip install matplotlib)")
        return []

    config, drawn = report["config"], []

    def draw(name, size, plot, *content):
        figure = Figure(figsize=size, dpi=120, layout="constrained")
        plot(figure, *content)
        drawn.append(path.with_name(f"{path.stem}-{name}.png"))
        figure.savefig(drawn[-1])

    if report["lr_sweep"]:
        draw("sweep", (7, 4.5), plot_sweep, report["lr_sweep"], config["lr_min"], config["lr_max"])
    if report["epochs"]:
        draw("curves", (11, 4.5), plot_curves, report["epochs"], report["data"]["evaluated_on"])
        draw("schedule", (7, 4), plot_schedule, lrs, len(report["epochs"]))
    images, labels = next(augmented_batches(train, 32, config["seed"], 1))
    draw("augmented", (9, 5.8), plot_images, to_pixels(images, mean, std),
         [classes[label] for label in labels.tolist()], 8, "Training images after crop, flip and cutout")

    if report["epochs"]:
        confidence, predicted = predict(learner, test.images).softmax(1).max(1)
        wrong = (predicted != test.labels).nonzero().flatten()[:10]
        captions = [f"{classes[test.labels[i]]}\ntaken for {classes[predicted[i]]}\n"
                    f"with probability {confidence[i]:.2f}" for i in wrong.tolist()]
        if captions:
            draw("misclassified", (9, 5), plot_images, to_pixels(test.images[wrong], mean, std), captions,
                 5, f"The first misclassified {report['data']['evaluated_on']}: true class, predicted class")

    if in_notebook():
        from IPython.display import Image, display
        for figure_path in drawn:
            display(Image(filename=str(figure_path)))
    return drawn


# ----------------------------------------------------------------------------------------------------------------------
# The run
# ----------------------------------------------------------------------------------------------------------------------

HEADINGS = ("epoch", "lr", "train loss", "train acc", "test loss", "test acc", "train s", "test s", "images/s",
            "total s")


def print_table(rows):
    """Print HEADINGS and the rows of the epochs that a checkpoint brought."""
    print("  ".join(heading.rjust(7) for heading in HEADINGS), flush=True)
    for row in rows:
        print_row(row)


def print_row(row):
    """Print one epoch under HEADINGS, each column as wide as its heading or 7 characters."""
    cells = (f"{row['epoch']}", f"{row['lr']:.5f}", f"{row['train_loss']:.4f}", f"{row['train_accuracy']:.2%}",
             f"{row['test_loss']:.4f}", f"{row['test_accuracy']:.2%}", f"{row['train_seconds']:.1f}",
             f"{row['test_seconds']:.1f}", f"{row['images_per_second']:,.0f}", f"{row['elapsed_seconds']:.1f}")
    print("  ".join(cell.rjust(max(7, len(heading))) for cell, heading in zip(cells, HEADINGS)), flush=True)


def select_images(options, train, test):
    """Apply --subset and --holdout. Returns the images to train on, those to evaluate on, and a name for the latter."""
    if options.subset:
        train = Split(*(values[:options.subset] for values in train))
        test = Split(*(values[:options.subset // 5] for values in test))
    if not options.holdout:
        return train, test, "test images"
    return (Split(*(values[:-options.holdout] for values in train)),
            Split(*(values[-options.holdout:] for values in train)), "held-out training images")


def print_heading(report):
    """Print what is being run, and on what."""
    data, environment = report["data"], report["environment"]
    print(f"model      custom ResNet, {report['parameters']:,} parameters, seed {report['config']['seed']}\n"
          f"device     {environment['device']} ({environment['device_name']}), {environment['precision']}, "
          f"{environment['threads']} CPU threads, PyTorch {environment['torch']}\n"
          f"data       {data['train_images']:,} training images, {data['test_images']:,} {data['evaluated_on']}\n"
          f"report     {report['config']['output']}", flush=True)


def print_summary(report):
    """Print how a run ended."""
    summary = report["summary"]
    print(f"final      {summary['final_test_accuracy']:.2%} of the {report['data']['evaluated_on']} "
          f"({summary['tta_test_accuracy']:.2%} with the mirror image averaged in)\n"
          f"time       {summary['train_seconds']:.1f} s of training, {summary['total_seconds']:.1f} s in all")
    for goal, seconds in summary["seconds_to"].items():
        if seconds is not None:
            print(f"to {float(goal):.0%}     epoch {summary['epochs_to'][goal]}, {seconds:.1f} s")


def find_rates(report, learner, train, steps_per_epoch):
    """Set the lr_max and lr_min of the report's config where they were not given, by a sweep, which it records."""
    config = report["config"]
    if None in (config["lr_max"], config["lr_min"]):
        started = time.perf_counter()
        steps = max(steps_per_epoch, min(RECIPE["sweep_steps"], 2 * steps_per_epoch), SWEEP_FEWEST_STEPS)
        batches = (batch for epoch in itertools.count(SWEEP_EPOCH)
                   for batch in augmented_batches(train, config["batch_size"], config["seed"], epoch))
        sweep = report["lr_sweep"] = sweep_learning_rate(learner, batches, steps)
        config["lr_max"] = config["lr_max"] or sweep["lr_max"]
        config["lr_min"] = config["lr_min"] or sweep["lr_min"]
        report["summary"]["sweep_seconds"] = time.perf_counter() - started
        print(f"sweep      {len(sweep['lr'])} steps in {report['summary']['sweep_seconds']:.1f} s: the loss fell from "
              f"{sweep['smoothed_loss'][0]:.2f} to {min(sweep['smoothed_loss']):.2f}", flush=True)
    if config["lr_min"] > config["lr_max"]:
        raise UserError(f"LRMIN {config['lr_min']:.2g} is above LRMAX {config['lr_max']:.2g}: the sweep found the one, "
                        f"the other was given.\nGive both --lr-max and --lr-min.")


def plan_cycle(config, steps_per_epoch):
    """Return the learning rate and the first beta of every step of the run, two lists."""
    total_steps = config["epochs"] * steps_per_epoch
    lrs = [one_cycle(step, total_steps, config["lr_min"], config["lr_max"]) for step in range(total_steps)]
    beta1s = [one_cycle(step, total_steps, *RECIPE["beta1"]) for step in range(total_steps)]
    return lrs, beta1s


def begin(options, seed, output):
    """Return the settings, the learner and the report of a run: new ones, or as its checkpoint has them."""
    settings = settings_of(options, seed)
    learner = make_learner(seed, options.device, settings["precision"])
    checkpoint = for_seed(options.checkpoint, seed, options.runs)
    report = new_report(options, settings, output, checkpoint)
    if checkpoint and checkpoint.exists():
        saved = load_checkpoint(checkpoint, learner, settings)
        report.update({name: saved[name] for name in ("lr_sweep", "epochs", "summary")})
        report["config"].update({name: saved["config"][name] for name in ("lr_max", "lr_min")})
        if options.output is None:
            report["config"]["output"] = saved["config"]["output"]  # go on in the same file
    report["parameters"] = sum(parameter.numel() for parameter in learner.model.parameters())
    return settings, learner, report


def train_once(options, seed, data, output):
    """Do one run: prepare the data, find the rates, train, evaluate, and write the report to `output`. Returns it.

    Raises Diverged, UserError, KeyboardInterrupt and what PyTorch raises; the report on disk then says where it stood.
    """
    settings, learner, report = begin(options, seed, output)
    config, summary, rows = report["config"], report["summary"], report["epochs"]
    started = time.perf_counter() - summary["total_seconds"]
    output, checkpoint = Path(config["output"]), config["checkpoint"] and Path(config["checkpoint"])

    train, test, evaluated_on = select_images(options, *data[:2])
    mean, std = channel_statistics(train.images)
    report["data"] = {"train_images": len(train.labels), "test_images": len(test.labels), "mean": mean.tolist(),
                      "std": std.tolist(), "evaluated_on": evaluated_on}
    steps_per_epoch = math.ceil(len(train.labels) / options.batch_size)
    print_heading(report)

    def save(status):
        summary["total_seconds"] = time.perf_counter() - started
        summarise(report, status)
        write_json(output, report)

    try:
        save("running")
        train = prepare(train, mean, std, options.device, learner.dtype, RECIPE["padding"])
        test = prepare(test, mean, std, options.device, learner.dtype)
        if not rows:
            whiten_first_layer(learner.model, train.images)
            summary["preprocess_seconds"] = time.perf_counter() - started
            find_rates(report, learner, train, steps_per_epoch)
        config["weight_decay"] = weight_decay(config["lr_max"], steps_per_epoch)
        learner.optimizer.param_groups[0]["weight_decay"] = config["weight_decay"]
        save("running")
        peak = f" at epoch {config['peak_epoch']:g} of {options.epochs}" if options.epochs else ""
        print(f"rates      LRMIN {config['lr_min']:.3g}, LRMAX {config['lr_max']:.3g}{peak}, "
              f"weight decay {config['weight_decay']:.3g}")
        if options.epochs:
            print_table(rows)
        lrs, beta1s = plan_cycle(config, steps_per_epoch)
        for epoch in range(len(rows) + 1, options.epochs + 1):
            steps = slice((epoch - 1) * steps_per_epoch, epoch * steps_per_epoch)
            batches = augmented_batches(train, options.batch_size, seed, epoch)
            trained = train_epoch(learner, batches, lrs[steps], beta1s[steps], epoch, options.epochs)
            evaluated = evaluate(learner, test)
            if not math.isfinite(evaluated["test_loss"]):
                raise Diverged(epoch, steps_per_epoch, lrs[steps][-1])
            before = rows[-1]["elapsed_seconds"] if rows else summary["preprocess_seconds"]
            rows.append({"epoch": epoch, "lr": lrs[steps][-1], **trained, **evaluated,
                         "elapsed_seconds": before + trained["train_seconds"]})
            print_row(rows[-1])
            save("running")
            if checkpoint:
                save_checkpoint(checkpoint, learner, settings, report)
        if rows:
            both_views = predict(learner, test.images) + predict(learner, test.images, mirror=True)
            summary["tta_test_accuracy"] = accuracy(both_views, test.labels)
        save("complete")
    except Diverged as divergence:
        summary["diverged"] = divergence.where
        save("diverged")
        raise
    except BaseException:
        save("interrupted")
        raise

    if rows:
        print_summary(report)
    if not options.no_figures:
        drawn = draw_figures(output, report, lrs, learner, train, test, mean, std, data[2])
        print("".join(f"figure     {path}\n" for path in drawn), end="", flush=True)
    return report


def report_runs(reports, path):
    """Print and write to `path` the statistics of several runs: the sample standard deviation, and counts."""
    configs, summaries = [report["config"] for report in reports], [report["summary"] for report in reports]
    statistic = {"runs": len(reports), "config": {**configs[0], "output": str(path)},
                 "environment": reports[0]["environment"]}
    for name in ("seed", "lr_max", "lr_min"):
        statistic[name] = [config[name] for config in configs]
    for name in ("final_test_accuracy", "tta_test_accuracy", "train_seconds", "epochs_to"):
        statistic[name] = [summary[name] for summary in summaries]
    print(f"{f'{len(reports)} runs':<11}LRMAX {min(statistic['lr_max']):.3g} to {max(statistic['lr_max']):.3g}, "
          f"LRMIN {min(statistic['lr_min']):.3g} to {max(statistic['lr_min']):.3g}")
    if configs[0]["epochs"]:
        accuracies = statistic["final_test_accuracy"]
        statistic.update(mean=statistics.fmean(accuracies), std=statistics.stdev(accuracies), min=min(accuracies),
                         max=max(accuracies), goal=MILESTONES[-1],
                         reached_goal=sum(value >= MILESTONES[-1] for value in accuracies))
        print(f"{'':<11}mean {statistic['mean']:.2%}, standard deviation {statistic['std']:.2%}, "
              f"min {statistic['min']:.2%}, max {statistic['max']:.2%}; "
              f"{statistic['reached_goal']} of {len(reports)} reached {MILESTONES[-1]:.0%}")
    write_json(path, statistic)
    print(f"report     {path}")


def keep_freed_memory():
    """Let the C library keep the memory of freed tensors for the next ones, on Linux; elsewhere do nothing.

    Left to itself, glibc hands a step's activations back to the system and gets them anew, page by page and zeroed, in
    the next step: a fifth of the time of a step on a CPU. The price is that the process stays at its largest size.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX in malloc.h
        ctypes.CDLL(None).mallopt(trim_threshold, -1)  # never give the end of the heap back
        ctypes.CDLL(None).mallopt(mmap_max, 0)  # take large blocks from the heap too


def main(argv=None):
    """Run the script with the given arguments (default: the command line's). Returns the exit code."""
    options = parse_arguments(argv)
    defaults = dict(RECIPE)
    for name, value in options.set:
        print(f"recipe     {name} {value}, not {RECIPE[name]}")
        RECIPE[name] = value
    try:
        output = options.output or new_output(options.device)
        for path in filter(None, [output, options.checkpoint]):
            check_writable(path)
        torch.backends.cudnn.benchmark = True  # shapes repeat: let cuDNN look for its fastest kernels
        if options.device == "cpu":
            keep_freed_memory()
        data = load_cifar10(options.data_dir)
        reports = []
        for seed in range(options.seed, options.seed + options.runs):
            reports.append(train_once(options, seed, data, for_seed(output, seed, options.runs)))
        if options.runs > 1:
            report_runs(reports, output)
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (UserError, Diverged, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "out of memory" not in str(error).lower():
            raise
        print(f"error: out of memory on {options.device}: try a smaller --batch-size than {options.batch_size}.",
              file=sys.stderr)
    finally:
        RECIPE.update(defaults)  # the next call in a notebook starts from them
    return 1


if __name__ == "__main__":
    if in_notebook():
        main([])  # the kernel's own sys.argv is not meant for this; for other options call main(["--epochs", "10"])
    else:
        sys.exit(main())
