r"""π0, "π0: A Vision-Language-Action Flow Model for General Robot Control"
Kevin Black et al. (Physical Intelligence). RSS 2025, arXiv:2410.24164. Small, and trained from
nothing: the mechanism, not the robot foundation model.

A vision-language model reads pictures and an instruction; a second, narrower transformer, the
action expert, reads along layer by layer and turns noise into a chunk of H future actions by flow
matching. Each has its own weights; they meet in attention alone. What the first has read does not
depend on the actions: it is read once, its keys and values stay, and the ten steps of the flow
cost the expert only.

    prefix   picture and word tokens   see each other                        (the wide expert)
    suffix   state token               sees the prefix and itself            (the action expert)
             H action tokens           see the prefix, the state, each other
    x_t = t ε + (1 - t) a              a: actions (H, A), ε: noise; t = 1 is noise, 0 the actions
    t = 0.001 + 0.999 b                b ~ Beta(1.5, 1): more often near the noise
    L   = |v(x_t, t | prefix, state) - (ε - a)|²        over the actions that the episode still has
    acting: x_1 = ε, then ten times x <- x - v(x, t | ...) / 10
    --rtc:  a robot does not wait for its next chunk. Real-time chunking (Black et al. 2025,
            arXiv:2506.07339) inpaints it: v bends to where x - t v begins as the old chunk goes on

    python algorithms/pi0.py --eval-episodes 48
    python algorithms/pi0.py --steps 600 --decay-steps 600 --warmup-steps 50 --learning-rate 2e-3 \
        --batch-size 32 --layers 2 --chunk 6 --execute 4 --eval-episodes 48

Measured: the second: a robot arm does what it is told in 77 % of 50 episodes, five seeds (70 to
84), a minute and a quarter on one CPU thread. Told the first words only, in 36 %.

Differs from the paper / official code (github.com/Physical-Intelligence/openpi):
- π0 acts on raw chunks of actions. Some summaries say that its flow runs in a latent space: it
  does not, in the paper or here.
- No PaliGemma: four strided convolutions in SigLIP's place, an embedding of the words of the data
  in Gemma's, both trained from nothing on the demonstrations. Nothing is known of other words.
- One camera, learned positions (Gemma: rotary), an MLP with ReLU (GeGLU), widths of 128 and 64
  (2048 and 1024), 3 layers (18), chunks of 10 (50).
- The cosine of the step size ends at a tenth, as theirs, the step size itself is a small model's;
  no average of the weights.
- Each chunk in a batch is asked about --draws noises at once (one): the prefix is read once.
- --head mse and tokens are for comparison: one forward pass, squared error or bins of each action.
- Data without pictures or words is read too: then the prefix is empty, or has one of the two.
- 5 % of the episodes are held out for validation losses (--validation-fraction 0: none).
MIT licence, (c) 2026 The CleanDGM developers. Please cite the paper above and CleanDGM.
"""

import contextlib
import functools
import hashlib
import io
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
    """π0: a vision-language model and an action expert, which turns noise into actions."""

    head: Literal["flow", "mse", "tokens"] = "flow"  # how actions come out of the action expert
    chunk: int = 10  # H, actions predicted at once
    execute: int = 5  # of them are carried out before the next look
    delay: int = 0  # actions of the old chunk that are carried out while the new one is made
    rtc: bool = False  # real-time chunking: the new chunk goes on from the old one
    draws: int = 4  # noises and times of each chunk in a batch, which share one look; official: 1
    flow_steps: int = 10  # Euler steps from noise to actions
    bins: int = 64  # of each action dimension, for --head tokens
    layers: int = 3  # of both experts
    heads: int = 4  # attention heads, the same in both experts
    head_dim: int = 32  # of a query, a key and a value: where the experts meet
    action_dim: int = 64  # width of the action expert; that of the other one is --hidden-dim
    max_words: int = 12  # of an instruction, the others are not read
    max_grad_norm: float = 1.0  # bound of the gradient's norm
    weight_decay: float = 1e-4  # AdamW's
    warmup_steps: int = 100  # gradient steps over which the step size rises from 0
    decay_steps: int = 3000  # gradient steps until a cosine brings it down to a tenth
    steps: int = 3000  # gradient steps
    batch_size: int = 64  # chunks per gradient step
    hidden_dim: int = 128  # width of the expert that reads pictures and words
    learning_rate: float = 1e-3  # AdamW's largest step size

    # The run: the same flags in every file.
    dataset: str = "scene-language"  # one of datasets/, a Minari id, or a path (.hdf5, .npz)
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


