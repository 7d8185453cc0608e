// Launching is running: the kernel has ended when launch() returns.
#pragma once

#include <tuple>
#include <utility>

#include "emulation/machine.h"

namespace nemo {

template <class... Wanted, class... Given>
void launch(const Launch& how, void (*kernel)(Wanted...), Given&&... given) {
    std::tuple<std::remove_cv_t<Wanted>...> arguments(static_cast<Wanted>(std::forward<Given>(given))...);
    emulated::machine().run(how.name, reinterpret_cast<uintptr_t>(kernel), how.grid, how.threads, how.shared_bytes, how.is_dependent, [&] {
        std::apply(kernel, arguments);
    });
}

}  // namespace nemo
