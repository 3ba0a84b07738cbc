"""HalfCheetah seen through a camera: pictures of a state data set, and the environment for policies
that act on them. Nothing of this is needed to train; `algorithms/s2p.py` imports it to evaluate,
`datasets/make.py halfcheetah-pixels` to render.

MuJoCo draws without a screen by OSMesa or EGL: Debian's `libosmesa6`, or `libegl1`. The one that is
there is chosen, unless MUJOCO_GL says otherwise. Shadows, reflections and multisampling are off:
they cost nearly all of the time.

    env = gym.make("pixels:HalfCheetahPixels-v0")  # from the project's folder
    frames = observation.reshape(2, 64, 64, 3)     # uint8; the previous picture, then this one
"""

import ctypes.util
import os

if "MUJOCO_GL" not in os.environ and "DISPLAY" not in os.environ:
    there = [name for name in ("OSMesa", "EGL") if ctypes.util.find_library(name)]
    if there:
        os.environ["MUJOCO_GL"] = there[0].lower()  # before mujoco is first imported

import gymnasium as gym
import mujoco
import numpy as np

ID = "HalfCheetahPixels-v0"
SIZE, FRAMES = 64, 2  # side of a picture; pictures in an observation
FOV = 34  # degrees; the model's own camera has 45 and shows mostly sky
TILE = 80 / 60  # metres after which the floor's pattern repeats


class Camera:
    """Draws a state of the model: the camera goes with the body, the floor tells how far it ran."""

    def __init__(self, model: mujoco.MjModel):
        model.vis.quality.offsamples = 0  # before the renderer is made
        model.vis.quality.numslices = model.vis.quality.numstacks = 8
        model.cam_fovy[0] = FOV
        self.model, self.renderer = model, mujoco.Renderer(model, SIZE, SIZE)
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self.renderer.scene.flags[flag] = 0

    def shoot(self, data: mujoco.MjData) -> np.ndarray:
        """The picture (64, 64, 3), uint8, of the positions in `data`; its dynamics stay as they
        were (mj_forward would change where the solver begins)."""
        x, data.qpos[0] = data.qpos[0], data.qpos[0] % TILE  # the floor ends after 40 m
        for place in (mujoco.mj_kinematics, mujoco.mj_comPos, mujoco.mj_camlight):
            place(self.model, data)
        data.qpos[0] = x
        self.renderer.update_scene(data, camera=0)
        return self.renderer.render()


class HalfCheetahPixels(gym.Wrapper):
    """HalfCheetah-v5; its observation is the last two pictures, flat: (2 * 64 * 64 * 3,), uint8."""

    def __init__(self, render_mode: str | None = None):
        super().__init__(gym.make("HalfCheetah-v5").unwrapped)
        self.observation_space = gym.spaces.Box(0, 255, (FRAMES * SIZE * SIZE * 3,), np.uint8)
        self.camera, self.mode = Camera(self.env.model), render_mode

    @property
    def render_mode(self) -> str | None:
        return self.mode

    def reset(self, **options) -> tuple[np.ndarray, dict]:
        _, info = self.env.reset(**options)
        self.frames = FRAMES * [self.camera.shoot(self.env.data)]  # nothing came before
        return np.concatenate(self.frames, axis=None), info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        _, *rest = self.env.step(action)
        self.frames = [*self.frames[1:], self.camera.shoot(self.env.data)]
        return np.concatenate(self.frames, axis=None), *rest

    def render(self) -> np.ndarray:
        """What the policy sees, four times as large."""
        return self.frames[-1].repeat(4, axis=0).repeat(4, axis=1)

    def close(self) -> None:
        self.camera.renderer.close()
        super().close()


def render(data: dict[str, np.ndarray], seed: int = 0) -> np.ndarray:
    """Pictures (N, 64, 64, 3) of the states of a HalfCheetah data set, episode after episode.

    A state has everything but the distance run. That is what the reward counts, so the rewards give
    it back: x' = x + dt (r + 0.1 |a|²), from a first x as the environment draws it."""
    env = gym.make("HalfCheetah-v5").unwrapped
    camera, rng = Camera(env.model), np.random.default_rng(seed)
    cost = env._ctrl_cost_weight * np.square(data["actions"]).sum(1)
    run = env.dt * (data["rewards"] + cost) / env._forward_reward_weight
    ends = data["terminals"].astype(bool) | data["timeouts"].astype(bool)
    images, x = np.empty((len(run), SIZE, SIZE, 3), np.uint8), rng.uniform(-0.1, 0.1)
    for i, s in enumerate(data["observations"]):
        env.data.qpos[:], env.data.qvel[:] = [x, *s[:8]], s[8:]
        images[i] = camera.shoot(env.data)
        x = rng.uniform(-0.1, 0.1) if ends[i] else x + run[i]
    camera.renderer.close()
    return images


if ID not in gym.registry:  # the module may be known by two names
    gym.register(ID, HalfCheetahPixels, max_episode_steps=1000)
