// Products of bfloat16 in tiles, for CPUs that have Intel's AMX: sixteen rows times sixteen outputs,
// thirty-two inputs in one instruction. Their other instructions for bfloat16 are slower than those
// for float32.
//
// A pair of inputs after another, a panel of weights (products.cpp) is two tiles side by side
// already; rows lie as a tile wants them wherever inputs are whole tiles.

#pragma once

#include "vectors.h"

#ifdef __AMX_BF16__

#include <sys/syscall.h>
#include <unistd.h>

namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 64, kTileInputs = 32;
constexpr int64_t kBlockRows = 2 * kTileRows;
constexpr int64_t kTilePanelOutputs = 2 * kLanes;
constexpr int64_t kTileAhead = 2048;

// Linux keeps the registers of tiles only for processes that ask.
inline bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  static const bool may = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return may;
}

// Tiles 0 to 3 are sums [two blocks of rows][two of outputs], 4 and 5 rows, 6 and 7 weights.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

inline void shape_tiles(int64_t rows) {
  TileShapes shapes;
  const int64_t upper = std::min(rows, kTileRows), lower = std::max<int64_t>(rows - upper, 1);
  for (int tile = 0; tile < 8; ++tile) {
    shapes.row_bytes[tile] = kTileBytes;
    const bool is_lower = tile == 2 || tile == 3 || tile == 5;
    shapes.rows[tile] = tile >= 6 ? kTileRows : is_lower ? lower : upper;
  }
  _tile_loadconfig(&shapes);
}

// Sums [kBlockRows][kTilePanelOutputs] of one panel and, as the tiles are shaped, up to so many rows.
// Meanwhile the memory is asked for what comes kTileAhead bytes later.
template <bool Two>
void sum_tiles(const BFloat16* w, const BFloat16* x, int64_t inputs, float* sums) {
  constexpr int64_t kWeightStride = 2 * kTileBytes;
  const int64_t stride = inputs * sizeof(BFloat16);
  const char* weights = reinterpret_cast<const char*>(w);
  _tile_zero(0);
  _tile_zero(1);
  if (Two) _tile_zero(2);
  if (Two) _tile_zero(3);
  for (int64_t first = 0; first < inputs; first += kTileInputs) {
    for (int64_t line = 0; line < kTileRows * kWeightStride; line += kTileBytes)
      __builtin_prefetch(weights + kTileAhead + line, 0, 2);
    _tile_loadd(6, weights, kWeightStride);
    _tile_loadd(7, weights + kTileBytes, kWeightStride);
    _tile_loadd(4, x + first, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (Two) {
      _tile_loadd(5, x + kTileRows * inputs + first, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    weights += kTileRows * kWeightStride;
  }
  constexpr int64_t kSumStride = kTilePanelOutputs * sizeof(float);
  _tile_stored(0, sums, kSumStride);
  _tile_stored(1, sums + kLanes, kSumStride);
  if (Two) _tile_stored(2, sums + kTileRows * kTilePanelOutputs, kSumStride);
  if (Two) _tile_stored(3, sums + kTileRows * kTilePanelOutputs + kLanes, kSumStride);
}

// One thread's panels of a product, those that `take` gives it; see `products` in products.cpp.
template <typename Take>
void tile_products(const BFloat16* x, const BFloat16* weight, const float* scales,
                   const BFloat16* bias, BFloat16* y, int64_t rows, int64_t inputs, int64_t outputs,
                   const Take& take) {
  alignas(64) float sums[kBlockRows * kTilePanelOutputs];
  int64_t shaped = 0;
  for (int64_t panel; (panel = take()) >= 0;) {
    for (int64_t first = 0; first < rows; first += kBlockRows) {
      const int64_t count = std::min(kBlockRows, rows - first);
      if (count != shaped) shape_tiles(shaped = count);
      const BFloat16* w = weight + panel * inputs * kTilePanelOutputs;
      const BFloat16* block = x + first * inputs;
      if (count > kTileRows)
        sum_tiles<true>(w, block, inputs, sums);
      else
        sum_tiles<false>(w, block, inputs, sums);
      for (int64_t half = 0; half < kTilePanelOutputs; half += kLanes) {
        const int64_t n = panel * kTilePanelOutputs + half, left = outputs - n;
        if (left <= 0) break;
        const Vector shift = bias ? load_some(bias + n, left) : splat(0.0f);
        const Vector scale = scales ? load_some(scales + n, left) : splat(1.0f);
        for (int64_t r = 0; r < count; ++r)
          store_some(y + (first + r) * outputs + n,
                     load(sums + r * kTilePanelOutputs + half) * scale + shift, left);
      }
    }
  }
  _tile_release();
}

}  // namespace

#endif
