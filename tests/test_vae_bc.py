"""algorithms/vae_bc.py: its bound is a bound, its latent says which mode, its MLP is a match."""

import math

import numpy as np
import pytest
import torch
from conftest import load
from torch import distributions
from units import A, S, copies, data, equal, gradient_of, gradients, learner

vae_bc = load("vae_bc")
LOW, HIGH = (-2.0, -1.0), (2.0, 3.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def two_modes(n=512) -> dict[str, torch.Tensor]:
    """One state, half of the actions near -0.8 and half near 0.8."""
    actions = 0.8 * torch.randint(2, (n, 1)).mul(2).sub(1) + 0.02 * torch.randn(n, 1)
    return data(n, observations=torch.zeros(n, S), actions=actions)


def trained(steps=800, begin=None, **flags):
    """A learner after so many steps on two modes, and the last step's metrics."""
    flags = dict(learning_rate=1e-3, hidden_dim=32, batch_size=64) | flags
    cloner = learner("vae_bc", two_modes(), **flags)
    if begin:
        begin(cloner)
    for _ in range(steps):
        metrics = cloner.update()
    return cloner, metrics


def drawn(cloner, n=1000) -> torch.Tensor:
    return cloner.policy.act(torch.zeros(n, S))[:, 0]


def log_normal(x, mean, sigma) -> torch.Tensor:
    return distributions.Normal(mean, sigma).log_prob(x)


def exact_log_likelihood(cloner, s, a) -> torch.Tensor:
    """log ∫ p(z | s) N(a; μ(s, z), σ²) dz of a latent of one dimension, on a grid, (B,)."""
    noise = torch.linspace(-8, 8, 2001)[:, None]  # z of the prior, standardised
    mean, log_sigma = cloner.policy.prior(s)  # (B, 1) each
    z = mean + log_sigma.exp() * noise[:, None]  # (2001, B, 1)
    mu = cloner.policy.decode(s.expand(len(z), -1, -1), z)
    sigma = cloner.policy.log_sigma.exp()
    joint = log_normal(a, mu, sigma).sum(-1) + log_normal(noise, 0.0, 1.0)  # (2001, B)
    return torch.logsumexp(joint, 0) + math.log(16 / 2000)


# ---------------------------------------------------------------------------------- The bound


@pytest.mark.parametrize(
    "flags", [dict(sigma=0.2), dict(sigma=0.0, latent_dim=3), dict(sigma=0.2, prior="normal")]
)
def test_terms_are_those_of_the_normal_distributions(flags):
    cloner = learner("vae_bc", **flags)
    for net in (cloner.policy.encoder, cloner.policy.prior_net):
        if net:
            net[-1].weight.data *= 3  # widths of their own
    s, a = cloner.s, cloner.a
    mu, log_sigma = cloner.policy.encode(s, a)
    q = distributions.Normal(mu, log_sigma.exp())
    mean, log_prior = cloner.policy.prior(s)
    prior = distributions.Normal(mean, log_prior.exp())
    assert (mean.abs().max() == 0) == (flags.get("prior") == "normal")
    torch.manual_seed(1)
    log_p, kl, mse = cloner.terms(s, a)
    torch.manual_seed(1)
    decoded = cloner.policy.decode(s, mu + log_sigma.exp() * torch.randn_like(mu))
    torch.testing.assert_close(log_p, log_normal(a, decoded, flags["sigma"] or 0.1).sum(-1).mean())
    torch.testing.assert_close(kl, distributions.kl_divergence(q, prior).mean(0))
    torch.testing.assert_close(mse, (a - decoded).square().mean())


def test_each_term_reaches_the_networks_it_should():
    """The reconstruction trains encoder, decoder and σ; the divergence encoder and prior."""
    cloner = learner("vae_bc")
    policy = cloner.policy

    def reached(term):
        grads = torch.autograd.grad(term, list(policy.parameters()), allow_unused=True)
        names = [name for name, _ in policy.named_parameters()]
        moved = [n for n, g in zip(names, grads) if g is not None and g.abs().max() > 0]
        return {name.split(".")[0] for name in moved}

    log_p, kl, _ = cloner.terms(cloner.s, cloner.a)
    assert reached(log_p) == {"encoder", "decoder", "log_sigma"}
    log_p, kl, _ = cloner.terms(cloner.s, cloner.a)
    assert reached(kl.sum()) == {"encoder", "prior_net"}


def test_networks_see_what_they_should():
    """The encoder sees state and action, the prior the state alone, the decoder state and z."""
    policy = learner("vae_bc").policy
    s, s_2, a, a_2 = torch.randn(1, S), torch.randn(1, S), torch.rand(1, A), -torch.rand(1, A)
    mu, log_sigma = policy.encode(s, a)
    for found in (policy.encode(s_2, a), policy.encode(s, a_2)):
        assert not torch.equal(found[0], mu) and not torch.equal(found[1], log_sigma)
    assert not torch.equal(policy.prior(s)[0], policy.prior(s_2)[0])
    z = torch.randn(1, policy.latent_dim)
    assert not torch.equal(policy.decode(s, z), policy.decode(s_2, z))
    assert not torch.equal(policy.decode(s, z), policy.decode(s, -z))
    assert policy.latent_dim == 2 * A and learner("vae_bc", latent_dim=3).policy.latent_dim == 3
    policy.decoder[-1].bias.data.fill_(50.0)
    assert policy.decode(s, z).max() == 1  # actions, at most


@pytest.mark.parametrize("sigma, prior", [(0.2, "normal"), (0.0, "conditional")])
def test_elbo_is_below_the_likelihood_and_more_samples_come_closer(sigma, prior):
    cloner, _ = trained(200, sigma=sigma, latent_dim=1, prior=prior)
    s, a = cloner.s[:64], cloner.a[:64]
    with torch.no_grad():
        exact = exact_log_likelihood(cloner, s, a).mean()
        terms = [cloner.terms(s, a) for _ in range(50)]
        elbo = torch.stack([log_p - kl.sum() for log_p, kl, _ in terms]).mean()
        few = torch.stack([cloner.log_likelihood(s, a, 4).mean() for _ in range(50)]).mean()
        many = cloner.log_likelihood(s, a, 2000).mean()
    print(f"ELBO {elbo:.3f}, 4 samples {few:.3f}, 2000 {many:.3f}, exact {exact:.3f}")
    assert elbo < few - 1e-3 < exact - 1e-3
    assert many.item() == pytest.approx(exact.item(), abs=0.02)


def test_importance_weights_are_those_of_prior_and_encoder():
    """One sample: log p(a | s, z) + log p(z | s) - log q(z | s, a) at the encoder's z."""
    cloner = learner("vae_bc", sigma=0.3)
    cloner.policy.prior_net[-1].weight.data *= 3
    s, a = cloner.s, cloner.a
    torch.manual_seed(1)
    found = cloner.log_likelihood(s, a, 1)
    torch.manual_seed(1)
    mu, log_sigma = cloner.policy.encode(s, a)
    z = mu + log_sigma.exp() * torch.randn_like(mu)
    mean, log_prior = cloner.policy.prior(s)
    wanted = log_normal(a, cloner.policy.decode(s, z), 0.3).sum(-1)
    wanted = wanted + log_normal(z, mean, log_prior.exp()).sum(-1)
    torch.testing.assert_close(found, wanted - log_normal(z, mu, log_sigma.exp()).sum(-1))


def test_the_density_is_one():
    """p(a | s) integrates to 1 over the action: nats of a density, not of a scaled error."""
    cloner, _ = trained(20, sigma=0.3)  # the encoder is wide yet: so few weights say it all
    a = torch.linspace(-3, 3, 301)[:, None]
    with torch.no_grad():
        p = cloner.log_likelihood(torch.zeros(301, S), a, 1000).exp()
    assert (p.sum() * 6 / 300).item() == pytest.approx(1, abs=0.02)


def test_the_mlps_bound_is_the_likelihood_of_bcs_gaussian():
    """Same mean and standard deviation: the two files log the same nats per action dimension."""
    rows = data()
    one = learner("vae_bc", rows, policy="mlp", sigma=0.3)
    other = learner("bc", rows, policy="gaussian")
    for net in (one.policy.decoder, other.policy.net):
        net[-1].weight.data.zero_()
    one.policy.decoder[-1].bias.data = torch.tensor([0.2, -0.4])
    other.policy.net[-1].bias.data = torch.tensor([0.2, -0.4, math.log(0.3), math.log(0.3)])
    found = one.validate(rows)
    torch.testing.assert_close(found["elbo"], -other.validate(rows)["nll"])
    torch.testing.assert_close(found["log_likelihood"], found["elbo"])
    torch.testing.assert_close(found["mse"], other.validate(rows)["mse"])
    assert found["kl"] == 0 and found["spread_over_z"].abs() < 1e-6


def test_sigma_is_learnt_or_stays():
    _, metrics = trained(1500, policy="mlp", sigma=0.0, learning_rate=1e-2)
    assert metrics["values/sigma"].item() == pytest.approx(0.8, abs=0.05)  # of the two modes
    _, metrics = trained(sigma=0.0, learning_rate=3e-3)
    assert metrics["values/sigma"].item() < 0.15  # within one; the data's is 0.02
    _, metrics = trained(sigma=0.2, steps=20)
    assert metrics["values/sigma"].item() == pytest.approx(0.2)


@pytest.mark.parametrize("flags", [{}, dict(kl_weight=3.0), dict(free_bits=0.7, kl_weight=2.0)])
def test_update_descends_the_weighted_bound(flags):
    """On the rows it draws, per action dimension; with free bits each dimension has its floor."""
    cloner = learner("vae_bc", batch_size=64, latent_dim=2, learning_rate=0.0, **flags)
    weight, floor = flags.get("kl_weight", 1.0), flags.get("free_bits", 0.0)
    cloner.policy.encoder[-1].bias.data[2] -= 3  # divergences on both sides of the floor
    torch.manual_seed(1)
    i = torch.randint(64, (64,))
    log_p, kl, mse = cloner.terms(cloner.s[i], cloner.a[i])
    assert kl.min() < 0.7 < kl.max()
    wanted = (weight * torch.maximum(kl, torch.tensor(floor)).sum() - log_p) / A
    grads = gradient_of(wanted, cloner.policy)
    torch.manual_seed(1)
    metrics = cloner.update()
    torch.testing.assert_close(metrics["losses/total"], wanted)
    torch.testing.assert_close(metrics["losses/elbo"], (log_p - kl.sum()) / A)
    torch.testing.assert_close(metrics["losses/kl"], kl.sum())
    torch.testing.assert_close(torch.stack([metrics["kl/z0"], metrics["kl/z1"]]), kl)
    torch.testing.assert_close(metrics["losses/mse"], mse)
    torch.testing.assert_close(gradients(cloner.policy), grads)


def test_update_moves_every_network():
    cloner = learner("vae_bc")
    before = copies(cloner.policy)
    cloner.update()
    assert not any(torch.equal(a, b) for a, b in zip(before, copies(cloner.policy)))


def test_validation_is_the_bound_and_the_spread():
    cloner = learner("vae_bc", latent_dim=2)
    rows = data(2000, observations=5 + 2 * torch.randn(2000, S))
    s = cloner.policy.scaling.state(rows["observations"])
    torch.manual_seed(1)
    found = cloner.validate(rows)
    torch.manual_seed(1)
    log_p, kl, mse = cloner.terms(s, rows["actions"])
    torch.testing.assert_close(found["elbo"], (log_p - kl.sum()) / A)
    torch.testing.assert_close(found["kl"], kl.sum())
    torch.testing.assert_close(found["mse"], mse)
    wanted = cloner.log_likelihood(s, rows["actions"]).mean() / A
    torch.testing.assert_close(found["log_likelihood"], wanted, atol=0.2, rtol=0)
    mean, log_sigma = cloner.policy.prior(s)
    z = mean + log_sigma.exp() * torch.randn(200, *mean.shape)
    spread = cloner.policy.decode(s.expand(200, -1, -1), z).std(0).mean()
    torch.testing.assert_close(found["spread_over_z"], spread, rtol=0.1, atol=0)


# --------------------------------------------------------------------------------- The latent


@pytest.mark.parametrize("sigma, prior", [(0.2, "normal"), (0.0, "conditional")])
def test_the_latent_says_which_mode(sigma, prior):
    cloner, metrics = trained(sigma=sigma, prior=prior)
    assert metrics["losses/kl"] > 0.4  # log 2 = 0.69 nats tell the side
    a = drawn(cloner)
    for mode in (-0.8, 0.8):
        assert 0.2 < ((a - mode).abs() < 0.25).float().mean() < 0.8, a
    assert cloner.validate(two_modes())["spread_over_z"] > 0.4


def test_the_error_of_decoded_actions_falls():
    """With the encoder's z, to less than a tenth of regression's 0.64."""
    _, metrics = trained()
    assert metrics["losses/mse"] < 0.06


def test_regression_answers_with_the_mean():
    cloner, metrics = trained(policy="mlp")
    assert drawn(cloner).abs().max() < 0.2 and metrics["losses/kl"] == 0
    assert metrics["losses/mse"].item() == pytest.approx(0.64, abs=0.05)


def test_a_sigma_that_begins_wide_leaves_the_latent_unused():
    _, metrics = trained(begin=lambda cloner: cloner.policy.log_sigma.data.fill_(0.0))
    assert metrics["losses/kl"] < 0.05


def test_a_latent_that_costs_too_much_makes_a_regression():
    cloner, metrics = trained(kl_weight=30.0)
    assert metrics["losses/kl"] < 0.01
    assert drawn(cloner).abs().mean() < 0.15


def test_free_bits_keep_the_kl_above_their_floor():
    _, metrics = trained(kl_weight=30.0, free_bits=0.5)
    for dim in range(2):
        assert 0.4 < metrics[f"kl/z{dim}"] < 0.6
    _, metrics = trained(kl_weight=30.0)
    assert max(metrics["kl/z0"], metrics["kl/z1"]) < 0.05


def test_the_prior_learns_where_one_action_is_taken():
    """Two states, one with two actions, one with a single: there nothing is left to the latent."""
    rows = two_modes()
    rows["observations"][::2] = 1.0
    rows["actions"][::2] = 0.8 + 0.02 * torch.randn(256, 1)
    cloner = learner("vae_bc", rows, learning_rate=1e-3, hidden_dim=32, batch_size=64)
    for _ in range(1000):
        cloner.update()
    wrong = (cloner.policy.act(torch.ones(1000, S)) < 0.4).float().mean()
    other = (cloner.policy.act(torch.zeros(1000, S)) < 0.4).float().mean()
    assert wrong < 0.03 and 0.2 < other < 0.8, (wrong, other)
    mean, log_sigma = cloner.policy.prior(
        cloner.policy.scaling.state(torch.eye(2, 1) * torch.ones(S))
    )
    assert (mean[0] - mean[1]).abs().max() + log_sigma.diff(dim=0).abs().max() > 0.3


# -------------------------------------------------------------------------------------- Acting


@pytest.mark.parametrize("policy", ["vae", "mlp"])
def test_act_answers_in_the_environments_bounds(policy):
    """A decoder that outputs the scaled action x acts with the action that x came from."""
    acting = learner("vae_bc", low=LOW, high=HIGH, policy=policy).policy
    low, high, last = torch.tensor(LOW), torch.tensor(HIGH), acting.decoder[-1]
    a = acting.act(5 * torch.randn(500, S))
    assert ((low <= a) & (a <= high)).all()
    last.weight.data.zero_()
    for x in ([0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]):
        last.bias.data = torch.tensor(x).atanh()
        wanted = low + (torch.tensor([x]) + 1) / 2 * (high - low)
        torch.testing.assert_close(acting.act(torch.randn(5, S)), wanted.expand(5, A))
    last.bias.data = torch.tensor([-50.0, 50.0])
    assert torch.equal(acting.act(torch.randn(S)), torch.tensor([-2.0, 3.0]))


@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32, torch.float64])
def test_act_takes_one_or_many_of_any_kind(kind):
    policy = learner("vae_bc", low=LOW, high=HIGH).policy
    s = np.random.default_rng(0).normal(size=(4, S))
    s = torch.tensor(s, dtype=kind) if isinstance(kind, torch.dtype) else s.astype(kind)
    many, one = policy.act(s, deterministic=True), policy.act(s[1], deterministic=True)
    assert type(many) is type(one) is type(s)
    assert many.shape == (4, A) and one.shape == (A,)
    assert np.allclose(many[1], one, atol=1e-5)


