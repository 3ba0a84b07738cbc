"""What the transformer world model claims: its memory, its likelihood, its doubt, its rules; that
imagined branches carry their past; and that its policy is SAC's."""

import functools
import inspect
import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import units
from conftest import ROOT, load, write_hdf5
from torch import distributions
from units import A, S, constant_critic, copies, data, equal

mbrl, learner = load("transformer_mbrl"), functools.partial(units.learner, "transformer_mbrl")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(rows, steps, **flags):
    sizes = dict(model_batch_size=32, model_dim=32, model_learning_rate=3e-3)
    agent = learner(rows, **sizes | flags)
    for _ in range(steps):
        agent.update_model()
    return agent


def stretch(agent, n=9, real=None):
    """Random pairs: s (B, K, V), a (B, K, A) and real (B, K), all of them if not given."""
    k = agent.args.context
    real = torch.ones(n, k, dtype=torch.bool) if real is None else real
    return torch.randn(n, k, agent.visible), 2 * torch.rand(n, k, A) - 1, real


def among(rows, data) -> bool:
    return all((row == data).all(1).any() for row in rows)


# -------------------------------------------------------------------------- Ends of episodes


def body(env, rng, z, angle):
    """A random state of Hopper or Walker2d, body height and angle on both sides of their bounds."""
    base = env.unwrapped
    qpos, qvel = base.init_qpos.copy(), rng.uniform(-1, 1, base.model.nv)
    qpos[1], qpos[2] = rng.uniform(*z), rng.uniform(*angle)
    base.set_state(qpos, qvel)


def ant(env, rng):
    base = env.unwrapped
    qpos, qvel = base.init_qpos.copy(), rng.uniform(-1, 1, base.model.nv)
    qpos[2] = rng.uniform(0.1, 0.3) if rng.random() < 0.5 else rng.uniform(0.9, 1.1)
    base.set_state(qpos, qvel)


STATES = {
    "Hopper-v5": lambda env, rng: body(env, rng, (0.65, 0.75), (-0.25, 0.25)),
    "Walker2d-v5": lambda env, rng: body(
        env, rng, (0.7, 0.9) if rng.random() < 0.5 else (1.9, 2.1), (-1.2, 1.2)
    ),
    "Ant-v5": ant,
    "HalfCheetah-v5": lambda env, rng: env.unwrapped.set_state(
        rng.normal(0, 2, env.unwrapped.model.nq), rng.normal(0, 5, env.unwrapped.model.nv)
    ),
    "Pendulum-v1": lambda env, rng: setattr(
        env.unwrapped, "state", rng.uniform([-math.pi, -8], [math.pi, 8])
    ),
}


@pytest.mark.parametrize("env_id", STATES)
def test_the_rule_ends_what_the_environment_ends(env_id):
    env, rng = gym.make(env_id), np.random.default_rng(0)
    found, seen = [], []
    for _ in range(500):
        env.reset(seed=0)
        STATES[env_id](env, rng)
        low, high = env.action_space.low, env.action_space.high
        s_next, _, terminated, _, _ = env.step(rng.uniform(low, high).astype(np.float32))
        found.append(terminated)
        seen.append(np.float32(s_next))
    rule = mbrl.GOES_ON[env_id.split("-v")[0].lower()]
    assert torch.equal(~rule(torch.tensor(np.array(seen))), torch.tensor(found))
    if env_id in ("Hopper-v5", "Walker2d-v5", "Ant-v5"):
        assert 50 < sum(found) < 450
    else:
        assert not any(found)
    assert not rule(torch.full((1, 27), math.nan)).any()


def test_the_rule_explains_the_data():
    rows, _ = mbrl.load_dataset(str(ROOT / "datasets" / "hopper-medium-replay.hdf5"))
    ended = ~mbrl.GOES_ON["hopper"](torch.as_tensor(rows["next_observations"]))
    assert torch.equal(ended, torch.as_tensor(rows["terminals"][:, 0] > 0))


@pytest.mark.parametrize(
    "asked, env_id, name",
    [
        ("", "Pendulum-v1", "pendulum"),
        ("", "mine:HalfCheetah-v4", "halfcheetah"),
        ("walker2d", "Hopper-v5", "walker2d"),
        ("hopper", "none", "hopper"),
        ("none", "none", "none"),
    ],
)
def test_the_rule_is_the_environments(asked, env_id, name):
    rows = data(terminals=torch.zeros(64, 1))
    args = mbrl.Args(**units.tiny("transformer_mbrl", termination=asked))
    agent = mbrl.Learner(rows, units.task(rows) | {"env_id": env_id}, args)
    assert agent.goes_on is mbrl.GOES_ON[name]


