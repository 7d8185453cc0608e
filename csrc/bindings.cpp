// The Python module nemo_engine._C: what each family of kernels registers, and for which device it was built.
#include <pybind11/pybind11.h>

namespace nemo {

#define FAMILY(name) void register_##name(pybind11::module_& m);
#include "families.inc"
#undef FAMILY

#ifdef NEMO_EMULATED
void register_emulator(pybind11::module_& m);
void register_emulation_checks(pybind11::module_& m);
#endif

}  // namespace nemo

PYBIND11_MODULE(_C, m) {
    m.doc() =
        "CUDA kernels of nemo_engine. Addresses, sizes in elements and a stream in; ValueError or RuntimeError out.";
#define FAMILY(name) nemo::register_##name(m);
#include "families.inc"
#undef FAMILY
#ifdef NEMO_EMULATED
    m.attr("device_type") = "cpu";
    nemo::register_emulator(m);
    nemo::register_emulation_checks(m);
#else
    m.attr("device_type") = "cuda";
#endif
}
