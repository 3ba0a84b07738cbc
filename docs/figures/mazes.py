"""The mazes of the data card with some of their data: walls, ways, goals of the five tasks; and how
often the walking Ant reaches these goals. Needs matplotlib and OGBench.

    python datasets/make.py pointmaze-medium-navigate pointmaze-medium-stitch    # and the others
    python docs/figures/mazes.py

Writes docs/assets/mazes.png and mazes.csv.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import matplotlib.pyplot as plt
import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "datasets"))
TASKS = ("pointmaze-medium", "pointmaze-large", "antmaze-umaze", "antmaze-medium")
EPISODES = {"navigate": 2, "stitch": 20}
COLOURS = plt.get_cmap("tab10").colors


@dataclass
class Args:
    """Draws the data, and lets the Ant walk to the goals of the five tasks by waypoints."""

    episodes: int = 10  # of each task; 0: only draw


def draw(axis, task: str, kind: str) -> None:
    with h5py.File(ROOT / "datasets" / f"{task}-{kind}.hdf5") as file:
        xy, env_id = file["observations"][:, :2], str(file.attrs["env_id"])
        ends = np.flatnonzero(file["timeouts"][()]) + 1
    env = gym.make(env_id, disable_env_checker=True).unwrapped
    for i, j in np.argwhere(env.maze_map == 1):
        x, y = env.ij_to_xy((i, j))
        axis.add_patch(plt.Rectangle((x - 2, y - 2), 4, 4, color="0.8", lw=0))
    # A goal's place belongs to all tasks that end there.
    goals = {}
    for number, info in enumerate(env.task_infos, 1):
        goals.setdefault(tuple(info["goal_xy"]), []).append(str(number))
    starts = np.append(0, ends[:-1])[: EPISODES[kind]]
    for k, (a, b) in enumerate(zip(starts, ends)):
        axis.plot(*xy[a:b].T, color=COLOURS[k % 10], lw=0.6, alpha=0.8)
        axis.plot(*xy[a], "o", color=COLOURS[k % 10], ms=2.5)
    box = dict(boxstyle="round,pad=0.15", fc="white", ec="k", lw=0.6, alpha=0.9)
    for place, numbers in goals.items():
        style = dict(fontsize=6, ha="center", va="center", bbox=box)
        axis.text(*place, ",".join(numbers), **style)
    rows, columns = env.maze_map.shape
    axis.set(xlim=(-6, 4 * columns - 6), ylim=(4 * rows - 6, -6), xticks=[], yticks=[])
    axis.set_aspect("equal")
    axis.set_title(f"{task}-{kind}", fontsize=8)


def walk(task: str, episodes: int) -> list[list]:
    """Rows of the CSV: maze, task, episodes, those that reached the goal within 1000 steps, those
    that ended on the back."""
    import environments
    import goals
    import make

    policies = make.load_policies(make.WALKER)
    body, rng = (
        goals.Ant(make.policy_at(policies, policies["steps"]["walk"])),
        np.random.default_rng(0),
    )
    rows, subgoals = [], {}
    with environments.drawing(0):
        env = gym.make(f"{task}-v0", disable_env_checker=True)
        for number in range(1, 6):
            reached, fell = 0, 0
            for _ in range(episodes):
                options, done = {"task_id": number}, False
                ob, _ = env.reset(seed=int(rng.integers(2**31)), options=options)
                body.begin()
                while not done:
                    action = goals.step_towards(env.unwrapped, body, ob, subgoals, rng)
                    ob, _, terminated, truncated, _ = env.step(action)
                    done = terminated or truncated
                reached, fell = reached + terminated, fell + body.lost(ob)
            rows.append([task, number, episodes, reached, fell])
            print(*rows[-1], flush=True)
    return rows


def main(args: Args) -> None:
    size = dict(figsize=(9, 4.6), layout="constrained", width_ratios=(1, 1.4, 1, 1))
    figure, axes = plt.subplots(2, 4, **size)
    for column, task in zip(axes.T, TASKS):
        for axis, kind in zip(column, EPISODES):
            draw(axis, task, kind)
    path = ROOT / "docs" / "assets" / "mazes.png"
    figure.savefig(path, dpi=110)
    print(f"{path.name} has {path.stat().st_size / 1000:.0f} KB")

    if args.episodes:
        rows = [["maze", "task", "episodes", "reached", "on its back"]]
        for task in ("antmaze-umaze", "antmaze-medium", "antmaze-large"):
            rows += walk(task, args.episodes)
        with open(Path(__file__).with_suffix(".csv"), "w", newline="") as file:
            csv.writer(file).writerows(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
