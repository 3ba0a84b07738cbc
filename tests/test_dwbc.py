"""What dwbc.py claims, each against an independent computation."""

import copy

import numpy as np
import pytest
import torch
from conftest import load, tiny, write_hdf5
from torch import distributions
from units import A, S, copies, data, equal, gradients, learner

dwbc = load("dwbc")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def fixed_d(agent, d_e, d_u):
    """A discriminator that says d_e of its first batch and d_u of its second, and so on."""
    answers = [torch.as_tensor(x).float().reshape(-1, 1) for x in (d_e, d_u)]
    calls = []

    def forward(s, a, log_pi):
        calls.append((s, a, log_pi))
        return answers[(len(calls) - 1) % 2].expand(len(s), 1)

    agent.discriminator.forward = forward
    return calls


def batches(agent):
    return *agent.expert, *agent.others


# ------------------------------------------------------------------------ The two kinds of data


def test_best_episodes_are_the_demonstrations_and_leave_the_rest():
    rows = data()  # 16 episodes of 4
    agent = learner(dwbc, rows, demonstration_episodes=3)
    returns = rows["rewards"].view(16, 4).sum(1)
    best = torch.isin(rows["episodes"], returns.topk(3).indices)
    state = agent.policy.scaling.state(rows["observations"])
    for (s, a), kind in ((agent.expert, best), (agent.others, ~best)):
        torch.testing.assert_close(s, state[kind])
        torch.testing.assert_close(a, rows["actions"][kind])
    assert len(agent.expert[0]) == 12 and len(agent.others[0]) == 52
    torch.testing.assert_close(state.mean(0), torch.zeros(S), atol=1e-4, rtol=0)


def test_demonstrations_of_another_data_set(pendulum, tmp_path):
    path = str(write_hdf5(tmp_path / "expert.hdf5", pendulum, env_id="Pendulum-v1"))
    found, task = dwbc.load_dataset(path)
    rows = {key: torch.as_tensor(array) for key, array in found.items()}
    args = dwbc.Args(**tiny("dwbc", demonstrations=path, demonstration_episodes=2))
    agent = dwbc.Learner(rows, task, args)
    assert len(agent.expert[0]) == 400 and len(agent.others[0]) == len(rows["rewards"]) == 1600
    assert task["demonstrations_digest"] == task["digest"]
    with pytest.raises(SystemExit, match=r"--demonstrations .* fits no --dataset"):
        dwbc.Learner(rows, task | {"bounds": [[-1.0], [1.0]]}, args)
    with pytest.raises(SystemExit, match=r"--demonstration-episodes 16: .*15 to choose from"):
        learner(dwbc, demonstration_episodes=16)


# ------------------------------------------------------------------------------------ Networks


def test_log_density_is_that_of_a_squashed_normal():
    policy = learner(dwbc).policy
    s, a = 3 * torch.randn(32, S), 1.98 * torch.rand(32, A) - 0.99
    mu, log_sigma = policy(s)
    raw = policy.net(s)
    torch.testing.assert_close(mu, raw[:, :A])
    torch.testing.assert_close(log_sigma, raw[:, A:])
    normal = distributions.Normal(mu, log_sigma.exp())
    wanted = distributions.TransformedDistribution(normal, distributions.TanhTransform())
    found = policy.log_prob(s, a)
    assert found.shape == (32, A)  # of each dimension
    torch.testing.assert_close(found, wanted.log_prob(a), atol=1e-4, rtol=1e-4)
    for bound in (-1.0, 1.0):
        assert policy.log_prob(s, torch.full((32, A), bound)).isfinite().all()


def test_mean_and_deviation_stay_in_their_ranges():
    policy = learner(dwbc).policy
    policy.net[-1].weight.data.zero_()
    for value, wanted in ((50.0, (9, 2)), (-50.0, (-9, -5))):
        policy.net[-1].bias.data.fill_(value)
        mu, log_sigma = policy(torch.randn(4, S))
        assert (mu == wanted[0]).all() and (log_sigma == wanted[1]).all()


