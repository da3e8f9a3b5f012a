// Every kernel of csrc/cpu/kernels.h on random data, beside a plain oracle in float64: for machines that have no Python, like an
// emulated ARM, and for instruction sets that no machine at hand has. tests/kernel_program.py builds it.
//
//   check_kernels [name of an instruction set]...     all that this machine runs; of those that are named, each must be one
//
// Bounds are those of bupo_kernels/numerics.py. What is printed is how much of its bound the worst number of a kernel took.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "fp16.h"

namespace bupo::cpu {
#ifdef BUPO_EMULATED
const Kernels& kernels_emulated_amx();
const Kernels& kernels_emulated_avx512_bf16();
#endif
}  // namespace bupo::cpu

namespace {

using namespace bupo::cpu;
using i64 = std::int64_t;

constexpr double single = 1.0 / (1 << 23), infinity = std::numeric_limits<double>::infinity();
constexpr float lowest = -3.402823466e38f, sentinel = 7.0f;

double contract(double largest) { return 2e-6 * (1 + largest); }
i64 up(i64 count) { return (count + 31) / 32 * 32; }

// ---- what is found

struct Findings {
  std::vector<std::pair<std::string, double>> worst;  // of each kernel, in parts of its bound
  int failures = 0;

  void add(const char* kernel, double part, const char* what, i64 row, i64 column, double got, double exact) {
    auto at = std::find_if(worst.begin(), worst.end(), [&](const auto& found) { return found.first == kernel; });
    if (at == worst.end()) at = worst.insert(at, {kernel, 0.0});
    at->second = std::max(at->second, part);
    if (!(part <= 1) && failures++ < 10)
      std::printf("  %s: %s[%ld, %ld] is %.9g, expected %.9g, %.3g times the bound\n", kernel, what, long(row), long(column), got,
                  exact, part);
  }
};
Findings findings;

void is_near(const char* kernel, const char* what, i64 row, i64 column, double got, double exact, double bound) {
  const bool same = got == exact || (std::isnan(got) && std::isnan(exact));
  const double part = same ? 0.0 : std::abs(got - exact) / bound;
  findings.add(kernel, std::isnan(part) ? infinity : part, what, row, column, got, exact);
}
void is_equal(const char* kernel, const char* what, i64 row, i64 column, double got, double exact) {
  is_near(kernel, what, row, column, got, exact, 0.0);
}
template <class T>
void is_same(const char* kernel, const char* what, const std::vector<T>& got, const std::vector<T>& expected) {
  const bool same = got.size() == expected.size() && std::memcmp(got.data(), expected.data(), got.size() * sizeof(T)) == 0;
  findings.add(kernel, same ? 0.0 : infinity, what, 0, 0, same, 1);
}

// ---- data

struct Random {
  std::uint64_t state;

