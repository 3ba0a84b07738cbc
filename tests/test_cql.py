"""What cql.py claims, each against an independent computation."""

import copy
import math

import numpy as np
import pytest
import torch
from conftest import load
from torch import distributions
from units import (
    A,
    S,
    batch,
    constant_critic,
    constant_net,
    copies,
    data,
    equal,
    gradient_of,
    gradients,
    learner,
    split_critic,
)

cql = load("cql")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def lively(agent):
    """A critic and a target whose values differ from action to action and from each other, of both
    signs: as they begin, all is near 0."""
    for critic in (agent.critic, agent.critic_target):
        for parameter in critic.parameters():
            parameter.data = 0.5 * torch.randn_like(parameter)
        s, a, *_ = batch(agent)
        critic.biases[-1].data -= critic(s, a).mean((1, 2))[:, None, None].detach()
    return agent


# ------------------------------------------------------------------------------------ Networks


@pytest.mark.parametrize("layers", [2, 3])
def test_twin_critic_is_two_networks(layers):
    critic = cql.TwinCritic(S, A, 16, hidden_layers=layers)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    for i, net in enumerate(split_critic(critic, cql)):
        torch.testing.assert_close(q[i], net(torch.cat([s, a], dim=-1)))


def test_samples_have_the_density_they_say():
    """Squashed Gaussian against torch's own, for all samples of all states."""
    policy = learner(cql).policy
    policy.net[-1].weight.data *= 30
    s = torch.randn(7, S)
    a, log_prob = policy(s, 5)
    assert a.shape == (7, 5, A) and log_prob.shape == (7, 5, 1)
    mu, log_sigma = policy.net(s).chunk(2, dim=-1)
    normal = distributions.Normal(mu[:, None], log_sigma.exp()[:, None])
    wanted = distributions.TransformedDistribution(normal, distributions.TanhTransform())
    torch.testing.assert_close(log_prob[..., 0], wanted.log_prob(a).sum(-1), atol=2e-3, rtol=1e-3)
    policy.net[-1].bias.data += 99.0  # log σ is held at 2
    assert policy(s, 5)[1].isfinite().all()


def test_density_integrates_to_one():
    """E 1 / p over the policy's own samples is the area of the actions, 2^A."""
    policy = learner(cql).policy
    constant_net(policy.net, 0.0)
    policy.net[-1].bias.data = torch.tensor([0.0, 0.0, 0.458, 0.458])  # covers all actions
    _, log_prob = policy(torch.zeros(1, S), 40_000)
    assert (-log_prob).exp().mean().item() == pytest.approx(2**A, rel=0.1)


def test_begins_as_corl_does():
    """Actions in the middle with a standard deviation of 1/e, critics near 0 whose layers are
    orthogonal."""
    agent = learner(cql, hidden_dim=64)
    s, a, *_ = batch(agent)
    mu, log_sigma = agent.policy.net(s).chunk(2, dim=-1)
    assert mu.abs().max() < 0.1 and (log_sigma + 1).abs().max() < 0.1
    assert agent.critic(s, a).abs().max() < 0.1
    assert all(bias.abs().max() == 0 for bias in agent.critic.biases)
    for weight in agent.critic.weights[1:3]:
        for member in weight:
            torch.testing.assert_close(member @ member.T, 2 * torch.eye(64), atol=1e-4, rtol=0)
        assert not torch.equal(*weight)
    assert len(agent.critic.weights) == 4
    assert equal(copies(agent.critic), copies(agent.critic_target))


