"""Progress bars for work over many arrays, from tqdm or rich where one is installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Progress = None | bool | Literal["tqdm", "rich"] | Callable[[Sequence[Any]], Iterable[Any]]

_PACKAGES = ("tqdm", "rich")
# From this many bytes on `track_bytes` shows a bar unasked: about a second's work.
_SHOWN_BYTES = 2 << 30


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
    if _package(function, progress) == "tqdm":
        tqdm: Any = importlib.import_module("tqdm").tqdm
        return tqdm(items, desc=description)
    from rich.progress import track as rich_track

    return rich_track(items, description=description)


@contextlib.contextmanager
def track_bytes(
    function: str, total: int, progress: bool | None, description: str
) -> Iterator[Callable[[int], object]]:
    """A bar of bytes on stderr, and the function that advances it by so many of them.

    Args:
      function, description: as in `track`.
      total: bytes of the whole.
      progress: whether to show a bar; None: from 2 GiB on, where stderr is a terminal and a package is installed.

    Raises:
      ImportError: for a bar that was asked for, where no package is installed.
    """
    unasked = total >= _SHOWN_BYTES and sys.stderr.isatty() and any(map(importlib.util.find_spec, _PACKAGES))
    if not (unasked if progress is None else progress):
        yield lambda nbytes: None
    elif _package(function, True) == "tqdm":
        tqdm: Any = importlib.import_module("tqdm").tqdm
        with tqdm(total=total, unit="B", unit_scale=True, desc=description) as bar:
            yield bar.update
    else:
        from rich import progress as rich_progress
        from rich.console import Console

        columns = (
            rich_progress.TextColumn(description),
            rich_progress.BarColumn(),
            rich_progress.DownloadColumn(),
            rich_progress.TransferSpeedColumn(),
            rich_progress.TimeRemainingColumn(),
        )
        with rich_progress.Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(description, total=total)
            yield lambda nbytes: bar.advance(task, nbytes)


def _package(function: str, progress: Any) -> str:
    """The package that draws the bar: the one named, or the first that is installed for True."""
    if progress not in (True, *_PACKAGES):
        raise ValueError(f"{function}: progress={progress!r} is unknown; pick True, 'tqdm', 'rich' or a function")
    wanted = _PACKAGES if progress is True else (progress,)
    name = next((name for name in wanted if importlib.util.find_spec(name)), None)
    if name is None:
        raise ImportError(f"{function}: progress={progress!r} needs {' or '.join(wanted)}; install jaxq[progress]")
    return name
