// The C++ core alone, for sanitizers (`make sanitize`): every supported level against naive code.

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <stdexcept>
#include <string>
#include <thread>

#include "check.h"
#include "composition.h"
#include "cuda/plan.h"
#include "pool.h"

using namespace ebmfast;
using cuda::Product;

namespace {

using Words = std::array<uint32_t, 4>;

Words naive_philox(Words c, uint64_t seed) {
    uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
        const uint64_t p0 = 0xD2511F53ull * c[0], p1 = 0xCD9E8D57ull * c[2];
        c = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1, uint32_t(p0)};
    }
    return c;
}

float naive_uniform(uint32_t w) { return std::min(float(w) * 0x1p-32f + 0x1p-33f, 1 - 0x1p-24f); }

void test_known_answers() {
    context = "known answers";
    const struct {
        Words counter, expected;
        uint64_t seed;
    } known[] = {  // Random123's kat_vectors
        {{0, 0, 0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}, 0},
        {{~0u, ~0u, ~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}, ~0ull},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}, 0x299f31d0a4093822},
    };
    for (const auto& k : known) {
        CHECK(naive_philox(k.counter, k.seed) == k.expected, "seed %llx", (unsigned long long)k.seed);
        const uint64_t chain = uint64_t(k.counter[3] & 0x0fffffffu) << 32 | k.counter[2];
        const NoiseId id{k.seed, chain, k.counter[1], k.counter[3] >> 28, k.counter[0]};
        Floats expected;
        for (const uint32_t w : k.expected) expected.push_back(naive_uniform(w));
        each_level([&] { check_bits("uniform", filled(1, 4, id, true), expected); });
    }
}

void test_fill(int64_t batch, int64_t size, uint64_t first_chain) {
    context = "fill " + std::to_string(batch) + " x " + std::to_string(size);
    const NoiseId id{0x0123456789abcdefull, first_chain, 7, 3, 0};
    Floats uniforms, normals;
    Doubles exact;
    for (int64_t b = 0; b < batch; ++b) {
        const uint64_t chain = first_chain + uint64_t(b);
        for (int64_t i = 0; i < size; ++i) {
            const Words w = naive_philox({uint32_t(i / 4), id.step, uint32_t(chain), id.stream << 28 | uint32_t(chain >> 32)}, id.seed);
            const size_t pair = size_t(i % 4 / 2 * 2);
            const float u = float(w[pair]) * 0x1p-32f + 0x1p-33f;
            const double r = std::sqrt(-2 * std::log(double(u))), angle = w[pair + 1] * 0x1p-32 * 2 * M_PI;
            uniforms.push_back(naive_uniform(w[size_t(i % 4)]));
            exact.push_back(i % 2 == 0 ? r * std::cos(angle) : r * std::sin(angle));
        }
    }
    each_level([&] {
        for (const int threads : {1, 3}) {
            check_bits("uniform", filled(batch, size, id, true, threads), uniforms);
            const Floats got = filled(batch, size, id, false, threads);
            if (normals.empty()) normals = got;
            check_near("normal", got, exact, 1e-6);  // the bound in rng.py
            check_bits("normal", got, normals);
        }
    });
}

