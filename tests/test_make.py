"""datasets/make.py on tiny sizes, in a folder of its own, with policies of random weights; D4RL's
files come from a server in this process."""

import http.server
import importlib.util
import re
import shutil
import threading
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from conftest import load, write_hdf5

STEPS = (100, 200, 300, 400, 500)  # of the snapshots of the SAC run below
RETURNS = (-1400, 100, 5000, 4000, 10000)  # a third of the expert's is passed at step 300
SIZE = 1000


@pytest.fixture(scope="module")
def maker():
    path = Path(__file__).resolve().parents[1] / "datasets" / "make.py"
    spec = importlib.util.spec_from_file_location("datasets_make", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sac_run(maker, folder, env_id):
    """What algorithms/sac.py leaves behind: snapshots, evaluations, its replay buffer."""
    env = gym.make(env_id)
    low, high = env.action_space.low.tolist(), env.action_space.high.tolist()
    task = {"sizes": [env.observation_space.shape[0], len(low)], "bounds": [low, high]}
    (folder / "policies").mkdir(parents=True)
    for step in STEPS:
        torch.manual_seed(step)
        policy = maker.sac.Policy(task, maker.sac.Args(hidden_dim=8))
        policy.scaling.mean.fill_(0.3)  # SAC has no scaling online, but may
        policy.scaling.std.fill_(1.2)
        torch.save(policy.state_dict(), folder / "policies" / f"{step:08d}.pt")
    rows = [f"{s},{s / 10},{r},1.0,200.0,nan" for s, r in zip(STEPS, RETURNS)]
    head = "step,seconds,return_mean,return_std,length_mean,score"
    (folder / "eval.csv").write_text("\n".join([head, *rows]) + "\n")
    with h5py.File(folder / "replay.hdf5", "w") as file:
        for key, rows in maker.roll_out(env_id, None, 500, seed=9).items():
            file[key] = rows[:, 0] if key == "actions" and rows.shape[1] == 1 else rows
    return folder


@pytest.fixture(scope="module")
def prepared(maker, tmp_path_factory):
    """SAC runs of two tasks, and datasets/ with what --from-sac makes of them."""
    root = tmp_path_factory.mktemp("prepared")
    (root / "datasets").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(maker, "FOLDER", root / "datasets")
        for task in ("pendulum", "walker2d"):
            patch.setitem(maker.TASKS, task, (maker.TASKS[task][0], SIZE))
            run = sac_run(maker, root / task, maker.TASKS[task][0])
            maker.main(maker.Args(from_sac=str(run), task=task))
    return root


@pytest.fixture
def make(maker, prepared, tmp_path, monkeypatch):
    """`make("pendulum-medium", seed=1)` as the command line does it, on a copy of `prepared`."""
    shutil.copytree(prepared, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(maker, "FOLDER", tmp_path / "datasets")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    for task, (env_id, _) in maker.TASKS.items():
        monkeypatch.setitem(maker.TASKS, task, (env_id, SIZE))
    return lambda *names, **flags: maker.main(maker.Args(names=[*names], **flags))


def spans(data):
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    assert ends[-1] == len(data["rewards"])
    return list(zip(np.append(0, ends[:-1]), ends))


def test_layout_and_attributes(make, maker):
    make("pendulum-medium")
    with h5py.File(maker.FOLDER / "pendulum-medium.hdf5") as file:
        shapes = {key: (item.shape, item.dtype.str) for key, item in file.items()}
        attributes = dict(file.attrs)
    assert shapes == {
        "observations": ((SIZE, 3), "<f4"),
        "actions": ((SIZE, 1), "<f4"),
        "rewards": ((SIZE,), "<f4"),
        "terminals": ((SIZE,), "|b1"),
        "timeouts": ((SIZE,), "|b1"),
        "final_observations": ((5, 3), "<f4"),
    }
    assert attributes["env_id"] == "Pendulum-v1"
    assert (attributes["action_low"], attributes["action_high"]) == (-2, 2)
    policies = maker.load_policies("pendulum")
    assert attributes["ref_min_score"] == policies["random_return"] < -900
    assert attributes["ref_max_score"] == RETURNS[-1]
    assert "step 300" in attributes["description"] and attributes["seconds"] >= 0


def test_actions_are_drawn_from_the_policy(make, maker):
    make("pendulum-medium")
    data, _ = maker.read("pendulum-medium")
    policy = maker.policy_at(maker.load_policies("pendulum"), 300)
    with torch.no_grad():
        mu, log_sigma = policy.net(policy.scaling.state(data["observations"])).chunk(2, dim=1)
    sigma = np.exp(-5 + 3.5 * (np.tanh(log_sigma.numpy()) + 1))
    noise = (np.arctanh(data["actions"] / 2) - mu.numpy()) / sigma
    assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1  # standard normal


@pytest.mark.parametrize("task", ["hopper", "halfcheetah", "walker2d", "pendulum"])
def test_the_policies_that_ship_act(maker, task):
    """Their files are older than the networks' scaling; the actions are the same."""
    policies = maker.load_policies(task)
    space = gym.make(maker.TASKS[task][0]).action_space
    for step in policies["steps"]["medium"], policies["steps"]["expert"]:
        policy = maker.policy_at(policies, step)
        s = torch.randn(100, policy.net[0].in_features)
        u = policy.net(s)[:, : space.shape[0]].tanh().detach()
        torch.testing.assert_close(policy.act(s), u * torch.as_tensor(space.high))
        stored = policies["policies"][str(step)]["net.0.weight"].float()
        torch.testing.assert_close(policy.net[0].weight.data, stored, rtol=0, atol=0)


def test_successors_are_the_simulators(make, maker):
    """Every transition again in the simulator; also the last of an episode, where a vector
    environment hands out the first state of the next."""
    make("pendulum-random")
    data, _ = maker.read("pendulum-random")
    env = gym.make("Pendulum-v1")
    env.reset()
    for s, a, r, s_next in zip(*(data[key] for key in maker.COLUMNS[:4])):
        env.unwrapped.state = np.array([np.arctan2(s[1], s[0]), s[2]])
        truth, reward, *_ = env.unwrapped.step(a)
        np.testing.assert_allclose(s_next, truth, atol=1e-4)
        assert abs(r - reward) < 1e-3
    assert [b - a for a, b in spans(data)] == [200] * 5


def test_terminals_are_falls(make, maker):
    """A rollout with terminals: after them the walker has fallen, before them and after a cut not;
    an episode begins where the simulator begins one."""
    make("walker2d-random")
    data, attributes = maker.read("walker2d-random")
    assert attributes["ref_max_score"] == maker.sac.SCORES["Walker2d"][1]  # D4RL's
    s, s_next, terminals = data["observations"], data["next_observations"], data["terminals"]
    fallen = (s_next[:, 0] < 0.8) | (s_next[:, 0] > 2) | (np.abs(s_next[:, 1]) > 1)
    np.testing.assert_array_equal(fallen, terminals)
    assert terminals.sum() > 10 and len(s) == SIZE
    begin = np.array([1.25, *[0] * 16])
    for a, b in spans(data):
        np.testing.assert_allclose(s[a], begin, atol=5.1e-3)
        np.testing.assert_array_equal(s_next[a : b - 1], s[a + 1 : b])
    cut = np.flatnonzero(data["timeouts"])
    assert list(cut) == ([] if terminals[-1] else [SIZE - 1])  # only the last, where the data ends


@pytest.fixture
def walker(maker):
    """The Ant's driver, with the policy that ships."""
    folder = Path(__file__).resolve().parents[1] / "datasets" / "policies"
    policies = torch.load(folder / f"{maker.WALKER}.pt", weights_only=True)
    return maker.ant.Walker(maker.policy_at(policies, policies["steps"]["walk"]))


def test_the_walker_holds_a_small_action_for_two_steps(walker):
    """Of each of its Ants, from the first step of its episode on; every step has its own noise."""
    for i in range(2):
        walker.begin(i)
    torch.manual_seed(0)
    states = torch.randn(7, 2, 27)
    states[..., :5] = torch.tensor([0.6, 1, 0, 0, 0])
    acts = [walker.act(s, deterministic=True) for s in states[:3]]
    walker.begin(1)
    acts += [walker.act(s, deterministic=True) for s in states[3:]]
    acts = torch.stack(acts)  # (7, 2, 8)
    assert acts.abs().max() <= 0.2 and acts.abs().max() > 0.1
    held = [[torch.equal(acts[t + 1, i], acts[t, i]) for t in range(6)] for i in range(2)]
    assert held[0] == [True, False, True, False, True, False]
    assert held[1] == [True, False, False, True, False, True]  # a new episode after three steps
    walker.policy.act = lambda seen, deterministic: np.zeros((len(seen), 8), np.float32)
    noise = torch.stack([walker.act(states[0]) for _ in range(500)])[2:]
    assert abs(noise.std() - walker.NOISE) < 0.01


def test_the_walker_walks(maker, walker):
    """Whichever side it faces: five seconds of Gymnasium's Ant, from all four."""
    env = maker.make_env(maker.ant.specification())
    way = []
    for angle in (0.0, np.pi / 2, np.pi, -np.pi / 2):
        env.reset(seed=0)
        base = env.unwrapped
        qpos, qvel = base.init_qpos.copy(), np.zeros(14)
        qpos[3:7] = np.cos(angle / 2), 0, 0, np.sin(angle / 2)
        base.set_state(qpos, qvel)
        s = base._get_obs()
        walker.begin(0)
        for _ in range(100):
            a = walker.act(torch.as_tensor(s[None]).float(), deterministic=True)[0].numpy()
            s, *_ = env.step(a)
        way.append(base.data.qpos[0])
    assert min(way) > 1.5, way


def test_ant_data(make, maker, walker):
    """27 numbers to see, Gymnasium's ends, D4RL's references; the algorithms make its environment
    from what the file says."""
    torch.save(
        {"steps": {"walk": 7}, "policies": {"7": walker.policy.state_dict()}},
        maker.FOLDER / "policies" / f"{maker.WALKER}.pt",
    )
    make("ant-random", "ant-random-medium")
    for name, low in (("ant-random", 0.9), ("ant-medium", 0.4)):
        data, attributes = maker.read(name)
        s_next, a = data["next_observations"], data["actions"]
        assert s_next.shape == (SIZE, 27) and a.shape == (SIZE, 8)
        healthy = (s_next[:, 0] >= 0.2) & (s_next[:, 0] <= 1)
        np.testing.assert_array_equal(healthy, ~data["terminals"])
        assert np.abs(a).max() > low and attributes["ref_max_score"] == 3879.7
    assert 0.1 < np.diff(a, axis=0).std() < 0.35 and np.abs(a).mean() < 0.25
    assert "noise 0.1" in attributes["description"]
    mixture, attributes = maker.read("ant-random-medium")
    assert attributes["source_names"] == "ant-random,ant-medium" and len(mixture["rewards"]) > SIZE
    task = assert_loads(maker.FOLDER / "ant-medium.hdf5", data)
    assert task["env_id"] == "Ant-v5" and task["sizes"] == [27, 8]
    env = load("bc").make_env(task)
    assert env.spec.name == "Ant" and env.observation_space.shape == (27,)


class Uneven(gym.Env):
    """Half of the episodes take one step, half take 40."""

    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 1 if self.np_random.random() < 0.5 else 40
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        return np.zeros(1, np.float32), 0.0, self.left == 0, False, {}


def test_parallel_environments_do_not_favour_short_episodes(maker):
    gym.register("Uneven-v0", Uneven)
    try:
        mean = {}
        for envs in (1, 10):
            data = [maker.roll_out("Uneven-v0", None, 100, 1000 * i, envs) for i in range(100)]
            mean[envs] = np.mean([len(spans(x)) for x in data])
    finally:
        gym.registry.pop("Uneven-v0")
    assert abs(mean[1] - mean[10]) < 1.5  # about 6 episodes; in the order of their ends, 12


def test_seeds(make, maker):
    make("walker2d-medium-replay")
    first, _ = maker.read("walker2d-medium-replay")
    make("walker2d-medium-replay", overwrite=True)
    again, _ = maker.read("walker2d-medium-replay")
    make("walker2d-medium-replay", overwrite=True, seed=1)
    other, _ = maker.read("walker2d-medium-replay")
    for key in maker.COLUMNS:
        np.testing.assert_array_equal(first[key], again[key])
    assert not np.array_equal(first["observations"], other["observations"])
    begin = np.array([first["observations"][a] for a, _ in spans(first)])
    assert len(np.unique(begin, axis=0)) == len(begin)  # no two snapshots share a reset


def test_from_sac(make, maker, tmp_path):
    pendulum, walker = maker.load_policies("pendulum"), maker.load_policies("walker2d")
    assert pendulum["steps"] == {"medium": 300, "expert": 500, "replay": []}
    assert walker["steps"] == {"medium": 300, "expert": 500, "replay": [100, 200, 300]}
    kinds = {key: value.dtype for key, value in walker["policies"]["300"].items()}
    assert kinds["net.0.weight"] == torch.float16 and kinds["scaling.bounds"] == torch.float32
    assert walker["returns"] == {str(s): r for s, r in zip(STEPS, RETURNS) if s != 400}

    run = dict(from_sac=str(tmp_path / "walker2d"), task="walker2d", overwrite=True)
    make(expert_step=400, replay_steps=200, **run)  # D4RL's expert decides what medium is
    steps = maker.load_policies("walker2d")["steps"]
    assert steps == {"medium": 300, "expert": 400, "replay": [100, 200]}
    make(medium_step=200, replay_steps=500, **run)
    assert maker.load_policies("walker2d")["steps"]["medium"] == 200
    make("walker2d-medium-replay", overwrite=True)  # what came after medium is no part of it
    assert maker.read("walker2d-medium-replay")[1]["description"].endswith("steps 100 to 200")
    with pytest.raises(SystemExit, match="no evaluated snapshot is expert, step 450"):
        make(expert_step=450, **run)


def test_replay_buffer_is_shipped_as_recorded(make, maker, tmp_path):
    data, _ = maker.read("pendulum-medium-replay")
    n = maker.load_policies("pendulum")["steps"]["medium"]
    with h5py.File(tmp_path / "pendulum" / "replay.hdf5") as file:
        for key in ("observations", "rewards", "next_observations", "terminals"):
            np.testing.assert_array_equal(data[key], np.float32(file[key][:n]))
        np.testing.assert_array_equal(data["actions"][:, 0], file["actions"][:n])
    assert data["timeouts"][-1]


# ------------------------------------------------------------------------------ Demonstrations


@pytest.fixture(scope="module")
def coin(maker):
    """Demonstrations with the coin, 400 episodes."""
    return maker.roll_out("Pendulum-v1", maker.SwingUp(coin=True), 80_000, seed=0, envs=100)


def test_the_coin_decides_in_the_band_alone(maker, coin):
    """There both pushes, elsewhere one torque; without the coin one torque everywhere."""
    s, a = torch.as_tensor(np.float32(coin["observations"])), coin["actions"][:, 0]
    band = maker.SwingUp(True).in_band(s).numpy()
    energy = coin["observations"] @ [15, 0, 0] + 15 + coin["observations"][:, 2] ** 2 / 2
    assert 0.05 < band.mean() < 0.15 and (np.abs(energy - 24.5) < 2.51)[band].all()
    np.testing.assert_allclose(np.abs(a[band]).mean(), 1.7, atol=0.01)
    np.testing.assert_allclose(np.abs(a[band]).std(), 0.1, atol=0.01)  # nothing in between
    elsewhere = maker.SwingUp(True).act(s, deterministic=True)[:, 0].numpy()
    noise = (a - elsewhere)[~band]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 0.1) < 0.01
    right = maker.SwingUp(False).act(s, deterministic=True)[:, 0].numpy()
    np.testing.assert_array_equal(right[~band], elsewhere[~band])
    assert (right[band] == np.float32(1.7)).all()


def test_no_state_tells_the_coin(maker, coin):
    """Neither the state nor the previous push predicts whether the coin says to go on: the nearest
    state in the data knows it as well as chance does."""
    s, a = coin["observations"], coin["actions"][:, 0]
    band = maker.SwingUp(True).in_band(torch.as_tensor(np.float32(s))).numpy()
    on = a * s[:, 2] > 0
    assert on[band].mean() == pytest.approx(0.4, abs=0.02)
    both = band[1:] & band[:-1] & ~coin["timeouts"][:-1]
    again = np.corrcoef(on[1:][both], on[:-1][both])[0, 1]
    assert abs(again) < 0.1
    s, on = torch.as_tensor(s[band] / s.std(0)), torch.as_tensor(on[band])
    nearest = torch.cdist(s[:1000], s[1000:]).argmin(1)
    agree = (on[:1000] == on[1000:][nearest]).float().mean().item()
    assert agree == pytest.approx(0.4**2 + 0.6**2, abs=0.05)


def test_both_pushes_succeed_and_their_mean_fails(maker, coin):
    class Mean(maker.SwingUp):
        def act(self, s, deterministic=False):
            many = super().act(s.repeat_interleave(100, 0), deterministic=True)
            return many.unflatten(0, (len(s), 100)).mean(1)

    class Left(maker.SwingUp):  # the mirror image of the one that pushes right
        def act(self, s, deterministic=False):
            return -super().act(s * torch.tensor([1.0, -1, -1]), deterministic)

    returns, upright = {}, {}
    policies = {"right": maker.SwingUp(False), "left": Left(False), "mean": Mean(True)}
    rolled = {
        key: maker.roll_out("Pendulum-v1", policy, 20_000, seed=1, envs=100)
        for key, policy in policies.items()
    }
    for key, data in (rolled | {"coin": coin}).items():
        returns[key] = maker.episodes_of(data)[1].mean()
        upright[key] = (data["next_observations"][data["timeouts"], 0] > 0.9).mean()
    assert min(returns["right"], returns["left"]) > -280 and returns["coin"] > -340, returns
    assert min(upright["right"], upright["left"], upright["coin"]) > 0.97, upright
    assert returns["mean"] < -800 and upright["mean"] < 0.3, (returns, upright)


@pytest.mark.parametrize("name, pushes", [("pendulum-bimodal", 2), ("pendulum-unimodal", 1)])
def test_shipped_demonstrations(make, maker, name, pushes, tmp_path):
    """Whole episodes in the usual layout; the file that ships is what the command makes."""
    shipped = Path(maker.__file__).parent / f"{name}.hdf5"
    assert shipped.stat().st_size < 500_000
    make(name)
    made, attributes = maker.read(name)
    assert [b - a for a, b in spans(made)] == [200] * 5
    shutil.copy(shipped, maker.FOLDER / f"{name}.hdf5")
    data, there = maker.read(name)
    assert [b - a for a, b in spans(data)] == [200] * 100 and not data["terminals"].any()
    for key in ("env_id", "description", "action_low", "action_high"):
        assert there[key] == attributes[key]
    low, high = there["ref_min_score"], there["ref_max_score"]
    score = 100 * (maker.episodes_of(data)[1].mean() - low) / (high - low)
    assert 80 < score < 105 and there["env_id"] == "Pendulum-v1"
    for columns in (made, data):
        s = torch.as_tensor(columns["observations"])
        band = maker.SwingUp(True).in_band(s).numpy()
        assert len(np.unique(np.sign(columns["actions"][band]))) == pushes
    np.testing.assert_allclose(data["observations"][:1], made["observations"][:1], atol=1e-6)


def test_mixture(make, maker):
    make(
        mix="pendulum-random:0.7,pendulum-medium-replay:0.1,pendulum-expert:0.2",
        name="pendulum-odd",
        transitions=1400,
    )
    mixed, _ = maker.read("pendulum-odd")
    with h5py.File(maker.FOLDER / "pendulum-odd.hdf5") as file:
        sources, names = file["sources"][()], file.attrs["source_names"].split(",")
    counts = {}
    assert sources.dtype == np.uint8 and len(sources) == len(mixed["rewards"])
    for name, share in zip(("random", "medium-replay", "expert"), (0.7, 0.1, 0.2)):
        part, _ = maker.read(f"pendulum-{name}")
        known = {part["observations"][a:b].tobytes() for a, b in spans(part)}
        found = [mixed["observations"][a:b].tobytes() in known for a, b in spans(mixed)]
        rows = sum(b - a for hit, (a, b) in zip(found, spans(mixed)) if hit)
        assert abs(rows - share * 1400) <= 200  # one episode
        counts[name] = found
        whose = np.repeat(found, np.diff([a for a, _ in spans(mixed)] + [len(sources)]))
        np.testing.assert_array_equal(sources == names.index(f"pendulum-{name}"), whose)
    hits = np.array(list(counts.values()))  # (parts, episodes)
    assert (hits.sum(0) == 1).all()  # whole episodes, each of one part
    whole = [mixed["observations"][a:b].tobytes() for a, b in spans(mixed)]
    assert len(set(whole)) == len(whole)  # none twice


def test_levels_of_equal_size(make, maker):
    make("pendulum-random-medium-expert")  # makes its parts first
    mixed, _ = maker.read("pendulum-random-medium-expert")
    assert len(mixed["rewards"]) == 3 * SIZE
    parts = [maker.read(f"pendulum-{level}")[0] for level in ("random", "medium", "expert")]
    owner = [
        next(i for i, part in enumerate(parts) if (part["observations"] == s).all(1).any())
        for s in (mixed["observations"][a] for a, _ in spans(mixed))
    ]
    assert sorted(owner) == [0] * 5 + [1] * 5 + [2] * 5
    assert owner != sorted(owner)  # shuffled


@pytest.mark.parametrize("name", ["pendulum-random", "walker2d-medium"])
def test_minari(make, maker, name):
    make(name, format="minari")
    flat, attributes = maker.read(name)
    data = minari.load_dataset(f"cleandgm/{name}-v0")
    assert data.total_steps == SIZE and data.spec.env_spec.id == attributes["env_id"]
    assert data.observation_space.dtype == np.float32
    low, high = attributes["ref_min_score"], attributes["ref_max_score"]
    np.testing.assert_allclose(minari.get_normalized_score(data, np.array([low, high])), [0, 1])
    for episode, (a, b) in zip(data.iterate_episodes(), spans(flat), strict=True):
        np.testing.assert_array_equal(episode.observations[:-1], flat["observations"][a:b])
        np.testing.assert_array_equal(episode.observations[-1], flat["next_observations"][b - 1])
        np.testing.assert_array_equal(episode.actions, flat["actions"][a:b])
        np.testing.assert_array_equal(episode.rewards, flat["rewards"][a:b])
        np.testing.assert_array_equal(episode.terminations, flat["terminals"][a:b])
    assert episode.truncations[-1] != episode.terminations[-1]  # the cut one is truncated
    with pytest.raises(SystemExit, match="already"):
        make(name, format="minari")
    make(name, format="minari", overwrite=True)


def test_algorithms_read_it(make, maker):
    """load_dataset of the algorithms sees the same transitions in the file and in Minari."""
    make("walker2d-expert", format="minari")
    data, _ = maker.read("walker2d-expert")
    for source in (str(maker.FOLDER / "walker2d-expert.hdf5"), "cleandgm/walker2d-expert-v0"):
        assert_loads(source, data)


def assert_loads(source, data, rows=slice(None)) -> dict:
    """The algorithms' loader accepts it and has these rows, in these episodes; returns the task.
    Where some have no successor, a terminal's is not compared."""
    loaded, task = load("bc").load_dataset(str(source))
    np.testing.assert_allclose(loaded["actions"], data["actions"][rows], atol=1e-6)
    np.testing.assert_array_equal(loaded["observations"], data["observations"][rows])
    known, successors = loaded["recorded"], data["next_observations"][rows]
    np.testing.assert_array_equal(loaded["next_observations"][known], successors[known])
    assert (known | (isinstance(rows, np.ndarray) & (loaded["terminals"][:, 0] > 0))).all()
    for key in ("rewards", "terminals"):
        np.testing.assert_array_equal(loaded[key][:, 0], np.float32(data[key])[rows])
    ends = (data["terminals"] > 0) | (data["timeouts"] > 0)
    episodes = (np.cumsum(ends) - ends)[rows]
    _, episodes = np.unique(episodes, return_inverse=True)  # some have no row left
    np.testing.assert_array_equal(loaded["episodes"], episodes)
    return task


HALVES = "pendulum-random:0.5,pendulum-medium:0.5"


@pytest.mark.parametrize(
    ("names", "flags", "message"),
    [
        ([], {}, "Name a data set"),
        (["pendulum-perfect"], {}, "No data set 'pendulum-perfect'.*-medium-expert"),
        (["hopper-bimodal"], {}, "No data set 'hopper-bimodal'.*pendulum-bimodal"),
        (["hopper-medium-v0"], {}, "No data set 'hopper-medium-v0'.*-medium-v2"),
        (["ant-expert"], {}, "No data set 'ant-expert'.*ant-random-medium.*D4RL's.*ant"),
        (["ant-medium"], {}, "No policies of ant-directions"),
        ([], {"from_sac": "nowhere", "task": "ant"}, "'ant': one of hopper"),
        (["pendulum-medium-replay"], {}, "exists"),
        (["pendulum-medium-replay"], {"overwrite": True}, "ships with the project"),
        (["hopper-medium"], {}, "No policies of hopper"),
        ([], {"mix": "pendulum-random:0.5,pendulum-medium:0.4", "name": "x"}, "sum to 1"),
        ([], {"mix": "pendulum-random:1.5,pendulum-medium:-0.5", "name": "x"}, "above 0"),
        ([], {"mix": "pendulum-random:nan,pendulum-medium:0.5", "name": "x"}, "sum to 1"),
        ([], {"mix": "pendulum-random,pendulum-medium", "name": "x"}, "name:share"),
        ([], {"mix": "pendulum-random:0.5,pendulum-random:0.5", "name": "x"}, "twice"),
        ([], {"mix": "pendulum-random:0.5,walker2d-random:0.5", "name": "x"}, "environments"),
        ([], {"mix": "pendulum-random:0.5,pendulum-bad:0.5", "name": "x"}, "'pendulum-bad'"),
        (
            [],
            {"mix": "hopper-random:0.5,hopper-random-v2:0.5", "name": "x"},
            "Hopper-v4, Hopper-v5",
        ),
        ([], {"mix": "taken:0.5,hopper-random:0.5", "name": "x"}, "taken.hdf5 names no env"),
        ([], {"mix": HALVES}, "name of its own"),
        ([], {"mix": HALVES, "name": "hopper-medium-v2"}, "name of its own"),
        ([], {"mix": HALVES, "name": "pendulum-expert"}, "name of its own"),
        ([], {"mix": HALVES, "name": "taken"}, "exists"),
        ([], {"from_sac": "nowhere", "task": "cartpole"}, "one of hopper"),
        ([], {"from_sac": "nowhere", "task": "walker2d"}, "exists"),
    ],
)
def test_refusals(make, maker, names, flags, message):
    (maker.FOLDER / "taken.hdf5").touch()
    files = {path: path.stat().st_mtime_ns for path in maker.FOLDER.rglob("*")}
    with pytest.raises(SystemExit, match=message):
        make(*names, **flags)
    assert files == {path: path.stat().st_mtime_ns for path in maker.FOLDER.rglob("*")}


def test_refuses_more_than_the_parts_allow(make):
    make("pendulum-random", "pendulum-medium")
    with pytest.raises(SystemExit, match="allow 2,000"):
        make(mix=HALVES, name="big", transitions=3000)


def test_a_failed_write_leaves_the_old_file(make, maker):
    make("pendulum-random")
    before = (maker.FOLDER / "pendulum-random.hdf5").read_bytes()
    data, _ = maker.read("pendulum-random")
    data["rewards"] = np.array(["broken"] * SIZE)
    with pytest.raises(ValueError):
        maker.write("pendulum-random", data, "Pendulum-v1", "", 0)
    assert not [*maker.FOLDER.glob("*.tmp")]
    assert (maker.FOLDER / "pendulum-random.hdf5").read_bytes() == before


def test_card_and_list(make, maker, capsys):
    make("pendulum-random")
    readme = maker.FOLDER / "README.md"
    readme.write_text("above\n<!-- table: begin -->\nold\n<!-- table: end -->\nbelow\n")
    make(card=True)
    lines = readme.read_text().splitlines()
    assert lines[0] == "above" and lines[-1] == "below" and "old" not in lines
    rewards = maker.read("pendulum-random")[0]["rewards"]
    cells = next(line for line in lines if "pendulum-random" in line).split(" | ")
    returns = rewards.reshape(5, 200).sum(1)
    assert cells[1:5] == ["1,000", "5", f"{returns.mean():.0f}", f"{returns.min():.0f}"]
    assert len({line.count(" | ") for line in lines if line.startswith("| ")}) == 1

    capsys.readouterr()
    make(list=True)
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert rows["pendulum-random"].split()[-3:-1] == ["1,000", "5"]
    assert rows["pendulum-medium-replay"].split()[1] == "ships"
    assert rows["hopper-expert"].endswith("policies/hopper.pt, rolled out")
    assert rows["pendulum-bimodal"].split()[1] == "ships"
    assert rows["ant-full-replay-v2"].endswith("D4RL's, downloaded")
    assert set(maker.KNOWN) - set(maker.REWARDED) < set(rows)
    assert rows["scene-play"].endswith("OGBench's recipe")
    assert rows["ant-medium"].endswith("policies/ant-directions.pt, rolled out")


def test_the_card_is_up_to_date(maker):
    """Whoever makes a shipped file anew runs `python datasets/make.py --card`."""
    card = (maker.FOLDER / "README.md").read_text()
    table = {row.split(" | ")[0]: row for row in maker.card_table().splitlines()}
    for name in maker.SHIPPED:
        assert f"| `{name}`" in card, name
        if name not in (*maker.GOALS, maker.SCENE, *maker.ASKED):  # those have tables of their own
            assert table[f"| `{name}`"] in card, name


# ----------------------------------------------------------------------------------------- D4RL


NAME, FILE = "hopper-medium-replay-v2", "hopper_medium_replay-v2.hdf5"


@pytest.fixture
def fetch(maker, elsewhere, monkeypatch):
    """`fetch("hopper-medium-replay-v2")` as the command line does it, into an empty datasets/."""
    monkeypatch.setattr(maker, "FOLDER", elsewhere.parent / "datasets")
    maker.FOLDER.mkdir()
    return lambda *names, **flags: maker.main(maker.Args(names=[*names], **flags))


@pytest.fixture
def cache(elsewhere, monkeypatch) -> Path:
    """Where D4RL's originals are kept."""
    path = elsewhere.parent / "d4rl" / "datasets"
    monkeypatch.setenv("D4RL_DATASET_DIR", str(path))
    return path


@pytest.fixture
def replay(hopper) -> dict[str, np.ndarray]:
    """About as many falls as timeouts in whole episodes, in D4RL's columns and types."""
    n = np.flatnonzero(hopper["terminals"] | hopper["timeouts"])[-1] + 1
    kinds = {"terminals": bool, "timeouts": bool}
    return {key: rows[:n].astype(kinds.get(key, np.float32)) for key, rows in hopper.items()}


def without(arrays: dict, *keys: str) -> dict:
    return {key: array for key, array in arrays.items() if key not in keys}


@pytest.fixture
def server(cache, elsewhere, replay, monkeypatch):
    """A mirror of D4RL with one file, as D4RL lays it out. `answers` is what it sends: the file, a
    page or nothing; `cuts` is how many answers break off in the middle; `ranges`: whether it can
    send a part of a file."""
    extra = {"infos/action_log_probs": np.zeros(2000), "metadata/algorithm": "SAC"}
    extra |= {"metadata/policy/fc0/weight": np.zeros((4, 4)), "infos/qpos": np.zeros((2000, 6))}
    content = write_hdf5(elsewhere.parent / "served.hdf5", replay | extra).read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append((self.path, self.headers["Range"]))
            if server.answers == "nothing" or not self.path.endswith(f"/{FILE}"):
                return self.send_error(404)
            body = content if server.answers == "file" else b"<html>Sign in, please</html>"
            first = 0
            if server.ranges and self.headers["Range"]:
                first = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1])
                if first >= len(body):
                    return self.send_error(416)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            else:
                self.send_response(200)
            body = body[first:]
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) * 2 // 3] if server.cuts > 0 else body)
            server.cuts -= 1

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.answers, server.cuts, server.ranges, server.requests = "file", 0, True, []
    server.content = content
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/gym_mujoco_v2"
    monkeypatch.setenv("D4RL_MIRROR", server.url)
    yield server
    server.shutdown()
    server.server_close()


