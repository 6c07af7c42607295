"""Tests of the tables and studies in results/ against NumPy and counts by hand.

They need no data set: most run on small records that they write, and some check ours.
"""

import dataclasses
import functools
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
import finder  # noqa: E402
import muon_tuning  # noqa: E402
import rules  # noqa: E402
import studies  # noqa: E402
import tables  # noqa: E402
import train  # noqa: E402
from test_train import linear_network, random_split  # noqa: E402

CLASSES = [str(number) for number in range(10)]


# ---- Tables and text say what the reports say -------------------------------------------

# What others reported, and the link that the page has to have.
REPORTED = {
    "90.98": "github.com/nanekja/pytorch_utils",
    "93.07": "github.com/jaiyesh/tsai-era",
    "94.08": "github.com/davidcpage/cifar10-fast",
}
EARLIER = {"91.10", "94.17"}  # our own numbers, of the commits 8bd2076 and 6558edc
REPORTS = tables.HERE  # some tests write reports elsewhere


def rows_of(names):
    """Return the rows of the tables with these names."""
    rows = []
    for name in names:
        _, _, declared_rows = tables.TABLES[name]
        for _, *patterns in declared_rows:
            rows += [tables.load_row(pattern) for pattern in patterns if pattern]
    return rows


def percentages_of_reports():
    """Return each accuracy of the reports, and each mean, as text."""
    numbers = []
    for row in rows_of(tables.TABLES):
        if all(report["epochs"] for report in row.values()):
            for key in ("final_test_accuracy", "tta_test_accuracy"):
                accuracies = tables.values(row, key)
                numbers += [*accuracies, np.mean(accuracies)]
    return {studies.percent(number) for number in numbers}


@pytest.fixture(scope="module")
def shown_reports():
    """Return the reports in the tables that the two pages show, by their path."""
    text = "".join(path.read_text() for path in tables.FILES)
    reports = {}
    for name in re.findall("<!-- table: (.+?) -->", text):
        if name not in tables.STUDY_TABLES:  # those are not from reports
            for row in rows_of([name]):
                reports.update(row)
    return reports


def report_with(accuracy, section=None, **values):
    """Return a report of results/ with another accuracy and other values in a section."""
    report = json.loads(min(REPORTS.glob("default/*.json")).read_text())
    report["summary"]["final_test_accuracy"] = accuracy
    parent = report["config"] if section == "recipe" else report
    if section:
        parent[section].update(values)
    return report


@pytest.fixture
def written_row(tmp_path, monkeypatch):
    """Return a function that writes reports and loads them as a row."""
    monkeypatch.setattr(tables, "HERE", tmp_path)

    def write_and_load(*reports):
        (tmp_path / "study").mkdir()
        for number, report in enumerate(reports):
            (tmp_path / "study" / f"{number}.json").write_text(json.dumps(report))
        return tables.load_row("study/*")
    return write_and_load


@pytest.mark.parametrize("path", tables.FILES, ids=["README", "results"])
def test_the_tables_are_those_of_the_reports(path):
    assert path.read_text() == tables.fill_tables(path), "run python results/tables.py"


@pytest.mark.parametrize("path", tables.FILES, ids=["README", "results"])
def test_a_percentage_with_two_decimals_is_of_some_report_or_has_its_source(path):
    """It finds about half of the wrong digits: any accuracy of any report passes."""
    text = path.read_text()
    prose = re.sub(r"<!-- table: .*?<!-- end -->|```.*?```", "", text, flags=re.DOTALL)
    # The first one of "65.50 to 70.50%" is a percentage, too.
    figures = set(re.findall(r"(\d\d\.\d\d)(?=%| ±|\s(?:to|and)\s\d\d\.\d\d%)", prose))
    assert figures
    unknown = figures - percentages_of_reports() - EARLIER
    without_source = [figure for figure in unknown
                      if figure not in REPORTED or REPORTED[figure] not in text]
    assert without_source == []


def test_each_report_is_used_by_a_table_that_is_shown(shown_reports):
    paths = {path.relative_to(tables.HERE).as_posix()
             for path in tables.HERE.glob("*/*.json")
             if path.parent.name not in ("finder", "muon-tuning")}
    assert set(shown_reports) == paths


@pytest.mark.parametrize("name, path", [
    ("tuned", "default/seed0.json"), ("fast", "fast/seed0.json"), ("best", "best/seed0.json"),
    ("plain", "h100/plain-seed0.json")])
