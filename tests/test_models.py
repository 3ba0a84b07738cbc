"""What the parts of the algorithms claim, each against an independent computation."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES, load, tiny
from torch import distributions

bc, td3_bc, a2po = map(load, ("bc", "td3_bc", "a2po"))
CRITIC_FILES = [name for name in NAMES if hasattr(load(name), "TwinCritic")]
VALUE_FILES = [name for name in ("td3_bc", "a2po", "sac") if name in NAMES]
S, A = 3, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def data(n=64, **columns) -> dict[str, torch.Tensor]:
    """Random transitions; `columns` replaces some."""
    rows = dict(observations=torch.randn(n, S), next_observations=torch.randn(n, S))
    rows |= dict(actions=2 * torch.rand(n, A) - 1, rewards=torch.randn(n, 1))
    rows |= dict(terminals=torch.zeros(n, 1), episodes=torch.arange(n) // 4)
    rows |= columns
    low, high = -torch.ones(1, rows["actions"].shape[1]), torch.ones(1, rows["actions"].shape[1])
    return dict(action_low=low, action_high=high) | rows


def learner(module, rows=None, **flags):
    name = next(name for name in NAMES if load(name) is module)
    return module.Learner(rows or data(), module.Args(**tiny(name, **flags)))


def batch(learner):
    keys = ("observations", "actions", "rewards", "next_observations", "terminals")
    return [learner.data[key] for key in keys]


def copies(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def gradients(module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


# ---------------------------------------------------------------------------- Shared by files


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_mlp_has_the_asked_layers(layers):
    net = bc.mlp(5, 7, 2, hidden_layers=layers)
    shapes = [tuple(part.weight.shape) for part in net if isinstance(part, torch.nn.Linear)]
    assert shapes == [(7, 5)] + [(7, 7)] * (layers - 1) + [(2, 7)]
    assert not isinstance(net[-1], torch.nn.ReLU) and net(torch.zeros(4, 5)).shape == (4, 2)


def split_critic(critic, module) -> list[torch.nn.Module]:
    """Two plain MLPs with the weights of a TwinCritic."""
    weights = list(critic.weights)
    nets = []
    for i in range(2):
        net = module.mlp(weights[0].shape[1], weights[0].shape[2], 1, len(weights) - 1)
        linear = [part for part in net if isinstance(part, torch.nn.Linear)]
        for part, weight, bias in zip(linear, weights, critic.biases):
            part.weight.data, part.bias.data = weight[i].T.clone(), bias[i, 0].clone()
        nets.append(net)
    return nets


@pytest.mark.parametrize("name", CRITIC_FILES)
@pytest.mark.parametrize("layers", [2, 3])
def test_twin_critic_is_two_networks(name, layers):
    module = load(name)
    critic = module.TwinCritic(S, A, 16, hidden_layers=layers)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    for i, net in enumerate(split_critic(critic, module)):
        torch.testing.assert_close(q[i], net(torch.cat([s, a], dim=-1)))
    torch.testing.assert_close(critic(s, a, members=1), q[:1])


@pytest.mark.parametrize(
    "name, head",
    [("bc", "net"), ("td3_bc", "net"), ("a2po", "cvae.decoder"), ("vae_bc", "decoder")],
)
def test_act_answers_in_the_environments_bounds(name, head):
    """A policy that outputs the scaled action x acts with the action that x came from."""
    low, high = torch.tensor([[-2.0, -1.0]]), torch.tensor([[2.0, 3.0]])
    rows = data() | {"action_low": low, "action_high": high}
    policy = learner(load(name), rows).policy
    last = policy.get_submodule(head)[-1]
    last.weight.data.zero_()
    for x in ([0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]):
        last.bias.data = torch.tensor(x).atanh()
        wanted = low + (torch.tensor([x]) + 1) / 2 * (high - low)
        torch.testing.assert_close(policy.act(torch.randn(5, S)), wanted.expand(5, A))


@pytest.mark.parametrize("name", ["bc", "td3_bc", "a2po", "vae_bc"])
def test_states_are_normalised_by_the_policy(name):
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    policy = learner(load(name), rows).policy
    s = policy.normalise(rows["observations"])
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)


# --------------------------------------------------------------------------------------- Clone


def test_gaussian_likelihood_is_the_normal_distributions():
    cloner = learner(bc, policy="gaussian")
    s, a, *_ = torch.randn(32, S), 2 * torch.rand(32, A) - 1
    cloner.policy.net[-1].weight.data *= 30
    mu, log_sigma = cloner.policy(s)
    assert 0.9 < mu.abs().max() <= 1 and log_sigma.min() == -5 and log_sigma.max() == 2
    wanted = -distributions.Normal(mu, log_sigma.exp()).log_prob(a).mean()
    torch.testing.assert_close(cloner.losses(s, a)["nll"], wanted)


def test_deterministic_likelihood_has_the_variance_of_the_training_errors():
    """A policy that says 0 to noise of two widths: held out, the entropy of that noise."""
    actions = torch.randn(40_000, A) * torch.tensor([0.1, 0.4])
    cloner = learner(bc, data(40_000, actions=actions))
    cloner.policy.net[-1].weight.data.zero_()
    cloner.policy.net[-1].bias.data.zero_()
    held_out = data(20_000, actions=torch.randn(20_000, A) * torch.tensor([0.1, 0.4]))
    losses = cloner.validate(held_out)
    entropy = distributions.Normal(0, torch.tensor([0.1, 0.4])).entropy().mean().item()
    assert losses["validation/nll"].item() == pytest.approx(entropy, abs=0.02)
    wider = data(20_000, actions=2 * held_out["actions"])  # σ is the training data's all the same
    nll = entropy - 0.5 + 0.5 * 4  # E z² is 4 instead of 1
    assert cloner.validate(wider)["validation/nll"].item() == pytest.approx(nll, abs=0.05)


@pytest.mark.parametrize("policy, term", [("deterministic", "mse"), ("gaussian", "nll")])
def test_update_descends_the_chosen_loss(policy, term):
    """Full batch of one repeated transition: the gradient is that of the loss asked for."""
    rows = {
        key: value[:1].repeat(8, 1) if value.dim() == 2 else value for key, value in data(8).items()
    }
    rows |= {"action_low": -torch.ones(1, A), "action_high": torch.ones(1, A)}
    cloner = learner(bc, rows, policy=policy)
    loss = cloner.losses(cloner.data["observations"][:1], cloner.data["actions"][:1])[term]
    wanted = torch.autograd.grad(loss, list(cloner.policy.parameters()))
    cloner.update()
    torch.testing.assert_close(gradients(cloner.policy), torch.cat([x.flatten() for x in wanted]))


def test_best_episodes_are_kept_whole():
    """--frac 0.5 of 4 episodes of different lengths, numbered with gaps (others are held out)."""
    episodes = torch.tensor([3] * 5 + [5] * 2 + [6] * 4 + [9] * 1)
    rewards = torch.tensor([1.0] * 5 + [4.0] * 2 + [-1.0] * 4 + [7.0])[:, None]  # 5, 8, -4, 7
    actions = torch.linspace(-1, 1, 12)[:, None].expand(12, A).clone()
    rows = data(12, episodes=episodes, rewards=rewards, actions=actions)
    kept = learner(bc, dict(rows), frac=0.5).data["actions"]
    assert torch.equal(kept, actions[(episodes == 5) | (episodes == 9)])
    assert len(learner(bc, dict(rows), frac=1.0).data["actions"]) == 12
    assert len(learner(bc, dict(rows), frac=0.01).data["actions"]) == 2  # at least the best one


@pytest.mark.parametrize("frac", [0.0, -0.1, 1.1])
def test_impossible_shares_are_refused(frac):
    with pytest.raises(SystemExit, match="--frac"):
        learner(bc, frac=frac)


# -------------------------------------------------------------------------------------- Critics


def constant_critic(critic, one, two):
    for parameter in critic.parameters():
        parameter.data.zero_()
    critic.biases[-1].data[:, 0, 0] = torch.tensor([one, two])


@pytest.mark.parametrize("name", VALUE_FILES)
@pytest.mark.parametrize("d", [0.0, 1.0])
def test_target_is_masked_by_terminals_alone(name, d):
    """y = r + γ (1 - d) min Q', read from the losses of critics that say 0."""
    agent = learner(load(name), gamma=0.9)
    target = agent.q_target if name == "a2po" else agent.critic_target
    constant_critic(agent.q if name == "a2po" else agent.critic, 0, 0)
    constant_critic(target, 5, 3)
    regressions = 2
    if name == "a2po":  # V regresses on it as well
        regressions = 3
        for parameter in agent.v.parameters():
            parameter.data.zero_()
    if name == "sac":
        agent.log_alpha.data.fill_(-math.inf)  # no pay for entropy
    s, a, r, s_next, _ = batch(agent)
    loss = agent.critic_losses(s, a, r, s_next, torch.full_like(r, d))[0]
    y = r + 0.9 * (1 - d) * 3
    torch.testing.assert_close(loss, regressions * y.square().mean())


