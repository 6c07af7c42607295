"""Judge rules that read a learning rate off a sweep, by the accuracy that they lead to.

    python results/finder.py CASE ...   measure these cases; without CASE, all of them

A case is trained on a few images of CIFAR-10 at six fixed learning rates. Its record,
results/finder/CASE.json, has the accuracies and the sweeps of several seeds. So a rule is
judged afterwards, without training.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402

RATIOS = (1 / 16, 1 / 4, 1 / 2, 1, 2, 4)  # the rates of a case, as multiples of its `rate`
SEEDS = (0, 1)  # of the training runs
SWEEP_SEEDS = (0, 1, 2, 3)
HELD_OUT = 2_000  # training images that are set aside, to measure accuracy


def narrow_resnet():
    """Return the custom ResNet with a quarter of the channels and PyTorch's initialization."""
    return nn.Sequential(
        train.ConvBlock(3, 16),
        train.ConvBlock(16, 32, pool=True), train.ResBlock(32),
        train.ConvBlock(32, 64, pool=True),
        train.ConvBlock(64, 128, pool=True), train.ResBlock(128),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 10))


def small_vit():
    """Return a vision transformer with 4 layers of width 96, for patches of 4x4."""
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=4, num_heads=4, hidden_dim=96, mlp_dim=192,
        num_classes=10)


def resnet18():
    """Return the ResNet of torchvision, which is made for larger images."""
    return torchvision.models.resnet18(num_classes=10)


def nesterov(parameters):
    return torch.optim.SGD(parameters, lr=1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=1)


@dataclasses.dataclass
class Case:
    """What is trained, and `rate`, the middle of the learning rates at which it is."""
    rate: float
    images: int = 2_000
    batch_size: int = 62
    epochs: int = 4
    recipe: train.Recipe = train.Recipe()
    model: Callable | None = None  # None: the built-in network
    optimizer: Callable | None = None  # None: the recipe's


AdamW = torch.optim.AdamW  # with PyTorch's epsilon, 1e-8
MUON = train.Recipe(optimizer="muon")
PLAIN = train.RECIPES["plain"]  # its Adam has the epsilon 1e-8, too
CASES = {
    "recipe": Case(rate=0.06, epochs=3),
    "adamw": Case(rate=0.008, images=1_500, epochs=3, optimizer=AdamW),
    "narrow": Case(rate=0.06, model=narrow_resnet),
    "narrow-512": Case(rate=0.06, images=10_000, batch_size=512, model=narrow_resnet),
    "narrow-adamw": Case(rate=0.016, model=narrow_resnet, optimizer=AdamW),
    "narrow-adamw-128": Case(rate=0.016, images=10_000, batch_size=128, epochs=3,
                             model=narrow_resnet, optimizer=AdamW),
    "narrow-plain": Case(rate=0.016, recipe=PLAIN, model=narrow_resnet),
    "narrow-muon": Case(rate=0.04, recipe=MUON, model=narrow_resnet),
    "narrow-nesterov": Case(rate=0.05, model=narrow_resnet, optimizer=nesterov),
    "narrow-sgd": Case(rate=0.06, model=narrow_resnet, optimizer=plain_sgd),
    "vit": Case(rate=0.004, images=2_500, model=small_vit, optimizer=AdamW),
    "resnet18": Case(rate=0.05, images=2_500, model=resnet18, optimizer=nesterov),
}


def start(case, training, held_out, seed):
    """Return a Run of a case."""
    recipe = dataclasses.replace(case.recipe, epochs=case.epochs, batch_size=case.batch_size)
    run = train.start_run(recipe, training, held_out, seed, model=case.model)
    if case.optimizer:
        run.optimizer = case.optimizer(run.model.parameters())
    return run


def sweep(run):
    """Return the learning rates and losses of a sweep."""
    lrs = []
    losses = []

    def record(step, steps, lr, loss):
        lrs.append(lr)
        losses.append(loss.item())

    try:
        train.find_rates(run, record)
    except train.UserError:  # the rule of train.py found nothing; the sweep is there
        pass
    return {"seed": run.seed, "lr": lrs, "loss": losses}


def final_accuracy(run, lr_max):
    """Train with LRMAX `lr_max`; return the last accuracy, or that of chance if it diverges."""
    rates = train.Rates(lr_max / train.LR_RATIO, lr_max)
    try:
        *_, last = train.train_epochs(run, rates)
    except train.Diverged:
        return 0.1
    return last["test_accuracy"]


def measure(name, data_dir):
    """Sweep and train a case, and write its record."""
    case = CASES[name]
    training, _, _ = train.load_cifar10(data_dir)
    held_out = train.take_images(training, slice(-HELD_OUT, None))
    training = train.take_images(training, slice(case.images))
    sweeps = [sweep(start(case, training, held_out, seed)) for seed in SWEEP_SEEDS]
    runs = []
    for ratio in RATIOS:
        for seed in SEEDS:
            run = start(case, training, held_out, seed)
            accuracy = final_accuracy(run, case.rate * ratio)
            runs.append({"seed": seed, "lr_max": case.rate * ratio, "accuracy": accuracy})
            print(name, runs[-1], flush=True)
    record = {"environment": train.describe_environment(run), "sweeps": sweeps, "runs": runs}
    path = HERE / "finder" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), metavar="CASE")
    parser.add_argument("--data-dir", default=HERE.parent / "data")
    options = parser.parse_args()
    for name in options.cases:
        measure(name, options.data_dir)


if __name__ == "__main__":
    main()
