// The module bupo_kernels._C. It takes raw pointers, sizes and strides and includes no torch headers, so that one build serves
// every torch. What the arguments mean is in cpu/kernels.h and cuda/rows.h. Only bupo_kernels/backends calls it; `address` there
// checks dtype, device and length of what a pointer is to. Here sizes, strides and pointers are checked against each other.
#include <pybind11/pybind11.h>

#include "build_info.h"
#include "cpu/isa.h"

namespace py = pybind11;
using namespace bupo;

#ifdef BUPO_WITH_CUDA
namespace bupo::cuda {
void bind(py::module_& module);
}
#endif

namespace {

using Address = std::uintptr_t;  // 0 for null

void require(bool holds, const char* accepted) {
  if (!holds) throw py::value_error(std::string("a kernel's arguments: accepted are ") + accepted);
}

template <class T>
T* at_or_null(Address address) {
  require(address % alignof(T) == 0, "pointers aligned for what they point to");
  return reinterpret_cast<T*>(address);
}
template <>
void* at_or_null<void>(Address address) {
  return reinterpret_cast<void*>(address);
}
template <class T>
T* at(Address address) {
  require(address != 0, "pointers that are not null");
  return at_or_null<T>(address);
}

// Checks the sizes that every call has, and returns `threads`.
int counts(std::int64_t rows, std::int64_t columns, int threads) {
  require(rows >= 0 && columns >= 1, "0 rows and more of 1 column and more");
  require(threads >= 1, "1 thread and more");
  return threads;
}

// Checks that rows of a matrix to write do not overlap (those to read may), and returns `stride`.
std::int64_t apart(std::int64_t stride, std::int64_t rows, std::int64_t width) {
  require(rows <= 1 || stride >= width, "strides of at least the width");
  return stride;
}

cpu::Readout readout(Address bias, Address outer, float inner, bool softcap) {
  return {at_or_null<const float>(bias), at_or_null<const float>(outer), inner, softcap};
}

cpu::Dtype dtype_of(const std::string& name) {
  if (name == "float32") return cpu::Dtype::fp32;
  if (name == "bfloat16") return cpu::Dtype::bf16;
  if (name == "float16") return cpu::Dtype::fp16;
  throw py::value_error("dtype: '" + name + "' given, accepted are 'float32', 'bfloat16' and 'float16'");
}

// Returns the address of elements of this dtype.
void* elements(Address address, cpu::Dtype dtype) {
  return dtype == cpu::Dtype::fp32 ? static_cast<void*>(at<float>(address)) : at<std::uint16_t>(address);
}

// Returns rows that may be read in any order.
cpu::Rows rows_of(Address data, std::int64_t stride, std::int64_t width, const std::string& dtype) {
  require(stride >= 0, "strides of 0 and more");
  return {elements(data, dtype_of(dtype)), stride, width, dtype_of(dtype)};
}

// Returns the rows of a matrix [4, rows] with this stride.
cpu::Statistics statistics(Address m, std::int64_t stride, std::int64_t rows) {
  float* first = at<float>(m);
  apart(stride, 2, rows);
  return {first, first + stride, first + 2 * stride, first + 3 * stride};
}

cpu::Coefficients coefficients(Address m, Address constant, Address slope, Address on_target, Address targets) {
  return {at<const float>(m), at<const float>(constant), at_or_null<const float>(slope), at<const float>(on_target),
          at<const std::int32_t>(targets)};
}

// Returns the products that are kept, in blocks that begin on lines of the cache.
template <class T>
cpu::Kept<T> kept_at(Address blocks, std::int64_t panels, std::int64_t stride) {
  require(panels >= 0 && stride >= panels && blocks % 64 == 0,
          "kept blocks on lines of 64 bytes, as many or more apart as are kept");
  return {at_or_null<T>(blocks), panels, stride};
}

// Returns what a lens keeps of `tokens` side by side, each policy's `stride` apart.
cpu::LensStatistics lens_statistics(Address m, std::int64_t stride, std::int64_t policy_stride, std::int64_t tokens, Address argmax,
                                    Address cross, bool pairs, Address top_z, Address top_ids, std::int64_t top_k) {
  require(policy_stride >= tokens && top_k >= 0, "policies of at least the tokens apart");
  const cpu::Statistics first = statistics(m, stride, 1);
  if (top_k > 0) at<float>(top_z), at<std::int64_t>(top_ids);
  return {first.m,
          first.s,
          first.t,
          first.z_y,
          policy_stride,
          at_or_null<std::int64_t>(argmax),
          at_or_null<float>(cross),
          pairs,
          at_or_null<float>(top_z),
          at_or_null<std::int64_t>(top_ids),
          top_k};
}

// The kernels of one instruction set, as methods for Python.
struct Cpu {
  explicit Cpu(const std::string& name) {
    for (const cpu::Isa& isa : cpu::isas())
      if (name == isa.name && isa.supported()) kernels = &isa.kernels();
    if (!kernels) throw py::value_error("isa: '" + name + "' given, which this build or this machine does not have");
  }
  const cpu::Kernels* kernels = nullptr;

