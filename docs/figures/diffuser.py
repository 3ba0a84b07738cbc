"""Goals by inpainting, the Maze2D of Diffuser's paper: a plan whose first state and whose last are
given, in OGBench's medium maze. The picture and the table of docs/algorithms/diffuser.md. Needs
matplotlib and requirements-goals.txt; a quarter of an hour on one CPU thread.

    python docs/figures/diffuser.py

Reaching a goal takes hundreds of steps, so a plan has every 8th of them, and is followed from place
to place, as the paper's is by a controller. What is changed in algorithms/diffuser.py are the two
classes below.
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
import torch.nn.functional as F
import tyro

DOCS = Path(__file__).resolve().parents[1]
STRIDE = 8  # steps of the environment between two of a plan
REACH = 0.2  # an action of 1 moves a point so far
CELL = 4.0  # width of a cell; cell (1, 1) is around the origin


@dataclass
class Args:
    """Trains Diffuser on the medium maze with both ends of its plans given, and follows them."""

    steps: int = 4000  # gradient steps
    horizon: int = 64  # H, places of a plan
    episodes: int = 10  # episodes of each of the five tasks
    seed: int = 0  # of the training and of the episodes
    run: str = ""  # where to train; empty: in a temporary folder
    output: str = str(DOCS / "algorithms" / "diffuser")  # folder of the picture and the table


def load(folder: str, name: str):
    spec = importlib.util.spec_from_file_location(name, DOCS.parent / folder / f"{name}.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


diffuser = load("algorithms", "diffuser")


class GoalPolicy(diffuser.Policy):
    """Plans whose ends (B, 2, S) are given, where the file's have a given beginning."""

    def inpaint(self, x, ends):
        x = super().inpaint(x, ends[:, 0])
        last = torch.cat([x[:, -1:, : self.action_dim], ends[:, 1:]], dim=-1)
        return torch.cat([x[:, :-1], last], dim=1)


class GoalDiffuser(diffuser.Diffuser):
    """Learns such plans, with the file's loss."""

    def losses(self, x, J, model, value):
        policy, actions = self.policy, self.policy.action_dim
        self.weights[-1, actions:] = 0  # given
        i = torch.randint(self.args.diffusion_steps, (len(x),), device=x.device)
        signal, sigma = policy.signal[i, None, None], policy.sigma[i, None, None]
        noised = policy.inpaint(signal * x + sigma * torch.randn_like(x), x[:, [0, -1], actions:])
        error = (policy.guess(noised, i, model) - x).square()  # (B, H, D)
        losses = {"model": (self.weights * error).mean()}
        return losses | {"value": F.mse_loss(value(noised, i), J)}  # there is no reward: of nothing


def strided(path: Path) -> None:
    """Writes the shipped data with every 8th state; an action is the way to the next, at most 1."""
    data, _ = diffuser.load_dataset("pointmaze-medium-navigate", "none")
    s, episode = data["observations"], data["episodes"]
    rows = np.concatenate([np.flatnonzero(episode == e)[::STRIDE] for e in np.unique(episode)])
    s, episode = s[rows], episode[rows]
    ends = np.append(episode[1:] != episode[:-1], True)
    a = np.append(s[1:] - s[:-1], s[:1] * 0, axis=0) / (STRIDE * REACH)
    columns = dict(observations=s, actions=np.where(ends[:, None], 0, a).clip(-1, 1))
    columns |= dict(next_observations=np.append(s[1:], s[-1:], axis=0), rewards=np.zeros(len(s)))
    columns["next_observations"][ends] = s[ends]
    np.savez(path, **columns, terminals=np.zeros(len(s)), timeouts=ends)


def train(args: Args, folder: Path):
    """A policy of both ends, trained in `folder` or found there."""
    diffuser.Policy, diffuser.Learner = GoalPolicy, GoalDiffuser
    if not (folder / "checkpoint.pt").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        strided(folder.parent / "maze.npz")
        flags = dict(dataset=str(folder.parent / "maze.npz"), env_id="none", run_dir=str(folder))
        flags |= dict(horizon=args.horizon, steps=args.steps, multipliers=(1, 2, 4), device="cpu")
        flags |= dict(
            batch_size=32, learning_rate=1e-3, ema_rate=0.005, guidance=0.0, plans=1, eval_every=0
        )
        diffuser.train(diffuser.Args(**flags, seed=args.seed, matmul_precision="medium"))
    return diffuser.load_policy(folder)


