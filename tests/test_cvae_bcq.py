"""What cvae_bcq.py claims: a CVAE that uses its latent, candidates near the data, Q's choice among
them; each loss against an independent computation."""

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
    copies,
    data,
    equal,
    gradient_of,
    gradients,
    learner,
    split_critic,
)

bcq = load("cvae_bcq")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------ Networks


@pytest.mark.parametrize("layers", [2, 3])
def test_twin_critic_is_two_networks(layers):
    critic = bcq.TwinCritic(S, A, 16, hidden_layers=layers)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    for i, net in enumerate(split_critic(critic, bcq)):
        torch.testing.assert_close(q[i], net(torch.cat([s, a], dim=-1)))
    torch.testing.assert_close(critic(s, a, members=1), q[:1])


@pytest.mark.parametrize("x", [[0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]])
def test_act_answers_in_the_environments_bounds(x):
    """A decoder that outputs the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(bcq, low=low.tolist(), high=high.tolist(), phi=0.0).policy
    policy.cvae.decoder[-1].weight.data.zero_()
    policy.cvae.decoder[-1].bias.data = torch.tensor(x).atanh()
    wanted = low + (torch.tensor(x) + 1) / 2 * (high - low)
    for observations in (torch.randn(5, S), torch.randn(5, S).double(), torch.randn(S)):
        a = policy.act(observations)
        torch.testing.assert_close(a, wanted.expand(*observations.shape[:-1], A))
        np.testing.assert_allclose(policy.act(observations.numpy()), a.numpy())


def test_actions_stay_in_the_bounds_whatever_the_step():
    policy = learner(bcq, low=[-2.0, -1.0], high=[2.0, 3.0], phi=2.0).policy
    policy.xi[-1].weight.data *= 1000
    a = policy.act(torch.randn(200, S))
    assert (a >= torch.tensor([-2.0, -1.0])).all() and (a <= torch.tensor([2.0, 3.0])).all()
    assert (a == torch.tensor([2.0, 3.0])).any() and (a == torch.tensor([-2.0, -1.0])).any()


# ------------------------------------------------------------------------------------ The CVAE


def test_kl_is_the_normal_distributions():
    agent = learner(bcq, latent_dim=5)
    agent.policy.cvae.encoder[-1].weight.data *= 30  # some standard deviations are held at e^-4
    s, a, *_ = batch(agent)
    mu, log_sigma = agent.policy.cvae.encode(s, a)
    assert mu.shape == (64, 5) and log_sigma.min() == -4
    q, prior = distributions.Normal(mu, log_sigma.exp()), distributions.Normal(0, 1)
    wanted = distributions.kl_divergence(q, prior).mean(0)
    torch.testing.assert_close(agent.cvae_losses(s, a)[1], wanted)


def test_the_cvaes_loss_is_the_papers():
    """Gradients of |a - D(s, z)|² / A + β KL / Z; the noise of z is one and the same."""
    agent = learner(bcq, kl_weight=0.3)
    s, a, *_ = batch(agent)
    cvae = agent.policy.cvae
    mu, log_sigma = cvae.encoder(torch.cat([s, a], dim=-1)).chunk(2, dim=-1)
    torch.manual_seed(1)
    z = mu + log_sigma.exp() * torch.randn(64, 2 * A)
    error = (a - torch.tanh(cvae.decoder(torch.cat([s, z], dim=-1)))).square()
    kl = (mu.square() + log_sigma.exp().square() - 1) / 2 - log_sigma
    reconstruction = error.sum(1).mean() / A
    wanted = gradient_of(reconstruction + 0.3 * kl.sum(1).mean() / (2 * A), cvae)
    torch.manual_seed(1)
    metrics = agent.update_cvae(s, a)
    torch.testing.assert_close(gradients(cvae), wanted)
    torch.testing.assert_close(metrics["losses/reconstruction"], reconstruction)
    torch.testing.assert_close(metrics["losses/kl"], kl.mean())
    torch.testing.assert_close(metrics[f"kl/z{2 * A - 1}"], kl.mean(0)[-1])
    others = [*agent.policy.xi.parameters(), *agent.policy.critic.parameters()]
    assert all(parameter.grad is None for parameter in others)


def trained(actions, steps=500, **flags):
    """A CVAE of these actions, all of one state, its losses on them, its proposals (999, 1)."""
    n = len(actions)
    rows = data(n, observations=torch.zeros(n, S), actions=actions)
    sizes = dict(learning_rate=3e-3, cvae_dim=32, latent_dim=2, latent_clip=math.inf)
    agent = learner(bcq, rows, **sizes | flags)
    s = batch(agent)[0]
    for _ in range(steps):
        i = torch.randint(n, (64,))
        agent.update_cvae(s[i], actions[i])
    reconstruction, kl = agent.cvae_losses(s, actions)
    z = agent.policy.sample_latents(999)
    proposed = agent.policy.cvae.decode(torch.zeros(999, S), z).detach()
    return reconstruction.item(), kl.detach(), proposed


def two_modes(n=512) -> torch.Tensor:
    """Half of the actions at -0.8 and half at 0.8."""
    return 0.8 * torch.randint(2, (n, 1)).mul(2).sub(1) + 0.02 * torch.randn(n, 1)


def test_cvae_uses_its_latent():
    """One latent says which mode; the mean action would be wrong by 0.64."""
    actions = two_modes()
    reconstruction, kl, proposed = trained(actions)
    assert reconstruction < 0.15 * actions.var()
    assert kl.max() > 0.3  # about log 2 nats are needed
    near = [(proposed - mode).abs().lt(0.3).float().mean() for mode in (-0.8, 0.8)]
    assert min(near) > 0.2  # both modes come from the prior's latents

    reconstruction, kl, _ = trained(actions, kl_weight=100.0)  # a latent that costs too much
    assert kl.max() < 0.05 and reconstruction > 0.5


def test_without_its_kl_term_the_prior_proposes_other_actions_than_the_datas():
    """Reconstruction is perfect, but the latents of the data are not where the prior's are."""
    actions = 0.5 + 0.1 * torch.randn(512, 1)
    flags = dict(steps=1000, latent_clip=0.5)
    _, _, with_kl = trained(actions, **flags)
    reconstruction, kl, without = trained(actions, kl_weight=0.0, **flags)
    far = [(x - 0.5).abs().mean().item() for x in (with_kl, without)]
    print(f"mean distance from the data's mean: {far[0]:.3f} with KL, {far[1]:.3f} without")
    assert reconstruction < 0.02 * actions.var() and kl.max() > 2
    assert far[0] < 0.1 < far[1]


