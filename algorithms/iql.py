"""IQL, "Offline Reinforcement Learning with Implicit Q-Learning"
Ilya Kostrikov, Ashvin Nair, Sergey Levine. ICLR 2022, arXiv:2110.06169.

Every other file asks Q about actions of its policy, which the data may not have. IQL never does. V
is an upper expectile of Q over the data's own actions, close to the best action the data shows in
a state; Q bootstraps from V; and the policy clones the data, each action weighted by its advantage.

    u      = min_i Q'_i(s, a) - V(s)
    L(V)   = |τ - 1(u < 0)| u²                              τ > 0.5: V above the mean of Q
    L(π)   = -min(exp(β u), 100) log π(a|s)                 advantage-weighted cloning
    y      = r + γ (1 - d) V(s'),   L(Q_i) = (Q_i(s, a) - y)²

τ = 0.5 and β = 0 make it behaviour cloning beside a critic of the data's own policy.

    python algorithms/iql.py --dataset hopper-medium-replay
    python algorithms/iql.py --dataset hopper-random-medium-expert --expectile 0.9 --beta 10

Measured: pendulum-random-medium-expert, 4,000 steps of small networks, five seeds: score 96.6, with
τ = 0.5 and β = 0 41.5; ten seconds on one CPU thread. On hopper-medium-replay 26 after 30,000
steps and rising, one seed.

Differs from the paper / official code:
- Rewards are divided by the spread of the episodes' returns and multiplied by 1000, as the official
  code does on locomotion data; --no-normalize-returns leaves them (AntMaze: the code subtracts 1).
- V, π and Q take their steps together, from one evaluation of V; the official code lets π and Q see
  the V of one step later.
- The policy's deviation is one number per action dimension, as in the code; it acts by its mean.
- The policy's learning rate falls to 0 along a cosine, as in the code; over --decay-steps, which
  a shorter run does not shorten.
- The dropout that the paper uses on Adroit and Kitchen is left out.
"""

import copy
import csv
import functools
import http.client
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """IQL: expectile regression instead of a maximum, advantage-weighted cloning."""

    expectile: float = 0.7
    """τ of the value's loss, in (0, 1); 0.5 is the mean, AntMaze has 0.9"""
    beta: float = 3.0
    """β, inverse temperature of the cloning weights; 0 is behaviour cloning, AntMaze has 10"""
    max_weight: float = 100.0
    """largest cloning weight"""
    normalize_returns: bool = True
    """scale rewards so that the episodes' returns span 1000"""
    gamma: float = 0.99
    """discount per step"""
    tau: float = 0.005
    """share of the new parameters in a target network's update"""
    steps: int = 1_000_000
    """gradient steps"""
    batch_size: int = 256
    """transitions per gradient step"""
    hidden_dim: int = 256
    """units in each of the two hidden layers"""
    learning_rate: float = 3e-4
    """Adam's step size; the policy's falls to 0 along a cosine"""
    decay_steps: int = 1_000_000
    """gradient steps in which the policy's step size falls to 0"""

    # The run: the same flags in every file.
    dataset: str = "hopper-medium-replay"
    """a name (ours), a name with -v2 (D4RL's), a Minari id, or a path to .hdf5, .npz or Minari"""
    env_id: str = ""
    """evaluation environment, also module:Id; empty: the dataset's; none: validation losses only"""
    seed: int = 0
    """seed of the networks, the batches and the evaluation"""
    seeds: tuple[int, ...] = ()
    """several seeds in one process, in run_dir/seed<k> each, the same as one by one"""
    eval_every: int = 5000
    """gradient steps between evaluations; the last step is always evaluated"""
    eval_episodes: int = 10
    """episodes per evaluation, all stepped together"""
    validation_fraction: float = 0.05
    """share of the episodes kept out of training, for the validation losses"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps; auto takes a GPU if there is one"""
    matmul_precision: Literal["highest", "high", "medium"] = "high"
    """float32 products: high is TF32 on CUDA, medium is bfloat16 also on CPUs that have AMX"""
    compile: bool = False
    """fuse the update's kernels with torch.compile"""
    cuda_graph: bool = True
    """on CUDA: capture the whole update in a graph; same numbers, far fewer launches"""
    run_dir: str = ""
    """where everything is written; empty: runs/<algorithm>/<dataset>/seed<seed>"""
    resume: bool = False
    """continue from the checkpoint in the run directory"""
    save_every: int = 50_000
    """gradient steps between checkpoints; the last step and Ctrl-C save too"""
    evaluate: str = ""
    """path of a checkpoint: evaluate it, no training"""
    capture_video: bool = False
    """record one evaluation episode as MP4 at the end"""


# ------------------------------------------------------------------------------------- Dataset

D4RL_URL = "http://rail.eecs.berkeley.edu/datasets/offline_rl/gym_mujoco_v2"
REFERENCES = {  # D4RL's returns of a random and of an expert policy: scores 0 and 100
    "HalfCheetah": (-280.178953, 12135.0),
    "Hopper": (-20.272305, 3234.3),
    "Walker2d": (1.629008, 4592.3),
    "Ant": (-325.6, 3879.7),
}


