/*
 * InternVLProcessor: a conversation with its media becomes ids and tiles. Bytes to numbers; no
 * device, no ranks.
 *
 * Everything here runs on bytes of a client: every failure is a struct error, every size is bounded
 * by struct processor_limits before memory is taken. Immutable after open; any thread may prepare.
 */
#ifndef INTERNVLD_PROCESSOR_PROCESSOR_H
#define INTERNVLD_PROCESSOR_PROCESSOR_H

#include <stddef.h>
#include <stdint.h>

#include "daemon/processor/tokenizer.h"
#include "kernels/arena.h"
#include "kernels/error.h"

struct processor;

/* Settings with safe defaults (processor_limits_default()); 0 is never "no limit". */
struct processor_limits {
    int64_t max_image_pixels;    // of one picture before tiling: 64 Mi
    int max_media;               // pictures and videos of one prompt: 64
    int max_tiles;               // of one prompt, all media: 128
    int max_frames;              // of one video after sampling: 128
    int64_t max_video_pixels;    // of one frame before resizing: 16 Mi
    int64_t max_video_frames;    // of one video before sampling: 262144
    int max_video_seconds;       // of processor time to decode one video: 20
    int64_t max_prompt_tokens;   // set by the gateway from max_model_len
    int max_messages, max_parts; // 1024 turns, 4096 parts
    size_t max_text_bytes;       // 16 MiB of text in one prompt
};
struct processor_limits processor_limits_default(void);

enum part_kind { PART_TEXT, PART_IMAGE, PART_VIDEO };
/* Tiling of one picture; -1: the model's preprocessor_config (GotOcr2ImageProcessor). */
struct tiling_options {
    int crop_to_patches, min_patches, max_patches, use_thumbnail;
};
/* Frame sampling of one video (InternVLVideoProcessor.sample_frames). num_frames 0 and fps 0: the
 * model's video_preprocessor_config; initial_shift NAN: its default; sample -1: its default. */
struct video_options {
    int num_frames, sample;
    double fps, initial_shift;
};
struct media_bytes {
    const uint8_t *bytes;
    size_t n_bytes;
};
struct content_part {
    enum part_kind kind;
    const char *text;     // PART_TEXT, [n_bytes], need not be terminated
    const uint8_t *bytes; // PART_IMAGE, PART_VIDEO: the file's bytes [n_bytes]
    size_t n_bytes;
    const struct media_bytes *frames; // PART_VIDEO instead of bytes: picture files [n_frames]
    int n_frames;
    struct tiling_options tiling;
    struct video_options video;
};
struct chat_message {
    const char *role; // "system", "user", "assistant" (others are refused: INVALID_ARGUMENT)
    const struct content_part *parts;
    int n_parts;
};
struct conversation {
    const struct chat_message *messages;
    int n_messages;
    int continue_final_message; // no end mark after the last message, no generation prompt
};

struct media_plan {
    enum part_kind kind;
    int width, height;     // of the decoded picture (frame)
    int n_columns, n_rows; // grid; 1 x 1 for video frames
    int n_tiles;           // thumbnail included; frames of a video
    int64_t first_tile;
};
/* The result; everything lives in the arena given to processor_prepare(). */
struct prompt {
    int32_t *ids; // [n_ids]
    int64_t n_ids, n_image_tokens;
    uint8_t *tiles; // [n_tiles, channels, tile_height, tile_width] before normalisation
    int n_tiles, channels, tile_height, tile_width;
    struct media_plan *media; // [n_media]
    int n_media;
    uint64_t decode_ns; // spent on media
};

/* What of the model the processor needs (filled by the gateway from struct model_config). */
struct processor_model {
    int image_token_id, image_seq_length;
    int n_channels, image_height,
        image_width; // of vision_config: fallback where no preprocessor_config exists
};
/* Reads the tokenizer, chat_template (checked to be InternVL's; another template is refused by
 * name), preprocessor_config.json, processor_config.json, video_preprocessor_config.json. */
struct processor *processor_open(const char *dir, const struct processor_model *m,
                                 const struct processor_limits *l, struct error *err);
void processor_close(struct processor *p);
const struct tokenizer *processor_tokenizer(const struct processor *p);
/* Per channel, of the fused normalisation: x = (float(u8) - mean[c]) / std[c] (both already times
 * 255). [n_channels] */
const float *processor_mean(const struct processor *p);
const float *processor_std(const struct processor *p);
int processor_tile_size(const struct processor *p, int *height, int *width);

/* The chat template: text with <IMG_CONTEXT> and <video> marks not yet expanded. In `a`; NULL and
 * an error. */
char *processor_render(const struct processor *p, const struct conversation *c, struct arena *a,
                       size_t *n_bytes, struct error *err);
int processor_prepare(const struct processor *p, const struct conversation *c, struct arena *a,
                      struct prompt *out, struct error *err);

#endif
