"""What diffusion_ql.py claims, each against an independent computation."""

import math
from dataclasses import asdict

import numpy as np
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
    task,
)

diffusion_ql = load("diffusion_ql")
LOW, HIGH = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def one_action(n=64) -> dict[str, torch.Tensor]:
    return data(n, actions=2 * torch.rand(n, 1) - 1)


def true_noise(policy, x, t, mean):
    """E[ε | x_t], if the action's conditional mean is `mean`."""
    return (x - policy.signal[t] * mean) / policy.sigma[t]


# ------------------------------------------------------------------------------------ Networks


@pytest.mark.parametrize("layers", [2, 3])
def test_twin_critic_is_two_networks(layers):
    critic = diffusion_ql.TwinCritic(S, A, 16, hidden_layers=layers)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    assert len(critic.weights) == layers + 1
    for i in range(2):
        x = torch.cat([s, a], dim=-1)
        for weight, bias in zip(critic.weights[:-1], critic.biases[:-1]):
            x = torch.relu(x @ weight[i] + bias[i, 0])
        torch.testing.assert_close(q[i], x @ critic.weights[-1][i] + critic.biases[-1][i])


def test_noise_net_sees_action_step_and_state():
    """Three layers of Mish on all of them; the steps are told apart, near ones are alike."""
    agent = learner(diffusion_ql, diffusion_steps=20)
    net = agent.policy.noise
    assert [len(agent.critic.weights), len(agent.policy.critic_target.weights)] == [4, 4]
    assert sum(isinstance(part, torch.nn.Linear) for part in net.net) == 4
    assert sum(isinstance(part, torch.nn.Mish) for part in net.net) == 3
    frequency = 10_000 ** (-torch.arange(8) / 7)
    angle = 3 * frequency
    torch.testing.assert_close(net.waves[3], torch.cat([angle.sin(), angle.cos()]))
    apart = torch.cdist(net.waves, net.waves)
    assert apart[~torch.eye(20, dtype=bool)].min() > 0.1 and (apart[0, 1:4].diff() > 0).all()
    x, s = torch.randn(5, A), torch.randn(5, S)
    steps = torch.tensor([0, 3, 3, 7, 19])
    eps = net(x, steps, s)
    for i, t in enumerate(steps.tolist()):
        torch.testing.assert_close(eps[i : i + 1], net(x[i : i + 1], t, s[i : i + 1]))
    assert not torch.allclose(net(x, 3, s), net(x, 4, s))
    assert not torch.allclose(net(x, 3, s), net(x, 3, s.flip(0)))
    assert not torch.allclose(net(x, 3, s), net(x.flip(0), 3, s))


def test_states_are_normalised():
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    rows["next_observations"] = rows["observations"] + 1
    agent = learner(diffusion_ql, rows)
    s, a, r, s_next, d = batch(agent)
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(s_next - s, (1 / agent.policy.scaling.std).expand(64, S))
    for column, key in ((a, "actions"), (r, "rewards"), (d, "terminals")):
        assert torch.equal(column, rows[key])
    rewards = torch.arange(64.0)[:, None]
    agent = learner(diffusion_ql, data(rewards=rewards, terminals=rewards), batch_size=32)
    s, _, r, s_next, d = agent.sample()
    assert r.shape == (32, 1) and torch.equal(r, d)  # the columns of the same rows
    assert torch.equal(s, agent.data[0][r[:, 0].long()])
    assert torch.equal(s_next, agent.data[3][r[:, 0].long()])


# ------------------------------------------------------------------------------------ The chain


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_schedule_is_the_variance_preserving_one(steps):
    """ᾱ_t = exp(-∫ β(u) du) for the rate β(u) = β_min + (β_max - β_min) u, up to u = t / T; step by
    step, β_t = 1 - exp(-β_min / T - (β_max - β_min) (2 t - 1) / (2 T²)), as it is published."""
    for low, high in ((0.1, 10), (0.5, 4)):
        flags = dict(diffusion_steps=steps, beta_min=low, beta_max=high)
        policy = learner(diffusion_ql, **flags).policy
        u = torch.arange(1, steps + 1) / steps
        abar = torch.exp(-low * u - (high - low) * u.square() / 2)
        torch.testing.assert_close(policy.signal.square(), abar, rtol=1e-4, atol=1e-6)
        t = torch.arange(1, steps + 1)
        beta = 1 - torch.exp(-low / steps - 0.5 * (high - low) * (2 * t - 1) / steps**2)
        torch.testing.assert_close(torch.cumprod(1 - beta, 0), abar, rtol=1e-4, atol=1e-6)
        total = policy.signal.square() + policy.sigma.square()
        torch.testing.assert_close(total, torch.ones(steps))


