// Paged attention and the small layers around it, for CPUs; base.py says what lies where.
//
// Compiled at run time for the CPU at hand (build.py). Storage is float32 or bfloat16,
// arithmetic is float32. Every function takes its number of threads from the caller and runs
// serially when waking a thread (10 to 50 us) would cost more than it saves.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include <omp.h>

#include "vectors.h"

namespace {

constexpr int kBlockTokens = 16;  // base.BLOCK_TOKENS; a block's keys fill one vector
static_assert(kBlockTokens == kLanes, "a block of keys is one vector");
constexpr int kChunkBlocks = 4;  // blocks between two updates of the online softmax
constexpr int kChunk = kChunkBlocks * kBlockTokens;
constexpr int64_t kTileRows = 64;  // rows (queries times heads of a group) of one work item
constexpr double kSerialOperations = 1 << 16;  // multiply-adds not worth a second thread
constexpr int64_t kSerialElements = 1 << 14;   // elements of a streaming layer, likewise

#ifdef __AVX512F__
constexpr int kAccumulators = 16;  // vectors that stay in registers in the inner loops
#else
constexpr int kAccumulators = 4;
#endif
constexpr int kMaxRows = kAccumulators / 2;

// exp, relative error about 1e-7; 0 below -87 (so for -inf), 1.7e38 above 88, NaN of NaN.
// 2^n * exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2; coefficients as in Cephes' expf.
inline Vector exponential(const Vector& x) {
  const Vector lowest = splat(-87.0f), highest = splat(88.0f);
  Vector inside = select(x > highest, highest, x);
  inside = select(inside < lowest, lowest, inside);
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const Vector n = (inside * 1.44269504088896341f + magic) - magic;
  const Vector r = (inside - n * 0.693359375f) - n * -2.12194440e-4f;
  Vector p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  const Bits exponent = bit_cast<Bits>(convert<Integers>(n)) << 23;
  return select(x < lowest, splat(0.0f), bit_cast<Vector>(bit_cast<Bits>(p) + exponent));
}

struct Geometry {
  int64_t heads, kv_heads, head_dim;
  float scale;
  int64_t window;  // 0: none

  int64_t group() const { return heads / kv_heads; }
  int64_t qkv_width() const { return (heads + 2 * kv_heads) * head_dim; }
  // First position that the token at `position` sees.
  int64_t first_seen(int64_t position) const {
    return window ? std::max<int64_t>(0, position - window + 1) : 0;
  }
};

// base.Rows.
struct Batch {
  const int32_t* starts;
  const int32_t* contexts;
  const int32_t* tables;
  const int64_t* positions;
  int64_t sequences;
  int64_t table_width;
};

template <typename T>
void rotate(T* head, const float* cos, const float* sin, int64_t half) {
  for (int64_t d = 0; d < half; d += kLanes) {
    const int64_t n = half - d;
    const Vector x1 = load_some(head + d, n), x2 = load_some(head + half + d, n);
    const Vector c = load_some(cos + d, n), s = load_some(sin + d, n);
    store_some(head + d, x1 * c - x2 * s, n);
    store_some(head + half + d, x2 * c + x1 * s, n);
  }
}

template <typename T>
void rotate_and_store(const Geometry& geometry, T* qkv, const float* cos, const float* sin, T* keys,
                      T* values, const Batch& batch, int threads) {
  const int64_t D = geometry.head_dim, G = geometry.kv_heads, H = geometry.heads;
  const int64_t tokens = batch.starts[batch.sequences];
  if (tokens * geometry.qkv_width() < kSerialElements) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t t = 0; t < tokens; ++t) {
    const int32_t* next = std::upper_bound(batch.starts, batch.starts + batch.sequences, t);
    const int64_t sequence = next - batch.starts - 1;
    const int64_t position = batch.positions[t];
    const int64_t slot = position % kBlockTokens;
    const int64_t block = batch.tables[sequence * batch.table_width + position / kBlockTokens];
    T* row = qkv + t * geometry.qkv_width();
    for (int64_t h = 0; h < H + G; ++h)
      rotate(row + h * D, cos + position * (D / 2), sin + position * (D / 2), D / 2);
    for (int64_t g = 0; g < G; ++g) {
      const T* key = row + (H + g) * D;
      T* column = keys + (block * G + g) * D * kBlockTokens + slot;
      for (int64_t d = 0; d < D; ++d) column[d * kBlockTokens] = key[d];
      std::copy_n(row + (H + G + g) * D, D, values + ((block * G + g) * kBlockTokens + slot) * D);
    }
  }
}