@dataclass
class Dataset:
    """N transitions, episode after episode. To bring arrays of your own, fill one of these."""

    name: str
    source: str
    env_id: str  # where to evaluate; "none": nowhere
    observations: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, A) float32, scaled to [-1, 1] from the bounds below
    rewards: np.ndarray  # (N, 1) float32
    next_observations: np.ndarray  # (N, S) float32, the successor, also at an episode's end
    terminals: np.ndarray  # (N, 1) float32: 1 where the task ended, so that nothing follows
    ends: np.ndarray  # (N,) bool: last step of an episode, by a terminal or by a time limit
    action_low: np.ndarray  # (A,) float32
    action_high: np.ndarray  # (A,) float32
    references: tuple[float, float]  # returns that score 0 and 100; NaN where there are none

    def __post_init__(self):
        self.episodes = np.cumsum(self.ends) - self.ends  # (N,) the number of each row's episode
        self.returns = np.bincount(self.episodes, weights=self.rewards[:, 0])  # (E,)

    def tensors(self, rows: np.ndarray, device: torch.device) -> dict[str, torch.Tensor]:
        """What a learner is given: the chosen rows of every array, and the bounds, (1, A) each."""
        names = ("observations", "actions", "rewards", "next_observations", "terminals", "episodes")
        arrays = {name: getattr(self, name)[rows] for name in names}
        arrays |= {"action_low": self.action_low[None], "action_high": self.action_high[None]}
        return {name: torch.as_tensor(array, device=device) for name, array in arrays.items()}


def load_dataset(name: str, env_id: str = "") -> Dataset:
    """Finds, downloads, reads and checks a data set; raises SystemExit with one clear sentence."""

    def refuse(what):
        raise SystemExit(f"Data set '{name}': {what}")

    # Where it is: a path, a file of ours, one of D4RL's, one of Minari's.
    places = [Path(__file__).resolve().parents[1] / "datasets", Path("datasets")]
    paths = [path for path in (Path(name), *(p / f"{name}.hdf5" for p in places)) if path.exists()]
    d4rl = re.fullmatch("(halfcheetah|hopper|walker2d|ant)-([a-z-]+)-v2", name)
    if paths:
        raw, meta = (read_minari if paths[0].is_dir() else read_flat)(paths[0])
        source = str(paths[0])
    elif d4rl:
        raw, meta = read_flat(download(f"{d4rl[1]}_{d4rl[2].replace('-', '_')}-v2.hdf5"))
        task = next(key for key in REFERENCES if key.lower() == d4rl[1])
        meta["env_id"], source = f"{task}-v4", "D4RL"  # -v4 has the dynamics of D4RL's -v2
    elif re.fullmatch(r"([\w-]+/)*[\w-]+-v\d+", name):
        (raw, meta), source = read_minari(name), "Minari"
    else:
        known = sorted({file.stem for place in places for file in place.glob("*.hdf5")})
        refuse(
            f"no such file or name. At hand: {', '.join(known) or 'none'}. `python datasets/make.py"
            f" --list` shows those it can make; hopper-medium-v2 is D4RL's, ids like"
            f" mujoco/hopper/expert-v0 are Minari's."
        )

    # What the file says of its environment; the environment itself knows better.
    env_id = env_id or meta.get("env_id", "none")
    low, high, limit = meta.get("action_low", -1.0), meta.get("action_high", 1.0), None
    if env_id != "none":
        env = make_env(env_id)
        low, high, limit = env.action_space.low, env.action_space.high, env.spec.max_episode_steps
        dims = env.observation_space.shape, env.action_space.shape
        env.close()
    reference = REFERENCES.get(env_id.split("-v")[0], (math.nan, math.nan))
    reference = meta.get("ref_min_score", reference[0]), meta.get("ref_max_score", reference[1])

    # Whether it can be learnt from.
    missing = {"observations", "actions", "rewards", "terminals"} - raw.keys()
    if missing:
        refuse(f"it lacks {', '.join(sorted(missing))}; it has {', '.join(sorted(raw)) or 'none'}.")
    n = len(raw["observations"])
    if n == 0:
        refuse("it is empty.")
    if np.issubdtype(raw["actions"].dtype, np.integer):
        refuse("its actions are discrete (integers), this algorithm needs continuous ones.")
    raw.setdefault("timeouts", np.zeros(n))
    last = (raw["terminals"] > 0) | (raw["timeouts"] > 0)
    rows = {key: n for key in ("observations", "actions", "rewards", "terminals", "timeouts")}
    rows |= {"next_observations": n} if "next_observations" in raw else {}
    rows |= {"final_observations": last.sum()} if "final_observations" in raw else {}
    for key, number in rows.items():
        if len(raw[key]) != number:
            refuse(f"'{key}' has {len(raw[key])} rows, 'observations' has {n} ({number} due).")
        raw[key] = raw[key].reshape(number, -1).astype(np.float32)
        if "observations" in key and raw[key].shape[1:] != raw["observations"].shape[1:]:
            refuse(f"'{key}' has rows of another size than 'observations'.")
        bad = ~np.isfinite(raw[key]).all(axis=1)
        if bad.any():
            refuse(f"'{key}' is NaN or infinite, first at index {bad.argmax()}.")
    s, a, terminals = raw["observations"], raw["actions"], raw["terminals"][:, 0] > 0
    if env_id != "none" and (s.shape[1:], a.shape[1:]) != dims:
        shapes = f"states {s.shape[1:]} and actions {a.shape[1:]}, {env_id} has {dims}"
        refuse(f"it has {shapes}; name its environment with --env-id.")
    low, high = (np.broadcast_to(np.float32(x), a.shape[1:]).copy() for x in (low, high))
    if not np.isfinite(high - low).all():
        refuse(f"the actions of {env_id} are bounded by {low} and {high}; they must be finite.")
    outside = ((a < low - 1e-4) | (a > high + 1e-4)).any(axis=1)
    if outside.any():
        i = outside.argmax()
        refuse(f"action {a[i]} at index {i} is outside the bounds {low} to {high}.")

    if "final_observations" in raw:  # our files hold a successor once: in the next row, or here
        if not last.reshape(n)[-1]:
            refuse("its last row is no episode's end, so 'final_observations' cannot be placed.")
        raw["next_observations"] = np.append(s[1:], s[-1:], axis=0)
        raw["next_observations"][last.reshape(n)] = raw["final_observations"]

    # Where its episodes end. A terminal is the task's end, a timeout only the recording's: what
    # masks the bootstrap is the terminal alone, and nothing reaches across either.
    ends = terminals | (raw["timeouts"][:, 0] > 0)
    ends |= breaks(s, raw.get("next_observations"), terminals)
    starts = np.maximum.accumulate(np.where(np.append(True, ends[:-1]), np.arange(n), 0))
    ends |= (np.arange(n) - starts + 1) % (limit or n + 1) == 0
    keep = np.ones(n, bool)
    if "next_observations" not in raw:  # it is the next row; a timeout has none here, so drop it
        raw["next_observations"] = np.append(s[1:], s[-1:], axis=0)
        keep = terminals | ~ends
        if not keep.any():
            refuse("none of its rows has a successor.")
        ends[:-1] |= ~keep[1:]
    return Dataset(
        name=Path(name).stem if Path(name).suffix else name.rstrip("/"),
        source=source,
        env_id=env_id,
        observations=s[keep],
        actions=(2 * (a[keep] - low) / (high - low) - 1).clip(-1, 1),
        rewards=raw["rewards"][keep],
        next_observations=raw["next_observations"][keep],
        terminals=np.float32(terminals[keep, None]),
        ends=ends[keep],
        action_low=low,
        action_high=high,
        references=(float(reference[0]), float(reference[1])),
    )


