"""What a2po.py claims: a condition that says how good an action was, a CVAE that listens to it, an
actor that asks for the best; each loss against an independent computation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
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

a2po = load("a2po")
ONE_SIGMA = dict(xi_norm="running", xi_critic="min", layer_norm=False)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def parts(agent) -> dict[str, torch.nn.Module]:
    """Every network, by the optimiser or the target update that moves it."""
    policy = agent.policy
    return {
        "critic": torch.nn.ModuleList([agent.critic, agent.v]),
        "cvae": torch.nn.ModuleList([policy.encoder, policy.decoder]),
        "actor": policy.actor,
        "targets": torch.nn.ModuleList([agent.actor_target, agent.critic_target]),
    }


def moved(agent, update) -> set[str]:
    before = {name: [copies(net) for net in part.children()] for name, part in parts(agent).items()}
    update()
    after = {name: [copies(net) for net in part.children()] for name, part in parts(agent).items()}
    found = {name for name in before if not all(map(equal, before[name], after[name]))}
    for name in found - {"actor"}:  # both networks of a pair
        assert not any(equal(*pair) for pair in zip(before[name], after[name])), name
    return found


def action(policy, s, xi, actor=None) -> torch.Tensor:
    """p(π(s, ξ), s, ξ), written once more."""
    z = torch.tanh((actor or policy.actor)(torch.cat([s, xi], dim=-1)))
    return torch.tanh(policy.decoder(torch.cat([s, xi, z], dim=-1)))


# ----------------------------------------------------------------------------------- The policy


@pytest.mark.parametrize("layer_norm", [True, False])
def test_twin_critic_is_two_networks(layer_norm):
    critic = learner(a2po, layer_norm=layer_norm).critic
    assert len(critic.weights) == 4  # three hidden layers
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    for i, net in enumerate(split_critic(critic, a2po)):
        torch.testing.assert_close(q[i], net(torch.cat([s, a], dim=-1)))
    torch.testing.assert_close(critic(s, a, members=1), q[:1])


@pytest.mark.parametrize("x", [[0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]])
def test_act_answers_in_the_environments_bounds(x):
    """A decoder that outputs the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(a2po, low=low.tolist(), high=high.tolist()).policy
    policy.decoder[-1].weight.data.zero_()
    policy.decoder[-1].bias.data = torch.tensor(x).atanh()
    wanted = low + (torch.tensor(x) + 1) / 2 * (high - low)
    for observations in (torch.randn(5, S), torch.randn(5, S).double(), torch.randn(S)):
        a = policy.act(observations)
        torch.testing.assert_close(a, wanted.expand(*observations.shape[:-1], A))
        np.testing.assert_allclose(policy.act(observations.numpy()), a.numpy())


def test_act_sees_normalised_states_and_the_best_condition():
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    policy = learner(a2po, rows).policy
    s = policy.scaling.state(rows["observations"])
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(
        policy.act(rows["observations"]), action(policy, s, s[:, :1] * 0 + 1)
    )
    other = action(policy, s, torch.full((64, 1), -0.3))
    torch.testing.assert_close(policy.act(rows["observations"], xi=-0.3), other)


def test_evaluation_at_further_conditions():
    policy = learner(a2po, eval_xi=(-1.0, 0.5)).policy
    assert policy.flags == ("eval_xi",)
    s = torch.randn(4, S)
    actors = policy.actors()
    assert list(actors) == ["", "_xi_-1", "_xi_0.5"]
    for suffix, xi in (("", 1.0), ("_xi_-1", -1.0), ("_xi_0.5", 0.5)):
        assert torch.equal(actors[suffix](s), policy.act(s, xi=xi))


# ---------------------------------------------------------------------------- Critics and value


