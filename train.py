# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.7", "torchvision>=0.22", "numpy", "matplotlib"]
# ///
"""Train a small residual network on CIFAR-10 under the one-cycle policy.

    python train.py --epochs 24 --batch-size 512

How to read this file: it has two halves. The method comes first, then the program around
it: command line, files, screen, figures, and `main`. The method in calls:

    start_run                       a Run: data on the device, network and optimizer
        ResNet
        make_optimizer              Adam, or Muon and Adam
    find_rates                      the sweep, which finds the learning rates
    train_epochs                    a row of metrics for each epoch
        train_epoch
            augmented_batches       shuffle, crop, flip, cutout
            scheduled_lr_and_beta1  the one-cycle policy, or a schedule of your own
            train_step              one optimizer step
            update_average          the moving average of the weights
        evaluate_run

The program in calls:

    main                            options and data, then for each seed:
        train_once                  start_run; a Recorder for report and checkpoint
            train_and_record        find_rates and train_epochs
            finish_run              result, files, figures

After `import train`, your own experiment can call the method, and `main`, too.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import gc
import io
import itertools
import json
import math
import numbers
import os
import platform
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from filelock import FileLock  # PyTorch requires it, so it is there
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

if torch.__version__ < (2, 7):  # a TorchVersion, which compares with tuples
    raise ImportError(f"train.py needs PyTorch 2.7 or newer, this is {torch.__version__}")

# ==== THE METHOD =======================================================================

# ---- Recipe: each field becomes an option of the command line -------------------------

MAX_EPOCHS = 100_000  # below SWEEP_EPOCH


def recipe_field(default, allowed, help):
    """Return a field of Recipe; `allowed` is as in `check_value`, --help shows `help`."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "help": help})


def check_value(name, value, allowed):
    """Raise ValueError with a sentence about `name`, unless `value` is allowed.

    `allowed` holds the names, or the lowest and highest number. Bounds that are written
    as 0 and 9 allow integers alone, 0.0 and 9.0 all numbers between them.
    """
    kind = type(allowed[0])
    if kind is str:
        is_allowed = value in allowed
        wanted = f"one of {', '.join(allowed)}"
    else:
        lowest, highest = allowed
        number_type = numbers.Integral if kind is int else numbers.Real
        is_allowed = isinstance(value, number_type) and lowest <= value <= highest
        kind_of_number = "an integer" if kind is int else "a number"
        wanted = f"{kind_of_number} from {lowest} to {highest}"
    if not is_allowed:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The constants (hyperparameters) of a run.

    `Recipe()` is the tuned recipe; RECIPES has the others. `Recipe(label_smoothing=0.1)`
    changes one constant. A value that is not allowed raises ValueError. The learning rate
    rises from LRMIN to LRMAX, its peak, and falls back. Both are found by a sweep, so
    they are no constants of the recipe, see `Rates`.
    """
    epochs: int = recipe_field(24, (0, MAX_EPOCHS), "passes over the training images")
    batch_size: int = recipe_field(
        0, (0, 50_000), "images in a step; 0 means 512, or fewer for few images")
    optimizer: str = recipe_field(
        "adam", ("adam", "muon"), "muon: Muon for the convolutions, Adam for the rest")
    muon_lr_factor: float = recipe_field(
        5 / 3, (1e-6, 1e6), "with muon: Muon's learning rate is Adam's times this")
    # For the first convolution, Muon seems better in 24 epochs. In 6, our one run with Muon
    # for it ended lower than those with Adam.
    first_convolution: str = recipe_field(
        "muon", ("muon", "adam"), "with muon: the optimizer of the first convolution")
    peak_fraction: float = recipe_field(
        5 / 24, (0.0, 0.99), "part of the run before the peak")
    annihilation: float = recipe_field(
        1.0, (1.0, 1e9), "the last learning rate is LRMIN / this")
    # Adam's first beta moves against the learning rate. At high rates, less momentum keeps
    # the training stable (L. Smith, arXiv:1803.09820, section 4.3).
    beta1: float = recipe_field(0.95, (0.0, 0.9999), "Adam's first beta at LRMIN")
    beta1_peak: float = recipe_field(0.85, (0.0, 0.9999), "Adam's first beta at LRMAX")
    beta2: float = recipe_field(0.999, (0.0, 0.999999), "Adam's second beta")
    # Adam divides the mean gradient by (root of its mean square) + epsilon. 0.01 is larger
    # than most of these roots, so Adam moves the weights almost as SGD with momentum would.
    epsilon: float = recipe_field(0.01, (1e-12, 1e3), "Adam's epsilon")
    # Weight decay is given as a time: at LRMAX, decay alone shrinks a weight to 1/e in
    # this many epochs. The same time suits all batch sizes and learning rates.
    decay_epochs: float = recipe_field(
        5.0, (0.0, 1e5), "epochs at LRMAX in which weight decay shrinks a weight to 1/e; "
        "0: no decay")
    l2: float = recipe_field(0.0, (0.0, 1e3), "Adam's L2 term, in place of decay")
    label_smoothing: float = recipe_field(
        0.2, (0.0, 0.99), "share spread over all classes")
    # The weights are noisy while the learning rate is high. Their exponential moving
    # average (EMA) is not.
    ema_epochs: float = recipe_field(
        0.5, (0.0, 1e5), "epochs over which the EMA of the weights averages; 0: no EMA")
    # A learning rate that suits the convolutions is too large for the last layer. Smaller
    # logits make the steps of this layer change the output less.
    logit_scale: float = recipe_field(
        0.125, (1e-6, 1e6), "the logits are multiplied by this")
    initialization: str = recipe_field(
        "identity", ("identity", "pytorch"),
        "identity: the first layer whitens, the others pass their input on")
    padding: int = recipe_field(4, (0, 16), "pixels on each side, before the random crop")
    padding_mode: str = recipe_field(
        "reflect", ("reflect", "constant"), "fills the padding")
    flips: str = recipe_field(
        "alternating", ("alternating", "random", "none"), "horizontal flips")
    cutout: int = recipe_field(8, (0, 31), "side of the blanked square, in pixels")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            check_value(field.name, value, field.metadata["allowed"])
            # NumPy's numbers become Python's, and 1 becomes 1.0 where the default is a
            # float. The class is frozen, so a plain assignment would fail.
            object.__setattr__(self, field.name, type(field.default)(value))
        if self.batch_size == 1:
            raise ValueError("batch_size must be 0 or at least 2, got 1")
        if self.optimizer == "muon" and self.l2 > 0:
            raise ValueError("l2 must be 0 with optimizer muon, which has no L2 term")


# "fast" shows each image only 6 times, so it augments less, and its EMA is shorter.
# "plain" is the recipe of a course, The School of AI. Where the course names no value,
# "plain" mostly has PyTorch's default.
RECIPES = {
    "tuned": Recipe(),
    "fast": Recipe(epochs=6, optimizer="muon", first_convolution="adam", padding=2, cutout=0,
                   ema_epochs=0.25),
    "best": Recipe(optimizer="muon", muon_lr_factor=1.2, label_smoothing=0.1),
    "plain": Recipe(epsilon=1e-8, decay_epochs=0, label_smoothing=0, ema_epochs=0,
                    logit_scale=1, initialization="pytorch", padding_mode="constant",
                    flips="random"),
}


def fill_in_batch_size(recipe, image_count):
    """Return the recipe with a batch size: its own, or if that is 0, one for `image_count`.

    Few images get smaller batches. Else an epoch would have few steps and teach little.
    """
    if recipe.batch_size:
        return recipe
    batch_size = min(512, max(16, image_count // 32))
    return dataclasses.replace(recipe, batch_size=batch_size)


# ---- Errors and warnings --------------------------------------------------------------

class UserError(RuntimeError):
    """A failure whose message says what happened and what to do next."""


class Diverged(UserError):
    """The loss became NaN or infinite."""


def is_out_of_memory(error):
    """Tell whether an error of PyTorch or Python says that there is no memory left."""
    text = str(error).lower()
    phrases = ("out of memory", "can't allocate memory",  # GPUs, Linux
               "not enough memory", "alloc_failed")  # Windows, cuBLAS
    return isinstance(error, MemoryError) or any(phrase in text for phrase in phrases)


class UncertainRates(UserWarning):
    """The sweep found learning rates, but they may be far from the best."""


# ---- Data: the whole data set on the device -------------------------------------------

# The data set is small, so it lies on the device as one tensor. A batch then costs a few
# tensor operations there, while a DataLoader would load and augment image after image.

# Code that was pasted into a notebook may have no __file__. It looks in the notebook's
# folder.
SCRIPT = Path(globals().get("__file__", "train.py")).resolve()
SAMPLE = SCRIPT.parent / "data" / "sample.npz"
SAMPLE_IMAGES = 2000  # for training, and 400 for tests


class Split(NamedTuple):
    """Images (N, C, H, W) and their labels (N,), two tensors on one device."""
    images: torch.Tensor
    labels: torch.Tensor


def make_split(images, labels):
    """Return a Split of an array of images (N, H, W, C) and their labels (N,).

    CIFAR10 and CIFAR100 of torchvision have this form: `dataset.data, dataset.targets`.
    Raise ValueError for images of another form.
    """
    if not isinstance(images, np.ndarray) or images.ndim != 4:
        got = type(images).__name__
        if hasattr(images, "shape"):
            got += f" {tuple(images.shape)}"
        raise ValueError(f"images must be a NumPy array (N, H, W, C), got {got}")
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Split(images, torch.as_tensor(labels))


def take_images(split, chosen):
    """Return a part of a Split; `chosen` is a slice."""
    return Split(split.images[chosen], split.labels[chosen])


def load_cifar10(data_dir):
    """Return CIFAR-10's training split, test split and class names; download it if needed.

    `data_dir` is the folder that has cifar-10-batches-py, or this folder itself. The
    images are uint8 (N, 3, 32, 32), on the CPU. Raise UserError if the download fails.
    (A. Krizhevsky, Learning Multiple Layers of Features, 2009.)
    """
    data_dir = Path(data_dir).expanduser()
    if data_dir.name == CIFAR10.base_folder:
        data_dir = data_dir.parent
    try:
        return read_cifar10(data_dir)
    except RuntimeError:  # a file is missing or damaged
        return download_cifar10(data_dir)


def read_cifar10(data_dir):
    """Do what `load_cifar10` does, or raise RuntimeError if a file is missing or damaged."""
    training = CIFAR10(data_dir, train=True)  # checks the MD5 of each file
    test = CIFAR10(data_dir, train=False)
    return (make_split(training.data, training.targets),
            make_split(test.data, test.targets), training.classes)


def download_cifar10(data_dir):
    """Bring CIFAR-10 into `data_dir` and read it. Raise UserError if that fails."""
    archive = data_dir / CIFAR10.filename
    timeout = socket.getdefaulttimeout()
    # Without a timeout, a silent server would be waited for without an end.
    socket.setdefaulttimeout(30)
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # A second run waits here until the first one has the data.
        with FileLock(data_dir / "cifar-10.lock"):
            with contextlib.suppress(RuntimeError):  # the first one may have brought it
                return read_cifar10(data_dir)
            if not check_integrity(str(archive), CIFAR10.tgz_md5):
                print(f"download CIFAR-10 (170 MB) from {CIFAR10.url} to {data_dir}",
                      flush=True)
            # CIFAR10(download=True) would not mend a damaged batches.meta.
            download_and_extract_archive(CIFAR10.url, str(data_dir), filename=archive.name,
                                         md5=CIFAR10.tgz_md5)
            return read_cifar10(data_dir)
    except Exception as error:  # network, archive and disk raise errors of many types
        advice = (f"Put a whole copy of {CIFAR10.url} at {archive},\n"
                  "or name the folder that has CIFAR-10 with --data-dir.")
        if SAMPLE.exists():
            advice += "\nA first look needs no download: python train.py --subset"
        raise UserError(f"could not get CIFAR-10 ({error}).\n{advice}") from None
    finally:
        socket.setdefaulttimeout(timeout)


def load_sample():
    """Return the sample: the first 2,000 training and 400 test images, and class names."""
    with np.load(SAMPLE) as sample:
        training = make_split(sample["train_images"], sample["train_labels"].astype(np.int64))
        test = make_split(sample["test_images"], sample["test_labels"].astype(np.int64))
        return training, test, sample["classes"].tolist()


def per_channel(values, images):
    """Return values (C,) as (1, C, 1, 1), on the device of images (N, C, H, W)."""
    return values.to(images.device).view(1, -1, 1, 1)


def normalize_images(images, mean, std):
    """Return uint8 images (N, C, H, W) as floats: (images / 255 - mean) / std."""
    if not isinstance(images, torch.Tensor) or images.dtype != torch.uint8:
        raise ValueError("images must be a tensor (N, C, H, W) of uint8, from 0 to 255")
    mean = per_channel(mean, images)
    std = per_channel(std, images)
    # In place, because a whole data set may need a large part of the memory.
    return images.float().div_(255).sub_(mean).div_(std)


def restore_images(images, mean, std):
    """Return normalized images (N, C, H, W) as uint8: `normalize_images`, undone."""
    mean = per_channel(mean, images)
    std = per_channel(std, images)
    return ((images.float() * std + mean) * 255).round().clamp(0, 255).byte()


def fast_layout(device):
    """Return the layout of images and weights that is fast and correct on `device`."""
    # Many versions of PyTorch get channels-last gradients on Apple GPUs wrong:
    # https://github.com/pytorch/pytorch/issues/175189
    is_apple_gpu = torch.device(device).type == "mps"
    return torch.contiguous_format if is_apple_gpu else torch.channels_last


def prepare_images(split, mean, std, device, dtype, padding=0, padding_mode="constant"):
    """Move a Split to `device`; normalize its images and pad each side by `padding`."""
    images = normalize_images(split.images.to(device), mean, std).to(dtype)
    if padding:
        images = F.pad(images, (padding,) * 4, mode=padding_mode)
    images = images.contiguous(memory_format=fast_layout(device))
    return Split(images, split.labels.to(device).long())


def check_split(name, split, num_classes):
    """Raise ValueError with the reason if a Split cannot be trained on."""
    images, labels = split
    reason = None
    if not isinstance(images, torch.Tensor) or not isinstance(labels, torch.Tensor):
        reason = "images and labels must be tensors. make_split makes them of arrays"
    elif images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        shape = tuple(images.shape)
        reason = f"images must be uint8 (N, C, H, W), one or more, got {images.dtype} {shape}"
    elif labels.shape != images.shape[:1]:
        reason = (f"labels must be ({len(images)},), one for each image, "
                  f"got {tuple(labels.shape)}")
    elif labels.is_floating_point():
        reason = "labels must be whole numbers"
    elif labels.long().min() < 0 or labels.long().max() >= num_classes:
        reason = (f"labels must be from 0 to {num_classes - 1}, because num_classes is "
                  f"{num_classes}")
    if reason:
        raise ValueError(f"{name} split: {reason}")


def count_steps(image_count, batch_size):
    """Return the number of steps in an epoch.

    The last batch has the images that are left. If only one is left, it joins the batch
    before, because BatchNorm needs the statistics of several images.
    """
    return max(1, math.ceil((image_count - 1) / batch_size))


# ---- Augmentation: tensor operations on a batch, with random draws for each image -----

# Each epoch of each seed has random numbers of its own. Epoch 0 is for draws that belong
# to no epoch, such as which half of the images is mirrored first. 1 to MAX_EPOCHS are for
# training, and the sweep begins at SWEEP_EPOCH. So training shows none of the sweep's
# batches.
SWEEP_EPOCH = 900_000
# The stride is larger than the number of every epoch, so that two seeds never draw the
# same numbers. (Up to seed 4,000: the CPU's generator keeps only 32 bits of its seed.)
SEED_STRIDE = 1_000_003
MAX_SEED = 2**32 - 1


def epoch_generator(seed, epoch, device):
    """Return the generator of an epoch's random numbers.

    Seed and epoch alone decide them, so a resumed run draws the same.
    """
    return torch.Generator(device).manual_seed(SEED_STRIDE * seed + epoch)


def draw_flips(run, epoch, generator):
    """Return which of a run's training images are mirrored in this epoch: booleans (N,).

    Alternating: half of the images, chosen once at random, are mirrored in odd epochs,
    the other half in even epochs (K. Jordan, arXiv:2404.00498, section 3.6).
    """
    labels = run.training.labels
    count = len(labels)
    device = labels.device
    if run.recipe.flips == "none":
        return torch.zeros(count, dtype=torch.bool, device=device)
    if run.recipe.flips == "random":
        return torch.randint(2, (count,), generator=generator, device=device) == 1
    coin_generator = epoch_generator(run.seed, 0, device)  # the same in every epoch
    coins = torch.randint(2, (count,), generator=coin_generator, device=device)
    return (coins + epoch) % 2 == 1


def crop_images(images, top, left, height, width):
    """Cut (B, C, height, width) out of (B, C, H, W), each at its own corner."""
    device = images.device
    image_index = torch.arange(len(images), device=device)  # (B,)
    rows = top[:, None] + torch.arange(height, device=device)  # (B, height)
    columns = left[:, None] + torch.arange(width, device=device)  # (B, width)
    channels_last = images.permute(0, 2, 3, 1)  # so that an index takes a whole pixel
    # Together, the three indices have the shape (B, height, width).
    crops = channels_last[image_index[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2)


def cut_holes(images, top, left, size):
    """Blank a square in each of (B, C, H, W) with the mean color, zero.

    (T. DeVries and G. Taylor, arXiv:1708.04552.)
    """
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device)
    in_rows = (rows >= top[:, None]) & (rows < top[:, None] + size)  # (B, H)
    in_columns = (columns >= left[:, None]) & (columns < left[:, None] + size)  # (B, W)
    hidden = in_rows[:, None, :, None] & in_columns[:, None, None, :]  # (B, 1, H, W)
    # masked_fill would lose the channels-last layout.
    return torch.where(hidden, 0, images)


def augment_images(recipe, padded, mirrored, generator):
    """Crop, flip and cut out: from padded images to (B, C, H, W).

    Each image has its own random crop, and its own random hole inside that crop.
    """
    count = len(padded)

    def draw(choices):
        return torch.randint(choices, (count,), generator=generator, device=padded.device)

    height = padded.shape[-2] - 2 * recipe.padding
    width = padded.shape[-1] - 2 * recipe.padding
    offsets = 2 * recipe.padding + 1  # from 0 to 2 x padding, in each direction
    images = crop_images(padded, draw(offsets), draw(offsets), height, width)
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    hole_top = draw(height - recipe.cutout + 1)
    hole_left = draw(width - recipe.cutout + 1)
    return cut_holes(images, hole_top, hole_left, recipe.cutout)


def augmented_batches(run, epoch):
    """Yield a run's training images, shuffled and augmented, in batches with their labels.

    A batch has images (B, C, H, W) and labels (B,).
    """
    images, labels = run.training
    device = images.device
    generator = epoch_generator(run.seed, epoch, device)
    mirrored = draw_flips(run, epoch, generator)
    order = torch.randperm(len(labels), generator=generator, device=device)
    layout = fast_layout(device)
    batch_size = run.recipe.batch_size
    # `tensor_split` cuts before each of these positions. The last batch has the rest,
    # which may be one image more than a batch, see `count_steps`.
    cuts = range(batch_size, run.steps_per_epoch * batch_size, batch_size)
    for chosen in order.tensor_split(tuple(cuts)):
        batch = augment_images(run.recipe, images[chosen], mirrored[chosen], generator)
        if run.augment is not None:
            batch = run.augment(batch, generator)
        yield batch.contiguous(memory_format=layout), labels[chosen]


# ---- Model ----------------------------------------------------------------------------

class ConvBlock(nn.Sequential):
    """Convolution 3x3, max-pool 2 if `pool`, BatchNorm, ReLU; `pool` halves H and W.

    The pool comes second, as in the course's network. D. Page's has it at the end.
    """

    def __init__(self, c_in, c_out, pool=False):
        layers = [nn.Conv2d(c_in, c_out, kernel_size=3, stride=1, padding=1, bias=False)]
        if pool:
            layers.append(nn.MaxPool2d(2))
        layers.append(nn.BatchNorm2d(c_out))
        layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)


class ResBlock(nn.Module):
    """x + ConvBlock(ConvBlock(x)), shape unchanged."""

    def __init__(self, channels):
        super().__init__()
        self.residual = nn.Sequential(
            ConvBlock(channels, channels), ConvBlock(channels, channels))

    def forward(self, x):
        return x + self.residual(x)


class ResNet(nn.Module):
    """The custom ResNet of D. Page, How to Train Your ResNet (Myrtle.ai, 2018).

    It has 6,573,130 parameters and turns images (B, 3, 32, 32) into logits (B, 10).
    """

    def __init__(self, recipe=Recipe(), num_classes=10):
        super().__init__()
        self.prep = ConvBlock(3, 64)  # (B, 64, 32, 32)
        self.layer1 = nn.Sequential(  # (B, 128, 16, 16)
            ConvBlock(64, 128, pool=True), ResBlock(128))
        self.layer2 = ConvBlock(128, 256, pool=True)  # (B, 256, 8, 8)
        self.layer3 = nn.Sequential(  # (B, 512, 4, 4)
            ConvBlock(256, 512, pool=True), ResBlock(512))
        self.pool = nn.Sequential(nn.MaxPool2d(4), nn.Flatten())  # (B, 512)
        self.head = nn.Linear(512, num_classes)
        self.logit_scale = recipe.logit_scale
        if recipe.initialization == "identity":  # `start_run` also whitens: it has images
            pass_input_on(self)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        return self.head(self.pool(x)) * self.logit_scale


def convolution_weights(model):
    """Return the weights of all convolutions (Conv2d), each once, in the model's order."""
    weights = {layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d)}
    return [parameter for parameter in model.parameters() if parameter in weights]


