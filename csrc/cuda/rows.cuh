// What the row kernels share: reading products as logits, and the sweeps that gather a row's statistics and write its gradient.
//
// Which thread takes which columns depends on the number of columns alone, not on where a row lies in memory: sums come in one
// order whatever the alignment, so a row has the same bits in any chunk. A row that does not begin on 16 bytes is read element by
// element, which is still once from memory, but with 4 (bf16: 8) times the loads; so a backend does well to pad its stride.
//
// Bounds on an H200 (4.8 TB/s; 132 processors of 128 lanes and 16 special-function units at 1.7 GHz): to read a thousand fp32
// logits takes 0.83 ns, in which 24 lane-instructions and 3 exponentials a logit fit; bf16 half of all three. expf takes about 8
// and 1; counted are 16 to 18 for all of a logit's statistics (docs/gpu-kernels.md): bound by memory for fp32, by instructions for
// bf16. Estimates: this has never run on a GPU.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#include "launch.cuh"
#include "rows.h"

namespace bupo::cuda {

struct bf16 {
  uint16_t bits;
};

__device__ inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return float_of_bits(static_cast<uint32_t>(x.bits) << 16); }

__device__ inline void unpack(uint32_t word, float* x, float) { x[0] = float_of_bits(word); }
__device__ inline void unpack(uint32_t word, float* x, bf16) {  // the lower half lies first
  x[0] = float_of_bits(word << 16);
  x[1] = float_of_bits(word & 0xffff0000u);
}

// Rounds two numbers to the nearest even bf16; NaN stays NaN. The first is the lower half of the word.
__device__ inline uint32_t round_to_bf16(float first, float second) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  uint32_t word = 0;
  const float pair[2] = {first, second};
  for (int half = 0; half < 2; ++half) {
    uint32_t bits;
    memcpy(&bits, &pair[half], sizeof bits);
    const uint32_t rounded = pair[half] != pair[half] ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    word |= rounded << (16 * half);
  }
  return word;
#endif
}

__device__ inline uint32_t pack(const float* x, float) {
  uint32_t word;
  memcpy(&word, x, sizeof word);
  return word;
}
__device__ inline uint32_t pack(const float* x, bf16) { return round_to_bf16(x[0], x[1]); }

__device__ inline void store(float* to, float x) { *to = x; }
__device__ inline void store(bf16* to, float x) { to->bits = static_cast<uint16_t>(round_to_bf16(x, 0)); }

__device__ inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <class T, int N>
__device__ __forceinline__ void load(const T* from, bool aligned, float (&x)[N]) {
  constexpr int word = 4 / sizeof(T);
  if (N % (4 * word) == 0 && aligned) {  // a single element is of no word
#pragma unroll
    for (int i = 0; i < N; i += 4 * word) {
      const uint4 words = *reinterpret_cast<const uint4*>(from + i);
      unpack(words.x, x + i, T{});
      unpack(words.y, x + i + word, T{});
      unpack(words.z, x + i + 2 * word, T{});
      unpack(words.w, x + i + 3 * word, T{});
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = to_float(from[i]);
  }
}

template <class T, int N>
__device__ __forceinline__ void store(T* to, bool aligned, const float (&x)[N]) {
  constexpr int word = 4 / sizeof(T);
  if (aligned) {
#pragma unroll
    for (int i = 0; i < N; i += 4 * word) {
      uint4 words;
      words.x = pack(x + i, T{});
      words.y = pack(x + i + word, T{});
      words.z = pack(x + i + 2 * word, T{});
      words.w = pack(x + i + 3 * word, T{});
      *reinterpret_cast<uint4*>(to + i) = words;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) store(to + i, x[i]);
  }
}

// How a product x becomes a logit: x; or (x + b) inner; or tanh((x + b) inner) outer.
enum class Form { identity, affine, softcap };

struct Scales {
  const float* bias;
  const float* row_temperature;
  float inner, outer;
};

inline Scales scales_of(const Readout& readout) {
  const double temperature = readout.row_temperature ? 1 : readout.temperature;
  const bool capped = readout.softcap > 0;
  const double inner = readout.logit_scale / (capped ? readout.softcap : temperature);
  return {readout.bias, readout.row_temperature, float(inner), float(capped ? readout.softcap / temperature : 1)};
}

inline Form form_of(const Readout& readout) {
  if (readout.softcap > 0) return Form::softcap;
  const bool same = !readout.bias && !readout.row_temperature && readout.logit_scale == readout.temperature;
  return same ? Form::identity : Form::affine;
}

template <Form form>
__device__ Scales of_row(Scales scales, int64_t row) {
  if (form == Form::affine && scales.row_temperature) scales.inner /= scales.row_temperature[row];
  if (form == Form::softcap && scales.row_temperature) scales.outer /= scales.row_temperature[row];
  return scales;
}

// Turns products into logits in place, and with `bend` sets `slope` to ∂z/∂x, without the row's constant factor.
template <Form form, bool bend, int N>
__device__ __forceinline__ void to_logits(float (&x)[N], float (&slope)[N], int column, const Scales& scales) {
  if (form == Form::identity) return;
  if (scales.bias) {
    float bias[N];
    load(scales.bias + column, on_16_bytes(scales.bias), bias);
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] += bias[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    x[i] *= scales.inner;
    if (form == Form::softcap) {
      const float capped = tanhf(x[i]);
      x[i] = capped * scales.outer;
      if (bend) slope[i] = (1 - capped) * (1 + capped);
    }
  }
}

template <Form form, int N>
__device__ __forceinline__ void to_logits(float (&x)[N], int column, const Scales& scales) {
  float none[N];
  to_logits<form, false>(x, none, column, scales);
}

// Adds N logits to `total` with one rescaling, whether or not the maximum grew: a branch would be taken by some thread of most
// warps.
template <int N>
__device__ __forceinline__ void fold(Partial<float>& total, const float (&z)[N]) {
  float m = total.m;
#pragma unroll
  for (int i = 0; i < N; ++i) m = maximum(m, z[i]);
  const float shift = floored(total.m - m), scale = exponential(shift);
  float s = scale * total.s, t = scale * (total.t + shift * total.s);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = z[i] - m, e = exponential(x);
    s += e;
    t += floored(x) * e;
  }
  total = {m, s, t};
}

