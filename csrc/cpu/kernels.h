// The kernels of one instruction set. A file that includes this has set KVC_LANES,
// KVC_NAME and, for its compiler, the instruction set.

namespace {

#include "vector.h"
#include "product.h"
#include "pages.h"
#include "window_scores.h"
#include "attend_pages.h"

}  // namespace

#define KVC_BY_TYPE(kernel, Call)                  \
  extern "C" void KVC_NAME(kernel)(const Call& call) { \
    switch (call.type) {                           \
      case BFLOAT16:                               \
        return kernel<BFloat16>(call);             \
      case FLOAT16:                                \
        return kernel<Float16>(call);              \
      case FLOAT8:                                 \
        return kernel<Float8>(call);               \
      default:                                     \
        return kernel<float>(call);                \
    }                                              \
  }

KVC_BY_TYPE(window_scores, WindowScores)
KVC_BY_TYPE(attend_pages, AttendPages)
