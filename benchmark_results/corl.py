"""Runs one of CORL's own files, unchanged, on a data set of this project.

    git clone https://github.com/tinkoff-ai/CORL
    python benchmark_results/corl.py --file CORL/algorithms/offline/iql.py --steps 100000

Nothing of CORL is kept here and nothing of what it needs is installed: d4rl, gym, wandb and
pyrallis are replaced by a few lines each that give it our arrays, a Gymnasium environment and a
place to log to. CORL's own code normalises, trains and evaluates, with its own defaults. It trains
on all episodes; our files keep one in twenty for validation. Writes
runs/corl_<file>/<data set>/seed<k>/eval.csv beside this file, for report.py, and a config.json with
CORL's settings and both commits; with --speed it only counts steps per second.
"""

import csv
import importlib.util
import json
import subprocess
import sys
import time
import types
from dataclasses import asdict, dataclass
from pathlib import Path

import gymnasium
import numpy as np
import torch
import tyro
from run import FOLDER, commit, load, task_name

bc = load("bc")  # its data set block reads what all files read

WARM_UP = 20  # steps that --speed does not count


@dataclass
class Args:
    """One run of a CORL file on our data."""

    file: Path  # CORL/algorithms/offline/any_percent_bc.py, td3_bc.py, iql.py, cql.py or dt.py
    dataset: str = "hopper-medium-replay"  # a data set as in algorithms/
    seed: int = 0  # CORL's seed
    steps: int = 100_000  # gradient steps
    eval_every: int = 5000  # gradient steps between evaluations
    override: tuple[str, ...] = ()  # fields of its TrainConfig: batch_size=64 target_returns=36,18
    device: str = "cpu"  # cpu or cuda
    threads: int = 1  # threads of PyTorch
    matmul_precision: str = "high"  # as in algorithms/
    speed: bool = False  # time the steps without a single evaluation, write nothing
    run_dir: str = ""  # where eval.csv goes; empty: runs/corl_<file>/<data set>/seed<k>


def references(task: dict) -> tuple[float, float]:
    """Returns that score 0 and 100: the data set's, or D4RL's of the environment."""
    return task["scores"] or bc.SCORES[task["env_id"].rsplit("-v", 1)[0]]


def unscaled(action: np.ndarray, task: dict) -> np.ndarray:
    """An action of [-1, 1] in the environment's bounds."""
    low, high = np.float32(task["bounds"])
    return low + (np.clip(action, -1, 1) + 1) / 2 * (high - low)


