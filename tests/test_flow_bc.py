"""What flow_bc.py claims: an invertible map, an exact density, two modes where there are two."""

import contextlib
import copy
import math

import numpy as np
import pytest
import torch
from conftest import load
from torch import distributions
from torch.autograd.functional import jacobian
from torch.utils._python_dispatch import TorchDispatchMode
from units import A, S, copies, data, gradient_of, gradients, learner

flow_bc = load("flow_bc")
every_coupling = pytest.mark.parametrize("coupling", ["spline", "affine"])
LOW, HIGH = (-2.0, -1.0), (2.0, 3.0)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def actions(n=64, dims=A, **columns):
    return data(n, actions=0.9 * (2 * torch.rand(n, dims) - 1), **columns)


def wild(dims, coupling, dtype=torch.float64, **flags):
    """A policy far from its start: every parameter is random."""
    flow = learner("flow_bc", actions(dims=dims), coupling=coupling, **flags).policy.to(dtype)
    for parameter in flow.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return flow


def fitted(rows, steps=400, **flags):
    """A learner after so many steps on one state, on as small a problem as there is."""
    flags = dict(hidden_dim=32, batch_size=256, learning_rate=5e-3, bins=8) | flags
    cloner = learner("flow_bc", rows, **flags)
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
    cloner = fitted(actions(512, dims=3), 50, coupling=coupling, blocks=4, learning_rate=1e-3)
    flow, s, a = cloner.policy, cloner.s, cloner.a
    torch.testing.assert_close(flow.inverse(flow(a, s)[0], s)[0], a, atol=1e-5, rtol=0)


class BFloat16Products(TorchDispatchMode):
    """Matrix products as a machine with AMX makes them at --matmul-precision medium, anywhere."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in ("mm", "addmm", "bmm", "baddbmm"):
            args = [*args[:-2], *(x.bfloat16().to(x.dtype) for x in args[-2:])]
        return func(*args, **(kwargs or {}))


@pytest.fixture
def medium():
    """--matmul-precision medium, as this machine has it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


@every_coupling
@pytest.mark.parametrize("products", [contextlib.nullcontext, BFloat16Products])
def test_exact_at_every_matmul_precision(coupling, products, medium):
    """17 dimensions, and couplings that no product rounds, since their last layers are biases: the
    density is that of float64, and the inverse is one."""
    flow = learner("flow_bc", actions(dims=17), coupling=coupling, blocks=4).policy
    for name, parameter in flow.named_parameters():
        if "net" not in name or name.endswith("net.4.bias"):
            parameter.data += 0.1 * torch.randn_like(parameter)
    a, s = 2 * torch.rand(500, 17) - 1, torch.randn(500, S)
    z_64, log_prob_64 = copy.deepcopy(flow).double()(a.double(), s.double())
    with products():
        z, log_prob = flow(a, s)
        back, same = flow.inverse(z, s)
    assert (z - flow.layers[0](a, s)[0]).abs().mean() > 0.1
    torch.testing.assert_close(z, z_64.float(), atol=1e-4, rtol=0)
    torch.testing.assert_close(log_prob, log_prob_64.float(), atol=1e-3, rtol=0)
    torch.testing.assert_close(back, a, atol=1e-5, rtol=0)
    torch.testing.assert_close(same, log_prob, atol=1e-3, rtol=0)


@every_coupling
def test_rounded_networks_are_inverted_as_well(coupling):
    """The couplings' networks may round: they do the same going back, as long as what they see
    rounds to the same number. That the inverse meets another one is rare."""
    flow = learner("flow_bc", actions(dims=17), coupling=coupling, blocks=4).policy
    for parameter in flow.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    a, s = 2 * torch.rand(500, 17) - 1, torch.randn(500, S)
    with BFloat16Products():
        z, log_prob = flow(a, s)
        back, same = flow.inverse(z, s)
    error = (back - a).abs().amax(-1)
    assert (error < 1e-4).float().mean() > 0.95
    assert ((same - log_prob).abs() < 1e-3).float().mean() > 0.95


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


def test_each_layers_log_determinant_is_its_jacobians():
    """One by one, both ways: no error of one makes up for another's."""
    flow, s = wild(4, "spline"), torch.randn(1, S).double()
    affine = wild(4, "affine").layers
    for layer in (*flow.layers[:3], affine[2]):
        for inverse in (False, True):
            x = 2 * torch.rand(1, 4).double() - 1
            matrix = jacobian(lambda x: layer(x, s, inverse=inverse)[0][0], x)[:, 0]
            log_det = layer(x, s, inverse=inverse)[1]
            torch.testing.assert_close(log_det[0], matrix.slogdet()[1], atol=1e-8, rtol=0)


