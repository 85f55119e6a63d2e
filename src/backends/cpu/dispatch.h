// Elementwise kernels compiled twice from one source: for the baseline of the build (AVX2) and for
// AVX-512, twice as wide. The CPU decides at run time. Both give the same bits: the same operations
// on the same lanes (vector_math.h).
//
// A kernel is a struct with a static always-inline `run`. What it calls is inlined into both copies;
// a call that cannot be would run baseline code, slower and with the same result. Private to
// backends/cpu.
#pragma once

#define BITMILL_AVX512                                                                           \
  __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"), noinline, \
                 flatten))
#define BITMILL_KERNEL __attribute__((always_inline)) static inline
// Inlined without exception, so that a kernel's wide copy holds wide code.
#define BITMILL_INLINE __attribute__((always_inline)) inline

namespace bitmill {

inline bool cpu_has_avx512() {
  static const bool has = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return has;
}

template <typename Kernel, typename... Args>
BITMILL_AVX512 void run_avx512(Args... args) {
  Kernel::run(args...);
}

template <typename Kernel, typename... Args>
__attribute__((noinline)) void run_baseline(Args... args) {
  Kernel::run(args...);
}

// Kernel::run(args...) in this CPU's widest form.
template <typename Kernel, typename... Args>
inline void dispatch(Args... args) {
  if (cpu_has_avx512())
    run_avx512<Kernel>(args...);
  else
    run_baseline<Kernel>(args...);
}

}  // namespace bitmill
