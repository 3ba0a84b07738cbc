"""What TD3+BC claims, each part against an independent computation."""

import pytest
import torch
from conftest import load
from units import (
    A,
    S,
    batch,
    constant_critic,
    copies,
    data,
    equal,
    gradient_of,
    gradients,
    learner,
    split_critic,
)

td3_bc = load("td3_bc")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("d", [0.0, 1.0])
def test_target_is_masked_by_terminals_alone(d):
    """y = r + γ (1 - d) min Q', read from the losses of critics that say 0."""
    agent = learner(td3_bc, gamma=0.9)
    constant_critic(agent.critic, 0, 0)
    constant_critic(agent.critic_target, 5, 3)
    s, a, r, s_next, _ = batch(agent)
    loss, _ = agent.critic_loss(s, a, r, s_next, torch.full_like(r, d))
    y = r + 0.9 * (1 - d) * 3
    torch.testing.assert_close(loss, 2 * y.square().mean())


def test_the_mask_is_the_datas():
    agent = learner(td3_bc, gamma=0.9)
    constant_critic(agent.critic, 0, 0)
    constant_critic(agent.critic_target, 5, 3)
    s, a, r, s_next, d = batch(agent)
    assert 0 < d.mean() < 1
    y = torch.where(d > 0, r, r + 0.9 * 3)
    torch.testing.assert_close(agent.critic_loss(s, a, r, s_next, d)[0], 2 * y.square().mean())


def test_target_actions_are_the_target_policys_plus_clipped_noise():
    agent = learner(td3_bc)
    seen, target = [], agent.policy_target
    del agent.critic_target
    agent.critic_target = lambda s, a: seen.append((s, a)) or torch.zeros(2, len(a), 1)
    next(target.parameters()).data += 0.3  # the online policy has no say
    s_next = batch(agent)[3]

    def action(**flags):
        vars(agent.args).update(flags)
        agent.critic_loss(*batch(agent))
        assert torch.equal(seen[-1][0], s_next)
        return seen[-1][1]

    plain = target(s_next)
    torch.testing.assert_close(action(policy_noise=0.0), plain)
    noise = action(policy_noise=0.2, noise_clip=9.0) - plain
    assert noise.std().item() == pytest.approx(0.2, rel=0.25)
    noise = action(policy_noise=100.0, noise_clip=0.05) - plain
    assert noise.abs().max() < 0.051 and (noise.abs() > 0.049).float().mean() > 0.9
    assert action(policy_noise=100.0, noise_clip=100.0).abs().max() <= 1  # still an action


def test_targets_follow_by_tau():
    agent = learner(td3_bc, tau=0.1)
    pairs = [(agent.policy_target, agent.policy), (agent.critic_target, agent.critic)]
    for target, online in pairs:
        assert equal(copies(target), copies(online))  # they begin equal
        for parameter in online.parameters():
            parameter.data += torch.randn_like(parameter)
    before = [copies(target) for target, _ in pairs]
    agent.update_targets()
    for (target, online), old in zip(pairs, before):
        for new, was, goal in zip(target.parameters(), old, online.parameters()):
            torch.testing.assert_close(new.data, was + 0.1 * (goal.data - was))


