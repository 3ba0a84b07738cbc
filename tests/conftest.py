"""What the tests share: the algorithms as modules, two tiny data sets, sizes that train at once."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
ALGORITHMS = Path(os.environ.get("CLEANDGM_ALGORITHMS", ROOT / "algorithms"))  # mutants.py's copy
FILES = sorted(ALGORITHMS.glob("*.py"))
NAMES = [path.stem for path in FILES]

sys.path.append(str(ROOT / "datasets"))
import pixels  # noqa: E402, F401  chooses how to draw before any test imports MuJoCo

# A run of a second: for every file, and what a file needs on top.
TINY = dict(steps=20, batch_size=16, hidden_dim=16, eval_every=10, eval_episodes=2, device="cpu")
TINY_EXTRA = {
    "a2po": dict(cvae_dim=16, cvae_min_steps=10),  # the CVAE is frozen in the middle of the run
    "flow_bc": dict(blocks=2, bins=4, candidates=4),
    "fql": dict(hidden_layers=2),
    "cvae_bcq": dict(cvae_dim=16, policy_samples=5),
    "gan_world_model": dict(model_dim=16, model_layers=2, ensemble=2, discriminator_dim=16)
    | dict(model_steps=10, rollout_every=4, rollout_batch=8, termination="none"),
    "sac": dict(offline=True),
    "trajectory_stitching": dict(model_steps=10, model_dim=16, ensemble=2, latent_dim=2),
    "decision_transformer": dict(layers=2, context=4, warmup_steps=10),
    "gciql": dict(hidden_layers=2),
    "hiql": dict(hidden_layers=2, subgoal_steps=3),
    "gan_irl": dict(discriminator_steps=10),
    "dwbc": dict(discriminator_every=2),
    "pi0": dict(layers=1, heads=2, head_dim=8, action_dim=8, chunk=3, execute=2, flow_steps=2)
    | dict(draws=2, warmup_steps=5, decay_steps=20),
    "rt1": dict(layers=1, heads=2, bins=16, context=3, tokens=2, text_dim=8)
    | dict(warmup_steps=5, decay_steps=20),
    "rt2": dict(layers=1, heads=2, bins=8, warmup_steps=5, decay_steps=20),
    "s2p": dict(image_size=1, painter_steps=10, painter_batch_size=8, channels=8)  # no pictures
    | dict(model_dim=16, ensemble=2),
    "trajectory_transformer": dict(layers=1, heads=2, bins=8, context=4, history=2, horizon=1)
    | dict(beam_width=3, warmup_steps=10, decay_steps=20),
    "transformer_mbrl": dict(model_dim=16, layers=2, attention_heads=2, ensemble=2, context=4)
    | dict(model_steps=10, model_batch_size=4, rollout_every=4, rollout_batch=8)
    | dict(termination="none"),
    "diffuser": dict(horizon=4, multipliers=(1, 2), diffusion_steps=2, plans=2, execute=4)
    | dict(guide_stop=1, guide_steps=1),
}


def load(name: str, fresh: bool = False):
    """The module algorithms/<name>.py, by its path: the folder is no package."""
    known = f"{'fresh' if fresh else 'algorithm'}_{name}"
    if fresh or known not in sys.modules:
        path = ALGORITHMS / f"{name}.py"
        spec = importlib.util.spec_from_file_location(known, path)
        sys.modules[known] = importlib.util.module_from_spec(spec)  # dataclasses look there
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


def robot_scene():
    """The module datasets/scene.py; a test without OGBench or a renderer is skipped."""
    pytest.importorskip("ogbench", reason="needs requirements-goals.txt")
    scene = importlib.import_module("scene")
    try:
        scene.camera(64)
    except Exception as error:
        pytest.skip(f"needs Debian's libosmesa6 or libegl1: {error}")
    return scene


def pytest_collection_modifyitems(config, items):
    """Two workers begin with a half each: the long tests come first in both halves, so that
    neither waits at the end for a long one of the other's."""
    if hasattr(config, "workerinput"):
        is_long = [any(map(item.get_closest_marker, ("learning", "slow"))) for item in items]
        long, short = ([x for x, y in zip(items, is_long) if y == wanted] for wanted in (1, 0))
        i, j = len(long) // 2, len(short) // 2
        items[:] = long[:i] + short[:j] + long[i:] + short[j:]


