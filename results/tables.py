"""Write results/README.md: every table of it, from the reports in the folders beside this file.

    python results/tables.py

A folder is a study (h100 has several, by the beginnings of their reports' names), a report in it is one run, as
`train.py --output` writes it. A test says that README.md is what
this script makes of the reports.
"""

import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402
from results import candidates  # noqa: E402

TEXT = """# Results

Written by `python results/tables.py` from the reports beside it: a folder is a study, a report is one run; h100 has the
studies of one machine, by the beginnings of their names. Change the script or the reports, not this file. All was
measured on two cores of a CPU but what is said to be of an H100; every finished run is listed.
Accuracies are those of the last epoch, one view of each image unless a column says "mirror image", which averages an
image with its mirror image. Seconds of training are without the sweep and the evaluations; those of the whole run have
both. A "recipe" column names what `--recipe` chose, "tuned" being the default, and the constants that a run has other
than that one. The earlier rule for LRMAX was 16 times the first rate by which 75% of the fall of the loss was done, but
none at which 25% of it was lost again; for LRMIN, the first by which 10% of it was done. When raw-weights/seed0 and
letter/plain-seed0 ran, today's rule had a margin of 2.5%; {margin:g}% finds the same rates for both, so they count
as its own.

## The default command, on two cores of a CPU

`python train.py --epochs 24 --batch-size 512`, on all 50,000 training and all 10,000 test images:

{default}

Accuracy: {headline}.

The same in 10 epochs, `python train.py --epochs 10 --batch-size 512`:

{ten_epochs}

Accuracy: {ten_headline}.

Earlier runs of the command for 24 epochs, of the recipe before it had an average of the weights: "raw weights" are
those that training ended with, and BatchNorm's statistics had a momentum of 0.3. In all but the first the sweep lasted
one epoch and was read by the earlier rule:

{earlier}

Accuracy of these three: {earlier_headline}.
In the last one's run other work shared the cores during nine epochs, so its accuracies count, its seconds do not.

## On one H100

The same script, in bf16 unless a command says otherwise, with PyTorch 2.11. Seed 0 of the default command ran alone:
{alone[train_seconds]:.1f} s of training, {alone[sweep_seconds]:.1f} s of sweep, most of that the start of CUDA
and cuDNN, {alone[total_seconds]:.1f} s in all. The other runs shared the machine, most of them four at a time: their
seconds tell nothing.

{commands}

The mean of the default command on the CPU is {cpu_ahead} points from the one here: no difference that so few runs can
show, of the machines or of their versions of PyTorch.

For tuning, on held-out images as below (24 epochs, `--holdout 5000`): the default recipe at given rates, LRMIN being
LRMAX / 300, and three changes to it. "Ahead" is the distance in points to the recipe at LRMAX 0.06, with its standard
error, runs of one row deviating as those of all do:

{gpu_holdout}

From 0.03 to 0.12 the rate makes no difference that these runs can show, nor does any of the changes. The sweeps of the
default command found {gpu_found}. Of the longer memory a third seed was begun and not finished.

## Short of 95%

The goals are 95.0% in 24 epochs and 94.0% in 10, of one view of each image. On the H100 24 epochs end at
{gpu_headline}, and 10 at
{gpu_headline_10}. What the runs say of why
the goals are not met:

- In 24 epochs there is little left to learn from the training images: in the last one the default run is right on
  {right_in_training} of them, each augmented anew. In 10 time is short: it ends right on {right_in_training_10}.
- In 24 epochs, averaging each test image with its mirror image adds {mirror_gain} points, about what is missing; in
  10 it adds {mirror_gain_10}, far less than that. Nothing has brought it into one view: of the {ranking_changes}
  changes in the last section, several of them meant for just this, {ranking_better} is ahead by twice its error, and
  of those above {gpu_better}.
- The recipe stands on flat ground: parts taken away cost something, or no more than the error (last section), and
  rates twice and half as high cost no more than that either (above).
- What others changed to get further is fixed here: the network, the three augmentations, the length. The 94.1% in 10
  epochs, with the mirror image, are of a network with CELU in place of ReLU and the whitening in a layer of its own,
  trained without cutout (as its [simplified code](https://github.com/99991/cifar10-fast-simple) has it). On the half
  network of the last section cutout alone is worth {cutout_is_worth} points in 10 epochs.

## To the letter: the recipe as it was handed out, beside ours

`python train.py --recipe plain` on two cores of a CPU, on all images, at the rates that people who followed the recipe
by hand took, and at those that the sweep finds; below it the default command again. A row has all seeds, the columns
LRMAX, LRMIN, "of each seed" and "90% at epoch" in one order, "mean" and "after epoch 10" their means; the last column
is what others reported.

{letter}

With the L2 term ours ends where the report does, though it reaches 90% later. Without it, at LRMAX 0.001 and 0.01, ours
ends more above what was reported than seeds of one recipe lie apart. What those codes did is not known; they
may have differed in all that the recipe leaves open and `plain` settles: a crop, a coin and a hole of its own for each
image in each epoch, the hole wholly inside the image and in the mean colour, convolutions without bias, PyTorch's
initialisation, a linear fall of the rate. LRMAX / 25, with which the first of the two began, is where PyTorch's
`OneCycleLR` begins by default; the rest of its defaults are a cosine, a peak at 30% of the run and an end at
LRMIN / 10,000.

After epoch 10, where 90% was reported, the rate is still high, and accuracy goes up and down from epoch to epoch.

## The path: from the plain recipe to the tuned one

One part more a row: whole runs on the H100, on all images, each at the rates that its own sweep finds. "Gain" is the
distance to the row above with its standard error, which takes the runs of every row to deviate alike. Accuracies are of
the test images, as the recipe was settled before these runs and nothing was chosen by them.

{path}

The same on the finer proxy of the last section, half the network, trained on 22,500 images and evaluated on 27,500
others, each at the LRMAX that a sweep of that recipe finds with seed 0 (at full width, on all images):

{half_path}

A gain is of the part and of the rate that the sweep finds with it, and hangs on what is there already: the scale of the
logits brings little here and epsilon loses, yet taken from the whole recipe on half the network each costs more than
half a point (last section). A gain of less than twice its error is none that so few runs can show.

## Whole runs on held-out images

For tuning: trained on 45,000 training images, evaluated on the other 5,000 (`--holdout 5000`), 24 epochs.

{holdout}

The run without whitening and identity is of a version of the script that had neither yet. The recipe's own two runs
have a mean of {recipe_mean}, those with epsilon 1e-08 one of {epsilon_mean}: less apart than two seeds of one recipe
are, so too close to call.

## Ablations

One constant changed at a time, 8 epochs on the same held-out images. "Behind" is the distance in points to the default
recipe at LRMAX 0.06 in the grid below.

{ablations}

Two seeds of one row, here and in the grid, differ by {smallest_gap} to {largest_gap} points: a row of one run tells
only large differences. Without the logit scale the sweep finds a rate that is too low, so that row tells little of it.

## Grid around the rates found

LRMAX in factors of 2, LRMIN 0.0001, 8 epochs on the same held-out images:

{grid}

The same of the plain recipe, `--recipe plain`; "behind" is the distance to its best row:

{plain_grid}

Today's sweeps find {plain_found} for it (median {plain_median}): at the median that is the best row; the rows
next to either end are some tenths of a point behind.

## Sweeps

`python train.py --epochs 0 --runs 10`, for each batch size and precision. The rates are what today's rule reads off the
recorded losses. Today a sweep lasts two epochs, or one where that has 200 steps; those of one epoch at batch 512 are of
the time when it lasted one where that had 98.

{sweeps}

In fp32 and in bf16 the sweeps of one seed find LRMAX at most {apart} apart; in {same} of the {pairs} pairs it is the
same. The second epoch is for the plain recipe: in one, its loss starts to climb at rates far apart from seed to seed,
however it is read. Its sweeps with seeds from 10 on came after the rule was settled; they find {fresh},
where seeds 0 to 9, on which it was, find {settled_on}.

## Rules for reading a sweep

What others' rules make of the same losses (bf16): largest over smallest LRMAX of all seeds, and the median. Each is
given what its own library gives it, losses smoothed and cut its way: fastai's `valley` and `minimum` (the smoothed
loss's lowest point, over 10), and the steepest slope of pytorch-lr-finder.

{rules}

The spread says how steady a rule is, not whether it is right: that takes training the tuned recipe at the median rate
that each finds for it (batch 512, sweeps of two epochs), as in the grid above: LRMIN 0.0001, 8 epochs on the same
held-out images. "Behind" is the distance to LRMAX 0.06 there, {at_60} in bf16:

{others_rates}

Ours was chosen on the sweeps of seeds 0 to 9, out of some hundred variants of what is read off, of the smoothing and of
the margin, so its spread there flatters it. With its margin of {margin:g}% and with others it finds, on all the sweeps
that last as long as today's:

{margins}

LRMIN is a fixed fraction of LRMAX. An earlier rule found it, and accuracy did not follow: whole runs of the tuned
recipe reached
{fractions}.

## Candidates for the recipe

`python results/candidates.py` trains as `train.py` does, with parts that the recipe may yet get: averages of the
weights, ghost batches, other rates for biases, fixed scales or whitening (`--help` lists them). They are ranked on a
proxy that costs a sixth: 24 epochs of a network of half the width on half the images, evaluated on 5,000 others
(`--half-width --subset 27500 --holdout 5000`), at LRMAX 0.06, which the plain recipe gets 0.005 in place of. Where the
order is known from whole runs, the proxy gives the same one, for LRMAX 0.005 and 0.01 by less than runs deviate:

{proxy_known}

One change at a time on the proxy; "ahead" is the distance in points to the recipe as it is, with its standard error:
runs of one row deviate by {proxy_deviation} points, which is taken to be so in all rows. An average of the weights is
one of the same runs, beside the weights themselves.

{proxy}

What an average of the weights changes is the way there: after epoch 10 that of 50 steps is at {averaged_10}, the
weights themselves at {raw_10}, the means of the tuned recipe's seeds.

How far runs of one row deviate is mostly a matter of which 5,000 images they are evaluated on. The same runs, evaluated
after the last epoch on all the 27,500 that they are not trained on, of which those are the first
(`--half-width --holdout 27500 --evaluate-few 5000 --averages 50`), deviate by {ranking_deviation} points, as far as
{ranking_pairs} rows of more than one seed tell. One change at a time again; "ahead" compares averages of 50 steps with
that of the recipe as it is, and the weights themselves with its own:

{ranking}

Of these {ranking_changes} changes {ranking_better} is ahead by twice its error, which is what it takes to call it
better. Ghost batches of 64, the best of the table before, do nothing on more images. An average of 50 steps by itself
is ahead of the weights by {average_ahead} points, and with it an LRMIN of LRMAX / 30 costs nothing, which costs the
weights themselves much.

Nor does it help to hold back overfitting in ways that take no time: half the images twice in one batch, once mirrored,
and the others in the next epoch (`both_mirrors`); crops and cutouts of each image spread evenly over the epochs
(`spread_crops`); a share of the targets, here the last epoch's, from what the network said an epoch before
(`past_targets`); gradients taken further down the momentum, at a distance (`look_ahead`) or at one that many times the
learning rate (`look_ahead_rate`). The last two are ahead for much of the way, not in the end; at a constant distance
BatchNorm's statistics are those of other weights, and the weights themselves of no use with them. Looking 1 ahead was
[stopped]({stopped_name}) after epoch {stopped_epoch}, right on {stopped_accuracy} of its training images, where the
recipe is on {recipe_then}.

Nor does sharpness-aware minimisation, which computes a quarter more: gradients taken at a distance up the gradient of
128 images of the batch (`ascent`). At 0.2 the last epoch is right on {ascent_right} of its training images, where the
recipe is on {recipe_right}, and knows the others no better.

Holding the whitening fixed raises the curve most, so it ran over 10 epochs too, evaluated in the same way. So did two
things that are no candidates, as they are fixed, but that the 94.1% in 10 epochs have: no cutout, and CELU for ReLU.

{ranking_10}

Over so few epochs cutout costs more than any candidate brings.

The other way round: a part of the recipe taken away at a time, for what the plain recipe has in its place. An LRMAX
that a row names is the one that a sweep of the whole recipe without that part finds with seed 0
({without_sweeps}).

{without}

Weight decay is worth most, then epsilon, the scale of the logits, initialisation (in the tables before) and smoothing;
alternating flips are worth little, reflection hardly more than the error. Part of what epsilon is worth may be the
rate: the earlier rule found less than half of it without epsilon, and at that whole runs are hardly behind.
"""


