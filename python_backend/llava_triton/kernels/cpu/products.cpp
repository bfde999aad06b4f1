// Products of tokens with a matrix, for CPUs: y = x W^T + b. W is stored as x is, or as int8; either
// may have a scale an output.
//
// W lies in panels of 32 outputs: [panels][steps][32][inputs of a step], where a step is a pair of
// inputs in bfloat16 and one input else. So it is read in order, once from memory, while the sums of
// some rows and a panel's outputs stay in registers. A sum takes the inputs in order, whatever the
// number of rows: a row's result does not depend on the others, to the last bit.

#include <omp.h>

#include "panels.h"
#include "sharing.h"
#include "tiles.h"
#include "vectors.h"

namespace {

// Of a panel's vectors, and of rows, as many at once as sums stay in registers beside the weights.
#ifdef __AVX512F__
constexpr int kWidth = 2, kMostRows = 14;  // 28 sums and 2 vectors of weights, of 32 registers
#else
constexpr int kWidth = 1, kMostRows = 6;  // on AVX2 12 sums, 2 of weights and an input, of 16
#endif

typedef Vector Sums[kWidth];

// What is multiplied in one step, by the type of the weights: here one input, as float32.
template <typename W>
struct Step {
  static constexpr int kInputs = 1;
  typedef float Input;

  template <typename T>
  static Input pack(const T* x, int64_t) {
    return to_float(*x);
  }

  template <int Rows>
  static void add(const W* w, const Input* x, Sums (&sums)[Rows]) {
    Vector weights[kWidth];
#pragma GCC unroll 2
    for (int v = 0; v < kWidth; ++v) weights[v] = load(w + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kWidth; ++v) sums[r][v] += weights[v] * x[r];
  }
};

// Two inputs, one above the other in 32 bits.
template <>
struct Step<BFloat16> {
  static constexpr int kInputs = 2;
  typedef uint32_t Input;

  static Input pack(const BFloat16* x, int64_t left) {
    return x[0].bits | (left > 1 ? uint32_t(x[1].bits) << 16 : 0);
  }

  template <int Rows>
  static void add(const BFloat16* w, const Input* x, Sums (&sums)[Rows]) {
    Bits pairs[kWidth];
#pragma GCC unroll 2
    for (int v = 0; v < kWidth; ++v) pairs[v] = Memory<Bits>::read(w + 2 * v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kWidth; ++v) add(pairs[v], x[r], sums[r][v]);
  }

  static void add(Bits weights, Input input, Vector& sum) {
#ifdef __AVX512BF16__
    sum = bit_cast<Vector>(_mm512_dpbf16_ps(bit_cast<__m512>(sum), bit_cast<__m512bh>(weights),
                                            bit_cast<__m512bh>(_mm512_set1_epi32(input))));
#else
    sum += bit_cast<Vector>(weights << 16) * bit_cast<float>(input << 16);
    sum += bit_cast<Vector>(weights & 0xffff0000u) * bit_cast<float>(input & 0xffff0000u);
#endif
  }
};

// Sums of kWidth of a panel's vectors and some rows, into [Rows][kPanelOutputs]. Meanwhile the memory
// is asked for what comes later: `ahead`, and from there `ahead_stride` bytes further at every step.
template <int Rows, typename W>
void sum_panel(const W* w, const typename Step<W>::Input* x, int64_t steps, const char* ahead,
               int64_t ahead_stride, float* result) {
  Sums sums[Rows] = {};
  for (int64_t step = 0; step < steps; ++step) {
    __builtin_prefetch(ahead, 0, 2);
    __builtin_prefetch(ahead + 64, 0, 2);
    ahead += ahead_stride;
    Step<W>::template add<Rows>(w, x, sums);
    w += kPanelOutputs * Step<W>::kInputs;
    x += Rows;
  }
  // Unrolled, as the loops above: an array that is indexed by a variable is not kept in registers.
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < kWidth; ++v) store(result + r * kPanelOutputs + v * kLanes, sums[r][v]);
}

#ifdef __AMX_BF16__
static_assert(kTilePanelOutputs == kPanelOutputs, "a panel is two tiles wide");