def pass_input_on(model):
    """Let every convolution but the first begin by passing its input on.

    A convolution with C input channels gets C filters, each of which passes one channel
    on. If it has more filters, the others stay random. So the untrained network already
    carries the image to its last layer (K. Jordan, arXiv:2404.00498, section 3.3).
    """
    for weight in convolution_weights(model)[1:]:  # the first one is for `whiten_patches`
        input_channels = weight.shape[1]
        nn.init.dirac_(weight[:input_channels])


@torch.no_grad()
def whiten_patches(model, images):
    """Let the first convolution whiten the 3x3 patches of images (N, 3, H, W).

    27 filters become the eigenvectors of the patches' covariance, each divided by the
    root of its eigenvalue (D. Page, How to Train Your ResNet 8, 2019). 27 more are their
    negatives, because ReLU keeps positive outputs alone (tysam-code, hlb-CIFAR10). The
    other 10 stay random.
    """
    # (N, 27, positions), because a patch has 3 x 3 pixels of 3 channels.
    patches = F.unfold(images.float().cpu(), 3)
    covariance = torch.cov(patches.transpose(0, 1).flatten(1))
    variances, directions = torch.linalg.eigh(covariance)
    # Directions with almost no variance are noise. 0.01 keeps them from being amplified.
    filters = (directions / (variances + 0.01).sqrt()).T.reshape(27, 3, 3, 3)
    model.prep[0].weight[:54].copy_(torch.cat([filters, -filters]))


# ---- Optimizers: Adam, and Muon (K. Jordan, Muon: An optimizer for hidden layers, 2024)

# results/muon_tuning.py compared them with momentum 0.85 and with 5 steps.
MUON_MOMENTUM = 0.6
NEWTON_SCHULZ_STEPS = 3


def orthogonalize(matrix, dtype=torch.float32):
    """Return a matrix like `matrix`, but with most of its singular values near 1.

    First, `matrix` is divided by its norm, so its singular values are at most 1. Then
    each Newton-Schulz step turns a value s into 3.4445 s - 4.7750 s^3 + 2.0315 s^5. This
    needs only matrix products, computed in `dtype`. Values above 0.02 end between 0.65
    and 1.3.
    """
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    is_tall = x.shape[0] > x.shape[1]
    if is_tall:
        x = x.T  # makes the products smaller
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        # The numbers are K. Jordan's.
        x = 3.4445 * x + (-4.7750 * gram + (2.0315 * gram) @ gram) @ x
    return x.T if is_tall else x


def muon_step(weight, gradient, momentum, lr, dtype=torch.float32):
    """Take one step of Muon on a convolution's weight (out, in, height, width), in place.

    `momentum`, the fading sum of all gradients, has the shape of `weight` and is updated
    in place, too. The gradient plus a part of the momentum is seen as a matrix
    (out, in x height x width). The step is a matrix close to this one whose singular
    values are near 1, times `lr`. So the weight moves about equally far in all directions
    of the matrix. Before the step, the weight is scaled to a fixed norm. `dtype` is that
    of the matrix products.
    """
    momentum.mul_(MUON_MOMENTUM).add_(gradient)
    combined = gradient + MUON_MOMENTUM * momentum  # Nesterov's
    update = orthogonalize(combined.flatten(1), dtype)
    # A fixed norm takes the place of weight decay. This scaling does not change the
    # output of our network, because the BatchNorm that follows divides by the deviation.
    # The norm is sqrt(out), so that one filter has a norm of about 1. The update has about
    # the same norm, so a step with `lr` 0.1 changes the weight by a tenth.
    weight.mul_(math.sqrt(len(weight)) / weight.norm().clamp(min=1e-7))
    weight.add_(update.view_as(weight), alpha=-lr)


