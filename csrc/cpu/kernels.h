// The table of functions that the CPU kernels of every instruction set fill.
//
// Sizes and strides count elements. `weight` is 16-bit of any row stride, [columns, width]. Values per row come in arrays padded to a
// multiple of 32 rows: targets with −1, all others with 0 (and `outer` with 1). No result depends on the number of threads, and no
// row on another.
#pragma once

#include <cstdint>

namespace bupo::cpu {

using Word = std::uint32_t;
using Bf16 = std::uint16_t;
struct Fp16 {
  std::uint16_t bits;
};

enum class Dtype { fp32, bf16, fp16 };

// A matrix to pack: bf16, or fp16 where the instruction set's panels are of fp32.
struct Matrix {
  const std::uint16_t* data;
  std::int64_t stride, rows, width;
  Dtype dtype;
};

// Rows of a matrix.
struct Rows {
  const void* data;
  std::int64_t stride, width;
  Dtype dtype;
};

// How a product x becomes the logit z = g((x + bias_j) · inner) · outer, g being tanh or nothing.
struct Readout {
  const float* bias;   // [columns] or null
  const float* outer;  // [rows], padded, or null for 1
  float inner;
  bool softcap;

  bool is_identity() const { return !bias && !outer && !softcap && inner == 1.0f; }
};

// `Coefficients` of bupo_kernels/backends/algebra.py, [rows] each.
struct Coefficients {
  const float *m, *constant, *slope /* or null */, *on_target;
  const std::int32_t* targets;  // counted from the first column at hand
};

// The statistics of rows (row_statistics.h) and the logits of their targets, [rows] each.
struct Statistics {
  float *m, *s, *t, *z_y;
};

// What the policies of a lens leave of one another and of the vocabulary (backends/lens_loop.py), for P policies on the same tokens.
// Values are [P, stride], a token at each place; `cross` is [tokens, P, P]; of the top k, [P, stride, k], the root of a heap is the
// least. Null where nobody asks.
struct LensStatistics {
  float *m, *s, *t, *z_y;
  std::int64_t stride;
  std::int64_t* argmax;
  float* cross;
  bool pairs;  // whether `cross` is of all pairs; else of those with the last policy
  float* top_z;
  std::int64_t* top_ids;
  std::int64_t top_k;
};

// What a lens finds once the normalisers are known: `log_s`, [P, stride], is ln s. Null where nobody asks.
struct LensComparison {
  const float* log_s;
  std::int64_t* rank;  // [P, stride]
  float* jsd;          // [P, stride]; the last policy's are left alone
};

// One of the two policies of a divergence: products that a library left in memory, fp32, whole rows.
struct Policy {
  float* products;
  std::int64_t stride;
  bool gradient;  // whether the gradient of the products is left in their place
  Readout readout;
};

// Products that statistics leave for the gradient, fp32: blocks of 32 columns (down) by 32 tokens, those of the first `panels` panels
// of tokens, `stride` of them for each panel of columns.
template <class T>
struct Kept {
  T* blocks;  // or null, where nothing is kept
  std::int64_t panels, stride;
};

// How a gradient is written.
enum class Write { fp32, add_to_fp32, bf16, fp16 };

struct Kernels {
  bool multiplies_bf16;  // whether its panels are of bf16; else of fp32

  // Returns how many words `count` rows or columns of this depth take as panels (panels.h).
  std::int64_t (*packed_words)(std::int64_t count, std::int64_t depth);
  // Returns the bytes that all threads together have at hand in a product whose left panels, of this depth, each of them packs; of
  // depth 0 those of a product whose panels are there.
  std::int64_t (*workspace_bytes)(std::int64_t depth, int threads);
  // Packs the rows of a matrix as right panels (depth = width), or its columns (depth = rows).
  void (*pack_rows)(Matrix from, Word* to, int threads);
  void (*pack_columns)(Matrix from, Word* to, int threads);

  // Writes the statistics of every row of softmax(h Wᵀ), with h as packed rows, and what is to be kept. The workspace has
  // `statistics_bytes`.
  std::int64_t (*statistics_bytes)(std::int64_t rows, std::int64_t columns, std::int64_t width, int threads);
  void (*linear_statistics)(const Word* hidden, std::int64_t rows, Matrix weight, Readout readout, const std::int32_t* targets,
                            Statistics out, Kept<float> kept, void* workspace, int threads);

