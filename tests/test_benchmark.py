"""benchmark_results/: the runner's plan, runs that are killed or out of time, a stranger's grid,
CORL's stand-ins, the report's numbers, the clock."""

import csv
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
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
SCRIPT = str(ROOT / "benchmark_results" / "run.py")
DATA = "pendulum-medium-replay"


def grid(folder: Path, **flags) -> run.Args:
    flags = dict(algorithms=("bc",), datasets=(DATA,), seeds=(0, 1), override=SMALL) | flags
    return run.Args(runs=folder, steps=400, device="cpu", **flags)


def write(folder: Path, steps: int, **config) -> Path:
    """A run that has ended, or with `config` one that ended here."""
    folder.mkdir(parents=True)
    (folder / "eval.csv").write_text(f"step,seconds,score\n{steps},1.0,50.0\n")
    if config:
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "cpu.json").write_text(json.dumps({"seconds": 1.0, "checkpoint": 1.0}))
    return folder


# ---------------------------------------------------------------------------------------- Plan


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


@pytest.mark.parametrize(
    "dataset, like",
    [
        ("hopper-medium-replay-v2", "hopper-medium-replay"),  # D4RL's names
        ("walker2d-medium-v0", "walker2d-medium"),
        ("mujoco/hopper/medium-v0", "hopper-medium"),  # Minari's
        ("D4RL/hopper/medium-replay-v2", "hopper-medium-replay"),
        ("/data/D4RL/halfcheetah/medium-expert-v2/", "halfcheetah-medium-expert"),  # its folder
        ("data/halfcheetah_medium_replay-v2.hdf5", "halfcheetah-medium-replay"),  # D4RL's files
        ("hopper-medium.npz", "hopper-medium"),
        ("hopper-random-medium-expert", ""),  # mixtures have no preset
        ("mujoco/hopper/expert-v0", ""),
        ("half-hopper-medium", ""),
    ],
)
def test_presets_know_the_names_of_others(dataset, like, tmp_path):
    wanted = run.PRESETS["rebrac"][like] if like else ""
    assert run.preset("rebrac", dataset) == wanted
    (job,) = run.plan(run.Args(("rebrac",), (dataset,), (0,), runs=tmp_path))
    assert ("--actor-bc" in job.flags) == bool(like) and dataset in job.flags


def test_plan_skips_what_is_done_and_continues_the_rest(tmp_path):
    write(tmp_path / "bc" / DATA / "seed0", 400)
    folder = write(tmp_path / "bc" / DATA / "seed1", 200)
    for name in ("checkpoint.pt", "cpu.json"):  # without its account it could not be continued
        with pytest.raises(SystemExit, match="seed1 ends at step 200 of 400 and has no checkpoint"):
            run.plan(grid(tmp_path))
        (folder / name).write_text('{"seconds": 1}')
    assert [(job.done, job.finished) for job in run.plan(grid(tmp_path))] == [
        (400, True),
        (200, False),
    ]
    assert [job.done for job in run.plan(grid(tmp_path, tag="small"))] == [0, 0]


def test_plan_calls_a_run_finished_that_used_its_time(tmp_path):
    about = dict(cpu_seconds=61.0, cpu_minutes=1.0, steps_reached=200, args={})
    folder = write(tmp_path / "bc" / DATA / "seed0", 200, **about)
    (folder / "checkpoint.pt").touch()

    def finished(**flags):
        return run.plan(grid(tmp_path, seeds=(0,), **flags))[0].finished

    assert finished(cpu_minutes=1.0)
    assert not finished(cpu_minutes=2.0) and not finished()  # both go on from its checkpoint
    with pytest.raises(SystemExit, match="is a run with 1 CPU minutes: remove it, or name another"):
        finished(cpu_minutes=0.5)


def test_plan_takes_no_run_for_another(tmp_path):
    about = dict(cpu_seconds=9.0, steps_reached=400, args={"hidden_dim": 256, "device": "cuda"})
    write(tmp_path / "bc" / DATA / "seed0", 400, **about)
    with pytest.raises(SystemExit, match="seed0 is a run with hidden_dim 256: remove it, or name"):
        run.plan(grid(tmp_path))
    assert run.plan(grid(tmp_path, override=("hidden-dim=256",)))[0].finished
    with pytest.raises(SystemExit, match=r"Two runs of this grid would write to .*data/seed0"):
        run.plan(grid(tmp_path, datasets=("a/data.npz", "b/data.npz"), seeds=(0,)))


def test_overrides_may_be_of_one_algorithm(tmp_path):
    mine = ("hidden-dim=16", "td3_bc:env-id=toy:Toy-v0", "env-id=none", "bc:steps=7")
    args = grid(tmp_path, algorithms=("bc", "td3_bc"), seeds=(0,), override=mine)
    bc, td3_bc = run.plan(args)
    assert bc.steps == 7 and td3_bc.steps == 400
    assert "toy:Toy-v0" in td3_bc.flags and "toy:Toy-v0" not in bc.flags and "none" in bc.flags
    with pytest.raises(SystemExit, match="--override iql:steps=7: iql is none of --algorithms"):
        run.plan(grid(tmp_path, override=("iql:steps=7",)))


