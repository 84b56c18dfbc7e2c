// csrc/cuda/attention_tiles.cuh against brute force, for every small shape. Says what failed.
#include "attention_tiles.cuh"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <set>
#include <tuple>
#include <vector>

using namespace slimkernels;

static void expect(bool holds, const char* what) {
  if (holds) return;
  std::printf("%s\n", what);
  std::exit(1);
}

// Each tile of each head once; of one section never a light one before a heavier.
void check_dense_order(int B, int H, int Tq, int right, int M, AttentionSchedule schedule) {
  const AttentionShape shape = {B, H, 1, Tq, 9, -1, right, 0, nullptr, nullptr, nullptr, nullptr};
  std::multiset<std::tuple<int, int, int>> found;
  const int tiles = ceil_div(Tq, M), turns = block_turns(shape, schedule, M);
  const bool pairs = in_pairs(shape, schedule);
  for (int block = 0; block < schedule.blocks; ++block) {
    QueryTile previous = {0, -1, 0};
    for (int turn = 0; turn < turns; ++turn) {
      const QueryTile tile = tile_of_turn(shape, schedule, block, turn, M);
      if (tile.head < 0) continue;
      expect(tile.sequence >= 0 && tile.sequence < B && tile.head < H, "no head");
      expect(tile.first % M == 0 && tile.first >= 0 && tile.first < Tq, "no tile");
      found.insert({tile.sequence, tile.head, tile.first});
      if (pairs && turn % 2)
        expect(tile.first + previous.first == (tiles - 1) * M && tile.head == previous.head,
               "a pair does not make up for itself");
      if (right >= 0 && schedule.section == B * H && turn)
        expect(tile.first <= previous.first, "not heaviest first");
      previous = tile;
    }
  }
  const std::set<std::tuple<int, int, int>> once(found.begin(), found.end());
  expect(found.size() == once.size(), "a tile is done twice");
  expect(int(found.size()) == B * H * tiles, "a tile is missing");
}

// Each token of each sequence in one tile of each head.
void check_ragged_order(std::mt19937& random, int M, int right) {
  std::vector<int> cu = {0};
  const int B = 1 + random() % 9, H = 1 + random() % 3;
  for (int b = 0; b < B; ++b) cu.push_back(cu.back() + (random() % 3 ? random() % 12 : 0));
  const AttentionShape shape = {B,     H, 1,         cu[B],     cu[B],   -1,
                                right, 0, cu.data(), cu.data(), nullptr, nullptr};
  const AttentionSchedule schedule = {1 + int(random() % 5), 1};
  std::multiset<std::tuple<int, int, int>> found;
  for (int block = 0; block < schedule.blocks; ++block)
    for (int turn = 0; turn < block_turns(shape, schedule, M); ++turn) {
      const QueryTile tile = tile_of_turn(shape, schedule, block, turn, M);
      if (tile.head < 0) continue;
      const SequencePlace place = place_of(shape, tile.sequence);
      expect(place.q_begin == cu[tile.sequence], "a sequence begins elsewhere");
      for (int i = tile.first; i < smaller(tile.first + M, place.q_count); ++i)
        found.insert({tile.sequence, tile.head, i});
    }
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < H; ++h)
      for (int i = 0; i < cu[b + 1] - cu[b]; ++i)
        expect(found.count({b, h, i}) == 1, "a ragged query is not in one tile");
  expect(int(found.size()) == cu[B] * H, "ragged tiles have too many queries");
}

