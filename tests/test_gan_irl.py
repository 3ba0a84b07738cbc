"""What gan_irl.py claims, each against an independent computation."""

import copy
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load, tiny, write_hdf5
from torch import distributions
from units import A, S, constant_critic, constant_net, copies, data, equal, gradient_of, learner

irl = load("gan_irl")
NETS = ("policy", "critic", "critic_target", "v", "discriminator")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def rows_of(agent):
    """All transitions as one batch: s, a, the learned r̂, s', d."""
    s, a, r, s_next, d = agent.data
    return s, a, agent.reward(s, a, r), s_next, d


def linear(agent, *slopes):
    """A discriminator whose logit is linear in (s, a)."""
    weight = torch.tensor([*slopes, *[0.0] * (S + A - len(slopes))])
    agent.discriminator = torch.nn.Linear(S + A, 1)
    agent.discriminator.weight.data, agent.discriminator.bias.data = weight[None], torch.zeros(1)
    return weight


# ------------------------------------------------------------------------ The two kinds of data


def test_best_episodes_are_the_demonstrations_and_leave_the_rest():
    rows = data()  # 16 episodes of 4
    expert, others = irl.demonstrations(rows, {}, irl.Args(demonstration_episodes=3))
    returns = rows["rewards"].view(16, 4).sum(1)
    best = returns.topk(3).indices
    assert sorted(expert["episodes"].unique().tolist()) == sorted(best.tolist())
    assert expert.keys() == others.keys() == rows.keys()
    assert len(expert["rewards"]) == 12 and len(others["rewards"]) == 52
    assert not set(expert["episodes"].tolist()) & set(others["episodes"].tolist())
    both = torch.cat([expert["actions"], others["actions"]])
    assert {tuple(x) for x in both.tolist()} == {tuple(x) for x in rows["actions"].tolist()}


def demonstration_file(folder, pendulum, **attributes):
    about = dict(env_id="Pendulum-v1", action_low=[-2.0], action_high=[2.0]) | attributes
    return str(write_hdf5(folder / "expert.hdf5", pendulum, **about))


def test_demonstrations_of_another_data_set_leave_the_data_whole(pendulum, tmp_path):
    path = demonstration_file(tmp_path, pendulum)
    found, task = irl.load_dataset(path)
    rows = {key: torch.as_tensor(array) for key, array in found.items()}
    args = irl.Args(demonstrations=path, demonstration_episodes=2)
    expert, others = irl.demonstrations(rows, task, args)
    assert others is rows and len(expert["rewards"]) == 400  # episodes of 200 steps
    first = rows["returns_to_go"][::200, 0]
    assert set(expert["episodes"].tolist()) == set(first.topk(2).indices.tolist())
    assert task["demonstrations_digest"] == task["digest"]
    assert expert["observations"].dtype == torch.float32


def test_demonstrations_must_fit(pendulum, tmp_path):
    path = demonstration_file(tmp_path, pendulum)
    found, task = irl.load_dataset(path)
    rows = {key: torch.as_tensor(array) for key, array in found.items()}
    for wrong in ({"bounds": [[-1.0], [1.0]]}, {"sizes": [4, 1]}):
        with pytest.raises(SystemExit, match=r"--demonstrations .* fits no --dataset"):
            irl.demonstrations(rows, task | wrong, irl.Args(demonstrations=path))
    assert irl.demonstrations(rows, task, irl.Args(demonstrations=path, demonstration_episodes=8))
    for n, kind in ((9, {"demonstrations": path}), (0, {"demonstrations": path}), (8, {})):
        with pytest.raises(SystemExit, match=r"--demonstration-episodes .*to choose from"):
            irl.demonstrations(rows, task, irl.Args(demonstration_episodes=n, **kind))


def test_a_resumed_run_notices_other_demonstrations(pendulum, tmp_path):
    path = demonstration_file(tmp_path, pendulum)
    flags = tiny("gan_irl", demonstrations=path, run_dir=str(tmp_path / "run"))
    flags["dataset"] = str(shutil.copy(path, tmp_path / "data.hdf5"))
    irl.train(irl.Args(**flags))
    other = pendulum | {"rewards": pendulum["rewards"] + 1}
    demonstration_file(tmp_path, other)
    with pytest.raises(SystemExit, match="demonstrations_digest"):
        irl.train(irl.Args(**flags | dict(steps=30, resume=True)))


