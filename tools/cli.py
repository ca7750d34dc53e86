"""A command line's manners: complaints of one line, exit codes, text from files."""

import argparse
import contextlib
import difflib
import os
import sys
from pathlib import Path

from model import InputError, is_out_of_memory, need, reading


class Parser(argparse.ArgumentParser):
    """argparse, its complaints in one line like every other, with the nearest known flag."""

    def error(self, message):
        known = [s for a in self._actions for s in a.option_strings]
        word = message.split(": ")[-1].split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(word, known, 1) if "unrecognized" in message else ()
        hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
        raise InputError(f"{message}; {hint}")


def filled(text):
    """A type for argparse: a path or a pattern."""
    if not text.strip():
        raise argparse.ArgumentTypeError("an empty path; is a variable of the shell not set?")
    return text


def number(kind, low, below=2**31, n=None):
    """A type for argparse: low <= x < below. n: a tuple of n, from one value for all, or n."""

    def parse(text):
        values = tuple(map(kind, text.split(",") if n else [text]))
        if len(values) not in (1, n) or not all(low <= x < below for x in values):
            each = f"; one value, or {n} with commas" if n else ""
            limits = f"expected {low} or more, less than {below}{each}"
            raise argparse.ArgumentTypeError(f"{text:.80}: {limits}")
        return values * (n // len(values)) if n else values[0]

    parse.__name__ = kind.__name__  # what argparse calls it in its error
    return parse


def drop_output():
    """What standard output could not take goes nowhere: Python would try again at exit."""
    with contextlib.suppress(OSError), open(os.devnull, "wb") as nowhere:  # OSError: no real file
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def run_cli(main):
    """Call a command line's main(); an error that one can mend becomes one line and exit code 2."""
    for name in ("stdin", "stdout", "stderr"):  # a closed one's number would go to the next file
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):  # a console of one byte a character shows escapes
        stream.reconfigure(errors="backslashreplace")
    try:
        try:
            main()
        finally:
            sys.stdout.flush()  # what fails at exit would be no line
    except BrokenPipeError:
        drop_output()
        sys.exit(1)
    except (InputError, OSError) as e:  # OSError: a full disk under the log, standard output
        print(f"error: {e}", file=sys.stderr)
        drop_output()
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        why = " ".join(str(e).split())
        fix = "in training a smaller --batch or --max-tokens needs less, with another --out"
        print(f"error: out of memory: {why:.300}; {fix}", file=sys.stderr)
        sys.exit(2)


def read_texts(path):
    """The lines of a UTF-8 text file or, for "-", of standard input."""
    with reading(path, "readable"):
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    with reading(path, "UTF-8 text", "; convert it with iconv"):
        text = raw.decode("utf-8-sig")
    need(text, f"{path}: no lines to read")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