// With heads side by side in tiles of R rows: each query of each head is a row of one tile, in no
// more tiles than there were.
void check_packed(int B, int H, int group, int Tq, int R, const std::vector<int>& cu) {
  const bool is_ragged = !cu.empty();
  const int* const starts = is_ragged ? cu.data() : nullptr;
  const AttentionShape shape = {
      B, H, group, is_ragged ? cu[B] : Tq, 9, -1, -1, 0, starts, starts, nullptr, nullptr};
  const int packed = packed_heads(shape, R), M = R / packed;
  expect(packed == 1 || packed == group, "a part of a group is packed");
  const AttentionShape seen = packed_call(shape, packed);
  expect(seen.heads * packed == H && seen.group * packed == group, "other heads");
  const int tiles = query_tiles(seen, M) * seen.heads;
  expect(packed == 1 || tiles < query_tiles(shape, R) * H, "packed in vain");
  std::multiset<std::tuple<int, int, int>> found;
  for (int work = 0; work < tiles; ++work) {
    const QueryTile tile = listed_tile(seen, B * seen.heads, work, M);
    const int count = smaller(place_of(seen, tile.sequence).q_count - tile.first, M);
    for (int row = 0; row < count * packed; ++row) {
      const RowQuery query = query_of_row(tile, packed, row);
      expect(query.head / group == tile.head / seen.group, "a row of another key head");
      found.insert({tile.sequence, query.head, query.token});
    }
  }
  for (int b = 0; b < B; ++b)
    for (int h = 0; h < H; ++h)
      for (int i = 0; i < (is_ragged ? cu[b + 1] - cu[b] : Tq); ++i)
        expect(found.count({b, h, i}) == 1, "a packed query is not in one row");
  expect(int(found.size()) == shape.Tq * H * (is_ragged ? 1 : B), "too many packed rows");
}

void check_packed_heads(std::mt19937& random) {
  for (int group : {1, 2, 3, 4, 7, 9})
    for (int Tq = 1; Tq < 20; ++Tq) {
      check_packed(2, 2 * group, group, Tq, 8, {});
      std::vector<int> cu = {0};
      for (int b = 0; b < 3; ++b) cu.push_back(cu.back() + random() % Tq);
      check_packed(3, 2 * group, group, 0, 8, cu);
    }
  AttentionShape shape = {1, 8, 4, 2, 9, -1, 0, 0, nullptr, nullptr, nullptr, nullptr};
  expect(packed_heads(shape, 8) == 4, "a short sequence is not packed");
  shape.Tq = 8;
  expect(packed_heads(shape, 8) == 1, "full tiles are packed");
  for (int length : {2, 8}) {
    const std::vector<int> cu = {0, length, 2 * length, 3 * length};
    shape = {3, 6, 3, cu[3], cu[3], -1, -1, 0, cu.data(), cu.data(), nullptr, nullptr};
    expect(packed_heads(shape, 8) == (length == 2 ? 3 : 1), "idle rows cost more than is saved");
  }
}

void check_sections() {
  const AttentionShape shape = {2, 8, 4, 9, 9, -1, 0, 0, nullptr, nullptr, nullptr, nullptr};
  expect(section_of(shape, 3, 10, 40) == 16, "all heads fit");
  expect(section_of(shape, 3, 10, 39) == 12, "three groups fit");
  expect(section_of(shape, 3, 10, 1) == 4, "a group is taken whole");
  expect(section_of(shape, 16, 10, 1) == 16, "blocks that share a head need no section");
}

// Which keys queries see, and what the kernel makes of it.
void check_keys(int Tq, int Tk, int seen, int left, int right, int offset) {
  AttentionShape shape = {1, 1, 1, Tq, Tk, left, right, offset, nullptr, nullptr, &seen, nullptr};
  const SequencePlace place = place_of(shape, 0);
  const auto sees = [&](int i, int j) {
    if (j >= seen || j >= Tk) return false;
    return (left < 0 || j >= i + offset - left) && (right < 0 || j <= i + offset + right);
  };
  for (int i = 0; i < Tq; ++i) {
    const KeyRange keys = keys_of_query(shape, place, i);
    for (int j = 0; j < Tk + 3; ++j)
      expect(sees(i, j) == (j >= keys.first && j < keys.end), "a query sees other keys");
  }
  for (int M : {1, 3, 4})
    for (int N : {1, 2, 3})
      for (int first = 0; first < Tq; first += M) {
        const int count = smaller(M, Tq - first);
        const KeyTiles tiles = key_tiles(shape, place, first, count, N);
        for (int t = 0; t * N < Tk + N; ++t) {
          bool some = false, all = true;
          for (int i = first; i < first + count; ++i)
            for (int j = t * N; j < t * N + N; ++j) {
              some = some || sees(i, j);
              all = all && sees(i, j);
            }
          const bool visited = t >= tiles.begin && t < tiles.end;
          expect(visited || !some, "a tile with visible keys is left out");
          expect(!visited || all == !is_edge(shape, place, first, count, t, N), "a wrong edge");
          bool foreign = false;
          for (int j = t * N; j < t * N + N; ++j) foreign = foreign || (j >= seen && j < Tk);
          if (t * N < seen)
            expect(foreign == has_foreign_tail(shape, place, t, N), "a wrong foreign tail");
        }
      }
}