@pytest.mark.parametrize("name", ["td3_bc", "a2po"])
def test_target_actions_are_the_target_policys_plus_clipped_noise(name):
    agent = learner(load(name))
    seen, critic = [], "q_target" if name == "a2po" else "critic_target"
    delattr(agent, critic)
    setattr(agent, critic, lambda s, a: seen.append(a) or torch.zeros(2, len(a), 1))
    target = agent.actor_target if name == "a2po" else agent.policy_target
    next(target.parameters()).data += 0.3  # the online policy has no say
    s_next = batch(agent)[3]
    best = (torch.ones(len(s_next), 1), target)  # A2PO's target asks for ξ* = 1
    plain = agent.policy(s_next, *best) if name == "a2po" else target(s_next)

    def action(**flags):
        vars(agent.args).update(flags)
        agent.critic_losses(*batch(agent))
        return seen[-1]

    torch.testing.assert_close(action(policy_noise=0.0), plain)
    noise = action(policy_noise=0.2, noise_clip=9.0) - plain
    assert noise.std().item() == pytest.approx(0.2, rel=0.25)
    noise = action(policy_noise=100.0, noise_clip=0.05) - plain
    assert noise.abs().max() < 0.051 and (noise.abs() > 0.049).float().mean() > 0.9
    assert action(policy_noise=100.0, noise_clip=100.0).abs().max() <= 1  # still an action


