// Random compositions of every kind of energy, and what the chain engine should make of them, in double precision.
#pragma once

#include <algorithm>
#include <utility>

#include "chain.h"
#include "check.h"
#include "step.h"

namespace ebmfast {

inline Floats filled(int64_t batch, int64_t size, const NoiseId& id, bool uniform, int threads = 1) {
    Floats out(size_t(batch * size), NAN);
    fill(out.data(), batch, size, id, uniform, threads);
    return out;
}

struct Layer {
    int in, out, stride;
    Activation activation;
    Floats w, bias;  // w [out][stride]
    int width = 0, slot = -1, condition_stride = 0;
    Floats shift_weight, shift_bias, scale_weight, scale_bias, fixed;
};

struct Unit {
    UnitKind kind;
    int leaf;
    float constant, a, b, c;
    Floats mean, precision, read_out;
    std::vector<Layer> layers;
};

struct Tree {
    int code, unit;
    Floats values;
    std::vector<Tree> children;
};

struct Case {
    int64_t size, chains;
    Tree tree;
    std::vector<Unit> units;
    std::vector<int> widths;  // of the conditions
    std::vector<Floats> conditions;
    Floats x, drift, noise;
    bool noise_first, clamps, clips, clips_norm, frozen_per_chain;
    float clamp[2], clip, clip_norm;
    std::vector<uint8_t> frozen;
    std::vector<int64_t> faults;
    NoiseId id;
    bool warms;
};

inline Layer random_layer(Random& r, int in, int out, const std::vector<int>& widths) {
    Layer l;
    l.in = in, l.out = out, l.stride = in + r.integer(0, 2);
    l.activation = Activation(r.integer(0, kActivations - 1));
    l.w = r.reals(int64_t(out) * l.stride, 1.5f / std::sqrt(float(in)));
    l.bias = r.reals(r.chance(0.7) ? out : 0, 0.5f);
    const int conditioned = r.integer(0, 2);  // not, by a fixed condition, by one per chain
    if (conditioned == 0) return l;
    l.slot = conditioned == 2 ? r.integer(0, int(widths.size()) - 1) : -1;
    l.width = l.slot >= 0 ? widths[size_t(l.slot)] : r.integer(1, 4);
    l.condition_stride = l.width + r.integer(0, 2);
    if (l.slot < 0) l.fixed = r.reals(l.width, 1);
    l.shift_weight = r.reals(int64_t(out) * l.condition_stride, 0.3f);
    l.shift_bias = r.reals(r.chance(0.5) ? out : 0, 0.3f);
    if (r.chance(0.5)) return l;
    l.scale_weight = r.reals(int64_t(out) * l.condition_stride, 0.3f);
    l.scale_bias = r.reals(r.chance(0.5) ? out : 0, 0.3f);
    return l;
}

inline Unit random_unit(Random& r, int leaf, int64_t size, const std::vector<int>& widths) {
    Unit u{r.one_of({UnitKind::mlp, UnitKind::mlp, UnitKind::diagonal, UnitKind::full, UnitKind::quartic, UnitKind::rosenbrock}),
           leaf, r.real(-1, 1), r.real(0.1f, 0.5f), r.real(0.1f, 1), r.real(-1, 1), {}, {}, {}, {}};
    if (u.kind == UnitKind::rosenbrock && size < 2) u.kind = UnitKind::quartic;
    int in = int(size);
    for (int n = u.kind == UnitKind::mlp ? r.integer(0, 3) : 0; n > 0; --n, in = u.layers.back().out) {
        u.layers.push_back(random_layer(r, in, r.one_of({1, 5, 13, 31}), widths));
    }
    u.read_out = r.reals(in, 1);
    u.mean = r.reals(size, 1);
    u.precision = r.reals(size * size, 1);  // diagonal: the first row
    for (int64_t i = 0; i < size; ++i) {
        for (int64_t j = 0; j < i; ++j) u.precision[size_t(i * size + j)] = u.precision[size_t(j * size + i)];
    }
    return u;
}

inline Tree random_tree(Random& r, int units, int depth) {
    Tree t{depth == 0 || r.chance(0.2) ? int(kLeaf) : r.one_of({int(kSum), int(kLogSumExp)}), r.integer(0, units - 1), {}, {}};
    if (t.code == kLeaf) return t;
    for (int n = r.integer(t.code == kSum ? 0 : 1, 3); n > 0; --n) t.children.push_back(random_tree(r, units, depth - 1));
    if (t.code == kLogSumExp) t.values.push_back(r.real(0.3f, 2));
    for (size_t c = 0; c < t.children.size(); ++c) t.values.push_back(r.real(-1, 1.5f));
    return t;
}

inline Case random_case(uint64_t seed) {
    Random r(seed);
    Case c{};
    c.size = r.integer(1, 9), c.chains = r.one_of({1, 15, 16, 17, 33, 70, 300});
    c.widths = {r.integer(1, 3), r.integer(1, 5)};
    for (const int width : c.widths) c.conditions.push_back(r.reals(c.chains * width, 1));
    for (int n = r.integer(1, 4); n > 0; --n) c.units.push_back(random_unit(r, r.integer(0, 20), c.size, c.widths));
    c.tree = random_tree(r, int(c.units.size()), r.integer(0, 3));
    c.x = r.reals(c.chains * c.size, 1.5f);
    c.drift = {0.05f, 0.02f, 0.03f}, c.noise = {0.2f, r.chance(0.5) ? 0.0f : 0.1f, 0.3f};
    c.noise_first = r.chance(0.3);
    c.clamps = r.chance(0.3), c.clamp[0] = -1, c.clamp[1] = 1.2f;
    c.clips = r.chance(0.3), c.clip = 0.6f;
    c.clips_norm = r.chance(0.3), c.clip_norm = 0.8f;
    c.frozen_per_chain = r.chance(0.5);
    if (r.chance(0.4)) c.frozen = r.mask(c.size * (c.frozen_per_chain ? c.chains : 1));
    c.faults.assign(size_t(c.chains), 0);
    const bool faulted = r.chance(0.3);
    for (int64_t& fault : c.faults) fault = faulted && r.chance(0.2) ? 99 : 0;
    c.id = {seed, (1ull << 32) - 7, 11, 1, 0};
    return c;
}

inline std::pair<double, double> naive_activation(Activation a, double z) {
    const double s = 1 / (1 + std::exp(-z)), k = std::sqrt(2 / M_PI), t = std::tanh(k * (z + 0.044715 * z * z * z));
    const double phi = 0.5 * std::erfc(-z / std::sqrt(2.0));
    switch (a) {
        case Activation::silu: return {z * s, s + z * s * (1 - s)};
        case Activation::relu: return {std::max(z, 0.0), z > 0};
        case Activation::tanh: return {std::tanh(z), 1 - std::tanh(z) * std::tanh(z)};
        case Activation::softplus: return {std::max(z, 0.0) + std::log1p(std::exp(-std::abs(z))), s};
        case Activation::gelu: return {z * phi, phi + z * std::exp(-z * z / 2) / std::sqrt(2 * M_PI)};
        default: return {0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * k * (1 + 3 * 0.044715 * z * z)};
    }
}

inline double at(const Floats& v, size_t i) { return v.empty() ? 0.0 : double(v[i]); }

// E(x) and its gradient of a perceptron for one chain.
inline double naive_mlp(const Case& c, const Unit& u, int64_t chain, const Doubles& x, Doubles& g) {
    Doubles h = x;
    std::vector<Doubles> slopes;
    for (const Layer& l : u.layers) {
        const float* condition = l.slot >= 0 ? c.conditions[size_t(l.slot)].data() + chain * l.width : l.fixed.data();
        Doubles value, slope;
        for (size_t j = 0; j < size_t(l.out); ++j) {
            double z = at(l.bias, j), shift = at(l.shift_bias, j), scale = 1 + at(l.scale_bias, j);
            for (size_t i = 0; i < size_t(l.in); ++i) z += l.w[j * size_t(l.stride) + i] * h[i];
            for (size_t i = 0; i < size_t(l.width); ++i) {
                shift += at(l.shift_weight, j * size_t(l.condition_stride) + i) * condition[i];
                scale += at(l.scale_weight, j * size_t(l.condition_stride) + i) * condition[i];
            }
            const auto [y, d] = naive_activation(l.activation, scale * z + shift);
            value.push_back(y), slope.push_back(d * scale);
        }
        h = value;
        slopes.push_back(slope);
    }
    double energy = u.constant;
    for (size_t i = 0; i < h.size(); ++i) energy += u.read_out[i] * h[i];
    g.assign(u.read_out.begin(), u.read_out.end());
    for (size_t n = u.layers.size(); n-- > 0;) {
        const Layer& l = u.layers[n];
        Doubles before(size_t(l.in), 0.0);
        for (size_t j = 0; j < size_t(l.out); ++j) {
            for (size_t i = 0; i < size_t(l.in); ++i) before[i] += g[j] * slopes[n][j] * l.w[j * size_t(l.stride) + i];
        }
        g = before;
    }
    return energy;
}

inline double naive_unit(const Case& c, const Unit& u, int64_t chain, const Doubles& x, Doubles& g) {
    if (u.kind == UnitKind::mlp) return naive_mlp(c, u, chain, x, g);
    const size_t n = x.size();
    double energy = u.constant;
    g.assign(n, 0.0);
    for (size_t i = 0; i < n; ++i) {
        const double y = x[i], d = y - u.mean[i];
        if (u.kind == UnitKind::diagonal) {
            energy += 0.5 * u.precision[i] * d * d;
            g[i] = u.precision[i] * d;
        } else if (u.kind == UnitKind::full) {
            for (size_t j = 0; j < n; ++j) g[i] += double(u.precision[i * n + j]) * (x[j] - u.mean[j]);
            energy += 0.5 * d * g[i];
        } else if (u.kind == UnitKind::quartic) {
            energy += u.a * (y * y - u.b) * (y * y - u.b) + u.c * y;
            g[i] = 4 * u.a * y * (y * y - u.b) + u.c;
        } else if (i + 1 < n) {
            const double r = x[i + 1] - y * y;
            energy += u.b * r * r + (u.a - y) * (u.a - y);
            g[i] += -4 * u.b * r * y - 2 * (u.a - y);
            g[i + 1] += 2 * u.b * r;
        }
    }
    return energy;
}

inline double naive_value(const Tree& t, const Doubles& energies) {
    if (t.code == kLeaf) return energies[size_t(t.unit)];
    double sum = 0;
    for (size_t c = 0; c < t.children.size(); ++c) {
        const double e = naive_value(t.children[c], energies);
        sum += t.code == kSum ? t.values[c] * e : std::exp(t.values[c + 1] - t.values[0] * e);
    }
    return t.code == kSum ? sum : -std::log(sum) / t.values[0];
}

// Adds dE/dE_u of every unit.
inline void naive_weights(const Tree& t, const Doubles& energies, double up, Doubles& weights) {
    if (t.code == kLeaf) weights[size_t(t.unit)] += up;
    for (size_t c = 0; c < t.children.size(); ++c) {
        double share = t.values[c];
        if (t.code == kLogSumExp) {
            share = std::exp(t.values[c + 1] - t.values[0] * (naive_value(t.children[c], energies) - naive_value(t, energies)));
        }
        naive_weights(t.children[c], energies, up * share, weights);
    }
}

inline Doubles naive_gradient(const Case& c, int64_t chain, const Doubles& x) {
    std::vector<Doubles> gradients(c.units.size());
    Doubles energies, weights(c.units.size(), 0.0), g(x.size(), 0.0);
    for (size_t u = 0; u < c.units.size(); ++u) energies.push_back(naive_unit(c, c.units[u], chain, x, gradients[u]));
    naive_weights(c.tree, energies, 1, weights);
    for (size_t u = 0; u < c.units.size(); ++u) {
        for (size_t i = 0; i < x.size(); ++i) g[i] += weights[u] * gradients[u][i];
    }
    return g;
}

inline Doubles naive_run(const Case& c) {
    Doubles all(c.x.begin(), c.x.end());
    const size_t n = size_t(c.size);
    for (size_t step = 0; step < c.drift.size(); ++step) {
        NoiseId id = c.id;
        id.step += uint32_t(step);
        const Floats z = filled(c.chains, c.size, id, false);
        for (size_t chain = 0; chain < size_t(c.chains); ++chain) {
            if (c.faults[chain] != 0) continue;
            const auto moves = [&](size_t i) { return c.frozen.empty() || c.frozen[(c.frozen_per_chain ? chain * n : 0) + i] == 0; };
            Doubles x(all.begin() + int64_t(chain * n), all.begin() + int64_t((chain + 1) * n));
            const auto add_noise = [&] {
                for (size_t i = 0; i < n; ++i) x[i] += moves(i) ? c.noise[step] * z[chain * n + i] : 0.0;
            };
            if (c.noise_first) add_noise();
            Doubles g = naive_gradient(c, int64_t(chain), x);
            double square = 0;
            for (size_t i = 0; i < n; ++i) {
                if (c.clips) g[i] = std::clamp<double>(g[i], -c.clip, c.clip);
                square += moves(i) ? g[i] * g[i] : 0.0;
            }
            const double factor = c.clips_norm && std::sqrt(square) > c.clip_norm ? c.clip_norm / std::sqrt(square) : 1.0;
            for (size_t i = 0; i < n; ++i) x[i] -= moves(i) ? c.drift[step] * factor * g[i] : 0.0;
            if (!c.noise_first) add_noise();
            for (size_t i = 0; i < n; ++i) {
                if (c.clamps && moves(i)) x[i] = std::clamp<double>(x[i], c.clamp[0], c.clamp[1]);
                all[chain * n + i] = x[i];
            }
        }
    }
    return all;
}

}  // namespace ebmfast
