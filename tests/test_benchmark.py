"""The runner of benchmark_results/: its plan, and a grid that is killed in the middle."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, load

sys.path.insert(0, str(ROOT / "benchmark_results"))

import run

SMALL = ("hidden-dim=16", "batch-size=16", "eval-every=200", "eval-episodes=2")


def grid(folder: Path, **flags) -> run.Args:
    flags = dict(algorithms=("bc",), datasets=("pendulum-medium-replay",), seeds=(0, 1)) | flags
    return run.Args(runs=folder, steps=400, device="cpu", override=SMALL, **flags)


def write(folder: Path, steps: int) -> None:
    folder.mkdir(parents=True)
    (folder / "eval.csv").write_text(f"step,seconds,score\n{steps},1.0,50.0\n")


def test_every_preset_is_understood_by_its_file():
    for algorithm, patterns in run.PRESETS.items():
        defaults = load(algorithm).Args()
        for dataset in patterns:
            (job,) = run.plan(run.Args((algorithm,), (dataset,), (0,)))
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
