"""What the adversarial world model claims: its rules, its likelihood, its adversary, its doubt; and
that its policy is SAC's."""

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
from units import (
    A,
    S,
    constant_critic,
    copies,
    data,
    equal,
    gradient_of,
    gradients,
    split_critic,
)

gan, learner = load("gan_world_model"), functools.partial(units.learner, "gan_world_model")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def trained(rows, steps, **flags):
    sizes = dict(batch_size=64, model_dim=32, discriminator_dim=32, model_learning_rate=3e-3)
    agent = learner(rows, **sizes | flags)
    for _ in range(steps):
        metrics = agent.update_model()
    return agent, metrics


def some_rows(agent) -> list[torch.Tensor]:
    """All its transitions, and no penalty."""
    return [*agent.data, torch.zeros_like(agent.data[2])]


# -------------------------------------------------------------------------- Ends of episodes


def hopper_or_walker(env, rng, z, angle):
    """A random state, body height and angle on both sides of their bounds."""
    base = env.unwrapped
    qpos, qvel = base.init_qpos.copy(), rng.uniform(-1, 1, base.model.nv)
    qpos[1], qpos[2] = rng.uniform(*z), rng.uniform(*angle)
    base.set_state(qpos, qvel)


STATES = {
    "Hopper-v5": lambda env, rng: hopper_or_walker(env, rng, (0.65, 0.75), (-0.25, 0.25)),
    "Walker2d-v5": lambda env, rng: hopper_or_walker(
        env, rng, (0.7, 0.9) if rng.random() < 0.5 else (1.9, 2.1), (-1.2, 1.2)
    ),
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
    for _ in range(1000):
        env.reset(seed=0)
        STATES[env_id](env, rng)
        low, high = env.action_space.low, env.action_space.high
        s_next, _, terminated, _, _ = env.step(rng.uniform(low, high).astype(np.float32))
        found.append(terminated)
        seen.append(np.float32(s_next))
    rule = gan.GOES_ON[env_id.split("-v")[0].lower()]
    assert torch.equal(~rule(torch.tensor(np.array(seen))), torch.tensor(found))
    if env_id in ("Hopper-v5", "Walker2d-v5"):
        assert 100 < sum(found) < 900
        assert not rule(torch.full((1, 17), math.nan)).any()
    else:
        assert not any(found)


def test_the_rule_explains_the_data():
    rows, _ = gan.load_dataset(str(ROOT / "datasets" / "hopper-medium-replay.hdf5"))
    ended = ~gan.GOES_ON["hopper"](torch.as_tensor(rows["next_observations"]))
    assert torch.equal(ended, torch.as_tensor(rows["terminals"][:, 0] > 0))
    assert ended.sum() > 1000


@pytest.mark.parametrize(
    "asked, env_id, name",
    [
        ("", "Hopper-v5", "hopper"),
        ("", "Walker2d-v4", "walker2d"),
        ("", "mujoco/HalfCheetah-v5", "halfcheetah"),
        ("", "mine:Pendulum-v1", "pendulum"),
        ("walker2d", "Hopper-v5", "walker2d"),
        ("hopper", "none", "hopper"),
        ("none", "none", "none"),
    ],
)
def test_the_rule_is_the_environments(asked, env_id, name):
    nothing = torch.zeros(0, S), torch.zeros(0, 1)
    assert gan.termination_rule(asked, env_id, *nothing) is gan.GOES_ON[name]


@pytest.mark.parametrize("env_id", ["InvertedPendulum-v5", "HopperStand-v0", "none"])
def test_an_unknown_environment_is_refused_with_a_way_out(env_id):
    rows = torch.zeros(1, S), torch.zeros(1, 1)
    with pytest.raises(SystemExit, match=r"No rule of .*--termination takes hopper") as end:
        gan.termination_rule("", env_id, *rows)
    assert "\n" not in str(end.value) and "none" in str(end.value)
    gan.termination_rule("none", env_id, *rows)
    with pytest.raises(SystemExit, match=r"'flying'.*--termination takes hopper"):
        gan.termination_rule("flying", env_id, *rows)


def test_a_rule_that_contradicts_the_data_is_refused():
    """The environment of units.task is Pendulum-v1, whose episodes do not end."""
    rows = data(terminals=torch.ones(64, 1))
    with pytest.raises(SystemExit, match=r"'pendulum'.*64 of the data's 64 rows.*--termination"):
        learner(rows, termination="")
    learner(rows, termination="pendulum")  # who says so has it
    learner(data(terminals=torch.zeros(64, 1)), termination="")


@pytest.mark.parametrize("wrong, holds", [(2, True), (3, False)])
def test_one_row_in_a_thousand_may_contradict(wrong, holds):
    d = (torch.arange(2000) < wrong).float()[:, None]
    if holds:
        gan.termination_rule("", "Pendulum-v1", torch.zeros(2000, S), d)
    else:
        with pytest.raises(SystemExit, match="contradicts 3 of"):
            gan.termination_rule("", "Pendulum-v1", torch.zeros(2000, S), d)


@pytest.mark.parametrize(
    "flags",
    [
        dict(real_fraction=1.5),
        dict(real_fraction=-0.1),
        dict(ensemble=0),
        dict(rollout_length=0),
        dict(penalty_weight=-1.0),
    ],
)
def test_flags_out_of_range_are_refused(flags):
    name, value = next(iter(flags.items()))
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} {value}: .*between"):
        learner(**flags)


