"""SAC: the learner only, trained online (a first version, used to make the data sets)."""

import copy
import csv
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro


@dataclass
class Args:
    env_id: str = "Hopper-v5"
    seed: int = 0
    steps: int = 1_000_000
    batch_size: int = 256
    hidden_dim: int = 256
    learning_rate: float = 3e-4
    gamma: float = 0.99
    tau: float = 0.005
    random_steps: int = 5000
    eval_every: int = 5000
    eval_episodes: int = 10
    snapshot_every: int = 5000
    save_every: int = 50_000
    matmul_precision: str = "high"
    run_dir: str = ""
    resume: bool = False


def mlp(in_dim, hidden_dim, out_dim):
    return nn.Sequential(
        nn.Linear(in_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, hidden_dim),
        nn.ReLU(),
        nn.Linear(hidden_dim, out_dim),
    )


class Actor(nn.Module):
    def __init__(self, state_dim, action_low, action_high, hidden_dim):
        super().__init__()
        self.register_buffer("action_low", action_low)
        self.register_buffer("action_high", action_high)
        self.net = mlp(state_dim, hidden_dim, 2 * len(action_low))

    def forward(self, s):
        mu, log_std = self.net(s).chunk(2, dim=-1)
        log_std = -5 + 0.5 * (2 - -5) * (torch.tanh(log_std) + 1)
        eps = torch.randn_like(mu)
        u = mu + log_std.exp() * eps
        log_prob = -0.5 * eps**2 - log_std - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - u - F.softplus(-2 * u))
        return torch.tanh(u), log_prob.sum(-1, keepdim=True)

    @torch.no_grad()
    def act(self, observations, sample=False):
        if sample:
            a, _ = self(observations)
        else:
            a = torch.tanh(self.net(observations).chunk(2, dim=-1)[0])
        return self.action_low + 0.5 * (a + 1) * (self.action_high - self.action_low)


class TwinCritic(nn.Module):
    """Q_1 and Q_2 as one batched network: states (B, S), actions (B, A) -> values (2, B, 1)."""

    def __init__(self, state_dim, action_dim, hidden_dim):
        super().__init__()
        sizes = (state_dim + action_dim, hidden_dim, hidden_dim, 1)
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for fan_in, fan_out in zip(sizes, sizes[1:]):
            bound = fan_in**-0.5
            self.weights.append(torch.empty(2, fan_in, fan_out).uniform_(-bound, bound))
            self.biases.append(torch.empty(2, 1, fan_out).uniform_(-bound, bound))

    def forward(self, s, a):
        x = torch.cat([s, a], dim=-1).expand(2, -1, -1)  # (2, B, S + A)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1]):
            x = F.relu(torch.baddbmm(bias, x, weight))  # (2, B, H)
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])  # (2, B, 1)


class SAC:
    def __init__(self, data, low, high, args, device):
        self.data, self.args = data, args
        state_dim, action_dim = data["observations"].shape[1], data["actions"].shape[1]
        self.size = 0
        self.actor = Actor(state_dim, low, high, args.hidden_dim).to(device)
        self.critic = TwinCritic(state_dim, action_dim, args.hidden_dim).to(device)
        self.critic_target = copy.deepcopy(self.critic)
        self.log_alpha = torch.zeros((), device=device, requires_grad=True)
        self.target_entropy = -float(action_dim)
        adam = dict(lr=args.learning_rate, fused=True, capturable=device.type == "cuda")
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), **adam)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], **adam)

    def update(self):
        args = self.args
        i = torch.randint(self.size, (args.batch_size,))
        s, a, r, s_next, d = (
            self.data[k][i]
            for k in ("observations", "actions", "rewards", "next_observations", "terminals")
        )
        alpha = self.log_alpha.detach().exp()

        with torch.no_grad():
            a_next, log_prob_next = self.actor(s_next)
            q_next = self.critic_target(s_next, a_next).amin(0) - alpha * log_prob_next
            y = r + args.gamma * (1 - d) * q_next
        q = self.critic(s, a)  # (2, B, 1)
        critic_loss = (q - y).square().mean((1, 2)).sum()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        pi, log_prob = self.actor(s)
        self.critic.requires_grad_(False)
        actor_loss = (alpha * log_prob - self.critic(s, pi).amin(0)).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.critic.requires_grad_(True)

        alpha_loss = -(self.log_alpha * (log_prob.detach() + self.target_entropy).mean())
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()
        self.alpha_optimizer.step()

        with torch.no_grad():
            torch._foreach_lerp_(
                list(self.critic_target.parameters()), list(self.critic.parameters()), args.tau
            )
        return {"q": q.detach().mean(), "alpha": alpha, "critic": critic_loss.detach()}


