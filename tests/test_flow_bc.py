"""What flow_bc.py claims: an invertible map, an exact density, two modes where there are two."""

import math

import pytest
import torch
from conftest import load, tiny
from test_models import S, data, learner
from torch import distributions
from torch.autograd.functional import jacobian

flow_bc, bc = load("flow_bc"), load("bc")
every_coupling = pytest.mark.parametrize("coupling", ["spline", "affine"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def actions(n=64, dims=1, **columns):
    return data(n, actions=0.9 * (2 * torch.rand(n, dims) - 1), **columns)


def wild(dims, coupling, dtype=torch.float64, **flags):
    """A policy far from its start: every parameter is random."""
    flow = learner(flow_bc, actions(dims=dims), coupling=coupling, **flags).policy.to(dtype)
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return flow


def fitted(rows, steps=400, **flags):
    """A learner after so many steps on one state, on as small a problem as there is."""
    flags = dict(hidden_dim=32, batch_size=256, learning_rate=5e-3, bins=8) | flags
    cloner = learner(flow_bc, rows, **flags)
    for _ in range(steps):
        cloner.update()
    return cloner


def two_modes(n=1024, right=0.5, width=0.05, **columns):
    """One state; a share of the actions around 0.8, the others around -0.8."""
    sign = (torch.rand(n, 1) < right).float().mul(2).sub(1)
    a = 0.8 * sign + width * torch.randn(n, 1)
    return data(n, observations=torch.zeros(n, S), actions=a, **columns)


def grid(low, high, n):
    """Midpoints of n cells, (n,), and their size."""
    size = (high - low) / n
    return low + size * (torch.arange(n, dtype=torch.float64) + 0.5), size


# ------------------------------------------------------------------------ The map and its density


@every_coupling
@pytest.mark.parametrize("dims", [1, 2, 3, 6])
@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-9), (torch.float32, 1e-3)])
def test_inverse(dims, coupling, dtype, error):
    flow = wild(dims, coupling, dtype)
    a, s = 2 * torch.rand(500, dims, dtype=dtype) - 1, torch.randn(500, S, dtype=dtype)
    z, log_prob = flow(a, s)
    assert (z - a).abs().mean() > 0.1  # it does something
    back, same = flow.inverse(z, s)
    torch.testing.assert_close(back, a, atol=error, rtol=0)
    torch.testing.assert_close(same, log_prob, atol=10 * error, rtol=1e-3)


@every_coupling
def test_inverse_at_the_shipped_sizes(coupling):
    """After some training, in float32: the error is that of rounding."""
    rows = actions(512, dims=3)
    flow = fitted(rows, 50, coupling=coupling, blocks=4, learning_rate=1e-3).policy
    a, s = rows["actions"], flow.normalise(rows["observations"])
    torch.testing.assert_close(flow.inverse(flow(a, s)[0], s)[0], a, atol=1e-5, rtol=0)


@every_coupling
@pytest.mark.parametrize("dims", [1, 2, 3, 5])
def test_log_determinant_is_the_jacobians(dims, coupling):
    """Against the full Jacobian by autograd, both ways."""
    flow = wild(dims, coupling)
    for _ in range(20):
        a, s = 2 * torch.rand(1, dims).double() - 1, torch.randn(1, S).double()
        z, log_prob = flow(a, s)
        for there, point, sign in ((flow, a, 1), (flow.inverse, z, -1)):
            matrix = jacobian(lambda x: there(x, s)[0][0], point)[:, 0]  # (A, A)
            wanted = distributions.Normal(0, 1).log_prob(z).sum() + sign * matrix.slogdet()[1]
            torch.testing.assert_close(log_prob[0], wanted, atol=1e-8, rtol=0)
            assert dims == 1 or (matrix - matrix.diag().diag()).abs().max() > 1e-3  # dims mix


@every_coupling
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_dimension_depends_on_the_state(dims, coupling):
    flow = wild(dims, coupling)
    a, s = torch.zeros(1, dims).double(), torch.randn(1, S).double()
    assert (jacobian(lambda s: flow(a, s)[0][0], s).abs().amax((1, 2)) > 1e-4).all()


