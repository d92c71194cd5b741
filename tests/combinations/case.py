"""A row of the array as files and flags: the base, the data, what training starts from, and the runs of the program."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import llama
from tests.combinations.array import ADAPTERS, CLASSIFIERS, LAYERS, SETTINGS
from tests.combinations.covering import Row
from tests.combinations.oracle import Model, Sample, attach
from tests.launch import ROOT
from tests.oracle import SHAPES, randomise

STEPS, RATE, DECAY, CLIP = 3, 1e-3, 0.1, 0.5
LENGTH = 16  # of a row of packed samples, which a sample fills in part
NO_RATE = 1e-30  # with which no weight moves
WAY = 0.001  # to either side, of each tensor along a direction of length 1, where a loss is derived by differences
TOKENIZER = ROOT / "fsdp_train" / "demo" / "base"
OF_THE_START = ("method", "precision", "modules_to_save", "patterns", "layers")  # settings that decide about it
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}  # of keys and values
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_base(path: Path, heads: str, attention: str, layers: int = LAYERS) -> None:
    """A small random model with the demo's tokenizer."""
    shape = dataclasses.replace(
        SHAPES["mha"],
        vocab_size=llama.Tokenizer(TOKENIZER).vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_key_value_heads=HEADS[attention],
        tie_word_embeddings=heads == "tied",
    )
    model = llama.Llama(shape)
    randomise(model)
    llama.save(model, path, tokenizer_from=TOKENIZER)


