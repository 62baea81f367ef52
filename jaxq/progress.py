"""Progress bars for work over many arrays, from tqdm or rich where one is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Progress = None | bool | Literal["tqdm", "rich"] | Callable[[Sequence[Any]], Iterable[Any]]


def track(function: str, items: Sequence[T], progress: Progress, description: str) -> Iterable[T]:
    """`items`, shown as they are consumed.

    Args:
      function: the caller's name, for errors.
      items: what to go through.
      progress: None or False for no bar; True for the first of tqdm and rich that is installed; "tqdm" or "rich"; or
        a function that wraps the sequence, as `tqdm.tqdm` does.
      description: what stands beside the bar.

    Raises:
      ImportError: for a bar whose package is not installed.
      ValueError: for any other name.
    """
    if progress is None or progress is False:
        return items
    if callable(progress):
        return progress(items)
    if progress not in (True, "tqdm", "rich"):
        raise ValueError(f"{function}: progress={progress!r} is unknown; pick True, 'tqdm', 'rich' or a function")
    wanted = ("tqdm", "rich") if progress is True else (progress,)
    name = next((name for name in wanted if importlib.util.find_spec(name)), None)
    if name is None:
        raise ImportError(f"{function}: progress={progress!r} needs {' or '.join(wanted)}; install jaxq[progress]")
    if name == "tqdm":
        tqdm: Any = importlib.import_module("tqdm").tqdm
        return tqdm(items, desc=description)
    from rich.progress import track as rich_track

    return rich_track(items, description=description)
