// Langevin steps of a tile of chains: the update with its noise, and what happens where it is not finite.
#pragma once

#include "chain_tile.h"

namespace ebmfast {
namespace {

template <int N> class Langevin : public Tile<N> {
    using Base = Tile<N>;
    using Rows = typename Base::Rows;
    using Base::a_, Base::any_held_, Base::clip_norm, Base::combine, Base::combined, Base::each, Base::fault, Base::finite_energy, Base::finite_gradient,
        Base::frozen, Base::normals_of_block, Base::program_weights, Base::reverse_pass, Base::row, Base::size_, Base::start,
        Base::start_noise, Base::store_rows, Base::swap, Base::T, Base::words;

public:
    using Base::Base;

    void run() {
        start();
        float *from = row(a_.rows.x), *to = row(a_.rows.moved);
        if (!a_.has_or) reverse_pass();
        for (int64_t i = 0; i < a_.steps; ++i) {
            const uint32_t step = a_.id.step + uint32_t(i);
            float noise = a_.noise[i];
            if (a_.noise_first) {
                if (noise != 0.0f) move<false>(from, to, 0.0f, noise, step), swap(from, to);
                noise = 0.0f;
            }
            a_.has_or ? this->template gradients<true>(from) : this->template gradients<false>(from);
            if (a_.has_or) program_weights();
            move<true>(from, to, a_.drift[i], noise, step);
            swap(from, to);
        }
        store_rows(from);
    }

private:
    // What a step does to four rows, rows [first, first + 4) of the padded arrays.
    struct Move {
        const float* from;
        float* to;
        F drift, noise, low, high;
        bool noisy, clamps;
    };

    // to = clamp(from - drift g + noise z), or from + noise z; elements that are not finite, held or frozen stay. Four rows in which
    // that happens, which is rare, are looked at again.
    template <bool gradient> void move(const float* from, float* to, float drift, float noise, uint32_t step) {
        if (noise != 0.0f) start_noise(step);
        const Move m{from, to, V::set(drift), V::set(noise), V::set(a_.low), V::set(a_.high), noise != 0.0f, gradient && a_.clamps};
        if (gradient && a_.clips_norm) combine(row(a_.rows.combined)), clip_norm(row(a_.rows.combined));
        uint32_t lost[N] = {};
        for (int64_t first = 0; first < size_; first += 4) {
            Rows x, z{};
            if (m.noisy) normals_of_block(uint32_t(first / 4), z);  // before anything else takes registers
            each([&](int r, int v) { x.v[r][v] = V::load(from + (first + r) * T + v * W); });
            if (gradient) {
                Rows g;
                if (a_.clips_norm) {
                    each([&](int r, int v) { g.v[r][v] = V::load(row(a_.rows.combined + first + r) + v * W); });
                } else {
                    combined(first, g);
                }
                each([&](int r, int v) { x.v[r][v] = V::sub(x.v[r][v], V::mul(m.drift, g.v[r][v])); });
            }
            if (m.noisy) each([&](int r, int v) { x.v[r][v] = V::add(x.v[r][v], V::mul(m.noise, z.v[r][v])); });
            uint32_t bad = any_held_;
            each([&](int r, int v) { bad |= V::not_finite(x.v[r][v]); });
            if (__builtin_expect(bad != 0, 0)) {
                hold(m, first, x, lost);
                continue;
            }
            if (m.clamps) each([&](int r, int v) { x.v[r][v] = V::at_most(m.high, V::at_least(m.low, x.v[r][v])); });
            each([&](int r, int v) { V::store(to + (first + r) * T + v * W, x.v[r][v]); });
        }
        for (int v = 0; v < N; ++v) {
            for (uint32_t left = lost[v]; __builtin_expect(left != 0, 0); left &= left - 1) {
                const int lane = v * W + __builtin_ctz(left);
                fault(lane, step, gradient ? blame(lane) : 0);
            }
        }
    }

    __attribute__((noinline)) void hold(const Move& m, int64_t first, const Rows& x, uint32_t* lost) {
        const uint32_t* dead = words(a_.rows.faults);
        for (int r = 0; r < 4 && first + r < size_; ++r) {
            const int64_t i = first + r;
            for (int v = 0; v < N; ++v) {
                const F before = V::load(m.from + i * T + v * W);
                F t = x.v[r][v];
                uint32_t bad = V::not_finite(t);
                t = V::select(V::finite(t), t, before);
                if (m.clamps) t = V::at_most(m.high, V::at_least(m.low, t));
                t = V::select(V::sign(V::load_int(dead + v * W)), before, t);
                if (a_.frozen != nullptr) {
                    t = V::select(frozen(i, v), before, t);
                    bad &= ~V::bits(frozen(i, v));
                }
                lost[v] |= bad;
                V::store(m.to + i * T + v * W, t);
            }
        }
    }

    // 1 + the leaf of the first unit whose energy, where energies are known, or gradient is not finite; 0 if there is none.
    int64_t blame(int lane) {
        for (int u = 0; u < a_.n_units; ++u) {
            if ((a_.has_or && !finite_energy(u, lane)) || !finite_gradient(u, lane)) return a_.units[u].leaf + 1;
        }
        return 0;
    }
};

}  // namespace
}  // namespace ebmfast
