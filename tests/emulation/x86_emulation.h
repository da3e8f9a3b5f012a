// AVX-512, AVX-512-BF16 and AMX's tiles of bf16 in plain C++, under the names of the intrinsics that csrc/cpu uses: a file that
// includes this before kernels.inc is compiled, for any machine and without flags, as for a CPU that has them.
//
// What Intel's manual says of the two products (Software Developer's Manual, "Operation"):
//
// * Both: bf16 is the upper half of an fp32. Each multiply-add is fused and rounds to nearest even, subnormal inputs count as 0 and
//   subnormal results become 0, whatever MXCSR says.
// * VDPBF16PS adds the product of the odd (upper) elements of a pair to a lane first, then that of the even ones.
// * TDPBF16PS sums the products of even elements of a row and column over the depth of a tile, from 0, and those of odd elements
//   apart; it adds the two sums, and then the result to what the tile held.
//
// A NaN is a NaN here; which one the manual chooses of several is not followed.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "../csrc/fp16.h"
#if defined(__x86_64__)
#include <immintrin.h>  // before its names are taken
#endif

namespace {
namespace emulated {

typedef float Lanes __attribute__((vector_size(64)));
typedef std::uint32_t Words __attribute__((vector_size(64)));
typedef std::uint32_t HalfWords __attribute__((vector_size(32)));

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "emulated instruction: %s\n", why);
  std::abort();
}

template <class To, class From>
inline To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }
inline float multiply_add(float a, float b, float c) { return flushed(std::fma(flushed(a), flushed(b), flushed(c))); }
inline float add(float a, float b) { return flushed(flushed(a) + flushed(b)); }
inline float even(std::uint32_t pair) { return bits_of<float>(pair << 16); }
inline float odd(std::uint32_t pair) { return bits_of<float>(pair & 0xffff0000u); }

// ---- AVX-512-BF16

inline Lanes dpbf16_ps(Lanes c, Words a, Words b) {
  for (int i = 0; i < 16; i++) {
    c[i] = multiply_add(odd(a[i]), odd(b[i]), c[i]);
    c[i] = multiply_add(even(a[i]), even(b[i]), c[i]);
  }
  return c;
}

// ---- AMX

struct Tile {
  std::uint32_t words[16][16];
};
thread_local Tile tiles[8];
thread_local bool configured = false;

inline Tile& tile(int i) {
  if (!configured) fail("a tile is used before tiles are configured");
  return tiles[i];
}

// Takes the one configuration that there is in csrc: eight tiles of 16 rows of 64 bytes.
inline void tile_loadconfig(const void* from) {
  unsigned char bytes[64];
  std::memcpy(bytes, from, sizeof(bytes));
  if (bytes[0] != 1) fail("palette 1 expected");
  for (int i = 1; i < 16; i++)
    if (bytes[i] != 0) fail("what is reserved must be 0");
  for (int i = 0; i < 8; i++) {
    std::uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * i, sizeof(row_bytes));
    if (row_bytes != 64 || bytes[48 + i] != 16) fail("tiles of 16 rows of 64 bytes expected");
  }
  configured = true;
  std::memset(tiles, 0, sizeof(tiles));
}
inline void tile_release() { configured = false; }
inline void tile_zero(int to) { std::memset(&tile(to), 0, sizeof(Tile)); }
inline void tile_loadd(int to, const void* from, std::int64_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(tile(to).words[row], static_cast<const char*>(from) + row * stride, 64);
}
inline void tile_stored(int from, void* to, std::int64_t stride) {
  for (int row = 0; row < 16; row++) std::memcpy(static_cast<char*>(to) + row * stride, tile(from).words[row], 64);
}
inline void tile_dpbf16ps(int to, int left, int right) {
  for (int m = 0; m < 16; m++) {
    float evens[16] = {}, odds[16] = {};
    for (int k = 0; k < 16; k++) {
      const std::uint32_t a = tile(left).words[m][k];
      for (int n = 0; n < 16; n++) {
        const std::uint32_t b = tile(right).words[k][n];
        evens[n] = multiply_add(even(a), even(b), evens[n]);
        odds[n] = multiply_add(odd(a), odd(b), odds[n]);
      }
    }
    for (int n = 0; n < 16; n++) {
      std::uint32_t& sum = tile(to).words[m][n];
      sum = bits_of<std::uint32_t>(add(bits_of<float>(sum), add(evens[n], odds[n])));
    }
  }
}

// ---- what of AVX-512 csrc uses

