"""Llama 2 in plain PyTorch: model, files, tokenizer, generation. Knows nothing of adapters or parallelism."""

from llama.cache import KVCache
from llama.config import PRESETS, LlamaConfig
from llama.errors import InputError
from llama.generate import generate, generate_steps
from llama.heads import relabel, replace_head
from llama.io import load, save
from llama.meta import save_meta
from llama.model import Llama
from llama.tokenizer import StreamDecoder, Tokenizer, chat_prompt

__all__ = [
    "PRESETS",
    "InputError",
    "KVCache",
    "Llama",
    "LlamaConfig",
    "StreamDecoder",
    "Tokenizer",
    "chat_prompt",
    "generate",
    "generate_steps",
    "load",
    "relabel",
    "replace_head",
    "save",
    "save_meta",
]
