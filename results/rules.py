"""Rules that find a learning rate in a sweep, for the comparison in finder.py.

A rule is a function of three arguments: `lrs` and `losses`, lists with a value for each step of
a sweep, and `adam_steps`, the number of steps that Adam will train for, which is 0 with another
optimizer. It returns one learning rate, which becomes LRMAX. The rules of other libraries get
the losses smoothed and cut as in these libraries. But the sweep is ours: it stops earlier than
theirs when the loss rises.
"""

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402


def count_adam_steps(recipe, image_count):
    """Return the number of steps that a recipe trains with Adam; 0 if it has Muon."""
    if recipe.optimizer != "adam":
        return 0
    return recipe.epochs * train.count_steps(image_count, recipe.batch_size)


def ours(lrs, losses, adam_steps):
    """Return the LRMAX that train.py finds; the start of the sweep if it finds none."""
    steps_per_decade = 1 / math.log10(lrs[1] / lrs[0])
    smoothed = train.smooth_losses(losses, steps_per_decade)
    try:
        _, lr_max = train.read_sweep(lrs, smoothed, adam_steps)
    except train.UserError:
        return lrs[0]
    return lr_max


def always_twice(lrs, losses, adam_steps):
    """Return what train.py finds where training is not short, or not with Adam."""
    return ours(lrs, losses, 0)


def steepest(lrs, losses, adam_steps):
    """Return the rate where the loss falls fastest (pytorch-lr-finder 0.2)."""
    smoothed = [losses[0]]
    for loss in losses[1:]:
        smoothed.append(0.05 * loss + 0.95 * smoothed[-1])
    slopes = np.gradient(smoothed[10:-5])
    return lrs[10:-5][slopes.argmin()]


def fastai_losses(losses):
    """Return losses as fastai's Recorder smooths them.

    It takes an exponential average, corrected for its start at 0.
    """
    smoothed = []
    average = 0
    for step, loss in enumerate(losses, start=1):
        average = 0.98 * average + 0.02 * loss
        smoothed.append(average / (1 - 0.98 ** step))
    return smoothed


def fastai_part(values):
    """Return the part of a sweep that fastai looks at."""
    return values[len(values) // 10:-5]


def tenth_of_minimum(lrs, losses, adam_steps):
    """Return a tenth of the rate with the lowest loss (`minimum` of fastai 2)."""
    losses = fastai_part(fastai_losses(losses))
    return fastai_part(lrs)[int(np.argmin(losses))] / 10


def valley(lrs, losses, adam_steps):
    """Return a rate half way down the longest fall of the loss (`valley` of fastai 2).

    A fall is a series of steps, not always neighbors, of which each has a lower loss than
    the one before. To find its start, fastai counts back as if they were neighbors.
    """
    losses = fastai_part(fastai_losses(losses))
    lengths = []  # of the longest fall that ends at each step
    for step, loss in enumerate(losses):
        earlier = [lengths[i] for i in range(step) if losses[i] > loss]
        lengths.append(1 + max(earlier, default=0))
    end = int(np.argmax(lengths))
    length = lengths[end]
    third = length / 3
    chosen = end - length + int(third) + int(third / 2)
    return fastai_part(lrs)[max(0, chosen)]


RULES = {
    "ours": ours,
    "always 2 x high": always_twice,
    "steepest": steepest,
    "minimum / 10": tenth_of_minimum,
    "valley": valley,
}