# ------------------------------------------------------------------------------- The candidates


def test_latents_are_the_priors_without_its_tails():
    z = learner(bcq, latent_dim=4).policy.sample_latents(10_000)
    assert z.shape == (10_000, 4) and z.abs().max() == 0.5
    at_the_bound = (z.abs() == 0.5).float().mean().item()
    assert at_the_bound == pytest.approx(math.erfc(0.5 / math.sqrt(2)), abs=0.01)  # clipped
    z = learner(bcq, latent_dim=4, latent_clip=math.inf).policy.sample_latents(10_000)
    assert z.std().item() == pytest.approx(1, abs=0.02) and z.abs().max() > 3


def test_perturbations_are_bounded():
    policy = learner(bcq, phi=0.05).policy
    policy.xi[-1].weight.data *= 1000
    s, a = torch.randn(99, S), 2 * torch.rand(99, A) - 1
    moved = policy.perturb(s, a, policy.xi)
    assert moved.abs().max() <= 1
    inside = a.abs() < 0.95
    assert (moved - a).abs().max() < 0.05001 and (moved - a)[inside].abs().max() > 0.0499
    policy = learner(bcq, phi=0.0).policy
    torch.testing.assert_close(policy.perturb(s, a, policy.xi), a)


@pytest.mark.parametrize("width, spread", [(0.15, (0, 0.05)), (0.85, (0.08, 0.4))])
def test_candidates_stay_near_the_datas_actions(width, spread):
    """Actions within `width` of f(s). Only where they vary by more than β / 4 does z pay: narrow
    behaviour is proposed as its mean, and what the policy adds to it is ξ."""
    s = torch.randn(2000, S)
    wanted = 0.15 * torch.tanh(s[:, :A])
    actions = wanted + width * (2 * torch.rand(2000, A) - 1)
    flags = dict(cvae_dim=64, batch_size=128, learning_rate=2e-3)
    agent = learner(bcq, data(2000, observations=s, actions=actions), **flags)
    for _ in range(300):
        agent.update()
    s_n = batch(agent)[0].repeat_interleave(10, 0)  # (10 N, S)
    proposed = agent.policy.cvae.decode(s_n, agent.policy.sample_latents(len(s_n))).view(-1, 10, A)
    off = (proposed - wanted[:, None]).abs()  # (N, 10, A)
    differ = proposed.std(1).mean().item()
    acted = (agent.policy.act(s) - wanted).abs()
    print(f"width {width}: {off.mean():.3f} off, {off.max():.3f} at most, {differ:.3f} apart")
    assert (off < width).float().mean() > 0.99 and (acted < width + 0.05).float().mean() > 0.99
    assert spread[0] < differ < spread[1]