# -------------------------------------------------------------------------------- World model


def test_members_are_networks_of_their_own():
    model = learner(ensemble=3, model_layers=2).model
    s, a = torch.randn(3, 9, S), torch.randn(3, 9, A)
    mu, sigma = model(s, a)
    assert mu.shape == sigma.shape == (3, 9, S + 1)
    for i in range(3):
        x = torch.cat([s[i], a[i]], dim=-1)
        for weight, bias in zip(model.weights[:-1], model.biases[:-1]):
            x = F.silu(x @ weight[i] + bias[i])
        x = x @ model.weights[-1][i] + model.biases[-1][i]
        torch.testing.assert_close(mu[i], x[:, : S + 1])
        assert (sigma[i].log() - x[:, S + 1 :].tanh() * 3 + 2).abs().max() < 1e-5
    torch.testing.assert_close(model(s[0], a[0])[0][1], model(s[[0] * 3], a[[0] * 3])[0][1])
    model.weights[-1].data.mul_(1e6)
    log_sigma = model(s, a)[1].log()
    assert log_sigma.min() >= -5.001 and log_sigma.max() <= 1.001


def test_likelihood_is_the_normal_distributions():
    agent = learner()
    x, mu, sigma = torch.randn(2, 9, S + 1), torch.randn(2, 9, S + 1), torch.rand(2, 9, S + 1) + 0.1
    wanted = -distributions.Normal(mu, sigma).log_prob(x).mean((1, 2)).sum()
    torch.testing.assert_close(agent.nll(x, mu, sigma), wanted)


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


def unrecorded(rows, rule=None):
    """The same rows in a file without next_observations: at a terminal some state stands there."""
    lost = rows["terminals"][:, 0] > 0
    next_observations = rows["next_observations"].masked_fill(lost[:, None], 50.0)
    return rows | dict(next_observations=next_observations, recorded=~lost)


def test_dynamics_are_learnt_from_recorded_successors_alone(monkeypatch):
    rows = unrecorded(data())
    lost = ~rows["recorded"]
    assert 0 < lost.sum() < 64
    agent = learner(rows, termination="")  # and the rule is asked about nothing else
    model = agent.model
    assert (model.s_high < 10).all() and model.x_std.max() < 10
    kept = torch.cat([agent.data[0], agent.data[3][~lost]])  # s_high is of recorded rows, too
    assert (model.s_high <= kept.amax(0) + 1).all()
    wanted = model.standardise(*(agent.data[k] for k in (0, 2, 3)))[~lost]
    torch.testing.assert_close(wanted.mean(0), torch.zeros(S + 1), atol=1e-5, rtol=0)
    seen = []
    real = gan.WorldModel.standardise
    monkeypatch.setattr(
        gan.WorldModel, "standardise", lambda *x: seen.append(x) or real(*x), raising=True
    )
    drawn = set()
    for _ in range(30):
        agent.update_model()
        *_, r, s_next = seen.pop()
        assert s_next.abs().max() < 20
        drawn |= set(r.flatten().tolist())
    assert drawn == set(rows["rewards"][~lost].flatten().tolist())
    with torch.no_grad():
        found = agent.validate(unrecorded(data()))
    assert found["mse"] < 20


