"""What trajectory_transformer.py claims: numbers become the nearest words, no word sees its future
or another V, what is cached is what would be computed, and the search finds the plan that promises
most."""

import itertools
import math
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
import units
from conftest import load, tiny
from torch.nn import functional as F
from units import A, S, data, gradients, learner

tt = load("trajectory_transformer")
K, BINS, STEP = 4, 8, S + A + 2
T = K * STEP


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def planner(rows=None, low=-1.0, high=1.0, **flags):
    return learner(tt, rows, low, high, **dict(layers=2, horizon=2) | flags).eval()


def wild(rows=None, low=-1.0, high=1.0, **flags):
    """A learner whose policy is far from its start: every parameter is random."""
    found = planner(rows, low, high, **flags)
    for parameter in found.policy.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return found


def words(n=3, steps=T, bins=BINS):
    return torch.randint(bins, (n, steps))


# -------------------------------------------------------------------------------------- Words


def encoder(numbers, bins):
    """A policy of one state and one action that has the words of these states (N,)."""
    rows = data(len(numbers), observations=numbers[:, None], actions=torch.zeros(len(numbers), 1))
    agent = planner(rows | {"next_observations": numbers[:, None]}, bins=bins)
    return agent.policy, agent.policy.scaling.state(numbers)


@pytest.mark.parametrize("bins", [2, 7, 100])
def test_a_number_becomes_the_nearest_word(bins):
    """And comes back within half the distance of two words, however skewed the data are."""
    policy, s = encoder(torch.randn(1001).exp() ** 2, bins)
    code, values = policy.encode(s), policy.words[0, :-1]
    assert code.shape == (1001, 1) and code.min() == 0 and code.max() == bins - 1
    back = values[code]
    assert torch.equal((s - values).abs().min(1).values, (s - back).abs()[:, 0])
    gaps = values.diff()
    half = 0.5 * torch.maximum(F.pad(gaps, (0, 1)), F.pad(gaps, (1, 0)))[code]
    assert (((s - back).abs() <= half * (1 + 1e-5)) | (s == back)).all()
    assert torch.equal(policy.encode(back), code)
    assert values[0] == s.min() and values[-1] == s.max()
    beyond = policy.encode(torch.tensor([[-1e9], [1e9]]))
    assert beyond[:, 0].tolist() == [0, bins - 1]
    share = code.flatten().bincount(minlength=bins) / 1001
    if bins == 100:  # about as many rows for each word
        assert share.max() < 0.05


def test_values_that_many_rows_have_are_exact():
    """A sparse reward, or actions at their bounds."""
    policy, s = encoder(torch.tensor([0.0] * 600 + [1.0] * 300 + [5.0] * 21), 10)
    assert torch.equal(policy.words[0][policy.encode(s)], s) and s.unique().numel() == 3


def test_each_dimension_has_its_own_words():
    agent = planner(data(64, rewards=100 * torch.randn(64, 1)), bins=64)
    x = agent.numbers(data(64))
    assert agent.policy.words.shape == (STEP, 65) and (agent.policy.words[:, -1] == 0).all()
    code = agent.policy.encode(x)
    for i in range(STEP):
        assert torch.equal(agent.policy.encode(x[:, i : i + 1], i), code[:, i : i + 1])
    assert agent.policy.words[STEP - 2, :-1].std() > 20 > agent.policy.words[0, :-1].std()


# ----------------------------------------------------------------------------------- The data