def test_critics_learn_the_value_of_a_loop():
    """One state that returns to itself with reward 1: V = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows |= {"rewards": torch.ones(64, 1), "terminals": torch.zeros(64, 1)}
    flags = dict(gamma=0.5, tau=0.1, learning_rate=1e-2, hidden_dim=16)
    agent = learner(td3_bc, rows, **flags)
    for _ in range(200):
        agent.update_critic(*batch(agent))
        agent.update_targets()
    q = agent.critic(*batch(agent)[:2])
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)


def test_the_actor_and_the_targets_wait_for_every_second_step():
    agent = learner(td3_bc, policy_delay=3)
    parts = {"critic": agent.critic, "policy": agent.policy, "target": agent.critic_target}
    moved = []
    for step in range(1, 7):
        before = {key: copies(part) for key, part in parts.items()}
        metrics = agent.phase(step)()
        moved.append([key for key, part in parts.items() if not equal(copies(part), before[key])])
        assert ("losses/actor" in metrics) == (step % 3 == 0) and "losses/critic" in metrics
    assert moved == 2 * [["critic"], ["critic"], ["critic", "policy", "target"]]


def actor_gradient(agent, s, a) -> torch.Tensor:
    agent.update_actor(s, a)
    return gradients(agent.policy)


def test_alpha_0_is_behaviour_cloning():
    agent = learner(td3_bc, alpha=0.0)
    s, a, *_ = batch(agent)
    wanted = gradient_of((agent.policy(s) - a).square().mean(), agent.policy)
    torch.testing.assert_close(actor_gradient(agent, s, a), wanted)


def test_bc_weight_0_is_td3():
    agent = learner(td3_bc, bc_weight=0.0, alpha=2.5)
    s, a, *_ = batch(agent)
    agent.critic.biases[-1].data -= agent.critic(s, agent.policy(s))[0].median()  # of both signs
    first, _ = split_critic(agent.critic, td3_bc)
    pi = agent.policy(s)
    q = first(torch.cat([s, pi], dim=-1))
    wanted = gradient_of(-q.mean() * 2.5 / q.detach().abs().mean(), agent.policy)
    torch.testing.assert_close(actor_gradient(agent, s, a), wanted)


def test_the_losses_add():
    agent = learner(td3_bc, bc_weight=0.5, alpha=2.0)
    s, a, *_ = batch(agent)
    first, _ = split_critic(agent.critic, td3_bc)
    pi = agent.policy(s)
    q = first(torch.cat([s, pi], dim=-1))
    loss = 0.5 * (pi - a).square().mean() - 2 * q.mean() / q.detach().abs().mean()
    wanted = gradient_of(loss, agent.policy)
    torch.testing.assert_close(actor_gradient(agent, s, a), wanted)


def test_lambda_makes_q_independent_of_the_rewards_scale():
    found = []
    for scale in (1, 1000):
        torch.manual_seed(0)
        agent = learner(td3_bc)
        agent.critic.weights[-1].data *= scale
        agent.critic.biases[-1].data *= scale
        s, a, *_ = batch(agent)
        lam = agent.update_actor(s, a)["values/lambda"]
        found.append((gradients(agent.policy), lam))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], 1000 * found[1][1])


def test_the_actors_step_leaves_the_critics_alone():
    agent = learner(td3_bc)
    s, a, *_ = batch(agent)
    before = copies(agent.critic)
    agent.critic_optimizer.zero_grad()
    agent.update_actor(s, a)
    assert equal(copies(agent.critic), before)
    assert all(parameter.grad is None for parameter in agent.critic.parameters())
    assert all(parameter.requires_grad for parameter in agent.critic.parameters())


def test_a_batch_holds_whole_transitions():
    rows = data()
    agent = learner(td3_bc, rows)
    s, a, r, s_next, d = agent.sample()
    assert len(s) == agent.args.batch_size
    i = (agent.data[1][:, None] == a).all(-1).float().argmax(0)  # by their actions
    for column, key in ((s, "observations"), (s_next, "next_observations")):
        torch.testing.assert_close(column, agent.policy.scaling.state(rows[key])[i])
    assert torch.equal(r, rows["rewards"][i]) and torch.equal(d, rows["terminals"][i])


def test_act_answers_in_the_environments_bounds():
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(td3_bc, None, low.tolist(), high.tolist()).policy
    last = policy.net[-1]
    last.weight.data.zero_()
    for x in ([0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]):
        last.bias.data = torch.tensor(x).atanh()
        wanted = low + (torch.tensor(x) + 1) / 2 * (high - low)
        torch.testing.assert_close(policy.act(torch.randn(5, S)), wanted.expand(5, A))


def test_act_and_training_see_the_same_states():
    rows = data(observations=torch.randn(64, S) * 10 + 50)
    agent = learner(td3_bc, rows)
    policy, s = agent.policy, rows["observations"]
    normed = (s - s.mean(0)) / (s.std(0, correction=0) + 1e-3)
    torch.testing.assert_close(agent.data[0], normed, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(policy.act(s), torch.tanh(policy.net(normed)), atol=1e-5, rtol=1e-5)


def test_validation_computes_the_training_losses_on_other_rows():
    agent = learner(td3_bc, policy_noise=0.0)
    rows = data(40)
    s, s_next = (agent.policy.scaling.state(rows[f"{x}observations"]) for x in ("", "next_"))
    losses = agent.validate(rows)
    bc = (agent.policy(s) - rows["actions"]).square().mean()
    torch.testing.assert_close(losses["bc"], bc)
    q_next = agent.critic_target(s_next, agent.policy_target(s_next)).amin(0)
    y = rows["rewards"] + agent.args.gamma * (1 - rows["terminals"]) * q_next
    critic = (agent.critic(s, rows["actions"]) - y).square().mean((1, 2)).sum()
    torch.testing.assert_close(losses["critic"], critic)
