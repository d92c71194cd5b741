"""The planner's numbers: closed forms for the published sizes. (That they are what a process holds: test_strategies.py.)"""

from __future__ import annotations

import re

import pytest

from fsdp_train.config import DEMO
from tools import measure_loading
from tools.plan_memory import main

SIZES = {"llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192}


def rows(said: str) -> dict[str, list[float]]:
    found = {}
    for line in said.splitlines():
        if match := re.match(r"  (none, or ddp|fsdp2?|hsdp, \d+ replicas) +([\d. ]+)", line):
            found[match[1]] = [float(n) for n in match[2].split()]
    return found


@pytest.mark.parametrize("preset", SIZES)
@pytest.mark.parametrize("processes", [4, 64])
def test_full_fine_tuning_takes_sixteen_bytes_a_parameter(
    preset: str, processes: int, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--preset", preset, "--method", "full", "--processes", str(processes), "--replicas", "2"])
    said = capsys.readouterr().out
    found = rows(said)
    assert set(found) == {"none, or ddp", "fsdp", "fsdp2", "hsdp, 2 replicas"}
    for name, numbers in found.items():
        shards = {"none, or ddp": 1, "hsdp, 2 replicas": processes // 2}.get(name, processes)
        wanted = [SIZES[preset] * size / shards / 1e9 for size in (4, 4, 8, 16)]
        assert numbers[:4] == pytest.approx(wanted, abs=0.006)
    assert f"what ddp holds / what fsdp holds on {processes}: {processes}.00" in said


def test_lora_holds_the_base_in_bf16_and_little_else(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--preset", "llama2-7b", "--processes", "1", "--gpu", "24"])
    said = capsys.readouterr().out
    assert "6,742,609,920 parameters, 4,194,304 of them train" in said
    base, trained = SIZES["llama2-7b"] * 2, 4_194_304 * 4
    wanted = [(base + trained) / 1e9, trained / 1e9, 2 * trained / 1e9, (base + 4 * trained) / 1e9, 0]
    assert rows(said)["none, or ddp"] == pytest.approx(wanted, abs=0.006)
    assert "fits, 8.5 GB left for activations" in said


def test_a_preset_that_is_not_known_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--preset", "llama2-7"])
    assert "did you mean" in capsys.readouterr().err


def test_loading_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    measure_loading.main(["--model", str(DEMO / "base"), "--method", "full"])
    assert re.fullmatch(r"rank 0 of 1: holds [\d,]+ MB; own memory -?[\d,]+ MB more .*\n", capsys.readouterr().out)
