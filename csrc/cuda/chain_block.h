// The chain engine as a block of GPU threads runs it: kWarps warps share C chains (8, 16 or 32), from the first step to the last. One text
// for device and host: a sequence of phases, each a function of the warp, or of (chain, part) for every thread, with a barrier after it;
// on the host a phase is a loop. What a thread leaves for a later phase goes through scratch, and within a phase no thread
// reads what another warp writes. So the host build, which the tests compare with the reference, proves everything but the launch, the
// barriers and the instructions of warp.h.
//
// Products of matrices are cut into tiles of 16 outputs, one per warp, over all C chains. Of each 8 chains a lane holds outputs
// 2g and 2g + 1 of chains 2t and 2t + 1 (g = lane / 4, t = lane % 4): the layout of tensor cores' results, kept by the float32 path. Units
// are evaluated `together`, layer by layer, so that narrow layers fill the warps and a step has few barriers.
//
// Floors of a step, counted, not measured. A chain of a perceptron D-H-H-1 takes 2 (D H + H H) multiply-adds. A block reads every packed
// weight once a step, in both directions: 8 (D H + H H) bytes in float32, 4 H H less in bfloat16; 128 bytes per cycle from shared memory,
// or some 64 from L2, which no more than about 40 blocks get at once. State and results cross DRAM once a launch.
#pragma once

#include "tables.h"

