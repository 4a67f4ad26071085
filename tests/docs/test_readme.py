"""The README's Python runs, and its other claims that can be checked are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgesmith.compiler.testing import TinyTransformer, tiny_data

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_every_python_block_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One namespace for all blocks; the reader's own model and data are stood in for by small ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text("from edgesmith.testing import TinyTransformer\n\ndef model():\n    return TinyTransformer()\n")
    (tmp_path / "samples.py").write_text("from edgesmith.testing import tiny_data\n\ndef data():\n    return tiny_data()\n")
    (tmp_path / "edgesmith.toml").write_text(
        '[model]\nsource = "net.py:model"\ninputs = [{ name = "x", shape = [1, 8, 8] }]\n[data]\nsource = "samples.py:data"\n'
        '[[target]]\nname = "onnxruntime"\n[pipeline]\npasses = ["fold-constants"]\n'
    )
    assert BLOCKS
    namespace = {"my_module": TinyTransformer(), "my_data": tiny_data(), "__name__": "__main__"}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, Python block {number}", "exec"), namespace)


def test_files_that_the_readme_links_to_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
