"""Text generation with a key/value cache: batches of prompts of any lengths, greedy or sampled.

llama.generate(model, [tokenizer.encode("Once upon a time", bos=True)], max_new_tokens=64, eos_id=tokenizer.eos_id)
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

from llama.cache import KVCache
from llama.errors import InputError
from llama.model import Llama

GRAIN = 128  # slots of the cache that compiled layers see more of at a time


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_id: int | Collection[int] | None = None,
    *,
    use_cache: bool = True,
    fixed_steps: bool = False,
) -> list[list[int]]:
    """Continue each prompt; the arguments are those of `generate_steps`.

    Returns:
        The new ids of each row, without the EOS that ended it.
    """
    rows: list[list[int]] = [[] for _ in prompts]
    for step in generate_steps(
        model, prompts, max_new_tokens, temperature, top_p, seed, eos_id, use_cache=use_cache, fixed_steps=fixed_steps
    ):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    return rows


@torch.no_grad()
def generate_steps(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    eos_id: int | Collection[int] | None = None,
    *,
    use_cache: bool = True,
    fixed_steps: bool = False,
) -> Iterator[list[int | None]]:
    """Yield, after each step, the new id of each row, or None for a row that has ended.

    Args:
        model: a `Llama`, or a wrapper called in the same way; every step is one call of it.
        prompts: token ids, one list per row, none of them empty.
        temperature: 0 takes the likeliest token; otherwise logits are divided by it and sampled.
        top_p: sample among the likeliest tokens only: those whose predecessors sum to at most this probability.
        seed: of the sampling, 64 bits; None draws a new one.
        eos_id: id or ids that end a row (and are not yielded).
        use_cache: False recomputes everything in each step; the tokens are the same, the time is not.
        fixed_steps: go on to `max_new_tokens` when all rows have ended, so that every process of a sharded model makes
            the same number of calls.

    Raises:
        InputError: a classifier, an empty prompt, ids outside the vocabulary, a length beyond the model's context, a sampling
            setting outside its range, or logits that are not finite.
    """
    _check(model, prompts, max_new_tokens, temperature, top_p, seed)
    stop = {eos_id} if isinstance(eos_id, int) else set(eos_id or ())
    device = next(model.parameters()).device
    generator = torch.Generator()
    generator.seed() if seed is None else generator.manual_seed(seed)

    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    ids = torch.zeros(len(prompts), int(lengths.max()), dtype=torch.long, device=device)  # right-padded with any valid id
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt)
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    grain = GRAIN if compiled else 1
    cache = KVCache(model.config.num_hidden_layers, ids.shape[1] + max_new_tokens, grain) if use_cache else None

    was_training = model.training
    model.eval()
    try:
        logits = model(ids, cache=cache, last=lengths - 1)
        ended = [False] * len(prompts)
        for step in range(max_new_tokens):
            token = _choose(logits[:, 0], temperature, top_p, generator)  # (B,)
            chosen = token.tolist()
            ended = [done or new in stop for done, new in zip(ended, chosen, strict=True)]
            yield [None if done else new for done, new in zip(ended, chosen, strict=True)]
            if step == max_new_tokens - 1 or (all(ended) and not fixed_steps):
                return
            positions = (lengths + step)[:, None]
            if cache is not None:
                logits = model(token[:, None], positions=positions, cache=cache)
            else:
                ids = torch.cat((ids, torch.zeros_like(ids[:, :1])), dim=1)
                ids.scatter_(1, positions, token[:, None])
                logits = model(ids, last=positions[:, 0])
    finally:
        model.train(was_training)


def _check(
    model: Llama, prompts: Sequence[Sequence[int]], new: int, temperature: float, top_p: float, seed: int | None
) -> None:
    if model.config.id2label:
        raise InputError("this model is a classifier; it has no language model's head to generate with")
    if not prompts or not all(prompts):
        raise InputError("every prompt needs at least one token; give BOS to start from nothing")
    if new < 1 or not 0 <= temperature < float("inf") or not 0 < top_p <= 1:
        raise InputError(
            f"max_new_tokens {new}, temperature {temperature}, top_p {top_p}; expected at least 1, at least 0, in (0, 1]"
        )
    if seed is not None and not -(2**63) <= seed < 2**64:
        raise InputError(f"seed {seed}; expected a number of at most 64 bits")
    vocabulary, context = model.config.vocab_size, model.config.max_position_embeddings
    for row, prompt in enumerate(prompts):
        if wrong := [i for i in prompt if not 0 <= i < vocabulary]:
            raise InputError(f"prompt {row} holds token id {wrong[0]}; the model's vocabulary is 0..{vocabulary - 1}")
        if len(prompt) + new > context:
            raise InputError(
                f"prompt {row} has {len(prompt)} tokens; with {new} new ones that is beyond the context of {context}"
            )


def _choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> Tensor:
    """Next ids (B,) from logits (B, V)."""
    if not torch.isfinite(logits).all():
        raise InputError("the model's logits are not finite: its weights are damaged, or too large for its dtype")
    if temperature == 0:
        return logits.argmax(-1)
    wide = logits.double().cpu()
    below = wide - wide.amax(-1, keepdim=True)  # at most 0, so that the smallest temperature overflows to the likeliest token
    probabilities = torch.softmax(below / temperature, dim=-1).float()
    ordered, order = probabilities.sort(dim=-1, descending=True)
    ordered[ordered.cumsum(-1) - ordered > top_p] = 0  # Meta's rule: what comes before must not exceed top_p
    picked = torch.multinomial(ordered, 1, generator=generator)
    return order.gather(1, picked)[:, 0].to(logits.device)
