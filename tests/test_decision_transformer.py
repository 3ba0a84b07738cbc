"""What decision_transformer.py claims: no token sees its future, padding is not seen, episodes do
not mix, what acts is what was trained, and asking for more brings more."""

import copy
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
import units
from conftest import load, tiny
from units import A, S, data, gradients, learner

dt = load("decision_transformer")
every_arch = pytest.mark.parametrize("arch", ["gpt", "gru", "mlp"])
K = 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cloner(rows=None, low=-1.0, high=1.0, **flags):
    return learner(dt, rows, low, high, **dict(context=K, heads=2, layers=2) | flags).eval()


def wild(rows=None, low=-1.0, high=1.0, **flags):
    """A learner whose policy is far from its start: every parameter is random."""
    found = cloner(rows, low, high, **flags)
    for parameter in found.policy.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return found


def tokens(n=3, steps=K):
    """t (n, T), R (n, T, 1), s (n, T, S), a (n, T, A)."""
    t = torch.arange(steps) + torch.randint(50, (n, 1))
    return [t, torch.randn(n, steps, 1), torch.randn(n, steps, S), torch.randn(n, steps, A)]


def numbered(lengths=(1, 3, 9, 2, 6, 20), first=4, **columns):
    """Episodes of these lengths, numbered with gaps; a state says its row and its episode."""
    episodes = torch.cat([torch.full((n,), first + 3 * i) for i, n in enumerate(lengths)])
    rows = torch.arange(len(episodes))
    states = torch.stack([rows, episodes, torch.zeros_like(rows)], dim=1).float()
    return data(len(rows), observations=states, episodes=episodes, **columns)


def numbers(agent, s):
    """What the normalised states of such data say: row and episode."""
    return (s * agent.policy.scaling.std + agent.policy.scaling.mean).round().long()


# ------------------------------------------------------------------------------- What sees what


@every_arch
@pytest.mark.parametrize("t", range(K))
def test_the_future_is_not_seen(arch, t):
    """Up to t all predictions stay, bit for bit, when a_t and all that follows is replaced."""
    policy, steps = wild(arch=arch).policy, tokens()
    before = policy(*steps)
    other = [x.clone() for x in steps]
    other[3][:, t:] += torch.randn_like(other[3][:, t:])
    for column in (0, 1, 2):
        other[column][:, t + 1 :] += 3
    after = policy(*other)
    assert torch.equal(before[:, : t + 1], after[:, : t + 1])
    if t + 1 < K:
        assert not torch.allclose(before[:, t + 1], after[:, t + 1])


@every_arch
@pytest.mark.parametrize("column", [0, 1, 2, 3])
def test_the_present_and_the_past_are_seen(arch, column):
    """A prediction depends on its own t, R, s and on every earlier token; the MLP on its own."""
    policy, steps = wild(arch=arch).policy, tokens()
    before = policy(*steps)
    for i in range(K):
        other = [x.clone() for x in steps]
        other[column][:, i] += 1
        moved = (policy(*other) - before).abs().amax((0, 2)) > 0  # (T,)
        wanted = torch.arange(K) == i if arch == "mlp" else torch.arange(K) >= i
        if column == 3:  # the action of step i comes after what is read at step i
            wanted = wanted & (torch.arange(K) > i)
        assert torch.equal(moved, wanted)


@every_arch
@pytest.mark.parametrize("before", [2, 5, 3 * K - 4])
def test_what_is_known_of_the_past_is_enough(arch, before):
    """Tokens in two calls, the second with what the first found out, against all in one."""
    policy, x = wild(arch=arch).policy, torch.randn(3, 3 * K - 1, 16)
    wanted, _ = policy.read(x, slice(-1, None))
    _, past = policy.read(x[:, :before], slice(-1, None))
    found, _ = policy.read(x[:, before:], slice(-1, None), past)
    assert found.shape == (3, 1, A)
    torch.testing.assert_close(found, wanted)
    _, other = policy.read(torch.randn_like(x[:, :before]), slice(-1, None))
    moved, _ = policy.read(x[:, before:], slice(-1, None), other)
    assert torch.allclose(moved, wanted) == (arch == "mlp")


