"""Runs algorithms x data sets x seeds, several at once, and skips what is done.

    pip install -r requirements.txt -r benchmark_results/requirements.txt
    python benchmark_results/run.py --algorithms bc td3_bc a2po --datasets hopper-medium-replay \
        --seeds 0 1 2 --steps 20000 --runs runs/grid
    python benchmark_results/report.py --runs runs/grid --out runs/grid/report

--dry-run prints the commands instead. Every run writes to <runs>/<algorithm>/<data set>/seed<k>;
what it prints is in log.txt there, and its config.json gets the git commit, the threads and the CPU
seconds. Run the line again after Ctrl-C, at which every run saves itself, or after a crash, which
costs what came after the last checkpoint (--save-every, and each evaluation): a finished run is
skipped, the others go on. A run that fails keeps none of the others from ending; it is listed at
the end with its last line, and the exit status is 1.

--cpu-minutes M compares at equal time instead of equal steps: every run stops when its process has
used M minutes of CPU time, user and system, its children included, as the operating system counts
it, so that a busy machine changes nothing. Reading the data, evaluations and checkpoints count,
too. What a killed run had done since its last checkpoint is done again and counts once. Where
--override names no eval-every, a probe of some seconds for each algorithm and data set chooses it,
for about --evaluations in the time. A file that does its --steps in less time ends earlier.

Ray schedules: here one process and one thread per CPU core (--cpus: of so many), or several per GPU
(--gpus-per-run); on a cluster with --address, where every node needs this folder, and the one that
the line is typed in, at the same path.
"""

import contextlib
import csv
import fcntl
import fnmatch
import importlib.util
import json
import logging
import math
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import tyro
from tqdm import tqdm

FOLDER = Path(__file__).resolve().parent
ROOT, ALGORITHMS = FOLDER.parent, FOLDER.parent / "algorithms"
TASKS = ("hopper", "halfcheetah", "walker2d")
KINDS = ("medium-replay", "medium-expert", "random-medium-expert")

# Flags by algorithm and data set (a pattern; the first that fits). What is not here runs with the
# defaults of its file. The numbers are the papers' for D4RL's sets of the same name, and hold for
# the names of D4RL (hopper-medium-v2) and of Minari (mujoco/hopper/medium-v0), too.
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

# Flags that change where, how fast or how often, and not what is trained.
FREE = "steps eval_every eval_episodes save_every threads device matmul_precision cuda_graph"
FREE += " run_dir resume evaluate capture_video"


@dataclass
class Args:
    """Trains a grid of runs; an unfinished grid goes on when the same line is run again."""

    algorithms: tuple[str, ...] = ()  # files of algorithms/, or paths; empty: all but sac (online)
    datasets: tuple[str, ...] = tuple(f"{task}-{kind}" for task in TASKS for kind in KINDS)
    """data sets, by any name that --dataset takes"""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)  # seeds of every algorithm on every data set
    steps: int = 0  # gradient steps of a run; 0: each file's own number
    cpu_minutes: float = 0  # CPU minutes after which a run stops; 0: only after its steps
    evaluations: int = 15  # with --cpu-minutes: about as many, where no eval-every is overridden
    save_every: int = 10_000  # steps between checkpoints: what a crash can cost
    override: tuple[str, ...] = ()  # more flags, stronger than presets: hidden-dim=512 cql:steps=9
    tag: str = ""  # suffix of the algorithm's folder, for other flags: wide writes a2po_wide
    device: str = ""  # as in the files; empty: cuda if there is one, else cpu
    matmul_precision: str = "high"  # as in the files
    cpus: int = 0  # CPU cores of this machine to use at once; 0: all, or the cluster's
    cpus_per_run: float = 1  # CPU cores, and threads, of a run
    gpus_per_run: float = 0  # share of a GPU that a run takes: 0.125: eight side by side on each
    address: str = ""  # a Ray cluster; empty: this machine
    runs: Path = Path("runs/grid")  # where the runs are
    dry_run: bool = False  # print what would be run


@dataclass
class Job:
    """One run of the grid."""

    algorithm: str
    dataset: str
    seed: int
    folder: Path
    flags: list[str]
    steps: int
    finished: bool = field(default=False)
    done: int = field(default=0)  # steps that its eval.csv already has

    @property
    def name(self) -> str:
        return f"{self.algorithm} {self.dataset} seed {self.seed}"


# ---------------------------------------------------------------------------------------- Plan