void test_step(int64_t batch, int64_t size, uint64_t seed) {
    context = "step " + std::to_string(batch) + " x " + std::to_string(size) + ", seed " + std::to_string(seed);
    Random r(seed);
    StepArgs a{};
    a.batch = batch, a.size = size, a.n_gradients = r.integer(0, 3);
    a.bf16 = seed % 2 == 1, a.weights_per_chain = r.chance(0.5);
    a.clips = r.chance(0.5), a.clip = 0.7f;
    a.clamps = r.chance(0.5), a.low = -0.8f, a.high = 0.9f;
    a.id = {seed, (1ull << 32) - 2, 0, 1, 0};
    const float noise = r.chance(0.8) ? 0.3f : 0.0f, norm_limit = r.chance(0.5) ? 0.5f : -1.0f;
    const bool own = r.chance(0.5);
    const auto frozen = r.mask(r.chance(0.5) ? size * (own ? batch : 1) : 0);
    a.frozen = pointer(frozen), a.frozen_stride = own ? size : 0;
    const auto held = [&](size_t i) { return !frozen.empty() && frozen[own ? i : i % size_t(size)] != 0; };
    const Floats weights = r.reals(a.n_gradients * (a.weights_per_chain ? batch : 1), 1), start = r.reals(batch * size, 1);
    std::vector<int64_t> entry(size_t(batch), 0);
    for (int64_t& fault : entry) fault = r.chance(0.1) ? 99 : 0;

    auto faults = entry;
    std::vector<Floats> gradients;
    std::vector<std::vector<uint16_t>> halves;  // bfloat16
    std::vector<const void*> pointers;
    for (int k = 0; k < a.n_gradients; ++k) {
        gradients.push_back(r.reals(batch * size, 2));
        if (r.chance(0.7) && batch > 0) {
            const size_t i = size_t(batch / 2 * size + r.integer(0, int(size) - 1));  // of one chain: the first that moves is blamed
            gradients.back()[i] = NAN;
            int64_t& fault = faults[i / size_t(size)];
            if (fault == 0 && !held(i)) fault = ((4 + 1) << 16) + k + 1;
        }
        halves.emplace_back();
        for (const float g : gradients.back()) {
            uint32_t bits;
            std::memcpy(&bits, &g, 4);
            halves.back().push_back(uint16_t(bits >> 16));
        }
    }
    for (size_t k = 0; k < gradients.size(); ++k) pointers.push_back(a.bf16 ? (const void*)halves[k].data() : gradients[k].data());

    Floats expected;
    each_level([&] {
        for (const int threads : {1, 2, 5}) {
            Floats x = start;
            auto got = entry;
            a.x = x.data();
            StepPlan plan(a, got.data(), norm_limit);
            for (const uint32_t step : {4u, 5u}) plan.run(pointers.data(), pointer(weights), step, 0.1f, noise, threads);
            if (expected.empty()) expected = x;
            check_bits("x", x, expected);
            check_bits("faults", got, faults);
        }
    });
    for (size_t i = 0; i < start.size(); ++i) {
        const float y = expected[i];
        CHECK(std::isfinite(y), "x[%zu]: %g", i, double(y));
        if (held(i) || entry[i / size_t(size)] != 0) CHECK(y == start[i], "x[%zu]: %g, was %g", i, double(y), double(start[i]));
    }
}

void emit(const Tree& t, std::vector<std::pair<int, int>>& codes, Floats& values) {
    for (const Tree& child : t.children) emit(child, codes, values);
    codes.emplace_back(t.code, t.code == kLeaf ? t.unit : int(t.children.size()));
    values.insert(values.end(), t.values.begin(), t.values.end());
}

std::vector<std::pair<int, int>> codes_of(const Case& c) {
    std::vector<std::pair<int, int>> codes;
    Floats values;
    emit(c.tree, codes, values);
    return codes;
}

Floats values_of(const Case& c) {
    std::vector<std::pair<int, int>> codes;
    Floats values;
    emit(c.tree, codes, values);
    return values;
}

