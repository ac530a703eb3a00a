"""Texts that are the same or nearly so, found among millions in well under a gigabyte.

    distinct = Distinct(threshold=0.9)
    for match in distinct.keep(["a text", "another one"]):  # per text: the kept one that it is like, or None
        ...

Two texts are as alike as the share of character n-grams that they have in common (Jaccard; letters and digits only),
which 64 minimal hashes estimate with a standard error of 0.06 at most (Broder 1997). Texts that agree in a whole band
of hashes are compared ("Mining of Massive Datasets", section 3.4). datasketch makes the hashes. Its own index keeps
about 3.5 kilobytes a text in dictionaries; the one here keeps 150 bytes (threshold 0.9) to 350 (0.5) in arrays.
"""

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

N_HASHES = 64
SEED = 1
# The minimum probability that two texts with just the threshold's similarity are compared.
RECALL = 0.98
# Of the texts that agree with a new one in a band, the last so many are compared. Only boilerplate has more.
MAX_CANDIDATES = 64
# N-grams hashed, and pairs compared, at a time: a text may be a book, and all texts one template.
PIECE = 1 << 15
# Short questions need shorter n-grams.
TEXT_SHINGLE, QUESTION_SHINGLE = 5, 3


class Match(NamedTuple):
    """A match: the number of the kept text, the share of n-grams in common, and whether it is a copy."""

    number: int
    share: float
    is_copy: bool


# ---------------------------------------------------------------- from texts to hashes

_NO_LETTERS = re.compile(r"[\W_]+")


def bare_text(text: str) -> str:
    """The text without case, character width, punctuation and spaces."""
    if not unicodedata.is_normalized("NFC", text):  # or the accents would go for punctuation
        text = unicodedata.normalize("NFC", text)
    text = _NO_LETTERS.sub("", text)
    if not unicodedata.is_normalized("NFKC", text):
        text = _NO_LETTERS.sub("", unicodedata.normalize("NFKC", text))
    return text.casefold()


