"""What fql.py claims, each against an independent computation."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import load
from units import A, S, batch, copies, data, equal, gradient_of, gradients, learner, task

fql = load("fql")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def oracle(m, v):
    """Mean velocity at x_t when the data are N(m, v): E[a - x_0 | x_t], by Gaussian conditioning.
    x_t = (1 - t) x_0 + t a has variance (1 - t)² + t² v, its covariance with a - x_0 is
    t v - (1 - t)."""

    def velocity(s, x, t):
        gain = (t * v - (1 - t)) / ((1 - t).square() + t.square() * v)
        return m + gain * (x - t * m)

    return velocity


def constant_step(policy, *x):
    """A one-step policy whose output is x whatever it sees."""
    policy.one_step.forward = lambda seen: torch.tensor(x).expand(len(seen), A)


# ------------------------------------------------------------------------------------ Networks


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("layer_norm", [True, False])
def test_critic_is_two_plain_networks(layers, layer_norm):
    critic = fql.LayerNormCritic(S, A, 16, layers, layer_norm)
    assert len(critic.weights) == layers + 1 and len(critic.gains) == layers * layer_norm
    for parameter in [*critic.gains, *critic.shifts]:
        parameter.data += 0.3 * torch.randn_like(parameter)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    for i in range(2):
        x = torch.cat([s, a], dim=-1)
        for k in range(layers):
            x = torch.relu(x @ critic.weights[k][i] + critic.biases[k][i, 0])
            if layer_norm:
                variance = x.var(-1, keepdim=True, correction=0)
                x = (x - x.mean(-1, keepdim=True)) / (variance + 1e-5).sqrt()
                x = x * critic.gains[k][i, 0] + critic.shifts[k][i, 0]
        torch.testing.assert_close(q[i], x @ critic.weights[-1][i] + critic.biases[-1][i])


def test_both_policies_see_the_state_and_the_noise():
    policy = learner(fql, hidden_layers=3).policy
    assert len(policy.velocity) == len(policy.one_step) == 7  # three times linear and ReLU, linear
    s, x, t = torch.randn(5, S), torch.randn(5, A), torch.rand(5, 1)
    torch.testing.assert_close(policy.v(s, x, t), policy.velocity(torch.cat([s, x, t], dim=-1)))
    torch.testing.assert_close(policy(s, x), policy.one_step(torch.cat([s, x], dim=-1)))
    z = policy.noise(torch.zeros(40_000, S))
    assert z.shape == (40_000, A) and z.mean().abs() < 0.02
    torch.testing.assert_close(z.T.cov(), torch.eye(A), atol=0.03, rtol=0)


def test_states_are_normalised():
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    rows["next_observations"] = rows["observations"] + 1
    agent = learner(fql, rows)
    s, a, r, s_next, d = batch(agent)
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(s_next - s, (1 / agent.policy.scaling.std).expand(64, S))
    for column, key in ((a, "actions"), (r, "rewards"), (d, "terminals")):
        assert torch.equal(column, rows[key])
    rewards = torch.arange(64.0)[:, None]
    agent = learner(fql, data(rewards=rewards, terminals=rewards), batch_size=32)
    s, _, r, s_next, d = agent.sample()
    assert r.shape == (32, 1) and torch.equal(r, d)  # the columns of the same rows
    assert torch.equal(s, agent.data[0][r[:, 0].long()])
    assert torch.equal(s_next, agent.data[3][r[:, 0].long()])


# ------------------------------------------------------------------------------------- The flow


def test_time_runs_from_noise_to_data():
    """With the exact velocity of data N(0.3, 0.2²) Euler's steps turn noise into that law."""
    policy = learner(fql, flow_steps=200).policy
    policy.v = oracle(0.3, 0.04)
    x = policy.ode(torch.zeros(20_000, S), torch.randn(20_000, A))
    assert x.mean().item() == pytest.approx(0.3, abs=0.01)
    assert x.std().item() == pytest.approx(0.2, rel=0.03)


