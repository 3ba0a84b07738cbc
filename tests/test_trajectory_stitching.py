"""trajectory_stitching.py: what its models claim, which stitches are made, which episodes are kept,
and what the file that it writes holds."""

import copy
import functools
import math

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import units
from conftest import load
from torch import distributions, nn
from units import A, S, batch, constant_net, copies, data, equal, gradient_of

ts, learner = (
    load("trajectory_stitching"),
    functools.partial(units.learner, "trajectory_stitching"),
)
MODELS = ("v", "encoder", "decoder", "dynamics", "generator", "judge")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Value(nn.Module):
    """A V that is written down, of normalised states."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, s):
        return self.function(s)[..., None]


def plane(paths, timeouts=(), rewards=None, **flags):
    """A learner whose data are paths of points; its states are their raw coordinates. The last
    point of a path is its last successor, a terminal unless the path's number is in `timeouts`."""
    s = torch.cat([torch.tensor(path[:-1]) for path in paths]).float()
    s_next = torch.cat([torch.tensor(path[1:]) for path in paths]).float()
    lengths = torch.tensor([len(path) - 1 for path in paths])
    ends = lengths.cumsum(0) - 1
    d = torch.zeros(len(s), 1)
    d[[end for k, end in enumerate(ends.tolist()) if k not in timeouts]] = 1
    episodes = torch.arange(len(paths)).repeat_interleave(lengths)
    rows = dict(observations=s, next_observations=s_next, terminals=d, episodes=episodes)
    rows |= dict(actions=torch.zeros(len(s), 2), recorded=torch.ones(len(s), dtype=torch.bool))
    rows |= dict(rewards=torch.zeros(len(s), 1) if rewards is None else rewards)
    agent = learner(data(n=len(s), **rows), **dict(gamma=1.0, min_gain=0.0) | flags)
    agent.policy.scaling.mean.zero_()
    agent.policy.scaling.std.fill_(1)
    agent.data = (s, rows["actions"], rows["rewards"], s_next, d)
    return agent


def oracle(agent, value, reaches, reward=0.0):
    """Puts V, reachability and reward in place of the models: reaches(s, s') says whether."""
    agent.v = Value(value)
    agent.inverse = lambda s, s_next: (s_next - s)[:, :2]
    agent.reward = lambda y: torch.full_like(y[:, :1], reward)
    agent.r_mean, agent.r_std = 0.0, 1.0

    def log_p(s, s_next):
        s_there = s[:, None] if s_next.dim() > s.dim() else s
        found = torch.where(reaches(s_there, s_next), 1.0, -1.0)
        found = found - float(
            s_next.dim() == s.dim()
        )  # the successor itself: 0 where it is reached
        return found.expand(agent.args.ensemble, *found.shape)

    agent.log_p = log_p
    return agent


# -------------------------------------------------------------------------------- The models


def test_v_loss_is_the_td_error_and_stops_at_terminals():
    agent = learner(gamma=0.9)
    s, _, r, s_next, d = batch(agent)
    with torch.no_grad():
        y = r + 0.9 * agent.v_target(s_next) * (1 - d)
        wanted = (agent.v(s) - y).square().mean()
        agent.v_target[-1].bias += 1  # the target network is asked, and only about what goes on
        moved = agent.v_loss(s, r, s_next, d)
        y = r + 0.9 * agent.v_target(s_next) * (1 - d)
    torch.testing.assert_close(moved, (agent.v(s) - y).square().mean())
    assert not torch.isclose(moved, wanted)
    agent.v_loss(s, r, s_next, d).backward()
    assert all(p.grad is None for p in agent.v_target.parameters())


def test_forward_densities_are_normal_ones():
    agent = learner(ensemble=3)
    s, s_next = torch.randn(9, S), torch.randn(9, S)
    found = agent.log_p(s, s_next)
    assert found.shape == (3, 9)
    for k, member in enumerate(agent.dynamics):
        mu, log_sigma = member(s).chunk(2, dim=-1)
        sigma = (-5 + 3 * (log_sigma.tanh() + 1)).exp()
        wanted = distributions.Normal(mu, sigma).log_prob((s_next - s) / agent.x_std).sum(-1)
        torch.testing.assert_close(found[k], wanted)
    torch.testing.assert_close(agent.nll(s, s_next), -found.mean(1).sum() / S)

    # Many successors of one state, and a batch of its own for every member.
    many = torch.randn(9, 4, S)
    together = agent.log_p(s, many)
    assert together.shape == (3, 9, 4)
    for j in range(4):
        torch.testing.assert_close(together[:, :, j], agent.log_p(s, many[:, j]))
    s, s_next = torch.randn(3, 9, S), torch.randn(3, 9, S)
    own = torch.stack([agent.log_p(s[k], s_next[k])[k] for k in range(3)])
    torch.testing.assert_close(agent.log_p(s, s_next), own)