def test_terminals_without_a_successor_still_end_the_targets(monkeypatch):
    """They are real transitions of the policy's batches, where nothing looks behind them."""
    rows = unrecorded(data())
    agent = learner(rows, real_fraction=1.0)
    seen, s_next = set(), None
    for _ in range(40):
        _, _, r, s_next, d, _ = agent.sample()
        seen |= set(r.flatten().tolist())
        assert torch.equal(d[:, 0] > 0, (s_next > 20).all(1))
    assert seen == set(rows["rewards"].flatten().tolist())


def test_a_file_without_next_observations_trains(hopper, tmp_path):
    rows = {key: column for key, column in hopper.items() if key != "next_observations"}
    file = write_hdf5(tmp_path / "plain.hdf5", rows, env_id="Hopper-v5")
    flags = units.tiny("gan_world_model", termination="", steps=12, model_steps=6, eval_every=12)
    args = gan.Args(**flags, dataset=str(file), run_dir=str(tmp_path / "run"))
    [row] = gan.train(args)
    assert all(math.isfinite(value) for value in row.values())


def linear_system(n=1000, spread=2.0):
    """s' = Ms + Ka, r = s_0 + a_0; actions of a narrow policy when `spread` is small."""
    s = torch.randn(n, S)
    a = (0.5 * s[:, :A].tanh() + spread * (torch.rand(n, A) - 0.5)).clamp(-1, 1)
    m = torch.tensor([[0.9, 0.2, 0], [-0.2, 0.9, 0], [0, 0.3, 0.8]])
    s_next = s @ m.T + a @ torch.tensor([[0.5, 0, 0.2], [0, 0.5, -0.2]])
    rows = dict(observations=s, actions=a, next_observations=s_next, rewards=s[:, :1] + a[:, :1])
    return data(n, **rows, terminals=torch.zeros(n, 1))


def test_a_linear_system_is_learnt():
    agent, _ = trained(linear_system(), 1000)
    with torch.no_grad():
        found = agent.validate(linear_system())
    assert found["mse"] < 1e-2 and found["nll"] < -1, found


# ----------------------------------------------------------------------------------- Adversary


@pytest.mark.parametrize("weight", [0.0, 10.0])
def test_the_discriminators_loss(weight):
    """Labels, and the squared slope at transitions: their value, their gradient, D's alone."""
    agent = learner(gradient_penalty=weight)
    agent.discriminator[-1].weight.data *= 30
    real, fake, far = torch.randn(3, 32, 2 * S + A + 1)
    x = real.clone().requires_grad_()
    judged = [torch.sigmoid(agent.discriminator(part)) for part in (x, fake, far)]
    (slope,) = torch.autograd.grad(agent.discriminator(x).sum(), x, create_graph=True)
    loss = -judged[0].log() - 0.5 * (1 - judged[1]).log() - 0.5 * (1 - judged[2]).log()
    loss = loss.mean() + weight / 2 * slope.square().sum(1).mean()
    parameters = list(agent.discriminator.parameters())
    wanted = torch.autograd.grad(loss, parameters)
    found = agent.update_discriminator(real, fake, far)["losses/discriminator"]
    torch.testing.assert_close(found, loss)
    for parameter, gradient in zip(parameters, wanted):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in agent.model.parameters())


def test_discriminator_is_at_a_loss_before_perfect_samples_and_sure_before_poor_ones():
    agent, other = learner(), learner()
    for _ in range(300):
        metrics = agent.update_discriminator(*torch.randn(3, 64, 2 * S + A + 1))
        far = other.update_discriminator(*torch.randn(3, 64, 2 * S + A + 1) * 0.3 + _apart())
    assert metrics["losses/discriminator"].item() == pytest.approx(math.log(4), abs=0.1)
    assert far["discriminator/real"] > 0.95 and far["discriminator/fake"] > 0.95
    assert far["discriminator/far"] > 0.95


