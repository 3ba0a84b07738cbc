"""What the unit tests share: random transitions, small learners, comparisons of weights."""

import torch
from conftest import load, tiny

S, A = 3, 2


def data(n=64, **columns) -> dict[str, torch.Tensor]:
    """Random transitions, in episodes of four steps of which every other ends in a terminal;
    `columns` replaces some."""
    rows = dict(observations=torch.randn(n, S), next_observations=torch.randn(n, S))
    rows |= dict(actions=2 * torch.rand(n, A) - 1, rewards=torch.randn(n, 1))
    rows |= dict(terminals=(torch.arange(n) % 8 == 7).float()[:, None])
    rows |= dict(episodes=torch.arange(n) // 4, recorded=torch.ones(n, dtype=torch.bool))
    rows |= columns
    if "returns_to_go" not in rows:
        to_go, episodes = rows["rewards"].clone(), rows["episodes"]
        for i in reversed(range(len(to_go) - 1)):
            if episodes[i] == episodes[i + 1]:
                to_go[i] += to_go[i + 1]
        rows["returns_to_go"] = to_go
    return rows


def task(rows=None, low=-1.0, high=1.0) -> dict:
    """The task of such data: bounds are a number or one for each action."""
    sizes = [rows[key].shape[1] for key in ("observations", "actions")] if rows else [S, A]
    bounds = [torch.tensor(x).float().expand(sizes[1]).tolist() for x in (low, high)]
    found = dict(env="Pendulum-v1", env_id="Pendulum-v1", sizes=sizes, bounds=bounds)
    return found | dict(scores=None, data="")


def learner(name: str, rows=None, low=-1.0, high=1.0, **flags):
    """A small learner of algorithms/<name>.py; `name` may be its module."""
    module = load(name) if isinstance(name, str) else name
    name = module.__name__.removeprefix("algorithm_")
    rows = rows or data()
    args, given = module.Args(**tiny(name, **flags)), task(rows, low, high)
    found = module.Learner(dict(rows), given, args)
    found.given_task = given
    return found


def batch(learner) -> list[torch.Tensor]:
    """All its transitions as one batch: s, a, r, s', d."""
    return list(learner.data)


def copies(module: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def equal(one, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other))


def gradients(module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters()])


def gradient_of(loss, module) -> torch.Tensor:
    found = torch.autograd.grad(loss, list(module.parameters()))
    return torch.cat([gradient.flatten() for gradient in found])


def split_critic(critic, module) -> list[torch.nn.Module]:
    """Two plain MLPs with the weights of a TwinCritic, normalised where it is."""
    weights = list(critic.weights)
    nets = []
    for i in range(2):
        net = module.mlp(weights[0].shape[1], weights[0].shape[2], 1, len(weights) - 1)
        linear = [part for part in net if isinstance(part, torch.nn.Linear)]
        for part, weight, bias in zip(linear, weights, critic.biases):
            part.weight.data, part.bias.data = weight[i].T.clone(), bias[i, 0].clone()
        if getattr(critic, "layer_norm", False):
            norm = torch.nn.LayerNorm(linear[0].out_features, elementwise_affine=False)
            net = torch.nn.Sequential(
                *[x for part in linear[:-1] for x in (part, norm, torch.nn.ReLU())], linear[-1]
            )
        nets.append(net)
    return nets


def constant_critic(critic, one, two):
    """Q_1 and Q_2 that say the same everywhere."""
    for parameter in critic.parameters():
        parameter.data.zero_()
    critic.biases[-1].data[:, 0, 0] = torch.tensor([one, two], dtype=torch.float32)


def constant_net(net, value):
    for parameter in net.parameters():
        parameter.data.zero_()
    net[-1].bias.data.fill_(value)
