"""benchmark_results/: the runner's plan, a grid that is killed in the middle, CORL's stand-ins, the
report's numbers, the clock."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, load

sys.path.insert(0, str(ROOT / "benchmark_results"))

import corl
import official_a2po
import run
import speed

SMALL = ("hidden-dim=16", "batch-size=16", "eval-every=200", "eval-episodes=2")


def grid(folder: Path, **flags) -> run.Args:
    flags = dict(algorithms=("bc",), datasets=("pendulum-medium-replay",), seeds=(0, 1)) | flags
    return run.Args(runs=folder, steps=400, device="cpu", override=SMALL, **flags)


def write(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True)
    (folder / "eval.csv").write_text(f"step,seconds,score\n{steps},1.0,50.0\n")


def test_every_preset_is_understood_by_its_file(tmp_path):
    for algorithm, patterns in run.PRESETS.items():
        defaults = load(algorithm).Args()
        for dataset in patterns:
            (job,) = run.plan(run.Args((algorithm,), (dataset,), (0,), runs=tmp_path))
            args = run.tyro.cli(load(algorithm).Args, args=job.flags)
            changed = [k for k, v in vars(args).items() if v != getattr(defaults, k)]
            named = {word[2:].replace("-", "_") for word in patterns[dataset].split()[::2]}
            assert set(changed) <= named | {"dataset", "run_dir", "save_every"}
            assert (args.dataset, args.seed) == (dataset, 0)


def test_plan_skips_what_is_done_and_continues_the_rest(tmp_path):
    write(tmp_path / "bc" / "pendulum-medium-replay" / "seed0", 400)
    write(tmp_path / "bc" / "pendulum-medium-replay" / "seed1", 200)
    with pytest.raises(SystemExit, match="seed1 ends at step 200 of 400 and has no checkpoint"):
        run.plan(grid(tmp_path))
    (tmp_path / "bc" / "pendulum-medium-replay" / "seed1" / "checkpoint.pt").touch()
    assert [job.done for job in run.plan(grid(tmp_path))] == [400, 200]
    assert [job.done for job in run.plan(grid(tmp_path, tag="small"))] == [0, 0]


def test_dry_run_prints_what_is_left(tmp_path, capsys):
    write(tmp_path / "bc" / "pendulum-medium-replay" / "seed0", 400)
    run.main(grid(tmp_path, dry_run=True))
    out = capsys.readouterr().out
    assert "2 runs, 1 of them done, 1 to do" in out
    assert "--seed 1" in out and "--seed 0" not in out and "--hidden-dim 16" in out


def test_unknown_algorithm(tmp_path):
    with pytest.raises(SystemExit, match="--algorithms dreamer: no such file; there are a2po, bc"):
        run.plan(grid(tmp_path, algorithms=("dreamer",)))


def start(folder: Path, steps: int) -> subprocess.Popen:
    words = ["--algorithms", "bc", "--datasets", "pendulum-medium-replay", "--seeds", "0", "1"]
    words += ["--steps", str(steps), "--save-every", "500", "--override", *SMALL[:2]]
    words += ["eval-every=500", "eval-episodes=2", "--device", "cpu", "--runs", str(folder)]
    script = str(ROOT / "benchmark_results" / "run.py")
    return subprocess.Popen([sys.executable, script, *words], start_new_session=True)


def scores(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """(step, return) of every evaluation, by run."""
    found = {}
    for path in sorted(folder.glob("*/*/*/eval.csv")):
        with open(path) as file:
            rows = [(row["step"], row["return_mean"]) for row in csv.DictReader(file)]
        found[path.parent.name] = rows
    return found


def test_a_killed_grid_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    pytest.importorskip("ray", reason="benchmark_results/requirements.txt is not installed")
    steps, killed, whole = 20_000, tmp_path / "killed", tmp_path / "whole"
    process = start(killed, steps)
    while not list(killed.glob("*/*/*/checkpoint.pt")):  # somebody is in the middle
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(10)  # nobody goes on alone, to write beside the next run
    before = scores(killed)
    assert before and any(int(rows[-1][0]) < steps for rows in before.values())
    time.sleep(3)
    assert scores(killed) == before
    assert start(killed, steps).wait() == 0
    assert start(whole, steps).wait() == 0
    assert scores(killed) == scores(whole)
    assert {rows[-1][0] for rows in scores(whole).values()} == {str(steps)}


# What CORL's files have in common, around a policy that does what no learner would.
CORL_LIKE = """
from dataclasses import dataclass
import d4rl, gym, numpy as np, pyrallis, wandb