def _apart():
    return torch.tensor([0.0, 2.0, -2.0])[:, None, None]


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_models_step_is_likelihood_plus_adversary(weight, monkeypatch):
    """Against the two terms computed apart, on the rows and the noise that the update drew."""
    agent = learner(adversarial_weight=weight, ensemble=2, batch_size=16)
    shown, found = [], []
    monkeypatch.setattr(agent, "update_discriminator", lambda *x: shown.extend(x) or {})
    step = lambda: found.extend(p.grad.clone() for p in agent.model.parameters())  # noqa: E731
    monkeypatch.setattr(agent.model_optimizer, "step", step)
    state = torch.get_rng_state()
    agent.update_model()
    assert all(p.grad is None and p.requires_grad for p in agent.discriminator.parameters())

    torch.set_rng_state(state)
    i = torch.randint(64, (2, 16))  # members draw rows of their own
    assert not torch.equal(i[0], i[1])
    s, a, r, s_next = (column[i] for column in agent.data[:4])
    x = agent.model.standardise(s, r, s_next)
    mu, sigma = agent.model(s, a)
    x_hat = (mu + sigma * torch.randn_like(mu))[:, :8]  # of each member so many that they make 16
    fake = torch.cat([s[:, :8], a[:, :8], x_hat], dim=-1)  # (2, 8, S + A + S + 1)
    torch.testing.assert_close(shown[0], torch.cat([s, a, x], dim=-1)[:, :8].flatten(0, 1))
    torch.testing.assert_close(shown[1], fake.flatten(0, 1))
    assert not shown[1].requires_grad  # D's step is not the model's
    s_far, _ = agent.model.follow(s[:, :8], x_hat)
    a_far = 2 * torch.rand(2, 8, A) - 1  # uniform, whatever the data's
    mu_far, sigma_far = agent.model(s_far, a_far)
    x_far = mu_far + sigma_far * torch.randn_like(mu_far)
    far = torch.cat([s_far, a_far, x_far], dim=-1).flatten(0, 1)
    torch.testing.assert_close(shown[2], far)

    d = torch.sigmoid(agent.discriminator(fake))
    likelihood = distributions.Normal(mu, sigma).log_prob(x).mean((1, 2)).sum()
    loss = -likelihood - weight * d.log().mean((1, 2)).sum()
    wanted = torch.autograd.grad(loss, list(agent.model.parameters()))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def auroc(u, u_far) -> float:
    """Chance that a far sample has the larger u."""
    return (u_far[:, None] > u[None]).float().mean().item()


@pytest.mark.parametrize("penalty", ["discriminator", "disagreement"])
def test_doubt_grows_away_from_the_data(penalty):
    """A narrow policy's data: its own actions against uniform ones at the same states."""
    sizes = dict(discriminator_learning_rate=2e-3, ensemble=3)
    agent, _ = trained(linear_system(2000, 0.2), 400, penalty=penalty, **sizes)
    held_out = linear_system(1000, 0.2)
    s, a = agent.policy.scaling.state(held_out["observations"]), held_out["actions"]
    a_far = 2 * torch.rand_like(a) - 1
    away = (a_far - a).abs().amax(1) > 0.4
    u, u_far = (agent.imagine(s, action)[2][:, 0] for action in (a, a_far))
    print(penalty, auroc(u, u_far[away]))
    assert auroc(u, u_far[away]) > 0.9


def test_kinds_of_doubt():
    s, a, x = torch.randn(9, S), torch.randn(9, A), torch.randn(9, S + 1)
    mu, sigma = torch.randn(3, 9, S + 1), torch.rand(3, 9, S + 1)
    u = {}
    for kind in ("discriminator", "aleatoric", "disagreement", "moan", "none"):
        torch.manual_seed(0)
        agent = learner(penalty=kind, ensemble=3)
        agent.discriminator[-1].weight.data *= 300  # D of all sizes
        logit = agent.discriminator(torch.cat([s, a, x], dim=-1)).detach()
        agent.discriminator[-1].bias.data -= logit.median()
        u[kind] = agent.uncertainty(s, a, x, mu, sigma)
        assert u[kind].shape == (9, 1)
        d = torch.sigmoid(agent.discriminator(torch.cat([s, a, x], dim=-1)))
        if kind == "discriminator":
            assert d.min() < 0.3 and d.max() > 0.7
            torch.testing.assert_close(u[kind], -d.log())
        if kind == "moan":  # the larger, the less D believes: +0.05 where D is 0, -0.05 where 1
            torch.testing.assert_close(u[kind], u["aleatoric"] + 0.1 * (0.5 - d))
    centre = mu.mean(0)
    for row in range(9):
        norms = (
            [sigma[i, row].norm() for i in range(3)],
            [(mu[i, row] - centre[row]).norm() for i in range(3)],
        )
        assert u["aleatoric"][row].item() == pytest.approx(max(norms[0]).item())
        assert u["disagreement"][row].item() == pytest.approx(max(norms[1]).item())
    assert not u["none"].any()


