"""What FQL claims, each part against an independent computation."""

import pytest
import torch
from conftest import load
from test_models import A, S, batch, copies, data, equal, gradients, learner

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


def test_critic_is_two_plain_networks():
    critic = fql.LayerNormCritic(S, A, 16, 3, True)
    for parameter in [*critic.gains, *critic.shifts]:
        parameter.data += 0.3 * torch.randn_like(parameter)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    for i in range(2):
        x = torch.cat([s, a], dim=-1)
        for weight, bias, gain, shift in zip(
            critic.weights[:-1], critic.biases[:-1], critic.gains, critic.shifts
        ):
            x = torch.relu(x @ weight[i] + bias[i, 0])
            x = (x - x.mean(-1, keepdim=True)) / (
                x.var(-1, keepdim=True, correction=0) + 1e-5
            ).sqrt()
            x = x * gain[i, 0] + shift[i, 0]
        torch.testing.assert_close(q[i], x @ critic.weights[-1][i] + critic.biases[-1][i])


def test_time_runs_from_noise_to_data():
    """With the exact velocity of data N(0.3, 0.2²) Euler's steps turn noise into that law."""
    policy = learner(fql, flow_steps=200).policy
    policy.v = oracle(0.3, 0.04)
    x = policy.ode(torch.zeros(20_000, S), torch.randn(20_000, A))
    assert x.mean().item() == pytest.approx(0.3, abs=0.01)
    assert x.std().item() == pytest.approx(0.2, rel=0.03)


def test_euler_steps_are_the_asked_ones():
    """dx/dt = t: K steps of Euler sum 0, 1/K, ..., (K - 1)/K, each over K."""
    for k in (1, 2, 10):
        policy = learner(fql, flow_steps=k).policy
        policy.v = lambda s, x, t: t.expand_as(x)
        x = policy.ode(torch.zeros(4, S), torch.zeros(4, A))
        torch.testing.assert_close(x, torch.full((4, A), (k - 1) / (2 * k)))


def test_ode_ends_within_the_actions():
    policy = learner(fql).policy
    policy.v = lambda s, x, t: torch.full_like(x, 5.0)
    assert policy.ode(torch.zeros(4, S), torch.randn(4, A)).eq(1).all()


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


def test_flow_and_distilled_policy_keep_both_modes():
    """One state, actions at ±0.6: so is the flow, and so is the step that learns from it."""
    rows = data(512, observations=torch.zeros(512, S), next_observations=torch.zeros(512, S))
    rows["actions"] = 0.6 * (torch.rand(512, 1) < 0.7).float().mul(2).sub(1)
    rows |= {"action_low": -torch.ones(1, 1), "action_high": torch.ones(1, 1)}
    flags = dict(alpha=100.0, hidden_dim=64, batch_size=256, learning_rate=2e-3)
    agent = learner(fql, rows, **flags)
    for _ in range(800):
        metrics = agent.update()
    assert metrics["losses/distill"] < 0.03
    s = torch.zeros(2000, S)
    z = torch.randn(2000, 1)
    share = (rows["actions"] > 0).float().mean().item()
    for x in (agent.policy.ode(s, z), agent.policy(s, z)):
        near = (x.abs() - 0.6).abs() < 0.2
        assert near.float().mean() > 0.75
        assert (x > 0).float().mean().item() == pytest.approx(share, abs=0.1)


def test_distillation_teaches_the_step_and_not_the_flow():
    agent = learner(fql)
    s, *_ = batch(agent)
    torch.manual_seed(3)
    distill, pi = agent.distillation(s)
    distill.backward()
    assert all(p.grad is None for p in agent.policy.velocity.parameters())
    assert gradients(agent.policy.one_step).abs().sum() > 0
    torch.manual_seed(3)  # the same noise for both
    z = agent.policy.noise(s)
    torch.testing.assert_close(pi, agent.policy(s, z))
    wanted = (pi - agent.policy.ode(s, z)).square().mean()
    torch.testing.assert_close(distill, wanted)


