"""Why A2PO needs a σ for each state where good data are rare. Needs matplotlib.

    python datasets/make.py hopper-random hopper-expert
    python datasets/make.py --mix hopper-random:0.9,hopper-expert:0.1 --name hopper-random-expert-10
    python docs/figures/a2po_scarce.py

Two versions are trained for 20,000 steps, eight minutes each on one CPU thread; runs that are there
already are kept. a2po_scarce.csv has what they say about the data: ξ of the logged actions, and how
far the action at a condition is from the logged one. The curves and a2po_scarce.md, the table of
A2PO's page, come from the runs in benchmark_results/study. --draw draws again without training.
"""

import csv
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
DATASET = "hopper-random-expert-10"
ONE = dict(xi_norm="running", xi_critic="min", layer_norm=False)
VERSIONS = {"one": ("one σ for all states", ONE), "local": ("σ of each state", {})}
EDGES = np.linspace(-1, 1, 41)
ASKED = (-1.0, -0.5, 0.0, 0.5, 1.0)
LINES = {  # folder of benchmark_results/study: label, colour if it is drawn
    "a2po": ("A2PO", "C0"),
    "a2po_no_local": ("without σ(s)", "C2"),
    "a2po_no_layer_norm": ("without LayerNorm", "C4"),
    "a2po_one_sigma": ("one σ, smaller critic, no LayerNorm", "C1"),
    "a2po_only_local": ("only σ(s)", None),
    "a2po_only_mean": ("only the mean critic", None),
    "a2po_only_layer_norm": ("only LayerNorm", None),
    "td3_bc": ("TD3+BC", "0.3"),
    "td3_bc_tau_0.02": ("TD3+BC with A2PO's τ", "C3"),
    "iql": ("IQL", "0.65"),
}
STEPS = np.arange(10_000, 60_001, 10_000)
TASKS = {  # data set: heading of the table
    "hopper-random-expert-10": "Hopper, a tenth expert",
    "walker2d-random-expert-10": "Walker2d, a tenth expert",
    "hopper-random-medium-expert": "Hopper, a third each",
    "hopper-medium-replay": "Hopper, replay",
}


@dataclass
class Args:
    """Trains A2PO with one σ and with one of each state, and draws what they make of the data."""

    runs: str = "runs/a2po_scarce"  # where the runs are, and go
    steps: int = 20_000  # gradient steps of a run
    draw: bool = False  # only draw again