# --------------------------------------------------------------------------------- Imagination


def rollout(**flags):
    flags = dict(rollout_batch=8, rollout_length=3, rollout_keep=2, real_fraction=0.0) | flags
    agent = learner(**flags)
    agent.roll_out()
    rows = agent.imagined[: agent.count].reshape(
        flags["rollout_length"], flags["rollout_batch"], -1
    )
    return agent, *rows.split(agent.widths, dim=-1)  # (H, B, .) each


def among(rows, data) -> bool:
    return all((row == data).all(1).any() for row in rows)


def test_branches_begin_at_data_and_go_on():
    agent, s, a, r, s_next, d, _ = rollout()
    assert agent.count == 24 and not agent.imagined[24:].any() and agent.imagined[:24].all(0).any()
    assert among(s[0], agent.data[0]) and not among(s[1], agent.data[0])
    assert torch.equal(s[1:], s_next[:-1]) and not d.any()
    assert a.abs().max() <= 1 and r.std() > 0


def test_every_imagined_step_is_a_random_members():
    agent = learner(ensemble=3)
    agent.model.weights[-1].data.zero_()
    last = agent.model.biases[-1].data
    last[..., : S + 1], last[..., S + 1 :] = torch.arange(3.0)[:, None, None], -9  # hardly any σ
    s, a, *_ = agent.data
    s_next, r, _ = agent.imagine(s, a)
    member = (r - agent.model.x_mean[-1]) / agent.model.x_std[-1]
    torch.testing.assert_close(member, member.round(), atol=0.05, rtol=0)
    assert member.round().unique().tolist() == [0, 1, 2]  # and of one for all its numbers
    wanted, _ = agent.model.follow(s, member.round().expand(-1, S + 1))
    torch.testing.assert_close(s_next, wanted, atol=0.1, rtol=0)


def test_imagined_steps_are_samples():
    agent = learner(ensemble=1)
    s, a, *_ = agent.data
    one, other = (torch.cat(agent.imagine(s, a)[:2], dim=-1) for _ in range(2))
    _, sigma = agent.model(s, a)
    spread = (one - other)[:, -1].std() / 2**0.5  # of the reward, which has no bounds
    wanted = agent.model.x_std[-1] * sigma[0, :, -1].square().mean().sqrt()
    assert spread.item() == pytest.approx(wanted.item(), rel=0.3)
    assert ((one - other).abs() > 0).float().mean() > 0.9


def test_an_ended_branch_begins_anew_at_data(monkeypatch):
    rule = lambda s: s[:, 0] < 0  # noqa: E731
    monkeypatch.setitem(gan.GOES_ON, "none", rule)
    agent, s, _, _, s_next, d, _ = rollout(rollout_batch=64)
    raw = agent.policy.scaling.mean + agent.policy.scaling.std * s_next
    assert torch.equal(d[..., 0] > 0, raw[..., 0] >= 0) and 0 < d.mean() < 1
    ended = d[:-1, :, 0] > 0
    assert among(s[1:][ended], agent.data[0])
    assert torch.equal(s[1:][~ended], s_next[:-1][~ended])


def test_the_ring_forgets_the_oldest():
    agent, *_ = rollout()
    first = agent.imagined[:24].clone()
    agent.roll_out()
    assert torch.equal(agent.imagined[:24], first) and agent.imagined[24:].any(1).all()
    second = agent.imagined[24:].clone()
    agent.roll_out()
    assert agent.count == 72 and not torch.equal(agent.imagined[:24], first)
    assert torch.equal(agent.imagined[24:], second)


