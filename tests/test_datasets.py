"""Loading: every format gives the same arrays, episodes end where they ended, bad data is refused.

The block is the same in every file of algorithms/ (test_structure.py), so it is tested in one.
"""

import functools
import http.server
import re
import threading

import gymnasium as gym
import minari
import numpy as np
import pytest
from conftest import ROOT, load, write_hdf5

pytestmark = pytest.mark.usefixtures("elsewhere")

bc = load("bc")
STATES = ("observations", "next_observations")
ARRAYS = "observations actions rewards next_observations terminals ends".split()


def assert_equal(one, other):
    for key in [*ARRAYS, "action_low", "action_high", "episodes", "returns"]:
        np.testing.assert_array_equal(getattr(one, key), getattr(other, key), err_msg=key)


def refusal(*args) -> str:
    with pytest.raises(SystemExit) as end:
        bc.load_dataset(*map(str, args))
    return str(end.value.code)


def without(arrays: dict, *keys: str) -> dict:
    return {key: array for key, array in arrays.items() if key not in keys}


# ------------------------------------------------------------------------------------- Formats


@pytest.fixture
def minari_id(pendulum, elsewhere) -> str:
    """The Pendulum data as a local Minari data set."""
    buffer = []
    for rows in np.split(np.arange(1600), 8):
        part = {key: array[rows] for key, array in pendulum.items()}
        observations = np.append(part["observations"], part["next_observations"][-1:], axis=0)
        buffer.append(
            minari.data_collector.EpisodeBuffer(
                observations=observations,
                actions=part["actions"],
                rewards=part["rewards"],
                terminations=part["terminals"],
                truncations=part["timeouts"],
            )
        )
    env = gym.make("Pendulum-v1")
    minari.create_dataset_from_buffers(
        dataset_id="pendulum/tiny-v0",
        buffer=buffer,
        env=env,
        algorithm_name="test",
        author="test",
        author_email="test@example.com",
        code_permalink="https://example.com",
    )
    return "pendulum/tiny-v0"


def test_every_format_gives_the_same_arrays(pendulum, pendulum_file, minari_id, elsewhere):
    hdf5 = bc.load_dataset(str(pendulum_file))
    assert hdf5.env_id == "Pendulum-v1" and hdf5.references == (-1500, 0)
    assert len(hdf5.returns) == 8 and hdf5.observations.dtype == np.float32
    np.testing.assert_array_equal(hdf5.rewards[:, 0], np.float32(pendulum["rewards"]))

    np.savez(elsewhere / "tiny.npz", **pendulum)
    assert_equal(hdf5, bc.load_dataset("tiny.npz", "Pendulum-v1"))

    by_id = bc.load_dataset(minari_id)
    assert by_id.source == "Minari" and by_id.env_id == "Pendulum-v1"
    assert_equal(hdf5, by_id)
    folder = elsewhere.parent / "minari" / minari_id
    for path in (folder, folder / "data"):
        assert_equal(hdf5, bc.load_dataset(str(path)))


def test_a_name_of_ours_is_a_file_of_the_datasets_folder(pendulum, pendulum_file, elsewhere):
    write_hdf5(elsewhere / "datasets" / "my-data.hdf5", pendulum, env_id="Pendulum-v1")
    dataset = bc.load_dataset("my-data")
    assert dataset.name == "my-data"
    assert_equal(dataset, bc.load_dataset(str(pendulum_file)))


@pytest.mark.parametrize(
    "env_id, scores",
    [("HalfCheetah-v5", (-280.178953, 12135)), ("Hopper-v4", (-20.272305, 3234.3))],
)
def test_references_are_d4rls_where_the_file_has_none(env_id, scores, hopper, elsewhere):
    if env_id.startswith("HalfCheetah"):  # 17 and 6 dimensions
        hopper = {key: np.zeros((30, *array.shape[1:])) for key, array in hopper.items()}
        hopper |= {"observations": np.zeros((30, 17)), "next_observations": np.zeros((30, 17))}
        hopper |= {"actions": np.zeros((30, 6))}
    write_hdf5(elsewhere / "h.hdf5", hopper)
    assert bc.load_dataset("h.hdf5", env_id).references == scores


def test_environment_of_a_module_and_none(toy_env, elsewhere):
    arrays = {"observations": np.zeros((10, 2)), "actions": np.linspace(-1, 3, 10)}
    arrays |= {key: np.zeros(10) for key in ("rewards", "terminals", "timeouts")}
    path = write_hdf5(elsewhere / "toy.hdf5", arrays | {"rewards": np.ones(10)})
    dataset = bc.load_dataset(str(path), toy_env)
    assert dataset.env_id == toy_env
    assert (dataset.action_low, dataset.action_high) == (-1, 3)
    assert np.isnan(dataset.references).all()

    arrays["actions"] /= 3
    write_hdf5(path, arrays)
    assert bc.load_dataset(str(path)).env_id == "none"
    assert bc.load_dataset(str(path), "none").env_id == "none"


