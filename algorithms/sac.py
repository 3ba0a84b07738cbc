"""SAC, "Soft Actor-Critic Algorithms and Applications"
Tuomas Haarnoja, Aurick Zhou, Kristian Hartikainen et al. 2018, arXiv:1812.05905.

Online reinforcement learning of a stochastic policy, paid for its entropy. It makes this project's
data sets: a run records its replay buffer and snapshots of its policy. With --offline it shows why
offline learning needs more: the actor climbs Q's errors beside the data, and Q runs away.

    y      = r + γ (1 - d) (min_i Q'_i(s', a') - α log π(a' | s')),        a' ~ π(. | s')
    L(Q_i) = (Q_i(s, a) - y)²                                                          (eq. 5)
    L(π)   = α log π(ã | s) - min_i Q_i(s, ã),    ã = tanh(μ(s) + σ(s) ε)              (eq. 7-9)
    L(α)   = -log α (log π(ã | s) + H),           H = -A, the entropy asked for        (eq. 18)

    python algorithms/sac.py --env-id Hopper-v5 --steps 300000
    python algorithms/sac.py --offline --dataset hopper-medium-replay --steps 100000

Measured: Hopper-v5, 300,000 steps, seed 0: final score 71.9, 58 minutes on one CPU thread.

Differs from the paper / official code:
- log σ is squashed into [-5, 2] instead of clipped to [-20, 2]: its gradient never dies.
- The temperature's loss is in log α, as in the official code; the critics are one batched network.
- Offline 5 % of the episodes are held out for validation losses (--validation-fraction 0: none).
MIT licence, (c) 2026 The CleanDGM developers. Please cite the paper above and CleanDGM.
"""

import contextlib
import copy
import functools
import hashlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
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
    """SAC: online on any continuous environment, or on a fixed data set to see it fail."""

    offline: bool = False  # learn from --dataset alone; else by acting in --env-id (Hopper-v5)
    random_steps: int = 5000  # environment steps of uniformly random actions, before any learning
    snapshot_every: int = 5000  # online: steps between the policies kept in <run-dir>/policies
    gamma: float = 0.99  # discount per step
    tau: float = 0.005  # share of the new parameters in a target network's update
    steps: int = 1_000_000  # environment steps and gradient steps, one each
    batch_size: int = 256  # transitions per gradient step
    hidden_dim: int = 256  # units in each of the two hidden layers
    learning_rate: float = 3e-4  # Adam's step size: actor, critics and temperature

    # The run: the same flags in every file.
    dataset: str = "hopper-medium-replay"  # one of datasets/, a Minari id, or a path (.hdf5, .npz)
    env_id: str = ""  # where to evaluate, also module:Id; empty: the data's; none: nowhere
    seed: int = 0  # seed of the networks, the batches, the held-out episodes and the evaluation
    validation_fraction: float = 0.05  # share of the episodes held out, for validation losses
    eval_every: int = 5000  # gradient steps between evaluations, the last step's is one; 0: never
    eval_episodes: int = 10  # episodes per evaluation, all stepped together
    threads: int = 1  # CPU threads; small networks gain little from more, other runs lose much
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1 or mps
    matmul_precision: Literal["highest", "high", "medium"] = "high"  # medium: bfloat16, with AMX
    cuda_graph: bool = True  # on CUDA, replay each update as one graph: same numbers, less waiting
    run_dir: str = ""  # where everything is written; empty: runs/<algorithm>/<dataset>/seed<seed>
    resume: bool = False  # continue from the checkpoint in the run directory
    save_every: int = 50_000  # gradient steps between checkpoints; evaluations, the end, Ctrl-C too
    evaluate: str = ""  # a checkpoint or its folder: evaluate its policy, no training
    capture_video: bool = False  # the last evaluation as MP4; without a screen: MUJOCO_GL=egl

    def __post_init__(self):
        if not (self.offline or self.evaluate):  # online a run is named after its environment
            self.dataset = self.env_id = self.env_id or "Hopper-v5"


# ------------------------------------------------------------------------------------ Networks


def mlp(in_dim: int, hidden_dim: int, out_dim: int, hidden_layers: int = 2) -> nn.Sequential:
    sizes = [in_dim] + [hidden_dim] * hidden_layers
    layers = [(nn.Linear(i, o), nn.ReLU(inplace=True)) for i, o in zip(sizes[:-1], sizes[1:])]
    return nn.Sequential(*sum(layers, ()), nn.Linear(hidden_dim, out_dim))


