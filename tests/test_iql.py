"""What iql.py claims, each against an independent computation."""

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
    learner,
    split_critic,
)

iql = load("iql")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------ Networks


@pytest.mark.parametrize("layers", [2, 3])
def test_twin_critic_is_two_networks(layers):
    critic = iql.TwinCritic(S, A, 16, hidden_layers=layers)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    for i, net in enumerate(split_critic(critic, iql)):
        torch.testing.assert_close(q[i], net(torch.cat([s, a], dim=-1)))


def test_log_density_is_the_normal_distributions():
    policy = learner(iql).policy
    policy.log_sigma.data = torch.tensor([-9.0, 0.3])  # the first is held at -5
    s, a = 3 * torch.randn(32, S), 2 * torch.rand(32, A) - 1
    mu, log_sigma = policy(s)
    torch.testing.assert_close(mu, torch.tanh(policy.net(s)))
    torch.testing.assert_close(log_sigma, torch.tensor([-5.0, 0.3]))
    wanted = distributions.Normal(mu, log_sigma.exp()).log_prob(a).sum(-1, keepdim=True)
    torch.testing.assert_close(policy.log_prob(s, a), wanted)
    policy.log_sigma.data.fill_(9.0)
    assert policy(s)[1].max() == 2


@pytest.mark.parametrize("x", [[0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]])
def test_act_answers_in_the_environments_bounds(x):
    """A policy that outputs the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(iql, low=low.tolist(), high=high.tolist()).policy
    constant_net(policy.net, 0.0)
    policy.net[-1].bias.data = torch.tensor(x).atanh()
    wanted = low + (torch.tensor(x) + 1) / 2 * (high - low)
    for observations in (torch.randn(5, S), torch.randn(5, S).double(), torch.randn(S)):
        a = policy.act(observations)
        assert isinstance(a, torch.Tensor)
        torch.testing.assert_close(a, wanted.expand(*observations.shape[:-1], A))
        array = policy.act(observations.numpy())
        assert isinstance(array, np.ndarray)
        np.testing.assert_allclose(array, a.numpy())


def test_act_samples_when_asked():
    """Around the mean, with the policy's standard deviations, inside the bounds."""
    policy = learner(iql, low=[-2.0, -1.0], high=[2.0, 3.0]).policy
    policy.log_sigma.data = torch.tensor([0.1, 0.3]).log()
    s = torch.randn(1, S).expand(4000, S)
    mean, a = policy.act(s), policy.act(s, deterministic=False)
    assert torch.equal(mean, policy.act(s))
    torch.testing.assert_close(a.mean(0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(a.std(0), torch.tensor([0.2, 0.6]), atol=0.03, rtol=0)
    policy.log_sigma.data.fill_(2.0)
    a = policy.act(s, deterministic=False)
    assert (a >= torch.tensor([-2.0, -1])).all() and (a <= torch.tensor([2.0, 3])).all()


def test_states_are_normalised():
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    rows["next_observations"] = rows["observations"] + 1
    agent = learner(iql, rows)
    s, _, _, s_next, _ = batch(agent)
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(s_next - s, (1 / agent.policy.scaling.std).expand(64, S))
    mu, _ = agent.policy(s)
    torch.testing.assert_close(agent.policy.act(rows["observations"]), mu)  # bounds are -1 and 1


# ---------------------------------------------------------------------------------- The losses


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_value_is_the_expectile_of_the_smaller_q(expectile):
    """At the loss's minimum, τ E[(Q - V)+] = (1 - τ) E[(V - Q)+] for Q drawn from anything."""
    agent = learner(iql, expectile=expectile)
    q, s, a = torch.randn(4000, 1).exp(), torch.zeros(4000, S), torch.zeros(4000, A)
    agent.critic_target.forward = lambda *_: torch.stack([q + 1, q])
    grid = torch.linspace(0, 5, 501)
    balance = [
        expectile * (q - v).clamp(min=0).mean() - (1 - expectile) * (v - q).clamp(min=0).mean()
        for v in grid
    ]
    wanted = grid[torch.stack(balance).abs().argmin()].item()
    found = []
    for v in grid:
        constant_net(agent.v, v.item())
        found.append(agent.losses(s, a, q, s, q)[0]["v"].detach())
    assert grid[torch.stack(found).argmin()].item() == pytest.approx(wanted, abs=0.02)
    assert wanted == pytest.approx(q.mean().item(), abs=0.02) or expectile > 0.5


def test_value_loss_by_hand():
    """u = 2 weighs τ, u = -1 weighs 1 - τ; Q' is asked for the data's actions."""
    agent = learner(iql, expectile=0.8)
    constant_net(agent.v, 1.0)
    s, a = torch.randn(2, S), torch.tensor([[3.0, 5], [0, 5]])
    agent.critic_target.forward = lambda s, a: torch.stack([a[:, :1], a[:, :1] + 1])
    loss = agent.losses(s, a, a[:, :1], s, a[:, :1])[0]["v"]
    assert loss.item() == pytest.approx((0.8 * 4 + 0.2 * 1) / 2)


def test_clones_by_clipped_exponential_weights():
    agent = learner(iql, beta=2.0)
    agent.v.forward = lambda s: s[:, :1]  # 1 at s, -3 at s'
    agent.policy.log_sigma.data = torch.tensor([-0.5, 0.3])
    s, a = torch.randn(5, S), 2 * torch.rand(5, A) - 1
    s[:, 0] = 1.0
    q = torch.tensor([[-1.0], [1.0], [1.5], [3.0], [9.0]])
    agent.critic_target.forward = lambda *_: torch.stack([q, q + 1])
    losses, metrics = agent.losses(s, a, q, -3 * s, torch.zeros_like(q))
    torch.testing.assert_close(metrics["advantage/u"], q - 1)
    assert metrics["advantage/clipped"] == 0.2  # e^16, the last one's weight without the bound
    weight = torch.cat([torch.tensor([-4.0, 0, 1, 4]).exp(), torch.tensor([100.0])])
    mu, _ = agent.policy(s)
    normal = distributions.Normal(mu, torch.tensor([-0.5, 0.3]).exp())
    wanted = -(weight * normal.log_prob(a).sum(-1)).mean()
    torch.testing.assert_close(losses["actor"], wanted)


def test_bound_of_the_weights_is_a_flag():
    agent = learner(iql, beta=1.0, max_weight=2.0)
    constant_net(agent.v, 0.0)
    q = torch.tensor([[0.0], [5.0]])
    agent.critic_target.forward = lambda *_: torch.stack([q, q])
    s, a = torch.randn(2, S), torch.rand(2, A)
    losses, _ = agent.losses(s, a, q, s, q)
    wanted = -(torch.tensor([[1.0], [2.0]]) * agent.policy.log_prob(s, a)).mean()
    torch.testing.assert_close(losses["actor"], wanted)


def test_beta_0_is_behaviour_cloning():
    agent = learner(iql, beta=0.0)
    s, a, *_ = rows = batch(agent)
    losses, _ = agent.losses(*rows)
    torch.testing.assert_close(losses["actor"], -agent.policy.log_prob(s, a).mean())


@pytest.mark.parametrize("normalize_returns", [True, False])
def test_bootstraps_from_the_value_and_asks_no_policy(normalize_returns):
    """y = r + γ (1 - d) V(s') in a batch in which some rows are terminals."""
    agent = learner(iql, gamma=0.9, normalize_returns=normalize_returns)
    constant_critic(agent.critic, 1, -2)
    constant_critic(agent.critic_target, 50, 50)  # has no say in the target of Q
    agent.v.forward = lambda s: 3 * s[:, :1]
    for parameter in agent.policy.parameters():  # nor has the policy
        parameter.data.fill_(math.nan)
    s, a, r, s_next, d = batch(agent)
    assert 0 < d.sum() < len(d) and a.shape[1] > 1
    losses, _ = agent.losses(s, a, r, s_next, d)
    y = torch.where(d > 0, r, r + 0.9 * 3 * s_next[:, :1])
    torch.testing.assert_close(losses["critic"], ((1 - y) ** 2 + (-2 - y) ** 2).mean())


def test_each_loss_reaches_its_own_network_alone():
    agent = learner(iql, beta=0.01)  # rewards of hundreds: weights that are not all clipped
    nets = {"v": agent.v, "actor": agent.policy, "critic": agent.critic}
    losses, _ = agent.losses(*batch(agent))
    for name, loss in losses.items():
        agent.zero_grad()
        loss.backward(retain_graph=True)
        for other, net in nets.items():
            found = [p.grad is not None and bool(p.grad.any()) for p in net.parameters()]
            assert all(found) if other == name else not any(found), (name, other)
        assert all(parameter.grad is None for parameter in agent.critic_target.parameters())


# ------------------------------------------------------------------------------------ The step


def test_step_is_that_of_three_optimisers():
    """Each network moves by its own loss alone, all three from where the step began; then the
    target follows the new Q."""
    agent = learner(iql, learning_rate=1e-2, tau=0.1, beta=1.0)
    alone = copy.deepcopy(agent)
    torch.manual_seed(1)
    metrics = agent.update()
    torch.manual_seed(1)
    losses, _ = alone.losses(*alone.sample())
    nets, gradients = {"v": "v", "critic": "critic", "actor": "policy"}, {}
    for name, net in nets.items():
        torch.testing.assert_close(metrics[f"losses/{name}"], losses[name])
        parameters = list(getattr(alone, net).parameters())
        gradients[net] = torch.autograd.grad(losses[name], parameters, retain_graph=True)
    for name, gradient in gradients.items():
        net = getattr(alone, name)
        for parameter, value in zip(net.parameters(), gradient):
            assert value.abs().max() > 0
            parameter.grad = value
        torch.optim.Adam(net.parameters(), lr=1e-2).step()
        torch.testing.assert_close(copies(getattr(agent, name)), copies(net))
    pairs = zip(copies(alone.critic_target), copies(agent.critic), strict=True)
    wanted = [0.9 * old + 0.1 * new for old, new in pairs]
    torch.testing.assert_close(copies(agent.critic_target), wanted)


def test_one_call_is_one_step():
    agent = learner(iql)
    assert [agent.phase(step) for step in (1, 2, 3, 1000)] == 4 * [agent.update]
    agent.update()
    (steps,) = {int(state["step"]) for state in agent.optimizer.state.values()}
    assert steps == 1 and agent.t == 1


def test_batches_are_rows_of_the_data():
    """With each action its own state, reward, successor and terminal, from all of the data."""
    rows, seen = data(), set()
    agent = learner(iql, rows, normalize_returns=False)
    for _ in range(40):
        for s, a, r, s_next, d in zip(*agent.sample()):
            (i,) = (rows["actions"] == a).all(1).nonzero().flatten().tolist()
            seen.add(i)
            torch.testing.assert_close(s, agent.policy.scaling.state(rows["observations"])[i])
            following = agent.policy.scaling.state(rows["next_observations"])[i]
            torch.testing.assert_close(s_next, following)
            assert r == rows["rewards"][i] and d == rows["terminals"][i]
    assert len(seen) == 64


def test_targets_follow_by_tau():
    agent = learner(iql, tau=0.1)
    assert equal(copies(agent.critic_target), copies(agent.critic))  # they begin equal
    for parameter in agent.critic.parameters():
        parameter.data += torch.randn_like(parameter)
    before, online = copies(agent.critic_target), copies(agent.critic)
    agent.update_targets()
    wanted = [old + 0.1 * (new - old) for old, new in zip(before, online)]
    torch.testing.assert_close(copies(agent.critic_target), wanted)
    assert equal(copies(agent.critic), online)


def test_policy_rate_falls_along_a_cosine():
    agent = learner(iql, decay_steps=4, learning_rate=0.1)
    rates = [agent.update()["charts/policy_learning_rate"].item() for _ in range(4)]
    wanted = [0.05 * (1 + math.cos(math.pi * t / 4)) for t in (1, 2, 3, 4)]
    assert rates == pytest.approx(wanted, abs=1e-7)
    still, moving = copies(agent.policy), copies(agent.v)
    agent.update()  # and stays there
    assert equal(still, copies(agent.policy))
    assert not equal(moving, copies(agent.v))  # the others' rate does not fall


def test_a_checkpoint_knows_how_far_the_rate_fell():
    """Parameters, buffers and the optimiser's moments are enough to go on as if nothing was."""
    agent, resumed = (learner(iql, decay_steps=6, learning_rate=0.01) for _ in range(2))
    for _ in range(3):
        agent.update()
    resumed.load_state_dict(agent.state_dict())
    resumed.data = agent.data
    state = {"state": copy.deepcopy(agent.optimizer.state_dict()["state"])}
    resumed.optimizer.load_state_dict(resumed.optimizer.state_dict() | state)
    for each in (agent, resumed):
        torch.manual_seed(5)
        for _ in range(2):
            rate = each.update()["charts/policy_learning_rate"]
        assert rate.item() == pytest.approx(0.005 * (1 + math.cos(math.pi * 5 / 6)), abs=1e-7)
    for key, value in agent.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[key], value, msg=key)


def test_values_of_a_loop():
    """One state that returns to itself with reward 1: Q = V = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows |= dict(rewards=torch.ones(64, 1), terminals=torch.zeros(64, 1))
    flags = dict(gamma=0.5, tau=0.1, learning_rate=1e-2, normalize_returns=False)
    agent = learner(iql, rows, **flags)
    for _ in range(250):
        metrics = agent.update()
    q = agent.critic(*batch(agent)[:2]).detach()
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)
    assert metrics["values/v"].item() == pytest.approx(2, abs=0.1)
    assert metrics["values/q"].item() == pytest.approx(2, abs=0.1)


# --------------------------------------------------------------------------- Rewards and flags


def test_returns_range_is_scaled_to_1000():
    rows = data()  # 16 episodes of 4
    agent = learner(iql, rows)
    returns = agent.data[2].view(16, 4).sum(1)
    assert (returns.max() - returns.min()).item() == pytest.approx(1000, rel=1e-4)
    torch.testing.assert_close(agent.data[2], agent.reward_scale * rows["rewards"])
    plain = learner(iql, rows, normalize_returns=False)
    torch.testing.assert_close(plain.data[2], rows["rewards"])


def test_returns_are_the_episodes_own():
    """Numbered with gaps, and exact where the last reward belongs to a row that was dropped."""
    episodes = torch.tensor([2, 2, 2, 5, 5, 9])
    to_go = torch.tensor([10.0, 500, -500, 35, 20, 30])[:, None]  # returns 10, 35, 30
    agent = learner(iql, data(6, episodes=episodes, returns_to_go=to_go))
    assert float(agent.reward_scale) == pytest.approx(1000 / 25)


def test_returns_that_are_all_alike_stay():
    rows = data(8, rewards=torch.full((8, 1), 1 / 3), episodes=torch.arange(8) // 4)
    rows["returns_to_go"][0] *= 1 + 1e-7  # rounding
    torch.testing.assert_close(learner(iql, rows).data[2], rows["rewards"])


def test_validation_is_the_losses_of_held_out_rows():
    """Raw states and rewards, normalised and scaled as the training data's."""
    agent, held_out = learner(iql), data(24)
    scaling = agent.policy.scaling
    s, s_next = (
        scaling.state(held_out["observations"]),
        scaling.state(held_out["next_observations"]),
    )
    r = agent.reward_scale * held_out["rewards"]
    wanted, _ = agent.losses(s, held_out["actions"], r, s_next, held_out["terminals"])
    found = agent.validate(held_out)
    assert found.keys() == {"v", "actor", "critic"}
    for key, value in found.items():
        torch.testing.assert_close(value, wanted[key])


@pytest.mark.parametrize("expectile", [0.0, 1.0, 1.7])
def test_refuses_what_is_no_expectile(expectile):
    with pytest.raises(SystemExit, match=r"--expectile .*between 0 and 1"):
        learner(iql, expectile=expectile)


def test_gradient_of_the_actor_is_that_of_its_loss():
    """Weights are constants there: neither V nor the target critic learns from the policy."""
    agent = learner(iql, beta=0.001)
    s, a, *_ = rows = batch(agent)
    q, v = agent.critic_target(s, a).amin(0).detach(), agent.v(s).detach()
    weight = (0.001 * (q - v)).exp().clamp(max=100)
    wanted = gradient_of(-(weight * agent.policy.log_prob(s, a)).mean(), agent.policy)
    losses, _ = agent.losses(*rows)
    torch.testing.assert_close(gradient_of(losses["actor"], agent.policy), wanted)
