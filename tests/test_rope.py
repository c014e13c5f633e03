"""Rotary tables, stretched as in Hugging Face transformers, whose formulas are transcribed here in float64."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsjax.config import UserError, validate
from dsjax.nn.rope import LinearScaling, Llama3Scaling, YarnScaling, rope_angles

POSITIONS = jnp.asarray([[0, 1, 2, 17, 300]])


def angles(width: int, theta: float, scaling: Any) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = rope_angles(POSITIONS, width, theta, scaling)
    return np.asarray(cos[0], np.float64), np.asarray(sin[0], np.float64)


def close(got: tuple[np.ndarray, np.ndarray], frequencies: np.ndarray, amplitude: float = 1.0) -> None:
    want = np.asarray(POSITIONS[0])[:, None] * frequencies
    # 300 times a frequency that is off by 2 ** -23 of it
    np.testing.assert_allclose(got[0], amplitude * np.cos(want), atol=1e-4)
    np.testing.assert_allclose(got[1], amplitude * np.sin(want), atol=1e-4)


def plain(width: int, theta: float) -> np.ndarray:
    return 1.0 / theta ** (np.arange(0, width, 2) / width)


def test_plain_and_linear() -> None:
    close(angles(16, 10_000.0, None), plain(16, 10_000.0))
    close(angles(16, 10_000.0, LinearScaling(4.0)), plain(16, 10_000.0) / 4)


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([8, 64]),
    st.sampled_from([100.0, 10_000.0, 500_000.0]),
    st.sampled_from([1.0, 4.0, 40.0]),
    st.sampled_from([16, 64, 4096]),
    st.sampled_from([(32.0, 1.0), (8.0, 2.0), (1.0, 1.0)]),
    st.sampled_from([(0.0, 0.0), (1.0, 1.0), (0.707, 0.707), (1.0, 0.5), (0.0, 1.0)]),
    st.booleans(),
)
def test_yarn(width, theta, factor, original, betas, mscales, whole) -> None:
    """As `_compute_yarn_parameters` of transformers does it, channel by channel."""
    fast, slow = betas
    scaling = YarnScaling(factor, original, fast, slow, *mscales, whole_channels=whole)
    low, high = (width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (fast, slow))
    low, high = (math.floor(low), math.ceil(high)) if whole else (low, high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001
    frequencies = plain(width, theta)
    for i, frequency in enumerate(frequencies):
        ramp = min(max((i - low) / (high - low), 0), 1)
        frequencies[i] = frequency / factor * ramp + frequency * (1 - ramp)

    def m(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    amplitude = m(mscales[0]) / m(mscales[1]) if all(mscales) else m(1.0)
    close(angles(width, theta, scaling), frequencies, amplitude)
    assert scaling.sharpness == pytest.approx(m(mscales[1]) ** 2 if mscales[1] else 1.0)


def test_yarns_amplitude_can_be_given() -> None:
    assert YarnScaling(4.0, 64, fixed_amplitude=1.5).amplitude == 1.5
    assert YarnScaling(4.0, 64).amplitude == pytest.approx(0.1 * math.log(4) + 1)


@pytest.mark.parametrize("original", [32, 8192])
def test_llama3(original: int) -> None:
    """As `_compute_llama3_parameters` of transformers: by wavelength, three cases."""
    scaling, frequencies = Llama3Scaling(8.0, 1.0, 4.0, original), plain(64, 500_000.0)
    for i, frequency in enumerate(frequencies):
        wave = 2 * math.pi / frequency
        if wave > original / 1.0:
            frequencies[i] = frequency / 8
        elif wave >= original / 4.0:
            smooth = (original / wave - 1.0) / (4.0 - 1.0)
            frequencies[i] = (1 - smooth) * frequency / 8 + smooth * frequency
    assert len({*frequencies} & {*plain(64, 500_000.0)}) < 32
    close(angles(64, 500_000.0, scaling), frequencies)


def test_bounds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(UserError, match="high_freq_factor is 1"):
        validate(Llama3Scaling(low_freq_factor=2.0, high_freq_factor=1.0))
