"""Make the tables of ../README.md and README.md anew from the reports in results/*/.

    python results/tables.py

In the text, a table stands between `<!-- table: NAME -->` and `<!-- end -->`. This script
replaces its lines between these two comments. TABLES says what the table NAME shows.
"""

import dataclasses
import functools
import json
import math
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import finder  # noqa: E402
import muon_tuning  # noqa: E402
import rules  # noqa: E402
import studies  # noqa: E402
import train  # noqa: E402

FILES = [HERE.parent / "README.md", HERE / "README.md"]

# What each table shows. TABLES has the parts of a table under its name:
#
#     "NAME": (heading, columns, rows)
#
# The tables of STUDY_TABLES, below, are made from records of the studies instead.
#
# `rows` is a list of (label, pattern). The label is the text at the left end of a row;
# `heading` is the heading above the labels. A " | " in them begins another column. The
# pattern says which reports belong to the row: the files results/PATTERN.json, where *
# stands for any text and ? for one character.
#
# `columns` is a list of names. For most names, CELLS has a function that makes the cell
# from the reports of a row. Two names compare the accuracy of a row with another row's:
# "gain" with that of the row above, "ahead" with that of the first row.
#
# Some tables have groups of columns, and each group has its own reports: for instance, of
# the same command on another machine. Then `columns` is a dictionary from a group's name
# to its list, and a row has a pattern for each group: (label, pattern, pattern). If a
# pattern is "", there are no reports, and the cells show "-".
TABLES = {
    "headline": ("command | epochs", {
        "H100": ["accuracy", "flip TTA"],
        "2 CPU cores": ["accuracy", "flip TTA", "minutes"],
    }, [
        ("`python train.py` | 24", "h100/default-seed*", "default/seed*"),
        ("`python train.py --recipe best` | 24", "", "best/seed*"),
        ("`python train.py --recipe fast` | 6", "", "fast/seed*"),
        ("`python train.py --recipe plain` | 24", "h100/plain-seed*", "letter/plain-seed*"),
    ]),
    "graph": ("code", [
        "training, s", "sweep, s", "seconds", "accuracy", "flip TTA", "seeds",
    ], [
        ("without the CUDA graph (commit a90de17)", "h200/without-graph-seed*"),
        ("with it", "h200/default-seed*"),
    ]),
    "runs": ("options | machine", [
        "accuracy", "flip TTA", "90% at epoch", "94% at epoch", "LRMAX", "seeds",
    ], [
        ("none | H100", "h100/default-seed*"),
        ("none | two CPU cores", "default/seed*"),
        ("`--precision fp16` | H100", "h100/fp16-seed*"),
        ("`--recipe best` | two CPU cores", "best/seed*"),
        ("`--recipe fast` | two CPU cores", "fast/seed*"),
        ("`--recipe plain` | H100", "h100/plain-seed*"),
        ("`--recipe plain` | two CPU cores", "letter/plain-seed*"),
        ("`--epochs 10` | H100", "h100/ten-epochs-seed*"),
    ]),
    "fast-holdout": ("LRMAX | Muon's highest rate", ["accuracy", "flip TTA", "seeds"], [
        ("0.03 | 0.07 (7/3)", "fast/holdout-lr-max-0.03-seed*"),
        ("0.06 | 0.14 (7/3)", "fast/holdout-lr-max-0.06-seed*"),
        ("0.12 | 0.28 (7/3)", "fast/holdout-lr-max-0.12-seed*"),
        ("0.06 | 0.10 (5/3)", "fast/holdout-factor-5-3-seed*"),
    ]),
    "fast-runs": ("first convolution by | Muon's rate / Adam's", [
        "LRMAX", "accuracy", "flip TTA", "seeds",
    ], [
        ("Adam (commit 6b6176f) | 7/3", "fast/factor-7-3-seed*"),
        ("Adam | 5/3", "fast/seed*"),
        ("Adam, seed 0 again (commit b07b2e7) | 5/3", "fast/again-seed*"),
        ("Muon (commit 733e041) | 5/3", "fast/muon-first-seed*"),
    ]),
    "best": ("first convolution by | Muon's rate / Adam's | label smoothing", [
        "LRMAX", "accuracy", "flip TTA", "90% at epoch", "94% at epoch", "seeds",
    ], [
        ("Adam (commit 0765933) | 5/3 | 0.2", "muon/seed*"),
        ("Adam (commit 38dbb36) | 1.2 | 0.1", "muon/factor-1.2-smoothing-0.1-seed*"),
        ("Muon | 1.2 | 0.1", "best/seed*"),
    ]),
    "first-look": ("options", ["LRMAX", "accuracy", "flip TTA", "seeds"], [
        ("`--subset --recipe fast`", "first-look/fast-seed*"),
        ("the same, with `--precision fp32`", "first-look/fast-fp32-seed*"),
        ("`--subset --recipe fast`, on cores without AVX-512", "first-look/fast-avx2-seed*"),
        ("`--subset`", "first-look/default-seed*"),
    ]),
    "path": ("part | option", ["LRMAX", "accuracy", "gain", "90% at epoch", "seeds"], [
        ("plain | `--recipe plain`", "h100/plain-seed*"),
        ("+ scaled logits | `--logit-scale 0.125`", "h100/plus-logits-seed*"),
        ("+ initialization | `--initialization identity`", "h100/plus-initialisation-seed*"),
        ("+ label smoothing | `--label-smoothing 0.2`", "h100/plus-smoothing-seed*"),
        ("+ Adam's epsilon | `--epsilon 0.01`", "h100/plus-epsilon-seed*"),
        ("+ weight decay | `--decay-epochs 5`", "h100/plus-decay-seed*"),
        ("+ alternating flips | `--flips alternating`", "h100/plus-flips-seed*"),
        ("+ reflection padding | `--padding-mode reflect`", "h100/plus-padding-seed*"),
        ("+ moving average (EMA) of the weights | `--ema-epochs 0.5`", "h100/default-seed*"),
    ]),
    "letter": ("others | our options", ["accuracy", "flip TTA", "90% at epoch"], [
        ("the course: 90% at epoch 10, its target | `--recipe plain`", "letter/plain-seed*"),
        ("[nanekja]: 90.98 | + `--lr-max 0.001 --lr-min 4e-5`", "letter/plain-0.001-0.00004"),
        ("[jagatabhay]: 91 | + `--lr-max 0.01 --lr-min 0.001`", "letter/plain-0.01-0.001"),
        ("[jaiyesh]: 93.07, 90% at epoch 19 | + `--lr-max 5.21e-4 --lr-min 5.21e-6 --l2 0.01 "
         "--annihilation 10000`", "letter/plain-l2-annihilation"),
        ("[Page]: 94.08, [Wind]: 94.02 (n=40), with SGD | none (H100)", "h100/default-seed*"),
        ("[99991]: 94.1 with TTA (n=100), SGD, 10 epochs; [airbench94_muon]: 94.01 with TTA "
         "(n=200), 8 epochs | `--recipe fast`", "fast/seed*"),
    ]),
    "sweeps": ("batch size", [
        "LRMAX found", "ours", "steepest", "minimum / 10", "valley",
    ], [
        ("128", "sweeps/batch-128-bf16-seed*"),
        ("512", "sweeps/batch-512-bf16-two-epochs-seed*"),
        ("1024", "sweeps/batch-1024-bf16-seed*"),
        ("512, whole runs on the H100", "h100/default-seed*"),
        ("512, whole runs with `--recipe fast`", "fast/seed*"),
        ("the same, with Muon's factor 7/3", "fast/factor-7-3-seed*"),
        ("62, the sample with `--recipe fast`", "sweeps/fast-sample-seed*"),
    ]),
    "holdout": ("change", ["LRMAX", "accuracy", "ahead", "flip TTA", "seeds"], [
        ("none", "h100/holdout-lr-max-0.06-seed*"),
        ("LRMAX halved", "h100/holdout-lr-max-0.03-seed*"),
        ("LRMAX doubled", "h100/holdout-lr-max-0.12-seed*"),
    ]),
}