def test_the_mixing_is_a_product_of_triangles():
    """L U P x: P the reversal, L with a diagonal of ones, U with that of exp(log_diagonal)."""
    layer = wild(4, "spline").layers[1]
    lower = layer.lower.tril(-1) + torch.eye(4)
    upper = layer.upper.triu(1) + layer.log_diagonal.exp().diag()
    x = torch.randn(9, 4).double()
    torch.testing.assert_close(layer(x, None)[0], x.flip(-1) @ (lower @ upper).T)


@every_coupling
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_dimension_depends_on_the_state(dims, coupling):
    flow = wild(dims, coupling)
    a, s = torch.zeros(1, dims).double(), torch.randn(1, S).double()
    assert (jacobian(lambda s: flow(a, s)[0][0], s).abs().amax((1, 2)) > 1e-4).all()


@every_coupling
@pytest.mark.parametrize("dims", [2, 3, 6])
def test_halves_alternate(dims, coupling):
    """Before the mixings have learnt anything: a coupling leaves ⌊A/2⌋ dimensions as they are, two
    couplings none, and the second sees what the first moved."""
    flow = learner("flow_bc", actions(dims=dims), coupling=coupling, blocks=2).policy.double()
    for name, parameter in flow.named_parameters():
        if "net" in name:
            parameter.data += 0.2 * torch.randn_like(parameter)
    a, s = 2 * torch.rand(1, dims).double() - 1, torch.randn(1, S).double()

    def on_state(layers):
        def z(s):
            x = a
            for layer in layers:
                x, _ = layer(x, s)
            return x[0]

        return jacobian(z, s).abs().amax((1, 2)) > 1e-6

    assert on_state(flow.layers[:3]).tolist() == [False] * (dims // 2) + [True] * -(-dims // 2)
    assert on_state(flow.layers).all()
    on_actions = jacobian(lambda a: flow(a, s)[0][0], a)[:, 0]  # (A, A)
    assert ((on_actions.abs() > 1e-9).sum(-1) >= 2).all()


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


def test_bins_of_the_spline_are_those_asked_for():
    """At the knots, the sums of softmax widths, it takes the sums of softmax heights; no bin has
    less than a thousandth, so that logits far apart are no fold."""
    theta = torch.randn(1, 1, 11).double()
    widths, heights = (
        (0.001 + 0.996 * logits.softmax(-1)).cumsum(-1) for logits in theta[0, 0, :8].split(4)
    )
    x = (8 * widths - 4)[:, None]
    y, _ = flow_bc.spline(x, theta.expand(4, 1, 11), 4.0)
    torch.testing.assert_close(y[:, 0], 8 * heights - 4)
    x = torch.linspace(-4, 4, 10_001).double()[:, None]
    theta = torch.tensor([0.0, 50, -50, 0, -50, 50, 0, 0, 0, 0, 0]).double()
    y, log_det = flow_bc.spline(x, theta.expand(len(x), 1, 11), 4.0)
    assert (y.diff(dim=0) > 0).all() and log_det.isfinite().all()


# ------------------------------------------------------------------------------ How it begins


@every_coupling
@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_it_begins_as_the_datas_gaussian(dims, coupling, noise):
    """Of independent actions with the data's mean and variance, the noise's w²/3 added."""
    rows = data(400, actions=0.1 * torch.randn(400, dims).cumsum(1) + 0.4)
    cloner = learner("flow_bc", rows, coupling=coupling, noise=noise)
    a = rows["actions"]
    one = distributions.Normal(a.mean(0), (a.var(0, correction=0) + noise**2 / 3).sqrt())
    nll = cloner.losses(cloner.s, a)[0]
    torch.testing.assert_close(nll, -one.log_prob(a).mean(), atol=1e-4, rtol=0)
    if not noise:
        z = cloner.losses(cloner.s, a)[1]
        torch.testing.assert_close(z.mean(0), torch.zeros(dims), atol=1e-3, rtol=0)
        torch.testing.assert_close(z.std(0, correction=0), torch.ones(dims), atol=1e-3, rtol=0)


def test_affine_in_one_dimension_is_the_gaussian_of_bc():
    """Same density, same units: bc.py's head with the mean and standard deviation of the flow."""
    flow = wild(1, "affine", torch.float32)
    rows = actions(100, dims=1)
    s, a = torch.randn(100, S), rows["actions"]
    mean, right = (flow.inverse(torch.full_like(a, z), s)[0] for z in (0.0, 1.0))
    cloner = learner("bc", rows, policy="gaussian")
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
    """The best Gaussian has their mean and variance; the mixture itself is the best of all."""
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
    assert cloner.losses(cloner.s, cloner.a)[0].item() < best - 0.1


# -------------------------------------------------------------------------------------- Acting


def test_ways_of_acting():
    """70 % of the data go right: samples do too, the mode always; z = 0 is the median."""
    policy = fitted(two_modes(right=0.7, width=0.02), candidates=32).policy
    s = torch.zeros(2000, S)
    sample, mode, zero = (policy.act(s, how=how) for how in ("sample", "mode", "zero"))
    assert (sample > 0).float().mean().item() == pytest.approx(0.7, abs=0.07)
    assert ((sample.abs() - 0.8).abs() < 0.1).float().mean() > 0.9
    assert (mode > 0).float().mean() > 0.9 and (mode - 0.8).abs().median() < 0.03
    assert torch.equal(zero, zero[:1].expand_as(zero))
    assert (sample > zero[0]).float().mean().item() == pytest.approx(0.5, abs=0.04)


def test_mode_is_the_likeliest_of_the_candidates():
    policy = wild(2, "spline", torch.float32, candidates=5)
    policy.scaling.bounds.copy_(torch.tensor([[-9.0, -9.0], [9.0, 9.0]]))
    o = torch.randn(7, S)
    torch.manual_seed(1)
    chosen = policy.act(o, how="mode")
    torch.manual_seed(1)
    z = torch.randn(35, 2).view(7, 5, 2)
    for i in range(7):
        s = policy.scaling.state(o[i]).expand(5, S)
        a, _ = policy.inverse(z[i], s)
        best = a[policy(a, s)[1].argmax()]
        torch.testing.assert_close(chosen[i], 9 * best.clamp(-1, 1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("how", ["mode", "sample", "zero"])
def test_act_answers_in_the_environments_bounds(how):
    """A flow that says x whatever the noise acts with the action that x came from."""
    low, high = torch.tensor(LOW), torch.tensor(HIGH)
    policy = learner("flow_bc", actions(), LOW, HIGH, act=how).policy
    a = policy.act(torch.randn(500, S))
    assert a.shape == (500, A) and (a >= low).all() and (a <= high).all()
    policy.layers[0].log_std.data.add_(3)  # the density reaches far beyond the bounds
    a = policy.act(torch.randn(500, S))
    assert (a >= low).all() and (a <= high).all()
    policy.layers[0].log_std.data -= 40  # all samples are the mean of the data
    for x in ([0.0, 0.0], [0.5, -0.25], [-1.0, 1.0]):
        policy.layers[0].mean.data = torch.tensor(x)
        wanted = low + (torch.tensor([x]) + 1) / 2 * (high - low)
        torch.testing.assert_close(policy.act(torch.randn(500, S)), wanted.expand(500, A))


@pytest.mark.parametrize("how", ["mode", "sample", "zero"])
@pytest.mark.parametrize("kind", [np.float32, np.float64, torch.float32, torch.float64])
def test_act_takes_one_or_many_of_any_kind(kind, how):
    policy = learner("flow_bc", actions(), LOW, HIGH, act=how).policy
    s = np.random.default_rng(0).normal(size=(4, S))
    s = torch.tensor(s, dtype=kind) if isinstance(kind, torch.dtype) else s.astype(kind)
    many, one = policy.act(s), policy.act(s[1])
    assert type(many) is type(one) is type(s)
    assert many.shape == (4, A) and one.shape == (A,)
    many, one = policy.act(s, deterministic=True), policy.act(s[1], deterministic=True)
    assert np.allclose(many[1], one, atol=1e-5)
    assert np.array_equal(many, policy.act(s, how="zero"))


def test_states_are_normalised_by_the_policy():
    rows = actions(observations=torch.randn(64, S) * torch.tensor([1, 10, 0]) + 5)
    cloner = learner("flow_bc", rows)
    s = cloner.policy.scaling.state(rows["observations"])
    torch.testing.assert_close(s.mean(0), torch.zeros(S), atol=1e-4, rtol=0)
    torch.testing.assert_close(s.std(0, correction=0), torch.tensor([1.0, 1, 0]), atol=1e-2, rtol=0)
    assert torch.equal(cloner.s, s) and torch.equal(cloner.a, rows["actions"])
    seen, inverse = [], cloner.policy.inverse
    cloner.policy.inverse = lambda z, s: seen.append(s) or inverse(z, s)
    cloner.policy.act(rows["observations"])
    assert torch.equal(seen[0], s)


def test_ways_of_acting_to_evaluate():
    cloner = learner("flow_bc", act="zero", eval_act=("sample", "mode"))
    actors, o = cloner.policy.actors(), torch.randn(4, S)
    assert list(actors) == ["", "_sample", "_mode"]
    assert torch.equal(actors[""](o), cloner.policy.act(o, how="zero"))
    for how in ("sample", "mode"):
        torch.manual_seed(3)
        drawn = actors[f"_{how}"](o)
        torch.manual_seed(3)
        assert torch.equal(drawn, cloner.policy.act(o, how=how))
        assert not torch.equal(drawn, actors[""](o))
    assert set(cloner.policy.flags) == {"act", "candidates", "eval_act"}


def test_a_policy_is_its_state_and_the_task():
    """Built from task and flags alone, and loaded: the same density, the same actions."""
    cloner = learner("flow_bc", actions(), LOW, HIGH)
    cloner.update()
    other = flow_bc.Policy(dict(sizes=[S, A], bounds=[list(LOW), list(HIGH)]), cloner.args)
    other.load_state_dict(cloner.policy.state_dict())
    o = 3 * torch.randn(7, S)
    acts = [policy.act(o, deterministic=True) for policy in (cloner.policy, other)]
    assert torch.equal(*acts)
    assert torch.equal(*[policy(cloner.a, cloner.s)[1] for policy in (cloner.policy, other)])


# ------------------------------------------------------------------------ The loss, the noise


def test_loss_is_the_mean_density_per_dimension():
    cloner = learner("flow_bc", actions(dims=3))
    nll, z = cloner.losses(cloner.s, cloner.a)
    torch.testing.assert_close(nll, -cloner.policy(cloner.a, cloner.s)[1].mean() / 3)
    assert torch.equal(z, cloner.policy(cloner.a, cloner.s)[0])


def test_update_descends_the_likelihood_of_noisy_actions():
    """On the rows it draws, with the noise it draws after them; every layer receives a gradient."""
    cloner = learner("flow_bc", actions(), noise=0.3)
    for parameter in cloner.policy.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    torch.manual_seed(1)
    i = torch.randint(64, (16,))
    noisy = cloner.a[i] + 0.3 * (2 * torch.rand(16, A) - 1)
    z, log_prob = cloner.policy(noisy, cloner.s[i])
    wanted = gradient_of(-log_prob.mean() / A, cloner.policy)
    before = copies(cloner.policy)
    torch.manual_seed(1)
    metrics = cloner.update()
    torch.testing.assert_close(gradients(cloner.policy), wanted)
    torch.testing.assert_close(metrics["losses/nll"], -log_prob.mean() / A)
    torch.testing.assert_close(metrics["latent/std"], z.square().mean().sqrt())
    assert not any(torch.equal(a, b) for a, b in zip(before, copies(cloner.policy)))


@pytest.mark.parametrize("where", [1.0, -1.0, 0.3])
@every_coupling
def test_noise_bounds_the_density_at_atoms(where, coupling):
    """All actions are the same one: the loss can reach log 2w, not pass it."""
    rows = data(256, observations=torch.zeros(256, S), actions=torch.full((256, 1), where))
    cloner = fitted(rows, 300, noise=0.01, coupling=coupling)
    a = rows["actions"].repeat(40, 1)
    s = torch.zeros(len(a), S)
    nll = cloner.losses(s, cloner.blur(a))[0].item()
    assert math.log(0.02) - 0.01 < nll < math.log(0.02) + 0.4
    assert cloner.losses(s, a)[0] > math.log(0.02) - 0.6
    assert (cloner.policy.act(torch.zeros(50, S)) - where).abs().max() < 0.03


def test_without_noise_the_density_at_atoms_has_no_bound():
    rows = data(256, observations=torch.zeros(256, S), actions=torch.ones(256, 1))
    cloner = fitted(rows, 100, noise=0.0)
    assert min(cloner.update()["losses/nll"] for _ in range(200)) < math.log(0.02) - 1


def test_noise_is_uniform_and_in_training_alone(monkeypatch):
    cloner = learner("flow_bc", actions(1000), noise=0.1)
    change = cloner.blur(cloner.a) - cloner.a
    assert 0.09 < change.abs().max() <= 0.1001 and change.mean().abs() < 0.01
    assert change.std().item() == pytest.approx(0.1 / math.sqrt(3), rel=0.05)
    seen = []
    monkeypatch.setattr(cloner, "losses", lambda s, a: seen.append((s, a)) or (len(seen), a))
    rows = data(10, actions=torch.full((10, A), 0.5))
    assert cloner.validate(rows) == {"nll": 1, "nll_noisy": 2}
    (s, clean), (_, noisy) = seen
    assert (clean == 0.5).all() and (noisy != 0.5).any()
    assert torch.equal(s, cloner.policy.scaling.state(rows["observations"]))


@pytest.mark.parametrize(
    "flag, value",
    [("blocks", 0), ("bins", 1), ("candidates", 0), ("noise", -0.1), ("spline_bound", 0.0)],
)
def test_impossible_flags_are_refused(flag, value):
    with pytest.raises(SystemExit, match=f"--{flag.replace('_', '-')} {value}: .*(or more|above)"):
        learner("flow_bc", **{flag: value})


def test_as_little_as_a_flow_can_have():
    cloner = learner("flow_bc", actions(dims=1), blocks=1, bins=2, candidates=1)
    assert all(torch.isfinite(value).all() for value in cloner.update().values())