def test_a_recipe_has_the_constants_of_its_runs(name, path):
    recipe = dataclasses.replace(train.RECIPES[name], batch_size=512)
    report = json.loads((tables.HERE / path).read_text())
    assert report["config"]["recipe"] == dataclasses.asdict(recipe)


def test_todays_rule_finds_the_rates_that_the_runs_used(shown_reports):
    swept = [report for report in shown_reports.values()
             if report["epochs"] and report["rates"]["lr_max_from"] == "sweep"]
    assert len(swept) > 10
    for report in swept:
        (found,) = tables.found_rates({"": report})
        assert found == pytest.approx(report["rates"]["lr_max"])


def test_a_row_is_in_the_order_of_its_seeds(written_row):
    reports = [report_with(0.9) for _ in range(3)]
    for report, seed in zip(reports, [10, 9, 100], strict=True):
        report["config"]["options"]["seed"] = seed
    assert list(written_row(*reports)) == ["study/1.json", "study/0.json", "study/2.json"]


@pytest.mark.parametrize("section, name, value", [
    ("recipe", "label_smoothing", 0.1),
    ("recipe", "epochs", 23),
    ("data", "train_images", 45_000),
    ("data", "evaluated_on", "held-out training images"),
    ("environment", "precision", "fp16"),
    ("environment", "device", "mps"),
    ("rates", "lr_max_from", "given"),
])
def test_unlike_runs_are_refused_as_a_row(written_row, section, name, value):
    with pytest.raises(ValueError, match="unlike"):
        written_row(report_with(0.9), report_with(0.9, section, **{name: value}))


def test_runs_on_two_models_of_gpu_are_refused_as_a_row(written_row):
    gpus = [report_with(0.9, "environment", device="cuda", device_name=name)
            for name in ("Tesla T4", "NVIDIA H100")]
    with pytest.raises(ValueError, match="unlike"):
        written_row(*gpus)


@pytest.mark.parametrize("name, different", [
    ("device_name", ["one", "another"]), ("threads", [1, 2])])
def test_runs_on_unlike_cpus_share_a_row_and_minutes_but_not_seconds(written_row, name, different):
    cpus = [report_with(0.9, "environment", device="cpu", **{name: value})
            for value in different]
    for minutes, report in enumerate(cpus, start=2):
        report["summary"]["total_seconds"] = 60 * minutes
    row = written_row(*cpus)
    assert tables.accuracy_cell(row) == "90.00 ± 0.00 (n=2)"
    with pytest.raises(ValueError, match="unlike"):
        tables.seconds_cell(row, "total_seconds")
    assert tables.minutes_cell(row) == "2 to 3"


def test_a_run_that_was_continued_on_the_same_machine_shares_a_cell_of_times(written_row):
    report = report_with(0.9)
    continued = {**report, "continued_in": [report["environment"]]}
    assert tables.seconds_cell(written_row(report, continued), "total_seconds")


def test_a_report_without_a_field_of_the_recipe_is_refused(written_row):
    report = report_with(0.9)
    del report["config"]["recipe"]["cutout"]
    with pytest.raises(ValueError, match=r"study/0\.json.*missing: \['cutout'\]"):
        written_row(report)


def test_a_report_with_an_unknown_field_in_its_recipe_is_refused(written_row):
    with pytest.raises(ValueError, match=r"study/0\.json.*unknown: \['dropout'\]"):
        written_row(report_with(0.9, "recipe", dropout=0.5))


def test_a_pattern_without_reports_is_refused_unless_it_is_empty():
    with pytest.raises(ValueError, match="no report matches nothing/"):
        tables.load_row("nothing/*")
    assert tables.load_row("") == {}
    assert tables.make_cell("accuracy", [{}], 0) == "-"


def test_a_report_of_a_run_that_did_not_end_is_refused(written_row):
    with pytest.raises(ValueError, match=r"study/0\.json is of a run that did not end"):
        written_row(report_with(0.9, "summary", status="interrupted"))


def test_old_tables_are_replaced(tmp_path):
    text = tables.FILES[0].read_text()
    page = tmp_path / "README.md"
    page.write_text(re.sub(r"(<!-- table: .+ -->\n)(\|.*\n)+", r"\1| old |\n", text))
    assert page.read_text() != text
    assert tables.fill_tables(page) == text


