// Products of tokens with a matrix of 4-bit integers in groups, for CPUs: y = x W^T + b, where
// W = (integers - zero point) * scale, by group of inputs.
//
// A token's inputs are rounded to 16-bit integers, by group: the largest is 32767. So a group's sum is
// one of integers, and exact in whatever order it is added up; groups are added in order, as floats. A
// row's result does not depend on the others, to the last bit, in any type of tokens.
//
// W lies in panels of 32 outputs: [panels][groups] of a block: words [group / 8][32], scales [32] as
// floats and zero points [32] of 16 bits. Four bits after another, a word has the inputs 0, 2, 4, 6,
// 1, 3, 5, 7 of its eight: shifted and masked it is a pair of 16-bit integers.

#include <omp.h>

#include <cmath>

#include "panels.h"
#include "sharing.h"
#include "vectors.h"

namespace {

constexpr int64_t kWordInputs = 8;
constexpr int64_t kVectorBytes = kLanes * sizeof(uint32_t);
constexpr float kLargestInput = 32767.0f;
constexpr int64_t kMostGroup = 128;  // the largest of int4.GROUPS

// Of a panel's vectors, and of rows, as many at once as sums stay in registers beside the weights.
#ifdef __AVX512F__
constexpr int kWidth = 2, kMostRows = 12;
#else
constexpr int kWidth = 1, kMostRows = 5;
#endif

// sums += low halves * low half of x + high halves * high half of x, of 16 bits with signs.
inline void add_pairs(const Bits& pairs, int32_t x, Integers& sums) {
#if defined(__AVX512VNNI__)
  sums = bit_cast<Integers>(_mm512_dpwssd_epi32(bit_cast<__m512i>(sums), bit_cast<__m512i>(pairs),
                                                _mm512_set1_epi32(x)));
#elif defined(__AVX512BW__)
  sums += bit_cast<Integers>(_mm512_madd_epi16(bit_cast<__m512i>(pairs), _mm512_set1_epi32(x)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const Pair<__m256i> both = bit_cast<Pair<__m256i>>(pairs);
  const __m256i inputs = _mm256_set1_epi32(x);
  sums += bit_cast<Integers>(
      Pair<__m256i>{_mm256_madd_epi16(both.low, inputs), _mm256_madd_epi16(both.high, inputs)});
#else
  const Integers both = bit_cast<Integers>(pairs);  // 0 to 15: no sign to care for
  sums += (both & 0xffff) * int32_t(int16_t(x)) + (both >> 16) * (x >> 16);
#endif
}

// A group's weights as they lie: four pairs a word.
struct Packed {
  static constexpr int kPairs = kWordInputs / 2;
  static Bits pairs(const Bits& words, int pair) { return (words >> (4 * pair)) & 0x000f000fu; }
};

// The same, unpacked for many rows.
struct Unpacked {
  static constexpr int kPairs = 1;
  static Bits pairs(const Bits& words, int) { return words; }
};

// What some rows bring to one group; their inputs are about the integers times the scales.
struct Inputs {
  int32_t* pairs;  // [pairs][rows]
  int32_t* sums;   // [rows], of the integers
  float* scales;   // [rows]
};

// One group of a panel.
struct Block {
  const uint32_t* words;
  const float* scales;
  const uint16_t* zeros;

  static int64_t bytes(int64_t group) {
    return kPanelOutputs * (group / 2 + sizeof(float) + sizeof(uint16_t));
  }
  Block(const char* block, int64_t group)
      : words(reinterpret_cast<const uint32_t*>(block)),
        scales(reinterpret_cast<const float*>(block + kPanelOutputs * group / 2)),
        zeros(reinterpret_cast<const uint16_t*>(scales + kPanelOutputs)) {}
};

// Adds a group's sums of some rows and kWidth of a panel's vectors, from the v-th on, to totals
// [Rows][kPanelOutputs]. Meanwhile the memory is asked for what comes later.
template <typename Weights, int Rows>
void add_group(const uint32_t* w, int64_t steps, const Block& block, int64_t first,
               const Inputs& x, const char* ahead, float* totals) {
  w += first * kLanes;
  // Few rows have few sums, each of which waits for itself: several, added up in the end.
  constexpr int kChains = Rows == 1 && Weights::kPairs > 1 ? 2 : 1;
  Integers sums[Rows][kWidth][kChains] = {};
  const int32_t* pairs = x.pairs;
  for (int64_t step = 0; step < steps; ++step) {
    for (int v = 0; v < kWidth; ++v) __builtin_prefetch(ahead + v * kVectorBytes, 0, 2);
    ahead += kPanelOutputs * sizeof(uint32_t);
    Bits words[kWidth];
#pragma GCC unroll 2
    for (int v = 0; v < kWidth; ++v) words[v] = Memory<Bits>::read(w + v * kLanes);
#pragma GCC unroll 4
    for (int pair = 0; pair < Weights::kPairs; ++pair) {
      Bits weights[kWidth];
#pragma GCC unroll 2
      for (int v = 0; v < kWidth; ++v) weights[v] = Weights::pairs(words[v], pair);
#pragma GCC unroll 16
      for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kWidth; ++v)
          add_pairs(weights[v], pairs[pair * Rows + r], sums[r][v][pair % kChains]);
    }
    w += kPanelOutputs;
    pairs += Weights::kPairs * Rows;
  }
  // The scales and zero points, too: where they are forgotten, reading takes twice as long.
  for (int line = 0; line < 3; ++line) __builtin_prefetch(ahead + line * kVectorBytes, 0, 2);
#pragma GCC unroll 2
  for (int v = 0; v < kWidth; ++v) {
    const int64_t n = (first + v) * kLanes;
    const Vector scale = load(block.scales + n);
    const Integers zero = widened(block.zeros + n);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) {
      Integers sum = sums[r][v][0];
      if (kChains > 1) sum += sums[r][v][kChains - 1];
      float* total = totals + r * kPanelOutputs + n;
      store(total, load(total) + convert<Vector>(sum - zero * x.sums[r]) * (scale * x.scales[r]));
    }
  }
}

// One row's group, `count` inputs of `group`, as integers: pair p to pairs[p * stride].
template <typename T>
void round_group(const T* x, int64_t count, int64_t group, int64_t stride, int32_t* pairs,
                 int32_t* sum, float* scale) {
  float inputs[kMostGroup] = {};
  float largest = 0.0f, poison = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    inputs[i] = to_float(x[i]);
    largest = std::max(largest, std::fabs(inputs[i]));
    poison += inputs[i] * 0.0f;  // not a number, if any input is none or infinite
  }
  // Below that its inverse would be infinite.
  const float inverse = largest > 1e-30f ? kLargestInput / largest : 0.0f;
  int32_t integers[kMostGroup], total = 0;
  for (int64_t i = 0; i < group; ++i) {
    // To the nearest: 1.5 * 2^23 leaves no bits for fractions.
    const float shifted = inputs[i] * inverse + 12582912.0f;
    integers[i] = int16_t(bit_cast<uint32_t>(shifted) & 0xffffu);
    total += integers[i];
  }
  for (int64_t p = 0; p < group / 2; ++p)
    pairs[p * stride] = (integers[2 * p] & 0xffff) | int32_t(uint32_t(integers[2 * p + 1]) << 16);
  *sum = total;
  *scale = largest / kLargestInput + poison;
}