def test_noised_actions_have_the_schedules_mean_and_variance():
    """What the network is asked about: a noisy action, whose noise it is to name."""
    agent = learner(diffusion_ql, data(actions=torch.full((64, 1), 0.7)))
    seen = []
    agent.policy.noise.forward = lambda *x: seen.extend(x) or torch.zeros_like(x[0])
    s = torch.randn(100_000, S)
    loss = agent.cloning_loss(s, torch.full((100_000, 1), 0.7))
    x_t, t, states = seen
    assert torch.equal(states, s) and loss.item() == pytest.approx(1, abs=0.02)  # of ε itself
    for k in range(5):
        assert (t == k).float().mean().item() == pytest.approx(0.2, abs=0.01)
        x = x_t[t == k]
        assert x.mean().item() == pytest.approx(0.7 * agent.policy.signal[k].item(), abs=0.02)
        assert x.std().item() == pytest.approx(agent.policy.sigma[k].item(), rel=0.02)
    true = true_noise(agent.policy, x_t, t[:, None], 0.7)
    agent.policy.noise.forward = lambda *x: true
    torch.manual_seed(1)
    assert agent.cloning_loss(s, torch.full((100_000, 1), 0.7)) > 1.5  # another draw's noise
    agent.policy.noise.forward = lambda x, t, s: true_noise(agent.policy, x, t[:, None], 0.7)
    assert agent.cloning_loss(s, torch.full((100_000, 1), 0.7)) < 1e-8


def test_posterior_is_bayes_rule():
    """p(x_{t-1} | x_t, x_0) of a Gaussian chain, by conditioning the joint Gaussian of both."""
    policy = learner(diffusion_ql).policy
    a, eps = 1.8 * torch.rand(64, A) - 0.9, torch.randn(64, A)
    for t in range(1, 5):
        x_t = policy.signal[t] * a + policy.sigma[t] * eps
        abar, before = policy.signal[t].square(), policy.signal[t - 1].square()
        alpha = abar / before
        # x_{t-1} = √ᾱ_{t-1} a + ..., x_t = √α x_{t-1} + ...: covariance √α (1 - ᾱ_{t-1}).
        gain = alpha.sqrt() * (1 - before) / (1 - abar)
        mean = before.sqrt() * a + gain * (x_t - abar.sqrt() * a)
        variance = (1 - before) - gain * alpha.sqrt() * (1 - before)
        torch.testing.assert_close(policy.posterior(x_t, t, eps), mean, atol=1e-4, rtol=1e-4)
        assert policy.std[t].square().item() == pytest.approx(variance.item(), abs=1e-5)
    assert policy.std[0] == 0  # the last step adds no noise
    x_1 = policy.signal[0] * a + policy.sigma[0] * eps
    torch.testing.assert_close(policy.posterior(x_1, 0, eps), a, atol=1e-5, rtol=1e-5)


