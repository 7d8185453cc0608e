// Python's view of csrc/sampling.
#include "common/bind.h"
#include "sampling/sampling.h"

namespace nemo {

void register_sampling(pybind11::module_& m) {
    define(m, "sample_subs", {"vocab_size"}, sample_subs);
    define(m, "sample",
           {"is_bf16", "tokens", "logits", "slot_ids", "positions", "temperature", "min_p", "top_k",
            "top_p", "seed_keys", "frequency", "presence", "repetition", "output_counts", "prompt_mask", "best",
            "note", "counters", "stride", "rows", "vocab_size", "stream"},
           [](bool is_bf16, uintptr_t tokens, uintptr_t logits, uintptr_t slot_ids, uintptr_t positions,
              uintptr_t temperature, uintptr_t min_p, uintptr_t top_k, uintptr_t top_p, uintptr_t seed_keys,
              uintptr_t frequency, uintptr_t presence, uintptr_t repetition, uintptr_t output_counts,
              uintptr_t prompt_mask, uintptr_t best, uintptr_t note, uintptr_t counters, int64_t stride, int rows,
              int vocab_size, Stream stream) {
               sample({.tokens = pointer<int64_t>(tokens),
                       .logits = pointer<void>(logits),
                       .slot_ids = pointer<int64_t>(slot_ids),
                       .positions = pointer<int64_t>(positions),
                       .temperature = pointer<double>(temperature),
                       .min_p = pointer<double>(min_p),
                       .top_k = pointer<int64_t>(top_k),
                       .top_p = pointer<double>(top_p),
                       .seed_keys = pointer<int64_t>(seed_keys),
                       .frequency = pointer<double>(frequency),
                       .presence = pointer<double>(presence),
                       .repetition = pointer<double>(repetition),
                       .output_counts = pointer<int32_t>(output_counts),
                       .prompt_mask = pointer<uint8_t>(prompt_mask),
                       .best = pointer<float>(best),
                       .note = pointer<float>(note),
                       .counters = pointer<int32_t>(counters),
                       .stride = stride,
                       .rows = rows,
                       .vocab_size = vocab_size,
                       .is_bf16 = is_bf16},
                      stream);
           });
}

}  // namespace nemo
