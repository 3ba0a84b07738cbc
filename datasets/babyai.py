"""A room full of things and a sentence about one of them: BabyAI's levels, seen as pictures.

An agent stands in a room of balls, boxes and keys in six colours. It is told which of them to go
to, which to pick up, or which to put beside which other. Reward 1 for that ends an episode; a wrong
thing does not. The sentences are many, and a sentence that fits one room does not fit the next.

    env = gym.make("babyai:GoToLocal-v0")            # from the project's folder
    observation, info = env.reset(seed=0)
    observation["image"]                             # (64, 64, 3), uint8
    observation["state"]                             # (5,): which way it faces, whether it carries
    observation["instruction"]                       # "go to the red ball"

Also PickupLoc-v0 and PutNextLocal-v0. The action is one number, -1 to 1, cut into seven equal
parts: turn left, turn right, forward, pick up, drop, toggle, done. Demonstrations hold the middles
of the parts, which `--bins 7` of rt1.py and rt2.py tells apart exactly.

`questions` asks where things are, and what is where: "where is the red ball", "left 2 ahead 3".

The levels and the bot that demonstrates are BabyAI's (Chevalier-Boisvert et al. 2019,
arXiv:1810.08272), as minigrid (Apache-2.0) has them; the picture's frame and the one number are
ours. The files of algorithms/ import this to evaluate, `datasets/make.py` to collect
`babyai-gotolocal` and `babyai-questions`.
"""

import os

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # minigrid imports pygame, which greets

try:
    from minigrid.core.constants import COLOR_NAMES
    from minigrid.envs import babyai as levels
    from minigrid.utils.baby_ai_bot import BabyAIBot
except ImportError:
    # Without its dependencies: pygame-ce would overwrite pygame, which serves it as well.
    raise SystemExit("BabyAI needs minigrid: pip install --no-deps minigrid==3.2.0") from None

import contextlib
import io
import string

import gymnasium as gym
import numpy as np

LEVELS = {"GoToLocal": 64, "PickupLoc": 64, "PutNextLocal": 128}  # BabyAI's limits of steps
SIZE, CELL, ACTIONS = 64, 8, 7  # sides of a picture and of a cell in pixels; discrete actions


def to_number(action: int) -> np.ndarray:
    """A discrete action as the middle of its part of [-1, 1], (1,), float32."""
    return np.array([(2 * action + 1) / ACTIONS - 1], np.float32)


def to_action(number: np.ndarray) -> int:
    """The part of [-1, 1] that an action (1,) falls into, 0 to 6."""
    return int(np.clip(np.floor((float(number[0]) + 1) / 2 * ACTIONS), 0, ACTIONS - 1))