def test_the_guessed_action_is_clipped():
    """Where the guessed noise says that the action is 7, the step goes to where 1 would lead."""
    policy = learner(diffusion_ql).policy
    for t in range(5):
        for a in (7.0, -7.0):
            x = torch.full((3, A), 0.4)
            eps = (x - policy.signal[t] * a) / policy.sigma[t]
            within = (x - policy.signal[t] * math.copysign(1, a)) / policy.sigma[t]
            got, wanted = policy.posterior(x, t, eps), policy.posterior(x, t, within)
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_the_chain_step_by_step():
    """T calls of the network, from the last step to the first, noise after each but the last."""
    policy = learner(diffusion_ql).policy
    s, calls = torch.randn(6, S), []

    def net(x, t, states):
        assert torch.equal(states, s)
        calls.append((x, t))
        return 0.1 * x

    torch.manual_seed(1)
    a = policy(s, net)
    torch.manual_seed(1)
    draws = [torch.randn(6, A) for _ in range(6)]
    assert [t for _, t in calls] == [4, 3, 2, 1, 0]
    x = draws[0]
    for (seen, t), noise in zip(calls, draws[1:]):
        torch.testing.assert_close(seen, x)
        x = policy.posterior(x, t, 0.1 * x) + policy.std[t] * noise
    torch.testing.assert_close(a, x)
    assert (policy.std[1:] > 0.1).all()
    assert not torch.equal(policy(s, policy.noise), policy(s, policy.noise))
    assert policy(torch.randn(500, S), lambda x, t, s: -9 * x).abs().max() <= 1


def test_chain_with_the_right_noise_samples_the_data():
    """Data N(0.2, 0.1²): its noise is known in closed form, and the chain must end in that law."""
    policy = learner(diffusion_ql, diffusion_steps=400).policy
    m, v = 0.2, 0.01

    def oracle(x, t, s):  # E[ε | x_t]
        signal, sigma = policy.signal[t], policy.sigma[t]
        return sigma * (x - signal * m) / (signal.square() * v + sigma.square())

    x = policy(torch.zeros(20_000, S), oracle)
    assert x.mean().item() == pytest.approx(m, abs=0.01)
    assert x.std().item() == pytest.approx(v**0.5, rel=0.1)


