"""Experts on a mesh: tokens go to them and come back, and every mesh gives what one device gives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from dsjax.config import apply_overrides
from dsjax.nn import expert_parallel
from dsjax.nn.exchange import Hop, bring_back, make_hop, send
from dsjax.nn.expert_parallel import apply_experts
from dsjax.nn.moe import MoE, MoEConfig
from dsjax.nn.placement import Placement, place_experts
from dsjax.nn.router import router_metrics
from dsjax.sharding import INFERENCE, MeshConfig, Rules, make_mesh, map_shards, use_mesh
from pallas_kernels.expert_dispatch import top_k_route

B, T, D, F, E, X = 8, 8, 6, 8, 16, 3
TOKENS = ("batch", "length", None)


def arguments(seed: int = 0, skew: float = 1.5) -> dict[str, Any]:
    """Tokens, routing scores that prefer some experts, weights, and what the results are multiplied with."""
    rng = np.random.default_rng(seed)
    shapes = {
        "x_BTD": (B, T, D),
        "scores_BTE": (B, T, E),
        "w_gate": (E, D, F),
        "w_up": (E, D, F),
        "w_down": (E, F, D),
        "dy_BTD": (B, T, D),
    }
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    made["scores_BTE"] = np.exp(made["scores_BTE"] - skew * np.log1p(np.arange(E)))
    made["counted_BT"] = rng.random((B, T)) < 0.9
    return made


def loop(a: dict[str, Any], capacity: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Token after token, expert after expert, in float64."""
    taken, y = np.zeros(E, int), np.zeros((B, T, D))
    for b in range(B):
        for t in range(T):
            for e in np.argsort(-a["scores_BTE"][b, t], kind="stable")[:X]:
                if a["counted_BT"][b, t] and (capacity is None or taken[e] < capacity):
                    x, gate, up, down = (
                        np.float64(v) for v in (a["x_BTD"][b, t], a["w_gate"][e], a["w_up"][e], a["w_down"][e])
                    )
                    h = x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)
                    y[b, t] += a["scores_BTE"][b, t, e] * (h @ down)
                    taken[e] += 1
    return y, taken


def layer(a: dict[str, Any], capacity: int | None, placement: Placement | None = None) -> tuple[jax.Array, jax.Array]:
    """The routed experts as MoE calls them."""

    def routed(x_BTD, scores_BTE, counted_BT, w_gate_eDF, w_up_eDF, w_down_eFD):
        choice = top_k_route(scores_BTE.reshape(-1, E), X, counted_T=counted_BT.reshape(-1))
        y_TD, kept_E = apply_experts(
            x_BTD.reshape(-1, D),
            choice,
            choice.scores_TX,
            w_gate_eDF,
            w_up_eDF,
            w_down_eFD,
            capacity=capacity,
            num_sequences=len(x_BTD),
            placement=placement,
        )
        return y_TD.reshape(x_BTD.shape), kept_E

    up, down = ("expert", None, "mlp"), ("expert", "mlp", None)
    specs = (TOKENS, TOKENS, ("batch", "length"), up, up, down)
    names = ("x_BTD", "scores_BTE", "counted_BT", "w_gate", "w_up", "w_down")
    return map_shards(routed, specs, (TOKENS, (None,)))(*(a[name] for name in names))


LEARNED = ("x_BTD", "scores_BTE", "w_gate", "w_up", "w_down")


def results(
    a: dict[str, Any],
    mesh: str = "data=1",
    rules: Rules = Rules(),
    capacity: int | None = None,
    placement: Placement | None = None,
) -> Any:
    """Output, pairs by expert, and gradients."""
    placed = make_mesh(
        apply_overrides(MeshConfig(data=1), mesh.split(",")), jax.devices()[:1] if mesh == "data=1" else None
    )

    @jax.jit
    def run(a, placement):
        def total(learned):
            with use_mesh(placed, rules):
                y_BTD, kept_E = layer(a | learned, capacity, placement)
            return jnp.sum(y_BTD * a["dy_BTD"]), (y_BTD, kept_E)

        return jax.value_and_grad(total, has_aux=True)({name: a[name] for name in LEARNED})

    (_, (y_BTD, kept_E)), grads = run(a, placement)
    return y_BTD, kept_E, grads


