"""Tests of train.py against independent references: torchvision, PyTorch, counts by hand.

They need no GPU, no network and no data set: they write small files in CIFAR-10's format.
On Windows, some cannot pass.
"""

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
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.datasets import CIFAR10

import train
from train import Recipe

SCRIPT = Path(train.__file__).resolve()
README = (SCRIPT.parent / "README.md").read_text()


# ---- Small data in the real format, small runs -----------------------------------------

SMALL = ("--batch-size", "50", "--device", "cpu")  # a GPU need not give the same result twice
REPORT = ("--no-figures", "--output", "run.json")
RATES = ("--lr-max", "0.01", "--lr-min", "0.0001")  # for tests that are not about the sweep
CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()


def easy_images(seed):
    """Return 20 images, uint8 rows (20, 3072), whose classes differ in colors and stripes."""
    labels = np.arange(20) % 10
    colors = np.random.default_rng(0).integers(60, 196, (10, 3, 1, 1))
    frequencies = (1 + np.arange(10).reshape(10, 1, 1, 1)) / 4
    stripes = 40 * np.sign(np.sin(np.arange(32) * frequencies))
    noise = np.random.default_rng(seed).normal(0, 25, (20, 3, 32, 32))
    images = (colors[labels] + stripes[labels] + noise).clip(0, 255).astype(np.uint8)
    return {"data": images.reshape(20, 3072), "labels": labels.tolist()}


def write_cifar10(folder):
    """Write files as those of CIFAR-10. Return the attributes with which CIFAR10 accepts them."""
    folder.mkdir(parents=True)
    names = [name for name, _ in [*CIFAR10.train_list, *CIFAR10.test_list]]
    contents = {name: easy_images(number) for number, name in enumerate(names)}
    contents["batches.meta"] = {"label_names": CLASSES}
    checksums = {}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    return {
        "train_list": [[name, checksums[name]] for name in names[:5]],
        "test_list": [[name, checksums[name]] for name in names[5:]],
        "meta": {**CIFAR10.meta, "md5": checksums["batches.meta"]},
        "url": "http://127.0.0.1:9/cifar-10-python.tar.gz",  # nothing listens there
    }


def use_small_data(patch, attributes):
    """Let CIFAR10 accept the files of `write_cifar10`, and hide the sample.

    `patch` is a MonkeyPatch.
    """
    for name, value in attributes.items():
        patch.setattr(CIFAR10, name, value)
    patch.setattr(train, "SAMPLE", Path("no sample"))


class Workplace:
    """A folder with small data, where the script runs: in this process or in its own."""

    def __init__(self, folder, attributes):
        self.small_data = ("from torchvision.datasets import CIFAR10\n"
                           f"for name, value in {attributes!r}.items():\n"
                           "    setattr(CIFAR10, name, value)\n")
        # A copy of the script has no sample beside it.
        shutil.copy(SCRIPT, folder / "train.py")
        (folder / "launcher.py").write_text(
            f"import runpy\n{self.small_data}runpy.run_path('train.py', run_name='__main__')\n")

    def run(self, *arguments):
        """Run `main` in this process. Return the report that it wrote."""
        train.main([*SMALL, *REPORT, *arguments])
        return self.report()

    def fail(self, *arguments):
        """Run `main`, which has to raise UserError. Return its message."""
        with pytest.raises(train.UserError) as error:
            self.run(*arguments)
        return str(error.value)

    def start(self, *arguments):
        """Start the script in a process of its own. Return the process."""
        command = [sys.executable, "launcher.py", *SMALL, *REPORT, *map(str, arguments)]
        return subprocess.Popen(command, text=True, stdout=subprocess.PIPE,
                                stderr=subprocess.PIPE,
                                env={**os.environ, "PYTHONIOENCODING": "ascii"})

    def report(self, name="run.json"):
        return json.loads(Path(name).read_text(), parse_constant=pytest.fail)  # no NaN in JSON


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """Change to a folder whose data/ has 100 training images and 20 test images."""
    monkeypatch.setenv("no_proxy", "*")  # a proxy would not reach a server of the tests
    attributes = write_cifar10(tmp_path / "data" / CIFAR10.base_folder)
    use_small_data(monkeypatch, attributes)
    monkeypatch.chdir(tmp_path)
    return Workplace(tmp_path, attributes)


def random_split(count=64, height=32, width=32):
    """Return a Split of random images and labels, the same in each call."""
    generator = torch.Generator().manual_seed(1)
    shape = (count, 3, height, width)
    images = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
    return train.Split(images, torch.randint(10, (count,), generator=generator))


def small_run(recipe=Recipe(batch_size=8), count=8, precision="fp32", **options):
    """Return a Run of `count` random images on the CPU."""
    return train.start_run(recipe, random_split(count), random_split(count), seed=0,
                           device="cpu", precision=precision, **options)


def same_state(first, second):
    """Tell whether two nested dictionaries hold the same values and tensors."""
    values, keys = torch.utils._pytree.tree_flatten(first)
    other_values, other_keys = torch.utils._pytree.tree_flatten(second)
    assert len(values) > 20  # else there would be hardly anything to compare
    return keys == other_keys and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(values, other_values, strict=True))


# Networks that train in milliseconds, from the simplest to the one most like the ResNet.

def linear_network(height=32, width=32, classes=10):
    """Return the smallest network for images of this size."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * height * width, classes))


class DropoutNetwork(nn.Sequential):
    """A network that draws random numbers."""

    def __init__(self, recipe=Recipe(), num_classes=10):
        super().__init__(
            nn.Conv2d(3, 8, kernel_size=3, stride=4), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 8, kernel_size=3, stride=2), nn.Dropout(), nn.Flatten(),
            nn.Linear(8 * 3 * 3, num_classes))
        self.logit_scale = recipe.logit_scale

    @property
    def head(self):
        return self[-1]


class SmallResNet(nn.Sequential):
    """A fast stand-in for the class ResNet, with layers of the same kinds.

    As matrices, its convolutions are tall, (64, 27), wide, (4, 576), and tall, (64, 36).
    """

    def __init__(self, recipe=Recipe(), num_classes=10):
        super().__init__(
            train.ConvBlock(3, 64, pool=True), train.ConvBlock(64, 4, pool=True),
            train.ConvBlock(4, 64, pool=True), nn.Flatten(), nn.Linear(1024, num_classes))
        self.logit_scale = recipe.logit_scale

    @property
    def prep(self):
        return self[0]

    @property
    def head(self):
        return self[-1]


STEP_RATES = train.Rates(0.001, 0.01)  # for tests that are not about the sweep


def raiser(error):
    """Return a function that raises `error`, whatever its arguments are."""
    def raise_error(*arguments, **keywords):
        raise error
    return raise_error


# ---- Recipe and model ------------------------------------------------------------------

def convolutions_and_head(model):
    """Return the convolutions and the last layer, in their order."""
    kinds = (nn.Conv2d, nn.Linear)
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


def layers_made_by_pytorch(seed):
    """Return the ResNet's convolutions and its last layer, as PyTorch makes them."""
    torch.manual_seed(seed)
    channels = [3, 64, 128, 128, 128, 256, 512, 512, 512]
    layers = [nn.Conv2d(c_in, c_out, 3, bias=False)
              for c_in, c_out in zip(channels, channels[1:])]
    return [*layers, nn.Linear(512, 10)]


@pytest.mark.parametrize("name, value", [
    ("epochs", -1), ("epochs", 2.5), ("epochs", 100_001), ("batch_size", 1),
    ("optimizer", "sgd"), ("optimizer", None), ("muon_lr_factor", 0.0),
    ("first_convolution", "sgd"), ("peak_fraction", 1.0), ("annihilation", 0.5),
    ("beta1", (0.95, 0.85)), ("beta1_peak", 1.5), ("beta2", 1.0),
    ("epsilon", math.nan), ("decay_epochs", math.inf), ("l2", -0.1),
    ("label_smoothing", "0.1"), ("ema_epochs", -0.5), ("logit_scale", 0.0),
    ("initialization", "foo"), ("padding", -1), ("padding_mode", "circular"),
    ("flips", "sometimes"), ("cutout", 32), ("cutout", 8.0)])
def test_a_value_without_sense_is_refused_by_name_in_one_sentence(name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be [^\n]*, got [^\n]*$"):
        Recipe(**{name: value})


def test_numbers_of_numpy_become_pythons_own_in_a_recipe():
    recipe = Recipe(epochs=np.int64(3), label_smoothing=np.float32(0.5))
    fields = json.loads(json.dumps(dataclasses.asdict(recipe)))
    assert fields["epochs"] == 3
    assert fields["label_smoothing"] == 0.5


def test_forward_pass_against_the_network_written_out():
    torch.manual_seed(0)
    model = train.ResNet(Recipe(logit_scale=0.25))
    for values in model.parameters():
        if values.ndim > 1:  # the identity would hide a missing layer
            nn.init.kaiming_normal_(values)
    x = torch.randn(4, 3, 32, 32)
    parameters = iter(model.parameters())

    def conv(x, pool=False):
        x = F.conv2d(x, next(parameters), padding=1)
        if pool:
            x = F.max_pool2d(x, 2)
        scale = next(parameters)
        shift = next(parameters)
        return F.relu(F.batch_norm(x, None, None, scale, shift, training=True))

    h = conv(x)
    h = conv(h, pool=True)
    h = h + conv(conv(h))
    h = conv(h, pool=True)
    h = conv(h, pool=True)
    h = h + conv(conv(h))
    weight = next(parameters)
    bias = next(parameters)
    logits = F.linear(h.amax(dim=(2, 3)), weight, bias) * 0.25
    assert not list(parameters)
    torch.testing.assert_close(model(x), logits)


def test_the_first_layer_whitens_the_first_1000_training_images():
    torch.manual_seed(1)
    noise = torch.randn(1100, 3, 32, 32)  # the last 100 images differ much from the others
    # Pixels and channels depend on each other, as in photographs.
    noise[:1000] = F.avg_pool2d(noise[:1000], 3, stride=1, padding=1)
    noise[:, 1] += noise[:, 0]
    split = train.Split((128 + 80 * noise).clamp(0, 255).byte(), torch.arange(1100) % 10)
    run = train.start_run(Recipe(padding=0), split, random_split(8), device="cpu",
                          precision="fp32")
    images = run.training.images[:1000]
    windows = np.lib.stride_tricks.sliding_window_view(images.numpy(), (3, 3), axis=(2, 3))
    patches = windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 27)
    variances = np.linalg.eigvalsh(np.cov(patches, rowvar=False))
    assert variances.min() < 0.01 < variances.max()  # so the 0.01 in the filters counts
    filters = run.model.prep[0].weight.detach()
    outputs = F.conv2d(images, filters[:27]).transpose(0, 1).flatten(1)
    expected = torch.diag(torch.from_numpy(variances / (variances + 0.01)).float())
    torch.testing.assert_close(torch.cov(outputs), expected, atol=1e-3, rtol=1e-3)
    assert torch.equal(filters[27:54], -filters[:27])
    assert torch.equal(filters[54:], layers_made_by_pytorch(seed=0)[0].weight[54:])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_whitening_in_low_precision_is_as_in_fp32(precision):
    low, full = [small_run(precision=name).model.prep[0].weight[:27].flatten(1)
                 for name in (precision, "fp32")]
    # The sign of an eigenvector is arbitrary. This product does not depend on it.
    torch.testing.assert_close(low.T @ low, full.T @ full, rtol=0.05, atol=0.05)


def test_the_plain_recipe_begins_with_the_layers_that_pytorch_makes():
    run = small_run(dataclasses.replace(train.RECIPES["plain"], batch_size=8))
    layers = convolutions_and_head(run.model)
    for layer, expected in zip(layers, layers_made_by_pytorch(seed=0), strict=True):
        assert torch.equal(layer.weight, expected.weight)


def test_the_tuned_recipe_begins_with_convolutions_that_pass_their_input_on():
    """Filters that have no input to pass on are PyTorch's, and so is the last layer."""
    layers = convolutions_and_head(small_run().model)
    expected_layers = layers_made_by_pytorch(seed=0)
    assert len(layers) == 9
    for convolution, expected in zip(layers[1:-1], expected_layers[1:-1], strict=True):
        count = convolution.in_channels
        x = torch.randn(2, count, 8, 8)
        assert torch.equal(convolution(x)[:, :count], x)
        assert torch.equal(convolution.weight[count:], expected.weight[count:])
    assert torch.equal(layers[-1].weight, expected_layers[-1].weight)


def test_the_first_convolution_stays_as_pytorch_makes_it_until_it_whitens():
    torch.manual_seed(0)
    first = train.ResNet().prep[0]
    assert torch.equal(first.weight, layers_made_by_pytorch(seed=0)[0].weight)


def test_images_of_another_size_need_a_network_of_their_own():
    usual = random_split(8)
    other = random_split(8, 16, 16)
    for training, test in ((other, usual), (usual, other)):
        with pytest.raises(ValueError, match="^the built-in network .* 3 x 32 x 32"):
            train.start_run(Recipe(), training, test, device="cpu")


def test_training_and_test_images_need_the_same_channels():
    gray = TRAINABLE._replace(images=TRAINABLE.images[:, :1])
    with pytest.raises(ValueError, match="^training images have 3 channels, test images have 1$"):
        run_with(TRAINABLE, test=gray)


# ---- Data and augmentation -------------------------------------------------------------

def run_with(split, test=None, seed=0, precision="fp32", augment=None, **constants):
    """Return a Run of a linear network with these constants of the recipe.

    Its labels may be the numbers of its images.
    """
    height, width = split.images.shape[2:]
    classes = max(10, len(split.labels))

    def make_network():
        return linear_network(height, width, classes)

    return train.start_run(Recipe(**constants), split, test or split, seed, device="cpu",
                           precision=precision, num_classes=classes, augment=augment,
                           model=make_network)


def normalized_by_torchvision(images, training_images):
    """Return uint8 images, normalized by mean and deviation of the training images."""
    pixels = training_images.double() / 255
    mean = pixels.mean((0, 2, 3))
    deviation = (pixels - mean.view(3, 1, 1)).square().mean((0, 2, 3)).sqrt()
    return TF.normalize(TF.convert_image_dtype(images), mean.tolist(), deviation.tolist())


def numbered_split(count, height=32, width=32):
    """Return random images, each labelled with its number."""
    return random_split(count, height, width)._replace(labels=torch.arange(count))


def in_their_order(batches):
    """Return the images of an epoch, ordered by their labels, which are their numbers."""
    images, labels = zip(*batches)
    return torch.cat(images)[torch.cat(labels).argsort()]


def same_batches(first, second):
    """Tell whether two lists hold the same batches of images and labels."""
    return all(torch.equal(images, other_images) and torch.equal(labels, other_labels)
               for (images, labels), (other_images, other_labels)
               in zip(first, second, strict=True))


def test_a_split_is_made_of_the_array_and_list_of_a_torchvision_data_set():
    array = np.random.default_rng(0).integers(0, 256, (5, 48, 32, 3), dtype=np.uint8)
    split = train.make_split(array, [3, 0, 9, 9, 1])
    assert split.images.dtype == torch.uint8
    for image, pixels in zip(split.images, array, strict=True):
        assert torch.equal(image / 255, TF.to_tensor(pixels))
    assert split.labels.dtype == torch.int64
    assert split.labels.tolist() == [3, 0, 9, 9, 1]


@pytest.mark.parametrize("images, got", [
    (np.zeros((8, 28, 28), np.uint8), r"ndarray \(8, 28, 28\)"),
    (torch.zeros(8, 32, 32, 3).byte(), r"Tensor \(8, 32, 32, 3\)"),
    ([[0], [0, 1]], "list")])
def test_images_of_another_form_are_refused(images, got):
    with pytest.raises(ValueError, match=rf"NumPy array \(N, H, W, C\), got {got}$"):
        train.make_split(images, [0] * 8)


TRAINABLE = random_split(8)


@pytest.mark.parametrize("changed, reason", [
    ({"images": torch.rand(8, 3, 32, 32)},
     r"images must be uint8 \(N, C, H, W\), .* got torch.float32 \(8, 3, 32, 32\)"),
    ({"images": TRAINABLE.images[:, 0]},
     r"images must be uint8 \(N, C, H, W\), .* got torch.uint8 \(8, 32, 32\)"),
    ({"images": TRAINABLE.images[:0], "labels": TRAINABLE.labels[:0]},
     r"images must be uint8 \(N, C, H, W\), one or more, got torch.uint8 \(0, 3, 32, 32\)"),
    ({"labels": TRAINABLE.labels[:7]},
     r"labels must be \(8,\), one for each image, got \(7,\)"),
    ({"images": TRAINABLE.images.numpy()}, "images and labels must be tensors.*make_split.*"),
    ({"labels": TRAINABLE.labels.tolist()}, "images and labels must be tensors.*make_split.*"),
    ({"labels": torch.full((8,), 10)}, "labels must be from 0 to 9, because num_classes is 10"),
    ({"labels": torch.full((8,), -1)}, "labels must be from 0 to 9, because num_classes is 10"),
    ({"labels": torch.zeros(8)}, "labels must be whole numbers"),
    ({"labels": torch.tensor(1)}, r"labels must be \(8,\), one for each image, got \(\)"),
    ({"labels": torch.zeros(8, 1).long()}, r"labels must be \(8,\), .* got \(8, 1\)"),
    ({"labels": torch.eye(10)[:8].long()}, r"labels must be \(8,\), .* got \(8, 10\)")])
def test_a_split_that_cannot_be_trained_on_is_named_with_the_reason(changed, reason):
    split = TRAINABLE._replace(**changed)
    with pytest.raises(ValueError, match=f"^training split: {reason}$"):
        train.start_run(Recipe(), split, TRAINABLE, device="cpu")
    with pytest.raises(ValueError, match=f"^test split: {reason}$"):
        train.start_run(Recipe(), TRAINABLE, split, device="cpu")


@pytest.mark.parametrize("value", [0, 77])
def test_a_constant_channel_is_refused_in_training_images_but_not_in_test_images(value):
    images = TRAINABLE.images.clone()
    images[:, 1] = value
    split = TRAINABLE._replace(images=images)
    with pytest.raises(ValueError, match="^training split: a channel .* is constant$"):
        train.start_run(Recipe(), split, TRAINABLE, device="cpu")
    train.start_run(Recipe(), TRAINABLE, split, device="cpu", model=linear_network)


@pytest.mark.parametrize("height, width, padding, cutout", [
    (4, 32, 4, 0), (32, 4, 4, 0), (7, 32, 0, 8), (32, 7, 0, 8)])
def test_images_too_small_for_padding_or_cutout_are_refused_in_a_sentence(
        height, width, padding, cutout):
    sentence = (rf"^images of {height} x {width} are too small [^\n]*"
                rf"padding {padding} and cutout {cutout}$")
    with pytest.raises(ValueError, match=sentence):
        run_with(random_split(8, height, width), padding=padding, cutout=cutout)


def test_the_smallest_images_for_padding_and_cutout_are_accepted():
    run = run_with(random_split(8, 8, 8), batch_size=8, padding=7, cutout=8)
    images, _ = next(train.augmented_batches(run, 1))
    assert images.shape == (8, 3, 8, 8)
    assert not images.any()  # the hole covers all


def test_test_images_are_normalized_by_the_statistics_of_the_training_images():
    training = random_split(8)
    dark = random_split(8)._replace(images=random_split(8).images // 4)
    run = run_with(training, test=dark)
    expected = normalized_by_torchvision(dark.images, training.images)
    torch.testing.assert_close(run.test.images, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype, error", [
    (torch.float32, 0), (torch.float16, 0), (torch.bfloat16, 1)])
def test_restored_images_are_those_before_normalization(dtype, error):
    """All 256 values come back. bf16 is too coarse for that: a value may be off by 1."""
    images = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    mean = torch.tensor([0.4914, 0.4822, 0.4465])  # CIFAR-10's
    std = torch.tensor([0.2470, 0.2435, 0.2616])
    normalized = train.normalize_images(images, mean, std).to(dtype)
    restored = train.restore_images(normalized, mean, std)
    assert restored.dtype == torch.uint8
    torch.testing.assert_close(restored, images.clone(), rtol=0, atol=error)


def test_values_beyond_black_and_white_are_restored_as_black_and_white():
    beyond = torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2)
    restored = train.restore_images(beyond, torch.tensor([0.5]), torch.tensor([0.25]))
    assert restored.flatten().tolist() == [0, 255]