def test_dry_run_prints_what_is_left(tmp_path, capsys):
    write(tmp_path / "bc" / DATA / "seed0", 400)
    run.main(grid(tmp_path, dry_run=True))
    out = capsys.readouterr().out
    assert "2 runs, 1 of them done, 1 to do" in out
    assert "--seed 1" in out and "--seed 0" not in out and "--hidden-dim 16" in out


def test_unknown_algorithm(tmp_path):
    with pytest.raises(SystemExit, match="--algorithms dreamer: no such file; there are a2po, bc"):
        run.plan(grid(tmp_path, algorithms=("dreamer",)))


def test_progress_weighs_what_is_left(tmp_path):
    """Done, in the middle after 30 s, not begun: 0.5 + 1 runs of a minute each, two at a time."""
    jobs = run.plan(grid(tmp_path, seeds=(0, 1, 2)))
    folder = write(jobs[1].folder, 200)
    (folder / "eval.csv").write_text("step,seconds,score\n200,30.0,50.0\n")
    jobs[0].finished = True
    done, left = run.progress(jobs, 0, 2)
    assert done == 1.5 and left == pytest.approx(60)  # the last one alone takes as long
    (folder / "cpu.json").write_text('{"seconds": 45}')
    done, left = run.progress(jobs, 1.0, 1)
    assert done == 1.75 and left == pytest.approx(15 + 60)


def test_the_version_of_the_code_is_named():
    found = run.commit()
    assert found == "unknown" or len(found.rstrip("+")) == 40


# --------------------------------------------------------------------------------- A run alone


def alone(folder: Path, steps: int, minutes: float = 0, every: int = 500) -> subprocess.Popen:
    """What the runner starts for each run, started without Ray."""
    flags = ["--dataset", DATA, "--run-dir", str(folder), "--steps", str(steps), "--device", "cpu"]
    flags += ["--hidden-dim", "16", "--batch-size", "16", "--eval-episodes", "2"]
    flags += ["--eval-every", str(every), "--save-every", "1000"]
    spec = dict(algorithm="bc", flags=flags, folder=str(folder), minutes=minutes, commit="abc")
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, SCRIPT, "--alone", json.dumps(spec | dict(probe=0))]
    with open(folder / "log.txt", "a") as log:
        streams = dict(stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT)
        return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **streams)


def evaluations(folder: Path) -> list[tuple[str, str]]:
    return [(row["step"], row["return_mean"]) for row in run.rows(folder)]


def wait_for(process: subprocess.Popen, number: int, folder: Path) -> None:
    """Until a run has been evaluated so often."""
    began = time.time()
    while len(run.rows(folder)) < number:
        assert process.poll() is None and time.time() - began < 120
        time.sleep(0.1)


def test_a_run_stops_when_its_cpu_time_is_used_and_goes_on_with_more(tmp_path):
    folder = tmp_path / "seed0"
    assert alone(folder, 10**6, minutes=0.15).wait() == 0
    first, config = evaluations(folder), run.read(folder / "config.json")
    assert config["cpu_minutes"] == 0.15 and config["commit"] == "abc" and config["threads"] == 1
    assert 9 <= config["cpu_seconds"] < 13  # a second or so after the time
    assert 0 < int(first[-1][0]) <= config["steps_reached"] < 10**6
    at = config["cpu_seconds_at_evaluations"]
    assert len(at) == len(first) and at == sorted(at) and 0 < at[0] <= at[-1] < 13
    assert "0.15 CPU minutes are used. Saved at step" in (folder / "log.txt").read_text()

    assert alone(folder, 10**6, minutes=0.25).wait() == 0
    more, config = evaluations(folder), run.read(folder / "config.json")
    assert more[: len(first)] == first and len(more) > len(first)
    assert 15 <= config["cpu_seconds"] < 19 and config["cpu_minutes"] == 0.25
    assert config["cpu_seconds_at_evaluations"][: len(first)] == at


def test_a_killed_run_loses_what_came_after_its_checkpoint(tmp_path):
    killed, whole, steps = tmp_path / "killed", tmp_path / "whole", 8000
    process = alone(killed, steps)
    wait_for(process, 3, killed)
    time.sleep(1.5)  # its account is at most a second old
    process.kill()
    process.wait()
    cpu = run.read(killed / "cpu.json")
    assert 0 < cpu["checkpoint"] <= cpu["seconds"]
    assert not run.read(killed / "config.json").get("cpu_seconds")
    process = alone(killed, steps)
    time.sleep(0.5)
    assert run.read(killed / "cpu.json")["checkpoint"] <= cpu["checkpoint"]
    assert process.wait() == 0 and alone(whole, steps).wait() == 0
    assert evaluations(killed) == evaluations(whole) and evaluations(whole)[-1][0] == str(steps)
    seconds = [run.read(folder / "config.json")["cpu_seconds"] for folder in (killed, whole)]
    assert cpu["checkpoint"] < seconds[0] < 3 * seconds[1]


