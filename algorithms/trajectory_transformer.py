"""Trajectory Transformer (TT), "Offline Reinforcement Learning as One Big Sequence Modeling
Problem", Michael Janner, Qiyang Li, Sergey Levine. NeurIPS 2021, arXiv:2106.02039.

An episode is a text, every number one of 100 words, and a GPT learns to continue it. To act, write
many continuations, keep those that promise most (beam search), do the best one's first action.

    text    s_t¹ ... s_t^S  a_t¹ ... a_t^A  r_t  V_t  s_{t+1}¹ ...           S + A + 2 words a step
    value   V_t = r_{t+1} + γ r_{t+2} + γ² r_{t+3} + ...          in the data; begins after r_t
    loss    L(θ) = -Σ_i w_i log p_θ(x_i | x_1, ..., x_{i-1})      w = 5 for actions, otherwise 1
    plan    worth E[r_t] + γ E[r_{t+1}] + ... + γ^h E[r_{t+h}] + γ^{h+1} E[V_{t+h}]

    python algorithms/trajectory_transformer.py --dataset hopper-medium-replay --device cuda
    python algorithms/trajectory_transformer.py --dataset pendulum-random-expert-10 --steps 1500 \
        --bins 30 --context 4 --horizon 3 --history 1 --hidden-dim 64 --layers 2 --batch-size 64 \
        --learning-rate 2e-3 --warmup-steps 100 --decay-steps 1400 --beam-width 8

Measured: pendulum-random-expert-10, 1,200 steps, five seeds: 25; --plan sample: 1. Ten episodes of
Hopper take a CPU thread 51 minutes; with networks and searches as in the second command, 78 s.

Differs from the paper / official code:
- Words are quantiles, a number is the nearest: a frequent one is exact (the code: spaces between).
- Keys and values are kept for the next decision; a full past (--history) drops half of its steps.
- --horizon 5, --beam-width 32 are the code's for HalfCheetah; 15, 128 for Hopper and Walker2d.
- What follows a timeout is not learnt; officially the stop word, as after a terminal.
- ReLU (GELU); PyTorch's initial weights (N(0, 0.02²)); one cosine (with a period of 40 epochs).
- 5 % of the episodes are held out for validation losses (--validation-fraction 0: none).
MIT licence, (c) 2026 The CleanDGM developers. Please cite the paper above and CleanDGM.
"""

import contextlib
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
    """Trajectory Transformer: a GPT of states, actions, rewards and returns, and a beam search."""

    plan: Literal["beam", "sample"] = "beam"  # sample: draw one action from all words, imitation
    horizon: int = 5  # steps that a plan looks ahead
    beam_width: int = 32  # plans kept after each step
    expand: int = 2  # continuations of each plan kept
    action_cdf: float = 0.6  # of an action's words, the unlikeliest with so much mass are not drawn
    action_top_k: int = 0  # actions are drawn from so many likeliest words; 0: from all
    state_top_k: int = 1  # the same for states; 1: the likeliest word, nothing is drawn
    history: int = 5  # past steps that a plan begins with, at most
    context: int = 10  # K, steps that the transformer sees
    bins: int = 100  # words of each dimension
    gamma: float = 0.99  # discount of V and of plans
    terminal_reward: float = -100.0  # takes the place of a terminal step's reward
    action_weight: float = 5.0  # weight of the actions' words in the loss
    layers: int = 4  # blocks of the transformer
    heads: int = 4  # attention heads, must divide --hidden-dim
    dropout: float = 0.1  # share of zeroed token entries, attention weights and block outputs
    weight_decay: float = 0.1  # AdamW's, of weight matrices
    warmup_steps: int = 1000  # gradient steps over which the step size rises from 0
    decay_steps: int = 300_000  # gradient steps after those, over which it falls to a tenth
    steps: int = 300_000  # gradient steps
    batch_size: int = 256  # windows of K steps per gradient step
    hidden_dim: int = 128  # size of a token
    learning_rate: float = 6e-4  # AdamW's step size after the warm-up

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