@pytest.mark.parametrize("x", [[0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]])
def test_act_answers_in_the_environments_bounds(x):
    """A policy that outputs the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(cql, low=low.tolist(), high=high.tolist()).policy
    constant_net(policy.net, 0.0)
    policy.net[-1].bias.data[:A] = torch.tensor(x).atanh()
    wanted = low + (torch.tensor(x) + 1) / 2 * (high - low)
    for observations in (torch.randn(5, S), torch.randn(5, S).double(), torch.randn(S)):
        a = policy.act(observations)
        assert isinstance(a, torch.Tensor)
        torch.testing.assert_close(a, wanted.expand(*observations.shape[:-1], A))
        array = policy.act(observations.numpy())
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, a.numpy())


def test_act_samples_when_asked():
    """Around the squashed mean, as training does, inside the bounds."""
    policy = learner(cql, low=[-2.0, -1.0], high=[2.0, 3.0]).policy
    s = torch.randn(1, S).expand(4000, S)
    assert torch.equal(policy.act(s), policy.act(s))
    constant_net(policy.net, 0.0)
    policy.net[-1].bias.data[A:] = -2.0
    a = policy.act(s, deterministic=False)
    assert a.shape == (4000, A)
    torch.testing.assert_close(a.mean(0), torch.tensor([0.0, 1.0]), atol=0.05, rtol=0)
    scaled, _ = policy(s, 1)
    torch.testing.assert_close(a.std(0), 2 * scaled[:, 0].std(0).detach(), atol=0.03, rtol=0)
    policy.net[-1].bias.data[A:] = 2.0
    a = policy.act(s, deterministic=False)
    assert (a >= torch.tensor([-2.0, -1])).all() and (a <= torch.tensor([2.0, 3])).all()


def test_states_are_normalised():
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    rows["next_observations"] = rows["observations"] + 1
    agent = learner(cql, rows)
    s, _, _, s_next, _ = batch(agent)
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(s_next - s, (1 / agent.policy.scaling.std).expand(64, S))
    mu = agent.policy.net(s)[:, :A]
    torch.testing.assert_close(agent.policy.act(rows["observations"]), torch.tanh(mu))


# --------------------------------------------------------------------------------- The critics


def test_target_is_that_of_the_policys_first_action():
    """y = r + γ (1 - d) min Q'(s', a') with a' of the policy at s', and no entropy; some rows are
    terminals."""
    agent, n = lively(learner(cql, gamma=0.9, n_actions=3)), 3
    agent.log_alpha.data.fill_(2.0)  # has no say
    agent.critic.biases[-1].data += 100  # nor have the online critics
    s, a, r, s_next, d = batch(agent)
    assert 0 < d.sum() < len(d) and a.shape[1] > 1
    torch.manual_seed(5)
    y, _, _ = agent.target_and_draws(s, r, s_next, d)
    torch.manual_seed(5)
    pi, _ = agent.policy(torch.cat([s, s_next]), n)
    q = torch.minimum(*agent.critic_target(s_next, pi[64:, 0]))
    torch.testing.assert_close(y, torch.where(d > 0, r, r + 0.9 * q).detach())
    assert not y.requires_grad


@pytest.mark.parametrize("d", [0.0, 1.0])
def test_target_is_masked_by_terminals_alone(d):
    agent = learner(cql, gamma=0.9)
    constant_critic(agent.critic, 0, 0)
    constant_critic(agent.critic_target, 5, 3)
    s, a, r, s_next, _ = batch(agent)
    y_and_draws = agent.target_and_draws(s, r, s_next, torch.full_like(r, d))
    td, *_ = agent.critic_loss(s, a, *y_and_draws)
    torch.testing.assert_close(td, 2 * (r + 0.9 * (1 - d) * 3).square().mean())


def test_td_loss_is_the_sum_of_both_critics():
    agent = learner(cql)
    constant_critic(agent.critic, 1, -2)
    s, a, r, s_next, d = batch(agent)
    y, *draws = agent.target_and_draws(s, r, s_next, d)
    td, _, q = agent.critic_loss(s, a, y, *draws)
    torch.testing.assert_close(td, ((1 - y) ** 2 + (-2 - y) ** 2).mean())
    assert q == -0.5


def test_gap_is_a_soft_maximum_less_the_datas_q():
    """One pass over all actions equals one pass per action, with the densities they came from."""
    agent, n = lively(learner(cql, n_actions=3)), 3
    agent.policy.net[-1].weight.data *= 30
    s, a, r, s_next, d = batch(agent)
    torch.manual_seed(5)
    _, gap, q_data = agent.critic_loss(s, a, *agent.target_and_draws(s, r, s_next, d))
    torch.manual_seed(5)
    pi, log_pi = agent.policy(torch.cat([s, s_next]), n)
    uniform = 2 * torch.rand(len(s), n, A) - 1
    logits = []
    for j in range(n):
        logits.append(agent.critic(s, uniform[:, j]) + A * math.log(2))
        logits.append(agent.critic(s, pi[: len(s), j]) - log_pi[: len(s), j])
        logits.append(agent.critic(s, pi[len(s) :, j]) - log_pi[len(s) :, j])
    soft_max = torch.stack(logits).logsumexp(0)
    torch.testing.assert_close(q_data, agent.critic(s, a).mean())
    wanted = (soft_max - agent.critic(s, a)).mean((1, 2)).sum()
    torch.testing.assert_close(gap, wanted, atol=1e-4, rtol=1e-5)


def test_soft_maximum_is_the_integral_over_actions():
    """With importance weights, the mean of exp(Q) / p estimates ∫ exp Q(s, a) da. Where Q is the
    same everywhere, the gap of each critic is log 3n + A log 2."""
    agent = learner(cql, data(64), n_actions=20_000)
    constant_critic(agent.critic, 7, -7)
    agent.policy.net[-1].weight.data.zero_()  # a policy whose samples cover all actions, σ = 1
    agent.policy.net[-1].bias.data = torch.tensor([0.0, 0.0, 0.458, 0.458])
    s, a, r, s_next, d = (x[:2] for x in batch(agent))
    _, gap, _ = agent.critic_loss(s, a, *agent.target_and_draws(s, r, s_next, d))
    assert gap.item() / 2 == pytest.approx(math.log(60_000) + A * math.log(2), abs=0.1)


def test_pushes_q_up_at_the_data_and_down_elsewhere():
    rows = data(actions=torch.full((64, A), 0.5), rewards=torch.zeros(64, 1))
    agent = learner(cql, rows, learning_rate=1e-2, gamma=0.0)
    s = agent.data[0]
    before = agent.critic(s, torch.full((64, A), -0.5)).mean()
    for _ in range(50):
        agent.update_critic(*batch(agent))
    at_data = agent.critic(s, rows["actions"]).mean()
    elsewhere = agent.critic(s, torch.full((64, A), -0.5)).mean()
    assert at_data > elsewhere + 1 and elsewhere < before - 1


@pytest.mark.parametrize("cql_alpha", [0.0, 3.0])
def test_critics_descend_both_losses(cql_alpha):
    """Their gradient is that of the TD loss plus α_cql times the gap, and reaches them alone."""
    agent = lively(learner(cql, cql_alpha=cql_alpha))
    rows = batch(agent)
    alone = copy.deepcopy(agent)
    torch.manual_seed(5)
    s, a, r, s_next, d = rows
    td, gap, q = alone.critic_loss(s, a, *alone.target_and_draws(s, r, s_next, d))
    wanted = gradient_of(td + cql_alpha * gap, alone.critic)
    others = copies(agent.policy) + copies(agent.critic_target)
    torch.manual_seed(5)
    metrics = agent.update_critic(*rows)
    torch.testing.assert_close(gradients(agent.critic), wanted, atol=1e-4, rtol=1e-4)
    assert equal(others, copies(agent.policy) + copies(agent.critic_target))
    assert all(p.grad is None for p in (*agent.policy.parameters(), agent.log_alpha))
    found = {"critic": td + cql_alpha * gap, "td": td, "gap": gap}
    for key, value in found.items():
        torch.testing.assert_close(metrics[f"losses/{key}"], value, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(metrics["values/q"], q, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("slice_size", [1, 5, 8])
def test_slices_add_up_to_the_batch(slice_size):
    """The last slice of 5 is a shorter one."""
    whole = lively(learner(cql, slice_size=16))
    sliced = copy.deepcopy(whole)
    sliced.slice_size = slice_size
    rows = [x[:16] for x in batch(whole)]
    metrics = []
    for agent in (whole, sliced):
        torch.manual_seed(5)
        metrics.append(agent.update_critic(*rows))
    for key, value in metrics[0].items():
        torch.testing.assert_close(metrics[1][key], value, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        gradients(sliced.critic), gradients(whole.critic), atol=1e-4, rtol=1e-4
    )


def test_slices_are_64_states_on_a_cpu():
    sizes = [learner(cql, batch_size=256, slice_size=size).slice_size for size in (0, 5)]
    assert sizes == [64, 5]


@pytest.mark.parametrize("target_gap, sign", [(-100.0, 1), (100.0, -1)])
def test_lagrange_factor_follows_the_gap(target_gap, sign):
    agent = learner(cql, lagrange=True, target_gap=target_gap, learning_rate=1e-2)
    agent.update_critic(*batch(agent))
    assert sign * agent.log_factor.item() > 0
    still = learner(cql, lagrange=False, target_gap=target_gap)
    metrics = still.update_critic(*batch(still))
    assert still.log_factor.item() == 0 and "values/lagrange_factor" not in metrics


def test_lagrange_loss_and_its_factor():
    """The factor multiplies α_cql, and its own loss compares one critic's gap, not the sum."""
    agent = lively(learner(cql, lagrange=True, cql_alpha=3.0, target_gap=1.5))
    agent.log_factor.data.fill_(math.log(2.0))
    metrics = agent.update_critic(*batch(agent))
    assert metrics["values/lagrange_factor"].item() == pytest.approx(2.0)
    td, gap = metrics["losses/td"].item(), metrics["losses/gap"].item()
    assert metrics["losses/critic"].item() == pytest.approx(td + 3 * 2 * gap, rel=1e-4)
    assert agent.log_factor.grad.item() == pytest.approx(-2 * (gap / 2 - 1.5), rel=1e-4)