@pytest.mark.parametrize("images", [torch.rand(1, 3, 8, 8), np.zeros((1, 3, 8, 8), np.uint8)])
def test_images_that_are_no_tensor_of_uint8_are_not_normalized(images):
    with pytest.raises(ValueError, match="^images must be a tensor .* of uint8, from 0 to 255$"):
        train.normalize_images(images, torch.zeros(3), torch.ones(3))


@pytest.mark.parametrize("height, width, padding, padding_mode, cutout", [
    (32, 32, 4, "reflect", 8), (32, 32, 2, "constant", 8), (32, 32, 0, "reflect", 0),
    (48, 32, 4, "reflect", 8), (20, 36, 3, "constant", 15)])
def test_augmentation_pixel_for_pixel_against_torchvision(
        height, width, padding, padding_mode, cutout):
    split = random_split(64, height, width)
    run = run_with(split, padding=padding, padding_mode=padding_mode, cutout=cutout)
    mirrored = torch.arange(64) % 3 == 0
    generator = torch.Generator().manual_seed(2)
    augmented = train.augment_images(run.recipe, run.training.images, mirrored, generator)
    generator.manual_seed(2)  # for the same draws once more

    def draw(choices):
        return torch.randint(choices, (64,), generator=generator).tolist()

    crop_tops = draw(2 * padding + 1)
    crop_lefts = draw(2 * padding + 1)
    hole_tops = draw(height - cutout + 1)
    hole_lefts = draw(width - cutout + 1)
    assert augmented.shape == (64, 3, height, width)
    normalized = normalized_by_torchvision(split.images, split.images)
    for i, image in enumerate(normalized):
        image = TF.pad(image, [padding], padding_mode=padding_mode)
        image = TF.crop(image, crop_tops[i], crop_lefts[i], height, width)
        if mirrored[i]:
            image = TF.hflip(image)
        image = TF.erase(image, hole_tops[i], hole_lefts[i], cutout, cutout,
                         torch.tensor(0.0))
        torch.testing.assert_close(augmented[i], image, rtol=0, atol=1e-6)


def test_sweep_training_and_other_seeds_have_random_numbers_of_their_own():
    epochs_of_training = [*range(100), train.MAX_EPOCHS]
    # A sweep has at most 180 steps if an epoch has one step.
    epochs_of_sweep = range(train.SWEEP_EPOCH, train.SWEEP_EPOCH + 180)
    first_numbers = set()
    for seed in (0, 1, 2, 2**32 - 1):
        for epoch in (*epochs_of_training, *epochs_of_sweep):
            generator = train.epoch_generator(seed, epoch, "cpu")
            first_numbers.add(torch.randint(2**62, (), generator=generator).item())
    assert len(first_numbers) == 4 * (101 + 180)
    # So no epoch of a seed is one of the next seed, either.
    assert train.SEED_STRIDE > max(train.MAX_EPOCHS, epochs_of_sweep[-1])


def test_images_stay_with_their_labels_and_without_flips_none_is_mirrored():
    split = numbered_split(50)
    run = run_with(split, batch_size=12, padding=0, cutout=0, flips="none")
    expected = normalized_by_torchvision(split.images, split.images)
    for epoch in (1, 2, train.SWEEP_EPOCH):
        images = in_their_order(train.augmented_batches(run, epoch))
        torch.testing.assert_close(images, expected, rtol=0, atol=1e-6)


def test_each_epoch_of_each_seed_has_an_order_of_its_own_and_keeps_it():
    split = numbered_split(50, 16, 16)

    def order(seed, epoch):
        run = run_with(split, seed=seed, batch_size=50)
        _, labels = next(train.augmented_batches(run, epoch))
        return labels.tolist()

    keys = list(itertools.product((0, 1), (1, 2)))
    orders = [order(*key) for key in keys]
    assert orders == [order(*key) for key in keys]
    assert all(a != b for a, b in itertools.combinations(orders, 2))


def mirrored_in_epoch(epoch, flips, seed=0):
    """Return which of 500 images an epoch mirrors: booleans (500,)."""
    left_half_is_white = torch.zeros(500, 3, 32, 32, dtype=torch.uint8)
    left_half_is_white[..., :16] = 255
    split = train.Split(left_half_is_white, torch.arange(500))
    run = run_with(split, seed=seed, batch_size=120, flips=flips)
    images = in_their_order(train.augmented_batches(run, epoch))
    # Crop and cutout leave the white half brighter than the black one.
    left = images[..., :16].sum((1, 2, 3))
    right = images[..., 16:].sum((1, 2, 3))
    return left < right


def test_alternating_flips_mirror_one_half_in_odd_epochs_and_the_other_in_even_epochs():
    first = mirrored_in_epoch(1, "alternating")
    assert 200 < first.sum() < 300
    assert torch.equal(mirrored_in_epoch(2, "alternating"), ~first)
    assert torch.equal(mirrored_in_epoch(3, "alternating"), first)
    assert not torch.equal(mirrored_in_epoch(1, "alternating", seed=1), first)


def test_random_flips_mirror_another_half_in_each_epoch():
    first = mirrored_in_epoch(1, "random")
    second = mirrored_in_epoch(2, "random")
    alternating = mirrored_in_epoch(1, "alternating")  # drawn apart
    for one, other in itertools.combinations([first, second, alternating], 2):
        assert 200 < (one != other).sum() < 300
    for mirrored in (first, second, alternating):
        assert 200 < mirrored.sum() < 300


