"""Make the tables of ../README.md and README.md anew from the reports in the folders beside this
file. A table stands between `<!-- table: NAME -->` and `<!-- end -->`; TABLES says what is in it.

    python results/tables.py
"""

import json
import math
import re
import statistics
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402

FILES = HERE.parent / "README.md", HERE / "README.md"

# NAME: (heading of the labels, columns, rows). A row is a label and a pattern of reports, or
# several with spaces between; " | " in a label begins another column. A column is a key of CELLS,
# or the distance to the row above ("gain") or to the first row ("ahead"). If `columns` maps names
# of groups to columns, a row has a pattern for each group, and "" leaves its cells empty.
TABLES = {
    "headline": ("command | epochs", {
        "H100": ["accuracy", "flip TTA"], "two CPU cores": ["accuracy", "flip TTA"],
        "H200": ["seconds"], "two Xeon cores": ["minutes"]}, [
        ("`python train.py` | 24", "h100/default-seed*", "default/seed*", "h200/default-seed*",
         "default/seed*"),
        ("`python train.py --recipe fast` | 12", "", "fast/seed*", "", "fast/seed*"),
        ("`python train.py --recipe plain` | 24", "h100/plain-seed*", "letter/plain-seed*", "",
         "letter/plain-seed1"),
    ]),
    "graph": ("code", ["training, s", "sweep, s", "seconds", "accuracy", "flip TTA", "seeds"], [
        ("without the CUDA graph (commit a90de17)", "h200/without-graph-seed*"),
        ("with it", "h200/default-seed*"),
    ]),
    "runs": ("options | machine", ["accuracy", "flip TTA", "90% at epoch", "94% at epoch", "LRMAX",
                                   "seeds"], [
        ("none | H100", "h100/default-seed*"),
        ("none | two CPU cores", "default/seed*"),
        ("`--precision fp16` | H100", "h100/fp16-seed*"),
        ("`--recipe fast` | two CPU cores", "fast/seed*"),
        ("`--recipe plain` | H100", "h100/plain-seed*"),
        ("`--recipe plain` | two CPU cores", "letter/plain-seed*"),
        ("`--epochs 10` | H100", "h100/ten-epochs-seed*"),
    ]),
    "first-look": ("options", ["LRMAX", "accuracy", "flip TTA", "seeds"], [
        ("`--subset --epochs 1`", "first-look/one-epoch-seed*"),
        ("`--subset`", "first-look/seed*"),
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
        ("[99991]: 94.1 with TTA (n=100), SGD, 10 epochs | `--recipe fast`", "fast/seed*"),
    ]),
    "sweeps": ("batch size", ["LRMAX found", "largest / smallest"], [
        ("128", "sweeps/batch-128-bf16-seed*"),
        ("512", "sweeps/batch-512-bf16-two-epochs-seed*"),
        ("1024", "sweeps/batch-1024-bf16-seed*"),
    ]),
    "holdout": ("change", ["LRMAX", "accuracy", "ahead", "seeds"], [
        ("none", "h100/holdout-lr-max-0.06-seed*"),
        ("LRMAX halved", "h100/holdout-lr-max-0.03-seed*"),
        ("LRMAX doubled", "h100/holdout-lr-max-0.12-seed*"),
    ]),
    "fast-tuning": ("change", dict.fromkeys(["with it", "without"], ["accuracy", "flip TTA"]), [
        *((f"`{option}`", f"fast-tuning/factorial-{skipped}1*",
           f"fast-tuning/factorial-{skipped}0*") for skipped, option in [
            ("", "--padding 2"), ("?", "--label-smoothing 0.1"), ("??", "--decay-epochs 3"),
            ("???", "--peak-fraction 0.12"), ("????", "--ema-epochs 1"),
            ("?????", "--lr-max 0.09")]),
        ("`--ema-epochs 0.25`, not 0.5", "fast-tuning/*-ema0.25-*", "fast-tuning/*-ema0.5-*"),
        ("`--padding 1`, not 2", "fast-tuning/padding1*", "fast-tuning/padding2*"),
    ]),
}


def in_todays_form(report):
    """Return a report in format 2, as far as it is read here, with today's names of constants."""
    if report.get("format") == 2:
        return report
    config, found = report["config"], report["lr_sweep"]
    was = {"annihilation": 1, "l2": 0, "average_epochs": 0, "flips": "alternating",
           **config["recipe"]}
    same = ("peak_fraction annihilation beta2 epsilon l2 label_smoothing logit_scale padding_mode "
            "flips cutout")
    recipe = {
        **{name: was[name] for name in same.split()},
        "epochs": config["epochs"], "batch_size": config["batch_size"],
        "beta1": was["beta1"][0], "beta1_peak": was["beta1"][1],
        "decay_epochs": {"inf": 0}.get(was["memory_epochs"], was["memory_epochs"]),
        "ema_epochs": was["average_epochs"],
        "initialization": "identity" if was["whitening_images"] else "pytorch",
    }
    rates = {"lr_max": config["lr_max"], "lr_max_from": "sweep" if found else "given",
             "lr_min": config["lr_min"], "lr_min_from": "lr_max" if found else "given"}
    return {**report, "config": {"recipe": recipe, "options": {"seed": config["seed"]}},
            "rates": rates}


def conditions(report):
    """Return what compared rows must share. One kind of CPU is as accurate as another."""
    data, environment = report["data"], report["environment"]
    machine = "cpu" if environment["device"] == "cpu" else environment["device_name"]
    return data["train_images"], data["evaluated_on"], machine, environment["precision"]


def configuration(report):
    """Return what the runs of one row must share: all but their seeds and the rates they found."""
    rates = report["rates"]
    given = [rates[name] for name in ("lr_max", "lr_min") if rates[f"{name}_from"] == "given"]
    return sorted(report["config"]["recipe"].items()), conditions(report), given