class Scaling(nn.Module):
    """Between the environment's units and the networks': whoever has the policy has it too."""

    def __init__(self, task):
        super().__init__()
        self.register_buffer("mean", torch.zeros(task["sizes"][0]))
        self.register_buffer("std", torch.ones(task["sizes"][0]))
        self.register_buffer("bounds", torch.tensor(task["bounds"]))  # (2, A)

    def fit(self, observations):
        self.mean.copy_(observations.mean(0))
        self.std.copy_(observations.std(0, correction=0) + 1e-3)

    def state(self, observations):
        """Normalised states (N, S) of one observation (S,) or many, NumPy or tensor."""
        s = torch.as_tensor(observations, dtype=torch.float32, device=self.mean.device)
        return (s.reshape(-1, len(self.mean)) - self.mean) / self.std

    def action(self, a, observations):
        """Actions in the environment's bounds, of the shape and the kind of the observations."""
        low, high = self.bounds
        a = torch.clamp(low + 0.5 * (a + 1) * (high - low), low, high)  # rounding may leave them
        a = a.reshape(*np.shape(observations)[:-1], -1)
        return a if isinstance(observations, torch.Tensor) else a.numpy(force=True)


class Policy(nn.Module):
    """π: states (B, S) -> a sample of the squashed Gaussian (B, A) and its log-density (B, 1)."""

    flags = ()  # those of acting: --evaluate obeys them

    def __init__(self, task, args):
        super().__init__()
        self.scaling, (state_dim, action_dim) = Scaling(task), task["sizes"]
        self.net = mlp(state_dim, args.hidden_dim, 2 * action_dim)

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
    def act(self, observations, deterministic: bool = True):
        """What a user calls: one raw observation (S,) or many (N, S), NumPy or tensor -> as many
        actions in the environment's bounds; the squashed mean, or a sample."""
        s = self.scaling.state(observations)
        a = torch.tanh(self.net(s).chunk(2, dim=-1)[0]) if deterministic else self(s)[0]
        return self.scaling.action(a, observations)

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {"": self.act}


class TwinCritic(nn.Module):
    """Q_1 and Q_2 as one batched network: states (B, S), actions (B, A) -> values (2, B, 1)."""

    def __init__(self, state_dim, action_dim, hidden_dim, hidden_layers=2):
        super().__init__()
        sizes = (state_dim + action_dim, *[hidden_dim] * hidden_layers, 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes[:-1], sizes[1:]):
            bound = fan_in**-0.5  # as nn.Linear begins
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))

    def forward(self, s, a):
        x = torch.cat([s, a], dim=-1).expand(2, -1, -1)  # (2, B, S + A)
        weights, biases = list(self.weights), list(self.biases)
        for weight, bias in zip(weights[:-1], biases[:-1]):
            x = torch.baddbmm(bias, x, weight).relu_()  # (2, B, H)
        return torch.baddbmm(biases[-1], x, weights[-1])  # (2, B, 1)


# ----------------------------------------------------------------------------------- Algorithm


