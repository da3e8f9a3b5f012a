// The row kernels, over a chunk of products h·W in fp32 or bf16 that a library GEMM wrote: what they take and how they are
// launched.
//
// Every pointer is to the device's memory. A call returns when its kernel is queued on the stream; it throws std::invalid_argument
// for what no kernel takes, and std::runtime_error, with the kernel's name, where the launch failed.
#pragma once

#include <cstdint>

#include "../policy_terms.h"

namespace bupo::cuda {

enum class Dtype { float32, bfloat16 };

constexpr int size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

struct Products {  // [rows, columns]
  const void* data;
  Dtype dtype;
  int64_t rows, columns;
  int64_t stride;        // elements from row to row, at least columns
  int64_t first_column;  // in the vocabulary
};

// How a product x becomes a logit: z = softcap(logit_scale · (x + bias_j)) / temperature, with softcap(u) = softcap · tanh(u /
// softcap).
struct Readout {
  const float* bias;             // [columns] of this slice, or null
  const float* row_temperature;  // [rows], or null; instead of temperature
  double temperature, logit_scale;
  double softcap;  // 0 for none
};

struct Gradient {  // [rows, columns]
  void* data;      // may be the products themselves, in the same dtype and stride
  Dtype dtype;
  int64_t stride;
};

struct Statistics {  // [rows] each
  float *m, *s, *t, *z_y;
};

// Folds every row into the statistics that other slices of the vocabulary left; with `first` these are ignored, and a row whose
// target lies elsewhere has z_y = 0.
void row_statistics(const Products& products, const Readout& readout, const int64_t* targets, const Statistics& statistics,
                    bool first, void* stream);

// `Coefficients` of bupo_kernels/backends/algebra.py for the gradient of the products: dz_j = e^(z_j−m) (constant − slope (z_j−m)),
// dz_y = on_target, both times 1 − tanh² where there is a softcap.
struct Coefficients {  // [n] each
  const float *m, *constant;
  const float* slope;  // or null
  const float* on_target;
  const int64_t* targets;
};

// Writes the gradient of the first `n` rows of the products.
void row_gradient(const Products& products, const Readout& readout, const Coefficients& coefficients, int64_t n,
                  const Gradient& gradient, void* stream);

struct PolicyInputs {  // [rows] each
  const int64_t* targets;
  const float *weights, *advantages;
  const float *old_logprobs, *reference_logprobs, *sampler_logprobs;  // or null
};

struct PolicyOutputs {  // [rows] each
  float* loss;          // times the weight
  float *logprob, *entropy;
  bool* used;  // whether anything of the row's gradient can differ from 0; where nothing can, all of it is written as 0
};

// Writes the policy loss of whole rows: the products' columns are the vocabulary. Without `gradient.data` only outputs are written.
void row_policy_loss(const Products& products, const Readout& readout, const Objective& objective, const PolicyInputs& inputs,
                     const PolicyOutputs& outputs, const Gradient& gradient, void* stream);

// How many logits of a row a thread takes at a time: 64 bytes of fp32, 32 of bf16. With 1024 threads a processor then has 32 to 64
// KB in flight, where 4.8 TB/s (H200) times about 0.8 µs over 132 processors ask for 29; 64 registers a thread hold sixteen values.
constexpr int group = 16;

// Returns a power of two of warps, so that a thread has a group or more. Blocks of 512 run two to a processor, so that one reads
// while the other reduces. A long row gets a block of 1024, and a processor for itself: the second sweep of row_policy_loss then
// finds more of the row in the cache (50 MB on an H200, which hold 132 rows of 300 KB), and the pause between its sweeps is small
// against them. The number depends on the row alone: results must not change with the number of rows.
constexpr int64_t long_row = 128 << 10;  // bytes
constexpr int most_threads = 1024;

constexpr int row_threads(int64_t columns, Dtype dtype) {
  if (columns * size_of(dtype) > long_row) return most_threads;
  int threads = 32;
  while (threads < 512 && 2 * threads * group <= columns) threads *= 2;
  return threads;
}

// Returns the threads of a block that writes a gradient. Nothing is summed, so blocks take parts of a row: four groups a thread,
// for what each reads about its row.
constexpr int gradient_threads(int64_t columns) {
  int threads = 32;
  while (threads < 256 && threads * group < columns) threads *= 2;
  return threads;
}
constexpr int gradient_groups = 4;

}  // namespace bupo::cuda