def test_a_run_saves_itself_and_ends_when_its_grid_is_gone(tmp_path):
    process = alone(tmp_path, 10**6)
    wait_for(process, 1, tmp_path)
    other = alone(tmp_path, 10**6)  # of the next grid, too early: it waits, and leaves with its own
    time.sleep(6)
    other.stdin.close()
    assert other.wait(20) == 1
    process.stdin.close()
    assert process.wait(20) == 1
    assert "Saved at step" in (tmp_path / "log.txt").read_text()
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert saved >= int(evaluations(tmp_path)[-1][0])


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path):
    (tmp_path / "config.json").write_text('{"args": {}}')
    assert alone(tmp_path, 1000).wait() == 0
    assert [step for step, _ in evaluations(tmp_path)] == ["500", "1000"]


def test_the_probe_finds_how_many_steps_fit(monkeypatch):
    """A step costs 0.1 CPU seconds in the first half of a run and 0.2 then; an evaluation costs 5,
    at full length it would cost 50; validation losses cost 1, and 20 are spent before."""
    clock = [20.0]
    monkeypatch.setattr(run, "spent", lambda: clock[0])

    class Learner(torch.nn.Module):
        def __init__(self, data, task, args):
            super().__init__()
            self.steps, self.policy = args.steps, None

        def first(self):
            clock[0] += 0.1

        def second(self):
            clock[0] += 0.2

        def phase(self, step):
            return self.first if step <= self.steps / 2 else self.second

        def validate(self, data):
            clock[0] += 1.0

    def evaluate(policy, task, episodes, seed):
        clock[0] += 5.0
        return {"length_mean": 20.0}  # Pendulum's episodes have 200 steps

    module = load("bc", fresh=True)
    module.Learner, module.evaluate = Learner, evaluate
    # 20 minutes less 20 s and less 11 evaluations of 51 s (half of the time): 619 s of training.
    for steps, expected, every in ((2000, 2000, 180), (6000, 4595, 420), (20_000, 6190, 560)):
        options = module.Args(dataset=DATA, steps=steps, device="cpu")
        clock[0] = 20.0
        found = run.probe(module, options, 20, 15)
        assert found["cpu_seconds_per_evaluation"] == pytest.approx(51)
        assert abs(found["steps_expected"] - expected) <= 2 and found["eval_every"] == every


# ------------------------------------------------------------------------------------ The grid


def start(folder: Path, steps: int) -> subprocess.Popen:
    words = ["--algorithms", "bc", "--datasets", DATA, "--seeds", "0", "1"]
    words += ["--steps", str(steps), "--save-every", "500", "--override", *SMALL[:2]]
    words += ["eval-every=500", "eval-episodes=2", "--device", "cpu", "--runs", str(folder)]
    return subprocess.Popen([sys.executable, SCRIPT, *words], start_new_session=True)


