"""What the README and the files beside it say is run, or compared with the code."""

import ast
import dataclasses
import re
import tomllib

from places import ROOT
import pytest

import adamw_xla as ax

README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def example():
    """The names that the README's code blocks leave behind, run one after the other."""
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_example_trains(example):
    assert example["loss"] < 0.01
    assert example["state"].count == 200


def test_composite_line_is_real(example):
    def without_values(text: str) -> str:
        text = re.sub(r"@adamw_update_\d+", "@adamw_update_", text)  # MLIR counts them
        return re.sub(r"%\w+(:\d+)?", "%", text)

    (line,) = blocks("mlir")
    assert without_values(line.strip()) in without_values(example["text"])


def test_error_message_is_real(example):
    params, state, config = (example[name] for name in ("params", "state", "config"))
    grads = {"w": params["w"].repeat(2, axis=1), "b": params["b"]}
    with pytest.raises(ValueError, match=r"^grads\['w'\]: ") as error:
        ax.adamw_step(params, grads, state, config)
    assert f"`{error.value}`" in README


def test_options_table():
    rows = re.findall(r"^\| `(\w+)` \| `(.*?)` \|", README, re.MULTILINE)
    documented = [(name, ast.literal_eval(default)) for name, default in rows]
    assert documented == [(field.name, field.default) for field in dataclasses.fields(ax.AdamW)]


def test_commands_are_one_line_each():
    demo, tests = (block for block in blocks("sh") if "venv" in block and "pip" in block)
    assert demo.count("\n") == tests.count("\n") == 1
    assert demo.endswith("python tools/demo.py\n")
    assert tests.endswith("python -m pytest\n")


def test_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == ax.__version__
    assert f"\nversion: {ax.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert ax.__version__ in (ROOT / "CHANGELOG.md").read_text()
