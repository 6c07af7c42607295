"""Tests of train.py against independent references: torchvision, PyTorch, counts by hand.

They need no GPU, no network and no data set: they write small files in CIFAR-10's format.
"""

import ast
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tarfile
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import CIFAR10

import train
from results import tables
from train import Recipe

SCRIPT = Path(train.__file__).resolve()
README = (SCRIPT.parent / "README.md").read_text()


# ---- Small data in the real format, small runs -------------------------------------------

SMALL = ("--batch-size", "50", "--device", "cpu")  # a GPU need not give the same result twice
REPORT = ("--no-figures", "--output", "run.json")
RATES = ("--lr-max", "0.01", "--lr-min", "0.0001")  # for tests that are not about the sweep
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def easy_images(seed):
    """Return 20 images, uint8 rows (20, 3072), of classes that differ in colors and stripes."""
    labels = np.arange(20) % 10
    colors = np.random.default_rng(0).integers(60, 196, (10, 3, 1, 1))
    stripes = 40 * np.sign(np.sin(np.arange(32) * (1 + np.arange(10).reshape(10, 1, 1, 1)) / 4))
    noise = np.random.default_rng(seed).normal(0, 25, (20, 3, 32, 32))
    images = (colors[labels] + stripes[labels] + noise).clip(0, 255).astype(np.uint8)
    return {"data": images.reshape(20, 3072), "labels": labels.tolist()}


def write_cifar10(folder):
    """Write files as those of CIFAR-10. Return the attributes with which CIFAR10 accepts them."""
    folder.mkdir(parents=True)
    names = [name for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]]
    contents = {name: easy_images(number) for number, name in enumerate(names)}
    checksums = {}
    for name, content in {**contents, "batches.meta": {"label_names": CLASSES}}.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return {"train_list": [[name, checksums[name]] for name in names[:5]],
            "test_list": [[name, checksums[name]] for name in names[5:]],
            "meta": {**CIFAR10.meta, "md5": checksums["batches.meta"]},
            "url": "http://127.0.0.1:9/cifar-10-python.tar.gz"}  # nothing listens there