// All rows' inputs, rounded.
class RoundedInputs {
 public:
  RoundedInputs(int64_t rows, int64_t inputs, int64_t group)
      : rows_(rows),
        inputs_(inputs),
        group_(group),
        groups_((inputs + group - 1) / group),
        blocks_((rows + kMostRows - 1) / kMostRows),
        numbers_(allocate(rows * groups_ * (group / 2 + 2))) {}

  int64_t groups() const { return groups_; }
  int64_t blocks() const { return blocks_; }
  // Blocks of rows differ by one row at the most.
  int64_t first_row(int64_t block) const { return block * rows_ / blocks_; }
  int64_t count(int64_t block) const { return first_row(block + 1) - first_row(block); }

  Inputs of(int64_t block, int64_t group) const {
    const int64_t rows = count(block), each = group_ / 2 + 2;
    float* const at = numbers_.get() + (first_row(block) * groups_ + rows * group) * each;
    int32_t* const pairs = reinterpret_cast<int32_t*>(at);
    return {pairs, pairs + rows * (group_ / 2), at + rows * (group_ / 2 + 1)};
  }

  // A row of x [rows][inputs].
  template <typename T>
  void round(const T* x, int64_t block, int64_t row) const {
    const T* from = x + (first_row(block) + row) * inputs_;
    for (int64_t group = 0; group < groups_; ++group) {
      const Inputs to = of(block, group);
      round_group(from + group * group_, std::min(group_, inputs_ - group * group_), group_,
                  count(block), to.pairs + row, to.sums + row, to.scales + row);
    }
  }