@pytest.mark.parametrize("name", ["td3_bc", "a2po"])
def test_targets_follow_by_tau(name):
    agent = learner(load(name), tau=0.1)
    pairs = (
        [(agent.actor_target, agent.policy.actor), (agent.q_target, agent.q)]
        if name == "a2po"
        else None
    )
    pairs = pairs or [(agent.policy_target, agent.policy), (agent.critic_target, agent.critic)]
    for target, online in pairs:
        assert equal(copies(target), copies(online))  # they begin equal
        for parameter in online.parameters():
            parameter.data += torch.randn_like(parameter)
    before = [copies(target) for target, _ in pairs]
    agent.update_targets()
    for (target, online), old in zip(pairs, before):
        for new, was, goal in zip(target.parameters(), old, online.parameters()):
            torch.testing.assert_close(new.data, was + 0.1 * (goal.data - was))


@pytest.mark.parametrize("name", VALUE_FILES)
def test_critics_learn_the_value_of_a_loop(name):
    """One state that returns to itself with reward 1: V = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows["rewards"] = torch.ones(64, 1)
    agent = learner(load(name), rows, gamma=0.5, tau=0.1, learning_rate=1e-2, hidden_dim=16)
    if name == "sac":
        agent.log_alpha.data.fill_(-math.inf)
    update = agent.update_critics if name == "a2po" else agent.update_critic
    for _ in range(200):
        update(*batch(agent))
        if name != "sac":
            agent.update_targets()
        else:  # part of its update
            for target, online in zip(agent.critic_target.parameters(), agent.critic.parameters()):
                target.data.lerp_(online.data, 0.1)
    q = (agent.q if name == "a2po" else agent.critic)(*batch(agent)[:2])
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)


# -------------------------------------------------------------------------------------- TD3+BC


def actor_gradient(agent, s, a) -> torch.Tensor:
    agent.update_actor(s, a)
    return gradients(agent.policy)


def grad_of(loss, policy) -> torch.Tensor:
    return torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(policy.parameters()))])


def test_alpha_0_is_behaviour_cloning():
    agent = learner(td3_bc, alpha=0.0)
    s, a, *_ = batch(agent)
    wanted = grad_of((agent.policy(s) - a).square().mean(), agent.policy)
    torch.testing.assert_close(actor_gradient(agent, s, a), wanted)


def test_bc_weight_0_is_td3():
    agent = learner(td3_bc, bc_weight=0.0, alpha=2.5)
    s, a, *_ = batch(agent)
    agent.critic.biases[-1].data -= agent.critic(s, agent.policy(s))[0].median()  # Q of both signs
    first, _ = split_critic(agent.critic, td3_bc)
    pi = agent.policy(s)
    q = first(torch.cat([s, pi], dim=-1))
    wanted = grad_of(-q.mean() * 2.5 / q.detach().abs().mean(), agent.policy)
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


# ---------------------------------------------------------------------------------------- A2PO


def test_condition_is_a_graded_sign():
    agent = learner(a2po)
    advantage = torch.tensor([-1e9, -2.0, -0.1, 0.0, 0.1, 2.0, 1e9])[:, None]
    xi = agent.condition(advantage)
    assert xi.abs().max() <= 1 and torch.equal(xi.sign(), advantage.sign())
    assert (xi.diff(dim=0) > 0).all()


@pytest.mark.parametrize(
    "flags, wanted",
    [
        (dict(xi="fixed"), [1, 1, 1, 1]),
        (dict(xi="discrete"), [-1, -1, 1, 1]),
        (dict(xi="discrete", xi_epsilon=0.5), [-1, 0, 0, 1]),
        (dict(xi_norm="none"), np.tanh([-1, -0.1, 0.1, 1])),
        (dict(xi_norm="running"), np.tanh([-0.1, -0.01, 0.01, 0.1])),  # σ_A is 10
    ],
)
def test_modes_of_the_condition(flags, wanted):
    agent = learner(a2po, **flags)
    agent.sigma_a.fill_(10)
    if flags["xi" if "xi" in flags else "xi_norm"] == "discrete":
        agent.sigma_a.fill_(1)
    xi = agent.condition(torch.tensor([-1.0, -0.1, 0.1, 1.0])[:, None])
    torch.testing.assert_close(xi[:, 0], torch.tensor(wanted, dtype=torch.float32))


def settled_condition(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """ξ once σ_A has settled, with critics and V multiplied by `scale`."""
    torch.manual_seed(0)
    agent = learner(a2po, learning_rate=0.0)
    for last in (agent.q.weights[-1], agent.q.biases[-1], agent.v[-1].weight, agent.v[-1].bias):
        last.data *= scale
    s, a, *_ = batch(agent)
    agent.v[-1].bias.data += (agent.q(s, a).amin(0) - agent.v(s)).mean()  # good and bad actions
    for _ in range(700):
        _, xi = agent.update_critics(*batch(agent))
    return xi, agent.sigma_a


def test_running_norm_makes_the_condition_independent_of_the_rewards_scale():
    (small, sigma), (large, larger) = settled_condition(50.0), settled_condition(5000.0)
    assert small.std() > 0.3
    torch.testing.assert_close(small, large, atol=1e-2, rtol=0)
    torch.testing.assert_close(100 * sigma, larger, rtol=1e-2, atol=0)


@pytest.mark.parametrize("critic", ["min", "q1"])
def test_condition_takes_the_critic_asked_for(critic):
    agent = learner(a2po, xi_critic=critic, xi_norm="none", learning_rate=0.0)
    s, a, *_ = batch(agent)
    q, v = agent.q(s, a), agent.v(s)
    value = q.amin(0) if critic == "min" else q[0]
    _, xi = agent.update_critics(*batch(agent))
    torch.testing.assert_close(xi, torch.tanh(value - v))
    assert not xi.requires_grad


def test_kl_is_the_normal_distributions():
    agent = learner(a2po, latent_dim=5)
    s, a, *_ = batch(agent)
    xi = torch.rand(len(s), 1)
    mu, log_sigma = agent.policy.cvae.encode(s, xi, a)
    assert mu.shape == (64, 5)
    q, prior = distributions.Normal(mu, log_sigma.exp()), distributions.Normal(0, 1)
    wanted = distributions.kl_divergence(q, prior).mean(0)
    torch.testing.assert_close(agent.cvae_losses(s, a, xi)[1], wanted)


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
    decoded = agent.policy.cvae.decode(
        torch.zeros(999, S), torch.zeros(999, 1), torch.randn(999, 2)
    )
    near = [(decoded - mode).abs().lt(0.3).float().mean() for mode in (-0.8, 0.8)]
    assert min(near) > 0.2  # both modes come from the prior's latents

    _, _, reconstruction, kl = trained_cvae(kl_weight=100.0)  # a latent that costs too much
    assert kl.max() < 0.05 and reconstruction > 0.5


def test_the_actors_step_goes_through_frozen_networks():
    agent = learner(a2po)
    s, a, *_ = batch(agent)
    frozen = [agent.policy.cvae, agent.q, agent.v, agent.actor_target, agent.q_target]
    before, actor = [copies(part) for part in frozen], copies(agent.policy.actor)
    agent.update_actor(s, a, torch.rand(len(s), 1))
    assert all(equal(copies(part), old) for part, old in zip(frozen, before))
    assert not equal(copies(agent.policy.actor), actor)
    assert all(parameter.grad.abs().max() > 0 for parameter in agent.policy.actor.parameters())
    for part in (agent.policy.cvae, agent.q, agent.v):
        assert all(p.grad is None and p.requires_grad for p in part.parameters())


def test_the_actors_loss_is_the_papers():
    agent = learner(a2po, alpha=2.0, bc_weight=0.5)
    s, a, *_ = batch(agent)
    xi, policy = torch.rand(len(s), 1), agent.policy

    def action(xi):
        z = torch.tanh(policy.actor(torch.cat([s, xi], dim=-1)))
        return torch.tanh(policy.cvae.decoder(torch.cat([s, xi, z], dim=-1)))

    best = agent.policy(s, torch.ones_like(xi))
    agent.q.biases[-1].data -= agent.q(s, best)[0].median()  # Q of both signs
    first, _ = split_critic(agent.q, a2po)
    q = first(torch.cat([s, action(torch.ones_like(xi))], dim=-1))
    loss = -2.0 * q.mean() / q.detach().abs().mean() + 0.5 * F.mse_loss(action(xi), a)
    wanted = grad_of(loss, policy.actor)
    agent.update_actor(s, a, xi)
    torch.testing.assert_close(gradients(policy.actor), wanted)


def test_a_frozen_cvae_stays_as_it_is():
    agent = learner(a2po)
    before, actor = copies(agent.policy.cvae), copies(agent.policy.actor)
    agent.update_frozen()
    assert equal(copies(agent.policy.cvae), before)
    assert not equal(copies(agent.policy.actor), actor)
    agent.update()
    assert not equal(copies(agent.policy.cvae), before)


@pytest.mark.parametrize(
    "flags, k",
    [
        (dict(steps=1000, cvae_fraction=0.2, cvae_min_steps=0), 200),
        (dict(steps=1000, cvae_fraction=0.2, cvae_min_steps=300), 300),
    ],
)
def test_the_cvae_is_frozen_after_k_steps(flags, k):
    agent = learner(a2po, **flags)
    for step, wanted in ((0, agent.update), (k - 2, agent.update), (k, agent.update_frozen)):
        assert agent.phase(step) == (wanted, 2)


CLUSTERS = torch.tensor([[-0.6, 0.5], [0.6, 0.5], [0.0, -0.7]])  # bad, mediocre, good


def bandit(updates, **flags):
    """No state, three clusters of actions that pay -1, 0 and 1: the paper's first figure."""
    kind = torch.arange(600) % 3
    rows = data(600, observations=torch.zeros(600, S), next_observations=torch.zeros(600, S))
    rows |= {"actions": CLUSTERS[kind] + 0.05 * torch.randn(600, 2)}
    rows |= {"rewards": kind[:, None] - 1.0, "terminals": torch.ones(600, 1)}
    sizes = dict(hidden_dim=32, cvae_dim=64, batch_size=128, learning_rate=1e-3)
    agent = learner(a2po, rows, **sizes | flags)
    for _ in range(updates):
        metrics = agent.update()
    return agent, metrics


