// What the products with all kinds of weights share: panels of 32 outputs, and blocks of rows.

#pragma once

#include <type_traits>

#include "vectors.h"

namespace {

constexpr int kPanelVectors = 2;
constexpr int64_t kPanelOutputs = kPanelVectors * kLanes;  // linear.PANEL_OUTPUTS
constexpr double kSerialOperations = 1 << 16;  // multiply-adds not worth a second thread
constexpr int64_t kAheadBytes = 8192;

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return bit_cast<float>(uint32_t(x.bits) << 16); }

// Calls visit(rows as a compile-time constant), of 1 to Most.
template <int Most, typename Visit>
void with_constant(int64_t rows, const Visit& visit) {
  if (rows == Most) return visit(std::integral_constant<int, Most>());
  if constexpr (Most > 1) with_constant<Most - 1>(rows, visit);
}

}  // namespace
