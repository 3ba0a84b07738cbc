"""Another robot arm, many things to do: Meta-World's tasks, seen by a camera, asked for in words.

A Sawyer's hand hangs over a table with a thing or two on it, whose places differ from episode to
episode: a puck, a door, a drawer, a button, a peg, a window. Reward 1 for what was asked ends an
episode, as soon as Meta-World's info["success"] says so for a single step.

    env = gym.make("metaworld_arm:MT10-v0")          # from the project's folder
    observation, info = env.reset(seed=0)
    observation["image"]                             # (64, 64, 3), uint8
    observation["state"]                             # (4,): the hand's place (m), its opening, 0-1
    observation["instruction"]                       # "open the drawer"

Each reset draws one of ten tasks, in MT50-v0 one of fifty; metaworld_arm:drawer-open-v0 and the
like have one. The state is what the robot knows of itself, and nothing of the things. Actions (4,),
-1 to 1: by how much to move the hand along x, y and z (1 cm at 1), and to close it.

Nearly every scene shows what is to be done in it: a policy can do without the words. What this
measures is many tasks at once; words that matter are in scene.py and babyai.py.

The tasks and the scripted policies that demonstrate are Meta-World's (Yu et al. 2019,
arXiv:1910.10897; the package is MIT's); the sentences, the camera and the plain colours are ours.
The files of algorithms/ import this to evaluate, `datasets/make.py metaworld-mt10` to collect.
"""

import pixels  # noqa: F401  chooses MuJoCo's renderer before mujoco is imported

try:
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS, MT10_V3
    from metaworld.policies import ENV_POLICY_MAP
except ImportError as error:
    # Without its dependencies: it asks for an older MuJoCo, in which other data would change.
    raise SystemExit(
        f"Meta-World's arm needs pip install --no-deps metaworld==3.1.1 scipy ({error})."
    ) from None

import copy
import functools
import string
import warnings

import gymnasium as gym
import mujoco
import numpy as np

TASKS = {  # Meta-World's name, without its -v3: what we call it
    "assembly": "put the ring over the peg",
    "basketball": "drop the ball into the basket",
    "bin-picking": "carry the block to the other bin",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "press the button behind the wall from above",
    "button-press": "press the button on the side of the box",
    "button-press-wall": "press the button on the box behind the wall",
    "coffee-button": "start the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "hand-insert": "put the hand into the hole",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-open": "turn the faucet on",
    "faucet-close": "turn the faucet off",
    "hammer": "drive the nail in with the hammer",
    "handle-press-side": "press the handle on the side down",
    "handle-press": "press the handle in front down",
    "handle-pull-side": "pull the handle on the side up",
    "handle-pull": "pull the handle in front up",
    "lever-pull": "swing the lever up",
    "peg-insert-side": "put the peg into the hole of the box",
    "pick-place-wall": "carry the puck over the wall to the blue ball",
    "pick-out-of-hole": "take the puck out of the hole",
    "reach": "reach for the red ball",
    "push-back": "pull the block back to the green ball",
    "push": "push the puck to the green ball",
    "pick-place": "carry the puck to the blue ball",
    "plate-slide": "slide the plate into the goal in front",
    "plate-slide-side": "slide the plate into the goal on the side",
    "plate-slide-back": "slide the plate back out of the goal",
    "plate-slide-back-side": "slide the plate sideways out of the goal",
    "peg-unplug-side": "pull the plug out of the box",
    "soccer": "kick the ball into the goal",
    "stick-push": "push the bottle with the stick",
    "stick-pull": "pull the bottle with the stick",
    "push-wall": "push the puck around the wall to the green ball",
    "reach-wall": "reach for the red ball behind the wall",
    "shelf-place": "put the block on the shelf",
    "sweep-into": "sweep the block into the hole",
    "sweep": "sweep the block off the table",
    "window-open": "open the window",
    "window-close": "close the window",
}
SETS = {"MT10": [name.removesuffix("-v3") for name in MT10_V3], "MT50": [*TASKS]}
SETS |= {name: [name] for name in TASKS}
SIZE, STEPS, NOISE = 64, 200, 0.1  # a picture's side; an episode's limit; of an expert's actions
ARM = {"base", "pedestal", "head", "eGripperBase", *(f"l{i}" for i in range(7))}  # fine meshes


