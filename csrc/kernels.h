// What the instruction-set files share with the rest: plain structs, and a table of functions per level.
#pragma once

#include <stdint.h>

namespace ebmfast {

constexpr int kTile = 256;        // elements a thread works on at a time: state, gradient and noise of a tile stay in L1
constexpr int kNormBlock = 4096;  // elements per partial sum of squares (ebmfast/reference.py: NORM_BLOCK, NORM_LANES)
constexpr int kNormLanes = 16;

// Names the noise of row 0, element 0.
struct NoiseId {
    uint64_t seed, first_chain;
    uint32_t step, stream, first_block;
};

// How [batch, size] is cut into tiles: either `chains` whole chains, or `elements` elements of one chain.
struct Tiling {
    int64_t chains;  // 0: the second kind
    int64_t elements, tiles_per_chain, tiles;
};

struct FillArgs {
    float* out;  // [batch, size]
    int64_t batch, size;
    NoiseId id;
    bool uniform;
    Tiling tiling;
};

struct StepArgs {
    float* x;                      // [batch, size]
    const void* const* gradients;  // n_gradients of [batch, size], float32 or bfloat16
    const float* weights;          // [n_gradients] or [n_gradients, batch]
    int64_t batch, size;
    int n_gradients;
    bool bf16, weights_per_chain;
    float drift, noise;
    bool clips, clamps;
    float clip, low, high;
    NoiseId id;
    const uint8_t* frozen;  // [size], [batch, size] or null
    int64_t frozen_stride;  // 0 or size
    const int64_t* faults;  // [batch] or null
    uint8_t* bad;           // [batch]: set to 1 for a chain that became non-finite; null without faults
    int* any_bad;
    const float* scale;     // [batch]: factor of the norm clip; or null
    double* squares;        // [batch, ceil(size / kNormBlock)]: written by norm_blocks
    Tiling tiling;
};

struct Kernels {
    const char* name;
    int lanes;
    void (*fill)(const FillArgs&, int64_t begin, int64_t end);         // tiles
    void (*step)(const StepArgs&, int64_t begin, int64_t end);         // tiles
    void (*norm_blocks)(const StepArgs&, int64_t begin, int64_t end);  // chain * blocks + block
};

}  // namespace ebmfast
