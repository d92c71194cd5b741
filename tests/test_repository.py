"""The rules of the tree: imports go one way, only four runtime dependencies, the files that ship are there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("llama", "peft_impl", "fsdp_train", "tools")
RUNTIME = {"torch", "sentencepiece", "safetensors", "numpy"}
MAY_IMPORT = {
    "llama": {"llama"},
    "peft_impl": {"llama", "peft_impl"},
    "fsdp_train": {"llama", "peft_impl", "fsdp_train"},
    "tools": set(PACKAGES),
}
# Behind a try, with a plain form when missing.
OPTIONAL = {
    "fsdp_train/log.py": {"tqdm"},
    "fsdp_train/partial.py": {"matplotlib"},
    "tools/compare_methods.py": {"matplotlib"},
    "tools/benchmark/generation.py": {"transformers"},
    "tools/benchmark/programs.py": {"transformers", "peft", "litgpt", "torchtune"},
    "tools/benchmark/report.py": {"matplotlib"},
}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, by full name."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    for path in modules(package):
        name = str(path.relative_to(ROOT))
        for imported in imports(path):
            top = imported.partition(".")[0]
            if top in PACKAGES:
                assert top in MAY_IMPORT[package], f"{name} imports {imported}"
            elif top not in sys.stdlib_module_names:
                assert top in RUNTIME | OPTIONAL.get(name, set()), f"{name} imports {imported}"
            if package in ("llama", "peft_impl"):
                assert not imported.startswith("torch.distributed"), f"{name} imports {imported}"
            if "fsdp" in imported and imported.startswith("torch"):
                assert name == "fsdp_train/parallel.py", f"{name} imports {imported}"


def test_everything_imports_with_the_runtime_dependencies_only() -> None:
    names = [".".join(p.relative_to(ROOT).with_suffix("").parts) for package in PACKAGES for p in modules(package)]
    blocked = ["transformers", "peft", "tqdm", "matplotlib", "tensorboard", "accelerate", "pytest"]
    code = f"""
import importlib, sys
for name in {blocked}: sys.modules[name] = None
for name in {[n.removesuffix(".__init__") for n in names]}: importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_setup_names_packages_and_dependencies() -> None:
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    required = re.search(r"install_requires=\[(.*?)\]", text, re.S)
    assert required is not None
    assert {re.match(r"[a-z]+", name).group() for name in re.findall(r'"([^"]+)"', required.group(1))} == RUNTIME  # type: ignore[union-attr]
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    assert pinned >= RUNTIME | {"transformers", "peft", "pytest"}


def test_ci_runs_the_test_block_of_the_readme() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    assert "torchrun -m fsdp_train.main" in blocks[0]
    assert "pytest" in blocks[1]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "README.md" in script  # it extracts the second block and has no copy of it
