#!/usr/bin/env python
"""Sequence to sequence: translate short messages of programs from English to French.

    encoder: embedding -> bidirectional LSTM (or GRU, or RNN) -> its outputs and final states
    decoder: embedding -> LSTM, from those states -> attention to those outputs -> the next word

The decoder learns by teacher forcing: it reads the correct words up to each position and predicts
the next one, all positions in one call of the layer. To translate, it reads its own words: the most
probable word each time (greedy), or the words of the few most probable beginnings (beam search).
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sequences import (
    DATA,
    PAD,
    UNKNOWN,
    Vocabulary,
    by_frequency,
    choose,
    cross_entropy,
    padded,
    read_lines,
    sizes,
    split,
)
from torch import Tensor, nn
from training import (
    CELL,
    Option,
    Training,
    dropout,
    fail,
    figure,
    learning,
    run_program,
    start,
)

import fastrnn

PAIRS = DATA / "messages.tsv.gz"
OPTIONS = [
    CELL,
    Option("hidden", 256, "hidden_size of the decoder; the encoder has half of it per direction"),
    Option("embedding", 128, "size of a word embedding"),
    dropout(0.4, "the inputs of the layers, and before the last one"),
    Option("batch_size", 64, "pairs per training step"),
    *learning(1200),
]
LONGEST = 12
"""The most words in a message; longer messages are skipped."""

BEGIN, END = "<begin>", "<end>"

State = tuple[Tensor, ...]
Pair = tuple[list[str], list[str]]


def words(text: str) -> list[str]:
    """Words, punctuation and placeholders, in lower case; an apostrophe ends a word."""
    return re.findall(r"%\(\w+\)s|%\w|\w+['’]?|[^\w\s]", text.lower().replace("\u2019", "'"))


def read_pairs(path: Path) -> list[Pair]:
    found = []
    for number, line in enumerate(read_lines(path), 1):
        if line.count("\t") != 1:
            fail(f"{path}, line {number}: expected a text, a tab and its translation, got {line!r}")
        source, target = map(words, line.split("\t"))
        if 0 < len(source) <= LONGEST and 0 < len(target) <= LONGEST:
            found.append((source, target))
    # Texts that differ only in case count once.
    return list({tuple(source): (source, target) for source, target in found}.values())


class Memory(NamedTuple):
    """Encoder outputs, ``[B, S, hidden]``, and whether they are words or padding, ``[B, S]``."""

    values: Tensor
    is_word: Tensor

    def rows(self, index: Tensor) -> Memory:
        return Memory(self.values[index], self.is_word[index])


class Translator(nn.Module):
    def __init__(
        self, rnn: type[nn.Module], source: int, target: int, config: dict[str, Any]
    ) -> None:
        super().__init__()
        E, H = config["embedding"], config["hidden"]
        self.source = nn.Embedding(source, E, padding_idx=PAD)
        self.target = nn.Embedding(target, E, padding_idx=PAD)
        self.encoder = rnn(E, H // 2, bidirectional=True)
        self.decoder = rnn(E, H)
        self.attention = nn.Linear(2 * H, H)
        self.dropout = nn.Dropout(config["dropout"])
        self.linear = nn.Linear(H, target)

    def encode(self, ids: Tensor, lengths: list[int]) -> tuple[Memory, State]:
        """ids: [S, B]. Returns the memory and the initial decoder state, ``[1, B, hidden]``."""
        output, state = self.encoder(self.dropout(self.source(ids)), lengths=lengths)
        parts = state if isinstance(state, tuple) else (state,)
        first = tuple(torch.cat([part[0], part[1]], 1)[None] for part in parts)
        return Memory(output.transpose(0, 1), (ids != PAD).t()), first

    def decode(self, ids: Tensor, memory: Memory, state: State) -> tuple[Tensor, State, Tensor]:
        """ids: [T, B]. Returns logits of the next words [T, B, target], state and attention."""
        hx = state if len(state) > 1 else state[0]
        output, hx = self.decoder(self.dropout(self.target(ids)), hx)
        query = output.transpose(0, 1)  # [B, T, hidden]
        scores = query @ memory.values.transpose(1, 2) / query.shape[-1] ** 0.5
        weights = scores.masked_fill(~memory.is_word[:, None], -torch.inf).softmax(2)
        seen = torch.cat([query, weights @ memory.values], 2)
        hidden = self.dropout(torch.tanh(self.attention(seen)))
        logits = self.linear(hidden).transpose(0, 1)
        return logits, hx if isinstance(hx, tuple) else (hx,), weights

    def forward(self, source: Tensor, lengths: list[int], target: Tensor) -> Tensor:
        """Teacher forcing: the logits of the next word at each position of target, [T, B]."""
        logits, _, _ = self.decode(target, *self.encode(source, lengths))
        return logits


@torch.no_grad()
def search(
    model: Translator, sources: list[Tensor], begin: int, end: int, width: int = 1
) -> list[tuple[list[int], float]]:
    """The most probable translation found by a beam of that width, and its log-probability.

    Each source has ``width`` beginnings. Each step extends all of them by every word and keeps the
    most probable results. A finished translation stays as it is. A width of one is greedy search.
    """
    memory, state = model.encode(*padded(sources))
    B = len(sources)
    origin = torch.arange(B).repeat_interleave(width)
    memory, state = memory.rows(origin), tuple(part[:, origin] for part in state)
    texts = torch.full((B * width, 1), begin)
    # At first all beginnings of a source are the same, so only one may be extended.
    scores = torch.zeros(B, width).index_fill_(1, torch.arange(1, width), -torch.inf)
    ended = torch.zeros(B * width, dtype=torch.bool)
    for _ in range(2 * LONGEST):
        logits, state, _ = model.decode(texts[:, -1][None], memory, state)
        step = logits[0].log_softmax(1)
        step[:, [PAD, UNKNOWN, begin]] = -torch.inf
        step[ended] = -torch.inf
        step[ended, end] = 0.0
        V = step.shape[1]
        scores, best = (scores[:, :, None] + step.view(B, width, V)).flatten(1).topk(width)
        row = (torch.arange(B)[:, None] * width + best // V).flatten()
        word = (best % V).flatten()
        texts = torch.cat([texts[row], word[:, None]], 1)
        state = tuple(part[:, row] for part in state)
        ended = word == end
        if ended.view(B, width)[:, 0].all():  # scores only fall, so the best stays the best
            break
    found = []
    for text, score in zip(texts[::width].tolist(), scores[:, 0].tolist(), strict=True):
        length = text.index(end) if end in text else len(text)
        found.append((text[1:length], score))
    return found


def distance(a: list[str], b: list[str]) -> int:
    """The number of words to insert, remove or replace to turn a into b."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def plot(
    path: Path,
    title: str,
    training: Training,
    weights: Tensor,
    source: list[str],
    output: list[str],
) -> None:
    """The training, and the attention of each output word to the words read."""
    with figure(path, title, 1, 2, figsize=(12, 4.8)) as (left, right):
        training.draw(left, "cross-entropy of a word, nats")
        right.imshow(weights.tolist(), cmap="Blues", vmin=0, vmax=1)
        right.set_xticks(range(len(source)), source, rotation=45, ha="right")
        right.set_yticks(range(len(output)), output)
        right.set(xlabel="words read", ylabel="words written")


