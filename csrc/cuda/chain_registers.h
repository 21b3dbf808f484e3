// Chains of energies that are sums over coordinates (no layers, no full matrices), in registers from the first step to the last: `width`
// neighbouring threads, a power of two up to 32, hold a chain, thread j of them the quads j, j + width, ... of four elements that share a
// Philox block. Nothing but what an OR, a norm or a neighbour asks for leaves a thread, and no barrier is wider than a warp.
//
// The floor of a step, counted, not measured: the arithmetic of a Philox block and two Box-Muller pairs, some 200 instructions per quad. 4096
// chains of 32 are 32768 quads, 205 000 instructions of a warp. DRAM sees 8 bytes per element and launch.
#pragma once

#include "tables.h"

namespace ebmfast {
namespace cuda {

constexpr int kRegisterWarps = 4, kMostQuads = 4;

namespace {

// Floats of scratch of a warp whose chains have `width` threads.
EBMFAST_HD constexpr int warp_scratch(int n_units, int n_nodes, int width) { return 2 * (n_units + n_nodes) * (kWarp / width); }

template <int Quads> class ChainRegisters {
public:
    EBMFAST_HD ChainRegisters(const Arguments& a, int64_t first, float* scratch)
        : a_(a.chain), t_(a), s_(scratch), first_(first), size_(int(a.chain.size)), shift_(a.shift), width_(1 << a.shift), groups_(kWarp >> a.shift) {
        lanes([&](int lane) {
            const int64_t row = row_of(lane);
            Chain& c = chains_[lane];
            c.frozen = 0;
            EBMFAST_UNROLL
            for (int q = 0; q < Quads; ++q) {
                c.before[q] = c.after[q] = 0.0f;
                EBMFAST_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const int i = element_of(lane, q) + r;
                    c.slope[q][r] = c.mean[q][r] = c.precision[q][r] = c.next[q][r] = 0.0f;
                    c.x[q][r] = i < size_ ? a_.x[row * size_ + i] : 0.0f;
                    if (i < size_ && a_.frozen != nullptr && a_.frozen[row * a_.frozen_stride + i] != 0) c.frozen |= 1u << (4 * q + r);
                }
            }
            c.dead = a_.faults != nullptr && (!live(lane) || a_.faults[row] != 0);
        });
        if (t_.n_units == 1) read(t_.units[0]);
    }

    EBMFAST_HD void run() {
        if (!a_.has_or) {
            lanes([&](int lane) {
                if (leads(lane)) program_weights(t_, column(lane));
            });
            warp_barrier();
        }
        for (int64_t i = 0; i < a_.steps; ++i) {
            const uint32_t step = a_.id.step + uint32_t(i);
            float noise = a_.noise[i];
            if (a_.noise_first) {
                if (noise != 0.0f) move(false, 0.0f, noise, step);
                noise = 0.0f;
            }
            if (a_.has_or) {
                find_energies();
                lanes([&](int lane) {
                    if (leads(lane)) program_values(t_, column(lane)), program_weights(t_, column(lane));
                });
                warp_barrier();
            }
            find_gradient();
            move(true, a_.drift[i], noise, step);
        }
        elements([&](int lane, Chain& c, int q, int r, int i) {
            if (live(lane)) a_.x[row_of(lane) * size_ + i] = c.x[q][r];
        });
    }

    EBMFAST_HD void energies() {
        find_energies();
        lanes([&](int lane) {
            if (!leads(lane) || !live(lane)) return;
            for (int u = 0; u < t_.n_units; ++u) a_.energies[u * a_.chains + row_of(lane)] = column(lane)(t_.rows.energies + u);
        });
    }

private:
    struct Chain {
        float x[Quads][4], next[Quads][4], before[Quads], after[Quads], slope[Quads][4], mean[Quads][4], precision[Quads][4];
        uint32_t frozen;  // a bit for each element
        bool dead;
    };

    struct Column {
        float* s;
        int groups;
        EBMFAST_HD float& operator()(int row) const { return s[row * groups]; }
    };

