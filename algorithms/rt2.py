r"""RT-2, "RT-2: Vision-Language-Action Models Transfer Web Knowledge to Robotic Control"
Anthony Brohan et al. (Google DeepMind). CoRL 2023, arXiv:2307.15818. Small, and trained from
nothing: the mechanism, and nothing of the reasoning that the paper sees emerge at 55 billion.

A vision-language model answers questions about pictures, word by word. Write every number of an
action as a word of its vocabulary, and the same network acts: the instruction is the question, the
action the answer. It is trained on both at once, so that it does not forget what it knows while it
learns to act (co-fine-tuning); when it acts, it may say nothing but actions (constrained decoding).

    prefix   16 picture tokens, the words of the question or instruction   see each other
    target   y_1 ... y_T: the words of the answer and its end, or A actions' bins, see the prefix
             and the targets before them                                         (prefix-LM mask)
    L = -mean log p(y_t | prefix, y_<t)     over a row's target tokens, then over the rows
    p: softmax of <h_t, e_v> over the whole vocabulary, words and bins; e_v is also v's embedding
    acting: y_t = argmax over the bins alone; answering: over the words alone

    python algorithms/rt2.py --eval-episodes 48
    python algorithms/rt2.py --steps 1000 --decay-steps 1100 --warmup-steps 50 \
        --learning-rate 2e-3 --batch-size 32 --layers 2 --hidden-dim 96 --max-words 6 \
        --proprioception --eval-episodes 48

Measured: the second: a robot arm does what it is told in 68 % of 50 episodes, and 93 % of the
questions are answered right, five seeds (58 to 74, 85 to 98), a minute and a quarter on one CPU
thread. With all questions before all actions, 0 to 21 % are: it forgets.

Differs from the paper (there is no official code; the nearest open relative is OpenVLA):
- Our specification. As in the paper: actions are tokens of the vocabulary, one for each dimension
  in turn; questions stay in the batches; decoding is constrained; picture and words are all it
  sees, unless --proprioception; one action, then a new look.
- No PaLI-X or PaLM-E: four strided convolutions and an embedding of the data's words, trained from
  nothing, and questions about pictures of the same simulator in place of the web's. Pictures come
  without their mean, which is most of what a camera at rest sees.
- Both are learned together from the start; --pretrain-steps restores the paper's order.
- 32 new tokens for the bins, not 256 old ones; no token ends an episode; a row counts once, however
  many tokens it has.
- Data without pictures or words is read too: then the prefix is the state, or lacks one.
- 5 % of the episodes and of the questions' pictures are held out for validation losses
  (--validation-fraction 0: none).
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
    """RT-2: a small model that answers questions about pictures, and acts in the same words."""

    co_finetune: float = 0.5  # share of questions in a batch; 0: actions alone
    questions: str = "scene-questions"  # of datasets/ or a path; read where the data has pictures
    pretrain_steps: int = 0  # gradient steps before the others, on questions alone
    bins: int = 32  # of each action dimension, a token each; the dimensions share them
    proprioception: bool = False  # a token of the robot's state too; not in the paper
    patch: Literal[4, 8, 16] = 16  # pixels that a picture's token is wide and high
    layers: int = 3  # of the transformer
    heads: int = 4  # attention heads
    max_words: int = 12  # of a question or an instruction, the others are not read
    max_grad_norm: float = 1.0  # bound of the gradient's norm
    weight_decay: float = 1e-4  # AdamW's
    warmup_steps: int = 100  # gradient steps over which the step size rises from 0
    decay_steps: int = 5000  # gradient steps until a cosine brings it down to a tenth
    steps: int = 5000  # gradient steps
    batch_size: int = 64  # rows per gradient step, questions included
    hidden_dim: int = 128  # width of the transformer
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
    """The words of instructions, questions and answers, numbered from 2 on. 0: no word, which also
    ends an answer, 1: an unknown one. Behind the last word come the actions' bins."""
    texts = task.get("instructions", []) + task.get("questions", []) + task.get("answers", [])
    words = {word for text in texts for word in text.split()}
    return {word: 2 + i for i, word in enumerate(sorted(words))}


