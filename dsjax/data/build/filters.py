"""What a file must look like to be learned from. Each rule names where it comes from; docs/corpus.md has the table."""

from __future__ import annotations

import re

from dsjax.data.build.config import Filters
from dsjax.data.build.syntax import parsed

# Codex (Chen et al. 2021) and CodeParrot look for such words in the first lines.
_GENERATED_LINES = 5
_GENERATED = re.compile(
    r"auto[- ]?generated|automatically generated|generated (?:by|from|automatically|code|file)\b|@generated\b"
    r"|\bdo not edit\b|\bdon't edit\b|machine[- ]generated",
    re.IGNORECASE,
)
_MINIFIED = (".min.js", ".min.css", "-min.js")
# StarCoder 2 (Lozhkov et al. 2024), appendix on encoded data: base64, hexadecimal pairs, escapes.
_ENCODED = re.compile(r"[A-Za-z0-9+/\n=]{64,}|(?:\b(?:0x)?[0-9a-fA-F]{2}\b,?\s*){8,}|(?:\\[xu][0-9a-fA-F]{2,4}){8,}")
_ENCODED_RUN = 1024
_WORDLESS = re.compile(r"[A-Za-z_]*(?:\n[A-Za-z_]*)*")  # lines of plain words look like base64, and are not
_NOT_LETTERS = re.compile(r"[\W\d_]+")
_DATA_CHARS = (50, 5000)
_MARKUP = re.compile(r"<script\b.*?</script>|<style\b.*?</style>|<[^>]*>", re.IGNORECASE | re.DOTALL)
PYTHON = (".py", ".pyi")


def reason_to_drop(name: str, text: str, cfg: Filters) -> tuple[str, str]:
    """Why a file is not used, as (rule, what was found); two empty texts if it is used.

    Args:
        name: of the file; its suffix says which rules apply.
        text: its content, not empty.
    """
    suffix = name[name.rfind(".") :].lower() if "." in name else ""
    if len(text.strip()) < cfg.min_chars:
        return "too short", f"{len(text.strip())} characters, min_chars is {cfg.min_chars}"
    if name.lower().endswith(_MINIFIED):
        return "minified", "its name"
    lines = text.splitlines()
    longest = max(map(len, lines), default=0)
    if cfg.max_line_length and longest > cfg.max_line_length:
        return "long line", f"{longest} characters, max_line_length is {cfg.max_line_length}"
    mean = sum(map(len, lines)) / max(len(lines), 1)
    if cfg.max_mean_line_length and mean > cfg.max_mean_line_length:
        return "long lines", f"{mean:.0f} characters on average, max_mean_line_length is {cfg.max_mean_line_length}"
    letters = len(_NOT_LETTERS.sub("", text)) / len(text)
    if letters < cfg.min_letters:
        return "few letters", f"{letters:.2f} of its characters, min_letters is {cfg.min_letters}"
    head = "\n".join(lines[:_GENERATED_LINES])
    if cfg.generated == "drop" and (said := _GENERATED.search(head)):
        return "generated", said[0]
    if cfg.max_encoded and (found := _encoded(text, cfg.max_encoded)):
        return "encoded data", found
    if found := _markup_or_data(suffix, text):
        return "data", found
    if cfg.unparsed == "drop" and suffix in PYTHON and isinstance(wrong := parsed(text), str):
        return "does not parse", wrong
    return "", ""


def _encoded(text: str, most: float) -> str:
    total = 0
    for match in _ENCODED.finditer(text):
        run = match[0]
        if _WORDLESS.fullmatch(run) and len(max(run.split("\n"), key=len)) < 64:
            continue
        total += len(run)
        if len(run) > _ENCODED_RUN:
            return f"a run of {len(run)} characters"
    return f"{total / len(text):.2f} of its characters" if total > most * len(text) else ""


def _markup_or_data(suffix: str, text: str) -> str:
    """DeepSeek-Coder (section 2.1): JSON and YAML of 50 to 5,000 characters, HTML with visible text, no XML."""
    if suffix in (".json", ".yaml", ".yml") and not _DATA_CHARS[0] <= len(text) <= _DATA_CHARS[1]:
        return f"{len(text)} characters of {suffix[1:]}, {_DATA_CHARS[0]} to {_DATA_CHARS[1]} are read"
    if "<?xml version=" in text[:100] and suffix != ".xslt":
        return "XML"
    if suffix in (".html", ".htm"):
        visible = len(_MARKUP.sub("", text).strip())
        if visible < 100 or visible < 0.2 * len(text):
            return f"{visible} visible characters of {len(text)}"
    return ""
