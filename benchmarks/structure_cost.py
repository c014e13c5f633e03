"""What features of syntax cost, beside tokenising the same text: CPU time for each token, on one core.

    taskset -c 0 python benchmarks/structure_cost.py --vocab 4096 --files 200

One line of JSON. `tokenise` is the tokenizer alone, on one thread; `scan` a scanner that has met the tokens before,
`first_scan` one that has not; `feed` token by token; `row` what a row of training costs, without features and with them
from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import time

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # before the tokenizer is loaded

import numpy as np

from dsjax.data.corpus import Source, read_source
from dsjax.data.pipeline import PackedRows
from dsjax.data.prepare import TokenStore
from dsjax.data.structure.stored import scanner
from dsjax.data.tokenizer import train_tokenizer

SEQ_LEN = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--files", type=int, default=200)
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    texts = [document.text for document in read_source(Source()).documents]
    texts = texts[:: max(len(texts) // options.files, 1)][: options.files]
    tokenizer = train_tokenizer(texts, options.vocab)

    def tokenised() -> list[np.ndarray]:
        return [tokenizer.encode(text) for text in texts]

    documents = tokenised()
    num_tokens = sum(ids.size for ids in documents)
    found: dict[str, float] = {
        "tokens": num_tokens,
        "bytes": sum(len(text.encode()) for text in texts),
        "vocab": tokenizer.vocab_size,
    }
    new = scanner("python", tokenizer)
    times = {"first_scan": _seconds(lambda: [new.copy().scan(ids) for ids in documents], 1)}
    times["tokenise"] = _seconds(tokenised, options.repeat)
    times["scan"] = _seconds(lambda: [new.copy().scan(ids) for ids in documents], options.repeat)
    some = documents[: max(len(documents) // 10, 1)]
    share = num_tokens / sum(ids.size for ids in some)

    def fed() -> None:
        for ids in some:
            one = new.copy()
            for token in ids.tolist():
                one.feed(token)

    times["feed"] = _seconds(fed, 1) * share
    features = np.concatenate([new.copy().scan(ids) for ids in documents])
    offsets = np.concatenate(([0], np.cumsum([ids.size for ids in documents], dtype=np.int64)))
    plain = TokenStore(np.concatenate(documents), offsets)
    stored = TokenStore(plain.tokens, offsets, features.reshape(-1))
    for name, store in (("row", plain), ("row_with_features", stored)):
        rows = PackedRows(store, seq_len=SEQ_LEN, seed=0, end_id=tokenizer.end_id)
        times[name] = _seconds(lambda rows=rows: [rows[i] for i in range(rows.num_rows)], options.repeat)
    found |= {f"{name}_us_per_token": round(seconds / num_tokens * 1e6, 4) for name, seconds in times.items()}
    print(json.dumps(found))


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
