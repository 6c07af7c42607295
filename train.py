"""Train a small residual network on CIFAR-10 under the one-cycle policy.

    python train.py --epochs 24 --batch-size 512

How to read this file: it has two halves. The method comes first: recipe, data, augmentation,
model, run, one-cycle, sweep, evaluation and training. `train_step` takes one optimizer step;
the sweep (`find_rates`) and the training loop (`train_epochs`) call it. The program around
the method follows: command line, files, screen, figures, and `main`.
After `import train`, an experiment of your own calls `start_run`, `find_rates` and
`train_epochs`, as `main` does.
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import io
import json
import math
import numbers
import platform
import re
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
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity

# ==== THE METHOD ==========================================================================

# ---- Recipe: each field becomes an option of the command line ----------------------------

def recipe_field(default, allowed, help):
    """Return a field of Recipe; `allowed` is its lowest and highest value, or its names."""
    return dataclasses.field(default=default, metadata={"allowed": allowed, "help": help})


def check_value(name, value, kind, allowed):
    """Raise ValueError, with a sentence that begins with `name`, unless `value` is allowed."""
    if kind is str:
        valid, wanted = value in allowed, f"one of {', '.join(allowed)}"
    else:
        number = numbers.Integral if kind is int else numbers.Real
        valid = isinstance(value, number) and allowed[0] <= value <= allowed[1]
        wanted = f"{'an integer' if kind is int else 'a number'} from {allowed[0]} to {allowed[1]}"
    if not valid:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The constants of a run. `Recipe()` is the tuned recipe; RECIPES has the others, too.

    `Recipe(label_smoothing=0.1)` changes one. A value that is not allowed raises ValueError.
    """
    epochs: int = recipe_field(24, (0, 100_000), "passes over the training images")
    batch_size: int = recipe_field(512, (2, 50_000), "images in a step; fewer with --subset")
    peak_fraction: float = recipe_field(5 / 24, (0.0, 0.99), "part of the run before the peak")
    annihilation: float = recipe_field(1.0, (1.0, 1e9), "the last learning rate is LRMIN / this")
    # Adam's first beta moves against the learning rate.
    beta1: float = recipe_field(0.95, (0.0, 0.9999), "Adam's first beta at LRMIN")
    beta1_peak: float = recipe_field(0.85, (0.0, 0.9999), "Adam's first beta at LRMAX")
    beta2: float = recipe_field(0.999, (0.0, 0.999999), "Adam's second beta")
    # Adam divides a gradient by the root of its mean square plus epsilon. 0.01 is larger than
    # most of these roots, so Adam moves the weights almost as SGD with momentum would.
    epsilon: float = recipe_field(0.01, (1e-12, 1e3), "Adam's epsilon")
    # Weight decay as a time: at LRMAX, decay alone shrinks a weight to 1/e in this many epochs.
    # The same time suits all batch sizes and learning rates.
    decay_epochs: float = recipe_field(5.0, (0.0, 1e5), "time of weight decay, in epochs; 0: none")
    l2: float = recipe_field(0.0, (0.0, 1e3), "Adam's L2 term, in place of decay")
    label_smoothing: float = recipe_field(0.2, (0.0, 0.99), "share spread over all classes")
    # The weights are noisy while the learning rate is high. Their moving average (EMA) is not.
    ema_epochs: float = recipe_field(0.5, (0.0, 1e5), "time of the EMA, in epochs; 0: no EMA")
    # A learning rate that suits the convolutions is too large for the last layer.
    logit_scale: float = recipe_field(0.125, (1e-6, 1e6), "the logits are multiplied by this")
    initialization: str = recipe_field("identity", ("identity", "pytorch"), "identity: the "
                                       "first layer whitens, the others pass their input on")
    padding: int = recipe_field(4, (0, 16), "pixels on each side, before the random crop")
    padding_mode: str = recipe_field("reflect", ("reflect", "constant"), "fills the padding")
    flips: str = recipe_field("alternating", ("alternating", "random"), "horizontal flips")
    cutout: int = recipe_field(8, (0, 31), "side of the blanked square, in pixels")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, allowed = getattr(self, field.name), field.metadata["allowed"]
            check_value(field.name, value, type(field.default), allowed)
            # The class is frozen. The conversion makes numbers of NumPy Python's own.
            object.__setattr__(self, field.name, type(field.default)(value))


# "fast" shows each image only 12 times, so it augments less. A shorter run has a shorter EMA.
# "plain" is the recipe as it was handed out, with PyTorch's defaults where it is silent.
RECIPES = {
    "tuned": Recipe(),
    "fast": Recipe(epochs=12, padding=2, cutout=0, ema_epochs=0.25),
    "plain": Recipe(epsilon=1e-8, decay_epochs=0, label_smoothing=0, ema_epochs=0, logit_scale=1,
                    initialization="pytorch", padding_mode="constant", flips="random"),
}


class UserError(ValueError):
    """A failure whose message says what happened and what to do next."""


class Diverged(UserError):
    """The loss became NaN or infinite."""


# ---- Data: the whole data set on the device ----------------------------------------------

class Split(NamedTuple):
    """Images (N, 3, H, W) and their labels (N,), two tensors on one device."""
    images: torch.Tensor
    labels: torch.Tensor


def load_cifar10(data_dir):
    """Return CIFAR-10's training split, test split and class names; download it if necessary.

    The images are uint8 (N, 3, 32, 32), on the CPU. Raise UserError if a download fails or a
    file is damaged. (A. Krizhevsky, Learning Multiple Layers of Features, 2009.)
    """
    folder = Path(data_dir) / CIFAR10.base_folder
    checksums = dict([*CIFAR10.train_list, *CIFAR10.test_list,
                      (CIFAR10.meta["filename"], CIFAR10.meta["md5"])])
    if not all((folder / name).exists() for name in checksums):
        download_cifar10(Path(data_dir))
    for name, checksum in checksums.items():
        if not check_integrity(str(folder / name), checksum):
            raise UserError(f"{folder / name} is damaged: its checksum is wrong.\n"
                            f"Delete it and run again to download CIFAR-10 anew.")
    datasets = CIFAR10(data_dir, train=True), CIFAR10(data_dir, train=False)
    return *(Split(torch.from_numpy(dataset.data).permute(0, 3, 1, 2),
                   torch.tensor(dataset.targets)) for dataset in datasets), datasets[0].classes


def download_cifar10(data_dir):
    """Download CIFAR-10 into `data_dir`, or unpack the archive if it is there.

    The files are moved there at the end. So a failure leaves nothing half done, and two runs
    may download at the same time.
    """
    folder, archive = data_dir / CIFAR10.base_folder, data_dir / CIFAR10.filename
    timeout = socket.getdefaulttimeout()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=data_dir, prefix="download-") as scratch:
            if archive.exists():
                shutil.copy(archive, scratch)  # CIFAR10 downloads it only if it is damaged
            else:
                print(f"download CIFAR-10 (170 MB) from {CIFAR10.url} to {data_dir}.\n"
                      f"         You can also put that file at {archive} by hand.", flush=True)
            socket.setdefaulttimeout(30)  # seconds without an answer; torchvision sets none
            CIFAR10(scratch, download=True)
            for path in (Path(scratch) / CIFAR10.base_folder).iterdir():
                path.replace(folder / path.name)
    except Exception as error:  # network, archive and disk raise errors of many types
        for path in (folder, data_dir):
            with contextlib.suppress(OSError):
                path.rmdir()  # if it is empty
        raise UserError(f"could not get CIFAR-10 ({error}).\nPut {CIFAR10.url} at {archive} "
                        "by hand, or try the sample: python train.py --subset") from None
    finally:
        socket.setdefaulttimeout(timeout)


