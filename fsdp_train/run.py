"""One run, step by step: prepare, wrap, measure, train, save, measure again, sum up."""

from __future__ import annotations

import dataclasses
import gc
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fsdp_train.artefact import Artefact
from fsdp_train.build import ADAPTER_METHODS, build_model, frozen_dtype, trained_names, wrap_model
from fsdp_train.checkpoint import Checkpoints, Progress, room_for
from fsdp_train.checkpoint_files import checkpoints, state_of
from fsdp_train.classification import ClassificationDataset
from fsdp_train.config import RunConfig
from fsdp_train.features import HeadOnly, backbone_digest, cache_directory, file_of, with_features
from fsdp_train.identity import identity_of
from fsdp_train.inputs import read_inputs
from fsdp_train.log import Metrics, peak_memory, say, write_whole
from fsdp_train.measure import held_out_metrics, measure
from fsdp_train.optim import LossScaler, learning_rate
from fsdp_train.order import Position
from fsdp_train.output import next_commands
from fsdp_train.parallel import Fill, frozen_checksum, held_bytes, place_model
from fsdp_train.partial import PartialConfig, RankedLayer, Unfreezing, rank_layers, save_ranking, show_ranking
from fsdp_train.record import Facts, config_toml
from fsdp_train.run_directory import (
    CHECKPOINTS,
    Beginning,
    RunDirectory,
    beginning_of,
    belongings,
    command_of,
    remove_litter,
    set_aside,
)
from fsdp_train.run_lock import PATIENCE
from fsdp_train.settings import as_text, values_of
from fsdp_train.signals import Signals, Stopped
from fsdp_train.step import NonFiniteError
from fsdp_train.strategy import SHARDED, chosen_strategy, dtype_name, precision_of, replicas_and_shards
from fsdp_train.train import fit
from fsdp_train.units import shares, table, total_bytes
from fsdp_train.world import World
from llama import Llama
from llama.errors import InputError, listing
from llama.files import cannot_write
from peft_impl import count_parameters, trainable_table
from peft_impl.freeze import layer_of

Measures = dict[str, float]


