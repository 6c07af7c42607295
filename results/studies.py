"""Studies: runs that try values of several constants, and what each constant does.

Each run writes a record, results/FOLDER/NAME.json, and a run whose record is there is not
repeated.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import finder  # noqa: E402


class Study:
    """The runs of a study: `runs` has the values of the constants for the name of each run."""

    def __init__(self, folder, runs, seeds=None):
        """`folder` is that of the records in results/. By default, seeds count from 0."""
        self.folder = folder
        self.runs = runs
        self.seeds = dict(zip(runs, seeds or itertools.count()))

    def record_path(self, name):
        """Return the file of a run's record."""
        return HERE / self.folder / f"{name}.json"

    def load_record(self, name):
        """Return the record of a run. Raise ValueError if the run had other values."""
        record = json.loads(self.record_path(name).read_text())
        if (record["values"], record["seed"]) != (self.runs[name], self.seeds[name]):
            raise ValueError(f"{self.record_path(name)} has other values than the study; "
                             "delete it")
        return record

    def load_records(self):
        """Return the records of all runs, in the order of `runs`."""
        return [self.load_record(name) for name in self.runs]

    def measure(self, train_run, image_count, held_out_count, description):
        """Train the runs that the command line names and that have no record yet.

        `train_run(values, training, held_out, seed)` returns the record of a run, with
        "values" and "seed". The Splits have the first and the last training images of
        CIFAR-10, so many of each.
        """
        options = finder.parse_names(argparse.ArgumentParser(description=description), self.runs)
        training, held_out = finder.split_training_images(
            options.data_dir, image_count, held_out_count)
        for name in options.names:
            if self.record_path(name).exists():
                self.load_record(name)  # it has to be of the same run
                continue
            record = train_run(self.runs[name], training, held_out, self.seeds[name])
            finder.write_record(self.record_path(name), record)
            print(name, "done", flush=True)


def give_first_convolution_to_adam(run):
    """Let Adam update the weight of the first convolution, in place of Muon.

    train.py did so when the first studies were made.
    """
    muon_group, adam_group, _ = run.optimizer.param_groups
    adam_group["params"].append(muon_group["params"].pop(0))


# ---- Fractional factorials: two values of each factor, and not all combinations -----------

def fractional_factorial(factors, parities):
    """Return runs that tell the factors from each other; `factors` has two values for each.

    The first factors take all combinations. Each of the others is a parity of these: it has
    value 1 if an odd number of them have. `parities` holds, for each of the others, the
    positions of the factors that count. A digit of a run's name says which value a factor
    has, 0 or 1.
    """
    runs = {}
    for free_levels in itertools.product((0, 1), repeat=len(factors) - len(parities)):
        levels = list(free_levels)
        for positions in parities:
            levels.append(sum(free_levels[position] for position in positions) % 2)
        name = "".join(str(level) for level in levels)
        runs[name] = {factor: factors[factor][level] for factor, level in zip(factors, levels)}
    return runs


def levels_of(runs):
    """Return which value each factor has in each run, 0 or 1: an array (runs, factors)."""
    return np.array([[int(digit) for digit in name] for name in runs])


def estimate_effects(levels, results):
    """Return the effect of each column of `levels` (runs, columns), and their standard error.

    An effect says how much larger `results` (runs,) are with a 1 in the column than with a 0.
    It is estimated by least squares. The error comes from what all effects together leave
    unexplained. It is the same for all columns, because each has a 1 in half of the runs and
    no two columns are correlated.
    """
    results = np.asarray(results)
    runs, columns = levels.shape
    design = np.column_stack([np.ones(runs), levels])
    coefficients, *_ = np.linalg.lstsq(design, results, rcond=None)
    residuals = results - design @ coefficients
    deviation = np.sqrt((residuals ** 2).sum() / (runs - 1 - columns))
    return coefficients[1:], deviation * np.sqrt(4 / runs)


def cells_of_effects(levels, accuracies):
    """Return the effects on the accuracies of the runs as texts, in points, with the error."""
    effects, error = estimate_effects(levels, accuracies)
    return [f"{100 * effect:+.2f} ± {100 * error:.2f}" for effect in effects]
