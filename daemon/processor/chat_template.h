/*
 * InternVL's chat template, written in C. The checkpoint's template is only compared with the texts
 * that this code is equal to; another one is refused by name, never interpreted.
 *
 * Rendering is plain concatenation: "<|im_start|>ROLE\n", the parts, "<|im_end|>\n" for each
 * message, then "<|im_start|>assistant\n". No default system message, no trimming.
 */
#ifndef INTERNVLD_PROCESSOR_CHAT_TEMPLATE_H
#define INTERNVLD_PROCESSOR_CHAT_TEMPLATE_H

#include <stddef.h>

#include "daemon/processor/processor.h"
#include "daemon/processor/unicode.h"
#include "kernels/error.h"

#define CHAT_IMAGE_TOKEN "<IMG_CONTEXT>"
#define CHAT_VIDEO_TOKEN "<video>"
#define CHAT_OLD_IMAGE_MARK "<image>" // of early -hf files

struct chat_template {
    const char *image_mark; // CHAT_IMAGE_TOKEN or CHAT_OLD_IMAGE_MARK
};

/* Finds the template as Transformers does: chat_template.jinja, chat_template.json,
 * processor_config.json, tokenizer_config.json, the first that has one. FAILED_PRECONDITION with
 * the file's name when it is not InternVL's. */
int chat_template_load(struct chat_template *t, const char *dir, struct error *err);

/* The conversation as text. `frames` NULL: a picture is image_mark and a video is <video>, each
 * with a newline, as the template says. Else media are expanded as InternVLProcessor does, one
 * <IMG_CONTEXT> for all features of a tile group: a picture is "<img><IMG_CONTEXT></img>\n", the
 * k-th video of frames[k] frames "Frame1: <img><IMG_CONTEXT></img>\nFrame2: …". INVALID_ARGUMENT
 * for no messages, a role that is not system, user or assistant, or text that holds a media mark.
 * Appends to `out`. */
int chat_template_render(const struct chat_template *t, const struct conversation *c,
                         const int *frames, struct byte_buffer *out, struct error *err);

#endif
