"""What gciql.py claims, each against an independent computation."""

import copy
import csv
import math
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import load, tiny, write_hdf5
from test_runs import Watch
from torch import distributions
from units import A, S, copies, data, equal, gradient_of, learner, task

gciql = load("gciql")
ALGOS = [dict(algo="gciql"), dict(algo="gciql", extraction="awr"), dict(algo="gcivl")]
ALGOS += [dict(algo="gcbc")]
every_algo = pytest.mark.parametrize("flags", ALGOS, ids=lambda x: "-".join(x.values()))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def episodes(*lengths, **columns) -> dict[str, torch.Tensor]:
    """Episodes whose states say which row they are, without terminals; numbered with gaps."""
    n, i = sum(lengths), torch.arange(sum(lengths))
    rows = dict(observations=i[:, None].float().expand(n, S).clone())
    rows |= dict(next_observations=rows["observations"] + 0.5, terminals=torch.zeros(n, 1))
    rows |= dict(episodes=3 * torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)))
    return data(n, **rows | columns)


def row_of(states) -> torch.Tensor:
    return states[..., 0].floor().long()


def batch_of(agent, n=None):
    """A batch of all rows, in order."""
    n = n or len(agent.data["s"])
    return agent.batch(agent.data, torch.arange(n))


# ------------------------------------------------------------------------------------ Networks


def by_hand(net, x, layer_norm):
    linear = [part for part in net if isinstance(part, torch.nn.Linear)]
    for part in linear[:-1]:
        x = F.gelu(x @ part.weight.T + part.bias, approximate="tanh")
        if layer_norm:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0)).sqrt()
    return x @ linear[-1].weight.T + linear[-1].bias


@pytest.mark.parametrize("layers", [1, 3])
def test_networks_are_ogbenchs(layers):
    """GELU, then LayerNorm in V and Q and not in π; uniform weights of variance 2 / (in + out)."""
    agent = learner(gciql, hidden_layers=layers, hidden_dim=64)
    s, g, a = 3 * torch.randn(9, S), torch.randn(9, S), torch.randn(9, A)
    torch.testing.assert_close(
        agent.policy(s, g), by_hand(agent.policy.net, torch.cat([s, g], 1), False)
    )
    for values, inputs, members in ((agent.v, (s, g), 1), (agent.critic, (s, a, g), 2)):
        found = values(*inputs)
        assert found.shape == (members, 9, 1)
        for i, net in enumerate(values.nets):
            wanted = by_hand(net, torch.cat(inputs, 1), True)
            torch.testing.assert_close(found[i], wanted, atol=1e-4, rtol=1e-4)
    q = agent.critic(s, a, g)
    assert not torch.allclose(q[0], q[1])
    norms = {part for part in agent.v.nets[0] if isinstance(part, torch.nn.LayerNorm)}
    assert len(norms) == layers  # each layer has its own
    linear = [part for part in agent.policy.net if isinstance(part, torch.nn.Linear)]
    assert [part.out_features for part in linear] == [64] * layers + [A]
    bounds = [(6 / sum(part.weight.shape)) ** 0.5 for part in linear]
    bounds[-1] *= 0.1
    for part, bound in zip(linear, bounds):
        assert 0.9 * bound < part.weight.abs().max() <= bound and not part.bias.any()


def test_log_density_is_that_of_a_unit_normal():
    policy = learner(gciql).policy
    s, g, a = torch.randn(32, S), torch.randn(32, S), 2 * torch.rand(32, A) - 1
    normal = distributions.Independent(distributions.Normal(policy(s, g), torch.ones(A)), 1)
    torch.testing.assert_close(policy.log_prob(s, g, a), normal.log_prob(a)[:, None])


