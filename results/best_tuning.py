"""Tune recipes with Muon, of 24 and of 6 epochs, on a quarter of the network and the images.

    python results/best_tuning.py NAME ...     train these runs; without NAME, all of them

Half the channels make a quarter of the parameters. A quarter of the training images, in
batches of 128 instead of 512, makes as many steps as the whole data set. (Four runs have
batches of 64 or 256.) Such a run takes a tenth of the computing time. It is evaluated on the
last 15,000 training images, on the CPU, and keeps two moving averages (EMA) of its weights.
"""

import copy
import dataclasses
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import studies  # noqa: E402
import train  # noqa: E402

TRAINING_IMAGES = 12_500
HELD_OUT = 15_000
WATCHED = 1000  # of the held-out images; they are evaluated after each epoch
LR_MAX = 0.06  # Adam's

# What was tried: for each seed, the values of these names. `first_by` is the optimizer of the
# first convolution. `mixed` is the share of images that `mixed_cross_entropy` mixes.
VALUE_NAMES = ("muon_lr", "cutout", "label_smoothing", "padding", "first_by", "mixed",
               "batch_size", "epochs", "precision")
VALUES_OF_SEEDS = {
    0: (0.05, 0, 0.1, 2, "adam", 0, 128, 24, "bf16"),
    2: (0.05, 8, 0.1, 4, "muon", 0, 128, 24, "bf16"),
    3: (0.05, 8, 0.2, 2, "adam", 0, 128, 24, "bf16"),
    4: (0.1, 0, 0.1, 4, "adam", 0, 128, 24, "bf16"),
    7: (0.1, 8, 0.2, 4, "adam", 0, 128, 24, "bf16"),
    8: (0.1, 0, 0.1, 4, "adam", 0.5, 128, 24, "bf16"),
    # Like seed 2, with other batches. The rate changes with the root of their size.
    9: (0.035, 8, 0.1, 4, "muon", 0, 64, 24, "bf16"),
    10: (0.07, 8, 0.1, 4, "muon", 0, 256, 24, "bf16"),
    # Twins but for the first convolution, on a machine without bf16.
    11: (0.07, 8, 0.1, 4, "adam", 0, 256, 24, "fp32"),
    12: (0.07, 8, 0.1, 4, "muon", 0, 256, 24, "fp32"),
    # The constants of `fast`, but 14 and 17 have Muon for the first convolution.
    13: (0.1, 0, 0.2, 2, "adam", 0, 128, 6, "fp32"),
    14: (0.1, 0, 0.2, 2, "muon", 0, 128, 6, "fp32"),
    15: (0.1, 0, 0.2, 2, "adam", 0, 128, 6, "fp32"),
    17: (0.1, 0, 0.2, 2, "muon", 0, 128, 6, "fp32"),
    # Like seeds 14 and 17, but for label smoothing or Muon's rate.
    18: (0.1, 0, 0.1, 2, "muon", 0, 128, 6, "fp32"),
    19: (0.1, 0, 0.1, 2, "muon", 0, 128, 6, "fp32"),
    20: (0.14, 0, 0.2, 2, "muon", 0, 128, 6, "fp32"),
    21: (0.14, 0, 0.2, 2, "muon", 0, 128, 6, "fp32"),
    22: (0.07, 0, 0.2, 2, "muon", 0, 128, 6, "fp32"),
    23: (0.07, 0, 0.2, 2, "muon", 0, 128, 6, "fp32"),
}
RUNS = {f"seed{seed}": dict(zip(VALUE_NAMES, values, strict=True))
        for seed, values in VALUES_OF_SEEDS.items()}
STUDY = studies.Study("best-tuning", RUNS, seeds=list(VALUES_OF_SEEDS))
EMA_EPOCHS = (0.25, 0.5)  # older records also have 1.0
SHOWN_EMA_EPOCHS = 0.5


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


