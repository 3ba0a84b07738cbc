"""SAC: target, gradients and temperature; online, what it collects, when, and what a run leaves."""

import functools
import math
import os

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import units
from conftest import load, tiny
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
    split_critic,
)

sac, learner = load("sac"), functools.partial(units.learner, "sac")
LOW, HIGH = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def head(policy, mu, log_sigma):
    """The policy whose Gaussian is this one everywhere, before the tanh."""
    last = policy.net[-1]
    last.weight.data.zero_()
    raw = math.atanh((log_sigma + 5) / 3.5 - 1)
    last.bias.data = torch.cat([torch.as_tensor(mu), torch.full((A,), raw)]).float()


# -------------------------------------------------------------------------------------- Policy


def test_log_density_is_that_of_a_tanh_of_a_normal():
    policy = learner().policy.double()
    s = torch.randn(500, S, dtype=torch.float64)
    a, log_prob = policy(s)
    mu, raw = policy.net(s).chunk(2, dim=-1)
    sigma = (-5 + 3.5 * (raw.tanh() + 1)).exp()
    tanh = distributions.transforms.TanhTransform()
    wanted = distributions.TransformedDistribution(distributions.Normal(mu, sigma), tanh)
    assert a.shape == (500, A) and log_prob.shape == (500, 1) and a.std() > 0.1
    torch.testing.assert_close(log_prob, wanted.log_prob(a).sum(-1, keepdim=True))


def test_samples_have_the_asked_mean_and_spread():
    policy = learner().policy
    head(policy, [0.5, -1.0], math.log(0.3))
    a, _ = policy(torch.zeros(20_000, S))
    u = a.atanh()
    torch.testing.assert_close(u.mean(0), torch.tensor([0.5, -1.0]), atol=0.02, rtol=0)
    torch.testing.assert_close(u.std(0), torch.tensor([0.3, 0.3]), atol=0.02, rtol=0)


@pytest.mark.parametrize("mu", [-40.0, 40.0])
def test_log_density_and_its_gradient_stay_finite(mu):
    """log(1 - tanh²) is -inf in float32 from |u| = 10 on; its stable form is not."""
    policy = learner().policy
    head(policy, [mu, mu], 0.0)
    log_prob = policy(torch.zeros(9, S))[1].mean()
    log_prob.backward()
    assert log_prob.isfinite() and log_prob > 50  # the density piles up at the bound
    assert gradients(policy).isfinite().all()


def test_log_sigma_is_squashed_not_clipped():
    policy = learner().policy
    policy.net[-1].weight.data.zero_()
    for raw, wanted in ((-30.0, -5), (30.0, 2)):
        policy.net[-1].bias.data = torch.tensor([0, 0, raw, raw])
        u = policy(torch.zeros(4000, S))[0].double().clamp(-1 + 1e-7, 1 - 1e-7).atanh()
        median = u.abs().median(0).values  # of a normal 0.674 σ
        torch.testing.assert_close(
            median, torch.full_like(median, 0.674 * math.exp(wanted)), rtol=0.1, atol=0
        )
    policy.net[-1].bias.data = torch.tensor([0, 0, 2.5, -2.5])  # a clip's gradient is 0 here
    policy(torch.zeros(9, S))[1].sum().backward()
    assert (policy.net[-1].bias.grad[A:] != 0).all()


def test_act_answers_in_the_environments_bounds():
    """A policy whose mean is the scaled action x acts with the action that x came from."""
    policy = learner(low=LOW.tolist(), high=HIGH.tolist()).policy
    for x in ([0.0, 0.0], [0.5, -0.25], [-0.999, 0.999]):
        head(policy, torch.tensor(x).atanh(), 0.0)
        wanted = LOW + (torch.tensor(x) + 1) / 2 * (HIGH - LOW)
        for observations in (torch.randn(5, S), torch.randn(S), torch.randn(5, S).double()):
            a = policy.act(observations)
            torch.testing.assert_close(a, wanted.expand(*observations.shape[:-1], A))
            assert isinstance(policy.act(observations.numpy()), np.ndarray)
            np.testing.assert_allclose(policy.act(observations.numpy()), a, rtol=1e-6)