class Run:
    """State of one run. Every method is called on every process, in the order of this file."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.asked = config  # before anything is chosen: what config.toml says
        self.is_adapter = config.finetune.method in ADAPTER_METHODS
        self.precision = precision_of(config.parallel, world.device)
        self.dtype = self.precision.param
        self.ranking: list[RankedLayer] = []
        self.directory: RunDirectory | None = None  # rank 0's

    def tell(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.rank == 0 and text:
            say(text)

    # --- before the first step ------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Check and read everything. An error on any process becomes the same error on all, before anything is written."""
        self.command = command_of(self.config)
        found: tuple[Path, Beginning] | None = None
        with self.world.together():
            if self.world.rank == 0:
                wait = min(PATIENCE, self.world.timeout / 2)  # the others are waiting for this one
                self.directory = RunDirectory(self.config, wait, self.tell)
                output = self.directory.path
                found = output, beginning_of(self.config, output, self.command)
        first = self.world.gather(found)[0]
        assert first is not None
        self.output, self.beginning = first
        finetune = self.config.finetune
        with self.world.together():
            self.inputs = read_inputs(self.config, self.world, self.tell)
            trained_names(finetune, self.inputs.base, self.inputs.target)  # names that match nothing end the run here
        if finetune.partial.select:
            self._choose_layers()
        chosen = [row.layer for row in self.ranking if row.trains]
        with self.world.together():
            self.trained = trained_names(finetune, self.inputs.base, self.inputs.target, chosen)
            self.model, self.fill = self._built(self.trained, torch.float32)
        self.config = dataclasses.replace(
            self.config, train=dataclasses.replace(self.config.train, output_dir=str(self.output))
        )

    def close(self) -> None:
        """Let another run use the directory; all processes may call it at any time."""
        if self.directory is not None:
            self.directory.close()

    def _built(self, names: list[str], masters: torch.dtype) -> tuple[nn.Module, Fill]:
        config = self.config
        inputs, seed = self.inputs, config.train.seed
        return build_model(inputs.weights, config.model, config.finetune, inputs.target, names, seed, self.dtype, masters)

    def _choose_layers(self) -> None:
        """The decoder layers that train: as chosen when the run began, or by the data now."""
        stored: list[dict[str, Any]] = []
        if self.world.rank == 0:
            for path in self.beginning.candidates:
                with suppress(InputError):  # a damaged one is told of when it is passed over
                    stored = state_of(path)["ranking"]
                    break
        self.ranking = [RankedLayer(**row) for row in self.world.gather(stored)[0]]
        if not self.ranking:
            self._rank()
            return
        self.tell(f"{self.config.finetune.partial.select}, as ranked when the run began:")
        self.tell(show_ranking(self.ranking))

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
        self.artefact = Artefact(
            self.config, inputs.target, inputs.weights, self.model, inputs.tokenizer, self.output, self.world
        )
        self.tell(self.artefact.size_note())
        self.frozen_identity = ""
        if self.config.finetune.caches_features:
            self._train_on_features()
        self._spread()
        self.checksum = frozen_checksum(self.model_wrapped, self.world)
        self.frozen_identity = self.frozen_identity or self.checksum
        self.unfreezing = Unfreezing(self.model_wrapped, self.config.finetune.partial.unfreeze_every, inputs.target.ties_head)
        facts = {
            "command": self.command,
            "ranking": [dataclasses.asdict(row) for row in self.ranking],
        }
        settings = self._settings()
        self.checkpoints = Checkpoints(
            self.config.checkpoint, self.output / CHECKPOINTS, self.world, self.model_wrapped, self.optimizer, self.scaler,
            self._may_write, self._identity(settings), facts, settings, self.tell,
        )  # fmt: skip
        self._resume()
        self._open_output()
        threads = f", {torch.get_num_threads()} threads" if self.world.device.type == "cpu" else ""
        self.tell(
            f"{self.world.device.type}{threads}, strategy {self.strategy}, {str(self.dtype).removeprefix('torch.')}:"
            f" {inputs.total_steps - self.first_step:,} steps of {inputs.plan.global_batch} samples, into {self.output}"
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

    def _train_on_features(self) -> None:
        """Put the frozen backbone's features in the place of texts. A setting may forbid it."""
        inputs, model = self.inputs, self.model
        if self.config.finetune.head.feature_cache == "none":
            return
        self.fill(model)  # what identifies the features is a hash of all weights
        self.frozen_identity = frozen_checksum(model, self.world)  # as of a run that has no cache
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

    def _open_output(self) -> None:
        """Rehearse what the user keeps, and only then put this run in the place of what its directory may hold."""
        saved, steps = self.output / CHECKPOINTS, self.inputs.total_steps
        evaluations = (steps - 1) // self.config.train.eval_every if self.config.train.eval_every else 0
        with self._writing():
            if self.world.rank == 0:
                self.tell(remove_litter(self.output))
                present = 0 if self.beginning.replaces else len(checkpoints(saved))
                self.artefact.check_room(room_for(self.config.checkpoint, present, self.trainable, steps, evaluations))
        if self.first_step == 0 or not self.beginning.own:
            with self._writing():
                seconds = self.artefact.rehearse(self.model_wrapped)
            if seconds > 5:
                self.tell(f"rehearsed saving: {self.artefact.expected_bytes / 1e9:.2f} GB in {seconds:.0f} s")
        with self._writing():
            if self.world.rank == 0:
                chosen = self.dtype, self.output, self.first_step, self.ranking
                settings = config_toml(self.asked, Facts(self.inputs, self.world, *chosen))
                self._set_aside_what_is_not_used(settings)
                self.checkpoints.remove_old()  # which a start that ended between writing and removing has left
            self.metrics = Metrics(self.output / "metrics.jsonl", self.world.rank == 0, self.first_step)
            if self.world.rank == 0:
                write_whole(self.output / "config.toml", settings)
                if self.ranking:
                    save_ranking(self.ranking, self.output)
        with self._writing():
            if not (self.output / "config.toml").is_file():
                raise InputError(
                    f"--train.output_dir {self.output}: what rank 0 writes there, rank {self.world.rank} on"
                    f" {socket.gethostname()} does not see; give a directory on a file system that all hosts share"
                )

    def _set_aside_what_is_not_used(self, settings: str) -> None:
        """What another run left, if this one replaces it; and checkpoints that cannot be used.

        Args:
            settings: the text of this run's config.toml.
        """
        kept = self.output / "config.toml"
        # A run that ended before its first checkpoint leaves its metrics; by the same settings they come again.
        is_other = kept.is_file() and kept.read_text(encoding="utf-8") != settings
        if self.beginning.replaces or (not self.beginning.own and is_other):
            unused = belongings(self.output)
        else:
            usable = set(checkpoints(self.output / CHECKPOINTS)) - set(self.damaged)
            named = (self.output / CHECKPOINTS).glob("step_*")
            unused = [path for path in named if path not in usable]
        if unused:
            place = set_aside(self.output, unused)
            names = ", ".join(str(path.relative_to(self.output)) for path in unused)
            self.tell(f"moved to {place}: {names}")

    def _may_write(self) -> None:
        if self.directory is not None:
            self.directory.lock.check()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """An error on any process is raised on all."""
        with self.world.together():
            try:
                yield
            except OSError as error:
                raise InputError(f"--train.output_dir {cannot_write(self.output, error)}") from None

    def _settings(self) -> dict[str, str]:
        """All settings as text, by name."""
        return {name: as_text(value) for name, value in values_of(self.config).items()}

    def _identity(self, settings: dict[str, str]) -> dict[str, str]:
        """What a checkpoint and the run that continues it must have in common."""
        parallel = self.config.parallel
        precision = {
            "parallel.precision": dtype_name(self.dtype),
            "parallel.reduce_dtype": parallel.reduce_dtype if self.strategy in SHARDED else "fp32",
        }
        if self.trainable < self.total:
            precision["frozen dtype"] = dtype_name(frozen_dtype(self.config.model, self.dtype))
        return identity_of(
            settings, self.inputs.target, self.artefact.adapter, self.trained, self.frozen_identity,
            self.inputs.data, self.inputs.plan.global_batch, precision,
        )  # fmt: skip

    def _resume(self) -> None:
        """Go on from a checkpoint, if there is one: at which step, and where in the data."""
        self.first_step, self.damaged = 0, []
        resumed = self.checkpoints.resume(self.beginning.candidates)
        if resumed is None:
            return
        inputs, plan = self.inputs, self.inputs.plan
        step, position = resumed.progress.step, resumed.progress.position
        if resumed.samples != plan.samples:  # other data, taken on: no batch of it is cut in two
            consumed = min(position.samples, plan.samples)
            position = Position(position.epoch, consumed // plan.global_batch * plan.global_batch)
        with self.world.together():
            inputs.plan = plan.starting_at(position, step)
        if self.config.train.max_steps is None:
            inputs.total_steps -= inputs.plan.offset  # an end that is counted in passes over the data
        if step > inputs.total_steps:
            raise InputError(f"{self.output} has {step} steps done, this run ends at {inputs.total_steps}")
        self.first_step, self.damaged = step, resumed.damaged
        resume = self.config.checkpoint.resume
        if self.beginning.own and resume not in ("auto", str(resumed.path)):
            self.tell(f"--checkpoint.resume {resume}: not used, the run has checkpoints of its own here")
        self.tell(
            f"resumed from {resumed.path}: {step:,} steps done, {position.samples:,} of {plan.samples:,} samples of"
            f" epoch {position.epoch + 1} consumed, {inputs.total_steps - step:,} steps left"
        )

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
        plan, optim = self.inputs.plan, self.config.optim
        # Where the end is counted in passes over the data, a change of batch changes how many steps a
        # pass has: the rate then follows the share of the data that is consumed.
        offset = plan.offset if train.max_steps is None else 0

        def rate(step: int) -> float:
            return learning_rate(optim, step + offset, steps + offset)

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
                with self.world.together():
                    self._may_write()
                self.checkpoints.save(Progress(done, plan.position(done)), plan.samples, loss)

        if self.config.parallel.compile:
            self.tell("compiling: steps with a new shape take longer, the first one most")
        self.world.barrier("before the first step")
        with Signals(lambda: self.checkpoints.failed or self._lost_its_lock()) as signals:
            try:
                fit(
                    self.model_wrapped, self.optimizer, self.inputs.data, plan, rate, optim.grad_clip, self.world,
                    range(self.first_step, steps), self.metrics, self.config.log.every, self.unfreezing.before_step, after_step,
                    lambda done: evaluates(done) or saves(done), self.scaler, self.config.parallel.no_sync, signals,
                )  # fmt: skip
                self.checkpoints.check_finite(steps)
            except Stopped:
                self.checkpoints.finish()
                raise
            except NonFiniteError as error:
                self.checkpoints.finish()
                raise NonFiniteError(f"{error}\n{self._way_out()}") from None
            finally:
                self.checkpoints.settle()
        self.unfreezing.finish()

    def _lost_its_lock(self) -> bool:
        return self.directory is not None and self.directory.lock.lost

    def _way_out(self) -> str:
        """What is left after a step that is not finite, and what to change. All processes must call it."""
        broken = self.checkpoints.not_finite()
        cause = f"No longer finite, by an update that was too large: {listing(broken, 3)}. " if broken else ""
        whole = checkpoints(self.output / CHECKPOINTS)
        last = f"The last good checkpoint is {whole[-1]}" if whole else "There is no checkpoint before it"
        optim = self.config.optim
        return (
            f"{cause}{last}. Go on with a smaller --optim.lr (is {optim.lr:g}), --optim.weight_decay (is"
            f" {optim.weight_decay:g}) or --optim.grad_clip (is {optim.grad_clip:g}), and --checkpoint.accept_changes optim"
        )

    # --- what the user keeps --------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write `adapter/` (PEFT) or `model/` (Hugging Face), read back and compared before it gets its name."""
        if frozen_checksum(self.model_wrapped, self.world) != self.checksum:
            raise RuntimeError("frozen weights changed during training; nothing is saved")
        with self.world.together():
            self._may_write()
        self.bytes = self.artefact.write(self.model_wrapped)
        self.checkpoints.finish()
        self.artefact.round_as_written(self.model_wrapped)  # no step follows: what is measured next is the file

    def sum_up(self, before: Measures, after: Measures, seconds: float) -> None:
        """Tell what changed, what did not, where it is, and what to type next."""
        lines = [""]
        for name, new in after.items():
            old = f"{before[name]:.4f} before, " if name in before else ""
            lines.append(f"held-out {name}: {old}{new:.4f} after")
        if self.world.rank == 0:
            lines += self.artefact.summary(self.checksum, frozen_dtype(self.config.model, self.dtype))
        lines.append(f"saved: {self.artefact.path} ({self.bytes / 1e6:.2f} MB, {self.trainable:,} trained parameters)")
        lines.append(f"time: {seconds:.0f} s, peak memory {peak_memory(self.world.device) / 1e9:.2f} GB per process")
        self.tell("\n".join(lines + next_commands(self.config, self.inputs, self.artefact.path)))