def evaluate(actor, args):
    envs = gym.make_vec(args.env_id, args.eval_episodes, vectorization_mode="sync")
    obs, _ = envs.reset(seed=10_000 + args.seed)
    returns, done = np.zeros(args.eval_episodes), np.zeros(args.eval_episodes, bool)
    while not done.all():
        a = actor.act(torch.as_tensor(obs, dtype=torch.float32)).numpy()
        obs, r, terminated, truncated, _ = envs.step(a)
        returns += r * ~done
        done |= terminated | truncated
    envs.close()
    return returns


def main(args):
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.manual_seed(args.seed)
    run_dir = Path(args.run_dir or f"runs/sac/{args.env_id}/seed{args.seed}")
    (run_dir / "policies").mkdir(parents=True, exist_ok=True)
    (run_dir / "config.json").write_text(json.dumps(asdict(args), indent=2))
    env = gym.make(args.env_id)
    low, high = (torch.as_tensor(x) for x in (env.action_space.low, env.action_space.high))
    n, s_dim, a_dim = args.steps, env.observation_space.shape[0], len(low)
    data = dict(
        observations=torch.zeros(n, s_dim),
        actions=torch.zeros(n, a_dim),
        rewards=torch.zeros(n, 1),
        next_observations=torch.zeros(n, s_dim),
        terminals=torch.zeros(n, 1),
        timeouts=torch.zeros(n, 1),
    )
    learner = SAC(data, low, high, args, torch.device("cpu"))
    start = 0
    if args.resume and (run_dir / "checkpoint.pt").exists():
        c = torch.load(run_dir / "checkpoint.pt")
        start = c["step"]
        for k in data:
            data[k][:start] = c["data"][k]
        for k in ("actor", "critic", "critic_target"):
            getattr(learner, k).load_state_dict(c[k])
        learner.log_alpha.data.copy_(c["log_alpha"])
        for k in ("actor_optimizer", "critic_optimizer", "alpha_optimizer"):
            getattr(learner, k).load_state_dict(c[k])
        learner.size = start
    obs, _ = env.reset(seed=args.seed + start)
    env.action_space.seed(args.seed)
    began, ep_return, recent = time.time(), 0.0, []
    for step in range(start + 1, n + 1):
        i = step - 1
        if step <= args.random_steps:
            a = torch.rand(a_dim) * 2 - 1
            action = low + 0.5 * (a + 1) * (high - low)
        else:
            action = learner.actor.act(torch.as_tensor(obs, dtype=torch.float32)[None], True)[0]
        next_obs, r, terminated, truncated, _ = env.step(action.numpy())
        data["observations"][i] = torch.as_tensor(obs, dtype=torch.float32)
        data["actions"][i] = 2 * (action - low) / (high - low) - 1
        data["rewards"][i] = float(r)
        data["next_observations"][i] = torch.as_tensor(next_obs, dtype=torch.float32)
        data["terminals"][i] = float(terminated)
        data["timeouts"][i] = float(truncated and not terminated)
        learner.size = step
        obs, ep_return = next_obs, ep_return + float(r)
        if terminated or truncated:
            recent.append(ep_return)
            ep_return = 0.0
            obs, _ = env.reset()
        if step > args.random_steps:
            m = learner.update()
        if step % args.snapshot_every == 0:
            torch.save(learner.actor.state_dict(), run_dir / "policies" / f"{step:08d}.pt")
        if step % args.eval_every == 0:
            ret = evaluate(learner.actor, args)
            with open(run_dir / "eval.csv", "a") as f:
                csv.writer(f).writerow(
                    [step, round(time.time() - began, 1), ret.mean(), ret.std(), len(recent)]
                )
            sps = (step - start) / (time.time() - began)
            extra = (
                {k: round(float(v), 3) for k, v in m.items()} if step > args.random_steps else {}
            )
            print(
                step,
                round(ret.mean(), 1),
                round(ret.std(), 1),
                f"{sps:.0f}/s",
                "train",
                round(float(np.mean(recent[-20:] or [0])), 1),
                extra,
                flush=True,
            )
        if step % args.save_every == 0 or step == n:
            c = {
                k: getattr(learner, k).state_dict()
                for k in (
                    "actor",
                    "critic",
                    "critic_target",
                    "actor_optimizer",
                    "critic_optimizer",
                    "alpha_optimizer",
                )
            }
            c |= {
                "log_alpha": learner.log_alpha.detach(),
                "step": step,
                "data": {k: v[:step].clone() for k, v in data.items()},
            }
            torch.save(c, run_dir / "tmp.pt")
            (run_dir / "tmp.pt").rename(run_dir / "checkpoint.pt")


if __name__ == "__main__":
    main(tyro.cli(Args))
