"""Runs algorithms x data sets x seeds, several at once, and skips what is done.

    pip install -r requirements.txt -r benchmark_results/requirements.txt
    python benchmark_results/run.py --algorithms bc td3_bc a2po --datasets hopper-medium-replay \
        --seeds 0 1 2 --steps 100000 --dry-run
    python benchmark_results/report.py

Without --dry-run the same line trains. Every run writes to runs/<algorithm>/<data set>/seed<k>
beside this file; git keeps its eval.csv and config.json. Run the line again after a crash: a
finished run is skipped, an unfinished one goes on from its checkpoint, at most --save-every steps
old.

Ray schedules: here one process and one thread per CPU core, or several processes per GPU
(--gpus-per-run); on a cluster with --address, where every node needs this folder at the same path.
"""

import contextlib
import csv
import fnmatch
import importlib.util
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
ROOT, ALGORITHMS = FOLDER.parent, FOLDER.parent / "algorithms"
TASKS = ("hopper", "halfcheetah", "walker2d")
KINDS = ("medium-replay", "medium-expert", "random-medium-expert")

# Flags by algorithm and data set (a pattern; the first that fits). What is not here runs with the
# defaults of its file. The numbers are the papers' for D4RL's sets of the same name.
PRESETS = {
    "rebrac": {
        "hopper-medium": "--actor-bc 0.01 --critic-bc 0.01",
        "hopper-medium-replay": "--actor-bc 0.05 --critic-bc 0.5",
        "hopper-medium-expert": "--actor-bc 0.1 --critic-bc 0.01",
        "halfcheetah-medium": "--actor-bc 0.001 --critic-bc 0.01",
        "halfcheetah-medium-replay": "--actor-bc 0.01 --critic-bc 0.001",
        "halfcheetah-medium-expert": "--actor-bc 0.01 --critic-bc 0.1",
        "walker2d-medium": "--actor-bc 0.05 --critic-bc 0.1",
        "walker2d-medium-replay": "--actor-bc 0.05 --critic-bc 0.01",
        "walker2d-medium-expert": "--actor-bc 0.01 --critic-bc 0.01",
    },
    "diffusion_ql": {
        "hopper-medium-replay": "--max-grad-norm 4",
        "hopper-medium-expert": "--max-grad-norm 5",
        "halfcheetah-medium": "--max-grad-norm 9",
        "halfcheetah-medium-replay": "--max-grad-norm 2",
        "halfcheetah-medium-expert": "--max-grad-norm 7",
        "walker2d-medium": "--max-grad-norm 1",
        "walker2d-medium-replay": "--max-grad-norm 4",
        "walker2d-medium-expert": "--max-grad-norm 5",
    },
}


@dataclass
class Args:
    """Trains a grid of runs; an unfinished grid goes on when the same line is run again."""

    algorithms: tuple[str, ...] = ()
    """files of algorithms/, without .py; empty: all but sac, which is online"""
    datasets: tuple[str, ...] = tuple(f"{task}-{kind}" for task in TASKS for kind in KINDS)
    """data sets, by any name that --dataset takes"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """seeds of every algorithm on every data set"""
    steps: int = 0
    """gradient steps of a run; 0: each file's own number"""
    save_every: int = 10_000
    """steps between checkpoints: what a crash can cost"""
    override: tuple[str, ...] = ()
    """more flags for every run, stronger than the presets: hidden-dim=512 eval-episodes=20"""
    tag: str = ""
    """suffix of the algorithm's folder, for runs with other flags: wide writes runs/a2po_wide"""
    device: str = "auto"
    """as in the files"""
    matmul_precision: str = "high"
    """as in the files"""
    cpus_per_run: float = 1
    """CPU cores, and threads, of a run"""
    gpus_per_run: float = 0
    """share of a GPU that a run takes: 0.125 runs eight side by side on each"""
    address: str = ""
    """a Ray cluster; empty: this machine"""
    runs: Path = FOLDER / "runs"
    """where the runs are"""
    dry_run: bool = False
    """print what would be run"""


@dataclass
class Job:
    """One run of the grid."""

    algorithm: str
    dataset: str
    seed: int
    folder: Path
    flags: list[str]
    steps: int
    done: int = field(default=0)  # steps that its eval.csv already has

    @property
    def name(self) -> str:
        return f"{self.algorithm} {self.dataset} seed {self.seed}"


def load(algorithm: str):
    """The module algorithms/<algorithm>.py."""
    path = ALGORITHMS / f"{algorithm}.py"
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in ALGORITHMS.glob("*.py")))
        raise SystemExit(f"--algorithms {algorithm}: no such file; there are {known}.")
    spec = importlib.util.spec_from_file_location(algorithm, path)
    sys.modules[algorithm] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def preset(algorithm: str, dataset: str) -> str:
    """Flags of the table above for one cell of the grid."""
    patterns = PRESETS.get(algorithm, {})
    return next((patterns[p] for p in patterns if fnmatch.fnmatch(dataset, p)), "")


