"""S2P, "State-conditioned Image Synthesis for Data Augmentation in Offline Reinforcement Learning"
Daesol Cho, Dongseok Shim, H. Jin Kim. NeurIPS 2022, arXiv:2209.15256. Our specification: see below.

A policy that acts on pictures has no model to imagine with: pictures are hard to predict. States
are not. Where the data has both, an ensemble of state models proposes what random actions would
lead to, a generator G paints those states, and offline RL (IQL) learns from real and from painted
transitions. A state does not say all that a picture shows (how far the body ran: the floor), so G
also sees the picture before.

    L(M_i) = -log N(x; μ_i, σ_i) / X,   x = (s' - s, r), standardised,   X its dimensions
    L(G)   = |G(o, s') - o'| - λ_adv Σ_k D_k(G(o, s'), o, s')            o: a picture, o': the next
    L(D_k) = [1 - D_k(o', o, s')]+ + [1 + D_k(G(o, s'), o, s')]+         k: whole and half scale
    L(R)   = |R(o) - s|²                 reads the state back from a picture: a measure, no part
    painted: (o, a°, r̂ - λ σ_r u, G(o, ŝ')),  a° uniform, (ŝ', r̂) from a random member of M at
             (s, a°), u its uncertainty, σ_r the reward's standard deviation
    IQL:     L(V) = |τ - 1(q < V)| (q - V)²,  q = min_i Q'_i(z, a),  z = E(last two pictures)
             L(π) = -min(exp(β (q - V)), 100) log π(a|z),  L(Q_i) = (Q_i - r - γ (1 - d) V(z'))²

    python datasets/make.py halfcheetah-pixels
    python algorithms/s2p.py
    python algorithms/s2p.py --painted 0 --painter-steps 0

Measured: 4,000 policy steps on pictures alone, score 11.4 (return 1129); half painted, after 2,000
of the painter, 2.2 (-7). One seed, 10 and 16 minutes on a CPU. Contours are 0.94 as sharp as the
true ones, legs not yet where the state says: no gain by painting has been seen so far.

Differs from the paper / official code (github.com/dsshim0125/s2p has the state model, the rollouts
and the RL; its generator is not in it). The paper fixes: an ensemble of Gaussian state models, one
step from every state by random actions, a penalty by uncertainty, as many painted as real
transitions, G of the state and the previous picture by a multimodal affine transformation (MAT),
L1 with an adversarial loss, IQL (or CQL, SLAC) on pictures. We chose:
- No perceptual loss: it needs ImageNet's weights. λ_adv, all widths, the layer norm in MAT, U-Net's
  order of its blocks and two scales of D are ours.
- Pictures of 64 x 64 in stacks of 2 (the code: 100 x 100, 3), random shifts (the code: SLAC's or
  CURL's features), HalfCheetah-v5 for dm_control's cheetah.
- Every batch's pictures are painted anew; the code paints 50,000 once. u is a root mean square over
  the dimensions, in standard deviations of the change; the code's a norm.
- Members of M share their batches; none is left out.
- Encoder, V, π and Q take their steps together from all three losses. Rewards are scaled as IQL's.
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
    """S2P: imagined states, painted by a generator, as data for IQL on pictures."""

    painted: float = 0.5  # share of painted transitions in the policy's batches; 0: IQL alone
    painter_steps: int = 5000  # gradient steps of M, G, D and R; the policy's are the rest
    adversarial_weight: float = 0.02  # λ_adv beside L1; 0: no discriminator
    uncertainty: Literal["aleatoric", "disagreement"] = "aleatoric"  # u: largest σ_i, or spread
    penalty_weight: float = 1.0  # λ: the reward's standard deviations per u
    ensemble: int = 7  # members of the state model
    model_dim: int = 256  # units in each of its three hidden layers
    channels: int = 32  # of G and D at half of the picture's size
    painter_batch_size: int = 32  # pictures per gradient step of G, D and R; M has batch_size
    painter_learning_rate: float = 5e-4  # Adam's step size: M, G, D and R
    image_size: int = 64  # side of the data's images; 1: an observation is one pixel (for tests)
    shift: int = 4  # pixels by which the policy's pictures are shifted at random
    expectile: float = 0.7  # τ of the value's loss, in (0, 1); 0.5 is the mean
    beta: float = 3.0  # β, inverse temperature of the weights; 0 is cloning
    gamma: float = 0.99  # discount per step
    tau: float = 0.005  # share of the new parameters in a target network's update
    steps: int = 25_000  # gradient steps: first the painter's, then the policy's
    batch_size: int = 64  # transitions per gradient step of the policy
    hidden_dim: int = 256  # units in each of the two hidden layers of π, V and Q
    learning_rate: float = 3e-4  # Adam's step size: encoder, π, V and Q

    # The run: the same flags in every file.
    dataset: str = "halfcheetah-pixels"  # one of datasets/, a Minari id, or a path (.hdf5, .npz)
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


def convolutions(*widths: int) -> nn.Sequential:
    """Each halves its picture's side: (B, C, H, W) -> (B, C', H / 2, W / 2), rounded up."""
    layers = [(nn.Conv2d(i, o, 3, 2, 1), nn.LeakyReLU(0.2)) for i, o in zip(widths, widths[1:])]
    return nn.Sequential(*sum(layers, ()))


def encoder(channels: int, side: int, out_dim: int) -> nn.Sequential:
    """E and R: pictures (B, C, H, W) in [-1, 1] -> (B, out_dim)."""
    flat = 32 * math.ceil(side / 16) ** 2
    return nn.Sequential(
        convolutions(channels, 16, 32, 32, 32), nn.Flatten(), nn.Linear(flat, out_dim)
    )


class Policy(nn.Module):
    """π: the last two pictures, flat (B, S) -> mean (B, A) in [-1, 1] and log σ (A,)."""

    flags = ()  # those of acting: --evaluate obeys them

    def __init__(self, task, args):
        super().__init__()
        self.scaling, side = Scaling(task), args.image_size
        self.scaling.mean.fill_(127.5), self.scaling.std.fill_(127.5)  # bytes to [-1, 1]
        self.shape = (1 if side == 1 else 2, side, side, -1)  # pictures, height, width, colours
        channels = task["sizes"][0] // side**2
        self.encoder = nn.Sequential(encoder(channels, side, 64), nn.LayerNorm(64), nn.Tanh())
        self.net = mlp(64, args.hidden_dim, task["sizes"][1])
        self.log_sigma = nn.Parameter(torch.zeros(task["sizes"][1]))
        self.to(memory_format=torch.channels_last)  # here: a loaded one rounds as the trained one

    def encode(self, observations, encoder=None):
        """Features z (B, 64) of pictures as the environment gives them, one after the other."""
        o = self.scaling.state(observations).unflatten(1, self.shape)  # (B, 2, H, W, 3)
        o = o.movedim(1, 3).flatten(3).permute(0, 3, 1, 2)  # (B, 6, H, W), colours last in memory
        return (encoder or self.encoder)(o)

    def forward(self, z):
        return torch.tanh(self.net(z)), self.log_sigma.clamp(-5, 2)

    def log_prob(self, z, a):
        """log π(a|z) in nats, (B, 1)."""
        mu, log_sigma = self(z)
        log_prob = -0.5 * ((a - mu) / log_sigma.exp()).square() - log_sigma  # (B, A)
        return (log_prob - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)

    @torch.no_grad()
    def act(self, observations, deterministic: bool = True):
        """What a user calls: one observation (S,) or many (N, S), the last two pictures, bytes,
        flat, as NumPy or tensor -> as many actions in the environment's bounds; the mean, or a
        sample."""
        a, log_sigma = self(self.encode(observations))
        if not deterministic:
            a = a + log_sigma.exp() * torch.randn_like(a)
        return self.scaling.action(a, observations)

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {"": self.act}


class Affine(nn.Module):
    """The multimodal affine transformation: what is painted so far, h, is scaled and shifted by
    what the state and the previous picture say together at every place."""

    def __init__(self, in_channels, out_channels, seen_channels, state_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, 1, 1)
        self.seen = nn.Conv2d(seen_channels, out_channels, 3, 1, 1)
        self.state = nn.Linear(state_channels, out_channels)
        self.affine = nn.Conv2d(out_channels, 2 * out_channels, 1)

    def forward(self, h, seen, e):
        h = self.conv(F.interpolate(h, seen.shape[2:]))
        both = F.relu(self.seen(seen) + self.state(e)[:, :, None, None])
        gamma, beta = self.affine(both).chunk(2, dim=1)
        h = F.layer_norm(h, h.shape[1:])
        return F.leaky_relu((1 + gamma) * h + beta, 0.2)


class Generator(nn.Module):
    """G: the previous picture (B, C, H, W) and a state (B, S) -> that state's picture."""

    def __init__(self, channels, side, state_dim, width):
        super().__init__()
        self.seed_side = math.ceil(side / 8)
        self.embed = nn.Sequential(nn.Linear(7 * state_dim, 4 * width), nn.ReLU())
        self.seed = nn.Linear(4 * width, 2 * width * self.seed_side**2)
        widths = (width, 2 * width, 2 * width)
        self.down = nn.ModuleList(convolutions(i, o) for i, o in zip((channels, *widths), widths))
        up = zip((2 * width, 2 * width, 2 * width), widths[::-1], widths[::-1])
        self.up = nn.ModuleList(Affine(i, o, seen, 4 * width) for i, o, seen in up)
        self.paint = nn.Sequential(nn.Conv2d(width, 4 * channels, 3, 1, 1), nn.PixelShuffle(2))

    def forward(self, o, s):
        waves = [f(k * s) for k in (1, 2, 4) for f in (torch.sin, torch.cos)]
        e = self.embed(torch.cat([s, *waves], dim=-1))  # (B, 4 width)
        h = self.seed(e).unflatten(1, (-1, self.seed_side, self.seed_side))
        seen = [o]
        for down in self.down:
            seen.append(down(seen[-1]))
        for up, at in zip(self.up, seen[:0:-1]):
            h = up(h, at, e)
        return torch.tanh(self.paint(h))[..., : o.shape[2], : o.shape[3]]


