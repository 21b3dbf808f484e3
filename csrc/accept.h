// Accept or reject one proposal per chain (ebmfast/reference.py: metropolis_accept is the specification).
#pragma once

#include <cstdint>

#include "kernels.h"

namespace ebmfast {

// What a chain takes over if it accepts: row b of `from` goes to row b of `to`.
struct Rows {
    void* to;          // [batch, bytes]
    const void* from;  // [batch, bytes]
    int64_t bytes;
};

// accepted[b] = ln u < log_ratio[b], u element 0 of the noise that `id` names, and faults[b] == 0.
void accept(
    const Rows* rows, int n_rows, const float* log_ratio, const int64_t* faults, uint8_t* accepted, int64_t batch, const NoiseId& id
);

}  // namespace ebmfast