def test_each_table_is_shown_once_and_closed():
    text = "".join(path.read_text() for path in tables.FILES)
    names = re.findall(r"<!-- table: (.+?) -->\n(?:\|.*\n)+<!-- end -->", text)
    assert sorted(names) == sorted([*tables.TABLES, *tables.STUDY_TABLES])


def test_a_distance_that_is_hardly_below_zero_has_no_minus_sign():
    assert studies.in_points(-1e-9, 0.001) == "+0.00 ± 0.10"
    assert studies.in_points(-0.002, 0.001) == "-0.20 ± 0.10"


def row_with(*counts):
    """Return a row of runs with so many of 10,000 test images classified correctly."""
    return {f"run{i}-{counts[0]}": report_with(count / 10_000)
            for i, count in enumerate(counts)}


@pytest.mark.parametrize("count, shown", [
    (94_595, "94.60"), (94_594, "94.59"), (5, "0.01"), (100_000, "100.00")])
def test_percentages_are_rounded_as_by_hand(count, shown):
    assert studies.percent(count / 100_000) == shown


def test_means_and_deviations_against_numpy():
    counts = [9457, 9467, 9462]
    percent = np.array(counts) / 100
    expected = f"{percent.mean():.2f} ± {percent.std(ddof=1):.2f} (n=3)"
    assert tables.accuracy_cell(row_with(*counts)) == expected
    assert tables.accuracy_cell(row_with(9420)) == "94.20 (n=1)"


@pytest.mark.parametrize("column, other", [("gain", 1), ("ahead", 0)])
def test_distances_and_their_errors_against_numpy(column, other):
    counts = [[9457, 9467, 9462], [9420], [9451, 9433]]
    percent = [np.array(row) / 100 for row in counts]
    residuals = np.concatenate([row - row.mean() for row in percent])
    deviation = np.sqrt((residuals ** 2).sum() / (6 - 3))  # six runs, three means
    distance = percent[2].mean() - percent[other].mean()
    error = deviation * np.sqrt(1 / 2 + 1 / len(counts[other]))
    rows = [row_with(*row) for row in counts]
    assert tables.make_cell(column, rows, 2) == f"{distance:+.2f} ± {error:.2f}"
    assert tables.make_cell(column, rows, 0) == "-"


@pytest.mark.parametrize("epochs, shown", [
    ([19, 19], "19"), ([22, 18, 20], "18 to 22"), ([None, 19], "19 to never"),
    ([None], "never")])
def test_epochs_to_a_goal_are_shown_from_first_to_last(epochs, shown):
    row = {}
    for number, epoch in enumerate(epochs):
        row[str(number)] = report_with(0.9, "summary", epochs_to={"0.90": 7, "0.94": epoch})
    assert tables.make_cell("94% at epoch", [row], 0) == shown


def test_the_spread_of_a_rule_is_its_largest_rate_divided_by_its_smallest():
    row = {}
    for lowest in (0.01, 0.05, 0.02):
        row[str(lowest)] = report_with(0.9, "lr_sweep", lr=[lowest, 1.0], loss=[2.0, 1.0])
    assert tables.spread_cell(row, lambda lrs, losses, steps: lrs[0]) == "5"


def test_a_distance_between_runs_under_unlike_conditions_is_refused():
    rows = [row_with(9420, 9430), {"gpu": report_with(0.95, "environment", device="cuda")}]
    with pytest.raises(ValueError, match="unlike"):
        tables.make_cell("gain", rows, 1)


def test_a_row_without_reports_is_compared_with_no_other():
    rows = [{}, row_with(9420, 9430), row_with(9440, 9450)]
    assert tables.make_cell("gain", rows, 1) == "-"  # there is none in the row above
    assert tables.make_cell("gain", rows, 2) == "+0.20 ± 0.07"
    assert tables.make_cell("ahead", rows, 2) == "-"


def test_a_distance_between_rows_of_one_run_is_refused():
    with pytest.raises(ValueError, match="needs a row with two runs"):
        tables.make_cell("gain", [row_with(9420), row_with(9430)], 1)


# A sweep of 60 steps: the loss rises a little for 20 of them, falls from 2 to 1 in 20, and
# stays there.
STEP_LRS = np.geomspace(1e-6, 1, 60).tolist()
STEP_LOSSES = [*(2 + step / 1000 for step in range(20)),
               *(2 - step / 20 for step in range(1, 21)), *[1.0] * 20]


