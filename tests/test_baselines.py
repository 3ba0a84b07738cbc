"""What IQL, CQL and ReBRAC claim, each against an independent computation."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load
from test_models import A, S, batch, constant_critic, copies, data, equal, learner
from torch import distributions

iql, cql, rebrac = map(load, ("iql", "cql", "rebrac"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------- IQL


def constant_net(net, value):
    for parameter in net.parameters():
        parameter.data.zero_()
    net[-1].bias.data.fill_(value)


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_iql_value_is_the_expectile_of_the_smaller_q(expectile):
    """At the loss's minimum, τ E[(Q - V)+] = (1 - τ) E[(V - Q)+] for Q drawn from anything."""
    agent = learner(iql, expectile=expectile)
    q, s, a = torch.randn(4000, 1).exp(), torch.zeros(4000, S), torch.zeros(4000, A)
    agent.q_target = lambda *_: torch.stack([q + 1, q])
    grid = torch.linspace(0, 5, 501)
    balance = [
        expectile * (q - v).clamp(min=0).mean() - (1 - expectile) * (v - q).clamp(min=0).mean()
        for v in grid
    ]
    wanted = grid[torch.stack(balance).abs().argmin()].item()
    found = []
    for v in grid:
        constant_net(agent.v, v.item())
        found.append(agent.losses(s, a, q, s, q)[0]["v"])
    assert grid[torch.stack(found).argmin()].item() == pytest.approx(wanted, abs=0.02)
    assert wanted == pytest.approx(q.mean().item(), abs=0.02) or expectile > 0.5


def test_iql_clones_by_clipped_exponential_weights():
    agent = learner(iql, beta=2.0)
    constant_net(agent.v, 1.0)
    agent.policy.log_sigma.data = torch.tensor([-0.5, 0.3])
    s, a = torch.randn(5, S), 2 * torch.rand(5, A) - 1
    q = torch.tensor([[-1.0], [1.0], [1.5], [3.0], [9.0]])
    agent.q_target = lambda *_: torch.stack([q, q])
    losses, metrics = agent.losses(s, a, q, s, q)
    torch.testing.assert_close(metrics["advantage/u"], q - 1)
    assert metrics["advantage/clipped"] == 0.2  # e^16, the last one's weight without the bound
    weight = torch.cat([torch.tensor([-4.0, 0, 1, 4]).exp(), torch.tensor([100.0])])
    mu, _ = agent.policy(s)
    normal = distributions.Normal(mu, torch.tensor([-0.5, 0.3]).exp())
    wanted = -(weight * normal.log_prob(a).sum(-1)).mean()
    torch.testing.assert_close(losses["policy"], wanted)


@pytest.mark.parametrize("d", [0.0, 1.0])
def test_iql_bootstraps_from_the_value_and_asks_no_policy(d):
    agent = learner(iql, gamma=0.9)
    constant_critic(agent.q, 0, 0)
    constant_critic(agent.q_target, 50, 50)  # has no say in the target of Q
    agent.v = lambda s: 3 * s[:, :1]
    for parameter in agent.policy.parameters():  # nor has the policy
        parameter.data.fill_(math.nan)
    s, a, r, s_next, _ = batch(agent)
    losses, _ = agent.losses(s, a, r, s_next, torch.full_like(r, d))
    y = r + 0.9 * (1 - d) * 3 * s_next[:, :1]
    torch.testing.assert_close(losses["q"], 2 * y.square().mean())