@pytest.mark.parametrize("steps, share", [(3, 0.25), (5, 0.61), (10, 0.93), (20, 0.99)])
def test_few_steps_leave_actions_between_two_modes(steps, share):
    """Actions are ±0.6 as often: the exact noise, and what docs/algorithms/diffusion_ql.md says of
    the share of samples that end within 0.2 of either."""
    policy = learner(diffusion_ql, diffusion_steps=steps).policy

    def oracle(x, t, s):
        mean = 0.6 * torch.tanh(0.6 * policy.signal[t] * x / policy.sigma[t].square())
        return true_noise(policy, x, t, mean)

    x = policy(torch.zeros(20_000, S), oracle)
    near = ((x.abs() - 0.6).abs() < 0.2).float().mean().item()
    assert near == pytest.approx(share, abs=0.015)
    assert (x > 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    if steps == 5:  # the noise that the last step begins with
        assert policy.sigma[0].item() == pytest.approx(0.44, abs=0.005)


def test_cloning_keeps_both_modes():
    """One state, actions at ±0.6: samples are near one or the other, as often as in the data."""
    rows = data(512, observations=torch.zeros(512, S), next_observations=torch.zeros(512, S))
    rows["actions"] = 0.6 * (torch.rand(512, 1) < 0.7).float().mul(2).sub(1)
    flags = dict(hidden_dim=64, batch_size=256, diffusion_steps=20, learning_rate=2e-3)
    agent = learner(diffusion_ql, rows, eta=0.0, **flags)
    s, a, *_ = (column[:256] for column in agent.data)
    for _ in range(800):
        agent.descend(agent.policy_optimizer, agent.cloning_loss(s, a))
    agent.policy.candidates = 1
    s = torch.zeros(2000, S)
    for x in (agent.policy(s, agent.policy.noise), agent.policy.act(s)):
        near = (x.abs() - 0.6).abs() < 0.2
        assert near.float().mean() > 0.85
        assert (x > 0).float().mean().item() == pytest.approx(
            (a > 0).float().mean().item(), abs=0.1
        )


# ---------------------------------------------------------------------------------- The policy


def guided(agent, s, seed) -> torch.Tensor:
    """The guidance: -Q_1 / |Q_2| or, by a coin, -Q_2 / |Q_1|, of an action of the chain."""
    torch.manual_seed(seed)
    q = agent.critic(s, agent.policy(s, agent.policy.noise))
    q = q if torch.rand(()) < 0.5 else q.flip(0)
    return -q[0].mean() / q[1].abs().mean().item()


@pytest.mark.parametrize("seed", range(4))  # both sides of the coin
def test_guidance_reaches_every_step_of_the_chain(seed):
    """The gradient of Q at the action, through all T passes of the network, is that of autograd; a
    chain cut after the last pass would give another."""
    agent = learner(diffusion_ql, eta=0.7, max_grad_norm=0.0, learning_rate=0.0)
    agent.cloning_loss = lambda s, a: torch.zeros(())
    s, a, *_ = batch(agent)
    agent.critic.biases[-1].data -= agent.critic(s, a).median()  # Q of both signs
    torch.manual_seed(seed)
    metrics = agent.update_actor(s, a)
    got = gradients(agent.policy.noise).clone()

    calls, inner = [], agent.policy.noise.forward
    agent.policy.noise.forward = lambda x, t, s: calls.append(x.requires_grad) or inner(x, t, s)
    loss = guided(agent, s, seed)
    torch.testing.assert_close(metrics["losses/guidance"], loss)
    torch.testing.assert_close(got, 0.7 * gradient_of(loss, agent.policy.noise))
    assert calls == [False, True, True, True, True]  # later passes see what earlier ones did


def test_the_coin_exchanges_the_critics():
    agent = learner(diffusion_ql, learning_rate=0.0)
    constant_critic(agent.critic, 3, -2)
    losses = [agent.update_actor(*batch(agent)[:2])["losses/guidance"] for _ in range(20)]
    found = {round(loss.item(), 3) for loss in losses}
    assert found == {-1.5, 0.667}  # -3 / 2 and 2 / 3


def test_the_actors_loss_is_cloning_and_guidance():
    agent = learner(diffusion_ql, eta=0.7, max_grad_norm=0.0, learning_rate=0.0)
    s, a, *_ = batch(agent)
    torch.manual_seed(3)
    metrics = agent.update_actor(s, a)
    got = gradients(agent.policy.noise).clone()
    torch.manual_seed(3)
    t = torch.randint(5, (len(s),))
    eps = torch.randn(len(s), A)
    x_t = agent.policy.signal[t][:, None] * a + agent.policy.sigma[t][:, None] * eps
    clone = (agent.policy.noise(x_t, t, s) - eps).square().mean()
    q = agent.critic(s, agent.policy(s, agent.policy.noise))
    q = q if torch.rand(()) < 0.5 else q.flip(0)
    guidance = -q[0].mean() / q[1].abs().mean().item()
    loss = clone + 0.7 * guidance
    torch.testing.assert_close(got, gradient_of(loss, agent.policy.noise))
    wanted = {"actor": loss, "clone": clone, "guidance": guidance}
    for key, value in wanted.items():
        torch.testing.assert_close(metrics[f"losses/{key}"], value)
    torch.testing.assert_close(metrics["values/q_policy"], q.mean())
    torch.testing.assert_close(metrics["gradients/actor"], got.norm())


def test_eta_is_free_of_the_rewards_scale():
    found = []
    for scale in (1, 1000):
        torch.manual_seed(0)
        agent = learner(diffusion_ql, max_grad_norm=0.0)
        agent.critic.weights[-1].data *= scale
        agent.critic.biases[-1].data *= scale
        torch.manual_seed(1)
        agent.update_actor(*batch(agent)[:2])
        found.append(gradients(agent.policy.noise).clone())
    torch.testing.assert_close(*found)


def test_policy_step_leaves_the_critics_alone():
    agent = learner(diffusion_ql)
    nets = (agent.critic, agent.policy.critic_target, agent.noise_target)
    before = [copies(net) for net in nets]
    agent.update_actor(*batch(agent)[:2])
    for net, old in zip(nets, before):
        assert equal(old, copies(net)) and all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in agent.critic.parameters())


def test_gradients_are_bounded():
    agent = learner(diffusion_ql, max_grad_norm=0.01)
    norm = agent.update_actor(*batch(agent)[:2])["gradients/actor"]
    assert norm > 0.01 and gradients(agent.policy.noise).norm().item() == pytest.approx(0.01, 1e-3)
    norm = agent.update_critic(*batch(agent))["gradients/critic"]
    assert norm > 0.01 and gradients(agent.critic).norm().item() == pytest.approx(0.01, 1e-3)
    free = learner(diffusion_ql, max_grad_norm=0.0)
    norm = free.update_actor(*batch(free)[:2])["gradients/actor"]
    assert gradients(free.policy.noise).norm().item() == pytest.approx(norm.item(), rel=1e-5)
    assert math.isfinite(norm)


