// What the chain engine's instruction-set files share with the rest: a whole composition of simple energies as plain structs.
//
// A tile is a few vectors of chains. Every array of a tile is feature-major, [rows][tile], one chain per SIMD lane, so that no lane
// ever sees another: what a chain computes depends neither on the tile's size nor on who its neighbours are.
#pragma once

#include <stdint.h>

#include "kernels.h"
#include "lane_math.h"

namespace ebmfast {

constexpr int kMaxVectors = 2;  // of chains in a tile

// How a condition c enters a layer z = scale * (W h + bias) + shift:
//   scale = 1 + scale_bias + scale_weight c,   shift = shift_bias + shift_weight c
// with matrices [out][width] of row strides; null pointers are zeros, and without scale_weight there is no scale. Both are folded into one shift and one scale per output:
// once per call where every chain has the same condition, else once per call and chain.
struct ChainConditioning {
    int width, slot;  // slot: which of ChainArgs::conditions, -1 for a condition that all chains share
    const float *bias, *shift_weight, *shift_bias, *scale_weight, *scale_bias;
    int64_t shift_stride, scale_stride;
};

// One hidden layer: a = activation(scale * (W h) + shift), with W [out][in] in panels (see PackedMatrix).
struct ChainLayer {
    int in, out;
    Activation activation;
    const float *forward, *backward;         // panels of W and of its transpose
    const uint32_t *forward16, *backward16;  // the same as pairs of bfloat16; null for float32 products
    const float *shift, *scale;              // [out], null for zeros and ones; not used where own_rows >= 0
    int own_rows;                            // rows of scratch with the chains' own shifts, then their scales; -1: shared by all
    ChainConditioning conditioning;
};

enum class UnitKind : int { mlp, diagonal, full, quartic, rosenbrock };

// One energy E(x) of the composition.
//   mlp        E = constant + read_out . a_L, or read_out . x without layers
//   diagonal   E = constant + 1/2 sum precision_i (x_i - mean_i)^2
//   full       E = constant + 1/2 (x - mean)' P (x - mean), P symmetric, in panels
//   quartic    E = constant + sum a (x_i^2 - b)^2 + c x_i
//   rosenbrock E = constant + sum b (x_(i+1) - x_i^2)^2 + (a - x_i)^2
struct ChainUnit {
    UnitKind kind;
    int leaf;  // of the expression: what a fault is blamed on
    float constant, a, b, c;
    const float *mean, *precision, *read_out;
    const ChainLayer* layers;
    int n_layers;
};

// The program's tree in postfix order (ebmfast/program.py); `children` index nodes, `values` are s and log w, or the weights.
struct ChainNode {
    int code, unit, n_children, first_child, first_value;
};
enum NodeCode : int { kLeaf = 0, kSum = 1, kLogSumExp = 2 };

// Scratch of a tile, in rows of one float per chain; `padded` is the size rounded up to four, the rows of x, moved, combined and of
// each unit's gradient.
struct ChainRows {
    int64_t padded, x, moved, gradients, combined, energies, weights, values, upstream, conditions, condition, slopes, ping, pong, pairs, faults, lanes,
        counters, frozen;
    int64_t there, normals, energy, accepted, warm_up;  // of samplers that accept or reject
    int64_t total;
};

enum class ChainDynamics : int { langevin, mala, hmc };

// Dual averaging of step sizes; no state: none.
struct WarmUp {
    float* state;  // [chains][4]: ln s, its average, the error, the steps taken
    float steps, target, gamma, t0, kappa;
};

struct ChainArgs {
    float* x;  // [chains][size], in place
    int64_t chains, size;
    const ChainUnit* units;
    int n_units;
    const ChainNode* nodes;
    const int* children;
    const float* values;
    int n_nodes;
    bool has_or;
    const float* const* conditions;  // per slot [chains][width]
    NoiseId id;  // step is that of the first step
    int64_t steps;
    const float *drift, *noise;  // [steps]
    bool noise_first, clamps, clips, clips_norm;
    float low, high, clip, clip_norm;
    const uint8_t* frozen;  // [size], [chains][size] or null
    int64_t frozen_stride;  // 0 or size
    int64_t* faults;        // [chains]
    float* energies;        // for `energies`: [n_units][chains]; of samplers that accept or reject: [chains], where they stand
    ChainDynamics dynamics;
    // Of samplers that accept or reject; clamps, low and high are the bounds of the domain.
    int leapfrogs;
    const float* mass;  // [size], null: ones
    float* accepted;    // [chains]: proposals accepted are added
    WarmUp warm_up;
    uint32_t accept_stream;
    ChainRows rows;
};

struct ChainKernels {
    int lanes, panel;  // chains per vector, outputs per panel of packed weights
    bool bf16;       // whether products of bfloat16 pairs exist
    void (*run)(const ChainArgs&, int64_t first, int count, int vectors, float* scratch);
    void (*energies)(const ChainArgs&, int64_t first, int count, int vectors, float* scratch);
    void (*activate)(int activation, const float* z, float* value, float* slope, int64_t n);  // for tests; n a multiple of 16
    double (*multiply_adds)(int64_t rounds);  // the roofline: flops done
};

// The next panel's outputs when `left` of them remain: a full panel, else a power of two.
static inline int panel_size(int panel, int left) {
    if (left >= panel) return panel;
    int size = 1;
    while (2 * size <= left) size *= 2;
    return size;
}

}  // namespace ebmfast
