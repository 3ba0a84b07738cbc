"""OGBench's data sets by its published recipes: make.py imports this where it is needed.

Seohong Park, Kevin Frans, Benjamin Eysenbach, Sergey Levine. 2024, arXiv:2410.20092. The recipes
are generate_locomaze.py, generate_manipspace.py and commands.sh among its data_gen_scripts; all
numbers are theirs, the seed is not. An episode of theirs has one row more than here: that holds the
last state and is no transition.

    navigate    from any cell to any junction or corner, a new goal where one is reached
    stitch      to a cell four steps away, and staying there: no episode crosses the maze
    play        a scripted arm carries out one random task after the other
"""

import math
import re

import gymnasium as gym
import numpy as np

try:
    import environments  # registers OGBench's environments and ours around them
    from ogbench.relabel_utils import relabel_dataset
except ImportError as error:
    raise SystemExit(
        f"Mazes and arms need OGBench: pip install -r requirements-goals.txt ({error})."
    ) from None

LENGTHS = {"navigate": 1000, "stitch": 200, "play": 1000}  # transitions of an episode
OURS = "environments:"  # the module that registers what OGBench has not

# The columns of make.py; of an arm's also those that tell where things are.
Data = dict[str, np.ndarray]


def recipe(name: str, n: int, seed: int, walker=None) -> tuple[Data, str, str]:
    """n transitions of e.g. pointmaze-medium-navigate, the id of its environment, how it is made.
    `walker` acts for an Ant."""
    task, _, kind = name.rpartition("-")
    env_id = f"{OURS if 'umaze' in task else 'ogbench:'}{task}-v0"
    rng = np.random.default_rng(seed)
    with environments.drawing(seed):
        if kind == "play":
            return play(task, n, rng), env_id, "OGBench's recipe, play: its scripted arm"
        body = Ant(walker) if walker else Point()
        data = cross(env_id, kind, body, n, rng)
    return data, env_id, f"OGBench's recipe, {kind}: {body.how}"


def singletask(name: str, data: Data) -> tuple[Data, str, str]:
    """The data, which is that of e.g. pointmaze-medium-navigate, with the rewards of a task: -1 for
    a step before it is solved (in `scene` for each part of it that is not), and a terminal in every
    state that solves it, as OGBench bootstraps; the id of the environment, how it is made."""
    base, task = re.fullmatch(r"(.+)-singletask(-task\d)?", name).groups(default="")
    env_name = f"{base.rpartition('-')[0]}-singletask{task}-v0"
    env = gym.make(env_name, disable_env_checker=True)
    labels = {"qpos": data.get("qpos", data["observations"])}  # a maze's states begin with qpos
    labels |= {key: data[key] for key in ("button_states",) if key in data}
    relabel_dataset(env_name, env, labels)
    terminals = labels["masks"] == 0
    data = data | {"rewards": labels["rewards"], "terminals": terminals}
    data["timeouts"] = data["timeouts"] & ~terminals
    how = f"{base} with OGBench's rewards of task {env.unwrapped.cur_task_id}"
    return data, f"{OURS}success/{env_name}", how


# --------------------------------------------------------------------------------------- Mazes


class Point:
    """Walks by itself: the action is the direction."""

    noise, how = 0.5, "steps towards the next cell, noise 0.5"

    def begin(self) -> None:
        pass

    def lost(self, ob: np.ndarray) -> bool:
        return False

    def act(self, ob: np.ndarray, direction: np.ndarray) -> np.ndarray:
        return direction


class Ant:
    """Walks by our own policy: SAC's mean action, in the frame of environments.py."""

    noise, how = 0.2, "our own walking Ant towards the next cell, noise 0.2"

    def __init__(self, walker):
        self.walker, self.turns = walker, None

    def begin(self) -> None:
        self.turns = None

    def lost(self, ob: np.ndarray) -> bool:
        """On its back, from where it does not get up: such an episode is thrown away."""
        return 2 * (ob[4] ** 2 + ob[5] ** 2) > 1  # of the quaternion: the body's z points down

    def act(self, ob: np.ndarray, direction: np.ndarray) -> np.ndarray:
        qpos, qvel, angle = ob[:15], ob[15:], math.atan2(direction[1], direction[0])
        self.turns = environments.quarter_turns(qpos, angle, self.turns)
        qpos, qvel = environments.canonical_state(qpos, qvel, angle, self.turns)
        action = self.walker.act(np.concatenate([qpos[2:], qvel]))
        return environments.canonical_action(action, -self.turns)


def cells_of(maze: np.ndarray) -> tuple[list, list]:
    """Free cells, and those of them that are no straight passage."""
    free = [(int(i), int(j)) for i, j in zip(*np.nonzero(maze == 0))]
    walls = [tuple(maze[i + di, j + dj] for di, dj in ((-1, 0), (1, 0), (0, -1), (0, 1)))
             for i, j in free]  # fmt: skip
    passages = ((0, 0, 1, 1), (1, 1, 0, 0))
    return free, [cell for cell, around in zip(free, walls) if around not in passages]


def distances(maze: np.ndarray, start: tuple[int, int]) -> dict[tuple[int, int], int]:
    """Steps from a cell to every cell that can be reached from it."""
    found, queue = {start: 0}, [start]
    for i, j in queue:  # it grows
        for cell in ((i - 1, j), (i, j - 1), (i + 1, j), (i, j + 1)):
            if maze[cell] == 0 and cell not in found:
                found[cell] = found[i, j] + 1
                queue.append(cell)
    return found