def load(algorithm: str):
    """The module algorithms/<algorithm>.py, or that at a path."""
    path = Path(algorithm if algorithm.endswith(".py") else ALGORITHMS / f"{algorithm}.py")
    if not path.exists():
        known = ", ".join(sorted(file.stem for file in ALGORITHMS.glob("*.py")))
        raise SystemExit(f"--algorithms {algorithm}: no such file; there are {known}.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def preset(algorithm: str, dataset: str) -> str:
    """Flags of the table above for one cell of the grid, whoever's name the data set has."""
    name = dataset.strip("/").removesuffix(".hdf5").removesuffix(".npz").lower()
    name = re.sub(r"-v\d+$", "", name).replace("_", "-")
    parts = name.split("/")
    names = (parts[-1], "-".join(parts[-2:]))  # .../hopper-medium, .../hopper/medium
    patterns = PRESETS.get(Path(algorithm).stem, {})
    found = (p for p in patterns if any(fnmatch.fnmatch(name, p) for name in names))
    return next((patterns[p] for p in found), "")


def rows(folder: Path) -> list[dict[str, str]]:
    """Evaluations that a run has written so far."""
    path = folder / "eval.csv"
    if not path.exists():
        return []
    with open(path) as file:
        return list(csv.DictReader(file))


def last_step(folder: Path) -> int:
    """Step of the last of them."""
    written = rows(folder)
    return int(written[-1]["step"] or 0) if written else 0


def read(path: Path) -> dict:
    """A JSON file; nothing where there is none."""
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return json.loads(path.read_text())
    return {}


def write(path: Path, content: dict) -> None:
    """The same, whole or not at all."""
    path.with_suffix(".tmp").write_text(json.dumps(content, indent=2))
    path.with_suffix(".tmp").replace(path)


def task_name(dataset: str) -> str:
    """A data set's name, path or Minari id as one folder's name, as the files make it."""
    path = Path(dataset)
    is_file = path.is_file() or path.suffix in (".hdf5", ".npz")
    return path.stem if is_file else dataset.strip("/").replace("/", "-")


def overrides(args: Args, algorithm: str) -> list[str]:
    """Flags of --override for one algorithm: flag, flag=value or algorithm:flag=value."""
    words = []
    for pair in args.override:
        flag, equals, value = pair.partition("=")
        owner, colon, own = flag.rpartition(":")
        if not colon or owner == Path(algorithm).stem:
            words += [f"--{own}", *shlex.split(value)] if equals else [f"--{own}"]
    return words


def is_finished(job: Job, config: dict, cpu: dict, minutes: float) -> bool:
    """Whether a run has all its steps, or has used its time. One from elsewhere has no cpu.json."""
    if "cpu_seconds" not in config:  # otherwise it was stopped, maybe in its last evaluation
        return not cpu and job.done >= job.steps
    over = minutes and config["cpu_seconds"] >= 60 * minutes
    through = config["steps_reached"] >= job.steps or over
    return bool(through) and config.get("cpu_minutes", 0) == minutes


def plan(args: Args) -> list[Job]:
    """The grid, seeds first, so that every cell has a first number early. Raises SystemExit where a
    flag is none of the file's, or where a run can be neither continued nor called finished."""
    algorithms = args.algorithms or sorted({p.stem for p in ALGORITHMS.glob("*.py")} - {"sac"})
    modules = {algorithm: load(algorithm) for algorithm in algorithms}
    for pair in args.override:
        owner, colon, _ = pair.partition("=")[0].rpartition(":")
        if colon and owner not in (Path(algorithm).stem for algorithm in algorithms):
            raise SystemExit(f"--override {pair}: {owner} is none of --algorithms.")
    jobs, cells, here = [], {}, Path.cwd()
    for seed in args.seeds:
        for dataset in args.datasets:
            for algorithm in algorithms:
                name = Path(algorithm).stem
                label = f"{name}_{args.tag}" if args.tag else name
                folder = args.runs.resolve() / label / task_name(dataset) / f"seed{seed}"
                run_dir = str(folder.relative_to(here) if here in folder.parents else folder)
                flags = ["--dataset", dataset, "--seed", str(seed), "--run-dir", run_dir]
                flags += ["--device", args.device] if args.device else []
                flags += ["--threads", str(max(1, int(args.cpus_per_run)))]
                flags += ["--matmul-precision", args.matmul_precision]
                flags += ["--save-every", str(args.save_every)]
                flags += ["--steps", str(args.steps)] if args.steps else []
                flags += shlex.split(preset(algorithm, dataset)) + overrides(args, algorithm)
                if (algorithm, dataset) not in cells:  # the flags of other seeds are as good
                    options = tyro.cli(modules[algorithm].Args, args=flags)
                    cells[algorithm, dataset] = json.loads(json.dumps(asdict(options)))
                options = cells[algorithm, dataset] | {"seed": seed}
                job = Job(algorithm, dataset, seed, folder, flags, options["steps"])
                job.done = last_step(folder)
                config, cpu = read(folder / "config.json"), read(folder / "cpu.json")
                job.finished = is_finished(job, config, cpu, args.cpu_minutes)
                old = config.get("args", {}) if job.finished else {}
                new = {key: value for key, value in options.items() if key not in FREE.split()}
                changed = [f"{k} {old[k]}" for k in new if k in old and old[k] != new[k]]
                used = config.get("cpu_seconds", 0) / 60
                if not job.finished and args.cpu_minutes and used >= args.cpu_minutes:
                    changed.append(f"{used:.2g} CPU minutes")
                elsewhere = "remove it, or name another place with --runs or --tag."
                if changed:
                    raise SystemExit(f"{folder} is a run with {', '.join(changed)}: {elsewhere}")
                if job.done and not job.finished and not (cpu and (folder / SAVED).exists()):
                    raise SystemExit(
                        f"{folder} ends at step {job.done:,} of {job.steps:,} and has no checkpoint"
                        f" (or none from here) to continue from: {elsewhere}"
                    )
                jobs.append(job)
    folder, times = Counter(job.folder for job in jobs).most_common(1)[0] if jobs else ("", 0)
    if times > 1:
        raise SystemExit(f"Two runs of this grid would write to {folder}: name one of them once.")
    return jobs


def commit() -> str:
    """The version of the code: a git commit, with a plus where algorithms/ has been changed."""
    git = ["git", "-C", str(ROOT)]
    options = dict(capture_output=True, text=True)
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], **options)
        changes = [*git, "status", "--porcelain", "--", "algorithms"]
        plus = "+" if subprocess.run(changes, **options).stdout else ""
    except FileNotFoundError:
        return "unknown"
    return head.stdout.strip() + plus if head.returncode == 0 else "unknown"