# Code that was pasted into a notebook has no __file__ and looks in the notebook's folder.
SAMPLE = Path(globals().get("__file__", "train.py")).resolve().parent / "data" / "sample.npz"


def load_sample():
    """Return the first 2,000 training and 400 test images in the form of `load_cifar10`."""
    with np.load(SAMPLE) as sample:
        return *(Split(torch.from_numpy(sample[f"{name}_images"]).permute(0, 3, 1, 2),
                       torch.from_numpy(sample[f"{name}_labels"]).long())
                 for name in ("train", "test")), sample["classes"].tolist()


def normalize_images(images, mean, std):
    """Return uint8 images (N, C, H, W) as floats: (images / 255 - mean) / std, both (C,)."""
    if images.dtype != torch.uint8:
        raise ValueError(f"images must be uint8, from 0 to 255, got {images.dtype}")
    mean, std = (values.to(images.device).view(1, -1, 1, 1) for values in (mean, std))
    return (images.float() / 255 - mean) / std


def memory_format(device):
    """Return the layout of images and weights that is fast and correct on `device`."""
    # Many versions of PyTorch get channels-last gradients on Apple GPUs wrong (#175189 there).
    return torch.contiguous_format if device == "mps" else torch.channels_last


def prepare_images(split, mean, std, device, dtype, padding=0, padding_mode="constant"):
    """Normalize and pad a Split on `device`: (N, C, H + 2 padding, W + 2 padding), `dtype`."""
    images = normalize_images(split.images.to(device), mean, std).to(dtype)
    if padding:
        images = F.pad(images, (padding,) * 4, mode=padding_mode)
    images = images.contiguous(memory_format=memory_format(device))
    return Split(images, split.labels.to(device).long())


def check_split(name, split, num_classes):
    """Raise ValueError, which names the split and the reason, if it cannot be trained on."""
    images, labels = split
    reason = None
    if images.dtype != torch.uint8 or images.ndim != 4:
        reason = f"images must be uint8 (N, C, H, W), got {images.dtype} {tuple(images.shape)}"
    elif not 0 < len(images) == len(labels):
        reason = f"each image needs a label, got {len(images)} images and {len(labels)} labels"
    elif labels.is_floating_point() or labels.min() < 0 or labels.max() >= num_classes:
        reason = f"labels must be whole numbers from 0 to {num_classes - 1}"
    elif (images.amax((0, 2, 3)) == images.amin((0, 2, 3))).any():
        reason = "a channel of the images is constant"
    if reason:
        raise ValueError(f"{name} split: {reason}")


# ---- Augmentation: tensor operations on a batch, with random draws for each image --------

def epoch_generator(seed, epoch, device):
    """Return the generator of an epoch's random numbers. A resumed run draws the same."""
    return torch.Generator(device).manual_seed(1_000_003 * seed + epoch)


def draw_flips(recipe, count, seed, epoch, device, generator):
    """Return which of `count` training images are mirrored in this epoch: booleans (count,).

    Alternating: half of the images, chosen once at random, are mirrored in odd epochs, the
    other half in even epochs (K. Jordan, arXiv:2404.00498, section 3.6).
    """
    if recipe.flips == "alternating":
        generator = epoch_generator(seed, 0, device)  # the same coins in every epoch
        return (torch.randint(2, (count,), generator=generator, device=device) + epoch) % 2 == 1
    return torch.randint(2, (count,), generator=generator, device=device) == 1


def crop_images(images, top, left, size):
    """Cut (B, C, size, size), channels-last, out of (B, C, H, W), each at its own corner."""
    span = torch.arange(size, device=images.device)
    image = torch.arange(len(images), device=images.device).view(-1, 1, 1)
    row = (top.view(-1, 1) + span).view(-1, size, 1)
    column = (left.view(-1, 1) + span).view(-1, 1, size)
    return images.permute(0, 2, 3, 1)[image, row, column].permute(0, 3, 1, 2)


def cut_holes(images, top, left, size):
    """Blank a square in each of (B, C, H, W) with the mean color, zero (arXiv:1708.04552)."""
    rows, columns = (torch.arange(n, device=images.device) for n in images.shape[-2:])
    in_rows = (rows >= top.view(-1, 1)) & (rows < top.view(-1, 1) + size)
    in_columns = (columns >= left.view(-1, 1)) & (columns < left.view(-1, 1) + size)
    hidden = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return torch.where(hidden, 0, images)  # masked_fill would lose the channels-last layout


def augment_images(recipe, padded, mirrored, generator):
    """Crop, flip and cut out: padded (B, C, S + 2 padding, S + 2 padding) to (B, C, S, S).

    Each image has a random crop and a random hole of its own, which lies inside the crop.
    """
    def draw(choices):
        return torch.randint(choices, (len(padded),), generator=generator, device=padded.device)
    size = padded.shape[-1] - 2 * recipe.padding
    corners, holes = 2 * recipe.padding + 1, size - recipe.cutout + 1
    images = crop_images(padded, draw(corners), draw(corners), size)
    images = torch.where(mirrored.view(-1, 1, 1, 1), images.flip(-1), images)
    return cut_holes(images, draw(holes), draw(holes), recipe.cutout)


def augmented_batches(recipe, training, seed, epoch):
    """Shuffle a padded Split and yield batches: augmented images (B, 3, H, W), labels (B,)."""
    images, labels = training
    generator = epoch_generator(seed, epoch, images.device)
    mirrored = draw_flips(recipe, len(labels), seed, epoch, images.device, generator)
    order = torch.randperm(len(labels), generator=generator, device=images.device)
    for chosen in order.split(recipe.batch_size):
        batch = augment_images(recipe, images[chosen], mirrored[chosen], generator)
        layout = memory_format(images.device.type)
        yield batch.contiguous(memory_format=layout), labels[chosen]


# ---- Model -------------------------------------------------------------------------------