def test_both_kinds_are_normalised_alike_and_iql_learns_from_both():
    rows = data(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    rows["next_observations"] = rows["observations"] + 1
    agent = learner(irl, rows, demonstration_episodes=2)
    s, a, r, s_next, d = agent.data
    assert len(s) == 64 and len(agent.expert) == 8 and len(agent.others) == 56
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    torch.testing.assert_close(s_next - s, (1 / agent.policy.scaling.std).expand(64, S))
    torch.testing.assert_close(torch.cat([agent.expert, agent.others]), torch.cat([s, a], dim=1))
    assert {tuple(x) for x in a.tolist()} == {tuple(x) for x in rows["actions"].tolist()}
    for i in range(64):  # each row is one of the data's
        (j,) = (rows["actions"] == a[i]).all(1).nonzero().flatten().tolist()
        assert r[i] == rows["rewards"][j] and d[i] == rows["terminals"][j]
        torch.testing.assert_close(s[i], agent.policy.scaling.state(rows["observations"])[j])


# ----------------------------------------------------------------------------- Discriminator


@pytest.mark.parametrize("eta", [0.2, 0.5])
@pytest.mark.parametrize("pu", [True, False])
def test_discriminator_loss_by_hand(pu, eta):
    agent = learner(irl, pu=pu, eta=eta, gradient_penalty=0.0)
    x_e, x_u = agent.expert, agent.others[:4]
    D_e, D_u = (torch.sigmoid(agent.discriminator(x)) for x in (x_e, x_u))
    if pu:
        rest = -torch.log(1 - D_u).mean() + eta * torch.log(1 - D_e).mean()
        assert rest > 0
        wanted = eta * -torch.log(D_e).mean() + rest
    else:
        wanted = -torch.log(D_e).mean() - torch.log(1 - D_u).mean()
    loss, metrics = agent.discriminator_loss(x_e, x_u)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(metrics["losses/discriminator"], wanted)
    assert metrics["discriminator/expert"] == (D_e > 0.5).float().mean()
    assert metrics["discriminator/unlabelled"] == (D_u < 0.5).float().mean()


def test_discriminator_that_knows_nothing_has_log_4():
    agent = learner(irl, pu=False, gradient_penalty=0.0)
    constant_net(agent.discriminator, 0.0)
    loss, _ = agent.discriminator_loss(agent.expert, agent.others[:4])
    assert loss.item() == pytest.approx(math.log(4))


def test_a_risk_is_not_below_zero():
    """Where the others look less like others than η of the experts do, that part is dropped."""
    agent = learner(irl, eta=0.5, gradient_penalty=0.0)
    linear(agent, 8.0)
    x_e, x_u = torch.zeros(4, S + A), torch.zeros(4, S + A)
    x_e[:, 0], x_u[:, 0] = 1.0, -1.0
    loss, _ = agent.discriminator_loss(x_e, x_u)
    assert F.softplus(torch.tensor(-8.0)) - 0.5 * F.softplus(torch.tensor(8.0)) < 0
    assert loss.item() == pytest.approx(0.5 * math.log1p(math.exp(-8)), rel=1e-4)


def test_least_squares_labels_of_mlp():
    agent = learner(irl, reward="mlp")
    f_e, f_u = agent.discriminator(agent.expert), agent.discriminator(agent.others)
    loss, metrics = agent.discriminator_loss(agent.expert, agent.others)
    torch.testing.assert_close(loss, ((f_e - 1) ** 2).mean() + (f_u**2).mean())
    assert metrics["discriminator/expert"] == (f_e > 0.5).float().mean()
    assert metrics["discriminator/unlabelled"] == (f_u < 0.5).float().mean()
    assert "losses/gradient_penalty" not in metrics


@pytest.mark.parametrize("slopes, wanted", [((0.6, 0.8), 0.0), ((0.0, 3.0), 4.0), ((0.0,), 1.0)])
def test_gradient_penalty_wants_slope_1(slopes, wanted):
    agent = learner(irl, gradient_penalty=10.0)
    linear(agent, *slopes)
    x_e, x_u = agent.expert, agent.others[: len(agent.expert)]
    loss, metrics = agent.discriminator_loss(x_e, x_u)
    assert metrics["losses/gradient_penalty"].item() == pytest.approx(wanted, abs=1e-5)
    wanted = metrics["losses/discriminator"] + 10 * wanted
    torch.testing.assert_close(loss, wanted)


def test_penalty_looks_between_the_two_kinds():
    agent = learner(irl)
    x_e, x_u, seen = torch.zeros(500, S + A), torch.ones(500, S + A), []
    real = agent.discriminator.forward
    agent.discriminator.forward = lambda x: (seen.append(x.detach()), real(x))[1]
    agent.discriminator_loss(x_e, x_u)
    between = seen[-1]
    assert between.shape == (500, S + A) and equal(between.T[:1], between.T[1:2])  # one w a row
    assert 0 <= between.min() < 0.05 and 0.95 < between.max() <= 1
    assert between.mean().item() == pytest.approx(0.5, abs=0.05)


def test_penalty_bounds_the_slope_that_is_learned():
    """On two kinds that are apart, f becomes steep without the penalty and has slope 1 with it."""
    slopes = {}
    for weight in (0.0, 10.0):
        agent = learner(irl, gradient_penalty=weight, learning_rate=1e-2, pu=False)
        agent.expert, agent.others = torch.full((8, S + A), 0.2), torch.full((8, S + A), -0.2)
        for _ in range(300):
            agent.update_discriminator()
        x = torch.zeros(1, S + A, requires_grad=True)
        (slope,) = torch.autograd.grad(agent.discriminator(x).sum(), x)
        slopes[weight] = slope.norm().item()
    assert slopes[0.0] > 5 and slopes[10.0] == pytest.approx(1, abs=0.4), slopes


def test_positive_unlabelled_loss_finds_the_experts_in_the_unlabelled():
    """Half of the unlabelled are the expert's: told so, D is sure of them; otherwise it calls each
    of them the expert's with a chance of two in three, which is what labels 1 and 0 say."""
    found = {}
    for pu in (True, False):
        agent = learner(irl, pu=pu, eta=0.5, gradient_penalty=0.0, learning_rate=1e-2)
        good, bad = torch.ones(8, S + A), -torch.ones(8, S + A)
        for _ in range(300):
            loss, _ = agent.discriminator_loss(torch.cat([good, good]), torch.cat([good, bad]))
            irl.minimise(agent.discriminator_optimizer, loss)
        f = agent.discriminator(torch.stack([good[0], bad[0]]))[:, 0]
        found[pu] = torch.sigmoid(f).tolist()
    assert found[True][0] > 0.9 and found[True][1] < 0.1
    assert found[False][0] == pytest.approx(2 / 3, abs=0.08) and found[False][1] < 0.1


def test_the_discriminators_step_moves_it_alone():
    agent = learner(irl, learning_rate=1e-2)
    before = {name: copies(getattr(agent, name)) for name in NETS}
    alone = copy.deepcopy(agent)
    torch.manual_seed(1)
    metrics = agent.update_discriminator()
    torch.manual_seed(1)
    x_e, x_u = alone.sample(alone.expert)[0], alone.sample(alone.others)[0]
    assert x_e.shape == x_u.shape == (16, S + A)
    for x, kind in ((x_e, alone.expert), (x_u, alone.others)):
        assert all((kind == row).all(1).any() for row in x)
    loss, wanted = alone.discriminator_loss(x_e, x_u)
    for name in NETS:
        moved = not equal(before[name], copies(getattr(agent, name)))
        assert moved == (name == "discriminator"), name
    for parameter, g in zip(
        alone.discriminator.parameters(),
        torch.autograd.grad(loss, list(alone.discriminator.parameters())),
    ):
        parameter.grad = g
    torch.optim.Adam(alone.discriminator.parameters(), lr=1e-2).step()
    torch.testing.assert_close(copies(agent.discriminator), copies(alone.discriminator))
    assert metrics.keys() == wanted.keys()


# -------------------------------------------------------------------------------- The reward


def test_kinds_of_reward():
    s, a, r = torch.randn(9, S), torch.rand(9, A), torch.randn(9, 1)
    for kind in ("airl", "gail", "mlp", "true"):
        agent = learner(irl, reward=kind)
        f = agent.discriminator(torch.cat([s, a], dim=1)).detach()
        D = torch.sigmoid(f)
        wanted = {"airl": D.log() - (1 - D).log(), "gail": -(1 - D).log(), "mlp": f, "true": r}
        found = agent.reward(s, a, r)
        torch.testing.assert_close(found, wanted[kind], atol=1e-5, rtol=1e-4)
        assert not found.requires_grad
        agent.scale.copy_(torch.tensor([3.0, 2.0]))
        torch.testing.assert_close(agent.reward(s, a, r), (found - 3) / 2, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("reward", ["airl", "gail", "mlp", "true"])
def test_iql_begins_with_a_standardised_reward(reward):
    agent = learner(irl, data(rewards=5 + 3 * torch.randn(64, 1)), reward=reward)
    for _ in range(5):
        agent.update_discriminator()
    agent.begin_policy()
    r_hat = rows_of(agent)[2]
    assert r_hat.mean().item() == pytest.approx(0, abs=1e-4)
    assert r_hat.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    scale = agent.scale.clone()
    agent.update()
    assert torch.equal(scale, agent.scale) and "scale" in agent.state_dict()


def test_phases():
    agent = learner(irl, discriminator_steps=3)
    wanted = 3 * [agent.update_discriminator] + [agent.begin_policy] + 2 * [agent.update]
    assert [agent.phase(step) for step in range(1, 7)] == wanted
    oracle = learner(irl, discriminator_steps=3, reward="true")
    assert [oracle.phase(step) for step in (1, 2)] == [oracle.begin_policy, oracle.update]


def test_batches_are_relabelled_when_they_are_drawn():
    agent, seen = learner(irl), []
    real = agent.losses
    agent.losses = lambda s, a, r, s_next, d: (seen.append((s, a, r)), real(s, a, r, s_next, d))[1]
    agent.begin_policy(), agent.update()
    s, a, r = seen[-1]
    assert len(seen) == 2 and len(s) == 16
    torch.testing.assert_close(r, agent.reward(s, a, torch.full_like(r, 99.0)))


def test_the_datas_own_rewards_teach_nothing():
    """They choose the best episodes; what is learned is the same whatever else they say."""
    one = data()
    other = one | {"rewards": torch.randn(64, 1)}
    for reward in ("airl", "true"):
        found = []
        for rows in (one, other):
            torch.manual_seed(3)
            agent = learner(irl, rows, reward=reward, discriminator_steps=3)
            for step in range(1, 8):
                agent.phase(step)()
            found.append([x for name in NETS for x in copies(getattr(agent, name))])
        assert equal(*found) == (reward == "airl")


def test_correlation_is_pearsons():
    agent = learner(irl, batch_size=64)
    for _ in range(3):
        agent.update_discriminator()
    pairs, real = [], agent.reward
    agent.reward = lambda s, a, r: (pairs.append((real(s, a, r), r)), pairs[-1][0])[1]
    found = agent.update()["reward/correlation"].item()
    r_hat, r = (x[:, 0].numpy() for x in pairs[-1])
    assert found == pytest.approx(np.corrcoef(r_hat, r)[0, 1], abs=1e-4)
    agent.data = (*agent.data[:2], torch.ones(64, 1), *agent.data[3:])
    assert agent.update()["reward/correlation"].isfinite().all()


def test_validation_ranks_and_weighs():
    agent, held_out = learner(irl), data(24)
    agent.begin_policy()
    found = agent.validate(held_out)
    state = agent.policy.scaling.state
    s, s_next = state(held_out["observations"]), state(held_out["next_observations"])
    a, r = held_out["actions"], held_out["rewards"]
    r_hat = agent.reward(s, a, r)
    wanted, _ = agent.losses(s, a, r_hat, s_next, held_out["terminals"])
    ranks = [np.argsort(np.argsort(x[:, 0].numpy())) for x in (r_hat, r)]
    wanted |= {"rank_correlation": torch.tensor(np.corrcoef(*ranks)[0, 1]).float()}
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], atol=1e-4, rtol=1e-4)
    oracle = learner(irl, reward="true").validate(held_out)
    assert oracle["rank_correlation"].item() == pytest.approx(1, abs=1e-5)