@pytest.mark.parametrize("k", [1, 2, 10])
def test_euler_steps_are_the_asked_ones(k):
    """dx/dt = t: K steps of Euler sum 0, 1/K, ..., (K - 1)/K, each over K."""
    policy = learner(fql, flow_steps=k).policy
    policy.v = lambda s, x, t: t.expand_as(x)
    x = policy.ode(torch.zeros(4, S), torch.zeros(4, A))
    torch.testing.assert_close(x, torch.full((4, A), (k - 1) / (2 * k)))


def test_ode_starts_at_its_noise_and_sees_the_state():
    policy = learner(fql, flow_steps=4).policy
    z, s = 0.2 * torch.randn(5, A), 0.3 * torch.rand(5, S)
    policy.v = lambda s, x, t: s[:, :1].expand_as(x)
    torch.testing.assert_close(policy.ode(s, z), z + s[:, :1])
    policy.v = lambda s, x, t: torch.full_like(x, 5.0)
    assert policy.ode(s, z).eq(1).all()  # an action: it stays in its bounds
    policy.v = lambda s, x, t: torch.full_like(x, -5.0)
    assert policy.ode(s, z).eq(-1).all()


def test_flow_loss_is_least_at_the_mean_velocity():
    """Of x_t's velocity only what x_t tells can be known: the exact velocity's loss is its
    conditional variance, and any other velocity's is larger."""
    m, v = 0.3, 0.04
    agent = learner(fql)
    s, a = torch.zeros(200_000, S), m + v**0.5 * torch.randn(200_000, A)
    exact = oracle(m, v)
    losses = {}
    for name, velocity in (
        ("exact", exact),
        ("slower", lambda s, x, t: 0.9 * exact(s, x, t)),
        ("backwards", lambda s, x, t: exact(s, x, 1 - t)),
    ):
        agent.policy.v = velocity
        losses[name] = agent.flow_loss(s, a).item()
    t = (torch.arange(1000) + 0.5) / 1000
    known = (t * v - (1 - t)).square() / ((1 - t).square() + t.square() * v)
    assert losses["exact"] == pytest.approx((1 + v - known).mean().item(), rel=0.02)
    assert losses["exact"] < losses["slower"] < losses["backwards"]


def test_flow_loss_by_hand():
    """Points on the lines from noise to the batch's actions, a time for each, their velocities."""
    agent = learner(fql)
    s, a, *_ = batch(agent)
    seen = []
    agent.policy.v = lambda *inputs: seen.extend(inputs) or torch.zeros_like(inputs[1])
    loss = agent.flow_loss(s, a)
    state, x_t, t = seen
    assert torch.equal(state, s) and t.shape == (len(s), 1) and len(t.unique()) == len(s)
    assert 0 <= t.min() < 0.1 and 0.9 < t.max() <= 1
    x_0 = (x_t - t * a) / (1 - t)
    assert (x_0[t[:, 0] < 0.99].std() - 1).abs() < 0.2
    torch.testing.assert_close(loss, (a - x_0).square().mean(), rtol=1e-3, atol=0)


def test_flow_and_distilled_policy_keep_both_modes():
    """One state, actions at ±0.6: so is the flow, and so is the step that learns from it."""
    rows = data(512, observations=torch.zeros(512, S), next_observations=torch.zeros(512, S))
    rows["actions"] = 0.6 * (torch.rand(512, 1) < 0.7).float().mul(2).sub(1)
    flags = dict(alpha=100.0, hidden_dim=64, batch_size=256, learning_rate=2e-3)
    agent = learner(fql, rows, **flags)
    for _ in range(800):
        metrics = agent.update()
    assert metrics["losses/distill"] < 0.03
    s = torch.zeros(2000, S)
    z = torch.randn(2000, 1)
    share = (rows["actions"] > 0).float().mean().item()
    for x in (agent.policy.ode(s, z), agent.policy(s, z), agent.policy.act(s)):
        near = (x.abs() - 0.6).abs() < 0.2
        assert near.float().mean() > 0.75
        assert (x > 0).float().mean().item() == pytest.approx(share, abs=0.1)


