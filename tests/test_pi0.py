"""pi0: who sees whom, the flow's path and target, what a chunk's end is worth, words, plans; the
robot's data, its environment, and LeRobot's folders."""

import io
import json

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import units
from conftest import load, robot_scene, tiny
from units import A, S, copies

pi0 = load("pi0")
SIDE, ASKED = 32, ["open the drawer", "close the window now"]
FLAGS = dict(layers=2, hidden_dim=24, action_dim=12, heads=2, head_dim=6, chunk=4, execute=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rows(n=64, **columns):
    images = torch.randint(256, (n, SIDE, SIDE, 3), dtype=torch.uint8)
    return units.data(n, **columns) | {"images": images, "task_index": torch.arange(n) % 2}


def learner(found=None, **flags):
    found = found or rows()
    given = units.task(found, -2.0, 3.0) | {"image": [SIDE, SIDE, 3], "instructions": ASKED}
    return pi0.Pi0(dict(found), given, pi0.Args(**tiny("pi0", **FLAGS | flags)))


def seen(n=5, **other):
    image = np.random.default_rng(0).integers(256, size=(n, SIDE, SIDE, 3), dtype=np.uint8)
    state = np.random.default_rng(1).normal(size=(n, S)).astype(np.float32)
    return [
        {"image": image[i], "state": state[i], "instruction": ASKED[i % 2]} | other
        for i in range(n)
    ]


def parts(agent, n=6):
    """Pictures, words, states, chunks and which of their actions there are, of n rows."""
    return agent.batch(agent.data, torch.arange(n))


# --------------------------------------------------------------------------------- Who sees whom


def joint_attention(net, images, words, s, x, t):
    """What the suffix's tokens become, by the paper's rule: one sequence, of which every token
    sees the blocks up to its own; each token by its own expert's weights."""
    prefix = torch.cat([net.eyes(images), net.embed_word(words) + net.word_position], dim=1)
    time = t * net.frequencies
    time = torch.cat([time.sin(), time.cos()], dim=-1).expand(-1, x.shape[1], -1)
    h = net.merge(torch.cat([net.embed_action(x), time], dim=-1))
    h = net.action_net(torch.nn.functional.silu(h)) + net.action_position
    suffix = torch.cat([net.embed_state(s)[:, None], h], dim=1)
    block = torch.tensor([0] * prefix.shape[1] + [1] + [2] * x.shape[1])
    there = torch.cat([words.new_ones(len(s), 4), words > 0, words.new_ones(suffix.shape[:2])], 1)
    mask = (block[:, None] >= block) & there[:, None].bool()
    mask[:, torch.arange(len(block)), torch.arange(len(block))] = True  # padding sees something
    for wide, narrow in zip(net.wide, net.narrow):
        queries, keys, values = (
            torch.cat([a, b], dim=1)
            for a, b in zip(
                *(
                    e.query_key_value(e.norm_1(y)).unflatten(-1, e.shape).unbind(2)
                    for e, y in ((wide, prefix), (narrow, suffix))
                )
            )
        )  # (B, T, heads, d)
        scores = torch.einsum("bthd,bshd->bhts", queries, keys) / queries.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask[:, None], -1e9).softmax(-1)
        mixed = torch.einsum("bhts,bshd->bthd", weights, values).flatten(2)
        n = prefix.shape[1]
        prefix = prefix + wide.project(mixed[:, :n])
        suffix = suffix + narrow.project(mixed[:, n:])
        prefix = prefix + wide.net(wide.norm_2(prefix))
        suffix = suffix + narrow.net(narrow.norm_2(suffix))
    return net.out(net.norm(suffix[:, 1:]))


def test_reading_the_prefix_once_is_joint_attention_over_all():
    agent = learner()
    net, (images, words, s, a, _) = agent.policy.net, parts(agent)
    t = torch.rand(6, 1, 1)
    found = net(net.read(images, words), s, a, t)
    torch.testing.assert_close(found, joint_attention(net, images, words, s, a, t))


