"""Mazes and arms of datasets/make.py against OGBench's simulators; the Ant's frame, its walker."""

import importlib.util
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT, load, tiny

sys.path.append(str(ROOT / "datasets"))
try:
    import environments
    import goals
    import mujoco
    import ogbench  # noqa: F401
except ImportError:
    environments = None
needs_ogbench = pytest.mark.skipif(environments is None, reason="needs requirements-goals.txt")


@pytest.fixture(scope="module")
def maker():
    path = Path(__file__).resolve().parents[1] / "datasets" / "make.py"
    spec = importlib.util.spec_from_file_location("datasets_make_goals", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def make(maker, tmp_path, monkeypatch):
    """`make("pointmaze-medium-stitch", transitions=400)` into an empty folder; returns the data."""

    def call(name, **flags):
        maker.main(maker.Args(names=[name], **flags))
        return maker.read(name)[0]

    (tmp_path / "policies").symlink_to(maker.FOLDER / "policies")
    monkeypatch.setattr(maker, "FOLDER", tmp_path)
    return call


def episodes(data):
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    return list(zip(np.append(0, ends[:-1]), ends))


def test_without_ogbench_it_says_what_to_install(make, monkeypatch):
    for name in [
        name for name in sys.modules if name.split(".")[0] in ("ogbench", "goals", "environments")
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "ogbench", None)
    with pytest.raises(SystemExit, match=r"pip install -r requirements-goals\.txt"):
        make("pointmaze-medium-stitch")
    with pytest.raises(ModuleNotFoundError, match=r"pip install -r requirements-goals\.txt"):
        gym.make("environments:AntDirections-v0")


# ------------------------------------------------------------------------------ The Ant's frame


@pytest.fixture
def ant():
    env = gym.make("AntDirections-v0").unwrapped
    env.reset(seed=0)
    yield env
    env.close()


def advance(env, qpos, qvel, action):
    mujoco.mj_resetData(env.model, env.data)
    env.set_state(qpos, qvel)
    env.do_simulation(action, env.frame_skip)
    return env.data.qpos.copy(), env.data.qvel.copy()


@needs_ogbench
@pytest.mark.parametrize("turns", range(4))
def test_the_frame_is_a_symmetry_of_the_simulator(ant, turns):
    """Step, then transform, equals transform, then step: standing, falling, on its feet."""
    rng, touched = np.random.default_rng(turns), 0
    for i in range(40):
        if i % 10 == 0:
            ant.reset(seed=i)
        for _ in range(i % 10):
            ant.do_simulation(rng.uniform(-1, 1, 8), 5)
        touched += ant.data.ncon > 0
        qpos, qvel = ant.data.qpos.copy(), ant.data.qvel.copy()
        action, angle = rng.uniform(-1, 1, 8), rng.uniform(-np.pi, np.pi)
        there = environments.canonical_state(*advance(ant, qpos, qvel, action), angle, turns)
        state = environments.canonical_state(qpos, qvel, angle, turns)
        found = advance(ant, *state, environments.canonical_action(action, turns))
        found = environments.canonical_state(*found, 0.0, 0)  # the sign of the quaternion
        np.testing.assert_allclose(found[0], there[0], rtol=0, atol=1e-9)
        np.testing.assert_allclose(found[1], there[1], rtol=0, atol=1e-9)
        back = environments.canonical_action(environments.canonical_action(action, turns), -turns)
        np.testing.assert_array_equal(back, action)
        advance(ant, qpos, qvel, action)
    assert touched > 20


@needs_ogbench
def test_the_body_faces_the_direction():
    for degrees in range(-180, 180, 7):
        for angle in (-3.0, -1.0, 0.0, 2.0):
            half = math.radians(degrees) / 2
            qpos = np.zeros(15)
            qpos[3:7] = math.cos(half), 0, 0, math.sin(half)
            turns = environments.quarter_turns(qpos, angle)
            heading = math.radians(degrees) - angle
            assert math.cos(heading + turns * math.pi / 2) > math.cos(math.radians(45.01))
            for before in range(4):  # the last numbering stays to 60 degrees
                off = math.cos(heading + before * math.pi / 2)
                kept = environments.quarter_turns(qpos, angle, before)
                assert kept == (before if off > 0.5 else turns)
            state, _ = environments.canonical_state(qpos, np.zeros(14), angle, turns)
            assert abs(state[3]) > math.cos(math.radians(22.6))


@needs_ogbench
def test_walking_is_paid_along_the_direction(ant):
    rng, angles = np.random.default_rng(0), []
    for i in range(205):
        if i == 50:  # a push, so that there is something to pay
            ant.data.qvel[:2] = 3.0, -2.0
        before, angle = ant.data.qpos[:2].copy(), ant.angle
        ob, reward, *_ = ant.step(rng.uniform(-1, 1, 8))
        way = ant.data.qpos[:2] - before
        due = 10 * way @ (np.cos(angle), np.sin(angle))
        assert reward == pytest.approx(due, abs=1e-12)
        angles.append(angle)
        assert ob.shape == (27,)
    assert [i for i in range(1, 205) if angles[i] != angles[i - 1]] == [100, 200]


# ---------------------------------------------------------------------------------------- Mazes


@needs_ogbench
@pytest.mark.parametrize("name, length", [("navigate", 1000), ("stitch", 200)])
def test_pointmaze(make, name, length):
    data = make(f"pointmaze-medium-{name}", transitions=3 * length + 50)
    assert [b - a for a, b in episodes(data)] == [length] * 3 + [50]
    assert not data["rewards"].any() and not data["terminals"].any()
    env = gym.make("pointmaze-medium-v0").unwrapped
    env.reset()
    cells = []
    for s, a, s_next in zip(data["observations"], data["actions"], data["next_observations"]):
        env.set_xy(s)
        truth, *_ = env.step(a)
        np.testing.assert_allclose(s_next, truth, atol=1e-4)
        cells.append(env.xy_to_ij(s))
    assert all(env.maze_map[cell] == 0 for cell in cells)
    noise = np.abs(data["actions"]).max(1) < 1  # unit vectors with N(0, 0.5)
    assert noise.mean() > 0.3 and np.abs(data["actions"]).max() == 1
    reached = [goals.distances(env.maze_map, cells[a])[cells[b - 1]] for a, b in episodes(data)]
    farthest = [
        max(goals.distances(env.maze_map, cells[a])[cell] for cell in cells[a:b])
        for a, b in episodes(data)
    ]
    if name == "stitch":
        assert reached[:3] == [4, 4, 4] and max(farthest) <= 5
    else:
        assert min(farthest[:3]) >= 6


@needs_ogbench
def test_junctions_and_corners():
    free, corners = goals.cells_of(np.array([[1] * 5, [1, 0, 0, 0, 1], [1, 1, 0, 1, 1], [1] * 5]))
    assert free == [(1, 1), (1, 2), (1, 3), (2, 2)]
    assert corners == [(1, 1), (1, 2), (1, 3), (2, 2)]  # ends of passages count
    rows = ("11111", "10001", "11101", "10001", "11111")
    _, corners = goals.cells_of(np.array([[int(x) for x in row] for row in rows]))
    assert corners == [(1, 1), (1, 3), (3, 1), (3, 3)]


@needs_ogbench
def test_seeds(make):
    np.random.seed(1)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    flags = dict(transitions=250, overwrite=True)
    first, same, other = (make("pointmaze-umaze-stitch", seed=i, **flags) for i in (3, 3, 4))
    assert all((first[key] == same[key]).all() for key in first)
    assert (first["observations"] != other["observations"]).any()
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002


@needs_ogbench
def test_the_walker_that_ships_crosses_the_maze(make):
    data = make("antmaze-umaze-navigate", transitions=1000)
    env = gym.make("antmaze-umaze-v0").unwrapped
    env.reset()
    assert len({env.xy_to_ij(s) for s in data["observations"]}) >= 5  # of 7
    assert (np.square(data["observations"][:, 4:6]).sum(1) < 0.5).all()  # never on its back
    worst = 0
    for s, a, s_next in [
        [data[key][i] for key in ("observations", "actions", "next_observations")]
        for i in range(0, 1000, 50)
    ]:
        worst = max(worst, np.abs(advance(env, s[:15], s[15:], a)[0] - s_next[:15]).max())
    assert worst < 1e-3  # rows are float32


# ---------------------------------------------------------------------------------------- Rewards


@needs_ogbench
def test_rewards_of_a_maze_are_its_environments(make, maker):
    base = make("pointmaze-umaze-navigate", transitions=3000)
    data = make("pointmaze-umaze-navigate-singletask-task2")
    env = gym.make("pointmaze-umaze-singletask-task2-v0").unwrapped
    env.reset()
    assert env.cur_task_id == 2
    for s, a, r, d in zip(*(data[k] for k in ("observations", "actions", "rewards", "terminals"))):
        env.set_xy(s)
        _, reward, terminated, *_ = env.step(a)
        assert (reward, terminated) == (r, d)
    assert 0.01 < data["terminals"].mean() < 0.5
    for key in ("observations", "actions", "next_observations"):
        np.testing.assert_array_equal(data[key], base[key])
    assert not (data["terminals"] & data["timeouts"]).any() and data["timeouts"].sum() <= 3
    with pytest.raises(SystemExit, match="has 3,000, delete it"):
        make("pointmaze-umaze-navigate-singletask", transitions=5000)
    _, attributes = maker.read("pointmaze-umaze-navigate-singletask-task2")
    assert (attributes["ref_min_score"], attributes["ref_max_score"]) == (0, 1)


@needs_ogbench
@pytest.mark.parametrize("name", ["cube-single", "scene"])
def test_rewards_of_an_arm_are_its_environments(make, name):
    data = make(f"{name}-play", transitions=400)
    assert data["qpos"][:, 16].max() > 0.06 or name == "scene"  # the cube was lifted
    assert [b - a for a, b in episodes(data)] == [400] and not data["rewards"].any()
    env = gym.make(f"{name}-singletask-v0").unwrapped
    env.reset(seed=0)
    assert env.cur_task_id == 2  # OGBench's default
    data["qpos"][7, 14:17] = env._data.mocap_pos[0]  # one row in which the task is solved
    if name == "scene":
        data["qpos"][7, -2:] = env._target_drawer_pos, env._target_window_pos
        data["button_states"][7] = env._target_button_states
    data, env_id, _ = goals.singletask(f"{name}-play-singletask", data)
    assert env_id == f"environments:success/{name}-singletask-v0"
    for i in [7, *range(0, 400, 20)]:
        env._data.qpos[:] = data["qpos"][i]
        if name == "scene":
            env._cur_button_states[:] = data["button_states"][i]
        assert env.compute_reward() == data["rewards"][i]
    assert data["rewards"][7] == 0 and data["rewards"].min() == (-1 if "cube" in name else -4)
    assert np.flatnonzero(data["terminals"]).tolist() == [7] and data["timeouts"][-1]


@needs_ogbench
def test_an_episode_that_loses_the_cube_is_thrown_away():
    qpos = np.tile([0.0] * 14 + [0.4, 0.0, 0.02], (3, 1))
    for y, z, lost in [(0, 0.02, 0), (0.3, 0.02, 1), (-0.31, 0.02, 1), (-0.31, 0.07, 0)]:
        qpos[1, 15:17] = y, z
        assert goals.lost_cube(qpos) == lost


@needs_ogbench
def test_the_return_is_the_success():
    env = gym.make("success/pointmaze-medium-singletask-task1-v0")
    world, returns = env.unwrapped, []
    for drives in (True, False):
        s, _ = env.reset(seed=5)
        total, done = 0.0, False
        while not done:
            way = world.get_oracle_subgoal(s, world.cur_goal_xy)[0] - s
            action = way / (np.linalg.norm(way) + 1e-6) if drives else np.zeros(2)
            s, reward, terminated, truncated, _ = env.step(np.float32(action))
            total, done = total + reward, terminated or truncated
        returns.append((total, terminated))
    assert returns == [(1.0, True), (0.0, False)]
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    starts = [env.reset(seed=seed)[0].tolist() for seed in (5, 5, 6)]
    assert starts[0] == starts[1] != starts[2]
    assert (np.random.get_state()[1] == state).all()  # noqa: NPY002


@needs_ogbench
@pytest.mark.parametrize("suffix", ["", "-singletask"])
def test_algorithms_read_it(make, maker, suffix, elsewhere):
    name = f"pointmaze-umaze-stitch{suffix}"
    make(name, transitions=2000)
    bc = load("bc")
    history = bc.train(bc.Args(**tiny("bc", dataset=str(maker.path_of(name)))))
    assert all(0 <= row["score"] <= 100 for row in history)
