"""What rebrac.py claims, each against an independent computation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load
from units import (
    A,
    S,
    constant_critic,
    constant_net,
    copies,
    data,
    equal,
    gradient_of,
    gradients,
    learner,
)

rebrac = load("rebrac")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def lively(agent):
    """Critics and policies whose outputs differ from state to state and from each other: as they
    begin, all is near 0."""
    s, a, *_ = agent.data
    for net in (agent.critic, agent.critic_target, agent.policy, agent.policy_target):
        for parameter in net.parameters():
            parameter.data = 0.5 * torch.randn_like(parameter)
    for critic in (agent.critic, agent.critic_target):
        critic.biases[-1].data -= critic(s, a).mean((1, 2))[:, None, None].detach()
    return agent


# ---------------------------------------------------------------------------------------- Data


def test_every_step_is_paired_with_the_next_action_of_its_episode():
    """Three episodes: one ends at a terminal, one at a time limit, one goes on to the last row."""
    terminals = torch.zeros(7, 1)
    terminals[2] = 1
    episodes = torch.tensor([4, 4, 4, 8, 8, 9, 9])
    rows = data(7, terminals=terminals, episodes=episodes)
    s, a, r, s_next, a_next, d = learner(rebrac, rows).data
    kept = [0, 1, 2, 3, 5]  # 4 and 6 have no next action and are no end
    torch.testing.assert_close(s, rows["observations"][kept])  # as they are, not normalised
    torch.testing.assert_close(a, rows["actions"][kept])
    torch.testing.assert_close(r, rows["rewards"][kept])
    torch.testing.assert_close(s_next, rows["next_observations"][kept])
    torch.testing.assert_close(d, terminals[kept])
    for i in (0, 1, 3, 4):  # the terminal's is never used
        torch.testing.assert_close(a_next[i], rows["actions"][kept[i] + 1])


def test_data_without_next_actions_are_refused():
    with pytest.raises(SystemExit, match="episodes of two steps"):
        learner(rebrac, data(8, episodes=torch.arange(8), terminals=torch.zeros(8, 1)))


def test_batches_are_rows_of_the_data():
    agent, seen = learner(rebrac), set()
    for _ in range(40):
        batch = agent.sample()
        assert [x.shape for x in batch] == [(16, k) for k in (S, A, 1, S, A, 1)]
        for row in zip(*batch):
            (i,) = (agent.data[1] == row[1]).all(1).nonzero().flatten().tolist()
            seen.add(i)
            assert all(torch.equal(x, column[i]) for x, column in zip(row, agent.data))
    assert len(seen) == len(agent.data[0])


# ------------------------------------------------------------------------------------ Networks


@pytest.mark.parametrize("layer_norm", [True, False])
def test_critic_is_two_plain_networks(layer_norm):
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


def test_layer_norm_is_a_flag():
    agents = [learner(rebrac, layer_norm=flag) for flag in (True, False)]
    assert [len(agent.critic.gains) for agent in agents] == [3, 0]


def test_networks_begin_small():
    agent = learner(rebrac, hidden_dim=256)
    s = 5 * torch.randn(100, S)
    assert np.abs(agent.policy.act(s).numpy()).max() < 0.1
    assert agent.critic(s, torch.zeros(100, A)).abs().max() < 1
    assert all((bias == 0.1).all() for bias in agent.critic.biases[:-1])
    assert all((layer.bias == 0.1).all() for layer in agent.policy.net[:-1:2])
    for part in (agent.critic.weights[0], agent.policy.net[0].weight):
        spread = part.std().item() * 3**0.5  # uniform, by the number of inputs
        assert spread == pytest.approx((S + A if part.dim() == 3 else S) ** -0.5, rel=0.05)


@pytest.mark.parametrize("x", [[0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]])
def test_act_answers_in_the_environments_bounds(x):
    """A policy that outputs the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(rebrac, low=low.tolist(), high=high.tolist()).policy
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


def test_states_stay_as_they_are():
    rows = data(observations=10 * torch.randn(64, S) + 5)
    agent = lively(learner(rebrac, rows))
    torch.testing.assert_close(agent.policy.act(agent.data[0]), agent.policy(agent.data[0]))


# --------------------------------------------------------------------------------- The critics