def rows(folder: Path) -> list[dict[str, str]]:
    """Evaluations that a run has written so far."""
    path = folder / "eval.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def task_name(dataset: str) -> str:
    """A data set's name, path or Minari id as one folder's name, as the files make it."""
    is_file = Path(dataset).suffix in (".hdf5", ".npz")
    return Path(dataset).stem if is_file else dataset.strip("/").replace("/", "-")


def plan(args: Args) -> list[Job]:
    """The grid, seeds first, so that every cell has a first number early. Raises SystemExit where a
    flag is none of the file's, or where a run can be neither continued nor called finished."""
    algorithms = args.algorithms or sorted({p.stem for p in ALGORITHMS.glob("*.py")} - {"sac"})
    modules = {algorithm: load(algorithm) for algorithm in algorithms}
    jobs = []
    for seed in args.seeds:
        for dataset in args.datasets:
            for algorithm in algorithms:
                label = f"{algorithm}_{args.tag}" if args.tag else algorithm
                folder = args.runs.resolve() / label / task_name(dataset) / f"seed{seed}"
                run_dir = str(folder.relative_to(ROOT) if ROOT in folder.parents else folder)
                flags = ["--dataset", dataset, "--seed", str(seed), "--run-dir", run_dir]
                flags += ["--device", args.device, "--matmul-precision", args.matmul_precision]
                flags += ["--save-every", str(args.save_every)]
                flags += ["--steps", str(args.steps)] if args.steps else []
                flags += shlex.split(preset(algorithm, dataset))
                flags += [word for pair in args.override for word in f"--{pair}".split("=", 1)]
                steps = tyro.cli(modules[algorithm].Args, args=flags).steps
                job = Job(algorithm, dataset, seed, folder, flags, steps)
                job.done = int(rows(folder)[-1]["step"]) if rows(folder) else 0
                if 0 < job.done < steps and not (folder / "checkpoint.pt").exists():
                    raise SystemExit(
                        f"{folder} ends at step {job.done:,} of {steps:,} and has no checkpoint to"
                        f" continue from: remove it, or name another place with --runs or --tag."
                    )
                jobs.append(job)
    return jobs


def work(job: Job, threads: int) -> str:
    """One run, in a process of its own. Returns one line about it."""
    import torch

    os.chdir(ROOT)  # run directories and data sets are named from there
    torch.set_num_threads(threads)
    job.folder.mkdir(parents=True, exist_ok=True)
    resume = ["--resume"] if (job.folder / "config.json").exists() else []
    module = load(job.algorithm)
    with open(job.folder / "log.txt", "a", buffering=1) as log, contextlib.redirect_stdout(log):
        try:
            module.train(tyro.cli(module.Args, args=job.flags + resume))
        except SystemExit as error:  # a message for the user, which Ray would take for a crash
            raise RuntimeError(str(error)) from None
    scores = np.array([float(row.get("score", "nan")) for row in rows(job.folder)])
    minutes = float(rows(job.folder)[-1]["seconds"]) / 60
    return f"{job.name}: final {scores[-5:].mean():.1f}, best {scores.max():.1f}, {minutes:.1f} min"


def main(args: Args) -> None:
    jobs = plan(args)
    waiting = [job for job in jobs if job.done < job.steps]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done, {len(waiting)} to do")
    if args.dry_run:
        for job in waiting:
            begun = f"  # from step {job.done:,}" if job.done else ""
            print(f"python algorithms/{job.algorithm}.py {shlex.join(job.flags)}{begun}")
        return
    if not waiting:
        return
    try:
        import ray
    except ImportError:
        raise SystemExit(
            "The runner needs Ray: pip install -r benchmark_results/requirements.txt"
        ) from None
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a share of 0 hides no GPU
    ray.init(address=args.address or None, include_dashboard=False, log_to_driver=False)
    # max_calls=1: a process per run, so that its memory is returned; a killed one begins again,
    # from its checkpoint, up to three times.
    resources = {"num_cpus": args.cpus_per_run, "num_gpus": args.gpus_per_run}
    remote = ray.remote(max_calls=1, max_retries=3, **resources)(work)
    threads = max(1, int(args.cpus_per_run))
    running = {remote.remote(job, threads): job for job in waiting}
    failed = []

    bar = tqdm(total=sum(job.steps for job in jobs), unit="step", unit_scale=True)
    while running:
        finished, _ = ray.wait(list(running), timeout=2)
        for task in finished:
            job = running.pop(task)
            try:
                bar.write(ray.get(task))
            except Exception as error:
                reason = str(getattr(error, "cause", error)).strip().splitlines()[-1]
                failed.append(f"{job.name}: {reason}")
                bar.write(f"failed, {failed[-1]}")
        done = (int(written[-1]["step"]) for job in jobs if (written := rows(job.folder)))
        bar.n = sum(done)
        bar.set_postfix(runs=f"{len(jobs) - len(running) - len(failed)}/{len(jobs)}")
    bar.close()
    ray.shutdown()
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed:\n" + "\n".join(failed))
    print(f"All {len(jobs)} runs are done; python benchmark_results/report.py makes the tables.")


if __name__ == "__main__":
    main(tyro.cli(Args))