@pytest.mark.parametrize("kind", ["discriminator", "aleatoric", "disagreement", "moan", "none"])
def test_penalty_is_the_excess_in_deviations_of_the_reward(kind, monkeypatch):
    agent, *_, penalty = rollout(penalty=kind, penalty_weight=2.0)
    scale = 2 * agent.model.x_std[-1]
    assert penalty.min() >= 0 and penalty.max() <= 10 * scale
    assert penalty.any() == (kind != "none")
    values = iter([3.0] + [0.3, 9.0, 900.0])  # ū, and u in three steps
    imagine = agent.imagine
    monkeypatch.setattr(
        agent, "imagine", lambda s, a: (*imagine(s, a)[:2], torch.full_like(s[:, :1], next(values)))
    )
    agent.roll_out()
    found = agent.imagined[24:, -1].reshape(3, 8)
    wanted = scale * torch.tensor([0.0, 2.0, 10.0])[:, None].expand(3, 8)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("fraction, real", [(0.0, 0), (0.25, 4), (0.99, 16), (1.0, 16)])
def test_batches_mix_real_and_imagined(fraction, real):
    agent = learner(real_fraction=fraction, rollout_batch=8)
    assert len(agent.imagined) == (0 if real == 16 else 8 * 5 * 5)
    if real < 16:
        agent.imagined[:12] = 7
        agent.count += 12
    rows = torch.cat(agent.sample(), dim=-1)
    assert rows.shape == (16, 2 * S + A + 3)
    assert (rows == 7).all(1).sum() == 16 - real  # never a row of the ring that is still empty
    assert among(rows[:real, :-1], torch.cat(agent.data, dim=-1)) and not rows[:real, -1].any()


def test_the_critic_pays_the_penalty():
    agent = learner(real_fraction=0.0, gamma=0.0, learning_rate=1e-2, rollout_batch=8)
    agent.imagined.zero_()
    agent.count.fill_(len(agent.imagined))
    agent.imagined[:, S + A], agent.imagined[:, -1] = 1, 3
    for _ in range(200):
        metrics = agent.update_policy()
    assert metrics["values/q"].item() == pytest.approx(-2, abs=0.1)
    assert metrics["imagined/reward"] == 1 and metrics["imagined/penalty"] == 3


def test_first_the_model_then_rollouts_and_the_policy():
    agent = learner(model_steps=10, rollout_every=4)
    wanted = [agent.update_model] * 10
    wanted += [agent.update_policy_after_rollout] + [agent.update_policy] * 3
    wanted += [agent.update_policy_after_rollout, agent.update_policy]
    assert [agent.phase(step) for step in range(1, 17)] == wanted
    policy, model = copies(agent.policy), copies(agent.model)
    agent.update_model()
    assert equal(copies(agent.policy), policy) and not equal(copies(agent.model), model)
    model, judge = copies(agent.model), copies(agent.discriminator)
    agent.update_policy_after_rollout()
    agent.update_policy()
    assert agent.count == 8 * 5 and not equal(copies(agent.policy), policy)
    assert equal(copies(agent.model), model) and equal(copies(agent.discriminator), judge)


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


@pytest.mark.parametrize("fraction", [0.99, 1.0])
def test_without_imagination_it_is_sac_on_the_data(fraction):
    agent = learner(real_fraction=fraction, model_steps=0, rollout_every=1)
    assert agent.phase(1) == agent.update_policy
    metrics = agent.update_policy()
    assert agent.count == 0 and len(agent.imagined) == 0
    assert not any(key.startswith("imagined/") for key in metrics)
    assert all(value.isfinite().all() for value in metrics.values())


def test_long_rollouts_stay_finite_and_near_the_data():
    agent = learner(rollout_length=200, rollout_keep=1)
    agent.model.weights[-1].data.mul_(100)  # a model gone wild
    agent.roll_out()
    assert agent.imagined.isfinite().all() and agent.imagined.any(1).all()
    known = torch.cat([agent.data[0], agent.data[3]])
    s = agent.imagined[:, :S]
    assert (s >= known.amin(0) - 1).all() and (s <= known.amax(0) + 1).all()


def test_penalty_none_without_adversary_is_a_plain_ensemble():
    """MOPO's model: the discriminator learns beside it and changes nothing of it."""
    found = []
    for factor in (1, 50):
        torch.manual_seed(0)
        agent = learner(adversarial_weight=0.0, penalty="aleatoric")
        for parameter in agent.discriminator.parameters():
            parameter.data.mul_(factor)
        agent.update_model()
        found.append(copies(agent.model))
    assert equal(*found)