namespace ebmfast {
namespace cuda {

namespace {

using G = ScalarLane;

template <Activation a> struct Choice {
    static constexpr Activation value = a;
};

// f with the activation as a constant: one branch for a whole tile.
template <class F> EBMFAST_HD void choose(Activation a, F f) {
    switch (a) {
        case Activation::silu: return f(Choice<Activation::silu>());
        case Activation::relu: return f(Choice<Activation::relu>());
        case Activation::tanh: return f(Choice<Activation::tanh>());
        case Activation::softplus: return f(Choice<Activation::softplus>());
        case Activation::gelu: return f(Choice<Activation::gelu>());
        default: return f(Choice<Activation::gelu_tanh>());
    }
}

template <class Phase, int C> class ChainBlock {
public:
    // `staged`: room for packed_words in shared memory, or null. Both are aligned to 16 bytes.
    EBMFAST_HD ChainBlock(const Arguments& a, float* scratch, uint32_t* staged, Phase phase)
        : a_(a.chain), t_(a), r_(a.rows), s_(scratch), staged_(staged), size_(int(a.chain.size)), phase_(phase) {}

    EBMFAST_HD void stage() {
        if (staged_ == nullptr) return;
        phase_.template elements<C>([&](int chain, int part) {
            for (int i = part * C + chain; i < t_.packed_words / 4; i += kThreads) {
                reinterpret_cast<Words4*>(staged_)[i] = reinterpret_cast<const Words4*>(t_.packed)[i];
            }
        });
    }

    EBMFAST_HD void run(int64_t first) {
        load(first);
        int from = r_.x, to = r_.moved;
        if (!a_.has_or) {
            elements([&](int chain, int part) {
                if (part == 0) program_weights(t_, column(chain));
            });
        }
        for (int64_t i = 0; i < a_.steps; ++i) {
            const uint32_t step = a_.id.step + uint32_t(i);
            float noise = a_.noise[i];
            if (a_.noise_first) {
                if (noise != 0.0f) move(from, to, false, 0.0f, noise, step), swap(from, to);
                noise = 0.0f;
            }
            evaluate(from, a_.has_or, true);
            if (a_.has_or) {
                elements([&](int chain, int part) {
                    if (part == 0) program_values(t_, column(chain)), program_weights(t_, column(chain));
                });
            }
            move(from, to, true, a_.drift[i], noise, step);
            swap(from, to);
        }
        elements([&](int chain, int part) {
            if (chain >= count_) return;
            for (int i = part; i < size_; i += kParts) a_.x[(first_ + chain) * a_.size + i] = at(from + i, chain);
        });
    }

    EBMFAST_HD void energies(int64_t first) {
        load(first);
        evaluate(r_.x, true, false);
        elements([&](int chain, int part) {
            if (chain >= count_) return;
            for (int u = part; u < t_.n_units; u += kParts) a_.energies[u * a_.chains + first_ + chain] = at(r_.energies + u, chain);
        });
    }

private:
    static constexpr int kStride = row_stride(C), kParts = kThreads / C, kColumns = C / 8;

    struct Sums {
        float d[kColumns][4];
    };

    struct Column {
        float* s;
        int chain;
        EBMFAST_HD float& operator()(int row) const { return s[row * kStride + chain]; }
    };

    EBMFAST_HD float& at(int row, int chain) { return s_[row * kStride + chain]; }
    EBMFAST_HD Pair& pair(int row, int chain) { return reinterpret_cast<Pair&>(at(row, chain)); }
    EBMFAST_HD uint32_t word(int row, int chain) { return G::as_int(at(row, chain)); }
    EBMFAST_HD Column column(int chain) { return {s_, chain}; }
    EBMFAST_HD int64_t row_of(int chain) { return first_ + (chain < count_ ? chain : count_ - 1); }
    EBMFAST_HD bool frozen(int i, int chain) { return a_.frozen != nullptr && a_.frozen[row_of(chain) * a_.frozen_stride + i] != 0; }
    template <class F> EBMFAST_HD void elements(F f) { phase_.template elements<C>(f); }
    EBMFAST_HD static void swap(int& a, int& b) {
        const int t = a;
        a = b, b = t;
    }

    // Chains past `count` repeat the last one. Rows that only tensor cores read are 0.
    EBMFAST_HD void load(int64_t first) {
        const int64_t left = a_.chains - first;
        first_ = first, count_ = int(left < C ? left : C);
        elements([&](int chain, int part) {
            for (int i = part; i < r_.padded; i += kParts) {
                at(r_.x + i, chain) = i < size_ ? a_.x[row_of(chain) * a_.size + i] : 0.0f;
                at(r_.moved + i, chain) = 0.0f;
            }
            for (int u = 0; u < t_.n_units; ++u) {
                for (int l = 0; l < t_.units[u].n_layers; ++l) fold(t_.units[u].layers[l], chain, part);
            }
            if (part == 0) at(r_.faults, chain) = a_.faults != nullptr && (chain >= count_ || a_.faults[first_ + chain] != 0) ? 1.0f : 0.0f;
        });
    }

    EBMFAST_HD void fold(const Layer& layer, int chain, int part) {
        if (layer.own_rows < 0) return;
        const ChainConditioning& k = layer.conditioning;
        const float* c = t_.conditions[k.slot] + row_of(chain) * k.width;
        for (int j = part; j < layer.out; j += kParts) {
            float shift, scale;
            condition_on(k, c, j, shift, scale);
            at(r_.conditions + layer.own_rows + j, chain) = shift;
            if (layer.scales) at(r_.conditions + layer.own_rows + layer.out + j, chain) = scale;
        }
    }

    // Where unit u keeps its gradient; its slopes and vectors, while it is among those in hand.
    EBMFAST_HD int gradient_of(int u) { return r_.gradients + u * r_.padded; }
    EBMFAST_HD int slopes_of(int u) { return r_.slopes + u % t_.together * r_.slopes_each; }
    EBMFAST_HD int vector_of(int u, int n) { return (n % 2 == 0 ? r_.ping : r_.pong) + u % t_.together * r_.wide; }
    EBMFAST_HD float& partial(int u, int n, int chain) { return at(r_.partials + u * r_.partials_each + n, chain); }

    EBMFAST_HD void evaluate(int x, bool energy, bool gradient) {
        for (int first = 0; first < t_.n_units; first += t_.together) {
            const int end = first + t_.together < t_.n_units ? first + t_.together : t_.n_units;
            if (t_.has_coordinates) {
                elements([&](int chain, int part) {
                    for (int u = first; u < end; ++u) coordinates(t_.units[u], u, x, gradient, chain, part);
                });
            }
            for (int l = 0; l < t_.deepest; ++l) {
                tiles(first, end, [&](const Unit& u) { return l < u.n_layers ? u.layers[l].forward.outputs : 0; },
                      [&](const Unit& u, int n, int tile) {
                          if (u.kind == UnitKind::full) {
                              full(u, n, tile, energy);
                          } else {
                              forward(u, n, l, x, tile, energy);
                          }
                      });
            }
            for (int back = 0; gradient && back < t_.deepest; ++back) {
                tiles(first, end,
                      [&](const Unit& u) {
                          return back < u.n_layers && u.kind == UnitKind::mlp ? u.layers[u.n_layers - 1 - back].backward.outputs : 0;
                      },
                      [&](const Unit& u, int n, int tile) { backward(u, n, back, tile); });
            }
        }
        if (!energy) return;
        elements([&](int chain, int part) {
            for (int u = part; u < t_.n_units; u += kParts) {
                float sum = partial(u, 0, chain);
                for (int n = 1; n < t_.units[u].n_partials; ++n) sum = G::add(sum, partial(u, n, chain));
                at(r_.energies + u, chain) = G::fma(energy_factor(t_.units[u].kind), sum, t_.units[u].constant);
            }
        });
    }

    EBMFAST_HD void coordinates(const Unit& u, int index, int x, bool gradient, int chain, int part) {
        if (u.kind == UnitKind::full) {
            const int d = vector_of(index, 0);
            for (int i = part; i < size_; i += kParts) at(d + i, chain) = G::sub(at(x + i, chain), u.mean[i]);
        } else if (u.n_layers == 0) {
            for (int share = part; share < kShares && share < size_; share += kParts) {
                float sum = 0.0f;
                for (int i = share; i < size_; i += kShares) {
                    const float before = i > 0 ? at(x + i - 1, chain) : 0.0f, after = i + 1 < size_ ? at(x + i + 1, chain) : 0.0f;
                    const Pair v = vectors_at(u, i);
                    const float slope = coordinate(u, i, size_, at(x + i, chain), before, after, v.x, v.y, sum);
                    if (gradient) at(gradient_of(index) + i, chain) = slope;
                }
                partial(index, share, chain) = sum;
            }
        }
    }

    // each(unit, index, tile) for every 16 of outputs(unit) in units first to end, dealt to the warps in turn.
    template <class Outputs, class Each> EBMFAST_HD void tiles(int first, int end, Outputs outputs, Each each) {
        phase_.warps([&](int warp) {
            int before = 0;  // tiles of the units before
            for (int u = first; u < end; ++u) {
                const int n = (outputs(t_.units[u]) + 15) / 16;
                for (int tile = (warp - before % kWarps + kWarps) % kWarps; tile < n; tile += kWarps) each(t_.units[u], u, tile);
                before += n;
            }
        });
    }

    // 16 outputs of m times the vector in rows h. `round`: h is float32, to be rounded to tf32.
    EBMFAST_HD void product(const Matrix& m, int h, bool round, int tile, PerLane<Sums>& sums) {
        const uint32_t* w = staged_ != nullptr ? staged_ + (m.words - t_.packed) : m.words;
        lanes([&](int lane) { sums[lane] = Sums{}; });
        if (m.kind == Product::float32) return plain_product(reinterpret_cast<const float*>(w), m, h, tile, sums);
        const int across = (m.inputs + depth_of(m.kind) - 1) / depth_of(m.kind);
        w += int64_t(tile) * across * (4 * kWarp);
        if (m.kind == Product::bf16) {
            fragments<Product::bf16>(w, across, h, false, sums);
        } else {
            fragments<Product::tf32>(w, across, h, round, sums);
        }
    }

    EBMFAST_HD void plain_product(const float* w, const Matrix& m, int h, int tile, PerLane<Sums>& sums) {
        const int outputs = round_up(m.outputs, 16);
        lanes([&](int lane) {
            Sums s{};
            const float* row = w + tile * 16 + lane / 4 * 2;
            const float* y = &at(h, lane % 4 * 2);
            EBMFAST_UNROLL_BY_4
            for (int i = 0; i < m.inputs; ++i) {
                const Pair a = *reinterpret_cast<const Pair*>(row + int64_t(i) * outputs);
                EBMFAST_UNROLL
                for (int c = 0; c < kColumns; ++c) {
                    const Pair b = *reinterpret_cast<const Pair*>(y + i * kStride + 8 * c);
                    s.d[c][0] = G::fma(a.x, b.x, s.d[c][0]), s.d[c][1] = G::fma(a.x, b.y, s.d[c][1]);
                    s.d[c][2] = G::fma(a.y, b.x, s.d[c][2]), s.d[c][3] = G::fma(a.y, b.y, s.d[c][3]);
                }
            }
            sums[lane] = s;
        });
    }

    template <Product kind> EBMFAST_HD void fragments(const uint32_t* w, int across, int h, bool round, PerLane<Sums>& sums) {
        EBMFAST_UNROLL_BY_4
        for (int k = 0; k < across; ++k) {
            PerLane<Words4> a;
            lanes([&](int lane) { a[lane] = reinterpret_cast<const Words4*>(w)[k * kWarp + lane]; });
            EBMFAST_UNROLL
            for (int c = 0; c < kColumns; ++c) {
                PerLane<Words2> b;
                lanes([&](int lane) {
                    const int row = h + 8 * k + lane % 4, chain = 8 * c + lane / 4;
                    b[lane] = {{word(row, chain), word(row + 4, chain)}};
                    if (round) b[lane] = {{tf32(G::as_float(b[lane].w[0])), tf32(G::as_float(b[lane].w[1]))}};
                });
                multiply<kind>(sums, c, a, b);
            }
        }
    }

    // Outputs o and o + 1 of chains `chain` and chain + 1 become elements of a vector that a product of that kind will read.
    EBMFAST_HD void put(int rows, Product kind, int o, int chain, const float* v) {
        if (kind == Product::bf16) {
            reinterpret_cast<Words2&>(at(rows + o / 2, chain)) = {{bf16_pair(v[0], v[2]), bf16_pair(v[1], v[3])}};
        } else if (kind == Product::tf32) {
            reinterpret_cast<Words2&>(at(rows + o, chain)) = {{tf32(v[0]), tf32(v[1])}};
            reinterpret_cast<Words2&>(at(rows + o + 1, chain)) = {{tf32(v[2]), tf32(v[3])}};
        } else {
            pair(rows + o, chain) = {v[0], v[1]};
            pair(rows + o + 1, chain) = {v[2], v[3]};
        }
    }

    // Slopes hold activation'(z) scale, the last layer's times the read-out; going back each layer's are multiplied by the
    // transposed weights times those of the next. bfloat16 ones change place, for a row of words then holds two of them.
    EBMFAST_HD int slope_vector(const Unit& u, int n, int l) {
        return u.layers[l].backward.kind == Product::bf16 ? vector_of(n, l) : slopes_of(n) + u.layers[l].slopes;
    }

    EBMFAST_HD void forward(const Unit& u, int n, int l, int x, int tile, bool energy) {
        const Layer& k = u.layers[l];
        PerLane<Sums> sums, shares;
        product(k.forward, l == 0 ? x : vector_of(n, l - 1), l == 0, tile, sums);
        const bool last = l + 1 == u.n_layers;
        const Product next = last ? k.backward.kind : u.layers[l + 1].forward.kind;
        const int out = vector_of(n, l), slopes = last ? slope_vector(u, n, l) : slopes_of(n) + k.slopes;
        choose(k.activation, [&](auto activation) {
            lanes([&](int lane) {
                const int o = tile * 16 + lane / 4 * 2;
                shares[lane] = Sums{};
                EBMFAST_UNROLL
                for (int c = 0; c < kColumns; ++c) {
                    const int chain = 8 * c + lane % 4 * 2;
                    float value[4], slope[4];
                    EBMFAST_UNROLL
                    for (int j = 0; j < 4; ++j) {
                        const int output = o + j / 2;
                        value[j] = slope[j] = 0.0f;
                        if (output >= k.out) continue;
                        const float z = condition(k, output, chain + j % 2, sums[lane].d[c][j], slope[j]);
                        const Slope<G> s = activate<G>(decltype(activation)::value, z);
                        value[j] = s.value, slope[j] = G::mul(s.derivative, slope[j]);
                        if (!last) continue;
                        slope[j] = G::mul(slope[j], u.read_out[output]);
                        shares[lane].d[c][j % 2] = G::fma(u.read_out[output], s.value, shares[lane].d[c][j % 2]);
                    }
                    put(slopes, last ? next : Product::float32, o, chain, slope);
                    if (!last) put(out, next, o, chain, value);
                }
            });
        });
        if (last && energy) store_shares(n, tile, shares);
    }

    // scale * p + shift; the scale is left in `slope`.
    EBMFAST_HD float condition(const Layer& k, int o, int chain, float p, float& slope) {
        const int row = r_.conditions + k.own_rows + o;
        const bool own = k.own_rows >= 0;
        const float shift = own ? at(row, chain) : k.shift != nullptr ? k.shift[o] : 0.0f;
        slope = !k.scales ? 1.0f : own ? at(row + k.out, chain) : k.scale[o];
        return k.scales ? G::fma(p, slope, shift) : G::add(p, shift);
    }

    // A tile's share of the energy: over its 16 outputs, which 8 lanes hold.
    EBMFAST_HD void store_shares(int n, int tile, PerLane<Sums>& shares) {
        for (int c = 0; c < kColumns; ++c) {
            for (int j = 0; j < 2; ++j) {
                PerLane<float> sum;
                lanes([&](int lane) { sum[lane] = shares[lane].d[c][j]; });
                reduce(sum, 4, kWarp, [](float a, float b) { return G::add(a, b); });
                lanes([&](int lane) {
                    if (lane < 4) partial(n, tile, 8 * c + lane * 2 + j) = sum[lane];
                });
            }
        }
    }

    EBMFAST_HD void full(const Unit& u, int n, int tile, bool energy) {
        PerLane<Sums> sums, shares;
        const int d = vector_of(n, 0);
        product(u.layers[0].forward, d, false, tile, sums);
        lanes([&](int lane) {
            shares[lane] = Sums{};
            for (int c = 0; c < kColumns; ++c) {
                for (int j = 0; j < 4; ++j) {
                    const int o = tile * 16 + lane / 4 * 2 + j / 2, chain = 8 * c + lane % 4 * 2 + j % 2;
                    if (o >= size_) continue;
                    at(gradient_of(n) + o, chain) = sums[lane].d[c][j];
                    shares[lane].d[c][j % 2] = G::fma(at(d + o, chain), sums[lane].d[c][j], shares[lane].d[c][j % 2]);
                }
            }
        });
        if (energy) store_shares(n, tile, shares);
    }

    EBMFAST_HD void backward(const Unit& u, int n, int back, int tile) {
        const int l = u.n_layers - 1 - back;
        const Layer& k = u.layers[l];
        PerLane<Sums> sums;
        product(k.backward, slope_vector(u, n, l), false, tile, sums);
        lanes([&](int lane) {
            const int o = tile * 16 + lane / 4 * 2;
            for (int c = 0; c < kColumns; ++c) {
                const int chain = 8 * c + lane % 4 * 2;
                float* d = sums[lane].d[c];
                if (l == 0) {
                    if (o < size_) pair(gradient_of(n) + o, chain) = {d[0], d[1]};
                    if (o + 1 < size_) pair(gradient_of(n) + o + 1, chain) = {d[2], d[3]};
                } else {
                    const int slopes = slopes_of(n) + u.layers[l - 1].slopes;
                    const Pair a = pair(slopes + o, chain), b = pair(slopes + o + 1, chain);
                    const float y[4] = {G::mul(d[0], a.x), G::mul(d[1], a.y), G::mul(d[2], b.x), G::mul(d[3], b.y)};
                    put(slope_vector(u, n, l - 1), u.layers[l - 1].backward.kind, o, chain, y);
                }
            }
        });
    }

    EBMFAST_HD float combined(int i, int chain) {
        float sum = G::mul(at(r_.weights, chain), at(r_.gradients + i, chain));
        for (int u = 1; u < t_.n_units; ++u) sum = G::fma(at(r_.weights + u, chain), at(gradient_of(u) + i, chain), sum);
        return clipped(a_, sum);
    }

    // The largest of the parts' results.
    EBMFAST_HD float largest_mark(int chain) {
        float top = 1e-30f;
        for (int p = 0; p < kParts; ++p) top = G::at_least(top, at(r_.marks + p, chain));
        return top;
    }

    // The combined gradient, scaled to a norm of at most clip_norm: NaN where the norm is not finite.
    EBMFAST_HD void clip_norm() {
        elements([&](int chain, int part) {
            float top = 0.0f;
            for (int i = part; i < size_; i += kParts) {
                const float y = combined(i, chain);
                at(r_.combined + i, chain) = y;
                if (!frozen(i, chain)) top = G::at_least(top, absolute<G>(y));
            }
            at(r_.marks + part, chain) = top;
        });
        elements([&](int chain, int part) {
            const float top = largest_mark(chain);
            for (int share = part; share < kShares; share += kParts) {
                float sum = 0.0f;
                for (int i = share; i < size_; i += kShares) {
                    const float y = frozen(i, chain) ? 0.0f : G::div(at(r_.combined + i, chain), top);
                    sum = G::fma(y, y, sum);
                }
                at(r_.marks + kShares + share, chain) = sum;
            }
        });
        elements([&](int chain, int part) {
            float sum = 0.0f;
            for (int p = 0; p < kShares; ++p) sum = G::add(sum, at(r_.marks + kShares + p, chain));
            const float factor = norm_factor(a_.clip_norm, G::mul(largest_mark(chain), G::sqrt(sum)));
            for (int i = part; i < size_; i += kParts) at(r_.combined + i, chain) = G::mul(factor, at(r_.combined + i, chain));
        });
    }

    EBMFAST_HD void move(int from, int to, bool gradient, float drift, float noise, uint32_t step) {
        if (gradient && a_.clips_norm) clip_norm();
        const bool lost_any = phase_.template any_element<C>([&](int chain, int part) {
            const bool dead = at(r_.faults, chain) != 0.0f;
            bool lost = false;
            for (int block = part; 4 * block < size_; block += kParts) {
                Quad<G> z{};
                if (noise != 0.0f) z = chain_normals(a_.id, uint64_t(first_ + chain), uint32_t(block), step);
                EBMFAST_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const int i = 4 * block + r;
                    if (i >= size_) break;
                    const float slope = !gradient ? 0.0f : a_.clips_norm ? at(r_.combined + i, chain) : combined(i, chain);
                    at(to + i, chain) = moved(a_, at(from + i, chain), gradient, slope, drift, noise, z.v[r], dead || frozen(i, chain), lost);
                }
            }
            at(r_.marks + part, chain) = lost ? 1.0f : 0.0f;
            return lost;
        });
        if (!lost_any) return;
        elements([&](int chain, int part) {
            if (part != 0) return;
            bool lost = false;
            for (int p = 0; p < kParts; ++p) lost = lost || at(r_.marks + p, chain) != 0.0f;
            if (!lost) return;
            at(r_.faults, chain) = 1.0f;
            a_.faults[first_ + chain] = ((int64_t(step) + 1) << 16) + (gradient ? blame(chain) : 0);
        });
    }

    // 1 + the leaf of the first unit whose energy, or gradient where the chain may move, is not finite; 0 if there is none.
    EBMFAST_HD int64_t blame(int chain) {
        for (int u = 0; u < t_.n_units; ++u) {
            bool fine = !a_.has_or || G::finite(at(r_.energies + u, chain));
            for (int i = 0; i < size_ && fine; ++i) fine = G::finite(at(gradient_of(u) + i, chain)) || frozen(i, chain);
            if (!fine) return t_.units[u].leaf + 1;
        }
        return 0;
    }

    const ChainArgs& a_;
    const Arguments& t_;
    const Rows& r_;
    float* const s_;
    uint32_t* const staged_;
    const int size_;
    Phase phase_;
    int64_t first_ = 0;
    int count_ = 0;
};

}  // namespace
}  // namespace cuda
}  // namespace ebmfast