def test_members_learn_from_batches_of_their_own(monkeypatch):
    agent = learner(ensemble=3)
    seen = []
    monkeypatch.setattr(agent, "nll", lambda s, s_next: seen.append(s) or agent.v(s).sum())
    agent.update_models()
    assert seen[0].shape == (3, 16, S) and not torch.equal(seen[0][0], seen[0][1])


def test_inverse_losses():
    agent = learner(latent_dim=3)
    s, a, _, s_next, _ = batch(agent)
    y = agent.joined(s, s_next, a)
    torch.testing.assert_close(y[:, S : 2 * S], (s_next - s) / agent.x_std)
    constant_net(agent.encoder, 0.0)
    agent.encoder[-1].bias.data = torch.tensor([0.5, -1, 2, 0.3, -0.2, -9])  # μ, then log σ
    mse, kl = agent.inverse_losses(y)
    q = distributions.Normal(torch.tensor([0.5, -1, 2]), torch.tensor([0.3, -0.2, -5]).exp())
    wanted = distributions.kl_divergence(q, distributions.Normal(torch.zeros(3), torch.ones(3)))
    torch.testing.assert_close(kl, wanted.sum() / A)

    # The decoder sees s, the way and z: it draws z around μ, and acting takes z = 0.
    mse_again, _ = agent.inverse_losses(y)
    assert mse != mse_again
    z = torch.zeros(len(s), 3)
    wanted = agent.decoder(torch.cat([s, (s_next - s) / agent.x_std, z], -1)).tanh()
    torch.testing.assert_close(agent.inverse(s, s_next), wanted)
    agent.encoder[-1].bias.data = torch.tensor([0.5, -1, 2, -99, -99, -99])
    z = torch.tensor([0.5, -1, 2]).expand(len(s), -1)
    wanted = agent.decoder(torch.cat([s, (s_next - s) / agent.x_std, z], -1)).tanh()
    assert (agent.inverse_losses(y)[0] - F.mse_loss(wanted, a)).abs() < 0.01


def linear(n=512):
    """s' = s + 0.3 M a, with a reward that the three of them determine."""
    s, a = torch.randn(n, S), 2 * torch.rand(n, A) - 1
    s_next = s + 0.3 * a @ torch.tensor([[1.0, 0, 0.5], [0, 1, -0.5]])
    r = 5 + 2 * s[:, :1] + a[:, :1]
    return data(n, observations=s, actions=a, next_observations=s_next, rewards=r)