# --------------------------------------------------------------------------------------- IQL


@pytest.mark.parametrize("expectile", [0.5, 0.8])
def test_value_loss_by_hand(expectile):
    """u = 2 weighs τ, u = -1 weighs 1 - τ; the smaller Q' of the data's actions is asked."""
    agent = learner(irl, expectile=expectile)
    constant_net(agent.v, 1.0)
    s, a = torch.randn(2, S), torch.tensor([[3.0, 5], [0, 5]])
    agent.critic_target.forward = lambda s, a: torch.stack([a[:, :1] + 1, a[:, :1]])
    loss = agent.losses(s, a, a[:, :1], s, a[:, :1])[0]["v"]
    assert loss.item() == pytest.approx((expectile * 4 + (1 - expectile) * 1) / 2)


def test_clones_by_clipped_exponential_weights():
    agent = learner(irl, beta=2.0)
    agent.v.forward = lambda s: s[:, :1]  # 1 at s, -3 at s'
    agent.policy.log_sigma.data = torch.tensor([-0.5, 0.3])
    s, a = torch.randn(5, S), 2 * torch.rand(5, A) - 1
    s[:, 0] = 1.0
    q = torch.tensor([[-1.0], [1.0], [1.5], [3.0], [9.0]])
    agent.critic_target.forward = lambda *_: torch.stack([q, q + 1])
    losses, metrics = agent.losses(s, a, q, -3 * s, torch.zeros_like(q))
    torch.testing.assert_close(metrics["advantage/u"], q - 1)
    weight = torch.cat([torch.tensor([-4.0, 0, 1, 4]).exp(), torch.tensor([100.0])])
    normal = distributions.Normal(agent.policy(s)[0], torch.tensor([-0.5, 0.3]).exp())
    torch.testing.assert_close(losses["actor"], -(weight * normal.log_prob(a).sum(-1)).mean())


