"""Makes this project's data sets, and fetches D4RL's.

    python datasets/make.py --list
    python datasets/make.py hopper-medium hopper-medium-expert
    python datasets/make.py all
    python datasets/make.py hopper-medium-replay-v2
    python datasets/make.py pointmaze-medium-navigate --transitions 1000000
    python datasets/make.py halfcheetah-pixels
    python datasets/make.py scene-language --demonstrations 5000
    python datasets/make.py scene-questions --pictures 20000
    python datasets/make.py babyai-gotolocal babyai-questions --pictures 20000
    python datasets/make.py metaworld-mt10
    python datasets/make.py hopper-medium --format minari
    python datasets/make.py --mix hopper-random:0.9,hopper-expert:0.1 --name hopper-random-expert-10

Every transition comes from a simulator. `random` takes uniformly random actions; `medium` and
`expert` are rolled out from the SAC policies in datasets/policies, drawn from their stochastic
policy as D4RL does; `ant-medium` is the walker of the antmazes on Gymnasium's Ant; `medium-replay`
is SAC's replay buffer (Hopper, Pendulum: it ships) or rollouts of snapshots taken evenly on the way
to the medium policy; `pendulum-bimodal` and `-unimodal` are
demonstrations of a controller written down here; everything else mixes those by whole episodes.
Names with -v2 are D4RL's own files: downloaded once, and written in the layout of the others with
the ends of episodes that they leave out. What is there already is never overwritten unless
--overwrite says so.
"""

import contextlib
import csv
import http.client
import importlib
import json
import os
import sys
import time
import urllib.error
import urllib.request
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import tyro
from gymnasium.envs.registration import EnvSpec
from minari.data_collector import EpisodeBuffer
from minari.storage.datasets_root_dir import get_dataset_path
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "algorithms"))
sys.path.append(str(FOLDER))  # for ant, goals, babyai, scene and the like
import ant  # noqa: E402
import sac  # noqa: E402  its policy acts, its table has D4RL's reference returns

TASKS = {  # name: environment, transitions of each level
    "hopper": ("Hopper-v5", 200_000),
    "halfcheetah": ("HalfCheetah-v5", 200_000),
    "walker2d": ("Walker2d-v5", 200_000),
    "pendulum": ("Pendulum-v1", 20_000),
    "ant": (ant.specification(), 100_000),
}
SAC_TASKS = [task for task in TASKS if task != "ant"]
MIXTURES = {  # in equal numbers of transitions
    "medium-expert": ("medium", "expert"),
    "random-medium": ("random", "medium"),
    "random-expert": ("random", "expert"),
    "random-medium-expert": ("random", "medium", "expert"),
}
LEVELS = ("random", "medium", "medium-replay", "expert", *MIXTURES)
DEMONSTRATIONS = ("bimodal", "unimodal")  # by a controller, of Pendulum alone
OF_ANT = ("random", "medium", "random-medium")  # no SAC of ours is its expert
OURS = [f"{task}-{x}" for task in TASKS for x in (OF_ANT if task == "ant" else LEVELS)]
OURS += [f"pendulum-{kind}" for kind in DEMONSTRATIONS]
BUFFERS = ("hopper-medium-replay", "pendulum-medium-replay")  # a rollout cannot make these again
SHIPPED = (*BUFFERS, "pendulum-random-medium-expert", "pendulum-random-expert-10")
SHIPPED += ("pendulum-bimodal", "pendulum-unimodal", "pointmaze-medium-navigate", "scene-language")
SHIPPED += ("scene-questions",)

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
D4RL_TASKS = {  # -v4 has the dynamics and the rewards of the -v2 environments of D4RL
    "halfcheetah": "HalfCheetah-v4",
    "hopper": "Hopper-v4",
    "walker2d": "Walker2d-v4",
    "ant": "Ant-v4",
}
D4RL_LEVELS = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
D4RL = {  # name: file
    f"{task}-{level}-v2": f"{task}_{level.replace('-', '_')}-v2.hdf5"
    for task in D4RL_TASKS
    for level in D4RL_LEVELS
}
GOAL_TASKS = {  # by goals.py, which needs OGBench
    "pointmaze-umaze": ("navigate", "stitch"),
    "pointmaze-medium": ("navigate", "stitch"),
    "pointmaze-large": ("navigate", "stitch"),
    "antmaze-umaze": ("navigate", "stitch"),
    "antmaze-medium": ("navigate", "stitch"),
    "cube-single": ("play",),
    "scene": ("play",),
}
GOALS = [f"{task}-{kind}" for task, kinds in GOAL_TASKS.items() for kind in kinds]
SINGLETASKS = ("", *(f"-task{i}" for i in range(1, 6)))
REWARDED = [f"{name}-singletask{task}" for name in GOALS for task in SINGLETASKS]
WALKER = "ant-directions"  # the policy that walks in the antmazes

PIXELS = "halfcheetah-pixels"  # by pixels.py: one episode of ten of the medium-replay, drawn

SCENE = "scene-language"  # by scene.py, which needs OGBench: an arm, instructed in words

# Pictures, questions and answers, no transitions: of scene.py too, and of babyai.py.
ASKED = {"scene-questions": "scene", "babyai-questions": "babyai"}

# By babyai.py, which needs minigrid: rooms of things, and instructions about them.
BABYAI = {f"babyai-{x.lower()}": x for x in ("GoToLocal", "PickupLoc", "PutNextLocal")}

# By metaworld_arm.py, which needs Meta-World: another arm with ten or fifty tasks.
METAWORLD = {f"metaworld-{x.lower()}": x for x in ("MT10", "MT50")}

KNOWN = [*OURS, *GOALS, *REWARDED, PIXELS, SCENE, *ASKED, *BABYAI, *METAWORLD, *D4RL]