# --------------------------------------------------------------------------------- A run alone

SAVED = "checkpoint.pt"
GRACE = 10  # seconds that a run has to save itself when the grid is gone


def spent() -> float:
    """CPU seconds of this process and of its children that have ended, as the system counts."""
    return sum(os.times()[:4])


def orphaned(seconds: float) -> bool:
    """Waits, but no longer than until the end of whoever started this process: its end of the pipe
    is closed then."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


class Watch(threading.Thread):
    """Keeps a run's CPU time in its cpu.json, and stops the run when that is used up, or when the
    grid that it belongs to is gone."""

    def __init__(self, folder: Path, minutes: float, version: str):
        super().__init__(daemon=True)
        self.folder, self.budget, self.told = folder, 60 * minutes or math.inf, ""
        self.lock = threading.Lock()
        # A run that goes on does so from its checkpoint: what came after is lost, and its time too.
        old = read(folder / "cpu.json") if (folder / SAVED).exists() else {}
        self.before = old.get("checkpoint", 0.0)
        at = {step: t for step, t in old.get("evaluations", {}).items() if t <= self.before}
        versions = dict.fromkeys([*old.get("commits", []), version])
        self.cpu = {"seconds": self.before, "checkpoint": self.before, "evaluations": at}
        self.cpu |= {"minutes": minutes, "commits": list(versions)}
        self.known = {name: self.stamp(name) for name in (SAVED, "eval.csv")}
        self.note()

    def stamp(self, name: str) -> int:
        path = self.folder / name
        return path.stat().st_mtime_ns if path.exists() else 0

    def note(self) -> None:
        """What has been used so far, and what of it when something was written."""
        with self.lock:
            self.cpu["seconds"] = seconds = round(self.before + spent(), 2)
            new = {name for name, old in self.known.items() if self.stamp(name) != old}
            for name in new:
                self.known[name] = self.stamp(name)
            if SAVED in new:
                self.cpu["checkpoint"] = seconds
            for row in rows(self.folder) if "eval.csv" in new else []:
                self.cpu["evaluations"].setdefault(row["step"], seconds)
            write(self.folder / "cpu.json", self.cpu)

    def run(self) -> None:
        while not orphaned(1.0):
            self.note()
            if self.cpu["seconds"] >= self.budget:
                self.stop("budget")
        self.stop("orphan")
        time.sleep(GRACE if self.told else 0)
        os._exit(1)

    def stop(self, why: str) -> None:
        """As a user would: the run saves itself. Before it listens the signal would kill it."""
        if not self.told and signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, None):
            self.told = why
            os.kill(os.getpid(), signal.SIGTERM)


def alone(spec: dict) -> None:
    """One run, or one probe, in a process of its own: this one."""
    folder, module = Path(spec["folder"]), None
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "log.txt")
    while True:  # one at a time: a run of a grid that was killed may still be saving itself
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if orphaned(1.0):
                raise SystemExit("Waited for another run in this folder.") from None
        except OSError:
            break  # a file system without locks
    if spec["probe"]:
        module = load(spec["algorithm"])
        options = tyro.cli(module.Args, args=spec["flags"])
        write(folder / "probe.json", probe(module, options, spec["minutes"], spec["probe"]))
        return

    watch = Watch(folder, spec["minutes"], spec["commit"])
    watch.start()
    module = load(spec["algorithm"])
    resume = (folder / SAVED).exists()
    if not resume:  # killed before its first checkpoint, it has nothing to go on from
        (folder / "config.json").unlink(missing_ok=True)
    flags = spec["flags"] + ["--resume"] * resume
    try:
        module.train(tyro.cli(module.Args, args=flags))
    except SystemExit as error:
        if watch.told != "budget" or "Saved at step" not in str(error):
            raise
        print(f"{spec['minutes']:g} CPU minutes are used. {error}")
    finally:
        watch.note()

    import torch

    saved = torch.load(folder / SAVED, map_location="cpu", weights_only=True, mmap=True)
    at = watch.cpu["evaluations"]
    about = {"commit": ", ".join(watch.cpu["commits"]), "threads": torch.get_num_threads()}
    about |= {"cpu_seconds": watch.cpu["seconds"], "steps_reached": saved["step"]}
    about |= {"cpu_seconds_at_evaluations": [at.get(row["step"]) for row in rows(folder)]}
    about |= {"cpu_minutes": spec["minutes"]} if spec["minutes"] else {}
    write(folder / "config.json", read(folder / "config.json") | about)


def fresh_learner(module, options):
    """A learner on all transitions, as train() makes it, and the data and the task."""
    import torch

    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.matmul_precision)
    if options.device.startswith("cuda"):
        torch.cuda.set_stream(torch.cuda.Stream())  # where an update can be captured
    data, task = module.load_dataset(options.dataset, options.env_id)
    data = {key: torch.as_tensor(array, device=options.device) for key, array in data.items()}
    torch.manual_seed(options.seed)
    return module.Learner(data, task, options), data, task


def phases(learner, steps: int) -> tuple[dict, list[str]]:
    """The updates that the training loop calls, by a name, and the name of each step's."""
    updates = [learner.phase(step) for step in steps_of(steps)]
    names = {update: f"phase {i}" for i, update in enumerate(dict.fromkeys(updates))}
    return {name: update for update, name in names.items()}, [names[x] for x in updates]