def test_the_state_does_not_see_the_actions_which_see_each_other():
    agent = learner()
    net, (images, words, s, a, _) = agent.policy.net, parts(agent)
    kept, known = [], net.read(images, words)
    net.narrow[-1].register_forward_hook(lambda *x: kept.append(x[-1][0]))
    other = a.clone()
    other[:, -1] += 1
    for actions in (a, other):
        net(known, s, actions, torch.ones(6, 1, 1))
    assert torch.equal(kept[0][:, 0], kept[1][:, 0])
    assert ((kept[0] - kept[1])[:, 1:].abs().amax((0, 2)) > 1e-6).all()


def test_padding_is_not_read_and_words_in_order_are():
    agent = learner()
    net, (images, words, s, a, _) = agent.policy.net, parts(agent)
    before = net(net.read(images, words), s, a, torch.ones(6, 1, 1))
    with torch.no_grad():
        net.embed_word.weight[0] += 100
    after = net(net.read(images, words), s, a, torch.ones(6, 1, 1))
    torch.testing.assert_close(before, after)
    swapped = words[:, [1, 0, *range(2, words.shape[1])]]
    assert (net(net.read(images, swapped), s, a, torch.ones(6, 1, 1)) - after).abs().max() > 1e-5


def test_words_have_numbers_and_unknown_ones_share_one():
    agent = learner(max_words=4)
    numbers = agent.policy.words(["Open the door", "close the window now please"])
    known = pi0.vocabulary({"instructions": ASKED})
    assert sorted(known.values()) == list(range(2, 8))
    assert numbers[0].tolist() == [known["open"], known["the"], 1, 0]
    assert numbers[1].tolist() == [known[w] for w in ("close", "the", "window", "now")]


# ---------------------------------------------------------------------------------------- Flow


def test_a_perfect_velocity_has_no_loss_and_gives_the_actions_back(monkeypatch):
    """v = (x_t - a) / t is ε - a on the path from a (t = 0) to ε (t = 1)."""
    agent, asked = learner(flow_steps=7, draws=1), []
    images, words, s, a, real = parts(agent)

    def velocity(self, known, s, x, t):
        asked.append(t)
        return (x - a) / t

    monkeypatch.setattr(pi0.Network, "forward", velocity)
    assert agent.loss(images, words, s, a, real) < 1e-9
    noise, asked[:] = torch.randn_like(a), []
    torch.testing.assert_close(agent.policy.decode(None, s, noise), a)
    times = torch.stack(asked)[:, 0, 0, 0]
    torch.testing.assert_close(times, 1 - torch.arange(7) / 7)


def test_times_are_those_of_the_paper(monkeypatch):
    """Beta(1.5, 1) has mean 0.6 and P(b < 0.25) = 0.125; nothing below 0.001."""
    agent, kept = learner(draws=1), []
    images, words, s, a, real = (x.repeat_interleave(2000, 0) for x in parts(agent, 5))
    monkeypatch.setattr(pi0.Network, "read", lambda *_: None)
    monkeypatch.setattr(
        pi0.Network, "forward", lambda self, known, s, x, t: kept.append(t) or torch.zeros_like(x)
    )
    agent.loss(images, words, s, a, real)
    b = (kept[0].flatten() - 0.001) / 0.999
    assert len(b) == 10_000 and 0 <= b.min() and b.max() < 1  # one time for a chunk's actions
    assert abs(b.mean() - 0.6) < 0.01 and abs((b < 0.25).float().mean() - 0.125) < 0.01


def test_draws_are_as_many_batches_of_their_own():
    images, words, s, a, real = parts(learner())
    losses = []
    for draws, times in ((3, 1), (1, 3)):
        torch.manual_seed(1)
        agent = learner(draws=draws)
        batch = (x.repeat_interleave(times, 0) for x in (images, words, s, a, real))
        torch.manual_seed(2)
        losses.append(agent.loss(*batch))
    torch.testing.assert_close(*losses)


