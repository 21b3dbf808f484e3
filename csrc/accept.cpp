#include "accept.h"

#include <cstring>

#include "philox.h"

namespace ebmfast {

void accept(
    const Rows* rows, int n_rows, const float* log_ratio, const int64_t* faults, uint8_t* accepted, int64_t batch, const NoiseId& id
) {
    using L = ScalarLane;
    const Key key{uint32_t(id.seed), uint32_t(id.seed >> 32)};
    for (int64_t b = 0; b < batch; ++b) {
        const uint64_t chain = id.first_chain + uint64_t(b);
        const Words<L> w = philox<L>(0, id.step, uint32_t(chain), id.stream << 28 | uint32_t(chain >> 32), key);
        const bool taken = minus_two_log<L>(uniform<L>(w.w[0])) > L::mul(log_ratio[b], -2.0f) && faults[b] == 0;
        accepted[b] = taken;
        if (!taken) continue;
        for (int k = 0; k < n_rows; ++k) {
            const int64_t at = b * rows[k].bytes;
            std::memcpy(static_cast<char*>(rows[k].to) + at, static_cast<const char*>(rows[k].from) + at, size_t(rows[k].bytes));
        }
    }
}

}  // namespace ebmfast