def breaks(s, s_next, terminals):
    """Rows (N,) that the next row does not follow, whatever the file says: D4RL's medium-replay
    files leave out some timeouts."""
    if s_next is not None:
        return np.append(np.any(s_next[:-1] != s[1:], axis=1), True)
    # Without successors: the row before one that looks like those that episodes begin with.
    first = s[np.append(True, terminals[:-1])]
    spread = np.abs(first - first.mean(0)).max(0)
    alike = (np.abs(s - first.mean(0)) <= 1.5 * spread).all(1) & (len(first) >= 20)
    return np.append(alike[1:] & ~alike[:-1], True)


def read_flat(path: Path) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and attributes of an .hdf5 or .npz file in D4RL's flat layout."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as file:
                return dict(file), {}
        with h5py.File(path) as file:
            arrays = {key: item[()] for key, item in file.items() if isinstance(item, h5py.Dataset)}
            return arrays, dict(file.attrs)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise SystemExit(f"{path} cannot be read as .hdf5 or .npz: {error}") from None


def read_minari(name: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """Arrays and attributes of a Minari data set, by folder or by id (downloaded if need be)."""
    try:
        if isinstance(name, Path):
            data = minari.MinariDataset(name / "data" if (name / "data").is_dir() else name)
        else:
            data = minari.load_dataset(name, download=True)
        episodes = list(data.iterate_episodes())
        columns = {
            "observations": [episode.observations[:-1] for episode in episodes],
            "next_observations": [episode.observations[1:] for episode in episodes],
            "actions": [episode.actions for episode in episodes],
            "rewards": [episode.rewards for episode in episodes],
            "terminals": [episode.terminations for episode in episodes],
            "timeouts": [episode.truncations for episode in episodes],
        }
        env_id = {"env_id": data.spec.env_spec.id} if data.spec.env_spec else {}
        return {k: np.concatenate(v) for k, v in columns.items()}, data.storage.metadata | env_id
    except Exception as error:  # no network, no such id, observations that are no flat array ...
        raise SystemExit(f"Minari cannot load '{name}': {error!r}") from None


def download(file_name: str) -> Path:
    """Path of a D4RL file in the d4rl package's cache folder (D4RL_DATASET_DIR moves it), fetched
    once from D4RL's server (D4RL_MIRROR names another) and begun anew after a broken transfer."""
    folder = Path(os.environ.get("D4RL_DATASET_DIR", Path.home() / ".d4rl" / "datasets"))
    path, part = folder / file_name, folder / f"{file_name}.part"
    url = os.environ.get("D4RL_MIRROR", D4RL_URL).rstrip("/") + "/" + file_name
    folder.mkdir(parents=True, exist_ok=True)
    problem = None
    for _ in range(0 if path.exists() else 3):
        try:
            torch.hub.download_url_to_file(url, str(part))  # shows a progress bar
            h5py.File(part).close()  # raises OSError if the file is cut or is something else
            return part.rename(path)
        except (OSError, ValueError, http.client.HTTPException) as error:
            problem = error
    if problem is not None:
        hint = f"name a mirror in D4RL_MIRROR, or put the file into {folder} by hand"
        raise SystemExit(f"No D4RL data from {url}: {problem}. Try again later, {hint}.")
    return path


def make_env(env_id: str, **options) -> gym.Env:
    """`gym.make`, with one clear sentence for what can go wrong."""
    try:
        env = gym.make(env_id, **options)
    except (gym.error.Error, ImportError) as error:
        raise SystemExit(f"Environment '{env_id}' (--env-id) cannot be made: {error}") from None
    if not all(isinstance(x, gym.spaces.Box) for x in (env.action_space, env.observation_space)):
        raise SystemExit(f"Environment '{env_id}' (--env-id): not all spaces are Box (continuous).")
    return env


# ------------------------------------------------------------------------------------ Networks


def mlp(in_dim: int, hidden_dim: int, out_dim: int, hidden_layers: int = 2) -> nn.Sequential:
    sizes = [in_dim] + [hidden_dim] * hidden_layers
    layers = [(nn.Linear(i, o), nn.ReLU(inplace=True)) for i, o in zip(sizes[:-1], sizes[1:])]
    return nn.Sequential(*sum(layers, ()), nn.Linear(hidden_dim, out_dim))


class Policy(nn.Module):
    """π: normalised states (B, S) -> mean (B, A) in [-1, 1] and log-deviation (A,)."""

    def __init__(self, data, hidden_dim):
        super().__init__()
        # Normalisation belongs to the policy, so that whoever has the policy has it too.
        self.register_buffer("state_mean", data["observations"].mean(0))
        self.register_buffer("state_std", data["observations"].std(0, correction=0) + 1e-3)
        self.register_buffer("action_low", data["action_low"])
        self.register_buffer("action_high", data["action_high"])
        self.net = mlp(len(self.state_mean), hidden_dim, self.action_low.shape[1])
        self.log_sigma = nn.Parameter(torch.zeros(self.action_low.shape[1]))

    def normalise(self, observations):
        return (observations - self.state_mean) / self.state_std

    def forward(self, s):
        return torch.tanh(self.net(s)), self.log_sigma.clamp(-5, 2)

    def log_prob(self, s, a):
        """log π(a|s) in nats, (B, 1)."""
        mu, log_sigma = self(s)
        log_prob = -0.5 * ((a - mu) / log_sigma.exp()).square() - log_sigma  # (B, A)
        return (log_prob - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)

    @torch.no_grad()
    def act(self, observations: torch.Tensor) -> torch.Tensor:
        """What a user calls: raw observations (N, S) -> actions (N, A) in the environment's
        bounds, the mean action."""
        a, _ = self(self.normalise(observations))
        return self.action_low + 0.5 * (a + 1) * (self.action_high - self.action_low)


class TwinCritic(nn.Module):
    """Q_1 and Q_2 as one batched network: states (B, S), actions (B, A) -> values (2, B, 1). With
    members=1 Q_1 alone, (1, B, 1), at half the cost."""

    def __init__(self, state_dim, action_dim, hidden_dim, hidden_layers=2):
        super().__init__()
        sizes = (state_dim + action_dim, *[hidden_dim] * hidden_layers, 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            bound = fan_in**-0.5  # as nn.Linear begins
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))

    def forward(self, s, a, members=2):
        x = torch.cat([s, a], dim=-1).expand(members, -1, -1)  # (2, B, S + A)
        weights, biases = list(self.weights), list(self.biases)
        if members == 1:  # to take both is no slice: its backward pass would copy all gradients
            weights, biases = [w[:1] for w in weights], [b[:1] for b in biases]
        for weight, bias in zip(weights[:-1], biases[:-1]):
            x = torch.baddbmm(bias, x, weight).relu_()  # (2, B, H)
        return torch.baddbmm(biases[-1], x, weights[-1])  # (2, B, 1)


