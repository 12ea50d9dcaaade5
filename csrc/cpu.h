// Which vector instructions the CPU code may use: it is compiled for several sets and chooses when
// it runs, so that one build serves every processor.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <string_view>
#include <type_traits>

#if defined(__GNUC__) || defined(__clang__)
#define UCAN_INLINE inline __attribute__((always_inline))
#define UCAN_APART __attribute__((noinline))
#else
#define UCAN_INLINE inline
#define UCAN_APART
#endif

// The iterations of a loop never depend on each other; without this the compiler has to prove it
// for each pair of pointers, and gives up.
#if defined(__clang__)
#define UCAN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define UCAN_INDEPENDENT _Pragma("GCC ivdep")
#else
#define UCAN_INDEPENDENT
#endif

// A short loop of constant length stays a loop until it is vectorised: GCC would unroll it into
// scalar instructions first.
#if defined(__GNUC__) && !defined(__clang__)
#define UCAN_ROLLED _Pragma("GCC unroll 1")
#else
#define UCAN_ROLLED
#endif

// A loop over registers: its count is known and its index must not survive.
#if defined(__clang__)
#define UCAN_UNROLL _Pragma("clang loop unroll(full)")
#elif defined(__GNUC__)
#define UCAN_UNROLL _Pragma("GCC unroll 16")
#else
#define UCAN_UNROLL
#endif

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define UCAN_X86 1
#define UCAN_AVX2 __attribute__((target("avx2,fma")))
#define UCAN_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")))
#else
#define UCAN_X86 0
#endif

namespace ucan_fast {

// A vector register of W, its bits, and the same anywhere in memory.
template <typename W, int kBytes>
struct Vectors {
  using Bits = std::conditional_t<sizeof(W) == 4, int32_t, int64_t>;
  typedef W type __attribute__((vector_size(kBytes)));
  typedef Bits bits __attribute__((vector_size(kBytes)));
  typedef W unaligned __attribute__((vector_size(kBytes), aligned(sizeof(W)), may_alias));
};

enum class InstructionSet { plain, avx2, avx512 };

// The widest instructions of this processor, or fewer where torch's own switch asks for fewer.
inline InstructionSet instruction_set() {
#if UCAN_X86
  const char* set = std::getenv("ATEN_CPU_CAPABILITY");
  const std::string_view wanted = set == nullptr ? "" : set;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && wanted != "default") {
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    return avx512 && wanted != "avx2" ? InstructionSet::avx512 : InstructionSet::avx2;
  }
#endif
  return InstructionSet::plain;
}

}  // namespace ucan_fast