def test_act_samples_on_demand_only():
    policy = learner(low=LOW.tolist(), high=HIGH.tolist()).policy
    s = torch.zeros(2000, S)
    head(policy, [0.3, 0.3], -4.9)
    near = policy.act(s, deterministic=False)
    torch.testing.assert_close(near, policy.act(s), atol=0.1, rtol=0)
    head(policy, [0.3, 0.3], 1.9)
    assert equal(policy.act(s), policy.act(s, deterministic=True))
    assert policy.act(s).std(0).max() == 0  # the mean is one and the same
    a = policy.act(s, deterministic=False)
    assert (a.std(0) > 1).all() and (a >= LOW).all() and (a <= HIGH).all()
    assert policy.actors().keys() == {""}
    assert equal(policy.actors()[""](s), policy.act(s))


def test_states_are_not_normalised():
    agent = learner(data(observations=5 + 3 * torch.randn(64, S)))
    assert not agent.policy.scaling.mean.any() and (agent.policy.scaling.std == 1).all()
    mean, _ = agent.policy.net(agent.data[0]).chunk(2, dim=-1)
    torch.testing.assert_close(agent.policy.act(agent.data[0]), mean.tanh())


# -------------------------------------------------------------------------------------- Critics


@pytest.mark.parametrize("layers", [2, 3])
def test_twin_critic_is_two_networks(layers):
    critic = sac.TwinCritic(S, A, 16, hidden_layers=layers)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    for i, net in enumerate(split_critic(critic, sac)):
        torch.testing.assert_close(q[i], net(torch.cat([s, a], dim=-1)))


@pytest.mark.parametrize("d", [0.0, 1.0])
@pytest.mark.parametrize("log_alpha", [-math.inf, 0.7])
def test_target_is_masked_by_terminals_alone(d, log_alpha):
    """y = r + γ (1 - d) (min Q' - α log π), read from the losses of critics that say 0."""
    agent = learner(gamma=0.9)
    constant_critic(agent.critic, 0, 0)
    constant_critic(agent.critic_target, 5, 3)
    agent.log_alpha.data.fill_(log_alpha)
    s, a, r, s_next, _ = batch(agent)
    state = torch.get_rng_state()
    loss, q = agent.critic_loss(s, a, r, s_next, torch.full_like(r, d))
    torch.set_rng_state(state)
    _, log_prob = agent.policy(s_next)
    y = r + 0.9 * (1 - d) * (3 - math.exp(log_alpha) * log_prob)
    torch.testing.assert_close(loss, 2 * y.square().mean())
    assert q.shape == (2, len(r), 1)


def test_each_row_of_the_target_has_its_own_mask():
    agent = learner(gamma=0.9)
    constant_critic(agent.critic, 0, 0)
    constant_critic(agent.critic_target, 3, 5)
    agent.log_alpha.data.fill_(-math.inf)
    _, _, r, _, d = batch(agent)
    assert 0 < d.mean() < 1
    wanted = torch.where(d > 0, r, r + 0.9 * 3)
    torch.testing.assert_close(agent.critic_loss(*batch(agent))[0], 2 * wanted.square().mean())


def test_target_looks_at_the_policys_actions_at_the_next_states():
    agent = learner()
    seen = []
    del agent.critic_target
    agent.critic_target = lambda s, a: seen.append((s, a)) or torch.zeros(2, len(a), 1)
    state = torch.get_rng_state()
    agent.critic_loss(*batch(agent))
    torch.set_rng_state(state)
    s_next = batch(agent)[3]
    a_next, _ = agent.policy(s_next)
    assert torch.equal(seen[0][0], s_next) and torch.equal(seen[0][1], a_next)


def test_both_critics_regress_and_nobody_else():
    agent = learner()
    state = torch.get_rng_state()
    loss = agent.update_critic(*batch(agent))["losses/critic"]
    found = gradients(agent.critic)
    others = [*agent.policy.parameters(), *agent.critic_target.parameters(), agent.log_alpha]
    assert all(parameter.grad is None for parameter in others)

    fresh = learner_like(agent)
    torch.set_rng_state(state)
    s, a, r, s_next, d = batch(agent)
    with torch.no_grad():
        a_next, log_prob = fresh.policy(s_next)
        q_next = fresh.critic_target(s_next, a_next).min(0).values - log_prob  # α is 1
        y = r + 0.99 * (1 - d) * q_next
    q = fresh.critic(s, a)
    wanted = (q[0] - y).square().mean() + (q[1] - y).square().mean()
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(found, gradient_of(wanted, fresh.critic), rtol=1e-4, atol=1e-6)


