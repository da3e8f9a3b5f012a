// fp16 by arithmetic in float64: for the oracle, and for instructions that are emulated.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace {

inline double fp16_to_double(std::uint16_t bits) {
  const int exponent = bits >> 10 & 31, digits = bits & 1023;
  const double infinity = std::numeric_limits<double>::infinity();
  const double special = digits ? std::numeric_limits<double>::quiet_NaN() : infinity;
  const double size = exponent == 31 ? special : std::ldexp(exponent ? 1024 + digits : digits, (exponent ? exponent : 1) - 25);
  return bits & 0x8000 ? -size : size;
}

// Rounds to nearest even, and from 65,520 on to infinity.
inline std::uint16_t double_to_fp16(double x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double size = std::fabs(x);
  if (std::isnan(x)) return 0x7e00 | sign;
  if (size >= 65520) return 0x7c00 | sign;
  const int exponent = size < 0x1p-14 ? -14 : std::ilogb(size);
  const int digits = int(std::nearbyint(std::ldexp(size, 10 - exponent)));  // 2048 where it rounds to the next power of two
  return std::uint16_t(size < 0x1p-14 ? digits : ((exponent + 14) << 10) + digits) | sign;
}

}  // namespace
