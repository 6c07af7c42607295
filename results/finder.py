"""Judge rules that find a learning rate in a sweep, by the accuracy that they lead to.

    python results/finder.py NAME ...   measure these cases; without NAME, all of them

A case is trained on a few images of CIFAR-10 at six fixed learning rates, on the CPU and in
fp32, so that all machines can repeat it. Its record, results/finder/CASE.json, has the
accuracies and the sweeps of several seeds. So a rule is judged afterwards, without training:
add yours to RULES in rules.py. `tables.py` makes the table of all rules and cases.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import statistics
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import rules  # noqa: E402
import studies  # noqa: E402
import train  # noqa: E402

RATIOS = (1 / 16, 1 / 4, 1 / 2, 1, 2, 4)  # the rates of a case, as multiples of its `rate`
SWEEP_SEEDS = (0, 1, 2)
HELD_OUT = 2_000  # training images that are set aside, to measure accuracy


def narrow_resnet(num_classes=10):
    """Return the custom ResNet with a quarter of the channels and PyTorch's initialization."""
    return nn.Sequential(
        train.ConvBlock(3, 16),
        train.ConvBlock(16, 32, pool=True), train.ResBlock(32),
        train.ConvBlock(32, 64, pool=True),
        train.ConvBlock(64, 128, pool=True), train.ResBlock(128),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, num_classes))


def small_vit():
    """Return a vision transformer with 4 layers of width 96, for patches of 4x4."""
    return torchvision.models.VisionTransformer(
        image_size=32, patch_size=4, num_layers=4, num_heads=4, hidden_dim=96, mlp_dim=192,
        num_classes=10)


def resnet18():
    """Return the ResNet of torchvision, which is made for larger images."""
    return torchvision.models.resnet18(num_classes=10)


def tutorial_network():
    """Return a network like that of PyTorch's first tutorial: small, without BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10))


def perceptron():
    """Return a network without convolutions."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(3072, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 10))


def small_vgg():
    """Return a network of six convolutions without shortcuts."""
    return nn.Sequential(
        train.ConvBlock(3, 32), train.ConvBlock(32, 32, pool=True),
        train.ConvBlock(32, 64), train.ConvBlock(64, 64, pool=True),
        train.ConvBlock(64, 128), train.ConvBlock(128, 128, pool=True),
        nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 10))


class Shortcut(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x):
        return x + super().forward(x)


