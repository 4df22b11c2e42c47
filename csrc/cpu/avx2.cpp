#include "includes.h"

#ifdef __x86_64__
#pragma GCC target("avx2,fma")
#define KVC_LANES 8
#define KVC_NAME(kernel) kernel##_avx2
#include "kernels.h"
#endif
