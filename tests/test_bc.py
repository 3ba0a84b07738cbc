"""What behaviour cloning claims, each part against an independent computation."""

import pytest
import torch
from conftest import load
from torch import distributions
from units import A, S, data, gradients, learner

bc = load("bc")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_gaussian_likelihood_is_the_normal_distributions():
    cloner = learner(bc, policy="gaussian")
    s, a = torch.randn(32, S), 2 * torch.rand(32, A) - 1
    cloner.policy.net[-1].weight.data *= 30
    mu, log_sigma = cloner.policy(s)
    assert 0.9 < mu.abs().max() <= 1 and log_sigma.min() == -5 and log_sigma.max() == 2
    wanted = -distributions.Normal(mu, log_sigma.exp()).log_prob(a).mean()
    torch.testing.assert_close(cloner.losses(s, a)["nll"], wanted)
    torch.testing.assert_close(cloner.losses(s, a)["mse"], (mu - a).square().mean())


def test_the_deterministic_policy_has_the_squared_error_alone():
    cloner = learner(bc)
    s, a = torch.randn(32, S), 2 * torch.rand(32, A) - 1
    assert list(cloner.losses(s, a)) == ["mse"]
    wanted = (torch.tanh(cloner.policy.net(s)) - a).square().mean()
    torch.testing.assert_close(cloner.losses(s, a)["mse"], wanted)


@pytest.mark.parametrize("policy, term", [("deterministic", "mse"), ("gaussian", "nll")])
def test_update_descends_the_chosen_loss(policy, term):
    """Full batch of one repeated transition: the gradient is that of the loss asked for."""
    rows = {
        key: value[:1].repeat(8, 1) if value.dim() == 2 else value for key, value in data(8).items()
    }
    cloner = learner(bc, rows, policy=policy)
    loss = cloner.losses(cloner.s[:1], cloner.a[:1])[term]
    wanted = torch.autograd.grad(loss, list(cloner.policy.parameters()))
    metrics = cloner.update()
    torch.testing.assert_close(gradients(cloner.policy), torch.cat([x.flatten() for x in wanted]))
    torch.testing.assert_close(metrics[f"losses/{term}"], loss)


def test_the_batch_pairs_states_with_their_actions():
    """Actions that are a function of the state alone are learnt to the end."""
    observations = torch.randn(256, S)
    rows = data(256, observations=observations, actions=torch.tanh(observations[:, :A]))
    cloner = learner(bc, rows, hidden_dim=32, learning_rate=1e-2, batch_size=64)
    for _ in range(300):
        loss = cloner.update()["losses/mse"]
    assert loss < 0.01


def test_best_episodes_are_kept_whole():
    """--frac 0.5 of 4 episodes of different lengths, numbered with gaps (others are held out)."""
    episodes = torch.tensor([3] * 5 + [5] * 2 + [6] * 4 + [9] * 1)
    rewards = torch.tensor([1.0] * 5 + [4.0] * 2 + [-1.0] * 4 + [7.0])[:, None]  # 5, 8, -4, 7
    actions = torch.linspace(-1, 1, 12)[:, None].expand(12, A).clone()
    rows = data(12, episodes=episodes, rewards=rewards, actions=actions)
    kept = learner(bc, dict(rows), frac=0.5)
    chosen = (episodes == 5) | (episodes == 9)
    assert torch.equal(kept.a, actions[chosen])
    states = kept.policy.scaling.state(rows["observations"][chosen])
    assert torch.equal(kept.s, states)
    torch.testing.assert_close(kept.s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    assert len(learner(bc, dict(rows), frac=1.0).a) == 12
    assert len(learner(bc, dict(rows), frac=0.01).a) == 2  # at least the best one


@pytest.mark.parametrize("frac", [0.0, -0.1, 1.1])
def test_impossible_shares_are_refused(frac):
    with pytest.raises(SystemExit, match="--frac"):
        learner(bc, frac=frac)


@pytest.mark.parametrize("policy", ["deterministic", "gaussian"])
def test_act_answers_in_the_environments_bounds(policy):
    """A policy that outputs the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    rows = data(observations=5 + 2 * torch.randn(64, S))
    agent = learner(bc, rows, low.tolist(), high.tolist(), policy=policy)
    last = agent.policy.net[-1]
    last.weight.data.zero_()
    for x in ([0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]):
        last.bias.data[:A] = torch.tensor(x).atanh()
        wanted = low + (torch.tensor(x) + 1) / 2 * (high - low)
        torch.testing.assert_close(agent.policy.act(torch.randn(5, S)), wanted.expand(5, A))


def test_act_sees_normalised_states():
    rows = data(observations=torch.randn(64, S) * 10 + 50)
    policy = learner(bc, rows).policy
    s = rows["observations"]
    wanted = torch.tanh(policy.net((s - s.mean(0)) / (s.std(0, correction=0) + 1e-3)))
    torch.testing.assert_close(policy.act(s), wanted, atol=1e-5, rtol=1e-5)


def test_the_gaussian_acts_by_its_mean_or_by_samples():
    agent = learner(bc, policy="gaussian")
    last = agent.policy.net[-1]
    last.weight.data.zero_()
    last.bias.data = torch.tensor([0.1, -0.2, -2.0, -1.5])
    s = torch.randn(20_000, S)
    mean = agent.policy.act(s)
    torch.testing.assert_close(mean, torch.tensor([0.1, -0.2]).tanh().expand(20_000, A))
    samples = agent.policy.act(s, deterministic=False)
    torch.testing.assert_close(samples.mean(0), mean[0], atol=0.01, rtol=0)
    torch.testing.assert_close(samples.std(0), torch.tensor([-2.0, -1.5]).exp(), atol=0.01, rtol=0)


def test_validation_is_on_the_rows_that_are_handed_over():
    cloner = learner(bc)
    rows = data(40)
    s = cloner.policy.scaling.state(rows["observations"])
    wanted = (cloner.policy(s)[0] - rows["actions"]).square().mean()
    torch.testing.assert_close(cloner.validate(rows)["mse"], wanted)
