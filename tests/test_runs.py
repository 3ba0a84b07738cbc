"""Runs: what they write, stop, resume and refuse, for every file of algorithms/."""

import contextlib
import csv
import json
import math
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import load, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook

pytestmark = pytest.mark.usefixtures("elsewhere")
loops = pytest.mark.parametrize("module", ["bc", "sac"], indirect=True)  # the two training loops


@pytest.fixture
def train(module, pendulum_file, elsewhere):
    """train(flag=value, ...): a tiny run in <elsewhere>/run, returns its history."""

    def train(**flags):
        defaults = dict(dataset=str(pendulum_file), run_dir="run")
        return module.train(
            module.Args(**tiny(module.__file__.split("/")[-1][:-3], **defaults | flags))
        )

    return train


def saved(run="run") -> dict:
    return torch.load(f"{run}/checkpoint.pt", weights_only=True)


def table(run="run") -> list[dict]:
    with open(f"{run}/eval.csv") as file:
        return list(csv.DictReader(file))


def flat(state, name="") -> dict:
    """Nested dicts and lists -> {path: leaf}."""
    if isinstance(state, (dict, list, tuple)):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, part in items for k, v in flat(part, f"{name}/{key}").items()}
    return {name: state}


def assert_same_state(one, other):
    one, other = flat(one), flat(other)
    assert one.keys() == other.keys()
    same = lambda a, b: torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b  # noqa: E731
    differing = [key for key in one if not same(one[key], other[key])]
    assert differing == []


def assert_same_run(one, other):
    """Bit for bit: networks, targets, optimisers, random numbers and evaluations."""
    assert saved(one)["step"] == saved(other)["step"]
    assert_same_state(saved(one)["learner"], saved(other)["learner"])
    assert torch.equal(saved(one)["rng"], saved(other)["rng"])
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert strip(table(one)) == strip(table(other))