def check_alike(row, trait):
    """Raise ValueError if reports differ in what `trait` returns of them."""
    kinds = {json.dumps(trait(report)): name for name, report in row.items()}
    if len(kinds) > 1:
        raise ValueError(f"unlike reports: {kinds}")


def load_row(patterns):
    """Return the reports of a row by their path from here, in the order of their seeds."""
    paths = [path for pattern in patterns.split() for path in HERE.glob(f"{pattern}.json")]
    reports = {path.relative_to(HERE).as_posix(): in_todays_form(json.loads(path.read_text()))
               for path in paths}
    if patterns and not reports:
        raise ValueError(f"no report matches {patterns}")
    # A row of fast-tuning has all runs with one change, whatever else differs between them.
    check_alike(reports, conditions if "fast-tuning" in patterns else configuration)
    return dict(sorted(reports.items(), key=lambda item: item[1]["config"]["options"]["seed"]))


def percent(fraction):
    """Return a fraction in percent as text; 0.94595 is 94.60, whatever its last bit says."""
    return f"{100 * fraction + 1e-9:.2f}"


def span(numbers, form="{:.3g}"):
    """Return the smallest and the largest number as text, or the only one."""
    return " to ".join(dict.fromkeys(form.format(end) for end in (min(numbers), max(numbers))))


def values(row, key="final_test_accuracy"):
    """Return a value of each report's summary: by default its accuracy."""
    return [report["summary"][key] for report in row.values()]


def accuracy_cell(row):
    deviation = f" ± {percent(statistics.stdev(values(row)))}" if len(row) > 1 else ""
    return f"{percent(statistics.fmean(values(row)))}{deviation} (n={len(row)})"


def epoch_cell(row, goal):
    first = [epochs_to[goal] or math.inf for epochs_to in values(row, "epochs_to")]
    return span(first).replace("inf", "never")


def time_cell(row, key, unit=1):
    check_alike(row, lambda report: report["environment"]["device_name"])  # times hang on it
    return span([seconds / unit for seconds in values(row, key)], "{:,.0f}")


def found_rates(row):
    """Return the LRMAX that today's rule reads off the sweep of each report."""
    sweeps = [(report["lr_sweep"]["lr"], report["lr_sweep"]["loss"]) for report in row.values()]
    return [train.read_sweep(lrs, train.smooth_losses(losses, 1 / math.log10(lrs[1] / lrs[0])))[1]
            for lrs, losses in sweeps]


CELLS = {
    "accuracy": accuracy_cell,
    "flip TTA": lambda row: percent(statistics.fmean(values(row, "tta_test_accuracy"))),
    "seeds": lambda row: ", ".join(f"[{percent(accuracy)}]({name})"
                                   for name, accuracy in zip(row, values(row), strict=True)),
    "LRMAX": lambda row: span([report["rates"]["lr_max"] for report in row.values()]),
    "90% at epoch": lambda row: epoch_cell(row, "0.90"),
    "94% at epoch": lambda row: epoch_cell(row, "0.94"),
    "training, s": lambda row: time_cell(row, "train_seconds"),
    "sweep, s": lambda row: time_cell(row, "sweep_seconds"),
    "seconds": lambda row: time_cell(row, "total_seconds"),
    "minutes": lambda row: time_cell(row, "total_seconds", 60),
    "LRMAX found": lambda row: span(found_rates(row)),
    "largest / smallest": lambda row: f"{max(found_rates(row)) / min(found_rates(row)):.2f}",
}


def distance_cell(row, other, rows):
    """Return how far the mean of a row is above another's, and its standard error, in points.

    The runs of each row are taken to deviate alike: by the pooled standard deviation of all rows.
    """
    check_alike({name: report for each in rows for name, report in each.items()}, conditions)
    squares = sum(statistics.pvariance(values(each)) * len(each) for each in rows)
    deviation = math.sqrt(squares / sum(len(each) - 1 for each in rows))
    distance = statistics.fmean(values(row)) - statistics.fmean(values(other))
    error = deviation * math.sqrt(1 / len(row) + 1 / len(other))
    return f"{round(100 * distance, 2) + 0:+.2f} ± {100 * error:.2f}"  # + 0: no -0.00


def make_cell(column, rows, i):
    """Return the cell of row `i` in a column; a row is a dictionary of reports."""
    if column in CELLS:
        return CELLS[column](rows[i]) if rows[i] else "-"
    return distance_cell(rows[i], rows[{"gain": i - 1, "ahead": 0}[column]], rows) if i else "-"


def make_table(label, columns, declared):
    """Return a Markdown table as TABLES declares it."""
    headings, lines = [label], [[row[0]] for row in declared]
    groups = columns if isinstance(columns, dict) else {"": columns}
    for position, (group, names) in enumerate(groups.items(), 1):
        rows = [load_row(row[position]) for row in declared]
        headings += [", ".join(filter(None, [name, group])) for name in names]
        for i, line in enumerate(lines):
            line += [make_cell(name, rows, i) for name in names]
    heading, *lines = [" | ".join(line) for line in [headings, *lines]]
    lines = [heading, re.sub(r"[^|]+", " --- ", heading).strip(), *lines]
    return "".join(f"| {line} |\n" for line in lines)


def fill_tables(path):
    """Return the text of a Markdown file with its tables made anew."""
    def fill(match):
        table = make_table(*TABLES[match[2]])
        if path.parent != HERE:
            table = re.sub(r"\]\((?!http)", "](results/", table)
        return match[1] + table + match[3]
    return re.sub(r"(<!-- table: (.+?) -->\n).*?(<!-- end -->)", fill, path.read_text(), flags=re.S)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(fill_tables(file))