class Muon(torch.optim.Optimizer):
    """Muon for the weights of convolutions, and Adam for all else, in one optimizer.

    This object has all groups of parameters, of which the first is Muon's, and the state
    of all parameters. So they are saved as one. `adam` only lends its `step`.
    """

    def __init__(self, weights, adam, lr_factor, dtype=torch.float32):
        """`weights` are those for Muon. `adam` is an Adam with the other parameters.

        `lr_factor` is Muon's learning rate divided by Adam's.
        """
        self.adam = adam
        self.dtype = dtype
        muon_group = {"params": weights, "lr": 0.0, "lr_factor": lr_factor}
        super().__init__([muon_group, *adam.param_groups], {})

    def __getstate__(self):  # for copies; PyTorch's own would leave out these two
        return {**super().__getstate__(), "adam": self.adam, "dtype": self.dtype}

    @torch.no_grad()
    def step(self):
        """Take a step with all parameters that have a gradient."""
        muon_group, *adam_groups = self.param_groups
        # Adam works on the groups and the state of this object. load_state_dict replaces
        # both, so Adam is given them in each step.
        self.adam.state = self.state
        self.adam.param_groups = adam_groups
        self.adam.step()
        for weight in muon_group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(weight)
            muon_step(weight, weight.grad, state["momentum"], muon_group["lr"], self.dtype)


def make_optimizer(recipe, model, dtype):
    """Return the optimizer that the recipe names, for all parameters of the model.

    Muon gets the weights of all convolutions (Conv2d), or of all but the first, and Adam
    the rest. A BatchNorm has to follow each convolution of Muon, because Muon fixes the
    norm of its weight.
    """
    muon_weights = []
    if recipe.optimizer == "muon":
        muon_weights = convolution_weights(model)
        if recipe.first_convolution == "adam":
            muon_weights = muon_weights[1:]
        if not muon_weights:
            raise ValueError("the network has no convolution for the optimizer muon")
    of_muon = set(muon_weights)
    rest = [parameter for parameter in model.parameters() if parameter not in of_muon]
    decayed = [parameter for parameter in rest if parameter.ndim > 1]
    # Biases, and the weights of BatchNorms: decay of these cost 0.3 points in a study.
    spared = [parameter for parameter in rest if parameter.ndim <= 1]
    # "decays" is a key of our own. `set_weight_decay` sets the weight decay where it is
    # true, once LRMAX is known; until then it is 0. With `l2`, PyTorch's `weight_decay`
    # is an L2 term instead, the same for all parameters.
    groups = [{"params": decayed, "decays": True}, {"params": spared, "decays": False}]
    # `train_step` sets the learning rate and the first beta.
    adam = torch.optim.Adam(
        groups, betas=(recipe.beta1_peak, recipe.beta2), eps=recipe.epsilon,
        weight_decay=recipe.l2, decoupled_weight_decay=not recipe.l2, fused=True)
    if muon_weights:
        return Muon(muon_weights, adam, recipe.muon_lr_factor, dtype)
    return adam


def set_lr_and_beta1(optimizer, lr, beta1):
    """Set the learning rate and Adam's first beta, or the momentum, of all groups.

    A group's learning rate is `lr` times its "lr_factor", if it has one. The momentum of
    Muon is fixed.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1)
        if "betas" in group:
            group["betas"] = (beta1, *group["betas"][1:])
        elif group.get("momentum"):
            group["momentum"] = beta1


def choose_weight_decay(recipe, lr_max, steps_per_epoch):
    """Return Adam's weight decay: `l2`, or the one with the time `decay_epochs`.

    A step multiplies a weight by 1 - learning rate * decay. At LRMAX, this shrinks a
    weight to 1/e in `decay_epochs` epochs (X. Wang and L. Aitchison, arXiv:2405.13698).
    """
    if recipe.l2:
        return recipe.l2
    if not recipe.decay_epochs:
        return 0.0
    # BatchNorm's running mean and variance lag behind by about 10 steps. If a weight takes
    # at least 100 steps to shrink to 1/e, it changes little in 10.
    decay_steps = max(recipe.decay_epochs * steps_per_epoch, 100)
    return 1 / (decay_steps * lr_max)


def set_weight_decay(optimizer, decay):
    """Set the weight decay of the groups that take it from the recipe."""
    for group in optimizer.param_groups:
        if group.get("decays"):
            group["weight_decay"] = decay


# ---- Run: a model on a device, with what trains it ------------------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass(repr=False)  # it would show all images
class Run:
    """A model, what trains it, and how far it has come. `start_run` makes one.

    You can replace its parts, the first three by parameters of `start_run`:

    - `model` is a network, or a function that returns one. The network turns normalized
      images (B, C, H, W) into logits (B, classes). The function is called under the seed,
      so that each seed has its own weights. A network is used as it is: a second run
      starts with the weights that the first one left. It is not whitened, even if it is a
      ResNet. A buffer that it makes only in training has to be `persistent=False`.
      Images and weights have the channels-last layout, so call `flatten` or `reshape` in
      its `forward`, not `view`. Each epoch sets the whole network to training mode, so
      BatchNorms update their statistics, also where the weights are frozen.
      `logit_scale` and `initialization` of the recipe are for the built-in network alone.
    - `loss(run, images, labels)` returns the loss and the logits (B, classes), as
      `cross_entropy` does. It calls `run.forward` once for the logits. The loss of the
      evaluation stays cross-entropy. A parameter that a loss needs has to be in the network.
      If it draws random numbers, call `torch.manual_seed` before `start_run`.
    - `augment(images, generator)` returns images, after the recipe's crop, flip and cutout.
      They are normalized, on the run's device, in its precision. `restore_images` makes
      them uint8, and `normalize_images` undoes that. Draw from the generator, so that the
      seed decides.
    - `optimizer` is set on the run itself, before the sweep: `run.optimizer = ...`. If a
      group of parameters has an "lr_factor", its learning rate is that of the schedule
      times this. A group with "decays": True gets the recipe's weight decay, which each
      epoch sets anew. This is right only for optimizers like AdamW, which decay weights
      apart from the gradient.

    On NVIDIA GPUs in bf16, the built-in network runs as a CUDA graph, which limits what
    hooks and losses can do: see `capture_graph`. The recipe has to stay as it is, because
    `start_run` has already used some of its constants.
    """
    recipe: Recipe
    seed: int
    device: str  # "cuda", "mps" or "cpu"
    precision: str  # of convolutions and matrix products; the weights are fp32
    num_classes: int
    mean: torch.Tensor  # (C,), of the training images, which are normalized with it
    std: torch.Tensor  # (C,)
    training: Split  # normalized and padded
    test: Split  # normalized; with --holdout, training images that were set aside
    model: nn.Module  # updated by the optimizer
    averaged: nn.Module  # moving average of the weights, used for evaluation
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # keeps small gradients from vanishing in fp16
    loss: Callable
    augment: Callable | None = None
    cuda_graph: bool = True
    seconds: float = 0.0  # of preparation and training; evaluation does not count
    epoch: int = 0  # epochs trained
    mid_epoch: bool = False  # an epoch, a sweep or a `load_state` was begun and did not end
    graph: nn.Module | None = None  # the model as a CUDA graph, see `capture_graph`
    may_use_graph: bool = False  # `forward` may use the graph, see `compute_loss`

    @property
    def dtype(self):
        return DTYPES[self.precision]

    @property
    def steps_per_epoch(self):
        return count_steps(len(self.training.labels), self.recipe.batch_size)

    def autocast(self):
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        # The cache of autocast copies the weights. A CUDA graph would keep using old
        # copies.
        return torch.autocast(self.device, self.dtype, cache_enabled=False)

    def forward(self, images):
        """Return the model's logits (B, classes) in fp32.

        In a step, a full batch goes through the CUDA graph, if there is one.
        """
        network = self.model
        if self.graph_fits(images):
            network = self.graph
            self.may_use_graph = False
        with self.autocast():
            logits = network(images)
        self.check_logits(logits)
        return logits.float()

    def graph_fits(self, images):
        """Tell whether there is a CUDA graph that may be used and can take these images."""
        if self.graph is None or not self.may_use_graph:
            return False
        # It was captured in training mode, and it computes no gradients of the images.
        if not self.model.training or images.requires_grad:
            return False
        return images.shape == self.graph.input_shape

    def compute_loss(self, images, labels):
        """Return what `loss` returns for a step: the loss and the logits.

        Only the first forward pass may use the CUDA graph. A second one, in the loss or in
        a hook of the step, would overwrite what the backward pass of the first one needs.
        """
        self.may_use_graph = True
        try:
            return self.loss(self, images, labels)
        finally:
            self.may_use_graph = False

    def check_logits(self, logits):
        """Raise ValueError if an image has fewer logits than there are classes."""
        if not isinstance(logits, torch.Tensor):
            raise ValueError("the network must return the logits (B, classes) alone, "
                             f"got a {type(logits).__name__}")
        # On a GPU, the loss would end the whole process with an error that says nothing.
        if logits.ndim != 2 or logits.shape[1] < self.num_classes:
            raise ValueError(f"the network must return {self.num_classes} logits for each "
                             f"image, because num_classes is {self.num_classes}, got "
                             f"{tuple(logits.shape)}")

    def settings(self):
        """Return what a state and the run that loads it must have in common."""
        return {
            **dataclasses.asdict(self.recipe),
            "seed": self.seed,
            "device": self.device,
            "precision": self.precision,
            "training_images": len(self.training.labels),
        }

    def state(self):
        """Return a copy of all that training changes, and the settings of the run.

        Buffers with `persistent=False` are not part of it, nor are those that a loss or
        `augment` has, nor PyTorch's random numbers on a GPU, which a dropout layer uses.
        Raise ValueError inside an epoch or a sweep, because the run could not go on from
        there.
        """
        self.check_between_epochs()
        return copy.deepcopy({
            "settings": self.settings(),
            "model": self.model.state_dict(),
            "averaged": self.averaged.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),  # a dropout layer on the CPU uses it
            "epoch": self.epoch,
            "seconds": self.seconds,
        })

    def check_between_epochs(self):
        """Raise ValueError if an epoch or a sweep was begun and did not end."""
        if self.mid_epoch:
            raise ValueError("an epoch or a sweep of this run was begun and did not end, or a "
                             "state could not be loaded. Load an earlier state(), or begin again "
                             "with start_run")

    def load_state(self, state):
        """Go back to a `state()`.

        Raise ValueError if it is of a run with other settings. If it is of another network,
        PyTorch raises an error. Then the run cannot go on until it has loaded another state.
        """
        differences = differing_settings(state["settings"], self.settings())
        if differences:
            raise ValueError(f"it is of another run: {differences}")
        self.mid_epoch = True  # until all is loaded
        # The optimizer gets a copy, because it goes on with the tensors that it is given.
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self.model.load_state_dict(state["model"])
        self.averaged.load_state_dict(state["averaged"])
        # A new scaler: after an interrupted step, the old one would raise in the next
        # step.
        self.scaler = torch.amp.GradScaler(self.device, enabled=self.scaler.is_enabled())
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"].cpu())  # torch.load may have put it onto a GPU
        self.epoch = state["epoch"]
        self.seconds = state["seconds"]
        self.mid_epoch = False
        # The gradients belong to the weights that were replaced.
        self.optimizer.zero_grad(set_to_none=True)


def differing_settings(saved, current):
    """Return, as text, the settings in which a saved run differs from the current one."""
    differences = []
    for name in {**current, **saved}:
        before = saved.get(name)  # None, if the code then did not have this constant
        now = current.get(name)  # None, if the code of today does not
        if before != now:
            differences.append(f"{name} {before}, not {now}")
    return "; ".join(differences)


# ---- Start of a run: device, precision, data and network ------------------------------

def choose_device(device="auto"):
    """Return "cuda", "mps" or "cpu". Raise ValueError for what PyTorch does not find.

    "auto" takes the fastest one that it finds. Of several GPUs, the environment variable
    CUDA_VISIBLE_DEVICES chooses one.
    """
    found = []
    if torch.cuda.is_available():
        found.append("cuda")
    if torch.backends.mps.is_available():
        found.append("mps")
    found.append("cpu")
    device = str(device)  # it may be a torch.device
    if device not in ["auto", *found]:
        names = ", ".join(found)
        raise ValueError(f"device must be auto or what PyTorch finds here ({names}), "
                         f"got {device}")
    return found[0] if device == "auto" else device


def choose_precision(device, precision="auto"):
    """Return "fp32", "bf16" or "fp16", or raise ValueError for another name.

    "auto" is bf16 on an NVIDIA GPU or an x86 CPU that has instructions for it, fp16 on
    other NVIDIA GPUs, and fp32 elsewhere. Without such instructions, bf16 is slow.
    """
    check_value("precision", precision, ["auto", *DTYPES])
    # On Apple GPUs, the scaler does not stop Adam's steps with infinite gradients.
    if device == "mps" and precision == "fp16":
        raise ValueError("fp16 does not work on Apple GPUs. Use fp32")
    if precision != "auto":
        return precision
    if device == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bf16" if has_bf16 else "fp16"
    if device == "cpu" and cpu_capabilities().get("avx512_bf16"):
        return "bf16"
    return "fp32"


def cpu_capabilities():
    """Return what PyTorch knows of the CPU, a dictionary."""
    if hasattr(torch.cpu, "get_capabilities"):
        return torch.cpu.get_capabilities()
    # PyTorch 2.7 to 2.10 lack this function.
    return {"avx512_bf16": torch.cpu._is_avx512_bf16_supported()}


def start_run(recipe, training, test, seed=0, device="auto", precision="auto", model=None,
              num_classes=10, loss=None, augment=None, cuda_graph=True):
    """Return a Run that has not trained yet.

    The Splits are of uint8 images (N, 3, 32, 32), or of what your own `model` takes.
    `choose_device` and `choose_precision` say what "auto" is. `Run` says what `model`,
    `loss`, `augment` and `cuda_graph` can be. A seed gives the same initial weights on
    every device, except for rounding in the first layer; dropout in a network of your own
    follows `torch.manual_seed`. `torch.backends.cudnn.benchmark` is set for the whole
    process. Raise ValueError for what cannot be trained.
    """
    seed = int(seed)  # it may be one of NumPy's
    check_value("seed", seed, (0, MAX_SEED))
    training = Split(*training)  # it may be a plain tuple
    test = Split(*test)
    is_built_in = model is None
    check_data(recipe, training, test, num_classes, is_built_in)
    recipe = fill_in_batch_size(recipe, len(training.labels))
    device = choose_device(device)
    precision = choose_precision(device, precision)
    dtype = DTYPES[precision]
    # cuDNN can search for its fastest kernels, which takes time. In bf16, that is worth
    # it only with the CUDA graph, so `capture_graph` turns it on.
    torch.backends.cudnn.benchmark = precision != "bf16"
    network = make_model(recipe, model, num_classes, seed)
    network.to(device, torch.float32, memory_format=fast_layout(device))

    started = time.perf_counter()
    mean, std, training, test = prepare_data(recipe, training, test, device, dtype)
    if is_built_in and recipe.initialization == "identity":
        # 1,000 images have enough patches for a covariance of 27 values.
        whiten_patches(network, training.images[:1000])
    seconds = time.perf_counter() - started
    return Run(
        recipe=recipe, seed=seed, device=device, precision=precision,
        num_classes=num_classes, mean=mean, std=std, training=training, test=test,
        model=network, averaged=copy.deepcopy(network),
        optimizer=make_optimizer(recipe, network, dtype),
        scaler=torch.amp.GradScaler(device, enabled=precision == "fp16"),
        loss=loss or cross_entropy, augment=augment, cuda_graph=cuda_graph,
        seconds=seconds)


def prepare_data(recipe, training, test, device, dtype):
    """Return mean and deviation (C,) of the training images, and both Splits, prepared."""
    lowest = training.images.amin((0, 2, 3))
    highest = training.images.amax((0, 2, 3))
    if (lowest == highest).any():  # normalization would divide by a deviation of 0
        raise ValueError("training split: a channel of the images is constant")
    std, mean = torch.std_mean(training.images.float().div_(255), dim=(0, 2, 3),
                               correction=0)
    training = prepare_images(training, mean, std, device, dtype, recipe.padding,
                              recipe.padding_mode)
    test = prepare_images(test, mean, std, device, dtype)
    # Reading a value waits until a GPU is done. Else its work would not count as seconds.
    test.images[-1].sum().item()
    return mean, std, training, test


def check_data(recipe, training, test, num_classes, is_built_in):
    """Raise ValueError if the Splits cannot be trained on with this recipe and network."""
    check_split("training", training, num_classes)
    check_split("test", test, num_classes)
    for split in (training, test):
        if is_built_in and split.images.shape[1:] != (3, 32, 32):
            shape = " x ".join(str(length) for length in split.images.shape[1:])
            raise ValueError("the built-in network takes images of 3 x 32 x 32 (channels, "
                             f"height, width), got {shape}. For others, give a `model` of "
                             "your own")
    channels = training.images.shape[1]
    if test.images.shape[1] != channels:
        raise ValueError(f"training images have {channels} channels, "
                         f"test images have {test.images.shape[1]}")
    height, width = training.images.shape[2:]
    if min(height, width) <= recipe.padding or min(height, width) < recipe.cutout:
        raise ValueError(f"images of {height} x {width} are too small for padding "
                         f"{recipe.padding} and cutout {recipe.cutout}")


def make_model(recipe, model, num_classes, seed):
    """Return `model`, or what it makes if it is a function, or the built-in network."""
    if isinstance(model, nn.Module):
        return model
    # The weights are drawn on the CPU, so that they are the same on every device.
    # Afterwards, `fork_rng` restores the caller's random state there. torch.manual_seed
    # would also seed the GPUs, whose state is not restored.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        return ResNet(recipe, num_classes) if model is None else model()


# ---- Before the first step ------------------------------------------------------------

@contextlib.contextmanager
def prepared_for_steps(run):
    """Prepare a run for the steps of the `with` block, in the sweep or in the training.

    Raise ValueError if the run is not ready.
    """
    run.check_between_epochs()
    check_parameters(run)
    if run.device == "cpu":
        keep_freed_memory()
    run.model.train()
    # An earlier graph goes first, because the next one may need its memory.
    run.graph = None
    run.graph = capture_graph(run)
    try:
        yield
    finally:
        run.graph = None  # Python's next garbage collection frees its memory


def check_parameters(run):
    """Raise ValueError unless the optimizer holds the parameters of the model.

    Those that are frozen may be missing.
    """
    held = set()
    for group in run.optimizer.param_groups:
        held.update(group["params"])
    parameters = set(run.model.parameters())
    trainable = {parameter for parameter in parameters if parameter.requires_grad}
    if not trainable:
        raise ValueError("all parameters are frozen. Call model.requires_grad_(True)")
    if not trainable <= held:
        raise ValueError("the optimizer does not hold all parameters of the model")
    if not held <= parameters:
        raise ValueError("the optimizer holds parameters that are not in the model, so they would "
                         "not be saved. Give start_run a network that has them")


def keep_freed_memory():
    """Let glibc keep the memory of a step for the next one: steps get a fifth faster.

    This holds for the whole process, until it ends.
    """
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return the end of the heap
        libc.mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too


# ---- One step, and the moving average of the weights ----------------------------------

def cross_entropy(run, images, labels):
    """Return the cross-entropy with the recipe's label smoothing, and the logits."""
    logits = run.forward(images)
    smoothing = run.recipe.label_smoothing
    return F.cross_entropy(logits, labels, label_smoothing=smoothing), logits


