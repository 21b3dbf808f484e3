// A tile of chains of one instruction set: energies and gradients of every unit, the program's values and weights, the combined
// gradient, the noise. What samplers do with them is in chain_langevin.h and chain_metropolis.h.
//
// Products of matrices keep a block of `panel` outputs x `vectors` of chains in registers and broadcast the weights. No STL.
#pragma once

#include <stddef.h>

#include "chain_kernels.h"
#include "simd.h"

namespace ebmfast {
namespace {

using V = VectorLane;
using F = V::F;
using I = V::I;
using M = V::M;
constexpr int W = V::width;
constexpr int kPanel = W == 16 ? 12 : 6;  // of 32 and 16 registers
constexpr bool kPairsOfRegisters = W == 16;  // the noise of two registers at a time

struct FloatProduct {
    using Weight = float;
    using Input = float;
    static EBMFAST_HD int rows(int inputs) { return inputs; }
    static EBMFAST_HD F load(const float* p) { return V::load(p); }
    static EBMFAST_HD F spread(float w) { return V::set(w); }
    static EBMFAST_HD F add(F acc, F w, F h) { return V::fma(w, h, acc); }
    using Operand = F;
};

#if defined(__AVX512BF16__)
struct PairProduct {
    using Weight = uint32_t;
    using Input = uint32_t;
    static EBMFAST_HD int rows(int inputs) { return (inputs + 1) / 2; }
    static EBMFAST_HD I load(const uint32_t* p) { return V::load_int(p); }
    static EBMFAST_HD I spread(uint32_t w) { return V::set_int(w); }
    static EBMFAST_HD F add(F acc, I w, I h) { return V::dot_pairs(w, h, acc); }
    using Operand = I;
};
#endif

// What becomes of a product p: p + shift, scale p + shift, or p times what `out` holds. The stride is 0 for one value per output.
struct Epilogue {
    const float *shift, *scale;
    int stride;
    bool multiply;
};

EBMFAST_HD F of_output(const float* p, int stride, int output, int lane) {
    return stride == 0 ? V::set(p[output]) : V::load(p + output * stride + lane);
}

// out[output + 0 .. J) of N vectors of chains.
template <class P, int N, int J>
void panel(const typename P::Weight* w, const typename P::Input* h, int rows, int output, float* out, const Epilogue& e) {
    constexpr int T = N * W;
    F sum[J][N];
    const bool start = e.shift != nullptr && e.scale == nullptr;
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j) {
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) sum[j][v] = start ? of_output(e.shift, e.stride, output + j, v * W) : V::set(0.0f);
    }
    for (int i = 0; i < rows; ++i, w += J, h += T) {
        typename P::Operand in[N];
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) in[v] = P::load(h + v * W);
#pragma GCC unroll 12
        for (int j = 0; j < J; ++j) {
            const auto weight = P::spread(w[j]);
#pragma GCC unroll 2
            for (int v = 0; v < N; ++v) sum[j][v] = P::add(sum[j][v], weight, in[v]);
        }
    }
    out += output * T;
#pragma GCC unroll 12
    for (int j = 0; j < J; ++j) {
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) {
            F y = sum[j][v];
            if (e.scale != nullptr) {
                const F scale = of_output(e.scale, e.stride, output + j, v * W);
                y = V::fma(y, scale, of_output(e.shift, e.stride, output + j, v * W));
            }
            float* p = out + j * T + v * W;
            V::store(p, e.multiply ? V::mul(y, V::load(p)) : y);
        }
    }
}

template <class P, int N>
void product(const typename P::Weight* w, const typename P::Input* h, int inputs, int outputs, float* out, const Epilogue& e) {
    const int rows = P::rows(inputs);
    for (int done = 0, size; done < outputs; done += size, w += size * rows) {
        size = panel_size(kPanel, outputs - done);
        switch (size) {
            case kPanel: panel<P, N, kPanel>(w, h, rows, done, out, e); break;
            case 8: panel<P, N, kPanel == 12 ? 8 : 1>(w, h, rows, done, out, e); break;
            case 4: panel<P, N, 4>(w, h, rows, done, out, e); break;
            case 2: panel<P, N, 2>(w, h, rows, done, out, e); break;
            default: panel<P, N, 1>(w, h, rows, done, out, e); break;
        }
    }
}