def test_validation_says_how_near_and_how_far_apart_the_candidates_are():
    agent = learner(bcq, target_samples=4, lam=1.0)
    rows = data(80, actions=torch.full((80, A), 0.3))
    decoder = agent.policy.cvae.decoder
    decoder[-1].weight.data *= 30  # proposals that are far apart
    found = agent.validate(rows)
    assert set(found) == {"critic", "reconstruction", "kl", "nearest", "spread_over_z"}
    assert found["spread_over_z"] > 0.1
    constant_critic(agent.policy.critic, 0, 0)
    constant_critic(agent.critic_target, 5, 3)
    decoder[-1].weight.data.zero_()
    decoder[-1].bias.data = torch.tensor([0.5, 0.7]).atanh()
    found = agent.validate(rows)
    assert found["spread_over_z"] < 1e-6
    assert found["nearest"].item() == pytest.approx((0.2**2 + 0.4**2) / 2, rel=1e-4)
    torch.testing.assert_close(found["reconstruction"], found["nearest"])
    r, d = rows["rewards"][::4], rows["terminals"][::4]  # every n-th row, each has n candidates
    y = r + 0.99 * (1 - d) * 3
    torch.testing.assert_close(found["critic"], 2 * y.square().mean())


# ------------------------------------------------------------------------ Q's target and choice


def fixed_latents(agent, monkeypatch, n) -> torch.Tensor:
    z = agent.policy.sample_latents(n)
    monkeypatch.setattr(agent.policy, "sample_latents", lambda m: z)
    return z


@pytest.mark.parametrize("lam", [0.75, 1.0, 0.0])
@pytest.mark.parametrize("ends", [0.0, 0.4, 1.0])
def test_target_is_the_best_candidates_soft_minimum(lam, ends, monkeypatch):
    """State by state and candidate by candidate; with λ mixed before the maximum is taken, and
    the critics' gradients are those of their squared distances from it."""
    rows = data(
        observations=5 + 3 * torch.randn(64, S),
        next_observations=5 + torch.randn(64, S),
        terminals=(torch.rand(64, 1) < ends).float(),
    )
    agent = learner(bcq, rows, lam=lam, gamma=0.9, target_samples=4)
    mean, std = rows["observations"].mean(0), rows["observations"].std(0, correction=0) + 1e-3
    s, s_next = ((rows[key] - mean) / std for key in ("observations", "next_observations"))
    a, r, d = rows["actions"], rows["rewards"], rows["terminals"]
    for one, other in zip(batch(agent), (s, a, r, s_next, d)):
        torch.testing.assert_close(one, other)
    z = fixed_latents(agent, monkeypatch, 4 * 64).view(64, 4, -1)
    next(agent.xi_target.parameters()).data += 0.3  # the targets judge, not the online networks
    agent.policy.cvae.decoder[-1].weight.data *= 30  # candidates far apart, and it depends on the
    agent.critic_target.weights[0].data[:, S:] *= 30  # candidate which critic is the smaller one
    q = agent.critic_target(s_next, agent.policy.cvae.decode(s_next, z[:, 0]))
    agent.critic_target.biases[-1].data[0] -= (q[0] - q[1]).median()
    nets = split_critic(agent.critic_target, bcq)
    y, other = r.clone(), r.clone()
    for i in range(64):
        q = []
        for j in range(4):
            s_j = s_next[i : i + 1]
            proposed = torch.tanh(agent.policy.cvae.decoder(torch.cat([s_j, z[i, j : j + 1]], 1)))
            xi = torch.tanh(agent.xi_target(torch.cat([s_j, proposed], dim=1)))
            best = (proposed + 0.05 * xi).clamp(-1, 1)
            q.append(torch.cat([net(torch.cat([s_j, best], dim=1))[0] for net in nets]))
        q = torch.stack(q).detach()  # (4, 2)
        mixed = lam * q.amin(1) + (1 - lam) * q.amax(1)
        y[i] += 0.9 * (1 - d[i]) * mixed.max()
        other[i] += 0.9 * (1 - d[i]) * (lam * q.amax(0).min() + (1 - lam) * q.amax())
    wanted, wrong = (
        (agent.policy.critic(s, a) - x).square().mean((1, 2)).sum() for x in (y, other)
    )
    gradient = gradient_of(wanted, agent.policy.critic)
    if ends < 1 and lam > 0:
        assert (wanted - wrong).abs() > 1e-4  # maximum first would be another target
    metrics = agent.update_critic(*batch(agent))
    torch.testing.assert_close(metrics["losses/critic"], wanted)
    torch.testing.assert_close(gradients(agent.policy.critic), gradient)
    others = [*agent.policy.xi.parameters(), *agent.policy.cvae.parameters()]
    assert all(parameter.grad is None for parameter in others)