STUDY_TABLES = {  # the functions that make these tables, from the records of the studies
    "finder-cases": finder.table_of_cases,
    "muon-effects": muon_tuning.table_of_effects,
}


# ---- Reports -----------------------------------------------------------------------------
# From here on, a row is a dictionary: its reports by their path from results/.

def load_row(pattern):
    """Return the row of a pattern, in the order of its seeds. The row of "" is empty.

    Raise ValueError if no report matches or if the reports do not belong in one row.
    """
    if not pattern:
        return {}
    reports = {}
    for path in sorted(HERE.glob(f"{pattern}.json")):
        name = path.relative_to(HERE).as_posix()
        reports[name] = json.loads(path.read_text())
        check_report(name, reports[name])
    if not reports:
        raise ValueError(f"no report matches {pattern}")
    check_alike(reports, configuration)
    names = sorted(reports, key=lambda name: reports[name]["config"]["options"]["seed"])
    return {name: reports[name] for name in names}


def check_report(name, report):
    """Raise ValueError if a run did not end, or had other fields than train.Recipe."""
    if report["summary"]["status"] != "complete":
        raise ValueError(f"{name} is of a run that did not end")
    fields = {field.name for field in dataclasses.fields(train.Recipe)}
    recorded = set(report["config"]["recipe"])
    if recorded != fields:
        missing = sorted(fields - recorded)
        unknown = sorted(recorded - fields)
        raise ValueError(f"the recipe in {name} must have the fields of train.Recipe; "
                         f"missing: {missing}, unknown: {unknown}")