def assert_same(got: Any, want: Any) -> None:
    np.testing.assert_array_equal(got[1], want[1])
    # float32 sums in another order; an element near 0 is a difference of such: errors go with the largest
    close = lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * np.abs(w).max())  # noqa: E731
    jax.tree.map(close, (got[0], got[2]), (want[0], want[2]))


@functools.cache
def on_one_device(capacity: int | None) -> Any:
    return results(arguments(), capacity=capacity)


MESHES = [
    "data=8",
    "fsdp=8",
    "tensor=8",
    "expert=8",
    "context=8",
    "fsdp=4,data=2",
    "expert=4,tensor=2",
    "fsdp=2,expert=2,tensor=2",
    "fsdp=2,expert=2,context=2",
    "data=2,expert=4",
]
ACROSS = dataclasses.replace(Rules(), expert=("data", "expert"))


@pytest.mark.parametrize("capacity", [None, 9])
def test_one_device_does_what_a_loop_does(capacity: int | None) -> None:
    y_BTD, kept_E, _ = on_one_device(capacity)
    want, taken = loop(arguments(), capacity)
    np.testing.assert_allclose(y_BTD, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(kept_E, taken)
    if capacity is not None:
        assert (taken == capacity).sum() > 1  # something is dropped
        assert taken.sum() < arguments()["counted_BT"].sum() * X


def each_mesh(meshes: Sequence[str], capacities: Sequence[int | None] = (None, 9)) -> list[Any]:
    """Each mesh with one of the capacities in turn; the other pairs are slow."""
    return [
        pytest.param(mesh, capacity, marks=[pytest.mark.slow] if (i + j) % len(capacities) else [])
        for i, mesh in enumerate(meshes)
        for j, capacity in enumerate(capacities)
    ]


@pytest.mark.parametrize(("mesh", "capacity"), each_mesh(MESHES))
def test_every_mesh_gives_what_one_device_gives(mesh: str, capacity: int | None) -> None:
    assert_same(results(arguments(), mesh, capacity=capacity), on_one_device(capacity))


@pytest.mark.parametrize(
    ("mesh", "capacity"), each_mesh(["data=2,expert=4", "data=4,expert=2", "data=2,expert=2,tensor=2", "data=8"])
)
def test_two_levels_of_the_network_give_what_one_device_gives(mesh: str, capacity: int | None) -> None:
    """Experts are cut over the slices, too: rows first go to the right slice, then to the device in it."""
    assert_same(results(arguments(), mesh, ACROSS, capacity), on_one_device(capacity))


@pytest.mark.parametrize("capacity", [None, 9])
@pytest.mark.parametrize("rules", [Rules(), INFERENCE], ids=["training", "inference"])
def test_devices_that_all_have_the_same_rows(rules: Rules, capacity: int | None) -> None:
    rules = dataclasses.replace(rules, batch=("data",))
    assert_same(results(arguments(), "data=2,expert=4", rules, capacity), on_one_device(capacity))


# ---------------------------------------------------------------- experts in several places


def placement(parts: int, *, home: bool) -> Placement:
    """Two slots more for each of ``parts`` devices, for the loads of the batch."""
    return place_experts(np.asarray(on_one_device(None)[1]), parts, E // parts + 2, home=home)


@pytest.mark.parametrize(
    ("home", "capacity"), [pytest.param(True, None, marks=pytest.mark.slow), (True, 9), (False, 9)]
)
@pytest.mark.parametrize(
    ("mesh", "parts", "rules"),
    [("data=1", 1, Rules()), ("expert=8", 8, Rules()), ("fsdp=2,expert=2,context=2", 2, Rules())]
    + [("data=2,expert=2,tensor=2", 4, ACROSS)]
    + [("data=2,expert=4", 4, dataclasses.replace(INFERENCE, batch=("data",)))],
    ids=["one-device", "expert", "all-axes", "two-levels", "same-rows"],
)
def test_replicas_change_no_result(mesh: str, parts: int, rules: Rules, home: bool, capacity: int | None) -> None:
    """Gradients of replicas are summed; the same pairs are dropped."""
    got = results(arguments(), mesh, rules, capacity, placement(parts, home=home))
    assert_same(got, on_one_device(capacity))


@pytest.mark.parametrize("batch", [("data", "expert"), ("data",)], ids=["rows-cut", "same-rows"])
def test_weights_can_be_placed_once(batch: tuple[str, ...]) -> None:
    """As decoding does: the weights are those of slots, cut over the expert axis."""
    found, a = placement(4, home=False), arguments()
    a |= {name: a[name][found.expert_P] for name in ("w_gate", "w_up", "w_down")}
    got = results(a, "data=2,expert=4", dataclasses.replace(INFERENCE, batch=batch), None, found)
    want = on_one_device(None)
    sums = {n: jnp.zeros((E, *g.shape[1:])).at[found.expert_P].add(g) for n, g in got[2].items() if n.startswith("w_")}
    assert_same((*got[:2], got[2] | sums), want)


# ---------------------------------------------------------------- the exchange


def exchanged(counts_NE: np.ndarray, rows_NRD: np.ndarray) -> Any:
    """Of each device: what arrives, what comes back, the rows of its experts, and the segments out and in."""
    N, R = rows_NRD.shape[:2]
    mesh = Mesh(np.array(jax.devices()[:N]), ("expert",))

    def run(rows_1RD, counts_1E):
        hop = make_hop(counts_1E[0], "expert", num_sent=R, num_received=N * R, num_slots=R)
        there_SD = send(rows_1RD[0], hop)
        everything = (there_SD, bring_back(there_SD, hop), hop.sizes_e, hop.segments())
        return jax.tree.map(lambda a: a[None], everything)

    spec = PartitionSpec("expert")
    mapped = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(mapped)(rows_NRD, counts_NE))


def ragged_all_to_all(rows_NRD: np.ndarray, num_rows: int, out: Any, into: Any) -> np.ndarray:
    """As the documentation of `jax.lax.ragged_all_to_all` defines it: who sends what, where it is written."""
    N, U = out.sizes_U.shape
    result = np.full((N, num_rows, rows_NRD.shape[2]), np.nan, rows_NRD.dtype)
    for source in range(N):
        for i in range(U):
            to, size = i // (U // N), out.sizes_U[source, i]
            same = source * (U // N) + i % (U // N)
            assert size == into.sizes_U[to, same]
            begin, target = out.here_U[source, i], out.there_U[source, i]
            result[to, target : target + size] = rows_NRD[source, begin : begin + size]
    return result


@pytest.mark.parametrize("case", ["random", "all to one", "one sender", "nothing", "one expert each"])
def test_the_padded_exchange_is_the_ragged_one(case: str) -> None:
    """The form for CPU does what TPU and GPU are told to do with the same segments, there and back."""
    N, rng = 4, np.random.default_rng(0)
    counts_NE = rng.integers(0, 5, (N, 2 * N)) * (rng.random((N, 2 * N)) < 0.7)
    if case == "all to one":
        counts_NE *= np.arange(2 * N) == 5
    if case == "one sender":
        counts_NE[np.arange(N) != 2] = 0
    if case == "nothing":
        counts_NE *= 0
    if case == "one expert each":
        counts_NE = counts_NE[:, ::2]
    counts_NE, R = counts_NE.astype(np.int32), int(counts_NE.sum(axis=1).max()) + 2
    rows_NRD = rng.normal(size=(N, R, 3)).astype(np.float32)
    rows_NRD[np.arange(R) >= counts_NE.sum(axis=1)[:, None]] = np.nan  # no row stands there

    there, back, sizes_Ne, (out, into) = exchanged(counts_NE, rows_NRD)
    np.testing.assert_array_equal(sizes_Ne.reshape(-1), counts_NE.sum(axis=0))
    want, homewards = ragged_all_to_all(rows_NRD, N * R, out, into), ragged_all_to_all(there, R, into, out)
    for n in range(N):
        arrived, sent = sizes_Ne[n].sum(), counts_NE[n].sum()
        assert not np.isnan(want[n, :arrived]).any()
        np.testing.assert_array_equal(there[n, :arrived], want[n, :arrived])
        np.testing.assert_array_equal(homewards[n, :sent], rows_NRD[n, :sent])
        np.testing.assert_array_equal(back[n, :sent], rows_NRD[n, :sent])
        # Sorted by expert, and by sender.
        begin_NE = np.cumsum(counts_NE, axis=1) - counts_NE
        experts = range(n * sizes_Ne.shape[1], (n + 1) * sizes_Ne.shape[1])
        parts = [rows_NRD[s, begin_NE[s, e] : begin_NE[s, e] + counts_NE[s, e]] for e in experts for s in range(N)]
        np.testing.assert_array_equal(there[n, :arrived], np.concatenate(parts))


# ---------------------------------------------------------------- what is lost on the way is counted


def unaccounted(mesh: str, rules: Rules = Rules()) -> float:
    """Of a layer of experts that may not drop any pair."""
    moe, a = MoE(MoEConfig(num_experts=E, top_k=X, d_ff=F), D, rngs=nnx.Rngs(0)), arguments()
    placed = make_mesh(apply_overrides(MeshConfig(data=1), mesh.split(",")))

    @jax.jit
    def run(moe: MoE, x_BTD: jax.Array, counted_BT: jax.Array) -> Any:
        with use_mesh(placed, rules):
            return moe(x_BTD, counted_BT)[1].sums

    sums = run(moe, a["x_BTD"], a["counted_BT"].astype(np.float32))
    assert int(sums.pairs) == a["counted_BT"].sum() * X == sums.load_E.sum()
    return float(router_metrics(jax.tree.map(lambda x: x[None], sums))["unaccounted"])


def hop_with(**changes: Any) -> Any:
    """An exchange that is set up wrong."""

    def make(counts_E: Any, axis: str, **sizes: Any) -> Hop:
        counts_E = changes.get("counts", lambda counts_E: counts_E)(counts_E)
        return make_hop(counts_E, axis, **{name: changes.get(name, lambda n: n)(n) for name, n in sizes.items()})

    return make


LOSSES = {
    "nothing": {},
    "the last row of each segment": {"counts": lambda counts_E: jnp.maximum(counts_E - 1, 0)},
    "what one expert is sent": {"counts": lambda counts_E: counts_E.at[0].set(0)},
    "what finds no room in the slots for a device": {"num_slots": lambda n: n // 4},
    "what finds no room where it arrives": {"num_received": lambda n: n // 4},
}


@pytest.mark.parametrize(("mesh", "rules"), [("fsdp=2,expert=4", Rules()), ("data=2,expert=4", ACROSS)])
@pytest.mark.parametrize("what", LOSSES)
def test_pairs_that_the_exchange_loses_are_unaccounted_for(
    what: str, mesh: str, rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_parallel, "make_hop", hop_with(**LOSSES[what]))
    assert (unaccounted(mesh, rules) > 0) == (what != "nothing")


def test_rows_that_never_reach_the_products_are_unaccounted_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all devices have the same rows, and nothing is exchanged."""
    rules = dataclasses.replace(INFERENCE, batch=("data",))
    assert unaccounted("data=2,expert=4", rules) == 0
    plan_dispatch = expert_parallel.plan_dispatch
    one_less = lambda experts_TX, num, **o: plan_dispatch(experts_TX, num, **o | {"limit_E": o["counts_E"] - 1})  # noqa: E731
    monkeypatch.setattr(expert_parallel, "plan_dispatch", one_less)
    assert unaccounted("data=2,expert=4", rules) > 0