@pytest.mark.parametrize("gamma", [0.5, 1.0])
def test_numbers_of_a_row(gamma):
    """V against a plain loop: it begins after r_t, and a terminal's reward is the flag's."""
    rows = data(64)
    agent = planner(rows, gamma=gamma, terminal_reward=-7.0)
    s, a, r, V = agent.numbers(rows).split([S, A, 1, 1], dim=1)
    wanted = torch.where(rows["terminals"] > 0, -7.0, rows["rewards"])
    assert torch.equal(r, wanted) and torch.equal(a, rows["actions"])
    assert torch.equal(s, agent.policy.scaling.state(rows["observations"]))
    for i in range(64):
        rest = wanted[i + 1 : (i // 4 + 1) * 4, 0]
        value = sum(gamma**k * x for k, x in enumerate(rest.tolist()))
        assert V[i].item() == pytest.approx(value, abs=1e-4)


def test_the_reward_of_a_row_without_a_successor_counts(tmp_path):
    ends, states = np.arange(12) % 4 == 3, np.arange(36.0).reshape(12, 3)
    arrays = dict(observations=states, actions=np.zeros((12, 2)), rewards=np.arange(12) + 1.0)
    np.savez(tmp_path / "own.npz", **arrays, terminals=np.zeros(12), timeouts=ends)
    rows, task = tt.load_dataset(str(tmp_path / "own.npz"))
    rows = {key: torch.as_tensor(array) for key, array in rows.items()}
    agent = tt.Learner(rows, task, tt.Args(**tiny("trajectory_transformer", layers=2, gamma=0.5)))
    V = agent.numbers(rows)[:3, -1]
    assert V.tolist() == [2 + 0.5 * 3 + 0.25 * 4, 3 + 0.5 * 4, 4]


def test_windows_end_with_their_episode():
    """After a terminal stop words that count, after a timeout stop words that do not."""
    rows = data(12, episodes=torch.arange(12) // 4)
    rows["terminals"] = (torch.arange(12) == 7).float()[:, None]
    agent = planner(rows)
    start = torch.arange(12)
    found, counts = agent.windows(agent.data, start)
    assert found.shape == counts.shape == (12, K, STEP)
    for i in range(12):
        left = 4 - i % 4
        assert torch.equal(found[i, :left], agent.data[0][i : i + left])
        assert (found[i, left:] == BINS).all()
        wanted = torch.ones(K, STEP, dtype=torch.bool)
        wanted[left:] = i // 4 == 1
        wanted[0, 0] = False
        assert torch.equal(counts[i], wanted)


def test_an_episode_is_drawn_as_often_as_it_is_long():
    agent, seen = planner(batch_size=3000), []
    windows = agent.windows
    agent.windows = lambda rows, start: seen.append(start) or windows(rows, start[:8])
    for _ in range(5):
        agent.update()
    drawn = torch.cat(seen).bincount(minlength=64) / 15_000
    torch.testing.assert_close(drawn, torch.full((64,), 1 / 64), atol=5e-3, rtol=0)


# ------------------------------------------------------------------------------- What sees what


@pytest.mark.parametrize("i", [0, 1, S, STEP - 2, STEP - 1, STEP, T - 2])
def test_what_a_word_changes(i):
    """Nothing before it, bit for bit; all that follows, but for a V: only what is read there."""
    policy, text = wild().policy, words()
    before = policy(text)[0]
    other = text.clone()
    other[:, i] = (other[:, i] + 1) % BINS
    moved = (policy(other)[0] - before).abs().amax((0, 2)) > 0
    wanted = torch.arange(T) >= i
    if i % STEP == STEP - 1:
        wanted = torch.arange(T) == i
    assert torch.equal(moved, wanted)


def test_each_dimension_has_its_output_layer_and_its_rows():
    """The logits read at dimension i are of the layer i; a word is told from another dimension's
    same word, the stop word is one for all."""
    policy, text = wild().policy, words(1)
    text[:] = torch.arange(T) % BINS
    for i in (0, 3, STEP - 1, STEP + 2):
        policy.zero_grad()
        policy(text)[0][:, i].sum().backward()
        used = policy.head.grad.flatten(1).abs().sum(1) > 0
        assert used.nonzero().flatten().tolist() == [i % STEP]
    rows = policy.embed.grad.abs().sum(1) > 0  # of the last: the words up to there
    assert rows.nonzero().flatten().tolist() == sorted(
        {x % STEP * BINS + x % BINS for x in range(STEP + 3)} - {(STEP - 1) * BINS + STEP - 1}
    )
    policy.zero_grad()
    policy(torch.full((1, 3), BINS))[0].sum().backward()
    rows = policy.embed.grad.abs().sum(1) > 0
    assert rows.nonzero().flatten().tolist() == [STEP * BINS] and len(rows) == STEP * BINS + 1


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_a_block_is_attention_and_an_mlp(heads):
    """Against torch's own attention, with the same weights."""
    block = tt.Block(16, heads, 0.5).eval()
    other = torch.nn.MultiheadAttention(16, heads, batch_first=True)
    # Keys and values of a head stand side by side.
    pick = torch.arange(32).view(heads, 2, -1).transpose(0, 1).flatten()
    kv = block.key_value.weight[pick], block.key_value.bias[pick]
    other.in_proj_weight.data = torch.cat([block.query.weight, kv[0]]).detach()
    other.in_proj_bias.data = torch.cat([block.query.bias, kv[1]]).detach()
    other.out_proj.load_state_dict(block.project.state_dict())
    x, mask = torch.randn(5, 7, 16), torch.ones(7, 7, dtype=torch.bool).tril()
    h = block.norm_1(x)
    y = x + other(h, h, h, attn_mask=~mask, need_weights=False)[0]
    y = y + block.net(block.norm_2(y))
    torch.testing.assert_close(block(x, mask)[0], y)


@pytest.mark.parametrize("before", [1, S, STEP - 1, STEP, STEP + 3, T - 1])
def test_what_is_cached_is_what_would_be_computed(before):
    """Words in two calls against all in one; and word after word, after a past that several rows
    share."""
    policy, text = wild().policy, words(2)
    wanted, known = policy(text)
    first, past = policy(text[:, :before])
    torch.testing.assert_close(first, wanted[:, :before])
    second, now = policy(text[:, before:], past)
    torch.testing.assert_close(second, wanted[:, before:])
    for one, other in zip(now, known):
        torch.testing.assert_close(one, other)
    last = policy(text[:, before:], past, keep=slice(-1, None))[0]
    torch.testing.assert_close(last, wanted[:, -1:])

    text = torch.cat([text[:, :before].repeat_interleave(3, 0), words(6)[:, before:]], dim=1)
    wanted, own = policy(text)[0], []
    for i in range(before, T):
        logits, own = policy(text[:, i : i + 1], own, past)
        torch.testing.assert_close(logits, wanted[:, i : i + 1], rtol=1e-4, atol=1e-4)
        assert own[0].shape == (6, 2, i + 1 - before, 16)


# ------------------------------------------------------------------------------------- Learning


def test_the_loss_is_the_weighted_mean_over_what_counts():
    agent = wild(action_weight=3.0)
    text, counts = agent.windows(agent.data, torch.arange(0, 64, 3))
    loss, kinds = agent.loss(text, counts)
    log_p = agent.policy(text.flatten(1))[0].log_softmax(-1)
    total, n, of = 0.0, 0, {kind: [] for kind in ("state", "action", "reward", "value")}
    for b in range(len(text)):
        for i in range(1, T):
            if counts[b].flatten()[i]:
                x = -log_p[b, i - 1, text[b].flatten()[i]].item()
                kind = (["state"] * S + ["action"] * A + ["reward", "value"])[i % STEP]
                of[kind].append(x)
                total, n = total + x * (3 if kind == "action" else 1), n + 1
    assert loss.item() == pytest.approx(total / n, rel=1e-4)
    assert kinds.keys() == of.keys()
    for kind, found in kinds.items():
        assert found.item() == pytest.approx(np.mean(of[kind]), rel=1e-4)


def test_update_follows_its_step_size():
    """It rises in a line, falls along half a cosine to a tenth, and stays; the gradient's norm is
    bounded; the update is AdamW's, whose weight decay falls on matrices alone."""
    flags = dict(warmup_steps=4, decay_steps=10, learning_rate=1e-2, action_weight=1e4)
    agent, rates = planner(dropout=0.5, weight_decay=0.3, **flags), []
    for _ in range(20):
        metrics = agent.update()
        rates.append(metrics["charts/learning_rate"].item())
    cosine = [0.5 + 0.5 * np.cos(np.pi * i / 10) for i in range(11)] + [0.0] * 6
    wanted = [0.25, 0.5, 0.75, *np.maximum(cosine, 0.1)]
    assert rates == pytest.approx([1e-2 * x for x in wanted], rel=1e-4)
    assert gradients(agent.policy).norm() <= 1.001 < 10 < metrics["gradients/norm"]
    decayed, free = agent.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == free["betas"] == (0.9, 0.95)
    assert {x.ndim for x in decayed["params"]} == {2, 3}
    named = {id(x): key for key, x in agent.policy.named_parameters()}
    assert {named[id(x)] for x in free["params"] if x.ndim > 1} == {"embed", "position"}
    assert len(decayed["params"]) + len(free["params"]) == len(named)


def test_dropout_is_for_training():
    assert learner(tt).training  # while the loop trains; it turns that off to evaluate
    agent = planner(dropout=0.9)
    forward, text = agent.policy.forward, words()
    assert torch.equal(agent.policy(text)[0], agent.policy(text)[0])
    agent.policy.train()
    assert not torch.equal(forward(text)[0], forward(text)[0])
    block = agent.policy.blocks[0]  # in the attention, too
    block.dropout.p, x, mask = 0.0, torch.randn(1, 9, 16), torch.ones(9, 9, dtype=torch.bool)
    still = block(x, mask)[0]
    block.dropout.p = 0.9
    block.dropout.forward = lambda x: x
    assert not torch.allclose(block(x, mask)[0], still)


def test_validation_is_the_loss_without_weights():
    agent = wild()
    found, start = agent.validate(data(64)), torch.arange(0, 64, K)
    torch.manual_seed(0)
    rows = data(64)
    assert found.keys() == {"state", "action", "reward", "value"}
    agent.validate(rows)
    wanted = agent.loss(*agent.windows(agent.columns(rows), start))[1]
    for key, value in agent.validate(rows).items():
        assert torch.equal(value, wanted[key])


# --------------------------------------------------------------------------------------- Drawing


@pytest.mark.parametrize(
    "cdf, top_k, kept",
    [
        (0.0, 0, 4),
        (0.25, 0, 3),
        (0.35, 0, 2),
        (0.65, 0, 1),
        (0.9, 0, 1),
        (0.0, 2, 2),
        (0.0, 9, 4),
        (0.25, 2, 2),
    ],
)
def test_unlikely_words_are_not_drawn(cdf, top_k, kept):
    """0.1, 0.2, 0.3 and 0.4: the unlikeliest with less than `cdf` together fall, and the likeliest
    never; what is left is drawn as likely as it was."""
    p = torch.tensor([0.2, 0.4, 0.1, 0.3])
    logits = p.log().expand(20_000, -1) + 5
    drawn = planner().policy.draw(logits, cdf, top_k, None)
    assert drawn.shape == (20_000, 1)
    share = drawn.flatten().bincount(minlength=4) / 20_000
    wanted = p * (p >= p.sort(descending=True).values[kept - 1])
    torch.testing.assert_close(share, wanted / wanted.sum(), atol=0.02, rtol=0)


def test_the_likeliest_word_needs_no_luck():
    logits = torch.randn(50, 9)
    found = planner().policy.draw(logits, 0.0, 1, None)
    assert torch.equal(found[:, 0], logits.argmax(1))


# ----------------------------------------------------------------------------------- The search


class Game:
    """A known process in the place of the transformer: a state and an action of three words each,
    s' = next[s, a], r = rewards[s, a], V = values[s, a]; all actions are equally likely. It keeps
    what it has read where the transformer keeps keys and values."""

    def __init__(self, **flags):
        one = dict(observations=torch.randn(64, 1), next_observations=torch.randn(64, 1))
        rows = data(64, actions=2 * torch.rand(64, 1) - 1, **one)
        flags = dict(bins=9, context=9, history=0, action_cdf=0.0) | flags
        self.policy = planner(rows, **flags).policy
        self.next = torch.randint(3, (3, 3))
        self.rewards, self.values = torch.randint(9, (2, 3, 3))
        self.policy.words[2:, :-1] = torch.linspace(-1, 1, 9)
        self.over = torch.zeros(3, 3, dtype=torch.bool)  # whether the episode ends
        self.policy.forward = self.forward
        self.read = []

    def forward(self, text, past=(), shared=(), keep=slice(None)):
        known = (
            text[:, None, :, None] if not past else torch.cat([past[0], text[:, None, :, None]], 2)
        )
        rows = known[:, 0, :, 0]
        if shared:
            before = shared[0][:, 0, :, 0]
            rows = torch.cat([before.repeat_interleave(len(rows) // len(before), 0), rows], dim=1)
        self.read.append(rows)
        return self.logits(rows)[:, None], [known]

    def logits(self, text):
        logits, last = torch.full((len(text), 10), -1e4), text.shape[1] % 4
        step = text[:, (text.shape[1] - 1) // 4 * 4 :]
        s = step[:, 0].clamp(max=2)
        if last == 1:
            logits[:, :3] = 0
            logits[step[:, 0] == 9] = F.one_hot(torch.tensor(9), 10) * 1e4
            return logits
        a = step[:, 1].clamp(max=2)
        table = {2: self.rewards, 3: self.values, 0: self.next}[last]
        word = table[s, a].where(step[:, 0] < 9, 9)
        word = word.where(~self.over[s, a] | (last == 2), 9)
        return logits.scatter(1, word[:, None], 1e4)

    def start(self, states):
        text = torch.tensor(states)[:, None]
        return text, *self.forward(text)

    def worth(self, s, actions):
        """Of these actions from the state s on, and the states in between."""
        gamma, total, scale = self.policy.args.gamma, 0.0, self.policy.words[2]
        for h, a in enumerate(actions):
            total += gamma**h * scale[self.rewards[s, a]].item()
            value = scale[self.values[s, a]].item()
            s = self.next[s, a].item()
        return total + gamma ** len(actions) * value

    def follow(self, s, plan):
        """Asserts that rewards, values and states of a plan are those of its actions from s on."""
        for i in range(0, len(plan), 4):
            a, r, V, *following = plan[i : i + 4]
            assert (r, V) == (self.rewards[s, a], self.values[s, a])
            s = self.next[s, a].item()
            assert following in ([], [s])

    def best(self, s, horizon):
        return max(self.worth(s, plan) for plan in itertools.product(range(3), repeat=horizon))


STARTS = [0, 1, 2, 1, 0]


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("horizon", [1, 2, 3])
def test_a_beam_that_keeps_all_is_an_exhaustive_search(horizon, gamma):
    """As many plans as there are are drawn and none falls: the best of all is found, for each of
    the episodes that are planned together."""
    for _ in range(5):
        game = Game(horizon=horizon, beam_width=600, expand=1, gamma=gamma)
        plans = game.policy.search(*game.start(STARTS))
        assert plans.shape == (5, 4 * horizon - 1)
        for s, plan in zip(STARTS, plans.tolist()):
            assert game.worth(s, plan[::4]) == pytest.approx(game.best(s, horizon), abs=1e-5)
            game.follow(s, plan)


def test_plans_are_written_on_in_the_order_of_their_episodes():
    """Several continuations of each: every plan is still one from its own episode's state on."""
    for _ in range(5):
        game = Game(horizon=3, beam_width=6, expand=3)
        for s, plan in zip(STARTS, game.policy.search(*game.start(STARTS)).tolist()):
            game.follow(s, plan)


def test_a_beam_finds_the_optimum_that_a_greedy_plan_misses():
    """V is what an optimal policy still gets; the best first step has the lowest reward."""
    game = Game(horizon=3, beam_width=6, expand=4, gamma=1.0)
    game.next = torch.tensor([[0, 1, 0], [2, 1, 1], [2, 2, 2]])
    game.rewards = torch.tensor([[4, 3, 4], [4, 3, 4], [8, 8, 8]])  # worth 0, -1/4, 0; 1
    game.policy.words[3, :-1] = torch.linspace(-4, 4, 9)
    game.values = torch.tensor([[4, 5, 4], [6, 5, 4], [5, 5, 5]])  # 1 is worth 1
    plans = game.policy.search(*game.start([0, 0]))
    assert (plans[:, 0] == 1).all() and (plans[:, 4] == 0).all()
    short = Game(horizon=1, beam_width=6, expand=4)
    short.rewards, short.values = game.rewards, torch.full((3, 3), 4)
    assert (short.policy.search(*short.start([0, 0]))[:, 0] != 1).all()


def test_a_beam_of_one_is_greedy():
    """--beam-width 1 --expand 1 --action-top-k 1: word after word the likeliest."""
    agent = wild(beam_width=1, expand=1, action_top_k=1, horizon=3, history=1)
    policy, text = agent.policy, words(3, STEP + S)
    logits, past = policy(text)
    plans, written = policy.search(text, logits[:, -1:], past), text
    for i in range(3 * STEP - S):
        now = policy(written)[0][:, -1]
        now = now[:, :-1] if i < A + 2 else now
        written = torch.cat([written, now.argmax(1, keepdim=True)], dim=1)
    assert torch.equal(plans, written[:, STEP + S :])


def test_imitation_draws_from_all_words():
    """--plan sample: the action that p_θ says, as often as it says so; nothing is chosen."""
    game = Game(plan="sample", action_cdf=0.9, action_top_k=1, horizon=5, beam_width=9)
    plans = game.policy.search(*game.start([0] * 3000))
    assert plans.shape == (3000, 3)
    share = plans[:, 0].bincount(minlength=3) / 3000
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.05, rtol=0)


def test_how_much_is_computed():
    """Rows of each call: what is kept, times what is drawn; the last V's successor is not read."""
    game = Game(horizon=2, beam_width=5, expand=3)
    found = game.start([0, 1])
    game.read.clear()
    game.policy.search(*found)
    assert [len(x) for x in game.read] == [30, 30, 10, 10, 30, 30]
    assert [x.shape[1] for x in game.read] == [2, 3, 4, 5, 6, 7]


def test_expectations_not_words_are_added_up():
    """The likeliest of three rewards is the largest, their mean the smallest: the mean counts."""
    game = Game(horizon=1, beam_width=8, expand=1)
    plain = game.logits

    def logits(text):
        found = plain(text)
        if text.shape[1] == 2:  # r: after action 0 it is 1, -1 or -3/4; after others 0
            found = torch.full_like(found, -1e4)
            zero = text[:, 1] == 0
            found[~zero, 4] = 0.0
            for word, share in ((8, 0.4), (0, 0.3), (1, 0.3)):
                found[zero, word] = math.log(share)
        return found

    game.logits, game.values = logits, torch.full((3, 3), 4)
    assert (game.policy.search(*game.start([0] * 20))[:, 0] != 0).all()


def test_an_episode_that_ends_in_a_plan_is_worth_no_more():
    """The stop word's reward and return are 0; the first step is never a stop."""
    game = Game(horizon=3, beam_width=30, expand=2, gamma=1.0)
    game.next = torch.zeros(3, 3, dtype=torch.long)
    game.over[0, 2] = True
    game.rewards, game.values = torch.full((2, 3, 3), 1).unbind()  # all else costs 3/4 a step
    plans = game.policy.search(*game.start([0] * 3))
    assert (plans[:, 0] == 2).all() and (plans[:, 3:] == 9).all()
    policy = wild(horizon=2, history=0, action_cdf=0.0, state_top_k=0).policy
    policy.forward = lambda text, *x: (F.pad(torch.zeros(len(text), 1, BINS), (0, 1), value=9), [])
    plan = policy.search(words(50, S), policy.forward(words(50, S))[0], [])
    assert (plan[:, : A + 2] < BINS).all() and (plan[:, A + 2 :] == BINS).float().mean() > 0.9


def test_a_plan_draws_its_actions_and_takes_the_likeliest_states():
    policy = wild(horizon=2, history=0, action_cdf=0.0, action_top_k=0, state_top_k=1).policy
    logits = torch.zeros(1, 1, BINS + 1)
    logits[..., 2], logits[..., BINS] = 0.1, -99  # hardly likelier than the others; never a stop
    policy.forward = lambda text, *x: (logits.expand(len(text), 1, -1), [])
    plan = policy.search(words(50, S), policy.forward(words(50, S))[0], [])
    actions, states = plan[:, :A], plan[:, A + 2 : A + 2 + S]
    assert (states == 2).all() and not (actions == 2).all()


# --------------------------------------------------------------------------------------- Acting


@pytest.mark.parametrize("history", [0, 1, 2, 3])
def test_acting_is_a_search_after_the_last_steps(history):
    """Step by step with a memory: the text is what was seen, done and earned, cut to the steps not
    yet forgotten, and what is cached is what would be computed."""
    policy, seen = wild(history=history, horizon=1).policy, []
    search = policy.search
    policy.search = lambda *x: seen.append(x) or search(*x)
    states, rewards = torch.randn(9, 5, S), torch.randn(9, 5)
    memory, r, past, least = None, None, [], 0
    for i in range(9):
        actions, memory = policy.act(states[i], r, memory)
        text, logits, known, random = seen[-1]
        assert random is None
        s = policy.encode(policy.scaling.state(states[i]))
        past.append(s)
        least = i - history // 2 if i - least > history else least
        window = past[least:]
        assert text.shape[1] == (i - least) * STEP + S
        for h, step in enumerate(window):
            assert torch.equal(text[:, h * STEP : h * STEP + step.shape[1]], step)
        everything, caches = policy(text)
        torch.testing.assert_close(logits, everything[:, -1:], rtol=1e-4, atol=1e-4)
        for one, other in zip(known, caches):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        r = rewards[i]
        a = policy.encode(actions, S)
        r_word = policy.encode(r[:, None], STEP - 2)
        past[-1] = torch.cat([s, a, r_word], dim=1)


def test_a_memory_is_used():
    """Between two steps only the new words are read."""
    policy, seen = wild(history=2, horizon=1, plan="sample").policy, []
    forward = policy.forward
    policy.forward = lambda *x, **y: seen.append(x[0].shape[1]) or forward(*x, **y)
    memory, r, calls = None, None, []
    for _ in range(6):
        seen.clear()
        _, memory = policy.act(torch.randn(2, S), r, memory)
        calls.append(seen[0])
        r = torch.zeros(2)
    assert calls == [S, STEP, STEP, STEP + S, STEP, STEP + S]


def test_acting_takes_what_a_user_has():
    """NumPy or tensors of any float type, one observation or many; actions are words in the bounds;
    what is handed in is not changed."""
    low, high = [-2.0, -1.0], [2.0, 3.0]
    policy = wild(low=low, high=high).policy
    states = np.random.default_rng(0).normal(size=(4, 5, S)).astype(np.float32)
    rewards, memory, r, every = np.linspace(-1, 1, 5), None, None, []
    for s in states:
        a, memory = policy.act(s, r, memory, deterministic=True)
        assert isinstance(a, np.ndarray) and a.shape == (5, A) and a.dtype == np.float32
        known = policy.words[S : S + A, :-1].numpy()
        scaled = known * [[2], [2]] + [[0], [1]]
        for i in range(A):
            assert np.abs(a[:, i, None] - scaled[i]).min(1).max() < 1e-5
        every.append((a, r, memory))
        r = rewards
    for kind in (np.float64, torch.float32, torch.float64):
        memory, r = None, None
        for s, (wanted, _, _) in zip(states, every):
            s = s.astype(kind) if kind is np.float64 else torch.as_tensor(s, dtype=kind)
            a, memory = policy.act(s, r, memory, deterministic=True)
            assert isinstance(a, np.ndarray if kind is np.float64 else torch.Tensor)
            np.testing.assert_array_equal(a, wanted)
            r = list(rewards) if kind is np.float64 else torch.as_tensor(rewards, dtype=kind)
    a, memory = policy.act(states[0][0])
    assert a.shape == (A,) and memory[0].shape == (1, S + A)
    assert policy.act(states[1][0], 0.5, memory)[0].shape == (A,)
    _, r, memory = every[-1][0], rewards, every[-2][2]
    kept = [x.clone() for x in memory]
    for _ in range(2):
        a, _ = policy.act(states[-1], r, memory, deterministic=True)
        np.testing.assert_array_equal(a, every[-1][0])
    assert units.equal(memory, kept)
    free = [policy.act(states[0])[0] for _ in range(5)]
    assert any((x != free[0]).any() for x in free)


def test_an_episode_that_ended_can_be_left_out():
    """The others plan as if it had never been there, with words that need no luck."""
    policy = wild(beam_width=1, expand=1, action_top_k=1).policy
    states, rewards, ends = torch.randn(8, 5, S), torch.randn(8, 5), [8, 3, 8, 6, 1]

    def alone(j):
        memory, r = None, None
        for i in range(ends[j]):
            action, memory = policy.act(states[i, j : j + 1], r, memory)
            r = rewards[i, j : j + 1]
            yield action[0]

    wanted = [list(alone(j)) for j in range(5)]
    running, memory, r = torch.arange(5), None, None
    for i in range(8):
        actions, memory = policy.act(states[i, running], r, memory)
        for j, action in zip(running.tolist(), actions):
            torch.testing.assert_close(action, wanted[j][i])
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
    """A policy that acts by the number of its episode and by all rewards so far."""
    spec = gym.envs.registration.EnvSpec("Counted-v0", Counted, max_episode_steps=9)
    monkeypatch.setitem(gym.registry, "Counted-v0", spec)
    seen = []

    def act(s, r, memory):
        number, total = memory or (torch.arange(4), torch.zeros(4))
        seen.append(s[:, 0].tolist())
        total = total + (torch.as_tensor(r) if memory else 0)
        return (number + 1 + 0.5 * total)[:, None].numpy(), [number, total]

    task = dict(env="Counted-v0", env_id="Counted-v0", sizes=[1, 1], scores=(0.0, 100.0))
    row = tt.evaluate(types.SimpleNamespace(act=act), task, episodes=4, seed=10)
    returns = []
    for e, length in enumerate((3, 5, 7, 9)):
        total = 0.0
        for _ in range(length):
            total += e + 1 + 0.5 * total
        returns.append(total)
    assert row["return_mean"] == row["score"] == pytest.approx(np.mean(returns), rel=1e-5)
    assert row["return_std"] == pytest.approx(np.std(returns), rel=1e-5)
    assert row["length_mean"] == 6 and len(row) == 4
    assert seen == [[t] * n for t, n in enumerate([4, 4, 4, 3, 3, 2, 2, 1, 1])]


def test_planning_chooses_and_imitation_copies():
    """Two actions, as often one as the other, of which the second pays at the next step: learnt
    within seconds from the data alone."""
    n = 256
    a = torch.randint(2, (n, 1)).float()
    first = (torch.arange(n) % 2 == 0)[:, None]
    s = torch.where(first, 0.0, a.roll(1, 0))
    rows = dict(
        observations=s, next_observations=s, actions=2 * a - 1, episodes=torch.arange(n) // 2
    )
    rows |= dict(rewards=torch.where(first, 0.0, s), terminals=torch.zeros(n, 1))
    flags = dict(bins=2, context=2, history=0, horizon=2, learning_rate=1e-2, warmup_steps=1)
    flags |= dict(decay_steps=1000)
    flags |= dict(action_cdf=0.2, dropout=0.0, batch_size=64, expand=4)
    agent = planner(data(n, **rows), **flags)
    for _ in range(150):
        metrics = agent.update()
    assert metrics["losses/reward"] < 0.1 and 0.6 < metrics["losses/action"] < 0.8
    start = np.zeros((200, 1))
    for horizon in (1, 2):  # V knows it, and so does the second step's reward
        agent.policy.args.horizon = horizon
        assert (agent.policy.act(start)[0] == 1).all()
    agent.policy.args.plan = "sample"
    assert 60 < (agent.policy.act(start)[0] == 1).sum() < 140


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(horizon=0), "--horizon"),
        (dict(beam_width=0), "--beam-width"),
        (dict(expand=0), "--expand"),
        (dict(layers=0), "--layers"),
        (dict(heads=0), "--heads"),
        (dict(heads=3), "--heads.*--hidden-dim"),
        (dict(bins=1), "--bins"),
        (dict(history=3), "--context.*--history.*--horizon"),
        (dict(history=-1), "--history"),
        (dict(action_cdf=1.0), "--action-cdf"),
        (dict(action_top_k=-1), "--action-top-k"),
        (dict(state_top_k=-1), "--state-top-k"),
        (dict(dropout=1.0), "--dropout"),
        (dict(gamma=1.1), "--gamma"),
        (dict(warmup_steps=-1), "--warmup-steps"),
        (dict(decay_steps=0), "--decay-steps"),
    ],
)
def test_impossible_flags_are_refused(flags, message):
    with pytest.raises(SystemExit, match=message):
        planner(**flags)
