"""What the adversarial world model claims: its rules, its likelihood, its adversary, its doubt."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, load, tiny
from torch import distributions

gan = load("gan_world_model")
S, A = 3, 2


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def data(n=64, **columns) -> dict[str, torch.Tensor]:
    """Random transitions; `columns` replaces some."""
    rows = dict(observations=torch.randn(n, S), next_observations=torch.randn(n, S))
    rows |= dict(actions=2 * torch.rand(n, A) - 1, rewards=torch.randn(n, 1))
    rows |= dict(terminals=torch.zeros(n, 1), episodes=torch.arange(n) // 4)
    return rows | dict(action_low=-torch.ones(1, A), action_high=torch.ones(1, A)) | columns


def learner(rows=None, **flags):
    return gan.Learner(rows or data(), gan.Args(**tiny("gan_world_model", **flags)))


def copies(module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def trained(rows, steps, **flags):
    sizes = dict(batch_size=64, model_dim=32, discriminator_dim=32, model_learning_rate=3e-3)
    agent = learner(rows, **sizes | flags)
    for _ in range(steps):
        metrics = agent.update()
    return agent, metrics


# -------------------------------------------------------------------------- Ends of episodes


def hopper_or_walker(env, rng, z, angle):
    """A random state, body height and angle on both sides of their bounds."""
    base = env.unwrapped
    qpos, qvel = base.init_qpos.copy(), rng.uniform(-1, 1, base.model.nv)
    qpos[1], qpos[2] = rng.uniform(*z), rng.uniform(*angle)
    base.set_state(qpos, qvel)


STATES = {
    "Hopper-v5": lambda env, rng: hopper_or_walker(env, rng, (0.65, 0.75), (-0.25, 0.25)),
    "Walker2d-v5": lambda env, rng: hopper_or_walker(
        env, rng, (0.7, 0.9) if rng.random() < 0.5 else (1.9, 2.1), (-1.2, 1.2)
    ),
    "HalfCheetah-v5": lambda env, rng: env.unwrapped.set_state(
        rng.normal(0, 2, env.unwrapped.model.nq), rng.normal(0, 5, env.unwrapped.model.nv)
    ),
    "Pendulum-v1": lambda env, rng: setattr(
        env.unwrapped, "state", rng.uniform([-math.pi, -8], [math.pi, 8])
    ),
}


@pytest.mark.parametrize("env_id", STATES)
def test_the_rule_ends_what_the_environment_ends(env_id):
    env, rng = gym.make(env_id), np.random.default_rng(0)
    found, seen = [], []
    for _ in range(1000):
        env.reset(seed=0)
        STATES[env_id](env, rng)
        low, high = env.action_space.low, env.action_space.high
        s_next, _, terminated, _, _ = env.step(rng.uniform(low, high).astype(np.float32))
        found.append(terminated)
        seen.append(np.float32(s_next))
    rule = gan.GOES_ON[env_id.split("-v")[0].lower()]
    assert torch.equal(~rule(torch.tensor(np.array(seen))), torch.tensor(found))
    if env_id in ("Hopper-v5", "Walker2d-v5"):
        assert 100 < sum(found) < 900
        assert not rule(torch.full((1, 17), math.nan)).any()
    else:
        assert not any(found)


def test_the_rule_explains_the_data():
    rows = gan.load_dataset(str(ROOT / "datasets" / "hopper-medium-replay.hdf5"))
    ended = ~gan.GOES_ON["hopper"](torch.as_tensor(rows.next_observations))
    assert torch.equal(ended, torch.as_tensor(rows.terminals[:, 0] > 0))
    assert ended.sum() > 1000


@pytest.mark.parametrize(
    "flags, name",
    [
        (dict(dataset="hopper-medium-replay"), "hopper"),
        (dict(dataset="mujoco/walker2d/expert-v0"), "walker2d"),
        (dict(dataset="hopper/own_pendulum.hdf5"), "pendulum"),
        (dict(dataset="hopper-medium", env_id="HalfCheetah-v5"), "halfcheetah"),
        (dict(dataset="hopper-medium", env_id="none"), "hopper"),
        (dict(dataset="hopper-medium", termination="walker2d"), "walker2d"),
    ],
)
def test_the_rule_is_found_by_name(flags, name):
    blank = dict(next_observations=torch.zeros(1, S), terminals=torch.zeros(1, 1))
    blank |= dict(observations=torch.zeros(1, S))
    assert gan.termination_rule(gan.Args(**flags), blank) is gan.GOES_ON[name]


@pytest.mark.parametrize("flags", [dict(dataset="own.npz"), dict(env_id="InvertedPendulum-v5")])
def test_an_unknown_environment_is_refused_with_a_way_out(flags):
    with pytest.raises(
        SystemExit, match=r"rule that ends them.*own|Inverted.*--termination"
    ) as end:
        learner(termination="", **flags)
    assert "\n" not in str(end.value) and "none" in str(end.value)
    learner(termination="none", **flags)
    with pytest.raises(SystemExit, match=r"--termination flying.*hopper"):
        learner(termination="flying", **flags)


def test_a_rule_that_contradicts_the_data_is_refused():
    rows = data(terminals=torch.ones(64, 1))
    with pytest.raises(SystemExit, match=r"'pendulum'.*64 of the data's 64 rows.*--termination"):
        learner(rows, termination="", dataset="pendulum-mine")
    learner(rows, termination="pendulum", dataset="pendulum-mine")  # who says so has it


@pytest.mark.parametrize(
    "flags",
    [
        dict(real_fraction=1.5),
        dict(real_fraction=-0.1),
        dict(ensemble=0),
        dict(rollout_length=0),
        dict(penalty_weight=-1.0),
    ],
)
def test_flags_out_of_range_are_refused(flags):
    name, value = next(iter(flags.items()))
    with pytest.raises(SystemExit, match=f"--{name.replace('_', '-')} {value}: .*between"):
        learner(**flags)


# -------------------------------------------------------------------------------- World model


def test_members_are_networks_of_their_own():
    model = learner(ensemble=3, model_layers=2).model
    s, a = torch.randn(3, 9, S), torch.randn(3, 9, A)
    mu, sigma = model(s, a)
    assert mu.shape == sigma.shape == (3, 9, S + 1)
    for i in range(3):
        x = torch.cat([s[i], a[i]], dim=-1)
        for weight, bias in zip(model.weights[:-1], model.biases[:-1]):
            x = F.silu(x @ weight[i] + bias[i])
        x = x @ model.weights[-1][i] + model.biases[-1][i]
        torch.testing.assert_close(mu[i], x[:, : S + 1])
        assert (sigma[i].log() - x[:, S + 1 :].tanh() * 3 + 2).abs().max() < 1e-5
    torch.testing.assert_close(model(s[0], a[0])[0][1], model(s[[0] * 3], a[[0] * 3])[0][1])
    model.weights[-1].data.mul_(1e6)
    log_sigma = model(s, a)[1].log()
    assert log_sigma.min() >= -5.001 and log_sigma.max() <= 1.001


def test_likelihood_is_the_normal_distributions():
    agent = learner()
    x, mu, sigma = torch.randn(2, 9, S + 1), torch.randn(2, 9, S + 1), torch.rand(2, 9, S + 1) + 0.1
    wanted = -distributions.Normal(mu, sigma).log_prob(x).mean((1, 2)).sum()
    torch.testing.assert_close(agent.nll(x, mu, sigma), wanted)


def test_follow_undoes_standardise():
    rows = data(rewards=5 + 3 * torch.randn(64, 1))
    agent = learner(rows)
    s, s_next = agent.data["observations"], agent.data["next_observations"]
    x = agent.model.standardise(s, rows["rewards"], s_next)
    torch.testing.assert_close(x.mean(0), torch.zeros(S + 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(S + 1), atol=0.01, rtol=0)
    for found, wanted in zip(agent.model.follow(s, x), (s_next, rows["rewards"])):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    far, _ = agent.model.follow(s, 1e6 * torch.ones_like(x))
    torch.testing.assert_close(far, (s_next.maximum(s).amax(0) + 1).expand_as(s))


def linear_system(n=1000, spread=2.0):
    """s' = Ms + Ka, r = s_0 + a_0; actions of a narrow policy when `spread` is small."""
    s = torch.randn(n, S)
    a = (0.5 * s[:, :A].tanh() + spread * (torch.rand(n, A) - 0.5)).clamp(-1, 1)
    m = torch.tensor([[0.9, 0.2, 0], [-0.2, 0.9, 0], [0, 0.3, 0.8]])
    s_next = s @ m.T + a @ torch.tensor([[0.5, 0, 0.2], [0, 0.5, -0.2]])
    rows = dict(observations=s, actions=a, next_observations=s_next, rewards=s[:, :1] + a[:, :1])
    return data(n, **rows)


