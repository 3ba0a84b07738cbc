"""Steps per second of every file on this machine.

    python benchmark_results/speed.py
    python benchmark_results/speed.py --algorithms td3_bc iql --corl CORL/algorithms/offline

Times the updates that the training loop calls, with each file's own sizes and batch, on random
arrays of HalfCheetah's shape. An algorithm with phases is timed in each, weighed by their share of
a run. `evaluation` is ten episodes of 1000 steps. The floor of a step is its floating-point
operations, counted while it runs, over the rate of a large matrix product, measured here: `share`
says how near a file comes to it (1 would be nothing but products at full rate). `kernels` are the
tensor operations of a step, views left out: on a GPU the other floor, two microseconds or so each
even in a graph. The table goes to
speed.md and speed.csv beside this file, below those of other hardware. --corl also times CORL's
file of the same name, in turns with ours: on a machine that does something else too, only the ratio
means something.
"""

import contextlib
import csv
import io
import multiprocessing
import platform
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import corl
import h5py
import numpy as np
import torch
import tyro
from run import ALGORITHMS, FOLDER, accelerated, fresh_learner, load, phases
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

CORL = {"bc": "any_percent_bc", "td3_bc": "td3_bc", "iql": "iql", "cql": "cql"}
CORL |= {"decision_transformer": "dt"}
UNITS = {  # columns of the table
    "steps_per_second": "steps/s",
    "gigaflop": "GFLOP a step",
    "share": "share of the matrix rate",
    "kernels": "kernels a step",
    "minutes_per_million": "minutes per million steps",
    "peak_megabytes": "peak MB",
    "evaluation_seconds": "evaluation, s",
    "corl_steps_per_second": "CORL, steps/s",
    "ratio": "ratio",
}


@dataclass
class Args:
    """Measures steps per second, memory and evaluation time of the files of algorithms/."""

    algorithms: tuple[str, ...] = ()  # files without .py; empty: all
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # as in the files
    threads: int = 1  # threads of PyTorch on the CPU
    matmul_precision: str = "high"  # as in the files
    override: tuple[str, ...] = ()  # other flags of the files: batch-size=1024 no-cuda-graph
    seconds: float = 5.0  # time spent on each measurement
    repeats: int = 3  # measurements of ours and of CORL's, in turns; the fastest counts
    corl: str = ""  # folder with CORL's td3_bc.py and the others, to be timed beside ours
    dry_run: bool = False  # print the figures, write nothing


def write_data(path: Path, n: int = 100_000) -> None:
    """Random transitions in HalfCheetah's shape: 100 episodes of 1000 steps."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        s = rng.standard_normal((n + 1, 17), np.float32)
        file["observations"], file["next_observations"] = s[:-1], s[1:]
        file["actions"] = rng.uniform(-1, 1, (n, 6)).astype(np.float32)
        file["rewards"] = rng.standard_normal(n, np.float32)
        file["terminals"], file["timeouts"] = np.zeros(n, bool), np.arange(1, n + 1) % 1000 == 0
        file.attrs["env_id"] = "HalfCheetah-v5"


def calls_per_second(call, seconds: float, device: torch.device) -> float:
    """After a warm-up that covers compilation and the capture of a CUDA graph."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    block, calls = 50 if device.type == "cuda" else 1, 0
    for _ in range(6):
        call()
    wait()
    began = time.perf_counter()
    while time.perf_counter() - began < seconds:
        for _ in range(block):
            call()
        wait()
        calls += block
    return calls / (time.perf_counter() - began)


