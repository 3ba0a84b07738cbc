"""What files share in their networks and in how a policy acts, each against an independent
computation."""

import numpy as np
import pytest
import torch
import units
from conftest import FILES, NAMES, load
from units import A, S, equal, learner, split_critic

bc = load("bc")
CRITIC_FILES = [name for name in NAMES if hasattr(load(name), "TwinCritic")]
CRITIC_FILES.remove("a2po")  # its critics may be normalised: tests/test_a2po.py
VALUE_FILES = [path.stem for path in FILES if "values/q_over_ceiling" in path.read_text()]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_mlp_has_the_asked_layers(layers):
    net = bc.mlp(5, 7, 2, hidden_layers=layers)
    shapes = [tuple(part.weight.shape) for part in net if isinstance(part, torch.nn.Linear)]
    assert shapes == [(7, 5)] + [(7, 7)] * (layers - 1) + [(2, 7)]
    assert not isinstance(net[-1], torch.nn.ReLU) and net(torch.zeros(4, 5)).shape == (4, 2)


@pytest.mark.parametrize("name", CRITIC_FILES)
@pytest.mark.parametrize("layers", [2, 3])
def test_twin_critic_is_two_networks(name, layers):
    module = load(name)
    critic = module.TwinCritic(S, A, 16, hidden_layers=layers)
    s, a = torch.randn(9, S), torch.randn(9, A)
    q = critic(s, a)
    assert q.shape == (2, 9, 1) and not torch.allclose(q[0], q[1])
    for i, net in enumerate(split_critic(critic, bc)):
        torch.testing.assert_close(q[i], net(torch.cat([s, a], dim=-1)))
    if name in ("td3_bc", "cvae_bcq"):
        torch.testing.assert_close(critic(s, a, members=1), q[:1])


def test_states_are_normalised():
    scaling = bc.Scaling(units.task())
    observations = torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5
    scaling.fit(observations)
    s = scaling.state(observations)
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    wanted = torch.tensor([1.0, 1, 0])
    torch.testing.assert_close(s.std(0, correction=0), wanted, atol=1e-2, rtol=0)
    assert all(not x.requires_grad for x in scaling.buffers())


def test_scaling_takes_one_or_many_numpy_or_tensor():
    scaling = bc.Scaling(units.task(low=[-2, -1], high=[2, 3]))
    one = np.array([1.0, 2.0, 3.0])
    assert scaling.state(one).shape == (1, S) and scaling.state(one[None]).shape == (1, S)
    assert scaling.state(one.tolist()).dtype == torch.float32
    assert scaling.action(torch.zeros(1, A), one).shape == (A,)
    assert scaling.action(torch.zeros(4, A), np.zeros((4, S))).shape == (4, A)
    assert isinstance(scaling.action(torch.zeros(1, A), one), np.ndarray)
    a = scaling.action(torch.tensor([[0.5, -0.25]]), torch.zeros(S))
    torch.testing.assert_close(a, torch.tensor([1.0, 0.5]))
    wide = scaling.action(torch.tensor([[9.0, -9.0]]), torch.zeros(S))
    torch.testing.assert_close(wide, torch.tensor([2.0, -1.0]))


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_acts_in_asymmetric_bounds(name):
    """Far from the data too, as an array and one by one."""
    agent = learner(name, low=[-2.0, -1.0], high=[2.0, 3.0])
    for step in range(1, 4):
        agent.phase(step)()
    agent.eval()
    s = 100 * np.random.default_rng(0).normal(size=(200, S))
    first = lambda x: x[0] if isinstance(x, tuple) else x  # noqa: E731  (a policy with a memory)
    a = first(agent.policy.act(s))
    assert (a >= [-2, -1]).all() and (a <= [2, 3]).all()
    assert first(agent.policy.act(s[0])).shape == (A,)
    assert np.ptp(a) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_policy_is_built_from_its_task_and_flags_alone(name):
    agent = learner(name)
    module, state = load(name), agent.policy.state_dict()
    again = module.Policy(agent.given_task, agent.args)
    again.load_state_dict(state)
    assert equal(again.parameters(), agent.policy.parameters())
    assert agent.policy.actors().keys() == again.actors().keys() and "" in again.actors()


@pytest.mark.parametrize("name", VALUE_FILES)
@pytest.mark.parametrize("reward", ["any", "one"])
def test_q_is_set_against_what_rewards_allow(name, reward):
    """0: every reward the worst of the data, 1: every one the best; what cannot be told is 0."""
    rows = units.data(rewards=0.01 * torch.randn(64, 1))  # as small as the values are at first
    if reward == "one":
        rows = units.data(rewards=torch.zeros(64, 1))
    raw = {"normalize_returns": False} if name == "iql" else {}  # small rewards stay small
    agent = learner(name, rows, gamma=0.9, **raw)
    scale = getattr(agent, "reward_scale", getattr(agent.args, "reward_scale", 1.0))
    metrics, step = {}, 0
    while "values/q" not in metrics:
        step += 1
        metrics |= agent.phase(step)()
    low, high = 10 * scale * rows["rewards"].min(), 10 * scale * rows["rewards"].max()
    wanted = (metrics["values/q"] - low) / (high - low)
    if reward == "any":
        torch.testing.assert_close(metrics["values/q_over_ceiling"], wanted, atol=1e-4, rtol=1e-3)
    assert metrics["values/q_over_ceiling"].isfinite()
