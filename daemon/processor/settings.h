/*
 * What preprocessor_config.json, processor_config.json and video_preprocessor_config.json ask for,
 * as Transformers 5 reads them: an "image_processor" or "video_processor" inside
 * processor_config.json wins over the file of its own; a missing video file falls back to the
 * image's. Every field that is used is checked, and what cannot be done is refused by name.
 */
#ifndef INTERNVLD_PROCESSOR_SETTINGS_H
#define INTERNVLD_PROCESSOR_SETTINGS_H

#include "daemon/processor/processor.h"
#include "kernels/error.h"

#define SETTINGS_MAX_CHANNELS 4

struct image_settings { // GotOcr2ImageProcessor
    int tile_width, tile_height;
    int crop_to_patches; // always 1: InternVLProcessor's default, whatever the file says
    int min_patches, max_patches;
    /* of the fused normalisation (float(u8) - mean) / std; both divided by rescale_factor */
    float mean[SETTINGS_MAX_CHANNELS], std[SETTINGS_MAX_CHANNELS];
};
struct video_settings {   // InternVLVideoProcessor
    int sample;           // do_sample_frames
    int num_frames;       // 0: not given
    double fps;           // 0: not given
    double initial_shift; // NAN: true, half a step
};
struct settings {
    struct image_settings image;
    struct video_settings video;
};

int settings_load(struct settings *s, const char *dir, const struct processor_model *m,
                  struct error *err);

#endif