  double uniform() {  // SplitMix64
    std::uint64_t z = state += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u, z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return double((z ^ (z >> 31)) >> 11) / 9007199254740992.0;
  }
  double normal() {
    double sum = -6;
    for (int i = 0; i < 12; i++) sum += uniform();
    return sum;
  }
  i64 below(i64 n) { return i64(uniform() * double(n)); }
};

Bf16 to_bf16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return Bf16((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
double to_double(Bf16 x) {
  const std::uint32_t bits = std::uint32_t(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
double to_double(Fp16 x) { return fp16_to_double(x.bits); }
double to_double(float x) { return x; }

// A matrix of bf16 or fp16 whose rows are `stride` apart, in memory that ends with its last element.
struct Operand {
  i64 rows, width, stride;
  Dtype dtype;
  std::vector<std::uint16_t> bits;

  Operand(i64 rows, i64 width, i64 gap, Dtype dtype, double scale, Random& random)
      : rows(rows), width(width), stride(width + gap), dtype(dtype), bits(std::size_t((rows - 1) * stride + width)) {
    for (std::uint16_t& x : bits) {
      const double value = scale * random.normal();
      x = dtype == Dtype::fp16 ? double_to_fp16(value) : to_bf16(float(value));
    }
  }
  double at(i64 row, i64 k) const {
    const std::uint16_t x = bits[std::size_t(row * stride + k)];
    return dtype == Dtype::fp16 ? fp16_to_double(x) : to_double(x);
  }
  Matrix matrix() const { return {bits.data(), stride, rows, width, dtype}; }
};

std::vector<float> floats(i64 count, Random& random, double scale = 1.0) {
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& value : x) value = float(scale * random.normal());
  return x;
}

struct Dense {
  i64 rows, columns;
  std::vector<double> values;

  Dense(i64 rows, i64 columns) : rows(rows), columns(columns), values(std::size_t(rows * columns)) {}
  double& at(i64 i, i64 j) { return values[std::size_t(i * columns + j)]; }
  double at(i64 i, i64 j) const { return values[std::size_t(i * columns + j)]; }
};

enum Kind { identity, affine, softcap };

// A readout with its memory, and what it means.
struct Reading {
  std::vector<float> bias, outer;
  float inner = 1.0f;
  bool bends = false;

  Reading(Kind kind, i64 rows, i64 columns, Random& random) {
    if (kind == identity) return;
    bias = floats(columns, random, 0.5), inner = 0.7f, bends = kind == softcap;
    outer.assign(std::size_t(up(rows)), 1.0f);
    for (i64 row = 0; row < rows; row++) outer[std::size_t(row)] = float(0.5 + random.uniform()) * (bends ? 5.0f : 1.0f);
    if (kind == affine && columns > 3) bias[1] = -HUGE_VALF;  // a column that cannot be chosen
  }
  // Returns that of the rows from `first` on.
  Reading from(i64 first) const {
    Reading some = *this;
    if (!outer.empty()) some.outer.erase(some.outer.begin(), some.outer.begin() + first), some.outer.resize(outer.size(), 1.0f);
    return some;
  }
  Readout readout(i64 first = 0) const {
    return {bias.empty() ? nullptr : bias.data() + first, outer.empty() ? nullptr : outer.data(), inner, bends};
  }
  double outer_of(i64 row) const { return outer.empty() ? 1.0 : outer[std::size_t(row)]; }
  double logit(double product, i64 row, i64 column, double* bend = nullptr) const {
    if (bias.empty()) return product;
    double x = (product + bias[std::size_t(column)]) * inner;
    if (bends) {
      x = std::tanh(x);
      if (bend) *bend = 1 - x * x;
    }
    return x * outer_of(row);
  }
};

// Logits of rows and all that is known of them.
struct Logits {
  Dense z, bend;
  std::vector<double> m, largest, lse, entropy;

  Logits(const Dense& products, const Reading& reading)
      : z(products.rows, products.columns), bend(products.rows, products.columns) {
    for (i64 r = 0; r < z.rows; r++) {
      double most = -infinity, size = 0, sum = 0, mean = 0;
      for (i64 c = 0; c < z.columns; c++) {
        bend.at(r, c) = 1;
        const double x = z.at(r, c) = reading.logit(products.at(r, c), r, c, &bend.at(r, c));
        most = std::max(most, x);
        if (std::isfinite(x)) size = std::max(size, std::abs(x));
      }
      for (i64 c = 0; c < z.columns; c++) {
        const double x = z.at(r, c) - most, e = std::exp(x);
        sum += e, mean += e == 0 ? 0 : e * x;
      }
      m.push_back(most), largest.push_back(size), lse.push_back(most + std::log(sum)),
          entropy.push_back(std::log(sum) - mean / sum);
    }
  }
  double log_p(i64 r, i64 c) const { return z.at(r, c) - lse[std::size_t(r)]; }
  double error(i64 r) const { return 8 * contract(largest[std::size_t(r)]); }  // of log p, and of p relative to it
};

Dense product(const Operand& a, const Operand& b) {  // a bᵀ
  Dense c(a.rows, b.rows);
  for (i64 i = 0; i < a.rows; i++)
    for (i64 j = 0; j < b.rows; j++)
      for (i64 k = 0; k < a.width; k++) c.at(i, j) += a.at(i, k) * b.at(j, k);
  return c;
}

std::vector<std::int32_t> targets_of(i64 rows, i64 columns, Random& random) {
  std::vector<std::int32_t> targets(std::size_t(up(rows)), -1);
  for (i64 r = 0; r < rows; r++) targets[std::size_t(r)] = std::int32_t(random.below(columns));
  return targets;
}

// Holds statistics and the logits of targets, [4, rows], against the exact ones.
void check_statistics(const char* kernel, const std::vector<float>& found, i64 rows, const Logits& exact,
                      const std::vector<std::int32_t>& targets) {
  for (i64 r = 0; r < rows; r++) {
    const auto i = std::size_t(r);
    const double m = found[i], s = found[std::size_t(rows) + i], t = found[std::size_t(2 * rows) + i];
    const double bound = contract(exact.largest[i]);
    is_near(kernel, "logsumexp", r, 0, m + std::log(s), exact.lse[i], bound);
    is_near(kernel, "entropy", r, 0, std::log(s) - t / s, exact.entropy[i], bound * 2 * (1 + std::log(double(exact.z.columns))));
    is_near(kernel, "z_y", r, 0, found[std::size_t(3 * rows) + i], exact.z.at(r, targets[i]), bound);
  }
}

// The coefficients of a gradient with their memory, and dz of the logits with its bound.
struct Gradient {
  std::vector<float> m, constant, slope, on_target;
  std::vector<std::int32_t> targets;

  Gradient(const Logits& exact, bool with_slope, const std::vector<std::int32_t>& targets, Random& random) : targets(targets) {
    const i64 rows = exact.z.rows, padded = up(rows);
    for (auto* x : {&m, &constant, &slope, &on_target}) x->assign(std::size_t(padded), 0.0f);
    for (i64 r = 0; r < rows; r++) {
      const auto i = std::size_t(r);
      m[i] = float(exact.lse[i]), constant[i] = float(random.normal()), on_target[i] = float(random.normal());
      slope[i] = with_slope ? float(random.normal()) : 0.0f;
    }
    if (!with_slope) slope.clear();
  }
  // Returns those of the rows from `first` on.
  Gradient from(i64 first) const {
    Gradient some = *this;
    for (auto* x : {&some.m, &some.constant, &some.slope, &some.on_target})
      if (!x->empty()) x->erase(x->begin(), x->begin() + first), x->resize(x->size() + std::size_t(first), 0.0f);
    some.targets.erase(some.targets.begin(), some.targets.begin() + first), some.targets.resize(targets.size(), -1);
    return some;
  }
  Coefficients coefficients() const {
    return {m.data(), constant.data(), slope.empty() ? nullptr : slope.data(), on_target.data(), targets.data()};
  }
  // Returns dz, and leaves its bound but for the rounding of what is stored.
  Dense exact(const Logits& logits, Dense& bound) const {
    Dense dz(logits.z.rows, logits.z.columns);
    for (i64 r = 0; r < dz.rows; r++)
      for (i64 c = 0; c < dz.columns; c++) {
        const auto i = std::size_t(r);
        const double x = logits.z.at(r, c) - m[i], e = std::exp(x), bend = logits.bend.at(r, c), b = logits.error(r);
        const double a = constant[i], k = slope.empty() ? 0.0 : slope[i];
        const bool hit = targets[i] == c;
        const double d = hit ? on_target[i] : e == 0 ? 0.0 : e * (a - k * x);
        double error = hit || e == 0 ? 0.0 : e * b * (std::abs(a) + std::abs(k) * (std::abs(x) + 1)) * bend;
        if (bend != 1) error += std::abs(d) * (b * bend + 8 * single);
        dz.at(r, c) = d * bend, bound.at(r, c) = error + single * std::abs(d * bend) + 1e-37;
      }
    return dz;
  }
};

struct Shape {
  i64 rows, columns, width;
};

// ---- the products of packed panels

void check_products(const Kernels& k, Shape shape, Dtype dtype, int threads, Random& random) {
  const Operand hidden(shape.rows, shape.width, 0, dtype, 1.0, random), weight(shape.columns, shape.width, 3, dtype, 1.0, random);
  std::vector<Word> left(std::size_t(k.packed_words(shape.rows, shape.width)));
  std::vector<Word> right(std::size_t(k.packed_words(shape.columns, shape.width)));
  k.pack_left(hidden.matrix(), left.data(), threads), k.pack_rows(weight.matrix(), right.data(), threads);
  const i64 stride = shape.columns + 5;
  std::vector<float> out(std::size_t(shape.rows * stride), sentinel);
  std::vector<char> workspace(std::size_t(k.workspace_bytes(0, threads)));
  k.linear_products(left.data(), shape.rows, right.data(), shape.columns, shape.width, out.data(), stride, workspace.data(),
                    threads);
  for (i64 r = 0; r < shape.rows; r++) {
    for (i64 c = 0; c < shape.columns; c++) {
      double exact = 0, sum = 0;
      for (i64 i = 0; i < shape.width; i++) {
        const double x = hidden.at(r, i) * weight.at(c, i);
        exact += x, sum += std::abs(x);
      }
      is_near("linear_products", "z", r, c, out[std::size_t(r * stride + c)], exact, double(shape.width) * single * sum);
    }
    for (i64 c = shape.columns; c < stride; c++)
      is_equal("linear_products", "beyond", r, c, out[std::size_t(r * stride + c)], sentinel);
  }
}

std::vector<float> statistics_of(const Kernels& k, const Operand& hidden, const Operand& weight, Readout readout,
                                 const std::vector<std::int32_t>& targets, int threads, Kept<float> kept = {}) {
  const i64 rows = hidden.rows;
  std::vector<Word> packed(std::size_t(k.packed_words(rows, hidden.width)));
  k.pack_rows(hidden.matrix(), packed.data(), threads);
  std::vector<char> workspace(std::size_t(k.statistics_bytes(rows, weight.rows, hidden.width, threads)));
  std::vector<float> out(std::size_t(4 * rows));
  float* at = out.data();
  k.linear_statistics(packed.data(), rows, weight.matrix(), readout, targets.data(), {at, at + rows, at + 2 * rows, at + 3 * rows},
                      kept, workspace.data(), threads);
  return out;
}

void check_linear(const Kernels& k, Shape shape, Dtype dtype, Kind kind, bool with_slope, int threads, Random& random) {
  const auto [rows, columns, width] = shape;
  const Operand weight(columns, width, 3, dtype, 2 / std::sqrt(double(width)), random);
  Operand hidden(rows, width, 0, dtype, 1.0, random);
  const Reading reading(kind, rows, columns, random);
  const Logits exact(product(hidden, weight), reading);
  const auto targets = targets_of(rows, columns, random);
  const auto statistics = statistics_of(k, hidden, weight, reading.readout(), targets, threads);
  check_statistics("linear_statistics", statistics, rows, exact, targets);
  is_same("linear_statistics", "with other threads", statistics_of(k, hidden, weight, reading.readout(), targets, 4 - threads),
          statistics);

  // Products that are kept of the first panels of tokens, in blocks that begin on lines of the cache.
  const i64 panels = up(rows) / 32, most = (panels + 1) / 2;
  std::vector<float> memory(std::size_t(up(columns) * up(rows)) + 16, sentinel);
  void* aligned = memory.data();
  std::size_t bytes = memory.size() * sizeof(float);
  float* blocks_kept = static_cast<float*>(std::align(64, bytes - 64, aligned, bytes));
  const Kept<float> kept{blocks_kept, most, panels}, all{blocks_kept, panels, panels};
  is_same("linear_statistics", "beside what is kept", statistics_of(k, hidden, weight, reading.readout(), targets, threads, kept),
          statistics);
  if (panels > most) is_equal("linear_statistics", "kept beyond", 0, 0, blocks_kept[most * 1024], sentinel);
  statistics_of(k, hidden, weight, reading.readout(), targets, threads, all);

  // dz, as the operands of the two products that follow.
  const Gradient gradient(exact, with_slope, targets, random);
  Dense bound(rows, columns);
  const Dense dz = gradient.exact(exact, bound);
  const bool stores_bf16 = k.packed_words(32, 32) == 512;
  const auto rounded = [&](i64 r, i64 c) {
    return bound.at(r, c) + (stores_bf16 ? std::abs(dz.at(r, c)) / 256 + 1e-38 : 0.0);  // half an eps of bf16
  };
  std::vector<Word> by_width(std::size_t(k.packed_words(rows, width))), by_rows(std::size_t(k.packed_words(width, up(rows))));
  k.pack_rows(hidden.matrix(), by_width.data(), threads), k.pack_columns(hidden.matrix(), by_rows.data(), threads);
  std::vector<char> workspace(std::size_t(std::max(k.workspace_bytes(width, threads), k.workspace_bytes(up(columns), threads))));
  std::vector<Word> left(std::size_t(k.packed_words(columns, up(rows)))), right(std::size_t(k.packed_words(rows, up(columns))));
  std::vector<float> sums(std::size_t(columns), sentinel);
  k.linear_gradient(by_width.data(), rows, weight.matrix(), reading.readout(), gradient.coefficients(), {}, nullptr, left.data(),
                    right.data(), sums.data(), workspace.data(), threads);
  // What was kept says the same, where it lies and where the kernel has to look for it.
  for (const i64 first : {i64(0), i64(1)}) {
    std::vector<std::int32_t> sources(std::size_t(up(rows)), -1);
    for (i64 r = first; r < rows; r++) sources[std::size_t(r - first)] = std::int32_t(r);
    const i64 here = rows - first;
    if (here == 0) continue;
    std::vector<Word> some_left(std::size_t(k.packed_words(columns, up(here))));
    std::vector<Word> some_right(std::size_t(k.packed_words(here, up(columns))));
    std::vector<Word> left_again(some_left), right_again(some_right);
    std::vector<float> from_kept(sums), from_products(sums);
    Operand some(here, width, 0, dtype, 1.0, random);
    std::copy(hidden.bits.begin() + first * width, hidden.bits.end(), some.bits.begin());
    std::vector<Word> some_by_width(std::size_t(k.packed_words(here, width)));
    k.pack_rows(some.matrix(), some_by_width.data(), threads);
    const Gradient shifted = gradient.from(first);
    const Reading moved = reading.from(first);
    k.linear_gradient(some_by_width.data(), here, weight.matrix(), moved.readout(), shifted.coefficients(), {}, nullptr,
                      left_again.data(), right_again.data(), from_products.data(), workspace.data(), threads);
    k.linear_gradient(nullptr, here, weight.matrix(), moved.readout(), shifted.coefficients(), {all.blocks, all.panels, all.stride},
                      sources.data(), some_left.data(), some_right.data(), from_kept.data(), workspace.data(), threads);
    is_same("linear_gradient", "dz for dW from what was kept", some_left, left_again);
    is_same("linear_gradient", "dz for dH from what was kept", some_right, right_again);
    is_same("linear_gradient", "sums from what was kept", from_kept, from_products);
  }
  for (i64 c = 0; c < columns; c++) {
    double sum = 0, sizes = 0, error = 0;
    for (i64 r = 0; r < rows; r++) sum += dz.at(r, c), sizes += std::abs(dz.at(r, c)), error += bound.at(r, c);
    is_near("linear_gradient", "column_sums", c, 0, sums[std::size_t(c)], sum, error + double(rows) * single * sizes);
  }

  const i64 stride = width + 2;
  const auto before = floats(columns * stride, random);
  std::vector<float> to_write(before), to_add(before);
  const bool fp16 = dtype == Dtype::fp16;
  const std::uint16_t untouched = fp16 ? double_to_fp16(sentinel) : to_bf16(sentinel);
  const auto rounded_to = [&](std::uint16_t x) { return fp16 ? fp16_to_double(x) : to_double(x); };
  const double half_an_eps = fp16 ? 1.0 / 2048 : 1.0 / 256;
  std::vector<std::uint16_t> in_16_bit(std::size_t(columns * stride), untouched);
  k.weight_gradient(left.data(), columns, by_rows.data(), rows, width, to_write.data(), stride, Write::fp32, workspace.data(),
                    threads);
  k.weight_gradient(left.data(), columns, by_rows.data(), rows, width, to_add.data(), stride, Write::add_to_fp32, workspace.data(),
                    threads);
  k.weight_gradient(left.data(), columns, by_rows.data(), rows, width, in_16_bit.data(), stride, fp16 ? Write::fp16 : Write::bf16,
                    workspace.data(), threads);
  for (i64 c = 0; c < columns; c++)
    for (i64 i = 0; i < stride; i++) {
      const auto at = std::size_t(c * stride + i);
      if (i >= width) {
        is_equal("weight_gradient", "beyond", c, i, to_write[at], before[at]);
        is_equal("weight_gradient", "beyond", c, i, to_add[at], before[at]);
        is_equal("weight_gradient", "beyond", c, i, rounded_to(in_16_bit[at]), sentinel);
        continue;
      }
      double sum = 0, error = 0;
      for (i64 r = 0; r < rows; r++) {
        const double h = hidden.at(r, i);
        sum += dz.at(r, c) * h;
        error += (rounded(r, c) + double(rows) * single * std::abs(dz.at(r, c))) * std::abs(h);
      }
      is_near("weight_gradient", "fp32", c, i, to_write[at], sum, error);
      is_near("weight_gradient", "added", c, i, to_add[at], before[at] + sum,
              error + single * (std::abs(before[at]) + std::abs(sum)));
      is_near("weight_gradient", "16 bit", c, i, rounded_to(in_16_bit[at]), sum,
              error * (1 + 1.0 / 128) + std::abs(sum) * half_an_eps + (fp16 ? 0x1p-25 : 0.0));
    }

  // Twice, as over two slices of the vocabulary.
  std::vector<float> blocks(std::size_t(up(rows) * up(width))), d_hidden(std::size_t(rows * stride), sentinel);
  k.hidden_gradient(right.data(), rows, weight.matrix(), blocks.data(), false, workspace.data(), threads);
  k.hidden_gradient(right.data(), rows, weight.matrix(), blocks.data(), true, workspace.data(), threads);
  k.unpack_hidden(blocks.data(), rows, width, d_hidden.data(), stride, threads);
  for (i64 r = 0; r < rows; r++)
    for (i64 i = 0; i < stride; i++) {
      const double got = d_hidden[std::size_t(r * stride + i)];
      if (i >= width) {
        is_equal("hidden_gradient", "beyond", r, i, got, sentinel);
        continue;
      }
      double sum = 0, error = 0;
      for (i64 c = 0; c < columns; c++) {
        const double w = weight.at(c, i);
        sum += dz.at(r, c) * w;
        error += (rounded(r, c) + double(columns) * single * std::abs(dz.at(r, c))) * std::abs(w);
      }
      is_near("hidden_gradient", "fp32", r, i, got, 2 * sum, 2 * error + single * std::abs(sum));
    }

  // A NaN is in every statistic of its row, and of no other.
  hidden.bits[0] = fp16 ? 0x7e00 : 0x7fc0;
  const auto with_nan = statistics_of(k, hidden, weight, reading.readout(), targets, threads);
  for (i64 r = 0; r < rows; r++) {
    const auto at = std::size_t(rows + r);
    is_equal("linear_statistics", "s with a NaN", r, 0, with_nan[at], r == 0 ? NAN : statistics[at]);
  }
}

// ---- rows that a library's product left

Dense random_products(i64 rows, i64 columns, std::vector<float>& memory, Random& random) {
  memory = floats(rows * columns, random, 3.0);
  Dense exact(rows, columns);
  for (i64 i = 0; i < rows * columns; i++) exact.values[std::size_t(i)] = memory[std::size_t(i)];
  return exact;
}

void check_rows(const Kernels& k, i64 rows, i64 columns, Kind kind, int threads, Random& random) {
  std::vector<float> memory;
  const Reading reading(kind, rows, columns, random);
  const Logits exact(random_products(rows, columns, memory, random), reading);
  const auto targets = targets_of(rows, columns, random);
  const std::vector<float> products(memory);
  std::vector<float> found(std::size_t(4 * rows), 0.0f);
  std::fill_n(found.begin(), rows, -HUGE_VALF);
  float* at = found.data();
  const i64 part = (columns + 1) / 2;
  for (i64 first = 0; first < columns; first += part)
    k.row_statistics(memory.data() + first, columns, rows, std::min(part, columns - first), first, reading.readout(first),
                     targets.data(), {at, at + rows, at + 2 * rows, at + 3 * rows}, threads);
  check_statistics("row_statistics", found, rows, exact, targets);
  for (i64 r = 0; r < rows; r++)
    for (i64 c = 0; c < columns; c++)
      is_near("row_statistics", "z", r, c, memory[std::size_t(r * columns + c)], exact.z.at(r, c),
              contract(exact.largest[std::size_t(r)]));

  const Gradient gradient(exact, true, targets, random);
  Dense bound(rows, columns);
  const Dense dz = gradient.exact(exact, bound);
  for (const bool formed : {true, false}) {
    std::vector<float> out(std::size_t(rows * columns), sentinel);
    k.row_gradient((formed ? memory : products).data(), columns, rows, columns, reading.readout(), formed, gradient.coefficients(),
                   out.data(), threads);
    for (i64 r = 0; r < rows; r++)
      for (i64 c = 0; c < columns; c++)
        is_near("row_gradient", formed ? "of logits" : "of products", r, c, out[std::size_t(r * columns + c)], dz.at(r, c),
                bound.at(r, c));
  }
}

// ---- the policies of a lens

double lens_bound(const Logits& p, const Logits& q, i64 r) { return std::max(p.error(r), q.error(r)); }

void check_lens(const Kernels& k, i64 policies, i64 tokens, i64 columns, Kind kind, bool pairs, int threads, Random& random) {
  const Reading reading(kind, tokens, columns, random);
  const auto targets = targets_of(tokens, columns, random);
  const i64 top_k = std::min<i64>(4, columns), stride = tokens + 1, part = (columns + 1) / 2;
  std::vector<std::vector<float>> memory(static_cast<std::size_t>(policies));
  std::vector<Logits> exact;
  for (auto& x : memory) exact.emplace_back(random_products(tokens, columns, x, random), reading);

  std::vector<float> found(std::size_t(4 * policies * stride), 0.0f), cross(std::size_t(tokens * policies * policies), 0.0f);
  std::fill_n(found.begin(), policies * stride, -HUGE_VALF);
  std::vector<i64> argmax(std::size_t(policies * stride), -1), top_ids(std::size_t(policies * stride * top_k)),
      rank(argmax.size(), 0);
  std::vector<float> top_z(top_ids.size()), log_s(argmax.size()), jsd(argmax.size(), 0.0f);
  const auto row = [&](int i) { return found.data() + i * policies * stride; };
  const LensStatistics running{row(0),       row(1), row(2),       row(3),         stride, argmax.data(),
                               cross.data(), pairs,  top_z.data(), top_ids.data(), top_k};
  std::vector<std::vector<float>> parts;  // [policies, tokens, columns of the part], logits after the first pass
  for (i64 first = 0; first < columns; first += part) {
    const i64 here = std::min(part, columns - first);
    std::vector<float> products, scratch(std::size_t(policies * tokens * here));
    for (const auto& of_policy : memory)
      for (i64 t = 0; t < tokens; t++)
        for (i64 c = 0; c < here; c++) products.push_back(of_policy[std::size_t(t * columns + first + c)]);
    k.lens_statistics(products.data(), pairs ? scratch.data() : nullptr, policies, tokens, here, first, reading.readout(first),
                      targets.data(), running, threads);
    parts.push_back(products);
  }
  for (std::size_t i = 0; i < log_s.size(); i++) log_s[i] = std::log(row(1)[i]);
  for (std::size_t i = 0; i < parts.size(); i++) {
    const i64 first = i64(i) * part;
    k.lens_comparison(parts[i].data(), policies, tokens, std::min(part, columns - first), reading.readout(first), true, running,
                      {log_s.data(), rank.data(), jsd.data()}, threads);
  }

  for (i64 p = 0; p < policies; p++) {
    std::vector<float> statistics;
    for (int i = 0; i < 4; i++) statistics.insert(statistics.end(), row(i) + p * stride, row(i) + p * stride + tokens);
    const Logits& own = exact[std::size_t(p)];
    check_statistics("lens_statistics", statistics, tokens, own, targets);
    for (i64 t = 0; t < tokens; t++) {
      // Ids and ranks follow exactly from the logits that were left.
      std::vector<std::pair<float, i64>> order;
      for (i64 c = 0; c < columns; c++) {
        const i64 first = c / part * part, here = std::min(part, columns - first);
        const float z = parts[std::size_t(c / part)][std::size_t((p * tokens + t) * here + c - first)];
        is_near("lens_statistics", "z", t, c, z, own.z.at(t, c), contract(own.largest[std::size_t(t)]));
        order.emplace_back(-z, c);
      }
      std::sort(order.begin(), order.end());
      const auto at = std::size_t(p * stride + t);
      is_equal("lens_statistics", "argmax", p, t, double(argmax[at]), double(order[0].second));
      std::vector<std::pair<float, i64>> top;
      for (i64 i = 0; i < top_k; i++) {
        const auto entry = at * std::size_t(top_k) + std::size_t(i);
        top.emplace_back(-top_z[entry], top_ids[entry]);
      }
      std::sort(top.begin(), top.end());
      for (std::size_t i = 0; i < top.size(); i++) {
        is_equal("lens_statistics", "top z", p, t, top[i].first, order[i].first);
        is_equal("lens_statistics", "top ids", p, t, double(top[i].second), double(order[i].second));
      }
      const float z_y = statistics[std::size_t(3 * tokens + t)];
      const auto above = std::count_if(order.begin(), order.end(), [&](const auto& x) { return -x.first > z_y; });
      is_equal("lens_comparison", "rank", p, t, double(rank[at]), double(above));

      for (i64 q = 0; q < policies; q++) {
        if (pairs ? false : (p == policies - 1) == (q == policies - 1)) continue;
        const Logits& other = exact[std::size_t(q)];
        const auto i = std::size_t(t);
        double sum = 0, error = 0;
        for (i64 c = 0; c < columns; c++) {
          const double e = std::exp(own.z.at(t, c) - own.m[i]), x = other.z.at(t, c) - other.m[i];
          if (e == 0) continue;
          sum += e * x, error += e * lens_bound(own, other, t) * (1 + std::abs(x));
        }
        is_near("lens_statistics", "cross", p * policies + q, t, cross[std::size_t((t * policies + p) * policies + q)], sum, error);
      }
      if (p == policies - 1) continue;
      const Logits& last = exact.back();
      double sum = 0, error = 0;
      for (i64 c = 0; c < columns; c++) {
        const double a = own.log_p(t, c), b = last.log_p(t, c);
        if (std::isinf(a) && std::isinf(b)) continue;
        const double x = std::exp(a), y = std::exp(b), mixture = std::log((x + y) / 2);
        sum += (x * (a - mixture) + y * (b - mixture)) / 2;
        error += lens_bound(own, last, t) * (x + y) * (1 + std::abs(a - b));
      }
      is_near("lens_comparison", "jsd", p, t, jsd[at], sum, error);
    }
  }
}

// ---- divergences

void check_divergence(const Kernels& k, i64 rows, i64 columns, double beta, Kind kind, int threads, Random& random) {
  const i64 stride = columns + 1;
  Reading readings[2] = {{kind, rows, columns, random}, {kind, rows, columns, random}};
  std::vector<Logits> exact;
  std::vector<float> memory[2];
  for (int side = 0; side < 2; side++) {
    if (kind == affine && columns > 3) readings[side].bias[1] = 0.1f;
    std::vector<float> products;
    exact.emplace_back(random_products(rows, columns, products, random), readings[side]);
    memory[side].assign(std::size_t(rows * stride), sentinel);
    for (i64 r = 0; r < rows; r++) std::copy_n(products.begin() + r * columns, columns, memory[side].begin() + r * stride);
  }
  const auto g = floats(rows, random), g_h = floats(rows, random);
  std::vector<float> divergence(std::size_t(rows), sentinel), entropy(divergence);
  k.row_divergence({memory[0].data(), stride, true, readings[0].readout()}, {memory[1].data(), stride, true, readings[1].readout()},
                   rows, columns, float(beta), g.data(), g_h.data(), divergence.data(), entropy.data(), threads);
  const double b = double(float(beta));
  for (i64 r = 0; r < rows; r++) {
    const auto i = std::size_t(r);
    const double error = lens_bound(exact[0], exact[1], r);
    double kl_p = 0, kl_q = 0, spent = 0;
    const auto compared = [&](i64 c) {  // p, q, and how far each is ahead of what it is compared with
      const double log_p = exact[0].log_p(r, c), log_q = exact[1].log_p(r, c), p = std::exp(log_p), q = std::exp(log_q);
      const double mixture = b * q + (1 - b) * p;
      const bool kl = b == 0 || b == 1;
      return std::vector<double>{p, q, log_p - (kl ? log_q : std::log(mixture)), log_q - (kl ? log_p : std::log(mixture)),
                                 std::abs(log_p - log_q)};
    };
    for (i64 c = 0; c < columns; c++) {
      const auto at = compared(c);
      kl_p += at[0] * at[2], kl_q += at[1] * at[3], spent += error * (at[0] + at[1]) * (1 + at[4]);
    }
    const double value = b == 0 ? kl_q : b == 1 ? kl_p : b * kl_q + (1 - b) * kl_p;
    is_near("row_divergence", "divergence", r, 0, divergence[i], value, spent);
    is_near("row_divergence", "entropy", r, 0, entropy[i], exact[0].entropy[i], error * (1 + std::log(double(columns))));
    for (i64 c = 0; c < columns; c++) {
      const auto at = compared(c);
      const double p = at[0], q = at[1], spread = 1 + at[4] + std::abs(value), log_p = exact[0].log_p(r, c);
      const double dz =
          g[i] * (b == 0 ? p - q : (b == 1 ? 1 : 1 - b) * p * (at[2] - kl_p)) - g_h[i] * p * (log_p + exact[0].entropy[i]);
      const double du = g[i] * (b == 1 ? q - p : (b == 0 ? 1 : b) * q * (at[3] - kl_q));
      const double of_entropy = p * std::abs(g_h[i]) * (2 + exact[0].entropy[i] + std::abs(log_p + exact[0].entropy[i]));
      for (int side = 0; side < 2; side++) {
        const double bend = exact[std::size_t(side)].bend.at(r, c), factor = readings[side].inner * readings[side].outer_of(r);
        const double d = side ? du : dz;
        double bound = error * (std::abs(g[i]) * (p + q) * spread + (side ? 0 : of_entropy)) * bend;
        bound += single * std::abs(d) * bend + (bend != 1 ? std::abs(d) * (error * bend + 8 * single) : 0.0);
        is_near("row_divergence", side ? "du" : "dz", r, c, memory[side][std::size_t(r * stride + c)], d * bend * factor,
                bound * std::abs(factor) + 1e-37);
      }
    }
    for (const auto& of_side : memory)
      if (r + 1 < rows) is_equal("row_divergence", "beyond", r, columns, of_side[std::size_t(r * stride + columns)], sentinel);
  }
}

// ---- supports

template <class T>
std::vector<T> numbers(i64 count, Random& random);
template <>
std::vector<float> numbers(i64 count, Random& random) {
  return floats(count, random);
}
template <>
std::vector<Bf16> numbers(i64 count, Random& random) {
  std::vector<Bf16> x;
  for (const float value : floats(count, random)) x.push_back(to_bf16(value));
  return x;
}

template <>
std::vector<Fp16> numbers(i64 count, Random& random) {
  std::vector<Fp16> x;
  for (const float value : floats(count, random)) x.push_back({double_to_fp16(value)});
  return x;
}

template <class T>
void check_supports(const Kernels& k, i64 width, int threads, Random& random) {
  constexpr bool fp16 = std::is_same_v<T, Fp16>, sixteen_bit = sizeof(T) == 2;
  constexpr Dtype dtype = fp16 ? Dtype::fp16 : sixteen_bit ? Dtype::bf16 : Dtype::fp32;
  const char* name = fp16 ? "fp16" : sixteen_bit ? "bf16" : "fp32";
  constexpr i64 lefts = 9, rights = 21, entries = 150, segments = 5;
  const i64 stride = width + 3;
  const auto left = numbers<T>(lefts * stride, random), right = numbers<T>(rights * stride, random);
  std::vector<i64> left_rows, right_rows, offsets{0, 0, 3, 120, 121, entries}, places{3, 0, 4, 1, 2};
  for (i64 e = 0; e < entries; e++) left_rows.push_back(random.below(lefts)), right_rows.push_back(random.below(rights));
  std::vector<float> dots(entries, sentinel);
  const Rows a{left.data(), stride, width, dtype}, b{right.data(), stride, width, dtype};
  k.gathered_dots(a, left_rows.data(), b, right_rows.data(), entries, dots.data(), threads);
  for (i64 e = 0; e < entries; e++) {
    double sum = 0, sizes = 0;
    for (i64 i = 0; i < width; i++) {
      const double x = to_double(left[std::size_t(left_rows[std::size_t(e)] * stride + i)]) *
                       to_double(right[std::size_t(right_rows[std::size_t(e)] * stride + i)]);
      sum += x, sizes += std::abs(x);
    }
    is_near("gathered_dots", name, e, 0, dots[std::size_t(e)], sum, double(width) * single * sizes);
  }

  const auto factors = floats(entries, random);
  std::vector<T> out(std::size_t(segments * width));
  k.gathered_sums(factors.data(), b, right_rows.data(), offsets.data(), segments, out.data(), places.data(), threads);
  for (i64 s = 0; s < segments; s++)
    for (i64 i = 0; i < width; i++) {
      double sum = 0, sizes = 0;
      for (i64 e = offsets[std::size_t(s)]; e < offsets[std::size_t(s + 1)]; e++) {
        const double x = factors[std::size_t(e)] * to_double(right[std::size_t(right_rows[std::size_t(e)] * stride + i)]);
        sum += x, sizes += std::abs(x);
      }
      const double bound = double(entries) * single * sizes;
      const double rounding = !sixteen_bit ? 0.0 : fp16 ? std::abs(sum) / 2048 + 0x1p-25 : std::abs(sum) / 256;
      is_near("gathered_sums", name, s, i, to_double(out[std::size_t(places[std::size_t(s)] * width + i)]), sum,
              bound * (1 + 1.0 / 128) + rounding);
    }
}

void check(const Kernels& k) {
  Random random{27};
  int threads = 1;
  const auto next = [&] { return threads = 4 - threads; };  // 1 and 3 in turn
  for (const Shape shape : {Shape{1, 1, 1}, Shape{5, 70, 3}, Shape{33, 97, 34}, Shape{70, 260, 65}})
    for (const Kind kind : {identity, affine, softcap})
      for (const Dtype dtype : {Dtype::bf16, Dtype::fp16}) {
        if (dtype == Dtype::fp16 && k.multiplies_bf16) continue;
        check_linear(k, shape, dtype, kind, kind != identity, next(), random);
        check_products(k, shape, dtype, next(), random);
      }
  check_linear(k, {2, 4500, 40}, Dtype::bf16, affine, true, next(), random);  // several splits, and sets of left panels
  check_linear(k, {140, 300, 210}, Dtype::bf16, affine, true, next(),
               random);  // several groups of panels, and parts of their depth
  check_products(k, {300, 140, 210}, Dtype::bf16, next(), random);
  for (const i64 columns : {i64(1), i64(37), i64(4500)})
    for (const Kind kind : {identity, affine, softcap}) {
      if (columns > 100 && kind != affine) continue;  // the oracle takes seconds where ARM is emulated
      check_rows(k, 9, columns, kind, next(), random);
      check_lens(k, 6, 2, columns, kind, true, next(), random);
      check_lens(k, 3, 2, columns, kind, false, next(), random);
      for (const double beta : {0.0, 0.3, 1.0}) check_divergence(k, 3, columns, beta, kind, next(), random);
    }
  for (const i64 width : {i64(1), i64(19), i64(300)}) {
    check_supports<float>(k, width, next(), random);
    check_supports<Bf16>(k, width, next(), random);
    check_supports<Fp16>(k, width, next(), random);
  }
}

void check_memory() {
  for (const int mebibytes : {12, 36}) {  // of the larger one pages may become huge
    std::vector<float> memory(std::size_t(mebibytes) << 18, sentinel);
    make_present(memory.data() + 1, i64(memory.size() - 1) * 4, 2);
    is_equal("make_present", "what is there", mebibytes, 0, double(std::count(memory.begin(), memory.end(), sentinel)),
             double(memory.size()));
  }
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<Isa> all = isas();
#ifdef BUPO_EMULATED
  all.push_back({"emulated_amx", [] { return true; }, kernels_emulated_amx});
  all.push_back({"emulated_avx512_bf16", [] { return true; }, kernels_emulated_avx512_bf16});
#endif
  std::vector<std::string> asked(arguments + 1, arguments + count);
  for (const Isa& isa : all)
    if (count == 1 && isa.supported()) asked.push_back(isa.name);
  check_memory();
  for (const std::string& name : asked) {
    const auto isa = std::find_if(all.begin(), all.end(), [&](const Isa& x) { return name == x.name && x.supported(); });
    if (isa == all.end()) {
      std::printf("%s: this machine or this build does not have it\n", name.c_str());
      findings.failures++;
      continue;
    }
    findings.worst.clear();
    check(isa->kernels());
    std::printf("%s:", name.c_str());
    for (const auto& [kernel, part] : findings.worst) std::printf(" %s %.2g", kernel.c_str(), part);
    std::printf("\n");
  }
  std::printf(findings.failures ? "%d failures\n" : "all within their bounds\n", findings.failures);
  return findings.failures != 0;
}