// Keeps pointers into `c`.
template <class P> void fill_in(P& plan, const Case& c, bool bf16) {
    plan.set_values(values_of(c));
    for (const Unit& u : c.units) {
        int unit;
        if (u.kind == UnitKind::mlp) {
            std::vector<std::pair<std::shared_ptr<PackedMatrix>, Activation>> layers;
            for (const Layer& l : u.layers) {
                layers.emplace_back(std::make_shared<PackedMatrix>(l.out, l.in, bf16), l.activation);
                layers.back().first->set_source(l.w.data(), l.stride);
            }
            unit = plan.add_mlp(u.leaf, layers);
        } else if (u.kind == UnitKind::full) {
            const auto precision = std::make_shared<PackedMatrix>(int(c.size), int(c.size), false);
            precision->set_source(u.precision.data(), c.size);
            unit = plan.add_full(u.leaf, precision);
        } else {
            unit = plan.add(u.kind, u.leaf);
        }
        plan.set_constants(unit, u.kind == UnitKind::mlp ? NAN : u.constant, u.a, u.b, u.c);
        plan.set_vectors(unit, u.mean.data(), u.precision.data(), u.read_out.data(), u.kind == UnitKind::mlp ? &u.constant : nullptr);
        for (size_t n = 0; n < u.layers.size(); ++n) {
            const Layer& l = u.layers[n];
            const ChainConditioning k{l.width, l.slot, pointer(l.bias), pointer(l.shift_weight), pointer(l.shift_bias),
                                      pointer(l.scale_weight), pointer(l.scale_bias), l.condition_stride, l.condition_stride};
            plan.set_conditioning(unit, int(n), k, l.fixed);
        }
    }
    plan.set_sampler(c.noise_first, c.clamps ? c.clamp : nullptr, c.clips ? &c.clip : nullptr, c.clips_norm ? &c.clip_norm : nullptr);
}

ChainPlan build(const Case& c, bool bf16 = false) {
    ChainPlan plan(c.size, codes_of(c));
    fill_in(plan, c, bf16);
    return plan;
}

struct Result {
    Floats x;
    std::vector<int64_t> faults;
    Floats accepted, energies, warm_up;  // of samplers that accept or reject
};

template <class T> std::vector<T> rows(const std::vector<T>& v, int64_t first, int64_t count, int64_t width) {
    return {v.begin() + first * width, v.begin() + (first + count) * width};
}

// Chains first .. first + count. The caller's thread is a new one: its scratch has no more than this program needs.
Result run(ChainPlan& plan, const Case& c, int64_t first, int64_t count, int threads) {
    Result done{rows(c.x, first, count, c.size), rows(c.faults, first, count, 1), Floats(size_t(count)), Floats(size_t(count)), Floats(size_t(4 * count))};
    std::vector<Floats> conditions;
    for (size_t s = 0; s < c.widths.size(); ++s) conditions.push_back(rows(c.conditions[s], first, count, c.widths[s]));
    const bool own = c.frozen_per_chain && !c.frozen.empty();
    const auto frozen = own ? rows(c.frozen, first, count, c.size) : c.frozen;
    NoiseId id = c.id;
    id.first_chain += uint64_t(first);
    ChainCall call{done.x.data(), count, id, int64_t(c.drift.size()), c.drift.data(), c.noise.data(), {},
                   pointer(frozen), own, done.faults.data(), threads};
    call.accepted = done.accepted.data(), call.energies = done.energies.data(), call.accept_stream = 3;
    if (c.warms) call.warm_up = {done.warm_up.data(), 2, 0.6f, 0.05f, 10, 0.75f};
    for (const Floats& condition : conditions) call.conditions.push_back(condition.data());
    bool fine = false;
    std::thread([&] { fine = plan.run(call); }).join();
    CHECK(fine == std::all_of(done.faults.begin(), done.faults.end(), [](int64_t f) { return f == 0; }), "run returned %d", fine);
    return done;
}

Result run(ChainPlan& plan, const Case& c, int threads = 1) { return run(plan, c, 0, c.chains, threads); }

Floats energies(ChainPlan& plan, const Case& c, int threads) {
    std::vector<const float*> conditions;
    for (const Floats& condition : c.conditions) conditions.push_back(condition.data());
    Floats out(c.units.size() * size_t(c.chains), NAN);
    std::thread([&] { plan.energies(c.x.data(), c.chains, conditions, out.data(), threads); }).join();
    return out;
}

// Roundings of 6e-8 each in sums of some 30 terms and energies of magnitude 10: up to 6e-7 was measured over all levels and cases.
constexpr double kTolerance = 5e-6;
// bfloat16 has 8 bits, and there are up to three layers: up to 0.024 was measured.
constexpr double kTolerance16 = 0.06;

