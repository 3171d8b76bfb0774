"""The command line: a guard in front of python-fire, the help texts and the exit status.

fire alone runs a command first and complains of a mistyped option afterwards, lets a flag swallow the file
name behind it and makes a number of a file called 1e3. So the guard holds the words of a call against the
command's signature and hands fire nothing but ``--name=value``; fire reads the values with the readers given
here and builds a job, which starts when fire is done. Must never import numpy, numba, scipy or h5py, which
``--help`` does without.
"""

import contextlib
import difflib
import functools
import inspect
import io
import logging
import math
import os
import re
import sys
from collections import deque, namedtuple

import mrefali
from mrefali.commands import COMMANDS, ali2d, header, k_means, k_means_groups, mref_ali2d, transform2d
from mrefali.errors import REFUSALS, InputError, RunFailed, Stopped, one_line
from mrefali.signals import stopping

NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"


def _read_numbers(text):
    """A float, or a list of several."""
    numbers = [float(word) for word in re.split("[ ,]+", text)]
    return numbers if len(numbers) > 1 else numbers[0]


Kind = namedtuple("Kind", "placeholder allowed pattern read")
#: How a value is written in the help, said in an error, recognised and read, by its parameter's annotation.
KINDS = {
    int: Kind("INT", "a whole number", r"[+-]?[0-9]{1,18}", int),
    float: Kind("NUMBER", "a finite number", NUMBER, float),
    tuple: Kind("NUMBERS", "a finite number or one a stage, in quotes", f"{NUMBER}([ ,]+{NUMBER})*", _read_numbers),
    bool: Kind("1|0", "True or False, yes or no, 1 or 0", r"(?i:true|false|yes|no|1|0)",
               lambda text: text.lower() in ("true", "yes", "1")),
    str: Kind("TEXT", "a text", r"(?s:.+)", str),
}


def main(argv=None):
    """Exit status of ``mrefali COMMAND ...``; ``argv`` is a list of str, by default the process's own."""
    words = sys.argv[1:] if argv is None else list(argv)
    return _exit_status(functools.partial(_choose_command, words))


def sxmref_ali2d(argv=None):
    """Exit status of ``sxmref_ali2d.py ...``, the original's name of ``mrefali mref_ali2d ...``."""
    return _run_script(mref_ali2d, "sxmref_ali2d.py", argv)


def sxali2d(argv=None):
    """Exit status of ``sxali2d.py ...``, the original's name of ``mrefali ali2d ...``."""
    return _run_script(ali2d, "sxali2d.py", argv)


def sxk_means(argv=None):
    """Exit status of ``sxk_means.py ...``, the original's name of ``mrefali k_means ...``."""
    return _run_script(k_means, "sxk_means.py", argv)


def sxk_means_groups(argv=None):
    """Exit status of ``sxk_means_groups.py ...``, the original's name of ``mrefali k_means_groups ...``."""
    return _run_script(k_means_groups, "sxk_means_groups.py", argv)


def sxheader(argv=None):
    """Exit status of ``sxheader.py ...``, the original's name of ``mrefali header ...``."""
    return _run_script(header, "sxheader.py", argv)


def sxtransform2d(argv=None):
    """Exit status of ``sxtransform2d.py ...``, the original's name of ``mrefali transform2d ...``."""
    return _run_script(transform2d, "sxtransform2d.py", argv)


def _run_script(command, program, argv):
    words = sys.argv[1:] if argv is None else list(argv)
    return _exit_status(functools.partial(_run_command, command, program, words))


def _exit_status(run):
    """0 done, 2 bad call, 1 run failed, 141 reader gone, 128 plus a signal's number; all else passes (exit 1)."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for file names the terminal cannot show
    try:
        run()
        sys.stdout.flush()
    except REFUSALS as error:
        if not hasattr(error, "said_by_root"):
            print(f"mrefali: error: {one_line(error)}", file=sys.stderr)
        return 2
    except RunFailed as error:
        print(f"mrefali: error: {one_line(error)}", file=sys.stderr)
        return 1
    except Stopped as error:
        if not hasattr(error, "said_by_root"):
            print(f"mrefali: {error}", file=sys.stderr)
        return 128 + error.number
    except KeyboardInterrupt:
        print("mrefali: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has left, as in `mrefali info FILE | head`
        _silence_stdout()
        return 141  # what the shell reports of any program that SIGPIPE ended
    return 0


def _silence_stdout():
    """Let what stdout still holds go nowhere: Python flushes it at exit and would complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _choose_command(words):
    commands = {command.__name__: command for command in COMMANDS}
    first = words[0] if words else None
    if first in ("-h", "--help"):
        print(overview())
    elif first == "--version":
        print(f"mrefali {mrefali.__version__}")
    elif first is None or first.startswith("-"):
        raise InputError(f"a command comes first, one of {', '.join(commands)}: see mrefali --help")
    elif first.replace("-", "_") in commands:
        command = commands[first.replace("-", "_")]
        _run_command(command, f"mrefali {command.__name__}", words[1:])
    else:
        raise InputError(f"unknown command {first}: {_way_out(first, commands, 'mrefali', '')}")