def test_bootstraps_from_the_value_and_asks_no_policy():
    """y = r̂ + γ (1 - d) V(s') in a batch in which some rows are terminals."""
    agent = learner(irl, gamma=0.9)
    constant_critic(agent.critic, 1, -2)
    constant_critic(agent.critic_target, 50, 50)  # has no say in the target of Q
    agent.v.forward = lambda s: 3 * s[:, :1]
    for parameter in agent.policy.parameters():  # nor has the policy
        parameter.data.fill_(math.nan)
    s, a, r, s_next, d = rows_of(agent)
    assert 0 < d.sum() < len(d) and a.shape[1] > 1
    losses, _ = agent.losses(s, a, r, s_next, d)
    y = torch.where(d > 0, r, r + 0.9 * 3 * s_next[:, :1])
    torch.testing.assert_close(losses["critic"], ((1 - y) ** 2 + (-2 - y) ** 2).mean())


def test_each_loss_reaches_its_own_network_alone():
    agent = learner(irl)
    nets = {"v": agent.v, "actor": agent.policy, "critic": agent.critic}
    losses, _ = agent.losses(*rows_of(agent))
    for name, loss in losses.items():
        agent.zero_grad()
        loss.backward(retain_graph=True)
        for other, net in nets.items():
            found = [p.grad is not None and bool(p.grad.any()) for p in net.parameters()]
            assert all(found) if other == name else not any(found), (name, other)
        for net in (agent.critic_target, agent.discriminator):
            assert all(parameter.grad is None for parameter in net.parameters())


