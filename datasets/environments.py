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

SIGNS = np.array([[1, 1], [1, -1], [1, -1], [1, 1]])  # of hip and ankle: now all legs are alike


def quarter_turns(qpos: np.ndarray, angle: float, before: int | None = None) -> int:
    """Quarter turns by which to renumber the legs so that the body faces `angle`, 0 to 3. The last
    answer stays good up to 60 degrees, so that the numbering does not flicker at 45."""
    w, x, y, z = qpos[3:7]
    heading = math.atan2(2 * (w * z + x * y), 1 - 2 * (y * y + z * z)) - angle
    if before is not None and math.cos(heading + before * math.pi / 2) > 0.5:
        return before
    return round(-heading / (math.pi / 2)) % 4


def turn_quaternion(angle: float) -> tuple[float, float]:
    return math.cos(angle / 2), math.sin(angle / 2)


def canonical_state(qpos, qvel, angle: float, turns: int) -> tuple[np.ndarray, np.ndarray]:
    """The same Ant in other words: the world turned so that `angle` becomes the x axis, the body
    described from a quarter turn further, as often as `turns` says. The simulator makes no
    difference: the same happens to both."""
    qpos, qvel = np.array(qpos, float), np.array(qvel, float)
    c, s = math.cos(angle), math.sin(angle)
    world = np.array([[c, s], [-s, c]])
    qpos[:2], qvel[:2] = world @ qpos[:2], world @ qvel[:2]
    # The quaternion: z-turns on both sides of it, q' = z(-angle) q z(turns); w >= 0 makes it one.
    w, x, y, z = qpos[3:7]
    c, s = turn_quaternion(turns * math.pi / 2 - angle)
    w, z = c * w - s * z, s * w + c * z
    c, s = turn_quaternion(-angle - turns * math.pi / 2)
    x, y = c * x - s * y, s * x + c * y
    qpos[3:7] = np.array([w, x, y, z]) * (1 if w >= 0 else -1)
    # Angular velocities are the body's, and the legs move up by one with every quarter turn.
    c, s = [(1, 0), (0, 1), (-1, 0), (0, -1)][turns]
    qvel[3:5] = c * qvel[3] + s * qvel[4], -s * qvel[3] + c * qvel[4]
    for joints in (qpos[7:], qvel[6:]):
        joints[:] = (SIGNS * np.roll(SIGNS * joints.reshape(4, 2), -turns, axis=0)).ravel()
    return qpos, qvel


def canonical_action(action: np.ndarray, turns: int) -> np.ndarray:
    """Torques in the numbering of `canonical_state`; with -turns, back. Motors begin at leg 4."""
    legs = SIGNS * np.roll(np.reshape(action, (4, 2)), -1, axis=0)
    return np.roll(SIGNS * np.roll(legs, -turns, axis=0), 1, axis=0).ravel()


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