def tiny(name: str, **flags) -> dict:
    return TINY | TINY_EXTRA.get(name, {}) | flags


def record(env_id: str, act, steps: int, cut=None) -> dict[str, np.ndarray]:
    """`steps` steps in D4RL's flat layout; `cut` draws the step at which to stop an episode."""
    columns = "observations actions rewards next_observations terminals timeouts".split()
    rows, rng, env = {key: [] for key in columns}, np.random.default_rng(0), gym.make(env_id)
    s, _ = env.reset(seed=0)
    length, last = 0, cut(rng) if cut else steps
    for _ in range(steps):
        a = np.float32(act(s, rng))
        s_next, r, terminal, timeout, _ = env.step(a)
        length += 1
        timeout = (timeout or length >= last) and not terminal
        for key, value in zip(columns, (s, a, r, s_next, terminal, timeout)):
            rows[key].append(value)
        s = s_next
        if terminal or timeout:
            s, _ = env.reset()
            length, last = 0, cut(rng) if cut else steps
    env.close()
    return {key: np.array(value) for key, value in rows.items()}


def write_hdf5(path: Path, arrays: dict, **attributes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for key, array in arrays.items():
            file[key] = array
        file.attrs.update(attributes)
    return path


@pytest.fixture(scope="session")
def pendulum() -> dict[str, np.ndarray]:
    """8 episodes of 200 steps, no terminals, actions in [-2, 2]: a damped and noisy controller."""

    def act(s, rng):
        return np.clip(-0.5 * s[2:] + rng.uniform(-1.5, 1.5, 1), -2, 2)

    return record("Pendulum-v1", act, 1600)


@pytest.fixture(scope="session")
def hopper() -> dict[str, np.ndarray]:
    """2000 steps: about as many falls (terminals) as episodes cut at 15 to 60 steps (timeouts)."""
    arrays = record(
        "Hopper-v5", lambda s, g: g.uniform(-0.3, 0.3, 3), 2000, lambda g: g.integers(15, 60)
    )
    assert arrays["terminals"].sum() >= 20 and arrays["timeouts"].sum() >= 20
    return arrays


@pytest.fixture(scope="session")
def pendulum_file(pendulum, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "tiny-pendulum.hdf5"
    attributes = dict(env_id="Pendulum-v1", action_low=[-2.0], action_high=[2.0])
    return write_hdf5(path, pendulum, **attributes, ref_min_score=-1500, ref_max_score=0)


@pytest.fixture(params=NAMES)
def module(request):
    return load(request.param)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """An empty working directory, and no cache or server of the user's within reach."""
    for key, value in {
        "D4RL_DATASET_DIR": tmp_path / "d4rl",
        "D4RL_MIRROR": "http://127.0.0.1:9",  # nothing listens there
        "MINARI_DATASETS_PATH": tmp_path / "minari",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(key, str(value))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


@pytest.fixture
def toy_env(tmp_path, monkeypatch) -> str:
    """Id of an environment in a module of the user's: 2 numbers to see, an action in [-1, 3]."""
    (tmp_path / "toy_module.py").write_text(
        "import gymnasium as gym, numpy as np\n"
        "class Toy(gym.Env):\n"
        "    observation_space = gym.spaces.Box(-9, 9, (2,), np.float32)\n"
        "    action_space = gym.spaces.Box(-1, 3, (1,), np.float32)\n"
        "    def reset(self, *, seed=None, options=None):\n"
        "        super().reset(seed=seed)\n"
        "        return self.np_random.normal(size=2).astype(np.float32), {}\n"
        "    def step(self, action):\n"
        "        assert self.action_space.contains(np.float32(action)), action\n"
        "        return np.zeros(2, np.float32), 1.0, False, False, {}\n"
        "gym.register('Toy-v0', Toy, max_episode_steps=5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "toy_module:Toy-v0"
    gym.registry.pop("Toy-v0", None)
    sys.modules.pop("toy_module", None)
