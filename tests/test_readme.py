"""The README's code runs as it stands, block by block, and each `# -> value` is what the expression gives."""

from __future__ import annotations

import ast
import pathlib
import re
import shlex
import subprocess
import sys
from typing import Any

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

SHELL = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(text: str, namespace: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Run the blocks of a page; per `# ->` the expression, the value that the page shows, and the one that came."""
    shown = []
    for match in BLOCKS.finditer(text):
        first = text[: match.start()].count("\n") + 2
        source = match.group(1)
        lines = source.splitlines()
        for node in ast.parse(source).body:
            ast.increment_lineno(node, first - 1)
            _, arrow, value = lines[node.end_lineno - first].partition("# -> ")
            if arrow and isinstance(node, ast.Expr):
                got = eval(compile(ast.Expression(node.value), README.name, "eval"), namespace)
                shown.append((ast.unparse(node.value), value, repr(got)))
            else:
                assert not arrow, f"line {node.lineno}: only an expression has a value to show"
                exec(compile(ast.Module([node], []), README.name, "exec"), namespace)
    return shown


def test_readme(tmp_path, monkeypatch, capsys):
    """In a folder of its own, since the page writes files."""
    import jax

    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    with jax.numpy_dtype_promotion("standard"):  # as a reader has it
        shown = run(text, {"__name__": "readme"})
    assert len(shown) > 10
    for expression, value, got in shown:
        assert got == value, f"{expression} gives {got}"
    assert "bits/weight" in capsys.readouterr().out
    for block in SHELL.findall(text):
        for line in block.splitlines():
            program, *arguments = shlex.split(line, comments=True)
            assert program == "jaxq"
            command = [sys.executable, "-m", "jaxq", *arguments]
            result = subprocess.run(command, capture_output=True, text=True, timeout=300)
            assert result.returncode == 0, f"{line}: {result.stderr}"
