"""The picture of docs/algorithms/gciql.md: what a value learnt from data without rewards knows of a
maze, and where its policy walks. Needs matplotlib and requirements-goals.txt; seconds.

    python algorithms/gciql.py --dataset pointmaze-medium-navigate --algo gcivl --n-step 10 \
        --awr-alpha 0.5 --hidden-dim 128 --hidden-layers 2 --batch-size 256 --steps 4000 \
        --learning-rate 1e-3 --tau 0.02
    python docs/figures/gciql.py --run runs/gciql/pointmaze-medium-navigate/seed0
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro

DOCS = Path(__file__).resolve().parents[1]
CELL = 4.0  # width of a cell; cell (1, 1) is around the origin


@dataclass
class Args:
    """Draws the value and the walks of a trained run in one of OGBench's pointmazes."""

    run: str  # folder of the run
    task: int = 1  # whose goal the value is drawn for
    episodes: int = 3  # walks for each task
    output: str = str(DOCS / "assets" / "gciql.png")  # the picture


def load_algorithm():
    path = DOCS.parent / "algorithms" / "gciql.py"
    spec = importlib.util.spec_from_file_location("gciql", path)
    sys.modules["gciql"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["gciql"])
    return sys.modules["gciql"]


@torch.no_grad()
def value_of(module, policy, places, goal):
    """V of places (N, 2) for one goal, the mean where there are two."""
    args, saved = module.Args(**policy.saved["args"]), policy.saved["learner"]
    v = module.Values(4, 2 if args.algo == "gcivl" else 1, args)
    v.load_state_dict({key[2:]: value for key, value in saved.items() if key.startswith("v.")})
    s, g = policy.scaling.state(places), policy.scaling.state(goal).expand(len(places), -1)
    return v(s, g).mean(0)[:, 0].numpy()


def walls(axis, maze):
    for i, j in zip(*np.nonzero(maze)):
        corner = (CELL * (j - 1.5), CELL * (i - 1.5))
        axis.add_patch(plt.Rectangle(corner, CELL, CELL, color="0.35", lw=0))
    height, width = maze.shape
    axis.set(xlim=(-1.5 * CELL, CELL * (width - 1.5)), ylim=(-1.5 * CELL, CELL * (height - 1.5)))
    axis.set(aspect="equal", xticks=[], yticks=[])


def walk(env, policy, task, seed):
    """Positions (T, 2) of an episode, its goal, and whether it came there."""
    np.random.seed(seed)  # noqa: NPY002 (OGBench draws from it)
    env.action_space.seed(seed)
    s, info = env.reset(seed=seed, options={"task_id": task})
    goal, path, done = info["goal"], [s], False
    while not done:
        s, _, terminated, truncated, info = env.step(policy.act(s, goal))
        path.append(s)
        done = terminated or truncated
    return np.array(path), goal, info["success"] > 0


def main(args: Args) -> None:
    module = load_algorithm()
    policy = module.load_policy(args.run)
    env = module.make_env(policy.saved["task"])
    maze = env.unwrapped.maze_map
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.4), layout="constrained")

    # The value of every free place, for the goal of one task.
    goal = np.float32(env.unwrapped.task_infos[args.task - 1]["goal_xy"])
    x = np.linspace(-0.5 * CELL, CELL * (maze.shape[1] - 2.5), 180)
    y = np.linspace(-0.5 * CELL, CELL * (maze.shape[0] - 2.5), 180)
    places = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    v = value_of(module, policy, places, goal).reshape(len(y), len(x))
    picture = left.pcolormesh(x, y, v, cmap="viridis", shading="nearest", rasterized=True)
    walls(left, maze)
    left.plot(*goal, "*", color="C3", ms=14, mec="w")
    left.set_title(f"V(s, g), g the star: minus discounted steps to task {args.task}'s goal")
    left.title.set_fontsize(9)
    figure.colorbar(picture, ax=left, shrink=0.85)

    # Where the policy walks.
    walls(right, maze)
    came = []
    for task in range(1, 1 + len(env.unwrapped.task_infos)):
        for seed in range(args.episodes):
            path, goal, success = walk(env, policy, task, seed)
            came.append(success)
            label = f"task {task}" if not seed else None
            right.plot(*path.T, color=f"C{task - 1}", lw=1, alpha=0.8, label=label)
            right.plot(*path[0], "o", color=f"C{task - 1}", ms=4)
            right.plot(*goal, "*", color=f"C{task - 1}", ms=11, mec="k", mew=0.5)
    said = f"walks from the dots to the stars, {sum(came)} of {len(came)} came there"
    right.set_title(said, fontsize=9)
    right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    Path(args.output).parent.mkdir(exist_ok=True)
    figure.savefig(args.output, dpi=100)
    print(args.output, f"{Path(args.output).stat().st_size / 1000:.0f} KB; {said}")


if __name__ == "__main__":
    main(tyro.cli(Args))
