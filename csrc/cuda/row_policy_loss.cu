// A policy loss on rows of products: their statistics in one sweep, the terms of their tokens, then dz in a second sweep.
//
// A block takes a row, so nothing waits for other rows or the host, and statistics and coefficients never leave the processor. A
// row is read from memory once as long as the rows in flight stay in the cache (rows.h says how many those are); then the floor is
// that of row_gradient. Otherwise what has left the cache is read again, at most what row_statistics reads. A row without gradient,
// where a clip decides, is read once and zeroed.
#include "rows.cuh"

namespace bupo::cuda {
namespace {

// The results of a row, as `finish` of bupo_kernels/backends/algebra.py has them.
struct Results {
  float log_s, logprob, entropy;
};

// Returns the results of a row. NaN passes the bounds.
__device__ Results finish(const Partial<float>& row, float z_y, float log_vocab) {
  const float log_s = logf(row.s), logprob = (z_y - row.m) - log_s;
  return {log_s, logprob > 0 ? 0 : logprob, clamped(log_s - row.t / row.s, 0, log_vocab)};
}

// Returns `coefficients` of bupo_kernels/backends/algebra.py, times ∂z/∂product. On the target 1 − p_y = −expm1(log p_y) stays
// accurate where p_y is near 1.
__device__ RowCoefficients coefficients(float g_logprob, float g_entropy, const Partial<float>& row, const Results& results,
                                        float scale, int target) {
  const float p_y = expf(results.logprob);
  const float constant = (-g_logprob - g_entropy * (results.entropy - results.log_s)) / row.s;
  const float on_target = -g_logprob * expm1f(results.logprob) - g_entropy * (p_y * (floored(results.logprob) + results.entropy));
  return {row.m, scale * constant, scale * (g_entropy / row.s), scale * on_target, target};
}

template <class T, class Out, Form form>
__global__ void __launch_bounds__(most_threads, 1)
    row_policy_loss_kernel(const T* products, int64_t stride, int columns, Scales scales, Objective objective, float log_vocab,
                           PolicyInputs inputs, PolicyOutputs outputs, Out* gradient, int64_t gradient_stride) {
  __shared__ Partial<float> shared[most_threads / 32];
  __shared__ RowCoefficients row_coefficients;
  __shared__ bool used;
  const int64_t r = blockIdx.x;
  const T* row = products + r * stride;
  scales = of_row<form>(scales, r);
  const Partial<float> total = reduce_block(sweep<T, form>(row, columns, scales), shared);
  if (threadIdx.x == 0) {
    const int target = column_of(inputs.targets[r], 0, columns);
    // A target outside of the vocabulary must not look like a result.
    const float z_y = target >= 0 ? logit_at<T, form>(row, target, scales) : float_of_bits(0x7fc00000u);
    const Results results = finish(total, z_y, log_vocab);
    const float old = inputs.old_logprobs ? inputs.old_logprobs[r] : results.logprob;
    const float reference = inputs.reference_logprobs ? inputs.reference_logprobs[r] : 0;
    const float sampler = inputs.sampler_logprobs ? inputs.sampler_logprobs[r] : 0;
    const PolicyTerms terms =
        policy_terms(objective, {results.logprob, results.entropy, inputs.advantages[r], old, reference, sampler});
    const float weight = inputs.weights[r], g_logprob = weight * terms.d_logprob, g_entropy = weight * terms.d_entropy;
    outputs.loss[r] = weight * terms.loss;
    outputs.logprob[r] = results.logprob;
    outputs.entropy[r] = results.entropy;
    outputs.used[r] = used = g_logprob != 0 || g_entropy != 0;
    const float scale = form == Form::softcap ? scales.inner * scales.outer : scales.inner;
    row_coefficients = coefficients(g_logprob, g_entropy, total, results, scale, target);
  }
  if (!gradient) return;
  __syncthreads();
  Out* to = gradient + r * gradient_stride;
  if (used) {
    write_gradient<T, Out, form>(row, to, 0, columns, scales, row_coefficients);
  } else {
    write_zeros(to, columns);
  }
}

}  // namespace

void row_policy_loss(const Products& products, const Readout& readout, const Objective& objective, const PolicyInputs& inputs,
                     const PolicyOutputs& outputs, const Gradient& gradient, void* stream) {
  const char* name = "row_policy_loss";
  check(name, products);
  if (products.rows == 0) return;
  const bool given = inputs.targets && inputs.weights && inputs.advantages;
  require(given && outputs.loss && outputs.logprob && outputs.entropy && outputs.used, name, null);
  if (gradient.data) check(name, products, gradient, products.rows);
  require(products.first_column == 0, name, "accepted are whole rows");
  require(objective.kl == Divergence::none || inputs.reference_logprobs, name, "a KL needs reference_logprobs");
  require(!objective.importance || inputs.sampler_logprobs, name, "importance weights need sampler_logprobs");
  const int columns = static_cast<int>(products.columns), threads = row_threads(columns, products.dtype);
  const float log_vocab = static_cast<float>(std::log(static_cast<double>(columns)));
  with_types(products.dtype, gradient.dtype, [&](auto in, auto out) {
    using T = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    const auto kernel = form_of(readout) == Form::softcap ? row_policy_loss_kernel<T, Out, Form::softcap>
                                                          : row_policy_loss_kernel<T, Out, Form::affine>;
    launch(name, kernel, dim3(static_cast<unsigned>(products.rows)), threads, stream, static_cast<const T*>(products.data),
           products.stride, columns, scales_of(readout), objective, log_vocab, inputs, outputs, static_cast<Out*>(gradient.data),
           gradient.stride);
  });
}

}  // namespace bupo::cuda
