// What a guarded kernel does about a value that is not finite (ternarize/guard.py).
#include <stdint.h>

namespace ternarize {

// NONFINITE_OUTPUT of backends/torch/update.py, into status[0] of the layer.
__device__ __forceinline__ void report_nonfinite(int* status) { atomicOr(status, 1); }

}  // namespace ternarize