    EBMFAST_HD Column column(int lane) { return {s_ + (lane >> shift_), groups_}; }
    EBMFAST_HD bool leads(int lane) { return (lane & (width_ - 1)) == 0; }
    EBMFAST_HD bool live(int lane) { return first_ + (lane >> shift_) < a_.chains; }
    EBMFAST_HD int64_t row_of(int lane) { return live(lane) ? first_ + (lane >> shift_) : a_.chains - 1; }
    EBMFAST_HD int element_of(int lane, int q) { return 4 * ((lane & (width_ - 1)) + q * width_); }
    EBMFAST_HD bool held(int lane, int q, int r) { return (chains_[lane].frozen >> (4 * q + r) & 1u) != 0; }

    // each(lane, chain, q, r, i) for every element that exists.
    template <class Each> EBMFAST_HD void elements(Each each) {
        lanes([&](int lane) {
            EBMFAST_UNROLL
            for (int q = 0; q < Quads; ++q) {
                EBMFAST_UNROLL
                for (int r = 0; r < 4; ++r) {
                    const int i = element_of(lane, q) + r;
                    if (i < size_) each(lane, chains_[lane], q, r, i);
                }
            }
        });
    }

    EBMFAST_HD void read(const Unit& u) {
        if (u.kind != UnitKind::diagonal && u.kind != UnitKind::mlp) return;
        elements([&](int, Chain& c, int q, int r, int i) {
            const Pair v = vectors_at(u, i);
            c.mean[q][r] = v.x, c.precision[q][r] = v.y;
        });
    }

    // Of the threads beside, the last elements before this one's and the first after; unit by unit only where one looks at them.
    EBMFAST_HD void look_around() {
        PerLane<float> own;
        EBMFAST_UNROLL
        for (int q = 0; q < Quads; ++q) {
            lanes([&](int lane) { own[lane] = chains_[lane].x[q][3]; });
            PerLane<float> left = from_lane(own, [&](int lane) { return neighbour(lane, width_ - 1); });
            lanes([&](int lane) { own[lane] = chains_[lane].x[q][0]; });
            PerLane<float> right = from_lane(own, [&](int lane) { return neighbour(lane, 1); });
            lanes([&](int lane) {
                Chain& c = chains_[lane];
                // What comes around is of the quads of another round.
                if (leads(lane)) {
                    if (q + 1 < Quads) c.before[q + 1] = left[lane];
                    if (q == 0) c.before[0] = 0.0f;
                } else {
                    c.before[q] = left[lane];
                }
                if ((lane & (width_ - 1)) == width_ - 1) {
                    if (q > 0) c.after[q - 1] = right[lane];
                    if (q == Quads - 1) c.after[q] = 0.0f;
                } else {
                    c.after[q] = right[lane];
                }
            });
        }
    }

    EBMFAST_HD int neighbour(int lane, int by) { return (lane >> shift_ << shift_) + ((lane + by) & (width_ - 1)); }

    // each(unit, index, its slope at every element): energies add up in `sum`.
    template <class Each> EBMFAST_HD void unit(const Unit& u, PerLane<float>& sum, Each each) {
        if (t_.n_units > 1) read(u);
        lanes([&](int lane) { sum[lane] = 0.0f; });
        elements([&](int lane, Chain& c, int q, int r, int i) {
            const float before = r > 0 ? c.x[q][r > 0 ? r - 1 : 0] : c.before[q], after = r < 3 ? c.x[q][r < 3 ? r + 1 : 3] : c.after[q];
            each(lane, c, q, r, coordinate(u, i, size_, c.x[q][r], before, after, c.mean[q][r], c.precision[q][r], sum[lane]));
        });
    }

    EBMFAST_HD void find_energies() {
        if (t_.has_neighbours) look_around();
        PerLane<float> sum;
        for (int k = 0; k < t_.n_units; ++k) {
            const Unit& u = t_.units[k];
            unit(u, sum, [](int, Chain&, int, int, float) {});
            reduce(sum, 1, width_, [](float a, float b) { return ScalarLane::add(a, b); });
            lanes([&](int lane) {
                if (leads(lane)) column(lane)(t_.rows.energies + k) = ScalarLane::fma(energy_factor(u.kind), sum[lane], u.constant);
            });
        }
        warp_barrier();
    }

