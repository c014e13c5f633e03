"""Seeded damage to files: bytes, JSON, safetensors. The same seed gives the same mutant."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

_RAW = "\x01raw\x01"  # stands for a text that `json.dumps` would not write

# What a JSON value becomes, as text: numbers past every type, what JSON has not, names that climb, depth, size.
HOSTILE = (
    *("null", "true", "false", "0", "-1", "1.5", "-0.0", "1e999", "-1e999", "1e-400", "NaN", "Infinity", "-Infinity"),
    *(str(2**31), str(2**32 - 1), str(2**53 + 1), str(2**62), str(2**63), str(2**64), "9" * 5000, f"0.{'1' * 5000}"),
    *('""', '"\\u0000"', '"\\ud800"', '"\\udfff\\ud800"', '"\udcff"', '"é深😀"', '"\\n"', f'"{"x" * 100_000}"'),
    *('"../../etc/hostname"', '"/etc/hostname"', '"a/../../b"', '"."', '".."', '"a//b"', '"C:\\\\x"', '"\\\\\\\\x"'),
    *("[]", "{}", "[[]]", "[{}]", '{"type": "x"}', f"[{2**62}]", f"[{2**62}, {2**62}, 0]", f"[0, {2**62}]", "[-1]"),
    *("[" * n + "]" * n for n in (50, 500, 5000, 100_000)),
    *('{"a":' * n + "1" + "}" * n for n in (100, 1000, 100_000)),
    *("[" * 100_000, "," * 10, "{", '"', "'x'", "undefined", "\\", "/**/1", f"[{'0,' * 20_000}0]"),
)


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, insertions, repetitions, zeroed and swapped stretches."""
    if not content:
        return rng.randbytes(3)
    a, b = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    at, piece = rng.randrange(len(content)), content[a : min(b, a + 64)]

    def flipped() -> bytes:
        out = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 8, 100))):
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        return bytes(out)

    kinds: list[Callable[[], bytes]] = [
        *(flipped,) * 3,
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[:a] + content[b:],
        lambda: content[:at] + rng.randbytes(rng.choice((1, 2, 8, 1000))) + content[at:],
        lambda: content[:at] + rng.choice((b"\0", b"\xff", b"\n", b"{", b"[", b'"', b"9")) * 9 + content[at:],
        lambda: content[:at] + piece + content[at:],
        lambda: content[:a] + b"\0" * (b - a) + content[b:],
        lambda: content[b:] + content[:b],
        lambda: content + rng.randbytes(rng.choice((1, 7, 4096))),
        lambda: content + content,
        lambda: b"",
        lambda: rng.randbytes(len(content)),
    ]
    return rng.choice(kinds)()


def mutate_json(content: bytes, rng: random.Random) -> bytes:
    """Damages one value, name or pair of a JSON document and leaves the rest as it is."""
    tree = json.loads(content)
    parent, key = rng.choice(list(_places(tree)) or [([tree], 0)])
    raw = rng.choice(HOSTILE)
    kind = rng.randrange(8)
    if kind < 4:
        parent[key] = _RAW
    elif kind == 4:
        del parent[key]
    elif kind == 5:
        other, where = rng.choice(list(_places(tree)))
        parent[key] = json.loads(json.dumps(other[where]))
    elif isinstance(parent, dict) and kind == 6:  # the name
        parent[rng.choice((_RAW, f"{key}x", "", "type", "..", "../x", "__class__"))] = parent.pop(key)
        raw = rng.choice([text for text in HOSTILE if text.startswith('"')])
    elif isinstance(parent, dict):  # the same name twice
        again = json.dumps(key)
        value, parent[key] = json.dumps(parent[key]), _RAW
        raw = f"{raw},{again}:{value}" if rng.random() < 0.5 else f"{value},{again}:{raw}"
    else:
        parent.insert(key, _RAW)
    text = json.dumps(tree, indent=rng.choice((None, 1)))
    return text.replace(json.dumps(_RAW), raw).encode("utf-8", "surrogateescape")


def _places(tree: Any) -> Any:
    """(container, key) of every value in a document."""
    stack = [tree]
    while stack:
        node = stack.pop()
        items = (
            list(node.items() if isinstance(node, dict) else enumerate(node)) if isinstance(node, dict | list) else []
        )
        for key, value in items:
            yield node, key
            stack.append(value)


def mutate_document(content: bytes, rng: random.Random) -> bytes:
    """JSON, damaged as a document or as bytes."""
    return mutate_json(content, rng) if rng.random() < 0.75 else mutate_bytes(content, rng)


def mutate_lines(content: bytes, rng: random.Random) -> bytes:
    """JSON lines, one of them damaged as a document, or all as bytes."""
    lines = content.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = mutate_document(lines[at], rng)
    return b"\n".join(lines) + b"\n" if rng.random() < 0.7 else mutate_bytes(content, rng)


def mutate_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A header that lies: about its length, its tensors, their places; or damaged bytes."""
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    kind = rng.randrange(4)
    if kind == 0:
        return mutate_bytes(content, rng)
    if kind == 1:
        lie = rng.choice((0, 1, size - 1, size + 1, 2**20, 100_000_001, 2**31, 2**62, 2**63, 2**64 - 1, len(content)))
        return lie.to_bytes(8, "little") + content[8:]
    if kind == 2:
        tree = json.loads(header)
        tensor = tree[rng.choice([name for name in tree if name != "__metadata__"])]
        begin, end = tensor["data_offsets"]
        tensor |= rng.choice(
            (
                {"data_offsets": [end, begin]},
                {"data_offsets": [begin + 1, end + 1]},
                {"data_offsets": [begin, 2**62]},
                {"data_offsets": [2**64 - 8, 2**64 - 8 + end - begin]},
                {"data_offsets": [0, 0], "shape": [0, 2**62]},
                {"shape": [2**62]},
                {"shape": [2**32, 2**32]},
                {"shape": [1] * 100 + tensor["shape"]},
                {"shape": [*tensor["shape"], 2]},
                {"shape": tensor["shape"][::-1]},
                {"dtype": rng.choice(("F64", "F4", "F6_E2M3", "C64", "BOOL", "I64", "bf16", "F8_E4M3"))},
            )
        )
        header = json.dumps(tree).encode()
    else:
        header = mutate_document(header, rng)
    return len(header).to_bytes(8, "little") + header + data