@pytest.mark.parametrize("asked, env_id", [("", "Reacher-v5"), ("", "none"), ("flying", "none")])
def test_an_unknown_rule_is_refused_with_a_way_out(asked, env_id):
    args = mbrl.Args(**units.tiny("transformer_mbrl", termination=asked))
    with pytest.raises(SystemExit, match=r"No rule of .*--termination takes hopper") as end:
        mbrl.Learner(data(), units.task(data()) | {"env_id": env_id}, args)
    assert "\n" not in str(end.value) and "none" in str(end.value)


@pytest.mark.parametrize("wrong, holds", [(2, True), (3, False)])
def test_a_rule_that_contradicts_the_data_is_refused(wrong, holds):
    """The environment of units.task is Pendulum-v1, whose episodes do not end."""
    rows = data(2000, terminals=(torch.arange(2000) < wrong).float()[:, None])
    if holds:
        learner(rows, termination="")
    else:
        with pytest.raises(SystemExit, match=r"'pendulum' contradicts 3 of .*--termination"):
            learner(rows, termination="")
        learner(rows, termination="pendulum")  # who says so has it


@pytest.mark.parametrize(
    "flags",
    [
        dict(real_fraction=1.5),
        dict(bootstrap=-0.1),
        dict(context=0),
        dict(rollout_length=0),
        dict(hide_velocities=S),
        dict(hide_velocities=-1),
        dict(penalty_weight=-1.0),
    ],
)
def test_flags_out_of_range_are_refused(flags):
    name, value = next(iter(flags.items()))
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} {value}: .*between"):
        learner(**flags)
    with pytest.raises(SystemExit, match="--attention-heads must divide"):
        learner(attention_heads=3)


# -------------------------------------------------------------------------------- World model


@pytest.mark.parametrize("dim, layers, context", [(16, 2, 4), (64, 2, 8), (64, 1, 8), (128, 4, 16)])
@pytest.mark.parametrize("sizes", [(3, 1), (27, 8)])
def test_both_kinds_have_as_many_parameters(dim, layers, context, sizes):
    count, x = {}, [torch.randn(5, n) for n in (sizes[0], sizes[1], 1, sizes[0])]
    for kind in ("transformer", "mlp"):
        flags = dict(model_dim=dim, layers=layers, context=context, dynamics=kind)
        model = mbrl.WorldModel(*x, mbrl.Args(**flags))
        count[kind] = sum(p.numel() for p in model.parameters())
    assert count["mlp"] == pytest.approx(count["transformer"], rel=0.05)


@pytest.mark.parametrize("dynamics", ["transformer", "mlp"])
def test_predictions_see_the_past_and_no_future(dynamics):
    agent = learner(dynamics=dynamics, context=5)
    s, a, real = stretch(agent)
    mu, sigma = agent.model(s, a, real)
    assert mu.shape == sigma.shape == (2, 9, 5, S + 1)
    for t in range(5):
        for x in (s, a):
            other = [part.clone() for part in (s, a)]
            other[x is a][:, t] += 1
            found, _ = agent.model(*other, real)
            moved = (found - mu).abs().amax((0, 1, 3)) > 1e-5
            wanted = [i == t or (i > t and dynamics == "transformer") for i in range(5)]
            assert moved.tolist() == wanted
    last = agent.model(s, a, real, slice(-1, None))[0]
    torch.testing.assert_close(last, mu[:, :, -1:])


def test_where_nothing_stands_nobody_looks():
    agent = learner(context=5)
    real = torch.arange(5) >= torch.tensor([0, 1, 4])[:, None]  # (3, 5)
    s, a, _ = stretch(agent, 3)
    mu, _ = agent.model(s, a, real)
    assert mu.isfinite().all()
    noise = [torch.where(real[..., None], x, torch.randn_like(x)) for x in (s, a)]
    found, _ = agent.model(*noise, real)
    for row in range(3):
        torch.testing.assert_close(found[:, row, real[row]], mu[:, row, real[row]])
    assert not torch.allclose(found[:, 2, :4], mu[:, 2, :4])


def test_the_order_of_the_past_matters():
    agent = learner(context=3)
    s, a, real = stretch(agent)
    swapped = [x[:, [1, 0, 2]] for x in (s, a)]
    one, other = (agent.model(*x, real)[0][:, :, -1] for x in ((s, a), swapped))
    assert (one - other).abs().max() > 1e-3


