"""Write results/README.md: every table of it, from the reports in the folders beside this file.

    python results/tables.py

A folder is a study, a report in it is one run, as `train.py --output` writes it. A test says that README.md is what
this script makes of the reports.
"""

import json
import statistics
from pathlib import Path

HERE = Path(__file__).resolve().parent

TEXT = """# Results

Written by `python results/tables.py` from the reports beside it: a folder is a study, a report is one run. Change the
script or the reports, not this file. All was measured on two cores of a CPU, without a GPU; every run is listed.
Accuracies are those of the last epoch, one view of each image unless a column says "mirror image", which averages an
image with its mirror image. Seconds of training are without the sweep and the evaluations; those of the whole run have
both. A "changed" column names what a run's recipe has other than the default one; `python train.py --help` tells how to
change it.

## The default command

`python train.py --epochs 24 --batch-size 512`, on all 50,000 training and all 10,000 test images:

{default}

{headline}.
In seed 2's run other work shared the cores during nine epochs, so its accuracies count, its seconds do not.

## Whole runs on held-out images

For tuning: trained on 45,000 training images, evaluated on the other 5,000 (`--holdout 5000`), 24 epochs.

{holdout}

The run without the initialisation is of a version of the script that had neither the whitening nor the identity at
the start. The recipe's own two runs have a mean of {recipe_mean}, those with epsilon 1e-08 one of {epsilon_mean}: less
apart than two seeds of one recipe are, so too close to call.

## Ablations

One constant changed at a time, 8 epochs on the same held-out images. "Behind" is the distance in points to the default
recipe at LRMAX 0.06 in the grid below.

{ablations}

Two seeds of one row, here and in the grid, differ by {smallest_gap} to {largest_gap} points: a row of one run tells
only large differences. Without the logit scale the sweep finds a rate that is too low, so that row tells little of it.

## Grid around the rates found

LRMAX in factors of 2, LRMIN 0.0001, 8 epochs on the same held-out images:

{grid}

## Sweeps

`python train.py --epochs 0 --runs 10`, for each batch size and precision:

{sweeps}

In fp32 and in bf16 the sweeps of one seed find LRMAX at most {apart} apart; in {same} of the {pairs} pairs it is the
same.
"""


def load(study):
    """Return the reports of a study by their path from here, in the order of their names; statistics are left out."""
    reports = {path.relative_to(HERE).as_posix(): json.loads(path.read_text())
               for path in sorted((HERE / study).glob("*.json"))}
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


def of_each_seed(reports):
    """Return the accuracy of each report in the order of the seeds, as a link to it."""
    in_order = sorted(reports.items(), key=lambda item: item[1]["config"]["seed"])
    return ", ".join(f"[{accuracy(report):.2%}]({name})" for name, report in in_order)


def changes(report, default):
    """Return in words how the recipe of a report differs from that of another."""
    recipe, usual = report["config"]["recipe"], default["config"]["recipe"]
    changed = [f"{name} {recipe[name]}" for name in usual if name in recipe and recipe[name] != usual[name]]
    return ", ".join(changed + (["without the initialisation"] if "whitening_images" not in recipe else [])) or "-"


def rate(report):
    """Return LRMAX, and whether the sweep found it."""
    return f"{report['config']['lr_max']:.3g}{' found' if report['lr_sweep'] else ''}"


def groups(reports, key):
    """Return the reports in groups, a dictionary each, of the same `key(report)`."""
    grouped = {}
    for name, report in reports.items():
        grouped.setdefault(key(report), {})[name] = report
    return grouped


def check_alike(reports, *settings):
    """Raise ValueError where runs that are to share a table differ in a setting that it does not show."""
    for setting in settings:
        if len({json.dumps(report["config"][setting]) for report in reports}) > 1:
            raise ValueError(f"reports of one table differ in {setting}")


def whole_runs(reports, default):
    """Return the table of runs over 24 epochs, a row each."""
    check_alike(reports.values(), "epochs", "batch_size", "subset", "holdout")
    rows = []
    for name, report in reports.items():
        summary, environment = report["summary"], report["environment"]
        rows.append([f"[{report['config']['seed']}]({name})", changes(report, default), rate(report),
                     f"{environment['device_name']}, {environment['precision']}, PyTorch {environment['torch']}",
                     f"{accuracy(report):.2%}", f"{summary['tta_test_accuracy']:.2%}",
                     " / ".join(str(epoch or "never") for epoch in summary["epochs_to"].values()),
                     f"{summary['train_seconds']:,.0f}", f"{summary['total_seconds']:,.0f}"])
    return table(["seed", "changed", "LRMAX", "machine", "accuracy", "with mirror image", "90% / 94% at epoch",
                  "training, s", "whole run, s"], rows)