def test_an_update_moves_every_network():
    agent = learner(diffusion_ql)
    nets = (agent.critic, agent.policy.critic_target, agent.policy.noise, agent.noise_target)
    before = [copies(net) for net in nets]
    metrics = agent.phase(1)()
    for net, old in zip(nets, before):
        assert all(not torch.equal(a, b) for a, b in zip(copies(net), old))
    assert all(isinstance(value, torch.Tensor) and value.numel() == 1 for value in metrics.values())


# --------------------------------------------------------------------------------- The critics


@pytest.mark.parametrize("d", [0.0, 1.0, None])
@pytest.mark.parametrize("max_q_backup", [False, True])
@pytest.mark.parametrize("values", [(5, 3), (3, 5)])
def test_target_is_masked_by_terminals_alone(d, max_q_backup, values):
    """y = r + γ (1 - d) min Q', read from the losses of critics that say 0; None: the batch's d."""
    agent = learner(diffusion_ql, gamma=0.9, max_q_backup=max_q_backup)
    constant_critic(agent.critic, 0, 0)
    constant_critic(agent.policy.critic_target, *values)
    s, a, r, s_next, found = batch(agent)
    d = found if d is None else torch.full_like(r, d)
    loss, _ = agent.critic_loss(s, a, r, s_next, d)
    torch.testing.assert_close(loss, 2 * (r + 0.9 * (1 - d) * 3).square().mean())


@pytest.mark.parametrize("max_q_backup, n", [(False, 1), (True, 10)])
def test_target_takes_the_slow_policy_and_the_best_of_ten(max_q_backup, n):
    agent = learner(diffusion_ql, max_q_backup=max_q_backup, gamma=0.9)
    used, inner, seen = [], agent.policy.forward, []
    agent.policy.forward = lambda s, net: used.append((len(s), net)) or inner(s, net)
    agent.policy.critic_target.forward = lambda s, a: (
        seen.append(s) or torch.stack([a[:, :1], -2 * a[:, :1]])
    )
    constant_critic(agent.critic, 0, 0)
    s, a, r, s_next, d = batch(agent)
    torch.manual_seed(1)
    loss, _ = agent.critic_loss(s, a, r, s_next, d)
    assert used == [(n * len(s), agent.noise_target)]
    assert torch.equal(seen[0], s_next.repeat_interleave(n, 0))
    torch.manual_seed(1)
    x = inner(s_next.repeat_interleave(n, 0), agent.noise_target)[:, 0].view(-1, n)
    best = torch.minimum(x.amax(1), (-2 * x).amax(1))[:, None]  # of each critic, then the smaller
    torch.testing.assert_close(loss, 2 * (r + 0.9 * (1 - d) * best).square().mean())


def test_critics_regress_on_the_target():
    agent = learner(diffusion_ql, gamma=0.9, max_grad_norm=0.0, learning_rate=0.0)
    columns = s, a, r, s_next, d = batch(agent)
    torch.manual_seed(2)
    metrics = agent.update_critic(*columns)
    got = gradients(agent.critic).clone()
    torch.manual_seed(2)
    a_next = agent.policy(s_next, agent.noise_target)
    y = (r + 0.9 * (1 - d) * agent.policy.critic_target(s_next, a_next).amin(0)).detach()
    wanted = sum((agent.critic(s, a)[i] - y).square().mean() for i in range(2))
    torch.testing.assert_close(got, gradient_of(wanted, agent.critic))
    torch.testing.assert_close(metrics["losses/critic"], wanted)
    torch.testing.assert_close(metrics["values/q"], agent.critic(s, a).mean())
    for net in (agent.policy, agent.noise_target):
        assert all(parameter.grad is None for parameter in net.parameters())
    agent.critic.biases[-1].data += 7  # Q' is a copy: what Q does leaves the target alone
    torch.manual_seed(2)
    moved, _ = agent.critic_loss(*columns)
    torch.testing.assert_close(moved, (agent.critic(s, a) - y).square().mean((1, 2)).sum())