def test_one_candidate_unperturbed_evaluates_the_clone(monkeypatch):
    agent = learner(bcq, target_samples=1, phi=0.0, lam=1.0)
    s, a, r, s_next, d = batch(agent)
    assert 0 < d.mean() < 1
    z = fixed_latents(agent, monkeypatch, len(s))
    q_next = agent.critic_target(s_next, agent.policy.cvae.decode(s_next, z)).amin(0)
    y = r + 0.99 * (1 - d) * q_next
    wanted = (agent.policy.critic(s, a) - y).square().mean((1, 2)).sum()
    metrics = agent.critic_loss(s, a, r, s_next, d)
    torch.testing.assert_close(metrics["losses/critic"], wanted)
    torch.testing.assert_close(metrics["values/q_next"], q_next.mean())
    assert metrics["values/gain"] == 0  # nothing to choose from


def test_the_gain_is_the_best_candidates_over_their_mean(monkeypatch):
    agent = learner(bcq, target_samples=2, phi=0.0, lam=1.0)
    *others, s_next, d = batch(agent)
    z = fixed_latents(agent, monkeypatch, 2 * len(s_next)).view(-1, 2, 2 * A)
    pair = [agent.policy.cvae.decode(s_next, z[:, j]) for j in range(2)]
    one, two = (agent.critic_target(s_next, a).amin(0) for a in pair)
    gain = agent.critic_loss(*others, s_next, d)["values/gain"]
    torch.testing.assert_close(gain, 0.5 * (one - two).abs().mean())


def test_critics_learn_the_value_of_a_loop():
    """One state that returns to itself with reward 1: Q = 1 / (1 - γ) = 2."""
    zeros, ones = torch.zeros(64, S), torch.ones(64, 1)
    rows = data(observations=zeros, next_observations=zeros, rewards=ones, terminals=0 * ones)
    agent = learner(bcq, rows, gamma=0.5, tau=0.1, learning_rate=1e-2)
    for _ in range(200):
        agent.update_critic(*batch(agent))
        agent.update_targets()
    q = agent.policy.critic(*batch(agent)[:2])
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)


def value_of_a_narrow_band(**flags) -> float:
    """max Q after training on one state that returns to itself and pays the action, which the data
    has from -0.2 to 0.2 only: what the data's best action is worth is 0.2 / (1 - γ) = 2."""
    actions, zeros = 0.4 * torch.rand(512, 1) - 0.2, torch.zeros(512, S)
    rows = data(512, observations=zeros, next_observations=zeros, actions=actions, rewards=actions)
    rows["terminals"] = torch.zeros(512, 1)
    sizes = dict(gamma=0.9, tau=0.1, cvae_dim=32, hidden_dim=32, batch_size=64)
    agent = learner(bcq, rows, **sizes | flags)
    for _ in range(300):
        metrics = agent.update()
    return metrics["values/q_next"].item()


def test_the_constraint_keeps_q_where_the_data_is():
    inside = value_of_a_narrow_band()
    beyond = value_of_a_narrow_band(phi=2.0)  # any action may be asked for
    clone = value_of_a_narrow_band(phi=0.0, target_samples=1)
    print(f"value of the best action: {inside:.2f} with the constraint, {beyond:.2f} without")
    assert 0.3 < inside < 2.5 + 0.1  # Φ = 0.05 may go beyond the data by that much
    assert beyond > 5
    assert abs(clone) < 0.3 < inside


