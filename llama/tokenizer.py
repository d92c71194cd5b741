"""The Llama 2 tokenizer (sentencepiece), its chat prompt, and decoding of a stream.

    tokenizer = llama.Tokenizer("path/to/Llama-2-7b-hf")
    tokenizer.encode("Hello", bos=True)        # [1, 15043]

BOS and EOS are added as ids only: "<s>" in a text is three ordinary tokens. There is no pad token, and none is ever added.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from llama.errors import InputError
from llama.files import reading

CHAT_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")
UNFINISHED = "\ufffd"  # what sentencepiece decodes an incomplete UTF-8 sequence to


class Tokenizer:
    """A sentencepiece model.

    Args:
        path: `tokenizer.model`, or a directory that holds it.

    Raises:
        InputError: no such file, not a sentencepiece model, or one without BOS and EOS.
    """

    @reading()
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path) / "tokenizer.model" if Path(path).is_dir() else Path(path)
        if not self.path.is_file():
            hint = "; tokenizer.json alone is not enough" if (self.path.parent / "tokenizer.json").exists() else ""
            raise InputError(f"{self.path} does not exist; expected a sentencepiece tokenizer.model{hint}")
        self.path.open("rb").close()  # sentencepiece would call a file without read permission damaged
        try:
            self._model = SentencePieceProcessor(model_file=str(self.path))
        except (RuntimeError, OSError) as error:
            raise InputError(f"{self.path} is not a sentencepiece model: {error}") from None
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        if self.bos_id < 0 or self.eos_id < 0:
            raise InputError(f"{self.path} has no BOS or EOS piece (ids {self.bos_id}, {self.eos_id}); Llama needs both")

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Token ids of `text`, between BOS and EOS where asked for. An empty text has no ids of its own.

        Raises:
            InputError: half of a surrogate pair, which is what Python makes of a terminal's invalid UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode: {text[error.start]!r} at character {error.start}") from None
        return [self.bos_id] * bos + self._model.encode(text) + [self.eos_id] * eos

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; BOS and EOS decode to nothing.

        Raises:
            InputError: an id outside the vocabulary.
        """
        if wrong := [i for i in ids if not 0 <= i < self.vocab_size]:
            raise InputError(f"token id {wrong[0]} is outside the vocabulary 0..{self.vocab_size - 1}")
        return str(self._model.decode(list(ids)))

    def show(self, ids: Sequence[int]) -> str:
        """`decode` for ids that a model chose: one that only the model has, whose embedding may be larger, shows as `<929>`."""
        return str(self._model.decode([self._model.id_to_piece(i) if 0 <= i < self.vocab_size else f"<{i}>" for i in ids]))


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """Token ids of a Llama-2-chat conversation that ends with a user's message.

    Args:
        messages: `{"role": "system" | "user" | "assistant", "content": str}`; a system message may come first, then user
            and assistant alternate.

    Every turn is encoded by itself, with its own BOS, as in Meta's `generation.py`; the turns' ids are concatenated.

    Raises:
        InputError: roles out of order, or a chat tag inside a message (it would forge a turn).
    """
    turns = [(str(m.get("role")), str(m.get("content", ""))) for m in messages]
    for role, content in turns:
        if tag := next((tag for tag in CHAT_TAGS if tag in content), None):
            raise InputError(f"the {role} message contains {tag}, which is reserved for the chat format")
    if turns and turns[0][0] == "system":
        if len(turns) < 2:
            raise InputError("the conversation has only a system message; expected a user message after it")
        turns = [(turns[1][0], f"<<SYS>>\n{turns[0][1]}\n<</SYS>>\n\n{turns[1][1]}"), *turns[2:]]
    expected = ["user" if i % 2 == 0 else "assistant" for i in range(len(turns))]
    if [role for role, _ in turns] != expected or len(turns) % 2 == 0:
        raise InputError(
            f"roles are {[role for role, _ in turns]} (after a system message);"
            " expected user, assistant, user, ... ending with user"
        )
    ids: list[int] = []
    for (_, question), (_, answer) in zip(turns[:-1:2], turns[1::2], strict=True):
        ids += tokenizer.encode(f"[INST] {question.strip()} [/INST] {answer.strip()} ", bos=True, eos=True)
    return ids + tokenizer.encode(f"[INST] {turns[-1][1].strip()} [/INST]", bos=True)


class StreamDecoder:
    """Text of a growing list of ids, as `Tokenizer.show` gives it, piece by piece: never half a character, spaces kept.

    Args:
        context: ids that came before (the prompt): the first new piece keeps its leading space relative to them.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(context)[-4:]  # a few ids are enough context; all of them would make long streams quadratic
        self._shown = len(self._ids)  # ids already turned into text
        self._start = 0  # decode from here: a little before `_shown`, so that its leading space is not stripped

    def push(self, token: int) -> str:
        """Add one id; return the text that is certain by now, perhaps empty."""
        self._ids.append(token)
        text = self._pending()
        return "" if text.endswith(UNFINISHED) else self._emit(text)

    def flush(self) -> str:
        """The rest, at the end of the stream, complete or not."""
        return self._emit(self._pending())

    def _pending(self) -> str:
        known = self._tokenizer.show(self._ids[self._start : self._shown])
        return self._tokenizer.show(self._ids[self._start :])[len(known) :]

    def _emit(self, text: str) -> str:
        # Drop old ids, but keep the four before the cut, which must not split a character: all of them are complete.
        self._start = max(self._start, self._shown - 4) if len(self._ids) - self._start > 16 else self._start
        self._shown = len(self._ids)
        return text
