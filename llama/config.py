"""The architecture of a model, and the well-known ones."""

from __future__ import annotations

import dataclasses
import sys

from llama.errors import InputError, listing

PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The architecture, with Hugging Face's field names.

    Raises:
        InputError: a value that no Llama can have, naming the field.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 0  # 0: as many as query heads
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    # What follows the final norm (llama/heads.py): a language model's head, or with `id2label` a classifier's.
    id2label: tuple[str, ...] = ()
    problem_type: str | None = None  # None: regression for one label, single-label classification for more
    head_hidden: tuple[int, ...] = ()  # widths of extra fully connected layers in the head; not in HF

    def __post_init__(self) -> None:
        if self.num_key_value_heads == 0:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type == "int" and (type(value) is not int or value < 1):
                raise InputError(f"{field.name} is {value!r}; expected a positive integer")
            if field.type == "float" and not (isinstance(value, float | int) and 0 < value <= sys.float_info.max):
                raise InputError(f"{field.name} is {value!r}; expected a positive finite number")
            if field.type == "bool" and type(value) is not bool:
                raise InputError(f"{field.name} is {value!r}; expected true or false")
        texts = isinstance(self.id2label, tuple) and all(isinstance(name, str) for name in self.id2label)
        if not texts or len(set(self.id2label)) < len(self.id2label):
            raise InputError(f"id2label is {self.id2label!r}; expected names of labels, none of them twice")
        if self.problem_type is None and self.id2label:
            kind = "regression" if len(self.id2label) == 1 else "single_label_classification"
            object.__setattr__(self, "problem_type", kind)
        if self.problem_type is not None and (self.problem_type not in PROBLEM_TYPES or not self.id2label):
            raise InputError(f"problem_type is {self.problem_type!r}; expected one of {listing(PROBLEM_TYPES)}, with labels")
        if not isinstance(self.head_hidden, tuple) or not all(type(n) is int and n > 0 for n in self.head_hidden):
            raise InputError(f"head_hidden is {self.head_hidden!r}; expected positive integers")
        if self.hidden_size % self.num_attention_heads:
            raise InputError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of"
                f" num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise InputError(
                f"head size hidden_size / num_attention_heads = {self.head_dim} is odd; rotary positions need pairs"
            )

    @property
    def ties_head(self) -> bool:
        """Whether head and embedding are one weight. A classifier's head never shares it, whatever its file says."""
        return self.tie_word_embeddings and not self.id2label

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


PRESETS = {
    "llama2-7b": LlamaConfig(),
    "llama2-13b": LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40),
    "llama2-70b": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8
    ),
    "demo": LlamaConfig(
        vocab_size=1536,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    ),
}
