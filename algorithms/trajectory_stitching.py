"""Trajectory stitching (TS), "Model-based Trajectory Stitching for Improved Offline Reinforcement
Learning", Charles A. Hepburn, Giovanni Montana. NeurIPS 2022 workshop, arXiv:2211.11603, and for
behavioural cloning arXiv:2212.04280.

Models mend the data, then a policy clones it. An episode is followed from its first state and may
leave, at every step, for a state ŝ of another episode near its own successor s': where V says that
ŝ is better, and an ensemble that it is reached from s as easily as s'. The action that leads there
is generated, so is the reward. A stitched episode replaces the old one if its return is higher.

    L(V)   = (r + γ V'(s') - V(s))²,                        V' follows V at rate τ
    L(p_i) = -log p_i(s'|s),                                p_i Gaussian, member i of N
    L(q,h) = |a - h(s, s', z)|² / A + β KL(q(z|s, s', a) || N(0, I)) / A,    z ~ q,  A actions
    L(C)   = C(y, r̂) - C(y, r) + λ max(0, |∂C/∂r| - 1)²,   y = (s, s', a)
    L(G)   = -C(y, r̂),                                     r̂ = G(y, ε),  ε ~ N(0, 1)
    stitch   s, h(s, ŝ, 0), ŝ: the best V(ŝ) > V(s') with min_i p_i(ŝ|s) > mean_i p_i(s'|s)
    accept   if R̂ > R + p̃ |R|,   R = Σ γ^t r_t + γ^T V(s_T), without V at a terminal
    L(π)   = |π(s) - a|² / A on the mended data; or TD3+BC's (algorithms/td3_bc.py)

    python algorithms/trajectory_stitching.py --dataset hopper-medium-replay
    python algorithms/trajectory_stitching.py --dataset hopper-medium-replay --reward-model mlp

Measured: tests/crossing.npz, made for stitching, 3,000 steps of small networks: reaches the goal on
5 seeds of 5, as cloning that data never does (20 s on one CPU thread; flags: tests/cases.py).

Differs from the official code, github.com/CharlesHepburn1/Model-Based-Trajectory-Stitching:
- Candidates by number; theirs lie in a radius set for each environment. They have two V, pick 5
  of 7 p_i by hand, and draw z. Our C has a one-sided penalty (Petzka et al. 2018,
  arXiv:1709.08894), theirs weight decay; with the usual (|∂C/∂r| - 1)² G ran off the data.
- They stitch eleven times and fit V anew in between. Here that is done once; the file of
  --write-stitched can be stitched again, and any other file can train on it.
- They compare sums of rewards, and so where time cuts episodes the shorter one may win; hence γ,
  and V behind the end.
- An episode may leave before a terminal (V is 0 behind it) and lasts as long as the data's longest.
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
    """Cloning of episodes that are stitched together from parts of others, where models agree."""

    learner: Literal["bc", "td3_bc"] = "bc"  # what learns from original and stitched transitions
    neighbours: int = 40  # candidates for a successor: the nearest states of other episodes
    reachability: bool = True  # ask the ensemble whether a candidate can be reached
    min_gain: float = 0.1  # p̃: share of |R| by which a stitched episode must beat the old one
    keep_originals: bool = False  # the policy also learns from the episodes that were replaced
    write_stitched: str = ""  # a new file, .hdf5, for the mended data; any file's --dataset
    model_steps: int = 50_000  # gradient steps of the models; the policy's are the rest
    model_dim: int = 256  # units in each of the two hidden layers of V and of every model
    ensemble: int = 7  # N: members of the forward model
    latent_dim: int = 8  # Z of the inverse model
    kl_weight: float = 0.5  # β of the inverse model
    reward_model: Literal["wgan", "mlp"] = "wgan"  # mlp: G without ε, by its squared error
    gradient_penalty: float = 10.0  # λ of the reward's critic
    judge_steps: int = 3  # steps of the reward's critic for each of its generator's
    reward_learning_rate: float = 1e-4  # Adam's step size: reward's generator and critic
    alpha: float = 2.5  # TD3+BC: weight of Q against cloning
    gamma: float = 0.99  # discount per step
    tau: float = 0.005  # share of the new parameters in a target network's update
    steps: int = 150_000  # gradient steps: first the models', then the policy's
    batch_size: int = 256  # transitions per gradient step, and per member of the ensemble
    hidden_dim: int = 256  # units in each of the two hidden layers of the policy, and of Q
    learning_rate: float = 3e-4  # Adam's step size, of all but the reward's

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


class Policy(nn.Module):
    """Deterministic policy π: normalised states (B, S) -> actions (B, A) in [-1, 1]."""

    flags = ()  # those of acting: --evaluate obeys them

    def __init__(self, task, args):
        super().__init__()
        self.scaling, (state_dim, action_dim) = Scaling(task), task["sizes"]
        self.net = mlp(state_dim, args.hidden_dim, action_dim)

    def forward(self, s):
        return torch.tanh(self.net(s))

    @torch.no_grad()
    def act(self, observations):
        """What a user calls: one raw observation (S,) or many (N, S), NumPy or tensor -> as many
        actions in the environment's bounds."""
        return self.scaling.action(self(self.scaling.state(observations)), observations)

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {"": self.act}


