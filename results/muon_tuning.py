"""Tune Muon's constants on a narrow network.

    python results/muon_tuning.py NAME ...     train these runs; without NAME, all of them

The narrow network is the custom ResNet with a quarter of the channels. It is trained with the
recipe `fast` on 30,000 training images of CIFAR-10, and evaluated on 10,000 others, on the CPU
and in fp32, so that all machines can repeat it. The runs are a fractional factorial: 16 of the
64 combinations of six factors, so that each factor has each of its two values in eight runs.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
from torch import nn

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import finder  # noqa: E402
import studies  # noqa: E402
import train  # noqa: E402

TRAINING_IMAGES = 30_000
HELD_OUT = 10_000
EPOCHS = 6

FACTORS = {  # a name, and the two values that are compared
    "muon_lr": (0.07, 0.14),
    "adam_lr": (0.02, 0.06),
    "momentum": (0.6, 0.85),
    "steps": (3, 5),
    "peak_fraction": (0.1, 5 / 24),
    "ema_epochs": (0.25, 0.5),
}
MEANINGS = {  # of the factors, for the table
    "muon_lr": "Muon's highest learning rate",
    "adam_lr": "Adam's highest learning rate, LRMAX",
    "momentum": "Muon's momentum",
    "steps": "Newton-Schulz steps",
    "peak_fraction": "`--peak-fraction`",
    "ema_epochs": "`--ema-epochs`",
}
# With these parities, no factor is mixed up with another one, or with the joint effect of two.
# But some joint effects are mixed up with each other: that of `muon_lr` and `momentum` with that
# of `adam_lr` and `peak_fraction`.
RUNS = studies.fractional_factorial(FACTORS, parities=[(0, 1, 2), (1, 2, 3)])
STUDY = studies.Study("muon-tuning", RUNS)


class NarrowResNet(nn.Sequential):
    """The narrow network of finder.py, with scaled logits and convolutions like our recipe's.

    Its first layer has 16 channels. This is too few to whiten the patches of an image.
    """

    def __init__(self):
        super().__init__(*finder.narrow_resnet())
        train.pass_input_on(self)

    def forward(self, images):
        return super().forward(images) * train.Recipe().logit_scale


def train_run(values, training, held_out, seed):
    """Train with the values of a run. Return what it measured."""
    train.MUON_MOMENTUM = values["momentum"]
    train.NEWTON_SCHULZ_STEPS = values["steps"]
    recipe = dataclasses.replace(
        train.RECIPES["fast"], epochs=EPOCHS,
        muon_lr_factor=values["muon_lr"] / values["adam_lr"],
        peak_fraction=values["peak_fraction"], ema_epochs=values["ema_epochs"])
    run = train.start_run(recipe, training, held_out, seed, device="cpu", precision="fp32",
                          model=NarrowResNet)
    # Now, for the commit: train.py may be edited during the training.
    environment = train.describe_environment(run)
    rates = train.Rates(values["adam_lr"] / train.LR_RATIO, values["adam_lr"])
    rows = list(train.train_epochs(run, rates))
    return {
        "accuracies": [row["test_accuracy"] for row in rows],
        "loss": rows[-1]["test_loss"],
        "tta_accuracy": train.evaluate_run(run, tta=True)["test_accuracy"],
        "train_seconds": run.seconds,
        "environment": environment,
    }


def levels_with_joint_effect():
    """Return the levels of the factors, and one more column: an array (runs, factors + 1).

    The last column is 1 where only one of Muon's rate and momentum has its higher value.
    """
    levels = studies.levels_of(RUNS)
    names = list(FACTORS)
    only_one = levels[:, names.index("muon_lr")] ^ levels[:, names.index("momentum")]
    return np.column_stack([levels, only_one])


def table_of_effects():
    """Return the table of the effects: a list of rows, which are lists of texts."""
    levels = levels_with_joint_effect()
    records = STUDY.load_records()
    accuracy_cells = studies.cells_of_effects(
        levels, [record["accuracies"][-1] for record in records])
    tta_cells = studies.cells_of_effects(
        levels, [record["tta_accuracy"] for record in records])
    labels = []
    for factor, (low, high) in FACTORS.items():
        labels.append([MEANINGS[factor], f"{low:.3g} to {high:.3g}"])
    labels.append(["Muon's rate and momentum", "both low or both high, to one of them high"])
    rows = [["constant", "change", "accuracy", "flip TTA"]]
    for label, accuracy_cell, tta_cell in zip(labels, accuracy_cells, tta_cells):
        rows.append([*label, accuracy_cell, tta_cell])
    return rows


if __name__ == "__main__":
    STUDY.measure(train_run, TRAINING_IMAGES, HELD_OUT, __doc__.splitlines()[0])
