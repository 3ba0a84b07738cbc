"""rt2: who sees whom, what is cached is what would be computed, tokens and what they stand for,
what may be said when; which rows teach what; the questions about the robot's scene."""

import sys

import h5py
import numpy as np
import pytest
import torch
import units
from conftest import ROOT, load, tiny, write_hdf5
from units import A, S, copies, equal

sys.path.append(str(ROOT / "datasets"))
rt2 = load("rt2")
SIDE, TOLD = 32, ["open the drawer", "close the window now"]
FLAGS = dict(layers=2, hidden_dim=24, heads=2, bins=8, batch_size=16)
QUESTIONS = ["is the box open", "which one is red", "what is there"]
ANSWERS = ["left", "no", "the red box", "yes"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def asked(path, pictures=20, **columns):
    """A file of questions, three about each picture; answers in turn."""
    picture = np.arange(3 * pictures) // 3
    images = np.random.default_rng(3).integers(256, size=(pictures, SIDE, SIDE, 3), dtype=np.uint8)
    arrays = dict(images=images, picture=picture, question=np.arange(3 * pictures) % 3)
    arrays |= dict(answer=(picture + np.arange(3 * pictures)) % 4) | columns
    texts = dict(questions=[x.capitalize() for x in QUESTIONS], answers=ANSWERS, kinds=list("abc"))
    return write_hdf5(path, arrays, **texts)


@pytest.fixture
def file(tmp_path):
    return asked(tmp_path / "asked.hdf5")


def rows(n=64, **columns):
    images = torch.randint(256, (n, SIDE, SIDE, 3), dtype=torch.uint8)
    return units.data(n, **columns) | {"images": images, "task_index": torch.arange(n) % 2}


def learner(file, found=None, **flags):
    found = found or rows()
    given = units.task(found, -2.0, 3.0) | {"image": [SIDE, SIDE, 3], "instructions": TOLD}
    args = rt2.Args(**tiny("rt2", questions=str(file or ""), **FLAGS | flags))
    agent = rt2.RT2(dict(found), given, args)
    agent.given_task = given
    return agent


def seen(n=5, **other):
    image = np.random.default_rng(0).integers(256, size=(n, SIDE, SIDE, 3), dtype=np.uint8)
    state = np.random.default_rng(1).normal(size=(n, S)).astype(np.float32)
    return [
        {"image": image[i], "state": state[i], "instruction": TOLD[i % 2]} | other for i in range(n)
    ]


def parts(agent, questions=False, n=6):
    """Pictures, words, states and targets of n rows."""
    return agent.batch(agent.asked if questions else agent.data, torch.arange(n))


def outputs(net, images, words, s, y):
    """Logits of the whole sequence, prefix and targets (B, P + T, vocabulary), and P."""
    x, real = net.prefix(images, words, s)
    P = x.shape[1]
    x = torch.cat([x, net.targets(y[:, :-1])], dim=1)
    return net(x, rt2.prefix_lm_mask(real, y.shape[1]))[0].detach(), P


# --------------------------------------------------------------------------------- Who sees whom


def test_the_mask_is_that_of_a_prefix_lm():
    real = torch.tensor([[1, 1, 1], [1, 0, 1]]).bool()
    found = rt2.prefix_lm_mask(real, 2).long()
    assert found[0, 0].tolist() == [[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert found[1, 0].tolist() == [[1, 0, 1, 0, 0]] * 3 + [[1, 0, 1, 1, 0], [1, 0, 1, 1, 1]]


@pytest.mark.parametrize("questions", [False, True])
def test_a_target_is_seen_by_later_targets_alone(file, questions):
    """Bit for bit: the prefix and the targets before do not notice another token."""
    agent = learner(file)
    images, words, s, y = parts(agent, questions)
    y = y.clamp(min=0)
    before, P = outputs(agent.policy.net, images, words, s, y)
    assert P == 4 + 12 and y.shape[1] == 4  # "the red box" and its end
    for t in range(y.shape[1] - 1):
        other = y.clone()
        other[:, t] = (y[:, t] + 1) % 5
        after, _ = outputs(agent.policy.net, images, words, s, other)
        assert torch.equal(after[:, : P + t + 1], before[:, : P + t + 1])
        moved = (after - before).abs().amax(2) > 1e-6
        assert moved[:, P + t + 1 :].all()
    other = y.clone()
    other[:, -1] = (y[:, -1] + 1) % 5  # nothing comes behind it
    assert torch.equal(outputs(agent.policy.net, images, words, s, other)[0], before)


def test_the_prefix_sees_all_of_itself(file):
    """A picture's token is read with the last word in view, and a word with the last picture's."""
    agent = learner(file)
    images, words, s, y = parts(agent, n=1)
    before, _ = outputs(agent.policy.net, images, words, s, y.clamp(min=0))
    last = (words[0] > 0).nonzero().max()
    other = words.clone()
    other[:, last] = 1
    after, _ = outputs(agent.policy.net, images, other, s, y.clamp(min=0))
    there = torch.cat([torch.ones(4).bool(), words[0] > 0, torch.ones(y.shape[1]).bool()])
    assert ((after - before)[0, there].abs().amax(1) > 1e-7).all()
    other = images.clone()
    other[:, SIDE // 2 :, SIDE // 2 :] = 255 - other[:, SIDE // 2 :, SIDE // 2 :]
    after, _ = outputs(agent.policy.net, other, words, s, y.clamp(min=0))
    assert ((after - before)[0, there].abs().amax(1) > 1e-7).all()


def test_nobody_sees_padding(file):
    """Other numbers where no word is change nothing."""
    agent = learner(file)
    images, words, s, y = parts(agent)
    before = agent.policy.net.logits(images, words, s, y.clamp(min=0))
    agent.policy.net.word_position.data[5:] += 9.0
    assert (words[:, 5:] == 0).all()
    torch.testing.assert_close(agent.policy.net.logits(images, words, s, y.clamp(min=0)), before)
    agent.policy.net.word_position.data[0] += 9.0
    assert not torch.allclose(agent.policy.net.logits(images, words, s, y.clamp(min=0)), before)


@pytest.mark.parametrize("reads", [False, True])
def test_the_state_is_a_token_where_it_is_asked_for(file, reads):
    """Not seen otherwise: the picture is all there is. A question comes with nobody's state."""
    found = rows()
    agent = learner(file, found, proprioception=reads)
    images, words, s, y = parts(agent)
    torch.testing.assert_close(s, agent.policy.scaling.state(found["observations"][:6]))
    other, _ = agent.policy.net.prefix(images, words, s + 1)
    tokens, _ = agent.policy.net.prefix(images, words, s)
    assert tokens.shape[1] == 4 + reads + 12
    assert (other - tokens).abs().amax((0, 2)).gt(1e-6).nonzero().flatten().tolist() == [4] * reads
    before = agent.policy.net.logits(images, words, s, y.clamp(min=0))
    after = agent.policy.net.logits(images, words, s + 1, y.clamp(min=0))
    assert torch.equal(before, after) != reads
    assert not parts(agent, questions=True)[2].any()
    assert agent.policy.answer(seen()[0]["image"], QUESTIONS[0]) is not None


def test_attention_by_hand(file):
    """One layer: softmax(q k / sqrt(d)) v over what is seen, two heads, residuals and norms."""
    layer = rt2.Layer(24, 2)
    x, mask = torch.randn(3, 5, 24), torch.rand(3, 1, 5, 5) > 0.3
    mask = mask | torch.eye(5).bool()
    norm = lambda y, w: y / (y.square().mean(-1, keepdim=True) + 1.2e-7).sqrt() * w  # noqa: E731
    q, k, v = (norm(x, layer.norm_1.weight) @ layer.query_key_value.weight.T).chunk(3, -1)
    found = []
    for h in (slice(0, 12), slice(12, 24)):
        scores = q[..., h] @ k[..., h].mT / 12**0.5
        found.append(scores.masked_fill(~mask[:, 0], -1e9).softmax(-1) @ v[..., h])
    y = x + torch.cat(found, -1) @ layer.project.weight.T
    y = y + layer.net(norm(y, layer.norm_2.weight))
    torch.testing.assert_close(layer(x, mask)[0], y, atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------- Decoding


def greedy(net, images, words, s, length, allowed):
    """The same without a cache: the whole sequence anew for every token."""
    y = torch.zeros(len(images), length, dtype=torch.long)
    for t in range(length):
        logits = net.logits(images, words, s, y[:, : t + 1])[:, -1]
        y[:, t] = torch.where(allowed, logits, -1e9).argmax(-1)
    return y


@pytest.mark.parametrize("acting", [True, False])
def test_cached_decoding_is_the_full_forward(file, acting):
    agent = learner(file)
    net, allowed = agent.policy.net, agent.policy.is_action
    for parameter in net.layers.parameters():  # else all say the same
        parameter.data *= 3
    allowed = allowed if acting else ~allowed
    images, words, s, _ = parts(agent, not acting, n=30)
    with torch.no_grad():
        found = net.decode(images, words, s, 4, allowed)
        assert torch.equal(found, greedy(net, images, words, s, 4, allowed))
        assert len(found.unique(dim=0)) > 2
        # And number by number: the logits of a given text, token by token and at once.
        x, real = net.prefix(images, words, s)
        _, known = net(x, real[:, None, None])
        at_once = net.logits(images, words, s, found)
        for t in range(4):
            mask = torch.cat([real, real.new_ones(30, t + 1)], dim=1)[:, None, None]
            logits, known = net(net.targets(found[:, :t], first=t), mask, known)
            torch.testing.assert_close(logits[:, -1], at_once[:, t], atol=1e-4, rtol=1e-4)
    assert all(k.shape[2] == x.shape[1] + 4 for k, _ in known)


def test_only_actions_are_said_when_acting_and_only_words_when_answering(file):
    """Whatever the network would like to say."""
    agent = learner(file)
    policy = agent.policy
    images, words, s, _ = parts(agent, n=64)
    for wish in (policy.is_action, ~policy.is_action):
        forward = policy.net.forward
        policy.net.forward = lambda *x, f=forward, w=wish: (f(*x)[0] + 1e4 * w, f(*x)[1])
        said = policy.net.decode(images, words, s, A, policy.is_action)
        assert ((said >= policy.first_bin) & (said < policy.first_bin + 8)).all()
        said = policy.net.decode(images, words, s, 3, ~policy.is_action)
        assert ((said >= 0) & (said < policy.first_bin)).all()
        a = policy.act(seen(64))
        assert (a >= -2).all() and (a <= 3).all()
        policy.net.forward = forward
    assert policy.is_action.sum() == 8 and len(policy.is_action) == policy.first_bin + 8
    assert len(policy.is_action) == len(policy.net.embed.weight)


# --------------------------------------------------------------------------------------- Tokens


def test_actions_are_tokens_and_back(file):
    """To within half a bin, ends included; all tokens are bins, and each bin is a token."""
    policy = learner(file).policy
    a = torch.linspace(-1, 1, 1001)
    tokens = policy.tokens_of(a)
    assert tokens.min() == policy.first_bin and tokens.max() == policy.first_bin + 7
    assert (policy.actions_of(tokens) - a).abs().max() <= 1 / 8 + 1e-6
    every = torch.arange(policy.first_bin, policy.first_bin + 8)
    assert torch.equal(policy.tokens_of(policy.actions_of(every)), every)
    torch.testing.assert_close(policy.actions_of(every), torch.linspace(-0.875, 0.875, 8))


def test_words_are_tokens_and_back(file):
    agent = learner(file)
    policy = agent.policy
    known = " ".join(TOLD + QUESTIONS + ANSWERS).split()
    assert sorted(policy.vocabulary) == sorted(set(known))
    assert sorted(policy.vocabulary.values()) == list(range(2, policy.first_bin))
    for text in (*TOLD, *QUESTIONS, *ANSWERS):
        assert policy.text_of(policy.words([text])[0]) == text
    assert policy.words(["open the Sesame"])[0].tolist()[2:] == [1] + 9 * [0]
    assert policy.text_of(torch.tensor([policy.vocabulary["red"], 1, 0, 5])) == "red ?"
    assert policy.text_of(torch.tensor([0, 5])) == ""


def test_targets_are_the_actions_in_order_and_the_answers_with_their_end(file):
    agent = learner(file)
    policy = agent.policy
    *_, y = agent.batch(agent.data, torch.arange(64))
    assert (y[:, A:] == -1).all() and (y[:, :A] >= policy.first_bin).all()
    images, words, _, y = agent.batch(agent.asked, torch.arange(57))
    with h5py.File(file) as stored:
        said = stored["answer"][()]
        for k in range(57):  # the last of twenty pictures is held out
            assert policy.text_of(words[k]) == QUESTIONS[k % 3]
            text = ANSWERS[said[k]]
            n = len(text.split())
            assert y[k].tolist() == policy.words([text])[0, :n].tolist() + [0] + (3 - n) * [-1]
            assert np.array_equal(images[k], stored["images"][k // 3])
    assert len(agent.asked[3]) == 57 and agent.held_out[4].tolist() == [19] * 3


def test_rows_of_actions_keep_their_parts_together(file):
    found = rows()
    agent = learner(file, found)
    i = torch.randint(64, (30,))
    images, words, s, y = agent.batch(agent.data, i)
    assert torch.equal(images, found["images"][i])
    assert torch.equal(s, agent.policy.scaling.state(found["observations"][i]))
    assert [agent.policy.text_of(x) for x in words] == [TOLD[k % 2] for k in i.tolist()]
    a = agent.policy.actions_of(y[:, :A])
    assert (a - found["actions"][i]).abs().max() <= 1 / 8 + 1e-6


def test_the_picture_in_place_of_the_state():
    """Without pictures the state is read, scaled, and there is nothing to ask."""
    agent = units.learner(rt2)
    assert agent.asked is None and not hasattr(agent.policy.net, "word_position")
    i = torch.arange(5)
    images, words, s, y = agent.batch(agent.data, i)
    assert images is None and words is None and s.shape == (5, S) and y.shape == (5, A)
    torch.testing.assert_close(agent.data[2].mean(0), torch.zeros(S), atol=1e-5, rtol=0)
    assert len(agent.policy.net.target_position) == A
    with pytest.raises(SystemExit, match="sees no pictures"):
        agent.policy.answer(np.zeros((SIDE, SIDE, 3), np.uint8), "is it")


def test_pictures_come_without_their_mean(file):
    """Of the data's pictures, which a checkpoint keeps; and all tokens begin at one size."""
    found, came = rows(), []
    agent = learner(file, found, hidden_dim=64)
    eyes, images = agent.policy.net.eyes, found["images"]
    mean = images.float().mean(0)
    torch.testing.assert_close(agent.state_dict()["policy.net.eyes.mean"], mean)
    eyes.net.register_forward_pre_hook(lambda _, x: came.append(x[0]))
    tokens = eyes(images)
    torch.testing.assert_close(came[0], (images - mean).permute(0, 3, 1, 2) / 32)
    smooth = eyes.net(torch.randn(64, 3, 1, 1).expand(-1, -1, SIDE, SIDE))
    assert 0.3 < smooth.std() < 3 and tokens.shape == (64, 4, 64)
    for position in (eyes.position, agent.policy.net.word_position):
        assert position.std().item() == pytest.approx(0.5, rel=0.2)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_a_patch_is_a_token(patch):
    """Its middle moves its own token the most, and no distant one; rows of patches come first."""
    task = {"sizes": [3, 2], "image": [32, 48, 3]}
    eyes = rt2.Network(task, rt2.Args(patch=patch, hidden_dim=8)).eyes
    images = torch.zeros(1, 32, 48, 3)
    tokens = eyes(images)
    rows, columns = 32 // patch, 48 // patch
    assert tokens.shape == (1, rows * columns, 8) and eyes.position.shape == (rows * columns, 8)
    for row, column in ((0, 0), (0, columns - 1), (rows - 1, 0)):
        changed = images.clone()
        middle = (slice(p := patch * x + patch // 2 - 1, p + 2) for x in (row, column))
        changed[0][tuple(middle)] = 255
        moved = (eyes(changed) - tokens).norm(dim=-1).unflatten(1, (rows, columns))[0]
        assert moved.argmax() == row * columns + column
        far = moved.clone()
        far[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = 0
        assert not far.any()


def test_one_table_embeds_and_speaks(file):
    """Tokens come in at the size of a unit normal, and logits leave at it."""
    net = learner(file, hidden_dim=128).policy.net
    assert net.tokens(torch.arange(20)).std().item() == pytest.approx(1, rel=0.1)
    x = torch.randn(50, 1, 128)
    logits, _ = net(x, torch.ones(50, 1, 1, 1, dtype=torch.bool))
    assert logits.std().item() == pytest.approx(1, rel=0.2)
    assert not any("out" in name for name, _ in net.named_parameters())


# ------------------------------------------------------------------------------------ What teaches


def test_the_loss_is_that_of_the_targets(file):
    """By hand; tokens of the prefix and what is behind an answer's end teach nothing."""
    agent = learner(file)
    for questions in (False, True):
        images, words, s, y = parts(agent, questions)
        logits = agent.policy.net.logits(images, words, s, y.clamp(min=0))
        error = agent.errors(images, words, s, y)
        assert error.shape == y.shape
        for b in range(len(y)):
            for t in range(y.shape[1]):
                wanted = -logits[b, t].log_softmax(-1)[y[b, t]] if y[b, t] >= 0 else 0.0
                assert float(error[b, t]) == pytest.approx(float(wanted), abs=1e-5)
        assert (y == -1).any()


def test_no_target_gives_no_gradient(file):
    """The prompt's words are given, not learned to be said."""
    agent = learner(file)
    images, words, s, y = parts(agent)
    error = agent.errors(images, words, s, torch.full_like(y, -1))
    assert error.sum() == 0
    found = torch.autograd.grad(error.sum(), list(agent.policy.parameters()), allow_unused=True)
    assert all(x is None or not x.any() for x in found)


def record(agent):
    """The batches of the next updates."""
    seen, errors = [], agent.errors
    agent.errors = lambda *batch: seen.append(batch) or errors(*batch)
    return seen


@pytest.mark.parametrize("share, count", [(0.5, 8), (0.25, 4), (0.0, 0), (0.99, 15)])
def test_a_batch_has_its_share_of_questions(file, share, count):
    agent = learner(file, co_finetune=share)
    batches = record(agent)
    metrics = agent.update()
    (_, words, _, y), *_ = batches
    of = [agent.policy.text_of(x) in QUESTIONS for x in words]
    assert of == [False] * (16 - count) + [True] * count
    acting = (y[:, 0] >= agent.policy.first_bin).tolist()
    assert acting == [True] * (16 - count) + [False] * count
    wanted = {"losses/total", "losses/actions", "gradients/norm", "charts/learning_rate"}
    assert metrics.keys() == wanted | ({"losses/answers"} if count else set())


def test_losses_are_means_over_tokens(file):
    """The total: of every row first, so that a short answer counts as much as an action."""
    agent = learner(file, co_finetune=0.25)
    batches = record(agent)
    state = {key: x.clone() for key, x in agent.state_dict().items()}
    metrics = agent.update()
    agent.load_state_dict(state)
    with torch.no_grad():
        error = agent.errors(*batches[0])
    y = batches[0][3]
    total = np.mean([error[b][y[b] >= 0].mean().item() for b in range(16)])
    assert metrics["losses/total"].item() == pytest.approx(total, rel=1e-4)
    for key, of in {"actions": slice(0, 12), "answers": slice(12, 16)}.items():
        wanted = error[of].sum() / (y[of] >= 0).sum()
        assert metrics[f"losses/{key}"].item() == pytest.approx(wanted.item(), rel=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_without_co_finetuning_questions_teach_nothing(tmp_path, share):
    """Other pictures and answers, the same weights to the bit; with it they differ."""
    found, same = rows(), []
    for k in range(2):
        given = asked(tmp_path / f"{k}.hdf5", answer=np.full(60, k))
        torch.manual_seed(1)
        agent = learner(given, found, co_finetune=share)
        torch.manual_seed(2)
        for _ in range(3):
            agent.update()
        same.append(copies(agent.policy))
    assert equal(*same) == (share == 0)


def test_questions_alone_come_first(file):
    agent = learner(file, pretrain_steps=2)
    assert [agent.phase(step).__name__ for step in (1, 2, 3)] == ["pretrain", "pretrain", "update"]
    batches = record(agent)
    metrics = agent.phase(1)()
    assert all(agent.policy.text_of(x) in QUESTIONS for x in batches[0][1])
    assert len(batches[0][1]) == 16 and "losses/actions" not in metrics


def test_the_step_size_rises_and_falls(file):
    agent = learner(file, warmup_steps=2, decay_steps=8, learning_rate=1.0, max_grad_norm=1e-9)
    found = [agent.update()["charts/learning_rate"].item() for _ in range(10)]
    cosine = [0.55 + 0.45 * np.cos(np.pi * min(k / 8, 1)) for k in range(1, 11)]
    wanted = [min(k / 2, c) for k, c in zip(range(1, 11), cosine)]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_the_gradient_is_bounded(file):
    agent = learner(file, max_grad_norm=1e-3)
    assert agent.update()["gradients/norm"] > 1e-2
    norms = [x.grad.norm() for x in agent.policy.parameters() if x.grad is not None]
    assert torch.stack(norms).norm().item() == pytest.approx(1e-3, rel=1e-2)


def test_it_learns_to_act_and_to_answer(tmp_path):
    """Dark or bright pictures, two instructions and two questions: sixty steps at most."""
    bright = np.arange(40) % 2
    images = np.zeros((40, SIDE, SIDE, 3), np.uint8) + np.uint8(200 * bright)[:, None, None, None]
    images += np.random.default_rng(0).integers(40, size=images.shape, dtype=np.uint8)
    answer = np.where(np.arange(120) % 3 == 2, 2, np.repeat(bright, 3))
    given = asked(tmp_path / "bright.hdf5", pictures=40, images=images, answer=answer)
    side = torch.arange(64) // 2 % 2 * 2 - 1.0
    a = torch.stack([side, side * (torch.arange(64) % 2 * 2 - 1.0)], dim=1) * 0.9
    found = rows(actions=a)
    found["images"] = torch.as_tensor(images)[:2].repeat_interleave(2, 0).repeat(16, 1, 1, 1)
    agent = learner(given, found, learning_rate=5e-3, decay_steps=300, batch_size=32)
    for _ in range(150):
        agent.update()
    with torch.no_grad():
        losses = agent.validate({key: x[:62] for key, x in found.items()})  # rolled by 31
    assert losses["answer_accuracy"] == 1
    assert losses["plan_mse"] < 0.02 and losses["plan_mse_other_words"] > 0.1
    said = [agent.policy.answer(images[k], QUESTIONS[j]) for k in (38, 39) for j in range(3)]
    assert said == ["left", "left", "the red box", "no", "no", "the red box"]
    ob = [dict(image=images[k], state=np.zeros(S), instruction=TOLD[j]) for k, j in
          ((0, 0), (0, 1), (1, 0), (1, 1))]  # fmt: skip
    wanted = [[-0.9, 0.9], [-0.9, -0.9], [0.9, -0.9], [0.9, 0.9]]
    low_high = np.array(wanted) * 2.5 + 0.5
    np.testing.assert_allclose(agent.policy.act(ob), low_high, atol=0.35)


# ----------------------------------------------------------------------------------- Validation


def test_what_validation_says_of_answers(file):
    """Word for word, end included, about the last pictures."""
    agent = learner(file, validation_fraction=0.25)
    y = agent.held_out[3]
    assert agent.held_out[4].tolist() == sorted([15, 16, 17, 18, 19] * 3)
    given = y.clamp(min=0).clone()
    agent.policy.net.decode = lambda images, w, s, n, allowed: given[: len(w), :n]
    assert agent.validate(rows(15))["answer_accuracy"] == 1
    short = (y == 0).int().argmax(1)
    given[0, short[0]] = 7  # goes on where it should have ended
    given[1, 0] += 1
    assert agent.validate(rows(15))["answer_accuracy"].item() == pytest.approx(13 / 15)
    after = (y == -1).any(1).nonzero()[-1]  # what comes behind an end is not read
    given[after, -1] = 7
    assert agent.validate(rows(15))["answer_accuracy"].item() == pytest.approx(13 / 15)


def test_what_validation_says_of_actions(file):
    found = rows(16)
    agent = learner(file, found)
    with torch.no_grad():
        losses = agent.validate(found)
        y = agent.policy.net.decode(*parts(agent, n=16)[:3], A, agent.policy.is_action)
    wanted = (agent.policy.actions_of(y) - found["actions"]).square().mean()
    torch.testing.assert_close(losses["plan_mse"], wanted)
    keys = ["actions", "plan_mse", "plan_mse_other_words", "answers", "answer_accuracy"]
    assert list(losses) == keys


# ------------------------------------------------------------------------------------- The policy


def test_acting_takes_one_or_many(file):
    agent = learner(file)
    for _ in range(5):
        agent.update()
    ob = seen()
    many = agent.policy.act(ob)
    assert many.shape == (5, A) and isinstance(many, np.ndarray)
    one = agent.policy.act(ob[1])
    assert one.shape == (A,) and np.allclose(one, many[1])
    for act in agent.policy.actors().values():
        a, memory = act(ob, None)
        assert np.array_equal(a, many) and memory == []
    assert torch.is_tensor(units.learner(rt2).policy.act(torch.randn(3, S)))


def test_the_policy_of_a_checkpoint_knows_the_questions_words(file):
    agent = learner(file)
    again = rt2.Policy(agent.given_task, agent.args)
    again.load_state_dict(agent.policy.state_dict())
    image = seen()[0]["image"]
    assert again.vocabulary == agent.policy.vocabulary and "which" in again.vocabulary
    assert again.answer(image, QUESTIONS[1]) == agent.policy.answer(image, QUESTIONS[1])
    assert np.array_equal(again.act(seen()), agent.policy.act(seen()))


def test_refusals(file, tmp_path):
    with pytest.raises(SystemExit, match="No questions 'nowhere'"):
        learner("nowhere")
    small = np.zeros((20, 16, 16, 3), np.uint8)
    with pytest.raises(SystemExit, match=r"pictures of \(16, 16, 3\), the data of \(32, 32, 3\)"):
        learner(asked(tmp_path / "small.hdf5", images=small))
    with pytest.raises(SystemExit, match="cannot be read"):
        learner(write_hdf5(tmp_path / "none.hdf5", {"images": small}))
    for flags in (dict(co_finetune=1.0), dict(co_finetune=-0.1), dict(bins=0), dict(heads=5)):
        with pytest.raises(SystemExit, match="--"):
            learner(file, **flags)
    with pytest.raises(SystemExit, match="pretrain-steps"):
        learner("", pretrain_steps=3)
    assert learner("").asked is None and learner("").update()


def test_a_run_of_the_robots_data(tmp_path):
    """From files, with a stop in between: as without."""
    found = rows(64)
    arrays = {key: found[key].numpy() for key in ("observations", "actions", "images")}
    arrays |= dict(task_index=found["task_index"].numpy(), rewards=np.zeros(64))
    arrays |= dict(terminals=np.zeros(64), timeouts=np.arange(64) % 8 == 7)
    path = write_hdf5(tmp_path / "robot.hdf5", arrays, instructions=TOLD)
    given, runs = asked(tmp_path / "asked.hdf5"), []
    for name in ("once", "twice"):
        flags = tiny("rt2", **FLAGS, dataset=str(path), questions=str(given), pretrain_steps=3)
        flags |= dict(steps=12, eval_every=6, run_dir=str(tmp_path / name), env_id="none")
        if name == "twice":
            rt2.train(rt2.Args(**flags | dict(steps=6)))
            flags |= dict(resume=True)
        runs.append(rt2.train(rt2.Args(**flags)))
    for one, two in zip(*runs, strict=True):
        one.pop("seconds"), two.pop("seconds")
        assert one == two and 0 <= one["validation/answer_accuracy"] <= 1
    policy = rt2.load_policy(tmp_path / "once")
    assert set(policy.answer(seen()[0]["image"], QUESTIONS[0]).split()) <= set(policy.vocabulary)


def test_it_is_small():
    """A million parameters at the defaults, with the robot's pictures and words."""
    given = units.task() | {"image": [64, 64, 3], "instructions": TOLD, "sizes": [7, 5]}
    given |= {"bounds": [[-1.0] * 5, [1.0] * 5], "questions": QUESTIONS, "answers": ANSWERS}
    policy = rt2.Policy(given, rt2.Args())
    assert sum(x.numel() for x in policy.parameters()) < 1_000_000


# ----------------------------------------------------------------------- The questions that ship


def test_the_questions_that_ship():
    path = ROOT / "datasets" / "scene-questions.hdf5"
    assert path.stat().st_size < 4_000_000
    with h5py.File(path) as file:
        question, answer = file["question"][()], file["answer"][()]
        picture, images = file["picture"][()], file["images"]
        texts, said, kinds = (file.attrs[key] for key in ("questions", "answers", "kinds"))
        assert images.shape[1:] == (64, 64, 3) and images.dtype == np.uint8
        assert set(picture) == set(range(len(images))) and len(texts) == len(kinds)
        assert set(question) == set(range(len(texts))) and set(answer) == set(range(len(said)))
        assert (np.diff(picture.astype(int)) >= 0).all() and len(question) > 3 * len(images)
        for k, kind in enumerate(kinds):  # no question answers itself
            share = np.bincount(answer[question == k]).max() / (question == k).sum()
            assert share < 0.8, texts[k]
            assert kind in ("drawer", "window", "buttons", "gripper")