 private:
  const int64_t rows_, inputs_, group_, groups_, blocks_;
  const Buffer numbers_;
};

inline void unpack(const uint32_t* words, int64_t group, uint32_t* pairs) {
  for (int64_t word = 0; word < group / kWordInputs; ++word)
    for (int pair = 0; pair < Packed::kPairs; ++pair)
      for (int v = 0; v < kPanelVectors; ++v)
        Memory<Bits>::write(
            pairs + (word * Packed::kPairs + pair) * kPanelOutputs + v * kLanes,
            Packed::pairs(Memory<Bits>::read(words + word * kPanelOutputs + v * kLanes), pair));
}

template <typename T>
void int4_products(const T* x, const char* weight, const T* bias, T* y, int64_t rows,
                   int64_t inputs, int64_t outputs, int64_t group, int threads) {
  if (double(rows) * inputs * outputs < kSerialOperations) threads = 1;
  const RoundedInputs rounded(rows, inputs, group);
  const int64_t panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
  const int64_t groups = rounded.groups(), blocks = rounded.blocks();
  const int64_t block_bytes = Block::bytes(group);
  Shares shares(panels, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    shares.begin(thread, team);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t row = 0; row < rounded.count(block); ++row) rounded.round(x, block, row);
    const Buffer totals = allocate(rows * kPanelOutputs);
    alignas(64) uint32_t unpacked[kMostGroup / 2 * kPanelOutputs];
    for (int64_t panel; (panel = shares.take(thread, team)) >= 0;) {
      std::fill_n(totals.get(), rows * kPanelOutputs, 0.0f);
      for (int64_t g = 0; g < groups; ++g) {
        const char* here = weight + (panel * groups + g) * block_bytes;
        const Block weights(here, group);
        // Many rows unpack once. What they ask for ahead, all of them together, is in a cache soon.
        if (blocks > 1) unpack(weights.words, group, unpacked);
        for (int64_t block = 0; block < blocks; ++block)
          with_constant<kMostRows>(rounded.count(block), [&](auto Rows) {
            const Inputs some = rounded.of(block, g);
            float* const sums = totals.get() + rounded.first_row(block) * kPanelOutputs;
            for (int v = 0; v < kPanelVectors; v += kWidth)
              if (blocks == 1)
                add_group<Packed, Rows>(weights.words, group / kWordInputs, weights, v, some,
                                        here + kAheadBytes + v * kVectorBytes, sums);
              else
                add_group<Unpacked, Rows>(unpacked, group / 2, weights, v, some,
                                          here + block_bytes + v * kVectorBytes, sums);
          });
      }
      for (int64_t v = 0; v < kPanelVectors; ++v) {
        const int64_t n = panel * kPanelOutputs + v * kLanes, left = outputs - n;
        if (left <= 0) break;
        const Vector shift = bias ? load_some(bias + n, left) : splat(0.0f);
        for (int64_t r = 0; r < rows; ++r)
          store_some(y + r * outputs + n,
                     load(totals.get() + r * kPanelOutputs + v * kLanes) + shift, left);
      }
    }
  }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                         \
  extern "C" void int4_products_##SUFFIX(const T* x, const char* weight, const T* bias, T* y,     \
                                         int64_t rows, int64_t inputs, int64_t outputs,           \
                                         int64_t group, int threads) {                            \
    int4_products(x, weight, bias, y, rows, inputs, outputs, group, threads);                     \
  }

EXPORT(float, f32)
EXPORT(BFloat16, bf16)