def small_convmixer():
    """Return a ConvMixer with 4 blocks of width 96 (Trockman, Kolter, arXiv:2201.09792)."""
    layers = [nn.Conv2d(3, 96, 4, stride=4), nn.GELU(), nn.BatchNorm2d(96)]
    for _ in range(4):
        of_positions = nn.Conv2d(96, 96, 5, padding=2, groups=96)
        of_channels = nn.Conv2d(96, 96, 1)
        layers.append(Shortcut(of_positions, nn.GELU(), nn.BatchNorm2d(96)))
        layers.extend([of_channels, nn.GELU(), nn.BatchNorm2d(96)])
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class RowLSTM(nn.Module):
    """An LSTM that reads an image row by row."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(96, 128, batch_first=True)
        self.head = nn.Linear(128, 10)

    def forward(self, images):
        rows = images.permute(0, 2, 1, 3).flatten(2)  # (B, 32, 3 x 32)
        outputs, _ = self.lstm(rows)
        return self.head(outputs[:, -1])


def sixty_classes(split):
    """Return a Split of 60 classes: each of the ten, with its colors in one of six orders."""
    orders = torch.tensor(list(itertools.permutations(range(3))))
    chosen = torch.arange(len(split.labels)) % 6
    image_index = torch.arange(len(split.labels))[:, None]
    return train.Split(split.images[image_index, orders[chosen]], 6 * split.labels + chosen)


def nesterov(parameters):
    return torch.optim.SGD(parameters, lr=1, momentum=0.9, nesterov=True, weight_decay=5e-4)


def plain_sgd(parameters):
    return torch.optim.SGD(parameters, lr=1)


def rmsprop(parameters):
    return torch.optim.RMSprop(parameters, lr=1)


@dataclasses.dataclass
class Case:
    """What is trained.

    The record of a case does not hold these values. So measure the case anew after a change
    here, or in a recipe that it uses.
    """
    rate: float  # RATIOS times this are the learning rates
    images: int = 2_000
    batch_size: int = 62
    epochs: int = 4
    recipe: train.Recipe = train.Recipe()
    model: Callable | None = None  # None: the built-in network
    optimizer: Callable | None = None  # None: the recipe's
    num_classes: int = 10
    relabel: Callable | None = None  # gives a Split other classes
    seeds: tuple = (0, 1)  # of the training runs; one where they take long


AdamW = torch.optim.AdamW  # with PyTorch's epsilon, 1e-8
# Our rule was chosen on these, in the order in which they were measured.
CHOICE_CASES = {
    "narrow": Case(rate=0.06, model=narrow_resnet),
    "narrow-adamw": Case(rate=0.016, model=narrow_resnet, optimizer=AdamW),
    "narrow-plain": Case(rate=0.016, model=narrow_resnet, recipe=train.RECIPES["plain"]),
    "narrow-muon": Case(rate=0.04, model=narrow_resnet,
                        recipe=train.Recipe(optimizer="muon")),
    "narrow-nesterov": Case(rate=0.05, model=narrow_resnet, optimizer=nesterov),
    "narrow-sgd": Case(rate=0.06, model=narrow_resnet, optimizer=plain_sgd),
    "vit": Case(rate=0.004, images=2_500, model=small_vit, optimizer=AdamW),
    "recipe": Case(rate=0.06, epochs=3, seeds=(0,)),
    "narrow-adamw-128": Case(rate=0.016, images=10_000, batch_size=128, epochs=3, seeds=(0,),
                             model=narrow_resnet, optimizer=AdamW),
    "resnet18": Case(rate=0.05, images=2_500, model=resnet18, optimizer=nesterov),
    "narrow-8-epochs": Case(rate=0.03, epochs=8, model=narrow_resnet),
    "narrow-nesterov-256": Case(rate=0.03, images=5_000, batch_size=256, epochs=6, seeds=(0,),
                                model=narrow_resnet, optimizer=nesterov),
    "narrow-60-classes": Case(rate=0.03, images=4_000, num_classes=60, relabel=sixty_classes,
                              model=functools.partial(narrow_resnet, 60)),
    "tutorial": Case(rate=0.05, images=2_500, epochs=8, model=tutorial_network,
                     optimizer=nesterov),
    "perceptron": Case(rate=0.004, images=2_500, model=perceptron, optimizer=AdamW),
    "narrow-1-epoch": Case(rate=0.03, epochs=1, model=narrow_resnet),
    "narrow-adamw-16-epochs": Case(rate=0.016, epochs=16, model=narrow_resnet,
                                   optimizer=AdamW),
    "narrow-rmsprop": Case(rate=0.008, model=narrow_resnet, optimizer=rmsprop),
    "recipe-muon": Case(rate=0.06, epochs=3, seeds=(0,), recipe=dataclasses.replace(
        train.RECIPES["fast"], first_convolution="muon")),
    "perceptron-nesterov": Case(rate=0.05, images=2_500, model=perceptron,
                                optimizer=nesterov),
    "vit-nesterov": Case(rate=0.1, images=2_500, model=small_vit, optimizer=nesterov),
    "resnet18-adamw": Case(rate=0.004, images=2_500, model=resnet18, optimizer=AdamW),
}
# These were chosen, and measured, after the rule was.
TEST_CASES = {
    "narrow-2-epochs": Case(rate=0.03, epochs=2, model=narrow_resnet),
    "narrow-24-epochs": Case(rate=0.03, epochs=24, seeds=(0,), model=narrow_resnet),
    "vit-12-epochs": Case(rate=0.004, images=2_500, epochs=12, seeds=(0,), model=small_vit,
                          optimizer=AdamW),
    "resnet18-6-epochs": Case(rate=0.05, images=2_500, epochs=6, model=resnet18),
    "perceptron-16-epochs": Case(rate=0.004, images=2_500, epochs=16, model=perceptron,
                                 optimizer=AdamW),
    "narrow-adamw-256": Case(rate=0.016, images=10_000, batch_size=256, epochs=5, seeds=(0,),
                             model=narrow_resnet, optimizer=AdamW),
    # These were chosen after those above were measured. The rule stayed as it was.
    "vgg": Case(rate=0.03, model=small_vgg),
    "vgg-nesterov": Case(rate=0.05, model=small_vgg, optimizer=nesterov),
    "convmixer": Case(rate=0.008, images=2_500, model=small_convmixer, optimizer=AdamW),
    "convmixer-nesterov": Case(rate=0.1, images=2_500, model=small_convmixer,
                               optimizer=nesterov),
    "lstm": Case(rate=0.008, images=2_500, model=RowLSTM, optimizer=AdamW),
    "resnet18-sgd": Case(rate=0.1, images=2_500, seeds=(0,), model=resnet18,
                         optimizer=plain_sgd),
    "narrow-muon-8-epochs": Case(rate=0.04, epochs=8, seeds=(0,), model=narrow_resnet,
                                 recipe=train.Recipe(optimizer="muon")),
    "narrow-nesterov-12-epochs": Case(rate=0.05, epochs=12, seeds=(0,), model=narrow_resnet,
                                      optimizer=nesterov),
}
CASES = {**CHOICE_CASES, **TEST_CASES}
SUMMARIES = (  # the last rows of the table: a title, what is computed, and of which cases
    (f"mean of the first {len(CHOICE_CASES)}", np.mean, CHOICE_CASES),
    (f"worst of the first {len(CHOICE_CASES)}", np.max, CHOICE_CASES),
    (f"mean of the last {len(TEST_CASES)}", np.mean, TEST_CASES),
    (f"worst of the last {len(TEST_CASES)}", np.max, TEST_CASES),
    (f"mean of all {len(CASES)}", np.mean, CASES),
)


# ---- Measuring a case --------------------------------------------------------------------

def recipe_of(case):
    """Return the recipe of a case, with the case's epochs and batch size."""
    return dataclasses.replace(case.recipe, epochs=case.epochs, batch_size=case.batch_size)