// The same from the keys' side: which queries see them, in which tiles, and which keys are there.
void check_mirrored(int Tq, int Tk, int seen, int left, int right, int offset) {
  const AttentionShape shape = {2,     6,      3,       Tq,      Tk,      left,
                                right, offset, nullptr, nullptr, nullptr, nullptr};
  const AttentionShape turned = mirrored(shape);
  const SequencePlace place = mirrored_place(shape, 1);
  expect(turned.heads == 2 && turned.group == 1 && place.batch == 1, "other key heads");
  expect(place.q_count == Tk && place.k_seen == Tq, "other keys or queries");
  const auto sees = [&](int i, int j) {
    return (left < 0 || j >= i + offset - left) && (right < 0 || j <= i + offset + right);
  };
  for (int N : {1, 3})
    for (int M : {1, 2, 3})
      for (int first = 0; first < smaller(seen, Tk); first += N) {
        const int count = smaller(N, smaller(seen, Tk) - first);
        const KeyTiles tiles = key_tiles(turned, place, first, count, M);
        for (int t = 0; t * M < Tq + M; ++t) {
          bool some = false, all = true;
          for (int j = first; j < first + count; ++j) {
            const KeyRange queries = keys_of_query(turned, place, j);
            for (int i = t * M; i < t * M + M; ++i) {
              const bool found = i >= queries.first && i < queries.end;
              expect(found == (i < Tq && sees(i, j)), "a key is seen by other queries");
              some = some || found;
              all = all && found;
            }
          }
          const bool visited = t >= tiles.begin && t < tiles.end;
          expect(visited || !some, "a tile with queries that see is left out");
          expect(!visited || all == !is_edge(turned, place, first, count, t, M), "a wrong edge");
        }
      }
}

// Of ragged sequences, with offsets of their own.
void check_mirrored_places(std::mt19937& random) {
  std::vector<int> cu_q = {0}, cu_k = {0}, offsets;
  const int B = 1 + random() % 5;
  for (int b = 0; b < B; ++b) {
    cu_q.push_back(cu_q.back() + random() % 9);
    cu_k.push_back(cu_k.back() + random() % 9);
    offsets.push_back(int(random() % 9) - 4);
  }
  const AttentionShape shape = {B,  1, 1,           cu_q[B],     cu_k[B], 2,
                                -1, 0, cu_q.data(), cu_k.data(), nullptr, offsets.data()};
  for (int b = 0; b < B; ++b) {
    const SequencePlace place = mirrored_place(shape, b);
    expect(place.q_begin == cu_k[b] && place.q_count == cu_k[b + 1] - cu_k[b], "other keys");
    expect(place.k_begin == cu_q[b] && place.k_seen == cu_q[b + 1] - cu_q[b], "other queries");
    expect(place.offset == -offsets[b], "another offset");
  }
}

