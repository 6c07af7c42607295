"""Tests of train.py against independent references: torchvision's transforms, PyTorch's scheduler, counts by hand.

They need no GPU, no network and no data set: those that read images write small files in CIFAR-10's own format.

    python -m pytest test_train.py
"""

import contextlib
import copy
import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
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
from results import candidates, tables
from train import Recipe

SCRIPT = Path(train.__file__).resolve()


# ---- Small data in the real format, small runs -----------------------------------------------------------------------

def easy_images(seed):
    """Return 20 images as uint8 rows (20, 3072) and their labels: ten classes that differ in colours and stripes."""
    labels = np.arange(20) % 10
    colours = np.random.default_rng(0).integers(60, 196, (10, 3, 1, 1))
    stripes = 40 * np.sign(np.sin(np.arange(32) * (1 + np.arange(10).reshape(10, 1, 1, 1)) / 4))
    images = colours[labels] + stripes[labels] + np.random.default_rng(seed).normal(0, 25, (20, 3, 32, 32))
    return images.clip(0, 255).astype(np.uint8).reshape(20, 3072), labels.tolist()


def write_cifar10(folder):
    """Write the seven files of CIFAR-10 with 20 images each. Returns CIFAR10's class attributes for them."""
    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    folder.mkdir(parents=True)
    checksums = []
    for number, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        images, labels = easy_images(number)
        checksums.append([name, write(name, {"data": images, "labels": labels, "batch_label": name})])
    meta = {"label_names": "airplane automobile bird cat deer dog frog horse ship truck".split()}
    return {"train_list": checksums[:5], "test_list": checksums[5:],
            "meta": {**CIFAR10.meta, "md5": write(CIFAR10.meta["filename"], meta)},
            "url": "http://127.0.0.1:9/cifar-10-python.tar.gz"}  # nothing listens there: no test depends on a network


class Workplace:
    """A folder with small data, where the script runs in this process (`run`) or in one of its own (`start`)."""

    def __init__(self, folder, attributes, capsys):
        self.folder, self.capsys, self.processes = folder, capsys, []
        self.small_data = ("from torchvision.datasets import CIFAR10\n"
                           f"for name, value in {attributes!r}.items(): setattr(CIFAR10, name, value)\n")
        self.launcher = folder / "launcher.py"
        self.launcher.write_text(
            "import runpy, signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job would ignore Ctrl-C
            "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # and one under nohup the end of its terminal
            f"{self.small_data}runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")

    def run(self, *arguments):
        return train.main([*SMALL, *REPORT, *map(str, arguments)])

    def fail(self, *arguments):
        """Run to an end that is to be a failure, and return what is said of it."""
        assert self.run(*arguments) == 1
        return self.capsys.readouterr().err

    def start(self, *arguments, **environment):
        process = subprocess.Popen([sys.executable, self.launcher, *SMALL, *REPORT, *map(str, arguments)],
                                   cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   env={**os.environ, **environment})
        self.processes.append(process)
        return process

    def wait_for_epoch(self, process, epoch):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            if (self.folder / "run.json").exists() and len(self.report()["epochs"]) >= epoch:
                return
            time.sleep(0.02)
        process.kill()
        pytest.fail(f"no epoch {epoch}: {process.communicate()}")

    def report(self, name="run.json"):
        return json.loads((self.folder / name).read_text(), parse_constant=pytest.fail)  # NaN is no JSON


@pytest.fixture
def workplace(tmp_path, monkeypatch, capsys):
    """Five files of 20 training images and one of 20 test images in data/, and the working directory there."""
    attributes = write_cifar10(tmp_path / "data" / CIFAR10.base_folder)
    for name, value in attributes.items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.chdir(tmp_path)
    workplace = Workplace(tmp_path, attributes, capsys)
    yield workplace
    for process in workplace.processes:
        process.kill()


SMALL = ("--batch-size", "50", "--device", "cpu")  # a CPU gives the same result twice, a GPU need not
REPORT = ("--no-figures", "--output", "run.json")
RATES = ("--lr-max", "0.01", "--lr-min", "0.0001")  # given where a test is not about the sweep


def random_split(count=64):
    generator = torch.Generator().manual_seed(1)
    return train.Split(torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8),
                       torch.randint(10, (count,), generator=generator))


def small_run(recipe=Recipe(batch_size=8), count=8, precision="fp32"):
    return train.start(recipe, random_split(count), random_split(count), seed=0, device="cpu", precision=precision)


def same(*states):
    """Tell whether two nested dictionaries hold the same values, tensors among them."""
    leaves = [torch.utils._pytree.tree_leaves(state) for state in states]
    assert len(leaves[0]) == len(leaves[1]) > 30
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(*leaves))


def one_step(run, images, labels, lr=1e-3):
    return next(train.take_steps(run, [(images, labels)], [(lr, 0.9)]))


def interrupt():
    raise KeyboardInterrupt


# ---- Recipe and model ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changed", [
    {"epochs": -1}, {"epochs": 2.5}, {"epochs": 10**9}, {"batch_size": 1}, {"peak_fraction": 1.0},
    {"annihilation": 0.5}, {"beta1": (2.0, 0.9)}, {"beta1": 0.9}, {"beta1": (0.9, 0.9, 0.9)}, {"beta2": 1.5},
    {"epsilon": math.nan}, {"memory_epochs": -math.inf}, {"l2": -1.0}, {"l2": 0.1}, {"label_smoothing": 2.0},
    {"label_smoothing": "0.1"}, {"average_epochs": -0.5}, {"logit_scale": math.inf}, {"whitening_images": -1},
    {"whitening_floor": -0.01}, {"initialisation": "foo"}, {"padding": 32}, {"padding_mode": "foo"}, {"flips": "foo"},
    {"cutout": 40}, {"cutout": 8.0}, {"sweep_range": (1.0, 1.0)}, {"sweep_range": (0.0, 1.0)}, {"sweep_steps": 1},
    {"sweep_margin": -0.1}, {"sweep_factor": -2.0}, {"lr_ratio": 0.5}])
def test_a_constant_without_sense_is_refused_by_name_in_one_sentence(changed):
    (name,) = changed
    with pytest.raises(ValueError, match=rf"^[^\n]*\b{name}\b[^\n]*$"):
        Recipe(**changed)


def test_a_recipe_is_a_value():
    recipe = Recipe(epochs=10, label_smoothing=0)
    assert recipe == dataclasses.replace(Recipe(), epochs=10, label_smoothing=0.0) != Recipe()
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.epochs = 5
    assert Recipe(memory_epochs=math.inf, annihilation=1, padding=0, cutout=0)  # ends of their intervals


def test_parameters_counted_by_hand():
    convolutions = 9 * (3 * 64 + 64 * 128 + 2 * 128 * 128 + 128 * 256 + 256 * 512 + 2 * 512 * 512)
    batch_norms = 2 * (64 + 3 * 128 + 256 + 3 * 512)
    assert convolutions + batch_norms + 512 * 10 + 10 == 6_573_130
    assert sum(parameter.numel() for parameter in train.ResNet().parameters()) == 6_573_130


def test_forward_pass_against_the_recipe_written_out():
    torch.manual_seed(0)
    model = train.ResNet(Recipe(logit_scale=0.25))
    parameters = list(model.parameters())  # in the order of the recipe: convolution, then its BatchNorm's scale, shift
    for weight in filter(lambda parameter: parameter.ndim > 1, parameters):
        nn.init.kaiming_normal_(weight)  # the identity that it begins as would hide a layer left out
    x = torch.randn(8, 3, 32, 32)

    def conv(x, pool=False):
        x = F.conv2d(x, parameters.pop(0), padding=1)
        x = F.max_pool2d(x, 2) if pool else x
        return F.relu(F.batch_norm(x, None, None, parameters.pop(0), parameters.pop(0), training=True))

    h = conv(x)
    h = conv(h, pool=True)
    h = h + conv(conv(h))
    h = conv(h, pool=True)
    h = conv(h, pool=True)
    h = h + conv(conv(h))
    h = F.linear(h.amax(dim=(2, 3)), parameters.pop(0), parameters.pop(0)) * 0.25
    assert not parameters
    torch.testing.assert_close(model(x), h)


def test_convolutions_but_the_first_pass_their_input_on_before_training():
    first, *others = [module for module in train.ResNet().modules() if isinstance(module, nn.Conv2d)]
    assert len(others) == 7
    for convolution in others:
        x = torch.randn(2, convolution.in_channels, 8, 8)
        passed, rest = convolution(x).tensor_split([convolution.in_channels], dim=1)
        assert torch.equal(passed, x) and (not rest.numel() or rest.std() > 0.1)  # the other filters are random
    x = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(first(x)[:, :3], x, atol=0.1)