# ------------------------------------------------------------------- The policy and the targets


def test_actor_gradient_is_that_of_its_loss():
    """α log π - min Q at the policy's own sample, with gradients for the policy alone."""
    agent = lively(learner(cql))
    agent.log_alpha.data.fill_(math.log(0.3))
    s, *_ = batch(agent)
    torch.manual_seed(5)
    pi, log_pi = agent.policy(s, 1)
    first, second = split_critic(agent.critic, cql)
    sa = torch.cat([s, pi[:, 0]], dim=-1)
    q = torch.minimum(first(sa), second(sa))
    assert 0.1 < (first(sa) < second(sa)).float().mean() < 0.9
    wanted = gradient_of((0.3 * log_pi[:, 0] - q).mean(), agent.policy)
    frozen = copies(agent.critic)
    torch.manual_seed(5)
    metrics = agent.update_actor(s)
    torch.testing.assert_close(gradients(agent.policy), wanted)
    assert equal(frozen, copies(agent.critic))
    assert all(p.grad is None and p.requires_grad for p in agent.critic.parameters())
    torch.testing.assert_close(metrics["losses/actor"], (0.3 * log_pi[:, 0] - q).mean())
    torch.testing.assert_close(metrics["values/q_policy"], q.mean())
    torch.testing.assert_close(metrics["values/entropy"], -log_pi.mean())
    torch.testing.assert_close(metrics["values/alpha"], torch.tensor(0.3))


