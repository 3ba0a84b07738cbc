"""The figure and the table of docs/families.md: seven generative models of one and the same pair of
action distributions, data beside samples. Plain torch and matplotlib.

    python docs/figures/families.py

Every model is conditional: the state is 0 or 1, and says whether two actions are right (a larger
and a smaller mode) or all those on a ring. All take the same number of gradient steps. Written are
families.png, families.csv (every seed) and the table. It took 19 minutes on one CPU thread beside
other runs.
"""

import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro

FOLDER = Path(__file__).resolve().parent
PAGE = FOLDER.parent / "families.md"
MODES = torch.tensor([[-0.6, -0.4], [0.6, 0.4]])
SMALLER = 0.3  # share of the second mode
RADIUS, WIDTH = 0.7, 0.06  # of the ring; standard deviation of ring and modes


@dataclass
class Args:
    """Trains seven models on two distributions and draws them."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """models of each kind; the first is drawn"""
    steps: int = 4000
    """gradient steps of each model"""
    batch_size: int = 256
    """actions per gradient step"""
    hidden_dim: int = 128
    """units in each of two hidden layers"""
    samples: int = 4000
    """actions drawn from each model and state, to compare with as many of the data"""


def draw_data(s):
    """Actions (B, 2) for states (B,) of 0, two modes, or 1, a ring."""
    noise = WIDTH * torch.randn(len(s), 2)
    modes = MODES[(torch.rand(len(s)) < SMALLER).long()]
    angle = 2 * math.pi * torch.rand(len(s))
    ring = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=-1)
    return torch.where(s[:, None] > 0, ring, modes) + noise


def mlp(in_dim, hidden_dim, out_dim):
    return nn.Sequential(
        *(nn.Linear(in_dim, hidden_dim), nn.ReLU()),
        *(nn.Linear(hidden_dim, hidden_dim), nn.ReLU()),
        nn.Linear(hidden_dim, out_dim),
    )


def join(s, *parts):
    return torch.cat([F.one_hot(s, 2).float(), *parts], dim=-1)


class Gaussian(nn.Module):
    """Mean and covariance of each state, by likelihood: what can be had with one mode."""

    def __init__(self, args):
        super().__init__()
        self.net = mlp(2, args.hidden_dim, 5)

    def distribution(self, s):
        x = self.net(join(s))
        scale = torch.diag_embed(F.softplus(x[:, 2:4]) + 1e-3)
        scale = scale + F.pad(x[:, 4, None, None], (0, 1, 1, 0))  # lower triangular
        return torch.distributions.MultivariateNormal(x[:, :2], scale_tril=scale)

    def loss(self, s, a):
        return -self.distribution(s).log_prob(a).mean()

    @torch.no_grad()
    def sample(self, s):
        return self.distribution(s).sample()


class VAE(nn.Module):
    """A latent of two dimensions, the bound on the likelihood, a learnt σ of the decoder."""

    def __init__(self, args):
        super().__init__()
        self.encoder = mlp(4, args.hidden_dim, 4)
        self.decoder = mlp(4, args.hidden_dim, 2)
        self.log_sigma = nn.Parameter(torch.tensor(math.log(0.1)))

    def loss(self, s, a):
        mu, log_sigma = self.encoder(join(s, a)).chunk(2, dim=-1)
        z = mu + log_sigma.exp() * torch.randn_like(mu)
        error = (a - self.decoder(join(s, z))).square() / (2 * (2 * self.log_sigma).exp())
        kl = 0.5 * (mu.square() + (2 * log_sigma).exp() - 1) - log_sigma
        return (error + self.log_sigma + kl).sum(-1).mean()

    @torch.no_grad()
    def sample(self, s):
        mean = self.decoder(join(s, torch.randn(len(s), 2)))
        return mean + self.log_sigma.exp() * torch.randn_like(mean)


class GAN(nn.Module):
    """Noise to actions, and a discriminator that tells them from the data."""

    def __init__(self, args):
        super().__init__()
        self.generator = mlp(4, args.hidden_dim, 2)
        self.discriminator = mlp(4, args.hidden_dim, 1)
        adam = dict(lr=1e-3, betas=(0.5, 0.999))
        self.optimizer = torch.optim.Adam(self.discriminator.parameters(), **adam)

    def loss(self, s, a):
        # The discriminator's own step, then what the generator has to minimise.
        real = self.discriminator(join(s, a))
        fake = self.discriminator(join(s, self.sample(s)))
        loss = F.softplus(-real).mean() + F.softplus(fake).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        fake = self.generator(join(s, torch.randn(len(s), 2)))
        return F.softplus(-self.discriminator(join(s, fake))).mean()

    @torch.no_grad()
    def sample(self, s):
        return self.generator(join(s, torch.randn(len(s), 2)))


class Flow(nn.Module):
    """Six affine couplings (RealNVP), exact likelihood."""

    def __init__(self, args):
        super().__init__()
        self.nets = nn.ModuleList(mlp(3, args.hidden_dim, 2) for _ in range(6))

    def loss(self, s, a):
        x, log_det = a, 0.0
        for net in self.nets:
            kept, moved = x.chunk(2, dim=-1)
            shift, log_scale = net(join(s, kept)).chunk(2, dim=-1)
            log_scale = 2 * torch.tanh(log_scale)
            x = torch.cat(
                [moved * log_scale.exp() + shift, kept], dim=-1
            )  # the halves change places
            log_det = log_det + log_scale.sum(-1)
        return (0.5 * x.square().sum(-1) - log_det).mean()

    @torch.no_grad()
    def sample(self, s):
        x = torch.randn(len(s), 2)
        for net in reversed(self.nets):
            moved, kept = x.chunk(2, dim=-1)
            shift, log_scale = net(join(s, kept)).chunk(2, dim=-1)
            x = torch.cat([kept, (moved - shift) * (-2 * torch.tanh(log_scale)).exp()], dim=-1)
        return x


class Transformer(nn.Module):
    """The action as a sentence of two words, each one of 24 bins, by cross-entropy."""

    bins, dim = 24, 64

    def __init__(self, args):
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            self.dim, 4, args.hidden_dim, dropout=0.0, batch_first=True, norm_first=True
        )
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.words = nn.Embedding(2 + self.bins, self.dim)  # two states, then the bins
        self.place = nn.Parameter(torch.zeros(2, self.dim))
        self.head = nn.Linear(self.dim, self.bins)

    def logits(self, words):
        """words (B, T) so far -> logits (B, T, bins) of the word after each."""
        x = self.words(words) + self.place[: words.shape[1]]  # (B, T, D)
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        return self.head(self.body(x, mask=mask, is_causal=True))

    def loss(self, s, a):
        bins = ((a + 1) / 2 * self.bins).long().clamp(0, self.bins - 1)  # (B, 2)
        logits = self.logits(torch.stack([s, 2 + bins[:, 0]], dim=-1))  # (B, 2, bins)
        return F.cross_entropy(logits.flatten(0, 1), bins.flatten())

    @torch.no_grad()
    def sample(self, s):
        words = s[:, None]
        for _ in range(2):
            word = torch.distributions.Categorical(logits=self.logits(words)[:, -1]).sample()
            words = torch.cat([words, 2 + word[:, None]], dim=-1)
        place = words[:, 1:] - 2 + torch.rand(len(s), 2)  # anywhere in the bin
        return place / self.bins * 2 - 1


class Diffusion(nn.Module):
    """Twenty steps of denoising, the variance-preserving schedule of algorithms/diffusion_ql.py."""

    def __init__(self, args, steps=20):
        super().__init__()
        self.net, self.steps = mlp(5, args.hidden_dim, 2), steps
        t = torch.arange(1, steps + 1)
        self.alpha = torch.exp(-0.1 / steps - 0.5 * (10 - 0.1) * (2 * t - 1) / steps**2)
        self.alpha_bar = self.alpha.cumprod(0)

    def noise(self, s, x, t):
        return self.net(join(s, x, t[:, None] / self.steps))

    def loss(self, s, a):
        t, eps = torch.randint(self.steps, (len(s),)), torch.randn_like(a)
        alpha_bar = self.alpha_bar[t, None]
        return F.mse_loss(
            self.noise(s, alpha_bar.sqrt() * a + (1 - alpha_bar).sqrt() * eps, t), eps
        )

    @torch.no_grad()
    def sample(self, s):
        x = torch.randn(len(s), 2)
        for t in reversed(range(self.steps)):
            eps = self.noise(s, x, torch.full_like(s, t))
            alpha, alpha_bar = self.alpha[t], self.alpha_bar[t]
            before = self.alpha_bar[t - 1] if t else torch.ones(())
            clean = (x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
            mean = before.sqrt() * (1 - alpha) * clean + alpha.sqrt() * (1 - before) * x
            variance = (1 - alpha) * (1 - before) / (1 - alpha_bar)
            x = mean / (1 - alpha_bar) + variance.sqrt() * torch.randn_like(x)
        return x


class FlowMatching(nn.Module):
    """A velocity that carries noise to actions along straight lines, followed in ten steps."""

    def __init__(self, args, steps=10):
        super().__init__()
        self.net, self.steps = mlp(5, args.hidden_dim, 2), steps

    def loss(self, s, a):
        x_0, t = torch.randn_like(a), torch.rand(len(s), 1)
        return F.mse_loss(self.net(join(s, (1 - t) * x_0 + t * a, t)), a - x_0)

    @torch.no_grad()
    def sample(self, s):
        x = torch.randn(len(s), 2)
        for k in range(self.steps):
            x = x + self.net(join(s, x, torch.full_like(x[:, :1], k / self.steps))) / self.steps
        return x


MODELS = {
    "Gaussian": Gaussian,
    "VAE": VAE,
    "GAN": GAN,
    "normalizing flow": Flow,
    "transformer over bins": Transformer,
    "diffusion, 20 steps": Diffusion,
    "flow matching, 10 steps": FlowMatching,
}


def train(kind, args, seed):
    torch.manual_seed(seed)
    model = kind(args)
    own = model.generator if isinstance(model, GAN) else model
    betas = (0.5, 0.999) if isinstance(model, GAN) else (0.9, 0.999)
    optimizer = torch.optim.Adam(own.parameters(), lr=1e-3, betas=betas)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    for _ in range(args.steps):
        s = torch.randint(2, (args.batch_size,))
        optimizer.zero_grad()
        model.loss(s, draw_data(s)).backward()
        optimizer.step()
        decay.step()
    return model


def energy_distance(x, y):
    """2 E|x - y| - E|x - x'| - E|y - y'|, 0 only for equal distributions; unbiased."""
    n, m = len(x), len(y)
    within = torch.cdist(x, x).sum() / (n * (n - 1)) + torch.cdist(y, y).sum() / (m * (m - 1))
    return float(2 * torch.cdist(x, y).mean() - within)


def outside(a, state):
    """Share of actions four standard deviations or more away from all that is right."""
    away = torch.cdist(a, MODES).amin(1) if state == 0 else (a.norm(dim=1) - RADIUS).abs()
    return float((away > 4 * WIDTH).float().mean())


def measure(sample, args, rng):
    """A row of the table, and the samples of both states."""
    torch.manual_seed(rng)
    row, drawn = {}, []
    for state, name in enumerate(("two modes", "ring")):
        s = torch.full((args.samples,), state)
        a, fresh = sample(s), draw_data(s)
        row[f"{name}: distance"] = 1000 * energy_distance(a, fresh)
        row[f"{name}: outside"] = 100 * outside(a, state)
        if state == 0:
            nearest = torch.cdist(a, MODES)
            near = nearest.amin(1) < 4 * WIDTH
            share = (nearest.argmin(1)[near] == 1).float().mean() if near.any() else torch.nan
            row[f"{name}: smaller mode"] = 100 * float(share)
        drawn.append(a)
    return row, drawn


def insert(path, name, text):
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    head, rest = path.read_text().split(begin)
    path.write_text(head + begin + text + end + rest.split(end)[1])


def table(rows):
    columns = list(rows[0])[2:]
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "--:|" * len(columns)]
    for name in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for column in columns:
            values = [row[column] for row in rows if row["model"] == name]
            mean, low, high = np.mean(values), min(values), max(values)
            cells.append(f"{mean:.1f} ({low:.1f} to {high:.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(args: Args) -> None:
    torch.set_num_threads(1)
    rows, pictures = [], {}
    for name, kind in {"the data itself": None, **MODELS}.items():
        for seed in args.seeds:
            began = time.time()
            sample = train(kind, args, seed).sample if kind else draw_data
            row, drawn = measure(sample, args, seed)
            rows.append({"model": name, "seed": seed, **row})
            pictures.setdefault(name, drawn)
            print(f"{name}, seed {seed}, {time.time() - began:.0f} s:", end=" ")
            print({key: round(value, 1) for key, value in row.items()}, flush=True)

    figure, axes = plt.subplots(4, 4, figsize=(10, 10.6), layout="constrained")
    for i, (name, drawn) in enumerate(pictures.items()):
        for state, a in enumerate(drawn):
            axis = axes[2 * (i // 4) + state, i % 4]
            axis.scatter(*a[:1500].T, s=1.5, alpha=0.5, lw=0, color="k" if i == 0 else f"C{i - 1}")
            axis.set(xlim=(-1.1, 1.1), ylim=(-1.1, 1.1), xticks=[], yticks=[], aspect="equal")
            if state == 0:
                axis.set_title(name, fontsize=10)
    figure.savefig(FOLDER / "families.png", dpi=80)

    with open(FOLDER / "families.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {k: round(v, 2) if v == v and not isinstance(v, str) else v for k, v in row.items()}
            for row in rows
        )
    insert(PAGE, "table", table(rows))
    print(f"families.png has {(FOLDER / 'families.png').stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(tyro.cli(Args))