def steps_of(steps: int) -> range:
    return range(1, steps + 1)


def accelerated(module, options, update):
    """The update as the training loop runs it."""
    cuda = options.device.startswith("cuda") and options.cuda_graph
    return module.graphed(update) if cuda else update


def cpu_of(call, device: str, seconds: float) -> float:
    """CPU seconds of a call, after some to warm up."""
    import torch

    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    for _ in range(5):
        call()
    wait()
    began, calls = spent(), 0
    while spent() - began < seconds:
        call()
        wait()
        calls += 1
    return (spent() - began) / calls


def probe(module, options, minutes: float, evaluations: int) -> dict:
    """What a run's parts cost here, and the --eval-every that gives as many evaluations in the
    time. Episodes are taken to last as long as they may: those of a good policy do."""
    import numpy as np
    import torch

    if getattr(options, "offline", True) is False:
        return {"cpu_minutes": minutes, "eval_every": options.eval_every}  # sac, which acts
    learner, data, task = fresh_learner(module, options)
    start = spent()
    methods, names = phases(learner, options.steps)
    costs = {
        name: cpu_of(accelerated(module, options, method), options.device, 2.0)
        for name, method in methods.items()
    }
    began = spent()
    learner.eval()
    with torch.no_grad():
        few = data["episodes"] <= data["episodes"][min(10_000, len(data["episodes"])) - 1]
        learner.validate({key: column[few] for key, column in data.items()})
        evaluation = spent() - began
        if task["env"] != "none":
            began, limit = spent(), module.make_env(task).spec.max_episode_steps
            row = module.evaluate(learner.policy, task, options.eval_episodes, options.seed)
            evaluation += (spent() - began) * limit / row["length_mean"]
    # Half the time at most goes to evaluations.
    number = max(1, min(evaluations, int(30 * minutes / (evaluation + 1e-9))))
    left = 60 * minutes - start - number * evaluation
    used = np.cumsum([costs[name] for name in names])
    steps = max(1, int(np.searchsorted(used, left)))
    every = max(1, int(float(f"{steps / number:.2g}")))
    found = {"cpu_minutes": minutes, "eval_every": every, "steps_expected": steps}
    found |= {"cpu_seconds_to_start": start, "cpu_seconds_per_step": used[steps - 1] / steps}
    return found | {"cpu_seconds_per_evaluation": evaluation}