class ConvBlock(nn.Sequential):
    """Convolution 3x3, max-pool 2 if `pool`, BatchNorm, ReLU; `pool` halves H and W."""

    def __init__(self, c_in, c_out, pool=False):
        super().__init__(
            nn.Conv2d(c_in, c_out, kernel_size=3, stride=1, padding=1, bias=False),
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
    """The custom ResNet of D. Page, How to Train Your ResNet (Myrtle.ai, 2018).

    It has 6,573,130 parameters and turns images (B, 3, 32, 32) into logits (B, 10). With the
    "identity" initialization, every convolution but the first one begins by passing its input
    on. So the untrained network already carries the image to its last layer (K. Jordan,
    arXiv:2404.00498, section 3.3).
    """

    def __init__(self, recipe=Recipe(), num_classes=10):
        super().__init__()
        self.prep = ConvBlock(3, 64)  # (B, 64, 32, 32)
        self.layer1 = nn.Sequential(ConvBlock(64, 128, pool=True), ResBlock(128))  # 16 x 16
        self.layer2 = ConvBlock(128, 256, pool=True)  # (B, 256, 8, 8)
        self.layer3 = nn.Sequential(ConvBlock(256, 512, pool=True), ResBlock(512))  # 4 x 4
        self.pool = nn.Sequential(nn.MaxPool2d(4), nn.Flatten())  # (B, 512)
        self.head = nn.Linear(512, num_classes)
        self.logit_scale = recipe.logit_scale
        if recipe.initialization == "identity":
            for module in self.modules():
                if isinstance(module, nn.Conv2d) and module is not self.prep[0]:
                    nn.init.dirac_(module.weight[:module.in_channels])

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.prep(x))))
        return self.head(self.pool(x)) * self.logit_scale


@torch.no_grad()
def whiten_patches(model, images):
    """Set the first convolution so that it whitens the 3x3 patches of images (N, 3, H, W).

    27 filters become the eigenvectors of the patches' covariance, each divided by the root of
    its eigenvalue (D. Page, How to Train Your ResNet 8, 2019). 27 more are their negatives,
    because ReLU keeps one side of each (tysam-code, hlb-CIFAR10). The other 10 stay random.
    """
    patches = F.unfold(images.float().cpu(), 3)  # (N, 27, positions)
    variances, directions = torch.linalg.eigh(torch.cov(patches.transpose(0, 1).flatten(1)))
    # Directions with almost no variance are noise; 0.01 keeps whitening from amplifying them.
    filters = (directions / (variances + 0.01).sqrt()).T.reshape(27, 3, 3, 3)
    model.prep[0].weight[:54].copy_(torch.cat([filters, -filters]))


# ---- Run: a model on a device, with what trains it; one step -----------------------------

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclasses.dataclass
class Run:
    """A model, what trains it, and how far it has come. `start_run` makes one."""
    recipe: Recipe
    seed: int
    device: str
    dtype: torch.dtype  # of convolutions and matrix products; the weights are fp32
    mean: torch.Tensor  # (3,), of the training images, which are normalized with it
    std: torch.Tensor  # (3,)
    training: Split  # padded
    test: Split
    model: nn.Module  # is trained
    averaged: nn.Module  # is evaluated: its weights are a moving average of the model's
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # in fp16 it scales the loss, or small gradients would vanish
    epoch: int = 0  # epochs trained
    seconds: float = 0.0  # of data preparation and training; evaluation does not count
    mid_epoch: bool = False  # an epoch was begun and did not end
    graph: nn.Module = None  # the model as a CUDA graph, see `capture_graph`

    @property
    def steps_per_epoch(self):
        return math.ceil(len(self.training.labels) / self.recipe.batch_size)

    def autocast(self):
        return torch.autocast(self.device, self.dtype, enabled=self.dtype != torch.float32,
                              cache_enabled=False)  # a CUDA graph must not hold cached weights

    def state(self):
        """Return all that training changes. The tensors are not copied."""
        return {"model": self.model.state_dict(), "averaged": self.averaged.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "epoch": self.epoch, "seconds": self.seconds}

    def load_state(self, state):
        """Restore a `state()`."""
        for part in ("model", "averaged", "optimizer", "scaler"):
            getattr(self, part).load_state_dict(state[part])
        self.epoch, self.seconds, self.mid_epoch = state["epoch"], state["seconds"], False
        self.optimizer.zero_grad(set_to_none=True)  # the gradients belong to the old weights


def choose_device(device="auto", precision="auto"):
    """Return the device and the precision of a run, or raise ValueError if they are not there.

    "auto" is the fastest device, and bf16 if it has instructions for it, else fp16 on NVIDIA
    GPUs and fp32 elsewhere. Without instructions for it, a precision is far slower than fp32.
    """
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    device = next(name for name in found if found[name]) if device == "auto" else device
    if not found.get(device):
        raise ValueError(f"device {device}: PyTorch finds no such device. Try cpu")
    known = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch 2.7 does not have it
    fast = {"cpu": known.get("avx512_bf16") or known.get("amx_bf16"), "mps": False,
            "cuda": found["cuda"] and torch.cuda.is_bf16_supported(including_emulation=False)}
    if precision == "auto":
        precision = "bf16" if fast[device] else "fp16" if device == "cuda" else "fp32"
    check_value("precision", precision, str, tuple(DTYPES))
    return device, precision


def start_run(recipe, training, test, seed=0, device="auto", precision="auto", model=None,
              num_classes=10):
    """Return a Run that has not trained yet. A seed gives the same weights on every device.

    The Splits are of uint8 images (N, 3, 32, 32), or of what your own `model` takes, which
    keeps its initialization. `device` is cuda, mps or cpu, `precision` fp32, bf16 or fp16;
    `choose_device` says what "auto" is. Raise ValueError for what cannot be trained.
    """
    check_split("training", training, num_classes)
    check_split("test", test, num_classes)
    if model is None and not training.images.shape[1:] == test.images.shape[1:] == (3, 32, 32):
        raise ValueError("the built-in network takes images of 3 x 32 x 32; give a `model`")
    device, precision = choose_device(device, precision)
    dtype = DTYPES[precision]
    torch.backends.cudnn.benchmark = dtype != torch.bfloat16  # for bf16, see capture_graph
    if device == "cpu" and sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        # glibc then keeps freed memory for the next step, and a step gets a fifth faster.
        ctypes.CDLL(None).mallopt(-1, -1)  # M_TRIM_THRESHOLD: never return the end of the heap
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: take large blocks from the heap, too
    whiten = model is None and recipe.initialization == "identity"
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # keep the caller's random state
        torch.default_generator.manual_seed(seed)
        model = model or ResNet(recipe, num_classes)
    model.to(device, memory_format=memory_format(device))
    # Decoupled weight decay spares biases and BatchNorms.
    groups = [{"params": [parameter for parameter in model.parameters()
                          if (parameter.ndim > 1) == decays], "decays": decays}
              for decays in (True, False)]
    optimizer = torch.optim.Adam(groups, betas=(recipe.beta1_peak, recipe.beta2),
                                 eps=recipe.epsilon, weight_decay=recipe.l2,
                                 decoupled_weight_decay=not recipe.l2, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)

    started = time.perf_counter()
    std, mean = torch.std_mean(training.images.float() / 255, dim=(0, 2, 3), correction=0)
    training = prepare_images(training, mean, std, device, dtype, recipe.padding,
                              recipe.padding_mode)
    test = prepare_images(test, mean, std, device, dtype)
    if whiten:
        whiten_patches(model, training.images[:1000])
    test.images[-1].sum().item()  # reading a value waits for a GPU: the seconds are right
    seconds = time.perf_counter() - started
    return Run(recipe, seed, device, dtype, mean, std, training, test, model,
               copy.deepcopy(model), optimizer, scaler, seconds=seconds)


