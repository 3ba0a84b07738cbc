"""S2P: which pictures belong together, each loss and what it reaches, what is painted, and that a
rendered data set is what the environment shows."""

import copy
import importlib.util
import sys

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import units
from conftest import ROOT, load, tiny
from units import A, S, copies, equal, gradient_of, gradients

sys.path.append(str(ROOT / "datasets"))
import pixels as renderer  # chooses how to draw before MuJoCo comes

s2p = load("s2p")
SIDE = 16
FLAGS = dict(image_size=SIDE, batch_size=12, painter_batch_size=12, model_dim=32, shift=0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pictures(n=64, **columns):
    """Transitions whose row i has a picture of the one colour i; every other episode, of four rows,
    ends in a terminal."""
    images = (torch.arange(n) % 256).byte()[:, None, None, None].expand(n, SIDE, SIDE, 3)
    return units.data(n, **columns) | {"images": images.clone()}


def learner(rows=None, **flags):
    rows = rows or pictures()
    given = units.task(rows, -2.0, 3.0) | {"sizes": [2 * 3 * SIDE**2, A]}
    args = s2p.Args(**tiny("s2p", **FLAGS | flags))
    return s2p.S2P(dict(rows), given, args)


def colour(o):
    """The number of each picture: of (..., H, W, C), all of one colour."""
    return o.float().mean((-3, -2, -1)).round().long()


# ------------------------------------------------------------------------- Which belong together


def test_neighbours_stay_in_their_episode():
    before, after = s2p.neighbours(torch.tensor([0, 0, 0, 1, 2, 2]))
    assert before.tolist() == [0, 0, 1, 3, 4, 4] and after.tolist() == [1, 2, 2, 3, 5, 5]


def test_a_batch_has_the_pictures_before_and_after():
    """Two pictures a state, in the order of time, and the successor's; nothing across episodes."""
    agent = learner(painted=0.0, batch_size=500)
    o, a, r, o_next, d = agent.sample()
    assert o.dtype == torch.uint8 and o.shape == (500, 2, SIDE, SIDE, 3)
    (before, now), (again, after) = colour(o).T, colour(o_next).T
    assert torch.equal(now, again)
    first, ends = now % 4 == 0, now % 8 == 7
    assert torch.equal(before, torch.where(first, now, now - 1))
    assert torch.equal(after, torch.where(ends, now, now + 1)) and torch.equal(d[:, 0] > 0, ends)
    assert not ((now % 4 == 3) & ~ends).any(), "its successor has no picture"
    assert set(now.tolist()) == {i for i in range(64) if i % 4 != 3 or i % 8 == 7}
    torch.testing.assert_close(a, agent.a[now])
    torch.testing.assert_close(r, agent.r[now])


def test_a_policy_sees_what_the_batch_holds():
    """The environment's observation, flat, is encoded as a batch's two pictures are."""
    agent = learner()
    o = torch.randint(0, 256, (5, 2, SIDE, SIDE, 3), dtype=torch.uint8)
    seen = []
    agent.policy.encoder[0].register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    agent.policy.encode(o.flatten(1))
    wanted = torch.cat([o[:, 0], o[:, 1]], dim=-1).permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(seen[0], wanted)
    a = agent.policy.act(o.flatten(1).numpy())
    assert a.shape == (5, A) and a.dtype == np.float32 and (a >= -2).all() and (a <= 3).all()
    assert agent.policy.act(o[0].flatten().numpy()).shape == (A,)
    sampled = {agent.policy.act(o[:1].flatten(1), deterministic=False).sum().item() for _ in "ab"}
    assert len(sampled) == 2


def test_shifts_move_all_of_a_state_and_repeat_the_edge():
    agent = learner(shift=3)
    o = torch.arange(SIDE * SIDE).reshape(1, 1, SIDE, SIDE, 1).expand(200, 2, SIDE, SIDE, 3)
    moved, found = agent.shifted(o), set()
    assert torch.equal(moved[:, 0], moved[:, 1]) and moved.shape == o.shape
    for x in moved[:, 0, :, :, 0]:
        dy, dx = divmod(x[8, 8].item() - 8 * SIDE - 8, SIDE)
        dy, dx = (dy, dx) if dx < 8 else (dy + 1, dx - SIDE)
        found.add((dy, dx))
        padded = F.pad(o[0, 0, :, :, 0][None, None].float(), (3, 3, 3, 3), mode="replicate")[0, 0]
        assert torch.equal(x, padded[3 + dy : 3 + dy + SIDE, 3 + dx : 3 + dx + SIDE].long())
    assert {x for x, _ in found} == {x for _, x in found} == set(range(-3, 4))


# ------------------------------------------------------------------------------- The painter


def test_the_model_is_fitted_by_likelihood_on_recorded_rows():
    rows = pictures()
    rows["recorded"] = torch.arange(64) % 8 != 7
    rows["next_observations"][~rows["recorded"]] = 1e6
    agent = learner(rows)
    assert len(agent.moves[0]) == 56 and agent.moves[3].abs().max() < 10
    s, a, r, s_next = (x[:9] for x in agent.moves)
    x = (torch.cat([s_next - s, r], -1) - agent.x_mean) / agent.x_std
    assert x.std() < 2
    mu, sigma = agent.predict(s, a)
    assert mu.shape == (2, 9, S + 1) and not torch.allclose(mu[0], mu[1])
    wanted = -torch.distributions.Normal(mu, sigma).log_prob(x).mean()
    torch.testing.assert_close(agent.nll(s, a, r, s_next), wanted)


def test_the_model_learns_a_linear_system():
    s, a = torch.randn(2000, S), 2 * torch.rand(2000, A) - 1
    rows = pictures(2000, observations=s, actions=a, rewards=a[:, :1])
    rows["next_observations"] = s + 0.3 * a.sum(1, keepdim=True)
    agent = learner(rows, batch_size=256, painter_learning_rate=3e-3, painter_batch_size=1)
    for _ in range(300):
        agent.update_painter()
    s, a, r, s_next = agent.moves
    x = (torch.cat([s_next - s, r], -1) - agent.x_mean) / agent.x_std
    assert (agent.predict(s, a)[0].mean(0) - x).square().mean() < 0.05


def of(agent, n=12):
    o = torch.rand(n, 3, SIDE, SIDE) * 2 - 1
    return o, torch.randn(n, S), torch.rand(n, 3, SIDE, SIDE) * 2 - 1


def test_the_picture_depends_on_the_state_and_on_the_one_before():
    agent = learner()
    o, s, _ = of(agent)
    painted = agent.generator(o, s)
    assert painted.shape == o.shape and painted.abs().max() <= 1
    assert not torch.allclose(painted, agent.generator(o.roll(1, 0), s), atol=1e-4)
    assert not torch.allclose(painted, agent.generator(o, s.roll(1, 0)), atol=1e-4)


def test_the_affine_transformation():
    """(1 + γ) h + β with γ, β of both modalities, place by place."""
    block = s2p.Affine(4, 6, 5, 7)
    h, seen, e = torch.randn(2, 4, 3, 3), torch.randn(2, 5, 6, 6), torch.randn(2, 7)
    both = F.relu(block.seen(seen) + block.state(e)[:, :, None, None])
    gamma, beta = block.affine(both).chunk(2, 1)
    x = block.conv(F.interpolate(h, (6, 6)))
    x = (x - x.mean((1, 2, 3), keepdim=True)) / (
        x.var((1, 2, 3), correction=0, keepdim=True) + 1e-5
    ).sqrt()
    torch.testing.assert_close(block(h, seen, e), F.leaky_relu((1 + gamma) * x + beta, 0.2))


def test_the_discriminator_judges_patches_at_two_scales_and_the_state():
    agent = learner()
    o, s, o_next = of(agent)
    verdicts = agent.discriminator(o_next, o, s)
    assert [tuple(x.shape) for x in verdicts] == [(12, 16), (12, 4)]
    for changed in (
        (o_next.roll(1, 0), o, s),
        (o_next, o.roll(1, 0), s),
        (o_next, o, s.roll(1, 0)),
    ):
        assert all(
            not torch.allclose(x, y) for x, y in zip(verdicts, agent.discriminator(*changed))
        )


def test_hinge_losses_and_what_they_reach():
    """D's loss moves D alone, G's moves G alone, each by its own gradient."""
    agent = learner(adversarial_weight=0.3)
    o, s, o_next = of(agent)
    nets = (agent.generator, agent.discriminator)
    twins = copy.deepcopy(nets)
    metrics = agent.update_gan(o, s, o_next)
    painted = twins[0](o, s)
    real, fake = twins[1](o_next, o, s), twins[1](painted.detach(), o, s)
    loss = sum(
        (1 - x).clamp(min=0).mean() + (1 + y).clamp(min=0).mean() for x, y in zip(real, fake)
    )
    torch.testing.assert_close(metrics["losses/discriminator"], loss)
    torch.testing.assert_close(gradients(agent.discriminator), gradient_of(loss, twins[1]))

    twins[1].load_state_dict(agent.discriminator.state_dict())  # G answers the new D
    l1 = (painted - o_next).abs().mean()
    adversarial = -sum(x.mean() for x in twins[1](painted, o, s))
    torch.testing.assert_close(metrics["losses/l1"], l1)
    torch.testing.assert_close(metrics["losses/adversarial"], adversarial)
    wanted = gradient_of(l1 + 0.3 * adversarial, twins[0])
    torch.testing.assert_close(gradients(agent.generator), wanted, atol=1e-6, rtol=1e-4)


def test_without_weight_there_is_no_discriminator():
    agent = learner(adversarial_weight=0.0)
    before = copies(agent.discriminator), copies(agent.generator)
    metrics = agent.update_painter()
    assert equal(before[0], copies(agent.discriminator)) and "losses/adversarial" not in metrics
    assert not equal(before[1], copies(agent.generator))


def test_a_painter_step_moves_the_painter_and_no_policy():
    agent = learner()
    painter = (agent.model, agent.reader, agent.generator, agent.discriminator)
    policy = (agent.policy, agent.v, agent.critic, agent.encoder_target, agent.critic_target)
    moved, still = [copies(x) for x in painter], [copies(x) for x in policy]
    agent.phase(10)()
    assert not any(equal(a, copies(b)) for a, b in zip(moved, painter))
    assert all(equal(a, copies(b)) for a, b in zip(still, policy))
    moved, still = [copies(x) for x in policy], [copies(x) for x in painter]
    agent.phase(11)()
    assert not any(equal(a, copies(b)) for a, b in zip(moved, policy))
    assert all(equal(a, copies(b)) for a, b in zip(still, painter))


def test_the_painter_pairs_a_picture_with_its_successors_state():
    """G sees o_t and s_{t+1} and is held to o_{t+1}; R reads s_{t+1} from it."""
    agent = learner(painter_batch_size=600)
    seen = []
    agent.update_gan = lambda *x: seen.append(x) or {}
    agent.reader.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    agent.update_painter()
    read, (o, s, o_next) = seen
    now, after = (colour((x.permute(0, 2, 3, 1) + 1) * 127.5) for x in (o, o_next))
    assert torch.equal(after, now + 1) and not (now % 4 == 3).any() and len(set(now.tolist())) == 48
    torch.testing.assert_close(s, agent.s[after])
    assert torch.equal(read, o_next)


def test_a_picture_is_learnt_from_state_and_picture():
    """A square where the state says, on the background of the picture before."""
    n, agent = 600, learner(channels=16, adversarial_weight=0.0, painter_learning_rate=2e-3)
    s = torch.rand(n, S) * 2 - 1
    o = torch.full((n, 3, SIDE, SIDE), -0.5) + (torch.rand(n, 1, 1, 1) > 0.5).float()
    o_next, place = o.clone(), ((s[:, 0] + 1) * 5).long()
    for i in range(n):
        o_next[i, :, 4:10, place[i] : place[i] + 6] = 1
    for _ in range(250):
        i = torch.randint(500, (16,))
        agent.update_gan(o[i], s[i], o_next[i])
    with torch.no_grad():
        error = lambda o, s: (agent.generator(o, s) - o_next[500:]).abs().mean()  # noqa: E731
        good = error(o[500:], s[500:])
        assert good < 0.08
        assert error(o[500:].flip(0), s[500:]) > 3 * good
        assert error(o[500:], s[500:].flip(0)) > 1.5 * good


# ------------------------------------------------------------------------------ Imagination


def constant_model(agent, mu, log_sigma=(0.0, 0.0)):
    """Member n predicts mu[n] everywhere; returns each member's σ."""
    for member, value, width in zip(agent.model, mu, log_sigma):
        units.constant_net(member, 0.0)
        member[-1].bias.data[: S + 1] = value
        member[-1].bias.data[S + 1 :] = width
    return np.exp(-5 + 3 * (np.tanh(log_sigma) + 1))


def test_imagined_states_and_rewards_are_a_random_members():
    agent = learner(penalty_weight=0.0)
    constant_model(agent, (0.0, 2.0))
    i = torch.randint(60, (400,))
    a, r, s_next, painted = agent.imagine(i)
    assert a.shape == (400, A) and a.abs().max() <= 1 and abs(a.mean()) < 0.1 and a.std() > 0.5
    jump = ((s_next - agent.s[i]) - agent.x_mean[:S]) / agent.x_std[:S]  # 0 or 2, all of a row
    assert 0.4 < (jump[:, 0] > 1).float().mean() < 0.6
    torch.testing.assert_close(
        jump, 2.0 * (jump[:, :1] > 1).float().expand(-1, S), atol=1e-3, rtol=0
    )
    reward = (r - agent.x_mean[-1]) / agent.x_std[-1]
    torch.testing.assert_close(reward, jump[:, :1], atol=1e-3, rtol=0)
    x = agent.generator(agent.pictures(agent.images[i]), s_next)  # of the imagined state
    wanted = ((x.permute(0, 2, 3, 1) + 1) * 127.5).round().to(torch.uint8)
    assert painted.dtype == torch.uint8 and torch.equal(painted, wanted)


@pytest.mark.parametrize("kind", ["aleatoric", "disagreement"])
def test_the_penalty_is_the_uncertainty_in_standard_deviations_of_the_reward(kind):
    agent = learner(uncertainty=kind, penalty_weight=0.5)
    other = 1.0 if kind == "aleatoric" else -2.0
    sigma = constant_model(agent, (1.0, other), log_sigma=(-0.2, -0.9)).max()
    _, r, s_next, _ = agent.imagine(torch.arange(20))
    jump = ((s_next - agent.s[:20]) - agent.x_mean[:S]) / agent.x_std[:S]
    u = sigma if kind == "aleatoric" else 1.5  # half the way between the two
    wanted = agent.x_mean[-1] + agent.x_std[-1] * (jump[:, :1] - 0.5 * u)
    torch.testing.assert_close(r, wanted, atol=1e-3, rtol=1e-3)


def test_painted_transitions_stand_beside_real_ones():
    agent = learner(painted=0.25, batch_size=400)
    o, a, _, o_next, d = agent.sample()
    (before, now), (again, _) = colour(o).T, colour(o_next).T
    assert torch.equal(now, again) and o_next.dtype == torch.uint8
    of_data = (a == agent.a[now]).all(1)
    assert of_data[:300].all() and not of_data[300:].any() and (d[300:] == 0).all()
    assert ((before == now) | (before == now - 1)).all()
    assert (d[:300] > 0).any()


# ------------------------------------------------------------------------------------- IQL


def test_iqls_losses():
    agent = learner(expectile=0.8, beta=2.0, gamma=0.9, batch_size=40)
    o, a, r, o_next, d = agent.sample()
    losses, _ = agent.losses(o, a, r, o_next, d)
    z, z_next = agent.policy.encode(o.flatten(1)), agent.policy.encode(o_next.flatten(1))
    q = agent.q(agent.critic_target, z, a)  # the target's encoder begins as the encoder
    u = torch.minimum(q[0], q[1]) - agent.v(z)
    wanted = (torch.where(u > 0, 0.8, 0.2) * u.square()).mean()
    torch.testing.assert_close(losses["v"], wanted)
    mu, log_sigma = agent.policy(z)
    log_prob = torch.distributions.Normal(mu, log_sigma.exp()).log_prob(a).sum(1, keepdim=True)
    weight = (2 * u).exp().clamp(max=100).detach()
    torch.testing.assert_close(losses["actor"], -(weight * log_prob).mean())
    y = agent.reward_scale * r + 0.9 * (1 - d) * agent.v(z_next)
    assert 0 < d.sum() < 40
    wanted = ((agent.q(agent.critic, z, a) - y) ** 2).mean((1, 2)).sum()
    torch.testing.assert_close(losses["critic"], wanted)


def test_each_loss_trains_the_encoder_and_its_own_head():
    agent = learner(batch_size=40)
    heads = {"v": agent.v, "actor": agent.policy.net, "critic": agent.critic}
    for name in heads:
        agent.zero_grad()
        agent.losses(*agent.sample())[0][name].backward()
        assert gradients(agent.policy.encoder).abs().sum() > 0
        for other, head in heads.items():
            reached = any(p.grad is not None and p.grad.any() for p in head.parameters())
            assert reached == (other == name), (name, other)
        for frozen in (agent.encoder_target, agent.critic_target, agent.generator, agent.model):
            assert all(p.grad is None or not p.grad.any() for p in frozen.parameters())


def test_weights_have_a_bound():
    agent = learner(beta=1e6, batch_size=40)
    units.constant_net(agent.v, -1e3)
    o, a, r, o_next, d = agent.sample()
    wanted = -100 * agent.policy.log_prob(agent.policy.encode(o.flatten(1)), a).mean()
    torch.testing.assert_close(agent.losses(o, a, r, o_next, d)[0]["actor"], wanted)


def test_targets_move_at_their_rate_and_with_them_the_encoder():
    agent = learner(tau=0.1)
    online, target = (
        [*agent.policy.encoder.parameters(), *agent.critic.parameters()],
        [*agent.encoder_target.parameters(), *agent.critic_target.parameters()],
    )
    for p in online:
        p.data += 1
    old = [p.clone() for p in target]
    agent.update_targets()
    for p, q, before in zip(online, target, old):
        torch.testing.assert_close(q, before + 0.1 * (p - before))
    o, a, r, o_next, d = agent.sample()
    before = agent.losses(o, a, r, o_next, d)[0]["v"].item()
    agent.encoder_target[0][2].weight.data *= -1
    assert agent.losses(o, a, r, o_next, d)[0]["v"].item() != before


def test_rewards_are_scaled_to_returns_of_a_thousand():
    rows = pictures()
    agent = learner(rows)
    returns = rows["returns_to_go"][::4]
    torch.testing.assert_close(agent.reward_scale, 1000 / (returns.max() - returns.min()))


# ------------------------------------------------------------------------- Held out, refused


def test_what_is_said_of_held_out_pictures():
    agent, rows = learner(), pictures(32)
    rows["images"] = torch.randint(0, 256, (32, SIDE, SIDE, 3), dtype=torch.uint8)
    truth = agent.pictures(rows["images"])

    def paint(share):
        def generator(o, s):
            after = truth[torch.arange(32) % 4 != 0]  # the pairs' second pictures
            return share * after + (1 - share) * after.mean((2, 3), keepdim=True)

        agent.generator.forward = generator
        with torch.no_grad():
            return agent.validate(rows)

    perfect, grey = paint(1.0), paint(0.5)
    assert perfect["l1"] == 0 and perfect["psnr"] == pytest.approx(80)
    torch.testing.assert_close(perfect["sharpness"], torch.tensor(1.0))
    torch.testing.assert_close(grey["sharpness"], torch.tensor(0.5))
    after = truth[torch.arange(32) % 4 != 0]
    off = 0.25 * (after - after.mean((2, 3), keepdim=True))
    torch.testing.assert_close(grey["l1"], off.abs().mean())
    psnr = -10 * torch.log10(off.square().mean((1, 2, 3))).mean()
    torch.testing.assert_close(grey["psnr"], psnr)
    before = truth[torch.arange(32) % 4 != 3]
    torch.testing.assert_close(grey["l1_copied"], (before - after).abs().mean() / 2)


def test_reading_a_state_back_counts_what_a_true_picture_shows():
    """R sees the first number in all pictures and the second in none."""
    agent, rows = learner(), pictures(32)
    states = agent.standardise(rows["observations"][torch.arange(32) % 4 != 0])
    noise = torch.tensor([0.0, 9.0, 9.0])
    calls = []

    def reader(x):
        calls.append(x)  # true pictures, painted ones, those before
        off = (0.0, 0.3, 0.5)[len(calls) - 1] * states[:, 0].std(correction=0)
        return states + noise + torch.tensor([1.0, 0, 0]) * off

    agent.reader.forward = reader
    with torch.no_grad():
        found = agent.validate(rows)
    torch.testing.assert_close(found["read_true"], torch.tensor(1.0))
    torch.testing.assert_close(found["read_painted"], torch.tensor(1 - 0.3**2))
    torch.testing.assert_close(found["read_copied"], torch.tensor(1 - 0.5**2))
    row = torch.arange(32).view(8, 4)  # of each episode
    true, painted, before = calls
    assert torch.equal(true, agent.pictures(rows["images"][row[:, 1:].flatten()]))
    assert torch.equal(before, agent.pictures(rows["images"][row[:, :3].flatten()]))
    assert torch.equal(painted, agent.generator(before, states))


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda rows: rows.pop("images"), "--image-size 16: the data's images are none.*make.py"),
        (lambda rows: rows.update(images=rows["images"][:, :8]), "--image-size 16.* 16 x 8"),
        (lambda rows: rows.update(episodes=torch.arange(64)), "No two of the data's pictures"),
    ],
)
def test_refused(change, says):
    rows = pictures()
    change(rows)
    with pytest.raises(SystemExit, match=says):
        learner(rows)


