"""algorithms/vae_bc.py: its bound is a bound, its latent says which mode, its MLP is a match."""

import math

import pytest
import torch
from conftest import load
from test_models import data, learner
from torch import distributions

vae_bc, bc = load("vae_bc"), load("bc")
S = 3


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def two_modes(n=512) -> dict[str, torch.Tensor]:
    """One state, half of the actions near -0.8 and half near 0.8."""
    actions = 0.8 * torch.randint(2, (n, 1)).mul(2).sub(1) + 0.02 * torch.randn(n, 1)
    return data(n, observations=torch.zeros(n, S), actions=actions)


def trained(steps=800, **flags):
    flags = dict(learning_rate=1e-3, hidden_dim=32, batch_size=64) | flags
    cloner = learner(vae_bc, two_modes(), **flags)
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
    mean, log_deviation = cloner.policy.prior(s)  # (B, 1) each
    z = mean + log_deviation.exp() * noise[:, None]  # (2001, B, 1)
    mu = cloner.policy.decode(s.expand(len(z), -1, -1), z)
    sigma = cloner.policy.log_sigma.exp()
    joint = log_normal(a, mu, sigma).sum(-1) + log_normal(noise, 0.0, 1.0)  # (2001, B)
    return torch.logsumexp(joint, 0) + math.log(16 / 2000)


# ---------------------------------------------------------------------------------- The bound


@pytest.mark.parametrize(
    "flags", [dict(sigma=0.2), dict(sigma=0.0, latent_dim=3), dict(sigma=0.2, prior="normal")]
)
def test_terms_are_those_of_the_normal_distributions(flags):
    cloner = learner(vae_bc, **flags)
    s, a = cloner.data["observations"], cloner.data["actions"]
    mu, log_sigma = cloner.policy.encode(s, a)
    q = distributions.Normal(mu, log_sigma.exp())
    mean, log_deviation = cloner.policy.prior(s)
    prior = distributions.Normal(mean, log_deviation.exp())
    assert (mean.abs().max() == 0) == (flags.get("prior") == "normal")
    torch.manual_seed(1)
    log_p, kl, mse = cloner.terms(s, a)
    torch.manual_seed(1)
    decoded = cloner.policy.decode(s, mu + log_sigma.exp() * torch.randn_like(mu))
    torch.testing.assert_close(log_p, log_normal(a, decoded, flags["sigma"] or 0.1).sum(-1).mean())
    torch.testing.assert_close(kl, distributions.kl_divergence(q, prior).mean(0))
    torch.testing.assert_close(mse, (a - decoded).square().mean())


@pytest.mark.parametrize("sigma, prior", [(0.2, "normal"), (0.0, "conditional")])
def test_elbo_is_below_the_likelihood_and_more_samples_come_closer(sigma, prior):
    cloner, _ = trained(200, sigma=sigma, latent_dim=1, prior=prior)
    s, a = cloner.data["observations"][:64], cloner.data["actions"][:64]
    with torch.no_grad():
        exact = exact_log_likelihood(cloner, s, a).mean()
        terms = [cloner.terms(s, a) for _ in range(50)]
        elbo = torch.stack([log_p - kl.sum() for log_p, kl, _ in terms]).mean()
        few = torch.stack([cloner.log_likelihood(s, a, 4).mean() for _ in range(50)]).mean()
        many = cloner.log_likelihood(s, a, 2000).mean()
    print(f"ELBO {elbo:.3f}, 4 samples {few:.3f}, 2000 {many:.3f}, exact {exact:.3f}")
    assert elbo < few - 1e-3 < exact - 1e-3
    assert many.item() == pytest.approx(exact.item(), abs=0.02)


def test_the_density_is_one():
    """p(a | s) integrates to 1 over the action: nats of a density, not of a scaled error."""
    cloner, _ = trained(200)
    a = torch.linspace(-2.5, 2.5, 251)[:, None]
    with torch.no_grad():
        p = cloner.log_likelihood(torch.zeros(251, S), a, 2000).exp()
    assert (p.sum() * 5 / 250).item() == pytest.approx(1, abs=0.05)


def test_the_mlps_bound_is_the_likelihood_of_bcs_gaussian():
    """Same mean and deviation: the two files log the same nats per action dimension."""
    rows = data()
    one = learner(vae_bc, rows, policy="mlp", sigma=0.3)
    other = learner(bc, rows, policy="gaussian")
    for net in (one.policy.decoder, other.policy.net):
        net[-1].weight.data.zero_()
    one.policy.decoder[-1].bias.data = torch.tensor([0.2, -0.4])
    other.policy.net[-1].bias.data = torch.tensor([0.2, -0.4, math.log(0.3), math.log(0.3)])
    elbo, nll = one.validate(rows)["validation/elbo"], other.validate(rows)["validation/nll"]
    torch.testing.assert_close(elbo, -nll)
    torch.testing.assert_close(one.validate(rows)["validation/log_likelihood"], elbo)


def test_the_deviation_is_learnt_or_stays():
    _, metrics = trained(2500, policy="mlp", sigma=0.0, learning_rate=1e-2)
    assert metrics["values/sigma"].item() == pytest.approx(0.8, abs=0.05)  # of the two modes
    _, metrics = trained(sigma=0.0, learning_rate=3e-3)
    assert metrics["values/sigma"].item() < 0.15  # within one; the data's is 0.02
    _, metrics = trained(sigma=0.2, steps=20)
    assert metrics["values/sigma"].item() == pytest.approx(0.2)


