"""The figure of docs/shift.md: what the critics believe and what the policies earn, for SAC on a
fixed data set and for three methods made for one. Needs matplotlib.

    python datasets/make.py hopper-expert
    python docs/figures/shift.py

Writes shift.png and shift.csv. --draw draws again from the CSV without training. It took 38 minutes
on one CPU thread beside other runs.
"""

import csv
import importlib.util
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

FOLDER = Path(__file__).resolve().parent
SMALL = dict(hidden_dim=64, batch_size=128, learning_rate=1e-3, gamma=0.99, tau=0.02)
RUNS = {  # file: its label, and its flags beyond the common ones
    "sac": ("SAC --offline", dict(offline=True)),
    "td3_bc": ("TD3+BC", {}),
    "cql": ("CQL", dict(n_actions=4, policy_learning_rate=1e-3)),
    "a2po": ("A2PO", dict(cvae_dim=64)),
}


@dataclass
class Args:
    """Trains four files on the same data and draws mean Q and score over steps."""

    datasets: tuple[str, ...] = ("hopper-medium-replay", "hopper-expert")  # a row each
    steps: int = 8000  # gradient steps
    seed: int = 0  # seed of every run
    draw: bool = False  # only draw shift.csv


def load(name):
    path = FOLDER.parents[1] / "algorithms" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def best_return(data, gamma):
    """The largest discounted return that follows any transition of the data."""
    best, ahead = 0.0, 0.0
    ends = np.diff(data["episodes"], append=-1) != 0
    for reward, end in zip(data["rewards"][::-1, 0], ends[::-1]):
        ahead = reward + gamma * (0.0 if end else ahead)
        best = max(best, ahead)
    return best


def train(name, dataset, args):
    """Rows of the CSV: data, file, what, step, value."""
    module = load(name)
    with tempfile.TemporaryDirectory() as folder:
        flags = SMALL | RUNS[name][1] | dict(dataset=dataset, steps=args.steps, seed=args.seed)
        flags |= dict(eval_every=1000, eval_episodes=5, device="cpu", matmul_precision="medium")
        history = module.train(module.Args(**flags, run_dir=folder))
        events = EventAccumulator(folder).Reload().Scalars("values/q")
    rows = [[dataset, name, "q", event.step, f"{event.value:.6g}"] for event in events]
    return rows + [[dataset, name, "score", row["step"], f"{row['score']:.1f}"] for row in history]


def draw(rows):
    names = list(dict.fromkeys(row[0] for row in rows))
    size = dict(figsize=(8.4, 3.1 * len(names)), squeeze=False, layout="constrained")
    figure, axes = plt.subplots(len(names), 2, **size)
    for (left, right), dataset in zip(axes, names):
        for i, (name, (label, _)) in enumerate(RUNS.items()):
            for axis, what in ((left, "q"), (right, "score")):
                found = [row[3:] for row in rows if row[:3] == [dataset, name, what]]
                steps, values = np.array(found, float).T
                axis.plot(steps, values, color=f"C{i}", label=label, lw=1.8)
        (best,) = (float(row[4]) for row in rows if row[0] == dataset and row[2] == "best")
        left.axhline(best, color="k", ls="--", lw=1)
        left.text(
            *(0.98, best / 1.1, "best discounted return in the data"),
            **dict(transform=left.get_yaxis_transform(), fontsize=8, ha="right", va="top"),
        )
        left.set(title=dataset, yscale="log", ylabel="mean Q of the logged actions")
        right.set(title=dataset, ylabel="normalised score", ylim=(-5, 115))
        for axis in (left, right):
            axis.set_xlabel("gradient steps")
            axis.grid(alpha=0.3)
    axes[0, 1].legend(frameon=False, fontsize=9)
    figure.savefig(FOLDER / "shift.png", dpi=100)
    print(f"shift.png has {(FOLDER / 'shift.png').stat().st_size / 1000:.0f} KB")


def main(args: Args) -> None:
    torch.set_num_threads(1)
    path = FOLDER / "shift.csv"
    if not args.draw:
        rows = []
        for dataset in args.datasets:
            best = best_return(load("bc").load_dataset(dataset)[0], SMALL["gamma"])
            rows.append([dataset, "", "best", 0, f"{best:.1f}"])
            for name in RUNS:
                rows += train(name, dataset, args)
                with open(path, "w", newline="") as file:
                    csv.writer(file).writerows([["data", "file", "what", "step", "value"], *rows])
    with open(path) as file:
        draw(list(csv.reader(file))[1:])


if __name__ == "__main__":
    main(tyro.cli(Args))