def test_the_steepest_slope_is_late_in_the_fall_because_of_the_smoothing():
    assert rules.steepest(STEP_LRS, STEP_LOSSES, 0) == STEP_LRS[38]


def test_a_tenth_of_the_minimum_is_read_from_the_smoothed_losses():
    # fastai's average still falls after the loss does, so it is lowest at the last step
    # that fastai looks at: the sixth from the end.
    assert rules.tenth_of_minimum(STEP_LRS, STEP_LOSSES, 0) == STEP_LRS[54] / 10


def test_the_valley_is_half_way_down_the_longest_fall():
    # Of 60 steps, fastai looks at those from 6 to 54. The average falls from step 19 to 54:
    # 36 steps. fastai takes the step 36 before the last one, plus 12, plus 6.
    assert rules.valley(STEP_LRS, STEP_LOSSES, 0) == STEP_LRS[54 - 36 + 12 + 6]


def test_our_rule_is_twice_as_high_in_a_long_training():
    losses = [*STEP_LOSSES[:50], *[3.0] * 10]  # they rise
    short = rules.ours(STEP_LRS, losses, 1)
    assert rules.ours(STEP_LRS, losses, 10**6) == 2 * short
    assert rules.always_twice(STEP_LRS, losses, 1) == 2 * short


def test_our_rule_picks_the_start_of_a_sweep_without_a_fall():
    assert rules.ours([1e-6, 1e-5, 1e-4], [1.0, 2.0, 3.0], 1) == 1e-6


@pytest.fixture
def finder_case(tmp_path, monkeypatch):
    """Let the finder have one case, whose record has two runs at each of three rates."""
    monkeypatch.setattr(finder, "HERE", tmp_path)
    case = finder.Case(rate=0.01, images=100, batch_size=40, epochs=2)
    monkeypatch.setattr(finder, "CASES", {"case": case})
    accuracies = {0.001: (0.2, 0.4), 0.01: (0.6, 0.6), 0.1: (0.1, 0.3)}
    runs = [{"seed": seed, "lr_max": rate, "accuracy": accuracy}
            for rate, pair in accuracies.items() for seed, accuracy in enumerate(pair)]
    sweeps = [{"seed": seed, "lr": [1e-3, 1e-2], "loss": [2.0, 1.0]} for seed in (0, 1)]
    finder.record_path("case").parent.mkdir()
    finder.record_path("case").write_text(json.dumps({"runs": runs, "sweeps": sweeps}))
    return "case"


@pytest.mark.parametrize("picked, lost", [
    (0.01, 0), (0.001, 30), (0.1, 40), (10 ** -2.5, 15), (1e-6, 30), (10.0, 40)])
def test_a_rule_loses_the_accuracy_that_it_has_less_than_the_best_rate(
        finder_case, picked, lost):
    measured, _ = finder.judge(finder_case, lambda lrs, losses, steps: picked)
    assert measured == pytest.approx(lost)


@pytest.mark.parametrize("picks, lost, is_beyond", [
    ([0.001, 0.1], 35, False), ([0.01, 0.2], 20, True), ([0.0005, 0.01], 15, True)])
def test_the_loss_of_a_rule_is_a_mean_and_says_if_a_rate_was_beyond_the_measured_ones(
        finder_case, picks, lost, is_beyond):
    pick = iter(picks)
    judged = finder.judge(finder_case, lambda lrs, losses, steps: next(pick))
    assert judged == (pytest.approx(lost), is_beyond)


def test_the_table_of_cases_has_a_star_and_ends_with_mean_and_worst(finder_case, monkeypatch):
    cases = {"first": finder.CASES["case"], "second": finder.CASES["case"]}
    record = finder.load_record("case")
    for name in cases:
        studies.write_record(finder.record_path(name), record)
    picks = {"first": 0.001, "second": 0.2}
    monkeypatch.setattr(finder, "CASES", cases)
    monkeypatch.setattr(finder, "SUMMARIES", [("mean", np.mean, cases), ("worst", np.max, cases)])
    monkeypatch.setattr(finder, "picked_rates", lambda name, rule: [picks[name]])
    monkeypatch.setattr(rules, "RULES", {"ours": rules.ours})
    assert finder.table_of_cases() == [
        ["case", "best rate", "LRMAX", "ours"],
        ["first", "0.01", "0.001", "30.0"],
        ["second", "0.01", "0.2", "40.0*"],
        ["mean", "", "", "35.0"],
        ["worst", "", "", "40.0"],
    ]