def test_a_linear_system_is_learnt():
    agent, _ = trained(linear_system(), 1000)
    found = agent.validate(linear_system())
    assert found["validation/mse"] < 1e-2 and found["validation/nll"] < -1, found


# ----------------------------------------------------------------------------------- Adversary


def test_gradient_penalty_is_the_squared_slope_at_transitions():
    parts = [torch.randn(32, 2 * S + A + 1) for _ in range(3)]
    found = []
    for weight in (0.0, 10.0):
        torch.manual_seed(0)
        agent = learner(gradient_penalty=weight)
        x = parts[0].clone().requires_grad_()
        (slope,) = torch.autograd.grad(agent.discriminator(x).sum(), x)
        found.append(agent.update_discriminator(*map(torch.clone, parts))["losses/discriminator"])
    torch.testing.assert_close(found[1] - found[0], 5 * slope.square().sum(1).mean())


def test_discriminator_is_at_a_loss_before_perfect_samples_and_sure_before_poor_ones():
    agent, other = learner(), learner()
    for _ in range(300):
        metrics = agent.update_discriminator(*torch.randn(3, 64, 2 * S + A + 1))
        far = other.update_discriminator(*torch.randn(3, 64, 2 * S + A + 1) * 0.3 + _apart())
    assert metrics["losses/discriminator"] == pytest.approx(math.log(4), abs=0.1)
    assert far["discriminator/real"] > 0.95 and far["discriminator/fake"] > 0.95
    assert far["discriminator/far"] > 0.95


