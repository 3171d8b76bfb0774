"""What the README tells people to type exists, and does what it says."""

import inspect
import re
import shlex
from pathlib import Path

import pytest

import mrefali
from mrefali import cli, commands, open_stack

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^( *)```(\w+)\n(.*?)^ *```", README, flags=re.MULTILINE | re.DOTALL)
LINES = [line.strip() for _, language, text in BLOCKS if language == "console" for line in text.splitlines()]
INLINE = [" ".join(text.split()) for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", README)]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
MAKE = sorted({text for text in LINES + INLINE if text.startswith("make ")})
CALLS = [line for line in LINES if line.startswith("mrefali ") and "--version" not in line]
OPTIONS = {name.removesuffix("_") for command in commands.COMMANDS
           for name, parameter in inspect.signature(command).parameters.items()
           if parameter.kind is parameter.KEYWORD_ONLY}


def test_the_readme_shows_the_main_job():
    assert {"make demo", "make test"} <= set(MAKE)
    assert {line.split()[1] for line in CALLS} == {"simulate", "info", "header", "mref_ali2d", "montage"}


@pytest.mark.parametrize("line", MAKE)
def test_make_targets_exist(line):
    assert set(line.split()[1:]) <= TARGETS


@pytest.mark.parametrize("line", CALLS + [text for text in INLINE if text.startswith("sxmref_ali2d.py ")])
def test_every_word_of_a_call_is_accepted(line):
    program, *words = shlex.split(line)
    name = "mref_ali2d" if program == "sxmref_ali2d.py" else words.pop(0)
    command = {command.__name__: command for command in commands.COMMANDS}[name]
    texts = cli.match_words(command, program, words)
    assert len(texts) == len(words)
    assert texts.keys() <= cli.build_job(command, texts).values.arguments.keys()


def test_every_option_named_exists():
    named = set(re.findall(r"--([A-Za-z_]\w*)", " ".join(INLINE))) - {"help", "version"}
    assert named <= OPTIONS


def test_the_table_has_every_option_of_the_main_job():
    table = README.split("## Options")[1].split("## Limits")[0]
    missing = {name for name, parameter in inspect.signature(commands.mref_ali2d).parameters.items()
               if parameter.kind is parameter.KEYWORD_ONLY and f"`--{name}`" not in table}
    assert missing == set()


def test_linked_files_are_there():
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert len(links) >= 5
    assert [link for link in links if not (ROOT / link).is_file()] == []


@pytest.mark.parametrize("name", ["demo", "page"])
def test_the_pictures_are_small(name):
    assert 10_000 < (ROOT / f"docs/images/{name}.png").stat().st_size < 200_000


def test_the_changelog_knows_this_version():
    assert f"## [{mrefali.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.jit_only
def test_the_main_job_as_the_readme_has_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for line in LINES[LINES.index("mrefali simulate particles.hdf --n=600 --views=3 --sizes=4,2,1"):]:
        program, *words = shlex.split(line)
        if program == "mv":
            Path(words[0]).rename(words[1])
        else:
            assert program == "mrefali"
            assert cli.main(words) == 0, line
    assert "ave_n" in capsys.readouterr().out
    exec("\n".join(text for _, language, text in BLOCKS if language == "python"), {})
    assert "(3, 64, 64)" in capsys.readouterr().out
    written = {re.sub(r"^(aqm|drm)\d+", lambda match: match[1] + "I" * (len(match[0]) - 3), path.name)
               for path in Path("aligned").iterdir()}
    table = README.split("## What comes out")[1].split("## Options")[0]
    assert written == {name.replace("R", "I") for name in re.findall(r"^\| `([^`]+)`", table, flags=re.MULTILINE)}
    assert sum(open_stack("aligned/multi_ref.hdf").column("ave_n")) == 600
