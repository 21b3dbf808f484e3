#include "plan.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <new>
#include <stdexcept>

#include "chain_registers.h"

namespace ebmfast {
namespace cuda {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kMostRows = 1 << 20;  // of a block's scratch: offsets in it are ints

// A model of an SM, to rank launches by; taken from data sheets, not measured. Bytes and multiply-adds per cycle.
constexpr double kFromShared = 128, kFromL2 = 64, kFromL2ForAll = 2500;
constexpr double kTensor16 = 512, kTensor32 = 256, kNoise = 3.0;

int64_t aligned(int64_t n) { return (n + kAlignment - 1) / kAlignment * kAlignment; }

bool folds(const ChainConditioning& k) {
    return k.shift_weight != nullptr || k.scale_weight != nullptr || k.shift_bias != nullptr || k.scale_bias != nullptr;
}

void raise_if(const std::string& error) {
    if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace

#ifndef EBMFAST_CUDA_LAUNCHES
std::string limits_of(int, Device&) { return "this build has no CUDA kernels"; }
std::string launch_jobs(const Job*, int, int64_t, void*) { return "this build has no CUDA kernels"; }
std::string launch_chains(const Arguments&, const Launch&, bool, void*) { return "this build has no CUDA kernels"; }
#endif

DevicePlan::DevicePlan(int64_t size, const std::vector<std::pair<int, int>>& codes, bool tf32, Device device)
    : Composition(size, codes), tf32_(tf32), device_(device) {}

// Of layer l of a unit. Chains stay float32, so first layers read that.
Product DevicePlan::kind_of(size_t u, size_t l) const {
    if (units_[u].kind == UnitKind::full) return Product::float32;
    return data_[u][l].matrix->bf16() && l > 0 ? Product::bf16 : tf32_ ? Product::tf32 : Product::float32;
}

// Sizes of everything; none of them changes when parameters do.
void DevicePlan::lay_out() {
    if (laid_out_) return;
    laid_out_ = true;
    if (size_ > kMostRows) throw std::invalid_argument("chains of more than 2^20 numbers");
    std::map<const PackedMatrix*, bool> seen;
    for (size_t u = 0; u < units_.size(); ++u) {
        const bool full = units_[u].kind == UnitKind::full;
        has_coordinates_ |= full || data_[u].empty();
        has_neighbours_ |= units_[u].kind == UnitKind::rosenbrock;
        deepest_ = std::max(deepest_, int(data_[u].size()));
        n_layers_ += int64_t(data_[u].size());
        ++n_jobs_;  // its constant
        for (size_t l = 0; l < data_[u].size(); ++l) {
            const PackedMatrix& m = *data_[u][l].matrix;
            const Product kind = kind_of(u, l);
            n_fixed_ += int64_t(data_[u][l].fixed.size());
            n_folded_ += 2 * m.out();
            n_jobs_ += 3;
            if (!seen.emplace(&m, true).second) continue;
            packed_words_ += words_of(kind, m.out(), m.in()) + (full ? 0 : words_of(kind, m.in(), m.out()));
        }
    }
    int64_t next = 0;
    const auto take = [&next](int64_t bytes) { return next = aligned(next + bytes), next - aligned(bytes); };
    at_.units = take(int64_t(units_.size() * sizeof(Unit)));
    at_.layers = take(n_layers_ * int64_t(sizeof(Layer)));
    at_.nodes = take(int64_t(nodes_.size() * sizeof(ChainNode)));
    at_.children = take(int64_t(children_.size() * sizeof(int)));
    at_.fixed = take(n_fixed_ * int64_t(sizeof(float)));
    at_.jobs = take(n_jobs_ * int64_t(sizeof(Job)));
    at_.image = next;
    at_.folded = take(n_folded_ * int64_t(sizeof(float)));
    at_.packed = take(packed_words_ * int64_t(sizeof(uint32_t)));
    at_.total = next;
}

int64_t DevicePlan::blob_bytes() {
    lay_out();
    return at_.total;
}

const std::vector<unsigned char>& DevicePlan::image(uintptr_t base) {
    lay_out();
    image_.assign(size_t(at_.image), 0);
    const auto address = [base](int64_t offset) { return reinterpret_cast<void*>(base + uintptr_t(offset)); };
    const auto store = [this](int64_t offset, const void* from, size_t bytes) {
        if (bytes > 0) std::memcpy(image_.data() + offset, from, bytes);
    };
    std::vector<Unit> units;
    std::vector<Layer> layers;
    std::vector<float> fixed;
    std::vector<Job> jobs;
    std::map<const PackedMatrix*, std::pair<uint32_t*, uint32_t*>> packed;
    auto* words = static_cast<uint32_t*>(address(at_.packed));
    auto* folded = static_cast<float*>(address(at_.folded));
    const auto matrix = [](uint32_t* to, const float* from, int64_t output, int64_t input, int outputs, int inputs, Product kind) {
        return Matrix{to, from, output, input, outputs, inputs, kind};
    };
    const auto pack = [&](const Matrix& m) {
        Job job{};
        job.kind = Job::pack, job.matrix = m, job.count = words_of(m.kind, m.outputs, m.inputs);
        words += job.count;
        jobs.push_back(job);
    };
    most_items_ = 1;
    for (size_t u = 0; u < units_.size(); ++u) {
        const ChainUnit& from = units_[u];
        const bool full = from.kind == UnitKind::full;
        const int n_layers = int(data_[u].size());
        Unit unit{from.kind, from.leaf, n_layers, 0, from.constant, from.a, from.b, from.c, from.mean, from.precision, from.read_out, nullptr};
        unit.layers = static_cast<const Layer*>(address(at_.layers)) + layers.size();
        int slopes = 0;
        for (int l = 0; l < n_layers; ++l) {
            const LayerData& data = data_[u][size_t(l)];
            const PackedMatrix& m = *data.matrix;
            const Product kind = kind_of(u, size_t(l));
            Layer layer{};
            layer.in = m.in(), layer.out = m.out(), layer.own_rows = -1, layer.slopes = slopes;
            slopes += round_up(m.out(), 16);
            const bool known = packed.count(&m) != 0;
            if (!known) packed[&m] = {words, words + (full ? 0 : words_of(kind, m.out(), m.in()))};
            layer.forward = matrix(packed[&m].first, m.source(), m.stride(), 1, m.out(), m.in(), kind);
            layer.backward = matrix(packed[&m].second, m.source(), 1, m.stride(), m.in(), m.out(), kind);
            if (!known) {
                pack(layer.forward);
                if (!full) pack(layer.backward);
            }
            if (!full) {
                const ChainLayer& source = layers_[u][size_t(l)];
                const ChainConditioning& k = source.conditioning;
                layer.activation = source.activation, layer.own_rows = source.own_rows, layer.conditioning = k;
                layer.scales = k.scale_weight != nullptr || (source.own_rows < 0 && k.scale_bias != nullptr);
                layer.shift = k.bias;
                if (source.own_rows < 0 && folds(k)) {
                    Job job{};
                    job.kind = Job::fold, job.count = m.out(), job.conditioning = k;
                    job.fixed = static_cast<const float*>(address(at_.fixed)) + fixed.size();
                    job.shift = folded, job.scale = layer.scales ? folded + m.out() : nullptr;
                    if (data.fixed.empty()) job.conditioning.width = 0;
                    layer.shift = job.shift, layer.scale = job.scale;
                    jobs.push_back(job);
                }
                fixed.insert(fixed.end(), data.fixed.begin(), data.fixed.end());
            }
            folded += 2 * m.out();
            layers.push_back(layer);
        }
        unit.n_partials = n_layers == 0 ? int(std::min<int64_t>(kShares, size_)) : round_up(layers.back().out, 16) / 16;
        if (constants_[u] != nullptr) {
            Job job{};
            job.kind = Job::constant, job.count = 1, job.from = constants_[u];
            job.to = static_cast<float*>(address(at_.units + int64_t(u * sizeof(Unit) + offsetof(Unit, constant))));
            jobs.push_back(job);
            unit.constant = 0;
        }
        units.push_back(unit);
    }
    for (const Job& job : jobs) most_items_ = std::max(most_items_, job.count);
    jobs.resize(size_t(n_jobs_), Job{});  // the rest have nothing to do
    store(at_.units, units.data(), units.size() * sizeof(Unit));
    store(at_.layers, layers.data(), layers.size() * sizeof(Layer));
    store(at_.nodes, nodes_.data(), nodes_.size() * sizeof(ChainNode));
    store(at_.children, children_.data(), children_.size() * sizeof(int));
    store(at_.fixed, fixed.data(), fixed.size() * sizeof(float));
    store(at_.jobs, jobs.data(), jobs.size() * sizeof(Job));
    return image_;
}

Rows DevicePlan::rows(int chains, int together) const {
    int64_t next = 0;
    const auto take = [&next](int64_t n) { return next += n, int(next - n); };
    const int64_t units = int64_t(units_.size()), nodes = int64_t(nodes_.size());
    Rows r{};
    if (chains == 0) {  // chain_registers
        r.energies = take(units), r.weights = take(units), r.values = take(nodes), r.upstream = take(nodes), r.total = int(next);
        return r;
    }
    int slopes = 0, partials = 1;
    for (size_t u = 0; u < units_.size(); ++u) {
        int all = 0;
        for (const LayerData& data : data_[u]) {
            // The vector behind a layer, or x - mean: what the next product, or the first of those going back, reads.
            const int outputs = round_up(data.matrix->out(), 16);
            r.wide = std::max(r.wide, outputs), all += outputs;
        }
        slopes = std::max(slopes, units_[u].kind == UnitKind::full ? 0 : all);
        const int last = data_[u].empty() ? int(std::min<int64_t>(kShares, size_)) : round_up(data_[u].back().matrix->out(), 16) / 16;
        partials = std::max(partials, last);
    }
    r.padded = round_up(int(size_), 8);
    r.x = take(r.padded), r.moved = take(r.padded), r.gradients = take(units * r.padded), r.combined = take(sampler_.clips_norm ? r.padded : 0);
    r.energies = take(units), r.weights = take(units), r.values = take(nodes), r.upstream = take(nodes);
    r.conditions = take(condition_rows_), r.faults = take(1);
    r.partials_each = partials, r.partials = take(units * partials), r.marks = take(2 * kShares);
    r.slopes_each = slopes, r.slopes = take(int64_t(together) * slopes);
    r.ping = take(int64_t(together) * r.wide), r.pong = take(int64_t(together) * r.wide);
    r.total = int(std::min<int64_t>(next, 2 * kMostRows));  // choose() refuses more than kMostRows
    return r;
}

bool DevicePlan::in_registers() const {
    const int64_t quads = (size_ + 3) / 4;
    int shift = 0;
    while (shift < 5 && (1 << shift) < quads) ++shift;
    return deepest_ == 0 && quads <= int64_t(kMostQuads) * kWarp &&
           4 * kRegisterWarps * warp_scratch(units(), int(nodes_.size()), 1 << shift) <= device_.shared_bytes;
}

Launch DevicePlan::block(int chains, int64_t all) const {
    Launch l{};
    l.chains = chains;
    const int64_t tiles = (all + chains - 1) / chains;
    const auto bytes = [&](int together) { return int64_t(rows(chains, together).total) * row_stride(chains) * int64_t(sizeof(float)); };
    l.together = units();
    while (l.together > 1 && bytes(l.together) > device_.shared_bytes) l.together = (l.together + 1) / 2;
    const int64_t scratch = bytes(l.together), weights = packed_words_ * int64_t(sizeof(uint32_t));
    l.shared = scratch <= device_.shared_bytes;
    l.shared_bytes = l.shared ? int(scratch) : 0;
    l.staged = weights > 0 && l.shared_bytes + weights <= device_.shared_bytes;
    if (l.staged) l.shared_bytes += int(weights);
    l.blocks = int(std::min<int64_t>(tiles, l.shared ? 1 << 20 : 2 * device_.processors));
    l.memory_bytes = l.shared ? 0 : scratch * l.blocks;
    return l;
}

// Of a step, about.
double DevicePlan::cycles(const Launch& l, int64_t chains) const {
    const double tiles = double((chains + l.chains - 1) / l.chains), bytes = double(packed_words_) * sizeof(uint32_t);
    const double resident = std::min(tiles, double(device_.processors)), columns = l.chains / 8.0;
    const double weights = l.staged ? bytes / kFromShared : std::max(bytes / kFromL2, resident * bytes / kFromL2ForAll);
    // A load of weights and one of each 8 chains feed 4 multiply-adds of each.
    const double rates[] = {128 * columns / (1 + columns), kTensor32, kTensor16};
    double arithmetic = kNoise * double(size_) * l.chains / 8;
    for (size_t u = 0; u < data_.size(); ++u) {
        for (size_t k = 0; k < data_[u].size(); ++k) {
            const PackedMatrix& m = *data_[u][k].matrix;
            const double products = units_[u].kind == UnitKind::full ? 1 : 2;
            arithmetic += products * double(m.in()) * double(m.out()) * l.chains / rates[int(kind_of(u, k))];
        }
    }
    return std::max(1.0, tiles / device_.processors) * std::max(weights, arithmetic) * (l.shared ? 1 : 3);
}

Launch DevicePlan::choose(int64_t chains) {
    lay_out();
    if (in_registers()) {
        Launch l{};
        l.registers = true, l.shared = true;
        const int64_t quads = (size_ + 3) / 4;
        while (l.shift < 5 && (1 << l.shift) < quads) ++l.shift;
        l.quads = 1;
        while (int64_t(l.quads) << l.shift < quads) l.quads *= 2;
        l.chains = kRegisterWarps * (kWarp >> l.shift);
        l.shared_bytes = int(sizeof(float)) * kRegisterWarps * warp_scratch(units(), int(nodes_.size()), 1 << l.shift);
        l.blocks = int(std::min<int64_t>((chains + l.chains - 1) / l.chains, 1 << 30));
        return l;
    }
    if (rows(8, 1).total > kMostRows) throw std::invalid_argument("a composition that needs more than 2^20 rows of scratch");
    Launch best = block(32, chains);
    for (const int each : {16, 8}) {
        const Launch other = block(each, chains);
        if (cycles(other, chains) < cycles(best, chains)) best = other;
    }
    return best;
}

void DevicePlan::prepare(uintptr_t base, void* stream) {
    lay_out();
    const auto* jobs = reinterpret_cast<const Job*>(base + uintptr_t(at_.jobs));
    if (!device_.gpu) return emulate_jobs(jobs, int(n_jobs_));
    raise_if(launch_jobs(jobs, int(n_jobs_), most_items_, stream));
}

void DevicePlan::launch(
    uintptr_t base, ChainArgs chain, const std::vector<const float*>& conditions, const float* values, float* memory, bool energies, void* stream
) {
    if (conditions.size() > size_t(kMaxSlots)) throw std::invalid_argument("more than 16 slots");
    const Launch l = choose(chain.chains);
    if (l.memory_bytes > 0 && memory == nullptr) throw std::invalid_argument("no memory for scratch");
    Arguments a{};
    a.chain = chain;
    a.units = reinterpret_cast<const Unit*>(base + uintptr_t(at_.units));
    a.nodes = reinterpret_cast<const ChainNode*>(base + uintptr_t(at_.nodes));
    a.children = reinterpret_cast<const int*>(base + uintptr_t(at_.children));
    a.values = values;
    std::copy(conditions.begin(), conditions.end(), a.conditions);
    a.n_units = units(), a.n_nodes = int(nodes_.size());
    a.rows = rows(l.registers ? 0 : l.chains, l.together);
    a.together = l.together, a.deepest = deepest_;
    a.has_coordinates = has_coordinates_, a.has_neighbours = has_neighbours_;
    a.packed = reinterpret_cast<const uint32_t*>(base + uintptr_t(at_.packed));
    a.packed_words = int(packed_words_), a.staged = l.staged, a.shift = l.shift;
    a.memory = l.shared ? nullptr : memory;
    if (!device_.gpu) return emulate_chains(a, l, energies, device_.reversed);
    raise_if(launch_chains(a, l, energies, stream));
}

void DevicePlan::run(uintptr_t base, const ChainCall& call, const float* values, float* memory, void* stream) {
    if (call.chains == 0 || call.steps == 0 || size_ == 0) return;
    launch(base, arguments(call), call.conditions, values, memory, false, stream);
}

void DevicePlan::energies(
    uintptr_t base, const float* x, int64_t chains, const std::vector<const float*>& conditions, float* out, const float* values, float* memory,
    void* stream
) {
    if (chains == 0) return;
    ChainCall call{};
    call.x = const_cast<float*>(x), call.chains = chains;  // only read
    ChainArgs a = arguments(call);
    a.energies = out;
    launch(base, a, conditions, values, memory, true, stream);
}

}  // namespace cuda
}  // namespace ebmfast