def check_alike(row, trait):
    """Raise ValueError unless `trait` returns the same dictionary for all reports."""
    (first_name, first), *others = row.items()
    for name, report in others:
        differences = train.differing_settings(trait(first), trait(report))
        if differences:
            raise ValueError(f"unlike reports, {first_name} and {name}: {differences}")


def machine(report):
    """Return what runs must share if their times are compared: devices and CPU threads."""
    environments = [report["environment"], *report.get("continued_in", [])]
    return {name: sorted({environment[name] for environment in environments})
            for name in ("device_name", "threads")}


def conditions(report):
    """Return what rows must share if their accuracies are compared."""
    shared = {name: report["data"][name] for name in ("train_images", "evaluated_on")}
    shared |= {name: report["environment"][name] for name in ("device", "precision")}
    if shared["device"] != "cpu":  # all kinds of CPU are equally accurate
        shared["device_name"] = report["environment"]["device_name"]
    return shared


def configuration(report):
    """Return what the runs of a row must share: all but the seeds and the rates found."""
    rates = report["rates"]
    given = {name: rates[name] for name in ("lr_max", "lr_min")
             if rates[f"{name}_from"] == "given"}
    return {**report["config"]["recipe"], **given, **conditions(report)}


def values(row, key="final_test_accuracy"):
    """Return a value of each report's summary: by default its accuracy."""
    return [report["summary"][key] for report in row.values()]


# ---- Cells: the text that a row has in a column ------------------------------------------

def accuracy_cell(row):
    """Return the mean accuracy of the runs, their standard deviation and their number."""
    accuracies = values(row)
    mean = studies.percent(statistics.fmean(accuracies))
    if len(accuracies) == 1:
        return f"{mean} (n=1)"
    deviation = studies.percent(statistics.stdev(accuracies))
    return f"{mean} ± {deviation} (n={len(accuracies)})"


def tta_cell(row):
    """Return the mean accuracy with flip test-time augmentation."""
    return studies.percent(statistics.fmean(values(row, "tta_test_accuracy")))


def seeds_cell(row):
    """Return the accuracy of each run, as a link to its report."""
    links = []
    for name, report in row.items():
        accuracy = studies.percent(report["summary"]["final_test_accuracy"])
        links.append(f"[{accuracy}]({name})")
    return ", ".join(links)


def lr_max_cell(row):
    """Return the lowest and the highest LRMAX that the runs used."""
    return studies.span([report["rates"]["lr_max"] for report in row.values()])


def epoch_cell(row, goal):
    """Return after which epochs the runs first had the accuracy `goal`, like "0.94"."""
    epochs = [first_epochs[goal] or math.inf for first_epochs in values(row, "epochs_to")]
    return studies.span(epochs).replace("inf", "never")


def seconds_cell(row, key):
    """Return how many seconds the runs took. Raise ValueError if their machines differ."""
    check_alike(row, machine)
    return studies.span(values(row, key), "{:,.0f}")


def minutes_cell(row):
    """Return how many minutes the runs took in all, from the fastest machine to the slowest."""
    return studies.span([seconds / 60 for seconds in values(row, "total_seconds")], "{:,.0f}")


