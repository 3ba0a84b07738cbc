"""The pictures of docs/algorithms/gciql.md and hiql.md: what a value learnt from data without
rewards knows of a maze, the subgoals that HIQL asks for, and where the policies walk. Needs
matplotlib and requirements-goals.txt; seconds.

    python algorithms/gciql.py --dataset pointmaze-medium-navigate --algo gcivl --n-step 10 \
        --awr-alpha 0.5 --hidden-dim 128 --hidden-layers 2 --batch-size 256 --steps 4000 \
        --learning-rate 1e-3 --tau 0.02
    python docs/figures/gciql.py --run runs/gciql/pointmaze-medium-navigate/seed0
    python algorithms/hiql.py --dataset pointmaze-medium-navigate --subgoal-steps 50 \
        --n-step 10 --low-alpha 1 --high-alpha 1 --hidden-dim 128 --hidden-layers 2 \
        --batch-size 256 --learning-rate 1e-3 --tau 0.02 --steps 4000
    python docs/figures/gciql.py --run runs/hiql/pointmaze-medium-navigate/seed0 --algorithm hiql
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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
    algorithm: Literal["gciql", "hiql"] = "gciql"  # whose run it is
    task: int = 1  # whose goal the value is drawn for
    episodes: int = 3  # walks for each task
    output: str = ""  # the picture; empty: docs/assets/<algorithm>.png


def load_algorithm(name):
    path = DOCS.parent / "algorithms" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def load_values(module, policy):
    """V of a run, as its checkpoint has it."""
    args, saved = module.Args(**policy.saved["args"]), policy.saved["learner"]
    if module.__name__ == "hiql":
        v = module.Values(2, args)
    else:
        v = module.Values(4, 2 if args.algo == "gcivl" else 1, args)
    v.load_state_dict({key[2:]: value for key, value in saved.items() if key.startswith("v.")})
    return v


@torch.no_grad()
def value_of(v, policy, places, goal):
    """V of places (N, 2) for one goal, the mean where there are two."""
    s, g = policy.scaling.state(places), policy.scaling.state(goal).expand(len(places), -1)
    return v(s, g).mean(0)[:, 0].numpy()


@torch.no_grad()
def subgoals_of(v, policy, places, goal, states):
    """The state of some (N, 2) that looks most like what HIQL asks for, at each place."""
    found = []
    for place in places:
        s, g = policy.scaling.state(place), policy.scaling.state(goal)
        likeness = v.phi(s.expand(len(states), -1), policy.scaling.state(states))
        found.append(states[(likeness @ policy.high(s, g)[0]).argmax()])
    return np.array(found)


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
    module = load_algorithm(args.algorithm)
    policy = module.load_policy(args.run)
    env = module.make_env(policy.saved["task"])
    maze = env.unwrapped.maze_map
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4.4), layout="constrained")

    # The value of every free place, for the goal of one task.
    goal = np.float32(env.unwrapped.task_infos[args.task - 1]["goal_xy"])
    x = np.linspace(-0.5 * CELL, CELL * (maze.shape[1] - 2.5), 180)
    y = np.linspace(-0.5 * CELL, CELL * (maze.shape[0] - 2.5), 180)
    places = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    values = load_values(module, policy)
    v = value_of(values, policy, places, goal).reshape(len(y), len(x))
    picture = left.pcolormesh(x, y, v, cmap="viridis", shading="nearest", rasterized=True)
    walls(left, maze)
    left.plot(*goal, "*", color="C3", ms=14, mec="w")
    left.set_title(f"V(s, g), g the star: minus discounted steps to task {args.task}'s goal")
    if args.algorithm == "hiql":  # from the middle of every free cell to where it wants to be
        begin = CELL * (np.argwhere(maze == 0)[:, ::-1] - 1.0).astype(np.float32)
        data = module.load_dataset(policy.saved["args"]["dataset"], "none")[0]["observations"]
        states = data[np.random.default_rng(0).choice(len(data), 3000, replace=False)]
        end = subgoals_of(values, policy, begin, goal, states)
        arrows = dict(angles="xy", scale_units="xy", scale=1, color="w", width=0.006)
        left.quiver(*begin.T, *(end - begin).T, **arrows)
        steps = policy.saved["args"]["subgoal_steps"]
        left.set_title(f"V(s, g), g the star of task {args.task}, and subgoals {steps} steps on")
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
    output = Path(args.output or DOCS / "assets" / f"{args.algorithm}.png")
    output.parent.mkdir(exist_ok=True)
    figure.savefig(output, dpi=100)
    print(output, f"{output.stat().st_size / 1000:.0f} KB; {said}")


if __name__ == "__main__":
    main(tyro.cli(Args))
