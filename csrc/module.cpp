// Python bindings: integers and pointers in, checked by ebmfast/ops.py and ebmfast/backends.py before they come here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <stdexcept>

#include "build_info.h"
#include "dispatch.h"
#include "step.h"

namespace py = pybind11;
using namespace ebmfast;

namespace {

constexpr int kGradientsOnStack = 64;

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

class Plan {
public:
    Plan(
        uintptr_t x, int64_t batch, int64_t size, int n_gradients, bool bf16, bool weights_per_chain, uint64_t seed, uint32_t stream,
        uint64_t first_chain, py::object clamp, py::object clip_value, py::object clip_norm, uintptr_t frozen, bool frozen_per_chain,
        uintptr_t faults
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
        plan_ = std::make_unique<StepPlan>(a, pointer<int64_t>(faults), clip_norm.is_none() ? -1.0f : clip_norm.cast<float>());
    }

    // gradients: the address of a stacked [K, B, *S] tensor, or a sequence of K addresses.
    void run(py::handle gradients, uintptr_t weights, uint32_t step, double drift, double noise, int threads) {
        const StepArgs& a = plan_->args();
        const void* on_stack[kGradientsOnStack];
        std::vector<const void*> on_heap;
        const void** addresses = on_stack;
        if (a.n_gradients > kGradientsOnStack) {
            on_heap.resize(size_t(a.n_gradients));
            addresses = on_heap.data();
        }
        if (PyLong_Check(gradients.ptr())) {
            const uintptr_t base = gradients.cast<uintptr_t>(), stride = uintptr_t(a.batch * a.size) * (a.bf16 ? 2 : 4);
            for (int k = 0; k < a.n_gradients; ++k) addresses[k] = pointer<const void>(base + uintptr_t(k) * stride);
        } else {
            const auto sequence = py::reinterpret_borrow<py::sequence>(gradients);
            if (py::len(sequence) != size_t(a.n_gradients)) throw std::invalid_argument("wrong number of gradients");
            for (int k = 0; k < a.n_gradients; ++k) addresses[k] = pointer<const void>(sequence[size_t(k)].cast<uintptr_t>());
        }
        const py::gil_scoped_release release;
        plan_->run(addresses, pointer<const float>(weights), step, float(drift), float(noise), threads);
    }

private:
    std::unique_ptr<StepPlan> plan_;
};

void fill_noise(
    uintptr_t out, int64_t batch, int64_t size, uint64_t seed, uint32_t step, uint32_t stream, uint64_t first_chain, uint64_t first_element,
    bool uniform, int threads
) {
    const py::gil_scoped_release release;
    fill(pointer<float>(out), batch, size, {seed, first_chain, step, stream, uint32_t(first_element / 4)}, uniform, threads);
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
    py::class_<Plan>(m, "StepPlan")
        .def(
            py::init<uintptr_t, int64_t, int64_t, int, bool, bool, uint64_t, uint32_t, uint64_t, py::object, py::object, py::object, uintptr_t,
                     bool, uintptr_t>(),
            py::arg("x"), py::arg("batch"), py::arg("size"), py::arg("n_gradients"), py::arg("bf16"), py::arg("weights_per_chain"),
            py::arg("seed"), py::arg("stream"), py::arg("first_chain"), py::arg("clamp"), py::arg("clip_value"), py::arg("clip_norm"),
            py::arg("frozen"), py::arg("frozen_per_chain"), py::arg("faults")
        )
        .def(
            "run", &Plan::run, py::arg("gradients"), py::arg("weights"), py::arg("step"), py::arg("drift"), py::arg("noise"), py::arg("threads")
        );
}