class Reported(NamedTuple):
    """An accuracy that others reported, as they gave it, and what else they said of it."""
    accuracy: str
    remark: str = ""


# What others reported of a recipe at its LRMAX and LRMIN, None where the sweep finds them.
REPORTED = {
    ("plain", None): Reported("90%", "the recipe's own target; 90% at epoch 10"),
    ("plain", (0.001, 4e-5)): Reported("90.98%"),
    ("plain", (0.01, 0.001)): Reported("91%"),
    ("plain, annihilation 10000.0, l2 0.01", (5.21e-4, 5.21e-6)): Reported("93.07%", "over 90% from epoch 19"),
    ("tuned", None): Reported("94.08%", "and 94.02% as the mean of 40, with SGD"),
}


def load(study, name="*"):
    """Return the reports of a study by their path from here, in the order of their names; statistics are left out.

    `name` is a pattern of the names of those that are wanted.
    """
    reports = {path.relative_to(HERE).as_posix(): json.loads(path.read_text())
               for path in sorted((HERE / study).glob(f"{name}.json"))}
    return {name: report for name, report in reports.items() if "summary" in report}


def table(headings, rows):
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def accuracy(report):
    return report["summary"]["final_test_accuracy"]


def mean(reports):
    return statistics.fmean(map(accuracy, reports))


