"""Settings of partial fine-tuning that mean nothing: one readable line, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from fsdp_train.main import main

METHOD, TRAIN, SELECT = "--finetune.method=partial", "--finetune.partial.train=", "--finetune.partial.select="
REFUSED = [
    (
        [METHOD],
        "--finetune.method partial: say what trains, --finetune.partial.train last:2 (or norms, layers.*",
    ),
    ([METHOD, "--finetune.partial.unfreeze_every=3"], "--finetune.method partial: say what trains"),
    ([METHOD, f"{TRAIN}last:4"], "--finetune.partial.train last:4: 'last:4': expected last:N with 1 <= N <= 3, the model's"),
    ([METHOD, f"{TRAIN}norms,q_prj"], "--finetune.partial.train norms,q_prj: 'q_prj' matches no parameter - did you mean 'q_"),
    ([METHOD, f"{TRAIN}norms,-norms"], "--finetune.partial.train norms,-norms: 'norms,-norms' leaves nothing to train"),
    ([METHOD, f"{TRAIN}q_prj", f"{SELECT}gradient_norm:1"], "--finetune.partial.train q_prj: 'q_prj' matches no parameter"),
    (
        [METHOD, f"{SELECT}gradient_nrom:2"],
        "--finetune.partial: select 'gradient_nrom:2': expected gradient_norm:K or relative_gradient_norm:K - did you mean"
        " 'gradient_norm'?",
    ),
    ([METHOD, f"{SELECT}2"], "select '2': expected gradient_norm:K or relative_gradient_norm:K"),
    *(
        (
            [METHOD, f"{SELECT}{criterion}{count}"],
            f"select '{criterion}{count}': expected {criterion}:K with K decoder layers, at",
        )
        for criterion in ("gradient_norm", "relative_gradient_norm")
        for count in ("", ":", ":0", ":-1", ":x", ":1.5", ":2:3")
    ),
    ([METHOD, f"{SELECT}gradient_norm:4"], "--finetune.partial.select gradient_norm:4: the model has 3 decoder layers"),
    ([METHOD, f"{TRAIN}norms", "--finetune.partial.probe_batches=0"], "probe_batches 0: expected at least 1"),
    ([METHOD, f"{TRAIN}norms", "--finetune.partial.unfreeze_every=-1"], "unfreeze_every -1: expected at least 0"),
    *(
        (
            [f"--finetune.method={method}", flag],
            f"{flag.replace('=', ' ')} has no effect: --finetune.method is {method}, which does not use it",
        )
        for method in ("lora", "llama_adapter", "prefix", "full", "head")
        for flag in (f"{TRAIN}norms", f"{SELECT}gradient_norm:1", "--finetune.partial.unfreeze_every=2")
    ),
    (
        [METHOD, f"{TRAIN}norms", "--finetune.lora.r=2"],
        "--finetune.lora.r 2 has no effect: --finetune.method is partial, which does not use it",
    ),
    ([METHOD, f"{TRAIN}norms", "--finetune.from_adapter=x"], "--finetune.from_adapter goes with --finetune.method lora or"),
    ([METHOD, f"{TRAIN}*", "--model.path=", "--model.preset=demo"], "which only --finetune.method full can train"),
]


@pytest.mark.parametrize(("flags", "message"), REFUSED, ids=[" ".join(flags) for flags, _ in REFUSED])
def test_settings_that_mean_nothing_are_refused(
    flags: list[str], message: str, model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = [f"--model.path={model_dir}", f"--data.path={alpaca_file}", f"--train.output_dir={tmp_path / 'out'}"]
    with pytest.raises(SystemExit) as stopped:
        main([*common, *flags])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_refused_by_name(
    model_dir: Path, alpaca_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tied = shutil.copytree(model_dir, tmp_path / "tied")
    settings = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": True}))
    with pytest.raises(SystemExit):
        main([f"--model.path={tied}", f"--data.path={alpaca_file}", METHOD, f"{TRAIN}lm_head", "--train.output_dir=x"])
    assert "--finetune.partial.train lm_head: 'lm_head' shares the embedding's weight in this model" in capsys.readouterr().err