def test_the_policy_takes_the_candidate_that_q1_likes_best():
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    rows = data(observations=5 + 3 * torch.randn(64, S))
    policy = learner(bcq, rows, low.tolist(), high.tolist(), policy_samples=7).policy
    policy.critic.biases[-1].data[1] += 5
    policy.critic.weights[-1].data[1] *= -5  # Q_2 has no say
    raw = 5 + 3 * torch.randn(20, S)
    mean, std = rows["observations"].mean(0), rows["observations"].std(0, correction=0) + 1e-3
    chosen, actions = [], policy.act(raw)
    first, _ = split_critic(policy.critic, bcq)
    for i in range(20):
        s = ((raw[i] - mean) / std).expand(7, S)
        a = torch.tanh(policy.cvae.decoder(torch.cat([s, policy.z], dim=1)))
        a = a + 0.05 * torch.tanh(policy.xi(torch.cat([s, a], dim=1)))
        chosen.append(first(torch.cat([s, a], dim=1)).argmax().item())
        wanted = low + (a[chosen[-1]] + 1) / 2 * (high - low)
        torch.testing.assert_close(actions[i], wanted)
        torch.testing.assert_close(policy.act(raw[i]), wanted)  # alone as among others
    assert len(set(chosen)) > 1
    assert torch.equal(policy.act(raw), actions)  # a function of the state
    assert policy.z.shape == (7, 2 * A) and policy.z.abs().max() <= 0.5
    assert "z" in policy.state_dict()  # so it is also after loading


# ---------------------------------------------------------------------------------------- ξ


def test_xi_climbs_q1_alone():
    agent = learner(bcq, phi=0.3)
    s, policy = batch(agent)[0], agent.policy
    fixed = [policy.cvae, policy.critic, agent.critic_target, agent.xi_target]
    before, xi = [copies(part) for part in fixed], copies(policy.xi)
    torch.manual_seed(1)
    proposed = policy.cvae.decode(s, torch.randn(64, 2 * A).clamp(-0.5, 0.5)).detach()
    a = proposed + 0.3 * torch.tanh(policy.xi(torch.cat([s, proposed], dim=1)))
    first, _ = split_critic(policy.critic, bcq)
    loss = -first(torch.cat([s, a.clamp(-1, 1)], dim=1)).mean()
    wanted = gradient_of(loss, policy.xi)
    torch.manual_seed(1)
    metrics = agent.update_actor(s)
    torch.testing.assert_close(gradients(policy.xi), wanted)
    torch.testing.assert_close(metrics["losses/actor"], loss)
    torch.testing.assert_close(metrics["actions/perturbation"], (a - proposed).abs().mean())
    assert all(equal(copies(part), old) for part, old in zip(fixed, before))
    assert not equal(copies(policy.xi), xi)
    for part in (policy.cvae, policy.critic):
        assert all(p.grad is None and p.requires_grad for p in part.parameters())


def test_an_update_trains_everything_and_targets_follow_by_tau():
    agent = learner(bcq, tau=0.1)
    policy = agent.policy
    pairs = [(agent.xi_target, policy.xi), (agent.critic_target, policy.critic)]
    assert all(equal(copies(target), copies(online)) for target, online in pairs)
    before = [copies(part) for part in (policy.cvae, *(part for part, _ in pairs))]
    z = policy.z.clone()
    assert agent.phase(1) == agent.phase(2) == agent.update
    agent.update()
    assert not equal(copies(policy.cvae), before[0])
    assert torch.equal(policy.z, z)
    for (target, online), old in zip(pairs, before[1:]):
        assert not equal(copies(online), old)
        for new, was, goal in zip(target.parameters(), old, online.parameters()):
            torch.testing.assert_close(new.data, was + 0.1 * (goal.data - was))


def test_a_batch_keeps_its_rows_together():
    """CVAE, critics and ξ get the columns of the same transitions."""
    agent, seen = learner(bcq, batch_size=32), {}
    rows = batch(agent)
    for name in ("update_cvae", "update_critic", "update_actor"):
        method = getattr(agent, name)

        def spy(*given, name=name, method=method):
            seen[name] = given
            return method(*given)

        setattr(agent, name, spy)
    agent.update()
    drawn = torch.cdist(seen["update_critic"][0], rows[0]).argmin(1)
    assert len(drawn) == 32 and len(set(drawn.tolist())) > 16
    for given in seen.values():
        for one, other in zip(given, rows):
            assert torch.equal(one, other[drawn])


@pytest.mark.parametrize(
    "flags",
    [
        dict(lam=-0.1),
        dict(lam=1.1),
        dict(phi=-0.1),
        dict(latent_clip=-1.0),
        dict(latent_clip=math.nan),
        dict(kl_weight=-1.0),
        dict(target_samples=0),
        dict(policy_samples=0),
    ],
    ids=str,
)
def test_impossible_flags_are_refused(flags):
    name = "--" + next(iter(flags)).replace("_", "-")
    with pytest.raises(SystemExit, match=f"^{name} must be "):
        learner(bcq, **flags)
