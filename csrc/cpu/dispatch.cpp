// The widest instruction set that this machine has, found when it is first asked for.

#include "includes.h"

extern "C" {

#define KVC_DECLARE(kernel, Call)              \
  void kernel##_baseline(const Call& call);    \
  void kernel##_avx2(const Call& call);        \
  void kernel##_avx512(const Call& call);      \
  void kernel##_avx512_bf16(const Call& call);

KVC_DECLARE(window_scores, WindowScores)
KVC_DECLARE(attend_pages, AttendPages)
}

namespace {

int level() {
#ifdef __x86_64__
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512) return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
  return 0;
}

const int here = level();
int most = here;

}  // namespace

extern "C" {

// 0 baseline, 1 AVX2, 2 AVX-512, 3 the same with products of bfloat16.
int kvc_level() { return std::min(here, most); }

// Tests see to the narrower ones.
void kvc_limit(int level) { most = level; }

#ifdef __x86_64__
#define KVC_DISPATCH(kernel, Call)                                \
  void kvc_##kernel(const Call& call) {                           \
    const int own = kvc_level();                                  \
    (own == 3   ? kernel##_avx512_bf16                            \
     : own == 2 ? kernel##_avx512                                 \
     : own == 1 ? kernel##_avx2                                   \
                : kernel##_baseline)(call);                       \
  }
#else
#define KVC_DISPATCH(kernel, Call) \
  void kvc_##kernel(const Call& call) { kernel##_baseline(call); }
#endif

KVC_DISPATCH(window_scores, WindowScores)
KVC_DISPATCH(attend_pages, AttendPages)
}