@every_arch
@pytest.mark.parametrize("real", range(1, K))
def test_padding_is_not_seen(arch, real):
    """However much of it there is and whatever stands in it: predictions, loss and gradient."""
    agent, steps = wild(arch=arch), tokens()
    mask = (torch.arange(K) < real).expand(3, -1)
    torch.testing.assert_close(
        agent.policy(*steps)[:, :real], agent.policy(*(x[:, :real] for x in steps))
    )

    def outcome(inputs, mask):
        agent.policy.zero_grad()
        loss = agent.loss(*inputs, mask)
        loss.backward()
        return loss.detach(), gradients(agent.policy)

    wanted = outcome([x[:, :real] for x in steps], mask[:, :real])
    for garbage in (0.0, 1e3):
        padded = [x.clone() for x in steps]
        for x in padded:
            x[:, real:] = garbage
        torch.testing.assert_close(outcome(padded, mask), wanted, rtol=1e-4, atol=1e-6)


def test_the_loss_is_the_mean_over_real_steps():
    agent = wild()
    t, R, s, a = tokens(2)
    real = torch.tensor([[True] * K, [True] * 2 + [False] * (K - 2)])
    error = (agent.policy(t, R, s, a) - a).square()
    wanted = torch.cat([error[0], error[1, :2]]).mean()
    torch.testing.assert_close(agent.loss(t, R, s, a, real), wanted)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_block_is_attention_and_an_mlp(heads):
    """Against torch's own attention, with the same weights."""
    block = dt.Block(16, heads, 0.5).eval()
    other = torch.nn.MultiheadAttention(16, heads, batch_first=True)
    other.in_proj_weight.data = torch.cat([block.query.weight, block.key_value.weight]).detach()
    other.in_proj_bias.data = torch.cat([block.query.bias, block.key_value.bias]).detach()
    other.out_proj.load_state_dict(block.project.state_dict())
    x, mask = torch.randn(5, 7, 16), torch.ones(7, 7, dtype=torch.bool).tril()
    h = block.norm_1(x)
    y = x + other(h, h, h, attn_mask=~mask, need_weights=False)[0]
    y = y + block.net(block.norm_2(y))
    torch.testing.assert_close(block(x, mask, slice(None))[0], y)
    torch.testing.assert_close(block(x, mask, slice(1, None, 3))[0], y[:, 1::3])


def test_steps_beyond_the_last_embedding_share_it():
    policy = wild(max_episode_length=8).policy
    _, *others = tokens()
    at = lambda t: policy(torch.full((3, K), t), *others)  # noqa: E731
    assert torch.equal(at(7), at(500)) and not torch.allclose(at(6), at(7))


# ---------------------------------------------------------------------------------- The episodes


@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_what_the_network_sees_of_every_row(shift):
    """Returns-to-go against a plain loop, steps and ends of episodes."""
    rows = numbered(rewards=torch.randn(41, 1) + shift)
    agent = cloner(rows)
    t, R, s, a, ends = agent.columns(rows)
    episodes, rewards = rows["episodes"].tolist(), rows["rewards"][:, 0].tolist()
    for i, episode in enumerate(episodes):
        rest = [j for j in range(i, 41) if episodes[j] == episode]
        to_go = sum(rewards[j] for j in rest)
        assert R[i].item() * agent.policy.return_scale.item() == pytest.approx(to_go, abs=1e-4)
        assert t[i] == i - episodes.index(episode)
        assert ends[i] == rest[-1] + 1
    last = ends.unique() - 1
    torch.testing.assert_close(R[last] * agent.policy.return_scale, rows["rewards"][last])
    assert torch.equal(a, rows["actions"]) and numbers(agent, s)[:, 0].tolist() == list(range(41))


def loaded(tmp_path, **arrays):
    """Arrays by way of a file, as a learner gets them."""
    np.savez(tmp_path / "own.npz", **arrays)
    found, task = dt.load_dataset(str(tmp_path / "own.npz"))
    return {key: torch.as_tensor(array) for key, array in found.items()}, task


