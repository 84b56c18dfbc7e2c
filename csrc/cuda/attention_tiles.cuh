// Where attention's tiles lie, which keys they see, and in what order blocks take them: all of the
// kernel's index arithmetic, in functions that a host can call, so that tests try every value.
//
// Positions are 32-bit: a tensor has at most 2^29 tokens, and bands and offsets at most 2^29.
#pragma once
#include <cstdint>

namespace slimkernels {

#ifdef __CUDACC__
#define SLIM_BOTH __host__ __device__
#else
#define SLIM_BOTH
#endif

SLIM_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }
SLIM_BOTH constexpr int smaller(int a, int b) { return a < b ? a : b; }
SLIM_BOTH constexpr int larger(int a, int b) { return a > b ? a : b; }
SLIM_BOTH constexpr int clamped(int x, int low, int high) {
  return smaller(larger(x, low), larger(low, high));
}

constexpr int kFarthest = 1 << 29;

// The call's sizes and what limits its keys. Of ragged sequences Tq and Tk count all tokens.
struct AttentionShape {
  int sequences, heads, group;  // query heads a key head
  int Tq, Tk;
  int left, right;          // query i sees keys i - left <= j <= i + right; -1: no limit
  int offset;               // added to i, unless causal_offsets is there
  const int* cu_seqlens_q;  // or null, as the next three
  const int* cu_seqlens_k;
  const int* key_lengths;
  const int* causal_offsets;
};

// One sequence: where it lies in the tensors, and what is added to its queries' positions.
struct SequencePlace {
  int batch;  // of dense tensors, else 0
  int q_begin, q_count;
  int k_begin, k_seen;  // keys from k_begin on, those past key_lengths left out
  int offset;
};

// A tile of M queries of one head; of packed heads, M tokens of one key head.
struct QueryTile {
  int sequence, head;
  int first;  // in its sequence
};

// The tiles of keys that a tile of queries sees: key tile t has keys t * N to t * N + N - 1.
struct KeyTiles {
  int begin, end;
};

// The keys that one query sees: first <= j < end.
struct KeyRange {
  int first, end;
};

// Tiles of queries.

// The host does not know ragged lengths, so sequence b has the tiles from cu[b] / M + b up to
// cu[b + 1] / M + b + 1, at least as many as it needs; those left over find their first query past
// the end. (slimkernels/backends/triton/_attention.py counts the same way.)
SLIM_BOTH inline int query_tiles(const AttentionShape& shape, int M) {
  if (shape.cu_seqlens_q == nullptr) return shape.sequences * ceil_div(shape.Tq, M);
  return shape.sequences ? shape.Tq / M + shape.sequences : 0;
}