@pytest.mark.parametrize("scale, xi_norm", [(1.0, "local"), (100.0, "running"), (1.0, "none")])
def test_critics_and_value_regress_on_the_value_of_the_best_condition(scale, xi_norm):
    """Gradients of Q_1, Q_2 and V, on data with terminals and several action dimensions."""
    rows = data(observations=5 + 3 * torch.randn(64, S), next_observations=5 + torch.randn(64, S))
    agent = learner(a2po, rows, gamma=0.9, reward_scale=scale, xi_norm=xi_norm)
    for parameter in [*agent.actor_target.parameters(), *agent.critic_target.parameters()]:
        parameter.data += 0.3 * torch.randn_like(parameter)  # the targets have the say
    mean, std = rows["observations"].mean(0), rows["observations"].std(0, correction=0) + 1e-3
    s, s_next = ((rows[key] - mean) / std for key in ("observations", "next_observations"))
    a, r, d = rows["actions"], scale * rows["rewards"], rows["terminals"]
    assert 0 < d.mean() < 1
    for one, other in zip(batch(agent), (s, a, r, s_next, d)):
        torch.testing.assert_close(one, other)

    torch.manual_seed(1)
    eps = (0.2 * torch.randn(64, A)).clamp(-0.5, 0.5)
    with torch.no_grad():
        a_next = action(agent.policy, s_next, torch.ones(64, 1), agent.actor_target) + eps
        x = torch.cat([s_next, a_next.clamp(-1, 1)], dim=-1)
        one, two = (net(x) for net in split_critic(agent.critic_target, a2po))
        y = r + 0.9 * (1 - d) * torch.minimum(one, two)
    q = agent.critic(s, a)
    losses = [(q[i] - y).square().mean() for i in range(2)]
    wanted_q = gradient_of(losses[0] + losses[1], agent.critic)
    v, *size = agent.v(s).split(1, dim=1)
    value = (v - y).square().mean()
    if xi_norm == "local":  # the value's second output is the size of the advantages
        error = (0.5 * (q[0] + q[1]) - v).detach()
        value = value + (1.25 * F.softplus(size[0]) + 1e-3 - 1.25 * error.abs()).square().mean()
    wanted_v = gradient_of(value, agent.v)
    torch.manual_seed(1)
    metrics, _ = agent.update_critic(*batch(agent))
    torch.testing.assert_close(metrics["losses/critic"], losses[0] + losses[1] + value)
    torch.testing.assert_close(gradients(agent.critic), wanted_q)
    torch.testing.assert_close(gradients(agent.v), wanted_v)


@pytest.mark.parametrize("d", [0.0, 1.0])
def test_target_is_masked_by_terminals_alone(d):
    """y = r + γ (1 - d) min Q', read from the losses of critics that say 0."""
    agent = learner(a2po, gamma=0.9, xi_norm="running")  # no σ(s) in the loss
    constant_critic(agent.critic, 0, 0)
    constant_critic(agent.critic_target, 5, 3)
    constant_net(agent.v, 0.0)
    s, a, r, s_next, _ = batch(agent)
    metrics, *_ = agent.critic_loss(s, a, r, s_next, torch.full_like(r, d))
    y = r + 0.9 * (1 - d) * 3
    torch.testing.assert_close(metrics["losses/critic"], 3 * y.square().mean())


def test_target_actions_are_the_target_actors_best_plus_clipped_noise():
    agent = learner(a2po)
    seen = []
    agent.critic_target.forward = lambda s, a: seen.append(a) or torch.zeros(2, len(a), 1)
    next(agent.actor_target.parameters()).data += 0.3  # the online actor has no say
    s_next = batch(agent)[3]
    best = action(agent.policy, s_next, torch.ones(len(s_next), 1), agent.actor_target)

    def asked(**flags):
        vars(agent.args).update(flags)
        agent.critic_loss(*batch(agent))
        return seen[-1]

    torch.testing.assert_close(asked(policy_noise=0.0), best)
    noise = asked(policy_noise=0.2, noise_clip=9.0) - best
    assert noise.std().item() == pytest.approx(0.2, rel=0.25)
    noise = asked(policy_noise=100.0, noise_clip=0.05) - best
    assert noise.abs().max() < 0.051 and (noise.abs() > 0.049).float().mean() > 0.9
    assert asked(policy_noise=100.0, noise_clip=100.0).abs().max() <= 1  # still an action