class Workplace:
    """A folder with small data, where the script runs: in this process or in its own."""

    def __init__(self, folder, attributes):
        self.small_data = ("from torchvision.datasets import CIFAR10\n"
                           f"for name, value in {attributes!r}.items():\n"
                           "    setattr(CIFAR10, name, value)\n")
        (folder / "launcher.py").write_text(
            "import runpy, signal\n"
            # A job in the background would ignore Ctrl-C.
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"{self.small_data}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")

    def run(self, *arguments):
        """Run `main` in this process. Return the report."""
        assert train.main([*SMALL, *REPORT, *map(str, arguments)]) is None
        return self.report()

    def fail(self, *arguments):
        """Run `main`, which has to raise UserError. Return its message."""
        with pytest.raises(train.UserError) as error:
            self.run(*arguments)
        return str(error.value)

    def start(self, *arguments):
        return subprocess.Popen(
            [sys.executable, "launcher.py", *SMALL, *REPORT, *map(str, arguments)], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONIOENCODING": "ascii"})

    def report(self, name="run.json"):
        return json.loads(Path(name).read_text(), parse_constant=pytest.fail)  # no NaN in JSON


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Change to a folder whose data/ has 100 training images and 20 test images."""
    attributes = write_cifar10(tmp_path / "data" / CIFAR10.base_folder)
    for name, value in attributes.items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path, attributes)


def random_split(count=64):
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return train.Split(images, torch.randint(10, (count,), generator=generator))


def small_run(recipe=Recipe(batch_size=8), count=8, precision="fp32"):
    data = random_split(count), random_split(count)
    return train.start_run(recipe, *data, seed=0, device="cpu", precision=precision)


def same_state(*states):
    """Tell whether two nested dictionaries hold the same values and tensors."""
    leaves = [torch.utils._pytree.tree_leaves(state) for state in states]
    assert len(leaves[0]) > 30
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
               for a, b in zip(*leaves, strict=True))


def raiser(error):
    def raise_error(*arguments, **keywords):
        raise error
    return raise_error


# ---- Recipe and model --------------------------------------------------------------------

@pytest.mark.parametrize("changed", [
    {"epochs": -1}, {"epochs": 2.5}, {"batch_size": 1}, {"peak_fraction": 1.0},
    {"annihilation": 0.5}, {"beta1": (0.95, 0.85)}, {"beta1_peak": 1.5}, {"epsilon": math.nan},
    {"decay_epochs": math.inf}, {"l2": -0.1}, {"label_smoothing": "0.1"}, {"ema_epochs": -0.5},
    {"logit_scale": 0.0}, {"initialization": "foo"}, {"padding": -1}, {"padding_mode": "circular"},
    {"cutout": 32}, {"cutout": 8.0}])
def test_a_value_without_sense_is_refused_by_name_in_one_sentence(changed):
    (name,) = changed
    with pytest.raises(ValueError, match=rf"^[^\n]*\b{name}\b[^\n]*$"):
        Recipe(**changed)
    recipe = Recipe(epochs=np.int64(3), label_smoothing=np.float32(0.5))  # become Python's own
    assert json.loads(json.dumps(dataclasses.asdict(recipe)))["label_smoothing"] == 0.5


def test_parameters_counted_by_hand():
    convolutions = 9 * (3*64 + 64*128 + 2*128*128 + 128*256 + 256*512 + 2*512*512)
    batch_norms = 2 * (64 + 3*128 + 256 + 3*512)
    assert convolutions + batch_norms + 512*10 + 10 == 6_573_130
    assert sum(parameter.numel() for parameter in train.ResNet().parameters()) == 6_573_130


def test_forward_pass_against_the_network_written_out():
    torch.manual_seed(0)
    model = train.ResNet(Recipe(logit_scale=0.25))
    parameters = list(model.parameters())  # a convolution, then its BatchNorm's scale and shift
    for weight in filter(lambda parameter: parameter.ndim > 1, parameters):
        nn.init.kaiming_normal_(weight)  # the identity would hide a missing layer
    x = torch.randn(8, 3, 32, 32)

    def conv(x, pool=False):
        x = F.conv2d(x, parameters.pop(0), padding=1)
        x = F.max_pool2d(x, 2) if pool else x
        scale, shift = parameters.pop(0), parameters.pop(0)
        return F.relu(F.batch_norm(x, None, None, scale, shift, training=True))

    h = conv(x)
    h = conv(h, pool=True)
    h = h + conv(conv(h))
    h = conv(h, pool=True)
    h = conv(h, pool=True)
    h = h + conv(conv(h))
    h = F.linear(h.amax(dim=(2, 3)), parameters.pop(0), parameters.pop(0)) * 0.25
    assert not parameters
    torch.testing.assert_close(model(x), h)


def test_the_first_layer_whitens_the_first_1000_training_images():
    torch.manual_seed(1)
    noise = torch.randn(1100, 3, 32, 32)
    noise[:1000] = F.avg_pool2d(noise[:1000], 3, stride=1, padding=1)
    noise[:, 1] += noise[:, 0]  # pixels and channels depend on each other, as in photographs
    split = train.Split((128 + 80 * noise).clamp(0, 255).byte(), torch.arange(1100) % 10)
    run = train.start_run(Recipe(), split, random_split(8), device="cpu", precision="fp32")
    images, weight = run.training.images[:1000], run.model.prep[0].weight.detach()
    windows = np.lib.stride_tricks.sliding_window_view(images.numpy(), (3, 3), axis=(2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    variances = np.linalg.eigvalsh(np.cov(patches, rowvar=False))
    assert variances.min() < 0.01 < variances.max()
    outputs = F.conv2d(images, weight).transpose(0, 1).flatten(1)
    expected = torch.diag(torch.from_numpy(variances / (variances + 0.01)).float())
    torch.testing.assert_close(torch.cov(outputs[:27]), expected, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(outputs[27:54], -outputs[:27])
    torch.manual_seed(0)
    assert torch.equal(weight[54:], train.ResNet().prep[0].weight[54:])


def test_layers_begin_as_pytorch_makes_them_or_pass_their_input_on():
    channels = [3, 64, 128, 128, 128, 256, 512, 512, 512]
    torch.manual_seed(0)
    layers = [*(nn.Conv2d(*pair, 3, bias=False) for pair in zip(channels, channels[1:])),
              nn.Linear(512, 10)]
    runs = [small_run(dataclasses.replace(recipe, batch_size=8))
            for recipe in (train.RECIPES["plain"], Recipe())]
    plain, tuned = ([layer for layer in run.model.modules()
                     if isinstance(layer, (nn.Conv2d, nn.Linear))] for run in runs)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(plain, layers, strict=True))
    for convolution, theirs in list(zip(tuned, layers))[1:8]:
        count = convolution.in_channels
        x = torch.randn(2, count, 8, 8)
        assert torch.equal(convolution(x)[:, :count], x)
        assert torch.equal(convolution.weight[count:], theirs.weight[count:])


# ---- Data and augmentation ---------------------------------------------------------------

@pytest.mark.parametrize("padding, padding_mode", [(4, "reflect"), (2, "constant")])
def test_augmentation_pixel_for_pixel_against_torchvision(padding, padding_mode):
    recipe, split = Recipe(padding=padding, padding_mode=padding_mode), random_split()
    padded = train.start_run(recipe, split, split, device="cpu", precision="fp32").training.images
    std, mean = torch.std_mean(split.images / 255, dim=(0, 2, 3), correction=0)
    mirrored, n = torch.arange(64) % 3 == 0, 2 * padding + 1
    generator = torch.Generator().manual_seed(2)
    augmented = train.augment_images(recipe, padded, mirrored, generator)
    generator.manual_seed(2)
    tops, lefts, hole_tops, hole_lefts = (
        torch.randint(choices, (64,), generator=generator).tolist() for choices in (n, n, 25, 25))
    assert augmented.shape == (64, 3, 32, 32)
    assert augmented.is_contiguous(memory_format=torch.channels_last)
    for i, image in enumerate(split.images):
        image = TF.normalize(TF.convert_image_dtype(image), mean.tolist(), std.tolist())
        image = TF.pad(image, [padding], padding_mode=padding_mode)
        image = TF.crop(image, tops[i], lefts[i], 32, 32)
        image = TF.hflip(image) if mirrored[i] else image
        image = TF.erase(image, hole_tops[i], hole_lefts[i], 8, 8, torch.tensor(0.0))
        torch.testing.assert_close(augmented[i], image, rtol=0, atol=1e-6)


def test_draws_are_uniform_and_independent(monkeypatch):
    drawn, count = {}, 100_000
    monkeypatch.setattr(train, "crop_images", lambda images, top, left, size: (
        drawn.update(top=top, left=left) or images))
    monkeypatch.setattr(train, "cut_holes", lambda images, top, left, size: (
        drawn.update(hole_top=top, hole_left=left)))
    generator = train.epoch_generator(0, 1, "cpu")
    train.augment_images(Recipe(), torch.zeros(count, 0, 40, 40), torch.zeros(count, dtype=bool),
                         generator)
    for name, flips, epoch in (("alternating", "alternating", 1), ("random", "random", 1),
                               ("random in the next epoch", "random", 2)):
        drawn[name] = train.draw_flips(Recipe(flips=flips), count, 0, epoch, "cpu",
                                       train.epoch_generator(0, epoch, "cpu"))
    for name in drawn:
        choices = {"top": 9, "left": 9, "hole_top": 25, "hole_left": 25}.get(name, 2)
        observed = torch.bincount(drawn[name].long(), minlength=choices).double()
        assert len(observed) == choices
        expected, degrees = count / choices, choices - 1
        chi_squared = ((observed - expected) ** 2 / expected).sum()
        assert chi_squared < degrees + 5 * math.sqrt(2 * degrees) + 5, name  # 5 deviations
    draws = torch.stack([values.double() for values in drawn.values()])
    assert (torch.corrcoef(draws) - torch.eye(7)).abs().max() < 5 / math.sqrt(count)


def test_an_epoch_shows_every_image_once_and_mirrored_in_every_other_epoch():
    left_half = torch.zeros(500, 3, 40, 40)
    left_half[..., :20] = 1.0
    split = train.Split(left_half, torch.arange(500))

    def show_epoch(seed, epoch):
        batches = list(train.augmented_batches(Recipe(batch_size=120), split, seed, epoch))
        assert [len(labels) for _, labels in batches] == [120, 120, 120, 120, 20]
        images, labels = map(torch.cat, zip(*batches))
        assert sorted(labels.tolist()) == list(range(500))
        # The half that is white, whatever crop and cutout do.
        mirrored = images[..., :16].sum((1, 2, 3)) < images[..., 16:].sum((1, 2, 3))
        return labels.tolist(), mirrored[labels.argsort()]
    (order, first), (next_order, second), (_, third) = (show_epoch(0, n) for n in (1, 2, 3))
    assert torch.equal(second, ~first) and torch.equal(third, first)
    assert 200 < first.sum() < 300 and not torch.equal(first, show_epoch(1, 1)[1])
    assert show_epoch(0, 1)[0] == order != next_order != show_epoch(1, 2)[0] != order


def test_subset_and_holdout_select_the_right_images(monkeypatch):
    training = train.Split(torch.zeros(50, 1), torch.arange(50))
    testing = train.Split(torch.zeros(10, 1), torch.arange(100, 110))
    monkeypatch.setattr(train, "load_cifar10", lambda folder: (training, testing, CLASSES))
    monkeypatch.setattr(train, "SAMPLE", Path("nowhere"))
    for arguments, trained_on, evaluated_on in (
            ("", range(50), range(100, 110)), ("--subset 20", range(20), range(100, 104)),
            ("--holdout 10", range(40), range(40, 50)),
            ("--subset 20 --holdout 5", range(15), range(15, 20))):
        _, options = train.parse_arguments(arguments.split())
        trained, evaluated, classes = train.load_images(options)
        assert trained.labels.tolist() == [*trained_on] and classes == CLASSES
        assert evaluated.labels.tolist() == [*evaluated_on]
        name = train.new_report(options, small_run())["data"]["evaluated_on"]
        assert name == ("held-out training images" if options.holdout else "test images")


# ---- One-cycle and sweep -----------------------------------------------------------------

@pytest.mark.parametrize("epochs, steps_per_epoch, annihilation", [
    (24, 98, 1.0), (24, 98, 20.0), (3, 7, 1.0), *((1, steps, 1.0) for steps in range(1, 12))])
def test_one_cycle_against_pytorch_at_every_step(epochs, steps_per_epoch, annihilation):
    total, rates = epochs * steps_per_epoch, train.Rates(2e-5, 1e-2)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=total, pct_start=5 / 24, anneal_strategy="linear",
        base_momentum=0.85, max_momentum=0.95, div_factor=500, final_div_factor=annihilation)
    recipe = Recipe(epochs=epochs, annihilation=annihilation)
    for step in range(total):
        lr, beta1 = train.scheduled_rates(recipe, rates, step, steps_per_epoch)
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert beta1 == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-9)
        optimizer.step()
        if step < total - 1:
            scheduler.step()


def test_the_sweep_is_read_by_its_rule():
    lrs = [10.0 ** exponent for exponent in range(-8, 1)]
    # After its minimum, the loss stays within 3% of it up to 1e-3.
    smoothed = [3.0, 2.9, 1.02, 1.04, 1.0, 1.02, 1.04, 1.01, 1.6]
    assert train.read_sweep(lrs, smoothed) == pytest.approx((2e-3 / 300, 2e-3))
    # How the loss got to its minimum does not matter.
    assert train.read_sweep(lrs, [30.0, 9.0, *smoothed[2:]]) == pytest.approx((2e-3 / 300, 2e-3))
    # LRMAX is never above the last learning rate.
    assert train.read_sweep(lrs[:5], smoothed[:5]) == pytest.approx((1e-4 / 300, 1e-4))
    with pytest.raises(train.UserError, match="no learning rate"):
        train.read_sweep(lrs[:3], [1.0, 1.5, 2.0])
    line = [float(i) for i in range(50)]
    assert train.smooth_losses(line, 16)[16:-16] == pytest.approx(line[16:-16])  # no lag
    assert np.std(train.smooth_losses([(-1.0) ** i for i in range(50)], 16)[8:-8]) < 0.05


def sweep_of(monkeypatch, steps_per_epoch, loss_at):
    """Return the Rates of a sweep whose steps have the losses `loss_at(step, lr)`."""
    taken, epochs = [], []

    def batches(recipe, training, seed, epoch):
        epochs.append(epoch)
        return iter([(None, None)] * steps_per_epoch)
    def step(run, images, labels, lr, beta1):
        assert beta1 == run.recipe.beta1_peak
        taken.append(lr)
        return torch.tensor(loss_at(len(taken) - 1, lr)), None
    monkeypatch.setattr(train, "augmented_batches", batches)
    monkeypatch.setattr(train, "train_step", step)
    run = SimpleNamespace(recipe=Recipe(), seed=0, training=None, steps_per_epoch=steps_per_epoch,
                          state=dict, load_state=dict, model=nn.Identity(), mid_epoch=False,
                          device="cpu", dtype=None, optimizer=SimpleNamespace(param_groups=[]))
    rates = train.find_rates(run)
    count = len(rates.sweep["lr"])
    assert rates.sweep["lr"] == taken[:count] and taken[0] == 1e-6
    assert count == len(rates.sweep["loss"]) == len(rates.sweep["smoothed_loss"])
    assert min(epochs) > 100_000  # training has no such epochs
    return rates


@pytest.mark.parametrize("curvature", [1.0, 50.0, 2000.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sweep_finds_the_known_rate_of_a_quadratic(curvature, seed, monkeypatch):
    """Gradient descent on least squares with noisy targets, Hessian up to `curvature`."""
    generator = torch.Generator().manual_seed(seed)
    weight = 3 / math.sqrt(curvature) * torch.randn(8, generator=generator)
    scales = math.sqrt(curvature / 2) * torch.linspace(0.5, 1.0, 8)

    def loss_at(step, lr):
        nonlocal weight
        inputs = torch.randn(256, 8, generator=generator) * scales
        errors = inputs @ weight + 0.5 * torch.randn(256, generator=generator)
        weight = weight - lr * 2 * inputs.T @ errors / 256  # eigenvalues are 2 scales^2
        return errors.square().mean().item()
    rates = sweep_of(monkeypatch, 200, loss_at)
    largest_stable_rate = 2 / curvature  # gradient descent diverges beyond it
    if largest_stable_rate < 1:
        assert largest_stable_rate / 2 < rates.lr_max < largest_stable_rate * 2
        assert len(rates.sweep["lr"]) < 200, "it did not stop at divergence"
        assert max(rates.sweep["loss"]) < 1e6 * rates.sweep["loss"][0]
    else:
        assert rates.lr_max == pytest.approx(1)
    assert rates.lr_min == pytest.approx(rates.lr_max / 300)


@pytest.mark.parametrize("epoch, loss_at, steps", [
    *((epoch, lambda step, lr: 1 / (1 + step), [steps])  # it falls
      for epoch, steps in ((1, 8), (49, 98), (98, 196), (150, 200), (391, 391))),
    (200, lambda step, lr: 2.0 if step < 40 else 1 + max(0, step - 120) / 40, range(142, 156)),
    (200, lambda step, lr: 2.0 if step < 40 else 1.0 if step < 120 else 1.4, [200]),
    (200, lambda step, lr: 1.0 if step < 40 else 1.4 if step < 80 else 0.5, [200]),
    (200, lambda step, lr: 4.0 if step == 100 else 1.0 - step / 2000, [200]),
    (200, lambda step, lr: math.nan if step == 70 else 1.0 - step / 2000, [70])])
def test_a_sweep_ends_when_the_loss_has_climbed(epoch, loss_at, steps, monkeypatch):
    lrs = sweep_of(monkeypatch, epoch, loss_at).sweep["lr"]
    assert len(lrs) in steps
    last_step = (200 if epoch == 200 else len(lrs)) - 1
    assert np.diff(np.log(lrs)) == pytest.approx(math.log(1e6) / last_step)


def test_a_sweep_leaves_everything_as_it_was_even_if_it_is_interrupted():
    run = small_run(Recipe(batch_size=8), 16)
    run.scaler = torch.amp.GradScaler("cpu", growth_interval=1)  # grows with every step
    for _ in range(2):  # before the first step, and after it
        before, random_state = copy.deepcopy(run.state()), torch.get_rng_state()
        seen = []
        rates = train.find_rates(run, lambda *step: seen.append(step))
        assert [step for step, *_ in seen] == list(range(1, len(rates.sweep["lr"]) + 1))
        assert len(seen) > 2 and torch.equal(random_state, torch.get_rng_state())
        assert same_state(run.state(), before)
        assert all(parameter.grad is None for parameter in run.model.parameters())
        with pytest.raises(KeyboardInterrupt):
            train.find_rates(run, lambda step, *_: step == 3 and raiser(KeyboardInterrupt)())
        assert same_state(run.state(), before)
        train.train_step(run, run.test.images[:8], run.test.labels[:8], 1e-5, 0.9)


# ---- Steps, evaluation, epochs -----------------------------------------------------------

def test_decay_alone_shrinks_a_weight_to_1_over_e_in_its_time():
    for lr_max, steps_per_epoch, steps in ((0.04, 98, 490), (0.01, 391, 1955), (0.04, 4, 100)):
        decay = train.weight_decay(Recipe(), lr_max, steps_per_epoch)
        assert (1 - lr_max * decay) ** steps == pytest.approx(1 / math.e, rel=0.01)
    assert train.weight_decay(Recipe(decay_epochs=0), 0.04, 98) == 0
    assert train.weight_decay(Recipe(l2=0.1), 0.04, 98) == 0.1


def written_out_loss(logits, labels):
    log_p = logits.log_softmax(1)
    return -(0.8 * log_p[range(len(labels)), labels] + 0.2 * log_p.mean(1)).mean()


@pytest.mark.parametrize("recipe, optimizer_type, epsilon, decay, loss_function", [
    (Recipe(), torch.optim.AdamW, 0.01, 30, written_out_loss),
    (Recipe(l2=0.1), torch.optim.Adam, 0.01, 0.1, written_out_loss),
    (train.RECIPES["plain"], torch.optim.Adam, 1e-8, 0, F.cross_entropy)],
    ids=["tuned", "l2", "plain"])  # epsilon and loss of "plain" are what PyTorch has by default
def test_steps_against_pytorch_written_out(recipe, optimizer_type, epsilon, decay, loss_function):
    recipe = dataclasses.replace(recipe, batch_size=8)
    torch.manual_seed(0)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    run, reference = small_run(recipe), small_run(recipe).model
    run.optimizer.param_groups[0]["weight_decay"] = decay
    matrices, vectors = ([parameter for parameter in reference.parameters()
                          if (parameter.ndim > 1) == matrix] for matrix in (True, False))
    optimizer = optimizer_type([  # decoupled decay spares biases and BatchNorms
        {"params": matrices, "weight_decay": decay},
        {"params": vectors, "weight_decay": recipe.l2}], eps=epsilon)
    for lr, beta1 in ((0.01, 0.9), (0.002, 0.7)):
        logits = reference(images)
        loss = loss_function(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group.update(lr=lr, betas=(beta1, 0.999))
        optimizer.step()
        reported, correct = train.train_step(run, images, labels, lr, beta1)
        torch.testing.assert_close(reported, loss.detach())
        assert correct == (logits.argmax(1) == labels).sum()
    for ours, theirs in zip(run.model.parameters(), reference.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_an_epoch_takes_each_step_at_its_rates_and_weighs_every_image_alike(monkeypatch):
    taken = []
    def step(run, images, labels, lr, beta1):
        assert run.model.training and len(labels) == (4, 4, 2)[len(taken) % 3]
        taken.append((lr, beta1))
        return torch.tensor(float(len(taken))), torch.tensor((4, 3, 2)[(len(taken) - 1) % 3])
    monkeypatch.setattr(train, "train_step", step)
    run, rates = small_run(Recipe(batch_size=4, epochs=2), 10), train.Rates(0.001, 0.01)
    rows = list(train.train_epochs(run, rates))
    assert taken == [train.scheduled_rates(run.recipe, rates, step, 3) for step in range(6)]
    assert [row["train_loss"] for row in rows] == pytest.approx([1.8, 4.8])
    assert [row["train_accuracy"] for row in rows] == [0.9, 0.9]
    assert [row["lr"] for row in rows] == [taken[2][0], taken[5][0]]


def test_prediction_and_evaluation_against_pytorch_written_out():
    run = small_run()
    images, labels = torch.randn(4100, 3, 32, 32), torch.arange(4100) % 10  # three batches
    run.test = train.Split(images, labels)
    head = nn.Flatten(), nn.Linear(48, 10)
    run.averaged = nn.Sequential(nn.BatchNorm2d(3), nn.AvgPool2d(8), *head)
    run.averaged(images * 2 + 1)  # gives the running statistics a value of their own
    run.averaged.eval()
    with torch.no_grad():
        expected, mirrored = run.averaged(images), run.averaged(TF.hflip(images))
    for tta, logits in ((False, expected), (True, (expected + mirrored) / 2)):
        run.averaged.train()
        torch.testing.assert_close(train.predict_logits(run, images, tta), logits)
        result = train.evaluate_run(run, tta)
        assert result["test_loss"] == pytest.approx(written_out_loss(logits, labels).item())
        assert result["test_accuracy"] == (logits.argmax(1) == labels).sum().item() / 4100


@pytest.mark.parametrize("ema_epochs, memory", [(2, 6), (0.5, 1.5), (0, 1)])
def test_the_averaged_weights_against_a_sum_over_all_steps(ema_epochs, memory):
    run = small_run(Recipe(batch_size=4, epochs=4, ema_epochs=ema_epochs), 10)
    steps = []  # 3 in each epoch
    run.optimizer.register_step_post_hook(
        lambda *_: steps.append(copy.deepcopy(run.model.state_dict())))
    list(train.train_epochs(run, train.Rates(0.001, 0.01)))
    assert len(steps) == 12
    shares = [1.0]  # of each step's weights in the average: equal at first, then fading
    for step in range(2, 13):
        newest = 1 / min(step, memory)
        shares = [share * (1 - newest) for share in shares] + [newest]
    for name, values in run.averaged.state_dict().items():
        if values.is_floating_point():
            expected = sum(share * step[name] for share, step in zip(shares, steps))
            torch.testing.assert_close(values, expected)


# ---- The GPU's side without a GPU: fake CUDA tensors, and meta tensors -------------------

class OnlyCuda(TorchDispatchMode):
    """Fail at an operation that makes a tensor off the GPU, or that would wait for it."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "cuda", function
        return result


def fake_run(device, dtype):
    """Return a Run on a device that is not there, as `start_run` would lay it out."""
    layout = train.memory_format(device)
    with torch.device(device):
        model = train.ResNet()
        splits = [train.Split(torch.empty(20, 3, size, size, dtype=dtype).contiguous(
            memory_format=layout), torch.zeros(20, dtype=torch.long)) for size in (40, 32)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # Module.to does not work on fake tensors
            module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=layout))
    optimizer = torch.optim.Adam(model.parameters())
    return train.Run(Recipe(batch_size=8), 0, device, dtype, None, None, *splits, model, model,
                     optimizer, torch.amp.GradScaler(device, enabled=False))