void test_chain(uint64_t seed) {
    context = "composition " + std::to_string(seed);
    const Case c = random_case(seed);
    const Doubles expected = naive_run(c);
    Doubles expected_energies;
    for (const Unit& u : c.units) {
        for (int64_t chain = 0; chain < c.chains; ++chain) {
            Doubles g;
            const Doubles x(c.x.begin() + chain * c.size, c.x.begin() + (chain + 1) * c.size);
            expected_energies.push_back(naive_unit(c, u, chain, x, g));
        }
    }
    const auto check = [&](ChainPlan& plan, double tolerance) {
        plan.refresh();
        const Result one = run(plan, c);
        check_near("x", one.x, expected, tolerance);
        check_bits("faults", one.faults, c.faults);
        for (const int threads : {2, 3}) {
            check_bits("x by threads", run(plan, c, threads).x, one.x);
            check_near("energies", energies(plan, c, threads), expected_energies, tolerance);
        }
        for (const int64_t chain : {int64_t(0), c.chains / 2, c.chains - 1}) {
            check_bits("x of a chain alone", run(plan, c, chain, 1, 1).x, rows(one.x, chain, 1, c.size));
        }
    };
    ChainPlan plan = build(c), plan16 = build(c, true);
    each_level([&] {
        check(plan, kTolerance);
        if (chain_kernels().bf16) check(plan16, kTolerance16);
    });
}

// One step of MALA, or of HMC with one leapfrog and unit mass, proposes what a step of Langevin dynamics does: a chain is there, or where it
// was. Then more steps: neither threads nor neighbours change a bit.
void test_metropolis(uint64_t seed) {
    context = "metropolis " + std::to_string(seed);
    Random r(seed);
    Case c = random_case(seed);
    const bool hmc = r.chance(0.5), bounded = c.clamps;
    c.noise_first = c.clamps = false;
    if (hmc) c.clips = c.clips_norm = false;
    c.drift[0] = 0.5f * c.noise[0] * c.noise[0];  // at temperature 1
    c.drift.resize(1), c.noise.resize(1);
    const Doubles proposals = naive_run(c);
    c.clamps = bounded;
    const auto plan_of = [&](int leapfrogs) {
        ChainPlan plan = build(c);
        plan.set_metropolis(hmc ? ChainDynamics::hmc : ChainDynamics::mala, leapfrogs, hmc && leapfrogs > 1 ? Floats(size_t(c.size), 0.5f) : Floats());
        return plan;
    };
    Case longer = c;
    longer.drift.assign(5, c.drift[0]), longer.noise.assign(5, c.noise[0]);
    longer.warms = r.chance(0.5);
    ChainPlan one = plan_of(1), more = plan_of(3);
    each_level([&] {
        one.refresh();
        const Result moved = run(one, c);
        for (int64_t chain = 0; chain < c.chains; ++chain) {
            const bool taken = moved.accepted[size_t(chain)] == 1;
            CHECK(taken || moved.accepted[size_t(chain)] == 0, "accepted %g of one", double(moved.accepted[size_t(chain)]));
            CHECK(!taken || c.faults[size_t(chain)] == 0, "chain %d has a fault and moved", int(chain));
            for (int64_t i = chain * c.size; i < (chain + 1) * c.size; ++i) {
                const double want = taken ? proposals[size_t(i)] : c.x[size_t(i)], error = std::abs(moved.x[size_t(i)] - want);
                CHECK(error <= (taken ? kTolerance * (1 + std::abs(want)) : 0), "chain %d, %s: off by %g", int(chain), taken ? "taken" : "left", error);
            }
        }
        more.refresh();
        const Result many = run(more, longer);
        check_bits("x by threads", run(more, longer, 3).x, many.x);
        for (const int64_t chain : {int64_t(0), c.chains / 2, c.chains - 1}) {
            const Result alone = run(more, longer, chain, 1, 1);
            check_bits("x of a chain alone", alone.x, rows(many.x, chain, 1, c.size));
            check_bits("accepted", alone.accepted, rows(many.accepted, chain, 1, 1));
            check_bits("warm-up", alone.warm_up, rows(many.warm_up, chain, 1, 4));
            CHECK(!longer.warms || c.faults[size_t(chain)] != 0 || alone.warm_up[3] == 2, "%g steps of a warm-up", double(alone.warm_up[3]));
        }
    });
}