def at_update(module, monkeypatch, number, action):
    """Calls action(learner) before the learner's update of that number (from 1)."""
    real, calls = module.Learner.update, []

    def update(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            action(self)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(module.Learner, "update", update)


def poison(learner):
    next(learner.policy.parameters()).data.fill_(math.nan)


# ------------------------------------------------------------------------------ What it writes


def test_files_of_a_run(train, module, pendulum_file, elsewhere, capsys):
    history = train()
    assert [row["step"] for row in history] == [10, 20]

    config = json.loads(open("run/config.json").read())
    assert config["args"]["steps"] == 20 and config["args"]["dataset"] == str(pendulum_file)
    assert config["dataset"] == "tiny-pendulum" and config["env_id"] == "Pendulum-v1"
    assert config["args"].keys() == module.Args.__dataclass_fields__.keys()
    assert config["torch"] == torch.__version__ and config["numpy"] == np.__version__
    assert re.fullmatch("[0-9a-f]{40}|", config["git"])
    assert config.keys() >= {"python", "machine", "gpu", "cpus", "threads", "gymnasium"}

    text = open("run/eval.csv").read()
    assert text.startswith("step,seconds,return_mean,return_std,length_mean,score")
    for row, line in zip(history, table()):
        assert {key: float(value) for key, value in line.items()} == row
        assert row["length_mean"] == 200 and -2000 < row["return_mean"] < 0
        assert row["score"] == pytest.approx(100 * (row["return_mean"] + 1500) / 1500)
        assert all(math.isfinite(row[key]) for key in row)
        assert any(key.startswith("validation/") for key in row)

    events = EventAccumulator("run").Reload()
    scalars = set(events.Tags()["scalars"])
    assert scalars >= {"eval/return_mean", "eval/score", "charts/steps_per_second"}
    assert any(key.startswith("losses/") for key in scalars)
    assert any(key.startswith("validation/") for key in scalars)
    assert [event.step for event in events.Scalars("eval/score")] == [10, 20]

    state = saved()
    assert state["step"] == 20 and state["args"]["hidden_dim"] == 16
    assert {"learner", "rng", "history", "spec"} <= state.keys()
    names = {file.name for file in (elsewhere / "run").iterdir()}
    assert {name for name in names if "tfevents" not in name} == {
        "config.json",
        "eval.csv",
        "checkpoint.pt",
    }

    said = capsys.readouterr().out
    for word in ("tiny-pendulum", "1,600 transitions", "8 episodes", "Pendulum-v1", "cpu", "run"):
        assert word in said
    assert said.count("best return so far") == 2


def test_same_seed_same_run(train):
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(run_dir=run, seed=seed)
    assert_same_run("a", "b")
    with pytest.raises(AssertionError):
        assert_same_run("a", "c")


def test_first_losses_depend_on_the_seed_alone(train, module, monkeypatch):
    first, real = [], module.Learner.update

    def update(self, *args, **kwargs):
        first.append(real(self, *args, **kwargs))
        return first[-1]

    monkeypatch.setattr(module.Learner, "update", update)
    for run, flags in enumerate([{}, {"eval_every": 1}, {"seed": 1}]):
        train(run_dir=str(run), steps=1, env_id="none", **flags)
    assert_same_state(first[0], first[1])
    losses = [key for key in first[0] if key.startswith("losses/")]
    assert losses and all(first[0][key] != first[2][key] for key in losses)


def test_several_seeds_are_the_runs_one_by_one(train, capsys):
    for seed in (5, 2):
        train(run_dir=f"alone/seed{seed}", seed=seed)
    last = table("alone/seed2")
    capsys.readouterr()
    history = train(run_dir="together", seeds=(5, 2))
    for seed in (5, 2):
        assert_same_run(f"alone/seed{seed}", f"together/seed{seed}")
        assert json.load(open(f"together/seed{seed}/config.json"))["args"]["seed"] == seed
    assert [row["return_mean"] for row in history] == [float(row["return_mean"]) for row in last]
    said = capsys.readouterr().out
    order = re.findall(r"seed (\d)  step +(\d+)", said)
    assert order == [("5", "10"), ("2", "10"), ("5", "20"), ("2", "20")]  # they take turns


@loops
def test_one_seed_that_fails_leaves_the_others(train, module, monkeypatch):
    train(run_dir="alone", seed=2)
    at_update(module, monkeypatch, 1, poison)  # of all: the first seed's
    with pytest.raises(SystemExit, match=r"not finite.*seed5"):
        train(run_dir="together", seeds=(5, 2))
    assert_same_run("alone", "together/seed2")


def test_evaluation_does_not_change_training(train):
    train(run_dir="often", eval_every=2, env_id="none")
    train(run_dir="once", eval_every=20, env_id="none")
    assert_same_state(saved("often")["learner"], saved("once")["learner"])


def test_without_an_environment_only_validation_losses(train, module, monkeypatch, capsys):
    monkeypatch.setattr(module.gym, "make", None)
    monkeypatch.setattr(module.gym, "make_vec", None)
    for row in train(env_id="none"):
        names = set(row) - {"step", "seconds"}
        assert names and all(name.startswith("validation/") for name in names)
    assert [row["return_mean"] for row in table()] == ["", ""]
    assert "nan" not in capsys.readouterr().out


def test_an_environment_of_a_module(train, module, pendulum, toy_env, elsewhere):
    arrays = pendulum | {key: pendulum[key][:, :2] for key in ("observations", "next_observations")}
    np.savez("toy.npz", **arrays | {"actions": pendulum["actions"] / 2})
    assert [row["return_mean"] for row in train(dataset="toy.npz", env_id=toy_env)] == [5, 5]


# --------------------------------------------------------------------------- Stop and continue


def test_resume_is_exact(train):
    history = train(run_dir="straight", steps=40)
    train(run_dir="halves", steps=20)
    resumed = train(run_dir="halves", steps=40, resume=True)
    assert [row["step"] for row in resumed] == [row["step"] for row in history] == [10, 20, 30, 40]
    assert_same_run("straight", "halves")


def test_resume_is_exact_between_evaluations(train):
    """A run of 14 steps evaluates after its last one; a longer run does not evaluate there."""
    train(run_dir="straight", steps=40)
    train(run_dir="parts", steps=14)
    train(run_dir="parts", steps=40, resume=True)
    assert_same_state(saved("straight")["learner"], saved("parts")["learner"])


def test_ctrl_c_saves_and_says_how_to_go_on(train, module, monkeypatch):
    at_update(module, monkeypatch, 5, lambda learner: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        train()
    step = saved()["step"]
    assert 0 < step < 20 and f"step {step}" in str(end.value.code)
    assert "--resume" in str(end.value.code)
    assert [row["step"] for row in train(resume=True)] == [10, 20]


def test_a_run_stopped_by_ctrl_c_goes_on_as_if_it_had_not(train):
    """Ctrl-C comes in the middle of an update, as it nearly always does."""
    train(run_dir="straight")
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 8:
            signal.raise_signal(signal.SIGINT)

    hook = register_optimizer_step_post_hook(interrupt)
    try:
        with pytest.raises(SystemExit):
            train(run_dir="stopped")
    finally:
        hook.remove()
    train(run_dir="stopped", resume=True)
    assert_same_run("straight", "stopped")


@loops
def test_ctrl_c_stops_and_saves_all_seeds(train, module, monkeypatch):
    for seed in (5, 2):
        train(run_dir=f"alone/seed{seed}", seed=seed)
    at_update(module, monkeypatch, 4, lambda learner: signal.raise_signal(signal.SIGINT))
    with pytest.raises(SystemExit) as end:
        train(run_dir="together", seeds=(5, 2))
    steps = [saved(f"together/seed{seed}")["step"] for seed in (5, 2)]
    assert max(steps) < 20 and all(f"Saved at step {step}" in end.value.code for step in steps)
    train(run_dir="together", seeds=(5, 2), resume=True)
    for seed in (5, 2):
        assert_same_run(f"alone/seed{seed}", f"together/seed{seed}")


def test_ctrl_c_in_the_last_evaluation_loses_nothing(train, module, monkeypatch):
    real = module.evaluate

    def evaluate(learner, spec, episodes, seed):
        if seed == 20:
            signal.raise_signal(signal.SIGINT)
        return real(learner, spec, episodes, seed)

    monkeypatch.setattr(module, "evaluate", evaluate)
    with contextlib.suppress(SystemExit):  # stopping after the evaluation is fine too
        train()
    monkeypatch.setattr(module, "evaluate", real)
    assert [row["step"] for row in train(resume=True)] == [10, 20]


def test_nothing_is_overwritten(train, elsewhere):
    train()
    before = {file.name: file.read_bytes() for file in (elsewhere / "run").iterdir()}
    with pytest.raises(SystemExit, match=r"run.*--resume.*--run-dir"):
        train()
    assert before == {file.name: file.read_bytes() for file in (elsewhere / "run").iterdir()}


def test_resume_needs_a_checkpoint(train, elsewhere):
    with pytest.raises(SystemExit, match="no checkpoint in run"):
        train(resume=True)
    assert not (elsewhere / "run").exists()


def test_resume_refuses_other_flags(train):
    train()
    for flag, value in (("hidden_dim", 8), ("learning_rate", 0.1), ("seed", 3)):
        with pytest.raises(SystemExit, match="--" + flag.replace("_", "-")):
            train(resume=True, **{flag: value})
    assert saved()["step"] == 20
    train(resume=True, steps=40, eval_episodes=3, save_every=7)  # these are free


def test_a_run_that_saved_nothing_can_be_started_again(train, module, monkeypatch):
    with monkeypatch.context() as patch:
        at_update(module, patch, 1, poison)
        with pytest.raises(SystemExit, match="nothing was saved"):
            train()
    outcomes = []
    for flags in ({}, {"resume": True}):
        try:
            outcomes.append(len(train(**flags)))
        except SystemExit as refusal:
            outcomes.append(str(refusal))
    assert 2 in outcomes, outcomes  # one of the two messages led somewhere


def test_a_nan_loss_stops_and_keeps_the_checkpoint(train, module, monkeypatch, elsewhere):
    kept = []

    def spoil(learner):
        kept.append((elsewhere / "run" / "checkpoint.pt").read_bytes())
        poison(learner)

    per_call = module.Learner(dummy_data(), module.Args(**tiny_args(module))).phase(0)[1]
    at_update(module, monkeypatch, 10 // per_call + 1, spoil)  # the first after the save at 10
    with pytest.raises(SystemExit, match=r"Step 20: losses/\w+.* not finite.*kept"):
        train(steps=40, save_every=10)
    assert (elsewhere / "run" / "checkpoint.pt").read_bytes() == kept[0]
    assert saved()["step"] == 10


def tiny_args(module) -> dict:
    return tiny(module.__file__.split("/")[-1][:-3])


def dummy_data(n=50, device="cpu") -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    widths = dict(observations=3, actions=2, rewards=1, next_observations=3, terminals=1)
    data = {k: torch.rand(n, w, generator=rng) for k, w in widths.items()}
    data |= {"terminals": data["terminals"].round(), "episodes": torch.arange(n) // 5}
    data |= {"action_low": -torch.ones(1, 2), "action_high": torch.ones(1, 2)}
    return {key: value.to(device) for key, value in data.items()}


# --------------------------------------------------------------------------- Evaluate, go faster


def test_evaluate_needs_the_checkpoint_alone(train, module, pendulum_file, elsewhere, capsys):
    shutil.copy(pendulum_file, "gone.hdf5")
    last = train(dataset="gone.hdf5")[-1]
    (elsewhere / "gone.hdf5").unlink()
    before = sorted(elsewhere.rglob("*"))
    args = dict(evaluate="run/checkpoint.pt", eval_episodes=2, device="cpu")
    [row] = module.train(module.Args(**args, seed=20))  # the seed of the evaluation at step 20
    assert {key: last[key] for key in row} == row and row["step"] == 20
    assert f"{row['return_mean']:.4g}" in capsys.readouterr().out
    assert sorted(elsewhere.rglob("*")) == before  # nothing is written

    with pytest.raises(SystemExit, match=r"none\.pt.*no such checkpoint"):
        module.train(module.Args(evaluate="none.pt"))


def test_evaluate_asks_for_an_environment(train, module, pendulum, pendulum_file):
    np.savez("toy.npz", **pendulum | {"actions": pendulum["actions"] / 2})
    train(dataset="toy.npz")  # an .npz names no environment
    with pytest.raises(SystemExit, match="--env-id"):
        module.train(module.Args(evaluate="run/checkpoint.pt", device="cpu"))


def test_evaluation_is_episodes_one_by_one(module):
    """All episodes are stepped together; each counts up to its own end and no further."""

    class Constant:
        policy = property(lambda self: self)

        def actors(self):
            return {
                "": lambda s: torch.zeros(len(s), 3).add(s[:, :1] / 9),
                "_other": lambda s: torch.zeros(len(s), 3),
            }

        def targets(self):  # the same two, where a policy is asked for a return and has a memory
            return {"": 1.0, "_other": 0.0}

        def act(self, s, r, memory, targets):
            (targets,) = memory or [targets]
            return torch.zeros(len(s), 3).add(targets * s[:, :1] / 9), [targets]

    spec = {"env_id": "Hopper-v5", "references": (10.0, 30.0), "device": torch.device("cpu")}
    row = module.evaluate(Constant(), spec, episodes=3, seed=7)
    returns, lengths, env = [], [], module.gym.make("Hopper-v5")
    for seed in (7, 8, 9):
        s, _ = env.reset(seed=seed)
        returns, lengths, done = [*returns, 0.0], [*lengths, 0], False
        while not done:
            s, r, terminated, truncated, _ = env.step(np.full(3, np.float32(s[0]) / 9))
            returns[-1], lengths[-1], done = (
                returns[-1] + r,
                lengths[-1] + 1,
                terminated or truncated,
            )
    assert len(set(lengths)) > 1
    assert row["return_mean"] == pytest.approx(np.mean(returns), rel=1e-3)
    assert row["return_std"] == pytest.approx(np.std(returns), rel=1e-2)
    assert row["length_mean"] == pytest.approx(np.mean(lengths))
    assert row["score"] == pytest.approx(5 * (np.mean(returns) - 10), rel=1e-3)
    assert list(row)[-2:] == ["return_mean_other", "score_other"]
    assert row["return_mean_other"] != row["return_mean"]


def losses(module, device, calls=8, **flags):
    """Metrics of some updates from one and the same start, by accelerate()."""
    torch.manual_seed(0)
    args = module.Args(**tiny_args(module) | dict(device=device, hidden_dim=32) | flags)
    learner = module.Learner(dummy_data(device=device), args)
    update = module.accelerate(learner.update, args, torch.device(device))
    torch.manual_seed(1)
    return [{k: v.clone() for k, v in update().items()} for _ in range(calls)]


def assert_close(one, other, **tolerance):
    for a, b in zip(map(flat, one), map(flat, other)):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], msg=key, **tolerance)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_compiled_equals_eager(monkeypatch):
    module = load("td3_bc")
    monkeypatch.setattr(torch._inductor.config, "fallback_random", True)  # eager's random numbers
    eager, compiled = (losses(module, "cpu", compile=flag) for flag in (False, True))
    assert_close(eager, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_equals_eager(module):
    eager, graph = (losses(module, "cuda", cuda_graph=flag) for flag in (False, True))
    assert_close(eager, graph, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("first, second", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_resume_on_another_device(first, second, train):
    train(device=first)
    assert [row["step"] for row in train(device=second, steps=40, resume=True)][-1] == 40


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_several_seeds_on_a_gpu_are_the_runs_one_by_one(train):
    for seed in (5, 2):
        train(run_dir=f"alone/seed{seed}", seed=seed, device="cuda")
    train(run_dir="together", seeds=(5, 2), device="cuda")
    for seed in (5, 2):
        assert_same_run(f"alone/seed{seed}", f"together/seed{seed}")
