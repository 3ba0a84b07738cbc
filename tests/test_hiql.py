"""What hiql.py claims, each against an independent computation."""

import copy
import csv
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load, tiny, write_hdf5
from test_gciql import LINE, by_hand, episodes, ogbench_goals, row_of, walk
from test_runs import Watch
from torch import distributions
from units import A, S, copies, data, equal, gradient_of, learner, task

hiql = load("hiql")
Z = hiql.Args.rep_dim


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def linear_layers(net) -> list[torch.nn.Linear]:
    return [part for part in net if isinstance(part, torch.nn.Linear)]


def networks(agent) -> dict[str, torch.nn.Module]:
    """By the name of its loss."""
    return {"v": agent.v, "high": agent.policy.high_net, "low": agent.policy.low_net}


# ------------------------------------------------------------------------------------ Networks


@pytest.mark.parametrize("layers", [1, 3])
def test_networks_are_ogbenchs(layers):
    """GELU, then LayerNorm in V and φ and not in the policies; V has s and a φ of length √Z."""
    agent = learner(hiql, hidden_layers=layers, hidden_dim=64, rep_dim=6)
    policy, v = agent.policy, agent.v
    s, g, z = 3 * torch.randn(9, S), torch.randn(9, S), torch.randn(9, 6)
    s_and_g, close = torch.cat([s, g], 1), dict(atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(policy.high(s, g), by_hand(policy.high_net, s_and_g, False))
    low = by_hand(policy.low_net, torch.cat([s, z], 1), False)
    torch.testing.assert_close(policy.low(s, z), low)
    phi = by_hand(v.phi_net, s_and_g, True)
    phi = phi * (6 / (phi**2).sum(1, keepdim=True)).sqrt()
    torch.testing.assert_close(v.phi(s, g), phi, **close)
    found = v(s, g)
    assert found.shape == (2, 9, 1) and policy.high(s, g).shape == (9, 6)
    assert policy.low(s, z).shape == (9, A)
    for one, net in zip(found, v.nets, strict=True):
        torch.testing.assert_close(one, by_hand(net, torch.cat([s, phi], 1), True), **close)
    assert not torch.allclose(found[0], found[1])  # the heads differ


def test_each_layer_has_a_layer_norm_of_its_own():
    agent = learner(hiql, hidden_layers=3)
    nets = [agent.v.phi_net, *agent.v.nets]
    norms = [part for net in nets for part in net if isinstance(part, torch.nn.LayerNorm)]
    assert len({id(part.weight) for part in norms}) == len(norms) == 9
    assert all(part.eps == 1e-6 for part in norms)  # Flax's


def test_weights_begin_as_ogbenchs():
    """Uniform, of variance 2 / (in + out), biases 0; both policies' last layers at a tenth."""
    agent = learner(hiql, hidden_layers=3, hidden_dim=64)
    policy, v, wide = agent.policy, agent.v, [64] * 3
    shapes = [(policy.high_net, 2 * S, Z, 0.1), (policy.low_net, S + Z, A, 0.1)]
    shapes += [(v.phi_net, 2 * S, Z, 1.0), (v.nets[0], S + Z, 1, 1.0), (v.nets[1], S + Z, 1, 1.0)]
    for net, into, out, last in shapes:
        layers = linear_layers(net)
        assert [part.in_features for part in layers] == [into, *wide]
        assert [part.out_features for part in layers] == [*wide, out]
        for part in layers:
            bound = (6 / (part.in_features + part.out_features)) ** 0.5
            bound *= last if part is layers[-1] else 1
            assert 0.9 * bound < part.weight.abs().max() <= bound and not part.bias.any()
            if part.weight.numel() > 500:  # uniform, all the way
                assert part.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


@pytest.mark.parametrize("size", [1, 4, 10])
def test_subgoals_have_one_length(size):
    """√Z, whatever is asked, and the direction stays."""
    agent = learner(hiql, rep_dim=size)
    for scale in (1e-3, 1, 1e3):
        phi = agent.v.phi(scale * torch.randn(20, S), scale * torch.randn(20, S))
        torch.testing.assert_close(phi.square().sum(1), torch.full((20,), float(size)))
    z = 1e-4 * torch.randn(20, size)
    found = hiql.on_sphere(z)
    torch.testing.assert_close(found.norm(dim=1), torch.full((20,), size**0.5))
    assert ((found * z).sum(1) > 0.9999 * found.norm(dim=1) * z.norm(dim=1)).all()


def test_values_know_goals_by_phi_alone():
    """What φ does not tell apart, V does not; and both V have the same φ."""
    v = learner(hiql).v
    v.phi_net[0].weight.data[:, S + 2] = 0.0  # blind to the third number of a goal
    s, g = torch.randn(9, S), torch.randn(9, S)
    alike, other = g.clone(), g.clone()
    alike[:, 2] += 1.0
    other[:, 1] += 1.0
    assert torch.equal(v.phi(s, alike), v.phi(s, g)) and torch.equal(v(s, alike), v(s, g))
    before = v(s, g)
    assert ((v(s, other) - before).abs() > 1e-4).all()
    assert ((v(s + 1, g) - before).abs() > 1e-4).all()
    assert not torch.allclose(v.phi(s + 1, g), v.phi(s, g))  # a goal as seen from a state
    v.phi_net[-1].bias.data += torch.randn(Z)
    assert ((v(s, g) - before).abs() > 1e-4).all()  # (2, 9, 1)


@pytest.mark.parametrize("normalize", [False, True])
def test_act_goes_to_a_subgoal_on_the_way_to_the_goal(normalize):
    """Raw observations and goals, one goal for all or one each; NumPy in, NumPy out; what the high
    policy says is put on the sphere first."""
    rows = data(observations=5 * torch.randn(64, S) + 9)
    policy = learner(hiql, rows, normalize=normalize, low=[-2.0, -1.0], high=[2.0, 3.0]).policy
    policy.low_net[-1].weight.data *= 30
    s, goals = 5 * torch.randn(7, S) + 9, 5 * torch.randn(7, S) + 9
    mean, std = rows["observations"].mean(0), rows["observations"].std(0, correction=0) + 1e-3
    scale = lambda x: (x - mean) / std if normalize else x  # noqa: E731
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])

    def wanted(s, g):
        z = by_hand(policy.high_net, torch.cat([scale(s), scale(g)], 1), False).detach()
        z = z / (z**2).mean(1, keepdim=True).sqrt()
        a = by_hand(policy.low_net, torch.cat([scale(s), z], 1), False).detach()
        return (low + (a + 1) / 2 * (high - low)).clamp(low, high)

    torch.testing.assert_close(policy.act(s, goals), wanted(s, goals), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(policy.act(s, goals), policy.act(s, goals.flip(0)))
    one_for_all = wanted(s, goals[:1].expand(7, S))
    torch.testing.assert_close(policy.act(s, goals[0]), one_for_all, atol=1e-4, rtol=1e-4)
    one = policy.act(s[0].numpy(), goals[0].numpy())
    assert isinstance(one, np.ndarray) and one.shape == (A,)
    np.testing.assert_allclose(one, wanted(s[:1], goals[:1])[0], rtol=1e-3, atol=1e-4)
    for kind in (torch.float64, torch.float16, torch.bfloat16):
        x, g = s.to(kind), goals.to(kind)
        expected = wanted(x.float(), g.float())
        torch.testing.assert_close(policy.act(x, g), expected, atol=1e-4, rtol=1e-4)
        if kind != torch.bfloat16:
            found = policy.act(x.numpy(), g.numpy())
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    a = policy.act(1000 * s, goals)
    assert (a >= low).all() and (a <= high).all() and (a == high).any() and (a == low).any()


def test_nobody_names_a_goal_it_is_where_the_best_episode_ended():
    to_go = torch.tensor([1.0, 50, 0, 7, 3, -2])[:, None]  # returns 1, 7, -2: the second is best
    rows = episodes(3, 2, 1, returns_to_go=to_go)
    policy = learner(hiql, rows, normalize=True).policy
    assert torch.equal(policy.goal, rows["observations"][4])
    s = torch.randn(5, S)
    assert torch.equal(policy.act(s), policy.act(s, rows["observations"][4]))
    again = hiql.Policy(task(rows), hiql.Args(**tiny("hiql")))
    again.load_state_dict(policy.state_dict())  # what --evaluate has
    assert torch.equal(again.act(s), policy.act(s))


# ----------------------------------------------------------------------- The goals and subgoals


def test_an_episode_ends_at_its_last_row():
    agent = learner(hiql, episodes(3, 1, 5, 2))
    assert agent.data["last"].tolist() == [2] * 3 + [3] + [8] * 5 + [10] * 2


def test_goals_are_drawn_as_ogbench_draws_them():
    """Those of values geometric, those of the high policy uniform, each with its own shares: the
    same frequencies of all rows, from the first row of an episode, a middle one and the last."""
    shares = dict(value_goals=(0.2, 0.5, 0.3), actor_goals=(0.1, 0.6, 0.3))
    agent = learner(hiql, episodes(6, 9), gamma=0.7, **shares)
    draws, rng = 40_000, np.random.default_rng(0)
    for i, last in ((0, 5), (8, 14), (14, 14)):
        x = agent.batch(agent.data, torch.full((draws,), i))
        for key, kind, geometric in (("g", "value_goals", True), ("g_pi", "actor_goals", False)):
            found = row_of(x[key]).bincount(minlength=15)
            wanted = ogbench_goals(i, last, 15, shares[kind], 0.7, geometric, draws, rng)
            wanted = np.bincount(wanted, minlength=15)
            assert len(found) == 15
            np.testing.assert_allclose(found / draws, wanted / draws, atol=0.015)
            assert ((found > 0).numpy() == (wanted > 0)).all()


def pairs(*lengths, **flags):
    """A learner whose batch has every pair of a row and a goal, which is that of the value and of
    the high policy; the batch; the rows and the goals. The first episode ends in a terminal."""
    n = sum(lengths)
    dead = (torch.arange(n) == lengths[0] - 1).float()[:, None]
    agent = learner(hiql, episodes(*lengths, terminals=dead), **flags)
    i, goals = torch.arange(n).repeat_interleave(n), torch.arange(n).repeat(n)
    agent.draw_goals = lambda *_, **__: goals
    return agent, agent.batch(agent.data, i), i.tolist(), goals.tolist()


@pytest.mark.parametrize("n_step", [1, 3, 10])
def test_targets_are_a_walk_along_the_data(n_step):
    """Goals before, behind and at the row, at an end, in an earlier or a later episode."""
    agent, x, rows, goals = pairs(6, 5, n_step=n_step, gamma=0.9)
    assert x["r"].shape == x["m"].shape == x["d_n"].shape == (121, 1)
    for b, (i, goal) in enumerate(zip(rows, goals)):
        r, m, k = walk(i, goal, int(agent.data["last"][i]), n_step, 0.9)
        assert x["r"][b].item() == pytest.approx(r, abs=1e-5), (i, goal)
        assert x["m"][b].item() == pytest.approx(m, abs=1e-6), (i, goal)
        end = i + max(k, 1) - 1
        assert x["s_n"][b, 0] == end + 0.5 and x["d_n"][b] == (end == 5), (i, goal)
    assert x["d_n"].any() and (x["m"] == 0).any()


def stroll(i, k, last, goal=None):
    """The row after k steps from row i, fewer where the episode ends or the goal is."""
    while k and i < last and i != goal:
        i, k = i + 1, k - 1
    return i


@pytest.mark.parametrize("n_step", [1, 2, 10])
@pytest.mark.parametrize("k", [1, 3, 100])
def test_subgoals_are_a_walk_along_the_data(k, n_step):
    """The low policy's is k steps on or the episode's last; the high policy's is not behind a goal
    that lies ahead. On the way to the former, n steps are looked ahead, at least one."""
    agent, x, rows, goals = pairs(6, 5, subgoal_steps=k, n_step=n_step)
    assert x["d_w"].shape == (121, 1)
    for b, (i, goal) in enumerate(zip(rows, goals)):
        last = int(agent.data["last"][i])
        w = stroll(i, k, last)
        assert row_of(x["w"][b]) == w, (i, goal)
        assert row_of(x["w_pi"][b]) == stroll(i, k, last, goal), (i, goal)
        end = max(stroll(i, n_step, last, w) - 1, i)
        assert x["s_w"][b, 0] == end + 0.5 and x["d_w"][b] == (end == 5), (i, goal)
    assert x["d_w"].any()


def test_rows_keep_their_parts_together():
    """Scaled states, actions and successors; here the values' goals are the ends of episodes of
    four, the high policy's the starts."""
    rows = data()
    agent = learner(hiql, rows, normalize=True, n_step=2, subgoal_steps=2)
    i = torch.randint(64, (50,))
    start, last = i - i % 4, i - i % 4 + 3
    agent.draw_goals = lambda columns, i, shares, geometric: start + (3 if geometric else 0)
    x, scaling = agent.batch(agent.data, i), agent.policy.scaling
    s, s_next = scaling.state(rows["observations"]), scaling.state(rows["next_observations"])
    assert s.std() < 1.1 and not torch.allclose(s, rows["observations"])
    torch.testing.assert_close(x["s"], s[i])
    torch.testing.assert_close(x["a"], rows["actions"][i])
    torch.testing.assert_close(x["g"], s[last])
    torch.testing.assert_close(x["g_pi"], s[start])
    w = torch.minimum(i + 2, last)
    torch.testing.assert_close(x["w"], s[w])
    torch.testing.assert_close(x["w_pi"], s[torch.where(i == start, i, w)])
    end = torch.tensor([a + max(min(b - a, 2), 1) - 1 for a, b in zip(i.tolist(), last.tolist())])
    for state, dead in (
        ("s_n", "d_n"),
        ("s_w", "d_w"),
    ):  # w, as the goal, is 2 or less from its end
        torch.testing.assert_close(x[state], s_next[end])
        torch.testing.assert_close(x[dead], rows["terminals"][end])
        assert 0 < x[dead].sum() < 50


# ------------------------------------------------------------------------------------ The losses


def made_up(n=40, **given):
    """A batch of random numbers, its goals not reached, nothing terminal."""
    x = {key: torch.randn(n, S) for key in ("s", "g", "g_pi", "w", "w_pi", "s_n", "s_w")}
    x |= dict(a=2 * torch.rand(n, A) - 1, r=-torch.rand(n, 1), m=torch.rand(n, 1))
    return x | dict(d_n=torch.zeros(n, 1), d_w=torch.zeros(n, 1)) | given


def test_value_loss_by_hand():
    """Each V regresses on the target of its own copy; the side is decided by the smaller target and
    by the copies' mean; after a terminal no goal is reached."""
    agent, x = learner(hiql, expectile=0.8, gamma=0.9), made_up(60)
    x["d_n"][3] = x["d_n"][7] = 1.0
    now, then = torch.randn(2, 60, 1), 3 * torch.randn(2, 60, 1)

    def copied(s, g):
        return {x["s"]: now, x["s_n"]: then}[s] if g is x["g"] else None

    agent.copies.forward = copied
    v = agent.v(x["s"], x["g"])
    losses, metrics = agent.losses(**x)
    total = 0.0
    for b in range(60):
        y = [x["r"][b] + x["m"][b] * (-10.0 if b in (3, 7) else then[i, b]) for i in range(2)]
        good = min(y) > (now[0, b] + now[1, b]) / 2
        total += sum((0.8 if good else 0.2) * (y[i] - v[i, b]) ** 2 for i in range(2))
    assert losses["v"].item() == pytest.approx(total.item() / 60, rel=1e-5)
    found = gradient_of(losses["v"], agent.v)
    torch.testing.assert_close(found, gradient_of(total.sum() / 60, agent.v), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(metrics["values/v"], v.mean())


ADVANTAGES = torch.tensor([-1.0, 0.5, -2.5, 8.0, 0.0])[:, None]


def table(agent, x, ahead, goal):
    """Makes V say a mean advantage as above for the way from s to `ahead`, and random numbers of
    everything else; the copies, φ' too, are others."""
    for parameter in agent.copies.parameters():
        parameter.data += torch.randn_like(parameter)
    now = torch.randn(5, 1)
    split = torch.tensor([1.0, -1.0])[:, None, None] * torch.rand(5, 1)  # the two V do not agree
    known = {
        (x["s"], x[goal]): now + split,
        (x[ahead], x[goal]): now + ADVANTAGES - 2 * split,
    }
    agent.v.forward = lambda s, g: known.get((s, g), torch.randn(2, 5, 1))


def test_high_policy_names_subgoals_that_came_nearer():
    """Weights exp(α_h A), A = V(w, g) - V(s, g), 100 at most, of log N(φ(s, w); π_h(s, g), I)."""
    agent = learner(hiql, high_alpha=2.0, low_alpha=0.7, gamma=0.9)
    x = made_up(5, d_n=torch.ones(5, 1), d_w=torch.ones(5, 1))  # no terminal lies before a subgoal
    table(agent, x, "w_pi", "g_pi")
    losses, metrics = agent.losses(**x)
    torch.testing.assert_close(metrics["advantage/high"], ADVANTAGES)
    assert metrics["advantage/high_clipped"] == 0.2
    z = agent.v.phi(x["s"], x["w_pi"])
    normal = distributions.Normal(agent.policy.high(x["s"], x["g_pi"]), 1.0)
    log_prob = normal.log_prob(z).sum(1, keepdim=True)
    weight = (2 * ADVANTAGES).exp().clamp(max=100)
    wanted = -(weight * log_prob).mean()
    torch.testing.assert_close(losses["high"], wanted)
    found = gradient_of(losses["high"], agent.policy.high_net)
    torch.testing.assert_close(found, gradient_of(wanted, agent.policy.high_net))


def test_low_policy_clones_actions_that_came_nearer():
    """Weights exp(α_l A), A = V(s_n, w) - V(s, w), of log N(a; π_l(s, φ(s, w)), I); never the
    actions that ended in a terminal."""
    agent = learner(hiql, high_alpha=0.7, low_alpha=2.0, gamma=0.9)
    x = made_up(5)
    table(agent, x, "s_w", "w")
    losses, metrics = agent.losses(**x)
    torch.testing.assert_close(metrics["advantage/low"], ADVANTAGES)
    assert metrics["advantage/low_clipped"] == 0.2
    normal = distributions.Normal(agent.policy.low(x["s"], agent.v.phi(x["s"], x["w"])), 1.0)
    log_prob = normal.log_prob(x["a"]).sum(1, keepdim=True)
    weight = (2 * ADVANTAGES).exp().clamp(max=100)
    wanted = -(weight * log_prob).mean()
    torch.testing.assert_close(losses["low"], wanted)
    found = gradient_of(losses["low"], agent.policy.low_net)
    torch.testing.assert_close(found, gradient_of(wanted, agent.policy.low_net))
    x["d_w"][3] = 1.0
    _, metrics = agent.losses(**x)
    v = agent.v(x["s"], x["w"]).mean(0)  # of the table
    torch.testing.assert_close(metrics["advantage/low"][3], -10 - v[3])
    torch.testing.assert_close(metrics["advantage/low"][:3], ADVANTAGES[:3])


def test_no_inverse_temperature_is_cloning():
    agent, x = learner(hiql, high_alpha=0.0, low_alpha=0.0), made_up()
    losses, _ = agent.losses(**x)
    with torch.no_grad():
        z, z_pi = agent.v.phi(x["s"], x["w"]), agent.v.phi(x["s"], x["w_pi"])
        means = agent.policy.low(x["s"], z), agent.policy.high(x["s"], x["g_pi"])
    for name, found, mean in zip(("low", "high"), (x["a"], z_pi), means):
        constant = found.shape[1] * np.log(2 * np.pi) / 2
        wanted = ((found - mean) ** 2).sum(1).mean() / 2 + constant
        torch.testing.assert_close(losses[name], wanted.float())


def test_each_loss_reaches_its_own_network_alone():
    """The value's both heads and φ; and φ hears of neither policy."""
    agent = learner(hiql)
    losses, _ = agent.losses(**agent.batch(agent.data, torch.arange(64)))
    assert losses.keys() == networks(agent).keys()
    for name, loss in losses.items():
        agent.zero_grad()
        loss.backward(retain_graph=True)
        for other, net in networks(agent).items():
            found = [p.grad is not None and bool(p.grad.any()) for p in net.parameters()]
            assert all(found) if other == name else not any(found), (name, other)
        assert all(parameter.grad is None for parameter in agent.copies.parameters())


# -------------------------------------------------------------------------------------- The step


def test_step_is_that_of_several_optimisers():
    """Each network moves by its own loss alone, all from where the step began; the copies, φ' too,
    move towards the weights that V had before."""
    agent = learner(hiql, learning_rate=1e-2, tau=0.1)
    for parameter in agent.copies.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    alone = copy.deepcopy(agent)
    torch.manual_seed(1)
    metrics = agent.update()
    torch.manual_seed(1)
    losses, _ = alone.losses(**alone.batch(alone.data, torch.randint(64, (16,))))
    before = copies(alone.v)
    for name, net in networks(alone).items():
        torch.testing.assert_close(metrics[f"losses/{name}"], losses[name])
        parameters = list(net.parameters())
        found = torch.autograd.grad(losses[name], parameters, retain_graph=True)
        for parameter, gradient in zip(parameters, found):
            parameter.grad = gradient
    for net, moved in zip(networks(alone).values(), networks(agent).values()):
        torch.optim.Adam(net.parameters(), lr=1e-2).step()
        torch.testing.assert_close(copies(moved), copies(net))
    wanted = [0.9 * old + 0.1 * new for old, new in zip(copies(alone.copies), before)]
    torch.testing.assert_close(copies(agent.copies), wanted)


def test_copies_begin_equal_and_are_their_own():
    agent = learner(hiql, tau=1.0)
    assert equal(copies(agent.copies), copies(agent.v))
    assert len(copies(agent.copies)) == len(copies(agent.v))
    for _ in range(2):
        before = copies(agent.v)
        agent.update()
        torch.testing.assert_close(copies(agent.copies), before)
        assert not equal(copies(agent.v), before)


def test_one_call_is_one_step_that_never_synchronises():
    agent = learner(hiql)
    assert [agent.phase(step) for step in (1, 2, 1000)] == 3 * [agent.update]
    agent.update()
    states = agent.optimizer.state
    assert {int(state["step"]) for state in states.values()} == {1}
    assert len(states) == sum(len(list(net.parameters())) for net in networks(agent).values())
    with Watch() as watch:
        metrics = agent.update()
    assert watch.seen == set() and all(isinstance(x, torch.Tensor) for x in metrics.values())


def test_batches_come_from_all_rows():
    agent, seen = learner(hiql, episodes(30, 34)), set()
    real = agent.batch
    agent.batch = lambda columns, i: seen.update(i.tolist()) or real(columns, i)
    for _ in range(40):
        agent.update()
    assert seen == set(range(64))


def test_validation_is_the_losses_of_held_out_rows():
    """Its goals and subgoals are held-out states; the error is that of an action for φ(s, w)."""
    agent, held_out = learner(hiql, normalize=True), data(24)
    torch.manual_seed(3)
    found = agent.validate(held_out)
    torch.manual_seed(3)
    x = agent.batch(agent.columns(held_out), torch.arange(24))
    wanted, _ = agent.losses(**x)
    assert found.keys() == {"v", "high", "low", "mse"}
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)
    states = agent.policy.scaling.state(held_out["observations"])
    torch.testing.assert_close(x["s"], states)
    for key in ("g", "g_pi", "w", "w_pi"):
        assert (torch.cdist(x[key], states).amin(1) < 1e-3).all()
    i = torch.arange(24)
    w = torch.minimum(i + 3, i - i % 4 + 3)  # --subgoal-steps is 3, episodes have four rows
    mean = agent.policy.low(states, agent.v.phi(states, states[w]))
    error = (mean - held_out["actions"]) ** 2
    torch.testing.assert_close(found["mse"], error.sum() / 48)


@pytest.mark.parametrize(
    "flags, said",
    [
        (dict(gamma=1.0), "--gamma.*between 0 and 1"),
        (dict(gamma=0.0), "--gamma.*between 0 and 1"),
        (dict(expectile=1.0), "--expectile.*between 0 and 1"),
        (dict(expectile=0.0), "--expectile.*between 0 and 1"),
        (dict(subgoal_steps=0), "--subgoal-steps.*1 or more"),
        (dict(n_step=0), "--n-step.*1 or more"),
        (dict(rep_dim=0), "--rep-dim.*1 or more"),
        (dict(hidden_layers=0), "--hidden-layers.*1 or more"),
        (dict(value_goals=(0.2, 0.5, 0.2)), "--value-goals.*0.2, 0.5, 0.2.*sum is 1"),
        (dict(value_goals=(1.5, -1.0, 0.5)), "--value-goals.*sum is 1"),
        (dict(actor_goals=(0.2, 0.5, 0.2)), "--actor-goals.*0.2, 0.5, 0.2.*sum is 1"),
        (dict(actor_goals=(-0.5, 1.0, 0.5)), "--actor-goals.*sum is 1"),
    ],
)
def test_refuses_in_a_sentence(flags, said):
    with pytest.raises(SystemExit, match=said):
        learner(hiql, **flags)


# ----------------------------------------------------------------------------------- Whole runs


@pytest.fixture
def line_env(tmp_path, monkeypatch):
    """Three tasks on a line, whose starts and goals are drawn as OGBench draws them."""
    (tmp_path / "line.py").write_text(LINE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield "line:Line-v0"
    gym.registry.pop("Line-v0", None)
    sys.modules.pop("line", None)


def test_a_run_learns_to_come_to_the_goal(line_env, tmp_path):
    """On the line, from random walks; what it writes has each task's success, and it goes on."""
    rng = np.random.default_rng(0)
    a = rng.uniform(-1, 1, (200, 5, 1))
    x = np.concatenate([rng.uniform(-3, 3, (200, 1, 1)), a], axis=1).cumsum(1)
    s = np.concatenate([x, rng.random(x.shape)], axis=2)
    arrays = dict(observations=s[:, :-1].reshape(-1, 2), next_observations=s[:, 1:].reshape(-1, 2))
    arrays |= dict(actions=a.reshape(-1, 1), rewards=np.zeros(1000), terminals=np.zeros(1000))
    arrays |= dict(timeouts=np.arange(1000) % 5 == 4)
    path = write_hdf5(tmp_path / "line.hdf5", arrays, env_id=line_env)
    sizes = dict(steps=600, eval_every=300, batch_size=64, hidden_dim=32, learning_rate=3e-3)
    sizes |= dict(gamma=0.8, tau=0.05, subgoal_steps=2, high_alpha=10.0, low_alpha=10.0)
    args = hiql.Args(**tiny("hiql", **sizes, dataset=str(path), run_dir=str(tmp_path / "run")))
    history = hiql.train(args)
    with open(tmp_path / "run" / "eval.csv") as file:
        table = list(csv.DictReader(file))
    for row, line in zip(history, table, strict=True):
        assert {key: float(value) for key, value in line.items()} == row
        tasks = [row[f"success_task{i}"] for i in (1, 2, 3)]
        assert row["score"] == pytest.approx(100 * row["success"])
        assert row["success"] == pytest.approx(np.mean(tasks))
    assert tasks == [1, 1, 0]  # from the last start four steps are too few
    resumed = hiql.Args(**vars(args) | dict(steps=610, resume=True))
    assert hiql.train(resumed)[-1]["step"] == 610


@pytest.mark.parametrize("n_step", [1, 3])
def test_far_goals_are_reached_by_subgoals(n_step):
    """Nine places in a row; episodes walk from the first to the sixth, from the fourth to the
    ninth, and back. Values of places that no episode joins are those of the way, the subgoal of any
    place that is not next door is a place on the way there, and the action is a step that way."""
    to_six, places = torch.arange(6.0), torch.arange(9)
    at = torch.cat([to_six, to_six + 3, 8 - to_six, 5 - to_six])
    step = torch.ones(24)
    step[12:] = -1
    state = lambda x: (x[:, None] / 4 - 1).expand(len(x), S).clone()  # noqa: E731
    rows = dict(observations=state(at), next_observations=state(at + step))
    rows = episodes(6, 6, 6, 6, **rows, actions=0.8 * step[:, None].expand(24, A))
    flags = dict(hidden_dim=64, batch_size=128, learning_rate=2e-3, tau=0.05, gamma=0.9)
    flags |= dict(subgoal_steps=3, actor_goals=(0.0, 0.5, 0.5), expectile=0.8, n_step=n_step)
    agent = learner(hiql, rows, **flags)
    for _ in range(400):
        agent.update()
    i, j = places.repeat_interleave(9), places.repeat(9)
    s, g = state(i), state(j)
    with torch.no_grad():
        v = agent.v(s, g).mean((0, 2))
        z = hiql.on_sphere(agent.policy.high(s, g))  # (81, Z)
        known = agent.v.phi(s.repeat_interleave(9, 0), state(places).repeat(81, 1)).view(81, 9, Z)
    error = (v + (1 - 0.9 ** (j - i).abs()) / 0.1).abs()
    assert error.max() < 1.6 and error.mean() < 0.6
    assert v[8].item() == pytest.approx(-5.7, abs=1)  # from the first to the ninth
    way, far = (j - i).sign(), (j - i).abs() > 1
    subgoal = (z[:, None] - known).norm(dim=2).argmin(1)
    ahead = (way * (subgoal - i))[far]
    assert ahead.min() >= 1 and ahead.max() <= 5 and ahead.float().mean() > 2
    assert (agent.policy.act(s, g).sign() == way[:, None])[far].all()