def _apart():
    return torch.tensor([0.0, 2.0, -2.0])[:, None, None]


@pytest.mark.parametrize("weight", [0.0, 3.0])
def test_the_models_step_is_likelihood_plus_adversary(weight, monkeypatch):
    """Against the two terms computed apart, on the rows and the noise that the update drew."""
    agent = learner(adversarial_weight=weight, ensemble=2, batch_size=16)
    shown, found = [], []
    monkeypatch.setattr(agent, "update_discriminator", lambda *x: shown.extend(x) or {})
    step = lambda: found.extend(p.grad.clone() for p in agent.model.parameters())  # noqa: E731
    monkeypatch.setattr(agent.model_optimizer, "step", step)
    state = torch.get_rng_state()
    agent.update()
    assert all(p.grad is None and p.requires_grad for p in agent.discriminator.parameters())

    torch.set_rng_state(state)
    i = torch.randint(64, (2, 16))  # members draw rows of their own
    assert not torch.equal(i[0], i[1])
    s, a = agent.data["observations"][i], agent.data["actions"][i]
    x = agent.model.standardise(s, agent.data["rewards"][i], agent.data["next_observations"][i])
    mu, sigma = agent.model(s, a)
    x_hat = (mu + sigma * torch.randn_like(mu))[:, :8]  # of each member so many that they make 16
    fake = torch.cat([s[:, :8], a[:, :8], x_hat], dim=-1)  # (2, 8, S + A + S + 1)
    torch.testing.assert_close(shown[0], torch.cat([s, a, x], dim=-1)[:, :8].flatten(0, 1))
    torch.testing.assert_close(shown[1], fake.flatten(0, 1))
    s_far, _ = agent.model.follow(s[:, :8], x_hat)
    torch.testing.assert_close(shown[2][:, :S], s_far.flatten(0, 1))

    d = torch.sigmoid(agent.discriminator(fake))
    likelihood = distributions.Normal(mu, sigma).log_prob(x).mean((1, 2)).sum()
    loss = -likelihood - weight * d.log().mean((1, 2)).sum()
    wanted = torch.autograd.grad(loss, list(agent.model.parameters()))
    for one, other in zip(found, wanted):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def auroc(u, u_far) -> float:
    """Chance that a far sample has the larger u."""
    return (u_far[:, None] > u[None]).float().mean().item()