@pytest.mark.parametrize("normalize", [False, True])
def test_act_goes_to_the_goals_that_it_is_given(normalize):
    """Raw observations and goals, one goal for all or one each; NumPy in, NumPy out."""
    rows = data(observations=5 * torch.randn(64, S) + 9)
    policy = learner(gciql, rows, normalize=normalize, low=[-2.0, -1.0], high=[2.0, 3.0]).policy
    policy.net[-1].weight.data *= 30
    s, goals = 5 * torch.randn(7, S) + 9, 5 * torch.randn(7, S) + 9
    mean, std = rows["observations"].mean(0), rows["observations"].std(0, correction=0) + 1e-3
    scale = lambda x: (x - mean) / std if normalize else x  # noqa: E731
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])

    def wanted(s, g):
        a = policy(scale(s), scale(g)).detach()
        return (low + (a + 1) / 2 * (high - low)).clamp(low, high)

    torch.testing.assert_close(policy.act(s, goals), wanted(s, goals))
    assert not torch.allclose(policy.act(s, goals), policy.act(s, goals.flip(0)))
    torch.testing.assert_close(policy.act(s, goals[0]), wanted(s, goals[:1].expand(7, S)))
    one = policy.act(s[0].double().numpy(), goals[0].double().numpy())
    assert isinstance(one, np.ndarray) and one.shape == (A,)
    np.testing.assert_allclose(one, wanted(s[:1], goals[:1])[0], rtol=1e-4, atol=1e-5)
    a = policy.act(1000 * s, goals)
    assert (a >= low).all() and (a <= high).all() and (a == high).any()


def test_nobody_names_a_goal_it_is_where_the_best_episode_ended():
    to_go = torch.tensor([1.0, 50, 0, 7, 3, -2])[:, None]  # returns 1, 7, -2: the second is best
    rows = episodes(3, 2, 1, returns_to_go=to_go)
    policy = learner(gciql, rows, normalize=True).policy
    assert torch.equal(policy.goal, rows["observations"][4])
    s = torch.randn(5, S)
    assert torch.equal(policy.act(s), policy.act(s, rows["observations"][4]))
    again = gciql.Policy(task(rows), gciql.Args(**tiny("gciql")))
    again.load_state_dict(policy.state_dict())  # what --evaluate has
    assert torch.equal(again.act(s), policy.act(s))


# ------------------------------------------------------------------------------------- The goals


def test_an_episode_ends_at_its_last_row():
    agent = learner(gciql, episodes(3, 1, 5, 2))
    assert agent.data["last"].tolist() == [2] * 3 + [3] + [8] * 5 + [10] * 2
    apart = learner(gciql, data(6, episodes=torch.tensor([2, 2, 5, 9, 9, 9])))
    assert apart.data["last"].tolist() == [1, 1, 2, 5, 5, 5]


def ogbench_goals(i, last, n, shares, gamma, geometric, draws, rng):
    """The published sampler: a mixture of mixtures, in NumPy."""
    if geometric:
        later = np.minimum(i + rng.geometric(1 - gamma, draws), last)
    else:
        share = rng.random(draws)
        later = np.round(min(i + 1, last) * share + last * (1 - share)).astype(int)
    current, future, _ = shares
    anywhere = rng.integers(n, size=draws)
    goals = np.where(rng.random(draws) < future / (1 - current), later, anywhere)
    return np.where(rng.random(draws) < current, i, goals)


@pytest.mark.parametrize("geometric", [True, False])
@pytest.mark.parametrize("shares", [(0.2, 0.5, 0.3), (0.0, 1.0, 0.0), (0.0, 0.5, 0.5)])
def test_goals_are_drawn_as_ogbench_draws_them(shares, geometric):
    """The same frequencies of all rows, from the first row, a middle one and the last of an
    episode; in its second half the episodes differ in what can follow."""
    agent = learner(gciql, episodes(6, 9), gamma=0.7)
    draws, rng = 40_000, np.random.default_rng(0)
    for i, last in ((0, 5), (8, 14), (13, 14), (14, 14)):
        rows = torch.full((draws,), i)
        found = agent.draw_goals(agent.data, rows, shares, geometric).bincount(minlength=15)
        wanted = ogbench_goals(i, last, 15, shares, 0.7, geometric, draws, rng)
        wanted = np.bincount(wanted, minlength=15)
        assert len(found) == 15
        np.testing.assert_allclose(found / draws, wanted / draws, atol=0.015)
        assert ((found > 0).numpy() == (wanted > 0)).all()


def test_future_goals_lie_one_over_one_minus_gamma_ahead():
    agent = learner(gciql, episodes(5000, 7), gamma=0.98)
    offset = agent.draw_goals(agent.data, torch.full((20_000,), 9), (0, 1, 0), True) - 9
    assert offset.min() == 1 and offset.float().mean().item() == pytest.approx(50, rel=0.03)
    assert offset.float().std().item() == pytest.approx(0.98**0.5 * 50, rel=0.05)
    offset = agent.draw_goals(agent.data, torch.full((20_000,), 4990), (0, 1, 0), True) - 4990
    assert offset.max() == 9  # cut at the episode's end
    assert (offset == 9).float().mean().item() == pytest.approx(0.98**8, abs=0.02)


