"""Rotary position embedding (Su et al. 2021), half-split layout as in Llama, and its stretching to longer contexts."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dsjax.config import NonNegativeFloat, PositiveFloat, PositiveInt, UserError


@dataclasses.dataclass(frozen=True)
class LinearScaling:
    """Positions divided by ``factor`` (Chen et al. 2023; DeepSeek-Coder)."""

    factor: PositiveFloat = 1.0

    def frequencies(self, frequencies_h: Float[Array, " h"], theta: float) -> Float[Array, " h"]:
        del theta
        return frequencies_h / self.factor

    @property
    def amplitude(self) -> float:
        """Factor on cosines and sines."""
        return 1.0

    @property
    def sharpness(self) -> float:
        """Factor on the scores of attention, beside that of the amplitude."""
        return 1.0


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al. 2023): slow channels are slowed down by ``factor``, fast ones kept, those between blended.

    Attributes:
        factor: new context over ``original_length``.
        original_length: positions of the training before.
        beta_fast: channels with at least that many turns in ``original_length`` are kept.
        beta_slow: those with at most that many are slowed down by the whole factor.
        mscale, mscale_all_dim: how much attention is sharpened: with m(x) = 1 + x log(factor) / 10, cosines and sines
            are multiplied by m(mscale) / m(mscale_all_dim), or by m(1) if one of both is 0; and in latent attention
            (DeepSeek-V2) scores by m(mscale_all_dim) ** 2.
        fixed_amplitude: takes the place of that factor on cosines and sines; none: as said.
        whole_channels: the bounds of the blend are rounded outwards to whole channels.
    """

    factor: PositiveFloat = 1.0
    original_length: PositiveInt = 4096
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale: NonNegativeFloat = 0.0
    mscale_all_dim: NonNegativeFloat = 0.0
    fixed_amplitude: PositiveFloat | None = None
    whole_channels: bool = True

    def frequencies(self, frequencies_h: Float[Array, " h"], theta: float) -> Float[Array, " h"]:
        width = 2 * len(frequencies_h)

        def channel(turns: float) -> float:  # that turns so often in the original length
            return width * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low, high = channel(self.beta_fast), channel(self.beta_slow)
        if self.whole_channels:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        high += 0.001 * (low == high)
        slowed_h = jnp.clip((jnp.arange(width // 2) - low) / (high - low), 0, 1)
        return frequencies_h * (1 - slowed_h) + frequencies_h / self.factor * slowed_h

    def _m(self, weight: float) -> float:
        return 1.0 + 0.1 * weight * math.log(self.factor) if self.factor > 1 else 1.0

    @property
    def amplitude(self) -> float:
        """Factor on cosines and sines."""
        if self.fixed_amplitude is not None:
            return self.fixed_amplitude
        if self.mscale and self.mscale_all_dim:
            return self._m(self.mscale) / self._m(self.mscale_all_dim)
        return self._m(1.0)

    @property
    def sharpness(self) -> float:
        """Factor on the scores of latent attention, beside that of the amplitude."""
        return self._m(self.mscale_all_dim) ** 2


@dataclasses.dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1 (Dubey et al. 2024): waves longer than ``original_length / low_freq_factor`` are slowed down.

    Those shorter than ``original_length / high_freq_factor`` are kept, and those between blended.
    """

    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_length: PositiveInt = 8192

    def validate(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"high_freq_factor is {self.high_freq_factor}; it must exceed low_freq_factor, {self.low_freq_factor}"
            )

    def frequencies(self, frequencies_h: Float[Array, " h"], theta: float) -> Float[Array, " h"]:
        del theta
        turns_h = self.original_length * frequencies_h / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept_h = jnp.clip((turns_h - low) / (high - low), 0, 1)
        return frequencies_h * kept_h + frequencies_h / self.factor * (1 - kept_h)

    @property
    def amplitude(self) -> float:
        """Factor on cosines and sines."""
        return 1.0

    @property
    def sharpness(self) -> float:
        """Factor on the scores of attention, beside that of the amplitude."""
        return 1.0


RopeScaling = LinearScaling | YarnScaling | Llama3Scaling


def rope_angles(
    positions_BT: Int[Array, "B T"], width: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Float[Array, "B T h"], ...]:
    """(cos, sin) of shape (B, T, width / 2) in float32, for heads with ``width`` rotary channels."""
    frequencies_h = theta ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if scaling is not None:
        frequencies_h = scaling.frequencies(frequencies_h, theta)
    angles_BTh = positions_BT[..., None].astype(jnp.float32) * frequencies_h
    amplitude = 1.0 if scaling is None else scaling.amplitude
    if amplitude == 1:
        return jnp.cos(angles_BTh), jnp.sin(angles_BTh)
    return amplitude * jnp.cos(angles_BTh), amplitude * jnp.sin(angles_BTh)


def apply_rope(x_BTXH: Float[Array, "B T ... H"], rope: tuple[Float[Array, "B T h"], ...]) -> Float[Array, "B T ... H"]:
    """Rotates channel pairs (i, i + H/2) of each head by the angle of the position."""
    cos, sin = (a.reshape(*a.shape[:2], *(1,) * (x_BTXH.ndim - 3), a.shape[-1]) for a in rope)
    a, b = jnp.split(x_BTXH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTXH.dtype)
