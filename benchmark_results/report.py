"""Rebuilds tables and plots from the raw evaluations of runs: of ours, or of any folder.

    pip install -r benchmark_results/requirements.txt
    python benchmark_results/report.py
    python benchmark_results/report.py --runs runs/grid --out runs/grid/report

Without flags it reads benchmark_results/runs/<algorithm>/<data set>/seed<k>/eval.csv, the runs of
as many steps as a quarter of an hour has in benchmark_results/quarter_hour, those that a clock
stopped in benchmark_results/minutes (the same folders), and the calibration of the learning-curve
tests, and writes results.md, results.csv, the plots beside them and the tables of README.md and of
docs/results.md. With --runs it reads the same layout there, whoever made the runs, and writes
results.md, tables (.csv) and plots to --out, nothing anywhere else.

A run that was stopped for good, and says in its config.json at which step (steps_reached), counts
as one of so many; the other seeds of its cell are cut there.

`final` is the mean of a run's last five evaluations, `best` its best single one (a choice that
offline data alone would not allow, so it stands apart). Over seeds: mean and 95 % bootstrap
interval. A table or a curve holds runs of one number of steps, or of one amount of CPU time.
"""

import csv
import json
import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import fill

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import tyro
from rliable import library as rliable
from rliable import metrics
from scipy.stats import bootstrap

matplotlib.use("Agg")
ONLINE = ("sac", "sac_offline")  # behind the data sets; not compared with the rest
REFERENCE = "Processor, one thread, torch 2.13.0+cpu, medium precision"  # a row of speed.csv
MINUTES, QUARTER = (1, 2, 5, 10, 20, 45), 15
TIMED = ("hopper-medium-replay", "halfcheetah-medium-expert", "walker2d-random-expert-10")
FAST = "td3_bc_tau_0.02"  # TD3+BC with A2PO's speed of the target networks: what τ alone does
FOLDER = Path(__file__).resolve().parent
CALIBRATION = FOLDER.parent / "tests" / "calibration"
FILES = sorted(path.stem for path in (FOLDER.parent / "algorithms").glob("*.py"))
PUBLISHED = {  # of published.csv, by its column `source`
    "corl": "[CORL](https://github.com/tinkoff-ai/CORL)'s own files: the last score, mean and"
    " standard deviation of four seeds",
    "diffuser": "the paper's table in [Diffuser's repository](https://github.com/jannerm/diffuser)",
    "robomimic": "[robomimic](https://robomimic.github.io/docs/datasets/d4rl.html)'s own code: the"
    " mean of the last ten evaluations",
    "wizwand": "the paper, as [a collection of scores](https://www.wizwand.com/paper/"
    "68fa75b91e209131cea698f2) quotes it",
}
SENTENCES = """
**Where good data are rare**, one transition of ten an expert's (`hopper-random-expert-10` and
`walker2d-random-expert-10`), A2PO has {rare[a2po]} after 60,000 steps and TD3+BC {rare[td3_bc]};
with targets as fast as A2PO's (`td3_bc_tau_0.02`) TD3+BC has {rare[td3_bc_tau_0.02]}, IQL has
{rare[iql]}, and ReBRAC, one seed each, {rebrac} after 40,000 dearer steps, still rising: its last
evaluations have {last}.

**Where a third is an expert's** (`hopper-random-medium-expert`) A2PO has {mixed[a2po]}, TD3+BC
with targets as fast is level ({mixed[td3_bc_tau_0.02]}), as published it has {mixed[td3_bc]}, and
cloning {mixed[bc]}.

**On a replay buffer** (`hopper-medium-replay`) ReBRAC is first after 100,000 steps with
{replay[rebrac]}, before TD3+BC ({replay[td3_bc]}), IQL ({replay[iql]}) and A2PO
({replay[a2po]}); cloning has {replay[bc]}, with a VAE {replay[vae_bc]}.

**In little time** IQL is first there, with {five[iql]} after five minutes of a CPU thread, where
A2PO has {five[a2po]}, TD3+BC {five[td3_bc]} and ReBRAC {five[rebrac]}, which has {late} after 45.

**What that is worth**: three seeds at most, whose last evaluations can lie 50 points apart, on
data of our own; it shows that the files learn and what they need, and ranks nothing elsewhere.
"""
HEAD = """# Results

`final`: mean of the last five evaluations; `best`: the best single one, which needs access to the
environment to select. Over seeds: mean and 95 % bootstrap interval.

"""
TIME = (
    "Every run stopped after {:g} minutes of its own CPU time: user and system time of its process"
    " and its children, reading the data and evaluations included. A run that had all its `steps`"
    " earlier ended there.\n"
)