def spread(reports):
    """Return the sample standard deviation as text; that of one run is unknown."""
    return f"{statistics.stdev(map(accuracy, reports)):.2%}" if len(reports) > 1 else "-"


def check_one_configuration(reports):
    """Raise ValueError where runs are of more than one recipe, precision or rule for the rates."""
    if len(configurations := set(map(what_varies, reports))) > 1:
        raise ValueError(f"one mean of several configurations: {configurations}")


def in_words(reports):
    """Return in words the accuracy of the runs of one configuration: their mean, and each of them or both extremes.

    Raises ValueError where they are of more than one.
    """
    check_one_configuration(reports)
    each = ", ".join(f"{accuracy(report):.2%}" for report in reports)
    if len(reports) > 5:
        each = f"{min(map(accuracy, reports)):.2%} to {max(map(accuracy, reports)):.2%}"
    return (f"**{mean(reports):.2%}**, the mean of {len(reports)} seeds (standard deviation {spread(reports)}; {each})"
            if len(reports) > 1 else f"**{each}**, one seed")


def right_in_training(reports):
    """Return in words how many of the augmented training images runs are right on in their last epoch."""
    return f"{statistics.fmean(report['epochs'][-1]['train_accuracy'] for report in reports.values()):.1%}"


def mirrored(reports):
    """Return the mean accuracy of runs with the mirror image averaged in."""
    return statistics.fmean(report["summary"]["tta_test_accuracy"] for report in reports)


def mirror_gain(reports):
    """Return by how many points that is more than one view of each image, as text."""
    return f"{100 * (mirrored(reports) - mean(reports)):.2f}"


def in_order_of_seeds(reports):
    """Return the (path, report) pairs of reports in the order of their seeds."""
    return sorted(reports.items(), key=lambda item: item[1]["config"]["seed"])


def links(accuracies):
    """Return accuracies by the path of their report as text: a link to each report."""
    return ", ".join(f"[{value:.2%}]({name})" for name, value in accuracies.items())


def of_each_seed(reports):
    """Return the accuracy of each report in the order of the seeds, as a link to it."""
    return links({name: accuracy(report) for name, report in in_order_of_seeds(reports)})


def recipe_name(report):
    return report["config"].get("recipe_name", "tuned")


def planned_steps(report):
    """Return how many steps the sweep of a report would have had, had its loss not ended it."""
    first, last = report["config"]["recipe"]["sweep_range"]
    lrs = report["lr_sweep"]["lr"]
    return 1 + round(math.log(last / first) / math.log(lrs[1] / lrs[0]))


def lasts_as_today(report):
    """Tell whether the sweep of a report had as many steps as today's script gives it."""
    steps_per_epoch = math.ceil(report["data"]["train_images"] / report["config"]["batch_size"])
    return planned_steps(report) == train.sweep_length(train.Recipe(), steps_per_epoch)


def todays_sweeps(reports):
    """Return those of a study's reports whose sweeps had as many steps as today's."""
    return [report for report in reports.values() if lasts_as_today(report)]


def todays_rates(report, **constants):
    """Return (LRMIN, LRMAX) as today's rule, or one of other constants, reads them off the losses of a sweep."""
    lrs, losses = report["lr_sweep"]["lr"], report["lr_sweep"]["loss"]
    return train.read_sweep(train.Recipe(**constants), lrs, train.smooth(losses, 1 / math.log10(lrs[1] / lrs[0])))


def by_earlier_rule(report):
    """Tell whether a report's run was at other rates than today's sweep and rule would have found for it."""
    taken = report["config"]["lr_min"], report["config"]["lr_max"]
    return not (lasts_as_today(report) and np.allclose(taken, todays_rates(report), rtol=1e-9, atol=0))


RAW = "tuned, raw weights"  # the name of the recipe before the average of the weights
RAW_CONSTANTS = {"batchnorm_momentum": 0.3}  # what it had other than today's


def recipe_in_words(report):
    """Return the name of a report's recipe and how it differs from the one of that name."""
    name, recipe = recipe_name(report), report["config"]["recipe"]
    if "whitening_images" not in recipe:  # a version of the script that had neither the one nor the other
        recipe = {**recipe, "initialisation": "default", "whitening_images": 0}
    usual = train.recipe_values(train.RECIPES[name])
    if name == "tuned" and "average_epochs" not in recipe:  # a version that evaluated the weights themselves
        name, usual = RAW, {**usual, **RAW_CONSTANTS}
    changed = [f"{constant} {recipe[constant]}" for constant, value in usual.items()
               if recipe.get(constant, value) != value and not constant.startswith("sweep_")]  # which `rate` tells
    changed += [f"{name} {value}" for name, value in report.get("candidates", {}).items()
                if value != candidates.OFF[name] and name not in ("averages", "evaluate_few")]  # which only evaluate
    return ", ".join([name, *changed])


def rate(report):
    """Return LRMAX, and whether the sweep found it."""
    how = " found" + " by the earlier rule" * by_earlier_rule(report) if report["lr_sweep"] else ""
    return f"{report['config']['lr_max']:.3g}{how}"


def found(report, **constants):
    """Return the LRMAX of `todays_rates`."""
    return todays_rates(report, **constants)[1]


def factor(lrs):
    """Return the largest rate over the smallest."""
    return max(lrs) / min(lrs)


def factor_and_median(lrs):
    return f"{factor(lrs):.2f} ({statistics.median(lrs):.2g})"


def extremes(values):
    """Return the least and the greatest as text, or the one that all are."""
    return " to ".join(f"{value:.3g}" for value in sorted({min(values), max(values)}))


def at_60():
    """Return the runs over 8 epochs that others are compared with: the default recipe's at LRMAX 0.06."""
    return [report for report in load("grid").values() if report["config"]["lr_max"] == 0.06]


def groups(reports, key):
    """Return the reports in groups, a dictionary each, of the same `key(report)`."""
    grouped = {}
    for name, report in reports.items():
        grouped.setdefault(key(report), {})[name] = report
    return grouped


def accuracies_by_row(grouped):
    """Return the accuracies of groups of reports, by the same keys and names."""
    return {key: {name: accuracy(report) for name, report in row.items()} for key, row in grouped.items()}


def check_alike(reports, *settings):
    """Raise ValueError where runs that are to share a table differ in a setting that it does not show."""
    for setting in settings:
        if len({json.dumps(report["config"][setting]) for report in reports}) > 1:
            raise ValueError(f"reports of one table differ in {setting}")


def whole_runs(reports):
    """Return the table of whole runs, a row each."""
    check_alike(reports.values(), "epochs", "batch_size", "subset", "holdout")
    rows = []
    for name, report in reports.items():
        summary, environment = report["summary"], report["environment"]
        rows.append([f"[{report['config']['seed']}]({name})", recipe_in_words(report), rate(report),
                     f"{environment['device_name']}, {environment['precision']}, PyTorch {environment['torch']}",
                     f"{accuracy(report):.2%}", f"{summary['tta_test_accuracy']:.2%}",
                     " / ".join(str(epoch or "never") for epoch in summary["epochs_to"].values()),
                     f"{summary['train_seconds']:,.0f}", f"{summary['total_seconds']:,.0f}"])
    return table(["seed", "recipe", "LRMAX", "machine", "accuracy", "with mirror image", "90% / 94% at epoch",
                  "training, s", "whole run, s"], rows)