# ----------------------------------------------------------------------------------- Algorithm


class IQL:
    """The learner. All it needs lives on the data's device, so one update is one CUDA graph."""

    def __init__(self, data: dict[str, torch.Tensor], args: Args):
        if not 0 < args.expectile < 1:
            raise SystemExit(f"--expectile {args.expectile}: between 0 and 1, both excluded.")
        self.args, device = args, data["rewards"].device
        state_dim, action_dim = data["observations"].shape[1], data["actions"].shape[1]
        self.policy = Policy(data, args.hidden_dim).to(device)
        self.q = TwinCritic(state_dim, action_dim, args.hidden_dim).to(device)
        self.v = mlp(state_dim, args.hidden_dim, 1).to(device)
        self.q_target = copy.deepcopy(self.q)
        normalised = ("observations", "next_observations")
        self.data = {**data, **{key: self.policy.normalise(data[key]) for key in normalised}}
        self.reward_scale = torch.ones((), device=device)
        if args.normalize_returns:
            # β u sits in an exponent, so β means something only at a known scale of returns.
            _, episodes = data["episodes"].unique(return_inverse=True)  # (N,) 0, ..., E - 1
            returns = torch.zeros(int(episodes.max()) + 1, device=device)
            returns.index_add_(0, episodes, data["rewards"][:, 0])  # (E,)
            self.reward_scale = 1000 / (returns.max() - returns.min()).clamp(min=1e-6)
        self.data["rewards"] = self.reward_scale * data["rewards"]

        # The policy's rate is a tensor, so that a captured update can change it.
        rate = torch.tensor(args.learning_rate, device=device)
        values = [*self.q.parameters(), *self.v.parameters()]
        self.optimizer = torch.optim.Adam(
            [{"params": values}, {"params": self.policy.parameters(), "lr": rate}],
            lr=args.learning_rate,
            fused=True,
            capturable=device.type == "cuda",
        )
        self.t = torch.zeros((), device=device)  # updates so far

    def phase(self, step: int):
        """The update to use at this step, and how many gradient steps one call of it takes."""
        return self.update, 1

    def update(self) -> dict[str, torch.Tensor]:
        """One step of V, Q and π together. Returns detached tensors, never synchronises."""
        losses, metrics = self.losses(*self.sample())
        rate = self.anneal()
        # Each loss has a gradient for one network only, so their sum's are the three losses' own.
        self.optimizer.zero_grad()
        (losses["v"] + losses["policy"] + losses["q"]).backward()
        self.optimizer.step()
        self.update_target()
        metrics |= {f"losses/{name}": loss.detach() for name, loss in losses.items()}
        return metrics | {"charts/policy_learning_rate": rate.clone()}

    def sample(self):
        device = self.data["rewards"].device
        i = torch.randint(len(self.data["rewards"]), (self.args.batch_size,), device=device)
        keys = ("observations", "actions", "rewards", "next_observations", "terminals")
        return [self.data[key][i] for key in keys]

    def losses(self, s, a, r, s_next, d):
        """The three losses, all with the V of before the step, and what is logged of them."""
        with torch.no_grad():
            q_target = self.q_target(s, a).amin(0)  # (B, 1), of the data's own actions
            v_next = self.v(s_next)  # (B, 1)

        # Expectile regression: where Q lies above V the error weighs τ, elsewhere 1 - τ. With
        # τ near 1 only the best of the data's actions hold V up: a maximum that asks no policy.
        v = self.v(s)  # (B, 1)
        u = q_target - v
        v_loss = (torch.where(u > 0, self.args.expectile, 1 - self.args.expectile) * u * u).mean()

        # Cloning, weighted: an action better than V counts up to 100 times, a worse one fades.
        u = u.detach()
        weight = (self.args.beta * u).exp().clamp(max=self.args.max_weight)  # (B, 1)
        policy_loss = -(weight * self.policy.log_prob(s, a)).mean()

        # Bootstrap from V: no action that the data lacks is ever asked for.
        # d is 1 at a terminal only: a time limit ends the episode, not the future.
        y = r + self.args.gamma * (1 - d) * v_next
        q = self.q(s, a)  # (2, B, 1)
        q_loss = (q - y).square().mean((1, 2)).sum()

        metrics = {"values/v": v.detach().mean(), "values/q": q.detach().mean()}
        metrics |= {"advantage/u": u}
        metrics |= {"advantage/clipped": (weight >= self.args.max_weight).float().mean()}
        return {"v": v_loss, "policy": policy_loss, "q": q_loss}, metrics

    def anneal(self):
        """The policy's step size, along a cosine from --learning-rate to 0."""
        self.t += 1
        done = (self.t / self.args.decay_steps).clamp(max=1)
        rate = self.optimizer.param_groups[1]["lr"]
        return rate.copy_(0.5 * self.args.learning_rate * (1 + (math.pi * done).cos()))

    @torch.no_grad()
    def update_target(self):
        target, online = list(self.q_target.parameters()), list(self.q.parameters())
        torch._foreach_lerp_(target, online, self.args.tau)

    def actors(self) -> dict:
        """Policies to evaluate, by suffix of their columns; the first one is the result."""
        return {"": self.policy.act}

    @torch.no_grad()
    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses on held-out transitions."""
        s, s_next = (self.policy.normalise(data[k]) for k in ("observations", "next_observations"))
        r = self.reward_scale * data["rewards"]
        losses, _ = self.losses(s, data["actions"], r, s_next, data["terminals"])
        return {f"validation/{name}": loss for name, loss in losses.items()}


Learner = IQL  # the name by which the training loop knows it

# ---------------------------------------------------------------------------------- Evaluation


def evaluate(learner, spec: dict, episodes: int, seed: int) -> dict[str, float]:
    """Return, length and score over `episodes` episodes, all stepped together. The first of the
    learner's policies is the result; the others' return and score get a suffix."""
    low, high = spec["references"]
    row = {}
    for suffix, act in learner.actors().items():
        envs = gym.make_vec(spec["env_id"], num_envs=episodes, vectorization_mode="sync")
        observations, _ = envs.reset(seed=seed)
        returns, lengths, running = np.zeros((3, episodes))
        running += 1  # until the episode's end, by a terminal or a time limit; then it is 0
        while running.any():
            actions = act(torch.as_tensor(observations, dtype=torch.float32, device=spec["device"]))
            observations, rewards, terminated, truncated, _ = envs.step(actions.cpu().numpy())
            returns += running * rewards
            lengths += running
            running *= ~(terminated | truncated)
        envs.close()
        row[f"return_mean{suffix}"] = float(returns.mean())
        if not suffix:
            row |= {"return_std": float(returns.std()), "length_mean": float(lengths.mean())}
        row[f"score{suffix}"] = float(100 * (returns.mean() - low) / (high - low))
    return row


def evaluate_checkpoint(args: Args, device: torch.device) -> dict[str, float]:
    """--evaluate: a policy from its checkpoint alone, without its data set."""
    if not Path(args.evaluate).is_file():
        raise SystemExit(f"--evaluate {args.evaluate}: no such checkpoint.")
    saved = torch.load(args.evaluate, map_location=device, weights_only=True)
    spec = saved["spec"] | {"device": device}
    spec["env_id"] = args.env_id or spec["env_id"]
    if spec["env_id"] == "none":
        raise SystemExit(f"--evaluate {args.evaluate}: it has no environment, name one: --env-id.")
    blank = {key: torch.zeros(shape, device=device) for key, shape in spec["shapes"].items()}
    learner = Learner(blank, Args(**saved["args"]))
    restore(learner, saved["learner"])
    torch.manual_seed(0)  # as in training, for a policy that samples
    row = {"step": saved["step"]} | evaluate(learner, spec, args.eval_episodes, args.seed)
    print(f"{args.evaluate} on {args.eval_episodes} episodes of {spec['env_id']}: {describe(row)}")
    if args.capture_video:
        record_video(learner.policy.act, spec, Path(args.evaluate).parent)
    return row


def record_video(act, spec: dict, folder: Path) -> None:
    """One episode as MP4. Where no display driver or no encoder is, it says so and goes on."""
    try:
        env = make_env(spec["env_id"], render_mode="rgb_array")
        env = gym.wrappers.RecordVideo(env, str(folder / "video"), disable_logger=True)
        observation, _ = env.reset(seed=0)
        done = False
        while not done:
            s = torch.as_tensor(observation[None], dtype=torch.float32, device=spec["device"])
            observation, _, terminated, truncated, _ = env.step(act(s)[0].cpu().numpy())
            done = terminated or truncated
        env.close()
    except Exception as error:
        print(f"No video: {error} (MuJoCo without a screen needs MUJOCO_GL=egl or osmesa)")


# ------------------------------------------------------------------------------- Training loop


def train(args: Args) -> list[dict[str, float]]:
    """Trains, or with --evaluate only evaluates. Returns the evaluations, oldest first; the last
    one's where --seeds names several."""
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(auto if args.device == "auto" else args.device)
    torch.set_float32_matmul_precision(args.matmul_precision)
    if args.evaluate:
        return [evaluate_checkpoint(args, device)]

    # Seeds take turns. A small network leaves most of a GPU idle: there they run side by side.
    interrupted, ended, lanes = [], [], {}
    for seed in args.seeds or [args.seed]:
        own = f"{args.run_dir}/seed{seed}" if args.seeds and args.run_dir else args.run_dir
        turns = run(replace(args, seed=seed, run_dir=own), device, interrupted)
        lanes[turns] = Lane(device)
        with lanes[turns]:
            next(turns)  # reads the data and makes the networks

    # Ctrl-C is heard between two updates, never inside one; a second one stops at once.
    handler = signal.getsignal(signal.SIGINT)
    listens = threading.current_thread() is threading.main_thread()

    def interrupt(*_):
        interrupted.append(True)
        signal.signal(signal.SIGINT, handler)

    if listens:
        signal.signal(signal.SIGINT, interrupt)
    try:
        while lanes:
            for turns, lane in list(lanes.items()):
                try:
                    with lane:
                        next(turns)
                except StopIteration as end:
                    history = end.value
                    del lanes[turns]
                except SystemExit as message:  # the others go on
                    ended.append(str(message))
                    del lanes[turns]
    finally:
        if listens:
            signal.signal(signal.SIGINT, handler)
    if ended:
        sys.exit("\n".join(ended))
    return history


