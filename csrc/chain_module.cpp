// Python bindings of the chain engine: addresses in, checked by ebmfast/chain.py before they come here.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <stdexcept>
#include <vector>

#include "chain.h"
#include "cuda/plan.h"
#include "dispatch.h"

namespace py = pybind11;
using namespace ebmfast;

void bind_chain(py::module_& m);

namespace {

template <class T> T* pointer(uintptr_t address) { return reinterpret_cast<T*>(address); }

// Addresses of a layer's conditioning (0: none), and the condition where all chains share one.
void set_conditioning(
    Composition& plan, int unit, int layer, int width, int slot, std::vector<float> fixed, uintptr_t bias, std::pair<uintptr_t, int64_t> shift_weight,
    uintptr_t shift_bias, std::pair<uintptr_t, int64_t> scale_weight, uintptr_t scale_bias
) {
    const ChainConditioning k{
        width,
        slot,
        pointer<const float>(bias),
        pointer<const float>(shift_weight.first),
        pointer<const float>(shift_bias),
        pointer<const float>(scale_weight.first),
        pointer<const float>(scale_bias),
        shift_weight.second,
        scale_weight.second,
    };
    plan.set_conditioning(unit, layer, k, std::move(fixed));
}

std::vector<const float*> condition_pointers(const std::vector<uintptr_t>& addresses) {
    std::vector<const float*> pointers;
    for (const uintptr_t address : addresses) pointers.push_back(pointer<const float>(address));
    return pointers;
}

// Places in dictionaries whose values must stay the same objects, tensors among them with their memory where it is. This runs at every
// call of a prepared run, for every parameter; in Python it took most of the call.
class Watch {
public:
    // `address` of a tensor's memory, 0 for other values; `contiguous` (1, 0, or -1 for vectors) tells a matrix from its transpose in the
    // same memory.
    void add(py::dict mapping, py::object key, py::object value, uintptr_t address, int contiguous) {
        places_.push_back({std::move(mapping), std::move(key), std::move(value), address, contiguous});
    }

    void add_size(py::object mapping, Py_ssize_t size) { sizes_.emplace_back(std::move(mapping), size); }

    bool unchanged() const {
        for (const auto& [mapping, size] : sizes_) {
            if (PyObject_Size(mapping.ptr()) != size) return false;
        }
        static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
        static PyObject* const is_contiguous = PyUnicode_InternFromString("is_contiguous");
        for (const Place& p : places_) {
            PyObject* value = PyDict_GetItemWithError(p.mapping.ptr(), p.key.ptr());
            if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
            if (value != p.value.ptr() && !(value == nullptr && p.value.is_none())) return false;
            if (p.address == 0) continue;
            const auto now = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value, data_ptr));
            if (!now) throw py::error_already_set();
            if (PyLong_AsUnsignedLongLong(now.ptr()) != p.address) return false;
            if (p.contiguous < 0) continue;
            const auto contiguous = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(value, is_contiguous));
            if (!contiguous) throw py::error_already_set();
            if ((contiguous.ptr() == Py_True) != (p.contiguous == 1)) return false;
        }
        return true;
    }

private:
    struct Place {
        py::dict mapping;
        py::object key, value;
        uintptr_t address;
        int contiguous;
    };
    std::vector<Place> places_;
    std::vector<std::pair<py::object, Py_ssize_t>> sizes_;
};

py::dict as_dict(const cuda::Launch& l) {
    return py::dict(
        py::arg("registers") = l.registers, py::arg("chains") = l.chains, py::arg("quads") = l.quads, py::arg("shift") = l.shift,
        py::arg("together") = l.together, py::arg("staged") = l.staged, py::arg("shared") = l.shared, py::arg("shared_bytes") = l.shared_bytes,
        py::arg("blocks") = l.blocks, py::arg("memory_bytes") = l.memory_bytes
    );
}