def test_iql_step_is_that_of_three_optimisers():
    """Each network moves by its own loss alone, all three from where the step began; then the
    target follows the new Q."""
    agent = learner(iql, learning_rate=1e-2, tau=0.1, beta=1.0)
    alone = copy.deepcopy(agent)
    torch.manual_seed(1)
    agent.update()
    torch.manual_seed(1)
    losses, _ = alone.losses(*alone.sample())
    gradients = {}
    for name in ("v", "q", "policy"):
        parameters = list(getattr(alone, name).parameters())
        gradients[name] = torch.autograd.grad(losses[name], parameters, retain_graph=True)
    for name, gradient in gradients.items():
        net = getattr(alone, name)
        for parameter, value in zip(net.parameters(), gradient):
            assert value.abs().max() > 0
            parameter.grad = value
        torch.optim.Adam(net.parameters(), lr=1e-2).step()
        torch.testing.assert_close(copies(getattr(agent, name)), copies(net))
    pairs = zip(copies(alone.q_target), copies(agent.q), strict=True)
    torch.testing.assert_close(copies(agent.q_target), [0.9 * old + 0.1 * q for old, q in pairs])


def test_iql_policy_rate_falls_along_a_cosine():
    agent = learner(iql, decay_steps=4, learning_rate=0.1)
    rates = [agent.update()["charts/policy_learning_rate"].item() for _ in range(4)]
    wanted = [0.05 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2, 3, 4)]
    assert rates == pytest.approx(wanted, abs=1e-7)
    still = copies(agent.policy)
    agent.update()  # and stays there
    assert equal(still, copies(agent.policy))


def test_iql_scales_the_returns_range_to_1000():
    rows = data()  # 16 episodes of 4
    agent = learner(iql, rows)
    returns = agent.data["rewards"].view(16, 4).sum(1)
    assert (returns.max() - returns.min()).item() == pytest.approx(1000, rel=1e-4)
    plain = learner(iql, rows, normalize_returns=False)
    torch.testing.assert_close(plain.data["rewards"], rows["rewards"])


@pytest.mark.parametrize("expectile", [0.0, 1.0, 1.7])
def test_iql_refuses_what_is_no_expectile(expectile):
    with pytest.raises(SystemExit, match=r"--expectile .*between 0 and 1"):
        learner(iql, expectile=expectile)


# ----------------------------------------------------------------------------------------- CQL


def test_cql_samples_have_the_density_they_say():
    """Squashed Gaussian against torch's own, for all samples of all states."""
    policy = learner(cql).policy
    s = torch.randn(7, S)
    a, log_prob = policy(s, 5)
    assert a.shape == (7, 5, A) and log_prob.shape == (7, 5, 1)
    mu, log_sigma = policy.net(s).chunk(2, dim=-1)
    normal = distributions.Normal(mu[:, None], log_sigma.exp()[:, None])
    wanted = distributions.TransformedDistribution(normal, distributions.TanhTransform())
    torch.testing.assert_close(log_prob[..., 0], wanted.log_prob(a).sum(-1), atol=2e-3, rtol=1e-3)


def test_cql_begins_as_corl_does():
    """Actions in the middle with a deviation of 1/e, critics near 0 whose layers are orthogonal."""
    agent = learner(cql, hidden_dim=64)
    s, a, *_ = batch(agent)
    mu, log_sigma = agent.policy.net(agent.policy.normalise(s)).chunk(2, dim=-1)
    assert mu.abs().max() < 0.1 and (log_sigma + 1).abs().max() < 0.1
    assert agent.critic(s, a).abs().max() < 0.1
    assert all(bias.abs().max() == 0 for bias in agent.critic.biases)
    for weight in agent.critic.weights[1:3]:
        for member in weight:
            torch.testing.assert_close(member @ member.T, 2 * torch.eye(64), atol=1e-4, rtol=0)
        assert not torch.equal(*weight)
    assert equal(copies(agent.critic), copies(agent.critic_target))


def test_cql_gap_is_a_soft_maximum_less_the_datas_q():
    """One pass over all actions equals one pass per action, with the densities they came from."""
    agent, n = learner(cql, n_actions=3), 3
    s, a, r, s_next, d = batch(agent)
    torch.manual_seed(5)
    _, gap, q_data = agent.critic_losses(s, a, *agent.target_and_draws(s, r, s_next, d))
    torch.manual_seed(5)
    pi, log_pi = agent.policy(torch.cat([s, s_next]), n)
    uniform = 2 * torch.rand(len(s), n, A) - 1
    logits = []
    for j in range(n):
        logits.append(agent.critic(s, uniform[:, j]) + A * math.log(2))
        logits.append(agent.critic(s, pi[: len(s), j]) - log_pi[: len(s), j])
        logits.append(agent.critic(s, pi[len(s) :, j]) - log_pi[len(s) :, j])
    soft_max = torch.stack(logits).logsumexp(0)
    torch.testing.assert_close(q_data, agent.critic(s, a))
    torch.testing.assert_close(gap, (soft_max - q_data).mean((1, 2)).sum())