def test_d4rl_is_fetched_once(fetch, maker, server, cache, replay, capsys):
    fetch(NAME)
    assert server.requests == [(f"/gym_mujoco_v2/{FILE}", None)]
    assert [(x.name, x.read_bytes()) for x in cache.iterdir()] == [(FILE, server.content)]
    made = maker.FOLDER / f"{NAME}.hdf5"
    assert [*maker.FOLDER.iterdir()] == [made]
    assert f"{NAME}: 0 ends of episodes recovered" in capsys.readouterr().out

    task = assert_loads(made, replay)
    assert task["env"] == "Hopper-v4" and task["bounds"] == [[-1] * 3, [1] * 3]
    with h5py.File(made) as file:
        assert (file.attrs["env_id"], file.attrs["ref_max_score"]) == ("Hopper-v4", 3234.3)
        assert file.attrs["ref_min_score"] == -20.272305 and FILE in file.attrs["description"]
        assert set(file) == {*without(replay, "next_observations"), "final_observations"}

    with pytest.raises(SystemExit, match="exists; --overwrite"):
        fetch(NAME)
    before = made.read_bytes()
    made.unlink()
    fetch(NAME)
    fetch(NAME, overwrite=True)
    assert len(server.requests) == 1
    assert_loads(made, replay)
    assert len(before) == made.stat().st_size


