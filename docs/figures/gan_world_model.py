"""The figures of docs/algorithms/gan_world_model.md: how fast the world model's errors grow, and
whether a penalty knows where they are. Needs matplotlib; a few minutes on one CPU thread. The
numbers, of every seed, are written to a CSV file beside the figures.

    python docs/figures/gan_world_model.py --dataset pendulum-medium-replay
    python docs/figures/gan_world_model.py --dataset hopper-medium-replay
"""

import csv
import importlib.util
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import torch
import tyro
from matplotlib.ticker import LogLocator, NullFormatter

DOCS = Path(__file__).resolve().parents[1]
FOLDER = DOCS / "algorithms" / "gan_world_model"
HORIZON = 20


@dataclass
class Args:
    """Trains world models with and without their adversary and draws their errors."""

    dataset: str = "pendulum-medium-replay"  # a Pendulum or Hopper data set
    model_steps: int = 3000  # gradient steps of every world model
    model_dim: int = 64  # units in each of its hidden layers, and of the discriminator's
    batch_size: int = 256  # transitions per gradient step and member
    seeds: tuple[int, ...] = (0, 1, 2)  # one world model of each kind per seed
    held_out: float = 0.2  # share of the episodes that no model sees
    rows: int = 2000  # held-out transitions and windows that are drawn


def load_algorithm():
    path = DOCS.parent / "algorithms" / "gan_world_model.py"
    spec = importlib.util.spec_from_file_location("gan_world_model", path)
    sys.modules["gan_world_model"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["gan_world_model"])
    return sys.modules["gan_world_model"]


def train(module, data, task, args: Args, seed: int, weight: float):
    sizes = dict(model_dim=args.model_dim, model_layers=3, discriminator_dim=args.model_dim)
    flags = dict(dataset=args.dataset, batch_size=args.batch_size, adversarial_weight=weight)
    torch.manual_seed(seed)
    learner = module.Learner(data, task, module.Args(**sizes, **flags, device="cpu"))
    for _ in range(args.model_steps):
        learner.update_model()
    return learner


@torch.no_grad()
def open_loop(learner, s, a):
    """Root mean squared error after k = 1 ... K steps of every member's mean, in the data's
    standard deviations. s (B, K + 1, S) are the true states, a (B, K, A) the actions taken."""
    s = learner.policy.scaling.state(s).reshape(s.shape)
    imagined, errors = s[None, :, 0].expand(learner.args.ensemble, -1, -1), []  # (N, B, S)
    for k in range(a.shape[1]):
        mu, _ = learner.model(imagined, a[:, k].expand(len(imagined), -1, -1))
        imagined, _ = learner.model.follow(imagined, mu)
        errors.append((imagined - s[:, k + 1]).square().mean().sqrt().item())
    return errors


def windows(data, rows, number, rng):
    """States (B, K + 1, S) and actions (B, K, A) of stretches within held-out episodes."""
    starts = rows[:-HORIZON]
    starts = starts[data["episodes"][starts] == data["episodes"][rows[HORIZON:]]]
    starts = rng.choice(starts, min(number, len(starts)), replace=False)
    i = starts[:, None] + np.arange(HORIZON)  # (B, K)
    s = np.concatenate([data["observations"][i], data["next_observations"][i[:, -1:]]], axis=1)
    return torch.as_tensor(s), torch.as_tensor(data["actions"][i])


def simulate(env_id, s, a, low, high):
    """What the environment itself answers at states s (B, S) and scaled actions a (B, A)."""
    env = gym.make(env_id).unwrapped
    env.reset(seed=0)
    s_next, r = np.zeros_like(s), np.zeros((len(s), 1), np.float32)
    for row in range(len(s)):
        if env_id.startswith("Pendulum"):
            env.state = np.array([np.arctan2(s[row, 1], s[row, 0]), s[row, 2]], dtype=np.float64)
        else:  # MuJoCo's v5 observations lack the position along the floor
            free = env.model.nq - 1
            env.set_state(np.append(0, s[row, :free]), s[row, free:])
        s_next[row], r[row], *_ = env.step(low + 0.5 * (a[row] + 1) * (high - low))
    env.close()
    return torch.as_tensor(s_next), torch.as_tensor(r)


def rank_correlation(x, y):
    x, y = (np.argsort(np.argsort(values)) for values in (x, y))
    return np.corrcoef(x, y)[0, 1]