class Lane:
    """What runs in one process must not share: random numbers and, on CUDA, the stream."""

    def __init__(self, device: torch.device):
        self.device, self.state = device, torch.get_rng_state()
        if device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            self.default = torch.cuda.default_generators[index]
            self.own, self.stream = self.default.clone_state(), torch.cuda.Stream(device)

    def __enter__(self):
        torch.set_rng_state(self.state)
        if self.device.type == "cuda":  # a graph keeps the generator that it was captured with
            self.default.graphsafe_set_state(self.own)
            self.context = torch.cuda.stream(self.stream)
            self.context.__enter__()

    def __exit__(self, *error):
        self.state = torch.get_rng_state()
        if self.device.type == "cuda":
            self.context.__exit__(*error)


def run(args: Args, device: torch.device, interrupted: list) -> Generator[None, None, list]:
    """Trains one seed and returns its evaluations. Yields when it is ready to begin, and then now
    and then between two updates, for other seeds to take their turn."""
    # The run directory: never overwritten, continued only on demand.
    name = Path(__file__).stem
    is_file = Path(args.dataset).suffix in (".hdf5", ".npz")
    task = Path(args.dataset).stem if is_file else args.dataset.strip("/").replace("/", "-")
    run_dir = Path(args.run_dir or f"runs/{name}/{task}/seed{args.seed}")
    checkpoint = run_dir / "checkpoint.pt"
    begun = (run_dir / "config.json").exists()
    if begun and not args.resume:
        raise SystemExit(f"{run_dir} holds a run: --resume continues it, --run-dir goes elsewhere.")
    if args.resume and not begun:
        raise SystemExit(f"--resume: no checkpoint in {run_dir}; start without --resume.")

    # The data: whole episodes to train on, some others for the validation losses.
    dataset = load_dataset(args.dataset, args.env_id)
    episodes = len(dataset.returns)
    held_out = min(episodes - 1, math.ceil(args.validation_fraction * episodes))
    chosen = np.random.default_rng(args.seed).permutation(episodes)[:held_out]
    held_out_rows = np.isin(dataset.episodes, chosen)
    data = dataset.tensors(~held_out_rows, device)
    validation = dataset.tensors(np.flatnonzero(held_out_rows)[:10_000], device)
    spec = {"name": dataset.name, "env_id": dataset.env_id, "references": dataset.references}
    spec |= {"shapes": {key: list(value[:1].shape) for key, value in data.items()}}
    print(
        f"{name} on {dataset.name} ({dataset.source}), evaluated on {dataset.env_id}\n"
        f"  {len(dataset.ends):,} transitions in {episodes:,} episodes of return"
        f" {dataset.returns.mean():.1f} (mean), {dataset.returns.max():.1f} (best);"
        f" {held_out:,} episodes are kept for validation\n"
        f"  {args.steps:,} steps on {device}; everything is written to {run_dir}"
    )

    # The learner, new or where an earlier run stopped.
    torch.manual_seed(args.seed)
    learner = Learner(data, args)
    step, seconds, history = 0, 0.0, []
    if args.resume and checkpoint.exists():  # a run that saved nothing yet begins anew
        saved = torch.load(checkpoint, map_location=device, weights_only=True)
        check_same(args, saved["args"])
        step, seconds, history = saved["step"], saved["seconds"], saved["history"]
        restore(learner, saved["learner"])
        torch.set_rng_state(saved["rng"].cpu())
        if device.type == "cuda":
            torch.cuda.set_rng_state(saved.get("cuda_rng", saved["rng"]).cpu(), device)

    write_config(run_dir, args, spec)
    writer = SummaryWriter(run_dir, purge_step=step + 1)
    fast = functools.cache(lambda update: accelerate(update, args, device))
    began, first, metrics = time.time() - seconds, step, {}
    bar = tqdm(total=args.steps, initial=step, unit="step", disable=not sys.stdout.isatty())
    label = f"seed {args.seed}  " if args.seeds else ""

    def due(period):  # whether the last update completed a multiple of `period`, or the run
        return step % period < n or step >= args.steps

    def save():
        check_finite(metrics, step, checkpoint)
        state = {"args": asdict(args), "spec": spec, "learner": snapshot(learner), "step": step}
        state |= {"seconds": time.time() - began, "history": history, "rng": torch.get_rng_state()}
        if device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(device)
        torch.save(state, run_dir / "checkpoint.tmp")
        (run_dir / "checkpoint.tmp").replace(checkpoint)  # at once: a crash leaves the old one

    try:
        yield
        while step < args.steps and not interrupted:
            update, n = learner.phase(step)
            metrics = fast(update)()
            step += n
            bar.update(n)
            if due(500):
                check_finite(metrics, step, checkpoint)
                for key, value in metrics.items():
                    add = writer.add_scalar if value.numel() == 1 else writer.add_histogram
                    add(key, value.cpu(), step)
                speed = (step - first) / (time.time() - began - seconds)
                writer.add_scalar("charts/steps_per_second", speed, step)
            if due(args.eval_every):
                row = {"step": step, "seconds": round(time.time() - began, 1)}
                with torch.random.fork_rng([device] if device.type == "cuda" else []):
                    torch.manual_seed(0)  # training's random numbers are not touched
                    if dataset.env_id != "none":
                        seed = 1_000_003 * args.seed + step
                        place = spec | {"device": device}
                        row |= evaluate(learner, place, args.eval_episodes, seed)
                    if held_out:
                        row |= {k: float(v) for k, v in learner.validate(validation).items()}
                history.append(row)
                write_history(run_dir, history)
                for key in list(row)[2:]:
                    writer.add_scalar(key if "/" in key else f"eval/{key}", row[key], step)
                best = max(row.get("return_mean", math.nan) for row in history)
                so_far = "" if math.isnan(best) else f"  (best return so far {best:.4g})"
                bar.write(label + describe(row) + so_far)
            if due(args.save_every):
                save()
            if due(10):
                yield
        if step < args.steps:
            save()
            sys.exit(f"\nSaved at step {step:,}; the same command with --resume goes on.")
    finally:
        bar.close()
        writer.close()
    if args.capture_video and dataset.env_id != "none":
        record_video(learner.policy.act, spec | {"device": device}, run_dir)
    print(f"Done after {(time.time() - began) / 60:.1f} minutes; results are in {run_dir}")
    return history