def train_step(run, images, labels, lr, beta1):
    """Take one optimizer step on images (B, C, H, W) with their labels (B,).

    Return the batch's loss before the step and its number of correct predictions. They
    stay tensors: converting them to numbers would make a GPU wait. The averaged weights
    are not part of a step, see `update_average`.
    """
    set_lr_and_beta1(run.optimizer, lr, beta1)
    loss, logits = run.compute_loss(images, labels)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)  # for hooks of the step, such as gradient clipping
    run.scaler.step(run.optimizer)
    run.scaler.update()
    correct = (logits.detach().argmax(1) == labels).sum()
    return loss.detach(), correct


def update_average(run, step):
    """Update the averaged weights after `step` of the run (from 1).

    They are a plain mean in the first `ema_epochs`, then an exponential moving average.
    If `ema_epochs` is 0, they are the latest weights.
    """
    ema_steps = max(1, run.recipe.ema_epochs * run.steps_per_epoch)
    decay = 1 - 1 / min(step, ema_steps)  # share of the earlier weights in the average
    # PyTorch's AveragedModel averages all buffers or none. Here, BatchNorm's statistics
    # are averaged, but masks and counts are copied, see `copy_other_buffers`.
    update = get_ema_multi_avg_fn(decay)
    # PyTorch does not use the third argument.
    update(tensors_to_average(run.averaged), tensors_to_average(run.model), None)


RUNNING_STATISTICS = ("running_mean", "running_var")  # names of BatchNorm's buffers


def tensors_to_average(module):
    """Return a module's weights, and the running statistics of its BatchNorms."""
    # Weights that two layers share are listed once here, but twice in state_dict().
    weights = [values for values in module.parameters() if values.is_floating_point()]
    statistics = [values for name, values in module.named_buffers()
                  if name.endswith(RUNNING_STATISTICS)]
    return weights + statistics


@torch.no_grad()
def copy_other_buffers(run):
    """Give the averaged model the buffers that have no average, such as masks and counts."""
    copies = dict(run.averaged.named_buffers())
    for name, values in run.model.named_buffers():
        # The averaged model lacks a buffer that the model made in training.
        if not name.endswith(RUNNING_STATISTICS) and name in copies:
            copies[name].copy_(values)


# ---- One-cycle ------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Rates:
    """The learning rates of a run's cycle: at its start (LRMIN) and at its peak (LRMAX).

    Rates that cannot be trained with raise ValueError.
    """
    lr_min: float
    lr_max: float
    sweep: dict | None = None  # the record of the sweep that found them, see `find_rates`
    note: str | None = None  # why they are uncertain, if they are

    def __post_init__(self):
        # torch.load would refuse NumPy's numbers in a saved state.
        object.__setattr__(self, "lr_min", float(self.lr_min))
        object.__setattr__(self, "lr_max", float(self.lr_max))
        if not 0 < self.lr_min <= self.lr_max:
            raise ValueError(f"LRMIN {self.lr_min:.3g} must be above 0 and at most LRMAX, "
                             f"which is {self.lr_max:.3g}")


def one_cycle(step, total_steps, start, peak, end, peak_fraction):
    """Return a value that changes linearly from `start` to `peak` and then to `end`.

    Steps count from 0. As in PyTorch's OneCycleLR, the peak is at step `peak_fraction` x
    `total_steps` - 1, which may lie between two steps, and the last step has `end`
    (L. Smith, arXiv:1803.09820, section 4).
    """
    last_step = total_steps - 1
    peak_step = peak_fraction * total_steps - 1  # at most 0 if there is no rise
    if step < peak_step:
        return start + (peak - start) * (step / peak_step)
    return end + (peak - end) * ((last_step - step) / (last_step - peak_step))


def scheduled_lr_and_beta1(recipe, rates, step, steps_per_epoch):
    """Return the learning rate and Adam's first beta at a step of the run (from 0)."""
    total_steps = recipe.epochs * steps_per_epoch
    lr = one_cycle(
        step, total_steps, start=rates.lr_min, peak=rates.lr_max,
        end=rates.lr_min / recipe.annihilation, peak_fraction=recipe.peak_fraction)
    beta1 = one_cycle(
        step, total_steps, start=recipe.beta1, peak=recipe.beta1_peak,
        end=recipe.beta1, peak_fraction=recipe.peak_fraction)
    return lr, beta1


# ---- Learning-rate range sweep --------------------------------------------------------

LR_RATIO = 300  # LRMAX / LRMIN; 30 did equally well
SWEEP_LOWEST = 1e-6  # learning rate of the first step
SWEEP_HIGHEST = 1.0  # and of the last one, if the loss has risen by then
SWEEP_LIMIT = 1000.0  # else the sweep goes on, at most to here
# After its lowest value, the smoothed loss of a sweep is low until it has risen by the
# smaller of these two, see `last_low_step`.
RISE = 0.03  # of the lowest value
FALL_PART = 0.1  # of the fall to this value
# Training with Adam for fewer steps than this is mostly better at half of the usual LRMAX,
# as the cases of results/finder.py show.
SHORT_TRAINING = 700


