#include "chain.h"

#include <algorithm>
#include <cstring>
#include <new>
#include <stdexcept>

#include "dispatch.h"
#include "pool.h"

namespace ebmfast {
namespace {

constexpr size_t kAlignment = 64;
constexpr double kWorthAThread = 2e5;  // multiplications: about ten times what waking a thread costs

uint32_t to_bf16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bits >> 16) | 0x40u;  // a NaN stays one
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}

// Panels of a matrix [outputs][inputs] whose element (o, i) is w[o * out_stride + i * in_stride].
void pack_panels(const float* w, int outputs, int inputs, int64_t out_stride, int64_t in_stride, int panel, float* to) {
    for (int done = 0, size; done < outputs; done += size) {
        size = panel_size(panel, outputs - done);
        for (int i = 0; i < inputs; ++i) {
            for (int j = 0; j < size; ++j) *to++ = w[(done + j) * out_stride + i * in_stride];
        }
    }
}

void pack_pairs(const float* w, int outputs, int inputs, int64_t out_stride, int64_t in_stride, int panel, uint32_t* to) {
    for (int done = 0, size; done < outputs; done += size) {
        size = panel_size(panel, outputs - done);
        for (int i = 0; i < inputs; i += 2) {
            for (int j = 0; j < size; ++j) {
                const float* p = w + (done + j) * out_stride;
                const uint32_t high = i + 1 < inputs ? to_bf16(p[(i + 1) * in_stride]) : 0;
                *to++ = to_bf16(p[i * in_stride]) | high << 16;
            }
        }
    }
}

// One per thread, kept: chains of a training loop are too short to allocate for.
float* scratch(size_t floats) {
    static thread_local Aligned<float> memory;
    if (memory.size() < floats) memory.resize(floats);
    return memory.data();
}

}  // namespace

template <class T> void Aligned<T>::Free::operator()(T* p) const { ::operator delete(p, std::align_val_t(kAlignment)); }

template <class T> void Aligned<T>::resize(size_t n) {
    if (n == size_) return;
    data_.reset(n == 0 ? nullptr : static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t(kAlignment))));
    size_ = n;
}

template class Aligned<float>;
template class Aligned<uint32_t>;
template class Aligned<double>;

void PackedMatrix::refresh(int panel) {
    const size_t row = size_t(in_);
    bool same = panel == panel_ && copy_.size() == size_t(out_) * row;
    for (int o = 0; o < out_ && same; ++o) same = std::memcmp(copy_.data() + size_t(o) * row, source_ + o * stride_, row * sizeof(float)) == 0;
    if (same) return;
    copy_.resize(size_t(out_) * row);
    for (int o = 0; o < out_; ++o) std::memcpy(copy_.data() + size_t(o) * row, source_ + o * stride_, row * sizeof(float));
    panel_ = panel;
    const float* w = copy_.data();
    if (bf16_) {
        forward16_.resize(size_t(out_) * size_t((in_ + 1) / 2));
        backward16_.resize(size_t(in_) * size_t((out_ + 1) / 2));
        pack_pairs(w, out_, in_, in_, 1, panel, forward16_.data());
        pack_pairs(w, in_, out_, 1, in_, panel, backward16_.data());
        return;
    }
    forward_.resize(copy_.size());
    backward_.resize(copy_.size());
    pack_panels(w, out_, in_, in_, 1, panel, forward_.data());
    pack_panels(w, in_, out_, 1, in_, panel, backward_.data());
}

int chain_vectors(int64_t chains, int threads, int lanes) {
    const int64_t wide = (chains + kMaxVectors * lanes - 1) / (kMaxVectors * lanes);
    return chains <= lanes || wide < threads ? 1 : kMaxVectors;
}

