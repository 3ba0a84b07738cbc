"""Diffuser, "Planning with Diffusion for Flexible Behavior Synthesis". Michael Janner, Yilun Du,
Joshua Tenenbaum, Sergey Levine. ICML 2022, arXiv:2205.09991.

A plan is a picture: H steps long, a column of actions and states for each. A diffusion model paints
it, all steps at once, out of noise. What is wanted of it is put in while it is painted: the first
state is the one that is (inpainting), and the gradient of a learnt return pulls (guidance). Do the
best plan's first action, then plan anew. Hopper takes a CPU hours; with sizes as below, minutes.

    plan       x = (a_t, s_t), ..., (a_{t+H-1}, s_{t+H-1})
    noising    x_i = √ᾱ_i x + √(1 - ᾱ_i) ε,   ε ~ N(0, I),   i uniform in 1 ... T,   s_t kept
    model      L(θ) = Σ w |x - x_θ(x_i, i)|²          w = 10 for a_t, 0 for s_t, otherwise 1
    value      L(φ) = (J - J_φ(x_i, i))²,   J = r_t + γ r_{t+1} + γ² r_{t+2} + ... of the episode
    sampling   x_T ~ N(0, I);  x_i ← x_i + c Σ_i ∇J_φ(x_i, i);  x_{i-1} ~ N(μ(x_i, x_θ), Σ_i)

N(μ, Σ_i) is the noising's posterior, ᾱ_i = (1 - β_1) ... (1 - β_i), and c is --guidance.

    python algorithms/diffuser.py --dataset hopper-medium-replay --device cuda
    python algorithms/diffuser.py --dataset pendulum-random-medium-expert --steps 1500 \
        --horizon 16 --diffusion-steps 10 --hidden-dim 16 --multipliers 1 2 --plans 4 --execute 4 \
        --guidance 10 --learning-rate 2e-3 --ema-rate 0.01 --gamma 0.97

Measured: tests/crossing.npz, 1,200 steps, five seeds: score 69 with guidance 30, 9 without.

Differs from the paper / official code:
- J is learnt in its standard deviations, so that c does not depend on rewards (raw J, c = 0.1).
- Model and value learn from the same noised plans, as long (10^6 and 2 * 10^5 steps, apart).
- Slow copies act; they move by 0.0005 at every step, the code's by 0.005 at every tenth.
- After a terminal a plan rests in the terminal state (in zeros). None crosses a timeout.
- The value network is the U-Net's first half and two layers (two further halvings).
- x_θ is √ᾱ_i x_i and √(1 - ᾱ_i) times the U-Net's output (the output). No attention, no goals.
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
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """Diffuser: a diffusion model of whole plans, and a value that guides how they are drawn."""

    guidance: float = 1.0  # c, how strongly the gradient of the return pulls; 0: not at all
    guide_steps: int = 2  # pulls before each denoising step
    guide_stop: int = 2  # the last denoising steps, before which nothing pulls
    plans: int = 64  # plans drawn for a decision, of which the best is followed
    execute: int = 1  # actions done of a plan before the next; decisions are as much cheaper
    horizon: int = 32  # H, steps of a plan
    diffusion_steps: int = 20  # T, denoising steps from noise to a plan
    multipliers: tuple[int, ...] = (1, 2, 4, 8)  # channels of each level, halved in length each
    action_weight: float = 10.0  # weight of the first action in the model's loss
    gamma: float = 0.99  # discount of J
    termination_penalty: float = -100.0  # is added to a terminal step's reward
    ema_rate: float = 0.0005  # share of the new parameters in the slow copies, which act
    steps: int = 1_000_000  # gradient steps
    batch_size: int = 64  # plans of H steps per gradient step
    hidden_dim: int = 32  # channels that --multipliers multiplies
    learning_rate: float = 2e-4  # Adam's step size

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


def convolve(fan_in: int, fan_out: int) -> nn.Sequential:
    conv = nn.Conv1d(fan_in, fan_out, 5, padding=2)
    return nn.Sequential(conv, nn.GroupNorm(8, fan_out), nn.Mish())


class Block(nn.Module):
    """Two convolutions over a plan's time, the noise step between them; x is handed across."""

    def __init__(self, fan_in, fan_out, noise_dim):
        super().__init__()
        self.first, self.second = convolve(fan_in, fan_out), convolve(fan_out, fan_out)
        self.noise = nn.Sequential(nn.Mish(), nn.Linear(noise_dim, fan_out))
        self.across = nn.Identity() if fan_in == fan_out else nn.Conv1d(fan_in, fan_out, 1)

    def forward(self, x, noise):  # (B, fan_in, H), (B or 1, noise_dim) -> (B, fan_out, H)
        return self.second(self.first(x) + self.noise(noise)[:, :, None]) + self.across(x)


