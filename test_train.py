"""Tests of train.py against independent references: torchvision's transforms, PyTorch's scheduler, counts by hand.

They need no GPU, no network and no data set: those that read images write small files in CIFAR-10's own format.

    python -m pytest test_train.py
"""

import hashlib
import importlib.util
import json
import math
import os
import pickle
import re
import signal
import statistics
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
        self.folder, self.attributes, self.processes = folder, attributes, []
        self.launcher = folder / "launcher.py"
        self.launcher.write_text(
            "import runpy, signal\n"
            "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job would ignore Ctrl-C
            "from torchvision.datasets import CIFAR10\n"
            f"for name, value in {attributes!r}.items(): setattr(CIFAR10, name, value)\n"
            f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n")

    def run(self, *arguments):
        return train.main([*SMALL, "--no-figures", "--output", "run.json", *map(str, arguments)])

    def start(self, *arguments):
        process = subprocess.Popen([sys.executable, self.launcher, *SMALL, "--no-figures", *map(str, arguments)],
                                   cwd=self.folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        self.processes.append(process)
        return process

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
    workplace = Workplace(tmp_path, attributes)
    yield workplace
    for process in workplace.processes:
        process.kill()


SMALL = ("--batch-size", "50", "--device", "cpu")  # a CPU gives the same result twice, a GPU need not
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
    h = F.linear(h.amax(dim=(2, 3)), parameters.pop(0), parameters.pop(0)) * train.RECIPE["logit_scale"]
    assert not parameters
    torch.testing.assert_close(model(x), h)


def test_convolutions_pass_their_input_on_before_training():
    model = train.ResNet()
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 8
    for convolution in convolutions[1:]:
        channels = convolution.in_channels
        x = torch.randn(2, channels, 8, 8)
        output = convolution(x)
        assert torch.equal(output[:, :channels], x)
        if convolution.out_channels > channels:
            assert output[:, channels:].std() > 0.1  # the other filters are random
    x = torch.randn(2, 3, 8, 8)
    assert not torch.allclose(convolutions[0](x)[:, :3], x, atol=0.1)


def test_the_first_layer_whitens(monkeypatch):
    monkeypatch.setitem(train.RECIPE, "whitening_images", 40)
    torch.manual_seed(0)
    images = F.avg_pool2d(torch.randn(60, 3, 14, 14), 3, stride=1) * torch.tensor([0.5, 1.0, 4.0]).view(3, 1, 1)
    images[:, 1] += images[:, 0]  # pixels and channels hang together, as in photographs
    model = train.ResNet()
    random = model.prep[0].weight.detach().clone()
    train.whiten_first_layer(model, images)

    seen = images[:40].numpy()
    patches = np.lib.stride_tricks.sliding_window_view(seen, (3, 3), axis=(2, 3)).transpose(0, 2, 3, 1, 4, 5)
    variances = np.linalg.eigvalsh(np.cov(patches.reshape(-1, 27), rowvar=False))
    assert variances.min() < train.RECIPE["whitening_floor"] < variances.max()
    with torch.no_grad():
        outputs = F.conv2d(images[:40], model.prep[0].weight).transpose(0, 1).flatten(1)
    expected = torch.from_numpy(variances / (variances + train.RECIPE["whitening_floor"])).float()
    torch.testing.assert_close(torch.cov(outputs[:27]), torch.diag(expected), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(outputs[27:54], -outputs[:27])
    assert torch.equal(model.prep[0].weight[54:], random[54:])


def test_a_run_begins_with_a_whitening_first_layer(workplace, monkeypatch):
    begun, sweep, train_epoch = [], train.sweep_learning_rate, train.train_epoch

    def record(original):
        def recorder(learner, *arguments):
            begun.append(learner.model.prep[0].weight.detach().clone())
            return original(learner, *arguments)
        return recorder
    monkeypatch.setattr(train, "sweep_learning_rate", record(sweep))
    monkeypatch.setattr(train, "train_epoch", record(train_epoch))
    assert workplace.run("--epochs", 2) == 0
    for weight in begun[:2]:  # of the sweep and of the first epoch
        assert torch.equal(weight[27:54], -weight[:27])
    assert len(begun) == 3 and not torch.equal(begun[2][27:54], -begun[2][:27])  # the second goes on from the first


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
    draws = train.draw_augmentation(torch.arange(64) % 3 == 0, 32, torch.Generator().manual_seed(2))
    augmented = train.augment(prepared.images, draws)

    assert augmented.shape == (64, 3, 32, 32) and augmented.is_contiguous(memory_format=torch.channels_last)
    for i, image in enumerate(split.images):
        image = TF.normalize(TF.convert_image_dtype(image, torch.float32), mean.tolist(), std.tolist())
        image = TF.pad(image, [4], padding_mode=train.RECIPE["padding_mode"])
        image = TF.crop(image, int(draws.crop_top[i]), int(draws.crop_left[i]), 32, 32)
        image = TF.hflip(image) if draws.flip[i] else image
        image = TF.erase(image, int(draws.cutout_top[i]), int(draws.cutout_left[i]), 8, 8, torch.tensor(0.0))
        torch.testing.assert_close(augmented[i], image, rtol=0, atol=1e-6)


def draw_for(count, epoch):
    return train.draw_augmentation(train.draw_flips(count, 0, epoch, "cpu"), 32, train.epoch_generator(0, epoch, "cpu"))


@pytest.mark.parametrize("name, choices", [("crop_top", 9), ("crop_left", 9), ("flip", 2), ("cutout_top", 25),
                                           ("cutout_left", 25)])
def test_every_draw_is_uniform(name, choices):
    count = 100_000
    draws = draw_for(count, epoch=1)
    observed = torch.bincount(getattr(draws, name).long(), minlength=choices).double()
    assert len(observed) == choices
    chi_squared = ((observed - count / choices) ** 2 / (count / choices)).sum()
    degrees = choices - 1
    assert chi_squared < degrees + 5 * math.sqrt(2 * degrees) + 5  # more than five standard deviations off is no chance


def test_draws_are_independent_of_each_other():
    draws = torch.stack([values.double() for values in draw_for(100_000, epoch=1)])
    correlation = torch.corrcoef(draws) - torch.eye(5)
    assert correlation.abs().max() < 5 / math.sqrt(100_000)
    neighbours = [torch.corrcoef(torch.stack([row[1:], row[:-1]]))[0, 1].abs() for row in draws]
    assert max(neighbours) < 5 / math.sqrt(100_000)


def test_an_image_is_mirrored_in_every_other_epoch():
    left_half = torch.zeros(500, 3, 40, 40)
    left_half[..., :20] = 1.0
    split = train.Split(left_half, torch.arange(500))

    def mirrored(seed, epoch):  # neither crop nor cutout can make the left half the darker one
        brighter = {}
        for images, labels in train.augmented_batches(split, 100, seed, epoch):
            brighter.update(zip(labels.tolist(), (images[..., :16].sum((1, 2, 3)) < images[..., 16:].sum((1, 2, 3)))))
        return torch.stack([brighter[label] for label in range(500)])
    first, second, third = (mirrored(0, epoch) for epoch in (1, 2, 3))
    assert torch.equal(second, ~first) and torch.equal(third, first)
    assert 200 < first.sum() < 300 and not torch.equal(first, mirrored(1, 1))


def test_an_epoch_shows_every_image_once_and_epochs_differ():
    split = train.Split(torch.zeros(103, 3, 40, 40), torch.arange(103))

    def labels(seed, epoch):
        return [batch.tolist() for _, batch in
                train.augmented_batches(split, 25, seed, epoch)]
    assert [len(batch) for batch in labels(0, 1)] == [25, 25, 25, 25, 3]
    assert sorted(sum(labels(0, 1), [])) == list(range(103))
    assert labels(0, 1) == labels(0, 1)
    assert labels(0, 1) != labels(0, 2) != labels(1, 2) != labels(0, 1)


def test_batches_are_channels_last_and_in_the_precision_of_training():
    split = random_split(20)
    prepared = train.prepare(split, *train.channel_statistics(split.images), "cpu", torch.bfloat16, padding=4)
    for images, labels in train.augmented_batches(prepared, 8, 0, 1):
        assert images.is_contiguous(memory_format=torch.channels_last) and images.dtype == torch.bfloat16
        assert images.shape == (len(labels), 3, 32, 32)
    assert train.memory_format("cuda") == torch.channels_last and train.memory_format("mps") == torch.contiguous_format


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
    lrs, beta1s = train.plan_cycle({"epochs": epochs, "lr_min": lr_min, "lr_max": lr_max}, steps_per_epoch)
    assert len(lrs) == len(beta1s) == total
    for lr, beta1 in zip(lrs, beta1s):
        assert lr == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9)
        assert beta1 == pytest.approx(optimizer.param_groups[0]["betas"][0], rel=1e-9)
        optimizer.step()
        if scheduler.last_epoch < total - 1:
            scheduler.step()


def test_one_cycle_peaks_at_the_end_of_epoch_5_and_ends_at_lr_min():
    lrs, _ = train.plan_cycle({"epochs": 24, "lr_min": 1e-5, "lr_max": 1e-2}, 98)
    assert lrs.index(max(lrs)) == 5 * 98 - 1 and max(lrs) == pytest.approx(1e-2)
    assert lrs[0] == lrs[-1] == min(lrs) == pytest.approx(1e-5)


@pytest.mark.parametrize("steps", range(1, 12))
def test_one_cycle_of_few_steps_stays_between_its_ends(steps):
    values = [train.one_cycle(step, steps, 1.0, 2.0) for step in range(steps)]
    assert all(1.0 <= value <= 2.0 for value in values) and values[-1] == 1.0


def test_sweep_is_read_by_its_rule():
    lrs = [10.0 ** exponent for exponent in range(-6, 3)]
    #           fall of 2: begun at 2.8, done at 1.5, which is 16 times below LRMAX
    smoothed = [3.0, 2.9, 2.7, 1.4, 1.0, 1.1, 1.2, 1.6, 5.0]
    assert train.read_sweep(lrs, smoothed) == (1e-4, 16 * 1e-3)
    assert train.read_sweep(lrs, [3.0, 2.9, 2.7, 1.4, 1.0, 1.6, 1.2, 1.1, 5.0]) == (1e-4, 1e-2)  # lost earlier
    assert train.read_sweep(lrs[:4], smoothed[:4]) == (1e-4, lrs[3])  # never climbs: at most the last rate
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
        assert len(sweep["lr"]) < 100 and max(sweep["loss"]) < 1e6 * sweep["loss"][0], "it did not stop at divergence"
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
            torch.rand(1)  # uses the global random state
            yield from train.augmented_batches(prepared, 16, 0, epoch)
    train.set_rates(learner.optimizer, 1e-5, 0.9)
    for _, (images, labels) in zip(range(steps_before), batches()):
        train.train_step(learner, images, labels)
    weights, groups, state, random_state = snapshot(learner)
    learner.model.eval()
    sweep = train.sweep_learning_rate(learner, batches(), 20)
    assert len(sweep["lr"]) > 5 and not learner.model.training
    weights_after, groups_after, state_after, random_state_after = snapshot(learner)
    assert all(torch.equal(a, b) for a, b in zip(weights, weights_after, strict=True))
    assert groups == groups_after and state.keys() == state_after.keys()
    assert all(torch.equal(state[key], state_after[key]) for key in state)
    assert torch.equal(random_state, random_state_after)
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_sweep_puts_everything_back_after_an_interruption():
    learner = train.make_learner(0, "cpu", "fp32")
    learner.scaler = torch.amp.GradScaler("cpu", growth_interval=1)  # grows with every step
    weights = snapshot(learner)[0]

    def batches():
        yield from 3 * [(torch.randn(8, 3, 32, 32), torch.arange(8))]
        raise KeyboardInterrupt
    scale = learner.scaler.get_scale()
    with pytest.raises(KeyboardInterrupt):
        train.sweep_learning_rate(learner, batches(), 20)
    assert all(torch.equal(a, b) for a, b in zip(weights, snapshot(learner)[0], strict=True))
    assert learner.scaler.get_scale() == scale


# ----------------------------------------------------------------------------------------------------------------------
# Optimizer, step, evaluation
# ----------------------------------------------------------------------------------------------------------------------

def test_decay_is_decoupled_and_spares_biases_and_batch_norms():
    learner = train.make_learner(0, "cpu", "fp32")
    assert all(group["weight_decay"] == 0 for group in learner.optimizer.param_groups)
    learner.optimizer.param_groups[0]["weight_decay"] = 0.3
    train.set_rates(learner.optimizer, 0.1, 0.9)
    before = {name: value.clone() for name, value in learner.model.named_parameters()}
    for parameter in learner.model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    learner.optimizer.step()
    for name, value in learner.model.named_parameters():
        kept = 1 - 0.1 * 0.3 if value.ndim > 1 else 1
        torch.testing.assert_close(value, kept * before[name])
    assert learner.optimizer.param_groups[0]["fused"]


@pytest.mark.parametrize("lr_max, steps_per_epoch, memory", [(0.04, 98, 490), (0.01, 391, 1955), (0.04, 4, 100)])
def test_decay_alone_shrinks_weights_to_1_over_e_in_their_memory(lr_max, steps_per_epoch, memory):
    weight = nn.Parameter(torch.ones(1))
    decay = train.weight_decay(lr_max, steps_per_epoch)
    optimizer = torch.optim.AdamW([weight], lr=lr_max, weight_decay=decay)
    for _ in range(memory):
        weight.grad = torch.zeros(1)
        optimizer.step()
    assert weight.item() == pytest.approx(1 / math.e, rel=0.01)


def test_a_step_against_pytorch_written_out():
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    learner, reference = (train.make_learner(0, "cpu", "fp32") for _ in range(2))
    logits = reference.model(images)
    smoothing = train.RECIPE["label_smoothing"]
    log_p = logits.log_softmax(1)
    loss = -((1 - smoothing) * log_p[range(8), labels] + smoothing * log_p.mean(1)).mean()
    loss.backward()
    reported, correct = train.train_step(learner, images, labels)
    torch.testing.assert_close(reported, loss.detach())
    assert correct == (logits.argmax(1) == labels).sum()
    for ours, theirs in zip(learner.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_an_epoch_takes_each_step_at_its_rates_and_weighs_every_image_alike(monkeypatch):
    taken = []

    def step(learner, images, labels):
        group = learner.optimizer.param_groups[-1]
        taken.append((group["lr"], group["betas"][0]))
        return torch.tensor(float(len(taken))), torch.tensor(len(labels) - 1)
    monkeypatch.setattr(train, "train_step", step)
    learner = train.make_learner(0, "cpu", "fp32")
    batches = [(torch.zeros(size, 3, 32, 32), torch.zeros(size)) for size in (4, 4, 2)]
    result = train.train_epoch(learner, batches, [0.1, 0.2, 0.3], [0.95, 0.9, 0.85], 1, 1)
    assert taken == [(0.1, 0.95), (0.2, 0.9), (0.3, 0.85)]
    assert result["train_loss"] == pytest.approx((4 * 1 + 4 * 2 + 2 * 3) / 10)
    assert result["train_accuracy"] == pytest.approx((3 + 3 + 1) / 10)


def test_prediction_and_evaluation_against_pytorch_written_out(monkeypatch):
    learner = train.make_learner(0, "cpu", "fp32")
    images, labels = torch.randn(10, 3, 32, 32), torch.arange(10)
    learner.model(images)  # gives the running statistics something other than their start
    learner.model.eval()
    with torch.no_grad():
        expected, mirrored = learner.model(images), learner.model(TF.hflip(images))
    learner.model.train()
    monkeypatch.setattr(train, "EVAL_BATCH_SIZE", 4)  # three batches, the last one smaller
    torch.testing.assert_close(train.predict(learner, images), expected)
    torch.testing.assert_close(train.predict(learner, images, mirror=True), mirrored)
    result = train.evaluate(learner, train.Split(images, labels))
    smoothing = train.RECIPE["label_smoothing"]
    log_p = expected.log_softmax(1)
    loss = -((1 - smoothing) * log_p[range(10), labels] + smoothing * log_p.mean(1)).mean()
    assert result["test_loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert result["test_accuracy"] == sum(expected.argmax(1).tolist()[i] == i for i in range(10)) / 10


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
    assert workplace.run(*RATES, "--epochs", 4, "--checkpoint", "whole.pt", "--output", "whole.json") == 0
    print_row = train.print_row

    def interrupt_after_epoch_2(row):
        print_row(row)
        if row["epoch"] == 2:
            monkeypatch.setattr(train, "print_row", print_row)
            raise KeyboardInterrupt
    monkeypatch.setattr(train, "print_row", interrupt_after_epoch_2)
    assert workplace.run(*RATES, "--epochs", 4, "--checkpoint", "parts.pt", "--output", "parts.json") == 130
    assert workplace.report("parts.json")["summary"]["status"] == "interrupted"
    assert workplace.run(*RATES, "--epochs", 4, "--checkpoint", "parts.pt", "--output", "parts.json") == 0

    whole, parts = workplace.report("whole.json"), workplace.report("parts.json")
    assert metrics(whole) == metrics(parts) and len(whole["epochs"]) == 4
    saved = [torch.load(name, weights_only=True) for name in ("whole.pt", "parts.pt")]
    for kind in ("model", "optimizer"):
        flat = [torch.utils._pytree.tree_leaves(state[kind]) for state in saved]
        assert len(flat[0]) == len(flat[1]) > 30
        for a, b in zip(*flat):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_resuming_a_finished_run_trains_no_further(workplace):
    for _ in range(2):
        assert workplace.run("--epochs", 1, "--checkpoint", "run.pt", *RATES) == 0
    assert len(workplace.report()["epochs"]) == 1 and workplace.report()["summary"]["status"] == "complete"


@pytest.mark.parametrize("arguments, difference", [
    (["--epochs", 2], "epochs 1, not 2"), (["--epochs", 1, "--holdout", 10], "holdout 0, not 10"),
    (["--epochs", 2, "--seed", 7], "epochs 1, not 2; seed 0, not 7")])
def test_checkpoint_of_another_configuration_is_refused(workplace, capsys, arguments, difference):
    assert workplace.run("--epochs", 1, "--checkpoint", "run.pt", *RATES) == 0
    before = Path("run.pt").read_bytes()
    assert workplace.run(*arguments, "--checkpoint", "run.pt", *RATES) == 1
    assert difference in capsys.readouterr().err
    assert Path("run.pt").read_bytes() == before


def test_checkpoint_of_another_recipe_is_refused(workplace, capsys, monkeypatch):
    assert workplace.run("--epochs", 1, "--checkpoint", "run.pt", *RATES) == 0
    monkeypatch.setitem(train.RECIPE, "memory_epochs", 3.0)
    assert workplace.run("--epochs", 1, "--checkpoint", "run.pt", *RATES) == 1
    assert "memory_epochs 5.0, not 3.0" in capsys.readouterr().err


def test_a_finished_write_replaces_the_file_and_a_broken_one_leaves_it(tmp_path):
    path = tmp_path / "file"
    train.write_json(path, {"epoch": 1})

    def die_half_way(temporary):
        temporary.write_text("half")
        assert json.loads(path.read_text()) == {"epoch": 1}  # a reader meanwhile sees the old file
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        train.replace_file(path, die_half_way)
    assert json.loads(path.read_text()) == {"epoch": 1} and os.listdir(tmp_path) == ["file"]
    train.write_json(path, {"epoch": 2})
    assert json.loads(path.read_text()) == {"epoch": 2}


def test_a_file_that_is_no_checkpoint_is_refused(workplace, capsys):
    Path("run.pt").write_text("not a checkpoint")
    assert workplace.run("--epochs", 1, "--checkpoint", "run.pt", *RATES) == 1
    assert "run.pt is not a checkpoint" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# A run and what it writes
# ----------------------------------------------------------------------------------------------------------------------

def test_a_run_reports_all_it_should(workplace, capsys):
    assert workplace.run("--epochs", 8, "--batch-size", 30) == 0
    report = workplace.report()
    config, summary, rows = report["config"], report["summary"], report["epochs"]

    assert config["epochs"] == 8 and config["batch_size"] == 30 and config["peak_epoch"] == pytest.approx(8 * 5 / 24)
    assert config["recipe"]["memory_epochs"] == train.RECIPE["memory_epochs"]
    assert set(report["environment"]) == {"python", "torch", "torchvision", "numpy", "device", "device_name",
                                          "precision", "threads"}
    images = train.load_cifar10(Path("data"))[0].images.double() / 255
    assert report["data"]["train_images"] == 100 and report["data"]["test_images"] == 20
    assert report["data"]["mean"] == pytest.approx(images.mean(dim=(0, 2, 3)).tolist(), rel=1e-5)
    assert report["data"]["evaluated_on"] == "test images"
    assert report["parameters"] == 6_573_130

    sweep = report["lr_sweep"]
    assert (sweep["lr_max"], sweep["lr_min"]) == (config["lr_max"], config["lr_min"]) and sweep["rule"]
    assert len(sweep["lr"]) == len(sweep["loss"]) == len(sweep["smoothed_loss"]) <= 8  # two epochs of four steps

    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert all(set(row) == {"epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy",
                            "train_seconds", "test_seconds", "images_per_second", "elapsed_seconds"} for row in rows)
    assert rows[-1]["lr"] == pytest.approx(config["lr_min"])
    assert rows[0]["elapsed_seconds"] == pytest.approx(summary["preprocess_seconds"] + rows[0]["train_seconds"])
    assert all(row["images_per_second"] == pytest.approx(100 / row["train_seconds"]) for row in rows)

    best = max(row["test_accuracy"] for row in rows)
    assert summary["status"] == "complete"
    assert summary["final_test_accuracy"] == rows[-1]["test_accuracy"]
    assert summary["best_test_accuracy"] == best == rows[summary["best_epoch"] - 1]["test_accuracy"]
    assert summary["train_seconds"] == pytest.approx(sum(row["train_seconds"] for row in rows))
    assert summary["total_seconds"] > summary["train_seconds"] + summary["sweep_seconds"]

    screen = capsys.readouterr().out
    assert "6,573,130 parameters" in screen and f"LRMAX {config['lr_max']:.3g}" in screen and "\r" not in screen
    table = screen[screen.index("  epoch  "):].splitlines()[:9]
    assert len(set(map(len, table))) == 1, "the table's rows are not of one width"


def test_the_mirror_image_is_averaged_in(workplace, monkeypatch):
    predict, seen = train.predict, {}

    def remember(learner, images, mirror=False):
        seen[mirror] = predict(learner, images, mirror)
        return seen[mirror]
    monkeypatch.setattr(train, "predict", remember)
    assert workplace.run("--epochs", 2, *RATES) == 0
    labels = train.load_cifar10(Path("data"))[1].labels
    right = ((seen[False] + seen[True]).argmax(1) == labels).sum().item()
    assert workplace.report()["summary"]["tta_test_accuracy"] == right / 20


def test_holdout_trains_without_and_evaluates_on_the_last_images(workplace):
    assert workplace.run("--epochs", 1, "--holdout", 30, *RATES) == 0
    data = workplace.report()["data"]
    assert (data["train_images"], data["test_images"]) == (70, 30)
    assert data["evaluated_on"] == "held-out training images"
    images = train.load_cifar10(Path("data"))[0].images[:70].double() / 255
    assert data["mean"] == pytest.approx(images.mean(dim=(0, 2, 3)).tolist(), rel=1e-5)


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


def test_runs_report_each_seed_and_their_statistics(workplace, capsys):
    assert workplace.run("--epochs", 1, "--runs", 3, "--seed", 4, *RATES) == 0
    reports = [workplace.report(f"run-seed{seed}.json") for seed in (4, 5, 6)]
    assert [report["config"]["seed"] for report in reports] == [4, 5, 6]
    assert len({report["epochs"][0]["train_loss"] for report in reports}) == 3
    accuracies = [report["summary"]["final_test_accuracy"] for report in reports]
    statistic = workplace.report()
    assert statistic["final_test_accuracy"] == accuracies and statistic["seed"] == [4, 5, 6]
    assert statistic["mean"] == pytest.approx(np.mean(accuracies))
    assert statistic["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert (statistic["min"], statistic["max"]) == (min(accuracies), max(accuracies))
    assert statistic["reached_goal"] == sum(accuracy >= 0.94 for accuracy in accuracies)
    assert f"mean {np.mean(accuracies):.2%}" in capsys.readouterr().out


def test_a_run_decays_by_what_suits_the_rate_it_found(workplace):
    assert workplace.run("--epochs", 1, "--checkpoint", "run.pt") == 0
    config = workplace.report()["config"]
    assert config["weight_decay"] == pytest.approx(0.01 / config["lr_max"])  # a memory of 100 steps, the shortest
    groups = torch.load("run.pt", weights_only=True)["optimizer"]["param_groups"]
    assert [group["weight_decay"] for group in groups] == [config["weight_decay"], 0]


def test_no_epochs_find_the_rates_and_stop(workplace, capsys):
    assert workplace.run("--epochs", 0, "--runs", 2) == 0
    statistic = workplace.report()
    for seed in (0, 1):
        report = workplace.report(f"run-seed{seed}.json")
        assert report["epochs"] == [] and report["summary"]["status"] == "complete"
        assert report["lr_sweep"]["lr_max"] == report["config"]["lr_max"] == statistic["lr_max"][seed]
        assert report["summary"]["final_test_accuracy"] is None and report["summary"]["tta_test_accuracy"] is None
    assert "mean" not in statistic and statistic["lr_min"][0] < statistic["lr_max"][0]
    assert f"{min(statistic['lr_max']):.3g} to {max(statistic['lr_max']):.3g}" in capsys.readouterr().out


def test_another_recipe_reaches_the_run_and_ends_with_it(workplace, capsys, monkeypatch):
    defaults, learners, make_learner = dict(train.RECIPE), [], train.make_learner
    monkeypatch.setattr(train, "make_learner", lambda *a: learners.append(make_learner(*a)) or learners[-1])
    changed = {"memory_epochs": 3.0, "beta1": (0.9, 0.8), "beta2": 0.98, "epsilon": 0.02, "batchnorm_momentum": 0.5,
               "padding_mode": "constant", "cutout": 4}
    values = ["3", "0.9,0.8", "0.98", "2e-2", "0.5", "constant", "4"]
    arguments = [part for name, value in zip(changed, values) for part in ("--set", f"{name}={value}")]
    assert workplace.run("--epochs", 1, *arguments, *RATES) == 0
    recipe = workplace.report()["config"]["recipe"]
    assert recipe == {**json.loads(json.dumps(defaults)), **json.loads(json.dumps(changed))}
    assert train.RECIPE == defaults
    for group in learners[0].optimizer.param_groups:
        assert group["eps"] == 0.02 and group["betas"] == (pytest.approx(0.9), 0.98)
    assert {m.momentum for m in learners[0].model.modules() if isinstance(m, nn.BatchNorm2d)} == {0.5}
    assert "recipe     cutout 4, not 8" in capsys.readouterr().out


def test_one_rate_alone_is_found_by_the_sweep(workplace):
    assert workplace.run("--epochs", 1, "--lr-max", 0.5) == 0
    config, sweep = workplace.report()["config"], workplace.report()["lr_sweep"]
    assert config["lr_max"] == 0.5 and config["lr_min"] == sweep["lr_min"] != 0.5


def test_by_default_every_run_writes_a_new_file(workplace):
    for _ in range(2):
        assert train.main([*SMALL, "--epochs", "1", "--no-figures", *RATES]) == 0
    assert len(list(Path("results").glob("*.json"))) == 2


def test_figures_are_drawn_where_matplotlib_is(workplace):
    pytest.importorskip("matplotlib")
    assert train.main([*SMALL, "--epochs", "1", "--output", "run.json"]) == 0
    figures = {path.name for path in Path().glob("*.png")}
    assert figures == {f"run-{name}.png" for name in ("sweep", "curves", "schedule", "augmented", "misclassified")}
    assert all(Path(name).stat().st_size > 5000 for name in figures)


def test_without_matplotlib_one_line_says_so(workplace, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert train.main([*SMALL, "--epochs", "1", "--output", "run.json", *RATES]) == 0
    assert capsys.readouterr().out.count("matplotlib is not installed") == 1
    assert not list(Path().glob("*.png"))


def test_pixels_of_figures_are_the_images_in_their_colours():
    split = random_split(4)
    mean, std = train.channel_statistics(split.images)
    prepared = train.prepare(split, mean, std, "cpu", torch.float32)
    pixels = train.to_pixels(prepared.images, mean, std)
    np.testing.assert_allclose(pixels, split.images.permute(0, 2, 3, 1).numpy() / 255, atol=1e-6)


def test_status_line_is_for_terminals_and_leaves_nothing(monkeypatch, capsys):
    for terminal, expected in ((False, ""), (True, "\rlong text\rshort    \r     \r")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        status = train.StatusLine()
        status.show("long text")
        status.show("short")
        status.clear()
        assert capsys.readouterr().out == expected


# ----------------------------------------------------------------------------------------------------------------------
# Precision
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("capabilities, expected", [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"),
                                                    ({"avx512_bf16": False, "avx2": True}, "fp32"), ({}, "fp32")])
def test_cpu_precision_follows_its_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert train.choose_precision("cpu") == expected


def test_precision_of_other_devices(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert train.choose_precision("cpu") == train.choose_precision("mps") == "fp32"
    for native, expected in ((True, "bf16"), (False, "fp16")):  # a T4 emulates bf16: that does not count
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation=True: native or including_emulation)
        assert train.choose_precision("cuda") == expected


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_in_low_precision_go_as_in_full(precision):
    split = random_split(8)
    mean, std = train.channel_statistics(split.images)
    losses = {}
    for name in ("fp32", precision):
        learner = train.make_learner(0, "cpu", name)
        prepared = train.prepare(split, mean, std, "cpu", learner.dtype)
        train.set_rates(learner.optimizer, 1e-3, 0.9)
        losses[name] = [train.train_step(learner, *prepared)[0].item() for _ in range(4)]
        assert all(parameter.dtype == torch.float32 for parameter in learner.model.parameters())
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.05) and losses["fp32"][-1] < losses["fp32"][0]


def test_fp16_skips_a_step_whose_gradients_overflow():
    learner = train.make_learner(0, "cpu", "fp16")
    split = random_split(8)
    prepared = train.prepare(split, *train.channel_statistics(split.images), "cpu", torch.float16)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** 40)
    before = learner.model.head.weight.clone()
    train.train_step(learner, *prepared)
    assert torch.equal(learner.model.head.weight, before) and learner.scaler.get_scale() < 2.0 ** 40


# ----------------------------------------------------------------------------------------------------------------------
# When things go wrong
# ----------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, sentence", [
    (["--epochs", "-3"], "--epochs: -3 is too small"),
    (["--epochs", "many"], "--epochs: 'many' is not a whole number"),
    (["--batch-size", "2.5"], "--batch-size: '2.5' is not a whole number"),
    (["--batch-size", "50001"], "--batch-size 50001 is above the 50000 training images"),
    (["--batch-size", "512", "--subset", "100"], "--batch-size 512 is above the 100 training images"),
    (["--subset", "50001"], "--subset: 50001 is too large"),
    (["--lr-max", "0"], "--lr-max: 0 is not a learning rate"),
    (["--lr-max", "nan"], "--lr-max: nan is not a learning rate"),
    (["--lr-max", "high"], "--lr-max: 'high' is not a number"),
    (["--lr-min", "0.1", "--lr-max", "0.01"], "--lr-min 0.1 is above --lr-max 0.01"),
    (["--holdout", "50000"], "--holdout 50000 leaves nothing to train on"),
    (["--subset", "1000", "--holdout", "1000"], "--holdout 1000 leaves nothing to train on"),
    (["--device", "tpu"], "--device: invalid choice: 'tpu'"),
    (["--seed", "-1"], "--seed: -1 is too small"),
    (["--runs", "0"], "--runs: 0 is too small"),
    (["--set", "beta3=0.5"], "--set: 'beta3' is no constant of the recipe; there are peak_fraction, beta1"),
    (["--set", "beta2"], "--set: '' is no value for beta2, which is 0.999"),
    (["--set", "cutout=8.5"], "--set: '8.5' is no value for cutout, which is 8"),
    (["--set", "beta1=0.9"], "--set: '0.9' is no value for beta1, which is (0.95, 0.85)")])
def test_options_without_sense_end_with_usage_and_one_sentence(capsys, arguments, sentence):
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: train.py") and sentence in message.splitlines()[-1]


def test_fp16_on_an_apple_gpu_is_refused(capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        train.main(["--device", "mps", "--precision", "fp16"])
    assert stop.value.code == 2 and "--precision fp16 needs" in capsys.readouterr().err


def test_cuda_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        train.main(["--device", "cuda"])
    assert stop.value.code == 2 and "--device cuda: PyTorch finds no such device" in capsys.readouterr().err


def test_no_data_and_no_network(workplace, tmp_path):
    process = workplace.start("--data-dir", "elsewhere")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in err
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(message) == 1 and CIFAR10.url in message[0]
    assert "elsewhere" in err.splitlines()[-1]
    assert not [path for path in (tmp_path / "elsewhere").rglob("*") if path.is_file()]
    assert not list(tmp_path.rglob("results/*"))


def test_data_laid_down_by_hand_as_an_archive(workplace, tmp_path, monkeypatch):
    import tarfile
    archive = tmp_path / "by-hand" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "data" / CIFAR10.base_folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    training, testing, _ = train.load_cifar10(archive.parent)
    assert len(training.labels) == 100 and len(testing.labels) == 20
    assert torch.equal(training.images, train.load_cifar10(tmp_path / "data")[0].images)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
@pytest.mark.parametrize("damage", [lambda content: content[:-100], lambda content: content[:-1] + b"!"])
def test_a_truncated_or_altered_file_is_named_and_not_trained_on(workplace, capsys, name, damage):
    path = Path("data") / CIFAR10.base_folder / name
    path.write_bytes(damage(path.read_bytes()))
    assert workplace.run("--epochs", 1, *RATES) == 1
    message = capsys.readouterr().err
    assert str(path) in message and "checksum is wrong" in message and not Path("run.json").exists()


def test_divergence_stops_at_once_and_says_where(workplace, capsys):
    assert workplace.run("--epochs", 3, "--batch-size", 25, "--lr-max", 1e30, "--lr-min", 1e29) == 1
    message = capsys.readouterr().err
    summary = workplace.report()["summary"]
    assert summary["status"] == "diverged" and summary["final_test_accuracy"] is None
    where = summary["diverged"]
    assert where["epoch"] == 1 and where["step"] == 2  # the first step is taken at finite weights
    assert f"epoch 1, step 2, learning rate {where['lr']:.3g}" in message and "--lr-max" in message


def test_an_altered_archive_is_named_and_not_unpacked(tmp_path):
    archive = tmp_path / CIFAR10.filename
    archive.write_bytes(b"half an archive")
    with pytest.raises(train.UserError, match="checksum is wrong") as error:
        train.load_cifar10(tmp_path)
    assert str(archive) in str(error.value) and os.listdir(tmp_path) == [archive.name]


def test_ctrl_c_keeps_the_epochs_so_far(workplace):
    process = workplace.start("--epochs", 500, "--output", "run.json", *RATES)
    wait_for_epoch(workplace, process, 2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err
    report = workplace.report()
    assert report["summary"]["status"] == "interrupted" and len(report["epochs"]) >= 2


def wait_for_epoch(workplace, process, epoch):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (workplace.folder / "run.json").exists() and len(workplace.report()["epochs"]) >= epoch:
            return
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"no epoch {epoch}: {process.communicate()}")


def test_sigkill_leaves_whole_files_and_the_run_goes_on(workplace):
    arguments = ("--epochs", 6, "--output", "run.json", "--checkpoint", "run.pt", *RATES)
    for epoch in (1, 3):
        process = workplace.start(*arguments)
        wait_for_epoch(workplace, process, epoch)  # every look at the file until then found it whole
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert workplace.report()["summary"]["status"] == "running"
    assert workplace.run("--epochs", 6, "--checkpoint", "run.pt", *RATES) == 0
    resumed = workplace.report()
    Path("run.pt").unlink()
    assert workplace.run("--epochs", 6, *RATES) == 0
    assert metrics(resumed)[0] == metrics(workplace.report())[0] and len(resumed["epochs"]) == 6


def test_a_place_that_cannot_be_written_is_named_before_training(workplace, capsys, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setattr(train, "train_once", lambda *arguments: pytest.fail("it trained"))
    for arguments in (["--output", "file/run.json"], ["--output", "data"], ["--checkpoint", "file/run.pt"]):
        assert workplace.run("--epochs", 1, *arguments) == 1
        assert f"cannot write {arguments[1]}" in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
                                   RuntimeError("MPS backend out of memory")])
def test_out_of_memory_suggests_a_smaller_batch(workplace, capsys, monkeypatch, error):
    def fail(*arguments):
        raise error
    monkeypatch.setattr(train, "train_step", fail)
    assert workplace.run("--epochs", 1, *RATES) == 1
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and "out of memory" in message and "smaller --batch-size" in message
    assert workplace.report()["summary"]["status"] == "interrupted"


# ----------------------------------------------------------------------------------------------------------------------
# The notebook and the help
# ----------------------------------------------------------------------------------------------------------------------

def test_pasted_into_a_notebook_cell_it_runs_with_the_defaults(workplace):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    small_data = (f"from torchvision.datasets import CIFAR10\n"
                  f"for name, value in {workplace.attributes!r}.items(): setattr(CIFAR10, name, value)")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in
                                               (small_data, SCRIPT.read_text())])
    client = nbclient.NotebookClient(notebook, timeout=300, allow_errors=True,
                                     resources={"metadata": {"path": str(workplace.folder)}})
    client.execute()
    outputs = notebook.cells[1].outputs
    assert not [output for output in outputs if output.output_type == "error"]
    (report,) = map(json.loads, map(Path.read_text, Path("results").glob("*.json")))
    assert report["summary"]["status"] == "complete" and report["config"]["epochs"] == 24
    text = "".join(output.text for output in outputs if output.output_type == "stream" and output.name == "stdout")
    assert "LRMAX" in text and len([line for line in text.splitlines() if line.strip()[:2].strip().isdigit()]) == 24
    if importlib.util.find_spec("matplotlib"):  # five, or four where no test image was misclassified
        assert len([output for output in outputs if "image/png" in output.get("data", {})]) in (4, 5)


def test_importing_does_nothing_but_define():
    process = subprocess.run([sys.executable, "-c", "import train"], cwd=SCRIPT.parent, capture_output=True, text=True)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_help_names_every_default(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    screen = " ".join(capsys.readouterr().out.split())
    for name, default in (("epochs", 24), ("batch-size", 512), ("lr-max", "found by the sweep"), ("seed", 0),
                          ("lr-min", "found by the sweep"), ("runs", 1), ("subset", "all"), ("holdout", 0),
                          ("data-dir", "data"), ("device", "auto"), ("precision", "auto"), ("checkpoint", "off"),
                          ("set", "RECIPE as it stands"),
                          ("output", "a new file in results/"), ("no-figures", "figures too, with matplotlib")):
        described = screen[screen.rindex(f" --{name} "):]
        assert described[described.index("(default: "):].startswith(f"(default: {default})"), name


# ----------------------------------------------------------------------------------------------------------------------
# The README
# ----------------------------------------------------------------------------------------------------------------------

README = (SCRIPT.parent / "README.md").read_text()


def linked_reports(text):
    """Return the content of every JSON file in results/ that the text links to."""
    return [json.loads((SCRIPT.parent / name).read_text()) for name in re.findall(r"\]\((results/[^)]*\.json)\)", text)]


def readme_rows(kind):
    """Return, for each table row of the README that links to reports of a kind, its cells by column name, and those.

    The kinds are "run", "statistics" (of several runs), "sweeps" (several, without training) and "ablation" (runs of
    other recipes, in a table with a column "changed"). There is at least one row of a kind.
    """
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", README, re.MULTILINE):
        columns, _, *rows = ([cell.strip(" *") for cell in line.split("|")] for line in table.splitlines())
        for line, row in zip(table.splitlines()[2:], rows):
            reports = linked_reports(line)
            kinds = {"run" if "summary" in report else "statistics" if "mean" in report else "sweeps"
                     for report in reports}
            assert len(kinds) <= 1
            if kinds and "changed" in columns:
                assert kinds == {"run"}
                kinds = {"ablation"}
            if kinds == {kind}:
                found.append((dict(zip(columns, row, strict=True)), reports))
    assert found
    return found


def assert_alike(reports, *settings):
    """Assert that all reports were made with the same value of each setting."""
    for setting in settings:
        assert all(report["config"][setting] == reports[0]["config"][setting] for report in reports), setting


def test_the_readme_quotes_its_runs():
    for cells, (report,) in readme_rows("run"):
        config, summary = report["config"], report["summary"]
        expected = {
            "epochs": str(config["epochs"]), "seed": str(config["seed"]),
            "precision": report["environment"]["precision"],
            "training, s": f"{summary['train_seconds']:,.0f}", "whole run, s": f"{summary['total_seconds']:,.0f}",
            "held-out accuracy" if config["holdout"] else "accuracy": f"{summary['final_test_accuracy']:.2%}",
            "with mirror image": f"{summary['tta_test_accuracy']:.2%}",
            "90% / 94% at epoch": " / ".join(str(epoch or "never") for epoch in summary["epochs_to"].values())}
        assert expected.items() <= cells.items()
        for name, value in map(train.recipe_constant, re.findall(r"--set ([^\s`]+)", cells.get("what", ""))):
            assert config["recipe"][name] == value


def test_the_readme_quotes_its_grid():
    for cells, (report,) in readme_rows("statistics"):
        config, accuracies = report["config"], report["final_test_accuracy"]
        assert len(set(report["seed"])) == report["runs"] == len(accuracies) > 1
        assert config["holdout"] and set(report["lr_max"]) == {config["lr_max"]}
        expected = {
            "LRMAX": f"{config['lr_max']:g}", "epochs": str(config["epochs"]), "runs": str(report["runs"]),
            "precision": report["environment"]["precision"], "held-out accuracy, mean": f"{report['mean']:.2%}",
            "standard deviation": f"{report['std']:.2%}",
            "of each seed": ", ".join(f"{accuracy:.2%}" for accuracy in accuracies)}
        assert expected.items() <= cells.items()


def test_the_readme_quotes_its_ablations():
    recipe = json.loads((SCRIPT.parent / "results" / "grid" / "lr-max-0.06.json").read_text())
    for cells, reports in readme_rows("ablation"):
        name, value = train.recipe_constant(re.fullmatch(r"`--set (\S+)`", cells["changed"])[1])
        changed = json.loads(json.dumps({name: value}))  # a pair is a list in the report
        assert changed[name] != recipe["config"]["recipe"][name]
        accuracies = [report["summary"]["final_test_accuracy"] for report in reports]
        mean = statistics.fmean(accuracies)
        assert len({report["config"]["seed"] for report in reports}) == len(reports)
        assert_alike([recipe, *reports], "epochs", "batch_size", "holdout", "subset", "precision")
        for report in reports:
            assert report["config"]["recipe"] == recipe["config"]["recipe"] | changed
            if not report["lr_sweep"]:
                assert_alike([recipe, report], "lr_max", "lr_min")
        expected = {
            "LRMAX": ", ".join(f"{report['config']['lr_max']:.3g}{' found' if report['lr_sweep'] else ''}"
                               for report in reports),
            "epochs": str(recipe["config"]["epochs"]), "precision": recipe["config"]["precision"],
            "runs": str(len(reports)), "held-out accuracy, mean": f"{mean:.2%}",
            "of each seed": ", ".join(f"{accuracy:.2%}" for accuracy in accuracies),
            "the recipe's is better by": f"{100 * (recipe['mean'] - mean):.2f}"}
        assert expected.items() <= cells.items()


def test_the_readme_quotes_its_sweeps():
    prose = re.search(r"LRMAX stays within a factor of (\S+) and LRMIN within one of (\S+),.*\bat most\s+(\d+)% apart",
                      README, re.DOTALL)
    lr_max_factor, lr_min_factor, apart = map(float, prose.groups())
    found = {}  # LRMAX in either precision, a pair, by batch size and seed
    for cells, reports in readme_rows("sweeps"):
        first = reports[0]
        seeds, lr_max, lr_min = (sum((report[name] for report in reports), []) for name in ("seed", "lr_max", "lr_min"))
        assert max(lr_max) / min(lr_max) <= lr_max_factor and max(lr_min) / min(lr_min) <= lr_min_factor
        for seed, rate in zip(seeds, lr_max, strict=True):
            found.setdefault((first["config"]["batch_size"], seed), []).append(rate)
        assert len(set(seeds)) == sum(report["runs"] for report in reports) > 1
        assert_alike(reports, "batch_size", "epochs", "holdout", "subset", "precision", "recipe")
        expected = {
            "batch": str(first["config"]["batch_size"]), "precision": first["environment"]["precision"],
            "runs": str(len(seeds)), "LRMAX": f"{min(lr_max):.3g} to {max(lr_max):.3g}",
            "LRMIN": f"{min(lr_min):.3g} to {max(lr_min):.3g}",
            "largest / smallest": f"{max(lr_max) / min(lr_max):.2f}"}
        assert expected.items() <= cells.items()
    assert max(max(pair) / min(pair) for pair in found.values()) <= 1 + apart / 100
    assert f"in {sum(bf16 == fp32 for bf16, fp32 in found.values())} of the {len(found)} pairs" in README


def test_the_readme_quotes_its_statistics():
    quoted = 0
    for paragraph in README.split("\n\n"):
        for report in linked_reports(paragraph):
            if "mean" in report:  # of several runs
                assert f"{report['mean']:.2%}" in paragraph and f"{report['std']:.2%}" in paragraph
                assert all(f"{accuracy:.2%}" in paragraph for accuracy in report["final_test_accuracy"])
                quoted += 1
    assert quoted >= 1


def test_every_file_that_the_readme_shows_is_there():
    shown = re.findall(r"\]\(((?!http)[^)]+)\)", README)
    assert shown and all((SCRIPT.parent / name).exists() for name in shown)