Composition::Composition(int64_t size, const std::vector<std::pair<int, int>>& codes) : size_(size) {
    std::vector<int> stack;
    int values = 0;
    for (const auto& [code, operand] : codes) {
        ChainNode node{code, 0, 0, int(children_.size()), values};
        if (code == kLeaf) {
            node.unit = operand;
        } else {
            if (operand > int(stack.size())) throw std::invalid_argument("a program that pops more than it pushed");
            node.n_children = operand;
            children_.insert(children_.end(), stack.end() - operand, stack.end());
            stack.resize(stack.size() - size_t(operand));
            values += operand + (code == kLogSumExp ? 1 : 0);
            sampler_.has_or |= code == kLogSumExp;
        }
        stack.push_back(int(nodes_.size()));
        nodes_.push_back(node);
    }
    if (stack.size() != 1) throw std::invalid_argument("a program that leaves more or less than one energy");
    values_.resize(size_t(values));
}

int Composition::add(UnitKind kind, int leaf, std::vector<ChainLayer> layers, std::vector<LayerData> data) {
    ChainUnit unit{};
    unit.kind = kind;
    unit.leaf = leaf;
    unit.n_layers = int(layers.size());
    units_.push_back(unit);
    constants_.push_back(nullptr);
    layers_.push_back(std::move(layers));
    data_.push_back(std::move(data));
    return units() - 1;
}

int Composition::add(UnitKind kind, int leaf) { return add(kind, leaf, {}, {}); }

int Composition::add_mlp(int leaf, const std::vector<std::pair<std::shared_ptr<PackedMatrix>, Activation>>& specs) {
    std::vector<ChainLayer> layers;
    std::vector<LayerData> data;
    int64_t slopes = 0;
    for (const auto& [matrix, activation] : specs) {
        ChainLayer layer{};
        layer.in = matrix->in(), layer.out = matrix->out();
        layer.activation = activation;
        layer.own_rows = -1;
        slopes += layer.out;
        widest_ = std::max<int64_t>({widest_, layer.in, layer.out});
        work_ += 2.0 * layer.in * layer.out + 20.0 * layer.out;
        layers.push_back(layer);
        data.push_back({matrix, {}, {}, {}});
    }
    slope_rows_ = std::max(slope_rows_, slopes);
    return add(UnitKind::mlp, leaf, std::move(layers), std::move(data));
}

int Composition::add_full(int leaf, std::shared_ptr<PackedMatrix> precision) {
    widest_ = std::max(widest_, size_);
    work_ += double(size_) * double(size_);
    std::vector<LayerData> data(1);
    data[0].matrix = std::move(precision);
    return add(UnitKind::full, leaf, {}, std::move(data));
}

void Composition::set_constants(int unit, float constant, float a, float b, float c) {
    ChainUnit& u = units_.at(size_t(unit));
    u.constant = constant, u.a = a, u.b = b, u.c = c;
}

void Composition::set_vectors(int unit, const float* mean, const float* precision, const float* read_out, const float* constant) {
    ChainUnit& u = units_.at(size_t(unit));
    u.mean = mean, u.precision = precision, u.read_out = read_out;
    constants_[size_t(unit)] = constant;
}

void Composition::set_conditioning(int unit, int layer, const ChainConditioning& conditioning, std::vector<float> fixed) {
    ChainLayer& l = layers_.at(size_t(unit)).at(size_t(layer));
    l.conditioning = conditioning;
    condition_width_ = std::max<int64_t>(condition_width_, conditioning.width);
    if (conditioning.slot >= 0 && l.own_rows < 0) {
        if (laid_out_) throw std::logic_error("a layer's conditioning comes before what needs the layout of scratch");
        l.own_rows = int(condition_rows_);
        condition_rows_ += l.out * (conditioning.scale_weight != nullptr ? 2 : 1);
    }
    data_[size_t(unit)][size_t(layer)].fixed = std::move(fixed);
}