def load():
    spec = importlib.util.spec_from_file_location("a2po", ROOT / "algorithms" / "a2po.py")
    sys.modules["a2po"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows_of(version: str, args: Args) -> list[list]:
    """Rows of the CSV: version, whose actions, what, at, value."""
    a2po, folder = load(), Path(args.runs, version)
    if not (folder / "checkpoint.pt").exists():
        flags = VERSIONS[version][1] | dict(steps=args.steps, run_dir=str(folder), device="cpu")
        a2po.train(a2po.Args(dataset=DATASET, **flags))
    saved = a2po.load_policy(folder).saved
    arrays, task = a2po.load_dataset(DATASET)
    with h5py.File(ROOT / "datasets" / f"{DATASET}.hdf5") as file:
        names = file.attrs["source_names"].split(",")
        expert = torch.as_tensor(file["sources"][:] == names.index("hopper-expert"))
    data = {key: torch.as_tensor(array) for key, array in arrays.items()}
    learner = a2po.A2PO(data, task, a2po.Args(**saved["args"]))
    learner.load_state_dict(saved["learner"])
    some = torch.arange(len(expert)) % 4 == 0
    rows = []
    for whose, wanted in (("expert", expert & some), ("random", ~expert & some)):
        with torch.no_grad():
            s, a, *rest = (column[wanted] for column in learner.data)
            _, *advantage_and_sigma = learner.critic_loss(s, a, *rest)
            xi = learner.condition(*advantage_and_sigma)
            counts, _ = np.histogram(xi.numpy(), EDGES)
            rows += [[version, whose, "xi", i, n / len(s)] for i, n in enumerate(counts)]
            for asked in ASKED:
                answer = learner.policy(s, torch.full_like(xi, asked), learner.policy.actor)
                error = (answer - a).square().mean().item()
                rows.append([version, whose, "error", asked, error])
    return rows


def draw_condition(rows: list[list[str]]) -> None:
    """ξ of the expert's actions, and how near the policy is to them at each condition."""
    found = {tuple(row[:4]): float(row[4]) for row in rows}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")
    for (version, (label, _)), colour in zip(VERSIONS.items(), ("C1", "C0")):
        shares = [found[version, "expert", "xi", str(i)] for i in range(len(EDGES) - 1)]
        left.stairs(shares, EDGES, fill=True, alpha=0.5, color=colour, label=label)
        errors = [found[version, "expert", "error", str(x)] for x in ASKED]
        right.plot(ASKED, errors, "o-", color=colour, label=label)
    left.set(xlabel="ξ of the expert's actions", ylabel="share")
    left.set(title="what the condition says of the expert")
    right.set(title="the policy's action from the expert's", ylim=(0, None))
    right.set(xlabel="ξ asked for", ylabel="squared distance")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(FOLDER / "a2po_scarce_condition.png", dpi=110)


def curves(dataset: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Steps (T,) and scores (seeds, T) of each version that was run on a data set, up to 60,000
    steps: in the study, or else in the long runs."""
    found = {}
    for name in LINES:
        for place in ("study", "runs"):
            folder = ROOT / "benchmark_results" / place / name / dataset
            runs = [list(csv.DictReader(open(path))) for path in sorted(folder.glob("*/eval.csv"))]
            runs = [[row for row in run if int(row["step"]) in STEPS] for run in runs]
            if name not in found and runs and all(len(run) == len(STEPS) for run in runs):
                found[name] = STEPS, np.array([[float(x["score"]) for x in run] for run in runs])
    return found


def draw_curves() -> None:
    figure, axes = plt.subplots(2, 2, figsize=(8.4, 6), layout="constrained", sharey=True)
    for axis, dataset in zip(axes.flat, TASKS):
        for name, (steps, scores) in curves(dataset).items():
            label, colour = LINES[name]
            if colour is None:
                continue
            axis.plot(steps / 1000, scores.mean(0), "o-", ms=3, color=colour, label=label)
            for one in scores:
                axis.plot(steps / 1000, one, color=colour, lw=0.7, alpha=0.35)
        axis.set(title=dataset, xlabel="thousand gradient steps")
        axis.grid(alpha=0.3)
    for axis in axes[:, 0]:
        axis.set(ylabel="score")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(FOLDER / "a2po_scarce.png", dpi=110)


def write_table() -> None:
    """Mean of the last five evaluations, over seeds and of each."""
    lines = ["| | " + " | ".join(TASKS.values()) + " |"]
    lines.append("|---|" + "--:|" * len(TASKS))
    for name, (label, _) in LINES.items():
        cells = []
        for dataset in TASKS:
            cells.append("-")
            if name in (found := curves(dataset)):
                finals = found[name][1][:, -5:].mean(1)
                seeds = ", ".join(f"{x:.0f}" for x in finals)
                cells[-1] = f"{finals.mean():.1f} ({seeds})"
        lines.append(f"| {label} | {' | '.join(cells)} |")
    (FOLDER / "a2po_scarce.md").write_text("\n".join(lines) + "\n")


def main(args: Args) -> None:
    torch.set_num_threads(1)
    path = FOLDER / "a2po_scarce.csv"
    if not args.draw:
        rows = [row for version in VERSIONS for row in rows_of(version, args)]
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["version", "whose", "what", "at", "value"])
            writer.writerows([*row[:4], f"{row[4]:.5g}"] for row in rows)
    with open(path) as file:
        draw_condition(list(csv.reader(file))[1:])
    draw_curves()
    write_table()


if __name__ == "__main__":
    main(tyro.cli(Args))