def write_pictures(path, images, n=40):
    with h5py.File(path, "w") as file:
        rows = dict(observations=np.random.default_rng(0).normal(size=(n, 5)), rewards=np.ones(n))
        rows |= dict(actions=np.zeros((n, 2)), terminals=np.zeros(n))
        rows |= dict(timeouts=np.arange(n) % 10 == 9, images=images)
        for key, value in rows.items():
            file[key] = value


def test_images_of_a_file_stay_bytes(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), np.uint8)
    write_pictures(tmp_path / "p.hdf5", images)
    data, task = s2p.load_dataset(str(tmp_path / "p.hdf5"))
    kept = np.arange(40) % 10 != 9  # the last of an episode has no successor in this file
    assert data["images"].dtype == np.uint8 and np.array_equal(data["images"], images[kept])
    assert task["sizes"] == [2 * SIDE * SIDE * 3, 2] and data["observations"].shape == (36, 5)
    for wrong in (images[:39], images / 255.0, images.reshape(40, -1)):
        write_pictures(tmp_path / "p.hdf5", wrong)
        with pytest.raises(SystemExit, match="'images' is not"):
            s2p.load_dataset(str(tmp_path / "p.hdf5"))


def test_a_run_on_pictures_is_evaluated_from_its_checkpoint(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), np.uint8)
    write_pictures(tmp_path / "p.hdf5", images)
    flags = tiny("s2p", **FLAGS, dataset=str(tmp_path / "p.hdf5"), run_dir=str(tmp_path / "run"))
    history = s2p.train(s2p.Args(**flags, validation_fraction=0.3))
    assert np.isfinite(list(history[-1].values())).all()
    policy = s2p.load_policy(tmp_path / "run")
    o = np.random.default_rng(1).integers(0, 256, (3, 2 * SIDE * SIDE * 3), np.uint8)
    assert policy.act(o).shape == (3, 2) and np.ptp(policy.act(o), axis=0).max() > 0