def test_the_reward_of_a_row_without_a_successor_counts(tmp_path):
    """A timeout's row is dropped where no successor is recorded; what it earned is still to come,
    and no window reaches across the gap."""
    n = 12
    ends = np.arange(n) % 4 == 3
    states, actions = np.arange(3.0 * n).reshape(n, 3), np.zeros((n, 2))
    rows, task = loaded(
        tmp_path,
        **dict(observations=states, actions=actions, rewards=np.arange(n) + 1.0),
        **dict(terminals=np.zeros(n), timeouts=ends),
    )
    assert len(rows["rewards"]) == 9
    agent = dt.Learner(rows, task, dt.Args(**tiny("decision_transformer", context=4)))
    t, R, _, _, real = agent.windows(agent.data, torch.arange(9))
    R, t = (R[..., 0] * agent.policy.return_scale)[real], t[real]
    first = [10.0, 9, 7, 9, 7, 7]  # of the windows from the first episode's rows
    assert R[:6].tolist() == pytest.approx(first) and t[:6].tolist() == [0, 1, 2, 1, 2, 2]
    assert real.sum(1).tolist() == [3, 2, 1] * 3
    assert task["target_returns"] == [42.0, pytest.approx((42 + 26) / 2)]


def test_returns_to_go_keep_their_precision(tmp_path):
    """A sum over all rows is in the hundreds of millions; an episode's is not."""
    n = 300_000
    zeros, i = np.zeros((n, 1), np.float32), np.arange(n)
    columns = dict(observations=zeros, next_observations=zeros, actions=zeros, terminals=zeros)
    rewards, timeouts = np.full(n, 1000.3), i % 100 == 99
    rows, task = loaded(tmp_path, **columns, rewards=rewards, timeouts=timeouts)
    agent = dt.Learner(rows, task, dt.Args(**tiny("decision_transformer")))
    wanted = 1000.3 * torch.as_tensor(100 - i % 100, dtype=torch.float32)[:, None]
    torch.testing.assert_close(agent.data[1] * agent.policy.return_scale, wanted, rtol=1e-5, atol=0)


def test_an_episode_is_drawn_as_often_as_it_is_long():
    lengths = (1, 3, 9, 2, 6, 20)
    agent, seen = cloner(numbered(lengths), batch_size=4000, arch="mlp"), []
    windows = agent.windows
    agent.windows = lambda rows, start: seen.append(start) or windows(rows, start)
    for _ in range(5):
        agent.update()
    drawn = torch.cat(seen).bincount(minlength=41) / 20_000
    torch.testing.assert_close(drawn, torch.full((41,), 1 / 41), atol=5e-3, rtol=0)
    shares = [x.sum().item() for x in drawn.split(lengths)]
    assert shares == pytest.approx([n / 41 for n in lengths], abs=0.01)


def test_no_window_crosses_an_episodes_end():
    rows = numbered(rewards=torch.randn(41, 1))
    agent = cloner(rows)
    t, R, s, a, real = agent.windows(agent.data, torch.arange(41))
    number, wanted = numbers(agent, s), torch.arange(41)[:, None] + torch.arange(K)
    steps, _, _, _, ends = agent.columns(rows)
    assert torch.equal(real, wanted < ends[:, None])
    assert torch.equal(number[..., 0][real], wanted[real])  # the rows that follow, in order
    assert (number[..., 1] == rows["episodes"][:, None])[real].all()
    assert torch.equal(a[real], rows["actions"][wanted[real]])
    assert torch.equal(t[real], steps[wanted[real]])
    torch.testing.assert_close(
        R[real] * agent.policy.return_scale, rows["returns_to_go"][wanted[real]]
    )


def test_validation_counts_every_row_once():
    rows = numbered()
    agent, seen = wild(rows), []
    loss = agent.loss
    agent.loss = lambda *x: seen.append(x) or loss(*x)
    found = agent.validate(rows)
    assert found.keys() == {"mse", "mse_wrong_returns"}
    for t, R, s, a, real in seen:
        assert numbers(agent, s)[..., 0][real].sort().values.tolist() == list(range(41))
        right = torch.equal(R, agent.windows(agent.data, numbers(agent, s)[:, 0, 0])[1])
        assert loss(t, R, s, a, real) == found["mse" if right else "mse_wrong_returns"]
    one, other = (x[1] for x in seen)
    assert not torch.equal(one, other)
    assert one.sum().item() == pytest.approx(other.sum().item(), abs=1e-3)


# ---------------------------------------------------------------------------------------- Acting


