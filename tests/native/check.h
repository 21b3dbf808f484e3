// What the native tests share: checks that print values, seeded random numbers, a loop over the supported levels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dispatch.h"

namespace ebmfast {

using Doubles = std::vector<double>;
using Floats = std::vector<float>;

inline std::string context;  // what is being tested

// Conditions are written so that NaN fails.
#define CHECK(condition, ...)                                                                            \
    do {                                                                                                 \
        if (!(condition)) {                                                                              \
            std::fprintf(stderr, "%s:%d: %s: not %s: ", __FILE__, __LINE__, context.c_str(), #condition); \
            std::fprintf(stderr, __VA_ARGS__);                                                           \
            std::fputc('\n', stderr);                                                                    \
            std::_Exit(1);                                                                               \
        }                                                                                                \
    } while (0)

template <class T> void check_bits(const char* what, const std::vector<T>& got, const std::vector<T>& expected) {
    CHECK(got.size() == expected.size(), "%s: %zu, %zu", what, got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
        CHECK(std::memcmp(&got[i], &expected[i], sizeof(T)) == 0, "%s[%zu]: %.9g, %.9g", what, i, double(got[i]), double(expected[i]));
    }
}

inline void check_near(const char* what, const Floats& got, const Doubles& expected, double tolerance) {
    CHECK(got.size() == expected.size(), "%s: %zu, %zu", what, got.size(), expected.size());
    for (size_t i = 0; i < got.size(); ++i) {
        const double limit = tolerance * (1 + std::abs(expected[i]));
        CHECK(std::abs(got[i] - expected[i]) <= limit, "%s[%zu]: %.9g, %.9g, tolerance %.2g", what, i, double(got[i]), expected[i], limit);
    }
}

template <class F> void each_level(const F& f) {
    const std::string before = context;
    for (const Level& level : levels()) {
        if (!level.supported) continue;
        set_level(level.kernels->name);
        context = before + ", " + level.kernels->name;
        f();
    }
    context = before;
}

class Random {
public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    int integer(int low, int high) { return low + int(engine_() % uint64_t(high - low + 1)); }
    float real(float low, float high) { return low + (high - low) * float(engine_() >> 40) * 0x1p-24f; }
    bool chance(double p) { return real(0, 1) < p; }
    template <class T> T one_of(std::initializer_list<T> values) { return values.begin()[integer(0, int(values.size()) - 1)]; }
    Floats reals(int64_t n, float scale) {
        Floats v(size_t(n), 0.0f);
        for (float& y : v) y = real(-scale, scale);
        return v;
    }
    std::vector<uint8_t> mask(int64_t n) {
        std::vector<uint8_t> v(size_t(n), 0);
        for (uint8_t& y : v) y = chance(0.3);
        return v;
    }

private:
    std::mt19937_64 engine_;
};

// Null for an empty one.
template <class T> const T* pointer(const std::vector<T>& v) { return v.empty() ? nullptr : v.data(); }

}  // namespace ebmfast
