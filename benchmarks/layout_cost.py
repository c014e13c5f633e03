"""What layout costs and saves: CPU time for each token with it and without, tokens, and how often it needs escapes.

    taskset -c 0 python benchmarks/layout_cost.py --vocab 4096 --files 120

Two lines of JSON, without layout and with it. Texts are of the standard library, and the tokenizer is trained on them.
`ends` are entries of the vocabulary that end a line, `ends_entropy` is how many bits one of those in a text is worth
alone; `escaped` are files and lines, of those that are given, in which blanks stand in full.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before the tokenizer is loaded

import numpy as np

from dsjax.data.corpus import Source, read_source
from dsjax.data.layout import DEDENT, IN_FULL, Layout
from dsjax.data.structure.stored import scanner
from dsjax.data.token_names import bytes_of
from dsjax.data.tokenizer import Tokenizer, train_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--files", type=int, default=120)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    everything = [document.text for document in read_source(Source()).documents]
    texts = everything[:: max(len(everything) // options.files, 1)][: options.files]
    for layout in (False, True):
        tokenizer = train_tokenizer(texts, options.vocab, layout=layout)
        found = {"layout": layout} | _figures(tokenizer, texts, options.repeat)
        print(json.dumps(found | (_escapes(everything) if layout else {})), flush=True)


def _figures(tokenizer: Tokenizer, texts: list[str], repeat: int) -> dict[str, float]:
    documents = [tokenizer.encode(text) for text in texts]
    num_tokens, num_bytes = sum(ids.size for ids in documents), sum(len(text.encode()) for text in texts)
    ends = np.array([b"\n" in text for text in bytes_of(tokenizer.names(), tokenizer.special_ids)])
    counts = np.bincount(np.concatenate(documents), minlength=len(ends))[ends]
    shares = counts[counts > 0] / counts.sum()
    first = scanner("python", tokenizer)
    times = {
        "encode": _seconds(lambda: [tokenizer.encode(text) for text in texts], repeat),
        "decode": _seconds(lambda: [tokenizer.decode(ids) for ids in documents], repeat),
        "scan": _seconds(lambda: [first.copy().scan(ids) for ids in documents], repeat),
    }
    return {
        "tokens": num_tokens,
        "bytes_per_token": round(num_bytes / num_tokens, 4),
        "ends": int(ends.sum()),
        "ends_share": round(float(counts.sum() / num_tokens), 4),
        "ends_entropy": round(float(-(shares * np.log2(shares)).sum()), 3),
        **{f"{name}_us_per_token": round(seconds / num_tokens * 1e6, 3) for name, seconds in times.items()},
    }


def _escapes(texts: list[str]) -> dict[str, int]:
    forms = [form for text in texts for form in Layout().say(text.encode())]
    return {
        "files": len(forms),
        "escaped_files": sum(IN_FULL in form for form in forms),
        "lines": sum(form.count(b"\n") for form in forms),
        "escaped_lines": sum(form.count(IN_FULL) for form in forms),
        "dedents": sum(form.count(DEDENT) for form in forms),
    }


def _seconds(run, repeat: int) -> float:
    """The least CPU time of a few runs."""
    best = float("inf")
    for _ in range(repeat):
        begin = time.process_time()
        run()
        best = min(best, time.process_time() - begin)
    return best


if __name__ == "__main__":
    main()