// MAXPS and MINPS return the second operand where either is NaN.
inline Lanes max_ps(Lanes a, Lanes b) {
  for (int i = 0; i < 16; i++) a[i] = a[i] > b[i] ? a[i] : b[i];
  return a;
}
inline Lanes min_ps(Lanes a, Lanes b) {
  for (int i = 0; i < 16; i++) a[i] = a[i] < b[i] ? a[i] : b[i];
  return a;
}
inline unsigned cmplt_ps_mask(Lanes a, Lanes b) {
  unsigned mask = 0;
  for (int i = 0; i < 16; i++) mask |= unsigned(a[i] < b[i]) << i;
  return mask;
}
inline Words loadu(const void* from) {
  Words to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
inline void storeu(void* to, Words from) { std::memcpy(to, &from, sizeof(from)); }
inline void stream(void* to, Words from) {
  if (reinterpret_cast<std::uintptr_t>(to) % 64 != 0) fail("a streaming store that is not aligned");
  storeu(to, from);
}
inline Words set1(int x) { return std::uint32_t(x) - Words{}; }
// Interleaves, in each quarter, the elements of `size` words from `first` on.
template <int size, int first>
inline Words unpack(Words a, Words b) {
  Words to;
  for (int i = 0; i < 16; i++) {
    const int in_quarter = i % 4 / size, word = i / 4 * 4 + (first + in_quarter / 2) * size + i % size;
    to[i] = in_quarter % 2 ? b[word] : a[word];
  }
  return to;
}
// Takes two quarters of each, by two bits of the choice.
inline Words shuffle_quarters(Words a, Words b, int choice) {
  Words to;
  for (int i = 0; i < 16; i++) {
    const int word = (choice >> (i / 4 * 2) & 3) * 4 + i % 4;
    to[i] = i < 8 ? a[word] : b[word];
  }
  return to;
}
inline Words widen(HalfWords a) {
  Words to = {};
  std::memcpy(&to, &a, sizeof(a));
  return to;
}
inline Lanes cvtph_ps(HalfWords a) {
  Lanes to;
  for (int i = 0; i < 16; i++) to[i] = float(fp16_to_double(std::uint16_t(a[i / 2] >> 16 * (i % 2))));
  return to;
}
inline HalfWords cvtps_ph(Lanes a) {
  HalfWords to = {};
  for (int i = 0; i < 16; i++) to[i / 2] |= std::uint32_t(double_to_fp16(a[i])) << 16 * (i % 2);
  return to;
}
inline Words insert_half(Words a, HalfWords b, int half) {
  std::memcpy(reinterpret_cast<char*>(&a) + 32 * half, &b, sizeof(b));
  return a;
}

}  // namespace emulated
}  // namespace

#ifndef __AVX512F__
#define __AVX512F__ 1
#endif
#undef _mm512_cmp_ps_mask
#undef _mm512_inserti64x4
#undef _mm512_shuffle_i32x4
#undef _CMP_LT_OQ
#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _CMP_LT_OQ 17
#define __m512 ::emulated::Lanes
#define __m512i ::emulated::Words
#define __m512bh ::emulated::Words
#define __m256i ::emulated::HalfWords
#define _mm512_max_ps ::emulated::max_ps
#define _mm512_min_ps ::emulated::min_ps
#define _mm512_cmp_ps_mask(a, b, how) ::emulated::cmplt_ps_mask(a, b)
#define _mm512_loadu_si512 ::emulated::loadu
#define _mm512_storeu_si512 ::emulated::storeu
#define _mm512_stream_si512 ::emulated::stream
#define _mm512_set1_epi32 ::emulated::set1
#define _mm512_unpacklo_epi32 ::emulated::unpack<1, 0>
#define _mm512_unpackhi_epi32 ::emulated::unpack<1, 2>
#define _mm512_unpacklo_epi64 ::emulated::unpack<2, 0>
#define _mm512_unpackhi_epi64 ::emulated::unpack<2, 1>
#define _mm512_shuffle_i32x4 ::emulated::shuffle_quarters
#define _mm512_castsi256_si512 ::emulated::widen
#define _mm512_inserti64x4 ::emulated::insert_half
#define _mm512_cvtph_ps ::emulated::cvtph_ps
#define _mm512_cvtps_ph(a, how) ::emulated::cvtps_ph(a)
#define _mm512_dpbf16_ps ::emulated::dpbf16_ps
#define _tile_loadconfig ::emulated::tile_loadconfig
#define _tile_release ::emulated::tile_release
#define _tile_zero ::emulated::tile_zero
#define _tile_loadd ::emulated::tile_loadd
#define _tile_stored ::emulated::tile_stored
#define _tile_dpbf16ps ::emulated::tile_dpbf16ps