def test_critics_learn_the_value_of_a_loop():
    """One state that returns to itself with reward 1: Q = V = 1 / (1 - γ) = 2."""
    zeros, ones = torch.zeros(64, S), torch.ones(64, 1)
    rows = data(observations=zeros, next_observations=zeros, rewards=ones, terminals=0 * ones)
    agent = learner(a2po, rows, gamma=0.5, tau=0.1, learning_rate=1e-2)
    for _ in range(200):
        agent.update_critic(*batch(agent))
        agent.update_targets()
    q, v = agent.critic(*batch(agent)[:2]), agent.v(zeros)[:, :1]
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)
    torch.testing.assert_close(v, torch.full_like(v, 2), atol=0.1, rtol=0)


def test_v_is_the_mean_of_q_over_the_datas_actions():
    """One state, two actions that pay -1 and 3 and end the task, the first three times as often."""
    better = (torch.arange(64) % 4 == 0)[:, None]
    rows = data(observations=torch.zeros(64, S), rewards=torch.where(better, 3.0, -1.0))
    rows |= dict(actions=torch.where(better, 0.5, -0.5).expand(64, A), terminals=torch.ones(64, 1))
    agent = learner(a2po, rows, learning_rate=1e-2)
    for _ in range(300):
        _, xi = agent.update_critic(*batch(agent))
    s, a, r, *_ = batch(agent)
    assert (agent.critic(s, a) - r).abs().max() < 0.1
    assert agent.v(s)[:, :1].abs().max() < 0.1
    assert xi[better].min() > 0.8 and -0.9 < xi[~better].max() < -0.2  # by the advantage, graded


def test_targets_follow_by_tau():
    agent = learner(a2po, tau=0.1)
    pairs = [(agent.actor_target, agent.policy.actor), (agent.critic_target, agent.critic)]
    for target, online in pairs:
        assert equal(copies(target), copies(online))  # they begin equal
        for parameter in online.parameters():
            parameter.data += torch.randn_like(parameter)
    before = [copies(target) for target, _ in pairs]
    agent.update_targets()
    for (target, online), old in zip(pairs, before):
        for new, was, goal in zip(target.parameters(), old, online.parameters()):
            torch.testing.assert_close(new.data, was + 0.1 * (goal.data - was))


# -------------------------------------------------------------------------------- The condition


def test_condition_is_a_graded_sign():
    agent = learner(a2po)
    advantage = torch.tensor([-1e9, -2.0, -0.1, 0.0, 0.1, 2.0, 1e9])[:, None]
    xi = agent.condition(advantage, torch.tensor(1.0))
    assert xi.abs().max() <= 1 and torch.equal(xi.sign(), advantage.sign())
    assert (xi.diff(dim=0) > 0).all()


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (dict(xi="fixed"), [1, 1, 1, 1]),
        (dict(xi="discrete"), [-1, -1, 1, 1]),
        (dict(xi_norm="none", sigma=10), np.tanh([-1, -0.1, 0.1, 1])),
        (dict(xi_norm="running", sigma=10), np.tanh([-0.1, -0.01, 0.01, 0.1])),
        (dict(xi_norm="local", sigma=10), np.tanh([-0.1, -0.01, 0.01, 0.1])),
    ],
    ids=str,
)
def test_modes_of_the_condition(flags, wanted):
    sigma = torch.full((4, 1), flags.pop("sigma", 1.0))
    agent = learner(a2po, **flags)
    xi = agent.condition(torch.tensor([-1.0, -0.1, 0.1, 1.0])[:, None], sigma)
    torch.testing.assert_close(xi[:, 0], torch.tensor(wanted, dtype=torch.float32))


def condition_of(agent) -> torch.Tensor:
    return agent.update_critic(*batch(agent))[1]