@dataclass
class TrainConfig:
    device: str = "cuda"
    env: str = "halfcheetah-medium-v2"
    seed: int = 0
    eval_freq: int = 5000
    max_timesteps: int = 1000000
    scale: float = 1.0
    targets: tuple = (12000.0, 6000.0)

@pyrallis.wrap()
def train(config):
    assert config.targets == (3600.0, 1800.0)
    env = gym.make(config.env)
    data = d4rl.qlearning_dataset(env)
    assert data["rewards"].shape == data["terminals"].shape == (len(data["actions"]),)
    assert np.abs(data["actions"]).max() <= 1
    env = gym.wrappers.TransformObservation(env, lambda s: s + 100)
    env = gym.wrappers.TransformReward(env, lambda r: 2 * r)
    wandb.init(project="x")
    wandb.run.save()
    for t in range(config.max_timesteps):
        wandb.log({"loss": 0.0}, step=t)
        if (t + 1) % config.eval_freq == 0:
            env.seed(config.seed)
            env.action_space.seed(config.seed)
            state, done, total, steps = env.reset(), False, 0.0, 0
            while not done:
                assert state[0] > 90
                state, reward, done, _ = env.step(np.array([config.scale * 0.5]))
                total, steps = total + reward / 2, steps + 1
            assert steps == 200
            wandb.log({"d4rl_normalized_score": env.get_normalized_score(total) * 100}, step=t)
"""


def test_corl_runs_on_our_data_and_is_scored_as_we_score(tmp_path):
    (tmp_path / "td3_bc.py").write_text(CORL_LIKE)
    options = dict(dataset="pendulum-medium-replay", seed=3, steps=40, eval_every=20)
    options |= dict(run_dir=str(tmp_path / "run"), override=("scale=2.0", "targets=3600,1800"))
    corl.main(corl.Args(tmp_path / "td3_bc.py", **options))
    with open(tmp_path / "run" / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["20", "40"]
    # The same constant torque, 1.0 of [-1, 1], from the same start in the environment itself.
    env = load("bc").make_env("Pendulum-v1")
    env.reset(seed=3)
    total = sum(env.step(np.array([2.0], np.float32))[1] for _ in range(200))
    low, high = load("bc").load_dataset("pendulum-medium-replay").references
    assert float(rows[0]["return_mean"]) == pytest.approx(total)
    assert float(rows[0]["score"]) == pytest.approx(100 * (total - low) / (high - low))
    with pytest.raises(SystemExit, match="holds a run: --run-dir goes elsewhere"):
        corl.main(corl.Args(tmp_path / "td3_bc.py", **options))
    with pytest.raises(SystemExit, match="not there; fetch"):
        corl.main(corl.Args(tmp_path / "cql.py"))


# The face of the official A2PO, around a policy that pushes as the states' mean tells it.
A2PO_LIKE = """
import numpy as np

class OffRL:
    def __init__(self, state_dim, action_dim, max_action, min_v, max_v, device, alpha, vae_step):
        assert (state_dim, action_dim, max_action, alpha, vae_step) == (3, 1, 1.0, 1.0, 200_000)
        assert min_v < -100 * 100 and max_v <= 0
        self.total_it = 0

    def policy_train(self, replay_buffer, logger, algo, env, clip=False, batch_size=256):
        self.total_it += 1
        s, a, s_next, r, not_done = replay_buffer.sample(batch_size)
        assert s.shape == s_next.shape == (256, 3) and r.shape == not_done.shape == (256, 1)
        assert a.abs().max() <= 1 and s.mean().abs() < 0.5 and not_done.min() == 1
        assert -1700 < r.min() < -100  # Pendulum's -16.3 to 0, times 100

    def select_action(self, state, level=1.0):
        assert state.shape == (1, 3)
        return np.array([0.5])
