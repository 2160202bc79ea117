// The decoding state of the running batch, shared with Python (cpu.py holds the arrays).
#pragma once

#include "vectors.h"

namespace t5 {

// Lanes are rows of the batch that a document keeps: one for greedy search, one a beam otherwise.
struct Search {
    // By lane. `stride` is a lane's room in tokens and ancestry.
    int32_t* tokens;    // start token first
    int32_t* ancestry;  // whose key a position has
    float* scores;
    int32_t* best_tokens;  // finished hypotheses, the best first
    int32_t* best_steps;
    float* best_scores;
    uint8_t* best_done;
    int64_t stride;
    // By document. `lanes` has room for `most_beams`.
    int32_t* lanes;
    int64_t most_beams;
    int32_t *beams, *steps, *least, *most, *ngram;
    double* length_penalty;
    float* repetition_penalty;
    uint8_t *early, *improvable;
    // Of the model; forced ids are negative where there are none.
    const int32_t* suppressed;
    const int32_t* begin_suppressed;
    int32_t suppressed_count, begin_suppressed_count;
    int32_t forced_first, forced_last;
    int32_t vocabulary, eos, start;
};

// The rows of one step: a document's follow each other.
struct Rows {
    int32_t *tokens, *lanes, *positions;
    int32_t *firsts, *counts;  // by document of the step
};

}  // namespace t5