def test_sigma_is_that_of_the_state():
    """Two states, in one of which the actions matter ten times as much: their best actions have the
    same condition. With one σ for both, the quiet state's never hear of a condition near 1."""
    loud = (torch.arange(256) % 2 == 0)[:, None]
    good = (torch.arange(256) % 4 < 2)[:, None]
    rows = data(256, observations=torch.where(loud, 1.0, -1.0).expand(256, S))
    rows |= {"rewards": torch.where(loud, 10.0, 1.0) * torch.where(good, 1, -1)}
    rows |= {"actions": torch.where(good, 0.5, -0.5).expand(256, A)}
    rows |= {"terminals": torch.ones(256, 1)}
    found = {}
    for norm in ("local", "running"):
        agent = learner(a2po, rows, xi_norm=norm, learning_rate=1e-2, hidden_dim=32)
        for _ in range(600):
            agent.update_critic(*batch(agent))
        best, xi = good, condition_of(agent)
        assert not xi.requires_grad  # CVAE and actor do not train σ(s)
        found[norm] = [xi[best & who].mean().item() for who in (loud, ~loud)]
        sigma = agent.update_critic(*batch(agent))[0]["advantage/sigma"].item()
        print(norm, found[norm], sigma)
        # a Gaussian's is 1.25 times the mean of the absolute value: of 10 and of 1, or together
        assert sigma == pytest.approx(1.25 * 5.5 if norm == "local" else 101**0.5 / 2**0.5, rel=0.1)
    for xi in found["local"]:
        assert xi == pytest.approx(math.tanh(1 / 1.25), abs=0.12)
    assert found["running"][1] < 0.25 < 0.8 < found["running"][0]


def test_running_sigma_is_the_standard_deviation_of_the_advantage():
    """It is in the checkpoint, an update moves it by 1 %, and a validation does not."""
    agent = learner(a2po, learning_rate=0.0, **ONE_SIGMA)
    assert agent.state_dict()["sigma_a"] == 1
    s, a, *_ = batch(agent)
    agent.critic.biases[-1].data[0] += 0.1 * torch.randn(())  # either critic is the smaller one
    std = (agent.critic(s, a).amin(0) - agent.v(s)).std().item()
    assert abs(std - 1) > 0.3
    metrics, xi = agent.update_critic(*batch(agent))
    assert agent.sigma_a.item() == pytest.approx(0.99 + 0.01 * std, rel=1e-5)
    assert metrics["advantage/sigma"] == agent.sigma_a and metrics["advantage/xi"] is xi
    old = metrics["advantage/sigma"]
    agent.update_critic(*batch(agent))
    assert agent.sigma_a < old  # a metric of the past stays as it was
    before = agent.sigma_a.clone()
    agent.validate(data())
    assert agent.sigma_a == before
    for last in (agent.critic.weights[-1], agent.critic.biases[-1], *agent.v[-1].parameters()):
        last.data.zero_()
    for _ in range(1000):
        agent.update_critic(*batch(agent))
    assert agent.sigma_a.item() == pytest.approx(1e-3)  # and never a division by 0