def test_discriminator_by_hand():
    d = dwbc.Discriminator(S, A, 16)
    s, a, log_pi = torch.randn(9, S), torch.rand(9, A), torch.randn(9, A)
    log_pi[0], log_pi[1] = 40.0, -90.0  # beyond the range
    one = torch.cat([s, a], dim=1) @ d.of_transition.weight.T + d.of_transition.bias
    scaled = ((log_pi + 20) / 30).clamp(0, 1)
    two = scaled @ d.of_policy.weight.T + d.of_policy.bias
    x = torch.cat([one, two], dim=1).clamp(min=0)
    assert one.shape == two.shape == (9, 8)
    x = (x @ d.net[1].weight.T + d.net[1].bias).clamp(min=0)
    wanted = torch.sigmoid(x @ d.net[3].weight.T + d.net[3].bias)
    torch.testing.assert_close(d(s, a, log_pi), wanted)
    d.net[3].bias.data.fill_(30.0)
    assert (d(s, a, log_pi) == 0.9).all()
    d.net[3].bias.data.fill_(-30.0)
    assert (d(s, a, log_pi) == 0.1).all()


def test_acts_by_the_mode_or_by_samples_in_the_bounds():
    low, high = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
    agent = learner(dwbc, low=low.tolist(), high=high.tolist())
    policy = agent.policy
    policy.net[-1].weight.data.zero_()
    policy.net[-1].bias.data = torch.tensor([0.2, -0.4, -3.0, -1.0])
    raw = torch.randn(4000, S)
    mean, a = policy.act(raw), policy.act(raw, deterministic=False)
    middle = torch.tanh(torch.tensor([0.2, -0.4]))
    torch.testing.assert_close(mean, (low + (middle + 1) / 2 * (high - low)).expand(4000, A))
    u = torch.atanh(2 * (a - low) / (high - low) - 1)
    torch.testing.assert_close(u.mean(0), torch.tensor([0.2, -0.4]), atol=0.03, rtol=0)
    torch.testing.assert_close(u.std(0), torch.tensor([-3.0, -1]).exp(), atol=0.02, rtol=0)
    assert (a >= low).all() and (a <= high).all()
    array = policy.act(raw[0].numpy().astype(np.float64))
    np.testing.assert_allclose(array, mean[0].numpy(), rtol=1e-5)


# ---------------------------------------------------------------------------------- The losses


@pytest.mark.parametrize("eta", [0.1, 0.5])
@pytest.mark.parametrize("pu", [True, False])
def test_discriminator_loss_by_hand(pu, eta):
    agent = learner(dwbc, pu=pu, eta=eta)
    s_e, a_e, s_u, a_u = batches(agent)
    d_e = agent.discriminator(s_e, a_e, agent.policy.log_prob(s_e, a_e))
    d_u = agent.discriminator(s_u, a_u, agent.policy.log_prob(s_u, a_u))
    wanted = -d_e.log().mean() - (1 - d_u).log().mean()
    if pu:
        wanted = -d_e.log().mean() - (1 - d_u).log().mean() / eta + (1 - d_e).log().mean()
    losses, metrics = agent.losses(s_e, a_e, s_u, a_u)
    torch.testing.assert_close(losses["discriminator"], wanted)
    torch.testing.assert_close(metrics["discriminator/expert"], d_e.mean())
    torch.testing.assert_close(metrics["discriminator/unlabelled"], d_u.mean())


def test_weights_by_hand():
    agent = learner(dwbc, alpha=7.5, eta=0.5)
    d = torch.tensor([0.1, 0.3, 0.49, 0.5, 0.8, 0.9])[:, None]
    w_e, w_u = agent.weights(d, d)
    torch.testing.assert_close(w_e[3:4, 0], torch.tensor([4.5]))
    torch.testing.assert_close(w_e[[0, -1], 0], torch.tensor([0.9444, 0.9444]), atol=1e-3, rtol=0)
    torch.testing.assert_close(w_e, 7.5 - 0.5 / (d * (1 - d)) - 1)
    torch.testing.assert_close(w_u[:, 0], torch.tensor([0.0, 0, 0, 1, 4, 9]))