# Modules of environments whose reward is success.
SUCCESSES = ("ogbench:", "environments:", "scene:", "babyai:", "metaworld_arm:")

COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")

# The columns above, N rows each, actions in the environment's bounds; of a mixture also `sources`,
# the number of the part that a row is from.
Data = dict[str, np.ndarray]


@dataclass
class Args:
    """Makes or fetches data sets by name, mixes them, lists them."""

    names: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """data sets to make, or: all (of ours)"""
    list: bool = False
    """show every data set that can be made, and what is there"""
    mix: str = ""
    """parts and their shares of the transitions, e.g. hopper-random:0.9,hopper-expert:0.1"""
    name: str = ""
    """name of the mixture"""
    transitions: int = 0
    """size of the mixture, to within an episode of each part; 0: as much as its parts allow; of a
    maze's or an arm's data: 0 is 100,000, OGBench's own have a million"""
    demonstrations: int = 600
    """episodes of scene-language, of babyai's and of metaworld's"""
    pictures: int = 2400
    """pictures of scene-questions and of babyai-questions"""
    seed: int = 0
    """seed of rollouts and mixtures"""
    format: Literal["hdf5", "minari"] = "hdf5"
    """minari: write a local Minari data set cleandgm/<name>-v0 as well"""
    overwrite: bool = False
    """replace what is there"""
    card: bool = False
    """rewrite the table of README.md from the files that are there"""
    from_sac: str = ""
    """maintainers: build the policies (and a shipped replay set) of --task from this SAC run"""
    task: str = ""
    """hopper, halfcheetah, walker2d or pendulum; ant-directions for the walker of the antmazes"""
    medium_step: int = 0
    """environment step of the medium policy; 0: the first whose evaluation passes a third of the
    expert's return"""
    expert_step: int = 0
    """environment step of the expert policy; 0: the last"""
    replay_steps: int = 0
    """steps of SAC that the replay set covers; 0: up to the medium policy, and where the buffer
    itself ships on MuJoCo no less than a level's size"""


# --------------------------------------------------------------------------------------- Files


def path_of(name: str) -> Path:
    return FOLDER / f"{name}.hdf5"


def check_free(path: Path, overwrite: bool) -> None:
    """Asked before the work begins, not after it."""
    if path.exists() and not overwrite:
        raise SystemExit(f"{path} exists; --overwrite replaces it.")


def check_known(name: str) -> None:
    if name not in KNOWN and not path_of(name).exists():
        raise SystemExit(
            f"No data set '{name}'. There are {', '.join(SAC_TASKS)}, each with"
            f" -{', -'.join(LEVELS)}; ant-{', ant-'.join(OF_ANT)};"
            f" pendulum-{', pendulum-'.join(DEMONSTRATIONS)}; {', '.join(GOALS)}, each also with"
            f" -singletask or -singletask-task1 to -task5; {PIXELS}; {SCENE}; {', '.join(ASKED)};"
            f" {', '.join((*BABYAI, *METAWORLD))}; D4RL's {', '.join(D4RL_TASKS)}, each"
            f" with -{'-v2, -'.join(D4RL_LEVELS)}-v2; other mixtures with --mix."
        )


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file: it takes the place of the old one when it is whole, or is gone."""
    partial = path.with_suffix(f".{os.getpid()}.tmp")  # two may make it at once
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def spec_of(env_id: str) -> str | EnvSpec:
    """What gym.make takes: an id, or what a specification in JSON says."""
    return EnvSpec.from_json(env_id) if env_id[0] == "{" else env_id


def name_of(env_id: str) -> str:
    return json.loads(env_id)["id"] if env_id[0] == "{" else env_id


def make_env(env_id: str) -> gym.Env:
    with warnings.catch_warnings(action="ignore"):  # -v4 is out of date: D4RL is, too
        return gym.make(spec_of(env_id))


def environment_of(name: str) -> str:
    """The id of a data set's environment, by its name or, of a mixture, by its file."""
    task = name.partition("-")[0]
    if name in OURS or name in D4RL:
        return D4RL_TASKS[task] if name in D4RL else TASKS[task][0]
    try:
        with h5py.File(path_of(name)) as file:
            return str(file.attrs["env_id"])
    except (OSError, KeyError) as error:
        raise SystemExit(f"{path_of(name)} names no environment: {error}") from None