def is_laid_out(images, dtype):
    return images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_data_and_model_stay_there_in_their_layout_and_precision(monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(train, "epoch_generator", lambda *arguments: None)  # it needs a GPU
    with FakeTensorMode():
        split = train.Split(torch.zeros(20, 3, 32, 32, dtype=torch.uint8),
                            torch.zeros(20, dtype=torch.long))
        prepared = train.prepare_images(split, torch.ones(3), torch.ones(3), "cuda", dtype, 4,
                                        "reflect")
        assert prepared.images.device.type == prepared.labels.device.type == "cuda"
        assert is_laid_out(prepared.images, dtype)
        run, outputs = fake_run("cuda", dtype), []
        for module in run.model.modules():
            module.register_forward_hook(lambda module, _, output: outputs.append(output))
        with OnlyCuda():
            batches = list(train.augmented_batches(run.recipe, prepared, 0, 1))
            logits = train.predict_logits(run, run.test.images, tta=True)
        assert [len(labels) for _, labels in batches] == [8, 8, 4]
        assert all(is_laid_out(images, dtype) for images, _ in batches)
        assert logits.shape == (20, 10) and logits.dtype == torch.float32
        assert len(outputs) > 60 and all(output.dtype == dtype for output in outputs)
        if dtype != torch.bfloat16:  # PyTorch fakes bf16 in the layout of this machine's CPU
            assert all(is_laid_out(output, dtype) for output in outputs
                       if output.ndim == 4 and output.shape[-1] > 1)


def test_no_step_of_an_epoch_waits_for_the_gpu(monkeypatch):
    monkeypatch.setattr(train, "epoch_generator", lambda *arguments: None)
    run = fake_run("meta", torch.float32)
    run.autocast = contextlib.nullcontext
    waits, stack = [], torch.stack  # the losses are read together, after the last step
    monkeypatch.setattr(torch, "stack", lambda values: waits.append(len(values)) or stack(values))
    with pytest.raises(NotImplementedError, match="meta"):
        next(train.train_epochs(run, train.Rates(0.01, 0.1)))  # reading a meta tensor raises
    assert waits == [3]
    assert all(parameter.grad.device.type == "meta" for parameter in run.model.parameters())


def test_full_batches_go_through_the_graph_and_all_ends_as_without_it(monkeypatch):
    replayed, ends = [], []
    def make_graphed_callables(module, arguments):  # as PyTorch's: steps, and another `forward`
        module(*arguments)
        forward = module.forward
        module.forward = lambda images: replayed.append(len(images)) or forward(images)
        return module
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", make_graphed_callables)
    for device in ("cpu", "cuda"):
        run = small_run(Recipe(batch_size=4, epochs=2), 10, "bf16")
        run.device, run.autocast = device, lambda: torch.autocast("cpu", torch.bfloat16)
        ends.append([train.find_rates(run).sweep])
        list(train.train_epochs(run, train.Rates(0.001, 0.01)))
        ends[-1] += run.model.state_dict(), run.averaged.state_dict()
    assert same_state(*ends) and set(replayed) == {4} and len(replayed) > 4  # 4 in training
    for other in {"device": "cpu"}, {"dtype": torch.float16}, {"model": nn.Identity()}:
        assert train.capture_graph(dataclasses.replace(run, **other)) is None


# ---- Checkpoint, report, weights ---------------------------------------------------------

def lasting_part(report):
    """Return what two equal runs share: all but times, memory and file names."""
    rows = [{name: value for name, value in row.items() if "second" not in name}
            for row in report["epochs"]]
    return rows, report["rates"], report["summary"]["tta_test_accuracy"]


def test_a_run_stopped_in_any_way_ends_as_an_undisturbed_one(workplace):
    arguments, seen = ("--epochs", 10, "--checkpoint", "zürich.pt", *RATES), 0
    for number, code, message, status in (
            (signal.SIGINT, 130, "\ninterrupted\n", "interrupted"),
            (signal.SIGTERM, 143, "", "interrupted"),
            (signal.SIGKILL, -signal.SIGKILL, "", "running")):
        process = workplace.start(*arguments)
        screen = "".join(itertools.takewhile(
            lambda line: not line.startswith(f"{seen + 2:5} "), process.stdout))
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, err) == (code, message)
        after = re.findall(r"resumed  z\\xfcrich.pt after epoch (\d+) of 10\n", screen)
        assert int(after[0]) in (seen - 1, seen) if seen else not after
        assert ("the same command continues from z" in out) == (number == signal.SIGINT)
        report = workplace.report()
        assert report["summary"]["status"] == status and len(report["epochs"]) > seen
        seen = len(report["epochs"])
    resumed = workplace.run(*arguments)
    whole = workplace.run(*arguments, "--checkpoint", "whole.pt")
    assert lasting_part(resumed) == lasting_part(whole) and len(resumed["epochs"]) == 10
    states = [torch.load(name, weights_only=True)["run"] for name in ("zürich.pt", "whole.pt")]
    for state in states:
        del state["seconds"]
    assert same_state(*states)


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_refused(workplace):
    usual = ("--checkpoint", "run.pt", "--epochs", 1, "--precision", "fp32", *RATES)
    workplace.run(*usual)
    whole, report = Path("run.pt").read_bytes(), workplace.report()
    saved = torch.load("run.pt", weights_only=True)
    assert saved["format"] == 2
    for arguments, difference in (
            (["--epochs", 2, "--seed", 7], "epochs 1, not 2; seed 0, not 7"),
            (["--holdout", 10], "train_images 100, not 90; test_images 20, not 10"),
            (["--cutout", 3], "cutout 8, not 3"), (["--lr-max", 0.02], "lr_max 0.01, not 0.02"),
            (["--precision", "bf16"], "precision fp32, not bf16")):
        message = workplace.fail(*usual, *arguments)
        assert message.startswith("run.pt is ") and difference in message
        assert (Path("run.pt").read_bytes(), workplace.report()) == (whole, report)
    Path("run.pt").write_bytes(whole[:-1000])
    assert workplace.fail(*usual).startswith("run.pt is ")
    torch.save({**saved, "run": {**saved["run"], "averaged": None}}, "run.pt")
    assert workplace.fail(*usual).startswith("run.pt is ")