void bind_device(py::module_& m) {
    using cuda::DevicePlan;
    m.def(
        "cuda_limits",
        [](int device) {
            cuda::Device limits{};
            const std::string error = cuda::limits_of(device, limits);
            if (!error.empty()) throw std::runtime_error(error);
            return py::make_tuple(limits.processors, limits.shared_bytes);
        },
        py::arg("device"), "Streaming multiprocessors of a GPU, and the shared memory that one of its blocks may ask for."
    );
    py::class_<DevicePlan, Composition>(m, "DevicePlan")
        .def(
            py::init([](int64_t size, const std::vector<std::pair<int, int>>& codes, bool tf32, bool gpu, int processors, int shared_bytes, bool reversed) {
                return std::make_unique<DevicePlan>(size, codes, tf32, cuda::Device{gpu, processors, shared_bytes, reversed});
            }),
            py::arg("size"), py::arg("codes"), py::arg("tf32"), py::arg("gpu"), py::arg("processors"), py::arg("shared_bytes"),
            py::arg("reversed") = false
        )
        .def("blob_bytes", &DevicePlan::blob_bytes, "Device memory for tables and packed weights.")
        .def(
            "image",
            [](DevicePlan& self, uintptr_t base) {
                const auto& image = self.image(base);
                return py::bytes(reinterpret_cast<const char*>(image.data()), image.size());
            },
            py::arg("base"), "What has to stand at the beginning of that memory."
        )
        .def("choose", [](DevicePlan& self, int64_t chains) { return as_dict(self.choose(chains)); }, py::arg("chains"))
        .def(
            "prepare",
            [](DevicePlan& self, uintptr_t base, uintptr_t stream) {
                const py::gil_scoped_release release;
                self.prepare(base, pointer<void>(stream));
            },
            py::arg("base"), py::arg("stream"), "Reads parameters anew, packs and folds them; comes before run and energies."
        )
        .def(
            "run",
            [](DevicePlan& self, uintptr_t base, uintptr_t x, int64_t chains, uint64_t seed, uint64_t first_chain, uint32_t stream, uint32_t step,
               int64_t steps, uintptr_t drift, uintptr_t noise, const std::vector<uintptr_t>& conditions, uintptr_t frozen, bool frozen_per_chain,
               uintptr_t faults, uintptr_t values, uintptr_t memory, uintptr_t cuda_stream) {
                const ChainCall call{pointer<float>(x), chains, {seed, first_chain, step, stream, 0}, steps, pointer<const float>(drift),
                                     pointer<const float>(noise), condition_pointers(conditions), pointer<const uint8_t>(frozen),
                                     frozen_per_chain, pointer<int64_t>(faults), 0};
                const py::gil_scoped_release release;
                self.run(base, call, pointer<const float>(values), pointer<float>(memory), pointer<void>(cuda_stream));
            },
            py::arg("base"), py::arg("x"), py::arg("chains"), py::arg("seed"), py::arg("first_chain"), py::arg("stream"), py::arg("step"),
            py::arg("steps"), py::arg("drift"), py::arg("noise"), py::arg("conditions"), py::arg("frozen"), py::arg("frozen_per_chain"),
            py::arg("faults"), py::arg("values"), py::arg("memory"), py::arg("cuda_stream")
        )
        .def(
            "energies",
            [](DevicePlan& self, uintptr_t base, uintptr_t x, int64_t chains, const std::vector<uintptr_t>& conditions, uintptr_t out,
               uintptr_t values, uintptr_t memory, uintptr_t cuda_stream) {
                const auto pointers = condition_pointers(conditions);
                const py::gil_scoped_release release;
                self.energies(
                    base, pointer<const float>(x), chains, pointers, pointer<float>(out), pointer<const float>(values), pointer<float>(memory),
                    pointer<void>(cuda_stream)
                );
            },
            py::arg("base"), py::arg("x"), py::arg("chains"), py::arg("conditions"), py::arg("out"), py::arg("values"), py::arg("memory"),
            py::arg("cuda_stream")
        );
}

}  // namespace

