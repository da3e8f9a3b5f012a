// What the CPU kernels do, in plain types: the table of functions that every instruction set fills.
//
// Sizes and strides count elements. `weight` is bf16 of any row stride, [columns, width]. Values per row come in arrays padded to a
// multiple of 32 rows: targets with −1, all others with 0 (and `outer` with 1). Nothing here depends on the number of threads, and no
// row on another.
#pragma once

#include <cstdint>

namespace bupo::cpu {

using Word = std::uint32_t;
using Bf16 = std::uint16_t;

struct Matrix {
  const Bf16* data;
  std::int64_t stride, rows, width;
};

// A product x becomes the logit z = g((x + bias_j) · inner) · outer, g being tanh or nothing.
struct Readout {
  const float* bias;   // [columns] or null
  const float* outer;  // [rows], padded, or null for 1
  float inner;
  bool softcap;

  bool is_identity() const { return !bias && !outer && !softcap && inner == 1.0f; }
};

struct Coefficients {  // of bupo_kernels/backends/algebra.py; [rows] each
  const float *m, *constant, *slope /* or null */, *on_target;
  const std::int32_t* targets;  // less the first column at hand
};

struct Statistics {  // [rows] each
  float *m, *s, *t, *z_y;
};

enum class Write { fp32, add_to_fp32, bf16 };

struct Kernels {
  // Words of `count` rows or columns of this depth as panels (panels.h).
  std::int64_t (*packed_words)(std::int64_t count, std::int64_t depth);
  // Memory for the left panels that the threads have at hand, of this depth.
  std::int64_t (*left_bytes)(std::int64_t depth, int threads);
  // Right panels of the rows of a matrix (depth = width), or of its columns (depth = rows).
  void (*pack_rows)(Matrix from, Word* to, int threads);
  void (*pack_columns)(Matrix from, Word* to, int threads);

  // Statistics of every row of softmax(h Wᵀ), h as packed rows. The workspace is of `statistics_bytes`.
  std::int64_t (*statistics_bytes)(std::int64_t rows, std::int64_t columns, std::int64_t width, int threads);
  void (*linear_statistics)(const Word* hidden, std::int64_t rows, Matrix weight, Readout readout, const std::int32_t* targets,
                            Statistics out, void* workspace, int threads);

  // The gradient of the products of some columns, as left panels (its columns as rows, for dW) and as right panels (its rows as
  // columns, for dH), and its column sums if wanted. The workspace is of `left_bytes` of the width.
  void (*linear_gradient)(const Word* hidden, std::int64_t rows, Matrix weight, Readout readout, Coefficients of, Word* dz_left,
                          Word* dz_right, float* column_sums, void* workspace, int threads);
  // out[columns, width] = dzᵀ h, h as packed columns.
  void (*weight_gradient)(const Word* dz_left, std::int64_t columns, const Word* hidden_columns, std::int64_t rows,
                          std::int64_t width, void* out, std::int64_t stride, Write how, int threads);
  // blocks (+)= dz W, [width / 32, rows / 32] transposed blocks of 32 x 32; and out[rows, width] from them. The workspace is of
  // `left_bytes` of the columns, rounded up to 32.
  void (*hidden_gradient)(const Word* dz_right, std::int64_t rows, Matrix weight, float* blocks, bool add, void* workspace,
                          int threads);
  void (*unpack_hidden)(const float* blocks, std::int64_t rows, std::int64_t width, float* out, std::int64_t stride, int threads);

  // The same for products that a library left in memory, fp32 [rows, columns], of the columns from `first` on: folds them into the
  // statistics, and leaves the logits in their place.
  void (*row_statistics)(float* products, std::int64_t stride, std::int64_t rows, std::int64_t columns, std::int64_t first,
                         Readout readout, const std::int32_t* targets, Statistics running, int threads);
  // dz from what row_statistics left (`formed`), or from products.
  void (*row_gradient)(const float* logits, std::int64_t stride, std::int64_t rows, std::int64_t columns, Readout readout,
                       bool formed, Coefficients of, float* dz, int threads);
};

// task(context, index, worker) for every index below `tasks`, on `threads` threads; workers are numbered from 0.
void parallel_for(int threads, std::int64_t tasks, void (*task)(void*, std::int64_t, int), void* context);

// Memory that is about to be written, perhaps for the first time, gets its pages at once: one by one they cost more than the product
// that fills them. What it holds stays.
void make_present(void* memory, std::int64_t bytes, int threads);

}  // namespace bupo::cpu