class MetaWorld(gym.Env):
    """Some of Meta-World's tasks, as this file's first lines say."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}  # noqa: RUF012

    def __init__(self, tasks: list[str], render_mode: str | None = None):
        self.render_mode, self.tasks = render_mode, tasks
        self.action_space = gym.spaces.Box(-1, 1, (4,), np.float32)
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
            state=gym.spaces.Box(-np.inf, np.inf, (4,), np.float32),
            instruction=gym.spaces.Text(100, charset=string.ascii_lowercase + " "),
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """One of the tasks at random, or options={"task": ...}, in a new simulator, which takes
        some hundredths of a second: nothing of an earlier episode is left, and an environment
        never has more than one."""
        super().reset(seed=seed)
        drawn, number = self.np_random.integers((len(self.tasks), 2**31))
        self.task = (options or {}).get("task", self.tasks[drawn])
        self.arm = arm = simulator(self.task)()
        arm._set_task_called, arm._freeze_rand_vec = True, False
        arm.seeded_rand_vec, arm._partially_observable = True, False  # experts see the goal
        del arm.sawyer_observation_space  # cached, and told to hide it
        arm.seed(int(number))
        self.seen, _ = arm.reset()
        mujoco.mj_kinematics(arm.model, arm.data)  # for the picture: some things were moved since
        return self.observation(), {"task": self.task}

    def step(self, action):
        self.seen, *_, info = self.arm.step(action)  # it clips what is outside -1 and 1
        success = bool(info["success"])  # its reward is dense, ours is not
        info = {"success": success, "task": self.task}
        return self.observation(), float(success), success, False, info

    def observation(self) -> dict:
        state = self.seen[:4].astype(np.float32)  # the rest is of the things and of the goal
        return {"image": self.picture(), "state": state, "instruction": TASKS[self.task]}

    def picture(self) -> np.ndarray:
        """What the camera sees, (64, 64, 3), uint8: from behind the robot's shoulder, so that
        handles and the hand are in front of the things. The arm, which would hide them, is not
        drawn but for the fingers; nor are shadows."""
        renderer, view = camera(self.arm.fullpath)
        renderer.update_scene(self.arm.data, view)
        return renderer.render()

    def render(self) -> np.ndarray:
        """What the policy sees, four times as large."""
        return self.picture().repeat(4, axis=0).repeat(4, axis=1)


class Lean:
    """Mixed into a class of Meta-World: its model without what is heavy."""

    def _initialize_simulation(self):
        model = copy.copy(lean_model(self.fullpath))
        return model, mujoco.MjData(model)


@functools.cache
def simulator(task: str) -> type:
    return type("LeanTask", (Lean, ALL_V3_ENVIRONMENTS[f"{task}-v3"]), {})


@functools.cache
def lean_model(path: str) -> mujoco.MjModel:
    """Meta-World's model, which moves as before: the arm's fine meshes are gone or, where they can
    touch something, not drawn, and each texture is its mean colour. With all that a simulator and
    a renderer take 130 MB of memory and a second to begin, without it 40 MB and a tenth."""
    spec, textured = mujoco.MjSpec.from_file(path), mujoco.MjModel.from_xml_path(path)
    for geom in spec.geoms:
        if geom.meshname in ARM:
            if geom.contype or geom.conaffinity:
                geom.group = 5  # not drawn
            else:
                spec.delete(geom)
    used = {geom.meshname for geom in spec.geoms}
    for mesh in spec.meshes:
        if mesh.name not in used:
            spec.delete(mesh)
    for material in spec.materials:
        for i in textured.material(material.name).texid:
            if i >= 0:
                texture = textured.tex(i)
                shape = (texture.height[0] * texture.width[0], texture.nchannel[0])
                pixels_of = textured.tex_data[texture.adr[0] :][: np.prod(shape)].reshape(shape)
                material.rgba[:3] *= pixels_of.mean(0)[:3] / 255
        material.textures = [""] * len(material.textures)
    for texture in spec.textures:
        if texture.type != mujoco.mjtTexture.mjTEXTURE_SKYBOX:  # the hand is black, as nothing is
            spec.delete(texture)
    model = spec.compile()
    model.vis.quality.offsamples = 0  # no multisampling, which costs most of the time
    model.vis.quality.shadowsize = 1
    model.vis.quality.numslices = model.vis.quality.numstacks = 8
    model.vis.quality.numquads = 1
    return model


@functools.cache
def camera(path: str) -> tuple[mujoco.Renderer, mujoco.MjvCamera]:
    """A renderer for all simulators of one model, never closed: MuJoCo would then take pieces of
    another one's."""
    renderer = mujoco.Renderer(lean_model(path), SIZE, SIZE, max_geom=500)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = 0
    view = mujoco.MjvCamera()
    view.lookat[:], view.distance, view.azimuth, view.elevation = (0, 0.68, 0.12), 1.0, 120, -35
    return renderer, view


def demonstrations(name: str, episodes: int, seed: int) -> tuple[dict[str, np.ndarray], str]:
    """The columns of a data set of successful demonstrations with its distinct `instructions`, the
    tasks in turn, and how many attempts were not. Meta-World's scripted policies see the things'
    places, and the goal's."""
    env, rng = MetaWorld(SETS[name]), np.random.default_rng(seed)
    kept, failed = [], 0
    while len(kept) < episodes:
        task = env.tasks[len(kept) % len(env.tasks)]
        ob, _ = env.reset(seed=int(rng.integers(2**31)), options={"task": task})
        expert, rows, done = ENV_POLICY_MAP[f"{task}-v3"](), [], False
        while not done and len(rows) < STEPS:
            with warnings.catch_warnings(action="ignore"):  # that it asks for more than 1
                action = np.clip(expert.get_action(env.seen), -1, 1) + rng.normal(0, NOISE, 4)
            action = np.clip(action, -1, 1).astype(np.float32)
            ob_next, reward, done, _, _ = env.step(action)
            rows.append((ob["image"], ob["state"], action, reward, ob["instruction"], done))
            ob = ob_next
        if done:
            kept.append(rows)
        else:
            failed += 1
            if failed > episodes + 20:
                raise SystemExit(f"Meta-World's policy of {task} fails, too often to go on.")
    keys = ("images", "observations", "actions", "rewards", "instructions", "terminals")
    columns = zip(*(row for rows in kept for row in rows))
    data = {key: np.array(column) for key, column in zip(keys, columns)}
    said, data["task_index"] = np.unique(data["instructions"], return_inverse=True)
    how = f"Meta-World's scripted policies with noise {NOISE} do the tasks of {name}, "
    how += f"{failed} of {episodes + failed} attempts failed and were dropped"
    timeouts = np.zeros(len(data["rewards"]), bool)
    return data | {"timeouts": timeouts, "instructions": said.tolist()}, how


for name, tasks in SETS.items():
    if f"{name}-v0" not in gym.registry:  # the module may be known by two names
        options = {"max_episode_steps": STEPS, "disable_env_checker": True}
        gym.register(f"{name}-v0", MetaWorld, kwargs={"tasks": tasks}, **options)