def test_both_kinds_of_goals_have_their_own_shares():
    agent = learner(gciql, episodes(8, 8), value_goals=(1, 0, 0), actor_goals=(0, 1, 0))
    x = batch_of(agent)
    assert torch.equal(x["g"], x["s"]) and torch.equal(row_of(x["s"]), torch.arange(16))
    i, g = row_of(x["s"]), row_of(x["g_pi"])
    assert ((g > i) | (i % 8 == 7)).all() and (g // 8 == i // 8).all()
    agent = learner(
        gciql, episodes(400, 400), value_goals=(0, 1, 0), actor_goals=(0, 0, 1), gamma=0.5
    )
    x = batch_of(agent)
    assert (row_of(x["g"]) - row_of(x["s"])).float().mean() < 3  # geometric
    assert (row_of(x["g_pi"]) < row_of(x["s"])).any()
    agent = learner(gciql, episodes(400, 400), actor_goals=(0, 1, 0), gamma=0.5)
    x = batch_of(agent)
    assert (row_of(x["g_pi"]) - row_of(x["s"])).float().mean() > 50  # uniform


# ----------------------------------------------------------------------------------- The targets


def walk(i, goal, last, n, gamma):
    """From row i towards row `goal`, step by step: the rewards' sum, γ^k or 0 behind the goal, and
    how many steps were made."""
    total, k = 0.0, 0
    while k < n and i + k <= last and i + k != goal:
        total, k = total - gamma**k, k + 1
    there = k < n and i + k <= last
    return total, 0.0 if there else gamma**k, k


@pytest.mark.parametrize("n_step", [1, 3, 10])
def test_targets_are_a_walk_along_the_data(n_step):
    """Every pair of a row and a goal, in two episodes: in the first the goal lies before or behind,
    at an end or in the other episode."""
    agent = learner(gciql, episodes(6, 5), n_step=n_step, gamma=0.9)
    last = agent.data["last"]
    for i in range(11):
        goals = torch.arange(11)
        agent.draw_goals = lambda *_, goals=goals, **__: goals
        x = agent.batch(agent.data, torch.full((11,), i))
        for goal in range(11):
            r, m, k = walk(i, goal, int(last[i]), n_step, 0.9)
            assert x["r"][goal].item() == pytest.approx(r, abs=1e-5), (i, goal)
            assert x["m"][goal].item() == pytest.approx(m, abs=1e-6), (i, goal)
            end = i + max(k, 1) - 1
            assert x["s_k"][goal, 0] == end + 0.5 == x["s_pi"][goal, 0]
            assert x["r"].shape == x["m"].shape == x["d_k"].shape == (11, 1)
            assert (m == 0) == (i <= goal < min(i + n_step, int(last[i]) + 1))


def test_one_step_targets_are_ogbenchs():
    """Reward 0 and no bootstrap at the goal, by the row's number and not by the state's looks;
    elsewhere -1 and γ."""
    same = torch.zeros(24, S)
    agent = learner(gciql, episodes(8, 8, 8, observations=same), value_goals=(0.5, 0.0, 0.5))
    drawn = []
    real = agent.draw_goals
    agent.draw_goals = lambda *a, **k: drawn.append(real(*a, **k)) or drawn[-1]
    x = batch_of(agent)
    success = (drawn[0] == torch.arange(24))[:, None]
    assert 6 < success.sum() < 20
    torch.testing.assert_close(x["r"], success.float() - 1)
    torch.testing.assert_close(x["m"], 0.99 * (~success))


def test_rows_keep_their_parts_together():
    rows = data()
    agent, scaling = learner(gciql, rows, normalize=True, n_step=2), None
    scaling = agent.policy.scaling
    i = torch.randint(64, (50,))
    agent.draw_goals = lambda columns, i, shares, geometric: i - i % 4 + (3 if geometric else 0)
    x = agent.batch(agent.data, i)
    s, s_next = scaling.state(rows["observations"]), scaling.state(rows["next_observations"])
    torch.testing.assert_close(x["s"], s[i])
    torch.testing.assert_close(x["a"], rows["actions"][i])
    torch.testing.assert_close(x["g"], s[i - i % 4 + 3])
    torch.testing.assert_close(x["g_pi"], s[i - i % 4])
    goal, last = i - i % 4 + 3, i - i % 4 + 3
    end = (
        torch.tensor([int(min(b - a, 2, c + 1 - a) or 1) for a, b, c in zip(i, goal, last)]) + i - 1
    )
    torch.testing.assert_close(x["s_k"], s_next[end])
    torch.testing.assert_close(x["d_k"], rows["terminals"][end])
    torch.testing.assert_close(x["s_pi"], s_next[torch.minimum(i + 1, last) - (i % 4 == 0).long()])
    assert 0 < x["d_pi"].sum() < 50


# ------------------------------------------------------------------------------------ The losses


def made_up(n=40, **given):
    """A batch of random numbers, its goals not reached, nothing terminal."""
    x = {key: torch.randn(n, S) for key in ("s", "g", "g_pi", "s_k", "s_pi")}
    x |= dict(a=2 * torch.rand(n, A) - 1, r=-torch.rand(n, 1), m=torch.rand(n, 1))
    return x | dict(d_k=torch.zeros(n, 1), d_pi=torch.zeros(n, 1)) | given


def test_gcbc_is_the_likelihood_of_the_datas_actions():
    agent, x = learner(gciql, algo="gcbc"), made_up()
    losses, metrics = agent.losses(x)
    assert losses.keys() == {"actor"} and metrics == {}
    torch.testing.assert_close(
        losses["actor"], -agent.policy.log_prob(x["s"], x["g_pi"], x["a"]).mean()
    )
    assert agent.v is agent.critic is agent.copies is None


def test_value_loss_of_gcivl_by_hand():
    """Each V regresses on the target of its own copy; the side is decided by the smaller target and
    by the copies' mean."""
    agent, x = learner(gciql, algo="gcivl", expectile=0.8, gamma=0.9), made_up(60)
    x["d_k"][3] = 1.0
    now, then = torch.randn(2, 60, 1), 3 * torch.randn(2, 60, 1)
    agent.copies.forward = lambda s, g: now if s is x["s"] else then if s is x["s_k"] else None
    v = agent.v(x["s"], x["g"]).detach()
    loss = agent.losses(x)[0]["v"]
    total = 0.0
    for b in range(60):
        y = [x["r"][b] + x["m"][b] * (-10.0 if b == 3 else then[i, b]) for i in range(2)]
        good = min(y) > (now[0, b] + now[1, b]) / 2
        total += sum((0.8 if good else 0.2) * (y[i] - v[i, b]) ** 2 for i in range(2))
    assert loss.item() == pytest.approx(total.item() / 60, rel=1e-5)


def test_gcivl_clones_what_came_nearer():
    """Weights exp(α A) with A = V(s_k, g) - V(s, g), both V, at most 100."""
    agent = learner(gciql, algo="gcivl", awr_alpha=2.0, gamma=0.9)
    x = made_up(5)
    x["d_pi"][4] = 1.0
    v = torch.tensor([[0.0, 1, -2, 9, 3], [0, 2, -1, 9, 3]])[..., None]

    def values(s, g):
        if s is x["s_pi"] and g is x["g_pi"]:
            return v
        return (
            torch.ones(2, 5, 1)
            if g is x["g_pi"]
            else agent.v.nets[0](torch.cat([s, g], 1)).expand(2, 5, 1)
        )

    agent.v.forward = values
    losses, metrics = agent.losses(x)
    advantage = torch.tensor([-1.0, 0.5, -2.5, 8, -11])[:, None]
    torch.testing.assert_close(metrics["advantage/a"], advantage)
    assert metrics["advantage/clipped"] == 0.2
    weight = (2 * advantage).exp().clamp(max=100)
    log_prob = agent.policy.log_prob(x["s"], x["g_pi"], x["a"])
    torch.testing.assert_close(losses["actor"], -(weight * log_prob).mean())


@pytest.mark.parametrize("expectile", [0.5, 0.9])
def test_value_of_gciql_is_the_expectile_of_the_smaller_q(expectile):
    agent = learner(gciql, expectile=expectile)
    x = made_up(4000)
    q = torch.randn(4000, 1).exp()
    agent.copies.forward = lambda s, a, g: torch.stack([q + 1, q]) if g is x["g"] else None
    grid = torch.linspace(0, 5, 251)
    found = []
    for v in grid:
        agent.v.forward = lambda s, g, v=v: v.expand(1, 4000, 1)
        found.append(agent.losses(x)[0]["v"])
    balance = [
        expectile * (q - v).clamp(min=0).mean() - (1 - expectile) * (v - q).clamp(min=0).mean()
        for v in grid
    ]
    wanted = grid[torch.stack(balance).abs().argmin()].item()
    assert grid[torch.stack(found).argmin()].item() == pytest.approx(wanted, abs=0.03)
    assert wanted > q.mean() + 0.5 or expectile == 0.5


def test_critic_of_gciql_bootstraps_from_the_value():
    """y = r + m V(s_k, g), after a terminal the worst value there is; no copy, no policy in it."""
    agent, x = learner(gciql, gamma=0.9), made_up(6)
    x["d_k"][::2] = 1.0
    agent.copies.forward = lambda s, a, g: torch.full((2, 6, 1), 50.0)
    v, q = agent.v(x["s_k"], x["g"])[0].detach(), agent.critic(x["s"], x["a"], x["g"]).detach()
    y = x["r"] + x["m"] * torch.where(x["d_k"] > 0, -10.0, v)
    losses, metrics = agent.losses(x)
    wanted = ((q[0] - y) ** 2).mean() + ((q[1] - y) ** 2).mean()
    torch.testing.assert_close(losses["critic"], wanted)
    torch.testing.assert_close(metrics["values/q"], q.mean())
    torch.testing.assert_close(metrics["values/v"], agent.v(x["s"], x["g"]).mean())


def test_ddpgbc_climbs_the_smaller_q_near_the_data():
    agent, x = learner(gciql, bc_alpha=0.7), made_up(3)
    asked = {}

    def critic(s, a, g):
        if g is x["g_pi"]:
            asked["a"] = a
            return torch.stack([2 + 3 * a[:, :1], 40 + a[:, 1:]])
        return torch.zeros(2, 3, 1, requires_grad=True)

    agent.critic.forward = critic
    mean = torch.tensor([[0.5, 2.0], [-3, 0.1], [0.2, 0.3]], requires_grad=True)
    agent.policy.forward = lambda s, g: mean if s is x["s"] and g is x["g_pi"] else None
    losses, metrics = agent.losses(x)
    torch.testing.assert_close(asked["a"], mean.clamp(-1, 1))
    q = torch.tensor([3.5, -1.0, 2.6])
    wanted = -q.mean() / q.abs().mean()
    torch.testing.assert_close(metrics["losses/q"], wanted)
    bc = -agent.policy.log_prob(x["s"], x["g_pi"], x["a"]).mean()
    torch.testing.assert_close(metrics["losses/bc"], bc)
    torch.testing.assert_close(losses["actor"], wanted + 0.7 * bc)
    # The divisor is a constant: Q's slope 3 over its mean size and the batch.
    (slope,) = torch.autograd.grad(metrics["losses/q"], mean)
    wanted = torch.zeros(3, 2)
    wanted[[0, 2], 0] = -3 / (3 * q.abs().mean())  # the second mean is beyond the bounds
    torch.testing.assert_close(slope, wanted)


def test_awr_of_gciql_weighs_by_q_less_v():
    agent, x = learner(gciql, extraction="awr", awr_alpha=3.0), made_up()
    x["g_pi"] = 5 * x["g_pi"]
    losses, metrics = agent.losses(x)
    q, v = agent.critic(x["s"], x["a"], x["g_pi"]), agent.v(x["s"], x["g_pi"])[0]
    advantage = torch.minimum(q[0], q[1]) - v
    weight = (3 * advantage).exp().clamp(max=100)
    wanted = -(weight * agent.policy.log_prob(x["s"], x["g_pi"], x["a"])).mean()
    torch.testing.assert_close(metrics["advantage/a"], advantage)
    torch.testing.assert_close(losses["actor"], wanted)
    assert advantage.std() > 0.05


def networks(agent):
    nets = {"actor": agent.policy, "v": agent.v, "critic": agent.critic}
    return {name: net for name, net in nets.items() if net is not None}


@every_algo
def test_each_loss_reaches_its_own_network_alone(flags):
    agent = learner(gciql, **flags)
    nets = networks(agent)
    losses, _ = agent.losses(batch_of(agent))
    assert losses.keys() == nets.keys()
    for name, loss in losses.items():
        agent.zero_grad()
        loss.backward(retain_graph=True)
        for other, net in nets.items():
            found = [p.grad is not None and bool(p.grad.any()) for p in net.parameters()]
            assert all(found) if other == name else not any(found), (name, other)
        for parameter in agent.copies.parameters() if agent.copies else ():
            assert parameter.grad is None


# -------------------------------------------------------------------------------------- The step


@every_algo
def test_step_is_that_of_several_optimisers(flags):
    """Each network moves by its own loss alone, all from where the step began; the copies move
    towards the weights that the followed network had before."""
    agent = learner(gciql, learning_rate=1e-2, tau=0.1, **flags)
    for parameter in agent.copies.parameters() if agent.copies else ():
        parameter.data += 0.1 * torch.randn_like(parameter)
    alone = copy.deepcopy(agent)
    torch.manual_seed(1)
    metrics = agent.update()
    torch.manual_seed(1)
    losses, _ = alone.losses(alone.batch(alone.data, torch.randint(64, (16,))))
    before = copies(alone.critic or alone.v) if alone.copies else []
    for name, net in networks(alone).items():
        torch.testing.assert_close(metrics[f"losses/{name}"], losses[name])
        parameters = list(net.parameters())
        found = torch.autograd.grad(losses[name], parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, found):
            parameter.grad = gradient
    for net, moved in zip(networks(alone).values(), networks(agent).values()):
        torch.optim.Adam(net.parameters(), lr=1e-2).step()
        torch.testing.assert_close(copies(moved), copies(net))
    if agent.copies:
        wanted = [0.9 * old + 0.1 * new for old, new in zip(copies(alone.copies), before)]
        torch.testing.assert_close(copies(agent.copies), wanted)


@every_algo
def test_copies_begin_equal_and_follow_by_tau(flags):
    agent = learner(gciql, tau=0.1, **flags)
    followed = {"gciql": agent.critic, "gcivl": agent.v, "gcbc": None}[flags["algo"]]
    agent.update_copies()
    if followed is None:
        return
    assert equal(copies(agent.copies), copies(followed))
    for parameter in followed.parameters():
        parameter.data += torch.randn_like(parameter)
    before, online = copies(agent.copies), copies(followed)
    agent.update_copies()
    wanted = [old + 0.1 * (new - old) for old, new in zip(before, online)]
    torch.testing.assert_close(copies(agent.copies), wanted)
    assert equal(copies(followed), online)


@every_algo
def test_one_call_is_one_step_that_never_synchronises(flags):
    agent = learner(gciql, **flags)
    assert [agent.phase(step) for step in (1, 2, 1000)] == 3 * [agent.update]
    agent.update()
    assert {int(state["step"]) for state in agent.optimizer.state.values()} == {1}
    with Watch() as watch:
        metrics = agent.update()
    assert watch.seen == set() and all(isinstance(x, torch.Tensor) for x in metrics.values())


def test_batches_come_from_all_rows():
    agent, seen = learner(gciql, episodes(30, 34)), set()
    real = agent.batch
    agent.batch = lambda columns, i: seen.update(i.tolist()) or real(columns, i)
    for _ in range(40):
        agent.update()
    assert seen == set(range(64))


def test_validation_is_the_losses_of_held_out_rows():
    agent, held_out = learner(gciql, normalize=True), data(24)
    torch.manual_seed(3)
    found = agent.validate(held_out)
    torch.manual_seed(3)
    x = agent.batch(agent.columns(held_out), torch.arange(24))
    wanted, _ = agent.losses(x)
    assert found.keys() == {"v", "critic", "actor", "mse"}
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)
    scaling = agent.policy.scaling
    torch.testing.assert_close(x["s"], scaling.state(held_out["observations"]))
    mse = ((agent.policy(x["s"], x["g_pi"]) - held_out["actions"]) ** 2).mean()
    torch.testing.assert_close(found["mse"], mse)


