"""The plots of docs/tour.md: A2PO on Pendulum, and what three changes do to it. Needs matplotlib.

    python docs/figures/tour.py

Four versions, three seeds each, are trained for 4,000 steps; a run takes about a minute on one CPU
thread. Runs that are there already are kept. Written are tour.csv, which has every evaluation and
the histograms, and three plots. --draw draws again from the CSV without training.
"""

import csv
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

FOLDER = Path(__file__).resolve().parent
DATASET = "pendulum-random-expert-10"
FLAGS = dict(steps=4000, eval_every=500, hidden_dim=128, cvae_dim=128, learning_rate=1e-3)
FLAGS |= dict(gamma=0.97, tau=0.01, eval_xi=(-1.0, 0.0), device="cpu")
VERSIONS = {  # name: label, flags
    "shipped": ("as shipped", {}),
    "fixed": ("condition fixed at 1", dict(xi="fixed")),
    "shuffled": ("condition shuffled", {}),
    "kl_0": ("KL weight 0", dict(kl_weight=0.0)),
}
EDGES = {"xi": np.linspace(-1, 1, 41), "z": np.linspace(-6, 6, 61)}


@dataclass
class Args:
    """Trains four versions of A2PO and draws what became of them."""

    versions: tuple[str, ...] = tuple(VERSIONS)  # which of the four
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = FLAGS["steps"]  # gradient steps of a run
    runs: str = "runs/tour"  # where the runs are, and go
    draw: bool = False  # only draw tour.csv


def load():
    """A fresh module of the file, which may then be changed."""
    path = FOLDER.parents[1] / "algorithms" / "a2po.py"
    spec = importlib.util.spec_from_file_location("a2po", path)
    sys.modules["a2po"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["a2po"])
    return sys.modules["a2po"]


def shuffle(a2po) -> None:
    """ξ no longer belongs to its transition."""
    condition = a2po.A2PO.condition
    a2po.A2PO.condition = lambda self, *x: condition(self, *x)[torch.randperm(len(x[0]))]


def train(version: str, seed: int, args: Args) -> Path:
    """The folder of a run, which is made if it is not there."""
    folder = Path(args.runs, version, f"seed{seed}")
    if not (folder / "checkpoint.pt").exists():
        a2po = load()
        if version == "shuffled":
            shuffle(a2po)
        flags = FLAGS | VERSIONS[version][1] | dict(seed=seed, steps=args.steps)
        a2po.train(a2po.Args(dataset=DATASET, **flags, run_dir=str(folder)))
    return folder


def histograms(folder: Path) -> dict[str, np.ndarray]:
    """ξ of the logged actions by whose they are and where, and the encoder's mean of z, all in
    shares of the bins in EDGES."""
    a2po = load()
    saved = a2po.load_policy(folder).saved
    arrays, task = a2po.load_dataset(saved["args"]["dataset"])
    data = {key: torch.as_tensor(array) for key, array in arrays.items()}
    learner = a2po.A2PO(data, task, a2po.Args(**saved["args"]))
    learner.load_state_dict(saved["learner"])
    with torch.no_grad():
        s, a, *rest = learner.data
        _, *advantage_and_sigma = learner.critic_loss(s, a, *rest)
        xi = learner.condition(*advantage_and_sigma)
        z = learner.policy.encoder(torch.cat([s, xi, a], dim=-1)).chunk(2, dim=-1)[0]
    first = np.flatnonzero(np.diff(arrays["episodes"], prepend=-1))
    # An expert's episode returns more than -500, the best random one -631.
    expert = (arrays["returns_to_go"][first, 0] > -500)[arrays["episodes"]]
    cos, _, speed = arrays["observations"].T
    upright = (cos > 0.9) & (np.abs(speed) < 1)
    parts = {"z": z}
    for whose, rows in (("expert", expert), ("random", ~expert)):
        parts |= {f"xi {whose} upright": xi[rows & upright]}
        parts |= {f"xi {whose} elsewhere": xi[rows & ~upright]}
    shares = {}
    for name, values in parts.items():
        counts, _ = np.histogram(values.numpy().clip(-6, 6), EDGES[name.split()[0]])
        shares[name] = counts / counts.sum()
    return shares