def test_actions_are_scaled_from_the_bounds(pendulum, pendulum_file):
    dataset = bc.load_dataset(str(pendulum_file))
    assert (dataset.action_low, dataset.action_high) == (-2, 2)
    np.testing.assert_allclose(dataset.actions, pendulum["actions"] / 2, atol=1e-6)
    assert np.abs(dataset.actions).max() > 0.9


# ------------------------------------------------------------------------------------ Episodes


@pytest.fixture
def counted() -> dict[str, np.ndarray]:
    """10 steps that count: a terminal at 2, a timeout at 5, cut at 9. Successors at an episode's
    end are no row of the data: 102, 105, 109."""
    s = np.arange(10.0)[:, None]
    s_next = s + 1
    s_next[[2, 5, 9]] = [[102], [105], [109]]
    mark = functools.partial(np.isin, np.arange(10))
    arrays = dict(observations=s, next_observations=s_next, actions=s / 10, rewards=s[:, 0])
    return arrays | dict(terminals=mark([2]), timeouts=mark([5]))


@pytest.mark.parametrize("timeouts", [True, False])
def test_a_terminal_is_not_a_timeout(timeouts, counted, elsewhere):
    if not timeouts:  # the jump from 105 to 6 tells
        counted["timeouts"][:] = False
    write_hdf5(elsewhere / "c.hdf5", counted)
    dataset = bc.load_dataset("c.hdf5")
    assert np.flatnonzero(dataset.terminals[:, 0]).tolist() == [2]
    assert np.flatnonzero(dataset.ends).tolist() == [2, 5, 9]
    np.testing.assert_array_equal(dataset.next_observations, counted["next_observations"])
    assert dataset.episodes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert dataset.returns.tolist() == [3, 12, 30]


def test_without_successors_a_timeout_loses_its_last_row(counted, elsewhere):
    write_hdf5(elsewhere / "c.hdf5", without(counted, "next_observations"))
    dataset = bc.load_dataset("c.hdf5")
    s = dataset.observations[:, 0]
    assert s.tolist() == [0, 1, 2, 3, 4, 6, 7, 8]  # 5 and 9 have no successor in the file
    assert s[dataset.terminals[:, 0] > 0].tolist() == [2]
    assert s[dataset.ends].tolist() == [2, 4, 8]
    rest = dataset.terminals[:, 0] == 0
    np.testing.assert_array_equal(dataset.next_observations[rest], s[rest, None] + 1)


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

    # The same where terminals are a column.
    columns = {key: compact[key][:, None] for key in ("terminals", "timeouts")}
    write_hdf5(elsewhere / "columns.hdf5", without(compact, "next_observations") | columns)
    assert_equal(bc.load_dataset("whole.hdf5"), bc.load_dataset("columns.hdf5"))


def test_final_observations_must_be_one_per_episode(compact, elsewhere):
    compact = without(compact, "next_observations")
    for name, rows in (("more", 3), ("fewer", -3)):
        final = np.resize(
            compact["final_observations"], (len(compact["final_observations"]) + rows, 11)
        )
        write_hdf5(elsewhere / f"{name}.hdf5", compact | {"final_observations": final})
        said = refusal(f"{name}.hdf5")
        assert f"{name}.hdf5" in said and "final_observations" in said


def test_an_episode_cut_by_the_files_end_gets_no_false_successor(compact, elsewhere):
    compact = without(compact, "next_observations")
    n = len(compact["rewards"])
    cut = {key: array[: n - 5] for key, array in compact.items()}
    cut["final_observations"] = compact["final_observations"][:-1]
    write_hdf5(elsewhere / "cut.hdf5", cut)
    try:
        dataset = bc.load_dataset("cut.hdf5")
    except SystemExit:
        return  # refused: just as good
    assert (dataset.next_observations[-1] != dataset.observations[0]).any()


def test_lost_timeouts_are_recovered_from_successors(hopper, elsewhere):
    write_hdf5(elsewhere / "whole.hdf5", hopper)
    for name, arrays in {
        "zero": hopper | {"timeouts": np.zeros(2000)},
        "none": without(hopper, "timeouts"),
    }.items():
        write_hdf5(elsewhere / f"{name}.hdf5", arrays)
        assert_equal(bc.load_dataset("whole.hdf5"), bc.load_dataset(f"{name}.hdf5"))