def test_cql_soft_maximum_is_the_integral_over_actions():
    """With importance weights, the mean of exp(Q) / p estimates ∫ exp Q(s, a) da. Q = 0: 2^A."""
    agent = learner(cql, data(64), n_actions=20_000)
    constant_critic(agent.critic, 0, 0)
    agent.policy.net[-1].weight.data.zero_()  # a policy whose samples cover all actions, σ = 1
    agent.policy.net[-1].bias.data = torch.tensor([0.0, 0.0, 0.458, 0.458])
    s, a, r, s_next, d = (x[:2] for x in batch(agent))
    _, gap, _ = agent.critic_losses(s, a, *agent.target_and_draws(s, r, s_next, d))
    integral = (gap / 2).exp() / 60_000
    assert integral.item() == pytest.approx(2**A, rel=0.1)


def test_cql_pushes_q_up_at_the_data_and_down_elsewhere():
    rows = data(actions=torch.full((64, A), 0.5), rewards=torch.zeros(64, 1))
    agent = learner(cql, rows, learning_rate=1e-2, gamma=0.0)
    before = agent.critic(agent.data["observations"], torch.full((64, A), -0.5)).mean()
    for _ in range(50):
        agent.update_critic(*batch(agent))
    s = agent.data["observations"]
    at_data = agent.critic(s, rows["actions"]).mean()
    elsewhere = agent.critic(s, torch.full((64, A), -0.5)).mean()
    assert at_data > elsewhere + 1 and elsewhere < before - 1


@pytest.mark.parametrize("d", [0.0, 1.0])
def test_cql_target_is_masked_by_terminals_alone(d):
    agent = learner(cql, gamma=0.9)
    constant_critic(agent.critic, 0, 0)
    constant_critic(agent.critic_target, 5, 3)
    s, a, r, s_next, _ = batch(agent)
    y_and_draws = agent.target_and_draws(s, r, s_next, torch.full_like(r, d))
    td, *_ = agent.critic_losses(s, a, *y_and_draws)
    torch.testing.assert_close(td, 2 * (r + 0.9 * (1 - d) * 3).square().mean())