def epochs_to(reports, goal):
    """Return in words the epochs after which runs were first at the accuracy `goal`, a key of their summaries."""
    first = [report["summary"]["epochs_to"][goal] for report in reports]
    reached = [epoch for epoch in first if epoch]
    never = f", {first.count(None)} never" if None in first else ""
    return f"{extremes(reached)}{never}" if reached else "never"


SEVERAL_HEADINGS = ["LRMAX found", "runs", "mean", "standard deviation", "with mirror image", "90% at epoch",
                    "94% at epoch"]


def several_runs(label, reports):
    """Return the row of runs of one command, each at the rates that its own sweep found: `label`, SEVERAL_HEADINGS.

    Raises ValueError where they are of more than one, or took other rates.
    """
    check_alike(reports, "epochs", "batch_size", "subset", "holdout", "device")
    check_one_configuration(reports)
    return [label, found_by_each(label, reports), len(reports), f"{mean(reports):.2%}", spread(reports),
            f"{mirrored(reports):.2%}", *(epochs_to(reports, goal) for goal in ("0.90", "0.94"))]


def commands_table(commands):
    """Return the table of whole runs by the command that made them, a row for all seeds of one."""
    return table(["command", *SEVERAL_HEADINGS, "of each seed"],
                 [[*several_runs(f"`{command}`", reports.values()), of_each_seed(reports)]
                  for command, reports in commands.items()])


def recipe_and_rates(report):
    """Return a report's key in REPORTED."""
    config = report["config"]
    return recipe_in_words(report), None if report["lr_sweep"] else (config["lr_max"], config["lr_min"])


def letter_table(reports):
    """Return the table of the plain recipe and of ours, a row for all seeds, beside what others reported of it.

    Raises ValueError where a report belongs in no row of REPORTED, or a row has none.
    """
    check_alike(reports.values(), "epochs", "batch_size", "subset", "holdout")
    grouped = groups(reports, recipe_and_rates)
    if grouped.keys() != REPORTED.keys():
        raise ValueError(f"a row without a run, or a run without a row: {grouped.keys() ^ REPORTED.keys()}")
    rows = []
    for (recipe, rates), reported in REPORTED.items():
        runs = [report for _, report in in_order_of_seeds(grouped[recipe, rates])]
        lr_min = ", ".join(f"{report['config']['lr_min']:.3g}" for report in runs)
        tenth = statistics.fmean(report["epochs"][9]["test_accuracy"] for report in runs)
        at_90 = ", ".join(str(report["summary"]["epochs_to"]["0.90"] or "never") for report in runs)
        rows.append([recipe, ", ".join(map(rate, runs)), lr_min, f"{mean(runs):.2%}",
                     of_each_seed(grouped[recipe, rates]), f"{tenth:.2%}", at_90, ", ".join(filter(None, reported))])
    return table(["recipe", "LRMAX", "LRMIN", "mean", "of each seed", "after epoch 10", "90% at epoch",
                  "reported by others"], rows)


def what_varies(report):
    """Return what sets a report apart but its seed: recipe, precision, and LRMAX or, where it was found, the rule."""
    lr_max = report["config"]["lr_max"]
    if report["lr_sweep"]:
        lr_max = "earlier rule" if by_earlier_rule(report) else "today's rule"
    return recipe_in_words(report), report["config"]["precision"], lr_max


def short_runs(reports, reference):
    """Return the table of runs of one length, a row for all seeds, compared with the mean of `reference`."""
    check_alike([*reports.values(), *reference], "epochs", "batch_size", "subset", "holdout")
    rows = []
    for (recipe, precision, _), group in groups(reports, what_varies).items():
        runs = list(group.values())
        rates = ", ".join(map(rate, runs)) if runs[0]["lr_sweep"] else rate(runs[0])
        rows.append([recipe, rates, precision, len(runs), f"{mean(runs):.2%}", spread(runs), of_each_seed(group),
                     f"{100 * (mean(reference) - mean(runs)):.2f}"])
    return table(["recipe", "LRMAX", "precision", "runs", "mean", "standard deviation", "of each seed",
                  "behind, points"], rows)


def held_out_table(reports):
    """Return the table of runs on held-out images compared with the recipe at LRMAX 0.06, and the distances to that."""
    check_alike(reports.values(), "epochs", "batch_size", "subset", "holdout", "precision")
    grouped = groups(reports, what_varies)
    accuracies, usual, rows, distances = accuracies_by_row(grouped), ("tuned", "bf16", 0.06), [], []
    deviation = pooled_deviation(accuracies)
    for what, runs in grouped.items():
        reference = accuracies[usual] if what != usual else None
        recipe, _, lr_max = what
        rows.append([recipe, f"{lr_max:g}", *compared_cells(runs, reference, deviation)])
        distances += [ahead(accuracies[what], reference, deviation)] if reference else []
    return table(["recipe", "LRMAX", "runs", "mean", "standard deviation", "of each seed", "ahead, points"],
                 rows), distances


HALF_WIDTH = ", half_width True"
PROXY_LR_MAX = {"tuned": 0.06, "plain": 0.005}  # about what whole runs find


def proxy_accuracies(reports):
    """Return the accuracies of runs of the proxy and of the averages of their weights, in the order of the seeds.

    They come as a dictionary by recipe, LRMAX and LRMIN, of dictionaries by the path of the report. Raises ValueError
    for any other run.
    """
    check_alike(reports.values(), "epochs", "batch_size", "subset", "holdout", "precision")
    grouped = {}
    for name, report in in_order_of_seeds(reports):
        words, config = recipe_in_words(report), report["config"]
        if not words.endswith(HALF_WIDTH) or report["lr_sweep"]:
            raise ValueError(f"{name} is not a run of the proxy at a given rate")
        recipe, last = words.removesuffix(HALF_WIDTH), report["epochs"][-1]
        averages = {f"{recipe}, average of {memory} steps": value
                    for memory, value in last.get("average_accuracy", {}).items()}
        for label, value in {recipe: last["test_accuracy"], **averages}.items():
            grouped.setdefault((label, config["lr_max"], config["lr_min"]), {})[name] = value
    return grouped


def pooled_deviation(grouped):
    """Return the standard deviation of the runs of one row, taken to be the same in all rows."""
    rows = [list(row.values()) for row in grouped.values() if len(row) > 1]
    return math.sqrt(sum(statistics.variance(row) * (len(row) - 1) for row in rows) / sum(len(row) - 1 for row in rows))


def ahead(row, reference, deviation):
    """Return how far the mean of a row is ahead of that of another, and the standard error of that, both in points.

    Rows are accuracies by the path of the report; `deviation` is that of the runs of one row.
    """
    distance = statistics.fmean(row.values()) - statistics.fmean(reference.values())
    return 100 * distance, 100 * deviation * math.sqrt(1 / len(row) + 1 / len(reference))


