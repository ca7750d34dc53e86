"""A command line's manners: complaints of one line, exit codes, text from files."""

import argparse
import difflib
import sys
from pathlib import Path

from model import InputError, need, reading


class Parser(argparse.ArgumentParser):
    """argparse, its complaints in one line like every other, with the nearest known flag."""

    def error(self, message):
        known = [s for a in self._actions for s in a.option_strings]
        word = message.split(": ")[-1].split("=")[0].split(" ")[0]
        near = difflib.get_close_matches(word, known, 1) if "unrecognized" in message else ()
        hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
        raise InputError(f"{message}; {hint}")


def run_cli(main):
    """Call a command line's main(); an error that one can mend becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a console of one byte a character shows escapes
        stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except BrokenPipeError:
        sys.exit(1)
    except (InputError, OSError) as e:  # OSError: a full disk under the log, standard output
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def read_texts(path):
    """The lines of a UTF-8 text file or, for "-", of standard input."""
    with reading(path, "readable"):
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    with reading(path, "UTF-8 text", "; convert it with iconv"):
        text = raw.decode("utf-8-sig")
    need(text, f"{path}: no lines to read")
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
