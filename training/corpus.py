"""Turns plain text into training tokens: trains a byte-level BPE, turns some stories into chats, writes one array.

Documents are separated by a line `<|endoftext|>`. It depends on tokenizers and numpy, not on models.
"""

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END, USER, ASSISTANT = "<|endoftext|>", "<|user|>", "<|assistant|>"
SPECIALS = (END, USER, ASSISTANT)
CHAT_SHARE = 0.2
_WORD = re.compile(r"[a-z]{3,}")


def documents(path: Path) -> Iterator[str]:
    """The texts of a file, stripped, without empty ones."""
    for text in path.read_text(encoding="utf-8").split(END):
        if text.strip():
            yield text.strip()


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-level BPE; every encoded text begins with `<|endoftext|>`, as every training document does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    return tokenizer


class ChatMaker:
    """Turns some stories into one-turn chats: the question asks for words that the story really uses."""

    def __init__(self, texts: Iterable[str], seed: int) -> None:
        counts = Counter(word for text in texts for word in sorted(set(_WORD.findall(text))))
        self.common = {word for word, _ in counts.most_common(250)}
        self.known = {word for word, count in counts.items() if count >= 20}
        self.random = random.Random(seed)

    def __call__(self, story: str) -> str:
        """The story as it is, or (in `CHAT_SHARE` of the calls) as the answer to a request for it."""
        if self.random.random() >= CHAT_SHARE:
            return story
        return f"{USER}{self.question(story)}{ASSISTANT}{story}"

    def question(self, story: str) -> str:
        found = set(_WORD.findall(story)) & self.known
        words = sorted(found - self.common)
        words = self.random.sample(words, min(len(words), self.random.randint(0, 3)))
        verb = self.random.choice(["Tell me", "Write", "Please write", "Can you tell me"])
        end = "?" if verb.startswith("Can") else "."
        if not words:
            return f"{verb} a story{end}"
        if len(words) == 1:
            return f"{verb} a story with the word {words[0]}{end}"
        listed = ", ".join(words[:-1])
        return f"{verb} a story with the words {listed} and {words[-1]}{end}"


def encode(tokenizer: Tokenizer, texts: Iterable[str], batch: int = 4096) -> NDArray[np.uint16]:
    """All documents as one array of token ids, each beginning with `<|endoftext|>`."""
    parts: list[NDArray[np.uint16]] = []
    pending: list[str] = []

    def flush() -> None:
        for encoding in tokenizer.encode_batch(pending):
            parts.append(np.array(encoding.ids, dtype=np.uint16))
        pending.clear()

    for text in texts:
        pending.append(text)
        if len(pending) == batch:
            flush()
    flush()
    return np.concatenate(parts)


def prepare(text: Path, folder: Path, vocabulary: int, seed: int) -> int:
    """Write `tokenizer.json` and `tokens.npy` for a text file; returns the number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    stories = list(documents(text))
    tokenizer = train_tokenizer(stories, vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    maker = ChatMaker(stories, seed)
    tokens = encode(tokenizer, map(maker, stories))
    np.save(folder / "tokens.npy", tokens)
    return len(tokens)


def main(
    text: Annotated[Path, typer.Option(help="training text, documents separated by <|endoftext|>")],
    out: Annotated[Path, typer.Option(help="where tokenizer.json and tokens.npy go")],
    vocabulary: int = 4096,
    seed: int = 1,
) -> None:
    """Tokenise a training text."""
    print(f"{prepare(text, out, vocabulary, seed) / 1e6:.2f} M tokens")


if __name__ == "__main__":
    typer.run(main)