def ahead_in_words(*of_rows):
    """Return what `ahead` does, as text."""
    distance, error = ahead(*of_rows)
    return f"{round(distance, 2) + 0:+.2f} ± {error:.2f}"  # + 0 makes 0.00 of -0.00


def compared_cells(runs, reference, deviation):
    """Return the cells of runs: how many, mean, spread, accuracies, and `ahead` of `reference` where there is one."""
    row = {name: accuracy(report) for name, report in runs.items()}
    return [len(runs), f"{mean(runs.values()):.2%}", spread(runs.values()), links(row),
            ahead_in_words(row, reference, deviation) if reference else "-"]


def proxy_table(reports):
    """Return the table of what ran on the proxy beside the tuned recipe, compared with it, best first.

    Raises ValueError where one recipe ran at several rates, which the table does not show.
    """
    grouped, tuned = proxy_accuracies(reports), {}
    for (recipe, *_), row in grouped.items():
        if recipe in tuned:
            raise ValueError(f"several rates of one recipe: {recipe}")
        if recipe.startswith(RAW):
            tuned[recipe] = row
    reference, deviation, rows = tuned[RAW], pooled_deviation(grouped), []
    for recipe, row in sorted(tuned.items(), key=lambda item: -statistics.fmean(item[1].values())):
        rows.append([recipe, len(row), f"{statistics.fmean(row.values()):.2%}", links(row),
                     "-" if row is reference else ahead_in_words(row, reference, deviation)])
    return table(["recipe", "runs", "mean", "of each seed", "ahead, points"], rows)


def proxy_known_table(reports, whole):
    """Return the table of the recipes that have both whole runs and runs of the proxy, best on the proxy first.

    Any whole run of the tuned recipe counts, as rates around the one found do equally well.
    """
    known = groups(whole, lambda report: (recipe_in_words(report), PROXY_LR_MAX[recipe_name(report)]
                                          if report["lr_sweep"] or recipe_name(report) == "tuned"
                                          else report["config"]["lr_max"]))
    grouped = proxy_accuracies(reports)
    rows = []
    for (recipe, lr_max, lr_min), row in sorted(grouped.items(), key=lambda item: -statistics.fmean(item[1].values())):
        by_images = groups(known.get((recipe, lr_max), {}), lambda report: report["data"]["evaluated_on"])
        if by_images:
            rows.append([recipe, f"{lr_max:g}", f"{lr_min:.2g}",
                         links(row), *(of_each_seed(by_images.get(images, {})) or "-"
                                       for images in ("held-out training images", "test images"))])
    return table(["recipe", "LRMAX", "LRMIN", "proxy", "whole runs, held-out images", "whole runs, test images"], rows)


def changes(report, reference):
    """Return in words what a run has other than that of `reference`: constants, candidates and LRMAX."""
    (mine, its), words = ({**run["config"]["recipe"], **candidates.OFF, **run.get("candidates", {}),
                           "LRMAX": run["config"]["lr_max"]} for run in (report, reference)), []
    for name, value in mine.items():
        if value != its[name]:
            words.append(name if value is True else f"{name} {value}")
    return ", ".join(words)


def by_change(reports, reference, memory="50"):
    """Return the accuracies of runs on the proxy and of the averages of their weights, in the order of the seeds.

    They come as (averages, weights), two dictionaries by the path of the report, by what was changed in the recipe as
    it is, that of the report `reference`. Raises ValueError where runs differ in what the words do not tell.
    """
    check_alike([*reports.values(), reference], "epochs", "batch_size", "subset", "holdout", "precision", "recipe_name")
    grouped = {}
    for name, report in in_order_of_seeds(reports):
        averages, weights = grouped.setdefault(changes(report, reference), ({}, {}))
        last = report["epochs"][-1]
        averages[name], weights[name] = last["average_accuracy"][memory], last["test_accuracy"]
    return grouped


def ranking_deviation(grouped):
    """Return the standard deviation of averages of one row of `ranking_table`, taken to be the same in all rows."""
    return pooled_deviation({change: averages for change, (averages, _) in grouped.items()})


def changes_to_the_recipe():
    """Return what `by_change` makes of the candidates and of the recipe without a part, and `ranking_deviation`."""
    one_change = load("ranking")
    reference = one_change["ranking/tuned-seed0.json"]
    ranking = by_change(one_change, reference)
    without = {"": ranking[""], **by_change(load("without"), reference)}
    return ranking, without, ranking_deviation({**ranking, **without})


def ranking_table(grouped, deviation):
    """Return the table of what each change does to the averages of the weights, as `by_change` has it, best first.

    `deviation` is that of the averages of one row.
    """
    (usual_averages, usual_weights), rows = grouped[""], []
    for change, (averages, weights) in sorted(grouped.items(), key=lambda row: -statistics.fmean(row[1][0].values())):
        weights_ahead, _ = ahead(weights, usual_weights, deviation)
        rows.append([change or "none", len(averages), f"{statistics.fmean(averages.values()):.2%}", links(averages),
                     ahead_in_words(averages, usual_averages, deviation) if change else "-",
                     f"{statistics.fmean(weights.values()):.2%}", f"{weights_ahead:+.2f}" if change else "-"])
    return table(["change", "runs", "average, mean", "of each seed", "ahead, points", "weights themselves, mean",
                  "ahead, points"], rows)


def alone_on_gpu():
    """Return the summary of the run that had the GPU to itself: its seconds are the only ones there that tell."""
    return load("h100", "default-seed0")["h100/default-seed0.json"]["summary"]


# The commands that ran on the GPU, and the names of their reports.
COMMANDS = {"python train.py": "default", "python train.py --epochs 10": "ten-epochs",
            "python train.py --recipe plain": "plain", "python train.py --precision fp16": "fp16"}

# The parts that the tuned recipe adds to the plain one, in the order of the path from this to that: their constants.
PATH = {"logits": ["logit_scale"], "initialisation": ["whitening_images", "initialisation"],
        "label smoothing": ["label_smoothing"], "Adam's epsilon": ["epsilon"], "weight decay": ["memory_epochs"],
        "flips": ["flips"], "padding": ["padding_mode"], "average of the weights": ["average_epochs"]}
UNSEEN_BY_SWEEPS = "memory_epochs", "average_epochs"  # they do nothing before training


def path_recipes():
    """Return the recipes of the path by the part that each adds to the one before; the first is plain."""
    recipes = {"plain": train.RECIPES["plain"]}
    for part, names in PATH.items():
        added = {name: getattr(train.RECIPES["tuned"], name) for name in names}
        recipes[part] = dataclasses.replace(list(recipes.values())[-1], **added)
    return recipes


def parts_of(values, unseen=()):
    """Return which of the values of a recipe, as a report has them, set apart the recipes of the path."""
    values = {"average_epochs": 0.0, **values}  # older reports are of the weights themselves
    return tuple(values[name] for names in PATH.values() for name in names if name not in unseen)


