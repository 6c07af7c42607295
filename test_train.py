"""Tests of train.py against independent references: torchvision's transforms, PyTorch's scheduler, counts by hand.

They need no GPU, no network and no data set: those that read images write small files in CIFAR-10's own format.

    python -m pytest test_train.py
"""

import hashlib
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torchvision.datasets import CIFAR10

import train

SCRIPT = Path(train.__file__).resolve()


# ----------------------------------------------------------------------------------------------------------------------
# Small data in the real format
# ----------------------------------------------------------------------------------------------------------------------

def easy_images(count, seed):
    """Return uint8 rows (count, 3072) and labels of ten classes that differ in their colours and stripes."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    colours = np.random.default_rng(0).integers(60, 196, (10, 3, 1, 1))
    stripes = 40 * np.sign(np.sin(np.arange(32) * (1 + np.arange(10).reshape(10, 1, 1, 1)) / 4))
    images = colours[labels] + stripes[labels] + rng.normal(0, 25, (count, 3, 32, 32))
    return images.clip(0, 255).astype(np.uint8).reshape(count, 3072), labels.tolist()


def write_cifar10(data_dir, per_file):
    """Write the seven files of CIFAR-10 with `per_file` images each. Returns CIFAR10's class attributes for them."""
    folder = data_dir / CIFAR10.base_folder
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    checksums = []
    for number, (name, _) in enumerate([*CIFAR10.train_list, *CIFAR10.test_list]):
        images, labels = easy_images(per_file, number)
        checksums.append([name, write(name, {"data": images, "labels": labels, "batch_label": name})])
    meta = {"label_names": "airplane automobile bird cat deer dog frog horse ship truck".split()}
    return {"train_list": checksums[:5], "test_list": checksums[5:],
            "meta": {**CIFAR10.meta, "md5": write(CIFAR10.meta["filename"], meta)},
            "url": "http://127.0.0.1:9/cifar-10-python.tar.gz"}  # nothing listens there: no test depends on a network