def find_rates(run, on_step=None):
    """Train while the learning rate rises exponentially, and find LRMAX from the losses.

    Return Rates. Their `sweep` has the lists `lr`, `loss` and `smoothed_loss`. If LRMAX
    is uncertain, their `note` says why, and so does an UncertainRates warning.
    Afterwards, the `state()` of the run is as before.
    `on_step(step, steps, learning rate, loss)` is called after each step. Raise UserError
    if the loss never falls, or if it is NaN or infinite from the start. (L. Smith,
    arXiv:1506.01186, section 3.3.)
    """
    steps_per_epoch = run.steps_per_epoch
    # 200 steps, but at least one epoch and at most two. If two epochs have fewer than 120
    # steps, the sweep still has 120, which are 20 for each factor of 10. Fewer would be
    # too coarse, because the loss rises only some steps after the rate became too high.
    steps = max(steps_per_epoch, min(200, 2 * steps_per_epoch), 120)
    # A decade is a factor of 10 in the learning rate.
    steps_per_decade = (steps - 1) / math.log10(SWEEP_HIGHEST / SWEEP_LOWEST)
    half_decade_steps = round(steps_per_decade / 2)
    before = run.state()
    with prepared_for_steps(run):
        # Until `load_state`, because training cannot go on from inside the sweep.
        run.mid_epoch = True
        try:
            # Weight decay depends on LRMAX, which is not known yet, so the sweep has none,
            # also after a training. The L2 term stays.
            set_weight_decay(run.optimizer, run.recipe.l2)
            lrs, losses = record_sweep(run, steps, half_decade_steps, on_step)
        finally:
            run.load_state(before)
    smoothed = smooth_losses(losses, steps_per_decade)
    adam_steps = run.recipe.epochs * steps_per_epoch if is_adam(run.optimizer) else 0
    lr_min, lr_max = read_sweep(lrs, smoothed, adam_steps)
    note = why_uncertain(smoothed)
    if note:
        warnings.warn(note, UncertainRates, stacklevel=2)
    sweep = {"lr": lrs, "loss": losses, "smoothed_loss": smoothed}
    return Rates(lr_min, lr_max, sweep, note)


def record_sweep(run, steps, half_decade_steps, on_step):
    """Train with rising learning rates; return the lists of these and of the losses.

    In `half_decade_steps` steps, the rate grows by the root of 10. The sweep ends at
    SWEEP_LIMIT, or when `sweep_is_over`. A loss that is NaN or infinite ends it, too, and
    is left out. In the first half decade, it raises Diverged.
    """
    growth = SWEEP_HIGHEST / SWEEP_LOWEST
    lrs = []
    losses = []
    means = []  # of the last `half_decade_steps` losses, at each step
    for step, (images, labels) in enumerate(sweep_batches(run)):
        lr = SWEEP_LOWEST * growth ** (step / (steps - 1))
        # In training, too, Adam has this beta at LRMAX.
        loss, _ = train_step(run, images, labels, lr, run.recipe.beta1_peak)
        value = loss.item()
        if not math.isfinite(value):
            if not means:
                raise Diverged(f"the loss is {value} in step {step + 1} of the sweep, at learning "
                               f"rate {lr:.2g}.\nSo low a rate is hardly the cause. Look at the "
                               "images, the network and the loss.")
            break
        if value < 0:
            raise ValueError("the sweep needs a loss that is never below 0; "
                             "add a constant to yours")
        lrs.append(lr)
        losses.append(value)
        if on_step:
            on_step(step + 1, max(step + 1, steps), lr, loss)
        if len(losses) >= half_decade_steps:
            means.append(statistics.fmean(losses[-half_decade_steps:]))
        steps_beyond = len(losses) - steps
        if lr >= SWEEP_LIMIT or sweep_is_over(means, steps_beyond, half_decade_steps):
            break
    return lrs, losses


def sweep_batches(run):
    """Yield augmented batches, epoch after epoch, without an end."""
    for epoch in itertools.count(SWEEP_EPOCH):
        yield from augmented_batches(run, epoch)


def sweep_is_over(means, steps_beyond, half_decade_steps):
    """Tell whether the loss of a sweep has risen far enough to end it.

    `means` has, for each step so far, the mean loss over the last half decade of rates.
    `steps_beyond` counts the steps beyond the planned ones; it is negative before.
    """
    if not means:
        return False
    has_diverged = means[-1] > 1.5 * min(means)
    # At the planned end, and after each further factor of 10, a small rise is enough.
    may_end = steps_beyond >= 0 and steps_beyond % (2 * half_decade_steps) == 0
    return has_diverged or (may_end and means[-1] > (1 + RISE) * min(means))


def smooth_losses(losses, steps_per_decade):
    """Smooth twice: each step gets the mean over the rates from half to twice its own rate."""
    reach = round(steps_per_decade * math.log10(2))
    for _ in range(2):
        windows = [losses[max(0, i - reach):i + reach + 1] for i in range(len(losses))]
        losses = [statistics.fmean(window) for window in windows]
    return losses


def is_adam(optimizer):
    """Tell whether each group of parameters has betas, as those of Adam and AdamW have.

    The groups of SGD have none, nor has the first group of our Muon.
    """
    return all("betas" in group for group in optimizer.param_groups)


def read_sweep(lrs, smoothed, adam_steps):
    """Return LRMIN and LRMAX for a training with so many steps of Adam.

    LRMAX is twice the last rate at which the loss is low, because smoothing makes the
    rise appear too early. But most short trainings with Adam cannot recover from high
    rates. For these, LRMAX is that rate, not twice it. With another optimizer,
    `adam_steps` is 0. LRMAX is at most the last rate of the sweep.
    """
    last = last_low_step(smoothed)
    is_short = 0 < adam_steps < SHORT_TRAINING
    factor = 1 if is_short else 2
    lr_max = min(factor * lrs[last], lrs[-1])
    return lr_max / LR_RATIO, lr_max


def last_low_step(smoothed):
    """Return the last step, after the lowest smoothed loss of a sweep, before it rises.

    It has risen when it is above its lowest value by more than RISE of this value, or by
    more than FALL_PART of its fall to this value. Raise UserError if it never falls.
    """
    lowest = smoothed.index(min(smoothed))
    if lowest == 0:
        raise UserError("the sweep found no learning rate at which the loss falls.\n"
                        "Choose LRMAX yourself: --lr-max 0.05 is a good start for our network "
                        "and recipe.\nIn a script, that is train.Rates(0.05 / 300, 0.05).")
    minimum = smoothed[lowest]
    fall = smoothed[0] - minimum
    highest_low_loss = minimum + min(RISE * minimum, FALL_PART * fall)
    last = lowest
    while last + 1 < len(smoothed) and smoothed[last + 1] <= highest_low_loss:
        last += 1
    return last


def why_uncertain(smoothed):
    """Return why a sweep's LRMAX is uncertain, and what to try; None if it is not."""
    last = last_low_step(smoothed)
    advice = "Try a quarter, half, twice and four times this LRMAX, too"
    if last + 1 == len(smoothed):
        return ("the loss of the sweep did not rise, or it became NaN or infinite at once, so "
                f"LRMAX is uncertain. {advice}")
    fall = smoothed[0] - min(smoothed)
    if fall < 2 * RISE * min(smoothed):  # it is hardly more than a rise
        return (f"the loss of the sweep fell by only {fall / smoothed[0]:.1%}, so LRMAX is "
                f"uncertain. {advice}")
    return None


# ---- Evaluation and training ----------------------------------------------------------

# How many pixels are evaluated at once: those of 2,000 images of 32x32.
EVALUATED_PIXELS = 2000 * 32 * 32


@torch.no_grad()
def predict_logits(run, images, tta=False):
    """Return the averaged model's logits (N, classes) for images like `run.test.images`.

    `tta` averages in the logits of the mirror images. Raise ValueError for images of
    another size, for example the padded ones of `run.training`.
    """
    if images.shape[1:] != run.test.images.shape[1:]:
        expected = tuple(run.test.images.shape[1:])
        raise ValueError(f"images must be {expected}, as the test images are, "
                         f"got {tuple(images.shape[1:])}")
    if tta:
        return (predict_logits(run, images) + predict_logits(run, images.flip(-1))) / 2
    run.averaged.eval()
    height, width = images.shape[2:]
    batch_size = max(1, EVALUATED_PIXELS // (height * width))
    logits = []
    for batch in images.split(batch_size):
        with run.autocast():
            output = run.averaged(batch)
        run.check_logits(output)
        logits.append(output.float())
    return torch.cat(logits)


def evaluate_run(run, tta=False):
    """Return `test_loss` (with label smoothing) and `test_accuracy`."""
    labels = run.test.labels
    logits = predict_logits(run, run.test.images, tta)
    loss = F.cross_entropy(logits, labels, label_smoothing=run.recipe.label_smoothing)
    correct = (logits.argmax(1) == labels).sum()
    return {"test_loss": loss.item(), "test_accuracy": correct.item() / len(labels)}


def train_epochs(run, rates, on_step=None, schedule=scheduled_lr_and_beta1):
    """Train `run` to the end of its recipe; yield a row, a dictionary, after each epoch.

    The keys of a row are `epoch`, `lr` (that of the last step), `train_loss`,
    `train_accuracy`, `test_loss`, `test_accuracy`, `train_seconds`, `images_per_second`
    and `elapsed_seconds`. This is a generator: loop over it. It continues after the last
    epoch that was completed.

    `on_step(step, steps, learning rate, loss)` is called after each step, with the step of
    the epoch, from 1, and the number of its steps. Reading the loss, a tensor, makes a GPU
    wait. `schedule(recipe, rates, step, steps_per_epoch)` returns the learning rate and
    Adam's first beta, or the momentum, at a step of the run (from 0). Each epoch sets the
    weight decay of groups with "decays" anew. Raise Diverged if a loss is NaN or infinite.
    """
    if run.epoch >= run.recipe.epochs:
        warnings.warn(f"nothing to train: the run has its {run.recipe.epochs} epochs",
                      stacklevel=2)
        return
    weight_decay = choose_weight_decay(run.recipe, rates.lr_max, run.steps_per_epoch)
    started = time.perf_counter()  # the preparation counts for the first epoch
    with prepared_for_steps(run):
        while run.epoch < run.recipe.epochs:
            # For each epoch anew: the caller may have loaded a state, which brings its own
            # weight decay.
            set_weight_decay(run.optimizer, weight_decay)
            run.mid_epoch = True
            row = train_epoch(run, rates, on_step, schedule)
            copy_other_buffers(run)
            seconds = time.perf_counter() - started  # the evaluation does not count
            row.update(evaluate_run(run))
            if not math.isfinite(row["train_loss"] + row["test_loss"]):
                raise Diverged(f"the loss became NaN or infinite in epoch {run.epoch + 1}.\n"
                               "Try a lower LRMAX (--lr-max) or full precision "
                               "(--precision fp32).")
            # Here the epoch counts as done.
            run.epoch += 1
            run.seconds += seconds
            run.mid_epoch = False
            yield {"epoch": run.epoch, **row, "train_seconds": seconds,
                   "images_per_second": len(run.training.labels) / seconds,
                   "elapsed_seconds": run.seconds}
            # What the caller does with a row does not count.
            started = time.perf_counter()


def train_epoch(run, rates, on_step, schedule):
    """Train one epoch. Return its last learning rate, mean loss and accuracy.

    Loss and accuracy are those of the augmented images, while the weights change.
    """
    run.model.train()  # the caller may have evaluated it
    steps = run.steps_per_epoch
    steps_before = run.epoch * steps
    losses = []
    sizes = []
    correct = 0
    for step, (images, labels) in enumerate(augmented_batches(run, run.epoch + 1)):
        step_of_run = steps_before + step
        lr, beta1 = schedule(run.recipe, rates, step_of_run, steps)
        loss, correct_in_batch = train_step(run, images, labels, lr, beta1)
        update_average(run, step_of_run + 1)
        losses.append(loss)
        sizes.append(len(labels))
        correct += correct_in_batch
        if on_step:
            on_step(step + 1, steps, lr, loss)
    # Only here does a GPU have to finish. With Muon in fp16, the scaler waits in each step.
    batch_losses = torch.stack(losses).cpu().double()
    batch_sizes = torch.tensor(sizes, dtype=torch.double, device="cpu")
    image_count = len(run.training.labels)
    return {
        "lr": lr,
        "train_loss": (batch_losses @ batch_sizes / image_count).item(),
        "train_accuracy": correct.item() / image_count,
    }


# ---- CUDA graph: faster forward and backward passes on NVIDIA GPUs --------------------

def graph_would_help(run):
    """Tell whether a run's network may become a CUDA graph, and would be faster then.

    On GPUs without bf16, and in fp32, the kernels themselves are slow, so a graph would
    gain little. A graph could not train layers that were frozen when it was captured.
    """
    if not run.cuda_graph or run.device != "cuda" or run.precision != "bf16":
        return False
    has_frozen = not all(parameter.requires_grad for parameter in run.model.parameters())
    return type(run.model) is ResNet and not has_frozen


def capture_graph(run):
    """Return the ResNet as a CUDA graph for full batches, or None where it would not help.

    A step starts some 300 GPU kernels one by one, and a fast GPU waits for that. The
    graph starts all kernels of a forward or backward pass at once.

    The Python code of the network's `forward` runs only in the capture, so branches and
    numbers stay as they were then. Second derivatives do not work, nor do hooks of layers
    or weights. Each step overwrites the gradients of the one before; to keep one, clone
    it. The graph uses the memory that the weights have in the capture, so do not move the
    model to another device. `start_run(..., cuda_graph=False)` turns the graph off.
    """
    if not graph_would_help(run):
        return None
    # This frees the memory of earlier graphs, also of other runs. Their objects refer to
    # each other, so Python would free them only later.
    gc.collect()
    images, _ = next(augmented_batches(run, 0))
    before = copy.deepcopy(run.model.state_dict())
    # The capture has a stream of its own. PyTorch warns of it, also in later steps, but
    # here it costs nothing.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    benchmark_before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        # The capture replaces `forward` of the module that it is given. That is this
        # nn.Sequential, so the model stays as it is.
        with run.autocast():
            graph = torch.cuda.make_graphed_callables(nn.Sequential(run.model), (images,))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise RuntimeError(
            "the network could not become a CUDA graph. Start Python again. Before the sweep "
            "or the training, delete each loss that you computed yourself with this run. "
            "start_run(..., cuda_graph=False) turns the graph off") from error
    finally:
        torch.backends.cudnn.benchmark = benchmark_before
        # The capture's own steps have moved BatchNorm's statistics.
        run.model.load_state_dict(before)
    graph.input_shape = images.shape
    return graph


# ==== THE PROGRAM ======================================================================

TRAIN_IMAGES = 50_000  # in CIFAR-10
GOALS = (0.90, 0.94)  # accuracies; a report says when they were reached

IN_NOTEBOOK = "ipykernel" in sys.modules  # this process is the kernel of a notebook
# This code was pasted into a cell, so it shares the notebook's names, such as
# get_ipython. A file under `%run -i` shares them, too, but its sys.argv[0] is its
# __file__.
IS_PASTED = (IN_NOTEBOOK and "get_ipython" in globals()
             and globals().get("__file__") != sys.argv[0])

# ---- Command line ---------------------------------------------------------------------

def shown_default(name):
    """Return the default of a recipe's field for --help, "8 / 0 / 8 / 8" if recipes differ."""
    values = []
    for recipe in RECIPES.values():
        value = getattr(recipe, name)
        values.append(f"{value:.4g}" if isinstance(value, float) else str(value))
    return " / ".join(values) if len(set(values)) > 1 else values[0]


def make_parser():
    """Return the parser of the command line. Each field of Recipe is an option."""
    parser = argparse.ArgumentParser(prog="train.py", usage="%(prog)s [options]",
                                     description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--recipe", choices=list(RECIPES), default="tuned",
        help="tuned: ours (default); fast: Muon, a quarter of the epochs; "
             "best: Muon, the highest accuracy; plain: without our additions")
    add("--lr-max", type=float, metavar="X",
        help="peak learning rate, LRMAX; else a sweep finds it")
    add("--lr-min", type=float, metavar="X",
        help=f"lowest learning rate, LRMIN; else LRMAX / {LR_RATIO}")
    add("--seed", type=int, default=0, metavar="N", help="seed of all random numbers")
    add("--runs", type=int, default=1, metavar="N",
        help="train N seeds in turn, from --seed on")
    add("--subset", type=int, nargs="?", const=SAMPLE_IMAGES, default=TRAIN_IMAGES, metavar="N",
        help=f"use the first N training images ({SAMPLE_IMAGES} without N) and N/5 test images")
    add("--holdout", type=int, default=0, metavar="N",
        help="for tuning: set the last N training images aside, and evaluate on them")
    path = os.path.expanduser  # ~ stands for the home folder
    add("--data-dir", type=path, default="data", metavar="DIR",
        help="folder of CIFAR-10 (default: data)")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto",
        help="auto: the fastest")
    add("--precision", choices=["auto", *DTYPES], default="auto",
        help="auto: bf16 on NVIDIA GPUs and x86 CPUs that are fast at it, fp16 on other "
             "NVIDIA GPUs, else fp32")
    add("--checkpoint", type=path, metavar="FILE",
        help="save the run here after each epoch; if the file is there, continue from it")
    add("--weights", type=path, metavar="FILE", help="save the trained weights here")
    add("--output", type=path, metavar="FILE",
        help="file of the report, in JSON; one that is there is replaced (default: next to "
             "the checkpoint, or a new one in results/)")
    add("--no-figures", action="store_false", dest="figures", help="draw no figures")
    add_recipe_options(parser)
    return parser