@dataclass
class Args:
    """Makes tables and plots of runs; without flags those of this repository."""

    runs: Path | None = None  # a folder with <algorithm>/<data set>/seed<k>/eval.csv; empty: ours
    out: Path | None = None  # where its tables and plots go; empty: report in that folder
    against: str = "a2po"  # whom the others are compared with, if it is there; else the best


@dataclass
class Run:
    """One eval.csv, and what its config.json says."""

    algorithm: str
    dataset: str
    seed: str
    steps: np.ndarray  # (E,) gradient steps at each evaluation
    scores: np.ndarray  # (E,) normalised; NaN without references
    minutes: float
    returns: np.ndarray | None = None  # (E,)
    cpu: np.ndarray | None = None  # (E,) CPU minutes at each evaluation
    budget: float = 0.0  # CPU minutes that it was given; 0: it was given steps
    reached: int = 0  # gradient steps, in that time
    used: float = math.nan  # CPU minutes
    gpu: bool = False
    asked: int = 0  # gradient steps that it was to have
    stopped: bool = False  # and did not have when the machine was needed elsewhere

    @property
    def final(self) -> float:
        return float(self.scores[-5:].mean())

    @property
    def scored(self) -> bool:
        return bool(np.isfinite(self.scores).all())

    @property
    def size(self) -> float:
        """What it has in common with the runs of its tables: steps, or CPU minutes."""
        return self.budget or int(self.steps[-1])


def number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def read_run(path: Path) -> Run | str:
    """A run, or why it is none."""
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    about, cpu = (read_json(path.parent / name) for name in ("config.json", "cpu.json"))
    if not rows:
        return "no evaluation"
    columns = ("step", "score", "return_mean", "seconds")
    steps, scores, returns, seconds = (np.array([number(r.get(k)) for r in rows]) for k in columns)
    if not np.isfinite(steps).all():
        return "no column of steps"
    budget, asked = about.get("cpu_minutes", 0), about.get("args", {}).get("steps", 0)
    ends = about.get("steps_reached") or asked  # a run that was stopped for good says where
    if not budget and (cpu.get("minutes") or steps[-1] < ends):
        return f"not finished, at step {steps[-1]:,.0f}"
    run = Run(*path.parts[-4:-1], steps, scores, seconds[-1] / 60, returns, budget=budget)
    run.stopped, run.asked = bool(not budget and steps[-1] < asked), int(asked)
    at = about.get("cpu_seconds_at_evaluations", [])
    run.cpu = np.array(at) / 60 if len(at) == len(steps) and None not in at else None
    run.reached = int(about.get("steps_reached", steps[-1]))
    run.used = about.get("cpu_seconds", math.nan) / 60
    run.gpu = about.get("args", {}).get("device", "cpu").startswith("cuda")
    return run


