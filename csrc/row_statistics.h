// The algebra of a row of logits z, defined once for single floats, the vectors of the CPU kernels and the threads of the CUDA
// kernels.
//
// Any part of a row has m = max z, s = Σ e^(z−m) and t = Σ (z−m) e^(z−m). Centred on m, the entropy ln s − t/s does not cancel at
// large |z|. Partials can be merged in any grouping; kernels merge them in a fixed order, so that results repeat bit for bit.
//
// A logit of −inf is a column that cannot be chosen: e^x is 0, and adds 0 to every sum. A NaN is lost from the maximum, which drops
// it, but never from s: e^NaN is NaN.
//
// `Real` is float or a type with its operators, and with maximum(a, b) and exponential(x) to be found by its arguments.
#pragma once

#include <cfloat>
#include <cmath>

// These functions must be inlined: the CPU kernels are compiled several times for different instruction sets, and the linker would
// keep only one copy of a function they share.
#if defined(__CUDACC__)
#define BUPO_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define BUPO_HD static inline __attribute__((always_inline))
#else
#define BUPO_HD static inline
#endif

namespace bupo {

BUPO_HD float maximum(float a, float b) { return a > b ? a : b; }
BUPO_HD float exponential(float x) { return expf(x); }

// The maximum of no logits. It is finite, so that the difference of two of them is no NaN.
constexpr float lowest = -FLT_MAX;

// Returns an exponent as a factor of its own power, e^x · x: 0 · −inf would be NaN. An exponent that is NaN may be lost; its power
// is NaN.
template <class Real>
BUPO_HD Real floored(Real exponent) {
  return maximum(exponent, Real(-1e4f));
}

// The statistics of some columns of a row.
template <class Real>
struct Partial {
  Real m, s, t;
};

// Returns the statistics of the columns of `a` and `b` together.
template <class Real>
BUPO_HD Partial<Real> merge(const Partial<Real>& a, const Partial<Real>& b) {
  const Real m = maximum(a.m, b.m);
  const Real shift_a = floored(a.m - m), shift_b = floored(b.m - m);  // one of them is 0
  const Real scale_a = exponential(shift_a), scale_b = exponential(shift_b);
  return {m, scale_a * a.s + scale_b * b.s, scale_a * (a.t + shift_a * a.s) + scale_b * (b.t + shift_b * b.s)};
}

// Returns dz_j for j ≠ y from x = z_j − m and e = e^x. The constant and the slope are `Coefficients` of
// bupo_kernels/backends/algebra.py.
template <class Real>
BUPO_HD Real logit_gradient(Real x, Real e, Real constant, Real slope) {
  return e * (constant - slope * floored(x));
}

}  // namespace bupo
