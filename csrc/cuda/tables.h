// A composition as it lies in the memory of a device, and how the parameters in it follow those of the modules.
#pragma once

#include <stdint.h>

#include "../chain_kernels.h"
#include "warp.h"

namespace ebmfast {
namespace cuda {

constexpr int kWarps = 8, kThreads = kWarps * kWarp;  // of a block of chain_block.h
// Sums over a chain's elements are added up as this many, element i in sum i % kShares, whatever the number of threads.
constexpr int kShares = 32;
constexpr int kMaxSlots = 16;  // the addresses of conditions travel as a kernel argument

// y = M h, M [outputs][inputs]. `words` are packed for a warp that computes 16 outputs at a time:
//   float32   [inputs][outputs], outputs rounded up to 16
//   others    the fragments A of multiply() one after the other, as many inputs as they have columns, lane by lane: a warp reads 512 bytes
//             in a row. Rows g and g + 8 of a fragment are outputs 2g and 2g + 1, so that a lane's results are neighbours and
//             pairs of the next product's bfloat16.
// What lies outside M is 0.
struct Matrix {
    uint32_t* words;
    const float* source;  // element (o, i) is source[o * output_stride + i * input_stride]
    int64_t output_stride, input_stride;
    int outputs, inputs;
    Product kind;
};

struct Layer {
    int in, out;
    Activation activation;
    bool scales;
    Matrix forward, backward;
    const float *shift, *scale;  // [out] or null; not used where own_rows >= 0
    int own_rows, slopes;        // rows of the chains' own shifts, then scales, or -1; rows of slopes within those of the unit
    ChainConditioning conditioning;
};

struct Unit {
    UnitKind kind;
    int leaf, n_layers, n_partials;  // partial sums of its energy
    float constant, a, b, c;
    const float *mean, *precision, *read_out;
    const Layer* layers;  // of a full Gaussian: one, whose product is that with the precision
};

// One thing to be read anew before a run: item i of `count`.
struct Job {
    enum Kind : int { pack, fold, constant } kind;
    int64_t count;
    Matrix matrix;
    ChainConditioning conditioning;  // and the condition that all chains share
    const float* fixed;
    float *shift, *scale;
    const float* from;
    float* to;
};

// Rows of a block's scratch, each a float (or a word) per chain.
struct Rows {
    int padded;  // of x, moved, combined and each unit's gradient: the size rounded up to 8
    int x, moved, gradients, combined, energies, weights, values, upstream, conditions, faults, partials, marks, slopes, ping, pong, total;
    int partials_each, slopes_each, wide;  // rows of a unit; slopes, ping and pong are those of `together` units
};

struct Arguments {
    ChainArgs chain;  // its tables, conditions and rows are not used here
    const Unit* units;
    const ChainNode* nodes;
    const int* children;
    const float* values;
    const float* conditions[kMaxSlots];
    int n_units, n_nodes;
    Rows rows;
    int together;          // units that are evaluated at a time
    int deepest;           // most layers of a unit
    bool has_coordinates, has_neighbours;  // whether a unit needs more than products; whether one looks at neighbouring elements
    const uint32_t* packed;
    int packed_words;  // from there; copied to shared memory where `staged`
    bool staged;
    int shift;      // of chain_registers: log2 of a chain's threads
    float* memory;  // scratch of all blocks, or null for shared memory
};

namespace {

// A row of scratch holds C chains, and room behind them where that keeps a fragment's loads in 32 different banks.
EBMFAST_HD constexpr int row_stride(int chains) { return chains == 8 ? 8 : chains + 8; }
EBMFAST_HD constexpr int round_up(int n, int to) { return (n + to - 1) / to * to; }
EBMFAST_HD constexpr int depth_of(Product kind) { return kind == Product::bf16 ? 16 : 8; }  // columns of a fragment

EBMFAST_HD int64_t words_of(Product kind, int outputs, int inputs) {
    const int64_t rows = round_up(outputs, 16);
    if (kind == Product::float32) return rows * inputs;
    return rows * round_up(inputs, depth_of(kind)) / (kind == Product::bf16 ? 2 : 1);
}

EBMFAST_HD float element(const Matrix& m, int o, int i) {
    return o < m.outputs && i < m.inputs ? m.source[o * m.output_stride + i * m.input_stride] : 0.0f;
}

EBMFAST_HD uint32_t packed_word(const Matrix& m, int64_t word) {
    if (m.kind == Product::float32) {
        const int rows = round_up(m.outputs, 16);
        return ScalarLane::as_int(element(m, int(word % rows), int(word / rows)));
    }
    const int part = int(word % 4), lane = int(word / 4 % kWarp), g = lane / 4, t = lane % 4;
    const int depth = depth_of(m.kind), across = round_up(m.inputs, depth) / depth;
    const int64_t tile = word / (4 * kWarp);
    const int o = int(tile / across) * 16 + 2 * g + part % 2, first = int(tile % across) * depth;
    if (m.kind == Product::tf32) return tf32(element(m, o, first + t + part / 2 * 4));
    const int i = first + 2 * t + part / 2 * 8;
    return bf16_pair(element(m, o, i), element(m, o, i + 1));
}

// Shift and scale of output j under condition c: see ChainConditioning.
EBMFAST_HD void condition_on(const ChainConditioning& k, const float* c, int j, float& shift, float& scale) {
    using G = ScalarLane;
    shift = k.shift_bias != nullptr ? k.shift_bias[j] : 0.0f;
    for (int i = 0; i < k.width && k.shift_weight != nullptr; ++i) shift = G::fma(k.shift_weight[j * k.shift_stride + i], c[i], shift);
    scale = k.scale_bias != nullptr ? k.scale_bias[j] : 0.0f;
    for (int i = 0; i < k.width && k.scale_weight != nullptr; ++i) scale = G::fma(k.scale_weight[j * k.scale_stride + i], c[i], scale);
    scale = G::add(1.0f, scale);
    shift = G::fma(scale, k.bias != nullptr ? k.bias[j] : 0.0f, shift);
}

EBMFAST_HD void do_job(const Job& job, int64_t i) {
    if (job.kind == Job::pack) {
        job.matrix.words[i] = packed_word(job.matrix, i);
    } else if (job.kind == Job::constant) {
        *job.to = *job.from;
    } else {
        float shift, scale;
        condition_on(job.conditioning, job.fixed, int(i), shift, scale);
        job.shift[i] = shift;
        if (job.scale != nullptr) job.scale[i] = scale;
    }
}

// The program's tree for one chain; value(row) is where the chain keeps it.
template <class At> EBMFAST_HD void program_values(const Arguments& a, At at) {
    using G = ScalarLane;
    for (int i = 0; i < a.n_nodes; ++i) {
        const ChainNode& node = a.nodes[i];
        const float* w = a.values + node.first_value;
        const int* children = a.children + node.first_child;
        const auto child = [&](int c) { return at(a.rows.values + children[c]); };
        float value = 0.0f;
        if (node.code == kLeaf) {
            value = at(a.rows.energies + node.unit);
        } else if (node.code == kSum) {
            for (int c = 0; c < node.n_children; ++c) value = G::fma(w[c], child(c), value);
        } else {
            float top = G::fnma(w[0], child(0), w[1]), sum = 0.0f;
            for (int c = 1; c < node.n_children; ++c) top = G::at_least(top, G::fnma(w[0], child(c), w[c + 1]));
            for (int c = 0; c < node.n_children; ++c) {
                const float p = exponential<G>(G::sub(G::fnma(w[0], child(c), w[c + 1]), top));
                sum = G::add(sum, p);
                at(a.rows.upstream + children[c]) = p;
            }
            for (int c = 0; c < node.n_children; ++c) {
                float& share = at(a.rows.upstream + children[c]);
                share = G::div(share, sum);
            }
            value = G::div(G::sub(0.0f, G::add(top, logarithm<G>(sum))), w[0]);
        }
        at(a.rows.values + i) = value;
    }
}

// The weight of every unit's gradient, from the softmaxes that program_values left in the upstream rows.
template <class At> EBMFAST_HD void program_weights(const Arguments& a, At at) {
    using G = ScalarLane;
    for (int u = 0; u < a.n_units; ++u) at(a.rows.weights + u) = 0.0f;
    at(a.rows.upstream + a.n_nodes - 1) = 1.0f;
    for (int i = a.n_nodes - 1; i >= 0; --i) {
        const ChainNode& node = a.nodes[i];
        const float up = at(a.rows.upstream + i);
        if (node.code == kLeaf) {
            float& w = at(a.rows.weights + node.unit);
            w = G::add(w, up);
        }
        for (int c = 0; c < node.n_children; ++c) {
            float& to = at(a.rows.upstream + a.children[node.first_child + c]);
            to = G::mul(node.code == kSum ? a.values[node.first_value + c] : to, up);
        }
    }
}

// Slope at element i (value y, neighbours before and after) of an energy that is a sum over coordinates; adds its share to `sum`.
EBMFAST_HD float coordinate(const Unit& u, int i, int size, float y, float before, float after, float mean, float precision, float& sum) {
    using G = ScalarLane;
    if (u.kind == UnitKind::diagonal) {
        const float d = G::sub(y, mean), slope = G::mul(precision, d);
        sum = G::fma(d, slope, sum);
        return slope;
    }
    if (u.kind == UnitKind::quartic) {
        const float d = G::sub(G::mul(y, y), u.b);
        sum = G::add(sum, G::fma(G::mul(u.a, d), d, G::mul(u.c, y)));
        return G::fma(G::mul(4.0f * u.a, y), d, u.c);
    }
    if (u.kind == UnitKind::mlp) {  // without layers
        sum = G::fma(mean, y, sum);
        return mean;
    }
    float slope = i > 0 ? G::mul(2.0f * u.b, G::fnma(before, before, y)) : 0.0f;
    if (i + 1 < size) {
        const float r = G::fnma(y, y, after), q = G::sub(u.a, y);
        slope = G::fma(-2.0f, G::fma(G::mul(2.0f * u.b, r), y, q), slope);
        sum = G::fma(G::mul(u.b, r), r, G::fma(q, q, sum));
    }
    return slope;
}

EBMFAST_HD float energy_factor(UnitKind kind) { return kind == UnitKind::full || kind == UnitKind::diagonal ? 0.5f : 1.0f; }

// Vectors that `coordinate` takes at element i: (mean, precision), or the read-out for a mean.
EBMFAST_HD Pair vectors_at(const Unit& u, int i) {
    if (u.kind == UnitKind::diagonal) return {u.mean[i], u.precision[i]};
    return {u.kind == UnitKind::mlp ? u.read_out[i] : 0.0f, 0.0f};
}

EBMFAST_HD Quad<ScalarLane> chain_normals(const NoiseId& id, uint64_t row, uint32_t block, uint32_t step) {
    const uint64_t chain = id.first_chain + row;
    const Key key{uint32_t(id.seed), uint32_t(id.seed >> 32)};
    return normals<ScalarLane>(philox<ScalarLane>(block, step, uint32_t(chain), id.stream << 28 | uint32_t(chain >> 32), key));
}

// One element's move, as ebmfast/reference.py has it; `lost`: it is not finite, which leaves x.
EBMFAST_HD float moved(const ChainArgs& a, float x, bool gradient, float slope, float drift, float noise, float z, bool held, bool& lost) {
    using G = ScalarLane;
    float t = x;
    if (gradient) t = G::sub(t, G::mul(drift, slope));
    if (noise != 0.0f) t = G::add(t, G::mul(noise, z));
    const bool finite = G::finite(t);
    lost = lost || (!finite && !held);
    t = finite ? t : x;
    if (gradient && a.clamps) t = G::at_most(a.high, G::at_least(a.low, t));
    return held ? x : t;
}

// What the composed gradient is multiplied by; NaN where its norm is not finite.
EBMFAST_HD float norm_factor(float limit, float norm) {
    using G = ScalarLane;
    return G::add(norm > limit ? G::div(limit, norm) : 1.0f, G::sub(norm, norm));
}

EBMFAST_HD float clipped(const ChainArgs& a, float slope) {
    return a.clips ? ScalarLane::at_most(a.clip, ScalarLane::at_least(-a.clip, slope)) : slope;
}

}  // namespace
}  // namespace cuda
}  // namespace ebmfast