# ---------------------------------------------------------------------------------- The losses


def test_distillation_teaches_the_step_and_not_the_flow():
    agent = learner(fql, alpha=0.7)
    s, *_ = batch(agent)
    torch.manual_seed(3)
    _, metrics = agent.actor_loss(s)
    metrics["losses/distill"].backward()
    assert all(p.grad is None for p in agent.policy.velocity.parameters())
    assert gradients(agent.policy.one_step).abs().sum() > 0
    torch.manual_seed(3)  # the same noise for both
    z = agent.policy.noise(s)
    wanted = (agent.policy(s, z) - agent.policy.ode(s, z)).square().mean()
    torch.testing.assert_close(metrics["losses/distill"], wanted)
    wanted = 0.7 * metrics["losses/distill"] + metrics["losses/q"]
    torch.testing.assert_close(metrics["losses/actor"], wanted)


@pytest.mark.parametrize("normalize_q", [True, False])
def test_policy_climbs_the_mean_of_the_critics(normalize_q):
    agent = learner(fql, normalize_q=normalize_q, alpha=0.0)
    agent.critic.biases[-1].data -= agent.critic(*batch(agent)[:2]).median()  # Q of both signs
    s, *_ = batch(agent)
    pi = (0.5 * torch.randn(len(s), A)).requires_grad_()
    agent.policy.forward = lambda s, z: pi
    loss, metrics = agent.actor_loss(s)
    (got,) = torch.autograd.grad(loss, pi)
    q = agent.critic(s, pi.clamp(-1, 1)).mean(0)
    assert q.min() < 0 < q.max()
    scale = 1 / q.abs().mean().item() if normalize_q else 1
    (wanted,) = torch.autograd.grad(-scale * q.mean(), pi)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(metrics["values/q_policy"], q.mean())
    assert wanted[pi.abs() > 1].eq(0).all() and wanted[pi.abs() < 1].ne(0).all()


def test_normalised_q_frees_alpha_of_the_rewards_scale():
    found = []
    for scale in (1, 1000):
        torch.manual_seed(0)
        agent = learner(fql)
        agent.critic.weights[-1].data *= scale
        agent.critic.biases[-1].data *= scale
        torch.manual_seed(1)
        loss, _ = agent.actor_loss(batch(agent)[0])
        found.append(gradient_of(loss, agent.policy.one_step))
    torch.testing.assert_close(*found)


def test_every_network_descends_its_own_loss_alone():
    """One backward pass of the sum: each network's gradient is that of the loss it belongs to."""
    agent = learner(fql, alpha=0.7, learning_rate=0.0)
    agent.sample = lambda: batch(agent)
    torch.manual_seed(5)
    metrics = agent.update()
    nets = (agent.critic, agent.policy.velocity, agent.policy.one_step)
    got = [gradients(net) for net in nets]

    torch.manual_seed(5)
    s, a, r, s_next, d = batch(agent)
    critic, q = agent.critic_loss(s, a, r, s_next, d)
    flow = agent.flow_loss(s, a)
    actor, _ = agent.actor_loss(s)
    for net, found, loss in zip(nets, got, (critic, flow, actor)):
        torch.testing.assert_close(found, gradient_of(loss, net))
    for name, value in (("critic", critic), ("flow", flow), ("actor", actor)):
        torch.testing.assert_close(metrics[f"losses/{name}"], value)
    torch.testing.assert_close(metrics["values/q"], q.mean())
    assert all(p.requires_grad for p in agent.critic.parameters())