def cross(env_id: str, kind: str, body, n: int, rng: np.random.Generator) -> Data:
    """A body on its way through a maze."""
    length = LENGTHS[kind]
    env = gym.make(env_id, terminate_at_goal=False, max_episode_steps=length)
    env.reset(seed=int(rng.integers(2**31)))
    maze, world, subgoals = env.unwrapped.maze_map, env.unwrapped, {}
    free, corners = cells_of(maze)
    log = Log()
    while log.total < n:
        start, goal = pick(rng, free), pick(rng, corners)
        if kind == "stitch":
            near = [cell for cell, steps in distances(maze, start).items() if steps == 4]
            goal = pick(rng, near or [start])
        ob, _ = env.reset(options={"task_info": {"init_ij": start, "goal_ij": goal}})
        body.begin()
        for _ in range(length):
            action = step_towards(world, body, ob, subgoals, rng)
            ob_next, _, _, _, info = env.step(action)
            if info["success"] and kind == "navigate":
                world.set_goal(pick(rng, corners))
            log.add(observations=ob, actions=action, next_observations=ob_next)
            ob = ob_next
            if body.lost(ob):
                log.drop()
                break
        else:
            log.end()
    env.close()
    return log.data(n)


def step_towards(world, body, ob: np.ndarray, subgoals: dict, rng) -> np.ndarray:
    """The body's action towards the next cell on the way to the goal, with noise."""
    xy, goal_xy = world.get_xy(), world.cur_goal_xy
    key = (world.xy_to_ij(xy), world.xy_to_ij(goal_xy))
    if key not in subgoals:  # of the same maze it depends on the cells alone
        subgoals[key] = world.get_oracle_subgoal(xy, goal_xy)[0]
    direction = subgoals[key] - xy
    action = body.act(ob, direction / (np.linalg.norm(direction) + 1e-6))
    return np.clip(action + rng.normal(0, body.noise, action.shape), -1, 1)


def pick(rng: np.random.Generator, cells: list) -> tuple[int, int]:
    return cells[rng.integers(len(cells))]


# ---------------------------------------------------------------------------------------- Arms


def play(task: str, n: int, rng: np.random.Generator) -> Data:
    """A scripted arm that is given one random task after the other, whatever the last came to."""
    from ogbench.manipspace.oracles.plan import button_plan, cube_plan, drawer_plan, window_plan

    length = LENGTHS["play"]
    options = {"terminate_at_goal": False, "mode": "data_collection", "max_episode_steps": length}
    env = gym.make(f"{task}-v0", disable_env_checker=True, **options)
    oracles = {
        "cube": cube_plan.CubePlanOracle,
        "button": button_plan.ButtonPlanOracle,
        "drawer": drawer_plan.DrawerPlanOracle,
        "window": window_plan.WindowPlanOracle,
    }
    oracles = {key: of(env=env, noise=0.1, noise_smoothing=0.5) for key, of in oracles.items()}
    log, (ob, info) = Log(), env.reset(seed=int(rng.integers(2**31)))
    while log.total < n:
        oracle = oracles[info["privileged/target_task"]]
        oracle.reset(ob, info)
        for _ in range(length):
            action = np.clip(oracle.select_action(ob, info), -1, 1)
            ob_next, _, _, _, info = env.step(action)
            if oracle.done:
                p_stack = 0.0 if "single" in task else 0.5
                new_ob, new_info = env.unwrapped.set_new_target(p_stack=p_stack)
                oracle = oracles[new_info["privileged/target_task"]]
                oracle.reset(new_ob, new_info)
            row = {"observations": ob, "actions": action, "next_observations": ob_next}
            row |= {"qpos": info["prev_qpos"], "qvel": info["prev_qvel"]}
            if "prev_button_states" in info:
                row["button_states"] = info["prev_button_states"]
            log.add(**row)
            ob = ob_next
        if task.startswith("scene") and lost_cube(np.array([*log.rows["qpos"], info["qpos"]])):
            log.drop()
        else:
            log.end()
        ob, info = env.reset()
    env.close()
    return log.data(n)


def lost_cube(qpos: np.ndarray) -> bool:
    """Whether a cube was where the camera does not see it, outside the drawer: OGBench throws such
    an episode away."""
    y, z = qpos[:, 15], qpos[:, 16]
    return bool(((y >= 0.29) | ((y <= -0.3) & ((z < 0.06) | (z > 0.08)))).any())


# ---------------------------------------------------------------------------------------- Rows


class Log:
    """Rows of transitions: no rewards, no terminals, an episode ends as a recording does."""

    def __init__(self):
        self.episodes, self.rows, self.total, self.dropped = [], {}, 0, 0

    def add(self, **row) -> None:
        for key, value in row.items():
            self.rows.setdefault(key, []).append(np.float32(value))

    def end(self) -> None:
        self.episodes.append({key: np.array(rows) for key, rows in self.rows.items()})
        self.total += len(self.episodes[-1]["actions"])
        self.rows = {}

    def drop(self) -> None:
        self.rows, self.dropped = {}, self.dropped + 1

    def data(self, n: int) -> Data:
        """The first n rows; an episode that is cut ends there."""
        if self.dropped:
            print(f"{self.dropped} episodes were thrown away, {len(self.episodes)} kept")
        ends = np.cumsum([len(episode["actions"]) for episode in self.episodes])
        timeouts, zeros = np.zeros(n, bool), np.zeros(n, np.float32)
        timeouts[[end - 1 for end in ends if end < n] + [n - 1]] = True
        keys = self.episodes[0]
        data = {key: np.concatenate([e[key] for e in self.episodes])[:n] for key in keys}
        return data | {"rewards": zeros, "terminals": zeros > 0, "timeouts": timeouts}
