// The gradient of a chunk of products from the statistics of its rows. It is read once and written once, in place or rounded to
// bf16.
//
// Blocks of at most 256 threads take parts of rows (rows.h). The floor is what is read and written: 4096 rows of 151936 take 0.78
// ms on an H200 from fp32 to bf16, 1.04 in place in fp32, 0.52 in bf16. Even in the last 24 lane-instructions a logit fit; 16 to 18
// are counted, 36 to 38 with a softcap, whose tanh makes bf16 bound by instructions (docs/gpu-kernels.md).
#include "rows.cuh"

namespace bupo::cuda {
namespace {

template <class T, class Out, Form form>
__global__ void __launch_bounds__(256, 4)
    row_gradient_kernel(const T* products, int64_t stride, int columns, int64_t first_column, Scales scales,
                        Coefficients coefficients, Out* gradient, int64_t gradient_stride) {
  const int64_t r = blockIdx.x;
  const int part = blockDim.x * group * gradient_groups, begin = blockIdx.y * part;
  const int end = begin + part < columns ? begin + part : columns;
  const RowCoefficients row = {coefficients.m[r], coefficients.constant[r], coefficients.slope ? coefficients.slope[r] : 0,
                               coefficients.on_target[r], column_of(coefficients.targets[r], first_column, columns)};
  scales = of_row<form>(scales, r);
  write_gradient<T, Out, form>(products + r * stride, gradient + r * gradient_stride, begin, end, scales, row);
}

}  // namespace

void row_gradient(const Products& products, const Readout& readout, const Coefficients& coefficients, int64_t n,
                  const Gradient& gradient, void* stream) {
  const char* name = "row_gradient";
  check(name, products);
  if (n == 0) return;
  const bool given = coefficients.m && coefficients.constant && coefficients.on_target && coefficients.targets && gradient.data;
  require(given, name, null);
  check(name, products, gradient, n);
  require(n <= products.rows, name, "accepted are no more rows than the products have");
  const int columns = static_cast<int>(products.columns), threads = gradient_threads(columns);
  const int part = threads * group * gradient_groups;
  const dim3 blocks(static_cast<unsigned>(n), (columns + part - 1) / part);
  with_types(products.dtype, gradient.dtype, [&](auto in, auto out) {
    using T = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    // x · 1 is x: the identity needs no kernel of its own where a logit costs this many bytes.
    const auto kernel =
        form_of(readout) == Form::softcap ? row_gradient_kernel<T, Out, Form::softcap> : row_gradient_kernel<T, Out, Form::affine>;
    launch(name, kernel, blocks, threads, stream, static_cast<const T*>(products.data), products.stride, columns,
           products.first_column, scales_of(readout), coefficients, static_cast<Out*>(gradient.data), gradient.stride);
  });
}

}  // namespace bupo::cuda
