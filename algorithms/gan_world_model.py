"""An adversarial world model for offline learning, our own specification in the spirit of MOAN,
"Model-based Offline Policy Optimization with Adversarial Network", Junming Yang, Xingguo Chen,
Shengyuan Wang, Bolei Zhang. ECAI 2023, arXiv:2309.02157. Rollouts and penalty as in MOPO, Tianhe Yu
et al. NeurIPS 2020, arXiv:2005.13239.

First an ensemble G of Gaussian models learns the dynamics, by likelihood and against a
discriminator D that tells its samples from transitions. Then SAC learns from short rollouts in the
frozen model, branched off the data's states. A policy exploits a model where it guesses; D was also
shown samples away from the data, so its disbelief says where that is, and is charged to the reward.

    x      = (s' - s, r), standardised,   x̂ = μ_i(s, a) + σ_i(s, a) ε,   ε ~ N(0, I), member i of G
    L(D)   = -log D(s, a, x) - ½ log(1 - D(s, a, x̂)) - ½ log(1 - D(ŝ', a°, x̂°)) + γ_D/2 |∇D|²,
             where ŝ' is the state that x̂ leads to, a° a uniform action and x̂° a sample there
    L(G_i) = -log N(x; μ_i, σ_i) / X - λ_adv log D(s, a, x̂),             X the dimensions of x
    r̃      = r̂ - λ σ_r clip(u / ū - 1, 0, 10),   u = -log D(s, a, x̂),   ū its mean over the data
    SAC    (algorithms/sac.py) on a few real and many imagined transitions, these with reward r̃

    python algorithms/gan_world_model.py --dataset hopper-medium-replay
    python algorithms/gan_world_model.py --dataset hopper-medium-replay --penalty disagreement

Measured: pendulum-medium-replay, 7,000 steps (2,000 of them the model's) of small networks, five
seeds: score 100.2, without the adversary 69.8, with an untrained model 0.1, cloning 0.9; without a
penalty 99.6 and, on four seeds of five, without imagined data 100: neither is needed there. On
hopper-medium-replay, 38,000 steps (8,000 the model's), τ = 0.02: 27, 47 and 55, cloning 14.5.

Differs from the paper / official code:
- No code is public, and of the paper only the idea is kept (an adversary beside the likelihood, its
  output as the penalty). Every formula and number here is our choice: its table is no reference.
- MOPO's model has the best 5 of 7 members, learnt bounds on σ, weight decay and an early stop; this
  one uses all its members, log σ in [-5, 1] and a fixed number of steps.
- MOPO charges u. Charged here is its excess over the data's mean, in deviations of the reward: one
  λ fits all kinds, and an episode that stays with the data costs nothing.
- An imagined episode that ends gives its row to a new one; imagined states stay within the data's
  range and one deviation beyond.
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
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """SAC on short rollouts in an adversarial world model, penalised where D disbelieves it."""

    penalty: Literal["discriminator", "aleatoric", "disagreement", "none"] = "discriminator"
    """u: -log D of the sample, the largest |σ_i|, or the farthest μ_i from the ensemble's mean"""
    penalty_weight: float = 1.0
    """λ: deviations of the rewards paid per multiple of the data's mean u"""
    adversarial_weight: float = 1.0
    """λ_adv beside the likelihood; 0 is MOPO's model"""
    gradient_penalty: float = 0.1
    """γ_D, weight of the squared gradient of D at transitions of the data"""
    termination: str = ""
    """how episodes end: hopper, walker2d, halfcheetah, pendulum, none; empty: by the task's name"""
    model_steps: int = 50_000
    """gradient steps of the world model; the policy learns in the rest of --steps"""
    ensemble: int = 5
    """members of the world model"""
    model_dim: int = 200
    """units in each of the world model's hidden layers"""
    model_layers: int = 4
    """hidden layers of the world model"""
    discriminator_dim: int = 256
    """units in each of the discriminator's three hidden layers"""
    model_learning_rate: float = 1e-3
    """Adam's step size, world model"""
    discriminator_learning_rate: float = 2e-4
    """Adam's step size, discriminator"""
    rollout_every: int = 1000
    """gradient steps of the policy between rollouts"""
    rollout_batch: int = 5000
    """branches per rollout"""
    rollout_length: int = 5
    """imagined steps per branch"""
    rollout_keep: int = 5
    """rollouts that the buffer of imagined transitions holds"""
    real_fraction: float = 0.05
    """share of real transitions in the policy's batches; 1 is SAC on a fixed data set"""
    gamma: float = 0.99
    """discount per step"""
    tau: float = 0.005
    """share of the new parameters in a target network's update"""
    steps: int = 300_000
    """gradient steps: first the world model's, then the policy's"""
    batch_size: int = 256
    """transitions per gradient step, and per member of the world model"""
    hidden_dim: int = 256
    """units in each of the two hidden layers of actor and critics"""
    learning_rate: float = 3e-4
    """Adam's step size: actor, critics and temperature"""

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
    """π: normalised states (B, S) -> a sample of the squashed Gaussian (B, A) and its log-density
    (B, 1)."""

    def __init__(self, data, hidden_dim):
        super().__init__()
        # Normalisation belongs to the policy, so that whoever has the policy has it too.
        self.register_buffer("state_mean", data["observations"].mean(0))
        self.register_buffer("state_std", data["observations"].std(0, correction=0) + 1e-3)
        self.register_buffer("action_low", data["action_low"])
        self.register_buffer("action_high", data["action_high"])
        self.net = mlp(len(self.state_mean), hidden_dim, 2 * self.action_low.shape[1])

    def normalise(self, observations):
        return (observations - self.state_mean) / self.state_std

    def forward(self, s):
        mu, log_sigma = self.net(s).chunk(2, dim=-1)
        log_sigma = -5 + 3.5 * (torch.tanh(log_sigma) + 1)  # in [-5, 2]
        eps = torch.randn_like(mu)
        u = mu + log_sigma.exp() * eps
        # log N(u) minus the tanh's log-derivative, log(1 - tanh² u), in its stable form.
        log_prob = -0.5 * eps.square() - log_sigma - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), log_prob.sum(-1, keepdim=True)

    @torch.no_grad()
    def act(self, observations: torch.Tensor) -> torch.Tensor:
        """What a user calls: raw observations (N, S) -> actions (N, A) in the environment's
        bounds, the squashed mean."""
        a = torch.tanh(self.net(self.normalise(observations)).chunk(2, dim=-1)[0])
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


