// What Python sees of the emulation, and the host functions that a GPU's driver would answer.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <dlfcn.h>

#include <algorithm>

#include "common/launch.h"

namespace nemo {

int num_sms() { return emulated::machine().num_sms; }

// Of an H200: eight groups of 16 or 18 multiprocessors. Others have one group.
int cluster_places(int cluster) {
    CHECK_RANGE(cluster, 1, MAX_CLUSTER);
    int sms = num_sms();
    return sms == 132 ? 6 * (16 / cluster * cluster) + 2 * (18 / cluster * cluster) : sms / cluster * cluster;
}

TensorMap make_tensor_map(const void* base, const TensorMapSpec& spec) {
    CHECK_POINTER(base);
    CHECK_RANGE(spec.rank, 2, 3);
    int size = emulated::element_bytes(spec.element);
    for (int i = 0; i < spec.rank; i++) {
        CHECK_RANGE(spec.sizes[i], 1, int64_t(1) << 32);
        CHECK_RANGE(spec.box[i], 1, 256);
        if (i) {
            CHECK_MULTIPLE(spec.strides[i], 16);
            CHECK_RANGE(spec.strides[i], 0, (int64_t(1) << 40) - 1);
        }
    }
    int row_bytes = spec.box[0] * size;
    CHECK_MULTIPLE(row_bytes, 16);
    int widest = spec.swizzle == Swizzle::B128 ? 128 : spec.swizzle == Swizzle::B64 ? 64 : spec.swizzle == Swizzle::B32 ? 32 : 1024;
    CHECK_RANGE(row_bytes, 16, widest);
    return {static_cast<const unsigned char*>(base), spec};
}

// Where nm finds the symbol of a function.
uintptr_t offset_in_library(uintptr_t address) {
    Dl_info found;
    CHECK(dladdr(reinterpret_cast<void*>(address), &found) != 0, "no library holds address ", address);
    return address - reinterpret_cast<uintptr_t>(found.dli_fbase);
}

namespace emulated {
extern int planted;
}

void register_emulator(pybind11::module_& parent) {
    using emulated::machine;
    namespace py = pybind11;
    auto m = parent.def_submodule("emulator", "The emulated machine: what it may touch, in which order, what it ran.");
    m.def(
        "allow",
        [](uintptr_t address, int64_t bytes, bool is_constant) {
            auto& ranges = machine().ranges;
            uintptr_t end = address + uintptr_t(bytes);
            // What lies there now replaces what lay there before.
            std::erase_if(ranges, [&](const emulated::Range& range) { return range.begin < end && address < range.end; });
            auto at = std::lower_bound(ranges.begin(), ranges.end(), address,
                                       [](const emulated::Range& range, uintptr_t x) { return range.begin < x; });
            ranges.insert(at, {address, end, is_constant});
        },
        py::arg("address"), py::arg("bytes"), py::arg("is_constant") = false,
        "Make an array known. While any is, kernels may touch nothing else; constants may be read at any time.");
    m.def(
        "bytes_read",
        [](uintptr_t address) {
            for (const auto& range : machine().ranges)
                if (range.begin <= address && address < range.end) return range.bytes_read;
            throw std::invalid_argument("no known array lies there");
        },
        "What kernels have read of the array there since it was made known, each byte as often as it was read.");
    m.def("forget", [] { machine().ranges.clear(), machine().padding.clear(); }, "Forget all arrays; nothing is checked.");
    m.def(
        "allow_races", [](uintptr_t address, int64_t bytes) { machine().padding.push_back({address, address + uintptr_t(bytes)}); },
        py::arg("address"), py::arg("bytes"), "An array that any threads may write at the same time: what comes of it nobody needs.");
    m.def("seed", [](uint64_t seed) { machine().random.seed(seed); }, "Of the order of threads, blocks and copies.");
    m.def("set_num_sms", [](int count) { machine().num_sms = count; }, "Of the emulated GPU (132).");
    m.def(
        "launches",
        [] {
            py::list all;
            for (const auto& launch : machine().launches) {
                py::list maps;
                for (const auto& map : launch.maps)
                    maps.append(py::dict(py::arg("sizes") = map.sizes, py::arg("box") = map.box, py::arg("element_bytes") = map.element_bytes));
                const auto& c = launch.counts;
                py::dict counts(py::arg("copied") = c.copied, py::arg("read") = c.read, py::arg("written") = c.written, py::arg("read_distinct") = c.read_distinct,
                                py::arg("written_distinct") = c.written_distinct, py::arg("accesses") = c.accesses,
                                py::arg("sectors") = c.sectors, py::arg("shared_accesses") = c.shared_accesses,
                                py::arg("wavefronts") = c.wavefronts);
                all.append(py::dict(py::arg("name") = launch.name, py::arg("offset") = offset_in_library(launch.address),
                                    py::arg("grid") = py::make_tuple(launch.grid.x, launch.grid.y, launch.grid.z),
                                    py::arg("threads") = launch.threads, py::arg("cluster") = launch.cluster, py::arg("shared_bytes") = launch.shared_bytes,
                                    py::arg("is_dependent") = launch.is_dependent, py::arg("maps") = maps, py::arg("counts") = counts));
            }
            return all;
        },
        "Every launch since clear_launches().");
    m.def("set_dry_run", [](bool is_dry) { machine().is_dry = is_dry; }, "Whether launches are noted and run nothing.");
    m.def("count", [](bool is_on) { machine().counter.is_on = is_on; }, "Whether launches count what they move.");
    m.def("plant", [](int number) { emulated::planted = number; }, "Which of the planted mistakes is made; 0 for none.");
    m.def("clear_launches", [] { machine().launches.clear(); });
}

}  // namespace nemo