def accelerate(update, args: Args, device: torch.device):
    """The same update, faster: compiled on demand, and on CUDA captured in a graph, which replays
    its hundreds of kernels at the cost of one launch."""
    if args.compile:
        torch._inductor.config.fallback_random = True  # the random numbers of the eager update
        update = torch.compile(update)
    if device.type != "cuda" or not args.cuda_graph:
        return update
    side, graph, calls, metrics = torch.cuda.Stream(), torch.cuda.CUDAGraph(), 0, {}

    def replay():
        nonlocal calls, metrics
        calls += 1
        if calls <= 3:  # capture asks for some calls before it, off the default stream
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                metrics = update()
            torch.cuda.current_stream().wait_stream(side)
            return metrics
        if calls == 4:
            with torch.cuda.graph(graph):  # records the update, does not run it
                metrics = update()
        graph.replay()
        return metrics

    return replay


def snapshot(learner) -> dict:
    """State of a learner: of its networks and its optimisers, and its own tensors."""
    items = vars(learner).items()
    state = {key: item.state_dict() for key, item in items if hasattr(item, "state_dict")}
    return state | {key: item.detach() for key, item in items if isinstance(item, torch.Tensor)}


def restore(learner, state: dict) -> None:
    for key, value in state.items():
        item = getattr(learner, key)
        if isinstance(item, torch.Tensor):
            item.data.copy_(value)
            continue
        item.load_state_dict(value)
        for group in getattr(item, "param_groups", []):  # the checkpoint's device may be another
            group["capturable"] = group["params"][0].is_cuda


