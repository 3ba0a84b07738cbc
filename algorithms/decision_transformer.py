"""Decision Transformer (DT), "Decision Transformer: Reinforcement Learning via Sequence Modeling"
Lili Chen, Kevin Lu, Aravind Rajeswaran, Kimin Lee, Aditya Grover, Michael Laskin, Pieter Abbeel,
Aravind Srinivas, Igor Mordatch. NeurIPS 2021, arXiv:2106.01345.

No value function: a causal transformer continues episodes. Each step of the data is preceded by its
return-to-go R, the sum of the rewards that were still to come. To act, write down the return that
is wanted; the transformer continues with actions that went with such returns in the data. What an
action then earns is taken off R before the next step.

    returns-to-go   R_t = r_t + r_{t+1} + ... + r_T                            not discounted
    policy          a_t = π(R_1, s_1, a_1, ..., R_{t-1}, s_{t-1}, a_{t-1}, R_t, s_t)
    loss            L(π) = |a_t - π(...)|² / A          averaged over the steps of K-step windows
    acting          R_1 = the return asked for, R_{t+1} = R_t - r_t; π sees the last K or fewer

Every step is three tokens, and all three carry the step's number in the episode as an embedding.

    python algorithms/decision_transformer.py --dataset hopper-medium-replay
    python algorithms/decision_transformer.py --dataset hopper-medium-replay --steps 3000 \
        --hidden-dim 64 --layers 2 --learning-rate 1e-3 --warmup-steps 100 --target-returns 3600 300

Measured: pendulum-random-medium-expert, 1,500 steps of small networks, five seeds: asked for -150
it scores 60 points more than asked for -1200; with returns-to-go shuffled in training, 1 point.
hopper-medium-replay, 20,000 steps, three seeds: 33.6. 100,000 steps were not run.

Differs from the paper / official code:
- Windows are padded behind the episode's end, not before its start: there causality alone hides
  the padding. Tokens know their step's number, not their place, so the predictions are the same.
- The last block is computed at the states' tokens only, where an action is read.
- A full memory forgets half of its steps at once, so that acting computes only what is new;
  --forget 1 is the paper's: always the last K steps, all computed anew.
- Returns-to-go are divided by their standard deviation in the data (--return-scale 1000: paper's).
- Weights begin as PyTorch's layers do, the timestep's embedding with standard deviation 0.02;
  officially N(0, 0.02²) inside the transformer and N(0, 1) for the timestep.
- 5 % of the episodes are held out for validation losses (--validation-fraction 0: none).
- --arch gru and --arch mlp (which sees R_t and s_t alone) are ours, to see what attention adds.
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
    """Decision Transformer: a causal transformer answers a wanted return with actions."""

    target_returns: tuple[float, ...] = ()  # to ask for, the first is the result; empty: TARGETS
    return_scale: float = 0.0  # divides returns-to-go, 1000 in the paper; 0: their std in the data
    arch: Literal["gpt", "gru", "mlp"] = "gpt"  # attention, a recurrent network, or no past at all
    context: int = 20  # K, steps that the policy sees, three tokens each
    forget: int = 0  # steps that a full memory drops at once, when acting; 1 in the paper; 0: half
    max_episode_length: int = 1000  # steps with an embedding of their own, later ones share one
    layers: int = 3  # blocks of the transformer, layers of the GRU, hidden layers of the MLP
    heads: int = 1  # attention heads, must divide --hidden-dim
    dropout: float = 0.1  # share of zeroed token entries, attention weights and block outputs
    weight_decay: float = 1e-4  # AdamW's, of all parameters
    warmup_steps: int = 10_000  # gradient steps over which the step size rises from 0
    max_grad_norm: float = 0.25  # bound of the gradient's norm
    steps: int = 100_000  # gradient steps
    batch_size: int = 64  # windows of K steps per gradient step
    hidden_dim: int = 128  # size of a token
    learning_rate: float = 1e-4  # AdamW's step size after the warm-up

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


class Dropout(nn.Dropout):
    """nn.Dropout. A CPU draws its random numbers one by one: 16 bits of them per unit do as well,
    and save 7 % of an update."""

    def forward(self, x):
        if not self.training or x.device.type != "cpu":
            return super().forward(x)
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = draws.view(torch.int16)[: x.numel()].view_as(x)  # from -2^15 to 2^15 - 1
        return x * bits.ge_(round(2**16 * self.p) - 2**15).div(1 - self.p)


class Block(nn.Module):
    """A transformer's block: each token looks at its past, then at itself; x grows by both."""

    def __init__(self, dim, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, Dropout(dropout)
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.project = nn.Linear(dim, dim)
        self.net = mlp(dim, 4 * dim, dim, hidden_layers=1)

    def forward(self, x, mask, keep, past=None):
        """x: (B, T, D) -> (B, T', D), the tokens `keep` alone, and the keys and values of all;
        past: (B, P, 2 D), those of P tokens before; mask: (T, P + T), who sees whom."""
        h = self.norm_1(x)
        queries, keys_values = self.query(h[:, keep]), self.key_value(h)
        if past is not None:
            keys_values = torch.cat([past, keys_values], dim=1)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, T, D / heads)
            for y in (queries, *keys_values.chunk(2, dim=-1))
        )
        p = self.dropout.p if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[keep], dropout_p=p)
        x = x[:, keep] + self.dropout(self.project(y.transpose(1, 2).flatten(2)))
        # As a plain matrix: a ReLU in place on a view of one would copy it, forwards and backwards.
        return x + self.dropout(self.net(self.norm_2(x).flatten(0, 1)).view_as(x)), keys_values


