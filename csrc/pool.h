// A persistent thread pool. Work is handed out in chunks as threads become free; what a unit computes must not depend on that.
#pragma once

#include <cstdint>

namespace ebmfast {

using Work = void (*)(const void* context, int64_t begin, int64_t end);

// Calls work on disjoint ranges that cover [0, units), on at most `threads` threads with the caller's among them. Runs everything
// on the caller if the pool is busy with another caller. Safe after fork. What `work` throws comes out here, once everybody has
// stopped. A range has `chunk` units; 0 leaves that to the pool.
void parallel_for(int64_t units, int threads, Work work, const void* context, int64_t chunk = 0);

template <class F> void parallel_for(int64_t units, int threads, const F& f, int64_t chunk = 0) {
    parallel_for(units, threads, [](const void* c, int64_t begin, int64_t end) { (*static_cast<const F*>(c))(begin, end); }, &f, chunk);
}

}  // namespace ebmfast
