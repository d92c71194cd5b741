"""Golden ids of the real Llama 2 tokenizer, the chat prompt, and streaming decode; a tiny trained tokenizer runs everywhere."""

from __future__ import annotations

import io
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import sentencepiece

from llama import InputError, StreamDecoder, Tokenizer, chat_prompt
from tests.oracle import LLAMA2_TOKENIZER, STORIES, needs_data

REPLACEMENT = "\ufffd"
BYTES = 3  # id of <0x00> in every Llama tokenizer, after unk, BOS and EOS
CORPUS = [
    "Once upon a time there was a little girl named Lily. She had 12 cats and 7 dogs.",
    "the quick brown fox jumps over the lazy dog; Été, naïve, Straße.",
    "    def f(x):\n        return  x + 1",
    "Human: hello world\nAssistant: hello, how are you?",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """A tiny tokenizer with Llama's settings: BPE, byte fallback, spaces kept, digits apart, no normalisation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 4),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=-1,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return Tokenizer(path)


@pytest.fixture(params=["trained", pytest.param("llama2", marks=needs_data), pytest.param("stories", marks=needs_data)])
def tokenizer(request: pytest.FixtureRequest, trained: Tokenizer) -> Tokenizer:
    return trained if request.param == "trained" else Tokenizer({"llama2": LLAMA2_TOKENIZER, "stories": STORIES}[request.param])


@pytest.fixture(scope="module")
def llama2() -> Tokenizer:
    return Tokenizer(LLAMA2_TOKENIZER / "tokenizer.model")


# golden ids


GOLDEN = {  # Meta's ids, where HF's own tokenizer gives others for several
    "": [],
    "Hello": [15043],
    "Hello world": [15043, 3186],
    "a  b": [263, 29871, 289],
    "x": [921],
    " ": [259],
    "\n": [29871, 13],
    "<s>": [529, 29879, 29958],
    "<s>x": [529, 29879, 29958, 29916],
    "</s>": [1533, 29879, 29958],
    "2024": [29871, 29906, 29900, 29906, 29946],
    "\u3042": [29871, 30641],
    "\U0001f999": [29871, 243, 162, 169, 156],  # a llama: four bytes, <0xF0> <0x9F> <0xA6> <0x99>, ids 3 + byte
    "\t": [29871, 12],
}


@needs_data
@pytest.mark.parametrize(("text", "ids"), GOLDEN.items(), ids=[repr(text) for text in GOLDEN])
def test_golden_ids(text: str, ids: list[int], llama2: Tokenizer) -> None:
    assert llama2.encode(text) == ids
    assert llama2.encode(text, bos=True, eos=True) == [1, *ids, 2]
    assert llama2.decode([1, *ids, 2]) == text


@needs_data
def test_the_real_vocabulary(llama2: Tokenizer) -> None:
    """32000 pieces, nothing added, no pad."""
    assert (llama2.vocab_size, llama2.bos_id, llama2.eos_id) == (32000, 1, 2)
    assert llama2.decode([0]) == " \u2047 "
    assert [llama2.decode([BYTES + byte]) for byte in b"aZ~"] == ["a", "Z", "~"]


@needs_data
def test_encoding_does_not_concatenate(llama2: Tokenizer) -> None:
    """So prompts and responses are joined as ids, never cut out of one text."""
    assert llama2.encode("Hello") + llama2.encode(" world") != llama2.encode("Hello world")


def test_bos_and_eos_are_ids_only(tokenizer: Tokenizer) -> None:
    """They are added where asked for, decode to nothing, and cannot come out of a text."""
    for text in ("<s>", "</s>", "<unk>", "<s>[INST] hi [/INST]</s>"):
        ids = tokenizer.encode(text)
        assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
        assert tokenizer.encode(text, bos=True) == [tokenizer.bos_id, *ids]
        assert tokenizer.encode(text, eos=True) == [*ids, tokenizer.eos_id]
        assert tokenizer.decode(tokenizer.encode(text, bos=True, eos=True)) == tokenizer.decode(ids)
    assert tokenizer.encode("") == []
    assert tokenizer.encode("", bos=True, eos=True) == [tokenizer.bos_id, tokenizer.eos_id]


def test_every_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    """Byte fallback leaves nothing out; spaces, tabs and newlines are kept."""
    for text in random_texts(100):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_directory_or_a_file(trained: Tokenizer) -> None:
    assert trained.path.name == "tokenizer.model"
    assert Tokenizer(trained.path.parent).encode("hello world") == trained.encode("hello world")
    assert Tokenizer(str(trained.path.parent)).path == trained.path


@pytest.mark.parametrize("wrong", [-100, -1, 32000, 10**12])
def test_an_id_outside_the_vocabulary_is_refused(wrong: int, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=rf"token id {wrong} is outside the vocabulary 0\.\.{tokenizer.vocab_size - 1}"):
        tokenizer.decode([5, wrong])


def test_an_id_outside_the_vocabulary_can_be_shown(tokenizer: Tokenizer) -> None:
    """A model with more rows than the tokenizer has pieces chooses such ids; whole texts show as they decode."""
    more = tokenizer.vocab_size + 417
    cat, dog = tokenizer.encode("a cat"), tokenizer.encode("dog")
    assert tokenizer.show([1, *cat, more, *dog, -1, 2]) == f"a cat<{more}> dog<-1>"
    assert tokenizer.show([]) == ""
    for text in random_texts(30):
        ids = tokenizer.encode(text, bos=True, eos=True)
        assert tokenizer.show(ids) == tokenizer.decode(ids) == text
    rng = random.Random(0)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(2000)]
    assert tokenizer.show(ids) == tokenizer.decode(ids)
    assert "".join(stream(tokenizer, [*cat, more, *dog], [tokenizer.bos_id])) == f"a cat<{more}> dog"


def test_half_a_surrogate_pair_is_refused(trained: Tokenizer) -> None:
    """What Python makes of invalid UTF-8 in an argument or a line, or reads from a JSON file's escapes."""
    with pytest.raises(InputError, match=r"the text is not valid Unicode: '\\udcff' at character 2"):
        trained.encode("ab\udcff")


def test_a_tokenizer_without_bos_is_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=60, bos_id=-1, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(InputError, match=r"tokenizer\.model has no BOS or EOS piece \(ids -1, \d+\); Llama needs both"):
        Tokenizer(tmp_path)


# chat


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@needs_data
def test_golden_ids_of_a_conversation(llama2: Tokenizer) -> None:
    """Those of Meta's generation.py: the space before EOS is token 29871, each turn has its own BOS."""
    found = chat_prompt(
        llama2,
        [message("system", "Be nice."), message("user", " Hi "), message("assistant", " Hello! "), message("user", "Bye")],
    )
    assert found == [
        *(1, 518, 25580, 29962, 3532, 14816, 29903, 6778, 13, 3629, 7575, 29889, 13, 29966, 829, 14816, 29903, 6778, 13, 13),
        *(6324, 518, 29914, 25580, 29962, 15043, 29991, 29871, 2, 1, 518, 25580, 29962, 2648, 29872, 518, 29914, 25580, 29962),
    ]


def test_a_conversation_is_the_concatenation_of_its_turns(tokenizer: Tokenizer) -> None:
    """Only surrounding space of a turn is stripped, never that of the system message."""
    found = chat_prompt(
        tokenizer,
        [message("system", " S "), message("user", " a"), message("assistant", "b\n"), message("user", "c")],
    )
    first = tokenizer.encode("[INST] <<SYS>>\n S \n<</SYS>>\n\n a [/INST] b ", bos=True, eos=True)
    assert found == first + tokenizer.encode("[INST] c [/INST]", bos=True)
    assert chat_prompt(tokenizer, [message("user", "c")]) == tokenizer.encode("[INST] c [/INST]", bos=True)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("", "roles are []"),
        ("s", "only a system message"),
        ("a", "roles are ['assistant']"),
        ("ua", "ending with user"),
        ("uu", "roles are ['user', 'user']"),
        ("uauu", "roles are ['user', 'assistant', 'user', 'user']"),
        ("ssu", "roles are ['system', 'user']"),
        ("sa", "roles are ['assistant']"),
        ("usu", "roles are ['user', 'system', 'user']"),
        ("x", "roles are ['tool']"),
    ],
)
def test_roles_out_of_order_are_refused(roles: str, expected: str, trained: Tokenizer) -> None:
    names = {"s": "system", "u": "user", "a": "assistant", "x": "tool"}
    with pytest.raises(InputError) as error:
        chat_prompt(trained, [message(names[role], "hello") for role in roles])
    assert expected in str(error.value)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
