"""Rotary position embeddings and the ways in which they are stretched to longer contexts."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from examples.llm.config import Config, RopeScaling


def frequencies(config: Config) -> tuple[np.ndarray, float]:
    """The angle per position of each pair of coordinates, and a factor on queries and keys.

    Returns:
      float32[head_dim / 2] in radians, and a float that is 1 but for yarn.

    Computed in float64 and rounded once.
    """
    dims = config.head_dim
    base = config.rope_theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)
    scaling = config.rope_scaling
    if scaling is None:
        return base.astype(np.float32), 1.0
    if scaling.kind == "linear":
        return (base / scaling.factor).astype(np.float32), 1.0
    if scaling.kind == "factors":
        return (base / np.asarray(scaling.factors)).astype(np.float32), 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling).astype(np.float32), 1.0
    return _yarn(base, scaling, dims, config.rope_theta).astype(np.float32), _yarn_magnitude(scaling)


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched by `factor`, short ones kept, those between interpolated.

    Source: meta-llama/llama-models, models/llama3/model.py, `apply_scaling`.
    """
    wavelength = 2 * math.pi / base
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    turns = scaling.original_max_position / wavelength
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * base / scaling.factor + smooth * base


def _yarn(base: np.ndarray, scaling: RopeScaling, dims: int, theta: float) -> np.ndarray:
    """Frequencies that turn fewer than `beta_slow` times are stretched, more than `beta_fast` kept, a ramp between.

    Source: Peng et al., YaRN (2023), section 3.2; https://github.com/jquesnelle/yarn.
    """

    def dimension(turns: float) -> float:
        return dims * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), dims - 1)
    ramp = np.clip((np.arange(dims // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return base / scaling.factor * ramp + base * (1 - ramp)


def _yarn_magnitude(scaling: RopeScaling) -> float:
    """What queries and keys are multiplied by: YaRN's temperature, section 3.4 of the paper, and DeepSeek's variant."""

    def magnitude(mscale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * mscale * math.log(scaling.factor) + 1.0

    return magnitude(scaling.mscale) / magnitude(scaling.mscale_all_dim)


def tables(config: Config, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `rotate` multiplies the first and the second half of a head by, to get each half of the result.

    positions: int32[S] -> float32[S, 2, head_dim / 2] each: (cos, sin) and (-sin, cos), with yarn's factor in them.
    """
    angle, magnitude = frequencies(config)
    angles = positions.astype(jnp.float32)[:, None] * angle
    cos, sin = jnp.cos(angles) * jnp.float32(magnitude), jnp.sin(angles) * jnp.float32(magnitude)
    return jnp.stack([cos, sin], -2), jnp.stack([-sin, cos], -2)


def rotate(x: jax.Array, of_first: jax.Array, of_second: jax.Array) -> jax.Array:
    """x: float[B, S, heads, head_dim]: coordinate i turns with i + head_dim / 2, as in Hugging Face's checkpoints.

    Computed in float32, returned in x's dtype. As one expression over [..., 2, head_dim / 2], which XLA on CPUs makes
    one loop of, and without a reversal, which keeps some of its versions to one thread.
    """
    first, second = jnp.split(x.astype(jnp.float32)[..., None, :], 2, axis=-1)
    turned = first * of_first[:, None] + second * of_second[:, None]
    return turned.reshape(x.shape).astype(x.dtype)