def test_a_run_starts_with_a_layer_that_whitens_its_first_images():
    torch.manual_seed(1)
    blurred = F.avg_pool2d(torch.randn(12, 3, 34, 34), 3, stride=1)
    blurred[:, 1] += blurred[:, 0]  # pixels and channels hang together, as in photographs
    split, floor = train.Split((128 + 80 * blurred).clamp(0, 255).byte(), torch.arange(12) % 10), 0.3
    recipe = Recipe(batch_size=8, whitening_images=8, whitening_floor=floor)
    run = train.start(recipe, split, split, seed=0, device="cpu", precision="fp32")
    images, weight = run.training.images[:8], run.model.prep[0].weight.detach()

    patches = np.lib.stride_tricks.sliding_window_view(images.numpy(), (3, 3), axis=(2, 3)).transpose(0, 2, 3, 1, 4, 5)
    variances = np.linalg.eigvalsh(np.cov(patches.reshape(-1, 27), rowvar=False))
    assert variances.min() < floor < variances.max()
    outputs = F.conv2d(images, weight).transpose(0, 1).flatten(1)
    expected = torch.from_numpy(variances / (variances + floor)).float()
    torch.testing.assert_close(torch.cov(outputs[:27]), torch.diag(expected), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(outputs[27:54], -outputs[:27])
    torch.manual_seed(0)
    assert torch.equal(weight[54:], train.ResNet(recipe).prep[0].weight[54:])


def test_the_plain_recipe_is_what_pytorch_has_by_default():
    plain = dataclasses.replace(train.RECIPES["plain"], batch_size=8)
    torch.manual_seed(0)  # the layers in their order, each as PyTorch makes it
    channels = [(3, 64), (64, 128), (128, 128), (128, 128), (128, 256), (256, 512), (512, 512), (512, 512)]
    layers = [*(nn.Conv2d(*pair, 3, bias=False) for pair in channels), nn.Linear(512, 10)]
    run, images, labels = small_run(plain), torch.randn(8, 3, 32, 32), torch.arange(8)
    ours = [module for module in run.model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(ours, layers, strict=True))
    assert run.model.prep[1].momentum == nn.BatchNorm2d(1).momentum

    reference = copy.deepcopy(run.model)
    loss = F.cross_entropy(reference.head(reference.pool(reference.layer3(reference.layer2(
        reference.layer1(reference.prep(images)))))), labels)
    loss.backward()
    torch.optim.Adam(reference.parameters(), lr=0.01).step()
    run.optimizer.param_groups[0]["weight_decay"] = train.weight_decay(plain, 0.01, 98)
    reported, _ = one_step(run, images, labels, lr=0.01)
    torch.testing.assert_close(reported, loss.detach())
    for ours, theirs in zip(run.model.parameters(), reference.parameters()):
        torch.testing.assert_close(ours, theirs)
    assert (plain.padding, plain.padding_mode, plain.cutout, plain.annihilation) == (4, "constant", 8, 1)


# ---- Data and augmentation -------------------------------------------------------------------------------------------

def test_augmentation_pixel_for_pixel_against_torchvision_and_back_into_colours():
    recipe, split = Recipe(), random_split()
    mean, std = train.channel_statistics(split.images)
    prepared = train.prepare(split, mean, std, "cpu", torch.float32, recipe.padding, recipe.padding_mode)
    colours = train.to_pixels(prepared.images[..., 4:36, 4:36], mean, std)  # as figures show them
    np.testing.assert_allclose(colours, split.images.permute(0, 2, 3, 1).numpy() / 255, atol=1e-6)
    mirrored = torch.arange(64) % 3 == 0
    augmented = train.augment(recipe, prepared.images, mirrored, torch.Generator().manual_seed(2))

    generator = torch.Generator().manual_seed(2)
    tops, lefts, hole_tops, hole_lefts = (torch.randint(choices, (64,), generator=generator).tolist()
                                          for choices in (9, 9, 25, 25))
    assert augmented.shape == (64, 3, 32, 32) and augmented.is_contiguous(memory_format=torch.channels_last)
    for i, image in enumerate(split.images):
        image = TF.normalize(TF.convert_image_dtype(image, torch.float32), mean.tolist(), std.tolist())
        image = TF.pad(image, [4], padding_mode="reflect")
        image = TF.crop(image, tops[i], lefts[i], 32, 32)
        image = TF.hflip(image) if mirrored[i] else image
        image = TF.erase(image, hole_tops[i], hole_lefts[i], 8, 8, torch.tensor(0.0))
        torch.testing.assert_close(augmented[i], image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["reflect", "constant", "replicate", "circular"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_of_padding_works(mode, dtype):
    split = random_split(2)
    prepared = train.prepare(split, torch.zeros(3), torch.ones(3), "cpu", dtype, 31, mode)
    expected = np.pad(split.images.numpy() / np.float32(255), ((0, 0), (0, 0), (31, 31), (31, 31)),
                      mode={"replicate": "edge", "circular": "wrap"}.get(mode, mode))
    torch.testing.assert_close(prepared.images, torch.from_numpy(expected).to(dtype))


def test_draws_are_uniform_and_independent(monkeypatch):
    drawn, count = {}, 100_000
    monkeypatch.setattr(train, "crop", lambda images, top, left, size: drawn.update(top=top, left=left) or images)
    monkeypatch.setattr(train, "flip", lambda images, chosen: drawn.update(flip=chosen) or images)
    monkeypatch.setattr(train, "cutout", lambda images, top, left, size: drawn.update(hole_top=top, hole_left=left))
    generator = train.epoch_generator(0, 1, "cpu")
    train.augment(Recipe(), torch.zeros(count, 0, 40, 40),
                  train.draw_flips(Recipe(), count, 0, 1, "cpu", generator), generator)

    for name, choices in {"top": 9, "left": 9, "flip": 2, "hole_top": 25, "hole_left": 25}.items():
        observed = torch.bincount(drawn[name].long(), minlength=choices).double()
        assert len(observed) == choices
        expected, degrees = count / choices, choices - 1
        chi_squared = ((observed - expected) ** 2 / expected).sum()
        assert chi_squared < degrees + 5 * math.sqrt(2 * degrees) + 5, name  # five standard deviations are no chance

    draws = torch.stack([values.double() for values in drawn.values()])
    assert (torch.corrcoef(draws) - torch.eye(5)).abs().max() < 5 / math.sqrt(count)
    neighbours = [torch.corrcoef(torch.stack([row[1:], row[:-1]]))[0, 1].abs() for row in draws]
    assert max(neighbours) < 5 / math.sqrt(count)


def test_an_epoch_shows_every_image_once_and_mirrored_in_every_other_epoch():
    left_half = torch.zeros(500, 3, 40, 40)
    left_half[..., :20] = 1.0
    split = train.Split(left_half, torch.arange(500))

    def show(seed, epoch):
        batches = list(train.augmented_batches(Recipe(batch_size=120), split, seed, epoch))
        assert [len(labels) for _, labels in batches] == [120, 120, 120, 120, 20]
        images, labels = map(torch.cat, zip(*batches))
        assert sorted(labels.tolist()) == list(range(500))
        mirrored = images[..., :16].sum((1, 2, 3)) < images[..., 16:].sum((1, 2, 3))  # whatever crop and cutout do
        return labels.tolist(), mirrored[labels.argsort()]
    (order, first), (next_order, second), (_, third) = (show(0, epoch) for epoch in (1, 2, 3))
    assert torch.equal(second, ~first) and torch.equal(third, first)
    assert 200 < first.sum() < 300 and not torch.equal(first, show(1, 1)[1])
    assert show(0, 1)[0] == order != next_order != show(1, 2)[0] != order


def test_random_flips_are_drawn_anew_in_every_epoch():
    recipe, count = Recipe(flips="random"), 100_000
    flips = torch.stack([train.draw_flips(recipe, count, seed, epoch, "cpu", train.epoch_generator(seed, epoch, "cpu"))
                         for seed, epoch in ((0, 1), (0, 2), (0, 3), (1, 1))]).double()
    assert (flips.mean(1) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(count)
    assert (torch.corrcoef(flips) - torch.eye(4)).abs().max() < 5 / math.sqrt(count)


def test_subset_and_holdout_select_the_right_images_and_limit_the_default_batch():
    training = train.Split(torch.zeros(50, 1), torch.arange(50))
    testing = train.Split(torch.zeros(40, 1), torch.arange(100, 140))

    def select(*arguments):
        config = train.parse_arguments(arguments)
        trained, evaluated, name = train.select_images(config, training, testing)
        return trained.labels.tolist(), evaluated.labels.tolist(), name, config.recipe.batch_size
    assert select() == (list(range(50)), list(range(100, 140)), "test images", 512)
    assert select("--subset", "20") == (list(range(20)), list(range(100, 104)), "test images", 20)
    assert select("--holdout", "10") == (list(range(40)), list(range(40, 50)), "held-out training images", 512)
    assert select("--subset", "20", "--holdout", "5") == (
        list(range(15)), list(range(15, 20)), "held-out training images", 15)


def test_the_real_data_set_has_its_known_statistics():
    data_dir = Path(os.environ.get("CIFAR10_DIR", SCRIPT.parent / "data"))
    if not (data_dir / CIFAR10.base_folder).exists():
        pytest.skip(f"needs the real CIFAR-10 in {data_dir.name}/ (or in the folder that CIFAR10_DIR names)")
    training, testing, classes = train.load_cifar10(data_dir)
    assert training.images.shape == (50_000, 3, 32, 32) and testing.images.shape == (10_000, 3, 32, 32)
    assert torch.bincount(training.labels).tolist() == [5000] * 10 and len(classes) == 10
    mean, std = train.channel_statistics(training.images)
    torch.testing.assert_close(mean, torch.tensor([0.4914, 0.4822, 0.4465]), rtol=0, atol=1e-4)  # as widely published
    torch.testing.assert_close(std, torch.tensor([0.2470, 0.2435, 0.2616]), rtol=0, atol=1e-4)


# ---- One-cycle and sweep ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("epochs, steps_per_epoch, annihilation", [
    (24, 98, 1.0), (24, 98, 20.0), (10, 98, 1.0), (3, 7, 1.0), *((1, steps, 1.0) for steps in range(1, 12))])
def test_one_cycle_against_pytorch_at_every_step(epochs, steps_per_epoch, annihilation):
    total, rates = epochs * steps_per_epoch, train.Rates(2e-5, 1e-2)
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rates.lr_max, total_steps=total, pct_start=5 / 24, anneal_strategy="linear",
        base_momentum=0.85, max_momentum=0.95, div_factor=rates.lr_max / rates.lr_min, final_div_factor=annihilation)
    recipe = Recipe(epochs=epochs, annihilation=annihilation)
    planned = [pair for epoch in range(1, epochs + 1)
               for pair in train.plan_epoch(recipe, rates, epoch, steps_per_epoch)]
    assert len(planned) == total
    for lr, beta1 in planned:
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert beta1 == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-9)
        optimizer.step()
        if scheduler.last_epoch < total - 1:
            scheduler.step()


def test_sweep_is_read_by_its_rule():
    recipe = Recipe(sweep_margin=0.15, sweep_factor=3, lr_ratio=50)
    lrs = [10.0 ** exponent for exponent in range(-6, 3)]
    smoothed = [3.0, 2.9, 1.14, 1.16, 1.0, 1.14, 1.16, 1.1, 1.6]  # from its lowest on it is within 15% up to 0.1
    assert train.read_sweep(recipe, lrs, smoothed) == pytest.approx((6e-3, 0.3))
    # Where the fall began, and how far it went, is of no account: logits of another scale start at another loss.
    assert train.read_sweep(recipe, lrs, [30.0, 9.0, *smoothed[2:]]) == pytest.approx((6e-3, 0.3))
    assert train.read_sweep(recipe, lrs[:5], smoothed[:5]) == pytest.approx((2e-4, 1e-2))  # at most the last rate
    assert "is 3 times" in train.sweep_rule(recipe) and "within 15% of" in train.sweep_rule(recipe)
    with pytest.raises(train.UserError, match="no learning rate"):
        train.read_sweep(recipe, lrs[:3], [1.0, 1.5, 2.0])


def test_smoothing_is_centred():
    line = [float(i) for i in range(50)]
    assert train.smooth(line, 16)[16:-16] == pytest.approx(line[16:-16])  # a straight line keeps its place: no lag
    assert np.std(train.smooth([(-1.0) ** i for i in range(50)], 16)[8:-8]) < 0.05


def sweep_of(monkeypatch, steps, losses, recipe=None):
    """Return the Rates that a sweep finds where an epoch has `steps` and `losses(learning rates)` yields their loss.

    The sweep has as many steps as an epoch, unless a `recipe` says otherwise.
    """
    run = SimpleNamespace(recipe=recipe or Recipe(sweep_steps=steps), seed=0, training=None, steps_per_epoch=steps,
                          state=dict, load_state=dict)
    monkeypatch.setattr(train, "augmented_batches", lambda *arguments: iter(range(steps)))
    monkeypatch.setattr(train, "take_steps", lambda run, batches, schedule: (
        (torch.tensor(loss), None) for loss, _ in zip(losses([lr for lr, _ in schedule]), batches)))
    return train.find_rates(run)


@pytest.mark.parametrize("per_epoch, steps", [(1, 8), (49, 98), (98, 196), (150, 200), (391, 391)])
def test_a_sweep_has_200_steps_but_one_epoch_at_least_and_two_at_most(per_epoch, steps, monkeypatch):
    rates = sweep_of(monkeypatch, per_epoch, lambda lrs: (1 / (1 + i) for i in range(len(lrs))), Recipe())
    assert len(rates.sweep["lr"]) == steps and rates.sweep["lr"][-1] == pytest.approx(Recipe.sweep_range[1])