def _run_command(command, program, words):
    if "-h" in words or "--help" in words:
        print(command_help(command, program))
    elif "--version" in words:
        print(f"mrefali {mrefali.__version__}")
    else:
        job = build_job(command, match_words(command, program, words))
        # before anything imports numba: threads that wait must not take the cores of a shared machine
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        with stopping(), _messages(quiet=job.values.arguments.get("quiet", False)):
            job.start()


# ---- the guard -------------------------------------------------------------------------------------------


def match_words(command, program, words):
    """The text given for each parameter of a command, every word of the call having found its place.

    An option takes its value as ``--ou=27`` or ``--ou 27``, also where the value starts with one minus; a
    boolean alone stands for True and never takes the next word. What is no option fills the positionals.

    Parameters
    ----------
    command : function
    program : str
        How the command was called, for messages.
    words : sequence of str

    Returns
    -------
    dict of str to str

    Raises
    ------
    InputError
        For an unknown option, one given twice or without a value, and for positionals missing or too many.
    """
    texts, loose, words = {}, [], deque(words)
    while words:
        word = words.popleft()
        if word == "-" or not word.startswith("-"):
            loose.append(word)
            continue
        option, equals, text = word.partition("=")
        parameter = _find_option(command, program, option)
        if not equals and parameter.annotation is bool:
            text = "True"
        elif not equals:
            if not words or words[0].startswith("--"):
                raise InputError(f"{option} has no value: give {_allowed(command, parameter)}")
            text = words.popleft()
        if parameter.name in texts:
            raise InputError(f"{option} is given twice, as {texts[parameter.name]} and {text}: give it once")
        texts[parameter.name] = text
    return texts | _place(command, program, loose, texts)


def _find_option(command, program, option):
    parameters = {_option_name(p): p for p in inspect.signature(command).parameters.values()}
    name = option[2:].replace("-", "_")
    if not option.startswith("--") or name not in parameters:
        way_out = _way_out(option.lstrip("-"), parameters, program, "--")
        raise InputError(f"unknown option {option}: {way_out}")
    return parameters[name]


def _place(command, program, loose, texts):
    """``{name: text}`` of the words that belong to no option, given the ``texts`` of those that do."""
    parameters = inspect.signature(command).parameters.values()
    free = [p.name for p in parameters if _is_positional(p) and p.name not in texts]
    if len(loose) > len(free):
        extra = loose[len(free)]
        raise InputError(f"{extra} is one argument too many: the call is {_usage(command, program)}")
    placed = dict(zip(free, loose, strict=False))
    missing = [_label(p) for p in parameters if p.default is p.empty and p.name not in texts | placed]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise InputError(f"{', '.join(missing)} {verb} missing: the call is {_usage(command, program)}")
    return placed


def _way_out(word, names, program, prefix):
    """A question for the nearest of the names, whatever its case, or else the way to the help."""
    by_lower_case = {name.lower(): name for name in names}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), by_lower_case, n=1)
    return f"did you mean {prefix}{by_lower_case[close[0]]}?" if close else f"see {program} --help"


def build_job(command, texts):
    """The job that fire builds from a call that has passed the guard; nothing of it has run yet.

    Raises
    ------
    InputError
        For a text that is no value of its parameter's kind.
    """
    import fire

    signature = inspect.signature(command)
    readers = {name: functools.partial(_read, command, signature.parameters[name]) for name in texts}

    @fire.decorators.SetParseFns(**readers)
    @functools.wraps(command)
    def build(*positional, **options):
        return Job(command, signature.bind(*positional, **options))

    call = [command.__name__, *(f"--{name}={text}" for name, text in texts.items())]
    return fire.Fire({command.__name__: build}, command=call, name="mrefali", serialize=lambda job: None)


class Job:
    """A command bound to its values. Not callable, or fire would call it."""

    __slots__ = ("command", "values")

    def __init__(self, command, values):
        self.command, self.values = command, values

    def start(self):
        self.command(*self.values.args, **self.values.kwargs)


def _read(command, parameter, text):
    kind = KINDS[parameter.annotation]
    value = kind.read(text) if re.fullmatch(kind.pattern, text) else None
    if value is None or value in (math.inf, -math.inf):
        got = f"={text} is not allowed" if text else " is empty"
        raise InputError(f"{_label(parameter)}{got}: give {_allowed(command, parameter)}")
    return value