def token_samples(count: int, paired: bool, vocabulary: int, seed: int = 0) -> list[Sample]:
    """Of 3 to 13 tokens, the first ones of which are not learned.

    Args:
        paired: each two of them fill a row of `LENGTH`.
    """
    generator = torch.Generator().manual_seed(seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    samples: list[Sample] = []
    for index in range(count):
        length = LENGTH - len(samples[-1][0]) if paired and index % 2 else number(3, LENGTH - 2)
        ids = torch.randint(3, vocabulary, (length,), generator=generator).tolist()
        given = number(0, length)
        samples.append((ids, [-100] * given + ids[given:]))
    return samples


def write_tokens(path: Path, samples: Sequence[Sample]) -> None:
    path.write_text("".join(json.dumps({"input_ids": ids, "labels": labels}) + "\n" for ids, labels in samples))


def write_texts(path: Path, count: int, seed: int = 0) -> list[Sample]:
    """Words with their first letter for a label. Returns them as ids and classes."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(TOKENIZER / "tokenizer.model"))
    words = [("abc"[i % 3] + "defgh"[(i + seed) % 5]) * (1 + (i + seed) % 4) for i in range(count)]
    path.write_text("".join(json.dumps({"text": word, "label": word[0]}) + "\n" for word in words))
    return [([tokenizer.bos_id(), *tokenizer.encode(word)], "abc".index(word[0])) for word in words]


@dataclass(frozen=True)
class Job:
    """One run of the program, or a run of it that ends before its last step and is started again."""

    flags: list[str]
    out: Path
    resumed: bool = False


@dataclass(frozen=True)
class Case:
    """A row with everything that its flags name, in a directory that it may share with others."""

    row: Row
    work: Path
    name: str
    steps: int = STEPS
    seed: int = 0  # of the data

    def __getitem__(self, setting: str) -> str:
        return self.row[setting]

    @property
    def processes(self) -> int:
        return int(self["processes"])

    @property
    def micro_batch(self) -> int:
        """Samples of all processes together."""
        return self.processes * int(self["batch_size"])

    @property
    def global_batch(self) -> int:
        return self.micro_batch * int(self["grad_accum"])

    @property
    def classifies(self) -> bool:
        return self["method"] in CLASSIFIERS

    @property
    def packs(self) -> bool:
        return self["packing"] == "yes"

    @property
    def drops(self) -> bool:
        return self["dropout"] != "0"

    @property
    def out(self) -> Path:
        return self.work / f"{self.name}, data {self.seed}"

    @cached_property
    def base(self) -> Path:
        path = self.work / f"base-{self['heads']}-{self['attention']}"
        if not path.exists():
            make_base(path, self["heads"], self["attention"])
        return path

    @cached_property
    def data(self) -> tuple[Path, list[Sample]]:
        """The file and its samples: two batches for an epoch, or a whole one and what is left over; packed, one step's."""
        rest = self.global_batch // 2 - (self.global_batch // 2 + 1) % 2 or 1  # odd
        count = {"divide": self.global_batch, "left over": rest}[self["samples"]]
        count = 2 * count if self.packs else count + self.global_batch
        path = self.work / f"{'texts' if self.classifies else 'tokens'}-{count}-{self.packs}-{self.seed}.jsonl"
        if self.classifies:
            return path, write_texts(path, count, self.seed)
        samples = token_samples(count, self.packs, llama.Tokenizer(TOKENIZER).vocab_size, self.seed)
        write_tokens(path, samples)
        return path, samples

    @property
    def method_flags(self) -> list[str]:
        """What decides about where training starts."""
        flags = [flag for name in OF_THE_START for flag in SETTINGS[name][self[name]]]
        return [*flags, "--model.path", str(self.base)]

    @property
    def start(self) -> Path:
        """Where a run of one step that changes nothing leaves what training starts from."""
        words = [*(self[name] for name in OF_THE_START), self.base.name]
        return self.work / "starts" / re.sub(r"\W+", "_", "-".join(words))

    def start_job(self) -> Job:
        data = ["--data.path", str(self.data[0]), "--train.samples", "0", "--checkpoint.every", "1"]
        end = ["--train.max_steps", "1", "--optim.lr", str(NO_RATE), "--train.output_dir", str(self.start)]
        return Job([*self.method_flags, *data, *end, *self._features()], self.start)

    def _features(self) -> list[str]:
        cached = self["method"] == "head, classifier"
        return ["--finetune.head.feature_cache", str(self.work / "features")] if cached else []

    @cached_property
    def adapter(self) -> Path | None:
        """The adapter that training starts from."""
        if self["method"] not in ADAPTERS:
            return None
        if self["from_adapter"] == "no":
            return self.start / "adapter"
        given = self.start / "given"
        if not given.exists():
            shutil.copytree(self.start / "adapter", given)
            generator = torch.Generator().manual_seed(5)
            tensors = load_file(given / "adapter_model.safetensors")
            moved = {name: x + 0.1 * torch.randn(x.shape, generator=generator) for name, x in tensors.items()}
            save_file(moved, given / "adapter_model.safetensors")
        return given

    def job(self, out: Path, *more: object, without: Sequence[str] = (), resumed: bool | None = None) -> Job:
        """The row's own run.

        Args:
            without: settings that are left out.
        """
        left_out = {*OF_THE_START, *without}
        flags = [flag for name, value in self.row.items() if name not in left_out for flag in SETTINGS[name][value]]
        flags += [*self.method_flags, *self._features()]
        if self.adapter and self["from_adapter"] == "yes" and "from_adapter" not in without:
            flags += ["--finetune.from_adapter", str(self.adapter)]
        if self["evaluation"] != "no":
            held_out = self.work / f"held-out-{self.classifies}.jsonl"
            if self.classifies:
                write_texts(held_out, 5)
            else:
                write_tokens(held_out, token_samples(5, False, 100))
            flags += ["--data.eval_path", str(held_out)]
        resumed = self["resumed"] == "yes" if resumed is None else resumed
        given = {
            "--data.path": self.data[0],
            "--data.max_length": LENGTH,
            "--train.samples": 0,
            "--train.max_steps": self.steps,
            "--train.output_dir": out,
            "--log.every": 1,
            "--optim.lr": RATE,
            "--optim.weight_decay": DECAY,
            "--optim.grad_clip": 0 if self.drops or self["in_backward"] == "yes" else CLIP,
            "--checkpoint.every": 2 if resumed else 0,
        } | dict(zip(more[::2], more[1::2], strict=True))
        flags += [str(word) for pair in given.items() for word in pair]
        return Job(flags, out, resumed)

    def jobs(self) -> list[Job]:
        """All runs of a row, beside that of its start."""
        if not self.drops:
            return [self.job(self.out)]
        still = ("--optim.lr", NO_RATE, "--checkpoint.every", 1, "--checkpoint.keep", self.steps)
        exact = (*still, "--parallel.precision", "fp32")
        found = [self.job(self.out, *still)]
        if self["precision"] != "fp32":
            found.append(self.job(self.beside("exact"), *exact))
        assert self.direction  # writes the adapters to either side
        for side in ("plus", "minus"):
            begin = ("--finetune.from_adapter", self.beside(f"{side}-start"))
            found.append(self.job(self.beside(side), *exact, *begin, without=["from_adapter"], resumed=False))
        return found

    def beside(self, name: str) -> Path:
        """Another directory of this row."""
        return self.out.with_name(f"{self.out.name}-{name}")

    @cached_property
    def direction(self) -> dict[str, Tensor]:
        """Each tensor's gradient without dropout, of length 1; or a random one where there is none. Writes the adapters
        that stand a `WAY` along it, and back."""
        assert self.adapter is not None
        model = Model(self.base, torch.float32)
        trained = attach(model, self.adapter)
        gradients = torch.autograd.grad(model.loss(self.data[1]), list(trained.values()))
        generator = torch.Generator().manual_seed(7)
        found = {}
        for name, gradient in zip(trained, gradients, strict=True):
            chosen = gradient if gradient.any() else torch.randn(gradient.shape, generator=generator).double()
            found[name] = chosen / chosen.norm()
        for side, way in (("plus", WAY), ("minus", -WAY)):
            start = self.beside(f"{side}-start")
            shutil.copytree(self.adapter, start)
            moved = {name: (tensor.detach() + way * found[name]).float() for name, tensor in trained.items()}
            save_file(moved, start / "adapter_model.safetensors")
        return found
