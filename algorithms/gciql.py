"""Goal-conditioned IQL, IVL and BC, "OGBench: Benchmarking Offline Goal-Conditioned RL"
Seohong Park, Kevin Frans, Benjamin Eysenbach, Sergey Levine. ICLR 2025, arXiv:2410.20092.

No reward is needed: whatever state an episode came to later was a goal that its earlier actions
reached (hindsight). Every step costs 1 until the goal is there, so V(s, g) counts discounted steps;
taking the upper expectile, episodes that reach a place by different ways are stitched together.

    g        the state itself, a later one of its episode (geometric in γ), or any of the data's
    k        steps looked ahead: n = --n-step, or fewer to the episode's end or to the goal
    y        = -(1 + γ + ... + γ^(k-1)) + γ^k V(s_{t+k}, g)              without V if s_{t+k} is g
    gciql    L(V) = |κ - 1(u < 0)| u²,   u = min_i Q'_i(s, a, g) - V(s, g)   κ > 0.5, an expectile
             L(Q_i) = (Q_i(s, a, g) - y)²
             L(π) = -Q(s, π(s, g), g) / mean|Q| - α log π(a|s, g)               (DDPG+BC)
    gcivl    L(V_i) = |κ - 1(u < 0)| (y_i - V_i(s, g))²,   u = min_i y_i - mean_i V'_i(s, g)
             L(π) = -min(exp(α A), 100) log π(a|s, g),   A = V(s_{t+k}, g) - V(s, g)     (AWR)
    gcbc     L(π) = -log π(a|s, g)                        no value: clone whoever came to g later

π(·|s, g) = N(μ(s, g), I). Its goals are later states of the episode, uniformly (--actor-goals).
Q and V are networks with weights of their own, ' marks slow copies; y of gcivl uses V'.

    python algorithms/gciql.py --dataset pointmaze-medium-navigate --bc-alpha 0.003
    python algorithms/gciql.py --dataset pointmaze-medium-stitch --algo gcivl --n-step 10 \
        --actor-goals 0 0.5 0.5 --awr-alpha 1

Measured: pointmaze-medium-navigate, gcivl with --n-step 10, 4,000 steps of small networks, five
seeds: over pairs of places six cells and more apart V ranks like the way on foot 0.13 better than
the straight line's 0.55 (correlation of ranks), 42 seconds. A million steps were not run.

Differs from the paper / official code:
- --n-step is ours (1: the official targets). Looking n steps ahead, the value of a far goal takes
  n times fewer updates to arrive; what the data did in these steps is taken to be good.
- After a terminal nothing is reached any more: there V is -1 / (1 - γ). Officially data have none.
- An environment that names no goal is given the state in which the data's best episode ended.
- 5 % of the episodes are held out for validation losses (--validation-fraction 0: none).
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
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """Goal-conditioned learning from data without rewards: GCIQL, GCIVL and GCBC."""

    algo: Literal["gciql", "gcivl", "gcbc"] = "gciql"  # Q and V, V alone, or cloning alone
    n_step: int = 1  # steps that targets look ahead; 10 where a short run meets far goals
    extraction: Literal["ddpgbc", "awr"] = "ddpgbc"  # gciql's policy climbs Q, or clones weighted
    bc_alpha: float = 0.3  # α of ddpgbc, weight of cloning; pointmaze 0.003, antmaze 0.3, cube 1
    awr_alpha: float = 10.0  # α of awr, inverse temperature of the weights; gcivl always has awr
    expectile: float = 0.9  # κ of the value's loss, in (0, 1); 0.5 is the mean
    value_goals: tuple[float, float, float] = (0.2, 0.5, 0.3)  # shares: current, future, any state
    actor_goals: tuple[float, float, float] = (0.0, 1.0, 0.0)  # the same; stitch data: 0 0.5 0.5
    gamma: float = 0.99  # discount per step; future value goals lie 1 / (1 - γ) steps ahead
    tau: float = 0.005  # share of the new parameters in a target network's update
    normalize: bool = False  # states and goals with mean 0 and deviation 1; officially as they are
    steps: int = 1_000_000  # gradient steps
    batch_size: int = 1024  # transitions per gradient step
    hidden_dim: int = 512  # units in each hidden layer
    hidden_layers: int = 3  # of every network
    learning_rate: float = 3e-4  # Adam's step size

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


# ------------------------------------------------------------------------------------ Networks


def network(in_dim, out_dim, args, layer_norm):
    """Hidden layers of GELU, then LayerNorm where it is asked for; weights as OGBench begins."""
    layers, norm = [], [nn.LayerNorm(args.hidden_dim, eps=1e-6)] if layer_norm else []
    for fan_in in (in_dim, *[args.hidden_dim] * (args.hidden_layers - 1)):
        layers += [nn.Linear(fan_in, args.hidden_dim), nn.GELU("tanh"), *copy.deepcopy(norm)]
    net = nn.Sequential(*layers, nn.Linear(args.hidden_dim, out_dim))
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


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
    """π: states and goals (B, S) -> mean action μ (B, A); its standard deviation is 1."""

    flags = ()  # those of acting: --evaluate obeys them

    def __init__(self, task, args):
        super().__init__()
        self.scaling, (state_dim, action_dim) = Scaling(task), task["sizes"]
        self.net = network(2 * state_dim, action_dim, args, layer_norm=False)
        self.net[-1].weight.data *= 0.1  # begins near the middle of the actions
        self.register_buffer("goal", torch.zeros(state_dim))  # raw; where nobody names another

    def forward(self, s, g):
        return self.net(torch.cat([s, g], dim=-1))

    def log_prob(self, s, g, a):
        """log N(a; μ(s, g), I) in nats, (B, 1)."""
        log_prob = -0.5 * (a - self(s, g)).square() - 0.5 * math.log(2 * math.pi)  # (B, A)
        return log_prob.sum(-1, keepdim=True)

    @torch.no_grad()
    def act(self, observations, goals=None):
        """What a user calls: one raw observation (S,) or many (N, S), NumPy or tensor, and the
        observations to come to, one for all or one for each -> as many actions in the environment's
        bounds, the means. Without goals: on to where the data's best episode ended."""
        s = self.scaling.state(observations)
        g = self.scaling.state(self.goal if goals is None else goals).expand_as(s)
        return self.scaling.action(self(s, g), observations)

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {"": self.act}