def add_recipe_options(parser):
    """Add an option for each field of Recipe."""
    names = " / ".join(RECIPES)
    group = parser.add_argument_group(
        "recipe", f"constants; where recipes differ, their defaults are in the order {names}")
    metavars = {int: "N", float: "X"}
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        option = "--" + field.name.replace("_", "-")
        choices = field.metadata["allowed"] if kind is str else None
        default = shown_default(field.name)
        group.add_argument(option, type=kind, choices=choices, metavar=metavars.get(kind),
                           default=argparse.SUPPRESS,  # `options` has only those given
                           help=f"{field.metadata['help']} (default: {default})")


def parse_arguments(argv):
    """Return the recipe and the other options. Invalid ones end the process with code 2."""
    if isinstance(argv, str):
        argv = shlex.split(argv)
    argv = [str(argument) for argument in argv]
    parser = make_parser()
    options = parser.parse_args(argv)
    options.command = shlex.join(["train.py", *argv])
    try:
        check_options(options)
        recipe = take_recipe(options)
        # `start_run` checks both again. But here, an error ends with exit code 2.
        choose_precision(choose_device(options.device), options.precision)
        if options.output is None:
            options.output = default_output(options.checkpoint)
        check_files(options)
    except ValueError as error:
        parser.error(str(error))
    return recipe, options


def check_options(options):
    """Raise ValueError if the value of an option is not allowed.

    Recipe checks its own constants.
    """
    check_value("runs", options.runs, (1, 1000))
    # The last one of several runs has to be allowed, too.
    check_value("seed", options.seed, (0, MAX_SEED - options.runs + 1))
    # A fifth of the subset is for the tests: one image or more.
    check_value("subset", options.subset, (5, TRAIN_IMAGES))
    # BatchNorm needs two images to train on.
    check_value("holdout", options.holdout, (0, options.subset - 2))
    if options.lr_max is not None:
        check_value("lr_max", options.lr_max, (1e-30, 1e30))
    if options.lr_min is not None:
        check_value("lr_min", options.lr_min, (1e-30, options.lr_max or 1e30))


def take_recipe(options):
    """Return the Recipe that the options name.

    Its constants are deleted from `options`, so that the report has each of them once.
    Raise ValueError for a constant that is not allowed, or for one of Muon's without Muon.
    """
    constants = {}
    for field in dataclasses.fields(Recipe):
        if field.name in options:
            constants[field.name] = getattr(options, field.name)
            delattr(options, field.name)
    if constants.get("batch_size"):  # 0 leaves the choice to `fill_in_batch_size`
        image_count = options.subset - options.holdout
        check_value("batch_size", constants["batch_size"], (2, image_count))
    recipe = dataclasses.replace(RECIPES[options.recipe], **constants)
    for name in ("muon_lr_factor", "first_convolution"):
        if name in constants and recipe.optimizer != "muon":
            raise ValueError(f"{name} is for the optimizer muon, but that of this run is "
                             f"{recipe.optimizer}. Add --optimizer muon")
    return recipe


def split_ending(path):
    """Return a file name without .json, .pt or .pth, and this ending, which may be "".

    Other dots belong to the name: lr0.03.
    """
    for ending in (".json", ".pt", ".pth"):
        if path.endswith(ending):
            return path.removesuffix(ending), ending
    return path, ""


def default_output(checkpoint):
    """Return the report's file: next to the checkpoint, or a new one in results/."""
    if checkpoint is not None:
        stem, _ = split_ending(checkpoint)
        return f"{stem}.json"
    return f"results/{datetime.now():%Y%m%d-%H%M%S-%f}.json"


def check_files(options):
    """Raise ValueError if the name of a file ends in a slash, or if two files are the same."""
    given = [options.checkpoint, options.output, options.weights]
    names = [name for name in given if name is not None]
    for name in names:
        if name.endswith(("/", os.sep)):
            raise ValueError(f"the name of a file must not end in a slash, got {name}")
    paths = [Path(name).resolve() for name in names]
    if len(set(paths)) < len(paths):
        raise ValueError("checkpoint, output and weights must be different files, "
                         f"got {', '.join(names)}")


def options_of_seed(options, seed):
    """Return the options for one seed. With --runs, its file names get the seed."""
    seed_options = copy.copy(options)
    seed_options.seed = seed
    if options.runs > 1:
        for name in ("output", "checkpoint", "weights"):
            path = getattr(options, name)
            if path is not None:
                stem, ending = split_ending(path)
                setattr(seed_options, name, f"{stem}-seed{seed}{ending}")
    return seed_options


# ---- Files: report (JSON), checkpoint, weights ----------------------------------------

@contextlib.contextmanager
def temporary_file(path):
    """Yield two paths on the same disk: of a temporary file, and of the file to be written.

    At the end, the temporary file is deleted if it is still there. An OSError, also one
    in the `with` block, becomes a UserError.
    """
    target = Path(path).resolve()  # of a symbolic link, the file that it points to
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is not a regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, suffix=".tmp") as scratch:
            yield Path(scratch) / target.name, target
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}).\n"
                        "Free some space, or choose another file.") from None


def check_writable(path):
    """Raise UserError if no file can be written at `path`. An existing file stays."""
    with temporary_file(path) as (temporary, _):
        temporary.write_bytes(b"")


def write_file(path, save):
    """Write what `save(file)` writes, whole or not at all. Raise UserError if that fails."""
    # In memory first: on a full disk, torch.save would raise another error than OSError.
    content = io.BytesIO()
    save(content)
    with temporary_file(path) as (temporary, target):
        temporary.write_bytes(content.getbuffer())
        temporary.replace(target)


def save_weights(path, run, classes):
    """Write the weights of a ResNet and all else that is needed to classify images.

    Raise ValueError for another network, also of a subclass: `load_weights` would not
    know how to make it. Each output of the network needs the name of its class.
    """
    if type(run.model) is not ResNet:
        raise ValueError("save_weights is for the built-in network. Save that of your own "
                         "with torch.save(run.averaged.state_dict(), path)")
    outputs = run.model.head.out_features
    if len(classes) != outputs:
        raise ValueError(f"save_weights needs {outputs} names of classes, one for each output of "
                         f"the network, got {len(classes)}")
    # A network that was given to the run may have another scale than the recipe.
    recipe = dataclasses.replace(run.recipe, logit_scale=run.model.logit_scale)
    content = {
        "recipe": dataclasses.asdict(recipe),
        # load_weights would refuse NumPy's strings.
        "classes": [str(name) for name in classes],
        "weights": run.averaged.state_dict(),
        "mean": run.mean,
        "std": run.std,
    }
    write_file(path, lambda file: torch.save(content, file))


def load_weights(path, device="cpu"):
    """Return the model, mean, std and class names from a file of `--weights`.

    The model takes `normalize_images(images, mean, std)` of uint8 images (N, 3, 32, 32).
    Its parameters are frozen. To train it further, call `model.requires_grad_(True)`.
    """
    saved = torch.load(path, map_location=device, weights_only=True)
    # The saved recipe may have constants that the code of today does not know.
    model = ResNet(num_classes=len(saved["classes"]))
    model.logit_scale = saved["recipe"]["logit_scale"]
    model.load_state_dict(saved["weights"])
    model.to(device, memory_format=fast_layout(device)).eval().requires_grad_(False)
    return model, saved["mean"], saved["std"], saved["classes"]


def script_commit():
    """Return the git commit that last changed this file, with a + if it has changed since.

    Return None if git does not know the file, or if the code was pasted into a notebook.
    """
    if IS_PASTED:
        return None

    def ask_git(*arguments):
        command = ["git", *arguments, "--", SCRIPT.name]
        return subprocess.run(command, cwd=SCRIPT.parent, capture_output=True, text=True,
                              check=True).stdout.strip()

    try:
        commit = ask_git("log", "-1", "--format=%h")
        has_changed = ask_git("status", "--porcelain") != ""
    except (OSError, subprocess.CalledProcessError):  # there is no git, or no repository
        return None
    if not commit:  # the repository does not have this file
        return None
    return f"{commit}+" if has_changed else commit


def describe_environment(run):
    """Return the report's section `environment`: date, commit, versions and machine."""
    if run.device == "cuda":
        device_name = torch.cuda.get_device_name()
    else:
        device_name = (cpu_capabilities().get("cpu_name") or platform.processor()
                       or platform.machine())
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "commit": script_commit(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "device": run.device,
        "device_name": device_name,
        "precision": run.precision,
        "threads": torch.get_num_threads(),
    }