// Rows of one sequence and one key-value head: `rows` = queries * heads of the group, the heads of
// a query side by side. Row groups of 8, 4, 2 and 1 rows share every load of keys and values.
struct Tile {
  int64_t rows, group, padded_dim;
  Buffer queries;       // per row group [D][rows of the group], scaled
  Buffer scores;        // [rows][kChunk]
  Buffer sums;          // [rows][padded_dim], not yet divided by `totals`
  Buffer maxima;        // [rows] of the scores so far
  Buffer totals;        // [rows] of the weights so far
  Buffer factors;       // [rows] what the latest maximum makes of the older sums

  Tile(int64_t max_rows, int64_t group, int64_t D)
      : rows(0), group(group), padded_dim(up_to_lanes(D)), queries(allocate(max_rows * D)),
        scores(allocate(max_rows * kChunk)), sums(allocate(max_rows * padded_dim)),
        maxima(allocate(max_rows)), totals(allocate(max_rows)), factors(allocate(max_rows)) {}
};

// Calls visit(rows of the group as a compile-time constant, first row).
template <int Rows = kMaxRows, typename Visit>
void for_row_groups(int64_t rows, const Visit& visit, int64_t first = 0) {
  for (; rows - first >= Rows; first += Rows) visit(std::integral_constant<int, Rows>(), first);
  if constexpr (Rows > 1) for_row_groups<Rows / 2>(rows, visit, first);
}

// scores[row][16 b ...] = queries . keys of blocks b < Blocks. Meanwhile the blocks' values are
// fetched, as are the next chunk's keys while values are multiplied: pages lie scattered, the
// processor does not foresee them, and decoding waits for memory.
template <int Rows, int Blocks, typename T>
inline void multiply_keys(const float* queries, const T* const* keys, const T* const* values,
                          int64_t D, float* scores) {
  Vector sums[Rows][Blocks] = {};
  for (int64_t d = 0; d < D; ++d)
    for (int b = 0; b < Blocks; ++b) {
      __builtin_prefetch(values[b] + d * kBlockTokens, 0, 2);
      const Vector k = load(keys[b] + d * kBlockTokens);
      for (int r = 0; r < Rows; ++r) sums[r][b] += k * queries[d * Rows + r];
    }
  for (int r = 0; r < Rows; ++r)
    for (int b = 0; b < Blocks; ++b) store(scores + r * kChunk + b * kLanes, sums[r][b]);
}

// sums[row][d ...] = sums * factor + weights . values, for Vectors vectors of columns from `d` on.
template <int Rows, int Vectors, typename T>
inline void multiply_values(const float* weights, const T* const* values, const T* const* next_keys,
                            int64_t begin, int64_t end, int64_t D, int64_t d,
                            const float* factors, float* sums, int64_t stride) {
  const bool whole = Vectors > 1 || D - d >= kLanes;
  Vector total[Rows][Vectors];
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v)
      total[r][v] = load(sums + r * stride + d + v * kLanes) * factors[r];
  for (int64_t t = begin; t < end; ++t) {
    const int64_t offset = t % kBlockTokens * D + d;
    const T* value = values[t / kBlockTokens] + offset;
    const T* next_key = next_keys[t / kBlockTokens] + offset;
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(next_key + v * kLanes, 0, 2);
    Vector x[Vectors];
    for (int v = 0; v < Vectors; ++v)
      x[v] = whole ? load(value + v * kLanes) : load_some(value, D - d);
    for (int r = 0; r < Rows; ++r)
      for (int v = 0; v < Vectors; ++v) total[r][v] += x[v] * weights[r * kChunk + t];
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < Vectors; ++v) store(sums + r * stride + d + v * kLanes, total[r][v]);
}

// Scores to weights, in place: one step of the online softmax for the keys at `position` and on.
inline void soften(const Geometry& geometry, Tile& tile, int64_t first_query, int64_t position,
                   int64_t blocks) {
  static constexpr int32_t kNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Integers lane = Memory<Integers>::read(kNumbers);
  for (int64_t row = 0; row < tile.rows; ++row) {
    float* scores = tile.scores.get() + row * kChunk;
    const int64_t query = first_query + row / tile.group;
    // Of the chunk's slots, those from `begin` to `end` are seen. The others may hold anything.
    const int32_t begin = std::max<int64_t>(0, geometry.first_seen(query) - position);
    const int32_t end = std::min<int64_t>(kChunk, query + 1 - position);
    Vector s[kChunkBlocks];
    Vector highest = splat(-std::numeric_limits<float>::max());  // finite: -inf - -inf is NaN
    for (int64_t b = 0; b < blocks; ++b) {
      s[b] = load(scores + b * kLanes);
      if (begin > 0 || end < blocks * kLanes) {
        const Integers slot = lane + static_cast<int32_t>(b * kLanes);
        const Integers seen = (slot >= begin) & (slot < end);
        s[b] = select(seen, s[b], splat(-std::numeric_limits<float>::infinity()));
      }
      highest = select(s[b] > highest, s[b], highest);
    }
    const float before = tile.maxima[row];
    const float now = std::max(before, maximum(highest));
    Vector total = {};
    for (int64_t b = 0; b < blocks; ++b) {
      s[b] = exponential(s[b] - now);
      total += s[b];
      store(scores + b * kLanes, s[b]);
    }
    const float factor = before == now ? 1.0f : first(exponential(splat(before - now)));
    tile.maxima[row] = now;
    tile.factors[row] = factor;
    tile.totals[row] = tile.totals[row] * factor + sum(total);
  }
}

