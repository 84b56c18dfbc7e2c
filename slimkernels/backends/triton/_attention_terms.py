"""What attention's kernels are given, and what their steps hand to each other: names for tuples.

Features, Tile and Ones hold constants. The others hold run-time values, of which those that are
None cost nothing; up to Statistics the launcher makes them, the rest a kernel's steps.

B sequences, H heads, T tokens, D head width. Sequences come dense, in (B, H, T, D), or ragged, one
after the other in (T, H, D) with their boundaries in cu_seqlens. A kernel sees both as tokens of
one head of a batch row; all ragged ones lie in row 0.
"""

from typing import Any, NamedTuple


class Rows(NamedTuple):
    """An operand whose rows are the D elements of one token and head, and its strides."""

    ptr: Any
    batch: Any
    head: Any
    token: Any


class Operands(NamedTuple):
    """What a kernel reads, as Rows."""

    q: Any
    k: Any
    v: Any
    dy: Any = None
    y: Any = None


class Lengths(NamedTuple):
    """Pointers, or None: (B,) how many keys a dense sequence has; (B + 1,) ragged boundaries; (B,)
    what is added to the positions of a sequence's queries."""

    keys: Any
    cu_q: Any
    cu_k: Any
    offsets: Any


class Dropout(NamedTuple):
    """A pointer to the seed, or None, and what survivors are multiplied by."""

    seed: Any
    factor: Any


class Plane(NamedTuple):
    """A mask or bias: its strides, 0 along a dimension that it is broadcast over, and its ends."""

    ptr: Any
    sequence: Any
    head: Any
    query: Any
    key: Any
    queries: Any
    keys: Any


class Table(NamedTuple):
    """A relative bias: (H, count) values, and the (2 * far + 1,) bucket of each distance."""

    ptr: Any
    buckets: Any
    count: Any
    far: Any


class Scoring(NamedTuple):
    """What becomes of the products; None for what the call does not ask for."""

    scale: Any
    softcap: Any = None
    bias: Any = None  # Plane
    mask: Any = None  # Plane
    slopes: Any = None  # (sequences or 1, H)
    slopes_sequence: Any = None  # its stride
    table: Any = None  # Table
    sinks: Any = None  # (H,)
    # The user's functions, not among Features: where a tuple is a constant, Triton's cache on disk
    # tells functions apart by their names only.
    score: Any = None
    derivative: Any = None
    mask_function: Any = None
    tensors: Any = None


class Terms(NamedTuple):
    """What a call asks for, beside its Numbers."""

    lengths: Any
    scoring: Any
    dropout: Any
    group: Any  # how many query heads read a key head


class Numbers(NamedTuple):
    """A call's integers. Kernels take them one by one and not as a tuple, in which Triton would
    compile them in where they are 1 and note where 16 divides them: one compiled kernel serves all
    lengths and rates."""

    threshold: Any  # of dropout
    Tq: Any
    Tk: Any
    left: Any  # query i sees keys from i + offset - left to i + offset + right
    right: Any
    offset: Any  # where sequences have none of their own


NUMBERS = list(Numbers._fields)  # for do_not_specialize


class Features(NamedTuple):
    """What a kernel is compiled for."""

    HAS_LEFT: bool  # whether the band has these ends
    HAS_RIGHT: bool
    MODIFIED: bool  # scores are more than products
    MASKED: bool  # keys may be hidden in any tile, not only in those at an edge
    KEYS_END: bool  # a tile's keys may lie past the visible ones
    DERIVED: bool  # the scores' derivatives are needed
    PRECISION: str  # of float32 products


class Ones(NamedTuple):
    """Whether a bias has one of these, which all of them read."""

    SEQUENCE: bool
    HEAD: bool
    QUERY: bool
    KEY: bool


class Tile(NamedTuple):
    """How wide heads are, and how large the tiles."""

    D: int
    DV: int
    BLOCK_M: int  # queries
    BLOCK_N: int  # keys
    BLOCK_D: int
    BLOCK_DV: int


class Statistics(NamedTuple):
    """Pointers to one float32 a query and head; `total` is None where P is taken to sum to 1.

    dtable  (tiles, H, 2^n) float32: each tile's share of a relative bias's gradient; or None
    """

    lse: Any
    low: Any  # what lse lacks
    delta: Any
    total: Any
    dlse: Any
    dtable: Any


class Place(NamedTuple):
    """One sequence: where its tokens are, and which keys its queries see."""

    sequence: Any
    batch: Any  # int64, as the two begins
    q_begin: Any
    q_count: Any
    k_begin: Any
    k_count: Any
    seen: Any  # how many of its keys are visible
    offset: Any  # query i sees keys from i + offset - left to i + offset + right
    left: Any
    right: Any


class Span(NamedTuple):
    """The keys outside of begin (a multiple of BLOCK_N) and end are seen by no query of a tile,
    those inside of whole_begin and whole_end by every one, as far as length and band decide. Or the
    queries that see no key of a tile, and those that see all."""

    begin: Any
    end: Any
    whole_begin: Any
    whole_end: Any


class Queries(NamedTuple):
    """Queries of one head. (BLOCK_M, 1) where they are the rows of scores, as columns (1, BLOCK_M):
    i, counted within the sequence, and the keys of dropout. (BLOCK_M,): the others but q."""

    i: Any
    token: Any  # the first one's
    present: Any  # whether there is one
    at: Any  # where its statistics are
    q: Any  # (BLOCK_M, BLOCK_D)
    late: Any  # what remains to multiply products by
    key0: Any
    key1: Any


class Known(NamedTuple):
    """What is known of queries in backward, shaped as Queries.i."""

    lse: Any
    low: Any
    delta: Any
    total: Any  # only float32 divides by it; None where it is being summed


class Pairs(NamedTuple):
    """The queries and keys of a tile of scores, in shapes that broadcast to it."""

    i: Any
    j: Any
    head: Any
    place: Any
    edge: Any  # whether length or band may hide some