def test_no_epochs_find_the_rates_that_are_not_given_once_and_stop(workplace, monkeypatch):
    find_rates, swept = train.find_rates, []
    monkeypatch.setattr(train, "find_rates", lambda *arguments: (
        swept.append(1) or find_rates(*arguments)))
    for given, sweeps in (("", 1), ("", 1), ("--lr-min 1e-9", 2), ("--lr-max 0.5", 2)):
        report = workplace.run("--epochs", 0, "--checkpoint", f"{given}.pt", *given.split())
        assert len(swept) == sweeps  # the second command found the rates in the checkpoint
        assert report["summary"]["status"] == "complete" and report["epochs"] == []
        assert report["summary"]["final_test_accuracy"] is None
        rates, sweep = report["rates"], report["lr_sweep"]
        lr_max = sweep and train.read_sweep(sweep["lr"], sweep["smoothed_loss"])[1]
        assert (rates["lr_max"], rates["lr_max_from"]) == (
            (0.5, "given") if "--lr-max" in given else (lr_max, "sweep"))
        assert (rates["lr_min"], rates["lr_min_from"]) == (
            (1e-9, "given") if "--lr-min" in given else (rates["lr_max"] / 300, "lr_max"))


def test_a_finished_write_replaces_the_file_and_a_broken_one_leaves_it(tmp_path, monkeypatch):
    path, write_bytes = tmp_path / "file", Path.write_bytes
    train.write_file(path, lambda file: file.write(b"first"))
    def die_half_way(temporary, content):
        write_bytes(temporary, content[:3])
        assert path.read_bytes() == b"first"  # a reader meanwhile sees the old file
        raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_bytes", die_half_way)
        train.write_file(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"first" and os.listdir(tmp_path) == ["file"]
    os.symlink("file", tmp_path / "link")
    train.write_file(tmp_path / "link", lambda file: file.write(b"third"))
    assert path.read_bytes() == b"third" and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("option", ["--output", "--checkpoint"])
def test_a_place_that_is_not_a_file_is_named_before_training(workplace, monkeypatch, option):
    Path("file").write_text("")
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    monkeypatch.setattr(train, "train_step", raiser(AssertionError("it went on")))
    for place in ("file/run", "data", "pipe", "link"):
        assert f"cannot write {place} " in workplace.fail("--epochs", 1, *RATES, option, place)
    assert Path("pipe").is_fifo() and Path("link").is_symlink()


def test_trained_weights_classify_images_without_the_run(workplace):
    arguments = [*SMALL, "--epochs", "2", "--logit-scale", "0.25", "--ema-epochs", "2", *RATES,
                 "--no-figures", "--weights", "weights.pt", "--checkpoint", "folder/run.pt"]
    train.main(arguments)
    report = workplace.report("folder/run.json")  # it is beside the checkpoint by default
    model, mean, std, classes = train.load_weights("weights.pt")
    states = torch.load("folder/run.pt", weights_only=True)["run"]
    assert same_state(model.state_dict(), states["averaged"])
    assert not same_state(model.state_dict(), states["model"])
    images, labels = train.load_cifar10("data")[1]
    predicted = model(train.normalize_images(images, mean, std)).argmax(1)
    assert (predicted == labels).float().mean().item() == pytest.approx(
        report["summary"]["final_test_accuracy"], abs=0.051)  # rounding may decide one image
    assert model.logit_scale == 0.25 and classes == CLASSES and not model.training
    train.main(arguments)  # a finished run stays as it is
    assert lasting_part(workplace.report("folder/run.json")) == lasting_part(report)


# ---- A run and what it writes ------------------------------------------------------------

def test_a_run_reports_all_it_should(workplace, capsys):
    report = workplace.run("--epochs", 3, "--batch-size", 30, "--epsilon", 0.02, "--beta2", 0.98,
                           "--checkpoint", "run.pt")
    names = "config", "data", "rates", "lr_sweep", "epochs", "summary"
    config, data, rates, sweep, rows, summary = map(report.get, names)
    assert report["format"] == 2 and report["parameters"] == 6_573_130
    assert Recipe(**config["recipe"]) == Recipe(epochs=3, batch_size=30, epsilon=0.02, beta2=0.98)
    assert config["options"]["command"].startswith("train.py --batch-size 50 --device cpu --no-")
    assert set(report["environment"]) == set(
        "date commit system python torch torchvision numpy cudnn device device_name precision "
        "threads".split())
    assert datetime.fromisoformat(report["environment"]["date"]) < datetime.now().astimezone()
    assert re.fullmatch(r"[0-9a-f]{7,}\+?|None", str(report["environment"]["commit"]))
    pixels = train.load_cifar10("data")[0].images.numpy() / 255
    assert data["mean"] == pytest.approx(pixels.mean(axis=(0, 2, 3)).tolist(), rel=1e-5)
    assert data["std"] == pytest.approx(pixels.std(axis=(0, 2, 3)).tolist(), rel=1e-5)
    assert (data["train_images"], data["test_images"]) == (100, 20)
    assert train.read_sweep(sweep["lr"], sweep["smoothed_loss"]) == (
        rates["lr_min"], rates["lr_max"])
    assert (rates["lr_max_from"], rates["lr_min_from"]) == ("sweep", "lr_max")
    assert rates["weight_decay"] == pytest.approx(0.01 / rates["lr_max"])  # in 100 steps
    saved = torch.load("run.pt", weights_only=True)["run"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in saved] == [rates["weight_decay"], 0]
    assert all((group["eps"], group["betas"][1]) == (0.02, 0.98) for group in saved)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert set(rows[0]) == set(
        "epoch lr train_loss train_accuracy test_loss test_accuracy train_seconds test_seconds "
        "images_per_second elapsed_seconds".split())
    assert rows[-1]["lr"] == pytest.approx(rates["lr_min"])
    seconds = [row["train_seconds"] for row in rows]
    elapsed = summary["preprocess_seconds"] + np.cumsum(seconds)
    assert [row["elapsed_seconds"] for row in rows] == pytest.approx(elapsed.tolist())
    assert rows[2]["images_per_second"] == pytest.approx(100 / seconds[2])
    assert summary["images_per_second"] == pytest.approx(300 / summary["train_seconds"])
    assert summary["train_seconds"] == pytest.approx(sum(seconds))
    assert summary["total_seconds"] > summary["train_seconds"] + summary["sweep_seconds"]
    assert summary["status"] == "complete" and summary["peak_memory_bytes"] > 1e8
    assert summary["final_test_accuracy"] == rows[-1]["test_accuracy"]
    rows = [{**rows[0], "test_accuracy": value, "epoch": i, "elapsed_seconds": 9 * i}
            for i, value in enumerate([0.5, 0.91, 0.93, 0.89])]
    milestones = train.summarize_epochs(rows, 100)  # the first epochs that reach them
    assert milestones["epochs_to"] == {"0.90": 1, "0.94": None}
    assert milestones["seconds_to"] == {"0.90": 9, "0.94": None}
    screen = capsys.readouterr().out
    assert "recipe   tuned, epochs 3, batch_size 30, beta2 0.98, epsilon 0.02\n" in screen
    assert f"LRMAX {rates['lr_max']:.3g}" in screen and "\r" not in screen


def test_seeds_train_in_turn_until_one_diverges(workplace, capsys, monkeypatch):
    arguments = "--epochs", 2, "--runs", 3, "--seed", 4, *RATES, "--batch-size", 25
    train.main([*SMALL, *REPORT, *map(str, arguments)])
    reports = [workplace.report(f"run-seed{seed}.json") for seed in (4, 5, 6)]
    assert len({report["epochs"][0]["train_loss"] for report in reports}) == 3
    accuracies = [report["summary"]["final_test_accuracy"] for report in reports]
    screen, deviation = capsys.readouterr().out, np.std(accuracies, ddof=1)
    assert f"3 runs   mean {np.mean(accuracies):.2%}, standard deviation {deviation:.2%}" in screen
    assert f"standard error {deviation / 3**0.5:.2%}" in screen
    train_step, steps = train.train_step, []
    def step(run, *others):
        steps.append(run.seed)
        loss, correct = train_step(run, *others)
        return torch.tensor(math.inf) if steps[-2:] == [5, 5] else loss, correct
    monkeypatch.setattr(train, "train_step", step)
    assert re.search("(?s)NaN or infinite in epoch 1.*--lr-max", workplace.fail(*arguments))
    assert steps == [4] * 8 + [5] * 4
    assert workplace.report("run-seed5.json")["summary"]["status"] == "diverged"


def test_figures_show_the_run(workplace, capsys, monkeypatch):
    figure, pictures = pytest.importorskip("matplotlib.figure"), lambda: set(Path().glob("*.png"))
    train.main([*SMALL, "--epochs", "2", "--output", "run.json"])
    names = "sweep", "curves", "augmented", "misclassified"
    assert pictures() == {Path(f"run-{name}.png") for name in names}
    report, rows = workplace.report(), workplace.report()["epochs"]
    Path("run-of-mine.png").write_text("")
    workplace.run("--epochs", 1, *RATES)  # without figures, and none are left of the other run
    assert pictures() == {Path("run-of-mine.png")}
    train.plot_sweep(sweep := figure.Figure(), report)
    level = 1.03 * min(report["lr_sweep"]["smoothed_loss"])  # that the rule uses
    assert [level, level] in [list(line.get_ydata()) for line in sweep.axes[0].lines]
    train.plot_curves(curves := figure.Figure(), report)
    for axes, key in zip(curves.axes, ("test_loss", "test_accuracy", "lr"), strict=True):
        assert any(list(line.get_ydata()) == [row[key] for row in rows] for line in axes.lines)
    run = small_run()
    train.plot_images(images := figure.Figure(), run, run.test.images, CLASSES, 4, "title")
    np.testing.assert_allclose(images.axes[5].images[0].get_array(),
                               random_split(8).images[5].permute(1, 2, 0) / 255, atol=1e-6)
    with monkeypatch.context() as patch:
        # No image is misclassified, all are with TTA.
        patch.setattr(train, "predict_logits", lambda run, images, tta=False: (
            50.0 * F.one_hot((run.test.labels + tta) % 10, 10)))
        train.main([*SMALL, "--epochs", "1", "--output", "right.json", *RATES])
    summary = workplace.report("right.json")["summary"]
    assert (summary["final_test_accuracy"], summary["tta_test_accuracy"]) == (1, 0)
    assert {Path("right-curves.png"), Path("right-augmented.png")} < pictures()
    for module in (None, SimpleNamespace(Figure=raiser(ValueError))):  # no or a broken matplotlib
        monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
        capsys.readouterr()
        train.main([*SMALL, "--epochs", "0", "--output", "none.json", *RATES])
        assert re.search("\nfigures  none: .*matplotlib", capsys.readouterr().out)


def test_the_status_line_says_how_long_it_takes_and_fits_the_terminal(monkeypatch, capsys):
    line = "epoch 2, step 3 of 10, learning rate 1.0e-01, loss 2.000, 256 images/s, 0:34 left"
    for columns in (30, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        clock = SimpleNamespace(perf_counter=iter([0.0, 10.0, 10.5, 14.0]).__next__)
        monkeypatch.setattr(train, "time", clock)
        on_step = train.show_progress(SimpleNamespace(recipe=Recipe(epochs=3), epoch=1))
        for step in (1, 2, 3):
            on_step(step, 10, 0.1, torch.tensor(2.0))
        assert capsys.readouterr().out.endswith(f"\r{line[:columns - 1]:<{columns - 1}}\r")
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=pytest.fail))  # without isatty
    train.show_status("nothing")
    monkeypatch.undo()
    monkeypatch.setattr(train, "IN_NOTEBOOK", True)
    train.show_status("epoch 1")
    assert capsys.readouterr().out.startswith("\repoch 1 ")


