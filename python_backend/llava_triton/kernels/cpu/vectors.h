// Sixteen floats at a time, from storage as float32, bfloat16 or int8: one register of AVX-512, two of
// AVX2, four of SSE or NEON. GCC's portable vectors are used as wide as a register is and no wider: it
// keeps wider ones in memory, where they are ten times slower.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int kLanes = 16;

#if defined(__AVX512F__)
constexpr int kRegisterLanes = 16;
#elif defined(__AVX__)
constexpr int kRegisterLanes = 8;
#else
constexpr int kRegisterLanes = 4;
#endif

// What lies in several registers. It has the operators of GCC's vectors.
template <typename P>
struct Pair {
  P low, high;
};

// [Lanes] of T: a register, or a pair of what has half as many.
template <typename T, int Lanes, bool IsRegister = Lanes <= kRegisterLanes>
struct Lined {
  typedef Pair<typename Lined<T, Lanes / 2>::Type> Type;
};

template <typename T, int Lanes>
struct Lined<T, Lanes, true> {
  typedef T Type __attribute__((vector_size(Lanes * sizeof(T))));
};

typedef Lined<float, kLanes>::Type Vector;
typedef Lined<int32_t, kLanes>::Type Integers;
typedef Lined<uint32_t, kLanes>::Type Bits;
typedef Lined<uint16_t, kLanes>::Type Shorts;
typedef Lined<int8_t, kLanes>::Type Bytes;
typedef float Half __attribute__((vector_size(32)));
typedef float Quarter __attribute__((vector_size(16)));

#define PAIRED(OPERATOR)                                                                       \
  template <typename P>                                                                        \
  inline auto operator OPERATOR(const Pair<P>& a, const Pair<P>& b)                            \
      ->Pair<decltype(a.low OPERATOR b.low)> {                                                 \
    return {a.low OPERATOR b.low, a.high OPERATOR b.high};                                     \
  }                                                                                            \
  template <typename P, typename S, typename = std::enable_if_t<std::is_arithmetic_v<S>>>      \
  inline auto operator OPERATOR(const Pair<P>& a, S b)->Pair<decltype(a.low OPERATOR b)> {     \
    return {a.low OPERATOR b, a.high OPERATOR b};                                              \
  }

PAIRED(+)
PAIRED(-)
PAIRED(*)
PAIRED(/)
PAIRED(&)
PAIRED(|)
PAIRED(<<)
PAIRED(>>)
PAIRED(<)
PAIRED(>)
PAIRED(>=)
PAIRED(!=)
#undef PAIRED

template <typename P>
inline Pair<P> operator-(const Pair<P>& a) {
  return {-a.low, -a.high};
}

template <typename P, typename Other>
inline Pair<P>& operator+=(Pair<P>& a, const Other& b) {
  return a = a + b;
}

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

template <typename To, typename P>
inline To bit_cast(const Pair<P>& from) {
  return {bit_cast<decltype(To::low)>(from.low), bit_cast<decltype(To::low)>(from.high)};
}

// Each lane's value in another type.
template <typename To, typename From>
inline To convert(const From& from) {
  return __builtin_convertvector(from, To);
}

template <typename To, typename P>
inline To convert(const Pair<P>& from) {
  return {convert<decltype(To::low)>(from.low), convert<decltype(To::low)>(from.high)};
}

// By lane: `mask`, of a comparison, ? a : b.
template <typename M, typename V>
inline V select(const M& mask, const V& a, const V& b) {
  return mask ? a : b;
}

template <typename M, typename P>
inline Pair<P> select(const Pair<M>& mask, const Pair<P>& a, const Pair<P>& b) {
  return {select(mask.low, a.low, b.low), select(mask.high, a.high, b.high)};
}

// What lies at `p`, as it lies there.
template <typename V>
struct Memory {
  static V read(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static void write(void* p, const V& v) { std::memcpy(p, &v, sizeof(v)); }
};

template <typename P>
struct Memory<Pair<P>> {
  static Pair<P> read(const void* p) {
    return {Memory<P>::read(p), Memory<P>::read(static_cast<const char*>(p) + sizeof(P))};
  }
  static void write(void* p, const Pair<P>& v) {
    Memory<P>::write(p, v.low);
    Memory<P>::write(static_cast<char*>(p) + sizeof(P), v.high);
  }
};

template <typename V>
struct Splat {
  static V of(float x) { return V{} + x; }
};

template <typename P>
struct Splat<Pair<P>> {
  static Pair<P> of(float x) { return {Splat<P>::of(x), Splat<P>::of(x)}; }
};

inline Vector splat(float x) { return Splat<Vector>::of(x); }

inline Vector load(const float* p) { return Memory<Vector>::read(p); }

// GCC 12 converts lane by lane, or through halves, what an instruction would widen.
inline Bits widened(const BFloat16* p) {
#if defined(__AVX512F__)
  return bit_cast<Bits>(_mm512_cvtepu16_epi32(Memory<__m256i>::read(p)));
#elif defined(__AVX2__)
  return bit_cast<Bits>(Pair<__m256i>{_mm256_cvtepu16_epi32(Memory<__m128i>::read(p)),
                                      _mm256_cvtepu16_epi32(Memory<__m128i>::read(p + 8))});
#else
  return convert<Bits>(Memory<Shorts>::read(p));
#endif
}

inline Integers widened(const uint16_t* p) {
  return bit_cast<Integers>(widened(reinterpret_cast<const BFloat16*>(p)));
}

inline Integers widened(const int8_t* p) {
#if defined(__AVX512F__)
  return bit_cast<Integers>(_mm512_cvtepi8_epi32(Memory<__m128i>::read(p)));
#elif defined(__AVX2__)
  return bit_cast<Integers>(
      Pair<__m256i>{_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(Memory<int64_t>::read(p))),
                    _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(Memory<int64_t>::read(p + 8)))});
#else
  return convert<Integers>(Memory<Bytes>::read(p));
#endif
}

inline Vector load(const BFloat16* p) { return bit_cast<Vector>(widened(p) << 16); }
inline Vector load(const int8_t* p) { return convert<Vector>(widened(p)); }

inline void store(float* p, const Vector& v) { Memory<Vector>::write(p, v); }

inline void store(BFloat16* p, const Vector& v) {
  const Bits bits = bit_cast<Bits>(v);
  const Bits even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Bits quiet_nan = (bits >> 16) | 0x40u;  // rounding could carry a NaN over into zero
  Memory<Shorts>::write(p, convert<Shorts>(select(v != v, quiet_nan, even)));
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
inline void store_some(T* p, const Vector& v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  T padded[kLanes];
  store(padded, v);
  std::copy_n(padded, n, p);
}

// As the value reads after a trip through storage.
inline Vector rounded(const Vector& v, const float*) { return v; }
inline Vector rounded(const Vector& v, const BFloat16*) {
  BFloat16 stored[kLanes];
  store(stored, v);
  return load(stored);
}

inline float first(const Vector& v) {
  float lanes[kLanes];
  store(lanes, v);
  return lanes[0];
}

inline float sum(const Vector& v) {
  float lanes[kLanes];
  store(lanes, v);
  Half h[2];
  std::memcpy(h, lanes, sizeof(h));
  const Half a = h[0] + h[1];
  Quarter q[2];
  std::memcpy(q, &a, sizeof(q));
  const Quarter b = q[0] + q[1];
  return (b[0] + b[2]) + (b[1] + b[3]);
}

inline float maximum(const Vector& v) {
  float lanes[kLanes];
  store(lanes, v);
  Half h[2];
  std::memcpy(h, lanes, sizeof(h));
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
