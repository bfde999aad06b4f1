// All layers of a text model in one call: between two kernels of a step no Python runs, and nobody
// waits for its interpreter's lock. kernels/layers.py says the same one operation at a time.

#include <algorithm>
#include <cstdint>

#include "vectors.h"

namespace {

struct Geometry;  // attention.cpp knows them
struct Batch;

// linear.CpuLinear.
struct Linear {
  const void* weight;
  const void* integers;  // the same values as int8, for few rows; or null
  const float* scales;   // of the outputs; or null
  const void* bias;  // or null
  int64_t inputs, outputs;
  int64_t integer_rows;  // up to so many rows are multiplied by integers
  int64_t group;         // of 4-bit weights, which have all rows multiplied; 0: they are others
};

// layers.Layer.
struct Layer {
  const void* attention_norm;
  Linear qkv;
  const Geometry* geometry;
  Linear output;
  const void* mlp_norm;
  Linear gate_up;
  Linear down;
};

// layers.Stack.
struct Stack {
  const Layer* layers;
  int64_t count;
  int64_t width;
  const void* norm;
  float epsilon;
  const float* cos;
  const float* sin;
};

template <typename T>
struct Kernels;

}  // namespace

#define KERNELS(T, SUFFIX)                                                                         \
  extern "C" {                                                                                     \
  void rotate_and_store_##SUFFIX(const Geometry*, T*, const float*, const float*, T*, T*,          \
                                 const Batch*, int);                                               \
  void attend_##SUFFIX(const Geometry*, const T*, const T*, const T*, const Batch*, T*, int);      \
  void add_rms_norm_##SUFFIX(T*, const T*, const T*, float, T*, int64_t, int64_t, int);            \
  void silu_multiply_##SUFFIX(const T*, T*, int64_t, int64_t, int);                                \
  void products_##SUFFIX(const T*, const T*, const float*, const T*, T*, int64_t, int64_t,         \
                         int64_t, int);                                                            \
  void int8_products_##SUFFIX(const T*, const int8_t*, const float*, const T*, T*, int64_t,        \
                              int64_t, int64_t, int);                                              \
  void int4_products_##SUFFIX(const T*, const char*, const T*, T*, int64_t, int64_t, int64_t,      \
                              int64_t, int);                                                       \
  }                                                                                                \
  namespace {                                                                                      \
  template <>                                                                                      \
  struct Kernels<T> {                                                                              \
    static constexpr auto rotate_and_store = rotate_and_store_##SUFFIX;                            \
    static constexpr auto attend = attend_##SUFFIX;                                                \
    static constexpr auto add_rms_norm = add_rms_norm_##SUFFIX;                                    \
    static constexpr auto silu_multiply = silu_multiply_##SUFFIX;                                  \
    static constexpr auto products = products_##SUFFIX;                                            \
    static constexpr auto int8_products = int8_products_##SUFFIX;                                  \
    static constexpr auto int4_products = int4_products_##SUFFIX;                                  \
  };                                                                                               \
  }

KERNELS(float, f32)
KERNELS(BFloat16, bf16)

namespace {

template <typename T>
void multiply(const Linear& linear, const T* x, T* y, int64_t rows, int threads) {
  const T* bias = static_cast<const T*>(linear.bias);
  if (linear.group)
    Kernels<T>::int4_products(x, static_cast<const char*>(linear.weight), bias, y, rows,
                              linear.inputs, linear.outputs, linear.group, threads);
  else if (linear.integers && rows <= linear.integer_rows)
    Kernels<T>::int8_products(x, static_cast<const int8_t*>(linear.integers), linear.scales, bias,
                              y, rows, linear.inputs, linear.outputs, threads);
  else
    Kernels<T>::products(x, static_cast<const T*>(linear.weight), linear.scales, bias, y,
                         rows, linear.inputs, linear.outputs, threads);
}

// Rows of `width`: those `wanted`, in ascending order, to the beginning.
template <typename T>
void gather(T* x, int64_t width, const int64_t* wanted, int64_t results) {
  for (int64_t row = 0; row < results; ++row)
    if (wanted[row] != row) std::copy_n(x + wanted[row] * width, width, x + row * width);
}

// keys, values: of the first layer, the next one's `layer_elements` further. wanted: the rows whose
// results are written, so many; or null, for all. scratch holds for every row twice the width, and
// the outputs of every kind of product.
template <typename T>
void hidden_states(const Stack& stack, T* residual, T* keys, T* values, int64_t layer_elements,
                   const Batch* batch, int64_t rows, const int64_t* wanted, int64_t results,
                   T* scratch, T* out, int threads) {
  typedef Kernels<T> K;
  T* const hidden = scratch;
  T* const delta = hidden + rows * stack.width;
  T* const wide = delta + rows * stack.width;
  const T* added = nullptr;
  for (const Layer* layer = stack.layers; layer != stack.layers + stack.count; ++layer) {
    T* const narrow = wide + rows * std::max(layer->qkv.outputs, layer->gate_up.outputs);
    const auto norm = [&](const void* weight) {
      K::add_rms_norm(residual, added, static_cast<const T*>(weight), stack.epsilon, hidden, rows,
                      stack.width, threads);
    };
    norm(layer->attention_norm);
    multiply(layer->qkv, hidden, wide, rows, threads);
    K::rotate_and_store(layer->geometry, wide, stack.cos, stack.sin, keys, values, batch, threads);
    K::attend(layer->geometry, wide, keys, values, batch, narrow, threads);
    if (wanted && layer + 1 == stack.layers + stack.count) {
      gather(residual, stack.width, wanted, results);
      gather(narrow, layer->output.inputs, wanted, results);
      rows = results;
    }
    multiply(layer->output, narrow, delta, rows, threads);
    added = delta;
    norm(layer->mlp_norm);
    multiply(layer->gate_up, hidden, wide, rows, threads);
    K::silu_multiply(wide, narrow, rows, layer->down.inputs, threads);
    multiply(layer->down, narrow, delta, rows, threads);
    keys += layer_elements;
    values += layer_elements;
  }
  K::add_rms_norm(residual, added, static_cast<const T*>(stack.norm), stack.epsilon, out, rows,
                  stack.width, threads);
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                          \
  extern "C" void hidden_states_##SUFFIX(const Stack* stack, T* residual, T* keys, T* values,      \
                                         int64_t layer_elements, const Batch* batch, int64_t rows, \
                                         const int64_t* wanted, int64_t results, T* scratch,       \
                                         T* out, int threads) {                                    \
    hidden_states(*stack, residual, keys, values, layer_elements, batch, rows, wanted, results,    \
                  scratch, out, threads);                                                          \
  }

EXPORT(float, f32)
EXPORT(BFloat16, bf16)
