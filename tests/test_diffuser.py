"""What diffuser.py claims, each against an independent computation: the noising and its posterior,
plans that begin where one is, a model that sees the whole plan, a return that pulls."""

import math

import numpy as np
import pytest
import torch
import units
from conftest import load, tiny
from units import A, S, copies, data, equal, gradient_of, learner

diffuser = load("diffuser")
LOW, HIGH = torch.tensor([-2.0, -1.0]), torch.tensor([2.0, 3.0])
H, D = 4, A + S
UNIT = dict(execute=1, diffusion_steps=3, guide_steps=2, guide_stop=2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def planner(rows=None, low=-1.0, high=1.0, **flags):
    return learner(diffuser, rows, low, high, **UNIT | flags)


class Net(torch.nn.Module):
    """A function in a network's place."""

    def __init__(self, of):
        super().__init__()
        self.of = of

    def forward(self, x, i):
        return self.of(x, i)


def oracle(policy, x):
    """The network that makes x_θ right: plans (B, H, D), whatever their noise."""

    def net(noised, i):
        signal, sigma = policy.signal[i].view(-1, 1, 1), policy.sigma[i].view(-1, 1, 1)
        return (x - signal * noised) / sigma

    return Net(net)


def pull(of=lambda x: x):
    """A return that is the sum over a plan of what `of` says of every number in it."""
    return Net(lambda x, i: of(x).sum((1, 2)))


# ------------------------------------------------------------------------------------ Networks


def local(net):
    """The same network without its norms, which mix all steps of a plan anyway."""
    for module in net.modules():
        for key, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, key, torch.nn.Identity())
    return net


@pytest.mark.parametrize("horizon, multipliers", [(8, (1, 2)), (32, (1, 2, 4, 8))])
@pytest.mark.parametrize("norms", [True, False])
def test_the_model_sees_the_whole_plan(horizon, multipliers, norms):
    """From the last step to the first and back, also without the norms; convolutions of the finest
    level alone would not reach."""
    dims = [D, *(8 * x for x in multipliers)]
    net = diffuser.UNet(dims, 5)
    net = net if norms else local(net)
    x = torch.randn(2, horizon, D, requires_grad=True)
    out = net(x, 3)
    assert out.shape == x.shape
    for here, there in ((-1, 0), (0, -1)):
        [gradient] = torch.autograd.grad(out[0, here].sum(), x, retain_graph=True)
        assert (gradient[0, there] != 0).all() and (gradient[1] == 0).all()


def test_the_value_sees_the_whole_plan():
    net = local(diffuser.Value([D, 8, 16, 32], 5, 16))
    x = torch.randn(3, 16, D, requires_grad=True)
    J = net(x, 2)
    assert J.shape == (3,)
    [gradient] = torch.autograd.grad(J[0], x)
    assert (gradient[0] != 0).all() and (gradient[1:] == 0).all()


@pytest.mark.parametrize("kind", ["model", "value"])
def test_networks_tell_the_steps_apart(kind):
    """One number for all plans is the same as a number for each."""
    net = getattr(planner(diffusion_steps=7), kind)
    x, i = torch.randn(4, H, D), torch.tensor([0, 3, 3, 6])
    found = net(x, i)
    for k, step in enumerate(i.tolist()):
        torch.testing.assert_close(found[k : k + 1], net(x[k : k + 1], step))
    assert not torch.allclose(net(x, 3), net(x, 4), atol=1e-4)


def test_levels_are_halved_and_as_wide_as_asked():
    net = diffuser.UNet([D, 8, 16, 32], 5)
    found, noise = net.descend(torch.randn(2, 16, D), 1)
    assert [tuple(x.shape) for x in found] == [(2, 8, 16), (2, 16, 8), (2, 32, 4)]
    assert noise.shape == (1, 8)
    assert [up[0].first[0].in_channels for up in net.up] == [64, 32]  # beside what is handed across
    assert [up[1].second[0].out_channels for up in net.up] == [16, 8]