def test_names_of_d4rl(maker, fetch, monkeypatch):
    assert len(maker.D4RL) == 24 and set(maker.D4RL) < set(maker.KNOWN)
    assert maker.D4RL["ant-full-replay-v2"] == "ant_full_replay-v2.hdf5"
    for name in maker.D4RL:
        env_id = maker.environment_of(name)
        assert env_id.endswith("-v4") and env_id.lower().startswith(name.split("-")[0])
        assert maker.make_env(env_id).spec.max_episode_steps == 1000
        assert maker.references(env_id) == maker.sac.SCORES[env_id[:-3]]
    made = []
    monkeypatch.setattr(maker, "make", lambda name, args: made.append(name))
    fetch("all")
    assert made == maker.OURS and not {*made} & {*maker.D4RL}


def test_a_cut_transfer_goes_on(fetch, server, cache, capfd):
    server.cuts = 1
    fetch(NAME)
    first, second = (wanted for _, wanted in server.requests)
    assert first is None and (cache / FILE).read_bytes() == server.content
    begin = int(second.removeprefix("bytes=").removesuffix("-"))
    assert begin == len(server.content) * 2 // 3 - 65_536  # the last of what it has, once more
    assert "D4RL:" in capfd.readouterr().err  # the progress bar


def test_the_next_command_goes_on(fetch, server, cache):
    server.cuts = 1000
    with pytest.raises(SystemExit, match=r"broke off after.*what came is kept"):
        fetch(NAME)
    assert [x.name for x in cache.iterdir()] == [f"{FILE}.part"]
    server.cuts, known = 0, len(server.requests)
    fetch(NAME)
    assert len(server.requests) == known + 1 and server.requests[-1][1] > "bytes=1"
    assert [(x.name, x.read_bytes()) for x in cache.iterdir()] == [(FILE, server.content)]