# ---- Options -----------------------------------------------------------------------------

def test_each_constant_is_an_option_and_the_help_has_its_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    group = capsys.readouterr().out.split("\nrecipe:\n")[1]
    for option, default in (
            ("batch-size", "512"), ("peak-fraction", "0.2083"), ("cutout", "8 / 0 / 8"),
            ("label-smoothing", "0.2 / 0.2 / 0"), ("epsilon", "0.01 / 0.01 / 1e-08"),
            ("flips", "alternating / alternating / random")):
        assert re.search(rf"^  --{option} .*\(default: {default}\)$", group, re.MULTILINE)
    plain = train.RECIPES["plain"]
    for field in dataclasses.fields(Recipe):
        name, allowed = f"--{field.name.replace('_', '-')}", field.metadata["allowed"]
        assert f"  {name} " in group
        value = allowed[0] if isinstance(field.default, str) else allowed[1]
        recipe, options = train.parse_arguments(["--recipe", "plain", name, str(value)])
        assert recipe == dataclasses.replace(plain, **{field.name: value}) != plain
        assert not hasattr(options, field.name)


@pytest.mark.parametrize("arguments, sentence", [
    ("--batch-size 512 --subset 100", "batch_size must be an integer from 2 to 100, got 512"),
    ("--lr-max 0", "lr_max must be a number from 1e-30 to 1e+30, got 0.0"),
    ("--lr-min 0.1 --lr-max 0.01", "lr_min must be a number from 1e-30 to 0.01, got 0.1"),
    ("--subset 9 --holdout 8", "holdout must be an integer from 0 to 7, got 8"),
    ("--device tpu", "--device: invalid choice: 'tpu'"),
    ("--device cuda", "device cuda: PyTorch finds no such device. Try cpu"),
    *((names, "output, checkpoint and weights must be different files") for names in (
        "--checkpoint run.json", "--output same --checkpoint x/../same", "--weights a --output a")),
    ("--flips sometimes", "flips must be one of alternating, random, got 'sometimes'"),
    ("--cutout 8.5", "--cutout: invalid int value: '8.5'")])