def scores(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """(step, return) of every evaluation, by run."""
    return {path.name: evaluations(path) for path in sorted(folder.glob("*/*/seed*"))}


def test_a_killed_grid_goes_on_and_ends_as_an_undisturbed_one(tmp_path):
    pytest.importorskip("ray", reason="benchmark_results/requirements.txt is not installed")
    steps, killed, whole = 8000, tmp_path / "killed", tmp_path / "whole"
    process = start(killed, steps)
    while not list(killed.glob("*/*/*/eval.csv")):  # somebody is in the middle
        assert process.poll() is None
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(10)  # nobody goes on alone, to write beside the next run
    before = scores(killed)
    assert before and any(int(rows[-1][0]) < steps for rows in before.values() if rows)
    time.sleep(3)
    assert scores(killed) == before
    assert start(killed, steps).wait() == 0
    assert start(whole, steps).wait() == 0
    assert scores(killed) == scores(whole)
    assert {rows[-1][0] for rows in scores(whole).values()} == {str(steps)}


def snapshot() -> dict[Path, bytes]:
    """What is ours: every text of the results, and the pages that show them."""
    ours = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    ours += [path for path in (ROOT / "benchmark_results").rglob("*.*") if path.is_file()]
    return {path: path.read_bytes() for path in ours if "__pycache__" not in path.parts}


def test_a_strangers_grid_in_an_empty_folder(tmp_path, pendulum, toy_env):
    """Own data in an own environment, and in none; CPU time; a run that fails; then its report."""
    pytest.importorskip("ray", reason="benchmark_results/requirements.txt is not installed")
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(tmp_path / "toy_module.py", home)
    n, rng = 400, np.random.default_rng(0)
    ends = np.arange(1, n + 1) % 20 == 0
    columns = dict(observations=rng.normal(size=(n, 2)), actions=rng.uniform(-1, 3, (n, 1)))
    columns |= dict(rewards=rng.normal(size=n), terminals=np.zeros(n, bool), timeouts=ends)
    np.savez(home / "mine.npz", **columns, action_low=[-1.0], action_high=[3.0])

    words = ["--algorithms", "bc", "td3_bc", "--datasets", "mine.npz", "nobodys", "--seeds", "0"]
    words += ["--cpu-minutes", "0.15", "--steps", "1000000", "--device", "cpu", "--runs", "grid"]
    words += ["--override", *SMALL[:2], "eval-episodes=2", "bc:env-id=none"]
    words += [f"td3_bc:env-id={toy_env}"]
    options = dict(cwd=home, capture_output=True, text=True)
    before = snapshot()
    done = subprocess.run([sys.executable, SCRIPT, *words], **options)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 of 4 runs failed:\nbc nobodys seed 0: No data set 'nobodys'" in done.stderr
    assert "td3_bc nobodys seed 0: No data set 'nobodys'" in done.stderr.split("failed:")[1]
    assert "td3_bc mine.npz seed 0: return final 5, best 5" in done.stdout  # five steps, 1.0 each
    assert "bc mine.npz seed 0: validation/mse final" in done.stdout
    for name in ("bc", "td3_bc"):
        folder = home / "grid" / name / "mine" / "seed0"
        config, rows = run.read(folder / "config.json"), run.rows(folder)
        assert 9 <= config["cpu_seconds"] < 14 and config["cpu_minutes"] == 0.15
        every = run.read(folder.parent / "probe.json")["eval_every"]
        assert config["args"]["eval_every"] == every and 4 <= len(rows) <= 60
        assert config["steps_reached"] >= int(rows[-1]["step"])
    again = subprocess.run([sys.executable, SCRIPT, *words, "--dry-run"], **options)
    assert "4 runs, 2 of them done, 2 to do" in again.stdout

    if importlib.util.find_spec("rliable"):
        script = str(ROOT / "benchmark_results" / "report.py")
        flags = ["--runs", "grid", "--out", "shown"]
        done = subprocess.run([sys.executable, script, *flags], **options)
        assert done.returncode == 0, done.stderr
        text = (home / "shown" / "results.md").read_text()
        assert (
            "| 0.15 CPU minutes | algorithm | seeds | final | best | final return | steps |" in text
        )
        assert (
            "| mine | bc | 1 |  |  |  | " in text and "| mine | td3_bc | 1 |  |  | 5.0 | " in text
        )
        assert (home / "shown" / "0.15_CPU_minutes_mine.png").stat().st_size > 5000
    assert snapshot() == before


# ---------------------------------------------------------------------------------- Other code


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
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (about["args"]["seed"], about["settings"]["scale"]) == (3, 2.0)
    assert about["commit"] == run.commit() and about["commit_of_its_code"] == "unknown"
    # The same constant torque, 1.0 of [-1, 1], from the same start in the environment itself.
    env = load("bc").make_env({"env": "Pendulum-v1", "sizes": [3, 1]})
    env.reset(seed=3)
    total = sum(env.step(np.array([2.0], np.float32))[1] for _ in range(200))
    low, high = load("bc").load_dataset("pendulum-medium-replay")[1]["scores"]
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
    about = json.loads((tmp_path / "run" / "config.json").read_text())
    assert about["args"]["steps"] == 30 and about["task"]["env_id"] == "Pendulum-v1"
    env = load("bc").make_env({"env": "Pendulum-v1", "sizes": [3, 1]})
    env.reset(seed=103)
    total = sum(env.step(np.array([1.0], np.float32))[1] for _ in range(200))  # 0.5 of ±2
    assert float(rows[0]["return_mean"]) == pytest.approx(total)
    with pytest.raises(SystemExit, match="holds a run: --run-dir goes elsewhere"):
        official_a2po.main(official_a2po.Args(tmp_path, **options))
    with pytest.raises(SystemExit, match=r"no a2po\.py; get github"):
        official_a2po.main(official_a2po.Args(tmp_path / "elsewhere"))


# ---------------------------------------------------------------------------------- The report


@pytest.fixture
def report():
    pytest.importorskip("rliable", reason="benchmark_results/requirements.txt is not installed")
    return importlib.import_module("report")


def curves(folder: Path, ends: dict[str, tuple], dataset="hopper-medium", steps=10, **config):
    """Runs of a folder: 99 in the first half, then the number of their seed."""
    for algorithm, seeds in ends.items():
        for seed, end in enumerate(seeds):
            place = folder / algorithm / dataset / f"seed{seed}"
            place.mkdir(parents=True)
            at = [(step, 99 if 2 * step <= steps else end) for step in range(1, steps + 1)]
            lines = [f"{step},{6 * step},{10 * score},{score}" for step, score in at]
            lines = ["step,seconds,return_mean,score", *lines]
            (place / "eval.csv").write_text("\n".join(lines))
            if config:
                (place / "config.json").write_text(json.dumps(config))


def test_report_counts_seeds_intervals_and_who_is_better(tmp_path, report):
    # Three of nine pairs are lost.
    curves(tmp_path, {"a2po": (90, 91, 92), "bc": (10, 95, 20), "td3_bc": (50,)})
    runs = report.read_runs(tmp_path)
    lines = report.table(runs).splitlines()
    assert lines[0] == "| 10 steps | algorithm | seeds | final | best | minutes a run |"
    rows = lines[2:]
    assert rows[0].startswith("| hopper-medium | a2po | 3 | 91.0 [90.")
    assert rows[0].endswith("| 99.0 | 1 |")  # best is the best evaluation, not the best seed
    assert rows[2].startswith("| hopper-medium | td3_bc | 1 | 50.0 |")  # one seed: no interval
    together = report.aggregate(runs)
    assert "probability that A2PO is better" in together and "; 10 steps." in together
    assert "| a2po | 3 | 91.0 [" in together
    assert "| bc | 3 | 41.7 [" in together and "| 0.67 [" in together
    assert "td3_bc" not in together
    assert "probability that bc is better" in report.aggregate(runs, "bc")
    others = [run for run in runs if run.algorithm != "a2po"]
    assert "Not yet" in report.aggregate(others)


def test_a_table_holds_one_number_of_steps_or_one_time(tmp_path, report):
    curves(tmp_path / "long", {"bc": (1, 2, 3)}, steps=20)
    curves(tmp_path / "short", {"bc": (4, 5, 6), "iql": (7, 8, 9)})
    runs = report.read_runs(tmp_path / "long") + report.read_runs(tmp_path / "short")
    long, short = report.tables(runs).split("\n\n")
    assert long.startswith("| 20 steps |") and "| hopper-medium | bc | 3 | 2.0 [" in long
    assert short.startswith("| 10 steps |") and short.count("| hopper-medium |") == 2


def test_a_run_that_was_stopped_for_good_shortens_its_other_seeds(tmp_path, report):
    curves(tmp_path, {"bc": (1, 2)}, steps=20, args={"steps": 20})
    for seed, end in enumerate((3, 4)):
        folder = tmp_path / "bc" / "hopper-medium" / f"seed{seed}"
        rows = (folder / "eval.csv").read_text().splitlines()
        (folder / "eval.csv").write_text("\n".join(rows[: 1 + end * 4]))  # until step 12 and 16
    left_out = []
    assert report.read_runs(tmp_path, left_out) == []
    assert [line.split(": ")[1] for line in left_out] == [
        f"not finished, at step {n}" for n in (12, 16)
    ]

    about = {"args": {"steps": 20}, "steps_reached": 12}
    (tmp_path / "bc" / "hopper-medium" / "seed0" / "config.json").write_text(json.dumps(about))
    curves(tmp_path, {"iql": (5,)}, steps=20, args={"steps": 20})
    longer = tmp_path / "bc" / "hopper-medium" / "seed1" / "config.json"
    longer.write_text(json.dumps(about | {"steps_reached": 16}))
    one, other, iql = report.read_runs(tmp_path)
    for found in (one, other):
        assert found.steps.tolist() == list(range(1, 13))
        assert len(found.scores) == len(found.returns) == 12
        assert found.minutes == pytest.approx(1.2) and found.size == 12
    assert iql.size == 20  # another algorithm's seeds stay as long as they are


def test_minutes_of_one_thread_come_from_the_table_of_speeds(tmp_path, report):
    curves(tmp_path, {"bc": (1, 2, 3), "mine": (5,)}, "hopper-medium-replay", steps=20)
    runs = report.read_runs(tmp_path)
    for each in runs:
        each.steps = each.steps * 10_000
    with open(ROOT / "benchmark_results" / "speed.csv") as file:
        rates = [row for row in csv.DictReader(file) if row["algorithm"] == "bc"]
    (rate,) = [
        row for row in rates if "one thread" in row["hardware"] and "medium" in row["hardware"]
    ]
    found = report.in_minutes(runs)
    assert [each.algorithm for each in found] == ["bc"] * 3
    assert found[0].cpu[-1] == pytest.approx(200_000 / float(rate["steps_per_second"]) / 60)
    (row,) = report.minutes_table(found).splitlines()[2:]
    # 44,337 steps a minute: 30,000 to 40,000 after one; the last before two are at 60,000 to 80,000
    assert row.startswith("| bc | 99.0 | 99.0 | ") and row.endswith(" |  |  |  |  |"), row
    assert report.running_mean(np.array([1.0, 3.0, 5.0, 7.0])).tolist() == [1, 2, 3, 5]


def test_report_of_a_foreign_folder_touches_nothing_of_ours(tmp_path, report, capsys):
    before, place, out = snapshot(), tmp_path / "grid", tmp_path / "shown"
    curves(place, {"bc": (1, 2, 3), "mine": (4, 5, 6)}, args={"steps": 10})
    curves(place, {"bc_short": (1, 2, 3)}, steps=6)
    curves(place, {"bc": (7,)}, "walker2d-medium", args={"steps": 99})  # not finished
    about = dict(cpu_minutes=2, cpu_seconds=121.0, steps_reached=11)
    about |= dict(cpu_seconds_at_evaluations=[12.0 * k for k in range(1, 11)])
    for name, ends in {"iql": (30, 40, 50), "cql": (60, 70, 80)}.items():
        for dataset in ("hopper-medium", "halfcheetah-medium"):
            curves(place, {name: ends}, dataset, **about)
    curves(place, {"late": (0,)})
    (place / "late" / "hopper-medium" / "seed0" / "cpu.json").write_text('{"minutes": 2}')
    report.main(report.Args(runs=place, out=out))
    assert snapshot() == before

    text = (out / "results.md").read_text()
    timed, ten, six, left_out = text.split("\n## ")[1:]
    assert timed.startswith("2 CPU minutes") and "evaluations included" in timed
    assert "| 2 CPU minutes | algorithm | seeds | final | best | steps | CPU minutes |" in timed
    assert "| hopper-medium | iql | 3 | 40.0 [" in timed and " | 99.0 | 11 | 2.0 |" in timed
    assert "Over halfcheetah-medium, hopper-medium; 2 CPU minutes." in timed
    assert "probability that cql is better" in timed and "| 1.00 [1.00, 1.00] |" in timed
    assert ten.startswith("10 steps") and "| hopper-medium | mine | 3 | 5.0 [" in ten
    assert six.startswith("6 steps") and "bc_short" in six
    assert not any(name in ten + six for name in ("cql", "iql", "late", "walker2d"))
    assert "bc/walker2d-medium/seed0: not finished, at step 10" in left_out
    assert "late/hopper-medium/seed0: not finished" in left_out
    for name in ("2_CPU_minutes", "10_steps", "6_steps"):
        assert (out / f"{name}.png").exists() and (out / f"{name}_hopper-medium.png").exists()
    with open(out / "2_CPU_minutes.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["algorithm"] for row in rows] == ["cql", "iql"] * 2
    assert {row["budget_cpu_minutes"] for row in rows} == {"2"}
    assert rows[0]["final"] == "70.00" and rows[0]["return_mean"] == "700.00"

    for folder in (ROOT / "benchmark_results", ROOT / "docs"):
        with pytest.raises(SystemExit, match="this repository's own"):
            report.main(report.Args(runs=place, out=folder))
    with pytest.raises(SystemExit, match="No runs in"):
        report.main(report.Args(runs=out))
    with pytest.raises(SystemExit, match="--out goes with --runs"):
        report.main(report.Args(out=out))
    assert snapshot() == before


def test_curves_over_time_are_drawn_at_cpu_minutes(tmp_path, report):
    at = [60.0 * k for k in range(1, 11)]
    curves(tmp_path, {"bc": (1, 2)}, cpu_minutes=10, cpu_seconds_at_evaluations=at)
    runs = report.read_runs(tmp_path)
    x, values = report.curve(runs, True, True)
    assert x.tolist() == list(range(1, 11)) and values[:, -1].tolist() == [1, 2]
    runs[1].cpu = runs[1].cpu + 0.5  # the other seed was slower: it is read off in between
    x, values = report.curve(runs, True, True)
    assert x.tolist() == list(range(1, 11)) and values[1, 5] == pytest.approx((99 + 2) / 2)


def test_an_algorithm_has_one_colour_everywhere(report):
    def runs(*names):
        return [report.Run(name, "x", "0", np.ones(1), np.ones(1), 1.0) for name in names]

    few, many = report.colours(runs("bc", "mine")), report.colours(runs("a2po", "bc", "yours"))
    assert few["bc"] == many["bc"] and set(report.FILES) <= set(few) & set(many)
    assert max(Counter(map(str, few.values())).values()) == 1


def test_ours_is_what_the_pages_show(report):
    """The committed tables are made of the committed runs, with the committed code."""
    runs = [run for run in report.read_runs() if run.algorithm not in report.ONLINE]
    shown = (ROOT / "benchmark_results/results.md").read_text()
    for line in report.tables(runs).splitlines():
        assert line in shown
    equal = report.at_equal_steps(report.completed(report.read_runs("study"), runs))
    names = sorted([*report.FILES, report.FAST])
    several = report.on_several(equal, names)
    assert "a2po" in several and "cql" not in several  # so far
    assert report.side_by_side(equal, several) in (ROOT / "README.md").read_text()
    page = (ROOT / "docs/results.md").read_text()
    assert report.side_by_side(equal, names) in page
    assert report.minutes_table(report.in_minutes(runs)) in page
    quarter = report.read_runs("quarter_hour")
    assert report.quarter_table(report.completed(quarter, runs)) in page
    assert report.against_corl(runs + quarter) in page
    said = report.five_sentences(runs, equal, quarter)
    assert said in page and said in (ROOT / "README.md").read_text()
    # What the words of these sentences claim of their numbers.
    one, two, three, four, five = said.replace("\n   ", " ").splitlines()
    rare = re.findall(r"(\d+) and (\d+)", one)
    a2po, *others, rebrac, last = [[int(x) for x in pair] for pair in rare]
    assert len(others) == 3 and all(a2po[k] > x[k] for x in others for k in (0, 1))
    assert "ReBRAC, one seed each" in one and all(last[k] > rebrac[k] for k in (0, 1))
    a2po, fast, slow, bc = (int(x) for x in re.findall(r"(?<=[ (])\d+(?=[,).])", two))
    assert abs(a2po - fast) < 5 < a2po - slow and bc < slow
    ends = [int(x) for x in re.findall(r"(?<=[ (])\d+(?=[,).;])", three.replace("100,000", ""))]
    assert len(ends) == 6 and ends == sorted(ends, reverse=True)
    iql, *others, late, _ = map(int, re.findall(r"(?<= )\d+", four.partition("IQL")[2]))
    assert len(others) == 3 and iql > max(others) and late > iql
    assert "three seeds at most" in five


def test_committed_runs_say_how_they_were_made():
    without = set()
    for path in (ROOT / "benchmark_results").glob("*/*/*/seed*/eval.csv"):
        config = run.read(path.parent / "config.json")
        if not config:
            without.add(path.parts[-4])
            continue
        args, last = config["args"], run.last_step(path.parent)
        assert config["task"]["digest"] and config["torch"], path
        assert last <= config.get("steps_reached", args["steps"]) <= args["steps"], path
        assert not Path(args["run_dir"]).is_absolute(), path
        assert str(args["seed"]) == path.parts[-2].removeprefix("seed"), path
    # SAC that made the data that ship: from before the files wrote one.
    assert without <= {"sac"}


def test_published_scores_stand_on_their_pages(report):
    shown = report.published()
    for name, text in shown.items():
        page = (ROOT / f"docs/algorithms/{name}.md").read_text()
        block = page.partition("<!-- published: begin -->\n")[2]
        assert block.startswith(f"{text}<!-- published: end -->"), "report.py writes it"
    assert "| hopper | 67.53 ± 3.78 | 97.43 ± 6.39 | 107.42 ± 7.80 |" in shown["iql"]
    assert "| walker2d `--frac 0.1` | 67.34 ± 5.17 |" in shown["bc"]
    assert "| halfcheetah | 46.8 |  | 89.9 |" in shown["cvae_bcq"]
    assert "robomimic" in shown["cvae_bcq"] and "| halfcheetah |" not in shown["a2po"]


def test_help_of_the_report(report):
    script = str(ROOT / "benchmark_results" / "report.py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--runs" in done.stdout and "--out" in done.stdout


def test_report_shows_versions_beside_their_file(report):
    names = ("a2po", "bc", "td3_bc", "corl_td3_bc", "iql", "official_a2po")
    runs = [report.Run(name, "x", 0, np.ones(1), np.ones(1), 1.0) for name in names]
    runs.append(report.Run("bc", "y", 0, np.ones(1), np.ones(1), 1.0))
    shown = [(run.algorithm, run.dataset) for run in report.beside(runs)]
    assert shown == [("a2po", "x"), ("td3_bc", "x"), ("corl_td3_bc", "x"), ("official_a2po", "x")]


def test_report_sets_runs_of_equal_steps_side_by_side(report):
    def cell(name, dataset, steps, *ends):
        at = np.array([steps / 2, steps])
        return [
            report.Run(name, dataset, str(seed), at, np.array([end, end]), 1.0)
            for seed, end in enumerate(ends)
        ]

    runs = cell("bc", "x", 10, 1.0, 3.0) + cell("iql", "x", 10, 7.0) + cell("iql", "y", 10, 8.0)
    runs += cell("corl_iql", "x", 10, 5.0, 6.0) + cell("corl_iql", "y", 20, 9.0)
    runs += cell("cql", "x", 20, 0.5) + cell("iql_wide", "y", 10, 9.5)
    more = [(5, 2.0), (15, 3.0)], [(5, 6.0), (10, 7.0)]  # evaluated at other steps
    for name, points in zip(("td3", "corl_td3"), more):
        steps, scores = np.array(points).T
        runs.append(report.Run(name, "x", "0", steps, scores, 1.0))
    lines = report.side_by_side(runs).splitlines()
    assert lines[0] == "| 10 steps | bc | iql |"
    assert lines[2:] == ["| x | 2.0 | 7.0 |", "| y |  | 8.0 |"]
    ten, five = (part.splitlines() for part in report.against_corl(runs).split("\n\n"))
    assert ten[0] == "| 10 steps | algorithm | seeds | final | CORL's seeds | CORL's final |"
    assert ten[2:] == [
        "| x | iql | 1 | 7.0 | 2 | 5.5 (5.0 to 6.0) |",
        "| y | iql | 1 | 8.0 | 1 | 9.0 |",  # its 20 steps and ours share the tenth
    ]
    assert five[0].startswith("| 5 steps |") and five[2:] == ["| x | td3 | 1 | 2.0 | 1 | 6.0 |"]


def test_report_completes_runs_with_others_of_the_same_data(report):
    def run(name, dataset, steps):
        return report.Run(name, dataset, "0", np.array([steps]), np.ones(1), 1.0)

    first = [run("bc", "x", 10), run("iql", "y", 10)]
    others = [run(name, d, 90) for name in ("bc", "iql") for d in "xz"]
    more = report.completed(first, others)
    assert more[:2] == first
    shown = [(each.algorithm, each.dataset, each.steps[-1]) for each in more[2:]]
    assert shown == [("bc", "z", 90), ("iql", "x", 90), ("iql", "z", 90)]
    first[0].steps, first[0].scores = np.array([5, 10]), np.ones(2)
    kept = report.most_evaluated(first + others)
    lengths = {(each.algorithm, each.dataset): each.steps[-1] for each in kept}
    assert lengths[("bc", "x")] == 10 and lengths[("iql", "x")] == 90 and len(kept) == 5


def test_a_quarter_of_an_hour_has_the_steps_of_a_thread(report):
    """td3_bc makes 14,195 steps a minute, rebrac 1,893; a score is its evaluation's number."""

    def runs(name, dataset, last, every, seeds):
        at = np.arange(every, last + 1, every)
        return [
            report.Run(name, dataset, str(k), at, np.arange(1.0, len(at) + 1) + 3 * k, 1.0)
            for k in range(seeds)
        ]

    hopper, cheetah, walker = report.TIMED
    found = runs("td3_bc", hopper, 300_000, 20_000, 3)  # ten evaluations until 212,926 steps
    found += runs("td3_bc", cheetah, 100_000, 20_000, 2)
    found += runs("rebrac", hopper, 100_000, 10_000, 1)  # two until 28,393
    found += runs("rebrac", walker, 27_000, 9_000, 1)
    found += runs("gan_world_model", hopper, 9, 1, 1) + runs("mine", hopper, 9, 1, 1)
    head, _, *rows = report.quarter_table(found).splitlines()
    assert head == f"| 15 minutes of one CPU thread | steps | {hopper} | {cheetah} | {walker} |"
    assert rows[0] == "| rebrac | 28,393 | 1.5 |  | 2.0 |"
    assert rows[1] == "| td3_bc | 212,926 | 12.0 [9.0, 15.0] | 5.5 (at 7) |  |" and len(rows) == 2


def test_report_cuts_runs_at_equal_steps(report):
    def run(name, dataset, last, every):
        at = np.arange(every, last + 1, every)  # the score at a step is the step
        return report.Run(name, dataset, "0", at, at * 1.0, 1.0, at * 2.0)

    runs = [run("a2po", "x", 40, 5), run("bc", "x", 60, 10), run("iql", "x", 30, 10)]
    runs += [run("bc", "y", 60, 10), run("td3_bc", "x", 60, 20)]  # a2po is not there; too seldom
    cut = report.at_equal_steps(runs, steps=40, every=10)
    assert [(run.algorithm, run.dataset) for run in cut] == [("a2po", "x"), ("bc", "x")]
    assert all(run.steps.tolist() == [10, 20, 30, 40] for run in cut)
    assert cut[0].returns.tolist() == [20, 40, 60, 80] and cut[1].final == 25


# ----------------------------------------------------------------------------------- The clock


def test_speed_weighs_the_phases_by_their_share(monkeypatch):
    """Of the steps of a run's first three quarters half take 10 ms and half 2 ms, as where the
    actor waits for the critic; the rest takes 1 ms."""

    class Learner(torch.nn.Module):
        def __init__(self, data, task, args):
            super().__init__()
            self.steps, self.policy = args.steps, None

        def slow(self):
            return 100.0

        def middle(self):
            return 500.0

        def quick(self):
            return 1000.0

        def phase(self, step):
            if step > 0.75 * self.steps:
                return self.quick
            return self.slow if step % 2 else self.middle

    module = load("bc", fresh=True)
    module.Learner, module.evaluate = Learner, lambda *_: {}
    monkeypatch.setattr(speed, "load", lambda _: module)
    monkeypatch.setattr(speed, "calls_per_second", lambda call, seconds, device: call())
    data = str(ROOT / "datasets" / "pendulum-medium-replay.hdf5")
    row = speed.ours(speed.Args(device="cpu"), "bc", data)
    assert 1e3 / row["steps_per_second"] == pytest.approx(0.375 * (10 + 2) + 0.25 * 1)
    assert row["minutes_per_million"] == pytest.approx(1e6 / 60 / row["steps_per_second"])
    assert torch.get_num_threads() == 1


def test_speed_measures_a_file(tmp_path):
    path = tmp_path / "noise.hdf5"
    speed.write_data(path, 2000)
    args = speed.Args(device="cpu", seconds=0.2, override=("hidden-dim=16", "batch-size=16"))
    row = speed.ours(args, "td3_bc", str(path))
    assert set(row) == set(list(speed.UNITS)[:7]) and all(value > 0 for value in row.values())


def test_calls_per_second_counts_what_a_call_takes():
    rate = speed.calls_per_second(lambda: time.sleep(0.02), 0.3, torch.device("cpu"))
    assert 10 < rate < 50.1  # a busy machine is slower, none is faster


def test_operations_are_products_and_whatever_computes():
    a, b = torch.randn(2, 4, 4)
    flop, kernels = speed.operations(lambda: torch.relu(a.T @ b).view(2, 8).sum())
    assert flop == 2 * 4**3 and kernels == 3  # views are free
