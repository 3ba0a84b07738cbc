"""datasets/metaworld_arm.py: many tasks of another robot arm, as data and as environments."""

import importlib
import importlib.util
import re
import sys

import gymnasium as gym
import h5py
import mujoco
import numpy as np
import pytest
from conftest import ROOT, load, tiny

SEED = 1  # of the demonstrations below: none of their attempts fails


@pytest.fixture(scope="module")
def arm():
    pytest.importorskip("metaworld", reason="needs pip install --no-deps metaworld==3.1.1 scipy")
    module = importlib.import_module("metaworld_arm")
    try:
        module.MetaWorld(["reach"]).reset(seed=0)
    except Exception as error:
        pytest.skip(f"needs Debian's libosmesa6 or libegl1: {error}")
    return module


@pytest.fixture(scope="module")
def env(arm):
    """MT10 without its time limit."""
    return gym.make("metaworld_arm:MT10-v0").unwrapped


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("metaworld_maker", ROOT / "datasets" / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(arm, maker, tmp_path_factory):
    """Path of a file of 10 demonstrations, one of each task, as the command line makes it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(maker, "FOLDER", tmp_path_factory.mktemp("datasets"))
    maker.main(maker.Args(names=["metaworld-mt10"], demonstrations=10, seed=SEED))
    path = maker.path_of("metaworld-mt10")
    patch.undo()
    return path


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.delitem(sys.modules, "metaworld_arm", raising=False)
    for name in ("metaworld", "metaworld.env_dict"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"^Meta-World's arm needs .*metaworld==3\.1\.1 scipy \("):
        importlib.import_module("metaworld_arm")


def test_tasks_are_those_of_meta_world_and_of_make(arm, maker):
    assert {f"{task}-v3" for task in arm.TASKS} == {*arm.ALL_V3_ENVIRONMENTS}
    assert (len(arm.SETS["MT10"]), len(arm.SETS["MT50"])) == (10, 50)
    assert {*maker.METAWORLD.values()} == {"MT10", "MT50"} < {*arm.SETS}
    assert {*maker.METAWORLD} < {*maker.KNOWN}
    words = gym.make("metaworld_arm:reach-v0").observation_space["instruction"]
    assert len({*arm.TASKS.values()}) == 50 and all(map(words.contains, arm.TASKS.values()))
    for name, tasks in arm.SETS.items():
        spec = gym.spec(f"{name}-v0")
        assert (spec.kwargs["tasks"], spec.max_episode_steps) == (tasks, arm.STEPS)


@pytest.mark.filterwarnings("ignore:Constant")  # the experts ask for more than 1
def test_demonstrations_replayed_succeed(arm, env, made):
    """With their seeds they show the same pictures; the actions are the experts', with noise."""
    with h5py.File(made) as file:
        data = {key: file[key][()] for key in file} | dict(file.attrs)
    assert " 0 of 10 attempts failed" in data["description"] and not data["timeouts"].any()
    ends = np.flatnonzero(data["terminals"])
    starts = np.append(0, ends[:-1] + 1)
    assert len(ends) == 10 and ends[-1] == len(data["rewards"]) - 1
    rng = np.random.default_rng(SEED)
    for task, start, end in zip(arm.SETS["MT10"], starts, ends):  # in turn
        options = {"task": task}
        ob, info = env.reset(seed=int(rng.integers(2**31)), options=options)
        expert = arm.ENV_POLICY_MAP[f"{task}-v3"]()
        assert info["task"] == task
        for i in range(start, end + 1):
            assert env.observation_space.contains(ob)
            assert np.array_equal(ob["image"], data["images"][i])
            assert np.array_equal(ob["state"], data["observations"][i])
            assert ob["instruction"] == data["instructions"][data["task_index"][i]]
            assert ob["instruction"] == arm.TASKS[task]
            wanted = np.clip(expert.get_action(env.seen), -1, 1)
            wanted = np.clip(wanted + rng.normal(0, 0.1, 4), -1, 1)
            assert np.allclose(data["actions"][i], wanted, atol=1e-6)
            ob, reward, done, cut, info = env.step(data["actions"][i])
            assert reward == data["rewards"][i] and done == data["terminals"][i] and not cut
        assert reward == 1 and info["success"]
    assert len(set(data["instructions"])) == 10


def test_an_attempt_that_fails_is_dropped_and_counted(arm, monkeypatch):
    monkeypatch.setattr(arm, "STEPS", 62)
    data, how = arm.demonstrations("reach", 3, seed=0)
    failed, attempts = map(int, re.search(r"(\d+) of (\d+) attempts failed", how).groups())
    assert failed > 0 and attempts == failed + 3
    assert np.diff(np.flatnonzero(data["terminals"]), prepend=-1).max() <= 62
    assert data["terminals"].sum() == data["rewards"].sum() == 3 and data["terminals"][-1]


def test_things_are_seen_but_not_felt(env, arm):
    """Two scenes of a task differ in the picture and not in the state."""
    for task in arm.SETS["MT10"]:
        one, two = (env.reset(seed=i, options={"task": task})[0] for i in (0, 1))
        assert np.array_equal(one["state"], two["state"])
        assert (one["image"] != two["image"]).any(-1).sum() >= 20
        # What the reset moved is where the simulator has it.
        mujoco.mj_forward(env.arm.model, env.arm.data)
        assert np.array_equal(env.picture(), two["image"])
    ob, _ = env.reset(seed=0, options={"task": "push"})
    things, image = env.seen[4:7].copy(), ob["image"]
    env.arm._set_obj_xyz(np.array([0.1, 0.6, 0.02]))
    env.seen = env.arm._get_obs()
    assert np.abs(env.seen[4:7] - things).max() > 0.02
    assert np.array_equal(env.observation()["state"], ob["state"])
    assert not np.array_equal(env.picture(), image)
    assert len(ob["state"]) == 4  # the hand's place and its opening


def test_the_picture_is_upright_and_in_colour(env):
    def hand(image):
        """Row and column of the one finger's cyan."""
        red, green, blue = np.moveaxis(image.astype(int), -1, 0)
        return np.argwhere((red < 80) & (green > 150) & (blue > 150)).mean(0)

    image = env.reset(seed=0, options={"task": "push"})[0]["image"]
    red, green, blue = image[-3:, 32:].astype(int).reshape(-1, 3).T
    assert (red > green).mean() > 0.9 and (green > blue).mean() > 0.9 and red.mean() > 100  # table
    assert np.ptp(image[:2].astype(int), axis=-1).max() < 10 and image[:2].mean() > 100  # grey
    assert env.render().shape == (256, 256, 3) and np.array_equal(env.render()[::4, ::4], image)
    row, column = hand(image)
    for axis in range(3):
        ob, _ = env.reset(seed=0, options={"task": "push"})
        before, action = ob["state"], np.zeros(4)
        action[axis] = 1
        for _ in range(12):
            ob, *_ = env.step(action)
        moved = ob["state"] - before
        assert moved[axis] > 0.07 and np.abs(np.delete(moved, axis)).max() < 0.01
        # To the robot's right is right, upwards is up, and away from the robot is up, too.
        down, right = hand(ob["image"]) - (row, column)
        assert right > 5 if axis == 0 else down < -2


def test_actions_and_their_bounds(env):
    def after(*action):
        env.reset(seed=0, options={"task": "push"})
        for _ in range(8):
            ob, *_ = env.step(np.float32(action))
        return ob["state"]

    assert env.action_space == gym.spaces.Box(-1, 1, (4,), np.float32)
    assert after(0, 0, 0, -1)[3] > after(0, 0, 0, 1)[3] + 0.2  # open, closed
    assert np.array_equal(after(9, 0, -9, 9), after(1, 0, -1, 1))


def test_the_model_moves_as_meta_worlds_does(arm, env):
    """Nothing that can touch or weighs something is gone; textures are their mean colours."""
    for task in ("drawer-open", "peg-insert-side", "reach"):
        env.reset(seed=3, options={"task": task})
        whole = arm.ALL_V3_ENVIRONMENTS[f"{task}-v3"]()
        whole._set_task_called, whole._freeze_rand_vec = True, False
        whole.seeded_rand_vec, whole._partially_observable = True, False
        del whole.sawyer_observation_space
        _, number = np.random.default_rng(3).integers((10, 2**31))
        whole.seed(int(number))
        whole.reset()
        rng = np.random.default_rng(0)
        for _ in range(20):
            action = rng.uniform(-1, 1, 4)
            seen, *_ = whole.step(action)
            env.step(action)
            assert np.array_equal(seen, env.seen)
        full, lean = whole.model, env.arm.model
        assert lean.nmeshface < full.nmeshface / 3
        touch = [((x.geom_contype | x.geom_conaffinity) > 0).sum() for x in (full, lean)]
        assert touch[0] == touch[1]
        assert np.array_equal(full.body_inertia, lean.body_inertia)


def test_a_seed_is_the_whole_episode(arm, env):
    one, two = (arm.demonstrations("reach", 2, seed=5)[0] for _ in range(2))
    assert all(np.array_equal(one[key], two[key]) for key in one)
    other, _ = arm.demonstrations("reach", 2, seed=6)
    assert not np.array_equal(one["images"][0], other["images"][0])
    runs = [[env.reset(seed=4), *(env.reset() for _ in range(7))] for _ in range(2)]
    for (a, info), (b, _) in zip(*runs):
        assert np.array_equal(a["image"], b["image"])
        assert a["instruction"] == b["instruction"] == arm.TASKS[info["task"]]
    assert len({info["task"] for _, info in runs[0]}) >= 4


def test_two_environments_of_a_task_share_nothing(arm):
    def go(env):
        return env.step(np.float32([1, 1, -1, 0]))[0]

    one, two = (gym.make("metaworld_arm:drawer-open-v0") for _ in range(2))
    first, _ = one.reset(seed=0)
    assert first["instruction"] == "open the drawer"
    alone = [go(one) for _ in range(3)]
    assert np.array_equal(one.reset(seed=0)[0]["image"], first["image"])
    assert not np.array_equal(two.reset(seed=1)[0]["image"], first["image"])
    for wanted in alone:
        two.step(np.float32([-1, 0, 0, 1]))
        assert all(np.array_equal(wanted[key], x) for key, x in go(one).items())


def test_the_time_limit_ends_an_episode(arm):
    env = gym.make("metaworld_arm:drawer-open-v0")
    env.reset(seed=0)
    for step in range(arm.STEPS):
        *_, reward, done, cut, info = env.step(np.zeros(4, np.float32))
        assert cut == (step == arm.STEPS - 1) and not (reward or done or info["success"])


@pytest.mark.parametrize("name", ["rt1", "rt2", "pi0"])
def test_the_file_trains_and_is_evaluated(name, arm, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load(name)
    data, task = module.load_dataset(str(made))
    assert task["env"] == "metaworld_arm:MT10-v0" and task["scores"] == [0.0, 1.0]
    assert task["sizes"] == [4, 4] and np.array_equal(task["bounds"], [[-1] * 4, [1] * 4])
    assert data["episodes"].max() == 9 and data["images"].shape[1:] == (64, 64, 3)
    assert (
        set(np.unique(data["task_index"])) == set(range(10)) == {*range(len(task["instructions"]))}
    )
    flags = dict(dataset=str(made), run_dir="run", steps=1, eval_every=1, eval_episodes=1)
    [row] = module.train(module.Args(**tiny(name, **flags)))
    assert row["step"] == 1 and 0 <= row["score"] <= 100 and 1 <= row["length_mean"] <= 200