# ------------------------------------------------------------------------------- SAC, its policy


def head(policy, mu, log_sigma):
    """The policy whose Gaussian is this one everywhere, before the tanh."""
    last = policy.net[-1]
    last.weight.data.zero_()
    raw = math.atanh((log_sigma + 5) / 3.5 - 1)
    last.bias.data = torch.cat([torch.as_tensor(mu), torch.full((A,), raw)]).float()


def test_log_density_is_that_of_a_tanh_of_a_normal():
    policy = learner().policy.double()
    s = torch.randn(500, S, dtype=torch.float64)
    a, log_prob = policy(s)
    mu, raw = policy.net(s).chunk(2, dim=-1)
    sigma = (-5 + 3.5 * (raw.tanh() + 1)).exp()
    tanh = distributions.transforms.TanhTransform()
    wanted = distributions.TransformedDistribution(distributions.Normal(mu, sigma), tanh)
    assert a.shape == (500, A) and log_prob.shape == (500, 1) and a.std() > 0.1
    torch.testing.assert_close(log_prob, wanted.log_prob(a).sum(-1, keepdim=True))


def test_act_answers_in_the_environments_bounds():
    """A policy whose mean is the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(low=low.tolist(), high=high.tolist()).policy
    for x in ([0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]):
        head(policy, torch.tensor(x).atanh(), 1.5)
        wanted = low + (torch.tensor(x) + 1) / 2 * (high - low)
        for observations in (torch.randn(5, S), torch.randn(S), torch.randn(5, S).double()):
            a = policy.act(observations)
            torch.testing.assert_close(a, wanted.expand(*observations.shape[:-1], A))
            np.testing.assert_allclose(policy.act(observations.numpy()), a, rtol=1e-6)
    a = policy.act(torch.zeros(2000, S), deterministic=False)
    assert (a.std(0) > 1).all() and (a >= low).all() and (a <= high).all()
    assert equal(policy.actors()[""](torch.zeros(9, S)), policy.act(torch.zeros(9, S)))


def test_states_are_normalised_by_the_policy():
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    agent = learner(rows)
    s = agent.data[0]
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    mean = agent.policy.net(s).chunk(2, dim=-1)[0].tanh()
    torch.testing.assert_close(agent.policy.act(rows["observations"]), mean)
    s_next = rows["next_observations"]
    torch.testing.assert_close(agent.data[3], agent.policy.scaling.state(s_next))


def test_twin_critic_is_two_networks():
    critic = gan.TwinCritic(S, A, 16)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    for i, net in enumerate(split_critic(critic, gan)):
        torch.testing.assert_close(q[i], net(torch.cat([s, a], dim=-1)))


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
    assert q.shape == (2, len(r), 1)


def test_both_critics_regress_and_nobody_else():
    agent = learner()
    before, state = copies(agent.critic), torch.get_rng_state()
    agent.update_critic(*agent.data)
    found, after = gradients(agent.critic), copies(agent.critic)
    nets = (agent.policy, agent.critic_target, agent.model, agent.discriminator)
    others = [parameter for net in nets for parameter in net.parameters()]
    assert all(parameter.grad is None for parameter in [*others, agent.log_alpha])
    assert not any(torch.equal(one, other) for one, other in zip(before, after))
    for parameter, value in zip(agent.critic.parameters(), before):
        parameter.data.copy_(value)
    torch.set_rng_state(state)
    wanted = gradient_of(agent.critic_loss(*agent.data)[0], agent.critic)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_actor_climbs_the_smaller_critic_and_is_paid_for_entropy():
    agent = learner()
    agent.log_alpha.data.fill_(0.7)
    s = agent.data[0]
    one, two = agent.critic(s, agent.policy(s)[0])
    agent.critic.biases[-1].data[0] += (two - one).median()
    state, before = torch.get_rng_state(), copies(agent.critic)
    pi, log_prob = agent.policy(s)
    one, two = (net(torch.cat([s, pi], dim=-1)) for net in split_critic(agent.critic, gan))
    assert 0.1 < (one < two).float().mean() < 0.9  # either is the smaller one somewhere
    loss = (math.exp(0.7) * log_prob - torch.minimum(one, two)).mean()
    wanted = gradient_of(loss, agent.policy)
    torch.set_rng_state(state)
    metrics = agent.update_actor(s)
    torch.testing.assert_close(metrics["losses/actor"], loss)
    torch.testing.assert_close(gradients(agent.policy), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["values/entropy"], -log_prob.mean())
    assert equal(copies(agent.critic), before)  # the actor's step leaves the critics alone
    assert all(p.grad is None and p.requires_grad for p in agent.critic.parameters())


@pytest.mark.parametrize("log_sigma, rises", [(-3.0, True), (0.0, False)])
def test_temperature_rises_where_the_entropy_is_too_low(log_sigma, rises):
    agent = learner(learning_rate=1e-2)
    head(agent.policy, [0.0, 0.0], log_sigma)
    entropy = agent.update_actor(agent.data[0])["values/entropy"]
    assert (entropy < -A) == rises
    torch.testing.assert_close(agent.log_alpha.grad, entropy + A)
    assert (agent.log_alpha > 0) == rises


def test_a_step_of_the_policy(monkeypatch):
    """Critics, actor, temperature and targets, on one batch; the reward less the penalty."""
    agent, seen = learner(tau=0.25), []
    agent.roll_out()
    old = copies(agent.critic)
    before = [*copies(agent.policy), agent.log_alpha.detach().clone()]
    agent.update_policy()
    after = [*copies(agent.policy), agent.log_alpha.detach()]
    assert not any(torch.equal(one, other) for one, other in zip(before, after))
    for target, was, new in zip(copies(agent.critic_target), old, copies(agent.critic)):
        torch.testing.assert_close(target, was + 0.25 * (new - was))

    rows = [torch.full((16, width), float(k)) for k, width in enumerate((S, A, 1, S, 1, 1))]
    monkeypatch.setattr(agent, "sample", lambda: rows)
    for name in ("update_critic", "update_actor"):
        monkeypatch.setattr(agent, name, lambda *x, name=name: seen.append((name, *x)) or {})
    agent.update_policy()
    assert [name for name, *_ in seen] == ["update_critic", "update_actor"]
    assert [x[0, 0].item() for x in seen[0][1:]] == [0, 1, 2 - 5, 3, 4]
    assert [x[0, 0].item() for x in seen[1][1:]] == [0]


def test_critics_learn_the_value_of_a_loop():
    """One state that returns to itself with reward 1: V = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows |= dict(rewards=torch.ones(64, 1), terminals=torch.zeros(64, 1))
    agent = learner(rows, gamma=0.5, tau=0.1, learning_rate=1e-2)
    agent.log_alpha.data.fill_(-math.inf)
    for _ in range(200):
        agent.update_critic(*agent.data)
        agent.update_targets()
    q = agent.critic(*agent.data[:2])
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)