@pytest.mark.parametrize("judge_steps", [1, 3])
def test_reward_critic_and_generator_learn_apart(judge_steps):
    agent = learner(judge_steps=judge_steps)
    s, a, r, s_next, _ = batch(agent)
    y = agent.joined(s, s_next, a)
    # A critic that is the reward has slope 1: no penalty, and the gap is that of the means.
    agent.judge = nn.Linear(y.shape[1] + 1, 1)
    agent.judge.weight.data = F.one_hot(torch.tensor([y.shape[1]]), y.shape[1] + 1).float()
    agent.judge_optimizer = torch.optim.SGD(agent.judge.parameters(), 0.0)
    agent.generator_optimizer = torch.optim.SGD(agent.generator.parameters(), 1e-3)
    steps = []
    step, agent.judge_optimizer.step = agent.judge_optimizer.step, lambda: steps.append(step())
    torch.manual_seed(1)
    for _ in range(judge_steps):
        r_hat = agent.reward(y).detach()  # what C sees last; every step draws anew
        torch.rand_like(r)
    wanted = gradient_of(-agent.judge(torch.cat([y, agent.reward(y)], -1)).mean(), agent.generator)
    torch.manual_seed(1)
    metrics = agent.update_reward(y, r)
    assert len(steps) == judge_steps
    assert metrics["penalty"] < 1e-10
    torch.testing.assert_close(metrics["wasserstein"], (r - r_hat).mean())
    torch.testing.assert_close(units.gradients(agent.generator), wanted)
    # The critic climbs the gap; where its slope is 1 the penalty does not pull.
    found = agent.judge.weight.grad[0]
    wanted = (torch.cat([y, r_hat], -1) - torch.cat([y, r], -1)).mean(0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_only_slopes_above_one_are_penalised():
    agent = learner(judge_steps=1)
    s, a, r, s_next, _ = batch(agent)
    y = agent.joined(s, s_next, a)
    for slope, penalty in ((-3.0, 4.0), (-0.5, 0.0), (0.5, 0.0), (3.0, 4.0)):
        agent.judge = nn.Linear(y.shape[1] + 1, 1)
        agent.judge.weight.data = slope * F.one_hot(torch.tensor([y.shape[1]]), y.shape[1] + 1)
        agent.judge_optimizer = torch.optim.SGD(agent.judge.parameters(), 0.0)
        found = agent.update_reward(y, r)["penalty"]
        torch.testing.assert_close(found, torch.tensor(penalty))


def test_dynamics_are_learnt_from_recorded_successors_alone():
    rows = data()
    lost = rows["terminals"][:, 0] > 0
    rows |= dict(next_observations=rows["next_observations"].masked_fill(lost[:, None], 90.0))
    rows |= dict(recorded=~lost)
    agent = learner(rows)
    assert agent.x_std.max() < 10
    seen = []
    agent.nll = lambda s, s_next: seen.append(s_next) or agent.dynamics[0](s).sum()
    agent.inverse_losses = lambda y: seen.append(y) or 2 * [agent.encoder(y).sum()]
    for _ in range(20):
        agent.update_models()
    assert max(x.abs().max() for x in seen) < 20
    del agent.nll, agent.inverse_losses
    with torch.no_grad():
        assert all(value.isfinite() for value in agent.validate(rows).values())
        assert agent.validate(rows)["nll"] < 100
    _, ok, _ = agent.candidates(torch.arange(64))
    agent.args.reachability = False
    _, ok, _ = agent.candidates(torch.arange(64))
    assert ok[~lost].all() and not ok[lost].any()


# ---------------------------------------------------------------------------- Which update when


def test_phases_in_order():
    for flags, wanted in (
        ({}, ["update_bc"] * 4),
        ({"learner": "td3_bc"}, ["update_q", "update_td3_bc"] * 2),
    ):
        agent, stitched = learner(model_steps=4, **flags), []
        agent.stitch = lambda stitched=stitched: stitched.append(1)
        names, counts = [], []
        for step in range(1, 9):
            names.append(agent.phase(step).__name__)
            counts.append(len(stitched))
        assert names == ["update_models"] * 4 + wanted
        assert counts == [0] * 4 + [1] * 4


def moved(agent, update):
    """Names of the parts that an update changes."""
    parts = dict(agent.named_children())
    before = {name: copies(part) for name, part in parts.items()}
    update()
    return {name for name, part in parts.items() if not equal(before[name], copies(part))}


def test_each_update_moves_its_networks_only():
    agent = learner(learner="td3_bc", kl_weight=1.0)
    assert moved(agent, agent.update_models) == {*MODELS, "v_target"}
    assert moved(agent, agent.update_bc) == {"policy"}
    assert moved(agent, agent.update_q) == {"critic"}
    targets = {"critic_target", "policy_target"}
    assert moved(agent, agent.update_td3_bc) == {"policy", "critic", *targets}
    agent = learner(reward_model="mlp")
    assert moved(agent, agent.update_models) == {*MODELS, "v_target"} - {"judge"}


def test_targets_follow_at_their_rate():
    agent = learner(learner="td3_bc", tau=0.25)
    for target, online, update in (
        ("v_target", "v", agent.update_models),
        ("policy_target", "policy", agent.update_td3_bc),
        ("critic_target", "critic", agent.update_td3_bc),
    ):
        target, online = getattr(agent, target), getattr(agent, online)
        for parameter in target.parameters():
            parameter.data += 1
        before = copies(target)
        update()
        for old, new, goal in zip(before, target.parameters(), online.parameters()):
            torch.testing.assert_close(new, 0.75 * old + 0.25 * goal)


def test_losses_of_the_models_have_their_weights():
    """The gradients of an update: of V, of the ensemble's members' own sum, of β KL."""
    agent = learner(kl_weight=3.0, ensemble=2)
    seen = {}
    agent.v_loss = lambda *x: seen.setdefault("v", ts.TrajectoryStitching.v_loss(agent, *x))
    agent.nll = lambda *x: seen.setdefault("nll", ts.TrajectoryStitching.nll(agent, *x))
    inverse = ts.TrajectoryStitching.inverse_losses
    agent.inverse_losses = lambda y: seen.setdefault("inverse", inverse(agent, y))
    real, wanted = ts.minimise, {}

    def minimise(optimizer, loss):
        if optimizer is agent.optimizer:
            mse, kl = seen["inverse"]
            wanted["loss"] = (loss.detach(), (seen["v"] + seen["nll"] + mse + 3 * kl).detach())
        real(optimizer, loss)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ts, "minimise", minimise)
        agent.update_models()
    torch.testing.assert_close(*wanted["loss"])


