"""The figure and the table of docs/algorithms/transformer_mbrl.md: how fast the world models'
errors grow along held-out episodes, transformer beside MLP, with all of the state and without its
velocities. Needs matplotlib; some minutes on one CPU thread. The numbers are written to a CSV file
beside it.

    python datasets/make.py ant-medium
    python docs/figures/transformer_mbrl.py
    python docs/figures/transformer_mbrl.py --dataset pendulum-medium-replay --velocities 1
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

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "algorithms" / "transformer_mbrl"
HORIZONS = (1, 5, 20, 100)


@dataclass
class Args:
    """Trains world models with and without a memory and draws their errors."""

    dataset: str = "ant-medium"  # one of datasets/
    velocities: int = 14  # how many last dimensions of its states are velocities
    model_steps: int = 1500  # gradient steps of every world model
    model_dim: int = 64  # size of a token
    seeds: tuple[int, ...] = (0,)  # one world model of each kind per seed
    held_out: float = 0.2  # share of the episodes that no model sees


def load_algorithm():
    path = DOCS.parent / "algorithms" / "transformer_mbrl.py"
    spec = importlib.util.spec_from_file_location("transformer_mbrl", path)
    sys.modules["transformer_mbrl"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["transformer_mbrl"])
    return sys.modules["transformer_mbrl"]


def main(args: Args) -> None:
    torch.set_num_threads(1)
    module, rng = load_algorithm(), np.random.default_rng(0)
    arrays, task = module.load_dataset(args.dataset)
    episodes = arrays["episodes"].max() + 1
    chosen = rng.permutation(episodes)[: int(args.held_out * episodes)]
    unseen = np.isin(arrays["episodes"], chosen)
    data, held_out = (
        {key: torch.as_tensor(array[rows]) for key, array in arrays.items()}
        for rows in (~unseen, unseen)
    )
    sizes = dict(model_dim=args.model_dim, layers=2, ensemble=3, rollout_batch=1, device="cpu")
    sizes |= dict(model_learning_rate=1e-3, termination="none")
    table = [("states", "dynamics", "seed", *HORIZONS)]
    kinds = [(hide, kind) for hide in (0, args.velocities) for kind in ("transformer", "mlp")]
    for hide, kind in kinds:
        for seed in args.seeds:
            torch.manual_seed(seed)
            flags = module.Args(**sizes, dynamics=kind, hide_velocities=hide)
            learner = module.Learner(data, task, flags)
            for _ in range(args.model_steps):
                learner.update_model()
            # All horizons from the same rows of the same episodes, where these are long enough.
            errors = learner.open_loop(learner.columns_of(held_out), max(HORIZONS))
            row = [f"{errors[k].item():.4f}" for k in HORIZONS]
            states = "positions" if hide else "all"
            table.append((states, kind, seed, *row))
            print(*table[-1], flush=True)
    FOLDER.mkdir(exist_ok=True)
    with open(FOLDER / f"{args.dataset}.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)

    figure, panels = plt.subplots(1, 2, figsize=(7, 3.2), sharey=True)
    of = {"transformer": ("C0", "o"), "mlp": ("C1", "s")}
    for axes, states in zip(panels, ("all", "positions")):
        for kind, (colour, marker) in of.items():
            lines = [x[3:] for x in table[1:] if x[:2] == (states, kind)]
            lines = np.array(lines, dtype=float)  # (seeds, horizons)
            axes.plot(HORIZONS, lines.mean(0), color=colour, marker=marker, label=kind)
            axes.fill_between(HORIZONS, lines.min(0), lines.max(0), color=colour, alpha=0.2)
        axes.set(xscale="log", yscale="log", xlabel="steps ahead")
        axes.set_xticks(HORIZONS, [str(k) for k in HORIZONS])
        axes.minorticks_off()
        axes.set_title("all of the state" if states == "all" else "velocities hidden", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("error in standard deviations")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(FOLDER / f"{args.dataset}_open_loop.png", dpi=150)


if __name__ == "__main__":
    main(tyro.cli(Args))
