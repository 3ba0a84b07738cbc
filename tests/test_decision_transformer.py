"""What decision_transformer.py claims: no token sees its future, padding is not seen, episodes do
not mix, what acts is what was trained, and asking for more brings more."""

import types

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import load
from test_models import A, S, data, gradients, learner

dt = load("decision_transformer")
every_arch = pytest.mark.parametrize("arch", ["gpt", "gru", "mlp"])
K = 6


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def cloner(rows=None, **flags):
    return learner(dt, rows, **dict(context=K, heads=2, layers=2) | flags)


def wild(rows=None, **flags):
    """A learner whose policy is far from its start: every parameter is random."""
    found = cloner(rows, **flags)
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
def test_returns_to_go_are_sums_to_the_end(shift):
    rows = numbered(rewards=torch.randn(41, 1) + shift)
    found = dt.along_episodes(rows)
    episodes, rewards = rows["episodes"].tolist(), rows["rewards"][:, 0].tolist()
    for i, episode in enumerate(episodes):
        rest = [j for j in range(i, 41) if episodes[j] == episode]
        to_go = sum(rewards[j] for j in rest)
        assert found["returns_to_go"][i].item() == pytest.approx(to_go, abs=1e-4)
        assert found["timesteps"][i] == i - episodes.index(episode)
        assert found["ends"][i] == rest[-1] + 1
    last = found["ends"].unique() - 1
    assert torch.equal(found["returns_to_go"][last], rows["rewards"][last])


def test_returns_to_go_keep_their_precision():
    """A sum over all rows is in the hundreds of millions; an episode's is not."""
    rows = data(300_000, rewards=torch.full((300_000, 1), 1000.3))
    rows["episodes"] = torch.arange(300_000) // 100
    found = dt.along_episodes(rows)["returns_to_go"]
    wanted = 1000.3 * (100 - torch.arange(300_000) % 100)[:, None]
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)


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
    number = (s * agent.policy.state_std + agent.policy.state_mean).round().long()
    wanted = torch.arange(41)[:, None] + torch.arange(K)
    ends = dt.along_episodes(rows)["ends"]
    assert torch.equal(real, wanted < ends[:, None])
    assert torch.equal(number[..., 0][real], wanted[real])  # the rows that follow, in order
    assert (number[..., 1] == rows["episodes"][:, None])[real].all()
    assert torch.equal(a[real], rows["actions"][wanted[real]])
    step = dt.along_episodes(rows)
    assert torch.equal(t[real], step["timesteps"][wanted[real]])
    torch.testing.assert_close(
        R[real] * agent.policy.return_scale, step["returns_to_go"][wanted[real]]
    )


def test_validation_counts_every_row_once():
    rows = numbered()
    agent, seen = wild(rows), []
    loss = agent.loss
    agent.loss = lambda *x: seen.append(x) or loss(*x)
    agent.validate(rows)
    (_, R, s, _, real), (_, wrong, *_) = seen
    number = (s * agent.policy.state_std + agent.policy.state_mean).round()[..., 0][real]
    assert number.sort().values.tolist() == list(range(41))
    assert not torch.equal(R, wrong) and R.sum() == pytest.approx(wrong.sum().item(), abs=1e-3)


# ---------------------------------------------------------------------------------------- Acting


@every_arch
@pytest.mark.parametrize("forget", [1, 2, 0, K])
def test_acting_is_the_policy_on_the_last_steps(arch, forget):
    """Step by step with a memory, against the whole history cut to the steps not yet forgotten."""
    low, high = torch.tensor([[-2.0, -1.0]]), torch.tensor([[2.0, 3.0]])
    policy = wild(data() | {"action_low": low, "action_high": high}, arch=arch, forget=forget)
    policy = policy.policy
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
        s = policy.normalise(states[window].transpose(0, 1))
        wanted = policy(t, R[:, window, None] / policy.return_scale, s, actions[:, window])[:, -1]
        actions[:, i] = wanted.detach()
        torch.testing.assert_close(
            chosen, low + (wanted + 1) / 2 * (high - low), rtol=1e-4, atol=1e-5
        )
    assert memory[0].shape == (4, 3 * K - first, 2 + S + A)


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
    """Episode e lasts 3 + 2 e steps; a state says its step, a reward adds a hundredth of a^2."""

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
    monkeypatch.setitem(
        gym.registry, "Counted-v0", gym.envs.registration.EnvSpec("Counted-v0", Counted)
    )
    seen = []

    def act(s, r, memory, target):
        number, total, target = memory or (torch.arange(8) % 4, torch.zeros(8), target[:, 0])
        seen.append(len(s))
        total = total + r  # of the rewards
        return (number + target + 0.5 * total)[:, None], [number, total, target]

    spec = {"env_id": "Counted-v0", "references": (0.0, 100.0), "device": torch.device("cpu")}
    learner = types.SimpleNamespace(
        targets=lambda: {"": 0.0, "_target_2": 2.0}, policy=types.SimpleNamespace(act=act)
    )
    row = dt.evaluate(learner, spec, episodes=4, seed=10)
    for suffix, target in (("", 0), ("_target_2", 2)):
        returns = []
        for e, length in enumerate((3, 5, 7, 9)):
            total = 0.0
            for _ in range(length):
                total += e + target + 0.5 * total
            returns.append(total)
        assert row[f"return_mean{suffix}"] == pytest.approx(np.mean(returns), rel=1e-5)
        assert row[f"score{suffix}"] == row[f"return_mean{suffix}"]
        if not suffix:
            assert row["return_std"] == pytest.approx(np.std(returns), rel=1e-5)
    assert row["length_mean"] == 6
    assert seen == [8, 8, 8, 6, 6, 4, 4, 2, 2]  # nobody computes for those that ended