def test_lost_timeouts_are_recovered_from_resets(hopper, elsewhere):
    """Without successors too: a row that looks like those after a terminal begins an episode."""
    timeouts = hopper["timeouts"] > 0
    found = bc.breaks(np.float32(hopper["observations"]), None, hopper["terminals"] > 0)
    found[-1] = timeouts[-1]  # the file's end says nothing
    resets = timeouts | (hopper["terminals"] > 0)
    recall = (found & timeouts).sum() / timeouts.sum()
    precision = (found & resets).sum() / found.sum()
    print(f"recall {recall:.3f}, precision {precision:.3f} of {timeouts.sum()} timeouts")
    assert recall == 1 and precision == 1  # measured, and the same for other controllers

    bare = without(hopper, "next_observations")
    write_hdf5(elsewhere / "whole.hdf5", bare)
    write_hdf5(elsewhere / "bare.hdf5", bare | {"timeouts": np.zeros(2000)})
    assert_equal(bc.load_dataset("whole.hdf5"), bc.load_dataset("bare.hdf5"))


def test_lost_timeouts_are_recovered_from_the_step_limit(pendulum, elsewhere):
    bare = without(pendulum, "next_observations")
    write_hdf5(elsewhere / "whole.hdf5", bare)
    write_hdf5(elsewhere / "bare.hdf5", bare | {"timeouts": np.zeros(1600)})
    dataset = bc.load_dataset("bare.hdf5", "Pendulum-v1")  # 200 steps
    assert len(dataset.returns) == 8 and len(dataset.ends) == 8 * 199
    assert_equal(bc.load_dataset("whole.hdf5", "Pendulum-v1"), dataset)


def test_few_terminals_make_no_false_resets(hopper):
    """Fewer than 20 starts are too few to know what a start looks like."""
    end = np.flatnonzero(hopper["terminals"])[10] + 1
    s, terminals = np.float32(hopper["observations"][:end]), hopper["terminals"][:end] > 0
    assert bc.breaks(s, None, terminals).sum() == 1  # the file's end


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


def empty(arrays):
    arrays.update({key: array[:0] for key, array in arrays.items()})


def discrete(arrays):
    arrays["actions"] = np.zeros(len(arrays["actions"]), np.int64)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (change("observations", (7, 1), np.nan), "'observations' is NaN or infinite.*index 7"),
        (change("next_observations", (9, 0), np.inf), "'next_observations' is NaN.*index 9"),
        (change("actions", 11, np.nan), "'actions' is NaN or infinite.*index 11"),
        (change("rewards", [12, 40], -np.inf), "'rewards' is NaN or infinite.*index 12"),
        (change("timeouts", 3, np.nan), "'timeouts' is NaN or infinite.*index 3"),
        (change("actions", [13, 50], 2.1), r"2\.1.*index 13 is outside"),
        (change("actions", 14, -2.1), r"-2\.1.*index 14 is outside"),
        (cut("rewards"), "'rewards' has 1597 rows, 'observations' has 1600"),
        (cut("next_observations"), "'next_observations' has 1597 rows"),
        (drop("actions"), "lacks actions"),
        (drop("rewards", "terminals"), "lacks rewards, terminals"),
        (empty, "empty"),
        (discrete, "discrete"),
        (lambda x: x.update(dict.fromkeys(STATES, np.zeros((1600, 5)))), r"\(5,\).*v1.*\(3,\)"),
        (lambda x: x.update(actions=np.zeros((1600, 2))), r"\(2,\).*--env-id"),
        (lambda x: x.update(next_observations=np.zeros((1600, 5))), "next_observations"),
    ],
)
def test_bad_arrays_are_refused(spoil, message, pendulum, elsewhere):
    arrays = dict(pendulum)
    spoil(arrays)
    write_hdf5(elsewhere / "bad.hdf5", arrays, env_id="Pendulum-v1")
    said = refusal("bad.hdf5")
    assert "bad.hdf5" in said and re.search(message, said), said


def test_one_row_without_a_successor_is_refused(pendulum, elsewhere):
    one = {key: array[:1] for key, array in without(pendulum, "next_observations").items()}
    write_hdf5(elsewhere / "one.hdf5", one, env_id="Pendulum-v1")
    assert "one.hdf5" in refusal("one.hdf5")