def test_the_condition_asks_for_better_actions():
    agent, _ = bandit(600)
    for kind, xi in enumerate((-1.0, 0.0, 1.0)):
        a = agent.policy.act(torch.zeros(1, S), xi=xi)
        distance = (a - CLUSTERS).norm(dim=1)
        print(f"xi {xi:+.0f}: {a[0].tolist()}, distances {distance.tolist()}")
        assert distance.argmin() == kind and distance[kind] < 0.35


def test_official_flags_saturate_the_condition():
    """Rewards in the hundreds and no normalisation make ξ a sign; the defaults keep it graded."""
    share = []
    official = dict(reward_scale=100.0, xi_norm="none", xi_critic="q1", kl_weight=1.0)
    for flags in (official, {}):
        xi = bandit(300, **flags)[1]["advantage/xi"]
        share.append((xi.abs() > 0.99).float().mean().item())
    print(f"|xi| > 0.99: {share[0]:.2f} official, {share[1]:.2f} default")
    assert share[0] > 0.6 and share[1] < 0.1


def test_evaluation_at_further_conditions():
    agent = learner(a2po, eval_xi=(-1.0, 0.5))
    s = torch.randn(4, S)
    actors = agent.actors()
    assert list(actors) == ["", "_xi_-1", "_xi_0.5"]
    for suffix, xi in (("", 1.0), ("_xi_-1", -1.0), ("_xi_0.5", 0.5)):
        assert torch.equal(actors[suffix](s), agent.policy.act(s, xi=xi))