# -------------------------------------------------------------------------------------- Training


def test_dropout_is_on_in_training_alone():
    agent = wild(dropout=0.5)
    s, (t, R, states, a) = torch.randn(3, S), tokens()
    real = torch.ones(3, K, dtype=torch.bool)
    for _ in range(2):
        assert torch.equal(agent.policy.act(s)[0], agent.policy.act(s)[0])
        assert agent.loss(t, R, states, a, real) == agent.loss(t, R, states, a, real)
        agent.update()
    modes = []
    agent.loss = lambda *x: modes.append(agent.policy.training) or dt.Learner.loss(agent, *x)
    agent.update()
    agent.validate(data())
    assert modes == [True, False, False]
    agent.policy.train()
    assert agent.loss(t, R, states, a, real) != agent.loss(t, R, states, a, real)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_dropout_is_dropout(p):
    torch.manual_seed(0)
    dropout, x = dt.Dropout(p), torch.randn(3, 250_001, requires_grad=True)  # no multiple of 4
    y = dropout(x)
    kept = y != 0
    n = x.numel()
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(kept.float().mean().item() - (1 - p)) <= 5 * deviation + 2**-16
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


@pytest.mark.parametrize("largest", [1e-3, 0.25])
def test_the_step_is_adamws_with_the_gradient_bounded(largest):
    """Against torch's plain AdamW on the same gradient."""
    flags = dict(learning_rate=1e-2, weight_decay=0.5, warmup_steps=2, dropout=0.0)
    agent = wild(max_grad_norm=largest, **flags)
    parameters = list(agent.policy.parameters())
    before = [parameter.detach().clone() for parameter in parameters]
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
    validation = agent.validate(rows)
    assert metrics["losses/mse"] < 0.02 and validation["validation/mse"] < 0.02
    assert validation["validation/mse_wrong_returns"] > 0.5


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


def test_targets_are_the_users_the_papers_or_the_datas():
    rows = numbered((2, 2, 4), rewards=torch.tensor([[1.0], [2], [-4], [-5], [0], [0], [0], [12]]))
    targets = lambda **flags: cloner(rows, **flags).policy.targets.tolist()  # noqa: E731
    assert targets(dataset="own.npz") == [12, 7]  # returns 3, -9 and 12, mean 2
    assert targets(dataset="/home/hopper/own.npz") == [12, 7]
    assert targets(target_returns=(1.0, 2.0, -7.5)) == [1, 2, -7.5]
    for name in ("hopper-medium-replay", "data/hopper-x.hdf5", "mujoco/hopper/expert-v0"):
        assert targets(dataset=name) == [3600, 1800]
    assert targets(dataset="walker2d-medium-v2") == [5000, 2500]
    assert targets(dataset="own.npz", env_id="HalfCheetah-v5") == [12000, 6000]
    losses = -rows["rewards"].abs()
    assert cloner({**rows, "rewards": losses}, dataset="x.npz").policy.targets[0] == -3


def test_columns_of_the_targets():
    policy, s = (agent := wild(target_returns=(10.0, 2.5, -338.42))).policy, torch.randn(3, S)
    asked = agent.targets()
    assert list(asked) == ["", "_target_2.5", "_target_-338.42"]
    assert list(asked.values()) == pytest.approx([10.0, 2.5, -338.42])
    together, _ = policy.act(s, target=torch.tensor(list(asked.values()))[:, None])
    for i, target in enumerate(asked.values()):
        torch.testing.assert_close(together[i], policy.act(s[i : i + 1], target=target)[0][0])


def test_scale_of_the_returns():
    rows = numbered((2, 2), rewards=torch.tensor([[1.0], [2], [-4], [-5]]))
    deviation = np.std([3.0, 2.0, -9.0, -5.0])
    assert cloner(rows).policy.return_scale.item() == pytest.approx(deviation)
    assert cloner(rows, return_scale=1000.0).policy.return_scale == 1000
    nothing = cloner({**rows, "rewards": torch.zeros(4, 1)})
    assert nothing.policy.return_scale == 1 and nothing.update()["losses/mse"].isfinite()


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(heads=3), "--heads 3.*--hidden-dim 16"),
        (dict(forget=-1), "--forget -1"),
        (dict(forget=K + 1), "--forget 7.*--context 6"),
        (dict(heads=0), "--heads 0"),
        (dict(context=0), "--context 0"),
        (dict(layers=0), "--layers 0"),
        (dict(max_episode_length=0), "--max-episode-length 0"),
        (dict(dropout=1.0), "--dropout 1.0"),
        (dict(dropout=-0.1), "--dropout -0.1"),
        (dict(return_scale=-1.0), "--return-scale -1.0"),
    ],
)
def test_impossible_flags_are_refused(flags, message):
    with pytest.raises(SystemExit, match=message):
        cloner(**flags)