def test_the_clip_keeps_the_expert_cloned():
    """Within [0.1, 0.9] no weight is negative; just outside the expert would be unlearned."""
    agent = learner(dwbc)
    assert agent.args.alpha == 7.5 and agent.args.eta == 0.5
    inside = torch.linspace(0.1, 0.9, 81)[:, None]
    assert agent.weights(inside, inside)[0].min() > 0.9
    assert agent.weights(torch.tensor([[0.95]]), inside)[0] < 0


def test_actor_loss_by_hand():
    agent = learner(dwbc)
    s_e, a_e, s_u, a_u = (x[:4] for x in batches(agent))
    d_e, d_u = torch.tensor([0.2, 0.5, 0.7, 0.9]), torch.tensor([0.2, 0.4, 0.6, 0.9])
    calls = fixed_d(agent, d_e, d_u)
    losses, metrics = agent.losses(s_e, a_e, s_u, a_u)
    nll_e = -agent.policy.log_prob(s_e, a_e).sum(1)
    nll_u = -agent.policy.log_prob(s_u, a_u).sum(1)
    w_e, w_u = 7.5 - 0.5 / (d_e * (1 - d_e)) - 1, torch.tensor([0.0, 0.0, 1.5, 9.0])
    torch.testing.assert_close(losses["actor"], (w_e * nll_e).mean() + (w_u * nll_u).mean())
    torch.testing.assert_close(metrics["weights/expert"], w_e.mean())
    torch.testing.assert_close(metrics["weights/unlabelled"], w_u.mean())
    assert metrics["weights/kept"] == 0.5
    torch.testing.assert_close(metrics["losses/nll_expert"], nll_e.mean())
    for (s, a, log_pi), rows in zip(calls, ((s_e, a_e), (s_u, a_u)), strict=True):
        assert equal((s, a), rows)
        torch.testing.assert_close(log_pi, agent.policy.log_prob(s, a))


def test_each_loss_reaches_its_own_network_alone():
    """The policy is a constant of d, d one of the policy's loss."""
    agent = learner(dwbc)
    nets = {"discriminator": agent.discriminator, "actor": agent.policy}
    losses, _ = agent.losses(*batches(agent))
    for name, loss in losses.items():
        agent.zero_grad()
        loss.backward(retain_graph=True)
        for other, net in nets.items():
            found = [p.grad is not None and bool(p.grad.any()) for p in net.parameters()]
            assert all(found) if other == name else not any(found), (name, other)


def test_unlabelled_actions_with_d_below_one_half_have_no_gradient():
    agent = learner(dwbc)
    s_e, a_e, s_u, a_u = (x[:8] for x in batches(agent))
    found = []
    for shift in (0.0, 0.5):
        fixed_d(agent, [0.6], [0.49])
        agent.zero_grad()
        agent.losses(s_e, a_e, s_u, (a_u + shift).clamp(-1, 1))[0]["actor"].backward()
        found.append(gradients(agent.policy))
    torch.testing.assert_close(*found)


# ------------------------------------------------------------------------------------ The step


def test_discriminator_learns_every_so_many_steps():
    agent = learner(dwbc, discriminator_every=3)
    both, one = agent.update_both, agent.update
    assert [agent.phase(step) for step in range(1, 7)] == [one, one, both, one, one, both]
    always = learner(dwbc, discriminator_every=1)
    assert always.phase(1) == always.update_both
    policy, d = copies(agent.policy), copies(agent.discriminator)
    agent.update()
    assert equal(d, copies(agent.discriminator)) and not equal(policy, copies(agent.policy))
    agent.update_both()
    assert not equal(d, copies(agent.discriminator))