// Rows of z become activations, unless `keep` is false, and slope = activation'(z) times `factor` and `scale` (null: 1).
struct Activate {
    float *z, *slope;
    int rows;
    const float *factor, *scale;  // factor [rows]; scale as in Epilogue
    int scale_stride;
    const float* read_out;  // adds read_out . activation to `energy`; or null
    float* energy;
};

template <int N, Activation a, bool keep> void activate_rows(const Activate& t) {
    constexpr int T = N * W;
    F energy[N];
    for (int v = 0; v < N; ++v) energy[v] = V::set(0.0f);
    for (int j = 0; j < t.rows; ++j) {
#pragma GCC unroll 2
        for (int v = 0; v < N; ++v) {
            float* z = t.z + j * T + v * W;
            const Slope<V> s = activate<V>(a, V::load(z));
            if (keep) V::store(z, s.value);
            if (!keep && t.read_out != nullptr) energy[v] = V::fma(V::set(t.read_out[j]), s.value, energy[v]);
            if (t.slope != nullptr) {
                F d = s.derivative;
                if (t.factor != nullptr) d = V::mul(d, V::set(t.factor[j]));
                if (t.scale != nullptr) d = V::mul(d, of_output(t.scale, t.scale_stride, j, v * W));
                V::store(t.slope + j * T + v * W, d);
            }
        }
    }
    if (!keep && t.read_out != nullptr) {
        for (int v = 0; v < N; ++v) V::store(t.energy + v * W, V::add(V::load(t.energy + v * W), energy[v]));
    }
}

template <int N, bool keep> void activate_layer(Activation a, const Activate& t) {
    switch (a) {
        case Activation::silu: activate_rows<N, Activation::silu, keep>(t); break;
        case Activation::relu: activate_rows<N, Activation::relu, keep>(t); break;
        case Activation::tanh: activate_rows<N, Activation::tanh, keep>(t); break;
        case Activation::softplus: activate_rows<N, Activation::softplus, keep>(t); break;
        case Activation::gelu: activate_rows<N, Activation::gelu, keep>(t); break;
        case Activation::gelu_tanh: activate_rows<N, Activation::gelu_tanh, keep>(t); break;
    }
}

template <int N> void to_pairs(const float* rows, int n, float* pairs) {
#if defined(__AVX512BF16__)
    constexpr int T = N * W;
    uint32_t* to = reinterpret_cast<uint32_t*>(pairs);
    for (int i = 0; i < n; i += 2, rows += 2 * T, to += T) {
        for (int v = 0; v < N; ++v) {
            const F high = i + 1 < n ? V::load(rows + T + v * W) : V::set(0.0f);
            V::store_int(to + v * W, V::pair(V::load(rows + v * W), high));
        }
    }
#else
    (void)rows, (void)n, (void)pairs;
#endif
}

