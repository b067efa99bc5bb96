/*
 * Vision and language ranks that compute a small deterministic function instead of a model, so that
 * the engine can be tested over real control connections, with real batches and pages.
 *
 * A feature is a function of its tile's pixel and its row. A cache entry is a hash of the entry
 * before it, the token and the feature; the next token is a function of the last entry. Some pixels
 * and tokens misbehave on demand.
 */
#ifndef INTERNVLD_TESTS_FAKE_WORKERS_H
#define INTERNVLD_TESTS_FAKE_WORKERS_H

#include <stdint.h>

#include "parallel/comm.h"
#include "parallel/control.h"

#define FAKE_DIM 3
#define FAKE_FEATURES_PER_TILE 4
#define FAKE_EOS 3
#define FAKE_IMAGE_TOKEN 7
#define FAKE_LOGITS 5 // columns
#define FAKE_N_IDS 50 // ids that are drawn

enum { TOKEN_SLOW = 60, TOKEN_NOT_FINITE, TOKEN_DIE };   // in a prompt
enum { PIXEL_HELD = 253, PIXEL_SLOW, PIXEL_NOT_FINITE }; // the first of a tile

float fake_feature(int pixel, int32_t row);
uint64_t fake_entry(uint64_t before, int32_t id, float feature);
int32_t fake_next_token(uint64_t entry, int32_t candidate, int32_t position);
/* What is drawn instead of a banned id. */
#define FAKE_OTHER_TOKEN 40

/* Tiles that are PIXEL_HELD are held back until there is a file `gate`. */
void fake_vision_run(struct control *c, const char *gate);
/* `pipe` joins shard 0 of the first stage to shard 0 of the last; NULL for others. */
void fake_language_run(struct control *c, const struct topology *t, struct comm *pipe,
                       int32_t page_size, int32_t n_pages);

#endif
