"""Makes this project's data sets.

    python datasets/make.py --list
    python datasets/make.py hopper-medium hopper-medium-expert
    python datasets/make.py all
    python datasets/make.py hopper-medium --format minari
    python datasets/make.py --mix hopper-random:0.9,hopper-expert:0.1 --name hopper-random-expert-10

Every transition comes from a simulator. `random` takes uniformly random actions; `medium` and
`expert` are rolled out from the SAC policies in datasets/policies, drawn from their stochastic
policy as D4RL does; `medium-replay` is SAC's replay buffer (Hopper, Pendulum: it ships) or rollouts
of snapshots taken evenly on the way to the medium policy; everything else mixes those by whole
episodes. What is there already is never overwritten unless --overwrite says so.
"""

import csv
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import gymnasium as gym
import h5py
import numpy as np
import torch
import tyro

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "algorithms"))
import sac  # noqa: E402  its policy acts, its table has D4RL's reference returns

TASKS = {  # name: environment, transitions of each level
    "hopper": ("Hopper-v5", 200_000),
    "halfcheetah": ("HalfCheetah-v5", 200_000),
    "walker2d": ("Walker2d-v5", 200_000),
    "pendulum": ("Pendulum-v1", 20_000),
}
SHIPPED = ("hopper-medium-replay", "pendulum-medium-replay")
MIXTURES = {  # in equal numbers of transitions
    "medium-expert": ("medium", "expert"),
    "random-medium": ("random", "medium"),
    "random-expert": ("random", "expert"),
    "random-medium-expert": ("random", "medium", "expert"),
}
LEVELS = ("random", "medium", "medium-replay", "expert", *MIXTURES)
COLUMNS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")

Data = dict[str, np.ndarray]  # the columns above, N rows each, actions in the environment's bounds


@dataclass
class Args:
    """Makes data sets by name, mixes them, lists them."""

    names: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """data sets to make, or: all"""
    list: bool = False
    """show every data set that can be made, and what is there"""
    mix: str = ""
    """parts and their shares of the transitions, e.g. hopper-random:0.9,hopper-expert:0.1"""
    name: str = ""
    """name of the mixture"""
    transitions: int = 0
    """size of the mixture; 0: as much as its parts allow"""
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
    """hopper, halfcheetah, walker2d or pendulum"""
    medium_step: int = 0
    """environment step of the medium policy; 0: the first whose evaluation passes a third of the
    expert's return"""
    expert_step: int = 0
    """environment step of the expert policy; 0: the last"""
    replay_steps: int = 0
    """length of the replay set; 0: up to the medium policy"""


def split(name: str) -> tuple[str, str]:
    """hopper-medium-replay -> hopper, medium-replay."""
    task, _, level = name.partition("-")
    if task not in TASKS or level not in LEVELS:
        raise SystemExit(
            f"No data set '{name}'. There are {', '.join(TASKS)}, each with -{', -'.join(LEVELS)};"
            f" other mixtures with --mix."
        )
    return task, level