class Workplace:
    """A folder with small data, where the script runs in this process (`run`) or in one of its own (`start`)."""

    def __init__(self, folder, attributes):
        self.folder, self.attributes = folder, attributes
        self.launcher = folder / "launcher.py"
        self.launcher.write_text(
            "import runpy, sys\n"
            "from torchvision.datasets import CIFAR10\n"
            f"for name, value in {attributes!r}.items(): setattr(CIFAR10, name, value)\n"
            f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")

    def run(self, *arguments):
        return train.main(["--batch-size", "50", "--no-figures", "--output", "run.json", *map(str, arguments)])

    def start(self, *arguments, **keywords):
        return subprocess.Popen([sys.executable, self.launcher, "--batch-size", "50", "--no-figures",
                                 *map(str, arguments)], cwd=self.folder, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords)

    def report(self, name="run.json"):
        def refuse(constant):
            raise ValueError(f"{constant} is no JSON")
        return json.loads((self.folder / name).read_text(), parse_constant=refuse)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Five files of 20 training images and one of 20 test images in data/, and the working directory there."""
    attributes = write_cifar10(tmp_path / "data", per_file=20)
    for name, value in attributes.items():
        monkeypatch.setattr(CIFAR10, name, value)
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path, attributes)


RATES = ("--lr-max", "0.01", "--lr-min", "0.0001")  # given where a test is not about the sweep


# ----------------------------------------------------------------------------------------------------------------------
# Model
# ----------------------------------------------------------------------------------------------------------------------

def test_parameters_counted_by_hand():
    convolutions = 9 * (3 * 64 + 64 * 128 + 2 * 128 * 128 + 128 * 256 + 256 * 512 + 2 * 512 * 512)
    batch_norms = 2 * (64 + 3 * 128 + 256 + 3 * 512)
    without_bias = convolutions + batch_norms + 512 * 10
    assert without_bias == 6_573_120

    def count(model):
        return sum(parameter.numel() for parameter in model.parameters())
    assert count(train.ResNet()) == without_bias + 10
    assert count(train.ResNet(head_bias=False)) == without_bias
    assert all(module.bias is None for module in train.ResNet().modules() if isinstance(module, nn.Conv2d))


def test_layer_shapes():
    model = train.ResNet()
    shapes = {}
    for name in ("prep", "layer1", "layer2", "layer3", "pool", "head"):
        getattr(model, name).register_forward_hook(
            lambda module, inputs, output, name=name: shapes.__setitem__(name, tuple(output.shape)))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == {"prep": (2, 64, 32, 32), "layer1": (2, 128, 16, 16), "layer2": (2, 256, 8, 8),
                      "layer3": (2, 512, 4, 4), "pool": (2, 512), "head": (2, 10)}


def test_forward_pass_against_the_recipe_written_out():
    torch.manual_seed(0)
    model = train.ResNet()
    parameters = list(model.parameters())  # in the order of the recipe: convolution, then its BatchNorm's scale, shift
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
    h = F.linear(h.amax(dim=(2, 3)), parameters.pop(0), parameters.pop(0)) * train.RECIPE["logit_scale"]
    assert not parameters
    torch.testing.assert_close(model(x), h)


# ----------------------------------------------------------------------------------------------------------------------
# Data and augmentation
# ----------------------------------------------------------------------------------------------------------------------

def random_split(count=64):
    generator = torch.Generator().manual_seed(1)
    return train.Split(torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8),
                       torch.randint(10, (count,), generator=generator))


def test_channel_statistics_against_numpy():
    images = random_split().images
    images[:, 1] //= 3
    mean, std = train.channel_statistics(images)
    pixels = images.numpy().astype(np.float64) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), rtol=1e-5)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), rtol=1e-5)


def test_augmentation_pixel_for_pixel_against_torchvision():
    split = random_split()
    mean, std = train.channel_statistics(split.images)
    prepared = train.prepare(split, mean, std, "cpu", torch.float32, padding=4)
    draws = train.draw_augmentation(64, 32, torch.Generator().manual_seed(2))
    augmented = train.augment(prepared.images, draws)

    assert {True, False} == set(draws.flip.tolist())
    assert augmented.shape == (64, 3, 32, 32) and augmented.is_contiguous(memory_format=torch.channels_last)
    for i, image in enumerate(split.images):
        image = TF.normalize(TF.convert_image_dtype(image, torch.float32), mean.tolist(), std.tolist())
        image = TF.pad(image, [4], padding_mode=train.RECIPE["padding_mode"])
        image = TF.crop(image, int(draws.crop_top[i]), int(draws.crop_left[i]), 32, 32)
        image = TF.hflip(image) if draws.flip[i] else image
        image = TF.erase(image, int(draws.cutout_top[i]), int(draws.cutout_left[i]), 8, 8, torch.tensor(0.0))
        torch.testing.assert_close(augmented[i], image, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, choices", [("crop_top", 9), ("crop_left", 9), ("flip", 2), ("cutout_top", 25),
                                           ("cutout_left", 25)])
def test_every_draw_is_uniform(name, choices):
    count = 100_000
    draws = train.draw_augmentation(count, 32, torch.Generator().manual_seed(3))
    observed = torch.bincount(getattr(draws, name).long(), minlength=choices).double()
    assert len(observed) == choices
    chi_squared = ((observed - count / choices) ** 2 / (count / choices)).sum()
    degrees = choices - 1
    assert chi_squared < degrees + 5 * math.sqrt(2 * degrees) + 5  # more than five standard deviations off is no chance


def test_draws_are_independent_of_each_other():
    draws = torch.stack([values.double() for values in train.draw_augmentation(100_000, 32, torch.Generator())])
    correlation = torch.corrcoef(draws) - torch.eye(5)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)
    neighbours = [torch.corrcoef(torch.stack([row[1:], row[:-1]]))[0, 1].abs() for row in draws]
    assert max(neighbours) < 5 / math.sqrt(100_000)


def test_an_epoch_shows_every_image_once_and_epochs_differ():
    split = train.Split(torch.zeros(103, 3, 40, 40), torch.arange(103))

    def labels(seed, epoch):
        return [batch.tolist() for _, batch in
                train.augmented_batches(split, 25, train.epoch_generator(seed, epoch, "cpu"))]
    assert [len(batch) for batch in labels(0, 1)] == [25, 25, 25, 25, 3]
    assert sorted(sum(labels(0, 1), [])) == list(range(103))
    assert labels(0, 1) == labels(0, 1)
    assert labels(0, 1) != labels(0, 2) != labels(1, 2) != labels(0, 1)


def test_subset_and_holdout_select_the_right_images():
    training = train.Split(torch.zeros(50, 1), torch.arange(50))
    testing = train.Split(torch.zeros(40, 1), torch.arange(100, 140))

    def select(*arguments):
        options = train.parse_arguments(["--batch-size", "2", *arguments])
        trained, evaluated, name = train.select_images(options, training, testing)
        return trained.labels.tolist(), evaluated.labels.tolist(), name
    assert select() == (list(range(50)), list(range(100, 140)), "test images")
    assert select("--subset", "20") == (list(range(20)), list(range(100, 104)), "test images")
    assert select("--holdout", "10") == (list(range(40)), list(range(40, 50)), "held-out training images")
    assert select("--subset", "20", "--holdout", "5") == (
        list(range(15)), list(range(15, 20)), "held-out training images")


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


# ----------------------------------------------------------------------------------------------------------------------
# One-cycle and sweep
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("epochs, steps_per_epoch", [(24, 98), (10, 98), (3, 7), (1, 10)])
def test_one_cycle_against_pytorch_at_every_step(epochs, steps_per_epoch):
    total, lr_min, lr_max = epochs * steps_per_epoch, 2e-5, 1e-2
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr_max, total_steps=total, pct_start=5 / 24, anneal_strategy="linear", base_momentum=0.85,
        max_momentum=0.95, div_factor=lr_max / lr_min, final_div_factor=1.0)
    images = 10 * steps_per_epoch
    lrs, beta1s = train.plan_cycle({"epochs": epochs, "batch_size": 10, "lr_min": lr_min, "lr_max": lr_max}, images)
    assert len(lrs) == len(beta1s) == total
    for lr, beta1 in zip(lrs, beta1s):
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert beta1 == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-9)
        optimizer.step()
        if scheduler.last_epoch < total - 1:
            scheduler.step()


def test_one_cycle_peaks_at_the_end_of_epoch_5_and_ends_at_lr_min():
    lrs, _ = train.plan_cycle({"epochs": 24, "batch_size": 512, "lr_min": 1e-5, "lr_max": 1e-2}, 50_000)
    assert lrs.index(max(lrs)) == 5 * 98 - 1 and max(lrs) == pytest.approx(1e-2)
    assert lrs[0] == lrs[-1] == min(lrs) == pytest.approx(1e-5)


@pytest.mark.parametrize("steps", range(1, 12))
def test_one_cycle_of_few_steps_stays_between_its_ends(steps):
    values = [train.one_cycle(step, steps, 1.0, 2.0) for step in range(steps)]
    assert all(1.0 <= value <= 2.0 for value in values) and values[-1] == 1.0


def test_sweep_is_read_by_its_rule():
    lrs = [10.0 ** exponent for exponent in range(-6, 3)]
    #                   fall of 2: 10% of it is 0.2
    smoothed = [3.0, 2.9, 2.7, 2.0, 1.0, 1.1, 1.15, 1.3, 5.0]
    assert train.read_sweep(lrs, smoothed) == (1e-4, 1.0)
    assert train.read_sweep(lrs[:6], smoothed[:6]) == (1e-4, lrs[5])  # never climbs: the last rate
    with pytest.raises(train.UserError, match="no learning rate"):
        train.read_sweep(lrs[:3], [1.0, 1.5, 2.0])


def test_smoothing_is_centred():
    line = [float(i) for i in range(50)]
    assert train.smooth(line, 16)[4:-4] == pytest.approx(line[4:-4])  # a straight line keeps its place: no lag
    assert np.std(train.smooth([(-1.0) ** i for i in range(50)], 16)[4:-4]) < 0.15


def quadratic_learner(curvature, seed, monkeypatch):
    """A learner whose loss is least squares with Hessian eigenvalues up to `curvature`, on noisy targets, with SGD."""
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(8, 1, bias=False)
    nn.init.normal_(model.weight, std=3.0, generator=generator)
    scales = math.sqrt(curvature / 2) * torch.linspace(0.5, 1.0, 8)

    def step(learner, inputs, noise):
        loss = (learner.model(inputs) + noise).square().mean()  # Hessian 2 E[x x^T]: eigenvalues 2 scales^2
        learner.optimizer.zero_grad()
        loss.backward()
        learner.optimizer.step()
        return loss.detach(), None

    def batches():
        while True:
            yield torch.randn(256, 8, generator=generator) * scales, torch.randn(256, 1, generator=generator) * 0.5

    monkeypatch.setattr(train, "train_step", step)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    return train.Learner(model, optimizer, torch.amp.GradScaler("cpu", enabled=False), "cpu", torch.float32), batches()


@pytest.mark.parametrize("curvature", [1.0, 50.0, 2000.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sweep_finds_the_known_rate_of_a_quadratic(curvature, seed, monkeypatch):
    learner, batches = quadratic_learner(curvature, seed, monkeypatch)
    sweep = train.sweep_learning_rate(learner, batches, 100)
    largest_stable_rate = 2 / curvature  # gradient descent diverges beyond it
    if largest_stable_rate < train.RECIPE["sweep_range"][1]:
        assert largest_stable_rate / 2 < sweep["lr_max"] < largest_stable_rate * 2
        assert len(sweep["lr"]) < 100, "it went on after the loss had diverged"
    else:
        assert sweep["lr_max"] == pytest.approx(train.RECIPE["sweep_range"][1])
    assert sweep["lr_min"] < sweep["lr_max"] / 5
    assert len(sweep["lr"]) == len(sweep["loss"]) == len(sweep["smoothed_loss"])
    assert np.diff(np.log(sweep["lr"])) == pytest.approx(math.log(1e6) / 99)


def snapshot(learner):
    return [value.clone() for value in learner.model.state_dict().values()], pickle.dumps(
        [(group["lr"], group["betas"]) for group in learner.optimizer.param_groups]), {
        (index, name): value.clone() for index, state in learner.optimizer.state_dict()["state"].items()
        for name, value in state.items()}, torch.get_rng_state()


@pytest.mark.parametrize("steps_before", [0, 2])
def test_sweep_leaves_everything_as_it_was(steps_before):
    learner = train.make_learner(0, "cpu", "fp32")
    split = random_split(32)
    mean, std = train.channel_statistics(split.images)
    prepared = train.prepare(split, mean, std, "cpu", torch.float32, padding=4)

    def batches():
        for epoch in range(100):
            yield from train.augmented_batches(prepared, 16, train.epoch_generator(0, epoch, "cpu"))
    train.set_rates(learner.optimizer, 1e-5, 0.9)
    for _, (images, labels) in zip(range(steps_before), batches()):
        train.train_step(learner, images, labels)
    weights, groups, state, random_state = snapshot(learner)
    sweep = train.sweep_learning_rate(learner, batches(), 20)
    assert len(sweep["lr"]) > 5
    weights_after, groups_after, state_after, random_state_after = snapshot(learner)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_after, strict=True))
    assert groups == groups_after and state.keys() == state_after.keys()
    assert all(torch.equal(state[key], state_after[key]) for key in state)
    assert torch.equal(random_state, random_state_after)
    assert all(parameter.grad is None for parameter in learner.model.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoint and resume
# ----------------------------------------------------------------------------------------------------------------------

def metrics(report):
    """What of a report must be the same for two runs alike: everything but times and file names."""
    rows = [{key: value for key, value in row.items() if "second" not in key} for row in report["epochs"]]
    config = {key: value for key, value in report["config"].items() if key not in ("output", "checkpoint")}
    return rows, config, report["data"], report["lr_sweep"], {
        key: value for key, value in report["summary"].items() if "second" not in key}


def test_resume_ends_as_an_uninterrupted_run(workplace, monkeypatch):
    assert workplace.run("--epochs", 4, "--checkpoint", "whole.pt", "--output", "whole.json") == 0
    print_row = train.print_row

    def interrupt_after_epoch_2(row):
        print_row(row)
        if row["epoch"] == 2:
            monkeypatch.setattr(train, "print_row", print_row)
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "print_row", interrupt_after_epoch_2)
    assert workplace.run("--epochs", 4, "--checkpoint", "parts.pt", "--output", "parts.json") == 130
    assert workplace.report("parts.json")["summary"]["status"] == "interrupted"
    assert workplace.run("--epochs", 4, "--checkpoint", "parts.pt", "--output", "parts.json") == 0

    whole, parts = workplace.report("whole.json"), workplace.report("parts.json")
    assert metrics(whole) == metrics(parts) and len(whole["epochs"]) == 4
    saved = [torch.load(name, weights_only=True) for name in ("whole.pt", "parts.pt")]
    for kind in ("model", "optimizer"):
        flat = [torch.utils._pytree.tree_leaves(state[kind]) for state in saved]
        assert len(flat[0]) == len(flat[1]) > 30
        for a, b in zip(*flat):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