template <typename T>
void attend_tile(const Geometry& geometry, const T* qkv, const T* keys, const T* values,
                 const int32_t* table, int64_t first_query, int64_t queries, int64_t g, Tile& tile,
                 T* out) {
  const int64_t D = geometry.head_dim, G = geometry.kv_heads, R = geometry.group();
  const int64_t stride = tile.padded_dim;
  tile.rows = queries * R;
  for_row_groups(tile.rows, [&](auto Rows, int64_t first) {
    for (int64_t r = 0; r < Rows; ++r) {
      const int64_t query = (first + r) / R, head = g * R + (first + r) % R;
      const T* from = qkv + query * geometry.qkv_width() + head * D;
      float* to = tile.queries.get() + first * D + r;
      for (int64_t d = 0; d < D; d += kLanes) {
        float x[kLanes];
        store(x, load_some(from + d, D - d) * geometry.scale);
        for (int64_t i = 0; i < std::min<int64_t>(kLanes, D - d); ++i) to[(d + i) * Rows] = x[i];
      }
    }
  });
  std::fill_n(tile.maxima.get(), tile.rows, -std::numeric_limits<float>::max());
  std::fill_n(tile.totals.get(), tile.rows, 0.0f);
  std::fill_n(tile.sums.get(), tile.rows * stride, 0.0f);

  const int64_t begin = geometry.first_seen(first_query), end = first_query + queries;
  const int64_t last_block = (end - 1) / kBlockTokens;
  for (int64_t block = begin / kBlockTokens; block <= last_block; block += kChunkBlocks) {
    const int64_t blocks = std::min<int64_t>(kChunkBlocks, last_block + 1 - block);
    const int64_t position = block * kBlockTokens;
    const T *k[kChunkBlocks], *v[kChunkBlocks], *next_k[kChunkBlocks];
    for (int64_t b = 0; b < blocks; ++b) {
      const auto offset = [&](int64_t i) { return (table[i] * G + g) * D * kBlockTokens; };
      k[b] = keys + offset(block + b);
      v[b] = values + offset(block + b);
      next_k[b] = keys + offset(std::min(block + b + kChunkBlocks, last_block));
    }
    for_row_groups(tile.rows, [&](auto Rows, int64_t first) {
      constexpr int Blocks = std::min<int>(kChunkBlocks, kAccumulators / Rows);
      const float* q = tile.queries.get() + first * D;
      float* scores = tile.scores.get() + first * kChunk;
      int64_t b = 0;
      for (; b + Blocks <= blocks; b += Blocks)
        multiply_keys<Rows, Blocks>(q, k + b, v + b, D, scores + b * kLanes);
      for (; b < blocks; ++b)
        multiply_keys<Rows, 1>(q, k + b, v + b, D, scores + b * kLanes);
    });
    soften(geometry, tile, first_query, position, blocks);
    // Slots outside are weighted zero, but what lies in them may be NaN.
    const int64_t from = std::max<int64_t>(0, begin - position);
    const int64_t to = std::min<int64_t>(kChunk, end - position);
    for_row_groups(tile.rows, [&](auto Rows, int64_t first) {
      constexpr int Vectors = std::min<int>(4, kAccumulators / Rows);
      const float* weights = tile.scores.get() + first * kChunk;
      const float* factors = tile.factors.get() + first;
      float* sums = tile.sums.get() + first * stride;
      int64_t d = 0;
      for (; d + Vectors * kLanes <= D; d += Vectors * kLanes)
        multiply_values<Rows, Vectors>(weights, v, next_k, from, to, D, d, factors, sums, stride);
      for (; d < D; d += kLanes)
        multiply_values<Rows, 1>(weights, v, next_k, from, to, D, d, factors, sums, stride);
    });
  }

  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t query = row / R, head = g * R + row % R;
    T* to = out + (query * geometry.heads + head) * D;
    for (int64_t d = 0; d < D; d += kLanes)
      store_some(to + d, load(tile.sums.get() + row * stride + d) / tile.totals[row], D - d);
  }
}

