"""A2PO meets a learnt model, for docs/a2po_studied.md: it trains on real transitions and on those
that algorithms/gan_world_model.py imagined. Needs matplotlib.

    python docs/figures/a2po_imagined.py

For each data set and each of five seeds a world model and a policy in it are trained. Their
rollouts are written beside the real transitions into one .npz file, and A2PO trains on that file as
on any other. A seed takes about two minutes on one CPU thread; runs that are there already are
kept. a2po_imagined.csv has what was measured. --draw draws again from it without training.
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
MODEL = dict(model_dim=64, model_layers=3, discriminator_dim=64, model_steps=2000, steps=5000)
MODEL |= dict(rollout_every=250, rollout_batch=400, rollout_length=5, rollout_keep=12)
MODEL |= dict(eval_every=5000)
SHARES = {  # those of docs/figures/a2po_mixed.py: what they are
    "0": "20,000 rows, all random",
    "10-few": "2,000 rows, a tenth an expert's",
}
VERSIONS = {
    "real": "A2PO, real rows alone",
    "uniform": "and imagined ones, random actions",
    "policy": "and imagined ones, SAC's actions",
    "sac": "SAC in the model, its own score",
}


@dataclass
class Args:
    """Trains A2PO with and without a world model's rollouts and draws what became of it."""

    shares: tuple[str, ...] = tuple(SHARES)  # which data
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    runs: str = "runs/a2po_mixed"  # where the runs are, and go: those on real rows are shared
    draw: bool = False  # only draw again


def load(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mixed = load(FOLDER / "a2po_mixed.py")


def world_model(share: str, seed: int, args: Args) -> Path:
    """The folder of a world model with the policy that SAC learnt in it."""
    flags = mixed.FLAGS | MODEL | dict(dataset=mixed.dataset(share), seed=seed)
    folder = Path(args.runs, "world_model", share, f"seed{seed}")
    return mixed.finished("gan_world_model", flags, folder)


def imagine(share: str, seed: int, kind: str, args: Args) -> Path:
    """One data set of the real transitions and, behind them, all imagined ones. Their rewards are
    the model's less its penalty, and each of them is an episode of its own."""
    folder = world_model(share, seed, args)
    path = folder / f"{kind}.npz"
    if path.exists():
        return path
    learner, arrays = mixed.restored(folder, "gan_world_model", mixed.dataset(share))
    if kind == "uniform":  # the same branches, with uniformly random actions
        torch.manual_seed(seed)
        learner.policy.forward = lambda s: (2 * torch.rand(len(s), 1) - 1, None)
        for _ in range(MODEL["rollout_keep"]):
            learner.roll_out()
    filled = learner.imagined[: min(learner.count.item(), len(learner.imagined))]
    s, a, r, s_next, d, penalty = filled.split(learner.widths, dim=-1)
    scaling, (low, high) = learner.policy.scaling, learner.policy.scaling.bounds.numpy()
    s, s_next = (scaling.mean + scaling.std * x for x in (s, s_next))
    columns = dict(observations=s, actions=a, rewards=r - penalty, next_observations=s_next)
    columns = {k: np.concatenate([arrays[k], x.numpy()]) for k, x in columns.items()}
    columns["actions"] = low + 0.5 * (columns["actions"] + 1) * (high - low)
    columns["terminals"] = np.append(arrays["terminals"][:, 0], d[:, 0].numpy())
    ends = np.diff(arrays["episodes"], append=-1) != 0
    columns["timeouts"] = np.append(ends & (arrays["terminals"][:, 0] == 0), d[:, 0].numpy() == 0)
    task = torch.load(folder / "checkpoint.pt", weights_only=True)["task"]
    about = dict(env_id=task["env_id"], action_low=low, action_high=high)
    about |= dict(zip(("ref_min_score", "ref_max_score"), task["scores"]))
    np.savez(path, **columns, **about)
    return path


def a2po_on(path: Path, seed: int) -> Path:
    """The folder of A2PO's run on such a file."""
    flags = mixed.FLAGS | mixed.A2PO | dict(dataset=str(path), seed=seed)
    return mixed.finished("a2po", flags, path.with_suffix(""))


def score(folder: Path) -> float:
    with open(folder / "eval.csv") as file:
        return float(list(csv.DictReader(file))[-1]["score"])


def rows_of(share: str, seed: int, args: Args) -> list[list]:
    """Rows of the CSV: data, version, seed, what, value."""
    rows = [
        ["real", "score", score(mixed.train("a2po", share, seed, args))],
        ["sac", "score", score(world_model(share, seed, args))],
    ]
    for kind in ("policy", "uniform"):
        path = imagine(share, seed, kind, args)
        rows.append([kind, "score", score(a2po_on(path, seed))])
        learner, arrays = mixed.restored(a2po_on(path, seed), "a2po", str(path))
        xi = mixed.judged(learner, arrays)["xi"]
        imagined = MODEL["rollout_keep"] * MODEL["rollout_batch"] * MODEL["rollout_length"]
        real, high = np.arange(len(xi)) < len(xi) - imagined, xi > 0.9
        rows += [
            [kind, f"mean xi, {n}", xi[x].mean()]
            for n, x in dict(real=real, imagined=~real).items()
        ]
        rows += [[kind, "imagined rows", (~real).sum()]]
        rows += [[kind, "rows with xi > 0.9", high.sum()]]
        rows += [[kind, "imagined share of xi > 0.9", (~real)[high].mean() if high.any() else 0]]
        rows += [[kind, "mean reward, imagined", arrays["rewards"][~real].mean()]]
        rows += [[kind, "mean reward, real", arrays["rewards"][real].mean()]]
    return [[share, version, seed, what, f"{value:.5g}"] for version, what, value in rows]


def table(found: dict) -> str:
    """Scores on each data set: mean (lowest to highest) over the seeds."""
    lines = [f"| | {' | '.join(SHARES.values())} |", "|---|--:|--:|"]
    for version, label in VERSIONS.items():
        cells = [mixed.cell(found[share, version, "score"], ".0f") for share in SHARES]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(found: dict) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained", sharey=True)
    for axis, (share, label) in zip(axes, SHARES.items()):
        for i, version in enumerate(VERSIONS):
            values = found[share, version, "score"]
            colour = "0.4" if version in ("real", "sac") else "C3"
            axis.plot(values, [-i] * len(values), "o", ms=5, alpha=0.6, color=colour)
            axis.plot([np.mean(values)] * 2, [-i - 0.25, -i + 0.25], color=colour, lw=2)
        axis.set_yticks(range(0, -len(VERSIONS), -1), VERSIONS.values(), fontsize=9)
        axis.set(title=f"real: {label}", xlabel="score", xlim=(0, 105))
        axis.set_ylim(0.5 - len(VERSIONS), 0.5)
        axis.grid(alpha=0.3)
    figure.savefig(FOLDER / "a2po_studied_imagined.png", dpi=110)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    path = FOLDER / "a2po_imagined.csv"
    if not args.draw:
        rows = [row for seed in args.seeds for x in args.shares for row in rows_of(x, seed, args)]
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["data", "version", "seed", "what", "value"], *rows])
    found = {}
    with open(path) as file:
        for row in csv.DictReader(file):
            key = row["data"], row["version"], row["what"]
            found.setdefault(key, []).append(float(row["value"]))
    (FOLDER / "a2po_studied_imagined.md").write_text(table(found))
    draw(found)


if __name__ == "__main__":
    main(tyro.cli(Args))
