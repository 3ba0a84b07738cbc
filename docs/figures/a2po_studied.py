"""The experiments of docs/a2po_studied.md: A2PO on Pendulum, one thing changed at a time.

    python docs/figures/a2po_studied.py

Each version is trained for 4,000 steps on data in which one transition of ten is an expert's, with
five seeds; a run takes about a minute on one CPU thread, all of them over an hour. Runs that are
there already are kept. a2po_studied.csv has the end of every run, a2po_studied.png the plot and
a2po_studied_<question>.md the tables. --draw draws again from the CSV without training. Then it
does the same with a2po_mixed.py and a2po_imagined.py, the page's other questions.
"""

import csv
import importlib.util
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

FOLDER = Path(__file__).resolve().parent
FLAGS = dict(dataset="pendulum-random-expert-10", steps=4000, eval_every=1000, hidden_dim=128)
FLAGS |= dict(cvae_dim=128, learning_rate=1e-3, gamma=0.97, tau=0.01, device="cpu")
FLAGS |= dict(eval_episodes=20, eval_xi=(-1.0, 0.0))
ONE = dict(xi_norm="running", xi_critic="min")
SHIPPED = {"as shipped": {}}
QUESTIONS = {  # question: {version: flags}; noise and shuffled are no flags of the file
    "condition": SHIPPED
    | {
        "discrete: its sign": dict(xi="discrete"),
        "fixed at 1": dict(xi="fixed"),
        "shuffled in the batch": dict(shuffled=True),
    },
    "sigma": SHIPPED
    | {
        "the smaller critic, no LayerNorm": dict(xi_critic="min", layer_norm=False),
        "one σ, the smaller critic": ONE,
        "one σ, the smaller critic, no LayerNorm": ONE | dict(layer_norm=False),
    },
    "noise": SHIPPED
    | {
        "noise of one σ": dict(noise=1.0),
        "noise of three σ": dict(noise=3.0),
    },
    "terms": SHIPPED
    | {
        "no Q: α = 0": dict(alpha=0.0),
        "no cloning": dict(bc_weight=0.0),
    },
    "kl": {"β = 0": dict(kl_weight=0.0), "β = 0.05": dict(kl_weight=0.05)}
    | {"β = 0.5, as shipped": {}}
    | {"β = 5": dict(kl_weight=5.0)},
    "cvae": {"0.2": dict(cvae_min_steps=0), "0.5": dict(cvae_min_steps=0, cvae_fraction=0.5)}
    | {"1, as shipped": {}},
}
COLUMNS = {  # of eval.csv: heading
    "score": "asked for 1",
    "score_xi_0": "for 0",
    "score_xi_-1": "for -1",
    "validation/reconstruction": "reconstruction",
    "validation/kl": "KL, nats",
    "validation/spread_over_z": "spread over z",
}
SHOWN = {"kl": tuple(COLUMNS)}  # all columns; elsewhere the scores alone


@dataclass
class Args:
    """Trains versions of A2PO and writes what became of them."""

    questions: tuple[str, ...] = tuple(QUESTIONS)  # which of them
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    runs: str = "runs/a2po_studied"  # where the runs are, and go
    draw: bool = False  # only draw a2po_studied.csv again
    others: bool = True  # then run a2po_mixed.py and a2po_imagined.py


def load():
    """A fresh module of the file, which may then be changed."""
    path = FOLDER.parents[1] / "algorithms" / "a2po.py"
    spec = importlib.util.spec_from_file_location("a2po", path)
    sys.modules["a2po"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["a2po"])
    return sys.modules["a2po"]


def train(flags: dict, seed: int, runs: str) -> dict[str, str]:
    """The last row of a run's eval.csv; the run is made if it is not there."""
    name = "_".join(f"{key}_{value}" for key, value in flags.items()) or "shipped"
    folder = Path(runs, name, f"seed{seed}")
    if not (folder / "eval.csv").exists() or len(list(csv.reader(open(folder / "eval.csv")))) < 5:
        a2po, flags = load(), dict(flags)
        noise, shuffled = flags.pop("noise", 0.0), flags.pop("shuffled", False)
        condition = a2po.A2PO.condition

        def changed(self, advantage, sigma):
            advantage = advantage + noise * sigma * torch.randn_like(advantage)
            xi = condition(self, advantage, sigma)
            return xi[torch.randperm(len(xi))] if shuffled else xi

        if noise or shuffled:
            a2po.A2PO.condition = changed
        a2po.train(a2po.Args(**FLAGS | flags, seed=seed, run_dir=str(folder)))
    with open(folder / "eval.csv") as file:
        return list(csv.DictReader(file))[-1]


def versions(questions) -> dict[str, dict]:
    """Every version once, whatever the number of questions that it answers."""
    return {str(flags): flags for question in questions for flags in QUESTIONS[question].values()}


def table(question: str, ends: dict) -> str:
    """Mean (lowest to highest) over the seeds of every version."""
    columns = SHOWN.get(question, tuple(COLUMNS)[:3])
    lines = ["| | " + " | ".join(COLUMNS[c] for c in columns) + " |"]
    lines += ["|---|" + "--:|" * len(columns)]
    for version, flags in QUESTIONS[question].items():
        cells = []
        for column in columns:
            values = np.array(ends[str(flags), column])
            form = "{:.0f} ({:.0f} to {:.0f})" if "score" in column else "{:.2g}"
            cells.append(form.format(values.mean(), values.min(), values.max()))
        lines.append(f"| {version} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(questions, ends: dict) -> None:
    """Scores of every version when it is asked for each of three conditions."""
    figure, axes = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained", sharey=True)
    for axis, question in zip(axes.flat, questions):
        for i, flags in enumerate(QUESTIONS[question].values()):
            for column, colour in zip(tuple(COLUMNS)[:3], ("C0", "0.5", "k")):
                values = ends[str(flags), column]
                label = f"ξ = {COLUMNS[column].split()[-1]}" if not i else None
                axis.plot(
                    [i] * len(values), values, "o", ms=4, alpha=0.6, color=colour, label=label
                )
        names = [textwrap.fill(name, 15) for name in QUESTIONS[question]]
        axis.set_xticks(range(len(names)), names, fontsize=7.5)
        axis.set(title=question, xlim=(-0.5, len(names) - 0.5))
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set(ylabel="score")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(FOLDER / "a2po_studied.png", dpi=110)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    path = FOLDER / "a2po_studied.csv"
    if not args.draw:
        rows = []
        for seed in args.seeds:
            for name, flags in versions(args.questions).items():
                end = train(flags, seed, args.runs)
                rows += [[name, seed, column, f"{float(end[column]):.5g}"] for column in COLUMNS]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["version", "seed", "what", "value"], *rows])
    ends = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            ends.setdefault((row["version"], row["what"]), []).append(float(row["value"]))
    for question in args.questions:
        (FOLDER / f"a2po_studied_{question}.md").write_text(table(question, ends))
    draw(args.questions, ends)
    for name in ("a2po_mixed.py", "a2po_imagined.py") if args.others else ():
        options = ["--draw"] if args.draw else ["--seeds", *map(str, args.seeds)]
        subprocess.run([sys.executable, FOLDER / name, *options], check=True)


if __name__ == "__main__":
    main(tyro.cli(Args))
