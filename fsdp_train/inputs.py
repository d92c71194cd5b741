"""Everything that a run reads, checked before anything is built: tokenizer, configuration of the base, data, order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fsdp_train.build import check_tokenizer, load_tokenizer
from fsdp_train.classification import ClassificationDataset, LabelSpace, load_classification
from fsdp_train.config import RunConfig
from fsdp_train.data import Dataset, load_dataset
from fsdp_train.heads import known_labels, labels_of_adapter, wanted
from fsdp_train.order import Plan
from fsdp_train.packing import packed
from fsdp_train.world import World
from llama import PRESETS, LlamaConfig, Tokenizer
from llama.errors import InputError
from llama.weight_files import Weights, open_weights


@dataclass
class Inputs:
    """What was read.

    Attributes:
        weights: the base's files; None for random weights.
        base: the base's configuration, and `target`: with the head that is to be trained.
        held_out: data for evaluation; None without any.
        plan: which samples (rows of them, where they are packed) this process sees in each of the `total_steps`.
    """

    tokenizer: Tokenizer | None
    weights: Weights | None
    base: LlamaConfig
    target: LlamaConfig
    data: Dataset
    held_out: Dataset | None
    plan: Plan
    total_steps: int

    @property
    def asked(self) -> Dataset:
        """What the samples shown and counted before and after are taken from."""
        return self.held_out or self.data


def read_inputs(config: RunConfig, world: World, tell: Callable[[str], None]) -> Inputs:
    """Read and check all of it.

    Raises:
        InputError: whatever is wrong, with file, line, key, and what was expected.
    """
    data, train = config.data, config.train
    tokenizer = load_tokenizer(config.model)
    weights = None if config.model.preset else open_weights(config.model.path)
    base = weights.config if weights is not None else PRESETS[config.model.preset]
    tell(check_tokenizer(tokenizer, base.vocab_size))
    length = data.max_length or base.max_position_embeddings
    if length > base.max_position_embeddings:
        raise InputError(f"--data.max_length {length} is beyond the model's context of {base.max_position_embeddings}")
    head = config.finetune.head
    known = known_labels(base, head)
    number = head.num_labels
    if config.finetune.from_adapter and head.kind == "classification":
        known, number, note = labels_of_adapter(config.finetune.from_adapter, base, number)
        tell(note)

    def load(path: str, space: LabelSpace | None) -> Dataset:
        if head.kind == "classification":
            dataset: Dataset = load_classification(path, tokenizer, length, space, number)
        else:
            dataset = load_dataset(path, data.format, tokenizer, base.vocab_size, length)
        tell(dataset.report())
        return dataset

    samples, held_out = load(data.path, known), None
    space = samples.space if isinstance(samples, ClassificationDataset) else None
    if data.eval_path:
        held_out = load(data.eval_path, space)
    elif data.eval_fraction:
        count = max(1, round(data.eval_fraction * len(samples.samples)))
        if count >= len(samples.samples):
            raise InputError(
                f"--data.eval_fraction {data.eval_fraction} of {len(samples.samples)} samples leaves none to train on"
            )
        samples, held_out = samples.without(count, train.seed)
        tell(f"  held out: {count:,} samples")
    if train.exact_match and tokenizer is None:
        raise InputError("--train.exact_match compares texts; give --model.tokenizer")
    if data.packing:
        samples = packed(samples, length)
        held_out = packed(held_out, length) if held_out is not None else None
        tell(samples.packing_report())
    plan = Plan(
        len(samples), train.batch_size, train.grad_accum, world.size, world.rank, train.seed, data.shuffle,
        samples.lengths(),
    )  # fmt: skip
    total_steps = train.max_steps or (train.epochs or 1) * plan.steps_per_epoch
    if config.optim.warmup_steps >= total_steps:
        steps = config.optim.warmup_steps
        tell(f"note: --optim.warmup_steps {steps}: the run ends after {total_steps:,} steps, still warming up")
    tell(_first_sample(samples, tokenizer))
    target = wanted(base, head, space, config.finetune.method == "head")
    return Inputs(tokenizer, weights, base, target, samples, held_out, plan, total_steps)


def _first_sample(data: Dataset, tokenizer: Tokenizer | None) -> str:
    """The seam between what is given and what is learned, as the model will see it."""
    sample = data.samples[0]
    if tokenizer is None:
        return ""
    prompt = tokenizer.show(sample.ids[: sample.prompt].tolist())
    if isinstance(data, ClassificationDataset):
        learned = data.reference(0)
    else:
        learned = tokenizer.show(sample.ids[sample.prompt :].tolist())
    return (
        f"  first sample, given:   {'...' * (len(prompt) > 90)}{prompt[-90:]!r}\n"
        f"  first sample, learned: {learned[:90]!r}{'...' * (len(learned) > 90)}"
    )