class Eyes(nn.Module):
    """Pictures (B, H, W, 3), bytes -> a token (B, P, D) for each of P square patches of pixels."""

    def __init__(self, size, patch, dim):
        super().__init__()
        widths, layers = (size[2], *(32, 64, 64)[: patch.bit_length() - 2], dim), []
        for i, o in zip(widths[:-1], widths[1:]):
            layers += [nn.Conv2d(i, o, 3, stride=2, padding=1), nn.ReLU()]
        self.net = nn.Sequential(*layers[:-1])
        for convolution in self.net[::2]:  # keeps the features' size from layer to layer
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
        tokens = -(-size[0] // patch) * -(-size[1] // patch)
        self.position = nn.Parameter(0.5 * torch.randn(tokens, dim))
        self.register_buffer("mean", torch.zeros(*size))

    def fit(self, images):  # a still camera sees the same in all pictures: what differs is read
        self.mean.copy_(images[:: 1 + len(images) // 1000].float().mean(0))

    def forward(self, images):
        x = (images - self.mean).movedim(-1, 1) / 32
        return self.net(x).flatten(2).transpose(1, 2) + self.position


class Layer(nn.Module):
    """Attention and an MLP, both behind a norm."""

    def __init__(self, dim, heads):
        super().__init__()
        self.shape = (3, heads, dim // heads)
        self.norm_1, self.norm_2 = nn.RMSNorm(dim), nn.RMSNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim, bias=False)
        self.project = nn.Linear(dim, dim, bias=False)
        self.net = mlp(dim, 4 * dim, dim, hidden_layers=1)

    def forward(self, x, mask, past=()):
        """x: (B, T, D); past: keys and values (B, heads, P, D / heads) of the tokens before; mask:
        (B, 1, T, P + T), who sees whom -> x, and the keys and values with T more."""
        q, k, v = self.query_key_value(self.norm_1(x)).unflatten(-1, self.shape).unbind(2)
        q, *here = (y.transpose(1, 2) for y in (q, k, v))  # (B, heads, T, D / heads)
        k, v = (torch.cat([a, b], dim=2) for a, b in zip(past, here)) if past else here
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.project(y.transpose(1, 2).flatten(2))
        return x + self.net(self.norm_2(x)), (k, v)


def prefix_lm_mask(real, targets):
    """Which of the tokens before us are there (B, P), and how many follow -> who sees whom
    (B, 1, P + T, P + T): the prefix itself, a target the prefix, itself and the targets before."""
    (B, P), T = real.shape, targets
    sees = torch.ones(P + T, P + T, dtype=torch.bool, device=real.device).tril()
    sees[:P, :P] = True
    return sees & torch.cat([real, real.new_ones(B, T)], dim=1)[:, None, None]


class Network(nn.Module):
    """One transformer over pictures, words and actions: the logits of every next token."""

    def __init__(self, task, args):
        super().__init__()
        S, A, D = *task["sizes"], args.hidden_dim
        self.eyes = Eyes(task["image"], args.patch, D) if "image" in task else None
        self.embed_state = nn.Linear(S, D) if args.proprioception or not self.eyes else None
        if "instructions" in task:
            self.word_position = nn.Parameter(0.5 * torch.randn(args.max_words, D))
        words = 2 + len(vocabulary(task))
        longest = max([len(text.split()) for text in task.get("answers", [])], default=0)
        # One table embeds and, transposed, gives the logits: small, and made large on the way in.
        self.embed = nn.Embedding(words + args.bins, D)
        nn.init.normal_(self.embed.weight, std=D**-0.5)
        self.begin = nn.Parameter(0.5 * torch.randn(D))  # stands before the first target
        self.target_position = nn.Parameter(0.5 * torch.randn(max(A, 1 + longest), D))
        self.layers = nn.ModuleList(Layer(D, args.heads) for _ in range(args.layers))
        self.norm = nn.RMSNorm(D)

    def tokens(self, y):
        return self.embed(y) * self.embed.embedding_dim**0.5

    def prefix(self, images, words, s):
        """Pictures (B, H, W, 3), words (B, L), 0 where there is none, states s (B, S), each of them
        None if there are none -> tokens (B, P, D), and which of them are there (B, P)."""
        x = [self.eyes(images)] if self.eyes else []
        x += [self.embed_state(s)[:, None]] if self.embed_state else []
        real = [torch.ones_like(tokens[..., 0], dtype=torch.bool) for tokens in x]
        if words is not None:
            x.append(self.tokens(words) + self.word_position)
            real.append(words > 0)
        return torch.cat(x, dim=1), torch.cat(real, dim=1)

    def targets(self, y, first=0):
        """What stands before the targets y (B, T) and one more -> tokens (B, 1 + T, D); `first`:
        from which of them on."""
        begin = self.begin.expand(len(y), 1, -1)
        x = torch.cat([begin, self.tokens(y)], dim=1) + self.target_position[: 1 + y.shape[1]]
        return x[:, first:]

    def forward(self, x, mask, past=()):
        """Tokens (B, T, D), who sees whom, keys and values of each layer from before -> logits
        (B, T, vocabulary), keys and values with those of T more."""
        known = []
        for layer, before in zip(self.layers, past or [()] * len(self.layers)):
            x, keys_values = layer(x, mask, before)
            known.append(keys_values)
        return self.norm(x) @ self.embed.weight.T, known

    def logits(self, images, words, s, y):
        """Of every target token y (B, T), from the prefix and the targets before it."""
        x, real = self.prefix(images, words, s)
        T = y.shape[1]
        x = torch.cat([x, self.targets(y[:, :-1])], dim=1)
        return self(x, prefix_lm_mask(real, T))[0][:, -T:]

    def decode(self, images, words, s, length, allowed):
        """The likeliest tokens (B, length) one after the other, of those that are allowed
        (vocabulary,). The prefix is read once: its keys and values, and each token's, are kept."""
        x, real = self.prefix(images, words, s)
        _, known = self(x, real[:, None, None])
        y = real.new_zeros(len(real), 0, dtype=torch.long)
        for t in range(length):
            mask = torch.cat([real, real.new_ones(len(real), t + 1)], dim=1)[:, None, None]
            logits, known = self(self.targets(y, first=t), mask, known)
            logits = logits[:, -1].masked_fill(~allowed, -math.inf)
            y = torch.cat([y, logits.argmax(-1, keepdim=True)], dim=1)
        return y


class Policy(nn.Module):
    """Answers questions about what it sees, and acts."""

    flags = ()  # those of acting: --evaluate obeys them

    def __init__(self, task, args):
        super().__init__()
        for flag in ("bins", "layers", "heads", "max_words"):
            check(getattr(args, flag) >= 1, f"--{flag.replace('_', '-')} must be 1 or more.")
        check(args.hidden_dim % args.heads == 0, "--hidden-dim must be a multiple of --heads.")
        self.args, self.scaling = args, Scaling(task)
        self.vocabulary, self.action_size = vocabulary(task), task["sizes"][1]
        self.first_bin = 2 + len(self.vocabulary)  # tokens from here on are actions'
        self.net = Network(task, args)
        says = torch.arange(self.first_bin + args.bins) >= self.first_bin
        self.register_buffer("is_action", says)

    def words(self, texts: list[str]) -> torch.Tensor:
        """Sentences as numbers (N, --max-words) of words."""
        n = self.args.max_words
        numbers = [[self.vocabulary.get(w, 1) for w in text.lower().split()[:n]] for text in texts]
        rows = [row + [0] * (n - len(row)) for row in numbers]
        return torch.tensor(rows, device=self.scaling.mean.device)

    def tokens_of(self, a):
        """Actions in [-1, 1] as tokens of their bins."""
        bins = ((a + 1) / 2 * self.args.bins).long().clamp(0, self.args.bins - 1)
        return self.first_bin + bins

    def actions_of(self, tokens):
        """The middles of the bins that tokens stand for."""
        return (tokens - self.first_bin + 0.5) * 2 / self.args.bins - 1

    def text_of(self, tokens) -> str:
        """Words up to the first that is none."""
        known, numbers = {n: word for word, n in self.vocabulary.items()}, [*tokens.tolist(), 0]
        return " ".join(known.get(n, "?") for n in numbers[: numbers.index(0)])

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
    def act(self, observations):
        """What a user calls: one observation or many, NumPy or tensor -> as many actions in the
        environment's bounds."""
        y = self.net.decode(*self.look(observations), self.action_size, self.is_action)
        a = self.actions_of(y)
        a = self.scaling.action(a, a)
        a = a if isinstance(observations, list) or np.ndim(observations) == 2 else a[0]
        return a if torch.is_tensor(observations) else a.numpy(force=True)

    @torch.no_grad()
    def answer(self, image, question: str) -> str:
        """What it says of a picture (H, W, 3)."""
        check(self.net.eyes, "This policy sees no pictures: its data had none.")
        images = torch.as_tensor(image, device=self.scaling.mean.device)[None]
        length = len(self.net.target_position)
        words, s = self.words([question]), torch.zeros_like(self.scaling.mean)[None]
        y = self.net.decode(images, words, s, length, ~self.is_action)
        return self.text_of(y[0])

    def actors(self) -> dict:
        """What to evaluate, by suffix of its columns; the first one is the result."""
        return {"": lambda observations, _: (self.act(observations), [])}  # it has no memory


# ----------------------------------------------------------------------------------- Algorithm


def read_questions(name: str, task: dict) -> dict:
    """Pictures (P, H, W, 3), and of each of Q questions the numbers of its picture, its text and
    its answer's text; the texts."""
    path = next((p for p in (Path(name), OURS / f"{name}.hdf5") if p.is_file()), None)
    check(path, f"No questions '{name}' (--questions): --questions '' --co-finetune 0 needs none.")
    with explained(f"Questions '{name}' cannot be read"), h5py.File(path) as file:
        found = {key: file[key][()] for key in ("images", "picture", "question", "answer")}
        for key in ("questions", "answers"):
            found[key] = [str(text).lower() for text in file.attrs[key]]
    shape, ours = found["images"].shape[1:], tuple(task["image"])
    check(shape == ours, f"Questions '{name}' have pictures of {shape}, the data of {ours}.")
    return found


class RT2(nn.Module):
    """The learner: its parameters and buffers are what a checkpoint holds."""

    def __init__(self, data: dict[str, torch.Tensor], task: dict, args: Args):
        super().__init__()
        check(args.max_grad_norm > 0, "--max-grad-norm: above 0.")
        check(0 <= args.warmup_steps < args.decay_steps, "--decay-steps: more than --warmup-steps.")
        check(0 <= args.co_finetune < 1, "--co-finetune is a share, 0 to below 1.")
        asked = args.questions if "image" in task and "instructions" in task else ""
        self.args, device = args, data["actions"].device
        if asked:  # from now on the task has their words: a checkpoint's policy needs them
            found = read_questions(asked, task)
            task |= {key: found[key] for key in ("questions", "answers")}
        check(asked or not args.pretrain_steps, "--pretrain-steps needs questions and pictures.")
        self.policy = Policy(task, args).to(device)
        self.policy.scaling.fit(data["observations"])
        if self.policy.net.eyes:
            self.policy.net.eyes.fit(data["images"])
        self.texts = self.policy.words(task["instructions"]) if "instructions" in task else None
        self.data, self.asked = self.columns(data), None
        if asked:
            self.asked, self.held_out = self.columns_of_questions(found)
        self.register_buffer("updates", torch.zeros((), device=device))
        options = dict(weight_decay=args.weight_decay, betas=(0.9, 0.95), fused=True)
        rate = torch.tensor(args.learning_rate, device=device)
        of = self.policy.parameters()
        self.optimizer = torch.optim.AdamW(of, rate, **options, capturable=rate.is_cuda)

    def columns(self, data):
        """Of each row: pictures, words (N, L), states s (N, S), targets y (N, T), which picture."""
        words = None if self.texts is None else self.texts[data["task_index"]]
        s = self.policy.scaling.state(data["observations"])
        y = self.padded(self.policy.tokens_of(data["actions"]))
        return data.get("images"), words, s, y, torch.arange(len(y), device=y.device)

    def padded(self, y):
        """Targets as long as all are, -1 where there is none."""
        return F.pad(y, (0, len(self.policy.net.target_position) - y.shape[1]), value=-1)

    def columns_of_questions(self, found):
        """The same of questions to train on, and of those about the last pictures, held out."""
        images = torch.as_tensor(found["images"], device=self.data[2].device)
        keys = ("picture", "question", "answer")
        picture, asked, said = (torch.as_tensor(np.int64(found[k])).to(images.device) for k in keys)
        y = self.policy.words(found["answers"])  # zeros behind the words: the first is their end
        y = self.padded(torch.where((y == 0).cumsum(1) > 1, -1, y))[said]
        words = self.policy.words(found["questions"])[asked]
        count = math.ceil(self.args.validation_fraction * len(images))
        ours = picture < len(images) - min(count, len(images) - 1)
        s = torch.zeros_like(self.data[2][:1]).expand(len(y), -1)  # nobody's: the mean
        return [(images, words[x], s[x], y[x], picture[x]) for x in (ours, ~ours)]

    def batch(self, columns, i):
        """Of the rows i (B,): pictures, words, s, y."""
        images, words, s, y, picture = columns
        images = None if images is None else images[picture[i]]
        return images, None if words is None else words[i], s[i], y[i]

    def phase(self, step: int):
        """The update to do at this step; where there are several, each is a CUDA graph."""
        return self.pretrain if step <= self.args.pretrain_steps else self.update

    def pretrain(self) -> dict[str, torch.Tensor]:
        """One gradient step on questions alone."""
        return self.learn(self.args.batch_size)

    def update(self) -> dict[str, torch.Tensor]:
        """One gradient step on actions and, where there are questions, their share of a batch."""
        share = self.args.co_finetune if self.asked else 0
        return self.learn(min(round(share * self.args.batch_size), self.args.batch_size - 1))

    def learn(self, questions: int) -> dict[str, torch.Tensor]:
        """One gradient step on a batch with so many questions. Never synchronises."""
        counts = (self.args.batch_size - questions, questions)
        parts = [
            self.batch(columns, torch.randint(len(columns[3]), (n,), device=self.updates.device))
            for columns, n in zip((self.data, self.asked), counts)
            if n
        ]
        batch = [None if x[0] is None else torch.cat(x) for x in zip(*parts)]
        error, there = self.errors(*batch), batch[3] >= 0
        loss = (error.sum(1) / there.sum(1)).mean()
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
        metrics = {"losses/total": loss, "gradients/norm": norm, "charts/learning_rate": rate}
        kinds = zip(("actions", "answers"), error.detach().split(counts), there.split(counts))
        return metrics | {f"losses/{kind}": e.sum() / n.sum() for kind, e, n in kinds if len(e)}

    def errors(self, images, words, s, y):
        """-log p (B, T) of each target token, 0 where there is none. The prefix is given, not
        learned to be said."""
        logits = self.policy.net.logits(images, words, s, y.clamp(min=0))
        return F.cross_entropy(logits.mT, y, ignore_index=-1, reduction="none")

    def validate(self, data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """On held-out episodes: the loss; the squared error of actions, and the same with other
        rows' words, no worse where the policy ignores them. On held-out pictures: the loss of
        answers, and the share that is right word for word."""
        policy, losses = self.policy, {}
        rows = torch.arange(0, len(data["actions"]), 1 + len(data["actions"]) // 512)
        images, words, s, y = self.batch(self.columns(data), rows.to(self.updates.device))
        losses["actions"] = self.errors(images, words, s, y).sum() / (y >= 0).sum()
        wrong = {} if words is None else {"_other_words": words.roll(len(words) // 2, 0)}
        for suffix, asked in {"": words, **wrong}.items():
            y = policy.net.decode(images, asked, s, policy.action_size, policy.is_action)
            error = policy.actions_of(y) - data["actions"][rows.to(y.device)]
            losses[f"plan_mse{suffix}"] = error.square().mean()
        if self.asked:
            rows = torch.arange(0, len(self.held_out[3]), 1 + len(self.held_out[3]) // 1024)
            images, words, s, y = self.batch(self.held_out, rows.to(self.updates.device))
            losses["answers"] = self.errors(images, words, s, y).sum() / (y >= 0).sum()
            said = policy.net.decode(images, words, s, y.shape[1], ~policy.is_action)
            losses["answer_accuracy"] = ((said == y) | (y < 0)).all(1).float().mean()
        return losses


Learner = RT2  # the name by which the training loop knows it

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
