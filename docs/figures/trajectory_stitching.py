"""The figures of docs/algorithms/trajectory_stitching.md: what stitches look like where they can be
drawn, and whether the simulator agrees that they can be made. Needs matplotlib; run from the
repository's root, some minutes on one CPU thread. Every seed's numbers go to a CSV file beside the
figures.

    python docs/figures/trajectory_stitching.py
"""

import csv
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "algorithms" / "trajectory_stitching"
PLANE = "tests/crossing.npz"


@dataclass
class Args:
    """Trains the models on data sets and lets the simulator judge the candidates."""

    datasets: tuple[str, ...] = (PLANE, "pendulum-medium-replay", "hopper-medium-replay")
    model_steps: int = 2000  # gradient steps of the models
    model_dim: int = 64  # units in each of their hidden layers
    seeds: tuple[int, ...] = (0, 1, 2)  # models of each data set
    rows: int = 1000  # transitions whose candidates are simulated


def load_algorithm():
    path = DOCS.parent / "algorithms" / "trajectory_stitching.py"
    spec = importlib.util.spec_from_file_location("trajectory_stitching", path)
    sys.modules["trajectory_stitching"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["trajectory_stitching"])
    return sys.modules["trajectory_stitching"]


def train(module, name, args: Args, seed: int, **flags):
    arrays, task = module.load_dataset(name)
    data = {key: torch.as_tensor(array) for key, array in arrays.items()}
    small = dict(model_dim=args.model_dim, batch_size=128, learning_rate=1e-3)
    small |= dict(reward_learning_rate=1e-3, tau=0.05, gamma=0.95 if name == PLANE else 0.97)
    torch.manual_seed(seed)
    learner = module.Learner(data, task, module.Args(dataset=name, device="cpu", **small | flags))
    for _ in range(args.model_steps):
        learner.update_models()
    return learner


def simulate(task, s, a):
    """What the environment itself answers at states s (B, S) and actions a (B, A) in its bounds."""
    env = gym.make(task["env"]).unwrapped
    env.reset(seed=0)
    s_next = np.zeros_like(s)
    for row in range(len(s)):
        if task["env_id"].startswith("Pendulum"):
            env.state = np.array([np.arctan2(s[row, 1], s[row, 0]), s[row, 2]], dtype=np.float64)
        elif hasattr(env, "set_state"):  # MuJoCo's observations lack the position along the floor
            free = env.model.nq - 1
            env.set_state(np.append(0, s[row, :free]), s[row, free:])
        else:
            env.s = s[row].astype(np.float64)
        s_next[row] = env.step(a[row])[0]
    env.close()
    return s_next


@torch.no_grad()
def errors(learner, rows: int, seed: int) -> dict[str, np.ndarray]:
    """How far from ŝ the simulator ends up after the inverse model's action, in the data's standard
    deviations, root mean square over dimensions: of the best candidate that V likes better, among
    those that the ensemble accepts and among those that it rejects; and of the data's own s'."""
    rng, n = np.random.default_rng(seed), len(learner.last)
    i = torch.as_tensor(rng.choice(n, min(rows, n), replace=False))
    j, reached, gain = learner.candidates(i)
    found, scale = {}, learner.policy.scaling.std.numpy()
    raw = learner.raw["observations"]
    for kind, ok in {"accepted": reached, "rejected": ~reached, "data": None}.items():
        if ok is None:
            at, goal = i, learner.raw["next_observations"][i]
        else:
            best, which = gain.masked_fill(~ok, 0).max(1)
            at = i[best > 0]
            goal = raw[j.gather(1, which[:, None])[:, 0][best > 0]]
        if len(at) == 0:
            found[kind] = np.zeros(0)
            continue
        state = learner.policy.scaling.state
        a = learner.policy.scaling.action(learner.inverse(state(raw[at]), state(goal)), raw[at])
        there = simulate(learner.task, raw[at].numpy(), a.numpy())
        found[kind] = np.sqrt(np.square((there - goal.numpy()) / scale).mean(1))
    return found


def draw_errors(module, args: Args) -> None:
    table = [("dataset", "seed", "kind", "candidates", "median", "mean", "90 %")]
    figure, axes = plt.subplots(1, len(args.datasets), figsize=(13, 3), layout="constrained")
    for name, panel in zip(args.datasets, np.atleast_1d(axes)):
        for seed in args.seeds:
            found = errors(train(module, name, args, seed), args.rows, seed)
            for kind, error in found.items():
                measures = (np.median, np.mean, lambda x: np.quantile(x, 0.9))
                summary = [f"{m(error):.4f}" if len(error) else "" for m in measures]
                table.append((Path(name).stem, seed, kind, len(error), *summary))
                print(*table[-1], flush=True)
            if seed == args.seeds[0]:
                low = max(1e-4, min(error.min() for error in found.values() if len(error)))
                high = max(error.max() for error in found.values() if len(error))
                bins = np.geomspace(low, high, 40)
                for kind in ("accepted", "rejected"):
                    panel.hist(found[kind].clip(low), bins, alpha=0.6, density=False, label=kind)
                middle = np.median(found["data"])
                panel.axvline(middle, color="black", lw=1, label="data's own s', median")
        panel.set(xscale="log", title=Path(name).stem, xlabel="error in standard deviations")
    np.atleast_1d(axes)[0].set_ylabel("candidates")
    np.atleast_1d(axes)[0].legend(frameon=False, fontsize=8)
    save(figure, "errors")
    with open(FOLDER / "errors.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)


def draw_plane(module, args: Args) -> None:
    """The two kinds of demonstrations, and what is made of them with and without the question
    whether a candidate can be reached."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.6), sharey=True, layout="constrained")
    for panel, reachability in zip(axes, (None, True, False)):
        flags = {} if reachability is None else dict(reachability=reachability)
        learner = train(module, PLANE, args, 0, **flags)
        learner.stitch()
        rows = learner.walk(stitches=reachability is not None)[0].T
        for episode in rows:
            path = learner.raw["observations"][episode[episode >= 0] % len(learner.last)].numpy()
            below = path[0, 1] < 0
            panel.plot(*path.T, lw=0.8, alpha=0.7, color="C3" if below else "C0")
        panel.plot([-1, -0.15], [0, 0], color="black", lw=2.5)
        panel.add_patch(plt.Circle((0.9, 0.6), 0.2, fill=False))
        panel.set(xlim=(-1, 1.1), ylim=(-0.85, 0.85), xticks=(-1, -0.5, 0, 0.5, 1))
    for panel, title in zip(axes, ("the data", "stitched", "stitched, --no-reachability")):
        panel.set_title(title)
    save(figure, "crossing")


def save(figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / f"{name}.png", dpi=90, bbox_inches="tight")
    print(FOLDER / f"{name}.png", f"{(FOLDER / f'{name}.png').stat().st_size / 1000:.0f} KB")


def main(args: Args) -> None:
    torch.set_num_threads(1)
    sys.path.insert(0, "")
    module = load_algorithm()
    draw_plane(module, args)
    draw_errors(module, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