def vocabulary(task) -> dict[str, int]:
    """The words of the data's instructions, numbered from 2 on. 0: no word, 1: an unknown one."""
    words = {word for text in task.get("instructions", []) for word in text.split()}
    return {word: 2 + i for i, word in enumerate(sorted(words))}


class Eyes(nn.Module):
    """Pictures (B, H, W, 3), bytes -> a token (B, H W / 256, D) for each 16 x 16 pixels."""

    def __init__(self, size, dim):
        super().__init__()
        widths, layers = (size[2], 32, 64, 64, dim), []
        for i, o in zip(widths[:-1], widths[1:]):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        tokens = -(-size[0] // 16) * -(-size[1] // 16)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, dim))

    def forward(self, images):
        x = images.movedim(-1, 1).float() / 127.5 - 1
        return self.net(x).flatten(2).transpose(1, 2) + self.position


class Layer(nn.Module):
    """One expert's weights in one layer. Queries, keys and values have the size that both share."""

    def __init__(self, dim, heads, head_dim):
        super().__init__()
        self.shape, inner = (3, heads, head_dim), heads * head_dim
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * inner, bias=False)
        self.project = nn.Linear(inner, dim, bias=False)
        self.net = mlp(dim, 4 * dim, dim, hidden_layers=1)

    def forward(self, x, mask, past=()):
        """x: (B, T, D); past: keys and values (B, heads, P, head_dim) of the other expert's tokens;
        mask: (B, 1, T, P + T), who sees whom -> x, and the keys and values with T more."""
        q, k, v = self.query_key_value(self.norm_1(x)).unflatten(-1, self.shape).unbind(2)
        q, *here = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, T, head_dim)
        k, v = (torch.cat([a, b], dim=2) for a, b in zip(past, here)) if past else here
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.net(self.norm_2(x)), (k, v)