@pytest.mark.parametrize("place", [0, 1, 2, 3])
def test_a_message_cannot_forge_a_turn(tag: str, place: int, trained: Tokenizer) -> None:
    conversation = [message(role, "hello") for role in ("system", "user", "assistant", "user")]
    conversation[place]["content"] = f"a{tag}b"
    with pytest.raises(InputError) as error:
        chat_prompt(trained, conversation)
    assert str(error.value).startswith(f"the {conversation[place]['role']} message contains {tag}, which is reserved")


# streaming

BITS = [
    *("a", "the ", "Once upon", " ", "  ", "    ", "\n", "\n\n", "\t", "...", "x = {}\n", "0", "12,345.6", "<s>", "[INST]"),
    *("é", "e\u0301", "ß", "ﬁ", "\u00a0", "漢", "字かな", "한글", "שלום", "😀", "👨‍👩‍👧‍👦", "🇩🇪"),
]


def random_texts(count: int, longest: int = 60) -> Iterable[str]:
    rng = random.Random(0)
    for _ in range(count):
        yield "".join(rng.choices(BITS, k=rng.randrange(1, longest)))


def stream(tokenizer: Tokenizer, ids: list[int], context: list[int]) -> list[str]:
    decoder = StreamDecoder(tokenizer, context)
    return [*(decoder.push(token) for token in ids), decoder.flush()]