def test_states_are_normalised_by_the_policy():
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    cloner = learner("vae_bc", rows)
    s = cloner.policy.scaling.state(rows["observations"])
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    assert torch.equal(cloner.s, s) and torch.equal(cloner.a, rows["actions"])
    seen, prior = [], cloner.policy.prior
    cloner.policy.prior = lambda s: seen.append(s) or prior(s)
    cloner.policy.act(rows["observations"])
    assert torch.equal(seen[0], s)


@pytest.mark.parametrize("prior", ["normal", "conditional"])
def test_latents_when_acting(prior):
    """Drawn from the prior, or its mean: as --act says, and as `deterministic` says."""
    s = torch.zeros(500, S)
    sampling, meaning = (
        learner("vae_bc", two_modes(), prior=prior, act=act).policy for act in ("sample", "mean")
    )
    meaning.load_state_dict(sampling.state_dict())
    mean, log_sigma = sampling.prior(sampling.scaling.state(s))
    seen = []
    for policy in (sampling, meaning):
        decode = policy.decode
        policy.decode = lambda s, z, decode=decode: seen.append(z) or decode(s, z)
    for policy, options in ((sampling, {}), (meaning, dict(deterministic=False))):
        policy.act(s, **options)
        torch.testing.assert_close(seen[-1].mean(0), mean[0].detach(), atol=0.2, rtol=0)
        wanted = log_sigma[0].exp().detach()
        torch.testing.assert_close(seen[-1].std(0), wanted, atol=0, rtol=0.15)
    for policy, options in ((meaning, {}), (sampling, dict(deterministic=True))):
        policy.act(s, **options)
        assert torch.equal(seen[-1], mean)
    assert list(sampling.actors()) == [""] and "act" in sampling.flags