def test_a_server_without_ranges_begins_anew(fetch, server, cache):
    server.cuts, server.ranges = 1, False
    fetch(NAME)
    assert len(server.requests) == 2 and server.requests[1][1]
    assert (cache / FILE).read_bytes() == server.content


@pytest.mark.parametrize("spoil", ["other", "longer", "empty", "whole"])
def test_a_part_that_does_not_fit_begins_anew(spoil, fetch, server, cache):
    """A file that has changed on the server in between; a part that lacks nothing is taken."""
    cache.mkdir(parents=True)
    half = server.content[: len(server.content) // 2]
    parts = {"other": half[:-9] + bytes(9), "longer": server.content + bytes(100_000)}
    part = parts.get(spoil, server.content if spoil == "whole" else b"")
    (cache / f"{FILE}.part").write_bytes(part)
    fetch(NAME)
    assert [(x.name, x.read_bytes()) for x in cache.iterdir()] == [(FILE, server.content)]
    assert len(server.requests) == (2 if spoil in ("other", "longer") else 1)


@pytest.mark.parametrize(
    "answers, cuts, said",
    [
        ("file", 1000, "broke off"),
        ("page", 0, "no HDF5"),
        ("nothing", 0, "404"),
    ],
)
@pytest.mark.parametrize("ranges", [True, False])
def test_a_bad_server_leaves_no_file(answers, cuts, said, ranges, fetch, maker, server, cache):
    server.answers, server.cuts, server.ranges = answers, cuts, ranges
    with pytest.raises(SystemExit, match=said) as end:
        fetch(NAME)
    message = str(end.value.code)
    assert f"{server.url}/{FILE}" in message and "D4RL_MIRROR" in message
    assert f"put {FILE} into {cache}" in message
    assert not (cache / FILE).exists() and not [*maker.FOLDER.iterdir()]
    server.answers, server.cuts = "file", 0  # and what is left does no harm
    fetch(NAME)
    assert (cache / FILE).read_bytes() == server.content


@pytest.mark.parametrize("mirror", ["http://127.0.0.1:9", "no-address"])
def test_no_network_is_said_plainly(mirror, fetch, maker, cache, monkeypatch):
    monkeypatch.setenv("D4RL_MIRROR", mirror)
    with pytest.raises(SystemExit, match="No D4RL data from") as end:
        fetch("walker2d-full-replay-v2")
    message = str(end.value.code)
    assert f"{mirror}/walker2d_full_replay-v2.hdf5" in message
    assert "refused" in message or "unknown url type" in message
    assert "D4RL_MIRROR" in message and f"into {cache}" in message and "kept" not in message
    assert not [*maker.FOLDER.iterdir()]


def test_a_cache_that_cannot_be_written_is_said_plainly(fetch, server, cache):
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.touch()  # a file where the folder should be
    with pytest.raises(SystemExit, match=f"exists.*{cache} .D4RL_DATASET_DIR"):
        fetch(NAME)


def put(cache: Path, arrays: dict, name: str = FILE) -> None:
    """Puts a file where the downloaded ones are, by hand."""
    write_hdf5(cache / name, arrays)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda x: without(x, "actions", "rewards"), "lacks actions, rewards"),
        (lambda x: x | {"observations": x["observations"][:, :5]}, "'observations' has the shape"),
        (lambda x: x | {"observations": np.ones((2000, 17))}, "'observations' has the shape"),
        (lambda x: x | {"actions": x["actions"][:-1]}, "'actions' has the shape"),
        (lambda x: x | {"rewards": x["rewards"] * np.nan}, "'rewards' is NaN"),
        (lambda x: x | {"actions": np.full((len(x["actions"]), 3), "up", "S2")}, "'actions' is of"),
        (lambda x: {key: rows[:0] for key, rows in x.items()}, "'observations' has the shape"),
        (lambda x: without(x, "rewards") | {"rewards/x": x["rewards"]}, "'rewards' is of type"),
    ],
)
def test_a_wrong_file_put_by_hand_is_refused(spoil, said, fetch, maker, cache, replay):
    put(cache, spoil(replay))
    with pytest.raises(SystemExit, match=said) as end:
        fetch(NAME)
    assert str(cache / FILE) in str(end.value.code) and "Delete it" in str(end.value.code)
    assert not [*maker.FOLDER.iterdir()]