# ------------------------------------------------------------------------------- Candidates


def test_candidates_are_the_nearest_of_other_episodes():
    agent = learner(neighbours=6, reachability=False)
    s, _, _, s_next, _ = batch(agent)
    episodes = agent.raw["episodes"]
    i = torch.tensor([3, 17, 40])
    j, ok, gain = agent.candidates(i)
    assert j.shape == ok.shape == gain.shape == (3, 6) and ok.all()
    for row, found in zip(i, j):
        distance = (s - s_next[row]).norm(dim=1)
        others = [k for k in distance.argsort().tolist() if episodes[k] != episodes[row]]
        assert found.tolist() == others[:6]


def test_few_states_leave_few_candidates():
    agent = learner(data(8), neighbours=50, reachability=False)  # two episodes of four
    _, ok, _ = agent.candidates(torch.arange(8))
    assert ok.sum(1).tolist() == [4] * 8
    agent = learner(data(8, episodes=torch.zeros(8).long()), neighbours=5, reachability=False)
    assert not agent.candidates(torch.arange(8))[1].any()
    agent.stitch()  # nothing to leave for
    assert (agent.leads_to == -1).all() and agent.held[7] == agent.held[-1] == 8


def test_gain_is_of_v_and_nothing_is_behind_a_terminal():
    agent = learner(neighbours=3)
    constant_net(agent.v, 2.0)
    agent.v[-1].weight.data.normal_()
    agent.v[0].weight.data.normal_()
    s, _, _, s_next, d = batch(agent)
    i = torch.arange(64)
    j, _, gain = agent.candidates(i)
    with torch.no_grad():
        wanted = agent.v(s[j])[..., 0] - (agent.v(s_next) * (1 - d)).expand(-1, 3)
    torch.testing.assert_close(gain, wanted)
    assert d.sum() > 0


def test_the_candidate_convinces_every_member_and_the_successor_their_mean():
    agent = learner(ensemble=2, neighbours=3)
    probabilities = {1: [0.2, 0.6], 3: [[0.3, 0.5, 0.9], [0.7, 0.5, 0.39]]}

    def log_p(s, s_next):
        wide = s_next.dim() > s.dim()
        p = torch.tensor(probabilities[3 if wide else 1])
        return (p[:, None].expand(2, len(s), 3) if wide else p[:, None].expand(2, len(s))).log()

    agent.log_p = log_p
    _, ok, _ = agent.candidates(torch.arange(5))  # the successor's mean is 0.4
    assert ok.tolist() == [[False, True, False]] * 5
    agent.args.reachability = False
    assert agent.candidates(torch.arange(5))[1].all()


# --------------------------------------------------------------------------------- Stitching

# Two that cross: the first begins below and ends badly, the second ends well. Between their first
# points is a wall.
BAD = [(0.0, 0.0, 0.0), (1, 0, 0), (2, 1, 0), (3, 2, 0), (4, 3, 0)]
GOOD = [(0.0, 2.0, 0.0), (1, 2, 0), (2, 0.9, 0), (3, 0, 0), (4, -1, 0)]


def height(s):
    return s[..., 0] - s[..., 1]  # better to the lower right


def past_the_wall(s, s_next):
    """A step to the right, no longer than 1.5, and not through the wall."""
    crosses = (s[..., 1] - 1.5) * (s_next[..., 1] - 1.5) < 0
    steps = (s_next[..., 0] > s[..., 0]) & ((s_next - s).norm(dim=-1) < 1.5)
    return ~(crosses & (s[..., 0] < 1)) & steps


def test_two_crossing_paths_are_stitched():
    agent = oracle(plane([BAD, GOOD], neighbours=3), height, past_the_wall)
    agent.stitch()
    # From (1, 0) to (2, 0.9) of the other path and on to its good end; and from (2, 1), too.
    assert agent.leads_to.tolist() == [-1, 6, 7, -1, -1, -1, -1, -1]
    rows, _ = agent.walk()
    assert rows[:, 0].tolist() == [0, 8 + 1, 6, 7] and rows[:, 1].tolist() == [4, 5, 6, 7]
    path = agent.picked(rows[:, 0], agent.data)
    assert path[3].tolist()[-1] == [4, -1, 0] and path[4][:, 0].tolist() == [0, 0, 0, 1]


def test_an_infeasible_jump_is_rejected():
    paths = [[(0.0, 0.0, 0), (0.5, 0, 0), (1, 0, 0)], [(0.4, 2.0, 0), (0.9, 2, 0), (1.4, 2, 0)]]
    value = lambda s: s[..., 1]  # noqa: E731  (the upper path is better, and behind the wall)
    agent = oracle(plane(paths), value, past_the_wall)
    agent.stitch()
    assert (agent.leads_to == -1).all()
    agent = oracle(plane(paths, reachability=False), value, past_the_wall)
    agent.stitch()
    assert (agent.leads_to[:2] >= 2).all()


