"""Tables of models: one row for tensors that differ in nothing but a number in their names."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Hashable, Iterable, Sequence

# A number that stands alone: `layers.3.mlp`, `Dense_0`, but not `w1` nor `0007`.
_NUMBER = re.compile(r"(?<![0-9A-Za-z])(0|[1-9][0-9]{0,8})(?![0-9A-Za-z])")


@dataclasses.dataclass(frozen=True)
class _Names:
    """Every name that `texts` make with a number of each set between them."""

    texts: tuple[str, ...]
    numbers: tuple[frozenset[int], ...]

    def without(self, place: int) -> _Names:
        return self.having(place, frozenset())

    def having(self, place: int, numbers: frozenset[int]) -> _Names:
        return _Names(self.texts, (*self.numbers[:place], numbers, *self.numbers[place + 1 :]))

    def __str__(self) -> str:
        shown = [*map(_ranges, self.numbers), ""]
        return "".join(itertools.chain.from_iterable(zip(self.texts, shown, strict=True)))


def group(names: Sequence[str], like: Sequence[Hashable]) -> list[tuple[str, list[int]]]:
    """Names of which only numbers differ, together.

    Args:
      names: of tensors, each once.
      like: what else must be equal within a group, for each name.

    Returns:
      (`layers.{0-27}.mlp.up_proj`, indices into `names`) per group, in the order of their first names. The pattern
      stands for these names and no others.
    """
    groups: dict[tuple[_Names, Hashable], list[int]] = {}
    for index, (name, other) in enumerate(zip(names, like, strict=True)):
        texts, numbers = _NUMBER.split(name)[::2], _NUMBER.findall(name)
        parsed = _Names(tuple(texts), tuple(frozenset([int(number)]) for number in numbers))
        groups[parsed, other] = [index]
    # Place by place, so that what is merged in one is equal in all others: a product of sets.
    for place in range(max((len(parsed.numbers) for parsed, _ in groups), default=0)):
        merged: dict[tuple[_Names, Hashable], list[tuple[_Names, list[int]]]] = {}
        for (parsed, other), indices in groups.items():
            key = parsed.without(place) if place < len(parsed.numbers) else parsed
            merged.setdefault((key, other), []).append((parsed, indices))
        groups = {
            (_union(place, (parsed for parsed, _ in parts)), other): sorted(itertools.chain(*(i for _, i in parts)))
            for (_, other), parts in merged.items()
        }
    return sorted(((str(parsed), indices) for (parsed, _), indices in groups.items()), key=lambda item: item[1][0])


def _union(place: int, parts: Iterable[_Names]) -> _Names:
    first, *rest = parts
    return first.having(place, first.numbers[place].union(*(part.numbers[place] for part in rest))) if rest else first


def _ranges(numbers: frozenset[int]) -> str:
    """`7`, `{0-27}`, `{0-2,5,8}`."""
    ordered = sorted(numbers)
    runs = [list(run) for _, run in itertools.groupby(enumerate(ordered), lambda item: item[1] - item[0])]
    shown = [f"{run[0][1]}-{run[-1][1]}" if len(run) > 1 else str(run[0][1]) for run in runs]
    return shown[0] if len(ordered) == 1 else "{" + ",".join(shown) + "}"