@every_coupling
def test_density_in_one_dimension_integrates_to_one(coupling):
    flow = wild(1, coupling)
    a, size = grid(-40, 40, 80_000)
    for s in torch.randn(3, 1, S).double():
        assert (flow(a[:, None], s.expand(len(a), S))[1].exp().sum() * size).item() == (
            pytest.approx(1, abs=1e-3)
        )


@every_coupling
def test_density_in_two_dimensions_integrates_to_one(coupling):
    flow = wild(2, coupling)
    s = torch.randn(1, S).double()
    spread = flow.inverse(torch.randn(20_000, 2).double(), s.expand(20_000, S))[0]
    low, high = spread.amin(0) - 1, spread.amax(0) + 1
    (x, dx), (y, dy) = (grid(low[i].item(), high[i].item(), 500) for i in range(2))
    a = torch.cartesian_prod(x, y)
    mass = sum(flow(part, s.expand(len(part), S))[1].exp().sum() for part in a.split(100_000))
    assert (mass * dx * dy).item() == pytest.approx(1, abs=1e-2)


@every_coupling
@pytest.mark.parametrize("dims", [1, 2])
def test_samples_follow_the_density(dims, coupling):
    """Share of samples in each of 10 (25) cells against the density integrated over them."""
    flow = wild(dims, coupling)
    s, n, fine = torch.randn(1, S).double(), 100_000, 100
    a, log_prob = flow.inverse(torch.randn(n, dims).double(), s.expand(n, S))
    torch.testing.assert_close(log_prob, flow(a, s.expand(n, S))[1])
    low, high = a.quantile(0.02, dim=0), a.quantile(0.98, dim=0)
    cells = 10 if dims == 1 else 5
    inside = ((a > low) & (a < high)).all(-1)
    index = ((a - low) / (high - low) * cells).long()[inside]
    wide = [cells] * dims
    place = index[:, 0] if dims == 1 else index[:, 0] * cells + index[:, 1]
    seen = place.bincount(minlength=cells**dims).double() / n

    axes = [grid(low[i].item(), high[i].item(), cells * fine) for i in range(dims)]
    points = torch.cartesian_prod(*[x for x, _ in axes]).view(-1, dims)
    mass = flow(points, s.expand(len(points), S))[1].exp() * math.prod(size for _, size in axes)
    mass = mass.view(*[k for cell in wide for k in (cell, fine)])
    wanted = mass.sum(tuple(range(1, 2 * dims, 2))).flatten()
    torch.testing.assert_close(seen, wanted, atol=0.006, rtol=0)


def test_the_spline_is_monotone_and_the_identity_outside():
    x = torch.linspace(-6, 6, 10_001, dtype=torch.float64)[:, None].requires_grad_()
    theta = 3 * torch.randn(1, 1, 23).double()
    y, log_det = flow_bc.spline(x, theta.expand(len(x), 1, 23), 4.0)
    outside = x.abs() >= 4
    assert (y.diff(dim=0) > 0).all() and (y - x)[~outside].abs().max() > 0.5
    assert torch.equal(y[outside], x[outside]) and (log_det[outside].abs() < 1e-9).all()
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(log_det, slope.log())
    straight = flow_bc.spline(x, torch.zeros(len(x), 1, 23).double(), 4.0)[0]
    torch.testing.assert_close(straight, x)  # zeros are the identity


@every_coupling
@pytest.mark.parametrize("dims", [1, 3])
def test_it_begins_as_the_datas_gaussian(dims, coupling):
    rows = data(400, actions=0.1 * torch.randn(400, dims).cumsum(1) + 0.4)
    cloner = learner(flow_bc, rows, coupling=coupling, noise=0.0)
    a, s = rows["actions"], cloner.data["observations"]
    one = distributions.Normal(a.mean(0), a.std(0, correction=0))
    torch.testing.assert_close(cloner.losses(s, a)[0], -one.log_prob(a).mean(), atol=1e-4, rtol=0)


