"""Formats as they are written on a command line."""

from __future__ import annotations

import re
from typing import cast

from jaxq.spec import Mode, QuantSpec


def parse_spec(text: str) -> QuantSpec | None:
    """`int4g64` or `4g64`, `4` (its default group), `mxfp4`, `mxfp8`, `nvfp4`; `none` for dense.

    Raises:
      ValueError: anything else, and formats that are not legal.
    """
    if text in ("none", "dense"):
        return None
    found = re.fullmatch(r"(?:int)?(\d+)(?:g(\d+))?", text)
    if found:
        return QuantSpec(int(found[1]), int(found[2]) if found[2] else None)
    if re.fullmatch(r"(mx|nv)fp\d", text):
        return QuantSpec(mode=cast(Mode, text))
    raise ValueError(f"{text!r} is no format; write int4g64, 4g64, 8, mxfp4, mxfp8, nvfp4 or none")


def parse_rule(text: str) -> tuple[str, QuantSpec | None]:
    """`PATTERN=FORMAT`; the pattern is a regular expression, and may hold an equals sign itself."""
    pattern, equals, spec = text.rpartition("=")
    if not equals or not pattern:
        raise ValueError(f"{text!r} is no rule; write PATTERN=FORMAT, such as 'down_proj=int8g64' or 'lm_head=none'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern, parse_spec(spec)