def begin_training(run):
    """Prepare the model for steps, or raise ValueError if they would not train it correctly."""
    if run.mid_epoch:
        raise ValueError("an epoch of this run was interrupted; go back to a saved state()")
    held = {id(values) for group in run.optimizer.param_groups for values in group["params"]}
    if not held.issuperset(map(id, run.model.parameters())):
        raise ValueError("the optimizer does not hold all parameters of the model")
    run.model.train()
    run.graph = None  # frees the memory of an earlier graph
    run.graph = capture_graph(run)


def capture_graph(run):
    """Return the ResNet as a CUDA graph for full batches, or None if the run goes without one.

    A step starts some 300 GPU kernels one by one, and a fast GPU waits for that. The graph
    starts those of a forward or backward pass at once. A GPU without bf16 does not wait.
    """
    if (run.device, run.dtype, type(run.model)) != ("cuda", torch.bfloat16, ResNet):
        return None
    images, _ = next(augmented_batches(run.recipe, run.training, run.seed, 0))
    before = copy.deepcopy(run.model.state_dict())
    # The capture has a stream of its own. PyTorch warns of that, but here it costs nothing.
    warnings.filterwarnings("ignore", "The AccumulateGrad node's stream")
    # nn.Sequential, because the capture replaces the `forward` of the module it is given.
    with run.autocast(), torch.backends.cudnn.flags(enabled=True, benchmark=True):
        graph = torch.cuda.make_graphed_callables(nn.Sequential(run.model), (images,))
    run.model.load_state_dict(before)  # warm-up steps have moved BatchNorm's statistics
    return graph


def train_step(run, images, labels, lr, beta1):
    """Take one optimizer step on images (B, C, H, W) with their labels (B,).

    Return the batch's loss before the step and its number of correct predictions. They stay
    tensors: converting them to numbers would make a GPU wait. An optimizer of your own gets
    `beta1` as its momentum; a group's learning rate is `lr` times its "lr_factor", if any.
    """
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1)
        if "betas" in group:
            group["betas"] = beta1, group["betas"][1]
        elif group.get("momentum"):
            group["momentum"] = beta1
    full = len(images) == run.recipe.batch_size
    with run.autocast():
        logits = run.graph(images) if run.graph and full else run.model(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=run.recipe.label_smoothing)
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    return loss.detach(), (logits.detach().argmax(1) == labels).sum()


def average_weights(run, step):
    """Update the EMA after `step` (from 1). In the first `ema_epochs` it is a plain mean."""
    memory = min(step, max(1, run.recipe.ema_epochs * run.steps_per_epoch))
    averages, latest = ([values for values in module.state_dict().values()
                         if values.is_floating_point()] for module in (run.averaged, run.model))
    get_ema_multi_avg_fn(1 - 1 / memory)(averages, latest, None)


# ---- One-cycle ---------------------------------------------------------------------------

class Rates(NamedTuple):
    """The learning rates of a run: the ends and the peak of its cycle."""
    lr_min: float
    lr_max: float
    sweep: dict = None  # the record of the sweep that found them, see `find_rates`


def one_cycle(step, total_steps, start, peak, end, peak_fraction):
    """Return a value that changes linearly from `start` to `peak` and then to `end`.

    Steps count from 0. As in PyTorch's OneCycleLR, the last step of the rise has the value
    `peak`, and the last step of the run has `end` (L. Smith, arXiv:1803.09820, section 4).
    """
    last_step, peak_step = total_steps - 1, peak_fraction * total_steps - 1
    if step < peak_step:
        return start + (peak - start) * (step / peak_step)
    return end + (peak - end) * ((last_step - step) / (last_step - peak_step))


def scheduled_rates(recipe, rates, step, steps_per_epoch):
    """Return the learning rate and Adam's first beta at a step of the run, counted from 0."""
    total, fraction = recipe.epochs * steps_per_epoch, recipe.peak_fraction
    lr_end = rates.lr_min / recipe.annihilation
    return (one_cycle(step, total, rates.lr_min, rates.lr_max, lr_end, fraction),
            one_cycle(step, total, recipe.beta1, recipe.beta1_peak, recipe.beta1, fraction))


def weight_decay(recipe, lr_max, steps_per_epoch):
    """Return Adam's weight decay: `recipe.l2`, or the one with the time `recipe.decay_epochs`.

    A step multiplies a weight by 1 - learning rate * decay. So the weights are a moving average
    of their updates, with this time constant (X. Wang and L. Aitchison, arXiv:2405.13698).
    """
    if recipe.l2 or not recipe.decay_epochs:
        return recipe.l2
    # In less than 100 steps, weights would shrink faster than BatchNorm's statistics follow.
    return 1 / (max(recipe.decay_epochs * steps_per_epoch, 100) * lr_max)


# ---- Learning-rate range sweep -----------------------------------------------------------

LR_RATIO = 300  # LRMAX / LRMIN
SWEEP_EPOCH = 900_000  # number of the sweep's first epoch: training draws none of its batches


def find_rates(run, on_step=None):
    """Train while the learning rate rises exponentially, and find LRMAX from the losses.

    Return Rates, whose `sweep` has the lists `lr`, `loss` and `smoothed_loss`. Afterwards the
    run is as before. `on_step(step, steps, learning rate, loss)` is called after each step.
    Raise UserError if the loss never falls. (L. Smith, arXiv:1506.01186, section 3.3.)
    """
    first, last, epoch_steps = 1e-6, 1.0, run.steps_per_epoch
    # 200 steps, but at least one epoch and at most two. Fewer than 8 would be too coarse.
    steps = max(epoch_steps, min(200, 2 * epoch_steps), 8)
    lrs = [first * (last / first) ** (step / (steps - 1)) for step in range(steps)]
    steps_per_decade = (steps - 1) / math.log10(last / first)
    batches = (batch for epoch in range(SWEEP_EPOCH, SWEEP_EPOCH + steps)
               for batch in augmented_batches(run.recipe, run.training, run.seed, epoch))
    before = copy.deepcopy(run.state())
    window, lowest, losses = max(1, round(steps_per_decade / 2)), math.inf, []
    begin_training(run)
    try:
        for lr, (images, labels) in zip(lrs, batches):
            loss, _ = train_step(run, images, labels, lr, run.recipe.beta1_peak)
            if not math.isfinite(loss.item()):
                break
            losses.append(loss.item())
            if on_step:
                on_step(len(losses), steps, lr, loss)
            # Stop when training has clearly diverged; larger rates would only cost time.
            recent = statistics.fmean(losses[-window:])
            if len(losses) >= window:
                lowest = min(lowest, recent)
                if recent > 1.5 * lowest:
                    break
    finally:
        run.load_state(before)
    lrs, smoothed = lrs[:len(losses)], smooth_losses(losses, steps_per_decade)
    return Rates(*read_sweep(lrs, smoothed),
                 {"lr": lrs, "loss": losses, "smoothed_loss": smoothed})


def smooth_losses(losses, steps_per_decade):
    """Return a list's moving average from half to twice each learning rate, taken twice."""
    half = round(steps_per_decade * math.log10(2))
    for _ in range(2):
        losses = [statistics.fmean(losses[max(0, i - half):i + half + 1])
                  for i in range(len(losses))]
    return losses


