"""The settings that are combined, what the program refuses of it by design, and the rows that hold all the rest.

A row has a value of each setting. All pairs of values stand in some row, and all triples of those settings in `CORE`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

from tests.combinations.covering import Part, Row, covering, parts, parts_of

LORA, PREFIX, PROMPT = "--finetune.lora.", "--finetune.prefix.", "--finetune.llama_adapter."
PARTIAL, HEAD = "--finetune.partial.", "--finetune.head."
METHOD, STRATEGY = "--finetune.method", "--parallel.strategy"
SHARDING, REPLICAS = "--parallel.sharding", "--parallel.replicas"
CLASSIFIER = (HEAD + "kind", "classification")
LAYERS = 3  # of the base

Values = dict[str, tuple[str, ...]]  # a setting's values, and the flags of each

SETTINGS: dict[str, Values] = {
    "method": {
        "lora": (),
        "rsLoRA": (LORA + "use_rslora", "true"),
        "DoRA": (LORA + "use_dora", "true"),
        "lora, classifier": CLASSIFIER,
        "llama_adapter": (METHOD, "llama_adapter", PROMPT + "adapter_layers", "2"),
        "llama_adapter, tanh gate per head": (
            *(METHOD, "llama_adapter", PROMPT + "adapter_layers", "2"),
            *(PROMPT + "gate", "head", PROMPT + "gate_activation", "tanh"),
        ),
        "prefix": (METHOD, "prefix", PREFIX + "num_virtual_tokens", "5"),
        "prefix, projected": (
            *(METHOD, "prefix", PREFIX + "num_virtual_tokens", "5"),
            *(PREFIX + "prefix_projection", "true"),
        ),
        "full": (METHOD, "full"),
        "full, classifier": (METHOD, "full", *CLASSIFIER, HEAD + "hidden", "16"),
        "partial": (METHOD, "partial", PARTIAL + "train", "attention,norms"),
        "partial by gradient": (
            *(METHOD, "partial", PARTIAL + "select", "gradient_norm:2"),
            *(PARTIAL + "probe_batches", "2"),
        ),
        "partial, gradual": (
            *(METHOD, "partial", PARTIAL + "train", f"last:{LAYERS}"),
            *(PARTIAL + "unfreeze_every", "1"),
        ),
        "head": (METHOD, "head", HEAD + "hidden", "16"),
        "head, classifier": (METHOD, "head", *CLASSIFIER, HEAD + "hidden", "16"),
    },
    "strategy": {
        "none": (STRATEGY, "none"),
        "ddp": (STRATEGY, "ddp"),
        "fsdp": (STRATEGY, "fsdp"),
        "fsdp, shard_grad_op": (STRATEGY, "fsdp", SHARDING, "shard_grad_op"),
        "fsdp, no_shard": (STRATEGY, "fsdp", SHARDING, "no_shard"),
        "fsdp2": (STRATEGY, "fsdp2"),
        "fsdp2, shard_grad_op": (STRATEGY, "fsdp2", SHARDING, "shard_grad_op"),
        "fsdp2, 2 replicas": (STRATEGY, "fsdp2", REPLICAS, "2"),
        "hsdp": (STRATEGY, "hsdp", REPLICAS, "2"),
    },
    "processes": {"1": (), "2": (), "4": ()},
    "precision": {name: ("--parallel.precision", name) for name in ("fp32", "bf16", "fp16")},
    "checkpointing": {
        kind: ("--parallel.activation_checkpointing", kind)
        for kind in ("none", "full", "selective", "offload")
    },
    "compile": {"no": (), "yes": ("--parallel.compile", "true")},
    "packing": {"no": (), "yes": ("--data.packing", "true")},
    "samples": {"divide": (), "left over": ()},
    "batch_size": {size: ("--train.batch_size", size) for size in ("2", "3")},
    "grad_accum": {count: ("--train.grad_accum", count) for count in ("1", "2")},
    "no_sync": {"no": (), "yes": ("--parallel.no_sync", "true")},
    "dropout": {"0": (), "0.2": (LORA + "lora_dropout", "0.2")},
    "heads": {"apart": (), "tied": ()},
    "attention": {"MHA": (), "GQA": (), "MQA": ()},
    "from_adapter": {"no": (), "yes": ()},
    "modules_to_save": {
        "none": (),
        "norm": (LORA + "modules_to_save", "norm"),
        "lm_head": (LORA + "modules_to_save", "lm_head"),
        "embed_tokens, lm_head": (LORA + "modules_to_save", "embed_tokens,lm_head"),
    },
    "patterns": {
        "none": (),
        "rank, alpha": (
            *(LORA + "rank_pattern", "v_proj=4"),
            *(LORA + "alpha_pattern", "layers.0.self_attn.q_proj=4"),
        ),
    },
    "layers": {"all": (), "0 and 2": (LORA + "layers_to_transform", "0,2")},
    "in_backward": {"no": (), "yes": ("--parallel.optimizer_in_backward", "true", "--optim.grad_clip", "0")},
    "keep_last_layer": {"no": (), "yes": ("--parallel.keep_last_layer", "true")},
    "reshard_to": {"all": (), "2": ("--parallel.reshard_to", "2")},
    "cpu_offload": {"no": (), "yes": ("--parallel.cpu_offload", "true")},
    "shuffle": {"no": ("--data.shuffle", "false"), "yes": ("--data.shuffle", "true")},
    "evaluation": {
        "no": (),
        "losses": ("--train.eval_every", "1"),
        "and answers": ("--train.eval_every", "1", "--train.exact_match", "2"),
    },
    "resumed": {"no": (), "yes": ()},
}  # fmt: skip
CORE = ("method", "strategy", "precision", "grad_accum", "resumed")
COSTLY = {"compile": "yes", "processes": "4"}  # taken only where nothing else covers as much

METHODS, STRATEGIES = tuple(SETTINGS["method"]), tuple(SETTINGS["strategy"])
LORAS = METHODS[:4]
ADAPTERS = METHODS[:8]
CLASSIFIERS = tuple(method for method in METHODS if method.endswith("classifier"))


def _but(all_values: tuple[str, ...], *left_out: str) -> tuple[str, ...]:
    return tuple(value for value in all_values if value not in left_out)


@dataclass(frozen=True)
class Refusal:
    """Values of two settings that the program refuses beside each other, and what it says then.

    Attributes:
        beside: values of other settings, without which something else would be refused first.
        of_the_base: whether that takes a look at the base's modules.
    """

    one: tuple[str, tuple[str, ...]]
    other: tuple[str, tuple[str, ...]]
    reason: str
    beside: tuple[tuple[str, str], ...] = ()
    of_the_base: bool = False

    def forbids(self, row: Row) -> bool:
        return row.get(self.one[0]) in self.one[1] and row.get(self.other[0]) in self.other[1]


FULL_SHARD = ("fsdp", "fsdp2", "fsdp2, 2 replicas", "hsdp")
FSDP2 = ("fsdp2", "fsdp2, shard_grad_op", "fsdp2, 2 replicas")
FOUR = (("processes", "4"),)
REFUSALS = [
    Refusal(("strategy", ("none",)), ("processes", ("2", "4")), "would train . models apart"),
    Refusal(("strategy", ("hsdp",)), ("processes", ("1",)), "does not divide 1 processes"),
    Refusal(("strategy", ("hsdp",)), ("processes", ("2",)), "one to a replica is --parallel.strategy ddp"),
    Refusal(("strategy", ("fsdp2, 2 replicas",)), ("processes", ("1",)), "does not divide 1 processes"),
    Refusal(
        ("compile", ("yes",)),
        ("strategy", ("fsdp", "fsdp, shard_grad_op", "fsdp, no_shard", "hsdp")),
        "torch compiles FullyShardedDataParallel only with use_orig_params",
    ),
    Refusal(("compile", ("yes",)), ("checkpointing", ("offload",)), "compiled layers keep what they store"),
    Refusal(("no_sync", ("yes",)), ("strategy", ("none",)), "goes with --parallel.strategy ddp"),
    Refusal(("no_sync", ("yes",)), ("grad_accum", ("1",)), "--train.grad_accum is 1", (("strategy", "ddp"),)),
    Refusal(("in_backward", ("yes",)), ("method", _but(METHODS, "full", "full, classifier")), "needs --finetune.method full"),
    Refusal(("in_backward", ("yes",)), ("grad_accum", ("2",)), "needs --train.grad_accum 1", (("method", "full"),)),
    Refusal(("in_backward", ("yes",)), ("precision", ("fp16",)), "fp16 must see all gradients", (("method", "full"),)),
    Refusal(
        ("in_backward", ("yes",)),
        ("strategy", _but(STRATEGIES, "none", *FSDP2)),
        "the others add up gradients over processes only after a whole bucket or unit",
        (("method", "full"),),
    ),
    Refusal(("keep_last_layer", ("yes",)), ("strategy", ("none", "ddp")), "goes with --parallel.strategy fsdp"),
    Refusal(
        ("keep_last_layer", ("yes",)),
        ("strategy", ("fsdp, shard_grad_op", "fsdp, no_shard", "fsdp2, shard_grad_op")),
        "nothing is spread after forward",
    ),
    Refusal(
        ("reshard_to", ("2",)),
        ("strategy", _but(STRATEGIES, *FSDP2)),
        "goes with --parallel.strategy fsdp2",
        FOUR,
    ),
    Refusal(("reshard_to", ("2",)), ("strategy", ("fsdp2, shard_grad_op",)), "nothing is spread after forward", FOUR),
    Refusal(("reshard_to", ("2",)), ("strategy", ("fsdp2, 2 replicas",)), "expected a divisor of 2", FOUR),
    Refusal(("reshard_to", ("2",)), ("processes", ("1", "2")), "expected a divisor of", (("strategy", "fsdp2"),)),
    Refusal(("cpu_offload", ("yes",)), ("strategy", ("none", "ddp")), "goes with --parallel.strategy fsdp"),
    Refusal(
        ("method", ("partial, gradual",)),
        ("strategy", ("ddp", *FSDP2)),
        "which settles once what trains",
        (("processes", "2"),),
    ),
    Refusal(("packing", ("yes",)), ("method", CLASSIFIERS), "a classifier looks at the end of each row"),
    Refusal(("evaluation", ("and answers",)), ("method", CLASSIFIERS), "which a classifier does not give"),
    Refusal(("dropout", ("0.2",)), ("method", _but(METHODS, *LORAS)), "which does not use it"),
    Refusal(("patterns", ("rank, alpha",)), ("method", _but(METHODS, *LORAS)), "which does not use it"),
    Refusal(("layers", ("0 and 2",)), ("method", _but(METHODS, *LORAS)), "which does not use it"),
    Refusal(
        ("modules_to_save", _but(tuple(SETTINGS["modules_to_save"]), "none")),
        ("method", _but(METHODS, *LORAS)),
        "which does not use it",
    ),
    Refusal(
        ("modules_to_save", ("lm_head", "embed_tokens, lm_head")),
        ("method", ("lora, classifier",)),
        "'lm_head' matches no module",
        of_the_base=True,
    ),
    Refusal(("from_adapter", ("yes",)), ("method", _but(METHODS, *ADAPTERS)), "goes with --finetune.method lora or"),
    Refusal(("from_adapter", ("yes",)), ("method", ("prefix, projected",)), "prefix_projection true, but the adapter"),
]  # fmt: skip
NEEDS_A_GPU = [  # values that a machine without one refuses beside anything
    ("checkpointing", "offload", "here is no GPU"),
    ("cpu_offload", "yes", "here there is no GPU"),
]


def here() -> dict[str, list[str]]:
    """The values of each setting that this machine can run."""
    absent = [] if torch.cuda.is_available() else [(name, value) for name, value, _ in NEEDS_A_GPU]
    return {name: [v for v in values if (name, v) not in absent] for name, values in SETTINGS.items()}


def allows(row: Row) -> bool:
    """Whether no two settings of it, which may be only some, are refused beside each other."""
    return not any(refusal.forbids(row) for refusal in REFUSALS)


@lru_cache(maxsize=1)
def all_rows() -> tuple[list[Row], list[Part]]:
    """The array, and the pairs and triples that no row can hold: what they need of a third setting is refused."""
    return covering(here(), CORE, allows, costly=COSTLY)


FAST = 50  # seconds of the rows that the suite runs, about
COST = {"1": 0.5, "2": 0.7, "4": 3.0}  # of a row, in seconds, about, by processes


def fast_rows() -> list[int]:
    """The numbers of the rows that the suite runs: without the code generator, those that hold most pairs in a second."""
    rows = all_rows()[0]
    left = [number for number, row in enumerate(rows) if row["compile"] == "no"]
    missing = set(parts(here(), ()))
    chosen: list[int] = []
    seconds = 0.0
    while seconds < FAST:
        new = {number: sum(part in missing for part in parts_of(rows[number], ())) for number in left}
        best = max(left, key=lambda number: new[number] / COST[rows[number]["processes"]])
        left.remove(best)
        chosen.append(best)
        seconds += COST[rows[best]["processes"]]
        missing -= set(parts_of(rows[best], ()))
    return sorted(chosen)