def test_step_of_iql():
    """Each network moves by its own loss alone, D stands still, the target follows the new Q."""
    agent = learner(irl, learning_rate=1e-2, tau=0.1)
    agent.begin_policy()
    agent.optimizer.state.clear()
    alone = copy.deepcopy(agent)
    torch.manual_seed(1)
    agent.update()
    torch.manual_seed(1)
    s, a, r, s_next, d = alone.sample(*alone.data)
    losses, _ = alone.losses(s, a, alone.reward(s, a, r), s_next, d)
    nets = {"v": alone.v, "critic": alone.critic, "actor": alone.policy}
    gradients = {name: gradient_of(losses[name], net) for name, net in nets.items()}
    for name, net in nets.items():
        assert gradients[name].abs().max() > 0
        split = gradients[name].split([p.numel() for p in net.parameters()])
        for parameter, part in zip(net.parameters(), split):
            parameter.grad = part.view_as(parameter)
        torch.optim.Adam(net.parameters(), lr=1e-2).step()
    for name in ("v", "critic", "policy", "discriminator"):
        torch.testing.assert_close(copies(getattr(agent, name)), copies(getattr(alone, name)))
    pairs = zip(copies(alone.critic_target), copies(agent.critic), strict=True)
    wanted = [0.9 * old + 0.1 * new for old, new in pairs]
    torch.testing.assert_close(copies(agent.critic_target), wanted)