def settled_condition(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ξ once σ_A has settled, with critics and V multiplied by `scale`."""
    torch.manual_seed(0)
    agent = learner(a2po, learning_rate=0.0, **ONE_SIGMA)
    for last in (agent.critic.weights[-1], agent.critic.biases[-1], *agent.v[-1].parameters()):
        last.data *= scale
    s, a, *_ = batch(agent)
    agent.v[-1].bias.data += (agent.critic(s, a).amin(0) - agent.v(s)).mean()  # good and bad ones
    for _ in range(700):
        _, xi = agent.update_critic(*batch(agent))
    return xi, agent.sigma_a


def test_running_norm_makes_the_condition_independent_of_the_rewards_scale():
    (small, sigma), (large, larger) = settled_condition(50.0), settled_condition(5000.0)
    assert small.std() > 0.3
    torch.testing.assert_close(small, large, atol=1e-2, rtol=0)
    torch.testing.assert_close(100 * sigma, larger, rtol=1e-2, atol=0)


@pytest.mark.parametrize("critic", ["mean", "min", "q1"])
def test_condition_takes_the_critic_asked_for(critic):
    agent = learner(a2po, xi_critic=critic, xi_norm="none", learning_rate=0.0)
    s, a, *_ = batch(agent)
    q = agent.critic(s, a)
    agent.critic.biases[-1].data[0] -= (q[0] - q[1]).median()  # either is the smaller one
    q, v = agent.critic(s, a), agent.v(s)
    value = {"mean": (q[0] + q[1]) / 2, "min": torch.minimum(q[0], q[1]), "q1": q[0]}[critic]
    _, xi = agent.update_critic(*batch(agent))
    torch.testing.assert_close(xi, torch.tanh(value - v))
    assert not xi.requires_grad


def test_condition_is_that_of_the_critics_before_their_step():
    agent = learner(a2po, xi_norm="none", learning_rate=0.1)
    s, a, *_ = batch(agent)
    wanted = torch.tanh(agent.critic(s, a).mean(0) - agent.v(s))
    _, xi = agent.update_critic(*batch(agent))
    torch.testing.assert_close(xi, wanted)


# ------------------------------------------------------------------------------------- The CVAE


def encoded(agent, s, a, xi) -> tuple[torch.Tensor, torch.Tensor]:
    x = agent.policy.encoder(torch.cat([s, xi, a], dim=-1))
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:].clamp(-4, 15)


def test_kl_is_the_normal_distributions():
    agent = learner(a2po, latent_dim=5)
    agent.policy.encoder[-1].weight.data *= 30  # some standard deviations are held at e^-4
    s, a, *_ = batch(agent)
    xi = torch.rand(len(s), 1)
    mu, log_sigma = encoded(agent, s, a, xi)
    assert mu.shape == (64, 5) and log_sigma.min() == -4
    q, prior = distributions.Normal(mu, log_sigma.exp()), distributions.Normal(0, 1)
    wanted = distributions.kl_divergence(q, prior).mean(0)
    torch.testing.assert_close(agent.cvae_losses(s, a, xi)[1], wanted)


def test_the_cvaes_loss_is_the_papers():
    """Gradients of |a - p(z, c)|² / A + β KL / 2A; the noise of z is one and the same."""
    agent = learner(a2po, kl_weight=0.3)
    s, a, *_ = batch(agent)
    xi, cvae = 2 * torch.rand(64, 1) - 1, parts(agent)["cvae"]
    mu, log_sigma = encoded(agent, s, a, xi)
    torch.manual_seed(1)
    z = mu + log_sigma.exp() * torch.randn(64, 2 * A)
    error = (a - torch.tanh(agent.policy.decoder(torch.cat([s, xi, z], dim=-1)))).square()
    kl = (mu.square() + log_sigma.exp().square() - 1) / 2 - log_sigma
    reconstruction = error.sum(1).mean() / A
    wanted = gradient_of(reconstruction + 0.3 * kl.sum(1).mean() / (2 * A), cvae)
    torch.manual_seed(1)
    metrics = agent.update_cvae(s, a, xi)
    torch.testing.assert_close(gradients(cvae), wanted)
    torch.testing.assert_close(metrics["losses/reconstruction"], reconstruction)
    torch.testing.assert_close(metrics["losses/kl"], kl.mean())
    torch.testing.assert_close(metrics[f"kl/z{2 * A - 1}"], kl.mean(0)[-1])
    assert all(p.grad is None for p in agent.policy.actor.parameters())


def two_modes(n=512) -> dict[str, torch.Tensor]:
    """One state, half of the actions at -0.8 and half at 0.8."""
    actions = 0.8 * torch.randint(2, (n, 1)).mul(2).sub(1) + 0.02 * torch.randn(n, 1)
    return data(n, observations=torch.zeros(n, S), actions=actions)


def trained_cvae(steps=500, **flags):
    flags = dict(learning_rate=3e-3, cvae_dim=32, latent_dim=2) | flags
    agent = learner(a2po, two_modes(), **flags)
    s, a, *_ = batch(agent)
    first = agent.cvae_losses(s, a, torch.zeros(len(s), 1))[0].item()
    for _ in range(steps):
        i = torch.randint(len(s), (64,))
        agent.update_cvae(s[i], a[i], torch.zeros(64, 1))
    reconstruction, kl = agent.cvae_losses(s, a, torch.zeros(len(s), 1))
    return agent, first, reconstruction.item(), kl.detach()


def test_cvae_uses_its_latent():
    """One latent says which mode; a regression would answer 0 and be wrong by 0.64."""
    agent, first, reconstruction, kl = trained_cvae()
    assert reconstruction < 0.1 < 0.5 < first
    assert kl.max() > 0.3  # about log 2 nats are needed
    decoded = agent.policy.decode(torch.zeros(999, S), torch.zeros(999, 1), torch.randn(999, 2))
    near = [(decoded - mode).abs().lt(0.3).float().mean() for mode in (-0.8, 0.8)]
    assert min(near) > 0.2  # both modes come from the prior's latents

    _, _, reconstruction, kl = trained_cvae(kl_weight=100.0)  # a latent that costs too much
    assert kl.max() < 0.05 and reconstruction > 0.5


def test_validation_says_how_far_the_latent_moves_the_action():
    """And it has the losses of training, at the held-out rows' own condition."""
    agent = learner(a2po, policy_noise=0.0)
    rows = data()
    s, a, r, s_next, d = agent.columns(rows)
    metrics, advantage, sigma = agent.critic_loss(s, a, r, s_next, d)
    seen, losses = [], agent.cvae_losses
    agent.cvae_losses = lambda *given: seen.append(given) or losses(*given)
    found = agent.validate(rows)
    assert set(found) == {"critic", "reconstruction", "kl", "spread_over_z"}
    torch.testing.assert_close(found["critic"], metrics["losses/critic"])
    for one, other in zip(seen[0], (s, a, torch.tanh(advantage / sigma))):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found["kl"], losses(*seen[0])[1].mean())
    first = agent.policy.decoder[0].weight.data
    first[:, S + 1 :] *= 100  # z has all the say, or none
    assert agent.validate(rows)["spread_over_z"] > 5 * found["spread_over_z"]
    first[:, S + 1 :] = 0
    assert agent.validate(rows)["spread_over_z"] < 1e-6


