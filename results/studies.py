"""What the studies in this folder share: data, records, numbers as text, tuning runs.

A tuning study has runs that try values of several constants. Each of them writes a record,
results/FOLDER/NAME.json, and a run whose record is there is not repeated.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import train  # noqa: E402


# ---- Command line, data, records -----------------------------------------------------------

def parse_names(parser, known):
    """Parse the command line of a study. Return its options.

    Their `names` are the names that were given, or all that are known. An unknown name ends
    the process.
    """
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--data-dir", default=HERE.parent / "data")
    options = parser.parse_args()
    for name in options.names:
        if name not in known:
            parser.error(f"{name} is not one of {', '.join(known)}")
    if not options.names:
        options.names = list(known)
    return options


def split_training_images(data_dir, image_count, held_out_count):
    """Return two Splits of CIFAR-10's training images: the first ones, and the last ones.

    Raise ValueError if they would share images.
    """
    training, _, _ = train.load_cifar10(data_dir)
    if image_count + held_out_count > len(training.labels):
        raise ValueError(f"{image_count} training images and {held_out_count} held-out ones "
                         f"are more than the {len(training.labels)} that there are")
    held_out = train.take_images(training, slice(-held_out_count, None))
    return train.take_images(training, slice(image_count)), held_out


def write_record(path, record):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


# ---- Numbers as text -----------------------------------------------------------------------

def percent(fraction):
    """Return a fraction as text, in percent with two digits after the point."""
    # Without 1e-9, 0.94595 could become 94.59: the float may be a little smaller.
    return f"{100 * fraction + 1e-9:.2f}"


def in_points(distance, error):
    """Return a distance of two accuracies and its standard error as text, in points."""
    points = round(100 * distance, 2) + 0.0  # -0.0 + 0.0 is 0.0
    return f"{points:+.2f} ± {100 * error:.2f}"


def span(numbers, form="{:.3g}"):
    """Return the smallest and the largest number as text, or one if they look alike."""
    lowest = form.format(min(numbers))
    highest = form.format(max(numbers))
    if lowest == highest:
        return lowest
    return f"{lowest} to {highest}"


# ---- Tuning runs ---------------------------------------------------------------------------

class Study:
    """The runs of a study: `runs` maps the name of each run to its constants, {constant: value}."""

    def __init__(self, folder, runs):
        """`folder` is that of the records in results/. Each run has a seed of its own, from 0."""
        self.folder = folder
        self.runs = runs
        self.seeds = {name: seed for seed, name in enumerate(runs)}

    def record_path(self, name):
        """Return the file of a run's record."""
        return HERE / self.folder / f"{name}.json"

    def load_record(self, name):
        """Return the record of a run. Raise ValueError if it had other values or another seed."""
        record = json.loads(self.record_path(name).read_text())
        if (record["values"], record["seed"]) != (self.runs[name], self.seeds[name]):
            raise ValueError(f"{self.record_path(name)} is of other values or another seed than "
                             "the study has now. Delete it to train the run again")
        return record

    def load_records(self):
        """Return the records of all runs, in the order of `runs`."""
        return [self.load_record(name) for name in self.runs]

    def measure(self, train_run, image_count, held_out_count, description):
        """Train the runs that the command line names and that have no record yet.

        `train_run(values, training, held_out, seed)` returns what a run measured, as a
        dictionary. Its record has the values and the seed, too. Of CIFAR-10's training images,
        `training` has the first `image_count`, `held_out` the last `held_out_count`.
        """
        options = parse_names(argparse.ArgumentParser(description=description), self.runs)
        for name in options.names:
            if self.record_path(name).exists():
                self.load_record(name)  # raises if it is of another run
        training, held_out = split_training_images(
            options.data_dir, image_count, held_out_count)
        for name in options.names:
            if self.record_path(name).exists():  # another process may have written it by now
                continue
            values = self.runs[name]
            seed = self.seeds[name]
            measured = train_run(values, training, held_out, seed)
            write_record(self.record_path(name), {"values": values, "seed": seed, **measured})
            print(name, "done", flush=True)


# ---- Fractional factorials: two values of each factor, and not all combinations -----------

def fractional_factorial(factors, parities):
    """Return the runs of a design, {name: {factor: value}}; `factors` has two values for each.

    The first factors take all combinations. Each later factor has an entry in `parities`: the
    positions of some first factors. If an odd number of these have their second value, the
    later factor has its second value, too. The name of a run has a digit for each factor: 0 is
    its first value, 1 its second.
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
    Each column must have a 1 in half of the runs, and no two may be correlated. The error
    comes from what all effects together leave unexplained. It is the same for all columns.
    """
    results = np.asarray(results)
    run_count, columns = levels.shape
    signs = 2 * levels - 1
    effects = signs.T @ results / (run_count / 2)
    residuals = results - results.mean() - signs @ effects / 2
    deviation = np.sqrt((residuals ** 2).sum() / (run_count - 1 - columns))
    return effects, deviation * np.sqrt(4 / run_count)


def cells_of_effects(levels, accuracies):
    """Return the effects on the accuracies of the runs as texts, in points, with the error."""
    effects, error = estimate_effects(levels, accuracies)
    return [in_points(effect, error) for effect in effects]
