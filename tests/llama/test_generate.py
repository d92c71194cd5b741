"""Generation: Hugging Face's greedy tokens, the same with and without cache, alone and in a batch; sampling in closed form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import llama
from llama import InputError, LlamaConfig, Tokenizer, generate, generate_steps
from tests.llama.common import tiny, token_ids
from tests.oracle import SHAPES, STORIES, hf_model, needs_data

CASES = [*SHAPES, pytest.param("stories", marks=needs_data)]
PROMPTS = [token_ids(length, seed=length).tolist() for length in (1, 7, 3, 12)]
SIGMAS = 5  # of a binomial count, with a fixed seed: a wrong distribution is off by dozens


class Fixed(nn.Module):
    """Called like a Llama; answers with the given logits, step by step, then with the last ones; counts its calls."""

    def __init__(self, *steps: list[float]) -> None:
        super().__init__()
        self.config = LlamaConfig(vocab_size=len(steps[0]), max_position_embeddings=10_000)
        self.steps = nn.Parameter(torch.tensor(steps))
        self.calls = 0

    def forward(self, ids: Tensor, **settings: Any) -> Tensor:
        logits = self.steps[min(self.calls, len(self.steps) - 1)]
        self.calls += 1
        return logits.expand(len(ids), 1, -1)


def greedy_by_hf(oracle: nn.Module, prompt: list[int], new: int, eos: int | list[int] | None = None) -> list[int]:
    oracle.generation_config.eos_token_id = eos
    ids = torch.tensor([prompt])
    found = oracle.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, pad_token_id=0)
    return found[0, len(prompt) :].tolist()


# the same tokens


@pytest.mark.parametrize("case", CASES)
def test_greedy_is_hfs_row_by_row(case: str, directories: dict[str, Path]) -> None:
    """A batch of prompts of different lengths gives what HF gives for each alone; cached or not."""
    model, oracle = llama.load(directories[case]), hf_model(directories[case], attention="sdpa")
    found = generate(model, PROMPTS, 20)
    assert found == [greedy_by_hf(oracle, prompt, 20) for prompt in PROMPTS]
    assert found == generate(model, PROMPTS, 20, use_cache=False)
    assert found == [generate(model, [prompt], 20)[0] for prompt in PROMPTS]


@needs_data
def test_the_real_model_tells_hfs_story() -> None:
    tokenizer = Tokenizer(STORIES)
    prompt = tokenizer.encode("Once upon a time", bos=True)
    (new,) = generate(llama.load(STORIES), [prompt], 120, eos_id=tokenizer.eos_id)
    assert new == greedy_by_hf(hf_model(STORIES, attention="sdpa"), prompt, 120, tokenizer.eos_id)
    assert tokenizer.decode(prompt + new).startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize(
    "settings", [{"temperature": 0.7}, {"temperature": 1.5, "top_p": 0.8}, {"temperature": 1, "top_p": 0.1}]
)
def test_sampled_tokens_are_the_same_with_and_without_cache(settings: dict[str, float]) -> None:
    model = tiny("gqa")
    for seed in range(3):
        cached = generate(model, PROMPTS, 15, seed=seed, **settings)
        assert cached == generate(model, PROMPTS, 15, seed=seed, use_cache=False, **settings)


def test_a_seed_repeats_and_another_differs() -> None:
    model = tiny("gqa")
    runs = [generate(model, PROMPTS, 15, temperature=1.0, seed=seed) for seed in (3, 3, 4, None, None)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]
    assert runs[3] != runs[4]  # 60 tokens of 97 alike by chance: never


def test_sampling_neither_reads_nor_moves_the_global_generator() -> None:
    model = tiny("gqa")
    torch.manual_seed(1)
    first, after = generate(model, PROMPTS, 5, temperature=1.0, seed=3), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), after)
    assert generate(model, PROMPTS, 5, temperature=1.0, seed=3) == first


# the distribution


def softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [math.exp(x / temperature) for x in logits]
    return [w / sum(weights) for w in weights]


def nucleus(probabilities: list[float], top_p: float) -> dict[int, float]:
    """Meta's rule: a token stays iff the likelier ones sum to at most top_p; what stays is scaled to 1."""
    kept, before = {}, 0.0
    for token in sorted(range(len(probabilities)), key=lambda i: -probabilities[i]):
        if before <= top_p:
            kept[token] = probabilities[token]
        before += probabilities[token]
    return {token: p / sum(kept.values()) for token, p in kept.items()}


LOGITS = [0.3, 2.0, -1.0, 1.4, 0.0, -30.0, 0.9, 1.1]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 0.3, 1e-6])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_samples_follow_the_closed_form(temperature: float, top_p: float) -> None:
    rows = 20_000
    new = generate(Fixed(LOGITS), [[0]] * rows, 1, temperature=temperature, top_p=top_p, seed=0)
    counts = torch.bincount(torch.tensor(new)[:, 0], minlength=len(LOGITS)).tolist()
    wanted = nucleus(softmax(LOGITS, temperature), top_p)
    for token, count in enumerate(counts):
        p = wanted.get(token, 0.0)
        assert abs(count - rows * p) <= SIGMAS * math.sqrt(rows * p * (1 - p)), token  # 0 where the rule drops the token


@pytest.mark.parametrize(("top_p", "kept"), [(0.24, 1), (0.25, 2), (0.49, 2), (0.5, 3), (0.75, 4), (1.0, 4)])
def test_a_token_stays_when_the_likelier_ones_sum_to_exactly_top_p(top_p: float, kept: int) -> None:
    """Four equal tokens have probability 1/4 each, and all their sums are exact in fp32."""
    new = generate(Fixed([0.0] * 4), [[0]] * 500, 1, temperature=1.0, top_p=top_p, seed=0)
    assert len({row[0] for row in new}) == kept


