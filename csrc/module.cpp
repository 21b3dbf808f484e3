// Python bindings: integers and pointers in, checked by ebmfast/ops.py and ebmfast/backends.py before they come here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "accept.h"
#include "build_info.h"
#include "dispatch.h"
#include "step.h"
#if EBMFAST_CUDA_BUILT
#include "cuda/step.h"
#endif

namespace py = pybind11;
using namespace ebmfast;

void bind_chain(py::module_& m);  // chain_module.cpp

namespace {

constexpr int kGradientsOnStack = 64;

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

StepArgs step_args(
    uintptr_t x, int64_t batch, int64_t size, int n_gradients, bool bf16, bool weights_per_chain, uint64_t seed, uint32_t stream,
    uint64_t first_chain, py::object clamp, py::object clip_value, uintptr_t frozen, bool frozen_per_chain
) {
    StepArgs a{};
    a.x = pointer<float>(x);
    a.batch = batch;
    a.size = size;
    a.n_gradients = n_gradients;
    a.bf16 = bf16;
    a.weights_per_chain = weights_per_chain;
    a.id = {seed, first_chain, 0, stream, 0};
    a.frozen = pointer<const uint8_t>(frozen);
    a.frozen_stride = frozen_per_chain ? size : 0;
    if (!clamp.is_none()) {
        a.clamps = true;
        const auto bounds = clamp.cast<std::pair<float, float>>();
        a.low = bounds.first;
        a.high = bounds.second;
    }
    if (!clip_value.is_none()) {
        a.clips = true;
        a.clip = clip_value.cast<float>();
    }
    return a;
}

float norm_limit(py::object clip_norm) { return clip_norm.is_none() ? -1.0f : clip_norm.cast<float>(); }

// `gradients`: the address of a stacked [K, B, *S] tensor, or a sequence of K addresses.
void read_addresses(py::handle gradients, const StepArgs& a, const void** addresses) {
    if (PyLong_Check(gradients.ptr())) {
        const uintptr_t base = gradients.cast<uintptr_t>(), stride = uintptr_t(a.batch * a.size) * (a.bf16 ? 2 : 4);
        for (int k = 0; k < a.n_gradients; ++k) addresses[k] = pointer<const void>(base + uintptr_t(k) * stride);
        return;
    }
    const auto sequence = py::reinterpret_borrow<py::sequence>(gradients);
    if (py::len(sequence) != size_t(a.n_gradients)) throw std::invalid_argument("wrong number of gradients");
    for (int k = 0; k < a.n_gradients; ++k) addresses[k] = pointer<const void>(sequence[size_t(k)].cast<uintptr_t>());
}

class Plan {
public:
    Plan(const StepArgs& args, uintptr_t faults, float limit) : plan_(args, pointer<int64_t>(faults), limit) {}

    void run(py::handle gradients, uintptr_t weights, uint32_t step, double drift, double noise, int threads) {
        const void* on_stack[kGradientsOnStack];
        std::vector<const void*> on_heap;
        const void** addresses = on_stack;
        if (plan_.args().n_gradients > kGradientsOnStack) {
            on_heap.resize(size_t(plan_.args().n_gradients));
            addresses = on_heap.data();
        }
        read_addresses(gradients, plan_.args(), addresses);
        const py::gil_scoped_release release;
        plan_.run(addresses, pointer<const float>(weights), step, float(drift), float(noise), threads);
    }

private:
    StepPlan plan_;
};

#if EBMFAST_CUDA_BUILT
void raise_if(const char* error) {
    if (error != nullptr) throw std::runtime_error(std::string("CUDA: ") + error);
}

class CudaPlan {
public:
    CudaPlan(const StepArgs& args, uintptr_t faults, float limit, uintptr_t bad, uintptr_t squares, uintptr_t scale)
        : args_(args), faults_(pointer<int64_t>(faults)), limit_(limit), scale_(pointer<float>(scale)) {
        if (args.n_gradients > cuda::kMaxGradients) throw std::invalid_argument("at most 64 gradients on CUDA");
        args_.faults = faults_;
        args_.bad = pointer<uint8_t>(bad);
        args_.squares = pointer<double>(squares);
    }