// Returns the statistics of this thread's share of a row: of whole groups, then words, then what is left of one.
template <class T, Form form>
__device__ Partial<float> sweep(const T* row, int columns, const Scales& scales) {
  constexpr int word = 16 / sizeof(T), words = group / word;
  const bool aligned = on_16_bytes(row);
  const int step = blockDim.x * word, whole = columns / (step * words) * (step * words);
  Partial<float> total = {lowest, 0, 0};
  int column = threadIdx.x * word;
  for (; column < whole; column += step * words) {
    float z[words][word], flat[group];
#pragma unroll
    for (int i = 0; i < words; ++i) load(row + column + i * step, aligned, z[i]);
#pragma unroll
    for (int i = 0; i < words; ++i) {
      to_logits<form>(z[i], column + i * step, scales);
#pragma unroll
      for (int k = 0; k < word; ++k) flat[i * word + k] = z[i][k];
    }
    fold(total, flat);
  }
  for (; column < columns; column += step) {
    if (column + word <= columns) {
      float z[word];
      load(row + column, aligned, z);
      to_logits<form>(z, column, scales);
      fold(total, z);
    } else {
      for (int k = column; k < columns; ++k) {
        float z[1] = {to_float(row[k])};
        to_logits<form>(z, k, scales);
        fold(total, z);
      }
    }
  }
  return total;
}

template <class T, Form form>
__device__ float logit_at(const T* row, int column, const Scales& scales) {
  float z[1] = {to_float(row[column])};
  to_logits<form>(z, column, scales);
  return z[0];
}

// Returns the statistics of the warp to its thread 0; what other threads get means nothing.
__device__ inline Partial<float> reduce_warp(Partial<float> part) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float m = __shfl_down_sync(0xffffffffu, part.m, distance);
    const float s = __shfl_down_sync(0xffffffffu, part.s, distance);
    const float t = __shfl_down_sync(0xffffffffu, part.t, distance);
    part = merge(part, {m, s, t});
  }
  return part;
}

// Returns the statistics of the block to its thread 0. All threads must call this, which has a barrier; `shared` must not be in
// use.
__device__ inline Partial<float> reduce_block(Partial<float> part, Partial<float> (&shared)[most_threads / 32]) {
  part = reduce_warp(part);
  const unsigned warps = blockDim.x / 32;
  if (warps == 1) return part;
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = part;
  __syncthreads();
  if (threadIdx.x >= 32) return part;
  return reduce_warp(threadIdx.x < warps ? shared[threadIdx.x] : Partial<float>{lowest, 0, 0});
}

// The coefficients of one row.
struct RowCoefficients {
  float m, constant, slope, on_target;
  int target;  // column of the slice, or −1
};

// Returns the column of the slice that a target is, or −1.
__device__ inline int column_of(int64_t target, int64_t first_column, int columns) {
  const int64_t column = target - first_column;
  return column >= 0 && column < columns ? static_cast<int>(column) : -1;
}