def read_sweep(lrs, smoothed):
    """Return LRMIN and LRMAX. Raise UserError if the loss never falls or is NaN.

    After the smoothed loss reaches its minimum, find the last learning rate before it rises
    more than 3% above that minimum. LRMAX is twice that rate, because smoothing makes the rise
    appear too early. Everything after the first rise is ignored.
    """
    lowest = smoothed.index(min(smoothed)) if smoothed else 0
    if lowest == 0:
        raise UserError("the sweep found no learning rate at which the loss falls.\n"
                        "Choose LRMAX yourself (--lr-max) to train without a sweep.")
    rise = next((i for i in range(lowest + 1, len(smoothed))
                 if smoothed[i] > 1.03 * smoothed[lowest]), len(smoothed))
    lr_max = min(2 * lrs[rise - 1], lrs[-1])
    return lr_max / LR_RATIO, lr_max


# ---- Evaluation and training -------------------------------------------------------------

@torch.inference_mode()
def predict_logits(run, images, tta=False):
    """Return the averaged model's logits (N, 10); `tta` averages in those of mirror images."""
    if tta:
        return (predict_logits(run, images) + predict_logits(run, images.flip(-1))) / 2
    run.averaged.eval()
    with run.autocast():
        return torch.cat([run.averaged(batch).float() for batch in images.split(2000)])


def evaluate_run(run, tta=False):
    """Return `test_loss` (with label smoothing), `test_accuracy` and `test_seconds`."""
    started = time.perf_counter()
    logits, labels = predict_logits(run, run.test.images, tta), run.test.labels
    loss = F.cross_entropy(logits, labels, label_smoothing=run.recipe.label_smoothing).item()
    return {"test_loss": loss,
            "test_accuracy": (logits.argmax(1) == labels).sum().item() / len(labels),
            "test_seconds": time.perf_counter() - started}


def train_epochs(run, rates, on_step=None):
    """Train `run` to the end of its recipe; yield metrics and timings after each epoch.

    This is a generator: loop over it. It continues after the last epoch that was completed.
    `on_step(step, steps, learning rate, loss)` is called after each step; reading the loss, a
    tensor, makes a GPU wait. Raise Diverged if a loss is NaN or infinite.
    """
    recipe, steps, image_count = run.recipe, run.steps_per_epoch, len(run.training.labels)
    if not 0 < rates.lr_min <= rates.lr_max:
        raise UserError(f"LRMIN {rates.lr_min:.3g} must be above 0 and at most LRMAX, which is "
                        f"{rates.lr_max:.3g}")
    for group in run.optimizer.param_groups:
        if group.get("decays"):
            group["weight_decay"] = weight_decay(recipe, rates.lr_max, steps)
    started = time.perf_counter()
    begin_training(run)
    while run.epoch < recipe.epochs:
        run.mid_epoch = True
        losses, correct = [], 0
        for images, labels in augmented_batches(recipe, run.training, run.seed, run.epoch + 1):
            step = run.epoch * steps + len(losses)
            lr, beta1 = scheduled_rates(recipe, rates, step, steps)
            loss, right = train_step(run, images, labels, lr, beta1)
            average_weights(run, step + 1)
            losses.append(loss)
            correct += right
            if on_step:
                on_step(len(losses), steps, lr, loss)
        losses = torch.stack(losses).cpu().double()  # only here does a GPU have to finish
        seconds = time.perf_counter() - started
        metrics = evaluate_run(run)
        if not math.isfinite(losses.sum() + metrics["test_loss"]):
            raise Diverged(f"the loss became NaN or infinite in epoch {run.epoch + 1}.\nTry a "
                           "lower LRMAX (--lr-max) or full precision (--precision fp32).")
        run.epoch, run.seconds, run.mid_epoch = run.epoch + 1, run.seconds + seconds, False
        sizes = [len(batch) for batch in run.training.labels.split(recipe.batch_size)]
        train_loss = losses @ losses.new_tensor(sizes) / image_count
        yield {"epoch": run.epoch, "lr": lr, "train_loss": train_loss.item(),
               "train_accuracy": correct.item() / image_count, "train_seconds": seconds,
               "images_per_second": image_count / seconds, **metrics,
               "elapsed_seconds": run.seconds}
        started = time.perf_counter()


# ==== THE PROGRAM =========================================================================

FORMAT = 2  # version of reports, checkpoints and weights
TRAIN_IMAGES = 50_000  # in CIFAR-10

# ---- Command line ------------------------------------------------------------------------

def make_parser():
    """Return the parser of the command line. Each field of Recipe is an option."""
    parser = argparse.ArgumentParser(prog="train.py", usage="%(prog)s [options]",
                                     description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--recipe", choices=list(RECIPES), default="tuned",
        help="fast: half as many epochs; plain: without our additions")
    add("--lr-max", type=float, metavar="X", help="peak learning rate; else a sweep finds it")
    add("--lr-min", type=float, metavar="X", help=f"lowest learning rate; else LRMAX / {LR_RATIO}")
    add("--seed", type=int, default=0, metavar="N", help="seed of all random numbers")
    add("--runs", type=int, default=1, metavar="N", help="train N seeds in turn, from --seed on")
    add("--subset", type=int, nargs="?", const=2000, metavar="N",
        help="use the first N training images (2000 without N) and N/5 test images")
    add("--holdout", type=int, default=0, metavar="N",
        help="for tuning: evaluate on the last N training images instead of training on them")
    add("--data-dir", default="data", metavar="DIR", help="folder of CIFAR-10 (default: data)")
    add("--device", choices=["auto", "cuda", "mps", "cpu"], default="auto", help="auto: fastest")
    add("--precision", choices=["auto", *DTYPES], default="auto",
        help="auto: bf16 if the device is fast at it, else fp16 on NVIDIA GPUs, else fp32")
    add("--checkpoint", metavar="FILE", help="save here after each epoch; continue from there")
    add("--weights", metavar="FILE", help="save the trained weights here")
    add("--output", metavar="FILE",
        help="report to write, in JSON; else next to the checkpoint or a new file in results/")
    add("--no-figures", action="store_false", dest="figures", help="draw no figures")
    group = parser.add_argument_group(
        "recipe", f"constants of the recipe; defaults of {' / '.join(RECIPES)} if they differ")
    for field in dataclasses.fields(Recipe):
        kind = type(field.default)
        values = [format(getattr(recipe, field.name), ".4g" if kind is float else "")
                  for recipe in RECIPES.values()]
        shown = " / ".join(values if len(set(values)) > 1 else values[:1])
        group.add_argument(f"--{field.name.replace('_', '-')}", type=kind,
                           metavar={int: "N", float: "X", str: "NAME"}[kind],
                           default=argparse.SUPPRESS,
                           help=f"{field.metadata['help']} (default: {shown})")
    return parser