# ----------------------------------------------------------------------------- What Ray spreads


def start(folder: Path, spec: dict, threads: int) -> None:
    """A process for a run or a probe. One that the system killed begins again, from its checkpoint,
    up to three times. Raises its last line where it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    where = spec["cwd"] if Path(spec["cwd"]).is_dir() else ROOT
    command = [sys.executable, str(FOLDER / "run.py"), "--alone", json.dumps(spec)]
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    for _ in range(4):
        with open(folder / "log.txt", "a") as log:  # its input is how it hears of this one's end
            streams = dict(stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
            code = subprocess.Popen(command, cwd=where, env=env, **streams).wait()
        if code >= 0:
            break
    if code:
        lines = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
        killed = f"killed by signal {-code}, four times; its log ends: " if code < 0 else ""
        raise RuntimeError(killed + (lines[-1].strip() if lines else f"exit status {code}"))


def try_out(folder: Path, spec: dict, threads: int) -> int:
    """The --eval-every of a cell of the grid."""
    start(folder, spec, threads)
    return read(folder / "probe.json")["eval_every"]


def work(job: Job, spec: dict, threads: int, eval_every: int = 0) -> str:
    """One run. Returns one line about it."""
    if eval_every:
        spec["flags"] = [*spec["flags"], "--eval-every", str(eval_every)]
    start(job.folder, spec, threads)
    return f"{job.name}: {summary(job.folder)}"


def numbers(written: list[dict[str, str]], key: str) -> list[float]:
    """A column of eval.csv; NaN where it is empty."""
    return [float(row.get(key) or "nan") for row in written]


def summary(folder: Path) -> str:
    """What a run came to, in a few words."""
    written, config = rows(folder), read(folder / "config.json")
    said = [f"{config.get('cpu_seconds', math.nan) / 60:.1f} CPU minutes"]
    said.append(f"{config.get('steps_reached', 0):,} steps")
    if not written:
        return ", ".join(["no evaluation", *said])
    names = {"score": "", "return_mean": "return "}
    names |= {key: f"{key} " for key in written[-1] if key and key.startswith("validation/")}
    for key, name in names.items():
        values = numbers(written, key)
        ends = values[-5:]
        if all(map(math.isfinite, ends)):
            best = f", best {max(values):.4g}" if "/" not in key else ""
            return ", ".join([f"{name}final {sum(ends) / len(ends):.4g}{best}", *said])
    return ", ".join(["no score", *said])


# ------------------------------------------------------------------------------------ The grid


def progress(jobs: list[Job], minutes: float, side_by_side: int) -> tuple[float, float]:
    """Runs that are done, with their fractions, and the seconds that the others will take."""
    done, durations, left = 0.0, {}, []
    for job in jobs:
        written = [] if job.finished else rows(job.folder)
        step, share = int(written[-1]["step"] or 0) if written else 0, float(job.finished)
        if not job.finished:
            job.done, share = step, min(step / job.steps, 1.0)
            used = read(job.folder / "cpu.json").get("seconds", 0.0)
            share = max(share, min(used / (60 * minutes), 1.0)) if minutes else share
            if step:
                lasts = float(written[-1]["seconds"] or 0) * job.steps / step
                durations.setdefault(job.algorithm, []).append(lasts)
        elif (written := rows(job.folder)) and not minutes:
            durations.setdefault(job.algorithm, []).append(float(written[-1]["seconds"] or 0))
        done += share
        left.append((job.algorithm, 1 - share))
    means = {name: sum(values) / len(values) for name, values in durations.items()}
    other = sum(means.values()) / len(means) if means else math.nan
    lasts = [share * (60 * minutes or means.get(name, other)) for name, share in left if share]
    return done, max(sum(lasts) / side_by_side, max(lasts)) if lasts else 0.0


def main(args: Args) -> None:
    if args.cpus and args.address:
        raise SystemExit(
            "--cpus is of this machine alone: a cluster (--address) has its own number."
        )
    jobs = plan(args)
    waiting = [job for job in jobs if not job.finished]
    print(f"{len(jobs)} runs, {len(jobs) - len(waiting)} of them done, {len(waiting)} to do")
    probes = bool(args.cpu_minutes)
    if args.dry_run:
        for job in waiting:
            begun = f"from step {job.done:,}" if job.done else ""
            budget = f"for {args.cpu_minutes:g} CPU minutes" if args.cpu_minutes else ""
            comment = "  # " + ", ".join(filter(None, (begun, budget))) if begun or budget else ""
            name = job.algorithm.removesuffix(".py")
            script = f"{name}.py" if name != job.algorithm else f"algorithms/{name}.py"
            print(f"python {script} {shlex.join(job.flags)}{comment}")
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
    os.environ.setdefault("RAY_kill_child_processes_on_worker_exit", "0")  # they save themselves
    quiet = dict(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(address=args.address or None, num_cpus=args.cpus or None, **quiet)
    has, needs = ray.cluster_resources(), {"CPU": args.cpus_per_run, "GPU": args.gpus_per_run}
    fits = [int(has.get(key, 0) / need) for key, need in needs.items() if need]
    if not min(fits, default=1):
        raise SystemExit(
            f"No run fits: there are {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs."
        )
    side_by_side = min(*fits, len(waiting), len(jobs))
    resources = {"num_cpus": args.cpus_per_run, "num_gpus": args.gpus_per_run}
    remote = ray.remote(max_retries=3, **resources)(work)
    probing = ray.remote(max_retries=3, **resources)(try_out)
    threads = max(1, int(args.cpus_per_run))
    common = {"minutes": args.cpu_minutes, "commit": commit(), "cwd": str(Path.cwd())}
    running, every = {}, {}
    for job in waiting:
        cell = job.folder.parent
        spec = common | {"algorithm": job.algorithm, "flags": job.flags}
        if probes and "--eval-every" not in job.flags and cell not in every:
            known = read(cell / "probe.json")
            asked = {"folder": str(cell), "probe": args.evaluations}
            every[cell] = known.get("eval_every")
            if known.get("cpu_minutes") != args.cpu_minutes:
                every[cell] = probing.remote(cell, spec | asked, threads)
        spec |= {"folder": str(job.folder), "probe": 0}
        running[remote.remote(job, spec, threads, every.get(cell, 0))] = job
    failed, said = [], time.time()

    form = "{percentage:3.0f}%|{bar}| {n:.1f} of {total} runs, {postfix}"
    bar = tqdm(total=len(jobs), bar_format=form, disable=None)
    try:
        while running:
            finished, _ = ray.wait(list(running), timeout=2)
            for task in finished:
                job = running.pop(task)
                try:
                    line = ray.get(task)
                    job.finished = True
                except Exception as error:
                    reason = str(getattr(error, "cause", error)).strip().splitlines()[-1]
                    failed.append(f"{job.name}: {reason}")
                    line = f"failed, {failed[-1]}"
                bar.write(line)
            live = [job for job in jobs if job.finished or job in running.values()]
            bar.n, seconds = progress(live, args.cpu_minutes, side_by_side)
            left = f"{tqdm.format_interval(seconds)} left" if seconds == seconds else "time unknown"
            bar.set_postfix_str(left)
            if bar.disable and time.time() - said > 60:
                said = time.time()
                print(f"{bar.n:.1f} of {len(jobs)} runs, {left}", flush=True)
    except KeyboardInterrupt:
        raise SystemExit("Stopped; the same line goes on from the checkpoints.") from None
    finally:
        bar.close()
        ray.shutdown()
    if failed:
        raise SystemExit(f"{len(failed)} of {len(jobs)} runs failed:\n" + "\n".join(failed))
    print(
        f"All {len(jobs)} runs are done; benchmark_results/report.py --runs {args.runs} shows them."
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--alone"]:
        alone(json.loads(sys.argv[2]))
    else:
        main(tyro.cli(Args))
