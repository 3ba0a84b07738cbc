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


def cells(picture) -> dict[str, str]:
    """The colour in each cell of a picture by what its place is called. Thin lines are mixed with
    the floor's grey, so what counts is the direction in which a pixel leaves grey."""
    from minigrid.core.constants import COLORS

    def hue(rgb):
        return (rgb - rgb.min()) / max(1, np.ptp(rgb))

    found = {}
    for x, y in [(x, y) for x in range(7) for y in range(7)]:
        cell = picture[8 * y : 8 * y + 8, 8 * x : 8 * x + 8].reshape(64, 3).astype(float)
        side = ["", f"right {x - 3} ", f"left {3 - x} "][np.sign(x - 3)]
        pixel = cell[np.ptp(cell, axis=1).argmax()]
        away = {name: np.abs(hue(pixel) - hue(rgb * 1.0)).max() for name, rgb in COLORS.items()}
        name = min(away, key=away.get) if np.ptp(pixel) > 8 else "grey"
        found[f"{side}{f'ahead {6 - y}' if y < 6 else ''}".strip()] = name
    return found


def test_answers_are_what_the_pictures_show(babyai):
    """Read from the pixels alone: the colour of a thing is at its place, none at an empty one."""
    data, pictures = babyai.questions(40, seed=3), {}
    assert len(data["images"]) == 40 and data["picture"].max() == 39
    assert {*data["kinds"]} == {"where", "what"} and len(data["kinds"]) == len(data["questions"])
    where, what, twice = [], [], 0
    told = {"where": 0, "what": 0, "nothing": 0, "not here": 0}
    for i in range(len(data["answer"])):
        picture = int(data["picture"][i])
        seen = pictures.setdefault(picture, cells(data["images"][picture]))
        question = data["questions"][data["question"][i]]
        answer = data["answers"][data["answer"][i]]
        if answer == "nothing":
            assert seen[question.removeprefix("what is ")] == "grey"
        elif answer == "not here":  # another kind of thing may have the colour
            assert question.removeprefix("where is the ") in babyai.THINGS
        else:
            asks = question.startswith("what")
            place = question.removeprefix("what is ") if asks else answer
            thing = answer if asks else question.removeprefix("where is the ")
            assert thing.split()[0] == seen[place], (question, answer)
            what += [(picture, place, thing)] * asks
            where += [(picture, thing, place)] * (not asks)
        told[answer if answer in told else data["kinds"][data["question"][i]]] += 1
    assert told["not here"] == told["nothing"] == 40 and min(told["where"], told["what"]) > 60
    far = lambda place: sum(map(int, place.split()[1::2]))  # noqa: E731
    for picture, thing, place in where:  # of two of a kind it is the nearer one
        ours = [x for other, x, kind in what if other == picture and kind == thing]
        assert all(far(place) <= far(x) for x in ours)
        twice += any(x != place for x in ours)
    assert twice
    again, other = babyai.questions(40, seed=3), babyai.questions(40, seed=4)
    assert all(np.array_equal(data[key], again[key]) for key in data)
    assert not np.array_equal(data["images"], other["images"])


def test_a_thing_is_where_the_agent_gets_to(babyai):
    """Words of a place are steps: so many to the side, so many ahead, is where the thing is."""
    env, ahead = babyai.BabyAI("GoToLocal"), [(1, 0), (0, 1), (-1, 0), (0, -1)]
    count = 0
    for seed in range(10):
        env.reset(seed=seed)
        level, found = env.level, babyai.things(env.level)
        way, right = (np.array(ahead[(level.agent_dir + i) % 4]) for i in (0, 1))
        for place, thing in found.items():
            words = place.split()
            steps = dict(zip(words[::2], map(int, words[1::2])))
            side = steps.get("right", 0) - steps.get("left", 0)
            at = level.grid.get(*(level.agent_pos + steps.get("ahead", 0) * way + side * right))
            assert f"{at.color} {at.type}" == thing
        far = [sum(map(int, place.split()[1::2])) for place in found]
        assert far == sorted(far)
        count += len(far)
    assert count > 20


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


def test_rt2_learns_from_questions_about_rooms(made, maker, tmp_path, monkeypatch):
    monkeypatch.setattr(maker, "FOLDER", tmp_path)
    maker.main(maker.Args(names=["babyai-questions"], pictures=30, seed=1))
    asked = str(maker.path_of("babyai-questions"))
    assert maker.names_there() == []  # no transitions: not among the data sets
    flags = dict(dataset=str(made), questions=asked, co_finetune=0.5, bins=7, patch=8)
    flags |= dict(run_dir=str(tmp_path / "run"), eval_every=20, eval_episodes=1)
    [row] = rt2.train(rt2.Args(**tiny("rt2", **flags)))
    assert 0 <= row["validation/answer_accuracy"] <= 1
    policy = rt2.load_policy(tmp_path / "run")
    assert len(policy.net.eyes.position) == 64  # a token for each cell of 8 x 8 pixels
    said = policy.answer(np.zeros((64, 64, 3), np.uint8), "where is the red ball")
    assert {*said.split()} <= {*policy.vocabulary}