class Down(nn.Module):
    """The U's left side: level by level a plan becomes half as long and wider."""

    def __init__(self, dims, steps):
        super().__init__()
        # The step as sines of several frequencies, so that near steps look alike but not equal.
        dim, i, self.down = dims[1], dims[0], nn.ModuleList()
        angle = torch.arange(steps)[:, None] * 10_000 ** -torch.linspace(0, 1, dim // 2)
        self.register_buffer("waves", torch.cat([angle.sin(), angle.cos()], dim=-1))  # (T, dim)
        self.noise = nn.Sequential(nn.Linear(dim, 4 * dim), nn.Mish(), nn.Linear(4 * dim, dim))
        for o in dims[1:]:
            halve = nn.Conv1d(i, i, 3, stride=2, padding=1) if len(self.down) else nn.Identity()
            self.down.append(nn.ModuleList([halve, Block(i, o, dim), Block(o, o, dim)]))
            i = o

    def descend(self, x, i):
        """Noised plans (B, H, D), their steps 0 ... T - 1, (B,) or one number for all -> the plans
        on every level, (B, channels, H / 2^level), and what their steps are for blocks."""
        noise, x, found = self.noise(self.waves[i].view(-1, self.waves.shape[1])), x.mT, []
        for halve, first, second in self.down:
            x = second(first(halve(x), noise), noise)
            found.append(x)
        return found, noise


class UNet(Down):
    """Noised plans (B, H, D) and their steps -> what x_θ is made of, (B, H, D)."""

    def __init__(self, dims, steps):
        super().__init__(dims, steps)
        dim, i = dims[1], dims[-1]
        self.middle, self.up = nn.ModuleList([Block(i, i, dim), Block(i, i, dim)]), nn.ModuleList()
        for i, o in zip(dims[:1:-1], dims[-2:0:-1]):
            double = nn.ConvTranspose1d(o, o, 4, stride=2, padding=1)
            self.up.append(nn.ModuleList([Block(2 * i, o, dim), Block(o, o, dim), double]))
        self.last = nn.Sequential(convolve(dim, dim), nn.Conv1d(dim, dims[0], 1))

    def forward(self, x, i):
        found, noise = self.descend(x, i)
        first, second = self.middle
        x = second(first(found[-1], noise), noise)
        for first, second, double in self.up:  # beside what the left side found
            x = double(second(first(torch.cat([x, found.pop()], dim=1), noise), noise))
        return self.last(x).mT


class Value(Down):
    """J_φ: noised plans (B, H, D) and their steps -> the return (B,), in standard deviations."""

    def __init__(self, dims, steps, horizon):
        super().__init__(dims, steps)
        width = dims[-1] * horizon // 2 ** (len(dims) - 2)
        hidden = nn.Linear(width + dims[1], width // 2)
        self.last = nn.Sequential(hidden, nn.Mish(), nn.Linear(width // 2, 1))

    def forward(self, x, i):
        (*_, x), noise = self.descend(x, i)
        return self.last(torch.cat([x.flatten(1), noise.expand(len(x), -1)], dim=-1))[:, 0]


class Policy(nn.Module):
    """Draws plans and follows the best; its networks are the slow copies."""

    flags = ("guidance", "guide_steps", "guide_stop", "plans", "execute")  # those of acting

    def __init__(self, task, args):
        super().__init__()
        least = dict(guide_steps=0, guide_stop=0, plans=1, execute=1, horizon=1, diffusion_steps=1)
        for flag, low in least.items():
            check(getattr(args, flag) >= low, f"--{flag.replace('_', '-')} must be {low} or more.")
        check(args.execute <= args.horizon, "--execute must not exceed --horizon.")
        ok = min(args.multipliers, default=0) >= 1 and args.hidden_dim % 8 == 0
        check(ok, "--multipliers must be 1 or more each, --hidden-dim a multiple of 8.")
        length = 2 ** (len(args.multipliers) - 1)  # of a plan that is 1 long on the last level
        check(args.horizon % length == 0, f"--horizon must be a multiple of {length}.")
        self.args, self.scaling, self.action_dim = args, Scaling(task), task["sizes"][1]
        self.shape = (args.horizon, sum(task["sizes"]))  # of a plan: H steps, D numbers each
        dims = [self.shape[1], *(args.hidden_dim * x for x in args.multipliers)]
        self.model = UNet(dims, args.diffusion_steps)
        self.value = Value(dims, args.diffusion_steps, args.horizon)
        self.register_buffer("returns", torch.tensor([0.0, 1.0]))  # J's mean, standard deviation

        # The cosine schedule, (T,) each. The variance is 0 in the last step of sampling.
        u = torch.arange(args.diffusion_steps + 1, dtype=torch.float64) / args.diffusion_steps
        abar = torch.cos((u + 0.008) / 1.008 * math.pi / 2).square()
        beta = (1 - abar[1:] / abar[:-1]).clamp(max=0.999)
        abar = F.pad((1 - beta).cumprod(0), (1, 0), value=1.0)
        before, abar = abar[:-1], abar[1:]  # ᾱ_{i-1} and ᾱ_i, for i = 1 ... T
        self.register_buffer("signal", abar.sqrt().float())
        self.register_buffer("sigma", (1 - abar).sqrt().float())
        self.register_buffer("mean_x0", (before.sqrt() * beta / (1 - abar)).float())
        self.register_buffer("mean_xi", ((1 - beta).sqrt() * (1 - before) / (1 - abar)).float())
        self.register_buffer("variance", (beta * (1 - before) / (1 - abar)).float())

    def inpaint(self, x, s):
        """Plans that begin in the states s (B, S)."""
        return torch.cat([torch.cat([x[:, :1, : self.action_dim], s[:, None]], -1), x[:, 1:]], 1)

    def guess(self, x, i, model):
        """x_θ: noised plans (B, H, D) without noise; with little, they are themselves."""
        signal, sigma = self.signal[i].view(-1, 1, 1), self.sigma[i].view(-1, 1, 1)
        return signal * x + sigma * model(x, i)

    def forward(self, x, s, draw=torch.randn_like):
        """Plans (B, H, D) from the states s (B, S), out of noise x."""
        args, x = self.args, self.inpaint(x, s)
        for i in reversed(range(args.diffusion_steps)):
            for _ in range(args.guide_steps if args.guidance and i >= args.guide_stop else 0):
                with torch.enable_grad():
                    pull = torch.autograd.grad(self.value(x.requires_grad_(), i).sum(), x)[0]
                x = self.inpaint(x.detach() + args.guidance * self.variance[i] * pull, s)
            x = self.mean_x0[i] * self.guess(x, i, self.model) + self.mean_xi[i] * x
            x = self.inpaint(x + self.variance[i].sqrt() * draw(x), s)
        return x

    def plan(self, s, draw=torch.randn_like):
        """For every state (N, S) the best of n plans, (N, H, D)."""
        n, s = self.args.plans, s.repeat_interleave(self.args.plans, dim=0)
        x = self(draw(s.new_empty(len(s), *self.shape)), s, draw)
        best = self.value(x, 0).view(-1, n).argmax(-1)  # (N,)
        return x.view(-1, n, *self.shape)[torch.arange(len(best), device=best.device), best]

    @torch.no_grad()
    def act(self, observations, memory=None, deterministic=False):
        """One raw observation (S,) or many (N, S), NumPy or tensor -> as many actions in the bounds
        and a memory, tensors with a row for each: hand it in at the next step."""
        s, random = self.scaling.state(observations), torch.Generator().manual_seed(0)

        def same(x):  # `deterministic` noise (N n, H, D): of n plans, for each state and call again
            noise = torch.randn(self.args.plans, *self.shape, generator=random)
            return noise.to(x).repeat(len(x) // self.args.plans, 1, 1)

        x, left = memory or (None, torch.zeros(len(s), device=s.device))
        if (left < 1).any():
            x = self.plan(s, same if deterministic else torch.randn_like)
            left = torch.full_like(left, self.args.execute)
        memory = [x.roll(-1, dims=1), left - 1]  # next is the plan's next step, if one is left
        return self.scaling.action(x[:, 0, : self.action_dim], observations), memory

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {"": self.act}


# ----------------------------------------------------------------------------------- Algorithm


class Diffuser(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        self.args, device = args, data["rewards"].device
        self.policy = Policy(task, args).to(device)
        self.policy.scaling.fit(data["observations"])
        self.model, self.value = map(copy.deepcopy, (self.policy.model, self.policy.value))
        self.policy.requires_grad_(False)
        self.data = x, _, first, _, J = self.columns(data)
        check(len(first), "No episode has --horizon steps, and none ends in a terminal.")
        self.policy.returns.copy_(torch.stack([J.mean(), J.std(correction=0) + 1e-3]))
        self.weights = torch.ones(args.horizon, x.shape[1], device=device)
        self.weights[0, : self.policy.action_dim] = args.action_weight
        self.weights[0, self.policy.action_dim :] = 0  # given
        self.slow = [*self.policy.model.parameters(), *self.policy.value.parameters()]
        both = [*self.model.parameters(), *self.value.parameters()]
        self.online, self.optimizer = [x.detach() for x in both], adam(both, args.learning_rate)

    def phase(self, step: int):
        """The update to do at this step; where there are several, each is a CUDA graph."""
        return self.update

    def update(self) -> dict[str, torch.Tensor]:
        """One gradient step of model and value. Returns tensors, never synchronises."""
        i = torch.randint(len(self.data[2]), (self.args.batch_size,), device=self.weights.device)
        losses = self.losses(*self.windows(self.data, i), self.model, self.value)
        minimise(self.optimizer, losses["model"] + losses["value"])  # each reaches its own network
        torch._foreach_lerp_(self.slow, self.online, self.args.ema_rate)
        return {f"losses/{key}": loss for key, loss in losses.items()}

    def columns(self, data):
        """Steps (N, A + S), and how it rests where each one led. Of every plan in the data: the row
        where it begins, the last one of its episode, and J."""
        a, s, s_next = (data[k] for k in ("actions", "observations", "next_observations"))
        s_next = s_next.where(data["recorded"][:, None], s)
        s, s_next = map(self.policy.scaling.state, (s, s_next))
        last = data["episodes"].diff(append=data["episodes"][-1:] + 1) != 0
        # After an episode's last row: what a row that is left out, without a successor, earned.
        J = (data["returns_to_go"] - data["rewards"])[:, 0].tolist()
        r = (data["rewards"] + self.args.termination_penalty * data["terminals"])[:, 0].tolist()
        for k, ends in reversed(list(enumerate(last.tolist()))):
            J[k] = r[k] + self.args.gamma * (J[k] if ends else J[k + 1])
        _, episode = data["episodes"].unique_consecutive(return_inverse=True)
        final, rows = last.nonzero()[episode, 0], torch.arange(len(s), device=s.device)
        # Nobody knows what comes after a timeout; after a terminal nothing does.
        fits = (rows + self.args.horizon - 1 <= final) | (data["terminals"][final, 0] > 0)
        steps = torch.cat([a, s], dim=-1), F.pad(s_next, (a.shape[1], 0))
        return *steps, rows[fits], final[fits], torch.tensor(J).to(s)[fits]

    def windows(self, columns, i):
        """Plans (B, H, A + S) of the data, and their J (B,) in standard deviations."""
        x, rest, first, final, J = columns
        rows = first[i, None] + torch.arange(self.args.horizon, device=x.device)  # (B, H)
        end = final[i, None]
        plans = x[rows.minimum(end)].where((rows <= end)[..., None], rest[end])
        return plans, (J[i] - self.policy.returns[0]) / self.policy.returns[1]

    def losses(self, x, J, model, value):
        policy, actions = self.policy, self.policy.action_dim
        # The same noised plans for both; their first state is given.
        i = torch.randint(self.args.diffusion_steps, (len(x),), device=x.device)
        signal, sigma = policy.signal[i, None, None], policy.sigma[i, None, None]
        noised = policy.inpaint(signal * x + sigma * torch.randn_like(x), x[:, 0, actions:])

        # The model guesses the plan, the value its return.
        error = (policy.guess(noised, i, model) - x).square()  # (B, H, D)
        losses = {"model": (self.weights * error).mean(), "value": F.mse_loss(value(noised, i), J)}
        return losses | {"first_action": error[:, 0, :actions].mean()}

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses of the slow copies on plans of held-out episodes, a thousand at most."""
        columns = self.columns(data)
        n = len(columns[2])
        i = torch.arange(0, n, n // 1000 + 1, device=self.weights.device)
        return self.losses(*self.windows(columns, i), self.policy.model, self.policy.value)


Learner = Diffuser  # the name by which the training loop knows it

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
    """Return, length and score of a policy over some episodes, all stepped and planned together.
    This file's own function: a policy that follows its plans has a memory; says what they cost."""
    envs = [make_env(task, "" if i else video) for i in range(episodes)]
    returns, lengths, running = np.zeros(episodes), np.zeros(episodes), list(range(episodes))
    memory, planning = None, 0.0
    with explained(f"Environment '{task['env_id']}' failed (what was trained is saved)"):
        s = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
        while running:
            planning -= time.time()
            actions, memory = policy.act(s[running], memory)
            planning += time.time()
            stays = []
            for i, a in zip(running, actions):
                s[i], reward, terminated, truncated, _ = envs[i].step(a)
                returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
                stays.append(not (terminated or truncated))
            if not all(stays):
                running = [i for i, stay in zip(running, stays) if stay]
                memory = [x[torch.tensor(stays)] for x in memory]
        [env.close() for env in envs]
    tqdm.write(f"a decision for {episodes} episodes: {1000 * planning / lengths.max():.3g} ms")
    zero, hundred = task["scores"] or SCORES.get(envs[0].spec.name, (math.nan, math.nan))
    score = 100 * (returns.mean() - zero) / (hundred - zero)
    found = (returns.mean(), returns.std(), lengths.mean(), score)
    keys = ("return_mean", "return_std", "length_mean", "score")
    return {key: float(value) for key, value in zip(keys, found)}


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
