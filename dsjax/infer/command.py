"""``dsjax generate``: a continuation, printed as it comes."""

from __future__ import annotations

import pathlib

from dsjax.config import UserError, validate
from dsjax.infer.engine import generate, heal
from dsjax.infer.sampling import SamplingConfig
from dsjax.runs import RunFolder, load_model


def stream(folder: pathlib.Path, prompt: str, *, max_tokens: int, temperature: float, top_p: float, seed: int) -> None:
    """Prints prompt and continuation to standard output.

    Raises:
        UserError: a value out of range, no run, or a prompt too long for the model.
    """
    sampling = SamplingConfig(temperature=temperature, top_p=top_p)
    try:
        validate(sampling)
    except UserError as error:
        raise UserError(f"--{error}".replace("_", "-")) from None
    if max_tokens < 1:
        raise UserError(f"--max-tokens is {max_tokens}; it must be at least 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"--seed is {seed}; it must be at least 0 and below 2**32")
    model = load_model(RunFolder(folder))
    tokenizer = model.tokenizer
    ids = [tokenizer.end_id, *tokenizer.encode(prompt).tolist()]
    healed, first = heal(tokenizer, ids)
    new: list[int] = healed[1:]
    text, shown = prompt, 0
    for part in generate(
        model.graph,
        model.params,
        [healed],
        max_tokens=max_tokens,
        end_id=tokenizer.end_id,
        max_length=model.config.data.seq_len,
        sampling=sampling,
        seed=seed,
        first_tokens=[first],
    ):
        new += part[0].tolist()
        text = tokenizer.decode(new)
        whole = text[:-1] if text.endswith("�") else text  # a character may be cut between tokens
        print(whole[shown:], end="", flush=True)
        shown = max(shown, len(whole))
    print(text[shown:])
