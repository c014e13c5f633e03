"""Every algorithm finds the optimum of small problems that are known to the last number.

Policies and critics are tables. Episodes go through the functions that texts go through: advantages, weights, the
objective; only the model is another. A step's reward enters as the negative of what a token costs.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dsjax.nn.masks import Documents
from dsjax.rl.advantages import AdvantageConfig, advantages
from dsjax.rl.algorithms import PRESETS
from dsjax.rl.experience import Experience, token_weights
from dsjax.rl.policy import PolicyConfig, policy_objective

S, A, T = 8, 3, 4  # states, the last one the end of an episode; actions; steps at the most
P, K, EPOCHS, MINIBATCHES = 8, 8, 2, 2  # groups, episodes of each, and how they are learned from
NOISE = 0.2  # of each reward, standard deviation
END = S - 1


@dataclasses.dataclass
class Problem:
    """to_SAS: probabilities of the next state; reward_SA: the mean. Begins in state 0; in the end nothing happens."""

    to_SAS: np.ndarray
    reward_SA: np.ndarray


def problem(*steps: tuple[int, int, float, dict[int, float]]) -> Problem:
    """(state, action, mean reward, next states) each; what is not named ends the episode for nothing."""
    to_SAS, reward_SA = np.zeros((S, A, S)), np.zeros((S, A))
    to_SAS[..., END] = 1
    for state, action, reward, following in steps:
        to_SAS[state, action], reward_SA[state, action] = 0, reward
        for after, share in following.items():
            to_SAS[state, action, after] = share
    return Problem(to_SAS, reward_SA)


ENDS = {END: 1.0}
PROBLEMS = {
    "bandit": problem((0, 0, 0.2, ENDS), (0, 1, 1.0, ENDS), (0, 2, 0.6, ENDS)),
    # what is best at once ends it; the other way has nothing first
    "chain": problem((0, 0, 0.4, ENDS), (0, 1, 0.0, {1: 1.0}), (1, 0, 0.2, ENDS), (1, 2, 1.0, ENDS)),
    # seven states and chance: the sure way to 1 is worse than the way to 2, which slips to 3 at times, and is mended
    # there; an episode has one to four steps
    "mdp": problem(
        (0, 0, 0.3, {1: 1.0}),
        (0, 1, 0.0, {2: 0.7, 3: 0.3}),
        (0, 2, 0.1, {1: 0.5, END: 0.5}),
        (1, 0, 0.2, {4: 1.0}),
        (1, 1, 0.3, {4: 0.5, 5: 0.5}),
        (2, 0, 0.5, {6: 0.8, 5: 0.2}),
        (2, 1, 0.7, ENDS),
        (3, 1, 0.0, {2: 0.9, END: 0.1}),
        (3, 2, 0.2, {5: 1.0}),
        (4, 0, 0.4, ENDS),
        (5, 2, 0.5, ENDS),
        (6, 0, 0.3, ENDS),
        (6, 1, 1.0, ENDS),
    ),
}


# ---------------------------------------------------------------- what is known


def values_of(x: Problem, policy_SA: np.ndarray) -> np.ndarray:
    """Of each state under a policy; nothing takes more than T steps."""
    value_S = np.zeros(S)
    for _ in range(T):
        value_S = np.sum(policy_SA * (x.reward_SA + x.to_SAS @ value_S), axis=1)
        value_S[END] = 0
    return value_S


def optimum(x: Problem, kl_coef: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Values and policy by value iteration; with ``kl_coef`` of reward - kl_coef * KL(policy | uniform).

    Then V = beta log mean_a exp(Q_a / beta), and the policy is proportional to exp(Q / beta).
    """
    value_S = np.zeros(S)
    for _ in range(T):
        q_SA = x.reward_SA + x.to_SAS @ value_S
        if kl_coef:
            value_S = kl_coef * (np.logaddexp.reduce(q_SA / kl_coef, axis=1) - np.log(A))
        else:
            value_S = q_SA.max(axis=1)
        value_S[END] = 0
    weight_SA = np.exp((q_SA - q_SA.max(axis=1, keepdims=True)) / kl_coef) if kl_coef else q_SA == value_S[:, None]
    return value_S, weight_SA / weight_SA.sum(axis=1, keepdims=True)


def test_the_optima_are_what_they_should_be() -> None:
    assert optimum(PROBLEMS["bandit"])[0][0] == 1.0
    assert optimum(PROBLEMS["chain"])[0][0] == 1.0
    value_S, policy_SA = optimum(PROBLEMS["mdp"])
    # by hand: 6 -> 1; 5 -> 0.5; 4 -> 0.4; 2 -> 0.5 + 0.8 + 0.1; 3 -> 0.9 * 1.4; 1 -> 0.3 + 0.45; 0 -> 0.98 + 0.378
    np.testing.assert_allclose(value_S[:7], [1.358, 0.75, 1.4, 1.26, 0.4, 0.5, 1.0], rtol=1e-12)
    assert policy_SA[:7].argmax(axis=1).tolist() == [1, 1, 0, 1, 0, 2, 1]
    np.testing.assert_allclose(values_of(PROBLEMS["mdp"], policy_SA), value_S)
    # a weak pull towards the uniform policy changes little, a strong one leaves it
    np.testing.assert_allclose(optimum(PROBLEMS["mdp"], 1e-3)[1], policy_SA, atol=1e-9)
    np.testing.assert_allclose(optimum(PROBLEMS["mdp"], 1e6)[1][:7], np.full((7, A), 1 / A), atol=1e-5)