def test_temperature_zero_takes_the_likeliest_whatever_top_p() -> None:
    for top_p in (1.0, 0.01):
        assert generate(Fixed(LOGITS), [[0]] * 3, 2, temperature=0.0, top_p=top_p) == [[1, 1]] * 3


@pytest.mark.parametrize("temperature", [1e-3, 1e-40, 5e-324])
def test_a_tiny_temperature_takes_the_likeliest(temperature: float) -> None:
    assert generate(Fixed(LOGITS), [[0]] * 3, 2, temperature=temperature, seed=0) == [[1, 1]] * 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(wrong: float, temperature: float) -> None:
    with pytest.raises(InputError, match="the model's logits are not finite"):
        generate(Fixed([0.0, wrong, 0.0]), [[0]], 2, temperature=temperature)


# the end


def one_hot(token: int, size: int = 6) -> list[float]:
    return [9.0 if i == token else 0.0 for i in range(size)]


@pytest.mark.parametrize(
    ("eos", "wanted"),
    [(None, [5, 3, 4, 2, 1]), (4, [5, 3]), ([4], [5, 3]), ((2, 4), [5, 3]), ({2}, [5, 3, 4]), (5, []), ([], [5, 3, 4, 2, 1])],
)
def test_eos_ends_a_row_and_is_not_returned(eos: Any, wanted: list[int]) -> None:
    model = Fixed(*(one_hot(token) for token in (5, 3, 4, 2, 1)))
    assert generate(model, [[0], [0, 1]], 5, eos_id=eos) == [wanted, wanted]
    assert model.calls == min(len(wanted) + 1, 5)  # the step that chose EOS is the last


@pytest.mark.parametrize("use_cache", [True, False])
def test_rows_end_each_at_their_own_time(use_cache: bool, directories: dict[str, Path]) -> None:
    """A row that has ended does not disturb the others, and stays ended."""
    model = tiny("gqa")
    free = generate(model, PROMPTS, 20)
    eos = free[0][4]
    found = generate(model, PROMPTS, 20, eos_id=eos, use_cache=use_cache)
    assert found == [row[: row.index(eos)] if eos in row else row for row in free]
    assert len({len(row) for row in found}) > 1
    steps = list(generate_steps(model, PROMPTS, 20, eos_id=eos, use_cache=use_cache))
    for row, wanted in enumerate(found):
        assert [step[row] for step in steps] == wanted + [None] * (len(steps) - len(wanted))


@pytest.mark.parametrize(("fixed", "calls"), [(False, 1), (True, 7)])
def test_fixed_steps_makes_every_call(fixed: bool, calls: int) -> None:
    model = Fixed(one_hot(3))
    assert generate(model, [[0]], 7, eos_id=3, fixed_steps=fixed) == [[]]
    assert model.calls == calls


def test_the_context_can_be_filled_to_the_last_token() -> None:
    model = tiny("gqa")
    prompt = token_ids(120).tolist()
    assert len(generate(model, [prompt], 8)[0]) == 8
    with pytest.raises(InputError, match="prompt 0 has 120 tokens; with 9 new ones that is beyond the context of 128"):
        generate(model, [prompt], 9)


@pytest.mark.parametrize(
    ("prompts", "settings", "message"),
    [
        ([], {}, "every prompt needs at least one token"),
        ([[1], []], {}, "every prompt needs at least one token; give BOS to start from nothing"),
        ([[1], [2, 97]], {}, "prompt 1 holds token id 97; the model's vocabulary is 0..96"),
        ([[-1]], {}, "prompt 0 holds token id -1; the model's vocabulary is 0..96"),
        ([[1]], {"max_new_tokens": 128}, "prompt 0 has 1 tokens; with 128 new ones that is beyond the context of 128"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
        ([[1]], {"temperature": -0.1}, "temperature -0.1"),
        ([[1]], {"temperature": float("nan")}, "temperature nan"),
        ([[1]], {"seed": 10**23}, "seed 100000000000000000000000; expected a number of at most 64 bits"),
        ([[1]], {"seed": -(2**63) - 1}, "expected a number of at most 64 bits"),
        ([[1]], {"top_p": 0.0}, "top_p 0.0"),
        ([[1]], {"top_p": 1.1}, "top_p 1.1"),
        ([[1]], {"top_p": float("nan")}, "top_p nan"),
    ],
)
def test_impossible_requests_are_refused(prompts: list[list[int]], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        generate(tiny("gqa"), prompts, **{"max_new_tokens": 4, **settings})
    assert message in str(error.value)


# manners


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored_however_it_ends(training: bool) -> None:
    model = tiny("gqa").train(training)
    generate(model, PROMPTS, 2)
    assert model.training == training
    for end in ("close", "throw"):
        steps = generate_steps(model, PROMPTS, 5)
        next(steps)
        assert not model.training
        if end == "close":
            steps.close()
        else:
            with pytest.raises(Interrupted):
                steps.throw(Interrupted)
        assert model.training == training
        assert all(module.training == training for module in model.modules())


def test_gradients_stay_enabled_between_steps() -> None:
    model = tiny("gqa")
    for step, _ in enumerate(generate_steps(model, PROMPTS, 3)):
        assert torch.is_grad_enabled(), step
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_arguments_are_left_alone() -> None:
    prompts = [list(prompt) for prompt in PROMPTS]
    generate(tiny("gqa"), prompts, 3)
    assert prompts == PROMPTS
