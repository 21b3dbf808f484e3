// Chains of a tile that accept or reject: MALA and HMC (ebmfast/samplers/metropolis.py, mala.py, hmc.py), every chain for itself.
//
// Per step: noise, or momenta; a proposal; the target there; log r, the logarithm of the acceptance ratio; the decision. The point where
// chains stand (its energy and gradient) is kept from step to step, and evaluated anew where a call begins, with the same bits.
#pragma once

#include "chain_tile.h"

namespace ebmfast {
namespace {

template <int N> class Metropolis : public Tile<N> {
    using Base = Tile<N>;
    using Rows = typename Base::Rows;
    using Base::a_, Base::clip_norm, Base::combine, Base::count_, Base::each, Base::fault, Base::fill, Base::finite_energy, Base::finite_gradient,
        Base::first_, Base::frozen, Base::keys_, Base::load_rows, Base::normals_of_block, Base::program_weights, Base::row, Base::size_, Base::start_noise,
        Base::start, Base::store_rows, Base::T, Base::words;

public:
    using Base::Base;

    void run() {
        start();
        x_ = row(a_.rows.x), y_ = row(a_.rows.moved), z_ = row(a_.rows.normals);
        here_ = {row(a_.rows.combined), row(a_.rows.energy)}, there_ = {row(a_.rows.there), row(a_.rows.energy + 1)};
        fill(a_.rows.accepted, 0.0f);
        begin_warm_up();
        target(x_, here_);
        judge(a_.id.step);
        for (int64_t i = 0; i < a_.steps; ++i) {
            const uint32_t step = a_.id.step + uint32_t(i);
            const double drift = a_.drift[i], noise = a_.noise[i];
            for (int v = 0; v < N; ++v) {
                drift_[v] = V::mul(V::set(a_.drift[i]), V::mul(scale_[v], scale_[v]));
                noise_[v] = V::mul(V::set(a_.noise[i]), scale_[v]);
            }
            draw(step);
            const float inverse_temperature = float(2 * drift / (noise * noise));
            a_.dynamics == ChainDynamics::mala ? mala() : hmc(inverse_temperature);
            for (int v = 0; v < N; ++v) {
                const F gained = V::sub(V::load(here_.energy + v * W), V::load(there_.energy + v * W));
                ratio_[v] = V::fma(gained, V::set(inverse_temperature), ratio_[v]);
            }
            forbid();
            decide(step);
            if (a_.warm_up.state != nullptr) adapt();
        }
        store_rows(x_);
        finish();
    }

private:
    struct Point {
        float *gradient, *energy;  // clipped, 0 where frozen; of the composition
    };

    static F lowest() { return V::set(-__builtin_inff()); }

    void target(const float* x, const Point& to) {
        this->template gradients<true>(x);
        program_weights();
        const float* energy = row(a_.rows.values + a_.n_nodes - 1);
        for (int v = 0; v < T; v += W) V::store(to.energy + v, V::load(energy + v));
        combine(to.gradient);
        if (a_.clips_norm) clip_norm(to.gradient);
        hold_frozen(to.gradient);
    }

    void hold_frozen(float* rows) {
        if (a_.frozen == nullptr) return;
        for (int i = 0; i < size_; ++i) {
            for (int v = 0; v < N; ++v) {
                float* p = rows + i * T + v * W;
                V::store(p, V::select(frozen(i, v), V::set(0.0f), V::load(p)));
            }
        }
    }

    // Stops chains whose target is not finite where they stand.
    void judge(uint32_t step) {
        for (int v = 0; v < N; ++v) {
            uint32_t bad = V::not_finite(V::load(here_.energy + v * W));
            for (int i = 0; i < size_; ++i) {
                F g = V::set(0.0f);
                for (int u = 0; u < a_.n_units; ++u) {
                    g = V::fma(V::load(row(a_.rows.weights + u) + v * W), V::load(row(a_.rows.gradients + u * a_.rows.padded + i) + v * W), g);
                }
                bad |= V::not_finite(a_.frozen != nullptr ? V::select(frozen(i, v), V::set(0.0f), g) : g);
            }
            for (; bad != 0; bad &= bad - 1) {
                const int lane = v * W + __builtin_ctz(bad);
                if (lane < count_) fault(lane, step, blame(lane));
            }
        }
    }

    // 1 + the first leaf whose energy is not finite, else whose gradient is not; 0 if there is none.
    int64_t blame(int lane) {
        for (int u = 0; u < a_.n_units; ++u) {
            if (!finite_energy(u, lane)) return a_.units[u].leaf + 1;
        }
        for (int u = 0; u < a_.n_units; ++u) {
            if (!finite_gradient(u, lane)) return a_.units[u].leaf + 1;
        }
        return 0;
    }

    void draw(uint32_t step) {
        start_noise(step);
        for (int64_t first = 0; first < size_; first += 4) {
            Rows z;
            normals_of_block(uint32_t(first / 4), z);
            each([&](int r, int v) { V::store(z_ + (first + r) * T + v * W, z.v[r][v]); });
        }
        hold_frozen(z_);
    }

    // y = x - drift g + noise z. With b the noise that leads back, z + b = (drift/noise) (g + g') = c, and log q(x|y) - log q(y|x)
    // = (z² - b²)/2 = c (z - c/2).
    void mala() {
        for (int i = 0; i < size_; ++i) {
            for (int v = 0; v < N; ++v) {
                const int at = i * T + v * W;
                const F moved = V::fnma(drift_[v], V::load(here_.gradient + at), V::load(x_ + at));
                V::store(y_ + at, V::fma(noise_[v], V::load(z_ + at), moved));
            }
        }
        target(y_, there_);
        F share[N];
        for (int v = 0; v < N; ++v) ratio_[v] = V::set(0.0f), share[v] = V::div(drift_[v], noise_[v]);
        for (int i = 0; i < size_; ++i) {
            for (int v = 0; v < N; ++v) {
                const int at = i * T + v * W;
                const F c = V::mul(share[v], V::add(V::load(here_.gradient + at), V::load(there_.gradient + at)));
                ratio_[v] = V::fma(c, V::fnma(V::set(0.5f), c, V::load(z_ + at)), ratio_[v]);
            }
        }
    }

    // p = sqrt(m T) z; kicks p -= size/2 g or size g, drifts y += size p/m. The ratio is the loss of kinetic energy over T.
    void hmc(float inverse_temperature) {
        F size[N], half[N], before[N];
        for (int v = 0; v < N; ++v) {
            size[v] = V::sqrt(V::add(drift_[v], drift_[v]));
            half[v] = V::mul(V::set(0.5f), size[v]);
        }
        const F heat = V::set(1.0f / inverse_temperature);
        for (int i = 0; i < size_; ++i) {
            const F sd = V::sqrt(V::mul(heat, V::set(mass(i))));
            for (int v = 0; v < N; ++v) {
                float* p = z_ + i * T + v * W;
                V::store(p, V::mul(sd, V::load(p)));
                V::store(y_ + i * T + v * W, V::load(x_ + i * T + v * W));
            }
        }
        kinetic(before);
        kick(here_.gradient, half);
        for (int leap = 0; leap < a_.leapfrogs; ++leap) {
            for (int i = 0; i < size_; ++i) {
                const F lightness = V::set(1.0f / mass(i));
                for (int v = 0; v < N; ++v) {
                    const int at = i * T + v * W;
                    V::store(y_ + at, V::fma(V::mul(size[v], lightness), V::load(z_ + at), V::load(y_ + at)));
                }
            }
            target(y_, there_);
            kick(there_.gradient, leap + 1 < a_.leapfrogs ? size : half);  // two half kicks at one point are a whole one
        }
        kinetic(ratio_);
        for (int v = 0; v < N; ++v) ratio_[v] = V::mul(V::sub(before[v], ratio_[v]), V::set(inverse_temperature));
    }

    float mass(int i) const { return a_.mass == nullptr ? 1.0f : a_.mass[i]; }

    void kick(const float* gradient, const F* size) {
        for (int i = 0; i < size_; ++i) {
            for (int v = 0; v < N; ++v) {
                float* p = z_ + i * T + v * W;
                V::store(p, V::fnma(size[v], V::load(gradient + i * T + v * W), V::load(p)));
            }
        }
    }

    void kinetic(F* energy) {
        for (int v = 0; v < N; ++v) energy[v] = V::set(0.0f);
        for (int i = 0; i < size_; ++i) {
            const F half = V::set(0.5f / mass(i));
            for (int v = 0; v < N; ++v) {
                const F p = V::load(z_ + i * T + v * W);
                energy[v] = V::fma(V::mul(half, p), p, energy[v]);
            }
        }
    }

    // log r is -inf for chains that have a fault, where the target is not finite or anything is NaN, and out of bounds.
    void forbid() {
        for (int v = 0; v < N; ++v) {
            F r = V::select(V::sign(V::load_int(words(a_.rows.faults) + v * W)), lowest(), ratio_[v]);
            r = V::select(V::finite(V::load(there_.energy + v * W)), r, lowest());
            if (a_.clamps) {
                for (int i = 0; i < size_; ++i) {
                    const F y = V::load(y_ + i * T + v * W);
                    F inside = V::select(V::less(y, V::set(a_.low)), lowest(), r);
                    inside = V::select(V::less(V::set(a_.high), y), lowest(), inside);
                    r = a_.frozen != nullptr ? V::select(frozen(i, v), r, inside) : inside;
                }
            }
            ratio_[v] = V::select(V::less(lowest(), r), r, lowest());
        }
    }

    void decide(uint32_t step) {
        for (int v = 0; v < N; ++v) {
            const I low = V::load_int(words(a_.rows.lanes) + v * W), high = V::load_int(words(a_.rows.lanes + 1) + v * W);
            const I stream = V::bit_xor(V::bit_and(high, V::set_int(0x0fffffffu)), V::set_int(a_.accept_stream << 28));
            const Words<V> w = philox<V>(V::set_wide(0), V::set_wide(step), V::widen(low), V::widen(stream), keys_.of_round[0]);
            const M taken = V::less(V::mul(ratio_[v], V::set(-2.0f)), minus_two_log<V>(uniform<V>(w.w[0])));
            float *accepted = row(a_.rows.accepted) + v * W, *energy = here_.energy + v * W;
            V::store(accepted, V::add(V::load(accepted), V::select(taken, V::set(1.0f), V::set(0.0f))));
            V::store(energy, V::select(taken, V::load(there_.energy + v * W), V::load(energy)));
            for (int i = 0; i < size_; ++i) {
                float *x = x_ + i * T + v * W, *g = here_.gradient + i * T + v * W;
                V::store(x, V::select(taken, V::load(y_ + i * T + v * W), V::load(x)));
                V::store(g, V::select(taken, V::load(there_.gradient + i * T + v * W), V::load(g)));
            }
        }
    }

    // Columns of the warm-up's state, as in ebmfast/samplers/warmup.py.
    enum { kLogScale, kLogAverage, kError, kCount, kColumns };

    float* warm(int column, int v) { return row(a_.rows.warm_up + column) + v * W; }

    void begin_warm_up() {
        for (int v = 0; v < N; ++v) scale_[v] = V::set(1.0f);
        if (a_.warm_up.state == nullptr) return;
        load_rows(a_.warm_up.state + first_ * kColumns, kColumns, kColumns, row(a_.rows.warm_up));
        for (int v = 0; v < N; ++v) rescale(v);
    }

    void rescale(int v) {
        const M active = V::less(V::load(warm(kCount, v)), V::set(a_.warm_up.steps));
        scale_[v] = exponential<V>(V::select(active, V::load(warm(kLogScale, v)), V::load(warm(kLogAverage, v))));
    }

    // Dual averaging (Hoffman and Gelman 2014, section 3.2) of chains that are not warm yet.
    void adapt() {
        const WarmUp& w = a_.warm_up;
        for (int v = 0; v < N; ++v) {
            const F count = V::load(warm(kCount, v)), m = V::add(count, V::set(1.0f));
            const M active = V::less(count, V::set(w.steps));
            const F accepted = exponential<V>(V::at_most(V::set(0.0f), ratio_[v])), before = V::load(warm(kError, v));
            const F gap = V::sub(V::sub(V::set(w.target), accepted), before);
            const F error = V::add(before, V::div(gap, V::add(m, V::set(w.t0))));
            const F log_scale = V::fnma(V::div(V::sqrt(m), V::set(w.gamma)), error, V::set(0x1.26bb1cp+1f));  // ln 10
            const F average = V::load(warm(kLogAverage, v)), share = exponential<V>(V::mul(V::set(-w.kappa), logarithm<V>(m)));
            const F columns[kColumns] = {log_scale, V::fma(share, V::sub(log_scale, average), average), error, m};
            for (int k = 0; k < kColumns; ++k) V::store(warm(k, v), V::select(active, columns[k], V::load(warm(k, v))));
            rescale(v);
        }
    }

    void finish() {
        for (int c = 0; c < count_; ++c) {
            a_.accepted[first_ + c] += row(a_.rows.accepted)[c];
            a_.energies[first_ + c] = here_.energy[c];
            if (a_.warm_up.state == nullptr) continue;
            for (int k = 0; k < kColumns; ++k) a_.warm_up.state[(first_ + c) * kColumns + k] = row(a_.rows.warm_up + k)[c];
        }
    }

    float *x_, *y_, *z_;  // states, proposals, noise or momenta
    Point here_, there_;
    F drift_[N], noise_[N], scale_[N], ratio_[N];
};

}  // namespace
}  // namespace ebmfast
