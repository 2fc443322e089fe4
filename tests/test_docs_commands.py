"""Every command of the pages and of the recipes' first lines is parsed; those that can run here are run."""

import re

import pytest
import yaml
from docs_commands import (
    LEFT_OUT,
    PAGES,
    ROOT,
    SHOWN,
    Block,
    Command,
    all_blocks,
    blocks_of,
    changed,
    check,
    check_python,
    command_name,
    commands_of,
    options_of,
    pages,
    write_stand_ins,
)

from gift_trl.scripts.cli import COMMANDS


BLOCKS = all_blocks()
SHELL = [block for block in BLOCKS if block.language == "bash"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("reader")
    write_stand_ins(path)
    return path


@pytest.mark.parametrize("page", sorted({block.page for block in SHELL}))
def test_commands_are_parsed(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    wrong = []
    for command in (command for block in SHELL if block.page == page for command in commands_of(block)):
        try:
            check(command)
        except Exception as error:
            wrong.append(f"{page}:{command.line}: {command}\n{type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_left_out_in_silence():
    assert {block.language for block in BLOCKS} <= {"bash", "python", "diff", "yaml", *SHOWN}
    typed = {str(command) for block in SHELL for command in commands_of(block)}
    assert typed >= LEFT_OUT.keys(), "a command that no page has any more"
    # That they are found at all
    assert {"README.md", "CONTRIBUTING.md", "recipes/README.md", "recipes/qwen3-8b/math.yaml"} <= {
        block.page for block in SHELL
    }
    assert len({line.split()[1] for line in typed if line.startswith("gift-trl")} & COMMANDS.keys()) >= 9


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda b: f"{b.page}:{b.line}")
def test_python_calls_what_exists(block):
    check_python(block.text)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=lambda b: f"{b.page}:{b.line}")
def test_fields_of_recipes_exist(block):
    fields = {option.removeprefix("--") for name in ("train", "evaluate", "merge") for option in options_of(name)}
    assert set(yaml.safe_load(block.text)) - fields == set()


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "diff"], ids=lambda b: f"{b.page}:{b.line}")
def test_both_sides_of_a_change_are_valid(block):
    before, after = changed(block)
    assert before != after
    for side in (before, after):
        if "(" in side:
            check_python(side)
        else:
            assert isinstance(yaml.safe_load(side), dict)


@pytest.mark.parametrize("page", pages(*PAGES), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_options_in_the_text_exist(page):
    """`gift-trl COMMAND … --option` in a sentence or a table."""
    text = re.sub(r"^( *)```.*?^\1```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    every = set.union(*(options_of(name) for name in [*COMMANDS, "report annotation"]))
    every |= {"--version"}
    if page.parent.name == "benchmarks":
        scripts = "".join(path.read_text(encoding="utf-8") for path in page.parent.glob("*.py"))
        every |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', scripts))
    unknown = []
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        words = span.split()
        if words[0] not in ("gift-trl", "accelerate") and not words[0].startswith("--"):
            continue
        known = options_of(command_name(words[1:])) if words[:1] == ["gift-trl"] and words[1] in COMMANDS else every
        options = {word.split("=")[0].rstrip(",") for word in words if word.startswith("--")}
        unknown += [f"{option} in `{' '.join(words)}`" for option in sorted(options - known)]
    assert not unknown


@pytest.mark.parametrize(
    "line, message",
    [
        ("gift-trl train --config recipe.yaml --learning_rte 1", "learning_rte"),
        ("gift-trl train --config no.yaml", r"no recipe file `no\.yaml`"),
        ("gift-trl train --accelerate_config zero9 --config recipe.yaml", "zero9"),
        ("gift-trl train --accelerate_config zero3 --num_proceses 8 --config recipe.yaml", "num_proceses"),
        ("gift-trl merge --adapter a --instruct_model b --output_dir c --verfy", "verfy"),
        ("gift-trl mrege", "mrege"),
        ("gift-trl push merged", "--repo_id"),
        (
            "accelerate launch --config_file recipes/accelerate_configs/ddp.yaml -m gift_trl.scripts.train --lr 1",
            "--lr",
        ),
        ("accelerate launch --confg_file x -m gift_trl.scripts.train", "confg_file"),
        ("accelerate launch --config_file recipes/ddp.yaml -m gift_trl.scripts.train", "no file"),
        ("make quikstart", "quikstart"),
        ("pip install -c constraints.txt '.[deepsped]'", "deepsped"),
        ("python benchmarks/merge.py --mergekit-pyton x", "mergekit-pyton"),
        ("python recipes/generate.py --check", "no arguments"),
        (".venv/bin/pytest tests/mergin", "tests/mergin"),
        ("curl example.com", "No parser of `curl`"),
    ],
)
def test_mistakes_are_found(line, message, folder, monkeypatch):
    monkeypatch.chdir(folder)
    (command,) = commands_of(Block("page", 1, "bash", line))
    with pytest.raises(Exception, match=message):
        check(command)


@pytest.mark.parametrize(
    "source",
    [
        "from gift_trl import GIFTConfg",
        "from gift_trl import GIFTConfig\nGIFTConfig(instruct_modl='x')",
        "from gift_trl import merge_adapter\nmerge_adapter('a', out='x')",
        "import gift_trl.mergin",
        "x = (",
    ],
)
def test_mistakes_in_python_are_found(source):
    with pytest.raises((ImportError, AttributeError, TypeError, SyntaxError)):
        check_python(source)


def test_lines_are_found_and_split(tmp_path, monkeypatch):
    monkeypatch.setattr("docs_commands.ROOT", tmp_path)
    (tmp_path / "a.md").write_text(
        "x\n\n```bash\nmake test  # all\ngift-trl push \\\n  'a b'\n\nhf x\n```\n- y\n  ```text\n  z\n  ```\n"
    )
    shell, text = blocks_of(tmp_path / "a.md")
    assert commands_of(shell) == [
        Command("a.md", 4, ("make", "test")),
        Command("a.md", 5, ("gift-trl", "push", "a b")),
        Command("a.md", 8, ("hf", "x")),
    ]
    assert (text.language, text.text) == ("text", "z\n")
    (tmp_path / "r.yaml").write_text(
        "# Title of it\n#\n#   gift-trl train \\\n#     --config r.yaml\n# End.\nmake: x\n# make y\n"
    )
    assert [command.argv for block in blocks_of(tmp_path / "r.yaml") for command in commands_of(block)] == [
        ("gift-trl", "train", "--config", "r.yaml")
    ]
