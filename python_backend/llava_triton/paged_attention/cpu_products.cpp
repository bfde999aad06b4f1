// Products of a few tokens with a matrix, for CPUs: y = x W^T + b. W is stored as x is, or as int8
// with a scale a row.
//
// With so few rows nothing counts but reading W once: it is read in order, by rows, with the memory
// asked well ahead. Libraries' products reach half of the memory's speed here, because they are made for
// many rows. From four rows on they are as fast.

#include "cpu_vectors.h"

namespace {

constexpr int64_t kAheadBytes = 2048;

template <int kRows, typename T, typename W>
void products(const T* x, const W* weight, const float* scales, const T* bias, T* y, int64_t inputs,
              int64_t outputs, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < outputs; ++n) {
    const W* row = weight + n * inputs;
    Vector even[kRows] = {}, odd[kRows] = {};
    int64_t i = 0;
    for (; i + 2 * kLanes <= inputs; i += 2 * kLanes) {
      const char* ahead = reinterpret_cast<const char*>(row + i) + kAheadBytes;
      __builtin_prefetch(ahead);
      if (sizeof(W) == 4) __builtin_prefetch(ahead + 64);
      const Vector first = load(row + i), second = load(row + i + kLanes);
      for (int r = 0; r < kRows; ++r) {
        even[r] += first * load(x + r * inputs + i);
        odd[r] += second * load(x + r * inputs + i + kLanes);
      }
    }
    for (; i < inputs; i += kLanes) {
      const Vector rest = load_some(row + i, inputs - i);
      for (int r = 0; r < kRows; ++r) even[r] += rest * load_some(x + r * inputs + i, inputs - i);
    }
    for (int r = 0; r < kRows; ++r) {
      const float product = sum(even[r] + odd[r]) * (scales ? scales[n] : 1.0f);
      const float value = product + (bias ? load_some(bias + n, 1)[0] : 0.0f);
      store_some(y + r * outputs + n, splat(value), 1);
    }
  }
}

template <typename T, typename W>
void products(const T* x, const W* weight, const float* scales, const T* bias, T* y, int64_t rows,
              int64_t inputs, int64_t outputs, int threads) {
  if (rows == 1) return products<1>(x, weight, scales, bias, y, inputs, outputs, threads);
  products<2>(x, weight, scales, bias, y, inputs, outputs, threads);
}

}  // namespace

#define EXPORT(NAME, T, W, SUFFIX)                                                               \
  extern "C" void NAME##_##SUFFIX(const T* x, const W* weight, const float* scales, const T* bias, \
                                  T* y, int64_t rows, int64_t inputs, int64_t outputs,           \
                                  int threads) {                                                 \
    products(x, weight, scales, bias, y, rows, inputs, outputs, threads);                        \
  }

EXPORT(products, float, float, f32)
EXPORT(products, BFloat16, BFloat16, bf16)
EXPORT(int8_products, float, int8_t, f32)
EXPORT(int8_products, BFloat16, int8_t, bf16)