def main(argv: list[str] | None = None) -> None:
    def arguments(parser: argparse.ArgumentParser) -> None:
        what = f"UTF-8 lines of a text, a tab and its translation (default {PAIRS.name})"
        parser.add_argument("pairs", nargs="?", type=Path, default=PAIRS, help=what)
        parser.add_argument("--beam", type=int, default=4, help="width of the beam (default 4)")
        parser.add_argument("--translate", metavar="TEXT", help="also translate this text")

    args, config, resumed = start("translate", __doc__, OPTIONS, argv, arguments)
    if config["hidden"] % 2:
        fail(f"--hidden {config['hidden']}: expected an even number, half for each direction")
    requested = words(args.translate or "")
    if args.translate is not None and not requested:
        fail(f"--translate: expected at least one word, got {args.translate!r}")
    train, validation, test = split(read_pairs(args.pairs))
    if not (train and validation and test):
        fail(f"{args.pairs}: expected ten pairs or more of up to {LONGEST} words")
    source = Vocabulary((s for s, _ in train), at_least=2)
    target = Vocabulary([BEGIN, *t, END] for _, t in train)
    begin, end = target.index[BEGIN], target.index[END]
    rnn = getattr(fastrnn, config["cell"].upper())
    model = Translator(rnn, len(source), len(target), config)
    training = Training("translate", model, config, train, resumed)

    def encode(pairs: list[Pair]) -> list[tuple[Tensor, Tensor]]:
        return [(source.encode(s), target.encode([BEGIN, *t, END])) for s, t in pairs]

    def loss(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
        sources, targets = zip(*pairs, strict=True)
        ids = padded(targets)[0]
        logits = model(*padded(sources), ids[:-1])
        return cross_entropy(logits, ids[1:])

    encoded = [encode(part) for part in (train, validation, test)]
    vocabularies = f"{len(source):,} and {len(target):,} words"
    print(
        f"{args.pairs.name}: {sizes('pairs', train, validation, test)}, {vocabularies}",
        flush=True,
    )
    training.run(
        lambda: loss(choose(encoded[0], config["batch_size"])),
        lambda: loss(encoded[1]).item(),
        50,
        args.checkpoint,
    )

    target_ids = [torch.cat([ids[1:] for _, ids in part]) for part in (encoded[0], encoded[2])]
    constant = by_frequency(*target_ids, len(target))
    with torch.no_grad():
        ours = loss(encoded[2]).item()
    print(
        f"\ncross-entropy of a word, test: {ours:.2f} nats, by the words' frequency {constant:.2f}"
    )

    sources = [ids for ids, _ in encoded[2]]
    total = sum(len(reference) for _, reference in test)
    results = {}
    print(f"\n{'decoding':12}{'word errors':>12}{'all correct':>13}{'log-probability':>17}")
    for name, width in (("greedy", 1), (f"beam of {args.beam}", args.beam)):
        found = search(model, sources, begin, end, width)
        texts = [target.decode(ids) for ids, _ in found]
        wrong = sum(distance(text, t) for text, (_, t) in zip(texts, test, strict=True)) / total
        right = sum(text == t for text, (_, t) in zip(texts, test, strict=True)) / len(test)
        mean = sum(score for _, score in found) / len(found)
        print(f"{name:12}{wrong:12.1%}{right:13.1%}{mean:17.2f}")
        results[name] = texts, right
    texts, right = list(results.values())[-1]
    print()
    for (read, reference), text in list(zip(test, texts, strict=True))[:8]:
        mark = "=" if text == reference else f"reference: {' '.join(reference)}"
        print(f"  {' '.join(read)} -> {' '.join(text)}  ({mark})")
    if requested:
        ((found_ids, _),) = search(model, [source.encode(requested)], begin, end, args.beam)
        print(f"\n{args.translate} -> {' '.join(target.decode(found_ids))}")
    title = f"{right:.0%} of the test messages are translated exactly as in the reference"
    print(f"\n{title}.")
    if args.plot:
        rights = [i for i, (_, t) in enumerate(test) if texts[i] == t] or [0]
        shown = max(rights, key=lambda i: len(test[i][1]))
        ids = target.encode([BEGIN, *texts[shown], END])[:, None]
        with torch.no_grad():
            _, _, weights = model.decode(ids[:-1], *model.encode(*padded([sources[shown]])))
        plot(args.plot, title, training, weights[0], test[shown][0], [*texts[shown], END])


if __name__ == "__main__":
    run_program(main)
