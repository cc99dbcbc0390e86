"""What an installation of the library brings along, against what it imports and what the project runs on."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_library_brings_along_what_it_imports():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    imported = set()
    for path in (ROOT / "ltp_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                imported.add(node.module.split(".")[0])
    others = imported - set(sys.stdlib_module_names) - {"ltp_jax"}
    assert others == {re.split("[->]", requirement)[0] for requirement in declared}


def test_both_lists_have_the_same_floors():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    floors = {re.split("[ #;]", line)[0] for line in lines}
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]) <= floors
