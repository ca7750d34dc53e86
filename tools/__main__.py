"""What one does with a finished model; each command with --help says more.

python -m tools similarity MODEL "A man reads." "Ein Mann liest."
python -m tools search MODEL corpus.txt ["query in any language"] [--top 5] [--index MODEL2]
python -m tools encode MODEL < lines.txt > vectors.npy
python -m tools info MODEL
python -m tools export MODEL OUT [--weights float16|int8] [--onnx] [--plain]
"""

import argparse
import re
import sys

import numpy as np

from data import meter
from model import need, unit
from tools.checkpoints import load
from tools.cli import Parser, read_texts, run_cli
from tools.export import describe, export
from tools.search import search


def main(argv=None):
    ap = Parser(
        "python -m tools", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = ("float32", "bfloat16")
    ap.add_argument("--dtype", choices=kinds, help="arithmetic; default: the best")
    commands = ap.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, text, *arguments):
        sub = commands.add_parser(name, help=text, description=text)
        for argument in ("model", *arguments):
            sub.add_argument(argument)
        sub.add_argument("--dtype", choices=kinds, default=argparse.SUPPRESS, help="here or before")
        return sub.add_argument

    command("similarity", "the cosine of two sentences", "a", "b")
    add = command("search", "the lines of a text file that are nearest to a query", "corpus")
    add("query", nargs="?", help="without one, each line of standard input is a query")
    add("--top", type=int, default=5, help="lines to show")
    add("--index", metavar="MODEL2", help="encodes the corpus, MODEL the queries; of one space")
    command("encode", "lines of standard input to vectors, a .npy file on standard output")
    command("info", "shape and size")
    add = command("export", "a folder ready to upload, for other programs, too", "out")
    add("--weights", choices=("float32", "float16", "int8"), default="float32")
    add("--onnx", action="store_true", help="for ONNX Runtime, transformers.js and fastembed, too")
    add("--plain", action="store_true", help="without bottleneck and recurrence: opens anywhere")
    args, rest = ap.parse_known_args(argv)
    # Python 3.11 gives an optional positional up at the first flag before it.
    if len(rest) == 1 and getattr(args, "query", "") is None and not rest[0].startswith("-"):
        args.query = rest.pop()
    if rest:
        ap.error(f"unrecognized arguments: {' '.join(rest)}")
    odd = re.search("[\0-\x1f\x7f-\x9f\ud800-\udfff]", " ".join(map(str, vars(args).values())))
    need(not odd, "expected text in UTF-8 without control characters")
    need(getattr(args, "top", 1) > 0, "--top: expected 1 or more")
    if args.command == "export":
        return print(export(args.model, args.out, args.weights, args.onnx, args.plain))
    model = load(args.model, args.dtype)
    if args.command == "similarity":
        a, b = unit(model.encode([args.a, args.b]))
        print(f"{float(a @ b):.4f}")
    elif args.command == "search":
        search(args, model)
    elif args.command == "encode":
        np.save(sys.stdout.buffer, model.encode(read_texts("-"), progress=meter("encode")))
    else:
        print(describe(model))


if __name__ == "__main__":
    run_cli(main)
