"""What is wrong with the function bodies that a model writes and that do not parse: shares of kinds of syntax errors.

    python benchmarks/sample_errors.py RUN --samples 400

One line of JSON. The shares of `dsjax.data.structure.errors.SHARES` come from it: injected errors are to be such as a
model makes. Python says what is wrong; a class of messages with several kinds of errors is shared out equally.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import pathlib
import textwrap
import warnings

from dsjax.data.structure.stored import prepared
from dsjax.evals.functions import function_prompts, wilson_interval
from dsjax.evals.report import sample_bodies
from dsjax.runs import RunFolder, cache_dir, load_model

# The first that a message contains; what contains none is an invalid syntax like any other.
CLASSES = {
    "bracket": ("was never closed", "unmatched", "does not match"),
    "string": ("unterminated", "f-string", "EOL while scanning"),
    "colon": ("expected ':'",),
    "indentation": ("indent", "inconsistent use of tabs"),
    "assigned": ("cannot assign", "Maybe you meant '=='", "positional argument follows", "expression cannot contain"),
}


def kind_of(error: SyntaxError) -> str:
    """The class of an error."""
    message = f"{type(error).__name__} {error.msg}"
    if isinstance(error, IndentationError):
        return "indentation"
    return next((name for name, texts in CLASSES.items() if any(text in message for text in texts)), "invalid syntax")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("--samples", type=int, default=400)
    options = parser.parse_args()
    model = load_model(RunFolder(options.run))
    corpus = prepared(model.config.data, model.config.model.structure, cache_dir() / "data")
    prompts = function_prompts(corpus.held_out, options.samples)
    counts: collections.Counter[str] = collections.Counter()
    for prompt, (body, finished) in zip(prompts, sample_bodies(model, prompts), strict=True):
        text = textwrap.dedent(" " * prompt.indent + prompt.head.lstrip() + body)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ast.parse(text)
            counts["parses"] += 1
        except SyntaxError as error:
            # What is cut at its last line may lack what would have come.
            lacks_the_rest = not finished and "was never closed" in str(error.msg)
            counts["cut" if lacks_the_rest else kind_of(error)] += 1
    wrong = sum(counts.values()) - counts["parses"] - counts["cut"]
    kinds = {name: n for name, n in counts.items() if name not in ("parses", "cut")}
    shares = {name: [n / wrong, *wilson_interval(n, wrong)] for name, n in kinds.items()}
    print(json.dumps({"samples": len(prompts), **counts, "shares": shares}))


if __name__ == "__main__":
    main()
