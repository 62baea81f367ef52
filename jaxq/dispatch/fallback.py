"""What is said where a weight becomes dense: the operation, the weight, and the line of the user's code."""

from __future__ import annotations

import dataclasses
import os
import site
import sysconfig
import warnings
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import numpy as np

from jaxq import _compat
from jaxq.dispatch.views import View

Fallback = Literal["dequantize", "warn", "error"]

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_JAX = os.path.dirname(os.path.abspath(jax.__file__)) + os.sep
_LIBRARIES = tuple(
    {os.path.join(path, "") for path in (*site.getsitepackages(), sysconfig.get_paths()["purelib"])}
    | {os.path.join(sysconfig.get_paths()["stdlib"], "")}
)


class Unfused(NamedTuple):
    """What a rule returns instead of results where it can't keep the weight quantized, and why."""

    reason: str


# The scope under which a captured weight is traced says its name.
NAME_SCOPE = "jaxq.weight="

# The name of what the code dequantizes itself: it may become dense without a word.
EXPLICIT = ""

# For weights that `jaxq.resident` made.
HELD = "its data is held outside JAX and can't be cut or rearranged"


@dataclasses.dataclass(frozen=True)
class Policy:
    """What to do where a weight becomes dense. Hashable: part of the keys under which traced functions are kept."""

    fallback: Fallback = "dequantize"

    def __post_init__(self) -> None:
        if self.fallback not in get_args(Fallback):
            raise ValueError(
                f"dispatch: fallback={self.fallback!r} is unknown; pick one of {', '.join(get_args(Fallback))}"
            )

    @property
    def names_weights(self) -> bool:
        return self.fallback != "dequantize"

    def report(self, eqn: Any, views: Sequence[View], reason: str) -> None:
        """Say that `views` become dense in an equation; none of them: that a captured weight does, in a nested jaxpr.

        Raises:
          ValueError: where the fallback is "error".
        """
        told = [view for view in views if view.form.name != EXPLICIT]
        if self.fallback == "dequantize" or (views and not told):
            return
        weights = " and ".join(_describe(view) for view in told) or "a captured weight inside it"
        where, file, line = _user_line(eqn)
        message = f"dispatch: {eqn.primitive.name} makes {weights} dense{where}: {reason}"
        if self.fallback == "error":
            raise ValueError(message + '; change it there, or pass fallback="warn" or "dequantize"')
        if file is None:
            warnings.warn(message, stacklevel=2)
        else:
            warnings.warn_explicit(message, UserWarning, file, line)


def _describe(view: View) -> str:
    kind = f"{np.dtype(view.dtype).name}[{', '.join(map(str, view.shape))}], {view.form.spec}"
    return f"the weight {view.form.name} ({kind})" if view.form.name else f"a weight ({kind})"


def is_user_file(file: str) -> bool:
    """Whether a frame's file is neither JAX's nor this package's."""
    return not file.startswith((_PACKAGE, _JAX, "<frozen"))


def _user_line(eqn: Any) -> tuple[str, str | None, int]:
    """Where in the user's code an equation comes from, in words, and as a file and a line.

    The innermost frame outside JAX and this package; where that is in an installed library, such as a layer of Flax,
    also the innermost one outside all of them.
    """
    own = [frame for frame in _compat.frames(eqn) if is_user_file(frame[0])]
    if not own:
        return "", None, 0
    user = [f for f in own if not f[0].startswith(_LIBRARIES)]
    file, function, line = own[0]
    words = f" at {file}:{line} ({function})"
    if user and user[0] != own[0]:
        file, function, line = user[0]
        words += f", called from {file}:{line} ({function})"
    return words, file, line