def parse_arguments(argv=None):
    """Return the recipe and the other options; invalid ones end the process with code 2."""
    parser = make_parser()
    options = parser.parse_args(argv)
    options.command = shlex.join(["train.py", *(sys.argv[1:] if argv is None else argv)])
    given = {field.name: vars(options).pop(field.name) for field in dataclasses.fields(Recipe)
             if hasattr(options, field.name)}
    images = options.subset or TRAIN_IMAGES
    bounds = {"seed": (0, 2**32 - 1), "runs": (1, 1000), "subset": (5, TRAIN_IMAGES),
              "holdout": (0, images - 2), "lr_max": (1e-30, 1e30),
              "lr_min": (1e-30, options.lr_max or 1e30)}
    try:
        for name, allowed in bounds.items():
            if getattr(options, name) is not None:
                check_value(name, getattr(options, name), type(allowed[0]), allowed)
        images -= options.holdout
        # Few images take smaller batches: an epoch of few steps learns nothing.
        given.setdefault("batch_size", min(Recipe.batch_size, max(16, images // 32), images))
        recipe = dataclasses.replace(RECIPES[options.recipe], **given)
        check_value("batch_size", recipe.batch_size, int, (2, images))
        choose_device(options.device, options.precision)  # raises if they are not there
    except ValueError as error:
        parser.error(str(error))
    name = options.checkpoint or f"results/{datetime.now():%Y%m%d-%H%M%S-%f}"
    options.output = options.output or str(Path(name).with_suffix(".json"))
    files = list(map(Path, filter(None, [options.output, options.checkpoint, options.weights])))
    if len(set(map(Path.resolve, files))) < len(files):
        parser.error("output, checkpoint and weights must be different files")
    return recipe, options


def load_images(options):
    """Return what `load_cifar10` returns, or the sample, after --subset and --holdout."""
    folder = Path(options.data_dir).expanduser()
    folder = folder.parent if folder.name == CIFAR10.base_folder else folder
    found = any((folder / name).exists() for name in (CIFAR10.base_folder, CIFAR10.filename))
    count = options.subset or TRAIN_IMAGES
    use_sample = count <= 2000 and not found and SAMPLE.exists()
    if use_sample:
        print(f"sample   {SAMPLE} has the images, so CIFAR-10 is not downloaded")
    training, test, classes = load_sample() if use_sample else load_cifar10(folder)
    training = Split(*(values[:count] for values in training))
    test = Split(*(values[:count // 5] for values in test))
    if options.holdout:
        test = Split(*(values[-options.holdout:] for values in training))
        training = Split(*(values[:-options.holdout] for values in training))
    return training, test, classes


# ---- Files: report (JSON), checkpoint, weights -------------------------------------------

def write_file(path, save):
    """Write what `save(file)` writes, whole or not at all. Raise UserError if that fails."""
    content, target = io.BytesIO(), Path(path).resolve()  # symbolic links are kept
    save(content)
    try:
        if target.exists() and not target.is_file():
            raise OSError("it is not a regular file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, suffix=".tmp") as scratch:
            temporary = Path(scratch) / target.name
            temporary.write_bytes(content.getbuffer())
            temporary.replace(target)
    except OSError as error:
        raise UserError(f"cannot write {path} ({error}).\nChoose another file.") from None


def save_weights(path, run, classes):
    """Write a ResNet's weights and all else that is needed to classify images."""
    content = {"format": FORMAT, "recipe": dataclasses.asdict(run.recipe), "classes": classes,
               "weights": run.averaged.state_dict(), "mean": run.mean, "std": run.std}
    write_file(path, lambda file: torch.save(content, file))


def load_weights(path, device="cpu"):
    """Return the model, mean, std and class names from a file of `--weights`.

    The model takes `normalize_images(images, mean, std)` of uint8 images (N, 3, 32, 32).
    """
    saved = torch.load(path, map_location=device, weights_only=True)
    model = ResNet(Recipe(**saved["recipe"]), len(saved["classes"]))
    model.to(device, memory_format=memory_format(device)).load_state_dict(saved["weights"])
    return model.eval().requires_grad_(False), saved["mean"], saved["std"], saved["classes"]


def script_commit():
    """Return the git commit that last changed this file, with a + if it has changed since."""
    def ask_git(*arguments):
        script = Path(__file__).resolve()
        return subprocess.run(["git", *arguments, "--", script.name], cwd=script.parent,
                              capture_output=True, text=True, check=True).stdout.strip()
    with contextlib.suppress(NameError, OSError, subprocess.CalledProcessError):  # no git
        return ask_git("log", "-1", "--format=%h") + "+" * bool(ask_git("status", "--porcelain"))


def peak_memory(device):
    """Return the most memory used so far, in bytes: of an NVIDIA GPU, else of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_reserved()
    with contextlib.suppress(ImportError):  # on Windows
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else 1024 * peak


def new_report(options, run):
    """Return the report of a run that has not trained."""
    cpu_name = getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name")
    return {
        "format": FORMAT,
        "config": {"recipe": dataclasses.asdict(run.recipe), "options": dict(vars(options))},
        "environment": {
            "date": datetime.now().astimezone().isoformat(timespec="seconds"),
            "commit": script_commit(), "system": platform.platform(),
            "python": platform.python_version(), "torch": str(torch.__version__),
            "torchvision": torchvision.__version__, "numpy": np.__version__,
            "cudnn": torch.backends.cudnn.version(), "device": run.device,
            "device_name": (torch.cuda.get_device_name() if run.device == "cuda"
                            else cpu_name or platform.processor() or platform.machine()),
            "precision": next(name for name in DTYPES if DTYPES[name] == run.dtype),
            "threads": torch.get_num_threads()},
        "data": {"train_images": len(run.training.labels), "test_images": len(run.test.labels),
                 "evaluated_on": ("held-out training" if options.holdout else "test") + " images",
                 "mean": run.mean.tolist(), "std": run.std.tolist()},
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "rates": None, "lr_sweep": None, "epochs": [],
        "summary": {"final_test_accuracy": None, "tta_test_accuracy": None, "sweep_seconds": 0.0,
                    "preprocess_seconds": run.seconds, "total_seconds": 0.0}}


def summarize_epochs(rows, images):
    """Return the part of a summary that follows from epochs with so many training images."""
    seconds = sum(row["train_seconds"] for row in rows)
    first = {f"{goal:.2f}": next((row for row in rows if row["test_accuracy"] >= goal), {})
             for goal in (0.90, 0.94)}
    return {"train_seconds": seconds,
            "images_per_second": len(rows) * images / seconds if rows else None,
            "seconds_to": {goal: row.get("elapsed_seconds") for goal, row in first.items()},
            "epochs_to": {goal: row.get("epoch") for goal, row in first.items()}}


def load_checkpoint(path, run, report):
    """Bring `run` and `report` to where the checkpoint was saved, or raise UserError."""
    def settings_of(report):  # this must be the same in both runs
        values = {**report["config"]["options"], **report["data"], **report["environment"]}
        names = "seed lr_max lr_min train_images test_images evaluated_on device precision"
        return {**report["config"]["recipe"], **{name: values[name] for name in names.split()}}
    try:
        saved = torch.load(path, map_location=run.device, weights_only=True)
        then, now = settings_of(saved["report"]), settings_of(report)
        wrong = [f"{name} {then[name]}, not {now[name]}" for name in now
                 if then[name] != now[name]]
        if not wrong:
            run.load_state(saved["run"])
            for section in ("rates", "lr_sweep", "epochs", "summary"):
                report[section] = saved["report"][section]
    except Exception as error:  # a damaged file raises errors of many types
        wrong = [f"something else than a run ({type(error).__name__})"]
    if wrong:
        raise UserError(f"{path} is a checkpoint of {'; '.join(wrong)}.\n"
                        f"Delete it or choose another --checkpoint.")


# ---- Screen ------------------------------------------------------------------------------

IN_NOTEBOOK = "ipykernel" in sys.modules  # this process is the kernel of a notebook


def show_status(text):
    """Show `text` in place of the last line of a terminal or of a notebook's output."""
    if IN_NOTEBOOK or getattr(sys.stdout, "isatty", bool)():
        width = shutil.get_terminal_size().columns - 1  # a longer text would start a new line
        print(f"\r{text[:width]:<{width}}\r", end="", flush=True)


def show_progress(run, sweeping=False):
    """Return an `on_step` that shows step, loss, speed and time left once a second."""
    started = shown = time.perf_counter()

    def on_step(step, steps, lr, loss):
        nonlocal started, shown
        now = time.perf_counter()
        if step == 1:
            started = now  # the first step of an epoch may warm up, so it does not count
        elif now - shown > 1:
            shown, speed = now, (step - 1) / (now - started)
            epochs_left = 0 if sweeping else run.recipe.epochs - run.epoch - 1
            left = round((steps - step + steps * epochs_left) / speed)
            show_status(f"{'sweep' if sweeping else f'epoch {run.epoch + 1}'}, step {step} of "
                        f"{steps}, learning rate {lr:.1e}, loss {loss:.3f}, "
                        f"{speed * run.recipe.batch_size:,.0f} images/s, "
                        f"{left // 60}:{left % 60:02} left")
    return on_step


def print_heading(report):
    """Print what is run, and on what."""
    recipe, options = report["config"]["recipe"], report["config"]["options"]
    data, environment = report["data"], report["environment"]
    changed = [f", {name} {value}" for name, value in recipe.items()
               if value != getattr(RECIPES[options["recipe"]], name)]
    print(f"recipe   {options['recipe']}{''.join(changed)}\n"
          f"network  {report['parameters']:,} parameters, seed {options['seed']}\n"
          f"device   {environment['device']} ({environment['device_name']}), "
          f"{environment['precision']}, PyTorch {environment['torch']}\n"
          f"data     {data['train_images']:,} training images, "
          f"{data['test_images']:,} {data['evaluated_on']}\n"
          f"report   {options['output']}")


TABLE_HEADING = """\
       learning  training  training      test      test   epoch  images    total
epoch      rate      loss  accuracy      loss  accuracy seconds /second  seconds"""
TABLE_ROW = ("{epoch:5}{lr:10.2g}{train_loss:10.4g}{train_accuracy:10.2%}{test_loss:10.4g}"
             "{test_accuracy:10.2%}{train_seconds:8.1f}{images_per_second:8,.0f}"
             "{elapsed_seconds:9.1f}")


def print_rates(report):
    """Print the learning rates, the table's heading, and the epochs trained so far."""
    recipe, rates = report["config"]["recipe"], report["rates"]
    show_status("")
    print(f"rates    LRMIN {rates['lr_min']:.3g}, LRMAX {rates['lr_max']:.3g} at epoch "
          f"{recipe['peak_fraction'] * recipe['epochs']:.3g} of {recipe['epochs']}, "
          f"weight decay {rates['weight_decay']:.3g}")
    if recipe["epochs"]:
        print(TABLE_HEADING)
    for row in report["epochs"]:
        print(TABLE_ROW.format(**row))


def print_summary(report):
    """Print how a run that trained ended."""
    summary = report["summary"]
    print(f"final    {summary['final_test_accuracy']:.2%} of the "
          f"{report['data']['evaluated_on']}, {summary['tta_test_accuracy']:.2%} with flip "
          f"test-time augmentation\n"
          f"time     {summary['train_seconds']:.1f} s of training, "
          f"{summary['sweep_seconds']:.1f} s of sweep, {summary['total_seconds']:.1f} s in all")
    for goal, epoch in summary["epochs_to"].items():
        if epoch:
            print(f"to {float(goal):.0%}   epoch {epoch}, {summary['seconds_to'][goal]:.1f} s "
                  "without sweep and tests")


# ---- Figures: next to the report, if matplotlib is installed -----------------------------

def plot_sweep(figure, report):
    """Draw the loss over the learning rate, with LRMIN and LRMAX."""
    axes, sweep, rates = figure.subplots(), report["lr_sweep"], report["rates"]
    axes.semilogx(sweep["lr"], sweep["loss"], ".-", color="tab:blue", alpha=0.3, label="step")
    axes.semilogx(sweep["lr"], sweep["smoothed_loss"], color="tab:blue", label="smoothed")
    axes.axhline(1.03 * min(sweep["smoothed_loss"]), color="gray", linestyle=":",
                 label="3% above the minimum")
    for name, color in (("lr_min", "tab:green"), ("lr_max", "tab:red")):
        label = f"{name.replace('_', '').upper()} {rates[name]:.2g}"
        axes.axvline(rates[name], color=color, linestyle="--", label=label)
    # The loss after divergence would flatten the rest.
    axes.set_ylim(top=min(axes.get_ylim()[1], 2 * sweep["smoothed_loss"][0]))
    axes.set(title="Learning-rate range sweep", xlabel="learning rate (log scale)", ylabel="loss")
    figure.legend(loc="outside lower center", ncols=3)


def plot_curves(figure, report):
    """Draw loss, accuracy and learning rate over the epochs."""
    rows, labels = report["epochs"], {"train": "training images, augmented",
                                      "test": report["data"]["evaluated_on"]}
    panels = {"Loss, with label smoothing": ("train_loss", "test_loss"),
              "Accuracy": ("train_accuracy", "test_accuracy"),
              "Learning rate at the end of each epoch": ("lr",)}
    figure.suptitle(f"Seed {report['config']['options']['seed']}: accuracy "
                    f"{rows[-1]['test_accuracy']:.2%} after epoch {rows[-1]['epoch']}")
    for axes, (title, keys) in zip(figure.subplots(1, 3), panels.items()):
        for key in keys:
            axes.plot([row["epoch"] for row in rows], [row[key] for row in rows], marker=".",
                      label=labels.get(key.split("_")[0]))
        axes.set(title=title, xlabel="epoch", xlim=(0, len(rows) + 0.5))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        if title == "Accuracy":
            axes.axhline(0.94, color="gray", linestyle=":", label="94%")
            axes.yaxis.set_major_formatter("{x:.0%}")
        if len(keys) > 1:
            axes.legend()
        else:
            axes.set_ylim(bottom=0)


def plot_images(figure, run, images, captions, columns, title):
    """Draw prepared images (N, 3, H, W) in a grid, each under its caption."""
    pixels = images.float().cpu() * run.std.view(3, 1, 1) + run.mean.view(3, 1, 1)
    pixels = pixels.clamp(0, 1).permute(0, 2, 3, 1).numpy()  # (N, H, W, 3), colors from 0 to 1
    figure.suptitle(title)
    grid = figure.subplots(math.ceil(len(images) / columns), columns, squeeze=False,
                           subplot_kw={"xticks": [], "yticks": [], "frame_on": False})
    for axes, image, caption in zip(grid.flat, pixels, captions):
        axes.imshow(image, interpolation="nearest")
        axes.set_title(caption, fontsize=8)


def save_figures(run, report, classes):
    """Write the figures next to the report, and show them in a notebook."""
    from matplotlib.figure import Figure
    options = report["config"]["options"]

    def save_figure(name, size, plot, *content):
        figure, output = Figure(size, dpi=120, layout="constrained"), Path(options["output"])
        path = output.with_name(f"{output.stem}-{name}.png")
        plot(figure, *content)
        write_file(path, figure.savefig)
        print(f"figure   {path}")
        if IN_NOTEBOOK:
            from IPython.display import Image, display
            display(Image(filename=str(path)))
    if report["lr_sweep"]:
        save_figure("sweep", (7, 4.5), plot_sweep, report)
    if report["epochs"]:
        save_figure("curves", (13, 4.2), plot_curves, report)
        probability, predicted = predict_logits(run, run.test.images).softmax(1).max(1)
        wrong = (predicted != run.test.labels).nonzero().flatten()[:10].tolist()
        captions = [f"{classes[run.test.labels[i]]}\ntaken for {classes[predicted[i]]}\n"
                    f"with probability {probability[i]:.2f}" for i in wrong]
        if wrong:
            save_figure("misclassified", (9, 5), plot_images, run, run.test.images[wrong],
                        captions, 5, f"The first misclassified {report['data']['evaluated_on']}")
    recipe = dataclasses.replace(run.recipe, batch_size=32)
    images, labels = next(augmented_batches(recipe, run.training, run.seed, 1))
    save_figure("augmented", (9, 5.8), plot_images, run, images, [classes[i] for i in labels],
                8, "Training images after crop, flip and cutout")


# ---- Running -----------------------------------------------------------------------------

def choose_rates(run, options):
    """Return the report's sections `rates` and `lr_sweep`; a sweep finds what is not given."""
    if options.lr_max:
        rates = Rates(options.lr_max / LR_RATIO, options.lr_max)
    else:
        print("sweep    finds the learning rates")
        rates = find_rates(run, show_progress(run, sweeping=True))
    decay = weight_decay(run.recipe, rates.lr_max, run.steps_per_epoch)
    sources = "given" if options.lr_max else "sweep", "given" if options.lr_min else "lr_max"
    return {"lr_max": rates.lr_max, "lr_max_from": sources[0], "weight_decay": decay,
            "lr_min": options.lr_min or rates.lr_min, "lr_min_from": sources[1]}, rates.sweep


def train_once(recipe, options, images):
    """Train one seed, or continue its checkpoint. `images` is what `load_images` returns."""
    started = time.perf_counter()
    training, test, classes = images
    run = start_run(recipe, training, test, options.seed, options.device, options.precision)
    report = new_report(options, run)
    resumed = options.checkpoint is not None and Path(options.checkpoint).is_file()
    if resumed:
        load_checkpoint(options.checkpoint, run, report)
    summary = report["summary"]
    started -= summary["total_seconds"]  # of earlier processes

    def save(status, checkpoint=False):
        summary.update(summarize_epochs(report["epochs"], len(training.labels)), status=status,
                       peak_memory_bytes=peak_memory(run.device),
                       total_seconds=time.perf_counter() - started)
        text = json.dumps(report, indent=1, allow_nan=False) + "\n"
        try:
            write_file(options.output, lambda file: file.write(text.encode()))
            if checkpoint and options.checkpoint:
                content = {"format": FORMAT, "run": run.state(), "report": report}
                write_file(options.checkpoint, lambda file: torch.save(content, file))
        except UserError as error:
            if status == "complete" or not report["epochs"]:
                raise
            print(f"warning  {error}")  # the next epoch tries again

    save("running")
    for name in ("sweep", "curves", "misclassified", "augmented"):  # figures of an earlier run
        path = Path(options.output)
        path.with_name(f"{path.stem}-{name}.png").unlink(missing_ok=True)
    print_heading(report)
    try:
        if resumed:
            print(f"resumed  {options.checkpoint} after epoch {run.epoch} of {recipe.epochs}")
        else:
            sweep_started = time.perf_counter()
            report["rates"], report["lr_sweep"] = choose_rates(run, options)
            summary["sweep_seconds"] = time.perf_counter() - sweep_started
            save("running", checkpoint=True)
        print_rates(report)
        rates = Rates(report["rates"]["lr_min"], report["rates"]["lr_max"])
        for row in train_epochs(run, rates, show_progress(run)):
            report["epochs"].append(row)
            show_status("")
            print(TABLE_ROW.format(**row))
            save("running", checkpoint=True)
        if recipe.epochs:
            summary["final_test_accuracy"] = report["epochs"][-1]["test_accuracy"]
            summary["tta_test_accuracy"] = evaluate_run(run, tta=True)["test_accuracy"]
        if options.weights:
            save_weights(options.weights, run, classes)
            print(f"weights  {options.weights}")
        save("complete")
    except BaseException as error:
        show_status("")
        save("diverged" if isinstance(error, Diverged) else "interrupted")
        if isinstance(error, KeyboardInterrupt) and options.checkpoint:
            print(f"stopped  the same command continues from {options.checkpoint}")
        raise
    if recipe.epochs:
        print_summary(report)
    if options.figures:
        try:
            save_figures(run, report, classes)
        except Exception as error:  # the run is complete and its report is written
            print(f"figures  none: {error} (pip install matplotlib?)")
    return report


def main(argv=None):
    """Run with these arguments or the command line's. --runs puts the seeds into file names."""
    recipe, options = parse_arguments(argv)
    images, accuracies = load_images(options), []
    for seed in range(options.seed, options.seed + options.runs):
        own = argparse.Namespace(**{**vars(options), "seed": seed})
        for name in ("output", "checkpoint", "weights") if options.runs > 1 else ():
            if path := getattr(options, name):
                setattr(own, name, str(Path(path).with_stem(f"{Path(path).stem}-seed{seed}")))
        report = train_once(recipe, own, images)
        accuracies.append(report["summary"]["final_test_accuracy"])
    if recipe.epochs and len(accuracies) > 1:
        deviation, count = statistics.stdev(accuracies), len(accuracies)
        print(f"{count} runs   mean {statistics.fmean(accuracies):.2%}, standard deviation "
              f"{deviation:.2%}, standard error {deviation / count ** 0.5:.2%}, "
              f"{sum(value >= 0.94 for value in accuracies)} at 94% or more")


def run_process():
    """Run the script as a process: an error becomes a sentence and an exit code."""
    if not IN_NOTEBOOK:  # where %run starts it in the notebook's process
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except (RuntimeError, MemoryError) as error:  # MemoryError has no text
        if not re.search("out of memory|can't allocate memory|^$", str(error), re.IGNORECASE):
            raise
        sys.exit("error: out of memory. Try a smaller --batch-size.")


if __name__ == "__main__":
    if "get_ipython" in globals():  # pasted into a cell, where sys.argv is the notebook's
        main([])  # for other options, call main(["--epochs", "10"]) in the next cell
    else:
        run_process()
