"""``dsjax inspect``: what a resume of a run would take."""

from __future__ import annotations

import json
import pathlib

from dsjax.checkpoint import combined_hash, state_hashes
from dsjax.runs import RunFolder


def inspect_run(folder: pathlib.Path, *, as_json: bool = False) -> None:
    """Prints step, number of parameters and the hash of every part of the state.

    Raises:
        UserError: no run, or no checkpoint.
    """
    run_folder = RunFolder(folder)
    arrays, host, step = run_folder.open_checkpoints().load_numpy()
    hashes = state_hashes(arrays, host)
    num_params = sum(x.size for name, x in arrays.items() if name.startswith("params/"))
    state_hash = combined_hash(hashes)
    if as_json:
        found = {"step": step, "num_params": num_params, "state_hash": state_hash, "hashes": hashes}
        print(json.dumps(found, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(run_folder.name), show_header=False, title_justify="left")
    table.add_row("step", str(step))
    table.add_row("num_params", f"{num_params:,}")
    table.add_row("state_hash", state_hash)
    for part, digest in hashes.items():
        table.add_row(f"  {part}", digest)
    Console(width=100).print(table)