def learner_like(agent):
    """A learner with the weights that this one began with."""
    torch.manual_seed(0)
    fresh = learner(data())
    for one, other in zip(copies(fresh.policy), copies(agent.policy)):
        assert torch.equal(one, other)
    return fresh


def test_critics_learn_the_value_of_a_loop():
    """One state that returns to itself with reward 1: V = 1 / (1 - γ) = 2."""
    rows = data(observations=torch.zeros(64, S), next_observations=torch.zeros(64, S))
    rows |= dict(rewards=torch.ones(64, 1), terminals=torch.zeros(64, 1))
    agent = learner(rows, gamma=0.5, tau=0.1, learning_rate=1e-2)
    agent.log_alpha.data.fill_(-math.inf)
    for _ in range(200):
        agent.update_critic(*batch(agent))
        agent.update_targets()
    q = agent.critic(*batch(agent)[:2])
    torch.testing.assert_close(q, torch.full_like(q, 2), atol=0.1, rtol=0)


def test_targets_follow_by_tau():
    agent = learner(tau=0.1)
    assert equal(copies(agent.critic_target), copies(agent.critic))  # they begin equal
    for parameter in agent.critic.parameters():
        parameter.data += torch.randn_like(parameter)
    before = copies(agent.critic_target)
    agent.update_targets()
    for new, was, goal in zip(copies(agent.critic_target), before, copies(agent.critic)):
        torch.testing.assert_close(new, was + 0.1 * (goal - was))


# ------------------------------------------------------------------------- Actor, temperature