def shingle_hashes(text: str, size: int) -> np.ndarray:
    """[number of n-grams] uint32: the hash of each run of `size` characters, or of the whole of a shorter text."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    size = min(size, len(codes))
    hashes = np.zeros(len(codes) - size + 1, dtype=np.uint32)
    for offset in range(size):
        hashes = hashes * np.uint32(0x01000193) + codes[offset : offset + len(hashes)]
    return hashes


def minhashes(texts: Sequence[str], shingle_size: int) -> np.ndarray:
    """[number of texts, N_HASHES] uint32: the minimum over the n-grams of each of N_HASHES hash functions."""
    from datasketch import MinHash  # brings scipy, which takes most of a second

    # `update_batch` gets all hashes as one value: of a list, it would call this function in Python for each.
    sketch = MinHash(num_perm=N_HASHES, seed=SEED, hashfunc=lambda hashes: hashes)
    signatures = np.empty((len(texts), N_HASHES), dtype=np.uint32)
    for row, text in enumerate(texts):
        hashes = shingle_hashes(bare_text(text), shingle_size)
        sketch.clear()
        for start in range(0, len(hashes), PIECE):
            sketch.update_batch([hashes[start : start + PIECE]])
        signatures[row] = sketch.hashvalues
    return signatures


def rows_per_band(threshold: float) -> int:
    """The number of hashes in a band: as many as RECALL allows, since longer bands give fewer false candidates."""
    rows = 1
    while rows < N_HASHES and chance_to_meet(threshold, rows + 1) >= RECALL:
        rows += 1
    return rows


def chance_to_meet(share: float, rows: int) -> float:
    """That two texts with this share in common agree in all `rows` hashes of at least one band."""
    return 1 - (1 - share**rows) ** (N_HASHES // rows)


# ---------------------------------------------------------------- the index


class _Rows:
    """A matrix that grows by rows; `array` is the filled part."""

    def __init__(self, width: int, dtype: type):
        self._grown = np.empty((0, width), dtype=dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    @property
    def array(self) -> np.ndarray:
        return self._grown[: self._length]

    def add(self, rows: np.ndarray) -> None:
        needed = self._length + len(rows)
        if needed > len(self._grown):
            # In place: the system moves large blocks without a copy, so there are never two of them.
            self._grown.resize((needed + needed // 8, self._grown.shape[1]), refcheck=False)
        self._grown[self._length : needed] = rows
        self._length = needed


class _SortedNumbers:
    """uint64 numbers in sorted runs, each over twice as long as the next, so that adding and searching are cheap."""

    def __init__(self):
        self.runs: list[np.ndarray] = []

    def add(self, numbers: np.ndarray) -> None:
        run = np.sort(numbers)
        while self.runs and len(self.runs[-1]) <= 2 * len(run):
            run = np.concatenate([self.runs.pop(), run])
            run.sort(kind="stable")  # merges two sorted halves in linear time
        self.runs.append(run)


_NUMBER_BITS, _NUMBER_MASK = np.uint64(32), np.uint64(0xFFFFFFFF)

# [n, n_keys] uint32 keys, a row is looked for under each; [n, width] uint8 rows, by which it is compared.
_Sketches = tuple[np.ndarray, np.ndarray]


class _Index:
    """An index of rows by keys; rows that share a key are compared byte by byte.

    A key and a row's number are one uint64, the key above: sorted, that is a table of eight bytes an entry.
    """

    def __init__(self, n_keys: int, width: int, threshold: float):
        self._tables = [_SortedNumbers() for _ in range(n_keys)]
        self._rows = _Rows(width, np.uint8)
        self._threshold = threshold

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, sketches: _Sketches) -> None:
        keys, rows = sketches
        numbers = np.arange(len(self), len(self) + len(rows), dtype=np.uint64)
        for table, column in zip(self._tables, keys.T.astype(np.uint64), strict=True):
            table.add(column << _NUMBER_BITS | numbers)
        self._rows.add(rows)

    def pairs(self, sketches: _Sketches) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All pairs of a new row and a similar earlier one, added before or earlier in the same call.

        Returns positions in the new rows, in order; numbers of the earlier rows, as if all the new ones had been
        added; and shares of equal bytes.
        """
        keys, rows = sketches
        new_numbers = np.arange(len(self), len(self) + len(rows), dtype=np.uint64)
        candidates = [np.empty(0, dtype=np.uint64)]
        for table, column in zip(self._tables, keys.T.astype(np.uint64), strict=True):
            lowest, own = column << _NUMBER_BITS, column << _NUMBER_BITS | new_numbers
            for run in [*table.runs, np.sort(own)]:
                later, at = _last_of_ranges(np.searchsorted(run, lowest), np.searchsorted(run, own))
                candidates.append(later << _NUMBER_BITS | run[at] & _NUMBER_MASK)
        pairs = np.unique(np.concatenate(candidates))
        later, earlier = (pairs >> _NUMBER_BITS).astype(np.int64), (pairs & _NUMBER_MASK).astype(np.int64)
        shares = self._shares(rows, later, earlier)
        alike = shares >= self._threshold
        return later[alike], earlier[alike], shares[alike]

    def _shares(self, rows: np.ndarray, later: np.ndarray, earlier: np.ndarray) -> np.ndarray:
        shares = np.empty(len(later))
        for start in range(0, len(later), PIECE):
            piece = slice(start, start + PIECE)
            numbers, compared = earlier[piece], np.empty((len(earlier[piece]), rows.shape[1]), dtype=np.uint8)
            is_new = numbers >= len(self)
            compared[is_new] = rows[numbers[is_new] - len(self)]
            compared[~is_new] = self._rows.array[numbers[~is_new]]
            shares[piece] = (compared == rows[later[piece]]).mean(axis=1)
        return shares


