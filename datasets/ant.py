"""The Ant that walks: the frame in which its policy sees and acts, and how that policy of OGBench's
Ant drives Gymnasium's. Needs no OGBench.
"""

import copy
import math

import gymnasium as gym
import numpy as np
import torch

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


# ------------------------------------------------------------------------------ Gymnasium's Ant


def specification() -> str:
    """Ant-v5 without its 78 contact forces, as JSON: 27 numbers to see, as D4RL's without zeros."""
    spec = copy.deepcopy(gym.spec("Ant-v5"))
    spec.kwargs["include_cfrc_ext_in_observation"] = False
    return spec.to_json()


class Walker:
    """Drives Ants of Ant-v5 towards +x by the policy of AntDirections-v0, whose Ant is the same but
    for its motors and its clock: 30 to Gymnasium's 150 in force, 10 steps a second to 20. So an
    action counts a fifth and holds for two steps; every step's noise comes on top of it."""

    NOISE = 0.1  # standard deviation; the actions themselves lie within 0.2

    def __init__(self, policy):
        self.policy, self.clocks, self.turns, self.held = policy, {}, {}, {}

    def begin(self, i: int) -> None:
        """Ant i begins an episode."""
        self.clocks[i], self.turns[i] = 0, None

    def act(self, observations: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Torques (N, 8) in [-1, 1] for the states (N, 27) of all Ants, in their order."""
        seen, due = [], [i for i in range(len(observations)) if self.clocks[i] % 2 == 0]
        for i in due:
            ob = observations[i].numpy().astype(float)
            qpos, qvel = np.append([0, 0], ob[:13]), ob[13:]  # where it is does not matter
            self.turns[i] = quarter_turns(qpos, 0.0, self.turns[i])
            qpos, qvel = canonical_state(qpos, qvel, 0.0, self.turns[i])
            seen.append(np.concatenate([qpos[2:], qvel]))
        if due:
            actions = self.policy.act(np.array(seen), deterministic)
            for i, action in zip(due, actions):
                self.held[i] = canonical_action(action, -self.turns[i]) / 5
        for i in self.clocks:
            self.clocks[i] += 1
        u = torch.tensor(np.array([self.held[i] for i in range(len(observations))])).float()
        if not deterministic:
            u = u + self.NOISE * torch.randn_like(u)
        return u.clamp(-1, 1)