class Network(nn.Module):
    """The two experts: v(x_t, t | pictures, words, state)."""

    def __init__(self, task, args):
        super().__init__()
        (S, A), D, W, H = task["sizes"], args.hidden_dim, args.action_dim, args.chunk
        self.eyes = Eyes(task["image"], D) if "image" in task else None
        if "instructions" in task:
            self.embed_word = nn.Embedding(2 + len(vocabulary(task)), D)
            self.word_position = nn.Parameter(0.02 * torch.randn(args.max_words, D))
        self.embed_state = nn.Linear(S, W)
        self.embed_action, self.merge = nn.Linear(A, W), nn.Linear(2 * W, W)
        self.action_net = nn.Linear(W, W)
        self.action_position = nn.Parameter(0.02 * torch.randn(H, W))
        shape = (args.heads, args.head_dim)
        reads = args.layers if {"image", "instructions"} & task.keys() else 0
        self.wide = nn.ModuleList(Layer(D, *shape) for _ in range(reads))
        self.narrow = nn.ModuleList(Layer(W, *shape) for _ in range(args.layers))
        self.norm = nn.RMSNorm(W)
        self.out = nn.Linear(W, A * args.bins if args.head == "tokens" else A)
        periods = 0.004 * 1000 ** torch.linspace(0, 1, W // 2)  # to 4, of t's sines and cosines
        self.register_buffer("frequencies", 2 * math.pi / periods)

    def read(self, images, words):
        """Pictures (B, H, W, 3) and words (B, L), 0 where there is none, either of them None ->
        what the action expert has to know of them: keys and values of each layer, and which tokens
        there are (B, P)."""
        x, real = [], []
        if images is not None:
            x.append(self.eyes(images))
            real.append(torch.ones_like(x[0][..., 0], dtype=torch.bool))
        if words is not None:
            x.append(self.embed_word(words) + self.word_position)
            real.append(words > 0)
        if not x:
            return None
        x, real = torch.cat(x, dim=1), torch.cat(real, dim=1)  # (B, P, D), (B, P)
        cache = []
        for layer in self.wide:
            x, keys_values = layer(x, real[:, None, None])
            cache.append(keys_values)
        return cache, real

    def forward(self, known, s, x, t):
        """What `read` found, states s (B, S), actions on the way x (B, H, A), time t (B, 1, 1) ->
        velocities (B, H, A), of --head tokens logits (B, H, A bins)."""
        B, H = x.shape[:2]
        time = t * self.frequencies  # (B, 1, W / 2)
        time = torch.cat([time.sin(), time.cos()], dim=-1).expand(-1, H, -1)
        x = self.merge(torch.cat([self.embed_action(x), time], dim=-1))
        x = self.action_net(F.silu(x)) + self.action_position
        x = torch.cat([self.embed_state(s)[:, None], x], dim=1)  # (B, 1 + H, W)
        mask = torch.ones(1 + H, 1 + H, dtype=torch.bool, device=x.device)
        mask[0, 1:] = False  # the state does not see the actions
        mask = mask.expand(B, 1, -1, -1)
        cache, real = known or ([()] * len(self.narrow), None)
        if known:
            mask = torch.cat([real[:, None, None].expand(-1, -1, 1 + H, -1), mask], dim=-1)
        for layer, keys_values in zip(self.narrow, cache):
            x, _ = layer(x, mask, keys_values)
        return self.out(self.norm(x[:, 1:]))


class Policy(nn.Module):
    """A chunk of actions for what is seen and asked for."""

    flags = ("execute", "flow_steps", "delay", "rtc")  # those of acting: --evaluate obeys them

    def __init__(self, task, args):
        super().__init__()
        for flag in "chunk execute draws flow_steps bins layers heads max_words".split():
            check(getattr(args, flag) >= 1, f"--{flag.replace('_', '-')} must be 1 or more.")
        check(args.execute <= args.chunk, f"--execute {args.execute}: --chunk has {args.chunk}.")
        late = 0 <= args.delay <= min(args.execute, args.chunk - args.execute)
        check(late, f"--delay {args.delay}: at most --execute, and what --chunk has beyond that.")
        check(args.head == "flow" or not args.rtc, "--rtc bends a flow: it needs --head flow.")
        check(args.action_dim % 2 == 0, "--action-dim must be even.")
        self.args, self.scaling = args, Scaling(task)
        self.vocabulary, self.action_size = vocabulary(task), task["sizes"][1]
        self.net = Network(task, args)

    def words(self, texts: list[str]) -> torch.Tensor:
        """Sentences as numbers (N, --max-words) of words."""
        n = self.args.max_words
        numbers = [[self.vocabulary.get(w, 1) for w in text.lower().split()[:n]] for text in texts]
        rows = [row + [0] * (n - len(row)) for row in numbers]
        return torch.tensor(rows, device=self.scaling.mean.device)

    def decode(self, known, s, noise, rest=None):
        """Actions (B, H, A) in [-1, 1] from noise of that size: what the head makes of it. With
        --rtc they go on from the rest (B, H - E, A) of an earlier chunk."""
        args, x, t = self.args, noise, torch.ones_like(noise[:, :1, :1])
        velocity = self.net if rest is None or not args.rtc else self.continuing(rest)
        if args.head != "flow":  # no noise: the tokens have their positions alone
            x = self.net(known, s, torch.zeros_like(x), t)
            if args.head == "tokens":
                x = (x.unflatten(-1, (-1, args.bins)).argmax(-1) + 0.5) * 2 / args.bins - 1
            return x
        for i in range(args.flow_steps):
            x = x - velocity(known, s, x, t * (1 - i / args.flow_steps)) / args.flow_steps
        return x

    def continuing(self, rest):
        """The velocity for a chunk that begins as the rest (B, H - E, A) of an earlier one."""
        # The first --delay actions are carried out in any case, the others matter less and less.
        (B, R, A), H, d = rest.shape, self.args.chunk, self.args.delay
        weight = (1 + (d - 1 - torch.arange(H, device=rest.device)) / (R - d + 1)).clamp(0, 1)
        weight = (weight * weight.expm1() / math.expm1(1))[:, None]  # (H, 1)
        wanted = torch.cat([rest, rest.new_zeros(B, H - R, A)], dim=1)

        @torch.enable_grad()
        def velocity(known, s, x, t):
            x = x.detach().requires_grad_()
            v = self.net(known, s, x, t)
            a = x - t * v  # where it leads to; how x has to change for that to be what is wanted:
            (change,) = torch.autograd.grad(a, x, weight * (wanted - a).detach())
            guidance = ((t**2 + (1 - t) ** 2) / (t * (1 - t))).clamp(max=5)
            return v.detach() - guidance * change

        return velocity

    def look(self, observations):
        """One observation or many -> pictures (N, H, W, 3), words (N, L), states (N, S). Each is a
        dictionary of image, state and instruction, or a state alone: then the others are None."""
        many = [observations] if isinstance(observations, dict) else observations
        if not isinstance(many[0], dict):
            return None, None, self.scaling.state(many if torch.is_tensor(many) else np.array(many))
        images = torch.as_tensor(np.stack([x["image"] for x in many])).to(self.scaling.mean.device)
        words = self.words([x["instruction"] for x in many])
        return images, words, self.scaling.state(np.stack([x["state"] for x in many]))

    @torch.no_grad()
    def go_on(self, observations, memory=None, deterministic: bool = False):
        """The next --execute actions (N, E, A) in the environment's bounds, of one observation
        (1, E, A), and a memory to hand in with the next ones: what the chunk has beyond. Then the
        first --delay actions are the old chunk's, carried out while the new one is made."""
        images, words, s = self.look(observations)
        E, d, rest = self.args.execute, self.args.delay, memory[0] if memory else None
        noise = torch.randn(len(s), self.args.chunk, self.action_size, device=s.device)
        chunk = self.decode(self.net.read(images, words), s, noise * (not deterministic), rest)
        a = torch.cat([chunk[:, :d] if rest is None else rest[:, :d], chunk[:, d:E]], dim=1)
        a = self.scaling.action(a, a)
        return a if torch.is_tensor(observations) else a.numpy(force=True), [chunk[:, E:]]

    def plan(self, observations, deterministic: bool = False):
        """The next --execute actions (N, E, A), with no earlier ones in mind. What is drawn is the
        noise; deterministic: there is none."""
        return self.go_on(observations, None, deterministic)[0]

    def act(self, observations, deterministic: bool = False):
        """What a user calls: one observation or many, NumPy or tensor -> as many actions in the
        environment's bounds, the first ones of their plans."""
        a = self.plan(observations, deterministic)[:, 0]
        return a if isinstance(observations, list) or np.ndim(observations) == 2 else a[0]

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {"": self.go_on}


# ----------------------------------------------------------------------------------- Algorithm


class Pi0(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        check(args.max_grad_norm > 0, "--max-grad-norm: above 0.")
        check(0 <= args.warmup_steps < args.decay_steps, "--decay-steps: more than --warmup-steps.")
        self.args, device = args, data["actions"].device
        self.policy = Policy(task, args).to(device)
        self.policy.scaling.fit(data["observations"])
        self.texts = self.policy.words(task["instructions"]) if "instructions" in task else None
        self.data = self.columns(data)
        self.register_buffer("updates", torch.zeros((), device=device))
        options = dict(weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
        rate = torch.tensor(args.learning_rate, device=device)
        of = self.policy.parameters()
        self.optimizer = torch.optim.AdamW(of, rate, **options, capturable=rate.is_cuda)

    def columns(self, data):
        """Pictures, words, states s, actions a, and the last row of each row's episode."""
        _, episode, lengths = data["episodes"].unique_consecutive(True, True)
        last = lengths.cumsum(0)[episode] - 1  # (N,)
        words = None if self.texts is None else self.texts[data["task_index"]]  # (N, L)
        s = self.policy.scaling.state(data["observations"])
        return data.get("images"), words, s, data["actions"], last

    def batch(self, columns, i):
        """Of the rows i (B,): pictures, words, s (B, S), chunks a (B, H, A), and which of their
        actions there are (B, H, 1): none after the episode's end."""
        images, words, s, a, last = columns
        rows = i[:, None] + torch.arange(self.args.chunk, device=i.device)  # (B, H)
        real = rows <= last[i, None]
        chunks = a[rows.clamp(max=len(a) - 1)]
        seen = (None if x is None else x[i] for x in (images, words))
        return *seen, s[i], chunks, real[..., None]

    def phase(self, step: int):
        """The update to do at this step; where there are several, each is a CUDA graph."""
        return self.update

    def update(self) -> dict[str, torch.Tensor]:
        """One gradient step. Returns tensors, never synchronises."""
        i = torch.randint(len(self.data[-1]), (self.args.batch_size,), device=self.data[2].device)
        loss = self.loss(*self.batch(self.data, i))
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.args.max_grad_norm)

        # The step size is a tensor: a graph would keep a number as it was when captured.
        self.updates += 1
        warm = (self.updates / max(1, self.args.warmup_steps)).clamp(max=1)
        way = (self.updates / self.args.decay_steps).clamp(max=1)
        cosine = 0.55 + 0.45 * torch.cos(math.pi * way)
        rate = self.optimizer.param_groups[0]["lr"]
        rate.copy_(self.args.learning_rate * torch.minimum(warm, cosine))
        self.optimizer.step()
        metrics = {"gradients/norm": norm, "charts/learning_rate": rate}
        return metrics | {f"losses/{self.args.head}": loss}

    def loss(self, images, words, s, a, real):
        """Of a batch, averaged over the actions that there are and their dimensions."""
        net = self.policy.net
        known = net.read(images, words)
        if self.args.head != "flow":
            out = net(known, s, torch.zeros_like(a), torch.ones_like(a[:, :1, :1]))
            if self.args.head == "mse":
                error = (out - a).square()
            else:
                bins = ((a + 1) / 2 * self.args.bins).long().clamp(0, self.args.bins - 1)
                logits = out.unflatten(-1, (-1, self.args.bins))  # (B, H, A, bins)
                error = F.cross_entropy(logits.movedim(-1, 1), bins, reduction="none")
        else:
            # The prefix costs most and knows no noise: one reading serves several draws.
            n, (cache, there) = self.args.draws, known or ([], None)
            s, a, real = (x.repeat_interleave(n, 0) for x in (s, a, real))
            if known:
                cache = [[x.repeat_interleave(n, 0) for x in pair] for pair in cache]
                known = cache, there.repeat_interleave(n, 0)
            # Beta(1.5, 1) by its inverse distribution function: P(b < x) = x^1.5.
            t = 0.001 + 0.999 * torch.rand_like(a[:, :1, :1]) ** (1 / 1.5)
            noise = torch.randn_like(a)
            v = net(known, s, t * noise + (1 - t) * a, t)
            error = (v - (noise - a)).square()
        return (error * real).sum() / (real.sum() * a.shape[-1])

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On held-out episodes: the loss; the squared error of the plans, each action's; the same
        with other rows' words, no worse where the policy ignores them."""
        i = torch.arange(0, len(data["actions"]), 1 + len(data["actions"]) // 512)
        images, words, s, a, real = self.batch(self.columns(data), i.to(data["actions"].device))
        net, noise, losses = self.policy.net, torch.randn_like(a), {}
        losses[self.args.head] = self.loss(images, words, s, a, real)
        wrong = {} if words is None else {"_other_words": words.flip(0)}
        for suffix, asked in {"": words, **wrong}.items():
            plan = self.policy.decode(net.read(images, asked), s, noise)
            error = (plan - a).square() * real
            losses[f"plan_mse{suffix}"] = error.sum() / (real.sum() * a.shape[-1])
        return losses


Learner = Pi0  # the name by which the training loop knows it

# From here on every file is the same: how data comes in, how a policy is judged, how a run goes.

# ------------------------------------------------------------------------------------- Dataset

# D4RL's returns of a random and of an expert policy, which score 0 and 100.
SCORES = {"HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3)}
SCORES |= {"Walker2d": (1.629008, 4592.3), "Ant": (-325.6, 3879.7)}
OURS = Path(__file__).resolve().parent.parent / "datasets"
COLUMNS = "terminals timeouts rewards actions observations next_observations final_observations"
KNOWN = {*COLUMNS.split(), *"truncations env_id action_low action_high".split()}
KNOWN |= {"ref_min_score", "ref_max_score", "images", "task_index", "instructions"}


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
    if Path(name, "meta/info.json").exists():
        return read_lerobot(Path(name))
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


def read_lerobot(folder: Path) -> dict:
    """A LeRobot data set (version 3) as it is on disk: tables of states and actions, tasks in words
    and its first camera's frames, as PNG or video; they come in at 64 x 64."""
    with explained("A LeRobot data set needs pip install pyarrow av"):
        import av
        import pyarrow.parquet as pq

    def frames(file):
        with av.open(file) as film:
            for frame in film.decode(video=0):
                yield frame.to_ndarray(format="rgb24", width=64, height=64, interpolation="AREA")

    info = json.loads((folder / "meta/info.json").read_text())["features"]
    rows = pq.read_table(folder / "data").sort_by("index")
    cameras = [key for key, x in info.items() if x["dtype"] in ("image", "video")]
    raw = {"observations": "observation.state", "actions": "action"}
    raw = {key: np.array(rows[column].to_pylist(), np.float32) for key, column in raw.items()}
    for key in cameras[:1]:
        files = sorted(folder.glob(f"videos/{key}/**/*.mp4"))
        files = files or [io.BytesIO(x["bytes"]) for x in rows[key].to_pylist()]
        raw["images"] = np.array([frame for file in files for frame in frames(file)])
    tasks = pq.read_table(folder / "meta/tasks.parquet").sort_by("task_index").to_pydict()
    raw["instructions"] = next(texts for key, texts in tasks.items() if key != "task_index")
    raw["task_index"] = rows["task_index"].to_numpy()
    raw["timeouts"] = np.diff(rows["episode_index"].to_numpy(), append=-1) != 0
    raw |= {key: np.zeros(len(raw["timeouts"])) for key in ("rewards", "terminals")}
    low, high = raw["actions"].min(0), raw["actions"].max(0)
    return raw | {"action_low": low, "action_high": np.maximum(high, low + 1e-6)}


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
    if "images" in raw:  # bytes, and bytes they stay until a batch is drawn
        ok = np.shape(raw["images"])[:1] == (n,) and np.asarray(raw["images"]).dtype == np.uint8
        check(ok and np.ndim(raw["images"]) == 4, f"{of}: 'images' is not (N, H, W, 3) of bytes.")
        data["images"] = np.asarray(raw["images"])[keep]
        task["image"] = list(data["images"].shape[1:])
    if "task_index" in raw:  # which of the instructions a row carries out
        task["instructions"] = [str(x).lower() for x in raw.get("instructions", [])]
        rows, known = np.ravel(raw["task_index"]), np.arange(len(task["instructions"]))
        ok = len(rows) == n and np.isin(rows, known)
        check(ok, f"{of}: 'task_index' is not (N,), numbers of its 'instructions'.")
        data["task_index"] = rows[keep].astype(np.int64)
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
        seen = env.observation_space
        seen = getattr(seen, "spaces", {"state": seen}).get("state")
        spaces, shapes = (seen, env.action_space), [(x,) for x in task["sizes"]]
        ok = all(isinstance(x, gym.spaces.Box) and x.shape == y for x, y in zip(spaces, shapes))
        check(ok, f"{of} has {spaces[0]} and {spaces[1]}, the data has boxes of shapes {shapes}.")
        check(env.spec.max_episode_steps, f"{of} has no time limit: register it with one.")
        env.reset(seed=0), env.step(env.action_space.sample()), video and env.render()  # a trial
        return gym.wrappers.RecordVideo(env, str(video), disable_logger=True) if video else env


def evaluate(policy, task: dict, episodes: int, seed: int, video="") -> dict[str, float]:
    """Return, length and score of a policy over some episodes, all stepped together: each plan is
    carried out before the next look. A policy with a memory is told which episodes go on."""
    row = {}
    for suffix, act in policy.actors().items():
        envs = [make_env(task, "" if i or suffix else video) for i in range(episodes)]
        returns, lengths, running = np.zeros(episodes), np.zeros(episodes), list(range(episodes))
        with explained(f"Environment '{task['env_id']}' failed (what was trained is saved)"):
            s, memory = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)], None
            while running:
                (actions, memory), asked = act([s[i] for i in running], memory), running[:]
                plans = actions.reshape(len(asked), -1, task["sizes"][1])  # (N, 1 or E, A)
                for i, a in ((i, a) for i, plan in zip(asked, plans) for a in plan):
                    if i in running:
                        s[i], reward, terminated, truncated, _ = envs[i].step(a)
                        returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
                        if terminated or truncated:
                            running.remove(i)
                memory = [x[torch.tensor([i in running for i in asked])] for x in memory]
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