def test_nonsense_ends_with_one_sentence(tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: train.py") and sentence in message.splitlines()[-1]


@pytest.mark.parametrize("device, capabilities, native, expected", [
    ("cpu", {"avx512_bf16": True}, None, "bf16"), ("cpu", {"amx_bf16": True}, None, "bf16"),
    ("cpu", {"avx512_bf16": False, "avx2": True}, None, "fp32"), ("mps", {}, None, "fp32"),
    ("cuda", {}, True, "bf16"), ("cuda", {}, False, "fp16")])  # a T4 only emulates bf16
def test_precision_follows_the_hardware(monkeypatch, device, capabilities, native, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: device == "mps")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: native or including_emulation)
    assert train.choose_device() == (device, expected)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in an older PyTorch
    assert train.choose_device("cpu") == ("cpu", "fp32")


def test_steps_in_low_precision_go_as_in_full():
    losses = {}
    for name in ("fp32", "bf16"):  # a CPU emulates fp16, in seconds for each image
        run = small_run(Recipe(batch_size=2), 2, precision=name)
        assert run.training.images.dtype == run.dtype
        losses[name] = [train.train_step(run, *run.test, 1e-3, 0.9)[0].item() for _ in range(2)]
        assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["fp32"][1] < losses["fp32"][0]


def test_fp16_skips_a_step_whose_gradients_overflow():
    run = small_run()
    run.dtype, run.model = torch.float16, nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    run.optimizer = torch.optim.Adam(run.model.parameters())
    for scale, skipped in ((2.0 ** 40, True), (1.0, False)):
        run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        before = run.model[1].weight.clone()
        train.train_step(run, *run.test, 1e-3, 0.9)
        assert torch.equal(run.model[1].weight, before) == skipped
        assert (run.scaler.get_scale() < scale) == skipped


# ---- The first look: the sample, few images, the download --------------------------------

def test_the_sample_holds_the_first_images_of_the_data_set():
    training, test, classes = train.load_sample()
    assert classes == CLASSES and training.labels.dtype == test.labels.dtype == torch.long
    contents = [values.contiguous().numpy().tobytes() for split in (training, test)
                for values in (split.images.permute(0, 2, 3, 1), split.labels)]
    assert [len(values) for values in (*training, *test)] == [2000, 2000, 400, 400]
    # Of the official files: hashlib.md5(images.tobytes()), labels as 64-bit integers.
    assert [hashlib.md5(content).hexdigest() for content in contents] == [
        "1a208dad31c9392ef83b3d32bb2030db", "1a887becff7c3f16b56e4489b315f060",
        "d435b728f0fe28855929b8ef0ec83da8", "780cbea43788138efd31b1488c5b6904"]


@pytest.mark.parametrize("arguments, is_there, sample", [
    ("--subset", "", True), ("--subset 2000", "", True), ("--subset 2001", "", False),
    ("--seed 1", "", False), ("--subset", CIFAR10.base_folder, False),
    ("--subset", CIFAR10.filename, False)])
def test_the_sample_serves_if_it_is_enough_and_the_data_set_is_not_there(
        tmp_path, monkeypatch, capsys, arguments, is_there, sample):
    (tmp_path / is_there).mkdir(exist_ok=True)
    monkeypatch.setattr(train, "load_cifar10", lambda folder: (*train.load_sample()[:2], [folder]))
    _, options = train.parse_arguments([*arguments.split(), "--data-dir", str(tmp_path)])
    classes = train.load_images(options)[2]
    assert classes == (CLASSES if sample else [tmp_path])
    assert ("sample.npz" in capsys.readouterr().out) == sample


@pytest.mark.parametrize("arguments, batch_size", [
    ("--seed 1", 512), ("--subset", 62), ("--subset 5000", 156), ("--subset 100", 16),
    ("--subset 12", 12), ("--subset --holdout 1000", 31), ("--subset --batch-size 512", 512)])
def test_few_images_take_smaller_batches(arguments, batch_size):
    assert train.parse_arguments(arguments.split())[0].batch_size == batch_size


def test_a_server_that_never_answers_ends_after_a_timeout(tmp_path, monkeypatch, capsys):
    timeouts, set_timeout = [], socket.setdefaulttimeout
    monkeypatch.setattr(socket, "setdefaulttimeout", lambda seconds: timeouts.append(seconds)
                        or set_timeout(min(seconds, 0.2) if seconds else seconds))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/cifar")
        with pytest.raises(train.UserError, match="(?s)timed out.*by hand.*--subset") as error:
            train.load_cifar10(tmp_path / "new" / "data")
    assert timeouts == [30, None] and socket.getdefaulttimeout() is None
    announced = capsys.readouterr().out
    for part in (CIFAR10.url, "170 MB", str(tmp_path / "new" / "data" / CIFAR10.filename)):
        assert part in announced
    assert CIFAR10.url in str(error.value) and not (tmp_path / "new" / "data").exists()


def test_the_data_folder_may_be_written_in_several_ways_or_is_named(workplace, monkeypatch):
    monkeypatch.setenv("HOME", str(Path.cwd()))
    for folder in ("data", "~/data", f"data/{CIFAR10.base_folder}"):
        _, options = train.parse_arguments(["--data-dir", folder])
        assert len(train.load_images(options)[0].labels) == 100
    Path("file").write_text("")
    with pytest.raises(train.UserError, match="could not get CIFAR-10.*'file"):
        train.load_cifar10("file")
    assert Path("file").is_file()
    monkeypatch.setattr(train.tempfile, "TemporaryDirectory", raiser(PermissionError(13, "denied")))
    with pytest.raises(train.UserError, match="denied"):
        train.load_cifar10("read-only")


# ---- As a library ------------------------------------------------------------------------

def split_like(images=None, labels=None):
    split = random_split(8)
    return train.Split(split.images if images is None else images,
                       split.labels if labels is None else labels)


@pytest.mark.parametrize("split, reason", [
    (split_like(images=torch.rand(8, 3, 32, 32)), "images must be uint8 .* got torch.float32"),
    (split_like(images=torch.zeros(8, 32, 32, dtype=torch.uint8)), r"uint8 \(N, C, H, W\), got"),
    (split_like(labels=torch.zeros(7, dtype=torch.long)), "each image needs a label"),
    (train.Split(torch.zeros(0, 3, 32, 32, dtype=torch.uint8), torch.zeros(0)), "needs a label"),
    (split_like(labels=torch.full((8,), 10)), "whole numbers from 0 to 9"),
    (split_like(labels=torch.full((8,), -1)), "whole numbers from 0 to 9"),
    (split_like(labels=torch.zeros(8)), "whole numbers from 0 to 9"),
    (split_like(images=random_split(8).images * torch.tensor([1, 0, 1]).view(3, 1, 1).byte()),
     "a channel of the images is constant")])