class Values(nn.Module):
    """Some networks side by side: V(s, g) or Q(s, a, g), inputs (B, ...) -> (members, B, 1)."""

    def __init__(self, in_dim, members, args):
        super().__init__()
        nets = (network(in_dim, 1, args, layer_norm=True) for _ in range(members))
        self.nets = nn.ModuleList(nets)

    def forward(self, *inputs):
        x = torch.cat(inputs, dim=-1)
        return torch.stack([net(x) for net in self.nets])


# ----------------------------------------------------------------------------------- Algorithm


class GCIQL(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        for flag in ("gamma", "expectile"):
            ok = 0 < getattr(args, flag) < 1
            check(ok, f"--{flag} {getattr(args, flag)}: between 0 and 1, exclusive.")
        check(min(args.n_step, args.hidden_layers) >= 1, "--n-step, --hidden-layers: 1 or more.")
        for flag in ("value_goals", "actor_goals"):
            shares = getattr(args, flag)
            ok = min(shares) >= 0 and abs(sum(shares) - 1) < 1e-6
            check(ok, f"--{flag.replace('_', '-')} {shares}: three shares whose sum is 1.")
        self.args, device, (state_dim, action_dim) = args, data["rewards"].device, task["sizes"]
        self.policy = Policy(task, args).to(device)
        if args.normalize:
            self.policy.scaling.fit(data["observations"])
        first = data["episodes"].diff(prepend=data["episodes"][:1] - 1) != 0  # (N,)
        best = data["episodes"][first][data["returns_to_go"][first, 0].argmax()]
        self.policy.goal.copy_(data["observations"][data["episodes"] == best][-1])
        self.data = self.columns(data)

        # GCIVL has two V and copies that follow them; GCIQL one V, and two Q with such copies.
        self.v = self.critic = self.copies = None
        if args.algo != "gcbc":
            self.v = Values(2 * state_dim, 2 if args.algo == "gcivl" else 1, args).to(device)
        if args.algo == "gciql":
            self.critic = Values(2 * state_dim + action_dim, 2, args).to(device)
        self.copies = copy.deepcopy(self.critic if args.algo == "gciql" else self.v)
        nets = [net for net in (self.policy, self.v, self.critic) if net]
        self.optimizer = adam([x for net in nets for x in net.parameters()], args.learning_rate)

    def phase(self, step: int):
        """The update to do at this step; where there are several, each is a CUDA graph."""
        return self.update

    def update(self) -> dict[str, torch.Tensor]:
        """One step of every network. Returns tensors, never synchronises."""
        n, device = len(self.data["s"]), self.data["s"].device
        i = torch.randint(n, (self.args.batch_size,), device=device)
        losses, metrics = self.losses(self.batch(self.data, i))
        self.update_copies()  # towards the weights of before the step, as in the official code
        minimise(self.optimizer, sum(losses.values()))  # each reaches one network only
        return metrics | {f"losses/{name}": loss for name, loss in losses.items()}

    # Hindsight: which states to call goals, and what a step towards them costs.

    def columns(self, data):
        """Data as the sampler wants it: s (N, S), a (N, A), the successors (N, S), the terminals
        (N, 1) and the number of the last row of each row's episode (N,)."""
        s, s_next = map(
            self.policy.scaling.state, (data["observations"], data["next_observations"])
        )
        rows = torch.arange(len(s), device=s.device)
        goes_on = data["episodes"].diff(append=data["episodes"][-1:] + 1) == 0
        last = rows.masked_fill(goes_on, len(s)).flip(0).cummin(0).values.flip(0)
        found = {"s": s, "a": data["actions"], "s_next": s_next, "d": data["terminals"]}
        return found | {"last": last}

    def draw_goals(self, columns, i, shares, geometric):
        """Rows of the goals of rows i (B,), drawn as OGBench does."""
        n, last = len(columns["s"]), columns["last"][i]
        u = torch.rand(i.shape, device=i.device)
        if geometric:  # an offset of 1, 2, 3, ... with probability (1 - γ) γ^(offset - 1)
            offset = torch.empty_like(u).geometric_(1 - self.args.gamma)
            later = i + torch.minimum(offset, last - i).long()
        else:  # what comes in the episode, all alike; its last row has itself alone
            later = last - ((last - i - 1).clamp(min=0) * torch.rand_like(u)).round().long()
        anywhere = torch.randint(n, i.shape, device=i.device)
        current, future, _ = shares
        return torch.where(u < current, i, torch.where(u < current + future, later, anywhere))

    def look_ahead(self, columns, i, goals):
        """From rows i, n steps ahead or fewer, to the episode's end or to the goal: k (B,), whether
        the goal is there then, and the row whose successor is s_{t+k}, at least one step ahead."""
        to_go = columns["last"][i] - i + 1
        k, h = to_go.clamp(max=self.args.n_step), goals - i  # a goal's number tells where it lies
        reached = (h >= 0) & (h < k)
        k = torch.where(reached, h, k)
        return k, reached, i + k.clamp(min=1) - 1

    def batch(self, columns, i):
        """Rows i with goals for V and Q, g, and for the policy, g_pi, all (B, S); r (B, 1) and
        the factor m of V in y = r + m V(s_k, g); s_k and s_pi, the states looked ahead to."""
        g = self.draw_goals(columns, i, self.args.value_goals, geometric=True)
        g_pi = self.draw_goals(columns, i, self.args.actor_goals, geometric=False)
        k, reached, end = self.look_ahead(columns, i, g)
        discount = self.args.gamma ** k[:, None]  # (B, 1)
        r = -(1 - discount) / (1 - self.args.gamma)  # -1 per step
        *_, end_pi = self.look_ahead(columns, i, g_pi)
        s, s_next, d = columns["s"], columns["s_next"], columns["d"]
        x = {"s": s[i], "a": columns["a"][i], "g": s[g], "g_pi": s[g_pi]}
        x |= {"r": r, "m": discount * ~reached[:, None], "s_k": s_next[end], "d_k": d[end]}
        return x | {"s_pi": s_next[end_pi], "d_pi": d[end_pi]}

    # The three losses.

    def losses(self, x):
        """Those of --algo on a batch, each with a gradient for one network, and what is logged."""
        return {"gciql": self.gciql, "gcivl": self.gcivl, "gcbc": self.gcbc}[self.args.algo](**x)

    def gcbc(self, s, a, g_pi, **_):
        log_prob = self.policy.log_prob(s, g_pi, a)  # (B, 1)
        return {"actor": -log_prob.mean()}, {}

    def gcivl(self, s, a, g, g_pi, r, m, s_k, d_k, s_pi, d_pi):
        # Targets of V_1 and V_2 from their own copies. Whether a step was good is decided once,
        # by the smaller target and by copies on both sides: less noise mistaken for good luck.
        with torch.no_grad():
            y = r + m * self.dead(self.copies(s_k, g), d_k)  # (2, B, 1)
            u = y.amin(0) - self.copies(s, g).mean(0)  # (B, 1)
        v = self.v(s, g)
        v_loss = (self.weight(u) * (y - v).square()).mean((1, 2)).sum()

        # Cloning, weighted by the way towards the goal that was made in k steps.
        with torch.no_grad():
            A = (self.dead(self.v(s_pi, g_pi), d_pi) - self.v(s, g_pi)).mean(0)  # (B, 1)
        actor_loss, metrics = self.awr(s, a, g_pi, A)
        return {"v": v_loss, "actor": actor_loss}, metrics | {"values/v": v.mean()}

    def gciql(self, s, a, g, g_pi, r, m, s_k, d_k, **_):
        # V is an upper expectile of Q over the data's own actions: no other is asked for.
        with torch.no_grad():
            q_copy = self.copies(s, a, g).amin(0)  # (B, 1)
            y = r + m * self.dead(self.v(s_k, g)[0], d_k)
        v = self.v(s, g)[0]
        u = q_copy - v
        v_loss = (self.weight(u) * u.square()).mean()
        q = self.critic(s, a, g)  # (2, B, 1)
        critic_loss = (q - y).square().mean((1, 2)).sum()
        losses, metrics = {"v": v_loss, "critic": critic_loss}, {"values/v": v.mean()}
        metrics |= {"values/q": q.mean()}

        # The policy, by weighted cloning or by climbing Q near the data.
        if self.args.extraction == "awr":
            with torch.no_grad():
                A = self.critic(s, a, g_pi).amin(0) - self.v(s, g_pi)[0]
            losses["actor"], more = self.awr(s, a, g_pi, A)
            return losses, metrics | more
        self.critic.requires_grad_(False)  # the gradient passes through Q, it stops at π
        q_pi = self.critic(s, self.policy(s, g_pi).clamp(-1, 1), g_pi).amin(0)  # (B, 1)
        self.critic.requires_grad_(True)
        q_loss = -q_pi.mean() / (q_pi.detach().abs().mean() + 1e-6)  # free of the values' scale
        bc_loss = -self.policy.log_prob(s, g_pi, a).mean()
        losses["actor"] = q_loss + self.args.bc_alpha * bc_loss
        return losses, metrics | {"losses/q": q_loss, "losses/bc": bc_loss}

    def awr(self, s, a, g_pi, A):
        """Cloning, each action weighted by exp(α A), 100 at most."""
        weight = (self.args.awr_alpha * A).exp().clamp(max=100)  # (B, 1)
        clipped = (weight >= 100).float().mean()
        loss = -(weight * self.policy.log_prob(s, g_pi, a)).mean()
        return loss, {"advantage/a": A, "advantage/clipped": clipped}

    def weight(self, u):
        """Of squared errors, so that V becomes an expectile: κ where u > 0, elsewhere 1 - κ."""
        return torch.where(u > 0, self.args.expectile, 1 - self.args.expectile)

    def dead(self, v, d):
        """Values of states (.., B, 1); after a terminal (B, 1) no goal is reached, ever."""
        return torch.where(d > 0, -1 / (1 - self.args.gamma), v)

    @torch.no_grad()
    def update_copies(self):
        if self.copies:
            followed = self.critic if self.args.algo == "gciql" else self.v
            copies, originals = list(self.copies.parameters()), list(followed.parameters())
            torch._foreach_lerp_(copies, originals, self.args.tau)

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses on held-out transitions, and the mean's squared error: with goals of their own."""
        columns = self.columns(data)
        x = self.batch(columns, torch.arange(len(columns["s"]), device=columns["s"].device))
        mse = (self.policy(x["s"], x["g_pi"]) - x["a"]).square().mean()
        return self.losses(x)[0] | {"mse": mse}


Learner = GCIQL  # the name by which the training loop knows it

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
    """Return, length and score of a policy over some episodes of each task that the environment
    has, all stepped together, and its success by task. This file's own function: each episode has a
    goal, the policy is told, and an episode succeeds if its last step says so."""
    envs = [make_env(task, video)]
    tasks = len(getattr(envs[0].unwrapped, "task_infos", ())) or 1
    n, goals = episodes * tasks, []
    envs += [make_env(task) for _ in range(n - 1)]
    (returns, lengths, success), running = np.full((3, n), [[0], [0], [math.nan]]), list(range(n))
    with explained(f"Environment '{task['env_id']}' failed (what was trained is saved)"):
        s = []
        for i, env in enumerate(envs):  # OGBench also draws from NumPy and the space of actions
            np.random.seed((seed + i) % 2**32), env.action_space.seed(seed + i)  # noqa: NPY002
            options = {"task_id": 1 + i // episodes} if tasks > 1 else None
            first, info = env.reset(seed=seed + i, options=options)
            s.append(first), goals.append(info.get("goal", policy.goal.numpy(force=True)))
        s, goals = np.stack(s), np.stack(goals)
        while running:
            for i, a in zip(running[:], policy.act(s[running], goals[running])):
                s[i], reward, terminated, truncated, info = envs[i].step(a)
                returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
                success[i] = info.get("success", math.nan)
                if terminated or truncated:
                    running.remove(i)
        [env.close() for env in envs]
    zero, hundred = task["scores"] or SCORES.get(envs[0].spec.name, (math.nan, math.nan))
    told, by_task = np.isfinite(success).all(), success.reshape(tasks, -1).mean(1)
    score = by_task.mean() if told else (returns.mean() - zero) / (hundred - zero)
    row = {"return_mean": returns.mean(), "return_std": returns.std()}
    row |= {"length_mean": lengths.mean(), "score": 100 * score}
    if told:
        row |= {"success": by_task.mean()}
        row |= {f"success_task{i}": x for i, x in enumerate(by_task, 1)} if tasks > 1 else {}
    return {key: float(value) for key, value in row.items()}


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
    data, task = load_dataset(args.dataset, args.env_id)
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