struct OnDevice {
    Result moved;
    Floats energies;
    cuda::Launch launch;
};

// The text of the GPU's kernels, run by the host on chains first .. first + count.
OnDevice run_on_device(const Case& c, int64_t first, int64_t count, Product product, const cuda::Device& device) {
    cuda::DevicePlan plan(c.size, codes_of(c), product == Product::tf32, device);
    fill_in(plan, c, product == Product::bf16);
    const Aligned<double> blob(size_t(plan.blob_bytes()) / sizeof(double));
    std::fill_n(blob.data(), blob.size(), NAN);
    const auto base = reinterpret_cast<uintptr_t>(blob.data());
    const auto& image = plan.image(base);
    std::copy(image.begin(), image.end(), reinterpret_cast<unsigned char*>(blob.data()));
    plan.prepare(base, nullptr);
    OnDevice done{{rows(c.x, first, count, c.size), rows(c.faults, first, count, 1), {}, {}, {}}, Floats(c.units.size() * size_t(count), NAN), plan.choose(count)};
    std::vector<Floats> conditions;
    std::vector<const float*> pointers;
    for (size_t s = 0; s < c.widths.size(); ++s) conditions.push_back(rows(c.conditions[s], first, count, c.widths[s]));
    for (const Floats& condition : conditions) pointers.push_back(condition.data());
    const bool own = c.frozen_per_chain && !c.frozen.empty();
    const auto frozen = own ? rows(c.frozen, first, count, c.size) : c.frozen;
    NoiseId id = c.id;
    id.first_chain += uint64_t(first);
    const Floats values = values_of(c);
    const Aligned<float> memory(size_t(done.launch.memory_bytes) / sizeof(float));
    std::fill_n(memory.data(), memory.size(), NAN);
    plan.energies(base, done.moved.x.data(), count, pointers, done.energies.data(), values.data(), memory.data(), nullptr);
    const ChainCall call{done.moved.x.data(), count, id, int64_t(c.drift.size()), c.drift.data(), c.noise.data(), pointers,
                         pointer(frozen), own, done.moved.faults.data(), 0};
    plan.run(base, call, values.data(), memory.data(), nullptr);
    return done;
}

constexpr cuda::Device kDevice{false, 4, 200 << 10, false};

void test_device(uint64_t seed) {
    const Case c = random_case(seed);
    const Doubles expected = naive_run(c);
    Doubles expected_energies;
    for (const Unit& u : c.units) {
        for (int64_t chain = 0; chain < c.chains; ++chain) {
            Doubles g;
            const Doubles x(c.x.begin() + chain * c.size, c.x.begin() + (chain + 1) * c.size);
            expected_energies.push_back(naive_unit(c, u, chain, x, g));
        }
    }
    for (const Product product : {Product::float32, Product::tf32, Product::bf16}) {
        context = "device " + std::to_string(seed) + ", product " + std::to_string(int(product));
        // Up to 0.0018 of x and 0.0052 of energies was measured.
        const double tolerance = product == Product::float32 ? kTolerance : product == Product::tf32 ? 0.005 : 0.02;
        const OnDevice one = run_on_device(c, 0, c.chains, product, kDevice);
        check_near("x", one.moved.x, expected, tolerance);
        check_near("energies", one.energies, expected_energies, tolerance);
        check_bits("faults", one.moved.faults, c.faults);
        // Threads in reverse; processors for every size of block; too little shared memory for weights, for units together, for scratch.
        for (const cuda::Device& other : {cuda::Device{false, 4, 200 << 10, true}, {false, 1, 200 << 10, false}, {false, 1000, 48 << 10, true},
                                          {false, 2, 12 << 10, true}, {false, 2, 2000, false}, {false, 2, 0, true}}) {
            const OnDevice again = run_on_device(c, 0, c.chains, product, other);
            if (again.launch.registers != one.launch.registers) continue;
            check_bits("x on another device", again.moved.x, one.moved.x);
            check_bits("energies on another device", again.energies, one.energies);
        }
        for (const int64_t chain : {int64_t(0), c.chains / 2, c.chains - 1}) {
            check_bits("x of a chain alone", run_on_device(c, chain, 1, product, kDevice).moved.x, rows(one.moved.x, chain, 1, c.size));
        }
    }
}