def start(case, training, held_out, seed):
    """Return a Run of a case."""
    run = train.start_run(
        recipe_of(case), training, held_out, seed, device="cpu", precision="fp32",
        model=case.model, num_classes=case.num_classes)
    if case.optimizer:
        run.optimizer = case.optimizer(run.model.parameters())
    return run


def run_sweep(run):
    """Sweep with a run. Return its seed, and the learning rates and losses of the steps."""
    lrs = []
    losses = []

    def note_step(step, steps, lr, loss):
        lrs.append(lr)
        losses.append(loss.item())

    # train.py may find no rate, or warn. The sweep is recorded all the same.
    with contextlib.suppress(train.UserError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train.find_rates(run, note_step)
    return {"seed": run.seed, "lr": lrs, "loss": losses}


def final_accuracy(case, run, lr_max):
    """Train with LRMAX `lr_max`; return the last accuracy, or that of chance if it diverges."""
    rates = train.Rates(lr_max / train.LR_RATIO, lr_max)
    try:
        *_, last = train.train_epochs(run, rates)
    except train.Diverged:
        return 1 / case.num_classes
    return last["test_accuracy"]


def record_path(name):
    """Return the file of a case's record."""
    return HERE / "finder" / f"{name}.json"


def load_record(name):
    return json.loads(record_path(name).read_text())


def measure(name, data_dir, with_training=True):
    """Sweep and train a case, and write its record.

    Without `with_training`, the trainings of the old record stay.
    """
    case = CASES[name]
    training, held_out = studies.split_training_images(data_dir, case.images, HELD_OUT)
    if case.relabel:
        training = case.relabel(training)
        held_out = case.relabel(held_out)
    record = {} if with_training else load_record(name)
    record["sweeps"] = []
    for seed in SWEEP_SEEDS:
        run = start(case, training, held_out, seed)
        record["sweeps"].append(run_sweep(run))
    record["environment_of_sweeps"] = train.describe_environment(run)
    if with_training:
        record["environment"] = record["environment_of_sweeps"]
        record["runs"] = []
        for ratio in RATIOS:
            for seed in case.seeds:
                run = start(case, training, held_out, seed)
                accuracy = final_accuracy(case, run, case.rate * ratio)
                record["runs"].append(
                    {"seed": seed, "lr_max": case.rate * ratio, "accuracy": accuracy})
                print(name, record["runs"][-1], flush=True)
    studies.write_record(record_path(name), record)


# ---- Judging the rules -------------------------------------------------------------------

def mean_accuracies(record):
    """Return the rates of a case, in rising order, and the mean accuracy at each."""
    accuracies = {}
    for run in record["runs"]:
        accuracies.setdefault(run["lr_max"], []).append(run["accuracy"])
    rates = sorted(accuracies)
    return rates, [statistics.fmean(accuracies[rate]) for rate in rates]


def picked_rates(name, rule):
    """Return the LRMAX that a rule picks in each sweep of a case."""
    case = CASES[name]
    steps = 0
    if case.optimizer is None or train.is_adam(case.optimizer([nn.Parameter(torch.zeros(1))])):
        steps = rules.count_adam_steps(recipe_of(case), case.images)
    sweeps = load_record(name)["sweeps"]
    return [rule(sweep["lr"], sweep["loss"], steps) for sweep in sweeps]


def judge(name, rule):
    """Judge a rule by a case. Return two results for the rates that it picks.

    The first is how many points of accuracy the rule loses against the best rate of the case.
    Between two rates, the accuracy is interpolated over the logarithm of the rate. Below the
    lowest and above the highest one, it is that of the nearest one. The second is whether the
    rule picks a rate below the lowest or above the highest one.
    """
    rates, accuracies = mean_accuracies(load_record(name))
    picked = picked_rates(name, rule)
    reached = np.interp(np.log(picked), np.log(rates), accuracies)
    lost = max(0.0, 100 * (max(accuracies) - reached.mean()))  # never -0.0
    is_beyond = min(picked) < rates[0] or max(picked) > rates[-1]
    return lost, is_beyond


def table_of_cases():
    """Return the table of the points that each rule loses in each case, as lists of texts.

    A star says that a rule picks a rate beyond the measured ones.
    """
    rows = [["case", "best rate", "LRMAX", *rules.RULES]]
    points = {}  # for each case, what each rule loses
    for name in CASES:
        rates, accuracies = mean_accuracies(load_record(name))
        best = rates[int(np.argmax(accuracies))]
        picked = picked_rates(name, rules.ours)
        points[name] = []
        cells = []
        for rule in rules.RULES.values():
            lost, is_beyond = judge(name, rule)
            points[name].append(lost)
            cells.append(f"{lost:.1f}*" if is_beyond else f"{lost:.1f}")
        rows.append([name, f"{best:.3g}", studies.span(picked, "{:.2g}"), *cells])
    for title, summarize, cases in SUMMARIES:
        summary = summarize([points[name] for name in cases], axis=0)
        rows.append([title, "", "", *(f"{value:.1f}" for value in summary)])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweeps", action="store_true", help="renew the sweeps alone")
    options = studies.parse_names(parser, CASES)
    for name in options.names:
        measure(name, options.data_dir, with_training=not options.sweeps)


if __name__ == "__main__":
    main()