def test_the_actor_climbs_the_smaller_critic_and_is_paid_for_entropy():
    agent = learner()
    agent.log_alpha.data.fill_(0.7)
    s = batch(agent)[0]
    pi, _ = agent.policy(s)
    one, two = agent.critic(s, pi)
    agent.critic.biases[-1].data[0] += (two - one).median()
    state, before = torch.get_rng_state(), copies(agent.critic)
    pi, log_prob = agent.policy(s)
    one, two = (net(torch.cat([s, pi], dim=-1)) for net in split_critic(agent.critic, sac))
    assert 0.1 < (one < two).float().mean() < 0.9  # either is the smaller one somewhere
    loss = (math.exp(0.7) * log_prob - torch.minimum(one, two)).mean()
    wanted = gradient_of(loss, agent.policy)
    torch.set_rng_state(state)
    metrics = agent.update_actor(s)
    torch.testing.assert_close(metrics["losses/actor"], loss)
    torch.testing.assert_close(gradients(agent.policy), wanted, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(metrics["values/entropy"], -log_prob.mean())
    assert metrics["values/alpha"].item() == pytest.approx(math.exp(0.7))
    assert equal(copies(agent.critic), before)  # the actor's step leaves the critics alone
    assert all(p.grad is None and p.requires_grad for p in agent.critic.parameters())


@pytest.mark.parametrize("log_sigma, rises", [(-3.0, True), (0.0, False)])
def test_temperature_rises_where_the_entropy_is_too_low(log_sigma, rises):
    agent = learner(learning_rate=1e-2)
    assert agent.target_entropy == -A and agent.log_alpha == 0
    head(agent.policy, [0.0, 0.0], log_sigma)
    entropy = agent.update_actor(batch(agent)[0])["values/entropy"]
    assert (entropy < -A) == rises
    torch.testing.assert_close(agent.log_alpha.grad, entropy + A)
    assert (agent.log_alpha > 0) == rises


class Bowl(torch.nn.Module):
    """Critics that like small actions."""

    def forward(self, s, a):
        return -10 * a.square().sum(-1, keepdim=True).expand(2, -1, -1)


def test_temperature_settles_at_the_entropy_asked_for():
    """And the policy then is the Boltzmann distribution of Q / α, nearly a normal around 0."""
    agent = learner(learning_rate=1e-2, batch_size=64)
    agent.critic = Bowl()
    for _ in range(600):
        metrics = agent.update_actor(batch(agent)[0])
    assert metrics["values/entropy"].item() == pytest.approx(-A, abs=0.3)
    a, _ = agent.policy(batch(agent)[0])
    assert a.var().item() == pytest.approx(metrics["values/alpha"].item() / 20, rel=0.3)


# -------------------------------------------------------------------------------------- Offline


def test_an_update_is_critics_actor_temperature_and_targets():
    agent = learner(tau=0.25)
    old = copies(agent.critic)
    before = copies(agent)
    metrics = agent.update()
    assert not any(torch.equal(one, other) for one, other in zip(before, copies(agent)))
    for target, was, new in zip(copies(agent.critic_target), old, copies(agent.critic)):
        torch.testing.assert_close(target, was + 0.25 * (new - was))
    wanted = {"losses/critic", "losses/actor", "values/q", "values/alpha", "values/entropy"}
    assert metrics.keys() == wanted
    assert all(value.isfinite() and value.shape == () for value in metrics.values())


def test_all_parts_of_an_update_see_one_batch(monkeypatch):
    agent, seen = learner(), []
    rows = [torch.full((16, width), float(k)) for k, width in enumerate((S, A, 1, S, 1))]
    monkeypatch.setattr(agent, "sample", lambda: rows)
    for name in ("update_critic", "update_actor", "update_targets"):
        monkeypatch.setattr(agent, name, lambda *x, name=name: seen.append((name, *x)) or {})
    agent.update()
    assert [name for name, *_ in seen] == ["update_critic", "update_actor", "update_targets"]
    assert [x[0, 0].item() for x in seen[0][1:]] == [0, 1, 2, 3, 4]
    assert [x[0, 0].item() for x in seen[1][1:]] == [0]  # the actor learns at s


def test_a_batch_is_whole_rows_of_all_the_data():
    n = 40
    ids = torch.arange(n, dtype=torch.float32)[:, None]
    rows = data(n, rewards=ids, terminals=ids, observations=ids.expand(n, S))
    agent = learner(rows | dict(next_observations=ids.expand(n, S), actions=ids.expand(n, A)))
    seen = set()
    for _ in range(50):
        columns = agent.sample()
        assert [x.shape for x in columns] == [(16, S), (16, A), (16, 1), (16, S), (16, 1)]
        assert all((x == columns[2]).all() for x in columns)
        seen |= set(columns[2][:, 0].tolist())
    assert seen == set(range(n))


def test_offline_nothing_is_collected():
    agent = learner()
    assert [agent.phase(step) for step in (1, 2, 5001)] == [agent.update] * 3
    assert agent.collector is None and agent.size == 64
    assert all(isinstance(value, torch.Tensor) for value in agent.state_dict().values())


def test_validation_is_the_critics_loss_and_q_of_the_policys_actions():
    agent, held_out = learner(), data(30)
    constant_critic(agent.critic, 7, 9)
    constant_critic(agent.critic_target, 0, 0)
    agent.log_alpha.data.fill_(-math.inf)
    before = copies(agent)
    with torch.no_grad():
        found = agent.validate(held_out)
    assert found.keys() == {"critic", "q"} and found["q"] == 8
    r = held_out["rewards"]
    torch.testing.assert_close(found["critic"], ((7 - r).square() + (9 - r).square()).mean())
    assert equal(copies(agent), before)


def test_offline_q_runs_away_where_nothing_corrects_it():
    """Random data, all rewards 0, no terminals: every value above 0 is made up."""
    rows = data(rewards=torch.zeros(64, 1), terminals=torch.zeros(64, 1))
    agent = learner(rows, learning_rate=3e-3, tau=0.1, hidden_dim=32)
    for _ in range(1000):
        q = agent.update()["values/q"]
    assert q > 5, q


# --------------------------------------------------------------------------------------- Online


class Counting(gym.Env):
    """Sees its step, its episode and their product; every other episode ends at its third step,
    the others are cut at their fourth. Its observations are one array, again and again."""

    observation_space = gym.spaces.Box(-99, 99, (3,), np.float64)
    action_space = gym.spaces.Box(np.float32([-2, -1]), np.float32([2, 3]))
    episode, seeds = -1, []  # the episode 0 is make_env's, that tries it

    def see(self):
        self.seen[:] = self.t, self.episode, self.t * self.episode
        return self.seen, {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.t, self.episode, self.seen = 0, self.episode + 1, np.zeros(3)
        return self.see()

    def step(self, action):
        assert action.dtype == np.float32 and self.action_space.contains(action), action
        self.t += 1
        ends = self.t == 3 and self.episode % 2 == 0
        return self.see()[0], 100 * self.t + action @ [1, 10], ends, ends and self.cut, {}

    cut = False


@pytest.fixture
def counting():
    gym.register("Counting-v0", Counting, max_episode_steps=4, disable_env_checker=True)
    Counting.seeds = []
    yield "Counting-v0"
    gym.registry.pop("Counting-v0")


def online(env_id, **flags):
    """The learner of an online run, as the training loop makes it."""
    sizes = dict(offline=False, env_id=env_id, steps=30, random_steps=12, run_dir="run")
    args = sac.Args(**tiny("sac", **sizes | flags))
    arrays, task = sac.empty_buffer(args)
    torch.manual_seed(args.seed)
    return sac.Learner({key: torch.as_tensor(x) for key, x in arrays.items()}, task, args)


def test_an_empty_buffer_is_a_data_set_of_zeros(counting, pendulum_file):
    arrays, task = sac.empty_buffer(sac.Args(env_id=counting, steps=7))
    offline, of_file = sac.load_dataset(str(pendulum_file))
    assert arrays.keys() == offline.keys() and task.keys() == of_file.keys()
    for key, array in arrays.items():
        assert array.dtype == offline[key].dtype and array.ndim == offline[key].ndim, key
        assert len(array) == 7 and array.any() == (key == "recorded")
    assert arrays["observations"].shape == arrays["next_observations"].shape == (7, 3)
    assert arrays["actions"].shape == (7, 2)
    assert task["sizes"] == [3, 2] and task["bounds"] == [[-2, -1], [2, 3]]
    assert task["env"] == task["env_id"] == counting and task["scores"] is None
    hopper = sac.empty_buffer(sac.Args(env_id="Hopper-v5", steps=1))[1]
    assert hopper["scores"] == sac.SCORES["Hopper"] and hopper["env_id"] == "Hopper-v5"


def test_what_is_collected(counting, elsewhere):
    agent = online(counting)
    for step in range(1, 31):
        agent.phase(step)
        assert agent.size == step
    s, a, r, s_next, d = agent.data
    timeouts = agent.collector.columns["timeouts"]
    t, episode = s[:, 0], s[:, 1]
    assert t.tolist() == ([0, 1, 2, 3, 0, 1, 2] * 5)[:30]  # cut after four, ended after three
    assert episode.tolist() == sum(([2 * k + 1] * 4 + [2 * k + 2] * 3 for k in range(5)), [])[:30]
    assert torch.equal(s[:, 2], t * episode)
    assert torch.equal(s_next[:, 0], t + 1) and torch.equal(s_next[:, 1], episode)
    assert torch.equal(d[:, 0], ((t == 2) & (episode % 2 == 0)).float())
    assert torch.equal(timeouts[:, 0], ((t == 3) & (episode % 2 == 1)).float())
    done = LOW + (a + 1) / 2 * (HIGH - LOW)  # what the environment was given
    assert a.abs().max() <= 1 and (a[:, 0] != a[:, 1]).all()
    torch.testing.assert_close(r[:, 0], 100 * (t + 1) + done @ torch.tensor([1.0, 10.0]))
    assert Counting.seeds == [0, 0] + [None] * (len(Counting.seeds) - 2)  # tried, then begun


def test_a_terminal_at_the_time_limit_is_no_timeout(counting, elsewhere, monkeypatch):
    monkeypatch.setattr(Counting, "cut", True)
    agent = online(counting)
    for step in range(1, 15):
        agent.phase(step)
    assert (
        agent.data[4].sum() == 2 and not (agent.data[4] * agent.collector.columns["timeouts"]).any()
    )


def test_first_random_actions_then_samples_of_the_policy(counting, elsewhere):
    agent = online(counting, steps=900, random_steps=300)
    head(agent.policy, torch.tensor([0.5, -0.5]).atanh(), -4.5)  # hardly any spread
    for step in range(1, 601):
        agent.phase(step)
    head(agent.policy, torch.tensor([0.5, -0.5]).atanh(), -0.5)
    for step in range(601, 901):
        agent.phase(step)
    first, second, third = agent.data[1].split(300)
    torch.testing.assert_close(first.mean(0), torch.zeros(2), atol=0.15, rtol=0)
    torch.testing.assert_close(first.std(0), torch.full((2,), 3**-0.5), atol=0.05, rtol=0)
    assert first.min() < -0.95 and first.max() > 0.95 and first.abs().max() <= 1
    torch.testing.assert_close(second, torch.tensor([0.5, -0.5]).expand(300, 2), atol=0.05, rtol=0)
    assert second.std() > 0.001 and (third.std(0) > 0.2).all()  # samples, no means


def test_random_actions_first_then_learning(counting, elsewhere):
    agent = online(counting, random_steps=3)
    before = copies(agent)
    for step in (1, 2, 3):
        update = agent.phase(step)
        assert update == agent.wait and update() == {}
    assert equal(copies(agent), before)
    assert agent.phase(4) == agent.update and agent.update()["losses/critic"] > 0


def test_batches_hold_no_rows_that_are_still_empty(counting, elsewhere):
    agent = online(counting, steps=1000)
    for step in range(1, 11):
        agent.phase(step)
    seen = set()
    for _ in range(40):
        s, _, r, _, _ = agent.sample()
        seen |= set(zip(s[:, 0].tolist(), s[:, 1].tolist()))
        assert (r > 50).all()  # an empty row has reward 0
    assert len(seen) == 10


def run(**flags):
    defaults = dict(offline=False, steps=25, random_steps=5, snapshot_every=10, run_dir="run")
    return sac.train(sac.Args(**tiny("sac", **defaults | flags)))


def snapshots(folder="run") -> list[str]:
    return sorted(os.listdir(f"{folder}/policies"))


def saved(folder="run") -> dict:
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


def policy_in(checkpoint: dict) -> dict:
    found = {k[7:]: v for k, v in checkpoint["learner"].items() if k.startswith("policy.")}
    assert "net.0.weight" in found
    return found


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and equal(one.values(), other.values())


@pytest.mark.parametrize("eval_every", [10, 7, 0])
def test_snapshots_and_replay_of_a_run(counting, elsewhere, eval_every):
    """Whatever the evaluations, the policies are those of their steps, the last is the end's."""
    run(env_id=counting, eval_every=eval_every)
    assert snapshots() == ["00000010.pt", "00000020.pt", "00000025.pt"]
    for step in (10, 20, 25):
        run(env_id=counting, steps=step, eval_every=0, run_dir=f"to{step}")
        kept = torch.load(f"run/policies/{step:08d}.pt", weights_only=True)
        assert same(kept, policy_in(saved(f"to{step}")))
    assert same(kept, policy_in(saved()))
    last = {step: torch.load(f"run/policies/{step:08d}.pt") for step in (10, 20, 25)}
    assert not same(last[10], last[20]) and not same(last[20], last[25])

    rows = saved()["learner"]["collector._extra_state"]
    with h5py.File("run/replay.hdf5") as file:
        assert file.attrs["env_id"] == counting
        assert {key: file[key].shape for key in file} == {
            "observations": (25, 3),
            "next_observations": (25, 3),
            "actions": (25, 2),
            **{key: (25,) for key in ("rewards", "terminals", "timeouts")},
        }
        assert all(file[key].dtype == np.float32 for key in file)
        for key in file:
            wanted = rows[key].reshape(file[key].shape)
            if key == "actions":
                wanted = LOW + (wanted + 1) / 2 * (HIGH - LOW)
            np.testing.assert_allclose(file[key][:], wanted, rtol=1e-5, atol=1e-5)
    data, task = sac.load_dataset("run/replay.hdf5")  # and a data set can be made of it
    np.testing.assert_allclose(data["actions"], rows["actions"], atol=1e-5)
    assert task["bounds"] == [[-2, -1], [2, 3]] and data["recorded"].all()


def test_replay_is_written_with_each_snapshot(counting, elsewhere):
    agent = online(counting, snapshot_every=10)
    for step in range(1, 22):
        agent.phase(step)
        written = (step - 1) // 10 * 10  # the step after it begins with it
        assert os.path.exists("run/replay.hdf5") == (written > 0)
        if written:
            with h5py.File("run/replay.hdf5") as file:
                assert len(file["rewards"]) == written
    assert snapshots() == ["00000010.pt", "00000020.pt"]


def test_resume_goes_on_with_the_rows_and_a_new_episode(counting, elsewhere):
    run(env_id=counting, steps=23)  # t is 1 in row 22: its episode is cut
    first = saved()["learner"]["collector._extra_state"]
    assert not first["timeouts"][22] and {len(x) for x in first.values()} == {23}
    weights = copies_of(saved())
    Counting.seeds.clear()
    run(env_id=counting, steps=40, resume=True)
    rows = saved()["learner"]["collector._extra_state"]
    for key, column in first.items():
        column[22] = 1 if key == "timeouts" else column[22]
        assert torch.equal(rows[key][:23], column) and len(rows[key]) == 40
    assert rows["observations"][23, 0] == 0 and rows["observations"][24, 0] == 1
    assert 23 in Counting.seeds  # not the first episode again
    assert saved()["learner"]["size"] == 40 and not same(weights, copies_of(saved()))
    assert snapshots() == [f"{k:08d}.pt" for k in (10, 20, 23, 30, 40)]
    assert [row["step"] for row in saved()["history"]] == [10, 20, 23, 30, 40]


def copies_of(checkpoint: dict) -> dict:
    return {key: x for key, x in checkpoint["learner"].items() if isinstance(x, torch.Tensor)}


def test_resume_after_a_terminal_is_no_timeout(counting, elsewhere):
    run(env_id=counting, steps=21)  # row 20 ends an episode
    assert saved()["learner"]["collector._extra_state"]["terminals"][20] == 1
    run(env_id=counting, steps=25, resume=True)
    assert saved()["learner"]["collector._extra_state"]["timeouts"][20] == 0


def test_a_resumed_learner_draws_and_samples_as_the_one_that_stopped(counting, elsewhere):
    agent = online(counting)
    for step in range(1, 21):
        agent.phase(step)()
    other = online(counting, steps=50)
    other.load_state_dict(agent.state_dict())
    torch.manual_seed(1)
    one = agent.sample()
    torch.manual_seed(1)
    assert equal(one, other.sample()) and other.size == 20
    other.phase(21)
    assert other.collector.columns["observations"][20, 0] == 0


def test_a_run_is_named_after_its_environment(counting, elsewhere):
    """All that a run writes is in one folder, also without --run-dir."""
    assert sac.Args().env_id == sac.Args().dataset == "Hopper-v5"
    assert sac.Args(env_id="Walker2d-v5").dataset == "Walker2d-v5"
    offline = sac.Args(offline=True)
    assert (offline.env_id, offline.dataset) == ("", "hopper-medium-replay")
    assert sac.Args(evaluate="run").env_id == ""  # the checkpoint knows
    run(env_id=counting, run_dir="", seed=3)
    folder = elsewhere / "runs" / "sac" / counting / "seed3"
    names = {path.name for path in folder.iterdir() if "tfevents" not in path.name}
    files = {"config.json", "eval.csv", "checkpoint.pt", "replay.hdf5", "policies"}
    assert names == files and [p.name for p in elsewhere.iterdir()] == ["runs"]
    [row] = sac.train(sac.Args(evaluate=str(folder), eval_episodes=2, device="cpu"))
    assert row["length_mean"] == 4


def test_a_trained_policy_acts(counting, elsewhere):
    run(env_id=counting)
    policy = sac.load_policy("run/checkpoint.pt")
    observation = np.ones(3)
    action = policy.act(observation)
    assert action.shape == (2,) and np.array_equal(action, policy.act(observation))
    assert not np.array_equal(action, policy.act(observation, deterministic=False))
    assert Counting.action_space.contains(action)


def test_an_environment_of_a_module(toy_env, elsewhere):
    [*_, row] = run(env_id=toy_env)
    assert row["return_mean"] == 5
    with h5py.File("run/replay.hdf5") as file:  # one action a row
        assert file.attrs["env_id"] == toy_env and file["actions"].shape == (25,)
        assert -1 <= file["actions"][:].min() < 0 and 2 < file["actions"][:].max() <= 3


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (dict(env_id="none"), "none"),
        (dict(env_id="NoSuch-v0"), "NoSuch"),
        (dict(env_id="CartPole-v1"), r"CartPole-v1.*Discrete"),
        (dict(env_id="Unbounded-v0"), "Unbounded-v0.*bounded"),
        (dict(env_id="Pendulum-v1", snapshot_every=0), "--snapshot-every must be 1"),
    ],
)
def test_refusals(flags, sentence, elsewhere):
    unbounded = type("Unbounded", (Counting,), {"action_space": gym.spaces.Box(-9, np.inf, (2,))})
    gym.register("Unbounded-v0", unbounded, max_episode_steps=4, disable_env_checker=True)
    try:
        with pytest.raises(SystemExit, match=sentence) as refusal:
            run(**flags)
    finally:
        gym.registry.pop("Unbounded-v0")
    assert "\n" not in str(refusal.value) and list(elsewhere.iterdir()) == []