void Composition::set_sampler(bool noise_first, const float* clamp, const float* clip, const float* clip_norm) {
    sampler_.noise_first = noise_first;
    sampler_.clamps = clamp != nullptr;
    if (clamp != nullptr) sampler_.low = clamp[0], sampler_.high = clamp[1];
    sampler_.clips = clip != nullptr;
    if (clip != nullptr) sampler_.clip = *clip;
    sampler_.clips_norm = clip_norm != nullptr;
    if (clip_norm != nullptr) sampler_.clip_norm = *clip_norm;
}

void Composition::set_metropolis(ChainDynamics dynamics, int leapfrogs, std::vector<float> mass) {
    if (laid_out_) throw std::logic_error("the sampler comes before what needs the layout of scratch");
    if (!mass.empty() && int64_t(mass.size()) != size_) throw std::invalid_argument("one mass per element, or none");
    mass_ = std::move(mass);
    sampler_.dynamics = dynamics;
    sampler_.leapfrogs = leapfrogs;
    sampler_.mass = mass_.empty() ? nullptr : mass_.data();
    work_ *= dynamics == ChainDynamics::hmc ? leapfrogs : 1;
}

// The condition that all chains share becomes one shift and one scale per output.
void ChainPlan::fold(ChainLayer& l, LayerData& data) {
    const ChainConditioning& k = l.conditioning;
    if (l.own_rows >= 0) return;
    if (k.shift_weight == nullptr && k.scale_weight == nullptr && k.shift_bias == nullptr && k.scale_bias == nullptr) {
        l.shift = k.bias, l.scale = nullptr;
        return;
    }
    const bool scales = k.scale_weight != nullptr || k.scale_bias != nullptr;
    data.shift.resize(size_t(l.out));
    data.scale.resize(scales ? size_t(l.out) : 0);
    for (int j = 0; j < l.out; ++j) {
        float scale = 0, shift = k.shift_bias != nullptr ? k.shift_bias[j] : 0;
        if (k.scale_bias != nullptr) scale = k.scale_bias[j];
        for (size_t i = 0; i < data.fixed.size(); ++i) {
            if (k.shift_weight != nullptr) shift += k.shift_weight[j * k.shift_stride + int64_t(i)] * data.fixed[i];
            if (k.scale_weight != nullptr) scale += k.scale_weight[j * k.scale_stride + int64_t(i)] * data.fixed[i];
        }
        data.shift[size_t(j)] = (1 + scale) * (k.bias != nullptr ? k.bias[j] : 0) + shift;
        if (scales) data.scale[size_t(j)] = 1 + scale;
    }
    l.shift = data.shift.data();
    l.scale = scales ? data.scale.data() : nullptr;
}

void ChainPlan::refresh() {
    kernels_ = &chain_kernels();
    for (size_t u = 0; u < units_.size(); ++u) {
        if (constants_[u] != nullptr) units_[u].constant = *constants_[u];
        for (const LayerData& data : data_[u]) data.matrix->refresh(kernels_->panel);
        for (size_t l = 0; l < layers_[u].size(); ++l) {
            ChainLayer& layer = layers_[u][l];
            const PackedMatrix& m = *data_[u][l].matrix;
            layer.forward = m.forward(), layer.backward = m.backward();
            layer.forward16 = m.forward16(), layer.backward16 = m.backward16();
            fold(layer, data_[u][l]);
        }
        units_[u].layers = layers_[u].data();
        if (units_[u].kind == UnitKind::full) units_[u].precision = data_[u][0].matrix->forward();
    }
}

int64_t ChainPlan::scratch_bytes() {
    lay_out();
    return rows_.total * kMaxVectors * chain_kernels().lanes * int64_t(sizeof(float));
}