@pytest.mark.parametrize("changes, steps", [
    ({}, 6), ({"optimizer": torch.optim.AdamW}, 6),  # two epochs of three steps
    ({"optimizer": torch.optim.NAdam}, 6),
    ({"optimizer": finder.plain_sgd}, 0), ({"recipe": train.Recipe(optimizer="muon")}, 0)])
def test_a_rule_is_told_the_steps_of_a_training_with_adam(
        finder_case, monkeypatch, changes, steps):
    case = dataclasses.replace(finder.CASES[finder_case], **changes)
    monkeypatch.setitem(finder.CASES, finder_case, case)
    told = []

    def rule(lrs, losses, steps):
        told.append((lrs, losses, steps))
        return 0.01

    finder.picked_rates(finder_case, rule)
    assert told == [([1e-3, 1e-2], [2.0, 1.0], steps)] * 2


def check_record(name):
    """Fail unless the record of a case has all its sweeps and runs."""
    record = finder.load_record(name)
    case = finder.CASES[name]
    assert [sweep["seed"] for sweep in record["sweeps"]] == list(finder.SWEEP_SEEDS)
    assert all(len(sweep["lr"]) == len(sweep["loss"]) > 50 for sweep in record["sweeps"])
    expected = [(case.rate * ratio, seed) for ratio in finder.RATIOS for seed in case.seeds]
    assert [(run["lr_max"], run["seed"]) for run in record["runs"]] == expected


@pytest.mark.parametrize("name", finder.CASES)
def test_a_case_has_a_record_of_all_its_sweeps_and_runs(name):
    check_record(name)


def test_each_record_of_the_finder_has_its_case():
    names = {path.stem for path in (finder.HERE / "finder").glob("*.json")}
    assert names == set(finder.CASES)


def test_sixty_classes_are_ten_times_the_six_orders_of_the_colors():
    images = torch.tensor([1, 2, 3]).byte().view(1, 3, 1, 1).repeat(120, 1, 2, 2)
    labels = torch.arange(120) // 6 % 10
    relabeled = finder.sixty_classes(train.Split(images, labels))
    assert relabeled.images.shape == images.shape
    assert sorted(relabeled.labels.tolist()) == sorted([*range(60)] * 2)
    for order in range(6):
        of_order = relabeled.images[relabeled.labels % 6 == order]
        assert (of_order == of_order[:1]).all()  # all have their colors in one order
    assert len(relabeled.images.unique(dim=0)) == 6


@pytest.fixture
def started_runs(monkeypatch):
    """Return a list that will hold the Runs that are started."""
    runs = []
    start_run = train.start_run

    def keep_run(*arguments, **keywords):
        runs.append(start_run(*arguments, **keywords))
        return runs[-1]

    monkeypatch.setattr(train, "start_run", keep_run)
    return runs


@pytest.fixture
def measured_runs(finder_case, monkeypatch, started_runs):
    """Return a function that measures a small case, twice; it returns the Runs of the first."""
    split = random_split(100)
    monkeypatch.setattr(train, "load_cifar10", lambda data_dir: (split, split, CLASSES))
    monkeypatch.setattr(finder, "HELD_OUT", 40)

    def measure(case):
        monkeypatch.setattr(finder, "CASES", {"case": case})
        finder.measure("case", "data")
        check_record("case")
        first = list(started_runs)
        measured = finder.load_record("case")
        studies.write_record(finder.record_path("case"), {**measured, "sweeps": []})
        finder.measure("case", "data", with_training=False)
        check_record("case")
        assert finder.load_record("case")["runs"] == measured["runs"]
        return first

    return measure


def test_a_case_is_swept_and_trained_with_our_optimizer(measured_runs):
    case = finder.Case(rate=0.01, images=50, batch_size=25, epochs=1, model=linear_network,
                       recipe=train.RECIPES["plain"])
    runs = measured_runs(case)
    last_lrs = [run.optimizer.param_groups[0]["lr"] for run in runs[3:]]  # after three sweeps
    rates = [0.01 * ratio for ratio in finder.RATIOS for _ in case.seeds]
    assert last_lrs == pytest.approx([rate / 300 for rate in rates])
    for run in runs:
        assert run.recipe == dataclasses.replace(
            train.RECIPES["plain"], epochs=1, batch_size=25)
        assert type(run.optimizer) is torch.optim.Adam
        assert len(run.training.labels) == 50
        assert len(run.test.labels) == 40