template <typename T>
void attend(const Geometry& geometry, const T* qkv, const T* keys, const T* values,
            const Batch& batch, T* out, int threads) {
  struct Item {
    int64_t sequence, query, queries;
  };
  const int64_t R = geometry.group();
  const int64_t most_queries = std::max<int64_t>(1, kTileRows / R);
  std::vector<Item> items;
  int64_t widest = 1;
  double operations = 0;
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const int64_t rows = batch.starts[s + 1] - batch.starts[s];
    // Tiles depend on their sequence alone, and so does its result, to the last bit.
    const int64_t tiles = (rows + most_queries - 1) / most_queries;
    const int64_t queries = (rows + tiles - 1) / tiles;
    widest = std::max(widest, queries);
    for (int64_t query = 0; query < rows; query += queries)
      items.push_back({s, query, std::min(queries, rows - query)});
    operations += double(rows) * (batch.contexts[s] + rows) * geometry.heads * geometry.head_dim;
  }
  const int64_t count = items.size() * geometry.kv_heads;
  if (operations < kSerialOperations) threads = 1;
#pragma omp parallel num_threads(int(std::min<int64_t>(threads, count)))
  {
    Tile tile(widest * R, R, geometry.head_dim);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      // A prompt's last tiles see the most keys: begin with them, so that threads end together.
      const Item& item = items[items.size() - 1 - i / geometry.kv_heads];
      const int64_t row = batch.starts[item.sequence] + item.query;
      attend_tile(geometry, qkv + row * geometry.qkv_width(), keys, values,
                  batch.tables + item.sequence * batch.table_width,
                  batch.contexts[item.sequence] + item.query, item.queries, i % geometry.kv_heads,
                  tile, out + row * geometry.heads * geometry.head_dim);
    }
  }
}

// Rounded to T where transformers' LlamaRMSNorm is: after adding, after normalizing, at the end.
template <typename T>
void add_rms_norm(T* residual, const T* delta, const T* weight, float epsilon, T* out, int64_t rows,
                  int64_t width, int threads) {
  if (rows * width < kSerialElements) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    T* x = residual + row * width;
    Vector squares = {};
    for (int64_t i = 0; i < width; i += kLanes) {
      Vector v = load_some(x + i, width - i);
      if (delta) {
        v = rounded(v + load_some(delta + row * width + i, width - i), x);
        store_some(x + i, v, width - i);
      }
      squares += v * v;
    }
    const float factor = 1.0f / std::sqrt(sum(squares) / width + epsilon);
    for (int64_t i = 0; i < width; i += kLanes) {
      const Vector v = rounded(load_some(x + i, width - i) * factor, x);
      store_some(out + row * width + i, v * load_some(weight + i, width - i), width - i);
    }
  }
}

template <typename T>
void silu_multiply(const T* gate_up, T* out, int64_t rows, int64_t width, int threads) {
  if (rows * width < kSerialElements) threads = 1;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; i += kLanes) {
      const T* gate = gate_up + 2 * row * width + i;
      const Vector x = load_some(gate, width - i);
      const Vector silu = rounded(x / (exponential(-x) + 1.0f), out);
      store_some(out + row * width + i, silu * load_some(gate + width, width - i), width - i);
    }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                         \
  extern "C" void rotate_and_store_##SUFFIX(const Geometry* geometry, T* qkv, const float* cos,   \
                                            const float* sin, T* keys, T* values,                 \
                                            const Batch* batch, int threads) {                    \
    rotate_and_store(*geometry, qkv, cos, sin, keys, values, *batch, threads);                    \
  }                                                                                               \
  extern "C" void attend_##SUFFIX(const Geometry* geometry, const T* qkv, const T* keys,          \
                                  const T* values, const Batch* batch, T* out, int threads) {     \
    attend(*geometry, qkv, keys, values, *batch, out, threads);                                   \
  }                                                                                               \
  extern "C" void add_rms_norm_##SUFFIX(T* residual, const T* delta, const T* weight,             \
                                        float epsilon, T* out, int64_t rows, int64_t width,       \
                                        int threads) {                                            \
    add_rms_norm(residual, delta, weight, epsilon, out, rows, width, threads);                    \
  }                                                                                               \
  extern "C" void silu_multiply_##SUFFIX(const T* gate_up, T* out, int64_t rows, int64_t width,   \
                                         int threads) {                                           \
    silu_multiply(gate_up, out, rows, width, threads);                                            \
  }

EXPORT(float, f32)
EXPORT(BFloat16, bf16)

// Ends the OpenMP workers of the calling thread; its next parallel region makes new ones.
extern "C" void release_workers() { omp_pause_resource_all(omp_pause_soft); }