@torch.no_grad()
def plan(policy, s, goals):
    """Places (N, H, S) from states (N, S) to goals (N, S), in the maze's units."""
    ends = torch.stack([policy.scaling.state(s), policy.scaling.state(goals)], dim=1)
    x = policy.plan(ends)[:, :, policy.action_dim :]
    return (x * policy.scaling.std + policy.scaling.mean).numpy()


def straight(policy, s, goals):
    """The same as a straight line, for comparison."""
    return s[:, None] + np.linspace(0, 1, policy.shape[0])[:, None] * (goals - s)[:, None]


def follow(policy, envs, planner, seed) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Whether each of some episodes came to its goal, their walks, and the first plans. A plan that
    is used up is followed by another from there."""
    states, goals = [], []
    for i, (env, task) in enumerate(envs):
        np.random.seed(seed + i)  # noqa: NPY002 (OGBench draws from it)
        env.action_space.seed(seed + i)
        s, info = env.reset(seed=seed + i, options={"task_id": task})
        states.append(s), goals.append(info["goal"])
    s, goals = np.stack(states), np.stack(goals)
    came, running, walks, t = np.zeros(len(s), bool), np.ones(len(s), bool), [s.copy()], 0
    first = None
    while running.any():
        if t % (STRIDE * (policy.shape[0] - 1)) == 0:
            places, k = planner(policy, s, goals), 0
            first = places if first is None else first
        k, t = k + 1, t + 1
        target = places[:, -(-k // STRIDE)]
        for i in np.flatnonzero(running):
            a = np.clip((target[i] - s[i]) / REACH, -1, 1).astype(np.float32)
            s[i], _, terminated, truncated, info = envs[i][0].step(a)
            came[i], running[i] = info["success"] > 0, not (terminated or truncated)
        walks.append(s.copy())
    return came, list(np.stack(walks, axis=1)), first


def main(args: Args) -> None:
    torch.set_num_threads(1)
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        policy = train(args, Path(args.run or folder) / "run")
    env_task = dict(env="ogbench:pointmaze-medium-v0", sizes=[2, 2])
    tasks = [task for task in (1, 2, 3, 4, 5) for _ in range(args.episodes)]
    envs = [(diffuser.make_env(env_task), task) for task in tasks]
    maze = envs[0][0].unwrapped.maze_map

    def in_walls(places):
        row, column = np.floor((places[..., ::-1] + 1.5 * CELL) / CELL).astype(int).T
        return 100 * maze[row.clip(0, 7), column.clip(0, 7)].mean()

    rows, picture = [], {}
    for name, planner in (("both ends given", plan), ("straight line", straight)):
        torch.manual_seed(args.seed)
        began = time.process_time()
        planner(policy, *np.float32(np.zeros((2, len(envs), 2))))
        seconds = time.process_time() - began
        came, walks, places = follow(policy, envs, planner, 1000 * args.seed)
        by_task = came.reshape(5, -1).mean(1)
        rows.append([name, came.mean(), *by_task, in_walls(places), 1000 * seconds])
        picture[name] = walks, places, came
        print(name, *(f"{x:.3g}" for x in rows[-1][1:]))
    with open(output / "goals.csv", "w", newline="") as file:
        head = ["plans", "success", *(f"task{i}" for i in range(1, 6)), "in_walls", "milliseconds"]
        body = [[name, *(f"{x:.4g}" for x in numbers)] for name, *numbers in rows]
        csv.writer(file, lineterminator="\n").writerows([head, *body])

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.6), layout="constrained")
    walks, places, came = picture["both ends given"]
    for axis in (left, right):
        for i, j in zip(*np.nonzero(maze)):
            corner = (CELL * (j - 1.5), CELL * (i - 1.5))
            axis.add_patch(plt.Rectangle(corner, CELL, CELL, color="0.35", lw=0))
        axis.set(xlim=(-6, 26), ylim=(-6, 26), aspect="equal", xticks=[], yticks=[])
    for k, task in enumerate(tasks):
        if k % args.episodes < 3:
            color, label = f"C{task - 1}", f"task {task}" if k % args.episodes == 0 else None
            left.plot(*places[k].T, ".-", color=color, lw=0.8, ms=3)
            right.plot(*walks[k].T, color=color, lw=1, label=label)
            for axis in (left, right):
                axis.plot(*places[k][0], "o", color=color, ms=5)
                axis.plot(*places[k][-1], "*", color=color, ms=11, mec="k", mew=0.5)
    left.set_title("plans, both ends given: three of each task", fontsize=9)
    right.set_title(f"walks that follow them; {came.sum()} of {len(came)} arrive", fontsize=9)
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    figure.savefig(output / "goals.png", dpi=100)
    print(output / "goals.png")


if __name__ == "__main__":
    main(tyro.cli(Args))