    EBMFAST_HD void find_gradient() {
        using G = ScalarLane;
        if (t_.has_neighbours) look_around();
        PerLane<float> sum, weight;
        for (int k = 0; k < t_.n_units; ++k) {
            lanes([&](int lane) { weight[lane] = column(lane)(t_.rows.weights + k); });
            unit(t_.units[k], sum, [&](int lane, Chain& c, int q, int r, float slope) {
                c.slope[q][r] = k == 0 ? G::mul(weight[lane], slope) : G::fma(weight[lane], slope, c.slope[q][r]);
            });
        }
        if (a_.clips) elements([&](int, Chain& c, int q, int r, int) { c.slope[q][r] = clipped(a_, c.slope[q][r]); });
        if (a_.clips_norm) clip_norm();
    }

    EBMFAST_HD void clip_norm() {
        using G = ScalarLane;
        PerLane<float> top, sum;
        lanes([&](int lane) { top[lane] = 1e-30f, sum[lane] = 0.0f; });
        elements([&](int lane, Chain& c, int q, int r, int) {
            if (!held(lane, q, r)) top[lane] = G::at_least(top[lane], absolute<G>(c.slope[q][r]));
        });
        // A NaN must come out the same in every lane: it is kept, not passed over.
        reduce(top, 1, width_, [](float a, float b) { return a < b || b != b ? b : a; });
        elements([&](int lane, Chain& c, int q, int r, int) {
            const float y = held(lane, q, r) ? 0.0f : G::div(c.slope[q][r], top[lane]);
            sum[lane] = G::fma(y, y, sum[lane]);
        });
        reduce(sum, 1, width_, [](float a, float b) { return G::add(a, b); });
        elements([&](int lane, Chain& c, int q, int r, int) {
            c.slope[q][r] = G::mul(norm_factor(a_.clip_norm, G::mul(top[lane], G::sqrt(sum[lane]))), c.slope[q][r]);
        });
    }

    EBMFAST_HD void move(bool gradient, float drift, float noise, uint32_t step) {
        PerLane<bool> lost;
        lanes([&](int lane) {
            Chain& c = chains_[lane];
            lost[lane] = false;
            EBMFAST_UNROLL
            for (int q = 0; q < Quads; ++q) {
                Quad<ScalarLane> z{};
                const int first = element_of(lane, q);
                if (noise != 0.0f && first < size_) z = chain_normals(a_.id, uint64_t(row_of(lane)), uint32_t(first / 4), step);
                EBMFAST_UNROLL
                for (int r = 0; r < 4; ++r) {
                    if (first + r >= size_) continue;
                    const bool stays = c.dead || held(lane, q, r);
                    c.next[q][r] = moved(a_, c.x[q][r], gradient, c.slope[q][r], drift, noise, z.v[r], stays, lost[lane]);
                }
            }
        });
        PerLane<bool> anywhere = any_of(lost, kWarp);
        bool any = false;
        lanes([&](int lane) { any = anywhere[lane]; });
        if (any) record(any_of(lost, width_), gradient, step);
        elements([&](int, Chain& c, int q, int r, int) { c.x[q][r] = c.next[q][r]; });
    }

    // Faults are blamed on the first unit whose energy, or gradient where the chain may move, is not finite.
    EBMFAST_HD void record(PerLane<bool> lost, bool gradient, uint32_t step) {
        PerLane<bool> bad;
        PerLane<float> sum;
        PerLane<int> culprit;
        lanes([&](int lane) { culprit[lane] = 0; });
        for (int k = 0; gradient && k < t_.n_units; ++k) {
            lanes([&](int lane) { bad[lane] = a_.has_or && !ScalarLane::finite(column(lane)(t_.rows.energies + k)); });
            unit(t_.units[k], sum, [&](int lane, Chain&, int q, int r, float slope) {
                bad[lane] = bad[lane] || (!ScalarLane::finite(slope) && !held(lane, q, r));
            });
            PerLane<bool> of_chain = any_of(bad, width_);
            lanes([&](int lane) {
                if (of_chain[lane] && culprit[lane] == 0) culprit[lane] = t_.units[k].leaf + 1;
            });
        }
        lanes([&](int lane) {
            if (!lost[lane]) return;
            chains_[lane].dead = true;
            if (leads(lane)) a_.faults[row_of(lane)] = ((int64_t(step) + 1) << 16) + culprit[lane];
        });
        warp_barrier();  // energies were read: leads may write the next ones
    }

    const ChainArgs& a_;
    const Arguments& t_;
    float* const s_;
    const int64_t first_;
    const int size_, shift_, width_, groups_;
    PerLane<Chain> chains_;
};

}  // namespace
}  // namespace cuda
}  // namespace ebmfast
