// The kernels of one instruction set. A file that includes this has set KVC_LANES,
// KVC_NAME and, for its compiler, the instruction set.

namespace {

#include "vector.h"
#include "product.h"
#include "pages.h"
#include "window_scores.h"

}  // namespace

extern "C" void KVC_NAME(window_scores)(const WindowScores& call) {
  if (call.type == BFLOAT16)
    window_scores<BFloat16>(call);
  else if (call.type == FLOAT8)
    window_scores<Float8>(call);
  else
    window_scores<float>(call);
}
