"""Parameter-efficient fine-tuning on a frozen Llama. Importing a method's file registers it."""

from peft_impl.adapters import add_adapter, remove_adapter, set_adapter
from peft_impl.freeze import count_parameters, trainable_table
from peft_impl.lora import LoraConfig
from peft_impl.merge import MergeReport, merge, merge_and_unload, unmerge
from peft_impl.peft_files import load_adapter, read_adapter, save_adapter

__all__ = [
    "LoraConfig",
    "MergeReport",
    "add_adapter",
    "count_parameters",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "read_adapter",
    "remove_adapter",
    "save_adapter",
    "set_adapter",
    "trainable_table",
    "unmerge",
]