def mixed_cross_entropy(share, generator):
    """Return a loss that mixes a `share` of the images with others of their batch.

    A square of 16 x 16 pixels shows another image, and the loss counts its label as much as
    its part of the pixels (S. Yun et al., CutMix, arXiv:1905.04899).
    """
    size = 16

    def loss(run, images, labels):
        count, _, height, width = images.shape
        other = torch.randperm(count, generator=generator)
        top = torch.randint(height - size + 1, (count,), generator=generator)
        left = torch.randint(width - size + 1, (count,), generator=generator)
        is_mixed = torch.rand(count, generator=generator) < share
        kept = train.cut_holes(torch.ones_like(images[:, :1]), top, left, size)
        kept[~is_mixed] = 1
        logits = run.forward(torch.where(kept == 1, images, images[other]))
        options = {"reduction": "none", "label_smoothing": run.recipe.label_smoothing}
        own_losses = F.cross_entropy(logits, labels, **options)
        other_losses = F.cross_entropy(logits, labels[other], **options)
        part = kept.float().mean((1, 2, 3))
        return (part * own_losses + (1 - part) * other_losses).mean(), logits

    return loss


def start(values, training, held_out, seed):
    """Return a Run with the values of a run of the study."""
    recipe = train.Recipe(
        epochs=values["epochs"], batch_size=values["batch_size"], optimizer="muon",
        muon_lr_factor=values["muon_lr"] / LR_MAX, first_convolution=values["first_by"],
        cutout=values["cutout"], padding=values["padding"],
        label_smoothing=values["label_smoothing"])
    loss = None
    if values["mixed"]:
        loss = mixed_cross_entropy(values["mixed"], torch.Generator().manual_seed(seed))
    run = train.start_run(
        recipe, training, train.take_images(held_out, slice(WATCHED)), seed, device="cpu",
        precision=values["precision"], model=HalfResNet, loss=loss)
    train.whiten_patches(run.model, run.training.images[:1000])
    return run


def run_with_average(run, ema_epochs, test):
    """Return a run with the model of `run`, but its own moving average and test images."""
    recipe = dataclasses.replace(run.recipe, ema_epochs=ema_epochs)
    return dataclasses.replace(
        run, recipe=recipe, test=test, averaged=copy.deepcopy(run.averaged))


def evaluate_average(run):
    """Return the accuracies and the loss of a run's moving average."""
    plain = train.evaluate_run(run)
    with_tta = train.evaluate_run(run, tta=True)
    return {
        "ema_epochs": run.recipe.ema_epochs,
        "accuracy": plain["test_accuracy"],
        "loss": plain["test_loss"],
        "tta_accuracy": with_tta["test_accuracy"],
    }


def train_run(values, training, held_out, seed):
    """Train with the values of a run. Return what it measured."""
    run = start(values, training, held_out, seed)
    # Now, for the commit: train.py may be edited during the training.
    environment = train.describe_environment(run)
    test = train.prepare_images(held_out, run.mean, run.std, run.device, run.dtype)
    runs_with_averages = [run_with_average(run, ema_epochs, test) for ema_epochs in EMA_EPOCHS]

    def update_averages(step, steps, lr, loss):
        for each in runs_with_averages:
            train.update_average(each, run.epoch * steps + step)

    rates = train.Rates(LR_MAX / train.LR_RATIO, LR_MAX)
    rows = list(train.train_epochs(run, rates, update_averages))
    return {
        "averages": [evaluate_average(each) for each in runs_with_averages],
        "train_accuracies": [row["train_accuracy"] for row in rows],
        "accuracies_of_1000": [row["test_accuracy"] for row in rows],
        "train_seconds": run.seconds,
        "environment": environment,
    }


def table_of_runs():
    """Return the table of all runs: a list of rows, which are lists of texts."""
    rows = [["epochs", "Muon's highest rate", "batch size", "cutout", "label smoothing",
             "padding", "mixed images", "precision", "first convolution by",
             "accuracy in training", "accuracy", "flip TTA"]]
    for record in STUDY.load_records():
        values = record["values"]
        averages = {average["ema_epochs"]: average for average in record["averages"]}
        shown = averages[SHOWN_EMA_EPOCHS]
        rows.append([
            f"{values['epochs']}", f"{values['muon_lr']:g}", f"{values['batch_size']}",
            f"{values['cutout']}", f"{values['label_smoothing']:g}", f"{values['padding']}",
            f"{100 * values['mixed']:g}%", values["precision"], values["first_by"].title(),
            f"{100 * record['train_accuracies'][-1]:.1f}",
            studies.percent(shown["accuracy"]), studies.percent(shown["tta_accuracy"])])
    return rows


if __name__ == "__main__":
    STUDY.measure(train_run, TRAINING_IMAGES, HELD_OUT, __doc__.splitlines()[0])