def test_a_cut_file_put_by_hand_is_refused(fetch, server, cache):
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(server.content[:10_000])
    with pytest.raises(SystemExit, match=f"{FILE} is not D4RL's: it cannot be read.*Delete it"):
        fetch(NAME)


@pytest.mark.parametrize("successors", [True, False])
@pytest.mark.parametrize("lost", ["none", "half", "all", "the array"])
def test_lost_ends_are_recovered(successors, lost, fetch, maker, cache, replay, capsys):
    """By the successor that is not the next row or, without successors, by the next row that looks
    like a start. What is marked is never overruled."""
    truth = replay["timeouts"]
    lose = np.flatnonzero(truth[:-1])[:: 2 if lost == "half" else 1]
    lose = lose if lost != "none" else lose[:0]
    assert truth[:-1].sum() >= 20
    arrays = replay | {"timeouts": truth & ~np.isin(np.arange(len(truth)), lose)}
    arrays = without(arrays, "timeouts") if lost == "the array" else arrays
    put(cache, arrays if successors else without(arrays, "next_observations"))
    fetch(NAME)
    assert f"{NAME}: {len(lose)} ends of episodes recovered" in capsys.readouterr().out
    with h5py.File(maker.FOLDER / f"{NAME}.hdf5") as file:
        np.testing.assert_array_equal(file["timeouts"][()], truth)
        np.testing.assert_array_equal(file["terminals"][()], replay["terminals"])
        assert ("final_observations" in file) == successors
    if successors:
        assert_loads(maker.FOLDER / f"{NAME}.hdf5", replay)
    else:  # a timeout's row has no successor, and is not learnt from
        assert_loads(maker.FOLDER / f"{NAME}.hdf5", replay, ~truth)


