"""Continue prompts, or chat, with a model and perhaps an adapter; the text appears as it is generated.

python -m tools.generate --model DIR --prompt "Once upon a time"
python -m tools.generate --model DIR --adapter out/adapter --template alpaca --prompt "Name three fruits."
python -m tools.generate --model DIR --adapter math=DIR --adapter chat=DIR --prompt math:"2 + 3 =" --prompt chat:"Hello"
python -m tools.generate --model DIR --chat                    # a conversation; an empty line ends it
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import llama
from fsdp_train.recompute import compile_layers
from fsdp_train.settings import fail
from fsdp_train.templates import alpaca_prompt, encode_prompt
from llama import InputError, Llama, StreamDecoder, Tokenizer, chat_prompt, generate_steps
from llama.errors import nearest
from llama.tokenizer import CHAT_TAGS
from peft_impl import load_adapter, set_adapter


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, generate."""
    parser = argparse.ArgumentParser(prog="python -m tools.generate", description="Continue prompts, or chat.")
    parser.add_argument("--model", required=True, metavar="DIR", help="Hugging Face or Meta directory")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]DIR",
        help="PEFT adapter directory; with names, several are loaded, and NAME: before a prompt chooses one",
    )  # fmt: skip
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
    parser.add_argument("--compile", action="store_true", help="compile the layers: faster tokens, after a slow first one")
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
        names = load_adapters(model, options.adapter)
        if options.compile:
            compile_layers(model)
        if options.chat:
            if len(names) > 1:
                raise InputError(f"--chat is a conversation with one adapter, not with {', '.join(names)}")
            chat(model, tokenizer, options)
        else:
            answer(model, tokenizer, options, names)
    except (InputError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        print(file=sys.stderr)


UNNAMED = "default"


def load_adapters(model: Llama, given: list[str]) -> list[str]:
    """Load each `NAME=DIR`, or a single `DIR`; return the names."""
    names = []
    for item in given:
        name, separator, path = item.partition("=")
        if not separator or Path(item).is_dir():
            if len(given) > 1:
                raise InputError(f"--adapter {item}: several adapters need names, NAME=DIR")
            name, path = UNNAMED, item
        load_adapter(model, path, name)
        names.append(name)
    return names


def choose(prompt: str, names: list[str]) -> tuple[str | None, str]:
    """The adapter that `NAME:` before a prompt chooses, and the prompt without it; no name means the bare base.

    Raises:
        InputError: what stands before the colon is nearly the name of an adapter.
    """
    name, separator, text = prompt.partition(":")
    if separator and name in names:
        return name, text
    if separator and (hint := nearest(name, names)):
        raise InputError(f"--prompt {prompt!r}: no adapter {name!r}{hint}")
    return None, prompt


def encode(tokenizer: Tokenizer, options: argparse.Namespace, prompt: str) -> list[int]:
    """A prompt's ids under the chosen template: the same function as in training."""
    if options.template == "chat":
        return chat_prompt(tokenizer, [*system_message(options), {"role": "user", "content": prompt}])
    return encode_prompt(tokenizer, alpaca_prompt(prompt, options.input) if options.template == "alpaca" else prompt)


def system_message(options: argparse.Namespace) -> list[dict[str, str]]:
    """What a conversation begins with: the system message, if there is one."""
    return [{"role": "system", "content": options.system}] if options.system else []


def answer(model: Llama, tokenizer: Tokenizer, options: argparse.Namespace, names: list[str]) -> None:
    """One prompt streams; several are generated as one batch, each row through its own adapter, and printed in order."""
    chosen: list[tuple[str | None, str]] = [(None, prompt) for prompt in options.prompt]
    if names and names != [UNNAMED]:
        chosen = [choose(prompt, names) for prompt in options.prompt]
        set_adapter(model, [name for name, _ in chosen])
    texts = [text for _, text in chosen]
    prompts = [encode(tokenizer, options, text) for text in texts]
    if len(prompts) == 1:
        stream(model, tokenizer, prompts[0], options, texts[0] if options.template == "none" else "")
        return
    rows: list[list[int]] = [[] for _ in prompts]
    for step in steps(model, tokenizer, prompts, options):
        for row, token in zip(rows, step, strict=True):
            if token is not None:
                row.append(token)
    for (name, text), ids, row in zip(chosen, prompts, rows, strict=True):
        shown = tokenizer.show(ids + row) if options.template == "none" else f"{text}\n{tokenizer.show(row).strip()}"
        print(f"--- {f'{name}: ' if name else ''}{shown}")


def stream(model: Llama, tokenizer: Tokenizer, prompt: list[int], options: argparse.Namespace, echo: str = "") -> str:
    """Print the continuation as it comes, after `echo`; return it. Ctrl-C ends it early.

    Nothing is printed before the first token is there: by then whatever is wrong with the request has been said.
    """
    decoder, pieces = StreamDecoder(tokenizer, prompt), []
    with (
        contextlib.suppress(KeyboardInterrupt),
        contextlib.closing(steps(model, tokenizer, [prompt], options)) as running,
    ):
        for (token,) in running:
            pieces.append(decoder.push(token) if token is not None else "")
            print(echo + pieces[-1], end="", flush=True)
            echo = ""
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
    """Read a line, answer, remember both; until an empty line or the end of the input.

    Raises:
        InputError: the system message cannot be used; said before anyone has typed.
    """
    system = system_message(options)
    chat_prompt(tokenizer, [*system, {"role": "user", "content": ""}])
    print("An empty line ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    turns: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ")
            if not text.strip():
                return
            asked = recent(model, tokenizer, options, system, [*turns, {"role": "user", "content": text}])
            reply = stream(model, tokenizer, chat_prompt(tokenizer, [*system, *asked]), options)
        except EOFError:
            return
        except (InputError, UnicodeDecodeError) as error:  # the latter: what was typed is not UTF-8
            print(f"error: {error}", file=sys.stderr)
            continue
        turns = [*asked, {"role": "assistant", "content": without_tags(reply)}]


def recent(
    model: Llama,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
    system: list[dict[str, str]],
    turns: list[dict[str, str]],
) -> list[dict[str, str]]:
    """The newest turns that leave room for an answer: of `--max-new-tokens`, or half the context if that is less."""
    context = model.config.max_position_embeddings
    room, kept = min(options.max_new_tokens, context // 2), turns
    while len(kept) > 1 and len(chat_prompt(tokenizer, [*system, *kept])) + room > context:
        kept = kept[2:]
    if len(kept) < len(turns):
        print(f"note: the context is full; the oldest {(len(turns) - len(kept)) // 2} turns are left out", file=sys.stderr)
    return kept


def without_tags(reply: str) -> str:
    """An answer as it is remembered: a chat tag in it would forge a turn, so a space takes its place."""
    for tag in CHAT_TAGS:
        if tag in reply:
            print(f"note: the answer contains {tag}; it is remembered without", file=sys.stderr)
            reply = reply.replace(tag, " ")
    return reply


if __name__ == "__main__":
    main()
