#include <stddef.h>

#include <vector>

#include "chain.h"
#include "chain_block.h"

namespace ebmfast {
namespace cuda {
namespace {

struct Loop {
    template <class F> void operator()(const F& f) const {
        for (int warp = 0; warp < kWarps; ++warp) {
            for (int lane = 0; lane < kLanes; ++lane) f(warp, lane);
        }
    }
};

}  // namespace

void emulate_chain(const ChainArgs& args, bool energies) {
    std::vector<float> scratch(size_t(block_rows(args.rows)) * kLanes);
    for (int64_t first = 0; first < args.chains; first += kLanes) {
        const int64_t left = args.chains - first;
        ChainBlock<Loop> block(args, first, int(left < kLanes ? left : kLanes), scratch.data(), Loop());
        energies ? block.energies() : block.run();
    }
}

}  // namespace cuda
}  // namespace ebmfast
