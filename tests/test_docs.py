"""docs/commands.md has every command, word for word as the program prints it; what pages tell people to do works."""

import inspect
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import small

import mrefali
from mrefali import checks, classes, cli, commands, ctf, reference
from mrefali.io import open_stack

DOCS = Path(__file__).parents[1] / "docs"
TEXT = (DOCS / "commands.md").read_text()
NAMES = [command.__name__ for command in commands.COMMANDS]


def section(title):
    """The text under a heading of the second level."""
    return re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)[1]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def table_words(title):
    """What stands in backquotes or as a bare number in the first column of the tables of a section."""
    return [row.strip().strip("`") for row in re.findall(r"^\| ([^|]+) \|", section(title), flags=re.MULTILINE)][1:]


def test_every_command_is_there_in_the_order_of_the_help():
    assert re.findall(r"^## mrefali (\w+)$", TEXT, flags=re.MULTILINE) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_help_of_a_command_is_what_the_program_prints(capsys, name):
    assert cli.main([name, "--help"]) == 0
    assert blocks(section(f"mrefali {name}"), "text") == [capsys.readouterr().out]


def test_the_overview_is_what_the_program_prints(capsys):
    assert cli.main(["--help"]) == 0
    assert blocks(TEXT, "text")[0] == capsys.readouterr().out


def test_no_block_is_of_a_command_that_is_gone():
    assert len(blocks(TEXT, "text")) == 1 + len(NAMES)