"""


def test_official_a2po_runs_on_our_data(tmp_path):
    (tmp_path / "a2po.py").write_text(A2PO_LIKE)
    options = dict(dataset="pendulum-medium-replay", seed=3, steps=30, eval_every=20)
    options |= dict(eval_episodes=1, run_dir=str(tmp_path / "run"))
    official_a2po.main(official_a2po.Args(tmp_path, **options))
    with open(tmp_path / "run" / "eval.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["20", "30"]
    env = load("bc").make_env("Pendulum-v1")
    env.reset(seed=103)
    total = sum(env.step(np.array([1.0], np.float32))[1] for _ in range(200))  # 0.5 of ±2
    assert float(rows[0]["return_mean"]) == pytest.approx(total)
    with pytest.raises(SystemExit, match="holds a run: --run-dir goes elsewhere"):
        official_a2po.main(official_a2po.Args(tmp_path, **options))
    with pytest.raises(SystemExit, match=r"no a2po\.py; get github"):
        official_a2po.main(official_a2po.Args(tmp_path / "elsewhere"))


def test_report_counts_seeds_intervals_and_who_is_better(tmp_path, monkeypatch):
    pytest.importorskip("rliable", reason="benchmark_results/requirements.txt is not installed")
    report = importlib.import_module("report")
    ends = {
        "a2po": (90, 91, 92),
        "bc": (10, 95, 20),
        "td3_bc": (50,),
    }  # three of nine pairs are lost
    for algorithm, seeds in ends.items():
        for seed, end in enumerate(seeds):
            folder = tmp_path / "runs" / algorithm / "hopper-medium" / f"seed{seed}"
            folder.mkdir(parents=True)
            lines = [f"{step},{6 * step},{end if step > 5 else 99}" for step in range(1, 11)]
            (folder / "eval.csv").write_text("\n".join(["step,seconds,score", *lines]))
    monkeypatch.setattr(report, "FOLDER", tmp_path)
    runs = report.read_runs()
    rows = report.table(runs).splitlines()[2:]
    assert rows[0].startswith("| hopper-medium | a2po | 10 | 3 | 91.0 [90.")
    assert rows[0].endswith("| 99.0 | 1 |")  # best is the best evaluation, not the best seed
    assert rows[2].startswith("| hopper-medium | td3_bc | 10 | 1 | 50.0 |")  # one seed: no interval
    together = report.aggregate(runs)
    assert "| a2po | 3 | 91.0 [" in together
    assert "| bc | 3 | 41.7 [" in together and "| 0.67 [" in together
    assert "td3_bc" not in together


def test_report_shows_versions_beside_their_file():
    pytest.importorskip("rliable", reason="benchmark_results/requirements.txt is not installed")
    report = importlib.import_module("report")
    names = ("a2po", "bc", "td3_bc", "corl_td3_bc", "iql", "official_a2po")
    runs = [report.Run(name, "x", 0, np.ones(1), np.ones(1), 1.0) for name in names]
    runs.append(report.Run("bc", "y", 0, np.ones(1), np.ones(1), 1.0))
    shown = [(run.algorithm, run.dataset) for run in report.beside(runs)]
    assert shown == [("a2po", "x"), ("td3_bc", "x"), ("corl_td3_bc", "x"), ("official_a2po", "x")]


def test_report_sets_runs_of_equal_steps_side_by_side():
    pytest.importorskip("rliable", reason="benchmark_results/requirements.txt is not installed")
    report = importlib.import_module("report")

    def cell(name, dataset, steps, *ends):
        at = np.array([steps / 2, steps])
        return [
            report.Run(name, dataset, str(seed), at, np.array([end, end]), 1.0)
            for seed, end in enumerate(ends)
        ]

    runs = cell("bc", "x", 10, 1.0, 3.0) + cell("iql", "x", 10, 7.0) + cell("iql", "y", 10, 8.0)
    runs += cell("corl_iql", "x", 10, 5.0, 6.0) + cell("corl_iql", "y", 20, 9.0)
    runs += cell("cql", "x", 20, 0.5) + cell("iql_wide", "y", 10, 9.5)
    lines = report.side_by_side(runs).splitlines()
    assert lines[0] == "| 10 steps | bc | iql |"
    assert lines[2:] == ["| x | 2.0 | 7.0 |", "| y |  | 8.0 |"]
    lines = report.against_corl(runs).splitlines()[2:]
    assert lines == ["| x | 10 | iql | 1 | 7.0 | 2 | 5.5 (5.0 to 6.0) |"]


def test_report_cuts_every_file_where_its_shortest_run_ends():
    pytest.importorskip("rliable", reason="benchmark_results/requirements.txt is not installed")
    report = importlib.import_module("report")

    def run(name, dataset, seed, steps):
        at = np.arange(10.0, steps + 1, 10)  # the score at a step is the step
        return report.Run(name, dataset, str(seed), at, at, 1.0)

    runs = [run(name, d, s, 20) for name in ("bc", "iql") for d in "xy" for s in range(3)]
    runs[0].steps, runs[0].scores = np.arange(10.0, 51, 10), np.arange(10.0, 51, 10)
    runs += [run("bc", "z", s, 10) for s in range(3)] + [run("iql", "z", 0, 10)]  # one file alone
    runs += [run("corl_iql", "x", s, 10) for s in range(3)] + [
        run("td3_bc", "x", s, 10) for s in "12"
    ]
    runs += [run("a2po", "y", s, 10) for s in range(3)]
    lines = report.every_file(runs).splitlines()
    assert lines[0] == "| file | steps | x | y |"
    wanted = ["| a2po | 10 |  | 10.0 |", "| bc | 20 | 20.0 | 20.0 |", "| iql | 20 | 20.0 | 20.0 |"]
    assert lines[2:] == wanted
    assert report.every_file([]).splitlines()[0] == "| file | steps |  |"

    short = [run("bc", "x", 0, 10), run("iql", "y", 0, 10)]
    long = [run(name, d, 0, 90) for name in ("bc", "iql") for d in "xz"]
    more = [run for run in report.with_long(short, long) if run not in short]
    assert [(run.algorithm, run.dataset, run.steps[-1]) for run in more] == [("iql", "x", 90)]


def test_speed_weighs_the_phases_by_their_share(monkeypatch):
    """Three quarters of a run take 10 ms per step, the rest 1 ms for two."""

    class Learner:
        def __init__(self, data, args):
            self.steps = args.steps

        def slow(self):
            return 100.0

        def quick(self):
            return 1000.0

        def phase(self, step):
            return (self.slow, 1) if step < 0.75 * self.steps else (self.quick, 2)

    module = load("bc", fresh=True)
    module.Learner, module.evaluate = Learner, lambda *_: {}
    monkeypatch.setattr(speed, "load", lambda _: module)
    monkeypatch.setattr(speed, "calls_per_second", lambda call, seconds, device: call())
    data = str(ROOT / "datasets" / "pendulum-medium-replay.hdf5")
    row = speed.ours(speed.Args(device="cpu"), "bc", data)
    assert 1e3 / row["steps_per_second"] == pytest.approx(0.75 * 10 + 0.25 * 0.5)
    assert row["minutes_per_million"] == pytest.approx(1e6 / 60 / row["steps_per_second"])
    assert torch.get_num_threads() == 1


def test_calls_per_second_counts_what_a_call_takes():
    rate = speed.calls_per_second(lambda: time.sleep(0.02), 0.3, torch.device("cpu"))
    assert 10 < rate < 50.1  # a busy machine is slower, none is faster


def test_operations_are_products_and_whatever_computes():
    a, b = torch.randn(2, 4, 4)
    flop, kernels = speed.operations(lambda: torch.relu(a.T @ b).view(2, 8).sum(), 2)
    assert flop == 2 * 4**3 / 2 and kernels == 3 / 2  # two steps a call; views are free