class Block(nn.Module):
    """A transformer's block: each token looks at its past, then at itself; x grows by both."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.project, self.net = nn.Linear(dim, dim), mlp(dim, 4 * dim, dim, hidden_layers=1)

    def forward(self, x, mask, past=None, shared=None):
        """x: (B, T, D) -> (B, T, D), and keys and values of these and the `past` tokens, (B, heads,
        P + T, 2 D / heads). Before those: `shared` (N, heads, P', 2 D / heads), each for B / N rows
        of one token. mask: (T, P' + P + T), who sees whom."""
        h = self.norm_1(x)
        h = (self.query(h), self.key_value(h))
        q, known = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in h)
        known = known if past is None else torch.cat([past, known], dim=2)
        k, v = known.chunk(2, dim=-1)
        if shared is None:
            y = F.scaled_dot_product_attention(q, k, v, mask, self.training * self.dropout.p)
        else:
            # One softmax over both; what is shared is read once for all rows of a text.
            tie = lambda y: y[:, :, 0].unflatten(0, (len(shared), -1)).transpose(1, 2)  # noqa: E731
            untie = lambda y: y.transpose(1, 2).flatten(0, 1)[:, :, None]  # noqa: E731
            keys, values = shared.chunk(2, dim=-1)  # (N, heads, P', D / heads)
            scores = torch.cat([untie(tie(q) @ keys.mT), q @ k.mT], dim=-1)
            scores = (scores / math.sqrt(q.shape[-1])).masked_fill(~mask, -math.inf)
            far, near = scores.softmax(-1).tensor_split([keys.shape[2]], dim=-1)
            y = untie(tie(far) @ values) + near @ v
        x = x + self.dropout(self.project(y.transpose(1, 2).flatten(2)))
        return x + self.dropout(self.net(self.norm_2(x).flatten(0, 1)).view_as(x)), known


class Policy(nn.Module):
    """p_θ of the next word, and the search for the text that promises most."""

    flags = ("plan", "horizon", "beam_width", "expand")  # those of acting: --evaluate obeys them
    flags += ("action_cdf", "action_top_k", "state_top_k", "history")

    def __init__(self, task, args):
        super().__init__()
        least = dict(horizon=1, beam_width=1, expand=1, layers=1, heads=1, bins=2, decay_steps=1)
        least |= dict(action_top_k=0, state_top_k=0, history=0, warmup_steps=0)
        for flag, low in least.items():
            check(getattr(args, flag) >= low, f"--{flag.replace('_', '-')} must be {low} or more.")
        check(args.history + args.horizon <= args.context, "--context < --history + --horizon.")
        ok = 0 <= args.action_cdf < 1 and 0 <= args.dropout < 1 and 0 <= args.gamma <= 1
        check(ok, "--action-cdf and --dropout are shares, 0 to below 1; --gamma is one, 0 to 1.")
        check(args.hidden_dim % args.heads == 0, "--heads must divide --hidden-dim.")
        self.args, self.scaling, dim = args, Scaling(task), args.hidden_dim
        self.sizes, self.step = (*task["sizes"], 1, 1), sum(task["sizes"]) + 2  # of s, a, r, V
        place = torch.arange(self.step * args.context)
        self.register_buffer("dimension", place % self.step, persistent=False)
        # A token sees those before it, but no V: in the data that tells what comes later.
        mask = (place <= place[:, None]) & (self.dimension < self.step - 1)
        self.register_buffer("mask", mask, persistent=False)
        # The last word of each dimension is the stop word, after a terminal, and worth 0.
        self.register_buffer("words", torch.zeros(self.step, args.bins + 1))
        self.embed = nn.Parameter(0.02 * torch.randn(self.step * args.bins + 1, dim))
        self.position = nn.Parameter(torch.zeros(len(place), dim))
        block = functools.partial(Block, dim, args.heads, args.dropout)
        self.blocks = nn.ModuleList(block() for _ in range(args.layers))
        self.dropout, self.norm = nn.Dropout(args.dropout), nn.LayerNorm(dim)
        self.head = nn.Parameter(0.02 * torch.randn(self.step, dim, args.bins + 1))

    def encode(self, x, first=0):
        """Numbers (N, M) of the M dimensions from `first` on -> the nearest words (N, M)."""
        words = self.words[first : first + x.shape[1], :-1]
        return torch.searchsorted(0.5 * (words[:, :-1] + words[:, 1:]), x.T.contiguous()).T

    def forward(self, text, past=(), shared=(), keep=slice(None)):
        """Words (B, T) after those of `shared` and `past`, as Block has them, a list each -> logits
        of the words that follow those in `keep`, (B, T', bins + 1), and the new `past`."""
        before = sum(x[0].shape[2] for x in (shared, past) if x)
        place, bins = slice(before, before + text.shape[1]), self.args.bins
        dimension, known, none = self.dimension[place], [], [None] * len(self.blocks)
        rows = torch.where(text == bins, self.step * bins, text + bins * dimension)
        x = self.dropout(F.embedding(rows, self.embed) + self.position[place])
        for block, own, far in zip(self.blocks, past or none, shared or none):
            x, own = block(x, self.mask[place, : place.stop], own, far)
            known.append(own)
        heads = self.head[dimension[keep]]  # after dimension i comes i + 1
        return torch.einsum("btd,tdw->btw", self.norm(x[:, keep]), heads), known

    def draw(self, logits, cdf, top_k, random):
        """Words (B, 1) for logits (B, words), without the unlikely ones."""
        if top_k == 1:
            return logits.argmax(-1, keepdim=True)
        p, order = logits.softmax(-1).sort(-1)  # the likeliest last
        p[:, :-1] *= p.cumsum(-1)[:, :-1] >= cdf
        p[:, : -top_k or -p.shape[1]] = 0
        return order.gather(1, p.multinomial(1, generator=random))

    def search(self, text, logits, shared, random=None):
        """Texts (N, P) that end with s_t, logits (N, 1, bins + 1) of what follows, and the texts'
        keys and values -> the plans that promise most, words (N, ...) that begin with a_t."""
        (state_dim, action_dim, *_), n, args = self.sizes, len(text), self.args
        beam = args.beam_width, args.expand, args.horizon, (args.action_cdf, args.action_top_k)
        width, copies, horizon, limits = beam if args.plan == "beam" else (1, 1, 1, (0.0, 0))
        limits = [(0.0, args.state_top_k)] * state_dim + [limits] * action_dim + [(0.0, 1)] * 2
        past, worth, start = [], torch.zeros_like(logits[:, 0, 0]), text.shape[1]
        for i in range(state_dim, horizon * self.step):
            h, dimension = divmod(i, self.step)
            if dimension == state_dim:
                # Each plan kept is written on in several ways: rows are episode after episode.
                of, times = (text, logits, worth, *past), copies if h else copies * width
                text, logits, worth, *past = (x.repeat_interleave(times, dim=0) for x in of)
            logits = logits[:, -1]
            expected = logits.softmax(-1) @ self.words[dimension]  # 0 where the episode is over
            now = logits[:, : None if h else -1]  # which it is not yet
            text = torch.cat([text, self.draw(now, *limits[dimension], random)], dim=1)
            if dimension == self.step - 2:
                worth = worth + args.gamma**h * expected
            if dimension == self.step - 1:
                value = (worth + args.gamma ** (h + 1) * expected).view(n, -1)
                best = value.topk(width if h < horizon - 1 else 1).indices
                best += value.shape[1] * torch.arange(n, device=best.device)[:, None]
                text, worth, *past = (x[best.flatten()] for x in (text, worth, *past))
            if i < horizon * self.step - 1:
                logits, past = self(text[:, -1:], past, shared)
        return text[:, start:]

    @torch.no_grad()
    def act(self, observations, rewards=None, memory=None, deterministic=False):
        """One raw observation (S,) or many (N, S), NumPy or tensor -> as many actions in the bounds
        and a memory, tensors with a row each: give it back at the next step, with the actions'
        rewards (N,). `deterministic`: the same random numbers in every search."""
        s, (state_dim, action_dim, *_) = self.scaling.state(observations), self.sizes
        text, past = self.encode(s), []
        if memory:
            earlier, *past = memory
            r = self.encode(torch.as_tensor(rewards).to(s).reshape(-1, 1), self.step - 2)
            text = torch.cat([earlier, r, torch.zeros_like(r), text], dim=1)  # nobody sees V
        if text.shape[1] // self.step > self.args.history:
            # What the later steps made of the forgotten ones has to be forgotten too: begin anew.
            text, past = text[:, -(self.args.history // 2 * self.step + state_dim) :], []
        logits, past = self(text[:, past[0].shape[2] if past else 0 :], past, keep=slice(-1, None))
        random = torch.Generator(s.device).manual_seed(0) if deterministic else None
        plan = self.search(text, logits, past, random)[:, :action_dim]
        a = self.words[state_dim:-2].expand(len(plan), -1, -1).gather(2, plan[..., None])[..., 0]
        return self.scaling.action(a, observations), [torch.cat([text, plan], dim=1), *past]

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {"": self.act}


# ----------------------------------------------------------------------------------- Algorithm


class TrajectoryTransformer(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        self.args, device = args, data["rewards"].device
        self.policy = Policy(task, args).to(device)
        self.policy.scaling.fit(data["observations"])
        x = self.numbers(data).sort(0).values
        quantiles = torch.linspace(0, len(x) - 1, args.bins, device=device).round().long()
        self.policy.words[:, :-1] = x[quantiles].T
        self.data, self.weights = self.columns(data), torch.ones(self.policy.step, device=device)
        self.weights[task["sizes"][0] : -2] = args.action_weight
        self.register_buffer("updates", torch.zeros((), device=device))
        groups = [{"params": [], "weight_decay": x} for x in (args.weight_decay, 0.0)]
        for key, x in self.policy.named_parameters():  # weight matrices decay, nothing else
            groups[x.ndim < 2 or key in ("embed", "position")]["params"].append(x)
        options = dict(betas=(0.9, 0.95), fused=True, capturable=x.is_cuda)
        rate = torch.tensor(args.learning_rate, device=device)
        self.optimizer = torch.optim.AdamW(groups, rate, **options)

    def phase(self, step: int):
        """The update to do at this step; where there are several, each is a CUDA graph."""
        return self.update

    def update(self) -> dict[str, torch.Tensor]:
        """One gradient step. Returns tensors, never synchronises."""
        i = torch.randint(len(self.data[0]), (self.args.batch_size,), device=self.weights.device)
        loss, of_kinds = self.loss(*self.windows(self.data, i))
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
        # The step size is a tensor: a graph would keep a number as it was when captured.
        self.updates += 1
        warm = (self.updates / max(self.args.warmup_steps, 1)).clamp(max=1)
        done = (self.updates - self.args.warmup_steps).div(self.args.decay_steps).clamp(0, 1)
        rate = self.args.learning_rate * warm * (0.5 + 0.5 * (math.pi * done).cos()).clamp(min=0.1)
        for group in self.optimizer.param_groups:
            group["lr"].copy_(rate)
        self.optimizer.step()
        metrics = {"losses/total": loss, "gradients/norm": norm, "charts/learning_rate": rate}
        return metrics | {f"losses/{kind}": x for kind, x in of_kinds.items()}

    def numbers(self, data):
        """s, a, r and V of every row, (N, S + A + 2)."""
        r = data["rewards"].where(data["terminals"] == 0, self.args.terminal_reward)
        last = (data["episodes"].diff(append=data["episodes"][-1:] + 1) != 0).tolist()
        # After an episode's last row: what a row that is left out, without a successor, earned.
        V, rewards = (data["returns_to_go"] - data["rewards"])[:, 0].tolist(), r[:, 0].tolist()
        for i in reversed(range(len(V))):
            V[i] = V[i] if last[i] else rewards[i + 1] + self.args.gamma * V[i + 1]
        s, V = self.policy.scaling.state(data["observations"]), torch.tensor(V).to(r)[:, None]
        return torch.cat([s, data["actions"], r, V], dim=-1)

    def columns(self, data):
        """Of every row its words (N, S + A + 2), the first row after its episode (N,), and whether
        that ended by a terminal (N,)."""
        _, episode, lengths = data["episodes"].unique_consecutive(True, True)
        ends = lengths.cumsum(0)[episode]
        return self.policy.encode(self.numbers(data)), ends, data["terminals"][ends - 1, 0] > 0

    def windows(self, columns, start):
        """The words of K steps from the rows `start` (B,) on, (B, K, S + A + 2), and which ones the
        loss counts: the stop words after a terminal, not those after a timeout."""
        words, ends, over = columns
        rows = start[:, None] + torch.arange(self.args.context, device=start.device)
        real = (rows < ends[start, None])[..., None]
        words = words[rows.clamp(max=len(ends) - 1)].where(real, self.args.bins)
        counts = (real | over[start, None, None]).repeat(1, 1, self.policy.step)
        counts[:, 0, 0] = False  # a window's first word is given
        return words, counts

    def loss(self, words, counts):
        """-log p_θ of the words that count: its weighted mean, the plain mean of each kind."""
        logits, text = self.policy(words.flatten(1))[0][:, :-1], words.flatten(1)[:, 1:]
        nll = F.cross_entropy(logits.flatten(0, 1), text.flatten(), reduction="none")
        nll = F.pad(nll.view_as(text), (1, 0)).view_as(words) * counts
        sums = zip(*(x.sum((0, 1)).split(self.policy.sizes) for x in (nll, counts)))
        means = (x.sum() / count.sum().clamp(min=1) for x, count in sums)
        means = dict(zip(("state", "action", "reward", "value"), means))
        return (nll * self.weights).sum() / counts.sum(), means

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """-log p_θ on held-out episodes, in windows from every K-th row on."""
        start = torch.arange(0, len(data["rewards"]), self.args.context, device=self.weights.device)
        return self.loss(*self.windows(self.columns(data), start))[1]


Learner = TrajectoryTransformer  # the name by which the training loop knows it

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
    This file's own function: a policy with a memory is told its rewards, and which episodes go
    on."""
    envs = [make_env(task, "" if i else video) for i in range(episodes)]
    (returns, lengths, rewards), running = np.zeros((3, episodes)), list(range(episodes))
    memory = None
    with explained(f"Environment '{task['env_id']}' failed (what was trained is saved)"):
        s = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])
        while running:
            actions, memory = policy.act(s[running], rewards[running], memory)
            stays = []
            for i, a in zip(running, actions):
                s[i], rewards[i], terminated, truncated, _ = envs[i].step(a)
                returns[i], lengths[i] = returns[i] + rewards[i], lengths[i] + 1
                stays.append(not (terminated or truncated))
            if not all(stays):
                running = [i for i, stay in zip(running, stays) if stay]
                memory = [x[torch.tensor(stays)] for x in memory]
        [env.close() for env in envs]
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
