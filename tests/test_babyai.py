"""datasets/babyai.py: rooms of things and instructions about them, as data and as environments."""

import importlib
import importlib.util
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, load, tiny

rt1, rt2 = load("rt1"), load("rt2")


@pytest.fixture(scope="module")
def babyai():
    pytest.importorskip("minigrid", reason="needs pip install --no-deps minigrid==3.2.0")
    return importlib.import_module("babyai")


@pytest.fixture(scope="module")
def maker():
    spec = importlib.util.spec_from_file_location("babyai_maker", ROOT / "datasets" / "make.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(babyai, maker, tmp_path_factory):
    """Path of a file of 8 demonstrations, as the command line makes it."""
    patch = pytest.MonkeyPatch()
    patch.setattr(maker, "FOLDER", tmp_path_factory.mktemp("datasets"))
    maker.main(maker.Args(names=["babyai-gotolocal"], demonstrations=8, seed=1))
    path = maker.path_of("babyai-gotolocal")
    patch.undo()
    return path


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.delitem(sys.modules, "babyai", raising=False)
    for name in ("minigrid", "minigrid.envs"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=r"^BabyAI needs minigrid: .*--no-deps minigrid==3\.2\.0$"):
        importlib.import_module("babyai")


def test_levels_are_those_of_make(babyai, maker):
    assert [*maker.BABYAI.values()] == [*babyai.LEVELS]
    assert {*maker.BABYAI} < {*maker.KNOWN}


def test_seven_actions_are_seven_bins(babyai):
    numbers = np.array([babyai.to_number(i) for i in range(7)])
    assert numbers.dtype == np.float32 and np.allclose(np.diff(numbers[:, 0]), 2 / 7)
    assert [babyai.to_action(x) for x in numbers] == [*range(7)]
    assert [babyai.to_action([x]) for x in (-1.0, -0.72, -0.71, 1.0)] == [0, 0, 1, 6]
    # What a policy says is the action that the data means.
    task = {"sizes": [5, 1], "bounds": [[-1.0], [1.0]], "image": [64, 64, 3]}
    task |= {"instructions": ["go"]}
    one, two = (x.Policy(task, x.Args(bins=7)) for x in (rt1, rt2))
    ways = {one: (one.tokenize, one.detokenize), two: (two.tokens_of, two.actions_of)}
    for policy, (tokenize, detokenize) in ways.items():
        tokens = tokenize(torch.tensor(numbers))
        assert (tokens - tokens[0]).flatten().tolist() == [*range(7)]
        said = policy.scaling.action(detokenize(tokens), numbers)
        assert [babyai.to_action(x) for x in said] == [*range(7)]


@pytest.mark.parametrize("level", ["GoToLocal", "PickupLoc", "PutNextLocal"])
def test_demonstrations_replayed_succeed(babyai, level):
    """With their seeds they show the same pictures, of the instructions that the data has."""
    data, how = babyai.demonstrations(level, 4, seed=2)
    assert " 0 of 4 attempts failed" in how and not data["timeouts"].any()
    ends = np.flatnonzero(data["terminals"])
    starts = np.append(0, ends[:-1] + 1)
    assert len(ends) == 4 and ends[-1] == len(data["rewards"]) - 1
    env, rng = gym.make(f"babyai:{level}-v0"), np.random.default_rng(2)
    for start, end in zip(starts, ends):
        ob, _ = env.reset(seed=int(rng.integers(2**31)))
        for i in range(start, end + 1):
            assert env.observation_space.contains(ob)
            assert np.array_equal(ob["image"], data["images"][i])
            assert np.array_equal(ob["state"], data["observations"][i])
            assert ob["instruction"] == data["instructions"][data["task_index"][i]]
            ob, reward, done, cut, info = env.step(data["actions"][i])
            assert reward == data["rewards"][i] and done == data["terminals"][i] and not cut
        assert reward == 1 and info["success"]
    assert len(set(data["instructions"])) == len(data["instructions"]) > 1


def test_what_is_carried_and_the_way_it_faces(babyai):
    data, _ = babyai.demonstrations("PutNextLocal", 4, seed=0)
    carried, action = data["observations"][:, 4], [babyai.to_action(x) for x in data["actions"]]
    assert (data["observations"][:, :4].sum(1) == 1).all()
    for i in np.flatnonzero(data["terminals"] == 0):  # 3 picks up, 4 drops
        assert carried[i + 1] == {3: 1, 4: 0}.get(action[i], carried[i])
    env = babyai.BabyAI("GoToLocal")
    before = env.reset(seed=0)[0]["state"][:4].argmax()
    after = env.step(babyai.to_number(1))[0]["state"][:4].argmax()  # a turn to the right
    assert after == (before + 1) % 4


def test_a_seed_is_the_whole_room(babyai):
    one, two = (babyai.demonstrations("PickupLoc", 3, seed=5)[0] for _ in range(2))
    assert all(np.array_equal(one[key], two[key]) for key in one)
    other, _ = babyai.demonstrations("PickupLoc", 3, seed=6)
    assert not np.array_equal(one["images"][0], other["images"][0])
    env = gym.make("babyai:GoToLocal-v0")
    first, second = (env.reset(seed=4)[0], env.reset()[0])
    again, more = (env.reset(seed=4)[0], env.reset()[0])
    for a, b in ((first, again), (second, more)):
        assert np.array_equal(a["image"], b["image"]) and a["instruction"] == b["instruction"]
    assert not np.array_equal(first["image"], second["image"])


def test_the_time_limit_ends_an_episode(babyai):
    for level, limit in babyai.LEVELS.items():
        env = gym.make(f"babyai:{level}-v0")
        assert env.spec.max_episode_steps == limit
        env.reset(seed=0)
        for step in range(limit):
            *_, reward, done, cut, info = env.step(babyai.to_number(5))  # toggles: never asked for
            assert cut == (step == limit - 1) and not (reward or done or info["success"])


@pytest.mark.parametrize("name", ["rt1", "rt2"])
def test_the_file_trains_and_is_evaluated(name, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = load(name)
    data, task = module.load_dataset(str(made))
    assert task["env"] == "babyai:GoToLocal-v0" and task["scores"] == [0.0, 1.0]
    assert data["episodes"].max() == 7 and data["images"].shape[1:] == (64, 64, 3)
    assert set(np.unique(data["task_index"])) == set(range(len(task["instructions"])))
    flags = dict(dataset=str(made), bins=7, run_dir="run", eval_every=20, eval_episodes=2)
    [row] = module.train(module.Args(**tiny(name, **flags)))
    assert row["step"] == 20 and 0 <= row["score"] <= 100 and 1 <= row["length_mean"] <= 64