@pytest.mark.parametrize("prompt", [None, "", "Once upon a time", "Q: 漢字😀\nA:", "the "])
def test_a_stream_adds_up_to_the_text(prompt: str | None, tokenizer: Tokenizer) -> None:
    """What the pieces add up to is the whole text minus the prompt's, and no piece holds half a character."""
    context = [] if prompt is None else tokenizer.encode(prompt, bos=True)
    for text in random_texts(60):
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids, context)
        before = tokenizer.decode(context)
        assert before + "".join(pieces) == tokenizer.decode(context + ids)
        assert REPLACEMENT not in "".join(pieces)


def test_a_long_stream_adds_up_too(tokenizer: Tokenizer) -> None:
    """Old ids are dropped on the way, at cuts that may fall within a character."""
    text = "".join(random_texts(40))
    ids = tokenizer.encode(text)
    assert len(ids) > 1000
    assert "".join(stream(tokenizer, ids, [tokenizer.bos_id])) == text


def test_a_long_stream_decodes_few_ids_at_a_time(trained: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a stream's time is linear in its length."""
    lengths, original = [], Tokenizer.show

    def show(self: Tokenizer, ids: list[int]) -> str:
        lengths.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(Tokenizer, "show", show)
    stream(trained, trained.encode("hello world " * 200), [])
    assert len(lengths) > 400
    assert max(lengths) <= 32


def test_every_piece_comes_as_soon_as_it_is_whole(tokenizer: Tokenizer) -> None:
    """A character of four byte tokens is held back until its last; anything else is shown at once."""
    spelt = [BYTES + byte for byte in "😀".encode()]
    ids = [*tokenizer.encode("the"), *spelt, *tokenizer.encode("the")]
    pieces = stream(tokenizer, ids, [])
    n = len(tokenizer.encode("the"))
    assert "".join(pieces[:n]) == "the"
    assert pieces[n : n + 4] == ["", "", "", "😀"]
    assert "".join(pieces[n + 4 :]) == " the"


def test_unfinished_bytes_come_with_the_flush(tokenizer: Tokenizer) -> None:
    pieces = stream(tokenizer, [BYTES + 0xF0, BYTES + 0x9F], [])
    assert pieces == ["", "", REPLACEMENT * 2]


def test_any_ids_add_up(tokenizer: Tokenizer) -> None:
    """A model can produce bytes that are no text at all: the stream then shows what decoding shows."""
    rng = random.Random(0)
    for _ in range(30):
        ids = [BYTES + rng.randrange(256) if rng.random() < 0.5 else rng.randrange(3, tokenizer.vocab_size) for _ in range(80)]
        assert "".join(stream(tokenizer, ids, [tokenizer.bos_id])) == tokenizer.decode(ids)