def test_the_right_side_sees_what_the_left_one_found():
    """Also where nothing comes through the middle; the finest level hands nothing across."""
    net = diffuser.UNet([D, 8, 16, 32], 5)
    for block in net.middle:
        block.forward = lambda x, noise: 0 * x
    found, noise = net.descend(torch.randn(2, 16, D), 1)
    found = [x.detach().requires_grad_() for x in found]
    net.descend = lambda x, i: ([*found], noise)
    gradients = torch.autograd.grad(net(None, 1).square().sum(), found, allow_unused=True)
    assert gradients[0] is None and all(x.abs().max() > 0 for x in gradients[1:])


def test_the_waves_of_the_steps():
    """Sines and cosines of frequencies from 1 down to 1 / 10,000."""
    waves = diffuser.UNet([D, 16], 30).waves
    frequency = 10_000 ** (-torch.arange(8) / 7)
    torch.testing.assert_close(waves[3], torch.cat([(3 * frequency).sin(), (3 * frequency).cos()]))


# --------------------------------------------------------------------------- The noising chain


@pytest.mark.parametrize("steps", [1, 5, 20])
def test_schedule_is_the_cosine(steps):
    """ᾱ_i = cos²(π / 2 · (i / T + s) / (1 + s)) / cos²(π / 2 · s / (1 + s)), s = 0.008, where no β
    is above 0.999."""
    policy = planner(diffusion_steps=steps).policy
    f = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    abar = 1.0
    for i in range(steps):
        abar *= max(f[i + 1] / f[i], 0.001)
        assert policy.signal[i].item() ** 2 == pytest.approx(abar, rel=1e-4)
        assert policy.sigma[i].item() ** 2 == pytest.approx(1 - abar, rel=1e-4)
    assert policy.signal[-1] < 0.1 and len(policy.signal) == steps


def test_posterior_is_bayes():
    """p(x_{i-1} | x_i, x) on a grid: prior N(√ᾱ_{i-1} x, 1 - ᾱ_{i-1}) times likelihood
    N(√α_i x_{i-1}, β_i)."""
    policy = planner(diffusion_steps=8).policy
    grid = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    x, x_i = 0.7, -0.4
    for i in range(1, 8):
        before, abar = policy.signal[i - 1].double() ** 2, policy.signal[i].double() ** 2
        alpha = abar / before
        log = -((grid - before.sqrt() * x) ** 2) / (2 * (1 - before))
        log = log - (x_i - alpha.sqrt() * grid) ** 2 / (2 * (1 - alpha))
        p = log.softmax(0)
        mean = (p * grid).sum()
        variance = (p * (grid - mean) ** 2).sum()
        found = policy.mean_x0[i] * x + policy.mean_xi[i] * x_i
        assert found.item() == pytest.approx(mean.item(), abs=1e-3)
        assert policy.variance[i].item() == pytest.approx(variance.item(), abs=1e-3)
    assert policy.variance[0] == 0 and policy.mean_x0[0] == pytest.approx(1)
    assert policy.mean_xi[0] == 0


def test_with_a_perfect_model_sampling_returns_the_plan():
    policy = planner(diffusion_steps=6, guidance=0.0).policy
    x = torch.randn(5, H, D)
    policy.model = oracle(policy, x)
    found = policy(torch.randn(5, H, D), x[:, 0, A:])
    torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-4)


def test_x_theta_passes_through_what_has_little_noise():
    """√ᾱ_i x_i + √(1 - ᾱ_i) times the network; its guess of the plan is exact if the network is."""
    policy = planner(diffusion_steps=9).policy
    x, noised, i = torch.randn(4, H, D), torch.randn(4, H, D), torch.tensor([0, 2, 5, 8])
    torch.testing.assert_close(policy.guess(noised, i, oracle(policy, x)), x, atol=1e-5, rtol=1e-4)
    found = policy.guess(noised, i, lambda x, i: torch.ones_like(x))
    for k, step in enumerate(i.tolist()):
        wanted = policy.signal[step] * noised[k] + policy.sigma[step]
        torch.testing.assert_close(found[k], wanted)