def rows_of(version: str, seed: int, args: Args) -> list[list[str]]:
    """Rows of the CSV: version, seed, what, step or bin, value."""
    folder = train(version, seed, args)
    with open(folder / "eval.csv") as file:
        found = list(csv.DictReader(file))
    wanted = ["score", "score_xi_-1", "score_xi_0"]
    wanted += [f"validation/{x}" for x in ("reconstruction", "kl", "spread_over_z")]
    rows = [
        [version, seed, key, row["step"], f"{float(row[key]):.4g}"]
        for row in found
        for key in wanted
    ]
    if version in ("shipped", "kl_0"):
        for what, shares in histograms(folder).items():
            rows += [[version, seed, what, i, f"{share:.5f}"] for i, share in enumerate(shares)]
    return rows


def series(rows, version, what) -> tuple[np.ndarray, np.ndarray]:
    """Steps (T,) and values (seeds, T)."""
    found = [row for row in rows if row[0] == version and row[2] == what]
    seeds = sorted({row[1] for row in found})
    steps = np.array([float(row[3]) for row in found if row[1] == seeds[0]])
    return steps, np.array([[float(row[4]) for row in found if row[1] == seed] for seed in seeds])


def axes(columns=1):
    size = dict(figsize=(4.2 * columns, 3.0), squeeze=False, layout="constrained")
    figure, found = plt.subplots(1, columns, **size)
    for axis in found[0]:
        axis.grid(alpha=0.3)
    return figure, found[0]


def save(figure, name):
    figure.savefig(FOLDER / name, dpi=110)
    print(f"{name} has {(FOLDER / name).stat().st_size / 1000:.0f} KB")


def curve(axis, rows, version, what, label, colour):
    steps, values = series(rows, version, what)
    axis.plot(steps, values.mean(0), color=colour, label=label, lw=1.8)
    axis.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.15, lw=0)


def draw(rows):
    figure, (left, right) = axes(2)
    for i, (version, (label, _)) in enumerate(VERSIONS.items()):
        curve(left, rows, version, "score", label, f"C{i}")
    asked = {"score": "asked for ξ = 1", "score_xi_0": "ξ = 0", "score_xi_-1": "ξ = -1"}
    for (what, label), colour in zip(asked.items(), ("C0", "0.5", "k")):
        curve(right, rows, "shipped", what, label, colour)
    left.set(title="four versions, asked for ξ = 1", ylabel="score")
    right.set(title="as shipped", ylabel="score")
    for axis in (left, right):
        axis.set(xlabel="gradient steps", ylim=(-75, 110))
        axis.legend(frameon=False, fontsize=8)
    save(figure, "tour_scores.png")

    figure, found = axes(2)
    for axis, where in zip(found, ("elsewhere", "upright")):
        for whose, colour in (("expert", "C0"), ("random", "0.5")):
            _, shares = series(rows, "shipped", f"xi {whose} {where}")
            look = dict(fill=True, alpha=0.5, color=colour, label=f"{whose} actions")
            axis.stairs(shares.mean(0), EDGES["xi"], **look)
        title = {"elsewhere": "swinging", "upright": "upright and slow"}[where]
        axis.set(title=title, xlabel="ξ of the logged action", ylabel="share")
        axis.legend(frameon=False, fontsize=9)
    save(figure, "tour_condition.png")

    figure, (axis,) = axes()
    for version, colour in (("shipped", "C0"), ("kl_0", "C3")):
        _, shares = series(rows, version, "z")
        label = f"{VERSIONS[version][0]}" + (" (0.5)" if version == "shipped" else "")
        axis.stairs(shares.mean(0), EDGES["z"], fill=True, alpha=0.5, color=colour, label=label)
    axis.axvspan(-1, 1, color="0.5", alpha=0.2, lw=0, label="where the actor looks")
    axis.set(xlabel="z, the encoder's mean (beyond ±6: at ±6)", ylabel="share")
    axis.legend(frameon=False, fontsize=8)
    save(figure, "tour_latent.png")


def main(args: Args) -> None:
    torch.set_num_threads(1)
    path = FOLDER / "tour.csv"
    if not args.draw:
        rows = [["version", "seed", "what", "at", "value"]]
        for seed in args.seeds:
            for version in args.versions:
                rows += rows_of(version, seed, args)
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    with open(path) as file:
        draw(list(csv.reader(file))[1:])


if __name__ == "__main__":
    main(tyro.cli(Args))
