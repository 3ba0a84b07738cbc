"""Environments of this project around OGBench's, by id: `environments:<id>`, run from the
folder above.

    AntDirections-v0                an Ant is to walk where it is told: trains the walker of make.py
    pointmaze-umaze-v0, antmaze-umaze-v0      OGBench's maze class with the smallest maze
    success/<id>                    OGBench's single task <id>, e.g. pointmaze-medium-singletask-v0,
                                    with the reward 1 at its goal and 0 before: the return of an
                                    episode is its success
"""

import contextlib
import math

import gymnasium as gym
import numpy as np

try:
    import ogbench  # noqa: F401  registers its environments
    from ogbench.locomaze.maze import make_maze_env
    from ogbench.online_locomotion.ant import AntEnv
except ImportError as error:
    raise ModuleNotFoundError(f"pip install -r requirements-goals.txt first: {error}") from None

from ant import canonical_action, canonical_state, quarter_turns


@contextlib.contextmanager
def drawing(seed: int):
    """OGBench draws from NumPy's global generator, which is afterwards as it was before."""
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(before)  # noqa: NPY002


# -------------------------------------------------------------- The Ant that walks where it is told


class AntDirections(AntEnv):
    """OGBench's Ant (10 steps a second), paid for the way in a direction that changes every 100
    steps. It observes and acts in the canonical frame, where the direction is always +x: what it
    learns for one direction and one side of its body holds for all, which saves most of the
    400,000 steps of OGBench's own expert. The frame is this project's addition."""

    def __init__(self, **kwargs):
        self.angle, self.turns, self.clock = 0.0, None, 0
        super().__init__(**kwargs)

    def _get_obs(self) -> np.ndarray:
        qpos, qvel = self.data.qpos, self.data.qvel
        self.turns = quarter_turns(qpos, self.angle, self.turns)
        qpos, qvel = canonical_state(qpos, qvel, self.angle, self.turns)
        return np.concatenate([qpos[2:], qvel])  # (27,): where it is does not matter

    def reset_model(self) -> np.ndarray:
        self.angle, self.turns, self.clock = self.np_random.uniform(-np.pi, np.pi), None, 0
        return super().reset_model()

    def step(self, action):
        torques = canonical_action(action, -self.turns)
        before, angle = self.data.qpos[:2].copy(), self.angle
        self.clock += 1
        if self.clock % 100 == 0:
            self.angle = self.np_random.uniform(-np.pi, np.pi)
        ob, _, terminated, _, info = super().step(torques)
        way = self.data.qpos[:2] - before
        reward = 10 * (way[0] * math.cos(angle) + way[1] * math.sin(angle))
        return ob, reward, terminated, False, info


gym.register("AntDirections-v0", AntDirections, max_episode_steps=500)

# ------------------------------------------------------------------------------- The smallest maze


def make_umaze(body: str, **options) -> gym.Env:
    """A maze of OGBench's class, of the form that D4RL calls umaze, with five tasks of ours."""

    class UMaze(type(make_maze_env(body, "maze", maze_type="arena"))):
        def update_tree(self, tree):
            rows = ("11111", "10001", "11101", "10001", "11111")
            self.maze_map = np.array([[int(cell) for cell in row] for row in rows])
            super().update_tree(tree)

        def set_tasks(self):
            super().set_tasks()
            ways = [(1, 1), (3, 1)], [(3, 1), (1, 1)], [(1, 2), (3, 2)], [(3, 3), (1, 1)]
            self.task_infos = [
                {"task_name": f"task{i + 1}", "init_ij": start, "goal_ij": goal}
                | {"init_xy": self.ij_to_xy(start), "goal_xy": self.ij_to_xy(goal)}
                for i, (start, goal) in enumerate([*ways, [(1, 3), (3, 1)]])
            ]

    return UMaze(maze_type="arena", **options)


for body in ("point", "ant"):
    kwargs = {"body": body}
    gym.register(f"{body}maze-umaze-v0", make_umaze, max_episode_steps=1000, kwargs=kwargs)
    for suffix, task in {"": 0, **{f"-task{i}": i for i in range(1, 6)}}.items():
        kwargs = {"body": body, "reward_task_id": task}
        kwargs |= {"add_noise_to_goal": False, "success_timing": "pre"}  # as OGBench's
        name = f"{body}maze-umaze-singletask{suffix}-v0"
        gym.register(name, make_umaze, max_episode_steps=1000, kwargs=kwargs)

# ---------------------------------------------------------------------------- Success as the return


class Success(gym.Wrapper):
    """Reward 1 where the task is solved, which ends the episode, and 0 before."""

    def reset(self, *, seed=None, options=None):
        if seed is None:
            return super().reset(options=options)
        with drawing(seed):
            return super().reset(seed=seed, options=options)

    def step(self, action):
        ob, _, terminated, truncated, info = super().step(action)
        return ob, float(info["success"]), terminated, truncated, info


def make_success(task: str, **options) -> gym.Env:
    return Success(gym.make(task, disable_env_checker=True, **options))


for name, spec in [*gym.registry.items()]:
    if "singletask" in name and "visual" not in name and not name.startswith("success/"):
        limit, kwargs = spec.max_episode_steps, {"task": name}
        gym.register(f"success/{name}", make_success, max_episode_steps=limit, kwargs=kwargs)