@pytest.mark.parametrize("curvature", [1.0, 50.0, 2000.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sweep_finds_the_known_rate_of_a_quadratic(curvature, seed, monkeypatch):
    def losses(lrs):  # of gradient descent on least squares with Hessian eigenvalues up to `curvature`, noisy targets
        generator = torch.Generator().manual_seed(seed)
        weight = 3 / math.sqrt(curvature) * torch.randn(8, generator=generator)
        scales = math.sqrt(curvature / 2) * torch.linspace(0.5, 1.0, 8)
        for lr in lrs:
            inputs = torch.randn(256, 8, generator=generator) * scales
            errors = inputs @ weight + 0.5 * torch.randn(256, generator=generator)
            yield errors.square().mean().item()  # Hessian 2 E[x x^T]: eigenvalues 2 scales^2
            weight = weight - lr * 2 * inputs.T @ errors / 256

    rates = sweep_of(monkeypatch, 200, losses)
    largest_stable_rate = 2 / curvature  # gradient descent diverges beyond it
    if largest_stable_rate < Recipe.sweep_range[1]:
        assert largest_stable_rate / 2 < rates.lr_max < largest_stable_rate * 2
        assert len(rates.sweep["lr"]) < 200, "it did not stop at divergence"
        assert max(rates.sweep["loss"]) < 1e6 * rates.sweep["loss"][0]
    else:
        assert rates.lr_max == pytest.approx(Recipe.sweep_range[1])
    assert rates.lr_min < rates.lr_max / 5
    assert len(rates.sweep["lr"]) == len(rates.sweep["loss"]) == len(rates.sweep["smoothed_loss"])
    assert np.diff(np.log(rates.sweep["lr"])) == pytest.approx(math.log(1e6) / 199)


@pytest.mark.parametrize("loss, steps", [
    (lambda step: 1.5 + 0.5 * math.cos(math.pi * min(step, 40) / 40) + max(0, step - 60) / 20, range(71, 78)),
    (lambda step: 2.0 if step < 20 else 1.0 if step < 60 else 1.4, [100]),
    (lambda step: 1.0 if step < 20 else 1.4 if step < 40 else 0.5, [100]),
    (lambda step: 4.0 if step == 50 else 1.0 - step / 1000, [100])],
    ids=["climbs", "climbs less", "climbs less at first", "one bad batch"])
def test_sweep_ends_where_the_loss_has_climbed_and_not_before(loss, steps, monkeypatch):
    assert len(sweep_of(monkeypatch, 100, lambda lrs: map(loss, range(100))).sweep["lr"]) in steps


def test_a_sweep_of_many_steps_is_linear(monkeypatch):
    started = time.monotonic()
    sweep_of(monkeypatch, 25_000, lambda lrs: (2 - step / 25_000 for step in range(25_000)))  # batch 2
    assert time.monotonic() - started < 60  # looking at the whole history at every step took hours


def test_sweep_leaves_everything_as_it_was_interrupted_or_not():
    run = small_run(Recipe(batch_size=16, sweep_steps=4), 32)
    run.scaler = torch.amp.GradScaler("cpu", growth_interval=1)  # grows with every step
    for steps_before in (0, 2):
        batches = train.augmented_batches(run.recipe, run.training, 0, 1)
        list(train.take_steps(run, batches, [(1e-5, 0.9)] * steps_before))
        before, random_state = copy.deepcopy(run.state()), torch.get_rng_state()
        seen = []
        rates = train.find_rates(run, lambda *step: seen.append(step))
        assert [step for step, *_ in seen] == list(range(1, len(rates.sweep["lr"]) + 1)) and len(seen) > 2
        assert same(run.state(), before) and torch.equal(random_state, torch.get_rng_state())
        assert all(parameter.grad is None for parameter in run.model.parameters())
        with pytest.raises(KeyboardInterrupt):
            train.find_rates(run, lambda step, *_: step == 3 and interrupt())
        assert same(run.state(), before)


# ---- Steps, evaluation, epochs ---------------------------------------------------------------------------------------

def test_decay_is_decoupled_and_spares_biases_and_batch_norms():
    run = small_run()
    assert all(group["weight_decay"] == 0 and group["fused"] for group in run.optimizer.param_groups)
    run.optimizer.param_groups[0]["weight_decay"] = 30.0
    before = copy.deepcopy(list(run.model.parameters()))
    for parameter in run.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.optimizer.step()  # at Adam's own rate of 0.001
    for old, new in zip(before, run.model.parameters()):
        torch.testing.assert_close(new, (1 - 0.001 * 30 if new.ndim > 1 else 1) * old)


@pytest.mark.parametrize("lr_max, steps_per_epoch, memory", [(0.04, 98, 490), (0.01, 391, 1955), (0.04, 4, 100)])
def test_decay_alone_shrinks_weights_to_1_over_e_in_their_memory(lr_max, steps_per_epoch, memory):
    decay = train.weight_decay(Recipe(), lr_max, steps_per_epoch)
    assert (1 - lr_max * decay) ** memory == pytest.approx(1 / math.e, rel=0.01)  # as the step above multiplies
    assert train.weight_decay(Recipe(memory_epochs=math.inf), lr_max, steps_per_epoch) == 0


def written_out_loss(logits, labels, smoothing=Recipe.label_smoothing):
    log_p = logits.log_softmax(1)
    return -((1 - smoothing) * log_p[range(len(labels)), labels] + smoothing * log_p.mean(1)).mean()


@pytest.mark.parametrize("recipe", [Recipe(batch_size=8), Recipe(batch_size=8, memory_epochs=math.inf, l2=0.1)])
def test_a_step_against_pytorch_written_out(recipe):
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    run, reference = small_run(recipe), small_run(recipe)
    logits = reference.model(images)
    loss = written_out_loss(logits, labels)
    loss.backward()
    optimizer = torch.optim.Adam(reference.model.parameters(), lr=0.01, betas=(0.9, Recipe.beta2), eps=Recipe.epsilon,
                                 weight_decay=recipe.l2)
    optimizer.step()
    reported, correct = one_step(run, images, labels, lr=0.01)
    torch.testing.assert_close(reported, loss.detach())
    assert correct == (logits.argmax(1) == labels).sum()
    for ours, theirs in zip(run.model.parameters(), reference.model.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_an_epoch_takes_each_step_at_its_rates_and_weighs_every_image_alike(monkeypatch):
    taken, take_steps = [], train.take_steps

    def steps(run, batches, schedule):
        for number, _ in enumerate(take_steps(run, batches, schedule), start=1):
            taken.append({(group["lr"], *group["betas"]) for group in run.optimizer.param_groups})
            yield torch.tensor(float(number)), torch.tensor((4, 3, 2)[number - 1])
    monkeypatch.setattr(train, "take_steps", steps)
    run, rates = small_run(Recipe(batch_size=4, epochs=2), 10), train.Rates(0.001, 0.01)
    row = next(train.epochs(run, rates))
    assert taken == [{(lr, beta1, Recipe.beta2)} for lr, beta1 in train.plan_epoch(run.recipe, rates, 1, 3)]
    assert row["train_loss"] == pytest.approx((4 * 1 + 4 * 2 + 2 * 3) / 10)
    assert row["train_accuracy"] == pytest.approx((4 + 3 + 2) / 10)


def test_prediction_and_evaluation_against_pytorch_written_out(monkeypatch):
    run = small_run(count=10)
    images, labels = run.test
    run.averaged(images)  # gives the running statistics something other than their start
    run.averaged.eval()
    with torch.no_grad():
        expected, mirrored = run.averaged(images), run.averaged(TF.hflip(images))
    run.averaged.train()
    monkeypatch.setattr(train, "EVAL_BATCH_SIZE", 4)  # three batches, the last one smaller
    torch.testing.assert_close(train.predict(run, images), expected)
    torch.testing.assert_close(train.predict(run, images, mirror=True), mirrored)
    result = train.evaluate(run)
    assert result["test_loss"] == pytest.approx(written_out_loss(expected, labels).item(), rel=1e-5)
    assert result["test_accuracy"] == sum(expected.argmax(1).tolist()[i] == labels[i] for i in range(10)) / 10


@pytest.mark.parametrize("average_epochs, memory", [(2, 6), (0.5, 1.5), (0, 1)])
def test_the_averaged_weights_against_a_sum_over_all_steps(average_epochs, memory):
    run = small_run(Recipe(batch_size=4, epochs=4, average_epochs=average_epochs), 10)  # 3 steps an epoch
    steps = []
    run.optimizer.register_step_post_hook(lambda *_: steps.append(copy.deepcopy(run.model.state_dict())))
    list(train.epochs(run, train.Rates(0.001, 0.01)))
    assert len(steps) == 12
    shares = [1.0]  # of each step's weights in the average: equal ones at first, then each fades
    for step in range(2, 13):
        newest = 1 / min(step, memory)
        shares = [share * (1 - newest) for share in shares] + [newest]
    for name, values in run.averaged.state_dict().items():
        if values.is_floating_point():
            torch.testing.assert_close(values, sum(share * step[name] for share, step in zip(shares, steps)))


# ---- The GPU's side, without a GPU: fake CUDA tensors, and meta tensors for what CUDA cannot fake --------------------

class OnlyCuda(TorchDispatchMode):
    """Fails at an operation that makes a tensor off the GPU; fake tensors fail where the host would wait."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "cuda", function
        return result


def fake_run(device, dtype):
    """Return a Run on a device that is not there, its first epoch of three batches, as `start` would lay it out."""
    with torch.device(device):
        model = train.ResNet()
        splits = [train.Split(torch.empty(20, 3, size, size, dtype=dtype).contiguous(
            memory_format=train.memory_format(device)), torch.zeros(20, dtype=torch.long)) for size in (40, 32)]
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # Module.to does not work on fake tensors
            module.weight = nn.Parameter(module.weight.detach().contiguous(memory_format=train.memory_format(device)))
    optimizer, scaler = torch.optim.Adam(model.parameters()), torch.amp.GradScaler(device, enabled=False)
    return train.Run(Recipe(batch_size=8), 0, device, dtype, None, None, *splits, model, model, optimizer, scaler)


def is_laid_out(images, dtype):
    return images.dtype == dtype and images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_data_and_model_stay_there_in_their_layout_and_precision(monkeypatch, dtype):
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    monkeypatch.setattr(train, "epoch_generator", lambda *arguments: None)  # there is no generator without a GPU
    with FakeTensorMode():
        split = train.Split(torch.zeros(20, 3, 32, 32, dtype=torch.uint8), torch.zeros(20, dtype=torch.long))
        prepared = train.prepare(split, torch.ones(3), torch.ones(3), "cuda", dtype, 4, "reflect")
        assert prepared.images.device.type == prepared.labels.device.type == "cuda"
        assert is_laid_out(prepared.images, dtype)
        run, outputs = fake_run("cuda", dtype), []
        for module in run.model.modules():
            module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
        with OnlyCuda():
            batches = list(train.augmented_batches(run.recipe, prepared, 0, 1))
            logits, mirrored = (train.predict(run, run.test.images, mirror) for mirror in (False, True))
        assert [len(labels) for _, labels in batches] == [8, 8, 4]
        assert all(is_laid_out(images, dtype) for images, _ in batches)
        assert logits.shape == mirrored.shape == (20, 10) and logits.dtype == torch.float32
        assert len(outputs) > 60 and all(output.dtype == dtype for output in outputs)
        if dtype != torch.bfloat16:  # convolutions in which PyTorch fakes with the layout of this machine's CPU
            assert all(is_laid_out(output, dtype) for output in outputs if output.ndim == 4 and output.shape[-1] > 1)


def test_no_step_of_an_epoch_waits_for_the_gpu(monkeypatch):
    monkeypatch.setattr(train, "epoch_generator", lambda *arguments: None)
    run = fake_run("meta", torch.float32)
    run.autocast = contextlib.nullcontext
    waits, stack = [], torch.stack  # the epoch's losses are read at once, after its last step
    monkeypatch.setattr(torch, "stack", lambda losses: waits.append(len(losses)) or stack(losses))
    with pytest.raises(NotImplementedError, match="meta"):
        next(train.epochs(run, train.Rates(0.01, 0.1)))  # reading a value of a meta tensor raises
    assert waits == [3] and all(parameter.grad.device.type == "meta" for parameter in run.model.parameters())


# ---- Checkpoint and resume -------------------------------------------------------------------------------------------

def lasting(report):
    """Return what of a report is the same for two runs alike: all but times and file names."""
    if isinstance(report, dict):
        return {name: lasting(value) for name, value in report.items()
                if "second" not in name and name not in ("output", "checkpoint")}
    return [lasting(row) for row in report] if isinstance(report, list) else report


def test_a_run_stopped_in_any_way_ends_as_an_undisturbed_one(workplace):
    arguments, seen = ("--epochs", 16, "--checkpoint", "run.pt", "--set", "average_epochs=2", *RATES), 0
    for number, code, said, status in (
            (signal.SIGINT, 130, r"\ninterrupted\n", "interrupted"),
            (signal.SIGTERM, 143, r"\ninterrupted\n", "interrupted"),
            (signal.SIGHUP, 129, r"\ninterrupted\n", "interrupted"),
            (None, 1, r"error: nobody reads the output.*\n", "interrupted"),
            (signal.SIGKILL, -signal.SIGKILL, "", "running")):
        process = workplace.start(*arguments)
        workplace.wait_for_epoch(process, seen + 1)  # every look at the file until then found it whole
        process.send_signal(number) if number else process.stdout.close()
        assert process.wait(60) == code and re.fullmatch(said, process.stderr.read())
        report = workplace.report()
        assert report["summary"]["status"] == status and len(report["epochs"]) > seen
        seen = len(report["epochs"])
    assert workplace.run(*arguments) == 0
    resumed = workplace.report()
    assert workplace.run(*arguments, "--checkpoint", "whole.pt") == 0
    assert lasting(resumed) == lasting(workplace.report()) and len(resumed["epochs"]) == 16
    states = [torch.load(name, weights_only=True)["run"] for name in ("run.pt", "whole.pt")]
    assert same(*({part: state[part] for part in ("model", "averaged", "optimizer")} for state in states))


def test_a_finished_run_goes_on_in_its_own_file_and_a_new_run_has_a_new_one(workplace):
    arguments = [*SMALL, "--epochs", "1", "--no-figures", *RATES]
    assert train.main([*arguments, "--checkpoint", "run.pt"]) == 0
    (path,) = Path("results").glob("*.json")
    shutil.rmtree("results")
    assert train.main([*arguments, "--checkpoint", "run.pt"]) == 0
    report = workplace.report(path)
    assert len(report["epochs"]) == 1 and report["summary"]["status"] == "complete"
    assert train.main(arguments) == 0 and len(list(Path("results").glob("*.json"))) == 2


@pytest.mark.parametrize("arguments, difference", [
    (["--epochs", 2], "epochs 1, not 2"), (["--epochs", 1, "--holdout", 10], "holdout 0, not 10"),
    (["--epochs", 2, "--seed", 7], "epochs 1, not 2; seed 0, not 7"),
    (["--epochs", 1, "--set", "memory_epochs=3"], "run.pt is of a run with memory_epochs 5.0, not 3.0.\n")])
def test_checkpoint_of_another_configuration_is_refused(workplace, arguments, difference):
    assert workplace.run("--epochs", 1, "--checkpoint", "run.pt", *RATES) == 0
    before = Path("run.pt").read_bytes(), workplace.report()
    assert difference in workplace.fail(*arguments, "--checkpoint", "run.pt", *RATES)
    assert (Path("run.pt").read_bytes(), workplace.report()) == before


def test_no_epochs_find_the_rates_and_stop_in_two_sittings_too(workplace, capsys, monkeypatch):
    arguments, find_rates = ("--epochs", 0, "--runs", 2, "--checkpoint", "run.pt"), train.find_rates
    monkeypatch.setattr(train, "find_rates", lambda run, *others: interrupt() if run.seed else find_rates(run, *others))
    assert workplace.run(*arguments) == 130 and not Path("run.json").exists()
    monkeypatch.setattr(train, "find_rates",
                        lambda run, *others: find_rates(run, *others) if run.seed else pytest.fail())
    assert workplace.run(*arguments) == 0  # seed 0 is not swept again
    statistic = workplace.report()
    for seed in (0, 1):
        report = workplace.report(f"run-seed{seed}.json")
        assert report["epochs"] == [] and report["summary"]["status"] == "complete"
        assert report["lr_sweep"]["lr_max"] == report["config"]["lr_max"] == statistic["lr_max"][seed]
        assert report["summary"]["final_test_accuracy"] is None and report["summary"]["tta_test_accuracy"] is None
    assert "mean" not in statistic and statistic["lr_min"][0] < statistic["lr_max"][0]
    assert ("lr_max" in statistic["config"]) == (len(set(statistic["lr_max"])) == 1)  # what all of them found is shared
    assert f"{min(statistic['lr_max']):.3g} to {max(statistic['lr_max']):.3g}" in capsys.readouterr().out


@pytest.mark.parametrize("damage", [lambda state: state.pop("config"), lambda state: state["run"].pop("epoch"),
                                    lambda state: state["report"].pop("summary"),
                                    lambda state: state["report"]["config"].pop("lr_max"), None])
def test_a_checkpoint_that_lacks_something_is_refused(workplace, damage):
    assert workplace.run("--epochs", 1, "--checkpoint", "run.pt", *RATES) == 0
    state = torch.load("run.pt", weights_only=True)
    if damage:
        damage(state)
        torch.save(state, "run.pt")
    else:
        Path("run.pt").write_text("something else")
    assert "run.pt is not a checkpoint" in workplace.fail("--epochs", 1, "--checkpoint", "run.pt", *RATES)


# ---- Files -----------------------------------------------------------------------------------------------------------

def test_a_finished_write_replaces_the_file_and_a_broken_one_leaves_it(tmp_path, monkeypatch):
    path, write_bytes = tmp_path / "file", Path.write_bytes
    (tmp_path / "file.tmp").write_text("the user's own")
    train.write_json(path, {"epoch": 1})

    def die_half_way(temporary, content):
        write_bytes(temporary, content[:5])
        assert json.loads(path.read_text()) == {"epoch": 1}  # a reader meanwhile sees the old file
        monkeypatch.setattr(Path, "write_bytes", write_bytes)
        train.write_json(path, {"epoch": 3})  # and another run may write it
        raise KeyboardInterrupt
    monkeypatch.setattr(Path, "write_bytes", die_half_way)
    with pytest.raises(KeyboardInterrupt):
        train.write_json(path, {"epoch": 2})
    assert json.loads(path.read_text()) == {"epoch": 3} and sorted(os.listdir(tmp_path)) == ["file", "file.tmp"]
    assert (tmp_path / "file.tmp").read_text() == "the user's own"


@pytest.mark.parametrize("option", ["--output", "--checkpoint", "--weights"])
def test_a_place_that_is_no_file_is_named_before_training(workplace, monkeypatch, option):
    Path("file").write_text("")
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    os.symlink("loop", "loop")
    monkeypatch.setattr(train, "load_cifar10", lambda *arguments: pytest.fail("it went on"))
    for place in ("file/run", "data", "pipe", "link", "loop"):
        assert f"cannot write {place}" in workplace.fail("--epochs", 1, option, place)
    assert Path("pipe").is_fifo() and Path("link").is_symlink()


def test_a_link_stays_and_its_target_is_written(workplace):
    Path("elsewhere").mkdir()
    os.symlink("elsewhere/target.json", "run.json")
    assert workplace.run("--epochs", 1, *RATES) == 0
    assert Path("run.json").is_symlink()
    assert workplace.report("elsewhere/target.json")["summary"]["status"] == "complete"


def test_a_full_disk_is_named(workplace, monkeypatch):
    write_bytes = Path.write_bytes

    def fail(path, content):
        if path.name == "run.pt":
            raise OSError(28, "No space left on device")
        write_bytes(path, content)
    monkeypatch.setattr(Path, "write_bytes", fail)
    message = workplace.fail("--epochs", 1, "--checkpoint", "run.pt", *RATES)
    assert "cannot write run.pt ([Errno 28] No space left on device)" in message
    assert workplace.report()["summary"]["status"] == "interrupted"


def test_trained_weights_classify_images_without_the_run(workplace):
    changed = ("--set", "logit_scale=0.25", "--set", "beta1=0.9,0.8", "--set", "average_epochs=2")
    assert workplace.run("--epochs", 2, "--weights", "weights.pt", "--checkpoint", "run.pt", *changed, *RATES) == 0
    model, mean, std, classes = train.load_weights("weights.pt")
    states = torch.load("run.pt", weights_only=True)["run"]
    assert same(model.state_dict(), states["averaged"]) and not same(model.state_dict(), states["model"])
    images, labels = train.load_cifar10("data")[1]
    predicted = model(train.normalise(images, mean, std)).argmax(1)
    assert (predicted == labels).float().mean() == pytest.approx(
        workplace.report()["summary"]["final_test_accuracy"], abs=0.051)  # one of 20: rounding may decide it
    assert model.logit_scale == 0.25 and len(classes) == 10 and not model.training


# ---- A run and what it writes ----------------------------------------------------------------------------------------

def test_a_run_reports_all_it_should(workplace, capsys):
    assert workplace.run("--epochs", 8, "--batch-size", 30, "--checkpoint", "run.pt") == 0
    report = workplace.report()
    config, data, sweep, rows, summary = (report[name] for name in ("config", "data", "lr_sweep", "epochs", "summary"))

    assert config["epochs"] == 8 and config["batch_size"] == 30 and config["peak_epoch"] == pytest.approx(8 * 5 / 24)
    recipe = json.loads(json.dumps(dataclasses.asdict(Recipe(epochs=8, batch_size=30))))  # a pair is a list there
    assert {"epochs": 8, "batch_size": 30, **config["recipe"]} == recipe
    assert set(report["environment"]) == {"python", "torch", "torchvision", "numpy", "device", "device_name",
                                          "precision", "threads"}
    pixels = train.load_cifar10("data")[0].images.numpy() / 255
    assert data["mean"] == pytest.approx(pixels.mean(axis=(0, 2, 3)).tolist(), rel=1e-5)
    assert data["std"] == pytest.approx(pixels.std(axis=(0, 2, 3)).tolist(), rel=1e-5)
    assert (data["train_images"], data["test_images"], data["evaluated_on"]) == (100, 20, "test images")
    assert report["parameters"] == 6_573_130

    assert (sweep["lr_max"], sweep["lr_min"]) == (config["lr_max"], config["lr_min"]) and sweep["rule"]
    assert len(sweep["lr"]) == len(sweep["loss"]) == len(sweep["smoothed_loss"]) <= 8  # two epochs of four steps
    assert config["weight_decay"] == pytest.approx(0.01 / config["lr_max"])  # a memory of 100 steps, the shortest
    groups = torch.load("run.pt", weights_only=True)["run"]["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [config["weight_decay"], 0]

    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert all(set(row) == {"epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
                            "train_seconds", "test_seconds", "images_per_second", "elapsed_seconds"} for row in rows)
    assert rows[-1]["lr"] == pytest.approx(config["lr_min"])
    elapsed = summary["preprocess_seconds"] + np.cumsum([row["train_seconds"] for row in rows])
    assert [row["elapsed_seconds"] for row in rows] == pytest.approx(elapsed.tolist())
    assert all(row["images_per_second"] == pytest.approx(100 / row["train_seconds"]) for row in rows)
    assert summary["status"] == "complete" and summary["final_test_accuracy"] == rows[-1]["test_accuracy"]
    assert summary["total_seconds"] > summary["train_seconds"] + summary["sweep_seconds"]

    screen = capsys.readouterr().out
    assert "6,573,130 parameters" in screen and f"LRMAX {config['lr_max']:.3g}" in screen and "\r" not in screen
    table = screen[screen.index("  epoch  "):].splitlines()[:9]
    assert len(set(map(len, table))) == 1, "the table's rows are not of one width"


def test_the_mirror_image_is_averaged_in(workplace, monkeypatch):
    predict, seen = train.predict, {}
    monkeypatch.setattr(train, "predict", lambda run, images, mirror=False: seen.update(
        {mirror: predict(run, images, mirror)}) or seen[mirror])
    assert workplace.run("--epochs", 2, *RATES) == 0
    labels = train.load_cifar10("data")[1].labels
    right = ((seen[False] + seen[True]).argmax(1) == labels).sum().item()
    assert workplace.report()["summary"]["tta_test_accuracy"] == right / 20


def test_training_learns_far_above_chance(workplace):
    assert workplace.run("--epochs", 8, "--lr-max", 0.003, "--lr-min", 0.0001) == 0
    rows = workplace.report()["epochs"]
    assert rows[0]["train_accuracy"] < 0.5 and rows[-1]["train_accuracy"] > 0.8
    assert workplace.report()["summary"]["final_test_accuracy"] >= 0.6  # chance: 0.1
    assert workplace.report()["lr_sweep"] is None


def test_milestones_are_the_first_epochs_that_reach_them():
    rows = [{"epoch": epoch, "test_accuracy": accuracy, "elapsed_seconds": 10.0 * epoch, "train_seconds": 9.0}
            for epoch, accuracy in enumerate([0.5, 0.91, 0.93, 0.89], start=1)]
    report = {"epochs": rows, "summary": {}}
    train.summarise(report, "complete")
    assert report["summary"]["epochs_to"] == {"0.90": 2, "0.94": None}
    assert report["summary"]["seconds_to"] == {"0.90": 20.0, "0.94": None}
    assert report["summary"]["final_test_accuracy"] == 0.89 and report["summary"]["train_seconds"] == 36.0
    assert (report["summary"]["best_test_accuracy"], report["summary"]["best_epoch"]) == (0.93, 3)
    train.summarise(report, "interrupted")
    assert report["summary"]["final_test_accuracy"] is None


def test_runs_report_each_seed_and_the_statistics_of_those_that_did_not_diverge(workplace, capsys, monkeypatch):
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run: {"test_loss": math.nan} if run.seed == 5 else evaluate(run))
    assert workplace.run("--epochs", 1, "--runs", 4, "--seed", 4, *RATES) == 1
    captured, statistic = capsys.readouterr(), workplace.report()
    reports = [workplace.report(f"run-seed{seed}.json") for seed in (4, 5, 6, 7)]
    assert [report["config"]["seed"] for report in reports] == statistic["seed"] == [4, 5, 6, 7]
    assert reports.pop(1)["summary"]["status"] == "diverged"
    assert "1 diverged, not in the statistics: seed 5" in captured.out and "error: the loss became NaN" in captured.err
    assert statistic["diverged"] == [5] and statistic["runs"] == 4

    assert len({report["epochs"][0]["train_loss"] for report in reports}) == 3
    accuracies = [report["summary"]["final_test_accuracy"] for report in reports]
    assert statistic["final_test_accuracy"] == [accuracies[0], None, *accuracies[1:]]
    assert statistic["mean"] == pytest.approx(np.mean(accuracies))
    assert statistic["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert (statistic["min"], statistic["max"]) == (min(accuracies), max(accuracies))
    assert statistic["reached_goal"] == sum(accuracy >= 0.94 for accuracy in accuracies)
    assert f"mean {np.mean(accuracies):.2%}" in captured.out
    assert ("to 94%" in captured.out) == (statistic["reached_goal"] > 0)
    assert statistic["config"]["lr_max"] == 0.01 and statistic["config"]["output"] == "run.json"
    assert not {"seed", "checkpoint"} & {name for name, value in statistic["config"].items() if value is not None}


@pytest.mark.parametrize("name", ["tuned", "plain"])
def test_another_recipe_reaches_the_run(workplace, capsys, monkeypatch, name):
    runs, start = [], train.start
    monkeypatch.setattr(train, "start", lambda *arguments: runs.append(start(*arguments)) or runs[-1])
    values = {"memory_epochs": "inf", "beta1": "0.9,0.8", "beta2": "0.98", "epsilon": "2e-2",
              "average_epochs": "2", "padding_mode": "constant", "cutout": "4", "padding": "4"}
    arguments = [part for constant, value in values.items() for part in ("--set", f"{constant}={value}")]
    assert workplace.run("--epochs", 1, "--recipe", name, *arguments, *RATES) == 0
    changed = {"memory_epochs": math.inf, "beta1": (0.9, 0.8), "beta2": 0.98, "epsilon": 0.02,
               "average_epochs": 2.0, "padding_mode": "constant", "cutout": 4}
    assert runs[0].recipe == dataclasses.replace(train.RECIPES[name], epochs=1, batch_size=50, **changed)
    for group in runs[0].optimizer.param_groups:
        assert group["eps"] == 0.02 and group["betas"] == (pytest.approx(0.9), 0.98)
    config = workplace.report()["config"]
    assert config["weight_decay"] == 0 and config["recipe"]["memory_epochs"] == "inf"  # JSON has no infinity
    (recipe,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("recipe ")]
    assert recipe.startswith(f"recipe     {name}, ") and ", cutout 4 instead of 8" in recipe
    assert " padding " not in recipe


def test_one_rate_alone_leaves_the_other_as_it_is(workplace):
    assert workplace.run("--epochs", 1, "--lr-max", 0.5) == 0
    report = workplace.report()
    assert report["config"]["lr_max"] == 0.5 == 300 * report["config"]["lr_min"] and report["lr_sweep"] is None
    assert workplace.run("--epochs", 1, "--lr-min", 1e-9) == 0
    report = workplace.report()
    assert report["config"]["lr_min"] == 1e-9 and report["config"]["lr_max"] == report["lr_sweep"]["lr_max"]
    assert "above LRMAX" in workplace.fail("--epochs", 1, "--lr-min", 1e9)


def test_figures_are_drawn_where_matplotlib_is(workplace):
    pytest.importorskip("matplotlib")
    assert train.main([*SMALL, "--epochs", "1", "--output", "run.json"]) == 0
    figures = {path.name for path in Path().glob("*.png")}
    assert figures == {f"run-{name}.png" for name in ("sweep", "curves", "schedule", "augmented", "misclassified")}
    assert all(Path(name).stat().st_size > 5000 for name in figures)


def no_backend(*arguments, **keywords):
    raise ValueError("no such\nbackend")


@pytest.mark.parametrize("module, line", [
    (None, "figures    skipped: matplotlib is not installed (pip install matplotlib)\n"),
    (SimpleNamespace(Figure=no_backend), "figures    not drawn: no such backend\n")])
def test_figures_that_cannot_be_drawn_cost_one_line(workplace, capsys, monkeypatch, module, line):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    assert train.main([*SMALL, "--epochs", "1", "--runs", "2", "--output", "run.json", *RATES]) == 0
    screen = capsys.readouterr().out
    assert screen.count(line) == screen.count("figure") == 2 and not list(Path().glob("*.png"))


def test_status_line_fits_its_terminal_and_is_for_terminals_alone(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "30")
    monkeypatch.setattr(train, "STATUS_SECONDS", 0)
    run = SimpleNamespace(recipe=Recipe(epochs=3), epoch=1)
    for terminal in (False, True):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        on_step = train.status_line(run)
        on_step(1, 10, 0.1, torch.tensor(1.0))
        on_step(2, 10, 0.1, torch.tensor(2.0))
        train.overwrite("")
        shown = capsys.readouterr().out
        assert shown == ("" if not terminal else f"\r{'epoch 2/3  step 2/10  learning rate'[:29]}\r\r{'':<29}\r")


# ---- Precision -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("device, capabilities, native, expected", [
    ("cpu", {"avx512_bf16": True}, None, "bf16"), ("cpu", {"amx_bf16": True}, None, "bf16"),
    ("cpu", {"avx512_bf16": False, "avx2": True}, None, "fp32"), ("cpu", {}, None, "fp32"), ("mps", {}, None, "fp32"),
    ("cuda", {}, True, "bf16"), ("cuda", {}, False, "fp16")])  # a T4 emulates bf16: that does not count
def test_precision_follows_the_instructions_of_the_hardware(monkeypatch, device, capabilities, native, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert train.choose_precision(device) == expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert train.choose_precision("cpu") == "fp32"  # where an older PyTorch cannot tell


@pytest.mark.parametrize("device, precision, sentence", [
    ("cuda", "auto", "device cuda: PyTorch finds no such device here; try cpu"),
    ("cuda:1", "auto", "device is 'cuda:1': one of auto, cuda, mps, cpu is needed"),
    (torch.device("cpu"), "auto", "device is device.*: one of auto, cuda, mps, cpu is needed"),
    ("cpu", "fp8", "precision is 'fp8': one of auto, fp32, bf16, fp16 is needed"),
    ("mps", "fp16", "precision fp16 needs gradient scaling")])
def test_a_run_is_not_started_on_what_is_not_there(monkeypatch, device, precision, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(ValueError, match=f"^{sentence}"):
        train.start(Recipe(), random_split(8), random_split(8), device=device, precision=precision)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_in_low_precision_go_as_in_full(precision):
    losses = {}
    for name in ("fp32", precision):
        run = small_run(Recipe(batch_size=4), 4, precision=name)  # where fp16 is emulated, an image takes a second
        assert run.training.images.dtype == run.dtype
        losses[name] = [one_step(run, *run.test)[0].item() for _ in range(3)]
        assert all(parameter.dtype == torch.float32 for parameter in run.model.parameters())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05) and losses["fp32"][-1] < losses["fp32"][0]


def test_fp16_skips_a_step_whose_gradients_overflow():
    run = small_run(Recipe(batch_size=2), 2, precision="fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
    before = run.model.head.weight.clone()
    one_step(run, *run.test)
    assert torch.equal(run.model.head.weight, before) and run.scaler.get_scale() < 2.0 ** 40


def test_a_precision_that_a_cpu_only_emulates_is_called_slow(capsys):
    config = train.parse_arguments(["--device", "cpu", "--precision", "fp16", "--output", "run.json"])
    report = train.new_report(config, small_run(), "test images")
    train.print_heading(report)
    assert "slow       unless this CPU has instructions for fp16" in capsys.readouterr().out
    report["environment"]["precision"] = "fp32"
    train.print_heading(report)
    assert "slow" not in capsys.readouterr().out


# ---- When things go wrong --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, sentence", [
    (["--epochs", "-3"], "--epochs: '-3' is no whole number in [0, 100000]"),
    (["--epochs", "1000000000"], "--epochs: '1000000000' is no whole number in [0, 100000]"),
    (["--epochs", "many"], "--epochs: 'many' is no whole number"),
    (["--batch-size", "2.5"], "--batch-size: '2.5' is no whole number in [2, 50000]"),
    (["--batch-size", "512", "--subset", "100"], "--batch-size 512 is above the 100 training images"),
    (["--subset", "50001"], "--subset: '50001' is no whole number in [5, 50000]"),
    (["--lr-max", "0"], "--lr-max: '0' is no number in (0, inf)"),
    (["--lr-max", "nan"], "--lr-max: 'nan' is no number in (0, inf)"),
    (["--lr-max", "high"], "--lr-max: 'high' is no number in (0, inf)"),
    (["--lr-min", "0.1", "--lr-max", "0.01"], "--lr-min 0.1 is above --lr-max 0.01"),
    (["--holdout", "50000"], "--holdout 50000 leaves nothing to train on"),
    (["--subset", "1000", "--holdout", "1000"], "--holdout 1000 leaves nothing to train on"),
    (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    (["--seed", "-1"], "--seed: '-1' is no whole number"),
    (["--runs", "0"], "--runs: '0' is no whole number in [1, inf)"),
    (["--device", "cuda"], "--device cuda: PyTorch finds no such device here"),
    (["--device", "mps", "--precision", "fp16"], "--precision fp16 needs"),
    (["--output", "same", "--checkpoint", "./same"], "name the same file twice"),
    (["--epochs", "0", "--weights", "weights.pt"], "--weights: --epochs 0 trains none"),
    (["--set", "beta3=0.5"],
     "--set: 'beta3' is no constant of the recipe; there are peak_fraction, annihilation, beta1"),
    (["--set", "epochs=5"], "--set: 'epochs' is no constant of the recipe"),
    (["--set", "beta2"], "--set: beta2 is '': a number in [0, 1) is needed"),
    (["--set", "cutout=8.5"], "--set: cutout is '8.5': a whole number in [0, 31] is needed"),
    (["--set", "cutout=40"], "--set: cutout is 40: a whole number in [0, 31] is needed"),
    (["--set", "beta1=0.9"], "--set: beta1 is (0.9,): a pair of numbers in [0, 1) is needed")])
def test_options_without_sense_end_with_usage_and_one_sentence(capsys, monkeypatch, arguments, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: train.py") and sentence in message.splitlines()[-1]


def test_no_data_and_no_network(workplace, tmp_path):
    process = workplace.start("--data-dir", "elsewhere")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and CIFAR10.url in message[0]
    assert "elsewhere" in err.splitlines()[-1]
    assert not [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()]
    assert not (tmp_path / "run.json").exists()


def test_an_archive_laid_down_by_hand_is_unpacked_where_it_is_whole(workplace, tmp_path, monkeypatch):
    archive = tmp_path / "by-hand" / CIFAR10.filename
    archive.parent.mkdir()
    archive.write_bytes(b"half an archive")
    with pytest.raises(train.UserError, match="checksum is wrong") as error:
        train.load_cifar10(archive.parent)
    assert str(archive) in str(error.value) and os.listdir(archive.parent) == [archive.name]

    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "data" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    training, testing, _ = train.load_cifar10(archive.parent)
    assert len(training.labels) == 100 and len(testing.labels) == 20
    assert torch.equal(training.images, train.load_cifar10(tmp_path / "data")[0].images)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:-1] + b"!"])
def test_a_truncated_or_altered_file_is_named_and_not_trained_on(workplace, name, damage):
    path = Path("data") / CIFAR10.base_folder / name
    path.write_bytes(damage(path.read_bytes()))
    message = workplace.fail("--epochs", 1, *RATES)
    assert str(path) in message and "checksum is wrong" in message and not Path("run.json").exists()


def test_divergence_stops_at_once_and_says_where(workplace):
    message = workplace.fail("--epochs", 3, "--batch-size", 25, "--lr-max", 1e30, "--lr-min", 1e29)
    summary = workplace.report()["summary"]
    assert summary["status"] == "diverged" and summary["final_test_accuracy"] is None
    where = summary["diverged"]
    assert where["epoch"] == 1 and where["step"] == 2  # the first step is taken at finite weights
    assert f"epoch 1, step 2, learning rate {where['lr']:.3g}" in message and "--lr-max" in message


def test_without_standard_output_or_in_ascii_it_runs(workplace):
    arguments = [sys.executable, str(workplace.launcher), *SMALL, *REPORT, "--epochs", "1", *RATES]
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *arguments],
                            cwd=workplace.folder, capture_output=True, text=True)
    assert (closed.returncode, closed.stderr) == (0, "") and workplace.report()["summary"]["status"] == "complete"
    process = workplace.start("--epochs", 1, "--output", "zürich.json", *RATES, PYTHONIOENCODING="ascii")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "") and "z\\xfcrich.json" in out


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
                                   RuntimeError("MPS backend out of memory"), MemoryError(),
                                   RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")])
def test_out_of_memory_suggests_a_smaller_batch(workplace, monkeypatch, error):
    def fail(*arguments):
        raise error
    monkeypatch.setattr(train, "take_steps", fail)
    message = workplace.fail("--epochs", 1, *RATES).strip()
    assert len(message.splitlines()) == 1 and "out of memory" in message and "smaller --batch-size" in message
    assert workplace.report()["summary"]["status"] == "interrupted"


# ---- The notebook and what is written about it -----------------------------------------------------------------------

README = (SCRIPT.parent / "README.md").read_text()


def test_pasted_into_a_notebook_cell_it_runs_with_the_defaults(workplace):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in
                                               (workplace.small_data, SCRIPT.read_text(), f"%run {SCRIPT} --help")])
    client = nbclient.NotebookClient(notebook, timeout=300, allow_errors=True,
                                     resources={"metadata": {"path": str(workplace.folder)}})
    client.execute()
    assert not [output for cell in notebook.cells for output in cell.outputs if output.output_type == "error"]
    assert notebook.cells[2].outputs[0].text.startswith("usage: train.py")
    outputs = notebook.cells[1].outputs
    (report,) = map(json.loads, map(Path.read_text, Path("results").glob("*.json")))
    assert report["summary"]["status"] == "complete" and report["config"]["epochs"] == 24
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "LRMAX" in text and len([line for line in text.splitlines() if line.strip()[:2].strip().isdigit()]) == 24
    if importlib.util.find_spec("matplotlib"):  # five, or four where no test image was misclassified
        assert len([output for output in outputs if "image/png" in output.get("data", {})]) in (4, 5)


def test_importing_does_nothing_but_define():
    process = subprocess.run([sys.executable, "-c", "import train"], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_the_tables_and_quotes_are_those_of_the_reports():
    assert (SCRIPT.parent / "results" / "README.md").read_text() == tables.readme(), "run python results/tables.py"
    in_one_line = " ".join(README.split())  # a paragraph may break within a quote
    assert not [name for name, quote in tables.quotes().items() if " ".join(quote.split()) not in in_one_line]


def test_the_readme_shows_what_a_run_prints(capsys):
    report = tables.load("h100")["h100/default-seed0.json"]
    assert not tables.by_earlier_rule(report)
    train.print_heading(report)
    train.print_table_head(report)
    train.print_summary(report)
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("slow ")]
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)[1].splitlines()
    shown.remove("    ...")
    assert len(shown) > 10 and shown == [line for line in printed if line in shown]


def test_the_readme_has_the_options_of_the_help(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    screen = capsys.readouterr().out
    options = set(re.findall(r"^  (--[a-z-]+)", screen, re.MULTILINE))
    assert len(options) == screen.count("(default") == 17
    assert options == set(re.findall(r"`(--[a-z-]+)", re.search(r"## Options\n(.*?)\n## ", README, re.DOTALL)[1]))


def test_reports_of_one_table_may_not_differ_in_what_it_does_not_show():
    reports = list(tables.load("earlier-sweep").values())
    reports[1]["config"]["batch_size"] = 128
    with pytest.raises(ValueError, match="batch_size"):
        tables.check_alike(reports, "epochs", "batch_size")


def test_a_mean_is_of_one_recipe_and_rule():
    earlier, today = (list(tables.load(study).values()) for study in ("earlier-sweep", "raw-weights"))
    assert "mean of 3 seeds (standard deviation 0.19%; 94.56%, 94.66%, 94.30%)" in tables.in_words(earlier)
    assert "mean of 6 seeds (standard deviation 0.17%; 94.30% to 94.66%)" in tables.in_words(2 * earlier)
    assert "mean of 5 seeds (standard deviation 0.15%; 94.56%, 94.66%, 94.30%, 94.56%, 94.66%)" in tables.in_words(
        earlier + earlier[:2])
    with pytest.raises(ValueError, match="several configurations.*earlier rule"):
        tables.in_words(earlier + today)


def test_a_row_of_several_runs_is_of_one_command_and_its_own_rates():
    runs = [tables.load("default")[f"default/seed{seed}.json"] for seed in (0, 1, 2)]
    assert tables.several_runs("row", runs) == [
        "row", "0.0579 to 0.0667", 3, "94.67%", "0.05%", "95.04%", "7", "19 to 20"]
    for changed, complaint in (({"epochs": 10}, "differ in epochs"), ({"device": "cuda"}, "differ in device"),
                               ({"precision": "fp16"}, "several configurations"),
                               ({"lr_max": 0.06}, "several configurations")):
        other = {**runs[0], "config": {**runs[0]["config"], **changed}}
        with pytest.raises(ValueError, match=complaint):
            tables.several_runs("row", [*runs[1:], other])
    with pytest.raises(ValueError, match="row is not at the rate that its own sweep"):
        tables.several_runs("row", [{**runs[0], "lr_sweep": None}])
    for first, words in (([7, 7], "7"), ([9, None, 7], "7 to 9, 1 never"), ([None, None], "never")):
        reports = [{"summary": {"epochs_to": {"0.90": epoch}}} for epoch in first]
        assert tables.epochs_to(reports, "0.90") == words


def test_the_reports_of_each_command_on_the_gpu_are_of_that_command():
    for command, name in tables.COMMANDS.items():
        config = train.parse_arguments([*command.split()[2:], "--device", "cpu"])
        reports = tables.load("h100", f"{name}-seed*").values()
        assert reports
        for report in reports:
            assert report["environment"]["device_name"].startswith("NVIDIA H100")
            assert report["data"]["train_images"] == 50_000 and report["data"]["evaluated_on"] == "test images"
            assert report["config"]["epochs"] == config.recipe.epochs
            assert tables.recipe_in_words(report) == config.recipe_name
            assert report["config"]["precision"] == ("fp16" if "fp16" in command else "bf16")


def test_the_table_of_held_out_images_compares_with_the_recipe_at_one_rate():
    report = tables.load("h100")["h100/holdout-lr-max-0.06-seed0.json"]

    def at(lr_max, value, **constants):
        config = {**report["config"], "lr_max": lr_max, "recipe": {**report["config"]["recipe"], **constants}}
        return {**report, "config": config, "summary": {"final_test_accuracy": value}}
    runs = {"a": at(0.03, 0.91), "b": at(0.06, 0.90), "c": at(0.06, 0.94), "d": at(0.06, 0.97, label_smoothing=0.1)}
    table, distances = tables.held_out_table(runs)
    deviation = 100 * math.sqrt(2 * 0.02 ** 2)  # of the one row that has two runs
    assert tables.ahead_in_words({"a": 0.9}, {"b": 0.90001}, 0.01) == "+0.00 ± 1.41"
    np.testing.assert_allclose(distances, [(-1, deviation * math.sqrt(1.5)), (5, deviation * math.sqrt(1.5))])
    assert table.splitlines()[2:] == [
        "| tuned | 0.03 | 1 | 91.00% | - | [91.00%](a) | -1.00 ± 3.46 |",
        "| tuned | 0.06 | 2 | 92.00% | 2.83% | [90.00%](b), [94.00%](c) | - |",
        "| tuned, label_smoothing 0.1 | 0.06 | 1 | 97.00% | - | [97.00%](d) | +5.00 ± 3.46 |"]


def test_the_table_of_the_recipe_to_the_letter_leaves_out_no_run_and_no_row():
    reports = {**tables.load("letter"), **tables.load("default")}
    rows = tables.letter_table(dict(reversed(reports.items()))).splitlines()[2:]
    assert [name for name in reports if not any(name in row for row in rows)] == []
    assert len(rows) == len(tables.REPORTED)
    plain = [reports[f"letter/plain-seed{seed}.json"] for seed in (0, 1)]
    lr_max = [report["config"]["lr_max"] for report in plain]
    assert rows[0].startswith("| plain | {:.3g} found, {:.3g} found | {:.3g}, {:.3g} | {:.2%} | ".format(
        *lr_max, *(lr / 300 for lr in lr_max), tables.mean(plain)))
    assert f"| [{tables.accuracy(plain[0]):.2%}](letter/plain-seed0.json), " in rows[0]
    with pytest.raises(ValueError, match="annihilation 10000"):
        tables.letter_table({name: report for name, report in reports.items() if "annihilation" not in name})
    reports["another"] = copy.deepcopy(reports["default/seed0.json"])
    reports["another"]["config"]["recipe"]["label_smoothing"] = 0.1
    with pytest.raises(ValueError, match="label_smoothing 0.1"):
        tables.letter_table(reports)


def test_the_table_of_others_rates_leaves_out_no_run_and_no_rule():
    sweeps = [report for report in tables.todays_sweeps(tables.load("sweeps")) if report["config"]["batch_size"] == 512]
    run = tables.load("grid")["grid/lr-max-0.06-seed0.json"]

    def at(lr_max, **changed):
        return {**run, "config": {**run["config"], "lr_max": lr_max, "recipe": {**run["config"]["recipe"], **changed}}}
    runs = {rule: at(float(f"{np.median([tables.others_rules(report)[rule] for report in sweeps]):.2g}")) for rule in
            ("fastai, valley", "fastai, minimum / 10", "pytorch-lr-finder, steepest")}
    rows = tables.others_rates_table(runs, sweeps, [run]).splitlines()[2:]
    assert len(rows) == 3 and all(f"| {rule} | {runs[rule]['config']['lr_max']:.2g} |" in row and f"({rule}) | 0.00 |"
                                  in row for rule, row in zip(runs, rows))
    a_rate = runs["fastai, valley"]["config"]["lr_max"]
    for changed in ({"fastai, valley": at(1.5 * a_rate)}, {"fastai, valley": at(a_rate, label_smoothing=0.1)},
                    {"another": at(1.5 * a_rate)}):
        with pytest.raises(ValueError, match="without a run, or a run at none"):
            tables.others_rates_table({**runs, **changed}, sweeps, [run])


def test_the_proxy_puts_recipes_in_the_order_of_whole_runs():
    whole = {name: report for study in ("holdout", "raw-weights", "earlier-sweep", "letter")
             for name, report in tables.load(study).items()}
    rows = [row.split(" | ") for row in tables.proxy_known_table(tables.load("proxy"), whole).splitlines()[2:]]
    for column in (4, 5):
        percentages = [re.findall(r"\[([\d.]+)%\]", row[column]) for row in rows]
        means = [np.mean(list(map(float, row))) for row in percentages if row]
        assert len(means) >= 2 and means == sorted(means, reverse=True)
    with pytest.raises(ValueError, match="not a run of the proxy"):
        tables.proxy_accuracies(tables.load("grid"))


def test_the_table_of_the_proxy_compares_means_and_says_how_sure_they_are():
    report = tables.load("proxy")["proxy/tuned-seed0.json"]

    def run(seed, accuracy, average, **changed):
        config = {**report["config"], "seed": seed, "recipe": {**report["config"]["recipe"], **changed}}
        last = {**report["epochs"][-1], "test_accuracy": accuracy, "average_accuracy": {"50": average}}
        return {**report, "config": config, "epochs": [last]}
    runs = {"a": run(0, 0.90, 0.91), "b": run(1, 0.92, 0.93), "c": run(0, 0.95, 0.5, beta2=0.9)}
    rows = tables.proxy_table(runs).splitlines()[2:]
    # Of the two rows of two runs, both deviate by the root of 2 points: that is what one run is sure to.
    assert rows[0] == "| tuned, raw weights, beta2 0.9 | 1 | 95.00% | [95.00%](c) | +4.00 ± 1.73 |"
    assert rows[1] == ("| tuned, raw weights, average of 50 steps | 2 | 92.00% | [91.00%](a), [93.00%](b) | "
                       "+1.00 ± 1.41 |")
    assert rows[2] == "| tuned, raw weights | 2 | 91.00% | [90.00%](a), [92.00%](b) | - |" and len(rows) == 4
    runs["b"]["config"]["lr_max"] = 0.12
    with pytest.raises(ValueError, match="several rates of one recipe"):
        tables.proxy_table(runs)


def test_the_table_of_changes_compares_averages_and_says_how_sure_they_are():
    report = tables.load("ranking")["ranking/tuned-seed0.json"]

    def run(seed, accuracy, average, lr_max=0.06, candidates=(), **changed):
        config = {**report["config"], "seed": seed, "recipe": {**report["config"]["recipe"], **changed}}
        last = {"test_accuracy": accuracy, "average_accuracy": {"50": average}}
        return {**report, "config": {**config, "lr_max": lr_max}, "epochs": [last],
                "candidates": {**report["candidates"], **dict(candidates)}}
    runs = {"b": run(1, 0.92, 0.93), "ranking/tuned-seed0.json": run(0, 0.90, 0.91),
            "d": run(1, 0.9, 0.52, 0.12, beta2=0.9), "c": run(0, 0.95, 0.5, 0.12, beta2=0.9),
            "e": run(0, 0.93, 0.96, candidates={"ghost_batch": 64, "fixed_scales": True})}
    grouped = tables.by_change(runs, runs["ranking/tuned-seed0.json"])
    rows = tables.ranking_table(grouped, tables.ranking_deviation(grouped)).splitlines()[2:]
    # Of the averages of two rows of two runs, both deviate by the root of 2 points: that is what one run is sure to.
    assert rows == [
        "| ghost_batch 64, fixed_scales | 1 | 96.00% | [96.00%](e) | +4.00 ± 1.73 | 93.00% | +2.00 |",
        "| none | 2 | 92.00% | [91.00%](ranking/tuned-seed0.json), [93.00%](b) | - | 91.00% | - |",
        "| beta2 0.9, LRMAX 0.12 | 2 | 51.00% | [50.00%](c), [52.00%](d) | -41.00 ± 1.41 | 92.50% | +1.50 |"]
    runs["e"]["config"]["holdout"] = 5000
    with pytest.raises(ValueError, match="differ in holdout"):
        tables.by_change(runs, runs["ranking/tuned-seed0.json"])


def test_the_path_leads_from_the_plain_recipe_to_the_tuned_one():
    recipes = tables.path_recipes()
    assert list(recipes.values())[0] == train.RECIPES["plain"] and list(recipes.values())[-1] == train.RECIPES["tuned"]
    sweep = tables.load("sweeps")["sweeps/batch-512-bf16-two-epochs-seed0.json"]

    def report(recipe, seed, value, lr_max):
        return {**sweep, "config": {**sweep["config"], "recipe": train.recipe_values(recipe), "seed": seed,
                                    "lr_max": lr_max}, "summary": {"final_test_accuracy": value}}
    found = tables.found(sweep)
    sweeps = {part: report(recipe, 0, None, found) for part, recipe in recipes.items()}
    for part in ("weight decay", "average of the weights"):  # the sweep of the row before does for these
        del sweeps[part]
    runs = {f"{part} {seed}": report(recipe, seed, 0.8 + 0.01 * row + 0.02 * seed, found)
            for row, (part, recipe) in enumerate(recipes.items()) for seed in (1, 0)}
    rows = tables.path_rows(runs, tables.found_by_one_of(sweeps))
    assert list(rows) == list(recipes) and len(rows) == 9
    assert rows["plain"] == ["plain", f"[{found:.3g}](plain)", 2, "81.00%", "1.41%",
                             "[80.00%](plain 0), [82.00%](plain 1)", "-"]
    assert rows["average of the weights"] == [
        "+ average of the weights", f"[{found:.3g}](padding)", 2, "89.00%", "1.41%",
        "[88.00%](average of the weights 0), [90.00%](average of the weights 1)", "+1.00 ± 1.41"]
    assert tables.path_rows(runs, tables.found_by_each)["flips"][1] == f"{found:.3g}"
    another = tables.load("h100")["h100/default-seed3.json"]
    lr_max = another["config"]["lr_max"]
    assert tables.found_by_each("flips", [runs["flips 0"], another]) == f"{found:.3g} to {lr_max:.3g}"
    more = tables.path_rows({**runs, "plain 2": report(recipes["plain"], 2, 0.81, found)}, tables.found_by_each)
    pooled = math.sqrt((8 * 2 * 0.01 ** 2 + 2 * 0.01 ** 2) / 10)  # of 8 rows of two runs and of plain with 80, 81, 82%
    assert more["logits"][6] == f"+1.00 ± {100 * pooled * math.sqrt(1 / 2 + 1 / 3):.2f}"
    with pytest.raises(ValueError, match="runs of no row"):
        tables.path_rows({**runs, "another": report(train.Recipe(flips="random"), 0, 0.9, found)}, tables.found_by_each)
    for rates_in_words in (tables.found_by_one_of(sweeps), tables.found_by_each):
        with pytest.raises(ValueError, match="row plain is not at the rate that"):
            tables.path_rows({**runs, "plain 0": report(recipes["plain"], 0, 0.8, 1.1 * found)}, rates_in_words)
    given = {**runs["plain 0"], "lr_sweep": None}
    with pytest.raises(ValueError, match="row plain is not at the rate that its own sweep finds"):
        tables.path_rows({**runs, "plain 0": given}, tables.found_by_each)


def test_many_images_are_evaluated_of_the_runs_that_few_were_of():
    few, many = (tables.load(study)[f"{study}/tuned-seed0.json"]["epochs"] for study in ("proxy", "ranking"))
    for name in ("train_loss", "test_accuracy"):
        assert [row[name] for row in few][:-1] == [row[name] for row in many][:-1]


# ---- Candidates for the recipe ---------------------------------------------------------------------------------------

def run_with(workplace, *arguments):
    """Run the script of candidates on small data. Returns its report."""
    options, rest = candidates.parse_arguments([*SMALL, *REPORT, *map(str, arguments)])
    assert candidates.train_with(options, rest) == 0
    return workplace.report()


def note_after_steps(monkeypatch, note):
    """Have `note(run)` called after each step of the optimizer of every run that is started."""
    start = train.start

    def start_and_note(*arguments):
        run = start(*arguments)
        run.optimizer.register_step_post_hook(lambda *_: note(run))
        return run
    monkeypatch.setattr(train, "start", start_and_note)


def test_candidates_that_are_off_change_nothing(workplace):
    report = run_with(workplace, "--epochs", 2)
    assert workplace.run("--epochs", 2) == 0
    for name in ("train_loss", "test_loss", "test_accuracy"):
        assert [row[name] for row in report["epochs"]] == [row[name] for row in workplace.report()["epochs"]]
    assert report["candidates"]["ghost_batch"] == 0 and "candidates" not in workplace.report()
    assert tables.recipe_in_words(report) == tables.recipe_in_words(workplace.report()) == "tuned"
    report["candidates"].update(averages=[50], evaluate_few=9, ghost_batch=128, fixed_scales=True)
    assert tables.recipe_in_words(report) == "tuned, ghost_batch 128, fixed_scales True"
    for arguments in (["--checkpoint=a.pt"], ["--check", "a.pt"]):  # abbreviated too
        with pytest.raises(SystemExit):
            candidates.parse_arguments(arguments)


def test_averages_of_the_weights_follow_the_steps_of_training_alone(workplace, monkeypatch):
    averaged, average, steps = [], candidates.average, []

    def average_and_note(run, memory):
        averaged.append(average(run, memory))
        return averaged[-1]

    def watched(model):
        return torch.cat([model.head.weight.detach().flatten(), model.prep[1].running_var])
    monkeypatch.setattr(candidates, "average", average_and_note)
    note_after_steps(monkeypatch, lambda run: steps.append(watched(run.model)))
    report = run_with(workplace, "--epochs", 3, "--averages", 1, 4)
    steps = steps[len(report["lr_sweep"]["lr"]):]  # those of the sweep do not count
    assert len(steps) == 6
    expected = steps[0]
    for values in steps[1:]:
        expected = expected + (values - expected) / 4
    torch.testing.assert_close(watched(averaged[1]), expected)
    torch.testing.assert_close(watched(averaged[0]), steps[-1])
    for row in report["epochs"]:
        assert row["average_accuracy"].keys() == {"1", "4"}
        assert row["average_accuracy"]["1"] == row["test_accuracy"]  # it remembers one step: the weights themselves


def test_ghost_batches_are_normalised_each_by_itself():
    torch.manual_seed(0)
    network = type("Ghost", (candidates.GhostForward, train.ResNet), {"ghost_batch": 6})()
    images = torch.randn(14, 3, 32, 32)
    alone = copy.deepcopy(network)
    logits = network(images)
    for part in ([0, 6], [6, 12], [12, 14]):
        torch.testing.assert_close(train.ResNet.forward(alone, images[slice(*part)]), logits[slice(*part)])
    torch.testing.assert_close(network.prep[1].running_var, alone.prep[1].running_var)
    network.eval(), alone.eval()
    torch.testing.assert_close(network(images), train.ResNet.forward(alone, images))


def test_the_network_of_half_the_width_and_its_ghost_batches(workplace, monkeypatch):
    epochs, runs = train.epochs, []
    network = candidates.NarrowResNet()
    assert sum(parameter.numel() for parameter in network.parameters()) == 1_665_482
    assert [tuple(module.weight.shape[:2]) for module in network.modules() if isinstance(module, nn.Conv2d)] == [
        (64, 3), (64, 64), (64, 64), (64, 64), (128, 64), (256, 128), (256, 256), (256, 256)]
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    monkeypatch.setattr(train, "epochs", lambda run, *arguments: runs.append(run) or epochs(run, *arguments))
    report = run_with(workplace, "--epochs", 1, "--half-width", "--ghost-batch", 20, *RATES)
    momenta = [module.momentum for module in runs[0].model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert momenta == pytest.approx([0.1 * 20 / report["config"]["batch_size"]] * 8)
    assert report["parameters"] == 1_665_482
    assert tables.recipe_in_words(report) == "tuned, ghost_batch 20, half_width True"
    assert sum(parameter.numel() for parameter in train.ResNet().parameters()) == 6_573_130  # it is as it was


def test_candidates_for_rates_and_whitening(workplace, monkeypatch):
    start, runs, steps = train.start, [], []

    def start_and_note(*arguments):
        runs.append(start(*arguments))
        before.update(copy.deepcopy(runs[-1].model.state_dict()))
        runs[-1].optimizer.register_step_post_hook(
            lambda optimizer, *_: steps.append([group["lr"] for group in optimizer.param_groups]))
        return runs[-1]
    before = {}
    monkeypatch.setattr(train, "start", start_and_note)
    run_with(workplace, "--epochs", 1, "--bias-rate", 16, "--fixed-scales", "--fixed-whitening", "--residual-scale", 2)
    assert all(bias_lr == pytest.approx(16 * lr) for lr, bias_lr in steps) and len(steps) > 2
    after = runs[-1].model.state_dict()
    moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
    scales = {name for name, value in after.items() if name.endswith(".weight") and value.ndim == 1}
    last = {f"{layer}.1.residual.1.1.weight" for layer in ("layer1", "layer3")}  # of a residual block
    assert len(scales) == 8 and all((after[name] == (2 if name in last else 1)).all() for name in scales)
    assert moved & {*scales, "prep.0.weight"} == last  # the rest is where it began
    assert {"prep.1.bias", "head.weight", "layer1.0.0.weight"} <= moved

    seen = []
    monkeypatch.setattr(train, "whiten_first_layer", lambda model, images, floor: seen.append(images))
    for arguments in ((), ("--whitening-unpadded",)):
        run_with(workplace, "--epochs", 1, *RATES, *arguments)
    assert torch.equal(seen[0][..., 4:36, 4:36], seen[1]) and seen[0].shape[-1] == 40


def test_biases_and_batchnorms_decay_too(workplace, monkeypatch):
    decays = []
    note_after_steps(monkeypatch, lambda run: decays.append(
        [group["weight_decay"] for group in run.optimizer.param_groups]))
    for arguments in ((), ("--decay-all",)):
        report = run_with(workplace, "--epochs", 1, *RATES, *arguments)
        decay = report["config"]["weight_decay"]
        assert decays and all(pair == [decay, decay if arguments else 0] for pair in decays) and decay > 0
        decays.clear()


def test_central_gradients_have_no_mean_over_a_filter(workplace, monkeypatch):
    moments = {}
    note_after_steps(monkeypatch, lambda run: moments.update(
        {name: run.optimizer.state[parameter]["exp_avg"].clone() for name, parameter in run.model.named_parameters()}))
    for central, arguments in ((False, ()), (True, ("--central-gradients",))):
        run_with(workplace, "--epochs", 1, *RATES, *arguments)
        for name, moment in moments.items():
            if moment.ndim > 1:
                means = moment.flatten(1).mean(1).abs().max().item()
                assert (means < 1e-6 * moment.abs().max().item()) is central, name
    assert moments["head.bias"].abs().max() > 0  # those of one dimension are left as they are


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def test_gradients_are_taken_further_down_the_first_moment():
    run = small_run()
    candidates.look_ahead(run, 0.3, 20)  # 0.5 at a rate of 0.01
    seen, before, after, moments = [], [], [], []  # the weights in the forward pass, before and after the step
    for register, weights in ((run.model.register_forward_hook, seen), (run.optimizer.register_step_pre_hook, before),
                              (run.optimizer.register_step_post_hook, after)):
        register(lambda *_, weights=weights: weights.append(flat(run.model.parameters())))
    for _ in train.take_steps(run, [run.test] * 3, [(0.01, 0.9)] * 3):
        moments.append(flat(run.optimizer.state[parameter]["exp_avg"] for parameter in run.model.parameters()))
    torch.testing.assert_close(seen[0], before[0], rtol=0, atol=0)  # nothing is known of the gradients yet
    for step in (1, 2):
        torch.testing.assert_close(before[step], after[step - 1])
        direction = moments[step - 1] / moments[step - 1].double().norm()
        torch.testing.assert_close(seen[step] - after[step - 1], -0.5 * direction.float(), rtol=1e-4, atol=1e-6)
    run.model.eval()(run.test.images)
    torch.testing.assert_close(seen[-1], after[-1], rtol=0, atol=0)


def test_gradients_are_taken_further_up_the_gradient_of_a_part_of_the_batch():
    run, seen = small_run(), []  # the weights in the forward passes
    batches, own = candidates.ascend(run, [run.test] * 2, 0.3, 6), copy.deepcopy(run.model).train()
    run.model.register_forward_pre_hook(lambda *_: seen.append(flat(run.model.parameters())))
    loss = F.cross_entropy(own(run.test.images[:6]), run.test.labels[:6], label_smoothing=run.recipe.label_smoothing)
    gradient = flat(torch.autograd.grad(loss, own.parameters()))
    steps = train.take_steps(run, batches, [(0.0, 0.9)] * 2)
    next(steps)
    torch.testing.assert_close(seen[1] - seen[0], 0.3 * gradient / gradient.norm(), rtol=1e-3, atol=1e-6)
    for name, values in own.named_buffers():  # seen by BatchNorm once, at weights not moved
        torch.testing.assert_close(run.model.get_buffer(name), values + (name.endswith("num_batches_tracked")))
    next(steps)
    torch.testing.assert_close(seen[2], seen[0])  # they were moved back, and the step at a rate of 0 left them there
    steps.close()
    assert {module.momentum for module in run.model.modules() if isinstance(module, nn.BatchNorm2d)} == {0.1}


def test_past_targets_are_what_was_said_of_the_same_image():
    recipe = Recipe(epochs=4, batch_size=3, padding=0, cutout=0)
    training = train.Split(torch.arange(5.0).view(5, 1, 1, 1).expand(5, 3, 32, 32), torch.tensor([3, 1, 4, 1, 5]))
    targets = candidates.PastTargets(0.8, train.augmented_batches)
    said = {}
    for epoch in (1, 2, 3):
        for images, labels in targets.batches(recipe, training, 0, epoch):
            numbers = images[:, 0, 0, 0].long().tolist()
            assert labels.tolist() == [[3, 1, 4, 1, 5][number] for number in numbers]
            logits = torch.randn(len(labels), 10, requires_grad=True)
            expected = nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
            if epoch > 1:
                past = nn.functional.cross_entropy(logits, torch.stack([said[number] for number in numbers]))
                expected = (1 - 0.2 * epoch) * expected + 0.2 * epoch * past
            torch.testing.assert_close(targets.loss(logits, labels, label_smoothing=0.2), expected)
            torch.testing.assert_close(targets.loss(logits.detach(), labels),  # an evaluation
                                       nn.functional.cross_entropy(logits, labels))
            said.update(zip(numbers, logits.detach().softmax(1)))


def test_a_batch_of_both_mirrors_has_each_image_twice():
    recipe = Recipe(batch_size=4, padding=0, cutout=0)
    training = random_split(10)
    seen = []
    for epoch in (1, 2):
        sizes = []
        for images, labels in candidates.batches_of_both_mirrors(recipe, training, 0, epoch):
            mirrored, plain = images.chunk(2)
            assert torch.equal(mirrored, plain.flip(-1)) and torch.equal(*labels.chunk(2))
            sizes.append(len(labels))
            seen += [(image == training.images).flatten(1).all(1).nonzero().item() for image in plain]
            assert torch.equal(training.labels[seen[-len(plain):]], labels[:len(plain)])
        assert sizes == [4, 4, 2]
    assert sorted(seen) == list(range(10))
    cropped = next(candidates.batches_of_both_mirrors(Recipe(batch_size=4, padding=4), training, 0, 1))[0]
    assert not torch.equal(cropped[:2], cropped[2:].flip(-1))


def test_spread_crops_and_cutouts_are_everywhere_about_as_often(monkeypatch):
    recipe, training = Recipe(batch_size=7, padding=4), random_split(20)
    training = train.Split(nn.functional.pad(training.images, (4,) * 4), torch.arange(20))
    corners = {"crop": [[] for _ in range(20)], "cutout": [[] for _ in range(20)]}
    order = []  # of the images in the epochs

    def note(name):
        original = getattr(train, name)

        def noted(images, top, left, size):
            if name == "crop":
                order.extend((image == training.images).flatten(1).all(1).nonzero().item() for image in images)
            for index, *corner in zip(order[-len(images):], top.tolist(), left.tolist()):
                corners[name][index].append(corner)
            return original(images, top, left, size)
        monkeypatch.setattr(train, name, noted)
    note("crop"), note("cutout")
    for epoch in range(1, 28):
        batches = list(candidates.spread_batches(recipe, training, 0, epoch))
        assert [image.shape for image, _ in batches] == [(7, 3, 32, 32)] * 2 + [(6, 3, 32, 32)]
        assert torch.cat([labels for _, labels in batches]).tolist() == order[-20:]
        assert sorted(order[-20:]) == list(range(20)) and order[-20:] != list(range(20))
    for name, choices, most in (("crop", 9, 4), ("cutout", 25, 3)):  # drawn at random some come 8 and 5 times
        counts = [torch.bincount(torch.tensor(coordinates), minlength=choices)
                  for of_image in corners[name] for coordinates in zip(*of_image)]
        assert {len(count) for count in counts} == {choices} and len(counts) == 40
        assert max(count.max() for count in counts) <= most
    with pytest.raises(SystemExit):
        candidates.parse_arguments(["--both-mirrors", "--spread-crops"])


def test_candidates_of_the_loss_and_the_batches_reach_the_run(workplace):
    runs = ((), ("--look-ahead", 0.5), ("--look-ahead-rate", 5), ("--ascent", 0.5), ("--past-targets", 0.5),
            ("--both-mirrors",), ("--spread-crops",), ("--both-mirrors", "--past-targets", 0.5))
    losses = [run_with(workplace, "--epochs", 2, *RATES, *run)["epochs"][1]["train_loss"] for run in runs]
    assert len(set(losses)) == len(losses)


def test_another_activation(workplace, monkeypatch):
    activations = []
    note_after_steps(monkeypatch, lambda run: activations.append(
        [str(module) for module in run.model.modules() if type(module).__name__ in ("ReLU", "CELU")]))
    for arguments, expected in ((("--celu", 0.3), "CELU(alpha=0.3, inplace=True)"), ((), "ReLU(inplace=True)")):
        run_with(workplace, "--epochs", 1, *RATES, *arguments)
        assert activations.pop() == [expected] * 8


def test_a_few_images_are_evaluated_until_the_last_epoch(workplace, monkeypatch):
    counts, evaluate = [], train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run: counts.append(len(run.test.labels)) or evaluate(run))
    report = run_with(workplace, "--epochs", 3, "--evaluate-few", 7, "--averages", 5, *RATES)
    everything = report["data"]["test_images"]
    assert counts == [7, 7, 7, 7, everything, everything] and everything > 7  # the average and the weights themselves
    assert tables.recipe_in_words(report) == "tuned"


@pytest.mark.parametrize("name", ["README.md", "results/README.md"])
def test_every_file_that_is_shown_is_there(name):
    shown = re.findall(r"\]\(((?!http)[^)]+)\)", (SCRIPT.parent / name).read_text())
    assert shown and all(((SCRIPT.parent / name).parent / path).exists() for path in shown)


def test_the_experiments_of_the_readme_run(workplace, capsys):
    snippets = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(snippets) == 2
    small = snippets[0].replace("epochs=10", "epochs=2, batch_size=50")
    assert small != snippets[0]
    names = {}
    exec(small, names)
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["1", "2"]
    assert workplace.run("--epochs", 1, "--weights", "weights.pt", *RATES) == 0
    capsys.readouterr()
    exec(snippets[1], names)
    assert len(re.findall("airplane|automobile|bird|cat|deer|dog|frog|horse|ship|truck", capsys.readouterr().out)) == 8