void products_in_tiles(const BFloat16* x, const BFloat16* weight, const float* scales,
                       const BFloat16* bias, BFloat16* y, int64_t rows, int64_t inputs,
                       int64_t outputs, int threads) {
  Shares panels((outputs + kPanelOutputs - 1) / kPanelOutputs, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    panels.begin(thread, team);
#pragma omp barrier
    tile_products(x, weight, scales, bias, y, rows, inputs, outputs,
                  [&] { return panels.take(thread, team); });
  }
}
#endif

template <typename T, typename W>
void products(const T* x, const W* weight, const float* scales, const T* bias, T* y, int64_t rows,
              int64_t inputs, int64_t outputs, int threads) {
  if (double(rows) * inputs * outputs < kSerialOperations) threads = 1;
#ifdef __AMX_BF16__
  if constexpr (std::is_same_v<W, BFloat16>)
    if (inputs % kTileInputs == 0 && may_use_tiles())
      return products_in_tiles(x, weight, scales, bias, y, rows, inputs, outputs, threads);
#endif
  typedef typename Step<W>::Input Input;
  constexpr int64_t kInputs = Step<W>::kInputs;
  static_assert(sizeof(Input) == sizeof(float), "they share an allocation");
  const int64_t steps = (inputs + kInputs - 1) / kInputs;
  const int64_t panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
  const int64_t panel_weights = steps * kInputs * kPanelOutputs;
  // Blocks of rows that differ by one row at the most.
  const int64_t blocks = (rows + kMostRows - 1) / kMostRows;
  const auto first_row = [&](int64_t block) { return block * rows / blocks; };
  const Buffer buffer = allocate(rows * steps);
  Input* const packed = reinterpret_cast<Input*>(buffer.get());  // [blocks][steps][rows of it]
  Shares shares(panels, threads);
#pragma omp parallel num_threads(threads)
  {
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
    shares.begin(thread, team);
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t first = first_row(block), count = first_row(block + 1) - first;
      Input* to = packed + first * steps;
      for (int64_t step = 0; step < steps; ++step)
        for (int64_t r = 0; r < count; ++r)
          *to++ = Step<W>::pack(x + (first + r) * inputs + step * kInputs, inputs - step * kInputs);
    }
    for (int64_t panel; (panel = shares.take(thread, team)) >= 0;) {
      const W* w = weight + panel * panel_weights;
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t first = first_row(block), count = first_row(block + 1) - first;
        // Few rows wait for memory alone: it is asked shortly before. Otherwise all blocks of rows
        // together ask for the next panel, so that it comes while this one is computed.
        const bool last = panel + 1 == panels;
        const int64_t bytes = panel_weights * sizeof(W);
        const char* here = reinterpret_cast<const char*>(w);
        const char* ahead =
            blocks == 1 ? here + kAheadBytes : here + (last ? 0 : bytes) + block * (bytes / blocks);
        const int64_t stride = bytes / steps / blocks;
        with_constant<kMostRows>(count, [&](auto Rows) {
          alignas(64) float sums[Rows * kPanelOutputs];
          for (int v = 0; v < kPanelVectors; v += kWidth)
            sum_panel<Rows>(w + v * kLanes * kInputs, packed + first * steps, steps, ahead, stride,
                            sums + v * kLanes);
          for (int64_t v = 0; v < kPanelVectors; ++v) {
            const int64_t n = panel * kPanelOutputs + v * kLanes, left = outputs - n;
            if (left <= 0) break;
            const Vector shift = bias ? load_some(bias + n, left) : splat(0.0f);
            const Vector scale = scales ? load_some(scales + n, left) : splat(1.0f);
            for (int64_t r = 0; r < Rows; ++r)
              store_some(y + (first + r) * outputs + n,
                         load(sums + r * kPanelOutputs + v * kLanes) * scale + shift, left);
          }
        });
      }
    }
  }
}

}  // namespace

#define EXPORT(NAME, T, W, SUFFIX)                                                                 \
  extern "C" void NAME##_##SUFFIX(const T* x, const W* weight, const float* scales, const T* bias, \
                                  T* y, int64_t rows, int64_t inputs, int64_t outputs,             \
                                  int threads) {                                                   \
    products(x, weight, scales, bias, y, rows, inputs, outputs, threads);                          \
  }

EXPORT(products, float, float, f32)
EXPORT(products, BFloat16, BFloat16, bf16)
EXPORT(int8_products, float, int8_t, f32)
EXPORT(int8_products, BFloat16, int8_t, bf16)
