"""The plans of docs/plan.md: the seed's mixture on 64 to 4,096 chips, mixture against dense in inference, and published
figures. Everything is the compiler's; nothing here was timed on a chip.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.timing import ROOT
from dsjax.config import UserError, apply_overrides, load_config
from dsjax.plan import report, search
from dsjax.plan.chips import parse_topology
from dsjax.plan.command import Request, jobs
from dsjax.plan.measure import Job
from dsjax.plan.process import ask
from dsjax.train.pretrain import Pretrain

PAGE, PICTURES = ROOT / "docs" / "plan.md", ROOT / "docs" / "images"
# Of 512 parts of a dimension of 6,144 XLA scatters no sums: it adds them up everywhere, so data takes over from fsdp.
SCALING = {
    "v5p:4x4x4": "fsdp=-1,expert=8",
    "v5p:4x8x8": "fsdp=-1,expert=8",
    "v5p:8x8x16": "fsdp=-1,expert=8",
    "v5p:16x16x16": "data=4,fsdp=-1,expert=8",
}
# One micro-batch: a larger batch repeats it.
PRESETS: dict[str, tuple[str, Sequence[str]]] = {
    "deepseek_moe_16b": ("v5p:4x4x4", ("data.batch_size=256", "train.accumulate=1")),
    "deepseek_v2_lite": ("v5p:4x4x4", ("data.batch_size=256", "train.accumulate=1")),
    "deepseek_v3": ("v5p:8x8x8", ("data.batch_size=512", "train.accumulate=1")),
    "seed_moe_175b": ("v5p:4x8x8", ()),
}
SLICE, BATCHES = "v5p:2x2x4", (1, 4, 16, 64, 256)
MODELS = ("seed_moe_175b", "seed_dense_175b", "seed_dense_35b")
PROMPT, CONTEXT = 1024, 4096
Row = Sequence[str]


def config(name: str, *overrides: str) -> Any:
    """A config of the repository."""
    return apply_overrides(load_config(ROOT / "configs" / f"{name}.py"), overrides)


def say(text: str) -> None:
    """A word on standard error: compilations take minutes."""
    print(text, file=sys.stderr, flush=True)


def table(head: Row, rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


# ---------------------------------------------------------------- scaling


def scaling() -> str:
    """Weak scaling of the mixture's training step: one sequence for each chip."""
    plans = []
    for topology, mesh in SCALING.items():
        request = Request([topology], mesh=mesh, rows_per_chip=1)
        for job in jobs(config("seed_moe_175b"), request, [parse_topology(topology)]):
            say(job.topology)
            plans.append(ask(job))
    report.save(report.curves(plans), PICTURES / "plan_scaling.png")
    head = ("chips", "mesh", "GiB a chip", "sent by a chip, GiB", *report.NAMES.values(), "bound", "MFU at best")
    rows = [
        (
            f"{p['num_chips']:,}",
            mesh_of(p),
            f"{p['hbm_bytes_per_chip'] / 2**30:.1f}",
            f"{report.sent(p) / 2**30:.1f}",
            *(report.time_of(p["roofline_seconds"][n]) for n in report.NAMES),
            report.NAMES[p["bound"]],
            f"{p['best_mfu']:.1%}",
        )
        for p in plans
    ]
    sent = {p["num_chips"]: report.sent(p) for p in plans}
    others = ", ".join(f"{n:,}: {size / sent[256] - 1:+.1%}" for n, size in sent.items() if n != 256)
    seconds = ", ".join(f"{p['compile_seconds']:.0f}" for p in plans)
    return (
        f"{table(head, rows)}\n\nBytes sent by a chip, beside those on 256 chips: {others}."
        f" Compiled in {seconds} s, on a machine that did other work."
    )


def mesh_of(plan: dict[str, Any]) -> str:
    """As an override."""
    return "`" + (",".join(f"{axis}={n}" for axis, n in plan["mesh"].items()) or "data=1") + "`"


# ---------------------------------------------------------------- inference


def best(base: Job, batch: int, fitting: int = 2, tries: int = 6) -> dict[str, Any] | None:
    """The plan with the highest bound of the first two that fit, in the order of arithmetic; None: nothing fits."""
    try:
        space = search.candidates(base, parse_topology(base.topology), [batch])
    except UserError:
        return None
    tried: list[search.Tried] = []
    for candidate in space[:tries]:
        if sum(one.fits for one in tried) < fitting:
            tried.append(search.try_one(candidate, lambda text: None))
            if tried[-1].error:
                say(f"{candidate}: {tried[-1].error}")
    first = search.ranked(tried)[0]
    return first.answer if first.fits else None