# ------------------------------------------------------------------------------------ The actor


def test_the_actors_step_goes_through_frozen_networks():
    agent = learner(a2po)
    s, a, *_ = batch(agent)
    frozen = [agent.policy.encoder, agent.policy.decoder, agent.critic, agent.v]
    xi = torch.rand(len(s), 1)
    assert moved(agent, lambda: agent.update_actor(s, a, xi)) == {"actor"}
    assert all(parameter.grad.abs().max() > 0 for parameter in agent.policy.actor.parameters())
    for part in frozen:
        assert all(p.grad is None and p.requires_grad for p in part.parameters())


@pytest.mark.parametrize("alpha, bc_weight", [(2.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
def test_the_actors_loss_is_the_papers(alpha, bc_weight):
    agent = learner(a2po, alpha=alpha, bc_weight=bc_weight)
    s, a, *_ = batch(agent)
    xi, policy = 2 * torch.rand(len(s), 1) - 1, agent.policy
    policy.decoder[-1].weight.data *= 5  # an action that depends on condition and latent
    best = action(policy, s, torch.ones_like(xi))
    agent.critic.biases[-1].data -= agent.critic(s, best)[0].median()  # Q of both signs
    first, _ = split_critic(agent.critic, a2po)
    q = first(torch.cat([s, best], dim=-1))
    bc = F.mse_loss(action(policy, s, xi), a)
    loss = -alpha * q.mean() / q.detach().abs().mean() + bc_weight * bc
    wanted = gradient_of(loss, policy.actor)
    metrics = agent.update_actor(s, a, xi)
    torch.testing.assert_close(gradients(policy.actor), wanted)
    torch.testing.assert_close(metrics["losses/actor"], loss)
    torch.testing.assert_close(metrics["losses/bc"], bc)


def test_lambda_makes_q_independent_of_the_rewards_scale():
    found = []
    for scale in (1, 1000):
        torch.manual_seed(0)
        agent = learner(a2po)
        agent.critic.weights[-1].data *= scale
        agent.critic.biases[-1].data *= scale
        s, a, *_ = batch(agent)
        lam = agent.update_actor(s, a, torch.zeros(len(s), 1))["values/lambda"]
        found.append((gradients(agent.policy.actor), lam))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], 1000 * found[1][1])


# ------------------------------------------------------------------------------------- The steps


@pytest.mark.parametrize(
    "step, wanted",  # every second one is the actor's, too; the CVAE learns in the first ten
    [
        (9, {"critic", "cvae"}),
        (10, {"critic", "cvae", "actor", "targets"}),
        (11, {"critic"}),
        (12, {"critic", "actor", "targets"}),
    ],
)
def test_what_each_step_moves(step, wanted):
    agent = learner(a2po, cvae_min_steps=10, steps=20)
    assert moved(agent, agent.phase(step)) == wanted
    for part in parts(agent).values():
        assert all(parameter.requires_grad for parameter in part.parameters())


def test_a_batch_keeps_its_rows_together():
    """CVAE and actor get the states, the actions and the conditions of the same transitions."""
    agent = learner(a2po, xi_norm="none", learning_rate=0.0, batch_size=32)
    s, a, *_ = rows = batch(agent)
    xi = torch.tanh(agent.critic(s, a).mean(0) - agent.v(s)).detach()
    seen = {}
    for name in ("update_critic", "update_cvae", "update_actor"):
        method = getattr(agent, name)

        def spy(*given, name=name, method=method):
            seen[name] = given
            return method(*given)

        setattr(agent, name, spy)
    agent.update(cvae=True, actor=True)
    drawn = torch.cdist(seen["update_critic"][0], s).argmin(1)  # the rows of the batch
    assert len(drawn) == 32 and len(set(drawn.tolist())) > 16
    for one, other in zip(seen["update_critic"], rows):
        torch.testing.assert_close(one, other[drawn])
    for name in ("update_cvae", "update_actor"):
        for one, other in zip(seen[name], (s, a, xi)):
            torch.testing.assert_close(one, other[drawn], msg=name)


@pytest.mark.parametrize(
    "flags, k",
    [
        (dict(steps=1000, cvae_fraction=0.2, cvae_min_steps=0), 200),
        (dict(steps=1000, cvae_fraction=0.2, cvae_min_steps=300), 300),
        (dict(steps=1000, cvae_fraction=0.2, cvae_min_steps=2000), math.inf),
    ],
    ids=str,
)
def test_the_cvae_is_frozen_after_k_steps(flags, k):
    agent = learner(a2po, **flags)
    for step in range(1, 1001):
        assert agent.phase(step).args == (step <= k, step % 2 == 0), step
    assert len({agent.phase(step) for step in range(1, 1001)}) == (4 if k < 1000 else 2)  # graphs


def test_the_actor_waits_for_its_turn():
    agent = learner(a2po, policy_delay=3)
    assert [agent.phase(step).args[1] for step in range(1, 7)] == 2 * [False, False, True]
    with pytest.raises(SystemExit, match="--policy-delay must be 1 or more"):
        learner(a2po, policy_delay=0)


# ------------------------------------------------------------------- What the paper is made for

CLUSTERS = torch.tensor([[-0.6, 0.5], [0.6, 0.5], [0.0, -0.7]])  # bad, mediocre, good


def bandit(steps, **flags):
    """No state, three clusters of actions that pay -1, 0 and 1: the paper's first figure."""
    kind = torch.arange(600) % 3
    rows = data(600, observations=torch.zeros(600, S), next_observations=torch.zeros(600, S))
    rows |= {"actions": CLUSTERS[kind] + 0.05 * torch.randn(600, 2)}
    rows |= {"rewards": kind[:, None] - 1.0, "terminals": torch.ones(600, 1)}
    sizes = dict(hidden_dim=32, cvae_dim=64, batch_size=128, learning_rate=1e-3)
    agent = learner(a2po, rows, **sizes | dict(cvae_min_steps=steps) | flags)
    for step in range(1, steps + 1):
        metrics = agent.phase(step)()
    return agent, metrics


def test_the_condition_asks_for_better_actions():
    agent, _ = bandit(1200)
    for kind, xi in enumerate((-1.0, 0.0, 1.0)):
        a = agent.policy.act(torch.zeros(1, S), xi=xi)
        distance = (a - CLUSTERS).norm(dim=1)
        print(f"xi {xi:+.0f}: {a[0].tolist()}, distances {distance.tolist()}")
        assert distance.argmin() == kind and distance[kind] < 0.35


def test_official_flags_saturate_the_condition():
    """Rewards in the hundreds and no normalisation make ξ a sign; the defaults keep it graded."""
    share = []
    official = dict(reward_scale=100.0, xi_norm="none", xi_critic="q1", kl_weight=1.0)
    official |= dict(layer_norm=False)
    for flags in (official, {}):
        xi = bandit(600, **flags)[1]["advantage/xi"]
        share.append((xi.abs() > 0.99).float().mean().item())
    print(f"|xi| > 0.99: {share[0]:.2f} official, {share[1]:.2f} default")
    assert share[0] > 0.6 and share[1] < 0.1