def what_varies(default):
    """Return a function that tells what sets a report apart but its seed: its recipe, and LRMAX where it was given."""
    return lambda report: (changes(report, default), None if report["lr_sweep"] else report["config"]["lr_max"])


def short_runs(reports, default, reference):
    """Return the table of runs over 8 epochs, a row for all seeds, compared with the mean of `reference`."""
    check_alike([*reports.values(), *reference], "epochs", "batch_size", "subset", "holdout", "precision")
    rows = []
    for (changed, _), group in groups(reports, what_varies(default)).items():
        runs = list(group.values())
        rates = ", ".join(map(rate, runs)) if runs[0]["lr_sweep"] else rate(runs[0])
        rows.append([changed, rates, len(runs), f"{mean(runs):.2%}", spread(runs), of_each_seed(group),
                     f"{100 * (mean(reference) - mean(runs)):.2f}"])
    return table(["changed", "LRMAX", "runs", "mean", "standard deviation", "of each seed", "behind, points"], rows)


def sweep_table(reports):
    """Return the table of the rates that sweeps found, a row for each batch size and precision."""
    check_alike(reports.values(), "epochs", "subset", "holdout", "recipe")
    rows = []
    grouped = groups(reports, lambda report: (report["config"]["batch_size"], report["config"]["precision"]))
    for (batch_size, precision), group in sorted(grouped.items()):
        highest, lowest = ([report["config"][name] for report in group.values()] for name in ("lr_max", "lr_min"))
        rows.append([batch_size, precision, len(group),
                     f"{min(highest):.3g} to {max(highest):.3g}", f"{max(highest) / min(highest):.2f}",
                     f"{min(lowest):.3g} to {max(lowest):.3g}", f"{max(lowest) / min(lowest):.2f}"])
    return table(["batch", "precision", "seeds", "LRMAX", "largest / smallest", "LRMIN", "largest / smallest"], rows)


def quotes():
    """Return what the README of the project quotes of these reports: its headline and its table of results."""
    reports = list(load("default").values())
    seconds = [report["summary"]["total_seconds"] for report in reports]
    headline = (f"**{mean(reports):.2%}**, the mean of {len(reports)} seeds (standard deviation {spread(reports)}; "
                f"{', '.join(f'{accuracy(report):.2%}' for report in reports)})")
    rows = [[report["config"]["seed"], f"{accuracy(report):.2%}", f"{report['summary']['tta_test_accuracy']:.2%}",
             *(epoch or "never" for epoch in report["summary"]["epochs_to"].values())] for report in reports]
    results = table(["seed", "accuracy", "with mirror image", "90% at epoch", "94% at epoch"], rows)
    sweeps = load("sweeps").values()
    rates = [[report["config"]["lr_max"] for report in sweeps if report["config"]["batch_size"] == size]
             for size in (128, 512, 1024)]
    return {"headline": headline, "results": results, "minutes": f"{min(seconds) / 60:.0f} minutes",
            "factor": f"within a factor of {max(max(found) / min(found) for found in rates):.2f}"}


def readme():
    """Return the text of results/README.md."""
    default, holdout, grid, sweeps = map(load, ("default", "holdout", "grid", "sweeps"))
    usual = default["default/seed0.json"]
    check_alike(default.values(), "recipe")
    at_60 = [report for report in grid.values() if report["config"]["lr_max"] == 0.06]
    own = [report for report in holdout.values() if changes(report, usual) == "-"]
    other = [report for report in holdout.values() if "epsilon" in changes(report, usual)]
    ablations = load("ablations")
    seeds = [list(map(accuracy, group.values()))
             for group in groups({**ablations, **grid}, what_varies(usual)).values()]
    gaps = [100 * (max(accuracies) - min(accuracies)) for accuracies in seeds if len(accuracies) > 1]
    pairs = [[report["config"]["lr_max"] for report in pair.values()] for pair in
             groups(sweeps, lambda report: (report["config"]["batch_size"], report["config"]["seed"])).values()]
    return TEXT.format(
        default=whole_runs(default, usual), headline=f"Accuracy: {quotes()['headline']}",
        holdout=whole_runs(holdout, usual), recipe_mean=f"{mean(own):.2%}", epsilon_mean=f"{mean(other):.2%}",
        ablations=short_runs(ablations, usual, at_60),
        smallest_gap=f"{min(gaps):.2f}", largest_gap=f"{max(gaps):.2f}",
        grid=short_runs(grid, usual, at_60),
        sweeps=sweep_table(sweeps), apart=f"{max(max(pair) / min(pair) for pair in pairs) - 1:.1%}",
        same=sum(min(pair) == max(pair) for pair in pairs), pairs=len(pairs))


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme())
