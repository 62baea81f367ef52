"""The commands, paths and targets that README and CONTRIBUTING name exist, and the map shows the whole package."""

from __future__ import annotations

import pathlib
import re
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
pages = pytest.mark.parametrize("page", PAGES)


def read(page: str) -> str:
    return (ROOT / page).read_text()


def outside_code(page: str) -> str:
    return re.sub(r"^```.*?^```", "", read(page), flags=re.MULTILINE | re.DOTALL)


def tree() -> list[str]:
    """The paths of CONTRIBUTING's map: two spaces of indent per folder, the name first."""
    block = re.search(r"^```\n(pyproject.*?)^```", read("CONTRIBUTING.md"), re.MULTILINE | re.DOTALL)
    assert block
    paths, folders = [], []
    for line in block.group(1).splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name]
        paths.append("".join(folders[:-1]) + name)
    return paths


def test_map_is_true():
    for path in tree():
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path


def test_map_is_whole():
    shown = {path.rstrip("/") for path in tree()}
    for folder in ("jaxq", "jaxq/primitives", "jaxq/lowerings"):
        for child in (ROOT / folder).iterdir():
            ours = child.suffix == ".py" or (child.is_dir() and (child / "__init__.py").exists())
            if ours and child.name != "__init__.py":
                assert f"{folder}/{child.name}" in shown


@pages
def test_targets_exist(page):
    targets = set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))
    # `make test`, `make PYTHON=python3.12 test`, `make test ARGS="..."`: only where it is a command.
    commands = re.findall(r"(?:^    |`)make((?: [A-Z]+=\S+)*) ([a-z]+)", read(page), re.MULTILINE)
    for _, target in commands:
        assert target in targets, f"make {target}"


def test_help_lists_every_target():
    makefile = read("Makefile")
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE).group(1).split())
    assert phony == set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    assert phony - {"help"} == set(re.findall(r"'make ([a-z]+) ", makefile))


@pages
def test_paths_exist(page):
    """Whatever stands in backquotes and looks like a path of ours, and every link to a file."""
    text = outside_code(page)
    # What commands make is there or not.
    ignored = {line.strip("/") for line in read(".gitignore").splitlines()}
    folders = tuple(child.name for child in ROOT.iterdir() if child.is_dir() and child.name not in ignored)
    quoted = [word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split() if "/" in word]
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    paths = [word for word in quoted if word.split("/")[0] in folders] + links
    assert page == "CHANGELOG.md" or paths
    for path in paths:
        assert (ROOT / path).exists(), path


@pages
def test_extras_exist(page):
    extras = set(tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"])
    for names in re.findall(r"(?:\.|jaxq)\[([a-z,]+)\]", read(page)):
        assert set(names.split(",")) <= extras, names
    if page == "README.md":
        sentence = re.search(r"Extras: (.*?) of them", read(page), re.DOTALL).group(1)
        assert set(re.findall(r"`([a-z]+)`", sentence)) == extras - {"demo", "test", "lint"}