# ---------------------------------------------------------------- learning


def episodes(tables: Any, to_SAS: Any, reward_SA: Any, key: Any) -> Any:
    """(states, actions, rewards, whether there was a step), (P K, T) each."""

    def step(state_B: Any, key: Any) -> Any:
        act, move, noise = jax.random.split(key, 3)
        action_B = jax.random.categorical(act, tables["policy"][state_B])
        reward_B = reward_SA[state_B, action_B] + NOISE * jax.random.normal(noise, state_B.shape)
        after_B = jax.random.categorical(move, jnp.log(to_SAS[state_B, action_B]))
        return after_B, (state_B, action_B, reward_B, state_B != END)

    begin_B = jnp.zeros(P * K, jnp.int32)
    return jax.tree.map(jnp.transpose, jax.lax.scan(step, begin_B, jax.random.split(key, T))[1])


def told(tables: Any, state_BT: Any, action_BT: Any) -> Any:
    """log-probabilities, entropies and values of steps."""
    log_p_SA = jax.nn.log_softmax(tables["policy"])
    entropy_S = -jnp.sum(jnp.exp(log_p_SA) * log_p_SA, axis=-1)
    return log_p_SA[state_BT, action_BT], entropy_S[state_BT], tables["value"][state_BT]


@functools.partial(jax.jit, static_argnames=("policy", "advantage", "iterations"))
def learned(
    policy: PolicyConfig, advantage: AdvantageConfig, to_SAS: Any, reward_SA: Any, seed: Any, sign: Any, iterations: int
) -> Any:
    """The probabilities of a policy that was uniform, behind so many iterations."""
    tx = optax.adam(0.05)

    def loss_of(tables: Any, batch: Experience, state_BT: Any) -> Any:
        log_prob_BT, entropy_BT, value_BT = told(tables, state_BT, batch.targets_BT)
        total = jnp.maximum(jnp.sum(batch.loss_weight_BT), 1)
        return policy_objective(policy, batch, log_prob_BT, entropy_BT, value_BT, total)[0]

    def update(carry: Any, some: Experience) -> Any:
        tables, opt_state = carry
        some = dataclasses.replace(some, weight_BT=token_weights(some.loss_weight_BT, policy.aggregate, T))
        updates, opt_state = tx.update(jax.grad(loss_of)(tables, some, some.tokens_BT), opt_state)
        return (optax.apply_updates(tables, updates), opt_state), None

    def iteration(carry: Any, key: Any) -> Any:
        tables, (write, *orders) = carry[0], jax.random.split(key, 1 + EPOCHS)
        state_BT, action_BT, reward_BT, is_step_BT = episodes(tables, to_SAS, reward_SA, write)
        mask_BT = is_step_BT.astype(jnp.float32)
        old_BT, _, value_BT = told(tables, state_BT, action_BT)
        reference_BT = jnp.full(old_BT.shape, -jnp.log(A))
        cost_BT = -reward_BT
        if policy.kl_in == "reward":
            cost_BT += policy.kl_coef * (old_BT - reference_BT)
        found = advantages(advantage, jnp.zeros((P, K)), mask_BT, penalty_BT=cost_BT, value_BT=value_BT)
        nothing = Documents(*[is_step_BT.astype(jnp.int32)] * 2)
        everything = Experience(
            state_BT,
            action_BT,
            mask_BT,
            nothing,
            advantage_BT=sign * found.advantage_BT,
            old_log_prob_BT=old_BT,
            reference_log_prob_BT=reference_BT,
            old_value_BT=value_BT,
            return_BT=found.return_BT,
        )
        rows_MB = jnp.concatenate([jax.random.permutation(order, P * K).reshape(MINIBATCHES, -1) for order in orders])
        return jax.lax.scan(update, carry, jax.tree.map(lambda x: x[rows_MB], everything))

    tables = {"policy": jnp.zeros((S, A)), "value": jnp.zeros(S)}
    keys = jax.random.split(jax.random.key(seed), iterations)
    (tables, _), _ = jax.lax.scan(iteration, (tables, tx.init(tables)), keys)
    return jax.nn.softmax(tables["policy"])