  cpu::Matrix matrix(Address data, std::int64_t stride, std::int64_t rows, std::int64_t width, const std::string& dtype) const {
    require(rows >= 1 && width >= 1 && stride >= 0, "matrices of 1 row and column and more");
    const cpu::Dtype of = dtype_of(dtype);
    require(of == cpu::Dtype::bf16 || (of == cpu::Dtype::fp16 && !kernels->multiplies_bf16),
            "matrices of bf16, and of fp16 where panels are of fp32");
    return {at<const std::uint16_t>(data), stride, rows, width, of};
  }
  // The workspace of a product whose panels are there, of which an instruction set may take none.
  void* sums(Address workspace, int threads) const { return kernels->workspace_bytes(0, threads) ? at<void>(workspace) : nullptr; }
};

void bind_cpu(py::module_& module) {
  using i64 = std::int64_t;
  using release = py::call_guard<py::gil_scoped_release>;

  module.def("isas", [] {
    py::list names;
    for (const cpu::Isa& isa : cpu::isas())
      if (isa.supported()) names.append(isa.name);
    return names;
  });

  module.def(
      "make_present", [](Address memory, i64 bytes, int threads) { cpu::make_present(at_or_null<void>(memory), bytes, threads); },
      release());

  py::class_<Cpu>(module, "Kernels")
      .def(py::init<const std::string&>())
      .def("packed_words", [](const Cpu& self, i64 count, i64 depth) { return self.kernels->packed_words(count, depth); })
      .def("workspace_bytes", [](const Cpu& self, i64 depth, int threads) { return self.kernels->workspace_bytes(depth, threads); })
      .def("statistics_bytes", [](const Cpu& self, i64 rows, i64 columns, i64 width,
                                  int threads) { return self.kernels->statistics_bytes(rows, columns, width, threads); })
      .def(
          "pack_rows",
          [](const Cpu& self, Address from, i64 stride, i64 rows, i64 width, const std::string& dtype, Address to, int threads) {
            self.kernels->pack_rows(self.matrix(from, stride, rows, width, dtype), at<cpu::Word>(to), counts(rows, width, threads));
          },
          release())
      .def(
          "pack_columns",
          [](const Cpu& self, Address from, i64 stride, i64 rows, i64 width, const std::string& dtype, Address to, int threads) {
            self.kernels->pack_columns(self.matrix(from, stride, rows, width, dtype), at<cpu::Word>(to),
                                       counts(rows, width, threads));
          },
          release())
      .def(
          "linear_statistics",
          [](const Cpu& self, Address hidden, i64 rows, Address weight, i64 stride, i64 columns, i64 width,
             const std::string& dtype, Address bias, Address outer, float inner, bool softcap, Address targets, Address out,
             i64 out_stride, Address kept, i64 kept_panels, i64 kept_stride, Address workspace, int threads) {
            self.kernels->linear_statistics(at<const cpu::Word>(hidden), rows, self.matrix(weight, stride, columns, width, dtype),
                                            readout(bias, outer, inner, softcap), at<const std::int32_t>(targets),
                                            statistics(out, out_stride, rows), kept_at<float>(kept, kept_panels, kept_stride),
                                            at<void>(workspace), counts(rows, columns, threads));
          },
          release())
      .def(
          "linear_gradient",
          [](const Cpu& self, Address hidden, i64 rows, Address weight, i64 stride, i64 columns, i64 width,
             const std::string& dtype, Address bias, Address outer, float inner, bool softcap, Address m, Address constant,
             Address slope, Address on_target, Address targets, Address kept, i64 kept_panels, i64 kept_stride, Address sources,
             Address dz_left, Address dz_right, Address column_sums, Address workspace, int threads) {
            self.kernels->linear_gradient(kept ? nullptr : at<const cpu::Word>(hidden), rows,
                                          self.matrix(weight, stride, columns, width, dtype), readout(bias, outer, inner, softcap),
                                          coefficients(m, constant, slope, on_target, targets),
                                          kept_at<const float>(kept, kept_panels, kept_stride),
                                          at_or_null<const std::int32_t>(sources), at<cpu::Word>(dz_left), at<cpu::Word>(dz_right),
                                          at_or_null<float>(column_sums), at<void>(workspace), counts(rows, columns, threads));
          },
          release())
      .def(
          "weight_gradient",
          [](const Cpu& self, Address dz_left, i64 columns, Address hidden_columns, i64 rows, i64 width, Address out, i64 stride,
             const std::string& dtype, bool add, Address workspace, int threads) {
            const cpu::Dtype of = dtype_of(dtype);
            require(of == cpu::Dtype::fp32 || !add, "sums in fp32");
            const cpu::Write in_16_bit = of == cpu::Dtype::bf16 ? cpu::Write::bf16 : cpu::Write::fp16;
            const cpu::Write in_fp32 = add ? cpu::Write::add_to_fp32 : cpu::Write::fp32;
            self.kernels->weight_gradient(at<const cpu::Word>(dz_left), columns, at<const cpu::Word>(hidden_columns), rows, width,
                                          elements(out, of), apart(stride, columns, width),
                                          of == cpu::Dtype::fp32 ? in_fp32 : in_16_bit, self.sums(workspace, threads),
                                          counts(rows, columns, threads));
          },
          release())
      .def(
          "hidden_gradient",
          [](const Cpu& self, Address dz_right, i64 rows, Address weight, i64 stride, i64 columns, i64 width,
             const std::string& dtype, Address blocks, bool add, Address workspace, int threads) {
            self.kernels->hidden_gradient(at<const cpu::Word>(dz_right), rows, self.matrix(weight, stride, columns, width, dtype),
                                          at<float>(blocks), add, at<void>(workspace), counts(rows, columns, threads));
          },
          release())
      .def(
          "unpack_hidden",
          [](const Cpu& self, Address blocks, i64 rows, i64 width, Address out, i64 stride, int threads) {
            self.kernels->unpack_hidden(at<const float>(blocks), rows, width, at<float>(out), apart(stride, rows, width),
                                        counts(rows, width, threads));
          },
          release())
      .def(
          "row_statistics",
          [](const Cpu& self, Address products, i64 stride, i64 rows, i64 columns, i64 first, Address bias, Address outer,
             float inner, bool softcap, Address targets, Address running, i64 running_stride, int threads) {
            self.kernels->row_statistics(at<float>(products), apart(stride, rows, columns), rows, columns, first,
                                         readout(bias, outer, inner, softcap), at<const std::int32_t>(targets),
                                         statistics(running, running_stride, rows), counts(rows, columns, threads));
          },
          release())
      .def(
          "row_gradient",
          [](const Cpu& self, Address logits, i64 stride, i64 rows, i64 columns, Address bias, Address outer, float inner,
             bool softcap, bool formed, Address m, Address constant, Address slope, Address on_target, Address targets, Address dz,
             int threads) {
            self.kernels->row_gradient(
                at<const float>(logits), apart(stride, rows, columns), rows, columns, readout(bias, outer, inner, softcap), formed,
                coefficients(m, constant, slope, on_target, targets), at<float>(dz), counts(rows, columns, threads));
          },
          release())
      .def(
          "pack_left",
          [](const Cpu& self, Address from, i64 stride, i64 rows, i64 width, const std::string& dtype, Address to, int threads) {
            self.kernels->pack_left(self.matrix(from, stride, rows, width, dtype), at<cpu::Word>(to), counts(rows, width, threads));
          },
          release())
      .def(
          "linear_products",
          [](const Cpu& self, Address hidden, i64 rows, Address weight, i64 columns, i64 width, Address out, i64 stride,
             Address workspace, int threads) {
            require(width >= 1, "matrices of 1 column and more");
            self.kernels->linear_products(at<const cpu::Word>(hidden), rows, at<const cpu::Word>(weight), columns, width,
                                          at<float>(out), apart(stride, rows, columns), self.sums(workspace, threads),
                                          counts(rows, columns, threads));
          },
          release())
      .def(
          "lens_statistics",
          [](const Cpu& self, Address products, Address scratch, i64 policies, i64 tokens, i64 columns, i64 first, Address bias,
             Address outer, float inner, bool softcap, Address targets, Address m, i64 stride, i64 policy_stride, Address argmax,
             Address cross, bool pairs, Address top_z, Address top_ids, i64 top_k, int threads) {
            require(policies >= 1 && (!pairs || cross), "1 policy and more, and memory for the pairs of them");
            self.kernels->lens_statistics(
                at<float>(products), pairs ? at<float>(scratch) : at_or_null<float>(scratch), policies, tokens, columns, first,
                readout(bias, outer, inner, softcap), at<const std::int32_t>(targets),
                lens_statistics(m, stride, policy_stride, tokens, argmax, cross, pairs, top_z, top_ids, top_k),
                counts(tokens, columns, threads));
          },
          release())
      .def(
          "lens_comparison",
          [](const Cpu& self, Address logits, i64 policies, i64 tokens, i64 columns, Address bias, Address outer, float inner,
             bool softcap, bool formed, Address m, i64 stride, i64 policy_stride, Address log_s, Address rank, Address jsd,
             int threads) {
            require(policies >= 1 && (!jsd || log_s), "1 policy and more, and ln s where the jsd is asked for");
            self.kernels->lens_comparison(at<float>(logits), policies, tokens, columns, readout(bias, outer, inner, softcap),
                                          formed, lens_statistics(m, stride, policy_stride, tokens, 0, 0, false, 0, 0, 0),
                                          {at_or_null<const float>(log_s), at_or_null<i64>(rank), at_or_null<float>(jsd)},
                                          counts(tokens, columns, threads));
          },
          release())
      .def(
          "row_divergence",
          [](const Cpu& self, Address student, i64 student_stride, bool student_gradient, Address student_bias,
             Address student_outer, float student_inner, bool student_softcap, Address teacher, i64 teacher_stride,
             bool teacher_gradient, Address teacher_bias, Address teacher_outer, float teacher_inner, bool teacher_softcap,
             i64 rows, i64 columns, float beta, Address g_divergence, Address g_entropy, Address divergence, Address entropy,
             int threads) {
            counts(rows, columns, threads);
            require(beta >= 0.0f && beta <= 1.0f, "betas from 0 to 1");
            if (rows == 0) return;
            self.kernels->row_divergence({at<float>(student), apart(student_stride, rows, columns), student_gradient,
                                          readout(student_bias, student_outer, student_inner, student_softcap)},
                                         {at<float>(teacher), apart(teacher_stride, rows, columns), teacher_gradient,
                                          readout(teacher_bias, teacher_outer, teacher_inner, teacher_softcap)},
                                         rows, columns, beta, at_or_null<const float>(g_divergence),
                                         at_or_null<const float>(g_entropy), at<float>(divergence), at<float>(entropy), threads);
          },
          release())
      .def(
          "gathered_dots",
          [](const Cpu& self, Address left, i64 left_stride, Address left_rows, Address right, i64 right_stride, Address right_rows,
             i64 count, i64 width, const std::string& dtype, Address out, int threads) {
            counts(count, width, threads);
            if (count == 0) return;
            self.kernels->gathered_dots(rows_of(left, left_stride, width, dtype), at<const i64>(left_rows),
                                        rows_of(right, right_stride, width, dtype), at<const i64>(right_rows), count,
                                        at<float>(out), threads);
          },
          release())
      .def(
          "gathered_sums",
          [](const Cpu& self, Address factors, Address source, i64 stride, Address index, Address offsets, i64 segments, i64 width,
             const std::string& dtype, Address out, Address places, int threads) {
            counts(segments, width, threads);
            if (segments == 0) return;
            // No entry, no factors and no index: empty tensors have no address.
            self.kernels->gathered_sums(at_or_null<const float>(factors), rows_of(source, stride, width, dtype),
                                        at_or_null<const i64>(index), at<const i64>(offsets), segments,
                                        elements(out, dtype_of(dtype)), at<const i64>(places), threads);
          },
          release());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", [] {
    py::dict facts;
    for (const auto& [name, value] : build_info) facts[name] = value;
    return facts;
  });
  auto cpu = module.def_submodule("cpu");
  bind_cpu(cpu);
#ifdef BUPO_WITH_CUDA
  auto cuda = module.def_submodule("cuda");
  cuda::bind(cuda);
#endif
}