class BabyAI(gym.Env):
    """A level of BabyAI, as this file's first lines say."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, level: str, render_mode: str | None = None):
        # Its own limit is never reached before the TimeLimit's, which is the one that counts.
        self.render_mode, self.level = render_mode, getattr(levels, level)(max_steps=10_000)
        self.action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space = gym.spaces.Dict(
            image=gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8),
            state=gym.spaces.Box(0, 1, (5,), np.float32),
            instruction=gym.spaces.Text(200, charset=string.ascii_lowercase + " "),
        )

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        with contextlib.redirect_stdout(io.StringIO()):  # a level prints which rooms it rejects
            self.level.reset(seed=int(self.np_random.integers(2**31)))
        return self.observation(), {}

    def step(self, action):
        *_, reward, done, _, _ = self.level.step(to_action(action))
        success = bool(done and reward > 0)  # its reward also counts steps, ours does not
        return self.observation(), float(success), bool(done), False, {"success": success}

    def observation(self) -> dict:
        state = np.zeros(5, np.float32)
        state[self.level.agent_dir] = 1  # east, south, west, north
        state[4] = self.level.carrying is not None
        return {"image": self.picture(), "state": state, "instruction": self.level.mission}

    def picture(self) -> np.ndarray:
        """What the agent sees, (64, 64, 3), uint8: the 7 x 7 cells before it, itself in the middle
        of the lowest row. A cell is 8 pixels, a place of rt1.py's map; black fills the right and
        the lower edge, so that nothing is resized."""
        seen = self.level.get_pov_render(CELL)  # (56, 56, 3)
        missing = (0, SIZE - len(seen))
        return np.pad(seen, (missing, missing, (0, 0)))

    def render(self) -> np.ndarray:
        """What the policy sees, four times as large."""
        return self.picture().repeat(4, axis=0).repeat(4, axis=1)


def demonstrations(level: str, episodes: int, seed: int) -> tuple[dict[str, np.ndarray], str]:
    """The columns of a data set of successful demonstrations with its distinct `instructions`, and
    how many attempts were not. BabyAI's bot knows the level's aim and plans with what was seen."""
    env, rng = BabyAI(level), np.random.default_rng(seed)
    kept, failed = [], 0
    while len(kept) < episodes:
        ob, _ = env.reset(seed=int(rng.integers(2**31)))
        bot, rows, done = BabyAIBot(env.level), [], False
        while not done and len(rows) < LEVELS[level]:
            try:
                action = to_number(int(bot.replan()))
            except AssertionError:  # the bot is lost
                break
            ob_next, reward, done, _, _ = env.step(action)
            rows.append((ob["image"], ob["state"], action, reward, ob["instruction"], done))
            ob = ob_next
        if done and reward:
            kept.append(rows)
        else:
            failed += 1
    keys = ("images", "observations", "actions", "rewards", "instructions", "terminals")
    columns = zip(*(row for rows in kept for row in rows))
    data = {key: np.array(column) for key, column in zip(keys, columns)}
    said, data["task_index"] = np.unique(data["instructions"], return_inverse=True)
    how = f"BabyAI's bot carries out instructions of {level}, "
    how += f"{failed} of {episodes + failed} attempts failed and were dropped"
    timeouts = np.zeros(len(data["rewards"]), bool)
    return data | {"timeouts": timeouts, "instructions": said.tolist()}, how


THINGS = [f"{colour} {kind}" for colour in COLOR_NAMES for kind in ("ball", "box", "key")]


def place(x: int, y: int) -> str:
    """A cell of the picture, column x and row y of 7, as the agent would say where it is."""
    beside, ahead = x - 3, 6 - y
    words = [f"{'left' if beside < 0 else 'right'} {abs(beside)}"] if beside else []
    return " ".join(words + [f"ahead {ahead}"] * (ahead > 0))


# The cells of the picture but for the one the agent is in, which has no words.
CELLS = [(x, y) for x in range(7) for y in range(7) if (x, y) != (3, 6)]


def things(level) -> dict[str, str]:
    """What stands where in the picture, {place: thing}, the nearest first."""
    grid, seen = level.gen_obs_grid()
    there = ((x, y) for x, y in CELLS if seen[x, y] and grid.get(x, y) is not None)
    near = sorted(there, key=lambda cell: abs(cell[0] - 3) + 6 - cell[1])
    found = {place(*cell): f"{grid.get(*cell).color} {grid.get(*cell).type}" for cell in near}
    return {where: thing for where, thing in found.items() if thing in THINGS}  # walls are none


def questions(pictures: int, seed: int) -> dict[str, np.ndarray]:
    """Pictures of rooms at random, two of each with some steps in between, and questions about
    each: where three things are that are there (the nearest of its kind) and one that is not, what
    is at three places that hold something and at one that does not. Columns and texts are those of
    scene.py's `questions`."""
    env, rng = BabyAI("GoToLocal"), np.random.default_rng(seed)
    asked = [f"where is the {thing}" for thing in THINGS] + [f"what is {place(*x)}" for x in CELLS]
    images, rows = [], []
    while len(images) < pictures:
        env.reset(seed=int(rng.integers(2**31)))
        for _ in range(2):
            what = things(env.level)
            where = {thing: at for at, thing in reversed(what.items())}
            said = [f"what is {x}" for x in rng.permutation(list(what))[:3]]
            said += [f"where is the {x}" for x in rng.permutation(list(where))[:3]]
            said += [f"what is {rng.choice([place(*x) for x in CELLS if place(*x) not in what])}"]
            said += [f"where is the {rng.choice([x for x in THINGS if x not in where])}"]
            answers = {f"what is {x}": thing for x, thing in what.items()}
            answers |= {f"where is the {x}": at for x, at in where.items()}
            for x in said:
                other = "nothing" if x.startswith("what") else "not here"
                rows.append((len(images), asked.index(x), answers.get(x, other)))
            images.append(env.picture())
            for _ in range(rng.integers(1, 6)):
                env.level.step(rng.choice([0, 1, 2, 2]))  # left, right, forward
    picture, question, said = map(np.array, zip(*(row for row in rows if row[0] < pictures)))
    answers, said = np.unique(said, return_inverse=True)
    kinds = [question.split()[0] for question in asked]
    found = dict(images=np.array(images[:pictures]), picture=picture, question=question)
    return found | dict(answer=said, questions=asked, answers=answers.tolist(), kinds=kinds)


for name, steps in LEVELS.items():
    if f"{name}-v0" not in gym.registry:  # the module may be known by two names
        options = {"max_episode_steps": steps, "disable_env_checker": True}
        gym.register(f"{name}-v0", BabyAI, kwargs={"level": name}, **options)