@pytest.mark.parametrize("dynamics", ["transformer", "mlp"])
def test_evaluation_predicts_as_training_does(dynamics):
    """PyTorch's layers take another path without gradients."""
    agent = learner(dynamics=dynamics)
    real = torch.rand(9, 4) < 0.7
    s, a, _ = stretch(agent)
    with torch.no_grad():
        one = agent.model(s, a, real)
        agent.eval()
        for x, y in zip(one, agent.model(s, a, real)):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_heads_are_networks_of_their_own():
    agent = learner(ensemble=3)
    model, (s, a, real) = agent.model, stretch(agent)
    seen = []
    model.norm.register_forward_hook(lambda *x: seen.append(x[2]))
    mu, sigma = model(s, a, real)
    for i in range(3):
        y = F.silu(seen[0] @ model.weights[0][i] + model.biases[0][i])
        y = y @ model.weights[1][i] + model.biases[1][i]
        torch.testing.assert_close(mu[i], y[..., : S + 1])
        assert (sigma[i].log() - y[..., S + 1 :].tanh() * 3 + 2).abs().max() < 1e-5
    model.weights[-1].data.mul_(1e6)
    log_sigma = model(s, a, real)[1].log()
    assert log_sigma.min() >= -5.001 and log_sigma.max() <= 1.001


def test_likelihood_is_the_normal_distributions():
    x, mu, sigma = torch.randn(9, 4, S), torch.randn(2, 9, 4, S), torch.rand(2, 9, 4, S) + 0.1
    wanted = -distributions.Normal(mu, sigma).log_prob(x).mean(-1)
    torch.testing.assert_close(learner().nll(x, mu, sigma), wanted)