def test_a_step_of_both_is_that_of_two_optimisers():
    """From one evaluation of d; the L2 term is the policy's alone."""
    agent = learner(dwbc, learning_rate=1e-2, weight_decay=0.5)
    alone = copy.deepcopy(agent)
    torch.manual_seed(1)
    agent.update_both()
    torch.manual_seed(1)
    rows = (*alone.sample(alone.expert), *alone.sample(alone.others))
    assert all(len(x) == 16 for x in rows)
    losses, _ = alone.losses(*rows)
    for name, net, decay in (("discriminator", "discriminator", 0), ("actor", "policy", 0.5)):
        net = getattr(alone, net)
        parts = torch.autograd.grad(losses[name], list(net.parameters()), retain_graph=True)
        for parameter, part in zip(net.parameters(), parts):
            parameter.grad = part
        after = copy.deepcopy(net)
        for parameter, part in zip(after.parameters(), parts):
            parameter.grad = part
        torch.optim.Adam(after.parameters(), lr=1e-2, weight_decay=decay).step()
        found = agent.discriminator if name == "discriminator" else agent.policy
        torch.testing.assert_close(copies(found), copies(after))


def test_batches_are_rows_of_each_kind():
    agent = learner(dwbc, demonstration_episodes=2)
    for kind in (agent.expert, agent.others):
        seen = set()
        for _ in range(40):
            for s, a in zip(*agent.sample(kind)):
                (i,) = (kind[1] == a).all(1).nonzero().flatten().tolist()
                assert torch.equal(kind[0][i], s)
                seen.add(i)
        assert len(seen) == len(kind[0])


def test_validation_by_hand():
    agent, held_out = learner(dwbc), data(24)
    s, a = agent.policy.scaling.state(held_out["observations"]), held_out["actions"]
    log_pi = agent.policy.log_prob(s, a)
    d = agent.discriminator(s, a, log_pi)
    found = agent.validate(held_out)
    assert found.keys() == {"nll", "discriminator", "rank_correlation"}
    torch.testing.assert_close(found["nll"], -log_pi.sum(1).mean())
    torch.testing.assert_close(found["discriminator"], d.mean())
    pair = (d.detach()[:, 0].numpy(), held_out["rewards"][:, 0].numpy())
    ranks = [np.argsort(np.argsort(x, kind="stable")) for x in pair]
    wanted = np.corrcoef(*ranks)[0, 1]
    assert found["rank_correlation"].item() == pytest.approx(wanted, abs=1e-4)


# ------------------------------------------------------------------------------- What it is for


def test_clones_the_expert_and_who_acts_like_him():
    """One state. The expert answers 0.5 in one episode, a quarter of the others do, too, the rest
    -0.5: with the weights the policy answers 0.5; with weights of 1 it does not."""
    a = torch.full((64, A), -0.5)
    a[:16] = 0.5
    a += 0.05 * torch.randn(64, A)
    rewards = torch.zeros(64, 1)
    rewards[:4] = 1.0
    rows = data(observations=torch.zeros(64, S), actions=a, rewards=rewards)
    acts = {}
    for kind in ("weighted", "all alike"):
        agent = learner(dwbc, dict(rows), learning_rate=1e-2, discriminator_every=1, eta=0.25)
        if kind == "all alike":
            agent.weights = lambda d_e, d_u: (torch.ones_like(d_e), 5 * torch.ones_like(d_u))
        for step in range(1, 301):
            metrics = agent.phase(step)()
        acts[kind] = agent.policy.act(np.zeros(S)).mean()
    assert acts["weighted"] > 0.4 and acts["all alike"] < 0.2, acts
    assert metrics["discriminator/expert"] > metrics["discriminator/unlabelled"] + 0.2


@pytest.mark.parametrize("flag, wrong, why", [("eta", 0.0, "between"), ("eta", 1.0, "between")])
def test_refuses_what_is_no_share(flag, wrong, why):
    with pytest.raises(SystemExit, match=rf"--{flag} .*{why}"):
        learner(dwbc, **{flag: wrong})
    with pytest.raises(SystemExit, match="--discriminator-every must be 1 or more"):
        learner(dwbc, discriminator_every=0)
