// Standard headers come before any choice of an instruction set: what they define may
// be shared by all files.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <type_traits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "../api.h"