@pytest.mark.parametrize("normalize_q", [True, False])
def test_policy_climbs_the_mean_of_the_critics(normalize_q):
    agent = learner(fql, normalize_q=normalize_q)
    s, *_ = batch(agent)
    pi = (0.5 * torch.randn(len(s), A)).requires_grad_()
    loss, _ = agent.policy_loss(s, pi)
    (got,) = torch.autograd.grad(loss, pi)
    q = agent.q(s, pi.clamp(-1, 1)).mean(0)
    scale = 1 / q.abs().mean().item() if normalize_q else 1
    (wanted,) = torch.autograd.grad(-scale * q.mean(), pi)
    torch.testing.assert_close(got, wanted)
    assert wanted[pi.abs() > 1].eq(0).all() and wanted[pi.abs() < 1].ne(0).all()


def test_every_network_descends_its_own_loss_alone():
    """One backward pass of the sum: each network's gradient is that of the loss it belongs to."""
    agent = learner(fql, alpha=0.7, learning_rate=0.0)
    agent.sample = lambda: batch(agent)
    torch.manual_seed(5)
    agent.update()
    got = [gradients(x) for x in (agent.q, agent.policy.velocity, agent.policy.one_step)]

    torch.manual_seed(5)
    s, a, r, s_next, d = batch(agent)
    critic, _ = agent.critic_losses(s, a, r, s_next, d)
    flow = agent.flow_loss(s, a)
    distill, pi = agent.distillation(s)
    climb, _ = agent.policy_loss(s, pi)
    for found, loss, net in zip(
        got,
        (critic, flow, 0.7 * distill + climb),
        (agent.q, agent.policy.velocity, agent.policy.one_step),
    ):
        wanted = torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
        torch.testing.assert_close(found, torch.cat([x.flatten() for x in wanted]))
    assert all(p.requires_grad for p in agent.q.parameters())


@pytest.mark.parametrize("d", [0.0, 1.0])
@pytest.mark.parametrize("q_target, value", [("mean", 4.0), ("min", 3.0)])
def test_target_is_masked_by_terminals_alone(d, q_target, value):
    agent = learner(fql, gamma=0.9, q_target=q_target)
    seen = []
    agent.q.forward = lambda s, a: torch.zeros(2, len(s), 1)
    agent.q_target.forward = lambda s, a: (
        seen.append(a) or torch.tensor([5.0, 3.0]).view(2, 1, 1).expand(2, len(s), 1)
    )
    agent.policy.one_step.forward = lambda x: 9 * torch.ones(len(x), A)
    s, a, r, s_next, _ = batch(agent)
    loss, _ = agent.critic_losses(s, a, r, s_next, torch.full_like(r, d))
    torch.testing.assert_close(loss, 2 * (r + 0.9 * (1 - d) * value).square().mean())
    assert seen[0].eq(1).all()  # clipped where Q sees it


def test_target_follows_slowly():
    agent = learner(fql, tau=0.1)
    assert equal(copies(agent.q_target), copies(agent.q))
    for parameter in agent.q.parameters():
        parameter.data += 1
    before = copies(agent.q_target)
    agent.update_target()
    for new, was in zip(agent.q_target.parameters(), before):
        torch.testing.assert_close(new.data, was + 0.1)


def test_acting_is_the_distilled_step_in_the_environments_bounds():
    low, high = torch.tensor([[-2.0, -1.0]]), torch.tensor([[2.0, 3.0]])
    agent = learner(fql, data() | {"action_low": low, "action_high": high})
    observations = 3 * torch.randn(50, S) + 1
    torch.manual_seed(1)
    a = agent.policy.act(observations)
    torch.manual_seed(1)
    s = agent.policy.normalise(observations)
    x = agent.policy(s, torch.randn(50, A)).clamp(-1, 1)
    torch.testing.assert_close(a, low + (x + 1) / 2 * (high - low))
    agent.policy.one_step.forward = lambda x: 9 * torch.ones(len(x), A)
    torch.testing.assert_close(agent.policy.act(observations), high.expand(50, A))


@pytest.mark.parametrize("flag, value", [("alpha", -1.0), ("flow_steps", 0), ("hidden_layers", 0)])
def test_refuses_senseless_numbers(flag, value):
    with pytest.raises(SystemExit, match=flag.replace("_", "-")):
        learner(fql, **{flag: value})