def path_rows(reports, rates_in_words):
    """Return the rows of the path by the part that each adds, with what it gains over the row before.

    `rates_in_words(part, its reports)` is what the column LRMAX says. Raises ValueError for a run of no row, and
    KeyError where a row has none.
    """
    check_alike(reports.values(), "epochs", "batch_size", "subset", "holdout", "precision")
    grouped = groups(dict(in_order_of_seeds(reports)), lambda report: parts_of(report["config"]["recipe"]))
    accuracies = accuracies_by_row(grouped)
    deviation, rows, before = pooled_deviation(accuracies), {}, None
    for part, recipe in path_recipes().items():
        key = parts_of(train.recipe_values(recipe))
        runs = grouped.pop(key)
        rows[part] = [part if part == "plain" else f"+ {part}", rates_in_words(part, runs.values()),
                      *compared_cells(runs, before, deviation)]
        before = accuracies[key]
    if grouped:
        raise ValueError(f"runs of no row: {grouped.keys()}")
    return rows


def found_by_each(row, runs):
    """Return as text the LRMAX of runs that each took the one its own sweep found. Raises ValueError where one did not.

    `row` is how it names them.
    """
    if not all(report["lr_sweep"] and not by_earlier_rule(report) for report in runs):
        raise ValueError(f"a run of the row {row} is not at the rate that its own sweep finds")
    return extremes([report["config"]["lr_max"] for report in runs])


def found_by_one_of(sweeps):
    """Return a function like `found_by_each` for runs of the path that took the rate of their recipe's sweep.

    Raises KeyError where a recipe has none.
    """
    by_parts = {parts_of(sweep["config"]["recipe"], UNSEEN_BY_SWEEPS): name for name, sweep in sweeps.items()}
    names = {part: by_parts[parts_of(train.recipe_values(recipe), UNSEEN_BY_SWEEPS)]
             for part, recipe in path_recipes().items()}

    def rate_in_words(row, runs):
        lr_max = found(sweeps[names[row]])
        if not all(math.isclose(report["config"]["lr_max"], lr_max, rel_tol=0.01) for report in runs):
            raise ValueError(f"a run of the row {row} is not at the rate that its sweep finds")
        return f"[{lr_max:.3g}]({names[row]})"
    return rate_in_words


def path():
    """Return the rows of the path in whole runs on the GPU."""
    runs = [load("h100", f"{name}-seed*") for name in ("plain", "plus-*", "default")]
    return path_rows({name: report for study in runs for name, report in study.items()}, found_by_each)


def half_path():
    """Return the rows of the path on half the network."""
    ends = {name: report for name, report in {**load("sweeps"), **load("plain-sweeps")}.items()
            if name.endswith("batch-512-bf16-two-epochs-seed0.json")}
    return path_rows(load("path"), found_by_one_of({**load("part-sweeps"), **ends}))


def path_table(rows):
    """Return the table of `path_rows`."""
    return table(["recipe", "LRMAX", "runs", "mean", "standard deviation", "of each seed", "gain, points"],
                 rows.values())


def sweep_epochs(report):
    """Return how many epochs the sweep of a report would have lasted."""
    return round(planned_steps(report) * report["config"]["batch_size"] / report["data"]["train_images"])


def sweep_kind(report):
    """Return what sets a sweep apart but its seed and precision: recipe, batch size and how many epochs it lasts.

    Of the recipe its name: none of the constants that reports of one name differ in matters before an evaluation.
    """
    return recipe_name(report), report["config"]["batch_size"], sweep_epochs(report)


def sweep_table(reports):
    """Return the table of the rates that sweeps found, a row for each kind of sweep and precision."""
    check_alike(reports.values(), "epochs", "subset", "holdout")
    rows = []
    grouped = groups(reports, lambda report: (*sweep_kind(report), report["config"]["precision"]))
    for kind, group in sorted(grouped.items()):
        lrs = [found(report) for report in group.values()]
        rows.append([*kind, len(group), extremes(lrs), f"{statistics.median(lrs):.3g}", f"{factor(lrs):.2f}"])
    return table(["recipe", "batch", "epochs", "precision", "seeds", "LRMAX", "median", "largest / smallest"], rows)