def read_json(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def read_runs(folder: Path | str = "runs", left_out: list[str] | None = None) -> list[Run]:
    """Runs of a folder, or of one beside this file; what is not one of them is named."""
    runs = []
    for path in sorted((FOLDER / folder).glob("*/*/seed*")):
        run = read_run(path / "eval.csv")
        if isinstance(run, Run):
            runs.append(run)
        elif left_out is not None:
            left_out.append(f"{'/'.join(path.parts[-3:])}: {run}")
    return [cut(run, runs) if run.asked and not run.budget else run for run in runs]


def cut(run: Run, runs: list[Run]) -> Run:
    """A run as long as its other seeds, where one of them was stopped early."""
    key = (run.algorithm, run.dataset, run.asked)
    seeds = [other for other in runs if (other.algorithm, other.dataset, other.asked) == key]
    n = min(len(other.steps) for other in seeds)
    if not any(other.stopped for other in seeds) or n == len(run.steps):
        return run
    shorter = dict(steps=run.steps[:n], scores=run.scores[:n], returns=run.returns[:n])
    return replace(run, **shorter, minutes=run.minutes * run.steps[n - 1] / run.steps[-1])


# -------------------------------------------------------------------------------------- Tables


def bounds(values: list[float]) -> tuple[float, float] | None:
    """95 % bootstrap interval of a mean over seeds; none below three seeds."""
    if len(values) < 3 or np.ptp(values) == 0 or not np.isfinite(values).all():
        return None
    options = dict(n_resamples=10_000, method="percentile", rng=np.random.default_rng(0))
    return tuple(bootstrap((np.array(values),), np.mean, **options).confidence_interval)


def interval(values: list[float]) -> str:
    """Mean and, from three seeds on, its 95 % bootstrap interval; nothing where one is missing."""
    if not np.isfinite(values).all():
        return ""
    ends = bounds(values)
    return f"{np.mean(values):.1f}" + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")


def grouped(runs: list[Run]) -> list[tuple[tuple[str, str, float], list[Run]]]:
    """Seeds of a cell together: ((data set, algorithm, steps or CPU minutes), runs)."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.dataset, run.algorithm, run.size].append(run)
    return sorted(groups.items())


def sizes(runs: list[Run]) -> list[tuple[float, list[Run]]]:
    """Runs of equal steps, or of equal time, together; the longest first."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.size].append(run)
    return sorted(groups.items(), reverse=True)


def markdown(head: list[str], left: int, rows: list[list[str]]) -> str:
    """A table whose first columns are aligned to the left."""
    align = "|---" * left + "|--:" * (len(head) - left) + "|"
    lines = [f"| {' | '.join(head)} |", align, *(f"| {' | '.join(row)} |" for row in rows)]
    return "\n".join(lines) + "\n"


def table(runs: list[Run]) -> str:
    """Runs of equal steps, or of equal time: a row for the seeds of an algorithm on a data set."""
    timed = bool(runs[0].budget)
    size = f"{runs[0].budget:g} CPU minutes" if timed else f"{runs[0].size:,} steps"
    head = [size, "algorithm", "seeds", "final", "best"]
    with_returns = not all(run.scored for run in runs)
    head += ["final return"] * with_returns
    head += ["steps", "CPU minutes"] if timed else ["minutes a run"]
    rows = []
    for (dataset, algorithm, _), group in grouped(runs):
        row = [dataset, algorithm, str(len(group)), interval([run.final for run in group])]
        row.append(interval([run.scores.max() for run in group]))
        if with_returns:
            row.append(interval([run.returns[-5:].mean() for run in group]))
        if timed:
            row.append(f"{np.mean([run.reached for run in group]):,.0f}")
            row.append(f"{np.mean([run.used for run in group]):.1f}")
        else:
            fast = [run for run in group if run.gpu]
            mean = np.mean([run.minutes for run in fast or group])
            row.append(f"{mean:.0f}{' on a GPU' * bool(fast)}")
        rows.append(row)
    return markdown(head, 2, rows)


def tables(runs: list[Run]) -> str:
    """A table for each number of steps, the longest runs first."""
    return "\n".join(table(group) for _, group in sizes(runs))


def side_by_side(runs: list[Run], names: list[str] = FILES) -> str:
    """A row per data set, a column per algorithm: `final` of the runs with the same steps."""
    cells = dict(grouped(runs))
    counts = [steps for _, name, steps in cells if name in names]
    steps = max(set(counts), key=counts.count, default=0)  # the common number; others stay out
    names = [name for name in names if any(key[1:] == (name, steps) for key in cells)]
    rows = []
    for dataset in sorted({key[0] for key in cells}):
        groups = [cells.get((dataset, name, steps), []) for name in names]
        if any(groups):
            finals = [interval([run.final for run in group]) if group else "" for group in groups]
            rows.append([dataset, *finals])
    return markdown([f"{steps:,} steps", *names], 1, rows)


def at_equal_steps(runs: list[Run], steps: int = 60_000, every: int = 10_000) -> list[Run]:
    """Runs on the data that A2PO was run on, cut at so many steps, with an evaluation every so many
    others: what was run for longer, or judged more often, becomes comparable."""
    found = []
    for run in runs:
        kept = (run.steps <= steps) & (run.steps % every == 0)
        if kept.sum() == steps // every:
            values = dict(steps=run.steps[kept], scores=run.scores[kept], minutes=math.nan)
            found.append(replace(run, **values, returns=run.returns[kept]))
    datasets = {run.dataset for run in found if run.algorithm == "a2po"}
    return [run for run in found if run.dataset in datasets]


def on_several(runs: list[Run], names: list[str]) -> list[str]:
    """Those that ran on more than one data set."""
    cells = {(run.algorithm, run.dataset) for run in runs}
    count = Counter(name for name, _ in cells)
    return [name for name in names if count[name] > 1]


def completed(runs: list[Run], others: list[Run]) -> list[Run]:
    """Runs, and others where an algorithm has none on a data set."""
    there = {(run.algorithm, run.dataset) for run in runs}
    return runs + [run for run in others if (run.algorithm, run.dataset) not in there]


def most_evaluated(runs: list[Run]) -> list[Run]:
    """Of an algorithm's runs of several lengths on a data set those with the most evaluations."""
    kept = {}
    for (dataset, name, _), group in grouped(runs):
        kept.setdefault((dataset, name), []).append(group)
    return sum((max(groups, key=lambda group: len(group[0].steps)) for groups in kept.values()), [])


def against_corl(runs: list[Run]) -> str:
    """Our files and CORL's on the same data, at the last step at which both were evaluated: the
    mean of the last five evaluations that both have."""
    cells, rows = dict(grouped(runs)), defaultdict(list)
    for (dataset, name, _), theirs in cells.items():
        file = name.removeprefix("corl_")
        own = [group for key, group in cells.items() if key[:2] == (dataset, file) and file != name]
        shared = [np.intersect1d(group[0].steps, theirs[0].steps) for group in own]
        # Of our runs of different lengths those that were evaluated at the most of CORL's steps.
        best = max(range(len(own)), key=lambda i: len(shared[i]), default=None)
        if best is not None and len(shared[best]):
            last = shared[best][-5:]
            finals = [
                [run.scores[np.isin(run.steps, last)].mean() for run in group]
                for group in (own[best], theirs)
            ]
            shown = [cell for final in finals for cell in (str(len(final)), spread(final))]
            rows[int(last[-1])].append([dataset, file, *shown])
    more = ["algorithm", "seeds", "final", "CORL's seeds", "CORL's final"]
    steps = sorted(rows, reverse=True)
    return "\n".join(markdown([f"{size:,} steps", *more], 2, rows[size]) for size in steps)


def spread(values: list[float]) -> str:
    """Mean, and the lowest and the highest seed."""
    ends = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{ends}"


def write_csv(runs: list[Run], path: Path) -> None:
    """One row per cell; of other runs than the long ones of ours also what those do not need."""
    columns = "dataset algorithm steps seeds final final_low final_high best minutes".split()
    more = [] if path.parent == FOLDER else "return_mean steps_reached cpu_minutes".split()
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        size = "budget_cpu_minutes" if runs[0].budget else "steps"
        writer.writerow([size if key == "steps" else key for key in columns + more])
        for cell, group in grouped(runs):
            final = [run.final for run in group]
            numbers = [np.mean(final), *(bounds(final) or (math.nan, math.nan))]
            means = [(run.scores.max(), run.minutes) for run in group]
            if more:
                others = ((run.returns[-5:].mean(), run.reached, run.used) for run in group)
                means = [(*mean, *other) for mean, other in zip(means, others)]
            numbers += list(np.mean(means, axis=0))
            writer.writerow([*cell, len(group), *(f"{x:.2f}" for x in numbers)])


def rates() -> dict[str, float]:
    """Steps per second of one CPU thread, from speed.csv: training alone, without evaluations."""
    with open(FOLDER / "speed.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["hardware"].endswith(REFERENCE)]
    found = {row["algorithm"]: float(row["steps_per_second"]) for row in rows}
    return {name: x for name, x in found.items() if name != "gan_world_model"}  # two kinds of steps


def in_minutes(runs: list[Run], dataset: str = TIMED[0]) -> list[Run]:
    """The runs of files on a data set, with the time at which one CPU thread would have been at
    each evaluation: steps over the steps per second."""
    known = rates()
    here = [run for run in runs if run.dataset == dataset and run.algorithm in known]
    return [replace(run, cpu=run.steps / known[run.algorithm] / 60) for run in here]


def quarter_table(runs: list[Run]) -> str:
    """What a quarter of an hour buys: a row per file, a column per data set, the mean of a run's
    last three evaluations until then, and the minute of the run's end where that is earlier."""
    rows = []
    for name, rate in sorted(rates().items()):
        cells = []
        for dataset in TIMED:
            group = in_minutes([run for run in runs if run.algorithm == name], dataset)
            ends = min((run.cpu[-1] for run in group), default=0)
            early = f" (at {ends:.0f})" if ends < 0.9 * QUARTER else ""
            scores = [run.scores[run.cpu <= 1.01 * QUARTER][-3:].mean() for run in group]
            cells.append(interval(scores) + early if group else "")
        if any(cells):
            rows.append([name, f"{60 * QUARTER * rate:,.0f}", *cells])
    return markdown([f"{QUARTER} minutes of one CPU thread", "steps", *TIMED], 1, rows)


def minutes_table(runs: list[Run]) -> str:
    """Scores after so many minutes: of a run's last three evaluations until then, of those that
    went on so long, with 95 % interval."""
    head = ["one CPU thread", *(f"{m:g} minute{'s' * (m > 1)}" for m in MINUTES)]
    rows = []
    for name in sorted({run.algorithm for run in runs}):
        cells = []
        for m in MINUTES:
            there = [run for run in runs if run.algorithm == name and run.cpu[-1] >= m]
            scores = [run.scores[run.cpu <= m][-3:] for run in there]
            known = len(scores) > 0 and all(map(len, scores))
            cells.append(interval([x.mean() for x in scores]) if known else "")
        rows.append([name, *cells])
    return markdown(head, 1, rows)


def shown_as(name: str) -> str:
    return "A2PO" if name == "a2po" else name


def aggregate(runs: list[Run], against: str = "a2po") -> str:
    """Interquartile mean over data sets and seeds, and how probable it is that one of them, A2PO,
    is better, with 95 % stratified bootstrap intervals (Agarwal et al. 2021, arXiv:2108.13264). It
    compares the algorithms that have as many steps as that one on all of its data sets, and three
    seeds."""
    if len({run.algorithm for run in runs}) < 2:
        return ""
    cells = {cell: group for cell, group in grouped(runs) if len(group) >= 3}
    cells = {cell: group for cell, group in cells.items() if all(run.scored for run in group)}
    if against not in {name for _, name, _ in cells}:  # who is on most data sets, the best of them
        key = Counter(name for _, name, _ in cells)
        means = {name: np.mean([r.final for r in runs if r.algorithm == name]) for name in key}
        against = max(key, key=lambda name: (key[name], means[name]), default=against)
    steps = max((steps for _, algorithm, steps in cells if algorithm == against), default=0)
    datasets = sorted({d for d, algorithm, s in cells if (algorithm, s) == (against, steps)})
    scores = {}
    for algorithm in sorted({run.algorithm for run in runs}):
        groups = [cells.get((dataset, algorithm, steps), []) for dataset in datasets]
        seeds = min(map(len, groups), default=0)
        if seeds:
            columns = [[run.final for run in group[:seeds]] for group in groups]
            scores[algorithm] = np.array(columns).T  # (seeds, data sets)
    name = shown_as(against)
    if len(scores) < 2:
        return "Not yet: two algorithms with three seeds each on the same data sets.\n"

    def iqm(x):
        return np.array([metrics.aggregate_iqm(x)])

    np.random.seed(0)  # noqa: NPY002  (rliable draws from the global generator, whatever it gets)
    options = dict(reps=2000)
    means, ends = rliable.get_interval_estimates(scores, iqm, **options)
    pairs = {other: (scores[against], x) for other, x in scores.items() if other != against}
    probability = metrics.probability_of_improvement
    better, sure = rliable.get_interval_estimates(pairs, probability, **options)
    size = f"{steps:g} CPU minutes" if runs[0].budget else f"{steps:,} steps"
    head = ["algorithm", "seeds", "interquartile mean", f"probability that {name} is better"]
    rows = []
    for other in sorted(scores, key=lambda other: -means[other][0]):
        low, high = ends[other][:, 0]
        row = [other, str(len(scores[other])), f"{means[other][0]:.1f} [{low:.1f}, {high:.1f}]", ""]
        if other in pairs:
            low, high = sure[other][:, 0]
            row[-1] = f"{better[other]:.2f} [{low:.2f}, {high:.2f}]"
        rows.append(row)
    return f"Over {', '.join(datasets)}; {size}.\n\n{markdown(head, 1, rows)}"


def calibration_table() -> str:
    """Scores of the learning-curve tests' cases and of their ablations."""
    rows = []
    for path in sorted(CALIBRATION.glob("*.csv")):
        groups = defaultdict(list)
        with open(path) as file:
            for row in csv.DictReader(file):
                groups[row["ablation"]].append(float(row["end"]))
        for ablation, ends in groups.items():
            rows.append([path.stem, ablation, str(len(ends)), interval(ends)])
    return markdown(["case", "ablation", "seeds", "score at the end"], 2, rows)


def five_sentences(long: list[Run], equal: list[Run], quarter: list[Run]) -> str:
    """Who is good at what, and what that is worth: every number is of the runs."""

    def final(runs, dataset):
        ends = defaultdict(list)
        for run in runs:
            if run.dataset == dataset:
                ends[run.algorithm].append(run.final)
        return {name: f"{np.mean(values):.0f}" for name, values in ends.items()}

    def after(minutes, name):
        group = [run for run in in_minutes(long) if run.algorithm == name]
        return f"{np.mean([run.scores[run.cpu <= minutes][-3:].mean() for run in group]):.0f}"

    hopper, walker = (final(equal, f"{task}-random-expert-10") for task in ("hopper", "walker2d"))
    rebrac = [
        run
        for task in ("hopper", "walker2d")
        for run in long + quarter
        if (run.algorithm, run.dataset) == ("rebrac", f"{task}-random-expert-10")
    ]
    text = SENTENCES.format(
        rare={name: f"{hopper[name]} and {walker[name]}" for name in hopper.keys() & walker.keys()},
        mixed=final(equal, "hopper-random-medium-expert"),
        replay=final(long, TIMED[0]),
        rebrac=" and ".join(f"{run.final:.0f}" for run in rebrac),
        last=" and ".join(f"{run.scores[-1]:.0f}" for run in rebrac),
        five={name: after(5, name) for name in ("iql", "a2po", "td3_bc", "rebrac")},
        late=after(45, "rebrac"),
    )
    options = dict(width=110, subsequent_indent="   ", break_on_hyphens=False)
    sentences = text.strip().split("\n\n")
    return "".join(fill(f"{n}. {x}", **options) + "\n" for n, x in enumerate(sentences, 1))


def published() -> dict[str, str]:
    """For each algorithm that published.csv has: who found what on D4RL's own files, a table."""
    with open(FOLDER / "published.csv") as file:
        rows = list(csv.DictReader(file))
    kinds, tables, sources = ("medium", "medium-replay", "medium-expert"), defaultdict(dict), {}
    for row in rows:
        name, _, flags = row["algorithm"].partition(" ")
        task, _, kind = row["dataset"].partition("-")
        line = tables[name].setdefault(
            (flags, task), [task + f" `{flags}`" * bool(flags), "", "", ""]
        )
        line[1 + kinds.index(kind)] = " ± ".join(filter(None, (row["score"], row["std"])))
        sources[name] = PUBLISHED[row["source"]]
    head = ["D4RL, `-v2`", *(f"`-{kind}`" for kind in kinds)]
    return {
        name: f"Source: {sources[name]}.\n\n{markdown(head, 1, [lines[k] for k in sorted(lines)])}"
        for name, lines in sorted(tables.items())
    }


def insert(path: Path, name: str, text: str) -> None:
    """Puts generated text between two markers of a page."""
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, rest = path.read_text().split(begin)
    path.write_text(head + begin + text + end + rest.split(end)[1])


# --------------------------------------------------------------------------------------- Plots


def beside(runs: list[Run]) -> list[Run]:
    """Other people's code and files with other flags, each with the file that it is a version of,
    the one with the longest name that its own name holds, on the same data."""
    others = [run for run in runs if run.algorithm not in FILES]
    wanted = set()
    for run in others:
        known = [name for name in FILES if name in run.algorithm]
        wanted |= {(name, run.dataset) for name in (run.algorithm, max(known, key=len, default=""))}
    return [run for run in runs if (run.algorithm, run.dataset) in wanted]


def colours(runs: list[Run]) -> dict[str, str | tuple]:
    """A colour for each algorithm: a file's is the same in every plot of every report."""
    own = [*plt.colormaps["tab10"].colors, "navy", "maroon", "black", "skyblue"]
    own += ["gold", "teal", "indigo", "tomato", "yellowgreen", "deeppink", "sienna", "slateblue"]
    own += ["darkkhaki", "cyan", "lime", "violet", "peru", "darkgreen", "salmon"]
    found = {name: own[i % len(own)] for i, name in enumerate(FILES)}
    others = plt.colormaps["Dark2"].colors + plt.colormaps["tab20b"].colors
    names = sorted({run.algorithm for run in runs} - set(FILES))
    return found | {name: others[i % len(others)] for i, name in enumerate(names)}


def curve(group: list[Run], timed: bool, scored: bool) -> tuple[np.ndarray, np.ndarray]:
    """Where the run with the fewest evaluations of a cell was evaluated, as far as all of them
    came, (E,), and the score, or the return, that each of them had there, (seeds, E)."""
    axes = [run.cpu if timed else run.steps / 1000 for run in group]
    shortest = min(axes, key=len)
    x = shortest[shortest <= min(axis[-1] for axis in axes)]
    x = x if len(x) else shortest[:1]
    values = [run.scores if scored else run.returns for run in group]
    return x, np.array([np.interp(x, axis, y) for axis, y in zip(axes, values)])


def plot(runs: list[Run], path: Path, unit: str, palette: dict, timed: bool = False) -> None:
    """A panel per data set, a curve per algorithm: mean over seeds and its 95 % interval."""
    datasets = sorted({run.dataset for run in runs})
    columns = 2 if len(datasets) == 4 else min(3, len(datasets))
    rows = math.ceil(len(datasets) / columns)
    scored = all(run.scored for run in runs)
    size, options = (4.5 * columns, 3.4 * rows + 0.4), dict(sharey=scored, layout="constrained")
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **options)
    for axis in axes.flat[len(datasets) :]:
        axis.axis("off")
    curves = {}
    for axis, dataset in zip(axes.flat, datasets):
        here = [run for run in runs if run.dataset == dataset]
        own = all(run.scored for run in here)
        for algorithm in sorted({run.algorithm for run in here}):
            group = [run for run in here if run.algorithm == algorithm]
            x, values = curve(group, timed, own)
            mean, color = values.mean(0), palette[algorithm]
            ends = [bounds(list(column)) or (m, m) for column, m in zip(values.T, mean)]
            axis.fill_between(x, *zip(*ends), color=color, alpha=0.2, lw=0)
            (curves[algorithm],) = axis.plot(x, mean, color=color, lw=2)
        axis.set(title=dataset, xlabel=unit)
        axis.grid(alpha=0.3)
        if axis in axes[:, 0] or not scored:
            axis.set_ylabel("normalised score" if own else "return")
    names = sorted(curves)
    lines = [curves[name] for name in names]
    figure.legend(lines, names, loc="outside lower center", ncols=2 * columns, frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_minutes(runs: list[Run], path: Path, palette: dict) -> None:
    """Scores against minutes of one CPU thread, a panel per data set: each file's mean over the
    seeds and each seed."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 7), sharey=True, layout="constrained")
    lines = {}
    for axis, dataset in zip(axes.flat, TIMED):
        here = in_minutes(runs, dataset)
        for name in sorted({run.algorithm for run in here}):
            group = [run for run in here if run.algorithm == name]
            n = min(len(run.scores) for run in group)
            smooth = np.array([running_mean(run.scores[:n]) for run in group])
            at, look = group[0].cpu[:n], dict(color=palette[name])
            for one in smooth:
                axis.plot(at, one, lw=0.7, alpha=0.3, **look)
            (lines[name],) = axis.plot(at, smooth.mean(0), lw=2, **look)
        axis.set(title=dataset, xscale="log", xlabel="minutes of one CPU thread", xlim=(0.1, 60))
        ticks = (0.1, 0.3, 1, 3, 10, 30, 60)
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("normalised score")
    axes[1, 1].axis("off")
    axes[1, 1].legend([lines[x] for x in sorted(lines)], sorted(lines), loc="center", frameon=False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def running_mean(scores: np.ndarray, n: int = 3) -> np.ndarray:
    """The mean of each evaluation and the n - 1 before it."""
    return np.array([scores[max(0, i + 1 - n) : i + 1].mean() for i in range(len(scores))])


# ------------------------------------------------------------------------------------- Reports


def section(runs: list[Run], out: Path, against: str, palette: dict) -> str:
    """Table, comparison and plots of runs of equal steps, or of equal time."""
    timed = bool(runs[0].budget)
    size = f"{runs[0].budget:g} CPU minutes" if timed else f"{runs[0].size:,} steps"
    stem = size.replace(",", "").replace(" ", "_")
    write_csv(runs, out / f"{stem}.csv")
    text = f"## {size}\n\n{TIME.format(runs[0].budget) + chr(10) if timed else ''}{table(runs)}\n"
    together = aggregate(runs, against)
    text += f"### Together\n\n{together}\n" if together else ""
    drawn = [run for run in runs if run.scored or np.isfinite(run.returns).all()]
    drawn = [run for run in drawn if run.cpu is not None or not timed]
    if not drawn:
        return text
    unit = "CPU minutes" if timed else "gradient steps (thousands)"
    plot(drawn, out / f"{stem}.png", unit, palette, timed)
    text += f"![curves]({stem}.png)\n\n"
    for dataset in sorted({run.dataset for run in drawn}):
        name = f"{stem}_{re.sub(r'[^A-Za-z0-9._-]', '-', dataset)}.png"
        plot([r for r in drawn if r.dataset == dataset], out / name, unit, palette, timed)
        text += f"- [{dataset}]({name})\n"
    return text + "\n"


def anyones(args: Args) -> str:
    """The report of a folder of runs."""
    out, left_out = (args.out or args.runs / "report").resolve(), []
    if out in (FOLDER, FOLDER / "minutes", FOLDER.parent / "docs"):
        raise SystemExit(f"--out {args.out}: this repository's own results.md is there.")
    runs = read_runs(args.runs.resolve(), left_out)
    if not runs:
        where = f"{args.runs}: <algorithm>/<data set>/seed<k>/eval.csv"
        raise SystemExit(f"No runs in {where}. {'; '.join(left_out)}".strip())
    out.mkdir(parents=True, exist_ok=True)
    palette, text = colours(runs), HEAD
    timed, rest = [run for run in runs if run.budget], [run for run in runs if not run.budget]
    for _, group in sizes(timed) + sizes(rest):
        text += section(group, out, args.against, palette)
    if left_out:
        text += "## Left out\n\n" + "".join(f"- {line}\n" for line in left_out)
    (out / "results.md").write_text(text)
    print(f"{len(runs)} runs, {len(left_out)} left out: tables and plots are in {out}")
    return text


def ours() -> str:
    """The tables and plots of this repository."""
    runs = read_runs()
    if not runs:
        raise SystemExit(f"No runs in {FOLDER / 'runs'}: <algorithm>/<data set>/seed<k>/eval.csv.")
    timed = [run for run in runs + read_runs("minutes") if run.budget]
    runs, quarter = [run for run in runs if not run.budget], read_runs("quarter_hour")
    palette = colours(runs + timed)
    readme = FOLDER.parent / "README.md"
    offline = [run for run in runs if run.algorithm not in ONLINE]
    online = [run for run in runs if run.algorithm in ONLINE]
    equal = at_equal_steps(completed(read_runs("study"), offline))
    names = sorted([*FILES, FAST])
    text = f"# Results\n\n{tables(offline)}\n## Beside other code and other flags\n\n"
    text += f"![curves](beside.png)\n\n## Behind the data sets\n\n{tables(online)}\n"
    (FOLDER / "results.md").write_text(text + "![curves of SAC](sac.png)\n")
    write_csv(runs, FOLDER / "results.csv")
    insert(readme, "results", side_by_side(equal, on_several(equal, names)))
    page = FOLDER.parent / "docs" / "results.md"
    insert(page, "together", f"{side_by_side(equal, names)}\n{aggregate(equal)}")
    insert(page, "calibration", calibration_table())
    for place in (readme, page):
        insert(place, "sentences", five_sentences(offline, equal, quarter))
    for name, shown in published().items():
        insert(page.parent / "algorithms" / f"{name}.md", "published", shown)
    insert(page, "corl", against_corl(runs + quarter))
    own, thousands = [run for run in equal if run.algorithm in (*FILES, FAST)], "steps (thousands)"
    plot(own, FOLDER / "curves.png", f"gradient {thousands}", palette)
    plot(beside(offline), FOLDER / "beside.png", f"gradient {thousands}", palette)
    insert(page, "clock", minutes_table(in_minutes(offline)))
    insert(page, "quarter", quarter_table(completed(quarter, offline)))
    draw_minutes(most_evaluated(offline + quarter), FOLDER / "clock.png", palette)
    plot([run for run in online if run.algorithm == "sac"], FOLDER / "sac.png", thousands, palette)
    return text + of_equal_time(timed, palette)


def of_equal_time(runs: list[Run], palette: dict) -> str:
    """minutes/results.md, if there are such runs; README.md and docs/results.md get the tables, if
    they have a place for them."""
    if not runs:
        return ""
    out, groups = FOLDER / "minutes", sizes(runs)
    out.mkdir(exist_ok=True)
    text = "# Results at equal CPU time\n\n"
    text += "".join(section(group, out, "a2po", palette) for _, group in groups)
    (out / "results.md").write_text(text)
    short = "\n".join(f"{table(group)}\n{aggregate(group)}" for _, group in groups)
    for page in (FOLDER.parent / "README.md", FOLDER.parent / "docs" / "results.md"):
        if "<!-- minutes: begin -->" in page.read_text():
            insert(page, "minutes", short)
    return text


def main(args: Args) -> None:
    if args.runs is None and args.out is not None:
        raise SystemExit("--out goes with --runs: without it the report is this repository's own.")
    print(anyones(args) if args.runs else ours())


if __name__ == "__main__":
    main(tyro.cli(Args))