def found_by(
    policy: PolicyConfig, advantage: AdvantageConfig, problems: Any, *, iterations: int = 150, sign: int = 1
) -> list[np.ndarray]:
    """The policy learned for each of the problems."""
    to, rewards = (np.stack([getattr(x, name) for x in problems], dtype=np.float32) for name in ("to_SAS", "reward_SA"))
    run = jax.vmap(functools.partial(learned, policy, advantage, iterations=iterations), in_axes=(0, 0, 0, None))
    return list(np.asarray(run(to, rewards, np.arange(len(to)), sign)))


def share_of_the_way(x: Problem, policy_SA: np.ndarray) -> float:
    """From the value of the uniform policy (0) to the optimum (1)."""
    least, most = values_of(x, np.full((S, A), 1 / A))[0], optimum(x)[0][0]
    return float((values_of(x, policy_SA)[0] - least) / (most - least))


@pytest.mark.parametrize("name", PRESETS)
def test_every_algorithm_finds_the_optimum(name: str) -> None:
    policy, advantage = PRESETS[name]()
    policy = dataclasses.replace(policy, kl_coef=0.0)  # which has another optimum, see below
    # The clip of GSPO is for steps of large models: here it lets one update in four through.
    found = found_by(policy, advantage, PROBLEMS.values(), iterations=500 if name == "gspo" else 150)
    for x, policy_SA in zip(PROBLEMS.values(), found, strict=True):
        assert share_of_the_way(x, policy_SA) > 0.98  # it is on its way from 0.99 to 1, as softmax goes
        value_S, best_SA = optimum(x)
        met_S = (x.to_SAS.sum(axis=(0, 1)) > 0) & (value_S > 0)  # states that there are, the first one apart
        assert (policy_SA[met_S].argmax(axis=1) == best_SA[met_S].argmax(axis=1)).all()


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_with_a_wrong_sign_none_does(name: str) -> None:
    policy, advantage = PRESETS[name]()
    policy = dataclasses.replace(policy, kl_coef=0.0)
    for x, policy_SA in zip(PROBLEMS.values(), found_by(policy, advantage, PROBLEMS.values(), sign=-1), strict=True):
        assert share_of_the_way(x, policy_SA) < 0


# ---------------------------------------------------------------- near a reference


BETA = 0.3


def kept_reward(x: Problem, policy_SA: np.ndarray) -> float:
    """Reward less BETA times the KL from the uniform policy, of a whole episode."""
    cost_SA = BETA * (np.log(policy_SA) + np.log(A))
    cost_SA[END] = 0
    return float(values_of(Problem(x.to_SAS, x.reward_SA - cost_SA), policy_SA)[0])


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_with_the_kl_in_the_reward_the_optimum_is_that_of_soft_values(name: str) -> None:
    policy, advantage = PRESETS[name]()
    assert policy.kl_in == "reward"
    found = found_by(dataclasses.replace(policy, kl_coef=BETA), advantage, PROBLEMS.values(), iterations=250)
    for x, policy_SA in zip(PROBLEMS.values(), found, strict=True):
        value_S, best_SA = optimum(x, BETA)
        assert kept_reward(x, best_SA) == pytest.approx(value_S[0], rel=1e-9)  # the reference agrees with itself
        assert value_S[0] - 0.02 < kept_reward(x, policy_SA) <= value_S[0] + 1e-6
        np.testing.assert_allclose(policy_SA[0], best_SA[0], atol=0.1)  # gradients of 64 episodes are noise, too
        assert best_SA[0].max() < 0.9  # far from what no KL would leave


def with_forward_kl(reward_A: np.ndarray) -> np.ndarray:
    """The p that maximises p r - BETA KL(uniform | p): p_a = BETA / A / (BETA - r_a + p r), by bisection of p r."""
    low, high = reward_A.max() - BETA, reward_A.max()
    for _ in range(100):
        mean = (low + high) / 2
        p = BETA / A / np.maximum(BETA - reward_A + mean, 1e-12)
        low, high = (mean, high) if p.sum() > 1 else (low, mean)
    return p


def test_what_each_estimator_does_in_the_loss() -> None:
    """k1 nothing, k2 the KL that is meant, k3 the other one, KL(reference | policy), as its slope is."""
    policy, advantage = PRESETS["dr_grpo"]()
    x = PROBLEMS["bandit"]
    reward_A = x.reward_SA[0]
    forward_A = with_forward_kl(reward_A)
    assert forward_A.sum() == pytest.approx(1)
    slope_A = forward_A * (reward_A - forward_A @ reward_A) + BETA * (1 / A - forward_A)
    np.testing.assert_allclose(slope_A, 0, atol=1e-9)  # of p r - BETA KL, by logits
    expected = {"k1": optimum(x)[1][0], "k2": optimum(x, BETA)[1][0], "k3": forward_A}
    for kind, expected_A in expected.items():
        cfg = dataclasses.replace(policy, kl_coef=BETA, kl=kind)
        (found_SA,) = found_by(cfg, advantage, [x], iterations=250)
        np.testing.assert_allclose(found_SA[0], expected_A, atol=0.05)
