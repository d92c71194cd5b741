"""Continue prompts, or chat, with a model and perhaps an adapter; the text appears as it is generated.

python -m tools.generate --model DIR --prompt "Once upon a time"
python -m tools.generate --model DIR --adapter out/adapter --template alpaca --prompt "Name three fruits."
python -m tools.generate --model DIR --chat                    # a conversation; an empty line ends it
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence

import torch

import llama
from fsdp_train.settings import fail
from fsdp_train.templates import alpaca_prompt, encode_prompt
from llama import InputError, Llama, StreamDecoder, Tokenizer, chat_prompt, generate_steps
from peft_impl import load_adapter


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, generate."""
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description="Continue prompts, or chat.")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or Meta directory")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT adapter directory")
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.model (default: the model's directory)")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="may be given several times: answered as one batch")
    parser.add_argument("--input", default="", metavar="TEXT", help="the Alpaca template's input")
    parser.add_argument("--template", choices=("none", "alpaca", "chat"), default="none", help="put around each prompt")
    parser.add_argument("--chat", action="store_true", help="a conversation in the Llama-2-chat format")
    parser.add_argument("--system", metavar="TEXT", help="system message of a chat")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest answer, tokens (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0: the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X", help="sample among this much probability (default: 1)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 on a CPU")
    options = parser.parse_args(arguments)
    if bool(options.prompt) == options.chat:
        parser.error("give --prompt TEXT, or --chat")
    if options.input and options.template != "alpaca":
        parser.error("--input goes with --template alpaca")
    if options.system and not (options.chat or options.template == "chat"):
        parser.error("--system goes with --chat or --template chat")
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = {
            "fp32": torch.float32,
            "bf16": torch.bfloat16,
            None: torch.bfloat16 if device.type == "cuda" else torch.float32,
        }
        tokenizer = Tokenizer(options.tokenizer or options.model)
        model = llama.load(options.model, dtype[options.dtype], device)
        if options.adapter:
            load_adapter(model, options.adapter)
        if options.chat:
            chat(model, tokenizer, options)
        else:
            answer(model, tokenizer, options)
    except InputError as error:
        fail(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)


def encode(tokenizer: Tokenizer, options: argparse.Namespace, prompt: str) -> list[int]:
    """A prompt's ids under the chosen template: the same function as in training."""
    if options.template == "chat":
        return chat_prompt(tokenizer, conversation(options, prompt))
    return encode_prompt(tokenizer, alpaca_prompt(prompt, options.input) if options.template == "alpaca" else prompt)


def conversation(options: argparse.Namespace, prompt: str) -> list[dict[str, str]]:
    """The messages of a conversation that begins with `prompt`."""
    system = [{"role": "system", "content": options.system}] if options.system else []
    return [*system, {"role": "user", "content": prompt}]


def answer(model: Llama, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """One prompt streams; several are generated as one batch and printed one after the other."""
    prompts = [encode(tokenizer, options, prompt) for prompt in options.prompt]
    if len(prompts) == 1:
        if options.template == "none":
            print(options.prompt[0], end="", flush=True)
        stream(model, tokenizer, prompts[0], options)
        return
    rows: list[list[int]] = [[] for _ in prompts]
    for step in steps(model, tokenizer, prompts, options):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    for prompt, ids, row in zip(options.prompt, prompts, rows, strict=True):
        shown = tokenizer.decode(ids + row) if options.template == "none" else f"{prompt}\n{tokenizer.decode(row).strip()}"
        print(f"--- {shown}")


def stream(model: Llama, tokenizer: Tokenizer, prompt: list[int], options: argparse.Namespace) -> str:
    """Print the continuation as it comes; return it."""
    decoder, pieces = StreamDecoder(tokenizer, prompt), []
    with contextlib.closing(steps(model, tokenizer, [prompt], options)) as running:
        for (token,) in running:
            if token is not None:
                pieces.append(decoder.push(token))
                print(pieces[-1], end="", flush=True)
    pieces.append(decoder.flush())
    print(pieces[-1], flush=True)
    return "".join(pieces)


def steps(model: Llama, tokenizer: Tokenizer, prompts: list[list[int]], options: argparse.Namespace):  # type: ignore[no-untyped-def]
    """`generate_steps` with the chosen settings; answers end early, and say so, where the context does."""
    room = model.config.max_position_embeddings - max(map(len, prompts))
    if room < 1:
        raise InputError(
            f"the prompt has {max(map(len, prompts))} tokens; the context of {model.config.max_position_embeddings} is full"
        )
    if room < options.max_new_tokens:
        print(f"note: only {room} tokens fit into the context", file=sys.stderr)
    return generate_steps(
        model,
        prompts,
        min(room, options.max_new_tokens),
        options.temperature,
        options.top_p,
        options.seed,
        tokenizer.eos_id,
    )


def chat(model: Llama, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """Read a line, answer, remember both; until an empty line or the end of the input."""
    print("An empty line ends the conversation.", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            return
        if not text.strip():
            return
        messages = [*messages, {"role": "user", "content": text}] if messages else conversation(options, text)
        try:
            reply = stream(model, tokenizer, chat_prompt(tokenizer, messages), options)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)
            messages.pop()
            continue
        messages.append({"role": "assistant", "content": reply})


if __name__ == "__main__":
    main()