@pytest.mark.parametrize("flags", [{}, dict(kl_weight=3.0), dict(free_bits=0.7, kl_weight=2.0)])
def test_update_descends_the_weighted_bound(flags):
    cloner = learner(vae_bc, batch_size=64, latent_dim=2, **flags)
    weight, floor = flags.get("kl_weight", 1.0), flags.get("free_bits", 0.0)
    torch.manual_seed(1)
    i = torch.randint(64, (64,))
    log_p, kl, _ = cloner.terms(cloner.data["observations"][i], cloner.data["actions"][i])
    wanted = (weight * torch.maximum(kl, torch.tensor(floor)).sum() - log_p) / 2
    used = [x for x in cloner.policy.parameters() if x.requires_grad]
    grads = torch.autograd.grad(wanted, used)
    cloner.policy.log_sigma.grad = torch.zeros_like(cloner.policy.log_sigma)
    torch.manual_seed(1)
    metrics = cloner.update()
    torch.testing.assert_close(metrics["losses/total"], wanted.detach())
    torch.testing.assert_close(metrics["losses/elbo"], ((log_p - kl.sum()) / 2).detach())
    found = torch.cat([x.grad.flatten() for x in used])
    torch.testing.assert_close(found, torch.cat([x.flatten() for x in grads]))


# --------------------------------------------------------------------------------- The latent


@pytest.mark.parametrize("sigma, prior", [(0.2, "normal"), (0.0, "conditional")])
def test_the_latent_says_which_mode(sigma, prior):
    cloner, metrics = trained(sigma=sigma, prior=prior)
    assert metrics["losses/kl"] > 0.4  # log 2 = 0.69 nats tell the side
    a = drawn(cloner)
    for mode in (-0.8, 0.8):
        assert 0.3 < ((a - mode).abs() < 0.25).float().mean() < 0.7, a
    assert cloner.validate(cloner.data)["validation/spread_over_z"] > 0.4


def test_regression_answers_with_the_mean():
    cloner, metrics = trained(policy="mlp")
    assert drawn(cloner).abs().max() < 0.2 and metrics["losses/kl"] == 0
    assert metrics["losses/mse"].item() == pytest.approx(0.64, abs=0.05)


def test_a_latent_that_costs_too_much_makes_a_regression():
    cloner, metrics = trained(kl_weight=30.0)
    assert metrics["losses/kl"] < 0.01
    assert drawn(cloner).abs().max() < 0.25


def test_free_bits_keep_the_kl_above_their_floor():
    _, metrics = trained(kl_weight=30.0, free_bits=0.5)
    for dim in range(2):
        assert 0.4 < metrics[f"kl/z{dim}"] < 0.6
    _, metrics = trained(kl_weight=30.0)
    assert max(metrics["kl/z0"], metrics["kl/z1"]) < 0.05


def test_latents_when_acting():
    s = torch.zeros(500, S)
    for prior in ("normal", "conditional"):
        cloner = learner(vae_bc, two_modes(), prior=prior)
        policy, normalised = cloner.policy, cloner.policy.normalise(s)
        mean, log_deviation = policy.prior(normalised)
        seen, decode = [], policy.decode
        policy.decode = lambda s, z, seen=seen, decode=decode: seen.append(z) or decode(s, z)
        policy.act(s)
        torch.testing.assert_close(seen[-1].mean(0), mean[0].detach(), atol=0.2, rtol=0)
        torch.testing.assert_close(
            seen[-1].std(0), log_deviation[0].exp().detach(), atol=0, rtol=0.15
        )
        policy.sample = False
        policy.act(s)
        assert torch.equal(seen[-1], mean)


def test_the_prior_learns_where_one_action_is_taken():
    """Two states, one with two actions, one with a single: there nothing is left to the latent."""
    rows = two_modes()
    rows["observations"][::2] = 1.0
    rows["actions"][::2] = 0.8 + 0.02 * torch.randn(256, 1)
    cloner = learner(vae_bc, rows, learning_rate=1e-3, hidden_dim=32, batch_size=64)
    for _ in range(1200):
        cloner.update()
    wrong = (cloner.policy.act(torch.ones(1000, S)) < 0.4).float().mean()
    other = (cloner.policy.act(torch.zeros(1000, S)) < 0.4).float().mean()
    assert wrong < 0.03 and 0.3 < other < 0.7, (wrong, other)
    mean, log_deviation = cloner.policy.prior(
        cloner.policy.normalise(torch.eye(2, 1) * torch.ones(S))
    )
    assert (mean[0] - mean[1]).abs().max() + log_deviation.diff(dim=0).abs().max() > 0.3


# ------------------------------------------------------------------------------------- Sizes


@pytest.mark.parametrize("hidden_dim", [32, 64, 128, 256])
@pytest.mark.parametrize("state_dim, action_dim, latent_dim", [(3, 1, 0), (11, 3, 0), (17, 6, 12)])
def test_the_mlp_has_as_many_parameters(state_dim, action_dim, latent_dim, hidden_dim):
    rows = data(8, observations=torch.randn(8, state_dim), actions=torch.zeros(8, action_dim))
    sizes = dict(hidden_dim=hidden_dim, latent_dim=latent_dim)
    counts = [
        sum(x.numel() for x in learner(vae_bc, rows, policy=policy, **sizes).policy.parameters())
        for policy in ("vae", "mlp")
    ]
    assert counts[1] == pytest.approx(counts[0], rel=0.02)


@pytest.mark.parametrize("flag", ["latent_dim", "kl_weight", "free_bits", "sigma"])
def test_impossible_numbers_are_refused(flag):
    for value in (-1, math.nan):
        with pytest.raises(SystemExit, match=f"--{flag.replace('_', '-')}"):
            learner(vae_bc, **{flag: value})