def test_gradient_of_the_policy_is_that_of_its_loss():
    """Weights are constants: nothing reaches the policy through the advantage."""
    agent, x = learner(gciql, algo="gcivl"), made_up()
    losses, metrics = agent.losses(x)
    weight = (10 * metrics["advantage/a"]).exp().clamp(max=100)
    wanted = -(weight * agent.policy.log_prob(x["s"], x["g_pi"], x["a"])).mean()
    torch.testing.assert_close(
        gradient_of(losses["actor"], agent.policy), gradient_of(wanted, agent.policy)
    )


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(expectile=1.0), "--expectile 1.0.*between 0 and 1"),
        (dict(gamma=1.0), "--gamma 1.0.*between 0 and 1"),
        (dict(n_step=0), "--n-step"),
        (dict(hidden_layers=0), "--hidden-layers"),
        (dict(value_goals=(0.2, 0.5, 0.2)), "--value-goals.*sum is 1"),
        (dict(actor_goals=(-0.5, 1.0, 0.5)), "--actor-goals.*sum is 1"),
    ],
)
def test_refuses_in_a_sentence(flags, said):
    with pytest.raises(SystemExit, match=said):
        learner(gciql, **flags)


# --------------------------------------------------------------------------------- The evaluation

LINE = """
import gymnasium as gym, numpy as np
class Line(gym.Env):
    observation_space = gym.spaces.Box(-9, 9, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    task_infos, ends = [{"start": 2}, {"start": 0}, {"start": -2}], True
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        start = self.task_infos[options["task_id"] - 1 if options else 0]["start"]
        self.x = np.array([start, np.random.rand()])
        self.goal = np.array([3.0, self.action_space.sample()[0] ** 2])
        return self.x.copy(), {"goal": self.goal}
    def step(self, a):
        assert self.action_space.contains(a)
        self.x[0] += float(a[0])
        success = float(abs(self.x[0] - self.goal[0]) < 0.6)
        return self.x.copy(), 0.5 * success, self.ends and success > 0, False, {"success": success}
gym.register("Line-v0", entry_point="line:Line", max_episode_steps=4)
"""


