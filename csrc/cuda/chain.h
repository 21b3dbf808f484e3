// Whole chains on an NVIDIA GPU, and the same text run by the host.
#pragma once

#include <cstdint>

#include "../chain_kernels.h"

namespace ebmfast {
namespace cuda {

// What ChainPlan computes, chain after chain of 32, by loops in the place of threads: the tests' view of chain_block.h.
void emulate_chain(const ChainArgs& args, bool energies);

// Bytes of scratch of one block of threads.
int64_t chain_memory(const ChainRows& rows);

// Launches `blocks` blocks on the stream and does not wait. Every pointer in args is device memory, and so is what they point to;
// `memory` is chain_memory bytes for each block, or null for shared memory, of which there must be as much. Errors come back as text.
const char* chain(const ChainArgs& args, bool energies, float* memory, int blocks, void* stream);

}  // namespace cuda
}  // namespace ebmfast
