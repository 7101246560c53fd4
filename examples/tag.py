#!/usr/bin/env python
"""Many to many, step by step: the part of speech of each word of a conversation in Cantonese.

    embedding -> bidirectional LSTM (or GRU, or RNN) -> linear -> the tag of each word

A batch contains utterances of different lengths, and the layer gets their ``lengths``. So the
reverse direction begins at the last word of each utterance, and the output after it is zero. The
baselines are the most frequent tag, and the most frequent tag of each word, which ignores context.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from sequences import DATA, PAD, Vocabulary, choose, cross_entropy, padded, read_lines, sizes, split
from torch import Tensor, nn
from training import (
    CELL,
    Option,
    Training,
    dropout,
    figure,
    learning,
    run_program,
    start,
)

import fastrnn

OPTIONS = [
    CELL,
    Option("hidden", 96, "hidden_size of the layer, in each direction"),
    Option("embedding", 96, "size of a word embedding"),
    dropout(0.4, "the input and output of the layer"),
    Option("batch_size", 64, "utterances per training step"),
    *learning(1500, lr=1e-2),
]
# The most frequent tags of the corpus.
NAMES = {
    "v": "verb",
    "r": "pronoun",
    "d": "adverb",
    "y": "particle",
    "n": "noun",
    "c": "conjunction",
    "u": "auxiliary",
    "a": "adjective",
    "q": "classifier",
    "e": "interjection",
    "m": "numeral",
    "t": "time",
    "p": "preposition",
}

Utterance = list[tuple[str, str]]


def corpus() -> list[Utterance]:
    """Utterances of words and their tags."""
    utterances = []
    for line in read_lines(DATA / "cantonese.txt.gz"):
        words = (word.rpartition("/") for word in line.split())
        utterances.append([(word, tag) for word, _, tag in words])
    return utterances


class Tagger(nn.Module):
    def __init__(self, rnn: type[nn.Module], words: int, tags: int, config: dict[str, Any]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, config["embedding"], padding_idx=PAD)
        self.rnn = rnn(config["embedding"], config["hidden"], bidirectional=True)
        self.dropout = nn.Dropout(config["dropout"])
        self.linear = nn.Linear(2 * config["hidden"], tags)

    def forward(self, ids: Tensor, lengths: list[int]) -> Tensor:
        """ids: [T, B]. Returns the logits of the tags of each word, [T, B, tags]."""
        output, _ = self.rnn(self.dropout(self.embedding(ids)), lengths=lengths)
        logits: Tensor = self.linear(self.dropout(output))
        return logits


def word_by_word(train: list[Utterance]) -> tuple[dict[str, str], str]:
    """The most frequent tag of each word, and for unknown words that of words that occur once."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for utterance in train:
        for word, tag in utterance:
            counts[word][tag] += 1
    once = Counter(tag for tags in counts.values() if tags.total() == 1 for tag in tags)
    known = {word: tags.most_common(1)[0][0] for word, tags in counts.items()}
    return known, (once or Counter(known.values())).most_common(1)[0][0]


class Batches:
    """Utterances as tensors."""

    def __init__(self, train: list[Utterance]) -> None:
        self.words = Vocabulary(([word for word, _ in u] for u in train), at_least=2)
        self.tags = Vocabulary([tag for _, tag in u] for u in train)

    def encode(self, utterance: Utterance) -> tuple[Tensor, Tensor]:
        words, tags = zip(*utterance, strict=True)
        return self.words.encode(words), self.tags.encode(tags)

    def loss(self, model: Tagger, encoded: list[tuple[Tensor, Tensor]]) -> Tensor:
        """The mean cross-entropy of a word. Padding has the tag PAD, which is ignored."""
        words, tags = zip(*encoded, strict=True)
        logits = model(*padded(words))
        return cross_entropy(logits, padded(tags)[0])

    @torch.no_grad()
    def tag(self, model: Tagger, utterances: list[list[str]]) -> list[list[str]]:
        tags = []
        for first in range(0, len(utterances), 256):
            batch = [self.words.encode(words) for words in utterances[first : first + 256]]
            ids = model(*padded(batch)).argmax(2).t()
            for row, words in zip(ids.tolist(), batch, strict=True):
                tags.append(self.tags.decode(row[: len(words)]))
        return tags


