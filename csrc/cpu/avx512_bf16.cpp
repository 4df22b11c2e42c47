#include "includes.h"

#ifdef __x86_64__
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define KVC_LANES 16
#define KVC_PAIRS
#define KVC_NAME(kernel) kernel##_avx512_bf16
#include "kernels.h"
#endif