class SAC(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        self.args, device = args, data["rewards"].device
        self.policy = Policy(task, args).to(device)
        self.critic = TwinCritic(*task["sizes"], args.hidden_dim).to(device)
        self.critic_target = copy.deepcopy(self.critic)
        self.log_alpha = nn.Parameter(torch.zeros((), device=device))
        self.target_entropy = -task["sizes"][1]
        self.policy_optimizer = adam(self.policy, args.learning_rate)
        self.critic_optimizer = adam(self.critic, args.learning_rate)
        self.alpha_optimizer = adam([self.log_alpha], args.learning_rate)
        self.data = tuple(data[key] for key in Collector.KEYS[:5])  # states are not normalised
        self.collector = None if args.offline else Collector(self.data, task, args, self.policy)
        rows = len(data["rewards"]) if args.offline else 0
        self.register_buffer("size", torch.tensor(rows, device=device))  # rows that are filled

    def phase(self, step: int):
        """The update to do at this step, a CUDA graph; online after a step of the environment."""
        if self.collector:
            self.collector.step(step - 1)
            self.size.fill_(step)
        return self.wait if self.collector and step <= self.args.random_steps else self.update

    def wait(self) -> dict[str, torch.Tensor]:
        self.size.clone()  # CUDA warns of a graph without any kernel
        return {}

    def update(self) -> dict[str, torch.Tensor]:
        """One step of critics, actor and temperature. Returns tensors, never synchronises."""
        s, a, r, s_next, d = self.sample()
        metrics = self.update_critic(s, a, r, s_next, d) | self.update_actor(s)
        self.update_targets()
        return metrics

    def sample(self):
        """A batch of s (B, S), a (B, A), r (B, 1), s' (B, S), d (B, 1) from the filled rows."""
        i = (torch.rand(self.args.batch_size, device=self.size.device) * self.size).long()
        return [column[i] for column in self.data]

    def critic_loss(self, s, a, r, s_next, d):
        # Target: the smaller of two target critics, plus the entropy of the action chosen there.
        with torch.no_grad():
            a_next, log_prob = self.policy(s_next)
            q_next = self.critic_target(s_next, a_next).amin(0) - self.log_alpha.exp() * log_prob
            # d is 1 at a terminal only: a time limit ends the episode, not the future.
            y = r + self.args.gamma * (1 - d) * q_next  # (B, 1)

        # Both critics regress on it.
        q = self.critic(s, a)  # (2, B, 1)
        return (q - y).square().mean((1, 2)).sum(), q

    def update_critic(self, s, a, r, s_next, d):
        loss, q = self.critic_loss(s, a, r, s_next, d)
        minimise(self.critic_optimizer, loss)
        return {"losses/critic": loss, "values/q": q.mean()}

    def update_actor(self, s):
        # Climb the smaller critic, paid for entropy at the temperature α.
        alpha = self.log_alpha.detach().exp()
        pi, log_prob = self.policy(s)
        self.critic.requires_grad_(False)  # the gradient passes through Q, it stops at π
        loss = (alpha * log_prob - self.critic(s, pi).amin(0)).mean()
        self.critic.requires_grad_(True)
        minimise(self.policy_optimizer, loss)

        # Temperature: up where the policy's entropy is below the one asked for.
        entropy = -log_prob.detach().mean()
        minimise(self.alpha_optimizer, self.log_alpha * (entropy - self.target_entropy))
        return {"losses/actor": loss, "values/alpha": alpha, "values/entropy": entropy}

    @torch.no_grad()
    def update_targets(self):
        targets, onlines = list(self.critic_target.parameters()), list(self.critic.parameters())
        torch._foreach_lerp_(targets, onlines, self.args.tau)

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss on held-out transitions, and Q of the policy's own actions there."""
        s, a, r = data["observations"], data["actions"], data["rewards"]
        critic, _ = self.critic_loss(s, a, r, data["next_observations"], data["terminals"])
        return {"critic": critic, "q": self.critic(s, self.policy(s)[0]).mean()}


Learner = SAC  # the name by which the training loop knows it


def empty_buffer(args: Args) -> tuple[dict[str, np.ndarray], dict]:
    """What `load_dataset` returns, for acting in --env-id: zeros, a row for every step to come."""
    of = f"Environment '{args.env_id}' (--env-id)"
    sys.path += [""] * ("" not in sys.path)  # modules of the current folder, too
    with explained(of):
        env = gym.make(args.env_id)
    s, a = env.observation_space, env.action_space
    ok = all(isinstance(space, gym.spaces.Box) and len(space.shape) == 1 for space in (s, a))
    check(ok and a.is_bounded(), f"{of}: {s} and {a} are not two vectors, the second bounded.")
    sizes, bounds = [s.shape[0], a.shape[0]], np.float32([a.low, a.high]).tolist()
    task = {"env": args.env_id, "env_id": env.spec.id, "sizes": sizes, "bounds": bounds}
    task |= {"scores": SCORES.get(env.spec.name), "digest": ""}
    keys = "observations actions next_observations rewards terminals returns_to_go".split()
    widths = (*sizes, sizes[0], 1, 1, 1)
    data = {key: np.zeros((args.steps, n), np.float32) for key, n in zip(keys, widths)}
    data |= {"recorded": np.ones(args.steps, bool), "episodes": np.zeros(args.steps, int)}
    return data, task


class Collector(nn.Module):
    """Acts in the environment, with samples of the policy, and fills the learner's data."""

    KEYS = "observations actions rewards next_observations terminals timeouts".split()

    def __init__(self, data, task, args, policy):
        super().__init__()
        check(args.snapshot_every > 0, "--snapshot-every must be 1 or more.")
        self.args, self.env_id, self.env = args, task["env"], make_env(task)
        self.low, self.high = np.float32(task["bounds"])  # (A,) each
        self.columns = dict(zip(self.KEYS, (*data, torch.zeros_like(data[-1]))))
        self.act, self.policy_state = policy.act, policy.state_dict
        self.rows, (self.observation, _) = 0, self.env.reset(seed=args.seed)
        name, task_name = Path(__file__).stem, args.dataset.strip("/").replace("/", "-")
        self.folder = Path(args.run_dir or f"runs/{name}/{task_name}/seed{args.seed}")

    def step(self, i: int) -> None:
        """One step of the environment, into row i."""
        if i and i % self.args.snapshot_every == 0:
            self.write()
        s, span = np.array(self.observation, np.float32), self.high - self.low
        if i < self.args.random_steps:
            action = (self.low + span * torch.rand(len(span)).numpy()).clip(self.low, self.high)
        else:
            action = self.act(s, deterministic=False)
        s_next, r, terminal, timeout, _ = self.env.step(action)
        row = (s, 2 * (action - self.low) / span - 1, r, s_next, terminal, timeout and not terminal)
        for column, value in zip(self.columns.values(), row):
            column[i] = torch.as_tensor(value, dtype=torch.float32)
        self.observation = self.env.reset()[0] if terminal or timeout else s_next
        self.rows = i + 1

    def write(self) -> None:
        """The policy as it is, and the rows in D4RL's layout: what datasets/make.py reads."""
        (self.folder / "policies").mkdir(parents=True, exist_ok=True)
        torch.save(self.policy_state(), self.folder / "policies" / f"{self.rows:08d}.pt")
        with h5py.File(self.folder / "replay.hdf5", "w") as file:
            for key, column in self.columns.items():
                x = column[: self.rows].numpy(force=True)
                x = self.low + 0.5 * (x + 1) * (self.high - self.low) if key == "actions" else x
                file[key] = x if x.shape[1] > 1 or "obs" in key else x[:, 0]
            file.attrs["env_id"] = self.env_id

    def get_extra_state(self) -> dict[str, torch.Tensor]:
        """Its part of a checkpoint: the filled rows. With the last one the files are due, too."""
        if self.rows == self.args.steps:
            self.write()
        return {key: column[: self.rows].clone() for key, column in self.columns.items()}

    def set_extra_state(self, state: dict[str, torch.Tensor]) -> None:
        """Goes on after these rows with a new episode; the one that was cut counts as timed out."""
        self.rows = len(state["timeouts"])
        for key, column in self.columns.items():
            column[: self.rows] = state[key]
        self.columns["timeouts"][self.rows - 1] = 1 - self.columns["terminals"][self.rows - 1]
        self.observation, _ = self.env.reset(seed=self.args.seed + self.rows)


# From here on every file is the same: how data comes in, how a policy is judged, how a run goes.

# ------------------------------------------------------------------------------------- Dataset

# D4RL's returns of a random and of an expert policy, which score 0 and 100.
SCORES = {"HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3)}
SCORES |= {"Walker2d": (1.629008, 4592.3), "Ant": (-325.6, 3879.7)}
OURS = Path(__file__).resolve().parent.parent / "datasets"
COLUMNS = "terminals timeouts rewards actions observations next_observations final_observations"
KNOWN = {*COLUMNS.split(), *"truncations env_id action_low action_high".split()}
KNOWN |= {"ref_min_score", "ref_max_score"}


def check(holds, sentence: str) -> None:
    if not np.all(holds):
        raise SystemExit(sentence)


@contextlib.contextmanager
def explained(what: str):
    """Whatever goes wrong inside ends in one sentence."""
    try:
        yield
    except Exception as err:
        raise SystemExit(f"{what}: {(str(err).strip() or repr(err)).splitlines()[0]}") from err


def read_dataset(name: str) -> dict:
    """An .hdf5 or .npz file (a path, or a name in datasets/) or a Minari data set (a folder, or an
    id) as it is: arrays with a row per transition, and what it says of itself."""
    file = next((p for p in (Path(name), OURS / f"{name}.hdf5") if p.is_file()), None)
    if file:
        with np.load(file) if file.suffix == ".npz" else h5py.File(file) as found:
            arrays = {key: found[key][()] for key in KNOWN & found.keys()}
            return {**getattr(found, "attrs", {}), **arrays}
    folder = next((p for p in (name, f"{name}/data") if Path(p, "metadata.json").exists()), "")
    ok = ("/" in name and name.split("-v")[-1].isdigit()) or name in minari.list_local_datasets()
    there = ", ".join(sorted(path.stem for path in OURS.glob("*.hdf5"))) or "none"
    make = f"`python datasets/make.py {name}` makes or fetches what is ours or D4RL's (--list)"
    check(folder or ok, f"No data set '{name}'. At hand: {there}; {make}.")
    data = minari.MinariDataset(folder) if folder else minari.load_dataset(name, download=True)
    env, box = getattr(data, "_eval_env_spec", None) or data.env_spec, data.action_space
    for space in (data.observation_space, box):
        ok = isinstance(space, gym.spaces.Box | gym.spaces.Dict)
        check(ok, f"Data set '{name}' has {space}, not arrays of numbers.")

    def joined(x):  # as FlattenObservation does it; a discrete part has one axis, and fails
        return np.concatenate([joined(x[k]) for k in sorted(x)], 1) if isinstance(x, dict) else x

    parts = ((e, joined(e.observations)) for e in data)
    rows = [(e.terminations, e.truncations, e.rewards, e.actions, s[:-1], s[1:]) for e, s in parts]
    about = {"action_low": box.low, "action_high": box.high} | data.storage.metadata
    about["env_id"] = env.to_json() if env else "none"
    return about | dict(zip(COLUMNS.split(), map(np.concatenate, zip(*rows))))


def load_dataset(name: str, env_id: str = "") -> tuple[dict[str, np.ndarray], dict]:
    """The data, N transitions in float32, episode after episode: observations (N, S), actions
    (N, A) scaled to [-1, 1], rewards (N, 1), next_observations (N, S), recorded (N,): whether those
    are the successors, terminals (N, 1), returns_to_go (N, 1), each row's episode (N,). And the
    task: environment, sizes, bounds, scores. To bring data of your own, fill these."""
    of, x = f"Data set '{name}'", {}
    with explained(f"{of} cannot be read"):
        raw = read_dataset(name)
    # Every array is believed, none is guessed.
    lacks = {"observations", "actions", "rewards", "terminals"} - raw.keys()
    check(not lacks, f"{of} lacks {', '.join(lacks)}; it has {', '.join(raw)}.")
    n, discrete = np.size(raw["terminals"]), np.asarray(raw["actions"]).dtype.kind != "f"
    check(n and not discrete, f"{of}: {'its actions are discrete' if n else 'it is empty'}.")
    raw.setdefault("timeouts", raw.get("truncations", np.zeros(n)))
    for key in [key for key in COLUMNS.split() if key in raw]:
        with explained(f"{of}: '{key}'"):
            v = np.asarray(raw[key])
            # Our own files hold a successor once: in the next row, or as an episode's final one.
            rows = np.count_nonzero(x["terminals"] + x["timeouts"]) if "final" in key else n
            width = v.shape[1] if v.ndim > 1 and key.endswith("ons") else 1
            v = v.reshape(rows, x["observations"].shape[1] if "_obs" in key else width)
            x[key] = v.astype(np.float32)
        ok = np.isfinite(x[key]).all(1)
        check(ok, f"{of}: '{key}' is NaN or infinite, first in row {ok.argmin()}.")
        ok = (np.abs(v - x[key]).max(0) <= 0.01 * x[key].std(0)) | (np.ptp(x[key], 0) == 0)
        check(ok, f"{of}: float32 is too coarse for {key} {ok.argmin()}, take its mean off.")
    s, a, terminal = x["observations"], x["actions"], x["terminals"][:, 0] > 0

    # Environment, bounds and scores are the file's, unless --env-id is another environment's.
    own = np.asarray(raw.get("env_id", "none")).astype(str).item()
    task = {"env": env_id or own, "env_id": "none", "sizes": [s.shape[1], a.shape[1]]}
    says = raw if own == "none" or env_id in ("", "none", own) else {}
    box = gym.spaces.Box(-1, 1, a.shape[1:])
    if task["env"] != "none":
        env = make_env(task)
        task["env_id"], box = env.spec.id, env.action_space
    low, high = says.get("action_low", box.low), says.get("action_high", box.high)
    scores = [says.get("ref_min_score"), says.get("ref_max_score")]
    task["scores"] = None if None in scores else [float(np.ravel(x)[0]) for x in scores]
    with explained(f"{of}: bounds {low} and {high} of its actions"):
        bounds = np.float64([np.broadcast_to(x, a.shape[1:]) for x in (low, high)])  # (2, A)
    near = np.float32(bounds)  # where this rounds outwards, one step inwards
    low, high = np.where([[1], [-1]] * (near - bounds) < 0, np.nextafter(near, near[::-1]), near)
    span = high - low
    ok = np.isfinite(span) & (span > 0) & (a >= low - 1e-4 * span) & (a <= high + 1e-4 * span)
    where = f"first in row {ok.all(1).argmin()}, or these are no bounds"
    check(ok, f"{of}: an action leaves its bounds, {low} to {high}, {where}.")

    # A terminal ends the task, a timeout only the recording: the first alone stops the bootstrap.
    ends, recorded = terminal | (x["timeouts"][:, 0] > 0), np.ones(n, bool)
    check(ends.any(), f"{of}: no episode ends. Mark terminals, and timeouts (or truncations).")
    if "next_observations" not in x:  # it is the next row, but for the last one of an episode
        x["next_observations"] = np.append(s[1:], s[-1:], axis=0)
        recorded = ~ends | ("final_observations" in x)
        x["next_observations"][ends & recorded] = x.get("final_observations", 0)
        recorded[-1] &= ends[-1]
    ends[-1] = True
    keep = recorded | terminal  # nothing follows a terminal: its row needs no successor
    check(keep.any(), f"{of}: none of its rows has a successor, write next_observations.")
    episodes = np.cumsum(ends) - ends
    to_go = np.cumsum(x["rewards"][::-1], dtype=np.float64)[::-1]
    to_go -= np.append(to_go[1:], 0)[np.flatnonzero(ends)[episodes]]  # what later episodes hold
    x |= {"actions": (2 * (a - low) / span - 1).clip(-1, 1), "recorded": recorded}
    x |= {"terminals": np.float32(terminal[:, None]), "returns_to_go": np.float32(to_go[:, None])}
    keys = "observations actions rewards next_observations recorded terminals returns_to_go"
    data = {key: x[key][keep] for key in keys.split()} | {"episodes": episodes[keep]}
    task |= {"digest": hashlib.md5(b"".join(v.tobytes() for v in data.values())).hexdigest()}
    _, first, data["episodes"] = np.unique(data["episodes"], return_index=True, return_inverse=True)
    returns = data["returns_to_go"][first]
    print(f"{name}: {keep.sum():,} transitions, {len(first):,} episodes, actions {low} to {high};")
    print(f"returns: {returns.mean():.4g} on average, {returns.max():.4g} at best")
    return data, task | {"bounds": [low.tolist(), high.tolist()]}


# ---------------------------------------------------------------------------------- Evaluation


def make_env(task: dict, video="") -> gym.Env:
    """The task's environment: an id, also module:Id, or a specification in JSON as Minari has."""
    sys.path += [x for x in ("", str(OURS)) if x not in sys.path]  # for modules of these folders
    env, of = task["env"], f"Environment {task['env'][:50]} (--env-id{', MUJOCO_GL' * bool(video)})"
    with explained(of):
        env = gym.envs.registration.EnvSpec.from_json(env) if env[0] == "{" else env
        env = gym.make(env, **({"render_mode": "rgb_array"} if video else {}))
        env = gym.wrappers.FlattenObservation(env)
        spaces, shapes = (env.observation_space, env.action_space), [(x,) for x in task["sizes"]]
        ok = all(isinstance(x, gym.spaces.Box) and x.shape == y for x, y in zip(spaces, shapes))
        check(ok, f"{of} has {spaces[0]} and {spaces[1]}, the data has boxes of shapes {shapes}.")
        check(env.spec.max_episode_steps, f"{of} has no time limit: register it with one.")
        env.reset(seed=0), env.step(env.action_space.sample()), video and env.render()  # a trial
        return gym.wrappers.RecordVideo(env, str(video), disable_logger=True) if video else env


def evaluate(policy, task: dict, episodes: int, seed: int, video="") -> dict[str, float]:
    """Return, length and score of a policy over some episodes, all stepped together; the columns
    of all but the first of its actors have a suffix."""
    row = {}
    for suffix, act in policy.actors().items():
        envs = [make_env(task, "" if i or suffix else video) for i in range(episodes)]
        returns, lengths, running = np.zeros(episodes), np.zeros(episodes), list(range(episodes))
        with explained(f"Environment '{task['env_id']}' failed (what was trained is saved)"):
            s = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
            while running:
                for i, a in zip(running[:], act(s[running])):
                    s[i], reward, terminated, truncated, _ = envs[i].step(a)
                    returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
                    if terminated or truncated:
                        running.remove(i)
            [env.close() for env in envs]
        zero, hundred = task["scores"] or SCORES.get(envs[0].spec.name, (math.nan, math.nan))
        score = 100 * (returns.mean() - zero) / (hundred - zero)
        found = (returns.mean(), returns.std(), lengths.mean(), score)
        keys = ("return_mean", "return_std", "length_mean", "score")
        row |= {key + suffix: float(value) for key, value in zip(keys, found)}
    return row


def load_policy(checkpoint: str | Path, device: str = "cpu", **flags) -> Policy:
    """A trained policy, ready for `policy.act(observations)`. Flags of acting may be given anew."""
    path = Path(checkpoint, "checkpoint.pt") if Path(checkpoint).is_dir() else Path(checkpoint)
    with explained(f"{path} is no checkpoint of {Learner.__name__}"):
        kept = torch.load(path, map_location=device, weights_only=True)
        check(kept["algorithm"] == Learner.__name__, f"{path} is of {kept['algorithm']}.")
        policy = Policy(kept["task"], Args(**kept["args"] | flags)).to(device).eval()
        policy.load_state_dict({k[7:]: v for k, v in kept["learner"].items() if "policy." in k[:7]})
    policy.saved, policy.folder = kept, path.parent
    return policy


# ------------------------------------------------------------------------------- Training loop


def train(args: Args) -> list[dict[str, float]]:
    """Trains one run, or with --evaluate looks at one. Returns its evaluations, oldest first."""
    least = dict(seed=0, steps=1, batch_size=1, threads=1, eval_every=0, eval_episodes=1)
    for flag, low in least.items():
        check(getattr(args, flag) >= low, f"--{flag.replace('_', '-')} must be {low} or more.")
    check(0 <= args.validation_fraction < 1, "--validation-fraction is a share, 0 to below 1.")
    with explained(f"--device {args.device}"):
        device = torch.empty(0, device=args.device).device
    cuda = [device] if device.type == "cuda" else []
    [torch.cuda.set_stream(torch.cuda.Stream(x)) for x in cuda]  # graphs need one of their own
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_num_threads(args.threads)
    if args.evaluate:
        # Flags of acting are obeyed, where they are given; the others are the checkpoint's.
        asked = {k: v for k in Policy.flags if (v := getattr(args, k)) != getattr(Args, k)}
        policy = load_policy(args.evaluate, args.device, **asked)
        task, other = policy.saved["task"], {"env": args.env_id, "scores": None}
        task |= other if args.env_id not in ("", task["env"]) else {}
        check(task["env"] != "none", f"--evaluate {args.evaluate}: its --env-id is none, give one.")
        torch.manual_seed(0)
        video = policy.folder / "video" if args.capture_video else ""
        row = evaluate(policy, task, args.eval_episodes, args.seed, video)
        print(f"{task['env']}: {', '.join(f'{k} {v:.4g}' for k, v in row.items())}  {video}")
        return [row]
    name, path = Path(__file__).stem, Path(args.dataset)
    data_name = path.stem if path.is_file() else args.dataset.strip("/").replace("/", "-")
    folder = Path(args.run_dir or f"runs/{name}/{data_name}/seed{args.seed}")
    checkpoint, config = folder / "checkpoint.pt", folder / "config.json"
    begun = checkpoint.exists() or (config.exists() and not args.resume)
    check(begun == args.resume, f"{folder} has {'a run; --resume' if begun else 'no checkpoint'}.")

    # The data: whole episodes to train on, some others for the validation losses.
    data, task = load_dataset(args.dataset, args.env_id) if args.offline else empty_buffer(args)
    count = data["episodes"].max() + 1
    held_out = np.random.default_rng(args.seed).permutation(count)
    held_out = held_out[: min(count - 1, math.ceil(args.validation_fraction * count))]
    few = held_out[: 1 + 10_000 * count // len(data["episodes"])]  # enough for a mean
    data, validation = (
        {key: torch.as_tensor(array[rows], device=device) for key, array in data.items()}
        for rows in (~np.isin(data["episodes"], held_out), np.isin(data["episodes"], few))
    )

    # The learner, new or where an earlier run stopped.
    torch.manual_seed(args.seed)
    learner = Learner(data, task, args)
    optimizers = [x for x in vars(learner).values() if isinstance(x, torch.optim.Optimizer)]
    start, seconds, history = 0, 0.0, []
    if args.resume:
        saved = load_policy(checkpoint, args.device).saved
        start, seconds, history = saved["step"], saved["seconds"], saved["history"]
        old, new, flags = saved["args"] | saved["task"], asdict(args) | task, list(vars(args))
        free = ("steps", *flags[flags.index("eval_every") :], *Policy.flags)
        changed = [f"{key} {old[key]}" for key in old if old[key] != new[key] and key not in free]
        check(not changed, f"--resume: {checkpoint} was made with {', '.join(changed)}.")
        check(start <= args.steps, f"--resume: {checkpoint} is at step {start:,}, past --steps.")
        learner.load_state_dict(saved["learner"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        for restore, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), saved["rng"]):
            restore(state.cpu())

    # The run directory: claimed at once, never taken twice.
    about = {"args": asdict(args), "task": task, "python": sys.version, "threads": args.threads}
    about["gpu"] = torch.cuda.get_device_name() if cuda else "none"
    about["cpu"] = torch.backends.cpu.get_cpu_capability()
    packages = torch, np, gym, minari, sys.modules.get("mujoco", np)
    with explained(f"--run-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with open(config, "w" if args.resume else "x") as file:
            json.dump(about | {x.__name__: x.__version__ for x in packages}, file, indent=2)
    writer = SummaryWriter(folder, purge_step=start + 1)
    print(f"{name}: steps {start:,} to {args.steps:,} on {device}, written to {folder}", flush=True)

    def save():
        state = {"algorithm": Learner.__name__, "args": asdict(args), "task": task, "step": step}
        state |= {"seconds": time.time() - began, "learner": learner.state_dict()}
        state |= {"optimizers": [x.state_dict()["state"] for x in optimizers], "history": history}
        state |= {"rng": [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]}
        torch.save(state, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").replace(checkpoint)  # at once: a crash leaves the old one

    metrics, row, heard, handlers = {}, history[-1] if history else {"step": 0}, [], {}
    for n in (signal.SIGINT, signal.SIGTERM):  # heard between two updates, a second one at once
        handlers[n] = signal.signal(n, lambda *_: sys.exit(1) if heard else heard.append(1))
    fast = functools.cache(graphed if cuda and args.cuda_graph else lambda update: update)
    began, said = time.time() - seconds, time.time()
    bar = tqdm(total=args.steps, initial=start, unit="step", disable=None)
    for step in range(start, args.steps + 1):
        if step > start:
            metrics |= {k: v.detach() for k, v in fast(learner.phase(step))().items()}
            bar.update()
        last, stop = step == args.steps, bool(heard)
        evaluates = args.eval_every and (last or step % args.eval_every == 0) and step > row["step"]
        saves = evaluates or last or stop or step % (args.save_every or math.inf) == 0
        speed = (step - start) / (time.time() - began - seconds + 1e-9)
        left = tqdm.format_interval((args.steps - step) / (speed + 1e-9))
        if bar.disable and time.time() - said > 30:
            said = time.time()
            print(f"step {step:>9,}  {speed:.4g} steps/s  left {left}", flush=True)
        if not saves and step % 500:
            continue
        for key, value in metrics.items():
            ok = value.isfinite().all().item()
            check(ok, f"Step {step}: {key} is not finite; {checkpoint} is from before.")
            (writer.add_scalar if value.numel() == 1 else writer.add_histogram)(key, value, step)
        writer.add_scalar("charts/steps_per_second", speed, step)
        if saves:
            save()
        if evaluates:
            row = {"step": step, "seconds": round(time.time() - began, 1)}
            video = folder / "video" if args.capture_video and last else ""
            learner.eval()
            with torch.random.fork_rng(cuda), torch.no_grad():
                torch.manual_seed(0)  # for policies that sample; training's numbers are kept
                if task["env"] != "none":
                    seed = 1_000_003 * args.seed + step
                    row |= evaluate(learner.policy, task, args.eval_episodes, seed, video)
                losses = learner.validate(validation) if len(held_out) else {}
            learner.train()
            row |= {f"validation/{key}": float(value) for key, value in losses.items()}
            history.append(row)
            columns = dict.fromkeys(key for x in history for key in x)
            lines = [columns, *([str(x.get(key, "")) for key in columns] for x in history)]
            (folder / "eval.csv").write_text("".join(",".join(line) + "\n" for line in lines))
            for key in list(row)[2:]:
                writer.add_scalar(key if "/" in key else f"eval/{key}", row[key], step)
            shown = [k for k in row if k[:5] in ("retur", "score") and "_std" not in k]
            shown = [f"  {k} {row[k]:.4g}" for k in shown or list(row)[2:]]
            best = max(x.get("return_mean", math.nan) for x in history)
            bar.write(f"step {step:>9,}{''.join(shown)}  best {best:.4g}  left {left}  {video}")
            if last:
                save()
        if stop and not last:
            break
    [signal.signal(number, handler) for number, handler in handlers.items()]
    writer.close(), bar.close()
    check(last, f"Saved at step {step:,}; the same command with --resume goes on.")
    return history


def adam(of: nn.Module | list, learning_rate: float, **options) -> torch.optim.Adam:
    """Adam as one fused kernel, in a form that a CUDA graph can capture."""
    of = list(of.parameters() if isinstance(of, nn.Module) else of)
    return torch.optim.Adam(of, learning_rate, fused=True, capturable=of[0].is_cuda, **options)


def minimise(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def graphed(update):
    """The same update as one CUDA graph: hundreds of kernels at the cost of one launch."""

    def calls():
        for _ in range(3):  # capture asks for some calls before it
            yield update()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records the update, does not run it
            metrics = {k: v.detach() for k, v in update().items()}
        while True:
            graph.replay()
            yield metrics

    return functools.partial(next, calls())


if __name__ == "__main__":
    train(tyro.cli(Args))
