"""What is measured: sizes of models, regimes of data, methods; and the arithmetic of what each step has to compute.

Legend: D hidden width, F intermediate width, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fsdp_train.data import Sample, load_dataset
from fsdp_train.packing import best_fit
from llama import PRESETS, LlamaConfig, Tokenizer
from llama.loss import IGNORE

_SMALL = LlamaConfig(
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    max_position_embeddings=8192,
)
SIZES = {
    "tiny": dataclasses.replace(
        _SMALL,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=512,
    ),
    "S": _SMALL,
    "M": LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=8192,
    ),
    "7b": dataclasses.replace(PRESETS["llama2-7b"], max_position_embeddings=8192),
}


@dataclass(frozen=True)
class Case:
    """One comparison: every program trains `method` on the same documents.

    Attributes:
        regime: "fixed": `batch` documents of `length` tokens, all learned. "labels": the last quarter of each learned. "real":
            the documents of a file, `batch` at once, padded by peers and packed by us.
        checkpointing: what each layer computes again in backward, as `--parallel.activation_checkpointing`; peers know "full".
    """

    method: str
    regime: str
    size: str = "S"
    batch: int = 4
    length: int = 512
    checkpointing: str = "none"

    @property
    def name(self) -> str:
        shape = f"{self.batch} at once" if self.regime == "real" else f"{self.batch} x {self.length}"
        again = "" if self.checkpointing == "none" else f", checkpointing {self.checkpointing}"
        return f"{self.method}, {self.regime} {shape}{again}, {self.size}"


CASES = {
    "lora": Case("lora", "fixed"),
    "labels": Case("lora", "labels"),
    "real": Case("lora", "real", batch=8),
    "full": Case("full", "fixed"),
    "llama_adapter": Case("llama_adapter", "fixed"),
    "prefix": Case("prefix", "fixed"),
    "partial": Case("partial", "fixed"),
    "checkpointing": Case("lora", "fixed", checkpointing="full"),
    "selective": Case("lora", "fixed", checkpointing="selective"),
    "generate": Case("generate", "fixed", batch=8, length=64),
}
DOCUMENTS = 96  # of a file, in the regime "real"
NEW_TOKENS = 128  # of a row that is generated
ROW = 2048  # tokens of a row that they are packed into


def steps(case: Case, config: LlamaConfig, data: str, tokenizer: str, packing: bool) -> list[list[Sample]]:
    """The documents of each step: a list that is trained on again and again. Every program has the same documents in it; the
    regime "real" groups them otherwise for one that packs: by rows."""
    if case.regime == "real":
        found = load_dataset(data, "auto", Tokenizer(tokenizer), config.vocab_size, config.max_position_embeddings)
        chosen = np.random.default_rng(0).permutation(len(found.samples))[:DOCUMENTS]
        documents = [found.samples[i] for i in chosen]
        if packing:
            return [[documents[i] for i in row] for row in best_fit([len(d.ids) for d in documents], ROW)]
        return [documents[i : i + case.batch] for i in range(0, len(documents), case.batch)]
    generator = np.random.default_rng(0)

    def document(index: int) -> Sample:
        ids = generator.integers(3, config.vocab_size, case.length, dtype=np.int32)
        labels = ids.copy()
        if case.regime == "labels":
            labels[: case.length * 3 // 4] = IGNORE
        return Sample(f"document {index}", ids, labels, 1)

    return [[document(i) for i in range(case.batch)] for _ in range(2)]


def flops(case: Case, config: LlamaConfig, documents: list[Sample], trained: int) -> float:
    """Floating-point operations that one pass over `documents` needs: matrix products with the weights (two per weight and
    token in forward, two for the gradients of inputs, two for those of weights that train), causal attention as the lower
    triangle, the head at label positions only; nothing for padding, and nothing for what is computed again."""
    D, F, L, V = config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size
    kv = config.num_key_value_heads * config.head_dim
    block = 2 * D * D + 2 * D * kv + 3 * D * F
    tokens = sum(len(d.ids) for d in documents)
    targets = sum(int((d.labels[1:] != IGNORE).sum()) for d in documents)
    squares = sum(len(d.ids) ** 2 for d in documents)
    attention = 6 * L * D * squares
    if case.method == "generate":
        return 2 * (L * block + D * V) * len(documents) * NEW_TOKENS
    if case.method == "full":
        return 6 * (L * block * tokens + D * V * targets) + attention
    if case.method == "partial":  # the last two layers: gradients end below them
        return (2 * L + 8) * block * tokens + 4 * D * V * targets + attention * (L + 4) / (3 * L)
    return 4 * (L * block * tokens + D * V * targets) + attention + 6 * trained * tokens * (case.method == "lora")


def data_missing(case: Case, data: str, tokenizer: str) -> str:
    """Why a case cannot be run, or ""."""
    if case.regime != "real" or (Path(data).is_file() and tokenizer):
        return ""
    return "give --data FILE and --tokenizer DIR"