@pytest.mark.parametrize("penalty", ["discriminator", "disagreement"])
def test_doubt_grows_away_from_the_data(penalty):
    """A narrow policy's data: its own actions against uniform ones at the same states."""
    sizes = dict(discriminator_learning_rate=2e-3, ensemble=3)
    agent, _ = trained(linear_system(2000, 0.2), 400, penalty=penalty, **sizes)
    held_out = linear_system(1000, 0.2)
    s, a = agent.policy.normalise(held_out["observations"]), held_out["actions"]
    a_far = 2 * torch.rand_like(a) - 1
    away = (a_far - a).abs().amax(1) > 0.4
    u, u_far = (agent.imagine(s, action)[2][:, 0] for action in (a, a_far))
    print(penalty, auroc(u, u_far[away]))
    assert auroc(u, u_far[away]) > 0.9


def test_kinds_of_doubt():
    s, a, x = torch.randn(9, S), torch.randn(9, A), torch.randn(9, S + 1)
    mu, sigma = torch.randn(3, 9, S + 1), torch.rand(3, 9, S + 1)
    u = {}
    for kind in ("discriminator", "aleatoric", "disagreement", "none"):
        agent = learner(penalty=kind, ensemble=3)
        u[kind] = agent.uncertainty(s, a, x, mu, sigma)
        assert u[kind].shape == (9, 1)
        if kind == "discriminator":
            d = torch.sigmoid(agent.discriminator(torch.cat([s, a, x], dim=-1)))
            torch.testing.assert_close(u[kind], -d.log())
    centre = mu.mean(0)
    for row in range(9):
        norms = (
            [sigma[i, row].norm() for i in range(3)],
            [(mu[i, row] - centre[row]).norm() for i in range(3)],
        )
        assert u["aleatoric"][row].item() == pytest.approx(max(norms[0]).item())
        assert u["disagreement"][row].item() == pytest.approx(max(norms[1]).item())
    assert not u["none"].any()


# --------------------------------------------------------------------------------- Imagination


def rollout(**flags):
    flags = dict(rollout_batch=8, rollout_length=3, rollout_keep=2, real_fraction=0.0) | flags
    agent = learner(**flags)
    agent.roll_out()
    rows = agent.imagined[: agent.count].reshape(
        flags["rollout_length"], flags["rollout_batch"], -1
    )
    return agent, *rows.split(agent.widths, dim=-1)  # (H, B, .) each


def among(rows, data) -> bool:
    return all((row == data).all(1).any() for row in rows)


def test_branches_begin_at_data_and_go_on():
    agent, s, a, r, s_next, d, _ = rollout()
    assert agent.count == 24 and not agent.imagined[24:].any() and agent.imagined[:24].all(0).any()
    assert among(s[0], agent.data["observations"]) and not among(s[1], agent.data["observations"])
    assert torch.equal(s[1:], s_next[:-1]) and not d.any()
    assert a.abs().max() <= 1 and r.std() > 0


def test_an_ended_branch_begins_anew_at_data(monkeypatch):
    rule = lambda s: s[:, 0] < 0  # noqa: E731
    monkeypatch.setitem(gan.GOES_ON, "none", rule)
    agent, s, _, _, s_next, d, _ = rollout(rollout_batch=64)
    raw = agent.policy.state_mean + agent.policy.state_std * s_next
    assert torch.equal(d[..., 0] > 0, raw[..., 0] >= 0) and 0 < d.mean() < 1
    ended = d[:-1, :, 0] > 0
    assert among(s[1:][ended], agent.data["observations"])
    assert torch.equal(s[1:][~ended], s_next[:-1][~ended])


def test_the_ring_forgets_the_oldest():
    agent, *_ = rollout()
    first = agent.imagined[:24].clone()
    agent.roll_out()
    assert torch.equal(agent.imagined[:24], first) and agent.imagined[24:].any(1).all()
    second = agent.imagined[24:].clone()
    agent.roll_out()
    assert agent.count == 72 and not torch.equal(agent.imagined[:24], first)
    assert torch.equal(agent.imagined[24:], second)


