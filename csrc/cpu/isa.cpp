#include "isa.h"

#ifdef BUPO_ISA_AVX2
#include <cpuid.h>
#endif
#if defined(BUPO_ISA_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(BUPO_ISA_NEON_BF16) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(BUPO_ISA_NEON_BF16) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace bupo::cpu {

#if defined(BUPO_ISA_AMX) && defined(__linux__)
const Kernels& kernels_amx();
static bool supports_amx() {
  unsigned a, b, c, d;
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & amx_bf16) || !(d & amx_tile)) return false;
  constexpr int request_permission = 0x1023,
                tile_data = 18;  // arguments of arch_prctl: Linux saves tile registers only where asked to
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
}
#endif
#ifdef BUPO_ISA_AVX512_BF16
const Kernels& kernels_avx512_bf16();
#endif
#ifdef BUPO_ISA_AVX512
const Kernels& kernels_avx512();
static bool supports_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif
#ifdef BUPO_ISA_AVX2
const Kernels& kernels_avx2();
static bool supports_avx2() {
  unsigned a, b, c, d;  // not every compiler's __builtin_cpu_supports knows f16c
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif
#ifdef BUPO_ISA_NEON_BF16
const Kernels& kernels_neon_bf16();
// Returns whether the system says that the CPU has BFMMLA; of systems that are not asked, none does.
static bool supports_neon_bf16() {
#if defined(__linux__)
  constexpr unsigned long bf16 = 1ul << 14;  // HWCAP2_BF16, which older headers do not have
  return (getauxval(AT_HWCAP2) & bf16) != 0;
#elif defined(__APPLE__)
  int has = 0;
  std::size_t size = sizeof(has);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) == 0 && has != 0;
#else
  return false;
#endif
}
#endif
#ifdef BUPO_ISA_NEON
const Kernels& kernels_neon();
#endif
const Kernels& kernels_portable();

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all{
#if defined(BUPO_ISA_AMX) && defined(__linux__)
      {"amx", [] { return supports_avx512() && supports_amx(); }, kernels_amx},
#endif
#ifdef BUPO_ISA_AVX512_BF16
      {"avx512_bf16", [] { return supports_avx512() && __builtin_cpu_supports("avx512bf16") != 0; }, kernels_avx512_bf16},
#endif
#ifdef BUPO_ISA_AVX512
      {"avx512", supports_avx512, kernels_avx512},
#endif
#ifdef BUPO_ISA_AVX2
      {"avx2", supports_avx2, kernels_avx2},
#endif
#ifdef BUPO_ISA_NEON_BF16
      {"neon_bf16", supports_neon_bf16, kernels_neon_bf16},
#endif
#ifdef BUPO_ISA_NEON
      {"neon", [] { return true; }, kernels_neon},
#endif
      {"portable", [] { return true; }, kernels_portable},
  };
  return all;
}

}  // namespace bupo::cpu