def test_critics_learn_the_value_of_a_loop():
    """One state that returns to itself with reward 1: V = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows |= {"rewards": torch.ones(64, 1), "terminals": torch.zeros(64, 1)}
    agent = learner(diffusion_ql, rows, gamma=0.5, tau=0.1, learning_rate=1e-2)
    for _ in range(200):
        agent.update_critic(*batch(agent))
        agent.update_targets()
    q = agent.critic(*batch(agent)[:2])
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)


def test_copies_follow_at_their_rates():
    agent = learner(diffusion_ql, tau=0.1, ema_rate=0.01)
    pairs = (
        (agent.policy.critic_target, agent.critic, 0.1),
        (agent.noise_target, agent.policy.noise, 0.01),
    )
    for target, online, _ in pairs:
        assert equal(copies(target), copies(online))
        for parameter in online.parameters():
            parameter.data += 1
    before = [(copies(target), copies(online)) for target, online, _ in pairs]
    agent.update_targets()
    for (target, online, rate), (old, same) in zip(pairs, before):
        assert equal(copies(online), same)
        for new, was in zip(target.parameters(), old):
            torch.testing.assert_close(new.data, was + rate)


def test_validation_is_of_the_given_rows():
    agent = learner(diffusion_ql)
    held_out = data(32)
    torch.manual_seed(4)
    found = agent.validate(held_out)
    torch.manual_seed(4)
    state = agent.policy.scaling.state
    s, s_next = state(held_out["observations"]), state(held_out["next_observations"])
    a, r, d = (held_out[key] for key in ("actions", "rewards", "terminals"))
    wanted = {"critic": agent.critic_loss(s, a, r, s_next, d)[0], "clone": agent.cloning_loss(s, a)}
    torch.testing.assert_close(found, wanted)


# -------------------------------------------------------------------------------------- Acting


@pytest.mark.parametrize("x", [[0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]])
@pytest.mark.parametrize("candidates", [1, 5])
def test_act_answers_in_the_environments_bounds(x, candidates):
    """A chain that ends at the scaled action x acts with the action that x came from."""
    flags = dict(low=LOW.tolist(), high=HIGH.tolist(), candidates=candidates)
    policy = learner(diffusion_ql, **flags).policy
    goal = torch.tensor(x)
    policy.noise.forward = lambda x_t, t, s: true_noise(policy, x_t, t, goal)
    wanted = LOW + (goal + 1) / 2 * (HIGH - LOW)
    for observations in (torch.randn(5, S), torch.randn(5, S).double(), torch.randn(S)):
        for options in ({}, dict(deterministic=True)):
            a = policy.act(observations, **options)
            assert isinstance(a, torch.Tensor)
            torch.testing.assert_close(a, wanted.expand(*observations.shape[:-1], A))
            array = policy.act(observations.numpy(), **options)
            assert isinstance(array, np.ndarray)
            np.testing.assert_allclose(array, a.numpy(), atol=1e-5)


def test_acting_sees_normalised_states():
    rows = data(observations=3 * torch.randn(64, S) + 1)
    policy = learner(diffusion_ql, rows, low=LOW.tolist(), high=HIGH.tolist(), candidates=1).policy
    torch.manual_seed(1)
    a = policy.act(rows["observations"])
    torch.manual_seed(1)
    x = policy(policy.scaling.state(rows["observations"]), policy.noise)
    torch.testing.assert_close(a, LOW + (x + 1) / 2 * (HIGH - LOW))


def test_acting_prefers_the_higher_value():
    """Q' = 30 a: the softmax over 50 candidates takes nearly the largest of them."""
    agent = learner(diffusion_ql, one_action(), candidates=50)
    agent.policy.critic_target.forward = lambda s, a: (30 * a).expand(2, -1, -1)
    chosen = agent.policy.act(torch.randn(200, S)).mean()
    agent.policy.candidates = 1
    assert chosen > agent.policy.act(torch.randn(200, S)).mean() + 0.3