# ----------------------------------------------------------------------------------- Algorithm


class TrajectoryStitching(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        for flag in ("neighbours", "ensemble", "latent_dim", "judge_steps"):
            check(getattr(args, flag) > 0, f"--{flag.replace('_', '-')} must be 1 or more.")
        path = Path(args.write_stitched)
        ok = path.suffix == ".hdf5" and path.parent.is_dir() and (args.resume or not path.exists())
        sentence = f"--write-stitched {path}: a new .hdf5 file in a folder that is there."
        check(ok or not args.write_stitched, sentence)
        self.args, self.task, self.raw, device = args, task, data, data["rewards"].device
        self.policy, (S, A), wide = Policy(task, args).to(device), task["sizes"], args.model_dim
        self.policy.scaling.fit(data["observations"])
        state, n = self.policy.scaling.state, len(data["rewards"])
        s, s_next = state(data["observations"]), state(data["next_observations"])
        self.data = (s, data["actions"], data["rewards"], s_next, data["terminals"])
        # Dynamics are learnt from the rows that have a successor; a terminal may have none.
        self.recorded = data["recorded"].nonzero()[:, 0]  # (M,)
        self.x_std = (s_next - s)[self.recorded].std(0, correction=0) + 1e-3
        self.r_mean, self.r_std = data["rewards"].mean(), data["rewards"].std(correction=0) + 1e-3
        self.last = data["episodes"].diff(append=data["episodes"].new_tensor([-1])) != 0  # (n,)

        # The models, and TD3+BC's critics.
        self.v, self.encoder = mlp(S, wide, 1), mlp(2 * S + A, wide, 2 * args.latent_dim)
        self.dynamics = nn.ModuleList(mlp(S, wide, 2 * S) for _ in range(args.ensemble))
        self.decoder = mlp(2 * S + args.latent_dim, wide, A)
        self.generator, self.judge = (mlp(2 * S + A + 1, wide, 1) for _ in range(2))
        twins = 2 * (args.learner == "td3_bc")
        self.critic = nn.ModuleList(mlp(S + A, args.hidden_dim, 1) for _ in range(twins))
        online = (self.v, self.policy, self.critic)
        self.v_target, self.policy_target, self.critic_target = map(copy.deepcopy, online)
        self.to(device)
        models = nn.ModuleList([self.v, self.dynamics, self.encoder, self.decoder])
        self.optimizer = adam(models, args.learning_rate)
        self.policy_optimizer = adam(self.policy, args.learning_rate)
        if args.learner == "td3_bc":
            self.critic_optimizer = adam(self.critic, args.learning_rate)
        rate, betas = args.reward_learning_rate, (0.0, 0.9)
        self.generator_optimizer = adam(self.generator, rate, betas=betas)
        self.judge_optimizer = adam(self.judge, rate, betas=betas)

        # Every row's stitch: the row it leads to (-1: none), its action and reward. And how often
        # the mended data holds a row, summed up: the n transitions as they were, the n stitches.
        self.register_buffer("leads_to", torch.full((n,), -1, device=device))
        self.register_buffer("a_hat", torch.zeros(n, A, device=device))
        self.register_buffer("r_hat", torch.zeros(n, 1, device=device))
        self.register_buffer("held", torch.arange(1, 2 * n + 1, device=device).clamp(max=n))
        self.register_buffer("found", torch.zeros(3, device=device))  # what is logged of it

    def phase(self, step: int):
        """The update to do at this step, each a CUDA graph: the models', then the policy's. Between
        the two, once and outside of any graph, the data is mended."""
        if step <= self.args.model_steps:
            return self.update_models
        if step == self.args.model_steps + 1:
            self.stitch()
        if self.args.learner == "bc":
            return self.update_bc
        return self.update_td3_bc if step % 2 == 0 else self.update_q

    # The models.

    def update_models(self) -> dict[str, torch.Tensor]:
        """One step of V and of all models. Returns tensors, never synchronises."""
        size, device, (s, a, r, s_next, d) = self.args.batch_size, self.last.device, self.data
        i = torch.randint(len(s), (size,), device=device)
        v_loss = self.v_loss(s[i], r[i], s_next[i], d[i])

        # Every member of the ensemble has a batch of its own; the first is the others', too.
        i = torch.randint(len(self.recorded), (self.args.ensemble, size), device=device)
        i = self.recorded[i]  # (N, B)
        nll, y = self.nll(s[i], s_next[i]), self.joined(s[i[0]], s_next[i[0]], a[i[0]])
        mse, kl = self.inverse_losses(y)

        # No two of them share a parameter: the sum's gradients are the losses' own.
        minimise(self.optimizer, v_loss + nll + mse + self.args.kl_weight * kl)
        self.follow(self.v_target, self.v)
        losses = {"v": v_loss, "nll": nll / len(self.dynamics), "inverse": mse, "kl": kl}
        losses |= self.update_reward(y, (r[i[0]] - self.r_mean) / self.r_std)
        return {f"losses/{name}": loss for name, loss in losses.items()}

    def joined(self, s, s_next, *a):
        """What models see of a transition, (B, 2 S + A): s, the way to s', and the action or z."""
        return torch.cat([s, (s_next - s) / self.x_std, *a], dim=-1)

    def v_loss(self, s, r, s_next, d):
        # d is 1 at a terminal only: a time limit ends the episode, not the future.
        with torch.no_grad():
            y = r + self.args.gamma * (1 - d) * self.v_target(s_next)
        return F.mse_loss(self.v(s), y)

    def log_p(self, s, s_next):
        """log p_i(s'|s) of states (N, B, S) or (B, S), one or k successors each (B, k, S): (N, B)
        or (N, B, k), in nats; the way to s' is in units of its spread, which cancels in ratios."""
        s_i = s.expand(len(self.dynamics), *s.shape[-2:])
        mu, log_sigma = torch.stack([p(x) for p, x in zip(self.dynamics, s_i)]).chunk(2, dim=-1)
        log_sigma = -5 + 3 * (torch.tanh(log_sigma) + 1)  # (N, B, S), in [-5, 1]
        if s_next.dim() > s.dim():
            s, mu, log_sigma = s[:, None], mu[:, :, None], log_sigma[:, :, None]
        z = ((s_next - s) / self.x_std - mu) / log_sigma.exp()
        return (-0.5 * z.square() - log_sigma - 0.5 * math.log(2 * math.pi)).sum(-1)

    def nll(self, s, s_next):
        """The members' sum, per dimension."""
        return -self.log_p(s, s_next).mean(1).sum() / s.shape[-1]

    def inverse(self, s, s_next):
        """The action that leads from s to s': the decoder's at the prior's mode, z = 0."""
        z = s.new_zeros(len(s), self.args.latent_dim)
        return torch.tanh(self.decoder(self.joined(s, s_next, z)))

    def inverse_losses(self, y):
        """Reconstruction and KL divergence, both per action dimension."""
        x, a = y.split([2 * len(self.x_std), self.a_hat.shape[1]], dim=-1)
        mu, log_sigma = self.encoder(y).chunk(2, dim=-1)  # (B, Z) each
        log_sigma = log_sigma.clamp(-5, 2)
        z = mu + log_sigma.exp() * torch.randn_like(mu)
        kl = 0.5 * (mu.square() + (2 * log_sigma).exp() - 1) - log_sigma
        a_hat = torch.tanh(self.decoder(torch.cat([x, z], dim=-1)))
        return F.mse_loss(a_hat, a), kl.sum(-1).mean() / a.shape[-1]

    def reward(self, y):
        """A sample of the standardised reward (B, 1); without ε it is a regression's."""
        eps = torch.randn_like(y[:, :1]) * (self.args.reward_model == "wgan")
        return self.generator(torch.cat([y, eps], dim=-1))

    def update_reward(self, y, r):
        if self.args.reward_model == "mlp":
            minimise(self.generator_optimizer, loss := F.mse_loss(self.reward(y), r))
            return {"reward": loss}

        # C tells samples from rewards. On the way between them no slope may exceed 1; lower ones
        # are free, or C could not turn round where samples have run past the data.
        C = lambda r: self.judge(torch.cat([y, r], dim=-1))  # noqa: E731
        for _ in range(self.args.judge_steps):
            r_hat = self.reward(y).detach()  # (B, 1)
            between = torch.lerp(r, r_hat, torch.rand_like(r)).requires_grad_(True)
            (slope,) = torch.autograd.grad(C(between).sum(), between, create_graph=True)
            penalty, gap = F.relu(slope.abs() - 1).square().mean(), (C(r) - C(r_hat)).mean()
            minimise(self.judge_optimizer, self.args.gradient_penalty * penalty - gap)
        self.judge.requires_grad_(False)  # the gradient passes through C, it stops at G
        minimise(self.generator_optimizer, -C(self.reward(y)).mean())
        self.judge.requires_grad_(True)
        return {"wasserstein": gap, "penalty": penalty}

    @torch.no_grad()
    def follow(self, target, online):
        targets, onlines = list(target.parameters()), list(online.parameters())
        torch._foreach_lerp_(targets, onlines, self.args.tau)

    # The data, mended.

    def candidates(self, i):
        """Of transitions i (B,): the k states ŝ of other episodes nearest to s', as rows j (B, k);
        whether each can be reached from s; and what it gains, V(ŝ) - V(s')."""
        (s, _, _, s_next, d), states = (column[i] for column in self.data), self.data[0]
        exact = "donot_use_mm_for_euclid_dist"  # a matrix product may be in bfloat16
        distance, episodes = torch.cdist(s_next, states, compute_mode=exact), self.raw["episodes"]
        distance.masked_fill_(episodes[i][:, None] == episodes, math.inf)  # (B, n)
        distance, j = distance.topk(min(self.args.neighbours, len(states)), largest=False)
        ok = distance.isfinite() & self.raw["recorded"][i][:, None]  # (B, k)

        # The candidate must convince every member, the successor has the mean of them.
        if self.args.reachability:
            log_p = self.log_p(s, s_next).logsumexp(0) - math.log(len(self.dynamics))  # (B,)
            ok &= self.log_p(s, states[j]).amin(0) > log_p[:, None]
        return j, ok, (self.v(states[j]) - ((1 - d) * self.v(s_next))[:, None])[..., 0]

    @torch.no_grad()
    def stitch(self):
        """Every row's stitch; the episodes that come of them; those that take another's place."""
        s, n = self.data[0], len(self.last)
        wide = n + self.args.ensemble * self.args.neighbours * s.shape[1]
        for i in torch.arange(n, device=s.device).split(max(1, 2**25 // wide)):  # 128 MB at once
            j, ok, gain = self.candidates(i)
            gain, best = gain.masked_fill(~ok, 0).max(1, keepdim=True)
            self.leads_to[i] = torch.where(gain > 0, j.gather(1, best), -1)[:, 0]
        s_hat = s[self.leads_to]
        self.a_hat.copy_(self.inverse(s, s_hat))
        r_hat = self.reward(self.joined(s, s_hat, self.a_hat))
        self.r_hat.copy_(self.r_mean + self.r_std * r_hat)

        (old, R), (new, R_hat) = self.walk(stitches=False), self.walk()
        better = R_hat > R + self.args.min_gain * R.abs()  # (E,)
        kept = old if self.args.keep_originals else old[:, ~better]
        rows = torch.cat([kept, new[:, better]], dim=1)  # (T, E'), -1 after an episode's end
        self.held.copy_(rows[rows >= 0].bincount(minlength=2 * n).cumsum(0))
        share, gain = 1 - self.held[n - 1] / self.held[-1], ((R_hat - R) * better).mean()
        self.found.copy_(torch.stack([better.float().mean(), share, gain]))
        replaced = f"{better.sum():,} of {len(R):,} episodes replaced"
        print(f"{replaced}, {share:.1%} of transitions stitched")
        if self.args.write_stitched:
            self.write(rows.T)

    def walk(self, stitches: bool = True):
        """Every episode from its first state on, along its stitches or not: rows (T, E), those of
        stitches raised by n, -1 after the end; and R (E,)."""
        n, last = len(self.last), self.last.nonzero()[:, 0]  # (E,), rows
        at = torch.cat([last.new_zeros(1), last[:-1] + 1])
        T, rows, R = (last - at).max() + 1, [], torch.zeros_like(at, dtype=self.r_hat.dtype)
        runs = torch.ones_like(at, dtype=torch.bool)
        for t in range(T):
            hops = (self.leads_to[at] >= 0) & stitches
            ends = (~hops & self.last[at]) | (t == T - 1)
            _, _, r, s_next, d = self.picked(row := at + n * hops, self.data)
            rest = ends[:, None] * (1 - d) * self.v(s_next)  # where only time ended the episode
            R += runs * self.args.gamma**t * (r + self.args.gamma * rest)[:, 0]
            rows.append(torch.where(runs, row, -1))
            runs, at = runs & ~ends, torch.where(hops, self.leads_to[at], (at + 1) % n)
        return torch.stack(rows), R

    def picked(self, row, columns):
        """Transitions of the mended data, by row, as they were or stitched: s, a, r, s', d."""
        hops, i = (row >= len(self.last))[:, None], row % len(self.last)
        s, a, r, s_next, d = (column[i] for column in columns)
        a, r = torch.where(hops, self.a_hat[i], a), torch.where(hops, self.r_hat[i], r)
        return s, a, r, torch.where(hops, columns[0][self.leads_to[i]], s_next), d * ~hops

    def write(self, rows):
        """The mended data, episodes (E', T), as a file for any other learner."""
        keys = "observations actions rewards next_observations terminals".split()
        ends = torch.zeros_like(row := rows[rows >= 0])
        ends[(rows >= 0).sum(1).cumsum(0) - 1] = 1
        found = dict(zip(keys, self.picked(row, [self.raw[key] for key in keys])))
        found["timeouts"] = ends[:, None] - found["terminals"]
        found["actions"] = self.policy.scaling.action(found["actions"], found["observations"])
        if len(self.recorded) < len(self.last):  # then a successor is the next row, or unknown
            del found["next_observations"]
        about = zip(("action_low", "action_high"), self.task["bounds"])
        scores = zip(("ref_min_score", "ref_max_score"), self.task["scores"] or ())
        with h5py.File(self.args.write_stitched, "w") as file:
            for key, column in found.items():
                file.create_dataset(key, data=column.numpy(force=True), compression="gzip")
            file.attrs.update(env_id=self.task["env"], **dict(about), **dict(scores))

    # The policy.

    def sample(self):
        """A batch of the mended data: s (B, S), a (B, A), r (B, 1), s' (B, S), d (B, 1)."""
        u = torch.rand(self.args.batch_size, device=self.held.device) * self.held[-1]
        row = torch.searchsorted(self.held, u.long().clamp(max=self.held[-1] - 1), right=True)
        return self.picked(row, self.data)

    def update_bc(self) -> dict[str, torch.Tensor]:
        """Cloning."""
        s, a, *_ = self.sample()
        minimise(self.policy_optimizer, loss := F.mse_loss(self.policy(s), a))
        return {"losses/bc": loss} | self.summary()

    def summary(self):
        return dict(zip(("stitched/episodes", "stitched/transitions", "stitched/gain"), self.found))

    def update_q(self) -> dict[str, torch.Tensor]:
        """TD3+BC: a step of the critics; of the other also one of the actor and the targets."""
        return self.update_critic(*self.sample())

    def update_td3_bc(self) -> dict[str, torch.Tensor]:
        s, a, r, s_next, d = self.sample()
        metrics = self.update_critic(s, a, r, s_next, d)
        self.critic.requires_grad_(False)  # the gradient passes through Q, it stops at π
        q = self.critic[0](torch.cat([s, pi := self.policy(s)], dim=-1))
        self.critic.requires_grad_(True)
        bc = F.mse_loss(pi, a)
        loss = bc - self.args.alpha / q.detach().abs().mean() * q.mean()
        minimise(self.policy_optimizer, loss)
        self.follow(self.policy_target, self.policy)
        self.follow(self.critic_target, self.critic)
        return metrics | {"losses/bc": bc, "losses/actor": loss} | self.summary()

    def update_critic(self, s, a, r, s_next, d):
        with torch.no_grad():
            eps = (0.2 * torch.randn_like(a)).clamp(-0.5, 0.5)
            y = torch.cat([s_next, (self.policy_target(s_next) + eps).clamp(-1, 1)], dim=-1)
            y = r + self.args.gamma * (1 - d) * torch.minimum(*(q(y) for q in self.critic_target))
        q = torch.stack([q(torch.cat([s, a], dim=-1)) for q in self.critic])  # (2, B, 1)
        minimise(self.critic_optimizer, loss := (q - y).square().mean((1, 2)).sum())
        return {"losses/critic": loss, "values/q": q.mean()}

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Losses on held-out transitions, as they were."""
        keys = "actions rewards terminals recorded observations next_observations".split()
        a, r, d, recorded, *states = (data[key] for key in keys)
        s, s_next = map(self.policy.scaling.state, states)
        found = {"v": self.v_loss(s, r, s_next, d), "bc": F.mse_loss(self.policy(s), a)}
        s, s_next, a, r = (x[recorded] for x in (s, s_next, a, r))
        r_hat = self.reward(self.joined(s, s_next, a))
        found |= {"reward": F.mse_loss(r_hat, (r - self.r_mean) / self.r_std)}
        nll = self.nll(s, s_next) / self.args.ensemble
        return found | {"nll": nll, "inverse": F.mse_loss(self.inverse(s, s_next), a)}


Learner = TrajectoryStitching  # the name by which the training loop knows it

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