def test_the_best_of_the_reachable_is_taken_and_only_if_better():
    paths = [[(0.0, 0.0, 0), (1, 0, 0), (2, 0, 0)]] + [
        [(x, y, 0.0), (x + 1, y, 0), (x + 2, y, 0)] for x, y in ((1.0, 0.3), (1.0, 0.2), (1, 0.1))
    ]
    value = lambda s: s[..., 1]  # noqa: E731
    everywhere = lambda s, s_next: s_next[..., 0] > s[..., 0]  # noqa: E731
    agent = oracle(plane(paths, neighbours=3), value, everywhere)
    agent.stitch()
    assert agent.leads_to[0] == 2  # the first row of the path at 0.3
    only_near = lambda s, s_next: (s_next - s)[..., 1].abs() < 0.15  # noqa: E731
    agent = oracle(plane(paths, neighbours=3), value, only_near)
    agent.stitch()
    assert agent.leads_to[0] == 6
    agent = oracle(plane(paths, neighbours=3), lambda s: -s[..., 1], everywhere)
    agent.stitch()
    assert agent.leads_to[0] == -1
    torch.testing.assert_close(agent.a_hat[2], torch.tensor([1.0, -0.2]) * (agent.leads_to[2] > 0))


def test_actions_and_rewards_of_a_stitch_are_generated():
    agent = oracle(plane([BAD, GOOD], neighbours=3), height, past_the_wall, reward=0.5)
    agent.r_mean, agent.r_std = 10.0, 4.0
    agent.stitch()
    hops = agent.leads_to >= 0
    assert hops.any()
    s = agent.data[0]
    wanted = (s[agent.leads_to] - s)[hops][:, :2]
    torch.testing.assert_close(agent.a_hat[hops], wanted)
    torch.testing.assert_close(agent.r_hat[hops], torch.full_like(agent.r_hat[hops], 12.0))


# ------------------------------------------------------------------------- Walks and returns


def test_a_walk_without_stitches_is_the_episode():
    rewards = torch.tensor([[1.0], [2], [4], [8], [16]])
    paths = [[(0.0, 0, 0), (1, 0, 0), (2, 0, 0)], [(0.0, 1, 0), (1, 1, 0), (2, 1, 0), (3, 1, 0)]]
    agent = plane(paths, timeouts=[1], rewards=rewards, gamma=0.5)
    agent.v = Value(lambda s: 100 * s[..., 0])
    agent.leads_to.fill_(0)
    rows, R = agent.walk(stitches=False)
    assert rows.T.tolist() == [[0, 1, -1], [2, 3, 4]]
    # The first ends in a terminal, the second's time is up at a state that V knows.
    torch.testing.assert_close(R, torch.tensor([1 + 0.5 * 2, 4 + 4 + 4 + 0.125 * 300]))


def test_a_walk_along_stitches():
    rewards = torch.tensor([[1.0], [2], [4], [8], [16]])
    paths = [[(0.0, 0, 0), (1, 0, 0), (2, 0, 0)], [(0.0, 1, 0), (1, 1, 0), (2, 1, 0), (3, 1, 0)]]
    agent = plane(paths, timeouts=[1], rewards=rewards, gamma=0.5)
    agent.v = Value(lambda s: 100 * s[..., 0])
    agent.r_hat += 32
    agent.leads_to[1] = 3  # from the terminal's row: it does not end there
    rows, R = agent.walk()
    assert rows[:, 0].tolist() == [0, 5 + 1, 3]  # no longer than the longest episode
    torch.testing.assert_close(R[0], torch.tensor(1 + 0.5 * 32 + 0.25 * 8 + 0.125 * 200))
    # Two that lead to each other go round until the time is up, and V stands for the rest.
    agent.leads_to[3] = 1
    rows, R = agent.walk()
    assert rows[:, 0].tolist() == [0, 6, 8]
    torch.testing.assert_close(R[0], torch.tensor(1 + 0.5 * 32 + 0.25 * 32 + 0.125 * 100))