def test_a_case_is_swept_and_trained_with_its_optimizer_and_its_classes(measured_runs):
    case = finder.Case(rate=0.01, images=50, batch_size=25, epochs=1, seeds=(0,),
                       model=functools.partial(linear_network, classes=60),
                       optimizer=finder.plain_sgd, num_classes=60,
                       relabel=finder.sixty_classes)
    runs = measured_runs(case)
    assert len(runs) == 3 + 6  # sweeps and trainings
    for run in runs:
        assert type(run.optimizer) is torch.optim.SGD
        for split in (run.training, run.test):
            assert 10 <= split.labels.max() < 60


def test_a_case_that_diverges_has_the_accuracy_of_chance(monkeypatch):
    def diverge(run, rates):
        raise train.Diverged("the loss became NaN")
        yield

    monkeypatch.setattr(train, "train_epochs", diverge)
    case = finder.Case(rate=0.01, num_classes=60)
    assert finder.final_accuracy(case, None, 0.01) == 1 / 60


def test_training_images_that_are_held_out_too_are_refused(monkeypatch):
    split = random_split(100)
    monkeypatch.setattr(train, "load_cifar10", lambda data_dir: (split, split, CLASSES))
    training, held_out = studies.split_training_images("data", 60, 40)
    assert torch.equal(torch.cat([training.labels, held_out.labels]), split.labels)
    with pytest.raises(ValueError, match="61 training images and 40 held-out ones"):
        studies.split_training_images("data", 61, 40)


# ---- The study that tunes Muon ------------------------------------------------------------

def test_no_factor_is_mixed_up_with_another_or_with_a_joint_effect():
    signs = 2 * studies.levels_of(muon_tuning.RUNS) - 1
    runs, factors = signs.shape
    assert (runs, factors) == (16, len(muon_tuning.FACTORS))
    assert (signs.sum(0) == 0).all()
    assert (signs.T @ signs == runs * np.eye(factors)).all()
    for first, second in itertools.combinations(range(factors), 2):
        assert (signs.T @ (signs[:, first] * signs[:, second]) == 0).all()


def test_a_factorial_has_all_combinations_of_its_first_factors():
    factors = {"size": (1, 2), "color": (3, 4), "speed": (5, 6)}
    runs = studies.fractional_factorial(factors, parities=[(0, 1)])
    assert runs == {
        "000": {"size": 1, "color": 3, "speed": 5}, "011": {"size": 1, "color": 4, "speed": 6},
        "101": {"size": 2, "color": 3, "speed": 6}, "110": {"size": 2, "color": 4, "speed": 5}}
    assert studies.levels_of(runs).tolist() == [[0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 0]]


def test_an_effect_is_the_mean_with_the_high_value_less_that_with_the_low_one():
    generator = np.random.default_rng(0)
    levels = muon_tuning.levels_with_joint_effect()
    results = generator.normal(size=16)
    effects, _ = studies.estimate_effects(levels, results)
    assert len(effects) == len(muon_tuning.FACTORS) + 1
    for factor, effect in enumerate(effects):
        is_high = levels[:, factor] == 1
        assert effect == pytest.approx(results[is_high].mean() - results[~is_high].mean())


def test_the_error_of_an_effect_is_how_far_it_spreads():
    generator = np.random.default_rng(0)
    levels = muon_tuning.levels_with_joint_effect()
    true_effects = np.arange(7)
    squared_errors = []
    distances = []
    for _ in range(500):
        results = levels @ true_effects + generator.normal(size=16)
        effects, error = studies.estimate_effects(levels, results)
        distances.append(effects - true_effects)
        squared_errors.append(error ** 2)
    assert np.sqrt(np.mean(squared_errors)) == pytest.approx(np.std(distances), rel=0.1)
    assert np.std(distances) == pytest.approx(0.5, rel=0.1)  # 2 / sqrt(16)


def test_effects_are_shown_in_points():
    levels = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    accuracies = [0.5, 0.49, 0.52, 0.53]  # not additive, so that there is an error
    assert studies.cells_of_effects(levels, accuracies) == ["+3.00 ± 1.00", "+0.00 ± 1.00"]


