// The chain engine as a block of GPU threads runs it: kWarps warps share 32 chains, lane = chain, warps divide rows (outputs of a layer,
// elements of the state) among themselves. One text for device and host: it is a sequence of phases, f(warp, lane) for every thread,
// with a barrier after each; on the host a phase is a loop. What a thread leaves for a later phase goes through scratch, and within a
// phase no thread reads what another one writes. So the host build, which the tests compare with the reference, proves everything but
// the launch and the barrier.
//
// Weights are plain here: `forward` is W transposed, [in][out], `backward` W itself, so that neighbouring outputs lie side by side.
#pragma once

#include "../chain_kernels.h"

namespace ebmfast {
namespace cuda {

constexpr int kLanes = 32, kWarps = 8;
constexpr int kOutputs = 8;  // of a layer that a thread sums up at a time

namespace {

using G = ScalarLane;

// Rows of scratch, each kLanes floats, that a block needs beside ChainRows: a partial sum and a mark per warp.
EBMFAST_HD int64_t block_rows(const ChainRows& rows) { return rows.total + 2 * kWarps; }

template <class Phase> class ChainBlock {
public:
    EBMFAST_HD ChainBlock(const ChainArgs& a, int64_t first, int count, float* scratch, Phase phase)
        : a_(a), first_(first), count_(count), s_(scratch), size_(int(a.size)), phase_(phase) {}

    EBMFAST_HD void run() {
        load();
        start();
        int64_t from = a_.rows.x, to = a_.rows.moved;
        if (!a_.has_or) phase_([&](int warp, int lane) { if (warp == 0) reverse_pass(lane); });
        for (int64_t i = 0; i < a_.steps; ++i) {
            const uint32_t step = a_.id.step + uint32_t(i);
            float noise = a_.noise[i];
            if (a_.noise_first) {
                if (noise != 0.0f) move(from, to, false, 0.0f, noise, step), swap(from, to);
                noise = 0.0f;
            }
            for (int u = 0; u < a_.n_units; ++u) evaluate(a_.units[u], u, from, a_.has_or, true);
            if (a_.has_or) {
                phase_([&](int warp, int lane) {
                    if (warp == 0) program_values(lane), reverse_pass(lane);
                });
            }
            move(from, to, true, a_.drift[i], noise, step);
            swap(from, to);
        }
        phase_([&](int warp, int lane) {
            if (lane >= count_) return;
            for (int i = warp; i < size_; i += kWarps) a_.x[(first_ + lane) * a_.size + i] = at(from + i, lane);
        });
    }

    EBMFAST_HD void energies() {
        load();
        for (int u = 0; u < a_.n_units; ++u) evaluate(a_.units[u], u, a_.rows.x, true, false);
        phase_([&](int warp, int lane) {
            if (lane >= count_) return;
            for (int u = warp; u < a_.n_units; u += kWarps) a_.energies[u * a_.chains + first_ + lane] = at(a_.rows.energies + u, lane);
        });
    }

private:
    EBMFAST_HD float& at(int64_t r, int lane) { return s_[r * kLanes + lane]; }
    EBMFAST_HD uint32_t word(int64_t r, int lane) { return G::as_int(at(r, lane)); }
    EBMFAST_HD void set_word(int64_t r, int lane, uint32_t w) { at(r, lane) = G::as_float(w); }
    EBMFAST_HD float& partial(int warp, int lane) { return at(a_.rows.total + warp, lane); }
    EBMFAST_HD float& mark(int warp, int lane) { return at(a_.rows.total + kWarps + warp, lane); }
    EBMFAST_HD int64_t chain_of(int lane) { return first_ + (lane < count_ ? lane : count_ - 1); }
    EBMFAST_HD static void swap(int64_t& a, int64_t& b) {
        const int64_t t = a;
        a = b, b = t;
    }

    EBMFAST_HD float total_of_partials(int lane) {
        float sum = partial(0, lane);
        for (int w = 1; w < kWarps; ++w) sum = G::add(sum, partial(w, lane));
        return sum;
    }

    // Chains past `count` repeat the last one.
    EBMFAST_HD void load() {
        phase_([&](int warp, int lane) {
            for (int i = warp; i < size_; i += kWarps) at(a_.rows.x + i, lane) = a_.x[chain_of(lane) * a_.size + i];
            for (int u = 0; u < a_.n_units; ++u) {
                for (int l = 0; l < a_.units[u].n_layers; ++l) fold(a_.units[u].layers[l], warp, lane);
            }
        });
    }

    EBMFAST_HD void fold(const ChainLayer& layer, int warp, int lane) {
        if (layer.own_rows < 0) return;
        const ChainConditioning& k = layer.conditioning;
        const float* c = a_.conditions[k.slot] + chain_of(lane) * k.width;
        for (int j = warp; j < layer.out; j += kWarps) {
            float scale = 1.0f, shift = k.shift_bias != nullptr ? k.shift_bias[j] : 0.0f;
            for (int i = 0; i < k.width && k.shift_weight != nullptr; ++i) shift = G::fma(k.shift_weight[j * k.shift_stride + i], c[i], shift);
            if (k.scale_weight != nullptr) {
                float sum = k.scale_bias != nullptr ? k.scale_bias[j] : 0.0f;
                for (int i = 0; i < k.width; ++i) sum = G::fma(k.scale_weight[j * k.scale_stride + i], c[i], sum);
                scale = G::add(scale, sum);
                at(a_.rows.conditions + layer.own_rows + layer.out + j, lane) = scale;
            }
            at(a_.rows.conditions + layer.own_rows + j, lane) = G::fma(scale, k.bias != nullptr ? k.bias[j] : 0.0f, shift);
        }
    }

    EBMFAST_HD void start() {
        phase_([&](int warp, int lane) {
            if (warp == 0) set_word(a_.rows.faults, lane, lane >= count_ || a_.faults[first_ + lane] != 0 ? 1u : 0u);
        });
    }

    EBMFAST_HD bool frozen(int64_t i, int lane) { return a_.frozen != nullptr && a_.frozen[chain_of(lane) * a_.frozen_stride + i] != 0; }

    // Energy and gradient of a unit; its energy is the sum of what the warps leave in `partial`.
    EBMFAST_HD void evaluate(const ChainUnit& u, int index, int64_t x, bool energy, bool gradient) {
        const int64_t g = a_.rows.gradients + index * a_.rows.padded;
        const float factor = u.kind == UnitKind::full || u.kind == UnitKind::diagonal ? 0.5f : 1.0f;
        switch (u.kind) {
            case UnitKind::mlp: mlp(u, x, g, gradient); break;
            case UnitKind::full: full(u, x, g); break;
            default: phase_([&](int warp, int lane) { partial(warp, lane) = coordinates(u, x, g, gradient, warp, lane); });
        }
        if (!energy) return;
        phase_([&](int warp, int lane) {
            if (warp == 0) at(a_.rows.energies + index, lane) = G::fma(factor, total_of_partials(lane), u.constant);
        });
    }

    EBMFAST_HD float coordinates(const ChainUnit& u, int64_t x, int64_t g, bool gradient, int warp, int lane) {
        float sum = 0.0f;
        for (int i = warp; i < size_; i += kWarps) {
            const float y = at(x + i, lane);
            float slope;
            if (u.kind == UnitKind::diagonal) {
                const float d = G::sub(y, u.mean[i]);
                slope = G::mul(u.precision[i], d);
                sum = G::fma(d, slope, sum);
            } else if (u.kind == UnitKind::quartic) {
                const float d = G::sub(G::mul(y, y), u.b);
                slope = G::fma(G::mul(4.0f * u.a, y), d, u.c);
                sum = G::add(sum, G::fma(G::mul(u.a, d), d, G::mul(u.c, y)));
            } else {
                const bool ahead = i + 1 < size_;
                const float before = i > 0 ? at(x + i - 1, lane) : 0.0f;
                slope = i > 0 ? G::mul(2.0f * u.b, G::fnma(before, before, y)) : 0.0f;
                if (ahead) {
                    const float r = G::fnma(y, y, at(x + i + 1, lane)), q = G::sub(u.a, y);
                    slope = G::fma(-2.0f, G::fma(G::mul(2.0f * u.b, r), y, q), slope);
                    sum = G::fma(G::mul(u.b, r), r, G::fma(q, q, sum));
                }
            }
            if (gradient) at(g + i, lane) = slope;
        }
        return sum;
    }

    EBMFAST_HD void full(const ChainUnit& u, int64_t x, int64_t g) {
        const int64_t d = a_.rows.ping;
        phase_([&](int warp, int lane) {
            for (int i = warp; i < size_; i += kWarps) at(d + i, lane) = G::sub(at(x + i, lane), u.mean[i]);
        });
        phase_([&](int warp, int lane) {
            float sum = 0.0f;
            product(u.precision, d, size_, size_, warp, lane, [&](int o, float p) {
                at(g + o, lane) = p;
                sum = G::fma(at(d + o, lane), p, sum);
            });
            partial(warp, lane) = sum;
        });
    }

    // each(o, sum_i w[i][o] h[i]) for this warp's outputs o.
    template <class Each> EBMFAST_HD void product(const float* w, int64_t h, int inputs, int outputs, int warp, int lane, Each each) {
        for (int first = warp * kOutputs; first < outputs; first += kWarps * kOutputs) {
            float sum[kOutputs] = {};
            const int left = outputs - first;
            if (left >= kOutputs) {
                for (int i = 0; i < inputs; ++i) {
                    const float y = at(h + i, lane);
                    const float* row = w + int64_t(i) * outputs + first;
#if defined(__CUDACC__)
#pragma unroll
#endif
                    for (int j = 0; j < kOutputs; ++j) sum[j] = G::fma(row[j], y, sum[j]);
                }
            } else {
                for (int i = 0; i < inputs; ++i) {
                    for (int j = 0; j < left; ++j) sum[j] = G::fma(w[int64_t(i) * outputs + first + j], at(h + i, lane), sum[j]);
                }
            }
            for (int j = 0; j < kOutputs && j < left; ++j) each(first + j, sum[j]);
        }
    }

    // As the CPU's: slopes hold activation'(z) scale, the last layer's times the read-out, and going back each layer's slopes are
    // multiplied by the transposed weights times those of the next. `partial` holds the energy until then.
    EBMFAST_HD void mlp(const ChainUnit& u, int64_t x, int64_t g, bool gradient) {
        int64_t h = x, z = a_.rows.ping, other = a_.rows.pong, slope = a_.rows.slopes;
        for (int l = 0; l < u.n_layers; ++l) {
            const ChainLayer& k = u.layers[l];
            const bool last = l + 1 == u.n_layers, own = k.own_rows >= 0;
            const bool scales = own ? k.conditioning.scale_weight != nullptr : k.scale != nullptr;
            phase_([&](int warp, int lane) {
                float sum = 0.0f;
                product(k.forward, h, k.in, k.out, warp, lane, [&](int o, float p) {
                    const int64_t row = a_.rows.conditions + k.own_rows + o;
                    const float shift = own ? at(row, lane) : k.shift != nullptr ? k.shift[o] : 0.0f;
                    const float scale = !scales ? 1.0f : own ? at(row + k.out, lane) : k.scale[o];
                    const Slope<G> s = activate<G>(k.activation, scales ? G::fma(p, scale, shift) : G::add(p, shift));
                    float d = last ? G::mul(s.derivative, u.read_out[o]) : s.derivative;
                    if (scales) d = G::mul(d, scale);
                    at(slope + o, lane) = d;
                    if (last) {
                        sum = G::fma(u.read_out[o], s.value, sum);
                    } else {
                        at(z + o, lane) = s.value;
                    }
                });
                if (last) partial(warp, lane) = sum;
            });
            slope += k.out;
            h = z;
            swap(z, other);
        }
        if (u.n_layers == 0) {
            phase_([&](int warp, int lane) {
                float sum = 0.0f;
                for (int i = warp; i < size_; i += kWarps) {
                    at(g + i, lane) = u.read_out[i];
                    sum = G::fma(u.read_out[i], at(x + i, lane), sum);
                }
                partial(warp, lane) = sum;
            });
        }
        if (!gradient) return;
        for (int l = u.n_layers - 1; l >= 0; --l) {
            const ChainLayer& k = u.layers[l];
            slope -= k.out;
            const int64_t out = l > 0 ? slope - k.in : g;
            phase_([&](int warp, int lane) {
                product(k.backward, slope, k.out, k.in, warp, lane, [&](int o, float p) {
                    float& y = at(out + o, lane);
                    y = l > 0 ? G::mul(p, y) : p;
                });
            });
        }
    }

    // The tree's values in postfix order, for one chain; an OR leaves its softmax in its children's upstream rows.
    EBMFAST_HD void program_values(int lane) {
        for (int i = 0; i < a_.n_nodes; ++i) {
            const ChainNode& node = a_.nodes[i];
            const float* w = a_.values + node.first_value;
            float value = 0.0f;
            if (node.code == kLeaf) {
                value = at(a_.rows.energies + node.unit, lane);
            } else if (node.code == kSum) {
                for (int c = 0; c < node.n_children; ++c) value = G::fma(w[c], child(node, c, lane), value);
            } else {
                float top = G::fnma(w[0], child(node, 0, lane), w[1]), sum = 0.0f;
                for (int c = 1; c < node.n_children; ++c) top = G::at_least(top, G::fnma(w[0], child(node, c, lane), w[c + 1]));
                for (int c = 0; c < node.n_children; ++c) {
                    const float p = exponential<G>(G::sub(G::fnma(w[0], child(node, c, lane), w[c + 1]), top));
                    sum = G::add(sum, p);
                    at(upstream(node, c), lane) = p;
                }
                for (int c = 0; c < node.n_children; ++c) at(upstream(node, c), lane) = G::div(at(upstream(node, c), lane), sum);
                value = G::div(G::sub(0.0f, G::add(top, logarithm<G>(sum))), w[0]);
            }
            at(a_.rows.values + i, lane) = value;
        }
    }

    EBMFAST_HD float child(const ChainNode& node, int c, int lane) { return at(a_.rows.values + a_.children[node.first_child + c], lane); }
    EBMFAST_HD int64_t upstream(const ChainNode& node, int c) { return a_.rows.upstream + a_.children[node.first_child + c]; }

    EBMFAST_HD void reverse_pass(int lane) {
        for (int u = 0; u < a_.n_units; ++u) at(a_.rows.weights + u, lane) = 0.0f;
        at(a_.rows.upstream + a_.n_nodes - 1, lane) = 1.0f;
        for (int i = a_.n_nodes - 1; i >= 0; --i) {
            const ChainNode& node = a_.nodes[i];
            const float up = at(a_.rows.upstream + i, lane);
            if (node.code == kLeaf) {
                float& w = at(a_.rows.weights + node.unit, lane);
                w = G::add(w, up);
            }
            for (int c = 0; c < node.n_children; ++c) {
                float& to = at(upstream(node, c), lane);
                to = G::mul(node.code == kSum ? a_.values[node.first_value + c] : to, up);
            }
        }
    }

    EBMFAST_HD float combined(int64_t i, int lane) {
        float sum = G::mul(at(a_.rows.weights, lane), at(a_.rows.gradients + i, lane));
        for (int u = 1; u < a_.n_units; ++u) {
            sum = G::fma(at(a_.rows.weights + u, lane), at(a_.rows.gradients + u * a_.rows.padded + i, lane), sum);
        }
        return a_.clips ? G::at_most(a_.clip, G::at_least(-a_.clip, sum)) : sum;
    }

    // The largest of the partial results.
    EBMFAST_HD float largest_partial(int lane) {
        float top = 1e-30f;
        for (int w = 0; w < kWarps; ++w) top = G::at_least(top, partial(w, lane));
        return top;
    }

    // The combined gradient, scaled to a norm of at most clip_norm: NaN where the norm is not finite.
    EBMFAST_HD void clip_norm() {
        phase_([&](int warp, int lane) {
            float top = 0.0f;
            for (int i = warp; i < size_; i += kWarps) {
                const float y = combined(i, lane);
                at(a_.rows.combined + i, lane) = y;
                if (!frozen(i, lane)) top = G::at_least(top, absolute<G>(y));
            }
            partial(warp, lane) = top;
        });
        phase_([&](int warp, int lane) {
            const float top = largest_partial(lane);
            float sum = 0.0f;
            for (int i = warp; i < size_; i += kWarps) {
                const float y = frozen(i, lane) ? 0.0f : G::div(at(a_.rows.combined + i, lane), top);
                sum = G::fma(y, y, sum);
            }
            mark(warp, lane) = sum;
        });
        phase_([&](int warp, int lane) {
            float sum = 0.0f;
            for (int w = 0; w < kWarps; ++w) sum = G::add(sum, mark(w, lane));
            const float norm = G::mul(largest_partial(lane), G::sqrt(sum));
            const float factor = G::add(norm > a_.clip_norm ? G::div(a_.clip_norm, norm) : 1.0f, G::sub(norm, norm));
            for (int i = warp; i < size_; i += kWarps) at(a_.rows.combined + i, lane) = G::mul(factor, at(a_.rows.combined + i, lane));
        });
    }

    EBMFAST_HD void move(int64_t from, int64_t to, bool gradient, float drift, float noise, uint32_t step) {
        if (gradient && a_.clips_norm) clip_norm();
        phase_([&](int warp, int lane) {
            const uint64_t chain = a_.id.first_chain + uint64_t(first_ + lane);
            const bool dead = word(a_.rows.faults, lane) != 0;
            bool lost = false;
            for (int block = warp; 4 * block < size_; block += kWarps) {
                Quad<G> z{};
                if (noise != 0.0f) {
                    const Key key{uint32_t(a_.id.seed), uint32_t(a_.id.seed >> 32)};
                    z = normals<G>(philox<G>(uint32_t(block), step, uint32_t(chain), a_.id.stream << 28 | uint32_t(chain >> 32), key));
                }
                for (int r = 0; r < 4 && 4 * block + r < size_; ++r) {
                    const int64_t i = 4 * block + r;
                    const float x = at(from + i, lane);
                    float t = x;
                    if (gradient) t = G::sub(t, G::mul(drift, a_.clips_norm ? at(a_.rows.combined + i, lane) : combined(i, lane)));
                    if (noise != 0.0f) t = G::add(t, G::mul(noise, z.v[r]));
                    const bool finite = G::finite(t), held = dead || frozen(i, lane);
                    lost = lost || (!finite && !held);
                    t = finite ? t : x;
                    if (gradient && a_.clamps) t = G::at_most(a_.high, G::at_least(a_.low, t));
                    at(to + i, lane) = held ? x : t;
                }
            }
            mark(warp, lane) = lost ? 1.0f : 0.0f;
        });
        phase_([&](int warp, int lane) {
            if (warp != 0) return;
            bool lost = false;
            for (int w = 0; w < kWarps; ++w) lost = lost || mark(w, lane) != 0.0f;
            if (!lost) return;
            set_word(a_.rows.faults, lane, 1u);
            a_.faults[first_ + lane] = ((int64_t(step) + 1) << 16) + (gradient ? blame(lane) : 0);
        });
    }

    // 1 + the leaf of the first unit whose energy, or gradient where the chain may move, is not finite; 0 if there is none.
    EBMFAST_HD int64_t blame(int lane) {
        for (int u = 0; u < a_.n_units; ++u) {
            bool fine = !a_.has_or || G::finite(at(a_.rows.energies + u, lane));
            for (int i = 0; i < size_ && fine; ++i) fine = G::finite(at(a_.rows.gradients + u * a_.rows.padded + i, lane)) || frozen(i, lane);
            if (!fine) return a_.units[u].leaf + 1;
        }
        return 0;
    }

    const ChainArgs& a_;
    const int64_t first_;
    const int count_;
    float* const s_;
    const int size_;
    Phase phase_;
};

}  // namespace
}  // namespace cuda
}  // namespace ebmfast