// E = sum (x_i^2 - 1)^2 overflows where x = 1e13, and where x = 1e12 one step later; under an OR with a constant its weight is 0 there.
void test_overflow(bool with_or, bool clips_norm) {
    context = std::string("overflow") + (with_or ? ", OR" : "") + (clips_norm ? ", clip_norm" : "");
    const int64_t n = 5;
    Case c{};
    c.size = n, c.chains = 70;
    const Unit flat{UnitKind::diagonal, 3, 0, 0, 0, 0, Floats(n), Floats(n), {}, {}};
    const Unit quartic{UnitKind::quartic, 7, 0, 1, 1, 0, {}, {}, {}, {}};
    c.units = {flat, quartic};
    c.tree = {with_or ? kLogSumExp : kSum, 0, {1, 1}, {{kLeaf, 0, {}, {}}, {kLeaf, 1, {}, {}}}};
    if (with_or) c.tree.values.push_back(1);
    c.clips_norm = clips_norm, c.clip_norm = 1e37f;
    c.drift = {1, 0.01f, 0.01f}, c.noise = {0.2f, 0.1f, 0};
    c.x = Random(1).reals(c.chains * n, 0.3f);
    c.faults.assign(size_t(c.chains), 0);
    c.id = {5, 0, 20, 1, 0};
    c.frozen_per_chain = true;
    c.frozen.assign(size_t(c.chains * n), 0);
    c.frozen[60 * n + 2] = 1;  // what overflows there harms nobody
    Case bad = c;
    bad.x[60 * n + 2] = 1e13f;
    std::fill_n(bad.x.begin() + 18 * n, n, 1e13f);
    std::fill_n(bad.x.begin() + 40 * n, n, 1e12f);
    ChainPlan plan = build(c);
    each_level([&] {
        plan.refresh();
        Result expected = run(plan, c);
        check_bits("faults", expected.faults, c.faults);
        expected.faults[18] = ((20 + 1) << 16) + 7 + 1;
        expected.faults[40] = with_or ? 0 : ((21 + 1) << 16) + 7 + 1;
        const Result got = run(plan, bad);
        check_near("x", rows(got.x, 18, 1, n), Doubles(n, 1e13), 1e-7);
        check_near("x", rows(got.x, 40, 1, n), Doubles(n, with_or ? 1e12 : -4e36), 1e-6);
        expected.x[60 * n + 2] = 1e13f;
        for (const int64_t chain : {18, 40, 60}) {
            if (chain != 60 || with_or) std::copy_n(got.x.begin() + chain * n, n, expected.x.begin() + chain * n);
        }
        for (const int threads : {1, 3}) {
            check_bits("x", run(plan, bad, threads).x, expected.x);
            check_bits("faults", run(plan, bad, threads).faults, expected.faults);
        }
        for (const cuda::Device& device : {kDevice, cuda::Device{false, 1, 0, true}}) {  // in registers, and not
            const OnDevice found = run_on_device(bad, 0, c.chains, Product::float32, device);
            CHECK(found.launch.registers == (device.shared_bytes > 0), "%d", found.launch.registers);
            check_bits("faults on a device", found.moved.faults, expected.faults);
            check_near("x on a device", found.moved.x, Doubles(expected.x.begin(), expected.x.end()), 1e-5);
        }
    });
}

