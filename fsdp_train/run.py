"""One run, step by step: prepare, wrap, measure, train, save, measure again, sum up."""

from __future__ import annotations

import dataclasses
import gc
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdp_train.artefact import Artefact
from fsdp_train.build import ADAPTER_METHODS, build_model, frozen_dtype, trained_names, wrap_model
from fsdp_train.checkpoint import Checkpoints, data_fingerprint, room_for
from fsdp_train.checkpoint_files import drop_later, find_checkpoints
from fsdp_train.classification import ClassificationDataset
from fsdp_train.config import RunConfig
from fsdp_train.features import HeadOnly, backbone_digest, cache_directory, file_of, with_features
from fsdp_train.inputs import read_inputs
from fsdp_train.log import Metrics, peak_memory, say, write_whole
from fsdp_train.measure import held_out_metrics, measure
from fsdp_train.optim import LossScaler
from fsdp_train.output import next_commands, output_directory
from fsdp_train.parallel import Fill, frozen_checksum, held_bytes, place_model
from fsdp_train.partial import PartialConfig, RankedLayer, Unfreezing, rank_layers, save_ranking, show_ranking
from fsdp_train.settings import values_of, write_toml
from fsdp_train.signals import Signals, Stopped
from fsdp_train.strategy import chosen_strategy, precision_of, replicas_and_shards
from fsdp_train.train import fit
from fsdp_train.units import shares, table, total_bytes
from fsdp_train.world import World
from llama import Llama
from llama.errors import InputError
from peft_impl import count_parameters, trainable_table
from peft_impl.freeze import layer_of

Measures = dict[str, float]