def test_an_environment_without_action_bounds_is_refused(toy_env, elsewhere):
    """Actions cannot be scaled from infinite bounds: they would all be NaN."""
    env = gym.make(toy_env)
    env.unwrapped.__class__.action_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    arrays = {"observations": np.zeros((10, 2)), "actions": np.zeros(10)}
    arrays |= {key: np.zeros(10) for key in ("rewards", "terminals", "timeouts")}
    write_hdf5(elsewhere / "toy.hdf5", arrays)
    assert toy_env in refusal("toy.hdf5", toy_env)


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


def test_an_unknown_name_lists_what_exists(pendulum, elsewhere):
    write_hdf5(elsewhere / "datasets" / "my-data.hdf5", pendulum)
    said = refusal("no-such-data")
    assert "'no-such-data'" in said and "my-data" in said and "datasets/make.py" in said
    assert (ROOT / "datasets" / "make.py").exists()
    assert "no-such.hdf5" in refusal("no-such.hdf5")


@pytest.mark.parametrize(
    "env_id, reason",
    [
        ("NoSuch-v0", "NoSuch"),
        ("Pendulum-v999", "Pendulum"),
        ("no_module:Toy-v0", "no_module"),
        ("not an id", "not an id"),
        ("CartPole-v1", "Box"),
    ],
)
def test_unusable_environments_are_refused(env_id, reason, pendulum_file):
    said = refusal(pendulum_file, env_id)
    assert env_id in said and reason in said and "--env-id" in said


# ------------------------------------------------------------------------------------ Downloads


@pytest.fixture
def server(elsewhere, hopper, monkeypatch):
    """A mirror of D4RL with one file, as D4RL lays it out; `server.mode` says how it fails."""
    file = elsewhere.parent / "served.hdf5"
    extra = {"infos/action_log_probs": np.zeros(2000), "metadata/algorithm": "SAC"}
    extra |= {"metadata/policy/fc0/weight": np.zeros((4, 4)), "infos/qpos": np.zeros((2000, 6))}
    write_hdf5(file, without(hopper, "next_observations") | extra)
    content = file.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append(self.path)
            mode = server.mode if server.mode != "cut once" or len(server.requests) == 1 else "good"
            if mode == "missing" or not self.path.endswith("/hopper_medium_replay-v2.hdf5"):
                return self.send_error(404)
            body = b"<html>Sign in to this network</html>" if mode == "garbage" else content
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2] if "cut" in mode else body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.mode, server.requests = "good", []
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_port}/gym_mujoco_v2"
    server.cache = elsewhere.parent / "cache" / "datasets"
    monkeypatch.setenv("D4RL_MIRROR", server.url)
    monkeypatch.setenv("D4RL_DATASET_DIR", str(server.cache))
    yield server
    server.shutdown()
    server.server_close()


def test_d4rl_is_downloaded_once(server, hopper, elsewhere):
    dataset = bc.load_dataset("hopper-medium-replay-v2")
    assert server.requests == ["/gym_mujoco_v2/hopper_medium_replay-v2.hdf5"]
    assert dataset.env_id == "Hopper-v4" and dataset.source == "D4RL"
    assert dataset.references == (-20.272305, 3234.3)
    write_hdf5(elsewhere / "local.hdf5", without(hopper, "next_observations"))
    assert_equal(dataset, bc.load_dataset("local.hdf5"))
    assert_equal(dataset, bc.load_dataset("hopper-medium-replay-v2"))
    assert len(server.requests) == 1
    assert [file.name for file in server.cache.iterdir()] == ["hopper_medium_replay-v2.hdf5"]


def test_a_broken_transfer_begins_anew(server):
    server.mode = "cut once"
    assert len(bc.load_dataset("hopper-medium-replay-v2").returns) > 20
    assert len(server.requests) == 2


@pytest.mark.parametrize("mode", ["cut always", "garbage", "missing"])
def test_a_bad_server_leaves_no_file(mode, server):
    server.mode = mode
    said = refusal("hopper-medium-replay-v2")
    assert f"{server.url}/hopper_medium_replay-v2.hdf5" in said and "D4RL_MIRROR" in said
    assert str(server.cache) in said  # where to put a file by hand
    assert not (server.cache / "hopper_medium_replay-v2.hdf5").exists()
    server.mode = "good"  # and what is left does no harm
    assert len(bc.load_dataset("hopper-medium-replay-v2").returns) > 20


def test_no_network_is_said_plainly(monkeypatch):
    said = refusal("hopper-medium-v2")  # the mirror's port is closed
    assert "No D4RL data" in said and "hopper_medium-v2.hdf5" in said and "refused" in said

    def offline(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(minari, "load_dataset", offline)
    said = refusal("mujoco/hopper/expert-v0")
    assert "mujoco/hopper/expert-v0" in said and "no route to host" in said
