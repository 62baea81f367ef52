"""Speed and memory of a model: tokens per second of prompt and of continuation, bytes of weights and of the process."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from examples.llm import generation, memory, model
from examples.llm.config import Config
from examples.llm.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Speed:
    """prefill, decode: tokens per second, medians. weights: bytes of the parameters. resident: bytes of the process."""

    prefill: float
    decode: float
    weights: int
    cache: int
    resident: int


class Runner:
    """A model with a cache at some context, of which prompt and steps can be timed again and again."""

    def __init__(self, config: Config, params: model.Params, *, prompt: int, steps: int, dtype: Any):
        self.config, self.params, self.steps, self.context = config, params, steps, prompt
        length = generation.padded(prompt + steps)
        self.cache = model.init_cache(config, params, batch=1, length=length, dtype=dtype)
        self.tokens = np.random.default_rng(0).integers(0, config.vocab_size, (1, prompt))
        self.token = jnp.zeros(1, jnp.int32)
        self.key = jax.random.key(0)

    def prefill(self) -> float:
        """Seconds for the prompt."""
        began = time.perf_counter()
        logits, self.cache = generation.prefill(self.config, self.params, self.tokens, self.cache)
        logits.block_until_ready()
        return time.perf_counter() - began

    def decode(self) -> float:
        """Seconds per token of a greedy continuation, `steps` tokens in one program."""
        began = time.perf_counter()
        tokens, self.cache = generation.decode(
            self.config,
            self.params,
            self.token,
            cache=self.cache,
            position=jnp.int32(self.context),
            key=self.key,
            count=self.steps,
            sampling=Sampling(),
        )
        tokens.block_until_ready()
        return (time.perf_counter() - began) / self.steps


def speed(config: Config, params: model.Params, *, prompt: int, steps: int, repeats: int, dtype: Any) -> Speed:
    """Medians over `repeats` runs, after one that compiles."""
    runner = Runner(config, params, prompt=prompt, steps=steps, dtype=dtype)
    runner.prefill(), runner.decode()
    memory.release()
    prefills = [runner.prefill() for _ in range(repeats)]
    decodes = [runner.decode() for _ in range(repeats)]
    return Speed(
        prefill=prompt / statistics.median(prefills),
        decode=1 / statistics.median(decodes),
        weights=nbytes(params),
        cache=nbytes(runner.cache),
        resident=memory.resident(),
    )


def nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