def inference() -> str:
    """Prefill and decoding of the mixture and of dense models, each on the best mesh of the same slice."""
    plans: dict[tuple[str, str, int], dict[str, Any] | None] = {}
    for mode, length in (("prefill", PROMPT), ("decode", CONTEXT)):
        for name in MODELS:
            for batch in BATCHES:
                say(f"{mode} {name} {batch}")
                base = Job(config(name), SLICE, mode, batch, length)  # type: ignore[arg-type]
                plans[mode, name, batch] = best(base, batch)
    _draw_inference(plans)
    parts = []
    for mode in ("prefill", "decode"):
        rows = [_inference_row(mode, batch, plans) for batch in BATCHES]
        head = ("batch", *(f"{n.removeprefix('seed_')}" for n in MODELS), "175B dense / mixture", "35B dense / mixture")
        head = (*head, "energy, mixture : 175B dense")
        parts.append(f"### {mode.capitalize()}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _inference_row(mode: str, batch: int, plans: dict[Any, Any]) -> Row:
    found = [plans[mode, name, batch] for name in MODELS]
    moe, dense, small = found

    def cell(plan: Any) -> str:
        if plan is None:
            return "does not fit"
        step = report.time_of(step_seconds(plan))
        return f"{step} ({plan['bound']}, {mesh_of(plan)}, {plan['hbm_bytes_per_chip'] / 2**30:.0f} GiB)"

    def ratio(plan: Any) -> str:
        return "" if plan is None or moe is None else f"{step_seconds(plan) / step_seconds(moe):.2f}"

    energy = ""
    if moe and dense:
        joules = [p["energy_joules_per_token"]["total"] for p in (moe, dense)]
        energy = f"{joules[0]:.2g} J : {joules[1]:.2g} J ({joules[0] / joules[1] - 1:+.0%})"
    return (str(batch), *map(cell, found), ratio(dense), ratio(small), energy)


def step_seconds(plan: dict[str, Any]) -> float:
    """The roofline of a step."""
    return plan["roofline_seconds"][plan["bound"]]


def _draw_inference(plans: dict[Any, Any]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.4), layout="constrained")
    axes = figure.subplots(2, 3)
    for row, mode in zip(axes, ("prefill", "decode"), strict=True):
        for name in MODELS:
            points = [(b, plans[mode, name, b]) for b in BATCHES if plans[mode, name, b]]
            x, label = [b for b, _ in points], name.removeprefix("seed_")
            row[0].plot(x, [step_seconds(p) for _, p in points], "o-", label=label)
            row[2].plot(x, [p["energy_joules_per_token"]["total"] for _, p in points], "o-", label=label)
        both = [(b, plans[mode, MODELS[1], b], plans[mode, MODELS[0], b]) for b in BATCHES]
        both = [(b, d, m) for b, d, m in both if d and m]
        row[1].plot([b for b, _, _ in both], [step_seconds(d) / step_seconds(m) for _, d, m in both], "o-")
        row[1].axhline(4.2, color="gray", linestyle="--", label="the seed: 4.2")
        row[0].set(title=f"{mode}: a step at best", ylabel="seconds", yscale="log")
        row[1].set(title=f"{mode}: mixture faster than 175B dense", ylabel="times", ylim=(0, None))
        row[2].set(title=f"{mode}: dynamic energy of a token", ylabel="J", yscale="log")
        for one in row:
            one.set(xlabel="batch", xscale="log")
            one.set_xticks(BATCHES, [str(b) for b in BATCHES])
            one.grid(alpha=0.3)
            one.legend()
    report.save(figure, PICTURES / "plan_inference.png")


# ---------------------------------------------------------------- presets


def presets() -> str:
    """Training steps of the configs with experts, on their own meshes."""
    rows = []
    for name, (topology, words) in PRESETS.items():
        say(name)
        plan = ask(Job(config(name, *words), topology, "train"))
        rows.append(_preset_row(name, plan))
    head = ("config", "chips", "mesh", "tokens a step", "GiB a chip", "all-to-all, GiB a chip", "sent in all, GiB")
    return table((*head, *report.NAMES.values(), "bound", "MFU at best"), rows)


def _preset_row(name: str, plan: dict[str, Any]) -> Row:
    devices = plan["num_devices"] / plan["num_chips"]
    exchanged = sum(kinds.get("ragged-all-to-all", 0) for kinds in plan["collective_bytes"].values()) * devices
    return (
        f"`{name}`",
        f"{plan['num_chips']:,}",
        mesh_of(plan),
        f"{plan['tokens_per_step']:,}",
        f"{plan['hbm_bytes_per_chip'] / 2**30:.1f}",
        f"{exchanged / 2**30:.1f}",
        f"{report.sent(plan) / 2**30:.1f}",
        *(report.time_of(plan["roofline_seconds"][n]) for n in report.NAMES),
        report.NAMES[plan["bound"]],
        f"{plan['best_mfu']:.1%}",
    )