class WorldModel(nn.Module):
    """G: N Gaussians of x = (s' - s, r), standardised, as one batched network: states (N, B, S) and
    actions (N, B, A), or (B, S) and (B, A) for all -> means and deviations (N, B, S + 1)."""

    def __init__(self, data, args):
        super().__init__()
        s, s_next = data["observations"], data["next_observations"]  # normalised
        x = torch.cat([s_next - s, data["rewards"]], dim=-1)
        self.register_buffer("x_mean", x.mean(0))
        self.register_buffer("x_std", x.std(0, correction=0) + 1e-3)
        self.register_buffer("s_low", torch.minimum(s.amin(0), s_next.amin(0)) - 1)
        self.register_buffer("s_high", torch.maximum(s.amax(0), s_next.amax(0)) + 1)
        in_dim, hidden = s.shape[1] + data["actions"].shape[1], [args.model_dim] * args.model_layers
        sizes = (in_dim, *hidden, 2 * x.shape[1])
        self.members = args.ensemble
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            bound = fan_in**-0.5  # as nn.Linear begins
            self.weights.append(torch.empty(self.members, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(self.members, 1, fan_out).uniform_(-bound, bound))

    def forward(self, s, a):
        x = torch.cat([s, a], dim=-1).expand(self.members, -1, -1)  # (N, B, S + A)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = F.silu(torch.baddbmm(bias, x, weight))  # (N, B, H)
        mu, log_sigma = torch.baddbmm(self.biases[-1], x, self.weights[-1]).chunk(2, dim=-1)
        return mu, (-5 + 3 * (torch.tanh(log_sigma) + 1)).exp()  # log σ in [-5, 1]

    def standardise(self, s, r, s_next):
        return (torch.cat([s_next - s, r], dim=-1) - self.x_mean) / self.x_std

    def follow(self, s, x):
        """The next state and the reward that x stands for. Outside the data's range the model knows
        nothing, and errors would feed on themselves: the state is held to it."""
        x = self.x_mean + self.x_std * x
        s_next = torch.maximum(torch.minimum(s + x[..., :-1], self.s_high), self.s_low)
        return s_next, x[..., -1:]


# ----------------------------------------------------------------------------------- Algorithm


def between(low: float, x, high: float):
    return (low < x) & (x < high)  # NaN is not


def always(s):
    return torch.ones_like(s[:, 0], dtype=torch.bool)


# Whether an episode goes on at states (B, S) in the environment's units: Gymnasium's rules (-v4 and
# -v5), read off the observation. For an environment of your own, add its line.
GOES_ON = {
    "hopper": lambda s: (
        between(0.7, s[:, 0], math.inf)
        & between(-0.2, s[:, 1], 0.2)
        & between(-100, s[:, 1:], 100).all(1)
    ),
    "walker2d": lambda s: between(0.8, s[:, 0], 2.0) & between(-1.0, s[:, 1], 1.0),
    "halfcheetah": always,
    "pendulum": always,
    "none": always,
}


def termination_rule(args: Args, data: dict[str, torch.Tensor]):
    """The rule asked for, or the one of the task's name; that one must explain the terminals."""
    path = Path(args.dataset)
    task = path.stem if path.suffix in (".hdf5", ".npz") else args.dataset
    task = task if args.env_id in ("", "none") else args.env_id
    known = re.search(rf"(?<![a-z])({'|'.join(GOES_ON)})", task.lower())
    name = args.termination or (known[1] if known else "")
    way_out = f"--termination takes {', '.join(GOES_ON)} (none: only time ends an episode)."
    if name not in GOES_ON:
        raise SystemExit(
            f"--termination {name}: no such rule. {way_out}"
            if name
            else f"Imagined episodes need a rule that ends them, '{task}' names none. {way_out}"
        )
    wrong = (~GOES_ON[name](data["next_observations"]) != (data["terminals"][:, 0] > 0)).sum()
    blank = not data["observations"].any()  # --evaluate has no data
    if not args.termination and not blank and wrong > 0.001 * len(data["terminals"]):
        raise SystemExit(
            f"The rule that ends episodes of '{name}', taken from the name '{task}', contradicts"
            f" {wrong:,} of the data's {len(data['terminals']):,} rows. {way_out}"
        )
    return GOES_ON[name]


class GANWorldModel:
    """The learner. All it needs lives on the data's device, so one update is one CUDA graph."""

    def __init__(self, data: dict[str, torch.Tensor], args: Args):
        least = dict(model_steps=0, ensemble=1, rollout_every=1, rollout_batch=1, rollout_length=1)
        least |= dict(rollout_keep=1, real_fraction=0, penalty_weight=0, adversarial_weight=0)
        for name, low in least.items():
            high = 1 if name == "real_fraction" else math.inf
            if not low <= getattr(args, name) <= high:
                flag = f"--{name.replace('_', '-')} {getattr(args, name)}"
                raise SystemExit(f"{flag}: it must lie between {low} and {high}.")
        self.goes_on = termination_rule(args, data)

        self.args, device = args, data["rewards"].device
        state_dim, action_dim = data["observations"].shape[1], data["actions"].shape[1]
        self.policy = Policy(data, args.hidden_dim).to(device)
        normalised = ("observations", "next_observations")
        self.data = {**data, **{key: self.policy.normalise(data[key]) for key in normalised}}
        self.critic = TwinCritic(state_dim, action_dim, args.hidden_dim).to(device)
        self.critic_target = copy.deepcopy(self.critic)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        self.target_entropy = -action_dim
        self.model = WorldModel(self.data, args).to(device)
        self.discriminator = mlp(2 * state_dim + action_dim + 1, args.discriminator_dim, 1, 3)
        self.discriminator.to(device)

        # The imagined transitions: a ring of rows (s, a, r̂, ŝ', d, penalty).
        self.widths = (state_dim, action_dim, 1, state_dim, 1, 1)
        rows = args.rollout_keep * args.rollout_batch * args.rollout_length
        rows = rows if args.real_fraction < 1 else 0
        self.imagined = torch.zeros(rows, sum(self.widths), device=device)
        self.count = torch.zeros((), dtype=torch.long, device=device)  # rows ever written

        adam = dict(fused=True, capturable=device.type == "cuda")
        optimizer = functools.partial(torch.optim.Adam, lr=args.learning_rate, **adam)
        self.policy_optimizer = optimizer(self.policy.parameters())
        self.critic_optimizer = optimizer(self.critic.parameters())
        self.alpha_optimizer = optimizer([self.log_alpha])
        self.model_optimizer = optimizer(self.model.parameters(), lr=args.model_learning_rate)
        self.discriminator_optimizer = optimizer(
            self.discriminator.parameters(), lr=args.discriminator_learning_rate, betas=(0.5, 0.999)
        )

    def phase(self, step: int):
        """The update to use at this step, and how many gradient steps one call of it takes: first
        the world model's, then the policy's, some of them after a rollout."""
        k = step - self.args.model_steps
        if k < 0:
            return self.update, 1
        return (self.update_policy if k % self.args.rollout_every else self.update_after_rollout), 1

    def update_policy(self) -> dict[str, torch.Tensor]:
        return self.update(model=False)

    def update_after_rollout(self) -> dict[str, torch.Tensor]:
        return self.update(model=False, rollout=True)

    def update(self, model: bool = True, rollout: bool = False) -> dict[str, torch.Tensor]:
        """One step of the world model, or one of the policy. Returns detached tensors, never
        synchronises."""
        if model:
            return self.update_model()
        if rollout and self.args.real_fraction < 1:
            self.roll_out()
        s, a, r, s_next, d, penalty = self.sample()  # (B, S), (B, A), (B, 1), (B, S), (B, 1) x 2
        metrics = self.update_critic(s, a, r - penalty, s_next, d)
        metrics |= self.update_actor(s)
        with torch.no_grad():
            target, online = self.critic_target.parameters(), self.critic.parameters()
            torch._foreach_lerp_(list(target), list(online), self.args.tau)
        if self.args.real_fraction < 1:
            real = round(self.args.real_fraction * self.args.batch_size)
            metrics |= {
                "imagined/reward": r[real:].mean(),
                "imagined/penalty": penalty[real:].mean(),
            }
            metrics |= {"imagined/ended": d[real:].mean()}
        return metrics

    # The world model.

    def update_model(self):
        # Every member has a batch of its own: they begin apart and stay apart.
        members, size = self.args.ensemble, self.args.batch_size
        i = torch.randint(
            len(self.data["rewards"]), (members, size), device=self.data["rewards"].device
        )
        keys = ("observations", "actions", "rewards", "next_observations")
        s, a, r, s_next = (
            self.data[key][i] for key in keys
        )  # (N, B, S), (N, B, A), (N, B, 1), ...
        x = self.model.standardise(s, r, s_next)  # (N, B, S + 1)

        # Likelihood, the members' sum.
        mu, sigma = self.model(s, a)  # (N, B, S + 1) each
        nll = self.nll(x, mu, sigma)

        # D's three kinds, each the first K rows of every member, NK about B in all: transitions,
        # samples at the data's states and actions, and samples one imagined step away from them at
        # actions that the data may not have. The last teach D what it has to know as a penalty.
        k = math.ceil(size / members)
        s, a, x, x_hat = (part[:, :k] for part in (s, a, x, self.draw(mu, sigma)))
        with torch.no_grad():
            s_far, _ = self.model.follow(s, x_hat)
            a_far = 2 * torch.rand_like(a) - 1
            x_far = self.draw(*self.model(s_far, a_far))
        real, fake, far = (
            torch.cat(parts, dim=-1).flatten(0, 1)  # (NK, S + A + S + 1)
            for parts in ((s, a, x), (s, a, x_hat), (s_far, a_far, x_far))
        )
        metrics = self.update_discriminator(real, fake.detach(), far)

        # Adversary: the samples should pass for transitions. ε is outside: the gradient reaches μ
        # and σ.
        self.discriminator.requires_grad_(False)
        adversarial = F.softplus(-self.discriminator(fake)).mean()
        loss = nll + members * self.args.adversarial_weight * adversarial
        self.model_optimizer.zero_grad()
        loss.backward()
        self.model_optimizer.step()
        self.discriminator.requires_grad_(True)
        metrics |= {
            "losses/nll": nll.detach() / members,
            "losses/adversarial": adversarial.detach(),
        }
        return metrics

    def nll(self, x, mu, sigma):
        """Negative log-likelihood in nats per dimension, the members' sum."""
        loss = 0.5 * ((x - mu) / sigma).square() + sigma.log() + 0.5 * math.log(2 * math.pi)
        return loss.mean((1, 2)).sum()

    def draw(self, mu, sigma):
        return mu + sigma * torch.randn_like(mu)

    def update_discriminator(self, real, fake, far):
        # Transitions against both kinds of samples.
        real.requires_grad_(True)
        logit, logit_fake, logit_far = self.discriminator(torch.cat([real, fake, far])).chunk(3)
        loss = F.softplus(-logit) + 0.5 * (F.softplus(logit_fake) + F.softplus(logit_far))

        # D is smooth where the data is (R_1): its gradient there is all that G learns from.
        (slope,) = torch.autograd.grad(logit.sum(), real, create_graph=True)
        loss = loss.mean() + 0.5 * self.args.gradient_penalty * slope.square().sum(1).mean()
        self.discriminator_optimizer.zero_grad()
        loss.backward()
        self.discriminator_optimizer.step()
        return {"losses/discriminator": loss.detach()} | self.accuracy(logit, logit_fake, logit_far)

    def accuracy(self, real, fake, far):
        return {
            "discriminator/real": (real > 0).float().mean(),
            "discriminator/fake": (fake < 0).float().mean(),
            "discriminator/far": (far < 0).float().mean(),
        }

    # Imagination.

    @torch.no_grad()
    def imagine(self, s, a):
        """One step of a random member: next states (B, S), rewards and uncertainties u (B, 1)."""
        mu, sigma = self.model(s, a)  # (N, B, S + 1) each
        member = torch.randint(len(mu), (1, len(s), 1), device=s.device).expand(1, *mu.shape[1:])
        x_hat = self.draw(mu, sigma).gather(0, member)[0]  # (B, S + 1)
        return *self.model.follow(s, x_hat), self.uncertainty(s, a, x_hat, mu, sigma)

    def uncertainty(self, s, a, x_hat, mu, sigma):
        if self.args.penalty == "discriminator":
            return F.softplus(-self.discriminator(torch.cat([s, a, x_hat], dim=-1)))  # -log D
        if self.args.penalty == "aleatoric":
            return sigma.norm(dim=-1).amax(0)[:, None]
        if self.args.penalty == "disagreement":
            return (mu - mu.mean(0)).norm(dim=-1).amax(0)[:, None]
        return torch.zeros_like(s[:, :1])

    def some_data(self):
        device = self.data["rewards"].device
        i = torch.randint(len(self.data["rewards"]), (self.args.rollout_batch,), device=device)
        return self.data["observations"][i], self.data["actions"][i]

    @torch.no_grad()
    def roll_out(self):
        """Short branches off the data's states, by the policy and the model, into the ring."""
        u_data = self.imagine(*self.some_data())[2].mean().clamp(min=1e-6)
        scale = self.args.penalty_weight * self.model.x_std[-1]  # λ σ_r
        s, _ = self.some_data()
        rows = torch.arange(len(s), device=s.device)
        for _ in range(self.args.rollout_length):
            a, _ = self.policy(s)
            s_next, r, u = self.imagine(s, a)
            penalty = scale * (u / u_data - 1).clamp(0, 10)
            raw = self.policy.state_mean + self.policy.state_std * s_next
            d = ~self.goes_on(raw)[:, None]
            row = torch.cat([s, a, r, s_next, d.float(), penalty], dim=-1)
            self.imagined.index_copy_(0, (self.count + rows) % len(self.imagined), row)
            self.count += len(s)
            # A branch that has ended makes place for a new one: shapes are fixed, no row is wasted.
            s = torch.where(d, self.some_data()[0], s_next)

    # SAC.

    def sample(self):
        device, size = self.data["rewards"].device, self.args.batch_size
        real = round(self.args.real_fraction * size)
        i = torch.randint(len(self.data["rewards"]), (real,), device=device)
        filled = self.count.clamp(max=len(self.imagined))
        j = (torch.rand(size - real, device=device) * filled).long()
        keys = ("observations", "actions", "rewards", "next_observations", "terminals")
        logged = [self.data[key][i] for key in keys]
        logged = torch.cat([*logged, torch.zeros_like(logged[2])], dim=-1)  # no penalty
        return torch.cat([logged, self.imagined[j]]).split(self.widths, dim=-1)

    def critic_losses(self, s, a, r, s_next, d):
        # Target: the smaller of two target critics, plus the entropy of the action chosen there.
        with torch.no_grad():
            a_next, log_prob = self.policy(s_next)
            entropy = -self.log_alpha.exp() * log_prob  # (B, 1)
            # d is 1 at a terminal only: a time limit ends the episode, not the future.
            q_next = self.critic_target(s_next, a_next).amin(0) + entropy  # (B, 1)
            y = r + self.args.gamma * (1 - d) * q_next

        # Both critics regress on it.
        q = self.critic(s, a)  # (2, B, 1)
        return (q - y).square().mean((1, 2)).sum(), q

    def update_critic(self, s, a, r, s_next, d):
        loss, q = self.critic_losses(s, a, r, s_next, d)
        self.critic_optimizer.zero_grad()
        loss.backward()
        self.critic_optimizer.step()
        return {"losses/critic": loss.detach(), "values/q": q.detach().mean()}

    def update_actor(self, s):
        # Climb the smaller critic, paid for entropy at the temperature α.
        alpha = self.log_alpha.detach().exp()
        pi, log_prob = self.policy(s)
        self.critic.requires_grad_(False)  # the gradient passes through Q, it stops at π
        loss = (alpha * log_prob - self.critic(s, pi).amin(0)).mean()
        self.policy_optimizer.zero_grad()
        loss.backward()
        self.policy_optimizer.step()
        self.critic.requires_grad_(True)

        # Temperature: up where the policy's entropy is below the one asked for.
        surplus = log_prob.detach().mean() + self.target_entropy
        alpha_loss = -self.log_alpha * surplus
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()
        return {
            "losses/actor": loss.detach(),
            "values/alpha": alpha,
            "values/entropy": -log_prob.detach().mean(),
        }

    def actors(self) -> dict:
        """Policies to evaluate, by suffix of their columns; the first one is the result."""
        return {"": self.policy.act}

    @torch.no_grad()
    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """World model, discriminator, penalty and Q on held-out transitions."""
        s, s_next = (self.policy.normalise(data[k]) for k in ("observations", "next_observations"))
        a, a_far = data["actions"], 2 * torch.rand_like(data["actions"]) - 1
        x = self.model.standardise(s, data["rewards"], s_next)
        mu, sigma = self.model(s, a)
        judged = ((s, a, x), (s, a, self.draw(mu, sigma)[0]))
        judged += ((s, a_far, self.draw(*self.model(s, a_far))[0]),)
        logits = (self.discriminator(torch.cat(parts, dim=-1)) for parts in judged)
        accuracy = self.accuracy(*logits)
        u, u_far = (self.imagine(s, action)[2].mean() for action in (a, a_far))
        return {
            "validation/nll": self.nll(x, mu, sigma) / len(mu),
            "validation/mse": F.mse_loss(mu.mean(0), x),
            **{f"validation/{key.replace('/', '_')}": value for key, value in accuracy.items()},
            "validation/u": u,
            "validation/u_far": u_far,
            "validation/q": self.critic(s, self.policy(s)[0]).mean(),
        }


Learner = GANWorldModel  # the name by which the training loop knows it

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
