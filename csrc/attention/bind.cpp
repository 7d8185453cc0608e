// Python's view of csrc/attention.
#include "common/bind.h"

namespace nemo {

void register_attention_decode(pybind11::module_& m);
void register_attention_gather(pybind11::module_& m);
void register_attention_prefill(pybind11::module_& m);

void register_attention(pybind11::module_& m) {
    register_attention_decode(m);
    register_attention_gather(m);
    register_attention_prefill(m);
}

}  // namespace nemo
