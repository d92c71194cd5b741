"""How a record becomes a prompt, in training and in generation alike.

Source of the Alpaca text: Taori et al. 2023, github.com/tatsu-lab/stanford_alpaca.
"""

from __future__ import annotations

from llama import Tokenizer

_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def alpaca_prompt(instruction: str, input: str = "") -> str:
    """The prompt of an Alpaca record; the response follows directly."""
    template = _WITH_INPUT if input else _WITHOUT_INPUT
    return template.format(instruction=instruction, input=input)


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """BOS and the prompt's tokens: what training masks, and what generation continues."""
    return tokenizer.encode(prompt, bos=True)


def encode_pair(tokenizer: Tokenizer, prompt: str, response: str) -> tuple[list[int], int]:
    """BOS, prompt, response, EOS; and how many of these ids are the prompt's.

    The two are encoded apart and joined as ids: sentencepiece would otherwise merge across the seam, and the trained
    prefix would not be the one that generation presents.
    """
    prefix = encode_prompt(tokenizer, prompt)
    return prefix + tokenizer.encode(response, eos=True), len(prefix)