// The tiles of keys that add to a tile of queries, in the order in which blocks take them, have the
// turns 0, 1, 2 ...; tiles of queries are numbered without gaps or doubles.
void check_turns(const AttentionShape& shape, int M, int N) {
  const AttentionShape turned = mirrored(shape);
  const int all = query_tiles(shape, M) * shape.heads;
  std::vector<int> passed(all, 0);
  for (int work = 0; work < query_tiles(turned, N) * turned.heads; ++work) {
    const QueryTile tile = listed_tile(turned, 1, work, N);
    const SequencePlace keys = mirrored_place(shape, tile.sequence);
    const SequencePlace place = place_of(shape, tile.sequence);
    const int present = smaller(keys.q_count, place.k_seen) - tile.first;
    if (present <= 0) continue;
    const KeyTiles queries = key_tiles(turned, keys, tile.first, smaller(present, N), M);
    std::set<int> visited;
    for (int n = 0; n < queries.end - queries.begin; ++n) {
      const int at = visited_tile(turned, queries, n), first = at * M;
      expect(at >= queries.begin && at < queries.end && visited.insert(at).second, "no walk");
      for (int head = tile.head * shape.group; head < (tile.head + 1) * shape.group; ++head) {
        const int number = tile_number(shape, place, {tile.sequence, head, first}, M);
        expect(number >= 0 && number < all, "a tile has no number");
        const int turn = turn_of(shape, place, first, M, tile.first / N, N);
        expect(turn == passed[number]++, "a turn never comes");
      }
    }
  }
  for (int work = 0; work < all; ++work) {
    const QueryTile tile = listed_tile(shape, shape.sequences * shape.heads, work, M);
    const SequencePlace place = place_of(shape, tile.sequence);
    const int count = smaller(place.q_count - tile.first, M);
    if (count <= 0) continue;
    const KeyTiles seen = key_tiles(shape, place, tile.first, count, N);
    int& turns = passed[tile_number(shape, place, tile, M)];
    expect(turns == seen.end - seen.begin, "a sum has other tiles, or two tiles one number");
    turns = -1;
  }
}

void check_ragged_turns(std::mt19937& random) {
  // Boundaries that do not start with 0 are wrong, but must not spoil the tokens they have.
  std::vector<int> cu_q = {int(random() % 7)}, cu_k = {int(random() % 7)}, lengths, offsets;
  const int B = 1 + random() % 5, group = 1 + random() % 2;
  for (int b = 0; b < B; ++b) {
    cu_q.push_back(cu_q.back() + random() % 9);
    cu_k.push_back(cu_k.back() + random() % 9);
    lengths.push_back(random() % 9);
    offsets.push_back(int(random() % 9) - 4);
  }
  const int left = int(random() % 5) - 1, right = int(random() % 5) - 1;
  check_turns({B, 2 * group, group, cu_q[B], cu_k[B], left, right, 0, cu_q.data(), cu_k.data(),
               random() % 2 ? lengths.data() : nullptr, offsets.data()},
              1 + random() % 4, 1 + random() % 4);
}

int main() {
  for (int B : {1, 3})
    for (int H : {1, 2, 4})
      for (int Tq : {1, 4, 5, 13})
        for (int right : {-1, 0})
          for (int section = 1; section <= B * H; ++section)
            for (int blocks : {1, 2, 3, 5, 8})
              check_dense_order(B, H, Tq, right, 4, {blocks, section});
  check_sections();
  std::mt19937 random(0);
  check_packed_heads(random);
  for (int n = 0; n < 500; ++n) check_ragged_order(random, 1 + random() % 5, n % 2 - 1);
  for (int Tq : {1, 5, 7})
    for (int Tk : {1, 4, 8})
      for (int seen : {0, 1, 3, 8})
        for (int left = -1; left < 4; ++left)
          for (int right = -1; right < 4; ++right)
            for (int offset = -9; offset < 10; ++offset)
              if (seen <= Tk) {
                check_keys(Tq, Tk, seen, left, right, offset);
                check_mirrored(Tq, Tk, seen, left, right, offset);
                const int lengths[2] = {seen, Tk};
                check_turns(
                    {2, 2, 2, Tq, Tk, left, right, offset, nullptr, nullptr, lengths, nullptr}, 2,
                    3);
              }
  for (int n = 0; n < 100; ++n) check_mirrored_places(random);
  for (int n = 0; n < 2000; ++n) check_ragged_turns(random);
}
