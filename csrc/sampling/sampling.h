// From logits to tokens: host functions.
#pragma once

#include <cstdint>

namespace nemo {

using Stream = uintptr_t;

// Rows of logits and, of every slot, what it wants of them: see SlotParams in nemo_engine/ops/sample.py.
struct SampleInputs {
    int64_t* tokens;     // (rows,)
    const void* logits;  // (rows, vocab_size), bf16 or fp32; elements of a row dense
    const int64_t *slot_ids, *positions;  // (rows,)
    const double *temperature, *min_p;
    const int64_t* top_k;
    const double* top_p;
    const int64_t* seed_keys;
    const double *frequency, *presence, *repetition;
    int32_t* output_counts;       // (slots, vocab_size)
    const uint8_t* prompt_mask;   // likewise
    float *best, *note;           // (rows, sample_subs(vocab_size)): scratch
    int32_t* counters;            // (rows,) zeros, which are zeros again afterwards
    int64_t stride;               // elements between rows
    int rows, vocab_size;
    bool is_bf16;
};

// Sub-blocks of which two numbers are noted.
int sample_subs(int vocab_size);

void sample(const SampleInputs& in, Stream stream);

}  // namespace nemo