def test_sampling_has_the_noise_of_the_chain():
    """Plans of independent N(0, v) numbers, for which the best guess is known in closed form: their
    samples have that variance."""
    policy = planner(diffusion_steps=100, guidance=0.0).policy
    v = 0.25

    def net(x, i):  # E[x | x_i] = √ᾱ_i v / (ᾱ_i v + 1 - ᾱ_i) x_i
        signal, sigma = policy.signal[i], policy.sigma[i]
        return (signal * v / (signal**2 * v + sigma**2) - signal) / sigma * x

    policy.model = Net(net)
    x = policy(torch.randn(4000, H, D), torch.zeros(4000, S))
    free = torch.cat([x[:, 1:].flatten(), x[:, 0, :A].flatten()])
    assert free.std().item() == pytest.approx(v**0.5, rel=0.05)
    assert abs(free.mean().item()) < 0.02


# ------------------------------------------------------------------------ Inpainting, guidance


@pytest.mark.parametrize("guidance", [0.0, 5.0])
def test_the_first_state_is_given_at_every_step(guidance):
    """Whatever the networks see begins where one is, exactly; so does the plan."""
    policy = planner(guidance=guidance, diffusion_steps=6, guide_stop=0).policy
    s, seen = torch.randn(5, S), []
    for net in (policy.model, policy.value):
        net.register_forward_pre_hook(lambda module, x: seen.append(x[0].detach().clone()))
    x = policy(torch.randn(5, H, D), s)
    assert len(seen) == 6 * (1 + 2 * (guidance > 0))  # what pulls at nothing is not computed
    for plan in (*seen, x):
        assert torch.equal(plan[:, 0, A:], s)
    assert not torch.equal(seen[0][:, 1:], seen[-1][:, 1:])


def test_inpainting_touches_nothing_else():
    policy, x, s = planner().policy, torch.randn(5, H, D), torch.randn(5, S)
    found = policy.inpaint(x, s)
    assert torch.equal(found[:, 0, A:], s) and torch.equal(found[:, 0, :A], x[:, 0, :A])
    assert torch.equal(found[:, 1:], x[:, 1:])


def test_guidance_is_the_gradient_times_the_variance():
    """A return with gradient 1 moves every free number by c Σ_i, as often as asked, before the mean
    is taken; the last steps are left alone."""
    flags = dict(diffusion_steps=6, guidance=0.3, guide_steps=2, guide_stop=2)
    policy = planner(**flags).policy
    policy.value, policy.model = pull(), Net(lambda x, i: torch.zeros_like(x))
    x, s = torch.randn(5, H, D), torch.randn(5, S)
    found = policy(x, s, torch.zeros_like)
    for i in reversed(range(6)):
        x = policy.inpaint(x, s)
        if i >= 2:
            x = policy.inpaint(x + 2 * 0.3 * policy.variance[i], s)
        x = (policy.mean_x0[i] * policy.signal[i] + policy.mean_xi[i]) * x
    torch.testing.assert_close(found, policy.inpaint(x, s))


def test_every_pull_has_its_own_gradient():
    policy = planner(diffusion_steps=3, guidance=0.5, guide_steps=2, guide_stop=2).policy
    policy.value = pull(lambda x: -0.5 * x.square())
    policy.model = oracle(policy, torch.zeros(5, H, D))
    x, s = torch.randn(5, H, D), torch.zeros(5, S)
    found = policy(x, s, torch.zeros_like)
    wanted = x * (1 - 0.5 * policy.variance[2]) ** 2
    for i in (2, 1, 0):
        wanted = policy.mean_xi[i] * wanted
    torch.testing.assert_close(found, policy.inpaint(wanted, s), atol=1e-6, rtol=1e-4)


