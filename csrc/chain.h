// Whole chains of a composition of simple energies on the CPU: raw pointers in, nothing checked here.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "chain_kernels.h"

namespace ebmfast {

// Memory aligned to cache lines.
template <class T> class Aligned {
public:
    explicit Aligned(size_t n = 0) { resize(n); }
    void resize(size_t n);
    T* data() const { return data_.get(); }
    size_t size() const { return size_; }

private:
    struct Free {
        void operator()(T* p) const;
    };
    std::unique_ptr<T, Free> data_;
    size_t size_ = 0;
};

// W [out][in] and its transpose as panels: `panel` outputs side by side (the last ones of a matrix by powers of two), input after
// input, so that a product reads them in order. `bf16`: pairs of inputs, rounded to nearest even; an odd last input pairs with 0.
class PackedMatrix {
public:
    PackedMatrix(int out, int in, bool bf16) : out_(out), in_(in), bf16_(bf16) {}

    void set_source(const float* w, int64_t row_stride) { source_ = w, stride_ = row_stride; }
    // Packs in panels of that size, unless the source holds what it held at the last call. The comparison reads every weight once: no
    // version counter tells of all writes to a tensor.
    void refresh(int panel);

    int out() const { return out_; }
    int in() const { return in_; }
    bool bf16() const { return bf16_; }
    const float* source() const { return source_; }
    int64_t stride() const { return stride_; }
    const float* forward() const { return forward_.data(); }
    const float* backward() const { return backward_.data(); }
    const uint32_t* forward16() const { return forward16_.data(); }
    const uint32_t* backward16() const { return backward16_.data(); }

private:
    int out_, in_, panel_ = 0;  // 0: not packed yet
    bool bf16_;
    const float* source_ = nullptr;
    int64_t stride_ = 0;
    Aligned<float> copy_, forward_, backward_;
    Aligned<uint32_t> forward16_, backward16_;
};

// How chains are cut: vectors of lanes per tile. Never changes a bit of the result.
int chain_vectors(int64_t chains, int threads, int lanes);

struct ChainCall {
    float* x;
    int64_t chains;
    NoiseId id;
    int64_t steps;
    const float *drift, *noise;
    std::vector<const float*> conditions;  // per slot [chains][width]
    const uint8_t* frozen;
    bool frozen_per_chain;
    int64_t* faults;
    int threads;
    // Of samplers that accept or reject: [chains] each.
    float *accepted = nullptr, *energies = nullptr;
    uint32_t accept_stream = 0;
    WarmUp warm_up{};
};

// A composition over chains of `size` elements, for one machine or another. It reads the memory of the pointers it was given: they must
// stay valid, and what stands there is read anew by every `refresh` (or `prepare`), which comes before `run` and `energies`.
class Composition {
public:
    Composition(int64_t size, const std::vector<std::pair<int, int>>& codes);

    // Hidden layers with their matrices; each unit's number is returned.
    int add_mlp(int leaf, const std::vector<std::pair<std::shared_ptr<PackedMatrix>, Activation>>& layers);
    int add_full(int leaf, std::shared_ptr<PackedMatrix> precision);
    int add(UnitKind kind, int leaf);

    void set_constants(int unit, float constant, float a, float b, float c);
    void set_vectors(int unit, const float* mean, const float* precision, const float* read_out, const float* constant);
    void set_conditioning(int unit, int layer, const ChainConditioning& conditioning, std::vector<float> fixed);
    void set_values(std::vector<float> values) { values_ = std::move(values); }
    void set_sampler(bool noise_first, const float* clamp, const float* clip, const float* clip_norm);
    void set_metropolis(ChainDynamics dynamics, int leapfrogs, std::vector<float> mass);  // mass: empty for ones

    int units() const { return int(units_.size()); }
    double work() const { return work_ + 12.0 * double(size_) * double(units_.size()); }  // multiplications per chain and step, about

protected:
    // What a layer needs beside the numbers that kernels see.
    struct LayerData {
        std::shared_ptr<PackedMatrix> matrix;
        std::vector<float> fixed, shift, scale;
    };

    ChainArgs arguments(const ChainCall& call) const;

    int64_t size_;
    std::vector<ChainUnit> units_;
    std::vector<const float*> constants_;  // where a unit's constant stands, or null
    std::vector<std::vector<ChainLayer>> layers_;
    std::vector<std::vector<LayerData>> data_;
    std::vector<ChainNode> nodes_;
    std::vector<int> children_;
    std::vector<float> values_;
    ChainArgs sampler_{};
    std::vector<float> mass_;
    bool laid_out_ = false;
    int64_t condition_rows_ = 0, condition_width_ = 0, slope_rows_ = 0, widest_ = 0;
    double work_ = 0;  // of matrices and activations

private:
    int add(UnitKind kind, int leaf, std::vector<ChainLayer> layers, std::vector<LayerData> data);
};

// On the CPU.
class ChainPlan : public Composition {
public:
    using Composition::Composition;

    int64_t scratch_bytes();  // of one thread, which keeps them
    void refresh();
    bool run(const ChainCall& call);  // whether every chain is free of faults
    void energies(const float* x, int64_t chains, const std::vector<const float*>& conditions, float* out, int threads);  // [units][chains]

private:
    void fold(ChainLayer& layer, LayerData& data);
    void lay_out();
    void complete(ChainArgs& args);
    template <class Work> void tiles(ChainArgs& args, int threads, Work each);

    const ChainKernels* kernels_ = nullptr;  // of the level for which weights are packed
    ChainRows rows_{};
};

bool all_finite(const float* x, int64_t n);

}  // namespace ebmfast