template <int N> class Tile {
public:
    static constexpr int T = N * W;

    Tile(const ChainArgs& a, int64_t first, int count, float* scratch)
        : a_(a), first_(first), count_(count), s_(scratch), size_(int(a.size)), keys_({uint32_t(a.id.seed), uint32_t(a.id.seed >> 32)}) {
        load_rows(a.x + first * a.size, a.size, size_, row(a.rows.x));
        for (int64_t i = size_; i < a.rows.padded; ++i) {  // rows that no chain has, so that four can always be moved
            fill(a.rows.x + i, 0.0f);
            fill(a.rows.moved + i, 0.0f);
            for (int u = 0; u < a.n_units; ++u) fill(a.rows.gradients + u * a.rows.padded + i, 0.0f);
        }
        for (int u = 0; u < a.n_units; ++u) {
            for (int l = 0; l < a.units[u].n_layers; ++l) {
                if (a.units[u].layers[l].own_rows >= 0) fold(a.units[u].layers[l]);
            }
        }
    }

    void energies() {
        const float* x = row(a_.rows.x);
        for (int u = 0; u < a_.n_units; ++u) {
            float* e = row(a_.rows.energies + u);
            evaluate<true, false>(a_.units[u], x, nullptr, e);
            for (int c = 0; c < count_; ++c) a_.energies[u * a_.chains + first_ + c] = e[c];
        }
    }

protected:
    float* row(int64_t r) { return s_ + r * T; }
    uint32_t* words(int64_t r) { return reinterpret_cast<uint32_t*>(row(r)); }
    float* conditions(int r) { return row(a_.rows.conditions + r); }
    static void swap(float*& a, float*& b) {
        float* t = a;
        a = b, b = t;
    }

    // [count][stride] to [n][T]; the lanes past `count` repeat the last chain.
    void load_rows(const float* from, int64_t stride, int n, float* to) {
        for (int c = 0; c < T; ++c) {
            const float* p = from + (c < count_ ? c : count_ - 1) * stride;
            for (int i = 0; i < n; ++i) to[i * T + c] = p[i];
        }
    }

    void fold(const ChainLayer& layer) {
        const ChainConditioning& k = layer.conditioning;
        float *c = row(a_.rows.condition), *shifts = conditions(layer.own_rows), *scales = conditions(layer.own_rows + layer.out);
        load_rows(a_.conditions[k.slot] + first_ * k.width, k.width, k.width, c);
        for (int j = 0; j < layer.out; ++j) {
            for (int v = 0; v < T; v += W) {
                F scale = V::set(1.0f), shift = V::set(k.shift_bias != nullptr ? k.shift_bias[j] : 0.0f);
                for (int i = 0; i < k.width && k.shift_weight != nullptr; ++i) {
                    shift = V::fma(V::set(k.shift_weight[j * k.shift_stride + i]), V::load(c + i * T + v), shift);
                }
                if (k.scale_weight != nullptr) {
                    F sum = V::set(k.scale_bias != nullptr ? k.scale_bias[j] : 0.0f);
                    for (int i = 0; i < k.width; ++i) sum = V::fma(V::set(k.scale_weight[j * k.scale_stride + i]), V::load(c + i * T + v), sum);
                    scale = V::add(scale, sum);
                    V::store(scales + j * T + v, scale);
                }
                V::store(shifts + j * T + v, V::fma(scale, V::set(k.bias != nullptr ? k.bias[j] : 0.0f), shift));
            }
        }
    }

    struct Affine {
        const float *shift, *scale;
        int stride;
    };

    Affine affine(const ChainLayer& l) {
        if (l.own_rows < 0) return {l.shift, l.scale, 0};
        return {conditions(l.own_rows), l.conditioning.scale_weight != nullptr ? conditions(l.own_rows + l.out) : nullptr, T};
    }

    void store_rows(const float* from) {
        for (int c = 0; c < count_; ++c) {
            float* p = a_.x + (first_ + c) * a_.size;
            for (int i = 0; i < size_; ++i) p[i] = from[i * T + c];
        }
    }

    void start() {
        uint32_t *dead = words(a_.rows.faults), *low = words(a_.rows.lanes), *high = words(a_.rows.lanes + 1);
        any_held_ = a_.frozen != nullptr;
        for (int c = 0; c < T; ++c) {
            const uint64_t chain = a_.id.first_chain + uint64_t(first_ + c);
            low[c] = uint32_t(chain);
            high[c] = a_.id.stream << 28 | uint32_t(chain >> 32);
            dead[c] = c >= count_ || a_.faults[first_ + c] != 0 ? 0x80000000u : 0u;
            any_held_ |= dead[c] != 0 && c < count_;
        }
        if (a_.frozen == nullptr) return;
        for (int c = 0; c < T; ++c) {
            const uint8_t* frozen = a_.frozen + (first_ + (c < count_ ? c : count_ - 1)) * a_.frozen_stride;
            for (int i = 0; i < size_; ++i) words(a_.rows.frozen)[i * T + c] = frozen[i] != 0 ? 0x80000000u : 0u;
        }
    }

    template <bool energy> void gradients(const float* x) {
        for (int u = 0; u < a_.n_units; ++u) {
            evaluate<energy, true>(a_.units[u], x, row(a_.rows.gradients + u * a_.rows.padded), row(a_.rows.energies + u));
        }
    }

    template <bool energy, bool gradient> void evaluate(const ChainUnit& u, const float* x, float* g, float* e) {
        if (energy) {
            for (int v = 0; v < N; ++v) V::store(e + v * W, V::set(u.constant));
        }
        switch (u.kind) {
            case UnitKind::mlp: mlp<energy, gradient>(u, x, g, e); break;
            case UnitKind::diagonal: diagonal<energy, gradient>(u, x, g, e); break;
            case UnitKind::full: full<energy, gradient>(u, x, g, e); break;
            case UnitKind::quartic: quartic<energy, gradient>(u, x, g, e); break;
            case UnitKind::rosenbrock: rosenbrock<energy, gradient>(u, x, g, e); break;
        }
    }

    template <class P>
    void hidden(const typename P::Weight* w, const typename P::Input* h, const ChainLayer& l, float* out) {
        const Affine a = affine(l);
        product<P, N>(w, h, l.in, l.out, out, {a.shift, a.scale, a.stride, false});
    }

    // Forward: slopes of layer l hold activation'(z_l) scale_l, the last one's times the read-out, which is dE/d(product of the layer).
    // Backward: slopes of layer l - 1 are multiplied by the transposed weights of layer l times the slopes of l.
    template <bool energy, bool gradient> void mlp(const ChainUnit& u, const float* x, float* g, float* e) {
        const float* h = x;
        float *z = row(a_.rows.ping), *other = row(a_.rows.pong), *slope = row(a_.rows.slopes);
        [[maybe_unused]] float* pairs = row(a_.rows.pairs);
        for (int l = 0; l < u.n_layers; ++l) {
            const ChainLayer& layer = u.layers[l];
            const bool last = l + 1 == u.n_layers;
#if defined(__AVX512BF16__)
            if (layer.forward16 != nullptr) {
                to_pairs<N>(h, layer.in, pairs);
                hidden<PairProduct>(layer.forward16, reinterpret_cast<const uint32_t*>(pairs), layer, z);
            } else
#endif
            {
                hidden<FloatProduct>(layer.forward, h, layer, z);
            }
            const Affine own = affine(layer);
            const Activate task{z, gradient ? slope : nullptr, layer.out, last ? u.read_out : nullptr, own.scale, own.stride,
                                energy ? u.read_out : nullptr, e};
            last ? activate_layer<N, false>(layer.activation, task) : activate_layer<N, true>(layer.activation, task);
            slope += layer.out * T;
            h = z;
            swap(z, other);
        }
        if (u.n_layers == 0) linear<energy, gradient>(u, x, g, e);
        if (!gradient) return;
        for (int l = u.n_layers - 1; l >= 0; --l) {
            const ChainLayer& layer = u.layers[l];
            slope -= layer.out * T;
            const Epilogue into{nullptr, nullptr, 0, l > 0};
            float* out = l > 0 ? slope - layer.in * T : g;
#if defined(__AVX512BF16__)
            if (layer.backward16 != nullptr) {
                to_pairs<N>(slope, layer.out, pairs);
                product<PairProduct, N>(layer.backward16, reinterpret_cast<const uint32_t*>(pairs), layer.out, layer.in, out, into);
                continue;
            }
#endif
            product<FloatProduct, N>(layer.backward, slope, layer.out, layer.in, out, into);
        }
    }

    template <bool energy, bool gradient> void linear(const ChainUnit& u, const float* x, float* g, float* e) {
        for (int i = 0; i < size_; ++i) {
            const F w = V::set(u.read_out[i]);
            for (int v = 0; v < N; ++v) {
                if (gradient) V::store(g + i * T + v * W, w);
                if (energy) V::store(e + v * W, V::fma(w, V::load(x + i * T + v * W), V::load(e + v * W)));
            }
        }
    }

    template <bool energy, bool gradient> void diagonal(const ChainUnit& u, const float* x, float* g, float* e) {
        F sum[N];
        for (int v = 0; v < N; ++v) sum[v] = V::set(0.0f);
        for (int i = 0; i < size_; ++i) {
            const F mean = V::set(u.mean[i]), precision = V::set(u.precision[i]);
            for (int v = 0; v < N; ++v) {
                const F d = V::sub(V::load(x + i * T + v * W), mean), p = V::mul(precision, d);
                if (gradient) V::store(g + i * T + v * W, p);
                if (energy) sum[v] = V::fma(d, p, sum[v]);
            }
        }
        add_energy<energy>(e, sum, 0.5f);
    }

    template <bool energy, bool gradient> void full(const ChainUnit& u, const float* x, float* g, float* e) {
        float *d = row(a_.rows.ping), *p = gradient ? g : row(a_.rows.pong);
        for (int i = 0; i < size_; ++i) {
            const F mean = V::set(u.mean[i]);
            for (int v = 0; v < N; ++v) V::store(d + i * T + v * W, V::sub(V::load(x + i * T + v * W), mean));
        }
        product<FloatProduct, N>(u.precision, d, size_, size_, p, {nullptr, nullptr, 0, false});
        if (!energy) return;
        F sum[N];
        for (int v = 0; v < N; ++v) sum[v] = V::set(0.0f);
        for (int i = 0; i < size_; ++i) {
            for (int v = 0; v < N; ++v) sum[v] = V::fma(V::load(d + i * T + v * W), V::load(p + i * T + v * W), sum[v]);
        }
        add_energy<energy>(e, sum, 0.5f);
    }

    template <bool energy, bool gradient> void quartic(const ChainUnit& u, const float* x, float* g, float* e) {
        const F a = V::set(u.a), a4 = V::set(4.0f * u.a), b = V::set(u.b), c = V::set(u.c);
        F sum[N];
        for (int v = 0; v < N; ++v) sum[v] = V::set(0.0f);
#pragma GCC unroll 2
        for (int i = 0; i < size_; ++i) {
#pragma GCC unroll 2
            for (int v = 0; v < N; ++v) {
                const F y = V::load(x + i * T + v * W), d = V::sub(V::mul(y, y), b);
                if (gradient) V::store(g + i * T + v * W, V::fma(V::mul(a4, y), d, c));
                if (energy) sum[v] = V::add(sum[v], V::fma(V::mul(a, d), d, V::mul(c, y)));
            }
        }
        add_energy<energy>(e, sum, 1.0f);
    }

    template <bool energy, bool gradient> void rosenbrock(const ChainUnit& u, const float* x, float* g, float* e) {
        const F a = V::set(u.a), b = V::set(u.b), b2 = V::set(2.0f * u.b), minus_two = V::set(-2.0f);
        for (int v = 0; v < N; ++v) {
            F sum = V::set(0.0f), carried = V::set(0.0f), y = V::load(x + v * W);
            for (int i = 0; i + 1 < size_; ++i) {
                const F next = V::load(x + (i + 1) * T + v * W), r = V::fnma(y, y, next), q = V::sub(a, y), br = V::mul(b2, r);
                if (gradient) V::store(g + i * T + v * W, V::fma(minus_two, V::fma(br, y, q), carried));
                if (energy) sum = V::fma(V::mul(b, r), r, V::fma(q, q, sum));
                carried = br;
                y = next;
            }
            if (gradient) V::store(g + (size_ - 1) * T + v * W, carried);
            if (energy) V::store(e + v * W, V::add(V::load(e + v * W), sum));
        }
    }

    template <bool energy> static void add_energy(float* e, const F* sum, float factor) {
        if (!energy) return;
        for (int v = 0; v < N; ++v) V::store(e + v * W, V::fma(V::set(factor), sum[v], V::load(e + v * W)));
    }

    // dE/dE_u of every unit by a reverse pass over the tree; `shares` hold the softmax of an OR in its children's upstream rows.
    void reverse_pass() {
        for (int u = 0; u < a_.n_units; ++u) fill(a_.rows.weights + u, 0.0f);
        fill(a_.rows.upstream + a_.n_nodes - 1, 1.0f);
        for (int i = a_.n_nodes - 1; i >= 0; --i) {
            const ChainNode& node = a_.nodes[i];
            const float *up = row(a_.rows.upstream + i), *w = a_.values + node.first_value;
            if (node.code == kLeaf) {
                float* to = row(a_.rows.weights + node.unit);
                for (int v = 0; v < T; v += W) V::store(to + v, V::add(V::load(to + v), V::load(up + v)));
                continue;
            }
            for (int c = 0; c < node.n_children; ++c) {
                float* to = row(a_.rows.upstream + a_.children[node.first_child + c]);
                for (int v = 0; v < T; v += W) {
                    const F share = node.code == kSum ? V::set(w[c]) : V::load(to + v);
                    V::store(to + v, V::mul(share, V::load(up + v)));
                }
            }
        }
    }

    void program_weights() {
        for (int i = 0; i < a_.n_nodes; ++i) {
            const ChainNode& node = a_.nodes[i];
            const float* w = a_.values + node.first_value;
            for (int v = 0; v < T; v += W) {
                F value = V::set(0.0f);
                if (node.code == kLeaf) {
                    value = V::load(row(a_.rows.energies + node.unit) + v);
                } else if (node.code == kSum) {
                    for (int c = 0; c < node.n_children; ++c) value = V::fma(V::set(w[c]), child(node, c, v), value);
                } else {
                    value = logsumexp(node, w, v);
                }
                V::store(row(a_.rows.values + i) + v, value);
            }
        }
        reverse_pass();
    }

    F child(const ChainNode& node, int c, int v) { return V::load(row(a_.rows.values + a_.children[node.first_child + c]) + v); }

    // -(1/s) logsumexp(-s E_c + log w_c), w = (s, log w_0, ...); leaves the softmax in the children's upstream rows.
    F logsumexp(const ChainNode& node, const float* w, int v) {
        const F s = V::set(w[0]);
        F top = V::fnma(s, child(node, 0, v), V::set(w[1]));
        for (int c = 1; c < node.n_children; ++c) top = V::at_least(top, V::fnma(s, child(node, c, v), V::set(w[c + 1])));
        F sum = V::set(0.0f);
        for (int c = 0; c < node.n_children; ++c) {
            const F p = exponential<V>(V::sub(V::fnma(s, child(node, c, v), V::set(w[c + 1])), top));
            sum = V::add(sum, p);
            V::store(row(a_.rows.upstream + a_.children[node.first_child + c]) + v, p);
        }
        const F inverse = V::div(V::set(1.0f), sum);
        for (int c = 0; c < node.n_children; ++c) {
            float* p = row(a_.rows.upstream + a_.children[node.first_child + c]) + v;
            V::store(p, V::mul(V::load(p), inverse));
        }
        return V::div(V::sub(V::set(0.0f), V::add(top, logarithm<V>(sum))), s);
    }

    void fill(int64_t r, float value) {
        for (int v = 0; v < T; v += W) V::store(row(r) + v, V::set(value));
    }

    struct Rows {
        F v[4][N];
    };

    template <class Each> static EBMFAST_HD void each(Each f) {
#pragma GCC unroll 4
        for (int r = 0; r < 4; ++r) {
#pragma GCC unroll 2
            for (int v = 0; v < N; ++v) f(r, v);
        }
    }

    // sum_u w_u g_u, clipped elementwise.
    EBMFAST_HD void combined(int64_t first, Rows& g) {
        const float *p = row(a_.rows.gradients + first), *w = row(a_.rows.weights);
        each([&](int r, int v) { g.v[r][v] = V::mul(V::load(w + v * W), V::load(p + r * T + v * W)); });
        for (int u = 1; u < a_.n_units; ++u) {
            p += a_.rows.padded * T, w += T;
            each([&](int r, int v) { g.v[r][v] = V::fma(V::load(w + v * W), V::load(p + r * T + v * W), g.v[r][v]); });
        }
        if (!a_.clips) return;
        const F high = V::set(a_.clip), low = V::set(-a_.clip);
        each([&](int r, int v) { g.v[r][v] = V::at_most(high, V::at_least(low, g.v[r][v])); });
    }

    // Writes the combined gradient, clipped elementwise.
    void combine(float* out) {
        for (int64_t first = 0; first < size_; first += 4) {
            Rows g;
            combined(first, g);
            each([&](int r, int v) { V::store(out + (first + r) * T + v * W, g.v[r][v]); });
        }
    }

    // Scales a gradient to a norm of at most clip_norm: NaN where the norm is not finite, so that nothing moves.
    void clip_norm(float* out) {
        F largest[N], sum[N];
        for (int v = 0; v < N; ++v) largest[v] = V::set(1e-30f), sum[v] = V::set(0.0f);
        const auto moving = [&](int64_t i, int v) {
            const F y = V::load(out + i * T + v * W);
            return a_.frozen != nullptr ? V::select(frozen(i, v), V::set(0.0f), y) : y;
        };
        for (int i = 0; i < size_; ++i) {
            for (int v = 0; v < N; ++v) largest[v] = V::at_least(largest[v], absolute<V>(moving(i, v)));
        }
        for (int i = 0; i < size_; ++i) {
            for (int v = 0; v < N; ++v) {
                const F y = V::div(moving(i, v), largest[v]);  // no square overflows
                sum[v] = V::fma(y, y, sum[v]);
            }
        }
        const F limit = V::set(a_.clip_norm), one = V::set(1.0f);
        for (int v = 0; v < N; ++v) {
            const F norm = V::mul(largest[v], V::sqrt(sum[v]));
            const F factor = V::select(V::less(limit, norm), V::div(limit, norm), one);
            sum[v] = V::add(factor, V::sub(norm, norm));  // 0, or NaN where the norm is not finite
        }
        for (int i = 0; i < size_; ++i) {
            for (int v = 0; v < N; ++v) V::store(out + i * T + v * W, V::mul(sum[v], V::load(out + i * T + v * W)));
        }
    }

    M frozen(int64_t i, int v) { return V::sign(V::load_int(words(a_.rows.frozen + i) + v * W)); }

    // Philox's counters of a step: they serve all its blocks. A tile's chains have the same upper word.
    void start_noise(uint32_t step) {
        const uint32_t* low = words(a_.rows.lanes);
        for (int v = 0; v < N; ++v) {
            const ChainCounter<V> c = at_step<V>(V::mul_wide(V::widen(V::load_int(low + v * W)), kMultiply1), step, keys_);
            V::store_wide(words(a_.rows.counters) + 2 * v * W, c.chain);
            V::store_wide(words(a_.rows.counters + 2) + 2 * v * W, c.product);
            V::store_wide(words(a_.rows.counters + 4) + 2 * v * W, c.upper_half);
        }
    }

    template <class L> EBMFAST_HD Quad<L> normals_of(uint32_t block, int v) {
        const int at = 2 * v * W;
        const ChainCounter<L> c{L::load_wide(words(a_.rows.counters) + at), L::load_wide(words(a_.rows.counters + 2) + at),
                                L::load_wide(words(a_.rows.counters + 4) + at)};
        return normals<L>(philox<L>(c, block, words(a_.rows.lanes + 1)[0], keys_));
    }

    // Row r of z: element 4 block + r of every chain, at the step of start_noise.
    EBMFAST_HD void normals_of_block(uint32_t block, Rows& z) {
        if constexpr (N == 2 && kPairsOfRegisters) {
            const Quad<Twice<V>> q = normals_of<Twice<V>>(block, 0);
            for (int r = 0; r < 4; ++r) z.v[r][0] = q.v[r].a, z.v[r][1] = q.v[r].b;
        } else {
            for (int v = 0; v < N; ++v) {
                const Quad<V> q = normals_of<V>(block, v);
                for (int r = 0; r < 4; ++r) z.v[r][v] = q.v[r];
            }
        }
    }

    // The lane's chain stops, after step `step`; culprit: 1 + a leaf, or 0.
    void fault(int lane, uint32_t step, int64_t culprit) {
        uint32_t& dead = words(a_.rows.faults)[lane];
        if (dead != 0) return;
        dead = 0x80000000u;
        any_held_ = true;
        a_.faults[first_ + lane] = ((int64_t(step) + 1) << 16) + culprit;
    }

    bool finite_energy(int u, int lane) { return finite(row(a_.rows.energies + u)[lane]); }

    // Where the chain may move.
    bool finite_gradient(int u, int lane) {
        const float* g = row(a_.rows.gradients + u * a_.rows.padded);
        for (int i = 0; i < size_; ++i) {
            if (!finite(g[i * T + lane]) && (a_.frozen == nullptr || words(a_.rows.frozen + i)[lane] == 0)) return false;
        }
        return true;
    }

    static bool finite(float y) { return ScalarLane::finite(y); }

    const ChainArgs& a_;
    const int64_t first_;
    const int count_;
    float* const s_;
    const int size_;
    const KeySchedule keys_;
    bool any_held_ = false;
};

}  // namespace
}  // namespace ebmfast