void test_parallel_for() {
    context = "parallel_for";
    constexpr int kUnits = 1000, kInner = 7;
    using Counts = std::vector<std::atomic<int>>;
    const auto check_once = [](const Counts& counts, int n) {
        for (int i = 0; i < int(counts.size()); ++i) {
            const int count = counts[size_t(i)];
            CHECK(count == (i < n), "unit %d of %d: %d times", i, n, count);
        }
    };
    const auto nested = [&check_once](int64_t chunk) {
        for (const int units : {0, 1, 3, kUnits}) {
            Counts outer(kUnits), inner(kUnits * kInner);
            const auto work = [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) {
                    ++outer[size_t(i)];
                    parallel_for(kInner, 3, [&](int64_t from, int64_t to) {
                        for (int64_t j = from; j < to; ++j) ++inner[size_t(i * kInner + j)];
                    });
                }
            };
            parallel_for(units, 4, work, chunk);
            check_once(outer, units);
            check_once(inner, units * kInner);
        }
    };
    std::vector<std::thread> callers;
    for (int t = 0; t < 4; ++t) callers.emplace_back([&nested, t] { nested(3 * t); });
    for (std::thread& caller : callers) caller.join();
}

// What work throws, on whichever thread, comes out of the call once everybody has stopped, and the pool goes on working.
void test_exceptions() {
    context = "exceptions";
    for (const int bad : {0, 17, 199}) {
        std::atomic<int> inside{0};
        bool caught = false;
        try {
            parallel_for(200, 4, [&](int64_t begin, int64_t end) {
                ++inside;
                std::this_thread::sleep_for(std::chrono::microseconds(50));
                const bool here = begin <= bad && bad < end;
                --inside;
                if (here) throw std::runtime_error("bad unit");
            }, 1);
        } catch (const std::runtime_error&) {
            caught = true;
        }
        CHECK(caught && inside == 0, "unit %d: caught %d, %d still inside", bad, int(caught), inside.load());
    }
    std::atomic<int> sum{0};
    parallel_for(100, 4, [&](int64_t begin, int64_t end) { sum += int(end - begin); });
    CHECK(sum == 100, "%d", sum.load());
}

// Two compositions at once, each with enough work for helpers.
void test_two_plans() {
    context = "two plans";
    std::vector<Case> cases;
    for (uint64_t seed = 0; cases.size() < 2; ++seed) {
        const Case c = random_case(seed);
        if (build(c).work() * double(c.chains) > 1e6) cases.push_back(c);
    }
    std::vector<std::thread> callers;
    for (const Case& c : cases) {
        callers.emplace_back([&c] {
            ChainPlan plan = build(c);
            plan.refresh();
            const Result once = run(plan, c);
            for (int i = 0; i < 10; ++i) check_bits("x", run(plan, c, 3).x, once.x);
        });
    }
    for (std::thread& caller : callers) caller.join();
}

// The level is chosen at the first call, whoever makes it.
void test_first_use() {
    context = "first use";
    std::vector<std::thread> callers;
    for (int t = 0; t < 4; ++t) callers.emplace_back([] { CHECK(std::isfinite(filled(1, 1, {}, false)[0]), "not a number"); });
    for (std::thread& caller : callers) caller.join();
}

}  // namespace

int main() {
    test_first_use();
    test_known_answers();
    using Shapes = std::vector<std::pair<int64_t, int64_t>>;
    // Chains that share tiles, chains of several tiles, nothing at all.
    for (const auto& [batch, size] : Shapes{{1, 1}, {3, 5}, {70, 13}, {5, 16}, {17, 300}, {2, 5000}, {0, 4}, {33, 5000}}) {
        for (const uint64_t first : {0ull, (1ull << 32) - 2}) test_fill(batch, size, first);
        for (uint64_t seed = 0; seed < 12; ++seed) test_step(batch, size, seed);
    }
    for (uint64_t seed = 0; seed < 200; ++seed) test_chain(seed), test_metropolis(seed), test_device(seed);
    for (const bool with_or : {false, true}) {
        for (const bool clips_norm : {false, true}) test_overflow(with_or, clips_norm);
    }
    test_parallel_for();
    test_exceptions();
    test_two_plans();
    std::string names;
    each_level([&] { names += std::string(names.empty() ? "" : ", ") + kernels().name; });
    std::printf("passed on %s\n", names.c_str());
}