def test_a_policy_is_its_state_and_the_task():
    """Built from task and flags alone, and loaded: it acts as the learner's does."""
    cloner = learner("vae_bc", low=LOW, high=HIGH)
    cloner.update()
    task = dict(sizes=[S, A], bounds=[list(LOW), list(HIGH)])
    other = vae_bc.Policy(task, cloner.args)
    other.load_state_dict(cloner.policy.state_dict())
    s = 3 * torch.randn(7, S)
    acts = [policy.act(s, deterministic=True) for policy in (cloner.policy, other)]
    assert torch.equal(*acts) and equal(copies(other), copies(cloner.policy))


# ------------------------------------------------------------------------------------- Sizes


@pytest.mark.parametrize("hidden_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("state_dim, action_dim, latent_dim", [(3, 1, 0), (11, 3, 0), (17, 6, 12)])
def test_the_mlp_has_as_many_parameters(state_dim, action_dim, latent_dim, hidden_dim):
    rows = data(8, observations=torch.randn(8, state_dim), actions=torch.zeros(8, action_dim))
    sizes = dict(hidden_dim=hidden_dim, latent_dim=latent_dim)
    counts = [
        sum(x.numel() for x in learner("vae_bc", rows, policy=policy, **sizes).policy.parameters())
        for policy in ("vae", "mlp")
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


@pytest.mark.parametrize("flag", ["latent_dim", "kl_weight", "free_bits", "sigma"])
def test_impossible_numbers_are_refused(flag):
    for value in (-1, math.nan):
        with pytest.raises(SystemExit, match=f"--{flag.replace('_', '-')}"):
            learner("vae_bc", **{flag: value})
