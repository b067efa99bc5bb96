/*
 * A checkpoint's processor files made up for a test: a directory under TMPDIR with a tokenizer of
 * 256 bytes, a few merges and InternVL's added tokens, the template and the JSON files. Tests
 * change one file at a time.
 */
#ifndef INTERNVLD_TESTS_UNIT_CHECKPOINT_H
#define INTERNVLD_TESTS_UNIT_CHECKPOINT_H

#include "daemon/processor/processor.h"

#define CHECKPOINT_IMAGE_TOKEN 302
#define CHECKPOINT_TILE 28
#define CHECKPOINT_SEQ_LENGTH 4

/* Makes the directory with every file; its path in dir [256]. */
void checkpoint_make(char *dir);
void checkpoint_remove(const char *dir);
void checkpoint_write(const char *dir, const char *file, const char *text);
void checkpoint_delete(const char *dir, const char *file);
/* vocab.json of the 256 bytes and `more`, which is pasted behind them. */
void checkpoint_write_vocab(const char *dir, const char *more);
/* tokenizer.json with one piece of text replaced; `from` must occur. */
void checkpoint_edit_tokenizer(const char *dir, const char *from, const char *to);

extern const char checkpoint_template[];
extern const struct processor_model checkpoint_model;

/* A PNG of width x height pixels of a gradient; caller frees. */
uint8_t *checkpoint_png(int width, int height, size_t *n_bytes);
uint8_t *checkpoint_jpeg(int width, int height, int progressive, size_t *n_bytes);

#endif
