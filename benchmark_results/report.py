"""Rebuilds every table and plot from the raw evaluations of the runs.

    pip install -r benchmark_results/requirements.txt
    python benchmark_results/report.py

reads benchmark_results/runs/<algorithm>/<data set>/seed<k>/eval.csv, the runs of fewer steps in
benchmark_results/short (the same folders) and the calibration of the learning-curve tests, and
writes results.md, curves.png and the tables of README.md and of docs/results.md. `final` is the
mean of a run's last five evaluations, `best` its best single one (a choice that offline data alone
would not allow, so it stands apart). Over seeds: mean and 95 % bootstrap interval.
"""

import csv
import math
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rliable import library as rliable
from rliable import metrics
from scipy.stats import bootstrap

ONLINE = ("sac", "sac_offline")  # behind the data sets; not compared with the rest
FOLDER = Path(__file__).resolve().parent
CALIBRATION = FOLDER.parent / "tests" / "calibration"
FILES = sorted(path.stem for path in (FOLDER.parent / "algorithms").glob("*.py"))


@dataclass
class Run:
    """One eval.csv."""

    algorithm: str
    dataset: str
    seed: str
    steps: np.ndarray  # (E,) gradient steps at each evaluation
    scores: np.ndarray  # (E,) normalised
    minutes: float

    @property
    def final(self) -> float:
        return float(self.scores[-5:].mean())


def read_runs(folder: str = "runs") -> list[Run]:
    runs = []
    for path in sorted(FOLDER.glob(f"{folder}/*/*/seed*/eval.csv")):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        steps, scores = (np.array([float(row[k]) for row in rows]) for k in ("step", "score"))
        algorithm, dataset, seed = path.parts[-4:-1]
        minutes = float(rows[-1]["seconds"]) / 60
        runs.append(Run(algorithm, dataset, seed, steps, scores, minutes))
    return runs