def test_acting_draws_by_the_softmax_of_the_smaller_value():
    """Two candidates whose Q' differ by log 3: the better one in three of four draws."""
    agent = learner(diffusion_ql, one_action(), candidates=2)
    agent.policy.forward = lambda s, *_: torch.tensor([[0.5], [-0.5]]).repeat(len(s) // 2, 1)
    for other in (lambda a: 5 - a, lambda a: 5 + a):  # the larger of the two has no say
        agent.policy.critic_target.forward = lambda s, a, f=other: torch.stack(
            [math.log(3) * a, f(a)]
        )
        a = agent.policy.act(torch.zeros(4000, S))
        assert (a > 0).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_every_state_keeps_its_own_candidates():
    """Candidates are known by their state; Q' wants the third of four."""
    agent = learner(diffusion_ql, one_action(), candidates=4)
    seen = []

    def forward(s, *_):
        seen.append(s)
        return s[:, :1] / 10 + 0.01 * torch.arange(4.0).repeat(len(s) // 4)[:, None]

    agent.policy.forward = forward
    agent.policy.critic_target.forward = lambda s, a: (
        -1e6 * (a - s[:, :1] / 10 - 0.02).abs().expand(2, -1, -1)
    )
    observations = torch.randn(7, S)
    s = agent.policy.scaling.state(observations)
    for deterministic in (False, True):
        a = agent.policy.act(observations, deterministic=deterministic)
        torch.testing.assert_close(a, s[:, :1] / 10 + 0.02)
        assert torch.equal(seen[-1], s.repeat_interleave(4, 0))


def test_deterministic_action_is_a_function_of_the_state():
    """The same whenever it is asked, in any company, and without a draw from the run's numbers: of
    samples from always the same noise the one of largest Q'."""
    policy = learner(diffusion_ql, candidates=5, low=LOW.tolist(), high=HIGH.tolist()).policy
    for parameter in policy.critic_target.parameters():
        parameter.data *= 3
    s = torch.randn(8, S)
    state = torch.get_rng_state()
    a = policy.act(s, deterministic=True)
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(policy.act(s[3], deterministic=True), a[3])
    torch.testing.assert_close(policy.act(s[2:5], deterministic=True), a[2:5])
    assert not torch.equal(policy.act(s), policy.act(s))

    def candidates(state):  # five chains from the generator's noise
        torch.manual_seed(0)
        return policy(policy.scaling.state(state).expand(5, S), policy.noise)

    for i in range(8):
        x = candidates(s[i])
        assert x.std(0).min() > 0.05
        q = policy.critic_target(policy.scaling.state(s[i]).expand(5, S), x).amin(0)[:, 0]
        wanted = LOW + (x[q.argmax()] + 1) / 2 * (HIGH - LOW)
        torch.testing.assert_close(a[i], wanted)
    assert policy.actors() == {"": policy.act}


def test_a_checkpoint_loads_with_another_number_of_candidates(tmp_path):
    rows = data(observations=3 * torch.randn(64, S) + 1)
    agent = learner(diffusion_ql, rows, low=LOW.tolist(), high=HIGH.tolist(), candidates=7)
    agent.update()
    saved = {"algorithm": "DiffusionQL", "args": asdict(agent.args), "learner": agent.state_dict()}
    torch.save(
        saved | {"task": task(rows, LOW.tolist(), HIGH.tolist())}, tmp_path / "checkpoint.pt"
    )
    s = rows["observations"]
    same, other = (diffusion_ql.load_policy(tmp_path, **x) for x in ({}, dict(candidates=2)))
    assert (same.candidates, other.candidates) == (7, 2)
    assert "candidates" in diffusion_ql.Policy.flags
    assert torch.equal(same.act(s, deterministic=True), agent.policy.act(s, deterministic=True))
    agent.policy.candidates = 2
    assert torch.equal(other.act(s, deterministic=True), agent.policy.act(s, deterministic=True))
    with pytest.raises(SystemExit, match="--candidates"):
        diffusion_ql.load_policy(tmp_path, candidates=0)


@pytest.mark.parametrize(
    "flag, value", [("diffusion_steps", 0), ("candidates", 0), ("max_grad_norm", -1.0)]
)
def test_refuses_senseless_numbers(flag, value):
    with pytest.raises(SystemExit, match=flag.replace("_", "-")):
        learner(diffusion_ql, **{flag: value})