def test_the_network_knows_the_time_and_the_order_of_actions():
    agent = learner()
    net, (images, words, s, a, _) = agent.policy.net, parts(agent)
    known = net.read(images, words)
    late, early = (net(known, s, a, torch.full((6, 1, 1), t)) for t in (0.9, 0.3))
    assert (late - early).abs().max() > 1e-5
    same = net(known, s, a[:, :1].expand(-1, 4, -1), torch.ones(6, 1, 1))
    assert (same[:, 0] - same[:, 1]).abs().max() > 1e-5


def test_a_chunk_ends_with_its_episode():
    """Episodes of four rows: what comes after is neither loss nor target."""
    found = rows()
    agent = learner(found)
    *_, a, real = agent.batch(agent.data, torch.tensor([0, 2, 3, 63]))
    assert real[..., 0].tolist() == [
        [True] * 4, [True, True, False, False], [True, False, False, False],
        [True, False, False, False],
    ]  # fmt: skip
    torch.testing.assert_close(a[0], found["actions"][:4])
    torch.testing.assert_close(a[1, :2], found["actions"][2:4])
    losses = []
    for shift in (0.0, 5.0):  # of all that the episode does not have
        torch.manual_seed(3)
        images, words, s, a, real = agent.batch(agent.data, torch.tensor([2, 3]))
        net = agent.policy.net
        net.forward = lambda known, s, x, t: torch.ones_like(x)
        losses.append(agent.loss(images, words, s, a + shift * ~real, real))
    assert losses[0] == losses[1] > 0


def test_the_loss_is_the_mean_over_the_actions_that_there_are():
    agent = learner(head="mse")
    images, words, s, a, real = agent.batch(agent.data, torch.tensor([1, 3]))
    out = agent.policy.net(
        agent.policy.net.read(images, words), s, torch.zeros_like(a), torch.ones(2, 1, 1)
    )
    error = (out - a).square()
    mean = torch.cat([error[0, :3].flatten(), error[1, :1].flatten()]).mean()
    torch.testing.assert_close(agent.loss(images, words, s, a, real), mean)


@pytest.mark.parametrize("head", ["flow", "mse", "tokens"])
def test_every_part_learns(head):
    agent = learner(head=head, weight_decay=0.0)
    before = copies(agent.policy.net)
    for _ in range(3):
        agent.update()
    still = [
        name
        for (name, x), y in zip(agent.policy.net.named_parameters(), before)
        if torch.equal(x, y)
    ]
    unread = {"embed_action.weight"} if head != "flow" else set()  # it reads zeros
    last = {f"wide.1.{x}" for x in ("project.weight", "norm_2.weight")}  # nobody reads what the
    last |= {f"wide.1.net.{i}.{x}" for i in (0, 2) for x in ("weight", "bias")}  # last layer says
    assert set(still) == unread | last


def test_tokens_are_bins_and_come_back_within_half_of_one(monkeypatch):
    agent = learner(head="tokens", bins=10)
    images, words, s, a, real = parts(agent)
    logits = {}

    def forward(self, known, s, x, t):
        bins = ((a + 1) / 2 * 10).floor().clamp(max=9).long()
        logits["x"] = 50.0 * torch.nn.functional.one_hot(bins, 10).float()
        return logits["x"].flatten(2)

    monkeypatch.setattr(pi0.Network, "forward", forward)
    assert agent.loss(images, words, s, a, real) < 1e-6
    back = agent.policy.decode(None, s, torch.randn_like(a))
    assert (back - a).abs().max() <= 0.1 + 1e-6 and back.abs().max() < 1


def test_the_step_size_rises_and_falls_to_a_tenth():
    agent = learner(warmup_steps=4, decay_steps=10, learning_rate=1.0)
    rates = [agent.update()["charts/learning_rate"].item() for _ in range(12)]
    expected = [0.55 + 0.45 * np.cos(np.pi * min(i, 10) / 10) for i in range(1, 13)]
    np.testing.assert_allclose(rates, np.minimum(expected, np.arange(1, 13) / 4), rtol=1e-5)


def test_validation_tells_whether_words_are_heard():
    agent = learner()
    found = agent.validate(rows(16))
    assert found["plan_mse"] != found["plan_mse_other_words"]
    with torch.no_grad():
        agent.policy.net.embed_word.weight[1:] = 0.0  # deaf
        agent.texts[:] = (agent.texts > 0).long()  # sentences of one length
        agent.texts[0] = agent.texts[1]
    found = agent.validate(rows(16))
    torch.testing.assert_close(found["plan_mse"], found["plan_mse_other_words"])