def episodes_of(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """First row of each episode and the end of the last (E + 1,), return of each episode (E,)."""
    ends = data["terminals"].astype(bool) | data["timeouts"].astype(bool)
    starts = np.append(0, np.flatnonzero(ends) + 1)
    return starts, np.add.reduceat(data["rewards"].astype(np.float64), starts[:-1])


def read(name: str) -> tuple[Data, dict]:
    """Columns and attributes of a data set."""
    with h5py.File(path_of(name)) as file:
        if "final_observations" not in file:
            lacks = "has no final_observations, the successors at the ends of its episodes"
            raise SystemExit(f"{path_of(name)} {lacks}; it can be trained on, but not be copied.")
        data = {key: file[key][()] for key in COLUMNS if key != "next_observations"}
        data |= {key: file[key][()] for key in ("qpos", "button_states") if key in file}
        successors = np.roll(data["observations"], -1, axis=0)
        successors[data["terminals"] | data["timeouts"]] = file["final_observations"][()]
        return data | {"next_observations": successors}, dict(file.attrs)


def write(name: str, data: Data, env_id: str, how: str, seconds: float, **attributes) -> None:
    """A data set in D4RL's flat layout, with what a reader has to know as attributes."""
    # A successor is the next row, but for the last of an episode: storing only those keeps every
    # one of them at half the size. Readers that know nothing of it see D4RL's layout.
    stored = {key: rows for key, rows in data.items() if key != "next_observations"}
    if "next_observations" in data:
        ends = data["terminals"].astype(bool) | data["timeouts"].astype(bool)
        stored["final_observations"] = data["next_observations"][ends]
    kinds = dict(terminals=bool, timeouts=bool, sources=np.uint8, task_index=np.uint16)
    space, (low, high) = make_env(env_id).action_space, references(env_id)
    with replacing(path_of(name)) as partial, h5py.File(partial, "w") as file:
        for key, values in stored.items():
            options = dict(compression="gzip", compression_opts=9, shuffle=True)
            file.create_dataset(key, data=values.astype(kinds.get(key, np.float32)), **options)
        file.attrs.update(env_id=env_id, ref_min_score=low, ref_max_score=high)
        file.attrs.update(action_low=space.low, action_high=space.high, **attributes)
        file.attrs.update(description=how, seconds=round(seconds, 1))
    _, returns = episodes_of(data)
    print(
        f"{name}: {len(data['rewards']):,} transitions, {len(returns):,} episodes of return"
        f" {returns.mean():.1f} (mean), {returns.max():.1f} (best);"
        f" {path_of(name).stat().st_size / 1e6:.1f} MB in {seconds:.0f} s"
    )


def write_minari(name: str, overwrite: bool) -> None:
    """The same data as the local Minari data set cleandgm/<name>-v0."""
    data, attributes = read(name)
    dataset_id, env = f"cleandgm/{name}-v0", make_env(attributes["env_id"])
    if get_dataset_path(dataset_id).exists():
        if not overwrite:
            raise SystemExit(f"Minari has {dataset_id} already; --overwrite replaces it.")
        minari.delete_dataset(dataset_id)
    starts, _ = episodes_of(data)
    buffers = [
        EpisodeBuffer(
            id=i,
            observations=np.append(
                data["observations"][a:b], data["next_observations"][b - 1 : b], axis=0
            ),
            actions=data["actions"][a:b],
            rewards=data["rewards"][a:b],
            terminations=data["terminals"][a:b],
            truncations=data["timeouts"][a:b],
            infos={},
        )
        for i, (a, b) in enumerate(zip(starts[:-1], starts[1:]))
    ]
    box = env.observation_space  # MuJoCo's is float64, the data is not
    with warnings.catch_warnings(action="ignore"):  # it would like an e-mail address and a link
        minari.create_dataset_from_buffers(
            dataset_id,
            buffers,
            env=env,
            observation_space=gym.spaces.Box(box.low, box.high, dtype=np.float32),
            algorithm_name="controller" if name.endswith((*DEMONSTRATIONS, "play")) else "SAC",
            author="D4RL" if name in D4RL else "CleanDGM",
            ref_min_score=float(attributes["ref_min_score"]),
            ref_max_score=float(attributes["ref_max_score"]),
            description=str(attributes["description"]),
        )
    print(f"{dataset_id}: {len(buffers):,} episodes in {get_dataset_path(dataset_id)}")


# ------------------------------------------------------------------------- Policies, references


def load_policies(task: str) -> dict:
    path = FOLDER / "policies" / f"{task}.pt"
    if not path.exists():
        raise SystemExit(f"No policies of {task}: {path} is missing (made by --from-sac).")
    return torch.load(path, weights_only=True)


def policy_at(policies: dict, step: int) -> sac.Policy:
    """The policy that SAC had after so many environment steps."""
    state = {key: value.float() for key, value in policies["policies"][str(step)].items()}
    hidden_dim, state_dim = state["net.0.weight"].shape
    if "action_low" in state:  # the files of policies/ are older than the module `scaling`
        state["scaling.bounds"] = torch.cat([state.pop("action_low"), state.pop("action_high")])
        state["scaling.mean"] = torch.zeros(state_dim)
        state["scaling.std"] = torch.ones(state_dim)
    bounds = state["scaling.bounds"]  # (2, A)
    task = {"sizes": [state_dim, bounds.shape[1]], "bounds": bounds.tolist()}
    policy = sac.Policy(task, sac.Args(hidden_dim=hidden_dim))
    policy.load_state_dict(state)
    return policy


def d4rl_references(env_id: str) -> tuple[float, float] | None:
    return sac.SCORES.get(name_of(env_id).split("-v")[0])


def references(env_id: str) -> tuple[float, float]:
    """Returns that score 0 and 100: D4RL's, or else a random and the expert policy's."""
    if known := d4rl_references(env_id):
        return known
    if env_id.startswith(SUCCESSES):  # the return is the success
        return 0.0, 1.0
    policies = load_policies(next((x for x in TASKS if TASKS[x][0] == env_id), env_id))
    return policies["random_return"], policies["returns"][str(policies["steps"]["expert"])]


def from_sac(args: Args) -> None:
    """Policies of a task, and its replay set if that ships, from a run of algorithms/sac.py."""
    if args.task == WALKER:
        return keep_walker(args)
    if args.task not in SAC_TASKS:
        raise SystemExit(f"--task '{args.task}': one of {', '.join(SAC_TASKS)}.")
    task, run, (env_id, n) = args.task, Path(args.from_sac), TASKS[args.task]
    path, replay_name = FOLDER / "policies" / f"{task}.pt", f"{task}-medium-replay"
    check_free(path, args.overwrite)
    if replay_name in BUFFERS:
        check_free(path_of(replay_name), args.overwrite)

    # The policies: medium is the first that an evaluation saw past a third of the expert's return.
    with open(run / "eval.csv") as file:
        returns = {int(row["step"]): float(row["return_mean"]) for row in csv.DictReader(file)}
    steps = sorted(int(path.stem) for path in (run / "policies").glob("*.pt"))
    steps = [step for step in steps if step in returns]
    expert = args.expert_step or max(steps, default=0)
    _, random_returns = episodes_of(roll_out(env_id, None, min(n, 50_000), seed=12345))
    random_return = float(random_returns[:-1].mean())  # the last episode is cut
    low, high = d4rl_references(env_id) or (random_return, returns.get(expert, 0))
    past = [step for step in steps if returns[step] > low + (high - low) / 3]
    medium = args.medium_step or min(past, default=0)
    for level, step in (("expert", expert), ("medium", medium)):
        if step not in steps:
            raise SystemExit(f"{run}: no evaluated snapshot is {level}, step {step or 'any'}.")

    # The replay set: SAC's own buffer, or 20 policies spread evenly over the same steps.
    least = n if d4rl_references(env_id) and replay_name in BUFFERS else 0
    replay_steps = args.replay_steps or max(medium, least)
    before = [step for step in steps if step <= replay_steps]
    spread = sorted({before[i] for i in np.linspace(0, len(before) - 1, 20).round().astype(int)})
    replay = [] if replay_name in BUFFERS else spread
    keep = sorted({medium, expert, *replay})
    states = {s: torch.load(run / "policies" / f"{s:08d}.pt", weights_only=True) for s in keep}
    path.parent.mkdir(exist_ok=True)
    policies = {
        "env_id": env_id,
        "random_return": random_return,
        "steps": {"medium": medium, "expert": expert, "replay": replay},
        "returns": {str(s): returns[s] for s in keep},
        "policies": {
            str(s): {k: v.half() if k.startswith("net.") else v for k, v in states[s].items()}
            for s in keep
        },
    }
    with replacing(path) as partial:
        torch.save(policies, partial)
    print(f"{task}: medium {medium:,} of return {returns[medium]:.0f}")
    print(f"{task}: expert {expert:,} of return {returns[expert]:.0f}")
    if replay_name in BUFFERS:
        with h5py.File(run / "replay.hdf5") as file:
            data = {key: file[key][:replay_steps] for key in COLUMNS}
        data["actions"] = data["actions"].reshape(len(data["actions"]), -1)
        data["timeouts"][-1] = not data["terminals"][-1]
        length = f"{len(data['actions']):,}"
        how = f"the first {length} transitions of the replay buffer of algorithms/sac.py"
        write(replay_name, data, env_id, how, seconds=0)


def keep_walker(args: Args) -> None:
    """The Ant's policy of one step, by default the last, of a run in AntDirections-v0."""
    path = FOLDER / "policies" / f"{WALKER}.pt"
    check_free(path, args.overwrite)
    there = {int(path.stem): path for path in Path(args.from_sac, "policies").glob("*.pt")}
    step = args.expert_step or max(there, default=0)
    if step not in there:
        raise SystemExit(f"{args.from_sac}: no snapshot of step {step or 'any'}.")
    state = torch.load(there[step], weights_only=True)
    state = {k: v.half() if k.startswith("net.") else v for k, v in state.items()}
    with replacing(path) as partial:
        torch.save({"steps": {"walk": step}, "policies": {str(step): state}}, partial)


# ------------------------------------------------------------------------------- Demonstrations


class SwingUp:
    """A controller of Pendulum-v1 that swings up on either side: bimodal demonstrations.

    It pumps energy until that is enough for the top, and balances there. In a band of energies just
    below it throws a coin at every step and pushes left or right. Who always pushes left there
    succeeds (one swing brakes, but the next pumps, and one is enough), who always pushes right too,
    and so does the coin: the energy leaves the band as a random walk does. The mean of both does
    not: it is a weak brake, which keeps the pendulum swinging below the top for ever. No state
    tells the coin, so for a policy both pushes belong to the same state. Without the coin it always
    pushes right in the band, and every state has one action."""

    BAND = (22.0, 27.0)  # energy above hanging at rest; 30 is what the top takes
    ON = 0.4  # chance that the coin says to push with the motion, not against it
    TORQUE, NOISE = 1.7, 0.1  # of a push, and the deviation around it; the bounds are -2 and 2

    def __init__(self, coin: bool):
        self.coin = coin

    def in_band(self, observations: torch.Tensor) -> torch.Tensor:
        """Whether the coin decides, (N,)."""
        energy = 0.5 * observations[:, 2].square() + 15 * (1 + observations[:, 0])
        low, high = self.BAND
        return (energy > low) & (energy < high) & ~self.near_top(observations)

    def near_top(self, observations: torch.Tensor) -> torch.Tensor:
        """Whether a push is enough to balance, (N,): what grows by itself is still small."""
        cos, sin, velocity = observations.unbind(1)
        return (cos > 0.7) & ((sin + velocity / 15**0.5).abs() < 0.3)

    def act(self, observations: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Torques (N, 1) in [-2, 2] for observations (N, 3), without the noise if deterministic;
        the coin is thrown all the same."""
        cos, sin, velocity = observations.unbind(1)
        ahead = torch.where(velocity < 0, -1.0, 1.0)
        energy = 0.5 * velocity.square() + 15 * (1 + cos)
        pump = ahead * ((30 - energy) / 2).clamp(-1, 1)
        on = torch.rand(len(sin)) < self.ON
        side = ahead * torch.where(on, 1.0, -1.0) if self.coin else torch.ones(len(sin))
        u = self.TORQUE * torch.where(self.in_band(observations), side, pump)
        balance = (-13.3 * sin - 3.3 * velocity).clamp(-self.TORQUE, self.TORQUE)
        u = torch.where(self.near_top(observations), balance, u)
        if not deterministic:
            u = u + self.NOISE * torch.randn(len(u))
        return u.clamp(-2, 2)[:, None]


# ---------------------------------------------------------------------------- Rollouts, mixtures


def roll_out(
    env_id: str,
    policy: sac.Policy | SwingUp | ant.Walker | None,
    n: int,
    seed: int,
    envs: int = 10,
) -> Data:
    """n transitions of a policy, or of uniformly random actions: whole episodes, of which only the
    last is cut, at the n-th transition, and then counts as timed out."""
    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    vector = gym.make_vec(spec_of(env_id), envs, vectorization_mode="sync", vector_kwargs=mode)
    vector.action_space.seed(seed)
    torch.manual_seed(seed)
    s, _ = vector.reset(seed=seed)
    log = {key: [] for key in COLUMNS}  # of every step a row per environment
    running = [(i, 0) for i in range(envs)]  # per environment: number and first step of its episode
    finished = {}  # number of an episode: its environment, its first step, the step after its last
    begun, whole, total, step = envs, 0, 0, 0
    begin = getattr(policy, "begin", lambda i: None)  # of a policy with a memory
    [begin(i) for i in range(envs)]
    # Episodes count in the order in which they began, as if one environment had played them all:
    # in the order in which they end, short ones would come first and be too many.
    while total < n:
        if policy is None:
            a = vector.action_space.sample()
        else:
            s_tensor = torch.as_tensor(s, dtype=torch.float32)
            a = policy.act(s_tensor, deterministic=False).numpy()
        s_next, r, terminated, truncated, info = vector.step(a)
        successor, step = s_next.copy(), step + 1
        for i in np.flatnonzero(terminated | truncated):
            successor[i] = info["final_obs"][i]  # s_next[i] begins a new episode already
            finished[running[i][0]] = (i, running[i][1], step)
            running[i], begun = (begun, step), begun + 1
            begin(i)
        for key, row in zip(COLUMNS, (s, a, r, successor, terminated, truncated & ~terminated)):
            log[key].append(row)
        s = s_next
        while whole in finished:
            _, first, last = finished[whole]
            total, whole = total + last - first, whole + 1
    vector.close()
    log = {key: np.stack(rows) for key, rows in log.items()}  # (steps, environments, ...)
    data = join(
        [{k: x[a:b, i] for k, x in log.items()} for i, a, b in map(finished.get, range(whole))]
    )
    data = {key: rows[:n] for key, rows in data.items()}
    data["timeouts"][-1] = not data["terminals"][-1]
    return data


def join(parts: list[Data]) -> Data:
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def mix(parts: list[Data], shares: list[float], n: int, seed: int) -> Data:
    """Whole episodes of every part, in their shares of n transitions (0: the most the parts allow),
    shuffled; `sources` has the number of each row's part."""
    most = min(len(part["rewards"]) / share for part, share in zip(parts, shares))
    if not 0 <= n <= most:
        raise SystemExit(f"--transitions {n:,}: these parts allow {int(most):,} in these shares.")
    rng, chosen = np.random.default_rng(seed), []
    for number, (part, share) in enumerate(zip(parts, shares)):
        starts, returns = episodes_of(part)
        order = rng.permutation(len(returns))
        total = np.cumsum(np.diff(starts)[order])
        last = np.abs(total - share * (n or most)).argmin()  # nearest to the share
        for e in order[: last + 1]:
            episode = {key: part[key][starts[e] : starts[e + 1]] for key in COLUMNS}
            chosen.append(episode | {"sources": np.full(len(episode["rewards"]), number)})
    return join([chosen[i] for i in rng.permutation(len(chosen))])


def make(name: str, args: Args) -> None:
    """Makes one data set and, first, the parts it needs."""
    check_known(name)
    check_free(path_of(name), args.overwrite)
    if name in D4RL:
        return fetch(name)
    if name in GOALS or name in REWARDED:
        return make_goals(name, args)
    if name in (PIXELS, SCENE):
        return {PIXELS: make_pixels, SCENE: make_scene}[name](name, args)
    if name in ASKED:
        return make_questions(name, args)
    if name in BABYAI or name in METAWORLD:
        return make_told(name, args)
    if name in BUFFERS or name not in KNOWN:
        how = "ships with the project: git restores it" if name in SHIPPED else "is made by --mix"
        raise SystemExit(f"{name} {how}.")
    task, _, level = name.partition("-")
    env_id, n = TASKS[task]
    if level in MIXTURES:
        parts = [f"{task}-{part}" for part in MIXTURES[level]]
        return make_mixture(name, {part: 1 / len(parts) for part in parts}, args)
    began = time.time()
    if level in DEMONSTRATIONS:
        coin = level == "bimodal"
        data = roll_out(env_id, SwingUp(coin), n, zlib.crc32(f"{name} {args.seed}".encode()))
        side = "left or right by a coin" if coin else "right"
        how = f"a controller that swings up; at energies just below the top's it pushes {side}"
        return write(name, data, env_id, how, time.time() - began)
    if level == "random":
        policies, steps, how = None, [0], "uniformly random actions"
    elif task == "ant":
        policies = load_policies(WALKER)
        walker = ant.Walker(policy_at(policies, policies["steps"]["walk"]))
        data = roll_out(env_id, walker, n, zlib.crc32(f"{name} {args.seed}".encode()))
        how = (
            "the walker of the antmazes towards +x: actions sampled, a fifth of each, held for two"
        )
        how += f" steps, noise {walker.NOISE}"
        return write(name, data, env_id, how, time.time() - began)
    elif level == "medium-replay":
        policies = load_policies(task)
        steps = [s for s in policies["steps"]["replay"] if s <= policies["steps"]["medium"]]
        how = f"rollouts of {len(steps)} SAC policies of steps {steps[0]:,} to {steps[-1]:,}"
    else:
        policies = load_policies(task)
        steps = [policies["steps"][level]]
        how = f"rollouts of the SAC policy of step {steps[0]:,}, actions sampled"
    parts = []
    for step in steps:
        seed = zlib.crc32(f"{name} {step} {args.seed}".encode())  # no two share a first state
        policy = policies and policy_at(policies, step)
        parts.append(roll_out(env_id, policy, n // len(steps), seed))
    write(name, join(parts), env_id, how, time.time() - began)


def make_goals(name: str, args: Args) -> None:
    """A data set of goals.py; of a -singletask first the one that it gives rewards to."""
    import goals

    base = name.partition("-singletask")[0]
    if name in REWARDED:
        if not path_of(base).exists():
            make(base, args)
        began, (data, _) = time.time(), read(base)
        n = len(data["rewards"])
        if args.transitions not in (0, n):
            raise SystemExit(f"--transitions {args.transitions:,}: {base} has {n:,}, delete it.")
        data, env_id, how = goals.singletask(name, data)
    else:
        began, seed = time.time(), zlib.crc32(f"{name} {args.seed}".encode())
        if args.transitions < 0:
            raise SystemExit(f"--transitions {args.transitions}: 1 or more, or 0 for 100,000.")
        walker = None
        if name.startswith("ant"):
            policies = load_policies(WALKER)
            walker = policy_at(policies, policies["steps"]["walk"])
        data, env_id, how = goals.recipe(name, args.transitions or 100_000, seed, walker)
    write(name, data, env_id, how, time.time() - began)


def make_pixels(name: str, args: Args) -> None:
    """Every tenth episode of HalfCheetah's medium-replay, with a picture of each state."""
    import pixels  # needs MuJoCo's renderer

    source, began = "halfcheetah-medium-replay", time.time()
    if not path_of(source).exists():
        make(source, args)
    data, _ = read(source)
    starts, _ = episodes_of(data)
    picked = [slice(a, b) for a, b in zip(starts[:-1], starts[1:])][5::10]
    data = join([{key: rows[rows_of] for key, rows in data.items()} for rows_of in picked])
    images = pixels.render(data, args.seed)
    how = f"every tenth episode of {source}, and a picture of each of its states"
    write(name, data, "HalfCheetah-v5", how, time.time() - began)
    add_images(name, images, env_id=f"pixels:{pixels.ID}")


def make_scene(name: str, args: Args) -> None:
    """Demonstrations of a robot arm that is told what to do, seen by a camera."""
    import scene

    if args.demonstrations < 1:
        raise SystemExit(f"--demonstrations {args.demonstrations}: 1 or more.")
    began = time.time()
    data, how = scene.demonstrations(args.demonstrations, args.seed)
    images = data.pop("images")
    write(name, data, "scene:SceneLanguage-v0", how, time.time() - began)
    add_images(name, images, instructions=list(scene.INSTRUCTIONS), **scene.sentences())


def make_told(name: str, args: Args) -> None:
    """Demonstrations of what is told to BabyAI's bot in a room, or to Meta-World's arm."""
    if args.demonstrations < 1:
        raise SystemExit(f"--demonstrations {args.demonstrations}: 1 or more.")
    which = "babyai" if name in BABYAI else "metaworld_arm"
    module, level = importlib.import_module(which), (BABYAI | METAWORLD)[name]
    began = time.time()
    data, how = module.demonstrations(level, args.demonstrations, args.seed)
    images, instructions = data.pop("images"), data.pop("instructions")
    write(name, data, f"{which}:{level}-v0", how, time.time() - began)
    add_images(name, images, instructions=instructions)


def make_questions(name: str, args: Args) -> None:
    """Questions about pictures of the arm's scene or of BabyAI's rooms, and answers, for rt2.py."""
    if args.pictures < 1:
        raise SystemExit(f"--pictures {args.pictures}: 1 or more.")
    began, attributes = time.time(), ("questions", "answers", "kinds")
    data = importlib.import_module(ASKED[name]).questions(args.pictures, args.seed)
    with replacing(path_of(name)) as partial, h5py.File(partial, "w") as file:
        for key in (key for key in data if key not in (*attributes, "images")):
            values = data[key].astype(np.uint16)
            file.create_dataset(key, data=values, compression="gzip", shuffle=True)
        file.attrs.update({key: data[key] for key in attributes})
    print(f"{name}: {len(data['answer']):,} questions in {time.time() - began:.0f} s")
    add_images(name, data["images"])


def add_images(name: str, images: np.ndarray, **attributes) -> None:
    """Writes pictures (N, H, W, 3) into a data set that is there."""
    with h5py.File(path_of(name), "a") as file:
        # Two rows of many pictures: what does not move from one to the next costs nearly nothing.
        chunks = (min(256, len(images)), min(2, images.shape[1]), *images.shape[2:])
        options = dict(compression="gzip", compression_opts=9, chunks=chunks)
        file.create_dataset("images", data=images, **options)
        file.attrs.update(attributes)
    print(f"{name}: {images.nbytes / 1e6:.0f} MB of pictures in memory, {len(images):,} in all")


def make_mixture(name: str, shares: dict[str, float], args: Args) -> None:
    """Mixes data sets by their shares of the transitions; makes those that are missing."""
    for part in shares:
        check_known(part)
    env_id, *others = sorted({environment_of(part) for part in shares})
    if others:
        ids = ", ".join(map(name_of, (env_id, *others)))
        raise SystemExit(f"--mix: parts of different environments ({ids}).")
    check_free(path_of(name), args.overwrite)
    for part in shares:
        if not path_of(part).exists():
            make(part, args)
    began = time.time()
    parts = [read(part)[0] for part in shares]
    size = 0 if name in KNOWN else args.transitions
    data = mix(parts, list(shares.values()), size, args.seed)
    how = ", ".join(f"{100 * share:.4g} % {part}" for part, share in shares.items())
    how, seconds = f"{how}; whole episodes, shuffled", time.time() - began
    write(name, data, env_id, how, seconds, source_names=",".join(shares))


def parse_mix(text: str) -> dict[str, float]:
    """hopper-random:0.9,hopper-expert:0.1 as a dictionary."""
    try:
        pairs = [part.rsplit(":", 1) for part in text.split(",")]
        shares = {name.strip(): float(share) for name, share in pairs}
    except ValueError:
        raise SystemExit(f"--mix {text}: write name:share,name:share.") from None
    if len(shares) < len(pairs):
        raise SystemExit(f"--mix {text}: a part is named twice.")
    if not min(shares.values()) > 0 or not abs(sum(shares.values()) - 1) < 1e-6:
        raise SystemExit(f"--mix {text}: the shares must be above 0 and sum to 1.")
    return shares


# ----------------------------------------------------------------------------------------- D4RL


def download(file_name: str) -> Path:
    """Path of a D4RL file in the d4rl package's cache folder (D4RL_DATASET_DIR moves it), fetched
    once from D4RL's server (D4RL_MIRROR names another). A broken transfer goes on where it broke,
    at once or with the next command."""
    folder = Path(os.environ.get("D4RL_DATASET_DIR") or "~/.d4rl/datasets").expanduser()
    path, part = folder / file_name, folder / f"{file_name}.part"
    url = (os.environ.get("D4RL_MIRROR") or D4RL_URL).rstrip("/") + "/" + file_name
    if path.exists():
        return path
    print(f"{url} -> {path}", flush=True)
    for _ in range(20):
        had = part.stat().st_size if part.exists() else 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            transfer(url, part)
        except (OSError, ValueError, http.client.HTTPException) as error:
            problem = str(error).removeprefix("<urlopen error ").removesuffix(">")
            if part.exists() and part.stat().st_size > had:
                continue  # it brought something
            break
        try:
            h5py.File(part).close()  # raises OSError if the file is cut or is something else
            return part.replace(path)
        except OSError:
            part.unlink()
            problem = "what comes from there is no HDF5 file"
            if not had:
                break
    kept = " (what came is kept)" if part.exists() else ""
    raise SystemExit(
        f"No D4RL data from {url}: {problem}. Try again later{kept}, name a mirror in D4RL_MIRROR,"
        f" or put {file_name} into {folder} (D4RL_DATASET_DIR) by hand."
    )


def transfer(url: str, part: Path) -> None:
    """Appends to `part` what it lacks of a file; begins anew where `part` is of another file or the
    server cannot go on in the middle."""
    had = part.stat().st_size if part.exists() else 0
    again = min(had, 65_536)  # bytes asked for once more: they tell whether the part fits
    request = urllib.request.Request(url, headers={"Range": f"bytes={had - again}-"} if had else {})
    fits = True
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            length = answer.headers["Content-Length"]
            if answer.status != 206:  # the whole file comes
                had = again = 0
            with open(part, "r+b" if had else "w+b") as file:
                file.seek(had - again)
                fits = file.read(again) == answer.read(again)
                if fits:
                    receive(answer, file, int(length) + had - again if length else None)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # it has fewer bytes than the part
            raise
        fits = False
    if not fits:
        part.unlink()
        transfer(url, part)


def receive(answer, file, total: int | None) -> None:
    """The rest of an answer, with a progress bar; on no terminal a line now and then."""
    rare = 0.5 if sys.stderr.isatty() else 30
    options = dict(unit="B", unit_scale=True, mininterval=rare, desc="D4RL")
    with tqdm(total=total, initial=file.tell(), **options) as bar:
        while block := answer.read(1 << 18):
            file.write(block)
            bar.update(len(block))
    if total and file.tell() != total:
        raise OSError(f"the transfer broke off after {file.tell():,} of {total:,} bytes")


def fetch(name: str) -> None:
    """One of D4RL's data sets in our layout, with the ends of episodes that its file leaves out."""
    path, env_id, began = download(D4RL[name]), environment_of(name), time.time()
    env = make_env(env_id)
    sizes = {"observations": env.observation_space.shape[0], "actions": env.action_space.shape[0]}
    sizes |= {"next_observations": sizes["observations"]}

    def check(holds, what):
        if not holds:
            way_out = f"{path} is not D4RL's: {what}. Delete it; the same command fetches it anew."
            raise SystemExit(way_out)

    try:
        with h5py.File(path) as file:
            needs = ("observations", "actions", "rewards", "terminals")
            lacks = [key for key in needs if key not in file]
            check(not lacks, f"it lacks {', '.join(lacks)}")
            data = {key: np.asarray(file[key]) for key in COLUMNS if key in file}
    except (OSError, TypeError, ValueError) as error:
        check(False, f"it cannot be read, {error}")
    n = np.size(data["terminals"])
    data.setdefault("timeouts", np.zeros(n))
    for key, rows in data.items():
        due = (n, sizes[key]) if key in sizes else (n,)
        check(rows.dtype.kind in "fiub", f"'{key}' is of type {rows.dtype}")
        if "obs" in key and rows.ndim == 2 and not rows[:, due[1] :].any():
            rows = rows[:, : due[1]]  # Ant's contact forces: zero in D4RL's files, absent in -v4
        check(n and rows.shape == due, f"'{key}' has the shape {rows.shape}, not {due}")
        check(np.isfinite(rows).all(), f"'{key}' is NaN or infinite")
        data[key] = rows.astype(bool if key in ("terminals", "timeouts") else np.float32)
    data, recovered = mend(data, env.spec.max_episode_steps)
    print(f"{name}: {recovered:,} ends of episodes recovered, which D4RL's file does not mark")
    how = f"D4RL's {path.name}, {recovered:,} unmarked ends of episodes recovered"
    write(name, data, env_id, how, time.time() - began)


def mend(data: Data, limit: int) -> tuple[Data, int]:
    """The data with a timeout wherever an episode ends unmarked, and their number: D4RL's replay
    files leave some out. The file's last row ends an episode, too, and is not counted."""
    s, marked = data["observations"], data["terminals"] | data["timeouts"]
    ends = marked.copy()
    ends[-1] = True
    if "next_observations" in data:  # the next row is not the successor, up to rounding
        follows = np.isclose(data["next_observations"][:-1], s[1:], rtol=1e-5, atol=1e-6).all(1)
        ends[:-1] |= ~follows
    else:  # the next row looks like those that episodes begin with, this one does not
        known = data["terminals"] if data["terminals"].sum() >= 20 else marked
        first = s[np.append(True, known[:-1])]
        spread = np.abs(first - first.mean(0)).max(0)
        alike = (np.abs(s - first.mean(0)) <= 1.5 * spread).all(1) & (len(first) >= 20)
        ends[:-1] |= alike[1:] & ~alike[:-1]
    starts = np.maximum.accumulate(np.where(np.append(True, ends[:-1]), np.arange(len(s)), 0))
    ends |= (np.arange(len(s)) - starts + 1) % limit == 0
    recovered = int((ends & ~marked)[:-1].sum())
    return data | {"timeouts": ends & ~data["terminals"]}, recovered


# -------------------------------------------------------------------------------- What is there


def names_there() -> list[str]:
    """The files that are there: the levels in their order, then other mixtures."""
    there = {path.stem for path in FOLDER.glob("*.hdf5")} - ASKED.keys()
    return [name for name in KNOWN if name in there] + sorted(there - set(KNOWN))


def show_list() -> None:
    """Every data set there is or could be, and how it comes."""
    there = names_there()
    print(
        f"{'data set':34}{'how it comes':32}{'transitions':>12}{'episodes':>10}{'mean return':>13}"
    )
    for name in KNOWN + [name for name in there if name not in KNOWN]:
        task, _, level = name.partition("-")
        rolled = {"random": "random actions"} | dict.fromkeys(DEMONSTRATIONS, "a controller")
        if name in REWARDED and name not in there:
            continue  # six of each of the others: the last line says it
        how = rolled.get(level, f"policies/{task}.pt, rolled out")
        how = f"policies/{WALKER}.pt, rolled out" if name == "ant-medium" else how
        how = "mixture" if level in MIXTURES or name not in KNOWN else how
        how = "OGBench's recipe" if name in GOALS or name in REWARDED else how
        how = "babyai.py, demonstrated" if name in BABYAI else how
        how = f"{ASKED[name]}.py, asked" if name in ASKED else how
        how = "metaworld_arm.py, demonstrated" if name in METAWORLD else how
        how = {PIXELS: "pixels.py, drawn", SCENE: "scene.py, demonstrated"}.get(name, how)
        how = "ships" if name in SHIPPED else "D4RL's, downloaded" if name in D4RL else how
        line = f"{name:34}{how:32}"
        if name in there:
            with h5py.File(path_of(name)) as file:
                keys = ("rewards", "terminals", "timeouts")
                starts, returns = episodes_of({key: file[key][()] for key in keys})
            line += f"{starts[-1]:12,}{len(returns):10,}{returns.mean():13.1f}"
        print(line.rstrip())
    tasks = f"-singletask and -singletask-task1 to -task{len(SINGLETASKS) - 1}"
    print(f"Each of {GOALS[0]} to {GOALS[-1]} can have rewards: with {tasks} behind its name.")


def card_table() -> str:
    """The tables of the data card, one for each task, from the files of ours that are there."""
    head = "data set|transitions|episodes|mean|min|25 %|median|75 %|max|MB|s to make"
    head = f"| {head.replace('|', ' | ')} |\n|---|{'--:|' * 10}\n"
    rows, made = {}, {}  # task -> lines
    # These have no policies to compare.
    others = {*D4RL, *GOALS, *REWARDED, PIXELS, SCENE, *BABYAI, *METAWORLD}
    for name in [name for name in names_there() if name not in others]:
        data, attributes = read(name)
        _, returns = episodes_of(data)
        numbers = [f"{len(data['rewards']):,}", f"{len(returns):,}", f"{returns.mean():.0f}"]
        numbers += [f"{x:.0f}" for x in np.percentile(returns, (0, 25, 50, 75, 100))]
        seconds = "-" if name in BUFFERS else f"{attributes['seconds']:.1f}"
        numbers += [f"{path_of(name).stat().st_size / 1e6:.1f}", seconds]
        task, level = name_of(attributes["env_id"]).partition("-")[0], name.partition("-")[2]
        rows.setdefault(task, []).append(f"| `{name}` | {' | '.join(numbers)} |\n")
        made.setdefault(task, []).append(f"- `{level}`: {attributes['description']}\n")
    parts = (f"### {t}\n\n{head}{''.join(rows[t])}\n{''.join(made[t])}" for t in rows)
    return "\n".join(parts)


def write_card() -> None:
    begin, end = "<!-- table: begin -->\n", "<!-- table: end -->"
    head, rest = (FOLDER / "README.md").read_text().split(begin)
    (FOLDER / "README.md").write_text(head + begin + card_table() + end + rest.split(end)[1])


def main(args: Args) -> None:
    torch.set_num_threads(1)  # the networks are small, and several of these may run at once
    if args.list:
        show_list()
    elif args.card:
        write_card()
    elif args.from_sac:
        from_sac(args)
    elif args.mix:
        shares = parse_mix(args.mix)
        if not args.name or args.name in KNOWN:
            raise SystemExit(f"--name '{args.name}': give the mixture a name of its own.")
        make_mixture(args.name, shares, args)
        if args.format == "minari":
            write_minari(args.name, args.overwrite)
    elif not args.names:
        raise SystemExit("Name a data set, or pass --list, --mix or --help.")
    everything = args.names == ["all"]
    for name in OURS if everything else args.names:
        there = path_of(name).exists() and (everything or args.format == "minari")
        if not there:
            make(name, args)
        if args.format == "minari":
            write_minari(name, args.overwrite)


if __name__ == "__main__":
    main(tyro.cli(Args))