@pytest.mark.parametrize("log_sigma, sign", [(-4.0, 1), (0.0, -1)])
def test_temperature_rises_where_the_entropy_is_too_low(log_sigma, sign):
    """L(α) = -log α (log π + H̄), H̄ = -A: its gradient is the entropy's surplus over -A."""
    agent = learner(cql, policy_learning_rate=1e-2)
    agent.policy.net[-1].bias.data[A:] = log_sigma
    s, *_ = batch(agent)
    entropy = agent.update_actor(s)["values/entropy"].item()
    assert agent.log_alpha.grad.item() == pytest.approx(entropy + A, rel=1e-4)
    assert sign * agent.log_alpha.item() > 0


def test_targets_follow_by_tau():
    agent = learner(cql, tau=0.1)
    assert equal(copies(agent.critic_target), copies(agent.critic))  # they begin equal
    for parameter in agent.critic.parameters():
        parameter.data += torch.randn_like(parameter)
    before, online = copies(agent.critic_target), copies(agent.critic)
    agent.update_targets()
    wanted = [old + 0.1 * (new - old) for old, new in zip(before, online)]
    torch.testing.assert_close(copies(agent.critic_target), wanted)
    assert equal(copies(agent.critic), online)


def test_update_is_a_step_of_each():
    """Critics, then the policy on the new critics, then the targets: once each a call."""
    flags = dict(tau=0.1, policy_learning_rate=1e-3, learning_rate=1e-3, lagrange=True)
    agent = learner(cql, **flags)
    alone = learner(cql, **flags)
    alone.load_state_dict(agent.state_dict())
    alone.data = agent.data
    assert [agent.phase(step) for step in (1, 2, 1000)] == 3 * [agent.update]
    torch.manual_seed(7)
    agent.update()
    torch.manual_seed(7)
    s, a, r, s_next, d = alone.sample()
    assert s.shape == (16, S) and a.shape == (16, A) and d.shape == (16, 1)
    alone.update_critic(s, a, r, s_next, d)
    alone.update_actor(s)
    for target, online in zip(alone.critic_target.parameters(), alone.critic.parameters()):
        target.data.lerp_(online.data, 0.1)
    for key, value in agent.state_dict().items():
        torch.testing.assert_close(alone.state_dict()[key], value, msg=key)
    for optimizer in (value for key, value in vars(agent).items() if key.endswith("optimizer")):
        assert {int(state["step"]) for state in optimizer.state.values()} == {1}


