"""The figure and the tables of docs/algorithms/diffuser.md: plans without and with guidance where
they can be drawn, how often and how soon the goal of tests/crossing.py is reached against the
guidance, and what a decision costs. Needs matplotlib; run from the repository's root, some minutes
on one CPU thread. The numbers go to CSV files beside the figure.

    python docs/figures/diffuser.py
"""

import csv
import importlib.util
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "algorithms" / "diffuser"
CASE = dict(horizon=16, diffusion_steps=10, hidden_dim=16, multipliers=(1, 2), guide_steps=1)
CASE |= dict(plans=1, termination_penalty=0.0, gamma=0.97, batch_size=32, learning_rate=2e-3)
CASE |= dict(ema_rate=0.01, steps=1200, eval_every=0, validation_fraction=0.0)
SCALES = (0.0, 1.0, 3.0, 10.0, 30.0, 100.0)
SMALL = dict(horizon=16, diffusion_steps=10, hidden_dim=16, multipliers=(1, 2), guide_steps=1)
TIMED = {  # name: (state and action dimensions, episodes, flags)
    "the case": ((2, 2), 20, SMALL | {"plans": 1}),
    "Hopper, small": ((11, 3), 10, SMALL | {"plans": 4}),
    "Hopper, small, without guidance": ((11, 3), 10, SMALL | {"plans": 4, "guidance": 0.0}),
    "Hopper, defaults, one plan": ((11, 3), 10, {"plans": 1}),
    "Hopper, defaults": ((11, 3), 10, {}),
}


@dataclass
class Args:
    """Trains Diffuser on tests/crossing.npz and draws what it plans."""

    seeds: tuple[int, ...] = (0, 1, 2)  # of the runs; the first one's plans are drawn
    episodes: int = 20  # episodes of an evaluation
    decisions: int = 3  # decisions that are timed, at most
    draw: bool = False  # only train the first seed and draw; the numbers are those of before


def load_algorithm():
    path = DOCS.parent / "algorithms" / "diffuser.py"
    spec = importlib.util.spec_from_file_location("diffuser", path)
    sys.modules["diffuser"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["diffuser"])
    return sys.modules["diffuser"]


def train(module, seed: int, folder: str) -> None:
    flags = CASE | dict(dataset="tests/crossing.npz", seed=seed, device="cpu", run_dir=folder)
    module.train(module.Args(**flags))


def drawn_plans(module, folder: str, place: tuple, guidance: float) -> np.ndarray:
    """Some plans from a place, (24, H, 2): x and y."""
    policy = module.load_policy(folder, guidance=guidance)
    torch.manual_seed(0)
    with torch.no_grad():
        x = policy.plan(policy.scaling.state(np.tile(place, (24, 1))))
    return (x[:, :, 2:] * policy.scaling.std + policy.scaling.mean).numpy()


def draw(module, folder: str, rows: list) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.3), layout="constrained")
    arrays, _ = module.load_dataset("tests/crossing.npz")
    for axis, guidance in zip(axes, (0.0, 30.0)):
        for k in np.unique(arrays["episodes"]):
            axis.plot(*arrays["observations"][arrays["episodes"] == k].T, color="0.8", lw=0.7)
        for place, color in (((-0.9, -0.08), "C0"), ((0.1, -0.02), "C1")):
            for plan in drawn_plans(module, folder, place, guidance):
                axis.plot(*plan.T, color=color, lw=0.9, alpha=0.6)
        axis.plot([-1, -0.15], [0, 0], color="k", lw=2)
        axis.add_patch(plt.Circle((0.9, 0.6), 0.2, color="C2", alpha=0.3, lw=0))
        axis.set(xlim=(-1, 1.15), ylim=(-0.85, 0.85), title=f"plans, guidance {guidance:g}")
    x = np.array([row[1:] for row in rows], float)
    for seed in np.unique([row[0] for row in rows]):
        of = x[[row[0] == seed for row in rows]]
        axes[2].plot(np.arange(len(of)), of[:, 1], "o-", lw=1.2, label=f"seed {seed}")
    axes[2].set_xticks(range(len(SCALES)), [f"{scale:g}" for scale in SCALES])
    axes[2].set(xlabel="guidance", ylabel="score, 100: as its demonstrations")
    axes[2].set_title("plans followed")
    axes[2].grid(alpha=0.3)
    axes[2].legend(frameon=False, fontsize=8)
    figure.savefig(FOLDER / "plans.png", dpi=100)


def evaluations(module, folder: str, seed: int, args: Args) -> list:
    """Seed, guidance, score, length of the episodes: 0 for the time limit, 100 for half of it."""
    rows, (_, task) = [], module.load_dataset("tests/crossing.npz")
    for guidance in SCALES:
        policy = module.load_policy(folder, guidance=guidance)
        torch.manual_seed(0)
        length = module.evaluate(policy, task, args.episodes, 0)["length_mean"]
        rows.append([seed, f"{guidance:g}", f"{100 * (60 - length) / 30:.1f}", f"{length:.1f}"])
        print(*rows[-1], flush=True)
    return rows


def times(module, args: Args) -> list:
    """Setting, episodes, milliseconds of a decision for all of them, untrained networks."""
    rows = []
    for name, (sizes, episodes, flags) in TIMED.items():
        task = {"sizes": list(sizes), "bounds": [[-1.0] * sizes[1], [1.0] * sizes[1]]}
        policy = module.Policy(task, module.Args(**flags)).eval().requires_grad_(False)
        s, found = np.random.default_rng(0).normal(size=(episodes, sizes[0])), []
        policy.act(s[:1])
        while len(found) < args.decisions and sum(found) < 10:
            begun = time.perf_counter()
            policy.act(s)
            found.append(time.perf_counter() - begun)
        rows.append([name, episodes, f"{1000 * np.mean(found):.3g}"])
        print(*rows[-1], flush=True)
    return rows


def write(name: str, rows: list) -> None:
    with open(FOLDER / name, "w", newline="") as file:
        csv.writer(file).writerows(rows)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, str(DOCS.parent))  # of the environment, tests.crossing
    module, rows = load_algorithm(), []
    FOLDER.mkdir(exist_ok=True)
    if not args.draw:
        write("time.csv", [["setting", "episodes", "ms"], *times(module, args)])
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds[:1] if args.draw else args.seeds:
            train(module, seed, f"{folder}/{seed}")
            if not args.draw:
                rows += evaluations(module, f"{folder}/{seed}", seed, args)
                write("guidance.csv", [["seed", "guidance", "score", "length"], *rows])
        with open(FOLDER / "guidance.csv") as file:
            rows = list(csv.reader(file))[1:]
        draw(module, f"{folder}/{args.seeds[0]}", rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