def bounds(values: list[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of a mean over seeds; none below three seeds."""
    if len(values) < 3 or np.ptp(values) == 0:
        return None
    options = dict(n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    return tuple(bootstrap((np.array(values),), np.mean, **options).confidence_interval)


def interval(values: list[float]) -> str:
    """Mean and, from three seeds on, its 95 % bootstrap interval."""
    ends = bounds(values)
    return f"{np.mean(values):.1f}" + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")


def grouped(runs: list[Run]) -> list[tuple[tuple[str, str, int], list[Run]]]:
    """Seeds of a cell together: ((data set, algorithm, steps), runs)."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.dataset, run.algorithm, int(run.steps[-1])].append(run)
    return sorted(groups.items())


def table(runs: list[Run]) -> str:
    lines = [
        "| data set | algorithm | steps | seeds | final | best | minutes a run |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for (dataset, algorithm, steps), group in grouped(runs):
        final = interval([run.final for run in group])
        best = interval([run.scores.max() for run in group])
        minutes = np.mean([run.minutes for run in group])
        lines.append(
            f"| {dataset} | {algorithm} | {steps:,} | {len(group)} | {final} | {best} |"
            f" {minutes:.0f} |"
        )
    return "\n".join(lines) + "\n"


def side_by_side(runs: list[Run]) -> str:
    """A row per data set, a column per file of ours: `final` of the runs with the same steps."""
    cells = {(dataset, name, steps): group for (dataset, name, steps), group in grouped(runs)}
    counts = [steps for _, name, steps in cells if name in FILES]
    steps = max(set(counts), key=counts.count, default=0)  # the common number; others stay out
    names = [name for name in FILES if any(key[1:] == (name, steps) for key in cells)]
    lines = [f"| {steps:,} steps | {' | '.join(names)} |", f"|---|{'--:|' * len(names)}"]
    for dataset in sorted({key[0] for key in cells}):
        groups = [cells.get((dataset, name, steps), []) for name in names]
        if any(groups):
            finals = [interval([run.final for run in group]) if group else "" for group in groups]
            lines.append(f"| {dataset} | {' | '.join(finals)} |")
    return "\n".join(lines) + "\n"


def every_file(runs: list[Run]) -> str:
    """A row per file of ours, a column per data set that three seeds of several files were run on:
    the last evaluation. Steps are those of a file's shortest run; its other runs are cut there."""
    seeds = Counter((run.algorithm, run.dataset) for run in runs if run.algorithm in FILES)
    cells = sorted(cell for cell, number in seeds.items() if number >= 3)
    files = Counter(dataset for _, dataset in cells)
    datasets = sorted(dataset for dataset, number in files.items() if number > 1)
    lines = [f"| file | steps | {' | '.join(datasets)} |", f"|---|--:|{'--:|' * len(datasets)}"]
    for name in FILES:
        shown = [dataset for dataset in datasets if (name, dataset) in cells]
        found = [run for run in runs if run.algorithm == name and run.dataset in shown]
        if found:
            steps = min(run.steps[-1] for run in found)
            ends = defaultdict(list)
            for run in found:
                ends[run.dataset].append(float(run.scores[run.steps <= steps][-1]))
            texts = [interval(ends[dataset]) if ends[dataset] else "" for dataset in datasets]
            lines.append(f"| {name} | {int(steps):,} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def with_long(short: list[Run], long: list[Run]) -> list[Run]:
    """Where a file has no short run on a data set of the short runs: its long ones."""
    datasets = {run.dataset for run in short}
    there = {(run.algorithm, run.dataset) for run in short}
    more = [run for run in long if (run.algorithm, run.dataset) not in there]
    return short + [run for run in more if run.dataset in datasets]


def against_corl(runs: list[Run]) -> str:
    """Our files and CORL's where both were run for as many steps on the same data."""
    lines = [
        "| data set | steps | algorithm | seeds | final | CORL's seeds | CORL's final |",
        "|---|--:|---|--:|--:|--:|--:|",
    ]
    cells = dict(grouped(runs))
    for (dataset, name, steps), ours in cells.items():
        theirs = cells.get((dataset, f"corl_{name}", steps))
        if theirs:
            finals = [[run.final for run in group] for group in (ours, theirs)]
            shown = [f"{len(final)} | {spread(final)}" for final in finals]
            lines.append(f"| {dataset} | {steps:,} | {name} | {' | '.join(shown)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Mean, and the lowest and the highest seed."""
    ends = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{ends}"


def write_csv(runs: list[Run]) -> None:
    """One row per cell: results.csv."""
    columns = "dataset algorithm steps seeds final final_low final_high best minutes".split()
    with open(FOLDER / "results.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for cell, group in grouped(runs):
            final = [run.final for run in group]
            numbers = [np.mean(final), *(bounds(final) or (math.nan, math.nan))]
            numbers += [np.mean([run.scores.max() for run in group])]
            numbers += [np.mean([run.minutes for run in group])]
            writer.writerow([*cell, len(group), *(f"{x:.2f}" for x in numbers)])


def aggregate(runs: list[Run]) -> str:
    """Interquartile mean over data sets and seeds, and how probable it is that A2PO is better, with
    95 % stratified bootstrap intervals (Agarwal et al. 2021, arXiv:2108.13264). It compares the
    algorithms that have as many steps and seeds as A2PO on all of A2PO's data sets."""
    cells = {cell: group for cell, group in grouped(runs) if len(group) >= 3}
    steps = max((steps for _, algorithm, steps in cells if algorithm == "a2po"), default=0)
    datasets = sorted({d for d, algorithm, s in cells if (algorithm, s) == ("a2po", steps)})
    scores = {}
    for algorithm in sorted({run.algorithm for run in runs}):
        groups = [cells.get((dataset, algorithm, steps), []) for dataset in datasets]
        seeds = min(map(len, groups), default=0)
        if seeds:
            columns = [[run.final for run in group[:seeds]] for group in groups]
            scores[algorithm] = np.array(columns).T  # (seeds, data sets)
    if len(scores) < 2:
        return "Not yet: A2PO and another algorithm on the same data sets, three seeds each.\n"

    def iqm(x):
        return np.array([metrics.aggregate_iqm(x)])

    np.random.seed(0)  # noqa: NPY002  (rliable draws from the global generator, whatever it gets)
    options = dict(reps=2000)
    means, ends = rliable.get_interval_estimates(scores, iqm, **options)
    pairs = {name: (scores["a2po"], x) for name, x in scores.items() if name != "a2po"}
    probability = metrics.probability_of_improvement
    better, sure = rliable.get_interval_estimates(pairs, probability, **options)
    lines = [
        f"Over {', '.join(datasets)}; {steps:,} steps.",
        "",
        "| algorithm | seeds | interquartile mean | probability that A2PO is better |",
        "|---|--:|--:|--:|",
    ]
    for name in sorted(scores, key=lambda name: -means[name][0]):
        low, high = ends[name][:, 0]
        cells = [name, len(scores[name]), f"{means[name][0]:.1f} [{low:.1f}, {high:.1f}]", ""]
        if name in pairs:
            low, high = sure[name][:, 0]
            cells[-1] = f"{better[name]:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def calibration_table() -> str:
    """Scores of the learning-curve tests' cases and of their ablations."""
    lines = ["| case | ablation | seeds | score at the end |", "|---|---|--:|--:|"]
    for path in sorted(CALIBRATION.glob("*.csv")):
        groups = defaultdict(list)
        with open(path) as file:
            for row in csv.DictReader(file):
                groups[row["ablation"]].append(float(row["end"]))
        for ablation, ends in groups.items():
            lines.append(f"| {path.stem} | {ablation} | {len(ends)} | {interval(ends)} |")
    return "\n".join(lines) + "\n"


def insert(path: Path, name: str, text: str) -> None:
    """Puts generated text between two markers of a page."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, rest = path.read_text().split(begin)
    path.write_text(head + begin + text + end + rest.split(end)[1])


def beside(runs: list[Run]) -> list[Run]:
    """Other people's code and files with other flags, each with the file that it is a version of,
    the one with the longest name that its own name holds, on the same data."""
    others = [run for run in runs if run.algorithm not in FILES]
    wanted = set()
    for run in others:
        known = [name for name in FILES if name in run.algorithm]
        wanted |= {(name, run.dataset) for name in (run.algorithm, max(known, key=len, default=""))}
    return [run for run in runs if (run.algorithm, run.dataset) in wanted]


def plot(runs: list[Run], path: Path, unit: str) -> None:
    """A panel per data set, a curve per algorithm: mean over seeds and its 95 % interval."""
    datasets = sorted({run.dataset for run in runs})
    algorithms = sorted({run.algorithm for run in runs})
    palette = plt.colormaps["tab20"].colors
    colors = dict(zip(algorithms, palette[::2] + palette[1::2]))
    columns, rows = min(3, len(datasets)), math.ceil(len(datasets) / 3)
    size, options = (4.5 * columns, 3.4 * rows + 0.4), dict(sharey=True, layout="constrained")
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for axis in axes.flat[len(datasets) :]:
        axis.axis("off")
    curves = {}
    for axis, dataset in zip(axes.flat, datasets):
        for algorithm in algorithms:
            group = [run for run in runs if (run.algorithm, run.dataset) == (algorithm, dataset)]
            if not group:
                continue
            n = min(len(run.steps) for run in group)
            scores = np.array([run.scores[:n] for run in group])  # (seeds, evaluations)
            steps, mean, color = group[0].steps[:n] / 1000, scores.mean(0), colors[algorithm]
            ends = [bounds(list(column)) or (m, m) for column, m in zip(scores.T, mean)]
            axis.fill_between(steps, *zip(*ends), color=color, alpha=0.2, lw=0)
            (curves[algorithm],) = axis.plot(steps, mean, color=color, lw=2)
        axis.set(title=dataset, xlabel=f"{unit} (thousands)")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("normalised score")
    names = sorted(curves)
    lines = [curves[name] for name in names]
    figure.legend(lines, names, loc="outside lower center", ncols=2 * columns, frameon=False)
    figure.savefig(path, dpi=120)


def main() -> None:
    runs = read_runs()
    if not runs:
        raise SystemExit(f"No runs in {FOLDER / 'runs'}: <algorithm>/<data set>/seed<k>/eval.csv.")
    readme = FOLDER.parent / "README.md"
    offline = [run for run in runs if run.algorithm not in ONLINE]
    online = [run for run in runs if run.algorithm in ONLINE]
    text = f"# Results\n\n{table(offline)}\n## Together\n\n{aggregate(offline)}\n"
    text += "![curves](curves.png)\n\n## Beside other code and other flags\n\n"
    text += f"![curves](beside.png)\n\n## Behind the data sets\n\n{table(online)}\n"
    (FOLDER / "results.md").write_text(text + "![curves of SAC](sac.png)\n")
    write_csv(runs)
    insert(readme, "results", table(offline))
    insert(readme, "together", aggregate(offline))
    page = FOLDER.parent / "docs" / "results.md"
    insert(page, "calibration", calibration_table())
    short = read_runs("short")
    insert(page, "short", side_by_side(short))
    insert(page, "every", every_file(with_long(short, offline)))
    insert(page, "corl", against_corl(runs + short))
    own = [run for run in offline if run.algorithm in FILES]
    plot(own, FOLDER / "curves.png", "gradient steps")
    plot(beside(offline), FOLDER / "beside.png", "gradient steps")
    plot([run for run in online if run.algorithm == "sac"], FOLDER / "sac.png", "steps")
    print(text)


if __name__ == "__main__":
    main()