# --------------------------------------------------------------------------------------- Acting


def test_plans_and_first_actions():
    policy, many = learner().policy, seen()
    plan = policy.plan(many, deterministic=True)
    assert plan.shape == (5, 2, A) and (plan >= -2).all() and (plan <= 3).all()
    first = policy.act(many, deterministic=True)
    assert isinstance(first, np.ndarray) and np.array_equal(first, plan[:, 0])
    assert torch.is_tensor(units.learner(pi0).policy.plan(torch.randn(3, S)))
    one = policy.act(many[3], deterministic=True)
    assert one.shape == (A,)
    np.testing.assert_allclose(one, first[3], atol=1e-5)
    assert not np.array_equal(policy.act(many), policy.act(many))  # the noise is drawn


@pytest.mark.parametrize("head", ["mse", "tokens"])
def test_without_a_flow_nothing_is_drawn(head):
    policy, many = learner(head=head).policy, seen()
    assert np.array_equal(policy.act(many), policy.act(many))


def test_what_is_seen_and_asked_changes_the_plan():
    policy, [one] = learner().policy, seen(1)
    before = policy.act(one, deterministic=True)
    for key, other in dict(
        image=255 - one["image"], instruction=ASKED[1], state=-one["state"]
    ).items():
        assert not np.allclose(policy.act(one | {key: other}, deterministic=True), before)


def test_without_words_or_pictures():
    data = units.data()
    agent = pi0.Pi0(dict(data), units.task(data), pi0.Args(**tiny("pi0", **FLAGS)))
    assert not any("word" in name or "eyes" in name for name, _ in agent.policy.named_parameters())
    agent.update()
    assert agent.policy.act(torch.zeros(3, S)).shape == (3, A)


@pytest.mark.parametrize(
    "flags, says",
    [(dict(execute=5), "--chunk has 4"), (dict(delay=3), "--delay 3: at most --execute"),
     (dict(execute=3, delay=2), "--delay 2: at most --execute"), (dict(delay=-1), "--delay -1"),
     (dict(head="mse", rtc=True), "--rtc bends a flow"),
     (dict(action_dim=11), "--action-dim must be even"), (dict(chunk=0), "--chunk must be"),
     (dict(max_words=0), "--max-words must be"),
     (dict(warmup_steps=20, decay_steps=20), "--decay-steps"),
     (dict(max_grad_norm=0), "--max-grad-norm")],
)  # fmt: skip
def test_refusals(flags, says):
    with pytest.raises(SystemExit, match=says):
        learner(**flags)


# --------------------------------------------------------------------------- Real-time chunking


def test_the_velocity_bends_as_the_paper_says(monkeypatch):
    """With v = x / 2 the chunk that x leads to is (1 - t / 2) x, in each of its places alone: the
    change is that factor times the weighted difference, the guidance (t² + (1 - t)²) / t (1 - t),
    at most 5."""
    policy = learner(chunk=8, execute=2, delay=2, rtc=True).policy
    monkeypatch.setattr(pi0.Network, "forward", lambda self, known, s, x, t: x / 2)
    rest, x = torch.randn(3, 6, A), torch.randn(3, 8, A)
    # Two actions are under way; of the six that the old chunk has, four are left to be changed.
    c = np.array([1, 1, 4 / 5, 3 / 5, 2 / 5, 1 / 5, 0, 0])
    weight = torch.tensor(c * (np.exp(c) - 1) / (np.e - 1), dtype=torch.float32)[:, None]
    wanted = torch.cat([rest, torch.randn(3, 2, A)], dim=1)  # what is not there has no weight
    for t, guidance in ((1.0, 5), (0.95, 5), (0.5, 2), (0.3, 0.58 / 0.21), (0.05, 5)):
        a = (1 - t / 2) * x
        expected = x / 2 - guidance * (1 - t / 2) * weight * (wanted - a)
        with torch.no_grad():
            found = policy.continuing(rest)(None, None, x, torch.full((3, 1, 1), t))
        torch.testing.assert_close(found, expected)
        assert not found.requires_grad


