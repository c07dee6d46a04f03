"""Pack many short texts into little memory."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np


class PackedTexts(Sequence[str]):
    """Texts one after another in one buffer: their bytes and eight for each, where a list of them takes 60 or more."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add one at the end."""
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        row = range(len(self))[index]
        return self._bytes[self._ends[row] : self._ends[row + 1]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment] # they grow

    def first_repeated(self) -> tuple[int, int] | None:
        """The rows of the first text that was there before; None if all differ."""
        hashes = np.fromiter((hash(text) for text in self), dtype=np.int64, count=len(self))
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        rows = np.sort(np.concatenate([order[same], order[same + 1]]))  # few, unless many are repeated
        first: dict[str, int] = {}
        for row in rows.tolist():
            if (earlier := first.setdefault(self[row], row)) != row:
                return earlier, row
        return None