def test_each_run_of_muon_tuning_has_a_record():
    names = [path.stem for path in (studies.HERE / "muon-tuning").glob("*.json")]
    assert sorted(names) == sorted(muon_tuning.RUNS)
    muon_tuning.STUDY.load_records()  # refuses those of other values


@pytest.fixture
def small_study(tmp_path, monkeypatch):
    """Return a study of three runs, whose records are written into a folder of the test."""
    split = random_split(100)
    monkeypatch.setattr(train, "load_cifar10", lambda data_dir: (split, split, CLASSES))
    monkeypatch.setattr(studies, "HERE", tmp_path)
    return studies.Study("study", {"a": {"size": 1}, "b": {"size": 2}, "c": {"size": 3}})


def test_a_study_measures_the_runs_that_have_no_record(small_study, monkeypatch):
    calls = []

    def train_run(values, training, held_out, seed):
        calls.append((values["size"], seed))
        images = [len(training.labels), len(held_out.labels)]
        return {"images": images}

    monkeypatch.setattr(sys, "argv", ["study.py", "b"])
    small_study.measure(train_run, 60, 40, "a study")
    monkeypatch.setattr(sys, "argv", ["study.py"])
    small_study.measure(train_run, 60, 40, "a study")
    assert calls == [(2, 1), (1, 0), (3, 2)]
    assert small_study.load_records()[0] == {
        "values": {"size": 1}, "seed": 0, "images": [60, 40]}


@pytest.mark.parametrize("record", [
    {"values": {"size": 5}, "seed": 0}, {"values": {"size": 1}, "seed": 5}])
def test_a_study_does_not_pass_over_a_record_of_other_values(small_study, monkeypatch, record):
    monkeypatch.setattr(sys, "argv", ["study.py", "a"])
    studies.write_record(small_study.record_path("a"), record)
    with pytest.raises(ValueError, match="is of other values or another seed than the study"):
        small_study.measure(lambda *_: record, 60, 40, "a study")


def matrices_of_adam(run):
    """Return the names of the weights, but for biases and BatchNorms, that Adam updates."""
    names = {id(values): name for name, values in run.model.named_parameters()}
    return [names[id(values)] for values in run.optimizer.param_groups[1]["params"]]


def test_a_run_of_muon_tuning_trains_with_its_values(monkeypatch, started_runs):
    for name in ("MUON_MOMENTUM", "NEWTON_SCHULZ_STEPS"):
        monkeypatch.setattr(train, name, getattr(train, name))  # set back at the end
    monkeypatch.setattr(muon_tuning, "EPOCHS", 1)
    split = random_split(40)
    values = muon_tuning.RUNS["011101"]
    seen = []
    true_step = train.muon_step

    def muon_step(weight, gradient, momentum, lr, dtype):
        seen.append((train.MUON_MOMENTUM, train.NEWTON_SCHULZ_STEPS, lr))
        true_step(weight, gradient, momentum, lr, dtype)

    monkeypatch.setattr(train, "muon_step", muon_step)
    record = muon_tuning.train_run(values, split, split, seed=0)
    [run] = started_runs
    assert run.recipe == dataclasses.replace(
        train.RECIPES["fast"], epochs=1, batch_size=16, muon_lr_factor=0.07 / 0.06,
        peak_fraction=0.1, ema_epochs=0.5)
    momentums, steps, lrs = zip(*seen)
    assert set(momentums) == {0.85}
    assert set(steps) == {5}
    assert lrs[-1] == pytest.approx(0.07 / 300)  # the last learning rate is LRMIN
    assert matrices_of_adam(run) == ["0.0.weight", "8.weight"]  # first convolution, last layer
    assert record["accuracies"] == [train.evaluate_run(run)["test_accuracy"]]
    assert record["tta_accuracy"] == train.evaluate_run(run, tta=True)["test_accuracy"]


def test_the_narrow_network_begins_by_passing_its_input_on():
    torch.manual_seed(0)
    network = muon_tuning.NarrowResNet()
    assert sum(parameter.numel() for parameter in network.parameters()) < 500_000
    images = torch.rand(1, 32, 8, 8)
    block = network[2].residual[0]  # a convolution that has as many outputs as inputs
    assert torch.equal(block[0](images), images)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
