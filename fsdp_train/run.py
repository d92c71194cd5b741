"""One run, step by step: prepare, wrap, measure, train, measure again, save, sum up."""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import llama
from fsdp_train.build import ADAPTER_METHODS, build_model, check_tokenizer, load_tokenizer, wrap_model
from fsdp_train.checkpoint import data_fingerprint, drop_later, find_checkpoint, load_checkpoint, save_checkpoint
from fsdp_train.config import DEMO, RunConfig
from fsdp_train.data import Dataset, Plan, load_dataset
from fsdp_train.log import Metrics, peak_memory, say, write_whole
from fsdp_train.output import output_directory
from fsdp_train.parallel import World, compute_dtype, frozen_checksum, full_trainable_state
from fsdp_train.samples import answerable, answers, exact_match, reference
from fsdp_train.settings import values_of, write_toml
from fsdp_train.train import evaluate, fit
from llama import PRESETS, Llama
from llama.errors import InputError
from llama.weight_files import open_weights
from peft_impl import add_adapter, count_parameters, save_adapter, trainable_table


@dataclass
class Measures:
    """What is known of a model at one moment; None where it was not measured."""

    eval_loss: float | None = None
    exact_match: float | None = None


class Run:
    """State of one run. Every method is called on every process, in the order of this file."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.is_adapter = config.finetune.method in ADAPTER_METHODS
        self.dtype = compute_dtype(config.parallel, world.device)

    def tell(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.rank == 0 and text:
            say(text)

    # --- before the first step ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Check and read everything. An error on any process becomes the same error on all, before anything is written."""
        output = ""
        with self.world.together():
            if self.world.rank == 0:
                try:
                    output = str(output_directory(self.config))
                except OSError as error:
                    raise InputError(f"--train.output_dir {self.config.train.output_dir}: {error.strerror}") from None
                find_checkpoint(self.config.checkpoint.resume, Path(output) / "checkpoints")
        self.output = Path(self.world.gather(output)[0])
        with self.world.together():
            self._read()
        self.config = dataclasses.replace(
            self.config, train=dataclasses.replace(self.config.train, output_dir=str(self.output))
        )

    def _read(self) -> None:
        config, data = self.config, self.config.data
        self.tokenizer = load_tokenizer(config.model)
        if config.model.preset:
            self.llama_config, self.stored_dtype = PRESETS[config.model.preset], torch.float32
        else:
            weights = open_weights(config.model.path)
            self.llama_config = weights.config
            self.stored_dtype = next((weights.read(name).dtype for name in weights.shapes), torch.float32)
        self.tell(check_tokenizer(self.tokenizer, self.llama_config.vocab_size))
        context = self.llama_config.max_position_embeddings
        length = data.max_length or context
        if length > context:
            raise InputError(f"--data.max_length {length} is beyond the model's context of {context}")

        def load(path: str) -> Dataset:
            dataset = load_dataset(path, data.format, self.tokenizer, self.llama_config.vocab_size, length)
            self.tell(dataset.report())
            return dataset

        self.data, self.held_out = load(data.path), None
        if data.eval_path:
            self.held_out = load(data.eval_path)
        elif data.eval_fraction:
            count = max(1, round(data.eval_fraction * len(self.data.samples)))
            if count >= len(self.data.samples):
                raise InputError(
                    f"--data.eval_fraction {data.eval_fraction} of {len(self.data.samples)} samples leaves none to train on"
                )
            self.data, self.held_out = self.data.without(count, config.train.seed)
            self.tell(f"  held out: {count:,} samples")
        if config.train.exact_match and self.tokenizer is None:
            raise InputError("--train.exact_match compares texts; give --model.tokenizer")
        train = config.train
        self.plan = Plan(
            len(self.data.samples), train.batch_size, train.grad_accum, self.world.size, self.world.rank, train.seed,
            config.data.shuffle,
        )  # fmt: skip
        self.total_steps = train.max_steps or (train.epochs or 1) * self.plan.steps_per_epoch
        if config.optim.warmup_steps >= self.total_steps:
            steps = config.optim.warmup_steps
            self.tell(f"note: --optim.warmup_steps {steps}: the run ends after {self.total_steps:,} steps, still warming up")
        self.tell(self._first_sample())
        self.model = build_model(config.model, config.finetune, config.train.seed, self.dtype)

    def _first_sample(self) -> str:
        """The seam between what is masked and what is learned, as the model will see it."""
        sample = self.data.samples[0]
        if self.tokenizer is None:
            return ""
        prompt = self.tokenizer.show(sample.ids[: sample.prompt].tolist())
        learned = self.tokenizer.show(sample.ids[sample.prompt :].tolist())
        return (
            f"  first sample, given:   {'...' * (len(prompt) > 90)}{prompt[-90:]!r}\n"
            f"  first sample, learned: {learned[:90]!r}{'...' * (len(learned) > 90)}"
        )

    def wrap(self) -> None:
        """Shard, build the optimizer, resume; from here on the model belongs to all processes together."""
        trainable, total = count_parameters(self.model)
        self.trainable = trainable
        adapters = getattr(self.model, "adapters", None)
        self.adapter_config = next(iter(adapters.configs.values())) if adapters else None
        self.tell(
            f"{self.config.finetune.method}: {trainable:,} of {total:,} parameters train ({100 * trainable / total:.2f} %)"
        )
        self.tell(trainable_table(self.model) if self.is_adapter else "")
        if self.world.size > 1:
            table = self.world.table()
            self.tell(f"{self.world.size} processes:\n{table}")
        self.model_wrapped, self.optimizer, strategy = wrap_model(
            self.model, self.config.parallel, self.config.optim, self.world
        )
        self.checksum = frozen_checksum(self.model_wrapped, self.world)
        self.first_step = self._resume()
        with self.world.together():
            try:
                self.output.mkdir(parents=True, exist_ok=True)
                self.metrics = Metrics(self.output / "metrics.jsonl", self.world.rank == 0, self.first_step)
                if self.world.rank == 0:
                    text = write_toml(self.config, "torchrun -m fsdp_train.main --config config.toml")
                    write_whole(self.output / "config.toml", text)
                    for path in drop_later(self.output / "checkpoints", self.first_step):
                        self.tell(f"removed {path}: it is beyond step {self.first_step}, where this run starts")
            except OSError as error:
                raise InputError(f"--train.output_dir {self.output} cannot be written: {error.strerror}") from None
        threads = f", {torch.get_num_threads()} threads" if self.world.device.type == "cpu" else ""
        self.tell(
            f"{self.world.device.type}{threads}, strategy {strategy}, {str(self.dtype).removeprefix('torch.')}:"
            f" {self.total_steps:,} steps of {self.plan.global_batch} samples, into {self.output}"
        )

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that continues it must have in common."""
        train, finetune = self.config.train, values_of(self.config.finetune)
        return {
            "architecture": str(self.llama_config),
            "frozen weights": self.checksum,
            "finetune": {name: str(value) for name, value in finetune.items()},
            "data": data_fingerprint(self.data),
            "optim": {name: str(value) for name, value in values_of(self.config.optim).items()},
            "order": [train.seed, self.config.data.shuffle],
            "batch": [train.batch_size, train.grad_accum],
            "precision": str(self.dtype),
        }

    def _resume(self) -> int:
        found = find_checkpoint(self.config.checkpoint.resume, self.output / "checkpoints")
        if found is None:
            return 0
        identity, step = self._identity(), 0
        with self.world.together():
            step = load_checkpoint(found, self.model_wrapped, self.optimizer, self.world, identity)
            if step >= self.total_steps:
                raise InputError(f"{found} has {step} steps done, this run ends at {self.total_steps}")
        self.tell(f"resumed from {found}: {step:,} steps done")
        return step

    # --- training and measuring -----------------------------------------------------------------------------------------

    def measure(self, moment: str) -> Measures:
        """Held-out loss, exact matches and sample answers, "before" or "after"; a resumed run has no before."""
        measures = Measures()
        if moment == "before" and self.first_step:
            return measures
        train, data = self.config.train, self.held_out or self.data
        row: dict[str, float] = {}
        if self.held_out is not None:
            row["eval_loss"] = measures.eval_loss = evaluate(self.model_wrapped, self.held_out, train.batch_size, self.world)
        context, fixed = self.llama_config.max_position_embeddings, self.world.size > 1
        if self.tokenizer is not None and train.samples:
            shown = answerable(data.samples, train.sample_tokens, context)[: train.samples]
            given = answers(self.model_wrapped, self.tokenizer, shown, train.sample_tokens, fixed)
            for sample, answer in zip(shown, given, strict=True):
                expected = reference(self.tokenizer, sample)
                self.tell(f"{moment} training, {sample.where}\n  answer:    {answer[:200]!r}\n  reference: {expected[:200]!r}")
        if self.tokenizer is not None and train.exact_match:
            longest = max(len(s.ids) - s.prompt for s in data.samples)
            asked = answerable(data.samples, longest, context)[: train.exact_match]
            row["exact_match"] = measures.exact_match = exact_match(self.model_wrapped, self.tokenizer, asked, fixed)
        if row:
            self.metrics.write(step=0 if moment == "before" else self.total_steps, **row)
            self.tell(f"{moment} training: " + ", ".join(f"{name} {value:.4f}" for name, value in row.items()))
        return measures

    def train(self) -> None:
        """All steps that are left, with evaluation and checkpoints on the way."""
        train, every = self.config.train, self.config.checkpoint.every

        def after_step(done: int) -> None:
            if self.held_out is not None and train.eval_every and done % train.eval_every == 0 and done < self.total_steps:
                loss = evaluate(self.model_wrapped, self.held_out, train.batch_size, self.world)
                self.metrics.write(step=done, eval_loss=loss)
                self.tell(f"step {done}: eval_loss {loss:.4f}")
            if every and done % every == 0 and done < self.total_steps:
                save_checkpoint(
                    self.output / "checkpoints", done, self.config.checkpoint.keep, self.model_wrapped, self.optimizer,
                    self.world, self._identity(),
                )  # fmt: skip

        fit(
            self.model_wrapped, self.optimizer, self.data, self.plan, self.config.optim, self.world,
            range(self.first_step, self.total_steps), self.metrics, self.config.log.every, after_step,
        )  # fmt: skip

    # --- what the user keeps --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `adapter/` (PEFT) or `model/` (Hugging Face), read back and compared before it gets its name."""
        if frozen_checksum(self.model_wrapped, self.world) != self.checksum:
            raise RuntimeError("frozen weights changed during training; nothing is saved")
        state = full_trainable_state(self.model_wrapped, self.world)
        self.artefact = self.output / ("adapter" if self.is_adapter else "model")
        with self.world.together():
            if self.world.rank == 0:
                self._write(state)

    def _write(self, state: dict[str, torch.Tensor]) -> None:
        with torch.device("meta"):
            skeleton = Llama(self.llama_config)
        base = self.config.model.path
        if self.is_adapter:
            add_adapter(skeleton, self.adapter_config)
            self.bytes = save_adapter(skeleton, self.artefact, state=state, base=base, replace=True)
        else:
            dtype = {"auto": self.stored_dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[self.config.model.dtype]
            tokenizer = self.tokenizer.path.parent if self.tokenizer is not None else None
            llama.save(skeleton, self.artefact, dtype, state=state, tokenizer_from=tokenizer, replace=True)
            self.bytes = sum(file.stat().st_size for file in self.artefact.iterdir())

    def sum_up(self, before: Measures, after: Measures, seconds: float) -> None:
        """Tell what changed, what did not, where it is, and what to type next."""
        if self.world.rank:
            return
        lines = [""]
        for name in ("eval_loss", "exact_match"):
            old, new = getattr(before, name), getattr(after, name)
            if new is not None:
                lines.append(f"held-out {name}: {'' if old is None else f'{old:.4f} before, '}{new:.4f} after")
        if self.is_adapter:
            lines.append(f"base weights: unchanged (checksum {self.checksum} before and after)")
        lines.append(f"saved: {self.artefact} ({self.bytes / 1e6:.2f} MB, {self.trainable:,} trained parameters)")
        lines.append(f"time: {seconds:.0f} s, peak memory {peak_memory(self.world.device) / 1e9:.2f} GB per process")
        self.tell("\n".join(lines + self._next_commands()))

    def _next_commands(self) -> list[str]:
        if self.tokenizer is None:
            return []
        base = shlex.quote(self.config.model.path)
        target = f"--model {base} --adapter {self.artefact}" if self.is_adapter else f"--model {self.artefact}"
        lines = ["next:", f"  python -m tools.generate {target} {self._example_prompt()}"]
        if self.config.finetune.method == "lora":
            lines.append(
                f"  python -m tools.merge_adapter --model {base} --adapter {self.artefact} --output {self.output}/merged"
            )
        if Path(self.config.model.path).is_relative_to(DEMO):
            lines.append("  torchrun -m fsdp_train.main --model.path DIR --data.path FILE      # your model, your data")
        return lines

    def _example_prompt(self) -> str:
        example = (self.held_out or self.data).example
        if self.data.format == "alpaca":
            given = f" --input {shlex.quote(example['input'])}" if example.get("input") else ""
            return f"--template alpaca --prompt {shlex.quote(example['instruction'])}{given}"
        return f"--prompt {shlex.quote(str(example.get('prompt', 'Once upon a time')))}"