def _last_of_ranges(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which range, and at which position, for the last MAX_CANDIDATES positions of each range."""
    counts = np.minimum(ends - starts, MAX_CANDIDATES)
    which = np.repeat(np.arange(len(counts), dtype=np.uint64), counts)
    return which, np.arange(counts.sum()) + np.repeat(ends - counts.cumsum(), counts)


class _Copies(_Index):
    """Texts by a digest of 16 bytes."""

    def __init__(self):
        super().__init__(n_keys=1, width=16, threshold=1.0)

    def sketch(self, texts: Sequence[str]) -> _Sketches:
        digests = b"".join(hashlib.blake2b(text.encode(), digest_size=16).digest() for text in texts)
        rows = np.frombuffer(digests, dtype=np.uint8).reshape(-1, 16)
        return np.ascontiguousarray(rows[:, :4]).view(np.uint32), rows


class _NearCopies(_Index):
    """Texts by their minimal hashes: a key for each band, and of each hash the lowest byte (Li and König 2010)."""

    def __init__(self, threshold: float, shingle_size: int, slack: float = 0):
        self._shingle_size = shingle_size
        self._band = rows_per_band(threshold)
        super().__init__(n_keys=N_HASHES // self._band, width=N_HASHES, threshold=threshold - slack)

    def sketch(self, texts: Sequence[str]) -> _Sketches:
        signatures = minhashes(texts, self._shingle_size)
        n_keys = N_HASHES // self._band
        bands = signatures[:, : n_keys * self._band].reshape(-1, n_keys, self._band)
        keys = np.zeros(bands.shape[:2], dtype=np.uint32)
        for row in range(self._band):
            keys = (keys ^ bands[:, :, row]) * np.uint32(0x9E3779B1)
        return keys, signatures.astype(np.uint8)


# ---------------------------------------------------------------- what the tools ask


class Distinct:
    """Keeps the first of several similar texts; with `threshold` None only copies are dropped.

    Similarity is not chained: every dropped text is similar to a kept one.
    """

    def __init__(self, threshold: float | None, shingle_size: int = TEXT_SHINGLE):
        # Of the same texts, under the same numbers.
        self._indexes = [_Copies(), *([_NearCopies(threshold, shingle_size)] if threshold is not None else [])]

    def __len__(self) -> int:
        return len(self._indexes[0])

    def keep(self, texts: Sequence[str], exact: Sequence[str] | None = None) -> list[Match | None]:
        """For each text the kept one that it copies or is most similar to; None if it is kept itself.

        `exact`: what must be the same in a copy, if that is not the text.
        """
        sketches = [
            index.sketch(exact if exact is not None and isinstance(index, _Copies) else texts)
            for index in self._indexes
        ]
        alike = defaultdict(list)
        for order, (index, sketch) in enumerate(zip(self._indexes, sketches, strict=True)):
            for position, earlier, share in zip(*(column.tolist() for column in index.pairs(sketch)), strict=True):
                alike[position].append((order, -share, earlier))

        matches: list[Match | None] = [None] * len(texts)
        numbers: dict[int, int] = {}  # of the texts of this call that are kept
        for position in range(len(texts)):
            for order, negative_share, earlier in sorted(alike[position]):
                number = earlier if earlier < len(self) else numbers.get(earlier - len(self))
                if number is not None:
                    matches[position] = Match(number, -negative_share, is_copy=order == 0)
                    break
            else:
                numbers[position] = len(self) + len(numbers)
        for index, (keys, rows) in zip(self._indexes, sketches, strict=True):
            index.add((keys[list(numbers)], rows[list(numbers)]))
        return matches


class Known:
    """Texts to look others up in."""

    def __init__(self, threshold: float, shingle_size: int = QUESTION_SHINGLE):
        self._copies = _Copies()
        self._near = _NearCopies(threshold, shingle_size)

    def add(self, texts: Sequence[str]) -> None:
        texts = [bare_text(text) for text in texts]
        for index in (self._copies, self._near):
            index.add(index.sketch(texts))

    def find(self, texts: Sequence[str]) -> list[Match | None]:
        """For each text its copy or the most similar added one; new texts are not compared with each other."""
        texts = [bare_text(text) for text in texts]
        best: list[Match | None] = [None] * len(texts)
        for index in (self._copies, self._near):
            for position, number, share in zip(*index.pairs(index.sketch(texts)), strict=True):
                if number < len(index) and (best[position] is None or best[position].share < share):
                    best[position] = Match(int(number), float(share), is_copy=index is self._copies)
        return best


class Groups:
    """Groups of texts: all that are linked by similarities over `threshold`, in any number of steps.

    The threshold is lowered by two standard errors: separating similar texts is worse than joining others.
    """

    def __init__(self, threshold: float, shingle_size: int = QUESTION_SHINGLE):
        self._distinct = Distinct(None)  # thousands may ask the same
        self._near = _NearCopies(threshold, shingle_size, slack=2 * (threshold * (1 - threshold) / N_HASHES) ** 0.5)
        self._parents = _Rows(1, np.uint32)
        self._numbers = _Rows(1, np.uint32)

    def add(self, texts: Sequence[str]) -> None:
        texts = [bare_text(text) for text in texts]
        n_before = len(self._distinct)
        matches = self._distinct.keep(texts)
        new = [text for text, match in zip(texts, matches, strict=True) if match is None]
        fresh = iter(range(n_before, n_before + len(new)))
        numbers = [next(fresh) if match is None else match.number for match in matches]
        self._numbers.add(np.array(numbers, dtype=np.uint32).reshape(-1, 1))
        self._parents.add(np.arange(n_before, n_before + len(new), dtype=np.uint32).reshape(-1, 1))
        sketch = self._near.sketch(new)
        later, earlier, _ = self._near.pairs(sketch)
        self._near.add(sketch)
        # Most pairs join the same groups: keep one pair for each new text and group.
        pairs = np.unique(np.stack([later + n_before, self._roots(earlier)], axis=1), axis=0)
        for one, other in pairs.tolist():
            self._join(one, other)

    def labels(self) -> np.ndarray:
        """[number of texts] the group of each, as the number of one of its distinct texts."""
        return self._roots(self._numbers.array[:, 0].astype(np.int64))

    def _roots(self, numbers: np.ndarray) -> np.ndarray:
        parents = self._parents.array[:, 0]
        while len(numbers) and (parents[numbers] != numbers).any():
            numbers = parents[numbers].astype(np.int64)
        return numbers

    def _join(self, one: int, other: int) -> None:
        parents = self._parents.array[:, 0]
        low, high = sorted((self._root(one), self._root(other)))
        parents[high] = low

    def _root(self, number: int) -> int:
        parents = self._parents.array[:, 0]
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = int(parents[number])
        return number