@pytest.mark.parametrize("sign", [1, -1])
def test_accepted_is_what_gains_a_share_of_the_return(sign):
    """Returns of 10 or -10: with p̃ = 0.1 a stitched one needs 11 or -9, and a little."""
    for gains, accepted in ((0.9, False), (1.1, True)):
        first = torch.tensor([[0.0], [sign * 10.0], [sign * 10.0 + gains], [0]])
        paths = [[(0.0, 0, 0), (1, 0, 0), (2, 0, 0)], [(9.0, 1, 0), (8, 1, 0), (2, 1, 0)]]
        agent = plane(paths, rewards=first, min_gain=0.1)
        oracle(agent, lambda s: 0 * s[..., 0], lambda s, s_next: s[..., 0] > 99)
        agent.candidates = lambda i: (
            torch.full((len(i), 1), 2),
            (i == 0)[:, None],
            torch.ones(len(i), 1),
        )
        agent.stitch()
        assert (agent.found[0] == 0.5) == accepted
        share = 0.25 if accepted else 0.0
        torch.testing.assert_close(agent.found[1:], torch.tensor([share, accepted * gains / 2]))
        counts = agent.held.diff(prepend=torch.tensor([0]))
        wanted = [0, 0, 2, 1, 1, 0, 0, 0] if accepted else [1, 1, 1, 1, 0, 0, 0, 0]
        assert counts.tolist() == wanted
        agent.args.keep_originals = True
        agent.stitch()
        counts = agent.held.diff(prepend=torch.tensor([0]))
        assert counts.tolist() == ([1, 1, 2, 1, 1, 0, 0, 0] if accepted else wanted)


# ---------------------------------------------------------------------- The mended data


def held(agent, counts):
    agent.held.copy_(torch.tensor(counts).cumsum(0))


def test_batches_are_drawn_as_often_as_the_data_holds_them():
    agent = learner(data(8), batch_size=6000)
    agent.leads_to[:] = torch.arange(8).flip(0)
    agent.a_hat.normal_(), agent.r_hat.normal_()
    held(agent, [0, 3, 0, 1, 0, 0, 0, 0] + [0, 0, 0, 0, 0, 0, 0, 2])
    s, a, r, s_next, d = agent.sample()
    S_, A_, R_, N_, D_ = agent.data
    for wanted, share in (
        ((S_[1], A_[1], R_[1], N_[1], D_[1]), 3 / 6),
        ((S_[3], A_[3], R_[3], N_[3], D_[3]), 1 / 6),
        ((S_[7], agent.a_hat[7], agent.r_hat[7], S_[0], 0 * D_[7]), 2 / 6),  # row 7 is a terminal
    ):
        same = torch.stack([(x == y).all(1) for x, y in zip((s, a, r, s_next, d), wanted)]).all(0)
        assert abs(same.float().mean() - share) < 0.03
    assert D_[7] == 1


def test_before_the_data_is_mended_it_is_the_data():
    agent = learner(batch_size=4000)
    _, a, *_ = agent.sample()
    assert len(torch.unique(a, dim=0)) == 64


def test_cloning_regresses_on_the_mended_data():
    agent = learner(data(8), batch_size=64)
    agent.a_hat.fill_(0.7)
    held(agent, [0] * 8 + [1] * 8)
    torch.testing.assert_close(
        torch.stack([agent.sample()[1] for _ in range(3)]), torch.full((3, 64, A), 0.7)
    )
    agent.policy_optimizer = torch.optim.Adam(agent.policy.parameters(), 0.01)
    for _ in range(300):
        metrics = agent.update_bc()
    assert metrics["losses/bc"] < 1e-3
    assert {"stitched/episodes", "stitched/transitions", "stitched/gain"} < metrics.keys()


def test_td3_bc_losses():
    agent = learner(learner="td3_bc", gamma=0.9, alpha=2.0)
    s, a, r, s_next, d = batch(agent)
    for q, value in zip(agent.critic_target, (3.0, 5.0)):
        constant_net(q, value)
    before = [q(torch.cat([s, a], -1)) for q in agent.critic]
    y = r + 0.9 * (1 - d) * 3.0
    wanted = sum((q - y).square().mean() for q in before)
    torch.testing.assert_close(agent.update_critic(s, a, r, s_next, d)["losses/critic"], wanted)

    for q, value in zip(agent.critic, (-4.0, 70.0)):
        constant_net(q, value)
    agent.sample = lambda: (s, a, r, s_next, d)
    agent.update_critic = lambda *x: {}
    bc = F.mse_loss(agent.policy(s), a).detach()
    metrics = agent.update_td3_bc()
    torch.testing.assert_close(metrics["losses/actor"], bc + 2.0)  # -α Q / |Q|, of the first
    torch.testing.assert_close(metrics["losses/bc"], bc)


