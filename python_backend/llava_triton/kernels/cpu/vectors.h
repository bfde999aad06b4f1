// Sixteen floats at a time, from storage as float32, bfloat16 or int8: GCC's portable vectors, one
// register of AVX-512, two of AVX2, four of NEON.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;

typedef float Vector __attribute__((vector_size(64)));
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));
typedef int32_t Integers __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Shorts __attribute__((vector_size(32)));
typedef int8_t Bytes __attribute__((vector_size(16)));

struct BFloat16 {
  uint16_t bits;
};

template <typename To, typename From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline Vector splat(float x) { return Vector{} + x; }

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

inline Vector load(const BFloat16* p) {
  Shorts shorts;
  std::memcpy(&shorts, p, sizeof(shorts));
#ifdef __AVX512F__  // GCC 12 would go through halves
  const Bits bits = bit_cast<Bits>(_mm512_cvtepu16_epi32(bit_cast<__m256i>(shorts)));
#else
  const Bits bits = __builtin_convertvector(shorts, Bits);
#endif
  return bit_cast<Vector>(bits << 16);
}

inline Vector load(const int8_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
#ifdef __AVX512F__  // as above
  const Integers integers = bit_cast<Integers>(_mm512_cvtepi8_epi32(bit_cast<__m128i>(bytes)));
#else
  const Integers integers = __builtin_convertvector(bytes, Integers);
#endif
  return __builtin_convertvector(integers, Vector);
}

inline void store(float* p, Vector v) { std::memcpy(p, &v, sizeof(v)); }

inline void store(BFloat16* p, Vector v) {
  const Bits bits = bit_cast<Bits>(v);
  const Bits even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40;  // rounding could carry a NaN over into zero
  const Shorts shorts = __builtin_convertvector(v != v ? quiet_nan : even, Shorts);
  std::memcpy(p, &shorts, sizeof(shorts));
}

// The first `n` elements at `p`, then zeros; `n` may exceed a vector.
template <typename T>
inline Vector load_some(const T* p, int64_t n) {
  if (n >= kLanes) return load(p);
  T padded[kLanes] = {};
  std::copy_n(p, n, padded);
  return load(padded);
}

template <typename T>
inline void store_some(T* p, Vector v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  std::copy_n(padded, n, p);
}

// As the value reads after a trip through storage.
inline Vector rounded(Vector v, const float*) { return v; }
inline Vector rounded(Vector v, const BFloat16*) {
  BFloat16 stored[kLanes];
  store(stored, v);
  return load(stored);
}

inline float sum(Vector v) {
  Half h[2];
  std::memcpy(h, &v, sizeof(h));
  const Half a = h[0] + h[1];
  Quarter q[2];
  std::memcpy(q, &a, sizeof(q));
  const Quarter b = q[0] + q[1];
  return (b[0] + b[2]) + (b[1] + b[3]);
}

inline float maximum(Vector v) {
  Half h[2];
  std::memcpy(h, &v, sizeof(h));
  const Half a = h[0] > h[1] ? h[0] : h[1];
  Quarter q[2];
  std::memcpy(q, &a, sizeof(q));
  const Quarter b = q[0] > q[1] ? q[0] : q[1];
  return std::max(std::max(b[0], b[1]), std::max(b[2], b[3]));
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
typedef std::unique_ptr<float[], Free> Buffer;

inline int64_t up_to_lanes(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Uninitialised; aligned so that no vector straddles two cache lines.
Buffer allocate(int64_t floats) {
  return Buffer(static_cast<float*>(std::aligned_alloc(64, up_to_lanes(floats) * sizeof(float))));
}

}  // namespace