def test_an_update_moves_every_network():
    agent = learner(fql, tau=0.1)
    nets = (agent.critic, agent.critic_target, agent.policy.velocity, agent.policy.one_step)
    before = [copies(net) for net in nets]
    metrics = agent.phase(1)()
    assert all(
        not torch.equal(a, b) for net, old in zip(nets, before) for a, b in zip(copies(net), old)
    )
    assert all(isinstance(value, torch.Tensor) and value.numel() == 1 for value in metrics.values())


@pytest.mark.parametrize("d", [0.0, 1.0, None])
@pytest.mark.parametrize("q_target, value", [("mean", 4.0), ("min", 3.0)])
def test_target_is_masked_by_terminals_alone(d, q_target, value):
    """y = r + γ (1 - d) Q', read from the losses of critics that say 0; None: the batch's own d."""
    agent = learner(fql, gamma=0.9, q_target=q_target)
    seen = []
    agent.critic.forward = lambda s, a: torch.zeros(2, len(s), 1)
    agent.critic_target.forward = lambda s, a: (
        seen.append((s, a)) or torch.tensor([5.0, 3.0]).view(2, 1, 1).expand(2, len(s), 1)
    )
    constant_step(agent.policy, 9.0, -9.0)
    s, a, r, s_next, found = batch(agent)
    d = found if d is None else torch.full_like(r, d)
    loss, _ = agent.critic_loss(s, a, r, s_next, d)
    torch.testing.assert_close(loss, 2 * (r + 0.9 * (1 - d) * value).square().mean())
    assert torch.equal(seen[0][0], s_next)
    assert torch.equal(seen[0][1], torch.tensor([1.0, -1.0]).expand(len(s), A))  # clipped


def test_target_asks_the_policy_at_the_next_state_with_new_noise():
    agent = learner(fql)
    seen = []
    agent.critic_target.forward = lambda s, a: seen.append(a) or torch.zeros(2, len(s), 1)
    columns = batch(agent)
    torch.manual_seed(2)
    agent.critic_loss(*columns)
    torch.manual_seed(2)
    wanted = agent.policy(columns[3], torch.randn(len(columns[3]), A)).clamp(-1, 1)
    torch.testing.assert_close(seen[0], wanted)
    agent.critic_loss(*columns)
    assert not torch.equal(seen[0], seen[-1])


def test_critics_regress_on_the_target():
    agent = learner(fql, gamma=0.9)
    columns = s, a, r, s_next, d = batch(agent)
    torch.manual_seed(2)
    loss, q = agent.critic_loss(*columns)
    torch.manual_seed(2)
    a_next = agent.policy(s_next, agent.policy.noise(s)).clamp(-1, 1)
    y = (r + 0.9 * (1 - d) * agent.critic_target(s_next, a_next).mean(0)).detach()
    wanted = sum((agent.critic(s, a)[i] - y).square().mean() for i in range(2))
    loss.backward()
    torch.testing.assert_close(gradients(agent.critic), gradient_of(wanted, agent.critic))
    torch.testing.assert_close(q, agent.critic(s, a))
    for net in (agent.policy, agent.critic_target):
        assert all(parameter.grad is None for parameter in net.parameters())
    agent.critic.biases[-1].data += 7  # Q' is a copy: what Q does leaves the target alone
    torch.manual_seed(2)
    moved, _ = agent.critic_loss(*columns)
    torch.testing.assert_close(moved, (agent.critic(s, a) - y).square().mean((1, 2)).sum())