def plot(
    path: Path, title: str, training: Training, pairs: Counter[tuple[str, str]], tags: list[str]
) -> None:
    """The training, and the confusion matrix of the tags."""
    table = torch.tensor([[pairs[target, guess] for guess in tags] for target in tags]).float()
    rows = torch.tensor([sum(n for (r, _), n in pairs.items() if r == tag) for tag in tags])
    share = 100 * table / rows.clamp_min(1)[:, None]
    with figure(path, title, 1, 2, figsize=(12, 5), width_ratios=(1, 1.2)) as (left, right):
        training.draw(left, "cross-entropy of a word, nats")
        right.imshow(share.tolist(), cmap="Blues", vmin=0, vmax=100)
        names = [NAMES.get(tag, tag) for tag in tags]
        right.set_xticks(range(len(tags)), names, rotation=45, ha="right")
        right.set_yticks(range(len(tags)), names)
        right.set(xlabel="predicted, % of the words of a row", ylabel="correct")
        for i, row in enumerate(share.tolist()):
            for j, value in enumerate(row):
                if value >= 1:
                    color = "white" if value > 50 else "black"
                    right.text(j, i, f"{value:.0f}", ha="center", va="center", color=color, size=8)


def main(argv: list[str] | None = None) -> None:
    args, config, resumed = start("tag", __doc__, OPTIONS, argv)
    train, validation, test = split(corpus())
    batches = Batches(train)
    rnn = getattr(fastrnn, config["cell"].upper())
    model = Tagger(rnn, len(batches.words), len(batches.tags), config)
    training = Training("tag", model, config, train, resumed)
    encoded = [[batches.encode(u) for u in part] for part in (train, validation)]
    words = f"{len(batches.words):,} words, {len(batches.tags) - 2} tags"
    print(f"cantonese.txt.gz: {sizes('utterances', train, validation, test)}, {words}")
    training.run(
        lambda: batches.loss(model, choose(encoded[0], config["batch_size"])),
        lambda: batches.loss(model, encoded[1]).item(),
        50,
        args.checkpoint,
    )

    predicted = batches.tag(model, [[word for word, _ in u] for u in test])
    frequent = Counter(tag for u in train for _, tag in u)
    most_frequent = frequent.most_common(1)[0][0]
    tag_of, unknown = word_by_word(train)
    right: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    ours, by_word, always = (
        f"{rnn.__name__}({config['hidden']}), bidirectional",
        "word by word",
        f"always: {NAMES.get(most_frequent, most_frequent)}",
    )
    for utterance, tags in zip(test, predicted, strict=True):
        for (word, tag), guess in zip(utterance, tags, strict=True):
            pairs[tag, guess] += 1
            guesses = {ours: guess, by_word: tag_of.get(word, unknown), always: most_frequent}
            for name, each in guesses.items():
                right[name] += each == tag
    total = sum(pairs.values())
    print(f"\ncorrect tags of the {total:,} words in test utterances")
    for name in (ours, by_word, always):
        print(f"  {name:26}{right[name] / total:7.1%}")
    shown = max(range(len(test)), key=lambda i: len(set(predicted[i])) if len(test[i]) < 13 else 0)
    print(
        "\n"
        + " ".join(f"{w}/{tag}" for (w, _), tag in zip(test[shown], predicted[shown], strict=True))
    )
    share, other = right[ours] / total, right[by_word] / total
    title = f"{share:.1%} of the tags are correct, {other:.1%} word by word"
    print(f"\n{title}.")
    if args.plot:
        tags = [tag for tag, _ in frequent.most_common(len(NAMES) + 3) if tag in NAMES]
        plot(args.plot, title, training, pairs, tags)


if __name__ == "__main__":
    run_program(main)