class Run:
    """State of one run. Every method is called on every process, in the order of this file."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.is_adapter = config.finetune.method in ADAPTER_METHODS
        self.precision = precision_of(config.parallel, world.device)
        self.dtype = self.precision.param
        self.ranking: list[RankedLayer] = []

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
                find_checkpoints(self.config.checkpoint.resume, Path(output) / "checkpoints")
        self.output = Path(self.world.gather(output)[0])
        finetune = self.config.finetune
        with self.world.together():
            self.inputs = read_inputs(self.config, self.world, self.tell)
            trained_names(finetune, self.inputs.base, self.inputs.target)  # names that match nothing end the run here
        if finetune.partial.select:
            self._rank()
        chosen = [row.layer for row in self.ranking if row.trains]
        with self.world.together():
            names = trained_names(finetune, self.inputs.base, self.inputs.target, chosen)
            self.model, self.fill = self._built(names, torch.float32)
        self.config = dataclasses.replace(
            self.config, train=dataclasses.replace(self.config.train, output_dir=str(self.output))
        )

    def _built(self, names: list[str], masters: torch.dtype) -> tuple[nn.Module, Fill]:
        config = self.config
        inputs, seed = self.inputs, config.train.seed
        return build_model(inputs.weights, config.model, config.finetune, inputs.target, names, seed, self.dtype, masters)

    def _rank(self) -> None:
        """Let the data choose among the decoder layers, on a model that is built for this alone."""
        config, inputs = self.config, self.inputs
        partial = config.finetune.partial
        with self.world.together():
            layers = trained_names(
                dataclasses.replace(config.finetune, partial=PartialConfig(train=("layers.*",))), inputs.base, inputs.target
            )
            names = [name for name in layers if layer_of(name) is not None]
            model, fill = self._built(names, frozen_dtype(config.model, self.dtype))
        placed = place_model(model, config.parallel, self.world, fill)
        plan = dataclasses.replace(inputs.plan, grad_accum=1)
        self.ranking = rank_layers(placed, inputs.data, plan, self.world, partial)
        self.tell(f"{partial.select}, from {partial.probe_batches} batches of {plan.global_batch} samples:")
        self.tell(show_ranking(self.ranking))
        del model, placed
        gc.collect()  # a sharded model refers to itself, and the one to be trained is built next

    def wrap(self) -> None:
        """Shard, build the optimizer, resume; from here on the model belongs to all processes together."""
        method, inputs = self.config.finetune.method, self.inputs
        self.trainable, self.total = count_parameters(self.model)
        share = 100 * self.trainable / self.total
        self.tell(f"{method}: {self.trainable:,} of {self.total:,} parameters train ({share:.2f} %)")
        self.tell("" if method == "full" else trainable_table(self.model))
        if self.world.size > 1:
            self.tell(f"{self.world.size} processes:\n{self.world.table()}")
        adapters = getattr(self.model, "adapters", None)
        adapter = next(iter(adapters.configs.values())) if adapters else None
        self.artefact = Artefact(self.config, inputs.target, inputs.weights, adapter, inputs.tokenizer, self.output, self.world)
        self.features = self._train_on_features() if self.config.finetune.caches_features else ""
        self._spread()
        self.checksum = frozen_checksum(self.model_wrapped, self.world)
        self.unfreezing = Unfreezing(self.model_wrapped, self.config.finetune.partial.unfreeze_every, inputs.target.ties_head)
        self.checkpoints = Checkpoints(
            self.config.checkpoint, self.output / "checkpoints", self.world, self.model_wrapped, self.optimizer, self.scaler,
            self._identity(), self.tell,
        )  # fmt: skip
        self.first_step = self._resume()
        self._open_output()
        threads = f", {torch.get_num_threads()} threads" if self.world.device.type == "cpu" else ""
        self.tell(
            f"{self.world.device.type}{threads}, strategy {self.strategy}, {str(self.dtype).removeprefix('torch.')}:"
            f" {inputs.total_steps:,} steps of {inputs.plan.global_batch} samples, into {self.output}"
        )
        if every := self.config.finetune.partial.unfreeze_every:
            reached = min(self.unfreezing.count, 1 + (inputs.total_steps - 1) // every)
            self.tell(f"gradual unfreezing: {reached} of {self.unfreezing.count} stages, one every {every} steps, from the top")

    def _spread(self) -> None:
        """Wrap, and prove that each process holds what the arithmetic says."""
        parallel, world = self.config.parallel, self.world
        self.strategy = chosen_strategy(parallel, world.size)
        shards = replicas_and_shards(parallel, world.size, world.local_size)[1]
        rows = shares(self.model, shards, self.strategy == "fsdp2", world.rank % shards, parallel.compile)
        self.model_wrapped, self.optimizer = wrap_model(self.model, parallel, self.config.optim, world, self.fill)
        self.scaler = LossScaler(self.precision.scales_loss)
        expected, counted = total_bytes(rows)[0], held_bytes(self.model_wrapped)
        if counted != expected:
            raise RuntimeError(f"rank {world.rank} holds {counted:,} bytes of parameters, by the arithmetic {expected:,}")
        if self.strategy != "none":
            copies = f", {world.size // shards} copies of the model" if shards < world.size else ""
            self.tell(f"{self.strategy} over {shards} processes{copies}; rank 0 holds of each unit:\n{table(rows)}")

    def _train_on_features(self) -> str:
        """Put the frozen backbone's features in the place of texts; return what identifies them. A setting may forbid it."""
        inputs, model = self.inputs, self.model
        if self.config.finetune.head.feature_cache == "none":
            return ""
        self.fill(model)  # what identifies the features is a hash of all weights
        assert isinstance(model, Llama)
        assert isinstance(inputs.data, ClassificationDataset)
        directory, digest = cache_directory(self.config.finetune.head.feature_cache), backbone_digest(model.model)
        placed: list[nn.Module] = []

        def backbone() -> nn.Module:
            if not placed:
                placed.append(place_model(model.model, self.config.parallel, self.world))
            return placed[0]

        def featured(data: ClassificationDataset) -> ClassificationDataset:
            shape = inputs.target.hidden_size, self.dtype
            return with_features(data, file_of(directory, digest, data), shape, backbone, self.world, self.tell)

        inputs.data = featured(inputs.data)
        if isinstance(inputs.held_out, ClassificationDataset):
            inputs.held_out = featured(inputs.held_out)
        self.model = HeadOnly(model.score)  # the backbone's memory is free from here on
        return digest

    def _open_output(self) -> None:
        """Rehearse what the user keeps, and only then put this run in the place of what its directory may hold."""
        saved, steps = self.output / "checkpoints", self.inputs.total_steps
        evaluations = (steps - 1) // self.config.train.eval_every if self.config.train.eval_every else 0
        with self._writing():
            self.output.mkdir(parents=True, exist_ok=True)
            if self.world.rank == 0:
                self.artefact.check_room(room_for(self.config.checkpoint, saved, self.trainable, steps, evaluations))
        if self.first_step == 0:
            with self._writing():
                seconds = self.artefact.rehearse(self.model_wrapped)
            if seconds > 5:
                self.tell(f"rehearsed saving: {self.artefact.expected_bytes / 1e9:.2f} GB in {seconds:.0f} s")
        with self._writing():
            self.metrics = Metrics(self.output / "metrics.jsonl", self.world.rank == 0, self.first_step)
            if self.world.rank == 0:
                text = write_toml(self.config, "torchrun -m fsdp_train.main --config config.toml")
                write_whole(self.output / "config.toml", text)
                for path in drop_later(saved, self.first_step):
                    self.tell(f"removed {path}: it is beyond step {self.first_step}, where this run starts")
                if self.ranking:
                    save_ranking(self.ranking, self.output)
        with self._writing():
            if not (self.output / "config.toml").is_file():
                raise InputError(
                    f"--train.output_dir {self.output}: what rank 0 writes there, rank {self.world.rank} on"
                    f" {socket.gethostname()} does not see; give a directory on a file system that all hosts share"
                )

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An error on any process is raised on all; a directory that was made for nothing is removed."""
        try:
            with self.world.together():
                try:
                    yield
                except OSError as error:
                    raise InputError(f"--train.output_dir {self.output} cannot be written: {error.strerror}") from None
        except InputError:
            if self.world.rank == 0 and self.output.is_dir() and not any(self.output.iterdir()):
                self.output.rmdir()
            raise

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint and the run that continues it must have in common."""
        train, finetune = self.config.train, values_of(self.config.finetune)
        return {
            "architecture": str(self.inputs.target),
            "frozen weights": self.features or self.checksum,
            "finetune": {name: str(value) for name, value in finetune.items() if name != "head.feature_cache"},
            "data": data_fingerprint(self.inputs.data),
            "optim": {name: str(value) for name, value in values_of(self.config.optim).items()},
            "order": [train.seed, self.config.data.shuffle, self.config.data.packing],
            "batch": self.inputs.plan.global_batch,
            "precision": str(self.dtype),
        }

    def _resume(self) -> int:
        step = self.checkpoints.resume()
        if step > self.inputs.total_steps:
            raise InputError(f"{self.output} has {step} steps done, this run ends at {self.inputs.total_steps}")
        return step

    # --- training and measuring -----------------------------------------------------------------------------------------

    def measure(self, moment: str) -> Measures:
        """Held-out metrics, exact matches and sample answers, "before" or "after"; a resumed run has no before."""
        if moment == "before" and self.first_step:
            return {}
        found = measure(self.model_wrapped, self.inputs, self.config.train, self.world, moment, self.tell)
        if found:
            self.metrics.write(step=0 if moment == "before" else self.inputs.total_steps, **found)
            self.tell(f"{moment} training: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
        return found

    def train(self) -> None:
        """All steps that are left, with evaluation and checkpoints on the way."""
        train, every, steps = self.config.train, self.config.checkpoint.every, self.inputs.total_steps

        def evaluates(done: int) -> bool:
            return bool(train.eval_every) and done % train.eval_every == 0 and done < steps

        def saves(done: int) -> bool:
            return bool(every) and (done % every == 0 or done == steps)

        def after_step(done: int, asked: bool) -> None:
            loss = None
            if evaluates(done):
                found = held_out_metrics(self.model_wrapped, self.inputs.held_out, train.batch_size, self.world)
                self.metrics.write(step=done, **found)
                self.tell(f"step {done}: " + ", ".join(f"{name} {value:.4f}" for name, value in found.items()))
                loss = found["eval_loss"]
            if asked or saves(done) or (every and self.checkpoints.is_best(loss)):
                self.checkpoints.save(done, loss)

        if self.config.parallel.compile:
            self.tell("compiling: steps with a new shape take longer, the first one most")
        self.world.barrier("before the first step")
        with Signals(lambda: self.checkpoints.failed) as signals:
            try:
                fit(
                    self.model_wrapped, self.optimizer, self.inputs.data, self.inputs.plan, self.config.optim, self.world,
                    range(self.first_step, steps), self.metrics, self.config.log.every, self.unfreezing.before_step, after_step,
                    lambda done: evaluates(done) or saves(done), self.scaler, self.config.parallel.no_sync, signals,
                )  # fmt: skip
            except Stopped:
                self.checkpoints.finish()
                raise
            finally:
                self.checkpoints.settle()
        self.unfreezing.finish()

    # --- what the user keeps --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `adapter/` (PEFT) or `model/` (Hugging Face), read back and compared before it gets its name."""
        if frozen_checksum(self.model_wrapped, self.world) != self.checksum:
            raise RuntimeError("frozen weights changed during training; nothing is saved")
        self.bytes = self.artefact.write(self.model_wrapped)
        self.checkpoints.finish()

    def sum_up(self, before: Measures, after: Measures, seconds: float) -> None:
        """Tell what changed, what did not, where it is, and what to type next."""
        lines = [""]
        for name, new in after.items():
            old = f"{before[name]:.4f} before, " if name in before else ""
            lines.append(f"held-out {name}: {old}{new:.4f} after")
        if self.is_adapter:
            lines.append(f"base weights: unchanged (checksum {self.checksum} before and after)")
        elif self.trainable < self.total:
            lines.append("frozen weights: unchanged, copied from the base's files")
        lines.append(f"saved: {self.artefact.path} ({self.bytes / 1e6:.2f} MB, {self.trainable:,} trained parameters)")
        lines.append(f"time: {seconds:.0f} s, peak memory {peak_memory(self.world.device) / 1e9:.2f} GB per process")
        self.tell("\n".join(lines + next_commands(self.config, self.inputs, self.artefact.path)))
