"""Runs A2PO's official code, unchanged, on a data set of this project.

    git clone https://github.com/Plankson/A2PO
    python benchmark_results/official_a2po.py --folder A2PO --steps 20000

Nothing of it is kept here. Its learner comes from its a2po.py; batches, seeds, rewards times 100,
normalised states and evaluation are done as its main.py and buffer.py do them, with its defaults,
but on our arrays and Gymnasium's environment. It trains on all episodes; our files keep one in
twenty for validation. Writes runs/official_a2po/<data set>/seed<k>/eval.csv and config.json beside
this file, for report.py; with --speed it only counts steps per second.
"""

import csv
import importlib.util
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from corl import bc, references, unscaled, write_config
from run import FOLDER, task_name

COLUMNS = "observations actions rewards next_observations terminals".split()
WARM_UP = 20  # steps that --speed does not count


@dataclass
class Args:
    """One run of the official A2PO on our data."""

    folder: Path  # a checkout of github.com/Plankson/A2PO
    dataset: str = "hopper-medium-replay"  # a data set as in algorithms/
    seed: int = 0  # seed of the networks, the batches and the evaluation
    steps: int = 100_000  # gradient steps
    vae_steps: int = 200_000  # steps in which its CVAE learns; a shorter run never freezes it
    eval_every: int = 5000  # gradient steps between evaluations
    eval_episodes: int = 10  # episodes per evaluation
    device: str = "cpu"  # cpu or cuda
    threads: int = 1  # threads of PyTorch
    matmul_precision: str = "high"  # as in algorithms/
    speed: bool = False  # time the steps without a single evaluation, write nothing
    run_dir: str = ""  # where eval.csv goes; empty: runs/official_a2po/<data set>/seed<k>


class Buffer:
    """The data set as its replay buffer gives it out: states normalised, rewards times 100."""

    def __init__(self, data: dict[str, np.ndarray]):
        s, a, r, s_next, d = (data[key] for key in COLUMNS)
        self.mean, self.std = s.mean(0, keepdims=True), s.std(0, keepdims=True) + 1e-3
        s, s_next = ((x - self.mean) / self.std for x in (s, s_next))
        self.columns = s, a, s_next, 100 * r, 1 - d

    def sample(self, batch_size):
        rows = np.random.randint(0, len(self.columns[0]), batch_size)  # noqa: NPY002
        return [torch.as_tensor(column[rows], dtype=torch.float32) for column in self.columns]


def evaluate(policy, buffer: Buffer, task: dict, args: Args) -> np.ndarray:
    """Returns of some episodes, one after another as its main.py plays them."""
    env, returns = bc.make_env(task), np.zeros(args.eval_episodes)
    for i in range(args.eval_episodes):
        s, _ = env.reset(seed=args.seed + 100 if i == 0 else None)
        done = False
        while not done:
            with torch.no_grad():
                a = policy.select_action((s[None] - buffer.mean) / buffer.std)
            s, r, terminated, truncated, _ = env.step(unscaled(a, task))
            returns[i] += r
            done = terminated or truncated
    env.close()
    return returns


def main(args: Args) -> float:
    """Trains; returns gradient steps per second, evaluations left out with --speed."""
    path = args.folder / "a2po.py"
    if not path.is_file():
        raise SystemExit(f"--folder {args.folder}: no a2po.py; get github.com/Plankson/A2PO first.")
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision(args.matmul_precision)
    data, task = bc.load_dataset(args.dataset)
    run_dir = Path(
        args.run_dir or FOLDER / f"runs/official_a2po/{task_name(args.dataset)}/seed{args.seed}"
    )
    if not args.speed:
        if (run_dir / "eval.csv").exists():
            raise SystemExit(f"{run_dir} holds a run: --run-dir goes elsewhere.")
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(run_dir, args, task, args.folder)
    spec = importlib.util.spec_from_file_location("official_a2po", path)
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)

    torch.manual_seed(args.seed)
    np.random.seed(args.seed)  # noqa: NPY002  its CVAE draws from this one
    buffer = Buffer(data)
    policy = official.OffRL(
        state_dim=task["sizes"][0],
        action_dim=task["sizes"][1],
        max_action=1.0,
        min_v=100 * float(data["rewards"].min()) / (1 - 0.99),
        max_v=100 * float(data["rewards"].max()) / (1 - 0.99),
        device=torch.device(args.device),
        alpha=1.0,  # main.py's default
        vae_step=args.vae_steps,
    )
    policy.log_freq = 10 * args.steps  # its log is not read here
    began, rows = time.time(), []
    for step in range(1, args.steps + 1):
        policy.policy_train(buffer, None, "A2PO", task["env_id"])
        if args.speed:
            began = time.time() if step == WARM_UP else began
        elif step % args.eval_every == 0 or step == args.steps:
            low, high = references(task)
            returns = evaluate(policy, buffer, task, args)
            row = {"step": step, "seconds": round(time.time() - began, 1)}
            row |= {"return_mean": returns.mean(), "return_std": returns.std()}
            row["score"] = 100 * (returns.mean() - low) / (high - low)
            rows.append(row)
            print(f"step {step:>9,}  return_mean {returns.mean():.4g}  score {row['score']:.4g}")
            with open(run_dir / "eval.csv", "w", newline="") as file:
                table = csv.DictWriter(file, list(row))
                table.writeheader()
                table.writerows(rows)
    speed = (args.steps - WARM_UP * args.speed) / (time.time() - began)
    print(f"official A2PO: {args.steps:,} steps, {speed:.1f} steps/s")
    return speed


if __name__ == "__main__":
    main(tyro.cli(Args))
