"""A point in the plane, and demonstrations of two kinds that are half good: made for stitching.

The point goes from the left to a goal on the upper right, past a wall that divides the left half.
Those who begin below the wall, where the task begins, cross its end and go on to the lower right.
Those who begin above cross there too and reach the goal. No episode does the task; its way is the
first half of one kind and the second half of the other. The wall is thin: from below it the states
above are near, and better, and cannot be reached.

    python tests/crossing.py        # writes tests/crossing.npz again

The environment is tests.crossing:Crossing-v0, for whoever stands above this folder.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np

FILE = Path(__file__).with_suffix(".npz")
GOAL, RADIUS, STEP = np.array([0.9, 0.6]), 0.2, 0.1
BELOW, ABOVE = np.array([-0.9, -0.08]), np.array([-0.9, 0.08])  # where the kinds begin
WALL_ENDS = -0.15  # the wall is y = 0 from the left edge to this x


def move(s: np.ndarray, a: np.ndarray) -> np.ndarray:
    """Where an action leads: whoever runs into the wall stays where he was."""
    s_next = np.clip(s + STEP * np.clip(a, -1, 1), -1, 1)
    crossed = s[1] * s_next[1] <= 0 and min(s[0], s_next[0]) < WALL_ENDS
    return s if crossed else s_next


class Crossing(gym.Env):
    """Observed is the place (x, y); the reward is minus the distance to the goal, which ends it."""

    observation_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = (options or {}).get("begin", BELOW) + self.np_random.uniform(-0.03, 0.03, 2)
        return self.s.astype(np.float32), {}

    def step(self, a):
        self.s = move(self.s, np.asarray(a, np.float64))
        away = float(np.linalg.norm(self.s - GOAL))
        return self.s.astype(np.float32), -away, away < RADIUS, False, {}


gym.register("Crossing-v0", Crossing, max_episode_steps=60)


def demonstrate(bad: int = 18, good: int = 6, seed: int = 0) -> dict[str, np.ndarray]:
    """So many episodes of each kind, by a controller that heads for waypoints, with noise."""
    keys = "observations actions rewards next_observations terminals timeouts".split()
    rows, rng, env = {key: [] for key in keys}, np.random.default_rng(seed), Crossing()
    for k in range(bad + good):
        side = int(k >= bad)  # 0 begins below and ends on the lower right, 1 begins above
        s, _ = env.reset(seed=seed + k, options={"begin": (BELOW, ABOVE)[side]})
        end = GOAL * (1, 1 if side else -1)
        ways = [(-0.05, 0.08 if side else -0.08), (0.15, 0.0), end]
        for step in range(1, 51):  # at the wrong end the first kind stays until its time is up
            if len(ways) > 1 and s[0] > ways[0][0]:
                ways.pop(0)
            a = (ways[0] - s) / max(np.linalg.norm(ways[0] - s), STEP)
            a = np.float32(np.clip(0.6 * a + rng.normal(0, 0.2, 2), -1, 1))
            s_next, r, terminal, _, _ = env.step(a)
            timeout = step == 50 and not terminal
            for key, value in zip(keys, (s, a, r, s_next, terminal, timeout)):
                rows[key].append(value)
            s = s_next
            if terminal or timeout:
                break
    return {key: np.array(values) for key, values in rows.items()}


def write(path: Path = FILE) -> None:
    about = dict(env_id="tests.crossing:Crossing-v0", action_low=[-1.0, -1.0])
    np.savez_compressed(path, **demonstrate(), **about, action_high=[1.0, 1.0])


if __name__ == "__main__":
    write()
