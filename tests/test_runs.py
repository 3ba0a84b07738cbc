"""Runs: what they write, stop, resume and refuse, for every file of algorithms/."""

import contextlib
import copy
import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
import units
from conftest import load, tiny, write_hdf5
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode

pytestmark = pytest.mark.usefixtures("elsewhere")
bc = load("bc")


def name_of(module) -> str:
    return module.__name__.removeprefix("algorithm_")


# The pendulum of the tiny data set, with an end after 40 steps instead of 200.
BRIEF = copy.deepcopy(gym.spec("Pendulum-v1"))
BRIEF.max_episode_steps = 40


@pytest.fixture
def train(module, pendulum_file, elsewhere):
    """train(flag=value, ...): a tiny run in <elsewhere>/run, returns its history."""

    def train(**flags):
        defaults = dict(dataset=str(pendulum_file), run_dir="run")
        defaults |= {} if "dataset" in flags else {"env_id": BRIEF.to_json()}
        return module.train(module.Args(**tiny(name_of(module), **defaults | flags)))

    return train


only_bc = pytest.mark.parametrize("module", ["bc"], indirect=True)  # the loop is the same in all


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
    for key in ("learner", "optimizers", "rng"):
        assert_same_state(saved(one)[key], saved(other)[key])
    strip = lambda rows: [{k: v for k, v in row.items() if k != "seconds"} for row in rows]  # noqa: E731
    assert strip(table(one)) == strip(table(other))


def at_step(module, monkeypatch, number, action):
    """Calls action(learner) before the update of that step."""
    real = module.Learner.phase

    def phase(self, step):
        if step == number:
            action(self)
        return real(self, step)

    monkeypatch.setattr(module.Learner, "phase", phase)


def poison(learner):
    for part in learner.children():  # a policy may be a slow copy of what is trained
        for parameter in [*part.parameters()][:1]:
            parameter.data.fill_(math.nan)


# ------------------------------------------------------------------------------ What it writes