def test_td3_bc_climbs_its_critic():
    agent = learner(data(actions=torch.zeros(64, A)), learner="td3_bc", alpha=50.0)
    agent.update_critic = lambda *x: {}
    for q in agent.critic:
        constant_net(q, 1.0)
        q[0].weight.data[0, S] = 1.0  # a unit for the first action, and a way through
        q[0].bias.data[0] = 5.0
        q[2].weight.data[0, 0] = q[4].weight.data[0, 0] = 1.0
    agent.policy_optimizer = torch.optim.Adam(agent.policy.parameters(), 0.01)
    for _ in range(100):
        agent.update_td3_bc()
    pi = agent.policy(agent.data[0])
    assert pi[:, 0].mean() > 0.8 and pi[:, 1].abs().mean() < 0.3


# -------------------------------------------------------------------------------- The file


def written(tmp_path, rows=None, **flags):
    path = tmp_path / "stitched.hdf5"
    if not rows:
        rows = data(rewards=torch.rand(64, 1))
        inside = torch.arange(64) % 4 != 3
        after = rows["observations"].roll(-1, 0)
        rows["next_observations"] = torch.where(inside[:, None], after, rows["next_observations"])
    flags = dict(reachability=False, neighbours=4, min_gain=-9.0, write_stitched=str(path)) | flags
    agent = learner(rows, low=[-2.0, -1.0], high=[2.0, 3.0], **flags)
    agent.task |= dict(env="none", scores=[-5.0, 7.0])
    agent.stitch()
    return agent, path


def test_the_written_file_is_the_mended_data(tmp_path):
    agent, path = written(tmp_path)
    found, task = load("bc").load_dataset(str(path))
    assert task["bounds"] == [[-2, -1], [2, 3]] and task["scores"] == [-5, 7]
    rows = agent.walk()[0].T
    row = rows[rows >= 0]
    hops, n = row >= 64, len(row)
    assert 0.2 < hops.float().mean() < 1 and n == agent.held[-1]
    keys = "observations actions rewards next_observations terminals".split()
    raw, i = agent.raw, row % 64
    for key in keys:
        new = {"actions": agent.a_hat, "rewards": agent.r_hat}.get(key, raw[key])[i]
        new = raw["observations"][agent.leads_to[i]] if key == "next_observations" else new
        new = 0 * new if key == "terminals" else new
        wanted = torch.where(hops[:, None], new, raw[key][i])
        np.testing.assert_allclose(found[key], wanted, atol=1e-5)
    lengths = np.bincount(found["episodes"])
    assert lengths.tolist() == (rows >= 0).sum(1).tolist()
    # Within an episode a state is the successor of the one before.
    inside = np.diff(found["episodes"]) == 0
    assert np.array_equal(
        found["next_observations"][:-1][inside], found["observations"][1:][inside]
    )


def test_episodes_that_were_not_replaced_are_written_as_they_were(tmp_path):
    agent, path = written(tmp_path, min_gain=1e9)
    found, _ = load("bc").load_dataset(str(path))
    for key in ("observations", "rewards", "next_observations", "terminals"):
        assert np.array_equal(found[key], agent.raw[key].numpy())
    np.testing.assert_allclose(found["actions"], agent.raw["actions"], atol=1e-6)
    assert found["episodes"].tolist() == agent.raw["episodes"].tolist()
    np.testing.assert_allclose(found["returns_to_go"], agent.raw["returns_to_go"], atol=1e-5)
    with h5py.File(path) as file:  # every other episode of four steps ends in a terminal
        terminals, timeouts = file["terminals"][:, 0], file["timeouts"][:, 0]
    assert terminals.nonzero()[0].tolist() == list(range(7, 64, 8))
    assert timeouts.nonzero()[0].tolist() == list(range(3, 64, 8))


def test_unknown_successors_are_not_written(tmp_path):
    rows = data()
    lost = rows["terminals"][:, 0] > 0
    rows |= dict(next_observations=rows["next_observations"].masked_fill(lost[:, None], 90.0))
    _, path = written(tmp_path, rows | dict(recorded=~lost), min_gain=1e9)
    found, _ = load("bc").load_dataset(str(path))
    kept = lost | (torch.arange(64) % 4 != 3)  # a timeout's row has no successor there
    assert np.array_equal(found["observations"], rows["observations"][kept].numpy())
    assert not found["recorded"][found["terminals"][:, 0] > 0].any()


@pytest.mark.parametrize("flags", [{}, {"learner": "td3_bc"}])
def test_a_run_writes_and_another_file_trains_on_it(flags, pendulum_file, tmp_path, capsys):
    path = tmp_path / "stitched.hdf5"
    tiny = units.tiny("trajectory_stitching", dataset=str(pendulum_file), min_gain=-9.0)
    args = ts.Args(**tiny | flags, write_stitched=str(path), run_dir=str(tmp_path / "ts"))
    ts.train(args)
    assert "episodes replaced" in capsys.readouterr().out
    bc = load("bc")
    history = bc.train(bc.Args(**units.tiny("bc"), dataset=str(path), run_dir=str(tmp_path / "bc")))
    assert history[-1]["step"] == 20 and math.isfinite(history[-1]["score"])