# ---------------------------------------------------------------- published figures


def deepseek_v3() -> Pretrain:
    """DeepSeek-V3 as MaxText trains it on 512 chips."""
    words = ("data.seq_len=8192", f"data.batch_size={6 * 512}", "train.accumulate=6", "mesh=data=1,fsdp=64,expert=8")
    return config("deepseek_v3", *words)


def deepseek_v2_lite() -> Pretrain:
    """DeepSeek-V2-Lite as MaxText trains it on 4 chips."""
    words = ("data.seq_len=2048", "data.batch_size=96", "train.accumulate=1", "mesh=data=1,fsdp=4,expert=1")
    return config("deepseek_v2_lite", *words)


def published() -> str:
    """Plans beside what others published of the same job."""
    rows: list[Row] = []
    for title, job, read, theirs in _published_jobs():
        say(title)
        try:
            plan = ask(job)
            rows.append((title, read(plan), theirs))
        except UserError as error:
            rows.append((title, str(error), theirs))
    return table(("job", "plan", "published"), rows)


def _published_jobs() -> list[tuple[str, Job, Callable[[dict[str, Any]], str], str]]:
    def memory(plan: dict[str, Any]) -> str:
        parts = plan["hbm_breakdown_bytes"]
        taken = sum(parts.get(k, 0) for k in ("parameters", "optimizer", "buffers", "batch", "cache"))
        return (
            f"arguments {taken / 2**30:.1f} GiB, all buffers {plan['hbm_sum_of_buffers_bytes'] / 2**30:.1f},"
            f" live at the peak {plan['hbm_bytes_per_chip'] / 2**30:.1f}; fits: {plan['fits']}"
        )

    def training(plan: dict[str, Any]) -> str:
        work = f"{plan['flops_per_step'] / plan['num_chips'] / 1e12:,.0f} TFLOP a chip and step"
        if plan["best_mfu"] is not None:
            work += f", MFU at most {plan['best_mfu']:.1%} ({plan['bound']})"
        return f"{work}; {memory(plan)}"

    def decoding(plan: dict[str, Any]) -> str:
        return f"at most {plan['tokens_per_second_bound']:,.0f} tokens/s ({plan['bound']}); {memory(plan)}"

    decode = apply_overrides(config("llama2_7b"), ["mesh=data=1,tensor=8"])
    return [
        (
            "Llama-2-7B, training, v5e:16x16, 4 x 2,048 tokens a chip",
            Job(config("llama2_7b"), "v5e:16x16", "train"),
            training,
            "MaxText ships this configuration for 256 chips (no figure); a 16B dense model there: MFU 61.1 %",
        ),
        (
            "Llama-2-7B, decoding, v5e:2x4, 88 sequences of 2,048",
            Job(decode, "v5e:2x4", "decode", 88, 2048),
            decoding,
            "JetStream: runs; 3,062 output tokens/s, with its prefills on the same chips",
        ),
        (
            "DeepSeek-V2-Lite's shape, training, v5p:2x2x1, 24 x 2,048 tokens a chip",
            Job(deepseek_v2_lite(), "v5p:2x2x1", "train"),
            training,
            "MaxText: arguments 44.5 GiB, all buffers 100.4 (and it ran, with 95.74); 765 TFLOP a chip; MFU 29.4 %",
        ),
        (
            "DeepSeek-V3's shape, training, v5p:8x8x8, 6 x 8,192 tokens a chip (here one after the other)",
            Job(deepseek_v3(), "v5p:8x8x8", "train"),
            training,
            "MaxText: 13,819 TFLOP a chip and step, MFU 33.2 %; activations partly in host memory",
        ),
    ]


# ---------------------------------------------------------------- the page

PARTS: dict[str, Callable[[], str]] = {
    "scaling": scaling,
    "presets": presets,
    "inference": inference,
    "published": published,
}


def write(names: Sequence[str]) -> None:
    """Makes the named parts anew, each between its markers in docs/plan.md, and their pictures."""
    for name in names:
        text = PARTS[name]()
        page = PAGE.read_text(encoding="utf-8")
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, after = page.split(begin)[0], page.split(end)[1]
        PAGE.write_text(f"{before}{begin}\n{text}\n\n{end}{after}", encoding="utf-8")
        print(text)