def test_sac_is_the_same_text_as_in_its_own_file():
    """What both files share is one text; shared_blocks.py copies it."""
    for part in ("Policy", "TwinCritic"):
        one, other = (inspect.getsource(getattr(m, part)) for m in (gan, load("sac")))
        assert one == other
    for part in ("critic_loss", "update_critic", "update_actor", "update_targets"):
        methods = (getattr(gan.GANWorldModel, part), getattr(load("sac").SAC, part))
        assert len({inspect.getsource(method) for method in methods}) == 1


def test_validation(monkeypatch):
    agent, held_out = learner(ensemble=3), data(40)
    constant_critic(agent.critic, 7, 9)
    before = copies(agent)
    with torch.no_grad():
        found = agent.validate(held_out)
    kinds = {f"discriminator_{kind}" for kind in ("real", "fake", "far")}
    assert found.keys() == kinds | {"nll", "mse", "u", "u_far", "q"}
    assert found["q"] == 8 and equal(copies(agent), before)
    s, s_next = (
        agent.policy.scaling.state(held_out[k]) for k in ("observations", "next_observations")
    )
    x = agent.model.standardise(s, held_out["rewards"], s_next)
    mu, sigma = agent.model(s, held_out["actions"])
    torch.testing.assert_close(found["mse"], (mu.mean(0) - x).square().mean())
    nll = -distributions.Normal(mu, sigma).log_prob(x).mean()
    torch.testing.assert_close(found["nll"], nll)