def found_rates(row, rule=rules.ours):
    """Return the LRMAX that a rule finds in the sweep of each report: by default, ours."""
    found = []
    for report in row.values():
        recipe = train.Recipe(**report["config"]["recipe"])
        steps = rules.count_adam_steps(recipe, report["data"]["train_images"])
        sweep = report["lr_sweep"]
        found.append(rule(sweep["lr"], sweep["loss"], steps))
    return found


def spread_cell(row, rule):
    """Return the largest LRMAX that a rule finds, divided by the smallest."""
    found = found_rates(row, rule)
    return f"{max(found) / min(found):.3g}"


CELLS = {
    "accuracy": accuracy_cell,
    "flip TTA": tta_cell,
    "seeds": seeds_cell,
    "LRMAX": lr_max_cell,
    "90% at epoch": lambda row: epoch_cell(row, "0.90"),
    "94% at epoch": lambda row: epoch_cell(row, "0.94"),
    "training, s": lambda row: seconds_cell(row, "train_seconds"),
    "sweep, s": lambda row: seconds_cell(row, "sweep_seconds"),
    "seconds": lambda row: seconds_cell(row, "total_seconds"),
    "minutes": minutes_cell,
    "LRMAX found": lambda row: studies.span(found_rates(row)),
    **{name: functools.partial(spread_cell, rule=rule) for name, rule in rules.RULES.items()},
}


def pooled_deviation(rows):
    """Return one standard deviation for all rows: that of runs from their row's mean."""
    squares = 0
    degrees_of_freedom = 0
    for row in rows:
        squares += statistics.pvariance(values(row)) * len(row)
        degrees_of_freedom += len(row) - 1
    if degrees_of_freedom == 0:
        raise ValueError("the error of a distance needs a row with two runs")
    return math.sqrt(squares / degrees_of_freedom)


def distance_cell(row, other, rows):
    """Return by how many points a row's mean is above another's, and the standard error.

    The error assumes that in all `rows`, runs deviate alike from the mean of their row.
    """
    reports = {}
    for each in rows:
        reports.update(each)
    check_alike(reports, conditions)
    distance = statistics.fmean(values(row)) - statistics.fmean(values(other))
    error = pooled_deviation(rows) * math.sqrt(1 / len(row) + 1 / len(other))
    return studies.in_points(distance, error)


def make_cell(column, rows, i):
    """Return the cell of row `i` in a column; `rows` are all rows of the table."""
    row = rows[i]
    if not row:
        return "-"
    if column in CELLS:
        return CELLS[column](row)
    other = {"gain": i - 1, "ahead": 0}[column]  # the row that this one is compared with
    if i == 0 or not rows[other]:
        return "-"  # there is nothing to compare with
    return distance_cell(row, rows[other], [each for each in rows if each])


# ---- Tables ------------------------------------------------------------------------------

def make_table(heading, columns, declared_rows):
    """Return a Markdown table. The three arguments are explained above TABLES."""
    if isinstance(columns, dict):
        groups = columns
    else:
        groups = {"": columns}  # one group without a name
    headings = heading.split(" | ")
    lines = [declared[0].split(" | ") for declared in declared_rows]  # lists of cells
    for position, (group, names) in enumerate(groups.items(), start=1):  # the label is at 0
        rows = [load_row(declared[position]) for declared in declared_rows]
        for column in names:
            if group:
                headings.append(f"{column}, {group}")
            else:
                headings.append(column)
            for i, line in enumerate(lines):
                line.append(make_cell(column, rows, i))
    return join_table([headings, *lines])


def join_table(rows):
    """Return a Markdown table of rows, which are lists of cells; the first has the headings."""
    headings, *lines = rows
    separator = ["---"] * len(headings)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in [headings, separator, *lines])


def fill_tables(path):
    """Return the text of a Markdown file with its tables made anew."""
    def fill(match):
        """Return the two comments of a table, with the new table between them."""
        begin, name, end = match.groups()
        if name in STUDY_TABLES:
            table = join_table(STUDY_TABLES[name]())
        else:
            table = make_table(*TABLES[name])
        if path.parent != HERE:
            table = table.replace("](", "](results/")  # the links to reports
        return begin + table + end
    pattern = r"(<!-- table: (.+?) -->\n)(?:\|.*\n)*(<!-- end -->)"
    return re.sub(pattern, fill, path.read_text())


if __name__ == "__main__":
    texts = [fill_tables(file) for file in FILES]  # all of them, before one is written
    for file, text in zip(FILES, texts):
        file.write_text(text)
