#include "includes.h"

#define KVC_LANES 4
#define KVC_NAME(kernel) kernel##_baseline
#include "kernels.h"