def check_finite(metrics: dict, step: int, checkpoint: Path) -> None:
    bad = [term for term, value in metrics.items() if not torch.isfinite(value).all()]
    if bad:
        kept = f"nothing was saved in {checkpoint.parent}"
        if checkpoint.exists():
            kept = f"the last good checkpoint is kept, {checkpoint}"
        raise SystemExit(f"Step {step:,}: {', '.join(bad)} not finite. Stopped; {kept}.")


def check_same(args: Args, saved: dict) -> None:
    """A run goes on as what it was: only these flags may differ."""
    free = "steps eval_every eval_episodes eval_xi save_every device matmul_precision compile"
    free += " cuda_graph run_dir resume evaluate capture_video seeds"
    for key, value in saved.items():
        if key not in free.split() and getattr(args, key) != value:
            flag = "--" + key.replace("_", "-")
            raise SystemExit(f"--resume: the run was started with {flag} {value}; pass the same.")


def describe(row: dict[str, float]) -> str:
    hidden = ("step", "seconds")  # and a score where there are no reference returns
    numbers = [f"{k} {x:.4g}" for k, x in row.items() if k not in hidden and not math.isnan(x)]
    return f"step {row['step']:>9,}  " + "  ".join(numbers)


def write_config(run_dir: Path, args: Args, spec: dict) -> None:
    git = ["git", "-C", str(Path(__file__).resolve().parent), "rev-parse", "HEAD"]
    config = {"args": asdict(args), "dataset": spec["name"], "env_id": spec["env_id"]}
    config |= {"python": platform.python_version(), "machine": platform.platform()}
    config |= {p: importlib.metadata.version(p) for p in ("torch", "numpy", "gymnasium")}
    config |= {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}
    config |= {"cpus": os.cpu_count(), "threads": torch.get_num_threads()}
    if shutil.which("git"):
        config["git"] = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    run_dir.mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_history(run_dir: Path, history: list[dict]) -> None:
    columns = ["step", "seconds", "return_mean", "return_std", "length_mean", "score"]
    columns += [key for key in history[0] if key not in columns]
    with open(run_dir / "eval.csv", "w", newline="") as file:
        table = csv.DictWriter(file, columns, extrasaction="ignore")
        table.writeheader()
        table.writerows(history)


if __name__ == "__main__":
    train(tyro.cli(Args))