def _allowed(command, parameter):
    specification, _ = _sections(command)[1][parameter.name]
    return KINDS[parameter.annotation].allowed + (f" ({specification})" if specification else "")


def _is_positional(parameter):
    return parameter.kind is parameter.POSITIONAL_OR_KEYWORD


def _label(parameter):
    return parameter.name.upper() if _is_positional(parameter) else f"--{_option_name(parameter)}"


def _option_name(parameter):
    """What the command line calls a parameter; ``import_`` is ``import`` there, a keyword of Python."""
    return parameter.name.removesuffix("_")


# ---- messages and help -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _messages(quiet):
    """Show what the library logs: messages on stdout unless ``quiet``, warnings on stderr."""
    logger = logging.getLogger("mrefali")
    said, warned = _Said(sys.stdout), logging.StreamHandler(sys.stderr)
    said.addFilter(lambda record: record.levelno < logging.WARNING)
    said.setLevel(logging.INFO)
    warned.setLevel(logging.WARNING)
    warned.setFormatter(logging.Formatter("mrefali: warning: %(message)s"))
    handlers, level = [warned] if quiet else [said, warned], logger.level
    logger.setLevel(logging.INFO)
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
        logger.setLevel(level)


class _Said(logging.StreamHandler):
    def handleError(self, record):
        """A reader that has left, as in ``... | head``, ends the messages but not a run of hours."""
        if isinstance(sys.exception(), BrokenPipeError):
            _silence_stdout()
        else:
            super().handleError(record)


def overview():
    """The text of ``mrefali --help``."""
    lines = [f"mrefali {mrefali.__version__}: {mrefali.__doc__.splitlines()[0]}", "",
             "usage: mrefali COMMAND ...", ""]
    width = max(len(command.__name__) for command in COMMANDS)
    for command in COMMANDS:
        lines.append(f"  {command.__name__:<{width}}  {_sections(command)[0].splitlines()[0]}")
    lines += ["", "  mrefali COMMAND --help   its arguments and options, with units and defaults",
              "  mrefali --version        the version"]
    return "\n".join(lines)


def command_help(command, program):
    """The text of ``COMMAND --help``: usage, what it does, and one line for each argument and option."""
    text, described, examples = _sections(command)
    parameters = list(inspect.signature(command).parameters.values())
    heads = {p.name: _head(p) for p in parameters}
    width = max(map(len, heads.values()))
    lines = {True: [], False: []}
    for p in parameters:
        specification, description = described[p.name]
        notes = "; ".join(note for note in (specification, _default(p)) if note)
        line = f"  {heads[p.name]:<{width}}  {description}" + (f" ({notes})" if notes else "")
        lines[_is_positional(p)].append(line)
    parts = [f"usage: {_usage(command, program)}", text.strip(), *map("\n".join, lines.values())]
    if examples:
        parts.append("examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()))
    return "\n\n".join(part for part in parts if part)


def _head(parameter):
    if _is_positional(parameter) or (parameter.annotation is bool and not parameter.default):
        return _label(parameter)
    return f"{_label(parameter)}={KINDS[parameter.annotation].placeholder}"


def _default(parameter):
    if parameter.default is parameter.empty:
        return "" if _is_positional(parameter) else "required"
    if parameter.annotation is bool:
        return "default 1" if parameter.default else "default off"
    if parameter.default in (None, ""):
        return ""
    if parameter.annotation not in (float, tuple):
        return f"default {parameter.default}"
    numbers = parameter.default if isinstance(parameter.default, tuple) else (parameter.default,)
    return f"default {' '.join(f'{number:g}' for number in numbers)}"


def _usage(command, program):
    words, has_options = [program], False
    for p in inspect.signature(command).parameters.values():
        if p.default is p.empty:
            words.append(_head(p))
        elif _is_positional(p):
            words.append(f"[{_label(p)}]")
        else:
            has_options = True
    return " ".join(words + ["[--OPTION=VALUE ...]"] * has_options)


def _sections(command):
    """Of a command's docstring the introduction, ``{name: (unit, description)}`` and the examples."""
    introduction, *rest = re.split(r"^(\w+)\n-+\n", inspect.getdoc(command), flags=re.MULTILINE)
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    entry = re.compile(r"^(\w+) : \w+(?:, )?(.*)\n((?: +.*\n?)+)", flags=re.MULTILINE)
    described = {name: (specification, " ".join(lines.split()))
                 for name, specification, lines in entry.findall(sections["Parameters"])}
    return introduction, described, sections.get("Examples", "")