def test_affine_in_one_dimension_is_the_gaussian_of_bc():
    """Same density, same units: bc.py's head with the mean and deviation that the flow has."""
    flow = wild(1, "affine", torch.float32)
    rows = actions(100)
    s, a = torch.randn(100, S), rows["actions"]
    mean, right = (flow.inverse(torch.full_like(a, z), s)[0] for z in (0.0, 1.0))
    cloner = learner(bc, rows, policy="gaussian")
    cloner.policy.forward = lambda s: (mean, (right - mean).abs().log())
    nll = -flow(a, s)[1].mean()
    torch.testing.assert_close(nll, cloner.losses(s, a)["nll"], rtol=1e-3, atol=1e-3)


def test_a_spline_in_one_dimension_is_no_gaussian():
    flow = wild(1, "spline")
    s = torch.randn(1, S).double().expand(3, S)
    step = flow.inverse(torch.tensor([[-1.0], [0.0], [1.0]]).double(), s)[0].diff(dim=0)
    assert abs((step[0] / step[1]).item() - 1) > 0.05


# ------------------------------------------------------------------------------ What it is for


def test_two_modes_beat_the_best_gaussian():
    """The best Gaussian has their mean and deviation; the mixture itself is the best of all."""
    rows = two_modes()
    a, s = two_modes(4000)["actions"], torch.zeros(4000, S)
    gaussian = distributions.Normal(a.mean(), a.std()).entropy().item()
    mixture = distributions.Normal(0, 0.05).entropy().item() + math.log(2)
    spline, affine = (fitted(rows, coupling=c).losses(s, a)[0].item() for c in ("spline", "affine"))
    print(f"nats: mixture {mixture:.2f} spline {spline:.2f} Gaussian {gaussian:.2f} {affine:.2f}")
    assert affine > gaussian - 0.02  # nothing to split: no better than a Gaussian
    assert spline < gaussian - 1 and spline < mixture + 0.15


def test_affine_couplings_find_two_modes_where_there_are_two_dimensions():
    rows = two_modes(1024)
    rows = data(1024, observations=rows["observations"], actions=rows["actions"].repeat(1, 2))
    rows["actions"] += 0.05 * torch.randn(1024, 2)
    mean = rows["actions"].mean(0)
    best = distributions.MultivariateNormal(mean, rows["actions"].T.cov()).entropy().item() / 2
    cloner = fitted(rows, coupling="affine", blocks=4)
    assert cloner.losses(cloner.data["observations"], rows["actions"])[0].item() < best - 0.1