@pytest.mark.parametrize("critic_bc", [0.0, 2.0])
def test_target_pays_for_the_distance(critic_bc):
    """y = r + γ (1 - d) (min Q' - β_2 |ã' - a'|²) in a batch in which some rows are terminals."""
    agent = lively(learner(rebrac, gamma=0.9, critic_bc=critic_bc, policy_noise=0.0))
    constant_critic(agent.critic, 1, -2)
    s, a, r, s_next, a_next, d = agent.data
    assert 0 < d.sum() < len(d) and a.shape[1] > 1
    agent.policy.net[-1].bias.data += 9.0  # the online policy has no say
    loss, q, distance = agent.critic_loss(s, a, r, s_next, a_next, d)
    a_tilde = agent.policy_target(s_next)
    wanted = (a_tilde - a_next).square().sum(1, keepdim=True)
    torch.testing.assert_close(distance, wanted)
    value = torch.minimum(*agent.critic_target(s_next, a_tilde)) - critic_bc * wanted
    y = torch.where(d > 0, r, r + 0.9 * value)
    torch.testing.assert_close(loss, ((1 - y) ** 2 + (-2 - y) ** 2).mean())
    assert q.mean() == -0.5 and not distance.requires_grad


@pytest.mark.parametrize("d", [0.0, 1.0])
@pytest.mark.parametrize("critic_bc", [0.0, 2.0])
def test_target_is_masked_by_terminals_alone(d, critic_bc):
    agent = learner(rebrac, gamma=0.9, critic_bc=critic_bc, policy_noise=0.0)
    for critic, values in ((agent.critic, (0, 0)), (agent.critic_target, (5, 3))):
        constant_critic(critic, *values)
    s, a, r, s_next, a_next, _ = agent.sample()
    loss, _, distance = agent.critic_loss(s, a, r, s_next, a_next, torch.full_like(r, d))
    y = r + 0.9 * (1 - d) * (3 - critic_bc * distance)
    torch.testing.assert_close(loss, 2 * y.square().mean())


def test_target_actions_are_the_target_policys_plus_clipped_noise():
    agent = lively(learner(rebrac))
    seen, data = [], agent.data
    agent.critic_target.forward = lambda s, a: seen.append(a) or torch.zeros(2, len(a), 1)
    plain = agent.policy_target(data[3])
    agent.policy_target.forward = lambda s: plain

    def action(**flags):
        vars(agent.args).update(flags)
        _, _, distance = agent.critic_loss(*data)
        wanted = (seen[-1] - data[4]).square().sum(1, keepdim=True)  # pays for the noise, too
        torch.testing.assert_close(distance, wanted)
        return seen[-1]

    torch.testing.assert_close(action(policy_noise=0.0), plain)
    plain = 0 * plain
    noise = action(policy_noise=0.2, noise_clip=9.0)
    assert noise.std().item() == pytest.approx(0.2, rel=0.25)
    noise = action(policy_noise=100.0, noise_clip=0.05)
    assert noise.abs().max() < 0.051 and (noise.abs() > 0.049).float().mean() > 0.9
    assert action(policy_noise=100.0, noise_clip=100.0).abs().max() <= 1  # still an action


def test_critics_descend_their_loss_alone():
    agent = lively(learner(rebrac))
    torch.manual_seed(5)
    loss, q, distance = agent.critic_loss(*agent.data)
    wanted = gradient_of(loss, agent.critic)
    nets = (agent.policy, agent.policy_target, agent.critic_target)
    others = [copies(net) for net in nets]
    torch.manual_seed(5)
    metrics = agent.update_critic(*agent.data)
    torch.testing.assert_close(gradients(agent.critic), wanted)
    assert all(equal(old, copies(net)) for old, net in zip(others, nets))
    assert all(parameter.grad is None for net in nets for parameter in net.parameters())
    found = {"losses/critic": loss, "losses/critic_bc": distance.mean(), "values/q": q.mean()}
    for key, value in found.items():
        torch.testing.assert_close(metrics[key], value)