def test_files_of_a_run(train, module, pendulum_file, elsewhere, capsys):
    history = train(env_id="")
    assert [row["step"] for row in history] == [10, 20]

    config = json.loads(open("run/config.json").read())
    assert config["args"]["steps"] == 20 and config["args"]["dataset"] == str(pendulum_file)
    assert config["task"]["env_id"] == "Pendulum-v1"
    assert config["args"].keys() == module.Args.__dataclass_fields__.keys()
    assert config["torch"] == torch.__version__ and config["numpy"] == np.__version__
    assert config.keys() >= {"python", "cpu", "gpu", "threads", "gymnasium", "minari"}

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
    names = {file.name for file in (elsewhere / "run").iterdir()}
    assert {name for name in names if "tfevents" not in name} == {
        "config.json",
        "eval.csv",
        "checkpoint.pt",
    }

    said = capsys.readouterr().out
    for word in ("tiny-pendulum", "1,600 transitions", "8 episodes", "cpu", "run", "-2", "2"):
        assert word in said
    lines = [line for line in said.split("\n") if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["10", "20"]
    for line, row in zip(lines, history):
        assert (
            f"return_mean {row['return_mean']:.4g}" in line and f"score {row['score']:.4g}" in line
        )
        assert "best" in line and "left" in line and "validation" not in line
        assert len(line) < 160


def test_same_seed_same_run(train):
    for run, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(run_dir=run, seed=seed)
    assert_same_run("a", "b")
    with pytest.raises(AssertionError):
        assert_same_run("a", "c")


def test_evaluation_does_not_change_training(train):
    train(run_dir="often", eval_every=2, env_id="none")
    train(run_dir="once", eval_every=20, env_id="none")
    assert_same_state(saved("often")["learner"], saved("once")["learner"])


@only_bc
def test_dropout_is_for_training_alone(train, module, monkeypatch):
    """The loop says which it is: a learner trains, an evaluation and a validation do not."""
    modes = {"update": [], "act": [], "validate": []}
    for owner, name, of in (
        (module.Learner, "update", lambda x: x.training),
        (module.Policy, "act", lambda x: x.training),
        (module.Learner, "validate", lambda x: x.policy.training),
    ):
        real = getattr(owner, name)

        def watched(self, *args, real=real, name=name, of=of):
            modes[name].append(of(self))
            return real(self, *args)

        monkeypatch.setattr(owner, name, watched)
    train(steps=6, eval_every=3, eval_episodes=1)
    assert modes["update"] == [True] * 6 and modes["validate"] == [False] * 2
    assert set(modes["act"]) == {False}


def test_without_an_environment_only_validation_losses(train, module, monkeypatch, capsys):
    monkeypatch.setattr(module.gym, "make", None)
    for row in train(env_id="none"):
        names = set(row) - {"step", "seconds"}
        assert names and all(name.startswith("validation/") for name in names)
    assert [row.get("return_mean", "") for row in table()] == ["", ""]
    assert "validation" in capsys.readouterr().out


def test_an_environment_of_a_module(train, module, pendulum, toy_env, elsewhere):
    arrays = pendulum | {key: pendulum[key][:, :2] for key in ("observations", "next_observations")}
    np.savez("toy.npz", **arrays | {"actions": pendulum["actions"] / 2})
    assert [row["return_mean"] for row in train(dataset="toy.npz", env_id=toy_env)] == [5, 5]


def test_several_actions_and_terminals(train, hopper, elsewhere):
    """Hopper: three actions, about as many falls as timeouts."""
    write_hdf5(elsewhere / "hop.hdf5", hopper, env_id="Hopper-v5")
    history = train(dataset="hop.hdf5")
    assert [row["step"] for row in history] == [10, 20]
    assert all(math.isfinite(value) for row in history for value in row.values())
    assert history[-1]["length_mean"] > 5


@only_bc
def test_episodes_held_out_are_whole_random_and_not_trained_on(train, module, elsewhere):
    """Every row says which episode it is of: the learner's and the validation's share none."""
    n = 4000
    rows = units.data(n, observations=torch.arange(n)[:, None].float().expand(n, 3))
    arrays = {key: rows[key].numpy() for key in ("observations", "next_observations", "actions")}
    arrays |= {
        "rewards": np.zeros(n),
        "terminals": np.zeros(n),
        "timeouts": np.arange(n) % 40 == 39,
    }
    write_hdf5(elsewhere / "n.hdf5", arrays)
    seen = {}

    class Spy(module.Learner):
        def __init__(self, data, task, args):
            super().__init__(data, task, args)
            seen["train"] = data

        def validate(self, data):
            seen["validation"] = data
            return super().validate(data)

    real, module.Learner = module.Learner, Spy
    try:
        train(dataset="n.hdf5", validation_fraction=0.2, env_id="none")
    finally:
        module.Learner = real
    ids = {key: data["observations"][:, 0].long() // 40 for key, data in seen.items()}
    counts = {key: values.bincount(minlength=100) for key, values in ids.items()}
    assert ((counts["train"] == 40) ^ (counts["validation"] == 40)).all()
    assert (counts["validation"] > 0).sum() == 20
    held_out = counts["validation"].nonzero()[:, 0]
    assert held_out.min() < 20 and held_out.max() > 80 and held_out.diff().max() > 1  # no prefix


@only_bc
def test_validation_takes_ten_thousand_rows_of_random_episodes(train, module, elsewhere):
    n = 120_000
    arrays = dict(observations=np.arange(n)[:, None] * np.ones(3), actions=np.zeros((n, 2)))
    arrays |= dict(rewards=np.zeros(n), terminals=np.zeros(n), timeouts=np.arange(n) % 100 == 99)
    write_hdf5(elsewhere / "n.hdf5", arrays)
    seen = []
    real = module.Learner.validate

    def validate(self, data):
        seen.append(data["observations"][:, 0])
        return real(self, data)

    module.Learner.validate = validate
    try:
        train(dataset="n.hdf5", validation_fraction=0.5, env_id="none")
    finally:
        module.Learner.validate = real
    assert 9_000 < len(seen[0]) < 11_000 and seen[0].min() < n / 4 and seen[0].max() > 3 * n / 4


# --------------------------------------------------------------------------- Stop and continue


def test_resume_is_exact(train):
    history = train(run_dir="straight", steps=40)
    train(run_dir="halves", steps=20)
    resumed = train(run_dir="halves", steps=40, resume=True)
    assert [row["step"] for row in resumed] == [row["step"] for row in history] == [10, 20, 30, 40]
    assert_same_run("straight", "halves")


def test_resume_is_exact_between_evaluations(train):
    """A run of 13 steps evaluates after its last one; a longer run does not evaluate there."""
    train(run_dir="straight", steps=40)
    train(run_dir="parts", steps=13)
    train(run_dir="parts", steps=40, resume=True)
    assert_same_state(saved("straight")["learner"], saved("parts")["learner"])
    assert_same_state(saved("straight")["optimizers"], saved("parts")["optimizers"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_says_how_to_go_on(number, train, module, monkeypatch):
    at_step(module, monkeypatch, 5, lambda learner: signal.raise_signal(number))
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        train()
    step = saved()["step"]
    assert 0 < step < 20 and f"step {step}" in str(end.value.code)
    assert "--resume" in str(end.value.code)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert [row["step"] for row in train(resume=True)] == [10, 20]


@only_bc
def test_a_second_signal_stops_at_once(train, module, monkeypatch):
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]

    def impatient(learner):
        for number in numbers:
            signal.raise_signal(number)

    at_step(module, monkeypatch, 5, impatient)
    try:
        with pytest.raises(SystemExit) as stop:
            train()
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    assert stop.value.code == 1 and saved()["step"] < 5  # nothing more is written


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


def test_ctrl_c_in_the_last_evaluation_loses_nothing(train, module, monkeypatch):
    real = module.evaluate

    def evaluate(policy, task, episodes, seed, *rest):
        if seed == 20:
            signal.raise_signal(signal.SIGINT)
        return real(policy, task, episodes, seed, *rest)

    monkeypatch.setattr(module, "evaluate", evaluate)
    with contextlib.suppress(SystemExit):  # stopping after the evaluation is fine too
        train()
    monkeypatch.setattr(module, "evaluate", real)
    assert [row["step"] for row in train(resume=True)] == [10, 20]


def test_a_killed_job_can_be_resumed(pendulum_file, elsewhere):
    """What a scheduler does: SIGTERM to the process."""
    command = [sys.executable, bc.__file__, "--dataset", str(pendulum_file), "--env-id", "none"]
    command += "--steps 1000000 --hidden-dim 16 --run-dir run".split()
    with open("out", "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
        for _ in range(600):
            time.sleep(0.1)
            if os.path.exists("run/eval.csv") or process.poll() is not None:
                break
        process.terminate()
        assert process.wait(60) == 1, open("out").read()
    step = saved()["step"]
    assert 5000 <= step < 1_000_000 and "--resume" in open("out").read()
    args = bc.Args(**saved()["args"] | {"steps": step + 10, "resume": True})
    assert bc.train(args)[-1]["step"] == step + 10


@only_bc
def test_a_run_is_never_begun_twice(train, module, monkeypatch, elsewhere):
    """While the first reads its data a second begins in the same folder."""
    real, others = module.load_dataset, [1]

    def load_dataset(*args):
        found = real(*args)
        if others:
            others.pop()
            train(seed=1)
        return found

    monkeypatch.setattr(module, "load_dataset", load_dataset)
    with pytest.raises(SystemExit, match="run"):
        train(seed=0)
    assert saved()["args"]["seed"] == 1 and saved()["step"] == 20


def test_nothing_is_overwritten(train, elsewhere):
    train()
    before = {file.name: file.read_bytes() for file in (elsewhere / "run").iterdir()}
    with pytest.raises(SystemExit, match=r"run.*--resume"):
        train()
    assert before == {file.name: file.read_bytes() for file in (elsewhere / "run").iterdir()}


@only_bc
def test_a_copied_checkpoint_is_no_empty_folder(train, elsewhere):
    train()
    (elsewhere / "new").mkdir()
    shutil.copy("run/checkpoint.pt", "new")
    content = (elsewhere / "new/checkpoint.pt").read_bytes()
    with pytest.raises(SystemExit, match=r"new.*--resume"):
        train(run_dir="new")
    assert (elsewhere / "new/checkpoint.pt").read_bytes() == content
    assert [row["step"] for row in train(run_dir="new", steps=30, resume=True)] == [10, 20, 30]


@only_bc
def test_resume_needs_a_checkpoint(train, elsewhere):
    with pytest.raises(SystemExit, match=r"run.*no checkpoint"):
        train(resume=True)
    assert not (elsewhere / "run").exists()


@only_bc
def test_resume_names_all_other_flags(train):
    train()
    with pytest.raises(SystemExit, match=r"hidden_dim 16.*learning_rate 0.0003.*seed 0") as said:
        train(resume=True, hidden_dim=8, learning_rate=0.1, seed=3)
    assert "checkpoint.pt" in str(said.value)
    assert saved()["step"] == 20
    with pytest.raises(SystemExit, match=r"step 20.*--steps"):
        train(resume=True, steps=10)
    train(resume=True, steps=40, eval_episodes=3, save_every=7, threads=2)  # these are free
    torch.set_num_threads(1)


@only_bc
def test_resume_notices_other_data(train, pendulum, elsewhere):
    attributes = dict(env_id="Pendulum-v1", action_low=[-2.0], action_high=[2.0])
    write_hdf5(elsewhere / "d.hdf5", pendulum, **attributes)
    train(dataset="d.hdf5")
    for change in (
        {"rewards": pendulum["rewards"][::-1]},
        {"timeouts": np.arange(1600) % 50 == 49},
    ):
        write_hdf5(elsewhere / "d.hdf5", pendulum | change, **attributes)
        with pytest.raises(SystemExit, match="digest"):
            train(dataset="d.hdf5", resume=True, steps=40)
    assert saved()["step"] == 20


@only_bc
def test_a_run_that_fails_at_once_blocks_nothing(train, elsewhere):
    with pytest.raises(SystemExit):
        train(frac=7.0)
    assert not (elsewhere / "run").exists()
    (elsewhere / "run").mkdir()  # an empty folder is free
    assert len(train()) == 2


def test_a_nan_loss_stops_and_keeps_the_checkpoint(train, module, monkeypatch, elsewhere):
    kept = []

    def spoil(learner):
        kept.append((elsewhere / "run" / "checkpoint.pt").read_bytes())
        poison(learner)

    at_step(module, monkeypatch, 11, spoil)  # the first after the save at 10
    with pytest.raises(SystemExit, match=r"Step 20: [\w/]+ is not finite.*checkpoint"):
        train(steps=40, save_every=10)
    assert (elsewhere / "run" / "checkpoint.pt").read_bytes() == kept[0]
    assert saved()["step"] in (10, 20)


@only_bc
def test_whatever_an_environment_does_costs_no_training(train, module, monkeypatch, elsewhere):
    """The simulator dies in the second evaluation, at a step where no checkpoint is due."""
    real, calls = module.gym.Env, []
    env = module.gym.make("Pendulum-v1").unwrapped.__class__
    step = env.step

    def dying(self, a):
        calls.append(1)
        if len(calls) > 120:  # in the second of two evaluations of two episodes of 40 steps
            raise RuntimeError("simulator lost")
        return step(self, a)

    monkeypatch.setattr(env, "step", dying)
    with pytest.raises(SystemExit, match=r"Pendulum-v1.*simulator lost"):
        train(save_every=1000)
    assert real is module.gym.Env and saved()["step"] == 20
    assert [row["step"] for row in table()] == ["10"]
    monkeypatch.setattr(env, "step", step)
    assert [row["step"] for row in train(resume=True)] == [10, 20]


# ---------------------------------------------------------------------------------- Refusals


@only_bc
@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(device="cuda:7"), "--device cuda:7"),
        (dict(device="gpu"), "--device gpu"),
        (dict(seed=-1), "--seed"),
        (dict(steps=0), "--steps"),
        (dict(eval_every=-1), "--eval-every"),
        (dict(eval_episodes=0), "--eval-episodes"),
        (dict(batch_size=0), "--batch-size"),
        (dict(threads=0), "--threads"),
        (dict(validation_fraction=1.0), "--validation-fraction"),
        (dict(validation_fraction=-0.5), "--validation-fraction"),
        (dict(run_dir="/proc/x"), "--run-dir"),
        (dict(evaluate="none.pt"), "none.pt"),
        (dict(evaluate="other.pt"), "other.pt"),
        (dict(evaluate="config.json"), "config.json"),
    ],
)
def test_bad_flags_get_one_sentence(flags, message, train, elsewhere):
    torch.save({"algorithm": "DQN", "args": {}, "task": {}}, "other.pt")
    (elsewhere / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        train(**flags)
    said = str(end.value.code)
    assert message in said and "\n" not in said.strip()
    assert not (elsewhere / "run").exists()


@only_bc
def test_never_to_evaluate_or_save(train):
    assert train(eval_every=0, save_every=0) == []
    assert saved()["step"] == 20 and not os.path.exists("run/eval.csv")


@only_bc
def test_the_asked_threads_are_used(train, module, monkeypatch):
    found = []
    at_step(module, monkeypatch, 3, lambda learner: found.append(torch.get_num_threads()))
    train(run_dir="one")
    train(run_dir="two", threads=2)
    torch.set_num_threads(1)
    assert found == [1, 2] and module.Args().threads == 1


# --------------------------------------------------------------------------- Evaluate, act


def test_evaluate_needs_the_checkpoint_alone(train, module, pendulum_file, elsewhere, capsys):
    shutil.copy(pendulum_file, "gone.hdf5")
    last = train(dataset="gone.hdf5")[-1]
    (elsewhere / "gone.hdf5").unlink()
    before = sorted(elsewhere.rglob("*"))
    for path in ("run/checkpoint.pt", "run"):
        args = dict(evaluate=path, eval_episodes=2, device="cpu")
        [row] = module.train(module.Args(**args, seed=20))  # that of the evaluation at step 20
        assert {key: last[key] for key in row} == row and row["score"]
        assert f"{row['return_mean']:.4g}" in capsys.readouterr().out
    assert sorted(elsewhere.rglob("*")) == before  # nothing is written


@pytest.mark.parametrize(
    "name, flags, seen",
    [
        ("a2po", dict(eval_xi=(-1.0,)), lambda row, policy: "score_xi_-1" in row),
        (
            "decision_transformer",
            dict(target_returns=(-100.0, -900.0)),
            lambda row, policy: any("900" in key for key in row),
        ),
        ("diffusion_ql", dict(candidates=3), lambda row, policy: policy.candidates == 3),
        ("vae_bc", dict(act="mean"), None),
        ("flow_bc", dict(eval_act=("mode", "zero")), lambda row, policy: len(row) > 8),
    ],
)
def test_evaluate_obeys_the_flags_of_acting(name, flags, seen, pendulum_file, monkeypatch):
    module = load(name)
    module.train(module.Args(**tiny(name, dataset=str(pendulum_file), run_dir="run", eval_every=0)))
    loaded, real = [], module.load_policy
    monkeypatch.setattr(
        module, "load_policy", lambda *a, **k: loaded.append(real(*a, **k)) or loaded[0]
    )
    args = dict(evaluate="run", device="cpu", eval_episodes=1) | flags
    [row] = module.train(module.Args(**args))
    assert loaded[0].flags and set(flags) <= set(loaded[0].flags)
    if seen:
        assert seen(row, loaded[0])
    else:  # the mean latent is a function of the state
        s = np.random.default_rng(0).normal(size=(5, 3))
        assert (loaded[0].act(s) == loaded[0].act(s)).all()


@only_bc
def test_evaluate_in_another_environment(train, module, pendulum, elsewhere):
    arrays = pendulum | {"actions": pendulum["actions"] / 2}
    np.savez("toy.npz", **arrays)  # an .npz that names no environment
    train(dataset="toy.npz")
    with pytest.raises(SystemExit, match="--env-id"):
        module.train(module.Args(evaluate="run", device="cpu"))
    args = dict(evaluate="run", device="cpu", eval_episodes=1)
    assert module.train(module.Args(**args, env_id="Pendulum-v1"))[0]["length_mean"] == 200
    for env_id, reason in (("NoSuch-v0", "NoSuch"), ("Hopper-v5", r"Hopper-v5.*\(11,\)")):
        with pytest.raises(SystemExit, match=reason):
            module.train(module.Args(**args, env_id=env_id))


@only_bc
def test_scores_are_of_the_environment_that_is_asked(train, module, hopper, elsewhere):
    np.savez("hop.npz", **hopper)
    train(dataset="hop.npz")
    args = dict(evaluate="run", device="cpu", eval_episodes=2, env_id="Hopper-v5")
    [row] = module.train(module.Args(**args))
    wanted = 100 * (row["return_mean"] + 20.272305) / (3234.3 + 20.272305)
    assert row["score"] == pytest.approx(wanted)
    history = train(dataset="hop.npz", env_id="Hopper-v5", run_dir="env")
    assert math.isfinite(history[-1]["score"])


def test_a_policy_is_loaded_and_acts_without_anything_else(train, module):
    """One observation or many, NumPy or tensor, any float: actions of the same kind, in bounds."""
    train(steps=3, eval_every=0)
    policy = module.load_policy("run/checkpoint.pt")
    first = lambda x: x[0] if isinstance(x, tuple) else x  # noqa: E731  (a policy with a memory)
    s = np.random.default_rng(0).normal(size=(5, 3)) * 3
    for kind in (np.float64, np.float32, np.float16):
        a = first(policy.act(s.astype(kind)))
        assert isinstance(a, np.ndarray) and a.shape == (5, 1) and a.dtype == np.float32
        assert np.abs(a).max() <= 2
        assert first(policy.act(s[0].astype(kind))).shape == (1,)
    a = first(policy.act(torch.as_tensor(s)))
    assert isinstance(a, torch.Tensor) and a.shape == (5, 1)
    assert first(policy.act(torch.as_tensor(s[0]))).shape == (1,) and not a.requires_grad


def test_resume_and_load_refuse_another_algorithms_checkpoint(train, module, elsewhere):
    other = load("td3_bc" if name_of(module) == "bc" else "bc")
    flags = tiny(name_of(other), dataset="x", steps=3)
    args = other.Args(**flags)
    state = {"algorithm": other.Learner.__name__, "args": vars(args), "task": units.task()}
    (elsewhere / "run").mkdir()
    torch.save(state, "run/checkpoint.pt")
    for action in (lambda: train(resume=True), lambda: module.load_policy("run")):
        with pytest.raises(SystemExit, match=other.Learner.__name__):
            action()


STRICT = """
import gymnasium as gym, numpy as np
class Strict(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(np.float32([-0.99]), np.float32([5.93]), (1,), np.float32)
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-9, 9, 2), {}
    def step(self, a):
        assert self.action_space.contains(a), f"invalid action {a!r}"
        return self.np_random.uniform(-9, 9, 2), 1.0, False, False, {"path": np.zeros(
            int(self.np_random.integers(1, 9)))}
gym.register("Strict-v0", entry_point="strict:Strict", max_episode_steps=50)
"""


def test_actions_stay_inside_the_bounds_by_rounding_too(train, elsewhere):
    """Full throttle or full brake: -0.99 + 0.5 (1 + 1) 6.92 is 5.9300003 in float32."""
    (elsewhere / "strict.py").write_text(STRICT)
    r = np.random.default_rng(0)
    s = 2 * r.normal(size=(2000, 2))
    arrays = dict(observations=s, next_observations=s, rewards=np.ones(2000))
    arrays |= dict(actions=np.where(s[:, :1] < 0, np.float32(5.93), np.float32(-0.99)))
    arrays |= dict(terminals=np.zeros(2000), timeouts=np.arange(1, 2001) % 50 == 0)
    write_hdf5(elsewhere / "bang.hdf5", arrays)
    try:
        flags = dict(steps=60, eval_every=30, learning_rate=0.05)
        history = train(dataset="bang.hdf5", env_id="strict:Strict-v0", **flags)
    finally:
        gym.registry.pop("Strict-v0", None)
        sys.modules.pop("strict", None)
    assert [row["return_mean"] for row in history] == [50, 50]


def test_scaling_of_actions_at_the_bounds():
    """Both ends of 20,000 pairs of bounds, reached from -1 and 1."""
    r = np.random.default_rng(0)
    pairs = np.sort(np.float32(r.uniform(-10, 10, (20_000, 2)).round(2)), axis=1)
    low, high = pairs[pairs[:, 0] < pairs[:, 1]].T
    scaling = bc.Scaling({"sizes": [1, len(low)], "bounds": [low.tolist(), high.tolist()]})
    for x, bound in ((-1.0, low), (1.0, high)):
        a = scaling.action(torch.full((1, len(low)), x), np.zeros(1))
        np.testing.assert_allclose(a, bound, rtol=1e-5, atol=1e-5)
        assert (a >= low).all() and (a <= high).all()


# ------------------------------------------------------------------------------- Evaluation


class Constant:
    """A policy whose actions are a function of what it sees, with a second one beside it."""

    def actors(self):
        return {
            "": lambda s: np.zeros((len(s), 3), np.float32) + np.float32(s[:, :1]) / 9,
            "_other": lambda s: np.zeros((len(s), 3), np.float32),
        }


def test_evaluation_is_episodes_one_by_one():
    """All episodes are stepped together; each counts up to its own end and no further."""
    task = units.task() | dict(env="Hopper-v5", env_id="Hopper-v5", sizes=[11, 3])
    row = bc.evaluate(Constant(), task | {"scores": [10.0, 30.0]}, episodes=3, seed=7)
    returns, lengths, env = [], [], gym.make("Hopper-v5")
    for seed in (7, 8, 9):
        s, _ = env.reset(seed=seed)
        returns, lengths, done = [*returns, 0.0], [*lengths, 0], False
        while not done:
            s, r, terminated, truncated, _ = env.step(np.full(3, np.float32(s[0]) / 9))
            returns[-1], lengths[-1] = returns[-1] + r, lengths[-1] + 1
            done = terminated or truncated
    assert len(set(lengths)) > 1
    assert row["return_mean"] == pytest.approx(np.mean(returns), rel=1e-6)
    assert row["return_std"] == pytest.approx(np.std(returns), rel=1e-6)
    assert row["length_mean"] == pytest.approx(np.mean(lengths))
    assert row["score"] == pytest.approx(5 * (np.mean(returns) - 10), rel=1e-6)
    assert row["return_mean_other"] != row["return_mean"] and "score_other" in row
    without = bc.evaluate(Constant(), task, episodes=1, seed=7)  # D4RL's, where the data has none
    wanted = 100 * (without["return_mean"] + 20.272305) / (3234.3 + 20.272305)
    assert without["score"] == pytest.approx(wanted)


@only_bc
def test_a_video_of_the_last_evaluation(train, module, elsewhere):
    pytest.importorskip("moviepy")
    pytest.importorskip("pygame")
    train(capture_video=True)
    assert [path.suffix for path in (elsewhere / "run/video").iterdir() if path.suffix != ".json"]
    module.train(module.Args(evaluate="run", device="cpu", eval_episodes=1, capture_video=True))


@only_bc
def test_a_film_without_a_screen_says_what_to_set(train, module, monkeypatch):
    def blind(*_):
        raise RuntimeError("no OpenGL here")

    monkeypatch.setattr(gym.make("Pendulum-v1").unwrapped.__class__, "render", blind)
    train(capture_video=False)
    with pytest.raises(SystemExit, match=r"Pendulum-v1.*MUJOCO_GL.*no OpenGL here"):
        train(run_dir="filmed", capture_video=True)
    assert saved("filmed")["step"] == 20  # nothing of the training is lost


# ------------------------------------------------------------------------- On a GPU, and for it


FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero")


class Watch(TorchDispatchMode):
    """Names of the operators that would make a CPU wait for a GPU, or a graph wrong."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        indices = (
            [x for x in (args[1] if name.startswith("index") and len(args) > 1 else ())]
            if (name.split(".")[0] in ("index", "index_put", "index_put_"))
            else []
        )
        if any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices
        ):
            self.seen.add("boolean index")
        if any(word in name for word in FORBIDDEN):
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def phases(learner, steps=20) -> dict:
    """The different updates of a run, by name."""
    found = {}
    for step in range(1, steps + 1):
        update = learner.phase(step)
        found.setdefault(getattr(update, "__name__", str(update)), update)
    return found


def test_no_update_synchronises(module):
    learner = units.learner(module)
    found = phases(learner)
    for name, update in found.items():
        update()  # optimisers make their state in the first call
        with Watch() as watch:
            metrics = update()
        assert watch.seen == set(), name
        assert all(isinstance(x, torch.Tensor) for x in metrics.values())
    assert found


def test_watching_sees_what_is_forbidden():
    x = torch.arange(4.0)
    for action in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: x.unique(),
    ):
        with Watch() as watch:
            action()
        assert watch.seen
    with Watch() as watch:
        x[torch.tensor([1, 2])].mean()
    assert watch.seen == set()


def test_all_that_training_changes_is_in_the_checkpoint(module):
    """A learner that is given another's state takes the same steps: no tensor was forgotten."""
    rows = units.data()
    one, other = units.learner(module, rows), units.learner(module, rows)
    found = lambda x: [v for v in vars(x).values() if isinstance(v, torch.optim.Optimizer)]  # noqa: E731
    for step in range(1, 13):
        one.phase(step)()
    other.load_state_dict(one.state_dict())
    for a, b in zip(found(one), found(other)):
        b.load_state_dict(b.state_dict() | {"state": copy.deepcopy(a.state_dict()["state"])})
    results = []
    for x in (one, other):
        torch.manual_seed(5)
        results.append([x.phase(step)() for step in range(13, 19)])
    assert_same_state(results[0], results[1])


def metrics_of(module, device, graph, calls=8):
    """Metrics of some steps from one and the same start, with graphs or without."""
    torch.manual_seed(0)
    args = module.Args(**tiny(name_of(module)) | dict(device=device, hidden_dim=32))
    same_order = torch.backends.cudnn.flags(deterministic=True)  # of a convolution's sums
    with torch.cuda.stream(torch.cuda.Stream()), same_order:
        rows = {key: value.to(device) for key, value in units.data(50).items()}
        learner, cache = module.Learner(rows, units.task(rows), args), {}
        torch.manual_seed(1)
        found = []
        for step in range(1, 4 * calls + 1):
            update = learner.phase(step)
            if graph:
                update = cache.setdefault(update, module.graphed(update))
            found.append({key: value.detach().clone() for key, value in update().items()})
    torch.cuda.synchronize()  # whoever compares does so on another stream, which does not wait
    return found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_equals_eager(module):
    eager, graph = (metrics_of(module, "cuda", graph) for graph in (False, True))
    for a, b in zip(eager, graph):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], msg=key, rtol=0, atol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("first, second", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")])
def test_resume_on_another_device(first, second, train):
    train(device=first)
    assert [row["step"] for row in train(device=second, steps=40, resume=True)][-1] == 40