def test_the_files_end_is_an_end(fetch, maker, cache, replay, capsys):
    """D4RL's files end where they end. The last successor is kept."""
    n = np.flatnonzero(replay["timeouts"])[-1] - 3
    cut = {key: rows[:n] for key, rows in replay.items()}
    put(cache, cut)
    fetch(NAME)
    assert f"{NAME}: 0 ends" in capsys.readouterr().out
    ended = cut | {"timeouts": cut["timeouts"] | (np.arange(n) == n - 1)}
    assert_loads(maker.FOLDER / f"{NAME}.hdf5", ended)


def test_rounding_ends_no_episode(maker, replay):
    replay["next_observations"] *= 1 + 1e-6
    assert maker.mend(replay, 1000)[1] == 0


def test_a_terminal_at_the_time_limit_is_a_terminal(maker, replay):
    both = np.flatnonzero(replay["terminals"])[3]
    replay["timeouts"] = replay["timeouts"] | (np.arange(len(replay["timeouts"])) == both)
    data, recovered = maker.mend(replay, 1000)
    assert recovered == 0 and data["terminals"][both] and not data["timeouts"][both]


@pytest.mark.parametrize("successors", [True, False])
def test_no_episode_exceeds_the_time_limit(successors, maker):
    n = 3500
    s = np.arange(n + 1, dtype=np.float32)[:, None]
    data = {"observations": s[:-1], "next_observations": s[1:], "rewards": np.ones(n)}
    data |= {"terminals": np.arange(n) == 249, "timeouts": np.arange(n) == 1249}
    data, recovered = maker.mend(data if successors else without(data, "next_observations"), 1000)
    assert recovered == 2  # the one at 1249 is marked, that of the last row is not counted
    assert np.flatnonzero(data["timeouts"]).tolist() == [1249, 2249, 3249, 3499]


