// Binds the row kernels as `bupo_kernels._C.cuda`. Pointers are numbers, 0 for null; what the arguments mean is in rows.h.
// tests/emulation builds the same file, and passes pointers to the host.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>

#include "rows.h"

namespace py = pybind11;

namespace bupo::cuda {
namespace {

using Address = std::uintptr_t;
using release = py::gil_scoped_release;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::float32;
  if (name == "bfloat16") return Dtype::bfloat16;
  throw py::value_error("dtype: '" + name + "' given, accepted are 'float32' and 'bfloat16'");
}

Readout readout_of(Address bias, Address row_temperature, double temperature, double logit_scale, std::optional<double> softcap) {
  return {at<const float>(bias), at<const float>(row_temperature), temperature, logit_scale, softcap.value_or(0)};
}

// Reads a bupo_kernels.policy_losses.PolicyObjective by the names of its fields. Sums with 1 are double, as in torch.
Objective objective_of(const py::object& given) {
  const auto number = [&](const char* name) { return given.attr(name).cast<double>(); };
  const auto word = [&](const char* name) { return given.attr(name).cast<std::optional<std::string>>().value_or("none"); };
  const auto bound = [&](const char* name) { return given.attr(name).cast<std::optional<double>>(); };
  const std::string ratio = word("ratio"), clip = word("clip"), kl = word("kl"), importance = word("importance");
  if (ratio == "sequence" || importance == "sequence")
    throw py::value_error("objective: one of whole sequences given, accepted are those whose terms depend on a token alone");
  if (number("top_entropy_quantile") < 1)
    throw py::value_error("objective: one of a whole batch's entropies given, accepted is top_entropy_quantile = 1");
  Objective objective;
  objective.ratio = ratio == "none" ? Ratio::none : Ratio::token;
  objective.clip = clip == "ppo" ? Clip::ppo : clip == "cispo" ? Clip::cispo : clip == "sapo" ? Clip::sapo : Clip::none;
  objective.kl = kl == "k1" ? Divergence::k1 : kl == "k2" ? Divergence::k2 : kl == "k3" ? Divergence::k3 : Divergence::none;
  objective.importance = importance == "token";
  objective.floor = static_cast<float>(1 - number("clip_low"));
  objective.top = static_cast<float>(1 + number("clip_high"));
  const std::optional<double> dual_clip = bound("dual_clip"), delta = bound("delta");
  objective.ceiling = static_cast<float>((dual_clip ? dual_clip : delta).value_or(std::numeric_limits<double>::infinity()));
  objective.sapo_pos = static_cast<float>(number("sapo_temperature_pos"));
  objective.sapo_neg = static_cast<float>(number("sapo_temperature_neg"));
  objective.kl_coefficient = static_cast<float>(number("kl_coefficient"));
  objective.entropy_coefficient = static_cast<float>(number("entropy_coefficient"));
  objective.importance_cap = static_cast<float>(number("importance_cap"));
  return objective;
}

}  // namespace

void bind(py::module_& module) {
  using i64 = std::int64_t;
  using Number = std::optional<double>;
  using py::arg;

  module.def(
      "row_threads", [](i64 columns, const std::string& dtype) { return row_threads(columns, dtype_of(dtype)); }, arg("columns"),
      arg("dtype"));

  module.def(
      "row_statistics",
      [](Address products, const std::string& dtype, i64 rows, i64 columns, i64 stride, i64 first_column, Address bias,
         Address row_temperature, double temperature, double logit_scale, Number softcap, Address targets, Address m, Address s,
         Address t, Address z_y, bool first, Address stream) {
        const Products tile = {at<const void>(products), dtype_of(dtype), rows, columns, stride, first_column};
        const Readout readout = readout_of(bias, row_temperature, temperature, logit_scale, softcap);
        const release released;
        row_statistics(tile, readout, at<const i64>(targets), {at<float>(m), at<float>(s), at<float>(t), at<float>(z_y)}, first,
                       at<void>(stream));
      },
      arg("products"), arg("dtype"), arg("rows"), arg("columns"), arg("stride"), arg("first_column"), arg("bias"),
      arg("row_temperature"), arg("temperature"), arg("logit_scale"), arg("softcap"), arg("targets"), arg("m"), arg("s"), arg("t"),
      arg("z_y"), arg("first"), arg("stream"));

  module.def(
      "row_gradient",
      [](Address products, const std::string& dtype, i64 rows, i64 columns, i64 stride, i64 first_column, Address bias,
         Address row_temperature, double temperature, double logit_scale, Number softcap, Address m, Address constant,
         Address slope, Address on_target, Address targets, i64 n, Address gradient, const std::string& gradient_dtype,
         i64 gradient_stride, Address stream) {
        const Products tile = {at<const void>(products), dtype_of(dtype), rows, columns, stride, first_column};
        const Readout readout = readout_of(bias, row_temperature, temperature, logit_scale, softcap);
        const Coefficients coefficients = {at<const float>(m), at<const float>(constant), at<const float>(slope),
                                           at<const float>(on_target), at<const i64>(targets)};
        const Gradient to = {at<void>(gradient), dtype_of(gradient_dtype), gradient_stride};
        const release released;
        row_gradient(tile, readout, coefficients, n, to, at<void>(stream));
      },
      arg("products"), arg("dtype"), arg("rows"), arg("columns"), arg("stride"), arg("first_column"), arg("bias"),
      arg("row_temperature"), arg("temperature"), arg("logit_scale"), arg("softcap"), arg("m"), arg("constant"), arg("slope"),
      arg("on_target"), arg("targets"), arg("n"), arg("gradient"), arg("gradient_dtype"), arg("gradient_stride"), arg("stream"));

  module.def(
      "row_policy_loss",
      [](Address products, const std::string& dtype, i64 rows, i64 columns, i64 stride, Address bias, Address row_temperature,
         double temperature, double logit_scale, Number softcap, const py::object& objective, Address targets, Address weights,
         Address advantages, Address old_logprobs, Address reference_logprobs, Address sampler_logprobs, Address loss,
         Address logprob, Address entropy, Address used, Address gradient, const std::string& gradient_dtype, i64 gradient_stride,
         Address stream) {
        const Products tile = {at<const void>(products), dtype_of(dtype), rows, columns, stride, 0};
        const Readout readout = readout_of(bias, row_temperature, temperature, logit_scale, softcap);
        const Objective goal = objective_of(objective);
        const PolicyInputs inputs = {at<const i64>(targets),
                                     at<const float>(weights),
                                     at<const float>(advantages),
                                     at<const float>(old_logprobs),
                                     at<const float>(reference_logprobs),
                                     at<const float>(sampler_logprobs)};
        const PolicyOutputs outputs = {at<float>(loss), at<float>(logprob), at<float>(entropy), at<bool>(used)};
        const Gradient to = {at<void>(gradient), dtype_of(gradient_dtype), gradient_stride};
        const release released;
        row_policy_loss(tile, readout, goal, inputs, outputs, to, at<void>(stream));
      },
      arg("products"), arg("dtype"), arg("rows"), arg("columns"), arg("stride"), arg("bias"), arg("row_temperature"),
      arg("temperature"), arg("logit_scale"), arg("softcap"), arg("objective"), arg("targets"), arg("weights"), arg("advantages"),
      arg("old_logprobs"), arg("reference_logprobs"), arg("sampler_logprobs"), arg("loss"), arg("logprob"), arg("entropy"),
      arg("used"), arg("gradient"), arg("gradient_dtype"), arg("gradient_stride"), arg("stream"));
}

}  // namespace bupo::cuda