def test_rates_are_those_of_the_flags():
    agent = learner(cql, learning_rate=0.1, policy_learning_rate=0.2)
    rates = {key: value.param_groups[0]["lr"] for key, value in vars(agent).items() if "opt" in key}
    fast, slow = ("critic_optimizer", "factor_optimizer"), ("policy_optimizer", "alpha_optimizer")
    assert rates == dict.fromkeys(fast, 0.1) | dict.fromkeys(slow, 0.2)


def test_values_of_a_loop():
    """One state that returns to itself with reward 1, no penalty: Q = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows |= dict(rewards=torch.ones(64, 1), terminals=torch.zeros(64, 1))
    agent = learner(cql, rows, gamma=0.5, tau=0.1, learning_rate=1e-2, cql_alpha=0.0)
    for _ in range(200):
        agent.update()
    q = agent.critic(*batch(agent)[:2]).detach()
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)


def test_a_checkpoint_holds_temperature_and_factor():
    agent = learner(cql, lagrange=True)
    assert {"log_alpha", "log_factor"} <= agent.state_dict().keys()


# --------------------------------------------------------------------------- Validation, flags


def test_validation_is_the_losses_of_held_out_rows():
    agent, held_out = lively(learner(cql)), data(24)
    s, s_next = map(
        agent.policy.scaling.state, (held_out["observations"], held_out["next_observations"])
    )
    torch.manual_seed(5)
    draws = agent.target_and_draws(s, held_out["rewards"], s_next, held_out["terminals"])
    td, gap, _ = agent.critic_loss(s, held_out["actions"], *draws)
    torch.manual_seed(5)
    found = agent.validate(held_out)
    assert found.keys() == {"td", "gap"}
    torch.testing.assert_close(found["td"], td)
    torch.testing.assert_close(found["gap"], gap)


@pytest.mark.parametrize("n", [1000, 1001, 9900])
def test_validation_looks_at_all_held_out_episodes(n):
    """At most 1,000 rows, evenly spaced: the last thousand counts like the first."""
    agent, held_out, seen = learner(cql), data(n), []
    held_out["rewards"] = torch.arange(n).float()[:, None]
    target_and_draws = agent.target_and_draws
    agent.target_and_draws = lambda *x: seen.append(x[1][:, 0]) or target_and_draws(*x)
    agent.validate(held_out)
    (rows,) = seen
    assert n / 10 / 2 < len(rows) <= 1000
    assert rows[0] == 0 and rows[-1] >= n - 1 - n // len(rows)
    assert len(rows.diff().unique()) == 1


@pytest.mark.parametrize("flags", [dict(n_actions=0), dict(slice_size=-1)])
def test_impossible_flags_are_refused(flags):
    with pytest.raises(SystemExit, match="--n-actions must be 1 or more, --slice-size 0 or more"):
        learner(cql, **flags)
