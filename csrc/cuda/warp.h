// A warp's registers and what its 32 threads do together, in one text for device and host. On the device a PerLane is one register and
// lanes(f) calls f once, for the thread itself; on the host it is an array and lanes(f) a loop. Exchanges of registers (from_lane,
// any_of, multiply) are intrinsics there and loops over the documented layouts here. So a warp's code is a sequence of lanes(...) and
// exchanges, and the host runs all of it but the instructions themselves.
#pragma once

#include "../philox.h"

#if defined(__CUDA_ARCH__)
#define EBMFAST_UNROLL _Pragma("unroll")
#define EBMFAST_UNROLL_BY_4 _Pragma("unroll 4")
#else
#define EBMFAST_UNROLL
#define EBMFAST_UNROLL_BY_4
#endif

namespace ebmfast {
namespace cuda {

constexpr int kWarp = 32;

// Views of scratch and of packed words, whatever was written there. Barriers order the device's accesses; the host has none.
#if defined(__CUDACC__)
#define EBMFAST_VIEW(alignment) __align__(alignment)
#else
#define EBMFAST_VIEW(alignment) __attribute__((may_alias, aligned(alignment)))
#endif
struct EBMFAST_VIEW(8) Pair {
    float x, y;
};
struct EBMFAST_VIEW(8) Words2 {
    uint32_t w[2];
};
struct EBMFAST_VIEW(16) Words4 {
    uint32_t w[4];
};

// What a product of matrices multiplies: float32 exactly, or rounded to 11 or 8 significant bits on tensor cores; sums are float32.
enum class Product : int { float32, tf32, bf16 };

namespace {

template <class T> class PerLane {
public:
#if defined(__CUDA_ARCH__)
    EBMFAST_HD T& operator[](int) { return value_; }

private:
    T value_;
#else
    EBMFAST_HD T& operator[](int lane) { return value_[lane]; }

private:
    T value_[kWarp];
#endif
};

template <class F> EBMFAST_HD void lanes(F f) {
#if defined(__CUDA_ARCH__)
    f(int(threadIdx.x) % kWarp);
#else
    for (int lane = 0; lane < kWarp; ++lane) f(lane);
#endif
}

EBMFAST_HD void warp_barrier() {
#if defined(__CUDA_ARCH__)
    __syncwarp();
#endif
}

// v of lane source(lane), for every lane.
template <class F> EBMFAST_HD PerLane<float> from_lane(PerLane<float>& v, F source) {
    PerLane<float> out;
#if defined(__CUDA_ARCH__)
    out[0] = __shfl_sync(0xffffffffu, v[0], source(int(threadIdx.x) % kWarp));
#else
    lanes([&](int lane) { out[lane] = v[source(lane)]; });
#endif
    return out;
}

// Whether any lane of the same `width` (a power of two) neighbours says so.
EBMFAST_HD PerLane<bool> any_of(PerLane<bool>& v, int width) {
    PerLane<bool> out;
#if defined(__CUDA_ARCH__)
    const uint32_t all = __ballot_sync(0xffffffffu, v[0]), first = threadIdx.x % kWarp / width * width;
    out[0] = (all >> first & (width == kWarp ? 0xffffffffu : (1u << width) - 1u)) != 0;
#else
    lanes([&](int lane) {
        out[lane] = false;
        for (int k = lane / width * width, end = k + width; k < end; ++k) out[lane] = out[lane] || v[k];
    });
#endif
    return out;
}

// Sums over `width` neighbours by halves: in every lane the same bits, for addition commutes.
template <class Op> EBMFAST_HD void reduce(PerLane<float>& v, int from, int width, Op op) {
    for (int half = from; half < width; half *= 2) {
        PerLane<float> other = from_lane(v, [&](int lane) { return lane ^ half; });
        lanes([&](int lane) { v[lane] = op(v[lane], other[lane]); });
    }
}

// To 8 and 11 significant bits, to the nearest: ties to even, and (as cvt.rna.tf32 has it) away from zero.
EBMFAST_HD uint32_t bf16(float value) {
    const uint32_t bits = ScalarLane::as_int(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;  // a NaN stays one
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

EBMFAST_HD uint32_t bf16_pair(float low, float high) {
#if defined(__CUDA_ARCH__)
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    return bf16(low) | bf16(high) << 16;
#endif
}

EBMFAST_HD uint32_t tf32(float value) {
#if defined(__CUDA_ARCH__)
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
#else
    const uint32_t bits = ScalarLane::as_int(value);
    return (bits & 0x7fffffffu) > 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
#endif
}

// One tile of a product on tensor cores, D += A B, as PTX has it for mma.m16n8k16 (bf16) and mma.m16n8k8 (tf32). With g = lane / 4 and
// t = lane % 4, a lane holds of
//   D [16][8]   d0 d1 d2 d3: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
//   A bf16 [16][16]   pairs of columns: (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8);   tf32 [16][8]   (g, t) (g + 8, t) (g, t + 4) (g + 8, t + 4)
//   B bf16 [16][8]    pairs of rows: (2t, g) (2t + 8, g);   tf32 [8][8]   (t, g) (t + 4, g)
// Volatile, for all 32 threads must come by: what only reads and writes registers could be moved to where some of them need the result.
template <Product kind, class D> EBMFAST_HD void multiply(PerLane<D>& d, int column, PerLane<Words4>& a, PerLane<Words2>& b) {
#if defined(__CUDA_ARCH__)
    float* s = d[0].d[column];
    const uint32_t *x = a[0].w, *y = b[0].w;
    if (kind == Product::bf16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    } else {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3]) : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
    }
#else
    constexpr int k = kind == Product::bf16 ? 16 : 8;
    float left[16][k], right[k][8];
    for (int lane = 0; lane < kWarp; ++lane) {
        const int g = lane / 4, t = lane % 4;
        for (int i = 0; i < 4; ++i) {
            const int row = g + i % 2 * 8;
            if (kind == Product::bf16) {
                const int first = 2 * t + i / 2 * 8;
                left[row][first] = ScalarLane::as_float(a[lane].w[i] << 16);
                left[row][first + 1] = ScalarLane::as_float(a[lane].w[i] & 0xffff0000u);
            } else {
                left[row][t + i / 2 * 4] = ScalarLane::as_float(a[lane].w[i]);
            }
        }
        for (int i = 0; i < 2; ++i) {
            if (kind == Product::bf16) {
                const int first = 2 * t + i * 8;
                right[first][g] = ScalarLane::as_float(b[lane].w[i] << 16);
                right[first + 1][g] = ScalarLane::as_float(b[lane].w[i] & 0xffff0000u);
            } else {
                right[t + i * 4][g] = ScalarLane::as_float(b[lane].w[i]);
            }
        }
    }
    for (int lane = 0; lane < kWarp; ++lane) {
        for (int i = 0; i < 4; ++i) {
            const int row = lane / 4 + i / 2 * 8, col = lane % 4 * 2 + i % 2;
            float sum = d[lane].d[column][i];
            for (int j = 0; j < k; ++j) sum += left[row][j] * right[j][col];
            d[lane].d[column][i] = sum;
        }
    }
#endif
}

}  // namespace
}  // namespace cuda
}  // namespace ebmfast