class GPT(nn.Module):
    """Blocks of causal attention. The order of the tokens is in their timestep embedding."""

    def __init__(self, dim, layers, heads, dropout, tokens):
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()  # a token sees those before it
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x, keep, past=()):
        before = past[0].shape[1] if past else 0
        mask = self.mask[before : before + x.shape[1], : before + x.shape[1]]
        kept = [slice(None)] * (len(self.blocks) - 1) + [keep]  # what nobody reads is not computed
        cache = []
        for block, tokens, keys_values in zip(self.blocks, kept, past or [None] * len(kept)):
            x, keys_values = block(x, mask, tokens, keys_values)
            cache.append(keys_values)
        return self.norm(x), cache


class Policy(nn.Module):
    """a_t given R_1, s_1, a_1, ..., R_t, s_t: what to do now so as to collect R_t."""

    flags = ("target_returns", "forget")  # those of acting: --evaluate obeys them

    def __init__(self, task, args):
        super().__init__()
        for flag in ("context", "layers", "heads", "max_episode_length"):
            check(getattr(args, flag) >= 1, f"--{flag.replace('_', '-')} must be 1 or more.")
        check(0 <= args.forget <= args.context, "--forget must be 0, or 1 to --context.")
        check(args.hidden_dim % args.heads == 0, "--heads must divide --hidden-dim.")
        check(0 <= args.dropout < 1, "--dropout is a share, 0 to below 1.")
        first, *others = args.target_returns or task["target_returns"]
        self.targets = {"": first} | {f"_target_{x:g}": x for x in others}
        self.context, self.forget = args.context, args.forget or (args.context + 1) // 2
        self.scaling, (state_dim, action_dim), dim = Scaling(task), task["sizes"], args.hidden_dim
        self.register_buffer("return_scale", torch.ones(()))
        self.sizes = (1, 1, state_dim, action_dim)  # of t, R, s, a

        self.embed_return = nn.Linear(1, dim)
        self.embed_state = nn.Linear(state_dim, dim)
        self.embed_action = nn.Linear(action_dim, dim)
        self.embed_time = nn.Embedding(args.max_episode_length, dim)
        nn.init.normal_(self.embed_time.weight, std=0.02)
        self.norm, self.dropout = nn.LayerNorm(dim), Dropout(args.dropout)
        if args.arch == "gpt":
            self.net = GPT(dim, args.layers, args.heads, args.dropout, 3 * args.context)
        elif args.arch == "gru":
            self.net = nn.GRU(dim, dim, args.layers, batch_first=True)
        else:
            self.net = mlp(2 * dim, 4 * dim, dim, args.layers)
        self.arch, self.head = args.arch, nn.Linear(dim, action_dim)

    def tokens(self, t, R, s, a):
        """Steps t (B, T), returns-to-go R (B, T, 1), states s (B, T, S) and actions a (B, T, A) ->
        R_1 s_1 a_1 R_2 s_2 a_2 ..., (B, 3 T, D)."""
        tokens = [self.embed_return(R), self.embed_state(s), self.embed_action(a)]
        time = self.embed_time(t.clamp(max=self.embed_time.num_embeddings - 1))  # (B, T, D)
        x = torch.stack(tokens, dim=2) + time[:, :, None]  # (B, T, 3, D)
        return self.dropout(self.norm(x)).flatten(1, 2)

    def read(self, x, keep, past=()):
        """Tokens x (B, T, D) -> the actions read at the tokens `keep` (B, T', A), and what has to
        be known of these tokens for the next ones: `past`, a list of tensors (B, ...)."""
        if self.arch == "gpt":
            h, past = self.net(x, keep, past)
        elif self.arch == "gru":
            h, state = self.net(x, past[0].transpose(0, 1).contiguous() if past else None)
            h, past = h[:, keep], [state.transpose(0, 1)]
        else:
            # s_t's token with R_t's, the one before it; the roll's wrap-around is never kept.
            h = self.net(torch.cat([x.roll(1, dims=1)[:, keep], x[:, keep]], dim=-1))
        return torch.tanh(self.head(h)), past

    def forward(self, t, R, s, a):
        """The actions at all steps, (B, T, A). Each is read where the state stood: by then R and s
        are known, a is not."""
        return self.read(self.tokens(t, R, s, a), slice(1, None, 3))[0]

    @torch.no_grad()
    def act(self, observations, rewards=None, memory=None, target=None):
        """What a user calls at every step: one raw observation (S,) or many (N, S), NumPy or tensor
        -> as many actions in the environment's bounds, and a memory, tensors with a row for each.
        At the next step hand it in, with the rewards (N,) that the actions brought. At the first
        there is neither; `target` is the return asked for, of all or of each (N,)."""
        s = self.scaling.state(observations)
        given = rewards if memory else self.targets[""] if target is None else target
        given = torch.as_tensor(given).to(s).reshape(-1, 1) / self.return_scale  # (N, 1) or (1, 1)
        if memory:
            steps, *past = memory  # (N, T, 2 + S + A), and what `read` knows of them
            t, R = steps[:, -1, :2].split(1, dim=1)
            t, R = t + 1, R - given
        else:
            steps, past = s.new_empty(len(s), 0, sum(self.sizes)), []
            t = torch.zeros_like(s[:, :1])  # (N, 1)
            R = t + given
        now = F.pad(torch.cat([t, R, s], dim=-1), (0, self.sizes[-1]))  # no action yet
        steps = torch.cat([steps, now[:, None]], dim=1)
        if steps.shape[1] > self.context:
            # What the later steps made of the forgotten ones has to be forgotten too: begin anew.
            steps, past = steps[:, self.forget :].clone(), []
        new = steps[:, -2:] if past else steps  # a_{t-1}, R_t and s_t are, or everything is
        t, R, s, a = new.split(self.sizes, dim=-1)
        x = self.tokens(t[..., 0].long(), R, s, a)[:, :-1]
        a, past = self.read(x[:, -3:] if past else x, slice(-1, None), past)  # (N, 1, A)
        steps[:, -1:, -self.sizes[-1] :] = a
        return self.scaling.action(a, observations), [steps, *past]

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {suffix: functools.partial(self.act, target=x) for suffix, x in self.targets.items()}