class Discriminator(nn.Module):
    """D_k: a picture, the one before, its state -> a verdict on every patch, at two scales."""

    def __init__(self, channels, state_dim, width):
        super().__init__()
        self.nets = nn.ModuleList(convolutions(2 * channels, width, 2 * width) for _ in range(2))
        self.heads = nn.ModuleList(nn.Conv2d(2 * width, 1, 1) for _ in range(2))
        self.states = nn.ModuleList(nn.Linear(state_dim, 2 * width) for _ in range(2))

    def forward(self, o_next, o, s):
        x, verdicts = torch.cat([o_next, o], dim=1), []
        for net, head, state in zip(self.nets, self.heads, self.states):
            h = net(x)
            fits = (h * state(s)[:, :, None, None]).mean(1, keepdim=True)  # projection
            verdicts.append((head(h) + fits).flatten(1))
            x = F.avg_pool2d(x, 2, ceil_mode=True)
        return verdicts


# ----------------------------------------------------------------------------------- Algorithm


def neighbours(episodes):
    """Numbers of the row before and of the row after each (N,): its own, at an episode's ends."""
    row = torch.arange(len(episodes), device=episodes.device)
    before, after = (row - 1).clamp(min=0), (row + 1).clamp(max=len(row) - 1)
    return [torch.where(episodes[i] == episodes, i, row) for i in (before, after)]