def episodes_of(data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Number of each row's episode (N,), return of each episode (E,)."""
    ends = data["terminals"].astype(bool) | data["timeouts"].astype(bool)
    number = np.cumsum(ends) - ends
    return number, np.bincount(number, weights=data["rewards"])


def read(name: str) -> tuple[Data, dict]:
    with h5py.File(FOLDER / f"{name}.hdf5") as file:
        data = {key: file[key][()] for key in COLUMNS if key != "next_observations"}
        successors = np.roll(data["observations"], -1, axis=0)
        successors[data["terminals"] | data["timeouts"]] = file["final_observations"][()]
        return data | {"next_observations": successors}, dict(file.attrs)


def write(name: str, data: Data, attributes: dict, overwrite: bool) -> None:
    path = FOLDER / f"{name}.hdf5"
    if path.exists() and not overwrite:
        raise SystemExit(f"{path} exists; --overwrite replaces it.")
    # A successor is the next row, but for the last of an episode: storing only those keeps every
    # one of them at half the size. Readers that know nothing of it see D4RL's layout.
    ends = data["terminals"].astype(bool) | data["timeouts"].astype(bool)
    stored = {key: data[key] for key in COLUMNS if key != "next_observations"}
    stored["final_observations"] = data["next_observations"][ends]
    with h5py.File(path.with_suffix(".tmp"), "w") as file:
        for key, values in stored.items():
            kind = bool if key in ("terminals", "timeouts") else np.float32
            options = dict(compression="gzip", compression_opts=9, shuffle=True)
            file.create_dataset(key, data=values.astype(kind), **options)
        file.attrs.update(attributes)
    path.with_suffix(".tmp").replace(path)
    returns = episodes_of(data)[1]
    print(
        f"{name}: {len(data['rewards']):,} transitions, {len(returns):,} episodes of return"
        f" {returns.mean():.1f} (mean), {returns.max():.1f} (best);"
        f" {path.stat().st_size / 1e6:.1f} MB"
    )


def load_policies(task: str) -> dict:
    path = FOLDER / "policies" / f"{task}.pt"
    if not path.exists():
        raise SystemExit(f"No policies of {task}: {path} is missing (made by --from-sac).")
    return torch.load(path, weights_only=True)


def policy_at(policies: dict, step: int) -> sac.Policy:
    state = {key: value.float() for key, value in policies["policies"][str(step)].items()}
    low = state["action_low"]
    blank = {"observations": torch.zeros(1, state["net.0.weight"].shape[1]), "actions": low}
    bounds = {"action_low": low, "action_high": state["action_high"]}
    policy = sac.Policy(blank | bounds, state["net.0.weight"].shape[0])
    policy.load_state_dict(state)
    return policy


def roll_out(env_id: str, policy: sac.Policy | None, n: int, seed: int, envs: int = 10) -> Data:
    """n transitions of a policy, or of uniformly random actions. Every environment has the same
    quota of steps: stopping all at the n-th transition instead would favour short episodes. The
    last episode of each is cut there and counts as timed out."""
    steps = -(-n // envs)
    mode = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    vector = gym.make_vec(env_id, envs, vectorization_mode="sync", vector_kwargs=mode)
    vector.action_space.seed(seed)
    torch.manual_seed(seed)
    rows = {key: [] for key in COLUMNS}
    s, _ = vector.reset(seed=seed)
    for step in range(steps):
        if policy is None:
            a = vector.action_space.sample()
        else:
            a = policy.act(torch.as_tensor(s, dtype=torch.float32), sample=True).numpy()
        s_next, r, terminated, truncated, info = vector.step(a)
        successor = s_next.copy()  # s_next is the first state of a new episode where one ended
        for i in np.flatnonzero(terminated | truncated):
            successor[i] = info["final_obs"][i]
        timeout = (truncated | (step == steps - 1)) & ~terminated
        for key, value in zip(COLUMNS, (s.copy(), a, r, successor, terminated, timeout)):
            rows[key].append(value)
        s = s_next
    vector.close()
    # (steps, envs, ...) -> environment after environment, so that episodes are contiguous
    data = {key: np.swapaxes(np.stack(value), 0, 1) for key, value in rows.items()}
    data = {key: value.reshape(envs * steps, *value.shape[2:])[:n] for key, value in data.items()}
    data["timeouts"][-1] = not data["terminals"][-1]
    return data


def join(parts: list[Data]) -> Data:
    return {key: np.concatenate([part[key] for part in parts]) for key in COLUMNS}


def mix(parts: list[Data], shares: list[float], n: int, seed: int) -> Data:
    """Whole episodes of every part, in their shares of n transitions (0: the most the parts allow),
    shuffled."""
    most = min(len(part["rewards"]) / share for part, share in zip(parts, shares))
    if n > most:
        raise SystemExit(f"--transitions {n:,}: these parts allow {int(most):,} in these shares.")
    rng, chosen = np.random.default_rng(seed), []
    for part, share in zip(parts, shares):
        number, _ = episodes_of(part)
        starts = np.searchsorted(number, np.arange(number[-1] + 2))
        lengths, order = np.diff(starts), rng.permutation(number[-1] + 1)
        total = np.cumsum(lengths[order])
        last = np.abs(total - share * (n or most)).argmin()  # nearest to the share
        slices = [slice(starts[e], starts[e + 1]) for e in order[: last + 1]]
        chosen += [{key: part[key][rows] for key in COLUMNS} for rows in slices]
    return join([chosen[i] for i in rng.permutation(len(chosen))])


def references(task: str) -> tuple[float, float]:
    """Returns that score 0 and 100: D4RL's, or a random and the expert policy's."""
    policies = load_policies(task)
    own = policies["random_return"], policies["returns"][str(policies["steps"]["expert"])]
    return sac.REFERENCES.get(TASKS[task][0].split("-v")[0], own)


def make(name: str, args: Args) -> None:
    """Makes one data set and, first, the parts it needs."""
    task, level = split(name)
    env_id, n = TASKS[task]
    if name in SHIPPED:
        raise SystemExit(f"{name} ships with the project: `git checkout datasets/{name}.hdf5`.")
    began = time.time()
    if level in MIXTURES:
        names = [f"{task}-{part}" for part in MIXTURES[level]]
        parts = [ensure(part, args) for part in names]
        data = mix(parts, [1 / len(parts)] * len(parts), 0, args.seed)
        how = f"equal numbers of transitions of {', '.join(names)}, whole episodes, shuffled"
    elif level == "random":
        data, how = roll_out(env_id, None, n, args.seed), "uniformly random actions"
    elif level == "medium-replay":
        policies, parts = load_policies(task), []
        steps = policies["steps"]["replay"]
        for i, step in enumerate(steps):
            parts.append(
                roll_out(env_id, policy_at(policies, step), n // len(steps), args.seed + i)
            )
        data, how = join(parts), f"rollouts of SAC snapshots at steps {', '.join(map(str, steps))}"
    else:
        policies = load_policies(task)
        step = policies["steps"][level]
        # Other seeds than the other levels, so that no two share their first states.
        seed = args.seed + 100 * LEVELS.index(level)
        data = roll_out(env_id, policy_at(policies, step), n, seed)
        how = f"rollouts of the SAC policy of step {step:,}, actions sampled"
    write(name, data, describe(task, how, time.time() - began), args.overwrite)


def describe(task: str, how: str, seconds: float) -> dict:
    env = gym.make(TASKS[task][0])
    low, high = references(task)
    return {
        "env_id": TASKS[task][0],
        "ref_min_score": low,
        "ref_max_score": high,
        "action_low": env.action_space.low,
        "action_high": env.action_space.high,
        "description": how,
        "seconds": round(seconds, 1),
    }


def ensure(name: str, args: Args) -> Data:
    if not (FOLDER / f"{name}.hdf5").exists():
        make(name, args)
    return read(name)[0]


def make_mixture(args: Args) -> None:
    """--mix and --name."""
    try:
        pairs = [part.rsplit(":", 1) for part in args.mix.split(",")]
        names, shares = [name for name, _ in pairs], [float(share) for _, share in pairs]
    except ValueError:
        raise SystemExit(f"--mix {args.mix}: write name:share,name:share.") from None
    if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise SystemExit(f"--mix: the shares are {shares}; they must be above 0 and sum to 1.")
    tasks = {split(name)[0] for name in names}
    if len(tasks) > 1:
        raise SystemExit(f"--mix: parts of different tasks ({', '.join(sorted(tasks))}).")
    taken = (FOLDER / f"{args.name}.hdf5").exists() and not args.overwrite
    if taken or not args.name:
        raise SystemExit(f"--name '{args.name}': give a new name, or --overwrite.")
    began = time.time()
    data = mix([ensure(name, args) for name in names], shares, args.transitions, args.seed)
    how = f"{args.mix}, shares of transitions, whole episodes, shuffled with seed {args.seed}"
    write(args.name, data, describe(tasks.pop(), how, time.time() - began), args.overwrite)


def write_minari(name: str) -> None:
    """The same data as the local Minari data set cleandgm/<name>-v0."""
    import minari
    from minari.data_collector import EpisodeBuffer

    data, attributes = read(name)
    number, _ = episodes_of(data)
    starts = np.searchsorted(number, np.arange(number[-1] + 2))
    buffers = []
    for i, (a, b) in enumerate(zip(starts[:-1], starts[1:])):
        last = data["next_observations"][b - 1 : b]
        buffers.append(
            EpisodeBuffer(
                id=i,
                observations=np.concatenate([data["observations"][a:b], last]),
                actions=data["actions"][a:b],
                rewards=data["rewards"][a:b],
                terminations=data["terminals"][a:b],
                truncations=data["timeouts"][a:b],
                infos={},
            )
        )
    dataset_id, env = f"cleandgm/{name}-v0", gym.make(attributes["env_id"])
    if dataset_id in minari.list_local_datasets():
        raise SystemExit(f"Minari has {dataset_id} already: `minari delete {dataset_id}` first.")
    box = env.observation_space
    minari.create_dataset_from_buffers(
        dataset_id,
        buffers,
        env=env,
        observation_space=gym.spaces.Box(box.low, box.high, dtype=np.float32),
        algorithm_name="SAC",
        author="CleanDGM",
        ref_min_score=float(attributes["ref_min_score"]),
        ref_max_score=float(attributes["ref_max_score"]),
        description=str(attributes["description"]),
    )
    print(
        f"{dataset_id}: {len(buffers):,} episodes in {minari.storage.get_dataset_path(dataset_id)}"
    )


def from_sac(args: Args) -> None:
    """Policies of a task, and its replay set if that ships, from a run of algorithms/sac.py."""
    if args.task not in TASKS:
        raise SystemExit(f"--task '{args.task}': one of {', '.join(TASKS)}.")
    run, (env_id, n) = Path(args.from_sac), TASKS[args.task]
    with open(run / "eval.csv") as file:
        returns = {int(row["step"]): float(row["return_mean"]) for row in csv.DictReader(file)}
    snapshots = sorted(int(path.stem) for path in (run / "policies").glob("*.pt"))
    expert = args.expert_step or snapshots[-1]
    data = roll_out(env_id, None, min(n, 50_000), seed=12345)
    random_return = float(episodes_of(data)[1].mean())
    low, high = sac.REFERENCES.get(env_id.split("-v")[0], (random_return, returns[expert]))
    past = [step for step in snapshots if returns[step] > low + (high - low) / 3]
    medium = args.medium_step or past[0]
    replay_steps = args.replay_steps or medium
    before = [step for step in snapshots if step <= replay_steps]
    picked = [before[i] for i in np.linspace(0, len(before) - 1, 20).round().astype(int)]
    replay = [] if f"{args.task}-medium-replay" in SHIPPED else sorted(set(picked))
    keep = sorted({medium, expert, *replay})
    states = {s: torch.load(run / "policies" / f"{s:08d}.pt", weights_only=True) for s in keep}
    (FOLDER / "policies").mkdir(exist_ok=True)
    torch.save(
        {
            "env_id": env_id,
            "random_return": random_return,
            "steps": {"medium": medium, "expert": expert, "replay": replay},
            "returns": {str(s): returns[s] for s in keep},
            "policies": {str(s): {k: v.half() for k, v in states[s].items()} for s in keep},
        },
        FOLDER / "policies" / f"{args.task}.pt",
    )
    print(f"{args.task}: medium {medium:,} of return {returns[medium]:.0f}")
    print(f"{args.task}: expert {expert:,} of return {returns[expert]:.0f}")
    if f"{args.task}-medium-replay" in SHIPPED:
        with h5py.File(run / "replay.hdf5") as file:
            data = {key: file[key][:replay_steps] for key in COLUMNS}
        data["timeouts"][-1] = not data["terminals"][-1]
        how = f"the first {replay_steps:,} transitions of the replay buffer of algorithms/sac.py"
        write(f"{args.task}-medium-replay", data, describe(args.task, how, 0.0), args.overwrite)


def row_of(name: str) -> str:
    """The data card's line."""
    data, attributes = read(name)
    returns = episodes_of(data)[1]
    quantiles = " | ".join(f"{x:.0f}" for x in np.percentile(returns, (0, 25, 50, 75, 100)))
    size = (FOLDER / f"{name}.hdf5").stat().st_size / 1e6
    seconds = "-" if name in SHIPPED else f"{attributes['seconds']:.1f}"
    return (
        f"| `{name}` | {len(data['rewards']):,} | {len(returns):,} | {returns.mean():.0f} |"
        f" {quantiles} | {size:.1f} | {seconds} | {attributes['description']} |"
    )


def names_there() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.hdf5"))


def card() -> None:
    begin, end = "<!-- table: begin -->\n", "<!-- table: end -->"
    text = (FOLDER / "README.md").read_text()
    head, rest = text.split(begin)
    known = [f"{task}-{level}" for task in TASKS for level in LEVELS]
    rows = [row_of(name) for name in known if (FOLDER / f"{name}.hdf5").exists()]
    table = [
        "| data set | transitions | episodes | mean return | min | 25 % | median | 75 % | max |"
        " MB | s to make | how |",
        "|---|" + "--:|" * 10 + "---|",
    ]
    table = "\n".join([*table, *rows]) + "\n"
    (FOLDER / "README.md").write_text(head + begin + table + end + rest.split(end)[1])


def main(args: Args) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if args.list:
        there = names_there()
        for task in TASKS:
            for name in (f"{task}-{level}" for level in LEVELS):
                how = "ships" if name in SHIPPED else f"`python datasets/make.py {name}`"
                print(f"{name:34s}{'here' if name in there else how}")
        other = [name for name in there if name.split("-", 1)[-1] not in LEVELS]
        print("other mixtures here:", ", ".join(other) or "none")
    elif args.from_sac:
        from_sac(args)
    elif args.card:
        card()
    elif args.mix:
        make_mixture(args)
    elif not args.names:
        raise SystemExit("Name a data set, or pass --list, --mix or --help.")
    names = args.names
    if names == ["all"]:
        names = [f"{task}-{level}" for task in TASKS for level in LEVELS]
        names = [name for name in names if not (FOLDER / f"{name}.hdf5").exists()]
    for name in names:
        if args.format == "hdf5" or not (FOLDER / f"{name}.hdf5").exists():
            make(name, args)
        if args.format == "minari":
            write_minari(name)


if __name__ == "__main__":
    main(tyro.cli(Args))