def new_report(run, options):
    """Return the report of a run that has not trained."""
    return {
        "config": {
            "recipe": dataclasses.asdict(run.recipe),
            "options": dict(vars(options)),
        },
        "environment": describe_environment(run),
        "continued_in": [],  # the environments of processes that continued a checkpoint
        "data": {
            "train_images": len(run.training.labels),
            "test_images": len(run.test.labels),
            "evaluated_on": "held-out training images" if options.holdout else "test images",
            "mean": run.mean.tolist(),
            "std": run.std.tolist(),
        },
        "parameters": sum(values.numel() for values in run.model.parameters()),
        "rates": None,
        "lr_sweep": None,
        "epochs": [],
        "summary": {
            "final_test_accuracy": None,
            "tta_test_accuracy": None,
            "sweep_seconds": 0.0,
            "preprocess_seconds": run.seconds,
            "total_seconds": 0.0,
        },
    }


def describe_rates(run, rates, options):
    """Return the report's section `rates`: the learning rates, and where they are from."""
    return {
        "lr_max": rates.lr_max,
        "lr_max_from": "sweep" if rates.sweep else "given",
        "weight_decay": choose_weight_decay(run.recipe, rates.lr_max, run.steps_per_epoch),
        "lr_min": rates.lr_min,
        "lr_min_from": "given" if options.lr_min else "lr_max",
        "note": rates.note,
    }


def summarize_epochs(rows):
    """Return the part of a summary that follows from the rows of the epochs."""
    epochs_to = {}
    seconds_to = {}
    for goal in GOALS:
        reached = [row for row in rows if row["test_accuracy"] >= goal]
        epochs_to[f"{goal:.2f}"] = reached[0]["epoch"] if reached else None
        seconds_to[f"{goal:.2f}"] = reached[0]["elapsed_seconds"] if reached else None
    return {"train_seconds": sum(row["train_seconds"] for row in rows),
            "seconds_to": seconds_to, "epochs_to": epochs_to}


class Recorder:
    """The report of a run, and the files that are written while it trains."""

    def __init__(self, run, classes, options, started):
        """`started` is when the run began, by `time.perf_counter`."""
        self.run = run
        self.classes = classes  # their names
        self.options = options
        self.started = started
        self.report = new_report(run, options)

    @property
    def summary(self):
        return self.report["summary"]

    def resume(self):
        """Continue from the checkpoint, or raise UserError if it is not one of this run."""
        path = self.options.checkpoint
        try:
            saved = torch.load(path, map_location=self.run.device, weights_only=True)
            self.check_same_options(saved["report"]["config"]["options"])
            self.run.load_state(saved["run"])
            self.continue_report(saved["report"])
        except Exception as error:  # a damaged file raises errors of many types
            if is_out_of_memory(error):
                raise
            # Those of PyTorch and Python say little here.
            reason = error if isinstance(error, ValueError) else type(error).__name__
            raise UserError(
                f"cannot continue {path} ({reason}).\nFor a new run, choose another --checkpoint.\n"
                "To continue that run, give its options. On another machine, also give --device "
                "and --precision.\nIf you changed the code since, undo that.") from None
        print(f"resumed  {path} after epoch {self.run.epoch} of {self.run.recipe.epochs}")

    def check_same_options(self, saved):
        """Raise ValueError if these options of a checkpoint's run were other ones.

        `Run.load_state` checks the settings of the run.
        """
        names = ("holdout", "lr_max", "lr_min")
        before = {name: saved[name] for name in names}
        now = {name: getattr(self.options, name) for name in names}
        differences = differing_settings(before, now)
        if differences:
            raise ValueError(f"it is of another run: {differences}")

    def continue_report(self, saved):
        """Go on with the report of a checkpoint.

        The report's environment stays that of the first process.
        """
        current_environment = self.report["environment"]
        sections = ("environment", "continued_in", "rates", "lr_sweep", "epochs", "summary")
        for section in sections:
            self.report[section] = saved[section]
        if self.run.epoch < self.run.recipe.epochs:
            self.report["continued_in"].append(current_environment)
        # The seconds of earlier processes count, too, as if this one had begun earlier.
        self.started -= self.summary["total_seconds"]

    def update_summary(self, status):
        """Bring the summary up to date.

        A complete run that is started once more keeps the summary of its checkpoint.
        """
        if self.summary.get("status") == "complete":
            return
        self.summary.update(summarize_epochs(self.report["epochs"]))
        self.summary["status"] = status
        self.summary["total_seconds"] = time.perf_counter() - self.started

    def save_report(self):
        text = json.dumps(self.report, indent=1, allow_nan=False) + "\n"
        write_file(self.options.output, lambda file: file.write(text.encode()))

    def save_checkpoint(self):
        if self.options.checkpoint is not None:
            content = {"run": self.run.state(), "report": self.report}
            write_file(self.options.checkpoint, lambda file: torch.save(content, file))

    def save_trained_weights(self):
        if self.options.weights is not None:
            save_weights(self.options.weights, self.run, self.classes)
            print(f"weights  {self.options.weights}")

    def save_progress(self):
        """Save report and checkpoint of a run that goes on."""
        self.update_summary("running")
        save_all_or_warn(self.save_report, self.save_checkpoint)


def save_all(*saves):
    """Call each of `saves`. Return an error for each file that could not be written."""
    failures = []
    for save in saves:
        try:
            save()
        except UserError as error:  # the other files may still be written
            failures.append(error)
    return failures


def save_all_or_warn(*saves):
    """Call each of `saves`. Print a warning for each file that could not be written."""
    for failure in save_all(*saves):
        print(f"warning  {failure}")


# ---- Screen ---------------------------------------------------------------------------

class Screen:
    """A text stream like `stream`. If it cannot be written, the run goes on without it.

    The disk of a log file may be full, or Ctrl-C may have ended the `tee` that reads it.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        with contextlib.suppress(OSError):
            self.stream.flush()


def show_status(text):
    """Show `text` in place of the last line of a terminal or of a notebook's output.

    An empty text clears the line.
    """
    is_terminal = hasattr(sys.stdout, "isatty") and sys.stdout.isatty()
    if IN_NOTEBOOK or is_terminal:
        # One column less than the terminal has, because some begin a new line at the end.
        width = min(79, shutil.get_terminal_size().columns - 1)
        print(f"\r{text[:width]:<{width}}\r", end="", flush=True)


def progress_callback(run, sweeping=False):
    """Return an `on_step` that shows time left, step, loss and speed, at most once a second."""
    shown = time.perf_counter()
    started = None  # set in the first step

    def on_step(step, steps, lr, loss):
        nonlocal started, shown
        now = time.perf_counter()
        if step == 1:
            started = now  # the first step of an epoch may warm up, so it does not count
        elif now - shown > 1:
            shown = now
            steps_per_second = (step - 1) / (now - started)
            epochs_left = 0 if sweeping else run.recipe.epochs - run.epoch - 1
            seconds_left = (steps - step + steps * epochs_left) / steps_per_second
            images_per_second = steps_per_second * run.recipe.batch_size
            part = "sweep" if sweeping else f"epoch {run.epoch + 1}"
            time_left = timedelta(seconds=round(seconds_left))
            show_status(f"{time_left} left, {part}, step {step} of {steps}, "
                        f"loss {loss:.3f}, {images_per_second:,.0f} images/s")
    return on_step


def print_heading(report):
    """Print what is run, and on what."""
    options = report["config"]["options"]
    data = report["data"]
    environments = [report["environment"], *report["continued_in"]]
    environment = environments[-1]  # of the last process that trained
    constants = report["config"]["recipe"]
    recipe = RECIPES[options["recipe"]]
    changes = []
    for name, value in constants.items():
        # The line "data" has the batch size.
        if name != "batch_size" and value != getattr(recipe, name):
            changes.append(f"{name} {value}")
    print(f"recipe   {', '.join([options['recipe'], *changes])}\n"
          f"network  {report['parameters']:,} parameters, seed {options['seed']}\n"
          f"device   {environment['device']} ({environment['device_name']}), "
          f"{environment['precision']}, PyTorch {environment['torch']}\n"
          f"data     {data['train_images']:,} training images in batches of "
          f"{constants['batch_size']}, "
          f"{data['test_images']:,} {data['evaluated_on']}\n"
          f"report   {options['output']}")


def print_rates(report):
    """Print the learning rates, and how long the sweep was, if there was one."""
    constants = report["config"]["recipe"]
    rates = report["rates"]
    if report["lr_sweep"]:
        print(f"sweep    {len(report['lr_sweep']['lr'])} steps in "
              f"{report['summary']['sweep_seconds']:.1f} s")
    peak = ""
    if constants["epochs"]:
        peak_epoch = constants["peak_fraction"] * constants["epochs"]
        peak = f" at epoch {peak_epoch:.3g} of {constants['epochs']}"
    decay = "L2 term" if constants["l2"] else "weight decay"
    print(f"rates    LRMIN {rates['lr_min']:.3g}, LRMAX {rates['lr_max']:.3g}{peak}, "
          f"{decay} {rates['weight_decay']:.3g}")
    if rates["note"]:
        lines = rates["note"].replace(". ", ".\n         ")
        print(f"note     {lines}")


TABLE_HEADING = """\
       learning  training  training      test      test   epoch  images  elapsed
epoch      rate      loss  accuracy      loss  accuracy seconds /second  seconds"""
TABLE_ROW = ("{epoch:5}{lr:10.2g}{train_loss:10.4g}{train_accuracy:10.2%}"
             "{test_loss:10.4g}{test_accuracy:10.2%}{train_seconds:8.1f}"
             "{images_per_second:8,.0f}{elapsed_seconds:9.1f}")


def print_table(report):
    """Print the table's heading, and a row for each epoch trained so far."""
    if report["config"]["recipe"]["epochs"]:
        print(TABLE_HEADING)
    for row in report["epochs"]:
        print(TABLE_ROW.format(**row))


def print_summary(report):
    """Print the result of a run: accuracies, times, and when it reached the goals."""
    summary = report["summary"]
    print(f"final    {summary['final_test_accuracy']:.2%} of the "
          f"{report['data']['evaluated_on']}, "
          f"{summary['tta_test_accuracy']:.2%} with flip test-time augmentation\n"
          f"time     {summary['train_seconds']:.1f} s of training, "
          f"{summary['sweep_seconds']:.1f} s of sweep, "
          f"{summary['total_seconds']:.1f} s in all")
    for goal, epoch in summary["epochs_to"].items():
        if epoch:
            seconds = summary["seconds_to"][goal]
            print(f"to {float(goal):.0%}   epoch {epoch}, {seconds:.1f} s without sweep and "
                  "tests")


def print_runs(accuracies):
    """Print mean and spread of several runs' accuracies."""
    count = len(accuracies)
    deviation = statistics.stdev(accuracies)
    text = (f"{count} runs   mean {statistics.fmean(accuracies):.2%}, "
            f"standard deviation {deviation:.2%}, "
            f"standard error {deviation / math.sqrt(count):.2%}")
    goal = max(GOALS)
    reached = sum(accuracy >= goal for accuracy in accuracies)
    if reached:
        text += f", {reached} at {goal:.0%} or more"
    print(text)


# ---- Figures: next to the report, if matplotlib is installed --------------------------

def plot_sweep(figure, report):
    """Draw the loss over the learning rate, with LRMIN and LRMAX."""
    axes = figure.subplots()
    lrs = report["lr_sweep"]["lr"]
    smoothed = report["lr_sweep"]["smoothed_loss"]
    lr_min = report["rates"]["lr_min"]
    lr_max = report["rates"]["lr_max"]
    axes.semilogx(lrs, report["lr_sweep"]["loss"], ".-", color="tab:blue", alpha=0.3,
                  label="loss of a step")
    axes.semilogx(lrs, smoothed, color="tab:blue", label="smoothed")
    axes.axvline(lr_min, color="tab:green", linestyle="--", label=f"LRMIN {lr_min:.3g}")
    axes.axvline(lr_max, color="tab:red", linestyle="--", label=f"LRMAX {lr_max:.3g}")
    last = last_low_step(smoothed)
    axes.plot(lrs[last], smoothed[last], "o", color="tab:red",
              label="last rate before the rise")
    # After divergence, the loss is so high that all else would look flat.
    axes.set_ylim(top=min(axes.get_ylim()[1], 2 * smoothed[0]))
    axes.set_title("Learning-rate range sweep")
    axes.set_xlabel("learning rate (log scale)")
    axes.set_ylabel("loss")
    figure.legend(loc="outside lower center", ncols=2)