# ------------------------------------------------------------------------------ The renderer


@pytest.fixture(scope="module")
def pixels():
    """datasets/pixels.py where MuJoCo can draw; elsewhere these tests are skipped."""
    try:
        renderer.Camera(gym.make("HalfCheetah-v5").unwrapped.model).renderer.close()
    except Exception as error:
        pytest.skip(f"MuJoCo cannot draw here (it needs libosmesa6 or libegl1): {error}")
    return renderer


def test_rendered_states_are_what_the_environment_shows(pixels, monkeypatch):
    """Picture for picture, from states, actions and rewards alone, but for where the run began."""
    env = gym.make(f"pixels:{pixels.ID}")
    o, _ = env.reset(seed=0)
    env.action_space.seed(0)
    body, rows = env.unwrapped.data, {k: [] for k in "observations actions rewards".split()}
    assert o.dtype == np.uint8 and o.shape == (2 * 64 * 64 * 3,)
    assert np.array_equal(*o.reshape(2, -1))  # nothing came before
    x, shown = body.qpos[0], [o.reshape(2, 64, 64, 3)[1]]
    for _ in range(30):
        rows["observations"].append([*body.qpos[1:], *body.qvel])
        rows["actions"].append(env.action_space.sample())
        o, r, *_ = env.step(rows["actions"][-1])
        rows["rewards"].append(r)
        frames = o.reshape(2, 64, 64, 3)
        assert np.array_equal(frames[0], shown[-1])  # the one before, then this one
        shown.append(frames[1])
    rows = {key: np.array(value) for key, value in rows.items()}
    rows |= {"terminals": np.zeros(30), "timeouts": np.zeros(30)}
    monkeypatch.setattr(pixels.np.random, "default_rng", lambda seed: Start(x))
    found = pixels.render(rows)
    assert found.dtype == np.uint8 and np.array_equal(found, np.array(shown[:-1]))
    assert len(np.unique(found.reshape(30, -1), axis=0)) == 30
    assert env.render().shape == (256, 256, 3)
    env.close()