@pytest.mark.parametrize("slice_size", [1, 5, 8])
def test_cql_slices_add_up_to_the_batch(slice_size):
    """The last slice of 5 is a shorter one."""
    whole, sliced = (learner(cql, slice_size=size) for size in (16, slice_size))
    sliced.critic.load_state_dict(whole.critic.state_dict())
    sliced.policy.load_state_dict(whole.policy.state_dict())
    sliced.critic_target.load_state_dict(whole.critic_target.state_dict())
    rows = [x[:16] for x in batch(whole)]
    metrics = []
    for agent in (whole, sliced):
        torch.manual_seed(5)
        metrics.append(agent.update_critic(*rows))
    for key, value in metrics[0].items():
        torch.testing.assert_close(metrics[1][key], value, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(sliced.critic.parameters(), whole.critic.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("target_gap, sign", [(-100.0, 1), (100.0, -1)])
def test_cql_lagrange_factor_follows_the_gap(target_gap, sign):
    agent = learner(cql, lagrange=True, target_gap=target_gap, learning_rate=1e-2)
    agent.update_critic(*batch(agent))
    assert sign * agent.log_factor.item() > 0
    still = learner(cql, lagrange=False, target_gap=target_gap)
    still.update_critic(*batch(still))
    assert still.log_factor.item() == 0


# -------------------------------------------------------------------------------------- ReBRAC


def test_rebrac_pairs_every_step_with_the_next_action_of_its_episode():
    """Three episodes: one ends at a terminal, one at a time limit, one goes on to the last row."""
    terminals = torch.zeros(7, 1)
    terminals[2] = 1
    episodes = torch.tensor([4, 4, 4, 8, 8, 9, 9])
    rows = data(7, terminals=terminals, episodes=episodes)
    agent = learner(rebrac, rows)
    kept = [0, 1, 2, 3, 5]  # 4 and 6 have no next action and are no end
    a = rows["actions"]
    torch.testing.assert_close(agent.data["actions"], a[kept])
    torch.testing.assert_close(agent.data["rewards"], rows["rewards"][kept])
    for i in (0, 1, 3, 4):  # the terminal's is never used
        torch.testing.assert_close(agent.data["next_actions"][i], a[kept[i] + 1])


def test_rebrac_refuses_data_without_successors():
    with pytest.raises(SystemExit, match="episodes of two steps"):
        learner(rebrac, data(8, episodes=torch.arange(8)))


@pytest.mark.parametrize("layer_norm", [True, False])
def test_rebrac_critic_is_two_plain_networks(layer_norm):
    critic = rebrac.LayerNormCritic(S, A, 16, layer_norm)
    for parameter in critic.parameters():
        parameter.data = torch.randn_like(parameter)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1)
    for i in range(2):
        x = torch.cat([s, a], -1)
        for j in range(3):
            x = torch.relu(F.linear(x, critic.weights[j][i].T, critic.biases[j][i, 0]))
            if layer_norm:
                x = F.layer_norm(x, (16,), critic.gains[j][i, 0], critic.shifts[j][i, 0])
        x = F.linear(x, critic.weights[3][i].T, critic.biases[3][i, 0])
        torch.testing.assert_close(q[i], x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("d", [0.0, 1.0])
@pytest.mark.parametrize("critic_bc", [0.0, 2.0])
def test_rebrac_target_pays_for_the_distance(d, critic_bc):
    """y = r + γ (1 - d) (min Q' - β_2 |ã' - a'|²), read from the losses of critics that say 0."""
    agent = learner(rebrac, gamma=0.9, critic_bc=critic_bc, policy_noise=0.0)
    for critic, values in ((agent.critic, (0, 0)), (agent.critic_target, (5, 3))):
        constant_critic(critic, *values)
    s, a, r, s_next, a_next, _ = agent.sample()
    agent.policy.net[-1].bias.data += 9.0  # the online policy has no say
    loss, _, distance = agent.critic_losses(s, a, r, s_next, a_next, torch.full_like(r, d))
    wanted = (agent.policy_target(s_next) - a_next).square().sum(1, keepdim=True)
    torch.testing.assert_close(distance, wanted)
    y = r + 0.9 * (1 - d) * (3 - critic_bc * wanted)
    torch.testing.assert_close(loss, 2 * y.square().mean())


def test_rebrac_actor_gradient_is_that_of_its_loss():
    agent = learner(rebrac, actor_bc=0.3)
    s, a, *_ = agent.sample()
    pi = agent.policy(s)
    q = agent.critic(s, pi).amin(0)
    wanted = 0.3 * (pi - a).square().sum(1).mean() - q.mean() / q.abs().mean().detach()
    gradients = torch.autograd.grad(wanted, list(agent.policy.parameters()))
    frozen = copies(agent.critic)
    agent.update_actor(s, a)
    for parameter, gradient in zip(agent.policy.parameters(), gradients):
        torch.testing.assert_close(parameter.grad, gradient)
    assert equal(frozen, copies(agent.critic))
    assert all(p.requires_grad for p in agent.critic.parameters())


def test_rebrac_begins_small():
    agent = learner(rebrac, hidden_dim=256)
    s = 5 * torch.randn(100, S)
    assert np.abs(agent.policy.act(s).numpy()).max() < 0.1
    assert agent.critic(s, torch.zeros(100, A)).abs().max() < 1