    void run(py::handle gradients, uintptr_t weights, uint32_t step, double drift, double noise, uintptr_t stream) {
        const void* addresses[cuda::kMaxGradients];
        read_addresses(gradients, args_, addresses);
        StepArgs a = args_;
        a.gradients = addresses;
        a.weights = pointer<const float>(weights);
        a.id.step = step;
        a.drift = float(drift);
        a.noise = float(noise);
        raise_if(cuda::step(a, faults_, limit_, scale_, pointer<void>(stream)));
    }

private:
    StepArgs args_;
    int64_t* faults_;
    float limit_;
    float* scale_;
};

void cuda_fill(
    uintptr_t out, int64_t batch, int64_t size, uint64_t seed, uint32_t step, uint32_t stream, uint64_t first_chain, uint64_t first_element,
    bool uniform, uintptr_t cuda_stream
) {
    const NoiseId id{seed, first_chain, step, stream, uint32_t(first_element / 4)};
    raise_if(cuda::fill({pointer<float>(out), batch, size, id, uniform, {}}, pointer<void>(cuda_stream)));
}
#endif

void fill_noise(
    uintptr_t out, int64_t batch, int64_t size, uint64_t seed, uint32_t step, uint32_t stream, uint64_t first_chain, uint64_t first_element,
    bool uniform, int threads
) {
    const py::gil_scoped_release release;
    fill(pointer<float>(out), batch, size, {seed, first_chain, step, stream, uint32_t(first_element / 4)}, uniform, threads);
}

// `rows`: a sequence of (to, from, bytes of one row).
void accept_rows(
    const std::vector<std::tuple<uintptr_t, uintptr_t, int64_t>>& rows, uintptr_t log_ratio, uintptr_t faults, uintptr_t accepted,
    int64_t batch, uint64_t seed, uint32_t step, uint32_t stream, uint64_t first_chain
) {
    std::vector<Rows> found;
    found.reserve(rows.size());
    for (const auto& [to, from, bytes] : rows) found.push_back({pointer<void>(to), pointer<const void>(from), bytes});
    const py::gil_scoped_release release;
    accept(
        found.data(), int(found.size()), pointer<const float>(log_ratio), pointer<const int64_t>(faults), pointer<uint8_t>(accepted), batch,
        {seed, first_chain, step, stream, 0}
    );
}

py::list level_list() {
    py::list list;
    for (const Level& level : levels()) list.append(py::make_tuple(level.kernels->name, level.supported, level.kernels->lanes));
    return list;
}

py::dict build_info() {
    py::dict info;
    info["version"] = EBMFAST_VERSION;
    info["commit"] = EBMFAST_COMMIT;
    info["compiler"] = EBMFAST_COMPILER;
    info["flags"] = EBMFAST_FLAGS;
    info["cuda"] = EBMFAST_CUDA_BUILT;
    return info;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
    m.doc() = "The compiled kernels of ebmfast. Internal: use ebmfast.backends and ebmfast.ops.";
    m.def("build_info", &build_info);
    m.def("levels", &level_list, "(name, supported here, float32 lanes) of each instruction-set level of the build.");
    m.def("isa", [] { return kernels().name; });
    m.def("set_isa", &set_level, py::arg("name"), "Uses one level from now on; '' for the highest that this CPU has.");
    m.def(
        "fill", &fill_noise, py::arg("out"), py::arg("batch"), py::arg("size"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("first_chain"), py::arg("first_element"), py::arg("uniform"), py::arg("threads")
    );
    m.def(
        "accept", &accept_rows, py::arg("rows"), py::arg("log_ratio"), py::arg("faults"), py::arg("accepted"), py::arg("batch"),
        py::arg("seed"), py::arg("step"), py::arg("stream"), py::arg("first_chain")
    );
    m.def(
        "step_args", &step_args, py::arg("x"), py::arg("batch"), py::arg("size"), py::arg("n_gradients"), py::arg("bf16"),
        py::arg("weights_per_chain"), py::arg("seed"), py::arg("stream"), py::arg("first_chain"), py::arg("clamp"), py::arg("clip_value"),
        py::arg("frozen"), py::arg("frozen_per_chain")
    );
    py::class_<StepArgs>(m, "StepArgs");
    py::class_<Plan>(m, "StepPlan")
        .def(
            py::init([](const StepArgs& args, uintptr_t faults, py::object clip_norm) {
                return std::make_unique<Plan>(args, faults, norm_limit(clip_norm));
            }),
            py::arg("args"), py::arg("faults"), py::arg("clip_norm")
        )
        .def(
            "run", &Plan::run, py::arg("gradients"), py::arg("weights"), py::arg("step"), py::arg("drift"), py::arg("noise"), py::arg("threads")
        );
    bind_chain(m);
#if EBMFAST_CUDA_BUILT
    m.def(
        "cuda_fill", &cuda_fill, py::arg("out"), py::arg("batch"), py::arg("size"), py::arg("seed"), py::arg("step"), py::arg("stream"),
        py::arg("first_chain"), py::arg("first_element"), py::arg("uniform"), py::arg("cuda_stream")
    );
    py::class_<CudaPlan>(m, "CudaPlan")
        .def(
            py::init([](const StepArgs& args, uintptr_t faults, py::object clip_norm, uintptr_t bad, uintptr_t squares, uintptr_t scale) {
                return std::make_unique<CudaPlan>(args, faults, norm_limit(clip_norm), bad, squares, scale);
            }),
            py::arg("args"), py::arg("faults"), py::arg("clip_norm"), py::arg("bad"), py::arg("squares"), py::arg("scale")
        )
        .def(
            "run", &CudaPlan::run, py::arg("gradients"), py::arg("weights"), py::arg("step"), py::arg("drift"), py::arg("noise"),
            py::arg("cuda_stream")
        );
#endif
}