@pytest.mark.parametrize("kind", ["discriminator", "aleatoric", "disagreement", "none"])
def test_penalty_is_the_excess_in_deviations_of_the_reward(kind, monkeypatch):
    agent, *_, penalty = rollout(penalty=kind, penalty_weight=2.0)
    scale = 2 * agent.model.x_std[-1]
    assert penalty.min() >= 0 and penalty.max() <= 10 * scale
    assert penalty.any() == (kind != "none")
    values = iter([3.0] + [0.3, 9.0, 900.0])  # ū, and u in three steps
    imagine = agent.imagine
    monkeypatch.setattr(
        agent, "imagine", lambda s, a: (*imagine(s, a)[:2], torch.full_like(s[:, :1], next(values)))
    )
    agent.roll_out()
    found = agent.imagined[24:, -1].reshape(3, 8)
    wanted = scale * torch.tensor([0.0, 2.0, 10.0])[:, None].expand(3, 8)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("fraction, real", [(0.0, 0), (0.25, 4), (1.0, 16)])
def test_batches_mix_real_and_imagined(fraction, real):
    agent = learner(real_fraction=fraction, rollout_batch=8)
    if fraction < 1:
        agent.imagined[:12], agent.count = torch.full_like(agent.imagined[:12], 7), agent.count + 12
    rows = torch.cat(agent.sample(), dim=-1)
    assert rows.shape == (16, 2 * S + A + 3)
    assert (rows == 7).all(1).sum() == 16 - real  # never a row of the ring that is still empty
    assert among(rows[:real, :S], agent.data["observations"]) and not rows[:real, -1].any()


def test_the_critic_pays_the_penalty():
    agent = learner(real_fraction=0.0, gamma=0.0, learning_rate=1e-2, rollout_batch=8)
    agent.imagined.zero_()
    agent.count.fill_(len(agent.imagined))
    agent.imagined[:, S + A], agent.imagined[:, -1] = 1, 3
    for _ in range(200):
        metrics = agent.update_policy()
    assert metrics["values/q"].item() == pytest.approx(-2, abs=0.1)
    assert metrics["imagined/reward"] == 1 and metrics["imagined/penalty"] == 3


def test_first_the_model_then_rollouts_and_the_policy():
    agent = learner(model_steps=10, rollout_every=4)
    wanted = [agent.update] * 10 + [agent.update_after_rollout] + [agent.update_policy] * 3
    wanted += [agent.update_after_rollout, agent.update_policy]
    assert [agent.phase(step) for step in range(16)] == [(update, 1) for update in wanted]
    policy, model = copies(agent.policy), copies(agent.model)
    agent.update()
    assert equal(copies(agent.policy), policy) and not equal(copies(agent.model), model)
    model, judge = copies(agent.model), copies(agent.discriminator)
    agent.update_after_rollout()
    agent.update_policy()
    assert agent.count == 8 * 5 and not equal(copies(agent.policy), policy)
    assert equal(copies(agent.model), model) and equal(copies(agent.discriminator), judge)


def test_without_imagination_it_is_sac_on_the_data():
    agent = learner(real_fraction=1.0)
    metrics = agent.update_after_rollout()
    assert agent.count == 0 and len(agent.imagined) == 0
    assert not any(key.startswith("imagined/") for key in metrics)
    assert all(value.isfinite().all() for value in metrics.values())


def test_long_rollouts_stay_finite_and_near_the_data():
    agent = learner(rollout_length=200, rollout_keep=1)
    agent.model.weights[-1].data.mul_(100)  # a model gone wild
    agent.roll_out()
    assert agent.imagined.isfinite().all() and agent.imagined.any(1).all()
    known = torch.cat([agent.data["observations"], agent.data["next_observations"]])
    s = agent.imagined[:, :S]
    assert (s >= known.amin(0) - 1).all() and (s <= known.amax(0) + 1).all()


def test_penalty_none_without_adversary_is_a_plain_ensemble():
    """MOPO's model: the discriminator learns beside it and changes nothing of it."""
    found = []
    for factor in (1, 50):
        torch.manual_seed(0)
        agent = learner(adversarial_weight=0.0, penalty="aleatoric")
        for parameter in agent.discriminator.parameters():
            parameter.data.mul_(factor)
        agent.update()
        found.append(copies(agent.model))
    assert equal(*found)
