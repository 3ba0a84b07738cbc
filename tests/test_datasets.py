"""Loading: every format gives the same arrays, a file is believed, bad data is refused.

The block is the same in every file of algorithms/ (test_structure.py), so it is tested in one.
"""

import importlib
import re

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from conftest import ROOT, load, write_hdf5

pytestmark = pytest.mark.usefixtures("elsewhere")

bc = load("bc")
STATES = ("observations", "next_observations")


def assert_equal(one, other):
    (one, task), (other, other_task) = one, other
    assert one.keys() == other.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], other[key], err_msg=key)
    for key in ("env_id", "sizes", "bounds"):
        assert task[key] == other_task[key]


def refusal(*args) -> str:
    with pytest.raises(SystemExit) as end:
        bc.load_dataset(*map(str, args))
    said = str(end.value.code)
    assert "\n" not in said
    return said


def without(arrays: dict, *keys: str) -> dict:
    return {key: array for key, array in arrays.items() if key not in keys}


def steps(episodes=10, length=20, S=3, A=2) -> dict[str, np.ndarray]:
    """Episodes of one length that time out, in D4RL's layout, without an environment."""
    r, n = np.random.default_rng(0), episodes * length
    s = r.normal(size=(episodes, length + 1, S)).cumsum(1) + 5 * r.normal(size=(episodes, 1, S))
    s = s.astype("f4")
    arrays = dict(observations=s[:, :-1].reshape(n, S), next_observations=s[:, 1:].reshape(n, S))
    arrays |= dict(actions=r.uniform(-1, 1, (n, A)).astype("f4"), terminals=np.zeros(n, bool))
    return arrays | dict(rewards=r.normal(size=n), timeouts=np.arange(1, n + 1) % length == 0)


def returns(data) -> np.ndarray:
    """Of the episodes, as the loader has them."""
    _, first = np.unique(data["episodes"], return_index=True)
    return data["returns_to_go"][first, 0]


# ------------------------------------------------------------------------------------- Formats