  // Writes dz of some columns as left panels (its columns as rows, for dW) and as right panels (its rows as columns, for dH), and
  // its column sums unless they are null. Where products were kept, those of the tokens `sources`
  // are read (of −1 they are 0), and `hidden` is not. The workspace has `workspace_bytes` of the width.
  void (*linear_gradient)(const Word* hidden, std::int64_t rows, Matrix weight, Readout readout, Coefficients coefficients,
                          Kept<const float> kept, const std::int32_t* sources, Word* dz_left, Word* dz_right, float* column_sums,
                          void* workspace, int threads);
  // Writes out[columns, width] = dzᵀ h, with h as packed columns. The workspace has `workspace_bytes` of depth 0.
  void (*weight_gradient)(const Word* dz_left, std::int64_t columns, const Word* hidden_columns, std::int64_t rows,
                          std::int64_t width, void* out, std::int64_t stride, Write write, void* workspace, int threads);
  // Writes or adds dz W to `blocks`, which are [width / 32, rows / 32] transposed blocks of 32 x 32. The workspace has
  // `workspace_bytes` of the columns, rounded up to 32.
  void (*hidden_gradient)(const Word* dz_right, std::int64_t rows, Matrix weight, float* blocks, bool add, void* workspace,
                          int threads);
  // Writes out[rows, width] from such blocks.
  void (*unpack_hidden)(const float* blocks, std::int64_t rows, std::int64_t width, float* out, std::int64_t stride, int threads);

  // Folds products that a library left in memory, fp32 [rows, columns] of the columns from `first` on, into the statistics of their
  // rows, and leaves the logits in their place.
  void (*row_statistics)(float* products, std::int64_t stride, std::int64_t rows, std::int64_t columns, std::int64_t first,
                         Readout readout, const std::int32_t* targets, Statistics running, int threads);
  // Writes dz from what row_statistics left (`formed`), or from products.
  void (*row_gradient)(const float* logits, std::int64_t stride, std::int64_t rows, std::int64_t columns, Readout readout,
                       bool formed, Coefficients coefficients, float* dz, int threads);

  // Packs the rows of a matrix as left panels (depth = width).
  void (*pack_left)(Matrix from, Word* to, int threads);
  // Writes out[rows, columns] = h Wᵀ, with h as packed left panels and W as packed rows. The workspace has `workspace_bytes` of depth 0.
  void (*linear_products)(const Word* hidden, std::int64_t rows, const Word* weight, std::int64_t columns, std::int64_t width,
                          float* out, std::int64_t stride, void* workspace, int threads);
  // Folds products of P policies on the same tokens, fp32 [P, tokens, columns] of the columns from `first` on, into what a lens keeps
  // of them, and leaves logits in their place. `scratch` has as much room, and is read only where all pairs are asked for.
  void (*lens_statistics)(float* products, float* scratch, std::int64_t policies, std::int64_t tokens, std::int64_t columns,
                          std::int64_t first, Readout readout, const std::int32_t* targets, LensStatistics running, int threads);
  // Adds to rank and jsd what follows from logits that lens_statistics left (`formed`), or from products.
  void (*lens_comparison)(float* logits, std::int64_t policies, std::int64_t tokens, std::int64_t columns, Readout readout,
                          bool formed, LensStatistics statistics, LensComparison found, int threads);
  // Writes the divergence of each row and the entropy of the student, [rows] each. `beta` is in bupo_kernels/backends/divergences.py.
  // With `g_divergence` it leaves gradients where the policies want them; `g_entropy` may be null. What else is in place of the
  // products has no meaning.
  void (*row_divergence)(Policy student, Policy teacher, std::int64_t rows, std::int64_t columns, float beta,
                         const float* g_divergence, const float* g_entropy, float* divergence, float* entropy, int threads);

  // Writes out[e] = left[left_rows[e]] · right[right_rows[e]] for rows of one dtype and width, which lie where they are.
  void (*gathered_dots)(Rows left, const std::int64_t* left_rows, Rows right, const std::int64_t* right_rows, std::int64_t count,
                        float* out, int threads);
  // Writes Σ factors[e] · source[index[e]] over the entries e from offsets[i] to offsets[i + 1] to row places[i] of `out`, whose
  // dtype and width are the source's and whose rows lie side by side: summed in fp32 one after the other, rounded once.
  void (*gathered_sums)(const float* factors, Rows source, const std::int64_t* index, const std::int64_t* offsets,
                        std::int64_t segments, void* out, const std::int64_t* places, int threads);
};

// Calls task(context, index, worker) for every index below `tasks`, on `threads` threads; workers are numbered from 0.
void parallel_for(int threads, std::int64_t tasks, void (*task)(void*, std::int64_t, int), void* context);

// Gives memory that is about to be written, perhaps for the first time, all its pages at once: one by one they cost more than the
// product that fills them. What the memory holds stays.
void make_present(void* memory, std::int64_t bytes, int threads);

}  // namespace bupo::cpu