def test_starts_are_known_from_timeouts_where_terminals_are_few(maker, replay):
    """As on HalfCheetah, which has no terminals: 20 marked ends of any kind are enough, fewer are
    too few to know what a start looks like."""
    bare = without(replay, "next_observations") | {"terminals": replay["terminals"] & False}
    ends = replay["terminals"] | replay["timeouts"]
    found, recovered = maker.mend(bare | {"timeouts": replay["timeouts"]}, 1000)
    np.testing.assert_array_equal(found["timeouts"], ends)
    assert recovered == replay["terminals"][:-1].sum()
    few = np.flatnonzero(ends)[10]
    marks = ends & (np.arange(len(ends)) <= few)
    found, recovered = maker.mend(bare | {"timeouts": marks}, 10_000)
    assert recovered == 0


def test_contact_forces_that_are_zero_are_left_out(fetch, maker, cache, capsys):
    """D4RL's ant has 84 of them, all zero; Ant-v4 has none."""
    rng = np.random.default_rng(0)
    s = np.zeros((101, 111), np.float32)
    s[:, :27] = rng.normal(size=(101, 27))
    arrays = {"observations": s[:-1], "next_observations": s[1:], "rewards": np.ones(100)}
    arrays |= {"actions": rng.uniform(-1, 1, (100, 8)), "terminals": np.zeros(100, bool)}
    put(cache, arrays, "ant_medium-v2.hdf5")
    fetch("ant-medium-v2")
    kept = {key: rows[:, :27] if "obs" in key else rows for key, rows in arrays.items()}
    kept |= {"timeouts": np.arange(100) == 99}
    assert assert_loads(maker.FOLDER / "ant-medium-v2.hdf5", kept)["env"] == "Ant-v4"
    s[50, 60] = 1
    put(cache, arrays, "ant_expert-v2.hdf5")
    with pytest.raises(SystemExit, match=r"'observations' has the shape \(100, 111\), not"):
        fetch("ant-expert-v2")


def test_d4rl_in_minari_and_in_mixtures(fetch, maker, cache, replay):
    put(cache, replay)
    put(cache, replay, "hopper_random-v2.hdf5")
    fetch(NAME, format="minari")
    data = minari.load_dataset(f"cleandgm/{NAME}-v0")
    assert data.spec.env_spec.id == "Hopper-v4" and data.storage.metadata["author"] == {"D4RL"}
    assert_loads(f"cleandgm/{NAME}-v0", replay)
    fetch(mix=f"{NAME}:0.5,hopper-random-v2:0.5", name="both")  # fetches the part that is missing
    task = load("bc").load_dataset(str(maker.FOLDER / "both.hdf5"))[1]
    assert task["env"] == "Hopper-v4"

    put(cache, without(replay, "next_observations"))
    fetch(NAME, overwrite=True)
    for flags in (dict(names=[NAME], format="minari"), dict(mix=f"{NAME}:1", name="one")):
        with pytest.raises(SystemExit, match="no final_observations"):
            maker.main(maker.Args(**flags))