# ----------------------------------------------------------------------------------- Algorithm

# What the paper asks for. Elsewhere: the data's best return, and half-way to it from the mean.
TARGETS = {"Hopper": [3600.0, 1800.0], "HalfCheetah": [12000.0, 6000.0]}
TARGETS |= {"Walker2d": [5000.0, 2500.0]}


class DecisionTransformer(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        ok = args.return_scale >= 0 <= args.warmup_steps and args.max_grad_norm > 0
        check(ok, "--return-scale and --warmup-steps: 0 or more; --max-grad-norm: above 0.")
        R, episodes = data["returns_to_go"], data["episodes"]
        returns = R[episodes.diff(prepend=episodes[:1] - 1) != 0]  # (E, 1)
        best, mean = returns.max().item(), returns.mean().item()
        asked = TARGETS.get(task["env_id"].split("-v")[0], [best, 0.5 * (best + mean)])
        if not args.target_returns and asked[0] > 2 * max(best, 0):
            say = f"Asked for are the paper's returns {asked}, the data's best is {best:g}"
            print(f"{say}: --target-returns asks for others.")
        task["target_returns"] = asked

        self.args, device = args, R.device
        self.policy = Policy(task, args).to(device)
        self.policy.scaling.fit(data["observations"])
        self.policy.return_scale.fill_(args.return_scale or R.std(correction=0).item() or 1.0)
        self.data = self.columns(data)
        self.register_buffer("updates", torch.zeros((), device=device))
        options = dict(weight_decay=args.weight_decay, fused=True, capturable=R.is_cuda)
        rate = torch.tensor(args.learning_rate, device=device)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), rate, **options)

    def phase(self, step: int):
        """The update to do at this step; where there are several, each is a CUDA graph."""
        return self.update

    def update(self) -> dict[str, torch.Tensor]:
        """One gradient step. Returns tensors, never synchronises."""
        # A start drawn among all rows: an episode's chance is proportional to its length.
        i = torch.randint(len(self.data[0]), (self.args.batch_size,), device=self.data[0].device)
        loss = self.loss(*self.windows(self.data, i))
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.args.max_grad_norm)

        # The step size is a tensor: a graph would keep a number as it was when captured.
        self.updates += 1
        rate = self.optimizer.param_groups[0]["lr"]
        rate.copy_(self.args.learning_rate * (self.updates / self.args.warmup_steps).clamp(max=1))
        self.optimizer.step()
        return {"losses/mse": loss, "gradients/norm": norm, "charts/learning_rate": rate}

    def columns(self, data):
        """What the network sees of every row: its step in its episode t (N,), R (N, 1), s (N, S),
        a (N, A); and the first row after its episode (N,)."""
        _, episode, lengths = data["episodes"].unique_consecutive(True, True)
        ends = lengths.cumsum(0)[episode]
        t = torch.arange(len(ends), device=ends.device) - ends + lengths[episode]
        R = data["returns_to_go"] / self.policy.return_scale
        return t, R, self.policy.scaling.state(data["observations"]), data["actions"], ends

    def windows(self, columns, start):
        """The K steps from the rows `start` (B,) on: t (B, K), R (B, K, 1), s (B, K, S),
        a (B, K, A), and real (B, K), which is False after the episode's end. There stands the next
        episode: no real step sees it, because it comes later, and the loss omits it."""
        *columns, ends = columns
        rows = start[:, None] + torch.arange(self.args.context, device=start.device)
        real = rows < ends[start, None]
        rows = rows.clamp(max=len(ends) - 1)
        return *(column[rows] for column in columns), real

    def loss(self, t, R, s, a, real):
        # Squared error of the actions, averaged over the real steps.
        error = (self.policy(t, R, s, a) - a).square().mean(-1)  # (B, K)
        return (error * real).sum() / real.sum()

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss on held-out episodes, and what it would be with other ones' returns-to-go: no worse
        where the policy ignores them."""
        columns = self.columns(data)
        start = (columns[0] % self.args.context == 0).nonzero()[:, 0]  # every row once
        t, R, s, a, real = self.windows(columns, start)
        wrong = self.loss(t, R.flip(0), s, a, real)
        return {"mse": self.loss(t, R, s, a, real), "mse_wrong_returns": wrong}


Learner = DecisionTransformer  # the name by which the training loop knows it

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
    """Return, length and score of a policy over some episodes for each return to ask for, all
    stepped together; the columns of all but the first have a suffix. This file's own function: a
    policy with a memory is told its rewards, and which episodes go on."""
    row, n = {}, episodes * len(policy.targets)
    envs = [make_env(task, "" if i else video) for i in range(n)]
    (returns, lengths, rewards), running = np.zeros((3, n)), list(range(n))
    target, memory = np.repeat(list(policy.targets.values()), episodes), None
    with explained(f"Environment '{task['env_id']}' failed (what was trained is saved)"):
        s = np.stack([env.reset(seed=seed + i % episodes)[0] for i, env in enumerate(envs)])
        while running:
            actions, memory = policy.act(s[running], rewards[running], memory, target)
            stays = []
            for i, a in zip(running, actions):
                s[i], rewards[i], terminated, truncated, _ = envs[i].step(a)
                returns[i], lengths[i] = returns[i] + rewards[i], lengths[i] + 1
                stays.append(not (terminated or truncated))
            if not all(stays):
                running = [i for i, stay in zip(running, stays) if stay]
                memory = [x[torch.tensor(stays)] for x in memory]
        for env in envs:
            env.close()
    zero, hundred = task["scores"] or SCORES.get(envs[0].spec.name, (math.nan, math.nan))
    for suffix, x, y in zip(policy.targets, *np.stack([returns, lengths]).reshape(2, -1, episodes)):
        found = (x.mean(), x.std(), y.mean(), 100 * (x.mean() - zero) / (hundred - zero))
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