def test_follow_undoes_standardise():
    rows = data(rewards=5 + 3 * torch.randn(64, 1))
    agent = learner(rows)
    s, _, _, s_next, _ = agent.data
    x = agent.model.standardise(s, rows["rewards"], s_next)
    torch.testing.assert_close(x.mean(0), torch.zeros(S + 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(S + 1), atol=0.01, rtol=0)
    for found, wanted in zip(agent.model.follow(s, x), (s_next, rows["rewards"])):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    far, _ = agent.model.follow(s, 1e6 * torch.ones_like(x))
    torch.testing.assert_close(far, (s_next.maximum(s).amax(0) + 1).expand_as(s))
    far, _ = agent.model.follow(s, -1e6 * torch.ones_like(x))
    torch.testing.assert_close(far, (s_next.minimum(s).amin(0) - 1).expand_as(s))


@pytest.mark.parametrize("place", [0, 2, 3])
def test_windows_are_stretches_of_one_episode(place):
    rows = data(16, rewards=torch.arange(16.0)[:, None])  # episodes of four rows
    agent = learner(rows, context=4)
    i = torch.arange(16)
    (s, a, real), (r, _, recorded, episodes) = agent.windows(agent.columns, i, place)
    for row in range(16):
        for k in range(4):
            of = row - place + k
            inside = 0 <= of < 16 and of // 4 == row // 4
            assert real[row, k] == inside
            if inside:
                assert r[row, k] == of and episodes[row, k] == of // 4
                assert torch.equal(s[row, k], agent.data[0][of])
                assert torch.equal(a[row, k], agent.data[1][of])
    assert recorded.all() and real.any(1).all()


def test_a_step_of_the_model_is_the_likelihood_of_what_counts(monkeypatch):
    """Real rows with a successor, for each head in its own episodes; every row as often."""
    lost = torch.arange(64) % 8 == 7
    rows = data(recorded=~lost)
    agent = learner(rows, ensemble=3, bootstrap=0.5, model_batch_size=16)
    assert 0.2 < agent.chosen.float().mean() < 0.8 and agent.chosen.shape == (3, 16)
    step, found = agent.model_optimizer.step, []
    monkeypatch.setattr(
        agent.model_optimizer,
        "step",
        lambda: found.extend(p.grad.clone() for p in agent.model.parameters()) or step(),
    )
    state, old = torch.get_rng_state(), [p.detach().clone() for p in agent.model.parameters()]
    metrics = agent.update_model()
    assert not any(torch.equal(x, y) for x, y in zip(old, agent.model.parameters()))
    nets = [*agent.policy.parameters(), *agent.critic.parameters()]
    assert all(p.grad is None for p in nets)

    for parameter, value in zip(agent.model.parameters(), old):
        parameter.data.copy_(value)
    torch.set_rng_state(state)
    i, place = torch.randint(64, (16,)), torch.randint(4, (16, 1))
    (s, a, real), (r, s_next, recorded, _) = agent.windows(agent.columns, i, place)
    mu, sigma = agent.model(s, a, real)
    x = agent.model.standardise(s, r, s_next)
    nll = -distributions.Normal(mu, sigma).log_prob(x).mean(-1)
    terms = [
        nll[head, b, k]
        for head in range(3)
        for b in range(16)
        for k in range(4)
        if real[b, k] and recorded[b, k] and agent.chosen[head, i[b] // 4]
    ]
    loss = torch.stack(terms).mean()
    torch.testing.assert_close(metrics["losses/nll"], loss)
    for one, other in zip(found, torch.autograd.grad(loss, list(agent.model.parameters()))):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_the_ends_of_an_episode_are_drawn_too(monkeypatch):
    """A row at an end is in half of the windows that one in the middle is in, not in one of K."""
    agent, drawn = learner(data(40), model_batch_size=4000, context=10), []
    agent.columns = (*agent.columns[:-1], torch.arange(40) // 40)
    windows = agent.windows

    def seen(columns, i, place):
        drawn.append(windows(columns, i, place)[0][2] * (i[:, None] - place + torch.arange(10) + 1))
        return windows(columns, i, place)

    monkeypatch.setattr(agent, "windows", seen)
    agent.update_model()
    count = torch.bincount(drawn[0].flatten(), minlength=41)[1:].float()
    middle = count[15:25].mean()
    assert (count[[0, -1]] / middle - 0.55).abs().max() < 0.1, count


def test_every_episode_is_for_every_head_without_a_bootstrap():
    assert learner(bootstrap=1.0).chosen.all()
    assert not learner(bootstrap=0.0).chosen.any()
    assert "chosen" in learner().state_dict()


def linear_system(n=1000, spread=2.0):
    """s' = Ms + Ka, r = s_0 + a_0, in episodes of 20; actions of a narrow policy when `spread` is
    small."""
    s, rows = torch.randn(n // 20, S), []
    m = torch.tensor([[0.9, 0.2, 0], [-0.2, 0.9, 0], [0, 0.3, 0.8]])
    for _ in range(20):
        a = (0.5 * s[:, :A].tanh() + spread * (torch.rand(len(s), A) - 0.5)).clamp(-1, 1)
        s_next = s @ m.T + a @ torch.tensor([[0.5, 0, 0.2], [0, 0.5, -0.2]])
        rows.append((s, a, s_next, s[:, :1] + a[:, :1]))
        s = s_next
    keys = "observations", "actions", "next_observations", "rewards"
    columns = {key: torch.stack(x, dim=1).flatten(0, 1) for key, x in zip(keys, zip(*rows))}
    return data(n, **columns, terminals=torch.zeros(n, 1), episodes=torch.arange(n) // 20)


@pytest.mark.parametrize("dynamics", ["transformer", "mlp"])
def test_a_linear_system_is_learnt(dynamics):
    agent = trained(linear_system(), 400, dynamics=dynamics)
    with torch.no_grad():
        found = agent.validate(linear_system())
    assert found["rmse_1"] < 0.08 and found["nll"] < -1, found


def swings(n=2000):
    """A place and its velocity, which turn into each other; in episodes of 20."""
    x, v, rows = torch.randn(n // 20, 1), torch.randn(n // 20, 1), []
    for _ in range(20):
        a = 2 * torch.rand(len(x), A) - 1
        s_next = torch.cat([0.8 * x + 0.6 * v, 0.8 * v - 0.6 * x + 0.1 * a[:, :1]], dim=1)
        rows.append((torch.cat([x, v], dim=1), a, s_next, x))
        x, v = s_next.split(1, dim=1)
    keys = "observations", "actions", "next_observations", "rewards"
    columns = {key: torch.stack(y, dim=1).flatten(0, 1) for key, y in zip(keys, zip(*rows))}
    return data(n, **columns, terminals=torch.zeros(n, 1), episodes=torch.arange(n) // 20)


def test_memory_finds_a_hidden_velocity():
    errors = {}
    for dynamics in ("transformer", "mlp"):
        agent = trained(swings(), 700, dynamics=dynamics, hide_velocities=1)
        assert agent.visible == 1 and agent.model.x_mean.shape == (2,)
        columns = agent.columns_of(swings())
        errors[dynamics] = agent.open_loop(columns, 1)[1].item()
    assert errors["transformer"] < 0.75 * errors["mlp"], errors


def test_hidden_is_hidden_from_everybody():
    rows = data()
    one, other = (
        learner(rows | {key: rows[key] + x * torch.tensor([0, 0, 1.0]) for key in keys}, **flags)
        for x in (0, torch.randn(64, 1))
        for keys in [("observations", "next_observations")]
        for flags in [dict(hide_velocities=1)]
        if torch.manual_seed(0)
    )
    assert (
        equal(one.data, other.data) and not one.data[0][:, 2].any() and one.data[0].any(0)[:2].all()
    )
    assert equal(one.columns[:4], other.columns[:4]) and one.columns[0].shape == (64, 2)
    s = torch.randn(9, S)
    changed = s + torch.tensor([0, 0, 5.0])
    assert torch.equal(one.policy.act(s), one.policy.act(changed))
    assert not torch.equal(one.policy.act(s), one.policy.act(s + 1))
    again = mbrl.Policy(one.given_task, one.args)
    again.load_state_dict(one.policy.state_dict())
    assert torch.equal(again.act(s), again.act(changed))
    one.roll_out()
    s, _, _, s_next, _ = one.imagined[: one.count].split(one.widths, dim=-1)
    assert not s[:, 2].any() and not s_next[:, 2].any() and one.imagined.isfinite().all()
    assert s_next[:, :2].std() > 0


def unrecorded(rows):
    """The same rows in a file without next_observations: at a terminal some state stands there."""
    lost = rows["terminals"][:, 0] > 0
    next_observations = rows["next_observations"].masked_fill(lost[:, None], 50.0)
    return rows | dict(next_observations=next_observations, recorded=~lost)


def test_dynamics_are_learnt_from_recorded_successors_alone():
    rows = unrecorded(data())
    assert 0 < (~rows["recorded"]).sum() < 64
    agent = learner(rows, termination="")  # and the rule is asked about nothing else
    assert (agent.model.s_high < 10).all() and agent.model.x_std.max() < 10
    for _ in range(30):
        assert agent.update_model()["losses/nll"] < 200  # one of those states makes it thousands
    with torch.no_grad():
        found = agent.validate(unrecorded(data()))
        errors = agent.open_loop(agent.columns_of(unrecorded(data())), 3)
    assert found["nll"] < 200 and errors[3] < 10


def test_a_file_without_next_observations_trains(hopper, tmp_path):
    rows = {key: column for key, column in hopper.items() if key != "next_observations"}
    file = write_hdf5(tmp_path / "plain.hdf5", rows, env_id="Hopper-v5")
    flags = units.tiny("transformer_mbrl", termination="", steps=12, model_steps=6, eval_every=12)
    args = mbrl.Args(**flags, dataset=str(file), run_dir=str(tmp_path / "run"))
    [row] = mbrl.train(args)
    assert all(math.isfinite(value) for value in row.values())
    assert row["validation/rmse_5"] > 0


def test_errors_of_open_loop_prediction():
    """Against stepping by hand: own predictions, the data's actions, the memory of both."""
    rows = data(24, episodes=torch.arange(24) // 12)
    agent = learner(rows, context=3)
    held_out = data(24, episodes=torch.arange(24) // 12)
    columns = agent.columns_of(held_out)
    found = agent.open_loop(columns, 4)
    assert [*found] == [1, 2, 3, 4]
    s, a, s_next = columns[0], columns[1], columns[3]
    errors = []
    for start in [i for i in range(24) if i % 12 <= 8]:
        first = start - start % 12
        pairs = [(s[i], a[i]) for i in range(max(first, start - 2), start + 1)]
        line = []
        for k in range(4):
            pairs = pairs[-3:]
            pad = 3 - len(pairs)
            states = torch.stack([torch.zeros(S)] * pad + [x for x, _ in pairs])[None]
            actions = torch.stack([torch.zeros(A)] * pad + [x for _, x in pairs])[None]
            real = (torch.arange(3) >= pad)[None]
            mu, _ = agent.model(states, actions, real)
            state, _ = agent.model.follow(pairs[-1][0], mu[:, 0, -1].mean(0))
            line.append((state - s_next[start + k]).square())
            pairs.append((state, a[min(start + k + 1, 23)]))
        errors.append(torch.stack(line))
    wanted = torch.stack(errors).mean((0, 2)).sqrt()
    torch.testing.assert_close(torch.stack([*found.values()]), wanted, rtol=1e-4, atol=1e-5)
    assert agent.open_loop(columns, 13) == {}  # no episode is so long


def auroc(u, u_far) -> float:
    """Chance that a far sample has the larger u."""
    return (u_far[:, None] > u[None]).float().mean().item()


def test_doubt_grows_away_from_the_data():
    """A narrow policy's data: its own actions against uniform ones after the same past."""
    agent = trained(linear_system(2000, 0.2), 300, ensemble=5)
    columns = agent.columns_of(linear_system(1000, 0.2))
    (s, a, real), _ = agent.windows(columns, torch.arange(1000), agent.args.context - 1)
    far = a.clone()
    far[:, -1].uniform_(-1, 1)
    away = (far - a)[:, -1].abs().amax(1) > 0.6
    u, u_far = (agent.imagine(s, x, real)[2][:, 0] for x in (a, far))
    assert auroc(u, u_far[away]) > 0.85, auroc(u, u_far[away])


def test_doubt_is_the_farthest_mean():
    agent = learner(ensemble=3)
    s, a, real = stretch(agent)
    mu, _ = agent.model(s, a, real)
    u = agent.imagine(s, a, real)[2]
    assert u.shape == (9, 1)
    for row in range(9):
        centre = mu[:, row, -1].mean(0)
        wanted = max((mu[i, row, -1] - centre).norm().item() for i in range(3))
        assert u[row].item() == pytest.approx(wanted, rel=1e-4)


# --------------------------------------------------------------------------------- Imagination


def rollout(rows=None, **flags):
    flags = dict(rollout_batch=8, rollout_length=3, rollout_keep=2, real_fraction=0.0) | flags
    agent = learner(rows, **flags)
    agent.metrics = agent.roll_out()
    rows = agent.imagined[: agent.count].reshape(
        flags["rollout_length"], flags["rollout_batch"], -1
    )
    return agent, *rows.split(agent.widths, dim=-1)  # (H, B, .) each


def test_branches_begin_at_data_and_go_on():
    agent, s, a, r, s_next, d = rollout()
    assert agent.count == 24 and not agent.imagined[24:].any() and agent.imagined[:24].all(0).any()
    assert among(s[0], agent.data[0]) and not among(s[1], agent.data[0])
    assert torch.equal(s[1:], s_next[:-1]) and not d.any()
    assert a.abs().max() <= 1 and r.std() > 0


def test_branches_carry_their_past(monkeypatch):
    """The data's pairs before the branch, then the imagined ones; the policy's action last."""
    agent, seen = learner(rollout_batch=8, rollout_length=3, context=4), []
    imagine = agent.imagine
    monkeypatch.setattr(
        agent, "imagine", lambda *x: seen.append([y.clone() for y in x]) or imagine(*x)
    )
    agent.roll_out()
    parts = agent.imagined[:24].reshape(3, 8, -1).split(agent.widths, dim=-1)
    s, a, _, s_next, _ = parts
    _, *memories = seen  # the first is for ū
    assert len(memories) == 3
    for b in range(8):
        i = (agent.data[0] == s[0, b]).all(1).nonzero().item()
        past = [j for j in range(i - 3, i) if j >= 0 and j // 4 == i // 4]
        for h, (states, actions, real) in enumerate(memories):
            first = max(3 - len(past) - h, 0)
            assert real[b].tolist() == [k >= first for k in range(4)]
            wanted = [agent.data[0][j] for j in past] + [s[k, b] for k in range(h + 1)]
            assert torch.equal(states[b, first:], torch.stack(wanted[-(4 - first) :]))
            wanted = [agent.data[1][j] for j in past] + [a[k, b] for k in range(h + 1)]
            assert torch.equal(actions[b, first:], torch.stack(wanted[-(4 - first) :]))
    assert torch.equal(s[1:], s_next[:-1])


def test_every_imagined_step_is_a_random_heads():
    agent = learner(ensemble=3)
    agent.model.weights[-1].data.zero_()
    last = agent.model.biases[-1].data
    last[..., : S + 1], last[..., S + 1 :] = torch.arange(3.0)[:, None, None], -9  # hardly any σ
    memory = stretch(agent, 64)
    s_next, r, _ = agent.imagine(*memory)
    head = (r - agent.model.x_mean[-1]) / agent.model.x_std[-1]
    torch.testing.assert_close(head, head.round(), atol=0.05, rtol=0)
    assert head.round().unique().tolist() == [0, 1, 2]  # and of one for all its numbers
    wanted, _ = agent.model.follow(memory[0][:, -1], head.round().expand(-1, S + 1))
    torch.testing.assert_close(s_next, wanted, atol=0.1, rtol=0)


def test_imagined_steps_are_samples():
    agent = learner(ensemble=1)
    memory = stretch(agent, 200)
    one, other = (agent.imagine(*memory)[1] for _ in range(2))
    _, sigma = agent.model(*memory)
    spread = (one - other).std() / 2**0.5
    wanted = agent.model.x_std[-1] * sigma[0, :, -1, -1].square().mean().sqrt()
    assert spread.item() == pytest.approx(wanted.item(), rel=0.3)


@pytest.mark.parametrize("hide_velocities", [0, 1])
def test_an_ended_branch_begins_anew_with_its_past(hide_velocities, monkeypatch):
    monkeypatch.setitem(mbrl.GOES_ON, "none", lambda s: s[:, 0] < 0.3)
    rows = data(observations=0.3 + torch.randn(64, S), next_observations=0.3 + torch.randn(64, S))
    flags = dict(rollout_batch=64, hide_velocities=hide_velocities)
    agent, s, _, _, s_next, d = rollout(rows, **flags)
    scaling = agent.policy.scaling
    raw = scaling.mean[0] + scaling.std[0] * s_next[..., 0]
    assert torch.equal(d[..., 0] > 0, raw >= 0.3) and 0 < d.mean() < 1
    ended = d[:-1, :, 0] > 0
    assert among(s[1:][ended], agent.data[0])
    assert torch.equal(s[1:][~ended], s_next[:-1][~ended])

    seen, imagine = [], agent.imagine
    monkeypatch.setattr(
        agent, "imagine", lambda *x: seen.append([y.clone() for y in x]) or imagine(*x)
    )
    agent.count.zero_()
    agent.roll_out()
    d = agent.imagined[: 3 * 64, -1].reshape(3, 64)
    states, _, real = seen[2]  # ū, the first step, the second
    for b in range(64):
        now = states[b, real[b]]
        if d[0, b]:  # the rows of its episode up to the one where it begins
            j = (agent.columns[0] == now[-1]).all(1).nonzero().item()
            assert torch.equal(now, agent.columns[0][j - len(now) + 1 : j + 1])
            assert len(now) == min(j % 4 + 1, agent.args.context)
        elif len(now) > 1:
            assert among(now[:-1], agent.columns[0]) and not among(now[-1:], agent.columns[0])


def test_the_ring_forgets_the_oldest():
    agent, *_ = rollout()
    first = agent.imagined[:24].clone()
    agent.roll_out()
    assert torch.equal(agent.imagined[:24], first) and agent.imagined[24:].any(1).all()
    second = agent.imagined[24:].clone()
    agent.roll_out()
    assert agent.count == 72 and not torch.equal(agent.imagined[:24], first)
    assert torch.equal(agent.imagined[24:], second)


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_penalty_is_the_excess_in_deviations_of_the_reward(weight, monkeypatch):
    agent, *_ = rollout(penalty_weight=weight)
    values = iter([3.0] + [0.3, 9.0, 900.0])  # ū, and u in three steps
    imagine, rewards = agent.imagine, []

    def doubtful(*memory):
        s_next, r, u = imagine(*memory)
        rewards.append(r)
        return s_next, r, torch.full_like(u, next(values))

    monkeypatch.setattr(agent, "imagine", doubtful)
    metrics = agent.roll_out()
    found = agent.imagined[24:, S + A].reshape(3, 8)
    penalty = weight * agent.model.x_std[-1] * torch.tensor([0.0, 2.0, 10.0])[:, None]
    torch.testing.assert_close(found, torch.stack(rewards[1:])[..., 0] - penalty)
    torch.testing.assert_close(metrics["imagined/penalty"], penalty.mean())
    assert metrics["imagined/u_data"] == 3


@pytest.mark.parametrize("fraction, real", [(0.0, 0), (0.25, 4), (0.99, 16), (1.0, 16)])
def test_batches_mix_real_and_imagined(fraction, real):
    agent = learner(real_fraction=fraction, rollout_batch=8)
    agent.imagined[:12] = 7
    agent.count += 12
    rows = torch.cat(agent.sample(), dim=-1)
    assert rows.shape == (16, 2 * S + A + 2)
    assert (rows == 7).all(1).sum() == 16 - real  # never a row of the ring that is still empty
    assert among(rows[:real], torch.cat(agent.data, dim=-1))


def test_first_the_model_then_rollouts_and_the_policy():
    agent = learner(model_steps=10, rollout_every=4)
    wanted = [agent.update_model] * 10
    wanted += [agent.update_policy_after_rollout] + [agent.update_policy] * 3
    wanted += [agent.update_policy_after_rollout, agent.update_policy]
    assert [agent.phase(step) for step in range(1, 17)] == wanted
    policy, model = copies(agent.policy), copies(agent.model)
    agent.update_model()
    assert equal(copies(agent.policy), policy) and not equal(copies(agent.model), model)
    model = copies(agent.model)
    metrics = agent.update_policy_after_rollout()
    assert {"imagined/penalty", "losses/critic", "losses/actor"} < metrics.keys()
    agent.update_policy()
    assert agent.count == 8 * 5 and not equal(copies(agent.policy), policy)
    assert equal(copies(agent.model), model)
    agent = learner(real_fraction=1.0, model_steps=0, rollout_every=1)
    assert agent.phase(1) == agent.update_policy  # SAC on the data


def test_the_ring_is_in_the_checkpoint():
    rows = data()
    agent = learner(rows, rollout_batch=8)
    agent.roll_out()
    state = agent.state_dict()
    assert state["count"] == 40 and state["imagined"][:40].any(1).all()
    other = learner(rows, rollout_batch=8)
    other.load_state_dict(state)
    torch.manual_seed(1)
    one = agent.sample()
    torch.manual_seed(1)
    assert equal(one, other.sample())


def test_long_rollouts_stay_finite_and_near_the_data():
    agent = learner(rollout_length=200, rollout_keep=1)
    agent.model.weights[-1].data.mul_(100)  # a model gone wild
    agent.roll_out()
    assert agent.imagined.isfinite().all() and agent.imagined.any(1).all()
    known = torch.cat([agent.data[0], agent.data[3]])
    s = agent.imagined[:, :S]
    assert (s >= known.amin(0) - 1).all() and (s <= known.amax(0) + 1).all()


# ------------------------------------------------------------------------------- SAC, its policy


def test_act_answers_in_the_environments_bounds():
    """A policy whose mean is the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(low=low.tolist(), high=high.tolist()).policy
    policy.net[-1].weight.data.zero_()
    for x in ([0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]):
        policy.net[-1].bias.data = torch.cat([torch.tensor(x).atanh(), torch.ones(A)])
        wanted = low + (torch.tensor(x) + 1) / 2 * (high - low)
        for observations in (torch.randn(5, S), torch.randn(S), torch.randn(5, S).double()):
            a = policy.act(observations)
            torch.testing.assert_close(a, wanted.expand(*observations.shape[:-1], A))
            np.testing.assert_allclose(policy.act(observations.numpy()), a, rtol=1e-6)
    a = policy.act(torch.zeros(2000, S), deterministic=False)
    assert (a.std(0) > 0.01).all() and (a >= low).all() and (a <= high).all()
    assert equal(policy.actors()[""](torch.zeros(9, S)), policy.act(torch.zeros(9, S)))


def test_states_are_normalised_by_the_policy():
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    agent = learner(rows)
    s = agent.data[0]
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    mean = agent.policy.net(s).chunk(2, dim=-1)[0].tanh()
    torch.testing.assert_close(agent.policy.act(rows["observations"]), mean)
    assert equal(agent.columns[:4], agent.data[:4])


@pytest.mark.parametrize("log_alpha", [-math.inf, 0.7])
def test_the_target_is_sacs(log_alpha):
    """y = r + γ (1 - d) (min Q' - α log π), read from the losses of critics that say 0."""
    agent = learner(gamma=0.9)
    constant_critic(agent.critic, 0, 0)
    constant_critic(agent.critic_target, 5, 3)
    agent.log_alpha.data.fill_(log_alpha)
    s, a, r, s_next, d = agent.data
    assert 0 < d.mean() < 1
    state = torch.get_rng_state()
    loss, q = agent.critic_loss(s, a, r, s_next, d)
    torch.set_rng_state(state)
    _, log_prob = agent.policy(s_next)
    y = r + 0.9 * (1 - d) * (3 - math.exp(log_alpha) * log_prob)
    torch.testing.assert_close(loss, 2 * y.square().mean())
    assert q.shape == (2, len(r), 1) and agent.target_entropy == -A


def test_a_step_of_the_policy(monkeypatch):
    """Critics, actor, temperature and targets, on one batch."""
    agent, seen = learner(tau=0.25), []
    agent.roll_out()
    old = copies(agent.critic)
    before = [*copies(agent.policy), agent.log_alpha.detach().clone()]
    agent.update_policy()
    after = [*copies(agent.policy), agent.log_alpha.detach()]
    assert not any(torch.equal(one, other) for one, other in zip(before, after))
    for target, was, new in zip(copies(agent.critic_target), old, copies(agent.critic)):
        torch.testing.assert_close(target, was + 0.25 * (new - was))

    rows = [torch.full((16, width), float(k)) for k, width in enumerate((S, A, 1, S, 1))]
    monkeypatch.setattr(agent, "sample", lambda: rows)
    for name in ("update_critic", "update_actor"):
        monkeypatch.setattr(agent, name, lambda *x, name=name: seen.append((name, *x)) or {})
    metrics = agent.update_policy()
    assert [name for name, *_ in seen] == ["update_critic", "update_actor"]
    assert [x[0, 0].item() for x in seen[0][1:]] == [0, 1, 2, 3, 4]
    assert [x[0, 0].item() for x in seen[1][1:]] == [0]
    assert metrics == {"values/reward": 2, "values/ended": 4}


def test_sac_is_the_same_text_as_in_its_own_file():
    """What both files share is one text; shared_blocks.py copies it."""
    for part in ("Policy", "TwinCritic"):
        one, other = (inspect.getsource(getattr(m, part)) for m in (mbrl, load("sac")))
        assert one == other
    for part in ("critic_loss", "update_critic", "update_actor", "update_targets"):
        methods = (getattr(mbrl.TransformerMBRL, part), getattr(load("sac").SAC, part))
        assert len({inspect.getsource(method) for method in methods}) == 1


def test_validation():
    agent = learner(ensemble=3)
    held_out = data(40, episodes=torch.arange(40) // 20)
    constant_critic(agent.critic, 7, 9)
    before = copies(agent)
    with torch.no_grad():
        found = agent.validate(held_out)
    assert found.keys() == {"nll", "u", "u_far", "rmse_1", "rmse_5", "q"}
    assert found["q"] == 8 and equal(copies(agent), before)
    columns = agent.columns_of(held_out)
    (s, a, real), (r, s_next, *_) = agent.windows(columns, torch.arange(40), 3)
    mu, sigma = agent.model(s, a, real)
    x = agent.model.standardise(s, r, s_next)
    nll = -distributions.Normal(mu, sigma).log_prob(x)[:, :, -1].mean()
    torch.testing.assert_close(found["nll"], nll)
    u = agent.imagine(s, a, real)[2]
    torch.testing.assert_close(found["u"], u.mean())
    assert found["u_far"] != found["u"]
    errors = agent.open_loop(columns, 5)
    assert found["rmse_1"] == errors[1] and found["rmse_5"] == errors[5]