// The sequence of a ragged tile: the last one whose tiles start no later. Whatever the boundaries
// are, it exists: on a GPU nobody has checked them.
SLIM_BOTH inline int ragged_sequence(const int* cu, int sequences, int tile, int M) {
  int low = 0, high = sequences - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (cu[middle] / M + middle <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// How a launch hands out its tiles. See tile_of_turn.
struct AttentionSchedule {
  int blocks;
  int section;  // heads (of all sequences) that are worked on together; all of them or fewer
};

SLIM_BOTH inline bool in_pairs(const AttentionShape& shape, const AttentionSchedule& schedule) {
  return shape.right >= 0 && shape.cu_seqlens_q == nullptr &&
         schedule.section < shape.sequences * shape.heads;
}

// How many tiles a block takes, at most.
SLIM_BOTH inline int block_turns(const AttentionShape& shape, const AttentionSchedule& schedule,
                                 int M) {
  if (!in_pairs(shape, schedule))
    return ceil_div(query_tiles(shape, M) * shape.heads, schedule.blocks);
  const int pairs = ceil_div(ceil_div(shape.Tq, M), 2) * shape.sequences * shape.heads;
  return 2 * ceil_div(pairs, schedule.blocks);
}

// Which piece of work a block takes: there and back again, so that the blocks that got the
// heaviest of one round get the lightest of the next.
SLIM_BOTH inline int work_of_turn(int block, int blocks, int turn) {
  return turn * blocks + (turn % 2 ? blocks - 1 - block : block);
}

// Piece `index` of a list that goes through the sections, in each through its rows, and in each row
// through the section's heads, a group's side by side: the head of all, and in `first` the row.
SLIM_BOTH inline QueryTile section_row(int index, int rows, int section, int all) {
  const int before = index / (section * rows) * section;
  const int here = smaller(section, all - before), rest = index - before * rows;
  return {0, before + rest % here, rest / here};
}

SLIM_BOTH inline QueryTile dense_tile(const AttentionShape& shape, int head, int tile, int M) {
  return {head / shape.heads, head % shape.heads, tile * M};
}

// Under a right limit the last tiles of a sequence weigh most, and come first.
SLIM_BOTH inline bool is_last_first(const AttentionShape& shape) { return shape.right >= 0; }

SLIM_BOTH inline QueryTile ragged_tile(const AttentionShape& shape, int work, int M) {
  int tile = work / shape.heads;
  if (is_last_first(shape)) tile = query_tiles(shape, M) - 1 - tile;
  const int sequence = ragged_sequence(shape.cu_seqlens_q, shape.sequences, tile, M);
  // Negative before the first sequence, of boundaries that do not start with 0: such tiles have no
  // tokens. As that sequence's first tile once more they would add to dq again.
  const int first = (tile - sequence - shape.cu_seqlens_q[sequence] / M) * M;
  return {sequence, work % shape.heads, first < 0 ? kFarthest : first};
}

// Piece `work` of all tiles: section by section, in each those first that weigh most. Ragged: all
// heads of a tile side by side. A head's tiles come in one direction: turn_of relies on it.
SLIM_BOTH inline QueryTile listed_tile(const AttentionShape& shape, int section, int work, int M) {
  if (shape.cu_seqlens_q != nullptr) return ragged_tile(shape, work, M);
  const int all = shape.sequences * shape.heads, tiles = ceil_div(shape.Tq, M);
  const QueryTile found = section_row(work, tiles, section, all);
  const int tile = is_last_first(shape) ? tiles - 1 - found.first : found.first;
  return dense_tile(shape, found.head, tile, M);
}

// The tile that a block takes in its turn; its head is -1 if there is none.
//
// Dense: one section of all heads, if L2 holds their keys and values or enough blocks read each
// head's at a time; else so many heads that L2 does. Under a right limit tiles differ in weight.
// One section then starts with the heaviest. Of several, each block takes a tile together with the
// one that makes up for it, the last with the first, so that sections weigh the same for all
// blocks. Ragged: all heads of a tile side by side.
SLIM_BOTH inline QueryTile tile_of_turn(const AttentionShape& shape,
                                        const AttentionSchedule& schedule, int block, int turn,
                                        int M) {
  const QueryTile none = {0, -1, 0};
  const int all = shape.sequences * shape.heads, tiles = ceil_div(shape.Tq, M);
  if (in_pairs(shape, schedule)) {
    const int pairs = ceil_div(tiles, 2), index = turn / 2 * schedule.blocks + block;
    if (index >= pairs * all) return none;
    const QueryTile pair = section_row(index, pairs, schedule.section, all);
    const int heavy = tiles - 1 - pair.first, light = pair.first;
    if (turn % 2 && heavy == light) return none;
    return dense_tile(shape, pair.head, turn % 2 ? light : heavy, M);
  }
  const int work = work_of_turn(block, schedule.blocks, turn);
  if (work >= query_tiles(shape, M) * shape.heads) return none;
  return listed_tile(shape, schedule.section, work, M);
}

// The heads of a section, for keys and values of `bytes_of_head` bytes a key head: whole groups.
SLIM_BOTH inline int section_of(const AttentionShape& shape, int blocks, int64_t bytes_of_head,
                                int64_t l2_bytes) {
  const int64_t all = int64_t(shape.sequences) * shape.heads;
  const int64_t fit = l2_bytes / bytes_of_head * shape.group;
  // A block reads some 30 bytes a cycle: with four blocks to a stream, 132 multiprocessors read
  // some 1.8 TB/s of DRAM.
  const bool is_shared = int64_t(blocks) * shape.group >= 4 * all;
  if (fit >= all || is_shared) return int(all);
  return int(fit > shape.group ? fit : shape.group);
}

// Heads that share keys.

// A tile has rows for `packed` heads of each token: 1, or all that read a key head, so that short
// sequences fill tiles, and their keys are loaded once for all of these heads. All functions here
// take the packed call, and as M a tile's tokens: its rows / packed; what is left of these is idle.
SLIM_BOTH inline AttentionShape packed_call(AttentionShape shape, int packed) {
  shape.heads /= packed;
  shape.group /= packed;
  return shape;
}

// How many heads tiles of `rows` rows pack: all that they can if that makes fewer tiles.
SLIM_BOTH inline int packed_heads(const AttentionShape& shape, int rows) {
  if (shape.group > rows) return 1;
  const int tokens = rows / shape.group;
  const AttentionShape packed = packed_call(shape, shape.group);
  bool pays = query_tiles(packed, tokens) * packed.heads < query_tiles(shape, rows) * shape.heads;
  // Of ragged sequences both counts are limits. A group that divides the tile needs no more tiles
  // whatever the lengths are; another, with idle rows, may, and goes by sequences of mean length.
  if (shape.cu_seqlens_q != nullptr && rows % shape.group && pays) {
    const int mean = ceil_div(shape.Tq, shape.sequences);
    pays = ceil_div(mean, tokens) < ceil_div(mean, rows) * shape.group;
  }
  return pays ? shape.group : 1;
}

// The query of a row of a tile, and its head in the call that was not packed.
struct RowQuery {
  int token, head;  // token: in its sequence
};
SLIM_BOTH inline RowQuery query_of_row(const QueryTile& tile, int packed, int row) {
  return {tile.first + row / packed, tile.head * packed + row % packed};
}

// Keys.

SLIM_BOTH inline SequencePlace place_of(const AttentionShape& shape, int sequence) {
  SequencePlace place = {sequence, 0, shape.Tq, 0, shape.Tk, shape.offset};
  if (shape.cu_seqlens_q != nullptr) {
    place.batch = 0;
    place.q_begin = clamped(shape.cu_seqlens_q[sequence], 0, shape.Tq);
    place.q_count = clamped(shape.cu_seqlens_q[sequence + 1], place.q_begin, shape.Tq);
    place.q_count -= place.q_begin;
    place.k_begin = clamped(shape.cu_seqlens_k[sequence], 0, shape.Tk);
    place.k_seen = clamped(shape.cu_seqlens_k[sequence + 1], place.k_begin, shape.Tk);
    place.k_seen -= place.k_begin;
  }
  if (shape.key_lengths != nullptr)
    place.k_seen = smaller(place.k_seen, larger(shape.key_lengths[sequence], 0));
  if (shape.causal_offsets != nullptr)
    place.offset = clamped(shape.causal_offsets[sequence], -kFarthest, kFarthest);
  return place;
}

SLIM_BOTH inline KeyRange keys_of_query(const AttentionShape& shape, const SequencePlace& place,
                                        int i) {
  KeyRange keys = {0, place.k_seen};
  if (shape.left >= 0) keys.first = larger(i + place.offset - shape.left, 0);
  if (shape.right >= 0) keys.end = smaller(keys.end, i + place.offset + shape.right + 1);
  return keys;
}

// Of `count` queries from `first` on: no fewer than they see, in whole tiles; begin = end if none.
SLIM_BOTH inline KeyTiles key_tiles(const AttentionShape& shape, const SequencePlace& place,
                                    int first, int count, int N) {
  const int begin = keys_of_query(shape, place, first).first;
  const int end = keys_of_query(shape, place, first + count - 1).end;
  if (end <= begin) return {0, 0};
  return {begin / N, ceil_div(end, N)};
}

// Whether some of these queries do not see some key of the tile.
SLIM_BOTH inline bool is_edge(const AttentionShape& shape, const SequencePlace& place, int first,
                              int count, int key_tile, int N) {
  const int latest_begin = keys_of_query(shape, place, first + count - 1).first;
  const int earliest_end = keys_of_query(shape, place, first).end;
  return key_tile * N < latest_begin || (key_tile + 1) * N > earliest_end;
}

// Whether TMA loads, behind the last key, tokens that are somebody else's: past Tk it gives zeros.
SLIM_BOTH inline bool has_foreign_tail(const AttentionShape& shape, const SequencePlace& place,
                                       int key_tile, int N) {
  return (key_tile + 1) * N > place.k_seen && place.k_begin + place.k_seen < shape.Tk;
}

// The same seen from the keys.

// The gradients of keys and values come in tiles of keys, which "see" the queries that see them: a
// call whose queries are these keys, whose key heads are its only heads, and whose band is turned
// over. All functions above take it; it has no key_lengths and no causal_offsets.
SLIM_BOTH inline AttentionShape mirrored(const AttentionShape& shape) {
  return {shape.sequences,
          shape.heads / shape.group,
          1,
          shape.Tk,
          shape.Tq,
          shape.right,
          shape.left,
          -shape.offset,
          shape.cu_seqlens_k,
          shape.cu_seqlens_q,
          nullptr,
          nullptr};
}

// A sequence of the mirrored call: q_count is that of all its keys, seen or not.
SLIM_BOTH inline SequencePlace mirrored_place(const AttentionShape& shape, int sequence) {
  SequencePlace keys = place_of(mirrored(shape), sequence);
  keys.offset = -place_of(shape, sequence).offset;
  return keys;
}

// Turns: tiles of keys add to a tile of queries one after another, in the order in which blocks
// take them, so that one whose turn it is not yet waits for blocks that have started.

// The turn of a tile of N keys at the tile of M queries from `first` on, which see some of them.
SLIM_BOTH inline int turn_of(const AttentionShape& shape, const SequencePlace& place, int first,
                             int M, int key_tile, int N) {
  if (!is_last_first(mirrored(shape))) return key_tile;  // without a left limit all see key 0
  const int last = smaller(first + M, place.q_count) - 1;
  return (keys_of_query(shape, place, last).end - 1) / N - key_tile;
}

// The tile of queries that a block visits as its n-th, counted from 0. Against the direction of the
// keys: where a band ends, blocks that start together then come to a tile one after another.
SLIM_BOTH inline int visited_tile(const AttentionShape& turned, const KeyTiles& queries, int n) {
  return is_last_first(turned) ? queries.begin + n : queries.end - 1 - n;
}

// The numbers that a head's tiles of M queries take.
SLIM_BOTH inline int numbers_of_head(const AttentionShape& shape, int M) {
  return shape.cu_seqlens_q != nullptr ? query_tiles(shape, M) : ceil_div(shape.Tq, M);
}

// A number for each tile of M queries of each head, less than query_tiles() * heads.
SLIM_BOTH inline int tile_number(const AttentionShape& shape, const SequencePlace& place,
                                 const QueryTile& tile, int M) {
  const int index = tile.first / M, all = numbers_of_head(shape, M);
  if (shape.cu_seqlens_q == nullptr) return (tile.sequence * shape.heads + tile.head) * all + index;
  return tile.head * all + place.q_begin / M + tile.sequence + index;
}

}  // namespace slimkernels