@every_arch
@pytest.mark.parametrize("forget", [1, 2, 0, K])
def test_acting_is_the_policy_on_the_last_steps(arch, forget):
    """Step by step with a memory, against the whole history cut to the steps not yet forgotten."""
    low, high = [-2.0, -1.0], [2.0, 3.0]
    policy = wild(low=low, high=high, arch=arch, forget=forget).policy
    low, high = torch.tensor(low), torch.tensor(high)
    states, rewards = torch.randn(3 * K, 4, S), torch.randn(3 * K, 4)
    actions, R = torch.zeros(4, 3 * K, A), torch.full((4, 3 * K), 7.0)
    memory, r, first = None, None, 0
    for i in range(3 * K):
        chosen, memory = policy.act(states[i], r, memory, target=7.0)
        r = rewards[i]
        R[:, i] = 7 - rewards[:i].sum(0)
        first += (forget or K // 2) * (i + 1 - first > K)
        window = slice(first, i + 1)
        t = torch.arange(3 * K)[window].expand(4, -1)
        s = policy.scaling.state(states[window].transpose(0, 1)).view(4, -1, S)
        wanted = policy(t, R[:, window, None] / policy.return_scale, s, actions[:, window])[:, -1]
        actions[:, i] = wanted.detach()
        torch.testing.assert_close(
            chosen, low + (wanted + 1) / 2 * (high - low), rtol=1e-4, atol=1e-5
        )
    assert memory[0].shape == (4, 3 * K - first, 2 + S + A)


@every_arch
def test_acting_takes_what_a_user_has(arch):
    """NumPy or tensors of any float type, one observation or many, rewards and targets too; actions
    are of the same kind and inside the bounds; what is handed in is not changed."""
    low, high = [-2.0, -1.0], [2.0, 3.0]
    policy = wild(low=low, high=high, arch=arch).policy
    states = np.random.default_rng(0).normal(size=(2 * K, 5, S)).astype(np.float32)
    rewards, target = np.linspace(-1, 1, 5), np.arange(5.0)
    memory, r, every = None, None, []
    for s in states:
        a, memory = policy.act(s, r, memory, target)
        assert isinstance(a, np.ndarray) and a.shape == (5, A) and a.dtype == np.float32
        assert (a >= np.float32(low)).all() and (a <= np.float32(high)).all()
        every.append((a, r, memory))
        r = rewards
    for kind in (np.float64, torch.float32, torch.float64):
        memory, r = None, None
        for s, (wanted, _, _) in zip(states, every):
            s = s.astype(kind) if kind is np.float64 else torch.as_tensor(s, dtype=kind)
            asked = torch.as_tensor(target)[:, None] if kind is torch.float64 else list(target)
            a, memory = policy.act(s, r, memory, asked)
            assert isinstance(a, np.ndarray if kind is np.float64 else torch.Tensor)
            np.testing.assert_array_equal(a, wanted)
            r = rewards if kind is np.float64 else torch.as_tensor(rewards, dtype=kind)
    memory, r = None, None
    for s, (wanted, _, _) in zip(states, every):
        a, memory = policy.act(s[2], r, memory, 2.0)
        assert a.shape == (A,)
        np.testing.assert_allclose(a, wanted[2], rtol=1e-4, atol=1e-4)
        r = 0.0
    a, r, memory = every[-2][0], rewards, every[-2][2]
    kept = [x.clone() for x in memory]
    for _ in range(2):
        np.testing.assert_array_equal(policy.act(states[-1], r, memory)[0], every[-1][0])
    assert units.equal(memory, kept)
    for parameter in policy.head.parameters():
        parameter.data *= 1000  # far out, where rounding could leave the bounds
    a = np.concatenate([policy.act(s)[0] for s in states])
    assert (a >= low).all() and (a <= high).all() and ((a == low) | (a == high)).any(0).all()


def test_a_policy_asks_for_its_first_target():
    policy, s = wild(target_returns=(3.0, -2.0)).policy, torch.randn(5, S)
    plain, _ = policy.act(s)
    torch.testing.assert_close(plain, policy.act(s, target=3.0)[0])
    assert not torch.allclose(plain, policy.act(s, target=-2.0)[0])


@every_arch
def test_an_episode_that_ended_can_be_left_out(arch):
    """The others act as if it had never been there, and as alone."""
    policy = wild(arch=arch).policy
    states, rewards = torch.randn(2 * K, 5, S), torch.randn(2 * K, 5)
    ends = [2 * K, 3, 2 * K, K + 2, 1]  # steps of each episode

    def alone(j):
        memory, r = None, None
        for i in range(ends[j]):
            action, memory = policy.act(states[i, j : j + 1], r, memory)
            r = rewards[i, j : j + 1]
            yield action[0]

    wanted = [list(alone(j)) for j in range(5)]
    running, memory, r = torch.arange(5), None, None
    for i in range(2 * K):
        actions, memory = policy.act(states[i, running], r, memory)
        for j, action in zip(running.tolist(), actions):
            torch.testing.assert_close(action, wanted[j][i], rtol=1e-4, atol=1e-5)
        stays = torch.tensor([ends[j] > i + 1 for j in running.tolist()])
        memory, running = [x[stays] for x in memory], running[stays]
        r = rewards[i, running]


class Counted(gym.Env):
    """Episode e lasts 3 + 2 e steps; a state says its step, a reward is the action."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1e6, 1e6, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.length, self.t = 3 + 2 * ((seed or 0) % 10), 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        done = self.t >= self.length
        return np.full(1, self.t, np.float32), float(action[0]), done, False, {}


def test_each_episode_keeps_its_own_memory(monkeypatch):
    """A policy that acts by the number of its episode, by all rewards so far and by its target."""
    spec = gym.envs.registration.EnvSpec("Counted-v0", Counted, max_episode_steps=9)
    monkeypatch.setitem(gym.registry, "Counted-v0", spec)
    seen = []

    def act(s, r, memory, target):
        first = (torch.arange(8) % 4, torch.zeros(8), torch.as_tensor(target).flatten())
        number, total, target = memory or first
        seen.append(s[:, 0].tolist())
        total = total + (torch.as_tensor(r) if memory else 0)  # of the rewards
        return (number + target + 0.5 * total)[:, None].numpy(), [number, total, target]

    task = dict(env="Counted-v0", env_id="Counted-v0", sizes=[1, 1], scores=(0.0, 100.0))
    policy = types.SimpleNamespace(targets={"": 0.0, "_target_2": 2.0}, act=act)
    row = dt.evaluate(policy, task, episodes=4, seed=10)
    for suffix, target in (("", 0), ("_target_2", 2)):
        returns = []
        for e, length in enumerate((3, 5, 7, 9)):
            total = 0.0
            for _ in range(length):
                total += e + target + 0.5 * total
            returns.append(total)
        assert row[f"return_mean{suffix}"] == pytest.approx(np.mean(returns), rel=1e-5)
        assert row[f"score{suffix}"] == row[f"return_mean{suffix}"]
        assert row[f"return_std{suffix}"] == pytest.approx(np.std(returns), rel=1e-5)
        assert row[f"length_mean{suffix}"] == 6
    assert len(row) == 8
    # Nobody computes for those that ended.
    assert seen == [[t] * n for t, n in enumerate([8, 8, 8, 6, 6, 4, 4, 2, 2])]


def test_a_checkpoint_is_asked_for_other_returns(pendulum_file, tmp_path, capsys):
    """--evaluate obeys --target-returns and --forget, and else asks for what the run did."""
    flags = tiny("decision_transformer", dataset=str(pendulum_file), run_dir=str(tmp_path / "run"))
    flags |= dict(steps=2, eval_every=2, eval_episodes=1)
    (row,) = dt.train(dt.Args(**flags))
    policy = dt.load_policy(tmp_path / "run")
    assert [*policy.targets] == [x[11:] for x in row if x.startswith("return_mean")]
    assert policy.targets[""] == max(policy.saved["task"]["target_returns"]) and policy.forget == 2
    assert not policy.training

    def looked_at(**more):
        return dt.train(dt.Args(evaluate=str(tmp_path / "run"), eval_episodes=1, **more))[0]

    again = looked_at(device="cpu")
    assert again.keys() == {key for key in row if "/" not in key} - {"step", "seconds"}
    assert {"return_mean", "score", "return_std_target_-7"} <= looked_at(
        target_returns=(-3.0, -7.0), device="cpu"
    ).keys()
    policy = dt.load_policy(tmp_path / "run", target_returns=(-3.0, -7.0), forget=1)
    assert policy.targets == {"": -3.0, "_target_-7": -7.0} and policy.forget == 1
    with pytest.raises(SystemExit, match="--forget"):
        looked_at(forget=5, device="cpu")


# -------------------------------------------------------------------------------------- Training


def test_dropout_is_on_in_training_alone():
    agent = wild(dropout=0.5)
    s, (t, R, states, a) = torch.randn(3, S), tokens()
    real = torch.ones(3, K, dtype=torch.bool)
    for _ in range(2):
        assert torch.equal(agent.policy.act(s)[0], agent.policy.act(s)[0])
        assert agent.loss(t, R, states, a, real) == agent.loss(t, R, states, a, real)
        agent.update()
    assert learner(dt).training  # while the loop trains; it turns that off to evaluate
    agent.policy.train()
    assert agent.loss(t, R, states, a, real) != agent.loss(t, R, states, a, real)


def test_every_dropout_is_of_the_share_asked_for():
    policy = cloner(dropout=0.37).policy
    shares = [module.p for module in policy.modules() if isinstance(module, torch.nn.Dropout)]
    assert shares == [0.37] * 3  # of the tokens, and of each block


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_dropout_is_dropout(p):
    torch.manual_seed(0)
    dropout, x = dt.Dropout(p), torch.randn(3, 250_001, requires_grad=True)  # no multiple of 4
    y = dropout(x)
    kept = y != 0
    n = x.numel()
    std = (p * (1 - p) / n) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) <= 5 * std + 2**-16
    assert torch.allclose(y[kept], x[kept] / (1 - p))
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(gradient, kept / (1 - p))  # what is dropped learns nothing
    # Units beside each other come from one number's bits, and know nothing of each other.
    dropped = (~kept).flatten().float()
    for gap in (1, 2, 3, 4, 8):
        both = (dropped[gap:] * dropped[:-gap]).mean().item()
        assert abs(both - p * p) < 5 * (p * p / n) ** 0.5 + 1e-4
    assert not p or not torch.equal(dropout(x), y)
    assert torch.equal(dropout.eval()(x), x)


def test_the_step_size_warms_up_and_is_no_number():
    agent = cloner(warmup_steps=4, learning_rate=1e-2)
    rate = agent.optimizer.param_groups[0]["lr"]
    seen = [agent.update()["charts/learning_rate"].item() for _ in range(6)]
    assert seen == pytest.approx([0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01])
    assert isinstance(rate, torch.Tensor) and rate is agent.optimizer.param_groups[0]["lr"]
    assert cloner(warmup_steps=0).update()["charts/learning_rate"].item() == pytest.approx(1e-4)


def test_a_checkpoint_knows_how_far_the_warm_up_is():
    """A new learner with the old one's state and its optimiser's goes on as the old one does."""
    agents = [cloner(warmup_steps=20, learning_rate=1e-2) for _ in range(2)]
    old, new = agents
    for _ in range(4):
        old.update()
    new.load_state_dict(copy.deepcopy(old.state_dict()))
    state = copy.deepcopy(old.optimizer.state_dict()["state"])
    new.optimizer.load_state_dict(new.optimizer.state_dict() | {"state": state})
    new.data = old.data
    for step in range(5, 8):
        rates = []
        for agent in agents:
            torch.manual_seed(step)
            rates.append(agent.update()["charts/learning_rate"].item())
        assert rates == pytest.approx([step * 1e-2 / 20] * 2)
    assert units.equal(units.copies(old), units.copies(new))


@pytest.mark.parametrize("largest", [1e-3, 0.25])
def test_the_step_is_adamws_with_the_gradient_bounded(largest):
    """Against torch's plain AdamW on the same gradient."""
    flags = dict(learning_rate=1e-2, weight_decay=0.5, warmup_steps=2, dropout=0.0)
    agent = wild(max_grad_norm=largest, **flags)
    parameters = list(agent.policy.parameters())
    before = units.copies(agent.policy)
    drawn = []
    windows = agent.windows
    agent.windows = lambda *x: drawn.append(windows(*x)) or drawn[-1]
    other = [torch.nn.Parameter(x) for x in before]
    plain = torch.optim.AdamW(other, lr=5e-3, weight_decay=0.5)  # half-way through the warm-up
    norm = agent.update()["gradients/norm"]
    with torch.no_grad():
        for parameter, value in zip(parameters, before):
            updated = parameter.clone()
            parameter.copy_(value)
            value.copy_(updated)
    loss = agent.loss(*drawn[0])
    found = torch.autograd.grad(loss, parameters)
    size = torch.cat([x.flatten() for x in found]).norm()
    assert size > largest
    torch.testing.assert_close(norm, size)
    for parameter, start, gradient in zip(other, parameters, found):
        parameter.data = start.detach().clone()
        parameter.grad = gradient * largest / size
    plain.step()
    for parameter, value in zip(other, before):
        torch.testing.assert_close(parameter.data, value, rtol=1e-4, atol=1e-6)


def test_the_first_update_draws_with_dropout():
    """The gradient of a step is that of the loss with dropout on, of every parameter."""
    agent = wild(dropout=0.5, warmup_steps=0)
    rows = agent.windows(agent.data, torch.randint(64, (16,)))
    quiet = units.gradient_of(agent.loss(*rows), agent.policy)
    agent.windows = lambda *_: rows
    metrics = agent.update()
    assert metrics.keys() == {"losses/mse", "gradients/norm", "charts/learning_rate"}
    assert gradients(agent.policy).shape == quiet.shape
    assert metrics["losses/mse"] != agent.loss(*rows)


# ------------------------------------------------------------------------------- What it is for


def good_and_bad(sign=1.0, n=64, length=8):
    """Half of the episodes do 0.7 and are paid 1 a step, half do -0.7 and lose 1; `sign` -1 turns
    all rewards negative and the bad ones twice so."""
    good = (torch.arange(n) % 2).float().repeat_interleave(length)[:, None]
    rewards = 2 * good - 1 if sign > 0 else good - 2
    return data(
        n * length,
        observations=torch.zeros(n * length, S),
        actions=(1.4 * good - 0.7).expand(-1, A).clone(),
        rewards=rewards,
        episodes=torch.arange(n).repeat_interleave(length),
    )


@every_arch
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_it_does_what_brings_the_return_asked_for(arch, sign):
    rows = good_and_bad(sign)
    flags = dict(arch=arch, hidden_dim=32, learning_rate=3e-3, batch_size=64, dropout=0.0)
    agent = cloner(rows, **flags, warmup_steps=20, return_scale=4.0)
    for _ in range(150):
        metrics = agent.update()
    best, worst = (8.0, -8.0) if sign > 0 else (-8.0, -16.0)
    s = torch.zeros(5, S)
    for target, pay, wanted in ((best, best / 8, 0.7), (worst, worst / 8, -0.7)):
        memory, r = None, None
        for _ in range(8):
            a, memory = agent.policy.act(s, r, memory, target=target)
            torch.testing.assert_close(a, torch.full((5, A), wanted), atol=0.15, rtol=0)
            r = torch.full((5,), pay)
    with torch.no_grad():
        validation = agent.validate(rows)
    assert metrics["losses/mse"] < 0.02 and validation["mse"] < 0.02
    assert validation["mse_wrong_returns"] > 0.5


@every_arch
def test_only_a_policy_with_a_past_remembers(arch):
    """The first state says which action is due later on: half of the steps cannot be known without
    it, and the MLP answers 0 there."""
    n, length = 64, K
    sign = (2 * (torch.arange(n) % 2) - 1).float()
    states = torch.zeros(n, length, S)
    states[:, 0, 0] = sign
    rows = data(
        n * length,
        observations=states.flatten(0, 1),
        actions=0.8 * sign.repeat_interleave(length)[:, None].expand(-1, A),
        rewards=torch.zeros(n * length, 1),
        episodes=torch.arange(n).repeat_interleave(length),
    )
    flags = dict(hidden_dim=32, learning_rate=3e-3, batch_size=64, dropout=0.0, warmup_steps=20)
    agent = cloner(rows, arch=arch, **flags)
    memory, r = None, None
    for _ in range(200):
        agent.update()
    for i in range(length):
        a, memory = agent.policy.act(states[:, i], r, memory)
        r = torch.zeros(n)
        knows = i == 0 or arch != "mlp"
        error = (a - 0.8 * sign[:, None]).abs().mean()
        assert (error < 0.2) == knows, (i, error)


# ------------------------------------------------------------------------------ Targets and flags


def of_task(rows, env_id, **flags):
    """A learner of data that are evaluated in another environment, and its task."""
    task = units.task(rows) | {"env_id": env_id}
    args = dt.Args(**tiny("decision_transformer", **flags))
    return dt.Learner(rows, task, args), task


THREE = dict(lengths=(2, 2, 4))  # of the returns 3, -9 and 12, of mean 2
THREE |= dict(rewards=torch.tensor([[1.0], [2], [-4], [-5], [0], [0], [0], [12]]))


def test_targets_are_the_users_the_papers_or_the_datas(capsys):
    rows = numbered(**THREE)
    targets = lambda env="none", **flags: [*of_task(rows, env, **flags)[0].policy.targets.values()]  # noqa: E731
    own = [12, 7]
    for name in ("own.npz", "/home/hopper/own.npz", "grasshopper", "hopper-sparse.hdf5"):
        assert targets(dataset=name) == own
    assert targets("Pendulum-v1", dataset="hopper-medium-replay") == own
    assert targets("HopperBulletEnv-v0") == own
    assert targets(target_returns=(1.0, 2.0, -7.5)) == [1, 2, -7.5]
    assert capsys.readouterr().out == ""
    for name in ("Hopper-v5", "Hopper-v4"):
        assert targets(name, dataset="own.npz") == [3600, 1800]
        assert targets(name, target_returns=(1.0, 2.0, -7.5)) == [1, 2, -7.5]
    assert targets("Walker2d-v5") == [5000, 2500]
    assert targets("HalfCheetah-v5", dataset="hopper-medium-replay") == [12000, 6000]
    losses = numbered((2, 2, 4), rewards=-THREE["rewards"].abs())
    agent, task = of_task(losses, "none")
    assert agent.policy.targets[""] == -3  # of -3, -9 and -12
    assert [type(x) for x in task["target_returns"]] == [float, float]  # saved with the checkpoint


def test_more_than_the_data_have_is_not_asked_for_without_a_word(capsys):
    for best, speaks in ((1799.0, True), (1801.0, False), (-5.0, True)):
        rows = numbered((2, 2), rewards=torch.tensor([[best - 1], [1], [best - 20], [0]]))
        of_task(rows, "Hopper-v5")
        said = capsys.readouterr().out
        assert said.count("\n") == speaks
        if speaks:
            assert "3600" in said and f"{best:g}" in said and "--target-returns" in said
        of_task(rows, "Hopper-v5", target_returns=(9e9,))
        of_task(rows, "none")
        assert capsys.readouterr().out == ""


def test_columns_of_the_targets():
    policy, s = wild(target_returns=(10.0, 2.5, -338.42)).policy, torch.randn(3, S)
    asked = policy.targets
    assert list(asked) == ["", "_target_2.5", "_target_-338.42"]
    assert list(asked.values()) == pytest.approx([10.0, 2.5, -338.42])
    together, _ = policy.act(s, target=torch.tensor(list(asked.values()))[:, None])
    for i, target in enumerate(asked.values()):
        torch.testing.assert_close(together[i], policy.act(s[i : i + 1], target=target)[0][0])
    assert policy.actors().keys() == asked.keys()
    for suffix, act in policy.actors().items():
        torch.testing.assert_close(act(s)[0], policy.act(s, target=asked[suffix])[0])


def test_scale_of_the_returns():
    rows = numbered((2, 2), rewards=torch.tensor([[1.0], [2], [-4], [-5]]))
    std = np.std([3.0, 2.0, -9.0, -5.0])
    assert cloner(rows).policy.return_scale.item() == pytest.approx(std)
    assert cloner(rows, return_scale=1000.0).policy.return_scale == 1000
    nothing = cloner(numbered((2, 2), rewards=torch.zeros(4, 1)))
    assert nothing.policy.return_scale == 1 and nothing.update()["losses/mse"].isfinite()


def test_the_scale_of_the_returns_is_in_the_checkpoint():
    agent = wild(return_scale=37.0)
    rebuilt = dt.Policy(units.task() | {"target_returns": [0.0]}, agent.args)
    rebuilt.load_state_dict(agent.policy.state_dict())
    s = np.random.default_rng(0).normal(size=(4, S))
    for target in (0.0, 50.0):
        one, other = (policy.act(s, target=target)[0] for policy in (agent.policy, rebuilt.eval()))
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(heads=3), "--heads.*--hidden-dim"),
        (dict(forget=-1), "--forget"),
        (dict(forget=K + 1), "--forget.*--context"),
        (dict(heads=0), "--heads"),
        (dict(context=0), "--context"),
        (dict(layers=0), "--layers"),
        (dict(max_episode_length=0), "--max-episode-length"),
        (dict(dropout=1.0), "--dropout"),
        (dict(dropout=-0.1), "--dropout"),
        (dict(return_scale=-1.0), "--return-scale"),
        (dict(warmup_steps=-1), "--warmup-steps"),
        (dict(max_grad_norm=0.0), "--max-grad-norm"),
    ],
)
def test_impossible_flags_are_refused(flags, message):
    with pytest.raises(SystemExit, match=message):
        cloner(**flags)
