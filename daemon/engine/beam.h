/*
 * Beam search over one prompt: which continuations live on, which are finished, when it is over.
 *
 * Arithmetic on scores and ids and nothing else: whoever runs the beams hands in the best next
 * tokens of each and is told from which beam each new one descends, and by which token. Scores are
 * float32 sums of log-probabilities, added in the order in which Transformers adds them; equal ones
 * are told apart by beam, then by id. Owned by a ticket, so by the engine thread.
 *
 * Source: Transformers GenerationMixin._beam_search (without sampling and without groups).
 */
#ifndef INTERNVLD_ENGINE_BEAM_H
#define INTERNVLD_ENGINE_BEAM_H

#include <stdint.h>

#include "parallel/batch.h"

#define BEAMS_MAX (TOP_LOGPROBS_MAX / 2)

enum early_stopping {     // Transformers' early_stopping
    EARLY_STOPPING_FALSE, // when no running beam is likely to beat the worst finished one
    EARLY_STOPPING_TRUE,  // when as many are finished as there are beams
    EARLY_STOPPING_NEVER, // when no running beam can beat the worst finished one
};

struct beam_settings {
    int32_t n_beams;      // 2 … BEAMS_MAX
    int32_t n_best;       // candidates a step, of each beam and of all together: beams_needed()
    int32_t max_tokens;   // of a continuation
    float length_penalty; // scores of finished ones are divided by length^this
    enum early_stopping early_stopping;
};

struct beam_finished { // the best so far, best first
    float score;       // sum of log-probabilities / length^length_penalty
    int is_complete;   // 0: an empty place
    int ends_by_token; // an end token is the last; otherwise max_tokens was reached
    int32_t *ids;      // [n_ids]
    int32_t n_ids;
};

struct beam_search {
    struct beam_settings settings;
    float scores[BEAMS_MAX];    // of the running beams, best first
    int32_t parents[BEAMS_MAX]; // after a step: the beam that beam i descends from,
    int32_t tokens[BEAMS_MAX];  // and the token it goes on with
    int32_t n_tokens;           // drawn so far by each running beam
    int can_improve;            // a running beam may still enter `finished`
    struct beam_finished finished[BEAMS_MAX];
    struct sample_result rows[BEAMS_MAX]; // best next tokens of beam i, where has_row
    int has_row[BEAMS_MAX];
};

/* Candidates that a step must look at: enough that n_beams are left when every end token wins.
 * n_end_tokens: distinct tokens that end a continuation. */
int32_t beams_needed(int32_t n_beams, int32_t n_end_tokens);

struct beam_search *beam_search_new(const struct beam_settings *s);
void beam_search_free(struct beam_search *b); // accepts NULL

/* One step from rows [n_rows], n_rows 1 (the prompt's end) or n_beams: their `top` holds the n_best
 * next tokens with their log-probabilities after penalties and bans. outputs[i] [n_tokens] are the
 * ids that beam i has drawn; is_end tells whether a token ends a continuation. Fills parents and
 * tokens; has_row is cleared. Returns 1 when the search is over. */
int beam_search_step(struct beam_search *b, int32_t n_rows, const int32_t *const *outputs,
                     int (*is_end)(const void *arg, int32_t id), const void *arg);

#endif
