"""The table of docs/algorithms/trajectory_transformer.md: what a decision costs and where the time
goes, on one CPU thread, with an untrained policy of the same sizes. Written to a CSV file.

    python docs/figures/trajectory_transformer.py
"""

import csv
import importlib.util
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from torch.profiler import ProfilerActivity, profile

DOCS = Path(__file__).resolve().parents[1]
CASE = dict(bins=30, context=4, history=1, horizon=3, beam_width=8, hidden_dim=64, layers=2)
SETTINGS = {  # name: (state and action dimensions, episodes, flags)
    "Pendulum, the case": ((3, 1), 20, CASE | {"heads": 2}),
    "Hopper, small": ((11, 3), 10, CASE | {"heads": 2, "bins": 50, "horizon": 3}),
    "Hopper, defaults": ((11, 3), 10, {}),
}
GROUPS = {
    "linear layers": ("addmm", "mm"),
    "attention": ("bmm", "_softmax", "_scaled_dot_product_flash_attention_for_cpu", "masked_fill_"),
    "moving caches": ("cat", "copy_", "index", "index_select", "repeat_interleave"),
    "drawing": ("sort", "multinomial", "exponential_", "argmax", "cumsum", "topk"),
}


@dataclass
class Args:
    """Measures decisions of the Trajectory Transformer."""

    out: str = str(DOCS / "algorithms" / "trajectory_transformer" / "time.csv")  # the table
    decisions: int = 8  # of each setting, after as many that are not counted


def load_algorithm():
    path = DOCS.parent / "algorithms" / "trajectory_transformer.py"
    spec = importlib.util.spec_from_file_location("trajectory_transformer", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["trajectory_transformer"] = module
    spec.loader.exec_module(module)
    return module


def compute_anew(policy):
    """The same policy, which for every word reads all that stands before it, as without a cache.
    What it keeps as keys and values are the words."""
    read = policy.forward

    def forward(text, past=(), shared=(), keep=slice(None)):
        known = torch.cat([past[0], text[:, None, :, None]], 2) if past else text[:, None, :, None]
        whole = known[:, 0, :, 0]
        if shared:
            before = shared[0][:, 0, :, 0]
            whole = torch.cat([before.repeat_interleave(len(whole) // len(before), 0), whole], 1)
        return read(whole, keep=slice(-1, None))[0], [known]

    policy.forward = forward


def decisions(policy, size: int, episodes: int, count: int) -> float:
    """Seconds of a decision for all episodes together, the mean over `count`."""
    rng, memory, r, times = np.random.default_rng(0), None, None, []
    for _ in range(2 * count):
        s, begun = rng.normal(size=(episodes, size)), time.perf_counter()
        _, memory = policy.act(s, r, memory)
        times.append(time.perf_counter() - begun)
        r = np.zeros(episodes)
    return float(np.mean(times[count:]))


def main(args: Args) -> None:
    torch.set_num_threads(1)
    module, rows = load_algorithm(), []
    for name, (sizes, episodes, flags) in SETTINGS.items():
        task = {"sizes": list(sizes), "bounds": [[-1.0] * sizes[1], [1.0] * sizes[1]]}
        args_of = module.Args(**flags)

        def fresh(task=task, args_of=args_of):
            torch.manual_seed(0)
            policy = module.Policy(task, args_of).eval()
            words = torch.linspace(-1, 1, args_of.bins).expand(sum(task["sizes"]) + 2, -1)
            policy.words[:, :-1] = words
            return policy

        seconds = decisions(fresh(), sizes[0], episodes, args.decisions)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            decisions(fresh(), sizes[0], episodes, 2)
        of = {x.key.removeprefix("aten::"): x.self_cpu_time_total for x in found.key_averages()}
        total = sum(of.values())
        shares = [100 * sum(of.get(x, 0) for x in ops) / total for ops in GROUPS.values()]
        slow = fresh()
        compute_anew(slow)
        anew = decisions(slow, sizes[0], episodes, 1)
        row = [name, episodes, 1000 * seconds, *shares, 100 - sum(shares), 1000 * anew]
        rows.append([x if isinstance(x, str) else f"{x:.4g}" for x in row])
        print(*rows[-1], sep=", ", flush=True)
    Path(args.out).parent.mkdir(exist_ok=True)
    head = ["setting", "episodes", "ms", *GROUPS, "the rest", "ms without caches"]
    with open(args.out, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


if __name__ == "__main__":
    main(tyro.cli(Args))