def test_a_chunk_goes_on_from_the_old_one():
    """Nothing has been learnt, so what changes is the bending's: nearer to the old chunk, the more
    so the sooner an action is, and not at all where the old chunk has none."""
    agent = learner(chunk=8, execute=2, delay=1, rtc=True, flow_steps=10)
    policy, (images, words, s, a, _) = agent.policy, parts(agent)
    known, noise = policy.net.read(images, words), torch.randn_like(a)
    rest = torch.empty(6, 6, A).uniform_(-1, 1)
    bent, plain = policy.decode(known, s, noise, rest), policy.decode(known, s, noise)
    far, near = ((x[:, :6] - rest).square().mean((0, 2)) for x in (plain, bent))
    assert (near / far)[0] < 0.01 and ((near / far).diff() > 0).all() and (near / far)[5] < 1
    change = (bent - plain).abs().mean((0, 2))
    assert change[6:].max() < 0.1 * change[0]  # by attention alone
    policy.args.rtc = False
    assert torch.equal(policy.decode(known, s, noise, rest), plain)


@pytest.mark.parametrize("rtc", [False, True])
def test_a_late_chunk_begins_with_the_old_ones_actions(rtc):
    policy, many = learner(chunk=6, execute=3, delay=2, rtc=rtc).policy, seen()
    torch.manual_seed(1)
    first, [rest] = policy.go_on(many)
    torch.manual_seed(1)
    assert np.array_equal(policy.plan(many), first) and rest.shape == (5, 3, A)
    images, words, s = policy.look(many)
    torch.manual_seed(2)
    with torch.no_grad():
        chunk = policy.decode(policy.net.read(images, words), s, torch.randn(5, 6, A), rest)
    torch.manual_seed(2)
    a, [beyond] = policy.go_on(many, [rest])
    expected = torch.cat([rest[:, :2], chunk[:, 2:3]], dim=1)
    expected = policy.scaling.action(expected, expected).numpy()
    assert np.array_equal(a, expected) and torch.equal(beyond, chunk[:, 3:])
    # With a chunk in hand nothing depends on what the other rows are.
    torch.manual_seed(3)
    whole, _ = policy.go_on(many, [rest], deterministic=True)
    some, _ = policy.go_on(many[3:], [rest[3:]], deterministic=True)
    np.testing.assert_allclose(whole[3:], some, atol=1e-4)


def test_without_delay_the_old_chunk_is_forgotten():
    policy, many = learner(chunk=6, execute=3).policy, seen()
    _, memory = policy.go_on(many)
    for seed in (1, 2):
        torch.manual_seed(seed)
        a, _ = policy.go_on(many, memory)
        torch.manual_seed(seed)
        assert np.array_equal(a, policy.plan(many))


# ---------------------------------------------------------------------------- The robot's data


