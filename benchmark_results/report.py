"""Rebuilds every table and plot from the raw evaluations of the runs.

    pip install -r benchmark_results/requirements.txt
    python benchmark_results/report.py

reads benchmark_results/runs/<algorithm>/<data set>/seed<k>/eval.csv and the calibration of the
learning-curve tests, and writes results.md, curves.png and the tables of README.md. `final` is the
mean of a run's last five evaluations, `best` its best single one (a choice that offline data alone
would not allow, so it stands apart). Over seeds: mean and 95 % bootstrap interval.
"""

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import bootstrap

FOLDER = Path(__file__).resolve().parent
CALIBRATION = FOLDER.parent / "tests" / "calibration"


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


def read_runs() -> list[Run]:
    runs = []
    for path in sorted(FOLDER.glob("runs/*/*/seed*/eval.csv")):
        with open(path) as file:
            rows = list(csv.DictReader(file))
        steps, scores = (np.array([float(row[k]) for row in rows]) for k in ("step", "score"))
        algorithm, dataset, seed = path.parts[-4:-1]
        minutes = float(rows[-1]["seconds"]) / 60
        runs.append(Run(algorithm, dataset, seed, steps, scores, minutes))
    return runs


def interval(values: list[float]) -> str:
    """Mean and, from three seeds on, its 95 % bootstrap interval."""
    mean = f"{np.mean(values):.1f}"
    if len(values) < 3 or np.ptp(values) == 0:
        return mean
    options = dict(n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    low, high = bootstrap((np.array(values),), np.mean, **options).confidence_interval
    return f"{mean} [{low:.1f}, {high:.1f}]"


def table(runs: list[Run]) -> str:
    groups = defaultdict(list)
    for run in runs:
        groups[run.dataset, run.algorithm, int(run.steps[-1])].append(run)
    lines = [
        "| data set | algorithm | steps | seeds | final | best | minutes a run |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for (dataset, algorithm, steps), group in sorted(groups.items()):
        final = interval([run.final for run in group])
        best = interval([run.scores.max() for run in group])
        minutes = np.mean([run.minutes for run in group])
        lines.append(
            f"| {dataset} | {algorithm} | {steps:,} | {len(group)} | {final} | {best} |"
            f" {minutes:.0f} |"
        )
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


def plot(runs: list[Run]) -> None:
    datasets = sorted({run.dataset for run in runs})
    algorithms = sorted({run.algorithm for run in runs})
    columns, rows = min(3, len(datasets)), math.ceil(len(datasets) / 3)
    size, options = (4.5 * columns, 3.4 * rows), dict(sharey=True, layout="constrained")
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for axis in axes.flat[len(datasets) :]:
        axis.axis("off")
    for axis, dataset in zip(axes.flat, datasets):
        for i, algorithm in enumerate(algorithms):
            group = [run for run in runs if (run.algorithm, run.dataset) == (algorithm, dataset)]
            for run in group:
                axis.plot(run.steps / 1000, run.scores, color=f"C{i}", alpha=0.25, lw=1)
            if group:
                n = min(len(run.steps) for run in group)
                mean = np.mean([run.scores[:n] for run in group], axis=0)
                steps = group[0].steps[:n] / 1000
                axis.plot(steps, mean, color=f"C{i}", lw=2, label=algorithm)
        axis.set(title=dataset, xlabel="gradient steps (thousands)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
    for axis in axes[:, 0]:
        axis.set_ylabel("normalised score")
    figure.savefig(FOLDER / "curves.png", dpi=120)


def main() -> None:
    runs = read_runs()
    if not runs:
        raise SystemExit(f"No runs in {FOLDER / 'runs'}: <algorithm>/<data set>/seed<k>/eval.csv.")
    text, readme = table(runs), FOLDER.parent / "README.md"
    (FOLDER / "results.md").write_text(f"# Results\n\n{text}\n![curves](curves.png)\n")
    insert(readme, "results", text)
    insert(readme, "calibration", calibration_table())
    plot(runs)
    print(text)


if __name__ == "__main__":
    main()