@pytest.fixture
def line_env(tmp_path, monkeypatch):
    """Three tasks on a line, whose starts and goals are drawn as OGBench draws them."""
    (tmp_path / "line.py").write_text(LINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "line:Line-v0"
    gym.registry.pop("Line-v0", None)
    sys.modules.pop("line", None)


class Walker:
    """Steps of 1 towards the goal, and a log of what it was told."""

    goal = torch.tensor([7.0, 7.0])

    def __init__(self):
        self.seen = []

    def act(self, observations, goals):
        self.seen.append((observations.copy(), goals.copy()))
        return np.sign(goals[:, :1] - observations[:, :1]).astype(np.float32)


def test_evaluation_counts_successes_by_task(line_env):
    """From -2 four steps do not reach 3, from 0 three do, from 2 one does."""
    given = task() | dict(env=line_env, env_id="Line-v0", sizes=[2, 1], scores=[0.0, 50.0])
    walker = Walker()
    row = gciql.evaluate(walker, given, episodes=2, seed=5)
    assert list(row)[:4] == ["return_mean", "return_std", "length_mean", "score"]
    assert [row[f"success_task{i}"] for i in (1, 2, 3)] == [1, 1, 0]
    assert row["success"] == pytest.approx(2 / 3) and row["score"] == pytest.approx(200 / 3)
    assert row["return_mean"] == pytest.approx(1 / 3)
    assert row["length_mean"] == pytest.approx((4 + 3 + 1) / 3)
    first, goals = walker.seen[0]
    assert first[:, 0].tolist() == [2, 2, 0, 0, -2, -2] and (goals[:, 0] == 3).all()
    assert len(np.unique(goals[:, 1])) == len(np.unique(first[:, 1])) == 6
    last, goals_then = walker.seen[3]  # each keeps its own goal when others have ended
    assert len(last) == 2 and (goals_then == goals[4:]).all()
    again = Walker()
    assert gciql.evaluate(again, given, episodes=2, seed=5) == row
    assert (again.seen[0][0] == first).all() and (again.seen[0][1] == goals).all()
    other = Walker()
    gciql.evaluate(other, given, episodes=2, seed=50)
    assert not (other.seen[0][0] == first).all() and not (other.seen[0][1] == goals).all()


def test_to_pass_the_goal_is_no_success(line_env):
    """The last step counts, as in OGBench, where an environment does not end at the goal."""
    given = task() | dict(env=line_env, env_id="Line-v0", sizes=[2, 1], scores=None)
    gciql.make_env(given).unwrapped.__class__.ends = False
    walker = Walker()
    walker.act = lambda observations, goals: np.ones((len(observations), 1), np.float32)
    row = gciql.evaluate(walker, given, episodes=1, seed=0)
    assert row["length_mean"] == 4 and row["success"] == 0
    assert row["return_mean"] == pytest.approx(1 / 3)  # two of three tasks passed it


def test_without_goals_of_its_own_an_environment_gets_the_policys():
    walker = Walker()
    given = task() | dict(env="Pendulum-v1", sizes=[3, 1], scores=[-2000.0, 0.0])
    walker.goal = torch.tensor([1.0, 0.5, 0.0])
    row = gciql.evaluate(walker, given, episodes=2, seed=0)
    assert list(row) == ["return_mean", "return_std", "length_mean", "score"]
    assert row["length_mean"] == 200
    assert row["score"] == pytest.approx((row["return_mean"] + 2000) / 20)
    assert all((goals == [1.0, 0.5, 0.0]).all() for _, goals in walker.seen)
    nobody_knows = gciql.evaluate(walker, given | dict(scores=None), episodes=1, seed=0)
    assert math.isnan(nobody_knows["score"])


@every_algo
def test_a_run_learns_to_come_to_the_goal(flags, line_env, tmp_path):
    """On the line, from random walks; what it writes has each task's success."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (200, 5, 1))
    x = np.concatenate([rng.uniform(-3, 3, (200, 1, 1)), a], axis=1).cumsum(1)
    s = np.concatenate([x, rng.random(x.shape)], axis=2)
    arrays = dict(observations=s[:, :-1].reshape(-1, 2), next_observations=s[:, 1:].reshape(-1, 2))
    arrays |= dict(actions=a.reshape(-1, 1), rewards=np.zeros(1000), terminals=np.zeros(1000))
    arrays |= dict(timeouts=np.arange(1000) % 5 == 4)
    path = write_hdf5(tmp_path / "line.hdf5", arrays, env_id=line_env)
    sizes = dict(steps=600, eval_every=300, batch_size=64, hidden_dim=32, learning_rate=3e-3)
    sizes |= dict(
        bc_alpha=0.1, gamma=0.8, tau=0.05, dataset=str(path), run_dir=str(tmp_path / "run")
    )
    args = gciql.Args(**tiny("gciql", **sizes, **flags))
    history = gciql.train(args)
    with open(tmp_path / "run" / "eval.csv") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(history, table, strict=True):
        assert {key: float(value) for key, value in line.items()} == row
        tasks = [row[f"success_task{i}"] for i in (1, 2, 3)]
        assert row["score"] == pytest.approx(100 * row["success"])
        assert row["success"] == pytest.approx(np.mean(tasks))
    assert history[-1]["success_task1"] == 1
    resumed = gciql.Args(**vars(args) | dict(steps=610, resume=True))
    assert gciql.train(resumed)[-1]["step"] == 610


@pytest.mark.parametrize("flags", [dict(algo="gcivl"), dict(algo="gciql")], ids=["gcivl", "gciql"])
@pytest.mark.parametrize("n_step", [1, 3])
def test_episodes_are_stitched(flags, n_step):
    """One episode walks from 0 to 8, another from 8 to 16: the value of 16 seen from 0 is that of
    16 steps, though no episode went there.."""
    s = torch.arange(8.0)[:, None]
    path = torch.cat([s, s + 8, s[:1] + 16]) / 8 - 1  # three episodes, the last to have 16 as state
    rows = episodes(8, 8, 1, observations=path.expand(17, S).clone())
    rows |= dict(next_observations=(path + 1 / 8).expand(17, S).clone())
    rows |= dict(actions=torch.zeros(17, A))
    sizes = dict(hidden_dim=64, batch_size=128, learning_rate=2e-3, tau=0.05, gamma=0.9)
    agent = learner(gciql, rows, n_step=n_step, expectile=0.7, **sizes, **flags)
    for _ in range(900):
        agent.update()
    x, g = agent.data["s"], agent.data["s"]
    with torch.no_grad():
        for i, j in ((0, 16), (0, 7), (3, 9), (8, 16), (5, 5)):
            v = agent.v(x[i : i + 1], g[j : j + 1]).mean().item()
            assert v == pytest.approx(-(1 - 0.9 ** (j - i)) / 0.1, abs=0.9), (i, j)
