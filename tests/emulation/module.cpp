// The functions of `bupo_kernels._C.cuda` on pointers to the host, and what tests want besides.
#include <cuda_emulation.h>

#include "../../csrc/cuda/bindings.cpp"

// What a GPU leaves undefined, and what only the order of the threads decides.
namespace faulty {

void thread_ends(float*) {
  if (threadIdx.x == 40) return;
  __syncthreads();
}
void half_a_barrier(float*) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}
void lane_leaves(float*) {
  if (threadIdx.x % 32 != 5) __shfl_down_sync(0xffffffffu, 1.0f, 1);
}
void misaligned(float* x) { *reinterpret_cast<uint4*>(x + 1) = uint4(); }
void no_barrier(float* x) {  // shared is the last block's where a thread runs before thread 40
  __shared__ float shared;
  if (threadIdx.x == 40) shared = 1;
  x[threadIdx.x] = shared;
}

}  // namespace faulty

PYBIND11_MODULE(emulated_cuda, module) {
  using namespace bupo;
  cuda::bind(module);

  module.def(
      "run_threads", [](const std::string& order) { emulation::machine.ascending = order == "ascending"; }, py::arg("order"));

  module.def("policy_terms", [](const py::object& objective, float logprob, float entropy, float advantage, float old_logprob,
                                float reference_logprob, float sampler_logprob) {
    const Token token = {logprob, entropy, advantage, old_logprob, reference_logprob, sampler_logprob};
    const PolicyTerms terms = policy_terms(cuda::objective_of(objective), token);
    return py::make_tuple(terms.loss, terms.d_logprob, terms.d_entropy);
  });

  module.def("run_faulty", [](const std::string& name, std::uintptr_t x) {
    const auto kernel = name == "thread ends"      ? faulty::thread_ends
                        : name == "half a barrier" ? faulty::half_a_barrier
                        : name == "lane leaves"    ? faulty::lane_leaves
                        : name == "misaligned"     ? faulty::misaligned
                                                   : faulty::no_barrier;
    cuda::launch("faulty", kernel, dim3(1), 64, nullptr, reinterpret_cast<float*>(x));
  });
}