def test_options_named_in_the_text_exist():
    prose = re.sub(r"^```text\n.*?^```", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    options = {name.removesuffix("_") for command in commands.COMMANDS
               for name in inspect.signature(command).parameters}
    named = set(re.findall(r"--([A-Za-z]\w*)", prose))
    assert named - {"help"} <= options
    assert named > {"CTF", "center", "center_limit", "function", "vanished", "import", "export", "params"}


def test_the_tables_have_every_choice():
    assert list(map(int, table_words("Centring"))) == list(reference.CENTERINGS)
    assert [word.split(",")[0] for word in table_words("Reference functions")][:-2] == list(reference.FUNCTIONS)
    assert table_words("Vanished classes") == list(classes.VANISHED)


def test_the_numbers_in_the_text_are_the_programs():
    assert f"shorter than {reference.CENTERED_PX} px, at most {reference.CENTERING_ROUNDS} times" in TEXT
    assert classes.SMALLEST_CLASS == 4
    assert f"up to {ctf.KERNEL_BYTES >> 20} MB" in TEXT
    assert checks.AUTO_STOP_ITERATIONS == 10


def test_functions_of_the_same_name_are_in_the_package():
    names = [name.strip() for name in re.search(r"`from mrefali import\s+([^`]+)`", TEXT)[1].split(",")]
    assert sorted(names) == sorted(command.__name__ for command in commands.COMMANDS)
    assert all(callable(getattr(mrefali, name)) for name in names)


def test_the_call_in_python_has_the_parameters_named():
    call = " ".join(re.search(r"`mref_ali2d\(([^)]+)\)`", TEXT)[1].split())
    parameters = inspect.signature(mrefali.mref_ali2d).parameters.values()
    assert call.split(", ") == [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


@pytest.mark.parametrize("center", [0, 1, -1, 2, 3])
def test_the_example_of_a_reference_function_runs(tmp_path, center):
    example, = blocks(section("Reference functions"), "python")
    assert len(example.splitlines()) <= 10
    (tmp_path / "own.py").write_text(example)
    assert f"--function=own.py:{re.search(r'def (.+)[(]', example)[1]}" in TEXT
    words = [*small.write(tmp_path), str(tmp_path / "out"), "--ou=6", "--xr=1", "--yr=1", f"--center={center}",
             "--maxit=2", f"--function={tmp_path / 'own.py'}:positive"]
    assert cli.main(["mref_ali2d", *words]) == 0
    history = small.read_table(tmp_path / "out/history.csv")
    assert any(history["center_x"]) is (center != 0)
    assert open_stack(tmp_path / "out/multi_ref.hdf").read(0, 2).mean() > 0


def test_the_command_that_undoes_a_run_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stack, refs = small.write(tmp_path)
    line, = re.findall(r"^    mrefali (header .*poses_before\.csv)$", TEXT, flags=re.MULTILINE)
    before = open_stack(stack).column("xform.align2d")
    mrefali.mref_ali2d(stack, refs, "out", maxit=1, **small.OPTIONS)
    assert not np.array_equal(open_stack(stack).column("xform.align2d"), before)
    assert cli.main(line.replace("STACK", stack).replace("OUTDIR", "out").split()) == 0
    np.testing.assert_array_equal(open_stack(stack).column("xform.align2d"), before)


def test_links_within_the_page_lead_somewhere():
    headings = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-")
                for title in re.findall(r"^#+ (.+)$", TEXT, flags=re.MULTILINE)}
    links = re.findall(r"\]\(#([^)]+)\)", TEXT)
    assert len(links) >= 8
    assert set(links) <= headings


def test_the_readme_links_the_page():
    assert "](docs/commands.md)" in (DOCS.parent / "README.md").read_text()


# ---- docs/mpi.md

MPI_CALLS = re.findall(r"mrefali mref_ali2d [^`]*?--MPI.*", re.sub(r"\\\n\s*", "", (DOCS / "mpi.md").read_text()))


@pytest.mark.parametrize("line", MPI_CALLS)
def test_every_word_of_a_call_with_mpi_is_accepted(line):
    words = line.replace("$SLURM_CPUS_PER_TASK", "8").split()[2:]
    assert len(cli.match_words(commands.mref_ali2d, "mrefali mref_ali2d", words)) == len(words)


def test_the_script_for_slurm_is_one_of_the_calls():
    assert len(MPI_CALLS) == 2
    assert "--max_memory=7GB" in MPI_CALLS[1]


# ---- all pages

PAGES = {path.name: path.read_text() for path in sorted(DOCS.glob("*.md"))}
GUIDES = ["classes.md", "from_cryosparc.md", "from_relion.md", "from_sparx.md", "method.md", "reading_classes.md",
          "troubleshooting.md"]
PROGRAMS = {"sxmref_ali2d.py": "mref_ali2d", "sxali2d.py": "ali2d", "sxk_means.py": "k_means",
            "sxk_means_groups.py": "k_means_groups", "sxheader.py": "header", "sxtransform2d.py": "transform2d"}
GUIDE_CALLS = sorted({line for name in GUIDES for line in
                      [line for text in blocks(PAGES[name], "console") for line in text.splitlines()]
                      + re.findall(r"`([^`\n]+)`", PAGES[name])
                      if re.match(r"(mrefali|sx\w+\.py) .", line)}
                     - {"mrefali mref_ali2d", "mrefali ali2d", "mrefali k_means", "mrefali k_means_groups",
                        "mrefali convert"})


@pytest.mark.parametrize("line", GUIDE_CALLS)
def test_every_word_of_a_call_in_the_guides_is_accepted(line):
    program, *words = shlex.split(line)
    name = PROGRAMS.get(program) or words.pop(0)
    command = {command.__name__: command for command in commands.COMMANDS}[name]
    texts = cli.match_words(command, program, words)
    assert len(texts) == len(words)
    assert texts.keys() <= cli.build_job(command, texts).values.arguments.keys()


def test_the_guides_have_calls():
    assert {name for name in GUIDES if "```console" in PAGES[name]} == {
        "classes.md", "from_cryosparc.md", "from_relion.md", "from_sparx.md"}
    assert len(GUIDE_CALLS) > 12


def test_options_named_in_the_guides_exist():
    options = {name.removesuffix("_") for command in commands.COMMANDS
               for name in inspect.signature(command).parameters}
    assert set(re.findall(r"`--([A-Za-z]\w*)", "".join(PAGES[name] for name in GUIDES))) <= options


def test_every_option_of_the_original_is_in_its_guide():
    original = {"ir", "ou", "rs", "xr", "yr", "ts", "center", "maxit", "CTF", "snr", "function", "rand_seed", "MPI"}
    rows = re.findall(r"^\| (`--.*?) \|", PAGES["from_sparx.md"], flags=re.MULTILINE)
    assert set(re.findall(r"--(\w+)", "".join(rows))) == original


def test_messages_quoted_are_the_programs():
    source = "".join(path.read_text() for path in (DOCS.parent / "mrefali").rglob("*.py"))
    source = re.sub(r'"\s*f?"', "", source).replace("%%", "%")
    text = " ".join(PAGES["troubleshooting.md"].split())
    quoted = [part.strip() for message in re.findall(r'"([^"]+)"', text) for part in message.split("...")]
    assert len(quoted) > 25
    assert [part for part in quoted if part not in source] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^):]+)\)", PAGES[page]):
        name, _, place = link.partition("#")
        assert not name or (DOCS / name).is_file(), link
        if place:
            headings = re.findall(r"^#+ (.+)$", PAGES[name or page], flags=re.MULTILINE)
            assert place in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}, link


def test_every_page_is_in_the_index_and_linked_from_the_readme():
    index = set(re.search(r"```{toctree}\n(?::.*\n)*\n(.*?)```", PAGES["index.md"], flags=re.DOTALL)[1].split())
    assert {f"{name}.md" for name in index} == PAGES.keys() - {"index.md"}
    readme = (DOCS.parent / "README.md").read_text()
    assert [name for name in GUIDES if f"](docs/{name})" not in readme] == []


def test_the_reference_has_all_that_the_package_gives():
    listed = set(re.findall(r"auto(?:function|class):: mrefali\.\w+\.(\w+)$", PAGES["api.md"], flags=re.MULTILINE))
    assert listed == set(mrefali.__all__) - {"__version__", "InputError", "RunFailed"}
    assert ".. automodule:: mrefali.errors\n" in PAGES["api.md"]