def valley(lrs, losses):
    """Return the rate halfway down the longest valley: the longest run of ever lower losses, whatever lies between."""
    length = [1] * len(losses)  # of the longest such run that ends at each loss
    for i, loss in enumerate(losses):
        length[i] += max((length[j] for j in range(i) if losses[j] > loss), default=0)
    end = int(np.argmax(length))
    return lrs[end - length[end] + length[end] // 3 + length[end] // 6]


def others_rules(report):
    """Return what the rules of others make of a report's sweep: a rate by each one's name."""
    lrs, losses = report["lr_sweep"]["lr"], report["lr_sweep"]["loss"]
    averages, average, smoothed = [], 0.0, losses[:1]
    for step, loss in enumerate(losses):
        average = 0.98 * average + 0.02 * loss  # fastai's AvgSmoothLoss
        averages.append(average / (1 - 0.98 ** (step + 1)))
    for loss in losses[1:]:
        smoothed.append(0.05 * loss + 0.95 * smoothed[-1])  # pytorch-lr-finder's smooth_f
    start = planned_steps(report) // 10
    return {"fastai, valley": valley(lrs[start:-5], averages[start:-5]),
            "fastai, minimum / 10": lrs[start:-5][int(np.argmin(averages[start:-5]))] / 10,
            "pytorch-lr-finder, steepest": lrs[10:-5][int(np.gradient(smoothed[10:-5]).argmin())]}


def margins_table(sweeps):
    """Return the table of what our rule would find with other margins on today's sweeps, a row for each kind."""
    margins = 0.01, 0.02, 0.025, 0.03, 0.035, 0.04, 0.05
    grouped = groups({name: report for name, report in sweeps.items() if lasts_as_today(report)},
                     lambda report: sweep_kind(report)[:2])
    rows = []
    for kind, group in sorted(grouped.items()):
        found_at = [[found(report, sweep_margin=margin) for report in group.values()] for margin in margins]
        rows.append([*kind, len(group), *map(factor_and_median, found_at)])
    return table(["recipe", "batch", "sweeps", *(f"{100 * margin:g}%" for margin in margins)], rows)


def found_by_rules(reports):
    """Return what each rule finds on the sweeps of the reports: a list of rates by its name."""
    by_rule = [{"ours": found(report), **others_rules(report)} for report in reports]
    return {rule: [lrs[rule] for lrs in by_rule] for rule in by_rule[0]}


def rules_table(sweeps):
    """Return the table of what each rule finds on the same sweeps, a row for each kind of sweep."""
    grouped = groups({name: report for name, report in sweeps.items() if report["config"]["precision"] == "bf16"},
                     sweep_kind)
    rows = []
    for kind, group in sorted(grouped.items()):
        found_by = found_by_rules(group.values())
        rows.append([*kind, len(group), *map(factor_and_median, found_by.values())])
    return table(["recipe", "batch", "epochs", "seeds", *found_by], rows)


def others_rates_table(runs, sweeps, reference):
    """Return the table of runs at the median rate of each rule of others on `sweeps`, compared as in `short_runs`.

    Raises ValueError where a run is not that recipe's at such a rate, or a rule has none.
    """
    check_alike([*runs.values(), *reference], "epochs", "batch_size", "subset", "holdout", "lr_min")
    medians = {rule: f"{statistics.median(lrs):.2g}" for rule, lrs in found_by_rules(sweeps).items() if rule != "ours"}
    at_rate = groups(runs, lambda report: (recipe_in_words(report), f"{report['config']['lr_max']:.2g}"))
    if at_rate.keys() != (needed := {(RAW, lr_max) for lr_max in medians.values()}):
        raise ValueError(f"a rule's rate without a run, or a run at none: {at_rate.keys() ^ needed}")
    rows = []
    for rule, lr_max in medians.items():
        by_precision = groups(at_rate[RAW, lr_max], lambda report: report["config"]["precision"])
        rows += [[rule, lr_max, precision, f"{mean(group.values()):.2%}", of_each_seed(group),
                  f"{100 * (mean(reference) - mean(group.values())):.2f}"]
                 for precision, group in by_precision.items()]
    return table(["rule", "its median LRMAX", "precision", "mean", "of each seed", "behind, points"], rows)


def lr_min_fractions(*studies):
    """Return in words LRMAX / LRMIN and the accuracy of whole runs, study by study."""
    def describe(study):
        in_order = sorted((report["config"]["lr_max"] / report["config"]["lr_min"], accuracy(report))
                          for report in study)
        return ", ".join(f"{value:.2%} with LRMAX / {ratio:.0f}" for ratio, value in in_order)
    return " and ".join(f"{describe(study)} ({study[0]['data']['evaluated_on']})" for study in studies)


def accuracies_table():
    """Return the table of what each command reached on each machine, beside what others reported."""
    def cell(reports):
        return in_words(reports.values()) if reports else "-"

    on_cpu = groups({**load("default"), **load("letter")}, recipe_and_rates)
    on_gpu = groups({**load("h100", "default-*"), **load("h100", "plain-*")}, recipe_and_rates)
    rows = []
    for (recipe, rates), reported in sorted(REPORTED.items(), key=lambda item: item[0] != ("tuned", None)):
        name, *changed = recipe.split(", ")
        options = [f"--recipe {name}"] * (name != "tuned") + [f"--set {value.replace(' ', '=')}" for value in changed]
        options += [f"--lr-max {rates[0]:g} --lr-min {rates[1]:g}"] if rates else []
        rows.append([f"`{' '.join(['python train.py', *options])}`", cell(on_gpu.get((recipe, rates))),
                     cell(on_cpu[recipe, rates]), ", ".join(filter(None, reported))])
    ten = load("h100", "ten-epochs-*"), load("ten-epochs")
    rows.insert(1, ["`python train.py --epochs 10`",
                    *(f"{cell(reports)}; with the mirror image {mirrored(reports.values()):.2%}" for reports in ten),
                    "94.1% with the mirror image, the mean of 100, with SGD"])
    return table(["command", "on an H100", "on two cores of a CPU", "reported by others"], rows)


def machines_table():
    """Return the table of the default command on each machine."""
    rows = []
    for cores, reports in (("", load("h100", "default-*")), ("two cores of an ", load("default"))):
        environment, = {(report["environment"]["device_name"], report["config"]["precision"])
                        for report in reports.values()}
        rows.append(several_runs(cores + ", ".join(environment), reports.values()))
    return table(["machine", *SEVERAL_HEADINGS], rows)


def quotes():
    """Return what the README of the project quotes of these reports, by what it is about."""
    default, reference = list(load("default").values()), at_60()
    minutes = [report["summary"]["total_seconds"] / 60 for report in default]
    sweeps, plain = (todays_sweeps(load(study)) for study in ("sweeps", "plain-sweeps"))
    by_size = [[report for report in sweeps if report["config"]["batch_size"] == size] for size in (128, 512, 1024)]
    rates = [list(map(found, group)) for group in (*by_size, plain)]
    factors = list(map(factor, rates))
    seeds = [len({report["config"]["seed"] for report in group}) for group in (*by_size, plain)]
    in_bf16 = [report["data"]["train_images"] * len(report["epochs"]) / report["summary"]["train_seconds"]
               for report in default]
    in_fp32 = [len(report["lr_sweep"]["lr"]) * report["config"]["batch_size"] / report["summary"]["sweep_seconds"]
               for report in plain if report["config"]["precision"] == "fp32"]
    alone = alone_on_gpu()
    fp16, = load("h100", "fp16-*").values()
    alike = [report["config"]["lr_max"] for name in ("default", "ten-epochs", "plus-padding")  # to a sweep
             for report in load("h100", f"{name}-seed0").values()]
    at_90 = {name: epochs_to(load("h100", f"{name}-*").values(), "0.90") for name in ("default", "plus-padding")}
    valley_lr = f"{statistics.median(found_by_rules(by_size[1])['fastai, valley']):.2g}"
    at_valley = [report for report in load("others-rates").values() if f"{report['config']['lr_max']:.2g}" == valley_lr
                 and report["config"]["precision"] == reference[0]["config"]["precision"]]
    rows = path()
    of_plain, *others, of_tuned = (row[2] for row in rows.values())
    between, = set(others)
    _, without, deviation = changes_to_the_recipe()
    worth = [ahead_in_words(without[""][0], without[part][0], deviation)
             for part in ("logit_scale 1.0, LRMAX 0.00742", "epsilon 1e-08, LRMAX 0.0406")]
    return {"accuracies": accuracies_table(), "results": machines_table(),
            "valley": f"reads {valley_lr} off the same losses, the median of {seeds[1]} seeds",
            "at valley": (f"at {in_words(at_valley)}, of held-out images, "
                          f"where LRMAX 0.06 ends at {mean(reference):.2%}"),
            "speed": (f"{statistics.median(in_bf16):.0f} images a second, two of one that has neither "
                      f"{statistics.median(in_fp32):.0f}"),
            "minutes": f"{min(minutes):.0f} to {max(minutes):.0f} minutes on two cores of a CPU",
            "seconds": (f"{alone['total_seconds']:.0f} seconds on an H100, "
                        f"{alone['train_seconds']:.0f} of them training"),
            "sweep": f"takes {alone['sweep_seconds']:.0f} of the {alone['total_seconds']:.0f} seconds",
            "average": (f"their average is at 90% after epoch {at_90['default']}, "
                        f"they themselves after {at_90['plus-padding']}"),
            "alike": f"sweeps of seed 0 on the H100 found LRMAX {extremes(alike)}",
            "fp16": f"{accuracy(fp16):.2%} there",
            "margin": f"stays within {100 * train.Recipe().sweep_margin:g}% of it",
            "factor": f"within a factor of {max(factors[:3]):.2f}",
            "seeds": f"{seeds[0]} seeds at batch 128, {seeds[1]} at 512 and {seeds[2]} at 1024",
            "plain factor": f"one of {factors[3]:.2f} over {seeds[3]}",
            "logits and epsilon": f"are worth {worth[0]} and {worth[1]} points to the whole recipe there",
            "runs": f"{of_plain} of the plain recipe, {of_tuned} of the tuned, {between} of each between",
            **{part: f"| {part} | {row[6]} |" for part, row in rows.items() if part != "plain"}}


def readme():
    """Return the text of results/README.md."""
    default, raw, earlier, letter, holdout = map(load, ("default", "raw-weights", "earlier-sweep", "letter", "holdout"))
    grid, plain_grid, sweeps, plain_sweeps = map(load, ("grid", "plain-grid", "sweeps", "plain-sweeps"))
    reference = at_60()
    best_plain = max((list(group.values()) for group in groups(plain_grid, what_varies).values()), key=mean)
    plain_today = todays_sweeps(plain_sweeps)
    tuned_today = [report for report in todays_sweeps(sweeps) if report["config"]["batch_size"] == 512]
    settled_on = [found(report) for report in plain_today if report["config"]["seed"] < 10]
    fresh = [found(report) for report in plain_today if report["config"]["seed"] >= 10]
    check_alike(earlier.values(), "recipe")
    own = [report for report in holdout.values() if recipe_in_words(report) == RAW]
    other = [report for report in holdout.values() if "epsilon" in recipe_in_words(report)]
    on_gpu, on_gpu_10 = load("h100", "default-*"), load("h100", "ten-epochs-*")
    gpu_holdout, gpu_distances = held_out_table({**load("h100", "holdout-lr-max-*"), **load("h100", "holdout-*")})
    on_both = accuracies_by_row({"cpu": default, "gpu": on_gpu})
    alone = alone_on_gpu()
    ablations, ten_epochs, part_sweeps = map(load, ("ablations", "ten-epochs", "part-sweeps"))
    proxy, one_change, short = map(load, ("proxy", "ranking", "ranking-10-epochs"))
    as_it_is = one_change["ranking/tuned-seed0.json"]
    ranking, without, deviation = changes_to_the_recipe()
    averages, weights = ranking[""]
    ranking_10 = by_change(short, short["ranking-10-epochs/tuned-seed0.json"])
    deviation_10 = ranking_deviation(ranking_10)
    distances = [ahead(row, averages, deviation) for change, (row, _) in ranking.items() if change]
    (stopped_name, stopped), = load("unfinished").items()
    tenth = [report["epochs"][9] for report in proxy.values() if recipe_in_words(report) == RAW + HALF_WIDTH]
    seeds = [list(map(accuracy, group.values()))
             for group in groups({**ablations, **grid}, what_varies).values()]
    gaps = [100 * (max(accuracies) - min(accuracies)) for accuracies in seeds if len(accuracies) > 1]
    all_sweeps = {**plain_sweeps, **sweeps}
    by_seed = groups(all_sweeps, lambda report: (*sweep_kind(report), report["config"]["seed"]))
    pairs = [[found(report) for report in pair.values()] for pair in by_seed.values() if len(pair) == 2]
    return TEXT.format(
        default=whole_runs(default), headline=in_words(default.values()),
        ten_epochs=whole_runs(ten_epochs), ten_headline=in_words(ten_epochs.values()),
        right_in_training=right_in_training(on_gpu),
        right_in_training_10=right_in_training(on_gpu_10),
        mirror_gain=mirror_gain(on_gpu.values()), mirror_gain_10=mirror_gain(on_gpu_10.values()),
        path=path_table(path()), half_path=path_table(half_path()),
        commands=commands_table({command: load("h100", f"{name}-seed*") for command, name in COMMANDS.items()}),
        alone=alone,
        cpu_ahead=ahead_in_words(on_both["cpu"], on_both["gpu"], pooled_deviation(on_both)),
        gpu_headline=in_words(on_gpu.values()), gpu_headline_10=in_words(on_gpu_10.values()),
        gpu_found=extremes([report["config"]["lr_max"] for report in on_gpu.values()]),
        gpu_holdout=gpu_holdout, gpu_better=sum(distance >= 2 * error for distance, error in gpu_distances) or "none",
        without_sweeps=", ".join(f"[{found(report):.3g}]({name})" for name, report in part_sweeps.items()
                                 if recipe_name(report) == "tuned"),
        earlier=whole_runs({**raw, **earlier}), earlier_headline=in_words(earlier.values()),
        letter=letter_table({**letter, **default}),
        holdout=whole_runs(holdout), recipe_mean=f"{mean(own):.2%}", epsilon_mean=f"{mean(other):.2%}",
        ablations=short_runs(ablations, reference),
        smallest_gap=f"{min(gaps):.2f}", largest_gap=f"{max(gaps):.2f}",
        grid=short_runs(grid, reference), plain_grid=short_runs(plain_grid, best_plain),
        plain_found=extremes(settled_on + fresh), plain_median=f"{statistics.median(settled_on + fresh):.3g}",
        sweeps=sweep_table(all_sweeps), rules=rules_table(all_sweeps),
        others_rates=others_rates_table(load("others-rates"), tuned_today, reference),
        at_60=f"{mean(reference):.2%}", proxy=proxy_table(proxy),
        averaged_10=f"{statistics.fmean(row['average_accuracy']['50'] for row in tenth):.2%}",
        raw_10=f"{statistics.fmean(row['test_accuracy'] for row in tenth):.2%}",
        proxy_deviation=f"{100 * pooled_deviation(proxy_accuracies(proxy)):.2f}",
        ranking_10=ranking_table(ranking_10, deviation_10),
        cutout_is_worth=ahead_in_words(ranking_10[""][0], ranking_10["cutout 0"][0], deviation_10),
        ranking=ranking_table(ranking, deviation), without=ranking_table(without, deviation),
        ranking_deviation=f"{100 * deviation:.2f}",
        ranking_pairs=sum(len(row) > 1 for row, _ in {**ranking, **without}.values()), ranking_changes=len(distances),
        ranking_better=sum(distance >= 2 * error for distance, error in distances) or "none",
        stopped_name=stopped_name, stopped_epoch=len(stopped["epochs"]),
        stopped_accuracy=f"{stopped['epochs'][-1]['train_accuracy']:.2%}",
        recipe_then=f"{as_it_is['epochs'][len(stopped['epochs']) - 1]['train_accuracy']:.2%}",
        ascent_right=right_in_training({"": one_change["ranking/ascent-0.2-seed0.json"]}),
        recipe_right=right_in_training({"": as_it_is}),
        average_ahead=f"{ahead(averages, weights, deviation)[0]:.2f}",
        proxy_known=proxy_known_table(proxy, {**holdout, **raw, **earlier, **letter}),
        margin=100 * train.Recipe().sweep_margin, margins=margins_table(all_sweeps),
        fractions=lr_min_fractions([*raw.values(), *earlier.values()], own),
        apart=f"{max(map(factor, pairs)) - 1:.1%}",
        fresh=", ".join(f"{lr:.3g}" for lr in fresh), settled_on=extremes(settled_on),
        same=sum(min(pair) == max(pair) for pair in pairs), pairs=len(pairs))


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme())