@pytest.mark.parametrize("precision, dtype", [
    ("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_augment_gets_images_after_the_recipes_augmentation_in_the_runs_precision(
        precision, dtype):
    seen = []

    def look_and_blank(images, generator):
        seen.append(images.clone())
        return torch.zeros_like(images)

    split = numbered_split(10)
    plain = run_with(split, precision=precision, batch_size=4)
    run = run_with(split, precision=precision, batch_size=4, augment=look_and_blank)
    expected = list(train.augmented_batches(plain, 1))
    batches = list(train.augmented_batches(run, 1))
    assert [images.dtype for images in seen] == [dtype] * 3
    labels = [labels for _, labels in batches]
    assert same_batches(zip(seen, labels, strict=True), expected)
    assert not any(images.any() for images, _ in batches)


def draw_and_keep(images, generator):
    """Draw a random number and return the images as they are."""
    torch.rand(1, generator=generator)
    return images


def test_augment_draws_from_the_generator_of_the_crops():
    """So it does not repeat their numbers, and the next batch is cropped differently."""
    split = numbered_split(8)
    plain = list(train.augmented_batches(run_with(split, batch_size=4), 1))
    drawing = run_with(split, batch_size=4, augment=draw_and_keep)
    batches = list(train.augmented_batches(drawing, 1))
    assert same_batches(batches[:1], plain[:1])
    assert not same_batches(batches[1:], plain[1:])


@pytest.mark.parametrize("count, sizes", [
    (32, [16, 16]), (33, [16, 17]), (34, [16, 16, 2]), (17, [17]), (16, [16]), (5, [5])])
def test_an_epoch_shows_each_image_once_and_a_last_image_joins_the_batch_before_it(
        count, sizes):
    run = run_with(numbered_split(count), batch_size=16)
    batches = list(train.augmented_batches(run, 1))
    assert [len(labels) for _, labels in batches] == sizes
    assert all(len(images) == len(labels) for images, labels in batches)
    assert run.steps_per_epoch == len(sizes)
    shown = torch.cat([labels for _, labels in batches])
    assert sorted(shown.tolist()) == list(range(count))


@pytest.mark.parametrize("arguments, trained_on, evaluated_on", [
    ("", range(50), range(100, 110)),
    ("--subset 20", range(20), range(100, 104)),
    ("--holdout 10", range(40), range(40, 50)),
    ("--subset 20 --holdout 5", range(15), range(15, 20))])
def test_subset_and_holdout_select_the_right_images(
        monkeypatch, arguments, trained_on, evaluated_on):
    def numbered(first, last):
        numbers = torch.arange(first, last)
        return train.Split(numbers.view(-1, 1, 1, 1), numbers)

    whole = (numbered(0, 50), numbered(100, 110), CLASSES)
    monkeypatch.setattr(train, "load_cifar10", lambda folder: whole)
    monkeypatch.setattr(train, "SAMPLE", Path("nowhere"))
    _, options = train.parse_arguments(arguments.split())
    training, test, classes = train.load_data(options)
    for split, numbers in ((training, trained_on), (test, evaluated_on)):
        assert split.labels.tolist() == split.images.flatten().tolist() == list(numbers)
    assert classes == CLASSES


# ---- One-cycle and sweep ---------------------------------------------------------------

def state_without_seconds(run):
    state = run.state()
    del state["seconds"]
    return state


def planned_rates(run, steps):
    """Return the learning rates and first betas of a run's first steps."""
    return [train.scheduled_lr_and_beta1(run.recipe, STEP_RATES, step, run.steps_per_epoch)
            for step in range(steps)]


@pytest.mark.parametrize("recipe, steps_per_epoch", [
    (Recipe(), 98), (Recipe(annihilation=20), 98), (Recipe(epochs=3), 7),
    (Recipe(epochs=6, peak_fraction=0.5, beta1=0.9, beta1_peak=0.7), 98),
    *((Recipe(epochs=1), steps) for steps in range(1, 12))])
def test_one_cycle_against_pytorch_at_every_step(recipe, steps_per_epoch):
    total = recipe.epochs * steps_per_epoch
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1e-2, total_steps=total, pct_start=recipe.peak_fraction,
        anneal_strategy="linear", base_momentum=recipe.beta1_peak,
        max_momentum=recipe.beta1, div_factor=500, final_div_factor=recipe.annihilation)
    (group,) = optimizer.param_groups
    rates = train.Rates(2e-5, 1e-2)
    for step in range(total):
        lr, beta1 = train.scheduled_lr_and_beta1(recipe, rates, step, steps_per_epoch)
        assert lr == pytest.approx(group["lr"], rel=1e-9)
        assert beta1 == pytest.approx(group["betas"][0], rel=1e-9)
        optimizer.step()
        if step < total - 1:
            scheduler.step()


# A sweep of nine learning rates. The loss falls from 3 to 1. It is lowest at 1e-4, and stays
# within 3% of its minimum up to 0.1.
SWEPT_RATES = [10.0 ** exponent for exponent in range(-8, 1)]
SWEPT_LOSSES = [3.0, 2.9, 1.02, 1.04, 1.0, 1.02, 1.025, 1.01, 1.6]


def swept_losses_with(changed):
    """Return SWEPT_LOSSES with other values at some positions."""
    return [changed.get(i, loss) for i, loss in enumerate(SWEPT_LOSSES)]


@pytest.mark.parametrize("losses, adam_steps, lr_max", [
    # Twice the last rate before the loss rises by 3%: without Adam, and in a long training.
    (SWEPT_LOSSES, 0, 2 * 0.1),
    (SWEPT_LOSSES, 700, 2 * 0.1),
    # In a short training with Adam, this rate itself.
    (SWEPT_LOSSES, 1, 0.1),
    (SWEPT_LOSSES, 699, 0.1),
    # After the first rise, here at 0.01, the sweep is read no further.
    (swept_losses_with({6: 1.04}), 0, 2 * 1e-3),
    # After a small fall, a tenth of it is the rise: here 0.02, while 3% are 0.03.
    ([1.2, 1.19, 1.0, 1.015, 1.025, 1.1], 0, 2 * 1e-5),
    # At most the last rate.
    (SWEPT_LOSSES[:5], 0, 1e-4)])
def test_the_rates_that_are_read_from_a_sweep(losses, adam_steps, lr_max):
    lr_min, found = train.read_sweep(SWEPT_RATES[:len(losses)], losses, adam_steps)
    assert found == pytest.approx(lr_max)
    assert lr_min == pytest.approx(lr_max / 300)


def muon_and_adam(parameters):
    """Return a Muon for the first parameter, with an Adam for the others."""
    adam = torch.optim.Adam(parameters[1:])
    return train.Muon(parameters[:1], adam, lr_factor=1)


@pytest.mark.parametrize("losses, doubt", [
    (SWEPT_LOSSES, None), ([1.07, 1.0, 1.1], None),
    (SWEPT_LOSSES[:-1], "did not rise, or it became NaN or infinite at once"),
    ([1.05, 1.0, 1.1], "fell by only 4.8%")])
def test_a_note_says_why_a_sweep_is_uncertain_and_what_to_try(losses, doubt):
    note = train.why_uncertain(losses)
    if doubt is None:
        assert note is None
    else:
        assert re.fullmatch(rf"the loss of the sweep {doubt}, .*\. Try a quarter.*", note)


def test_a_sweep_whose_loss_never_falls_is_refused():
    with pytest.raises(train.UserError, match="no learning rate"):
        train.read_sweep(SWEPT_RATES[:3], [1.0, 1.5, 2.0], 0)


def test_smoothing_does_not_lag():
    line = [float(i) for i in range(50)]
    assert train.smooth_losses(line, 16)[16:-16] == pytest.approx(line[16:-16])


def test_smoothing_removes_noise():
    noise = [(-1.0) ** i for i in range(50)]
    assert np.std(train.smooth_losses(noise, 16)[8:-8]) < 0.05


def sweep_of(monkeypatch, steps_per_epoch, loss_at, make_optimizer=None):
    """Sweep with the losses `loss_at(step, lr)` in place of training.

    The run has 24 epochs, and Adam or the optimizer of `make_optimizer(parameters)`.
    Return what was seen of it: its `rates`, and lists of the `lrs` and `beta1s` of its
    steps, of the `epochs` of its batches, and of the `calls` of its `on_step`.
    """
    seen = SimpleNamespace(lrs=[], beta1s=[], epochs=[], calls=[])

    def batches(run, epoch):
        seen.epochs.append(epoch)
        return iter([(None, None)] * steps_per_epoch)

    def step(run, images, labels, lr, beta1):
        loss = loss_at(len(seen.lrs), lr)
        seen.lrs.append(lr)
        seen.beta1s.append(beta1)
        return torch.tensor(loss), None

    monkeypatch.setattr(train, "augmented_batches", batches)
    monkeypatch.setattr(train, "train_step", step)
    monkeypatch.setattr(train.Run, "steps_per_epoch", steps_per_epoch)
    run = small_run(model=linear_network)
    if make_optimizer:
        run.optimizer = make_optimizer([*run.model.parameters()])
    seen.rates = train.find_rates(run, lambda *call: seen.calls.append(call))
    return seen


def usual_loss(step, lr):
    """Fall from 2 to 1.5, and rise at the end, but not so far that the sweep stops."""
    return 1.6 if lr > 0.1 else 2 - 0.5 * min(step / 80, 1)


@pytest.mark.parametrize("steps_per_epoch, steps", [
    (1, 120), (49, 120), (88, 176), (98, 196), (150, 200), (391, 391)])
def test_the_number_of_steps_of_a_sweep(monkeypatch, steps_per_epoch, steps):
    """It is 200, but at least one epoch and at most two, and at least 120."""
    assert len(sweep_of(monkeypatch, steps_per_epoch, usual_loss).lrs) == steps


def test_a_sweep_shows_new_batches_which_no_epoch_of_training_shows(monkeypatch):
    epochs = sweep_of(monkeypatch, 50, usual_loss).epochs
    assert len(epochs) == len(set(epochs)) == 3  # for 120 steps
    assert min(epochs) > 100_000  # the last epoch that a recipe may have


def test_the_rates_of_a_sweep_have_its_record(monkeypatch):
    seen = sweep_of(monkeypatch, 150, usual_loss)
    sweep = seen.rates.sweep
    assert sweep["lr"] == seen.lrs
    losses = [usual_loss(step, lr) for step, lr in enumerate(seen.lrs)]
    assert sweep["loss"] == pytest.approx(losses)
    assert seen.calls == list(zip(range(1, 201), [200] * 200, sweep["lr"], sweep["loss"]))
    assert len(sweep["smoothed_loss"]) == 200
    assert seen.rates.note is None
    assert set(seen.beta1s) == {0.85}  # Adam's first beta at the peak


@pytest.mark.parametrize("make_optimizer, adam_steps", [
    (None, 24), (torch.optim.AdamW, 24), (torch.optim.NAdam, 24), (torch.optim.SGD, 0),
    (muon_and_adam, 0)])
def test_short_trainings_have_a_lower_rate_with_adam_and_its_relatives_alone(
        monkeypatch, make_optimizer, adam_steps):
    rates = sweep_of(monkeypatch, 1, usual_loss, make_optimizer).rates
    sweep = rates.sweep
    expected = train.read_sweep(sweep["lr"], sweep["smoothed_loss"], adam_steps)
    assert (rates.lr_min, rates.lr_max) == expected


def test_a_sweep_goes_on_above_1_until_the_loss_rises(monkeypatch):
    def loss_at(step, lr):
        return 2 / (1 + step / 100) if lr < 20 else 3

    seen = sweep_of(monkeypatch, 150, loss_at)
    assert seen.lrs[:200] == pytest.approx(np.geomspace(1e-6, 1, 200).tolist())
    assert 20 < seen.lrs[-1] < 60
    assert all(step <= steps for step, steps, *_ in seen.calls)


def test_a_sweep_whose_loss_never_rises_ends_at_1000_and_says_so(monkeypatch):
    with pytest.warns(train.UncertainRates, match="did not rise"):
        seen = sweep_of(monkeypatch, 150, lambda step, lr: 2 / (1 + step / 100))
    assert 1000 <= seen.lrs[-1] < 1100
    assert "did not rise" in seen.rates.note


def noisy_quadratic(curvature, seed):
    """Return a loss for `sweep_of`: gradient descent on least squares with noisy targets.

    The largest eigenvalue of the Hessian is `curvature`.
    """
    generator = torch.Generator().manual_seed(seed)
    weight = 3 / math.sqrt(curvature) * torch.randn(8, generator=generator)
    scales = math.sqrt(curvature / 2) * torch.linspace(0.5, 1.0, 8)

    def loss_at(step, lr):
        inputs = torch.randn(256, 8, generator=generator) * scales
        errors = inputs @ weight + 0.5 * torch.randn(256, generator=generator)
        gradient = 2 * inputs.T @ errors / 256  # the Hessian's eigenvalues are 2 scales^2
        weight.sub_(lr * gradient)
        return errors.square().mean().item()

    return loss_at


@pytest.mark.parametrize("curvature", [1.0, 50.0, 2000.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_sweep_finds_the_known_rate_of_a_quadratic(curvature, seed, monkeypatch):
    largest_stable_rate = 2 / curvature  # gradient descent diverges beyond it
    rates = sweep_of(monkeypatch, 200, noisy_quadratic(curvature, seed)).rates
    assert largest_stable_rate / 2 < rates.lr_max < largest_stable_rate * 2
    assert rates.lr_min == pytest.approx(rates.lr_max / 300)


def test_a_sweep_ends_when_the_loss_has_climbed_to_one_and_a_half_times_its_lowest(
        monkeypatch):
    def loss_at(step, lr):
        if step < 40:
            return 2.0
        return 1 + max(0, step - 120) / 40

    # The loss is 1.5 at step 140. Its mean over half a decade, 17 steps, lags by 8.
    steps = len(sweep_of(monkeypatch, 200, loss_at).lrs)
    assert steps == pytest.approx(149, abs=2)


@pytest.mark.parametrize("means, steps_beyond, is_over", [
    ([], -200, False),
    ([2.0, 1.0, 1.6], -50, True),
    ([2.0, 1.0, 1.4], -50, False),  # a small rise counts only from the planned end on
    ([2.0, 1.0, 1.04], 0, True),
    ([2.0, 1.0, 1.02], 0, False),
    ([2.0, 1.0, 1.04], 1, False),  # and then after each further factor of 10
    ([2.0, 1.0, 1.04], 34, True)])
def test_a_sweep_is_over_after_a_clear_rise_or_a_small_one_at_its_end(
        means, steps_beyond, is_over):
    assert train.sweep_is_over(means, steps_beyond, half_decade_steps=17) == is_over


@pytest.mark.filterwarnings("ignore:the loss of the sweep")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sweep_ends_at_a_loss_of_nan_or_infinity_and_leaves_it_out(value, monkeypatch):
    def loss_at(step, lr):
        return value if step == 70 else 1.0 - step / 2000

    sweep = sweep_of(monkeypatch, 200, loss_at).rates.sweep
    assert len(sweep["lr"]) == len(sweep["loss"]) == len(sweep["smoothed_loss"]) == 70


@pytest.mark.parametrize("step_of_nan", [0, 9])
def test_a_loss_of_nan_at_low_rates_is_not_blamed_on_the_rate(step_of_nan, monkeypatch):
    """A sweep of 120 steps has 10 in a half decade."""
    def loss_at(step, lr):
        return math.nan if step == step_of_nan else 1.0

    with pytest.raises(train.Diverged, match=f"nan in step {step_of_nan + 1} of the sweep"):
        sweep_of(monkeypatch, 1, loss_at)


def test_a_loss_below_zero_is_refused_by_the_sweep(monkeypatch):
    with pytest.raises(ValueError, match="never below 0"):
        sweep_of(monkeypatch, 150, lambda step, lr: -1.0)


def run_before_a_sweep(optimizer, steps):
    """Return a Run that has taken so many steps."""
    recipe = Recipe(batch_size=8, optimizer=optimizer)
    run = small_run(recipe, 16, model=DropoutNetwork)
    run.scaler = torch.amp.GradScaler("cpu", growth_interval=1)  # grows with every step
    run.model.train()
    torch.manual_seed(0)  # of the dropout: a few others find no rate at which the loss falls
    for _ in range(steps):
        train.train_step(run, run.test.images[:8], run.test.labels[:8], 1e-5, 0.9)
    return run


def test_a_state_after_rates_of_numpy_can_be_loaded_from_a_file(tmp_path):
    run = small_run(Recipe(epochs=1, batch_size=4), model=linear_network)
    lr_min, lr_max = np.array([1e-3, 1e-2])
    list(train.train_epochs(run, train.Rates(lr_min, lr_max)))
    torch.save(run.state(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["optimizer"]["param_groups"][0]["lr"] == 1e-3


@pytest.mark.filterwarnings("ignore:the loss of the sweep")
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_sweep_leaves_the_run_as_it_was(optimizer, steps):
    run = run_before_a_sweep(optimizer, steps)
    before = run.state()
    random_state = torch.get_rng_state()
    train.find_rates(run)
    assert same_state(run.state(), before)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in run.model.parameters())


def test_a_sweep_that_is_interrupted_leaves_the_run_as_it_was():
    run = run_before_a_sweep("adam", steps=2)
    before = run.state()

    def interrupt(step, *_):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.find_rates(run, interrupt)
    assert same_state(run.state(), before)


# ---- Steps, evaluation, epochs ---------------------------------------------------------

# The code of the runs in results/ gives these losses, in fp32. If they change, the tables no
# longer show what the code does. Rounding differs from one CPU to another; the tolerance is
# five times the largest difference that we saw. (In "plain", rounding matters too much.) Another
# library than MKL may give other signs to the eigenvectors that whiten.
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="needs MKL's eigenvectors")
@pytest.mark.parametrize("name, losses, tolerance", [
    ("tuned", [2.61488, 2.18689, 2.62443], 3e-3),
    ("fast", [2.65025, 2.29398, 2.87548], 5e-4),
    ("best", [2.69978, 2.28861, 2.29816], 5e-4)])
def test_each_recipe_trains_as_in_the_runs_of_the_tables(name, losses, tolerance):
    training, test, _ = train.load_sample()
    # The average is over a whole epoch of two steps. Over a part of it, it would be none.
    recipe = dataclasses.replace(train.RECIPES[name], epochs=2, batch_size=16, ema_epochs=1)
    run = train.start_run(recipe, train.take_images(training, slice(32)),
                          train.take_images(test, slice(16)), seed=3, device="cpu",
                          precision="fp32")
    first, last = train.train_epochs(run, train.Rates(1e-2 / 300, 1e-2))
    found = [first["train_loss"], last["train_loss"], last["test_loss"]]
    assert found == pytest.approx(losses, rel=tolerance)


@pytest.mark.parametrize("decay_epochs, lr_max, steps_per_epoch, steps", [
    (5, 0.04, 98, 490), (5, 0.01, 391, 1955), (8, 0.04, 98, 784),
    (5, 0.04, 4, 100)])  # 5 epochs would be 20 steps, but the time is at least 100
def test_decay_alone_shrinks_a_weight_to_1_over_e_in_its_time(
        decay_epochs, lr_max, steps_per_epoch, steps):
    decay = train.choose_weight_decay(Recipe(decay_epochs=decay_epochs), lr_max, steps_per_epoch)
    assert (1 - lr_max * decay) ** steps == pytest.approx(1 / math.e, rel=0.01)


@pytest.mark.parametrize("recipe, decay", [
    (Recipe(decay_epochs=0), 0), (Recipe(l2=0.1), 0.1)])
def test_weight_decay_is_0_without_a_time_and_is_l2_if_that_is_given(recipe, decay):
    assert train.choose_weight_decay(recipe, 0.04, 98) == decay


def written_out_loss(logits, labels):
    """Return the cross-entropy with label smoothing 0.2."""
    log_p = logits.log_softmax(1)
    return -(0.8 * log_p[range(len(labels)), labels] + 0.2 * log_p.mean(1)).mean()


def written_out_gradients(network, loss_function, images, labels):
    """Set the gradients of a network. Return the loss and the count of correct images."""
    logits = network(images)
    loss = loss_function(logits, labels)
    network.zero_grad()
    loss.backward()
    return loss.detach(), (logits.argmax(1) == labels).sum()


def random_batch():
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.arange(8)


def parameter_groups(parameters, matrix_decay, vector_decay):
    """Return an optimizer's groups: decoupled decay spares biases and BatchNorms."""
    matrices = [values for values in parameters if values.ndim > 1]
    vectors = [values for values in parameters if values.ndim == 1]
    return [{"params": matrices, "weight_decay": matrix_decay},
            {"params": vectors, "weight_decay": vector_decay}]


def squared_error(run, images, labels):
    """Return a loss of one's own: the mean squared distance to one-hot vectors."""
    logits = run.forward(images)
    return F.mse_loss(logits, F.one_hot(labels, 10).float()), logits


def written_out_squared_error(logits, labels):
    return (logits - torch.eye(10)[labels]).square().mean()


@pytest.mark.parametrize("recipe, loss, optimizer_type, epsilon, decay, written_out", [
    (Recipe(beta2=0.98), None, torch.optim.AdamW, 0.01, 30, written_out_loss),
    (Recipe(l2=0.1), None, torch.optim.Adam, 0.01, 0.1, written_out_loss),
    # PyTorch's defaults are epsilon and loss of "plain".
    (train.RECIPES["plain"], None, torch.optim.Adam, 1e-8, 0, F.cross_entropy),
    (Recipe(), squared_error, torch.optim.Adam, 0.01, 0, written_out_squared_error)],
    ids=["tuned", "l2", "plain", "own loss"])
def test_steps_against_pytorch_written_out(recipe, loss, optimizer_type, epsilon, decay,
                                           written_out):
    recipe = dataclasses.replace(recipe, batch_size=8)
    run = small_run(recipe, model=SmallResNet, loss=loss)
    run.optimizer.param_groups[0]["weight_decay"] = decay
    reference = copy.deepcopy(run.model)
    groups = parameter_groups([*reference.parameters()], decay, recipe.l2)
    optimizer = optimizer_type(groups, eps=epsilon)
    images, labels = random_batch()
    for lr, beta1 in ((0.01, 0.9), (0.002, 0.7)):
        expected = written_out_gradients(reference, written_out, images, labels)
        for group in optimizer.param_groups:
            group.update(lr=lr, betas=(beta1, recipe.beta2))
        optimizer.step()
        result = train.train_step(run, images, labels, lr, beta1)
        torch.testing.assert_close(result, expected)
    for ours, theirs in zip(run.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_decay_of_a_run_is_for_its_lr_max_and_spares_vectors():
    run = small_run(Recipe(batch_size=4, epochs=1), 10, model=SmallResNet)
    list(train.train_epochs(run, STEP_RATES))
    matrices, vectors = run.optimizer.param_groups
    assert {values.ndim for values in matrices["params"]} == {2, 4}
    assert {values.ndim for values in vectors["params"]} == {1}
    assert matrices["weight_decay"] == pytest.approx(1 / (100 * 0.01))  # in 100 steps
    assert vectors["weight_decay"] == 0


@pytest.mark.parametrize("device, capabilities, expected", [
    ("cpu", {"avx512_bf16": True}, "bf16"),
    ("cpu", {"avx512_bf16": False, "avx2": True}, "fp32"), ("mps", {}, "fp32")])
def test_precision_follows_the_instructions_of_the_cpu(monkeypatch, device, capabilities,
                                                       expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert train.choose_precision(device) == expected


@pytest.mark.parametrize("is_supported, expected", [(True, "bf16"), (False, "fp32")])
def test_precision_follows_the_instructions_of_the_cpu_in_an_older_pytorch(
        monkeypatch, is_supported, expected):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_supported)
    assert train.choose_precision("cpu") == expected


@pytest.mark.parametrize("device, precision, sentence", [
    ("mps", "fp16", "fp16 does not work on Apple GPUs"),
    ("cpu", "fp64", "precision must be one of auto, fp32, bf16, fp16, got 'fp64'")])
def test_a_precision_that_does_not_work_is_refused(device, precision, sentence):
    with pytest.raises(ValueError, match=sentence):
        train.choose_precision(device, precision)


@pytest.mark.parametrize("is_native, expected", [
    (True, "bf16"), (False, "fp16")])  # a T4 only emulates bf16
def test_precision_follows_the_instructions_of_the_gpu(monkeypatch, is_native, expected):
    def is_bf16_supported(including_emulation=True):
        return is_native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    assert train.choose_precision("cuda") == expected


@pytest.mark.parametrize("available", ["cuda", "mps", "cpu"])
def test_the_device_is_a_gpu_if_there_is_one(monkeypatch, available):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available == "cuda")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: available == "mps")
    assert train.choose_device() == available
    assert train.choose_device("cpu") == "cpu"
    assert train.choose_device(torch.device("cpu")) == "cpu"


def spoil_layout(images, generator):
    """Return the images in a layout that no device has."""
    return images.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("device, layout", [
    ("cpu", torch.channels_last), ("cuda", torch.channels_last),
    ("mps", torch.contiguous_format), ("mps:0", torch.contiguous_format),
    (torch.device("mps"), torch.contiguous_format)])
def test_weights_and_images_have_the_layout_of_their_device(monkeypatch, device, layout):
    assert train.fast_layout(device) == layout
    monkeypatch.setattr(train, "fast_layout", lambda device: {"cpu": layout}[str(device)])
    run = small_run(model=SmallResNet, augment=spoil_layout)
    weights = [values for values in run.model.parameters() if values.ndim == 4]
    assert len(weights) == 3
    batches = [images for images, _ in train.augmented_batches(run, 1)]
    for values in (*weights, run.training.images, run.test.images, *batches):
        assert values.is_contiguous(memory_format=layout)


def test_autocast_is_for_the_device_and_the_precision_of_the_run(monkeypatch):
    run = small_run(precision="bf16", model=linear_network)
    run.device = "cuda"
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **_: arguments)
    assert run.autocast() == ("cuda", torch.bfloat16)


def test_autocast_keeps_no_copies_of_weights():
    run = small_run(precision="bf16", model=linear_network)
    with run.autocast():
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_cache_enabled()


def losses_of_two_steps(precision):
    run = small_run(precision=precision, model=SmallResNet)
    images, labels = run.test
    return [train.train_step(run, images, labels, 1e-2, 0.9)[0].item() for _ in range(2)]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steps_in_low_precision_go_as_in_full(precision):
    losses = losses_of_two_steps("fp32")
    assert losses[1] < losses[0]
    assert losses_of_two_steps(precision) == pytest.approx(losses, rel=0.02)


@pytest.mark.parametrize("precision, dtype", [
    ("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_images_and_layers_are_in_the_precision_and_weights_in_fp32(precision, dtype):
    plain = Recipe(initialization="pytorch")  # "identity" takes longer
    run = small_run(precision=precision, model=lambda: train.ResNet(plain))
    outputs = []
    for module in run.model.modules():
        module.register_forward_hook(lambda *call: outputs.append(call[-1]))
    train.train_step(run, *run.test, 1e-3, 0.9)
    assert run.training.images.dtype == run.test.images.dtype == dtype
    assert len(outputs) > 30
    assert {output.dtype for output in outputs} == {dtype}
    assert all(values.dtype == torch.float32 for values in run.model.parameters())
    logits = train.predict_logits(run, run.test.images, tta=True)
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
@pytest.mark.parametrize("scale, is_skipped", [(2.0 ** 40, True), (1.0, False)])
def test_fp16_skips_a_step_whose_gradients_overflow(optimizer, scale, is_skipped):
    recipe = Recipe(batch_size=8, optimizer=optimizer)
    run = small_run(recipe, precision="fp16", model=SmallResNet)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    train.train_step(run, *run.test, 1e-3, 0.9)  # now the optimizer has a state
    run.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    before = copy.deepcopy([*run.model.parameters()])
    state_before = copy.deepcopy(run.optimizer.state_dict()["state"])
    train.train_step(run, *run.test, 1e-3, 0.9)
    for old, new in zip(before, run.model.parameters(), strict=True):
        assert torch.equal(old, new) == is_skipped
    assert same_state(run.optimizer.state_dict()["state"], state_before) == is_skipped
    assert (run.scaler.get_scale() < scale) == is_skipped


def test_a_hook_before_the_step_sees_the_true_gradients_in_fp16():
    run = small_run(precision="fp16", model=linear_network)
    assert run.scaler.get_scale() > 1000
    reference = copy.deepcopy(run.model)
    written_out_gradients(reference, written_out_loss, run.test.images.float(),
                          run.test.labels)
    seen = []

    def hook(optimizer, *_):
        seen.append(run.model[1].weight.grad.clone())

    run.optimizer.register_step_pre_hook(hook)
    train.train_step(run, *run.test, 1e-3, 0.9)
    torch.testing.assert_close(seen[0], reference[1].weight.grad, rtol=0.01, atol=1e-4)


@pytest.mark.parametrize("group, expected", [
    ({"momentum": 0.5}, {"lr": 0.3, "momentum": 0.9}),  # SGD
    ({"momentum": 0}, {"lr": 0.3, "momentum": 0}),
    ({"betas": (0.5, 0.98)}, {"lr": 0.3, "betas": (0.9, 0.98)}),  # Adam
    ({"betas": (0.5, 0.92, 0.99)}, {"lr": 0.3, "betas": (0.9, 0.92, 0.99)}),
    ({"lr_factor": 64}, {"lr": 64 * 0.3, "lr_factor": 64}),
    ({"weight_decay": 0.05}, {"lr": 0.3, "weight_decay": 0.05})])
def test_the_schedule_sets_the_rate_and_the_momentum_of_a_group(group, expected):
    optimizer = SimpleNamespace(param_groups=[{"lr": 1, **group}])
    train.set_lr_and_beta1(optimizer, 0.3, 0.9)
    assert optimizer.param_groups == [expected]


def test_an_sgd_of_your_own_follows_the_schedule_and_keeps_its_decay():
    run = small_run(Recipe(epochs=1, batch_size=4), model=linear_network)
    run.optimizer = torch.optim.SGD(
        run.model.parameters(), lr=1, momentum=0.5, weight_decay=5e-4)
    seen = []

    def hook(optimizer, *_):
        (group,) = optimizer.param_groups
        seen.append((group["lr"], group["momentum"]))
        assert group["weight_decay"] == 5e-4

    run.optimizer.register_step_pre_hook(hook)
    list(train.train_epochs(run, STEP_RATES))
    assert seen == planned_rates(run, 2)


def begin_to_train(run):
    next(train.train_epochs(run, STEP_RATES))


def exchange_a_layer(run):
    run.model[1] = nn.Linear(3072, 10)


def freeze_all(run):
    run.model.requires_grad_(False)


def add_a_parameter_to_the_optimizer(run):
    run.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("start", [train.find_rates, begin_to_train])
@pytest.mark.parametrize("spoil, reason", [
    (exchange_a_layer, "the optimizer does not hold all parameters of the model"),
    (freeze_all, "all parameters are frozen"),
    (add_a_parameter_to_the_optimizer, "the optimizer holds parameters that are not in the model")])
def test_an_optimizer_with_other_parameters_than_the_model_is_refused(start, spoil, reason):
    run = small_run(model=linear_network)
    spoil(run)
    with pytest.raises(ValueError, match=reason):
        start(run)


class TwoOutputs(nn.Sequential):
    def forward(self, x):
        return super().forward(x), None


@pytest.mark.parametrize("network, reason", [
    (TwoOutputs(linear_network()), r"the logits \(B, classes\) alone, got a tuple"),
    (linear_network(classes=9), r"10 logits .* num_classes is 10, got \(8, 9\)"),
    (nn.Flatten(0), r"10 logits .* num_classes is 10, got \(24576,\)")])
def test_a_network_whose_logits_do_not_fit_the_classes_is_refused(network, reason):
    run = small_run(model=linear_network)
    run.model = run.averaged = network
    message = f"the network must return {reason}"
    with pytest.raises(ValueError, match=message):
        run.forward(run.test.images)
    with pytest.raises(ValueError, match=message):
        train.evaluate_run(run)


@pytest.mark.parametrize("library", [
    raiser(OSError("there is no libc.so.6")), lambda name: SimpleNamespace()])
def test_a_system_without_glibc_is_left_as_it_is(monkeypatch, library):
    monkeypatch.setattr(train.ctypes, "CDLL", library)
    train.keep_freed_memory()


def test_a_training_lets_glibc_keep_the_memory_of_a_step(monkeypatch):
    options = []
    glibc = SimpleNamespace(mallopt=lambda *option: options.append(option))
    monkeypatch.setattr(train.ctypes, "CDLL", lambda name: glibc)
    list(train.train_epochs(small_run(Recipe(epochs=1), model=linear_network), STEP_RATES))
    assert options == [(-1, -1), (-4, 0)]


def test_an_optimizer_needs_no_frozen_parameters():
    run = small_run(Recipe(epochs=1), model=SmallResNet)
    frozen, *others = run.model.parameters()
    frozen.requires_grad_(False)
    before = frozen.clone()
    run.optimizer = torch.optim.Adam(others)
    assert len(list(train.train_epochs(run, STEP_RATES))) == 1
    assert torch.equal(frozen, before)


def test_plain_tuples_serve_as_splits():
    images, labels = random_split(8)
    run = train.start_run(Recipe(epochs=1), (images, labels), (images, labels), device="cpu",
                          model=SmallResNet)
    rows = list(train.train_epochs(run, STEP_RATES))
    assert len(rows) == 1


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_run_with_a_sweep_learns_to_tell_easy_images_apart(workplace, optimizer):
    training, test, _ = train.load_cifar10("data")
    recipe = Recipe(epochs=8, batch_size=20, optimizer=optimizer)
    run = train.start_run(recipe, training, test, device="cpu", precision="fp32",
                          model=SmallResNet)
    *_, last = train.train_epochs(run, train.find_rates(run))
    assert last["test_accuracy"] >= 0.8  # chance is 0.1


@pytest.mark.filterwarnings("ignore:the loss of the sweep")
@pytest.mark.parametrize("l2", [0, 0.1])
def test_a_sweep_after_a_training_is_in_training_mode_with_l2_but_no_weight_decay(l2):
    run = small_run(Recipe(epochs=1, l2=l2), model=SmallResNet)
    list(train.train_epochs(run, STEP_RATES))
    run.model.eval()
    group = run.optimizer.param_groups[0]
    decay = group["weight_decay"]
    seen = []
    train.find_rates(
        run, lambda *_: seen.append((group["weight_decay"], run.model.training)))
    assert decay > 0
    assert set(seen) == {(l2, True)}
    assert run.optimizer.param_groups[0]["weight_decay"] == decay


def recorded_steps(monkeypatch, losses, correct):
    """Let steps have these losses and numbers of correct images; they train nothing.

    Return the list of the steps that are taken: the images' count, the rates, and whether
    the model was in training mode.
    """
    steps = []

    def step(run, images, labels, lr, beta1):
        number = len(steps)
        steps.append(SimpleNamespace(count=len(labels), rates=(lr, beta1),
                                     is_training=run.model.training))
        return torch.tensor(losses[number]), torch.tensor(correct[number])

    monkeypatch.setattr(train, "train_step", step)
    return steps


def two_epochs_of_three_steps():
    """Return a Run of 10 images, so the last batch of an epoch has two of them."""
    run = small_run(Recipe(batch_size=4, epochs=2), 10, model=linear_network)
    run.model.eval()
    return run


def test_an_epoch_takes_each_step_at_its_rates_in_training_mode_and_calls_on_step(monkeypatch):
    steps = recorded_steps(monkeypatch, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [0] * 6)
    run = two_epochs_of_three_steps()
    rows = []
    calls = []
    for row in train.train_epochs(run, STEP_RATES, lambda *call: calls.append(call)):
        rows.append(row)
        run.model.eval()  # the caller may look at the weights without the average
    planned = planned_rates(run, 6)
    assert [step.rates for step in steps] == planned
    assert [step.count for step in steps] == [4, 4, 2] * 2
    assert all(step.is_training for step in steps)
    assert [row["lr"] for row in rows] == [planned[2][0], planned[5][0]]
    lrs = [lr for lr, _ in planned]
    assert calls == list(zip([1, 2, 3] * 2, [3] * 6, lrs, range(1, 7)))


def test_the_metrics_of_an_epoch_weigh_every_image_alike(monkeypatch):
    recorded_steps(monkeypatch, losses=[1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
                   correct=[4, 3, 2, 0, 0, 1])
    rows = list(train.train_epochs(two_epochs_of_three_steps(), STEP_RATES))
    assert [row["train_loss"] for row in rows] == pytest.approx(
        [(4 * 1 + 4 * 2 + 2 * 3) / 10, (4 * 4 + 4 * 5 + 2 * 6) / 10])
    assert [row["train_accuracy"] for row in rows] == [0.9, 0.1]


def test_the_clock_stands_still_in_evaluations_and_in_what_the_caller_does(monkeypatch):
    clock = SimpleNamespace(now=0)
    clock.perf_counter = lambda: clock.now

    def step(*arguments):
        clock.now += 1
        return torch.tensor(1.0), torch.tensor(0)

    def evaluate(run):
        clock.now += 100
        return {"test_loss": 1.0, "test_accuracy": 0.5}

    run = two_epochs_of_three_steps()
    run.seconds = 10  # of preparation
    for name, value in (("time", clock), ("train_step", step), ("evaluate_run", evaluate)):
        monkeypatch.setattr(train, name, value)
    rows = []
    for row in train.train_epochs(run, STEP_RATES):
        clock.now += 1000
        rows.append(row)
    assert [row["train_seconds"] for row in rows] == [3, 3]
    assert [row["elapsed_seconds"] for row in rows] == [13, 16]


@pytest.mark.parametrize("test_loss", [math.nan, math.inf])
def test_a_test_loss_of_nan_or_infinity_ends_the_training_for_good(monkeypatch, test_loss):
    monkeypatch.setattr(train, "evaluate_run", lambda run: {"test_loss": test_loss})
    run = two_epochs_of_three_steps()
    with pytest.raises(train.Diverged, match="became NaN or infinite in epoch 1"):
        next(train.train_epochs(run, STEP_RATES))
    assert run.epoch == 0
    with pytest.raises(ValueError, match="was begun and did not end"):
        next(train.train_epochs(run, STEP_RATES))


@pytest.mark.parametrize("rates", [(0.2, 0.1), (0.0, 0.1), (-0.1, 0.1), (math.nan, 0.1)])
def test_rates_without_sense_are_refused(rates):
    with pytest.raises(ValueError, match="LRMIN .* must be above 0"):
        train.Rates(*rates)


def test_a_finished_run_warns_that_there_is_nothing_to_train():
    run = small_run(Recipe(epochs=1), model=linear_network)
    list(train.train_epochs(run, STEP_RATES))
    before = state_without_seconds(run)
    with pytest.warns(UserWarning, match="nothing to train: the run has its 1 epochs"):
        assert list(train.train_epochs(run, STEP_RATES)) == []
    assert same_state(state_without_seconds(run), before)


@pytest.mark.parametrize("tta", [False, True])
def test_evaluation_against_pytorch_written_out(tta):
    run = small_run(model=linear_network)
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(4100, 3, 32, 32, generator=generator)  # three batches
    run.test = train.Split(images, torch.arange(4100) % 10)
    run.averaged = nn.Sequential(
        nn.BatchNorm2d(3), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 10))
    run.averaged(images * 2 + 1)  # gives the running statistics a value of their own
    reference = copy.deepcopy(run.averaged).eval()
    with torch.no_grad():
        logits = reference(images)
        if tta:
            logits = (logits + reference(TF.hflip(images))) / 2
    torch.testing.assert_close(train.predict_logits(run, run.test.images, tta), logits)
    labels = run.test.labels
    result = train.evaluate_run(run, tta)
    assert result["test_loss"] == pytest.approx(written_out_loss(logits, labels).item())
    assert result["test_accuracy"] == (logits.argmax(1) == labels).sum().item() / 4100


def test_predictions_serve_as_targets_of_another_network():
    run = small_run(model=linear_network)
    targets = train.predict_logits(run, run.test.images)
    F.mse_loss(run.forward(run.test.images), targets).backward()  # needs to save the targets
    assert not targets.requires_grad


@pytest.mark.parametrize("height, sizes", [(32, [5, 3]), (80, [2, 2, 2, 2]), (400, [1] * 8)])
def test_larger_images_are_evaluated_in_smaller_batches(monkeypatch, height, sizes):
    monkeypatch.setattr(train, "EVALUATED_PIXELS", 5 * 32 * 32)
    run = run_with(random_split(8, height, 32))
    seen = []
    run.averaged.register_forward_pre_hook(lambda module, inputs: seen.append(len(*inputs)))
    assert train.predict_logits(run, run.test.images).shape == (8, 10)
    assert seen == sizes


def test_prediction_refuses_the_padded_images_of_training():
    run = small_run(model=linear_network)
    with pytest.raises(ValueError, match=re.escape(
            "images must be (3, 32, 32), as the test images are, got (3, 40, 40)")):
        train.predict_logits(run, run.training.images)


@pytest.mark.parametrize("ema_epochs, memory", [(2, 6), (0.5, 1.5), (0, 1)])
def test_the_averaged_weights_against_a_sum_over_all_steps(ema_epochs, memory):
    recipe = Recipe(batch_size=4, epochs=4, ema_epochs=ema_epochs)
    run = small_run(recipe, 10, model=SmallResNet)  # 3 steps in each epoch
    steps = []

    def keep_weights(*_):
        steps.append(copy.deepcopy(run.model.state_dict()))

    run.optimizer.register_step_post_hook(keep_weights)
    list(train.train_epochs(run, STEP_RATES))
    assert len(steps) == 12
    shares = [1.0]  # of each step's weights in the average: equal at first, then fading
    for step in range(2, 13):
        newest = 1 / min(step, memory)
        shares = [share * (1 - newest) for share in shares]
        shares.append(newest)
    for name, values in run.averaged.state_dict().items():
        if values.is_floating_point():
            expected = sum(share * step[name] for share, step in zip(shares, steps))
            torch.testing.assert_close(values, expected)


def test_weights_that_two_layers_share_are_averaged_once():
    shared = nn.Linear(10, 10)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10), shared, shared)
    run = small_run(Recipe(batch_size=8, ema_epochs=10), model=network)
    with torch.no_grad():
        run.averaged[2].weight.fill_(0)
        run.model[2].weight.fill_(1)
    train.update_average(run, step=4)  # the fourth step is a quarter of the mean
    assert run.averaged[3].weight.flatten().tolist() == pytest.approx([0.25] * 100)


class BufferNetwork(nn.Module):
    """A network with buffers of several kinds: a mask, a flag, a count of calls."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 32 * 32, 10)
        self.register_buffer("mask", torch.full((1,), -torch.inf))
        self.register_buffer("seen", torch.tensor(False))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen.fill_(True)
            self.calls += 1
        return self.linear(x.flatten(1)) + torch.exp(self.mask)


def test_buffers_that_are_no_running_statistics_are_copied_after_each_epoch():
    recipe = Recipe(epochs=2, batch_size=4)
    run = small_run(recipe, model=BufferNetwork)  # two steps in an epoch
    for _ in train.train_epochs(run, STEP_RATES):
        assert run.averaged.mask.item() == -math.inf
        assert run.averaged.seen.item()
        assert run.averaged.calls.item() == 2 * run.epoch


def test_a_buffer_that_is_made_in_training_does_not_end_it():
    class CachingNetwork(nn.Sequential):
        def forward(self, images):
            self.register_buffer("cache", torch.ones(1), persistent=False)
            return super().forward(images)

    run = small_run(Recipe(epochs=1, batch_size=4),
                    model=CachingNetwork(nn.Flatten(), nn.Linear(3 * 32 * 32, 10)))
    assert len(list(train.train_epochs(run, STEP_RATES))) == 1


def test_the_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    small_run()
    run = small_run(Recipe(epochs=1), model=linear_network)
    list(train.train_epochs(run, STEP_RATES))
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_the_default_device_of_the_caller_makes_no_difference(optimizer):
    recipe = Recipe(epochs=1, batch_size=4, optimizer=optimizer)
    reference = small_run(recipe, model=SmallResNet)
    list(train.train_epochs(reference, STEP_RATES))
    data = random_split(8)
    with torch.device("meta"):  # where tensors without a device would be made
        run = train.start_run(recipe, data, data, device="cpu", precision="fp32",
                              model=SmallResNet)
        list(train.train_epochs(run, STEP_RATES))
        assert same_state(state_without_seconds(run), state_without_seconds(reference))


@pytest.mark.parametrize("go_on", [train.find_rates, begin_to_train, train.Run.state])
def test_an_interrupted_epoch_is_not_continued_and_has_no_state(go_on):
    run = small_run(Recipe(epochs=2, batch_size=4), model=linear_network)
    with pytest.raises(KeyboardInterrupt):
        list(train.train_epochs(run, STEP_RATES, raiser(KeyboardInterrupt)))
    with pytest.raises(ValueError, match="was begun and did not end"):
        go_on(run)


def test_after_an_interrupted_step_in_fp16_an_earlier_state_is_continued():
    run = small_run(Recipe(epochs=2, batch_size=4), precision="fp16", model=SmallResNet)
    before = run.state()
    hook = run.optimizer.register_step_pre_hook(raiser(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        list(train.train_epochs(run, STEP_RATES))
    hook.remove()
    run.load_state(before)
    assert [row["epoch"] for row in train.train_epochs(run, STEP_RATES)] == [1, 2]


def test_a_state_is_a_copy_that_may_be_loaded_more_than_once():
    run = small_run(Recipe(epochs=3, batch_size=4), model=SmallResNet)
    epochs = train.train_epochs(run, STEP_RATES)
    next(epochs)
    best = run.state()
    as_it_was = copy.deepcopy(best)
    next(epochs)
    assert same_state(best, as_it_was)
    for _ in range(2):
        run.load_state(best)
        assert same_state(run.state(), as_it_was)
        list(train.train_epochs(run, STEP_RATES))
        assert not same_state(run.state(), as_it_was)
        assert same_state(best, as_it_was)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_training_continues_bit_for_bit_in_the_same_run_and_in_a_new_one(optimizer):
    recipe = Recipe(epochs=3, batch_size=4, optimizer=optimizer)
    undisturbed, left, resumed = [small_run(recipe, model=DropoutNetwork) for _ in range(3)]
    torch.manual_seed(5)  # for dropout
    list(train.train_epochs(undisturbed, STEP_RATES))
    torch.manual_seed(5)
    next(train.train_epochs(left, STEP_RATES))
    state = left.state()
    list(train.train_epochs(left, STEP_RATES))
    torch.rand(100)  # other code draws, too
    resumed.load_state(state)
    list(train.train_epochs(resumed, STEP_RATES))
    for run in (left, resumed):
        assert same_state(state_without_seconds(run), state_without_seconds(undisturbed))


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_copy_of_a_run_trains_as_the_run_does(optimizer):
    run = small_run(Recipe(epochs=1, batch_size=4, optimizer=optimizer), model=SmallResNet)
    runs = [run, copy.deepcopy(run)]
    for same_run in runs:
        list(train.train_epochs(same_run, STEP_RATES))
    assert same_state(*(state_without_seconds(same_run) for same_run in runs))


@pytest.mark.parametrize("changed, difference", [
    ({"recipe": Recipe(batch_size=8, cutout=3)}, "cutout 8, not 3"),
    ({"seed": 1}, "seed 0, not 1"), ({"precision": "fp16"}, "precision fp32, not fp16"),
    ({"training": random_split(10)}, "training_images 8, not 10")])
def test_the_state_of_a_run_with_other_settings_is_refused(changed, difference):
    settings = {"recipe": Recipe(batch_size=8), "training": random_split(8),
                "test": random_split(8), "device": "cpu", "precision": "fp32",
                "model": linear_network}
    state = train.start_run(**settings).state()
    other = train.start_run(**{**settings, **changed})
    before = other.state()
    with pytest.raises(ValueError, match=f"^it is of another run: {difference}$"):
        other.load_state(state)
    assert same_state(other.state(), before)


def test_a_run_that_could_not_load_a_state_goes_on_only_after_it_has_loaded_another():
    run = small_run(model=linear_network)
    before = run.state()
    other = small_run(model=lambda: nn.Sequential(nn.Identity(), *linear_network()))
    with pytest.raises(RuntimeError, match="state_dict"):
        run.load_state(other.state())
    with pytest.raises(ValueError, match="a state could not be loaded"):
        next(train.train_epochs(run, STEP_RATES))
    run.load_state(before)
    assert same_state(run.state(), before)


def test_a_state_whose_random_numbers_are_on_a_gpu_can_be_loaded():
    run = small_run(model=linear_network)
    state = run.state()
    on_cpu = state["random"]
    state["random"] = SimpleNamespace(cpu=lambda: on_cpu)
    torch.rand(1)
    run.load_state(state)
    assert torch.equal(torch.get_rng_state(), on_cpu)


def test_a_state_that_is_loaded_between_epochs_does_not_bring_its_weight_decay():
    run = small_run(Recipe(epochs=3, batch_size=4), model=linear_network)
    start = run.state()  # before a training has set the decay
    decays = []

    def note_decay(*_):
        decays.append(run.optimizer.param_groups[0]["weight_decay"])

    for _ in train.train_epochs(run, STEP_RATES, note_decay):
        if len(decays) == 2:  # after the first epoch
            run.load_state(start)
    assert decays == [train.choose_weight_decay(run.recipe, STEP_RATES.lr_max, 2)] * 8
    assert decays[0] > 0


def test_the_learning_rate_may_be_constant():
    run = small_run(Recipe(epochs=1, batch_size=4), model=linear_network)
    lrs = []
    list(train.train_epochs(run, train.Rates(0.01, 0.01), lambda *step: lrs.append(step[2])))
    assert lrs == pytest.approx([0.01, 0.01])


def test_a_schedule_of_your_own_sets_the_rate_and_the_first_beta_of_each_step():
    def schedule(recipe, rates, step, steps_per_epoch):
        assert (recipe, rates, steps_per_epoch) == (run.recipe, STEP_RATES, 3)
        return 0.01 * (step + 1), 0.5

    run = two_epochs_of_three_steps()
    rows = list(train.train_epochs(run, STEP_RATES, schedule=schedule))
    assert [row["lr"] for row in rows] == pytest.approx([0.03, 0.06])
    for group in run.optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.06)
        assert group["betas"][0] == 0.5


def test_inside_a_sweep_or_an_epoch_there_is_no_state():
    run = small_run(Recipe(epochs=1, batch_size=4), model=linear_network)
    with pytest.raises(ValueError, match="^an epoch or a sweep of this run was begun"):
        train.find_rates(run, lambda *_: run.state())
    with pytest.raises(ValueError, match="^an epoch or a sweep of this run was begun"):
        next(train.train_epochs(run, STEP_RATES, lambda *_: run.state()))


def test_a_loss_of_your_own_gets_the_run_and_each_augmented_batch():
    calls = []

    def loss(run, images, labels):
        calls.append((run, images, labels))
        return squared_error(run, images, labels)

    run = small_run(Recipe(batch_size=4, epochs=1), 10, loss=loss, model=linear_network)
    list(train.train_epochs(run, STEP_RATES))
    assert len(calls) == 3
    assert all(caller is run for caller, *_ in calls)
    assert same_batches([batch for _, *batch in calls], train.augmented_batches(run, 1))


@pytest.mark.parametrize("shift, accuracy", [(0, 1), (1, 0)])
def test_accuracy_is_that_of_the_logits_which_a_loss_returns(shift, accuracy):
    def loss(run, images, labels):
        value, _ = squared_error(run, images, labels)
        return value, F.one_hot((labels + shift) % 10, 10).float()

    run = small_run(Recipe(batch_size=4, epochs=1), 10, loss=loss, model=linear_network)
    (row,) = train.train_epochs(run, STEP_RATES)
    assert row["train_accuracy"] == accuracy


def test_a_model_function_makes_another_network_for_each_seed():
    split = random_split(8)
    weights = {}
    for seed in np.arange(2):
        run = train.start_run(Recipe(), split, split, seed=seed, device="cpu",
                              model=linear_network)
        torch.manual_seed(seed)
        expected = nn.Linear(3072, 10)  # as PyTorch makes it under that seed
        weights[seed] = run.model[1].weight
        assert torch.equal(weights[seed], expected.weight)
    assert not torch.equal(weights[0], weights[1])


# ---- Muon ------------------------------------------------------------------------------

def written_out_orthogonalize(matrix):
    """Return what three Newton-Schulz steps make of a matrix, by NumPy's SVD."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(matrix)
    for _ in range(3):
        values = 3.4445 * values - 4.7750 * values ** 3 + 2.0315 * values ** 5
    return (left * values) @ right


def random_matrix(rows, columns):
    return np.random.default_rng(4).normal(size=(rows, columns))


@pytest.mark.parametrize("rows, columns", [(5, 12), (12, 5), (7, 7), (1, 9), (64, 576)])
def test_orthogonalize_against_the_singular_values(rows, columns):
    matrix = random_matrix(rows, columns)
    result = train.orthogonalize(torch.from_numpy(matrix), torch.float64)
    assert result.shape == (rows, columns)
    np.testing.assert_allclose(result, written_out_orthogonalize(matrix), atol=1e-6)


def test_singular_values_above_a_fiftieth_of_the_norm_come_near_1():
    for value in np.linspace(0.02, 0.9998, 50):
        matrix = torch.diag(torch.tensor([value, math.sqrt(1 - value ** 2)]))  # of norm 1
        result = train.orthogonalize(matrix, torch.float64).diagonal()
        assert result.min() > 0.65
        assert result.max() < 1.3


def test_orthogonalize_leaves_a_matrix_of_zeros():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert not train.orthogonalize(torch.zeros(4, 9), dtype).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_orthogonalize_with_products_in_low_precision_comes_close(dtype):
    matrix = random_matrix(16, 72)
    expected = torch.from_numpy(written_out_orthogonalize(matrix))
    result = train.orthogonalize(torch.from_numpy(matrix).float(), dtype)
    assert result.dtype == dtype
    assert (result - expected).norm() < 0.03 * expected.norm()


class WrittenOutMuon:
    """Muon with momentum 0.6, in NumPy, for the weight of one convolution."""

    def __init__(self, weight):
        self.weight = weight
        self.momentum = np.zeros(weight.shape)

    def step(self, gradient, lr):
        self.momentum = 0.6 * self.momentum + gradient
        direction = gradient + 0.6 * self.momentum
        update = written_out_orthogonalize(direction.reshape(len(direction), -1))
        norm = np.linalg.norm(self.weight)
        scaled = self.weight * math.sqrt(len(self.weight)) / norm
        self.weight = scaled - lr * update.reshape(scaled.shape)


def muon_run(precision="fp32", **changes):
    recipe = Recipe(optimizer="muon", batch_size=8, **changes)
    return small_run(recipe, precision=precision, model=SmallResNet)


def test_steps_with_muon_against_muon_in_numpy_and_adam_of_pytorch():
    run = muon_run(muon_lr_factor=2)
    matrix_group = run.optimizer.param_groups[1]
    matrix_group["weight_decay"] = 30
    reference = copy.deepcopy(run.model)
    convolutions = [reference[block][0] for block in range(3)]
    muons = [WrittenOutMuon(layer.weight.detach().double().numpy())
             for layer in convolutions]
    rest = [*reference[0][2].parameters(), *reference[1][2].parameters(),
            *reference[2][2].parameters(), *reference[4].parameters()]
    adam = torch.optim.AdamW(parameter_groups(rest, 30, 0), eps=0.01)
    images, labels = random_batch()
    for lr, beta1 in ((0.01, 0.9), (0.002, 0.7)):
        expected = written_out_gradients(reference, written_out_loss, images, labels)
        for group in adam.param_groups:
            group.update(lr=lr, betas=(beta1, 0.999))
        adam.step()
        for layer, muon in zip(convolutions, muons):
            muon.step(layer.weight.grad.double().numpy(), lr * 2)
            layer.weight.data = torch.from_numpy(muon.weight).float()
        result = train.train_step(run, images, labels, lr, beta1)
        torch.testing.assert_close(result, expected)
    for ours, theirs in zip(run.model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for block, muon in enumerate(muons):  # its momentum did not follow beta1
        state = run.optimizer.state[run.model[block][0].weight]
        np.testing.assert_allclose(state["momentum"], muon.momentum, rtol=1e-3, atol=1e-6)


@pytest.mark.filterwarnings("ignore:only")
def test_muon_leaves_a_frozen_convolution_as_it_is():
    run = muon_run(epochs=1)
    frozen = run.model[1][0].weight.requires_grad_(False)
    before = frozen.clone()
    other_before = run.model[2][0].weight.clone()
    list(train.train_epochs(run, STEP_RATES))
    assert torch.equal(frozen, before)
    assert not torch.equal(run.model[2][0].weight, other_before)


def test_muon_moves_a_convolution_that_begins_at_zero():
    weight = torch.zeros(4, 3, 3, 3)
    train.muon_step(weight, torch.randn(4, 3, 3, 3), torch.zeros_like(weight), lr=0.1)
    assert weight.isfinite().all()
    assert weight.any()


def test_muon_takes_only_convolutions():
    class PositionNetwork(SmallResNet):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.zeros(1, 3, 32, 32))  # has four dimensions
            self.temperature = nn.Parameter(torch.tensor(1.0))  # has none

        def forward(self, x):
            return super().forward(x + self.position) * self.temperature

    run = small_run(Recipe(optimizer="muon", batch_size=8), model=PositionNetwork)
    convolutions, matrices, vectors = run.optimizer.param_groups
    assert [id(values) for values in convolutions["params"]] == [
        id(run.model[block][0].weight) for block in range(3)]
    assert any(values is run.model.position for values in matrices["params"])
    assert any(values is run.model.temperature for values in vectors["params"])


def test_adam_can_take_the_first_convolution_in_place_of_muon():
    run = muon_run(first_convolution="adam")
    of_muon, matrices, _ = run.optimizer.param_groups
    assert [id(values) for values in of_muon["params"]] == [
        id(run.model[block][0].weight) for block in (1, 2)]
    assert matrices["params"][0] is run.model[0][0].weight


def one_convolution():
    return nn.Sequential(nn.Conv2d(3, 10, 32), nn.Flatten())


@pytest.mark.parametrize("model, first_convolution", [
    (linear_network, "muon"), (one_convolution, "adam")])
def test_muon_refuses_a_network_that_has_no_convolution_for_it(model, first_convolution):
    recipe = Recipe(optimizer="muon", first_convolution=first_convolution, batch_size=8)
    with pytest.raises(ValueError, match="no convolution for the optimizer muon"):
        small_run(recipe, model=model)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_muons_products_are_in_the_precision_of_the_run(monkeypatch, precision):
    run = muon_run(precision=precision)
    dtypes = []
    orthogonalize = train.orthogonalize

    def record(matrix, dtype):
        dtypes.append(dtype)
        return orthogonalize(matrix, dtype)

    monkeypatch.setattr(train, "orthogonalize", record)
    train.train_step(run, *run.test, 1e-3, 0.9)
    assert dtypes == [run.dtype] * 3  # of three convolutions
    assert all(values.dtype == torch.float32 for values in run.model.parameters())


# ---- The GPU's side without a GPU: meta tensors, which have no values, and faked graphs --

def meta_run(optimizer):
    """Return a Run on a device that is not there, as `start_run` would lay it out."""
    recipe = Recipe(batch_size=8, optimizer=optimizer)
    with torch.device("meta"):
        model = train.ResNet(Recipe(initialization="pytorch"))  # "identity" takes seconds
    split = train.Split(torch.zeros(20, 3, 32, 32, dtype=torch.uint8),
                        torch.zeros(20, dtype=torch.long))
    ones = torch.ones(3)
    training = train.prepare_images(split, ones, ones, "meta", torch.float32, 4, "reflect")
    test = train.prepare_images(split, ones, ones, "meta", torch.float32)
    return train.Run(recipe, 0, "meta", "fp32", num_classes=10, mean=None, std=None,
                     training=training, test=test, model=model, averaged=model,
                     optimizer=train.make_optimizer(recipe, model, torch.float32),
                     scaler=torch.amp.GradScaler("meta", enabled=False),
                     loss=train.cross_entropy)


class OnlyMeta(TorchDispatchMode):
    """Fail at an operation that makes a tensor on another device."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                assert value.device.type == "meta", function
        return result


@pytest.mark.parametrize("flips", ["alternating", "random", "none"])
def test_batches_and_predictions_are_made_on_the_device_alone(monkeypatch, flips):
    monkeypatch.setattr(train, "epoch_generator", lambda *_: None)
    run = meta_run("adam")
    run.recipe = dataclasses.replace(run.recipe, flips=flips)
    with OnlyMeta():
        batches = list(train.augmented_batches(run, 1))
        logits = train.predict_logits(run, run.test.images, tta=True)
    assert [images.shape for images, _ in batches] == [
        (8, 3, 32, 32), (8, 3, 32, 32), (4, 3, 32, 32)]
    assert logits.shape == (20, 10)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_no_step_of_an_epoch_waits_for_the_gpu(monkeypatch, optimizer):
    adam = torch.optim.Adam
    taken = []

    def adam_of_several_kernels(*arguments, **keywords):
        assert keywords["fused"]  # but the fused one knows no meta
        keywords["fused"] = False
        return adam(*arguments, **keywords)

    monkeypatch.setattr(torch.optim, "Adam", adam_of_several_kernels)
    monkeypatch.setattr(train, "epoch_generator", lambda *_: None)
    run = meta_run(optimizer)
    # Reading a value of a meta tensor raises. The values of all steps are read together.
    with pytest.raises(NotImplementedError, match="meta"):
        next(train.train_epochs(run, STEP_RATES, lambda step, *_: taken.append(step)))
    assert taken == [1, 2, 3]
    values = [*run.training, *run.test, *(values.grad for values in run.model.parameters())]
    assert all(tensor.device.type == "meta" for tensor in values)


class FakeGraphs:
    """Stands in for CUDA graphs on the CPU. `replayed` has the sizes of their batches."""

    def __init__(self):
        self.replayed = []
        self.searched_for_fast_kernels = False

    def make_graphed_callables(self, module, arguments):
        """Do as PyTorch's: run some steps, and replace the module's `forward`."""
        self.searched_for_fast_kernels = torch.backends.cudnn.benchmark
        module(*arguments)
        forward = module.forward

        def replay(images):
            self.replayed.append(len(images))
            return forward(images)

        module.forward = replay
        return module


@pytest.fixture
def graphs(monkeypatch):
    """Fake CUDA graphs on the CPU. SmallResNet stands in for the ResNet."""
    graphs = FakeGraphs()
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphs.make_graphed_callables)
    monkeypatch.setattr(train, "ResNet", SmallResNet)
    return graphs


def run_on_a_faked_gpu(device="cuda", **options):
    """Return a Run of two epochs, each with two full batches and one of two images.

    All images are of one class, so the loss falls in the sweep.
    """
    recipe = Recipe(batch_size=4, epochs=2)
    run = small_run(recipe, 10, "bf16", model=SmallResNet, **options)
    run.training.labels.zero_()
    run.device = device
    run.autocast = lambda: torch.autocast("cpu", torch.bfloat16)
    return run


def test_all_ends_with_the_graph_as_without_it(graphs):
    ends = []
    for device in ("cpu", "cuda"):
        run = run_on_a_faked_gpu(device)
        rates = train.find_rates(run)
        list(train.train_epochs(run, STEP_RATES))
        state = state_without_seconds(run)
        del state["settings"]["device"]
        ends.append([rates.sweep, state])
    steps = len(rates.sweep["lr"])
    in_sweep = steps - steps // 3  # every third batch is not full
    in_training = 4  # two in each epoch
    assert graphs.replayed == [4] * (in_sweep + in_training)
    assert same_state(*ends)


def test_the_graph_is_captured_with_fast_kernels(graphs):
    with train.prepared_for_steps(run_on_a_faked_gpu()):
        pass
    assert graphs.searched_for_fast_kernels
    assert not torch.backends.cudnn.benchmark


def loss_of_two_views(run, images, labels):
    run.forward(images.flip(-1))
    return train.cross_entropy(run, images, labels)


def loss_of_larger_images(run, images, labels):
    return train.cross_entropy(run, F.pad(images, (1, 1, 1, 1)), labels)


def loss_with_gradients_of_images(run, images, labels):
    return train.cross_entropy(run, images.clone().requires_grad_(), labels)


def loss_in_evaluation(run, images, labels):
    run.model.eval()
    loss, logits = train.cross_entropy(run, images, labels)
    run.model.train()
    return loss, logits


@pytest.mark.parametrize("loss, replays", [
    (None, 4), (squared_error, 4), (loss_of_two_views, 4),  # once for each full batch
    (loss_of_larger_images, 0), (loss_with_gradients_of_images, 0), (loss_in_evaluation, 0)])
def test_the_graph_serves_once_in_a_step_and_only_what_it_can_compute(graphs, loss, replays):
    list(train.train_epochs(run_on_a_faked_gpu(loss=loss), STEP_RATES))
    assert graphs.replayed == [4] * replays


def test_the_graph_serves_only_the_loss_of_a_step(graphs):
    run = run_on_a_faked_gpu()

    def compute_more(*_):
        run.forward(run.test.images[:4])

    run.optimizer.register_step_pre_hook(compute_more)
    epochs = train.train_epochs(run, STEP_RATES)
    next(epochs)
    assert run.graph is not None
    run.model.train()
    run.forward(run.test.images[:4])
    assert graphs.replayed == [4, 4]


def test_no_graph_is_left_after_the_sweep_and_the_training(graphs):
    run = run_on_a_faked_gpu()
    train.find_rates(run)
    assert run.graph is None
    for _ in train.train_epochs(run, STEP_RATES):
        assert run.graph is not None
    assert run.graph is None


def test_no_graph_is_left_after_a_training_that_ended_early(graphs):
    run = run_on_a_faked_gpu()
    with pytest.raises(KeyboardInterrupt):
        list(train.train_epochs(run, STEP_RATES, raiser(KeyboardInterrupt)))
    assert run.graph is None


def test_a_failed_capture_changes_nothing_and_says_what_to_try(graphs, monkeypatch):
    def fail(module, arguments):
        module(*arguments)
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fail)
    run = run_on_a_faked_gpu()
    before = state_without_seconds(run)
    advice = r"start_run\(\.\.\., cuda_graph=False\) turns the graph off$"
    with pytest.raises(RuntimeError, match=advice):
        list(train.train_epochs(run, STEP_RATES))
    assert same_state(state_without_seconds(run), before)
    assert not torch.backends.cudnn.benchmark


def test_a_capture_without_memory_stays_an_out_of_memory_error(graphs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "make_graphed_callables",
                        raiser(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        list(train.train_epochs(run_on_a_faked_gpu(), STEP_RATES))


def test_no_graph_is_captured_if_it_is_not_wanted_or_layers_are_frozen(graphs):
    assert train.capture_graph(run_on_a_faked_gpu(cuda_graph=False)) is None
    run = run_on_a_faked_gpu()
    run.model.prep.requires_grad_(False)
    assert train.capture_graph(run) is None


@pytest.mark.parametrize("changed", [
    {"device": "cpu"}, {"precision": "fp16"}, {"precision": "fp32"}, {"model": linear_network()},
    {"model": type("Child", (SmallResNet,), {})()}],
    ids=["cpu", "fp16", "fp32", "linear", "subclass"])
def test_no_graph_is_captured_where_it_would_not_help(graphs, changed):
    run = run_on_a_faked_gpu()
    assert train.capture_graph(run) is not None
    assert train.capture_graph(dataclasses.replace(run, **changed)) is None


# ---- Checkpoint, report, weights --------------------------------------------------------

@pytest.fixture
def quick_workplace(workplace, monkeypatch):
    """Return a Workplace whose `main` trains a DropoutNetwork: two steps in an epoch."""
    monkeypatch.setattr(train, "ResNet", DropoutNetwork)
    monkeypatch.setattr(train, "whiten_patches", lambda model, images: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for others cost seconds
    yield workplace
    torch.set_num_threads(threads)


FOUND = train.Rates(0.0002, 0.06, {"lr": [0.01, 0.02, 0.03, 1.0],
                                   "loss": [2.0, 1.2, 1.0, 3.0],
                                   "smoothed_loss": [2.0, 1.51, 1.5, 2.0]},
                    "the loss of the sweep did not rise. An advice")


@pytest.fixture
def sweeps(monkeypatch):
    """Let each sweep find FOUND at once. Return the list of the sweeps' seeds."""
    seeds = []

    def find_rates(run, on_step):
        seeds.append(run.seed)
        warnings.warn(FOUND.note, train.UncertainRates)
        return FOUND

    monkeypatch.setattr(train, "find_rates", find_rates)
    return seeds


def before_steps(monkeypatch, actions):
    """Let training call actions[n]() before its step n, counted from 1."""
    train_step = train.train_step
    numbers = itertools.count(1)

    def step(*arguments):
        number = next(numbers)
        if number in actions:
            actions[number]()
        return train_step(*arguments)

    monkeypatch.setattr(train, "train_step", step)


def forbid_steps(monkeypatch):
    """Let a test fail if training or a sweep takes a step."""
    monkeypatch.setattr(train, "train_step", raiser(AssertionError("a step was taken")))


def put_folder_at(path):
    """Put a folder in the place of a file, so the file cannot be written any more."""
    Path(path).unlink(missing_ok=True)
    Path(path).mkdir()


def lasting_part(report):
    """Return what two equal runs share: all but times, memory and file names."""
    rows = []
    for row in report["epochs"]:
        rows.append({name: value for name, value in row.items() if "second" not in name})
    return rows, report["rates"], report["summary"]["tta_test_accuracy"]


def saved_state(path):
    """Return what two equal runs share in their checkpoints: all but the time."""
    state = torch.load(path, weights_only=True)["run"]
    del state["seconds"]
    return state


@pytest.mark.parametrize("recipe", [
    "tuned --ema-epochs 2", "fast --ema-epochs 2", "plain"])
def test_a_run_interrupted_in_an_epoch_ends_bit_for_bit_as_an_undisturbed_one(
        quick_workplace, monkeypatch, recipe):
    command = ["--recipe", *recipe.split(), "--epochs", 5, *RATES, "--checkpoint"]
    torch.manual_seed(5)  # for dropout
    undisturbed = quick_workplace.run(*command, "undisturbed.pt")
    torch.manual_seed(5)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_steps(patch, {6: raiser(KeyboardInterrupt)})  # the third epoch has 5 and 6
        quick_workplace.run(*command, "interrupted.pt")
    assert len(quick_workplace.report()["epochs"]) == 2
    torch.manual_seed(6)  # a new process has other random numbers
    resumed = quick_workplace.run(*command, "interrupted.pt")
    assert len(resumed["epochs"]) == 5
    assert lasting_part(resumed) == lasting_part(undisturbed)
    assert same_state(saved_state("interrupted.pt"), saved_state("undisturbed.pt"))


def kill_after_epoch(process, epoch):
    """Kill a process that trains, once it has printed the row of an epoch."""
    for line in process.stdout:
        if line.startswith(f"{epoch:5} "):
            break
    process.kill()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL


def test_a_run_whose_process_was_killed_ends_as_an_undisturbed_one(workplace, capsys):
    command = ["--subset", 5, "--batch-size", 5, "--epochs", 5, *RATES, "--checkpoint"]
    process = workplace.start(*command, "zäh.pt")  # its output has no ä
    kill_after_epoch(process, 2)
    report = workplace.report()
    assert report["summary"]["status"] == "running"
    assert 1 <= len(report["epochs"]) < 5  # it is written after the row
    resumed = workplace.run(*command, "zäh.pt")
    assert "resumed  zäh.pt after epoch " in capsys.readouterr().out
    undisturbed = workplace.run(*command, "undisturbed.pt")
    assert lasting_part(resumed) == lasting_part(undisturbed)
    assert same_state(saved_state("zäh.pt"), saved_state("undisturbed.pt"))


def run_as_process(monkeypatch, *arguments):
    """Run three epochs as the script does. Return the code with which it exits."""
    monkeypatch.setattr(
        sys, "argv", ["train.py", *SMALL, *REPORT, "--epochs", "3", *RATES, *arguments])
    with pytest.raises(SystemExit) as stop:
        train.run_process()
    return stop.value.code


@pytest.fixture
def usual_signals():
    """Let Ctrl-C do what it does in a terminal. Give pytest its handlers back at the end."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("arguments, how_to_continue", [
    ([], r" +to be able to continue a run, start it with --checkpoint FILE"),
    (["--checkpoint", "run.pt"], r".*the same command continues from run\.pt")])
def test_a_stopped_run_says_where_its_epochs_are_and_how_to_continue(
        quick_workplace, monkeypatch, capsys, usual_signals, number, code, arguments,
        how_to_continue):
    before_steps(monkeypatch, {4: lambda: signal.raise_signal(number)})
    assert run_as_process(monkeypatch, *arguments) == code  # as of a shell: 128 + number
    screen = capsys.readouterr()
    assert screen.err == ("\ninterrupted\n" if number == signal.SIGINT else "")
    first, second = screen.out.splitlines()[-2:]
    assert first == "stopped  run.json has the epochs that were completed"
    assert re.fullmatch(how_to_continue, second)
    assert len(quick_workplace.report()["epochs"]) == 1


def test_a_run_goes_on_when_nobody_reads_its_output_any_more(workplace):
    process = workplace.start("--epochs", 1, *RATES)
    process.stdout.close()  # as that of a `tee` that Ctrl-C has ended
    assert process.wait() == 0, process.stderr.read()
    assert workplace.report()["summary"]["status"] == "complete"


def test_a_row_that_is_shown_has_been_saved(quick_workplace, monkeypatch):
    monkeypatch.setattr(train, "TABLE_ROW", SimpleNamespace(format=raiser(KeyboardInterrupt)))
    with pytest.raises(KeyboardInterrupt):
        quick_workplace.run("--epochs", 2, "--checkpoint", "run.pt", *RATES)
    saved = torch.load("run.pt", weights_only=True)
    assert len(saved["report"]["epochs"]) == saved["run"]["epoch"] == 1


def test_a_run_that_is_stopped_in_the_sweep_says_that_it_begins_anew(
        quick_workplace, monkeypatch, capsys):
    monkeypatch.setattr(train, "find_rates", raiser(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        quick_workplace.run("--checkpoint", "run.pt")
    assert "the same command begins anew" in capsys.readouterr().out


def test_a_run_that_is_killed_after_its_last_epoch_still_gets_its_result(
        quick_workplace, monkeypatch):
    command = ["--epochs", 2, "--checkpoint", "run.pt", *RATES]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "finish_run", raiser(KeyboardInterrupt))
        quick_workplace.run(*command)
    forbid_steps(monkeypatch)
    summary = quick_workplace.run(*command)["summary"]
    assert summary["status"] == "complete"
    assert summary["tta_test_accuracy"] is not None


def test_an_interrupted_run_does_not_sweep_again_nor_a_finished_one_train(
        quick_workplace, sweeps, monkeypatch):
    command = ["--epochs", 2, "--checkpoint", "run.pt"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_steps(patch, {2: raiser(KeyboardInterrupt)})  # in the first epoch
        quick_workplace.run(*command)
    finished = quick_workplace.run(*command)
    forbid_steps(monkeypatch)
    again = quick_workplace.run(*command)
    assert sweeps == [0]
    assert again["summary"]["status"] == "complete"
    for section in ("environment", "rates", "lr_sweep", "epochs", "summary"):
        assert again[section] == finished[section]


def test_the_sweep_and_the_training_show_their_progress(quick_workplace, monkeypatch):
    parts = []

    def progress_callback(run, sweeping=False):
        return lambda *step: parts.append("sweep" if sweeping else "training")

    monkeypatch.setattr(train, "progress_callback", progress_callback)
    report = quick_workplace.run("--epochs", 1)
    assert parts == ["sweep"] * len(report["lr_sweep"]["lr"]) + ["training"] * 2


def test_a_continued_report_has_the_environment_of_each_process_that_trained(
        quick_workplace, monkeypatch, capsys):
    command = ["--epochs", 3, "--checkpoint", "run.pt", "--precision", "fp32", *RATES]

    describe_environment = train.describe_environment

    def run_at(commit):
        monkeypatch.setattr(
            train, "describe_environment",
            lambda run: {**describe_environment(run), "commit": commit, "torch": commit})
        return quick_workplace.run(*command)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_steps(patch, {5: raiser(KeyboardInterrupt)})
        run_at("first")
    capsys.readouterr()
    run_at("second")
    assert "fp32, PyTorch second\n" in capsys.readouterr().out
    report = run_at("third")  # has nothing left to train
    assert report["environment"]["commit"] == "first"
    assert [later["commit"] for later in report["continued_in"]] == ["second"]


def test_a_continued_run_shows_the_epochs_before_and_counts_their_time(
        quick_workplace, monkeypatch, capsys):
    command = ["--epochs", 3, "--checkpoint", "run.pt", *RATES]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before_steps(patch, {5: raiser(KeyboardInterrupt)})
        quick_workplace.run(*command)
    saved = torch.load("run.pt", weights_only=True)
    saved["run"]["seconds"] = 1000.0
    saved["report"]["summary"]["total_seconds"] = 2000.0
    torch.save(saved, "run.pt")
    capsys.readouterr()
    report = quick_workplace.run(*command)
    lines = capsys.readouterr().out.splitlines()
    assert "resumed  run.pt after epoch 2 of 3" in lines
    assert [line[:5] for line in lines if re.match(r" +\d ", line)] == ["    1", "    2", "    3"]
    assert 1000 < report["epochs"][2]["elapsed_seconds"] < 1100
    assert 2000 < report["summary"]["total_seconds"] < 2100


@pytest.mark.parametrize("arguments, differences", [
    (["--epochs", 2, "--seed", 7], "epochs 1, not 2; seed 0, not 7"),
    (["--holdout", 10], "holdout 0, not 10"),
    (["--recipe", "fast"], "optimizer adam, not muon; first_convolution muon, not adam; "
                           "ema_epochs 0.5, not 0.25; padding 4, not 2; cutout 8, not 0"),
    (["--lr-max", 0.02], "lr_max 0.01, not 0.02"),
    (["--lr-min", 0.001], "lr_min 0.0001, not 0.001")])
def test_a_checkpoint_of_another_run_is_refused_with_what_differs_and_what_to_do(
        quick_workplace, arguments, differences):
    command = ["--checkpoint", "run.pt", "--epochs", 1, "--precision", "fp32", *RATES]
    quick_workplace.run(*command)
    files = [Path(name).read_bytes() for name in ("run.pt", "run.json")]
    assert quick_workplace.fail(*command, *arguments) == (
        f"cannot continue run.pt (it is of another run: {differences}).\n"
        "For a new run, choose another --checkpoint.\nTo continue that run, give its options. "
        "On another machine, also give --device and --precision.\n"
        "If you changed the code since, undo that.")
    assert [Path(name).read_bytes() for name in ("run.pt", "run.json")] == files


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-1000])


def replace_by_network(path):
    torch.save(nn.Linear(2, 2), path)  # PyTorch refuses it with a page of text


def replace_by_weights(path):
    train.save_weights(path, small_run(model=train.ResNet), CLASSES)


def change_network(path):
    train.ResNet = SmallResNet  # `quick_workplace` undoes this


@pytest.mark.parametrize("damage", [
    cut_off, replace_by_network, replace_by_weights, change_network])
def test_what_is_no_checkpoint_of_this_code_is_refused_and_left_as_it_is(
        quick_workplace, damage):
    command = ["--checkpoint", "run.pt", "--epochs", 1, *RATES]
    quick_workplace.run(*command)
    damage(Path("run.pt"))
    damaged = Path("run.pt").read_bytes()
    message = quick_workplace.fail(*command)
    first_line, *advice = message.splitlines()
    assert re.fullmatch(r"cannot continue run\.pt \(.+\)\.", first_line)
    assert advice[-1] == "If you changed the code since, undo that."
    assert Path("run.pt").read_bytes() == damaged


def test_a_checkpoint_for_which_memory_is_too_small_is_not_called_bad(
        quick_workplace, monkeypatch):
    Path("run.pt").write_text("a checkpoint")
    monkeypatch.setattr(torch, "load", raiser(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        quick_workplace.run("--checkpoint", "run.pt", "--epochs", 1, *RATES)


def test_a_report_has_the_accuracies_after_the_last_epoch_without_and_with_flip_tta(
        quick_workplace, monkeypatch):
    def predict_logits(run, images, tta=False):
        correct = F.one_hot(run.test.labels, 10).float()
        is_first_epoch = run.epoch == 0  # it is counted after its evaluation
        return -correct if tta or is_first_epoch else correct

    monkeypatch.setattr(train, "predict_logits", predict_logits)
    summary = quick_workplace.run("--epochs", 2, *RATES)["summary"]
    assert summary["final_test_accuracy"] == 1
    assert summary["tta_test_accuracy"] == 0


def test_no_epochs_find_the_rates_and_stop(quick_workplace, sweeps, capsys, monkeypatch):
    forbid_steps(monkeypatch)
    report = quick_workplace.run("--epochs", 0)
    assert report["summary"]["status"] == "complete"
    assert report["lr_sweep"] == FOUND.sweep
    assert report["epochs"] == []
    assert report["summary"]["final_test_accuracy"] is None
    assert report["summary"]["tta_test_accuracy"] is None
    screen = capsys.readouterr().out
    assert "LRMIN 0.0002, LRMAX 0.06, weight decay" in screen
    assert "epoch" not in screen.replace("epochs 0", "")
    assert "final" not in screen


@pytest.mark.parametrize("arguments, expected", [
    ([], [0.06, "sweep", 0.0002, "lr_max"]),
    (["--lr-min", 1e-9], [0.06, "sweep", 1e-9, "given"]),
    (["--lr-max", 0.6], [0.6, "given", 0.002, "lr_max"]),
    (["--lr-max", 0.6, "--lr-min", 0.1], [0.6, "given", 0.1, "given"])])
def test_the_report_says_where_the_rates_are_from(
        quick_workplace, sweeps, arguments, expected):
    report = quick_workplace.run("--epochs", 0, *arguments)
    names = ["lr_max", "lr_max_from", "lr_min", "lr_min_from"]
    assert [report["rates"][name] for name in names] == pytest.approx(expected)
    if "--lr-max" in arguments:
        assert sweeps == []
        assert report["lr_sweep"] is None


def test_a_broken_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"first")
    write_bytes = Path.write_bytes

    def break_half_way(temporary, content):
        assert tmp_path in temporary.parents  # on the same disk, so it can replace the file
        write_bytes(temporary, content[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", break_half_way)
    with pytest.raises(KeyboardInterrupt):
        train.write_file(path, lambda file: file.write(b"second"))
    assert path.read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_replaces_the_file_and_does_not_change_it(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"first")
    os.link(path, tmp_path / "link")  # another name of the first file
    train.write_file(path, lambda file: file.write(b"second"))
    assert (path.read_bytes(), (tmp_path / "link").read_bytes()) == (b"second", b"first")


def test_a_write_through_a_link_keeps_the_link(tmp_path):
    os.symlink("file", tmp_path / "link")
    train.write_file(tmp_path / "link", lambda file: file.write(b"content"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"content"


def test_trying_whether_a_file_can_be_written_changes_no_file(tmp_path):
    (tmp_path / "file").write_bytes(b"content")
    train.check_writable(tmp_path / "file")
    train.check_writable(tmp_path / "new")
    assert os.listdir(tmp_path) == ["file"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_a_full_disk_ends_in_a_sentence(tmp_path, monkeypatch):
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(Path, "write_bytes", raiser(full))
    with pytest.raises(train.UserError) as error:
        train.write_file(tmp_path / "file", lambda file: file.write(b"content"))
    assert re.fullmatch(r"cannot write \S+/file \(\[Errno 28\] No space left on device\)\.\n"
                        r"Free some space, or choose another file\.", str(error.value))


@pytest.mark.parametrize("place", ["file/run", "folder", "pipe", "link"])
def test_a_place_that_is_not_a_file_is_refused_and_stays(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    Path("folder").mkdir()
    os.mkfifo("pipe")
    os.symlink("pipe", "link")
    with pytest.raises(train.UserError, match=rf"^cannot write {place} \(.+\)\."):
        train.check_writable(place)
    assert Path("pipe").is_fifo()
    assert Path("link").is_symlink()


@pytest.mark.parametrize("option", ["--output", "--checkpoint", "--weights"])
def test_a_file_that_cannot_be_written_is_named_before_anything_changes(
        quick_workplace, monkeypatch, option):
    Path("run.json").write_text("an earlier report")
    forbid_steps(monkeypatch)
    message = quick_workplace.fail("--epochs", 1, option, "data")  # a folder
    assert message.startswith("cannot write data (")
    assert Path("run.json").read_text() == "an earlier report"


@pytest.mark.parametrize("name", ["run.json", "run.pt"])
def test_a_write_that_fails_on_the_way_costs_a_warning(
        quick_workplace, monkeypatch, capsys, name):
    before_steps(monkeypatch, {3: lambda: put_folder_at(name),
                               5: lambda: Path(name).rmdir()})
    report = quick_workplace.run("--epochs", 3, "--checkpoint", "run.pt", *RATES)
    assert len(report["epochs"]) == 3
    assert report["summary"]["status"] == "complete"
    assert saved_state("run.pt")["epoch"] == 3
    assert capsys.readouterr().out.count(f"warning  cannot write {name} (") == 1


@pytest.mark.parametrize("name", ["run.json", "run.pt", "weights.pt"])
def test_a_write_that_fails_at_the_end_fails_the_run_but_costs_nothing_else(
        quick_workplace, monkeypatch, capsys, usual_signals, name):
    before_steps(monkeypatch, {3: lambda: put_folder_at(name)})  # from the second epoch on
    message = run_as_process(monkeypatch, "--checkpoint", "run.pt", "--weights", "weights.pt")
    assert message.startswith(f"error: cannot write {name} (")  # Python exits with 1
    assert re.search(r"\nfinal    \d+\.\d\d% of the test images", capsys.readouterr().out)
    if name != "weights.pt":
        assert Path("weights.pt").is_file()
    if name != "run.pt":
        saved = torch.load("run.pt", weights_only=True)
        assert saved["report"]["summary"]["status"] == "complete"
    if name != "run.json":
        report = quick_workplace.report()
        assert report["summary"]["status"] == "complete"
        assert report["summary"]["final_test_accuracy"] == report["epochs"][2]["test_accuracy"]


def test_a_loaded_network_classifies_images_without_the_run_and_is_frozen(
        tmp_path, monkeypatch):
    run = small_run(Recipe(epochs=1, batch_size=4, logit_scale=0.25, ema_epochs=2))
    list(train.train_epochs(run, STEP_RATES))
    path = tmp_path / "weights.pt"
    train.save_weights(path, run, CLASSES)
    saved = torch.load(path, weights_only=True)
    saved["recipe"]["mixup"] = 0.5  # a constant of other code does not matter
    with monkeypatch.context() as patch:  # as if a GPU had written it
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save(saved, path)
    model, mean, std, classes = train.load_weights(path)
    images = random_split(8).images
    logits = model(train.normalize_images(images, mean, std))
    normalized = TF.normalize(images / 255, run.mean.tolist(), run.std.tolist())
    with torch.no_grad():
        expected = run.averaged.eval()(normalized)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert classes == CLASSES
    assert model.logit_scale == 0.25
    assert not model.training
    assert not any(values.requires_grad for values in model.parameters())
    assert model.prep[0].weight.is_contiguous(memory_format=torch.channels_last)


class Bomb:
    """What makes a folder when it is unpickled without care."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_no_code_in_a_file_is_run(quick_workplace):
    torch.save(Bomb(), "run.pt")
    assert "UnpicklingError" in quick_workplace.fail("--checkpoint", "run.pt", *RATES)
    with pytest.raises(pickle.UnpicklingError):
        train.load_weights("run.pt")
    assert not Path("made").exists()


def test_the_weights_for_a_hundred_classes_are_saved_and_loaded(tmp_path):
    split = train.Split(random_split(8).images, torch.arange(92, 100))
    run = train.start_run(Recipe(batch_size=4), split, split, device="cpu",
                          precision="fp32", num_classes=100)
    names = np.array([f"class {number}" for number in range(100)])
    train.save_weights(tmp_path / "weights.pt", run, names)
    model, mean, std, classes = train.load_weights(tmp_path / "weights.pt")
    assert classes == names.tolist()
    assert model(train.normalize_images(split.images, mean, std)).shape == (8, 100)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_every_integer_type_are_trained_on(dtype):
    split = train.Split(random_split(8).images, torch.arange(8, dtype=dtype))
    run = run_with(split, epochs=1, batch_size=4)
    assert run.training.labels.dtype == torch.long
    assert len(list(train.train_epochs(run, STEP_RATES))) == 1


def test_a_network_that_was_given_to_a_run_keeps_its_weights_and_the_scale_of_its_logits(tmp_path):
    network = train.ResNet(Recipe(logit_scale=1))
    before = network.prep[0].weight.clone()
    run = small_run(model=network)
    assert torch.equal(network.prep[0].weight, before)  # it is not whitened
    assert run.recipe.logit_scale == 0.125
    train.save_weights(tmp_path / "weights.pt", run, CLASSES)
    assert train.load_weights(tmp_path / "weights.pt")[0].logit_scale == 1


class OtherResNet(train.ResNet):
    """A ResNet whose weights would fit into the built-in one, but mean something else."""

    def forward(self, x):
        return -super().forward(x)


@pytest.mark.parametrize("model", [linear_network, OtherResNet])
def test_the_weights_of_another_network_are_not_saved(tmp_path, model):
    run = small_run(model=model)
    with pytest.raises(ValueError, match="^save_weights is for the built-in network"):
        train.save_weights(tmp_path / "weights.pt", run, CLASSES)


def test_weights_are_not_saved_without_a_name_for_each_output(tmp_path):
    with pytest.raises(ValueError, match="^save_weights needs 10 names of classes, one for each "
                                         "output of the network, got 9$"):
        train.save_weights(tmp_path / "weights.pt", small_run(), CLASSES[:9])


# ---- A run and what it writes -----------------------------------------------------------

@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Let `main` train the built-in network with a sweep, and write all files it can.

    Return what it returned, the folder in which it ran, and what it printed.
    """
    folder = tmp_path_factory.mktemp("finished")
    attributes = write_cifar10(folder / "data" / CIFAR10.base_folder)
    arguments = [*SMALL, "--subset", 20, "--batch-size", 8, "--epochs", 2,
                 "--precision", "fp32", "--epsilon", 0.02, "--beta2", 0.98, "--ema-epochs", 2,
                 "--checkpoint", "results/run.pt", "--weights", "results/weights.pt"]
    with pytest.MonkeyPatch.context() as patch:
        use_small_data(patch, attributes)
        patch.chdir(folder)
        with open("screen.txt", "w") as screen, contextlib.redirect_stdout(screen):
            report = train.main(arguments)
    return SimpleNamespace(report=report, folder=folder,
                           screen=(folder / "screen.txt").read_bytes().decode())


def test_main_returns_the_report_that_is_written_beside_the_checkpoint(finished_run):
    written = (finished_run.folder / "results" / "run.json").read_text()
    assert finished_run.report == json.loads(written, parse_constant=pytest.fail)  # no NaN


def test_the_report_has_the_recipe_and_the_command(finished_run):
    config = finished_run.report["config"]
    assert Recipe(**config["recipe"]) == Recipe(
        epochs=2, batch_size=8, epsilon=0.02, beta2=0.98, ema_epochs=2)
    assert config["options"]["command"] == (
        "train.py --batch-size 50 --device cpu --subset 20 --batch-size 8 --epochs 2 "
        "--precision fp32 --epsilon 0.02 --beta2 0.98 --ema-epochs 2 "
        "--checkpoint results/run.pt --weights results/weights.pt")
    assert config["options"]["output"] == "results/run.json"


def test_the_commit_of_a_script_is_the_last_one_that_changed_it(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    monkeypatch.setattr(train, "SCRIPT", script)
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)  # a hook of git sets some
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)

    def git(*arguments):
        identity = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
        command = ["git", "-C", tmp_path, *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    git("init")
    git("commit", "--allow-empty", "--message", "before the script is known")
    script.write_text("1")
    assert train.script_commit() is None
    git("add", "train.py")
    git("commit", "--message", "the script")
    commit = git("log", "-1", "--format=%h").strip()
    git("commit", "--allow-empty", "--message", "something else")
    assert train.script_commit() == commit
    script.write_text("2")
    assert train.script_commit() == f"{commit}+"
    with monkeypatch.context() as pasted:
        pasted.setattr(train, "IS_PASTED", True)
        assert train.script_commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))  # there is no git
    assert train.script_commit() is None


def test_the_report_has_the_environment(finished_run):
    environment = finished_run.report["environment"]
    assert set(environment) == {
        "date", "commit", "system", "python", "torch", "torchvision", "numpy", "cudnn",
        "device", "device_name", "precision", "threads"}
    assert environment["torch"] == str(torch.__version__)
    assert environment["device"] == "cpu"
    assert environment["precision"] == "fp32"
    assert environment["commit"] == train.script_commit()


def test_the_report_describes_data_and_network(finished_run):
    data = finished_run.report["data"]
    pixels = easy_images(0)["data"].reshape(20, 3, 1024) / 255
    assert data["mean"] == pytest.approx(pixels.mean(axis=(0, 2)).tolist(), rel=1e-5)
    assert data["std"] == pytest.approx(pixels.std(axis=(0, 2)).tolist(), rel=1e-5)
    assert data["train_images"] == 20
    assert data["test_images"] == 4
    assert data["evaluated_on"] == "test images"
    assert finished_run.report["parameters"] == 6_573_130


def test_the_report_has_the_sweep_and_the_rates_that_it_gave(finished_run):
    rates = finished_run.report["rates"]
    sweep = finished_run.report["lr_sweep"]
    assert len(sweep["lr"]) == len(sweep["loss"]) == len(sweep["smoothed_loss"]) > 40
    assert rates["lr_max_from"] == "sweep"
    assert rates["note"] is None
    # An epoch has three steps, and decay takes at least 100 steps.
    assert rates["weight_decay"] == pytest.approx(1 / (100 * rates["lr_max"]))


def test_the_times_of_the_report_add_up(finished_run):
    rows = finished_run.report["epochs"]
    summary = finished_run.report["summary"]
    seconds = np.array([row["train_seconds"] for row in rows])
    assert summary["preprocess_seconds"] > 0
    elapsed = summary["preprocess_seconds"] + np.cumsum(seconds)
    assert [row["elapsed_seconds"] for row in rows] == pytest.approx(elapsed.tolist())
    assert rows[1]["images_per_second"] == pytest.approx(20 / seconds[1])
    assert summary["train_seconds"] == pytest.approx(seconds.sum())
    assert summary["sweep_seconds"] > summary["train_seconds"]  # it has many more steps
    parts = elapsed[1] + summary["sweep_seconds"]
    assert 0 < parts < summary["total_seconds"]


def test_the_summary_names_the_first_epochs_that_reached_the_goals():
    rows = []
    for epoch, accuracy in enumerate([0.5, 0.91, 0.93, 0.89], start=1):
        rows.append({"test_accuracy": accuracy, "epoch": epoch, "elapsed_seconds": 9 * epoch,
                     "train_seconds": 8})
    summary = train.summarize_epochs(rows)
    assert summary["epochs_to"] == {"0.90": 2, "0.94": None}
    assert summary["seconds_to"] == {"0.90": 18, "0.94": None}


def test_the_weights_of_a_run_are_saved_with_what_they_need(finished_run):
    results = finished_run.folder / "results"
    model, mean, std, classes = train.load_weights(results / "weights.pt")
    saved = torch.load(results / "run.pt", weights_only=True)["run"]
    assert same_state(model.state_dict(), saved["averaged"])
    assert classes == CLASSES
    assert mean.tolist() == finished_run.report["data"]["mean"]
    assert std.tolist() == finished_run.report["data"]["std"]


def test_the_screen_begins_with_what_is_run(finished_run):
    heading = finished_run.screen.split("sweep")[0]
    environment = finished_run.report["environment"]
    assert heading == (
        "recipe   tuned, epochs 2, beta2 0.98, epsilon 0.02, ema_epochs 2.0\n"
        "network  6,573,130 parameters, seed 0\n"
        f"device   cpu ({environment['device_name']}), fp32, PyTorch {torch.__version__}\n"
        "data     20 training images in batches of 8, 4 test images\n"
        "report   results/run.json\n")


def test_the_screen_ends_with_result_times_and_files(finished_run):
    result, times, *rest = finished_run.screen.split("\nfinal    ")[1].splitlines()
    assert result.endswith("with flip test-time augmentation")
    assert times.startswith("time     ")
    pytest.importorskip("matplotlib")
    files = rest[rest.index("weights  results/weights.pt") + 1:]
    assert files[:2] == ["figure   results/run-sweep.png", "figure   results/run-curves.png"]
    assert all(line.startswith("figure   results/run-") for line in files)


def test_a_screen_that_is_no_terminal_gets_no_status_line(finished_run):
    assert "\r" not in finished_run.screen
    assert "left" not in finished_run.screen


# Several seeds: --runs.

def test_each_of_several_seeds_has_its_files_and_equals_a_run_of_its_own(
        quick_workplace, monkeypatch, capsys):
    # Dropout's random numbers do not follow from the seed.
    monkeypatch.setattr(nn.Dropout, "forward", lambda self, x: x)
    reports = train.main([*SMALL, *REPORT, *RATES, "--epochs", 1, "--runs", 2, "--seed", 4,
                          "--checkpoint", "run.pt", "--weights", "weights.v1.pth"])
    assert "\n2 runs   mean" in capsys.readouterr().out
    assert [report["config"]["options"]["seed"] for report in reports] == [4, 5]
    for report, seed in zip(reports, (4, 5), strict=True):
        assert report == quick_workplace.report(f"run-seed{seed}.json")
        assert saved_state(f"run-seed{seed}.pt")["settings"]["seed"] == seed
        assert Path(f"weights.v1-seed{seed}.pth").is_file()
    assert lasting_part(reports[0]) != lasting_part(reports[1])
    alone = quick_workplace.run("--epochs", 1, *RATES, "--seed", 5)
    assert lasting_part(reports[1]) == lasting_part(alone)


@pytest.mark.parametrize("accuracies, line", [
    ([0.92, 0.94, 0.951], "3 runs   mean 93.70%, standard deviation 1.57%, "
                          "standard error 0.91%, 2 at 94% or more"),
    ([0.5, 0.6], "2 runs   mean 55.00%, standard deviation 7.07%, standard error 5.00%")])
def test_several_seeds_end_with_mean_and_spread_of_their_accuracies(capsys, accuracies, line):
    train.print_runs(accuracies)
    assert capsys.readouterr().out == f"{line}\n"


def test_several_seeds_without_epochs_have_no_mean(quick_workplace, capsys):
    reports = train.main([*SMALL, *REPORT, *RATES, "--epochs", 0, "--runs", 2])
    assert [report["epochs"] for report in reports] == [[], []]
    assert "mean" not in capsys.readouterr().out


def test_a_seed_that_diverges_ends_the_run_with_advice_and_the_mean_of_those_before(
        quick_workplace, monkeypatch, capsys):
    train_step = train.train_step
    seeds = []

    def step(run, *arguments):
        seeds.append(run.seed)
        loss, correct = train_step(run, *arguments)
        is_second_of_its_seed = seeds[-2:] == [6, 6]
        return torch.tensor(math.inf) if is_second_of_its_seed else loss, correct

    monkeypatch.setattr(train, "train_step", step)
    message = quick_workplace.fail("--epochs", 2, "--runs", 4, "--seed", 4, *RATES,
                                   "--batch-size", 25, "--checkpoint", "run.pt")
    assert message == ("the loss became NaN or infinite in epoch 1.\nTry a lower LRMAX "
                       "(--lr-max) or full precision (--precision fp32).")
    assert seeds == [4] * 8 + [5] * 8 + [6] * 4  # two epochs of four steps, then one
    statuses = [quick_workplace.report(f"run-seed{seed}.json")["summary"]["status"]
                for seed in (4, 5, 6)]
    assert statuses == ["complete", "complete", "diverged"]
    assert capsys.readouterr().out.splitlines()[-1].startswith("2 runs   mean ")
    assert saved_state("run-seed6.pt")["epoch"] == 0  # the last state without NaN
    assert not Path("run-seed7.json").exists()


# Names of files.

def test_two_reports_without_a_name_are_different_new_files():
    names = {train.parse_arguments([])[1].output for _ in range(2)}
    assert len(names) == 2
    for name in names:
        assert re.fullmatch(r"results/\d{8}-\d{6}-\d{6}\.json", name)


@pytest.mark.parametrize("runs, name, name_of_seed", [
    (2, "acc.v1", "acc.v1-seed3"), (2, "/tmp/run.json", "/tmp/run-seed3.json"),
    (2, "folder//lr0.02.pt", "folder/lr0.02-seed3.pt"),
    (2, "folder.v1/run", "folder.v1/run-seed3"), (1, "acc.v1", "acc.v1")])
def test_files_of_a_seed_are_named_after_it_if_there_are_several(runs, name, name_of_seed):
    _, options = train.parse_arguments(["--runs", runs, "--output", name])
    of_seed = train.options_of_seed(options, 3)
    assert Path(of_seed.output) == Path(name_of_seed)
    assert of_seed.seed == 3


@pytest.mark.parametrize("option", ["data-dir", "output", "checkpoint", "weights"])
def test_the_home_folder_may_be_written_as_a_tilde(monkeypatch, option):
    monkeypatch.setenv("HOME", "/home/me")
    _, options = train.parse_arguments([f"--{option}=~/here"])
    assert getattr(options, option.replace("-", "_")) == "/home/me/here"


# Figures.

def pictures():
    return {str(path) for path in Path().glob("*.png")}


def test_a_run_writes_its_figures_next_to_the_report(quick_workplace, sweeps):
    pytest.importorskip("matplotlib")
    train.main([*SMALL, "--epochs", 2, "--output", "o0.1"])
    assert pictures() == {"o0.1-sweep.png", "o0.1-curves.png", "o0.1-augmented.png",
                          "o0.1-confusion.png", "o0.1-misclassified.png"}


def test_a_run_writes_no_figures_if_they_are_not_wanted(quick_workplace):
    pytest.importorskip("matplotlib")
    quick_workplace.run("--epochs", 1, "--no-figures", *RATES)
    assert pictures() == set()


def test_a_run_that_is_interrupted_draws_its_curves(quick_workplace, sweeps, monkeypatch):
    pytest.importorskip("matplotlib")
    before_steps(monkeypatch, {4: raiser(KeyboardInterrupt)})  # in the second epoch
    with pytest.raises(KeyboardInterrupt):
        train.main([*SMALL, "--epochs", 2, "--output", "run.json"])
    assert pictures() == {"run-sweep.png", "run-curves.png"}


@pytest.mark.filterwarnings("error")  # `main` prints the note, so it gives no warning
def test_a_doubt_about_the_sweep_is_on_the_screen_and_in_the_report(
        quick_workplace, sweeps, capsys):
    report = quick_workplace.run("--epochs", 1)
    assert report["rates"]["note"] == FOUND.note
    assert ("\nnote     the loss of the sweep did not rise.\n         An advice\n"
            in capsys.readouterr().out)


@pytest.fixture
def figure():
    """Return an empty figure. Without matplotlib, the test is skipped."""
    return pytest.importorskip("matplotlib.figure").Figure()


def lines_of(axes):
    """Return the points (x, y) of each line in a figure's axes."""
    return [(list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines]


def test_the_figure_of_the_sweep_shows_losses_rates_and_how_the_rule_reads_them(figure):
    train.plot_sweep(figure, {"lr_sweep": FOUND.sweep, "rates": dataclasses.asdict(FOUND)})
    (axes,) = figure.axes
    lines = lines_of(axes)
    assert ([0.01, 0.02, 0.03, 1.0], [2.0, 1.2, 1.0, 3.0]) in lines
    assert ([0.01, 0.02, 0.03, 1.0], [2.0, 1.51, 1.5, 2.0]) in lines
    positions = {line.get_label(): list(line.get_xdata()) for line in axes.lines}
    assert positions["last rate before the rise"] == [0.03]
    assert ([0.0002, 0.0002], [0, 1]) in lines
    assert ([0.06, 0.06], [0, 1]) in lines
    assert axes.get_xscale() == "log"


def test_the_figure_of_the_curves_shows_the_rows_of_the_report(figure, finished_run):
    report = copy.deepcopy(finished_run.report)
    rows = report["epochs"]
    rows[1]["test_accuracy"] = 0.5  # so that no goal is near
    train.plot_curves(figure, report)
    for axes, kind in zip(figure.axes, ("loss", "accuracy")):
        training = [row[f"train_{kind}"] for row in rows]
        test = [row[f"test_{kind}"] for row in rows]
        assert lines_of(axes) == [([1, 2], training), ([1, 2], test)]
        assert [line.get_label() for line in axes.lines] == [
            "training images, augmented", "test images"]
    title = figure.get_suptitle()
    assert "seed 0" in title
    assert f"{rows[1]['test_accuracy']:.2%}" in title
    assert "after epoch 2" in title


def test_the_figure_of_the_curves_shows_the_cycle_of_the_learning_rate(figure, finished_run):
    train.plot_curves(figure, finished_run.report)
    ((epochs, lrs),) = lines_of(figure.axes[2])
    assert epochs == pytest.approx([0, 5 / 12, 2])
    rates = finished_run.report["rates"]
    assert lrs[:2] == [rates["lr_min"], rates["lr_max"]]
    # The rows have the learning rates of the last steps, as training took them.
    rows = finished_run.report["epochs"]
    assert np.interp([1, 2], epochs, lrs) == pytest.approx([row["lr"] for row in rows])


@pytest.mark.parametrize("accuracy, is_drawn", [(0.5, False), (0.93, True)])
def test_the_goal_is_drawn_when_it_is_near(figure, finished_run, accuracy, is_drawn):
    report = copy.deepcopy(finished_run.report)
    report["epochs"][-1]["test_accuracy"] = accuracy
    train.plot_curves(figure, report)
    assert (([0, 1], [0.94, 0.94]) in lines_of(figure.axes[1])) == is_drawn


def test_the_figure_of_misclassified_images_shows_them_with_both_classes(figure):
    run = small_run(model=DropoutNetwork)
    labels = run.test.labels
    predicted = labels.clone()
    predicted[[2, 5]] = (labels[[2, 5]] + 1) % 10
    probability = torch.where(F.one_hot(predicted, 10) == 1, 0.55, 0.05)
    report = {"data": {"evaluated_on": "test images"}}
    train.plot_misclassified(figure, run, probability, report, CLASSES)
    shown = [axes for axes in figure.axes if axes.images]
    for axes, index in zip(shown, [2, 5], strict=True):
        image = random_split(8).images[index].permute(1, 2, 0)
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
        true, wrong = CLASSES[labels[index]], CLASSES[predicted[index]]
        assert axes.get_title() == f"{true}\ntaken for {wrong}\nwith probability 0.55"


def test_the_figure_of_augmented_images_shows_the_first_batch_of_training(figure):
    run = small_run(model=DropoutNetwork)
    train.plot_augmented(figure, run, CLASSES)
    images, labels = next(train.augmented_batches(run, 1))
    images = train.restore_images(images, run.mean, run.std).permute(0, 2, 3, 1)
    for axes, image, label in zip(figure.axes, images, labels, strict=True):
        np.testing.assert_array_equal(axes.images[0].get_array(), image)
        assert axes.get_title() == CLASSES[label]


def test_the_figure_of_confusions_shows_which_share_of_a_class_is_taken_for_which(figure):
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 1])
    predicted = torch.tensor([0, 0, 1, 1, 1, 0, 0])
    run = SimpleNamespace(test=train.Split(None, labels))
    report = {"data": {"evaluated_on": "test images"}}
    probabilities = F.one_hot(predicted, 3).float()
    train.plot_confusion(figure, run, probabilities, report, ["cat", "dog", "owl"])
    (axes,) = figure.axes
    shares = axes.images[0].get_array()
    expected = [[200 / 3, 100 / 3, 0], [50, 50, 0], [0, 0, 0]]  # no owl was tested
    np.testing.assert_allclose(shares, expected, rtol=1e-6)
    texts = [text.get_text() for text in axes.texts]
    assert texts == ["66.7", "33.3", "0", "50", "50", "0", "0", "0", "0"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", "dog", "owl"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("taken for", "class")


def test_without_a_misclassified_image_there_is_no_figure_of_them(
        quick_workplace, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(
        train, "predict_logits",
        lambda run, images, tta=False: 50.0 * F.one_hot(run.test.labels, 10))
    train.main([*SMALL, "--epochs", 1, "--output", "run.json", *RATES])
    assert pictures() == {"run-curves.png", "run-augmented.png", "run-confusion.png"}


@pytest.mark.parametrize("module", [None, SimpleNamespace(Figure=raiser(ValueError("old")))])
def test_no_or_a_broken_matplotlib_costs_only_the_figures(
        quick_workplace, monkeypatch, capsys, module):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", module)
    report = train.main([*SMALL, "--epochs", 1, "--output", "run.json", *RATES])
    assert report["summary"]["status"] == "complete"
    last_line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch("figures  missing: .*(matplotlib.*|old)", last_line)


# The status line.

def print_on_terminal(monkeypatch):
    """Let the screen be a terminal."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)


def set_clock(monkeypatch, *seconds):
    """Let time.perf_counter return these numbers in turn."""
    monkeypatch.setattr(train, "time", SimpleNamespace(perf_counter=iter(seconds).__next__))


@pytest.mark.parametrize("sweeping, line", [
    # Two steps took four seconds. Seven steps are left of this epoch, ten of the last one.
    (False, "0:00:34 left, epoch 2, step 3 of 10, loss 2.000, 256 images/s"),
    (True, "0:00:14 left, sweep, step 3 of 10, loss 2.000, 256 images/s")])
def test_the_status_line_begins_with_the_time_left(monkeypatch, capsys, sweeping, line):
    print_on_terminal(monkeypatch)
    set_clock(monkeypatch, 0.0, 10.0, 10.5, 14.0)
    run = SimpleNamespace(recipe=Recipe(epochs=3, batch_size=512), epoch=1)
    on_step = train.progress_callback(run, sweeping)
    for step in (1, 2, 3):
        on_step(step, 10, 0.1, torch.tensor(2.0))
    assert capsys.readouterr().out.endswith(f"\r{line:<79}\r")


def test_the_status_line_appears_at_most_once_a_second(monkeypatch, capsys):
    print_on_terminal(monkeypatch)
    times = [0.0, 0.1, *(0.4 * step for step in range(1, 10))]
    set_clock(monkeypatch, *times)
    on_step = train.progress_callback(SimpleNamespace(recipe=Recipe(epochs=3), epoch=1))
    for step in range(1, 11):
        on_step(step, 10, 0.1, torch.tensor(2.0))
    assert capsys.readouterr().out.count(" left, ") == 3  # at 1.2, 2.4 and 3.6 seconds


@pytest.mark.parametrize("columns, width", [(200, 79), (80, 79), (60, 59)])
def test_a_status_line_fits_the_terminal_and_hides_the_one_before(
        monkeypatch, capsys, columns, width):
    print_on_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(columns))
    train.show_status(100 * "x")
    train.show_status("short")
    assert capsys.readouterr().out == f"\r{width * 'x'}\r\r{'short':<{width}}\r"


def test_a_notebook_gets_the_status_line(monkeypatch, capsys):
    monkeypatch.setattr(train, "IN_NOTEBOOK", True)
    train.show_status("epoch 1")
    assert capsys.readouterr().out.startswith("\repoch 1 ")


# ---- Options ---------------------------------------------------------------------------

def test_the_help_shows_a_default_and_those_of_all_recipes_if_they_differ(capsys, monkeypatch):
    monkeypatch.setattr(train, "RECIPES", {
        "tuned": Recipe(), "fast": Recipe(cutout=0),
        "plain": Recipe(epsilon=1e-8, flips="random")})
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option, default in [("--batch-size", "0"), ("--peak-fraction", "0.2083"),
                            ("--beta2", "0.999"), ("--cutout", "8 / 0 / 8"),
                            ("--epsilon", "0.01 / 0.01 / 1e-08"),
                            ("--flips", "alternating / alternating / random")]:
        assert re.search(rf"{option} [^(]*\(default: {re.escape(default)}\)", shown), option


def another_value(field, recipe):
    """Return an allowed value of a recipe's field that is not the one it has."""
    allowed = field.metadata["allowed"]
    if not isinstance(field.default, str):
        return allowed[1]
    return min(set(allowed) - {getattr(recipe, field.name)})


CONSTANTS_OF_MUON = ("muon_lr_factor", "first_convolution")


@pytest.mark.parametrize("field", dataclasses.fields(Recipe), ids=lambda field: field.name)
def test_each_constant_is_an_option_that_changes_the_chosen_recipe(field):
    name = "best" if field.name in CONSTANTS_OF_MUON else "plain"
    chosen = train.RECIPES[name]
    value = another_value(field, chosen)
    option = f"--{field.name.replace('_', '-')}"
    recipe, options = train.parse_arguments(["--recipe", name, option, str(value)])
    assert recipe != chosen
    assert recipe == dataclasses.replace(chosen, **{field.name: value})
    assert not hasattr(options, field.name)  # the report has each constant once


@pytest.mark.parametrize("arguments", [
    ["--epochs", 3, "--lr-max", 0.25, "--output", "two words.json"],
    "--epochs 3 --lr-max 0.25 --output 'two words.json'"])
def test_arguments_may_be_numbers_or_a_string_and_the_command_is_recorded(arguments):
    recipe, options = train.parse_arguments(arguments)
    assert recipe.epochs == 3
    assert options.lr_max == 0.25
    assert options.command == "train.py --epochs 3 --lr-max 0.25 --output 'two words.json'"


@pytest.mark.parametrize("arguments, sentence", [
    ("--batch-size 99 --subset 50", "batch_size must be an integer from 2 to 50, got 99"),
    ("--batch-size 41 --subset 50 --holdout 10", "integer from 2 to 40, got 41"),
    ("--epochs -1", "epochs must be an integer from 0 to 100000, got -1"),
    ("--seed -1", "seed must be an integer from 0 to 4294967295, got -1"),
    ("--seed 4294967295 --runs 2", "seed must be an integer from 0 to 4294967294, got"),
    ("--runs 0", "runs must be an integer from 1 to 1000, got 0"),
    ("--subset 4", "subset must be an integer from 5 to 50000, got 4"),
    ("--subset 9 --holdout 8", "holdout must be an integer from 0 to 7, got 8"),
    ("--lr-max 0", "lr_max must be a number from 1e-30 to 1e+30, got 0.0"),
    ("--lr-max nan", "lr_max must be a number from 1e-30 to 1e+30, got nan"),
    ("--lr-min 0.1 --lr-max 0.01", "lr_min must be a number from 1e-30 to 0.01, got 0.1"),
    ("--optimizer muon --l2 0.1", "l2 must be 0 with optimizer muon"),
    ("--muon-lr-factor 2",
     "muon_lr_factor is for the optimizer muon, but that of this run is adam"),
    ("--recipe best --optimizer adam --first-convolution adam",
     "first_convolution is for the optimizer muon, but that of this run is adam"),
    ("--flips never", "--flips: invalid choice: 'never'"),
    ("--cutout 8.5", "--cutout: invalid int value: '8.5'"),
    ("--device tpu", "--device: invalid choice: 'tpu'"),
    ("--device cuda", "device must be auto or what PyTorch finds here (cpu), got cuda"),
    ("--checkpoint new/", "the name of a file must not end in a slash, got new/"),
    ("--checkpoint run.json", "must be different files, got run.json, run.json"),
    ("--output same --checkpoint x/../same", "must be different files"),
    ("--weights a --output a", "must be different files"),
])
def test_nonsense_ends_with_one_sentence_and_no_files(
        tmp_path, capsys, monkeypatch, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: train.py")
    assert sentence in message.splitlines()[-1]
    assert os.listdir(tmp_path) == []


def test_the_device_of_the_options_is_that_of_the_run(quick_workplace, monkeypatch):
    asked = []

    def choose_device(device):
        asked.append(device)
        return "cpu"

    monkeypatch.setattr(train, "choose_device", choose_device)
    quick_workplace.run("--epochs", 0, *RATES)
    assert asked == ["cpu", "cpu"]  # for the options and for the run


def test_report_and_screen_say_that_images_were_held_out(quick_workplace, capsys):
    data = quick_workplace.run("--epochs", 1, "--holdout", 10, *RATES)["data"]
    assert data["evaluated_on"] == "held-out training images"
    assert (data["train_images"], data["test_images"]) == (90, 10)
    screen = capsys.readouterr().out
    assert "of 50, 10 held-out training images\n" in screen
    assert re.search("^final .*% of the held-out training images, ", screen, re.MULTILINE)


def test_the_precision_may_be_chosen(quick_workplace):
    report = quick_workplace.run("--epochs", 0, "--precision", "fp16", *RATES)
    assert report["environment"]["precision"] == "fp16"  # "auto" never takes this on a CPU


@pytest.mark.parametrize("precision, searches", [("fp32", True), ("fp16", True), ("bf16", False)])
def test_cudnn_searches_for_fast_kernels_except_in_bf16(precision, searches):
    torch.backends.cudnn.benchmark = not searches
    small_run(model=linear_network, precision=precision)
    assert torch.backends.cudnn.benchmark == searches


def test_a_batch_size_of_0_may_be_asked_for():
    recipe, _ = train.parse_arguments(["--batch-size", 0])
    assert recipe.batch_size == 0


def test_the_screen_calls_an_l2_term_by_its_name(quick_workplace, capsys):
    quick_workplace.run("--epochs", 1, "--l2", 0.1, *RATES)
    assert "LRMAX 0.01 at epoch 0.208 of 1, L2 term 0.1\n" in capsys.readouterr().out


def test_a_lowest_rate_above_the_peak_that_was_found_is_refused(workplace, monkeypatch):
    monkeypatch.setattr(train, "find_rates", lambda run, on_step: train.Rates(1e-4, 0.03))
    message = workplace.fail("--lr-min", 0.5)
    assert message.startswith("--lr-min 0.5 is above LRMAX 0.03")
    assert "a lower --lr-min" in message
    assert message.endswith("--lr-max 0.03 skips the sweep.")


# ---- The first look: the sample, few images, the download ------------------------------

def md5_of(values):
    """Return the checksum of a tensor's values in memory."""
    return hashlib.md5(values.contiguous().numpy().tobytes()).hexdigest()


def test_the_sample_holds_the_first_images_of_the_data_set():
    training, test, classes = train.load_sample()
    assert [len(values) for values in (*training, *test)] == [2000, 2000, 400, 400]
    assert training.labels.dtype == test.labels.dtype == torch.long
    assert classes == CLASSES
    # The checksums of the same rows in the official files, with labels as 64-bit integers.
    assert md5_of(training.images.permute(0, 2, 3, 1)) == "1a208dad31c9392ef83b3d32bb2030db"
    assert md5_of(training.labels) == "1a887becff7c3f16b56e4489b315f060"
    assert md5_of(test.images.permute(0, 2, 3, 1)) == "d435b728f0fe28855929b8ef0ec83da8"
    assert md5_of(test.labels) == "780cbea43788138efd31b1488c5b6904"


@pytest.mark.parametrize("arguments, sample, serves", [
    (["--subset"], train.SAMPLE, True), (["--subset", 50], train.SAMPLE, True),
    (["--subset", 2001], train.SAMPLE, False), ([], train.SAMPLE, False),
    (["--data-dir", "there"], train.SAMPLE, False), (["--subset"], Path("nowhere"), False)])
def test_the_sample_serves_where_it_is_enough(
        monkeypatch, capsys, arguments, sample, serves):
    whole = train.load_sample()
    asked_folders = []

    def load_cifar10(folder):
        asked_folders.append(folder)
        return whole

    monkeypatch.setattr(train, "load_cifar10", load_cifar10)
    monkeypatch.setattr(train, "SAMPLE", sample)
    _, options = train.parse_arguments(arguments)
    training, _, classes = train.load_data(options)
    assert asked_folders == ([] if serves else [options.data_dir])
    assert ("sample.npz" in capsys.readouterr().out) == serves
    assert len(training.images) == (50 if 50 in arguments else 2000)
    assert classes == CLASSES


@pytest.mark.parametrize("asked, images, batch_size", [
    (0, 50_000, 512), (0, 5000, 156), (0, 2000, 62), (0, 1000, 31), (0, 100, 16), (0, 12, 16),
    (512, 2000, 512)])
def test_few_images_take_smaller_batches_unless_a_size_is_asked_for(asked, images, batch_size):
    recipe = train.fill_in_batch_size(Recipe(batch_size=asked), images)
    assert recipe.batch_size == batch_size


def test_a_run_chooses_the_batch_size_for_its_images():
    assert small_run(Recipe(batch_size=0), 70, model=linear_network).recipe.batch_size == 16


def is_whole(loaded):
    """Tell whether what `load_cifar10` returned is the small data of the workplace."""
    training, test, classes = loaded
    files = [easy_images(number) for number in range(6)]
    rows = np.concatenate([file["data"] for file in files])  # red, then green, then blue
    labels = np.concatenate([file["labels"] for file in files])
    images = torch.from_numpy(rows.reshape(120, 3, 32, 32))
    return (torch.equal(torch.cat([training.images, test.images]), images)
            and torch.cat([training.labels, test.labels]).tolist() == labels.tolist()
            and classes == CLASSES)


@pytest.fixture
def archive(workplace, monkeypatch):
    """Return the path of an archive of the small data, which CIFAR10 accepts."""
    path = Path("archive", CIFAR10.filename)
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        tar.add(Path("data", CIFAR10.base_folder), CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(path.read_bytes()).hexdigest())
    return path


@pytest.fixture
def server(archive, monkeypatch):
    """Let CIFAR-10's address be that of a local server, which has the archive."""
    command = [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"]
    with subprocess.Popen(command, cwd=archive.parent, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL) as process:
        port = re.search(r"port (\d+)", process.stdout.readline())[1]
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/{archive.name}")
        yield
        process.kill()


def put_archive(folder, content):
    """Put a file with this content into a folder, where the archive belongs."""
    path = Path(folder, CIFAR10.filename)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_data_set_that_is_missing_is_downloaded_and_announced(server, capsys):
    assert is_whole(train.load_cifar10("new/data"))
    announced = capsys.readouterr().out
    assert f"download CIFAR-10 (170 MB) from {CIFAR10.url} to new/data" in announced


def test_half_an_archive_is_downloaded_again(server):
    put_archive("by-hand", b"half an archive")
    assert is_whole(train.load_cifar10("by-hand"))


def test_an_archive_put_there_by_hand_is_unpacked(archive, capsys):
    put_archive("by-hand", archive.read_bytes())
    assert is_whole(train.load_cifar10("by-hand"))
    assert "download" not in capsys.readouterr().out


@pytest.mark.parametrize("has_sample", [True, False])
def test_a_damaged_archive_without_network_stays_and_is_named_in_a_sentence(
        workplace, monkeypatch, has_sample):
    monkeypatch.setattr(train, "SAMPLE", SCRIPT if has_sample else Path("nowhere"))
    archive = put_archive("by-hand", b"half an archive")
    with pytest.raises(train.UserError, match="^could not get CIFAR-10") as error:
        train.load_cifar10("by-hand")
    message = str(error.value)
    assert f"Put a whole copy of {CIFAR10.url} at {archive}" in message
    assert "the folder that has CIFAR-10 with --data-dir" in message
    hint = "\nA first look needs no download: python train.py --subset"
    assert message.endswith(hint) == has_sample
    assert archive.read_bytes() == b"half an archive"


def damage_file(name):
    """Change one byte of a file of the data set."""
    path = Path("data", CIFAR10.base_folder, name)
    path.write_bytes(path.read_bytes()[:-1] + b"!")


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_file_is_mended_from_the_archive(archive, name):
    put_archive("data", archive.read_bytes())
    damage_file(name)
    assert is_whole(train.load_cifar10("data"))


def test_a_whole_folder_is_read_without_a_lock_or_a_new_file(workplace, monkeypatch):
    monkeypatch.setattr(train, "FileLock", raiser(PermissionError(13, "it is read-only")))
    before = sorted(Path("data").rglob("*"))
    assert is_whole(train.load_cifar10("data"))
    assert sorted(Path("data").rglob("*")) == before


def test_a_run_that_needs_the_data_waits_for_the_download_of_another(workplace):
    """Its own download would fail, because nothing listens at the address."""
    Path("new").mkdir()
    loaded = []
    thread = threading.Thread(target=lambda: loaded.append(train.load_cifar10("new")))
    with train.FileLock("new/cifar-10.lock"):
        thread.start()
        thread.join(timeout=0.5)
        assert thread.is_alive()
        shutil.copytree("data", "new", dirs_exist_ok=True)  # the other download
    thread.join(timeout=20)
    assert is_whole(loaded[0])


def test_a_download_has_a_timeout_of_30_seconds_of_its_own(tmp_path, monkeypatch):
    timeouts = []

    def download(*arguments, **options):
        timeouts.append(socket.getdefaulttimeout())
        raise OSError("timed out")

    monkeypatch.setattr(train, "download_and_extract_archive", download)
    with pytest.raises(train.UserError, match="timed out"):
        train.load_cifar10(tmp_path)
    assert timeouts == [30]
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("folder", ["data", f"data/{CIFAR10.base_folder}"])
def test_the_data_folder_may_be_the_one_in_it_that_has_the_files(workplace, folder):
    assert is_whole(train.load_cifar10(folder))


# ---- When things go wrong --------------------------------------------------------------

@pytest.mark.parametrize("error, status", [
    (KeyboardInterrupt(), "interrupted"), (RuntimeError("illegal access"), "failed")])
def test_main_raises_an_error_as_it_is_and_the_report_has_its_kind(
        workplace, monkeypatch, error, status):
    monkeypatch.setattr(train, "train_step", raiser(error))
    with pytest.raises(type(error)) as raised:
        workplace.run("--epochs", 1, *RATES)
    assert raised.value is error
    assert workplace.report()["summary"]["status"] == status


WITHOUT_MEMORY = "out of memory. Try a smaller --batch-size."


@pytest.mark.parametrize("error, sentence", [
    (train.UserError("a sentence"), "a sentence"), (OSError("a sentence"), "a sentence"),
    (MemoryError(), WITHOUT_MEMORY),
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), WITHOUT_MEMORY),
    (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to"), WITHOUT_MEMORY),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), WITHOUT_MEMORY)])
def test_a_process_ends_with_an_expected_error_as_a_sentence(
        monkeypatch, usual_signals, error, sentence):
    monkeypatch.setattr(train, "main", raiser(error))
    with pytest.raises(SystemExit) as stop:
        train.run_process()
    assert stop.value.code == f"error: {sentence}"


def test_the_error_of_pytorch_without_memory_is_recognized():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**62, dtype=torch.uint8)
    assert train.is_out_of_memory(error.value)


def test_a_process_shows_an_unexpected_error_with_its_traceback(monkeypatch, usual_signals):
    monkeypatch.setattr(train, "main", raiser(RuntimeError("illegal memory access")))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train.run_process()


ONE_EPOCH = ["train.py", *SMALL, *REPORT, *RATES, "--epochs", "1"]


@pytest.mark.parametrize("has_output", [True, False])
def test_a_process_needs_no_terminal_and_no_standard_output(
        quick_workplace, monkeypatch, usual_signals, has_output):
    written = []
    plain_output = SimpleNamespace(write=written.append, flush=lambda: None)
    monkeypatch.setattr(sys, "argv", ONE_EPOCH)
    monkeypatch.setattr(sys, "stdout", plain_output if has_output else None)
    train.run_process()
    assert quick_workplace.report()["summary"]["status"] == "complete"
    assert ("report   run.json" in "".join(written)) == has_output


# ---- The notebook and the README -------------------------------------------------------

NEXT_CELL = """\
accuracy = epochs = lr = recipe = report = run = start = 10
options = ["--device", "cpu", "--epochs", 1, "--subset", 20, "--lr-max", 0.01]
main(options)["summary"]["status"], epochs, IS_PASTED
"""


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Return the cells of a notebook after it ran: data, train.py, the next cell, %run."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    folder = tmp_path_factory.mktemp("notebook")
    attributes = write_cifar10(folder / "data" / CIFAR10.base_folder)
    del attributes["train_list"][1:]  # 20 images, because the network is large
    small_data = Workplace(folder, attributes).small_data
    data = (f"__file__ = 'cell.py'  # as in VS Code\n{small_data}"
            "import torch\n"
            "torch.cuda.is_available = torch.backends.mps.is_available = lambda: False\n")
    sources = [data, SCRIPT.read_text(), NEXT_CELL, f"%run {SCRIPT} --help",
               f"%run -i {SCRIPT} --help"]
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    place = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, allow_errors=True, resources=place)
    client.execute()
    return notebook.cells


def printed_text(cell):
    """Return what a cell of a notebook printed."""
    printed = [output for output in cell.outputs if output.get("name") == "stdout"]
    return "".join(output.text for output in printed)


def count_pictures(cell):
    """Return how many pictures a cell of a notebook shows."""
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def test_no_cell_of_a_notebook_ends_with_an_error(notebook):
    errors = []
    for cell in notebook:
        errors += [output for output in cell.outputs if output.output_type == "error"]
    assert errors == []


def test_pasted_into_a_notebook_cell_it_runs_with_the_defaults(notebook):
    text = printed_text(notebook[1])
    assert "LRMAX" in text
    epochs = re.findall(r"[\r\n] +(\d+) ", text)
    assert epochs == [str(epoch) for epoch in range(1, 25)]
    assert "final  " in text


def test_a_notebook_shows_the_figures(notebook):
    pytest.importorskip("matplotlib")
    figures = re.findall("figure   .*-(.*).png", printed_text(notebook[1]))
    assert count_pictures(notebook[1]) == len(figures)
    # There may be no misclassified images.
    assert {"sweep", "curves", "confusion", "augmented"} <= set(figures)


def test_the_next_cell_of_a_notebook_runs_other_options_and_keeps_its_names(notebook):
    result = notebook[2].outputs[-1].data["text/plain"]
    assert result == "('complete', 10, True)"


@pytest.mark.parametrize("cell", [3, 4], ids=["%run", "%run -i"])
def test_a_notebook_can_run_the_script_as_a_file(notebook, cell):
    assert printed_text(notebook[cell]).startswith("usage: train.py")


def test_pasted_code_needs_no_file_name():
    names = {"__name__": "cell"}  # no __file__, as in Jupyter and Colab
    exec(SCRIPT.read_text(), names)
    assert names["SCRIPT"] == Path("train.py").resolve()


def test_in_a_terminals_ipython_the_script_takes_its_arguments(monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # it is only in notebooks
    names = {"__name__": "cell", "get_ipython": None}
    exec(SCRIPT.read_text(), names)
    assert not names["IS_PASTED"]


def test_the_metadata_in_the_script_names_the_requirements():
    """`uv run train.py` and `pipx run train.py` install what PEP 723's block names."""
    tomllib = pytest.importorskip("tomllib")
    pattern = r"(?m)^# /// script$\s((?:^#(?:| .*)$\s)+)^# ///$"
    block = re.search(pattern, SCRIPT.read_text())[1]
    lines = [line.removeprefix("#").removeprefix(" ") for line in block.splitlines()]
    metadata = tomllib.loads("\n".join(lines))
    requirements = (SCRIPT.parent / "requirements.txt").read_text().split()
    assert metadata["dependencies"] == [*requirements, "matplotlib"]


PAGES = ["README.md", "results/README.md"]


@pytest.mark.parametrize("name", PAGES)
def test_every_file_and_heading_that_is_linked_is_there(name):
    page = SCRIPT.parent / name
    links = re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", page.read_text())
    assert len(links) > 10
    for file, heading in links:
        target = page.parent / file if file else page
        assert target.exists(), file
        if heading:
            assert heading in heading_anchors(target), heading


def heading_anchors(page):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text().lower(), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("name", PAGES)
def test_every_command_of_the_pages_is_accepted(name):
    text = (SCRIPT.parent / name).read_text()
    commands = re.findall(r"(?:python|uv run) train\.py\b([^`'\n|]*)", text)
    assert len(commands) > 3
    for command in commands:
        arguments = shlex.split(re.sub(r"\$\w+", "1", command), comments=True)
        if "--help" not in arguments:
            train.parse_arguments(arguments)


def test_ci_runs_the_commands_with_which_the_readme_installs_and_tests():
    (command,) = [line for line in README.splitlines() if line.endswith("python -m pytest")]
    install, test = command.split(" && ")
    steps = (SCRIPT.parent / ".ci/run").read_text().splitlines()
    assert install in steps
    assert test in steps


def test_the_readme_shows_what_a_run_prints(capsys):
    shown, rest = re.search(r"```text\n(.*?)```(.*)", README, re.DOTALL).groups()
    shown = shown.replace("sweep    finds the learning rates\n", "")  # is printed in between
    path = re.search(r"\]\((results/[^)]+\.json)\)", rest)[1]
    report = json.loads((SCRIPT.parent / path).read_text())
    report["config"]["options"]["output"] = path  # where it is now
    report["continued_in"] = []  # this report is too old to have these two
    report["rates"]["note"] = None
    train.print_heading(report)
    train.print_rates(report)
    train.print_table(report)
    train.print_summary(report)
    printed = capsys.readouterr().out.splitlines()
    first_part, last_part = shown.split("    ...\n")  # the dots stand for rows
    first_lines = first_part.splitlines()
    last_lines = last_part.splitlines()
    assert printed[:len(first_lines)] == first_lines
    assert printed[-len(last_lines):] == last_lines


def shorten(snippet):
    """Return a snippet of the README with two epochs of small batches."""
    return snippet.replace("epochs=10", "epochs=2, batch_size=50")


class FakeCIFAR100:
    """Twenty images in the form of torchvision's CIFAR100."""

    def __init__(self, *arguments, **keywords):
        values = np.arange(20 * 3072) % 251
        self.data = values.astype(np.uint8).reshape(20, 32, 32, 3)
        self.targets = list(range(80, 100))
        self.classes = [str(number) for number in range(100)]


def run_snippet(snippet, names):
    """Run Python of the README with these global names. Return what it printed.

    The names have a run that has not trained. A run that the snippet leaves untrained is
    trained afterwards, so that the functions which the snippet gave to it are called.
    """
    names["run"] = small_run(Recipe(epochs=2, batch_size=8))
    names["rates"] = STEP_RATES
    code = compile(shorten(snippet), snippet, "exec")  # a traceback shows it
    with open("printed.txt", "w") as file, contextlib.redirect_stdout(file):
        exec(code, names)
    if names["run"].epoch == 0:
        list(train.train_epochs(names["run"], names["rates"]))
    return Path("printed.txt").read_text()


@pytest.fixture(scope="module")
def snippets(tmp_path_factory):
    """Run the README's Python in one namespace, one snippet after the other.

    Return what each printed, and the folder with their files.
    """
    folder = tmp_path_factory.mktemp("snippets")
    attributes = write_cifar10(folder / "data" / CIFAR10.base_folder)
    printed = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(folder)
        use_small_data(monkeypatch, attributes)
        monkeypatch.setattr("torchvision.datasets.CIFAR100", FakeCIFAR100)
        monkeypatch.setattr(train, "choose_device", lambda device: "cpu")
        monkeypatch.setattr(train, "ResNet", SmallResNet)
        train.save_weights("weights.pt", small_run(), CLASSES)
        TF.to_pil_image(random_split(1).images[0]).save("photo.jpg")
        names = {}
        for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
            printed[snippet] = run_snippet(snippet, names)
    return SimpleNamespace(printed=printed, folder=folder)


def printed_by_snippets_with(word, snippets):
    """Return what the snippets with a word have printed. At least one has it."""
    chosen = [printed for snippet, printed in snippets.printed.items() if word in snippet]
    assert chosen
    return chosen


def test_the_snippets_that_print_epochs_print_both(snippets):
    for printed in printed_by_snippets_with('print(row["epoch"]', snippets):
        assert re.findall(r"^(\d+) 0\.\d+$", printed, re.MULTILINE) == ["1", "2"]


def test_the_snippet_with_a_hundred_classes_saves_its_weights(snippets):
    assert (snippets.folder / "cifar100.pt").is_file()


def test_the_snippet_with_saved_weights_prints_a_class(snippets):
    (printed,) = printed_by_snippets_with("load_weights", snippets)
    assert printed.split()[0] in CLASSES


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