def test_values_of_a_loop():
    """One state that returns to itself with reward 1: Q = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows |= dict(rewards=torch.ones(64, 1), terminals=torch.zeros(64, 1))
    agent = learner(rebrac, rows, gamma=0.5, tau=0.1, learning_rate=1e-2, critic_bc=0.0)
    for step in range(1, 201):
        agent.phase(step)()
        agent.update_targets()
    q = agent.critic(*agent.data[:2]).detach()
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.2, rtol=0)


# ------------------------------------------------------------------- The actor and the targets


@pytest.mark.parametrize("actor_bc", [0.0, 0.3, 1e6])
def test_actor_gradient_is_that_of_its_loss(actor_bc):
    """β_1 |π - a|² - λ min Q, λ = 1 / mean |min Q| a constant; the critics stay as they are."""
    agent = lively(learner(rebrac, actor_bc=actor_bc))
    s, a, *_ = agent.data
    pi = agent.policy(s)
    one, two = agent.critic(s, pi)
    assert 0.1 < (one < two).float().mean() < 0.9 and 0.1 < (one < 0).float().mean() < 0.9
    q = torch.minimum(one, two)
    bc = (pi - a).square().sum(1).mean()
    wanted = gradient_of(actor_bc * bc - q.mean() / q.abs().mean().detach(), agent.policy)
    frozen = copies(agent.critic)
    metrics = agent.update_actor(s, a)
    torch.testing.assert_close(gradients(agent.policy), wanted, atol=1e-5, rtol=1e-4)
    assert equal(frozen, copies(agent.critic))
    assert all(p.requires_grad and p.grad is None for p in agent.critic.parameters())
    torch.testing.assert_close(metrics["losses/bc"], bc)
    torch.testing.assert_close(metrics["values/lambda"], 1 / q.abs().mean())
    torch.testing.assert_close(metrics["losses/actor"], actor_bc * bc - q.mean() / q.abs().mean())


def test_lambda_makes_q_independent_of_the_rewards_scale():
    found = []
    for scale in (1, 1000):
        torch.manual_seed(0)
        agent = lively(learner(rebrac))
        agent.critic.weights[-1].data *= scale
        agent.critic.biases[-1].data *= scale
        lam = agent.update_actor(*agent.data[:2])["values/lambda"]
        found.append((gradients(agent.policy), lam))
    torch.testing.assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0][1], 1000 * found[1][1])


def test_targets_follow_by_tau():
    agent = learner(rebrac, tau=0.1)
    pairs = [(agent.policy_target, agent.policy), (agent.critic_target, agent.critic)]
    for target, online in pairs:
        assert equal(copies(target), copies(online))  # they begin equal
        for parameter in online.parameters():
            parameter.data += torch.randn_like(parameter)
    before = [copies(target) for target, _ in pairs]
    agent.update_targets()
    for (target, online), old in zip(pairs, before):
        wanted = [was + 0.1 * (goal - was) for was, goal in zip(old, copies(online))]
        torch.testing.assert_close(copies(target), wanted)


@pytest.mark.parametrize("delay", [1, 2, 3])
def test_the_actor_steps_once_in_so_many_steps(delay):
    agent = learner(rebrac, policy_delay=delay)
    phases = [agent.phase(step) for step in range(1, 7)]
    both = [step % delay == 0 for step in range(1, 7)]
    assert phases == [agent.update_both if found else agent.update for found in both]
    for phase in phases:
        phase()
    for optimizer, steps in ((agent.critic_optimizer, 6), (agent.policy_optimizer, 6 // delay)):
        assert {int(state["step"]) for state in optimizer.state.values()} == {steps}


def test_a_critic_step_moves_the_critic_alone():
    agent = learner(rebrac)
    nets = (agent.policy, agent.policy_target, agent.critic_target)
    before, critic = [copies(net) for net in nets], copies(agent.critic)
    agent.update()
    assert all(equal(old, copies(net)) for old, net in zip(before, nets))
    assert not equal(critic, copies(agent.critic))


def test_an_actor_step_follows_the_critics_on_the_same_batch():
    """Critics, then the actor on the new critics, then both targets, after both steps."""
    rows = data()
    agent, alone = (learner(rebrac, rows, tau=0.1, learning_rate=1e-2) for _ in range(2))
    alone.load_state_dict(agent.state_dict())
    torch.manual_seed(5)
    metrics = agent.update_both()
    torch.manual_seed(5)
    s, a, *rest = alone.sample()
    wanted = alone.update_critic(s, a, *rest) | alone.update_actor(s, a)
    for target, online in (
        (alone.policy_target, alone.policy),
        (alone.critic_target, alone.critic),
    ):
        for one, other in zip(target.parameters(), online.parameters()):
            one.data.lerp_(other.data, 0.1)
    for key, value in agent.state_dict().items():
        torch.testing.assert_close(alone.state_dict()[key], value, msg=key)
    assert metrics.keys() == wanted.keys()
    for key, value in wanted.items():
        torch.testing.assert_close(metrics[key], value)


# --------------------------------------------------------------------------- Validation, flags


def test_validation_is_the_losses_of_held_out_rows():
    agent, held_out = lively(learner(rebrac)), data(24)
    rows = learner(rebrac, held_out).data
    s, a = rows[:2]
    assert len(s) < 24  # rows without a next action are left out here, too
    torch.manual_seed(5)
    loss, *_ = agent.critic_loss(*rows)
    torch.manual_seed(5)
    found = agent.validate(held_out)
    assert found.keys() == {"critic", "bc"}
    torch.testing.assert_close(found["critic"], loss)
    torch.testing.assert_close(found["bc"], (agent.policy(s) - a).square().sum(1).mean())


def test_held_out_rows_without_next_actions_stop_nothing():
    held_out = data(4, episodes=torch.arange(4), terminals=torch.zeros(4, 1))
    learner(rebrac).validate(held_out)


def test_impossible_delay_is_refused():
    with pytest.raises(SystemExit, match="--policy-delay 0: must be 1 or more"):
        learner(rebrac, policy_delay=0)
