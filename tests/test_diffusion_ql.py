"""What Diffusion-QL claims, each part against an independent computation."""

import math

import pytest
import torch
from conftest import load
from test_models import A, S, batch, constant_critic, copies, data, equal, gradients, learner

diffusion_ql = load("diffusion_ql")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_schedule_is_the_variance_preserving_one(steps):
    """ᾱ_t = exp(-∫ β(u) du) for the rate β(u) = β_min + (β_max - β_min) u, up to u = t / T."""
    policy = learner(diffusion_ql, diffusion_steps=steps).policy
    u = torch.arange(1, steps + 1) / steps
    integral = 0.1 * u + (10 - 0.1) * u.square() / 2
    torch.testing.assert_close(policy.signal.square(), torch.exp(-integral), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(policy.signal.square() + policy.sigma.square(), torch.ones(steps))


def test_noised_actions_have_the_schedules_mean_and_variance():
    policy = learner(diffusion_ql).policy
    a, eps = torch.full((50_000, 1), 0.7), torch.randn(50_000, 1)
    for t in range(5):
        x = policy.add_noise(a, torch.full((50_000,), t), eps)
        assert x.mean().item() == pytest.approx(0.7 * policy.signal[t].item(), abs=0.02)
        assert x.std().item() == pytest.approx(policy.sigma[t].item(), rel=0.02)


def test_posterior_is_bayes_rule():
    """p(x_{t-1} | x_t, x_0) of a Gaussian chain, by conditioning the joint Gaussian of both."""
    policy = learner(diffusion_ql).policy
    a, eps = 1.8 * torch.rand(64, A) - 0.9, torch.randn(64, A)
    for t in range(1, 5):
        x_t = policy.add_noise(a, torch.full((64,), t), eps)
        abar, before = policy.signal[t].square(), policy.signal[t - 1].square()
        alpha = abar / before
        # x_{t-1} = √ᾱ_{t-1} a + ..., x_t = √α x_{t-1} + ...: covariance √α (1 - ᾱ_{t-1}).
        gain = alpha.sqrt() * (1 - before) / (1 - abar)
        mean = before.sqrt() * a + gain * (x_t - abar.sqrt() * a)
        variance = (1 - before) - gain * alpha.sqrt() * (1 - before)
        torch.testing.assert_close(policy.posterior(x_t, t, eps), mean, atol=1e-4, rtol=1e-4)
        assert policy.deviation[t].square().item() == pytest.approx(variance.item(), abs=1e-5)
    assert policy.deviation[0] == 0  # the last step adds no noise


def test_the_true_noise_gives_the_action_back():
    policy = learner(diffusion_ql).policy
    a = 1.8 * torch.rand(64, A) - 0.9
    x_0 = policy.posterior(policy.add_noise(a, torch.zeros(64, dtype=int), torch.ones(64, A)), 0, 1)
    torch.testing.assert_close(x_0, a, atol=1e-5, rtol=1e-5)


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


def test_cloning_keeps_both_modes():
    """One state, actions at ±0.6: samples are near one or the other, as often as in the data. (With
    5 steps even the best network leaves a third of the samples between them.)"""
    rows = data(512, observations=torch.zeros(512, S), next_observations=torch.zeros(512, S))
    rows["actions"] = 0.6 * (torch.rand(512, 1) < 0.7).float().mul(2).sub(1)
    rows |= {"action_low": -torch.ones(1, 1), "action_high": torch.ones(1, 1)}
    agent = learner(
        diffusion_ql,
        rows,
        eta=0.0,
        hidden_dim=64,
        batch_size=256,
        diffusion_steps=20,
        learning_rate=2e-3,
    )
    s, a = agent.data["observations"][:256], agent.data["actions"][:256]
    for _ in range(800):
        agent.descend(agent.policy_optimizer, agent.cloning_loss(s, a))
    x = agent.policy(torch.zeros(2000, S)).detach()
    near = (x.abs() - 0.6).abs() < 0.2
    assert near.float().mean() > 0.85
    assert (x > 0).float().mean().item() == pytest.approx((a > 0).float().mean().item(), abs=0.1)


def test_guidance_reaches_every_step_of_the_chain():
    """The gradient of Q at the action, through all T passes of the network, is that of autograd; a
    chain cut after the last pass would give another."""
    agent = learner(diffusion_ql, eta=1.0, max_grad_norm=0.0, learning_rate=0.0)
    agent.cloning_loss = lambda s, a: torch.zeros(())
    s, a, *_ = batch(agent)
    torch.manual_seed(3)
    agent.update_policy(s, a)
    got = gradients(agent.policy.noise).clone()

    calls, inner = [], agent.policy.noise.forward
    agent.policy.noise.forward = lambda x, t, s: calls.append(x.requires_grad) or inner(x, t, s)
    torch.manual_seed(3)
    q = agent.q(s, agent.policy(s))
    q = q if torch.rand(()) < 0.5 else q.flip(0)
    loss = -q[0].mean() / q[1].abs().mean().detach()
    wanted = torch.autograd.grad(loss, list(agent.policy.noise.parameters()))
    torch.testing.assert_close(got, torch.cat([g.flatten() for g in wanted]))
    assert calls == [False, True, True, True, True]  # later passes see what earlier ones did


def test_policy_step_leaves_the_critic_alone():
    agent = learner(diffusion_ql)
    before = copies(agent.q)
    agent.update_policy(*batch(agent)[:2])
    assert equal(before, copies(agent.q)) and all(p.requires_grad for p in agent.q.parameters())
    assert all(p.grad is None for p in agent.q.parameters())


@pytest.mark.parametrize("d", [0.0, 1.0])
@pytest.mark.parametrize("max_q_backup", [False, True])
def test_target_is_masked_by_terminals_alone(d, max_q_backup):
    agent = learner(diffusion_ql, gamma=0.9, max_q_backup=max_q_backup)
    constant_critic(agent.q, 0, 0)
    constant_critic(agent.policy.q_target, 5, 3)
    s, a, r, s_next, _ = batch(agent)
    loss, _ = agent.critic_losses(s, a, r, s_next, torch.full_like(r, d))
    torch.testing.assert_close(loss, 2 * (r + 0.9 * (1 - d) * 3).square().mean())


def test_target_takes_the_slow_policy_and_the_best_of_ten():
    agent = learner(diffusion_ql, max_q_backup=True, gamma=0.9)
    used, inner = [], agent.policy.forward
    agent.policy.forward = lambda s, net=None: used.append((len(s), net)) or inner(s, net)
    agent.policy.q_target.forward = lambda s, a: torch.stack([a[:, :1], a[:, :1] + 1])
    constant_critic(agent.q, 0, 0)
    s, a, r, s_next, d = batch(agent)
    torch.manual_seed(1)
    loss, _ = agent.critic_losses(s, a, r, s_next, d)
    assert used == [(10 * len(s), agent.noise_target)]
    torch.manual_seed(1)
    best = inner(s_next.repeat_interleave(10, 0), agent.noise_target)[:, 0].view(-1, 10).amax(1)
    torch.testing.assert_close(loss, 2 * (r + 0.9 * best[:, None]).square().mean())


def test_copies_follow_at_their_rates():
    agent = learner(diffusion_ql, tau=0.1, ema_rate=0.01)
    pairs = ((agent.policy.q_target, agent.q, 0.1), (agent.noise_target, agent.policy.noise, 0.01))
    for target, online, _ in pairs:
        assert equal(copies(target), copies(online))
        for parameter in online.parameters():
            parameter.data += 1
    before = [copies(target) for target, _, _ in pairs]
    agent.update_targets()
    for (target, _, rate), old in zip(pairs, before):
        for new, was in zip(target.parameters(), old):
            torch.testing.assert_close(new.data, was + rate)


def test_acting_prefers_the_higher_value():
    """Q' = 30 a: the softmax over 50 candidates takes nearly the largest of them."""
    rows = data(64, actions=2 * torch.rand(64, 1) - 1)
    rows |= {"action_low": -torch.ones(1, 1), "action_high": torch.ones(1, 1)}
    agent = learner(diffusion_ql, rows, candidates=50)
    agent.policy.q_target.forward = lambda s, a: (30 * a).expand(2, -1, -1)
    chosen = agent.policy.act(torch.randn(200, S)).mean()
    agent.policy.candidates = 1
    assert chosen > agent.policy.act(torch.randn(200, S)).mean() + 0.3


def test_acting_draws_by_the_softmax():
    """Two candidates whose Q' differ by log 3: the better one in three of four draws."""
    rows = data(64, actions=2 * torch.rand(64, 1) - 1)
    rows |= {"action_low": -torch.ones(1, 1), "action_high": torch.ones(1, 1)}
    agent = learner(diffusion_ql, rows, candidates=2)
    agent.policy.forward = lambda s: torch.tensor([[0.5], [-0.5]]).repeat(len(s) // 2, 1)
    agent.policy.q_target.forward = lambda s, a: (math.log(3) * a).expand(2, -1, -1)
    a = agent.policy.act(torch.zeros(4000, S))
    assert (a > 0).float().mean().item() == pytest.approx(0.75, abs=0.03)


def test_gradients_are_bounded():
    agent = learner(diffusion_ql, max_grad_norm=0.01)
    norm = agent.update_policy(*batch(agent)[:2])["gradients/policy"]
    assert norm > 0.01 and gradients(agent.policy.noise).norm().item() == pytest.approx(0.01, 1e-3)
    free = learner(diffusion_ql, max_grad_norm=0.0)
    norm = free.update_policy(*batch(free)[:2])["gradients/policy"]
    assert gradients(free.policy.noise).norm().item() == pytest.approx(norm.item(), rel=1e-5)
    assert math.isfinite(norm)


@pytest.mark.parametrize(
    "flag, value", [("diffusion_steps", 0), ("candidates", 0), ("max_grad_norm", -1.0)]
)
def test_refuses_senseless_numbers(flag, value):
    with pytest.raises(SystemExit, match=flag.replace("_", "-")):
        learner(diffusion_ql, **{flag: value})