template <Form form, int N>
__device__ __forceinline__ void to_gradient(float (&x)[N], int column, const Scales& scales, const RowCoefficients& row) {
  float bend[N];
  to_logits<form, true>(x, bend, column, scales);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float centred = x[i] - row.m;
    x[i] = logit_gradient(centred, exponential(centred), row.constant, row.slope);
  }
  if (static_cast<unsigned>(row.target - column) < N) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[i] = column + i == row.target ? row.on_target : x[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] *= form == Form::softcap ? bend[i] : 1;
}

// Writes columns [begin, end) of a row's gradient, from the last to the first: where a sweep from the first to the last has just
// gone before, the last are those that are still in the cache. `gradient` may be `row`: each thread writes what it has read itself.
template <class T, class Out, Form form>
__device__ void write_gradient(const T* row, Out* gradient, int begin, int end, const Scales& scales,
                               const RowCoefficients& coefficients) {
  constexpr int narrow = sizeof(T) < sizeof(Out) ? sizeof(T) : sizeof(Out), word = 16 / narrow, words = group / word;
  const bool read = on_16_bytes(row), written = on_16_bytes(gradient);
  const int step = blockDim.x * word, whole = (end - begin) / (step * words);
  const int first = begin + threadIdx.x * word;
  for (int column = first + whole * words * step; column < end; column += step) {
    if (column + word <= end) {
      float x[word];
      load(row + column, read, x);
      to_gradient<form>(x, column, scales, coefficients);
      store(gradient + column, written, x);
    } else {
      for (int k = column; k < end; ++k) {
        float x[1] = {to_float(row[k])};
        to_gradient<form>(x, k, scales, coefficients);
        store(gradient + k, x[0]);
      }
    }
  }
  for (int column = first + (whole - 1) * words * step; column >= first; column -= words * step) {
    float x[words][word];
#pragma unroll
    for (int i = 0; i < words; ++i) load(row + column + i * step, read, x[i]);
#pragma unroll
    for (int i = 0; i < words; ++i) {
      to_gradient<form>(x[i], column + i * step, scales, coefficients);
      store(gradient + column + i * step, written, x[i]);
    }
  }
}

template <class Out>
__device__ void write_zeros(Out* gradient, int columns) {
  constexpr int word = 16 / sizeof(Out);
  const bool aligned = on_16_bytes(gradient);
  const float zeros[word] = {};
  for (int column = threadIdx.x * word; column < columns; column += blockDim.x * word) {
    if (column + word <= columns) {
      store(gradient + column, aligned, zeros);
    } else {
      for (int k = column; k < columns; ++k) store(gradient + k, 0);
    }
  }
}

inline void require(bool holds, const char* name, const char* accepted) {
  if (!holds) throw std::invalid_argument(std::string(name) + ": " + accepted);
}

constexpr const char* null = "accepted are pointers that are not null, but for what may be left out";

inline void check(const char* name, const Products& products) {
  require(products.rows <= INT32_MAX, name, "accepted are fewer than 2^31 rows at a time");  // blocks of a grid
  // Columns are counted in int, a sweep looks a step of the block past the last, and a grid has less than 2^16 parts of a row.
  require(products.columns >= 1 && products.columns <= 1 << 29, name, "accepted are 1 to 2^29 columns");
  require(products.stride >= products.columns, name, "accepted are strides of at least the number of columns");
  require(products.data || products.rows == 0, name, null);
}

inline void check(const char* name, const Products& products, const Gradient& gradient, int64_t rows) {
  const bool narrowed = products.dtype == Dtype::float32 && gradient.dtype == Dtype::bfloat16;
  require(gradient.dtype == products.dtype || narrowed, name, "accepted are gradients of the products' dtype, and bf16 of fp32");
  require(gradient.stride >= products.columns, name, "accepted are strides of at least the number of columns");
  const auto last = [&](int64_t n, int64_t stride, Dtype dtype) { return ((n - 1) * stride + products.columns) * size_of(dtype); };
  const auto* from = static_cast<const char*>(products.data);
  const auto* to = static_cast<const char*>(gradient.data);
  const bool apart =
      to >= from + last(products.rows, products.stride, products.dtype) || from >= to + last(rows, gradient.stride, gradient.dtype);
  const bool in_place = to == from && gradient.dtype == products.dtype && gradient.stride == products.stride;
  require(apart || in_place, name, "accepted are gradients apart from the products, or all of them in place in the same dtype");
}

template <class T>
struct Type {
  using type = T;
};

// Calls run(type of the products, type of the gradient).
template <class Run>
void with_types(Dtype products, Dtype gradient, Run run) {
  if (products == Dtype::bfloat16) return run(Type<bf16>{}, Type<bf16>{});
  gradient == Dtype::float32 ? run(Type<float>{}, Type<float>{}) : run(Type<float>{}, Type<bf16>{});
}

}  // namespace bupo::cuda
