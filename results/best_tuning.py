"""Tune a recipe of 24 epochs with Muon, on a network with half the channels.

    python results/best_tuning.py NAME ...     train these runs; without NAME, all of them

The network is trained on the first training images of CIFAR-10 and evaluated on the last
15,000, on the CPU and in fp32, so that all machines can repeat it. The whole network on 50,000
images learns nearly all of them by heart. A smaller network on fewer images does, too, so it
should need as much regularization. Each run keeps several moving averages (EMA) of its weights.
"""

import copy
import dataclasses
import sys
from pathlib import Path

from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import studies  # noqa: E402
import train  # noqa: E402

HELD_OUT = 15_000
EPOCHS = 24
LR_MAX = 0.06  # Adam's

# What was tried: for each seed, the values of these names. `images` are for training.
VALUE_NAMES = ("images", "muon_lr", "cutout", "padding", "label_smoothing")
VALUES_OF_SEEDS = {
    0: (8_000, 0.05, 8, 4, 0.2),
    3: (8_000, 0.05, 8, 2, 0.1),
    6: (8_000, 0.05, 12, 4, 0.1),
    2: (8_000, 0.1, 8, 4, 0.1),
    4: (8_000, 0.1, 12, 4, 0.2),
    7: (8_000, 0.1, 12, 2, 0.1),
    8: (8_000, 0.2, 8, 4, 0.1),
    9: (8_000, 0.1, 0, 4, 0.1),
    10: (25_000, 0.1, 8, 4, 0.2),
    11: (25_000, 0.2, 8, 4, 0.2),
}
RUNS = {f"seed{seed}": dict(zip(VALUE_NAMES, values))
        for seed, values in VALUES_OF_SEEDS.items()}
STUDY = studies.Study("best-tuning", RUNS, seeds=list(VALUES_OF_SEEDS))
EMA_EPOCHS = (0.25, 0.5, 1.0)


class HalfResNet(train.ResNet):
    """The custom ResNet with half the channels in all layers but the first.

    The first one needs its 64 channels to whiten the patches of an image.
    """

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(train.ConvBlock(64, 64, pool=True), train.ResBlock(64))
        self.layer2 = train.ConvBlock(64, 128, pool=True)
        self.layer3 = nn.Sequential(train.ConvBlock(128, 256, pool=True), train.ResBlock(256))
        self.head = nn.Linear(256, 10)
        train.pass_input_on(self)


def with_average(run, ema_epochs):
    """Return a run that shares its model with `run`, but has another moving average."""
    recipe = dataclasses.replace(run.recipe, ema_epochs=ema_epochs)
    return dataclasses.replace(run, recipe=recipe, averaged=copy.deepcopy(run.averaged))


def train_run(values, training, held_out, seed):
    """Train with the values of a run. Return its record."""
    training = train.take_images(training, slice(values["images"]))
    recipe = train.Recipe(
        epochs=EPOCHS, optimizer="muon", muon_lr_factor=values["muon_lr"] / LR_MAX,
        cutout=values["cutout"], label_smoothing=values["label_smoothing"],
        padding=values["padding"])
    # After each epoch, a few images are enough.
    run = train.start_run(recipe, training, train.take_images(held_out, slice(1000)), seed,
                          device="cpu", precision="fp32", model=HalfResNet)
    train.whiten_patches(run.model, run.training.images[:1000])
    averages = [with_average(run, ema_epochs) for ema_epochs in EMA_EPOCHS]
    steps_taken = 0

    def update_averages(step, steps, lr, loss):
        nonlocal steps_taken
        steps_taken += 1
        for average in averages:
            train.update_average(average, steps_taken)

    rates = train.Rates(LR_MAX / train.LR_RATIO, LR_MAX)
    rows = list(train.train_epochs(run, rates, update_averages))
    test = train.prepare_images(held_out, run.mean, run.std, run.device, run.dtype)
    results = []
    for average in averages:
        average.test = test
        plain = train.evaluate_run(average)
        with_tta = train.evaluate_run(average, tta=True)
        results.append({
            "ema_epochs": average.recipe.ema_epochs,
            "accuracy": plain["test_accuracy"],
            "loss": plain["test_loss"],
            "tta_accuracy": with_tta["test_accuracy"],
        })
    return {
        "values": values,
        "seed": seed,
        "averages": results,
        "train_accuracies": [row["train_accuracy"] for row in rows],
        "accuracies_of_1000": [row["test_accuracy"] for row in rows],
        "train_seconds": run.seconds,
        "environment": train.describe_environment(run),
    }


def table_of_runs():
    """Return the table of all runs: a list of rows, which are lists of texts."""
    averages = [f"EMA {ema_epochs:g}" for ema_epochs in EMA_EPOCHS]
    rows = [["training images", "Muon's highest rate", "cutout", "padding", "label smoothing",
             "accuracy in training", *averages, "flip TTA, EMA 0.5"]]
    for record in STUDY.load_records():
        values = record["values"]
        rows.append([
            f"{values['images']:,}", f"{values['muon_lr']:g}", f"{values['cutout']}",
            f"{values['padding']}", f"{values['label_smoothing']:g}",
            f"{100 * record['train_accuracies'][-1]:.1f}",
            *(f"{100 * average['accuracy']:.2f}" for average in record["averages"]),
            f"{100 * record['averages'][1]['tta_accuracy']:.2f}"])
    return rows


if __name__ == "__main__":
    most_images = max(values["images"] for values in RUNS.values())
    STUDY.measure(train_run, most_images, HELD_OUT, __doc__.splitlines()[0])