def test_acting():
    """70 % of the data go right: samples do too, the mode always; z = 0 is the median."""
    policy = fitted(two_modes(right=0.7, width=0.02), candidates=32).policy
    s = torch.zeros(2000, S)
    sample, mode, zero = (policy.act(s, how) for how in ("sample", "mode", "zero"))
    assert (sample > 0).float().mean().item() == pytest.approx(0.7, abs=0.07)
    assert ((sample.abs() - 0.8).abs() < 0.1).float().mean() > 0.9
    assert (mode > 0).float().mean() > 0.9 and (mode - 0.8).abs().median() < 0.03
    assert torch.equal(zero, zero[:1].expand_as(zero))
    assert (sample > zero[0]).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_mode_is_the_likeliest_of_the_candidates():
    policy = wild(2, "spline", torch.float32, candidates=5)
    policy.action_low, policy.action_high = -torch.ones(1, 2) * 9, torch.ones(1, 2) * 9
    o = torch.randn(7, S)
    torch.manual_seed(1)
    chosen = policy.act(o, "mode")
    torch.manual_seed(1)
    z = torch.randn(35, 2).view(7, 5, 2)
    for i in range(7):
        s = policy.normalise(o[i : i + 1]).expand(5, S)
        a, _ = policy.inverse(z[i], s)
        best = a[flow_bc.Policy.forward(policy, a, s)[1].argmax()]
        torch.testing.assert_close(chosen[i], 9 * best.clamp(-1, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["mode", "sample", "zero"])
def test_act_answers_in_the_environments_bounds(how):
    low, high = torch.tensor([[-2.0, -1.0]]), torch.tensor([[2.0, 3.0]])
    rows = actions(dims=2) | {"action_low": low, "action_high": high}
    policy = learner(flow_bc, rows, act=how).policy
    a = policy.act(torch.randn(500, S))
    assert a.shape == (500, 2) and (a >= low).all() and (a <= high).all()
    policy.layers[0].log_std.data -= 20  # all samples are the mean of the data
    policy.layers[0].mean.data = torch.tensor([0.5, -0.25])
    wanted = torch.tensor([[1.0, 0.5]]).expand(500, 2)
    torch.testing.assert_close(policy.act(torch.randn(500, S)), wanted)


def test_ways_of_acting_to_evaluate():
    cloner = learner(flow_bc, act="zero", eval_act=("sample", "mode"))
    actors, o = cloner.actors(), torch.randn(4, S)
    assert list(actors) == ["", "_sample", "_mode"]
    assert torch.equal(actors[""](o), cloner.policy.act(o, "zero"))
    for how in ("sample", "mode"):
        torch.manual_seed(3)
        drawn = actors[f"_{how}"](o)
        torch.manual_seed(3)
        assert torch.equal(drawn, cloner.policy.act(o, how))
        assert not torch.equal(drawn, actors[""](o))


# ---------------------------------------------------------------------------------- The bounds


@pytest.mark.parametrize("where", [1.0, -1.0, 0.3])
@pytest.mark.parametrize("coupling", ["spline", "affine"])
def test_noise_bounds_the_density_at_atoms(where, coupling):
    """All actions are the same one: the loss can reach log 2w, not pass it."""
    rows = data(256, observations=torch.zeros(256, S), actions=torch.full((256, 1), where))
    cloner = fitted(rows, 300, noise=0.01, coupling=coupling)
    a = rows["actions"].expand(256, 1).repeat(40, 1)
    s = torch.zeros(len(a), S)
    nll = cloner.losses(s, cloner.blur(a))[0].item()
    assert math.log(0.02) - 0.01 < nll < math.log(0.02) + 0.4
    assert cloner.losses(s, a)[0] > math.log(0.02) - 0.6
    assert (cloner.policy.act(torch.zeros(50, S)) - where).abs().max() < 0.03


def test_without_noise_the_density_at_atoms_has_no_bound():
    rows = data(256, observations=torch.zeros(256, S), actions=torch.ones(256, 1))
    assert fitted(rows, 300, noise=0.0).update()["losses/nll"] < math.log(0.02) - 1


def test_noise_is_uniform_and_in_training_alone(monkeypatch):
    cloner = learner(flow_bc, actions(1000, dims=2), noise=0.1)
    a = cloner.data["actions"]
    change = cloner.blur(a) - a
    assert 0.09 < change.abs().max() <= 0.1001
    assert change.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    seen = []
    monkeypatch.setattr(cloner, "losses", lambda s, a: seen.append(a) or (torch.zeros(()), a))
    cloner.validate(data(10, actions=torch.full((10, 2), 0.5)))
    assert (seen[0] == 0.5).all() and (seen[1] != 0.5).any()


def test_loss_is_the_mean_density_per_dimension():
    cloner = learner(flow_bc, actions(dims=3))
    s, a = cloner.data["observations"], cloner.data["actions"]
    torch.testing.assert_close(cloner.losses(s, a)[0], -cloner.policy(a, s)[1].mean() / 3)


@pytest.mark.parametrize(
    "flag, value",
    [("blocks", 0), ("bins", 1), ("candidates", 0), ("noise", -0.1), ("spline_bound", 0.0)],
)
def test_impossible_flags_are_refused(flag, value):
    with pytest.raises(SystemExit, match=f"--{flag.replace('_', '-')} {value}: .* at least|above"):
        learner(flow_bc, **{flag: value})


def test_as_little_as_a_flow_can_have():
    args = tiny("flow_bc", blocks=1, bins=2, candidates=1)
    cloner = flow_bc.FlowBC(actions(), flow_bc.Args(**args))
    assert all(torch.isfinite(value).all() for value in cloner.update().values())