def test_guidance_raises_the_return_of_samples():
    """Trained on plans whose return is the sum of their actions: the more guidance the more of
    them, and the value says so."""
    n = 512
    actions = 0.3 * torch.randn(n, A)
    rows = data(n, actions=actions, rewards=actions.sum(1, keepdim=True))
    rows["terminals"] = torch.zeros(n, 1)
    flags = dict(learning_rate=3e-3, ema_rate=0.05, batch_size=64, plans=1, diffusion_steps=5)
    agent = planner(rows, gamma=1.0, **flags)
    for _ in range(250):
        agent.update()
    policy, s = agent.policy, torch.randn(200, S)
    found, values = [], []
    for c in (0.0, 5.0, 20.0):
        policy.args.guidance = c
        torch.manual_seed(1)
        x = policy(torch.randn(200, H, D), s)
        found.append(x[:, :, :A].sum((1, 2)).mean().item())
        values.append(policy.value(x, 0).mean().item())
    assert found[0] + 0.3 < found[1] and found[1] + 0.3 < found[2], found
    assert values[0] < values[1] < values[2], values


def test_the_best_plan_is_followed():
    """Of each state's plans the one with the largest value, without its last noise."""
    policy = planner(plans=5, guidance=0.0, diffusion_steps=3).policy
    made, steps = [], []
    forward = policy.forward
    policy.forward = lambda *args: made.append(forward(*args)) or made[0]
    policy.value.forward = lambda x, i: steps.append(i) or x[:, 1:, 0].sum(1)
    s = torch.randn(3, S)
    found = policy.plan(s)
    assert made[0].shape == (15, H, D) and steps == [0]
    assert torch.equal(made[0].view(3, 5, H, D)[:, :, 0, A:], s[:, None].expand(-1, 5, -1))
    for k in range(3):
        of = made[0][5 * k : 5 * k + 5]
        assert torch.equal(found[k], of[of[:, 1:, 0].sum(1).argmax()])


# ----------------------------------------------------------------------------------- The data


def marked(n=12, terminals=(3, 11), **columns):
    """Three episodes of four steps, rows told by their numbers."""
    rows = data(n, actions=torch.arange(n)[:, None].repeat(1, A) / 100, **columns)
    rows["terminals"] = torch.zeros(n, 1)
    rows["terminals"][list(terminals)] = 1
    return rows