def main(args: Args) -> None:
    torch.set_num_threads(1)
    module, rng = load_algorithm(), np.random.default_rng(0)
    arrays, task = module.load_dataset(args.dataset)
    episodes = arrays["episodes"].max() + 1
    chosen = rng.permutation(episodes)[: int(args.held_out * episodes)]
    unseen = np.isin(arrays["episodes"], chosen)
    held_out = np.flatnonzero(unseen & arrays["recorded"])
    data = {key: torch.as_tensor(array[~unseen]) for key, array in arrays.items()}
    s_true, a_true = windows(arrays, held_out, args.rows, rng)
    table = [("what", "kind", "seed", "of", "value")]

    # Errors of open-loop prediction.
    default = module.Args.adversarial_weight
    kinds = {0.0: "likelihood alone", default: f"and adversary, weight {default:g}"}
    figure, axes = plt.subplots(figsize=(5, 3.2))
    for weight, label in kinds.items():
        learners = [train(module, data, task, args, seed, weight) for seed in args.seeds]
        errors = np.array([open_loop(learner, s_true, a_true) for learner in learners])
        steps = np.arange(1, HORIZON + 1)
        for seed, row in zip(args.seeds, errors.tolist()):
            table += [
                ("open loop error", weight, seed, f"{k} steps", x) for k, x in zip(steps, row)
            ]
        (line,) = axes.plot(steps, errors.mean(0), label=label)
        axes.fill_between(steps, errors.min(0), errors.max(0), alpha=0.2, color=line.get_color())
        print(f"{label}: after 1, 5, 20 steps {errors.mean(0)[[0, 4, 19]].round(4)}")
    axes.set(xlabel="steps imagined", ylabel="error in standard deviations")
    axes.set(title=f"{args.dataset}: open loop, held-out episodes", xticks=[1, 5, 10, 15, 20])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save(figure, args, "open_loop")

    # Penalties against the error that they stand for: at the logged actions, and at uniform ones,
    # whose successors the simulator knows.
    i = rng.choice(held_out, min(args.rows, len(held_out)), replace=False)
    s, logged = arrays["observations"][i], arrays["actions"][i]
    low, high = np.array(task["bounds"])
    uniform = rng.uniform(-1, 1, logged.shape).astype(np.float32)
    names = {"discriminator": "-log D", "aleatoric": "largest σ", "moan": "MOAN's"}
    names |= {"disagreement": "disagreement"}
    figure, panels = plt.subplots(1, 4, figsize=(13, 3.2), sharey=True, layout="constrained")
    found = {kind: {"all": [], "logged": [], "uniform": []} for kind in names}
    for seed, learner in zip(args.seeds, learners):  # those of the default weight
        drawn = learner is learners[0]
        errors, doubts = [], {kind: [] for kind in names}
        for action in (logged, uniform):
            s_next, r = simulate(task["env_id"], s, action, low, high)
            s_n, s_next = map(learner.policy.scaling.state, (torch.as_tensor(s), s_next))
            with torch.no_grad():
                mu, _ = learner.model(s_n, torch.as_tensor(action))
            x = learner.model.standardise(s_n, r, s_next)
            errors.append((mu.mean(0) - x).norm(dim=1).numpy())
            for kind in names:
                learner.args = replace(learner.args, penalty=kind)
                doubts[kind].append(learner.imagine(s_n, torch.as_tensor(action))[2][:, 0].numpy())
        for kind, panel in zip(names, panels):
            pairs = {
                "logged": (doubts[kind][0], errors[0]),
                "uniform": (doubts[kind][1], errors[1]),
            }
            for name, (doubt, error) in pairs.items():
                found[kind][name].append(rank_correlation(doubt, error))
                if drawn:
                    panel.scatter(doubt[:600], error[:600], s=3, alpha=0.5, label=f"{name} actions")
            both = np.concatenate(doubts[kind]), np.concatenate(errors)
            found[kind]["all"].append(rank_correlation(*both))
            last = [(of, values[-1]) for of, values in found[kind].items()]
            table += [("rank correlation", kind, seed, of, value) for of, value in last]
    for (kind, label), panel in zip(names.items(), panels):
        mean = {name: np.mean(values) for name, values in found[kind].items()}
        print(kind, {name: round(float(value), 2) for name, value in mean.items()})
        panel.set(xscale="log", yscale="log", xlabel=label)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))  # may span less than a decade
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"rank correlation {mean['all']:.2f}", fontsize=10)
    panels[0].set_ylabel("true error of the mean prediction")
    panels[0].legend(frameon=False, fontsize=8, markerscale=3, loc="lower right")
    figure.suptitle(f"{args.dataset}: penalty against true error", fontsize=11)
    save(figure, args, "penalty")
    with open(FOLDER / f"{Path(args.dataset).stem}.csv", "w", newline="") as file:
        csv.writer(file).writerows(table)


def save(figure, args: Args, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{Path(args.dataset).stem}_{name}.png"
    figure.savefig(path, dpi=110, bbox_inches="tight")
    print(path, f"{path.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main(tyro.cli(Args))