class Start:
    def __init__(self, x):
        self.x = x

    def uniform(self, low, high):
        return self.x


def test_the_camera_changes_no_dynamics(pixels):
    seen, blind = gym.make(f"pixels:{pixels.ID}"), gym.make("HalfCheetah-v5")
    seen.reset(seed=1), blind.reset(seed=1)
    blind.action_space.seed(1)
    for _ in range(20):
        a = blind.action_space.sample()
        assert seen.step(a)[1] == blind.step(a)[1]
    assert np.array_equal(seen.unwrapped.data.qpos, blind.unwrapped.data.qpos)
    seen.close()


def test_the_floor_never_ends(pixels):
    """It is drawn as if the body had run a whole number of its patterns less."""
    env = gym.make("HalfCheetah-v5").unwrapped
    env.reset(seed=0)
    camera = pixels.Camera(env.model)
    near = camera.shoot(env.data).copy()
    env.data.qpos[0] += 100 * pixels.TILE
    far = camera.shoot(env.data).copy()
    env.data.qpos[0] += pixels.TILE / 3
    assert np.abs(near.astype(int) - far).max() <= 2
    assert np.abs(near.astype(int) - camera.shoot(env.data)).max() > 50
    camera.renderer.close()


def test_make_draws_every_tenth_episode(pixels, tmp_path, monkeypatch):
    """And what it writes loads, with the environment that shows the same."""
    spec = importlib.util.spec_from_file_location("pixels_maker", ROOT / "datasets" / "make.py")
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    monkeypatch.setattr(maker, "FOLDER", tmp_path)
    rng, n = np.random.default_rng(0), 36  # episodes of three rows
    rows = {key: 0.1 * rng.normal(size=(n, 17)) for key in ("observations", "next_observations")}
    rows |= dict(actions=rng.uniform(-1, 1, (n, 6)), rewards=rng.normal(size=n))
    rows |= dict(terminals=np.zeros(n, bool), timeouts=np.arange(n) % 3 == 2)
    maker.write("halfcheetah-medium-replay", rows, "HalfCheetah-v5", "noise", 0)
    maker.main(maker.Args(names=["halfcheetah-pixels"]))
    monkeypatch.chdir(ROOT)
    data, task = s2p.load_dataset(str(tmp_path / "halfcheetah-pixels.hdf5"))
    np.testing.assert_allclose(data["observations"], rows["observations"][15:18], rtol=1e-6)
    np.testing.assert_allclose(data["next_observations"][2], rows["next_observations"][17], 1e-6)
    assert data["images"].shape == (3, 64, 64, 3) and data["images"].dtype == np.uint8
    assert task["env_id"] == pixels.ID and task["sizes"] == [2 * 64 * 64 * 3, 6]
    assert task["scores"] == [pytest.approx(-280.18, abs=0.01), 12135.0]
