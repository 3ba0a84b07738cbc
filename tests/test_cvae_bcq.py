"""What BCQ claims: a CVAE that uses its latent, candidates near the data, Q's choice among them."""

import math

import pytest
import torch
from conftest import load, tiny
from torch import distributions

bcq = load("cvae_bcq")
S, A = 3, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def data(n=64, **columns) -> dict[str, torch.Tensor]:
    """Random transitions; `columns` replaces some."""
    rows = dict(observations=torch.randn(n, S), next_observations=torch.randn(n, S))
    rows |= dict(actions=2 * torch.rand(n, A) - 1, rewards=torch.randn(n, 1))
    rows |= dict(terminals=torch.zeros(n, 1), episodes=torch.arange(n) // 4) | columns
    low, high = -torch.ones(1, rows["actions"].shape[1]), torch.ones(1, rows["actions"].shape[1])
    return dict(action_low=low, action_high=high) | rows


def learner(rows=None, **flags):
    return bcq.BCQ(rows or data(), bcq.Args(**tiny("cvae_bcq", **flags)))


def batch(agent):
    keys = ("observations", "actions", "rewards", "next_observations", "terminals")
    return [agent.data[key] for key in keys]


def copies(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


# ------------------------------------------------------------------------------------ The CVAE


def test_kl_is_the_normal_distributions():
    agent = learner(latent_dim=5)
    s, a, *_ = batch(agent)
    mu, log_sigma = agent.policy.cvae.encode(s, a)
    assert mu.shape == (64, 5)
    q, prior = distributions.Normal(mu, log_sigma.exp()), distributions.Normal(0, 1)
    wanted = distributions.kl_divergence(q, prior).mean(0)
    torch.testing.assert_close(agent.cvae_losses(s, a)[1], wanted)


def test_the_cvaes_loss_is_the_papers():
    """Gradients of |a - D(s, z)|² / A + β KL / Z; the noise of z is one and the same."""
    agent = learner(kl_weight=0.3, batch_size=64)
    s, a, *_ = batch(agent)
    cvae = agent.policy.cvae
    mu, log_sigma = cvae.encode(s, a)
    torch.manual_seed(1)
    error = (a - cvae.decode(s, mu + log_sigma.exp() * torch.randn(64, 2 * A))).square()
    kl = (mu.square() + log_sigma.exp().square() - 1) / 2 - log_sigma
    loss = error.sum(1).mean() / A + 0.3 * kl.sum(1).mean() / (2 * A)
    wanted = torch.autograd.grad(loss, list(cvae.parameters()))
    torch.manual_seed(1)
    agent.update_cvae(s, a)
    for parameter, gradient in zip(cvae.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient)


def trained(actions, steps=500, **flags):
    """A CVAE of these actions, all of one state, its losses on them, its proposals (999, 1)."""
    n = len(actions)
    rows = data(n, observations=torch.zeros(n, S), actions=actions)
    sizes = dict(learning_rate=3e-3, cvae_dim=32, latent_dim=2, latent_clip=math.inf)
    agent = learner(rows, **sizes | flags)
    s = agent.data["observations"]
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
    z = learner(latent_dim=4).policy.sample_latents(10_000)
    assert z.shape == (10_000, 4) and z.abs().max() == 0.5
    at_the_bound = (z.abs() == 0.5).float().mean().item()
    assert at_the_bound == pytest.approx(math.erfc(0.5 / math.sqrt(2)), abs=0.01)  # clipped
    z = learner(latent_dim=4, latent_clip=math.inf).policy.sample_latents(10_000)
    assert z.std().item() == pytest.approx(1, abs=0.02) and z.abs().max() > 3


def test_perturbations_are_bounded():
    policy = learner(phi=0.05).policy
    policy.xi[-1].weight.data *= 1000
    s, a = torch.randn(99, S), 2 * torch.rand(99, A) - 1
    moved = policy.perturb(s, a)
    assert moved.abs().max() <= 1
    inside = a.abs() < 0.95
    assert (moved - a).abs().max() < 0.05001 and (moved - a)[inside].abs().max() > 0.0499
    torch.testing.assert_close(learner(phi=0.0).policy.perturb(s, a), a)


@pytest.mark.parametrize("width, spread", [(0.15, (0, 0.05)), (0.85, (0.08, 0.4))])
def test_candidates_stay_near_the_datas_actions(width, spread):
    """Actions within `width` of f(s). Only where they vary by more than β / 4 does z pay: narrow
    behaviour is proposed as its mean, and what the policy adds to it is ξ."""
    s = torch.randn(2000, S)
    wanted = 0.15 * torch.tanh(s[:, :A])
    actions = wanted + width * (2 * torch.rand(2000, A) - 1)
    flags = dict(cvae_dim=64, batch_size=128, learning_rate=2e-3)
    agent = learner(data(2000, observations=s, actions=actions), **flags)
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


# ------------------------------------------------------------------------ Q's target and choice


def fixed_latents(agent, monkeypatch, n) -> torch.Tensor:
    z = agent.policy.sample_latents(n)
    monkeypatch.setattr(agent.policy, "sample_latents", lambda m: z)
    return z


@pytest.mark.parametrize("lam, d", [(0.75, 0.0), (1.0, 0.0), (0.0, 0.0), (0.75, 1.0)])
def test_target_is_the_best_candidates_soft_minimum(lam, d, monkeypatch):
    """State by state and candidate by candidate; with λ mixed before the maximum is taken."""
    agent = learner(lam=lam, gamma=0.9, target_samples=4)
    s, a, r, s_next, _ = batch(agent)
    z = fixed_latents(agent, monkeypatch, 4 * len(s)).view(len(s), 4, -1)
    next(agent.xi_target.parameters()).data += 0.3  # the targets judge, not the online networks
    agent.policy.cvae.decoder[-1].weight.data *= 30  # candidates far apart, and it depends on the
    agent.q_target.weights[0].data[:, S:] *= 30  # candidate which critic is the smaller one
    q = agent.q_target(s_next, agent.policy.cvae.decode(s_next, z[:, 0]))
    agent.q_target.biases[-1].data[0] -= (q[0] - q[1]).median()
    y, other = r.clone(), r.clone()
    for i in range(len(s)):
        q = []
        for j in range(4):
            proposed = agent.policy.cvae.decode(s_next[i : i + 1], z[i, j : j + 1])
            xi = torch.tanh(agent.xi_target(torch.cat([s_next[i : i + 1], proposed], dim=1)))
            best = (proposed + 0.05 * xi).clamp(-1, 1)
            q.append(agent.q_target(s_next[i : i + 1], best)[:, 0, 0])
        q = torch.stack(q)  # (4, 2)
        mixed = lam * q.amin(1) + (1 - lam) * q.amax(1)
        y[i] += 0.9 * (1 - d) * mixed.max()
        other[i] += 0.9 * (1 - d) * (lam * q.amax(0).min() + (1 - lam) * q.amax())
    loss = agent.critic_losses(s, a, r, s_next, torch.full_like(r, d))[0]
    wanted, wrong = ((agent.policy.q(s, a) - x).square().mean((1, 2)).sum() for x in (y, other))
    torch.testing.assert_close(loss, wanted)
    if d == 0 and lam > 0:
        assert (wanted - wrong).abs() > 1e-4  # maximum first would be another target


def test_one_candidate_unperturbed_evaluates_the_clone(monkeypatch):
    agent = learner(target_samples=1, phi=0.0, lam=1.0)
    s, a, r, s_next, d = batch(agent)
    z = fixed_latents(agent, monkeypatch, len(s))
    y = r + 0.99 * agent.q_target(s_next, agent.policy.cvae.decode(s_next, z)).amin(0)
    wanted = (agent.policy.q(s, a) - y).square().mean((1, 2)).sum()
    torch.testing.assert_close(agent.critic_losses(s, a, r, s_next, d)[0], wanted)


def test_critics_learn_the_value_of_a_loop():
    """One state that returns to itself with reward 1: Q = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows["rewards"] = torch.ones(64, 1)
    agent = learner(rows, gamma=0.5, tau=0.1, learning_rate=1e-2)
    for _ in range(200):
        agent.update_critic(*batch(agent))
        agent.update_targets()
    q = agent.policy.q(*batch(agent)[:2])
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)


def value_of_a_narrow_band(**flags) -> float:
    """max Q after training on one state that returns to itself and pays the action, which the data
    has from -0.2 to 0.2 only: what the data's best action is worth is 0.2 / (1 - γ) = 2."""
    actions = 0.4 * torch.rand(512, 1) - 0.2
    zeros = torch.zeros(512, S)
    rows = data(512, observations=zeros, next_observations=zeros, actions=actions, rewards=actions)
    sizes = dict(gamma=0.9, tau=0.1, cvae_dim=32, hidden_dim=32, batch_size=64)
    agent = learner(rows, **sizes | flags)
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
    low, high = torch.tensor([[-2.0, -1.0]]), torch.tensor([[2.0, 3.0]])
    rows = data(observations=5 + 3 * torch.randn(64, S)) | dict(action_low=low, action_high=high)
    policy = learner(rows, policy_samples=7).policy
    policy.q.biases[-1].data[1] += 5
    policy.q.weights[-1].data[1] *= -5  # Q_2 has no say
    raw = 5 + 3 * torch.randn(20, S)
    chosen, actions = [], policy.act(raw)
    for i in range(20):
        s = ((raw[i : i + 1] - policy.state_mean) / policy.state_std).expand(7, S)
        a = policy.perturb(s, policy.cvae.decode(s, policy.z))
        chosen.append(policy.q(s, a)[0, :, 0].argmax().item())
        wanted = low + (a[chosen[-1]] + 1) / 2 * (high - low)
        torch.testing.assert_close(actions[i : i + 1], wanted)
        torch.testing.assert_close(policy.act(raw[i : i + 1]), wanted)  # alone as among others
    assert len(set(chosen)) > 1
    assert torch.equal(policy.act(raw), actions)  # a function of the state
    assert policy.z.shape == (7, 2 * A) and policy.z.abs().max() <= 0.5


def test_xi_climbs_q1_alone():
    agent = learner(phi=0.3)
    s, policy = batch(agent)[0], agent.policy
    fixed = [policy.cvae, policy.q, agent.q_target, agent.xi_target]
    before, xi = [copies(part) for part in fixed], copies(policy.xi)
    torch.manual_seed(1)
    a = policy.cvae.decode(s, torch.randn(64, 2 * A).clamp(-0.5, 0.5)).detach()
    a = (a + 0.3 * torch.tanh(policy.xi(torch.cat([s, a], dim=1)))).clamp(-1, 1)
    wanted = torch.autograd.grad(-policy.q(s, a)[0].mean(), list(policy.xi.parameters()))
    torch.manual_seed(1)
    agent.update_xi(s)
    for parameter, gradient in zip(policy.xi.parameters(), wanted):
        torch.testing.assert_close(parameter.grad, gradient)
    assert all(equal(copies(part), old) for part, old in zip(fixed, before))
    assert not equal(copies(policy.xi), xi)
    for part in (policy.cvae, policy.q):
        assert all(p.grad is None and p.requires_grad for p in part.parameters())


def test_an_update_trains_everything_and_targets_follow_by_tau():
    agent = learner(tau=0.1)
    pairs = [(agent.xi_target, agent.policy.xi), (agent.q_target, agent.policy.q)]
    assert all(equal(copies(target), copies(online)) for target, online in pairs)
    before = [copies(part) for part in (agent.policy.cvae, *(part for part, _ in pairs))]
    agent.update()
    assert not equal(copies(agent.policy.cvae), before[0])
    for (target, online), old in zip(pairs, before[1:]):
        assert not equal(copies(target), old)
        for new, was, goal in zip(target.parameters(), old, online.parameters()):
            torch.testing.assert_close(new.data, was + 0.1 * (goal.data - was))


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
    with pytest.raises(SystemExit, match=f"{name} .*it must be"):
        learner(**flags)