def test_what_cannot_be_written_or_asked_is_refused(tmp_path):
    (tmp_path / "there.hdf5").touch()
    for path in (tmp_path / "there.hdf5", tmp_path / "x.npz", tmp_path / "no" / "x.hdf5"):
        with pytest.raises(SystemExit, match=r"--write-stitched .*: a new \.hdf5 file"):
            learner(write_stitched=str(path))
    learner(write_stitched=str(tmp_path / "there.hdf5"), resume=True)  # it wrote that itself
    for flag in ("neighbours", "ensemble", "latent_dim", "judge_steps"):
        with pytest.raises(SystemExit, match=f"--{flag.replace('_', '-')} must be 1 or more"):
            learner(**{flag: 0})


def test_validation_says_how_good_the_models_are():
    rows = linear(64)
    agent = learner(rows)
    held_out = copy.deepcopy(rows)
    with torch.no_grad():
        found = agent.validate(held_out)
        s, a, r, s_next, d = batch(agent)
        torch.testing.assert_close(found["v"], agent.v_loss(s, r, s_next, d))
        torch.testing.assert_close(found["bc"], F.mse_loss(agent.policy(s), a))
        torch.testing.assert_close(found["nll"], agent.nll(s, s_next) / 2)
        torch.testing.assert_close(found["inverse"], F.mse_loss(agent.inverse(s, s_next), a))
    assert 0.5 < found["reward"] < 20


# ------------------------------------------------------------------ What the models learn: slow


@pytest.mark.parametrize("reward_model", ["wgan", "mlp"])
def test_models_learn_a_linear_world(reward_model):
    flags = dict(model_dim=64, batch_size=128, learning_rate=3e-3, reward_learning_rate=2e-3)
    agent = learner(linear(), reward_model=reward_model, kl_weight=0.01, **flags)
    s, a, r, s_next, _ = batch(agent)
    with torch.no_grad():
        before, likely = agent.inverse(s, s_next), agent.log_p(s, s_next).mean()
    for _ in range(400):
        metrics = agent.update_models()
    with torch.no_grad():
        assert F.mse_loss(agent.inverse(s, s_next), a) < 0.02 < 0.2 < F.mse_loss(before, a)
        assert agent.log_p(s, s_next).mean() > likely + 1
        # A way that no action makes is far less likely than one that an action does.
        far = agent.log_p(s, s + 5 * (s_next - s).abs()).amax(0).mean()
        assert far < agent.log_p(s, s_next).mean() - 10
        r_hat = agent.r_mean + agent.r_std * agent.reward(agent.joined(s, s_next, a))
    assert (r_hat - r).square().mean() < 0.1 * r.var()
    assert ("losses/reward" in metrics) == (reward_model == "mlp")
    assert ("losses/wasserstein" in metrics) == (reward_model == "wgan")


def test_the_wgan_has_both_rewards_where_a_regression_has_their_mean():
    """Whatever the transition, it pays -1 or 1: a generative model answers with either."""
    rows = data(512, rewards=torch.where(torch.arange(512) % 2 == 0, 1.0, -1.0)[:, None])
    found = {}
    for kind in ("wgan", "mlp"):
        agent = learner(rows, reward_model=kind, model_dim=64, reward_learning_rate=1e-3)
        s, a, r, s_next, _ = batch(agent)
        y, r = agent.joined(s, s_next, a), (r - agent.r_mean) / agent.r_std
        for _ in range(400 if kind == "wgan" else 100):
            i = torch.randint(512, (128,))
            agent.update_reward(y[i], r[i])
        with torch.no_grad():
            found[kind] = agent.reward(y)
            again = agent.reward(y)
    assert torch.equal(again, found["mlp"])  # it has no noise
    assert found["mlp"].abs().mean() < 0.5
    for side in (found["wgan"], -found["wgan"]):
        assert 0.2 < (side > 0.3).float().mean() < 0.8


def test_generated_rewards_do_not_run_off_the_data():
    """With the usual two-sided penalty they do, to tens of standard deviations."""
    agent = learner(linear(), model_dim=64, reward_learning_rate=1e-3)
    s, a, r, s_next, _ = batch(agent)
    y, r = agent.joined(s, s_next, a), (r - agent.r_mean) / agent.r_std
    for _ in range(200):
        agent.update_reward(y[:128], r[:128])
        with torch.no_grad():
            assert agent.reward(y).abs().max() < 10
