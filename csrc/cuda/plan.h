// Whole chains on an NVIDIA GPU: where everything lies in its memory, which kernel runs, and the launches; and the same on the host.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "../chain.h"
#include "tables.h"

namespace ebmfast {
namespace cuda {

struct Device {
    bool gpu;  // or the host, in the place of one: tests
    int processors, shared_bytes;  // streaming multiprocessors; shared memory that a block may ask for
    bool reversed;  // the host runs the threads of a phase in reverse: what depends on their order shows
};

// How a kernel is launched. A pure function of sizes (DevicePlan::choose), and no choice but `chains`, through the shares of energies
// that a unit's threads sum up, and the choice of kernel change a bit of the result.
struct Launch {
    bool registers;     // chain_registers.h, else chain_block.h
    int chains;         // of a block
    int quads, shift;   // registers: of a thread; log2 of the threads of a chain
    int together;       // block: units evaluated at a time
    bool staged;        // packed weights are copied to shared memory
    bool shared;        // scratch lies in shared memory
    int shared_bytes, blocks;
    int64_t memory_bytes;  // scratch in global memory, all blocks together
};

// Memory of the device: `base` is where blob_bytes() bytes of it begin, aligned to 256; the first image(base).size() bytes are the image.
class DevicePlan : public Composition {
public:
    DevicePlan(int64_t size, const std::vector<std::pair<int, int>>& codes, bool tf32, Device device);

    int64_t blob_bytes();
    const std::vector<unsigned char>& image(uintptr_t base);
    Launch choose(int64_t chains);

    // In order on the stream and without waiting. Parameters are read anew, packed and folded: comes before run and energies.
    void prepare(uintptr_t base, void* stream);
    // `values` [n_values] and every other pointer is memory of the device; `memory` as choose() has it.
    void run(uintptr_t base, const ChainCall& call, const float* values, float* memory, void* stream);
    void energies(
        uintptr_t base, const float* x, int64_t chains, const std::vector<const float*>& conditions, float* out, const float* values, float* memory,
        void* stream
    );

private:
    struct Offsets {
        int64_t units, layers, nodes, children, fixed, jobs, image, folded, packed, total;
    };

    void lay_out();
    Rows rows(int chains, int together) const;
    Launch block(int chains, int64_t all) const;
    double cycles(const Launch& l, int64_t chains) const;
    void launch(uintptr_t base, ChainArgs chain, const std::vector<const float*>& conditions, const float* values, float* memory, bool energies, void* stream);

    Product kind_of(size_t unit, size_t layer) const;
    bool in_registers() const;

    bool tf32_;
    Device device_;
    Offsets at_{};
    int64_t n_layers_ = 0, n_fixed_ = 0, n_folded_ = 0, packed_words_ = 0, n_jobs_ = 0, most_items_ = 0;
    int deepest_ = 0;
    bool has_coordinates_ = false, has_neighbours_ = false;
    std::vector<unsigned char> image_;
};

// The launches (chain.cu) and what stands for them on the host (chain_emulated.cpp). Errors come back as text, empty for none.
std::string limits_of(int device, Device& limits);  // processors and shared_bytes
std::string launch_jobs(const Job* jobs, int n, int64_t most_items, void* stream);
std::string launch_chains(const Arguments& args, const Launch& launch, bool energies, void* stream);
void emulate_jobs(const Job* jobs, int n);
void emulate_chains(const Arguments& args, const Launch& launch, bool energies, bool reversed);

}  // namespace cuda
}  // namespace ebmfast