def plot_curves(figure, report):
    """Draw loss, accuracy and learning rate over the epochs."""
    from matplotlib.ticker import PercentFormatter
    options = report["config"]["options"]
    data = report["data"]
    rows = report["epochs"]
    epochs = [row["epoch"] for row in rows]
    figure.suptitle(
        f"Recipe {options['recipe']}, seed {options['seed']}, {data['train_images']:,} training "
        f"images: accuracy {rows[-1]['test_accuracy']:.2%} on the {data['evaluated_on']} after "
        f"epoch {epochs[-1]}")
    loss_axes, accuracy_axes, rate_axes = figure.subplots(1, 3)
    for axes, kind in ((loss_axes, "loss"), (accuracy_axes, "accuracy")):
        for split, label in (("train", "training images, augmented"),
                             ("test", data["evaluated_on"])):
            curve = [row[f"{split}_{kind}"] for row in rows]
            axes.plot(epochs, curve, marker=".", label=label)
    if rows[-1]["test_accuracy"] > min(GOALS):  # else 94% would be far above the curves
        goal = max(GOALS)
        accuracy_axes.axhline(goal, color="gray", linestyle=":", label=f"{goal:.0%}")
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1))
    plot_cycle(rate_axes, report)
    smoothing = report["config"]["recipe"]["label_smoothing"]
    title = f"Loss, with label smoothing {smoothing:g}" if smoothing else "Loss"
    loss_axes.set(title=title, ylabel="loss")
    accuracy_axes.set(title="Accuracy", ylabel="accuracy")
    loss_axes.legend()
    accuracy_axes.legend()
    for axes in (loss_axes, accuracy_axes, rate_axes):
        axes.set(xlabel="epoch", xlim=(0, len(rows) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)


def plot_cycle(axes, report):
    """Draw the learning rate over the epochs: its start, its peak and its end."""
    constants = report["config"]["recipe"]
    rates = report["rates"]
    peak_epoch = constants["peak_fraction"] * constants["epochs"]
    last_lr = rates["lr_min"] / constants["annihilation"]
    axes.plot([0, peak_epoch, constants["epochs"]], [rates["lr_min"], rates["lr_max"], last_lr])
    axes.set_ylim(bottom=0)
    axes.set(title="Learning rate", ylabel="learning rate")


def plot_images(figure, run, images, captions, columns, title):
    """Draw normalized images (N, 3, H, W) in a grid, each under its caption."""
    pixels = restore_images(images, run.mean, run.std).permute(0, 2, 3, 1).cpu().numpy()
    figure.suptitle(title)
    rows = math.ceil(len(images) / columns)
    grid = figure.subplots(rows, columns, squeeze=False,
                           subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    for axes, image, caption in zip(grid.flat, pixels, captions):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=8)


def plot_confusion(figure, run, probabilities, report, classes):
    """Draw a table: how many percent of each class are taken for each class."""
    labels = run.test.labels
    predicted = probabilities.argmax(1)
    count = len(classes)
    counts = torch.bincount(labels * count + predicted, minlength=count ** 2)
    counts = counts.reshape(count, count).cpu()
    percentages = (100 * counts / counts.sum(1, keepdim=True).clamp(min=1)).numpy()
    axes = figure.subplots()
    axes.imshow(percentages, cmap="Blues", vmin=0, vmax=100)
    for row, column in itertools.product(range(count), repeat=2):
        value = round(percentages[row, column].item(), 1)
        color = "white" if value > 50 else "black"
        axes.text(column, row, f"{value:g}", ha="center", va="center", color=color, fontsize=8)
    axes.set_xticks(range(count), classes, rotation=45, ha="right")
    axes.set_yticks(range(count), classes)
    axes.set(xlabel="taken for", ylabel="class")
    axes.set_title("Accuracy of each class, and its confusions,\n"
                   f"in percent of its {report['data']['evaluated_on']}")


def plot_misclassified(figure, run, probabilities, report, classes):
    """Draw the first ten images that the run classifies wrongly."""
    labels = run.test.labels
    probability, predicted = probabilities.max(1)
    misclassified = (predicted != labels).nonzero().flatten()[:10].tolist()
    captions = [f"{classes[labels[i]]}\ntaken for {classes[predicted[i]]}\n"
                f"with probability {probability[i]:.2f}" for i in misclassified]
    plot_images(figure, run, run.test.images[misclassified], captions, 5,
                f"The first misclassified {report['data']['evaluated_on']}")


def plot_augmented(figure, run, classes):
    """Draw the first training images of the first epoch."""
    images, labels = next(augmented_batches(run, 1))
    captions = [classes[label] for label in labels[:32]]
    plot_images(figure, run, images[:32], captions, 8, "Training images after augmentation")


def save_figure(report, name, size, plot, *content):
    """Let `plot` draw a figure; write it next to the report, and show it in a notebook."""
    from matplotlib.figure import Figure
    figure = Figure(size, dpi=120, layout="constrained")
    plot(figure, *content)
    stem, _ = split_ending(report["config"]["options"]["output"])
    path = f"{stem}-{name}.png"
    write_file(path, lambda file: figure.savefig(file, format="png"))
    print(f"figure   {path}")
    if IN_NOTEBOOK:
        from IPython.display import Image, display
        display(Image(filename=path))


def save_curves(report):
    """Write the figures that need the report alone."""
    if report["lr_sweep"]:
        save_figure(report, "sweep", (7, 4.5), plot_sweep, report)
    if report["epochs"]:
        save_figure(report, "curves", (13, 4.2), plot_curves, report)


def save_figures(report, run, classes):
    """Write all figures."""
    save_curves(report)
    if report["epochs"]:
        probabilities = predict_logits(run, run.test.images).softmax(1)
        content = (run, probabilities, report, classes)
        save_figure(report, "confusion", (7, 7), plot_confusion, *content)
        if (probabilities.argmax(1) != run.test.labels).any():
            save_figure(report, "misclassified", (9, 5), plot_misclassified, *content)
    save_figure(report, "augmented", (9, 5.8), plot_augmented, run, classes)


def try_to_draw(draw, *content):
    """Call `draw`. If it fails, print why figures are missing: the run is not lost."""
    try:
        draw(*content)
    except Exception as error:  # often, there is no matplotlib
        print(f"figures  missing: {error}")


# ---- Running --------------------------------------------------------------------------

def load_data(options):
    """Return training split, test split and class names, after --subset and --holdout."""
    if options.subset <= SAMPLE_IMAGES and SAMPLE.exists():
        print(f"sample   the images are those of {SAMPLE}")
        training, test, classes = load_sample()
    else:
        training, test, classes = load_cifar10(options.data_dir)
    training = take_images(training, slice(options.subset))
    test = take_images(test, slice(options.subset // 5))
    if options.holdout:
        test = take_images(training, slice(-options.holdout, None))
        training = take_images(training, slice(-options.holdout))
    return training, test, classes


def choose_rates(run, options):
    """Return the Rates of a run: those of the options, else those that a sweep finds."""
    if options.lr_max:
        rates = Rates(options.lr_max / LR_RATIO, options.lr_max)
    else:
        print("sweep    finds the learning rates")
        with warnings.catch_warnings():
            # `print_rates` shows the note.
            warnings.simplefilter("ignore", UncertainRates)
            rates = find_rates(run, progress_callback(run, sweeping=True))
        show_status("")
    if not options.lr_min:
        return rates
    if options.lr_min > rates.lr_max:
        raise UserError(f"--lr-min {options.lr_min:.3g} is above LRMAX {rates.lr_max:.3g}, "
                        "which the sweep found.\nGive a lower --lr-min, or none. "
                        f"--lr-max {rates.lr_max:.3g} skips the sweep.")
    return dataclasses.replace(rates, lr_min=options.lr_min)


def train_once(recipe, options, data):
    """Train one seed, or continue its checkpoint. Return the report.

    `data` is what `load_data` returns.
    """
    started = time.perf_counter()
    training, test, classes = data
    run = start_run(recipe, training, test, options.seed, options.device,
                    options.precision)
    recorder = Recorder(run, classes, options, started)
    if options.checkpoint is not None and Path(options.checkpoint).is_file():
        recorder.resume()
    for path in (options.checkpoint, options.weights):
        if path is not None:
            check_writable(path)  # now, before the training. The report is written below
    recorder.update_summary("running")
    recorder.save_report()
    print_heading(recorder.report)
    try:
        train_and_record(recorder)
    except BaseException as error:
        record_failure(recorder, error)
        raise
    finish_run(recorder)
    return recorder.report


def train_and_record(recorder):
    """Find the learning rates, train to the end, and keep report and checkpoint current.

    A continued run skips what its checkpoint has.
    """
    run = recorder.run
    report = recorder.report
    if report["rates"] is None:
        record_rates(recorder)
    print_rates(report)
    print_table(report)
    if run.epoch < run.recipe.epochs:
        rates = Rates(report["rates"]["lr_min"], report["rates"]["lr_max"])
        for row in train_epochs(run, rates, progress_callback(run)):
            report["epochs"].append(row)
            show_status("")
            recorder.save_progress()  # first: whoever sees the row may stop the run
            print(TABLE_ROW.format(**row))
    if report["epochs"] and recorder.summary["tta_test_accuracy"] is None:
        record_final_accuracy(recorder)


def record_rates(recorder):
    """Choose the learning rates, and save them."""
    started = time.perf_counter()
    rates = choose_rates(recorder.run, recorder.options)
    recorder.summary["sweep_seconds"] = time.perf_counter() - started
    recorder.report["rates"] = describe_rates(recorder.run, rates, recorder.options)
    recorder.report["lr_sweep"] = rates.sweep
    recorder.save_progress()


def record_final_accuracy(recorder):
    """Put the accuracy after the last epoch into the summary, without and with flip TTA."""
    last_row = recorder.report["epochs"][-1]
    recorder.summary["final_test_accuracy"] = last_row["test_accuracy"]
    with_tta = evaluate_run(recorder.run, tta=True)
    recorder.summary["tta_test_accuracy"] = with_tta["test_accuracy"]


def record_failure(recorder, error):
    """Save and print what a run has reached when an error or a signal ends it."""
    was_stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
    if was_stopped:
        status = "interrupted"
    elif isinstance(error, Diverged):
        status = "diverged"
    else:
        status = "failed"
    show_status("")
    recorder.update_summary(status)
    save_all_or_warn(recorder.save_report)
    if was_stopped:
        print_interruption(recorder.options)
    if recorder.options.figures:
        try_to_draw(save_curves, recorder.report)


def print_interruption(options):
    """Print where the epochs of an interrupted run are, and how it can be continued."""
    print(f"stopped  {options.output} has the epochs that were completed")
    if options.checkpoint is None:
        print("         to be able to continue a run, start it with --checkpoint FILE")
    elif Path(options.checkpoint).is_file():
        print(f"         the same command continues from {options.checkpoint}")
    else:
        print("         the same command begins anew, because no checkpoint was saved yet")


def finish_run(recorder):
    """Print the result, then write all files. Raise UserError if one cannot be written."""
    recorder.update_summary("complete")
    if recorder.report["epochs"]:
        print_summary(recorder.report)
    failures = save_all(recorder.save_report, recorder.save_checkpoint,
                        recorder.save_trained_weights)
    if recorder.options.figures:
        try_to_draw(save_figures, recorder.report, recorder.run, recorder.classes)
    if failures:
        raise UserError("\n".join(str(failure) for failure in failures))


def main(argv=()):
    """Run with these arguments, ["--epochs", "10"] or "--epochs 10".

    Return the report, a dictionary. With --runs above 1, return a list of reports.
    """
    recipe, options = parse_arguments(argv)
    data = load_data(options)
    reports = []
    try:
        for seed in range(options.seed, options.seed + options.runs):
            reports.append(train_once(recipe, options_of_seed(options, seed), data))
    finally:  # if a run fails or is stopped, those before it still count
        if len(reports) > 1 and recipe.epochs:
            print_runs([report["summary"]["final_test_accuracy"] for report in reports])
    return reports[0] if options.runs == 1 else reports


def run_process():
    """Run the script as a process: an error becomes a sentence and an exit code."""
    if not IN_NOTEBOOK:  # there, %run starts the script in the notebook's own process
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        if hasattr(sys.stdout, "reconfigure"):
            # The screen may lack letters of a file's name. A log file gets each line at
            # once.
            sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
        if sys.stdout is not None:  # pythonw has none
            sys.stdout = Screen(sys.stdout)
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        sys.exit("error: out of memory. Try a smaller --batch-size.")


if __name__ == "__main__":
    if IS_PASTED:
        # There, sys.argv is that of the notebook. For other options, call
        # main(["--epochs", "10"]) in the next cell.
        main()
    else:
        run_process()