def arrays(n=24, every=6):
    """Columns of a robot's data set in episodes of six rows, the last one a terminal."""
    rng = np.random.default_rng(0)
    found = {"observations": rng.normal(size=(n, S)), "actions": rng.uniform(-1, 1, (n, A))}
    found |= {"terminals": np.arange(n) % every == every - 1, "timeouts": np.zeros(n)}
    found |= {"rewards": found["terminals"].astype(float)}
    images = rng.integers(256, size=(n, SIDE, SIDE, 3), dtype=np.uint8)
    return found | {"images": images, "task_index": np.arange(n) // every % 2}


def write(path, found, **attributes):
    with h5py.File(path, "w") as file:
        for key, x in found.items():
            file[key] = x
        file.attrs.update(attributes)
    return str(path)


def test_pictures_and_instructions_come_in(tmp_path):
    found = arrays()
    data, task = pi0.load_dataset(write(tmp_path / "a.hdf5", found, instructions=ASKED))
    assert data["images"].dtype == np.uint8 and np.array_equal(data["images"], found["images"])
    assert np.array_equal(data["task_index"], found["task_index"])
    assert task["image"] == [SIDE, SIDE, 3] and task["instructions"] == ASKED
    np.savez(tmp_path / "a.npz", **found, instructions=np.array(ASKED))
    assert pi0.load_dataset(str(tmp_path / "a.npz"))[1]["instructions"] == ASKED


@pytest.mark.parametrize(
    "change, says",
    [({"images": np.zeros((24, 8, 8, 3))}, "'images' is not"),
     ({"images": np.zeros((23, 8, 8, 3), np.uint8)}, "'images' is not"),
     ({"task_index": np.full(24, 2)}, "'task_index' is not"),
     ({"task_index": np.zeros(23, int)}, "'task_index' is not")],
)  # fmt: skip
def test_what_is_no_robot_data_is_refused(tmp_path, change, says):
    path = write(tmp_path / "a.hdf5", arrays() | change, instructions=ASKED)
    with pytest.raises(SystemExit, match=says):
        pi0.load_dataset(path)


def test_a_run_on_pictures_and_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.hdf5", arrays(), instructions=ASKED)
    flags = tiny("pi0", **FLAGS, dataset="a.hdf5", run_dir="run", validation_fraction=0.3)
    history = pi0.train(pi0.Args(**flags))
    assert {"validation/flow", "validation/plan_mse_other_words"} <= history[-1].keys()
    policy = pi0.load_policy("run", execute=4)
    assert policy.plan(seen()).shape == (5, 4, A)


def lerobot(folder, found, as_video):
    """A data set as LeRobot writes it, version 3: tables, and pictures in them or as a video."""
    av, pa = pytest.importorskip("av"), pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    n, key = len(found["rewards"]), "observation.images.front"
    (folder / "meta").mkdir(parents=True)
    kind = "video" if as_video else "image"
    features = {"observation.state": {"dtype": "float32"}, "action": {"dtype": "float32"}}
    features |= {key: {"dtype": kind, "shape": [96, 96, 3]}}
    (folder / "meta/info.json").write_text(json.dumps({"features": features, "fps": 10}))
    table = {"observation.state": list(found["observations"]), "action": list(found["actions"])}
    table |= {"index": np.arange(n), "episode_index": np.arange(n) // 6}
    table |= {"task_index": found["task_index"]}
    pictures = [np.kron(x, np.ones((3, 3, 1), np.uint8)) for x in found["images"]]  # 96 x 96

    def encode(file, codec, frames, form):
        with av.open(file, "w", format=form) as film:
            stream = film.add_stream(codec, rate=10)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "rgb24" if codec == "png" else "yuv420p"
            for x in frames:
                film.mux(stream.encode(av.VideoFrame.from_ndarray(x, format="rgb24")))
            film.mux(stream.encode())

    if as_video:
        path = folder / f"videos/{key}/chunk-000/file-000.mp4"
        path.parent.mkdir(parents=True)
        encode(str(path), "mpeg4", pictures, "mp4")
    else:
        table[key] = []
        for x in pictures:
            file = io.BytesIO()
            encode(file, "png", [x], "image2pipe")
            table[key].append({"bytes": file.getvalue(), "path": None})
    for i, rows_of in enumerate((slice(12, None), slice(12))):  # in two files, in no order
        part = {k: x[rows_of] for k, x in table.items()}
        path = folder / f"data/chunk-000/file-00{i}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({k: pa.array(list(x)) for k, x in part.items()}), path)
    tasks = {"task_index": [1, 0], "__index_level_0__": ASKED[::-1]}
    pq.write_table(pa.table(tasks), folder / "meta/tasks.parquet")
    return str(folder)


@pytest.mark.parametrize("as_video", [False, True])
def test_a_lerobot_folder_trains(tmp_path, monkeypatch, as_video):
    monkeypatch.chdir(tmp_path)
    found = arrays()
    smooth = np.linspace(0, 255, 24).astype(np.uint8)[:, None, None, None]
    found["images"] = np.broadcast_to(smooth, found["images"].shape)
    name = lerobot(tmp_path / "folder", found, as_video)
    data, task = pi0.load_dataset(name)
    inner = np.arange(24) % 6 < 5  # an episode's last row has no successor here
    assert task["instructions"] == ASKED and task["image"] == [64, 64, 3]
    assert np.array_equal(data["task_index"], found["task_index"][inner])
    assert np.abs(data["images"][:, 32, 32].astype(int) - smooth[inner, 0, 0]).max() <= 8 * as_video
    np.testing.assert_allclose(data["observations"], found["observations"][inner], rtol=1e-5)
    low, high = (np.array(x) for x in task["bounds"])
    back = low + (data["actions"] + 1) / 2 * (high - low)
    np.testing.assert_allclose(back, found["actions"][inner], atol=1e-5)
    flags = tiny("pi0", **FLAGS, dataset=name, run_dir="run", env_id="none")
    assert pi0.train(pi0.Args(**flags))[-1]["step"] == 20


# ------------------------------------------------------------------------------------- The robot


@pytest.fixture(scope="module")
def scene():
    return robot_scene()


def test_four_of_six_can_be_asked_and_are_yet_to_be_done(scene):
    env, asked = scene.SceneLanguage(), []
    for seed in range(40):
        observation, _ = env.reset(seed=seed)
        asked.append(env.instruction)
        assert observation["instruction"] == env.instruction
        assert env.observation_space.contains(observation)
        assert not env.holds()[list(scene.INSTRUCTIONS).index(env.instruction)]
        assert env.holds()[:4].sum() == 2 and not env.holds()[4:].any()
    assert set(asked) == set(scene.INSTRUCTIONS)
    unseen = scene.SceneLanguage(unseen=True)
    words = {unseen.reset(seed=seed)[0]["instruction"] for seed in range(40)}
    assert len(words) > 8 and not words & set(scene.INSTRUCTIONS)


def test_the_experts_do_what_is_asked_and_the_data_says_so(scene):
    data, how = scene.demonstrations(6, seed=1)
    ends = np.flatnonzero(data["terminals"])
    assert len(ends) == 6 and (data["rewards"][ends] == 1).all() and data["rewards"].sum() == 6
    assert "were dropped" in how
    # Replayed in its scene, an episode ends with success, and shows the pictures of the data.
    env, rng = gym.make("scene:SceneLanguage-v0"), np.random.default_rng(1)
    observation, _ = env.reset(seed=int(rng.integers(2**31)))
    for i, action in enumerate(data["actions"][: ends[0] + 1]):
        assert np.array_equal(observation["image"], data["images"][i])
        observation, reward, done, _, info = env.step(action)
    assert done and reward == 1 and info["success"] and not info["other"]


def test_another_thing_done_ends_the_episode_without_reward(scene):
    env = scene.SceneLanguage()
    _, info = env.reset(seed=0, options={"instruction": "press the left button"})
    env.aim("button", 1)  # the expert is told to press the other one
    oracle = scene.button_markov.ButtonMarkovOracle(env=env.scene, gripper_always_closed=True)
    info, done = env.info | env.scene.get_reset_info(), False
    oracle.reset(None, info)
    while not done:
        _, reward, done, _, info = env.step(oracle.select_action(None, info))
        assert reward == 0
    assert info["other"] and not info["success"]


def test_left_is_left_in_the_picture(scene):
    """A pressed button turns red where the word says."""
    env, halves = scene.SceneLanguage(), {}
    for side, number in (("left", 0), ("right", 1)):
        env.reset(seed=0)
        before = env.picture().astype(int)
        env.scene._cur_button_states[number] = 0
        env.scene._apply_button_states()
        changed = np.abs(env.picture().astype(int) - before).sum((0, 2))
        halves[side] = (changed * np.arange(64)).sum() / changed.sum()
    assert halves["left"] < halves["right"]


def test_a_trained_policy_is_evaluated_in_the_scene(scene, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = tiny("pi0", **FLAGS, dataset="scene-language", run_dir="run", eval_every=20)
    [row] = pi0.train(pi0.Args(**flags))
    assert 0 <= row["score"] <= 100 and 1 <= row["length_mean"] <= 80
