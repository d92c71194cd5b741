"""Parameter-efficient fine-tuning on a frozen Llama. Importing a method's file registers it."""

from peft_impl.adapters import add_adapter, remove_adapter, set_adapter
from peft_impl.freeze import count_parameters, select_parameters, train_only, trainable_table
from peft_impl.llama_adapter import LlamaAdapterConfig
from peft_impl.lora import LoraConfig
from peft_impl.merge import MergeReport, merge, merge_and_unload, unmerge
from peft_impl.official_llama_adapter import load_official, to_peft_form
from peft_impl.peft_files import (
    adapter_labels,
    labels_on,
    load_adapter,
    match_head,
    read_adapter,
    read_adapter_config,
    save_adapter,
)
from peft_impl.prefix_tuning import PrefixTuningConfig

__all__ = [
    "LlamaAdapterConfig",
    "LoraConfig",
    "MergeReport",
    "PrefixTuningConfig",
    "adapter_labels",
    "add_adapter",
    "count_parameters",
    "labels_on",
    "load_adapter",
    "load_official",
    "match_head",
    "merge",
    "merge_and_unload",
    "read_adapter",
    "read_adapter_config",
    "remove_adapter",
    "save_adapter",
    "select_parameters",
    "set_adapter",
    "to_peft_form",
    "train_only",
    "trainable_table",
    "unmerge",
]