void bind_chain(py::module_& m) {
    py::class_<Watch>(m, "Watch")
        .def(py::init<>())
        .def("add", &Watch::add, py::arg("mapping"), py::arg("key"), py::arg("value"), py::arg("address"), py::arg("contiguous"))
        .def("add_size", &Watch::add_size, py::arg("mapping"), py::arg("size"))
        .def("unchanged", &Watch::unchanged);
    m.def("chain_vectors", &chain_vectors, py::arg("chains"), py::arg("threads"), py::arg("lanes"), "Vectors of chains per tile.");
    m.def("chain_bf16", [] { return chain_kernels().bf16; }, "Whether the level in use multiplies pairs of bfloat16.");
    m.def("all_finite", [](uintptr_t x, int64_t n) { return all_finite(pointer<const float>(x), n); }, py::arg("x"), py::arg("n"));
    m.def(
        "activate",
        [](int activation, uintptr_t z, uintptr_t value, uintptr_t slope, int64_t n) {
            if (activation < 0 || activation >= kActivations || n % 16 != 0) throw std::invalid_argument("activation or n");
            chain_kernels().activate(activation, pointer<const float>(z), pointer<float>(value), pointer<float>(slope), n);
        },
        py::arg("activation"), py::arg("z"), py::arg("value"), py::arg("slope"), py::arg("n"), "Values and slopes of n (a multiple of 16) numbers."
    );
    m.def(
        "multiply_adds",
        [](int64_t rounds) {
            const py::gil_scoped_release release;
            return chain_kernels().multiply_adds(rounds);
        },
        py::arg("rounds"), "Independent multiply-adds on one core; returns the flops done: the roofline of the chain engine."
    );
    py::class_<PackedMatrix, std::shared_ptr<PackedMatrix>>(m, "PackedMatrix")
        .def(py::init<int, int, bool>(), py::arg("rows"), py::arg("columns"), py::arg("bf16"))
        .def("set_source", [](PackedMatrix& self, uintptr_t w, int64_t stride) { self.set_source(pointer<const float>(w), stride); });
    py::class_<Composition>(m, "Composition")
        .def(
            "add_mlp",
            [](Composition& self, int leaf, const std::vector<std::pair<std::shared_ptr<PackedMatrix>, int>>& layers) {
                std::vector<std::pair<std::shared_ptr<PackedMatrix>, Activation>> specs;
                for (const auto& [matrix, activation] : layers) specs.emplace_back(matrix, Activation(activation));
                return self.add_mlp(leaf, specs);
            },
            py::arg("leaf"), py::arg("layers")
        )
        .def("add_full", &Composition::add_full, py::arg("leaf"), py::arg("precision"))
        .def("add_diagonal", [](Composition& self, int leaf) { return self.add(UnitKind::diagonal, leaf); }, py::arg("leaf"))
        .def("add_quartic", [](Composition& self, int leaf) { return self.add(UnitKind::quartic, leaf); }, py::arg("leaf"))
        .def("add_rosenbrock", [](Composition& self, int leaf) { return self.add(UnitKind::rosenbrock, leaf); }, py::arg("leaf"))
        .def("set_constants", &Composition::set_constants, py::arg("unit"), py::arg("constant"), py::arg("a"), py::arg("b"), py::arg("c"))
        .def(
            "set_vectors",
            [](Composition& self, int unit, uintptr_t mean, uintptr_t precision, uintptr_t read_out, uintptr_t constant) {
                self.set_vectors(
                    unit, pointer<const float>(mean), pointer<const float>(precision), pointer<const float>(read_out),
                    pointer<const float>(constant)
                );
            },
            py::arg("unit"), py::arg("mean"), py::arg("precision"), py::arg("read_out"), py::arg("constant")
        )
        .def(
            "set_conditioning", &set_conditioning, py::arg("unit"), py::arg("layer"), py::arg("width"), py::arg("slot"), py::arg("fixed"),
            py::arg("bias"), py::arg("shift_weight"), py::arg("shift_bias"), py::arg("scale_weight"), py::arg("scale_bias")
        )
        .def("set_values", &Composition::set_values)
        .def(
            "set_sampler",
            [](Composition& self, bool noise_first, std::optional<std::pair<float, float>> clamp, std::optional<float> clip,
               std::optional<float> clip_norm) {
                const float bounds[2] = {clamp ? clamp->first : 0, clamp ? clamp->second : 0};
                self.set_sampler(noise_first, clamp ? bounds : nullptr, clip ? &*clip : nullptr, clip_norm ? &*clip_norm : nullptr);
            },
            py::arg("noise_first"), py::arg("clamp"), py::arg("clip_value"), py::arg("clip_norm")
        )
        .def(
            "set_metropolis",
            [](Composition& self, bool hmc, int leapfrogs, std::vector<float> mass) {
                self.set_metropolis(hmc ? ChainDynamics::hmc : ChainDynamics::mala, leapfrogs, std::move(mass));
            },
            py::arg("hmc"), py::arg("leapfrogs"), py::arg("mass")
        )
        .def("work", &Composition::work, "Multiplications per chain and step, about.");
    py::class_<ChainPlan, Composition>(m, "ChainPlan")
        .def(py::init<int64_t, const std::vector<std::pair<int, int>>&>(), py::arg("size"), py::arg("codes"))
        .def("scratch_bytes", &ChainPlan::scratch_bytes, "Scratch memory of one thread.")
        .def("refresh", &ChainPlan::refresh, "Reads parameters anew; comes before run and energies.")
        .def(
            "run",
            [](ChainPlan& self, uintptr_t x, int64_t chains, uint64_t seed, uint64_t first_chain, uint32_t stream, uint32_t step, int64_t steps,
               uintptr_t drift, uintptr_t noise, const std::vector<uintptr_t>& conditions, uintptr_t frozen, bool frozen_per_chain,
               uintptr_t faults, int threads, uintptr_t accepted, uintptr_t energies, uint32_t accept_stream, uintptr_t warm_up,
               const std::array<float, 5>& adaptation) {
                ChainCall call{pointer<float>(x), chains, {seed, first_chain, step, stream, 0}, steps, pointer<const float>(drift),
                               pointer<const float>(noise), condition_pointers(conditions), pointer<const uint8_t>(frozen),
                               frozen_per_chain, pointer<int64_t>(faults), threads};
                call.accepted = pointer<float>(accepted), call.energies = pointer<float>(energies), call.accept_stream = accept_stream;
                const auto [warm_steps, target, gamma, t0, kappa] = adaptation;
                call.warm_up = {pointer<float>(warm_up), warm_steps, target, gamma, t0, kappa};
                const py::gil_scoped_release release;
                return self.run(call);
            },
            py::arg("x"), py::arg("chains"), py::arg("seed"), py::arg("first_chain"), py::arg("stream"), py::arg("step"), py::arg("steps"),
            py::arg("drift"), py::arg("noise"), py::arg("conditions"), py::arg("frozen"), py::arg("frozen_per_chain"), py::arg("faults"),
            py::arg("threads"), py::arg("accepted") = 0, py::arg("energies") = 0, py::arg("accept_stream") = 0, py::arg("warm_up") = 0,
            py::arg("adaptation") = std::array<float, 5>{}
        )
        .def(
            "energies",
            [](ChainPlan& self, uintptr_t x, int64_t chains, const std::vector<uintptr_t>& conditions, uintptr_t out, int threads) {
                const auto pointers = condition_pointers(conditions);
                const py::gil_scoped_release release;
                self.energies(pointer<const float>(x), chains, pointers, pointer<float>(out), threads);
            },
            py::arg("x"), py::arg("chains"), py::arg("conditions"), py::arg("out"), py::arg("threads")
        );
    bind_device(m);
}