def matrix_rate(device: torch.device) -> float:
    """Floating-point operations per second of a large product, at the precision that is set."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device)
    return 2 * n**3 * calls_per_second(lambda: a @ b, 1.0, device)


class Counter(TorchDispatchMode):
    """Counts the floating-point operations of products, and the operations that compute something:
    on a GPU one kernel or more each."""

    flop = kernels = 0
    others = ("empty", "empty_like", "new_empty", "_unsafe_view", "detach", "alias")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out, name = function(*args, **(kwargs or {})), function.overloadpacket
        if name in flop_registry:
            self.flop += flop_registry[name](*args, **(kwargs or {}), out_val=out)
        if function.namespace == "aten" and not function.is_view:
            self.kernels += name.__name__ not in self.others
        return out


def operations(update) -> np.ndarray:
    """(floating-point operations of the products, kernels) in one gradient step, backward pass
    included."""
    update()  # the first call also makes the optimisers' states
    with Counter() as counter:
        update()
    return np.array([counter.flop, counter.kernels])


def ours(args: Args, algorithm: str, data: str) -> dict[str, float]:
    """One file, measured once; its figures under the names of UNITS."""
    module, flags = load(algorithm), ["--offline"] if algorithm == "sac" else []
    flags += ["--dataset", data, "--device", args.device, "--threads", str(args.threads)]
    flags += ["--matmul-precision", args.matmul_precision]
    flags += [word for pair in args.override for word in f"--{pair}".split("=", 1)]
    options = tyro.cli(module.Args, args=flags)
    learner, _, task = fresh_learner(module, options)
    device = torch.device(args.device)

    # Which update the training loop would call how often, and what a step of the run costs.
    updates, names = phases(learner, options.steps)
    shares = {name: names.count(name) / len(names) for name in updates}
    counts = {name: operations(update) for name, update in updates.items()}
    seconds = args.seconds / len(updates)
    fast = {name: accelerated(module, options, update) for name, update in updates.items()}
    cost = sum(
        shares[name] / calls_per_second(update, seconds, device) for name, update in fast.items()
    )
    flop, kernels = sum(shares[name] * counts[name] for name in updates)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated() / 1e6
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    learner.eval()
    began = time.perf_counter()
    module.evaluate(learner.policy, task, 10, 0)
    evaluation = time.perf_counter() - began
    return {
        "steps_per_second": 1 / cost,
        "gigaflop": flop / 1e9,
        "share": flop / cost / matrix_rate(device),
        "kernels": kernels,
        "minutes_per_million": cost * 1e6 / 60,
        "peak_megabytes": memory,
        "evaluation_seconds": evaluation,
    }


def theirs(args: Args, algorithm: str, data: str, steps: int) -> float:
    """Steps per second of CORL's file."""
    options = corl.Args(Path(args.corl) / f"{CORL[algorithm]}.py", data, steps=steps, speed=True)
    options.device, options.threads = args.device, args.threads
    options.matmul_precision = args.matmul_precision
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return corl.main(options)


def alone(function, *arguments):
    """A call in a process of its own, for its peak memory and a clean device."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn) as pool:
        return pool.submit(function, *arguments).result()


def hardware(args: Args) -> str:
    """Name of what was measured on."""
    if args.device.startswith("cuda"):
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    threads = "one thread" if args.threads == 1 else f"{args.threads} threads"
    return f"{names[0] if names else platform.machine()}, {threads}"


def write(rows: list[dict]) -> None:
    """Adds rows to speed.csv, in the place of older ones, and makes speed.md of all of it."""
    path = FOLDER / "speed.csv"
    table = {}
    if path.exists():
        with open(path) as file:
            table = {(row["hardware"], row["algorithm"]): row for row in csv.DictReader(file)}
    table |= {(row["hardware"], row["algorithm"]): row for row in rows}
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ["hardware", "algorithm", *UNITS], restval="")
        writer.writeheader()
        writer.writerows(table.values())
    lines = ["# Speed", "", "Written by `python benchmark_results/speed.py`; see there."]
    for place in dict.fromkeys(hardware for hardware, _ in table):
        lines += ["", f"## {place}", "", f"| file | {' | '.join(UNITS.values())} |"]
        lines += ["|---|" + "--:|" * len(UNITS)]
        for (hardware, algorithm), row in sorted(table.items()):
            if hardware == place:
                cells = [f"{float(x):.4g}" if (x := row.get(key)) else "" for key in UNITS]
                lines.append(f"| {algorithm} | {' | '.join(cells)} |")
    (FOLDER / "speed.md").write_text("\n".join(lines) + "\n")


def main(args: Args) -> list[dict]:
    """Measures, prints and writes; returns the rows."""
    place = f"{hardware(args)}, torch {torch.__version__}, {args.matmul_precision} precision"
    place += f", {' '.join(args.override)}" if args.override else ""
    print(place)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        data = str(Path(folder) / "halfcheetah-noise.hdf5")
        write_data(Path(data))
        for algorithm in args.algorithms or sorted(path.stem for path in ALGORITHMS.glob("*.py")):
            row = {"hardware": place, "algorithm": algorithm, "steps_per_second": 0.0}
            corls = []
            for _ in range(args.repeats):
                new = alone(ours, args, algorithm, data)
                if new["steps_per_second"] > row["steps_per_second"]:
                    row |= new
                if args.corl and algorithm in CORL:
                    steps = max(60, int(args.seconds * new["steps_per_second"] / 2))
                    corls.append(alone(theirs, args, algorithm, data, steps))
            if corls:
                row["corl_steps_per_second"] = max(corls)
                row["ratio"] = row["steps_per_second"] / max(corls)
            rows.append(row)
            figures = [f"{UNITS[key]} {row[key]:.4g}" for key in UNITS if key in row]
            print(f"{algorithm}: {', '.join(figures)}", flush=True)
    if not args.dry_run:
        write(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
