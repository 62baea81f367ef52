"""`jaxq.dispatch`: a function transform that makes the dots of ordinary code run on quantized weights.

The function is traced with float arrays in the place of its quantized weights; then its jaxpr is evaluated again, with
the weights in their quantized form. What an equation does to such a weight, a rule says (`rules/`); where there is
none, the weight becomes dense.

  views.py        a quantized weight as it passes through a jaxpr
  interpreter.py  the evaluation: rules, the cache of what was evaluated, nested jaxprs
  fallback.py     what is said where a weight becomes dense
  staging.py      tracing the function, with arguments, closures and constants that are quantized
  rules/          one file per kind of operation
"""

from jaxq.dispatch import rules  # noqa: F401 (registers them)
from jaxq.dispatch.extension import register_dispatch_rule
from jaxq.dispatch.transform import dispatch

__all__ = ["dispatch", "register_dispatch_rule"]