class S2P(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        check(0 < args.expectile < 1, f"--expectile {args.expectile}: between 0 and 1, exclusive.")
        check(0 <= args.painted <= 1, f"--painted {args.painted}: a share, from 0 to 1.")
        self.args, device, n = args, data["rewards"].device, len(data["rewards"])
        side, images = args.image_size, data.get("images")
        if side == 1:
            images = data["observations"][:, None, None]
        way_out = "`python datasets/make.py halfcheetah-pixels` makes a file of such images."
        found = "none" if images is None else f"{images.shape[2]} x {images.shape[1]}"
        ok = images is not None and images.shape[1:3] == (side, side)
        check(ok, f"--image-size {side}: the data's images are {found}. {way_out}")

        # Every picture is kept once, as bytes. A row's pictures are its own and the one before; its
        # successor's is in the next row. The last row of an episode has none, and needs none where
        # the episode ends in a terminal.
        self.images, row = images, torch.arange(n, device=device)
        self.row_before, self.row_next = neighbours(data["episodes"])
        goes_on = self.row_next > row
        check(goes_on.any().item(), "No two of the data's pictures follow each other.")
        self.pairs = goes_on.nonzero()[:, 0]
        self.rows = (goes_on | (data["terminals"][:, 0] > 0)).nonzero()[:, 0]

        self.register_buffer("s_mean", data["observations"].mean(0))
        self.register_buffer("s_std", data["observations"].std(0, correction=0) + 1e-3)
        self.s = self.standardise(data["observations"])
        self.a, self.r, self.d = (data[key] for key in ("actions", "rewards", "terminals"))
        recorded = data["recorded"].nonzero()[:, 0]
        s_next = self.standardise(data["next_observations"][recorded])
        self.moves = (self.s[recorded], self.a[recorded], self.r[recorded], s_next)

        self.policy = Policy(task, args).to(device)
        self.v = mlp(64, args.hidden_dim, 1).to(device)
        nets = [mlp(64 + task["sizes"][1], args.hidden_dim, 1) for _ in range(2)]
        self.critic = nn.ModuleList(nets).to(device)
        self.encoder_target = copy.deepcopy(self.policy.encoder)
        self.critic_target = copy.deepcopy(self.critic)
        sizes, colours = (self.s.shape[1], args.channels), images.shape[3]
        s, a, r, s_next = self.moves
        x = torch.cat([s_next - s, r], dim=-1)
        self.register_buffer("x_mean", x.mean(0))
        self.register_buffer("x_std", x.std(0, correction=0) + 1e-3)
        layers = (s.shape[1] + a.shape[1], args.model_dim, 2 * x.shape[1], 3)
        self.model = nn.ModuleList(mlp(*layers) for _ in range(args.ensemble)).to(device)
        self.generator = Generator(colours, side, *sizes).to(device)
        self.discriminator = Discriminator(colours, *sizes).to(device)
        self.reader = encoder(colours, side, sizes[0]).to(device)
        self.to(memory_format=torch.channels_last)

        # β sits in an exponent, so rewards are scaled until the episodes' returns span 1000.
        first = self.row_before == row
        returns = data["returns_to_go"][first, 0]  # (E,)
        span, rounding = returns.max() - returns.min(), 1e-5 * returns.abs().max()
        self.reward_scale = 1000 / span if span > rounding else 1.0
        online = [*self.policy.parameters(), *self.v.parameters(), *self.critic.parameters()]
        self.optimizer = adam(online, args.learning_rate)
        rate = args.painter_learning_rate
        self.model_optimizer = adam([*self.model.parameters(), *self.reader.parameters()], rate)
        self.generator_optimizer = adam(self.generator, rate, betas=(0.5, 0.999))
        self.discriminator_optimizer = adam(self.discriminator, rate, betas=(0.5, 0.999))

    def phase(self, step: int):
        """The update to do at this step, each a CUDA graph: the painter's, then the policy's."""
        return self.update_painter if step <= self.args.painter_steps else self.update_policy

    def standardise(self, states):
        return (states - self.s_mean) / self.s_std

    def pick(self, rows, size):
        """Numbers (B,) of rows, drawn from some."""
        return rows[torch.randint(len(rows), (size,), device=rows.device)]

    def pictures(self, images):
        """Bytes (B, H, W, C) -> (B, C, H, W) in [-1, 1], colours last in memory."""
        return (images.float() / 127.5 - 1).permute(0, 3, 1, 2)

    # The painter.

    def update_painter(self) -> dict[str, torch.Tensor]:
        """One step of M, R, G and D. Returns tensors, never synchronises."""
        i = torch.randint(len(self.moves[0]), (self.args.batch_size,), device=self.r.device)
        nll = self.nll(*(column[i] for column in self.moves))
        i = self.pick(self.pairs, self.args.painter_batch_size)
        o, o_next = self.pictures(self.images[i]), self.pictures(self.images[self.row_next[i]])
        s_next = self.s[self.row_next[i]]
        read = F.mse_loss(self.reader(o_next), s_next)
        minimise(self.model_optimizer, nll + read)
        return {"losses/model": nll, "losses/reader": read} | self.update_gan(o, s_next, o_next)

    def predict(self, s, a):
        """μ and σ of every member of M, (N, B, S + 1) each."""
        s_a = torch.cat([s, a], dim=-1)
        mu, log_sigma = torch.stack([member(s_a) for member in self.model]).chunk(2, dim=-1)
        return mu, (-5 + 3 * (torch.tanh(log_sigma) + 1)).exp()  # log σ in [-5, 1]

    def nll(self, s, a, r, s_next):
        """Negative log-likelihood of M in nats per dimension."""
        x = (torch.cat([s_next - s, r], dim=-1) - self.x_mean) / self.x_std
        mu, sigma = self.predict(s, a)
        nll = 0.5 * ((x - mu) / sigma).square() + sigma.log() + 0.5 * math.log(2 * math.pi)
        return nll.mean()

    def update_gan(self, o, s_next, o_next):
        # D: the hinge loss of each scale, real pictures above 1, painted ones below -1.
        painted = self.generator(o, s_next)
        metrics = {}
        if self.args.adversarial_weight > 0:
            real = self.discriminator(o_next, o, s_next)
            fake = self.discriminator(painted.detach(), o, s_next)
            loss = sum(F.relu(1 - x).mean() + F.relu(1 + y).mean() for x, y in zip(real, fake))
            minimise(self.discriminator_optimizer, loss)
            metrics = {"losses/discriminator": loss}

        # G: near the true picture, and passing for one. L1 alone paints what it is unsure of, the
        # limbs, as a blur: their median.
        l1 = (painted - o_next).abs().mean()
        loss = l1
        if self.args.adversarial_weight > 0:
            self.discriminator.requires_grad_(False)
            adversarial = -sum(x.mean() for x in self.discriminator(painted, o, s_next))
            self.discriminator.requires_grad_(True)
            loss = l1 + self.args.adversarial_weight * adversarial
            metrics["losses/adversarial"] = adversarial
        minimise(self.generator_optimizer, loss)
        return metrics | {"losses/l1": l1}

    # Imagination.

    @torch.no_grad()
    def imagine(self, i):
        """What uniform actions at rows i lead to: actions (B, A), penalised rewards (B, 1), states
        (B, S) and their pictures, bytes (B, H, W, C)."""
        s, a = self.s[i], 2 * torch.rand_like(self.a[i]) - 1
        mu, sigma = self.predict(s, a)
        member = torch.randint(len(mu), (1, len(s), 1), device=s.device).expand(1, *mu.shape[1:])
        x = self.x_mean + self.x_std * mu.gather(0, member)[0]  # (B, S + 1)
        off = sigma if self.args.uncertainty == "aleatoric" else mu - mu.mean(0)
        u = off.square().mean(-1).sqrt().amax(0)[:, None]  # (B, 1)
        r = x[:, -1:] - self.args.penalty_weight * self.x_std[-1] * u
        s_next = s + x[:, :-1]
        painted = self.generator(self.pictures(self.images[i]), s_next).permute(0, 2, 3, 1)
        return a, r, s_next, ((painted + 1) * 127.5).round().to(self.images.dtype)

    # IQL on pictures.

    def update_policy(self) -> dict[str, torch.Tensor]:
        """One step of encoder, V, Q and π together. Returns tensors, never synchronises."""
        losses, metrics = self.losses(*self.sample())
        minimise(self.optimizer, losses["v"] + losses["actor"] + losses["critic"])
        self.update_targets()
        return metrics | {f"losses/{name}": loss for name, loss in losses.items()}

    def sample(self):
        """Real, then painted transitions: pictures (B, F, H, W, C), a (B, A), r (B, 1), pictures of
        the successor and d (B, 1), shifted at random. What is painted goes on: d = 0."""
        painted = round(self.args.painted * self.args.batch_size)
        i = self.pick(self.rows, self.args.batch_size - painted)
        a, r, d = self.a[i], self.r[i], self.d[i]
        shown = self.images[self.row_next[i]]
        if painted:
            j = self.pick(self.rows, painted)
            a_painted, r_painted, _, o_painted = self.imagine(j)
            a, r = torch.cat([a, a_painted]), torch.cat([r, r_painted])
            d = torch.cat([d, torch.zeros_like(r_painted)])
            i, shown = torch.cat([i, j]), torch.cat([shown, o_painted])
        before, now = self.images[self.row_before[i]], self.images[i]
        o, o_next = torch.stack([before, now], 1), torch.stack([now, shown], 1)
        frames = self.policy.shape[0]
        return self.shifted(o[:, -frames:]), a, r, self.shifted(o_next[:, -frames:]), d

    def shifted(self, o):
        """Pictures (B, F, H, W, C), each F of them moved by up to --shift pixels; edges repeat."""
        b, f, h, w, _ = o.shape
        by = torch.randint(-self.args.shift, self.args.shift + 1, (2, b, 1), device=o.device)
        y = (torch.arange(h, device=o.device) + by[0]).clamp(0, h - 1)  # (B, H)
        x = (torch.arange(w, device=o.device) + by[1]).clamp(0, w - 1)  # (B, W)
        b, f = torch.arange(b, device=o.device), torch.arange(f, device=o.device)
        return o[b[:, None, None, None], f[:, None, None], y[:, None, :, None], x[:, None, None]]

    def q(self, critic, z, a):
        """Q_1 and Q_2, (2, B, 1)."""
        return torch.stack([net(torch.cat([z, a], dim=-1)) for net in critic])

    def losses(self, o, a, r, o_next, d):
        """The three losses, all with the networks of before the step, and what is logged."""
        z = self.policy.encode(o.flatten(1))  # (B, 64): all three losses train the encoder
        with torch.no_grad():
            z_target = self.policy.encode(o.flatten(1), self.encoder_target)
            q_target = self.q(self.critic_target, z_target, a).amin(0)  # (B, 1)
            v_next = self.v(self.policy.encode(o_next.flatten(1)))

        # Expectile regression: where Q lies above V the error weighs τ, elsewhere 1 - τ.
        v = self.v(z)  # (B, 1)
        u = q_target - v
        v_loss = (torch.where(u > 0, self.args.expectile, 1 - self.args.expectile) * u * u).mean()

        # Cloning, weighted: an action better than V counts up to 100 times, a worse one fades.
        weight = (self.args.beta * u.detach()).exp().clamp(max=100)  # (B, 1)
        actor_loss = -(weight * self.policy.log_prob(z, a)).mean()

        # d is 1 at a terminal only: a time limit ends the episode, not the future.
        y = self.reward_scale * r + self.args.gamma * (1 - d) * v_next
        q = self.q(self.critic, z, a)
        critic_loss = (q - y).square().mean((1, 2)).sum()
        metrics = {"values/v": v.mean(), "values/q": q.mean(), "values/reward": r.mean()}
        return {"v": v_loss, "actor": actor_loss, "critic": critic_loss}, metrics

    @torch.no_grad()
    def update_targets(self):
        targets = [*self.encoder_target.parameters(), *self.critic_target.parameters()]
        onlines = [*self.policy.encoder.parameters(), *self.critic.parameters()]
        torch._foreach_lerp_(targets, onlines, self.args.tau)

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is painted of held-out pairs of pictures, beside the true ones, and IQL's losses."""
        images = data.get("images", data["observations"][:, None, None])
        before, after = neighbours(data["episodes"])
        row = torch.arange(len(after), device=after.device)
        i = (after > row).nonzero()[:, 0]
        i = i[:: len(i) // 512 + 1]
        s, s_next = self.standardise(data["observations"][i]), data["observations"][after[i]]
        s_next, a, r = self.standardise(s_next), data["actions"][i], data["rewards"][i]
        o, true = self.pictures(images[i]), self.pictures(images[after[i]])
        painted = self.generator(o, s_next)

        # L1 in shares of white; the previous picture, copied, is what G has to beat. Sharpness: the
        # mean step between neighbouring pixels, against the true pictures'.
        off = (painted - true).abs() / 2
        found = {"model_nll": self.nll(s, a, r, s_next), "l1": off.mean()}
        found |= {"l1_copied": (o - true).abs().mean() / 2}
        found["psnr"] = -10 * off.square().mean((1, 2, 3)).clamp(min=1e-8).log10().mean()
        slope = [x.diff(dim=3).abs().mean() + x.diff(dim=2).abs().mean() for x in (painted, true)]
        found["sharpness"] = slope[0] / slope[1] if true.shape[2] > 1 else slope[0].new_zeros(())

        # R² of what R reads, over those numbers that a true picture shows, R² above a half.
        kinds = {"read_true": true, "read_painted": painted, "read_copied": o}
        error = [(self.reader(x) - s_next).square().mean(0) for x in kinds.values()]
        fits = [1 - x / s_next.var(0, correction=0).clamp(min=1e-8) for x in error]
        shown = (fits[0] > 0.5).float()
        found |= {k: (shown * x).sum() / shown.sum().clamp(min=1) for k, x in zip(kinds, fits)}
        frames = (images[before[i]], images[i], images[after[i]])
        o, o_next = torch.stack(frames[:2], 1), torch.stack(frames[1:], 1)
        o, o_next = o[:, -self.policy.shape[0] :], o_next[:, -self.policy.shape[0] :]
        return found | self.losses(o, a, r, o_next, data["terminals"][i])[0]


Learner = S2P  # the name by which the training loop knows it

# From here on every file is the same: how data comes in, how a policy is judged, how a run goes.

# ------------------------------------------------------------------------------------- Dataset

# D4RL's returns of a random and of an expert policy, which score 0 and 100.
SCORES = {"HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3)}
SCORES |= {"Walker2d": (1.629008, 4592.3), "Ant": (-325.6, 3879.7)}
OURS = Path(__file__).resolve().parent.parent / "datasets"
COLUMNS = "terminals timeouts rewards actions observations next_observations final_observations"
KNOWN = {*COLUMNS.split(), *"truncations env_id action_low action_high".split()}
KNOWN |= {"ref_min_score", "ref_max_score", "images"}


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
    size = 2 * raw["images"][0].size if "images" in raw else s.shape[1]  # what a policy sees
    task = {"env": env_id or own, "env_id": "none", "sizes": [size, a.shape[1]]}
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