@pytest.mark.parametrize("horizon", [2, 4])
def test_plans_of_the_data_end_with_their_episode(horizon):
    """After a terminal a plan rests in the terminal state; after a timeout there is none."""
    rows = marked()
    agent = planner(rows, horizon=horizon, multipliers=(1, 2))
    columns = agent.columns(rows)
    assert {len(x) for x in columns[2:]} == {8 + 5 - horizon}
    found, _ = agent.windows(columns, torch.arange(13 - horizon))
    s, end = map(agent.policy.scaling.state, (rows["observations"], rows["next_observations"]))
    starts = [k for k in range(12) if k // 4 != 1 or k % 4 + horizon <= 4]
    assert found.shape == (len(starts), horizon, D)
    for plan, k in zip(found, starts):
        for h in range(horizon):
            row, last = k + h, 4 * (k // 4) + 3
            if row <= last:
                assert torch.equal(plan[h], torch.cat([rows["actions"][row], s[row]]))
            else:
                assert torch.equal(plan[h], torch.cat([torch.zeros(A), end[last]]))


def test_a_terminal_state_that_is_not_recorded_is_no_other_episodes():
    rows = marked(recorded=torch.arange(12) % 4 != 3)
    agent = planner(rows)
    x, _ = agent.windows(agent.data, torch.tensor([3]))
    s = agent.policy.scaling.state(rows["observations"])[3]
    assert torch.equal(x[0, 1:], torch.cat([torch.zeros(A), s]).expand(H - 1, D))


@pytest.mark.parametrize("gamma, penalty", [(0.5, 0.0), (1.0, -7.0)])
def test_return_of_a_plan(gamma, penalty):
    """All that the episode brings from its first step on, discounted, against a plain loop."""
    rows = marked()
    agent = planner(rows, gamma=gamma, termination_penalty=penalty, horizon=2)
    J = agent.columns(rows)[-1]
    starts = [k for k in range(12) if k // 4 != 1 or k % 4 <= 2]
    wanted = []
    for k in starts:
        r = (rows["rewards"] + penalty * rows["terminals"])[k : 4 * (k // 4) + 4, 0]
        wanted.append(sum(gamma**i * x for i, x in enumerate(r.tolist())))
    torch.testing.assert_close(J, torch.tensor(wanted))
    mean, std = agent.policy.returns
    assert mean.item() == pytest.approx(np.mean(wanted), abs=1e-4)
    assert std.item() == pytest.approx(np.std(wanted), abs=2e-3)
    _, normal = agent.windows(agent.data, torch.arange(len(starts)))
    torch.testing.assert_close(normal, (J - mean) / std)


def test_the_reward_of_a_row_without_a_successor_counts(tmp_path):
    ends, states = np.arange(12) % 4 == 3, np.arange(36.0).reshape(12, 3)
    arrays = dict(observations=states, actions=np.zeros((12, 2)), rewards=np.arange(12) + 1.0)
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.zeros(12), timeouts=ends)
    rows, task = diffuser.load_dataset(str(tmp_path / "own.npz"))
    rows = {key: torch.as_tensor(array) for key, array in rows.items()}
    flags = tiny("diffuser", execute=1, gamma=0.5, horizon=2, multipliers=(1,))
    agent = diffuser.Learner(rows, task, diffuser.Args(**flags))
    J = agent.columns(rows)[-1]
    assert J[:2].tolist() == [1 + 0.5 * 2 + 0.25 * 3 + 0.125 * 4, 2 + 0.5 * 3 + 0.25 * 4]


def test_an_episode_too_short_for_a_plan():
    rows = data(8, terminals=torch.zeros(8, 1))
    planner(rows, horizon=4)
    with pytest.raises(SystemExit, match="No episode has --horizon"):
        planner(rows, horizon=8)


def test_actions_and_states_lie_where_they_should():
    """a_t first, then s_t, normalised."""
    rows = data(observations=5 + 3 * torch.randn(64, S))
    agent = planner(rows)
    x = agent.data[0]
    assert x[:, A:].std(0, correction=0).mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(x[0], torch.cat([rows["actions"][0], agent.policy.scaling.state(
        rows["observations"][0])[0]]))  # fmt: skip


# ----------------------------------------------------------------------------------- Learning


def test_losses_against_a_plain_computation(monkeypatch):
    """The same noised plans for model and value, first state given; weights w."""
    agent = planner(action_weight=7.0, diffusion_steps=5)
    x, J = agent.windows(agent.data, torch.arange(6))
    noise, i = torch.randn_like(x), torch.tensor([0, 1, 2, 3, 4, 2])
    monkeypatch.setattr(diffuser.torch, "randint", lambda *a, **k: i)
    monkeypatch.setattr(diffuser.torch, "randn_like", lambda x: noise)
    seen = []
    model = lambda x, i: seen.append((x, i)) or agent.model(x, i)  # noqa: E731
    value = lambda x, i: seen.append((x, i)) or agent.value(x, i)  # noqa: E731
    found = agent.losses(x, J, model, value)
    total = first = worth = 0.0
    for k in range(6):
        signal, sigma = agent.policy.signal[i[k]], agent.policy.sigma[i[k]]
        noised = signal * x[k] + sigma * noise[k]
        noised[0, A:] = x[k, 0, A:]
        for plans, steps in seen:
            torch.testing.assert_close(plans[k], noised)
            assert steps[k] == i[k]
        guess = signal * noised + sigma * agent.model(noised[None], i[k])[0]
        error = (guess - x[k]) ** 2
        total += (error[1:].sum() + 7 * error[0, :A].sum()) / (6 * H * D)
        first += error[0, :A].mean() / 6
        worth += (agent.value(noised[None], i[k])[0] - J[k]) ** 2 / 6
    assert len(seen) == 2
    torch.testing.assert_close(found["model"], total)
    torch.testing.assert_close(found["first_action"], first)
    torch.testing.assert_close(found["value"], worth)


def test_each_loss_reaches_its_own_network():
    agent = planner()
    plans = agent.windows(agent.data, torch.arange(6))
    for key, own, other in (("model", "model", "value"), ("value", "value", "model")):
        loss = agent.losses(*plans, agent.model, agent.value)[key]
        assert gradient_of(loss, getattr(agent, own)).abs().sum() > 0
        loss = agent.losses(*plans, agent.model, agent.value)[key]
        found = torch.autograd.grad(loss, list(getattr(agent, other).parameters()), allow_unused=1)
        assert all(gradient is None for gradient in found)


def test_an_update_moves_both_networks_and_their_slow_copies():
    agent = planner(ema_rate=0.1, learning_rate=1e-2)
    for online, slow in ((agent.model, agent.policy.model), (agent.value, agent.policy.value)):
        assert equal(online.parameters(), slow.parameters())
        assert all(x.requires_grad for x in online.parameters())
        assert not any(x.requires_grad for x in slow.parameters())
    before = copies(agent.policy)
    agent.update()
    for online, slow in ((agent.model, agent.policy.model), (agent.value, agent.policy.value)):
        assert not equal(online.parameters(), slow.parameters())
    new = [*copies(agent.policy.model), *copies(agent.policy.value)]
    online = [*copies(agent.model), *copies(agent.value)]
    for old, slow, now in zip(before, new, online):
        torch.testing.assert_close(slow, old + 0.1 * (now - old))


def test_all_plans_are_drawn_evenly():
    agent, seen = planner(batch_size=4000), []
    windows = agent.windows
    agent.windows = lambda columns, i: seen.append(i) or windows(columns, i)
    agent.update()
    share = seen[0].bincount(minlength=len(agent.data[2])) / 4000
    assert share.min() > 0.5 / len(share) and share.max() < 2 / len(share)


def test_validation_is_of_the_slow_copies():
    agent = planner(ema_rate=0.0, learning_rate=1e-2)
    torch.manual_seed(3)
    before = agent.validate(data(64))
    for _ in range(3):
        agent.update()
    rows = data(64)
    torch.manual_seed(3)
    first = agent.validate(rows)
    torch.manual_seed(3)
    assert agent.validate(rows) == first and first.keys() == before.keys()
    for parameter in agent.model.parameters():
        parameter.data.zero_()
    torch.manual_seed(3)
    assert agent.validate(rows) == first
    assert first.keys() == {"model", "value", "first_action"}


# ------------------------------------------------------------------------------------- Acting


def test_act_does_the_plans_first_action():
    """Raw states in, actions in asymmetric bounds out."""
    rows = data(observations=3 + 2 * torch.randn(64, S))
    policy = planner(rows, LOW.tolist(), HIGH.tolist(), plans=1).policy
    plans, seen = torch.randn(5, H, D), []
    policy.plan = lambda s, draw: seen.append(s) or plans.clone()
    s = 3 + 2 * torch.randn(5, S)
    a, _ = policy.act(s)
    torch.testing.assert_close(seen[0], policy.scaling.state(s))
    wanted = LOW + 0.5 * (plans[:, 0, :A].clamp(-1, 1) + 1) * (HIGH - LOW)
    torch.testing.assert_close(a, wanted)


@pytest.mark.parametrize("execute", [1, 3, 4])
def test_a_plan_is_followed_as_long_as_asked(execute):
    policy = planner(execute=execute, plans=1).policy
    made = []
    policy.plan = lambda s, draw: made.append(torch.randn(len(s), H, D)) or made[-1]
    memory, s = None, np.zeros((5, S))
    for step in range(8):
        a, memory = policy.act(s, memory)
        assert len(made) == 1 + step // execute
        wanted = made[-1][:, step % execute, :A].clamp(-1, 1)
        torch.testing.assert_close(torch.as_tensor(a), wanted)
        assert all(len(x) == 5 for x in memory)


def test_memory_of_episodes_that_ended_can_be_left_out():
    policy = planner(execute=3, plans=1).policy
    s = torch.randn(5, S)
    _, memory = policy.act(s)
    stays = torch.tensor([True, False, True, True, False])
    rest = [x[stays] for x in memory]
    a, _ = policy.act(s, memory)
    b, _ = policy.act(s[stays], rest)
    assert torch.equal(a[stays], b)


def test_acting_deterministically_is_a_function_of_the_observation():
    policy = planner(plans=3).policy
    s = torch.randn(5, S)
    a, _ = policy.act(s, deterministic=True)
    torch.manual_seed(9)
    b, _ = policy.act(s.flip(0), deterministic=True)
    torch.testing.assert_close(a, b.flip(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(a[1], policy.act(s[1], deterministic=True)[0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(policy.act(s)[0], policy.act(s)[0], atol=1e-3)


def test_deterministic_plans_of_a_state_are_several():
    """There is something to choose from; and every state has the same."""
    policy = planner(plans=3).policy
    drawn, plans = [], policy.forward
    policy.forward = lambda x, s, draw: drawn.append(draw(x)) or plans(x, s, draw)
    policy.act(torch.randn(2, S), deterministic=True)
    noise = drawn[0].view(2, 3, *policy.shape)  # of two states, three plans each
    torch.testing.assert_close(noise[0], noise[1])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(noise[0, i], noise[0, j], atol=0.1)


def test_an_evaluation_keeps_each_episodes_memory(capsys):
    """Episodes end one by one; those that go on follow their own plans."""

    class Env:
        spec = type("Spec", (), {"name": "Toy"})

        def __init__(self, k):
            self.k, self.seen = k, []

        def reset(self, seed):
            return np.full(3, self.k, np.float32), {}

        def step(self, a):
            self.seen.append(float(a[0]))
            done = len(self.seen) == 2 + self.k
            return np.full(3, self.k, np.float32), 1.0, done and self.k < 2, done, {}

        def close(self):
            pass

    class Follows:
        def act(self, s, memory=None):
            plan = torch.as_tensor(s[:, :1]) * 10 if memory is None else memory[0] + 1
            return plan.numpy(), [plan]

    envs = [Env(k) for k in range(4)]
    made = iter(envs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffuser, "make_env", lambda *_: next(made))
        task = units.task() | {"scores": [0.0, 10.0]}
        row = diffuser.evaluate(Follows(), task, 4, 0)
    for env in envs:
        assert env.seen == [10 * env.k + i for i in range(2 + env.k)]
    assert row["length_mean"] == 3.5 and row["return_mean"] == 3.5 and row["score"] == 35
    assert "a decision for 4 episodes: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(plans=0), "--plans must be 1 or more"),
        (dict(execute=5), "--execute must not exceed"),
        (dict(hidden_dim=12), "multiple of 8"),
        (dict(horizon=3), "--horizon must be a multiple of 2"),
        (dict(multipliers=()), "--multipliers"),
        (dict(diffusion_steps=0), "--diffusion-steps"),
    ],
)
def test_bad_flags_get_one_sentence(flags, message):
    with pytest.raises(SystemExit, match=message):
        planner(**flags)