def write_config(run_dir: Path, args, task: dict, code: Path, **more) -> None:
    """What it takes to run it again: flags, task, versions, our commit and that of the code."""
    git = ["git", "-C", str(code), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    about = {"args": asdict(args), "task": task, "python": sys.version, "threads": args.threads}
    about |= {"commit": commit(), "commit_of_its_code": head or "unknown"} | more
    about |= {module.__name__: module.__version__ for module in (torch, np, gymnasium)}
    (run_dir / "config.json").write_text(json.dumps(about, indent=2, default=str))


class OldEnv(gymnasium.Wrapper):
    """A Gymnasium environment with the methods of gym 0.21 and of d4rl."""

    def __init__(self, data: dict[str, np.ndarray], task: dict):
        super().__init__(bc.make_env(task))
        self.data, self.task, self.first_seed = data, task, None

    def seed(self, seed):
        self.first_seed = seed

    def reset(self):
        observation, _ = self.env.reset(seed=self.first_seed)
        self.first_seed = None
        return observation

    def step(self, action):  # CORL's policies act in [-1, 1]
        observation, reward, terminated, truncated, info = self.env.step(
            unscaled(action, self.task)
        )
        return observation, reward, terminated or truncated, info

    def get_normalized_score(self, returns):
        low, high = references(self.task)
        return (returns - low) / (high - low)

    def get_dataset(self):
        data, terminals = self.data, self.data["terminals"][:, 0] > 0
        ends = np.diff(data["episodes"], append=-1) != 0
        return {
            "observations": data["observations"],
            "next_observations": data["next_observations"],
            "actions": data["actions"],
            "rewards": data["rewards"][:, 0],
            "terminals": terminals,
            "timeouts": ends & ~terminals,
        }


class Transform(OldEnv):
    """gym.wrappers.TransformObservation and TransformReward."""

    def __init__(self, env, function, rewards=False):
        self.inner, self.function, self.rewards = env, function, rewards
        self.observation_space, self.action_space = env.observation_space, env.action_space

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def seed(self, seed):
        self.inner.seed(seed)

    def reset(self):
        s = self.inner.reset()
        return s if self.rewards else self.function(s)

    def step(self, action):
        s, r, done, info = self.inner.step(action)
        s, r = (s, self.function(r)) if self.rewards else (self.function(s), r)
        return s, r, done, info

    def get_normalized_score(self, returns):
        return self.inner.get_normalized_score(returns)


class Log:
    """wandb: counts the steps, keeps the evaluations."""

    def __init__(self, args: Args, bounds: tuple[float, float], path: Path | None):
        self.args, self.references, self.path = args, bounds, path
        self.began, self.rows, self.steps = time.time(), [], 0
        self.run = types.SimpleNamespace(save=lambda: None)

    def init(self, **_):
        self.began = time.time()

    def log(self, values: dict, step: int):
        scores = [v for k, v in values.items() if k.endswith(("lized_score", "score_mean"))]
        if not scores:
            self.steps += 1
            if self.args.speed and self.steps == WARM_UP:
                self.began = time.time()
            return
        if self.path is None or self.steps < 2:  # --speed; or DT's policy before it has learnt
            return
        low, high = self.references
        row = {"step": self.steps, "seconds": round(time.time() - self.began, 1)}
        row |= {"return_mean": low + scores[0] / 100 * (high - low), "score": scores[0]}
        if self.rows and self.rows[-1]["step"] == self.steps:
            return  # DT's second target return
        self.rows.append(row)
        print(f"step {self.steps:>9,}  return_mean {row['return_mean']:.4g}  score {scores[0]:.4g}")
        with open(self.path, "w", newline="") as file:
            table = csv.DictWriter(file, list(row))
            table.writeheader()
            table.writerows(self.rows)


def stand_ins(data: dict, task: dict, log: Log) -> dict[str, types.ModuleType]:
    """The modules that CORL imports and that are not needed to train."""
    names = ("d4rl", "gym", "wandb", "pyrallis")
    d4rl, gym, wandb, pyrallis = modules = [types.ModuleType(name) for name in names]
    d4rl.qlearning_dataset = lambda env: env.get_dataset()
    gym.Env, gym.make = object, lambda _: OldEnv(data, task)
    gym.wrappers = types.SimpleNamespace(
        TransformObservation=Transform,
        TransformReward=lambda env, function: Transform(env, function, rewards=True),
    )
    wandb.init, wandb.log, wandb.run = log.init, log.log, log.run
    pyrallis.wrap = lambda: lambda train: train
    return dict(zip(names, modules))


def main(args: Args) -> float:
    """Trains; returns gradient steps per second, evaluations left out with --speed."""
    if not args.file.is_file():
        raise SystemExit(f"--file {args.file}: not there; fetch github.com/tinkoff-ai/CORL first.")
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    data, task = bc.load_dataset(args.dataset)
    name = "bc" if args.file.stem == "any_percent_bc" else args.file.stem
    run_dir = Path(
        args.run_dir or FOLDER / f"runs/corl_{name}/{task_name(args.dataset)}/seed{args.seed}"
    )
    if not args.speed:
        if (run_dir / "eval.csv").exists():
            raise SystemExit(f"{run_dir} holds a run: --run-dir goes elsewhere.")
        run_dir.mkdir(parents=True, exist_ok=True)
    log = Log(args, references(task), None if args.speed else run_dir / "eval.csv")
    sys.modules |= stand_ins(data, task, log)
    spec = importlib.util.spec_from_file_location(f"corl_{name}", args.file)
    sys.modules[spec.name] = corl = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(corl)

    # CORL's names for our flags: the transformer has others than the rest.
    config, fields = corl.TrainConfig(), corl.TrainConfig.__dataclass_fields__
    never = 10 * args.steps if args.speed else args.eval_every
    chosen = {"device": args.device, "seed": args.seed, "train_seed": args.seed}
    chosen |= {"max_timesteps": args.steps, "update_steps": args.steps}
    chosen |= {"eval_freq": never, "eval_every": never, "num_workers": 0}
    chosen |= dict(pair.split("=", 1) for pair in args.override)
    for key, value in chosen.items():
        if key in fields:
            old = getattr(config, key)
            if isinstance(old, tuple):  # target_returns=3600,1800
                value = tuple(map(float, value.split(",")))
            setattr(config, key, value if isinstance(value, type(old)) else type(old)(value))
    if not args.speed:
        write_config(run_dir, args, task, args.file.parent, settings=asdict(config))
    if args.speed and hasattr(corl, "eval_rollout"):  # evaluates at its step 0, come what may
        corl.eval_rollout = lambda **_: (0.0, 0)
    corl.train(config)
    speed = (log.steps - WARM_UP * args.speed) / (time.time() - log.began)
    print(f"CORL {name}: {log.steps:,} steps, {speed:.1f} steps/s")
    return speed


if __name__ == "__main__":
    main(tyro.cli(Args))