// Where each array of a tile lies.
void ChainPlan::lay_out() {
    if (laid_out_) return;
    laid_out_ = true;
    int64_t next = 0;
    const auto take = [&next](int64_t rows) { return next += rows, next - rows; };
    const int64_t units = int64_t(units_.size()), nodes = int64_t(nodes_.size());
    rows_.padded = (size_ + 3) / 4 * 4;
    rows_.x = take(rows_.padded), rows_.moved = take(rows_.padded);
    rows_.gradients = take(units * rows_.padded), rows_.combined = take(rows_.padded);
    rows_.energies = take(units), rows_.weights = take(units);
    rows_.values = take(nodes), rows_.upstream = take(nodes);
    rows_.conditions = take(condition_rows_), rows_.condition = take(condition_width_), rows_.slopes = take(slope_rows_);
    rows_.ping = take(widest_), rows_.pong = take(widest_), rows_.pairs = take((widest_ + 1) / 2);
    rows_.faults = take(1), rows_.lanes = take(2), rows_.counters = take(6), rows_.frozen = take(size_);
    if (sampler_.dynamics != ChainDynamics::langevin) {
        rows_.there = take(rows_.padded), rows_.normals = take(rows_.padded);
        rows_.energy = take(2), rows_.accepted = take(1), rows_.warm_up = take(4);
    }
    rows_.total = next;
}

void ChainPlan::complete(ChainArgs& a) {
    if (kernels_ == nullptr) throw std::logic_error("refresh comes before run and energies");
    lay_out();
    a.size = size_;
    a.units = units_.data(), a.n_units = int(units_.size());
    a.nodes = nodes_.data(), a.n_nodes = int(nodes_.size());
    a.children = children_.data(), a.values = values_.data();
    a.rows = rows_;
}

template <class Work> void ChainPlan::tiles(ChainArgs& a, int threads, Work each) {
    const int lanes = kernels_->lanes;
    const double steps = double(std::max<int64_t>(a.steps, 1)), total = this->work() * steps * double(a.chains);
    threads = int(std::max(1.0, std::min(double(threads), total / kWorthAThread)));
    const int vectors = chain_vectors(a.chains, threads, lanes), tile = vectors * lanes;
    const auto range = [&](int64_t begin, int64_t end) {
        float* memory = scratch(size_t(rows_.total) * size_t(tile));
        for (int64_t t = begin; t < end; ++t) {
            const int64_t first = t * tile, left = a.chains - first;
            each(a, first, int(std::min<int64_t>(tile, left)), vectors, memory);
        }
    };
    parallel_for((a.chains + tile - 1) / tile, threads, range, 1);
}

ChainArgs Composition::arguments(const ChainCall& call) const {
    ChainArgs a = sampler_;
    a.x = call.x;
    a.chains = call.chains;
    a.id = call.id;
    a.steps = call.steps;
    a.drift = call.drift, a.noise = call.noise;
    a.frozen = call.frozen;
    a.frozen_stride = call.frozen_per_chain ? size_ : 0;
    a.faults = call.faults;
    a.accepted = call.accepted, a.energies = call.energies;
    a.accept_stream = call.accept_stream;
    a.warm_up = call.warm_up;
    a.size = size_;
    return a;
}

bool ChainPlan::run(const ChainCall& call) {
    const auto fine = [&call] { return std::all_of(call.faults, call.faults + call.chains, [](int64_t f) { return f == 0; }); };
    if (call.chains == 0 || call.steps == 0 || size_ == 0) return fine();
    ChainArgs a = arguments(call);
    a.conditions = call.conditions.data();
    complete(a);
    tiles(a, call.threads, kernels_->run);
    return fine();
}

void ChainPlan::energies(const float* x, int64_t chains, const std::vector<const float*>& conditions, float* out, int threads) {
    if (chains == 0) return;
    ChainArgs a = sampler_;
    a.x = const_cast<float*>(x);  // only read
    a.chains = chains;
    a.energies = out;
    a.conditions = conditions.data();
    complete(a);
    tiles(a, threads, kernels_->energies);
}

bool all_finite(const float* x, int64_t n) {
    uint32_t bad = 0;
    for (int64_t i = 0; i < n; ++i) {
        uint32_t bits;
        std::memcpy(&bits, x + i, 4);
        bad |= uint32_t((bits & 0x7f800000u) == 0x7f800000u);
    }
    return bad == 0;
}

}  // namespace ebmfast
