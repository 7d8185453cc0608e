// Launching is running: the kernel has ended when launch() returns.
#pragma once

#include <tuple>
#include <utility>

#include "emulation/machine.h"

namespace nemo {

template <class... Wanted, class... Given>
void launch(const Launch& how, void (*kernel)(Wanted...), Given&&... given) {
    std::tuple<std::remove_cv_t<Wanted>...> arguments(static_cast<Wanted>(std::forward<Given>(given))...);
    emulated::LaunchRecord record{how.name, reinterpret_cast<uintptr_t>(kernel), how.grid, how.cluster, how.threads, how.shared_bytes, how.is_dependent, {}, {}};
    auto note = [&](const auto& argument) {
        if constexpr (std::is_same_v<std::remove_cvref_t<decltype(argument)>, TensorMap>) {
            const TensorMapSpec& spec = argument.spec;
            record.maps.push_back({{spec.sizes, spec.sizes + spec.rank}, {spec.box, spec.box + spec.rank}, emulated::element_bytes(spec.element)});
        }
    };
    std::apply([&](const auto&... each) { (note(each), ...); }, arguments);
    emulated::machine().run(std::move(record), [&] { std::apply(kernel, arguments); });
}

}  // namespace nemo