def test_critics_learn_the_value_of_a_loop():
    """One state that returns to itself with reward 1: V = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows |= {"rewards": torch.ones(64, 1), "terminals": torch.zeros(64, 1)}
    agent = learner(fql, rows, gamma=0.5, tau=0.1, learning_rate=1e-2)
    for _ in range(200):
        agent.update()
    q = agent.critic(*batch(agent)[:2])
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)


def test_target_follows_slowly():
    agent = learner(fql, tau=0.1)
    assert equal(copies(agent.critic_target), copies(agent.critic))
    for parameter in agent.critic.parameters():
        parameter.data += 1
    before, online = copies(agent.critic_target), copies(agent.critic)
    agent.update_targets()
    for new, was in zip(agent.critic_target.parameters(), before):
        torch.testing.assert_close(new.data, was + 0.1)
    assert equal(copies(agent.critic), online)


def test_validation_is_of_the_given_rows():
    agent = learner(fql)
    held_out = data(32)
    torch.manual_seed(4)
    found = agent.validate(held_out)
    torch.manual_seed(4)
    state = agent.policy.scaling.state
    s, s_next = state(held_out["observations"]), state(held_out["next_observations"])
    a, r, d = (held_out[key] for key in ("actions", "rewards", "terminals"))
    wanted = [agent.critic_loss(s, a, r, s_next, d)[0], agent.flow_loss(s, a)]
    wanted.append(agent.actor_loss(s)[1]["losses/distill"])
    assert list(found) == ["critic", "flow", "distill"]
    torch.testing.assert_close(list(found.values()), wanted)


# -------------------------------------------------------------------------------------- Acting


@pytest.mark.parametrize("x", [[0.0, 0.0], [0.5, -0.25], [-0.999, 0.999], [9.0, -9.0]])
def test_act_answers_in_the_environments_bounds(x):
    """A policy that outputs the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(fql, low=low.tolist(), high=high.tolist()).policy
    constant_step(policy, *x)
    wanted = low + (torch.tensor(x).clamp(-1, 1) + 1) / 2 * (high - low)
    for observations in (torch.randn(5, S), torch.randn(5, S).double(), torch.randn(S)):
        a = policy.act(observations)
        assert isinstance(a, torch.Tensor)
        torch.testing.assert_close(a, wanted.expand(*observations.shape[:-1], A))
        array = policy.act(observations.numpy())
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, a.numpy())


@pytest.mark.parametrize("deterministic", [False, True])
def test_acting_is_the_distilled_step(deterministic):
    """From noise, or from no noise, on raw observations, clipped to the bounds."""
    rows = data(observations=3 * torch.randn(64, S) + 1)
    policy = learner(fql, rows, low=[-2.0, -1.0], high=[2.0, 3.0]).policy
    policy.one_step[-1].weight.data *= 10
    s = policy.scaling.state(rows["observations"])
    torch.manual_seed(1)
    a = policy.act(rows["observations"], **dict(deterministic=True) if deterministic else {})
    torch.manual_seed(1)
    z = torch.zeros(64, A) if deterministic else torch.randn(64, A)
    x = policy(s, z).clamp(-1, 1)
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    torch.testing.assert_close(a, low + (x + 1) / 2 * (high - low))
    assert (x.abs() == 1).any() and (x.abs() < 1).any()
    again = policy.act(rows["observations"], deterministic=deterministic)
    assert torch.equal(again, a) == deterministic
    assert policy.actors() == {"": policy.act}


def test_a_checkpoint_holds_the_policy(tmp_path):
    rows = data(observations=3 * torch.randn(64, S) + 1)
    agent = learner(fql, rows, low=[-2.0, -1.0], high=[2.0, 3.0])
    agent.update()
    saved = {"algorithm": "FQL", "args": asdict(agent.args), "learner": agent.state_dict()}
    saved["task"] = task(rows, [-2.0, -1.0], [2.0, 3.0])
    torch.save(saved, tmp_path / "checkpoint.pt")
    policy = fql.load_policy(tmp_path)
    s = rows["observations"]
    assert torch.equal(policy.act(s, deterministic=True), agent.policy.act(s, deterministic=True))


@pytest.mark.parametrize("flag, value", [("alpha", -1.0), ("flow_steps", 0), ("hidden_layers", 0)])
def test_refuses_senseless_numbers(flag, value):
    with pytest.raises(SystemExit, match=flag.replace("_", "-")):
        learner(fql, **{flag: value})