def test_a_split_that_cannot_be_trained_on_is_named_with_the_reason(split, reason):
    for name, data in (("training", (split, random_split())), ("test", (random_split(), split))):
        with pytest.raises(ValueError, match=f"^{name} split: .*{reason}"):
            train.start_run(Recipe(), *data, device="cpu")


def test_images_of_another_size_need_a_network_of_their_own():
    small = split_like(images=random_split(8).images[..., :16, :16])
    with pytest.raises(ValueError, match="3 x 32 x 32"):
        train.start_run(Recipe(), small, small, device="cpu")
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 10))
    before = copy.deepcopy(network.state_dict())
    run = train.start_run(Recipe(epochs=1, batch_size=4), small, small, device="cpu",
                          model=network)
    assert run.model is network and torch.equal(network[1].weight, before["1.weight"])
    list(train.train_epochs(run, train.Rates(0.001, 0.01)))
    assert not torch.equal(network[1].weight, before["1.weight"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_a_hundred_classes_train_and_their_weights_are_saved_and_loaded(tmp_path, dtype):
    split = split_like(labels=torch.arange(92, 100, dtype=dtype))
    run = train.start_run(Recipe(epochs=1, batch_size=4), split, split, device="cpu",
                          num_classes=100)
    list(train.train_epochs(run, train.Rates(0.001, 0.01)))
    train.save_weights(tmp_path / "weights.pt", run, [f"class {i}" for i in range(100)])
    model, mean, std, classes = train.load_weights(tmp_path / "weights.pt")
    logits = model(train.normalize_images(split.images, mean, std))
    assert logits.shape == (8, len(classes)) == (8, 100)
    with pytest.raises(ValueError, match="images must be uint8"):
        train.normalize_images(split.images / 255, mean, std)


def test_an_optimizer_of_your_own_follows_the_schedule_and_keeps_the_rest():
    recipe, rates = Recipe(epochs=1, batch_size=4), train.Rates(0.001, 0.01)
    run = small_run(recipe)
    weights, biases = ([values for values in run.model.parameters()
                        if (values.ndim > 1) == matrix] for matrix in (True, False))
    run.optimizer = torch.optim.SGD(
        [{"params": weights, "weight_decay": 5e-4}, {"params": biases, "lr_factor": 64},
         {"params": [nn.Parameter(torch.zeros(1))], "momentum": 0}], lr=1, momentum=0.9)
    seen = []
    run.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append([
        tuple(group[name] for name in ("lr", "momentum", "weight_decay"))
        for group in optimizer.param_groups]))
    list(train.train_epochs(run, rates))
    planned = [train.scheduled_rates(recipe, rates, step, 2) for step in range(2)]
    assert seen == [[(lr, beta1, 5e-4), (64 * lr, beta1, 0), (lr, 0, 0)] for lr, beta1 in planned]

    run = small_run(recipe)
    run.optimizer = torch.optim.AdamW(run.model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    list(train.train_epochs(run, rates))
    (group,) = run.optimizer.param_groups
    assert group["weight_decay"] == 0.05 and group["betas"] == (planned[-1][1], 0.98)


@pytest.mark.parametrize("rates", [(0.2, 0.1), (0.0, 0.1), (-0.1, 0.1), (math.nan, 0.1)])
def test_rates_without_sense_and_the_optimizer_of_another_model_are_refused(rates):
    run = small_run()
    with pytest.raises(ValueError, match="LRMIN .* must be above 0"):
        next(train.train_epochs(run, train.Rates(*rates)))
    run.model.head = nn.Linear(512, 10)
    for start in train.find_rates, lambda run: next(train.train_epochs(run, train.Rates(0.1, 0.2))):
        with pytest.raises(ValueError, match="does not hold all parameters"):
            start(run)


def test_random_numbers_and_default_device_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    reference = small_run()
    assert torch.equal(torch.rand(3), expected)
    data = random_split(8)
    with torch.device("meta"):  # where tensors without a device would be made
        run = train.start_run(Recipe(epochs=1, batch_size=4), data, data, device="cpu",
                              precision="fp32")
        assert same_state(run.model.state_dict(), reference.model.state_dict())
        assert len(list(train.train_epochs(run, train.Rates(0.001, 0.01)))) == 1


def test_an_interrupted_epoch_is_not_continued_but_an_earlier_state_is():
    run, rates = small_run(Recipe(epochs=2, batch_size=4)), train.Rates(0.001, 0.01)
    before = copy.deepcopy(run.state())
    with pytest.raises(KeyboardInterrupt):
        list(train.train_epochs(run, rates, raiser(KeyboardInterrupt)))
    for start in train.find_rates, lambda run: next(train.train_epochs(run, rates)):
        with pytest.raises(ValueError, match="interrupted"):
            start(run)
    run.load_state(before)
    assert [row["epoch"] for row in train.train_epochs(run, rates)] == [1, 2]


@pytest.mark.parametrize("failing", [0, 3, 9])  # of ten writes: at once, after epoch 1, the last
def test_a_failed_write_costs_a_warning_but_the_last_one_decides(
        workplace, monkeypatch, capsys, failing):
    write_file, writes = train.write_file, itertools.count()
    def write(path, save):
        if next(writes) == failing:
            raise train.UserError(f"cannot write {path}")
        write_file(path, save)
    monkeypatch.setattr(train, "write_file", write)
    with contextlib.nullcontext() if failing == 3 else pytest.raises(train.UserError):
        workplace.run("--epochs", 3, "--checkpoint", "run.pt", *RATES)
    assert ("warning  cannot write run.json" in capsys.readouterr().out) == (failing == 3)
    assert len(workplace.report()["epochs"]) == 3 if failing else not Path("run.pt").exists()
    assert not failing or torch.load("run.pt", weights_only=True)["run"]["epoch"] == 3


# ---- When things go wrong ----------------------------------------------------------------

def test_no_data_and_no_network(workplace):
    process = workplace.start("--data-dir", "elsewhere")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    assert len([line for line in err.splitlines() if line.startswith("error: ")]) == 1
    assert f"{CIFAR10.url} at elsewhere/{CIFAR10.filename}" in err.splitlines()[-1]
    assert not Path("elsewhere").exists() and not Path("run.json").exists()


def test_an_archive_put_there_by_hand_is_unpacked_if_it_is_whole(workplace, monkeypatch):
    archive = Path("by-hand", CIFAR10.filename)
    archive.parent.mkdir()
    archive.write_bytes(b"half an archive")
    with pytest.raises(train.UserError, match="could not get CIFAR-10"):
        train.load_cifar10("by-hand")
    assert archive.read_bytes() == b"half an archive"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(Path("data", CIFAR10.base_folder), CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    training, test, classes = train.load_cifar10("by-hand")
    rows = [easy_images(number) for number in range(6)]  # red, then green, then blue
    images = np.concatenate([row["data"] for row in rows]).reshape(120, 3, 32, 32)
    assert torch.equal(torch.cat([training.images, test.images]), torch.from_numpy(images))
    assert [*training.labels, *test.labels] == sum((row["labels"] for row in rows), [])
    assert classes == CLASSES
    assert set(os.listdir("by-hand")) == {CIFAR10.filename, CIFAR10.base_folder}


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_file_is_named_and_not_trained_on(workplace, name):
    path = Path("data") / CIFAR10.base_folder / name
    content = path.read_bytes()
    for damaged in (content[:-100], content[:-1] + b"!"):
        path.write_bytes(damaged)
        assert f"{path} is damaged: its checksum is wrong" in workplace.fail("--epochs", 1)
    assert not Path("run.json").exists()


@pytest.mark.parametrize("error, code", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
    (MemoryError(), "out of memory"), (OSError("no disk"), "no disk"),
    (train.UserError("a sentence"), "a sentence"), (KeyboardInterrupt(), 130)])
def test_only_a_process_turns_an_error_into_an_exit_code(workplace, monkeypatch, error, code):
    monkeypatch.setattr(train, "train_step", raiser(error))
    monkeypatch.setattr(train.signal, "signal", lambda *arguments: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *SMALL, *REPORT, "--epochs", "1", *RATES])
    with pytest.raises(type(error)) as raised:
        train.main()
    assert raised.value is error and workplace.report()["summary"]["status"] == "interrupted"
    with pytest.raises(SystemExit) as stop:
        train.run_process()
    assert stop.value.code == code or re.fullmatch(f"error: {code}[^\n]*", stop.value.code)
    assert ("smaller --batch-size" in str(stop.value.code)) == (code == "out of memory")
    monkeypatch.setattr(train, "train_step", raiser(RuntimeError("illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train.run_process()


# ---- The notebook and the README ---------------------------------------------------------

def test_pasted_into_a_notebook_cell_it_runs_with_the_defaults(workplace):
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    pytest.importorskip("ipykernel")
    first_cell = f"__file__ = 'cell.py'  # as in VS Code\n{workplace.small_data}"
    next_cell = ("import time\nepochs = 10\nstart = time.time()\naccuracy = recipe = lr = run = 1\n"
                 "main(['--device', 'cpu', '--epochs', '1', '--subset', '50'])\nepochs")
    cells = first_cell, SCRIPT.read_text(), next_cell, f"%run {SCRIPT} --help"
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    nbclient.NotebookClient(notebook, timeout=300, allow_errors=True).execute()
    _, script, main, help_text = ([*cell.outputs] for cell in notebook.cells)
    assert "'output_type': 'error'" not in str(notebook.cells)
    assert help_text[0].text.startswith("usage: train.py")
    assert main[-1].data["text/plain"] == "10"
    text = "".join(output.text for output in script if output.get("name") == "stdout")
    assert "LRMAX" in text and len(re.findall(r"[\r\n] +\d+ ", text)) == 24
    assert "final  " in text and str(script).count("image/png") in (3, 4) or "figures  none" in text


def test_importing_only_defines_and_leaves_short_names_to_notebooks():
    process = subprocess.run([sys.executable, "-c", "import train"], cwd=SCRIPT.parent,
                             capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")
    functions = [node.name for node in ast.parse(SCRIPT.read_text()).body
                 if isinstance(node, ast.FunctionDef)]
    assert len(functions) > 40 and [name for name in functions if "_" not in name] == ["main"]


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_file_that_is_linked_is_there(name):
    page = SCRIPT.parent / name
    links = re.findall(r"\]\(((?!http)[^)#]+)", page.read_text())
    assert links and [link for link in links if not (page.parent / link).exists()] == []


def test_the_readme_shows_what_a_run_prints(capsys):
    shown, rest = re.search(r"```text\n(.*?)```(.*)", README, re.DOTALL).groups()
    shown = shown.replace("sweep    finds the learning rates\n", "")  # is printed in between
    path = re.search(r"\]\((results/[^)]+\.json)\)", rest)[1]
    report = tables.in_todays_form(json.loads((SCRIPT.parent / path).read_text()))
    options = {"recipe": "tuned", **report["config"]["options"], "output": path}  # where it is now
    report["config"]["options"] = options  # reports in format 1 have neither
    decay = train.weight_decay(Recipe(), report["rates"]["lr_max"], 98)
    report["rates"] = {"weight_decay": decay, **report["rates"]}
    train.print_heading(report), train.print_rates(report), train.print_summary(report)
    parts = re.split(r"^ *\.\.\.\n", shown, flags=re.MULTILINE)  # "..." stands for left-out rows
    assert len(shown.splitlines()) > 10
    assert re.fullmatch(r"(?:.*\n)+".join(map(re.escape, parts)), capsys.readouterr().out)


def test_the_snippets_of_the_readme_run(workplace, capsys, monkeypatch):
    workplace.run("--epochs", 1, "--weights", "weights.pt", *RATES)
    TF.to_pil_image(random_split(1).images[0]).save("photo.jpg")
    logged = []  # tensorboard is not installed
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(
        SummaryWriter=lambda: SimpleNamespace(add_scalar=lambda *row: logged.append(row))))
    hundred = SimpleNamespace(data=np.uint8(np.arange(20 * 3072).reshape(20, 32, 32, 3) % 251),
                              targets=[*range(80, 100)], classes=[*map(str, range(100))])
    monkeypatch.setattr("torchvision.datasets.CIFAR100", lambda *_, **keywords: hundred)
    monkeypatch.setattr(train, "cut_holes", train.cut_holes)  # one snippet replaces it
    snippets, names = re.findall(r"```python\n(.*?)```", README, re.DOTALL), {}
    assert len(snippets) == 5 and max(snippet.count("\n") for snippet in snippets) <= 10
    outputs = []
    for snippet in snippets:
        capsys.readouterr()
        if "log_step" in snippet:
            names["run"] = small_run(Recipe(epochs=2, batch_size=8))
        exec(snippet.replace("epochs=10", "epochs=2, batch_size=50")
             .replace('"--epochs", "10"', '"--epochs", "2"'), names)
        outputs.append(capsys.readouterr().out)
    assert [row.split()[0] for row in (outputs[0] + outputs[2]).splitlines()] == list("1212")
    assert train.cut_holes is names["add_noise"] and "final  " in outputs[1]
    assert len(train.load_weights("cifar100.pt")[3]) == 100
    assert ("test_accuracy", 2) in [(name, step) for name, _, step in logged]
    assert [step for name, _, step in logged if name == "loss of the step"] == [1, 2]
    assert outputs[4].strip() in CLASSES


# ---- results/: tables and text say what the reports say ----------------------------------

# What others reported, and the link that has to stand beside it; figures of commit 8bd2076.
REPORTED = {"90.98": "github.com/nanekja/pytorch_utils", "93.07": "github.com/jaiyesh/tsai-era",
            "94.08": "github.com/davidcpage/cifar10-fast",
            "94.02": "johanwind.github.io/2022/12/28/cifar_94.html"}
EARLIER = {"91.10", "93.34"}


def table_rows(declared=None):
    """Return the reports of each row of tables, by default of all."""
    return [tables.load_row(pattern) for _, _, rows in declared or tables.TABLES.values()
            for row in rows for pattern in row[1:] if pattern]


def accuracy_report(accuracy, **environment):
    """Return a report of a default run on the H100, with another accuracy."""
    (report,) = tables.load_row("h100/default-seed0").values()
    return {**report, "summary": {**report["summary"], "final_test_accuracy": accuracy},
            "environment": {**report["environment"], **environment}}


@pytest.mark.parametrize("path", tables.FILES, ids=["README", "results"])
def test_tables_and_percentages_are_those_of_the_reports_or_have_their_source(path):
    assert path.read_text() == tables.fill_tables(path), "run python results/tables.py"
    rows = [row for row in table_rows() if all(report["epochs"] for report in row.values())]
    given = {tables.percent(value) for row in rows
             for key in ("final_test_accuracy", "tta_test_accuracy")
             for values in [tables.values(row, key)] for value in [*values, np.mean(values)]}
    text = path.read_text()
    prose = re.sub(r"<!-- table: .*?<!-- end -->|```.*?```", "", text, flags=re.DOTALL)
    for figure in re.findall(r"(\d\d\.\d\d)(?:%| ±)", prose):
        assert figure in given | EARLIER or REPORTED.get(figure, "no source") in text, figure


def test_each_report_is_used_by_a_table_that_is_shown():
    text = "".join(path.read_text() for path in tables.FILES)
    shown = [tables.TABLES[name] for name in re.findall("<!-- table: (.+?) -->", text)]
    used = {name: report for row in table_rows(shown) for name, report in row.items()}
    assert set(used) == {path.relative_to(tables.HERE).as_posix()
                         for path in tables.HERE.glob("*/*.json")}
    for report in used.values():  # today's rule finds the rates that they used
        if report["rates"]["lr_max_from"] == "sweep" and report["epochs"]:
            assert tables.found_rates({"": report}) == pytest.approx([report["rates"]["lr_max"]])


@pytest.mark.parametrize("section, name, value", [
    ("recipe", "label_smoothing", 0.1), ("recipe", "epochs", 23), ("data", "train_images", 45000),
    ("data", "evaluated_on", "held-out training images"), ("environment", "precision", "fp16"),
    ("environment", "device_name", "Tesla T4"), ("rates", "lr_max_from", "given")])
def test_unlike_runs_are_refused_as_a_row(section, name, value, tmp_path, monkeypatch):
    report = {**accuracy_report(0.9), "format": 2}
    monkeypatch.setattr(tables, "HERE", tmp_path)
    with pytest.raises(ValueError, match="no report"):
        tables.load_row("run-*")
    for seed in (0, 1):
        (tmp_path / f"run-{seed}.json").write_text(json.dumps(report))
    assert len(tables.load_row("run-*")) == 2
    (report["config"] if section == "recipe" else report)[section][name] = value
    (tmp_path / "run-1.json").write_text(json.dumps(report))
    with pytest.raises(ValueError, match="unlike"):
        tables.load_row("run-*")


def test_means_and_distances_against_numpy():
    counts = [[9457, 9467, 9462], [9420], [9451, 9433]]
    rows = [{f"{i}-{j}": accuracy_report(count / 10000) for j, count in enumerate(row)}
            for i, row in enumerate(counts)]
    percent = [np.array(row) / 100 for row in counts]
    assert tables.accuracy_cell(rows[0]) == (
        f"{percent[0].mean():.2f} ± {percent[0].std(ddof=1):.2f} (n=3)")
    assert tables.accuracy_cell(rows[1]) == "94.20 (n=1)"
    residuals = np.concatenate([row - row.mean() for row in percent])
    deviation = np.sqrt((residuals ** 2).sum() / (6 - 3))
    for column, other in ("gain", 1), ("ahead", 0):
        distance = percent[2].mean() - percent[other].mean()
        error = np.sqrt(deviation ** 2 / 2 + deviation ** 2 / len(counts[other]))
        assert tables.make_cell(column, rows, 2) == f"{distance:+.2f} ± {error:.2f}"
        assert tables.make_cell(column, rows, 0) == "-"