def record_minari(name, env, arrays, length, **options) -> str:
    """Arrays of episodes of one length as a local Minari data set."""
    buffers = []
    for rows in np.split(np.arange(len(arrays["rewards"])), len(arrays["rewards"]) // length):
        part = {key: array[rows] for key, array in arrays.items()}
        observations = np.append(part["observations"], part["next_observations"][-1:], axis=0)
        ends = dict(terminations=part["terminals"], truncations=part["timeouts"])
        buffers.append(
            minari.data_collector.EpisodeBuffer(
                observations=observations, actions=part["actions"], rewards=part["rewards"], **ends
            )
        )
    minari.create_dataset_from_buffers(
        dataset_id=name,
        buffer=buffers,
        env=env,
        algorithm_name="test",
        author="test",
        author_email="test@example.com",
        code_permalink="https://example.com",
        **options,
    )
    return name


def test_every_format_gives_the_same_arrays(pendulum, pendulum_file, elsewhere):
    data, task = bc.load_dataset(str(pendulum_file))
    assert task["env_id"] == "Pendulum-v1" and task["scores"] == [-1500, 0]
    assert task["sizes"] == [3, 1] and len(returns(data)) == 8
    assert {array.dtype for key, array in data.items() if key not in ("episodes", "recorded")} == {
        np.dtype(np.float32)
    }
    np.testing.assert_array_equal(data["rewards"][:, 0], np.float32(pendulum["rewards"]))

    np.savez(elsewhere / "tiny.npz", **pendulum)
    assert_equal((data, task), bc.load_dataset("tiny.npz", "Pendulum-v1"))

    name = record_minari("pendulum/tiny-v0", gym.make("Pendulum-v1"), pendulum, 200)
    assert_equal((data, task), bc.load_dataset(name))
    folder = elsewhere.parent / "minari" / name
    for path in (folder, folder / "data"):
        assert_equal((data, task), bc.load_dataset(str(path)))
    local = record_minari("tiny-v0", gym.make("Pendulum-v1"), pendulum, 200)  # an id without a /
    assert_equal((data, task), bc.load_dataset(local))


def test_attributes_may_be_arrays(elsewhere):
    """An .npz has no attributes, and other languages write strings of a fixed length."""
    arrays = steps() | {"actions": 5 * steps()["actions"]}
    about = dict(action_low=np.float32([-5, -5]), action_high=np.float32([5]), ref_min_score=[0.0])
    about |= dict(ref_max_score=np.array(1.0), infos=np.array([{"a": 1}] * 200, object))
    np.savez("wide.npz", **arrays, **about)  # the pickled array is nobody's business
    _, task = bc.load_dataset("wide.npz")
    assert task["bounds"] == [[-5, -5], [5, 5]] and task["scores"] == [0, 1]
    write_hdf5(elsewhere / "wide.hdf5", arrays, action_low=[-5.0], action_high=[5.0] * 2)
    assert bc.load_dataset("wide.hdf5")[1]["bounds"] == task["bounds"]
    write_hdf5(elsewhere / "bytes.hdf5", steps(A=1), env_id=np.bytes_("Pendulum-v1"))
    assert bc.load_dataset("bytes.hdf5")[1]["env_id"] == "Pendulum-v1"


def test_a_name_of_ours_is_a_file_of_the_datasets_folder(elsewhere):
    """Also where a folder has that name, as after --run-dir pendulum-medium-replay."""
    name = "pendulum-medium-replay"
    ours = bc.load_dataset(str(ROOT / "datasets" / f"{name}.hdf5"))
    (elsewhere / name).mkdir()
    module = load("bc")
    if not (module_datasets := module.__file__).startswith(str(ROOT)):
        pytest.skip(f"{module_datasets} has no datasets beside it")
    assert_equal(ours, bc.load_dataset(name))


def test_environment_of_a_module_and_none(toy_env, elsewhere):
    arrays = {"observations": np.zeros((10, 2)), "actions": np.linspace(-1, 3, 10)}
    arrays |= {key: np.zeros(10) for key in ("rewards", "terminals")}
    path = write_hdf5(elsewhere / "toy.hdf5", arrays | {"timeouts": np.arange(10) % 5 == 4})
    _, task = bc.load_dataset(str(path), toy_env)
    assert task["env"] == toy_env and task["env_id"] == "Toy-v0"
    assert task["bounds"] == [[-1], [3]] and task["scores"] is None
    assert "an action leaves" in refusal(path)  # -1 to 1, where nobody says otherwise
    arrays["actions"] /= 3
    write_hdf5(path, arrays | {"timeouts": np.arange(10) % 5 == 4})
    assert bc.load_dataset(str(path))[1]["env"] == "none"
    assert bc.load_dataset(str(path), "none")[1]["env_id"] == "none"


def test_actions_are_scaled_from_the_bounds(pendulum, pendulum_file):
    data, task = bc.load_dataset(str(pendulum_file))
    assert task["bounds"] == [[-2], [2]]
    np.testing.assert_allclose(data["actions"], pendulum["actions"] / 2, atol=1e-6)
    assert np.abs(data["actions"]).max() > 0.9


def test_bounds_and_scores_are_of_the_environment_that_is_used(elsewhere, toy_env):
    arrays = steps(S=2, A=1)
    attributes = dict(action_low=[-1.0], action_high=[1.0], ref_min_score=0.0, ref_max_score=100.0)
    write_hdf5(elsewhere / "m.hdf5", arrays, env_id="MountainCarContinuous-v0", **attributes)
    assert bc.load_dataset("m.hdf5")[1]["scores"] == [0, 100]
    _, task = bc.load_dataset("m.hdf5", toy_env)  # another one, of the same sizes
    assert task["scores"] is None and task["bounds"] == [[-1], [3]]
    write_hdf5(elsewhere / "n.hdf5", arrays, **attributes)  # names none: they are of the given one
    assert bc.load_dataset("n.hdf5", toy_env)[1]["scores"] == [0, 100]


def test_bounds_are_rounded_inwards(elsewhere):
    """float32(0.1) lies above 0.1: an environment that checks in float64 would refuse it."""
    arrays = steps(A=2) | {"actions": 0.1 * steps(A=2)["actions"]}
    write_hdf5(elsewhere / "b.hdf5", arrays, action_low=[-0.1] * 2, action_high=[0.1] * 2)
    low, high = bc.load_dataset("b.hdf5")[1]["bounds"]
    assert min(low) >= -0.1 and max(high) <= 0.1 and min(high) > 0.0999999
    assert all(float(np.float32(x)) == x for x in (*low, *high))


@pytest.mark.parametrize("env, kind", [("weightless", "g"), ("limit", "steps"), ("wrapped", "w")])
def test_a_minari_set_is_evaluated_in_its_own_environment(env, kind, pendulum, elsewhere):
    made = {
        "weightless": lambda: gym.make("Pendulum-v1", g=0.0),
        "limit": lambda: gym.make("Pendulum-v1", max_episode_steps=500),
        "wrapped": lambda: gym.wrappers.TimeAwareObservation(gym.make("Pendulum-v1")),
    }[env]()
    arrays = dict(pendulum)
    if env == "wrapped":
        arrays |= {key: np.append(pendulum[key], pendulum[key][:, :1], axis=1) for key in STATES}
    _, task = bc.load_dataset(record_minari(f"mine/{env}-v0", made, arrays, 200))
    again = bc.make_env(task)
    assert task["env_id"] == "Pendulum-v1"
    assert again.unwrapped.g == (0.0 if env == "weightless" else 10.0)
    assert again.spec.max_episode_steps == (500 if env == "limit" else 200)
    assert again.observation_space.shape == ((4,) if env == "wrapped" else (3,))


def test_a_minari_set_is_evaluated_where_it_says(pendulum, elsewhere):
    name = record_minari(
        "mine/eval-v0",
        gym.make("Pendulum-v1"),
        pendulum,
        200,
        eval_env=gym.make("Pendulum-v1", g=5),
    )
    assert bc.make_env(bc.load_dataset(name)[1]).unwrapped.g == 5


@pytest.mark.parametrize("high", [2.0, 0.05])
def test_a_minari_set_has_its_own_bounds(high, elsewhere):
    arrays = steps() | {"actions": high * steps()["actions"]}
    box = gym.spaces.Box(-np.float32(high), np.float32(high), (2,))
    states = gym.spaces.Box(-np.inf, np.inf, (3,))
    spaces = dict(action_space=box, observation_space=states)
    data, task = bc.load_dataset(record_minari("mine/box-v0", None, arrays, 20, **spaces))
    np.testing.assert_allclose(task["bounds"], [[-high] * 2, [high] * 2])
    np.testing.assert_allclose(data["actions"], steps()["actions"], atol=1e-5)
    assert task["env"] == "none"


# ------------------------------------------------------------------------------------ Episodes


@pytest.fixture
def counted() -> dict[str, np.ndarray]:
    """10 steps that count: a terminal at 2, a timeout at 5, cut at 9. Successors at an episode's
    end are no row of the data: 102, 105, 109."""
    s = np.arange(10.0)[:, None]
    s_next = s + 1
    s_next[[2, 5, 9]] = [[102], [105], [109]]
    mark = np.arange(10)
    arrays = dict(observations=s, next_observations=s_next, actions=s / 10, rewards=s[:, 0])
    return arrays | dict(terminals=mark == 2, timeouts=mark == 5)


def test_a_terminal_is_not_a_timeout(counted, elsewhere):
    write_hdf5(elsewhere / "c.hdf5", counted)
    data, _ = bc.load_dataset("c.hdf5")
    assert np.flatnonzero(data["terminals"][:, 0]).tolist() == [2]
    np.testing.assert_array_equal(data["next_observations"], counted["next_observations"])
    assert data["episodes"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert returns(data).tolist() == [3, 12, 30] and data["recorded"].all()
    assert data["returns_to_go"][:, 0].tolist() == [3, 3, 2, 12, 9, 5, 30, 24, 17, 9]


def test_without_successors_a_timeout_loses_its_last_row_and_keeps_its_reward(counted, elsewhere):
    write_hdf5(elsewhere / "c.hdf5", without(counted, "next_observations"))
    data, _ = bc.load_dataset("c.hdf5")
    s = data["observations"][:, 0]
    assert s.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]  # 5 and 9 have no successor in the file
    assert s[data["terminals"][:, 0] > 0].tolist() == [2]
    assert returns(data).tolist() == [3, 12, 30]
    assert data["returns_to_go"][:, 0].tolist() == [3, 3, 2, 12, 9, 30, 24, 17]
    assert s[~data["recorded"]].tolist() == [2]  # what stands there is the next episode's state
    found = data["recorded"]
    np.testing.assert_array_equal(data["next_observations"][found], s[found, None] + 1)


def test_marked_ends_are_the_ends(elsewhere):
    """A walk that keeps coming back to where it started: no row may be taken for a reset."""
    r, rows = np.random.default_rng(0), []
    for _ in range(200):
        x = r.uniform(-0.1, 0.1, 2)
        for t in range(400):
            a = r.uniform(-1, 1, 2)
            out = bool((np.abs(x + 0.1 * a) > 1).any())
            rows.append((x, a, float(out), out, t == 399 and not out))
            x = x + 0.1 * a
            if out:
                break
    columns = ("observations", "actions", "rewards", "terminals", "timeouts")
    walk = dict(zip(columns, map(np.array, zip(*rows))))
    write_hdf5(elsewhere / "walk.hdf5", walk)
    data, _ = bc.load_dataset("walk.hdf5")
    assert len(returns(data)) == 200
    assert len(data["rewards"]) == len(rows) - walk["timeouts"].sum()
    assert returns(data).mean() == pytest.approx(walk["terminals"].sum() / 200)


@pytest.mark.parametrize("change", ["half", "noise"])
def test_successors_need_not_be_the_next_rows_bit_for_bit(change, elsewhere):
    arrays = steps()
    if change == "half":
        arrays["observations"] = arrays["observations"].astype("f2")
    else:
        arrays["next_observations"] = arrays["next_observations"] + 1e-5
    write_hdf5(elsewhere / "x.hdf5", arrays)
    assert len(returns(bc.load_dataset("x.hdf5")[0])) == 10


def test_the_last_reward_counts(elsewhere):
    arrays = steps(100, 20)
    arrays["rewards"] = np.zeros(2000)
    arrays["rewards"][19::20] = np.arange(100) % 10 < 3  # 30 of 100 succeed, at the last step
    write_hdf5(elsewhere / "bare.hdf5", without(arrays, "next_observations"))
    found = returns(bc.load_dataset("bare.hdf5")[0])
    assert found.mean() == pytest.approx(0.3) and found.max() == 1


def test_truncations_are_timeouts(elsewhere):
    arrays = without(steps(30, 20), "next_observations")
    arrays["truncations"] = arrays.pop("timeouts")
    write_hdf5(elsewhere / "t.hdf5", arrays)
    data, _ = bc.load_dataset("t.hdf5")
    assert len(data["rewards"]) == 570 and len(returns(data)) == 30


def test_a_file_without_any_end_is_refused(elsewhere):
    write_hdf5(elsewhere / "e.hdf5", without(steps(), "timeouts"))
    said = refusal("e.hdf5")
    assert "terminals" in said and "timeouts" in said and "truncations" in said


@pytest.mark.parametrize("flat", [(), ("timeouts",), ("terminals", "rewards")])
def test_columns_may_be_flat_or_not(flat, elsewhere):
    """No array may be combined with another of another shape: that asks for N x N bytes."""
    arrays = steps(1000, 20)
    write_hdf5(elsewhere / "flat.hdf5", arrays)
    keys = {"rewards", "terminals", "timeouts"} - set(flat)
    write_hdf5(elsewhere / "column.hdf5", arrays | {key: arrays[key][:, None] for key in keys})
    assert_equal(bc.load_dataset("flat.hdf5"), bc.load_dataset("column.hdf5"))


def test_one_step_episodes(elsewhere):
    arrays = without(steps(100, 1), "next_observations")
    write_hdf5(elsewhere / "one.hdf5", arrays)
    assert "next_observations" in refusal("one.hdf5")  # nothing follows anything
    write_hdf5(elsewhere / "bandit.hdf5", arrays | {"terminals": arrays["timeouts"]})
    data, _ = bc.load_dataset("bandit.hdf5")
    assert len(data["rewards"]) == 100 and len(returns(data)) == 100
    assert not data["recorded"].any()


@pytest.fixture
def compact(hopper) -> dict[str, np.ndarray]:
    """Successors only where the next row is not the successor, as the project's own files do."""
    ends = hopper["terminals"] | hopper["timeouts"]
    n = np.flatnonzero(ends)[-1] + 1  # whole episodes
    arrays = {key: array[:n] for key, array in hopper.items()}
    return arrays | {"final_observations": arrays["next_observations"][ends[:n]]}


def test_final_observations_are_the_successors(compact, elsewhere):
    write_hdf5(elsewhere / "whole.hdf5", without(compact, "final_observations"))
    write_hdf5(elsewhere / "compact.hdf5", without(compact, "next_observations"))
    assert_equal(bc.load_dataset("whole.hdf5"), bc.load_dataset("compact.hdf5"))
    columns = {key: compact[key][:, None] for key in ("terminals", "timeouts")}
    write_hdf5(elsewhere / "columns.hdf5", without(compact, "next_observations") | columns)
    assert_equal(bc.load_dataset("whole.hdf5"), bc.load_dataset("columns.hdf5"))


@pytest.mark.parametrize("rows", [3, -3])
def test_final_observations_must_be_one_per_episode(rows, compact, elsewhere):
    n = len(compact["final_observations"]) + rows
    final = np.resize(compact["final_observations"], (n, 11))
    arrays = without(compact, "next_observations") | {"final_observations": final}
    write_hdf5(elsewhere / "f.hdf5", arrays)
    said = refusal("f.hdf5")
    assert "f.hdf5" in said and "'final_observations'" in said


def test_an_episode_cut_by_the_files_end_gets_no_false_successor(compact, elsewhere):
    n = len(compact["rewards"])
    cut = {key: array[: n - 5] for key, array in without(compact, "next_observations").items()}
    cut["final_observations"] = compact["final_observations"][:-1]
    write_hdf5(elsewhere / "cut.hdf5", cut)
    data, _ = bc.load_dataset("cut.hdf5")
    assert len(data["rewards"]) == n - 6 and data["recorded"].all()


# --------------------------------------------------------------------------------- Bad data sets


def change(key, index, value):
    def apply(arrays):
        arrays[key] = np.array(arrays[key], np.float64)
        arrays[key][index] = value

    return apply


def cut(key):
    return lambda arrays: arrays.update({key: arrays[key][:-3]})


def drop(*keys):
    return lambda arrays: [arrays.pop(key) for key in keys]


def put(**new):
    return lambda arrays: arrays.update(new)


def empty(arrays):
    arrays.update({key: array[:0] for key, array in arrays.items()})


@pytest.mark.parametrize(
    "spoil, message",
    [
        (change("observations", (7, 1), np.nan), "'observations' is NaN or infinite.*row 7"),
        (change("next_observations", (9, 0), np.inf), "'next_observations' is NaN.*row 9"),
        (change("actions", 11, np.nan), "'actions' is NaN or infinite.*row 11"),
        (change("rewards", [12, 40], -np.inf), "'rewards' is NaN or infinite.*row 12"),
        (change("timeouts", 3, np.nan), "'timeouts' is NaN or infinite.*row 3"),
        (change("actions", [13, 50], 2.1), r"leaves its bounds, \[-2.*2.*\].*row 13"),
        (change("actions", 14, -2.1), r"leaves.*row 14"),
        (cut("rewards"), "'rewards'.*1597"),
        (cut("observations"), "'observations'.*1597|4791"),
        (cut("next_observations"), "'next_observations'.*4791"),
        (cut("terminals"), "1597"),
        (cut("timeouts"), "'timeouts'.*1597"),
        (drop("actions"), "lacks actions"),
        (drop("rewards", "terminals"), "lacks (rewards, terminals|terminals, rewards)"),
        (empty, "empty"),
        (put(actions=np.zeros(1600, np.int64)), "discrete"),
        (put(rewards=np.zeros((1600, 2))), "'rewards'.*3200"),
        (put(rewards=np.zeros((100, 16, 2))), "'rewards'.*3200"),
        (put(observations=np.zeros((1600, 4, 2))), "'observations'"),
        (put(observations=np.zeros((1600, 8, 8, 3), np.uint8)), "'observations'"),
        (put(observations=np.zeros((100, 16, 3))), "'observations'"),
        (put(**dict.fromkeys(STATES, np.zeros((1600, 5)))), r"Pendulum-v1.*--env-id.*\(5,\)"),
        (put(actions=np.zeros((1600, 2))), r"--env-id.*\(2,\)"),
        (put(next_observations=np.zeros((1600, 5))), "'next_observations'"),
    ],
)
def test_bad_arrays_are_refused(spoil, message, pendulum, elsewhere):
    arrays = dict(pendulum)
    spoil(arrays)
    write_hdf5(elsewhere / "bad.hdf5", arrays, env_id="Pendulum-v1")
    said = refusal("bad.hdf5")
    assert "bad.hdf5" in said or "Pendulum-v1" in said
    assert re.search(message, said), said


@pytest.mark.parametrize(
    "low, high, message",
    [
        ([-1.0, 0.0], [1.0, 0.0], "bounds"),  # 0 / 0 in the second
        ([-1.0, 1.0], [1.0, -1.0], "bounds"),
        ([-np.inf], [np.inf], "bounds"),
        ([-1.0] * 3, [1.0] * 3, "bounds"),
    ],
)
def test_impossible_bounds_are_refused(low, high, message, elsewhere):
    arrays = steps() | {"actions": steps()["actions"] * [1, 0]}
    write_hdf5(elsewhere / "b.hdf5", arrays, action_low=low, action_high=high)
    assert message in refusal("b.hdf5") and "b.hdf5" in refusal("b.hdf5")


def test_the_tolerance_of_the_bounds_is_relative(elsewhere):
    a = steps()["actions"].astype(float)
    wide = dict(action_low=[-1e3] * 2, action_high=[1e3] * 2)
    narrow = dict(action_low=[-1e-5] * 2, action_high=[1e-5] * 2)
    rounded = np.clip(1500 * a, -1000, 1000) * (1 + 2e-7)  # one rounding of float32
    write_hdf5(elsewhere / "large.hdf5", steps() | {"actions": rounded}, **wide)
    assert np.abs(bc.load_dataset("large.hdf5")[0]["actions"]).max() == 1
    write_hdf5(elsewhere / "small.hdf5", steps() | {"actions": a * 1e-4}, **narrow)
    assert "leaves" in refusal("small.hdf5")  # ten times too large


def test_states_that_float32_cannot_tell_apart_are_refused(elsewhere):
    arrays = {key: array for key, array in steps().items() if "next" not in key}
    clock = 1.7e9 + 60 * arrays["observations"].astype(float)
    constant = clock * [1, 0, 0] * 0 + [0.1, 1 / 3, 0]  # a column that says nothing is no fault
    write_hdf5(elsewhere / "clock.hdf5", arrays | {"observations": clock})
    assert "float32" in refusal("clock.hdf5") and "observations" in refusal("clock.hdf5")
    write_hdf5(elsewhere / "constant.hdf5", arrays | {"observations": constant})
    bc.load_dataset("constant.hdf5")


@pytest.mark.parametrize(
    "name, content",
    [
        ("text.hdf5", b"observations,actions\n"),
        ("void.hdf5", b""),
        ("text.npz", b"observations,actions\n"),
        ("void.npz", b""),
        ("cut.npz", b"PK\x03\x04 the beginning of an archive"),
    ],
)
def test_other_files_are_refused(name, content, elsewhere):
    (elsewhere / name).write_bytes(content)
    assert name in refusal(name)


def test_a_cut_file_is_refused(pendulum_file, elsewhere):
    content = pendulum_file.read_bytes()
    (elsewhere / "cut.hdf5").write_bytes(content[: len(content) // 2])
    assert "cut.hdf5" in refusal("cut.hdf5")


def test_a_group_where_an_array_is_due_is_refused(elsewhere):
    path = write_hdf5(elsewhere / "g.hdf5", without(steps(), "rewards"))
    with h5py.File(path, "a") as file:
        file.create_group("rewards")
    assert "g.hdf5" in refusal("g.hdf5")


GOALS = """
import gymnasium as gym
import numpy as np

BOX = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
SEEN = gym.spaces.Dict({"observation": BOX, "desired_goal": gym.spaces.Dict({"at": BOX})})


class Goals(gym.Env):
    observation_space, action_space = SEEN, gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, seed=None, options=None):
        self.at = np.array([1.0, 2.0])
        return self.seen(), {}

    def step(self, action):
        self.at = self.at + action
        return self.seen(), float(action[0]), False, False, {}

    def seen(self):
        return {"observation": self.at, "desired_goal": {"at": np.array([7.0, 8.0])}}


gym.register("Goals-v0", "goals_of_test:Goals", max_episode_steps=20)
"""


def minari_of(space, observations, **options) -> str:
    buffer = minari.data_collector.EpisodeBuffer(
        observations=observations,
        actions=np.zeros((20, 1), "f4"),
        rewards=np.ones(20),
        terminations=np.zeros(20, bool),
        truncations=np.arange(20) == 19,
    )
    options |= {} if "env" in options else {"action_space": gym.spaces.Box(-1, 1, (1,), "f4")}
    minari.create_dataset_from_buffers(
        dataset_id="mine/goal-v0",
        buffer=[buffer],
        observation_space=space,
        algorithm_name="test",
        author="test",
        author_email="test@example.com",
        code_permalink="https://example.com",
        **options,
    )
    return "mine/goal-v0"


def test_dictionaries_are_joined_as_the_environment_joins_them(elsewhere, monkeypatch):
    (elsewhere / "goals_of_test.py").write_text(GOALS)
    monkeypatch.syspath_prepend(str(elsewhere))
    goals = importlib.import_module("goals_of_test")
    walk, goal = np.arange(42.0).reshape(21, 2), np.tile([7.0, 8.0], (21, 1))
    observations = {"observation": walk, "desired_goal": {"at": goal}}
    name = minari_of(goals.SEEN, observations, env="Goals-v0")
    data, task = bc.load_dataset(name)
    expected = np.concatenate([goal, walk], axis=1)
    np.testing.assert_array_equal(data["observations"], expected[:-1])
    np.testing.assert_array_equal(data["next_observations"], expected[1:])
    env = bc.make_env(task)
    np.testing.assert_array_equal(env.reset(seed=0)[0], [7, 8, 1, 2])
    np.testing.assert_array_equal(env.step(np.ones(1))[0], [7, 8, 2, 3])


def test_observations_of_other_kinds_are_refused(elsewhere):
    said = refusal(minari_of(gym.spaces.Discrete(3), np.zeros(21, np.int64)))
    assert "mine/goal-v0" in said and "Discrete(3)" in said


def test_dictionaries_with_a_discrete_part_are_refused(elsewhere):
    space = gym.spaces.Dict({"where": gym.spaces.Discrete(3)})
    assert "mine/goal-v0" in refusal(minari_of(space, {"where": np.zeros(21, np.int64)}))


@pytest.mark.parametrize("name", ["no-such-data", "no-such.hdf5", "folder/none.npz", "tiny-v0"])
def test_an_unknown_name_lists_what_exists_and_asks_no_network(name, elsewhere, monkeypatch):
    monkeypatch.setattr(bc.minari, "load_dataset", None)
    said = refusal(name)
    assert f"'{name}'" in said and "datasets/make.py" in said
    assert (ROOT / "datasets" / "make.py").exists()
    if str(bc.__file__).startswith(str(ROOT)):
        assert "hopper-medium-replay" in said


def test_a_d4rl_name_says_how_to_fetch_it():
    assert "`python datasets/make.py hopper-medium-replay-v2`" in refusal("hopper-medium-replay-v2")


def test_a_minari_id_that_cannot_be_fetched_is_refused(elsewhere, monkeypatch):
    def no_network(name, download):
        raise ConnectionError("no network")

    monkeypatch.setattr(bc.minari, "load_dataset", no_network)
    said = refusal("mujoco/hopper/expert-v0")
    assert "mujoco/hopper/expert-v0" in said and "no network" in said


# --------------------------------------------------------------------------------- Environments


@pytest.mark.parametrize(
    "env_id, reason",
    [
        ("NoSuch-v0", "NoSuch"),
        ("Pendulum-v999", "Pendulum"),
        ("no_module:Toy-v0", "no_module"),
        ("not an id", "not an id"),
        ("CartPole-v1", "Discrete"),
    ],
)
def test_unusable_environments_are_refused(env_id, reason, pendulum_file):
    said = refusal(pendulum_file, env_id)
    assert env_id in said and reason in said and "--env-id" in said


FAULTY = """
import gymnasium as gym, numpy as np
class Base(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (2,), np.float32)
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=3), {}
    def step(self, a):
        return self.np_random.normal(size=3), 1.0, False, False, {}
class OldReset(Base):
    def reset(self):
        return np.zeros(3), {}
class Dead(Base):
    def step(self, a):
        raise RuntimeError("simulator lost")
class Stacked(Base):
    observation_space = gym.spaces.Box(-9, 9, (4, 2), np.float32)
class Goal(Base):
    parts = {"at": Base.observation_space, "on": gym.spaces.Discrete(4)}
    observation_space = gym.spaces.Dict(parts)
for cls in (OldReset, Dead, Stacked, Goal):
    gym.register(cls.__name__ + "-v0", entry_point="faulty:" + cls.__name__, max_episode_steps=9)
gym.register("Endless-v0", entry_point="faulty:Base")
gym.register("Good-v0", entry_point="faulty:Base", max_episode_steps=9)
"""


@pytest.fixture
def faulty(elsewhere, monkeypatch):
    import sys

    (elsewhere / "faulty.py").write_text(FAULTY)
    write_hdf5(elsewhere / "f.hdf5", steps())
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    yield
    sys.modules.pop("faulty", None)
    for name in ("OldReset", "Dead", "Stacked", "Goal", "Endless", "Good"):
        gym.registry.pop(f"{name}-v0", None)


def test_a_module_of_the_current_folder_is_found(faulty):
    assert bc.load_dataset("f.hdf5", "faulty:Good-v0")[1]["env_id"] == "Good-v0"


@pytest.mark.parametrize(
    "name, reason",
    [
        ("OldReset", "seed"),
        ("Dead", "simulator lost"),
        ("Stacked", r"\(8,\)"),
        ("Goal", r"\(7,\)"),
        ("Endless", "time limit"),
    ],
)
def test_an_environment_that_would_fail_later_is_refused_at_once(name, reason, faulty):
    said = refusal("f.hdf5", f"faulty:{name}-v0")
    assert f"{name}-v0" in said and re.search(reason, said), said


def test_an_environment_without_action_bounds_is_refused(toy_env, elsewhere):
    """Actions cannot be scaled from infinite bounds: they would all be NaN."""
    env = gym.make(toy_env)
    env.unwrapped.__class__.action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    arrays = {"observations": np.zeros((10, 2)), "actions": np.zeros(10)}
    arrays |= {key: np.zeros(10) for key in ("rewards", "terminals")}
    write_hdf5(elsewhere / "toy.hdf5", arrays | {"timeouts": np.ones(10)})
    assert "bounds" in refusal("toy.hdf5", toy_env) or "Toy" in refusal("toy.hdf5", toy_env)