# ----------------------------------------------------------------------------------- Acting


def test_log_density_is_the_normal_distributions():
    policy = learner(irl).policy
    policy.log_sigma.data = torch.tensor([-9.0, 0.3])  # the first is held at -5
    s, a = 3 * torch.randn(32, S), 2 * torch.rand(32, A) - 1
    mu, log_sigma = policy(s)
    torch.testing.assert_close(mu, torch.tanh(policy.net(s)))
    torch.testing.assert_close(log_sigma, torch.tensor([-5.0, 0.3]))
    wanted = distributions.Normal(mu, log_sigma.exp()).log_prob(a).sum(-1, keepdim=True)
    torch.testing.assert_close(policy.log_prob(s, a), wanted)


def test_acts_by_the_mean_or_by_samples_in_the_bounds():
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    policy = learner(irl, low=low.tolist(), high=high.tolist()).policy
    policy.log_sigma.data = torch.tensor([0.1, 0.3]).log()
    raw = 5 * torch.randn(1, S).expand(4000, S) + 2
    mean, a = policy.act(raw), policy.act(raw, deterministic=False)
    mu, _ = policy(policy.scaling.state(raw))
    torch.testing.assert_close(mean, low + (mu + 1) / 2 * (high - low))
    torch.testing.assert_close(a.mean(0), mean[0], atol=0.1, rtol=0)
    assert a.std(0)[1] > 2 * a.std(0)[0] > 0.1
    policy.log_sigma.data.fill_(2.0)
    a = policy.act(raw, deterministic=False)
    assert (a >= low).all() and (a <= high).all()


# ------------------------------------------------------------------------------- What it is for


def test_finds_the_experts_action_among_the_others():
    """One state; the expert answers 0.5, a quarter of the others do, too, the rest -0.5."""
    n = 64
    a = torch.full((n, A), -0.5)
    a[:16] = 0.5  # four episodes of four steps; the first has the highest return
    a += 0.05 * torch.randn(n, A)
    rewards = torch.zeros(n, 1)
    rewards[:4] = 1.0
    rows = data(n, observations=torch.zeros(n, S), next_observations=torch.zeros(n, S), actions=a)
    rows = data(n, **{k: rows[k] for k in ("observations", "next_observations", "actions")})
    rows |= {"rewards": rewards, "terminals": torch.zeros(n, 1)}
    rows["returns_to_go"] = rewards * 4
    acts = {}
    for reward in ("airl", "gail", "mlp"):
        flags = dict(learning_rate=1e-2, gamma=0.5, discriminator_steps=150, reward=reward)
        agent = learner(irl, dict(rows), eta=0.25, **flags)
        for step in range(1, 451):
            agent.phase(step)()
        acts[reward] = agent.policy.act(np.zeros(S)).mean()
    assert all(act > 0.35 for act in acts.values()), acts


@pytest.mark.parametrize("flag, wrong", [("eta", 0.0), ("eta", 1.0), ("expectile", 1.0)])
def test_refuses_what_is_no_share(flag, wrong):
    with pytest.raises(SystemExit, match=rf"--{flag} .*between 0 and 1"):
        learner(irl, **{flag: wrong})
