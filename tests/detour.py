"""A point in the plane and an obstacle in its way, which demonstrations pass on either side: made
for chunks of actions. The mean of the two ways runs into the obstacle.

    python tests/detour.py        # writes tests/detour.npz again

The environment is tests.detour:Detour-v0, for whoever stands above this folder.
"""

from pathlib import Path

import gymnasium as gym
import numpy as np

FILE = Path(__file__).with_suffix(".npz")
STEP, RADIUS, WAY = 0.15, 0.35, 0.6  # of a step; of the obstacle; of the circle around it


class Detour(gym.Env):
    """Observed is the place (x, y), from about (-1, 0) on. Reward 1 for x = 1, which ends an
    episode, as the obstacle around (0, 0) does."""

    observation_space = gym.spaces.Box(-2, 2, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.s = np.array([-1.0, 0.0]) + self.np_random.uniform(-0.03, 0.03, 2)
        return self.s.astype(np.float32), {}

    def step(self, a):
        self.s = np.clip(self.s + STEP * np.clip(a, -1, 1), -2, 2)
        there, hit = self.s[0] >= 1, np.linalg.norm(self.s) < RADIUS
        return self.s.astype(np.float32), float(there), bool(there or hit), False, {}


gym.register("Detour-v0", Detour, max_episode_steps=40)


def demonstrate(episodes: int = 100, seed: int = 0) -> dict[str, np.ndarray]:
    """Around the obstacle on a circle, to the left or to the right by a coin, with noise."""
    keys = "observations actions rewards next_observations terminals timeouts".split()
    rows, rng, env = {key: [] for key in keys}, np.random.default_rng(seed), Detour()
    for k in range(episodes):
        s, _ = env.reset(seed=seed + k)
        side, done = rng.choice([-1.0, 1.0]), False
        while not done:
            # First up or down to the circle, then along it, then straight on.
            angle = np.arctan2(side * s[1], s[0])
            to = WAY * np.array([np.cos(angle - 0.5), side * np.sin(angle - 0.5)])
            to = to if s[0] < 0.4 else np.array([1.5, s[1]])
            a = (to - s) / np.linalg.norm(to - s)
            a = np.float32(np.clip(0.8 * a + rng.normal(0, 0.1, 2), -1, 1))
            s_next, r, done, _, _ = env.step(a)
            for key, value in zip(keys, (s, a, r, s_next, done, False)):
                rows[key].append(value)
            s = s_next
    return {key: np.array(values) for key, values in rows.items()}


def write(path: Path = FILE) -> None:
    about = dict(env_id="tests.detour:Detour-v0", action_low=[-1.0, -1.0], action_high=[1.0, 1.0])
    np.savez_compressed(path, **demonstrate(), **about, ref_min_score=0.0, ref_max_score=1.0)


if __name__ == "__main__":
    write()
